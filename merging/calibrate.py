"""Calibration data: what it costs to replace a fine-tuned model by its base plus a compressed delta.

The measure is the mean Kullback-Leibler divergence of the predictions from those of the fine-tuned model, in nats, where
an answer is due (`labels` that are not -100) or, without labels, at places spread evenly over each text. Gradients for the
data-driven scores are those of the loss at the fine-tuned weights, one example at a time: larger batches would average
gradients before they are squared.

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

from hf_ext.errors import ConfigError
from hf_ext.merging.blob import Delta


MEASURED_EXAMPLES, PLACES = 32, 16
MAX_TOKENS = 512  # of an example made of text
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
        `ConfigError`: no example, or one of a kind we do not know.
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
        self.examples = list(_examples(data, samples, tuned))
        if not self.examples:
            raise ConfigError(f"the calibration data is empty; give training examples of the fine-tune of {source}.")
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
        moved = {name: self.aim[name].detach() - weight.detach() for name, weight in unique.items()}
        return self._divergence({name: moved[name] for name in moved if name not in names}) / self.base_divergence

    def gradients(self, names: list[str], score: str) -> dict[str, Tensor]:
        """Mean gradient (`taylor1`) or mean squared gradient of the loss at the fine-tuned weights, float32 on the CPU."""
        found = {name: torch.zeros(self.aim[name].shape) for name in names}
        frozen = {name: weight.requires_grad for name, weight in self.aim.items()}
        with evaluating(self.tuned):
            for name, weight in self.aim.items():
                weight.requires_grad_(name in found)
            for example in self._walk(self.examples, "gradients"):
                _loss(self.tuned, example).backward()
                for name, total in found.items():
                    gradient = self.aim[name].grad
                    if gradient is not None:
                        total += (gradient if score == "taylor1" else gradient**2).float().cpu() / len(self.examples)
                    self.aim[name].grad = None
            for name, weight in self.aim.items():
                weight.requires_grad_(frozen[name])
        return found

    def _divergence(self, deltas: Mapping[str, Tensor]) -> float:
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
    if labels is not None and labels.shape == logits.shape[:2] and bool((labels[0, 1:] != -100).any()):
        due = torch.nonzero(labels[0, 1:] != -100)[:, 0]
    else:
        mask = example.get("attention_mask")
        due = torch.arange(logits.shape[1]) if mask is None else torch.nonzero(mask[0])[:, 0]
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


def _load(source: Any, revision: str | None = None) -> Any:
    if isinstance(source, torch.nn.Module):
        return source
    import transformers

    name = os.fspath(source)
    config = transformers.AutoConfig.from_pretrained(name, revision=revision)
    cls = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
    return cls.from_pretrained(name, dtype=torch.float32, revision=revision).eval()


def _examples(data: Iterable[Any], samples: int, tuned: Any) -> Iterator[dict[str, Tensor]]:
    if isinstance(data, str | Mapping):
        raise ConfigError("calibration is one example; give a list or a data set of them.")
    tokenizer, count = None, 0
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
            if count == samples:
                return
            count += 1
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
