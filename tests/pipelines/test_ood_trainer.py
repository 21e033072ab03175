"""`OODTrainer` through the front door: the loss is equation 5, rows are chosen once, resuming is exact, errors are typed."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    TrainingArguments,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

from hf_ext.errors import DataError
from hf_ext.pipelines import medix
from hf_ext.pipelines.medix import MedixConfig
from hf_ext.pipelines.ood_features import OutlierOrder
from hf_ext.pipelines.ood_model import OODConfig, OODModel, ood_loss
from hf_ext.pipelines.ood_trainer import SELECTION_NAME, OODTrainer, OODTrainingArguments
from tests.pipelines.test_ood_features import SMALL, SOUND, TEXT, classifier


WIDTH, CLASSES = 8, 3
KINDS = 120, 60  # in- and out-of-distribution rows among the wild


def clouds(n, generator):
    """Three classes of feature vectors."""
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(7)) * 2
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    return centres[labels] + torch.randn(n, WIDTH, generator=generator) * 0.5, labels


def far(n, generator):
    return 4 + torch.randn(n, WIDTH, generator=generator) * 0.5


def table(features, labels=None, **columns):
    columns = {"features": features.tolist(), **({} if labels is None else {"labels": labels.tolist()}), **columns}
    return Dataset.from_dict(columns).with_format("torch")


def data(seed=0):
    """Labelled rows, wild rows and which of them are out-of-distribution, rows for evaluation of both kinds."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(sum(KINDS), generator=generator)
    wild = torch.cat([clouds(KINDS[0], generator)[0], far(KINDS[1], generator)])[order]
    return {
        "train": table(*clouds(160, generator)),
        "wild": table(wild),
        "is_ood": order >= KINDS[0],
        "eval": table(*clouds(90, generator)),
        "eval_ood": table(far(50, generator)),
    }


