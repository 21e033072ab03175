"""Nearest rows of a small set of references, for many rows at once: one product, a search in two stages, exact distances.

The k smallest of many numbers lie in the k groups with the smallest minima. Taking those minima first is a pass over
memory that a processor does at full width, and leaves k groups to search. The product ranks; the distances returned are
sums of squared differences, so that a row that equals a reference has the distance 0, not a rounding error.
"""

from __future__ import annotations

import torch
from torch import Tensor


GROUP = 64


def nearest(rows: Tensor, references: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` references nearest to each row.

    Args:
        rows (`Tensor`): `(n, d)`, a chunk of them: `n` times the number of references is held in memory.
        references (`Tensor`): `(r, d)`.
        count (`int`): At most r.

    Returns:
        `tuple[Tensor, Tensor]`: squared distances, ascending, and the references' numbers, both `(n, count)`.
    """
    # The row's own norm does not change the order.
    ranks = torch.addmm(references.square().sum(1), rows, references.T, alpha=-2)
    places = _smallest(ranks, count)
    squares = (rows[:, None] - references[places]).square().sum(-1)
    squares, order = squares.sort(dim=1)
    return squares, places.gather(1, order)


def mean_distances(rows: Tensor, references: Tensor, k: int) -> Tensor:
    """Root mean square of the distances to the k nearest references, `(n,)`; one that equals the row is left out once.

    Args:
        rows (`Tensor`): `(n, d)`. references (`Tensor`): `(r, d)`, r > k.
    """
    return without_self(nearest(rows, references, k + 1)[0], rows).mean(1).sqrt()


def without_self(squares: Tensor, rows: Tensor) -> Tensor:
    """Of `k + 1` ascending squared distances the k that count: without the first where it is the row itself, else without the
    last."""
    return torch.where(is_self(squares, rows), squares[:, 1:], squares[:, :-1])


def is_self(squares: Tensor, rows: Tensor) -> Tensor:
    """Whether the nearest reference equals the row, `(n, 1)`, up to the rounding of either: float32 moved and scaled again."""
    return squares[:, :1] <= 1e-12 * (1 + rows.square().sum(1, keepdim=True))


def _smallest(values: Tensor, count: int) -> Tensor:
    """Places of the `count` smallest of each row, in no order."""
    n, r = values.shape
    groups = r // GROUP
    if groups <= 2 * count:
        return values.topk(count, dim=1, largest=False, sorted=False).indices
    # Group g holds the places g, g + groups, ...: the minima are then taken over whole lines of memory.
    minima = values[:, : GROUP * groups].view(n, GROUP, groups).amin(1)
    chosen = minima.topk(count, dim=1, largest=False, sorted=False).indices
    places = (chosen[:, :, None] + groups * torch.arange(GROUP, device=values.device)).flatten(1)
    rest = torch.arange(GROUP * groups, r, device=values.device).expand(n, -1)
    places = torch.cat([places, rest], dim=1)
    return places.gather(1, values.gather(1, places).topk(count, dim=1, largest=False, sorted=False).indices)
