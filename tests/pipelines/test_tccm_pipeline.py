"""`TCCMPipeline` over data sets, streams, frames and matrices; `TabularAnomalyPipeline` one row at a time."""

import pathlib
import types
from unittest import mock

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from hf_ext.errors import ConfigError, DataError
from hf_ext.pipelines.tccm import TCCMConfig
from hf_ext.pipelines.tccm_pipeline import TASK, TabularAnomalyPipeline, TCCMPipeline
from tests.reference import tccm_naive as naive


SMALL = {"members": 2, "hidden_size": 16, "steps": 20, "batch_size": 64}


def _config(**settings):
    return TCCMConfig(**{**SMALL, **settings})


def _columns(n=120, seed=0):
    draw = np.random.default_rng(seed)
    a = draw.normal(size=n)
    return {
        "a": a,
        "b": 100 * a + draw.normal(size=n),
        "city": draw.choice(["Rome", "Oslo", "Lima"], n, p=[0.6, 0.3, 0.1]),
    }


def _data_set(n=120, seed=0):
    return datasets.Dataset.from_dict(_columns(n, seed))


def _rows(n=120, seed=0):
    return [dict(zip(_columns(), row)) for row in zip(*(column.tolist() for column in _columns(n, seed).values()))]


def _fit(data=None, config=None, **settings):
    return TCCMPipeline(config or _config(), **settings).fit(_data_set() if data is None else data, progress=False)


@pytest.fixture(scope="module")
def fitted():
    return _fit()


# Fit and score


