"""Pipeline `"ood-classification"`: label, score and out-of-distribution score of texts, images, sounds or feature vectors.

Plugs in: after `hf_ext.register()`, `pipeline("ood-classification", model="my-detector")` runs an `OODModel`. The model is that
of https://huggingface.co/papers/2510.06505.

Differs from the paper: none; it has no inference code.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Pipeline
from transformers.pipelines.audio_classification import AudioClassificationPipeline
from transformers.pipelines.image_classification import ImageClassificationPipeline
from transformers.pipelines.text_classification import TextClassificationPipeline

from hf_ext.errors import ConfigError, DataError, UnsupportedModelError
from hf_ext.pipelines.ood_features import LABEL_COLUMNS, OOD_COLUMN
from hf_ext.pipelines.ood_model import OODModel


TASK = "ood-classification"

# Main input of a model -> attribute of the pipeline that prepares it, and the pipeline of transformers that knows how.
_PREPARERS: dict[str, tuple[str, Any]] = {
    "input_ids": ("tokenizer", TextClassificationPipeline),
    "pixel_values": ("image_processor", ImageClassificationPipeline),
    "input_values": ("feature_extractor", AudioClassificationPipeline),
    "input_features": ("feature_extractor", AudioClassificationPipeline),
}


class _AsItIs:
    """Stands for a feature extractor where rows come prepared: transformers batches nothing without one."""

    def __init__(self, padding_value: float) -> None:
        self.padding_value, self.padding_side = padding_value, "right"


class OODPipeline(Pipeline):
    """Classifies rows with an `OODModel` and scores how far each is from the in-distribution rows.

    An input is what the classifier's own pipeline takes (a text, an image, a sound), a feature vector, or a row that is
    prepared already: a dict of tensors without a batch axis, as a data set gives it; labels in it are not read.

    Returns one dict an input: `label` and `score` of the likeliest class, `ood_score` between 0 and 1, and `is_ood` where
    the model's config has `ood_threshold`, or the call `threshold=`.

    Raises:
        ConfigError: no tokenizer, image processor or feature extractor for inputs that need one, or a `threshold` out of 0 to 1.
        DataError: an input the model cannot read. UnsupportedModelError: not an `OODModel`.

    Example:
        ```python
        hf_ext.register()
        pipe = pipeline("ood-classification", model="my-detector")
        pipe("Transfer 20 to savings")  # {"label": "transfer", "score": 0.98, "ood_score": 0.02, "is_ood": False}
        ```
    """

    # Loaded where the folder has them.
    _load_tokenizer = None
    _load_image_processor = None
    _load_feature_extractor = None
    _load_processor = False  # type: ignore[assignment]
    _load_video_processor = False  # type: ignore[assignment]

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(model, OODModel):
            raise UnsupportedModelError(
                f"{TASK} needs an OODModel and got {type(model).__name__}; make one with OODModel.from_classifier(model) and "
                "train its head with OODTrainer."
            )
        super().__init__(model, *args, **kwargs)
        self.model.eval()
        if self.tokenizer is None and self.feature_extractor is None and self.image_processor is None:
            pad = self.model.config.get_text_config()
            value = getattr(pad, "pad_token_id", None) if self.model.main_input_name == "input_ids" else 0
            self.feature_extractor = _AsItIs(value or 0)  # type: ignore[assignment]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save the model and what prepares its inputs."""
        standing, own = self.feature_extractor, isinstance(self.feature_extractor, _AsItIs)
        self.feature_extractor = None if own else standing
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.feature_extractor = standing

    def _sanitize_parameters(self, threshold: float | None = None, **kwargs: Any) -> tuple[dict, dict, dict]:
        if threshold is not None and not 0 <= threshold <= 1:
            raise ConfigError(f"threshold={threshold!r} must be between 0 and 1, as ood_score is.")
        if kwargs and self.model.main_input_name != "input_ids":
            raise ConfigError(
                f"{TASK} has no setting {', '.join(map(repr, kwargs))} for a model that reads "
                f"{self.model.main_input_name!r}; it has threshold."
            )
        return kwargs, {}, {} if threshold is None else {"threshold": threshold}

    def preprocess(self, inputs: Any, **settings: Any) -> dict[str, Any]:  # type: ignore[override]
        """One input as tensors with a batch axis of one."""
        name = self.model.main_input_name
        if isinstance(inputs, Mapping) and inputs.keys() & {name, "inputs_embeds"}:
            unread = (*LABEL_COLUMNS, OOD_COLUMN)
            # A mask or the like that is not numbers is the classifier's to refuse.
            return {key: _tensor(value, key)[None] for key, value in inputs.items() if key not in unread}
        if name == "features":
            return {name: self._vector(inputs)[None]}
        if name not in _PREPARERS:
            raise DataError(
                f"inputs of this model come prepared, as a dict with {name!r}; got {type(inputs).__name__}."
            )
        attribute, pipeline = _PREPARERS[name]
        if getattr(self, attribute) is None or isinstance(getattr(self, attribute), _AsItIs):
            raise ConfigError(
                f"a {type(inputs).__name__} needs {attribute}= to become {name!r}; pass one to pipeline(), or save it beside the "
                "model."
            )
        if name == "input_ids":
            settings = {"truncation": True, **settings}
        # These read nothing of their pipelines but the attribute above and the type of the weights.
        return dict(pipeline.preprocess(self, inputs, **settings))

    def _vector(self, inputs: Any) -> Tensor:
        width = self.model.config.feature_size
        row = _tensor(inputs, "features")
        if row.shape != (width,):
            hints = {
                0: " A list of numbers is a list of inputs: pass [[...]] for one row.",
                2: " An array of rows is one input: pass list(array).",
            }
            hint = hints.get(row.ndim, "")
            raise DataError(f"an input has shape {tuple(row.shape)}; expected ({width},), a feature vector.{hint}")
        return row

    def _forward(self, model_inputs: dict[str, Tensor]) -> Any:  # type: ignore[override]
        output = self.model(**model_inputs)
        # Rows only: a scalar such as the loss cannot be taken apart again.
        return {"logits": output.logits, "ood_logit": output.ood_logit}

    def postprocess(  # type: ignore[override]
        self, model_outputs: dict[str, Tensor], threshold: float | None = None
    ) -> dict[str, Any]:
        """Numbers of one input."""
        config: Any = self.model.config
        chances = model_outputs["logits"][0].double().softmax(-1)
        best = int(chances.argmax())
        ood_score = float(model_outputs["ood_logit"][0].double().sigmoid())
        found = {"label": config.id2label[best], "score": float(chances[best]), "ood_score": ood_score}
        threshold = config.ood_threshold if threshold is None else threshold
        return found if threshold is None else {**found, "is_ood": ood_score > threshold}


def _tensor(value: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{name} is a {type(value).__name__} that is no tensor of numbers ({error}).") from None
