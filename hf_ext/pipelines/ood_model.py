"""`OODModel`: a classifier of transformers with a second head of one unit that tells in- from out-of-distribution rows.

Paper: https://huggingface.co/papers/2510.06505, section 3.2, equation 5 (as in SAL, arXiv 2402.03502): with `h` the input
of the classifier's last linear layer, a linear `g(h)` is trained along with the classifier `f`,

    L = cross-entropy(f(x), y) over in-distribution rows + w binary-cross-entropy(g(h(x)), kind) over all rows.

The head is a submodule, so `save_pretrained`, `from_pretrained` and `push_to_hub` keep it, and the classifier's config
lies inside `OODConfig`. After `hf_ext.register()` `AutoModel` opens it as well.

Differs from the paper: `ood_logit` is high for out-of-distribution rows (the paper's g is its negative), and its head
starts at zero, so that an untrained one ranks nothing.

Shapes: n rows, d features, C classes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.models.auto import modeling_auto
from transformers.utils import ModelOutput

from hf_ext.errors import ConfigError, DataError, UnsupportedModelError
from hf_ext.pipelines.ood_features import captured, find_head, pooled_input


MODEL_TYPE = "hf_ext_ood"
IGNORED_LABEL = -100
_MAPPINGS = (
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING",
    "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING",
)


class OODConfig(PreTrainedConfig):
    """Config of an `OODModel`: of a classifier of transformers, or of one on feature vectors.

    Args:
        classifier (`PreTrainedConfig` or `dict`, *optional*): Config of the classifier.
        classifier_class (`str`, *optional*): Name of its class, for example `"BertForSequenceClassification"`.
        head_module (`str`, *optional*): Name of its last linear layer; found where it is the only one that fits.
        feature_size (`int`, *optional*): Numbers a row, for feature vectors in place of `classifier`.
        hidden_size (`int`, *optional*): Units between feature vectors and heads; both heads are linear when `None`.
        dropout (`float`, defaults to 0.0): Before the heads, on feature vectors.
        ood_weight (`float`, defaults to 10.0): The paper's w, in the loss of a row with `is_ood`.
        class_weights (`list[float]`, *optional*): Of the classes, in the cross-entropy.
        ood_threshold (`float`, *optional*): Rows whose OOD score (0 to 1) lies above are out-of-distribution.

    Raises:
        ConfigError: both or neither of `classifier` and `feature_size`, fewer than two classes, a setting that cannot work.
    """

    model_type = MODEL_TYPE
    sub_configs = {"classifier": AutoConfig}
    keys_to_ignore_at_inference = ["features"]

    classifier: PreTrainedConfig | dict | None = None
    classifier_class: str | None = None
    head_module: str | None = None
    feature_size: int | None = None
    hidden_size: int | None = None
    dropout: float | int = 0.0
    ood_weight: float | int = 10.0
    class_weights: list | tuple | None = None
    ood_threshold: float | int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.classifier, dict):
            settings = dict(self.classifier)
            model_type = settings.pop("model_type", None)
            if model_type is None:
                raise ConfigError("OODConfig.classifier has no model_type; expected the config of a classifier.")
            self.classifier = AutoConfig.for_model(model_type, **settings)
        inner: Any = self.classifier
        if inner is not None and self.id2label is None and kwargs.get("num_labels") is None:
            self.id2label, self.label2id = dict(inner.id2label), dict(inner.label2id)
        attention = kwargs.get("attn_implementation")
        # The parent would reset the attention a built classifier has already settled on, since they share the config.
        self.classifier = None
        super().__post_init__(**kwargs)
        self.classifier = inner
        if inner is not None and attention is not None:
            inner._attn_implementation = attention
        self._check()

    def _check(self) -> None:
        inner: Any = self.classifier
        if (inner is None) == (self.feature_size is None):
            given = "neither" if inner is None else f"feature_size={self.feature_size} and classifier"
            # transformers builds a config without arguments to learn its defaults.
            if inner is None and self.classifier_class is None:
                return
            raise ConfigError(
                f"OODConfig got {given}; expected one of them. OODModel.from_classifier(model) makes it from a model."
            )
        if (self.num_labels or 0) < 2:
            raise ConfigError(
                f"OODConfig.num_labels={self.num_labels} must be at least 2: the classifier tells classes of in-distribution "
                "rows apart."
            )
        if inner is not None and inner.num_labels != self.num_labels:
            raise ConfigError(
                f"OODConfig.num_labels={self.num_labels} differs from the {inner.num_labels} classes of its classifier."
            )
        for name, least in (("feature_size", 1), ("hidden_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"OODConfig.{name}={value} must be at least {least}.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"OODConfig.dropout={self.dropout} must be at least 0 and below 1.")
        if not 0 <= self.ood_weight < float("inf"):
            raise ConfigError(f"OODConfig.ood_weight={self.ood_weight} must be a number of at least 0.")
        weights = self.class_weights
        if weights is not None and (len(weights) != self.num_labels or min(weights) < 0):
            raise ConfigError(
                f"OODConfig.class_weights={list(weights)} must be {self.num_labels} numbers of at least 0, one a class."
            )
        if self.ood_threshold is not None and not 0 <= self.ood_threshold <= 1:
            raise ConfigError(f"OODConfig.ood_threshold={self.ood_threshold} must be between 0 and 1.")

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """That of the classifier, so that special tokens and vocabulary sizes are set where it reads them."""
        if isinstance(self.classifier, PreTrainedConfig):
            return self.classifier.get_text_config(decoder=decoder, encoder=encoder)
        return super().get_text_config(decoder=decoder, encoder=encoder)


@dataclass
class OODOutput(ModelOutput):
    """Output of an `OODModel`.

    Args:
        loss (`Tensor`, *optional*): Of a batch with `labels`.
        logits (`Tensor`): `(n, C)` of the classes.
        ood_logit (`Tensor`): `(n,)`, positive for out-of-distribution rows; the paper's g is its negative.
        features (`Tensor`, *optional*): `(n, d)`, with `output_features=True`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    ood_logit: Tensor | None = None
    features: Tensor | None = None


