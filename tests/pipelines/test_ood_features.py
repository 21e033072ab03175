"""Rows and what is collected of them: heads are found, positions are the model's own, gradients are those of autograd."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import IterableDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

from hf_ext.errors import DataError, UnsupportedModelError
from hf_ext.pipelines.medix import last_layer_gradients
from hf_ext.pipelines.ood_features import (
    OutlierOrder,
    Rows,
    bn_bias_gradients,
    check_closed_form,
    collect,
    column_names,
    eval_mode,
    find_head,
    forward_features,
    has_rows,
    join_batches,
    kept_rng,
    last_batch_norm,
    parameter_gradients,
    pooled_input,
    read_rows,
    sample_rows,
)


CLASSES = 3
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {"vocab_size": 64, "num_labels": CLASSES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {"num_labels": CLASSES, "image_size": 8, "patch_size": 4, "num_channels": 1}
SOUND = {
    "conv_dim": (8, 8),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
    "num_labels": CLASSES,
    "mask_time_prob": 0.0,
}
RESNET = {
    "num_channels": 1,
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
    "num_labels": CLASSES,
}
# name -> a classifier, the name of its last linear layer
CLASSIFIERS = {
    "bert": (lambda: BertForSequenceClassification(BertConfig(**SMALL, **TEXT)), "classifier"),
    "roberta": (lambda: RobertaForSequenceClassification(RobertaConfig(**SMALL, **TEXT)), "classifier.out_proj"),
    "llama": (lambda: LlamaForSequenceClassification(LlamaConfig(**SMALL, **TEXT)), "score"),
    "gpt2": (lambda: GPT2ForSequenceClassification(GPT2Config(n_embd=32, n_layer=2, n_head=2, **TEXT)), "score"),
    "vit": (lambda: ViTForImageClassification(ViTConfig(**SMALL, **IMAGE)), "classifier"),
    "resnet": (lambda: ResNetForImageClassification(ResNetConfig(**RESNET)), "classifier.1"),
    "wav2vec2": (lambda: Wav2Vec2ForSequenceClassification(Wav2Vec2Config(**SMALL, **SOUND)), "classifier"),
}
TEXTS, IMAGES = ("bert", "roberta", "llama", "gpt2"), ("vit", "resnet")


def classifier(name, seed=0):
    """A small random model in eval mode, with weights large enough for rows to differ."""
    torch.manual_seed(seed)
    model = CLASSIFIERS[name][0]().eval()
    find_head(model, CLASSES)[1].weight.data.normal_(0, 0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.3)
    return model


def inputs(name, rows=4):
    """A batch for `classifier(name)`; texts are padded on either side."""
    generator = torch.Generator().manual_seed(1)
    if name in TEXTS:
        ids = torch.randint(3, 64, (rows, 7), generator=generator)
        ids[0, 5:] = 0
        if name != "roberta":
            ids[1, :3] = 0
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if name in IMAGES:
        size = 8 if name == "vit" else 32
        return {"pixel_values": torch.randn(rows, 1, size, size, generator=generator)}
    return {"input_values": torch.randn(rows, 400, generator=generator)}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_last_layer_is_found_and_its_input_gives_the_logits(name):
    model = classifier(name)
    found, head = find_head(model, CLASSES)
    assert found == CLASSIFIERS[name][1]
    with torch.no_grad():
        features, logits = forward_features(model, inputs(name), head)
        expected = model(**inputs(name)).logits
    assert torch.equal(logits, expected)
    assert features.shape == (4, head.in_features)
    torch.testing.assert_close(head(features), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_the_features_of_a_decoder_are_those_of_the_last_token(name, side):
    model = classifier(name)
    ids = torch.randint(3, 64, (5, 9), generator=torch.Generator().manual_seed(0))
    pads = [0, 1, 4, 8, 2]
    for row, count in enumerate(pads):
        if side == "left":
            ids[row, :count] = 0
        elif side == "right" and count:
            ids[row, -count:] = 0
    mask = (ids != 0).long()
    last = [8 - count if side == "right" else 8 for count in pads]
    with torch.no_grad():
        features, _ = forward_features(model, {"input_ids": ids, "attention_mask": mask}, model.score)
        hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(features, hidden[torch.arange(5), last], atol=0, rtol=0)


def test_of_equal_positions_the_last_is_taken():
    read = torch.arange(12.0).view(1, 3, 4)
    written = torch.tensor([[[1.0, 2.0], [1.0, 2.0], [5.0, 6.0]]])
    assert torch.equal(pooled_input(read, written, torch.tensor([[1.0, 2.0]])), read[:, 1])
    assert torch.equal(pooled_input(read, written, torch.tensor([[5.0, 6.0]])), read[:, 2])
    nan = torch.full((1, 3, 2), float("nan"))
    assert torch.equal(pooled_input(read, nan, nan[:, 0]), read[:, 2])


def test_logits_that_are_no_position_are_refused():
    written = torch.randn(2, 3, 4)
    with pytest.raises(UnsupportedModelError, match="2 of 2 rows are the scores of no single position"):
        pooled_input(torch.randn(2, 3, 5), written, written.mean(1))
    with pytest.raises(UnsupportedModelError, match="expected .rows, classes."):
        pooled_input(torch.randn(2, 3, 5), written, written)
    with pytest.raises(UnsupportedModelError, match="one entry a row"):
        pooled_input(torch.randn(6, 5), written, torch.randn(2, 4))


def test_a_backbone_as_wide_as_there_are_classes_does_not_hide_the_head():
    model = ViTForImageClassification(ViTConfig(**SMALL, **{**IMAGE, "num_labels": 32}))
    assert find_head(model, 32)[0] == "classifier"


def test_heads_that_are_not_clear_are_named():
    torch.manual_seed(0)
    two = DeiTForImageClassificationWithTeacher(DeiTConfig(**SMALL, **IMAGE))
    with pytest.raises(UnsupportedModelError, match=r"2 linear layers.*cls_classifier.*distillation_classifier"):
        find_head(two, CLASSES)
    assert find_head(two, CLASSES, "cls_classifier")[1] is two.cls_classifier
    wide = RobertaForSequenceClassification(RobertaConfig(**SMALL, **{**TEXT, "num_labels": 32}))
    with pytest.raises(
        UnsupportedModelError, match=r"classifier.dense.*classifier.out_proj.*head_module='classifier.out"
    ):
        find_head(wide, 32)
    with pytest.raises(UnsupportedModelError, match=r"no torch.nn.Linear with 3 outputs.*feature_size"):
        find_head(ViTModel(ViTConfig(**SMALL, **IMAGE)), CLASSES)
    with pytest.raises(UnsupportedModelError, match="head_module='head' is no linear layer"):
        find_head(two, CLASSES, "head")


def losses(model, name, labels):
    """Cross-entropy of every row alone, with a graph."""
    batch = inputs(name)
    for row in range(4):
        single = {key: value[row : row + 1] for key, value in batch.items()}
        yield F.cross_entropy(model(**single).logits, labels[row : row + 1])


@pytest.mark.parametrize("name", ["bert", "vit", "resnet", "wav2vec2", "gpt2"])
@pytest.mark.parametrize("use_labels", [True, False])
def test_closed_forms_from_collected_features_equal_autograd_per_row(name, use_labels):
    model = classifier(name)
    head = find_head(model, CLASSES)[1]
    labels = torch.tensor([2, 0, 1, 1])
    found = collect(model, [{**inputs(name), "labels": labels}], use_labels=use_labels)
    assert torch.equal(found.labels, labels if use_labels else found.logits.argmax(1))
    weight = head.weight.detach()
    by_weight = last_layer_gradients(found.features, found.logits, found.labels, weight, "weight")
    for row, loss in enumerate(losses(model, name, found.labels)):
        (expected,) = torch.autograd.grad(loss, head.weight)
        torch.testing.assert_close(by_weight[row].view_as(expected), expected, atol=1e-6, rtol=1e-4)
    check_closed_form(found, head.weight, head.bias)


@pytest.mark.parametrize("size", [32, 64])
def test_gradients_of_the_last_batch_norm_equal_autograd_per_row(size):
    model = classifier("resnet")
    norm = last_batch_norm(model)[1]
    images = torch.randn(4, 1, size, size, generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([2, 0, 1, 1])
    found = collect(model, [{"pixel_values": images, "labels": labels}], "bn_bias")
    assert found.gradients.shape == (4, 16)
    for row in range(4):
        loss = F.cross_entropy(model(pixel_values=images[row : row + 1]).logits, labels[row : row + 1])
        (expected,) = torch.autograd.grad(loss, norm.bias)
        torch.testing.assert_close(found.gradients[row], expected, atol=1e-6, rtol=1e-4)
    # The paper's closed form, on the rectified map that is pooled.
    with torch.no_grad():
        pooled = model.base_model(images).last_hidden_state
    u = last_layer_gradients(found.features, found.logits, labels, model.classifier[1].weight.detach())
    torch.testing.assert_close(bn_bias_gradients(u, pooled), found.gradients, atol=1e-6, rtol=1e-4)
    assert 0 < (pooled > 0).float().mean() < 1


def test_the_closed_form_holds_for_batch_norm_relu_and_average_pooling():
    torch.manual_seed(0)
    norm, last = nn.BatchNorm2d(5).eval(), nn.Linear(5, CLASSES)
    norm.bias.data.normal_()
    x, labels = torch.randn(6, 5, 4, 4), torch.arange(6) % CLASSES
    before = norm(x)
    features = before.relu().mean((2, 3))
    u = last_layer_gradients(features, last(features), labels, last.weight)
    found = bn_bias_gradients(u, before.detach())
    for row in range(6):
        loss = F.cross_entropy(last(norm(x[row : row + 1]).relu().mean((2, 3))), labels[row : row + 1])
        (expected,) = torch.autograd.grad(loss, norm.bias)
        torch.testing.assert_close(found[row], expected, atol=1e-6, rtol=1e-5)
    flat = bn_bias_gradients(u, before.detach()[:, :, 0, 0])
    assert torch.equal(flat, u * (before[:, :, 0, 0] > 0))


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("vit", "vit.layernorm.bias"),
        ("bert", "bert.pooler.dense.bias"),
        ("resnet", "classifier.1.weight"),
        ("gpt2", "transformer.ln_f.bias"),
    ],
)
def test_gradients_of_a_named_parameter_equal_autograd_per_row(name, parameter):
    model = classifier(name).train()
    labels = torch.tensor([2, 0, 1, 1])
    found = parameter_gradients(model, inputs(name), labels, parameter)
    assert model.training
    collected = collect(model, [{**inputs(name), "labels": labels}], parameter)
    model.eval()
    weight = dict(model.named_parameters())[parameter]
    for row, loss in enumerate(losses(model, name, labels)):
        (expected,) = torch.autograd.grad(loss, weight)
        torch.testing.assert_close(found[row], expected.flatten(), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(collected.gradients, found, atol=1e-7, rtol=1e-5)
    with pytest.raises(UnsupportedModelError, match="no parameter 'classifier.b'"):
        parameter_gradients(model, inputs(name), labels, "classifier.b")


def test_collecting_changes_neither_modes_nor_gradients_nor_statistics():
    model = classifier("resnet").train()
    frozen = last_batch_norm(model)[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.random.get_rng_state()
    for gradient in (None, "bn_bias"):
        found = collect(model, [inputs("resnet")], gradient)
        assert not found.features.requires_grad
        assert not found.logits.requires_grad
    assert model.training
    assert model.classifier.training
    assert not frozen.training
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(random, torch.random.get_rng_state())
    assert not model.classifier[1]._forward_hooks
    assert not frozen._forward_hooks
    model.eval()
    assert torch.equal(found.logits, model(**inputs("resnet")).logits)


def test_modes_come_back_after_an_error():
    model = classifier("vit").train()
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.modules())
    with pytest.raises(DataError), torch.enable_grad():
        collect(model, [{**inputs("vit"), "labels": torch.tensor([0, 1, 2, 3])}])
    assert model.training
    assert not model.classifier._forward_hooks


def test_rows_keep_their_order_over_batches():
    model = classifier("vit")
    whole = inputs("vit", 7)
    parts = [{"pixel_values": part} for part in whole["pixel_values"].split(3)]
    found = collect(model, parts)
    with torch.no_grad():
        torch.testing.assert_close(found.logits, model(**whole).logits, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 2, 3]), "label 3 is no class of a model with 3; expected 0 to 2"),
        (torch.tensor([0, 1, 2, -100]), "label -100 is no class"),
        (torch.tensor([0.0, 1.0, 2.0, 0.5]), "expected one integer a row"),
        (torch.zeros(4, 3, dtype=torch.long), "expected one integer a row"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, message):
    with pytest.raises(DataError, match=message):
        collect(classifier("vit"), [{**inputs("vit"), "labels": labels}])
    # Wild rows may come with any.
    assert len(collect(classifier("vit"), [{**inputs("vit"), "labels": labels}], use_labels=False).labels) == 4


def test_what_cannot_be_collected_is_refused():
    with pytest.raises(DataError, match="no rows"):
        collect(classifier("vit"), [], description="wild")
    with pytest.raises(UnsupportedModelError, match="needs a batch norm and ViTForImageClassification has none"):
        collect(classifier("vit"), [inputs("vit")], "bn_bias")
    model = classifier("vit")
    found = collect(model, [inputs("vit")])
    with pytest.raises(UnsupportedModelError, match="no closed form"):
        check_closed_form(found, model.classifier.weight * 3, model.classifier.bias)


class Stream(IterableDataset):
    """Rows without an index or a length; counts how often it was read."""

    def __init__(self, rows):
        self.rows, self.reads = rows, 0

    def __iter__(self):
        self.reads += 1
        return iter(self.rows)


ROWS = [{"features": float(i), "labels": str(i)} for i in range(5000)]


def values(rows):
    return [row["features"] for row in rows.__getitems__(range(len(rows)))]


def test_streams_and_lists_are_told_apart():
    from datasets import Dataset

    table = Dataset.from_dict({"features": [1.0, 2.0]})
    assert has_rows(ROWS)
    assert has_rows(table)
    assert not has_rows(Stream(ROWS))
    assert not has_rows(table.to_iterable_dataset())
    assert not has_rows(table.to_iterable_dataset().with_format("torch"))
    assert column_names(table, "x") == ["features"]
    assert column_names(ROWS, "x") == ["features", "labels"]
    assert column_names(Stream(ROWS), "x") is None
    assert column_names(None, "x") is None
    with pytest.raises(DataError, match="train_dataset holds the splits train, test; pass one"):
        column_names({"train": table, "test": table}, "train_dataset")


def test_a_sample_of_a_stream_is_uniform_bounded_and_keeps_its_numbers():
    stream = Stream(ROWS)
    rows = sample_rows(stream, 1500, 0, ("labels",))
    assert len(rows) == 1500
    assert rows.total == 5000
    assert stream.reads == 1
    assert values(rows) == rows.indices.tolist() == sorted(set(rows.indices.tolist()))
    assert rows[0].keys() == {"features"}
    # A thousand of 5000: a quarter of them is expected in each quarter, within five standard deviations.
    quarters = torch.bincount(rows.indices // 1250, minlength=4)
    assert ((quarters - 375).abs() < 5 * (1500 * 0.25 * 0.75) ** 0.5).all(), quarters
    assert torch.equal(sample_rows(Stream(ROWS), 1500, 0).indices, rows.indices)
    assert not torch.equal(sample_rows(Stream(ROWS), 1500, 1).indices, rows.indices)
    chosen = rows.take(torch.tensor([3, 1]))
    assert values(chosen) == chosen.indices.tolist() == [rows.indices[3], rows.indices[1]]


@pytest.mark.parametrize("make", [lambda rows: rows, Stream])
def test_small_sets_are_taken_whole_and_large_ones_sampled(make):
    assert sample_rows(make(ROWS[:7]), 10, 0).indices.tolist() == list(range(7))
    assert sample_rows(make(ROWS), 10, None).indices.tolist() == list(range(10))
    sampled = sample_rows(make(ROWS), 10, 3)
    assert len(sampled) == 10
    assert values(sampled) == sampled.indices.tolist()
    with pytest.raises(DataError, match="no rows"):
        sample_rows(make([]), 10, 0)


@pytest.mark.parametrize("make", [lambda rows: rows, Stream])
def test_rows_are_read_again_by_index(make):
    rows = read_rows(make(ROWS), torch.tensor([40, 2, 40]), ("labels",))
    assert values(rows) == [40.0, 2.0, 40.0]
    assert rows[1].keys() == {"features"}
    for wrong in (5000, -1):
        with pytest.raises(DataError, match=f"row {wrong} was asked for and there are"):
            read_rows(make(ROWS), torch.tensor([1, wrong]))


def test_rows_of_a_table_come_as_its_own():
    from datasets import Dataset

    table = Dataset.from_dict({"features": [[1.0], [2.0], [3.0]], "label": [0, 1, 2]}).with_format("torch")
    rows = Rows.of(table, ("label",))
    assert len(rows) == 3
    assert [row["features"].item() for row in rows.__getitems__([2, 0])] == [3.0, 1.0]
    assert isinstance(rows[0]["features"], torch.Tensor)


@pytest.mark.parametrize(("count", "size"), [(10, 4), (3, 8), (8, 8), (1, 1)])
def test_the_order_of_outliers_starts_anywhere_and_reshuffles(count, size):
    batches = list(itertools.islice(OutlierOrder(count, size, 5), 12))
    assert all(len(batch) == size for batch in batches)
    for start in (0, 1, 2, 7):
        assert list(itertools.islice(OutlierOrder(count, size, 5, start), 12 - start)) == batches[start:]
    flat = list(itertools.chain(*batches))
    turns = [flat[i : i + count] for i in range(0, len(flat) - count + 1, count)]
    assert all(sorted(turn) == list(range(count)) for turn in turns)
    if count == 10:
        assert turns[0] != turns[1]
        assert batches != list(itertools.islice(OutlierOrder(count, size, 6), 12))


class Padder:
    def __init__(self, side):
        self.padding_side, self.pad_token_id = side, 9


@pytest.mark.parametrize("side", ["left", "right"])
def test_joined_texts_score_as_they_do_alone(side):
    model = classifier("llama")
    ids = torch.randint(3, 64, (4, 7), generator=torch.Generator().manual_seed(0))
    long = {"input_ids": ids[:2], "attention_mask": torch.ones(2, 7).long()}
    short = {"input_ids": ids[2:, :4], "attention_mask": torch.ones(2, 4).long()}
    for first, second in ((long, short), (short, long)):
        joined = join_batches(first, second, Padder(side), model.config)
        assert joined["input_ids"].shape == (4, 7)
        with torch.no_grad():
            expected = torch.cat([model(**first).logits, model(**second).logits])
            torch.testing.assert_close(model(**joined).logits, expected, atol=1e-5, rtol=1e-5)


def test_batches_that_cannot_be_joined_are_told():
    config = BertConfig(**SMALL, **TEXT)
    sounds = {"input_values": torch.zeros(2, 9)}, {"input_values": torch.zeros(2, 8)}
    assert join_batches(*sounds, None, config) is None
    same = join_batches(sounds[0], sounds[0], None, config)
    assert same["input_values"].shape == (4, 9)
    named = join_batches({"names": ["a"], "size": 3}, {"names": ["b"], "size": 3}, None, config)
    assert named == {"names": ["a", "b"], "size": 3}


def test_random_numbers_go_on_as_if_none_was_drawn():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with kept_rng():
        torch.rand(100)
    assert torch.equal(torch.rand(3), expected)
