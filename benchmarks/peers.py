"""Peers of the compressed caches, re-implemented small and plainly: one function per method on one layer's prompt.

They exist because no third-party cache compressor runs on the transformers this suite supports. Nothing here is fast
and nothing is shared with the product code, on purpose: a fault in one cannot hide in the other.

Every peer takes a `LayerPrompt` and a byte ratio and returns what attention would see afterwards (`k`, `v`, `keep`) with
the bytes it would store. Bytes follow one convention for every system, that of a 16-bit model: 2 bytes for an element of
a key, a value, a coordinate or a basis (all are kept in the model's type), 2 for a quantisation scale or offset, 4 for a
token index. Dense is therefore `4 * head_dim` bytes a token and head, and a ratio is a share of that. The arithmetic
itself runs in the dtype it is given (float32 in the benchmark).

Shapes: B batch, H query heads, Hk key/value heads, n prompt tokens, d head dim, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F


ELEMENT, SCALE, BASIS, INDEX = 2, 2, 2, 4
SINKS = RECENT = 32
WINDOW = 32  # queries at the end of the prompt that vote in SnapKV


@dataclass
class LayerPrompt:
    """What one attention layer knows when the prompt has been read.

    Args:
        q: prompt queries after RoPE, `(B, H, n, d)` (or only the last ones, `(B, H, m, d)`).
        k, v: prompt keys after RoPE and values, `(B, Hk, n, d)`.
        cos, sin: rotary tables of the prompt's positions, `(B, n, d)`; only the pre-RoPE peer reads them.
        static: orthonormal eigenbases of other text, keys and values, two tensors `(Hk, d, d)`, best column first.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    static: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass
class Compressed:
    """Keys and values `(B, Hk, n, d)` as attention sees them, the mask of stored tokens (None = all), and the bytes."""

    k: torch.Tensor
    v: torch.Tensor
    keep: torch.Tensor | None
    nbytes: float


def dense_bytes(state: LayerPrompt) -> int:
    return state.k.numel() * 2 * ELEMENT


def dense(state: LayerPrompt, ratio: float = 1.0) -> Compressed:
    return Compressed(state.k, state.v, None, dense_bytes(state))


def _int8(x: torch.Tensor) -> torch.Tensor:
    """One symmetric scale a row (token and head), stored in float16."""
    scale = (x.abs().amax(-1, keepdim=True) / 127).half().to(x.dtype).clamp_min(1e-7)
    return (x / scale).round().clamp(-127, 127) * scale


def _int4(x: torch.Tensor) -> torch.Tensor:
    """One scale and one offset a row, both stored in float16, sixteen levels."""
    low = x.amin(-1, keepdim=True).half().to(x.dtype)
    scale = ((x.amax(-1, keepdim=True) - low) / 15).half().to(x.dtype).clamp_min(1e-7)
    return ((x - low) / scale).round().clamp(0, 15) * scale + low


def int8(state: LayerPrompt, ratio: float | None = None) -> Compressed:
    rows, d = state.k.numel() // state.k.shape[-1], state.k.shape[-1]
    return Compressed(_int8(state.k), _int8(state.v), None, 2 * rows * (d + SCALE))


def int4(state: LayerPrompt, ratio: float | None = None) -> Compressed:
    rows, d = state.k.numel() // state.k.shape[-1], state.k.shape[-1]
    return Compressed(_int4(state.k), _int4(state.v), None, 2 * rows * (d / 2 + 2 * SCALE))


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos[:, None] + rotate_half(x) * sin[:, None]


def unrope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos[:, None] - rotate_half(x) * sin[:, None]


def eigenbasis(x: torch.Tensor) -> torch.Tensor:
    """Eigenvectors of the uncentred covariance of the rows `(..., n, d)`, largest first, `(..., d, d)`."""
    cov = x.mT.double() @ x.double() / x.shape[-2]
    return torch.linalg.eigh(cov).eigenvectors.flip(-1).to(x.dtype)


