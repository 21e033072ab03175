"""A real model from prompt to decoding: time to first token, tokens per second, bytes, per cache.

    python benchmarks/end_to_end.py [--model NAME] [--length 8192] [--steps 40] [--rounds 2]
                                    [--dtypes float32 bfloat16] [--systems sentencekv hybridkv]
                                    [--out benchmarks/results/end_to_end.json]

The prompt is BBC news, repeated articles excluded, run through the embedded SmolLM2-135M unless `--model` names another.
One thread, `process_time`; systems take turns round by round and ratios to dense are formed within a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel

from hf_ext import HybridKVCache, OjaKVCache, OjaKVConfig, PackedCache, SentenceKVCache
from hf_ext.cache_impls.base import storage_bytes
from hf_ext.models import load_bbc, load_model
from hf_ext.table import Row, write_rows


SYSTEMS: dict[str, Callable[[PreTrainedModel], Any]] = {
    "DynamicCache": lambda model: DynamicCache(config=model.config),
    "packed": PackedCache,
    "ojakv 0.4": lambda model: OjaKVCache(model, OjaKVConfig(ratio=0.4)),
    "sentencekv": SentenceKVCache,
    "hybridkv": HybridKVCache,
}


def cache_bytes(cache: Any) -> int:
    if hasattr(cache, "nbytes"):
        return cache.nbytes()
    return storage_bytes([tensor for layer in cache.layers for tensor in (layer.keys, layer.values)])


@torch.no_grad()
def run_once(model: PreTrainedModel, cache: Any, ids: Tensor, steps: int) -> tuple[float, float, int]:
    """Seconds to the first token, seconds per later token, bytes after the prompt."""
    start = time.process_time()
    logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    token = logits[:, -1:].argmax(-1)
    first, held = time.process_time() - start, cache_bytes(cache)
    start = time.process_time()
    for _ in range(steps):
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    return first, (time.process_time() - start) / steps, held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument(
        "--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS), help="beside DynamicCache"
    )
    parser.add_argument("--out", default="benchmarks/results/end_to_end.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    systems = {name: make for name, make in SYSTEMS.items() if name in ("DynamicCache", *arguments.systems)}
    rows: list[Row] = []
    for dtype in (getattr(torch, name) for name in arguments.dtypes):
        model, tokenizer = load_model(arguments.model, dtype=dtype)
        length = arguments.length - arguments.steps
        text = "\n\n".join(document["text"] for document in load_bbc()[: arguments.length // 100])
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :length]
        if ids.shape[1] < length:
            raise SystemExit(f"the packaged news have {ids.shape[1]} tokens; --length asks for {length}.")
        runs: dict[str, list[tuple[float, float, int]]] = {name: [] for name in systems}
        for _ in range(arguments.rounds):
            for name, make in tqdm(systems.items(), desc=str(dtype), leave=False):
                runs[name].append(run_once(model, make(model), ids, arguments.steps))
        name_of_model = "SmolLM2-135M" if arguments.model is None else arguments.model
        setting = f"{name_of_model}, {arguments.length // 1024}K prompt, {str(dtype).removeprefix('torch.')}, 1 thread"
        dense = runs["DynamicCache"]
        for name, values in runs.items():
            first = name.replace(",", " ").split()[0]
            method = first if first in ("ojakv", "sentencekv", "hybridkv") else "packed"
            for metric, unit, samples in (
                ("tokens per second", "1/s", [1 / run[1] for run in values]),
                ("decode speed over DynamicCache", "x", [d[1] / run[1] for d, run in zip(dense, values)]),
                ("time to first token", "s", [run[0] for run in values]),
                ("time to first token over DynamicCache", "x", [run[0] / d[0] for d, run in zip(dense, values)]),
                ("cache bytes over DynamicCache", "x", [run[2] / d[2] for d, run in zip(dense, values)]),
            ):
                spread = statistics.stdev(samples) if len(samples) > 1 else 0.0
                mean = statistics.mean(samples)
                rows.append(Row(method, name, setting, metric, round(mean, 4), unit, len(samples), round(spread, 4)))
                print(f"{setting:44s} {name:14s} {metric:40s} {mean:9.3f} {unit} +- {spread:.3f}", flush=True)
    write_rows(arguments.out, rows)


if __name__ == "__main__":
    main()
