"""One dial for the state of `SGCAdamW`: from a share of AdamW's state, or bytes, to the settings that fit into it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import isfinite, log
from typing import Any

import torch
from torch import Tensor

from hf_ext.errors import ConfigError
from hf_ext.trainers.measurements import Measurement
from hf_ext.trainers.sgc_checks import STATE_DTYPES
from hf_ext.trainers.sgc_optimizer import SGCAdamW
from hf_ext.trainers.sgc_state import keeps_adamw, state_shapes


# AdamW keeps two float32 numbers a weight.
ADAMW_BYTES = 8
CHUNK_SIZES = tuple(1 << power for power in range(8, 21))
# Measured chunks need the products of all columns with each other for a moment: N x N numbers.
MEASURED_CHUNK_SIZES = tuple(size for size in CHUNK_SIZES if size <= 4096)
# Settings that a budget may replace.
CHOSEN = ("mode", "k", "s", "chunk_size", "state_dtype", "min_numel", "relative_step")
# Fewer measurements a chunk than this say nothing about it; larger chunks do better.
FEWEST = 16


def adamw_bytes(parameters: Iterable[Tensor]) -> int:
    """Bytes of AdamW's state in float32 for these parameters."""
    return sum(ADAMW_BYTES * parameter.numel() for parameter in parameters)


def planned_bytes(parameters: Sequence[Tensor], settings: dict[str, Any]) -> int:
    """Bytes that `SGCAdamW.state_bytes()` reports after a step with these settings.

    Args:
        parameters (`Sequence[Tensor]`): All that get gradients.
        settings (`dict`): All settings of `SGCAdamW`, such as `optimizer.defaults`.

    Returns:
        `int`
    """
    width = STATE_DTYPES[settings["state_dtype"]].itemsize
    total, measured = 0, set()
    for parameter in parameters:
        shapes = state_shapes(settings, parameter)
        total += 8  # the count of steps
        for name, shape in shapes.items():
            entries = 1
            for side in shape:
                entries *= side
            total += entries * (4 if name == "basis" else width)
        if settings["mode"] in ("paper", "hybrid") and not keeps_adamw(settings, parameter):
            # Without chunks a tensor is measured whole, or what its basis leaves of it.
            whole = shapes["basis"][1] * max(_sides(parameter)) if "basis" in shapes else parameter.numel()
            measured.add(settings["chunk_size"] or whole)
    for size in measured:
        total += Measurement(settings["measurement"], min(settings["k"], size), size, settings["seed"]).nbytes
    return total


def budget_settings(parameters: Sequence[Tensor], budget: float, settings: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `SGCAdamW` with those a budget chooses put in; see `fit_to_budget`."""
    defaults = SGCAdamW([torch.nn.Parameter(torch.zeros(1))], **settings).defaults
    chosen = fit_to_budget(parameters, budget, defaults)
    return {**settings, **{name: chosen[name] for name in CHOSEN}}


def fit_to_budget(parameters: Sequence[Tensor], budget: float, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that use the most of a budget without passing it.

    `mode="factored"` has one size; under it the state is rounded to bfloat16, then each chunk keeps one number
    (`mode="block"`). What a larger budget leaves over is not used. `"paper"` and `"hybrid"` get as many measurements as fit, in
    the smallest chunks that leave enough of them.

    Args:
        parameters (`Sequence[Tensor]`): All that will be trained.
        budget (`float`): Up to 1 a share of AdamW's state in float32, above it bytes.
        settings (`dict`): All settings of `SGCAdamW`; what the mode leaves open is chosen.

    Returns:
        `dict`: `settings` with some replaced.

    Raises:
        ConfigError: nothing fits; the message names the smallest state there is.
    """
    if not (budget > 0 and isfinite(budget)):
        raise ConfigError(
            f"state_budget={budget!r}; expected a share of AdamW's state (up to 1) or a number of bytes."
        )
    limit = budget * adamw_bytes(parameters) if budget <= 1 else budget
    sizes = []
    for candidate in _candidates(parameters, limit, settings):
        sizes.append(planned_bytes(parameters, candidate))
        if sizes[-1] <= limit:
            return candidate
    smallest = min(sizes)
    share = smallest / adamw_bytes(parameters)
    raise ConfigError(
        f"state_budget={budget!r} is {limit:,.0f} bytes for these parameters; the smallest state of "
        f"mode={settings['mode']!r} has {smallest:,} ({share:.2%} of AdamW's). Raise it to that, or choose another mode."
    )


def _candidates(parameters: Sequence[Tensor], limit: float, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    mode = settings["mode"]
    if mode == "factored":
        yield settings
        yield {**settings, "state_dtype": "bfloat16"}
    if mode in ("factored", "block"):
        relative = settings["relative_step"]
        for size in CHUNK_SIZES:
            # Same meaning of the rate as the mode that was asked for; one number a chunk is no burden for small tensors.
            yield {
                **settings,
                "mode": "block",
                "relative_step": mode == "factored" if relative is None else relative,
                "state_dtype": "bfloat16",
                "chunk_size": size,
                "min_numel": 1,
            }
        return
    found = []
    for size in MEASURED_CHUNK_SIZES:
        least = {**settings, "chunk_size": size, "k": 1, "s": 1}
        start = planned_bytes(parameters, least)
        step = planned_bytes(parameters, {**least, "k": 2}) - start
        k = max(1, min(size, 1 + int((limit - start) // step)) if step else size)
        found.append({**least, "k": k, "s": _entries(k, size, settings["recover"])})
    enough = [candidate for candidate in found if candidate["k"] >= FEWEST]
    yield from enough
    yield from sorted((c for c in found if c["k"] < FEWEST), key=lambda candidate: -candidate["k"])


def _sides(parameter: Tensor) -> tuple[int, int]:
    return parameter.shape[0], parameter.numel() // parameter.shape[0]


def _entries(k: int, size: int, recover: str) -> int:
    """Entries to keep a chunk: what a search can find again, or three eighths of the measurements where it is known."""
    if recover == "known":
        return max(1, 3 * k // 8)
    s = 1
    while s < k and 2 * (s + 1) * log(size / (s + 1)) <= k:
        s += 1
    return s
