"""The PEFT type OSD: what a decoded adapter computes, saves, merges and refuses."""

import copy
import functools
import pickle
import warnings

import numpy as np
import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_ext
from hf_ext.errors import AdapterStateError, ArtifactError, BlobError, ConfigError, DeltaError, UnsupportedModelError
from hf_ext.merging.adapter_layer import OSDEmbedding, OSDLayer, OSDLinear, OSDOther
from hf_ext.merging.adapters import any_base, load_adapter
from hf_ext.merging.blob import Delta, Factor, LowRankTerm, SignTerm
from hf_ext.merging.compress import compress_delta
from hf_ext.merging.deltas import fingerprint
from hf_ext.merging.osd_artifact import OSDArtifact
from hf_ext.merging.osd_config import OSDConfig
from hf_ext.tiny import tiny_model

from .helpers import tuned_model


# transformers asks peft layers for an attribute it has deprecated itself.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

ARCHITECTURES = ("llama", "llama_tied", "gpt2", "opt", "gpt_neox")
IDS = torch.arange(1, 25).reshape(2, 12)
# "thin" signs are few enough to stay sparse rows, "signs" many enough to be dense.
BUDGETS = {"factors": 25_000, "signs": 30_000, "thin": 4_800}


@pytest.fixture(autouse=True, scope="module")
def _registered():
    with hf_ext.registered():
        yield