FORMS = {
    "data set": _data_set,
    "stream": lambda n=120, seed=0: _data_set(n, seed).to_iterable_dataset(num_shards=3),
    "generator": lambda n=120, seed=0: datasets.IterableDataset.from_generator(lambda: iter(_rows(n, seed))),
    "frame": lambda n=120, seed=0: pd.DataFrame(_columns(n, seed)),
    "arrow": lambda n=120, seed=0: pa.table(_columns(n, seed)),
    "mapping": _columns,
    "rows": _rows,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_table_gives_the_same_fit_and_the_same_scores(fitted, form):
    make = FORMS[form]
    expected = fitted.score(_data_set(50, seed=1))
    assert expected.shape == (50,)
    assert expected.dtype == np.float32
    np.testing.assert_array_equal(_fit(make()).score(make(50, seed=1)), expected)
    np.testing.assert_array_equal(fitted.predict(make(50, seed=1)), expected > float(fitted.model.threshold))


def test_the_score_of_a_row_is_that_of_the_loops(fitted):
    rows = _data_set(10, seed=1)
    found = [naive.score(fitted.model, row) for row in fitted.extractor(rows)["features"].tolist()]
    np.testing.assert_allclose(fitted.score(rows), found, rtol=2e-4)


def test_a_matrix_is_scored_by_the_place_of_its_columns():
    matrix = np.random.default_rng(0).normal(size=(80, 3))
    pipeline = _fit(matrix)
    np.testing.assert_array_equal(pipeline.score(torch.from_numpy(matrix)), pipeline.score(matrix))
    np.testing.assert_array_equal(pipeline.score(matrix.tolist()), pipeline.score(matrix))
    named = _fit({"p": matrix[:, 0], "q": matrix[:, 1], "r": matrix[:, 2]})
    np.testing.assert_array_equal(named.score(matrix), pipeline.score(matrix))
    with pytest.raises(DataError, match="the matrix has 2 columns; expected 3"):
        pipeline.score(matrix[:, :2])


def test_means_and_scales_are_those_of_all_rows_and_the_rest_of_a_sample():
    """The rows fill three batches, and the first column drifts over them."""
    columns = {"a": np.arange(20_000.0), "b": np.random.default_rng(0).normal(size=20_000)}
    pipeline = _fit(columns, max_fit_rows=100)
    matrix = np.stack(list(columns.values()), axis=1)
    np.testing.assert_allclose(pipeline.model.mean, matrix.mean(0), rtol=1e-12)
    np.testing.assert_allclose(pipeline.model.scale, matrix.std(0), rtol=1e-12)
    assert len(pipeline.model.references) == 100
    assert int(pipeline.model.rows_seen) == 20_000
    kept = (pipeline.model.references.double() * pipeline.model.scale + pipeline.model.mean)[:, 0].sort().values
    assert kept[0] < 1200 < 18_800 < kept[-1]
    assert len(kept.round().unique()) == 100
    # Uniform: the largest gap of the sample's distribution function to the line is below 1.63 / sqrt(100), nearly always.
    assert np.abs(np.searchsorted(kept.numpy(), np.arange(20_000)) / 100 - np.arange(20_000) / 20_000).max() < 0.163


def test_the_sample_does_not_depend_on_how_the_rows_come():
    whole, parts = _data_set(300), _data_set(300).to_iterable_dataset(num_shards=7)
    one, two = (_fit(data, max_fit_rows=50).score(whole) for data in (whole, parts))
    np.testing.assert_array_equal(one, two)


def test_more_rows_are_learned_with_the_columns_of_the_first(fitted):
    pipeline = TCCMPipeline(_config()).partial_fit(_data_set())
    np.testing.assert_array_equal(pipeline.score(_data_set()), fitted.score(_data_set()))
    more = _columns(80, seed=5)
    more["city"] = np.array(["Kyiv"] * 80)
    pipeline.partial_fit(more)
    both = np.concatenate([_columns()["b"], more["b"]])
    assert float(pipeline.model.mean[1]) == pytest.approx(both.mean())
    assert float(pipeline.model.scale[1]) == pytest.approx(both.std())
    assert pipeline.extractor.columns == fitted.extractor.columns
    assert int(pipeline.model.rows_seen) == 200


def test_a_refused_fit_leaves_a_fitted_pipeline_as_it_was():
    pipeline = _fit()
    expected = pipeline.score(_data_set())
    for bad in ({"q": [1.0]}, {"q": [1.0, np.nan]}, {"q": []}):
        with pytest.raises(DataError):
            pipeline.fit(bad, progress=False)
    np.testing.assert_array_equal(pipeline.score(_data_set()), expected)


# Columns


def test_only_the_named_columns_are_used():
    pipeline = _fit(columns=["b", "a"])
    assert [column["name"] for column in pipeline.extractor.columns] == ["b", "a"]
    other = {**_columns(), "city": np.array([None] * 120), "note": np.array(["?"] * 120)}
    np.testing.assert_array_equal(pipeline.score(other), pipeline.score(_data_set()))
    with pytest.raises(DataError, match="no column 'zip'"):
        _fit(columns=["a", "zip"])
    with pytest.raises(DataError, match="no column 'b'; it has 'a', 'city'"):
        pipeline.score(_data_set().remove_columns("b"))


def test_class_labels_and_named_columns_of_numbers_are_categories():
    names = datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features({"x": datasets.Value("float32"), "kind": names, "code": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict(
        {"x": [0.5] * 40, "kind": [0, 1] * 20, "code": [7, 8, 9, 7] * 10}, features=features
    )
    for data in (rows, rows.to_iterable_dataset()):
        pipeline = _fit(data, categories=["code"])
        assert [column["kind"] for column in pipeline.extractor.columns] == ["number", "category", "category"]
        assert pipeline.extractor.feature_names[1:4] == ["kind=0", "kind=1", "kind=<other>"]
    assert [column["kind"] for column in _fit(rows, columns=["x", "code"]).extractor.columns] == ["number", "number"]


def test_an_unseen_category_scores_higher_and_does_not_drown_the_row(fitted):
    rows = _rows(30, seed=1)
    known = fitted.score(rows)
    unseen = fitted.score([{**row, "city": "Kyiv"} for row in rows])
    assert (unseen > known).all()
    assert unseen.max() < 20 * known.max()
    far = fitted.score([{**row, "b": row["b"] + 3000.0} for row in rows])
    assert (far > unseen).all()


def test_missing_numbers_are_refused_or_imputed():
    holes = _columns()
    holes["a"] = np.where(np.arange(120) % 10 == 0, np.nan, holes["a"])
    with pytest.raises(DataError, match=r"column 'a' has missing values .*missing=\"impute\""):
        _fit(holes)
    pipeline = _fit(holes, missing="impute")
    assert np.isfinite(pipeline.score(holes)).all()
    # Where nothing was missing before, a hole is news.
    whole = _fit(missing="impute")
    one = _rows(20, seed=1)
    assert (whole.score([{**row, "a": None} for row in one]) > whole.score(one)).all()


def test_vectors_are_columns_of_numbers():
    vectors = np.random.default_rng(0).normal(size=(60, 3))
    data = datasets.Dataset.from_dict({"id": list(range(60)), "v": vectors.tolist()})
    pipeline = _fit(data, columns=["v[0]", "v[1]", "v[2]"])
    plain = _fit({"x": vectors[:, 0], "y": vectors[:, 1], "z": vectors[:, 2]})
    np.testing.assert_array_equal(pipeline.score(data), plain.score(vectors))
    scored = pipeline.transform(data, explain=True)
    assert scored.column_names[:3] == ["id", "v", "anomaly_score"]
    np.testing.assert_array_equal(scored["anomaly_score"], pipeline.score(data))
    assert scored.column_names[-1] == "anomaly_part_v[2]"
    streamed = list(pipeline.transform(data.to_iterable_dataset()))
    assert [row["anomaly_score"] for row in streamed] == scored["anomaly_score"][:]
    ragged = datasets.Dataset.from_dict({"v": [[1.0], [1.0, 2.0]]})
    with pytest.raises(DataError, match="column 'v' holds lists of different lengths"):
        _fit(ragged)


# Transform


def test_transform_adds_score_and_flag_to_the_rows(fitted):
    data = _data_set(50, seed=1)
    scored = fitted.transform(data)
    assert scored.column_names == ["a", "b", "city", "anomaly_score", "is_anomaly"]
    assert set(scored[0]) == set(scored.column_names)
    assert scored.remove_columns(["anomaly_score", "is_anomaly"])[:] == data[:]
    np.testing.assert_array_equal(np.array(scored["anomaly_score"], dtype=np.float32), fitted.score(data))
    np.testing.assert_array_equal(scored["is_anomaly"], fitted.predict(data))
    assert scored.features["anomaly_score"] == datasets.Value("float32")
    assert scored.features["is_anomaly"] == datasets.Value("bool")
    assert data.column_names == ["a", "b", "city"]


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_batches_do_not_change_the_scores(fitted, batch_size):
    data = _data_set(50, seed=1)
    for source in (data, data.to_iterable_dataset()):
        scored = fitted.transform(source, batch_size=batch_size)
        np.testing.assert_array_equal(np.float32([row["anomaly_score"] for row in scored]), fitted.score(data))


def test_a_stream_stays_a_stream_with_the_scores_of_memory(fitted):
    read = []

    def rows():
        for row in _rows(50, seed=1):
            read.append(1)
            yield row

    source = datasets.IterableDataset.from_generator(rows)
    scored = fitted.transform(source, explain=True, batch_size=10)
    assert isinstance(scored, datasets.IterableDataset)
    assert read == []
    next(iter(scored))
    assert len(read) <= 20
    expected = fitted.transform(_data_set(50, seed=1), explain=True)
    assert list(scored) == list(expected)
    known = fitted.transform(_data_set(50, seed=1).to_iterable_dataset())
    assert known.features["anomaly_score"] == datasets.Value("float32")


@pytest.mark.parametrize("form", ["frame", "arrow", "mapping", "rows"])
def test_other_tables_become_data_sets(fitted, form):
    scored = fitted.transform(FORMS[form](50, seed=1))
    assert isinstance(scored, datasets.Dataset)
    np.testing.assert_array_equal(np.array(scored["anomaly_score"]), fitted.score(_data_set(50, seed=1)))
    assert scored["city"][:] == _data_set(50, seed=1)["city"][:]


def test_explain_adds_a_part_per_column_of_the_table(fitted):
    data = _data_set(50, seed=1)
    for method in ("conditional", "direct"):
        scored = fitted.transform(data, explain=True, method=method)
        parts = [name for name in scored.column_names if name.startswith("anomaly_part_")]
        assert parts == ["anomaly_part_a", "anomaly_part_b", "anomaly_part_city"]
        total = sum(np.array(scored[name]) for name in parts)
        np.testing.assert_allclose(total, scored["anomaly_score"], rtol=1e-4)
        for name, part in fitted.explain(data, method).items():
            np.testing.assert_allclose(scored[f"anomaly_part_{name}"], part, rtol=1e-3, atol=1e-5)


def test_the_part_of_a_broken_column_is_the_largest(fitted):
    rows = _rows(30, seed=1)
    for column, value in (("city", "Kyiv"), ("b", 900.0)):
        parts = fitted.explain([{**row, column: value} for row in rows])
        assert set(parts) == {"a", "b", "city"}
        share = parts[column] / sum(parts.values())
        assert np.median(share) > 0.5, (column, np.median(share))
    assert [len(part) for part in fitted.explain(_data_set().select([])).values()] == [0, 0, 0]


@pytest.mark.parametrize(
    "form",
    [
        lambda data: data,
        lambda data: data.with_format("torch"),
        lambda data: data.with_format("numpy", columns=["a"]),
        lambda data: data.with_format("pandas"),
        lambda data: data.with_format("torch", columns=["a"], output_all_columns=True),
    ],
    ids=["none", "torch", "numpy a", "pandas", "torch a and all"],
)
def test_the_format_of_the_data_set_is_kept_and_shows_the_scores(fitted, form):
    data = form(_data_set(20, seed=1))
    scored = fitted.transform(data)
    assert scored.format["type"] == data.format["type"]
    assert scored.format["output_all_columns"] == data.format["output_all_columns"]
    assert set(scored[0]) == set(data[0]) | {"anomaly_score", "is_anomaly"}
    assert type(scored[0]["a"]) is type(data[0]["a"])
    np.testing.assert_array_equal(np.array(scored.with_format(None)["anomaly_score"]), fitted.score(data))


def test_the_format_of_a_stream_is_kept(fitted):
    row = next(iter(fitted.transform(_data_set(20, seed=1).to_iterable_dataset().with_format("torch"))))
    assert isinstance(row["a"], torch.Tensor)
    assert isinstance(row["anomaly_score"], torch.Tensor)


def test_add_scores_serves_a_map_of_ones_own(fitted):
    data = _data_set(30, seed=1).with_format("arrow")
    scored = data.map(fitted.add_scores, batched=True, batch_size=8).with_format(None)
    assert scored[:] == fitted.transform(_data_set(30, seed=1))[:]


def test_two_processes_give_the_scores_of_one(fitted):
    data = _data_set(50, seed=1)
    scored = fitted.transform(data, num_proc=2, batch_size=10)
    np.testing.assert_array_equal(np.array(scored["anomaly_score"]), fitted.score(data))


@pytest.mark.parametrize("name", ["anomaly_score", "is_anomaly", "anomaly_p_value", "anomaly_part_a"])
def test_columns_of_the_result_that_are_there_already_are_refused(fitted, name):
    data = _data_set(20).add_column(name, [0.0] * 20)
    for source in (data, data.to_pandas(), data.to_iterable_dataset()):
        with pytest.raises(DataError, match=f"already has '{name}'"):
            fitted.transform(source)
    unknown = datasets.IterableDataset.from_generator(lambda: iter([{**row, name: 0.0} for row in _rows(5)]))
    with pytest.raises(DataError, match=f"already has '{name}'"):
        list(fitted.transform(unknown))


def test_no_rows_have_no_scores(fitted):
    assert fitted.score(_data_set().select([])).shape == (0,)
    assert fitted.predict(_data_set().select([])).shape == (0,)
    assert len(fitted.transform(_data_set().select([]))) == 0
    for call in (fitted.calibrate, fitted.partial_fit):
        with pytest.raises(DataError, match="at least 1 row"):
            call(_data_set().select([]))


# Calibration


def test_rows_kept_out_of_the_fit_give_p_values_and_the_threshold():
    pipeline = _fit(_data_set(200), calibration_fraction=0.25)
    assert pipeline.model.config.held_out
    assert len(pipeline.model.calibration) == 50
    assert len(pipeline.model.references) == 150
    scored = pipeline.transform(_data_set(40, seed=1))
    assert scored.column_names[-1] == "anomaly_p_value"
    expected = [naive.p_value(s, pipeline.model.calibration.tolist()) for s in scored["anomaly_score"]]
    np.testing.assert_allclose(scored["anomaly_p_value"], expected, rtol=1e-6)
    streamed = list(pipeline.transform(_data_set(40, seed=1).to_iterable_dataset()))
    assert [row["anomaly_p_value"] for row in streamed] == scored["anomaly_p_value"][:]


def test_rows_kept_out_are_as_odd_as_new_ones():
    """Also in small tables of heavy tails, where a row that had a say in the scales would look less odd: .14 for .1."""
    draw, below = np.random.default_rng(0), []
    for seed in range(120):
        table, new = draw.standard_t(2, size=(30, 8)), draw.standard_t(2, size=(40, 8))
        pipeline = _fit(table, _config(steps=0, hidden_size=2, seed=seed), calibration_fraction=0.3)
        below.append(
            float((pipeline.model.p_values(torch.from_numpy(pipeline.score(new))) <= 0.1 + 1e-6).double().mean())
        )
    # The mean of 120 has a deviation of .01.
    assert 0.075 < np.mean(below) < 0.125, np.mean(below)


def test_discoveries_are_those_of_benjamini_and_hochberg():
    pipeline = _fit().calibrate(_data_set(60, seed=3))
    far = [{**row, "b": row["b"] + 900.0} for row in _rows(15, seed=4)]
    rows = _rows(40, seed=5) + far
    p_values = [naive.p_value(score, pipeline.model.calibration.tolist()) for score in pipeline.score(rows)]
    for rate in (0.01, 0.1, 0.3):
        assert pipeline.discoveries(rows, rate).tolist() == naive.discoveries(p_values, rate)
    assert pipeline.discoveries(rows, 0.1)[40:].all()
    assert pipeline.discoveries(_data_set().select([])).tolist() == []


def test_the_share_of_false_discoveries_is_what_was_asked_for():
    pipeline, false, found = _fit(), [], []
    for seed in range(60):
        pipeline.calibrate(_columns(99, seed=1000 + seed))
        rows = _columns(50, seed=2000 + seed)
        rows["b"][40:] += 900.0
        named = pipeline.discoveries(rows, 0.2)
        false.append(named[:40].sum() / max(named.sum(), 1))
        found.append(named[40:].mean())
    # At most .2 * 40 / 50; the mean of 60 has a deviation of about .02.
    assert np.mean(false) < 0.16 + 0.06, np.mean(false)
    assert np.mean(false) > 0.02, "nothing false was ever named: the rate is not used up"
    assert np.mean(found) > 0.8


def test_p_values_are_refused_where_no_rows_were_kept_out(fitted):
    with pytest.raises(DataError, match="not fitted on"):
        fitted.discoveries(_data_set())
    pipeline = _fit().calibrate(_data_set(30, seed=3))
    for rate in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="false_discovery_rate="):
            pipeline.discoveries(_data_set(), rate)


# Saving, settings


def test_a_saved_pipeline_scores_the_same_bit_for_bit(tmp_path):
    for settings in ({}, {"missing": "impute", "calibration_fraction": 0.3}):
        pipeline = _fit(**settings)
        pipeline.save_pretrained(tmp_path / "new" / "folder")
        again = TCCMPipeline.from_pretrained(tmp_path / "new" / "folder")
        data = _data_set(50, seed=1)
        assert again.transform(data, explain=True)[:] == pipeline.transform(data, explain=True)[:]
        assert not again.model.training


def test_pushing_sends_model_and_columns(tmp_path, monkeypatch, fitted):
    sent = []

    def upload(self, working_dir, repo_id, files_timestamps, **kwargs):
        folder = pathlib.Path(working_dir)
        sent.extend(
            path.name for path in folder.iterdir() if path.stat().st_mtime > files_timestamps.get(path.name, 0)
        )

    created = types.SimpleNamespace(repo_id="me/detector")
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *words, **settings: created)
    monkeypatch.setattr("transformers.utils.hub.PushToHubMixin._upload_modified_files", upload)
    monkeypatch.setattr(
        "transformers.modeling_utils.create_and_tag_model_card", lambda *words, **settings: mock.Mock()
    )
    fitted.save_pretrained(tmp_path / "detector", push_to_hub=True, repo_id="me/detector")
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= set(sent)


def test_a_loaded_pipeline_learns_on(tmp_path, fitted):
    fitted.save_pretrained(tmp_path)
    one, two = (
        TCCMPipeline.from_pretrained(tmp_path).partial_fit(_data_set(40, seed=9)).score(_data_set()) for _ in range(2)
    )
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one, fitted.score(_data_set()))


