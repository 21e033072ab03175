"""What the benches of the caches share: a model and texts, a read prompt, losses, bytes, the time of a decode step.

Quality: the model reads contexts once; every cache is filled with what its layers saw then, and scored on how the texts
go on. Speed: one layer of Llama-3.2-1B's shape, every cache in turn within a step, one thread, processor time; the mean
over `STEPS` steps, because caches that retrieve or compress do so at some of them.

Shapes: B documents, K key/value heads, N tokens, D head dim.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_ext.cache_impls.attention import ATTENTION_NAME, kv_attention_forward
from hf_ext.cache_impls.base import KVCache, storage_bytes
from hf_ext.cache_impls.packed import PackedCache, PackedLayer
from hf_ext.cache_impls.sentences import sentence_boundary_ids
from hf_ext.errors import MissingPackageError
from hf_ext.models import load_bbc, load_smollm2
from hf_ext.table import Row
from hf_ext.tiny import VOCAB_SIZE, tiny_model


Maker = Callable[[Any], Cache]  # from a model or its config
Prompt = list[tuple[Tensor, Tensor, dict[str, Any] | None]]  # per layer: keys, values, what its attention was given

CONTEXT = 1536
TOGETHER = 4  # documents a batch
HEADS, KV_HEADS, DIM = 32, 8, 64
STORED, STEPS = 8192, 32
SINKS = 32


@dataclass(frozen=True)
class Subject:
    """A model and what it reads; `document` makes a text of so many tokens from a number, `(1, N)`."""

    model: Any
    name: str
    boundary_ids: list[int]
    document: Callable[[int, int], Tensor]


def load() -> Subject:
    """The packaged model on BBC news, or a tiny one on random tokens where it is not installed."""
    try:
        model, tokenizer = load_smollm2()
        articles = [row["text"] for row in load_bbc()]
    except MissingPackageError:

        def random_document(number: int, size: int) -> Tensor:
            generator = torch.Generator().manual_seed(number)
            return torch.randint(2, VOCAB_SIZE, (1, size), generator=generator)

        return Subject(tiny_model("llama"), "tiny random Llama (no packaged model)", [2, 3, 4, 5], random_document)

    def news(number: int, size: int) -> Tensor:
        ids: list[int] = []
        start = number * 37
        while len(ids) < size:
            ids += tokenizer(articles[start % len(articles)] + "\n\n")["input_ids"]
            start += 223  # across the topics, which the list is sorted by
        return torch.tensor([ids[:size]])

    return Subject(model, "SmolLM2-135M, BBC news", sentence_boundary_ids(tokenizer), news)


@contextmanager
def one_thread() -> Iterator[None]:
    """Without gradients, on one thread: what the benches measure is comparable only then."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)


class _StreamingLayer(DynamicLayer):
    def __init__(self, budget: int):
        super().__init__()
        self.budget, self.seen = budget, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.seen += key_states.shape[2]
        states = list(super().update(key_states, value_states, *args, **kwargs))
        if states[0].shape[2] > self.budget:
            newest = self.budget - SINKS
            states = [torch.cat([rows[:, :, :SINKS], rows[:, :, -newest:]], dim=2) for rows in states]
        self.keys, self.values = states
        return states[0], states[1]

    def get_seq_length(self) -> int:
        return self.seen


class StreamingCache(Cache):
    """The first `SINKS` tokens and the newest ones, `budget` in all, with the positions they came with; all others are
    dropped. It is fed a read prompt and then one token at a time."""

    def __init__(self, model: Any, budget: int):
        config = getattr(model, "config", model)
        super().__init__(layers=[_StreamingLayer(budget) for _ in range(config.num_hidden_layers)])


class _RecordingLayer(PackedLayer):
    """Remembers the prompt as the model ran it."""

    def absorb_prompt(self, key: Tensor, value: Tensor, context: dict[str, Any] | None) -> None:
        self.prompt = key, value, context
        super().absorb_prompt(key, value, context)


