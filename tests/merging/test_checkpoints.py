"""Whatever form a checkpoint comes in, its names, shapes and ties are those of the model; damaged ones are refused."""

import json

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_ext.errors import DeltaError
from hf_ext.merging.deltas import Checkpoint
from hf_ext.tiny import tiny_config, tiny_model
from tests.merging.helpers import save, write_file


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("arch", ["llama", "llama_tied", "gpt2"])
def test_headers_say_what_the_data_is(arch, tmp_path):
    model = tiny_model(arch)
    with Checkpoint.open(save(model, tmp_path / "a", torch.bfloat16, max_shard_size="60KB")) as folder:
        for name in [*folder.names, *folder.tied]:
            tensor = folder.tensor(name)
            assert folder.shape(name) == tuple(tensor.shape)
            assert folder.dtype(name) == tensor.dtype == torch.bfloat16
            assert folder.nbytes(name) == tensor.nbytes
        assert folder.total_bytes() == sum(weight.nbytes for weight in model.parameters())
        assert (folder.source, folder.revision) == (str(tmp_path / "a"), None)


def test_gpt2_keeps_its_transposed_layout(tmp_path):
    with Checkpoint.open(save(tiny_model("gpt2"), tmp_path / "a")) as folder:
        assert folder.shape("transformer.h.0.attn.c_attn.weight") == (64, 192)


def test_numbered_layers_come_in_the_order_of_the_model(tmp_path):
    model = tiny_model("llama", num_hidden_layers=12)
    with_config, without = tmp_path / "a", tmp_path / "b"
    save(model, with_config)
    write_file(without, load_file(with_config / "model.safetensors"))
    assert Checkpoint.open(with_config).names == [name for name, _ in model.named_parameters()]
    layers = [name for name in Checkpoint.open(without).names if name.endswith("q_proj.weight")]
    assert [int(name.split(".")[2]) for name in layers] == list(range(12))


def test_kinds_for_tables():
    kinds = {}
    for arch in ("llama", "gpt2"):
        checkpoint = Checkpoint.open(tiny_model(arch))
        kinds[arch] = {checkpoint.kind(name) for name in checkpoint.names}
    projections = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert kinds["llama"] == projections | {"embed_tokens", "lm_head", "norm"}
    assert kinds["gpt2"] == {"wte", "wpe", "c_attn", "c_proj", "c_fc", "lm_head", "norm", "bias"}


def test_kinds_of_unusual_parameters():
    module = torch.nn.Module()
    module.experts = torch.nn.Parameter(torch.zeros(2, 3, 4))
    module.weight = torch.nn.Parameter(torch.zeros(2, 3))
    module.sinks = torch.nn.Parameter(torch.zeros(4))
    module.scale = torch.nn.Parameter(torch.zeros(()))
    checkpoint = Checkpoint.open(module)
    assert [checkpoint.kind(name) for name in checkpoint.names] == ["experts", "other", "other", "other"]
    assert checkpoint.source == "Module"


def test_opening_a_folder_leaves_the_random_state_alone(tmp_path):
    save(tiny_model("llama"), tmp_path / "a")
    state = torch.get_rng_state()
    Checkpoint.open(tmp_path / "a")
    assert torch.equal(state, torch.get_rng_state())


def test_live_parameters_that_share_storage_are_tied():
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    module[1].weight = torch.nn.Parameter(module[0].weight.data)
    checkpoint = Checkpoint.open(module)
    assert checkpoint.tied == {"1.weight": "0.weight"}
    assert checkpoint.names == ["0.weight", "0.bias", "1.bias"]