@functools.lru_cache
def artifact(arch, codec="factors", seed=1, others="code"):
    config = OSDConfig(
        budget=BUDGETS[codec], codec="signs" if codec == "thin" else codec, other_tensors=others, task_type="CAUSAL_LM"
    )
    return compress_delta(tiny_model(arch), tuned_model(arch, seed=seed), config, progress=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("osd")

    @functools.lru_cache
    def saved(arch, codec="factors", seed=1, others="code"):
        path = root / f"{arch}-{codec}-{seed}-{others}"
        artifact(arch, codec, seed, others).save_pretrained(path)
        return str(path)

    return saved


def with_deltas(arch, *added, dtype=torch.float32, **overrides):
    """The base with dense deltas added, one `(artifact, weight)` after another."""
    model = tiny_model(arch, **overrides)
    for name, parameter in model.named_parameters():
        for found, weight in added:
            if name in found.deltas:
                parameter.data += weight * torch.from_numpy(found.deltas[name].dense())
    return model.to(dtype)


@torch.no_grad()
def logits(model, ids=IDS, **kwargs):
    return model(ids, **kwargs).logits


def assert_same(one, other, atol=2e-5):
    # The tiny models' logits reach 20, so this is float32 rounding.
    torch.testing.assert_close(one, other, atol=atol, rtol=1e-5)


def layers(model):
    return [module for module in model.modules() if isinstance(module, OSDLayer)]


@pytest.mark.parametrize("codec", BUDGETS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_peft_model_is_the_base_with_the_decoded_deltas_added(arch, codec, folder):
    found = artifact(arch, codec)
    with warnings.catch_warnings():
        # Missing keys, tied embeddings, unknown types: nothing to warn of.
        warnings.simplefilter("error", UserWarning)
        model = PeftModel.from_pretrained(tiny_model(arch), folder(arch, codec))
        result = logits(model)
    expected = logits(with_deltas(arch, (found, 1)))
    assert_same(result, expected)
    assert (expected - logits(tiny_model(arch))).abs().max() > 0.05
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_every_kind_of_layer_and_every_way_to_hold_a_delta_takes_part(folder):
    kinds, held = set(), set()
    for codec in BUDGETS:
        for layer in layers(PeftModel.from_pretrained(tiny_model("opt"), folder("opt", codec))):
            kinds.add(type(layer))
            held |= {name for name in layer.other_param_names if len(getattr(layer, name))}
            held |= {"osd_A"} if layer.osd_A["default"].numel() else set()
    assert kinds == {OSDLinear, OSDEmbedding, OSDOther}
    assert held == {"osd_A", *OSDLayer.other_param_names}


def test_an_embedding_that_scales_scales_its_delta(folder):
    model = PeftModel.from_pretrained(tiny_model("gemma3_text"), folder("gemma3_text", "signs"))
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, OSDEmbedding)
    assert embedding.get_base_layer().embed_scale != 1
    assert_same(logits(model), logits(with_deltas("gemma3_text", (artifact("gemma3_text", "signs"), 1))))


@pytest.mark.parametrize(("arch", "codec"), [("llama_tied", "factors"), ("gpt2", "signs"), ("llama", "thin")])
def test_saving_writes_the_bytes_it_was_loaded_from(arch, codec, folder, tmp_path):
    model = PeftModel.from_pretrained(tiny_model(arch), folder(arch, codec))
    model.save_pretrained(tmp_path)
    before, after = (load_file(f"{path}/adapter_model.safetensors") for path in (folder(arch, codec), tmp_path))
    # PEFT writes whole embeddings beside an adapter that names them in target_modules.
    assert set(before) == set(after) == {"osd_blob", "osd_error"}
    assert torch.equal(before["osd_blob"], after["osd_blob"])
    assert torch.equal(before["osd_error"], after["osd_error"])
    again = PeftModel.from_pretrained(tiny_model(arch), tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert OSDArtifact.from_pretrained(tmp_path).config.tied == artifact(arch, codec).config.tied


@pytest.mark.parametrize("low", [True, False])
def test_loading_through_the_meta_device_changes_nothing(low, folder):
    model = PeftModel.from_pretrained(tiny_model("llama_tied"), folder("llama_tied"), low_cpu_mem_usage=low)
    assert_same(logits(model), logits(with_deltas("llama_tied", (artifact("llama_tied"), 1))))
    assert not any(tensor.is_meta for tensor in model.parameters())


def test_a_bfloat16_base_keeps_float32_factors(folder):
    for low in (True, False):
        base = tiny_model("llama").to(torch.bfloat16)
        model = PeftModel.from_pretrained(base, folder("llama"), low_cpu_mem_usage=low)
        factors = [layer.osd_B["default"] for layer in layers(model) if isinstance(layer, OSDLinear)]
        assert {factor.dtype for factor in factors} == {torch.float32}
        exact = logits(with_deltas("llama", (artifact("llama"), 1)))
        result = logits(model)
        assert result.dtype == torch.bfloat16
        # Against float32, no worse than twice what rounding the whole model costs.
        rounded = logits(with_deltas("llama", (artifact("llama"), 1), dtype=torch.bfloat16))
        assert (result.float() - exact).norm() < 2 * (rounded.float() - exact).norm()


def test_adapters_are_switched_disabled_and_deleted(folder):
    model = PeftModel.from_pretrained(tiny_model("llama"), folder("llama"), adapter_name="one")
    model.load_adapter(folder("llama", "thin", 2), adapter_name="two")
    one, two = artifact("llama"), artifact("llama", "thin", 2)
    expected = {"one": logits(with_deltas("llama", (one, 1))), "two": logits(with_deltas("llama", (two, 1)))}
    for name in ("two", "one"):
        model.set_adapter(name)
        assert_same(logits(model), expected[name])
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(tiny_model("llama")))
    model.base_model.set_adapter(["one", "two"])
    assert_same(logits(model), logits(with_deltas("llama", (one, 1), (two, 1))))
    model.set_adapter("two")
    model.delete_adapter("one")
    assert_same(logits(model), expected["two"])
    assert all(list(layer.osd_pieces) == ["two"] for layer in layers(model))


def test_status_knows_the_layers(folder):
    model = PeftModel.from_pretrained(tiny_model("llama"), folder("llama"))
    status = model.get_model_status()
    assert (status.peft_types, status.available_adapters, status.active_adapters) == (
        {"default": "OSD"},
        ["default"],
        ["default"],
    )
    assert status.num_adapter_layers == len(layers(model)) == len(artifact("llama").deltas)
    assert status.merged_adapters == []
    assert status.trainable_params == 0
    assert all(layer.available_adapters == ["default"] for layer in model.get_layer_status())
    assert repr(model).count("osd.OSDLinear") == 15


@pytest.mark.parametrize(("arch", "codec"), [("llama_tied", "factors"), ("gpt2", "thin"), ("opt", "signs")])
def test_a_row_of_a_mixed_batch_is_what_its_adapter_alone_gives(arch, codec, folder):
    model = PeftModel.from_pretrained(tiny_model(arch), folder(arch, codec), adapter_name="one")
    model.load_adapter(folder(arch, "factors", 2), adapter_name="two")
    ids = torch.arange(1, 49).reshape(4, 12)
    mixed = logits(model, ids, adapter_names=["one", "__base__", "two", "one"])
    alone = [logits(with_deltas(arch, (artifact(arch, codec), 1)), ids)]
    alone.append(logits(tiny_model(arch), ids))
    alone.append(logits(with_deltas(arch, (artifact(arch, "factors", 2), 1)), ids))
    assert_same(mixed, torch.stack([alone[0][0], alone[1][1], alone[2][2], alone[0][3]]))
    assert_same(logits(model, ids), alone[0])


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_takes_an_adapter_for_each_row(beams, folder):
    model = PeftModel.from_pretrained(tiny_model("llama"), folder("llama"), adapter_name="one")
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    mixed = model.generate(input_ids=IDS, adapter_names=["__base__", "one"], **options)
    assert torch.equal(mixed[0], tiny_model("llama").generate(IDS, **options)[0])
    assert torch.equal(mixed[1], with_deltas("llama", (artifact("llama"), 1)).generate(IDS, **options)[1])
    assert all(layer.row_adapters is None for layer in layers(model))


def test_mixed_batches_refuse_what_has_no_answer(folder):
    model = PeftModel.from_pretrained(tiny_model("llama"), folder("llama"))
    with pytest.raises(ValueError, match=r"\['other'\]; expected \['default'\]"):
        logits(model, adapter_names=["default", "other"])
    with pytest.raises(UnsupportedModelError, match="2 rows for 3 adapter_names"):
        logits(model, adapter_names=["default"] * 3)
    with pytest.raises(ValueError, match="training mode"):
        model.train()(IDS, adapter_names=["default"] * 2)
    model.eval().merge_adapter()
    with pytest.raises(AdapterStateError, match="unmerge_adapter"):
        logits(model, adapter_names=["default"] * 2)


@pytest.mark.parametrize(("arch", "codec"), [("llama_tied", "factors"), ("gpt2", "thin"), ("opt", "signs")])
def test_merging_adds_each_delta_once_and_unmerging_takes_it_out(arch, codec, folder):
    model = PeftModel.from_pretrained(tiny_model(arch), folder(arch, codec))
    expected = with_deltas(arch, (artifact(arch, codec), 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.merge_adapter(safe_merge=True)
    assert_same(logits(model), logits(expected))
    model.unmerge_adapter()
    for name, weight in tiny_model(arch).named_parameters():
        live = model.get_base_model().get_submodule(name.rpartition(".")[0])
        assert torch.equal(getattr(live, name.split(".")[-1]), weight), name
    assert_same(logits(model), logits(expected))
    merged = model.merge_and_unload()
    assert not layers(merged)
    for (name, weight), (_, wanted) in zip(merged.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(weight, wanted, atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_two_adapters_gives_back_the_very_bits(dtype, folder):
    model = PeftModel.from_pretrained(tiny_model("llama_tied").to(dtype), folder("llama_tied"), adapter_name="one")
    model.load_adapter(folder("llama_tied", "signs", 2), adapter_name="two")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    model.merge_adapter(["one"])
    with pytest.warns(UserWarning, match="additionally merging two"):
        model.merge_adapter(["two"])
    changed = [name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])]
    assert len(changed) == len(artifact("llama_tied", "signs", 2).deltas)
    model.unmerge_adapter()
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert not any(layer._before for layer in layers(model))


def test_a_head_that_was_untied_gets_the_delta_on_its_own_weight(folder):
    base = tiny_model("llama_tied")
    untied = tiny_model("llama_untied")
    untied.load_state_dict(base.state_dict())
    expected = logits(with_deltas("llama_tied", (artifact("llama_tied"), 1)))
    model = PeftModel.from_pretrained(untied, folder("llama_tied"))
    assert_same(logits(model), expected)
    assert_same(logits(model.merge_and_unload()), expected)


def test_merging_the_head_alone_merges_the_weight_it_shares(folder):
    model = PeftModel.from_pretrained(tiny_model("llama_tied"), folder("llama_tied"))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    head.merge()
    assert embedding.merged
    assert head.get_base_layer().weight is embedding.get_base_layer().weight
    assert_same(logits(model), logits(with_deltas("llama_tied", (artifact("llama_tied"), 1))))


def test_safe_merge_refuses_overflow_and_changes_nothing():
    base = tiny_model("llama").to(torch.float16)
    name = "model.layers.0.mlp.down_proj.weight"
    weight = base.get_parameter(name).clone()
    delta = Delta(tuple(weight.shape), (SignTerm(0, 1e5, np.zeros(8, dtype=bool)),))
    load_adapter(base, _by_hand({name: delta}))
    layer = base.get_submodule(name.removesuffix(".weight"))
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, weight)
    assert not layer.merged


def _by_hand(deltas, **settings):
    modules = sorted({name.rpartition(".")[0] for name in deltas})
    return OSDArtifact(deltas, OSDConfig(target_modules=modules, **settings))


def test_signs_that_share_places_add_up_as_rows_and_dense():
    shape, generator = (40, 30), np.random.default_rng(0)
    for count in (60, 400):
        terms = tuple(SignTerm(3, 0.5 + i, generator.random(count) < 0.5) for i in range(2))
        factors = [Factor.of_floats(generator.standard_normal((2, side)), 32) for side in shape]
        delta = Delta(shape, (*terms, LowRankTerm(*factors)))
        linear, rows = torch.nn.Linear(30, 40), torch.nn.Embedding(40, 30)
        model = torch.nn.ModuleDict({"linear": linear, "rows": rows})
        load_adapter(model, _by_hand({"linear.weight": delta, "rows.weight": delta}))
        x, ids, dense = torch.randn(2, 3, 30), torch.tensor([[0, 39, 7], [7, 7, 1]]), torch.from_numpy(delta.dense())
        assert ("default" in model["linear"].osd_values) == (count == 60)
        assert_same(model["linear"](x), linear(x) + x @ dense.T)
        assert_same(model["rows"](ids), rows(ids) + dense[ids])
        assert torch.equal(model["linear"].get_delta_weight("default"), dense)


def test_gradients_pass_through_to_the_inputs(folder):
    model = PeftModel.from_pretrained(tiny_model("llama"), folder("llama", "thin"))
    grads = []
    for one in (model, with_deltas("llama", (artifact("llama", "thin"), 1)).requires_grad_(False)):
        x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        one(inputs_embeds=x).logits.square().mean().backward()
        grads.append(x.grad)
    assert_same(*grads)


def test_a_model_can_be_copied_and_pickled(folder):
    model = load_adapter(tiny_model("llama_tied"), folder("llama_tied", "thin"))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), logits(model))
        head, embedding = twin.get_output_embeddings(), twin.get_input_embeddings()
        assert head._source[0] is embedding is not model.get_input_embeddings()


