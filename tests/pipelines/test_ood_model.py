"""`OODModel`: the classifier is untouched, the head rides along, and a folder gives back every bit."""

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
)

from hf_ext.errors import ConfigError, DataError, UnsupportedModelError
from hf_ext.pipelines.hosts import register_models, unregister_models
from hf_ext.pipelines.ood_features import collect
from hf_ext.pipelines.ood_model import OODConfig, OODModel, OODOutput, ood_loss
from tests.pipelines.test_ood_features import CLASSES, CLASSIFIERS, IMAGE, SMALL, TEXT, classifier, inputs


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def with_head(name):
    """`OODModel` of `classifier(name)` with a head that is not zero."""
    model = OODModel.from_classifier(classifier(name))
    torch.manual_seed(1)
    nn.init.normal_(model.ood_head.weight)
    nn.init.normal_(model.ood_head.bias)
    return model


def on_features(**settings):
    torch.manual_seed(0)
    model = OODModel(OODConfig(**{"feature_size": 5, "num_labels": CLASSES, "hidden_size": 8, **settings})).eval()
    nn.init.normal_(model.ood_head.weight)
    return model


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_head_leaves_the_classifier_as_it_was(name):
    model = classifier(name)
    before, batch = weights(model), inputs(name)
    attention = model.config._attn_implementation
    with torch.no_grad():
        expected = model(**batch).logits
        wrapped = OODModel.from_classifier(model)
        output = wrapped(**batch, output_features=True)
    assert same(weights(model), before)
    assert wrapped.classifier is model
    assert model.config._attn_implementation == attention
    assert torch.equal(output.logits, expected)
    assert isinstance(output, OODOutput)
    assert output.ood_logit.shape == (4,)
    # An untrained head ranks nothing.
    assert torch.equal(output.ood_logit, torch.zeros(4))
    assert torch.equal(wrapped.head(output.features), expected) or name in ("llama", "gpt2")
    assert output.loss is None
    assert not wrapped.training


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_head_reads_what_the_last_layer_reads(name):
    wrapped = with_head(name)
    with torch.no_grad():
        output = wrapped(**inputs(name), output_features=True)
        torch.testing.assert_close(wrapped.ood_head(output.features)[:, 0], output.ood_logit, atol=0, rtol=0)
    found = collect(wrapped, [inputs(name)])
    bare = collect(wrapped.classifier, [inputs(name)])
    assert torch.equal(found.features, bare.features)
    assert torch.equal(found.logits, bare.logits)
    assert output.features.std() > 0


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("through", ["OODModel", "AutoModel"])
def test_a_folder_gives_back_every_bit(tmp_path, name, through):
    wrapped = with_head(name)
    wrapped.config.ood_threshold = 0.25
    wrapped.save_pretrained(tmp_path)
    register_models()
    try:
        cls = OODModel if through == "OODModel" else AutoModel
        again, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    finally:
        unregister_models()
    assert type(again) is OODModel
    assert not any(info.values()), info
    assert same(weights(again), weights(wrapped))
    batch = inputs(name)
    with torch.no_grad():
        one, other = wrapped(**batch), again(**batch)
    assert torch.equal(one.logits, other.logits)
    assert torch.equal(one.ood_logit, other.ood_logit)
    assert again.config.ood_threshold == 0.25
    assert again.config.classifier_class == type(wrapped.classifier).__name__
    assert again.config.classifier.to_diff_dict().keys() == wrapped.config.classifier.to_diff_dict().keys()
    again.save_pretrained(tmp_path / "twice")
    first, second = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "twice" / "model.safetensors")
    assert same(first, second)
    assert (tmp_path / "config.json").read_text() == (tmp_path / "twice" / "config.json").read_text()


