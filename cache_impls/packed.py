"""`PackedCache`: an exact, uncompressed cache in preallocated storage, with grouped queries packed into rows.

Not from a paper; the floor the compressed caches stand on. The library's `DynamicCache` copies every key and value at
every step and attends to them one query head at a time. This one appends in place, grows by about 2 % when full, and
reads each stored key once for all query heads of its group.

Shapes: B batch, H query heads, K key/value heads, Q new tokens, N stored tokens, D head dim.
Plugs in: `generate(cache_implementation="packed")` after `hf_ext.register()`, or `past_key_values=PackedCache(model)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedConfig, PreTrainedModel

from hf_ext.cache_impls.attention import Segment, group_rows, prefers_flash, segment_attention, ungroup_rows
from hf_ext.cache_impls.base import KVCache, KVLayer, RowBuffer
from hf_ext.errors import ConfigError


def group_mask(mask: Tensor | None, length: int) -> Tensor | None:
    """The library's mask, `(B, 1, Q, N)` and boolean or additive, as boolean `(B, 1, 1, Q, N)`; `None` stays `None`."""
    if mask is None:
        return None
    visible = mask if mask.dtype == torch.bool else mask >= 0
    return visible[..., :length].unsqueeze(2)


def attend_rows(
    key: RowBuffer, value: RowBuffer, query: Tensor, visible: Tensor | None, scaling: float, softcap: float | None
) -> Tensor:
    """Exact attention over full-rank rows, the query heads of a group packed into the rows of one product.

    Args:
        key (`RowBuffer`), value (`RowBuffer`): `(B, K, N, D)`.
        query (`Tensor`): `(B, H, Q, D)`.
        visible (`Tensor`, *optional*): boolean `(B, 1, 1, Q, N)`.

    Returns:
        `Tensor`: `(B, Q, H, D)`.
    """
    kv_heads = key.data.shape[1]
    rows, groups = group_rows(query, kv_heads), query.shape[1] // kv_heads
    if softcap is None and prefers_flash(query):
        if visible is not None:
            visible = visible.expand(-1, -1, groups, -1, -1).flatten(2, 3)
        output = scaled_dot_product_attention(rows, key.rows, value.rows, visible, scale=scaling)
    else:
        part = Segment(rows * scaling, key.data, value.data, key.length, visible)
        output = segment_attention([part], groups, softcap)
    return ungroup_rows(output, query.shape[1])


class PackedLayer(KVLayer):
    """All keys and values of a layer, as they came."""

    def absorb_prompt(self, key: Tensor, value: Tensor, context: dict[str, Any] | None) -> None:
        self.key, self.value = RowBuffer(key), RowBuffer(value)

    def append(self, key: Tensor, value: Tensor) -> None:
        self.key.append(key)
        self.value.append(value)

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> Tensor:
        return attend_rows(self.key, self.value, query, group_mask(mask, self.seen), scaling, softcap)

    def materialize(self) -> tuple[Tensor, Tensor]:
        return self.key.rows, self.value.rows

    def buffers(self) -> list[RowBuffer]:
        return [self.key, self.value] if self.seen else []

    def tier_bytes(self) -> dict[str, int]:
        used = sum(buffer.length * buffer.row_bytes for buffer in self.buffers())
        held = sum(buffer.data.shape[2] * buffer.row_bytes for buffer in self.buffers())
        return {"full": used, "slack": held - used}

    def _drop_newest(self, count: int) -> None:
        self.key.remove(self.seen, count)
        self.value.remove(self.seen, count)

    def reset(self) -> None:
        if self.seen:
            del self.key, self.value
        super().reset()


class PackedCache(KVCache):
    """Exact cache without per-step copies.

    Args:
        model (`PreTrainedModel` or `PreTrainedConfig`): see `KVCache`.

    Example:
        ```python
        import hf_ext
        model.generate(**inputs, past_key_values=hf_ext.PackedCache(model))
        ```
    """

    def make_layer(self, model_config: PreTrainedConfig, layer_idx: int, order: int) -> PackedLayer:
        return PackedLayer(model_config, layer_idx)

    @classmethod
    def from_generate(cls, model: PreTrainedModel, cache_config: dict[str, Any] | None) -> PackedCache:
        """Builds the cache for `generate(cache_implementation="packed", cache_config=...)`; it has no settings."""
        if cache_config:
            raise ConfigError(
                f"PackedCache has no settings; remove {', '.join(map(repr, cache_config))} from cache_config."
            )
        return cls(model)
