"""Calibration data: what it costs to replace a fine-tuned model by its base plus a compressed delta.

The measure is the mean Kullback-Leibler divergence of the predictions from those of the fine-tuned model, in nats, where
an answer is due (`labels` that are not -100) or, without labels, at places spread evenly over each text. Gradients for the
data-driven scores are those of the loss at the fine-tuned weights, one example at a time: larger batches would average
gradients before they are squared. So padding has no use: it is cut off before anything is computed. Examples without
anything to predict (one token, or labels of -100 alone) are skipped.

Shapes: an example is a mapping of tensors `(1, N)`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from hf_ext.errors import ConfigError, DeltaError
from hf_ext.log import get_logger, warn_once
from hf_ext.merging.blob import Delta


_logger = get_logger(__name__)

MEASURED_EXAMPLES, PLACES = 32, 16
MAX_TOKENS = 512  # of an example made of text
IGNORED = -100  # the label of a token that is not to be predicted
_PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "inputs_embeds")
_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "labels", "inputs_embeds", "pixel_values")


class Calibration:
    """Both models in memory, and the fine-tuned one's predictions.

    Args:
        base, tuned (`str`, `os.PathLike` or `nn.Module`): as in `compress_delta`. A model given as `base` is used as it is
            and left as it was.
        data (`Iterable`): see `compress_delta`.
        samples (`int`): how many examples are used.
        source (`str`): where the base came from, for messages.
        progress (`bool`): show progress bars.
        revision (`str`, *optional*): of the base on the Hub.

    Raises:
        `ConfigError`: no example, none with something to predict, or one of a kind we do not know. `DeltaError`, from the
            methods: a tensor of a delta is no parameter of the models.
    """

    def __init__(
        self,
        base: Any,
        tuned: Any,
        data: Iterable[Any],
        samples: int,
        source: str,
        progress: bool,
        revision: str | None = None,
    ) -> None:
        self.model, self.tuned, self.progress = _load(base, revision), _load(tuned), progress
        self.examples, skipped = self._usable(_examples(data, tuned), samples)
        if not self.examples and skipped:
            raise ConfigError(
                f"all {skipped} calibration examples have nothing to predict: one token or none besides padding, or only "
                f"labels of {IGNORED}; give longer training examples of the fine-tune of {source}."
            )
        if not self.examples:
            raise ConfigError(f"the calibration data is empty; give training examples of the fine-tune of {source}.")
        if skipped:
            warn_once(_logger, f"{skipped} calibration examples have nothing to predict and were skipped.")
        step = max(len(self.examples) // MEASURED_EXAMPLES, 1)
        self.measured = self.examples[::step][:MEASURED_EXAMPLES]
        self.weights = dict(self.model.named_parameters(remove_duplicate=False))
        self.aim = dict(self.tuned.named_parameters(remove_duplicate=False))
        with evaluating(self.tuned):
            self.targets = [_predictions(self.tuned, example).half() for example in self._walk(self.measured, "tuned")]
        self.base_divergence = max(self.divergence({}), 1e-12)

    def divergence(self, deltas: Mapping[str, Delta]) -> float:
        """Mean divergence of the base plus `deltas` from the fine-tuned model, in nats a prediction."""
        return self._divergence({name: torch.from_numpy(delta.dense()) for name, delta in deltas.items()})

    def cost_of_leaving_out(self, names: list[str]) -> float:
        """What remains of the base's divergence when every delta but `names` is put back exactly."""
        # Tied weights once: a second name of the same storage would add the delta twice.
        unique = dict(self.model.named_parameters())
        _check_names([*unique, *names], self.aim, self.tuned)
        moved = {name: self.aim[name].detach() - weight.detach() for name, weight in unique.items()}
        return self._divergence({name: moved[name] for name in moved if name not in names}) / self.base_divergence

    def gradients(self, names: list[str], score: str) -> dict[str, Tensor]:
        """Mean gradient (`taylor1`) or mean squared gradient of the loss at the fine-tuned weights, float32 on the CPU."""
        _check_names(names, self.aim, self.tuned)
        found = {name: torch.zeros(self.aim[name].shape) for name in names}
        frozen = {name: weight.requires_grad for name, weight in self.aim.items()}
        with evaluating(self.tuned):
            try:
                for name, weight in self.aim.items():
                    weight.requires_grad_(name in found)
                for example in self._walk(self.examples, "gradients"):
                    _loss(self.tuned, example).backward()
                    for name, total in found.items():
                        gradient = self.aim[name].grad
                        if gradient is not None:
                            wanted = gradient if score == "taylor1" else gradient**2
                            total += wanted.float().cpu() / len(self.examples)
                        self.aim[name].grad = None
            finally:
                for name, weight in self.aim.items():
                    weight.requires_grad_(frozen[name])
        return found

    def _usable(self, found: Iterable[dict[str, Tensor]], samples: int) -> tuple[list[dict[str, Tensor]], int]:
        """Up to `samples` examples without padding, and how many were skipped before that."""
        kept, skipped = [], 0
        # The labels of an encoder-decoder belong to other tokens than its mask.
        aligned = not getattr(getattr(self.tuned, "config", None), "is_encoder_decoder", False)
        for example in found:
            example = _without_padding(example, aligned)
            if _has_answer(example):
                kept.append(example)
            else:
                skipped += 1
            if len(kept) == samples:
                break
        return kept, skipped

    def _divergence(self, deltas: Mapping[str, Tensor]) -> float:
        _check_names(deltas, self.weights, self.model)
        kept = {name: self.weights[name].detach().clone() for name in deltas}
        total = count = 0.0
        try:
            for name, delta in deltas.items():
                self.weights[name].data += delta.to(self.weights[name])
            with evaluating(self.model), torch.no_grad():
                for example, target in zip(self.measured, self.targets):
                    found, wanted = _predictions(self.model, example), target.float()
                    total += float((wanted.exp() * (wanted - found)).sum())
                    count += len(wanted)
        finally:
            for name, weight in kept.items():
                self.weights[name].data.copy_(weight)
        return total / count

    def _walk(self, examples: list, what: str) -> Iterable:
        return tqdm(examples, desc=what, disable=None if self.progress else True, leave=False)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode for the length of a block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _predictions(model: Any, example: dict[str, Tensor]) -> Tensor:
    """Log-probabilities `(places, classes)`, float32."""
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in example.items() if name != "labels"}
    with torch.no_grad():
        logits = model(**inputs).logits
    return logits[:, _places(example, logits)].flatten(0, -2).float().log_softmax(-1).cpu()


