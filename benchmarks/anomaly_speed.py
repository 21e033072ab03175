"""What TCCM costs: fit and score next to PyOD's nearest neighbours, rows a second, and memory over a stream.

    python benchmarks/anomaly_speed.py [--rows 60000] [--features 10] [--stream 250000 500000 1000000]
                                       [--out benchmarks/results/anomaly_speed.json]

All systems run in one process on one thread, by its CPU time, the least of three. Two kinds of rows: independent
features, hard for a tree of neighbours, and features mixed by a random matrix, easier for it. The stream is a parquet file
fitted and scored in batches, in a process of its own for each length: `peak` is how far the process's largest resident
memory rises above where it stood after imports and one batch. Scores of a stream are compared with those of the whole table in memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from hf_ext.pipelines.tccm import TCCMConfig, TCCMModel
from hf_ext.table import Row, write_rows


def table(kind: str, rows: int, features: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    mix = np.random.default_rng(100).normal(size=(features, features)) if kind == "mixed" else np.eye(features)
    return generator.normal(size=(rows, features)) @ mix


def seconds(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def speed(rows: int, features: int) -> list[Row]:
    from pyod.models.knn import KNN

    found = []
    for kind in ("independent", "mixed"):
        train, test = table(kind, rows, features, 0), table(kind, rows, features, 1)
        setting = f"{rows:,} + {rows:,} rows, {features} {kind} features"
        for name, settings in (
            ("tccm", {}),
            ("tccm paper, 100 steps", {"mode": "paper", "steps": 100}),
            ("tccm paper, 1000 steps", {"mode": "paper", "steps": 1000}),
        ):
            model = TCCMModel(TCCMConfig(feature_size=features, **settings))
            fit = seconds(lambda model=model, train=train: model.fit(torch.from_numpy(train)), 1)
            score = seconds(lambda model=model, test=test: model.score(torch.from_numpy(test)), 3)
            found.append(Row("tccm", name, setting, "fit and score", fit + score, "CPU s"))
            found.append(Row("tccm", name, setting, "scoring", rows / score, "rows/s"))
        detector = KNN()
        fit = seconds(lambda detector=detector, train=train: detector.fit(train), 1)
        score = seconds(lambda detector=detector, test=test: detector.decision_function(test), 1)
        found.append(Row("tccm", "pyod knn", setting, "fit and score", fit + score, "CPU s"))
        found.append(Row("tccm", "pyod knn", setting, "scoring", rows / score, "rows/s"))
    return found


def write_parquet(path: Path, rows: int, features: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    names = [f"x{place}" for place in range(features)]
    writer = None
    for start in range(0, rows, 50_000):
        part = table("mixed", min(50_000, rows - start), features, start + 7)
        batch = pa.table({name: part[:, place] for place, name in enumerate(names)})
        writer = writer or pa.parquet.ParquetWriter(path, batch.schema)
        writer.write_table(batch, row_group_size=10_000)
    writer.close()


def stream(path: str, compare: bool) -> dict[str, float]:
    """Fit on a parquet file and score it, as a stream; this runs in a process of its own."""
    from datasets import load_dataset

    from hf_ext.cli_detect import write_scored
    from hf_ext.pipelines.tccm_pipeline import TCCMPipeline

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    torch.set_num_threads(1)
    data = load_dataset("parquet", data_files=path, split="train", streaming=True)
    warm = TCCMPipeline().fit(data.take(20_000), progress=False)
    warm.score(data.take(20_000))
    before = peak()
    pipeline = TCCMPipeline().fit(data, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "scores.parquet"
        rows, _ = write_scored(pipeline, data, out)
        found = {"rows": rows, "peak": peak() - before}
        if compare:
            import pandas as pd

            scores = pd.read_parquet(out)["anomaly_score"].to_numpy()
            whole = pd.read_parquet(path)
            found["difference"] = float(np.abs(pipeline.score(whole) - scores).max())
            again = TCCMPipeline().fit(whole, progress=False).score(whole)
            found["difference"] = max(found["difference"], float(np.abs(again - scores).max()))
    return found


def streams(lengths: list[int], features: int) -> list[Row]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for rows in lengths:
            path = Path(folder) / f"{rows}.parquet"
            write_parquet(path, rows, features)
            command = [
                sys.executable,
                __file__,
                "--stream-one",
                str(path),
                "--compare",
                str(int(rows == max(lengths))),
            ]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            result = json.loads(output.splitlines()[-1])
            setting = f"{rows:,} rows of {features} features from parquet, fitted and scored as a stream"
            found.append(Row("tccm", "tccm", setting, "peak above start", result["peak"] / 1e6, "MB"))
            if "difference" in result:
                found.append(
                    Row("tccm", "tccm", setting, "largest difference to scores in memory", result["difference"])
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--features", type=int, default=10)
    parser.add_argument("--stream", type=int, nargs="*", default=[250_000, 500_000, 1_000_000])
    parser.add_argument("--out", default="benchmarks/results/anomaly_speed.json")
    parser.add_argument("--stream-one", help=argparse.SUPPRESS)
    parser.add_argument("--compare", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.stream_one:
        print(json.dumps(stream(arguments.stream_one, bool(arguments.compare))))
        return
    rows = speed(arguments.rows, arguments.features) + streams(arguments.stream, arguments.features)
    print(f"wrote {write_rows(arguments.out, rows)}")


if __name__ == "__main__":
    main()
