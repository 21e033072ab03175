"""Quick comparison of TCCM: anomalies of three packaged tables, fitted on normal rows, next to neighbours, forests and norms.

The tables are scikit-learn's: breast cancer (malignant), wine (one cultivar) and digits (one digit) as anomalies. Half of
the normal rows train. Peers are the norm of the standardised row, the distance to the fifth nearest training row, the
Mahalanobis distance, an isolation forest, and the paper's single network at 100 and 1,000 steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from hf_ext.errors import MissingPackageError
from hf_ext.pipelines.tccm import TCCMConfig, TCCMModel
from hf_ext.table import Row


def run(seeds: int = 3) -> list[Row]:
    """Mean AUROC and AUPR over three tables.

    Args:
        seeds (`int`, defaults to 3): Splits and starts.

    Raises:
        MissingPackageError: scikit-learn is not installed.
    """
    try:
        from sklearn.metrics import average_precision_score, roc_auc_score
    except ImportError:
        raise MissingPackageError('the bench of tccm needs scikit-learn: pip install "hf-ext[detect]".') from None
    found: dict[tuple[str, str], list[float]] = {}
    for seed in range(seeds):
        values: dict[tuple[str, str], list[float]] = {}
        for X, y in packaged_tables().values():
            train, test, truth = _split(X, y, seed)
            for name, score in _systems(train, seed).items():
                scores = score(test)
                values.setdefault((name, "AUROC"), []).append(roc_auc_score(truth, scores))
                values.setdefault((name, "AUPR"), []).append(average_precision_score(truth, scores))
        for key, numbers in values.items():
            found.setdefault(key, []).append(statistics.mean(numbers))
    return [
        Row(
            "tccm",
            name,
            "3 packaged tables",
            metric,
            statistics.mean(numbers),
            n=len(numbers),
            spread=statistics.stdev(numbers) if len(numbers) > 1 else 0.0,
        )
        for (name, metric), numbers in found.items()
    ]


def packaged_tables() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Rows and what is an anomaly among them, of three tables that come with scikit-learn."""
    from sklearn.datasets import load_breast_cancer, load_digits, load_wine

    cancer, wine, digits = load_breast_cancer(), load_wine(), load_digits()
    return {
        "breast cancer": (cancer.data, 1 - cancer.target),
        "wine": (wine.data, (wine.target == 2).astype(int)),
        "digits": (digits.data, (digits.target == 9).astype(int)),
    }


def _split(X: np.ndarray, y: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    normal = np.random.default_rng(seed).permutation(np.flatnonzero(y == 0))
    half = len(normal) // 2
    test = np.concatenate([normal[half:], np.flatnonzero(y == 1)])
    mean, deviation = X[normal[:half]].mean(0), X[normal[:half]].std(0)
    z = (X - mean) / np.where(deviation > 0, deviation, 1.0)
    return z[normal[:half]], z[test], y[test]


def _systems(train: np.ndarray, seed: int) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    from sklearn.covariance import EmpiricalCovariance
    from sklearn.ensemble import IsolationForest
    from sklearn.neighbors import NearestNeighbors

    near = NearestNeighbors(n_neighbors=5).fit(train)
    forest = IsolationForest(random_state=seed).fit(train)

    def ours(**settings: Any) -> Callable[[np.ndarray], np.ndarray]:
        model = TCCMModel(TCCMConfig(feature_size=train.shape[1], seed=seed, **settings)).fit(torch.from_numpy(train))
        return lambda rows: model.score(torch.from_numpy(rows)).numpy()

    return {
        "tccm": ours(),
        "tccm paper, 100 steps": ours(mode="paper", steps=100),
        "tccm paper, 1000 steps": ours(mode="paper", steps=1000),
        "norm of z": lambda rows: np.linalg.norm(rows, axis=1),
        "5th neighbour": lambda rows: near.kneighbors(rows)[0][:, -1],
        "mahalanobis, full": EmpiricalCovariance().fit(train).mahalanobis,
        "isolation forest": lambda rows: -forest.score_samples(rows),
    }