def rank_for(ratio: float, n: int, d: int) -> tuple[int, int]:
    """Ranks of keys and values that fill `ratio`, with sinks, recent tokens and both bases counted."""
    middle = n - SINKS - RECENT
    budget = ratio * n * 2 * d * ELEMENT - (SINKS + RECENT) * 2 * d * ELEMENT
    total = max(2, min(2 * d, int(budget // (middle * ELEMENT + d * BASIS))))
    return total // 2, total - total // 2


def _project(state: LayerPrompt, rank_k: int, rank_v: int, basis_k, basis_v, pre: bool = False) -> Compressed:
    n, d = state.k.shape[-2:]
    source = unrope(state.k, state.cos, state.sin) if pre else state.k
    low_k, low_v = basis_k[..., :rank_k], basis_v[..., :rank_v]
    k_hat = source @ low_k @ low_k.mT
    if pre:
        k_hat = rope(k_hat, state.cos, state.sin)
    v_hat = state.v @ low_v @ low_v.mT
    k, v = state.k.clone(), state.v.clone()
    middle = slice(SINKS, n - RECENT)
    k[:, :, middle], v[:, :, middle] = k_hat[:, :, middle], v_hat[:, :, middle]
    heads = k.shape[0] * k.shape[1]
    rank = rank_k + rank_v
    full, low = SINKS + RECENT, n - SINKS - RECENT
    return Compressed(k, v, None, heads * (full * 2 * d * ELEMENT + low * rank * ELEMENT + d * rank * BASIS))


def pca_post(state: LayerPrompt, ratio: float) -> Compressed:
    """Exact PCA of the prompt's own rotated keys and of its values."""
    return _project(state, *rank_for(ratio, *state.k.shape[-2:]), eigenbasis(state.k), eigenbasis(state.v))


def pca_pre(state: LayerPrompt, ratio: float) -> Compressed:
    """Exact PCA of the prompt's own keys before RoPE; attention must rebuild and rotate every key."""
    basis = eigenbasis(unrope(state.k, state.cos, state.sin))
    return _project(state, *rank_for(ratio, *state.k.shape[-2:]), basis, eigenbasis(state.v), pre=True)


def pca_static(state: LayerPrompt, ratio: float) -> Compressed:
    """PCA fixed beforehand on other text (Python source code in the benchmark)."""
    return _project(state, *rank_for(ratio, *state.k.shape[-2:]), *state.static)


def oja_literal(state: LayerPrompt, ratio: float, eta: float = 0.1, pool: int = 4) -> Compressed:
    """One step of the published rule, taken literally: raw covariance of mean-pooled rows, eta 0.1, then QR."""
    ranks = rank_for(ratio, *state.k.shape[-2:])
    bases = []
    for x, basis, rank in zip((state.k, state.v), state.static, ranks, strict=True):
        pooled = F.avg_pool1d(x.flatten(0, 1).mT, pool, ceil_mode=True).mT.unflatten(0, x.shape[:2])
        cov = pooled.mT @ pooled / pooled.shape[-2]
        u = basis[..., :rank].expand(x.shape[0], -1, -1, -1)
        step = cov @ u - u @ (u.mT @ cov @ u)
        bases.append(torch.linalg.qr(u + eta * step).Q)
    return _project(state, *ranks, *bases)


def window_attention(state: LayerPrompt) -> torch.Tensor:
    """Mean attention that the last queries give to every prompt token, `(B, Hk, n)`."""
    b, heads, m, d = state.q.shape
    kv_heads, n = state.k.shape[1:3]
    w = min(WINDOW, m)
    q = state.q[:, :, m - w :].reshape(b, kv_heads, heads // kv_heads, w, d)
    logits = torch.einsum("bhgwd,bhnd->bhgwn", q, state.k) * d**-0.5
    future = torch.arange(n) > torch.arange(n - w, n)[:, None]
    return logits.masked_fill(future, float("-inf")).softmax(-1).mean((2, 3))


def _evict(state: LayerPrompt, ratio: float, score: torch.Tensor, quantise: bool = False) -> Compressed:
    """Keep sinks, recent tokens and the best others: as many as the bytes allow, an index counted for each."""
    b, kv_heads, n, d = state.k.shape
    token = 2 * (d + SCALE) if quantise else 2 * d * ELEMENT
    extra = int((ratio * n * 2 * d * ELEMENT - (SINKS + RECENT) * token) // (token + INDEX))
    extra = max(0, min(extra, n - SINKS - RECENT))
    keep = torch.zeros(b, kv_heads, n, dtype=torch.bool)
    keep[..., :SINKS] = keep[..., n - RECENT :] = True
    score = score.masked_fill(keep, float("-inf"))
    keep.scatter_(-1, score.topk(extra, -1).indices, True)
    k, v = (_int8(state.k), _int8(state.v)) if quantise else (state.k, state.v)
    return Compressed(k, v, keep, b * kv_heads * ((SINKS + RECENT + extra) * token + extra * INDEX))


def snapkv(state: LayerPrompt, ratio: float, quantise: bool = False) -> Compressed:
    """Tokens that the last 32 queries attend to, max-pooled over 7 neighbours."""
    score = F.max_pool1d(window_attention(state), 7, 1, 3)
    return _evict(state, ratio, score, quantise)


def streaming_llm(state: LayerPrompt, ratio: float) -> Compressed:
    """Sinks and the most recent tokens."""
    n = state.k.shape[2]
    return _evict(state, ratio, torch.arange(n, dtype=state.k.dtype).expand(state.k.shape[:3]))


def key_norm(state: LayerPrompt, ratio: float) -> Compressed:
    """Tokens with the smallest key norm."""
    return _evict(state, ratio, -state.k.norm(dim=-1))


FIXED = {"dense": dense, "int8 per token": int8, "int4 per token": int4}
AT_RATIO = {
    "pca post-rope": pca_post,
    "pca pre-rope": pca_pre,
    "static pca": pca_static,
    "literal oja": oja_literal,
    "snapkv": snapkv,
    "snapkv + int8": partial(snapkv, quantise=True),
    "streamingllm": streaming_llm,
    "key norm": key_norm,
}
