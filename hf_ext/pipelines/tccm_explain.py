"""Why a row scores as it does, and how far the score can move: attributions, certificates, a picture.

`"conditional"`, the default. With S the covariance of the training rows in standard deviations, the shares of the features are
found one after another: the feature whose shift, if freed, explains most of the row,

    gain_j = u_j^2 / (P_jj + 1/v) ,   P = (S + ridge I)^-1 ,  u = P z ,

then the next one given that, by one rank-one change of P and u, until all are ranked. `1/v` is the prior precision of a
shift: it keeps a feature that the others determine almost exactly from taking a shift of many deviations on itself. A feature
of large |z| that its neighbours explain gets little, one that contradicts them gets much; |z| alone cannot tell. The gains
are scaled to sum to the score.

`"direct"` splits the score's own squares: of the distance sum_j (z_j - neighbour_j)^2, of the residual sum_j r_j^2, by the
weights of the two parts. `"paper"` is |r_j|, whose squares sum to S^2 in `mode="paper"` (section on explanations).

Shapes: n rows, d features, k neighbours, m members.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from hf_ext.errors import ConfigError, DataError, MissingPackageError
from hf_ext.pipelines.neighbors import is_self, nearest
from hf_ext.pipelines.tccm import CHUNK_ROWS, TCCMModel


if TYPE_CHECKING:
    from matplotlib.axes import Axes

Method = Literal["conditional", "direct", "paper"]

# Added to the covariance of standardised features: directions of less than a third of a deviation are noise.
RIDGE = 0.3
# 1/v: shifts worth finding are of one to three deviations.
PRIOR_PRECISION = 0.4
# Features ranked one after another; those after them keep the gain they have by then.
MAX_RANKED = 64
# Numbers of one chunk of P, one matrix a row.
_CHUNK = 1 << 24


@torch.no_grad()
def explain(model: TCCMModel, features: Tensor, method: Method = "conditional") -> Tensor:
    """What each feature contributes to each row's score.

    Args:
        model (`TCCMModel`): A fitted model.
        features (`Tensor`): `(n, d)`, in the units of the table.
        method (`str`, defaults to `"conditional"`): Or `"direct"`, `"paper"`.

    Returns:
        `Tensor`: `(n, d)`, not negative; rows sum to the score, but for `"paper"`, whose squares sum to its square.

    Raises:
        ConfigError: an unknown method, or `"conditional"` on a model without references.
        DataError: another width than d, or values that are not finite.
    """
    if method not in ("conditional", "direct", "paper"):
        raise ConfigError(f"method={method!r} must be 'conditional', 'direct' or 'paper'.")
    z = model.standardize(features)
    if method == "paper":
        return model._residuals(z).square().mean(0).sqrt()
    if method == "direct":
        shares = torch.cat([_direct_shares(model, chunk) for chunk in z.split(CHUNK_ROWS)]) if len(z) else z
    elif len(model.references) < 2:
        raise ConfigError("method='conditional' needs training rows, and this model keeps none; use method='direct'.")
    else:
        rows = model.references
        gains = conditional_gains(z, rows.T @ rows / len(rows))
        total = gains.sum(1, keepdim=True)
        # The mean row deviates in no feature: all share its score alike.
        shares = torch.where(total > 0, gains / total.clamp_min(1e-30), 1 / z.shape[1])
    return shares * model._scores(z)[:, None]


def conditional_gains(
    z: Tensor, covariance: Tensor, ridge: float = RIDGE, prior_precision: float = PRIOR_PRECISION
) -> Tensor:
    """Gains of all features, each given those ranked before it, `(n, d)`, not negative.

    Args:
        z (`Tensor`): `(n, d)`, centred rows.
        covariance (`Tensor`): `(d, d)`.
        ridge, prior_precision (`float`): See the top of this file.
    """
    d = z.shape[1]
    precision = torch.linalg.inv(covariance.double() + ridge * torch.eye(d, dtype=torch.float64, device=z.device))
    chunk = max(1, _CHUNK // (d * d))
    return torch.cat([_gains(rows, precision.float(), prior_precision) for rows in z.split(chunk)]) if len(z) else z


def _gains(z: Tensor, precision: Tensor, prior: float) -> Tensor:
    n, d = z.shape
    each = torch.arange(n, device=z.device)
    P, u = precision.expand(n, d, d).clone(), z @ precision
    gains, ranked = torch.zeros_like(z), torch.zeros_like(z, dtype=torch.bool)
    for _ in range(min(d, MAX_RANKED)):
        gain = u.square() / (P.diagonal(dim1=1, dim2=2).clamp_min(0) + prior)
        best = gain.masked_fill(ranked, -1).argmax(1)
        gains[each, best] = gain[each, best]
        ranked[each, best] = True
        column = P[each, :, best]
        pivot = column[each, best][:, None] + prior
        u = u - column * (u[each, best][:, None] / pivot)
        P = P.sub_(column[:, :, None] * (column / pivot)[:, None, :])
    rest = u.square() / (P.diagonal(dim1=1, dim2=2).clamp_min(0) + prior)
    return torch.where(ranked, gains, rest)


def _direct_shares(model: TCCMModel, z: Tensor) -> Tensor:
    squares = model._residuals(z).square()
    shares = (squares / squares.sum(-1, keepdim=True).clamp_min(1e-30)).mean(0)
    k = model._neighbors
    if not k:
        return shares
    weight = model.config.residual_weight
    distances, places = nearest(z, model.references, k + 1)
    # As in `without_self`: the nearest does not count where it is the row itself, the last not elsewhere.
    places = torch.where(is_self(distances, z), places[:, 1:], places[:, :-1])
    near = (z[:, None] - model.references[places]).square().sum(1)
    total = near.sum(1, keepdim=True)
    near = torch.where(total > 0, near / total.clamp_min(1e-30), shares)
    return (1 - weight) * near + weight * shares


@torch.no_grad()
def lipschitz_bounds(model: TCCMModel) -> tuple[float, Tensor]:
    """Bounds on how fast the two parts of the score change with z: of the distance, and of each member's residual.

    The distance changes at most as fast as z does. For a residual r = (f + z) / s the product of the spectral norms bounds
    f, of the first matrix only the rows that read z, since t is fixed: L <= ||W1|| ||W2|| ||W3 / s|| + max(1 / s).
    In `mode="paper"` s is 1 and this is the paper's 1 + ||W1|| ||W2|| ||W3||: |S(z) - S(z')| <= L ||z - z'||.

    Returns:
        `tuple[float, Tensor]`: 1.0 (0.0 without references), and `(m,)`.
    """
    first, second, third = model.net.weights
    inverse = 1 / model.residual_scale
    norms = [
        torch.linalg.matrix_norm(W.double(), ord=2)
        for W in (first[:, : model.config.feature_size], second, third * inverse)
    ]
    members = norms[0] * norms[1] * norms[2] + inverse.double().amax((1, 2))
    return float(model._neighbors > 0), members


@torch.no_grad()
def certify(model: TCCMModel, features: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Bounds on the score of everything within some distance of each row.

    Args:
        model (`TCCMModel`): A fitted model.
        features (`Tensor`): `(n, d)`.
        radius (`float`): In standard deviations: all rows z' with ||z' - z|| <= radius are covered. For a change in the
            table's own units, divide its largest size by the smallest entry of `model.scale`.

    Returns:
        `tuple[Tensor, Tensor]`: `(n,)` each, lower and upper bound.

    Raises:
        ConfigError: a negative radius. DataError: as `TCCMModel.score`.
    """
    if not radius >= 0:
        raise ConfigError(f"radius={radius!r} must be at least 0.")
    z = model.standardize(features)
    bounds = [_certify(model, chunk, radius) for chunk in z.split(CHUNK_ROWS)] or [(z.new_zeros(0), z.new_zeros(0))]
    lower, upper = (torch.cat(side) for side in zip(*bounds))
    return lower, upper


