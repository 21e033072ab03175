"""Medix: which rows of an unlabelled ("wild") set are out-of-distribution (OOD), from labelled in-distribution rows.

Paper: https://huggingface.co/papers/2510.06505. A classifier trained on in-distribution rows gives every row a gradient
`g`: of the cross-entropy, with the predicted class as label, towards its last layer. The element-wise median of the
gradients of a set that holds OOD rows is off the mean gradient `r` of the in-distribution rows, and the rows whose removal
brings it nearer are taken for OOD (section 3.1, equation 4, algorithm 1):

    D = ||median(G) - r||,    delta_i = D - ||median(G without row i) - r||

Removing a row moves the (lower) median of a coordinate to one of two neighbours, whatever the row is. With `s` a sorted
coordinate of m rows, `q = (m - 2) // 2`, `lo = s[q]` and `hi = s[q + 1]`, the median without row i is `hi` where
`g_i <= lo` and `lo` elsewhere, so that all m deltas cost `O(m d)` and are exact:

    delta_i = D - sqrt(sum_j (lo_j - r_j)^2 + sum_j [g_ij <= lo_j] ((hi_j - r_j)^2 - (lo_j - r_j)^2))

Read backwards, this says what the score sees: on which side of the median a gradient lies, never how far. Where
the two neighbours coincide in every coordinate, as for gradients that are mostly zeros, all deltas are zero. The gradient
itself needs no backward pass. With `p` the softmax, `e` the label as a unit vector, `h` the features and `W` the last
weight, it is `u = W^T (p - e)` towards the features and `(p - e) h^T` towards `W`.

Measured (`benchmarks/ood_quality.py`), this score often picks worse than chance, because the sides a gradient lies on
mostly tell which class was predicted. The default filter, `two_pass`, uses no gradient: see `hf_ext.pipelines.ood_head`.

Shapes: n in-distribution rows, m wild rows, d wide, C classes.
Plugs in: feature vectors of any model; `OODTrainer` puts the second stage into a transformers model.

Differs from the paper: the leave-one-out step is exact but not a loop; the reference gradient is the mean over rows, not
over batches; `mode="default"` tests for a stop before it removes rows, and relative to the first distance; a default
filter, and an estimate of how many rows to take, where the released settings are close to the true count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_ext.config import MethodConfig
from hf_ext.errors import DataError
from hf_ext.log import get_logger, warn_once
from hf_ext.pipelines.ood_head import MIX, as_numbers, as_rows, standard, two_pass_scores


GRADIENT_FILTERS = ("medix", "sal", "grad_dist")
# Rows handled at once: what a step needs beside its input stays below some ten megabytes at d = 512.
CHUNK = 4096

_logger = get_logger(__name__)


@dataclass
class MedixConfig(MethodConfig):
    """Which wild rows a `MedixFilter` takes for out-of-distribution, and how many.

    Args:
        mode (`"default"` or `"paper"`, defaults to `"default"`):
            `"paper"` follows the released code: rows are removed before the test for a stop, `epsilon` is absolute, and
            the loop alone decides how many rows are taken. The filter `"two_pass"`, not in the paper, stands for `"medix"`.
        filter (`str`, defaults to `"two_pass"`):
            `"two_pass"`: cross-fitted head of in-distribution against wild rows, then against the rows it ranks first.
            `"medix"`: the paper's. `"sal"`: squared projection on the first singular vector of the centred gradients
            (arXiv 2402.03502). `"grad_dist"`: distance of a gradient to the mean. `"knn"`: distance to the
            `neighbors`-th in-distribution row. `"all"` and `"random"`: controls.
        gradient (`str`, defaults to `"feature"`):
            `"feature"`: towards the features, d numbers. `"weight"`: towards the last weight, C d numbers. `"bn_bias"`:
            towards the bias of the last batch norm, as in the paper; the caller computes it and passes `gradients=`.
        prevalence (`float`, *optional*):
            Share of OOD rows among the wild rows (the paper's pi); estimated when `None`.
        rows_per_round (`int`, *optional*):
            Rows the `"medix"` loop removes a round (k). `None`: a fifth of the count in the default mode, the whole count
            in the paper's, which is what its released settings do.
        epsilon (`float`, defaults to 0.05):
            The loop stops when a round moved the median's distance by less: times the first distance in the default
            mode, absolute in the paper's.
        max_rounds (`int`, defaults to 20):
            Most rounds of the loop.
        neighbors (`int`, defaults to 50):
            Of the filter `"knn"`; fewer where there are fewer rows.
        max_wild_rows (`int`, defaults to 100 000):
            Rows a streamed wild set is sampled down to.
        regularization (`float`, *optional*):
            L2 strength of the head of `"two_pass"`; chosen by cross-validation, without labels, when `None`.
        seed (`int`, defaults to 0):
            Of folds, splits and samples.
    """

    mode: Literal["default", "paper"] = "default"
    filter: Literal["two_pass", "medix", "sal", "knn", "grad_dist", "all", "random"] = "two_pass"
    gradient: Literal["feature", "weight", "bn_bias"] = "feature"
    prevalence: float | None = None
    rows_per_round: int | None = None
    epsilon: float = 0.05
    max_rounds: int = 20
    neighbors: int = 50
    max_wild_rows: int = 100_000
    regularization: float | None = None
    seed: int = 0

    def validate(self) -> None:
        if self.mode == "paper" and self.filter == "two_pass":
            self.filter = "medix"
        self.check(
            self.prevalence is None or 0 < self.prevalence < 1, "prevalence", "must be between 0 and 1, or None"
        )
        self.check(self.rows_per_round is None or self.rows_per_round >= 1, "rows_per_round", "must be at least 1")
        self.check(self.epsilon >= 0, "epsilon", "must not be negative")
        self.check(self.max_rounds >= 1, "max_rounds", "must be at least 1")
        self.check(self.neighbors >= 1, "neighbors", "must be at least 1")
        self.check(self.max_wild_rows >= 2, "max_wild_rows", "must be at least 2")
        self.check(
            self.regularization is None or self.regularization > 0, "regularization", "must be above 0, or None"
        )
        self.check(0 <= self.seed < 2**63, "seed", "must be between 0 and 2**63 - 1")


def last_layer_gradients(features, logits, labels=None, weight=None, kind: str = "feature") -> Tensor:
    """Gradient of the cross-entropy of every row, in closed form.

    Args:
        features (`Tensor`): `(n, d)`, what the last linear layer reads.
        logits (`Tensor`): `(n, C)`, what it writes.
        labels (`Tensor`, *optional*): `(n,)` classes; the predicted ones when `None`.
        weight (`Tensor`, *optional*): `(C, d)` of the layer; only `kind="feature"` needs it.
        kind (`str`, defaults to `"feature"`): `"feature"` or `"weight"`, as in `MedixConfig.gradient`.

    Returns:
        `Tensor`: `(n, d)` `W^T (p - e)`, or `(n, C * d)` rows `(p - e) h^T`, flattened as the weight is.

    Raises:
        DataError: shapes do not fit, a label is no class, or `kind` has no closed form here.
    """
    h = as_rows(features, "features")
    z = as_rows(logits, "logits").to(h.dtype)
    if len(z) != len(h):
        raise DataError(f"logits hold {len(z)} rows and features {len(h)}; expected one for each.")
    labels = z.argmax(1) if labels is None else as_labels(labels, len(h), z.shape[1])
    residual = z.softmax(1)
    residual[torch.arange(len(z), device=z.device), labels.to(z.device)] -= 1
    if kind == "feature":
        return residual @ _weight(weight, z.shape[1], h.shape[1]).to(h)
    if kind == "weight":
        return (residual[:, :, None] * h[:, None, :]).flatten(1)
    raise DataError(
        f"gradient {kind!r} has no closed form from features and logits; compute it with a hook and pass `gradients=`."
    )


def median_shift_scores(gradients, reference) -> Tensor:
    """How much nearer the median gradient comes to `reference` without each row: the paper's delta, exactly.

    Args:
        gradients (`Tensor`): `(m, d)`, at least two rows.
        reference (`Tensor`): `(d,)`, mean in-distribution gradient.

    Returns:
        `Tensor`: `(m,)` float64, accumulated in float64.

    Raises:
        DataError: fewer than two rows (the median of none is undefined), another width, or NaN or infinite entries.
    """
    g = as_rows(gradients, "gradients", least=2)
    return _shifts(_order_statistics(g, as_vector(reference, g.shape[1])), g)


def greedy_median_filter(
    gradients, reference, rows_per_round: int, epsilon: float, max_rounds: int, paper: bool = False
) -> tuple[Tensor, int]:
    """Algorithm 1: rows with the largest delta go, `rows_per_round` at a time, until the median hardly moves.

    Args:
        gradients (`Tensor`): `(m, d)`, at least two rows.
        reference (`Tensor`): `(d,)`.
        rows_per_round (`int`): The paper's k. As many as are left, or more: all of them go.
        epsilon (`float`): Least change of the distance to go on; relative to the first distance unless `paper`.
        max_rounds (`int`): Most rounds.
        paper (`bool`, defaults to `False`):
            Test after the removal, as the released code does, and against an absolute `epsilon`.

    Returns:
        `tuple[Tensor, int]`: indices in order of removal, ties in the order of rows, and the number of rounds.
    """
    g = as_rows(gradients, "gradients", least=2)
    reference = as_vector(reference, g.shape[1])
    if rows_per_round < 1 or max_rounds < 1:
        raise DataError(f"rows_per_round={rows_per_round} and max_rounds={max_rounds} must be at least 1.")
    left = torch.arange(len(g), device=g.device)
    taken: list[Tensor] = []
    first, previous = None, 1e-8
    for number in range(1, max_rounds + 1):
        rows = g[left]
        statistics = _order_statistics(rows, reference)
        distance = statistics[0]
        first = distance if first is None else first
        if not paper and number > 1 and abs(previous - distance) < epsilon * first:
            return torch.cat(taken), number - 1
        if rows_per_round >= len(left):
            return torch.cat([*taken, left]), number
        order = _shifts(statistics, rows).sort(descending=True, stable=True).indices
        taken.append(left[order[:rows_per_round]])
        left = left[order[rows_per_round:].sort().values]
        if paper and abs(previous - distance) < epsilon:
            return torch.cat(taken), number
        previous = distance
    return torch.cat(taken), max_rounds


class Reservoir:
    """A uniform sample of a stream of rows (Algorithm R), at most `max_rows` of them, a batch at a time.

    Args:
        max_rows (`int`): Rows kept.
        seed (`int`, defaults to 0): Of a private generator.

    Example:
        ```python
        reservoir = Reservoir(10_000)
        for batch in stream:
            reservoir.add(batch)
        wild = reservoir.rows()
        ```
    """

    def __init__(self, max_rows: int, seed: int = 0) -> None:
        if max_rows < 1:
            raise DataError(f"max_rows={max_rows} must be at least 1.")
        self.max_rows, self.seen = max_rows, 0
        self._generator = torch.Generator().manual_seed(seed)
        self._parts: list[Tensor] = []
        self._rows: Tensor | None = None

    def add(self, rows) -> None:
        """Offer `(k, d)` rows, each kept with the chance that makes the sample uniform over all offered so far."""
        rows = as_rows(rows, "rows", self._width(), least=0)
        free = max(0, self.max_rows - self.seen)
        if free and len(rows):
            self._parts.append(rows[:free].clone())
        rest = rows[free:]
        if len(rest):
            kept = self.rows()
            number = torch.arange(self.seen + min(free, len(rows)), self.seen + len(rows)) + 1
            # Row `number` of the stream replaces a uniform place of `number`; places beyond the sample mean: not kept.
            place = (torch.rand(len(rest), generator=self._generator, dtype=torch.float64) * number).long()
            source = torch.full((self.max_rows,), -1)
            hits = (place < self.max_rows).nonzero().flatten()
            # Several rows may hit one place, the last of them stays: amax keeps the latest whatever the order of writes.
            source.scatter_reduce_(0, place[hits], hits, "amax")
            changed = (source >= 0).nonzero().flatten()
            kept[changed.to(kept.device)] = rest[source[changed].to(rest.device)].to(kept)
        self.seen += len(rows)

    def rows(self) -> Tensor:
        """`(min(seen, max_rows), d)`, in no particular order.

        Raises:
            DataError: no row was added.
        """
        if self._parts:
            held = [] if self._rows is None else [self._rows]
            self._rows, self._parts = torch.cat([*held, *self._parts]), []
        if self._rows is None:
            raise DataError("the stream held no rows; expected at least 1.")
        return self._rows

    def _width(self) -> int | None:
        part = self._parts[0] if self._parts else self._rows
        return None if part is None else part.shape[1]


class MedixFilter:
    """Scores wild rows and selects those to be taken for out-of-distribution.

    Args:
        config (`MedixConfig`, *optional*): Settings.

    Attributes:
        prevalence_ (`float`): After `select`: share of the wild rows taken, or the estimate behind it.
        weights_ (`Tensor`): After `select`: `(m,)`, how much each wild row counts for an `OODHead`; half of the weight is
            on the chosen rows and half on all, which forgives a wrong choice.

    Example:
        ```python
        medix = MedixFilter().reference(features, labels)
        chosen = medix.select(wild_features)
        head = OODHead().fit(features, wild_features, medix.weights_)
        ```
    """

    _weight: Any
    _bias: Any
    _mean_gradient: Any

    def __init__(self, config: MedixConfig | None = None) -> None:
        self.config = MedixConfig() if config is None else config

    def reference(self, features, labels, weight=None, bias=None, gradients=None) -> MedixFilter:
        """Take in the in-distribution rows.

        Args:
            features (`Tensor`): `(n, d)`, at least two rows.
            labels (`Tensor`): `(n,)` true classes, `0` to `C - 1`; any integers when `weight` is `None`.
            weight (`Tensor`, *optional*):
                `(C, d)`, last linear layer of the classifier; where it is missing and the filter needs one, a logistic head is fitted.
            bias (`Tensor`, *optional*): `(C,)` of that layer; zero when `None`.
            gradients (`Tensor`, *optional*): `(n, e)` with true labels, in place of the closed form.

        Raises:
            DataError: NaN or infinite entries, shapes that do not fit, labels that are no classes, or fewer than two
                classes where the filter needs gradients.
        """
        config = self.config
        rows = as_rows(features, "features", least=2)
        self._weight = self._bias = self._mean_gradient = None
        self.features_ = rows
        if weight is None:
            labels, classes = relabel(labels, len(rows))
        else:
            weight = as_rows(weight, "weight", rows.shape[1]).to(rows)
            classes = len(weight)
            labels = as_labels(labels, len(rows), classes)
        self._labels = labels
        if config.filter in GRADIENT_FILTERS:
            if classes < 2:
                raise DataError(
                    f"the filter {config.filter!r} needs gradients of a classifier of at least two classes and there is "
                    "1: its softmax is constant; use filter='two_pass' or 'knn'."
                )
            if gradients is None and config.gradient == "bn_bias":
                raise DataError("gradient='bn_bias' comes from a hook: pass `gradients=` here and to `select`.")
            if gradients is None:
                if weight is None:
                    weight, bias = fit_classifier(rows, labels, classes)
                bias = rows.new_zeros(classes) if bias is None else as_vector(bias, classes, "bias").to(rows)
                self._weight, self._bias = weight, bias
                gradients = last_layer_gradients(rows, rows @ weight.T + bias, labels, weight, config.gradient)
            else:
                gradients = as_rows(gradients, "gradients")
                if len(gradients) != len(rows):
                    raise DataError(
                        f"gradients hold {len(gradients)} rows and features {len(rows)}; expected as many."
                    )
            self._mean_gradient = gradients.mean(0)
        return self

    def score(self, features, gradients=None) -> Tensor:
        """Score wild rows with the configured filter.

        Args:
            features (`Tensor`): `(m, d)`, at least two rows.
            gradients (`Tensor`, *optional*): `(m, e)` with predicted labels, where `reference` was given gradients.

        Returns:
            `Tensor`: `(m,)`, higher for rows more likely out-of-distribution. Most filters score a row among the others, so that the same row may score otherwise in another set.
        """
        rows = self._wild(features)
        name = self.config.filter
        if name == "two_pass":
            return self._two_pass(rows)[0]
        if name == "knn":
            return knn_distances(rows, self.features_, self.config.neighbors)
        if name == "all":
            return rows.new_ones(len(rows))
        if name == "random":
            return torch.rand(len(rows), generator=torch.Generator().manual_seed(self.config.seed)).to(rows)
        if name == "medix":
            return median_shift_scores(self._medix_gradients(rows, gradients), self._mean_gradient)
        g = self._gradients(rows, gradients)
        centred = g - self._mean_gradient.to(g)
        if name == "grad_dist":
            return centred.norm(dim=1)
        return (centred @ _first_direction(centred, self.config.seed)).square()

    def select(self, features, gradients=None) -> Tensor:
        """Choose the wild rows to take for out-of-distribution.

        Args:
            features (`Tensor`): `(m, d)`, at least two rows.
            gradients (`Tensor`, *optional*): `(m, e)`, as in `score`.

        Returns:
            `Tensor`: indices, ascending, at least one.
        """
        rows = self._wild(features)
        chosen = self._choose(rows, gradients).sort().values.cpu()
        self.weights_ = torch.full((len(rows),), MIX / len(rows))
        self.weights_[chosen] += (1 - MIX) / len(chosen)
        return chosen

    def _choose(self, rows: Tensor, gradients) -> Tensor:
        config = self.config
        if config.filter == "all":
            self.prevalence_ = 1.0 if config.prevalence is None else config.prevalence
            return torch.arange(len(rows))
        if config.filter == "medix" and config.mode == "paper" and config.rows_per_round is not None:
            return self._greedy(rows, gradients, config.rows_per_round)
        scores: Any = None
        share = config.prevalence
        if config.filter == "two_pass" or share is None:
            scores, share = self._two_pass(rows)
        self.prevalence_ = share
        count = min(len(rows), max(1, round(share * len(rows))))
        if config.filter == "medix":
            if config.mode == "paper":
                return self._greedy(rows, gradients, count)
            chosen, _ = greedy_median_filter(
                self._medix_gradients(rows, gradients),
                self._mean_gradient,
                config.rows_per_round or math.ceil(count / 5),
                config.epsilon,
                config.max_rounds,
            )
            return chosen[:count]
        if config.filter != "two_pass":
            scores = self.score(rows, gradients)
        return scores.sort(descending=True, stable=True).indices[:count]

    def _greedy(self, rows: Tensor, gradients, count: int) -> Tensor:
        config = self.config
        g = self._medix_gradients(rows, gradients)
        chosen, _ = greedy_median_filter(g, self._mean_gradient, count, config.epsilon, config.max_rounds, paper=True)
        self.prevalence_ = len(chosen) / len(rows)
        return chosen

    def _medix_gradients(self, rows: Tensor, gradients) -> Tensor:
        """Gradients of the wild rows, with a warning where the median cannot tell them apart."""
        g = self._gradients(rows, gradients)
        zeros = float((g == 0).double().mean())
        if not median_shift_scores(g, self._mean_gradient).any():
            warn_once(
                _logger,
                f"degenerate gradients: the deltas of all {len(g)} wild rows are 0 ({zeros:.0%} of the entries are exactly "
                "zero), so that rows are taken in their order; use gradient='feature' or filter='two_pass'.",
            )
        elif zeros > 0.5:
            warn_once(
                _logger,
                f"{zeros:.0%} of the gradients' entries are exactly zero, so that most medians coincide and most coordinates "
                "say nothing; use gradient='feature' or filter='two_pass'.",
            )
        return g

    def _two_pass(self, rows: Tensor) -> tuple[Tensor, float]:
        config = self.config
        settings = config.regularization, config.seed, config.prevalence
        return two_pass_scores(self.features_.to(rows), rows, *settings, labels=self._labels.to(rows.device))

    def _wild(self, features) -> Tensor:
        if not hasattr(self, "features_"):
            raise DataError("MedixFilter has no in-distribution rows yet; call `reference(features, labels)` first.")
        return as_rows(features, "features", self.features_.shape[1], least=2)

    def _gradients(self, rows: Tensor, gradients) -> Tensor:
        if gradients is None:
            if self._weight is None:
                raise DataError("`reference` was given gradients; pass those of the wild rows as `gradients=` too.")
            weight, bias = self._weight.to(rows), self._bias.to(rows)
            return last_layer_gradients(rows, rows @ weight.T + bias, None, weight, self.config.gradient)
        g = as_rows(gradients, "gradients", len(self._mean_gradient), least=2)
        if len(g) != len(rows):
            raise DataError(f"gradients hold {len(g)} rows and features {len(rows)}; expected as many.")
        return g


def as_labels(labels, count: int, classes: int) -> Tensor:
    """`labels` as `(count,)` long in `0` to `classes - 1`; `DataError` otherwise."""
    found = _integers(labels, count)
    if count and (found.min() < 0 or found.max() >= classes):
        raise DataError(
            f"labels go from {int(found.min())} to {int(found.max())} and the last layer has {classes} classes; "
            f"expected 0 to {classes - 1}."
        )
    return found


def fit_classifier(features: Tensor, labels: Tensor, classes: int, strength: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Weight `(C, d)` and bias `(C,)` of a multinomial logistic head on `(n, d)` features, L2 on standardised ones."""
    mean, scale = standard(features)
    x = (features - mean) / scale
    theta = x.new_zeros(classes, x.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ theta[:, :-1].T + theta[:, -1], labels)
        loss = loss + strength / 2 * theta[:, :-1].square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    weight = theta.detach()[:, :-1] / scale
    return weight, theta.detach()[:, -1] - weight @ mean


def knn_distances(rows: Tensor, reference: Tensor, neighbors: int) -> Tensor:
    """`(m,)` distances of `(m, d)` rows, of unit length, to their `neighbors`-th nearest of `(n, d)` reference rows."""
    unit = F.normalize(reference.to(rows), dim=1)
    k = min(neighbors, len(unit))
    return (
        torch.cat([(F.normalize(part, dim=1) @ unit.T).topk(k, dim=1).values[:, -1] for part in rows.split(CHUNK)])
        .mul_(-2)
        .add_(2)
        .clamp_min_(0)
        .sqrt_()
    )


def relabel(labels, count: int) -> tuple[Tensor, int]:
    found = _integers(labels, count)
    names, found = torch.unique(found, return_inverse=True)
    return found, len(names)


def as_vector(values, width: int, name: str = "reference") -> Tensor:
    vector = as_numbers(values, name)
    if vector.shape != (width,) or not torch.isfinite(vector).all():
        raise DataError(f"{name} has shape {tuple(vector.shape)}; expected ({width},), finite.")
    return vector


def _integers(labels, count: int) -> Tensor:
    found = as_numbers(labels, "labels")
    if found.shape != (count,):
        raise DataError(f"labels have shape {tuple(found.shape)}; expected ({count},), one for each row of features.")
    if found.is_floating_point() and not ((found == found.round()) & found.isfinite()).all():
        raise DataError("labels hold numbers that are no integers; expected the index of a class.")
    return found.long()


def _weight(weight, classes: int, width: int) -> Tensor:
    if weight is None:
        raise DataError("gradient='feature' needs the weight of the last layer; pass `weight=`.")
    weight = as_rows(weight, "weight", width)
    if len(weight) != classes:
        raise DataError(f"weight has {len(weight)} rows and logits are {classes} wide; expected one row a class.")
    return weight


def _order_statistics(g: Tensor, reference: Tensor) -> tuple[float, Tensor, Tensor, Tensor]:
    """D, `lo`, and the squares `(lo - r)^2` and `(hi - r)^2`, float64."""
    m = len(g)
    columns = g.T.contiguous()
    # Of a single row, which the loop may leave, only the distance means something.
    q = max(0, (m - 2) // 2)
    lo, hi = columns.kthvalue(q + 1).values, columns.kthvalue(min(q + 2, m)).values
    r = reference.to(g.device).double()
    low, high = (lo.double() - r).square(), (hi.double() - r).square()
    # The lower median of an even count is lo itself, of an odd one hi.
    return float((low if m % 2 == 0 else high).sum().sqrt()), lo, low, high


def _shifts(statistics: tuple[float, Tensor, Tensor, Tensor], rows: Tensor) -> Tensor:
    distance, lo, low, high = statistics
    gain, base = high - low, low.sum()
    return torch.cat(
        [distance - (base + (part <= lo).double() @ gain).clamp_min_(0).sqrt_() for part in rows.split(CHUNK)]
    )


def _first_direction(centred: Tensor, seed: int, steps: int = 50) -> Tensor:
    """First right singular vector of `(m, d)`, by power iteration."""
    start = torch.randn(centred.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    v = F.normalize(start, dim=0).to(centred)
    for _ in range(steps):
        v = F.normalize(centred.T @ (centred @ v), dim=0)
    return v