@pytest.mark.parametrize("hidden_size", [None, 8])
def test_a_model_on_features_comes_back_and_is_torchs_own_draw(tmp_path, hidden_size):
    torch.manual_seed(3)
    model = OODModel(OODConfig(feature_size=5, num_labels=CLASSES, hidden_size=hidden_size)).eval()
    # transformers' own draw has a spread of 0.02.
    assert model.classifier.output.weight.std() > 0.1
    nn.init.normal_(model.ood_head.weight)
    model.save_pretrained(tmp_path)
    again = OODModel.from_pretrained(tmp_path)
    assert same(weights(again), weights(model))
    x = torch.randn(6, 5)
    assert torch.equal(again(x).ood_logit, model(features=x).ood_logit)
    assert again.config.hidden_size == hidden_size
    assert again.main_input_name == "features"


def test_layers_put_in_by_hand_are_not_drawn_anew():
    model = classifier("bert")
    model.classifier = nn.Linear(32, CLASSES)
    model.bert.encoder.layer[0].output.dense = nn.Linear(32, 32)
    before = weights(model)
    assert same(weights(OODModel.from_classifier(model).classifier), before)


@pytest.mark.parametrize("mode", [True, False])
def test_a_head_leaves_every_mode_as_it_was(mode):
    model = classifier("resnet").train(mode)
    model.resnet.encoder.train(not mode)
    before = {name: module.training for name, module in model.named_modules()}
    wrapped = OODModel.from_classifier(model)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert wrapped.training is wrapped.ood_head.training is mode


def test_a_config_alone_builds_a_classifier_of_its_kind():
    model = OODModel(OODConfig(classifier=BertConfig(**SMALL, **TEXT)))
    assert type(model.classifier) is BertForSequenceClassification
    assert model.config.classifier_class == "BertForSequenceClassification"
    assert model.config.head_module == "classifier"


def test_a_missing_head_starts_at_zero(tmp_path):
    wrapped = with_head("vit")
    tensors = {name: t for name, t in wrapped.state_dict().items() if "ood_head" not in name}
    wrapped.save_pretrained(tmp_path, state_dict=tensors)
    again, info = OODModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"ood_head.weight", "ood_head.bias"}
    assert not again.ood_head.weight.any()
    assert not again.ood_head.bias.any()
    assert same(weights(again.classifier), weights(wrapped.classifier))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_head_has_the_type_of_the_classifier(tmp_path, dtype):
    model = classifier("vit").to(dtype)
    wrapped = OODModel.from_classifier(model)
    assert wrapped.dtype == wrapped.ood_head.weight.dtype == dtype
    nn.init.normal_(wrapped.ood_head.weight)
    images = inputs("vit")["pixel_values"].to(dtype)
    output = wrapped(pixel_values=images, labels=torch.tensor([0, 1, 2, 0]))
    assert output.ood_logit.dtype == dtype
    assert output.loss.dtype == torch.float32
    wrapped.save_pretrained(tmp_path)
    again = OODModel.from_pretrained(tmp_path, dtype="auto")
    assert again.dtype == again.ood_head.weight.dtype == dtype
    assert same(weights(again), weights(wrapped))
    assert OODModel.from_pretrained(tmp_path, dtype=torch.float32).ood_head.weight.dtype == torch.float32


def test_tied_weights_stay_tied(tmp_path):
    class Tied(BertForSequenceClassification):
        config_class = BertConfig
        _tied_weights_keys = {"twin.weight": "bert.embeddings.word_embeddings.weight"}

        def __init__(self, config):
            super().__init__(config)

        def post_init(self):
            # The parent calls it, before a child could add the layer.
            self.twin = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
            super().post_init()

    AutoModelForSequenceClassification.register(BertConfig, Tied, exist_ok=True)
    try:
        wrapped = OODModel.from_classifier(Tied(BertConfig(**SMALL, **TEXT, tie_word_embeddings=True)))
        embeddings = wrapped.get_input_embeddings()
        assert wrapped.classifier.twin.weight is embeddings.weight
        wrapped.save_pretrained(tmp_path)
        assert "classifier.twin.weight" not in load_file(tmp_path / "model.safetensors")
        again = OODModel.from_pretrained(tmp_path)
        assert type(again.classifier) is Tied
        assert again.classifier.twin.weight is again.get_input_embeddings().weight
        assert same(weights(again), weights(wrapped))
    finally:
        AutoModelForSequenceClassification._model_mapping._extra_content.pop(BertConfig)
    with pytest.raises(UnsupportedModelError, match="'Tied' is no classifier of BertConfig.*it knows BertForSequ"):
        OODModel.from_pretrained(tmp_path)


