"""The mathematics of OjaKV: bases that follow the text, token scores, and how a byte budget becomes ranks.

Paper: https://huggingface.co/papers/2509.21623 (OjaKV). Pure functions on tensors, float32 inside; `ojakv.py` holds the
state. Tokens are rows: a token `x` of dimension D is stored as its coordinates `x @ U` in an orthonormal basis `U`
`(D, R)` and read back as `(x @ U) @ U.T`.

Shapes: B batch, H query heads, K key/value heads, G = H / K, N tokens, W query window, D head dim, R rank.

Differs from the paper: the paper moves the basis by Oja's rule; `covariance` and `top_basis` give the optimum that rule
approaches, at the cost of one small eigendecomposition, and are the default. Oja's step as printed, with its rate on the
raw covariance, replaces a good subspace by a worse one whenever rate times largest eigenvalue exceeds one, which real
keys exceed a hundredfold; `oja_step` divides by that eigenvalue unless told not to.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


# Queries whose scores over the prompt are formed at a time.
SCORED_QUERIES = 32
# What `expected_attention` grants every token for a question no one has asked yet, in units of an even spread.
PRIOR_ATTENTION = 4.0


def covariance(tokens: Tensor, valid: Tensor | None = None) -> Tensor:
    """Uncentred covariance `X.T X / m`.

    Args:
        tokens (`Tensor`): `(B, K, N, D)`.
        valid (`Tensor`, *optional*): boolean `(B, N)`; tokens marked `False` do not count.

    Returns:
        `Tensor`: `(B, K, D, D)`, float32.
    """
    tokens = tokens.float()
    if valid is None:
        return tokens.mT @ tokens / tokens.shape[2]
    tokens = tokens * valid[:, None, :, None]
    return tokens.mT @ tokens / valid.sum(-1).clamp_min(1)[:, None, None, None]


def mean_pool(tokens: Tensor, window: int, valid: Tensor | None = None) -> Tensor:
    """Means over neighbouring windows of `window` tokens, as the paper feeds its prompt update.

    Args:
        tokens (`Tensor`): `(B, K, N, D)`.
        window (`int`): tokens per mean; the last window averages what it has. Windows without a valid token are zero.
        valid (`Tensor`, *optional*): boolean `(B, N)`.

    Returns:
        `Tensor`: `(B, K, ceil(N / window), D)`, float32.
    """
    batch, heads, length, dim = tokens.shape
    count = torch.ones(batch, length, device=tokens.device) if valid is None else valid.float()
    short = -length % window
    tokens = pad(tokens.float() * count[:, None, :, None], (0, 0, 0, short)).view(batch, heads, -1, window, dim).sum(3)
    count = pad(count, (0, short)).view(batch, 1, -1, window).sum(3)
    return tokens / count.clamp_min(1)[..., None]


def pooled_covariance(tokens: Tensor, window: int, pads: Tensor | None = None) -> Tensor:
    """Covariance of `mean_pool`, with windows that start at each row's first real token.

    Args:
        tokens (`Tensor`): `(B, K, N, D)`.
        window (`int`): tokens per mean.
        pads (`Tensor`, *optional*): `(B,)`, leading padding of each row.

    Returns:
        `Tensor`: `(B, K, D, D)`, float32.
    """
    if pads is None:
        return covariance(mean_pool(tokens, window))
    length, places = tokens.shape[2], torch.arange(tokens.shape[2], device=tokens.device)
    rotated = ((places + pads[:, None]) % length)[:, None, :, None].expand_as(tokens)
    real = length - pads[:, None]
    pooled = mean_pool(tokens.gather(2, rotated), window, places < real)
    return covariance(pooled, places[: pooled.shape[2]] * window < real)


def top_basis(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Eigenvectors of the `rank` largest eigenvalues of a symmetric matrix: the best subspace there is.

    Args:
        matrix (`Tensor`): `(..., D, D)`.

    Returns:
        `tuple[Tensor, Tensor]`: basis `(..., D, rank)` and all eigenvalues, descending, `(..., D)`; float32.
    """
    values, vectors = torch.linalg.eigh(matrix.float())
    return vectors.flip(-1)[..., :rank].contiguous(), values.flip(-1).clamp_min(0)


def orthonormalize(matrix: Tensor) -> Tensor:
    """QR with the signs of R's diagonal moved into Q, so that a small change of the input moves Q a little."""
    q, r = torch.linalg.qr(matrix.float())
    return q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2)


def largest_eigenvalue(matrix: Tensor, steps: int = 4) -> Tensor:
    """A bound on the largest eigenvalue from above, `(..., 1, 1)`: `trace(C^p) ** (1 / p)` with `p = 2 ** steps`."""
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(1e-30)
    power = matrix / trace
    for _ in range(steps):
        power = power @ power
    root = power.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(1e-30) ** (1 / 2**steps)
    return trace * root


