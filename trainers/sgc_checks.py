"""What `SGCAdamW` refuses before anything is trained: settings of a group, and parameters it cannot serve."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hf_ext.errors import ConfigError
from hf_ext.log import get_logger, warn_once
from hf_ext.trainers.measurements import KINDS
from hf_ext.trainers.sgc_state import basis_shape


MODES = ("factored", "paper", "hybrid", "block")
STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_CHOICES = {
    "mode": MODES,
    "measurement": KINDS,
    "recover": ("known", "omp"),
    "moment_space": ("decoded", "compressed"),
    "residual": ("none", "chunk"),
    "state_dtype": tuple(STATE_DTYPES),
    "on_nonfinite": ("raise", "skip"),
}
_AT_LEAST = {"k": 1, "s": 1, "refresh": 1, "min_numel": 1, "directions": 0, "seed": 0}

_logger = get_logger(__name__)


def check_settings(group: dict[str, Any]) -> None:
    def check(right: bool, name: str, expected: str) -> None:
        if not right:
            raise ConfigError(f"{name}={group[name]!r}; expected {expected}.")

    for name, choices in _CHOICES.items():
        check(group[name] in choices, name, "one of " + ", ".join(map(repr, choices)))
    for name, least in _AT_LEAST.items():
        if name == "directions" and group[name] is None:
            continue
        check(_is_count(group[name], least), name, f"a whole number of at least {least}")
    check(group["rank"] is None or _is_count(group["rank"]), "rank", "None or a whole number of at least 1")
    check(
        group["relative_step"] is None or isinstance(group["relative_step"], bool), "relative_step", "a bool or None"
    )
    rate = group["lr"].item() if isinstance(group["lr"], Tensor) and group["lr"].ndim == 0 else group["lr"]
    check(
        _is_number(rate) and rate >= 0.0, "lr", "a number of at least 0, or a tensor without dimensions that holds one"
    )
    for name in ("eps", "weight_decay"):
        check(_is_number(group[name]) and group[name] >= 0.0, name, "a number of at least 0")
    betas = group["betas"]
    pair = isinstance(betas, tuple | list) and len(betas) == 2 and all(map(_is_number, betas))
    check(pair and all(0.0 <= beta < 1.0 for beta in betas), "betas", "two numbers in [0, 1)")
    check(group["rank"] is None or group["mode"] == "paper", "rank", 'None unless mode="paper"')
    if group["mode"] in ("paper", "hybrid"):
        size = group["chunk_size"]
        check(size is None or _is_count(size), "chunk_size", "None or a whole number of at least 1")
        check(group["s"] <= group["k"], "s", f"at most k={group['k']}: no more entries than measurements")
        check(size is None or group["k"] <= size, "k", f"at most chunk_size={size}")
        _warn_if_hard(group)
    elif group["mode"] == "block":
        size = group["chunk_size"]
        check(_is_count(size), "chunk_size", "a whole number of at least 1")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_whole(group: dict[str, Any], parameter: Tensor, large: bool) -> None:
    """Without chunks, the size of a large tensor has to suit the measurement."""
    basis, measured = basis_shape(group, parameter), group["mode"] in ("paper", "hybrid")
    entries = parameter.numel() // basis[0] * basis[1] if basis else parameter.numel()
    if measured and group["chunk_size"] is None and group["measurement"] == "srht" and entries & (entries - 1):
        if large:
            raise ConfigError(
                f"chunk_size=None with measurement='srht' and a parameter of {entries} entries, no power of two; take a "
                "chunk_size, or measurement='gaussian'."
            )


def _warn_if_hard(group: dict[str, Any]) -> None:
    k, s, size = group["k"], group["s"], group["chunk_size"]
    if group["mode"] == "paper" and group["recover"] == "omp" and size is not None and s < size:
        needed = 2 * s * torch.log(torch.tensor(size / s)).item()
        if k < needed:
            warn_once(
                _logger, f"k={k} measurements are few for recover='omp' with s={s} of {size}: about {needed:.0f}."
            )


def check_parameter(parameter: Tensor) -> None:
    shape = tuple(parameter.shape)
    cut = hasattr(parameter, "placements") and "a DTensor (FSDP2, tensor parallel)"
    if getattr(parameter, "_is_flat_param", False) or getattr(parameter, "_fsdp_flattened", False):
        cut = "flattened by FSDP"
    if cut:
        raise ConfigError(
            f"a parameter of shape {shape} is {cut}, cut across ranks; SGCAdamW needs whole tensors: use data parallelism, "
            "or another optimizer."
        )
    if parameter.is_complex():
        raise ConfigError(f"a parameter of shape {shape} is complex; view it as real numbers with torch.view_as_real.")
    if not parameter.is_floating_point():
        raise ConfigError(f"a parameter of shape {shape} has dtype {parameter.dtype}; expected floating point.")
    if parameter.numel() == 0:
        raise ConfigError(f"a parameter of shape {shape} has no entries; leave it out of the optimizer.")