def test_a_class_of_ones_own_must_be_registered():
    class Own(BertForSequenceClassification):
        pass

    with pytest.raises(UnsupportedModelError, match="AutoModelForSequenceClassification.register"):
        OODModel.from_classifier(Own(BertConfig(**SMALL, **TEXT)))


def test_a_config_names_no_class_but_those_of_its_kind(tmp_path):
    wrapped = with_head("vit")
    wrapped.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    for name in ("BertModel", "AutoModel", "Trainer", "__name__"):
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "classifier_class": name}))
        with pytest.raises(UnsupportedModelError, match=f"classifier_class='{name}' is no classifier of ViTConfig"):
            OODModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["bert", "llama", "vit", "wav2vec2"])
def test_activation_checkpointing_reaches_the_classifier_and_changes_no_gradient(name):
    plain, checkpointed = (with_head(name) for _ in range(2))
    checkpointed.activation_checkpointing_enable()
    assert any(getattr(module, "gradient_checkpointing", False) for module in checkpointed.classifier.modules())
    labels, kinds = torch.tensor([0, 1, 2, -100]), torch.tensor([0, 0, 0, 1])
    for model in (plain, checkpointed):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "layerdrop"):
                module.layerdrop = 0.0
        torch.manual_seed(0)
        model(**inputs(name), labels=labels, is_ood=kinds).loss.backward()
    for (key, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-4, msg=key)
    with pytest.raises(ValueError, match="gradient checkpointing|activation checkpointing"):
        on_features().activation_checkpointing_enable()


def test_attention_is_chosen_for_the_classifier(tmp_path):
    wrapped = with_head("bert")
    wrapped.save_pretrained(tmp_path)
    eager = OODModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert eager.classifier.config._attn_implementation == "eager"
    assert OODModel.from_pretrained(tmp_path).classifier.config._attn_implementation == "sdpa"
    wrapped.set_attn_implementation("eager")
    assert wrapped.classifier.config._attn_implementation == "eager"


def test_special_tokens_and_embeddings_are_the_classifiers():
    wrapped = with_head("llama")
    assert wrapped.config.get_text_config() is wrapped.classifier.config
    wrapped.resize_token_embeddings(70)
    assert wrapped.classifier.config.vocab_size == 70
    assert wrapped.get_input_embeddings().num_embeddings == 70
    embeds = torch.randn(2, 6, 32)
    assert wrapped(inputs_embeds=embeds).ood_logit.shape == (2,)
    with pytest.raises(UnsupportedModelError, match="no input embeddings"):
        on_features().get_input_embeddings()


@pytest.mark.parametrize("name", ["llama", "resnet"])
def test_copies_and_pickles_score_alike_and_hold_no_hook(name):
    wrapped = with_head(name)
    with torch.no_grad():
        expected = wrapped(**inputs(name)).ood_logit
        for twin in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
            assert torch.equal(twin(**inputs(name)).ood_logit, expected)
    assert not any(module._forward_hooks for module in wrapped.modules())


def test_outputs_come_as_tuples_when_asked():
    model = on_features()
    x, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    loss, logits, ood_logit = model(x, labels=labels, return_dict=False)
    output = model(x, labels=labels)
    assert torch.equal(loss, output.loss)
    assert torch.equal(logits, output.logits)
    assert torch.equal(ood_logit, output.ood_logit)


