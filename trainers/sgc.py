"""Sparse gradient compression (SGC, arXiv 2502.00311): Adam's moments kept as a few random measurements of each chunk.

The mathematics of the published method and its relatives, on matrices of chunks; `sgc_optimizer.py` has the optimizer
around them. A gradient is cut into chunks of `N` entries, of which the `S` largest are kept; projection and moving average
are both linear, so the measured moments `(C, K)` are exactly the measurements of the moments that Adam would keep if it
were fed the kept entries.

The published pages with algorithm boxes were not available; what is not in the abstract or in reviews of the paper
(which entries are kept, how the second moment is decoded) is our reading, marked where it stands.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_ext.trainers.measurements import Measurement, omp, solve_on_support, top_entries


@dataclass(frozen=True)
class Moments:
    """What turns gradients into directions: Adam's constants and the number of the step, counted from 1."""

    beta1: float
    beta2: float
    eps: float
    step: int

    @property
    def correction1(self) -> float:
        """Divides the first moment, which starts at zero."""
        return 1.0 - self.beta1**self.step

    @property
    def correction2(self) -> float:
        """Divides the second moment."""
        return 1.0 - self.beta2**self.step

    @property
    def largest(self) -> float:
        """What Adam's quotient of an entry cannot exceed at this step, whatever its gradients were (Cauchy-Schwarz)."""
        ratio = self.beta1**2 / self.beta2 if self.beta2 else 0.0
        terms = self.step if ratio == 1.0 else (1.0 - ratio**self.step) / (1.0 - ratio)
        squared = (1.0 - self.beta1) ** 2 / (1.0 - self.beta2) * terms
        return (squared * self.correction2) ** 0.5 / self.correction1


def measured_direction(
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    at: Moments,
    measurement: Measurement,
    s: int,
    recover: str = "known",
    moment_space: str = "decoded",
    residual: str = "none",
    atoms: int | None = None,
    ridge: float = 1e-6,
) -> Tensor:
    """One step of SGC on chunks. `first` and `second` are updated in place.

    Args:
        gradient (`Tensor`): `(C, N)`.
        first (`Tensor`): `(C, K)`, measured first moment.
        second (`Tensor`): `(C, K)`, measured second moment.
        at (`Moments`): Adam's constants.
        measurement (`Measurement`): `A`.
        s (`int`): Entries kept a chunk, the largest in magnitude (our reading).
        recover (`str`, defaults to `"known"`):
            `"known"` solves for the moments on the support of the present gradient, which costs no search; `"omp"` searches
            the support of the first moment, as the paper does.
        moment_space (`str`, defaults to `"decoded"`):
            `"decoded"` measures squares, so that the second moment can be decoded (our reading). `"compressed"` squares
            measurements, divides there, and decodes the quotient.
        residual (`str`, defaults to `"none"`): `"chunk"` moves all other entries by their gradient over the chunk's mean.
        atoms (`int`, *optional*): Entries decoded by `"omp"`; `s` by default.
        ridge (`float`, defaults to 1e-6): Of the least squares.

    Returns:
        `Tensor`: `(C, N)`, to be multiplied by the learning rate.
    """
    support = top_entries(gradient, s)
    kept = torch.zeros_like(gradient).scatter_(1, support, gradient.gather(1, support))
    measured = measurement.project(kept)
    first.lerp_(measured, 1.0 - at.beta1)
    squares = measured.square() if moment_space == "compressed" else measurement.project(kept.square())
    second.lerp_(squares, 1.0 - at.beta2)
    mean, variance = first / at.correction1, second / at.correction2
    if moment_space == "compressed":
        mean = mean / (variance.sqrt() + at.eps)
    gram = measurement.gram()
    if recover == "omp":
        support, values = omp(measurement, mean, s if atoms is None else atoms)
        spread = solve_on_support(gram, support, measurement.correlate(variance)[:, :, None], ridge)[:, :, 0]
    else:
        both = torch.stack([measurement.correlate(mean), measurement.correlate(variance)], dim=2)
        values, spread = solve_on_support(gram, support, both, ridge).unbind(2)
    if moment_space == "decoded":
        # A second moment that was decoded too small would make a step no Adam makes.
        values = (values / (_floored(spread, values).sqrt() + at.eps)).clamp_(-at.largest, at.largest)
    direction = torch.zeros_like(gradient)
    if residual == "chunk":
        direction = gradient / (gradient.square().mean(1, keepdim=True).sqrt() + at.eps)
    return direction.scatter_(1, support, values)


