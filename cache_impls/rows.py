"""Picking tokens out of `(B, K, N, D)` tensors whose rows may start with padding.

Shapes: B batch, K key/value heads, N tokens, M chosen tokens, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_ext.errors import CacheStateError


def split_top(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Slots of the `count` best scores and of the others, both ascending; of equal scores the earlier wins.

    Args:
        scores (`Tensor`): `(B, K, M)`.

    Returns:
        `tuple[Tensor, Tensor]`: `(B, K, count)` and `(B, K, M - count)`, int64.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values, order[..., count:].sort(dim=-1).values


def shown_tokens(mask: Tensor, start: int, stop: int) -> Tensor:
    """Which of the tokens from `start` to `stop` the last query sees, boolean `(B, n)`; of a mask `(B, 1, Q, N)`, boolean or
    additive."""
    shown = mask[:, 0, -1, start:stop]
    return shown if shown.dtype == torch.bool else shown >= 0


def leading_pads(mask: Tensor | None, length: int) -> Tensor | None:
    """Padding tokens before each row, `(B,)`, from the mask of an attention call; `None` where there are none.

    Args:
        mask (`Tensor`, *optional*): `(B, 1, Q, N)`, boolean or additive; its last query row is read.
        length (`int`): tokens stored (N).

    Raises:
        `CacheStateError`: tokens are masked elsewhere than at the front.
    """
    if mask is None:
        return None
    seen = shown_tokens(mask, 0, length)
    pads = (~seen).sum(-1)
    if not bool(pads.any()):
        return None
    if not bool((seen == (torch.arange(length, device=mask.device) >= pads[:, None])).all()):
        raise CacheStateError(
            "the cache found masked tokens that are not padding in front of a row; batch prompts with padding_side='left'."
        )
    return pads


def take(tokens: Tensor, places: Tensor) -> Tensor:
    """Rows of `tokens` `(B, K, N, D)` at `places`, `(B, M)` for all heads or `(B, K, M)`; returns `(B, K, M, D)`."""
    batch, heads, length, dim = tokens.shape
    places = places[:, None].expand(-1, heads, -1) if places.dim() == 2 else places
    # Whole rows by flat index: `gather` would look up every number on its own.
    offset = torch.arange(batch * heads, device=tokens.device).view(batch, heads, 1) * length
    flat = tokens.reshape(-1, dim).index_select(0, (places + offset).flatten())
    return flat.view(batch, heads, places.shape[2], dim)


def mark_rows(hidden: Tensor, length: int) -> Tensor:
    """Padding marks `(B, K, length)` from those of the first rows `(B, K, n)`; rows beyond `n` are not padding."""
    marks = hidden.new_zeros(*hidden.shape[:2], length)
    marks[..., : min(hidden.shape[2], length)] = hidden[..., :length]
    return marks


def visible_rows(hidden: Tensor | None, length: int) -> Tensor | None:
    """Boolean `(B, K, 1, 1, length)` for an attention mask, from the padding `(B, K, n)` of the first rows."""
    return None if hidden is None else ~mark_rows(hidden, length)[:, :, None, None]


def append_marks(hidden: Tensor | None, length: int, more: Tensor | None) -> Tensor | None:
    """Padding marks of `length` rows, of which the first are given, and of the rows `more` behind them."""
    if more is None:
        return None if hidden is None else mark_rows(hidden, length)
    return torch.cat([mark_rows(more[..., :0] if hidden is None else hidden, length), more], dim=2)


def position_shift(context: dict[str, Any] | None, length: int) -> Tensor | None:
    """Place in the text minus position id, `(B,)`; `None` where they are the same or unknown."""
    if context is None or context["position_ids"] is None or context["position_ids"].dim() != 2:
        return None
    ids = context["position_ids"]
    shift = (length - 1 - ids[:, -1]).expand(context["query"].shape[0])
    return shift.clone() if bool(shift.any()) else None
