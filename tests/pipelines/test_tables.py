"""Tables of every kind in, one matrix out: columns, levels, medians, and what is refused."""

import datetime
import decimal
import sys

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from hf_ext.errors import ConfigError, DataError, MissingPackageError
from hf_ext.pipelines.tables import CATEGORY_SCALE, TableFeatureExtractor, read_batches


COLUMNS = {
    "age": [20.0, 30.0, 40.0, 50.0],
    "city": ["Rome", "Oslo", "Rome", "Rome"],
    "member": [True, False, True, True],
}
NAMES = ["age", "city=Rome", "city=Oslo", "city=<other>", "member=True", "member=False", "member=<other>"]
MATRIX = [[20, 1, 0, 0, 1, 0, 0], [30, 0, 1, 0, 0, 1, 0], [40, 1, 0, 0, 1, 0, 0], [50, 1, 0, 0, 1, 0, 0]]


def _extractor(data, columns=None, categories=(), **settings):
    return TableFeatureExtractor(**settings).fit(read_batches(data), columns, categories)


def _encode(extractor, data):
    return np.concatenate([extractor.encode(table) for table in read_batches(data)])


def _forms(columns):
    rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
    data_set = datasets.Dataset.from_dict(columns)
    return {
        "mapping": columns,
        "rows": rows,
        "arrow": pa.table(columns),
        "chunked": pa.concat_tables([pa.table(columns).slice(0, 1), pa.table(columns).slice(1)]),
        "frame": pd.DataFrame(columns),
        "frame of categories": pd.DataFrame(columns).astype({"city": "category"}),
        "data set": data_set,
        "shuffled data set": datasets.Dataset.from_dict({k: v[::-1] for k, v in columns.items()}).select([3, 2, 1, 0]),
        "torch format": data_set.with_format("torch", columns=["age"]),
        "stream": data_set.to_iterable_dataset(num_shards=2),
        "generator": datasets.IterableDataset.from_generator(lambda: iter(rows)),
    }


# Reading


@pytest.mark.parametrize("form", _forms(COLUMNS))
def test_every_form_of_a_table_gives_the_same_matrix(form):
    data = _forms(COLUMNS)[form]
    extractor = _extractor(data)
    assert extractor.feature_names == NAMES
    assert extractor.groups == [0, 1, 1, 1, 2, 2, 2]
    assert extractor.scale_floors == [0.0] + [CATEGORY_SCALE] * 6
    found = _encode(extractor, data)
    assert found.dtype == np.float64
    assert found.tolist() == MATRIX


@pytest.mark.parametrize(
    "matrix",
    [
        [[1, 2], [3, 4], [5, 6]],
        np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=np.float16),
        torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.uint8),
        torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.bfloat16, requires_grad=True),
    ],
    ids=["list", "array", "uint8", "bfloat16"],
)
def test_a_matrix_has_columns_by_number(matrix):
    extractor = _extractor(matrix)
    assert extractor.feature_names == ["x0", "x1"]
    assert _encode(extractor, matrix).tolist() == [[1, 2], [3, 4], [5, 6]]


def test_rows_are_read_some_at_a_time_and_in_order():
    for data in ({"a": np.arange(10)}, datasets.Dataset.from_dict({"a": range(10)}), np.arange(10)[:, None]):
        batches = list(read_batches(data, names=["a"], batch_size=4))
        assert [batch.num_rows for batch in batches] == [4, 4, 2]
        assert pa.concat_tables(batches).column("a").to_pylist() == list(range(10))


def test_time_stamps_as_numbers_keep_all_their_digits():
    stamps = [1_700_000_000_123_456.0, 1_700_000_000_123_457.0]
    assert _encode(_extractor({"t": stamps}), {"t": stamps})[:, 0].tolist() == stamps
    whole = [2**53 - 1, 2**53 - 2]
    assert _encode(_extractor({"t": whole}), {"t": whole})[:, 0].tolist() == whole


@pytest.mark.parametrize(
    "vectors",
    [
        pa.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
        pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int64(), 2)),
        pa.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], pa.large_list(pa.float32())),
        pa.array([[9.0, 9.0], [1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]).slice(1),
    ],
    ids=["list", "fixed size", "large list", "slice"],
)
def test_a_column_of_vectors_is_a_column_per_number(vectors):
    table = pa.table({"v": vectors, "x": [0, 0, 1]})
    extractor = _extractor(table)
    assert extractor.feature_names == ["v[0]", "v[1]", "x"]
    assert _encode(extractor, table).tolist() == [[1, 2, 0], [3, 4, 0], [5, 6, 1]]
    assert extractor.encode(table).tolist() == [[1, 2, 0], [3, 4, 0], [5, 6, 1]]


