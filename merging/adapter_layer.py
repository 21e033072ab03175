"""The layers of an OSD adapter: a base module with the deltas of its weight and bias beside it.

Matrices stay factors and sparse rows; only norms, biases and modules of unknown kind get a dense delta. A layer knows
three states of an adapter: absent, put in but not loaded (running it raises), and loaded, possibly with no delta here.

Shapes: a delta is `(n, d)` as the weight is stored; `osd_A` `(k, in)` and `osd_B` `(out, k)`, for embeddings `(k, d)` and
`(n, k)`; sparse rows are those of the `(out, in)` matrix, for embeddings of `(n, d)`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from transformers.pytorch_utils import Conv1D

from hf_ext.errors import AdapterStateError, UnsupportedModelError
from hf_ext.merging.blob import Delta


# Sparse rows take 8 bytes an entry and a slower product; from here on the dense delta is used.
DENSEST = 1 / 8
BASE = "__base__"


@dataclass(frozen=True)
class Piece:
    """The delta of one tensor: its name in the base, its place in the blob, and its relative error if that is known."""

    name: str
    position: int
    delta: Delta
    error: float | None = None


class OSDLayer(nn.Module, BaseTunerLayer):
    """A module and, for each adapter, what is added to its weight and bias.

    Args:
        base_layer (`nn.Module`): stays as it is unless the adapter is merged.
        adapter_name (`str`): put in, not loaded.
    """

    adapter_layer_names = ("osd_A", "osd_B")
    other_param_names = ("osd_starts", "osd_columns", "osd_values", "osd_dense", "osd_bias", "osd_pieces")

    base_layer: Any
    osd_A: Any
    osd_B: Any
    osd_starts: Any
    osd_columns: Any
    osd_values: Any
    osd_dense: Any
    osd_bias: Any

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.osd_A, self.osd_B = nn.ParameterDict(), nn.ParameterDict()
        for name in self.other_param_names[:-1]:
            setattr(self, name, BufferDict(persistent=False))
        # By adapter, by "weight" or "bias"; an adapter that is not here was never loaded.
        self.osd_pieces: dict[str, dict[str, Piece]] = {}
        self.merged_adapters: list[str] = []
        # Rows of a mixed batch, set for the length of one call of the model.
        self.row_adapters: list[str] | None = None
        # What the base was before merging: a subtraction does not give the bits back, in float32 neither.
        self._before: dict[str, Tensor] = {}
        # The layer whose weight this one shares, in a tuple so that it is not a submodule.
        self._source: tuple[OSDLayer, ...] = ()
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name)

    def update_layer(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Put an adapter in that has no delta yet; running it raises until `load` was called."""
        weight = _any_weight(self.base_layer)
        for side in (self.osd_A, self.osd_B):
            side[adapter_name] = nn.Parameter(weight.new_zeros((0, 0), dtype=torch.float32), requires_grad=False)
        self.osd_pieces.pop(adapter_name, None)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def load(self, adapter_name: str, pieces: dict[str, Piece]) -> None:
        """Decode the deltas of an adapter; none at all is a valid state.

        Args:
            adapter_name (`str`): put in before.
            pieces (`dict[str, Piece]`): by `"weight"` and `"bias"`; shapes are those of the base.
        """
        for attribute in self.other_param_names:
            if adapter_name in getattr(self, attribute):
                del getattr(self, attribute)[adapter_name]
        for side in (self.osd_A, self.osd_B):
            side[adapter_name] = self._parameter(np.zeros((0, 0), dtype=np.float32))
        if "bias" in pieces:
            self.osd_bias[adapter_name] = self._tensor(pieces["bias"].delta.dense())
        if "weight" in pieces:
            self._load_weight(adapter_name, pieces["weight"].delta)
        self.osd_pieces[adapter_name] = dict(pieces)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The delta of the weight as one tensor: float32, shape and layout of the weight."""
        return self.get_delta(adapter, "weight")

    def get_delta(self, adapter: str, attribute: str) -> Tensor:
        """The delta of `"weight"` or `"bias"`, float32, decoded anew; zeros where the adapter has none."""
        self._check_loaded(adapter)
        piece = self.osd_pieces[adapter].get(attribute)
        base = getattr(self._base, attribute)
        if piece is None:
            return torch.zeros(base.shape, device=base.device)
        return torch.from_numpy(piece.delta.dense()).to(base.device)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add deltas to the base: summed in float32, rounded once. A weight shared with another layer changes once.

        Until they are unmerged or unloaded, the layer keeps a copy of what it changed.

        Args:
            safe_merge (`bool`): refuse a result that is not finite, before anything changed.
            adapter_names (`list[str]`, *optional*): the active ones if not given.

        Raises:
            `AdapterStateError`: an adapter is not loaded. `ValueError`: `safe_merge` found values that are not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.osd_A]
        for name in names:
            self._check_loaded(name)
        if not names:
            return
        attributes = ["weight", "bias"]
        if self._shares_weight():
            attributes = ["bias"]
            missing = [name for name in names if name not in self._source[0].merged_adapters]
            if missing:
                self._source[0].merge(safe_merge, missing)
        merged = {}
        for attribute in attributes:
            changed = [name for name in names if attribute in self.osd_pieces[name]]
            if not changed:
                continue
            base = getattr(self._base, attribute)
            wide = base.to(torch.promote_types(base.dtype, torch.float32), copy=True)
            for name in changed:
                wide += self.get_delta(name, attribute)
            merged[attribute] = wide.to(base.dtype)
            if safe_merge and not torch.isfinite(merged[attribute]).all():
                raise ValueError(
                    f"adding {', '.join(changed)} to a {attribute} in {base.dtype} gives values that are not finite; "
                    "load the base in a wider type."
                )
        for attribute, result in merged.items():
            base = getattr(self._base, attribute)
            if attribute not in self._before:
                self._before[attribute] = base.detach().clone()
            base.data.copy_(result)
        self.merged_adapters = [*self.merged_adapters, *names]

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the base the very bits it had before merging."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for attribute, before in self._before.items():
            getattr(self._base, attribute).data.copy_(before)
        self._before = {}
        self.merged_adapters = []

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether a LoRA can say all of it: a matrix of a linear layer, and no bias."""
        return False

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters. Their parameters stay frozen: what is saved is the delta as it was decoded."""
        super().set_adapter(adapter_names, inference_mode=True)

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """Parameters of an OSD adapter stay frozen."""
        super().set_requires_grad(adapter_names, requires_grad=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        if self.row_adapters is not None:
            return self._mixed(self.row_adapters, *args, **kwargs)
        if self.merged:
            return self.base_layer(*args, **kwargs)
        return self._run(self._present(self.active_adapters), *args, **kwargs)

    def _run(self, adapters: list[str], *args: Any, **kwargs: Any) -> Any:
        """The output with these adapters, all of them loaded."""
        raise NotImplementedError

    def _load_weight(self, adapter_name: str, delta: Delta) -> None:
        raise NotImplementedError

    def _mixed(self, names: list[str], *args: Any, **kwargs: Any) -> Any:
        """Each row with its own adapter: the layer runs once for every adapter, on its rows."""
        if self.merged:
            raise AdapterStateError(
                f"adapter_names was given while {', '.join(self.merged_adapters)} is merged; call unmerge_adapter() first."
            )
        whole: Any = None
        rows: dict[str, list[int]] = {}
        parts = []
        for index, name in enumerate(names):
            rows.setdefault(name, []).append(index)
        for name, wanted in rows.items():
            given = [_take(item, wanted, len(names)) for item in args]
            named = {key: _take(item, wanted, len(names)) for key, item in kwargs.items()}
            parts.append(self._run([] if name == BASE else self._present([name]), *given, **named))
        for wanted, part in zip(rows.values(), parts):
            whole = _put(whole, part, wanted, len(names))
        return whole

    def _present(self, names: list[str]) -> list[str]:
        found = [name for name in names if name in self.osd_A]
        for name in found:
            self._check_loaded(name)
        return found

    def _check_loaded(self, adapter: str) -> None:
        if adapter not in self.osd_pieces:
            raise AdapterStateError(
                f"the OSD adapter {adapter!r} was put into the model, but its delta was never loaded (get_peft_model and "
                "transformers' own load_adapter and from_pretrained cannot decode it); load it with "
                "PeftModel.from_pretrained(model, repo) or hf_ext.load_adapter(model, repo)."
            )

    @property
    def _base(self) -> Any:
        return self.get_base_layer()

    def _shares_weight(self) -> bool:
        if not self._source:
            return False
        own, other = self._base.weight, self._source[0]._base.weight
        return own is other or (not own.is_meta and own.data_ptr() == other.data_ptr())

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(_any_weight(self.base_layer).device)

    def _parameter(self, values: np.ndarray) -> nn.Parameter:
        return nn.Parameter(self._tensor(values), requires_grad=False)

    def _load_factors(self, adapter_name: str, a: np.ndarray, b: np.ndarray) -> None:
        self.osd_A[adapter_name], self.osd_B[adapter_name] = self._parameter(a), self._parameter(b)

    def _load_sparse(self, adapter_name: str, places: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> None:
        """Keep entries of a matrix of this shape, as rows or dense by how many they are."""
        if not len(places):
            return
        n, d = shape
        # Sparse products are missing on some devices.
        on_device = _any_weight(self.base_layer).device.type in ("cpu", "cuda")
        if len(places) > DENSEST * n * d or not on_device:
            dense = np.zeros(n * d, dtype=np.float32)
            np.add.at(dense, places, values)
            self.osd_dense[adapter_name] = self._tensor(dense.reshape(n, d)).to(self._base.weight.dtype)
            return
        if bool((places[1:] > places[:-1]).all()):
            unique, summed = places, values  # of one term
        else:
            unique, inverse = np.unique(places, return_inverse=True)
            summed = np.bincount(inverse, weights=values, minlength=len(unique)).astype(np.float32)
        starts = np.searchsorted(unique, np.arange(n + 1, dtype=np.int64) * d)
        self.osd_starts[adapter_name] = self._tensor(starts.astype(np.int64))
        self.osd_columns[adapter_name] = self._tensor((unique % d).astype(np.int64))
        self.osd_values[adapter_name] = self._tensor(summed)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the device of the base. Its type is not taken over: deltas stay in the type they were decoded to."""
        target = _any_weight(self.base_layer).device if device is None else device
        for name in self.adapter_layer_names + self.other_param_names[:-1]:
            held = getattr(self, name)
            if adapter_name in held and not held[adapter_name].is_meta:
                moved = held[adapter_name].to(target)
                held[adapter_name] = nn.Parameter(moved, False) if name in self.adapter_layer_names else moved

    def __repr__(self) -> str:
        return "osd." + super().__repr__()


