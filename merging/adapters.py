"""The PEFT method `OSD`: compressed fine-tunes (OSD, arXiv 2511.02681) inside `PeftModel` and transformers models.

`hf_ext.register()` makes it known to PEFT; then `PeftModel.from_pretrained(model, repo)` decodes the blob of an artifact
into the layers of `adapter_layer.py`, checks that the base is the right one, and everything PEFT does with an adapter
works: several of them, `set_adapter`, `disable_adapter`, merging, batches of several adapters, `convert_to_lora`, saving.
An adapter is a finished delta: it is not trained, and saving writes the bytes it came from.

transformers' own `load_adapter(repo)` and `from_pretrained(repo)` do not call PEFT's decoding hooks. An adapter they put
in refuses to run; `load_adapter` here loads it into such a model.

Differs from the paper: in nothing here; the mathematics and its differences are in `osd.py`.

Plugs in: `hf_ext.register()`, `hf_ext.load_adapter(model, repo)`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from peft import PeftConfig, PeftModel, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from hf_ext.errors import AdapterStateError, BlobError, ConfigError, DeltaError, UnsupportedModelError
from hf_ext.log import get_logger, warn_once
from hf_ext.merging.adapter_layer import BASE, OSDLayer, Piece, layer_class
from hf_ext.merging.blob import MAX_TERMS, Delta, decode, encode
from hf_ext.merging.deltas import matches
from hf_ext.merging.osd_artifact import BLOB_KEY, ERROR_KEY, OSDArtifact, decode_tensor
from hf_ext.merging.osd_config import OSDConfig
from hf_ext.registration import register_peft


_logger = get_logger(__name__)
_any_base: ContextVar[bool] = ContextVar("osd_any_base", default=False)
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class OSDModel(BaseTuner):
    """The tuner behind `peft_type="OSD"`; PEFT builds it."""

    prefix = "osd_"
    tuner_layer_cls = OSDLayer
    target_module_mapping: dict[str, list[str]] = {}

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str) -> None:
        """Add the weighted sum of loaded adapters as a new one: their terms side by side, nothing fitted again.

        Args:
            adapters (`list[str]`): names of loaded adapters.
            weights (`list[float]`): one for each. They change the float16 steps and the magnitudes of the terms.
            adapter_name (`str`): of the sum; it is not made active.

        Raises:
            `ConfigError`: unknown or existing names, another number of weights, more terms than a blob holds, or a
                weight that leaves the range of a float16 step.
        """
        unknown = [name for name in adapters if name not in self.peft_config]
        if unknown or not adapters or len(adapters) != len(weights) or adapter_name in self.peft_config:
            raise ConfigError(
                f"adapters={adapters}, weights={weights}, adapter_name={adapter_name!r}; expected loaded adapters out of "
                f"{sorted(self.peft_config)}, as many weights, and a new name."
            )
        deltas: dict[str, Delta] = {}
        for name, weight in zip(adapters, weights):
            for piece in _pieces(self.model, name):
                before = deltas.get(piece.name, Delta(piece.delta.shape)).terms
                with np.errstate(over="ignore"):  # found when it is decoded again, below
                    added = tuple(term.scaled(weight) for term in piece.delta.terms)
                deltas[piece.name] = replace(piece.delta, terms=before + added)
        crowded = [name for name, delta in deltas.items() if len(delta.terms) > MAX_TERMS]
        if crowded:
            raise ConfigError(f"the sum has more than {MAX_TERMS} terms for {crowded[0]}; add up fewer adapters.")
        try:
            deltas = decode(encode(deltas))
        except BlobError as error:
            raise ConfigError(f"weights={weights} give a sum that cannot be stored: {error}") from None
        configs: Any = self.peft_config
        configs[adapter_name] = _joined([configs[name] for name in adapters])
        self.inject_adapter(self.model, adapter_name)
        _load(self.model, adapter_name, configs[adapter_name], deltas, {}, check=False)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        if peft_config.target_modules is None and peft_config.extra_modules is None:
            raise ConfigError(
                "OSDConfig.target_modules=None names no module: an OSD adapter is made by hf_ext.compress_delta and "
                "opened by PeftModel.from_pretrained or hf_ext.load_adapter."
            )
        if peft_config.target_modules is None:
            peft_config.target_modules = []
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Every refusal before anything is changed."""
        matched = {key: module for key, module in model.named_modules() if self._is_wanted(peft_config, key, module)}
        for key, module in matched.items():
            if isinstance(module, OSDLayer):
                continue
            if isinstance(module, BaseTunerLayer):
                raise UnsupportedModelError(
                    f"{key} already carries a {type(module).__name__} of another PEFT method; merge that first "
                    "(merge_and_unload)."
                )
            if _is_quantised(module):
                raise UnsupportedModelError(
                    f"{key} is quantised ({type(module).__name__}); an OSD delta belongs to float weights: load the base "
                    "without quantisation."
                )
        if not matched:
            raise DeltaError(
                f"no module of {type(model).__name__} that has a weight or a bias is called "
                f"{', '.join(sorted(_names(peft_config))[:5])}; load the base the adapter names, "
                f"{peft_config.base_model_name_or_path}."
            )

    def _is_wanted(self, peft_config: OSDConfig, key: str, module: nn.Module) -> bool:
        return bool(_tensors(module)) and self._check_target_module_exists(peft_config, key)

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        names = _names(peft_config)
        parts = key.split(".")
        return any(".".join(parts[start:]) in names for start in range(len(parts)))

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, OSDLayer):
            target.update_layer(adapter_name)
            return
        if not _tensors(target):
            # Names in a config are endings: a norm without a weight may share one. A delta for it is refused later.
            return
        layer = layer_class(target)(target, adapter_name)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        """PEFT warns of tied embeddings here; `OSDLayer.merge` changes a shared weight once."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Tells the layers which row of a batch belongs to which adapter, for the length of one call."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names was given to a model in training mode; call model.eval() first.")
        layers = [module for module in self.modules() if isinstance(module, OSDLayer)]
        unknown = set(names) - {BASE} - {name for layer in layers for name in layer.osd_A}
        if unknown:
            raise ValueError(
                f"adapter_names holds {sorted(unknown)}; expected {sorted(self.peft_config)} or {BASE!r}."
            )
        for layer in layers:
            layer.row_adapters = list(names)
        try:
            yield
        finally:
            for layer in layers:
                layer.row_adapters = None

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        pieces = _pieces(model, adapter_name)
        blob = encode({piece.name: piece.delta for piece in pieces})
        found = {BLOB_KEY: torch.frombuffer(bytearray(blob), dtype=torch.uint8)}
        if pieces and all(piece.error is not None for piece in pieces):
            found[ERROR_KEY] = torch.tensor([piece.error for piece in pieces]).half()
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if any(layer.merged for _, layer in _layers(model).values()):
            raise AdapterStateError(
                "an adapter is merged, so the base cannot be checked; call unmerge_adapter() first."
            )
        by_end = {key.split(".")[-1]: value for key, value in state_dict.items()}
        try:
            if BLOB_KEY not in by_end:
                raise BlobError(
                    f"the adapter's weights hold {sorted(state_dict)[:3]} and no {BLOB_KEY!r}: not an OSD one."
                )
            deltas = decode_tensor(by_end[BLOB_KEY])
            stored = by_end.get(ERROR_KEY)
            errors = dict(zip(deltas, stored.tolist())) if stored is not None and len(stored) == len(deltas) else {}
            settings: Any = config
            return _load(model, adapter_name, settings, deltas, errors, check=not _any_base.get())
        except Exception:
            _withdraw(model, adapter_name)
            raise


def load_adapter(
    model: Any,
    source: str | os.PathLike | OSDArtifact,
    adapter_name: str = "default",
    revision: str | None = None,
    token: str | None = None,
    force: bool = False,
) -> Any:
    """Load a compressed fine-tune into a model and make it the active adapter; no `PeftModel` is needed.

    Args:
        model (`nn.Module`): a transformers model or a `PeftModel`; changed in place.
        source (`str`, `os.PathLike` or `OSDArtifact`): folder, Hub id or object.
        adapter_name (`str`, defaults to `"default"`): a name the model does not have yet.
        revision (`str`, *optional*): of the repository.
        token (`str`, *optional*): for the Hub.
        force (`bool`): skip the check that the base is the one the delta was taken from.

    Returns:
        `nn.Module`: `model`.

    Raises:
        `DeltaError`: the delta belongs to another base or architecture; the model is as it was. `ConfigError`: the name is
            taken. `ArtifactError`, `BlobError`: the source cannot be read. `UnsupportedModelError`: a quantised base.

    Example:
        ```python
        model = AutoModelForCausalLM.from_pretrained("org/base")
        hf_ext.load_adapter(model, "me/fine-tune-osd").generate(**inputs)
        ```
    """
    register_peft()
    if adapter_name in getattr(model, "peft_config", {}):
        raise ConfigError(f"adapter_name={adapter_name!r} is already an adapter of the model; give another name.")
    artifact = source if isinstance(source, OSDArtifact) else OSDArtifact.from_pretrained(source, revision, token)
    config = replace(artifact.config, inference_mode=True)
    errors = {report.name: (report.error / report.energy) ** 0.5 for report in artifact.reports if report.energy}
    try:
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, config)
        else:
            inject_adapter_in_model(config, model, adapter_name)
        _load(model, adapter_name, config, artifact.deltas, errors, check=not (force or _any_base.get()))
    except Exception:
        _withdraw(model, adapter_name)
        raise
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = True
    if hasattr(model, "set_adapter"):
        model.set_adapter(adapter_name)
    return model.eval()


@contextmanager
def any_base() -> Iterator[None]:
    """Skip the check of the base inside the block, where `PeftModel.from_pretrained` leaves no room for an argument."""
    token = _any_base.set(True)
    try:
        yield
    finally:
        _any_base.reset(token)


def _layers(model: nn.Module) -> dict[str, tuple[str, OSDLayer]]:
    """By name in the base: the name in `model`, and the layer."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, OSDLayer):
            short = ".".join(part for part in name.split(".") if part != "_orig_mod")
            found[short.removeprefix("base_model.model.")] = (name, module)
    return found


