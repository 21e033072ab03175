"""One layer of a retrieval cache: what it attends to, where the other tokens wait, and when they change places.

A short text is kept as it came. Once it is longer than the token budget, the layer holds `[sinks | newest]` and, beside
them, copies of the stored tokens that the latest query asked for. All tokens between sinks and newest are stored, in
memory or on a disk, and an index of `retrieval.py` says which to fetch. `sentencekv.py` and `hybridkv.py` build on it.

Shapes: B batch, H query heads, K key/value heads, G = H / K, Q new tokens, N tokens, M stored tokens, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d
from transformers import PreTrainedConfig

from hf_ext.cache_impls import subspace
from hf_ext.cache_impls.attention import (
    Segment,
    group_rows,
    segment_attention,
    ungroup_rows,
)
from hf_ext.cache_impls.base import KVLayer, RowBuffer, storage_bytes
from hf_ext.cache_impls.packed import attend_rows
from hf_ext.cache_impls.retrieval import (
    PageIndex,
    SentenceIndex,
    TokenIndex,
    best_of_heads,
    query_moment,
    spread_forward,
)
from hf_ext.cache_impls.rows import shown_tokens, split_top, take
from hf_ext.cache_impls.store import CHUNK, OffloadedRows
from hf_ext.config import MethodConfig
from hf_ext.errors import CacheStateError


# Newest tokens that are not stored yet while assisted decoding may take them back, beyond `recent_tokens`.
RECORDED_TOKENS = 64
Index = TokenIndex | PageIndex | SentenceIndex
Store = RowBuffer | OffloadedRows


@dataclass
class RetrievalConfig(MethodConfig):
    """What the settings of all retrieval caches share; see `SentenceKVConfig` and `HybridKVConfig`."""

    token_budget: int = 1024
    sink_tokens: int = 32
    recent_tokens: int = 32
    query_window: int = 32
    refresh: int = 2
    index_rank: int | None = None
    offload_device: str | None = None
    offload_dir: str | None = None

    def validate(self) -> None:
        for field in ("query_window", "refresh"):
            self.check(getattr(self, field) >= 1, field, "must be at least 1")
        for field in ("sink_tokens", "recent_tokens"):
            self.check(getattr(self, field) >= 0, field, "must not be negative")
        self.check(self.index_rank is None or self.index_rank >= 1, "index_rank", "must be at least 1")
        edges = self.sink_tokens + self.recent_tokens
        self.check(
            self.token_budget >= edges + CHUNK,
            "token_budget",
            f"must be at least {edges + CHUNK}: sink_tokens + recent_tokens + {CHUNK}, or nothing is left to retrieve",
        )
        self.check(self.offload_device in (None, "cpu"), "offload_device", "must be 'cpu', or None")
        self.check(
            self.offload_device is None or self.offload_dir is None,
            "offload_dir",
            "cannot be combined with offload_device; set one of them",
        )


class RetrievalLayer(KVLayer):
    """One layer; see the module.

    Args:
        model_config (`PreTrainedConfig`): of the text decoder.
        layer_idx (`int`): the layer's place in the model.
        order (`int`): its place among the full-attention layers.
        config (`RetrievalConfig`): settings.
    """

    batch_state: ClassVar[tuple[str, ...]] = ("chosen", "picked", "shown", "sink_places", "places", "hidden", "moment")

    def __init__(self, model_config: PreTrainedConfig, layer_idx: int, order: int, config: RetrievalConfig):
        super().__init__(model_config, layer_idx)
        self.order, self.config = order, config
        self._clear()

    def _clear(self) -> None:
        self.full: list[RowBuffer] = []  # keys, values: all tokens, or [sinks | newest]
        self.stores: list[Store] = []  # keys, values
        self.slots: list[Tensor] = []  # copies of the chosen rows, keys and values, (B, K, M, D)
        self.index: Any = None  # an `Index`, once tokens are stored
        self.chosen: Tensor | None = None  # (B, K, M), where in the stores they lie
        self.picked: Tensor | None = None  # (B, K, M), where among the candidates of the latest choice
        self.shown: Tensor | None = None  # boolean (B, K, M), which of them take part; None means all
        self.places: Tensor | None = None  # (B, 1 or K, stored), place in the text; None where they follow the sinks
        self.sink_places: Tensor | None = None  # (B, sinks), where rows are padded
        self.hidden: Tensor | None = None  # boolean (B, seen), padding
        self.moment: Tensor | None = None  # (B, K, D, D) of the queries, until an index is fitted to it
        self.sinks, self.newest_block = 0, 0
        self.stale = True  # the choice must not serve another step
        self.broken = False  # a move into the stores failed half way

    # What a cache built on this layer decides.

    def build_index(self, keys: Tensor, hidden: Tensor | None, places: Tensor) -> Index:
        """The index of the stored tokens: keys `(B, K, M, D)`, padding and places in the text `(B, 1 or K, M)`."""
        rank = self.config.index_rank or keys.shape[-1] // 2
        return TokenIndex(keys, rank, self.config.token_budget, hidden, self.moment)

    def extend(self, rows: list[Tensor], hidden: Tensor | None, places: Tensor) -> None:
        """Stores and indexes the keys and values `(B, K, M, D)` of later tokens at `places` `(B, 1, M)`."""
        for store, tokens in zip(self.stores, rows):
            store.append(tokens)
        self.index.append(rows[0], hidden)

    def worth_storing(self, length: int) -> bool:
        """Whether a text of `length` tokens is too long to be kept as it came."""
        return length > self.config.token_budget

    def kept(self, stored: int) -> int:
        """How many of `stored` tokens between sinks and newest are kept."""
        return stored

    def forced(self, candidates: Tensor | None, shape: torch.Size) -> Tensor | None:
        """Boolean `(B, 1 or K, M)`, of the indexed tokens, or of the candidates, those that take part whatever their
        score, beyond the budget."""
        return None

    def reopened(self) -> Tensor | None:
        """Boolean `(B,)`, rows whose choice is renewed before its time."""
        return None

    def scores(self, rows: Tensor, length: int) -> tuple[Tensor, Tensor | None]:
        """What the index answers to the queries of a block, `(B, K, G * Q, D)`, scaled; see `TokenIndex.score`."""
        return self.index.score(rows)

    def retrieved(self, rows: Tensor) -> list[Segment]:
        """Segments of the stored tokens that take part at full rank."""
        if not self.slots or not self.slots[0].shape[2]:
            return []
        shown = None if self.shown is None else self.shown[:, :, None, None]
        return [Segment(rows, self.slots[0], self.slots[1], self.slots[0].shape[2], shown)]

    def remainder(self, rows: Tensor) -> list[Segment]:
        """Segments that stand for the tokens that were not chosen."""
        return []

    # Storage.

    @property
    def recent_target(self) -> int:
        if not self.record_past:
            return self.config.recent_tokens
        return self.config.recent_tokens + max(RECORDED_TOKENS, self.newest_block)

    @property
    def newest(self) -> int:
        return self.full[0].length - self.sinks

    @property
    def stored(self) -> int:
        return self.stores[0].length if self.stores else 0

    def absorb_prompt(self, key: Tensor, value: Tensor, context: dict[str, Any] | None) -> None:
        self._clear()
        self._mark(context, key.shape[2])
        self._remember_queries(context, key.shape[1])
        self.full = [RowBuffer(key), RowBuffer(value)]
        self.broken = True
        self._try_store(context)
        self.broken = False

    def append(self, key: Tensor, value: Tensor) -> None:
        self.newest_block = key.shape[2]
        for buffer, rows in zip(self.full, (key, value)):
            buffer.append(rows)

    def observe(self, context: dict[str, Any]) -> None:
        self._mark(context, context["query"].shape[2])
        if not self.stores:
            self._remember_queries(context, self.full[0].data.shape[1])

    def _mark(self, context: dict[str, Any] | None, new: int) -> None:
        """Notes which of the newest tokens are padding."""
        mask = None if context is None else context["mask"]
        if mask is None:
            if self.hidden is not None:
                self.hidden = torch.nn.functional.pad(self.hidden, (0, self.seen - self.hidden.shape[1]))
            return
        before = self.seen - new
        hidden = ~shown_tokens(mask, before, self.seen)
        if self.hidden is None and not bool(hidden.any()):
            return
        known = hidden.new_zeros(hidden.shape[0], before) if self.hidden is None else self.hidden
        known = torch.nn.functional.pad(known, (0, before - known.shape[1]))
        self.hidden = torch.cat([known, hidden], dim=1)

    def _remember_queries(self, context: dict[str, Any] | None, kv_heads: int) -> None:
        """Second moment of the queries so far, for the index of a text that grows long only later."""
        if context is None:
            return
        new = context["query"].shape[2]
        valid = None if self.hidden is None else ~self.hidden[:, self.seen - new : self.seen]
        fresh = query_moment(context["query"], kv_heads, valid)
        share = new / self.seen
        self.moment = fresh if self.moment is None else self.moment.lerp_(fresh, share)

    def _try_store(self, context: dict[str, Any] | None) -> None:
        """Moves all but sinks and newest tokens into stores, once there are more than the budget."""
        config, length = self.config, self.full[0].length
        movable = (length - config.sink_tokens - self.recent_target) // CHUNK * CHUNK
        if movable < CHUNK or not self.worth_storing(length):
            return
        key, value = (buffer.rows for buffer in self.full)
        batch = key.shape[0]
        places = torch.arange(length, device=key.device).expand(batch, -1)
        sinks = config.sink_tokens
        if self.hidden is None:
            sink_places, middle = places[:, :sinks], places[:, sinks : sinks + movable]
        else:
            pads = self.hidden.long().cumprod(1).sum(1)
            if bool((pads >= length).any()):
                return  # a row that has not begun has no sinks yet
            # Sinks are the first real tokens; the padding before them goes to the store, where it stays hidden.
            start = pads.clamp(max=movable)[:, None]
            slot = places[:, :movable]
            sink_places, middle = start + places[:, :sinks], slot + sinks * (slot >= start)
            self.sink_places = sink_places
        edge = torch.cat([sink_places, places[:, sinks + movable :]], dim=1)
        full = [RowBuffer(take(rows, edge)) for rows in (key, value)]
        self.sinks = sinks
        self.fill(key, value, middle[:, None], context)
        self.full, self.moment, self.slots, self.chosen = full, None, [], None

    def fill(self, key: Tensor, value: Tensor, middle: Tensor, context: dict[str, Any] | None) -> None:
        """Stores and indexes the tokens at `middle` `(B, 1, M)` of all those seen, `(B, K, N, D)`."""
        kept = self.kept(middle.shape[2])
        if kept < middle.shape[2]:
            middle = self._best(self._importance(key, context), middle, kept)
        if self.hidden is not None or middle.shape[1] > 1:
            self.places = middle.to(torch.int32)
        everywhere = middle.expand(-1, key.shape[1], -1)
        self._index_and_store([take(tokens, everywhere) for tokens in (key, value)], middle)

    def _index_and_store(self, rows: list[Tensor], places: Tensor) -> None:
        """Makes index and stores of the keys and values `(B, K, M, D)` that stand at `places` `(B, 1 or K, M)`."""
        self.index = self.build_index(rows[0], self._hidden_at(places), places)
        self.stores = [self.make_store(tokens) for tokens in rows]

    def make_store(self, rows: Tensor) -> Store:
        if self.config.offload_dir is None and rows.device.type == "cpu":
            return RowBuffer(rows)
        return OffloadedRows(rows, self.config.offload_dir)

    def _best(self, scores: Tensor, middle: Tensor, count: int) -> Tensor:
        """The `count` places of `middle` `(B, 1, M)` with the best of the scores `(B, K, N)`, ascending `(B, K, count)`."""
        middle = middle.expand(-1, scores.shape[1], -1)
        scores = scores.gather(2, middle)
        hidden = self._hidden_at(middle)
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        return middle.gather(2, split_top(scores, count)[0])

    def _hidden_at(self, places: Tensor) -> Tensor | None:
        """Padding marks at `places` `(B, 1 or K, M)`."""
        return None if self.hidden is None else self.marks_at(self.hidden, places)

    @staticmethod
    def marks_at(marks: Tensor, places: Tensor) -> Tensor:
        """Of `marks` `(B, N)` those at `places` `(B, 1 or K, M)`."""
        return marks[:, None].expand(-1, places.shape[1], -1).gather(2, places.long())

    def restore(self, rows: list[Tensor], chosen: Tensor, places: Tensor) -> None:
        """Makes stores and index anew of the rows `chosen` `(B, K, M)` of `rows` (keys, values), which stand at `places`."""
        self.places = places.to(torch.int32)
        self._index_and_store([take(tokens, chosen) for tokens in rows], places)
        self.slots, self.chosen, self.shown = [], None, None

    def _importance(self, key: Tensor, context: dict[str, Any] | None, places: Tensor | None = None) -> Tensor:
        """Attention that the last queries give to each token, spread over its neighbours, `(B, K, N)` (SnapKV's).

        `places` `(B, 1 or K, N)` say where the tokens of `key` stand, if those are not all tokens seen.
        """
        if context is None:
            raise CacheStateError(
                f"{type(self).__name__} chooses the tokens to keep by their attention, but attention of this model runs "
                'outside the cache; keep all tokens (keep="all"), or use model.set_attn_implementation("sdpa").'
            )
        queries = context["query"][:, :, -self.config.query_window :]
        if places is None:
            asking = torch.arange(key.shape[2], device=key.device)[-queries.shape[2] :]
            valid = None if self.hidden is None else ~self.hidden
            weights = subspace.token_attention(queries, asking, key, context["scaling"], valid)
        else:
            rows = group_rows(queries, key.shape[1]) * context["scaling"]
            logits = rows @ key.mT
            hidden = self._hidden_at(places)
            if hidden is not None:
                logits = logits.masked_fill(hidden[:, :, None], torch.finfo(logits.dtype).min)
            weights = torch.softmax(logits, dim=-1, dtype=torch.float32).mean(2)
        return max_pool1d(weights, 7, 1, 3)

    def settle(self, context: dict[str, Any] | None) -> None:
        count = (self.newest - self.recent_target) // CHUNK * CHUNK
        if self.stores and count <= 0:
            return
        self.broken = True
        if self.stores:
            self._move(count, context)
        else:
            self._try_store(context)
        self.broken = False

    def after_crop(self) -> None:
        self.newest_block = 0
        self.stale = True

    def _move(self, count: int, context: dict[str, Any] | None) -> None:
        """Moves the oldest `count` of the newest tokens into the stores."""
        batch, start = self.full[0].data.shape[0], self.seen - self.newest
        places = torch.arange(start, start + count, device=self.full[0].data.device).expand(batch, 1, -1)
        rows = [buffer.rows[:, :, self.sinks : self.sinks + count].clone() for buffer in self.full]
        for buffer in self.full:
            buffer.remove(self.sinks, count)
        if self.places is not None:
            added = places.to(torch.int32).expand(-1, self.places.shape[1], -1)
            self.places = torch.cat([self.places, added], dim=2)
        self.extend(rows, self._hidden_at(places), places)
        self.stale = True  # what was moved is to be found again at once

    # Attention.

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> Tensor:
        length, heads = query.shape[2], query.shape[1]
        kv_heads = self.full[0].data.shape[1]
        visible = self._visible(length)
        if not self.stores:
            return attend_rows(self.full[0], self.full[1], query, visible, scaling, softcap)
        rows = group_rows(query, kv_heads) * scaling
        self._renew(rows, length)
        key, value = self.full
        parts = [Segment(rows, key.data, value.data, key.length, visible)]
        parts += self.retrieved(rows) + self.remainder(rows)
        return ungroup_rows(segment_attention(parts, heads // kv_heads, softcap), heads)

    def _visible(self, length: int) -> Tensor | None:
        """Which of `[sinks | newest]` the new tokens see, boolean, for `(B, K, G, Q, N)`; `None` means all."""
        rows, device = self.full[0].length, self.full[0].data.device
        visible = None
        if self.hidden is not None:
            hidden = self.hidden
            if self.stores and self.sink_places is not None:
                sinks = hidden.gather(1, self.sink_places)
                hidden = torch.cat([sinks, hidden[:, self.seen - self.newest :]], dim=1)
            elif self.stores:
                hidden = torch.cat([hidden[:, : self.sinks], hidden[:, self.seen - self.newest :]], dim=1)
            visible = ~hidden[:, None, None, None]
        if length > 1:
            causal = torch.ones(length, rows, dtype=torch.bool, device=device).tril(rows - length)
            visible = causal[None, None, None] if visible is None else visible & causal
        return visible

    def _renew(self, rows: Tensor, length: int) -> None:
        """Chooses stored tokens for the queries `(B, K, G * Q, D)`, unless the last choice still holds.

        Layers take turns: at every step some choose anew, so that no token meets old choices everywhere.
        """
        turn = (self.seen + self.order) % self.config.refresh == 0
        if self.chosen is None or length > 1 or self.stale or turn:
            self._choose(rows, length, None)
            self.stale = False
            return
        again = self.reopened()
        if again is not None and bool(again.any()):
            self._choose(rows, length, again)

    def _choose(self, rows: Tensor, length: int, only: Tensor | None) -> None:
        """Takes the tokens the queries want most; with `only`, boolean `(B,)`, anew for these rows alone."""
        weights, candidates = self.restrict(*self._wanted(rows, length))
        forced = self.forced(candidates, weights.shape)
        allowed = max(0, self.config.token_budget - self.sinks - self.newest - (self.config.refresh - 1))
        if only is not None and self.chosen is not None:
            count = self.chosen.shape[2]
        else:
            count = min(allowed + (0 if forced is None else int(forced.sum(-1).max())), weights.shape[2])
        best, shown = self._best_within(weights, forced, count, allowed)
        self.picked = best
        chosen = best if candidates is None else candidates.gather(2, best)
        if only is not None and self.chosen is not None:
            keep = ~only[:, None, None]
            if shown is not None or self.shown is not None:
                everything = torch.ones_like(chosen, dtype=torch.bool)
                new, old = (everything if x is None else x for x in (shown, self.shown))
                shown = torch.where(keep, old, new)
            chosen = torch.where(keep, self.chosen, chosen)
        self.chosen, self.shown = chosen, shown
        self.slots = [fetch(store, self.store_places(chosen)) for store in self.stores]

    def _wanted(self, rows: Tensor, length: int) -> tuple[Tensor, Tensor | None]:
        """How much the queries want each indexed token, or some candidates, `(B, K, M)`; padding not at all."""
        scores, candidates = self.scores(rows, length)
        hidden = None
        if self.hidden is not None:
            hidden = self.marks_at(self.hidden, self.places_of(candidates, scores[:, :, 0].shape))
            scores = scores.masked_fill(hidden[:, :, None], -torch.inf)  # it must not be the best of a query either
        if isinstance(self.index, SentenceIndex):
            return scores[:, :, 0], candidates
        weights = spread_forward(best_of_heads(scores), self.config.refresh)
        if hidden is not None:
            weights = weights.masked_fill(hidden, -torch.inf)
        return weights, candidates

    def _best_within(
        self, weights: Tensor, forced: Tensor | None, count: int, allowed: int
    ) -> tuple[Tensor, Tensor | None]:
        """The `count` best of the weights, and which of them take part: those forced and `allowed` others."""
        if forced is not None:
            weights = weights.masked_fill(forced, torch.inf)
        ranked = forced is not None or count > allowed
        best = weights.topk(count, dim=-1, sorted=ranked)
        shown = best.values > -torch.inf if self.hidden is not None else None
        if ranked:
            rank = torch.arange(count, device=weights.device)
            if forced is not None:
                rank = rank - forced.sum(-1, keepdim=True)
            within = (rank < allowed).expand_as(best.values)
            shown = within if shown is None else shown & within
        return best.indices, shown

    def restrict(self, weights: Tensor, candidates: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Leaves those tokens out whose rows are not stored; here all are."""
        return weights, candidates

    def store_places(self, chosen: Tensor) -> Tensor:
        """Where in the stores the chosen tokens `(B, K, M)` lie."""
        return chosen

    def places_of(self, candidates: Tensor | None, shape: torch.Size) -> Tensor:
        """Places in the text of the indexed tokens, or of some, `(B, 1 or K, M)`; `shape` is `(B, K, M)`."""
        if self.places is None:
            if candidates is not None:
                return candidates + self.sinks
            device = self.full[0].data.device
            return torch.arange(self.sinks, self.sinks + shape[2], device=device).expand(shape[0], 1, -1)
        if candidates is None:
            return self.places
        return self.places.expand(-1, candidates.shape[1], -1).gather(2, candidates)

    def materialize(self) -> tuple[Tensor, Tensor]:
        if not self.stores:
            return self.full[0].rows, self.full[1].rows
        if self.stored + self.full[0].length < self.seen:
            raise CacheStateError(
                f"{type(self).__name__} dropped {self.seen - self.stored - self.full[0].length} tokens and cannot give all "
                'of them out; keep all tokens (keep="all").'
            )
        return tuple(self._in_order(buffer.rows, all_rows(store)) for buffer, store in zip(self.full, self.stores))  # type: ignore[return-value]

    def _in_order(self, edge: Tensor, middle: Tensor) -> Tensor:
        """`[sinks | newest]` and what stands between them, `(B, K, N, D)`, in the order of the text."""
        if self.sink_places is None or self.places is None:
            return torch.cat([edge[:, :, : self.sinks], middle, edge[:, :, self.sinks :]], dim=2)
        batch, heads, _, dim = edge.shape
        newest = torch.arange(self.seen - self.newest, self.seen, device=edge.device).expand(batch, -1)
        edges = torch.cat([self.sink_places, newest], dim=1)[:, None].expand(-1, heads, -1)
        result = edge.new_empty(batch, heads, self.seen, dim)
        for places, rows in ((edges, edge), (self.places.long().expand(-1, heads, -1), middle)):
            result.scatter_(2, places[..., None].expand(-1, -1, -1, dim), rows)
        return result

    # Bookkeeping.

    def buffers(self) -> list[RowBuffer]:
        return self.full

    def tensors(self) -> list[Tensor]:
        index = [] if self.index is None else self.index.tensors()
        stores = [store.data for store in self.stores if isinstance(store, RowBuffer)]
        return [*(buffer.data for buffer in self.full), *self.slots, *stores, *index, *self.held_state()]

    def tier_bytes(self) -> dict[str, int]:
        row = sum(buffer.row_bytes for buffer in self.full)
        stores = [store for store in self.stores if isinstance(store, RowBuffer)]
        stored = sum(store.length * store.row_bytes for store in stores)
        whole, length = storage_bytes([store.data for store in stores]), self.full[0].length if self.full else 0
        held = storage_bytes([buffer.data for buffer in self.full])
        return {
            "full": 0 if self.stores else length * row,
            "sinks": self.sinks * row,
            "newest": (length - self.sinks) * row if self.stores else 0,
            "retrieved": storage_bytes(self.slots),
            "stored": stored,
            "index": 0 if self.index is None else storage_bytes(self.index.tensors()),
            "marks": storage_bytes([tensor for tensor in self.held_state() if tensor is not self.moment]),
            "state": 0 if self.moment is None else storage_bytes([self.moment]),
            "slack": held - length * row + whole - stored,
        }

    def offloaded_bytes(self) -> int:
        """Bytes of the stored tokens that are kept on a disk or on another device than the model's."""
        return sum(store.length * store.row_bytes for store in self.stores if isinstance(store, OffloadedRows))

    def check_crop(self, count: int) -> None:
        super().check_crop(count)
        held = self.newest if self.stores else self.seen
        if count > held:
            raise CacheStateError(
                f"cannot crop {count} tokens: only the newest {held} can be taken back, older ones are stored and indexed. "
                "Raise recent_tokens, or shorten the candidates of assisted decoding."
            )

    def _drop_newest(self, count: int) -> None:
        for buffer in self.full:
            buffer.remove(buffer.length - count, count)
        if self.hidden is not None:
            self.hidden = self.hidden[:, : self.seen]

    def _select(self, index: Tensor) -> None:
        super()._select(index)
        for store in self.stores:
            store.reorder(index)
        if self.index is not None:
            self.index.reorder(index)
        self.slots = [rows[index] for rows in self.slots]

    def reset(self) -> None:
        super().reset()
        self._clear()


def fetch(store: Store, places: Tensor) -> Tensor:
    """Rows of a store at `places` `(B, K, M)`, `(B, K, M, D)`, where the model computes."""
    return take(store.data, places) if isinstance(store, RowBuffer) else store.gather(places)


def all_rows(store: Store) -> Tensor:
    """All rows of a store, `(B, K, N, D)`, where the model computes."""
    return store.rows if isinstance(store, RowBuffer) else store.rows()
