"""Quick comparison of HybridKV: quality at a small budget of tokens, bytes, and speed at the default budget.

The continuation is fed one token at a time. Peers: the first and the newest tokens alone and SentenceKV at the same
budget of tokens, and OjaKV, which attends to every token, at the same bytes as HybridKV with a byte budget. How it is
measured is in `caches.py`.
"""

from __future__ import annotations

from functools import partial

from hf_ext.benches import caches
from hf_ext.cache_impls.hybridkv import HybridKVCache, HybridKVConfig
from hf_ext.cache_impls.ojakv import OjaKVCache, OjaKVConfig
from hf_ext.cache_impls.sentencekv import SentenceKVCache, SentenceKVConfig
from hf_ext.table import Row


BUDGET, CONTINUATION, RATIO = 256, 32, 0.4


def systems(budget: int, boundary_ids: list[int]) -> dict[str, caches.Maker]:
    """Ours and its peers, those that retrieve at one budget of tokens."""
    sentences = SentenceKVConfig(token_budget=budget, boundary_ids=boundary_ids)
    return {
        "streaming": partial(caches.StreamingCache, budget=budget),
        "sentencekv": partial(SentenceKVCache, config=sentences),
        f"ojakv {RATIO}": partial(OjaKVCache, config=OjaKVConfig(ratio=RATIO)),
        "hybridkv": partial(HybridKVCache, config=HybridKVConfig(token_budget=budget)),
        f"hybridkv {RATIO}": partial(HybridKVCache, config=HybridKVConfig(token_budget=budget, ratio=RATIO)),
    }


def run(seeds: int) -> list[Row]:
    """Rows of all systems: how it predicts the continuation, bytes, time of a decode step; a document a seed."""
    budgets = BUDGET, HybridKVConfig().token_budget
    return caches.retrieval("hybridkv", systems, seeds, CONTINUATION, budgets)
