"""Which filter finds the out-of-distribution (OOD) rows of a wild set, and what a head trained on them tells apart.

    python benchmarks/ood_quality.py [--features DIR] [--data images text digits] [--seeds 0 1 2 3 4] [--cache DIR]
                                     [--out benchmarks/results]

Feature vectors: `DIR` holds ResNet-18 features of CIFAR-10 and SVHN (ADBench's files); BBC news by MiniLM and SmolLM2, two topics held
out; without `DIR` no images. Half of the in-distribution rows are labelled, a quarter goes into the wild set, a quarter tests. A
multinomial logistic head on the labelled rows is the classifier whose logits and gradients filters and scores read.

Filters choose how many wild rows to take by themselves; `medix` is our default, `medix filter` the paper's score with our count.
`recall` is the share of the wild OOD rows that were taken. The head is then the same for all: `OODHead` on labelled rows against
chosen ones. `oracle` gets the right rows; `logistic on all wild` is scikit-learn's, with strong L2. Scores without
wild rows stand below. The exact leave-one-out score is timed against the loop at `--exact-rows` wild rows of 128 numbers; the loop's time is that of 20
of its steps, times the rows.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from ood_data import Split, digits, images, split, texts, topics_held_out
from tqdm.auto import tqdm

from hf_ext.pipelines.medix import MedixConfig, MedixFilter, median_shift_scores
from hf_ext.pipelines.ood_head import OODHead
from hf_ext.pipelines.ood_metrics import ood_metrics
from hf_ext.pipelines.ood_scores import SCORES
from hf_ext.table import Row, write_rows


FILTERS = {
    "medix": {},
    "medix filter": {"filter": "medix"},
    "medix paper": {"mode": "paper"},
    "sal": {"filter": "sal"},
    "knn filter": {"filter": "knn"},
    "grad_dist": {"filter": "grad_dist"},
    "all wild rows": {"filter": "all"},
    "random": {"filter": "random"},
}


def compare(data: Split, seed: int) -> dict[tuple[str, str], float]:
    """All numbers of one split, by system and metric."""
    from sklearn.linear_model import LogisticRegression

    found: dict[tuple[str, str], float] = {}
    classifier = LogisticRegression(max_iter=1000).fit(data.train.numpy(), data.labels.numpy())
    weight, bias = torch.from_numpy(classifier.coef_).float(), torch.from_numpy(classifier.intercept_).float()
    if len(weight) == 1:
        # Two classes: scikit-learn keeps one logit.
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2

    def rate(system: str, scores: torch.Tensor) -> None:
        metrics = ood_metrics(scores, data.test_is_ood)
        found[system, "AUROC"] = metrics["auroc"]
        found[system, "FPR95, in-distribution positive"] = metrics["fpr95_id_pos"]

    def judge(system: str, chosen: np.ndarray) -> None:
        found[system, "recall"] = float(data.wild_is_ood[chosen].sum() / data.wild_is_ood.sum())
        found[system, "share taken"] = len(chosen) / len(data.wild)
        rate(system, OODHead(seed=seed).fit(data.train, data.wild[chosen]).score(data.test))

    for name, settings in FILTERS.items():
        medix = MedixFilter(MedixConfig(seed=seed, **settings)).reference(data.train, data.labels, weight, bias)
        judge(name, medix.select(data.wild).numpy())
    judge("oracle", np.flatnonzero(data.wild_is_ood))
    rows = torch.cat([data.train, data.wild])
    mean, scale = rows.mean(0), rows.std(0).clamp_min(1e-6)
    kind = np.r_[np.zeros(len(data.train)), np.ones(len(data.wild))]
    head = LogisticRegression(C=1e-3, class_weight="balanced", max_iter=1000).fit(
        ((rows - mean) / scale).numpy(), kind
    )
    rate("logistic on all wild", torch.from_numpy(head.decision_function(((data.test - mean) / scale).numpy())))
    for name, score in SCORES.items():
        rate(f"{name}, no wild rows", score().fit(data.train, data.labels, weight, bias).score(data.test))
    return found


def summarise(setting: str, runs: list[dict[tuple[str, str], float]]) -> list[Row]:
    rows = []
    for system, metric in runs[0]:
        values = np.array([run[system, metric] for run in runs])
        spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
        rows.append(Row("medix", system, setting, metric, float(values.mean()), "", len(values), spread))
    gaps = np.array([run["oracle", "AUROC"] - run["medix", "AUROC"] for run in runs])
    rows.append(
        Row("medix", "medix", setting, "AUROC below oracle", float(gaps.mean()), "", len(gaps), float(gaps.std()))
    )
    return rows


def exact(rows: int, width: int = 128, steps: int = 20) -> list[Row]:
    """Time of the exact score against the loop, and the largest difference."""
    generator = torch.Generator().manual_seed(0)
    gradients, reference = torch.randn(rows, width, generator=generator), torch.zeros(width)
    start = time.process_time()
    scores = median_shift_scores(gradients, reference)
    ours = time.process_time() - start
    distance = (gradients.median(0).values - reference).norm()
    worst, start = 0.0, time.process_time()
    for row in range(steps):
        without = torch.cat([gradients[:row], gradients[row + 1 :]])
        loop = distance - (without.median(0).values - reference).norm()
        worst = max(worst, abs(float(loop - scores[row])))
    theirs = (time.process_time() - start) / steps * rows
    setting = f"leave-one-out scores of {rows:,} rows of {width} numbers"
    return [
        Row("medix", "medix exact", setting, "time", ours, "CPU s"),
        Row("medix", "loop", setting, "time", theirs, "CPU s"),
        Row("medix", "medix exact", setting, "times as fast", theirs / ours, "x"),
        Row("medix", "medix exact", setting, "largest difference to the loop", worst),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=Path, help="folder of resnet18_*.npz; no images if omitted")
    parser.add_argument(
        "--data", nargs="+", choices=("images", "text", "digits"), default=["images", "text", "digits"]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--exact-rows", type=int, default=10_000)
    parser.add_argument("--cache", type=Path, default=Path("benchmarks/cache"), help="features of texts are kept here")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if "images" in arguments.data and arguments.features is None:
        print("no --features: images are left out", file=sys.stderr)
    jobs = []
    if "images" in arguments.data and arguments.features is not None:
        for name, arrays in images(arguments.features).items():
            for prevalence in (0.1, 0.3, 0.5) if "SVHN" in name else (0.1, 0.3):
                jobs.append(("ood_images", name, prevalence, lambda seed, arrays=arrays: arrays))
    if "text" in arguments.data:
        for encoder in ("minilm", "smollm2"):
            X, y = texts(encoder, arguments.cache)
            for prevalence in (0.1, 0.3):
                make = lambda seed, X=X, y=y: topics_held_out(X, y, seed)  # noqa: E731
                jobs.append(("ood_text", f"BBC topics, {encoder}", prevalence, make))
    if "digits" in arguments.data:
        arrays = next(iter(digits().values()))
        jobs += [
            ("ood_digits", "digits 0-4 against 5-9", prevalence, lambda seed: arrays) for prevalence in (0.1, 0.3)
        ]
    found: dict[str, list[Row]] = {}
    for file, name, prevalence, make in tqdm(jobs):
        runs = [
            compare(split(*make(seed), prevalence, seed, train=0.5, wild=0.25), seed)
            for seed in tqdm(arguments.seeds, desc=f"{name}, {prevalence}", leave=False)
        ]
        found.setdefault(file, []).extend(summarise(f"{name}, prevalence {prevalence}", runs))
        write_rows(arguments.out / f"{file}.json", found[file])
    found["ood_exact"] = exact(arguments.exact_rows)
    write_rows(arguments.out / "ood_exact.json", found["ood_exact"])
    print(f"wrote {', '.join(f'{file}.json' for file in found)} to {arguments.out}")


if __name__ == "__main__":
    main()