def _floored(spread: Tensor, values: Tensor) -> Tensor:
    """Decoded second moments, `(C, S)`, where an error of decoding left none: the mean of the chunk's others.

    Without it an entry with a first but no second moment would be divided by `eps`.
    """
    good = spread > 0
    mean = (spread * good).sum(1, keepdim=True) / good.sum(1, keepdim=True).clamp_min(1)
    return torch.where(good, spread, torch.where(mean > 0, mean, values.square()))


def hybrid_direction(
    gradient: Tensor, first: Tensor, scale: Tensor, at: Moments, measurement: Measurement, s: int, ridge: float = 1e-2
) -> Tensor:
    """Measured momentum on the largest entries, plain gradient elsewhere, one second moment a chunk. Not in the paper.

    Args:
        gradient (`Tensor`): `(C, N)`.
        first (`Tensor`): `(C, K)`, measured first moment of the whole gradient's largest entries, updated in place.
        scale (`Tensor`): `(C, 1)`, mean square of the whole chunk, updated in place.
        at (`Moments`): Adam's constants.
        measurement (`Measurement`): `A`.
        s (`int`): Entries kept a chunk.
        ridge (`float`, defaults to 1e-2): Of the least squares.

    Returns:
        `Tensor`: `(C, N)`.
    """
    support = top_entries(gradient, s)
    kept = torch.zeros_like(gradient).scatter_(1, support, gradient.gather(1, support))
    first.lerp_(measurement.project(kept), 1.0 - at.beta1)
    correlations = measurement.correlate(first / at.correction1)
    values = solve_on_support(measurement.gram(), support, correlations[:, :, None], ridge)[:, :, 0]
    return block_direction(gradient.scatter(1, support, values), scale, at, squares=gradient)


def block_direction(numerator: Tensor, scale: Tensor, at: Moments, squares: Tensor | None = None) -> Tensor:
    """The gradient over the root of one second moment a chunk: the control that keeps almost nothing.

    Args:
        numerator (`Tensor`): `(C, N)`.
        scale (`Tensor`): `(C, 1)`, updated in place.
        at (`Moments`): Adam's constants.
        squares (`Tensor`, *optional*): `(C, N)`, whose mean square is averaged; the numerator by default.

    Returns:
        `Tensor`: `(C, N)`.
    """
    source = numerator if squares is None else squares
    scale.lerp_(source.square().mean(1, keepdim=True), 1.0 - at.beta2)
    return numerator / ((scale / at.correction2).sqrt() + at.eps)


def project_basis(gradient: Tensor, kept: Tensor) -> Tensor:
    """The basis of CESGC's projection: leading left singular vectors of a gradient.

    Args:
        gradient (`Tensor`): `(M, N)`, `M <= N`, float32.
        kept (`Tensor`): `(M, R)`, the basis so far.

    Returns:
        `Tensor`: `(M, R)`; what was kept where the gradient is zero or has no decomposition.
    """
    if not bool(gradient.any()):
        return kept
    try:
        return torch.linalg.svd(gradient, full_matrices=False).U[:, : kept.shape[1]]
    except torch.linalg.LinAlgError:
        return kept


def decode_quality(
    gradient: Tensor, first: Tensor, measurement: Measurement, s: int, recover: str, ridge: float = 1e-6
) -> Tensor:
    """How much a step keeps and how well it decodes, for logs.

    Args:
        gradient (`Tensor`): `(C, N)`.
        first (`Tensor`): `(C, K)`, the measured first moment.
        measurement (`Measurement`): `A`.
        s (`int`): Entries kept a chunk.
        recover (`str`): As in `measured_direction`.
        ridge (`float`, defaults to 1e-6): Of the least squares.

    Returns:
        `Tensor`: four square sums over all chunks: of the kept entries, of the gradient, of the part of the measured moment
        that the decoded one leaves over, of the measured moment.
    """
    support = top_entries(gradient, s)
    kept = gradient.gather(1, support).square().sum()
    if recover == "omp":
        support, values = omp(measurement, first, s)
    else:
        values = solve_on_support(measurement.gram(), support, measurement.correlate(first)[:, :, None], ridge)[
            :, :, 0
        ]
    left = first - measurement.project(torch.zeros_like(gradient).scatter_(1, support, values))
    return torch.stack([kept, gradient.square().sum(), left.square().sum(), first.square().sum()])
