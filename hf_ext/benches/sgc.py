"""Quick comparison of `SGCAdamW`: what a small model learns in a few steps, and how many bytes the optimizer keeps for it.

A two-layer Llama learns a made-up language from scratch and in memory: a token is drawn from the two before it, see
`Language` in `osd.py`. Seeds choose language, weights and data. The rate of every optimizer is the best of a few, found on a
seed that is not reported. Loss is that of 64 sequences nothing was trained on, above that of the language itself, which no
model can beat. Bytes are those of all state, and of matrices kept beside it.

Peers: AdamW, Adafactor as `Trainer` makes it and with steps relative to the weights, one second moment a chunk without
momentum (`mode="block"`), and the form the paper published, with its moments known at the entries kept and found by matching
pursuit.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_ext.benches.caches import one_thread
from hf_ext.benches.osd import SYMBOLS, Language, token_loss
from hf_ext.table import Row
from hf_ext.tiny import tiny_model
from hf_ext.trainers.sgc_optimizer import SGCAdamW


PLOT = ("state", "loss above entropy")
STEPS, BATCH, HELD_OUT, WARM_UP = 100, 16, 64, 10
DECAY = 0.01
# The model's matrices have a few thousand entries, so that a chunk is smaller than by default.
CHUNKS = {"chunk_size": 512, "k": 64, "min_numel": 2048}


def _adafactor(relative: bool) -> Callable[[list[Tensor], float], Optimizer]:
    def make(weights: list[Tensor], rate: float) -> Optimizer:
        from transformers import Adafactor

        return Adafactor(weights, lr=rate, scale_parameter=relative, relative_step=False, weight_decay=DECAY)

    return make


def _ours(**settings: Any) -> Callable[[list[Tensor], float], Optimizer]:
    return lambda weights, rate: SGCAdamW(weights, lr=rate, weight_decay=DECAY, **settings)


# How an optimizer is made, and its rate.
SYSTEMS: dict[str, tuple[Callable[[list[Tensor], float], Optimizer], float]] = {
    "sgc": (_ours(), 0.01),
    "AdamW": (lambda weights, rate: torch.optim.AdamW(weights, lr=rate, weight_decay=DECAY), 0.03),
    "Adafactor": (_adafactor(False), 0.02),
    "Adafactor relative": (_adafactor(True), 0.1),
    "block scalar": (_ours(mode="block", chunk_size=512, min_numel=2048), 0.02),
    "sgc, paper known": (_ours(mode="paper", s=24, **CHUNKS), 0.1),
    "sgc, paper omp": (_ours(mode="paper", s=7, recover="omp", **CHUNKS), 0.1),
}


def entropy(language: Language, ids: Tensor) -> float:
    """Mean loss, in nats, of who knows the language on the tokens that `token_loss` judges."""
    ids = ids - 2
    logits = language.tables[0][ids[:, :-2]] + language.tables[1][ids[:, 1:-1]]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 2:].flatten()))


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors an optimizer keeps; only for those that keep them in `state`."""
    if isinstance(optimizer, SGCAdamW):
        return optimizer.state_bytes()
    return sum(v.nbytes for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))


@torch.enable_grad()
def train(name: str, seed: int, data: Tensor) -> tuple[Any, Optimizer]:
    """A model after `STEPS` steps, and its optimizer."""
    make, rate = SYSTEMS[name]
    model = tiny_model("llama_tied", seed, vocab_size=SYMBOLS + 2, initializer_range=0.02)
    weights: list[Tensor] = list(model.parameters())
    optimizer = make(weights, rate)
    model.train()
    for step, ids in zip(range(STEPS), data.split(BATCH)):
        factor = min((step + 1) / WARM_UP, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / STEPS)))
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        token_loss(model, ids).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), optimizer


def material(seed: int) -> tuple[Tensor, Tensor, float]:
    """Training and held-out sequences `(count, LENGTH)` of a seed's language, and the loss no model can beat."""
    language = Language(torch.Generator().manual_seed(seed))
    data, held_out = language.sequences(STEPS * BATCH), language.sequences(HELD_OUT)
    return data, held_out, entropy(language, held_out)


def run(seeds: int) -> list[Row]:
    """Rows of all optimizers: loss above the entropy and state, mean over `seeds` languages."""
    losses: dict[str, list[float]] = {}
    sizes: dict[str, int] = {}
    with one_thread():
        for seed in range(seeds):
            data, held_out, least = material(seed)
            for name in SYSTEMS:
                model, optimizer = train(name, seed, data)
                losses.setdefault(name, []).append(float(token_loss(model, held_out)) - least)
                sizes[name] = state_bytes(optimizer)
    rows = []
    for name, values in losses.items():
        spread = statistics.stdev(values) if seeds > 1 else 0.0
        mean, setting = statistics.mean(values), f"made-up language, {STEPS} steps"
        rows.append(Row("sgc", name, setting, "loss above entropy", round(mean, 4), "nats", seeds, round(spread, 4)))
        rows.append(Row("sgc", name, setting, "state", sizes[name] / 1000, "kB"))
    return rows
