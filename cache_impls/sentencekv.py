"""SentenceKV: a key/value cache that attends to a fixed number of tokens, those the sentence being written asks for.

Paper: https://huggingface.co/papers/2504.00970 (arXiv 2504.00970). The prompt is read at full rank. After it, a decode step
attends to the first tokens (sinks), the newest ones and, of all others, `token_budget` less these: the ones the query asks
an index for. So a step takes the same time whatever the length of the text, and the tokens that wait can be kept in a file
(`offload_dir`). The indexes are in `retrieval.py`, the storage in `retrieval_layer.py`, the paper's own form in
`sentencekv_paper.py`.

Shapes: B batch, K key/value heads, G query heads per key/value head, Q new tokens, M stored tokens, D head dim.
Plugs in: `generate(cache_implementation="sentencekv", cache_config={...})` after `hf_ext.register()`, or
`generate(past_key_values=SentenceKVCache(model, SentenceKVConfig(...), tokenizer))`.

Differs from the paper, unless `mode="paper"`: every token has an index entry of its own (`score="mean_query"` asks the
sentences' mean keys, as the paper does); nothing is dropped (`keep=3` is the paper's factor); one set of tokens per
key/value head, not per query head; the sentence being written is always visible, however long.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_ext.cache_impls.attention import MAX_IN_SPACE_ROWS, Segment, group_rows, segment_attention, ungroup_rows
from hf_ext.cache_impls.base import KVLayer
from hf_ext.cache_impls.retrieval import NEWEST_CANDIDATES, PageIndex, SentenceIndex
from hf_ext.cache_impls.retrieval_cache import RetrievalCache
from hf_ext.cache_impls.retrieval_layer import Index, RetrievalConfig, RetrievalLayer, all_rows
from hf_ext.cache_impls.sentence_map import SentenceMap
from hf_ext.cache_impls.sentencekv_paper import PaperLayer
from hf_ext.cache_impls.sentences import resolve_boundaries
from hf_ext.cache_impls.store import CHUNK
from hf_ext.errors import UnsupportedModelError
from hf_ext.log import get_logger, warn_once


_logger = get_logger(__name__)


@dataclass
class SentenceKVConfig(RetrievalConfig):
    """Budget, index and storage of a `SentenceKVCache` (arXiv 2504.00970).

    Args:
        token_budget (`int`, defaults to 1024):
            Tokens a query attends to, per key/value head: sinks, newest and retrieved ones (the paper's tau).
        sink_tokens (`int`, defaults to 32):
            First tokens, always attended to.
        recent_tokens (`int`, defaults to 32):
            Newest tokens, always attended to; up to 31 more until they are stored.
        query_window (`int`, defaults to 32):
            Last queries of the prompt by which `keep` chooses.
        refresh (`int`, defaults to 2):
            Tokens generated with one choice, layers taking turns; a sentence's end renews it sooner. 1 is slower and finds
            what only the next token asks for.
        index_rank (`int`, *optional*):
            Bytes of index a token and head take with `score="lowrank_token"`; half of the head dimension by default.
        offload_device (`str`, *optional*):
            `"cpu"` keeps the stored tokens in the host's memory. That is the default for a model on an accelerator.
        offload_dir (`str`, *optional*):
            An existing folder: the stored tokens lie in files there, without names and gone when the process ends.
        keep (`float` or `str`, defaults to `"all"`):
            `"all"`, or a factor of at least 1: of a longer prompt `keep * token_budget` tokens are kept, by the attention
            its last queries give them, and the others dropped for good (the paper's r; 2, 3 or 5 in its code).
        score (`str`, defaults to `"lowrank_token"`):
            `"lowrank_token"`: each token by the scores its one-byte coordinates predict. `"mean_query"`: sentences by the
            mean of the sentence's queries and their mean key (the paper's). `"current_query"`: the same for the newest
            query alone. `"page_bound"`: pages of 16 by an upper bound of their scores (Quest's).
        max_sentence_tokens (`int`, defaults to 128):
            A sentence ends after so many tokens even without a mark.
        boundary_ids (`list[int]`, *optional*):
            Token ids that end a sentence. Without them and without a tokenizer sentences are blocks of 32 tokens.
        mode (`str`, defaults to `"default"`):
            `"paper"` is the paper's algorithm to the letter, every token's score masked rather than skipped: slow, for
            comparison. It needs `keep` as a number and ignores `score`, `refresh`, `index_rank` and the offload settings.
        length_threshold (`int`, defaults to 1):
            With `mode="paper"`: a sentence of up to so many queries attends to everything kept.
    """

    keep: float | Literal["all"] = "all"
    score: Literal["lowrank_token", "mean_query", "current_query", "page_bound"] = "lowrank_token"
    max_sentence_tokens: int = 128
    boundary_ids: list[int] | None = None
    mode: Literal["default", "paper"] = "default"
    length_threshold: int = 1

    def validate(self) -> None:
        super().validate()
        number = not isinstance(self.keep, str)
        self.check(not number or self.keep >= 1, "keep", 'must be "all" or at least 1')  # type: ignore[operator]
        self.check(
            1 <= self.max_sentence_tokens <= NEWEST_CANDIDATES,
            "max_sentence_tokens",
            f"must lie in [1, {NEWEST_CANDIDATES}]",
        )
        self.check(self.length_threshold >= 0, "length_threshold", "must not be negative")
        self.check(self.boundary_ids != [], "boundary_ids", "must not be empty; leave it out for blocks of 32 tokens")
        self.check(self.mode != "paper" or number, "keep", 'must be a number with mode="paper", for example 3.0')
        if number:
            kept = int(self.keep * self.token_budget)
            self.check(kept > self.query_window, "query_window", f"must be below keep * token_budget = {kept}")


class SentenceKVLayer(RetrievalLayer):
    """A retrieval layer that knows where sentences end.

    Args:
        model_config (`PreTrainedConfig`), layer_idx (`int`), order (`int`): see `RetrievalLayer`.
        config (`SentenceKVConfig`): settings.
        sentences (`SentenceMap`): shared by the layers of a cache.
    """

    config: SentenceKVConfig
    batch_state = (*RetrievalLayer.batch_state, "asked_sum", "asked_count")

    def __init__(
        self,
        model_config: PreTrainedConfig,
        layer_idx: int,
        order: int,
        config: SentenceKVConfig,
        sentences: SentenceMap,
    ):
        super().__init__(model_config, layer_idx, order, config)
        self.sentences = sentences

    def _clear(self) -> None:
        super()._clear()
        self.asked_sum: Tensor | None = None  # (B, K, D), queries of the sentence being written
        self.asked_count: Tensor | None = None  # (B, 1, 1)

    def kept(self, stored: int) -> int:
        if isinstance(self.config.keep, str):
            return stored
        limit = int(self.config.keep * self.config.token_budget) - self.config.sink_tokens - self.config.recent_tokens
        return min(stored, limit)

    def build_index(self, keys: Tensor, hidden: Tensor | None, places: Tensor) -> Index:
        if self.config.score == "lowrank_token":
            return super().build_index(keys, hidden, places)
        if hidden is not None:
            hidden = hidden.expand(keys.shape[:3])
        if self.config.score == "page_bound":
            return PageIndex(keys, hidden)
        return SentenceIndex(keys, self._sentences_at(places, keys), hidden)

    def extend(self, rows: list[Tensor], hidden: Tensor | None, places: Tensor) -> None:
        if not isinstance(self.index, SentenceIndex):
            super().extend(rows, hidden, places)
            return
        for store, tokens in zip(self.stores, rows):
            store.append(tokens)
        hidden = None if hidden is None else hidden.expand(rows[0].shape[:3])
        self.index.append(rows[0], self._sentences_at(places, rows[0]), hidden)

    def _sentences_at(self, places: Tensor, keys: Tensor) -> Tensor:
        return self.marks_at(self._read().numbers(), places).expand(keys.shape[:3])

    def _read(self) -> SentenceMap:
        """The sentences up to the newest token; those no hook has seen are blocks."""
        self.sentences.reach(self.seen, self.batch_size, self.device)
        return self.sentences

    def forced(self, candidates: Tensor | None, shape: torch.Size) -> Tensor | None:
        """The sentence being written."""
        length = self._read().open_length(self.batch_size, self.device)
        if not bool((length > self.newest).any()):
            return None
        return self.places_of(candidates, shape) >= (self.seen - length)[:, None, None]

    def reopened(self) -> Tensor | None:
        ends = self._read().ends
        return None if ends is None else ends[:, self.seen - 1]

    def observe(self, context: dict[str, Any]) -> None:
        super().observe(context)
        if self.config.score != "mean_query":
            return
        query = context["query"]
        kv_heads = self.full[0].data.shape[1]
        fresh = query.unflatten(1, (kv_heads, -1)).float().mean((2, 3))
        ends = self._read().ends
        started = ends[:, self.seen - 2, None, None]
        if self.asked_sum is None or self.asked_count is None or query.shape[2] > 1:
            self.asked_sum, self.asked_count = fresh, torch.ones_like(started, dtype=torch.float32)
            return
        self.asked_sum = torch.where(started, fresh, self.asked_sum + fresh)
        self.asked_count = torch.where(started, torch.ones_like(self.asked_count), self.asked_count + 1)

    def scores(self, rows: Tensor, length: int) -> tuple[Tensor, Tensor | None]:
        if self.asked_sum is None or self.asked_count is None:
            return super().scores(rows, length)
        return self.index.score((self.asked_sum / self.asked_count)[:, :, None])

    def _importance(self, key: Tensor, context: dict[str, Any] | None, places: Tensor | None = None) -> Tensor:
        """See `RetrievalLayer._importance`; the sentence being written is kept in any case."""
        scores = super()._importance(key, context, places)
        start = self.seen - self._read().open_length(self.batch_size, self.device)
        stand = torch.arange(scores.shape[2], device=scores.device)[None, None] if places is None else places
        return scores.masked_fill(stand >= start[:, None, None], torch.inf)

    @property
    def dropped(self) -> bool:
        return bool(self.stores) and self.stored + self.full[0].length < self.seen

    def can_attend(self, query: Tensor) -> bool:
        return self.dropped or super().can_attend(query)

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> Tensor:
        if query.shape[2] <= MAX_IN_SPACE_ROWS or not self.stores:
            return super().attend(query, mask, scaling, softcap)
        return self._attend_to_all(query, scaling, softcap)

    def _attend_to_all(self, query: Tensor, scaling: float, softcap: float | None) -> Tensor:
        """A long block attends to everything kept, some rows at a time."""
        key, value = self.full
        heads, kv_heads = query.shape[1], key.data.shape[1]
        visible: Any = self._visible(query.shape[2])
        stored = [all_rows(store).contiguous() for store in self.stores]
        hidden = self._hidden_at(self.places_of(None, stored[0].shape))
        shown = None if hidden is None else ~hidden[:, :, None, None]
        outputs = []
        for start in range(0, query.shape[2], MAX_IN_SPACE_ROWS):
            part = query[:, :, start : start + MAX_IN_SPACE_ROWS]
            rows = group_rows(part, kv_heads) * scaling
            seen = visible.expand(-1, -1, -1, query.shape[2], -1)[..., start : start + part.shape[2], :]
            parts = [
                Segment(rows, key.data, value.data, key.length, seen),
                Segment(rows, stored[0], stored[1], stored[0].shape[2], shown),
            ]
            outputs.append(ungroup_rows(segment_attention(parts, heads // kv_heads, softcap), heads))
        return torch.cat(outputs, dim=1)

    def settle(self, context: dict[str, Any] | None) -> None:
        super().settle(context)
        block = context is not None and context["query"].shape[2] > 1 and not self.record_past
        if block and self.stores and self.kept(self.stored) + CHUNK < self.stored:
            self._keep_best(context)

    def _keep_best(self, context: dict[str, Any] | None) -> None:
        """After a block: chooses anew what to keep, among everything still stored."""
        rows = [all_rows(store) for store in self.stores]
        places = self.places_of(None, rows[0].shape).long()
        scores = self._importance(rows[0], context, places)
        hidden = self._hidden_at(places)
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        best = scores.topk(self.kept(self.stored), dim=-1).indices.sort(-1).values
        places = places.expand(-1, rows[0].shape[1], -1).gather(2, best)
        self.restore(rows, best, places)


class SentenceKVCache(RetrievalCache):
    """Cache that attends to a fixed number of tokens (arXiv 2504.00970).

    Args:
        model (`PreTrainedModel` or `PreTrainedConfig`):
            See `KVCache`. Where attention does not run inside the cache, all tokens are attended to.
        config (`SentenceKVConfig` or `dict`, *optional*): settings; the defaults otherwise.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): its vocabulary says which tokens end a sentence.

    Raises:
        `UnsupportedModelError`: an encoder-decoder or ALiBi model, or one with no full-attention layer.
        `ConfigError`: settings that contradict each other, boundary ids that are not the tokenizer's, or an `offload_dir`
            that cannot be written to.

    Example:
        ```python
        import hf_ext
        cache = hf_ext.SentenceKVCache(model, hf_ext.SentenceKVConfig(token_budget=512), tokenizer)
        model.generate(**inputs, past_key_values=cache)
        ```
    """

    config_class = SentenceKVConfig
    config: SentenceKVConfig

    def __init__(
        self,
        model: PreTrainedModel | PreTrainedConfig,
        config: SentenceKVConfig | dict[str, Any] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        self._tokenizer = tokenizer
        super().__init__(model, config)
        self._tokenizer = None  # the sentences know its marks

    def prepare(self, decoder: PreTrainedConfig, layers: int) -> None:
        super().prepare(decoder, layers)
        if self.config.mode == "paper" and getattr(decoder, "attn_logit_softcapping", None) is not None:
            raise UnsupportedModelError(
                f'SentenceKVConfig(mode="paper") does not serve {decoder.model_type}, whose logits are soft-capped; use '
                'mode="default".'
            )
        given: Collection[int] | None = self.config.boundary_ids
        ids = resolve_boundaries(self._tokenizer, given, decoder.vocab_size)
        if ids is None:
            warn_once(
                _logger,
                "SentenceKVCache was given neither a tokenizer nor boundary_ids: sentences are blocks of 32 tokens. Pass "
                'tokenizer=..., or cache_config={"boundary_ids": hf_ext.sentence_boundary_ids(tokenizer)} to generate.',
            )
        paper = self.config.mode == "paper"  # its sentences end at marks alone
        self.sentences = SentenceMap(ids, sys.maxsize if paper else self.config.max_sentence_tokens)

    def make_layer(self, model_config: PreTrainedConfig, layer_idx: int, order: int) -> KVLayer:
        if self.config.mode == "paper":
            return PaperLayer(model_config, layer_idx, self.config, self.sentences)
        return SentenceKVLayer(model_config, layer_idx, order, self.config, self.sentences)

    def observe_tokens(self, ids: Tensor | None, batch: int, count: int, mask: Tensor | None) -> None:
        seen = self.kv_layers[0].seen
        self.sentences.crop(seen)
        real = None
        if mask is not None and mask.dim() == 2 and mask.shape[1] >= seen + count:
            real = mask[:, seen : seen + count].bool()
        source = mask if ids is None else ids
        if self.sentences.length == seen and source is not None:
            self.sentences.extend(count, batch, source.device, ids, real)

    def shared_tensors(self) -> list[Tensor]:
        return self.sentences.tensors()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.sentences.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.sentences.reorder(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = self.batch_size
        super().batch_repeat_interleave(repeats)
        if rows > 0:
            self.sentences.reorder(torch.arange(rows).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.sentences.crop(self.kv_layers[0].seen)

    def reset(self) -> None:
        super().reset()
        self.sentences.reset()
