"""Time of one decode step, cache and attention together, in one layer of Llama-3.2-1B's shape.

    python benchmarks/decode_speed.py [--lengths 8192 32768] [--steps 24] [--out benchmarks/results/decode_speed.json]

Every system appends one token and attends with one query over random keys and values of the same prompt, on one thread.
A step is timed by `process_time`; systems take turns within a round, so that a change of the machine's speed meets all of
them, and the ratio to DynamicCache is formed round by round. StaticCache is given the final length in advance. Ranks
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--steps", type=int, default=24)
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
                for metric, unit, samples in (
                    ("decode step", "ms", values),
                    ("speed over DynamicCache", "x", [d / v for d, v in zip(times["DynamicCache"], values)]),
                    ("speed over packed", "x", [p / v for p, v in zip(times["packed"], values)]),
                ):
                    middle, spread = statistics.median(samples), statistics.stdev(samples)
                    rows.append(
                        Row(method, name, setting, metric, round(middle, 3), unit, len(samples), round(spread, 3))
                    )
                    print(f"{setting:52s} {name:14s} {metric:24s} {middle:8.2f} {unit} +- {spread:.2f}")
    write_rows(arguments.out, rows)


if __name__ == "__main__":
    main()
