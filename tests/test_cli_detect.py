"""`hf-ext detect` from the command line: files in, one whole file out, or one line that says what is wrong."""

import pathlib
import sys

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest

from hf_ext.cli import main
from hf_ext.errors import DataError
from hf_ext.pipelines.tccm_pipeline import TCCMPipeline


def _frame(n=60, seed=0):
    draw = np.random.default_rng(seed)
    a = draw.normal(size=n)
    return pd.DataFrame(
        {"id": range(n), "a": a, "b": a * 10 + draw.normal(size=n), "city": draw.choice(["Rome", "Oslo"], n)}
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with tables, and a detector fitted on one of them without its ids. Not to be changed."""
    home = tmp_path_factory.mktemp("tables")
    _frame().to_csv(home / "train.csv", index=False)
    test = _frame(25, seed=1)
    test.to_csv(home / "test.csv", index=False)
    test.to_csv(home / "test.tsv", sep="\t", index=False)
    test.to_parquet(home / "test.parquet")
    test.to_json(home / "test.jsonl", orient="records", lines=True)
    (home / "empty.csv").write_text("")
    (home / "header.csv").write_text("id,a,b,city\n")
    (home / "malformed.csv").write_text("id,a,b,city\n1,0.5,5,Rome\n2,0.5,5,Rome,more,and,more\n")
    (home / "bytes.csv").write_bytes(b"\xff\xfe\x00\x01" * 50)
    (home / "malformed.jsonl").write_text('{"id": 1\n{{')
    (home / "malformed.parquet").write_text("this is no parquet")
    (home / "notes.txt").write_text("a,b")
    mixed = _frame(30).astype({"a": object})
    mixed.loc[7, "a"] = "n/a!"
    mixed.to_csv(home / "mixed.csv", index=False)
    late = _frame(12_000)
    late["a"] = late["a"].astype(object)
    late.loc[11_500, "a"] = "oops"
    late.to_csv(home / "late.csv", index=False)
    test.drop(columns="b").to_csv(home / "narrow.csv", index=False)
    test.assign(when=pd.Timestamp("2020-01-01")).to_parquet(home / "dates.parquet")
    test.assign(anomaly_score=1.0).to_csv(home / "scored.csv", index=False)
    test.assign(b=np.where(np.arange(25) == 4, np.nan, test["b"])).to_csv(home / "holes.csv", index=False)
    (home / "folder").mkdir()
    pipeline = TCCMPipeline(columns=["a", "b", "city"]).fit(_frame(), progress=False)
    pipeline.save_pretrained(home / "detector")
    return home


@pytest.fixture
def detect(home, tmp_path, monkeypatch):
    """Runs `hf-ext detect` in a folder of its own; names of files in `home` are put in place of themselves."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        known = {path.name for path in home.iterdir()}
        return main(["detect", *(str(home / word) if word in known else word for word in words)])

    return run


def _fails(capfd, code, message):
    captured = capfd.readouterr()
    assert code == 2
    assert len(captured.err.splitlines()) == 1, captured.err
    assert captured.err.startswith("hf-ext: ")
    assert message in captured.err
    assert captured.out == ""


def _left(folder):
    return sorted(path.name for path in pathlib.Path(folder).iterdir())


# What it writes


def test_rows_are_written_with_their_scores(detect, home, tmp_path, capfd):
    assert detect("train.csv", "test.csv", "--exclude", "id", "--out", "scores.parquet") == 0
    assert "25 rows scored" in capfd.readouterr().out
    found = pd.read_parquet(tmp_path / "scores.parquet")
    assert list(found.columns) == ["id", "a", "b", "city", "anomaly_score", "is_anomaly"]
    pd.testing.assert_frame_equal(found[["id", "a", "b", "city"]], _frame(25, seed=1), check_dtype=False)
    expected = TCCMPipeline.from_pretrained(home / "detector")
    np.testing.assert_allclose(found["anomaly_score"], expected.score(_frame(25, seed=1)), rtol=1e-5)
    assert found["is_anomaly"].tolist() == expected.predict(_frame(25, seed=1)).tolist()
    assert _left(tmp_path) == ["scores.parquet"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "jsonl"])