class _Recording(PackedCache):
    def make_layer(self, model_config: Any, layer_idx: int, order: int) -> PackedLayer:
        return _RecordingLayer(model_config, layer_idx)


def read(model: Any, ids: Tensor) -> Prompt:
    """What every layer of `model` saw of `ids` `(B, N)`."""
    recording = _Recording(model)
    model(input_ids=ids, past_key_values=recording, logits_to_keep=1)
    return [layer.prompt for layer in recording.kv_layers if isinstance(layer, _RecordingLayer)]


def fill(cache: Cache, prompt: Prompt, ids: Tensor | None = None) -> None:
    """Hands every layer the prompt the model ran, as its attention would, and the cache the tokens `(B, N)` themselves."""
    if not isinstance(cache, KVCache):
        for index, (key, value, _) in enumerate(prompt):
            cache.update(key, value, index)
        return
    if ids is not None:
        cache.observe_tokens(ids, ids.shape[0], ids.shape[1], None)
    for layer, (key, value, context) in zip(cache.kv_layers, prompt):
        layer.lazy_initialization(key, value)
        layer.seen = key.shape[2]
        layer.absorb_prompt(key, value, context)


def cache_bytes(cache: Any) -> int:
    """Bytes of the distinct storages a cache keeps alive."""
    if isinstance(cache, KVCache):
        return cache.nbytes()
    return storage_bytes(
        [value for layer in cache.layers for value in vars(layer).values() if isinstance(value, Tensor)]
    )


def predict(model: Any, cache: Cache, tokens: Tensor, block: int) -> tuple[Tensor, int]:
    """Feeds all of `tokens` `(B, N)` but the last on top of a cache, and looks at its bytes after the first.

    The first token is fed alone, the others `block` at a time: a cache that retrieves must get one at a time, as in
    generation, since a longer block would attend to more.

    Returns:
        `tuple`: log-probabilities `(B, N - 1, V)` of what follows each token, and the bytes.
    """
    last = tokens.shape[1] - 1
    logits = [model(input_ids=tokens[:, :1], past_key_values=cache).logits]
    held = cache_bytes(cache)
    for start in range(1, last, block):
        fed = tokens[:, start : min(start + block, last)]
        logits.append(model(input_ids=fed, past_key_values=cache).logits)
    return torch.cat(logits, dim=1).float().log_softmax(-1), held


def quality(
    method: str, systems: dict[str, Maker], subject: Subject, documents: int, length: int, block: int, note: str = ""
) -> list[Row]:
    """Loss over the continuation above dense, divergence of the predictions from dense, and bytes over dense.

    Args:
        method (`str`): id of the method the comparison is about.
        systems (`dict`): caches to compare with the dense one.
        documents (`int`): texts, each behind one sample of every number.
        length (`int`), block (`int`): tokens of the continuation, and how many are fed at a time.
        note (`str`): what the setting has to say beside model and length.
    """
    makers: dict[str, Maker] = {"dense": _dense, **systems}
    # Two losses of a text differ by chance as well, the predictions behind them only by what the cache lost.
    metrics = {"NLL above dense": "nat", "KL from dense": "nat", "bytes over dense": ""}
    samples: dict[tuple[str, str], list[float]] = {(system, name): [] for system in makers for name in metrics}
    for first in range(0, documents, TOGETHER):
        numbers = range(first, min(first + TOGETHER, documents))
        ids = torch.cat([subject.document(number, CONTEXT + length) for number in numbers])
        context, tokens = ids[:, :CONTEXT], ids[:, CONTEXT:]
        prompt = read(subject.model, context)
        dense, dense_bytes = None, 0
        for system, make in makers.items():
            cache = make(subject.model)
            fill(cache, prompt, context)
            found, held = predict(subject.model, cache, tokens, block)
            if dense is None:
                dense, dense_bytes = found, held
            lost = (dense - found).gather(2, tokens[:, 1:, None])[..., 0].mean(1)
            divergence = (dense.exp() * (dense - found)).sum(-1).mean(1)
            samples[system, "NLL above dense"] += lost.tolist()
            samples[system, "KL from dense"] += divergence.tolist()
            samples[system, "bytes over dense"] += [held / dense_bytes] * len(ids)
    setting = ", ".join(part for part in (subject.name, f"{CONTEXT} tokens", note, "float32") if part)
    return [_row(method, system, setting, name, values, metrics[name]) for (system, name), values in samples.items()]


