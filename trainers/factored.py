"""The default of `SGCAdamW`: factored second moments, leading directions cut, steps relative to the weights.

Not in the SGC paper; what it keeps is smaller still than what the paper measures. Three parts, for a gradient `G` of
`(M, N)`:

1. Second moments as a row times a column, `M + N` numbers (Adafactor, arXiv 1804.04235), turn `G` into `U`.
2. A few directions hold most of `U` and hide what the others say. A random sketch of `R` rows, multiplied once by `V V^T`,
   with `V` a quarter of `U`, finds an orthonormal basis `Q` of them, and rows of `Q^T U` are cut to the root mean square
   of the singular values outside. Nothing is kept for it: the sketch is drawn anew at every step. Muon (momentum and all
   singular values made equal) does this in full.
3. A step is relative to the root mean square of its tensor, so that gains around 1 and weights around 0.02 learn with one
   rate: a tensor moves by `lr` times its root mean square over `USUAL_SCALE`.

There is no momentum for matrices, which costs a number a weight; `benchmarks/optimizer_ablation.py` measures what it would bring.
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
# What lies along a leading direction is cut to this multiple of the root mean square of the other singular values.
LIMIT = 1.0
# Runs of the longer side that a part of it is made of: where a batch used few rows, they often stand together.
PART_RUNS = 4
# Where the others hold next to nothing (the gradient of a few tokens), they count as this share of an even spread.
LEAST_CROWD = 0.01


def sketch_matrix(rank: int, short: int, seed: int) -> Tensor:
    """`Omega`, `(R, short)`, drawn on the CPU, so that every device and process has the same one."""
    return torch.randn(rank, short, generator=torch.Generator().manual_seed(seed))


def normalize_factored(
    gradients: list[Tensor], rows: Tensor, columns: Tensor, beta: float, correction: float, eps: float = 1e-8
) -> Tensor:
    """Divide gradients by the root of their factored second moment.

    Args:
        gradients (`list[Tensor]`): `(b, M, N)` each, float32: stacks of matrices, `B` in all.
        rows (`Tensor`): `(B, M)`, moving average of the mean squares of rows; updated in place.
        columns (`Tensor`): `(B, N)`, the same of columns.
        beta (`float`): Of the averages.
        correction (`float`): `1 - beta ** step`.
        eps (`float`, defaults to 1e-8): Its square is added to mean squares: smaller entries make smaller steps.

    Returns:
        `Tensor`: `(B, M, N)`
    """
    tiny = torch.finfo(torch.float32).tiny
    counts = [len(gradient) for gradient in gradients]
    squares = gradients[0].new_empty(sum(counts), *gradients[0].shape[1:])
    for gradient, out in zip(gradients, squares.split(counts), strict=True):
        torch.mul(gradient, gradient, out=out)
    rows.lerp_(squares.mean(-1).add_(eps**2), 1.0 - beta)
    columns.lerp_(squares.mean(-2).add_(eps**2), 1.0 - beta)
    by_row = (rows / rows.mean(-1, keepdim=True).clamp_min_(tiny)).clamp_min_(tiny).rsqrt_()
    by_column = (columns / correction).clamp_min_(tiny).rsqrt_()
    pieces = zip(gradients, by_row[..., None].split(counts), squares.split(counts), strict=True)
    for gradient, factor, out in pieces:
        torch.mul(gradient, factor, out=out)
    return squares.mul_(by_column[:, None])


def _quarter(matrices: Tensor, dim: int, part: int) -> Tensor:
    """Every fourth run of a dimension; of a short one a quarter in one run."""
    runs = PART_RUNS if matrices.shape[dim] >= 16 * PART_RUNS else 1
    whole = matrices.narrow(dim, 0, matrices.shape[dim] // (4 * runs) * 4 * runs)
    return whole.unflatten(dim, (runs, 4, -1)).select(dim + 1, part % 4).flatten(dim, dim + 1)


def cut_directions_(update: Tensor, norms: Tensor, sketch: Tensor, part: int, limit: float = LIMIT) -> Tensor:
    """Shorten what matrices hold along their leading directions, in place.

    Args:
        update (`Tensor`): `(B, M, N)`, a stack of matrices.
        norms (`Tensor`): `(B)`, the Frobenius norm of each.
        sketch (`Tensor`): `(R, min(M, N))`, with `R` at most a quarter of the shorter side.
        part (`int`): Which quarter of the longer side, in 4 runs, shows the leading directions, modulo 4. All of it would
            show them a little better and take longer.
        limit (`float`, defaults to 1.0): A row of `Q^T U` ends at this multiple of the root mean square of the singular
            values outside the space of `Q`.

    Returns:
        `Tensor`: `(B)`, the norms that are left.
    """
    # Of a square matrix that is rows: a part of them is copied faster than one of columns.
    longer = 2 if update.shape[1] < update.shape[2] else 1
    wide, quarter = (matrices if longer == 2 else matrices.mT for matrices in (update, _quarter(update, longer, part)))
    rank, short = sketch.shape
    # Two products with a quarter tell the leading directions from the crowd. One with all of the matrix shows what they
    # hold, another shortens it.
    basis = torch.linalg.qr((sketch @ quarter @ quarter.mT).mT).Q
    seen = basis.mT @ wide
    lengths = torch.linalg.vector_norm(seen, dim=-1)
    energy, found = norms.square(), lengths.square()
    outside = (energy - found.sum(-1)).clamp_min_(0.0)
    rest = torch.maximum(outside / (short - rank), LEAST_CROWD * energy / short).sqrt_()
    keep = (limit * rest[:, None] / lengths.clamp_min_(torch.finfo(update.dtype).tiny)).clamp_max_(1.0)
    wide.baddbmm_(basis * (keep - 1.0)[:, None], seen)
    # A sum of what is left, never a difference: of a matrix of low rank rounding would leave nothing to divide by.
    return (outside + found.mul_(keep.square_()).sum(-1)).sqrt_()
