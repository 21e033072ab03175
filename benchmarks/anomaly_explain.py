"""Which features were shifted: how often explanations name them.

    python benchmarks/anomaly_explain.py [--seeds 0 1 2 3 4] [--out benchmarks/results/anomaly_explain.json]

Normal rows come from four kinds of tables with correlated features. In each of 200 test rows m features are shifted by 1.5 to 3
standard deviations, in random directions. A system names the m features of its largest attributions; the number is the
Jaccard index with those shifted, mean over rows, then over seeds (tables and starts). `abs z` is the trivial baseline.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from tqdm.auto import tqdm

from hf_ext.pipelines.tccm import TCCMConfig, TCCMModel
from hf_ext.pipelines.tccm_explain import explain
from hf_ext.table import Row, write_rows


TRAIN, TEST = 3000, 200
KINDS = ("factors", "clusters with factors", "chain", "equal correlation")
SYSTEMS = ("tccm conditional", "tccm direct", "tccm paper, 300 steps", "abs z")


def sampler(kind: str, d: int, generator: np.random.Generator) -> Callable[[int], np.ndarray]:
    """A function of a number of rows: a few factors and noise, clusters of those, neighbours at .8, or all pairs at .6."""
    if kind in ("factors", "clusters with factors"):
        factors = max(2, d // 5)
        loadings = generator.normal(size=(d, factors))
        centres = 2 * generator.normal(size=(4, d)) * (kind != "factors")
        noise = 0.3 * factors**0.5
        return lambda n: (
            centres[generator.integers(0, 4, n)]
            + generator.normal(size=(n, factors)) @ loadings.T
            + noise * generator.normal(size=(n, d))
        )
    places = np.arange(d)
    covariance = 0.8 ** np.abs(places[:, None] - places) if kind == "chain" else np.full((d, d), 0.6) + 0.4 * np.eye(d)
    root = np.linalg.cholesky(covariance)
    return lambda n: generator.normal(size=(n, d)) @ root.T


def jaccard(attributions: torch.Tensor, shifted: torch.Tensor) -> float:
    m = int(shifted[0].sum())
    named = torch.zeros_like(shifted).scatter_(1, attributions.topk(m, dim=1).indices, True)
    both = (named & shifted).sum(1)
    return float((both / (2 * m - both)).mean())


def measure(kind: str, d: int, m: int, seed: int) -> dict[str, float]:
    generator = np.random.default_rng(seed)
    sample = sampler(kind, d, generator)
    train, test = sample(TRAIN), sample(TEST)
    shifted = np.zeros((TEST, d), dtype=bool)
    for row in range(TEST):
        places = generator.choice(d, m, replace=False)
        shifted[row, places] = True
        test[row, places] += train.std(0)[places] * generator.uniform(1.5, 3, m) * generator.choice([-1, 1], m)
    rows, truth = torch.from_numpy(test), torch.from_numpy(shifted)
    model = TCCMModel(TCCMConfig(feature_size=d, seed=seed)).fit(torch.from_numpy(train))
    paper = TCCMModel(TCCMConfig(feature_size=d, seed=seed, mode="paper", steps=300)).fit(torch.from_numpy(train))
    named = (
        explain(model, rows, "conditional"),
        explain(model, rows, "direct"),
        explain(paper, rows, "paper"),
        model.standardize(rows).abs(),
    )
    return {system: jaccard(attributions, truth) for system, attributions in zip(SYSTEMS, named)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", default="benchmarks/results/anomaly_explain.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shapes = [(kind, d, m) for kind in KINDS for d in (5, 10, 25) for m in (1, 3, 5) if 2 * m <= d]
    found: dict[str, dict[tuple[str, int, int], list[float]]] = {system: {} for system in SYSTEMS}
    for shape in tqdm(shapes):
        for seed in arguments.seeds:
            for system, value in measure(*shape, seed).items():
                found[system].setdefault(shape, []).append(value)
    rows = []
    for system, values in found.items():
        each = np.array(list(values.values()))
        mean = each.mean(0)
        spread = float(mean.std(ddof=1)) if len(mean) > 1 else 0.0
        where = f"mean of {len(shapes)} kinds of tables"
        rows.append(Row("tccm", system, where, "top-m Jaccard", float(mean.mean()), "", len(mean), spread))
        for (kind, d, m), numbers in values.items():
            spread = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else 0.0
            setting = f"{kind}: {m} of {d} shifted"
            rows.append(
                Row("tccm", system, setting, "top-m Jaccard", float(np.mean(numbers)), "", len(numbers), spread)
            )
    print(f"wrote {write_rows(arguments.out, rows)}")


if __name__ == "__main__":
    main()