def test_before_the_fit_it_says_so(tmp_path):
    pipeline = TCCMPipeline()
    for call in (
        pipeline.score,
        pipeline.predict,
        pipeline.transform,
        pipeline.explain,
        pipeline.calibrate,
        pipeline.discoveries,
    ):
        with pytest.raises(DataError, match="not fitted yet"):
            call(_data_set())
    with pytest.raises(DataError, match="not fitted yet"):
        pipeline.save_pretrained(tmp_path / "no")
    with pytest.raises(DataError, match="not fitted yet"):
        pipeline.push_to_hub("nobody/nothing")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "setting",
    [{"max_fit_rows": 1}, {"calibration_fraction": 1.0}, {"calibration_fraction": -0.1}, {"missing": "drop"}],
    ids=str,
)
def test_settings_that_cannot_work_are_named(setting):
    with pytest.raises(ConfigError, match=f"{next(iter(setting))}="):
        TCCMPipeline(**setting)


def test_too_few_rows_and_the_papers_mode_without_epochs_are_refused():
    with pytest.raises(DataError, match="the table has 1 row; fitting needs at least 2"):
        _fit(_data_set(1))
    with pytest.raises(DataError, match="no rows"):
        _fit(_data_set().select([]))
    with pytest.raises(ConfigError, match="needs epochs or steps"):
        TCCMPipeline(TCCMConfig(mode="paper")).fit(_data_set(), progress=False)


