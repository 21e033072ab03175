"""The attention function every cache of the suite plugs into, and the hooks that switch a model to it.

A cache layer of this suite returns `KVBlock`s from `update()` instead of tensors. `kv_attention_forward` recognises it
and lets the layer attend in its own storage: the query heads of a group become the rows of one product, so key/value
heads are never repeated and compressed tokens are never expanded. Ordinary tensors go to the library's own function.

Shapes: B batch, H query heads, K key/value heads, G = H / K, Q new tokens, N stored tokens, D head dim.
Plugs in: `AttentionInterface` and `AttentionMaskInterface` under `ATTENTION_NAME`, for the span of one forward call.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_ext.log import get_logger, warn_once


if TYPE_CHECKING:
    from hf_ext.cache_impls.base import KVLayer

_logger = get_logger(__name__)

ATTENTION_NAME = "hf_ext_kv"

# A block of more new tokens than this attends to rebuilt keys and values: the score matrix would outgrow them.
MAX_IN_SPACE_ROWS = 64
# Rows converted at a time where stored rows are in another type than the products: few enough to stay in a cache.
CONVERTED_ROWS = 2048


@dataclass
class KVStep:
    """The new tokens of one layer on their way from `update` to the attention function.

    `key` and `value` are `(B, K, Q, D)`; `first` says that the layer held nothing before them; `tensors` holds all keys
    and values, once something asked for them.
    """

    layer: KVLayer
    key: Tensor
    value: Tensor
    first: bool
    tensors: tuple[Tensor, Tensor] | None = None

    def expand(self) -> tuple[Tensor, Tensor]:
        if self.tensors is None:
            self.tensors = self.layer.tensor_states(self.key, self.value, self.first)
        return self.tensors


class KVBlock:
    """What `KVLayer.update` returns in place of keys (`index` 0) or values (1).

    Our attention function takes the step out of it. A model that does more with its keys or values than hand them on
    (multi-head latent attention, differential attention) touches the block like a tensor, and from then on it is one:
    the layer gives out all its tokens and attention runs on those.
    """

    def __init__(self, step: KVStep, index: int):
        self.step, self.index = step, index

    @property
    def tensor(self) -> Tensor:
        return self.step.expand()[self.index]

    def __getattr__(self, name: str):
        return getattr(self.tensor, name)

    def __getitem__(self, item):
        return self.tensor[item]

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda block: block.tensor, (args, kwargs or {}))
        return function(*args, **kwargs)


@dataclass
class Segment:
    """One stretch of stored tokens sharing a query projection.

    Args:
        query (`Tensor`): `(B, K, G * Q, R)`, already scaled.
        keys (`Tensor`), values (`Tensor`): `(B, K, C, R)` and `(B, K, C, S)`, contiguous, `C` rows allocated.
        length (`int`): rows in use; the rest is slack.
        visible (`Tensor`, *optional*): boolean, broadcastable to `(B, K, G, Q, length)`; `None` means all.
        expand (`Tensor`, *optional*): `(B, K, D, S)` taking the weighted values back to the head dimension.
        shift (`Tensor`, *optional*): `(B, K, G * Q, 1)`, added to the logits.
        offset (`Tensor`, *optional*): `(B, K, 1, D)`, added to every value.
        exclude (`Tensor`, *optional*): `(B, K, M)`, int64, rows that do not take part.
        counts (`Tensor`, *optional*): `(B, 1 or K, length)`, float32, how many tokens each row is the mean of; a row of
            none does not take part.
        scores (`Tensor`, *optional*): `(B, K, G * Q, C)`, the product of `query` and `keys` where it is known already.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    length: int
    visible: Tensor | None = None
    expand: Tensor | None = None
    shift: Tensor | None = None
    offset: Tensor | None = None
    exclude: Tensor | None = None
    counts: Tensor | None = None
    scores: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether the rows are keys and values as they are."""
        others = (self.expand, self.shift, self.offset, self.exclude, self.counts, self.scores)
        return all(other is None for other in others)


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Type matrix products run in: float32 where the processor has no 16-bit products, forty times slower there."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    supported = (
        torch.ops.mkldnn._is_mkldnn_bf16_supported
        if dtype == torch.bfloat16
        else (torch.ops.mkldnn._is_mkldnn_fp16_supported)
    )
    return dtype if supported() else torch.float32


def prefers_flash(query: Tensor) -> bool:
    """Whether the library's flash kernel is the fastest: on CPUs, but where they multiply 16-bit numbers, which it
    converts."""
    return query.device.type != "cpu" or product_dtype(query.dtype, query.device).itemsize > 2


def _reads_bytes(keys: Tensor) -> bool:
    """Whether the product of quantised linear layers takes these rows: it reads bytes as they are, some three times faster
    than converting them, and rounds queries and scores to bfloat16. Its vectors have 16 entries, unchecked."""
    fits = keys.dtype == torch.int8 and keys.device.type == "cpu" and keys.shape[2] % 16 == 0 and keys.shape[1] > 0
    return fits and keys.is_contiguous() and hasattr(torch, "_weight_int8pack_mm")


def score_rows(query: Tensor, keys: Tensor, out: Tensor) -> None:
    """`query @ keys.mT` into `out`, for `query` `(N, Q, R)` and `keys` `(N, C, R)` of any type, without converting
    more than `CONVERTED_ROWS` of them at a time."""
    if keys.dtype == query.dtype:
        torch.bmm(query, keys.mT, out=out)
        return
    if _reads_bytes(keys):
        ones = keys.new_ones(keys.shape[1], dtype=torch.bfloat16)
        for scores, rows, codes in zip(out, query.to(torch.bfloat16).contiguous(), keys):
            scores.copy_(torch._weight_int8pack_mm(rows, codes, ones))
        return
    scratch = query.new_empty(keys.shape[0], min(CONVERTED_ROWS, keys.shape[1]), keys.shape[2])
    for start in range(0, keys.shape[1], CONVERTED_ROWS):
        stop = min(start + CONVERTED_ROWS, keys.shape[1])
        rows = scratch[:, : stop - start].copy_(keys[:, start:stop])
        torch.bmm(query, rows.mT, out=out[..., start:stop])


def weigh_rows(weights: Tensor, values: Tensor) -> Tensor:
    """`weights @ values`, for `weights` `(N, Q, C)` and `values` `(N, C, S)` of any type; see `score_rows`."""
    if values.dtype == weights.dtype:
        return torch.bmm(weights, values)
    total = weights.new_zeros(*weights.shape[:2], values.shape[2])
    scratch = weights.new_empty(values.shape[0], min(CONVERTED_ROWS, values.shape[1]), values.shape[2])
    for start in range(0, values.shape[1], CONVERTED_ROWS):
        stop = min(start + CONVERTED_ROWS, values.shape[1])
        total.baddbmm_(weights[..., start:stop], scratch[:, : stop - start].copy_(values[:, start:stop]))
    return total


def group_rows(query: Tensor, kv_heads: int) -> Tensor:
    """`(B, H, Q, D)` to `(B, K, G * Q, D)`: the query heads that share a key/value head become rows."""
    batch, heads, length, dim = query.shape
    return query.reshape(batch, kv_heads, heads // kv_heads * length, dim)


def ungroup_rows(output: Tensor, heads: int) -> Tensor:
    """`(B, K, G * Q, D)` to the `(B, Q, H, D)` that attention functions return."""
    batch, kv_heads, rows, dim = output.shape
    length = kv_heads * rows // heads
    return output.reshape(batch, heads, length, dim).transpose(1, 2).contiguous()


def segment_attention(segments: list[Segment], groups: int, softcap: float | None = None) -> Tensor:
    """Attention over several stretches of storage under one softmax.

    Scores of all segments go into one matrix. Slack rows are computed and masked rather than cut off: a cut makes the
    batch stride irregular, and 16-bit products are then some forty times slower.

    Args:
        segments (`list[Segment]`): at least one.
        groups (`int`): query heads per key/value head (G).
        softcap (`float`, *optional*): logits become `softcap * tanh(logits / softcap)`.

    Returns:
        `Tensor`: `(B, K, G * Q, D)`, in the type of the queries.
    """
    batch, kv_heads, rows, _ = segments[0].query.shape
    if softcap is None and all(part.plain for part in segments) and prefers_flash(segments[0].query):
        return _flash(segments, groups)
    dtype = product_dtype(segments[0].query.dtype, segments[0].query.device)
    bounds = [0]
    for part in segments:
        bounds.append(bounds[-1] + part.keys.shape[2])
    logits = segments[0].query.new_empty(batch * kv_heads, rows, bounds[-1], dtype=dtype)
    # Not -inf: a padded query sees nothing at all, and what it outputs must stay finite.
    lowest = torch.finfo(logits.dtype).min
    grid = logits.view(batch, kv_heads, groups, rows // groups, bounds[-1])
    for part, start, end in zip(segments, bounds, bounds[1:]):
        area = logits[..., start:end]
        if part.scores is None:
            score_rows(part.query.flatten(0, 1).to(dtype), part.keys.flatten(0, 1), area)
        else:
            area.copy_(part.scores.flatten(0, 1))
        if part.shift is not None:
            area += part.shift.flatten(0, 1)
        if softcap is not None:
            area.div_(softcap).tanh_().mul_(softcap)
        area[..., part.length :] = lowest
        if part.counts is not None:
            tokens = part.counts.log().to(dtype).clamp_min(lowest).expand(-1, kv_heads, -1)
            area[..., : part.length] += tokens.flatten(0, 1)[:, None]
        if part.visible is not None:
            grid[..., start : start + part.length].masked_fill_(~part.visible, lowest)
        if part.exclude is not None:
            index = part.exclude.flatten(0, 1)[:, None].expand(-1, rows, -1)
            area.scatter_(2, index, lowest)
    # Not exp() in place: where results leave the range of normal numbers, as far-off scores do, it is ten times slower.
    weights = torch.softmax(logits, dim=-1)
    output = torch.zeros((), dtype=logits.dtype, device=logits.device)
    for part, start, end in zip(segments, bounds, bounds[1:]):
        share = weigh_rows(weights[..., start:end], part.values.flatten(0, 1))
        if part.expand is not None:
            share = torch.bmm(share, part.expand.flatten(0, 1).mT.to(dtype))
        if part.offset is not None:
            share += weights[..., start:end].sum(-1, keepdim=True) * part.offset.flatten(0, 1)
        output = share if output.dim() == 0 else output.add_(share)
    return output.view(batch, kv_heads, rows, -1).to(segments[0].query.dtype)


def _flash(segments: list[Segment], groups: int) -> Tensor:
    """`segment_attention` of few rows, as they are, by the library's kernel; copying them together costs less."""
    query = segments[0].query
    key = torch.cat([part.keys[:, :, : part.length] for part in segments], dim=2)
    value = torch.cat([part.values[:, :, : part.length] for part in segments], dim=2)
    mask = None
    if any(part.visible is not None for part in segments):
        whole = (query.shape[0], query.shape[1], groups, query.shape[2] // groups)
        shown = [
            torch.ones((), dtype=torch.bool, device=query.device) if part.visible is None else part.visible
            for part in segments
        ]
        mask = torch.cat([see.expand(*whole, part.length) for see, part in zip(shown, segments)], dim=-1).flatten(2, 3)
    return scaled_dot_product_attention(query, key, value, mask, scale=1.0)


def dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    softcap: float | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Attention over plain tensors: the library's SDPA, or an explicit softmax where logits are soft-capped.

    Args:
        query (`Tensor`): `(B, H, Q, D)`.
        key (`Tensor`), value (`Tensor`): `(B, K, N, D)`.
        attention_mask (`Tensor`, *optional*): boolean or additive, broadcastable to `(B, H, Q, N)`.

    Returns:
        `tuple`: output `(B, Q, H, D)` and `None`.
    """
    if softcap is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scaling = kwargs.get("scaling")
    kv_heads, length, stored = key.shape[1], query.shape[2], key.shape[2]
    rows = group_rows(query, kv_heads)
    logits = torch.matmul(rows, key.mT) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    logits = softcap * torch.tanh(logits / softcap)
    grid = logits.view(query.shape[0], kv_heads, -1, length, stored)
    if attention_mask is None and length > 1:
        attention_mask = torch.ones(length, stored, dtype=torch.bool, device=query.device).tril(stored - length)
        attention_mask = attention_mask[None, None]
    if attention_mask is not None:
        mask = attention_mask[:, :, None]
        if mask.dtype == torch.bool:
            grid = grid.masked_fill(~mask, torch.finfo(grid.dtype).min)
        else:
            grid = grid + mask
    weights = torch.softmax(grid, dim=-1, dtype=torch.float32).to(query.dtype).view_as(logits)
    return ungroup_rows(torch.matmul(weights, value), query.shape[1]), None


def kv_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor | KVBlock,
    value: Tensor | KVBlock,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Attention function registered as `ATTENTION_NAME`; arguments and result as transformers' attention functions.

    A `KVBlock` is attended to where it is stored; tensors (sliding layers, other caches, training) take the usual path.
    """
    options = {"scaling": scaling, "dropout": dropout, "softcap": softcap, **kwargs}
    step = next((states.step for states in (key, value) if isinstance(states, KVBlock)), None)
    if step is None or step.tensors is not None or not (isinstance(key, KVBlock) and isinstance(value, KVBlock)):
        key, value = (states.tensor if isinstance(states, KVBlock) else states for states in (key, value))
        return dense_attention(module, query, key, value, attention_mask, **options)
    layer = step.layer
    scaling = scaling if scaling is not None else query.shape[-1] ** -0.5
    context = {"query": query, "mask": attention_mask, "scaling": scaling, "position_ids": kwargs.get("position_ids")}
    if step.first:
        if layer.stores_before_prompt:
            layer.absorb_prompt(step.key, step.value, context)
            return dense_attention(module, query, *layer.materialize(), attention_mask, **options)
        output = dense_attention(module, query, step.key, step.value, attention_mask, **options)
        layer.absorb_prompt(step.key, step.value, context)
        return output
    layer.observe(context)
    if layer.can_attend(query):
        output = layer.attend(query, attention_mask, scaling, softcap), None
    else:
        output = dense_attention(module, query, *layer.materialize(), attention_mask, **options)
    layer.settle(context)
    return output


# Models with our hooks: the handles, so that `detach_all` can take them off again.
_hooked: weakref.WeakKeyDictionary[nn.Module, list[RemovableHandle]] = weakref.WeakKeyDictionary()


@dataclass
class _Switch:
    """A config that names our function while the forward calls in `running` last, and what it named before."""

    config: PreTrainedConfig
    original: str
    running: set[tuple[int, int]] = field(default_factory=set)  # thread, module


_switches: dict[int, _Switch] = {}
_lock = threading.Lock()


def _our_cache(args: tuple, kwargs: dict):
    from hf_ext.cache_impls.base import KVCache

    candidates = (kwargs.get("past_key_values"), *args)
    return next((item for item in candidates if isinstance(item, KVCache)), None)


def _switchable(config) -> bool:
    """Whether our function can stand in for the one the config names: SDPA, or eager where only soft-capping asks it."""
    implementation = config._attn_implementation
    softcapped = getattr(config, "attn_logit_softcapping", None) is not None
    return implementation == "sdpa" or (implementation == "eager" and softcapped)


def _before_forward(module: PreTrainedModel, args: tuple, kwargs: dict) -> None:
    cache = _our_cache(args, kwargs)
    if cache is None:
        return
    ids = kwargs.get("input_ids", args[0] if args and isinstance(args[0], torch.Tensor) else None)
    tokens = ids if ids is not None else kwargs.get("inputs_embeds")
    if tokens is not None:
        cache.check_ready(tokens.shape[0])
        cache.observe_tokens(ids, *tokens.shape[:2], kwargs.get("attention_mask"))
    # A deep copy of a model keeps hooks that `detach_all` cannot see.
    if ATTENTION_NAME not in AttentionInterface._global_mapping:
        return
    config = module.config.get_text_config(decoder=True)
    with _lock:
        switch = _switches.get(id(config))
        if switch is None:
            if not _switchable(config):
                warn_once(
                    _logger,
                    f"{type(cache).__name__}: attention of {config.model_type} runs as {config._attn_implementation!r}, "
                    "outside the cache; results stay right, but every step rebuilds the stored tokens and padding is not "
                    'seen. model.set_attn_implementation("sdpa") is faster.',
                )
                return
            switch = _switches[id(config)] = _Switch(config, config._attn_implementation)
        config._attn_implementation_internal = ATTENTION_NAME
        # A forward call of the same module in the same thread that never ended was interrupted: this one replaces it.
        switch.running.add((threading.get_ident(), id(module)))


def _after_forward(module: PreTrainedModel, args: tuple, kwargs: dict, output) -> None:
    if _our_cache(args, kwargs) is None:
        return
    config = module.config.get_text_config(decoder=True)
    with _lock:
        switch = _switches.get(id(config))
        if switch is not None:
            switch.running.discard((threading.get_ident(), id(module)))
            if not switch.running:
                config._attn_implementation_internal = switch.original
                del _switches[id(config)]


def register_attention() -> None:
    """Makes `ATTENTION_NAME` a valid attention implementation. Repeating it changes nothing."""
    AttentionInterface.register(ATTENTION_NAME, kv_attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def is_attached(model: PreTrainedModel) -> bool:
    return model in _hooked


def attach(model: PreTrainedModel) -> bool:
    """Lets `model` attend inside our caches whenever one of them is passed to its forward.

    The attention implementation is switched for the span of a forward call with one of our caches and put back after
    it, also when the call raises; after a keyboard interrupt, by the next call or by `detach_all`. At all other times the
    model is as it was.

    Returns:
        `bool`: whether the model routes attention through transformers' interface. If not (Falcon), the caches hand
        ordinary tensors to it and stay correct.
    """
    if not model._can_set_attn_implementation():
        return False
    register_attention()
    # A PEFT wrapper generates with the model inside it, and forwards through itself.
    unwrap = getattr(model, "get_base_model", None)
    for module in {model, unwrap() if callable(unwrap) else model}:
        if module not in _hooked:
            _hooked[module] = [
                module.register_forward_pre_hook(_before_forward, with_kwargs=True),
                module.register_forward_hook(_after_forward, with_kwargs=True, always_call=True),
            ]
    return True


def detach_all() -> None:
    """Takes every hook off again and removes `ATTENTION_NAME` from transformers' tables."""
    for handles in _hooked.values():
        for handle in handles:
            handle.remove()
    _hooked.clear()
    with _lock:
        for switch in _switches.values():
            switch.config._attn_implementation_internal = switch.original
        _switches.clear()
    AttentionInterface._global_mapping.pop(ATTENTION_NAME, None)
    AttentionMaskInterface._global_mapping.pop(ATTENTION_NAME, None)