def test_the_loss_is_that_of_equation_5():
    torch.manual_seed(0)
    logits, g = torch.randn(6, CLASSES), torch.randn(6)
    labels = torch.tensor([0, 2, 1, -100, -100, 1])
    kinds = torch.tensor([0, 0, 0, 1, 1, 1])
    expected = F.cross_entropy(logits[:3], labels[:3])
    expected = expected + 7.0 * F.binary_cross_entropy_with_logits(g, kinds.float())
    # The label of a row that is out-of-distribution says nothing.
    torch.testing.assert_close(ood_loss(logits, g, labels, kinds, 7.0), expected)
    torch.testing.assert_close(ood_loss(logits, g, labels, kinds.bool(), 7.0), expected)
    torch.testing.assert_close(ood_loss(logits, g, labels), F.cross_entropy(logits, labels, ignore_index=-100))
    factors = [1.0, 3.0, 0.5]
    weighted = F.cross_entropy(logits[:3], labels[:3], torch.tensor(factors), reduction="sum") / 3
    torch.testing.assert_close(ood_loss(logits[:3], g[:3], labels[:3], class_weights=factors), weighted)
    smooth = F.cross_entropy(logits[:3], labels[:3], label_smoothing=0.1)
    torch.testing.assert_close(ood_loss(logits[:3], g[:3], labels[:3], label_smoothing=0.1), smooth)
    parts = [ood_loss(logits[i::2], g[i::2], labels[i::2], kinds[i::2], 7.0, in_rows=3, all_rows=6) for i in (0, 1)]
    torch.testing.assert_close(sum(parts), expected)
    assert ood_loss(logits[3:5], g[3:5], labels[3:5], kinds[3:5], 0.0) == 0