def _certify(model: TCCMModel, z: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    _, constants = lipschitz_bounds(model)
    norms = model._residuals(z).norm(dim=-1).double()
    move = constants[:, None] * radius
    residuals = [(norms + sign * move).clamp_min(1e-15).log().mean(0).exp().float() for sign in (-1, 1)]
    k = model._neighbors
    if not k:
        constant = torch.ones_like(residuals[0])
        return model._combine(constant, residuals[0]), model._combine(constant, residuals[1])
    squares = nearest(z, model.references, k + 1)[0]
    # A row next to a reference has it as a neighbour, the row that equals it has not: the lower bound counts it.
    low = (squares[:, :k].mean(1).sqrt() - radius).clamp_min(0)
    # A move onto a reference takes it out of the neighbours: where one is in reach, the next takes its place.
    in_reach = squares[:, :1].sqrt() <= radius + 2e-6 * (1 + z.norm(dim=1, keepdim=True))
    high = torch.where(in_reach, squares[:, 1:], squares[:, :-1]).mean(1).sqrt() + radius
    return model._combine(low, residuals[0]), model._combine(high, residuals[1])


def plot_explanation(
    attributions: Tensor | Any, names: list[str], threshold: float | None = None, top: int = 10, ax: Axes | None = None
) -> Axes:
    """Bars of the features that contribute most to one row's score.

    Args:
        attributions (`Tensor`): `(d,)`, a row of `explain`.
        names (`list[str]`): d names.
        threshold (`float`, *optional*): Drawn into the title beside the score.
        top (`int`, defaults to 10): Features shown; the others are one bar.
        ax (`Axes`, *optional*): Where to draw; a new figure if omitted.

    Raises:
        DataError: not one name per attribution. MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError('pictures need matplotlib: pip install "hf-ext[plots]".') from None
    values = torch.as_tensor(attributions).detach().cpu().double()
    if values.shape != (len(names),):
        raise DataError(f"attributions has shape {tuple(values.shape)}; expected ({len(names)},), one per name.")
    order = values.argsort(descending=True)
    shown = [(names[place], float(values[place])) for place in order[:top].tolist()]
    if len(names) > top:
        shown.append((f"{len(names) - top} others", float(values[order[top:]].sum())))
    if ax is None:
        ax = Figure(figsize=(6, 0.32 * len(shown) + 1), layout="constrained").subplots()
    labels, lengths = zip(*reversed(shown))
    ax.barh(labels, lengths, color="#4269d0")
    ax.set_xlabel("part of the score")
    limit = "" if threshold is None else f", threshold {threshold:.3g}"
    ax.set_title(f"score {float(values.sum()):.3g}{limit}", loc="left", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    return ax
