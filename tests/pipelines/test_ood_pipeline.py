"""The pipeline: one dict an input whatever the batch, from texts, images, sounds, vectors and rows; registration undone."""

import json

import numpy
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    PreTrainedTokenizerFast,
    Wav2Vec2FeatureExtractor,
    pipeline,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY

from hf_ext.errors import ConfigError, DataError, UnsupportedModelError
from hf_ext.pipelines.hosts import register_models, unregister_models
from hf_ext.pipelines.ood_model import MODEL_TYPE, OODConfig, OODModel
from hf_ext.pipelines.ood_pipeline import TASK, OODPipeline
from tests.pipelines.test_ood_features import CLASSIFIERS, classifier, inputs


WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    *"send money to my savings account how is the weather in rome today please".split(),
]
TEXT = ["send money to my account", "weather", "how is the weather in rome today please", "savings please"]


@pytest.fixture(autouse=True)
def _registered():
    register_models()
    yield
    unregister_models()


def tokenizer():
    words = {word: i for i, word in enumerate(WORDS)}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16)


def detector(name):
    model = OODModel.from_classifier(classifier(name))
    torch.manual_seed(1)
    nn.init.normal_(model.ood_head.weight)
    return model


def on_features():
    torch.manual_seed(0)
    model = OODModel(OODConfig(feature_size=4, id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1}))
    nn.init.normal_(model.ood_head.weight)
    return model