def test_columns_keep_the_order_of_the_fit_and_others_are_not_looked_at():
    extractor = _extractor(COLUMNS, columns=["member", "age"])
    assert extractor.feature_names == ["member=True", "member=False", "member=<other>", "age"]
    other = {"note": [datetime.date(2020, 1, 1)], "age": [1], "member": [False]}
    assert _encode(extractor, other).tolist() == [[0, 1, 0, 1]]


# Kinds of columns


def test_integers_that_become_floats_are_one_column_of_numbers():
    tables = [pa.table({"a": [1, 2]}), pa.table({"a": [2.5]}), pa.table({"a": pa.array([7], pa.int8())})]
    extractor = TableFeatureExtractor().fit(tables)
    assert extractor.columns == [{"name": "a", "kind": "number", "fill": 2.25}]
    assert [extractor.encode(table).tolist() for table in tables] == [[[1], [2]], [[2.5]], [[7]]]


@pytest.mark.parametrize(
    "values",
    [
        pa.array([1, 2, 3], pa.uint8()),
        pa.array([1, 2, 3], pa.uint64()),
        pa.array(np.array([1, 2, 3], np.float16)),
        pa.array([decimal.Decimal("1.00"), decimal.Decimal("2.00"), decimal.Decimal("3.00")]),
        pa.chunked_array([[1], [2, 3]]),
    ],
    ids=["uint8", "uint64", "half", "decimal", "chunks"],
)
def test_every_kind_of_number_is_read(values):
    table = pa.table({"a": values})
    assert _encode(_extractor(table), table).tolist() == [[1], [2], [3]]


def test_numbers_named_as_categories_are_levels_whole_or_not():
    extractor = _extractor({"code": [1, 2, 2]}, categories=["code"])
    assert extractor.feature_names == ["code=2", "code=1", "code=<other>"]
    assert _encode(extractor, {"code": [1.0, 2.0, 3.0]}).tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]


def test_only_the_most_frequent_levels_are_kept():
    values = ["a"] * 5 + ["b"] * 4 + ["c"] * 3 + ["d"]
    extractor = _extractor({"x": values}, max_levels=2)
    assert extractor.feature_names == ["x=a", "x=b", "x=<other>"]
    assert _encode(extractor, {"x": ["b", "d", "new"]}).tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 1]]


def test_levels_are_counted_over_all_batches():
    tables = [pa.table({"x": ["a", "b"]}), pa.table({"x": ["b", "c"]}), pa.table({"x": ["c", "c"]})]
    assert TableFeatureExtractor().fit(tables).columns[0]["levels"] == ["c", "b", "a"]


def test_a_missing_category_is_a_level_where_it_was_seen_and_another_where_not():
    seen = _extractor({"x": ["a", None, "a"]})
    assert seen.feature_names == ["x=a", "x=<missing>", "x=<other>"]
    assert _encode(seen, {"x": pa.array([None, "a"])}).tolist() == [[0, 1, 0], [1, 0, 0]]
    unseen = _extractor({"x": ["a", "b"]})
    assert _encode(unseen, {"x": pa.array([None, "a"])}).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert _encode(unseen, {"x": pa.array([None, None], pa.string())}).tolist() == [[0, 0, 1], [0, 0, 1]]


def test_nan_among_numbers_that_are_categories_is_missing_in_every_form():
    values = [1.0, 2.0, float("nan"), 1.0]
    for data in (
        pd.DataFrame({"k": values}),
        datasets.Dataset.from_dict({"k": values}),
        {"k": pa.array([1, 2, None, 1])},
    ):
        extractor = _extractor(data, categories=["k"])
        assert extractor.feature_names == ["k=1", "k=2", "k=<missing>", "k=<other>"]
        assert _encode(extractor, data)[:, 2].tolist() == [0, 0, 1, 0]


def test_text_that_is_all_numbers_is_a_category():
    assert _extractor({"zip": ["01", "02", "01"]}).columns[0]["levels"] == ["01", "02"]


# Missing numbers


