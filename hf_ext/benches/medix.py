"""Quick comparison of Medix: which filter finds the out-of-distribution rows of a wild set, and what a head learns from them.

scikit-learn's digits 0 to 4 are in-distribution, with a fifth of them in the wild set and a fifth for testing; digits 5 to 9 are
not. Three in ten wild rows are. Every filter chooses how many rows to take by itself, but `oracle`, which takes the right ones;
`random` and `all` are the trivial baselines. The head is the same for all. MSP and the distance to the fifth
in-distribution neighbour need no wild rows.
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import torch

from hf_ext.errors import MissingPackageError
from hf_ext.table import Row


PREVALENCE = 0.3
FILTERS: dict[str, dict[str, Any]] = {
    "medix": {},
    "medix paper": {"mode": "paper"},
    "sal": {"filter": "sal"},
    "knn": {"filter": "knn"},
    "grad_dist": {"filter": "grad_dist"},
    "all": {"filter": "all"},
    "random": {"filter": "random"},
}


def run(seeds: int = 3) -> list[Row]:
    """Recall and precision of the filters, and AUROC of the heads.

    Args:
        seeds (`int`, defaults to 3): Splits.

    Raises:
        MissingPackageError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingPackageError('the bench of medix needs scikit-learn: pip install "hf-ext[detect]".') from None
    digits = load_digits()
    found: dict[tuple[str, str], list[float]] = {}
    for seed in range(seeds):
        for key, value in _compare(digits.data / 16, digits.target, seed).items():
            found.setdefault(key, []).append(value)
    setting = "digits 0 to 4 against 5 to 9, prevalence 0.3"
    return [
        Row(
            "medix",
            system,
            setting,
            metric,
            statistics.mean(values),
            n=len(values),
            spread=statistics.stdev(values) if len(values) > 1 else 0.0,
        )
        for (system, metric), values in found.items()
    ]


def _compare(X: np.ndarray, y: np.ndarray, seed: int) -> dict[tuple[str, str], float]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    from hf_ext.pipelines.medix import MedixConfig, MedixFilter
    from hf_ext.pipelines.ood_head import OODHead

    draw = np.random.default_rng(seed)
    inside, outside = draw.permutation(np.flatnonzero(y < 5)), draw.permutation(np.flatnonzero(y >= 5))
    fifth = len(inside) // 5
    train, wild_in, test_in = inside[2 * fifth :], inside[:fifth], inside[fifth : 2 * fifth]
    count = round(fifth * PREVALENCE / (1 - PREVALENCE))
    wild_out, test_out = outside[:count], outside[count:]
    wild = np.concatenate([wild_in, wild_out])
    test = torch.from_numpy(X[np.concatenate([test_in, test_out])])
    truth = np.r_[np.zeros(len(test_in)), np.ones(len(test_out))]
    classifier = LogisticRegression(max_iter=2000).fit(X[train], y[train])
    rows, wild_rows = torch.from_numpy(X[train]), torch.from_numpy(X[wild])

    def auroc(chosen: np.ndarray) -> float:
        return float(roc_auc_score(truth, OODHead(seed=seed).fit(rows, wild_rows[chosen]).score(test).numpy()))

    found: dict[tuple[str, str], float] = {}
    for name, settings in FILTERS.items():
        medix = MedixFilter(MedixConfig(seed=seed, **settings))
        medix.reference(rows, y[train], classifier.coef_, classifier.intercept_)
        chosen = medix.select(wild_rows).numpy()
        hits = int((chosen >= len(wild_in)).sum())
        found[name, "recall"] = hits / count
        found[name, "precision"] = hits / max(len(chosen), 1)
        found[name, "AUROC of the head"] = auroc(chosen) if len(chosen) else 0.5
    oracle = np.arange(len(wild_in), len(wild))
    found |= {("oracle", "recall"): 1.0, ("oracle", "precision"): 1.0, ("oracle", "AUROC of the head"): auroc(oracle)}
    chances = classifier.predict_proba(test.numpy()).max(1)
    near = torch.cdist(test, rows).kthvalue(5, dim=1).values
    found["msp, no wild rows", "AUROC of the head"] = float(roc_auc_score(truth, -chances))
    found["knn, no wild rows", "AUROC of the head"] = float(roc_auc_score(truth, near))
    return found
