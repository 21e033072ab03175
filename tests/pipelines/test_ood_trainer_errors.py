"""`OODTrainer`: what cannot work is refused by name, at once where it can be told, and nothing was changed."""

import json

import pytest
import torch
from datasets import DatasetDict
from torch import nn
from transformers import HfArgumentParser

from hf_ext.errors import CheckpointError, ConfigError, DataError, UnsupportedModelError
from hf_ext.pipelines.medix import MedixConfig
from hf_ext.pipelines.ood_trainer import SELECTION_NAME, OODTrainer, OODTrainingArguments
from tests.pipelines.test_ood_features import Stream, classifier, inputs
from tests.pipelines.test_ood_trainer import DATA, WIDTH, make, same, table, trained, weights


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"wild_dataset": DATA["wild"].select([])}, DataError, "wild_dataset is empty"),
        ({"eval_wild_dataset": DATA["wild"].select([])}, DataError, "eval_wild_dataset is empty"),
        (
            {"wild_dataset": DATA["wild"].rename_column("features", "vector")},
            DataError,
            "wild_dataset holds vector and lacks features",
        ),
        ({"wild_dataset": DatasetDict(train=DATA["wild"])}, DataError, "wild_dataset holds the splits train"),
        ({"train_dataset": DATA["wild"]}, DataError, "train_dataset holds features and no labels"),
        ({"reference_dataset": DATA["wild"]}, DataError, "reference_dataset holds features and no labels"),
        (
            {"train_dataset": DATA["train"].add_column("is_ood", [0] * 160)},
            DataError,
            "train_dataset holds a column 'is_ood'",
        ),
        ({"outliers": [1], "medix": MedixConfig()}, ConfigError, "leave one out"),
        ({"compute_loss_func": lambda *args, **kwargs: 0}, ConfigError, "compute_loss_func is not used"),
        ({"model": nn.Linear(2, 2)}, UnsupportedModelError, "Linear is no PreTrainedModel"),
        ({"args": {"batch_eval_metrics": True}}, ConfigError, "batch_eval_metrics=True"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_work_is_refused_at_once(tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        make(tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"outliers": []}, "none of 180 wild rows was taken"),
        ({"outliers": [0, 180]}, "row 180 was asked for and there are 180 rows"),
        ({"wild_dataset": Stream([])}, "no rows"),
        ({"wild_dataset": table(torch.randn(20, WIDTH + 1))}, r"features have shape \(8, 9\); expected \(rows, 8\)"),
        ({"wild_dataset": table(torch.full((20, WIDTH), float("nan")))}, "NaN or infinity"),
        (
            {"train_dataset": table(torch.randn(20, WIDTH), torch.full((20,), 3))},
            "label 3 is no class of a model with 3",
        ),
        ({"train_dataset": table(torch.randn(20, WIDTH), torch.full((20,), -1))}, "label -1 is no class"),
        ({"train_dataset": table(torch.randn(20, WIDTH), torch.full((20,), 0.5))}, "expected one integer a row"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rows_that_cannot_work_are_refused_when_they_are_read(tmp_path, settings, message):
    one = make(tmp_path, **settings)
    before = weights(one.model)
    with pytest.raises(DataError, match=message):
        one.train()
    assert same(weights(one.model), before)
    assert one._stream is None


def test_wild_rows_with_other_columns_are_refused_where_only_batches_tell(tmp_path):
    class Bare(torch.utils.data.Dataset):
        def __init__(self, names):
            self.names = names

        def __len__(self):
            return 12

        def __getitem__(self, i):
            batch = {**inputs("bert", 12), "labels": torch.arange(12) % 3}
            return {name: batch[name][i] for name in self.names}

    def run(train, wild):
        settings = {"train_dataset": Bare(train), "wild_dataset": Bare(wild), "outliers": [1, 2]}
        make(tmp_path, classifier("bert"), {"max_steps": 1}, **settings).train()

    run(["input_ids", "attention_mask", "labels"], ["input_ids", "attention_mask"])
    with pytest.raises(DataError, match="wild rows hold input_ids and labelled ones attention_mask, input_ids"):
        run(["input_ids", "attention_mask", "labels"], ["input_ids"])
    with pytest.raises(DataError, match="no labels; add a column 'labels'"):
        run(["input_ids"], ["input_ids"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 9}, "format_version=9; this version reads 1"),
        ({"wild_rows": 200}, "chosen among wild_rows=200 and wild_dataset holds 180"),
        ({"outliers": [500]}, "not in wild_dataset: row 500 was asked for"),
        (None, "is no JSON"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, change, message):
    args = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make(tmp_path, args=args).train()
    path = tmp_path / "checkpoint-2" / SELECTION_NAME
    path.write_text("{" if change is None else json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        make(tmp_path, args={**args, "max_steps": 4}).train(resume_from_checkpoint=str(path.parent))


def test_a_checkpoint_without_a_choice_filters_again_and_says_so(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("hf_ext.log._seen", set())
    args = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make(tmp_path, args=args).train()
    (tmp_path / "checkpoint-2" / SELECTION_NAME).unlink()
    one = make(tmp_path, args={**args, "max_steps": 4})
    one.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(one.outliers_)
    assert any("filtered again" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ood_weight": -1.0}, "OODTrainingArguments.ood_weight=-1.0 must be at least 0"),
        ({"ood_weight": float("inf")}, "ood_weight=inf must be a finite number"),
        ({"ood_weight": "ten"}, "ood_weight='ten' must be a number"),
        ({"outliers_per_row": 0}, "outliers_per_row=0 must be at least 1"),
        ({"outliers_per_row": 1.5}, "outliers_per_row=1.5 must be an integer"),
        ({"target_recall": 0.0}, "target_recall=0.0 must be above 0"),
        ({"target_recall": 1.5}, "target_recall=1.5 must be"),
        ({"medix": "{"}, "medix='{' is no JSON"),
        ({"medix": {"filtre": "knn"}}, "did you mean 'filter'"),
        ({"medix": {"filter": "x"}}, "MedixConfig.filter='x'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_setting_that_cannot_work_is_refused_by_name(tmp_path, wrong, message):
    with pytest.raises(ConfigError, match=message):
        OODTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **wrong)


def test_the_command_line_and_json_carry_every_setting(tmp_path):
    words = (
        f"--output_dir {tmp_path} --use_cpu --ood_weight 3 --outliers_per_row 2 --target_recall 0.9 --medix".split()
    )
    (args,) = HfArgumentParser(OODTrainingArguments).parse_args_into_dataclasses([*words, '{"filter": "knn"}'])
    assert (args.ood_weight, args.outliers_per_row, args.target_recall) == (3.0, 2, 0.9)
    assert args.medix == {"filter": "knn"}
    again = OODTrainingArguments.from_dict(json.loads(json.dumps(args.to_dict())))
    assert again.to_dict() == args.to_dict()
    one = OODTrainer(trained(), args, wild_dataset=DATA["wild"])
    assert (one.medix.filter, one.ood_weight) == ("knn", 3.0)
