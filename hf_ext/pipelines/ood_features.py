"""Rows, and their features, logits and gradients in a transformers classifier: what the filters of `medix` read.

The features are the input of the last linear layer of the classifier's head, at the position the logits come from. Their
gradient, and that of the last weight, follow in closed form (`medix.last_layer_gradients`). Two more need the model:

* `"bn_bias"`, the paper's: the bias of the last batch norm. In eval mode no row depends on another, so one backward pass
  from the output of that layer gives all rows at once, whatever comes after it. Between it and an average pooling with a
  ReLU before, that is `u_c` times the share of the positions of channel c with a positive pre-activation, with
  `u = W^T (p - e)` (`bn_bias_gradients`).
* any named parameter, by `torch.func.vmap` of `torch.func.grad` (`parameter_gradients`).

Paper: https://huggingface.co/papers/2510.06505, section 3.1. Differs from the paper: one batched pass, not one a row.
Shapes: n rows, d features, C classes.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from hf_ext.errors import DataError, UnsupportedModelError


LABEL_COLUMNS = ("labels", "label", "label_ids")
OOD_COLUMN = "is_ood"
CLOSED_FORMS = ("feature", "weight")


@dataclass
class Collected:
    """What a pass over rows gave, in their order, on the CPU, float32.

    Args:
        features (`Tensor`): `(n, d)`, what the last linear layer read.
        logits (`Tensor`): `(n, C)`.
        labels (`Tensor`): `(n,)` true classes where the rows have them and they were asked for, else predicted ones.
        gradients (`Tensor`, *optional*): `(n, e)` of the cross-entropy with `labels`.
    """

    features: Tensor
    logits: Tensor
    labels: Tensor
    gradients: Tensor | None = None


def find_head(model: nn.Module, num_labels: int, name: str | None = None) -> tuple[str, nn.Module]:
    """The last linear layer of a classifier: the one that writes the logits.

    Args:
        model (`nn.Module`): A classifier of transformers.
        num_labels (`int`): Its classes.
        name (`str`, *optional*): Name of the layer inside `model`, where it cannot be found.

    Returns:
        `tuple[str, nn.Module]`: name and layer.

    Raises:
        UnsupportedModelError: no linear layer, or several that could be meant, or `name` is none.
    """
    linear = {found: module for found, module in model.named_modules() if isinstance(module, nn.Linear)}
    if name is not None:
        modules = dict(model.named_modules())
        if name not in modules or not hasattr(modules[name], "in_features"):
            raise UnsupportedModelError(
                f"head_module={name!r} is no linear layer of {type(model).__name__}; its last linear layers are "
                f"{_listed(linear)}."
            )
        return name, modules[name]
    candidates = {found: module for found, module in linear.items() if module.out_features == num_labels}
    if len(candidates) > 1:
        # A backbone may be as wide as there are classes; its layers write no logits.
        backbone = f"{getattr(model, 'base_model_prefix', '')}."
        outside = {found: module for found, module in candidates.items() if not found.startswith(backbone)}
        candidates = outside if outside and backbone != "." else candidates
    if len(candidates) == 1:
        return next(iter(candidates.items()))
    if not candidates:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no torch.nn.Linear with {num_labels} outputs, one a class; its last linear layers "
            f"are {_listed(linear)}. Use a model of AutoModelFor{{Image,Sequence,Audio}}Classification, or its feature "
            "vectors with OODConfig(feature_size=...)."
        )
    raise UnsupportedModelError(
        f"{type(model).__name__} has {len(candidates)} linear layers with {num_labels} outputs, so the one that writes the "
        f"logits is not clear: {_listed(candidates)}. Name it, for example head_module={list(candidates)[-1]!r}."
    )


def pooled_input(read: Tensor, written: Tensor, logits: Tensor) -> Tensor:
    """What the last linear layer read for each row, where it may have read a whole sequence.

    Decoders such as Llama's score every token and keep the last one that is no padding. Which one a model keeps is told
    by the scores themselves: keeping is a copy, so the kept position is the one whose scores are the logits.

    Args:
        read (`Tensor`): `(n, d)` or `(n, ..., d)`, input of the layer.
        written (`Tensor`): `(n, C)` or `(n, ..., C)`, its output.
        logits (`Tensor`): `(n, C)`, output of the model.

    Returns:
        `Tensor`: `(n, d)`.

    Raises:
        UnsupportedModelError: no position has the logits for its scores, as after averaging over positions.
    """
    if logits.ndim != 2 or len(read) != len(logits):
        raise UnsupportedModelError(
            f"logits have shape {tuple(logits.shape)} and the last linear layer read {tuple(read.shape)}; expected "
            "(rows, classes) and one entry a row. Use a model that classifies whole rows."
        )
    if read.ndim == 2:
        return read
    read, written = read.flatten(1, -2), written.flatten(1, -2).to(logits.dtype)
    target = logits[:, None]
    same = ((written == target) | (written.isnan() & target.isnan())).all(-1)
    if not bool(same.any(1).all()):
        raise UnsupportedModelError(
            f"the logits of {int((~same.any(1)).sum())} of {len(logits)} rows are the scores of no single position of the "
            f"last linear layer, which wrote {tuple(written.shape)}; expected a model that pools before this layer or "
            "keeps one position after it."
        )
    # The last of several: padding before the row may repeat the scores.
    position = same.shape[1] - 1 - same.flip(1).int().argmax(1)
    return read[torch.arange(len(read), device=read.device), position]


@contextmanager
def captured(module: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Input and output of every call of `module` inside the `with` block.

    The hook lives as long as the block, so that copies of the model (DataParallel, PEFT, pickle) hold none.
    """
    calls: list[tuple[Tensor, Tensor]] = []

    def keep(_module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        calls.append((args[0] if args else next(iter(kwargs.values())), output))

    handle = module.register_forward_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()` for the length of a `with` block; every module then is as it was, frozen ones included."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


@contextmanager
def kept_rng() -> Iterator[None]:
    """Random numbers go on after the block as if it had drawn none: a filter does not change the training."""
    python, arrays = random.getstate(), numpy.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(arrays)


def last_batch_norm(model: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of the last batch norm with a bias, in the order of parameters.

    Raises:
        UnsupportedModelError: there is none.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.bias is not None
    ]
    if not found:
        raise UnsupportedModelError(
            f"gradient='bn_bias' needs a batch norm and {type(model).__name__} has none; use gradient='feature'."
        )
    return found[-1]


def bn_bias_gradients(feature_gradients: Tensor, activations: Tensor) -> Tensor:
    """Gradient of every row towards the bias of a batch norm with a ReLU and average pooling behind it, in closed form.

    Args:
        feature_gradients (`Tensor`): `(n, c)`, towards the pooled features: `W^T (p - e)`.
        activations (`Tensor`): `(n, c, ...)`, before or after the ReLU; only their sign is read.

    Returns:
        `Tensor`: `(n, c)`: `u_c` times the share of positions with a positive activation.
    """
    positive = (activations > 0).to(feature_gradients.dtype)
    return feature_gradients * (positive.flatten(2).mean(2) if positive.ndim > 2 else positive)


def parameter_gradients(model: nn.Module, inputs: dict[str, Any], labels: Tensor, name: str) -> Tensor:
    """Gradient of every row's cross-entropy towards one named parameter, by `torch.func`.

    Args:
        model (`nn.Module`): A classifier; it runs in eval mode and is then as it was.
        inputs (`dict`): What its forward takes, without labels; tensors with a row a row.
        labels (`Tensor`): `(n,)` classes.
        name (`str`): Name of the parameter, as in `model.named_parameters()`.

    Returns:
        `Tensor`: `(n, numel)`, flattened as the parameter is.

    Raises:
        UnsupportedModelError: there is no such parameter.
    """
    parameters = dict(model.named_parameters())
    if name not in parameters:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no parameter {name!r}; the last ones are {', '.join(list(parameters)[-3:])}."
        )
    rows = {key: value for key, value in inputs.items() if isinstance(value, Tensor)}
    parameter = parameters[name].detach()

    def loss(weight: Tensor, row: dict[str, Tensor], label: Tensor) -> Tensor:
        batch = {key: value[None] for key, value in row.items()}
        logits = torch.func.functional_call(model, {name: weight}, (), batch).logits
        return F.cross_entropy(logits.float(), label[None])

    gradient = torch.func.grad(loss)
    with eval_mode(model):
        try:
            found = torch.func.vmap(gradient, in_dims=(None, 0, 0))(parameter, rows, labels)
        except (RuntimeError, ValueError, TypeError):
            # Models that branch on values (masks, padding) cannot be mapped; a row at a time gives the same.
            found = torch.stack(
                [
                    gradient(parameter, {key: value[i] for key, value in rows.items()}, labels[i])
                    for i in range(len(labels))
                ]
            )
    return found.flatten(1).detach()


def forward_features(model: nn.Module, inputs: dict[str, Any], head: nn.Module | None = None) -> tuple[Tensor, Tensor]:
    """`(n, d)` features and `(n, C)` logits of a batch.

    Args:
        model (`nn.Module`): An `OODModel`, whatever it is wrapped in, or with `head` any classifier.
        inputs (`dict`): What its forward takes.
        head (`nn.Module`, *optional*): Last linear layer of `model`.
    """
    if head is None:
        output = model(**inputs, output_features=True)
        return output.features, output.logits
    with captured(head) as calls:
        logits = model(**inputs, return_dict=True).logits
    if not calls:
        raise UnsupportedModelError(f"{type(model).__name__} did not run its last linear layer in this batch.")
    read, written = calls[-1]
    return pooled_input(read, written, logits), logits


def collect(
    model: nn.Module,
    dataloader: Iterable,
    gradient: str | None = None,
    *,
    accelerator: Any = None,
    use_labels: bool = True,
    progress: bool = False,
    description: str | None = None,
) -> Collected:
    """Features, logits, labels and gradients of all rows, with the model in eval mode, restored afterwards.

    Args:
        model (`nn.Module`): An `OODModel`, also wrapped by `accelerator`, or a classifier of transformers.
        dataloader (`Iterable`): Batches, dicts of tensors.
        gradient (`str`, *optional*):
            `"bn_bias"`, or the name of a parameter. `None`, `"feature"` and `"weight"` collect none: `medix` has them in
            closed form from the features.
        accelerator (`Accelerator`, *optional*): Gathers the rows of all processes, in the order of the data set.
        use_labels (`bool`, defaults to `True`): `False` takes the predicted classes even where the rows have labels.
        progress (`bool`, defaults to `False`): Whether to show a bar.
        description (`str`, *optional*): Its text.

    Raises:
        DataError: no rows, or labels that are no class of the model.
        UnsupportedModelError: the last linear layer or the batch norm cannot be found.
    """
    from tqdm.auto import tqdm

    core: Any = model if accelerator is None else accelerator.unwrap_model(model)
    wrapped = hasattr(core, "ood_head")
    classifier = core.classifier if wrapped else core
    classes = core.config.num_labels
    head = None if wrapped else find_head(classifier, classes)[1]
    gradient = None if gradient in CLOSED_FORMS else gradient
    # DDP would wait for a backward pass of its own.
    model = model if gradient is None else core
    norm = last_batch_norm(classifier)[1] if gradient == "bn_bias" else None
    device = next(core.parameters()).device
    parts: list[list[Tensor]] = []
    with eval_mode(model), torch.no_grad():
        for batch in tqdm(dataloader, desc=description, disable=not progress):
            inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
            labels = next((inputs.pop(key) for key in LABEL_COLUMNS if inputs.get(key) is not None), None)
            inputs = {key: value for key, value in inputs.items() if key not in (*LABEL_COLUMNS, OOD_COLUMN)}
            labels = _checked_labels(labels, classes) if use_labels else None
            found = None
            if norm is None:
                features, logits = forward_features(model, inputs, head)
                labels = logits.argmax(-1) if labels is None else labels
                if gradient is not None:
                    found = parameter_gradients(core, inputs, labels, gradient)
            else:
                features, logits, labels, found = _through_norm(model, inputs, head, norm, labels)
            rows = [features, logits, labels] + ([] if found is None else [found])
            if accelerator is not None:
                rows = list(accelerator.gather_for_metrics(tuple(row.contiguous() for row in rows)))
            parts.append([row.cpu() if row.dtype == torch.long else row.float().cpu() for row in rows])
    if not parts:
        raise DataError(f"{description or 'the data set'}: no rows; expected at least 1.")
    return Collected(*(torch.cat(column) for column in zip(*parts, strict=True)))


def check_closed_form(collected: Collected, weight: Tensor, bias: Tensor | None) -> None:
    """That the logits are `W h + b`, on which the closed forms rest.

    Raises:
        UnsupportedModelError: they are not, as where a scale or a cap follows the last linear layer.
    """
    bias = None if bias is None else bias.detach().float().cpu()
    expected = F.linear(collected.features, weight.detach().float().cpu(), bias)
    off = (expected - collected.logits).abs().max()
    # Half precision rounds logits to eight bits.
    if off > 0.05 * max(1.0, float(collected.logits.abs().max())):
        raise UnsupportedModelError(
            f"logits are up to {float(off):.3g} off the output of the last linear layer, so that gradients have no closed "
            "form from it; use a filter without gradients, such as filter='two_pass' or 'knn'."
        )


def _through_norm(model, inputs, head, norm, labels) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, logits, labels, and the gradient towards the bias of `norm`, by one backward pass from its output."""
    outputs: list[Tensor] = []

    def start(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_())
        # Only what follows is recorded: the layers before need no memory for a backward pass.
        torch.set_grad_enabled(True)
        # A copy: blocks with a residual add to it in place.
        return outputs[-1].clone()

    handle = norm.register_forward_hook(start)
    try:
        with torch.no_grad():
            features, logits = forward_features(model, inputs, head)
            torch.set_grad_enabled(True)
            labels = logits.argmax(-1) if labels is None else labels
            loss = F.cross_entropy(logits.float(), labels, reduction="sum")
            (found,) = torch.autograd.grad(loss, outputs[-1])
    finally:
        handle.remove()
    found = found.flatten(2).sum(2) if found.ndim > 2 else found
    return features.detach(), logits.detach(), labels, found


def _checked_labels(labels: Tensor | None, classes: int) -> Tensor | None:
    if labels is None:
        return None
    if labels.is_floating_point() or labels.is_complex() or labels.numel() != len(labels):
        raise DataError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}; expected one integer a row, the index of its class."
        )
    labels = labels.view(-1).long()
    outside = labels[(labels < 0) | (labels >= classes)]
    if len(outside):
        raise DataError(
            f"label {int(outside[0])} is no class of a model with {classes}; expected 0 to {classes - 1}. Map the labels, or "
            "load the classifier with num_labels=..."
        )
    return labels


def _listed(layers: Mapping[str, Any], most: int = 5) -> str:
    named = [f"{name} ({layer.in_features} to {layer.out_features})" for name, layer in list(layers.items())[-most:]]
    return ", ".join(named) or "none"


class Rows(Dataset):
    """Some rows of a data set, without columns that are not to be read.

    Args:
        items (`Sequence`): A data set of any library, or a list of rows.
        where (`Tensor`): `(k,)` places in `items`.
        indices (`Tensor`, *optional*): `(k,)` places in the data set the rows come from, `where` by default.
        total (`int`, *optional*): Rows of that data set, where it is known.
        drop (`tuple[str, ...]`): Columns to leave out.
    """

    def __init__(
        self,
        items: Any,
        where: Tensor,
        indices: Tensor | None = None,
        total: int | None = None,
        drop: tuple[str, ...] = (),
    ) -> None:
        self.items, self.where, self.total, self.drop = items, where, total, drop
        self.indices = where if indices is None else indices

    @classmethod
    def of(cls, dataset: Any, drop: tuple[str, ...] = ()) -> Rows:
        """All rows of a data set with a length."""
        return cls(dataset, torch.arange(len(dataset)), total=len(dataset), drop=drop)

    def take(self, chosen: Tensor) -> Rows:
        """Rows at `(c,)` places of these."""
        return Rows(self.items, self.where[chosen], self.indices[chosen], self.total, self.drop)

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, place: int) -> Any:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int]) -> list:
        where = self.where[torch.as_tensor(places)].tolist()
        several = getattr(self.items, "__getitems__", None)
        rows = several(where) if several is not None else [self.items[i] for i in where]
        return [_without(row, self.drop) for row in rows]


def has_rows(dataset: Any) -> bool:
    """Whether rows can be read by their index; streams cannot."""
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and not isinstance(dataset, IterableDataset)


def column_names(dataset: Any, name: str) -> list[str] | None:
    """Columns of a data set, where they can be told without reading it.

    Raises:
        DataError: a dict of splits.
    """
    if isinstance(dataset, Mapping):
        raise DataError(f"{name} holds the splits {', '.join(map(str, dataset))}; pass one of them.")
    if isinstance(dataset, list | tuple) and dataset and isinstance(dataset[0], Mapping):
        return list(dataset[0])
    columns = getattr(dataset, "column_names", None)
    return list(columns) if isinstance(columns, list | tuple) else None


def sample_rows(dataset: Any, max_rows: int, seed: int | None, drop: tuple[str, ...] = ()) -> Rows:
    """All rows of a data set, or `max_rows` of them; of a stream they are kept in memory, as it gives them.

    Args:
        dataset (`Dataset` or `IterableDataset`): Of any library.
        max_rows (`int`): Most rows.
        seed (`int`, *optional*): Of a uniform sample of all rows, read once; `None` takes the first ones.
        drop (`tuple[str, ...]`): Columns to leave out.

    Raises:
        DataError: no rows.
    """
    from hf_ext.pipelines.medix import Reservoir

    if has_rows(dataset):
        total = len(dataset)
        where = torch.arange(total)
        if total > max_rows and seed is not None:
            where = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:max_rows].sort().values
        rows = Rows(dataset, where[:max_rows], total=total, drop=drop)
    elif seed is None:
        items = [_without(row, drop) for row in itertools.islice(dataset, max_rows)]
        rows = Rows(items, torch.arange(len(items)))
    else:
        reservoir, stream, total = Reservoir(max_rows, seed), iter(dataset), 0
        held: dict[int, Any] = {}
        # The reservoir samples row numbers; float64 holds them exactly.
        while chunk := list(itertools.islice(stream, 1024)):
            numbers = range(total, total + len(chunk))
            held.update(zip(numbers, (_without(row, drop) for row in chunk), strict=True))
            total += len(chunk)
            reservoir.add(torch.tensor(numbers, dtype=torch.float64)[:, None])
            if len(held) > max_rows:
                held = {number: held[number] for number in sorted(reservoir.rows().flatten().long().tolist())}
        rows = Rows(list(held.values()), torch.arange(len(held)), torch.tensor(list(held)).long(), total)
    if not len(rows):
        raise DataError("a data set holds no rows; expected at least 1.")
    return rows


def read_rows(dataset: Any, indices: Tensor, drop: tuple[str, ...] = ()) -> Rows:
    """Rows of a data set by index; a stream is read as far as needed.

    Raises:
        DataError: an index beyond the rows.
    """
    if has_rows(dataset):
        total, rows = len(dataset), Rows(dataset, indices, total=len(dataset), drop=drop)
    else:
        wanted, last = set(indices.tolist()), int(indices.max()) if len(indices) else -1
        held, total = dict[int, Any](), 0
        for number, row in enumerate(itertools.islice(dataset, last + 1)):
            total = number + 1
            if number in wanted:
                held[number] = _without(row, drop)
        rows = Rows(held, indices, drop=drop)
    if len(indices) and (indices.min() < 0 or indices.max() >= total):
        raise DataError(
            f"row {int(indices.min() if indices.min() < 0 else indices.max())} was asked for and there are {total} rows; "
            f"expected indices 0 to {total - 1}."
        )
    return rows


class OutlierOrder:
    """Batches without end of the places 0 to `count - 1`: one shuffle after the other, each known from seed and number.

    Args:
        count (`int`): Places.
        batch_size (`int`): Places a batch; more than `count` repeats them.
        seed (`int`): Of the shuffles.
        start (`int`, defaults to 0): Batches to leave out, without going through them.
    """

    drop_last = False

    def __init__(self, count: int, batch_size: int, seed: int, start: int = 0) -> None:
        self.count, self.batch_size, self.seed, self.start = count, batch_size, seed, start

    def __iter__(self) -> Iterator[list[int]]:
        turn, place = divmod(self.start * self.batch_size, self.count)
        waiting = self._shuffle(turn)[place:]
        while True:
            while len(waiting) < self.batch_size:
                turn += 1
                waiting = waiting + self._shuffle(turn)
            yield waiting[: self.batch_size]
            waiting = waiting[self.batch_size :]

    def _shuffle(self, turn: int) -> list[int]:
        generator = torch.Generator().manual_seed((self.seed * 2**24 + turn) % 2**63)
        return torch.randperm(self.count, generator=generator).tolist()


def join_batches(first: dict[str, Any], second: dict[str, Any], processor: Any, config: Any) -> dict[str, Any] | None:
    """Rows of two batches in one, the shorter padded where an attention mask says which part counts.

    Args:
        first (`dict`): Tensors `(n, ...)`.
        second (`dict`): Tensors `(m, ...)`, the same keys.
        processor (`Any`): Tokenizer or feature extractor, for its side and value of padding.
        config (`PreTrainedConfig`): For the token a classifier takes for padding.

    Returns:
        `dict`, *optional*: Tensors `(n + m, ...)`; `None` where shapes differ and there is no mask.
    """
    joined: dict[str, Any] = {}
    pad_token = getattr(config.get_text_config(), "pad_token_id", None)
    pad_token = getattr(processor, "pad_token_id", None) if pad_token is None else pad_token
    values = {"input_ids": pad_token, "attention_mask": 0, "token_type_ids": 0, "position_ids": 0}
    for key, value in first.items():
        other = second[key]
        if not isinstance(value, Tensor):
            joined[key] = value + other if isinstance(value, list) else value
            continue
        if value.shape[1:] != other.shape[1:]:
            if value.ndim != other.ndim or "attention_mask" not in first:
                return None
            width = [max(a, b) for a, b in zip(value.shape[1:], other.shape[1:], strict=True)]
            fill = values.get(key, getattr(processor, "padding_value", None)) or 0
            left = getattr(processor, "padding_side", "right") == "left"
            value, other = (_padded(part, width, fill, left) for part in (value, other))
        joined[key] = torch.cat([value, other])
    return joined


def _padded(part: Tensor, width: list[int], fill: float, left: bool) -> Tensor:
    sides: list[int] = []
    for have, want in zip(reversed(part.shape[1:]), reversed(width), strict=True):
        sides += [want - have, 0] if left else [0, want - have]
    return F.pad(part, sides, value=fill)


def _without(row: Any, drop: tuple[str, ...]) -> Any:
    if not isinstance(row, Mapping) or not any(name in row for name in drop):
        return row
    return {name: value for name, value in row.items() if name not in drop}
