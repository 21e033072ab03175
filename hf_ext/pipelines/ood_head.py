"""Heads that tell in-distribution rows from others: the default filter of `MedixFilter`, and its second stage.

A head is a linear discriminant of standardised columns `x`, with both sides weighing the same and a ridge that is
relative to the mean variance `t` of a column, so that one strength serves any width and scale:

    w = (S + strength * t I)^-1 (mu_out - mu_in) / 2,     score = w . (x - (mu_in + mu_out) / 2)

It needs the counts, sums and Gram matrices of both sides, and those of the folds add up: cross-fitting and a path of
strengths cost one pass over the rows. Columns are the features, or features and their squares, which find what lies
between or around the in-distribution classes. Which columns and which strength is read off the area under the curve of
in-distribution against ALL wild rows on left-out folds: with prevalence pi it is `(1 - pi) / 2 + pi * AUC`, so that it
orders heads as the unknown AUC of in-distribution against OOD rows does. A departure from the usual setting needs a gain
of more than its standard error (DeLong's, paired).

What a linear head cannot know from few rows, in-distribution rows do: its scores are joined by a discriminant of two or three
columns, itself fitted on other folds, to the log distance to the nearest in-distribution rows, or, where their classes
are known, to the log distance to the nearest class and the doubt between classes (measured in `benchmarks/ood_quality.py`:
better on texts, where a tenth of few wild rows is OOD).

`two_pass_scores` ranks wild rows: a head against all wild rows, the rows it ranks first by an estimate of their number,
a head against those. The second head of a fold knows nothing of the fold, not even through the choice of its rows, so
that in-distribution rows of both sets score alike, which the estimate of the prevalence rests on.

Shapes: n in-distribution rows, m wild rows, D columns, S strengths, K folds.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hf_ext.errors import DataError
from hf_ext.pipelines.neighbors import mean_distances
from hf_ext.pipelines.prevalence import estimate_prevalence


STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)
USUAL_STRENGTH = 10.0
FOLDS = 5
ERRORS = 3.0
# Wider columns are projected to this width: the cost of a fold grows with its cube.
MAX_COLUMNS = 1024
# Of the distance to in-distribution rows.
NEIGHBORS, MAX_REFERENCES = 5, 4096
CHUNK = 4096
# Share of the weight of the wild side that stays on all wild rows when the first-ranked are known.
MIX = 0.5


def as_rows(values, name: str, width: int | None = None, least: int = 1) -> Tensor:
    """`values` as a detached `(rows, width)` float tensor: float64 stays, every other type becomes float32.

    Raises:
        DataError: not a table of numbers, fewer than `least` rows, another width, or NaN or infinite entries.
    """
    try:
        rows = torch.as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{name} is a {type(values).__name__} that is no table of numbers ({error}).") from None
    if rows.is_complex() or rows.ndim != 2:
        raise DataError(f"{name} has shape {tuple(rows.shape)}; expected (rows, width) of real numbers.")
    if len(rows) < least:
        raise DataError(f"{name} holds {len(rows)} rows; expected at least {least}.")
    if rows.shape[1] == 0 or width not in (None, rows.shape[1]):
        raise DataError(f"{name} is {rows.shape[1]} wide; expected {width or 'at least 1'}, as in the reference rows.")
    rows = rows if rows.dtype == torch.float64 else rows.float()
    bad = ~torch.isfinite(rows).all(1)
    if bad.any():
        raise DataError(
            f"{name} holds NaN or infinity in {int(bad.sum())} of {len(rows)} rows, first in row "
            f"{int(bad.nonzero()[0])}; drop these rows or mend the model that made them."
        )
    return rows


def as_numbers(values, name: str) -> Tensor:
    """`values` as a detached tensor; `DataError` where they are none."""
    try:
        return torch.as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError):
        raise DataError(f"{name} come as a {type(values).__name__} that holds no numbers; expected numbers.") from None


class Moments(NamedTuple):
    """Count, sum `(D,)` and Gram matrix `(D, D)` of weighted rows, float64; of K folds with one more dimension in front."""

    count: Tensor  # type: ignore[assignment]
    total: Tensor
    gram: Tensor

    @classmethod
    def of(cls, x: Tensor, weights: Tensor | None = None) -> Moments:
        y = x if weights is None else x * weights[:, None]
        count = torch.tensor(float(len(x))) if weights is None else weights.sum()
        return cls(count.double(), y.sum(0, dtype=torch.float64), (y.T @ x).double())

    @classmethod
    def of_folds(cls, x: Tensor, fold: Tensor, folds: int, weights: Tensor | None = None) -> Moments:
        places = [fold == k for k in range(folds)]
        found = [cls.of(x[place], None if weights is None else weights[place]) for place in places]
        return cls(*(torch.stack(parts) for parts in zip(*found)))

    def without(self, *folds: int) -> Moments:
        """Those of all folds but these."""
        kept = [k for k in range(len(self.count)) if k not in folds]
        return Moments(*(part[kept].sum(0) for part in self))


def discriminant(inside: Moments, outside: Moments, strengths: Tensor) -> tuple[Tensor, Tensor]:
    """Weights `(D, S)` and biases `(S,)`, float64, of the formula above for every strength."""
    mean_in, mean_out = inside.total / inside.count, outside.total / outside.count
    middle = (mean_in + mean_out) / 2
    covariance = (inside.gram / inside.count + outside.gram / outside.count) / 2 - torch.outer(middle, middle)
    scale = covariance.diagonal().mean().clamp_min(1e-12)
    ridge = (strengths.to(covariance) * scale)[:, None, None] * torch.eye(len(middle), dtype=torch.float64)
    factor, failed = torch.linalg.cholesky_ex(covariance + ridge)
    if failed.any():
        raise DataError(
            f"a ridge of {float(strengths.min()):.1g} of the mean variance is too small for these rows; use "
            "regularization=1e-3 or more."
        )
    right = ((mean_out - mean_in) / 2)[None, :, None].expand(len(strengths), -1, 1)
    weight = torch.cholesky_solve(right, factor)[..., 0].T
    return weight, -(middle @ weight)


def area(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Area under the curve of columns of scores, and its parts.

    Args:
        low (`Tensor`): `(n, S)` scores that should be low.
        high (`Tensor`): `(m, S)` scores that should be high.

    Returns:
        `tuple[Tensor, Tensor, Tensor]`: `(S,)` areas, ties count half; `(n, S)` and `(m, S)` each row's share of the
        other side on its right side, whose variances are DeLong's.
    """
    n, m = len(low), len(high)
    a, b = low.T.contiguous(), high.T.contiguous()
    sorted_a, sorted_b = a.sort(1).values, b.sort(1).values

    def below(table: Tensor, values: Tensor) -> Tensor:
        left = torch.searchsorted(table, values)
        return (left + torch.searchsorted(table, values, right=True)).double() / (2 * table.shape[1])

    part_high, part_low = below(sorted_a, b), 1 - below(sorted_b, a)
    return part_high.mean(1), part_low.T.reshape(n, -1), part_high.T.reshape(m, -1)


