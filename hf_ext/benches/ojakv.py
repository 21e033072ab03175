"""Quick comparison of OjaKV and the exact cache: quality and bytes on a real model where one is installed, and speed.

Peers: the library's `DynamicCache`, and PCA of the prompt's own rotated keys and of its values at the same bytes. The
long list of peers is in `benchmarks/kv_quality.py`; how it is measured in `caches.py`.
"""

from __future__ import annotations

from hf_ext.benches import caches
from hf_ext.cache_impls.ojakv import OjaKVCache, OjaKVConfig
from hf_ext.cache_impls.packed import PackedCache
from hf_ext.table import Row


SYSTEMS: dict[str, caches.Maker] = {
    "packed": PackedCache,
    "ojakv 0.6": lambda model: OjaKVCache(model, OjaKVConfig(ratio=0.6)),
    "ojakv 0.4": lambda model: OjaKVCache(model, OjaKVConfig(ratio=0.4)),
    "exact PCA 0.6": lambda model: OjaKVCache(model, OjaKVConfig(ratio=0.6, anchor_ratio=0.0)),
    "exact PCA 0.4": lambda model: OjaKVCache(model, OjaKVConfig(ratio=0.4, anchor_ratio=0.0)),
}
CONTINUATION, BLOCK = 256, 64


def run(seeds: int) -> list[Row]:
    """Rows of all systems: how it predicts the continuation, bytes, time of a decode step; a document a seed."""
    with caches.one_thread():
        rows = caches.quality("ojakv", SYSTEMS, caches.load(), seeds, CONTINUATION, BLOCK)
        return rows + caches.speed("ojakv", SYSTEMS, seeds)