def test_auto_peft_model_opens_base_and_adapter(tmp_path):
    for model, name in ((tiny_model("llama"), "base"), (tuned_model("llama"), "tuned")):
        model.save_pretrained(tmp_path / name)
    config = OSDConfig(budget=25_000, other_tensors="code", task_type="CAUSAL_LM")
    made = compress_delta(tmp_path / "base", tmp_path / "tuned", config, progress=False)
    made.save_pretrained(tmp_path / "adapter")
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert_same(logits(model), logits(with_deltas("llama", (made, 1))))
    with pytest.raises(AdapterStateError, match="hf_ext.load_adapter"):
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"))


def test_a_weighted_sum_is_exact_and_can_be_saved(folder, tmp_path):
    model = PeftModel.from_pretrained(tiny_model("llama_tied"), folder("llama_tied"), adapter_name="one")
    model.load_adapter(folder("llama_tied", "signs", 2), adapter_name="two")
    model.add_weighted_adapter(["one", "two"], [0.5, -1.0], "sum")
    expected = with_deltas("llama_tied", (artifact("llama_tied"), 0.5), (artifact("llama_tied", "signs", 2), -1.0))
    assert_same(logits(model), logits(with_deltas("llama_tied", (artifact("llama_tied"), 1))))
    model.set_adapter("sum")
    assert_same(logits(model), logits(expected))
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(tiny_model("llama_tied"), tmp_path / "sum")
    assert torch.equal(logits(again), logits(model))
    for adapters, weights, name in (
        (["one"], [1, 2], "x"),
        (["none"], [1], "x"),
        (["one"], [1], "sum"),
        ([], [], "x"),
    ):
        with pytest.raises(ConfigError, match="expected loaded adapters"):
            model.add_weighted_adapter(adapters, weights, name)
    with pytest.raises(ConfigError, match="cannot be stored"):
        model.add_weighted_adapter(["one"], [1e12], "x")
    with pytest.raises(ConfigError, match="add up fewer"):
        model.add_weighted_adapter(["one"] * 65, [1.0] * 65, "x")
    assert set(model.peft_config) == {"one", "two", "sum"}


