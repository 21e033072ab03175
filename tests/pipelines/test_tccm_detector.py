"""`TCCMDetector` in scikit-learn's terms, and `TCCMPyOD` in PyOD's."""

import importlib
import pickle
import sys

import numpy as np
import pytest
import torch


pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from hf_ext.errors import ConfigError, MissingPackageError
from hf_ext.pipelines.tccm import TCCMConfig, TCCMModel
from hf_ext.pipelines.tccm_detector import TCCMDetector
from hf_ext.pipelines.tccm_explain import explain


SMALL = {"members": 2, "hidden_size": 16, "steps": 20, "batch_size": 64}


def _rows(n=150, d=3, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)) @ (np.eye(d) + 0.5) + 4.0


@pytest.fixture(scope="module")
def fitted():
    return TCCMDetector(**SMALL).fit(_rows())


def test_all_checks_of_scikit_learn_that_apply_pass():
    results = check_estimator(TCCMDetector(members=1, hidden_size=8, steps=3), on_fail=None, on_skip=None)
    failed = [(result["check_name"], str(result["exception"])) for result in results if result["status"] == "failed"]
    assert not failed
    assert sum(result["status"] == "passed" for result in results) >= 46


def test_the_detector_is_the_model_with_scikit_learns_signs(fitted):
    model = TCCMModel(TCCMConfig(feature_size=3, **SMALL)).eval().fit(torch.from_numpy(_rows()))
    test = np.concatenate([_rows(50, seed=1), _rows(20, seed=2) + 9])
    scores = model.score(torch.from_numpy(test))
    np.testing.assert_array_equal(fitted.score_samples(test), -scores.double().numpy())
    np.testing.assert_array_equal(fitted.predict(test), np.where(scores > model.threshold, -1, 1))
    assert fitted.offset_ == -float(model.threshold)
    np.testing.assert_allclose(fitted.decision_function(test), fitted.score_samples(test) - fitted.offset_, atol=1e-12)
    assert roc_auc_score([1] * 50 + [-1] * 20, fitted.decision_function(test)) > 0.99


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_the_stated_share_of_the_training_rows_is_flagged(share):
    detector = TCCMDetector(**SMALL, contamination=share)
    assert (detector.fit_predict(_rows()) == -1).sum() == pytest.approx(150 * share, abs=1)


def test_rows_that_are_all_the_same_are_normal():
    rows = np.ones((20, 2))
    assert (TCCMDetector(**SMALL).fit(rows).predict(rows) == 1).all()


def test_the_same_state_gives_the_same_scores_and_the_global_state_stays():
    before = np.random.get_state()[1].copy()
    one, two = (TCCMDetector(**SMALL, random_state=7).fit(_rows()).score_samples(_rows()) for _ in range(2))
    assert (np.random.get_state()[1] == before).all()
    np.testing.assert_array_equal(one, two)
    states = [
        TCCMDetector(**SMALL, random_state=np.random.RandomState(5)).fit(_rows()).score_samples(_rows())
        for _ in range(2)
    ]
    np.testing.assert_array_equal(*states)
    assert not np.array_equal(one, states[0])
    assert np.isfinite(TCCMDetector(**SMALL, random_state=None).fit(_rows()).offset_)


def test_clone_and_pickle(fitted):
    twin = clone(fitted)
    assert twin.get_params() == fitted.get_params()
    assert not hasattr(twin, "model_")
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.score_samples(_rows(seed=3)), fitted.score_samples(_rows(seed=3)))


def test_explanations_sum_to_the_scores(fitted):
    rows = _rows(20, seed=4)
    for method in ("conditional", "direct"):
        parts = fitted.explain(rows, method)
        np.testing.assert_array_equal(parts, explain(fitted.model_, torch.from_numpy(rows), method).double().numpy())
        np.testing.assert_allclose(parts.sum(1), -fitted.score_samples(rows), rtol=1e-4)


def test_parts_one_after_another_are_those_of_the_model():
    detector = (
        TCCMDetector(**SMALL).partial_fit(_rows(40)).partial_fit(_rows(1, seed=1)).partial_fit(_rows(60, seed=2))
    )
    model = TCCMModel(TCCMConfig(feature_size=3, **SMALL)).eval()
    for part in (_rows(40), _rows(1, seed=1), _rows(60, seed=2)):
        model.partial_fit(torch.from_numpy(part))
    np.testing.assert_array_equal(
        -detector.score_samples(_rows()), model.score(torch.from_numpy(_rows())).double().numpy()
    )
    assert detector.offset_ == -float(model.threshold)
    with pytest.raises(ValueError, match="2 features, but TCCMDetector is expecting 3"):
        detector.partial_fit(_rows(5, 2))
    detector.fit(_rows(30, 2))
    assert detector.n_features_in_ == 2


def test_in_a_pipeline_with_an_encoder():
    rows = np.array([["a", "x"], ["b", "y"], ["a", "y"], ["b", "x"]] * 20, dtype=object)
    detector = make_pipeline(OneHotEncoder(sparse_output=False, handle_unknown="ignore"), TCCMDetector(**SMALL)).fit(
        rows
    )
    known, unknown = detector.score_samples(np.array([["a", "x"], ["new", "x"]], dtype=object))
    assert unknown < known
    assert make_pipeline(StandardScaler(), TCCMDetector(**SMALL)).fit(_rows()).predict(_rows()).shape == (150,)


