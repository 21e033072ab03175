"""Quick comparison of OSD: how much of a fine-tune is left in a few kilobytes, next to a truncated SVD of the same bytes.

For each seed a two-layer Llama learns a made-up language, from scratch and in memory, and is then fine-tuned in full, all but
its embedding, on another one. Both languages draw a token from the two before it: `P(x | a, b)` is proportional to
`exp(A[a, x] + B[b, x])`, and the second language has other rows in a third of both tables.

The paper's form at ranks 1 and 2 sets the budgets: the bytes of its folder. Peers are dense factors of an SVD in float32,
int8 and int4, ranks shared out by energy a byte, with the same headers and files, so that all bytes are measured. Ours
chooses by measured divergence on 32 sequences of the training data. Recovery is the share of the drop in held-out loss that
is left, at most 1.
"""

from __future__ import annotations

import copy
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ext.merging.compress import compress_delta
from hf_ext.merging.osd_artifact import OSDArtifact
from hf_ext.merging.osd_config import OSDConfig
from hf_ext.table import Row
from hf_ext.tiny import tiny_model


SYMBOLS, LENGTH, BATCH = 64, 48, 16
STEPS, TUNING_STEPS, RATE, TUNING_RATE = 200, 100, 5e-3, 2e-3
SHARPNESS, CHANGED = 2.0, 1 / 3
CALIBRATION, HELD_OUT = 32, 64
RANKS = (1, 2)
SYSTEMS: dict[str, dict[str, Any]] = {
    "dense SVD fp32": {"codec": "factors", "values": "fp32", "refit_steps": 0},
    "dense SVD int8": {"codec": "factors", "values": "int8", "refit_steps": 0},
    "dense SVD int4": {"codec": "factors", "values": "int4", "refit_steps": 0},
    "osd signs": {"codec": "signs"},
    "osd": {},
}


class Language:
    """Tables of a language of `SYMBOLS` tokens, numbered from 2."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.tables = SHARPNESS * torch.randn(2, SYMBOLS, SYMBOLS, generator=generator)

    def changed(self) -> Language:
        """Another language, most rows of which are those of this one."""
        other = Language(self.generator)
        keep = torch.rand(2, SYMBOLS, 1, generator=self.generator) >= CHANGED
        other.tables = torch.where(keep, self.tables, other.tables)
        return other

    def sequences(self, count: int) -> Tensor:
        """Token ids `(count, LENGTH)`."""
        ids = torch.randint(SYMBOLS, (count, LENGTH), generator=self.generator)
        for at in range(2, LENGTH):
            logits = self.tables[0][ids[:, at - 2]] + self.tables[1][ids[:, at - 1]]
            ids[:, at] = torch.multinomial(logits.softmax(-1), 1, generator=self.generator)[:, 0]
        return ids + 2


def token_loss(model: Any, ids: Tensor) -> Tensor:
    """Mean loss of what the language decides: all tokens but the first two of each sequence."""
    logits = model(input_ids=ids, use_cache=False).logits[:, 1:-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 2:].flatten())


def train(model: Any, data: Tensor, steps: int, rate: float) -> None:
    """AdamW with a rate that falls to zero in a line."""
    wanted = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    model.train()
    for step, ids in zip(range(steps), data.split(BATCH)):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        loss = token_loss(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wanted, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def finetune(seed: int) -> tuple[Any, Any, Tensor, Tensor]:
    """A base model, its fine-tune, and calibration and held-out sequences of the second language."""
    first = Language(torch.Generator().manual_seed(seed))
    second = first.changed()
    base = tiny_model("llama_tied", seed, vocab_size=SYMBOLS + 2, initializer_range=0.02)
    train(base, first.sequences(STEPS * BATCH), STEPS, RATE)
    tuned = copy.deepcopy(base)
    tuned.get_input_embeddings().weight.requires_grad_(False)
    data = second.sequences(TUNING_STEPS * BATCH)
    train(tuned, data, TUNING_STEPS, TUNING_RATE)
    return base, tuned, data[:CALIBRATION], second.sequences(HELD_OUT)


@torch.no_grad()
def held_out_loss(base: Any, artifact: OSDArtifact | None, ids: Tensor) -> float:
    """Loss of the base with the deltas of an artifact added."""
    model = copy.deepcopy(base)
    weights = dict(model.named_parameters())
    for name, delta in artifact.deltas.items() if artifact else ():
        weights[name] += torch.from_numpy(delta.dense())
    return float(token_loss(model, ids))


def run(seeds: int) -> list[Row]:
    """Rows of all systems at two budgets: recovery of the loss gap and bytes of the folder, mean over `seeds` fine-tunes."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for seed in range(seeds):
        base, tuned, calibration, held_out = finetune(seed)
        before, after = held_out_loss(base, None, held_out), held_out_loss(tuned, None, held_out)
        examples = [{"input_ids": row} for row in calibration]
        for rank in RANKS:
            paper = compress_delta(base, tuned, OSDConfig(mode="paper", rank=rank), progress=False)
            artifacts = {"osd paper": paper}
            for name, settings in SYSTEMS.items():
                config = OSDConfig(budget=paper.nbytes(), **settings)
                data = examples if name == "osd" else None
                artifacts[name] = compress_delta(base, tuned, config, data, progress=False)
            for name, artifact in artifacts.items():
                recovery = (before - held_out_loss(base, artifact, held_out)) / (before - after)
                pair = min(recovery, 1.0), artifact.nbytes() / 1000
                found.setdefault((name, f"made-up language, budget of rank {rank}"), []).append(pair)
    rows = []
    for (name, setting), pairs in found.items():
        for metric, unit, values in zip(("recovery of the loss gap", "bytes"), ("", "kB"), zip(*pairs)):
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            mean = round(statistics.mean(values), 4)
            rows.append(Row("osd", name, setting, metric, mean, unit, len(values), round(spread, 4)))
    return rows
