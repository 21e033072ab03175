"""`TCCMPyOD`: TCCM as a detector of PyOD, for programs that are written for its interface. PyOD is not a dependency.

The signs are PyOD's: `decision_function` is higher for anomalies, `predict` says 1 for them and 0 for normal rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_ext.errors import MissingPackageError
from hf_ext.pipelines.tccm_detector import TCCMDetector


try:
    from pyod.models.base import BaseDetector
    from sklearn.utils.validation import check_is_fitted
except ImportError:
    raise MissingPackageError("TCCMPyOD is a detector of PyOD: pip install pyod.") from None


class TCCMPyOD(BaseDetector):
    """A `TCCMDetector` behind PyOD's interface.

    Args:
        contamination (`float`, defaults to 0.1): Share of the training rows labelled as outliers.
        settings: Of `TCCMDetector`.
    """

    def __init__(self, contamination: float = 0.1, **settings: Any) -> None:
        super().__init__(contamination=contamination)
        self.contamination = contamination
        self.settings = settings

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The contamination and the settings by their own names, as `clone` needs them."""
        return {"contamination": self.contamination, **self.settings}

    def set_params(self, **params: Any) -> TCCMPyOD:
        """Change the contamination or settings."""
        self.contamination = params.pop("contamination", self.contamination)
        self.settings.update(params)
        return self

    def fit(self, X: Any, y: Any = None) -> TCCMPyOD:
        """Learn from rows, and score them: `decision_scores_`, `threshold_` and `labels_` are of these."""
        self._set_n_classes(y)
        self.detector_ = TCCMDetector(contamination=self.contamination, **self.settings).fit(X)
        self.decision_scores_ = self.decision_function(X)
        self._process_decision_scores()
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Scores `(n,)`, higher is more abnormal."""
        check_is_fitted(self, "detector_")
        return -self.detector_.score_samples(X)