def test_the_papers_mode_over_a_table():
    pipeline = _fit(config=TCCMConfig(mode="paper", epochs=3, hidden_size=16))
    scored = pipeline.transform(_data_set(20, seed=1), explain=True, method="direct")
    assert len(scored) == 20
    assert pipeline.model.config.epochs == 3
    assert pipeline.model.config.steps is None


# One row at a time


@pytest.fixture(scope="module")
def task(fitted):
    return TabularAnomalyPipeline(model=fitted.model, feature_extractor=fitted.extractor, device="cpu")


def test_rows_as_mappings_score_as_in_a_table(task, fitted):
    rows = _rows(20, seed=1)
    found = task(rows)
    assert [one["score"] for one in found] == fitted.score(rows).tolist()
    assert [one["is_anomaly"] for one in found] == fitted.predict(rows).tolist()
    assert task(rows[0]) == found[0]
    assert set(found[0]) == {"score", "is_anomaly"}
    assert task.task in (None, TASK, "")


@pytest.mark.parametrize("batch_size", [2, 7, 64])
def test_batches_of_the_task_do_not_change_its_results(task, batch_size):
    rows = _rows(20, seed=1)
    assert task(rows, batch_size=batch_size) == task(rows)
    found, expected = task(rows, batch_size=batch_size, explain=True), task(rows, explain=True)
    for one, other in zip(found, expected):
        assert one["parts"] == pytest.approx(other["parts"], rel=1e-4)


