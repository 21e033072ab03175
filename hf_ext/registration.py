"""`register()`, `unregister()`, `registered()`: every change this suite makes to another library, all reversible.

transformers keeps a closed list of cache names and builds caches in one private method. Registration appends our names
to the list and wraps that method; whatever it replaces is put back, the same object, by `unregister()`. Importing
`hf_ext` calls none of this.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hf_ext.errors import UnsupportedModelError
from hf_ext.log import get_logger, warn_once


# Name in `cache_implementation` -> class with `from_generate(model, cache_config)`.
CACHES = {
    "hybridkv": "hf_ext.cache_impls.hybridkv:HybridKVCache",
    "ojakv": "hf_ext.cache_impls.ojakv:OjaKVCache",
    "packed": "hf_ext.cache_impls.packed:PackedCache",
    "sentencekv": "hf_ext.cache_impls.sentencekv:SentenceKVCache",
}

# Our method in PEFT, as it writes names of methods.
PEFT_METHOD = "osd"

_logger = get_logger(__name__)
_undo: list[Callable[[], None]] = []
_undo_peft: list[Callable[[], None]] = []


def register() -> None:
    """Makes our caches valid values of `cache_implementation`, `OSD` a PEFT type, and our models known to `AutoModel`.

    Repeating it changes nothing. After it, `generate(cache_implementation="ojakv", cache_config={...})`,
    `GenerationConfig(cache_implementation="ojakv")`, pipelines and PEFT-wrapped models build our caches, and a cache of
    ours passed as `past_key_values` attends in its own storage. A saved generation config never carries our names. Where
    PEFT is installed, it is imported, and `PeftModel.from_pretrained` opens OSD adapters. `AutoModel` opens saved `TCCMModel`s
    and `OODModel`s, and `pipeline("tabular-anomaly-detection")` and `pipeline("ood-classification")` run them.

    Raises:
        `RuntimeError`: the installed transformers lacks a hook point (`hf-ext env` lists them), or PEFT has a method `OSD`
            of its own. Nothing is registered then.
    """
    if _undo:
        return
    missing = [f"{name} ({detail})" for name, found, detail in check_hook_points() if not found]
    if missing:
        raise RuntimeError(
            f"this version of transformers lacks {'; '.join(missing)}; hf_ext was tested with transformers 5.23. "
            "Caches passed as past_key_values=... work without registration."
        )
    from transformers.generation import configuration_utils
    from transformers.generation.configuration_utils import GenerationConfig
    from transformers.generation.utils import GenerationMixin

    from hf_ext.cache_impls.attention import register_attention

    _replace(
        configuration_utils, "ALL_CACHE_IMPLEMENTATIONS", (*configuration_utils.ALL_CACHE_IMPLEMENTATIONS, *CACHES)
    )
    _replace(
        GenerationMixin,
        "_prepare_cache_for_generation",
        _with_our_caches(GenerationMixin._prepare_cache_for_generation),
    )
    _replace(GenerationConfig, "to_json_file", _without_our_names(GenerationConfig.to_json_file))
    register_attention()
    _register_models()
    if importlib.util.find_spec("peft") is not None:
        try:
            register_peft()
        except ImportError as error:
            warn_once(_logger, f"the installed peft cannot open OSD adapters: {error}; pip install -U peft.")
        except BaseException:
            while _undo:
                _undo.pop()()
            raise


def _register_models() -> None:
    """Our models become known to `AutoModel` and `pipeline`; what cannot be registered leaves nothing behind."""
    from hf_ext.pipelines.hosts import register_models, unregister_models

    _undo.append(unregister_models)
    try:
        register_models()
    except BaseException:
        while _undo:
            _undo.pop()()
        raise


def register_peft() -> None:
    """Makes `OSD` a type of PEFT, the part of `register()` that needs no cache; `unregister()` undoes it.

    PEFT's types are a closed enum: the member comes first, then PEFT's own registration.

    Raises:
        `ImportError`: peft is not installed. `RuntimeError`: PEFT has a method of this name already. Whatever is raised,
            nothing is registered then.
    """
    if _undo_peft:
        return
    from peft import mapping
    from peft.utils import PeftType, register_peft_method

    name = PEFT_METHOD.upper()
    if name in PeftType.__members__:
        raise RuntimeError(f"the installed peft has a method {name} of its own; upgrade hf-ext, or use restore().")
    # Before the enum changes: nothing is half registered if this fails.
    from hf_ext.merging.adapters import OSDModel
    from hf_ext.merging.osd_config import OSDConfig

    member: Any = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    tables = (
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING,
        mapping.PEFT_TYPE_TO_TUNER_MAPPING,
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING,
        mapping.PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    )

    def undo() -> None:
        for table in tables:
            table.pop(member, None)
        PeftType._member_names_.remove(name)
        del PeftType._member_map_[name], PeftType._value2member_map_[name]
        type.__delattr__(PeftType, name)

    try:
        register_peft_method(
            name=PEFT_METHOD,
            config_cls=OSDConfig,
            model_cls=OSDModel,
            prefix=OSDModel.prefix,
            is_mixed_compatible=False,
        )
    except BaseException:
        undo()
        raise
    _undo_peft.append(undo)


def unregister() -> None:
    """Puts every object `register()` replaced back, and takes our hooks off every model."""
    while _undo:
        _undo.pop()()
    while _undo_peft:
        _undo_peft.pop()()
    attention = sys.modules.get("hf_ext.cache_impls.attention")
    if attention is not None:
        attention.detach_all()


@contextmanager
def registered() -> Iterator[None]:
    """`register()` for the length of a `with` block; a registration made before it stays."""
    was_registered, knew_osd = bool(_undo), bool(_undo_peft)
    register()
    try:
        yield
    finally:
        if not was_registered:
            unregister()
            if knew_osd:
                register_peft()


def build_cache(name: str, model: Any, cache_config: dict[str, Any] | None = None) -> Any:
    """The cache `generate(cache_implementation=name, cache_config=...)` would build for `model`.

    Args:
        name (`str`): a key of `CACHES`.
        model (`PreTrainedModel`): the model that will run it.
        cache_config (`dict`, *optional*): settings of the cache's config class; unknown keys are an error.

    Raises:
        `ConfigError`: a setting that cannot work. `UnsupportedModelError`: a model the cache cannot serve.
    """
    module, _, attribute = CACHES[name].partition(":")
    cache = getattr(importlib.import_module(module), attribute)
    if not model._supports_default_dynamic_cache():
        raise UnsupportedModelError(
            f"cache_implementation={name!r} needs a model with a key/value cache; {type(model).__name__} keeps another "
            "kind of state. Generate without cache_implementation."
        )
    return cache.from_generate(model, cache_config)


def check_hook_points() -> list[tuple[str, bool, str]]:
    """Whether the private parts of transformers we build on are as we know them.

    Returns:
        `list[tuple[str, bool, str]]`: name, found as expected, what it is used for.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, GenerationConfig, PreTrainedModel, cache_utils
    from transformers.generation import configuration_utils
    from transformers.generation.utils import GenerationMixin

    def parameters(function: Callable | None) -> list[str]:
        return list(inspect.signature(function).parameters) if function else []

    prepare = parameters(getattr(GenerationMixin, "_prepare_cache_for_generation", None))
    mappings = (AttentionInterface, AttentionMaskInterface)
    points = {
        "GenerationMixin._prepare_cache_for_generation": (
            prepare[1:5] == ["generation_config", "model_kwargs", "generation_mode", "batch_size"],
            "builds the cache a name stands for",
        ),
        "GenerationMixin._supports_default_dynamic_cache": (
            hasattr(GenerationMixin, "_supports_default_dynamic_cache"),
            "tells models without keys and values",
        ),
        "configuration_utils.ALL_CACHE_IMPLEMENTATIONS": (
            isinstance(getattr(configuration_utils, "ALL_CACHE_IMPLEMENTATIONS", None), tuple),
            "the names generate accepts",
        ),
        "GenerationConfig.to_json_file": (
            hasattr(GenerationConfig, "to_json_file"),
            "keeps our names out of saved configs",
        ),
        "AttentionInterface, AttentionMaskInterface": (
            all(isinstance(getattr(mapping, "_global_mapping", None), dict) for mapping in mappings),
            "attention that runs inside a cache",
        ),
        "PreTrainedModel._can_set_attn_implementation": (
            hasattr(PreTrainedModel, "_can_set_attn_implementation"),
            "tells models with attention of their own",
        ),
        "PreTrainedConfig._attn_implementation_internal": (
            _names_its_attention(),
            "switches attention for one forward call",
        ),
        "cache_utils.get_layer_types_and_kwargs": (
            hasattr(cache_utils, "get_layer_types_and_kwargs") and hasattr(cache_utils, "DYNAMIC_LAYER_TYPE_MAPPING"),
            "the kinds of layers of a model",
        ),
        "CacheLayerMixin.get_mask_sizes": (
            parameters(cache_utils.CacheLayerMixin.get_mask_sizes) == ["self", "query_length"],
            "the cache layer contract",
        ),
    }
    return [(name, found, use) for name, (found, use) in points.items()]


