"""Post-hoc scores of a trained classifier: no wild rows needed, a few lines each. Higher means more likely OOD.

With `h` the features that the last linear layer reads, `z = W h + b` its logits, `p = softmax(z)`:

| name | score | from |
| --- | --- | --- |
| `msp` | `-max p` | arXiv 1610.02136 |
| `max_logit` | `-max z` | arXiv 1911.11132 |
| `energy` | `-log sum exp z` | arXiv 2010.03759 |
| `odin` | `-max softmax(z / T)` after a step of the input up its own confidence | arXiv 1706.02690 |
| `mahalanobis` | smallest squared distance to a class mean, shared covariance | arXiv 1807.03888 |
| `relative_mahalanobis` | the same less the distance to the mean of all | arXiv 2106.09022 |
| `knn` | distance to the 50th neighbour, on the unit sphere | arXiv 2204.06507 |
| `vim` | `alpha * |h outside the principal space| - log sum exp z` | arXiv 2203.10807 |
| `react` | `energy` of features cut at a high quantile | arXiv 2111.12797 |
| `ash` | `energy` of features pruned to a tenth and scaled (ASH-S) | arXiv 2209.09858 |
| `combined` | `-log` of the p-values of `energy` and `mahalanobis`, shrunk, added (Fisher) | none |

One interface: `SCORES[name]().fit(features, labels, weight, bias).score(features)`. Without `weight` a logistic head is
fitted. MSP, energy, max-logit, ODIN, ReAct and ASH read the logits and mean nothing for a single class. Which of the published
ones is good depends on the data: logits see what lies between the classes, distances what lies away from them. `combined`
asks both, on the scale that left-out in-distribution rows give.

Shapes: n rows, d features, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hf_ext.errors import DataError
from hf_ext.pipelines.medix import as_labels, as_vector, fit_classifier, knn_distances, relabel
from hf_ext.pipelines.ood_head import as_rows, standard


class PostHocScore:
    """A score fitted to in-distribution rows. Subclasses say what they keep (`_fit`) and how they score (`_score`)."""

    reads_logits = True

    def fit(self, features, labels, weight=None, bias=None) -> PostHocScore:
        """Take in the in-distribution rows and the last layer.

        Args:
            features (`Tensor`): `(n, d)`, at least two rows.
            labels (`Tensor`): `(n,)`, `0` to `C - 1`; any integers when `weight` is `None`.
            weight (`Tensor`, *optional*): `(C, d)`; a logistic head is fitted when `None`.
            bias (`Tensor`, *optional*): `(C,)`; zero when `None`.

        Raises:
            DataError: shapes that do not fit, NaN or infinite entries, or one class where the score reads logits.
        """
        h = as_rows(features, "features", least=2)
        if weight is None:
            y, classes = relabel(labels, len(h))
        else:
            weight = as_rows(weight, "weight", h.shape[1]).to(h)
            classes = len(weight)
            y = as_labels(labels, len(h), classes).to(h.device)
        if self.reads_logits and classes < 2:
            raise DataError(
                f"{type(self).__name__} reads the softmax of 1 class, which is constant; use mahalanobis or knn."
            )
        if weight is None and classes < 2:
            weight = h.new_zeros(1, h.shape[1])
        elif weight is None:
            weight, bias = fit_classifier(h, y, classes)
        self.weight_ = weight
        self.bias_ = h.new_zeros(classes) if bias is None else as_vector(bias, classes, "bias").to(h)
        self._fit(h, y)
        return self

    def score(self, features) -> Tensor:
        """`(n,)` for `(n, d)` features: higher for rows more likely out-of-distribution."""
        if not hasattr(self, "weight_"):
            raise DataError(
                f"{type(self).__name__} is not fitted yet; call `fit(features, labels, weight, bias)` first."
            )
        return self._score(as_rows(features, "features", self.weight_.shape[1]).to(self.weight_))

    def logits(self, h: Tensor) -> Tensor:
        """`(n, C)`."""
        return h @ self.weight_.T + self.bias_

    def _fit(self, h: Tensor, y: Tensor) -> None:
        """What a score keeps of the in-distribution rows; nothing, for most."""

    def _score(self, h: Tensor) -> Tensor:
        raise NotImplementedError


class MSP(PostHocScore):
    """Maximum softmax probability."""

    def _score(self, h: Tensor) -> Tensor:
        return -self.logits(h).softmax(1).amax(1)


class MaxLogit(PostHocScore):
    """Largest logit."""

    def _score(self, h: Tensor) -> Tensor:
        return -self.logits(h).amax(1)


class Energy(PostHocScore):
    """Free energy of the logits."""

    def _score(self, h: Tensor) -> Tensor:
        return -self.logits(h).logsumexp(1)


class ODIN(PostHocScore):
    """ODIN with standardised features as input; `odin_scores` takes the inputs of any model."""

    def __init__(self, temperature: float = 1000.0, magnitude: float = 0.0014) -> None:
        self.temperature, self.magnitude = temperature, magnitude

    def _fit(self, h: Tensor, y: Tensor) -> None:
        self.mean_, self.scale_ = standard(h)

    def _score(self, h: Tensor) -> Tensor:
        def logits_of(x: Tensor) -> Tensor:
            return self.logits(x * self.scale_ + self.mean_)

        return odin_scores((h - self.mean_) / self.scale_, logits_of, self.temperature, self.magnitude)


class Mahalanobis(PostHocScore):
    """Distance to the nearest class mean, under one covariance of all classes."""

    reads_logits = False

    def __init__(self, shrink: bool = False) -> None:
        self.shrink = shrink

    def _fit(self, h: Tensor, y: Tensor) -> None:
        x = h.double()
        self.means_ = torch.stack([x[y == c].mean(0) for c in y.unique()])
        centred = torch.cat([x[y == c] - mean for c, mean in zip(y.unique(), self.means_)])
        self.whiten_ = _whitening(centred, self.shrink)

    def _score(self, h: Tensor) -> Tensor:
        x = h.double()
        return torch.cdist(x @ self.whiten_, self.means_ @ self.whiten_).square().amin(1).to(h.dtype)


class RelativeMahalanobis(Mahalanobis):
    """`Mahalanobis` less the distance to the mean of all rows under their covariance."""

    def _fit(self, h: Tensor, y: Tensor) -> None:
        super()._fit(h, y)
        x = h.double()
        self.mean_ = x.mean(0)
        self.background_ = _whitening(x - self.mean_)

    def _score(self, h: Tensor) -> Tensor:
        background = ((h.double() - self.mean_) @ self.background_).square().sum(1)
        return (super()._score(h).double() - background).to(h.dtype)


class KNN(PostHocScore):
    """Distance to the `neighbors`-th in-distribution row, all of unit length."""

    reads_logits = False

    def __init__(self, neighbors: int = 50) -> None:
        self.neighbors = neighbors

    def _fit(self, h: Tensor, y: Tensor) -> None:
        self.rows_ = h

    def _score(self, h: Tensor) -> Tensor:
        return knn_distances(h, self.rows_, self.neighbors)


class ViM(PostHocScore):
    """Virtual logit: the part of the features outside their principal space, on the scale of the logits."""

    def __init__(self, dimensions: int | None = None) -> None:
        self.dimensions = dimensions

    def _fit(self, h: Tensor, y: Tensor) -> None:
        d = h.shape[1]
        # The paper's choice: 1000 of 2048, 512 of 768, else half.
        kept = self.dimensions or (1000 if d >= 2048 else 512 if d >= 768 else max(1, d // 2))
        if kept >= d > 1:
            raise DataError(f"ViM keeps {kept} of {d} dimensions; nothing is left outside: use fewer than {d}.")
        self.origin_ = -(torch.linalg.pinv(self.weight_.double()) @ self.bias_.double())
        centred = h.double() - self.origin_
        _, vectors = torch.linalg.eigh(centred.T @ centred / len(h))
        self.outside_ = vectors[:, : d - kept]
        residual = (centred @ self.outside_).norm(dim=1).mean()
        self.alpha_ = self.logits(h).amax(1).double().mean() / residual.clamp_min(1e-12)

    def _score(self, h: Tensor) -> Tensor:
        residual = ((h.double() - self.origin_) @ self.outside_).norm(dim=1)
        return (self.alpha_ * residual - self.logits(h).logsumexp(1).double()).to(h.dtype)


class ReAct(Energy):
    """Energy of features cut at the `quantile` of all in-distribution activations."""

    def __init__(self, quantile: float = 0.9) -> None:
        self.quantile = quantile

    def _fit(self, h: Tensor, y: Tensor) -> None:
        values = h.flatten()
        self.limit_ = values.kthvalue(max(1, round(self.quantile * len(values)))).values

    def _score(self, h: Tensor) -> Tensor:
        return super()._score(h.clamp_max(self.limit_))


class ASH(Energy):
    """Energy of features of which the largest `1 - pruned` stay, times `exp(sum before / sum after)`."""

    def __init__(self, pruned: float = 0.9) -> None:
        self.pruned = pruned

    def _score(self, h: Tensor) -> Tensor:
        top = h.topk(max(1, round((1 - self.pruned) * h.shape[1])), dim=1)
        kept = torch.zeros_like(h).scatter_(1, top.indices, top.values)
        # Features are those after a ReLU in the paper; negative ones, of other models, do not count for the sums.
        before, after = h.relu().sum(1), kept.relu().sum(1)
        scale = torch.where(after > 0, before / after.clamp_min(1e-12), 1.0).exp()
        return super()._score(kept * scale[:, None])


class Combined(PostHocScore):
    """Fisher's combination of `Energy` and `Mahalanobis` with a shrunk covariance.

    What is usual is read off in-distribution rows in `folds` parts, each scored without it. Logits of a given last layer
    are those of its own training rows, and so a little too sure.
    """

    def __init__(self, folds: int = 5, seed: int = 0) -> None:
        self.folds, self.seed = folds, seed

    def fit(self, features, labels, weight=None, bias=None) -> PostHocScore:
        """As of every score; at least two rows a fold."""
        h = as_rows(features, "features", least=2 * self.folds)
        self.parts_ = [part.fit(h, labels, weight, bias) for part in self._parts()]
        self.weight_, self.bias_ = self.parts_[0].weight_, self.parts_[0].bias_
        order = torch.randperm(len(h), generator=torch.Generator().manual_seed(self.seed))
        fold = (torch.arange(len(h))[order] % self.folds).to(h.device)
        y = torch.as_tensor(labels).detach().to(h.device)
        known: list[list[Tensor]] = [[], []]
        for k in range(self.folds):
            rest = fold != k
            for part, scores in zip(self._parts(), known):
                scores.append(part.fit(h[rest], y[rest], weight, bias).score(h[~rest]).double())
        self.known_ = [torch.cat(scores).sort().values for scores in known]
        return self

    def _parts(self) -> list[PostHocScore]:
        return [Energy(), Mahalanobis(shrink=True)]

    def _score(self, h: Tensor) -> Tensor:
        pairs = zip(self.parts_, self.known_)
        return torch.stack([_surprise(part.score(h).double(), known) for part, known in pairs]).sum(0).to(h.dtype)


SCORES: dict[str, type[PostHocScore]] = {
    "msp": MSP,
    "max_logit": MaxLogit,
    "energy": Energy,
    "odin": ODIN,
    "mahalanobis": Mahalanobis,
    "relative_mahalanobis": RelativeMahalanobis,
    "knn": KNN,
    "vim": ViM,
    "react": ReAct,
    "ash": ASH,
    "combined": Combined,
}


def odin_scores(
    inputs: Tensor, logits_of: Callable[[Tensor], Tensor], temperature: float = 1000.0, magnitude: float = 0.0014
) -> Tensor:
    """ODIN of any model: inputs move by `magnitude` towards more confidence, and the softmax is that of `z / temperature`.

    Args:
        inputs (`Tensor`): `(n, ...)`, floating point: pixels, or embeddings of tokens.
        logits_of (`Callable`): Inputs to logits `(n, C)`, differentiable, each row on its own (eval mode).
        temperature (`float`, defaults to 1000): The paper's T.
        magnitude (`float`, defaults to 0.0014): The paper's epsilon, in units of the inputs.

    Returns:
        `Tensor`: `(n,)`, higher for rows more likely out-of-distribution.
    """
    with torch.enable_grad():
        x = inputs.detach().clone().requires_grad_()
        confidence = (logits_of(x) / temperature).log_softmax(1).amax(1).sum()
        (gradient,) = torch.autograd.grad(confidence, x)
    with torch.no_grad():
        return -(logits_of(inputs + magnitude * gradient.sign()) / temperature).softmax(1).amax(1)


def _whitening(centred: Tensor, shrink: bool = False) -> Tensor:
    """`(d, d)` that makes the covariance of `(n, d)` centred rows the identity; shrunk by Ledoit and Wolf's rule if asked."""
    n, d = centred.shape
    covariance = centred.T @ centred / n
    if shrink:
        scale = covariance.diagonal().mean()
        off = covariance.square().sum() - d * scale**2
        noise = (centred.square().sum(1).square().sum() / n - covariance.square().sum()) / n
        share = float((noise / off.clamp_min(1e-300)).clamp(0, 1))
        covariance = (1 - share) * covariance + share * scale * torch.eye(d).to(covariance)
    values, vectors = torch.linalg.eigh(covariance)
    # Directions without variance would weigh without limit: they get a millionth of the mean one.
    return vectors / values.clamp_min(1e-6 * values.mean().clamp_min(1e-300)).sqrt()


def _surprise(scores: Tensor, known: Tensor, tail: float = 0.1) -> Tensor:
    """`-log` of the share of the ascending `known` scores that are higher; an exponential tail beyond their upper part."""
    start = known[min(len(known) - 1, math.floor((1 - tail) * len(known)))]
    beyond = known[known >= start] - start
    rank = torch.searchsorted(known, torch.minimum(scores, start)).double()
    excess = (scores - start).clamp_min(0) / beyond.mean().clamp_min(1e-12)
    return excess - (1 - rank / (len(known) + 1)).log()