def trained(dropout=0.2):
    """A classifier on feature vectors that knows the three classes."""
    torch.manual_seed(0)
    model = OODModel(OODConfig(feature_size=WIDTH, num_labels=CLASSES, hidden_size=16, dropout=dropout))
    x, labels = clouds(300, torch.Generator().manual_seed(11))
    optimizer = torch.optim.Adam(model.classifier.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        model(x, labels=labels).loss.backward()
        optimizer.step()
    return model


DATA = data()


def make(folder, model=None, args=None, **settings):
    arguments = {
        "output_dir": str(folder),
        "max_steps": 20,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        **(args or {}),
    }
    known = {"train_dataset": DATA["train"], "wild_dataset": DATA["wild"], **settings}
    if model is None and "model_init" not in known:
        model = trained()
    return OODTrainer(model, OODTrainingArguments(**arguments), **known)


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return [name for name in one if not torch.equal(one[name], other[name])] == []


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    logging.getLogger("transformers").setLevel(logging.ERROR)


def oracle():
    return DATA["is_ood"].nonzero().flatten().tolist()


def test_with_the_true_rows_the_loss_falls_accuracy_stays_and_far_rows_are_told(tmp_path):
    one = make(
        tmp_path,
        args={"max_steps": 60},
        outliers=oracle(),
        eval_dataset=DATA["eval"],
        eval_wild_dataset=DATA["eval_ood"],
    )
    before, start = weights(one.model), one.evaluate()
    assert start["eval_auroc"] == 0.5
    one.train()
    found = losses(one)
    assert sum(found[-10:]) / 10 < 0.2 * found[0], found
    end = one.evaluate()
    assert end["eval_accuracy"] >= start["eval_accuracy"] - 0.02
    assert end["eval_accuracy"] > 0.9
    assert end["eval_auroc"] > 0.99
    after = weights(one.model)
    assert not [name for name in after if torch.equal(after[name], before[name])]


def test_with_the_default_filter_nothing_needs_to_be_known(tmp_path):
    one = make(tmp_path, args={"max_steps": 60}, eval_dataset=DATA["eval"], eval_wild_dataset=DATA["eval_ood"])
    one.train()
    chosen = torch.zeros(sum(KINDS), dtype=torch.bool)
    chosen[one.outliers_] = True
    recall = (chosen & DATA["is_ood"]).sum() / DATA["is_ood"].sum()
    assert recall > 0.9
    assert 0.2 < one.prevalence_ < 0.5
    assert one.evaluate()["eval_auroc"] > 0.99


def test_without_a_weight_the_head_stays_untrained_and_no_wild_row_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(medix.MedixFilter, "select", None)
    one = make(
        tmp_path,
        args={"ood_weight": 0.0, "weight_decay": 0.1},
        wild_dataset=None,
        eval_dataset=DATA["eval"],
        eval_wild_dataset=DATA["eval_ood"],
    )
    before = weights(one.model)
    one.train()
    assert not one.model.ood_head.weight.any()
    assert not one.model.ood_head.bias.any()
    assert not torch.equal(one.model.classifier.output.weight, before["classifier.output.weight"])
    assert one.outliers_ is None
    assert one.model.config.ood_threshold is None
    assert one.evaluate()["eval_auroc"] == 0.5


def test_every_step_has_the_chosen_rows_the_seed_names_beside_the_labelled_ones(tmp_path):
    seen = []
    one = make(tmp_path, trained(0.0), {"max_steps": 12, "outliers_per_row": 2, "seed": 3}, outliers=oracle())
    one.model.register_forward_pre_hook(
        lambda model, _, given: seen.append(given["features"]) if model.training else None, with_kwargs=True
    )
    one.train()
    chosen, known = DATA["wild"]["features"][:][oracle()], DATA["train"]["features"][:].tolist()
    assert len(seen) == 12
    for rows, places in zip(seen, OutlierOrder(KINDS[1], 32, 3), strict=False):
        assert rows.shape == (48, WIDTH)
        assert all(row in known for row in rows[:16].tolist())
        assert torch.equal(rows[16:], chosen[places])
    output = trained(0.0)(features=seen[0])
    labels = DATA["train"]["labels"][:][[known.index(row) for row in seen[0][:16].tolist()]]
    labels, kinds = torch.cat([labels, torch.full((32,), -100)]), torch.arange(48) >= 16
    assert losses(one)[0] == pytest.approx(ood_loss(output.logits, output.ood_logit, labels, kinds).item(), abs=1e-5)


ONE_STEP = {
    "optim": "sgd",
    "max_steps": 1,
    "max_grad_norm": 0.0,
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "target_recall": None,
}


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation"),
    [(16, 4, 4), (10, 4, 3)],
    ids=["whole batches", "a short last batch"],
)
def test_accumulated_batches_step_as_one_large_batch(tmp_path, rows, batch, accumulation):
    settings = {
        "outliers": oracle(),
        "train_dataset": DATA["train"].select(range(rows)),
    }
    args = {
        "optim": "sgd",
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
    }
    whole = make(tmp_path, trained(0.0), {**args, "per_device_train_batch_size": rows}, **settings)
    parts = make(
        tmp_path,
        trained(0.0),
        {**ONE_STEP, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation},
        **settings,
    )
    before = weights(whole.model)
    for one in (whole, parts):
        one.train()
    assert losses(whole)[0] == pytest.approx(losses(parts)[0], abs=1e-5)
    expected = weights(whole.model)
    for name, found in weights(parts.model).items():
        # From zero, as many rows of either kind pull the bias as hard.
        assert not torch.equal(expected[name], before[name]) or name == "ood_head.bias"
        torch.testing.assert_close(found, expected[name], atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_resuming_half_way_equals_a_run_without_a_break(tmp_path, monkeypatch, accumulation, stream):
    wild = DATA["wild"].to_iterable_dataset().with_format("torch") if stream else DATA["wild"]
    args = {"save_strategy": "steps", "save_steps": 7, "gradient_accumulation_steps": accumulation}
    whole = make(tmp_path / "whole", args=args, wild_dataset=wild)
    whole.train()
    monkeypatch.setattr(medix.MedixFilter, "select", None)
    resumed = make(tmp_path / "resumed", args=args, wild_dataset=wild)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-7"))
    assert same(weights(resumed.model), weights(whole.model))
    assert torch.equal(resumed.outliers_, whole.outliers_)
    assert resumed.prevalence_ == whole.prevalence_
    assert losses(resumed) == losses(whole)
    selected = [entry for entry in resumed.state.log_history if "ood_outliers" in entry]
    assert len(selected) == 1
    assert selected[0]["ood_outliers"] == len(whole.outliers_)
    assert selected[0]["ood_wild_rows"] == sum(KINDS)
    kept = json.loads((tmp_path / "whole" / "checkpoint-7" / SELECTION_NAME).read_text())
    assert kept["batches"] == 7 * accumulation
    assert kept["outliers"] == whole.outliers_.tolist()


def test_resuming_from_the_last_checkpoint_by_true(tmp_path):
    args = {"save_strategy": "steps", "save_steps": 10}
    whole = make(tmp_path, args=args)
    whole.train()
    resumed = make(tmp_path, args={**args, "max_steps": 20})
    (tmp_path / "checkpoint-20").rename(tmp_path / "kept")
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed.model), weights(whole.model))