@pytest.mark.parametrize(("arch", "modules"), [("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn", "mlp.c_proj"])])
def test_matrices_alone_convert_to_a_lora(arch, modules, tmp_path):
    config = OSDConfig(budget=9_000, codec="factors", other_tensors="drop", target_modules=modules)
    compress_delta(tiny_model(arch), tuned_model(arch), config, progress=False).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_model(arch), tmp_path)
    config, state = peft.convert_to_lora(model, rank=64)
    lora = get_peft_model(tiny_model(arch), config)
    peft.set_peft_model_state_dict(lora, state)
    assert_same(logits(lora), logits(model), atol=1e-4)
    assert (logits(model) - logits(tiny_model(arch))).abs().max() > 0.05


def test_more_than_matrices_does_not_convert_to_a_lora(folder):
    for layer in layers(PeftModel.from_pretrained(tiny_model("opt"), folder("opt", "signs"))):
        changes_bias = "bias" in layer.osd_pieces["default"]
        assert layer.supports_lora_conversion() == (isinstance(layer, OSDLinear) and not changes_bias)
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.convert_to_lora(load_adapter(tiny_model("llama"), artifact("llama")), rank=4)


def test_an_adapter_that_was_never_loaded_refuses_to_run(tmp_path):
    model = get_peft_model(tiny_model("llama"), OSDConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for use in (logits, lambda m: m.merge_adapter(), lambda m: m.save_pretrained(tmp_path), lambda m: m.generate(IDS)):
        with pytest.raises(AdapterStateError, match="never loaded"):
            use(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_model("llama")))
    with pytest.raises(ConfigError, match="names no module"):
        get_peft_model(tiny_model("llama"), OSDConfig())


