"""Time of one decode step, cache and attention together, in one layer of Llama-3.2-1B's shape.

    python benchmarks/decode_speed.py [--lengths 8192 32768] [--steps 136] [--out benchmarks/results/decode_speed.json]

Every system appends one token and attends with one query over random keys and values of the same prompt, on one thread.
A step is timed by `process_time`; systems take turns step by step, so that a change of the machine's speed meets all of
them. Means and ratios are of total time, over enough steps that ojakv updates its bases twice; the slowest step is one. StaticCache is given the final length in advance. Ranks
depend on shapes and budget alone (`allocation="equal"`), so random tensors time what real ones would.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_ext import OjaKVCache, OjaKVConfig, PackedCache
from hf_ext.cache_impls.attention import ATTENTION_NAME, kv_attention_forward
from hf_ext.table import Row, write_rows


HEADS, KV_HEADS, DIM = 32, 8, 64
SYSTEMS = {
    "DynamicCache": lambda config, length: DynamicCache(config=config),
    "StaticCache": lambda config, length: StaticCache(config=config, max_cache_len=length),
    "packed": lambda config, length: PackedCache(config),
    "ojakv 0.6": lambda config, length: OjaKVCache(config, OjaKVConfig(ratio=0.6)),
    "ojakv 0.4": lambda config, length: OjaKVCache(config, OjaKVConfig(ratio=0.4)),
    "ojakv 0.3": lambda config, length: OjaKVCache(config, OjaKVConfig(ratio=0.3)),
}


class Layer(nn.Module):
    """What an attention function reads from the module that calls it."""

    layer_idx, num_key_value_groups, is_causal = 0, HEADS // KV_HEADS, True


def make_config(ours: bool) -> LlamaConfig:
    config = LlamaConfig(
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        num_hidden_layers=1,
        head_dim=DIM,
    )
    config._attn_implementation_internal = ATTENTION_NAME if ours else "sdpa"
    return config


class System:
    def __init__(self, name: str, length: int, steps: int):
        self.ours = name.split()[0] in ("packed", "ojakv")
        self.static, self.module = name == "StaticCache", Layer()
        self.cache = SYSTEMS[name](make_config(self.ours), length + steps)
        self.size = length + steps

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = self.cache.update(key, value, 0)
        mask = None
        if self.static:  # the unused tail must be masked, as the library's mask does
            seen = int(self.cache.get_seq_length())
            mask = (torch.arange(self.size) < seen)[None, None, None] if query.shape[2] == 1 else None
        attention = kv_attention_forward if self.ours else sdpa_attention_forward
        return attention(self.module, query, keys, values, mask, scaling=DIM**-0.5)[0]


def tokens(count: int, heads: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(1, heads, count, DIM).to(dtype)


def measure(length: int, dtype: torch.dtype, steps: int) -> dict[str, list[float]]:
    """Milliseconds of each step, by system."""
    warmup = 3
    torch.manual_seed(0)
    prompt = tokens(length, HEADS, dtype), tokens(length, KV_HEADS, dtype), tokens(length, KV_HEADS, dtype)
    systems = {}
    for name in SYSTEMS:
        systems[name] = System(name, length, steps + warmup)
        systems[name](*prompt)
    times: dict[str, list[float]] = {name: [] for name in systems}
    for step in tqdm(range(steps + warmup), desc=f"{length} {dtype}", leave=False):
        new = tokens(1, HEADS, dtype), tokens(1, KV_HEADS, dtype), tokens(1, KV_HEADS, dtype)
        for name, system in systems.items():
            start = time.process_time()
            system(*new)
            if step >= warmup:
                times[name].append(1e3 * (time.process_time() - start))
    return times


def ratio(slow: list[float], fast: list[float]) -> tuple[float, float]:
    """Speed-up by total time, and its standard deviation over eight stretches of the run."""
    size = max(1, len(slow) // 8)
    parts = [sum(slow[i : i + size]) / sum(fast[i : i + size]) for i in range(0, len(slow) - size + 1, size)]
    return sum(slow) / sum(fast), statistics.stdev(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--steps", type=int, default=136)
    parser.add_argument("--out", default="benchmarks/results/decode_speed.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for length in arguments.lengths:
        for dtype in (torch.float32, torch.bfloat16):
            with torch.no_grad():
                times = measure(length, dtype, arguments.steps)
            setting = f"Llama-3.2-1B layer, {length // 1024}K, {str(dtype).removeprefix('torch.')}, 1 thread"
            for name, values in times.items():
                method = name.split()[0] if name.split()[0] in ("packed", "ojakv") else "packed"
                for metric, unit, (middle, spread) in (
                    ("decode step", "ms", (statistics.mean(values), statistics.stdev(values))),
                    ("slowest decode step", "ms", (max(values), 0.0)),
                    ("speed over DynamicCache", "x", ratio(times["DynamicCache"], values)),
                    ("speed over packed", "x", ratio(times["packed"], values)),
                ):
                    n = len(values) if spread else 1
                    rows.append(Row(method, name, setting, metric, round(middle, 3), unit, n, round(spread, 3)))
                    print(f"{setting:52s} {name:14s} {metric:24s} {middle:8.2f} {unit} +- {spread:.2f}")
    write_rows(arguments.out, rows)


if __name__ == "__main__":
    main()
