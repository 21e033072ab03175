"""Time of one decode step, cache and attention together, in one layer of Llama-3.2-1B's shape, and resident bytes.

    python benchmarks/decode_speed.py [--lengths 8192 32768 131072] [--steps 136] [--out benchmarks/results/decode_speed.json]

Every system appends one token and attends with one query over random keys and values of the same prompt, on one thread.
A step is timed by `process_time`; systems take turns step by step, so that a change of the machine's speed meets all of
them. Means and ratios are of total time, over enough steps that ojakv updates its bases twice; the slowest step is one.
StaticCache is given the final length in advance. Beyond `DENSE_LENGTH` only the retrieval caches run, 40 steps, and in
turn with them the same caches over 8K tokens. What the caches do depends on shapes and budgets, not on values, so random
tensors time what real ones would.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_ext import HybridKVCache, OjaKVCache, OjaKVConfig, PackedCache, SentenceKVCache
from hf_ext.benches.caches import DIM, HEADS, KV_HEADS, Layer, layer_config
from hf_ext.cache_impls.attention import ATTENTION_NAME, kv_attention_forward
from hf_ext.cache_impls.base import storage_bytes
from hf_ext.table import Row, write_rows


SYSTEMS = {
    "DynamicCache": lambda config, length: DynamicCache(config=config),
    "StaticCache": lambda config, length: StaticCache(config=config, max_cache_len=length),
    "packed": lambda config, length: PackedCache(config),
    "ojakv 0.6": lambda config, length: OjaKVCache(config, OjaKVConfig(ratio=0.6)),
    "ojakv 0.4": lambda config, length: OjaKVCache(config, OjaKVConfig(ratio=0.4)),
    "ojakv 0.3": lambda config, length: OjaKVCache(config, OjaKVConfig(ratio=0.3)),
    "sentencekv": lambda config, length: SentenceKVCache(config, {"token_budget": BUDGET}),
    "sentencekv, refresh 1": lambda config, length: SentenceKVCache(config, {"token_budget": BUDGET, "refresh": 1}),
    "sentencekv, refresh 8": lambda config, length: SentenceKVCache(config, {"token_budget": BUDGET, "refresh": 8}),
    "sentencekv, page bound": lambda config, length: SentenceKVCache(
        config, {"token_budget": BUDGET, "score": "page_bound"}
    ),
    "sentencekv, on disk": lambda config, length: SentenceKVCache(
        config, {"token_budget": BUDGET, "offload_dir": tempfile.gettempdir()}
    ),
    "hybridkv": lambda config, length: HybridKVCache(config, {"token_budget": BUDGET}),
    "hybridkv, refresh 1": lambda config, length: HybridKVCache(config, {"token_budget": BUDGET, "refresh": 1}),
    "hybridkv, on disk": lambda config, length: HybridKVCache(
        config, {"token_budget": BUDGET, "offload_dir": tempfile.gettempdir()}
    ),
}
OURS = ("packed", "ojakv", "sentencekv", "hybridkv")
RETRIEVAL = ("sentencekv", "hybridkv")
BUDGET = 1024
DENSE_LENGTH, SHORT_LENGTH = 32768, 8192
PROMPT_QUERIES = 512  # the last ones of the prompt, for indexes and anchors


class System:
    def __init__(self, name: str, length: int, steps: int):
        self.ours = method(name) in OURS and not name.endswith("Cache")
        self.static, self.module = name == "StaticCache", Layer()
        self.cache = SYSTEMS[name](layer_config(ATTENTION_NAME if self.ours else "sdpa"), length + steps)
        self.size = length + steps

    def fill(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Takes the prompt in without attention over it, which would outlast everything measured here."""
        if not self.ours:
            self.cache.update(key, value, 0)
            return
        layer = self.cache.layers[0]
        layer.lazy_initialization(key, value)
        layer.seen = key.shape[2]
        layer.absorb_prompt(key, value, {"query": query, "mask": None, "scaling": DIM**-0.5, "position_ids": None})

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = self.cache.update(key, value, 0)
        mask = None
        if self.static:  # the unused tail must be masked, as the library's mask does
            mask = (torch.arange(self.size) < int(self.cache.get_seq_length()))[None, None, None]
        attention = kv_attention_forward if self.ours else sdpa_attention_forward
        return attention(self.module, query, keys, values, mask, scaling=DIM**-0.5)[0]

    def megabytes(self) -> float:
        layer = self.cache.layers[0]
        nbytes = self.cache.nbytes() if self.ours else storage_bytes([layer.keys, layer.values])
        return nbytes / 1e6