@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_every_kind_of_table_gives_the_same_scores(detect, home, tmp_path, kind, suffix):
    assert detect("detector", f"test.{kind}", "--out", f"new/folder/scores{suffix}") == 0
    read = pd.read_parquet if suffix == ".parquet" else pd.read_csv
    found = read(tmp_path / "new" / "folder" / f"scores{suffix}")
    expected = TCCMPipeline.from_pretrained(home / "detector").score(_frame(25, seed=1))
    np.testing.assert_allclose(found["anomaly_score"], expected, rtol=1e-5)
    assert found["id"].tolist() == list(range(25))


def test_explained_parts_sum_to_the_scores(detect, tmp_path):
    assert detect("detector", "test.csv", "--explain", "--out", "scores.csv") == 0
    found = pd.read_csv(tmp_path / "scores.csv")
    parts = [f"anomaly_part_{name}" for name in ("a", "b", "city")]
    assert list(found.columns[-3:]) == parts
    np.testing.assert_allclose(found[parts].sum(axis=1), found["anomaly_score"], rtol=1e-4)


def test_a_saved_detector_is_used_again(detect, tmp_path):
    assert detect("train.csv", "test.csv", "--columns", "a", "city", "--save", "mine", "--out", "one.parquet") == 0
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= set(_left(tmp_path / "mine"))
    assert detect("mine", "narrow.csv", "--out", "two.parquet") == 0
    one, two = pd.read_parquet(tmp_path / "one.parquet"), pd.read_parquet(tmp_path / "two.parquet")
    np.testing.assert_array_equal(one["anomaly_score"], two["anomaly_score"])


def test_settings_reach_the_fit(detect, tmp_path):
    words = ["train.csv", "train.csv", "--exclude", "id", "--out", "scores.csv"]
    assert (
        detect(
            *words, "--contamination", "0.3", "--seed", "5", "--trim", "0.1", "--save", "mine", "--categories", "city"
        )
        == 0
    )
    config = TCCMPipeline.from_pretrained(tmp_path / "mine").model.config
    assert (config.contamination, config.seed, config.trim) == (0.3, 5, 0.1)
    # The threshold is that of the rows that were not trimmed.
    assert 0.3 <= pd.read_csv(tmp_path / "scores.csv")["is_anomaly"].mean() <= 0.45


def test_missing_numbers_are_imputed_on_request(detect, tmp_path, capfd):
    assert detect("train.csv", "holes.csv", "--exclude", "id", "--missing", "impute", "--out", "scores.csv") == 0
    capfd.readouterr()
    _fails(capfd, detect("detector", "holes.csv", "--out", "more.csv"), "column 'b' has missing values")
    assert _left(tmp_path) == ["scores.csv"]
    assert np.isnan(pd.read_csv(tmp_path / "scores.csv")["b"][4])


def test_an_unseen_category_is_scored(detect, tmp_path):
    _frame(25, seed=1).assign(city="Kyiv").to_csv(tmp_path / "kyiv.csv", index=False)
    assert detect("detector", "kyiv.csv", "--out", "kyiv.parquet") == 0
    assert detect("detector", "test.csv", "--out", "known.parquet") == 0
    unseen, known = (pd.read_parquet(tmp_path / f"{name}.parquet")["anomaly_score"] for name in ("kyiv", "known"))
    assert (unseen > known).all()


def test_columns_that_are_not_used_may_be_of_any_type(detect, tmp_path):
    assert detect("detector", "dates.parquet", "--out", "scores.csv") == 0
    assert "when" in pd.read_csv(tmp_path / "scores.csv").columns


def test_the_table_may_be_its_own_output(detect, tmp_path):
    _frame(25, seed=1).to_csv(tmp_path / "mine.csv", index=False)
    assert detect("detector", "mine.csv", "--out", "mine.csv") == 0
    assert len(pd.read_csv(tmp_path / "mine.csv")) == 25
    assert "anomaly_score" in pd.read_csv(tmp_path / "mine.csv").columns


