"""TCCM inside transformers: the auto classes, `pipeline`, `Trainer`, every dtype of `from_pretrained`."""

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, Trainer, TrainingArguments, pipeline
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY

from hf_ext.pipelines import hosts
from hf_ext.pipelines.tables import TableFeatureExtractor
from hf_ext.pipelines.tccm import MODEL_TYPE, TCCMConfig, TCCMModel
from hf_ext.pipelines.tccm_pipeline import TASK, TabularAnomalyPipeline, TCCMPipeline


SMALL = {"members": 2, "hidden_size": 16, "steps": 20, "batch_size": 64}


@pytest.fixture
def registered():
    hosts.register_models()
    yield
    hosts.unregister_models()


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(150, 3, generator=generator, dtype=torch.float64)
    return found * torch.tensor([3600.0, 1.0, 0.01]) + torch.tensor([1.7e9, 0.0, 5.0])


@pytest.fixture(scope="module")
def fitted(rows):
    return TCCMModel(TCCMConfig(feature_size=3, **SMALL)).eval().fit(rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("detector")
    draw = np.random.default_rng(0)
    table = {"a": draw.normal(size=100), "city": draw.choice(["Rome", "Oslo"], 100)}
    TCCMPipeline(TCCMConfig(**SMALL)).fit(table, progress=False).save_pretrained(path)
    return path


def _tables():
    return (
        dict(CONFIG_MAPPING._extra_content),
        dict(MODEL_MAPPING._extra_content),
        dict(FEATURE_EXTRACTOR_MAPPING._extra_content),
        dict(PIPELINE_REGISTRY.supported_tasks),
    )


def _same(before, after):
    return all(
        one.keys() == other.keys() and all(one[key] is other[key] for key in one) for one, other in zip(before, after)
    )


# Registration


def test_registration_is_undone_and_repeating_it_changes_nothing():
    hosts.unregister_models()
    before = _tables()
    try:
        hosts.register_models()
        once = _tables()
        assert not _same(before, once)
        hosts.register_models()
        assert _same(once, _tables())
    finally:
        hosts.unregister_models()
    assert _same(before, _tables())
    hosts.unregister_models()
    assert _same(before, _tables())


def test_what_was_registered_by_others_comes_back():
    class Other:
        pass

    hosts.unregister_models()
    task = {"impl": Other, "pt": (), "default": {}, "type": "text"}
    CONFIG_MAPPING._extra_content[MODEL_TYPE], PIPELINE_REGISTRY.supported_tasks[TASK] = Other, task
    try:
        hosts.register_models()
        assert CONFIG_MAPPING[MODEL_TYPE] is TCCMConfig
        hosts.unregister_models()
        assert CONFIG_MAPPING._extra_content[MODEL_TYPE] is Other
        assert PIPELINE_REGISTRY.supported_tasks[TASK] is task
    finally:
        del CONFIG_MAPPING._extra_content[MODEL_TYPE], PIPELINE_REGISTRY.supported_tasks[TASK]


# Saving and loading


def test_auto_classes_open_a_saved_detector_bit_for_bit(registered, tmp_path, rows, fitted):
    fitted.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is TCCMConfig
    for again in (AutoModel.from_pretrained(tmp_path), TCCMModel.from_pretrained(tmp_path)):
        assert type(again) is TCCMModel
        assert again.state_dict().keys() == fitted.state_dict().keys()
        for name, tensor in fitted.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
            assert again.state_dict()[name].dtype == tensor.dtype, name
        assert torch.equal(again.score(rows), fitted.score(rows))
        assert not again.training


@pytest.mark.parametrize("dtype", ["auto", torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_no_dtype_of_loading_changes_a_score(tmp_path, rows, fitted, dtype):
    fitted.save_pretrained(tmp_path)
    again = TCCMModel.from_pretrained(tmp_path, dtype=dtype)
    assert torch.equal(again.score(rows), fitted.score(rows))


def test_calibration_and_counts_survive_a_file(tmp_path, rows, fitted):
    model = TCCMModel(TCCMConfig(feature_size=3, **SMALL)).eval().fit(rows[:100]).calibrate(rows[100:])
    model.save_pretrained(tmp_path)
    again = TCCMModel.from_pretrained(tmp_path)
    scores = model.score(rows)
    assert torch.equal(again.p_values(scores), model.p_values(scores))
    assert torch.equal(again.threshold, model.threshold)
    assert torch.equal(again.partial_fit(rows).score(rows), model.partial_fit(rows).score(rows))


@pytest.mark.parametrize(
    "settings",
    [{"mode": "paper", "epochs": 3}, {"mode": "paper", "steps": 0, "members": 3}, {"time_embedding": "none"}],
    ids=str,
)
def test_settings_survive_a_file(tmp_path, rows, settings):
    model = TCCMModel(TCCMConfig(feature_size=3, hidden_size=8, **settings)).eval().fit(rows)
    model.save_pretrained(tmp_path)
    again = TCCMModel.from_pretrained(tmp_path)
    for name in (
        "mode",
        "epochs",
        "steps",
        "members",
        "time_embedding",
        "neighbors",
        "residual_weight",
        "num_references",
    ):
        assert getattr(again.config, name) == getattr(model.config, name), name
    assert torch.equal(again.score(rows), model.score(rows))
    assert torch.equal(again.fit(rows).score(rows), model.score(rows))


def test_a_new_model_has_a_start_of_its_own_seed():
    one, two, other = (TCCMModel(TCCMConfig(feature_size=40, seed=seed)) for seed in (0, 0, 1))
    assert all(torch.isfinite(p).all() and p.abs().max() < 1 for p in one.parameters())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert not torch.equal(one.net.weights[0], other.net.weights[0])


# The task


def test_the_task_opens_a_folder_and_scores_as_its_pipeline(registered, folder):
    task = pipeline(TASK, model=str(folder), device="cpu")
    assert type(task) is TabularAnomalyPipeline
    assert type(task.feature_extractor) is TableFeatureExtractor
    assert type(AutoFeatureExtractor.from_pretrained(folder)) is TableFeatureExtractor
    rows = [{"a": 0.1, "city": "Rome"}, {"a": 9.0, "city": "Oslo"}, {"a": -0.2, "city": "Lima"}]
    expected = TCCMPipeline.from_pretrained(folder)
    assert [one["score"] for one in task(rows, batch_size=2)] == expected.score(rows).tolist()
    assert task(rows[0], explain=True)["parts"].keys() == {"a", "city"}


def test_the_task_is_saved_with_all_it_needs_and_no_code(registered, folder, tmp_path):
    task = pipeline(TASK, model=str(folder), device="cpu")
    task.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    row = {"a": 0.1, "city": "Rome"}
    assert pipeline(TASK, model=str(tmp_path), device="cpu")(row) == task(row)
    assert TCCMPipeline.from_pretrained(tmp_path).score([row])[0] == task(row)["score"]


def test_without_registration_the_task_is_unknown(folder):
    hosts.unregister_models()
    with pytest.raises(ValueError, match="does not recognize this architecture"):
        pipeline(TASK, model=str(folder))


# Trainer


def test_trainer_trains_the_networks_on_a_column_of_features(tmp_path):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(256, 4, generator=generator)
    data = datasets.Dataset.from_dict({"features": features.tolist()}).with_format("torch")
    model = TCCMModel(TCCMConfig(feature_size=4, members=2, hidden_size=128))
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=20,
        per_device_train_batch_size=64,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 20
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
    assert not any(torch.equal(parameter, start[name]) for name, parameter in model.named_parameters())
    predicted = trainer.predict(data).predictions
    np.testing.assert_allclose(predicted, model.eval().score(features).numpy(), rtol=1e-5)
    trainer.save_model(str(tmp_path / "saved"))
    assert torch.equal(TCCMModel.from_pretrained(tmp_path / "saved").score(features), model.score(features))
