"""`OODTrainer`: filters wild rows, then trains a classifier and its out-of-distribution head on both kinds of rows.

Paper: https://huggingface.co/papers/2510.06505. Stage 1 (section 3.1) runs when training begins: features, and where the
filter needs them gradients, of in-distribution and wild rows, in eval mode; `MedixFilter` chooses. Stage 2 (section 3.2,
equation 5) is a fine-tuning with `Trainer`: each batch of labelled rows is joined by as many chosen rows,

    L = cross-entropy(f(x), y) over labelled rows + w binary-cross-entropy(g(h(x)), kind) over all rows.

Chosen rows come from a second data loader whose order depends on the seed and on how many batches were drawn, so that a
run resumed from a checkpoint draws the same rows as one without a break, and filters nothing again.

Differs from the paper: losses of accumulated batches are divided by the rows of all of them; a threshold is set after
training. Plugs in: anything `Trainer` takes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_ext.config import MethodConfig, write_text_atomic
from hf_ext.errors import CheckpointError, ConfigError, DataError
from hf_ext.log import get_logger, warn_once
from hf_ext.pipelines.ood_features import (
    LABEL_COLUMNS,
    OOD_COLUMN,
    OutlierOrder,
    Rows,
    check_closed_form,
    collect,
    column_names,
    eval_mode,
    has_rows,
    join_batches,
    kept_rng,
    read_rows,
    sample_rows,
)
from hf_ext.pipelines.ood_model import IGNORED_LABEL, OODModel, ood_loss, with_head


SELECTION_NAME = "ood_selection.json"
SELECTION_FORMAT = 1
# Wild rows have no labels, and what some data sets hold instead is not to be collated.
_UNREAD = (*LABEL_COLUMNS, OOD_COLUMN)

_logger = get_logger(__name__)


@dataclass
class OODTrainingArguments(MethodConfig, TrainingArguments):
    """`TrainingArguments` with the settings of both stages; works with `HfArgumentParser`.

    Args:
        ood_weight (`float`, defaults to 10.0): The paper's w; 0 trains the classifier alone, without wild rows.
        outliers_per_row (`int`, defaults to 1): Chosen rows a labelled row, in every batch.
        medix (`dict`, *optional*): Settings of `MedixConfig`, also as a JSON text.
        target_recall (`float`, *optional*, defaults to 0.95):
            Share of in-distribution rows the threshold lets pass. It is set after training, on the evaluation rows where
            there are any, and saved with the model; `None` sets none.

    Raises:
        ConfigError: naming the setting.
    """

    ood_weight: float = field(default=10.0, metadata={"help": "Weight of the second loss."})
    outliers_per_row: int = field(default=1, metadata={"help": "Chosen wild rows a labelled row."})
    medix: dict | str | None = field(default=None, metadata={"help": "Settings of the filter, as JSON."})
    target_recall: float | None = field(default=0.95, metadata={"help": "In-distribution rows below the threshold."})

    def __post_init__(self) -> None:
        self._check_types()
        if isinstance(self.medix, str):
            try:
                self.medix = json.loads(self.medix)
            except ValueError as error:
                raise ConfigError(
                    f"OODTrainingArguments.medix={self.medix!r} is no JSON ({error}); expected for example "
                    '{"filter": "knn"}.'
                ) from None
        super(MethodConfig, self).__post_init__()
        self.validate()

    def validate(self) -> None:
        """Rules between settings, those of the filter included."""
        from hf_ext.pipelines.medix import MedixConfig

        self.check(self.ood_weight >= 0, "ood_weight", "must be at least 0")
        self.check(self.outliers_per_row >= 1, "outliers_per_row", "must be at least 1")
        recall = self.target_recall
        self.check(recall is None or 0 < recall <= 1, "target_recall", "must be above 0 and at most 1, or None")
        if self.medix is not None:
            MedixConfig.from_dict(self.medix, strict=True)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """As `TrainingArguments`: plain JSON types, tokens hidden."""
        return super(MethodConfig, self).to_dict()

    @classmethod
    def from_dict(cls, data: dict[str, Any], strict: bool = False) -> OODTrainingArguments:
        """Build from `to_dict()`; the tokens it hides are left out."""
        return super().from_dict({k: v for k, v in data.items() if v != f"<{k.upper()}>"}, strict)


class OODTrainer(Trainer):
    """Fine-tunes a classifier together with a head that tells out-of-distribution rows, from unlabelled wild rows.

    Args:
        model (`PreTrainedModel`): An `OODModel`, or a classifier of transformers, trained on in-distribution rows, which gets a head.
        args (`OODTrainingArguments`, *optional*): Any `TrainingArguments`; settings of ours then keep their defaults.
        wild_dataset (`Dataset` or `IterableDataset`, *optional*):
            Rows of both kinds, with the inputs of `train_dataset`; labels are not read. Needed to train. Of a stream,
            `MedixConfig.max_wild_rows` rows are kept in memory, a uniform sample.
        eval_wild_dataset (`Dataset`, *optional*):
            Rows that evaluation scores beside `eval_dataset`. All count as out-of-distribution, unless a column `is_ood`
            tells (1 for out-of-distribution).
        reference_dataset (`Dataset`, *optional*):
            Labelled rows the filter compares with, `train_dataset` by default. Rows the classifier was not trained on are
            better: its features of rows it knows differ from those of new ones.
        medix (`MedixConfig`, *optional*): The filter; `args.medix`, or its defaults.
        outliers (`Sequence[int]`, *optional*): Indices of wild rows to take, in place of a filter.
        **kwargs: Of `Trainer`. `compute_metrics` sees the logits of the classes as predictions.

    Attributes:
        outliers_ (`Tensor`): `(k,)` indices of the chosen wild rows, once training began.
        prevalence_ (`float`): Share of out-of-distribution rows among the wild rows, as the filter has it.

    Raises:
        ConfigError: settings that exclude each other. DataError: columns or rows that cannot work.
        UnsupportedModelError: no classifier.

    Example:
        ```python
        args = OODTrainingArguments(output_dir="out", num_train_epochs=3)
        trainer = OODTrainer(classifier, args, train_dataset=labelled, wild_dataset=logged)
        trainer.train()
        trainer.save_model("detector")
        ```
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: TrainingArguments | None = None,
        *,
        wild_dataset: Any = None,
        eval_wild_dataset: Any = None,
        reference_dataset: Any = None,
        medix: Any = None,
        outliers: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        from hf_ext.pipelines.medix import MedixConfig

        args = OODTrainingArguments(output_dir="tmp_trainer") if args is None else args
        if kwargs.get("compute_loss_func") is not None:
            raise ConfigError("compute_loss_func is not used: OODTrainer has its own loss; leave it out.")
        if args.batch_eval_metrics:
            raise ConfigError("batch_eval_metrics=True: ranks need all rows at once; leave it False.")
        settings = getattr(args, "medix", None)
        if outliers is not None and (medix is not None or settings is not None):
            raise ConfigError("outliers= names the rows, so medix= chooses nothing; leave one out.")
        self.medix = medix if medix is not None else MedixConfig.from_dict(settings or {}, strict=True)
        self.ood_weight = float(getattr(args, "ood_weight", 10.0))
        self.outliers_per_row = int(getattr(args, "outliers_per_row", 1))
        self.wild_dataset, self.eval_wild_dataset = wild_dataset, eval_wild_dataset
        self.reference_dataset = reference_dataset
        self.outliers_: Any = None
        self.prevalence_: float | None = None
        self._given = None if outliers is None else torch.as_tensor(list(outliers), dtype=torch.long)
        self._selection: Any = None
        self._outlier_rows: Any = None
        self._stream: Any = None
        self._stream_loader: Any = None
        self._drawn = 0
        self._scores: tuple[numpy.ndarray, numpy.ndarray] | None = None

        self._user_metrics = kwargs.pop("compute_metrics", None)
        preprocess = kwargs.pop("preprocess_logits_for_metrics", None)
        if preprocess is not None:
            kwargs["preprocess_logits_for_metrics"] = lambda out, labels: (
                preprocess(out[0], labels[0] if isinstance(labels, tuple | list) else labels),
                *out[1:],
            )
        if kwargs.get("model_init") is not None:
            kwargs["model_init"] = with_head(kwargs["model_init"])
        model = None if model is None else OODModel.from_classifier(model)
        super().__init__(model, args, compute_metrics=self._compute_metrics, **kwargs)
        # Rows of a step are counted by Trainer where it believes the model divides by them; here `compute_loss` does.
        self.model_accepts_loss_kwargs = True
        self.add_callback(_Begin(self))
        self._check_labelled(self.train_dataset, "train_dataset")
        self._check_labelled(reference_dataset, "reference_dataset")
        self._check_wild(wild_dataset, "wild_dataset")
        self._check_wild(eval_wild_dataset, "eval_wild_dataset")

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; filters the wild rows first, and sets the threshold afterwards.

        Raises:
            DataError: no wild rows, rows or labels that cannot work, or a filter that chose none.
            CheckpointError: the checkpoint's choice was made among other wild rows.
        """
        if self.ood_weight and self.wild_dataset is None:
            raise DataError(
                f"training with ood_weight={self.ood_weight} needs wild_dataset=, unlabelled rows of both kinds; pass it, or "
                "set ood_weight=0."
            )
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        self._selection = _read_selection(checkpoint) if checkpoint else None
        self.outliers_ = self._outlier_rows = None
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._close_stream()
        recall = getattr(self.args, "target_recall", None)
        if recall is not None and self.ood_weight:
            self.calibrate(recall=recall)
        return result

    def calibrate(self, dataset: Any = None, recall: float = 0.95) -> float:
        """Set the threshold of the model's config so that it lets `recall` of in-distribution rows pass.

        Args:
            dataset (`Dataset`, *optional*): In-distribution rows; those of `eval_dataset` by default, else of training.
            recall (`float`, defaults to 0.95): Share of them with a score of at most the threshold.

        Returns:
            `float`: The threshold, an OOD score between 0 and 1.

        Raises:
            DataError: no in-distribution rows.
        """
        if dataset is None and not isinstance(self.eval_dataset, dict):
            dataset = self.eval_dataset
        dataset = self._reference() if dataset is None else dataset
        scores, kinds = self._ood_logits(dataset, default=0, description="Threshold")
        scores = scores[kinds == 0]
        if not len(scores):
            raise DataError("no in-distribution rows to set a threshold on; expected some with is_ood = 0.")
        threshold = float(numpy.quantile(1 / (1 + numpy.exp(-scores.astype(numpy.float64))), recall, method="higher"))
        self._core().config.ood_threshold = threshold
        return threshold

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of equation 5; in training with a batch of chosen wild rows beside the labelled ones."""
        inputs = dict(inputs)
        labels, kinds = inputs.pop("labels", None), inputs.pop(OOD_COLUMN, None)
        if labels is None:
            raise DataError(f"a batch holds {', '.join(inputs) or 'nothing'} and no labels; add a column 'labels'.")
        training = model.training
        if training and self._stream is not None:
            labels, kinds, outputs = self._forward_both(model, inputs, labels)
        else:
            outputs = model(**inputs)
        if training and kinds is None:
            # Without chosen rows the head is not trained, but takes part in the graph for the sake of DDP.
            kinds, weight = labels.new_zeros(len(labels)), 0.0
        else:
            weight = self.ood_weight
        # DataParallel hands out one count a device; the loss is computed on all rows.
        counted = training and num_items_in_batch is not None and self.args.n_gpu <= 1
        ratio = 1 + (self.outliers_per_row if self._stream is not None else 0)
        loss = ood_loss(
            outputs["logits"],
            outputs["ood_logit"],
            labels,
            kinds,
            weight,
            self._core().config.class_weights,
            self.args.label_smoothing_factor if training else 0.0,
            in_rows=num_items_in_batch if counted else None,
            all_rows=num_items_in_batch * ratio if counted else None,
        )
        if counted and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        elif training and num_items_in_batch is not None and not counted:
            loss = loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """As `Trainer`'s; labels of rows with a column `is_ood` become `(labels, is_ood)`."""
        kinds = inputs.get(OOD_COLUMN)
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if prediction_loss_only or kinds is None:
            return loss, logits, labels
        kinds = self._prepare_input(kinds).view(-1).long()
        labels = torch.full_like(kinds, IGNORED_LABEL) if labels is None else labels
        return loss, logits, (labels, kinds)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As `Trainer`'s, with the metrics of both kinds of rows where there are both."""
        self._scores = None
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if description == "Evaluation" and self._scores is not None:
            scores, kinds = self._scores
            if self.eval_wild_dataset is not None:
                more = self._ood_logits(self.eval_wild_dataset, default=1, description="Wild rows")
                scores, kinds = numpy.concatenate([scores, more[0]]), numpy.concatenate([kinds, more[1]])
            for name, value in _both_kinds(scores, kinds).items():
                output.metrics[f"{metric_key_prefix}_{name}"] = value
        self._scores = None
        return output

    def _compute_metrics(self, prediction: Any) -> dict[str, float]:
        logits, ood_logit = prediction.predictions[:2]
        labels = prediction.label_ids
        labels, kinds = labels if isinstance(labels, tuple | list) else (labels, numpy.zeros(len(ood_logit), int))
        labels, kinds = numpy.asarray(labels).reshape(-1), numpy.asarray(kinds).reshape(-1)
        self._scores = (numpy.asarray(ood_logit), kinds)
        counted = (labels != IGNORED_LABEL) & (kinds == 0)
        metrics = {}
        if logits.ndim == 2 and counted.any():
            metrics["accuracy"] = float((logits.argmax(-1) == labels)[counted].mean())
        if self._user_metrics is not None:
            seen = {"losses": prediction.losses, "inputs": prediction.inputs}
            metrics.update(self._user_metrics(EvalPrediction(predictions=logits, label_ids=labels, **seen)))
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.outliers_ is not None and self.args.should_save:
            folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
            # Before the rest: a checkpoint without the choice would filter again, with a model that is half trained.
            write_text_atomic(folder / SELECTION_NAME, json.dumps({**self._selection, "batches": self._drawn}))
        super()._save_checkpoint(model, trial)

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            columns: Any = self._signature_columns
            self._signature_columns = sorted({*columns, *self._core()._inputs})  # type: ignore[assignment]

    def _core(self) -> Any:
        """The `OODModel` inside what it is wrapped in."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _begin(self) -> None:
        """Stage 1, or what a checkpoint keeps of it; called when the model is ready and no step was taken."""
        self._close_stream()
        # A search over settings has changed them by now.
        self.ood_weight = float(getattr(self.args, "ood_weight", self.ood_weight))
        self._core().config.ood_weight = self.ood_weight
        if not self.ood_weight:
            return
        if self._selection is None:
            with kept_rng():
                self._selection = self._select()
            numbers = {**self._selection, "outliers": len(self._selection["outliers"])}
            names = ("outliers", "prevalence", "wild_rows")
            self.log({f"ood_{name}": numbers[name] for name in names if numbers[name] is not None})
        self._drawn = self._selection["batches"]
        self.outliers_ = torch.tensor(self._selection["outliers"], dtype=torch.long)
        self.prevalence_ = self._selection["prevalence"]
        if self._outlier_rows is None:
            self._outlier_rows = self._chosen_rows()
        self._open_stream()

    def _select(self) -> dict[str, Any]:
        """Indices of the wild rows taken for out-of-distribution, and what is needed to go on from a checkpoint."""
        from accelerate.utils import broadcast_object_list

        if self._given is None:
            rows = sample_rows(self.wild_dataset, self.medix.max_wild_rows, self.medix.seed, _UNREAD)
            found = self._filter(rows)
            # Devices round differently; one process decides.
            broadcast_object_list(found)
            self._outlier_rows, prevalence = rows.take(torch.tensor(found[0], dtype=torch.long)), found[1]
        else:
            self._outlier_rows = rows = read_rows(self.wild_dataset, self._given, _UNREAD)
            prevalence = len(rows) / rows.total if rows.total else None
        if not len(self._outlier_rows):
            raise DataError(
                f"none of {rows.total} wild rows was taken for out-of-distribution, so there is nothing to train the head on; "
                "pass MedixConfig(prevalence=...), or outliers=."
            )
        return {
            "format_version": SELECTION_FORMAT,
            "outliers": self._outlier_rows.indices.tolist(),
            "prevalence": prevalence,
            "wild_rows": rows.total,
            "seed": self.args.seed if self.args.data_seed is None else self.args.data_seed,
            "batches": 0,
        }

    def _filter(self, rows: Rows) -> list[Any]:
        """Places of the rows taken among `rows`, and the prevalence."""
        from hf_ext.pipelines.medix import GRADIENT_FILTERS, MedixFilter

        config, head = self.medix, self._core().head
        gradient = config.gradient if config.filter in GRADIENT_FILTERS else None
        common = {
            "model": self.model_wrapped,
            "gradient": gradient,
            "accelerator": self.accelerator,
            "progress": not self.args.disable_tqdm and self.is_local_process_zero(),
        }
        inside = collect(dataloader=self._loader(self._reference()), description="In-distribution rows", **common)
        wild = collect(dataloader=self._loader(rows), description="Wild rows", use_labels=False, **common)
        weight = bias = None
        if gradient is not None:
            weight = head.weight.detach().float().cpu()
            bias = None if head.bias is None else head.bias.detach().float().cpu()
            if inside.gradients is None:
                check_closed_form(inside, weight, bias)
        chooser = MedixFilter(config).reference(inside.features, inside.labels, weight, bias, inside.gradients)
        return [chooser.select(wild.features, wild.gradients).tolist(), float(chooser.prevalence_)]

    def _chosen_rows(self) -> Rows:
        """The wild rows a checkpoint's choice names, read again from the data set."""
        expected = self._selection["wild_rows"]
        if has_rows(self.wild_dataset) and expected is not None and len(self.wild_dataset) != expected:
            raise CheckpointError(
                f"the checkpoint's rows were chosen among wild_rows={expected} and wild_dataset holds "
                f"{len(self.wild_dataset)}; pass the wild_dataset of the interrupted run."
            )
        try:
            return read_rows(self.wild_dataset, self.outliers_, _UNREAD)
        except DataError as error:
            raise CheckpointError(
                f"the checkpoint's rows are not in wild_dataset: {error} Pass that of the interrupted run."
            ) from None

    def _open_stream(self) -> None:
        seed, size = self._selection["seed"], self._train_batch_size * self.outliers_per_row
        shares = 1 if self.accelerator.split_batches else self.accelerator.num_processes
        order = OutlierOrder(len(self._outlier_rows), size, seed, start=self._drawn * shares)
        loader = DataLoader(
            self._outlier_rows,
            batch_sampler=order,
            # Its own, so that a loader opened at a resumed step draws nothing from the global one.
            generator=torch.Generator().manual_seed(seed),
            **self._loader_settings(),
        )
        self._stream_loader = self.accelerator.prepare(loader)
        self._stream = iter(self._stream_loader)

    def _close_stream(self) -> None:
        if self._stream_loader is not None:
            self._stream.close()
            # It never ends by itself, and accelerate keeps count of loaders that are being read.
            if self._stream_loader in self.accelerator.gradient_state.dataloader_references:
                self._stream_loader.end()
            if self._stream_loader in self.accelerator._dataloaders:
                self.accelerator._dataloaders.remove(self._stream_loader)
        self._stream = self._stream_loader = None

    def _forward_both(self, model: Any, inputs: dict[str, Any], labels: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Labels, kinds and outputs of a labelled batch with chosen rows after it, in one pass where shapes allow."""
        count = len(labels) * self.outliers_per_row
        outliers = self._prepare_inputs(dict(next(self._stream)))
        self._drawn += 1
        outliers = {
            key: value[:count] if isinstance(value, Tensor | list) else value
            for key, value in outliers.items()
            if key not in (*LABEL_COLUMNS, OOD_COLUMN)
        }
        if outliers.keys() != inputs.keys():
            raise DataError(
                f"wild rows hold {', '.join(sorted(outliers))} and labelled ones {', '.join(sorted(inputs))}; expected the same "
                "columns."
            )
        kinds = torch.cat([labels.new_zeros(len(labels)), labels.new_ones(count)])
        labels = torch.cat([labels.view(-1), labels.new_full((count,), IGNORED_LABEL)])
        joined = join_batches(inputs, outliers, self.processing_class, self._core().config)
        if joined is not None:
            return labels, kinds, model(**joined)
        warn_once(_logger, "labelled and wild batches differ in shape without an attention mask: they run one by one.")
        parts = [model(**inputs), model(**outliers)]
        return labels, kinds, {name: torch.cat([p[name] for p in parts]) for name in ("logits", "ood_logit")}

    def _reference(self) -> Any:
        """Labelled rows the filter compares with."""
        rows = self.train_dataset if self.reference_dataset is None else self.reference_dataset
        return rows if has_rows(rows) else sample_rows(rows, self.medix.max_wild_rows, None)

    def _loader_settings(self) -> dict[str, Any]:
        return {
            "collate_fn": self._get_collator_with_removed_columns(self.data_collator),
            "num_workers": self.args.dataloader_num_workers,
            "pin_memory": self.args.dataloader_pin_memory,
            "prefetch_factor": self.args.dataloader_prefetch_factor,
        }

    def _loader(self, dataset: Any) -> DataLoader:
        """All rows once, in order."""
        rows = dataset if isinstance(dataset, Rows) else Rows.of(dataset)
        size = self.args.eval_batch_size
        loader = self.accelerator.prepare(DataLoader(rows, batch_size=size, shuffle=False, **self._loader_settings()))
        self.accelerator._dataloaders.remove(loader)
        return loader

    def _ood_logits(self, dataset: Any, default: int, description: str) -> tuple[numpy.ndarray, numpy.ndarray]:
        """`(n,)` OOD logits and kinds of all rows, `default` for those that do not tell."""
        from tqdm.auto import tqdm

        parts: list[list[Tensor]] = []
        hidden = self.args.disable_tqdm or not self.is_local_process_zero()
        if not isinstance(dataset, Rows):
            limit = len(dataset) if has_rows(dataset) else self.medix.max_wild_rows
            dataset = sample_rows(dataset, limit, None, LABEL_COLUMNS)
        with eval_mode(self.model_wrapped), torch.no_grad():
            for batch in tqdm(self._loader(dataset), desc=description, disable=hidden):
                batch = self._prepare_inputs(dict(batch))
                kinds = batch.pop(OOD_COLUMN, None)
                batch = {key: value for key, value in batch.items() if key not in LABEL_COLUMNS}
                logit = self.model_wrapped(**batch).ood_logit.float()
                kinds = torch.full_like(logit, default) if kinds is None else kinds.view(-1).to(logit)
                both = self.accelerator.gather_for_metrics((logit, kinds))
                parts.append([part.cpu() for part in both])
        scores, kinds = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
        return scores, kinds.astype(int)

    def _check_labelled(self, dataset: Any, name: str) -> None:
        columns = column_names(dataset, name)
        if columns is None:
            return
        if not {*LABEL_COLUMNS, *self.label_names} & set(columns):
            raise DataError(f"{name} holds {', '.join(columns)} and no labels; add a column 'labels'.")
        if OOD_COLUMN in columns:
            raise DataError(
                f"{name} holds a column {OOD_COLUMN!r}; its rows are all in-distribution. Put the others into wild_dataset, "
                "and their indices into outliers=."
            )

    def _check_wild(self, dataset: Any, name: str) -> None:
        if dataset is not None and has_rows(dataset) and len(dataset) == 0:
            raise DataError(f"{name} is empty; expected unlabelled rows.")
        wild, columns = column_names(dataset, name), column_names(self.train_dataset, "train_dataset")
        if wild is None or columns is None:
            return
        self._set_signature_columns_if_needed()
        read = set(columns) - {*LABEL_COLUMNS, OOD_COLUMN}
        read = read & set(self._signature_columns or ()) if self.args.remove_unused_columns else read
        missing = sorted(read - set(wild))
        if missing:
            raise DataError(
                f"{name} holds {', '.join(wild)} and lacks {', '.join(missing)}, which train_dataset has; prepare both alike."
            )


class _Begin(TrainerCallback):
    """Starts the second stage when everything is ready for a first step."""

    def __init__(self, trainer: OODTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Runs the filter, or reads its choice from a checkpoint."""
        self.trainer._begin()


def _both_kinds(scores: numpy.ndarray, kinds: numpy.ndarray) -> dict[str, float]:
    from hf_ext.pipelines.ood_metrics import ood_metrics

    if not 0 < kinds.sum() < len(kinds):
        return {}
    found = ood_metrics(torch.from_numpy(scores), torch.from_numpy(kinds))
    return {name: float(value) for name, value in found.items()}


def _read_selection(checkpoint: str | os.PathLike) -> dict[str, Any] | None:
    path = Path(checkpoint) / SELECTION_NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        warn_once(_logger, f"{path} does not exist: the wild rows are filtered again, with the checkpoint's weights.")
        return None
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}.") from None
    if found.get("format_version") != SELECTION_FORMAT:
        raise CheckpointError(
            f"{path} has format_version={found.get('format_version')!r}; this version reads {SELECTION_FORMAT}."
        )
    return found