def oja_step(basis: Tensor, matrix: Tensor, rate: float, normalize: bool = True) -> Tensor:
    """One step of Oja's rule, `U + rate * (I - U U.T) C U`, made orthonormal again.

    Args:
        basis (`Tensor`): `(..., D, R)`, orthonormal columns.
        matrix (`Tensor`): `(..., D, D)`, covariance C.
        rate (`float`): the paper's eta.
        normalize (`bool`): divide C by a bound of its largest eigenvalue. `False` is the literal rule.
    """
    basis, matrix = basis.float(), matrix.float()
    if normalize:
        matrix = matrix / largest_eigenvalue(matrix)
    moved = matrix @ basis
    return orthonormalize(basis + rate * (moved - basis @ (basis.mT @ moved)))


def hebbian_step(basis: Tensor, matrix: Tensor, rate: float, normalize: bool = True) -> Tensor:
    """`orthonormalize(U + rate * C U)`: Oja's first-order motion as a shifted power step, which cannot overshoot."""
    basis, matrix = basis.float(), matrix.float()
    if normalize:
        matrix = matrix / largest_eigenvalue(matrix)
    return orthonormalize(basis + rate * (matrix @ basis))


# The update rules that move a basis by a step; "exact" takes `top_basis` instead.
STEPS = {"oja": oja_step, "hebbian": hebbian_step}


def blend(basis: Tensor, spectrum: Tensor, matrix: Tensor, keep: Tensor | float) -> Tensor:
    """`keep * C_old + (1 - keep) * matrix` where only the top eigenpairs of `C_old` were kept.

    Args:
        basis (`Tensor`): `(..., D, R)`.
        spectrum (`Tensor`): `(..., R)`, their eigenvalues.
        matrix (`Tensor`): `(..., D, D)`, covariance of the new tokens.
        keep (`float` or `Tensor`): weight of the old covariance (rho), one or broadcastable to `(..., D, D)`.
    """
    basis = basis.float()
    return keep * (basis * spectrum.unsqueeze(-2)) @ basis.mT + (1 - keep) * matrix


def drift(old: Tensor, new: Tensor) -> Tensor:
    """How far two bases are apart: `1 - ||U_old.T U_new||_F^2 / R`, in [0, 1]; `(...)` from `(..., D, R)`."""
    overlap = old.float().mT @ new.float()
    return 1 - overlap.square().sum((-2, -1)) / old.shape[-1]


def energy_rank(spectrum: Tensor, share: float) -> int:
    """Smallest rank whose eigenvalues hold `share` of the energy, in every head: `(..., D)` descending."""
    cumulative = spectrum.cumsum(-1)
    below = cumulative < share * cumulative[..., -1:]
    return min(int(below.sum(-1).max()) + 1, spectrum.shape[-1])


