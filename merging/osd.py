"""OSD: the difference between a fine-tuned and a base weight as sparse low-rank factors, or as seeded signs.

Paper: https://arxiv.org/abs/2511.02681. A delta `dW = W_tuned - W_base` is truncated at a rank above what the budget
allows densely (`k = r + c`), and the budget goes to the entries of both factors that matter most, ranked by a score in
which the value of an entry of one factor depends on the other factor:

    dW ~ U_k S_k V_k^T,  Ut = U_k S_k^(1/2),  Vt = V_k S_k^(1/2)          rank relaxation
    keep the s entries of (Ut, Vt) with the largest score                   coordinated sparsification
    bits = 32 (s_u + s_v) + ceil(log2(n k)) s_u + ceil(log2(d k)) s_v       the paper's memory

This file is the mathematics, on torch tensors alone: decomposition, scores, selection, refit, allocation of bits.
`codes.py` and `blob.py` turn the result into bytes, `compress.py` walks over checkpoints, `adapters.py` is the PEFT glue.

Differs from the paper: the paper's score was not available to us; the five here are readings of it, `taylor` and
`fisher` being the ones that follow the chain rule dL/dUt = G Vt, dL/dVt = G^T Ut. Three additions, absent from
`mode="paper"`: factors are refitted on their masks; values have 1 to 4 bits, and how many a column gets is decided over
all layers by energy per bit; and where deltas are not of low rank, signs at seeded places take the place of factors, with
a magnitude that keeps their effect instead of their distance, see `unbiased_scale`.

Shapes: dW `(n, d)`; k columns; left factors `(n, k)`, right factors `(d, k)`; G, F `(n, d)`.
"""

from __future__ import annotations

import heapq
import math

import torch
from torch import Tensor


IMPORTANCE = ("magnitude", "energy", "taylor1", "taylor", "fisher")
# Share of a normal column's energy that a quantiser of so many bits loses.
DISTORTION = {1: 0.363, 2: 0.1188, 3: 0.0375, 4: 0.0115, 8: 7.4e-5, 16: 3e-6, 32: 0.0}
_EXACT_SIDE = 2048
_SYSTEMS = 1 << 20  # numbers in the systems that are solved together


