"""What the suite's caches share: storage that grows by pages, the layer contract, byte accounting, model checks.

A cache is one `KVLayer` per full-attention layer of the model; sliding, chunked and linear layers keep the library's
own classes. A layer hands a `KVBlock` to our attention function when the model runs it, and plain tensors, in the order
of the text, to any other.

Shapes: B batch, K key/value heads, N tokens, D head dim.
Plugs in: `generate(past_key_values=...)`, or by name after `hf_ext.register()`.
"""

from __future__ import annotations

import copy
import weakref
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    get_layer_types_and_kwargs,
)

from hf_ext.cache_impls.attention import ATTENTION_NAME, MAX_IN_SPACE_ROWS, KVBlock, KVStep, attach, is_attached
from hf_ext.config import MethodConfig
from hf_ext.errors import CacheStateError, ConfigError, UnsupportedModelError


PAGE = 16  # rows; storage grows to the next multiple
GROWTH = 48  # a full buffer grows by one part in this many: about 2 % slack, and copying stays near linear

# Architectures that add a bias per distance to the scores instead of rotating the keys.
ALIBI_MODELS = ("bloom", "mpt")


class RowBuffer:
    """Rows `(B, K, length, D)` at the front of zeroed storage `(B, K, capacity, D)`.

    `rows` is a view. `data` is the whole storage: kernels want it contiguous and mask what lies behind `length`.
    """

    def __init__(self, rows: Tensor):
        self.length = 0
        self.data = rows.new_zeros(*rows.shape[:2], 0, rows.shape[3])
        self.append(rows)

    @property
    def rows(self) -> Tensor:
        return self.data[:, :, : self.length]

    @property
    def row_bytes(self) -> int:
        """Bytes one token takes, over batch and heads."""
        batch, heads, _, dim = self.data.shape
        return batch * heads * dim * self.data.element_size()

    def append(self, rows: Tensor) -> None:
        start, self.length = self.length, self.length + rows.shape[2]
        if self.length > self.data.shape[2]:
            self._resize(start)
        self.data[:, :, start : self.length] = rows

    def remove(self, start: int, count: int) -> None:
        """Drops `count` rows from `start` on; later rows move up."""
        self.data[:, :, start : self.length - count] = self.data[:, :, start + count : self.length].clone()
        self.length -= count
        if self.data.shape[2] > padded_rows(self.length) + PAGE:
            self._resize(self.length)

    def reorder(self, index: Tensor) -> None:
        """Keeps the batch rows `index` names, in its order."""
        self.data = self.data.index_select(0, index.to(self.data.device))

    def _resize(self, keep: int) -> None:
        old = self.data
        self.data = old.new_zeros(*old.shape[:2], padded_rows(self.length), old.shape[3])
        self.data[:, :, :keep] = old[:, :, :keep]


def padded_rows(length: int) -> int:
    """Rows a `RowBuffer` allocates for `length` tokens."""
    return -(-(length + length // GROWTH) // PAGE) * PAGE


def storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@dataclass
class LowRankSegment:
    """Coordinates written in one version of the bases.

    `key_basis` `(B, K, D, R)` and `value_basis` `(B, K, D, S)` in the cache's dtype; `key` and `value` hold `(B, K, N, R)`
    and `(B, K, N, S)`; `hidden` `(B, N)` marks padding among the first rows, if there is any.
    """

    key_basis: Tensor
    value_basis: Tensor
    key: RowBuffer
    value: RowBuffer
    hidden: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.key_basis, self.value_basis, self.hidden) if t is not None]

    def reorder(self, index: Tensor) -> None:
        self.key_basis, self.value_basis = self.key_basis[index], self.value_basis[index]
        self.hidden = None if self.hidden is None else self.hidden[index]