def test_the_task_explains(task, fitted):
    rows = _rows(5, seed=1)
    expected = fitted.explain(rows)
    for place, one in enumerate(task(rows, explain=True)):
        assert one["parts"] == pytest.approx(
            {name: float(part[place]) for name, part in expected.items()}, rel=1e-3, abs=1e-6
        )
        assert sum(one["parts"].values()) == pytest.approx(one["score"], rel=1e-4)


def test_the_task_takes_rows_of_numbers_by_place():
    matrix = np.random.default_rng(0).normal(size=(60, 3))
    pipeline = _fit(matrix)
    task = TabularAnomalyPipeline(model=pipeline.model, feature_extractor=pipeline.extractor, device="cpu")
    assert [one["score"] for one in task(matrix[:6].tolist())] == pipeline.score(matrix[:6]).tolist()
    assert task(matrix[0])["score"] == pipeline.score(matrix[:1])[0]
    with pytest.raises(DataError, match="a row is 3 values, this is one number; pass a list of rows"):
        task([0.1, 0.2, 0.3])
    with pytest.raises(DataError, match="the matrix has 2 columns; expected 3"):
        task([[0.1, 0.2]])


def test_the_task_takes_rows_with_vectors():
    data = datasets.Dataset.from_dict(
        {"x": np.arange(40.0), "v": np.random.default_rng(0).normal(size=(40, 2)).tolist()}
    )
    pipeline = _fit(data)
    task = TabularAnomalyPipeline(model=pipeline.model, feature_extractor=pipeline.extractor, device="cpu")
    assert [one["score"] for one in task(data.select(range(5)).to_list())] == pipeline.score(
        data.select(range(5))
    ).tolist()


