"""What the two retrieval caches share around their layers: checks and offloaded bytes.

Plugs in: base of `SentenceKVCache` and `HybridKVCache`.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from hf_ext.cache_impls.base import ConfiguredCache
from hf_ext.cache_impls.retrieval_layer import RetrievalLayer
from hf_ext.cache_impls.store import open_unnamed
from hf_ext.errors import CacheStateError, UnsupportedModelError


class RetrievalCache(ConfiguredCache):
    """A cache of `RetrievalLayer`s; arguments as `ConfiguredCache`."""

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