def truncated_svd(
    delta: Tensor, rank: int, exact: bool = False, power_iterations: int = 4, oversampling: int = 8, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triplets, randomised (Halko et al.) or exact.

    Args:
        delta (`Tensor`): `(n, d)` float32.
        rank (`int`): how many; cut to `min(n, d)`.
        exact (`bool`): the eigenvectors of the smaller Gram matrix, in float64 where its side is at most 2,048.
        power_iterations, oversampling (`int`): of the randomised form. Two iterations lose up to 17 % of the last
            singular value, four about 2 %.
        seed (`int`): of the random start.

    Returns:
        `tuple[Tensor, Tensor, Tensor]`: `(n, k)`, `(k,)` decreasing, `(d, k)`; signs are fixed so that the largest entry
        of each left vector is positive.
    """
    n, d = delta.shape
    rank = min(rank, n, d)
    if exact or rank + oversampling >= min(n, d):
        wide = delta if min(n, d) > _EXACT_SIDE else delta.double()
        gram = wide @ wide.T if n <= d else wide.T @ wide
        side = torch.linalg.eigh(gram)[1].flip(1)[:, :rank]
        other = (wide.T if n <= d else wide) @ side
        sigma = other.norm(dim=0)
        other = other / sigma.clamp_min(torch.finfo(sigma.dtype).tiny)
        left, right = (side, other) if n <= d else (other, side)
    else:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(d, rank + oversampling, generator=generator).to(delta)
        basis = torch.linalg.qr(delta @ start)[0]
        for _ in range(power_iterations):
            basis = torch.linalg.qr(delta @ torch.linalg.qr(delta.T @ basis)[0])[0]
        inner, sigma, right_t = torch.linalg.svd(basis.T @ delta, full_matrices=False)
        left, sigma, right = (basis @ inner)[:, :rank], sigma[:rank], right_t[:rank].T
    sign = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
    sign[sign == 0] = 1
    return (left * sign).to(delta.dtype), sigma.to(delta.dtype), (right * sign).to(delta.dtype)


def split(left: Tensor, sigma: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values shared evenly, so that one threshold serves both factors: `(n, k)`, `(d, k)`."""
    root = sigma.sqrt()
    return left * root, right * root


def importance(score: str, left: Tensor, right: Tensor, gradient: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """How much each entry of both factors matters.

    Args:
        score (`str`): one of `IMPORTANCE`.
        left, right (`Tensor`): `(n, k)`, `(d, k)`.
        gradient (`Tensor`, *optional*): `(n, d)`. For `taylor1` the mean gradient of the loss in W, for `taylor` and
            `fisher` the mean of its squares over calibration examples.

    Returns:
        `tuple[Tensor, Tensor]`: `(n, k)` and `(d, k)`, not negative. All but `magnitude` are unchanged when a column of
        one factor is multiplied by a positive number and that of the other divided by it.
    """
    if score == "magnitude":
        return left.abs(), right.abs()
    if score == "energy":
        return left.abs() * right.norm(dim=0), right.abs() * left.norm(dim=0)
    if gradient is None:
        raise ValueError(f"importance={score!r} needs the gradient of a loss; use magnitude or energy without data.")
    if score == "taylor1":
        return (left * (gradient @ right)).abs(), (right * (gradient.T @ left)).abs()
    if score == "taylor":
        size = gradient.sqrt()
        return left.abs() * (size @ right.abs()), right.abs() * (size.T @ left.abs())
    if score == "fisher":
        return left**2 * (gradient @ right**2), right**2 * (gradient.T @ left**2)
    raise ValueError(f"importance={score!r} is unknown; use one of {', '.join(IMPORTANCE)}.")


class Selection:
    """Masks of the most important entries, for any number of survivors, from one ranking.

    Args:
        left, right (`Tensor`): scores `(n, k)`, `(d, k)`.
        joint (`bool`): one ranking over both factors; else each factor gets its share `n : d` and a ranking of its own.
            Among equals the left factor comes first, then the lower place, columns being laid one after the other.
    """

    def __init__(self, left: Tensor, right: Tensor, joint: bool = True) -> None:
        flat = left.T.reshape(-1), right.T.reshape(-1)
        self._shapes, self._joint = (left.T.shape, right.T.shape), joint
        self._sizes = len(flat[0]), len(flat[1])
        ranks = [_ranks(torch.cat(flat))] if joint else [_ranks(scores) for scores in flat]
        self._ranks = ranks[0].split(self._sizes) if joint else ranks

    def __call__(self, count: int) -> tuple[Tensor, Tensor]:
        """Bool masks `(n, k)`, `(d, k)` of the best `count` entries."""
        masks = [rank < limit for rank, limit in zip(self._ranks, self._limits(count))]
        return masks[0].view(self._shapes[0]).T, masks[1].view(self._shapes[1]).T

    def kept(self, count: int) -> tuple[int, int]:
        """How many entries of either factor survive."""
        limits = self._limits(count)
        return int((self._ranks[0] < limits[0]).sum()), int((self._ranks[1] < limits[1]).sum())

    def _limits(self, count: int) -> tuple[int, int]:
        if self._joint:
            return count, count
        share = round(count * self._sizes[0] / sum(self._sizes))
        return share, count - share


def _ranks(scores: Tensor) -> Tensor:
    """Place of each score in the order of decreasing scores."""
    order = torch.argsort(scores, descending=True, stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def select(left: Tensor, right: Tensor, count: int, joint: bool = True) -> tuple[Tensor, Tensor]:
    """`Selection(left, right, joint)(count)`: masks of the `count` most important entries, `(n, k)` and `(d, k)`."""
    return Selection(left, right, joint)(count)


def paper_bits(n: int, d: int, rank: int, kept_left: int, kept_right: int) -> int:
    """The paper's memory of sparse factors of width `rank`, in bits: a float32 and a flat index for each survivor."""
    index_left, index_right = math.ceil(math.log2(n * rank)), math.ceil(math.log2(d * rank))
    return 32 * (kept_left + kept_right) + index_left * kept_left + index_right * kept_right


def refit_left(delta: Tensor, right: Tensor, mask: Tensor | None, ridge: float = 1e-6) -> Tensor:
    """The left factor that fits `delta` best beside a given right one, zero outside its mask.

    Args:
        delta (`Tensor`): `(n, d)`.
        right (`Tensor`): `(d, k)`.
        mask (`Tensor`, *optional*): `(n, k)` bool.
        ridge (`float`): added to the diagonal, times its mean; keeps empty and dependent columns harmless.

    Returns:
        `Tensor`: `(n, k)`; row i solves `(V_S^T V_S + lam I) u = V_S^T dW_i` on its own survivors S.
    """
    gram, target = (right.T @ right).double(), (delta @ right).double()
    lam = ridge * gram.diagonal().mean().clamp_min(1e-30)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if mask is None:
        return torch.linalg.solve(gram + lam * eye, target.T).T.to(delta.dtype)
    solved, many = torch.empty(mask.shape, dtype=delta.dtype, device=delta.device), max(_SYSTEMS // len(gram) ** 2, 1)
    # A row is a system of its own; many at a time, but not so many that the systems outgrow the delta.
    for start in range(0, len(mask), many):
        rows, aim = mask[start : start + many].double(), target[start : start + many]
        # Outside the mask the matrix is the identity and the target zero: one batched solve for rows of any support.
        systems = gram * rows[:, :, None] * rows[:, None, :] + torch.diag_embed(lam * rows + (1 - rows))
        solved[start : start + many] = torch.linalg.solve(systems, (aim * rows)[:, :, None])[:, :, 0]
    return solved


def refit(delta: Tensor, left: Tensor, right: Tensor, mask_left: Tensor, mask_right: Tensor, steps: int) -> tuple:
    """Alternating least squares on fixed masks; the Frobenius error does not grow from step to step.

    Returns:
        `tuple[Tensor, Tensor]`: `(n, k)`, `(d, k)`, balanced column by column so that one threshold and one quantiser
        suit both.
    """
    left, right = left * mask_left, right * mask_right
    for _ in range(steps):
        left = refit_left(delta, right, mask_left)
        right = refit_left(delta.T, left, mask_right)
    balance = (right.norm(dim=0) / left.norm(dim=0).clamp_min(1e-30)).sqrt()
    balance[balance == 0] = 1
    return left * balance, right / balance


def unbiased_scale(delta: Tensor, coarse: Tensor, noise: float = math.inf, strength: float = 1.0) -> float:
    """The factor by which a coarse code of a delta is to be multiplied.

    `||dW||^2 / <coarse, dW>`: afterwards the code has the inner product with the delta that the delta has with itself.
    What a random choice of places does on average to the output of a layer is then what the delta does; all the rest is
    noise, which a layer of many inputs averages out. Least squares, the usual choice of one-bit codes, keeps only the
    share `<coarse, dW>^2 / (||coarse||^2 ||dW||^2)` of the effect, the share the code has right. Where the base weights are too small to drown the
    noise, the code is made smaller until its root mean square is `noise`.

    Args:
        delta, coarse (`Tensor`): of one shape.
        noise (`float`): root mean square allowed.
        strength (`float`): how much of the scale is used where the code has next to nothing right; with the share that it
            has right this rises to all of it.

    Returns:
        `float`: not negative; 0 where the two have nothing in common.
    """
    common = float((delta * coarse).sum(dtype=torch.float64))
    if common <= 0:
        return 0.0
    energy, own = (float(part.pow(2).sum(dtype=torch.float64)) for part in (delta, coarse))
    right = common**2 / (energy * own)
    scale = energy / common * (1 - (1 - strength) * (1 - right))
    return min(scale, noise / math.sqrt(own / coarse.numel()))


def allocate(
    gains: dict[str, Tensor], sides: dict[str, int], budget: int, bits: tuple[int, ...], column_bytes: int = 4
) -> dict[str, list[int]]:
    """Bits for the columns of all factor pairs under one budget of bytes.

    The next bits always go where they save most energy a byte: to a new column, or to one that has fewer than the most.
    A column that holds a share `1 - D_b` of its energy in each factor saves `gain * (1 - D_b)^2`.

    Args:
        gains (`dict[str, Tensor]`): by matrix, `(k,)` what each column is worth, decreasing; its squared singular value.
        sides (`dict[str, int]`): by matrix, `n + d`.
        budget (`int`): bytes of values and steps together.
        bits (`tuple[int, ...]`): choices, increasing.
        column_bytes (`int`): of the two steps of a column.

    Returns:
        `dict[str, list[int]]`: by matrix, bits of its leading columns, not increasing; matrices without any are absent.
    """
    ladder = (0, *bits)

    def step(name: str, column: int, level: int) -> tuple[float, str, int, int, float]:
        before = (1 - DISTORTION[ladder[level - 1]]) ** 2 if level > 1 else 0.0
        cost = (ladder[level] - ladder[level - 1]) * sides[name] / 8 + (column_bytes if level == 1 else 0)
        worth = float(gains[name][column]) * ((1 - DISTORTION[ladder[level]]) ** 2 - before)
        return -worth / cost, name, column, level, cost

    queue = [step(name, 0, 1) for name in gains if len(gains[name])]
    heapq.heapify(queue)
    chosen: dict[str, list[int]] = {}
    left = float(budget)
    while queue:
        _, name, column, level, cost = heapq.heappop(queue)
        if cost > left:
            continue  # a cheaper step of another matrix may still fit
        left -= cost
        columns = chosen.setdefault(name, [])
        if level == 1:
            columns.append(ladder[1])
            if column + 1 < len(gains[name]):
                heapq.heappush(queue, step(name, column + 1, 1))
        else:
            columns[column] = ladder[level]
        # The one before must have as many bits, so that columns of one width lie side by side.
        if level < len(bits):
            heapq.heappush(queue, step(name, column, level + 1))
    return {name: sorted(columns, reverse=True) for name, columns in chosen.items()}
