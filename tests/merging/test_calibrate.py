"""`Calibration`: padding counts for nothing, what has no answer is skipped, and names that do not fit are told."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_ext.errors import ConfigError, DeltaError
from hf_ext.merging.blob import Delta
from hf_ext.merging.calibrate import Calibration
from hf_ext.tiny import tiny_model
from tests.merging.helpers import expected_deltas, tuned_model


NAMES = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"]


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama"), tuned_model("llama")


def calibrate(models, data, samples=10):
    return Calibration(*models, data, samples, "base", False)


def tokens(length, seed=0):
    return torch.randint(2, 128, (1, length), generator=torch.Generator().manual_seed(seed))


def padded(example, width, side, fill=1):
    """With padding of any content on one side, labels included."""
    found, missing = {}, width - example["input_ids"].shape[1]
    for name, value in {"attention_mask": torch.ones_like(example["input_ids"]), **example}.items():
        pad = torch.full((1, missing), 0 if name == "attention_mask" else fill)
        found[name] = torch.cat([pad, value] if side == "left" else [value, pad], dim=1)
    return found


def numbers(measure, models):
    return {
        **{score: measure.gradients(NAMES, score) for score in ("taylor1", "fisher")},
        "base": measure.base_divergence,
        "left out": measure.cost_of_leaving_out(NAMES),
        "nothing": measure._divergence(expected_deltas(*models)),
    }


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(llama, side, labelled):
    plain = [{"input_ids": tokens(length, length)} for length in (9, 14, 20)]
    if labelled:
        plain = [{**one, "labels": one["input_ids"].clone()} for one in plain]
        plain[0]["labels"][0, :4] = -100
    expected = numbers(calibrate(llama, plain), llama)
    batch = [padded(one, 20, side) for one in plain]
    batch = {name: torch.cat([one[name] for one in batch]) for name in batch[0]}
    for data in ([padded(one, 24, side, fill=7) for one in plain], [batch]):
        found = numbers(calibrate(llama, data), llama)
        assert found["base"] == expected["base"] > 0
        assert found["left out"] == expected["left out"]
        for score in ("taylor1", "fisher"):
            for name in NAMES:
                assert torch.equal(found[score][name], expected[score][name]), (score, name)
                assert found[score][name].abs().sum() > 0


def test_examples_without_an_answer_are_skipped_and_do_not_take_a_place(llama, caplog):
    good = [{"input_ids": tokens(12, seed)} for seed in range(3)]
    bad = [
        {"input_ids": tokens(1)},
        {"input_ids": tokens(8), "labels": torch.full((1, 8), -100)},
        {"input_ids": tokens(8), "labels": torch.tensor([[5, *[-100] * 7]])},
        {"input_ids": tokens(5), "attention_mask": torch.tensor([[0, 0, 0, 0, 1]])},
        {"input_ids": tokens(5), "attention_mask": torch.zeros(1, 5, dtype=torch.long)},
        {"input_ids": torch.zeros(1, 0, dtype=torch.long)},
    ]
    measure = calibrate(llama, [*bad[:3], good[0], *bad[3:], *good[1:]], samples=3)
    assert "6 calibration examples have nothing to predict and were skipped" in caplog.text
    assert len(measure.examples) == 3
    expected = calibrate(llama, good)
    assert measure.base_divergence == expected.base_divergence
    for score in ("taylor1", "fisher"):
        found, wanted = measure.gradients(NAMES, score), expected.gradients(NAMES, score)
        assert all(torch.equal(found[name], wanted[name]) for name in NAMES)


def test_nothing_but_examples_without_an_answer_is_told(llama):
    data = [{"input_ids": tokens(1)}, {"input_ids": tokens(8), "labels": torch.full((1, 8), -100)}]
    with pytest.raises(ConfigError, match="all 2 calibration examples have nothing to predict: one token"):
        calibrate(llama, data)
    with pytest.raises(ConfigError, match="calibration data is empty"):
        calibrate(llama, [])


def test_one_label_for_a_padded_text_stays_whole():
    """The labels of a classifier have no token axis, also where there are as many of them as tokens."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=128,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_labels=6,
        problem_type="multi_label_classification",
    )
    models = [BertForSequenceClassification(config).eval() for _ in range(2)]
    example = {"input_ids": tokens(4), "labels": torch.tensor([[1.0, 0, 0, 1, 0, 1]])}
    expected = calibrate(models, [example])
    padding = padded({"input_ids": example["input_ids"]}, 6, "right") | {"labels": example["labels"]}
    found = calibrate(models, [padding])
    name = "classifier.weight"
    assert found.base_divergence == expected.base_divergence
    assert torch.equal(found.gradients([name], "taylor1")[name], expected.gradients([name], "taylor1")[name])


def test_a_name_the_models_do_not_have_is_told(llama):
    measure = calibrate(llama, [{"input_ids": tokens(12)}])
    message = r"layers.9.weight is no parameter of LlamaForCausalLM \(1 such names\): .*compress without calibration"
    for call in (
        lambda: measure.divergence({"layers.9.weight": Delta((2, 2))}),
        lambda: measure.gradients([NAMES[0], "layers.9.weight"], "taylor"),
        lambda: measure.cost_of_leaving_out(["layers.9.weight"]),
    ):
        with pytest.raises(DeltaError, match=message):
            call()


def test_a_loss_that_fails_leaves_the_model_as_it_was(llama, monkeypatch):
    measure = calibrate(llama, [{"input_ids": tokens(12)}])

    def fail(*args):
        raise RuntimeError("no loss")

    monkeypatch.setattr("hf_ext.merging.calibrate._loss", fail)
    with pytest.raises(RuntimeError, match="no loss"):
        measure.gradients(NAMES, "taylor")
    assert all(weight.requires_grad for weight in llama[1].parameters())