def test_a_filter_leaves_no_trace_in_the_training(tmp_path):
    filtered = make(tmp_path)
    filtered.train()
    given = make(tmp_path, outliers=filtered.outliers_.tolist())
    given.train()
    assert same(weights(given.model), weights(filtered.model))
    again = make(tmp_path)
    again.train()
    assert same(weights(again.model), weights(filtered.model))
    other = make(tmp_path, args={"data_seed": 5})
    other.train()
    assert not same(weights(other.model), weights(filtered.model))


@pytest.mark.parametrize("name", ["medix", "sal", "grad_dist", "knn", "all", "random", "two_pass"])
@pytest.mark.parametrize("gradient", ["feature", "weight"])
def test_every_filter_runs_and_sees_true_features(tmp_path, name, gradient, monkeypatch):
    seen = {}
    reference = medix.MedixFilter.reference

    def watch(self, features, labels, *rest):
        seen.update(features=features, labels=labels, rest=rest)
        return reference(self, features, labels, *rest)

    monkeypatch.setattr(medix.MedixFilter, "reference", watch)
    config = MedixConfig(filter=name, gradient=gradient, prevalence=1 / 3)
    one = make(tmp_path, args={"max_steps": 1, "target_recall": None}, medix=config)
    model = one.model
    with torch.no_grad():
        model.eval()
        expected = model(features=DATA["train"]["features"][:], output_features=True).features
        model.train()
    one.train()
    torch.testing.assert_close(seen["features"], expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(seen["labels"], DATA["train"]["labels"][:])
    assert len(one.outliers_) == (sum(KINDS) if name == "all" else KINDS[1]) or name == "medix"
    assert (seen["rest"][0] is not None) == (name in medix.GRADIENT_FILTERS)


def test_the_papers_gradient_reaches_the_filter(tmp_path):
    generator = torch.Generator().manual_seed(0)

    def images(n, shift, **columns):
        pixels = torch.randn(n, 1, 32, 32, generator=generator) + shift
        return Dataset.from_dict({"pixel_values": pixels.tolist(), **columns}).with_format("torch")

    train = images(24, 0.0, labels=[i % 3 for i in range(24)])
    wild = images(16, 0.0)
    one = make(
        tmp_path,
        classifier("resnet"),
        {"max_steps": 2, "per_device_train_batch_size": 4, "medix": {"filter": "medix", "gradient": "bn_bias"}},
        train_dataset=train,
        wild_dataset=wild,
    )
    one.train()
    assert 0 < len(one.outliers_) <= 16
    assert type(one.model) is OODModel


def texts(n, words, generator, labelled=False):
    rows = []
    for i in range(n):
        length = int(torch.randint(3, 9, (1,), generator=generator))
        label = i % CLASSES
        low, high = words if not labelled else (3 + 10 * label, 13 + 10 * label)
        ids = torch.randint(low, high, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * length, **({"label": label} if labelled else {})})
    return rows