class Layer(nn.Module):
    """What an attention function reads from the module that calls it."""

    layer_idx, num_key_value_groups, is_causal = 0, HEADS // KV_HEADS, True


def speed(method: str, systems: dict[str, Maker], seeds: int, note: str = "") -> list[Row]:
    """Time of one decode step, and over that of `DynamicCache` with SDPA: the mean over each seed's steps."""
    makers: dict[str, Maker] = {"dense": _dense, **systems}
    times: dict[str, list[float]] = {system: [] for system in makers}
    module = Layer()
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)

        def states(count: int, generator: torch.Generator = generator) -> tuple[Tensor, Tensor, Tensor]:
            query, key, value = (
                torch.randn(1, heads, count, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)
            )
            return query, key, value

        caches = {system: make(layer_config()) for system, make in makers.items()}
        _, key, value = states(STORED)
        for cache in caches.values():
            fill(cache, [(key, value, None)])
        taken = dict.fromkeys(caches, 0.0)
        for step in range(STEPS + 2):  # two to warm up
            query, key, value = states(1)
            for system, cache in caches.items():
                attention: Callable = kv_attention_forward if isinstance(cache, KVCache) else sdpa_attention_forward
                start = time.process_time()
                keys, values = cache.update(key, value, 0)
                attention(module, query, keys, values, None, scaling=DIM**-0.5)
                if step >= 2:
                    taken[system] += time.process_time() - start
        for system, seconds in taken.items():
            times[system].append(1e3 * seconds / STEPS)
    parts = ("Llama-3.2-1B layer", f"{STORED} tokens", note, "float32", "1 thread")
    setting, rows = ", ".join(part for part in parts if part), []
    for system in makers:
        ratios = [mine / dense for mine, dense in zip(times[system], times["dense"])]
        rows.append(_row(method, system, setting, "decode step", times[system], "ms"))
        rows.append(_row(method, system, setting, "decode step over dense", ratios, ""))
    return rows


def retrieval(
    method: str,
    systems: Callable[[int, list[int]], dict[str, Maker]],
    seeds: int,
    length: int,
    budgets: tuple[int, int],
    untimed: tuple[str, ...] = (),
) -> list[Row]:
    """Quality and speed of caches that attend to a budget of tokens, one token of the continuation at a time.

    Args:
        systems: caches for a budget of tokens and the ids of sentence marks.
        budgets: of the quality and of the speed.
        untimed: systems whose speed is not measured.
    """
    with one_thread():
        subject = load()
        makers = systems(budgets[0], subject.boundary_ids)
        rows = quality(method, makers, subject, seeds, length, 1, f"{budgets[0]} attended to")
        timed = systems(budgets[1], [0])  # there is no text, so no mark either
        timed = {name: make for name, make in timed.items() if name not in untimed}
        return rows + speed(method, timed, seeds, f"{budgets[1]} attended to")


def _dense(model: Any) -> Cache:
    return DynamicCache(config=getattr(model, "config", model))


def layer_config(attention: str = ATTENTION_NAME) -> LlamaConfig:
    """One layer of Llama-3.2-1B that runs `attention`; what caches of others return is given to SDPA in any case."""
    config = LlamaConfig(
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        num_hidden_layers=1,
        head_dim=DIM,
    )
    config._attn_implementation_internal = attention
    return config


def _row(method: str, system: str, setting: str, metric: str, values: list[float], unit: str) -> Row:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return Row(method, system, setting, metric, round(statistics.mean(values), 4), unit, len(values), round(spread, 4))
