"""Deltas read from disk must be the subtraction of two state dicts, and everything that is none must be refused."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from hf_ext.errors import DeltaError, HfExtError
from hf_ext.merging.deltas import Checkpoint, DeltaEntry, delta, delta_entries, fingerprint, iter_deltas, matches
from hf_ext.tiny import ARCHITECTURES, tiny_model
from tests.merging.helpers import expected_deltas, save, store_head_too, tuned_model, write_file


def _state(**tensors):
    return {name.replace("__", "."): tensor for name, tensor in tensors.items()}


def _assert_equal(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_deltas_equal_plain_subtraction(arch, tied, dtype, tmp_path):
    base, tuned = tiny_model(arch, tie_word_embeddings=tied), tuned_model(arch, tie_word_embeddings=tied)
    save(base, tmp_path / "base", dtype)
    save(tuned, tmp_path / "tuned", dtype, max_shard_size="60KB")
    assert (tmp_path / "tuned" / "model.safetensors.index.json").is_file()
    expected = expected_deltas(base, tuned)

    folders = Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "tuned")
    models = Checkpoint.open(base), Checkpoint.open(tuned)
    for left, right in (folders, models, (folders[0], models[1]), (models[0], folders[1])):
        found = {}
        for entry, change in iter_deltas(left, right):
            assert entry == DeltaEntry(
                entry.name, tuple(change.shape), left.kind(entry.name), right.nbytes(entry.name)
            )
            found[entry.name] = change
        _assert_equal(found, expected)
    assert folders[0].tied == models[0].tied
    assert (len(models[0].tied) == 1) == tied
    assert folders[0].names == models[0].names == list(expected)


def test_one_weight_and_a_choice_of_weights_equal_the_whole_walk():
    base, tuned = Checkpoint.open(tiny_model("llama_tied")), Checkpoint.open(tuned_model("llama_tied"))
    every = {entry.name: change for entry, change in iter_deltas(base, tuned)}
    wanted = ["model.norm.weight", "lm_head.weight"]
    some = [(entry.name, change) for entry, change in iter_deltas(base, tuned, wanted)]
    assert [name for name, _ in some] == ["model.norm.weight", "model.embed_tokens.weight"]
    for name, change in some:
        assert torch.equal(change, every[name])
        assert torch.equal(delta(base, tuned, name), every[name])
    assert torch.equal(delta(base, tuned, "lm_head.weight"), every["model.embed_tokens.weight"])


def test_reading_changes_neither_side():
    base, tuned = tiny_model("llama"), tuned_model("llama")
    before = [weight.clone() for model in (base, tuned) for weight in model.parameters()]
    for _, change in iter_deltas(Checkpoint.open(base), Checkpoint.open(tuned)):
        change.fill_(7.0)
    after = [weight for model in (base, tuned) for weight in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_float64_is_subtracted_before_it_is_rounded(tmp_path):
    one = torch.full((4, 4), 1.0, dtype=torch.float64)
    base = Checkpoint.open(write_file(tmp_path / "a", {"l.weight": one}))
    tuned = Checkpoint.open(write_file(tmp_path / "b", {"l.weight": one + 1e-12}))
    change = delta(base, tuned, "l.weight")
    assert change.dtype == torch.float32
    assert torch.equal(change, (one + 1e-12 - one).float())
    assert change.ne(0).all()


def test_two_precisions_on_the_two_sides(tmp_path):
    base, tuned = tiny_model("llama"), tuned_model("llama")
    save(base, tmp_path / "base", torch.float16)
    save(tuned, tmp_path / "tuned", torch.bfloat16)
    pair = Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "tuned")
    _assert_equal({entry.name: change for entry, change in iter_deltas(*pair)}, expected_deltas(base, tuned))


def test_empty_scalar_and_large_tensors(tmp_path):
    shapes = {"a.empty": (0, 4), "b.scalar": (), "c.large": (1100, 1000)}
    base = {name: torch.randn(shape) for name, shape in shapes.items()}
    tuned = {name: torch.randn(shape) for name, shape in shapes.items()}
    pair = Checkpoint.open(write_file(tmp_path / "a", base)), Checkpoint.open(write_file(tmp_path / "b", tuned))
    found = {entry.name: change for entry, change in iter_deltas(*pair)}
    _assert_equal(found, {name: tuned[name] - base[name] for name in shapes})


def test_a_single_file_is_a_checkpoint(tmp_path):
    model = tiny_model("llama_tied")
    save(model, tmp_path / "a")
    alone = write_file(tmp_path / "b", load_file(tmp_path / "a" / "model.safetensors"), name="weights.safetensors")
    beside = Checkpoint.open(tmp_path / "a" / "model.safetensors")
    bare = Checkpoint.open(str(alone / "weights.safetensors"))
    assert sorted(bare.names) == sorted(beside.names)
    # Without a config nothing says whether a missing head is tied or was never there.
    assert (beside.tied, bare.tied) == ({"lm_head.weight": "model.embed_tokens.weight"}, {})
    assert len(delta_entries(beside, bare)) == len(beside.names)


def test_old_gpt2_files_without_prefix_and_with_buffers_get_the_models_names(tmp_path):
    model = tiny_model("gpt2", tie_word_embeddings=True)
    save(model, tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    old = {
        name.removeprefix("transformer."): value
        for name, value in load_file(tmp_path / "new" / "model.safetensors").items()
    }
    old["h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    old["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    for folder in (write_file(tmp_path / "old", old, config), write_file(tmp_path / "bare", old)):
        checkpoint = Checkpoint.open(folder)
        assert len(delta_entries(checkpoint, Checkpoint.open(model))) == len(list(model.parameters()))
    assert Checkpoint.open(tmp_path / "old").names == Checkpoint.open(model).names
    assert Checkpoint.open(tmp_path / "old").tied == Checkpoint.open(model).tied


@pytest.mark.parametrize("wrapped_side", ["base", "tuned"])
@pytest.mark.parametrize("prefix", ["base_model.model.", "_orig_mod.", "module.", "model."])
def test_a_wrapper_prefix_on_one_side_does_not_matter(prefix, wrapped_side, tmp_path):
    base, tuned = tiny_model("llama_tied"), tuned_model("llama_tied")
    expected = list(expected_deltas(base, tuned).values())
    states = {}
    for side, model in (("base", base), ("tuned", tuned)):
        start = prefix if side == wrapped_side else ""
        states[side] = {start + name: weight.data for name, weight in model.named_parameters()}
    pair = [Checkpoint.open(write_file(tmp_path / side, states[side])) for side in ("base", "tuned")]
    found = list(iter_deltas(*pair))
    assert [entry.name for entry, _ in found] == pair[0].names
    by_name = dict(zip([name for name, _ in base.named_parameters()], expected))
    for entry, change in found:
        short = entry.name.removeprefix(prefix) if wrapped_side == "base" else entry.name
        assert torch.equal(change, by_name[short])


def test_a_model_inside_another_module_is_found(tmp_path):
    inner = tuned_model("llama_tied")
    outer = torch.nn.Module()
    outer.policy = inner
    base = tiny_model("llama_tied")
    save(base, tmp_path / "base")
    found = {e.name: change for e, change in iter_deltas(Checkpoint.open(tmp_path / "base"), Checkpoint.open(outer))}
    _assert_equal(found, expected_deltas(base, inner))


def test_a_headless_base_takes_the_tied_model(tmp_path):
    model = tiny_model("llama_tied")
    model.model.save_pretrained(tmp_path / "inner")
    entries = delta_entries(Checkpoint.open(tmp_path / "inner"), Checkpoint.open(tuned_model("llama_tied")))
    assert [entry.name for entry in entries] == [name for name, _ in model.model.named_parameters()]


def test_an_equal_head_stored_beside_the_embedding_is_tied(tmp_path):
    base, tuned = tiny_model("llama_tied"), tuned_model("llama_tied")
    store_head_too(save(tuned, tmp_path / "tuned"))
    checkpoint = Checkpoint.open(tmp_path / "tuned")
    assert checkpoint.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    found = {entry.name: change for entry, change in iter_deltas(Checkpoint.open(base), checkpoint)}
    _assert_equal(found, expected_deltas(base, tuned))


def test_an_equal_head_of_an_untied_fine_tune_fits_a_tied_base(tmp_path):
    store_head_too(save(tuned_model("llama_tied"), tmp_path / "tuned"))
    (tmp_path / "tuned" / "config.json").unlink()
    tuned = Checkpoint.open(tmp_path / "tuned")
    assert "lm_head.weight" in tuned.names
    base = Checkpoint.open(tiny_model("llama_tied"))
    assert [entry.name for entry in delta_entries(base, tuned)] == base.names


def test_experts_keep_the_layout_of_their_file(tmp_path):
    arguments = {**ARCHITECTURES["llama"][1], "num_local_experts": 2, "num_experts_per_tok": 1}
    models = []
    for name in ("base", "tuned"):
        models.append(AutoModelForCausalLM.from_config(MixtralConfig(**arguments)))
        models[-1].save_pretrained(tmp_path / name)
    folders = Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "tuned")
    stored = [load_file(tmp_path / name / "model.safetensors") for name in ("base", "tuned")]
    found = {entry.name: change for entry, change in iter_deltas(*folders)}
    # The router is only renamed, the experts would be stacked.
    names = {name: name.replace("block_sparse_moe.gate.", "mlp.gate.") for name in stored[0]}
    assert found.keys() == set(names.values())
    assert all(torch.equal(found[name], stored[1][key] - stored[0][key]) for key, name in names.items())
    with pytest.raises(DeltaError, match="both as folders or both as live models"):
        delta_entries(folders[0], Checkpoint.open(models[1]))


MEMORY = """
import sys
import torch
from hf_ext.merging.deltas import Checkpoint, iter_deltas