class KVLayer(CacheLayerMixin):
    """One full-attention layer of a cache of this suite.

    Subclasses keep the tokens (`absorb_prompt`, `append`), attend to them (`attend`), give them back as tensors
    (`materialize`) and may tidy up after a step (`settle`).

    Args:
        model_config (`PreTrainedConfig`): of the text decoder; its attention implementation decides what `update` returns.
        layer_idx (`int`): the layer's place in the model.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    # Whether `attend` can serve short blocks; otherwise they go through `materialize`.
    attends_in_space = True
    # Whether the prompt itself attends to the stored form, not to the keys and values it brings.
    stores_before_prompt = False
    # Attributes that hold a tensor whose first axis is the batch, or `None`.
    batch_state: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model_config: PreTrainedConfig, layer_idx: int):
        super().__init__()
        self.model_config = model_config
        self.layer_idx = layer_idx
        self.seen = 0
        self.record_past = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.batch_size, self.dtype, self.device = key_states.shape[0], key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Any, Any]:
        """Takes the new tokens `(B, K, Q, D)` in.

        Returns:
            `tuple`: twice a `KVBlock` where the model runs our attention function, otherwise keys and values of every
            token seen, `(B, K, N, D)`.

        Raises:
            `CacheStateError`: the batch differs from the one the cache was filled with.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif key_states.shape[0] != self.batch_size:
            raise CacheStateError(_batch_message(self.batch_size, key_states.shape[0]))
        first = self.seen == 0
        self.seen += key_states.shape[2]
        if not first:
            self.append(key_states, value_states)
        step = KVStep(self, key_states, value_states, first)
        if self.model_config._attn_implementation == ATTENTION_NAME:
            return KVBlock(step, 0), KVBlock(step, 1)
        return step.expand()

    def tensor_states(self, key: Tensor, value: Tensor, first: bool) -> tuple[Tensor, Tensor]:
        """Keys and values of every token seen, `(B, K, N, D)`, for attention that runs elsewhere."""
        if first:
            self.absorb_prompt(key, value, None)
            return self.materialize() if self.stores_before_prompt else (key, value)
        states = self.materialize()
        self.settle(None)
        return states

    def observe(self, context: dict[str, Any]) -> None:
        """Runs before the attention of every later block, for layers that must know what the mask hides."""

    @abstractmethod
    def absorb_prompt(self, key: Tensor, value: Tensor, context: dict[str, Any] | None) -> None:
        """Stores the first tokens, `(B, K, N, D)`.

        `context` holds `query` `(B, H, N, D)`, `mask`, `scaling` and `position_ids` of the attention call, or is `None`
        where another attention function runs.
        """

    @abstractmethod
    def append(self, key: Tensor, value: Tensor) -> None:
        """Stores later tokens, `(B, K, Q, D)`, as they come."""

    @abstractmethod
    def attend(self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> Tensor:
        """Attention of the newest tokens, `(B, H, Q, D)`, over everything stored; returns `(B, Q, H, D)`."""

    def can_attend(self, query: Tensor) -> bool:
        """Whether `attend` serves this block; otherwise it attends to rebuilt tensors."""
        return query.shape[2] <= MAX_IN_SPACE_ROWS and self.attends_in_space and not query.requires_grad

    @abstractmethod
    def materialize(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all tokens seen, `(B, K, N, D)`, in the order of the text."""

    def settle(self, context: dict[str, Any] | None) -> None:
        """Runs after the attention of every later block; nothing to do unless a subclass compresses."""

    @abstractmethod
    def buffers(self) -> list[RowBuffer]:
        """Every `RowBuffer` of the layer, for beam search and batch selection."""

    def tensors(self) -> list[Tensor]:
        """Everything the layer keeps alive."""
        return [buffer.data for buffer in self.buffers()]

    @abstractmethod
    def tier_bytes(self) -> dict[str, int]:
        """Bytes by tier; they add up to the storages behind `tensors()`."""

    def check_crop(self, count: int) -> None:
        """Raises `CacheStateError` unless the newest `count` tokens can be taken back."""
        if count > self.seen:
            raise CacheStateError(f"cannot crop {count} tokens: the cache has seen {self.seen}.")

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the newest `-tokens_to_remove` tokens; the argument is zero or negative, as in transformers.

        Raises:
            `CacheStateError`: a positive argument, or more tokens than the layer can take back.
        """
        if tokens_to_remove > 0:
            raise CacheStateError(
                f"crop({tokens_to_remove}): pass the number of tokens to remove as a negative integer."
            )
        if not self.is_initialized:
            return
        self.check_crop(-tokens_to_remove)
        if tokens_to_remove:
            self.seen += tokens_to_remove
            self._drop_newest(-tokens_to_remove)
        self.after_crop()

    def after_crop(self) -> None:
        """Runs after every `crop`, the point past which recorded tokens are final."""

    @abstractmethod
    def _drop_newest(self, count: int) -> None:
        """Removes the newest `count` tokens from storage; `seen` is already lowered."""

    def activate_past_recording(self) -> None:
        """Assisted decoding will call `crop` after each forward."""
        self.record_past = True

    def get_seq_length(self) -> int:
        """Tokens seen, whatever form they are stored in: positions and masks count from it."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Forgets everything; the layer can be filled again, with any batch size."""
        if self.is_initialized:
            del self.batch_size
        self.seen, self.is_initialized = 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row `i` becomes a copy of row `beam_idx[i]`."""
        if self.seen:
            self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.seen:
            self._select(torch.arange(self.batch_size, device=self.device)[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.seen:
            self._select(torch.arange(self.batch_size, device=self.device).repeat_interleave(repeats))

    def _select(self, index: Tensor) -> None:
        self.batch_size = index.shape[0]
        for buffer in self.buffers():
            buffer.reorder(index)
        for name in self.batch_state:
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor[index])

    def held_state(self) -> list[Tensor]:
        """The tensors of `batch_state` that are there."""
        return [tensor for tensor in (getattr(self, name, None) for name in self.batch_state) if tensor is not None]

    def offload(self) -> None:
        raise CacheStateError(
            "caches of hf_ext do not move whole layers between devices; use them without offloading."
        )


class KVCache(Cache):
    """A `Cache` whose full-attention layers are `KVLayer`s.

    Args:
        model (`PreTrainedModel` or `PreTrainedConfig`):
            The model the cache is for, or its config. Given the model, or in `generate` after `hf_ext.register()`,
            attention runs inside the cache; otherwise the cache hands ordinary tensors to the model's own attention,
            which is slower.

    Raises:
        `UnsupportedModelError`: an encoder-decoder model, or one whose layers share keys and values.
    """

    def __init__(self, model: PreTrainedModel | PreTrainedConfig):
        config = model.config if isinstance(model, nn.Module) else model
        if not isinstance(config, PreTrainedConfig):
            raise UnsupportedModelError(
                f"{type(self).__name__} takes a transformers model or its config first, got {type(model).__name__}."
            )
        decoder = config.get_text_config(decoder=True)
        self.check_model(config, decoder)
        layer_types, layer_kwargs = get_layer_types_and_kwargs(decoder)
        if not any(issubclass(DYNAMIC_LAYER_TYPE_MAPPING[kind], CacheLayerMixin) for kind in layer_types):
            raise UnsupportedModelError(
                f"{type(self).__name__} holds keys and values; {decoder.model_type} has no attention layer. "
                "Generate without cache_implementation."
            )
        self.prepare(decoder, layer_types.count("full_attention"))
        layers: list[Any] = []
        for index, (kind, kwargs) in enumerate(zip(layer_types, layer_kwargs)):
            if kind == "full_attention":
                layers.append(self.make_layer(decoder, index, layer_types[:index].count(kind)))
            else:
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**kwargs))
        super().__init__(layers=layers)
        self._model: weakref.ref[PreTrainedModel] | None = None
        if isinstance(model, nn.Module):
            self.attach(model)

    def prepare(self, decoder: PreTrainedConfig, layers: int) -> None:
        """Runs before the layers are made; `layers` counts the full-attention ones."""

    @abstractmethod
    def make_layer(self, model_config: PreTrainedConfig, layer_idx: int, order: int) -> KVLayer:
        """A layer for place `layer_idx` of the model; it is the `order`-th full-attention layer."""

    def check_model(self, config: PreTrainedConfig, decoder: PreTrainedConfig) -> None:
        if config.is_encoder_decoder:
            raise UnsupportedModelError(
                f"{type(self).__name__} serves decoder-only models; {config.model_type} is an encoder-decoder model."
            )
        if "reuse" in (getattr(decoder, "kv_sharing_modes", None) or ()):
            raise UnsupportedModelError(
                f"{type(self).__name__}: layers of {config.model_type} share keys and values, which is not supported."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> KVCache:
        # The layers read the model's own config, at every step; a copy of it would never change again.
        for layer in self.kv_layers:
            memo[id(layer.model_config)] = layer.model_config
        memo[id(self)] = duplicate = type(self).__new__(type(self))
        duplicate.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return duplicate

    @property
    def kv_layers(self) -> list[KVLayer]:
        return [layer for layer in self.layers if isinstance(layer, KVLayer)]

    def attach(self, model: PreTrainedModel) -> bool:
        """Lets `model` attend inside this cache; see `attention.attach`."""
        self._model = weakref.ref(model)
        return attach(model)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Any, Any]:
        """See `KVLayer.update`. Where `hf_ext.unregister()` took the model's hooks off, they are put back for later steps."""
        model = None if layer_idx or self._model is None else self._model()
        if model is not None and not is_attached(model):
            attach(model)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def observe_tokens(self, ids: Tensor | None, batch: int, count: int, mask: Tensor | None) -> None:
        """Runs before each forward call of an attached model, of `batch` rows and `count` new tokens; for caches that read
        the text.

        Args:
            ids (`Tensor`, *optional*): `(B, Q)`, the new tokens; `None` where the model was given embeddings.
            mask (`Tensor`, *optional*): the padding mask the call was given, `(B, N)`.
        """

    def expect_prompt(self, length: int) -> None:
        """Says that a prompt of `length` tokens will come in chunks; nothing to do unless a cache plans by its length."""

    def check_ready(self, batch_size: int) -> None:
        """Raises `CacheStateError` if the cache holds another batch size, or a forward call that failed half way."""
        if len({layer.seen for layer in self.kv_layers}) > 1:
            raise CacheStateError("an earlier forward call failed half way through this cache; call reset() on it.")
        filled = self.batch_size
        if filled not in (-1, batch_size):
            raise CacheStateError(_batch_message(filled, batch_size))

    def crop(self, tokens_to_remove: int) -> None:
        """See `KVLayer.crop`; no layer is touched unless every layer can take the tokens back."""
        for layer in self.kv_layers:
            if layer.is_initialized:
                layer.check_crop(-tokens_to_remove)
        super().crop(tokens_to_remove)

    def tier_bytes(self) -> dict[str, int]:
        """Bytes by tier over all layers; library layers (sliding windows) count as `"other"`."""
        tiers: dict[str, int] = {}
        for layer in self.layers:
            parts = (
                layer.tier_bytes() if isinstance(layer, KVLayer) else {"other": storage_bytes(_library_tensors(layer))}
            )
            for name, count in parts.items():
                tiers[name] = tiers.get(name, 0) + count
        return {name: count for name, count in tiers.items() if count}

    def shared_tensors(self) -> list[Tensor]:
        """What the cache itself keeps alive, beside its layers."""
        return []

    def nbytes(self) -> int:
        """Bytes of every tensor storage the cache keeps alive, slack included."""
        tensors = self.shared_tensors()
        for layer in self.layers:
            tensors += layer.tensors() if isinstance(layer, KVLayer) else _library_tensors(layer)
        return storage_bytes(tensors)


class ConfiguredCache(KVCache):
    """A `KVCache` with settings, which scores keys by themselves and so refuses models with ALiBi positions.

    Args:
        model (`PreTrainedModel` or `PreTrainedConfig`): see `KVCache`.
        config (`MethodConfig` or `dict`, *optional*): settings of `config_class`; the defaults otherwise.
    """

    config_class: ClassVar[type[MethodConfig]]
    config: Any

    def __init__(self, model: PreTrainedModel | PreTrainedConfig, config: MethodConfig | dict[str, Any] | None = None):
        self.config = self.read_config(config)
        super().__init__(model)

    @classmethod
    def from_generate(cls, model: PreTrainedModel, cache_config: dict[str, Any] | None) -> Any:
        """Builds the cache for `generate(cache_implementation=..., cache_config=...)`; unknown keys are an error."""
        return cls(model, cache_config)

    @classmethod
    def read_config(cls, config: Any) -> Any:
        """Settings as a config, from one, from a dict of its fields, or from nothing."""
        if config is None or isinstance(config, dict):
            return cls.config_class.from_dict(config or {}, strict=True)
        if not isinstance(config, cls.config_class):
            name = cls.config_class.__name__
            article = "an" if name[0] in "AEIOU" else "a"
            raise ConfigError(
                f"{cls.__name__} takes its settings as {article} {name} or a dict of its fields, not {config!r}."
            )
        return config

    def check_model(self, config: PreTrainedConfig, decoder: PreTrainedConfig) -> None:
        super().check_model(config, decoder)
        if decoder.model_type in ALIBI_MODELS or getattr(decoder, "alibi", False):
            raise UnsupportedModelError(
                f"{type(self).__name__} does not serve {decoder.model_type}: its ALiBi biases are added to the scores of "
                "every token; use cache_implementation='packed'."
            )


def _library_tensors(layer: Any) -> list[Tensor]:
    return [value for value in vars(layer).values() if isinstance(value, Tensor)]


def _batch_message(filled: int, asked: int) -> str:
    return (
        f"the cache holds a batch of {filled} and was given {asked}; "
        "make a new cache for each batch, or call reset() on this one."
    )
