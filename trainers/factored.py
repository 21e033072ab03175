"""The default of `SGCAdamW`: factored second moments, sketched singular directions, steps relative to the weights.

Not in the SGC paper; what it keeps is smaller still than what the paper measures. Three parts, for a gradient `G` of
`(M, N)`:

1. Second moments as a row times a column, `M + N` numbers (Adafactor, arXiv 1804.04235), turn `G` into `U`.
2. A few directions hold most of `U` and hide what the others say. A random sketch `Omega U` of `R` rows finds them, and
   their singular values are cut to a multiple of the mean of the rest. Nothing is kept for it: `Omega` is drawn anew at
   every step. Muon (momentum and all singular values made equal) does this in full.
3. A step is relative to the root mean square of its tensor, so that gains around 1 and weights around 0.02 learn with one
   rate: a tensor moves by `lr` times its root mean square over `USUAL_SCALE`.

There is no momentum for matrices: it costs a number a weight, and brought a hundredth of a nat or nothing where it was
measured (`benchmarks/optimizer_ablation.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor


# Makes AdamW's rates carry over: its steps have a root mean square of 0.2 to 0.4 of the rate (arXiv 2502.16982), weights, as
# most models draw them, one of 0.02.
USUAL_SCALE = 0.1
# A weight's root mean square counts as no less: the scale most models are drawn with. A tensor that starts at zero (a
# bias, LoRA's B) would not move otherwise.
SMALLEST_SCALE = 0.02
# And that of a vector as no more: gains of norms drift upwards, and steps that grow with them let them run away.
LARGEST_VECTOR_SCALE = 1.0
# Leading singular values are cut to this multiple of the root mean square of the others.
LIMIT = 1.0
# Where the others hold next to nothing (the gradient of a few tokens), they count as this share of an even spread.
LEAST_CROWD = 0.01


def sketch_matrix(rank: int, rows: int, seed: int) -> Tensor:
    """`Omega`, `(R, M)`, drawn on the CPU, so that every device and process has the same one."""
    return torch.randn(rank, rows, generator=torch.Generator().manual_seed(seed))


def normalize_factored(
    gradient: Tensor, rows: Tensor, columns: Tensor, beta: float, correction: float, eps: float = 1e-8
) -> Tensor:
    """Divide a gradient by the root of its factored second moment.

    Args:
        gradient (`Tensor`): `(..., M, N)`, float32: a matrix, or a stack of them.
        rows (`Tensor`): `(..., M)`, moving average of the mean squares of rows; updated in place.
        columns (`Tensor`): `(..., N)`, the same of columns.
        beta (`float`): Of the averages.
        correction (`float`): `1 - beta ** step`.
        eps (`float`, defaults to 1e-8): Its square is added to mean squares: smaller entries make smaller steps.

    Returns:
        `Tensor`: `(..., M, N)`
    """
    tiny = torch.finfo(torch.float32).tiny
    squares = gradient * gradient
    rows.lerp_(squares.mean(-1).add_(eps**2), 1.0 - beta)
    columns.lerp_(squares.mean(-2).add_(eps**2), 1.0 - beta)
    mean = (rows.mean(-1, keepdim=True) / correction).clamp_min_(tiny)
    by_row = (rows / (correction * mean)).clamp_min_(tiny).rsqrt_()
    by_column = (columns / correction).clamp_min_(tiny).rsqrt_()
    return torch.mul(gradient, by_row[..., None], out=squares).mul_(by_column[..., None, :])


def cut_directions_(update: Tensor, norm: Tensor, sketch: Tensor, limit: float = LIMIT) -> Tensor:
    """Cut the singular values of the leading directions of a matrix, in place.

    Args:
        update (`Tensor`): `(..., M, N)`: a matrix, or a stack of them.
        norm (`Tensor`): `(...)`, the Frobenius norm of each.
        sketch (`Tensor`): `(R, M)`, with `R` below `M` and `N`.
        limit (`float`, defaults to 1.0): Singular values end at this multiple of the root mean square of those outside the
            sketch.

    Returns:
        `Tensor`: `(...)`, the norm that is left of each.
    """
    rank = len(sketch)
    # One product with the matrix and one with its transpose: the second tells the leading directions from the crowd.
    basis = torch.linalg.qr(update @ (sketch @ update).mT).Q
    seen = basis.mT @ update
    values, vectors = torch.linalg.eigh(seen @ seen.mT)
    short, energy = min(update.shape[-2:]), norm.square()
    outside = (energy - values.sum(-1)).clamp_min_(0.0)
    rest = torch.maximum(outside / (short - rank), LEAST_CROWD * energy / short)
    keep = (limit**2 * rest[..., None] / values.clamp_min(torch.finfo(update.dtype).tiny)).sqrt_().clamp_max_(1.0)
    add_product = update.addmm_ if update.ndim == 2 else update.baddbmm_
    add_product(basis @ (vectors * (keep - 1.0)[..., None, :]) @ vectors.mT, seen)
    # A sum of what is left, never a difference: of a matrix of low rank rounding would leave nothing to divide by.
    return (outside + (values.clamp_min(0.0) * keep.square()).sum(-1)).sqrt_()
