"""One layer of an `OjaKVCache`: where its tokens are stored, how they are attended to, and when they are compressed.

Paper: https://huggingface.co/papers/2509.21623 (OjaKV). `ojakv.py` has the settings and the cache around the layers,
`subspace.py` the mathematics, `budget.py` the ranks.

Shapes: B batch, H query heads, K key/value heads, N tokens, W query window, M tokens between sinks and newest, D head
dim, R rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hf_ext.cache_impls import subspace
from hf_ext.cache_impls.attention import Segment, group_rows, segment_attention, ungroup_rows
from hf_ext.cache_impls.base import KVLayer, LowRankSegment, RowBuffer, storage_bytes
from hf_ext.cache_impls.budget import Prompt, RankBudget
from hf_ext.cache_impls.rope import Rope
from hf_ext.cache_impls.rows import (
    append_marks,
    leading_pads,
    mark_rows,
    position_shift,
    shown_tokens,
    split_top,
    take,
    visible_rows,
)
from hf_ext.errors import CacheStateError


if TYPE_CHECKING:
    from hf_ext.cache_impls.ojakv import OjaKVConfig

# Newest tokens kept out of compression while assisted decoding may take them back, beyond `recent_tokens`.
RECORDED_TOKENS = 64


class OjaKVLayer(KVLayer):
    """One layer: full-rank rows `[sinks | anchors | newest]`, then low-rank segments in the order of the text.

    Args:
        model_config (`PreTrainedConfig`): of the text decoder.
        layer_idx (`int`): the layer's place in the model.
        config (`OjaKVConfig`): settings.
        budget (`RankBudget`): shared by the layers of a cache.
        rope (`Rope`, *optional*): given when keys are compressed before rotary embedding.
        start (`list[Tensor]`, *optional*): calibrated bases of keys and values, `(K, D, D)`.
    """

    # Where its tokens stand in the text.
    batch_state = ("anchor_positions", "hidden_full", "pads", "sink_start", "shift")

    def __init__(
        self,
        model_config: PreTrainedConfig,
        layer_idx: int,
        config: OjaKVConfig,
        budget: RankBudget,
        rope: Rope | None = None,
        start: list[Tensor] | None = None,
    ):
        super().__init__(model_config, layer_idx)
        self.config, self.budget, self.rope, self.start = config, budget, rope, start
        self.attends_in_space = rope is None
        self.stores_before_prompt = config.prefill == "compressed"
        self._clear()

    def _clear(self) -> None:
        self.full: list[RowBuffer] = []  # keys, values
        self.segments: list[LowRankSegment] = []
        self.sinks, self.anchors, self.tried, self.newest_block = 0, 0, 0, 0
        self.anchor_share: float | None = None  # what the budget made of the config, for tokens to come
        self.anchor_positions: Tensor | None = None  # (B, K, A), ascending
        self.hidden_full: Tensor | None = None  # (B, 1 or K, rows), padding among the first full-rank rows
        self.pads: Tensor | None = None  # (B,), leading padding of each row
        self.sink_start: Tensor | None = None  # (B, 1), place of the first sink where rows are padded
        self.shift: Tensor | None = None  # (B,), place in the text minus position id
        self.spectra: list[Tensor] = []  # (B, K, R) of the bases below, for update_rule="exact"
        self.running: list[Tensor] = []  # bases as the updates move them; those of the newest segment until the first

    @property
    def recent_target(self) -> int:
        if not self.record_past:
            return self.config.recent_tokens
        return self.config.recent_tokens + max(RECORDED_TOKENS, self.newest_block)

    @property
    def recent(self) -> int:
        return self.full[0].length - self.sinks - self.anchors

    def absorb_prompt(self, key: Tensor, value: Tensor, context: dict[str, Any] | None) -> None:
        self._clear()
        self.pads = leading_pads(None if context is None else context["mask"], key.shape[2])
        self.shift = position_shift(context, key.shape[2])
        if not self._try_compress(key, value, context, first=True):
            self.store_full(key, value)

    def append(self, key: Tensor, value: Tensor) -> None:
        self.newest_block = key.shape[2]
        for buffer, rows in zip(self.full, (key, value)):
            buffer.append(rows)

    def settle(self, context: dict[str, Any] | None) -> None:
        self._compress_overflow(context)

    def after_crop(self) -> None:
        self.newest_block = 0
        self._compress_overflow(None)

    def observe(self, context: dict[str, Any]) -> None:
        """Marks new tokens the mask hides: padding goes on where a row has not begun, or stands between two turns."""
        if not self.segments:
            self.shift = position_shift(context, self.seen)
        mask, new = context["mask"], context["query"].shape[2]
        if mask is None:
            return
        hidden = ~shown_tokens(mask, self.seen - new, self.seen)
        if not bool(hidden.any()):
            return
        pads = hidden.new_zeros(hidden.shape[0], dtype=torch.long) if self.pads is None else self.pads
        self.pads = pads + (pads == self.seen - new) * hidden.long().cumprod(-1).sum(-1)
        heads = 1 if self.hidden_full is None else self.hidden_full.shape[1]
        before = self.full[0].length - new
        self.hidden_full = append_marks(self.hidden_full, before, hidden[:, None].expand(-1, heads, -1))

    def store_full(self, key: Tensor, value: Tensor) -> None:
        """Keeps all tokens as they are, until compressing them is worth it."""
        self.full = [RowBuffer(key), RowBuffer(value)]
        if self.pads is not None:
            self.hidden_full = (torch.arange(key.shape[2], device=key.device) < self.pads[:, None])[:, None]

    def _try_compress(self, key: Tensor, value: Tensor, context: dict[str, Any] | None, first: bool = False) -> bool:
        """Compresses everything but the newest tokens if that saves bytes; says whether it did, or will."""
        key, value = key.contiguous(), value.contiguous()
        length, self.tried = key.shape[2], key.shape[2]
        if not self.budget.worth_trying(length, self.recent_target):
            return False
        if self.pads is not None and bool((self.pads >= length).any()):
            return False  # a row that has not begun has no sinks yet
        places = torch.arange(length, device=key.device).expand(key.shape[0], -1)
        hidden = None if self.pads is None else places < self.pads[:, None]
        if self.hidden_full is not None:
            hidden = mark_rows(self.hidden_full, length)[:, 0]
        queries = None if context is None else context["query"]
        scaling = key.shape[-1] ** -0.5 if context is None else context["scaling"]
        prompt = Prompt(key, value, queries, hidden, scaling, self._unrotated(key, places))
        for stream, tokens in enumerate((prompt.low_key, value)):
            if self.start is not None and self.config.update_rule != "exact":
                basis = self.start[stream].to(key.device).expand(key.shape[0], -1, -1, -1)
                spectrum = (basis.mT @ subspace.covariance(tokens, prompt.valid) @ basis).diagonal(dim1=-2, dim2=-1)
            else:
                basis, spectrum = subspace.top_basis(subspace.covariance(tokens, prompt.valid), tokens.shape[-1])
            prompt.bases.append(basis)
            prompt.spectra.append(spectrum)
        if first and self.config.allocation == "global":
            self.budget.submit(self, prompt)
            return True
        ranks = self.budget.ranks(prompt, self.recent_target, must_fit=first)
        if ranks is not None:
            self.compress(prompt, ranks)
        return ranks is not None

    def compress(self, prompt: Prompt, ranks: tuple[int, int]) -> None:
        """Splits the tokens into sinks, anchors, newest and compressed ones, and stores them.

        Args:
            prompt (`Prompt`): all tokens of the layer so far.
            ranks (`tuple[int, int]`): of keys and values.
        """
        config, key, value, pads = self.config, prompt.key, prompt.value, self.pads
        bases = [basis[..., :rank] for basis, rank in zip(prompt.bases, ranks)]
        bases = [self._prompt_step(basis, tokens, prompt) for basis, tokens in zip(bases, (prompt.low_key, value))]
        bases = [basis.to(key.dtype).contiguous() for basis in bases]
        length, sinks = key.shape[2], config.sink_tokens
        middle = length - sinks - self.recent_target
        places = torch.arange(length, device=key.device).expand(key.shape[0], -1)
        if pads is not None:
            # Sinks are the first real tokens; padding before them joins the middle, where it stays hidden.
            start = self.sink_start = pads.clamp(max=middle)[:, None]
            slot = places[:, :middle]
            sink_places, middle_places = start + places[:, :sinks], slot + sinks * (slot >= start)
        else:
            sink_places, middle_places = places[:, :sinks], places[:, sinks : sinks + middle]
        recent_places = places[:, sinks + middle :]
        every = middle_places[:, None].expand(-1, key.shape[1], -1)
        scores = self.anchor_scores(prompt, bases).gather(2, every)
        hidden = None if prompt.hidden is None else prompt.hidden[:, None].expand(-1, key.shape[1], -1)
        if hidden is not None:
            scores = scores.masked_fill(hidden.gather(2, every), -torch.inf)
        self.anchor_share = self.budget.share(prompt)
        count = self.budget.anchors(length, length - middle, self.anchor_share)
        anchor_slots, low_slots = split_top(scores, count)
        anchor_places, low_places = every.gather(2, anchor_slots), every.gather(2, low_slots)
        self.sinks, self.anchors, self.anchor_positions = sinks, count, anchor_places.to(torch.int32)
        self.full = [
            RowBuffer(torch.cat([take(x, sink_places), take(x, anchor_places), x[:, :, sinks + middle :]], dim=2))
            for x in (key, value)
        ]
        rows = [
            RowBuffer(take((x.float() @ basis.float()).to(key.dtype), low_places))
            for x, basis in zip((prompt.low_key, value), bases)
        ]
        low_hidden = self.hidden_full = None
        if hidden is not None:
            low_hidden = hidden.gather(2, low_places)
            edges = [x[:, None].expand(-1, key.shape[1], -1) for x in (sink_places, recent_places)]
            self.hidden_full = hidden.gather(2, torch.cat([edges[0], anchor_places, edges[1]], dim=2))
        self.segments = [LowRankSegment(bases[0], bases[1], rows[0], rows[1], low_hidden)]
        if config.update_rule == "exact":
            self.spectra = [s[..., :rank].clone() for s, rank in zip(prompt.spectra, ranks)]

    def _prompt_step(self, basis: Tensor, tokens: Tensor, prompt: Prompt) -> Tensor:
        """The prompt update of the basis: one step on pooled tokens, or nothing where the basis is the optimum."""
        config = self.config
        if config.update_rule in ("exact", "none") or config.prompt_learning_rate == 0:
            return basis
        matrix = subspace.pooled_covariance(tokens, config.pool_window, self.pads)
        step, rate = subspace.STEPS[config.update_rule], config.prompt_learning_rate
        return step(basis, matrix, rate, config.normalize == "lambda")

    def anchor_scores(self, prompt: Prompt, bases: list[Tensor]) -> Tensor:
        """Scores of all tokens, `(B, K, N)`; see `OjaKVConfig.anchor_score`."""
        kind, window = self.config.anchor_score, self.config.query_window
        if kind == "expected_error":
            error = subspace.relative_residual([prompt.low_key, prompt.value], bases, prompt.valid)
        else:
            error = subspace.residual_norm(prompt.low_key, bases[0])
        if prompt.queries is None or kind == "residual":
            return error
        if kind == "expected_error":
            return error * subspace.expected_attention(
                prompt.queries, window, prompt.key, prompt.scaling, prompt.valid
            )
        last = prompt.queries[:, :, -window:]
        if kind == "logit":
            return subspace.logit_error(last, prompt.low_key, bases[0], prompt.scaling)
        places = torch.arange(prompt.key.shape[2], device=last.device)[-last.shape[2] :]
        attention = subspace.token_attention(last, places, prompt.key, prompt.scaling, prompt.valid)
        return attention if kind == "attention" else attention * error

    def _compress_overflow(self, context: dict[str, Any] | None) -> None:
        """Moves what left the window of newest tokens into the low-rank tier, `update_interval` tokens at a time."""
        interval = self.config.update_interval
        if not self.segments:
            length = self.full[0].length
            if length - self.tried >= interval:
                self._try_compress(self.full[0].rows, self.full[1].rows, context)
            return
        count = self.recent - self.recent_target
        if count < interval:
            return
        first = self.sinks + self.anchors
        tail = [buffer.rows[:, :, first:] for buffer in self.full]
        places = self.seen - self.recent + torch.arange(self.recent, device=tail[0].device)
        low_tail = self._unrotated(tail[0], places.expand(tail[0].shape[0], -1))
        key, value, low_key = (rows[:, :, :count] for rows in (*tail, low_tail))
        places = places[:count].expand(*key.shape[:2], -1)
        hidden_tail = hidden = None
        if self.hidden_full is not None:
            self.hidden_full = mark_rows(self.hidden_full, self.full[0].length).expand(-1, key.shape[1], -1)
            hidden_tail, hidden = self.hidden_full[:, 0, first:], self.hidden_full[:, :, first : first + count]
        self._update_bases([low_key, value], None if hidden is None else ~hidden[:, 0])

        segment = self.segments[-1]
        promoted = self.budget.anchors(count, 0, self.anchor_share)
        queries = None if context is None or context["query"].shape[2] == 1 else context["query"]
        scaling = 1.0 if context is None else context["scaling"]
        newest = Prompt(tail[0], tail[1], queries, hidden_tail, scaling, low_tail)
        scores = self.anchor_scores(newest, [segment.key_basis, segment.value_basis])[..., :count]
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        anchor_slots, low_slots = split_top(scores, promoted)
        if segment.hidden is not None or hidden is not None:
            low_hidden = None if hidden is None else hidden.gather(2, low_slots)
            segment.hidden = append_marks(segment.hidden, segment.key.length, low_hidden)
        segment.key.append(take((low_key.float() @ segment.key_basis.float()).to(key.dtype), low_slots))
        segment.value.append(take((value.float() @ segment.value_basis.float()).to(key.dtype), low_slots))
        new_places = places.gather(2, anchor_slots).to(torch.int32)
        if self.anchor_positions is not None:
            self.anchor_positions = torch.cat([self.anchor_positions, new_places], dim=-1)
        for buffer, tokens in zip(self.full, (key, value)):
            buffer.data[:, :, first : first + promoted] = take(tokens, anchor_slots)
            buffer.remove(first + promoted, count - promoted)
        if self.hidden_full is not None and hidden is not None:
            marks = [
                self.hidden_full[:, :, :first],
                hidden.gather(2, anchor_slots),
                self.hidden_full[:, :, first + count :],
            ]
            self.hidden_full = torch.cat(marks, dim=2)
        self.anchors += promoted

    def _update_bases(self, streams: list[Tensor], valid: Tensor | None) -> None:
        """Moves the running bases by the tokens leaving the window; opens a version where they drifted too far."""
        config, segment = self.config, self.segments[-1]
        if config.update_rule == "none" or (config.update_rule != "exact" and config.decode_learning_rate == 0):
            return
        stored = [segment.key_basis, segment.value_basis]
        running = self.running or [basis.float() for basis in stored]
        for index, tokens in enumerate(streams):
            matrix = subspace.covariance(tokens, valid)
            if config.update_rule == "exact":
                real = torch.full((tokens.shape[0],), float(self.seen), device=tokens.device)
                real = real if self.pads is None else real - self.pads
                keep = (1 - tokens.shape[2] / real.clamp_min(tokens.shape[2])).clamp(max=config.forgetting)
                matrix = subspace.blend(running[index], self.spectra[index], matrix, keep[:, None, None, None])
                running[index], spectrum = subspace.top_basis(matrix, running[index].shape[-1])
                self.spectra[index] = spectrum[..., : running[index].shape[-1]].clone()
            else:
                step, rate = subspace.STEPS[config.update_rule], config.decode_learning_rate
                running[index] = step(running[index], matrix, rate, config.normalize == "lambda")
        self.running = running
        moved = [subspace.drift(old, new) > config.drift_tolerance for old, new in zip(stored, running)]
        if not (moved[0].any() or moved[1].any()):
            return
        # Decided per row and head: what one sequence does must not change another's result.
        fresh = [torch.where(m[..., None, None], b.to(a.dtype), a) for m, a, b in zip(moved, stored, running)]
        if config.coefficients == "rotate" or len(self.segments) >= config.max_versions:
            for buffer, old, new in zip((segment.key, segment.value), stored, fresh):
                buffer.data = (buffer.data.float() @ (old.float().mT @ new.float())).to(buffer.data.dtype)
            segment.key_basis, segment.value_basis = fresh
        else:
            empty = [RowBuffer(basis[:, :, :0]) for basis in fresh]
            self.segments.append(LowRankSegment(fresh[0], fresh[1], empty[0], empty[1]))

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> Tensor:
        key, value = self.full
        kv_heads, length = key.data.shape[1], query.shape[2]
        groups = query.shape[1] // kv_heads
        rows = group_rows(query, kv_heads) * scaling
        parts = [
            Segment(
                query=rows @ segment.key_basis,
                keys=segment.key.data,
                values=segment.value.data,
                length=segment.key.length,
                visible=visible_rows(segment.hidden, segment.key.length),
                expand=segment.value_basis,
            )
            for segment in self.segments
            if segment.key.length
        ]
        visible = visible_rows(self.hidden_full, key.length)
        if length > 1:
            causal = torch.ones(length, key.length, dtype=torch.bool, device=query.device).tril(key.length - length)
            visible = causal[None, None, None] if visible is None else visible & causal
        parts.append(Segment(rows, key.data, value.data, key.length, visible))
        return ungroup_rows(segment_attention(parts, groups, softcap), query.shape[1])

    def materialize(self) -> tuple[Tensor, Tensor]:
        key, value = (buffer.rows for buffer in self.full)
        if not self.segments or self.anchor_positions is None:
            return key, value
        batch, heads, _, _ = key.shape
        places = torch.arange(self.seen, device=key.device).expand(batch, heads, -1)
        sinks = places[..., : self.sinks]
        if self.sink_start is not None:
            sinks = sinks + self.sink_start[:, :, None]
        full_places = torch.cat([sinks, self.anchor_positions.long(), places[..., self.seen - self.recent :]], dim=-1)
        free = torch.ones_like(places, dtype=torch.bool).scatter_(2, full_places, False)
        low_places = free.flatten(0, 1).nonzero()[:, 1].view(batch, heads, -1)
        low_key = torch.cat([s.key.rows @ s.key_basis.mT for s in self.segments], dim=2)
        low_value = torch.cat([s.value.rows @ s.value_basis.mT for s in self.segments], dim=2)
        if self.rope is not None:
            low_key = self.rope.rotate(low_key, self._positions(low_places))

        def place(low: Tensor, full: Tensor) -> Tensor:
            states = full.new_empty(batch, heads, self.seen, full.shape[-1])
            for source, spots in ((low, low_places), (full, full_places)):
                states.scatter_(2, spots[..., None].expand(-1, -1, -1, full.shape[-1]), source)
            return states

        return place(low_key, key), place(low_value, value)

    def _unrotated(self, key: Tensor, places: Tensor) -> Tensor:
        return key if self.rope is None else self.rope.rotate(key, self._positions(places), sign=-1)

    def _positions(self, places: Tensor) -> Tensor:
        """Position ids of places in the text, `(B, N)` or `(B, K, N)`."""
        if self.shift is None:
            return places
        return places - self.shift.view(-1, *[1] * (places.dim() - 1))

    def buffers(self) -> list[RowBuffer]:
        return [*self.full, *self._low_buffers()]

    def _low_buffers(self) -> list[RowBuffer]:
        return [buffer for segment in self.segments for buffer in (segment.key, segment.value)]

    def tensors(self) -> list[Tensor]:
        parts = [*(buffer.data for buffer in self.buffers()), *self.held_state(), *self.spectra, *self.running]
        parts += self.start or []
        return parts + [tensor for segment in self.segments for tensor in segment.tensors()]

    def tier_bytes(self) -> dict[str, int]:
        row = sum(buffer.row_bytes for buffer in self.full)
        bases = [tensor for segment in self.segments for tensor in (segment.key_basis, segment.value_basis)]
        hidden = [segment.hidden for segment in self.segments if segment.hidden is not None]
        return {
            "sinks": self.sinks * row,
            "anchors": self.anchors * row,
            "newest": self.recent * row if self.full else 0,
            "low_rank": sum(buffer.length * buffer.row_bytes for buffer in self._low_buffers()),
            "bases": storage_bytes(bases + (self.start or [])),
            "state": storage_bytes(self.spectra + self.running),
            "index": storage_bytes(self.held_state() + hidden),
            "slack": sum((b.data.shape[2] - b.length) * b.row_bytes for b in self.buffers()),
        }

    def check_crop(self, count: int) -> None:
        super().check_crop(count)
        held = self.recent if self.segments else self.seen
        if count > held:
            raise CacheStateError(
                f"cannot crop {count} tokens: only the newest {held} are still at full rank, older ones are compressed. "
                "Raise recent_tokens, or shorten the candidates of assisted decoding."
            )

    def _drop_newest(self, count: int) -> None:
        for buffer in self.full:
            buffer.remove(buffer.length - count, count)
        self.tried = min(self.tried, self.full[0].length)

    def _select(self, index: Tensor) -> None:
        super()._select(index)
        for segment in self.segments:
            segment.reorder(index)
        self.spectra = [tensor[index] for tensor in self.spectra]
        self.running = [tensor[index] for tensor in self.running]

    def reset(self) -> None:
        super().reset()
        self._clear()
        self.budget.waiting.clear()
