"""Quick comparison of SentenceKV: quality at a small budget of tokens, bytes, and speed at the default budget.

The continuation is fed one token at a time. Peers at the same budget: the first and the newest tokens alone, Quest's
bounds of pages (`score="page_bound"`) and the paper's own form (`mode="paper"`, three budgets kept for each query head).
That form masks tokens rather than skipping them, so its time is not measured. More peers are in
`benchmarks/retrieval_quality.py`; how it is measured is in `caches.py`.
"""

from __future__ import annotations

from functools import partial

from hf_ext.benches import caches
from hf_ext.cache_impls.sentencekv import SentenceKVCache, SentenceKVConfig
from hf_ext.table import Row


BUDGET, CONTINUATION = 256, 32
KEPT = 3.0  # budgets the paper's form keeps


def systems(budget: int, boundary_ids: list[int]) -> dict[str, caches.Maker]:
    """Ours and its peers at one budget of tokens."""

    def retrieving(**settings) -> caches.Maker:
        config = SentenceKVConfig(token_budget=budget, boundary_ids=boundary_ids, **settings)
        return partial(SentenceKVCache, config=config)

    return {
        "streaming": partial(caches.StreamingCache, budget=budget),
        "sentencekv": retrieving(),
        "page bound": retrieving(score="page_bound"),
        "sentencekv paper": retrieving(mode="paper", keep=KEPT),
    }


def run(seeds: int) -> list[Row]:
    """Rows of all systems: how it predicts the continuation, bytes, time of a decode step; a document a seed."""
    budgets = BUDGET, SentenceKVConfig().token_budget
    return caches.retrieval("sentencekv", systems, seeds, CONTINUATION, budgets, ("sentencekv paper",))
