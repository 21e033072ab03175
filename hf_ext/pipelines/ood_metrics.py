"""How well scores tell out-of-distribution (OOD) from in-distribution rows: AUROC, AUPR and FPR95, in both conventions.

Publications disagree on which side is the positive one, and the same word then means another number. `fpr95_id_pos`, of
WOODS, SAL and Medix, is the share of OOD rows accepted where 95 % of the in-distribution rows are. `fpr95_ood_pos`, of
OpenOOD, is the share of in-distribution rows rejected where 95 % of the OOD rows are caught. Both take the first threshold
whose recall is at least .95; code derived from WOODS takes the recall closest to .95, which may be below it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_ext.errors import DataError, MissingPackageError
from hf_ext.pipelines.ood_head import as_numbers


RECALL = 0.95


def ood_metrics(scores, is_ood) -> dict[str, float]:
    """Metrics of scores that should be higher for OOD rows.

    Args:
        scores (`Tensor`): `(n,)`.
        is_ood (`Tensor`): `(n,)`, true or 1 for OOD rows; at least one of each kind.

    Returns:
        `dict[str, float]`: `auroc`; `aupr_in` and `aupr_out`, average precision with in-distribution and with OOD rows as
        positives; `fpr95_id_pos` and `fpr95_ood_pos`. Constant scores give an AUROC of .5 and FPR95 of 1.

    Raises:
        DataError: lengths differ, NaN or infinite scores, or rows of one kind only.
        MissingPackageError: scikit-learn is not installed.

    Example:
        ```python
        ood_metrics([0.1, 0.4, 0.9], [0, 0, 1])["auroc"]  # 1.0
        ```
    """
    try:
        from sklearn.metrics import average_precision_score, roc_auc_score
    except ImportError:
        raise MissingPackageError('ood_metrics needs scikit-learn: pip install "hf-ext[detect]".') from None
    values, kinds = as_numbers(scores, "scores").cpu().double(), as_numbers(is_ood, "is_ood").cpu()
    if values.ndim != 1 or kinds.shape != values.shape:
        raise DataError(
            f"scores have shape {tuple(values.shape)} and is_ood {tuple(kinds.shape)}; expected one number a row in both."
        )
    if not torch.isfinite(values).all():
        raise DataError(f"{int((~torch.isfinite(values)).sum())} of {len(values)} scores are NaN or infinite.")
    if not ((kinds == 0) | (kinds == 1)).all():
        raise DataError(f"is_ood holds {kinds[(kinds != 0) & (kinds != 1)][0].item()}; expected 0 or 1, or booleans.")
    kinds = kinds.bool()
    inside, outside = values[~kinds], values[kinds]
    if not len(inside) or not len(outside):
        raise DataError(f"is_ood marks {len(outside)} of {len(values)} rows; expected rows of both kinds.")
    return {
        "auroc": float(roc_auc_score(kinds, values)),
        "aupr_in": float(average_precision_score(~kinds, -values)),
        "aupr_out": float(average_precision_score(kinds, values)),
        "fpr95_id_pos": _false_positives(-inside, -outside),
        "fpr95_ood_pos": _false_positives(outside, inside),
    }


def _false_positives(positive: Tensor, negative: Tensor) -> float:
    """Share of negatives at or above the highest threshold that at least `RECALL` of the positives reach."""
    # An integer count: .95 * 20 is a little below 19 or above in binary.
    needed = -(-round(RECALL * 100) * len(positive) // 100)
    threshold = positive.sort(descending=True).values[needed - 1]
    return float((negative >= threshold).double().mean())
