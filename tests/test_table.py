import json

import pytest

from hf_ext.errors import ConfigError
from hf_ext.table import KEYS, Row, format_value, pivot, read_rows, to_markdown, to_rich, write_rows


ROWS = [
    Row("ojakv", "dense", "1k, bf16", "bytes", 46080, "B"),
    Row("ojakv", "dense", "1k, bf16", "loss", 3.52104, "nats", 3, 0.01234),
    Row("ojakv", "ojakv", "1k, bf16", "bytes", 18000, "B"),
    Row("ojakv", "dense", "2k, bf16", "bytes", 92160, "B"),
]


def test_rows_come_back_as_they_were_written(tmp_path):
    assert read_rows(write_rows(tmp_path / "deep" / "rows.json", ROWS)) == ROWS


def test_the_file_is_a_list_of_objects_with_exactly_the_agreed_keys(tmp_path):
    data = json.loads(write_rows(tmp_path / "rows.json", ROWS).read_text())
    assert [set(item) for item in data] == [
        {"method", "system", "setting", "metric", "value", "unit", "n", "spread"}
    ] * len(ROWS)


def test_no_rows_are_an_empty_list(tmp_path):
    assert read_rows(write_rows(tmp_path / "rows.json", [])) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_not_written(tmp_path, value):
    with pytest.raises(ConfigError, match="not finite"):
        write_rows(tmp_path / "rows.json", [Row("m", "s", "x", "y", value)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["{}", "[1]", '[{"method": "ojakv"}]', "nonsense"])
def test_a_file_of_another_shape_is_refused_by_name(tmp_path, text):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ConfigError, match="rows.json"):
        read_rows(tmp_path / "rows.json")


def test_pivot_has_one_line_per_setting_and_system_and_one_column_per_metric():
    header, lines = pivot(ROWS)
    assert header == ["setting", "system", "bytes (B)", "loss (nats)"]
    assert lines == [
        ["1k, bf16", "dense", "46,080", "3.521 ± 0.01234"],
        ["1k, bf16", "ojakv", "18,000", ""],
        ["2k, bf16", "dense", "92,160", ""],
    ]


def test_pivot_can_be_turned():
    header, lines = pivot(ROWS[:1] + ROWS[2:], index=("system",), columns=("setting", "metric"))
    assert header == ["system", "1k, bf16, bytes (B)", "2k, bf16, bytes (B)"]
    assert lines == [["dense", "46,080", "92,160"], ["ojakv", "18,000", ""]]


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0"), (3.0, "3"), (0.123456, "0.1235"), (12345.6, "12,346"), (1e-7, "1e-07")]
)
def test_numbers_are_short(value, shown):
    assert format_value(Row("m", "s", "x", "y", value)) == shown


def test_markdown_aligns_numbers_right():
    assert to_markdown(ROWS[:1]) == (
        "| setting | system | bytes (B) |\n| --- | --- | ---: |\n| 1k, bf16 | dense | 46,080 |\n"
    )


def test_the_terminal_table_shows_the_same_grid():
    table = to_rich(ROWS, title="ojakv")
    assert [column.header for column in table.columns] == pivot(ROWS)[0]
    assert table.row_count == 3


def test_keys_are_the_agreed_ones():
    assert KEYS == ("method", "system", "setting", "metric", "value", "unit", "n", "spread")