def method(name: str) -> str:
    """The row of the registry a system belongs to; peers count with `packed`."""
    first = name.replace(",", " ").split()[0]
    return first if first in OURS else "packed"


def tokens(count: int, heads: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(1, heads, count, DIM).to(dtype)


def measure(
    length: int, dtype: torch.dtype, steps: int, names: list[str]
) -> tuple[dict[str, list[float]], dict[str, float], dict[str, list[float]]]:
    """Milliseconds of each step and megabytes at the end, by system; and, beyond `DENSE_LENGTH`, the milliseconds of the
    same systems over `SHORT_LENGTH` tokens, which take their turns among the others."""
    warmup = 3
    torch.manual_seed(0)
    systems, times = {}, {}
    for size in [length] if length <= DENSE_LENGTH else [length, SHORT_LENGTH]:
        prompt = [tokens(count, heads, dtype) for count, heads in ((PROMPT_QUERIES, HEADS), *[(size, KV_HEADS)] * 2)]
        for name in names:
            systems[name, size], times[name, size] = System(name, size, steps + warmup), []
            systems[name, size].fill(*prompt)
    for step in tqdm(range(steps + warmup), desc=f"{length} {dtype}", leave=False):
        new = tokens(1, HEADS, dtype), tokens(1, KV_HEADS, dtype), tokens(1, KV_HEADS, dtype)
        for key, system in systems.items():
            start = time.process_time()
            system(*new)
            if step >= warmup:
                times[key].append(1e3 * (time.process_time() - start))
    sizes = {name: systems[name, length].megabytes() for name in names}
    short = {name: times[name, SHORT_LENGTH] for name in names if length > DENSE_LENGTH}
    return {name: times[name, length] for name in names}, sizes, short


def ratio(slow: list[float], fast: list[float]) -> tuple[float, float]:
    """Speed-up by total time, and its standard deviation over eight stretches of the run."""
    size = max(1, len(slow) // 8)
    parts = [sum(slow[i : i + size]) / sum(fast[i : i + size]) for i in range(0, len(slow) - size + 1, size)]
    return sum(slow) / sum(fast), statistics.stdev(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768, 131072])
    parser.add_argument("--steps", type=int, default=136)
    parser.add_argument("--out", default="benchmarks/results/decode_speed.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []

    def add(name: str, setting: str, metric: str, value: float, unit: str, n: int = 1, spread: float = 0.0) -> None:
        rows.append(Row(method(name), name, setting, metric, round(value, 3), unit, n, round(spread, 3)))
        print(f"{setting:50s} {name:24s} {metric:24s} {value:8.2f} {unit} +- {spread:.2f}", flush=True)

    for length in arguments.lengths:
        for dtype in (torch.float32, torch.bfloat16):
            dense = length <= DENSE_LENGTH
            with torch.no_grad():
                names = [name for name in SYSTEMS if dense or method(name) in RETRIEVAL]
                steps = arguments.steps if dense else min(arguments.steps, 40)
                times, sizes, short = measure(length, dtype, steps, names)
            kind = str(dtype).removeprefix("torch.")
            setting = f"Llama-3.2-1B layer, {length // 1024}K, {kind}, 1 thread"
            for name, values in times.items():
                add(name, setting, "decode step", statistics.mean(values), "ms", len(values), statistics.stdev(values))
                add(name, setting, "resident bytes", sizes[name], "MB")
                if not dense:
                    middle, spread = ratio(values, short[name])
                    add(name, setting, "time over that at 8K", middle, "x", len(values), spread)
                if dense:
                    add(name, setting, "slowest decode step", max(values), "ms")
                    for peer in ("DynamicCache", "packed"):
                        middle, spread = ratio(times[peer], values)
                        add(name, setting, f"speed over {peer}", middle, "x", len(values), spread)
    write_rows(arguments.out, rows)


if __name__ == "__main__":
    main()
