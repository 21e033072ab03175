"""A compressed fine-tune on the Hub: pushed, pulled, and opened by PEFT straight from its repository."""

import copy

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel

import hf_ext
from hf_ext.hub_tools.push import pull_artifact, push_artifact
from hf_ext.merging.compress import compress_delta
from hf_ext.merging.osd_artifact import OSDArtifact
from hf_ext.merging.osd_config import OSDConfig
from hf_ext.tiny import tiny_model
from tests.hub_server import hub  # noqa: F401


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
IDS = torch.arange(1, 25)[None]


@pytest.fixture
def pair(tmp_path):
    """A base saved in a folder, and a fine-tune of it."""
    base = tiny_model("llama_tied")
    base.save_pretrained(tmp_path / "base")
    base.config._name_or_path = base.name_or_path = str(tmp_path / "base")
    tuned = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(0)
    for weight in tuned.parameters():
        weight.data += 0.02 * torch.randn(weight.shape, generator=generator)
    return base, tuned


@pytest.fixture
def pushed(hub, pair, tmp_path):  # noqa: F811
    artifact = compress_delta(*pair, OSDConfig(budget=20_000), progress=False)
    artifact.save_pretrained(tmp_path / "artifact", lora_rank=2)
    push_artifact(
        tmp_path / "artifact", "user/delta", token=hub.token, endpoint=hub.endpoint, private=True, run_snippet=False
    )
    return artifact


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def expected(pair, artifact):
    base = copy.deepcopy(pair[0])
    weights = dict(base.named_parameters())
    for name, delta in artifact.deltas.items():
        weights[name].data += torch.from_numpy(delta.dense())
    return logits(base)


def test_a_repository_opens_in_peft_like_the_folder(hub, pair, pushed):  # noqa: F811
    before = logits(pair[0])
    with hf_ext.registered():
        model = PeftModel.from_pretrained(copy.deepcopy(pair[0]), "user/delta", token=hub.token)
        found = logits(model)
    torch.testing.assert_close(found, expected(pair, pushed), atol=1e-4, rtol=1e-4)
    assert (found - before).abs().max() > 0.01


def test_the_auto_class_finds_the_base_itself(hub, pair, pushed):  # noqa: F811
    with hf_ext.registered():
        model = AutoPeftModelForCausalLM.from_pretrained("user/delta", token=hub.token)
        torch.testing.assert_close(logits(model), expected(pair, pushed), atol=1e-4, rtol=1e-4)


def test_a_pulled_folder_is_bit_equal_and_a_native_model_loads_it(hub, pair, pushed, tmp_path):  # noqa: F811
    folder = pull_artifact("user/delta", tmp_path / "pulled", token=hub.token, endpoint=hub.endpoint)
    for name in ("adapter_model.safetensors", "adapter_config.json", "lora/adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "artifact" / name).read_bytes()
    again = OSDArtifact.from_pretrained(folder)
    assert {name: delta.dense().tobytes() for name, delta in again.deltas.items()} == {
        name: delta.dense().tobytes() for name, delta in pushed.deltas.items()
    }
    model = copy.deepcopy(pair[0])
    with hf_ext.registered():
        model = hf_ext.load_adapter(model, folder)
        torch.testing.assert_close(logits(model), expected(pair, pushed), atol=1e-4, rtol=1e-4)


def test_the_lora_subfolder_opens_without_this_package(hub, pair, pushed):  # noqa: F811
    model = PeftModel.from_pretrained(copy.deepcopy(pair[0]), "user/delta", subfolder="lora", token=hub.token)
    assert (logits(model) - logits(pair[0])).abs().max() > 1e-3
    assert model.peft_config["default"].peft_type == "LORA"


def test_the_card_names_the_numbers(hub, pushed):  # noqa: F811
    card = hub.server.files("user/delta")["README.md"].decode()
    assert "bytes after" in card
    assert str(pushed.nbytes()) in card.replace(",", "").replace(" ", "")
    assert "2511.02681" in card