def clearly_best(low: Tensor, high: Tensor, usual: int, errors: float = ERRORS) -> int:
    """Column whose area beats the usual one's by more than `errors` standard errors of the difference, else `usual`."""
    areas, part_low, part_high = area(low, high)
    gain = areas - areas[usual]
    variance = (part_low - part_low[:, usual, None]).var(0, correction=0) / max(1, len(low) - 1)
    variance += (part_high - part_high[:, usual, None]).var(0, correction=0) / max(1, len(high) - 1)
    best = int((gain - errors * variance.sqrt()).nan_to_num(-1.0).argmax())
    return best if gain[best] > errors * variance[best].sqrt() else usual


class Columns:
    """Standardised columns of features, with squares if asked for, of at most `MAX_COLUMNS`."""

    def __init__(self, rows: Tensor, squares: bool, seed: int) -> None:
        self.mean, self.scale = standard(rows)
        self.squares = None
        if squares:
            self.squares = standard(((rows - self.mean) / self.scale).square())
        width = rows.shape[1] * (2 if squares else 1)
        self.mix, self.kept = None, 1.0
        if len(rows) < min(width, MAX_COLUMNS):
            # No head has a part outside the span of its rows: coordinates in it are fewer, and lose nothing.
            x = self(rows)
            values, vectors = torch.linalg.eigh((x @ x.T).double())
            # The last one always: of equal rows none has a length.
            spanned = values >= (1e-7 * values[-1]).clamp_max(values[-1])
            self.mix = x.T @ (vectors[:, spanned] / values[spanned].clamp_min(1e-30).sqrt()).to(x)
            # The mean variance that a ridge is relative to is that of all columns.
            self.kept = self.mix.shape[1] / width
        elif width > MAX_COLUMNS:
            generator = torch.Generator().manual_seed(seed)
            self.mix = torch.randn(width, MAX_COLUMNS, generator=generator).to(rows) / math.sqrt(MAX_COLUMNS)

    def __call__(self, rows: Tensor) -> Tensor:
        x = (rows.to(self.mean) - self.mean) / self.scale
        if self.squares is not None:
            mean, scale = self.squares
            x = torch.cat([x, (x.square() - mean) / scale], 1)
        return x if self.mix is None else x @ self.mix


