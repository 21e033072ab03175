"""Quick comparison of the caches: quality and bytes on a real model where one is installed, speed of one decode step.

Quality: the model reads a context once; every cache is filled with what its layers saw then, and scored on how the text
goes on. Speed: one layer of Llama-3.2-1B's shape, every cache in turn within a step, one thread, processor time.
Peers: the library's `DynamicCache`, and PCA of the prompt's own rotated keys and of its values at the same bytes. The
long list of peers is in `benchmarks/kv_quality.py`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_ext.cache_impls.attention import ATTENTION_NAME, kv_attention_forward
from hf_ext.cache_impls.base import KVCache, storage_bytes
from hf_ext.cache_impls.ojakv import OjaKVCache, OjaKVConfig
from hf_ext.cache_impls.packed import PackedCache, PackedLayer
from hf_ext.errors import MissingPackageError
from hf_ext.models import load_bbc, load_smollm2
from hf_ext.table import Row
from hf_ext.tiny import VOCAB_SIZE, tiny_model


# Every one takes a model or a config.
OURS: dict[str, Callable[[Any], KVCache]] = {
    "packed": PackedCache,
    "ojakv 0.6": lambda model: OjaKVCache(model, OjaKVConfig(ratio=0.6)),
    "ojakv 0.4": lambda model: OjaKVCache(model, OjaKVConfig(ratio=0.4)),
    "exact PCA 0.6": lambda model: OjaKVCache(model, OjaKVConfig(ratio=0.6, anchor_ratio=0.0)),
    "exact PCA 0.4": lambda model: OjaKVCache(model, OjaKVConfig(ratio=0.4, anchor_ratio=0.0)),
}
DOCUMENTS = 1  # per seed
CONTEXT, CONTINUATION, BLOCK = 1536, 256, 64
HEADS, KV_HEADS, DIM = 32, 8, 64
STORED, STEPS = 8192, 9


class _RecordingLayer(PackedLayer):
    """Remembers the prompt as the model ran it."""

    def absorb_prompt(self, key: Tensor, value: Tensor, context: dict[str, Any] | None) -> None:
        self.prompt = key, value, context
        super().absorb_prompt(key, value, context)


class _Recording(PackedCache):
    def make_layer(self, model_config: Any, layer_idx: int, order: int) -> PackedLayer:
        return _RecordingLayer(model_config, layer_idx)


def run(seeds: int) -> list[Row]:
    """Rows of all systems: loss over the continuation, bytes, time of a decode step; quality over documents and seeds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            return quality(seeds) + speed(seeds)
    finally:
        torch.set_num_threads(threads)


def load() -> tuple[Any, str, Callable[[int], Tensor]]:
    """Model, its name, and a function from a number to a document `(1, CONTEXT + CONTINUATION)`."""
    size = CONTEXT + CONTINUATION
    try:
        model, tokenizer = load_smollm2()
        articles = [row["text"] for row in load_bbc()]
    except MissingPackageError:

        def random_document(number: int) -> Tensor:
            generator = torch.Generator().manual_seed(number)
            return torch.randint(2, VOCAB_SIZE, (1, size), generator=generator)

        return tiny_model("llama"), "tiny random Llama (no packaged model)", random_document

    def news(number: int) -> Tensor:
        ids: list[int] = []
        start = number * 37
        while len(ids) < size:
            ids += tokenizer(articles[start % len(articles)] + "\n\n")["input_ids"]
            start += 223  # across the topics, which the list is sorted by
        return torch.tensor([ids[:size]])

    return model, "SmolLM2-135M, BBC news", news