def test_buffers_are_not_weights(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    assert Checkpoint.open(module).names == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_a_weight_stored_only_under_its_tied_name_is_found(tmp_path):
    model = tiny_model("llama_tied")
    save(model, tmp_path / "a")
    weights = load_file(tmp_path / "a" / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, tmp_path / "a" / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "a")
    assert checkpoint.names == Checkpoint.open(model).names
    assert torch.equal(checkpoint.tensor("model.embed_tokens.weight"), model.lm_head.weight)


@pytest.mark.parametrize("stated", [True, None], ids=["stated", "left to the default"])
def test_ties_of_an_architecture_this_transformers_does_not_know(stated, tmp_path):
    weights = {name: weight.data for name, weight in tiny_model("llama_tied").named_parameters()}
    config = {"architectures": ["NotYetWrittenForCausalLM"], "model_type": "not_yet_written"}
    if stated is not None:
        config["tie_word_embeddings"] = stated
    checkpoint = Checkpoint.open(write_file(tmp_path / "a", weights, config))
    assert checkpoint.tied == {"lm_head.weight": "model.embed_tokens.weight"}


def test_the_hub_cache_is_read_offline_and_gives_the_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--someone--tiny"
    save(tiny_model("llama"), repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    checkpoint = Checkpoint.open("someone/tiny")
    assert (checkpoint.source, checkpoint.revision) == ("someone/tiny", COMMIT)
    assert Checkpoint.open("someone/tiny", revision=COMMIT).names == checkpoint.names
    with pytest.raises(DeltaError, match="'someone/tiny' at revision 'v2' .* could not be fetched"):
        Checkpoint.open("someone/tiny", revision="v2")


def test_only_weights_and_json_are_fetched_and_the_token_is_passed_on(tmp_path, monkeypatch):
    seen = {}

    def download(repo_id, **options):
        seen.update(options, repo_id=repo_id)
        return str(write_file(tmp_path / "a", {"l.weight": torch.zeros(2, 2)}))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    Checkpoint.open("someone/tiny", revision="main", token="secret")
    assert seen["allow_patterns"] == ["*.safetensors", "*.json"]
    assert (seen["repo_id"], seen["revision"], seen["token"]) == ("someone/tiny", "main", "secret")


def test_a_closed_checkpoint_says_so():
    with Checkpoint.open(tiny_model("llama")) as checkpoint:
        assert checkpoint.tensor("model.norm.weight").shape == (64,)
    with pytest.raises(DeltaError, match="was closed"):
        checkpoint.tensor("model.norm.weight")


def test_weights_that_are_not_in_memory_are_refused():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    with pytest.raises(DeltaError, match="on the meta device"):
        Checkpoint.open(model)


def test_a_module_without_parameters_is_refused():
    with pytest.raises(DeltaError, match="ReLU holds no weights"):
        Checkpoint.open(torch.nn.ReLU())


@pytest.mark.parametrize("source", ["./nowhere", "a/b/c", "~nobody/model", "no such folder"])
def test_a_path_that_does_not_exist_is_refused(source):
    with pytest.raises(DeltaError, match="does not exist; expected a folder"):
        Checkpoint.open(source)


def test_a_path_object_is_never_taken_for_a_hub_id(tmp_path):
    with pytest.raises(DeltaError, match="does not exist"):
        Checkpoint.open(tmp_path / "nowhere")


def test_an_id_that_cannot_be_fetched_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DeltaError, match="'someone/nothing' is not a folder here and could not be fetched .*OFFLINE"):
        Checkpoint.open("someone/nothing")


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "a/../../x.safetensors", "/x.safetensors", "..\\x.safetensors", "C:x.safetensors", "x.bin"],
)
def test_an_index_that_points_outside_the_folder_is_refused(name, tmp_path):
    save_file({"l.weight": torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"l.weight": name}}))
    with pytest.raises(DeltaError, match="expected a .safetensors file inside the folder"):
        Checkpoint.open(tmp_path / "a")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "holds a list; expected a JSON object"),
        ("{}", "no usable weight_map"),
        ('{"weight_map": {"a": 1}}', "no usable weight_map"),
        ('{"weight_map": {"a": "x.safetensors"}}', "x.safetensors does not exist"),
        ('{"weight_map": {"a": "y.safetensors"}}', "does not hold a, which the index expects"),
        ('{"weight_map": {}}', "holds no weights"),
    ],
)
def test_a_broken_index_is_refused(text, message, tmp_path):
    save_file({"b": torch.zeros(2)}, tmp_path / "y.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(DeltaError, match=message):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_file_is_refused_by_name(keep, tmp_path):
    save(tiny_model("llama"), tmp_path / "a", max_shard_size="60KB")
    shard = sorted((tmp_path / "a").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(DeltaError, match=rf"{shard.name} cannot be read: .*truncated"):
        Checkpoint.open(tmp_path / "a")


def test_a_file_that_disappears_after_opening_is_named(tmp_path):
    checkpoint = Checkpoint.open(write_file(tmp_path / "a", {"l.weight": torch.zeros(2, 2)}))
    (tmp_path / "a" / "model.safetensors").unlink()
    with pytest.raises(DeltaError, match="model.safetensors does not exist"):
        checkpoint.tensor("l.weight")


class _Pickled:
    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


def test_pickled_weights_are_never_opened(tmp_path):
    torch.save(_Pickled(), tmp_path / "pytorch_model.bin")
    with pytest.raises(DeltaError, match=r"only pickled weights \(pytorch_model.bin\).*convert it to safetensors"):
        Checkpoint.open(tmp_path)
    with pytest.raises(DeltaError, match=r"is a .bin file; expected .safetensors.*convert it to safetensors"):
        Checkpoint.open(tmp_path / "pytorch_model.bin")


def test_folders_without_weights_are_refused_with_a_way_out(tmp_path):
    with pytest.raises(DeltaError, match="holds no weights; expected model.safetensors"):
        Checkpoint.open(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(DeltaError, match="holds other.safetensors; .*give the path of that file"):
        Checkpoint.open(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(DeltaError, match="PEFT adapter; .*merge_and_unload"):
        Checkpoint.open(tmp_path)


def test_code_of_a_repository_is_not_run(tmp_path):
    config = {
        "architectures": ["OwnForCausalLM"],
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }
    write_file(tmp_path / "a", {"l.weight": torch.zeros(2, 2)}, config)
    (tmp_path / "a" / "own.py").write_text("raise SystemExit('code of the repository was run')")
    assert Checkpoint.open(tmp_path / "a").names == ["l.weight"]
