"""From a delta to the terms that stand for it: the choices of `osd.py` made in the numbers a blob can hold.

Every function takes the float32 delta and returns terms whose decoded values are what was fitted, so an error measured
here is the error of the file.

Shapes: as in `osd.py`; factors of a blob are transposed, columns as rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from hf_ext.merging import osd
from hf_ext.merging.blob import FLOATS, Factor, LowRankTerm, SignTerm, seeded_places
from hf_ext.merging.codes import SPARSEST, VALUE_BITS, encode_mask, packed_size, quantize


MAX_SIGN_TERMS = 8


@dataclass(frozen=True)
class Spectrum:
    """Leading singular triplets: `(n, k)`, `(k,)`, `(d, k)`."""

    left: Tensor
    sigma: Tensor
    right: Tensor


def squared_error(delta: Tensor, left: Tensor, right: Tensor) -> float:
    """`||dW - left right^T||^2` without forming the product: `left` `(n, k)`, `right` `(d, k)`."""
    cross = ((delta @ right) * left).sum(dtype=torch.float64)
    own = ((left.T @ left).double() * (right.T @ right).double()).sum()
    return max(float(delta.pow(2).sum(dtype=torch.float64) - 2 * cross + own), 0.0)


def fit_factors(delta: Tensor, spectrum: Spectrum, bits: list[int], rounds: int) -> tuple[LowRankTerm, ...]:
    """Dense factors, one column for each entry of `bits` (not increasing), one term for each width.

    The right factor is rounded, the left one refitted to the delta beside it and rounded, then the right one beside that,
    for `rounds` rounds; the pair with the smallest error is kept.
    """
    k = len(bits)
    left, right = osd.split(spectrum.left[:, :k], spectrum.sigma[:k], spectrum.right[:, :k])
    stored_right, plain_right = _round(right, bits)
    stored_left, plain_left = _round(left, bits)
    best, lowest = (stored_left, stored_right), squared_error(delta, plain_left, plain_right)
    for _ in range(rounds):
        stored_left, plain_left = _round(osd.refit_left(delta, plain_right, None), bits)
        error = squared_error(delta, plain_left, plain_right)
        if error < lowest:
            best, lowest = (stored_left, stored_right), error
        stored_right, plain_right = _round(osd.refit_left(delta.T, plain_left, None), bits)
        error = squared_error(delta, plain_left, plain_right)
        if error < lowest:
            best, lowest = (stored_left, stored_right), error
    return tuple(LowRankTerm(one, other) for one, other in zip(*best))


def fit_sparse(
    delta: Tensor,
    spectrum: Spectrum,
    nbytes: int,
    values: str,
    relaxations: list[int] | None,
    score: str,
    gradient: Tensor | None,
    joint: bool,
    refit_steps: int,
    flat_index: bool = False,
) -> tuple[LowRankTerm, ...]:
    """Sparse factors of at most `nbytes`, of the relaxed rank with the smallest error.

    Args:
        delta (`Tensor`): `(n, d)`.
        spectrum (`Spectrum`): of the delta, with as many columns as the largest relaxation asks for if it can.
        nbytes (`int`): bytes of the term; with `flat_index` bytes by the paper's formula.
        values (`str`): type of the values.
        relaxations (`list[int]`, *optional*): ranks beyond the budget's to try; None for 0, r/2, r, 2r, 4r.
        score, gradient, joint: see `osd.importance` and `osd.select`.
        refit_steps (`int`): rounds of `osd.refit`.
        flat_index (`bool`): count the paper's 32 bits and flat index for each survivor, not what is written.

    Returns:
        `tuple[LowRankTerm, ...]`: one term; none where the budget does not hold a single column.
    """
    n, d = delta.shape
    bits = VALUE_BITS[values]
    rank = nbytes * 8 // ((n + d) * bits) if flat_index else int((nbytes - 24) * 8 / ((n + d) * bits))
    grid = [0, -(-rank // 2), rank, 2 * rank, 4 * rank] if relaxations is None else relaxations
    best, lowest = None, float(delta.pow(2).sum())
    for width in sorted({min(max(rank, 1) + extra, len(spectrum.sigma)) for extra in grid}):
        if width == 0:
            continue
        left, right = osd.split(spectrum.left[:, :width], spectrum.sigma[:width], spectrum.right[:, :width])
        scores = osd.importance(score, left, right, gradient)
        full = width * (n + d)

        masks = osd.Selection(*scores, joint=joint)
        if flat_index:
            if width <= rank:
                count = full  # c = 0 is dense and needs no index
            else:
                count = _most(lambda c, m=masks, w=width: osd.paper_bits(n, d, w, *m.kept(c)) <= 8 * nbytes, full)
        else:
            # Places decide the size, values do not.
            count = _most(lambda c, m=masks: _sparse_size(m(c), bits) <= nbytes, full)
        if count < max(2, -(-full // SPARSEST)):
            continue
        mask_left, mask_right = masks(count)
        error = squared_error(delta, left * mask_left, right * mask_right)
        if error < lowest:
            best, lowest = (left, right, mask_left, mask_right), error
    if best is None:
        return ()
    left, right, mask_left, mask_right = best
    one, other = left * mask_left, right * mask_right
    if refit_steps:
        one, other = osd.refit(delta, *best, refit_steps)
    return (LowRankTerm(_factor(one, bits, mask_left), _factor(other, bits, mask_right)),)


def fit_signs(delta: Tensor, density: float, seed: int, noise: float, strength: float = 1.0) -> tuple[SignTerm, ...]:
    """Signs of the delta at a share `density` of its places; beyond one, then of what the first ones leave, and so on.

    Args:
        delta (`Tensor`): `(n, d)`.
        density (`float`): signs for each entry; cut to whole bytes.
        seed (`int`): of the places of the first term; later ones count on from it.
        noise (`float`): root mean square the decoded delta may have; it is made smaller beyond that.
        strength (`float`): see `osd.unbiased_scale`.

    Returns:
        `tuple[SignTerm, ...]`: at most `MAX_SIGN_TERMS`. All are scaled alike, so that their sum has the inner product
        with the delta that the delta has with itself, see `osd.unbiased_scale`. A zero takes the sign of its place's
        parity, so that zeros cancel.
    """
    flat, size = delta.reshape(-1), delta.numel()
    rest = flat.clone()
    terms: list[SignTerm] = []
    while density > 0 and len(terms) < MAX_SIGN_TERMS:
        count = size if density >= 1 else int(density * size) // 8 * 8
        density -= 1
        if count == 0:
            break
        places = torch.from_numpy(seeded_places((seed + len(terms)) % 2**32, count, size))
        values = rest[places]
        negative = (values < 0) | ((values == 0) & (places % 2 == 1))
        magnitude = float(values.abs().mean(dtype=torch.float64))
        if magnitude == 0:
            break
        rest[places] -= torch.where(negative, -magnitude, magnitude)
        terms.append(SignTerm((seed + len(terms)) % 2**32, magnitude, negative.numpy()))
    if not terms:
        return ()
    scale = osd.unbiased_scale(flat, flat - rest, noise, strength)
    return tuple(term.scaled(scale) for term in terms)


def _sparse_size(masks: tuple[Tensor, Tensor], bits: int) -> int:
    """Bytes of a term with these masks: heads, steps, masks and values."""
    size = 5
    for mask in masks:
        steps = 0 if bits in FLOATS else 2 * mask.shape[1]
        size += steps + len(encode_mask(mask.T.reshape(-1).numpy())) + packed_size(int(mask.sum()), bits)
    return size


def _most(fits, top: int) -> int:
    """The largest count up to `top` for which `fits` holds, 0 if none."""
    low, high = 0, top
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _factor(dense: Tensor, bits: int, mask: Tensor | None = None) -> Factor:
    columns = dense.T.contiguous().numpy()
    kept = None if mask is None or bool(mask.all()) else mask.T.contiguous().numpy()
    if bits in FLOATS:
        return Factor.of_floats(columns, bits, kept)
    codes, steps = quantize(columns, bits, kept)
    return Factor(bits, codes if kept is None else np.where(kept, codes, np.uint8(0)), steps, kept)


def _round(dense: Tensor, bits: list[int]) -> tuple[list[Factor], Tensor]:
    """`(n, k)` in the numbers of a blob, a factor for each width, and what they decode to, `(n, k)`."""
    factors, at = [], 0
    for width, group in groupby(bits):
        size = len(list(group))
        factors.append(_factor(dense[:, at : at + size], width))
        at += size
    return factors, torch.from_numpy(np.concatenate([factor.decode() for factor in factors]).T)