# What it refuses


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.csv", "does not exist"),
        ("empty.csv", "empty.csv is empty"),
        ("header.csv", "no rows"),
        ("malformed.csv", "Expected 4 fields in line 3, saw 7"),
        ("bytes.csv", "could not be read"),
        ("malformed.jsonl", "malformed.jsonl"),
        ("malformed.parquet", "malformed.parquet could not be read"),
        ("notes.txt", "notes.txt: expected one of .csv, .tsv, .parquet"),
        ("late.csv", "late.csv"),
        ("nobody/nothing", "neither a file nor a data set"),
    ],
)
@pytest.mark.parametrize("place", ["train", "train with --exclude", "test"])
def test_tables_that_cannot_be_read_are_named_in_one_line(detect, tmp_path, capfd, name, message, place):
    words = ["detector", name] if place == "test" else [name, "test.csv"]
    words += ["--exclude", "id"] if "exclude" in place else []
    words += [] if place == "test" else ["--save", "mine"]
    _fails(capfd, detect(*words, "--out", "scores.csv"), message)
    assert _left(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mixed.csv", "test.csv", "--out", "x.csv"], "column 'a' mixes numbers and text, for example 'n/a!'"),
        (["dates.parquet", "test.csv", "--out", "x.csv"], "column 'when' has type"),
        (["holes.csv", "test.csv", "--out", "x.csv"], "column 'b' has missing values"),
        (["detector", "mixed.csv", "--out", "x.csv"], "column 'a' held numbers when the model was fitted"),
        (["train.csv", "narrow.csv", "--out", "x.csv"], "narrow.csv: the table has no column 'b'"),
        (["detector", "narrow.csv", "--out", "x.csv"], "the table has no column 'b'; it has 'id', 'a', 'city'"),
        (["detector", "scored.csv", "--out", "x.csv"], "already has 'anomaly_score'"),
        (["detector", "folder", "--out", "x.csv"], "expected one of .csv"),
        (["folder", "test.csv", "--out", "x.csv"], "not a folder written by --save"),
        (["train.csv", "test.csv", "--out", "x.xlsx"], "--out x.xlsx must end in .parquet or .csv"),
        (["train.csv", "test.csv", "--out", "x"], "--out x must end in"),
        (["train.csv", "test.csv", "--out", "x.csv", "--columns", "zip"], "no column 'zip'"),
        (["train.csv", "test.csv", "--out", "x.csv", "--categories", "zip"], "no such column in the table: zip"),
        (["train.csv", "test.csv", "--out", "x.csv", "--exclude", "zip"], "--exclude zip"),
        (["train.csv", "test.csv", "--out", "x.csv", "--exclude", "id", "a", "b", "city"], "no columns are left"),
        (["train.csv", "test.csv", "--out", "x.csv", "--contamination", "0.9"], "contamination=0.9"),
        (["train.csv", "test.csv", "--out", "x.csv", "--trim", "0.7"], "trim=0.7"),
        (["train.csv", "test.csv", "--out", "x.csv", "--seed", "-1"], "seed=-1"),
        (["train.csv", "test.csv", "--out", "x.csv", "--save", "test.csv"], "is a file; expected a folder"),
    ],
)
def test_what_cannot_work_is_one_line_and_leaves_nothing(detect, tmp_path, capfd, words, message):
    _fails(capfd, detect(*words), message)
    assert _left(tmp_path) == []


def test_an_output_that_cannot_be_written_is_one_line(detect, tmp_path, capfd):
    (tmp_path / "taken.csv").mkdir()
    _fails(capfd, detect("detector", "test.csv", "--out", "taken.csv"), "is a folder")
    (tmp_path / "file").write_text("")
    _fails(capfd, detect("detector", "test.csv", "--out", "file/x.csv"), "cannot be written")
    assert _left(tmp_path) == ["file", "taken.csv"]


@pytest.mark.parametrize(
    "words", [[], ["a.csv", "b.csv"], ["a.csv", "--out", "x.csv"], ["a", "b", "--out", "x", "--missing", "drop"]]
)
def test_wrong_usage_exits_with_two(words, capfd):
    with pytest.raises(SystemExit) as caught:
        main(["detect", *words])
    assert caught.value.code == 2


def test_without_datasets_it_says_what_to_install(detect, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "datasets", None)
    _fails(capfd, detect("train.csv", "test.csv", "--out", "x.csv"), "pip install")