def standard(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of columns, 1 for those that are constant but for rounding."""
    mean, scale = rows.mean(0), rows.std(0, correction=0)
    return mean, torch.where(scale > 1e-6 * mean.abs() + 1e-30, scale, 1.0)


def _strengths(regularization: float | None) -> tuple[Tensor, int]:
    """Those to choose from, and which is the usual one."""
    values, usual = (STRENGTHS, STRENGTHS.index(USUAL_STRENGTH)) if regularization is None else ((regularization,), 0)
    return torch.tensor(values, dtype=torch.float64), usual


def _folds(count: int, folds: int, generator: torch.Generator) -> Tensor:
    return torch.arange(count)[torch.randperm(count, generator=generator)] % folds


class Nearness:
    """One more column: the log distance to the nearest in-distribution rows, of which a row is not one itself."""

    def __init__(self, inside: Tensor, seed: int) -> None:
        self.mean, self.scale = standard(inside)
        generator = torch.Generator().manual_seed(seed)
        kept = torch.randperm(len(inside), generator=generator)[:MAX_REFERENCES].to(inside.device)
        self.references = (inside[kept] - self.mean) / self.scale

    def __call__(self, rows: Tensor) -> Tensor:
        k = min(NEIGHBORS, len(self.references) - 1)
        if k < 1:
            return rows.new_zeros(len(rows))
        x = (rows.to(self.mean) - self.mean) / self.scale
        return torch.cat([mean_distances(part, self.references, k) for part in x.split(512)]).clamp_min(1e-12).log()


def join(low: Tensor, high: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weights `(E,)` and bias of a discriminant of few columns, `(n, E)` against `(m, E)`: a head's scores, and distances."""
    mean, scale = standard(low)
    # Less their mean, so that constant columns have no variance but for rounding, which may be negative.
    sides = Moments.of((low - mean) / scale), Moments.of((high - mean) / scale, weights)
    weight, bias = discriminant(*sides, low.new_tensor([1e-3]))
    own = weight[:, 0].to(low) / scale
    return own, bias[0].to(low) - own @ mean


class CrossFit:
    """Rows of both sides in folds, for heads that are judged on rows they have not seen."""

    def __init__(self, inside: Tensor, wild: Tensor, seed: int, weights: Tensor | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.folds = min(FOLDS, len(inside), len(wild))
        self.inside, self.wild = inside, wild
        self.fold_in = _folds(len(inside), self.folds, generator)
        self.fold_wild = _folds(len(wild), self.folds, generator)
        self.moments_in = Moments.of_folds(inside, self.fold_in, self.folds)
        self.moments_wild = Moments.of_folds(wild, self.fold_wild, self.folds, weights)

    def scores(self, outside: list[Moments], strengths: Tensor) -> tuple[Tensor, Tensor]:
        """`(n, S)` and `(m, S)`: every row by the head of its fold, fitted on the other in-distribution folds and `outside`."""
        low = self.inside.new_empty(len(self.inside), len(strengths))
        high = self.wild.new_empty(len(self.wild), len(strengths))
        for k in range(self.folds):
            weight, bias = discriminant(self.moments_in.without(k), outside[k], strengths)
            weight, bias = weight.to(low), bias.to(low)
            low[self.fold_in == k] = self.inside[self.fold_in == k] @ weight + bias
            high[self.fold_wild == k] = self.wild[self.fold_wild == k] @ weight + bias
        return low, high

    def first(self, strengths: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of heads against all wild rows."""
        return self.scores([self.moments_wild.without(k) for k in range(self.folds)], strengths)

    def nested(self, strength: Tensor) -> Tensor:
        """`(K, m)`: wild rows by heads that know neither their own fold nor fold k; NaN in fold k itself."""
        scores = self.wild.new_full((self.folds, len(self.wild)), float("nan"))
        for k in range(self.folds):
            for j in range(k + 1, self.folds):
                # Of two folds nothing is left without both.
                apart = (j, k) if self.folds > 2 else ()
                weight, bias = discriminant(
                    self.moments_in.without(*apart), self.moments_wild.without(*apart), strength
                )
                for own, other in ((j, k), (k, j)):
                    rows = self.fold_wild == own
                    scores[other, rows] = (self.wild[rows] @ weight.to(scores) + bias.to(scores))[:, 0]
        return scores

    def second(self, ranked: Tensor, share: float, strengths: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of heads against the `share` of the wild rows of the other folds that `ranked` `(K, m)` puts first, and all."""
        outside = []
        for k in range(self.folds):
            others = (self.fold_wild != k).nonzero().flatten()
            count = min(len(others), max(3, round(share * len(others))))
            first = Moments.of(self.wild[others[ranked[k, others].topk(count).indices]])
            every = self.moments_wild.without(k)
            outside.append(
                Moments(*(a / first.count + MIX / (1 - MIX) * b / every.count for a, b in zip(first, every)))
            )
        return self.scores(outside, strengths)


def class_columns(fit: CrossFit, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What in-distribution classes say of rows, for rows of both sides by classes fitted without their fold.

    Classes share a covariance, shrunk by Ledoit and Wolf's rule.

    Args:
        fit (`CrossFit`): The folds.
        labels (`Tensor`): `(n,)` long, of the in-distribution rows.

    Returns:
        `tuple[Tensor, Tensor]`: `(n, 2)` and `(m, 2)`: the log of the smallest squared distance to a class, and the log of
        how unlikely the likeliest class is to be the right one.
    """
    out = [fit.inside.new_zeros(len(fit.inside), 2), fit.wild.new_zeros(len(fit.wild), 2)]
    for k in range(fit.folds):
        x = fit.inside[fit.fold_in != k]
        names, own = labels[fit.fold_in != k].unique(return_inverse=True)
        means = x.new_zeros(len(names), x.shape[1]).index_add_(0, own, x) / own.bincount()[:, None]
        centred = x - means[own]
        covariance = (centred.T @ centred).double() / len(x)
        scale = covariance.diagonal().mean().clamp_min(1e-12)
        off = covariance.square().sum() - len(covariance) * scale**2
        noise = (centred.double().square().sum(1).square().mean() - covariance.square().sum()) / len(x)
        # At least so much that rows of no variance have a factor.
        share = (noise / off.clamp_min(1e-12)).clamp(1e-6, 1)
        factor = torch.linalg.cholesky(
            (1 - share) * covariance + share * scale * torch.eye(len(covariance)).to(covariance)
        )
        centres = torch.linalg.solve_triangular(factor, means.double().T, upper=False).T
        for rows, fold, columns in zip((fit.inside, fit.wild), (fit.fold_in, fit.fold_wild), out):
            place = (fold == k).nonzero().flatten()
            white = torch.linalg.solve_triangular(factor, rows[place].double().T, upper=False).T
            distances = torch.cdist(white, centres).square()
            columns[place, 0] = distances.amin(1).clamp_min(1e-9).log().to(columns)
            doubt = -(-distances / 2).log_softmax(1).amax(1)
            # Rows of no doubt are alike, whatever the last digits say.
            columns[place, 1] = doubt.clamp_min(5e-5).log().to(columns)
    return out[0], out[1]


def two_pass_scores(
    inside: Tensor,
    wild: Tensor,
    regularization: float | None = None,
    seed: int = 0,
    prevalence: float | None = None,
    labels: Tensor | None = None,
) -> tuple[Tensor, float]:
    """Rank wild rows against in-distribution rows, without knowing which wild rows are OOD.

    Args:
        inside (`Tensor`): `(n, d)` in-distribution rows, at least two.
        wild (`Tensor`): `(m, d)`, at least two.
        regularization (`float`, *optional*): Strength; chosen among `STRENGTHS` when `None`.
        seed (`int`): Of the folds.
        prevalence (`float`, *optional*): Share of OOD rows; estimated when `None`.
        labels (`Tensor`, *optional*): `(n,)` long, classes of the in-distribution rows; with them `class_columns` stand
            in for the distance to the nearest rows.

    Returns:
        `tuple[Tensor, float]`: `(m,)` scores, higher for rows more likely OOD, and the prevalence.
    """
    strengths, usual = _strengths(regularization)
    both = torch.cat([inside, wild])
    found = []
    for squares in (False, True):
        columns = Columns(both, squares, seed)
        fit, ridges = CrossFit(columns(inside), columns(wild), seed), strengths * columns.kept
        low, high = fit.first(ridges)
        best = clearly_best(low, high, usual)
        found.append((fit, ridges, best, low[:, best], high[:, best]))
    chosen = clearly_best(torch.stack([f[3] for f in found], 1), torch.stack([f[4] for f in found], 1), 0)
    fit, ridges, best, low, high = found[chosen]
    if labels is None:
        nearness = Nearness(inside, seed)
        near, far = nearness(inside)[:, None], nearness(wild)[:, None]
    else:
        near, far = class_columns(found[0][0], labels)

    def joined(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights `(K, E)` of the columns, fitted without a fold, and the scores of both sides by those of their fold."""
        low, high = torch.cat([low[:, None], near], 1), torch.cat([high[:, None], far], 1)
        weights, middles = [], []
        for k in range(fit.folds):
            rest = low[fit.fold_in != k]
            weight, _ = join(rest, high[fit.fold_wild != k])
            # In units of the in-distribution rows it knows, so that scores of all folds are on one scale.
            mean, scale = standard((rest @ weight)[:, None])
            weights.append(weight / scale)
            middles.append(mean / scale)
        own, middle = torch.stack(weights), torch.cat(middles)
        low = (low * own[fit.fold_in]).sum(1) - middle[fit.fold_in]
        return own, low, (high * own[fit.fold_wild]).sum(1) - middle[fit.fold_wild]

    own, all_low, all_high = joined(low, high)
    share = estimate_prevalence(all_low, all_high) if prevalence is None else prevalence
    ranked = own[:, :1] * fit.nested(ridges[best : best + 1]) + own[:, 1:] @ far.T
    lows, highs = fit.second(ranked, share, ridges)
    best = clearly_best(lows, highs, usual)
    if clearly_best(torch.stack([lows[:, best], low], 1), torch.stack([highs[:, best], high], 1), 0) == 0:
        low, high = lows[:, best], highs[:, best]
    _, low, high = joined(low, high)
    return high, (estimate_prevalence(low, high) if prevalence is None else prevalence)


class OODHead:
    """A linear head on features or features and squares: the second stage on feature vectors.

    Args:
        regularization (`float`, *optional*):
            Ridge, relative to the mean variance of a column. Chosen by cross-validation of in-distribution against OOD
            rows when `None`: 10, unless another of `STRENGTHS` is clearly better.
        seed (`int`, defaults to 0): Of the folds.

    Attributes:
        strength_ (`float`): After `fit`: the ridge taken.
        squares_ (`bool`): After `fit`: whether squares are among the columns.

    Example:
        ```python
        head = OODHead().fit(features, wild[chosen])
        scores = head.score(new_features)
        ```
    """

    def __init__(self, regularization: float | None = None, seed: int = 0) -> None:
        if regularization is not None and not 0 < regularization < math.inf:
            raise DataError(f"regularization={regularization!r} must be a positive number, or None to choose it.")
        self.regularization, self.seed = regularization, seed

    def fit(self, in_features, ood_features, ood_weights=None) -> OODHead:
        """Fit on rows of both sides, which weigh the same however many they are.

        Args:
            in_features (`Tensor`): `(n, d)` in-distribution rows, at least two.
            ood_features (`Tensor`): `(k, d)` rows taken for OOD, at least one.
            ood_weights (`Tensor`, *optional*):
                `(k,)`, how much each of them counts; not negative, not all zero. `MedixFilter.weights_` goes with all wild
                rows as `ood_features`.

        Raises:
            DataError: too few rows, NaN or infinite entries, another width, or weights that are none.
        """
        inside = as_rows(in_features, "in_features", least=2)
        outside = as_rows(ood_features, "ood_features", inside.shape[1]).to(inside)
        weights = None
        if ood_weights is not None:
            weights = as_numbers(ood_weights, "ood_weights").to(inside)
            if weights.shape != (len(outside),) or not torch.isfinite(weights).all() or (weights < 0).any():
                raise DataError(
                    f"ood_weights have shape {tuple(weights.shape)}; expected ({len(outside)},), none negative."
                )
            outside, weights = outside[weights > 0], weights[weights > 0]
            if len(weights) == 0:
                raise DataError("ood_weights are all zero; expected at least one row that counts.")
        strengths, usual = _strengths(self.regularization)
        both = torch.cat([inside, outside])
        tried = []
        for squares in (False, True):
            columns = Columns(both, squares, self.seed)
            x, y = columns(inside), columns(outside)
            best, low, high = usual, x.new_zeros(2), y.new_zeros(1)
            if len(outside) > 1:
                low, high = CrossFit(x, y, self.seed, weights).first(strengths * columns.kept)
                best = clearly_best(low, high, usual)
                low, high = low[:, best], high[:, best]
            tried.append((columns, x, y, best, low, high))
        lows, highs = torch.stack([t[4] for t in tried], 1), torch.stack([t[5] for t in tried], 1)
        chosen = clearly_best(lows, highs, usual=0)
        self.columns_, x, y, best, low, high = tried[chosen]
        weight, bias = discriminant(
            Moments.of(x), Moments.of(y, weights), strengths[best : best + 1] * self.columns_.kept
        )
        self.weight_, self.bias_ = weight[:, 0].to(x), bias[0].to(x)
        self.strength_, self.squares_ = float(strengths[best]), bool(chosen)
        self.nearness_, self.joint_ = Nearness(inside, self.seed), (x.new_tensor([1.0, 0.0]), x.new_zeros(()))
        if len(outside) > 1:
            low, high = torch.stack([low, self.nearness_(inside)], 1), torch.stack([high, self.nearness_(outside)], 1)
            self.joint_ = join(low, high, weights)
        return self

    def score(self, features) -> Tensor:
        """`(n,)` for `(n, d)` features: higher for rows more likely OOD, above 0 when they look more like OOD rows."""
        if not hasattr(self, "weight_"):
            raise DataError("OODHead is not fitted yet; call `fit(in_features, ood_features)` first.")
        rows = as_rows(features, "features", len(self.columns_.mean))
        linear = torch.cat([self.columns_(part) @ self.weight_ + self.bias_ for part in rows.split(CHUNK)])
        (own, near), bias = self.joint_
        return own * linear + near * self.nearness_(rows) + bias