def test_missing_numbers_are_refused_by_name_and_row():
    for values in ([1.0, float("nan"), 2.0], pa.array([1, None, 2]), pd.array([1, None, 2], dtype="Int64")):
        data = pd.DataFrame({"ok": [1, 2, 3], "bad": values}) if not isinstance(values, list) else {"bad": values}
        with pytest.raises(DataError, match=r"column 'bad' has missing values .* in row 1; .*missing=\"impute\""):
            _extractor(data)
        with pytest.raises(DataError, match="column 'bad' has missing values"):
            _encode(_extractor({"bad": [1.0, 2.0]}), data)


def test_missing_numbers_become_the_median_and_a_column_that_says_so():
    extractor = _extractor({"a": [1.0, float("nan"), 2.0, 9.0], "c": ["x", "y", "x", "y"]}, missing="impute")
    assert extractor.feature_names == ["a", "a=<missing>", "c=x", "c=y", "c=<other>"]
    assert extractor.scale_floors[:2] == [0.0, CATEGORY_SCALE]
    found = _encode(extractor, {"a": pa.array([None, 5.0]), "c": ["x", "y"]})
    assert found.tolist() == [[2, 1, 1, 0, 0], [5, 0, 0, 1, 0]]


def test_a_column_without_any_value_is_refused_or_constant():
    for empty in (pa.nulls(3), pa.nulls(3, pa.float64()), [float("nan")] * 3):
        table = pa.table({"a": [1, 2, 3], "b": empty})
        with pytest.raises(DataError, match="column 'b' has missing values"):
            _extractor(table)
        assert _encode(_extractor(table, missing="impute"), table)[:, 2:].tolist() == [[0, 1]] * 3


@pytest.mark.parametrize("missing", ["error", "impute"])
def test_infinity_is_never_imputed(missing):
    with pytest.raises(DataError, match="column 'a' holds infinity, in row 2"):
        _extractor({"a": [1.0, 2.0, float("inf")]}, missing=missing)


# What is refused


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([datetime.date(2020, 1, 1)] * 2, "date32"),
        ([datetime.datetime(2020, 1, 1)] * 2, "timestamp"),
        ([datetime.timedelta(1)] * 2, "duration"),
        ([{"a": 1}] * 2, "struct"),
        ([b"x"] * 2, "binary"),
    ],
    ids=["date", "time", "duration", "struct", "bytes"],
)
def test_other_types_are_refused_with_the_column_and_a_way_out(values, kind):
    for data in ({"ok": [1, 2], "when": values}, datasets.Dataset.from_dict({"ok": [1, 2], "when": values})):
        with pytest.raises(DataError, match=f"column 'when' has type .*{kind}.*columns="):
            _extractor(data)
    assert _encode(_extractor({"ok": [1, 2], "when": values}, columns=["ok"]), {"ok": [1]}).tolist() == [[1]]


def test_text_among_numbers_is_refused_with_the_text():
    with pytest.raises(DataError, match="column 'a' mixes numbers and text, for example 'n/a'"):
        _extractor({"a": ["1", "2.5", "n/a", "4"]})
    assert _extractor({"a": ["1", "x", "y", None]}).columns[0]["kind"] == "category"


@pytest.mark.parametrize(
    "data",
    [
        [{"a": 1}, {"a": "x"}],
        {"a": [1, "x"]},
        pd.DataFrame({"a": [1, "x"]}, dtype=object),
        datasets.IterableDataset.from_generator(lambda: iter([{"a": 1}, {"a": "x"}])),
    ],
    ids=["rows", "mapping", "frame", "stream"],
)
def test_columns_of_mixed_values_are_refused(data):
    with pytest.raises(DataError):
        _extractor(data)


def test_a_column_that_changes_its_type_between_batches_is_refused():
    with pytest.raises(DataError, match="column 'a' is read as string from row 2 on"):
        TableFeatureExtractor().fit([pa.table({"a": [1, 2]}), pa.table({"a": ["x"]})])
    with pytest.raises(DataError, match="column 'a' is read as int64 from row 1 on"):
        TableFeatureExtractor().fit([pa.table({"a": ["x"]}), pa.table({"a": [1]})])


def test_text_where_numbers_were_fitted_is_refused():
    with pytest.raises(DataError, match="column 'a' held numbers when the model was fitted; here it is string"):
        _encode(_extractor({"a": [1, 2]}), {"a": ["x"]})