def _places(example: dict[str, Tensor], logits: Tensor) -> Any:
    if logits.dim() == 2:
        return slice(None)  # one prediction an example: `(1, classes)`
    labels = example.get("labels")
    if labels is not None and labels.shape == logits.shape[:2] and bool((labels[0, 1:] != IGNORED).any()):
        due = torch.nonzero(labels[0, 1:] != IGNORED)[:, 0]
    else:
        due = torch.arange(logits.shape[1])
    return due[torch.linspace(0, len(due) - 1, min(PLACES, len(due))).round().long()]


def _loss(model: Any, example: dict[str, Tensor]) -> Tensor:
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in example.items()}
    if "labels" in inputs:
        return model(**inputs).loss
    logits = model(**inputs).logits
    if logits.dim() == 2:
        return F.cross_entropy(logits, logits.argmax(-1))
    return F.cross_entropy(logits[0, :-1], inputs["input_ids"][0, 1:])


def _without_padding(example: dict[str, Tensor], aligned: bool) -> dict[str, Tensor]:
    """The example without the tokens whose mask is 0; `aligned` says that labels of the mask's shape belong to them."""
    mask = example.get("attention_mask")
    if mask is None or mask.dim() != 2 or bool(mask.all()):
        return example
    labels, real = example.get("labels"), mask[0] != 0
    cut = {*_PER_TOKEN, *(["labels"] if aligned and labels is not None and not labels.is_floating_point() else [])}
    return {
        name: value[:, real.to(value.device)] if name in cut and value.shape[:2] == mask.shape else value
        for name, value in example.items()
    }


def _has_answer(example: dict[str, Tensor]) -> bool:
    tokens = next((example[name] for name in ("input_ids", "inputs_embeds") if name in example), None)
    labels = example.get("labels")
    if tokens is not None and tokens.shape[1] < (2 if labels is None else 1):
        return False
    if labels is None or labels.is_floating_point():
        return True
    if tokens is not None and labels.shape == tokens.shape[:2]:
        labels = labels[:, 1:]  # the first token follows nothing
    return bool((labels != IGNORED).any())


def _check_names(names: Iterable[str], weights: Mapping[str, Any], model: Any) -> None:
    missing = [name for name in names if name not in weights]
    if missing:
        raise DeltaError(
            f"{missing[0]} is no parameter of {type(model).__name__} ({len(missing)} such names): calibration needs models "
            "that name their parameters as the checkpoints do; give those, or compress without calibration."
        )


def _load(source: Any, revision: str | None = None) -> Any:
    if isinstance(source, torch.nn.Module):
        return source
    import transformers

    name = os.fspath(source)
    config = transformers.AutoConfig.from_pretrained(name, revision=revision)
    cls = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
    return cls.from_pretrained(name, dtype=torch.float32, revision=revision).eval()


def _examples(data: Iterable[Any], tuned: Any) -> Iterator[dict[str, Tensor]]:
    if isinstance(data, str | Mapping):
        raise ConfigError("calibration is one example; give a list or a data set of them.")
    tokenizer = None
    for item in data:
        if isinstance(item, Mapping) and "input_ids" not in item and isinstance(item.get("text"), str):
            item = item["text"]
        if isinstance(item, str):
            tokenizer = tokenizer or _tokenizer(tuned)
            item = tokenizer(item, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        if torch.is_tensor(item):
            item = {"input_ids": item}
        if not isinstance(item, Mapping) or not set(item) & set(_INPUTS):
            raise ConfigError(
                f"calibration holds {type(item).__name__} {str(item)[:60]!r}; expected texts, or mappings with input_ids."
            )
        tensors = {name: torch.as_tensor(item[name]) for name in _INPUTS if item.get(name) is not None}
        first = next(iter(tensors.values()))
        rows = 1 if first.dim() == 1 else len(first)
        for row in range(rows):
            yield {
                name: value.reshape(1, *value.shape[0 if first.dim() == 1 else 1 :])
                if rows == 1
                else value[row : row + 1]
                for name, value in tensors.items()
            }


def _tokenizer(tuned: Any) -> Any:
    from transformers import AutoTokenizer

    name = getattr(getattr(tuned, "config", None), "_name_or_path", None) if not isinstance(tuned, str) else tuned
    name = os.fspath(tuned) if isinstance(tuned, os.PathLike) else name
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"calibration holds texts, and no tokenizer can be loaded from {name!r} ({str(error).splitlines()[0]}); give "
            "examples with input_ids instead."
        ) from None