def test_the_task_gives_p_values_where_they_are_valid():
    pipeline = _fit().calibrate(_data_set(40, seed=2))
    task = TabularAnomalyPipeline(model=pipeline.model, feature_extractor=pipeline.extractor, device="cpu")
    rows = _rows(6, seed=1)
    expected = pipeline.transform(rows)["anomaly_p_value"]
    assert [one["p_value"] for one in task(rows, batch_size=3)] == pytest.approx(list(expected))


def test_the_task_refuses_what_it_cannot_read(task):
    with pytest.raises(DataError, match="no column 'b'"):
        task({"a": 1.0, "city": "Rome"})
    with pytest.raises(DataError, match="column 'a' has missing values"):
        task({"a": None, "b": 1.0, "city": "Rome"})
    with pytest.raises(DataError):
        task("a,b,c")
    with pytest.raises(ConfigError, match="no setting 'top_k'"):
        task(_rows(1), top_k=3)


def test_the_task_of_the_papers_model_explains_directly():
    pipeline = _fit(config=TCCMConfig(mode="paper", epochs=3, hidden_size=16))
    task = TabularAnomalyPipeline(model=pipeline.model, feature_extractor=pipeline.extractor, device="cpu")
    one = task(_rows(1)[0], explain=True)
    assert sum(one["parts"].values()) == pytest.approx(one["score"], rel=1e-4)
