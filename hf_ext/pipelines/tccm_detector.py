"""`TCCMDetector`: TCCM with scikit-learn's contract for novelty detectors, for pipelines, searches and `clone`.

The signs are scikit-learn's: `score_samples` and `decision_function` are higher for normal rows, `predict` says 1 for those
and -1 for anomalies. `TCCMModel.score` has the other sign.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hf_ext.errors import MissingPackageError
from hf_ext.pipelines.tccm import TCCMConfig, TCCMModel
from hf_ext.pipelines.tccm_explain import Method, explain


try:
    from sklearn.base import BaseEstimator, OutlierMixin
    from sklearn.utils.validation import check_is_fitted, check_random_state, validate_data
except ImportError:
    raise MissingPackageError('TCCMDetector is a scikit-learn estimator: pip install "hf-ext[detect]".') from None


class TCCMDetector(OutlierMixin, BaseEstimator):
    """Anomaly detector for matrices of numbers.

    Args:
        mode, members, hidden_size, steps, epochs, learning_rate, batch_size, neighbors, max_references, residual_weight, trim:
            As in `TCCMConfig`, which checks them when `fit` is called.
        contamination (`float`, defaults to 0.1): Share of the training rows that `predict` calls anomalies.
        random_state (`int`, `RandomState` or `None`, defaults to 0): Seed of starts, batches and references.
        device (`str`, *optional*): Where to compute; the processor if omitted.

    Attributes:
        model_ (`TCCMModel`): The fitted model, to save or to push.
        offset_ (`float`): `decision_function = score_samples - offset_`.
        n_features_in_ (`int`), feature_names_in_ (`ndarray`): As everywhere in scikit-learn.

    Example:
        ```python
        detector = make_pipeline(OneHotEncoder(), TCCMDetector()).fit(normal_rows)
        detector.predict(new_rows)          # 1 or -1
        ```
    """

    def __init__(
        self,
        mode: str = "default",
        *,
        contamination: float = 0.1,
        members: int | None = None,
        hidden_size: int | None = None,
        steps: int | None = None,
        epochs: int | None = None,
        learning_rate: float = 5e-3,
        batch_size: int = 512,
        neighbors: int | None = None,
        max_references: int = 4096,
        residual_weight: float | None = None,
        trim: float = 0.0,
        random_state: Any = 0,
        device: str | None = None,
    ) -> None:
        self.mode = mode
        self.contamination = contamination
        self.members = members
        self.hidden_size = hidden_size
        self.steps = steps
        self.epochs = epochs
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.neighbors = neighbors
        self.max_references = max_references
        self.residual_weight = residual_weight
        self.trim = trim
        self.random_state = random_state
        self.device = device

    def fit(self, X: Any, y: Any = None) -> TCCMDetector:
        """Learn from rows believed normal.

        Args:
            X: `(n, d)`, n >= 2, finite numbers. y: Ignored.

        Raises:
            ConfigError: a setting that cannot work. ValueError: rows that cannot be used.
        """
        X = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        return self._fitted(self._new_model(X.shape[1]).fit(_tensor(X)))

    def partial_fit(self, X: Any, y: Any = None) -> TCCMDetector:
        """Learn from more rows; the first call is a `fit`. See `TCCMModel.partial_fit`."""
        first = not hasattr(self, "model_")
        X = validate_data(self, X, dtype=np.float64, ensure_min_samples=2 if first else 1, reset=first)
        model = self._new_model(X.shape[1]) if first else self.model_
        return self._fitted(model.partial_fit(_tensor(X)))

    def score_samples(self, X: Any) -> np.ndarray:
        """Scores `(n,)`, higher is more normal: minus those of `TCCMModel.score`."""
        rows = self._rows(X)
        return -self.model_.score(rows).cpu().numpy().astype(np.float64)

    def decision_function(self, X: Any) -> np.ndarray:
        """`score_samples` less `offset_`: negative for anomalies."""
        check_is_fitted(self)
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> np.ndarray:
        """1 for normal rows, -1 for anomalies, `(n,)`."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def explain(self, X: Any, method: Method = "conditional") -> np.ndarray:
        """What each feature adds to each row's anomaly score, `(n, d)`: rows sum to `-score_samples(X)`.

        Args:
            X: `(n, d)`. method (`str`): See `hf_ext.pipelines.tccm_explain`.
        """
        rows = self._rows(X)
        return explain(self.model_, rows, method).cpu().numpy().astype(np.float64)

    def _rows(self, X: Any) -> torch.Tensor:
        check_is_fitted(self)
        return _tensor(validate_data(self, X, dtype=np.float64, reset=False))

    def _new_model(self, width: int) -> TCCMModel:
        settings = self.get_params()
        random_state, device = settings.pop("random_state"), settings.pop("device")
        seed = check_random_state(random_state).randint(2**31) if not isinstance(random_state, int) else random_state
        model = TCCMModel(TCCMConfig(feature_size=width, seed=int(seed), **settings)).eval()
        return model.to(device) if device else model

    def _fitted(self, model: TCCMModel) -> TCCMDetector:
        self.model_ = model
        self.offset_ = -float(model.threshold)
        return self


def _tensor(X: np.ndarray) -> torch.Tensor:
    """Torch warns of arrays that it may not write to, such as the maps of joblib; those are copied."""
    return torch.from_numpy(np.require(X, requirements="W"))
