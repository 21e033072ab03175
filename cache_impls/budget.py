"""How a byte budget becomes ranks: per layer as its prompt comes in, or over all layers once the last one ran.

Every byte counts: full-rank tokens, coordinates, bases, their eigenvalues, anchor positions and the slack of storage
that grows by pages. Used by `ojakv.py`; the rule that shares ranks by eigenvalue is `subspace.water_fill`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from hf_ext.cache_impls import subspace
from hf_ext.cache_impls.base import padded_rows
from hf_ext.errors import ConfigError
from hf_ext.log import get_logger, warn_once


if TYPE_CHECKING:
    from hf_ext.cache_impls.ojakv import OjaKVConfig
    from hf_ext.cache_impls.ojakv_layer import OjaKVLayer

# Part of the budget that goes to anchors unless `anchor_ratio` says otherwise: 0.95 less 0.6 times the budget's share of
# the dense bytes. The optimum is flat; it was found near 0.6 of the budget at a share of 0.6, and above 0.7 at 0.4.
ANCHOR_PART = (0.95, 0.6)
UNBUDGETED_ANCHORS = 0.05  # of the tokens, where ranks are set instead of bytes

_logger = get_logger(__name__)


@dataclass
class Prompt:
    """The tokens a layer is about to compress, and what is known of them.

    Args:
        key (`Tensor`), value (`Tensor`): `(B, K, N, D)`, as the model made them.
        queries (`Tensor`, *optional*): `(B, H, N, D)`, of all tokens, where they are known.
        hidden (`Tensor`, *optional*): boolean `(B, N)`, padding.
        scaling (`float`): of the logits.
        low_key (`Tensor`): `(B, K, N, D)`, the keys in the space they are compressed in.
        bases (`list[Tensor]`): full eigenvector matrices of keys and values, `(B, K, D, D)`.
        spectra (`list[Tensor]`): their eigenvalues, descending, `(B, K, D)`.
    """

    key: Tensor
    value: Tensor
    queries: Tensor | None
    hidden: Tensor | None
    scaling: float
    low_key: Tensor
    bases: list[Tensor] = field(default_factory=list)
    spectra: list[Tensor] = field(default_factory=list)

    @property
    def valid(self) -> Tensor | None:
        return None if self.hidden is None else ~self.hidden


class RankBudget:
    """Turns the config's budget into ranks; one per cache, shared by its layers.

    Args:
        config (`OjaKVConfig`): the budget.
        layers (`int`): full-attention layers it is divided among.
    """

    def __init__(self, config: OjaKVConfig, layers: int):
        self.config, self.layers = config, layers
        self.waiting: list[tuple[OjaKVLayer, Prompt]] = []
        # Length of the whole prompt, where it is known to come in chunks: ranks are made for that length.
        self.expected = 0

    def anchors(self, length: int, full: int, share: float | None) -> int:
        """Anchors among `length` tokens of which `full` are kept anyway, when they may take `share` of their bytes."""
        ratio = self.config.anchor_ratio
        if ratio is None and share is not None:
            part = ANCHOR_PART[0] - ANCHOR_PART[1] * share
            return min(max(0, int(part * (share * length - full))), length - full)
        return int((UNBUDGETED_ANCHORS if ratio is None else ratio) * (length - full))

    def share(self, prompt: Prompt) -> float | None:
        """The budget as a share of the dense bytes; `None` where the config sets ranks instead."""
        return self.config.ratio if self.config.max_bytes is None else self.byte_share(prompt)

    def worth_trying(self, length: int, recent: int) -> bool:
        """Whether there is a token to compress at all."""
        return self.config.ratio != 1 and length > self.config.sink_tokens + recent

    def ranks(self, prompt: Prompt, recent: int, must_fit: bool = False) -> tuple[int, int] | None:
        """Ranks of one layer's keys and values, or `None` where compression would not save bytes.

        Args:
            prompt (`Prompt`): its shapes and spectra are read.
            recent (`int`): newest tokens kept at full rank.
            must_fit (`bool`, defaults to `False`): raise `ConfigError` where `max_bytes` is too small for the prompt.
        """
        config, (key_dim, value_dim) = self.config, (prompt.key.shape[-1], prompt.value.shape[-1])
        dense, fixed, costs = self.layer_bytes(prompt, recent)
        if config.energy is not None:
            ranks = [subspace.energy_rank(spectrum, config.energy) for spectrum in prompt.spectra]
        elif config.key_ratio is not None and config.value_ratio is not None:
            ranks = [max(1, round(config.key_ratio * key_dim)), max(1, round(config.value_ratio * value_dim))]
        else:
            share = self.share(prompt) or 0.0
            if share >= 1:
                return None
            left = share * dense - fixed
            if config.allocation == "equal":
                rank = max(int(left / sum(costs)), 0)
                extra = rank * sum(costs) + costs[1] <= left
                ranks = [min(rank, key_dim), min(rank + extra, value_dim)]
            else:
                ranks = subspace.water_fill([s.mean((0, 1)) for s in prompt.spectra], costs, left)
            if config.ratio is None and min(ranks) < 1 and not must_fit:
                return None
            ranks = self.at_least(ranks, share, key_dim, value_dim, prompt.key.shape[2])
        if fixed + sum(rank * cost for rank, cost in zip(ranks, costs)) >= dense:
            return None
        return ranks[0], ranks[1]

    def at_least(self, ranks: list[int], share: float, key_dim: int, value_dim: int, length: int) -> list[int]:
        """Under `ratio`, half of the rank a long prompt would get: the fixed parts must not ruin a short one."""
        config = self.config
        if config.ratio is None:
            if min(ranks) < 1:
                raise ConfigError(
                    f"OjaKVConfig.max_bytes={config.max_bytes} does not hold the full-rank tokens of a prompt of "
                    f"{length} tokens; raise it, or lower sink_tokens, recent_tokens or anchor_ratio."
                )
            return ranks
        anchors = self.anchors(length, 0, share) / length
        floor = max(share - anchors, 0) / (1 - anchors) / 2 if config.allocation == "equal" else 0
        floors = [max(1, round(floor * dim)) for dim in (key_dim, value_dim)]
        if any(rank < least for rank, least in zip(ranks, floors)):
            warn_once(
                _logger,
                f"ojakv: a prompt of {length} tokens is too short for ratio={config.ratio} with {config.sink_tokens} sinks "
                f"and {config.recent_tokens} newest tokens; the cache will be larger.",
            )
        return [max(rank, least) for rank, least in zip(ranks, floors)]

    def layer_bytes(self, prompt: Prompt, recent: int) -> tuple[int, int, list[float]]:
        """Per batch row and head: bytes of the dense cache, of all full-rank tokens, and of one rank of each stream."""
        length, size = max(prompt.key.shape[2], self.expected), prompt.key.element_size()
        marks = 0 if prompt.hidden is None else length + 8 * 3
        dims = prompt.key.shape[-1], prompt.value.shape[-1]
        sinks = self.config.sink_tokens
        anchors = self.anchors(length, sinks + recent, self.share(prompt))
        fixed = padded_rows(sinks + anchors + recent) * sum(dims) * size + anchors * 4 + marks
        low = padded_rows(length - sinks - anchors - recent)
        return length * sum(dims) * size, fixed, [float((low + dim) * size + 4) for dim in dims]

    def byte_share(self, prompt: Prompt) -> float:
        dense = prompt.key.shape[2] * (prompt.key.shape[-1] + prompt.value.shape[-1]) * prompt.key.element_size()
        return (self.config.max_bytes or 0) / (self.layers * dense * prompt.key.shape[0] * prompt.key.shape[1])

    def submit(self, layer: OjaKVLayer, prompt: Prompt) -> None:
        """`allocation="global"`: holds the layer's prompt back until the last one is in, then compresses them all."""
        self.waiting.append((layer, prompt))
        if len(self.waiting) < self.layers:
            return
        waiting, self.waiting = self.waiting, []
        streams, costs, left = [], [], 0.0
        dense_bytes = fixed_bytes = 0
        for owner, held in waiting:
            dense, fixed, cost = self.layer_bytes(held, owner.recent_target)
            dense_bytes, fixed_bytes = dense_bytes + dense, fixed_bytes + fixed
            left += (self.share(held) or 0.0) * dense - fixed
            streams += [s.mean((0, 1)) for s in held.spectra]
            costs += cost
        ranks = subspace.water_fill(streams, costs, left)
        spent = sum(rank * cost for rank, cost in zip(ranks, costs))
        if spent + fixed_bytes >= dense_bytes:
            for owner, held in waiting:
                owner.store_full(held.key, held.value)
            return
        for index, (owner, held) in enumerate(waiting):
            owner.compress(held, (ranks[2 * index], ranks[2 * index + 1]))
