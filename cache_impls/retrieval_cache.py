"""What the two retrieval caches share around their layers: settings, checks, offloaded bytes.

Plugs in: base of `SentenceKVCache` and `HybridKVCache`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig, PreTrainedModel

from hf_ext.cache_impls.base import ALIBI_MODELS, KVCache
from hf_ext.cache_impls.retrieval_layer import RetrievalConfig, RetrievalLayer
from hf_ext.cache_impls.store import open_unnamed
from hf_ext.errors import CacheStateError, ConfigError, UnsupportedModelError


class RetrievalCache(KVCache):
    """A cache of `RetrievalLayer`s.

    Args:
        model (`PreTrainedModel` or `PreTrainedConfig`): see `KVCache`.
        config (`RetrievalConfig` or `dict`, *optional*): settings; the defaults otherwise.
    """

    config_class: ClassVar[type[RetrievalConfig]]
    config: Any

    def __init__(
        self, model: PreTrainedModel | PreTrainedConfig, config: RetrievalConfig | dict[str, Any] | None = None
    ):
        self.config = self.read_config(config)
        super().__init__(model)

    @classmethod
    def read_config(cls, config: Any) -> Any:
        """Settings as a config, from one, from a dict of its fields, or from nothing."""
        if config is None or isinstance(config, dict):
            return cls.config_class.from_dict(config or {}, strict=True)
        if not isinstance(config, cls.config_class):
            raise ConfigError(
                f"{cls.__name__} takes its settings as a {cls.config_class.__name__} or a dict of its fields, not "
                f"{config!r}."
            )
        return config

    @classmethod
    def from_generate(cls, model: PreTrainedModel, cache_config: dict[str, Any] | None) -> Any:
        """Builds the cache for `generate(cache_implementation=..., cache_config=...)`; unknown keys are an error."""
        return cls(model, cache_config)

    def check_model(self, config: PreTrainedConfig, decoder: PreTrainedConfig) -> None:
        super().check_model(config, decoder)
        if decoder.model_type in ALIBI_MODELS or getattr(decoder, "alibi", False):
            raise UnsupportedModelError(
                f"{type(self).__name__} does not serve {decoder.model_type}: its ALiBi biases are added to the scores of "
                "every token; use cache_implementation='packed'."
            )

    def prepare(self, decoder: PreTrainedConfig, layers: int) -> None:
        self.config.validate()
        if not layers:
            raise UnsupportedModelError(
                f"{type(self).__name__} retrieves among the tokens of full-attention layers and {decoder.model_type} has "
                "none (sliding windows are bounded already); generate without it."
            )
        if self.config.offload_dir is not None:
            open_unnamed(self.config.offload_dir).close()

    def check_ready(self, batch_size: int) -> None:
        """See `KVCache.check_ready`; refuses as well after tokens could not be stored."""
        super().check_ready(batch_size)
        if any(layer.broken for layer in self.kv_layers if isinstance(layer, RetrievalLayer)):
            raise CacheStateError("tokens of an earlier step could not be stored in this cache; call reset() on it.")

    def offloaded_bytes(self) -> int:
        """Bytes of the tokens that are kept on a disk or on another device than the model's; `nbytes()` has the rest."""
        return sum(layer.offloaded_bytes() for layer in self.kv_layers if isinstance(layer, RetrievalLayer))