def field(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

base, tuned = Checkpoint.open(sys.argv[1]), Checkpoint.open(sys.argv[2])
next(iter_deltas(base, tuned, ["model.layers.0.mlp.up_proj.bias"]))
start = field("VmRSS:")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the high-water mark starts again from here
for entry, change in iter_deltas(base, tuned):
    change.sum()
print(field("VmHWM:") - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_walking_two_checkpoints_needs_four_tensors_of_memory(tmp_path):
    size, count, per_shard = 16 * 2**20, 16, 4
    for value, side in enumerate(("base", "tuned")):
        (tmp_path / side).mkdir()
        weight_map = {}
        for shard in range(count // per_shard):
            layers = range(shard * per_shard, (shard + 1) * per_shard)
            tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.full((1024, 4096), value + 0.5) for i in layers}
            if shard == 0:
                tensors["model.layers.0.mlp.up_proj.bias"] = torch.ones(4)
            name = f"model-{shard}.safetensors"
            save_file(tensors, tmp_path / side / name)
            weight_map |= dict.fromkeys(tensors, name)
        (tmp_path / side / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "base"), str(tmp_path / "tuned")]
    # Below 32 MB, glibc keeps one freed block for itself unless the threshold is fixed.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    # One tensor of each side (mapped pages count, too), the copy being made, and the one the loop still holds.
    assert 3 * size < peak < 4 * size + 8 * 2**20, f"{peak / size:.2f} tensors"


def _fingerprint(model, dtype=None):
    return fingerprint((name, weight.data.to(dtype or weight.dtype)) for name, weight in model.named_parameters())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16])