def close(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        assert a["label"] == b["label"]
        assert abs(a["score"] - b["score"]) < 1e-5
        assert abs(a["ood_score"] - b["ood_score"]) < 1e-5


def test_feature_vectors_give_label_score_and_ood_score():
    model = on_features()
    rows = torch.randn(7, 4)
    pipe = pipeline(TASK, model=model)
    assert type(pipe) is OODPipeline
    with torch.no_grad():
        output = model(rows)
    found = pipe(rows.tolist())
    for row, logits, ood_logit in zip(found, output.logits, output.ood_logit, strict=True):
        assert row.keys() == {"label", "score", "ood_score"}
        assert row["label"] == ("cat", "dog")[logits.argmax()]
        assert row["score"] == pytest.approx(logits.softmax(0).max().item(), abs=1e-6)
        assert row["ood_score"] == pytest.approx(ood_logit.sigmoid().item(), abs=1e-6)
    json.dumps(found)
    for batch_size in (2, 3, 7, 50):
        close(pipe(rows.tolist(), batch_size=batch_size), found)
    close(pipe(list(rows)), found)
    close(pipe(list(rows.numpy())), found)
    close([pipe(rows[0])], found[:1])
    close([pipe({"features": rows[0].tolist(), "labels": 3, "is_ood": 1})], found[:1])


def test_data_sets_and_generators_are_streamed():
    from datasets import Dataset

    rows = torch.randn(5, 4)
    pipe = pipeline(TASK, model=on_features())
    expected = pipe(rows.tolist())
    table = Dataset.from_dict({"features": rows.tolist(), "label": ["a"] * 5})
    close(pipe(list(table)), expected)
    close(list(pipe((row for row in rows.tolist()), batch_size=2)), expected)


def test_a_threshold_comes_from_the_config_or_the_call(tmp_path):
    model = on_features()
    rows = torch.randn(20, 4).tolist()
    pipe = pipeline(TASK, model=model)
    scores = [row["ood_score"] for row in pipe(rows)]
    middle = sorted(scores)[10]
    assert [row["is_ood"] for row in pipe(rows, threshold=middle)] == [score > middle for score in scores]
    assert all(row["is_ood"] for row in pipe(rows, threshold=0.0))
    model.config.ood_threshold = middle
    assert sum(row["is_ood"] for row in pipe(rows)) == 9
    assert not any(row["is_ood"] for row in pipe(rows, threshold=1.0))
    pipe.save_pretrained(tmp_path)
    assert sum(row["is_ood"] for row in pipeline(TASK, model=str(tmp_path))(rows)) == 9
    assert pipeline(TASK, model=model, threshold=1.0)(rows[:1])[0]["is_ood"] is False


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_prepared_rows_of_every_kind_score_alike_in_batches(name):
    pipe = pipeline(TASK, model=detector(name))
    batch = inputs(name)
    rows = [{key: value[i] for key, value in batch.items()} for i in range(4)]
    with torch.no_grad():
        expected = pipe.model(**batch).ood_logit.sigmoid()
    found = pipe(rows)
    assert [row["ood_score"] for row in found] == pytest.approx(expected.tolist(), abs=1e-6)
    close(pipe(rows, batch_size=3), found)
    assert len({row["ood_score"] for row in found}) == 4


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_texts_go_through_the_tokenizer_beside_the_model(tmp_path, name):
    model = detector(name)
    pipe = pipeline(TASK, model=model, tokenizer=tokenizer())
    found = pipe(TEXT)
    assert len({row["ood_score"] for row in found}) == 4
    close(pipe(TEXT, batch_size=4), found)
    close([pipe({"text": TEXT[0]})], found[:1])
    long = " ".join(["weather"] * 40)
    assert pipe(long) == pipe(long, max_length=16)
    assert pipe(long) != pipe(long, max_length=8)
    pipe.save_pretrained(tmp_path)
    again = pipeline(TASK, model=str(tmp_path))
    assert again.tokenizer is not None
    close(again(TEXT, batch_size=2), found)


def test_sounds_go_through_the_feature_extractor_beside_the_model(tmp_path):
    model = detector("wav2vec2")
    extractor = Wav2Vec2FeatureExtractor(feature_size=1, sampling_rate=16000, padding_value=0.0)
    pipe = pipeline(TASK, model=model, feature_extractor=extractor)
    sounds = [wave.numpy() for wave in inputs("wav2vec2")["input_values"]]
    found = pipe(sounds)
    close(pipe(sounds, batch_size=3), found)
    close([pipe({"array": sounds[1], "sampling_rate": 16000})], found[1:2])
    pipe.save_pretrained(tmp_path)
    close(pipeline(TASK, model=str(tmp_path))(sounds), found)


def test_images_go_through_the_processor_beside_the_model(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    from tests.pipelines.test_ood_features import IMAGE, SMALL

    torch.manual_seed(0)
    from transformers import ViTConfig, ViTForImageClassification

    model = OODModel.from_classifier(ViTForImageClassification(ViTConfig(**SMALL, **{**IMAGE, "num_channels": 3})))
    nn.init.normal_(model.ood_head.weight)
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    pipe = pipeline(TASK, model=model, image_processor=processor)
    pixels = numpy.random.default_rng(0).integers(0, 255, (3, 12, 12, 3), dtype=numpy.uint8)
    images = [image_module.fromarray(p) for p in pixels]
    found = pipe(images)
    assert len({row["ood_score"] for row in found}) == 3
    close(pipe(images, batch_size=2), found)
    pipe.save_pretrained(tmp_path)
    close(pipeline(TASK, model=str(tmp_path))(images), found)


def test_a_saved_pipeline_asks_nobody_to_run_code(tmp_path):
    pipe = pipeline(TASK, model=on_features())
    pipe.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert "custom_pipelines" not in json.loads((tmp_path / "config.json").read_text())
    # What stands in for a feature extractor is there still.
    assert len(pipe(torch.randn(3, 4).tolist(), batch_size=2)) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([0.1, 0.2, 0.3, 0.4], r"shape \(\); expected \(4,\).*pass \[\[...\]\] for one row"),
        ([[0.1, 0.2, 0.3]], r"shape \(3,\); expected \(4,\)"),
        (torch.zeros(2, 4), r"shape \(2, 4\).*pass list\(array\)"),
        (["weather"], "features is a str that is no tensor"),
        ([{"pixel_values": [1.0]}], "features is a dict that is no tensor"),
        ([{"features": "x"}], "features is a str"),
    ],
)
def test_inputs_that_are_no_feature_vectors_are_refused(given, message):
    with pytest.raises(DataError, match=message):
        pipeline(TASK, model=on_features())(given)