def ood_loss(
    logits: Tensor,
    ood_logit: Tensor,
    labels: Tensor,
    is_ood: Tensor | None = None,
    ood_weight: float = 10.0,
    class_weights: Any = None,
    label_smoothing: float = 0.0,
    in_rows: Any = None,
    all_rows: Any = None,
) -> Tensor:
    """Loss of the second stage (equation 5): cross-entropy of in-distribution rows plus w times that of both kinds.

    Args:
        logits (`Tensor`): `(n, C)`.
        ood_logit (`Tensor`): `(n,)`.
        labels (`Tensor`): `(n,)`; -100 is left out, and so is the label of a row with `is_ood`.
        is_ood (`Tensor`, *optional*): `(n,)`, 1 for out-of-distribution; without it the second term is left out.
        ood_weight (`float`, defaults to 10.0): w.
        class_weights (`Tensor` or `list[float]`, *optional*): `(C,)`, factors of the rows of each class.
        label_smoothing (`float`, defaults to 0.0): Of the cross-entropy.
        in_rows (`int`, *optional*): Divides the first term's sum; its rows here by default. Larger with accumulation.
        all_rows (`int`, *optional*): Divides the second term's sum.

    Returns:
        `Tensor`: scalar, float32.
    """
    labels = labels.view(-1).long()
    if is_ood is not None:
        labels = labels.masked_fill(is_ood.view(-1) > 0.5, IGNORED_LABEL)
    if class_weights is not None:
        class_weights = torch.as_tensor(class_weights, dtype=torch.float32, device=logits.device)
    loss = F.cross_entropy(
        logits.float(),
        labels,
        weight=class_weights,
        ignore_index=IGNORED_LABEL,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    in_rows = (labels != IGNORED_LABEL).sum().clamp(min=1) if in_rows is None else in_rows
    loss = loss / in_rows
    if is_ood is not None:
        target = is_ood.view(-1).float()
        second = F.binary_cross_entropy_with_logits(ood_logit.float(), target, reduction="sum")
        loss = loss + ood_weight * second / (len(target) if all_rows is None else all_rows)
    return loss


class FeatureClassifier(nn.Module):
    """Linear, or one hidden layer of rectified units, on `(n, feature_size)` features."""

    def __init__(self, config: OODConfig) -> None:
        super().__init__()
        size, classes = int(config.feature_size or 0), int(config.num_labels or 0)
        width = config.hidden_size or size
        self.hidden = nn.Linear(size, width) if config.hidden_size else nn.Identity()
        self.activation = nn.ReLU() if config.hidden_size else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(width, classes)

    def forward(self, features: Tensor) -> Tensor:
        """`(n, C)` logits."""
        return self.output(self.dropout(self.activation(self.hidden(features))))


class OODModel(PreTrainedModel):
    """Classifier with an out-of-distribution head on the input of its last linear layer.

    Args:
        config (`OODConfig`): With the config of a classifier, or `feature_size`.

    Raises:
        UnsupportedModelError: the class of the classifier is not known, or its last linear layer is not found.

    Example:
        ```python
        from transformers import AutoModelForSequenceClassification

        classifier = AutoModelForSequenceClassification.from_pretrained("my-classifier")
        model = OODModel.from_classifier(classifier)
        output = model(input_ids=ids, attention_mask=mask)
        output.logits, output.ood_logit
        ```
    """

    config_class = OODConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    # The loss is a mean over the batch at hand.
    accepts_loss_kwargs = False
    # The classifier checks for itself what it is asked for.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: OODConfig, classifier: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        config._check()
        head: Any
        self.classifier: Any
        if config.classifier is None:
            if config.feature_size is None:
                raise ConfigError("OODConfig got neither feature_size nor classifier; expected one of them.")
            self.classifier = FeatureClassifier(config)
            self.main_input_name, self.input_modalities = "features", ["features"]
            self.supports_gradient_checkpointing = False
            head_name, head = "output", self.classifier.output
        else:
            if classifier is None:
                classifier = _classifier_class(config)._from_config(config.classifier)
            self.classifier = classifier
            config.classifier_class = type(classifier).__name__
            self.main_input_name = classifier.main_input_name
            self.input_modalities = classifier.input_modalities
            self.supports_gradient_checkpointing = classifier.supports_gradient_checkpointing
            head_name, head = find_head(classifier, config.num_labels or 0, config.head_module)
            config.head_module = head_name
        self._head_name = head_name
        parameters = inspect.signature(self.classifier.forward).parameters.values()
        self._inputs = frozenset(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)
        self._takes_more = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.ood_head = nn.Linear(head.in_features, 1)
        self.post_init()

    @classmethod
    def from_classifier(cls, model: PreTrainedModel, head_module: str | None = None, **settings: Any) -> OODModel:
        """Put a head on a classifier; its weights are shared, not copied, and none changes.

        Args:
            model (`PreTrainedModel`):
                Of `AutoModelFor{Image,Sequence,Audio}Classification`, or one of your own in their mappings. A model that
                has a head, adapters around it included, is returned as it is.
            head_module (`str`, *optional*): Name of its last linear layer, where several could be it.
            **settings: Of `OODConfig`, for example `class_weights`.

        Raises:
            UnsupportedModelError: not such a model, a regression, several labels a row, or no last linear layer.
        """
        given: Any = model
        if isinstance(given.get_base_model() if hasattr(given, "get_base_model") else given, cls):
            return given
        if not isinstance(model, PreTrainedModel):
            hint = "; call merge_and_unload() first" if hasattr(given, "merge_and_unload") else ""
            raise UnsupportedModelError(
                f"{type(given).__name__} is no PreTrainedModel{hint}; expected a model of "
                "AutoModelFor{Image,Sequence,Audio}Classification."
            )
        if given.config.problem_type in ("regression", "multi_label_classification") or given.config.num_labels < 2:
            raise UnsupportedModelError(
                f"{type(given).__name__} has problem_type={given.config.problem_type!r} and num_labels="
                f"{given.config.num_labels}; expected a classifier of at least two classes, one a row."
            )
        config: Any = OODConfig(
            classifier=given.config, classifier_class=type(given).__name__, head_module=head_module, **settings
        )
        _classifier_class(config)
        head: Any = find_head(given, config.num_labels or 0, head_module)[1]
        config.dtype = config.classifier.dtype = given.dtype
        # Layers that were put in by hand carry no mark, and would be drawn anew.
        for module in given.modules():
            module._is_hf_initialized = True
        made: Any = cls(config, given)
        weight = head.weight
        made.ood_head.to(device=weight.device, dtype=weight.dtype if weight.is_floating_point() else given.dtype)
        # Not `train()`: parts of the classifier may be frozen in the other mode.
        made.training = made.ood_head.training = given.training
        return made

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Zeros for the head, torch's own draw for the layers on feature vectors."""
        if module is self.ood_head:
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            module.reset_parameters()

    @property
    def head(self) -> nn.Module:
        """Last linear layer of the classifier."""
        return self.classifier.get_submodule(self._head_name)

    def get_input_embeddings(self) -> nn.Module:
        """Those of the classifier."""
        if isinstance(self.classifier, PreTrainedModel):
            return self.classifier.get_input_embeddings()
        raise UnsupportedModelError("a classifier on feature vectors has no input embeddings.")

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Those of the classifier."""
        self.classifier.set_input_embeddings(value)

    def forward(
        self,
        features: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_values: Tensor | None = None,
        input_features: Tensor | None = None,
        labels: Tensor | None = None,
        is_ood: Tensor | None = None,
        output_features: bool = False,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> OODOutput | tuple:
        """Classify rows, and score them as in- or out-of-distribution.

        Args:
            features (`Tensor`, *optional*): `(n, feature_size)`, for a model on feature vectors.
            labels (`Tensor`, *optional*): `(n,)` classes; -100 for rows without one.
            is_ood (`Tensor`, *optional*): `(n,)`, 1 for out-of-distribution rows.
            output_features (`bool`, defaults to `False`): Whether to return the input of both heads.
            **kwargs: These, and the other tensors, are the classifier's own.

        Raises:
            DataError: inputs this model does not read, or of another width.
            UnsupportedModelError: a sequence of scores is not pooled by keeping one position.
        """
        given: dict[str, Any] = {
            "features": features,
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "pixel_values": pixel_values,
            "input_values": input_values,
            "input_features": input_features,
        }
        inputs = {name: value for name, value in given.items() if value is not None}
        with captured(self.head) as calls:
            logits = self._classify(inputs, kwargs)
        if not calls:
            raise UnsupportedModelError(f"{type(self.classifier).__name__} did not run its layer {self._head_name!r}.")
        h = pooled_input(*calls[-1], logits)
        ood_logit = self.ood_head(h.to(self.ood_head.weight.dtype)).squeeze(-1)
        loss = None
        if labels is not None:
            weights = self.config.class_weights
            loss = ood_loss(logits, ood_logit, labels, is_ood, self.config.ood_weight, weights)
        output = OODOutput(loss=loss, logits=logits, ood_logit=ood_logit, features=h if output_features else None)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _classify(self, inputs: dict[str, Tensor], kwargs: dict[str, Any]) -> Tensor:
        """Logits of the classifier."""
        name = self.main_input_name
        if not inputs.keys() & {name, "inputs_embeds"}:
            raise DataError(
                f"the model reads {name!r} and got {', '.join(sorted(inputs)) or 'no input'}; name the column {name!r}."
            )
        if not isinstance(self.classifier, FeatureClassifier):
            if "token_type_ids" not in self._inputs:
                # Tokenizers shared by several architectures write them for all.
                inputs.pop("token_type_ids", None)
            foreign = inputs.keys() - self._inputs
            if foreign and not self._takes_more:
                raise DataError(
                    f"{type(self.classifier).__name__} does not read {', '.join(sorted(foreign))}; drop the column."
                )
            if "use_cache" in self._inputs:
                # Scores need no keys and values of the past.
                kwargs = {"use_cache": False, **kwargs}
            return self.classifier(**inputs, **kwargs, return_dict=True).logits
        if inputs.keys() - {"features"}:
            raise DataError(f"a model on feature vectors reads 'features' only and got {', '.join(sorted(inputs))}.")
        features, width = inputs["features"], self.config.feature_size
        if features.ndim != 2 or features.shape[1] != width:
            raise DataError(f"features have shape {tuple(features.shape)}; expected (rows, {width}).")
        return self.classifier(features.to(next(self.classifier.parameters()).dtype))


def with_head(model_init: Callable[..., PreTrainedModel]) -> Callable[..., OODModel]:
    """A `model_init` of `Trainer` whose models get a head."""

    @functools.wraps(model_init)
    def init(*args: Any) -> OODModel:
        return OODModel.from_classifier(model_init(*args))

    return init


def _classifier_class(config: OODConfig) -> type[PreTrainedModel]:
    """The class a config names; only classes of transformers, or registered for classification, are built."""
    name, kind = config.classifier_class, type(config.classifier)
    known: list[type] = []
    for mapping in (getattr(modeling_auto, mapping) for mapping in _MAPPINGS):
        if kind in mapping:
            found = mapping[kind]
            known += found if isinstance(found, tuple) else [found]
    if name is None and known:
        return known[0]
    for found in known:
        if found.__name__ == name:
            return found
    found = getattr(transformers, name or "", None)
    if isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class is kind:
        return found
    raise UnsupportedModelError(
        f"classifier_class={name!r} is no classifier of {kind.__name__} that transformers knows"
        f"{' (it knows ' + ', '.join(k.__name__ for k in known) + ')' if known else ''}; register yours with "
        "AutoModelForSequenceClassification.register(config_class, model_class), or that for images or audio."
    )
