"""One layer of SentenceKV as its paper has it, for `SentenceKVConfig(mode="paper")`: the reference to compare with.

Paper: https://huggingface.co/papers/2504.00970 (arXiv 2504.00970), and where it is silent the code its authors released.
Every query head keeps its own tokens, `keep * token_budget` of a longer prompt by the attention of the last
`query_window` queries, and sees the first `sink_tokens` and last `recent_tokens` of what it kept, and of the rest the tokens
of the sentences whose mean key answers the mean query best. A step scores every kept token and masks those not chosen, as
the released code does: it saves neither time nor, with grouped heads, memory. Nothing is offloaded.

Shapes: B batch, H query heads, N kept tokens, Q new tokens, S sentences, D head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, pad, scaled_dot_product_attention
from transformers import PreTrainedConfig

from hf_ext.cache_impls.base import KVLayer, RowBuffer, storage_bytes
from hf_ext.cache_impls.rows import leading_pads, shown_tokens, split_top, take
from hf_ext.cache_impls.sentence_map import SentenceMap
from hf_ext.errors import CacheStateError


if TYPE_CHECKING:
    from hf_ext.cache_impls.sentencekv import SentenceKVConfig

POOLED = 7  # neighbours a token shares its importance with


class PaperLayer(KVLayer):
    """One layer; see the module.

    Args:
        model_config (`PreTrainedConfig`), layer_idx (`int`): see `KVLayer`.
        config (`SentenceKVConfig`): settings; `keep` is a number.
        sentences (`SentenceMap`): shared by the layers of a cache.
    """

    batch_state = ("before", "current", "numbers", "sums", "counts", "asked", "asked_count")

    def __init__(
        self, model_config: PreTrainedConfig, layer_idx: int, config: SentenceKVConfig, sentences: SentenceMap
    ):
        super().__init__(model_config, layer_idx)
        self.config, self.sentences = config, sentences
        self.rows: list[RowBuffer] = []  # keys, values, (B, H, N, D)
        self.waiting: Any = None  # a block between `append` and `attend`

    def absorb_prompt(self, key: Tensor, value: Tensor, context: dict[str, Any] | None) -> None:
        if context is None:
            raise CacheStateError(
                'mode="paper" chooses tokens by attention, but attention of this model runs outside the cache; use '
                'mode="default", or model.set_attn_implementation("sdpa").'
            )
        query, length = context["query"], key.shape[2]
        heads, window = query.shape[1], self.config.query_window
        key, value = (states.repeat_interleave(heads // states.shape[1], dim=1) for states in (key, value))
        batch = key.shape[0]
        pads = leading_pads(context["mask"], length)
        places = torch.arange(length, device=key.device).expand(batch, heads, -1)
        room = int(self.config.keep * self.config.token_budget) - window
        hidden = None if pads is None else places < pads[:, None, None]
        if length - window > room:
            scores = importance(query[:, :, -window:], key, context["scaling"], hidden)
            best = split_top(scores, room)[0]
            places = torch.cat([best, places[..., length - window :]], dim=2)
        self.rows = [RowBuffer(take(states, places)) for states in (key, value)]
        # Padding that was kept stands in front: the number of slots before the first real one.
        self.before = torch.zeros_like(places[..., 0]) if hidden is None else hidden.gather(2, places).sum(2)
        self.sentences.reach(self.seen, batch, key.device)
        numbers = self.sentences.numbers()[:, :length]
        self.current = numbers[:, -1] + 1  # (B,), the sentence being written
        self.numbers = numbers[:, None].expand(-1, heads, -1).gather(2, places)  # (B, H, N)
        self.sums = key.new_zeros(batch, heads, int(self.current.max()) + 1, key.shape[3], dtype=torch.float32)
        self.counts = self.sums[..., 0].clone()
        real = torch.ones_like(places) if hidden is None else (~hidden).gather(2, places).long()
        self._add(take(key, places), self.numbers, real.float())
        self.asked = key.new_zeros(batch, heads, key.shape[3], dtype=torch.float32)
        self.asked_count = torch.zeros_like(self.current)

    def _add(self, keys: Tensor, numbers: Tensor, real: Tensor) -> None:
        """Counts keys `(B, H, M, D)` in the means of their sentences."""
        self.sums.scatter_add_(2, numbers[..., None].expand_as(keys), keys.float() * real[..., None])
        self.counts.scatter_add_(2, numbers, real)

    def observe(self, context: dict[str, Any]) -> None:
        mask, new = context["mask"], context["query"].shape[2]
        if mask is None:
            return
        if not bool(shown_tokens(mask, self.seen - new, self.seen).all()):
            raise CacheStateError('mode="paper" does not serve padding behind the prompt; use mode="default".')

    def append(self, key: Tensor, value: Tensor) -> None:
        self.waiting = key, value

    def can_attend(self, query: Tensor) -> bool:
        return True

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> Tensor:
        key, value = (s.repeat_interleave(query.shape[1] // s.shape[1], dim=1) for s in self.waiting)
        self.sentences.reach(self.seen, key.shape[0], key.device)
        ends = self.sentences.ends[:, self.seen - query.shape[2] : self.seen]
        self.waiting = None
        # One token at a time: each may close the sentence the next one asks.
        outputs = [
            self._step(query[:, :, i : i + 1], key[:, :, i : i + 1], value[:, :, i : i + 1], ends[:, i], scaling)
            for i in range(query.shape[2])
        ]
        return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()

    def _step(self, query: Tensor, key: Tensor, value: Tensor, ended: Tensor, scaling: float) -> Tensor:
        """Attention of one token, `(B, H, 1, D)`; `ended` `(B,)` says whether it closes its sentence."""
        for buffer, states in zip(self.rows, (key, value)):
            buffer.append(states)
        number = self.current[:, None, None].expand(-1, key.shape[1], 1)
        self.numbers = torch.cat([self.numbers, number], dim=2)
        self._add(key, number, torch.ones_like(number, dtype=torch.float32))
        self.asked = self.asked + query[:, :, 0].float()
        self.asked_count = self.asked_count + 1
        if bool(ended.any()):
            self.current = self.current + ended.long()
            self.asked = self.asked.masked_fill(ended[:, None, None], 0)
            self.asked_count = self.asked_count.masked_fill(ended, 0)
            if int(self.current.max()) >= self.sums.shape[2]:
                self.sums, self.counts = pad(self.sums, (0, 0, 0, 1)), pad(self.counts, (0, 1))
        visible = self._visible()
        return scaled_dot_product_attention(
            query, self.rows[0].rows, self.rows[1].rows, visible[:, :, None], scale=scaling
        )

    def _visible(self) -> Tensor:
        """Which slots the newest token sees, boolean `(B, H, N)`."""
        config, count = self.config, self.rows[0].length
        slots = torch.arange(count, device=self.sums.device)
        first = self.before[..., None]
        real = slots >= first
        edge = real & ((slots < first + config.sink_tokens) | (slots >= count - config.recent_tokens))
        means = self.sums / self.counts.clamp_min(1)[..., None]
        mean_query = self.asked / self.asked_count.clamp_min(1)[:, None, None]
        scores = (means @ mean_query[..., None])[..., 0]
        rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        closed = self.numbers < self.current[:, None, None]
        # Sentences the mean query answers best first, tokens of a sentence in the order of the text.
        order = rank.gather(2, self.numbers) * count + slots
        none = rank.shape[2] * count
        order = order.masked_fill(~(closed & real & ~edge), none)
        room = min(config.token_budget - config.sink_tokens - config.recent_tokens, count)
        best = order.topk(room, dim=-1, largest=False)
        retrieved = torch.zeros_like(real).expand_as(order).clone().scatter_(2, best.indices, best.values < none)
        everything = (self.asked_count <= config.length_threshold)[:, None, None]
        return torch.where(everything, real, edge | retrieved)

    def materialize(self) -> tuple[Tensor, Tensor]:
        raise CacheStateError('mode="paper" keeps tokens per query head and cannot give them out; use mode="default".')

    def buffers(self) -> list[RowBuffer]:
        return self.rows

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), *self.held_state()] if self.seen else []

    def tier_bytes(self) -> dict[str, int]:
        used = sum(buffer.length * buffer.row_bytes for buffer in self.rows)
        held = sum(buffer.data.shape[2] * buffer.row_bytes for buffer in self.rows)
        return {"full": used, "slack": held - used, "index": storage_bytes(self.held_state()) if self.seen else 0}

    def check_crop(self, count: int) -> None:
        super().check_crop(count)
        if count:
            raise CacheStateError('mode="paper" cannot take tokens back; use mode="default" for assisted decoding.')

    def _drop_newest(self, count: int) -> None:
        raise CacheStateError('mode="paper" cannot take tokens back.')

    def reset(self) -> None:
        super().reset()
        self.rows, self.waiting = [], None


def importance(queries: Tensor, keys: Tensor, scaling: float, hidden: Tensor | None = None) -> Tensor:
    """Attention that the last `w` queries give to the tokens before them, the largest among neighbours.

    Args:
        queries (`Tensor`): `(B, H, w, D)`.
        keys (`Tensor`): `(B, H, N, D)`, of all tokens.
        hidden (`Tensor`, *optional*): boolean `(B, H, N)`, padding.

    Returns:
        `Tensor`: `(B, H, N - w)`, float32.
    """
    window, length = queries.shape[2], keys.shape[2]
    logits = (queries.float() @ keys.float().mT) * scaling
    future = torch.ones(window, length, dtype=torch.bool, device=keys.device).triu(length - window + 1)
    logits = logits.masked_fill(future, -torch.inf)
    if hidden is not None:
        logits = logits.masked_fill(hidden[:, :, None], torch.finfo(logits.dtype).min)
    total = torch.softmax(logits, dim=-1).sum(2)[..., : length - window]
    pooled = max_pool1d(total, POOLED, 1, POOLED // 2)
    return pooled if hidden is None else pooled.masked_fill(hidden[..., : length - window], -torch.inf)