def test_texts_of_unequal_length_train_and_their_own_features_choose(tmp_path):
    from tests.pipelines.test_ood_pipeline import tokenizer

    generator = torch.Generator().manual_seed(0)
    train = Dataset.from_list(texts(60, (3, 33), generator, labelled=True))
    wild = Dataset.from_list(texts(30, (3, 33), generator) + texts(30, (50, 64), generator))
    # What a data set of logged inputs holds beside: kept out.
    wild = wild.add_column("text", ["x"] * 60).add_column("label", ["unknown"] * 60).add_column("is_ood", [9] * 60)
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SMALL, **TEXT))
    args = {"max_steps": 30, "learning_rate": 3e-3, "per_device_train_batch_size": 8}
    one = make(tmp_path, model, args, train_dataset=train, wild_dataset=wild, processing_class=tokenizer())
    one.train()
    share = (one.outliers_ >= 30).float().mean()
    assert share > 0.6, one.outliers_
    assert losses(one)[-1] < 0.6 * losses(one)[0]
    assert one.model.classifier is model


def test_sounds_of_unequal_length_run_one_kind_after_the_other(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("hf_ext.log._seen", set())

    def sounds(n, length, **columns):
        return Dataset.from_dict({"input_values": torch.randn(n, length).tolist(), **columns}).with_format("torch")

    torch.manual_seed(0)
    model = Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**SMALL, **SOUND))
    one = make(
        tmp_path,
        model,
        {"max_steps": 2, "per_device_train_batch_size": 4},
        train_dataset=sounds(8, 400, labels=[i % 3 for i in range(8)]),
        wild_dataset=sounds(8, 500),
        outliers=[1, 3, 5],
    )
    one.train()
    assert len(losses(one)) == 2
    assert any("run one by one" in message for message in caplog.messages)


@pytest.mark.parametrize("rows", [50, 1000])
def test_a_stream_is_sampled_within_its_bound(tmp_path, rows):
    stream = DATA["wild"].to_iterable_dataset()
    one = make(tmp_path, args={"max_steps": 2}, wild_dataset=stream, medix=MedixConfig(max_wild_rows=rows))
    one.train()
    assert len(one.outliers_) <= min(rows, sum(KINDS))
    assert one._outlier_rows.total == sum(KINDS)
    chosen = DATA["wild"]["features"][:][one.outliers_]
    found = torch.stack(
        [torch.as_tensor(row["features"]) for row in one._outlier_rows.__getitems__(range(len(chosen)))]
    )
    assert torch.equal(found, chosen)
    assert DATA["is_ood"][one.outliers_].float().mean() > 0.6


def test_labelled_rows_may_be_a_stream_or_a_list(tmp_path):
    def run(**settings):
        one = make(tmp_path, args={"max_steps": 2}, **settings)
        one.train()
        return one

    whole = run()
    stream = run(train_dataset=DATA["train"].to_iterable_dataset().with_format("torch"))
    rows = run(train_dataset=list(DATA["train"]), wild_dataset=list(DATA["wild"]))
    assert torch.equal(stream.outliers_, whole.outliers_)
    assert same(weights(rows.model), weights(whole.model))


def test_rows_the_classifier_never_saw_may_be_the_reference(tmp_path, monkeypatch):
    seen = []
    reference = medix.MedixFilter.reference
    monkeypatch.setattr(
        medix.MedixFilter,
        "reference",
        lambda self, rows, *rest: (seen.append(len(rows)), reference(self, rows, *rest))[1],
    )
    make(tmp_path, args={"max_steps": 1}, reference_dataset=DATA["eval"]).train()
    assert seen == [90]