def _pieces(model: nn.Module, adapter_name: str) -> list[Piece]:
    """The deltas of a loaded adapter in the order of its blob."""
    held: dict[str, Piece] = {}
    for _, layer in _layers(model).values():
        if adapter_name in layer.osd_A:
            layer._check_loaded(adapter_name)
            held |= {piece.name: piece for piece in layer.osd_pieces[adapter_name].values()}
    return sorted(held.values(), key=lambda piece: piece.position)


def _load(
    model: nn.Module,
    adapter_name: str,
    config: OSDConfig,
    deltas: dict[str, Delta],
    errors: dict[str, float],
    check: bool,
) -> dict[str, Tensor]:
    """Hand each layer its deltas, after all checks; the parameters of the adapter by their names in `model`."""
    if not config.inference_mode:
        warn_once(_logger, f"the OSD adapter {adapter_name!r} is a finished delta: its parameters stay frozen.")
    layers = {key: item for key, item in _layers(model).items() if adapter_name in item[1].osd_A}
    pieces: dict[str, dict[str, Piece]] = {key: {} for key in layers}
    weights: list[tuple[str, Tensor]] = []
    for position, (name, delta) in enumerate(deltas.items()):
        module, _, attribute = name.rpartition(".")
        key = _find(layers, module)
        base = None if key is None else getattr(layers[key][1].get_base_layer(), attribute, None)
        if key is None or attribute not in ("weight", "bias") or not isinstance(base, Tensor):
            raise DeltaError(
                f"{type(model).__name__} has no weight or bias {name}: the delta belongs to another architecture than that "
                f"of {config.base_model_name_or_path}, or transformers stacks this tensor while loading, as it does with "
                "experts; then write a plain checkpoint with hf_ext.restore."
            )
        if tuple(base.shape) != delta.shape:
            raise DeltaError(
                f"{name} has shape {tuple(base.shape)} in the model and {delta.shape} in the delta; load the base it was "
                f"taken from, {config.base_model_name_or_path}, with the vocabulary it was saved with."
            )
        pieces[key][attribute] = Piece(name, position, delta, errors.get(name))
        weights.append((name, base))
    if check:
        _check_base(config, weights)
    for alias, source in (config.tied or {}).items():
        key, other = _find(layers, alias), _find(layers, source)
        if key is not None and other is not None and "weight" in pieces[other]:
            pieces[key]["weight"] = pieces[other]["weight"]
            layers[key][1]._source = (layers[other][1],)
    found = {}
    for key, (name, layer) in layers.items():
        layer.load(adapter_name, pieces[key])
        found[f"{name}.osd_A.{adapter_name}"] = layer.osd_A[adapter_name].detach()
        found[f"{name}.osd_B.{adapter_name}"] = layer.osd_B[adapter_name].detach()
    return found