def token_attention(
    queries: Tensor, places: Tensor, keys: Tensor, scaling: float, valid: Tensor | None = None
) -> Tensor:
    """Mean attention each token receives from those of the given queries that come after it.

    Args:
        queries (`Tensor`): `(B, H, W, D)`.
        places (`Tensor`): `(W,)`, their places in the text.
        keys (`Tensor`): `(B, K, N, D)`, of all tokens.
        valid (`Tensor`, *optional*): boolean `(B, N)`; tokens and queries marked `False` do not count.

    Returns:
        `Tensor`: `(B, K, N)`, float32. The scores themselves are formed in the dtype given.
    """
    batch, heads, _, dim = queries.shape
    kv_heads, length = keys.shape[1], keys.shape[2]
    total = torch.zeros(keys.shape[:3], device=keys.device)
    count = torch.zeros(batch, 1, length, device=keys.device)
    # In slices: the scores of all queries over a long prompt would outweigh its keys.
    for part in torch.arange(len(places), device=keys.device).split(SCORED_QUERIES):
        rows = queries[:, :, part].reshape(batch, kv_heads, -1, dim) * scaling
        logits = (rows @ keys.mT).view(batch, kv_heads, -1, len(part), length)
        later = (places[part, None] >= torch.arange(length, device=keys.device)).expand(batch, 1, 1, -1, -1)
        if valid is not None:
            later = later & valid[:, None, None, None, :] & valid[:, places[part]][:, None, None, :, None]
        logits.masked_fill_(~later, torch.finfo(logits.dtype).min)
        weights = torch.softmax(logits, dim=-1).masked_fill_(~later, 0)
        total += weights.sum((2, 3), dtype=torch.float32)
        count += later.sum(-2)[:, :, 0]
    return total / (count.clamp_min(1) * (heads // kv_heads))


def expected_attention(
    queries: Tensor, window: int, keys: Tensor, scaling: float, valid: Tensor | None = None
) -> Tensor:
    """Attention a token may expect from queries still to come: what the last ones and earlier ones gave it, and a prior.

    The last `window` queries stand for the text going on, `2 * window` spread over the text for what its parts ask of
    each other, and `PRIOR_ATTENTION` in units of an even spread for a question no one has asked yet.

    Args:
        queries (`Tensor`): `(B, H, M, D)`, of the last M tokens.
        keys (`Tensor`): `(B, K, N, D)`, of all tokens.
        valid (`Tensor`, *optional*): boolean `(B, N)`.

    Returns:
        `Tensor`: `(B, K, N)`, float32.
    """
    known, length = queries.shape[2], keys.shape[2]
    offsets = torch.arange(known, device=keys.device)
    spread = torch.linspace(0, known - 1, min(2 * window, known), device=keys.device).long()
    total = torch.full(keys.shape[:3], PRIOR_ATTENTION / length, device=keys.device)
    for chosen in (offsets[-window:], spread):
        total += token_attention(queries[:, :, chosen], chosen + length - known, keys, scaling, valid)
    return total


def relative_residual(streams: list[Tensor], bases: list[Tensor], valid: Tensor | None = None) -> Tensor:
    """Residual norms of several streams, each over its mean across tokens, added: `(B, K, N)`.

    Args:
        streams (`list[Tensor]`): keys and values, `(B, K, N, D)`.
        bases (`list[Tensor]`): `(B, K, D, R)` each.
        valid (`Tensor`, *optional*): boolean `(B, N)`; tokens marked `False` score zero and do not count in the mean.
    """
    total = torch.zeros(streams[0].shape[:3], device=streams[0].device)
    for tokens, basis in zip(streams, bases):
        total += over_mean(residual_norm(tokens, basis), valid)
    return total


def over_mean(norm: Tensor, valid: Tensor | None = None) -> Tensor:
    """`norm` `(B, K, N)` over its mean across tokens; those marked `False` in `valid` `(B, N)` are zero and do not count."""
    if valid is not None:
        norm = norm * valid[:, None]
    count = norm.shape[-1] if valid is None else valid.sum(-1).clamp_min(1)[:, None, None]
    return norm / (norm.sum(-1, keepdim=True) / count).clamp_min(1e-12)


def logit_error(queries: Tensor, keys: Tensor, basis: Tensor, scaling: float) -> Tensor:
    """Root mean square error of each token's logit, `|q . (k - U U.T k)|`, without forming the residual.

    Args:
        queries (`Tensor`): `(B, H, W, D)`.
        keys (`Tensor`): `(B, K, N, D)`.
        basis (`Tensor`): `(B, K, D, R)`.

    Returns:
        `Tensor`: `(B, K, N)`, float32.
    """
    rows = queries.reshape(queries.shape[0], keys.shape[1], -1, queries.shape[-1]).float()
    keys, basis = keys.float(), basis.float()
    error = rows @ keys.mT - (rows @ basis) @ (keys @ basis).mT
    return scaling * error.square().mean(2).sqrt()


def residual_norm(tokens: Tensor, basis: Tensor) -> Tensor:
    """`||x - U U.T x||` of each token: `(B, K, N)` from `(B, K, N, D)` and `(B, K, D, R)`."""
    tokens, basis = tokens.float(), basis.float()
    energy = tokens.square().sum(-1) - (tokens @ basis).square().sum(-1)
    return energy.clamp_min(0).sqrt()


def water_fill(spectra: list[Tensor], costs: list[float], budget: float, smallest: int = 1) -> list[int]:
    """Ranks that leave the least energy behind within a budget: take eigenvalues by gain per byte until it is spent.

    Args:
        spectra (`list[Tensor]`): one descending spectrum `(D,)` per stream (the keys or values of a layer).
        costs (`list[float]`): bytes one more rank of each stream takes.
        budget (`float`): bytes for all streams together.
        smallest (`int`): rank every stream gets at least.

    Returns:
        `list[int]`: one rank per stream.
    """
    ranks = [min(smallest, len(spectrum)) for spectrum in spectra]
    left = budget - sum(rank * cost for rank, cost in zip(ranks, costs))
    gains = [
        (float(value) / cost, index)
        for index, (spectrum, cost) in enumerate(zip(spectra, costs))
        for value in spectrum[ranks[index] :].tolist()
    ]
    for _, index in sorted(gains, key=lambda gain: -gain[0]):
        if costs[index] <= left:
            ranks[index] += 1
            left -= costs[index]
    return ranks