@pytest.mark.parametrize(
    "vectors",
    [[[1.0], [1.0, 2.0]], [[1.0], None], [[[1.0]], [[2.0]]]],
    ids=["ragged", "null", "nested"],
)
def test_lists_that_are_not_vectors_are_refused_by_name(vectors):
    with pytest.raises(DataError, match="column 'v' holds lists of different lengths"):
        _extractor({"x": [1, 2], "v": vectors})


def test_vectors_of_another_length_than_fitted_are_refused():
    extractor = _extractor({"v": [[1.0, 2.0], [3.0, 4.0]]})
    with pytest.raises(DataError, match=r"no column 'v\[1\]'"):
        _encode(extractor, {"v": [[1.0]]})


@pytest.mark.parametrize(
    "data", [{"a": []}, pd.DataFrame({"a": []}), datasets.Dataset.from_dict({"a": []})], ids=["m", "f", "d"]
)
def test_a_table_without_rows_is_refused(data):
    with pytest.raises(DataError, match="no rows; fitting needs at least 2"):
        _extractor(data)


def test_absent_columns_are_named_with_those_there():
    with pytest.raises(DataError, match="no column 'b'; it has 'a'"):
        _extractor({"a": [1, 2]}, columns=["b"])
    with pytest.raises(DataError, match="no such column in the table: b"):
        _extractor({"a": [1, 2]}, categories=["b"])
    with pytest.raises(DataError, match="no such columns in the table: b, c"):
        _extractor({"a": [1, 2]}, categories=["b", "c"])
    with pytest.raises(DataError, match="and 12 more"):
        _encode(_extractor({"b": [1, 2]}), {f"a{i}": [1] for i in range(20)})
    with pytest.raises(DataError, match="no columns are left"):
        _extractor({"a": [1, 2]}, columns=[])


@pytest.mark.parametrize(
    "data",
    [
        None,
        3,
        "table.csv",
        [],
        [1.0, 2.0],
        [[1.0], [1.0, 2.0]],
        np.zeros((2, 2, 2)),
        np.array([["a", "b"]]),
        np.zeros((2, 2), complex),
        {"a": 1.0},
        {"a": [1, 2], "b": [1]},
        datasets.DatasetDict(train=datasets.Dataset.from_dict({"a": [1]})),
    ],
    ids=str,
)
def test_what_is_no_table_is_refused(data):
    with pytest.raises(DataError):
        list(read_batches(data))


def test_a_matrix_of_another_width_is_refused():
    with pytest.raises(DataError, match=r"the matrix has 3 columns; expected 2: 'x0', 'x1'"):
        list(read_batches(np.zeros((4, 3)), names=["x0", "x1"]))


@pytest.mark.parametrize("setting", [{"missing": "drop"}, {"max_levels": 0}, {"max_levels": 2.5}], ids=str)
def test_settings_that_cannot_work_are_named(setting):
    with pytest.raises(ConfigError, match=f"{next(iter(setting))}="):
        TableFeatureExtractor(**setting)


def test_an_extractor_that_was_not_fitted_says_so():
    for call in (lambda e: e({"a": [1]}), lambda e: e.encode(pa.table({"a": [1]})), lambda e: e.feature_names):
        with pytest.raises(DataError, match="call fit first"):
            call(TableFeatureExtractor())


def test_without_pyarrow_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingPackageError, match="pip install"):
        list(read_batches(np.zeros((2, 2))))


# As a feature extractor of transformers


def test_rows_in_a_tensor_out():
    extractor = _extractor(COLUMNS)
    row = {"age": 30.0, "city": "Oslo", "member": False}
    assert extractor(row)["features"].tolist() == MATRIX[1:2]
    assert extractor([row, row])["features"].tolist() == MATRIX[1:2] * 2
    assert extractor(COLUMNS)["features"].dtype == torch.float64
    assert extractor(COLUMNS)["features"].tolist() == MATRIX


def test_settings_survive_their_file(tmp_path):
    extractor = _extractor(
        {**COLUMNS, "n": [1.0, None, 2.0, 3.0], "é": ["ü", "<x>", "ü", "\u2603"]}, missing="impute", max_levels=2
    )
    extractor.save_pretrained(tmp_path)
    again = TableFeatureExtractor.from_pretrained(tmp_path)
    assert (again.columns, again.missing, again.max_levels) == (extractor.columns, "impute", 2)
    assert again.feature_names == extractor.feature_names