# Whole or not at all


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
@pytest.mark.parametrize(
    "error", [DataError("in the middle"), KeyboardInterrupt(), ZeroDivisionError()], ids=["ours", "interrupt", "bug"]
)
def test_an_error_in_the_middle_leaves_the_old_file_and_nothing_else(home, tmp_path, monkeypatch, suffix, error):
    _frame(20_000, seed=2).to_parquet(tmp_path / "long.parquet")
    out = tmp_path / "out" / f"scores{suffix}"
    out.parent.mkdir()
    out.write_bytes(b"the file of before")
    add_scores, calls, seen = TCCMPipeline.add_scores, [], []

    def breaks(self, table, explained=False):
        calls.append(table.num_rows)
        if len(calls) == 2:
            seen.extend(_left(out.parent))
            raise error
        return add_scores(self, table, explained)

    monkeypatch.setattr(TCCMPipeline, "add_scores", breaks)
    words = ["detect", str(home / "detector"), str(tmp_path / "long.parquet"), "--out", str(out)]
    if isinstance(error, ZeroDivisionError):
        with pytest.raises(ZeroDivisionError):
            main(words)
    else:
        assert main(words) == (2 if isinstance(error, DataError) else 130)
    assert len(calls) == 2
    assert len(seen) == 2, "nothing was being written beside the old file"
    assert out.read_bytes() == b"the file of before"
    assert _left(out.parent) == [out.name]


def test_a_column_that_changes_its_type_in_the_middle_leaves_the_old_file(home, tmp_path, monkeypatch, capfd):
    _frame(20_000, seed=2).to_parquet(tmp_path / "long.parquet")
    out = tmp_path / "scores.parquet"
    out.write_bytes(b"the file of before")
    add_scores, calls = TCCMPipeline.add_scores, []

    def changes(self, table, explained=False):
        scored = add_scores(self, table, explained)
        calls.append(1)
        place = scored.column_names.index("a")
        return scored.set_column(place, "a", [["x"] * scored.num_rows]) if len(calls) == 2 else scored

    monkeypatch.setattr(TCCMPipeline, "add_scores", changes)
    capfd.readouterr()
    _fails(
        capfd,
        main(["detect", str(home / "detector"), str(tmp_path / "long.parquet"), "--out", str(out)]),
        "changes its type",
    )
    assert out.read_bytes() == b"the file of before"
    assert _left(tmp_path) == ["long.parquet", "scores.parquet"]


def test_a_new_file_replaces_the_old_one_and_keeps_every_batch(detect, tmp_path):
    _frame(20_000, seed=2).to_parquet(tmp_path / "long.parquet")
    (tmp_path / "scores.parquet").write_bytes(b"the file of before")
    assert detect("detector", "long.parquet", "--out", "scores.parquet") == 0
    found = pyarrow.parquet.read_table(tmp_path / "scores.parquet")
    assert found.column("id").to_pylist() == list(range(20_000))
    assert found.column("anomaly_score").null_count == 0


def test_a_csv_column_may_change_its_type_late(tmp_path, capsys):
    # Readers infer types anew for each part of a file: here integers turn into floats after the first part.
    rows = 25_000
    lines = [f"{row if row < 22_000 else row + 0.5},{'' if row == 24_000 else row % 7}" for row in range(rows)]
    (tmp_path / "late.csv").write_text("a,b\n" + "\n".join(lines) + "\n")
    table, out = str(tmp_path / "late.csv"), tmp_path / "out.parquet"
    assert main(["detect", table, table, "--missing", "impute", "--out", str(out)]) == 0
    assert len(pd.read_parquet(out)) == rows


@pytest.mark.parametrize("flag", [["--trim", "0.1"], ["--columns", "a"], ["--missing", "impute"], ["--seed", "3"]])
def test_settings_of_a_fit_are_refused_for_a_fitted_folder(tmp_path, capsys, flag):
    (tmp_path / "detector").mkdir()
    (tmp_path / "t.csv").write_text("a\n1\n2\n")
    arguments = [
        "detect",
        str(tmp_path / "detector"),
        str(tmp_path / "t.csv"),
        "--out",
        str(tmp_path / "o.csv"),
        *flag,
    ]
    assert main(arguments) == 2
    assert f"{flag[0]}: " in capsys.readouterr().err