def test_in_a_search():
    rows = np.concatenate([_rows(100), _rows(40, seed=1), _rows(20, seed=2) + 9])
    labels = np.array([1] * 140 + [-1] * 20)
    split = PredefinedSplit([-1] * 100 + [0] * 60)
    grid = {"steps": [0, 5], "neighbors": [1, 5]}
    found = GridSearchCV(TCCMDetector(**SMALL), grid, cv=split, scoring="roc_auc", refit=True).fit(rows, labels)
    assert set(found.best_params_) == {"steps", "neighbors"}
    assert found.best_score_ > 0.99


def test_columns_of_a_frame_are_checked_by_name():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(_rows(), columns=["a", "b", "c"])
    detector = TCCMDetector(**SMALL).fit(frame)
    assert detector.feature_names_in_.tolist() == ["a", "b", "c"]
    with pytest.raises(ValueError, match="feature names"):
        detector.predict(frame[["b", "a", "c"]])


@pytest.mark.parametrize("call", ["score_samples", "decision_function", "predict", "explain"])
def test_before_the_fit_it_says_so(call):
    with pytest.raises(NotFittedError):
        getattr(TCCMDetector(), call)(_rows())


@pytest.mark.parametrize(
    "bad", [_rows(1), np.full((5, 3), np.nan), np.full((5, 3), np.inf), np.zeros(5)], ids=["one", "nan", "inf", "1d"]
)
def test_rows_that_cannot_be_used_are_refused(bad):
    with pytest.raises(ValueError, match="sample|NaN|infinity|1D"):
        TCCMDetector(**SMALL).fit(bad)


def test_settings_are_checked_by_fit_and_not_before():
    with pytest.raises(ConfigError, match="steps=-1"):
        TCCMDetector(steps=-1).fit(_rows())
    with pytest.raises(ConfigError, match="needs epochs or steps"):
        TCCMDetector("paper").fit(_rows())
    paper = TCCMDetector("paper", epochs=2, hidden_size=8).fit(_rows())
    assert len(paper.model_.references) == 0
    with pytest.raises(ConfigError, match="use method='direct'"):
        paper.explain(_rows())


@pytest.mark.parametrize(
    ("module", "package"),
    [("tccm_detector", "sklearn.base"), ("tccm_pyod", "pyod.models.base")],
    ids=["sklearn", "pyod"],
)
def test_without_the_other_library_the_import_says_what_to_install(monkeypatch, module, package):
    monkeypatch.delitem(sys.modules, f"hf_ext.pipelines.{module}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match="pip install"):
        importlib.import_module(f"hf_ext.pipelines.{module}")


# PyOD


@pytest.fixture(scope="module")
def pyod():
    pytest.importorskip("pyod")
    from hf_ext.pipelines.tccm_pyod import TCCMPyOD

    return TCCMPyOD


def test_pyods_signs_labels_and_threshold(pyod, fitted):
    detector = pyod(contamination=0.1, **SMALL).fit(_rows())
    test = np.concatenate([_rows(50, seed=1), _rows(20, seed=2) + 9])
    np.testing.assert_array_equal(detector.decision_function(test), -fitted.score_samples(test))
    np.testing.assert_array_equal(detector.decision_scores_, detector.decision_function(_rows()))
    assert set(detector.labels_) == {0, 1}
    assert detector.labels_.sum() == 15
    np.testing.assert_array_equal(detector.labels_, (detector.decision_scores_ > detector.threshold_).astype(int))
    assert detector.predict(test)[50:].tolist() == [1] * 20
    probabilities = detector.predict_proba(test)
    assert probabilities.shape == (70, 2)
    assert probabilities[50:, 1].min() > probabilities[:50, 1].mean()


def test_pyods_clone_and_settings(pyod):
    detector = pyod(contamination=0.2, **SMALL, random_state=3)
    twin = clone(detector)
    assert type(twin) is pyod
    assert twin.get_params() == detector.get_params() == {"contamination": 0.2, **SMALL, "random_state": 3}
    twin.set_params(steps=4, contamination=0.05)
    assert twin.get_params()["steps"] == 4
    assert twin.contamination == 0.05
    assert detector.get_params()["steps"] == 20
    again = pickle.loads(pickle.dumps(detector.fit(_rows())))
    np.testing.assert_array_equal(again.decision_function(_rows()), detector.decision_scores_)


def test_pyods_bad_settings_and_early_calls(pyod):
    with pytest.raises(ValueError, match="contamination"):
        pyod(contamination=0.7)
    with pytest.raises(TypeError, match="colour"):
        pyod(colour="red").fit(_rows())
    with pytest.raises(NotFittedError):
        pyod(**SMALL).predict(_rows())
    with pytest.raises(NotFittedError):
        pyod(**SMALL).decision_function(_rows())
    assert "TCCMPyOD" in repr(pyod(**SMALL))
