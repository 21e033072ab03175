"""Peers of the retrieval caches, re-implemented small and plainly: one function per method on one layer's prompt.

A peer looks at a `Prompt` once and returns a `Selector`: a score of every middle token for every query that follows, one
for all query heads of a key/value head. The best `selected` middle tokens are attended to, beside the first `SINKS` and
the last `RECENT` of the prompt and everything generated since. All peers are told the same number, so all read the same
number of full-rank tokens; what differs is how they choose, and what the choice costs to store and to read.

Nothing here is fast and nothing is shared with the product code, on purpose: a fault in one cannot hide in the other.
Bytes follow the convention of `peers.py`, that of a 16-bit model. Batches of one.

Shapes: H query heads, K key/value heads, G = H / K, n prompt tokens, M = n - SINKS - RECENT middle tokens, m queries that
follow the prompt, d head dim, r rank.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


sys.path.insert(0, str(Path(__file__).resolve().parent))
from peers import (  # noqa: E402
    ELEMENT,
    INDEX,
    RECENT,
    SINKS,
    WINDOW,
    LayerPrompt,
    eigenbasis,
    rope,
    unrope,
    window_attention,
)


PAGE = 16  # Quest
CHUNK, KEY_RANK = 8, 1 / 6  # ShadowKV: 160 of 1024 there
OUTLIERS = 48 / 304  # share of its chunks that ShadowKV spends on those without a good landmark
FACTOR = 3  # SentenceKV keeps this many times the budget


@dataclass
class Prompt(LayerPrompt):
    """`LayerPrompt` with all queries, and what SentenceKV needs to know of the text.

    Args:
        boundary: where a token ends a sentence, `(n + m,)`, boolean: the prompt and the tokens that follow.
    """

    boundary: Tensor | None = None


@dataclass
class Selector:
    """How a method chooses on one layer.

    Args:
        score: queries `(1, H, m, d)` to scores `(K, m, M)`; higher is better, minus infinity is never taken.
        index: bytes that a step reads in order to choose.
        stored: bytes of everything kept, in whatever memory: keys, values, index.
        keys: `(1, K, n, d)`, what attention sees where that is not the prompt's keys.
    """

    score: Callable[[Tensor], Tensor]
    index: float
    stored: float
    keys: Tensor | None = None


def choose(selector: Selector, queries: Tensor, selected: int) -> Tensor:
    """The middle tokens that every query attends to, `(K, m, M)`, boolean."""
    score = selector.score(queries)
    best = score.topk(min(selected, score.shape[-1]), -1).indices
    return torch.zeros(score.shape, dtype=torch.bool).scatter_(-1, best, True) & (score > float("-inf"))


def grouped(queries: Tensor, kv_heads: int) -> Tensor:
    """`(1, H, m, d)` to `(K, G, m, d)`."""
    return queries[0].unflatten(0, (kv_heads, -1))


def middle(state: LayerPrompt, x: Tensor) -> Tensor:
    """The middle of `(1, K, n, d)`, `(K, M, d)`."""
    return x[0, :, SINKS : state.k.shape[2] - RECENT]


def tokens_bytes(state: LayerPrompt, tokens: float) -> float:
    """Bytes of `tokens` keys and values in every head."""
    return state.k.shape[1] * tokens * 2 * state.k.shape[-1] * ELEMENT


def mean_probability(state: LayerPrompt, q: Tensor, logits: Tensor, whole_prompt: bool) -> Tensor:
    """Attention to middle tokens averaged over the group, from `q` `(K, G, m, d)` and `(K, G, m, M)`: `(K, m, M)`.

    With `whole_prompt` it is the share of the attention to the prompt, whose other tokens are always at hand: a head that
    looks there has little say. This chooses better than shares of the middle (loss), which catch more of them (mass).
    """
    tokens = logits.shape[-1]
    if whole_prompt:
        others = torch.cat([state.k[0, :, :SINKS], state.k[0, :, -RECENT:]], 1)
        logits = torch.cat([logits, torch.einsum("kgmd,knd->kgmn", q, others) * q.shape[-1] ** -0.5], -1)
    return logits.softmax(-1)[..., :tokens].mean(1)


def in_pieces(keys: Tensor, size: int) -> Tensor:
    """Middle keys `(K, M, d)` in pieces `(K, P, size, d)`; the last key fills the last piece up."""
    rest = -keys.shape[1] % size
    return torch.cat([keys, keys[:, -1:].expand(-1, rest, -1)], 1).unflatten(1, (-1, size))


def _static(state: Prompt, score: Tensor, selected: int, index: float) -> Selector:
    """Chosen once for all: `score` is `(K, M)`, and the tokens that are not chosen are gone."""
    stored = tokens_bytes(state, SINKS + RECENT + selected) + index
    return Selector(lambda q: score[:, None].expand(-1, q.shape[2], -1), index, stored)


def oracle(state: Prompt, selected: int, whole_prompt: bool = True) -> Selector:
    """The tokens with the largest true attention: what reading every key would choose."""
    keys, scale = middle(state, state.k), state.k.shape[-1] ** -0.5

    def score(queries: Tensor) -> Tensor:
        q = grouped(queries, keys.shape[0])
        return mean_probability(state, q, torch.einsum("kgmd,knd->kgmn", q, keys) * scale, whole_prompt)

    return Selector(score, keys.numel() * ELEMENT, tokens_bytes(state, state.k.shape[2]))


def snapkv(state: Prompt, selected: int) -> Selector:
    """Tokens that the last 32 queries attend to, max-pooled over 7 neighbours; chosen when the prompt ends."""
    score = F.max_pool1d(window_attention(state), 7, 1, 3)[0, :, SINKS:-RECENT]
    return _static(state, score, selected, state.k.shape[1] * selected * INDEX)


def streaming_llm(state: Prompt, selected: int) -> Selector:
    """Sinks and the most recent tokens, which here fill the budget."""
    age = torch.arange(state.k.shape[2] - SINKS - RECENT, dtype=state.k.dtype)
    return _static(state, age.expand(state.k.shape[1], -1), selected, 0)


def quest(state: Prompt, selected: int) -> Selector:
    """Pages of 16 tokens by the bound of `q . k` from their smallest and largest coordinates.

    A page's score is the largest bound of the group's heads. No layer is exempt (the authors leave the first two dense).
    """
    pages = in_pieces(middle(state, state.k), PAGE)
    low, high, tokens = pages.amin(2), pages.amax(2), state.k.shape[2] - SINKS - RECENT

    def score(queries: Tensor) -> Tensor:
        q = grouped(queries, low.shape[0])
        bound = torch.einsum("kgmd,kpd->kgmp", q.clamp_min(0), high)
        bound += torch.einsum("kgmd,kpd->kgmp", q.clamp_max(0), low)
        return bound.amax(1).repeat_interleave(PAGE, -1)[..., :tokens]

    index = 2 * low.numel() * ELEMENT
    return Selector(score, index, tokens_bytes(state, state.k.shape[2]) + index)


def pca_index(state: Prompt, selected: int, share: float, whole_prompt: bool = True) -> Selector:
    """Tokens by their attention computed from coordinates: uncentred PCA of the rotated keys, rank `share * d`."""
    keys, d = middle(state, state.k), state.k.shape[-1]
    basis = eigenbasis(keys)[..., : int(share * d)]
    coordinates = keys @ basis

    def score(queries: Tensor) -> Tensor:
        q = grouped(queries, keys.shape[0])
        logits = torch.einsum("kgmr,knr->kgmn", torch.einsum("kgmd,kdr->kgmr", q, basis), coordinates) * d**-0.5
        return mean_probability(state, q, logits, whole_prompt)

    index = (coordinates.numel() + basis.numel()) * ELEMENT
    return Selector(score, index, tokens_bytes(state, state.k.shape[2]) + index)


def shadowkv(state: Prompt, selected: int) -> Selector:
    """Chunks of 8 by their mean rotated key; keys of chosen chunks rebuilt from one low-rank basis before RoPE.

    The basis spans the keys of all heads side by side, at the share of their width that the authors use. The chunks whose
    mean is far from one of their keys are kept exactly and always attended to, in the authors' share of the chunks; here
    they are inside the budget. Sinks and the prompt's last tokens are exact, values too.
    """
    keys = middle(state, state.k)
    kv_heads, tokens, d = keys.shape
    chunks = in_pieces(keys, CHUNK)
    landmarks = chunks.mean(2)
    fit = F.cosine_similarity(chunks, landmarks[:, :, None], dim=-1).amin(-1)
    number = round(OUTLIERS * selected / CHUNK)
    outlier = torch.zeros(fit.shape, dtype=torch.bool).scatter_(-1, (-fit).topk(number, -1).indices, True)
    exact = outlier.repeat_interleave(CHUNK, -1)[:, :tokens]

    flat = unrope(state.k, state.cos, state.sin)[0].transpose(0, 1).flatten(1)
    rank = round(KEY_RANK * kv_heads * d)
    basis = eigenbasis(flat)[:, :rank]
    rebuilt = rope((flat @ basis @ basis.mT).unflatten(1, (kv_heads, d)).transpose(0, 1)[None], state.cos, state.sin)
    seen = state.k.clone()
    seen[0, :, SINKS : SINKS + tokens] = torch.where(exact[..., None], keys, middle(state, rebuilt))

    def score(queries: Tensor) -> Tensor:
        logits = torch.einsum("kgmd,kcd->kgmc", grouped(queries, kv_heads), landmarks) * d**-0.5
        best = logits.masked_fill(outlier[:, None, None], float("-inf")).softmax(-1).amax(1)
        best = best.masked_fill(outlier[:, None], float("inf"))
        return best.repeat_interleave(CHUNK, -1)[..., :tokens]

    low = (flat.shape[0] * rank + basis.numel()) * ELEMENT
    full = kv_heads * (SINKS + RECENT + number * CHUNK) * d * ELEMENT
    index = landmarks.numel() * ELEMENT
    return Selector(score, index, index + low + full + state.v.numel() * ELEMENT, seen)


def sentencekv(state: Prompt, selected: int) -> Selector:
    """SentenceKV as published, but with one set of tokens per key/value head: the selection alone.

    Of the prompt three times the budget is kept, as SnapKV would. Sentences are ranked by the product of the mean query
    of the sentence being written with the mean of their kept keys, and give their tokens in order until the budget is
    full. Where the method would attend to everything kept, having no query of a new sentence yet, the current query
    stands in, so that the budget holds.
    """
    kv_heads, n, d = state.k.shape[1:]
    stay = min(int(FACTOR * (SINKS + RECENT + selected)) - WINDOW, n - WINDOW)
    importance = F.max_pool1d(window_attention(state)[..., : n - WINDOW], 7, 1, 3)[0]
    kept = torch.ones(kv_heads, n, dtype=torch.bool)
    kept[:, : n - WINDOW] = False
    kept.scatter_(-1, importance.topk(stay, -1).indices, True)

    ends = state.boundary[:n].long()
    sentence = ends.cumsum(0) - ends
    member = F.one_hot(sentence).to(state.k.dtype) * kept[..., None]  # (K, n, S)
    means = member.mT @ state.k[0] / member.sum(1).clamp_min(1)[..., None]
    position = torch.arange(SINKS, n - RECENT)

    def score(queries: Tensor) -> Tensor:
        current = grouped(queries, kv_heads).mean(1)
        averages, since = [], 0
        for row in range(current.shape[1]):
            closed = bool(state.boundary[n + row])
            averages.append(current[:, row] if closed else current[:, since : row + 1].mean(1))
            since = row + 1 if closed else since
        rank = (torch.stack(averages, 1) @ means.mT).argsort(-1, descending=True).argsort(-1)
        order = rank[..., sentence[position]] * n + position
        return (-order.float()).masked_fill(~kept[:, None, position], float("-inf"))

    index = means.numel() * ELEMENT
    return Selector(score, index, tokens_bytes(state, stay + WINDOW) + index)


SELECTORS: dict[str, Callable[[Prompt, int], Selector]] = {
    "oracle top tokens": oracle,
    "snapkv": snapkv,
    "quest": quest,
    "streamingllm": streaming_llm,
    "pca index d/4": partial(pca_index, share=1 / 4),
    "pca index d/8": partial(pca_index, share=1 / 8),
    "shadowkv-like": shadowkv,
}
# Where only the choice is judged, by the share of the middle's attention. The published method runs for real elsewhere.
SELECTIONS = SELECTORS | {
    "oracle top tokens": partial(oracle, whole_prompt=False),
    "pca index d/4": partial(pca_index, share=1 / 4, whole_prompt=False),
    "pca index d/8": partial(pca_index, share=1 / 8, whole_prompt=False),
    "sentencekv paper": sentencekv,
}