class OSDLinear(OSDLayer):
    """`nn.Linear` or transformers' `Conv1D`, whose weight is stored `(in, out)`."""

    def _load_weight(self, adapter_name: str, delta: Delta) -> None:
        left, right = delta.factors()
        places, values = delta.signs()
        n, d = delta.matrix_shape
        if isinstance(self._base, Conv1D):
            left, right = right, left
            order = np.argsort(places % d * n + places // d, kind="stable")
            places, values = (places % d * n + places // d)[order], values[order]
            n, d = d, n
        self._load_factors(adapter_name, right, left.T)
        self._load_sparse(adapter_name, places, values, (n, d))

    def _run(self, adapters: list[str], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for name in adapters:
            a, b = self.osd_A[name], self.osd_B[name]
            if a.shape[0]:
                result = result + linear(linear(x.to(a.dtype), a), b)
            if name in self.osd_values:
                result = result + self._sparse_product(name, x, result.shape[-1])
            if name in self.osd_dense:
                dense = self.osd_dense[name]
                result = result + linear(x.to(dense.dtype), dense)
            if name in self.osd_bias:
                result = result + self.osd_bias[name]
        return result.to(dtype)

    def _sparse_product(self, name: str, x: Tensor, out: int) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).float()
        with warnings.catch_warnings(), torch.autocast(x.device.type, enabled=False):
            warnings.filterwarnings("ignore", message="Sparse", category=UserWarning)
            matrix = torch.sparse_csr_tensor(
                self.osd_starts[name],
                self.osd_columns[name],
                self.osd_values[name].float(),
                (out, x.shape[-1]),
                check_invariants=False,
            )
            product = (matrix @ flat.T).T
        return product.reshape(*x.shape[:-1], out)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether a LoRA can say all of it: a loaded adapter without a change of the bias."""
        return "bias" not in self.osd_pieces.get(adapter_name, {"bias": None})


class OSDEmbedding(OSDLayer):
    """An embedding that looks rows up, and may multiply them by a number (`embed_scale`)."""

    def _load_weight(self, adapter_name: str, delta: Delta) -> None:
        left, right = delta.factors()
        self._load_factors(adapter_name, right, left.T)
        places, values = delta.signs()
        self._load_sparse(adapter_name, places, values, delta.matrix_shape)

    def _run(self, adapters: list[str], ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(ids, *args, **kwargs)
        dtype, scale = result.dtype, self._get_embed_scale()
        for name in adapters:
            added = self._rows(name, ids)
            if added is not None:
                result = result + (added if scale is None else added * scale)
        return result.to(dtype)

    def _rows(self, name: str, ids: Tensor) -> Tensor | None:
        a, b = self.osd_A[name], self.osd_B[name]
        parts = []
        if a.shape[0]:
            parts.append(embedding(ids, b) @ a)
        if name in self.osd_values:
            parts.append(self._sparse_rows(name, ids))
        if name in self.osd_dense:
            parts.append(embedding(ids, self.osd_dense[name]))
        return sum(parts[1:], parts[0]) if parts else None

    def _sparse_rows(self, name: str, ids: Tensor) -> Tensor:
        starts, flat = self.osd_starts[name], ids.reshape(-1)
        first, count = starts[flat], starts[flat + 1] - starts[flat]
        row = torch.repeat_interleave(torch.arange(len(flat), device=flat.device), count)
        entry = torch.arange(len(row), device=flat.device) - (count.cumsum(0) - count)[row] + first[row]
        width = self._base.weight.shape[1]
        values = self.osd_values[name][entry]
        rows = values.new_zeros(len(flat), width)
        rows[row, self.osd_columns[name][entry]] = values
        return rows.reshape(*ids.shape, width)


class OSDOther(OSDLayer):
    """A norm, or any module with a weight or bias: it runs with both replaced by their sums with the deltas."""

    def _load_weight(self, adapter_name: str, delta: Delta) -> None:
        self.osd_dense[adapter_name] = self._tensor(delta.dense())

    def _run(self, adapters: list[str], *args: Any, **kwargs: Any) -> Any:
        changed = {}
        for attribute, deltas in (("weight", self.osd_dense), ("bias", self.osd_bias)):
            present = [name for name in adapters if name in deltas]
            if present:
                base = getattr(self.base_layer, attribute)
                wide = base.to(torch.promote_types(base.dtype, torch.float32))
                changed[attribute] = sum((deltas[name] for name in present), wide).to(base.dtype)
        if not changed:
            return self.base_layer(*args, **kwargs)
        return torch.func.functional_call(self.base_layer, changed, args, kwargs)


def layer_class(module: nn.Module) -> type[OSDLayer]:
    """The kind of layer that runs a module with a delta."""
    if isinstance(module, nn.Linear | Conv1D):
        return OSDLinear
    plain = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
    if isinstance(module, nn.Embedding) and module.max_norm is None and plain:
        return OSDEmbedding
    return OSDOther


def _any_weight(module: Any) -> Tensor:
    weight = getattr(module, "weight", None)
    return module.bias if weight is None else weight


def _take(item: Any, wanted: list[int], batch: int) -> Any:
    """The rows of some inputs; a tensor of one row serves all, one of several rows for each input is cut evenly."""
    if not isinstance(item, Tensor) or item.dim() == 0 or (len(item) == 1 and batch > 1):
        return item
    if len(item) % batch:
        raise UnsupportedModelError(
            f"a layer got {len(item)} rows for {batch} adapter_names, and which belong to which cannot be told; run each "
            "adapter on its own inputs with set_adapter."
        )
    return item.reshape(batch, -1, *item.shape[1:])[wanted].flatten(0, 1)


def _put(whole: Any, part: Any, wanted: list[int], batch: int) -> Any:
    """Results of some inputs at their places in the results of all."""
    if isinstance(part, tuple):
        held = [None] * len(part) if whole is None else whole
        return tuple(_put(one, other, wanted, batch) for one, other in zip(held, part))
    if not isinstance(part, Tensor):
        return part
    if len(part) == 1 and len(wanted) > 1:
        part = part.expand(len(wanted), *part.shape[1:])
    part = part.reshape(len(wanted), -1, *part.shape[1:])
    whole = part.new_empty((batch * part.shape[1], *part.shape[2:])) if whole is None else whole
    whole.view(batch, -1, *part.shape[2:])[wanted] = part
    return whole
