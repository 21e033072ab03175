"""How well anomalies of whole tables are told from normal rows: one setting for all tables, fitted on normal rows only.

    python benchmarks/anomaly_quality.py [--tables DIR] [--seeds 0 1 2 3 4] [--systems NAME ...]
                                         [--out benchmarks/results]

`DIR` holds `.npz` files with `X` and `y` (1 is an anomaly), for example those of ADBench; without it the packaged
scikit-learn tables stand in: breast cancer, wine, and digits 0 to 8 with one digit as the anomaly. The paper's protocol: half of
the normal rows train, the other half and all anomalies are scored. AUROC and AUPR of every table are means over the seeds
(splits and starts); the summary is the mean over tables, wins and losses of ours against a system by AUROC, and the p-value
of a Wilcoxon signed-rank test over tables. CPU seconds are those of fit and score together, summed over the tables. The summary
goes to `anomaly_quality.json`, every table to `anomaly_tables.json`, both in the folder `--out`; finished runs are kept in its
`runs/` and not run twice.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from anomaly_peers import SYSTEMS, standardise
from tqdm.auto import tqdm

from hf_ext.benches.tccm import packaged_tables
from hf_ext.config import write_text_atomic
from hf_ext.table import Row, write_rows


# Raise it when the default's arithmetic changes: its older runs are then run again.
ARITHMETIC = {"tccm": 1}


def folder(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Tables of a folder of `.npz` files."""
    found = {}
    for file in sorted(path.glob("*.npz")):
        data = np.load(file)
        found[file.stem] = (data["X"].astype(np.float64), data["y"].astype(int))
    if not found:
        raise SystemExit(f"{path} holds no .npz file.")
    return found


def split(X: np.ndarray, y: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training rows, rows to score, and which of these are anomalies."""
    from sklearn.model_selection import train_test_split

    train, rest = train_test_split(np.flatnonzero(y == 0), test_size=0.5, random_state=seed)
    test = np.concatenate([rest, np.flatnonzero(y == 1)])
    return X[train], X[test], y[test]


def measure(system: str, table: str, X: np.ndarray, y: np.ndarray, seed: int) -> dict[str, float]:
    from sklearn.metrics import average_precision_score, roc_auc_score

    train, test, truth = split(X, y, seed)
    train, test = standardise(train, test)
    start = time.process_time()
    scores = SYSTEMS[system](train, seed, table)(test)
    seconds = time.process_time() - start
    return {
        "auroc": float(roc_auc_score(truth, scores)),
        "aupr": float(average_precision_score(truth, scores)),
        "seconds": seconds,
    }


def summary(
    runs: dict[str, dict[str, float]], systems: list[str], tables: list[str], seeds: list[int]
) -> tuple[list[Row], list[Row]]:
    """Rows of the comparison over all tables, and rows of every table."""
    from scipy.stats import wilcoxon

    # A system that takes long may have been run with fewer seeds; ours is compared with it on those.
    common = {name: [seed for seed in seeds if all(key(name, t, seed) in runs for t in tables)] for name in systems}
    systems = [system for system in systems if common[system]]

    def table(system: str, metric: str, seeds: list[int]) -> np.ndarray:
        return np.array([[runs[key(system, name, seed)][metric] for seed in seeds] for name in tables])

    values = {
        (system, metric): table(system, metric, common[system])
        for system in systems
        for metric in ("auroc", "aupr", "seconds")
    }
    setting = f"{len(tables)} tables, fitted on normal rows"
    rows: list[Row] = []

    def add(system: str, where: str, metric: str, numbers: np.ndarray, unit: str = "") -> None:
        spread = float(numbers.std(ddof=1)) if len(numbers) > 1 else 0.0
        rows.append(Row("tccm", system, where, metric, float(numbers.mean()), unit, len(numbers), spread))

    for system in systems:
        auroc = values[system, "auroc"].mean(1)
        add(system, setting, "mean AUROC", values[system, "auroc"].mean(0))
        add(system, setting, "mean AUPR", values[system, "aupr"].mean(0))
        if "norm of z" in systems:
            worst = (auroc - table("norm of z", "auroc", common[system]).mean(1)).min()
            add(system, setting, "worst AUROC minus norm of z", np.array([worst]))
        if "tccm" in systems and system != "tccm":
            difference = table("tccm", "auroc", common[system]).mean(1) - auroc
            add(system, setting, "tables won by ours", np.array([(difference > 0).sum()]))
            add(system, setting, "tables lost by ours", np.array([(difference < 0).sum()]))
            add(system, setting, "p, Wilcoxon", np.array([wilcoxon(difference).pvalue]))
        add(system, setting, "fit and score", values[system, "seconds"].sum(0), "CPU s")
    whole, rows = rows, []
    for metric in ("auroc", "aupr"):
        for system in systems:
            for table, numbers in zip(tables, values[system, metric]):
                add(system, table, metric.upper(), numbers)
    return whole, rows


def key(system: str, table: str, seed: int) -> str:
    return f"{system}|{ARITHMETIC.get(system, 1)}|{table}|{seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, help="folder of .npz files; packaged tables if omitted")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if arguments.tables is None:
        print("no --tables: the packaged tables of scikit-learn stand in")
    tables = folder(arguments.tables) if arguments.tables else packaged_tables()
    kept = arguments.out / "runs" / "anomaly_quality.json"
    runs = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    todo = [
        (system, table, seed)
        for system in arguments.systems
        for table in tables
        for seed in arguments.seeds
        if key(system, table, seed) not in runs
    ]
    for system, table, seed in tqdm(todo):
        runs[key(system, table, seed)] = measure(system, table, *tables[table], seed)
        write_text_atomic(kept, json.dumps(runs, indent=0, sort_keys=True) + "\n")
    for name, rows in zip(
        ("anomaly_quality", "anomaly_tables"), summary(runs, list(SYSTEMS), list(tables), arguments.seeds)
    ):
        print(f"wrote {write_rows(arguments.out / f'{name}.json', rows)}")


if __name__ == "__main__":
    main()