def test_evaluation_has_accuracy_loss_and_the_metrics_of_both_kinds(tmp_path):
    from hf_ext.pipelines.ood_metrics import ood_metrics

    def metrics(prediction):
        assert prediction.predictions.shape == (90, CLASSES)
        assert prediction.label_ids.shape == (90,)
        return {"mine": 1.0}

    one = make(
        tmp_path,
        outliers=oracle(),
        eval_dataset=DATA["eval"],
        eval_wild_dataset=DATA["eval_ood"],
        compute_metrics=metrics,
        args={"eval_strategy": "steps", "eval_steps": 10, "per_device_eval_batch_size": 7},
    )
    one.train()
    logged = [entry for entry in one.state.log_history if "eval_loss" in entry]
    assert len(logged) == 2
    assert {"eval_accuracy", "eval_auroc", "eval_fpr95_id_pos", "eval_mine"} <= logged[-1].keys()
    found = one.evaluate()
    model = one.model.eval()
    with torch.no_grad():
        inside = model(features=DATA["eval"]["features"][:], labels=DATA["eval"]["labels"][:])
        outside = model(features=DATA["eval_ood"]["features"][:])
    assert found["eval_accuracy"] == pytest.approx(
        (inside.logits.argmax(1) == DATA["eval"]["labels"][:]).float().mean()
    )
    assert found["eval_loss"] == pytest.approx(float(inside.loss), abs=0.05)
    scores = torch.cat([inside.ood_logit, outside.ood_logit])
    for name, value in ood_metrics(scores, torch.arange(140) >= 90).items():
        assert found[f"eval_{name}"] == pytest.approx(float(value), abs=1e-6), name
    output = one.predict(DATA["eval"])
    assert output.predictions[0].shape == (90, CLASSES)
    assert output.predictions[1].shape == (90,)
    torch.testing.assert_close(torch.tensor(output.predictions[1]), inside.ood_logit, atol=1e-5, rtol=1e-5)


def test_a_column_tells_the_kinds_of_evaluated_rows(tmp_path):
    x = torch.cat([DATA["eval"]["features"][:], DATA["eval_ood"]["features"][:]])
    kinds = [0] * 90 + [1] * 50
    # Held-out classes are no classes of the model.
    labels = torch.cat([DATA["eval"]["labels"][:], torch.full((50,), 77)])
    both = table(x, labels, is_ood=kinds)
    one = make(tmp_path, outliers=oracle(), eval_dataset=both)
    one.train()
    split = make(tmp_path, outliers=oracle(), eval_dataset=DATA["eval"], eval_wild_dataset=DATA["eval_ood"])
    split.train()
    found, expected = one.evaluate(), split.evaluate()
    assert found["eval_auroc"] == pytest.approx(expected["eval_auroc"])
    assert found["eval_accuracy"] == pytest.approx(expected["eval_accuracy"])
    unlabelled = one.evaluate(table(x, is_ood=kinds))
    assert unlabelled["eval_auroc"] == pytest.approx(expected["eval_auroc"])
    mixed = make(tmp_path, eval_dataset=DATA["eval"], eval_wild_dataset=table(x, is_ood=kinds))
    assert mixed.evaluate()["eval_auroc"] == 0.5
    assert "eval_auroc" not in make(tmp_path, eval_dataset=DATA["eval"]).evaluate()


def test_the_threshold_lets_the_asked_share_pass_and_is_saved(tmp_path):
    from hf_ext.pipelines.ood_pipeline import OODPipeline

    one = make(tmp_path / "out", outliers=oracle(), eval_dataset=DATA["eval"], args={"target_recall": 0.9})
    one.train()
    one.save_model(tmp_path / "detector")
    assert not (tmp_path / "detector" / SELECTION_NAME).exists()
    pipe = OODPipeline(model=OODModel.from_pretrained(tmp_path / "detector"), task="ood-classification")
    kept = [not row["is_ood"] for row in pipe(DATA["eval"]["features"][:].tolist(), batch_size=32)]
    assert 0.9 <= numpy.mean(kept) <= 0.92
    assert all(row["is_ood"] for row in pipe(DATA["eval_ood"]["features"][:].tolist(), batch_size=32))
    assert one.calibrate(DATA["eval"], recall=1.0) > one.calibrate(DATA["eval"], recall=0.5)
    with pytest.raises(DataError, match="no in-distribution rows"):
        one.calibrate(table(torch.randn(4, WIDTH), is_ood=[1] * 4))
    none = make(tmp_path / "none", outliers=oracle(), args={"target_recall": None, "max_steps": 1})
    none.train()
    assert none.model.config.ood_threshold is None