def quality(seeds: int) -> list[Row]:
    """Loss over the continuation above dense, and bytes over dense."""
    model, name, document = load()
    losses: dict[str, list[float]] = {system: [] for system in ("dense", *OURS)}
    shares: dict[str, list[float]] = {system: [] for system in ("dense", *OURS)}
    for number in range(seeds * DOCUMENTS):
        ids = document(number)
        recording = _Recording(model)
        model(ids[:, :CONTEXT], past_key_values=recording, logits_to_keep=1)
        prompts = [layer.prompt for layer in recording.kv_layers if isinstance(layer, _RecordingLayer)]
        dense = DynamicCache(config=model.config)
        for index, (key, value, _) in enumerate(prompts):
            dense.update(key, value, index)
        dense_bytes = storage_bytes([tensor for pair in prompts for tensor in pair[:2]])
        dense_loss = loss(model, dense, ids)
        for system in losses:
            held, above = dense_bytes, 0.0
            if system != "dense":
                cache = OURS[system](model)
                fill(cache, prompts)
                held, above = cache.nbytes(), loss(model, cache, ids) - dense_loss
            shares[system].append(held / dense_bytes)
            losses[system].append(above)
    setting = f"{name}, {CONTEXT} tokens, float32"
    rows = []
    for system in losses:
        rows.append(_row(system, setting, "NLL above dense", losses[system], "nat"))
        rows.append(_row(system, setting, "bytes over dense", shares[system], ""))
    return rows


def fill(cache: KVCache, prompts: list[tuple[Tensor, Tensor, dict[str, Any] | None]]) -> None:
    """Hands every layer the prompt the model ran, as its attention would."""
    for layer, (key, value, context) in zip(cache.kv_layers, prompts):
        layer.lazy_initialization(key, value)
        layer.seen = key.shape[2]
        layer.absorb_prompt(key, value, context)


def loss(model: Any, cache: Any, ids: Tensor) -> float:
    """Mean negative log-likelihood of the continuation, fed in short blocks, as generation would."""
    tokens = ids[:, CONTEXT:]
    logits = [
        model(tokens[:, start : start + BLOCK], past_key_values=cache).logits[0]
        for start in range(0, CONTINUATION, BLOCK)
    ]
    return cross_entropy(torch.cat(logits)[:-1].float(), tokens[0, 1:]).item()


class _Layer(nn.Module):
    """What an attention function reads from the module that calls it."""

    layer_idx, num_key_value_groups, is_causal = 0, HEADS // KV_HEADS, True


def speed(seeds: int) -> list[Row]:
    """Time of one decode step over that of `DynamicCache` with SDPA: the median of each seed's steps."""
    times: dict[str, list[float]] = {system: [] for system in ("dense", *OURS)}
    ratios: dict[str, list[float]] = {system: [] for system in times}
    module = _Layer()
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)

        def states(count: int, generator: torch.Generator = generator) -> tuple[Tensor, Tensor, Tensor]:
            query, key, value = (
                torch.randn(1, heads, count, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)
            )
            return query, key, value

        caches: dict[str, Any] = {"dense": DynamicCache(config=_shape("sdpa"))}
        caches |= {system: make(_shape(ATTENTION_NAME)) for system, make in OURS.items()}
        prompt = states(STORED)
        for system, cache in caches.items():
            if system == "dense":
                cache.update(*prompt[1:], 0)
            else:
                fill(cache, [(*prompt[1:], None)])
        steps: dict[str, list[float]] = {system: [] for system in caches}
        for step in range(STEPS + 2):  # two to warm up
            query, key, value = states(1)
            for system, cache in caches.items():
                attention: Callable = sdpa_attention_forward if system == "dense" else kv_attention_forward
                start = time.process_time()
                keys, values = cache.update(key, value, 0)
                attention(module, query, keys, values, None, scaling=DIM**-0.5)
                if step >= 2:
                    steps[system].append(1e3 * (time.process_time() - start))
        for system, taken in steps.items():
            times[system].append(statistics.median(taken))
            ratios[system].append(statistics.median(t / d for t, d in zip(taken, steps["dense"])))
    setting = f"Llama-3.2-1B layer, {STORED} tokens, float32, 1 thread"
    rows = []
    for system in times:
        rows.append(_row(system, setting, "decode step", times[system], "ms"))
        rows.append(_row(system, setting, "decode step over dense", ratios[system], ""))
    return rows


def _shape(attention: str) -> LlamaConfig:
    """One layer of Llama-3.2-1B that runs `attention`."""
    config = LlamaConfig(
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        num_hidden_layers=1,
        head_dim=DIM,
    )
    config._attn_implementation_internal = attention
    return config


def _row(system: str, setting: str, metric: str, values: list[float], unit: str) -> Row:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return Row(
        "ojakv", system, setting, metric, round(statistics.mean(values), 4), unit, len(values), round(spread, 4)
    )
