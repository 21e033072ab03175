"""Starting bases from a calibration text, one file per model.

Paper: https://huggingface.co/papers/2509.21623 (OjaKV): the basis for keys comes from queries and keys together, the
basis for values from values. Only the D x D sums are kept while the text runs, never its activations. Sums over the
queries of a group and the key enter with equal weight per vector; the paper does not say how it weighs them.

Shapes: B batch, K key/value heads, G query heads per key/value head, N tokens, D head dim.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from hf_ext.cache_impls import subspace
from hf_ext.cache_impls.attention import group_rows
from hf_ext.cache_impls.base import KVCache
from hf_ext.cache_impls.packed import PackedLayer
from hf_ext.errors import ConfigError, UnsupportedModelError


FORMAT = "hf_ext.calibration.1"


@dataclass
class Calibration:
    """Full eigenvector matrices of a model's keys and values, per full-attention layer.

    `bases[i]` holds two tensors `(K, D, D)`, columns by descending eigenvalue, for keys and values of the i-th
    full-attention layer; `spectra[i]` the eigenvalues `(K, D)`.

    Example:
        ```python
        from hf_ext.cache_impls.calibration import Calibration
        Calibration.from_model(model, [input_ids]).save("llama.safetensors")
        model.generate(**inputs, cache_implementation="ojakv",
                       cache_config={"update_rule": "none", "calibration": "llama.safetensors"})
        ```
    """

    bases: list[list[Tensor]]
    spectra: list[list[Tensor]]

    @classmethod
    def from_model(cls, model: PreTrainedModel, batches: Iterable[Tensor]) -> Calibration:
        """Runs token id batches `(B, N)` through the model and sums what its attention layers see."""
        layers: list[_GramLayer] = []
        for ids in tqdm(batches, desc="calibration", unit="batch", leave=False):
            cache = _GramCache(model)
            fresh = [layer for layer in cache.layers if isinstance(layer, _GramLayer)]
            for layer, old in zip(fresh, layers):
                layer.grams = old.grams
            layers = fresh
            with torch.no_grad():
                model(ids.to(model.device), past_key_values=cache, use_cache=True)
        if not layers:
            raise ConfigError("Calibration.from_model was given no batch of token ids.")
        if any(not layer.grams for layer in layers):
            raise UnsupportedModelError(
                f"{type(model).__name__} does not route attention through transformers' interface, so its queries cannot "
                "be seen; use update_rule='exact', which needs no calibration."
            )
        pairs = [[subspace.top_basis(gram, gram.shape[-1]) for gram in layer.grams] for layer in layers]
        return cls([[p[0].cpu() for p in pair] for pair in pairs], [[p[1].cpu() for p in pair] for pair in pairs])

    def save(self, path: str | os.PathLike) -> None:
        """Writes one safetensors file, under a temporary name first."""
        tensors = {}
        for index, (bases, spectra) in enumerate(zip(self.bases, self.spectra)):
            for stream, basis, spectrum in zip(("key", "value"), bases, spectra):
                tensors[f"{index}.{stream}.basis"] = basis.contiguous()
                tensors[f"{index}.{stream}.spectrum"] = spectrum.contiguous()
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            save_file(tensors, temporary, metadata={"format": FORMAT, "layers": json.dumps(len(self.bases))})
            os.replace(temporary, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Calibration:
        """Reads a file of `save`.

        Raises:
            `ConfigError`: no such file, or another kind of file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ConfigError(f"{path} is not a calibration file (format {metadata.get('format')!r}).")
                names = [[f"{i}.{s}" for s in ("key", "value")] for i in range(json.loads(metadata["layers"]))]
                bases = [[file.get_tensor(f"{name}.basis") for name in pair] for pair in names]
                spectra = [[file.get_tensor(f"{name}.spectrum") for name in pair] for pair in names]
        except (FileNotFoundError, IsADirectoryError):
            raise ConfigError(f"calibration={str(path)!r} does not exist; write it with Calibration.save.") from None
        except SafetensorError as error:
            raise ConfigError(f"calibration={str(path)!r} cannot be read: {error}.") from None
        return cls(bases, spectra)

    def check_fits(self, config: PreTrainedConfig, layers: int) -> None:
        """Raises `ConfigError` unless the bases have the model's number of layers, heads and head dimension."""
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        found = [len(self.bases), *self.bases[0][0].shape[:2]] if self.bases else [0, 0, 0]
        if found != [layers, heads, dim]:
            raise ConfigError(
                f"the calibration has {found[0]} layers, {found[1]} heads and head dimension {found[2]}; the model "
                f"({config.model_type}) has {layers}, {heads} and {dim}. Make one with Calibration.from_model."
            )


class _GramLayer(PackedLayer):
    """A layer that sums outer products of what it sees on top of storing it."""

    def __init__(self, model_config: PreTrainedConfig, layer_idx: int):
        super().__init__(model_config, layer_idx)
        self.grams: list[Tensor] = []

    def absorb_prompt(self, key: Tensor, value: Tensor, context: dict[str, Any] | None) -> None:
        super().absorb_prompt(key, value, context)
        if context is None:
            return
        rows = torch.cat([group_rows(context["query"], key.shape[1]), key], dim=2).float()
        sums = [(x.mT @ x).sum(0) for x in (rows, value.float())]
        self.grams = [old + new for old, new in zip(self.grams, sums)] if self.grams else sums


class _GramCache(KVCache):
    def make_layer(self, model_config: PreTrainedConfig, layer_idx: int, order: int) -> _GramLayer:
        return _GramLayer(model_config, layer_idx)