def test_native_loading_never_gives_the_base_silently(folder):
    model = tiny_model("llama_tied")
    model.load_adapter(folder("llama_tied"))
    with pytest.raises(AdapterStateError, match="hf_ext.load_adapter"):
        logits(model)
    with pytest.raises(AdapterStateError, match="hf_ext.load_adapter"):
        model.generate(IDS, max_new_tokens=2)


@pytest.mark.parametrize("arch", ["llama_tied", "gpt2"])
def test_load_adapter_works_on_a_plain_model(arch, folder, tmp_path):
    model = tiny_model(arch)
    assert load_adapter(model, folder(arch), adapter_name="one") is model
    expected = with_deltas(arch, (artifact(arch), 1))
    assert_same(logits(model), logits(expected))
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(IDS, **options), expected.generate(IDS, **options))
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        load_adapter(model, artifact(arch, "thin", 2), adapter_name="two")
    assert_same(logits(model), logits(with_deltas(arch, (artifact(arch, "thin", 2), 1))))
    model.set_adapter("one")
    assert_same(logits(model), logits(expected))
    model.disable_adapters()
    assert torch.equal(logits(model), logits(tiny_model(arch)))
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    assert_same(logits(PeftModel.from_pretrained(tiny_model(arch), tmp_path)), logits(expected))
    with pytest.raises(ConfigError, match="already an adapter"):
        load_adapter(model, folder(arch), adapter_name="one")


def test_load_adapter_adds_to_a_peft_model_and_activates(folder):
    model = PeftModel.from_pretrained(tiny_model("llama"), folder("llama"))
    load_adapter(model, folder("llama", "thin", 2), adapter_name="two")
    assert model.active_adapters == ["two"]
    assert_same(logits(model), logits(with_deltas("llama", (artifact("llama", "thin", 2), 1))))


def test_another_base_is_refused_and_left_as_it_was(folder):
    other = tiny_model("llama", seed=5)
    before = logits(other)
    for load in (PeftModel.from_pretrained, load_adapter):
        with pytest.raises(DeltaError, match="not the base the delta was taken from .*force=True"):
            load(other, folder("llama"))
        assert not layers(other)
        assert not hasattr(other, "peft_config")
        assert torch.equal(logits(other), before)
    forced = logits(load_adapter(other, folder("llama"), force=True))
    with any_base():
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("llama", seed=5), folder("llama"))), forced)
    assert (forced - before).abs().max() > 0.05


