"""Detectors that `anomaly_quality.py` compares: ours, the paper's network at several settings, PyOD's, and two of one line.

All are fitted on rows believed normal, standardised by those rows, and score rows they have not seen. Peers run at their
package's defaults. PyOD is needed for its own detectors only: `pip install pyod`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from hf_ext.pipelines.tccm import TCCMConfig, TCCMModel


Scorer = Callable[[np.ndarray], np.ndarray]

# The paper's table 5. Per data set, so never a default; "other" is what its code falls back to.
PAPER_EPOCHS = {
    "optdigits": 2000,
    "SpamBase": 5000,
    "shuttle": 200,
    "mammography": 20,
    "annthyroid": 2000,
    "pendigits": 1000,
    "satellite": 10,
    "landsat": 6,
    "fault": 5000,
    "cardio": 2000,
    "letter": 50,
    "vowels": 20,
    "Pima": 5,
    "breastw": 1,
    "Ionosphere": 10,
    "WBC": 1,
    "glass": 200,
    "Lymphography": 3,
    "wine": 20,
    "Hepatitis": 1,
    "other": 100,
}


def standardise(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in standard deviations of the training rows; constant columns are left at their scale."""
    mean, deviation = train.mean(0), train.std(0)
    deviation[deviation < 1e-12] = 1.0
    return (train - mean) / deviation, (test - mean) / deviation


def tccm(train: np.ndarray, seed: int, **settings: object) -> Scorer:
    model = TCCMModel(TCCMConfig(feature_size=train.shape[1], seed=seed, **settings))
    model.fit(torch.from_numpy(train))
    return lambda rows: model.score(torch.from_numpy(rows)).numpy()


def paper(train: np.ndarray, seed: int, table: str) -> Scorer:
    """The paper's network, with its epochs for this table."""
    name = table.split("_")[-1]
    return tccm(train, seed, mode="paper", epochs=PAPER_EPOCHS.get(name, PAPER_EPOCHS["other"]))


def norm(train: np.ndarray, seed: int) -> Scorer:
    """The norm of the standardised row: what an untrained network scores."""
    return lambda rows: np.linalg.norm(rows, axis=1)


def mahalanobis(train: np.ndarray, seed: int) -> Scorer:
    from sklearn.covariance import EmpiricalCovariance

    return EmpiricalCovariance().fit(train).mahalanobis


def pyod(module: str, name: str, **settings: object) -> Callable[[np.ndarray, int], Scorer]:
    """A detector of PyOD at its defaults."""

    def fit(train: np.ndarray, seed: int) -> Scorer:
        import importlib

        cls = getattr(importlib.import_module(f"pyod.models.{module}"), name)
        seeded = {"random_state": seed} if name in ("IForest", "DeepSVDD") else {}
        extra = {"n_features": train.shape[1], "verbose": 0} if name == "DeepSVDD" else {}
        return cls(**seeded, **extra, **settings).fit(train).decision_function

    return fit


SYSTEMS: dict[str, Callable[[np.ndarray, int, str], Scorer]] = {
    "tccm": lambda train, seed, table: tccm(train, seed),
    "norm of z": lambda train, seed, table: norm(train, seed),
    "mahalanobis, full": lambda train, seed, table: mahalanobis(train, seed),
    "pyod knn": lambda train, seed, table: pyod("knn", "KNN")(train, seed),
    "pyod lof": lambda train, seed, table: pyod("lof", "LOF")(train, seed),
    "pyod iforest": lambda train, seed, table: pyod("iforest", "IForest")(train, seed),
    "pyod ecod": lambda train, seed, table: pyod("ecod", "ECOD")(train, seed),
    "pyod ocsvm": lambda train, seed, table: pyod("ocsvm", "OCSVM")(train, seed),
    "pyod deepsvdd": lambda train, seed, table: pyod("deep_svdd", "DeepSVDD")(train, seed),
    "tccm paper, its epochs": paper,
    "tccm paper, 100 steps": lambda train, seed, table: tccm(train, seed, mode="paper", steps=100),
    "tccm paper, 1000 steps": lambda train, seed, table: tccm(train, seed, mode="paper", steps=1000),
    "tccm paper, 5 nets, 100 steps": lambda train, seed, table: tccm(train, seed, mode="paper", steps=100, members=5),
    "tccm paper, 5 nets, 1000 steps": lambda train, seed, table: tccm(
        train, seed, mode="paper", steps=1000, members=5
    ),
}
