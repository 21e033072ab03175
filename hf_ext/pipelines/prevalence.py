"""How many rows of a wild set are out-of-distribution (OOD), from scores alone, without an oracle.

Below a cut of the scores lies a share `F_wild` of the wild rows and `F_in` of the in-distribution rows. Where no OOD row
lies below it, `F_wild / F_in` is the in-distribution share of the wild set, and elsewhere it is more:

    prevalence >= 1 - F_wild(c) / F_in(c)    for every cut c

with equality for the best cut of scores that leave a part of the in-distribution rows pure. The smallest ratio would be
one of few rows and all noise, so the cut is the one with the smallest upper bound: `F_wild` plus the half-widths of the
two uniform confidence bands (Dvoretzky, Kiefer, Wolfowitz), over `F_in` (best bin, arXiv 2111.00980).

What it needs: in-distribution rows that the scores have not been fitted to, and that are drawn as those of the wild set
are. Where OOD rows lie among the in-distribution rows in every part of the scores, it is a lower bound.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_ext.errors import DataError


CONFIDENCE = 0.1


def estimate_prevalence(in_scores, wild_scores, confidence: float = CONFIDENCE) -> float:
    """Share of the wild rows that in-distribution rows do not account for.

    Args:
        in_scores (`Tensor`): `(n,)` of in-distribution rows the scores were not fitted to; higher means more likely OOD.
        wild_scores (`Tensor`): `(m,)` of the wild rows, likewise not fitted to.
        confidence (`float`, defaults to 0.1):
            Chance that the bands are wrong. Smaller asks for cuts with more rows below.

    Returns:
        `float`: between 0 and 1. Its error is about `sqrt(pi (1 - pi) / m)` where scores separate, and on average it is
        too high by about as much, being the best of many cuts.

    Raises:
        DataError: no scores on one side, NaN or infinite ones, or a confidence outside `(0, 1)`.
    """
    low, high = _scores(in_scores, "in_scores"), _scores(wild_scores, "wild_scores")
    if not 0 < confidence < 1:
        raise DataError(f"confidence={confidence} must be between 0 and 1.")
    cuts = torch.unique(low)
    share_in = torch.searchsorted(low, cuts, right=True).double() / len(low)
    share_wild = torch.searchsorted(high, cuts, right=True).double() / len(high)
    slack = sum(math.sqrt(math.log(4 / confidence) / (2 * n)) for n in (len(low), len(high)))
    best = ((share_wild + slack) / share_in).argmin()
    return float((1 - share_wild[best] / share_in[best]).clamp(0, 1))


def _scores(values, name: str) -> Tensor:
    scores = torch.as_tensor(values).detach().double().flatten().cpu()
    if len(scores) == 0 or not torch.isfinite(scores).all():
        raise DataError(f"{name} holds {len(scores)} scores; expected at least 1, all finite.")
    return scores.sort().values
