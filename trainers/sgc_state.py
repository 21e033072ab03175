"""What `SGCAdamW` keeps for a parameter, by its shape and the settings of its group."""

from __future__ import annotations

from typing import Any

from torch import Tensor


# Directions that are cut where no number is given. More cost more of the step.
MOST_DIRECTIONS = 16


def state_shapes(group: dict[str, Any], parameter: Tensor) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a parameter keeps, without the count of its steps."""
    mode, entries = group["mode"], parameter.numel()
    if keeps_adamw(group, parameter):
        return {"first": tuple(parameter.shape), "second": tuple(parameter.shape)}
    if mode == "factored":
        stack, rows, columns = matrix_shape(parameter)
        return {"rows": (stack, rows)[stack == 1 :], "columns": (stack, columns)[stack == 1 :]}
    shapes: dict[str, tuple[int, ...]] = {}
    if basis := basis_shape(group, parameter):
        shapes["basis"], entries = basis, entries // basis[0] * basis[1]
    size = group["chunk_size"] or entries
    chunks, k = -(-entries // size), min(group["k"], size)
    if mode != "block":
        shapes["first"] = (chunks, k)
    shapes["second"] = (chunks, k if mode == "paper" else 1)
    return shapes


def basis_shape(group: dict[str, Any], parameter: Tensor) -> tuple[int, int] | None:
    """`(M, R)` of CESGC's projection, `M` the shorter side; `None` where a parameter is measured as it is."""
    if group["mode"] != "paper" or group["rank"] is None or parameter.ndim < 2:
        return None
    short = min(parameter.shape[0], parameter.numel() // parameter.shape[0])
    return short, min(group["rank"], short)


def matrix_shape(parameter: Tensor) -> tuple[int, int, int]:
    """`(B, M, N)` of a tensor as a stack of matrices, most often of one, whichever has less state.

    Experts of a layer in one tensor are a stack; the kernel of a convolution is a matrix with a row an output.
    """
    flat = (parameter.shape[0], parameter.numel() // parameter.shape[0])
    if parameter.ndim == 3 and parameter.shape[0] * (parameter.shape[1] + parameter.shape[2]) < sum(flat):
        stack, rows, columns = parameter.shape
        return stack, rows, columns
    return 1, *flat


def keeps_adamw(group: dict[str, Any], parameter: Tensor) -> bool:
    """Whether a parameter is too small, or in the default mode no matrix, and gets AdamW's update and state."""
    return is_vector(parameter) if group["mode"] == "factored" else parameter.numel() < group["min_numel"]


def is_vector(parameter: Tensor) -> bool:
    """Whether all entries lie along one dimension."""
    return parameter.numel() == max(parameter.shape, default=1)


def directions_cut(group: dict[str, Any], shape: tuple[int, int]) -> int:
    """How many leading directions of a matrix `(M, N)` are cut.

    Rows of an embedding are words, most of them absent from a batch: its directions are the words that were there.
    """
    short, long = sorted(shape)
    wanted = group["directions"]
    rank = min(short // 16, MOST_DIRECTIONS) if wanted is None else min(wanted, short // 4)
    return rank if long < 16 * short else 0