def test_a_second_adapter_of_another_base_leaves_the_first(folder):
    model = PeftModel.from_pretrained(tiny_model("llama"), folder("llama"))
    before = logits(model)
    foreign = compress_delta(
        tiny_model("llama", seed=5),
        tuned_model("llama"),
        OSDConfig(budget=25_000, other_tensors="code"),
        progress=False,
    )
    with pytest.raises(DeltaError):
        load_adapter(model, foreign, adapter_name="two")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), before)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        load_adapter(model, folder("llama", "thin", 2), adapter_name="two")
    model.merge_adapter()
    with pytest.raises(AdapterStateError, match="unmerge_adapter"):
        model.load_adapter(folder("llama"), adapter_name="default")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_right_base_is_known_in_lower_precision(dtype, folder):
    load_adapter(tiny_model("llama").to(dtype), folder("llama"))


def test_other_shapes_and_architectures_are_named(folder):
    with pytest.raises(DeltaError, match=r"has shape \(130, 64\) in the model and \(128, 64\) in the delta"):
        load_adapter(tiny_model("llama", vocab_size=130), folder("llama"))
    deltas = {"model.norm.weight": Delta((64,)), "model.norm.bias": Delta((64,))}
    with pytest.raises(DeltaError, match="has no weight or bias model.norm.bias.*hf_ext.restore"):
        load_adapter(tiny_model("llama"), _by_hand(deltas))
    with pytest.raises(DeltaError, match="has no weight or bias model.embed_tokens.weight"):
        load_adapter(tiny_model("gpt2"), folder("llama"))


def test_quantised_foreign_and_weightless_modules_are_refused():
    name = "model.layers.0.mlp.down_proj.weight"
    found = _by_hand({name: Delta((64, 96))})
    model = tiny_model("llama")
    model.get_submodule(name.removesuffix(".weight")).weight = torch.nn.Parameter(
        torch.zeros(64, 96, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(UnsupportedModelError, match="down_proj is quantised"):
        load_adapter(model, found)
    lora = get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["down_proj"]))
    with pytest.raises(UnsupportedModelError, match="another PEFT method"):
        load_adapter(lora.get_base_model(), OSDArtifact(found.deltas, found.config), adapter_name="two")
    with pytest.raises(DeltaError, match=r"no module of .* is called model.layers.0.self_attn"):
        load_adapter(tiny_model("llama"), _by_hand({"model.layers.0.self_attn.weight": Delta((4, 4))}))


def test_modules_without_a_weight_that_share_a_name_are_passed_over():
    model = torch.nn.ModuleDict({"a": torch.nn.Module(), "b": torch.nn.Module()})
    model["a"].norm, model["b"].norm = torch.nn.LayerNorm(4), torch.nn.LayerNorm(4, elementwise_affine=False)
    factors = [Factor.of_floats(np.ones((1, side)), 32) for side in (4, 1)]
    found = OSDArtifact({"a.norm.weight": Delta((4,), (LowRankTerm(*factors),))}, OSDConfig(extra_modules=["norm"]))
    load_adapter(model, found)
    assert type(model["b"].norm) is torch.nn.LayerNorm
    x = torch.randn(3, 4)
    assert_same(model["a"].norm(x), 2 * torch.nn.functional.layer_norm(x, (4,)))


def test_what_is_no_osd_adapter_is_refused(tmp_path):
    with pytest.raises(ArtifactError):
        load_adapter(tiny_model("llama"), tmp_path)
    model = get_peft_model(tiny_model("llama"), OSDConfig(target_modules=["q_proj"]))
    with pytest.raises(BlobError, match="no 'osd_blob'"):
        peft.set_peft_model_state_dict(model, {"base_model.model.x.lora_A": torch.zeros(2)})


def test_a_fine_tune_that_changed_nothing_loads_and_is_the_base(tmp_path):
    made = compress_delta(tiny_model("llama"), tiny_model("llama"), OSDConfig(budget=9_000), progress=False)
    made.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert torch.equal(logits(model), logits(tiny_model("llama")))


def test_a_model_inside_another_is_found_by_the_end_of_its_names():
    inner = tiny_model("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    delta = Delta((96, 64), (SignTerm(1, 0.2, np.zeros(64, dtype=bool)),))
    stored = fingerprint([(name, inner.get_parameter(name))])
    outer = torch.nn.ModuleDict({"language": inner})
    load_adapter(outer, _by_hand({name: delta}, base_fingerprint=stored))
    assert torch.equal(inner.model.layers[1].mlp.up_proj.get_delta_weight("default"), torch.from_numpy(delta.dense()))
