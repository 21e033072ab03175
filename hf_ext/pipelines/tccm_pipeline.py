"""`TCCMPipeline`: TCCM over tables of `datasets`, pandas or Arrow; and the task `"tabular-anomaly-detection"` of transformers.

A pipeline is a `TCCMModel` and the `TableFeatureExtractor` that reads rows for it, in one folder or repository. Fitting
reads the rows once: means, scales and categories are those of all of them, networks and references learn from a uniform
sample of at most `max_fit_rows`, so that a stream of any length fits in memory. Scoring is `map`, batch by batch, and streams
where the data set does.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from transformers import Pipeline

from hf_ext.errors import ConfigError, DataError
from hf_ext.pipelines.tables import BATCH_ROWS, TableFeatureExtractor, read_batches
from hf_ext.pipelines.tccm import TCCMConfig, TCCMModel
from hf_ext.pipelines.tccm_explain import Method, explain


if TYPE_CHECKING:
    import pyarrow

TASK = "tabular-anomaly-detection"
_HUB_SETTINGS = ("push_to_hub", "repo_id", "token", "private")
SCORE, FLAG, P_VALUE, PART = "anomaly_score", "is_anomaly", "anomaly_p_value", "anomaly_part_"


class TCCMPipeline:
    """Fits on normal rows of a table, scores others.

    Args:
        config (`TCCMConfig`, *optional*): Settings of the score; its `feature_size` is set by `fit`.
        columns (`Sequence[str]`, *optional*): Columns to use; all of them if omitted.
        categories (`Sequence[str]`): Columns of numbers that are categories. Text, truth values and `ClassLabel` always are.
        missing (`str`, defaults to `"error"`): `"impute"`: see `TableFeatureExtractor`.
        max_fit_rows (`int`, defaults to 65,536): Rows that networks and references learn from.
        calibration_fraction (`float`, defaults to 0.0): Share of those kept out of the fit, for threshold and p-values.
        device (`str`, *optional*): Where to compute; Accelerate's device if omitted.

    Raises:
        ConfigError: a setting that cannot work.

    Example:
        ```python
        pipeline = TCCMPipeline().fit(train)                  # a datasets.Dataset of normal rows
        scored = pipeline.transform(test)                     # adds anomaly_score and is_anomaly
        pipeline.save_pretrained("detector")
        ```
    """

    def __init__(
        self,
        config: TCCMConfig | None = None,
        *,
        columns: Sequence[str] | None = None,
        categories: Sequence[str] = (),
        missing: str = "error",
        max_fit_rows: int = 65_536,
        calibration_fraction: float = 0.0,
        device: str | torch.device | None = None,
    ) -> None:
        if max_fit_rows < 2:
            raise ConfigError(f"max_fit_rows={max_fit_rows} must be at least 2.")
        if not 0 <= calibration_fraction < 1:
            raise ConfigError(f"calibration_fraction={calibration_fraction} must be at least 0 and below 1.")
        self.config = config if config is not None else TCCMConfig()
        self.columns = list(columns) if columns is not None else None
        self.categories = list(categories)
        self.extractor = TableFeatureExtractor(missing=missing)
        self.max_fit_rows, self.calibration_fraction = max_fit_rows, calibration_fraction
        self.device = torch.device(device) if device is not None else PartialState().device
        self.model: TCCMModel | None = None

    def fit(self, data: Any, progress: bool = True) -> TCCMPipeline:
        """Learn columns, scales and the score from rows believed normal.

        Args:
            data: Anything `read_batches` takes; a `Dataset` or `IterableDataset` is read in batches, twice.
            progress (`bool`, defaults to `True`): Whether to show a bar while the networks train.

        Raises:
            DataError: rows or columns that cannot be used; the message names them.
            ConfigError: `mode="paper"` without `epochs` or `steps`.
        """
        before = self.extractor.columns
        try:
            self.model = self._fit(data, progress)
        except BaseException:
            # What was fitted before still fits its columns.
            self.extractor.columns = before
            raise
        return self

    def _fit(self, data: Any, progress: bool) -> TCCMModel:
        self.extractor.fit(read_batches(data), self.columns, [*self.categories, *_class_labels(data, self.columns)])
        rows, count, mean, deviation = self._sample(data)
        config = TCCMConfig.from_dict({**self.config.to_dict(), "feature_size": rows.shape[1]})
        model = TCCMModel(config).to(self.device).eval()  # type: ignore[arg-type]
        held = int(self.calibration_fraction * len(rows))
        floors = torch.tensor(self.extractor.scale_floors, dtype=torch.float64)
        if held:
            # Rows to calibrate on may not move the scales either: those that weigh in would look less odd than new ones.
            model.fit(rows[held:], scale_floors=floors, progress=progress).calibrate(rows[:held])
        else:
            model.fit(rows, scale_floors=floors, moments=(mean, deviation), progress=progress)
            model.rows_seen.fill_(count)
        return model

    def partial_fit(self, data: Any) -> TCCMPipeline:
        """Learn from more rows, in one go; the first call fits. Columns and categories stay those of the first call.

        Raises:
            DataError: as `fit`.
        """
        if self.model is None:
            return self.fit(data, progress=False)
        floors = torch.tensor(self.extractor.scale_floors, dtype=torch.float64)
        self.model.partial_fit(torch.from_numpy(self._matrix(data)), scale_floors=floors)
        return self

    def calibrate(self, data: Any) -> TCCMPipeline:
        """Take threshold and p-values from normal rows that were not fitted on.

        Raises:
            DataError: as `fit`.
        """
        model = self._fitted()
        model.calibrate(torch.from_numpy(self._matrix(data)))
        return self

    def score(self, data: Any) -> np.ndarray:
        """Scores `(n,)` of all rows, higher is more abnormal.

        Raises:
            DataError: not fitted, or rows or columns that cannot be used.
        """
        model = self._fitted()
        scores = [model.score(self._features(table)).cpu().numpy() for table in self._batches(data)]
        return np.concatenate(scores) if scores else np.zeros(0, dtype=np.float32)

    def predict(self, data: Any) -> np.ndarray:
        """Which rows lie beyond the threshold, `(n,)` of bool."""
        return self.score(data) > float(self._fitted().threshold)

    def transform(
        self,
        data: Any,
        explain: bool = False,
        method: Method = "conditional",
        batch_size: int = BATCH_ROWS,
        num_proc: int | None = None,
    ) -> Any:
        """The rows with `anomaly_score` and `is_anomaly` beside their own columns.

        A calibrated pipeline (`calibrate`, `calibration_fraction`) also adds `anomaly_p_value`.

        Args:
            data: A `Dataset`, an `IterableDataset` (the result streams), or anything else `read_batches` takes (the result is a
                `Dataset`).
            explain (`bool`, defaults to `False`): Whether to add `anomaly_part_<column>` for every column: its part of the
                score.
            method (`str`, defaults to `"conditional"`): Of the parts, see `hf_ext.pipelines.tccm_explain`.
            batch_size (`int`): Rows at a time.
            num_proc (`int`, *optional*): Processes of `Dataset.map`.

        Raises:
            DataError: not fitted, rows or columns that cannot be used, or columns of these names are there already.
        """
        from datasets import Dataset, IterableDataset

        self._fitted()
        if not isinstance(data, Dataset | IterableDataset):
            data = Dataset(_concatenated(list(self._batches(data))))
        _refuse_taken(data.column_names or ())
        settings = {"explained": explain, "method": method}
        arrow = data.with_format("arrow")
        if isinstance(data, IterableDataset):
            features = None if data.features is None else self._result_features(data.features, explain)
            scored = arrow.map(
                self.add_scores, batched=True, batch_size=batch_size, fn_kwargs=settings, features=features
            )
            return scored.with_format(data._formatting.format_type if data._formatting else None)
        scored = arrow.map(
            self.add_scores,
            batched=True,
            batch_size=batch_size,
            fn_kwargs=settings,
            num_proc=num_proc,
            features=self._result_features(data.features, explain),
            desc="scoring",
        )
        before, added = data.format, [name for name in scored.column_names if name not in data.column_names]
        columns = [*before["columns"], *added]
        return scored.with_format(
            **{**before, "columns": None if len(columns) == len(scored.column_names) else columns}
        )

    def add_scores(
        self, table: pyarrow.Table, explained: bool = False, method: Method = "conditional"
    ) -> pyarrow.Table:
        """One batch of `transform`, for a `map` of your own over rows in the format `"arrow"`."""
        import pyarrow as pa

        model = self._fitted()
        _refuse_taken(table.column_names)
        rows = self._features(table)
        scores = model.score(rows)
        table = table.append_column(SCORE, pa.array(scores.cpu().numpy()))
        table = table.append_column(FLAG, pa.array((scores > model.threshold).cpu().numpy()))
        if model.config.held_out:
            table = table.append_column(P_VALUE, pa.array(model.p_values(scores).cpu().numpy()))
        if explained:
            for name, part in self._by_column(explain(model, rows, method)).items():
                table = table.append_column(f"{PART}{name}", pa.array(part))
        return table

    def explain(self, data: Any, method: Method = "conditional") -> dict[str, np.ndarray]:
        """What each column of the table adds to each row's score: a mapping of columns to `(n,)`.

        Parts of one category's levels are summed. The parts of a row sum to its score, but for `method="paper"`.

        Raises:
            DataError: not fitted, or rows or columns that cannot be used.
        """
        model = self._fitted()
        parts = [explain(model, self._features(table), method) for table in self._batches(data)]
        return self._by_column(torch.cat(parts) if parts else torch.zeros(0, model.config.feature_size))

    def discoveries(self, data: Any, false_discovery_rate: float = 0.1) -> np.ndarray:
        """Which rows are anomalies when at most this share of those named may be normal ones, `(n,)` of bool.

        Benjamini and Hochberg's procedure on conformal p-values, which are positively dependent, so that the rate holds
        for rows exchangeable with the calibration rows.

        Raises:
            ConfigError: a rate out of (0, 1). DataError: not fitted or not calibrated on rows kept out of the fit.
        """
        from scipy.stats import false_discovery_control

        if not 0 < false_discovery_rate < 1:
            raise ConfigError(f"false_discovery_rate={false_discovery_rate} must be between 0 and 1.")
        p_values = self._fitted().p_values(torch.from_numpy(self.score(data))).cpu().double().numpy()
        return false_discovery_control(p_values) <= false_discovery_rate if len(p_values) else np.zeros(0, dtype=bool)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write model and feature extractor into a folder; `push_to_hub=True` also pushes it, as with any model.

        Raises:
            DataError: not fitted.
        """
        model = self._fitted()
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        # Each pushes the files it writes.
        self.extractor.save_pretrained(
            str(save_directory), **{name: kwargs[name] for name in _HUB_SETTINGS if name in kwargs}
        )
        model.save_pretrained(save_directory, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Push model and feature extractor to a repository of the Hub.

        Raises:
            DataError: not fitted.
        """
        model = self._fitted()
        self.extractor.push_to_hub(repo_id, **kwargs)
        return model.push_to_hub(repo_id, **kwargs)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike, device: str | torch.device | None = None, **kwargs: Any
    ) -> TCCMPipeline:
        """Open what `save_pretrained` or `push_to_hub` wrote. A later `fit` takes the same columns.

        Args:
            name_or_path: A folder, or a repository of the Hub. kwargs: Of `from_pretrained`, for example `revision`.
        """
        extractor = TableFeatureExtractor.from_pretrained(name_or_path, **kwargs)
        model = TCCMModel.from_pretrained(name_or_path, **kwargs)
        columns = extractor.columns or []
        pipeline = cls(
            model.config,
            columns=[column["name"] for column in columns],
            categories=[column["name"] for column in columns if column["kind"] == "category"],
            missing=extractor.missing,
            device=device,
        )
        pipeline.extractor, pipeline.model = extractor, model.to(pipeline.device).eval()  # type: ignore[arg-type]
        return pipeline

    def _sample(self, data: Any) -> tuple[Tensor, int, Tensor, Tensor]:
        """A uniform sample of the rows in random order, and count, mean and deviation of all of them, in one pass."""
        generator = np.random.default_rng(self.config.seed)
        kept: np.ndarray | None = None
        keys = np.zeros(0)
        count, mean, square = 0, np.zeros(0), np.zeros(0)
        for table in self._batches(data):
            rows = self.extractor.encode(table)
            # Chan's update: sums of squares around a moving mean do not cancel.
            n, batch_mean = len(rows), rows.mean(0)
            if kept is None:
                kept, mean, square = rows[:0], np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
            shift = batch_mean - mean
            square = square + ((rows - batch_mean) ** 2).sum(0) + shift**2 * (count * n / (count + n))
            mean, count = mean + shift * (n / (count + n)), count + n
            # The rows with the smallest of random keys are a uniform sample, whatever the batches were.
            drawn = generator.random(n)
            if len(keys) == self.max_fit_rows:
                rows, drawn = rows[drawn < keys[-1]], drawn[drawn < keys[-1]]
            keys = np.concatenate([keys, drawn])
            order = np.argsort(keys)[: self.max_fit_rows]
            keys, kept = keys[order], np.concatenate([kept, rows])[order]
        if kept is None or count < 2:
            raise DataError(f"the table has {count} row{'s' * (count != 1)}; fitting needs at least 2.")
        return torch.from_numpy(kept), count, torch.from_numpy(mean), torch.from_numpy(np.sqrt(square / count))

    def _matrix(self, data: Any) -> np.ndarray:
        parts = [self.extractor.encode(table) for table in self._batches(data)]
        return np.concatenate(parts) if parts else np.zeros((0, len(self.extractor.feature_names)))

    def _batches(self, data: Any) -> Any:
        return read_batches(data, names=[column["name"] for column in self.extractor.columns or ()] or None)

    def _features(self, table: pyarrow.Table) -> Tensor:
        return torch.from_numpy(self.extractor.encode(table)).to(self._fitted().device)

    def _by_column(self, parts: Tensor) -> dict[str, np.ndarray]:
        groups = torch.tensor(self.extractor.groups, device=parts.device)
        names = [column["name"] for column in self.extractor.columns or ()]
        sums = parts.new_zeros(len(parts), len(names)).index_add_(1, groups, parts).cpu().numpy()
        return {name: np.ascontiguousarray(sums[:, place]) for place, name in enumerate(names)}

    def _result_features(self, features: Any, explained: bool) -> Any:
        from datasets import Features, Value

        added = {SCORE: Value("float32"), FLAG: Value("bool")}
        if self._fitted().config.held_out:
            added[P_VALUE] = Value("float32")
        if explained:
            added |= {f"{PART}{column['name']}": Value("float32") for column in self.extractor.columns or ()}
        return Features({**features, **added})

    def _fitted(self) -> TCCMModel:
        if self.model is None:
            raise DataError("this pipeline is not fitted yet; call fit(rows) or from_pretrained(folder).")
        return self.model


class TabularAnomalyPipeline(Pipeline):
    """The task `"tabular-anomaly-detection"`: rows as mappings of columns, or as lists of numbers, in; score and flag out.

    `pipeline(TASK, model=folder)(rows)`: a list of rows is many inputs, so that one row as a bare list of numbers
    has to be put into a list. `explain=True` adds `parts`, a mapping of columns to their parts of the score.
    """

    _load_feature_extractor = True  # type: ignore[assignment]
    _load_tokenizer = False  # type: ignore[assignment]
    _load_image_processor = False  # type: ignore[assignment]
    _load_processor = False  # type: ignore[assignment]

    model: TCCMModel
    feature_extractor: TableFeatureExtractor  # type: ignore[assignment]

    def _sanitize_parameters(self, explain: bool | None = None, **kwargs: Any) -> tuple[dict, dict, dict]:
        if kwargs:
            raise ConfigError(f"{TASK} has no setting {', '.join(map(repr, kwargs))}; it has explain.")
        return {}, {}, {} if explain is None else {"explain": explain}

    def preprocess(self, inputs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        columns = [column["name"] for column in self.feature_extractor.columns or ()]
        if isinstance(inputs, int | float):
            raise DataError(
                f"a row is {len(columns)} values, this is one number; pass a list of rows, [[...], [...]]."
            )
        row = [dict(inputs) if isinstance(inputs, Mapping) else list(inputs)]
        return {"features": self.feature_extractor(row)["features"]}

    def _forward(self, model_inputs: dict[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        # Rows only: transformers takes batches apart by indexing every output.
        features = model_inputs["features"]
        return {"features": features, "score": self.model.score(features)}

    def postprocess(  # type: ignore[override]
        self, model_outputs: dict[str, Tensor], explain: bool = False
    ) -> dict[str, Any]:
        score = model_outputs["score"].reshape(-1)[:1]
        found: dict[str, Any] = {"score": float(score), "is_anomaly": bool(score > self.model.threshold.to(score))}
        if self.model.config.held_out:
            found["p_value"] = float(self.model.p_values(score))
        if explain:
            reader = TCCMPipeline(self.model.config, device=self.model.device)
            reader.model, reader.extractor = self.model, self.feature_extractor
            parts = _explained(self.model, model_outputs["features"])
            found["parts"] = {name: float(part[0]) for name, part in reader._by_column(parts).items()}
        return found


def _explained(model: TCCMModel, features: Tensor) -> Tensor:
    return explain(model, features.to(model.device), "conditional" if len(model.references) > 1 else "direct")


def _refuse_taken(names: Sequence[str]) -> None:
    taken = [name for name in names if name in (SCORE, FLAG, P_VALUE) or name.startswith(PART)]
    if taken:
        raise DataError(f"the table already has {', '.join(map(repr, taken))}; remove or rename, then transform.")


def _class_labels(data: Any, columns: Sequence[str] | None) -> list[str]:
    """Columns of a data set that hold numbers of classes."""
    features = getattr(data, "features", None)
    if not isinstance(features, Mapping):
        return []
    names = [name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    return [name for name in names if columns is None or name in columns]


def _concatenated(tables: list[pyarrow.Table]) -> pyarrow.Table:
    import pyarrow as pa

    return pa.concat_tables(tables) if tables else pa.table({})