def _names_its_attention() -> bool:
    """Whether a config's attention implementation is read from the private attribute we switch."""
    from transformers import PreTrainedConfig

    config = PreTrainedConfig()
    config._attn_implementation_internal = "eager"
    return config._attn_implementation == "eager"


def _replace(owner: Any, name: str, value: Any) -> None:
    original = getattr(owner, name)
    _undo.append(lambda: setattr(owner, name, original))
    setattr(owner, name, value)


def _with_our_caches(original: Callable) -> Callable:
    @functools.wraps(original)
    def prepare(self, generation_config, model_kwargs, generation_mode, batch_size, *args, **kwargs):
        from hf_ext.cache_impls.base import KVCache

        name, given = generation_config.cache_implementation, model_kwargs.get("past_key_values")
        if isinstance(given, KVCache):
            _expect_chunks(given, generation_config, model_kwargs)
            given.check_ready(max(generation_config.num_beams, generation_config.num_return_sequences) * batch_size)
            given.attach(self)
        if name not in CACHES or given is not None or generation_config.use_cache is False:
            return original(self, generation_config, model_kwargs, generation_mode, batch_size, *args, **kwargs)
        cache = build_cache(name, self, generation_config.cache_config)
        _expect_chunks(cache, generation_config, model_kwargs)
        # `generation_config` is this call's own copy. An assistant copies it again and passes its own cache, which
        # transformers refuses next to a name.
        generation_config.cache_implementation = generation_config.cache_config = None
        if getattr(generation_config, "is_assistant", False):
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache

    return prepare


def _expect_chunks(cache: Any, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
    """Tells the cache how long a prompt is that will come in chunks."""
    if generation_config.prefill_chunk_size is None:
        return
    mask = model_kwargs.get("attention_mask")
    length = getattr(generation_config, "_mask_length", 0) if mask is None else mask.shape[1]
    cache.expect_prompt(length)


def _without_our_names(original: Callable) -> Callable:
    @functools.wraps(original)
    def to_json_file(self, *args, **kwargs):
        if self.cache_implementation in CACHES:
            warn_once(
                _logger,
                f"cache_implementation={self.cache_implementation!r} is left out of the saved generation config: "
                "without hf_ext no one could load it.",
            )
            self = copy.copy(self)
            self.cache_implementation = self.cache_config = None
        return original(self, *args, **kwargs)

    return to_json_file