def test_what_is_missing_is_named():
    with pytest.raises(ConfigError, match="a str needs tokenizer= to become 'input_ids'"):
        pipeline(TASK, model=detector("bert"))("weather")
    with pytest.raises(ConfigError, match="needs feature_extractor= to become 'input_values'"):
        pipeline(TASK, model=detector("wav2vec2"))(numpy.zeros(400))
    with pytest.raises(ConfigError, match="needs image_processor= to become 'pixel_values'"):
        pipeline(TASK, model=detector("vit"))("cat.png")
    with pytest.raises(ConfigError, match="threshold=2 must be between 0 and 1"):
        pipeline(TASK, model=on_features())([[0.0] * 4], threshold=2)
    with pytest.raises(ConfigError, match="no setting 'top_k' for a model that reads 'features'"):
        pipeline(TASK, model=on_features())([[0.0] * 4], top_k=2)
    with pytest.raises(UnsupportedModelError, match="needs an OODModel and got BertForSequenceClassification"):
        OODPipeline(model=classifier("bert"), task=TASK)


def test_a_model_in_train_mode_scores_as_in_eval_mode():
    model = detector("bert")
    expected = pipeline(TASK, model=model, tokenizer=tokenizer())(TEXT)
    model.train()
    assert pipeline(TASK, model=model, tokenizer=tokenizer())(TEXT) == expected


def tables():
    return (
        dict(CONFIG_MAPPING._extra_content),
        dict(MODEL_MAPPING._extra_content),
        dict(PIPELINE_REGISTRY.supported_tasks),
    )


def test_registration_is_idempotent_and_undone_to_the_same_objects(tmp_path):
    on_features().save_pretrained(tmp_path)
    unregister_models()
    before = tables()
    assert TASK not in before[2]
    unregister_models()
    register_models()
    register_models()
    after = tables()
    assert [len(a) - len(b) for a, b in zip(after, before, strict=True)] == [2, 2, 2]  # the tabular model comes along
    assert type(AutoConfig.from_pretrained(tmp_path)) is OODConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is OODModel
    assert "_registered_impl" not in vars(OODPipeline)
    unregister_models()
    assert tables() == before
    for one, other in zip(tables(), before, strict=True):
        assert all(one[key] is other[key] for key in other)
    with pytest.raises(ValueError, match=MODEL_TYPE):
        AutoModel.from_pretrained(tmp_path)
    with pytest.raises(KeyError, match=TASK):
        pipeline(TASK, model=str(tmp_path), config=OODConfig.from_pretrained(tmp_path))
    # Without registration the class itself opens it.
    assert type(OODModel.from_pretrained(tmp_path)) is OODModel


def test_what_another_library_registered_comes_back():
    class Other(OODConfig):
        pass

    unregister_models()
    AutoConfig.register(MODEL_TYPE, Other)
    try:
        register_models()
        assert CONFIG_MAPPING[MODEL_TYPE] is OODConfig
        unregister_models()
        assert CONFIG_MAPPING[MODEL_TYPE] is Other
    finally:
        CONFIG_MAPPING._extra_content.pop(MODEL_TYPE)


def test_a_registration_that_fails_half_way_leaves_nothing(monkeypatch):
    unregister_models()
    before = tables()

    def fail(*args, **kwargs):
        raise RuntimeError("no")

    monkeypatch.setattr(PIPELINE_REGISTRY, "register_pipeline", fail)
    with pytest.raises(RuntimeError, match="no"):
        register_models()
    assert tables() == before