def test_a_base_is_recognised_in_every_precision(stored, loaded):
    model = tiny_model("llama").to(stored)
    mark = _fingerprint(model)
    assert matches(mark, ((name, weight.data.to(loaded)) for name, weight in model.named_parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fine_tune_and_another_model_are_not_the_base(dtype):
    mark = _fingerprint(tiny_model("llama"))
    for other in (tuned_model("llama"), tiny_model("llama", seed=1), tiny_model("mistral", seed=1)):
        assert not matches(mark, ((name, weight.data.to(dtype)) for name, weight in other.named_parameters()))


def test_fingerprints_are_sixteen_digits_and_stay_what_they_are():
    tensors = [("a.weight", torch.arange(3000.0).reshape(30, 100)), ("a.bias", torch.linspace(-1, 1, 7))]
    assert fingerprint(tensors) == {"bfloat16": "9cc24f8fbb51ca3d", "float16": "aac8c72cbe9fa530"}


def test_a_fingerprint_counts_name_shape_and_order():
    weight = torch.randn(6, 4)
    marks = [
        fingerprint(tensors)["bfloat16"]
        for tensors in (
            [("a", weight), ("b", weight)],
            [("b", weight), ("a", weight)],
            [("a", weight)],
            [("a", weight.reshape(4, 6))],
            [("c", weight)],
            [],
        )
    ]
    assert len(set(marks)) == len(marks)


def test_a_fingerprint_depends_on_values_not_on_memory_layout():
    weight = torch.randn(300, 200)
    assert fingerprint([("a", weight.t().contiguous().t())]) == fingerprint([("a", weight)])
    assert fingerprint([("a", torch.nn.Parameter(weight))]) == fingerprint([("a", weight)])
    for position in (0, -1):
        other = weight.clone()
        other.view(-1)[position] += 1
        assert fingerprint([("a", other)]) != fingerprint([("a", weight)])


def test_a_fingerprint_takes_scalars_and_empty_tensors():
    marks = [fingerprint([("a", torch.tensor(value))])["float16"] for value in (1.0, 2.0)]
    assert marks[0] != marks[1]
    assert len(fingerprint([("a", torch.empty(0, 3))])["float16"]) == 16


def test_folder_and_model_have_one_fingerprint(tmp_path):
    model = tiny_model("gpt_neox")
    folder = Checkpoint.open(save(model, tmp_path / "a", max_shard_size="60KB"))
    mark = fingerprint((name, folder.tensor(name)) for name in folder.names)
    assert mark == _fingerprint(model)
    assert not matches({}, ((name, folder.tensor(name)) for name in folder.names))


def _refused(base, tuned, *parts):
    """`delta_entries`, `delta` and `iter_deltas` refuse the pair, each with every part in the message."""
    base, tuned = (item if isinstance(item, Checkpoint) else Checkpoint.open(item) for item in (base, tuned))
    for call in (
        lambda: delta_entries(base, tuned),
        lambda: delta(base, tuned, base.names[0]),
        lambda: iter_deltas(base, tuned),
    ):
        with pytest.raises(DeltaError) as caught:
            call()
        for part in (*parts, "expected"):
            assert part.lower() in str(caught.value).lower(), str(caught.value)


def test_the_error_is_a_value_error_of_the_library():
    assert issubclass(DeltaError, HfExtError)
    assert issubclass(DeltaError, ValueError)


def test_missing_tensors_are_named_with_their_side():
    base, tuned = tiny_model("llama"), tiny_model("llama")
    del base.model.layers[1].mlp.up_proj
    del tuned.model.norm
    _refused(base, tuned, "model.layers.1.mlp.up_proj.weight only in the tuned", "model.norm.weight only in the base")


def test_only_the_first_names_of_many_are_listed():
    _refused(tiny_model("llama"), tiny_model("llama", num_hidden_layers=4), "only in the tuned", "and 13 more")


def test_other_architectures_have_nothing_in_common():
    _refused(tiny_model("llama"), tiny_model("gpt2"), "no layer in common", "same architecture")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_adapter_has_to_be_merged_first():
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    _refused(tiny_model("llama"), peft.get_peft_model(tiny_model("llama"), config), "lora_", "merge_and_unload()")


@pytest.mark.parametrize("arch", ["llama_tied", "llama_untied"])
def test_a_resized_vocabulary_is_refused_with_the_rows(arch):
    tuned = tiny_model(arch)
    tuned.resize_token_embeddings(136)
    _refused(
        tiny_model(arch), tuned, "from 128 to 136 rows", "model.embed_tokens.weight", "resize_token_embeddings(136)"
    )


def test_other_shapes_are_refused_by_name():
    tuned = tiny_model("llama", intermediate_size=112)
    _refused(tiny_model("llama"), tuned, "model.layers.0.mlp.gate_proj.weight (96, 64) -> (112, 64)")


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(dtype, side, tmp_path):
    state = _state(model__q_proj__weight=torch.zeros(4, 4), model__norm__weight=torch.ones(4))
    packed = {**state, "model.q_proj.weight": torch.zeros(4, 4).to(dtype)}
    plain = write_file(tmp_path / "plain", state)
    other = write_file(tmp_path / "packed", packed, {"quantization_config": {"quant_method": "bitsandbytes"}})
    pair = (other, plain) if side == "base" else (plain, other)
    _refused(*pair, f"the {side} checkpoint", "model.q_proj.weight", "bitsandbytes", f"unquantised {side} model")


def test_gptq_files_are_refused_by_what_they_store(tmp_path):
    plain = write_file(tmp_path / "plain", _state(q_proj__weight=torch.zeros(4, 4)))
    packed = write_file(tmp_path / "gptq", _state(q_proj__qweight=torch.zeros(4, 4, dtype=torch.int32)))
    _refused(plain, packed, "q_proj.qweight as int32", "unquantised tuned model")


def test_a_live_model_with_codes_in_buffers_is_refused_by_its_config():
    tuned = tiny_model("llama")
    for layer in tuned.model.layers:
        del layer.self_attn.q_proj
    tuned.config.quantization_config = {"quant_method": "gptq"}
    _refused(tiny_model("llama"), tuned, "quantised with gptq", "unquantised tuned model")


def test_an_own_head_against_a_tied_one_is_refused_both_ways(tmp_path):
    tied, own = tiny_model("llama_tied"), tiny_model("llama_untied")
    _refused(tied, own, "lm_head.weight is a weight of its own in the tuned", "tie_word_embeddings=False")
    _refused(own, tied, "lm_head.weight is a weight of its own in the base", "tie_word_embeddings=False")
    folder = store_head_too(save(tied, tmp_path / "a"), head=torch.randn(128, 64))
    _refused(tiny_model("llama_tied"), folder, "lm_head.weight is a weight of its own in the tuned")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_values_that_are_not_finite_are_refused(side, value):
    models = {"base": tiny_model("llama"), "tuned": tuned_model("llama")}
    models[side].model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    base, tuned = (Checkpoint.open(models[name]) for name in ("base", "tuned"))
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(DeltaError, match=rf"{name} of the {side} checkpoint .* NaN or infinite values \(1 "):
        delta(base, tuned, name)
    with pytest.raises(DeltaError, match=name):
        list(iter_deltas(base, tuned))
    assert delta(base, tuned, "model.norm.weight").isfinite().all()


def test_a_difference_beyond_float32_is_refused(tmp_path):
    base = Checkpoint.open(write_file(tmp_path / "a", {"l.weight": torch.full((2, 2), -3e38)}))
    tuned = Checkpoint.open(write_file(tmp_path / "b", {"l.weight": torch.full((2, 2), 3e38)}))
    with pytest.raises(DeltaError, match="l.weight differs by more than float32 can hold"):
        delta(base, tuned, "l.weight")


def test_unknown_names_are_refused_before_anything_is_read():
    base, tuned = Checkpoint.open(tiny_model("llama")), Checkpoint.open(tuned_model("llama"))
    for call in (lambda: delta(base, tuned, "nope"), lambda: iter_deltas(base, tuned, ["model.norm.weight", "nope"])):
        with pytest.raises(DeltaError, match="'nope' is not a weight of"):
            call()
    with pytest.raises(DeltaError, match="has no tensor 'nope'"):
        base.tensor("nope")