def _find(layers: dict[str, Any], module: str) -> str | None:
    """The key of a module: its own name, or the only one that ends in it, for a model inside another."""
    if module in layers:
        return module
    ends = [key for key in layers if key.endswith("." + module)]
    return ends[0] if len(ends) == 1 else None


def _check_base(config: OSDConfig, weights: Sequence[tuple[str, Tensor]]) -> None:
    if not config.base_fingerprint or not weights:
        return
    if any(weight.is_meta for _, weight in weights):
        warn_once(_logger, "weights of the base are offloaded: it is not checked that the OSD adapter belongs to it.")
        return
    if not matches(config.base_fingerprint, weights):
        raise DeltaError(
            f"this model is not the base the delta was taken from ({config.base_model_name_or_path}, revision "
            f"{config.revision}): its weights differ. Load that base, or pass force=True to hf_ext.load_adapter."
        )


def _withdraw(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter that could not be loaded out again; modules without any get their own place back."""
    for name, layer in _layers(model).values():
        if adapter_name in layer.osd_A:
            layer.delete_adapter(adapter_name)
        if not len(layer.osd_A):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)
    configs = getattr(model, "peft_config", {})
    configs.pop(adapter_name, None)
    for module in model.modules():
        if not configs and "peft_config" in vars(module) and not isinstance(module, BaseTuner | PeftModel):
            del module.peft_config


def _joined(configs: list[OSDConfig]) -> OSDConfig:
    """The config of a sum: all modules, and the fingerprint only where it covers the same tensors."""
    first = configs[0]
    target = {name for config in configs for name in config.target_modules or ()}
    extra = {name for config in configs for name in config.extra_modules or ()}
    prints = [config.base_fingerprint for config in configs]
    return replace(
        first,
        target_modules=sorted(target),
        extra_modules=sorted(extra) or None,
        tied={alias: source for config in configs for alias, source in (config.tied or {}).items()} or None,
        base_fingerprint=first.base_fingerprint if all(item == prints[0] for item in prints) else None,
    )


def _names(config: OSDConfig) -> set[str]:
    return {*(config.target_modules or ()), *(config.extra_modules or ()), *(config.tied or ())}


def _tensors(module: nn.Module) -> list[Tensor]:
    found = (getattr(module, "weight", None), getattr(module, "bias", None))
    return [item for item in found if isinstance(item, Tensor)]


def _is_quantised(module: nn.Module) -> bool:
    if any(hasattr(module, name) for name in ("qweight", "W_q")) or resolve_quantization_backend(module) is not None:
        return True
    return any(tensor.dtype not in _FLOATS for tensor in _tensors(module))