def test_a_search_over_settings_makes_models_with_heads(tmp_path):
    def init():
        torch.manual_seed(0)
        return BertForSequenceClassification(BertConfig(**SMALL, **TEXT))

    rows = {"input_ids": torch.randint(3, 64, (16, 5)).tolist(), "attention_mask": [[1] * 5] * 16}
    train = Dataset.from_dict({**rows, "labels": [i % 3 for i in range(16)]})
    one = make(
        tmp_path, None, {"max_steps": 1}, model_init=init, train_dataset=train, wild_dataset=Dataset.from_dict(rows)
    )
    one.train()
    assert type(one.model) is OODModel


def test_evaluation_alone_needs_no_wild_rows_and_other_arguments_keep_defaults(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
    one = OODTrainer(trained(), args, eval_dataset=DATA["eval"])
    assert one.evaluate()["eval_accuracy"] > 0.9
    assert (one.ood_weight, one.outliers_per_row, one.medix) == (10.0, 1, MedixConfig())
    with pytest.raises(DataError, match="ood_weight=10.0 needs wild_dataset="):
        one.train()


def test_training_leaves_no_stream_open_and_can_be_repeated(tmp_path, monkeypatch):
    one = make(tmp_path, args={"max_steps": 3})
    opened = []
    keep = one._open_stream
    monkeypatch.setattr(one, "_open_stream", lambda: (keep(), opened.append(one._stream_loader)))
    for _ in range(2):
        one.train()
        assert one._stream is None
        # accelerate compares loaders by identity.
        assert not [loader for loader in one.accelerator.gradient_state.dataloader_references if loader in opened]
        assert not [loader for loader in one.accelerator._dataloaders if loader in opened]
    assert len(opened) == 2


def ranks(folder):
    """What each of two processes runs."""
    args = {"max_steps": 6, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 3}
    settings = {"eval_dataset": DATA["eval"], "eval_wild_dataset": DATA["eval_ood"]}
    whole = make(folder / "whole", trained(), {**args, "ddp_backend": "gloo"}, **settings)
    whole.train()
    resumed = make(folder / "resumed", trained(), {**args, "ddp_backend": "gloo"}, **settings)
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-3"))
    step = make(folder, trained(0.0), {**ONE_STEP, "per_device_train_batch_size": 4}, outliers=oracle())
    step.train()
    return {
        "ranks": whole.args.world_size,
        "step": weights(step.accelerator.unwrap_model(step.model)),
        "outliers": whole.outliers_,
        "whole": weights(whole.accelerator.unwrap_model(whole.model)),
        "resumed": weights(resumed.accelerator.unwrap_model(resumed.model)),
        "metrics": whole.evaluate(),
        "threshold": whole.model.config.ood_threshold,
    }


@pytest.mark.slow
def test_two_processes_choose_and_train_as_one_with_their_batches_together(tmp_path):
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        __file__,
        str(tmp_path),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [torch.load(tmp_path / f"rank{i}.pt", weights_only=True) for i in range(2)]
    one = make(tmp_path / "one", trained(0.0), {**ONE_STEP, "per_device_train_batch_size": 8}, outliers=oracle())
    one.train()
    chosen = make(tmp_path / "one", args={"max_steps": 1})
    chosen.train()
    for rank in found:
        assert rank["ranks"] == 2
        assert torch.equal(rank["outliers"], chosen.outliers_)
        assert same(rank["whole"], rank["resumed"])
        assert same(rank["whole"], found[0]["whole"])
        for name, weight in weights(one.model).items():
            torch.testing.assert_close(rank["step"][name], weight, atol=1e-6, rtol=1e-5, msg=name)
        assert rank["threshold"] == found[0]["threshold"]
        assert rank["metrics"]["eval_auroc"] == found[0]["metrics"]["eval_auroc"] > 0.5


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    torch.save(ranks(target), target / f"rank{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()
