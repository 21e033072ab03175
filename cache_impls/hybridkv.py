"""HybridKV: retrieved tokens exactly, all others by their low-rank codes, under one softmax.

From no paper: the union of OjaKV (https://huggingface.co/papers/2509.21623) and SentenceKV
(https://huggingface.co/papers/2504.00970). Every token between sinks and newest has one byte per coordinate of its key and
of its value in low-rank bases (`retrieval.Codes`). The codes of the keys are the index that says which tokens to fetch at
full rank; together, the codes answer for the tokens that were not fetched. Of a very long text only the most promising
pages, 16 tokens each, are read token by token; the others take part by the means of their codes. So no token is out of
sight, and a step reads a few bytes of each, or a few of every page, and all bytes of a few tokens.

Two budgets. `token_budget` bounds the tokens fetched for a step; all full-rank tokens are stored, in memory or in a file.
`ratio` or `max_bytes` bound the bytes: then only the tokens that attention and codes would miss most keep their full rank.

Shapes: B batch, K key/value heads, Q new tokens, N tokens, M tokens between sinks and newest, P pages, D
head dim, R rank of keys, S of values.
Plugs in: `generate(cache_implementation="hybridkv", cache_config={...})` after `hf_ext.register()`, or
`generate(past_key_values=HybridKVCache(model, HybridKVConfig(...)))`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hf_ext.cache_impls import subspace
from hf_ext.cache_impls.attention import Segment
from hf_ext.cache_impls.base import GROWTH, KVLayer, RowBuffer, padded_rows, storage_bytes
from hf_ext.cache_impls.retrieval import PAGE, Codes, TokenIndex, mean_codes, places_in, product, read_pages
from hf_ext.cache_impls.retrieval_cache import RetrievalCache
from hf_ext.cache_impls.retrieval_layer import RetrievalConfig, RetrievalLayer, all_rows
from hf_ext.cache_impls.rows import take
from hf_ext.errors import ConfigError
from hf_ext.log import get_logger, warn_once


_logger = get_logger(__name__)

# Part of a byte budget that goes to the codes; the rest keeps tokens at full rank.
CODE_PART = 0.2


@dataclass
class HybridKVConfig(RetrievalConfig):
    """Budgets, codes and storage of a `HybridKVCache`.

    Args:
        token_budget (`int`, defaults to 1024):
            Full-rank tokens a query attends to, per key/value head: sinks, newest and retrieved ones.
        sink_tokens (`int`, defaults to 32):
            First tokens, always at full rank.
        recent_tokens (`int`, defaults to 32):
            Newest tokens, always at full rank; up to 31 more until they are stored.
        query_window (`int`, defaults to 32):
            Last queries of the prompt by which a byte budget chooses; twice as many spread over it count too.
        refresh (`int`, defaults to 2):
            Tokens generated with one choice of retrieved tokens; layers take turns. Codes answer for what it misses.
        index_rank (`int`, *optional*):
            Coordinates of a key; half of the head dimension, or what a byte budget leaves.
        value_rank (`int`, *optional*):
            Coordinates of a value; a quarter of the head dimension, or what a byte budget leaves.
        offload_device (`str`, *optional*), offload_dir (`str`, *optional*):
            Where the full-rank tokens are kept; see `SentenceKVConfig`. Codes stay with the model.
        ratio (`float`, *optional*):
            Bytes of the whole cache at the end of the prompt, everything counted, as a share of the dense cache, in
            (0, 1). By default no token loses its full rank.
        max_bytes (`int`, *optional*):
            The same as a number of bytes, over all layers and the batch. Generated tokens come on top.
    """

    value_rank: int | None = None
    ratio: float | None = None
    max_bytes: int | None = None

    @property
    def bounds_bytes(self) -> bool:
        return self.ratio is not None or self.max_bytes is not None

    def validate(self) -> None:
        super().validate()
        self.check(self.value_rank is None or self.value_rank >= 1, "value_rank", "must be at least 1")
        self.check(
            self.ratio is None or 0 < self.ratio < 1, "ratio", "must lie in (0, 1); leave it out to keep all tokens"
        )
        self.check(self.max_bytes is None or self.max_bytes > 0, "max_bytes", "must be positive")
        self.check(
            self.ratio is None or self.max_bytes is None, "ratio", "cannot be combined with max_bytes; set one of them"
        )


class HybridKVLayer(RetrievalLayer):
    """A retrieval layer whose tokens also have codes.

    Args:
        model_config (`PreTrainedConfig`), layer_idx (`int`), order (`int`): see `RetrievalLayer`.
        config (`HybridKVConfig`): settings.
        layers (`int`): full-attention layers a byte budget is divided among.
    """

    config: HybridKVConfig
    batch_state = (*RetrievalLayer.batch_state, "kept_tokens", "page_counts", "near", "near_keys", "near_values")

    def __init__(
        self, model_config: PreTrainedConfig, layer_idx: int, order: int, config: HybridKVConfig, layers: int
    ):
        super().__init__(model_config, layer_idx, order, config)
        self.layers = layers

    def _clear(self) -> None:
        super()._clear()
        self.value_codes: Any = None  # `Codes`, once tokens are stored
        # Once there are so many that the index looks at some pages only:
        self.value_pages: Any = None  # `RowBuffer` (B, K, P, S), int8, mean codes
        self.page_counts: Any = None  # (B, 1, P), float32, tokens of a page that are not padding
        self.near: Any = None  # (B, K, pages), those read token by token, ascending
        self.near_keys: Any = None  # (B, K, pages * PAGE, R), int8, a copy of their codes
        self.near_values: Any = None  # (B, K, pages * PAGE, S), int8
        # Of a step: its queries as the codes meet them, and, where tokens are chosen anew, their products with the codes
        # read and with the means of all pages.
        self.code_query: Any = None
        self.code_scores: Any = None
        self.page_scores: Any = None
        # (B, K, kept), which of the tokens between sinks and newest are stored at full rank, ascending; None means all.
        self.kept_tokens: Any = None
        self.kept_share = 1.0

    @property
    def attends_to_store(self) -> bool:
        """Whether all full-rank tokens take part in every step: so few are kept that none need be chosen."""
        room = self.config.token_budget - self.sinks - self.config.recent_tokens
        return self.kept_tokens is not None and self.stored <= room and isinstance(self.stores[0], RowBuffer)

    def worth_storing(self, length: int) -> bool:
        if not self.config.bounds_bytes:
            return super().worth_storing(length)
        key, value = self.full
        budget = self.byte_budget(length, key, value)
        return budget < length * (key.row_bytes + value.row_bytes) / (key.data.shape[0] * key.data.shape[1])

    def byte_budget(self, length: int, key: RowBuffer, value: RowBuffer) -> float:
        """Bytes for each row and head of this layer."""
        batch, heads, _, dim = key.data.shape
        if self.config.max_bytes is not None:
            return self.config.max_bytes / (self.layers * batch * heads)
        return (self.config.ratio or 0.0) * length * (dim + value.data.shape[3]) * key.data.element_size()

    def fill(self, key: Tensor, value: Tensor, middle: Tensor, context: dict[str, Any] | None) -> None:
        everywhere, hidden = middle.expand(-1, key.shape[1], -1), self._hidden_at(middle)
        real = None if hidden is None else ~hidden[:, 0]
        rows = [take(tokens, everywhere) for tokens in (key, value)]
        if hidden is not None:
            self.places = middle.to(torch.int32)
        count, ranks = self.plan(key, value, middle.shape[2])
        budget = None if self.config.bounds_bytes else self.config.token_budget
        self.index = TokenIndex(rows[0], ranks[0], budget, hidden, self.moment)
        self.value_codes = Codes(rows[1], ranks[1], real)
        self._add_pages()
        self.kept_share = count / middle.shape[2]
        if count < middle.shape[2]:
            need = self.need(rows, real)
            if context is not None:
                valid = None if self.hidden is None else ~self.hidden
                window, scaling = self.config.query_window, context["scaling"]
                expected = subspace.expected_attention(context["query"], window, key, scaling, valid)
                need = need * expected.gather(2, everywhere)
            if hidden is not None:
                need = need.masked_fill(hidden, -torch.inf)
            self.kept_tokens = need.topk(count, dim=-1).indices.sort(-1).values.to(torch.int32)
            rows = [take(tokens, self.kept_tokens.long()) for tokens in rows]
        self.stores = [self.make_store(tokens) for tokens in rows]

    def _add_pages(self) -> None:
        """Mean codes of the values of the pages the index has, and how many tokens these are.

        Padding counts as codes of zero in the one page of a row it reaches into, by nothing in the others.
        """
        if not self.index.in_pages:
            return
        known, pages = 0 if self.value_pages is None else self.value_pages.length, self.index.pages[0].length
        fresh = slice(known * PAGE, pages * PAGE)
        means = mean_codes(self.value_codes.rows.rows[:, :, fresh])
        counts = torch.full((means.shape[0], 1, pages - known), float(PAGE), device=means.device)
        if self.hidden is not None:
            hidden = self._hidden_at(self.places_of(None, torch.Size((means.shape[0], 1, self.index.length))))
            counts = (~hidden[:, :1, fresh]).unflatten(2, (-1, PAGE)).sum(-1).float()  # type: ignore[index]
        if self.value_pages is None:
            self.value_pages, self.page_counts = RowBuffer(means), counts
            return
        self.value_pages.append(means)
        self.page_counts = torch.cat([self.page_counts, counts], dim=2)

    def need(self, rows: list[Tensor], valid: Tensor | None) -> Tensor:
        """How much worse than others the codes give each token back, key and value together, `(B, K, M)`."""
        total = torch.zeros(rows[0].shape[:3], device=rows[0].device)
        for tokens, codes, moment in ((rows[0], self.index.codes, self.moment), (rows[1], self.value_codes, None)):
            error = tokens.float() - codes.decoded(tokens)
            energy = error.square() if moment is None else (error @ moment) * error
            total += subspace.over_mean(energy.sum(-1).clamp_min(0).sqrt(), valid)
        return total

    def plan(self, key: Tensor, value: Tensor, middle: int) -> tuple[int, tuple[int, int]]:
        """How many of `middle` tokens keep their full rank, and the ranks of keys and values.

        Raises:
            `ConfigError`: `max_bytes` does not hold the sinks, the newest tokens and codes of one coordinate.
        """
        config, (_, _, length, dim) = self.config, key.shape
        both, size = dim + value.shape[3], key.element_size()
        ranks = [config.index_rank or dim // 2, config.value_rank or value.shape[3] // 4]
        if not config.bounds_bytes:
            return middle, (min(ranks[0], dim), min(ranks[1], value.shape[3]))
        budget = self.byte_budget(length, *self.full)
        code = int(CODE_PART * budget / length / 2)
        limits = (config.index_rank or min(code, dim // 2), config.value_rank or min(code, value.shape[3] // 2))
        ranks = [max(1, min(rank, most)) for rank, most in zip(limits, (dim, value.shape[3]))]
        row = both * size
        fixed = padded_rows(length - middle) * row + padded_rows(middle) * sum(ranks)
        fixed += 4 * (dim * (2 * ranks[0] + 1) + value.shape[3] * (2 * ranks[1] + 1))
        left = budget - fixed
        if left < 0 and config.max_bytes is not None:
            raise ConfigError(
                f"HybridKVConfig.max_bytes={config.max_bytes} does not hold sinks, newest tokens and codes of a prompt of "
                f"{length} tokens; raise it, or lower sink_tokens, recent_tokens, index_rank or value_rank."
            )
        if left < 0:
            warn_once(
                _logger,
                f"hybridkv: a prompt of {length} tokens is too short for ratio={config.ratio} with {config.sink_tokens} sinks "
                f"and {config.recent_tokens} newest tokens; the cache will be larger.",
            )
        room = config.token_budget - config.sink_tokens - config.recent_tokens
        kept = int(left * GROWTH / (GROWTH + 1) / (row + 4))
        if kept > room:  # what is fetched for a step is a copy
            kept = max(room, kept - room)
        kept = min(max(kept, 0), middle)
        # Bytes that no further token can take sharpen the codes.
        spare = left - padded_rows(kept) * (row + 4) - (room * row if kept > room else 0)
        more = max(0, int(spare / (padded_rows(middle) + 8 * max(dim, value.shape[3])) / 2))
        if config.index_rank is None:
            ranks[0] = min(ranks[0] + more, dim)
        if config.value_rank is None:
            ranks[1] = min(ranks[1] + more, value.shape[3])
        return kept, (ranks[0], ranks[1])

    def extend(self, rows: list[Tensor], hidden: Tensor | None, places: Tensor) -> None:
        known, real = self.index.length, None if hidden is None else ~hidden[:, 0]
        self.index.append(rows[0], hidden)
        self.value_codes.append(rows[1], real)
        self._add_pages()
        if self.kept_tokens is not None:
            need = self.need(rows, real)
            count = int(self.kept_share * (known + rows[0].shape[2])) - self.stored
            best = need.topk(min(max(count, 0), need.shape[2]), dim=-1).indices.sort(-1).values
            self.kept_tokens = torch.cat([self.kept_tokens, (best + known).to(torch.int32)], dim=2)
            rows = [take(tokens, best) for tokens in rows]
        for store, tokens in zip(self.stores, rows):
            store.append(tokens)

    def restrict(self, weights: Tensor, candidates: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.kept_tokens is None:
            return weights, candidates
        kept = self.kept_tokens.long()
        return weights.gather(2, kept), kept

    def store_places(self, chosen: Tensor) -> Tensor:
        if self.kept_tokens is None:
            return chosen
        return torch.searchsorted(self.kept_tokens.long(), chosen).clamp_max(self.stored - 1)

    def _renew(self, rows: Tensor, length: int) -> None:
        self.code_query, self.code_scores, self.page_scores = self.index.codes.query(rows), None, None
        if not self.attends_to_store:
            super()._renew(rows, length)

    def scores(self, rows: Tensor, length: int) -> tuple[Tensor, Tensor | None]:
        # What is scored to choose takes part anyway: the scores serve both.
        if not self.index.in_pages:
            self.code_scores = product(self.code_query, self.index.codes.rows.data)
            return self.code_scores[..., : self.index.length], None
        self.near, self.page_scores = self.index.promising_pages(self.code_query)
        self.near_keys, self.near_values = (
            read_pages(codes.rows.data, self.near) for codes in (self.index.codes, self.value_codes)
        )
        self.code_scores = product(self.code_query, self.near_keys)
        return self.code_scores, places_in(self.near)

    def retrieved(self, rows: Tensor) -> list[Segment]:
        if not self.attends_to_store:
            return super().retrieved(rows)
        if not self.stored:
            return []
        key, value = (store for store in self.stores if isinstance(store, RowBuffer))
        hidden = None
        if self.hidden is not None:
            hidden = self._hidden_at(self.places_of(self.kept_tokens.long(), self.kept_tokens.shape))
        visible = None if hidden is None else ~hidden[:, :, None, None]
        return [Segment(rows, key.data, value.data, key.length, visible)]

    def remainder(self, rows: Tensor) -> list[Segment]:
        """All tokens but those that take part at full rank: by their codes, or by the means of their pages."""
        keys, values = self.index.codes, self.value_codes
        exact: Any = self.kept_tokens.long() if self.attends_to_store else self.chosen
        read = (keys.rows.data, values.rows.data, keys.rows.length)
        if self.index.in_pages:
            exact, read = self.picked, (self.near_keys, self.near_values, self.near_keys.shape[2])
        hidden = None
        if self.hidden is not None:
            places = places_in(self.near) if self.index.in_pages else None
            hidden = self._hidden_at(self.places_of(places, torch.Size((rows.shape[0], 1, read[2]))))
        bases = {"expand": values.expand, "shift": rows.float() @ keys.mean.mT, "offset": values.mean}
        visible = None if hidden is None else ~hidden[:, :, None, None]
        parts = [Segment(self.code_query, *read, visible, **bases, exclude=exact, scores=self.code_scores)]
        if self.index.in_pages:
            means = (self.index.pages[0].data, self.value_pages.data, self.value_pages.length)
            pages = Segment(
                self.code_query, *means, **bases, exclude=self.near, counts=self.page_counts, scores=self.page_scores
            )
            parts.append(pages)
        self.code_query = self.code_scores = self.page_scores = None  # they were of this step alone
        return parts

    def materialize(self) -> tuple[Tensor, Tensor]:
        if not self.stores or self.kept_tokens is None:
            return super().materialize()
        states = []
        for edge, store, codes in zip(self.full, self.stores, (self.index.codes, self.value_codes)):
            middle = codes.decode().to(edge.data.dtype)
            place = self.kept_tokens.long()[..., None].expand(-1, -1, -1, middle.shape[3])
            states.append(self._in_order(edge.rows, middle.scatter(2, place, all_rows(store))))
        return states[0], states[1]

    def _value_tensors(self) -> list[Tensor]:
        codes = [] if self.value_codes is None else self.value_codes.tensors()
        return codes if self.value_pages is None else [*codes, self.value_pages.data]

    def tensors(self) -> list[Tensor]:
        return super().tensors() + self._value_tensors()

    def tier_bytes(self) -> dict[str, int]:
        tiers = super().tier_bytes() | {"value_codes": storage_bytes(self._value_tensors())}
        near = 0 if self.near is None else storage_bytes([self.near, self.near_keys, self.near_values])
        return tiers | {"marks": tiers["marks"] - near, "retrieved": tiers["retrieved"] + near}

    def _select(self, index: Tensor) -> None:
        super()._select(index)
        for part in (self.value_codes, self.value_pages):
            if part is not None:
                part.reorder(index)


class HybridKVCache(RetrievalCache):
    """Cache of retrieved full-rank tokens and low-rank codes for all others.

    Args:
        model (`PreTrainedModel` or `PreTrainedConfig`):
            See `KVCache`. Where attention does not run inside the cache, every step rebuilds all tokens.
        config (`HybridKVConfig` or `dict`, *optional*): settings; the defaults otherwise.

    Raises:
        `UnsupportedModelError`: an encoder-decoder or ALiBi model, or one with no full-attention layer.
        `ConfigError`: settings that contradict each other, or an `offload_dir` that cannot be written to.

    Example:
        ```python
        import hf_ext
        cache = hf_ext.HybridKVCache(model, hf_ext.HybridKVConfig(token_budget=512))
        model.generate(**inputs, past_key_values=cache)
        print(cache.nbytes(), cache.offloaded_bytes(), cache.tier_bytes())
        ```
    """

    config_class = HybridKVConfig
    config: HybridKVConfig

    def prepare(self, decoder: PreTrainedConfig, layers: int) -> None:
        super().prepare(decoder, layers)
        self.layer_count = layers

    def make_layer(self, model_config: PreTrainedConfig, layer_idx: int, order: int) -> KVLayer:
        return HybridKVLayer(model_config, layer_idx, order, self.config, self.layer_count)
