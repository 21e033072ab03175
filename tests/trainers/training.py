"""Trainers of tiny models on counting sequences; imported by tests and by the script that two ranks run."""

import torch
from transformers import TrainingArguments

from hf_ext.tiny import VOCAB_SIZE, tiny_model
from hf_ext.trainers.sgc_trainer import SGCConfig, SGCTrainer


LENGTH = 12
QUIET = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
# Small enough that tiny tensors have many chunks.
SMALL = {"k": 16, "s": 6, "chunk_size": 128, "min_numel": 256, "directions": 2}
MODES = ("factored", "paper", "hybrid", "block")
RATES = {"factored": 2e-3, "paper": 0.01, "hybrid": 3e-3, "block": 3e-3}


def rows(count: int = 32) -> list[dict]:
    """Sequences that count up in steps of three."""
    starts = torch.arange(count) * 7
    tokens = (starts[:, None] + 3 * torch.arange(LENGTH)) % VOCAB_SIZE
    return [{"input_ids": row.tolist(), "labels": row.tolist()} for row in tokens]


def make_args(cls=SGCConfig, **settings) -> TrainingArguments:
    small = SMALL if issubclass(cls, SGCConfig) else {}
    if settings.get("state_budget") is not None:
        small = {"min_numel": 256}
    defaults = {"max_steps": 4, "per_device_train_batch_size": 4, "seed": 7, "weight_decay": 0.01}
    if "mode" in settings:
        defaults["learning_rate"] = RATES[settings["mode"]]
    return cls(**{**QUIET, **small, **defaults, **settings})


def make_trainer(
    arch: str = "llama", *, model=None, cls=SGCTrainer, config=SGCConfig, dtype=None, data=None, **settings
):
    extra = {name: settings.pop(name) for name in ("optimizers", "optimizer_cls_and_kwargs") if name in settings}
    model = tiny_model(arch) if model is None else model
    model = model if dtype is None else model.to(dtype)
    return cls(
        model=model, args=make_args(config, **settings), train_dataset=rows() if data is None else data, **extra
    )


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}
