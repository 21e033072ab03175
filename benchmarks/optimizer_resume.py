"""Whether training that goes on from a checkpoint ends where uninterrupted training ends, bit for bit, in `Trainer`.

    python benchmarks/optimizer_resume.py [--steps 16] [--methods NAME ...] [--out benchmarks/results]

A two-layer Llama with random weights trains on random tokens and saves half way; another `Trainer`, with a model of other
weights, resumes from that checkpoint. Exact means `torch.equal` for every parameter. Weights in float32 and in bfloat16, one
and two batches a step. An optimizer that cannot load its own checkpoint has the error's text in `runs/optimizer_resume.json`
and counts as not exact.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from hf_ext.config import write_text_atomic
from hf_ext.table import Row, write_rows
from hf_ext.tiny import VOCAB_SIZE, tiny_model
from hf_ext.trainers.sgc_trainer import SGCConfig, SGCTrainer


RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LENGTH, BATCH, SEQUENCES = 32, 4, 256
LOW_RANK = {"optim_target_modules": "all-linear", "optim_args": "rank=4,update_proj_gap=5"}
# Arguments of the trainer; with "mode" they are those of `SGCConfig`. Chunks and projections small enough for the model.
METHODS: dict[str, dict[str, Any]] = {
    "sgc": {"mode": "factored", "learning_rate": 1e-3},
    "sgc, bfloat16 state": {"mode": "factored", "learning_rate": 1e-3, "state_dtype": "bfloat16"},
    "sgc, budget 1%": {"mode": "factored", "learning_rate": 1e-3, "state_budget": 0.01},
    "sgc, hybrid": {"mode": "hybrid", "learning_rate": 1e-3, "chunk_size": 256, "k": 32, "s": 12},
    "sgc, paper known": {"mode": "paper", "learning_rate": 1e-3, "chunk_size": 256, "k": 32, "s": 12},
    "sgc, paper omp": {
        "mode": "paper", "learning_rate": 1e-3, "chunk_size": 256, "k": 32, "s": 4, "recover": "omp",
    },
    "sgc, paper rank 4": {
        "mode": "paper", "learning_rate": 1e-3, "chunk_size": 256, "k": 32, "s": 12, "rank": 4, "refresh": 5,
    },
    "block scalar": {"mode": "block", "learning_rate": 1e-3},
    "AdamW": {"optim": "adamw_torch", "learning_rate": 1e-3},
    "Adafactor": {"optim": "adafactor", "learning_rate": 1e-3},
    "GaLore": {"optim": "galore_adamw", "learning_rate": 1e-3, **LOW_RANK},
    "APOLLO": {"optim": "apollo_adamw", "learning_rate": 1e-3, **LOW_RANK},
}  # fmt: skip
NEEDS = {"GaLore": "galore_torch", "APOLLO": "apollo_torch"}


def data() -> list[dict[str, list[int]]]:
    ids = torch.randint(VOCAB_SIZE, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(settings: dict[str, Any], dtype: str, accumulation: int, steps: int, seed: int, folder: str) -> Trainer:
    """A trainer that saves half way, for a model with the weights of a seed."""
    ours = "mode" in settings
    args = (SGCConfig if ours else TrainingArguments)(
        output_dir=folder,
        max_steps=steps,
        save_strategy="steps",
        save_steps=steps // 2,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=accumulation,
        weight_decay=0.01,
        warmup_steps=2,
        lr_scheduler_type="cosine",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="no",
        seed=0,
        **settings,
    )
    model = tiny_model("llama_tied", seed).to(DTYPES[dtype])
    return (SGCTrainer if ours else Trainer)(model=model, args=args, train_dataset=data())


def compare(settings: dict[str, Any], dtype: str, accumulation: int, steps: int) -> dict[str, Any]:
    """`outcome` is `"exact"`, `"inexact"` or `"error"`."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            whole = trainer(settings, dtype, accumulation, steps, 0, folder)
            whole.train()
        except Exception as error:  # a peer may fail in any way, which is what is asked
            return {"outcome": "error", "when": "training", "error": _text(error)}
        try:
            # Other weights: what agrees in the end was in the checkpoint.
            rest = trainer(settings, dtype, accumulation, steps, 1, folder)
            rest.train(resume_from_checkpoint=str(Path(folder) / f"checkpoint-{steps // 2}"))
        except Exception as error:  # see above
            return {"outcome": "error", "when": "resuming", "error": _text(error)}
        pairs = list(zip(whole.model.parameters(), rest.model.parameters(), strict=True))
        exact = all(torch.equal(a, b) for a, b in pairs)
        difference = max(float((a.float() - b.float()).abs().max()) for a, b in pairs)
        return {"outcome": "exact" if exact else "inexact", "largest_difference": difference}


def _text(error: Exception) -> str:
    # torch writes parts of its messages in bold.
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return f"{type(error).__name__}: {' '.join(plain.split())[:900]}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what trainers print and warn of."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    """Compare, print, write after every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases: list[dict[str, Any]] = []
    rows = []
    for name in arguments.methods:
        if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
            print(f"{name}: left out, {NEEDS[name]} is not installed", flush=True)
            continue
        for dtype in DTYPES:
            for accumulation in (1, 2):
                with quiet():
                    found = compare(METHODS[name], dtype, accumulation, arguments.steps)
                cases.append({"method": name, "dtype": dtype, "accumulation": accumulation, **found})
                print(*(f"{key}={value}" for key, value in cases[-1].items()), flush=True)
                setting = f"{dtype}, accumulation {accumulation}"
                rows.append(Row("sgc", name, setting, "exact resume", float(found["outcome"] == "exact")))
                lines = ",\n".join(json.dumps(case) for case in cases)
                (arguments.out / "runs").mkdir(parents=True, exist_ok=True)
                write_text_atomic(arguments.out / "runs" / "optimizer_resume.json", f"[\n{lines}\n]\n")
                write_rows(arguments.out / "optimizer_resume.json", rows)


if __name__ == "__main__":
    main()