def test_the_model_has_that_loss_with_the_settings_of_its_config():
    model = on_features(ood_weight=3.0, class_weights=[1.0, 2.0, 4.0])
    x, labels, kinds = torch.randn(4, 5), torch.tensor([0, 1, 2, -100]), torch.tensor([0, 0, 0, 1])
    output = model(x, labels=labels, is_ood=kinds)
    expected = ood_loss(output.logits, output.ood_logit, labels, kinds, 3.0, [1.0, 2.0, 4.0])
    assert torch.equal(output.loss, expected)
    output.loss.backward()
    assert model.ood_head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_labels": 3, "classifier_class": "BertForSequenceClassification"}, "got neither"),
        ({"feature_size": 4, "classifier": BertConfig(num_labels=3)}, "got feature_size=4 and classifier"),
        ({"feature_size": 4, "num_labels": 1}, "num_labels=1 must be at least 2"),
        ({"feature_size": 0}, "feature_size=0 must be at least 1"),
        ({"feature_size": 4, "hidden_size": 0}, "hidden_size=0 must be at least 1"),
        ({"feature_size": 4, "dropout": 1.0}, "dropout=1.0 must be"),
        ({"feature_size": 4, "ood_weight": -1.0}, "ood_weight=-1.0 must be"),
        ({"feature_size": 4, "ood_weight": float("nan")}, "ood_weight=nan must be"),
        ({"feature_size": 4, "class_weights": [1.0]}, r"class_weights=\[1.0\] must be 2 numbers"),
        ({"feature_size": 4, "class_weights": [1.0, -1.0]}, "class_weights="),
        ({"feature_size": 4, "ood_threshold": 1.5}, "ood_threshold=1.5 must be between 0 and 1"),
        ({"classifier": {"hidden_size": 4}}, "no model_type"),
        ({"classifier": BertConfig(num_labels=3), "num_labels": 4}, "num_labels=4 differs from the 3 classes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config_that_cannot_work_is_refused_by_name(settings, message):
    with pytest.raises(ConfigError, match=message):
        OODConfig(**settings)


def test_a_config_without_anything_makes_no_model():
    with pytest.raises(ConfigError, match="neither feature_size nor classifier"):
        OODModel(OODConfig())


def test_a_config_takes_the_names_of_the_classes_from_the_classifier():
    names = {0: "cat", 1: "dog", 2: "owl"}
    inner = BertConfig(id2label=names, label2id={name: i for i, name in names.items()})
    config = OODConfig(classifier=inner)
    assert config.id2label == names
    assert config.label2id == inner.label2id
    other = OODConfig(classifier=inner, id2label={0: "a", 1: "b", 2: "c"})
    assert other.id2label[0] == "a"
    again = OODConfig.from_dict(json.loads(json.dumps(other.to_dict(), default=str)))
    assert again.id2label == other.id2label
    assert type(again.classifier) is BertConfig


def test_models_that_cannot_have_a_head_are_refused():
    with pytest.raises(UnsupportedModelError, match="Linear is no PreTrainedModel"):
        OODModel.from_classifier(nn.Linear(3, 2))
    with pytest.raises(UnsupportedModelError, match="BertModel"):
        OODModel.from_classifier(BertModel(BertConfig(**SMALL, **TEXT)))
    for settings in (
        {"num_labels": 1},
        {"problem_type": "multi_label_classification"},
        {"problem_type": "regression"},
    ):
        model = BertForSequenceClassification(BertConfig(**SMALL, **{**TEXT, **settings}))
        with pytest.raises(UnsupportedModelError, match="expected a classifier of at least two classes, one a row"):
            OODModel.from_classifier(model)
    two = DeiTForImageClassificationWithTeacher(DeiTConfig(**SMALL, **IMAGE))
    with pytest.raises(UnsupportedModelError, match="head_module='distillation_classifier'"):
        OODModel.from_classifier(two)
    wrapped = OODModel.from_classifier(two, head_module="cls_classifier")
    assert wrapped.head is two.cls_classifier
    assert wrapped(**inputs("vit")).ood_logit.shape == (4,)
    assert OODModel.from_classifier(wrapped) is wrapped


def test_inputs_the_model_does_not_read_are_refused():
    model = on_features()
    with pytest.raises(DataError, match=r"features have shape \(4, 6\); expected \(rows, 5\)"):
        model(torch.randn(4, 6))
    with pytest.raises(DataError, match=r"features have shape \(5,\)"):
        model(torch.randn(5))
    with pytest.raises(DataError, match="reads 'features' and got pixel_values"):
        model(pixel_values=torch.randn(4, 5))
    with pytest.raises(DataError, match="reads 'features' only and got features, input_ids"):
        model(torch.randn(4, 5), input_ids=torch.ones(4, 5).long())
    with pytest.raises(DataError, match="reads 'pixel_values' and got no input"):
        with_head("vit")()
    assert model(torch.randn(4, 5).double()).logits.dtype == torch.float32


def test_token_types_a_classifier_does_not_read_are_left_out():
    wrapped, batch = with_head("llama"), inputs("llama")
    with torch.no_grad():
        found = wrapped(**batch, token_type_ids=torch.zeros_like(batch["input_ids"]))
        assert torch.equal(found.ood_logit, wrapped(**batch).ood_logit)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of transformers to PEFT
def test_adapters_train_around_a_head(tmp_path):
    peft = pytest.importorskip("peft")
    wrapped = with_head("bert")
    settings = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["ood_head", "classifier.classifier"])
    model = peft.get_peft_model(wrapped, settings)
    assert OODModel.from_classifier(model) is model
    model(**inputs("bert"), labels=torch.tensor([0, 1, 2, 0]), is_ood=torch.tensor([0, 0, 1, 1])).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any("lora_" in name for name in trained)
    assert any("ood_head" in name for name in trained)
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    assert collect(model, [inputs("bert")]).features.shape == (4, 32)
