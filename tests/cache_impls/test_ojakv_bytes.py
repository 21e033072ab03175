"""What an OjaKV cache weighs, how a budget becomes ranks, and starting bases from a calibration file."""

import math

import pytest
import torch
from safetensors.torch import save_file
from transformers import Cache, DynamicCache

import hf_ext
from hf_ext import OjaKVCache, OjaKVConfig
from hf_ext.cache_impls.calibration import Calibration
from hf_ext.tiny import tiny_model
from tests.cache_impls.helpers import SMALL, generate, lossless_model, prompts, reachable_bytes, small_cache


def check_bytes(cache):
    tiers = cache.tier_bytes()
    assert cache.nbytes() == reachable_bytes(cache)
    assert cache.nbytes() == sum(tiers.values())
    return tiers


def dense_bytes(model, rows, length):
    config, size = model.config, next(model.parameters()).element_size()
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * rows * length * config.num_key_value_heads * dim * size


def wide_model(dtype=torch.float32, **overrides):
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    return tiny_model("llama", **{**sizes, "num_hidden_layers": 2, **overrides}).to(dtype)


KINDS = {
    "default": {},
    "rotate": {"coefficients": "rotate"},
    "hebbian": {"update_rule": "hebbian"},
    "none": {"update_rule": "none"},
    "global": {"allocation": "global"},
    "one_version": {"max_versions": 1},
    "before_rotation": {"key_space": "pre"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pad", [0, 11])
@torch.no_grad()
def test_bytes_are_the_storages_that_can_be_reached(kind, pad):
    model, inputs = tiny_model("llama"), prompts(length=150, pad=pad)
    cache = small_cache(model, ratio=0.6, anchor_score="residual", drift_tolerance=0.0, **KINDS[kind])
    assert cache.nbytes() == 0
    model(**inputs, past_key_values=cache)
    tiers = check_bytes(cache)
    assert {"sinks", "anchors", "newest", "low_rank", "bases"} <= set(tiers)
    cache.reset()
    assert cache.nbytes() == 0
    generate(model, cache, inputs, max_new_tokens=40)
    assert check_bytes(cache)["low_rank"] > tiers["low_rank"]
    cache.reset()
    generate(model, cache, inputs, max_new_tokens=25, num_beams=3)
    check_bytes(cache)


@pytest.mark.parametrize("arch", ["gemma2", "gpt2", "falcon", "qwen3"])
def test_bytes_are_the_storages_that_can_be_reached_on_other_models(arch):
    model = tiny_model(arch)
    cache = small_cache(model, ratio=0.6, anchor_score="residual")
    generate(model, cache, prompts(length=150))
    assert ("other" in check_bytes(cache)) == (arch == "gemma2")


def test_bytes_include_a_calibration(tmp_path):
    model, inputs = tiny_model("llama"), prompts(length=150, pad=0)
    Calibration.from_model(model, [inputs["input_ids"]]).save(tmp_path / "bases.safetensors")
    settings = {"calibration": str(tmp_path / "bases.safetensors"), "update_rule": "none", "ratio": 0.6}
    cache = small_cache(model, anchor_score="residual", **settings)
    generate(model, cache, inputs)
    check_bytes(cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1024, 2048, 4096])
@torch.no_grad()
def test_a_ratio_is_the_share_of_the_dense_bytes(dtype, length):
    model = wide_model(dtype)
    dense = dense_bytes(model, 1, length)
    inputs = prompts(rows=1, length=length, pad=0)["input_ids"]
    for ratio in (0.6, 0.4):
        for allocation in ("equal", "layer", "global"):
            config = OjaKVConfig(ratio=ratio, anchor_score="residual", allocation=allocation)
            cache = OjaKVCache(model, config)
            model(inputs, past_key_values=cache, logits_to_keep=1)
            tiers = check_bytes(cache)
            assert cache.nbytes() <= ratio * dense, f"{allocation}: {cache.nbytes() / dense:.3f} of the dense cache"
            assert cache.nbytes() >= 0.93 * ratio * dense, "the budget is not used"
            if length >= 2048:
                assert tiers.get("slack", 0) <= 0.05 * cache.nbytes()


@torch.no_grad()
def test_the_dense_cache_of_the_library_weighs_what_the_ratio_refers_to():
    model, cache = wide_model(), DynamicCache()
    model(prompts(rows=2, length=100, pad=0)["input_ids"], past_key_values=cache)
    assert isinstance(cache, Cache)
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    assert held == dense_bytes(model, 2, 100)


@pytest.mark.parametrize("allocation", ["equal", "layer", "global"])
@torch.no_grad()
def test_slack_stays_small_while_tokens_are_generated(allocation):
    model = wide_model()
    cache = OjaKVCache(model, OjaKVConfig(ratio=0.5, anchor_score="residual", allocation=allocation))
    model(prompts(rows=1, length=2048, pad=0)["input_ids"], past_key_values=cache, logits_to_keep=1)
    for step in range(150):
        model(torch.tensor([[3 + step % 90]]), past_key_values=cache)
        if step % 10 == 0:
            assert check_bytes(cache).get("slack", 0) <= 0.05 * cache.nbytes(), f"step {step}: {cache.tier_bytes()}"


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("allocation", ["equal", "layer", "global"])
@torch.no_grad()
def test_max_bytes_is_respected_and_used(rows, allocation):
    model = wide_model()
    for share in (0.7, 0.45):
        limit = int(share * dense_bytes(model, rows, 1024))
        config = OjaKVConfig(max_bytes=limit, anchor_score="residual", allocation=allocation)
        cache = OjaKVCache(model, config)
        model(prompts(rows=rows, length=1024, pad=0)["input_ids"], past_key_values=cache, logits_to_keep=1)
        assert 0.9 * limit <= cache.nbytes() <= limit


@torch.no_grad()
def test_a_byte_budget_below_the_full_rank_tokens_is_refused_with_the_way_out():
    model = wide_model()
    cache = OjaKVCache(model, OjaKVConfig(max_bytes=1000, anchor_score="residual"))
    with pytest.raises(hf_ext.ConfigError, match=r"max_bytes=1000 .*1024 tokens; raise it, or lower sink_tokens"):
        model(prompts(rows=1, length=1024, pad=0)["input_ids"], past_key_values=cache)


@torch.no_grad()
def ranks(model, **settings):
    cache = OjaKVCache(model, OjaKVConfig(ratio=0.4, anchor_score="residual", **settings))
    model(prompts(rows=2, length=1024, pad=0)["input_ids"], past_key_values=cache, logits_to_keep=1)
    return [(p.key_basis.shape[-1], p.value_basis.shape[-1]) for layer in cache.kv_layers for p in layer.segments]


def test_allocation_gives_rank_to_the_stream_and_layer_that_need_it():
    model = wide_model()
    with torch.no_grad():
        attention = model.model.layers[0].self_attn
        attention.v_proj.weight[3:] = 0  # values of the first layer span three dimensions
    equal, layer, globally = (ranks(model, allocation=kind) for kind in ("equal", "layer", "global"))
    assert max(map(max, equal)) - min(map(min, equal)) <= 1
    assert layer[0][1] <= 4
    assert layer[0][0] > equal[0][0] + 5
    assert layer[1][0] + layer[1][1] <= sum(equal[1]) + 1
    assert globally[0][1] <= 4
    assert sum(globally[1]) > sum(layer[1]), "the second layer gets what the first does not need"


@torch.no_grad()
def test_global_allocation_leaves_no_more_energy_behind_than_equal_ranks():
    model, inputs = wide_model(), prompts(rows=1, length=1024, pad=0)["input_ids"]
    exact, lost = DynamicCache(), {}
    model(inputs, past_key_values=exact)
    for kind in ("equal", "layer", "global"):
        cache = OjaKVCache(model, OjaKVConfig(ratio=0.4, anchor_ratio=0.0, allocation=kind))
        model(inputs, past_key_values=cache)
        pairs = (
            (r, d) for a, b in zip(cache.layers, exact.layers) for r, d in zip(a.materialize(), (b.keys, b.values))
        )
        lost[kind] = sum(float((rebuilt - whole).square().sum()) for rebuilt, whole in pairs)
    assert lost["global"] <= 1.02 * lost["layer"] <= 1.05 * lost["equal"]
    assert lost["global"] < lost["equal"]


@torch.no_grad()
def test_ratios_of_the_rank_are_those_of_the_paper():
    model = wide_model()
    cache = OjaKVCache(model, OjaKVConfig(key_ratio=0.3, value_ratio=0.61, anchor_score="residual"))
    model(prompts(rows=1, length=1024, pad=0)["input_ids"], past_key_values=cache)
    shapes = {(p.key_basis.shape[-1], p.value_basis.shape[-1]) for layer in cache.kv_layers for p in layer.segments}
    assert shapes == {(round(0.3 * 64), round(0.61 * 64))}


def captured(model, batches):
    """Queries, keys and values of every layer as its attention sees them."""
    seen = []

    def record(module, query, key, value, mask, **kwargs):
        seen.append((query.detach(), key.detach(), value.detach()))
        return original(module, query, key, value, mask, **kwargs)

    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as original

    AttentionInterface.register("recorded", record)
    model.config._attn_implementation_internal = "recorded"
    try:
        with torch.no_grad():
            for ids in batches:
                model(ids, use_cache=False)
    finally:
        model.config._attn_implementation_internal = "sdpa"
        AttentionInterface._global_mapping.pop("recorded")
    return seen


def test_calibration_is_the_pca_of_queries_with_keys_and_of_values(tmp_path):
    model = tiny_model("llama")
    batches = [prompts(rows=2, length=60, pad=0, seed=seed)["input_ids"] for seed in (1, 2)]
    calibration = Calibration.from_model(model, batches)
    seen = captured(model, batches)
    for layer in range(2):
        parts = seen[layer::2]
        for head in range(2):
            keys = [p for q, k, _ in parts for p in (q[:, 2 * head : 2 * head + 2], k[:, head : head + 1])]
            values = [v[:, head] for _, _, v in parts]
            for stream, rows in enumerate((keys, values)):
                matrix = torch.cat([r.reshape(-1, 16) for r in rows]).double()
                singular = torch.linalg.svdvals(matrix).square().float()
                torch.testing.assert_close(calibration.spectra[layer][stream][head], singular, atol=1e-2, rtol=1e-3)
                basis = calibration.bases[layer][stream][head].double()[:, :5]
                kept = float((matrix @ basis).square().sum())
                assert kept == pytest.approx(float(singular[:5].sum()), rel=1e-4)
    calibration.save(tmp_path / "deep" / "bases.safetensors")
    loaded = Calibration.load(tmp_path / "deep" / "bases.safetensors")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["bases.safetensors"]
    for old, new in ((calibration.bases, loaded.bases), (calibration.spectra, loaded.spectra)):
        assert all(torch.equal(a, b) for x, y in zip(old, new) for a, b in zip(x, y))


def test_the_rule_none_uses_the_calibrated_bases(tmp_path):
    model, path = tiny_model("llama"), str(tmp_path / "bases.safetensors")
    calibration = Calibration.from_model(model, [prompts(length=60, pad=0, seed=1)["input_ids"]])
    calibration.save(path)
    inputs = prompts(length=150)
    settings = {"key_ratio": 0.5, "value_ratio": 0.5, "anchor_score": "residual"}
    cache = small_cache(model, update_rule="none", calibration=path, **settings)
    generate(model, cache, inputs)
    for layer, bases in zip(cache.kv_layers, calibration.bases):
        (segment,) = layer.segments
        for found, given in zip((segment.key_basis, segment.value_basis), bases):
            assert torch.equal(found, given[..., :8].expand_as(found))


def test_calibration_of_another_model_or_no_calibration_is_refused(tmp_path):
    model, path = tiny_model("llama"), str(tmp_path / "bases.safetensors")
    batch = [prompts(length=60, pad=0)["input_ids"]]
    Calibration.from_model(tiny_model("llama_mqa"), batch).save(path)
    with pytest.raises(hf_ext.ConfigError, match=r"2 layers, 1 heads.*has 2, 2 and 16.*from_model"):
        small_cache(model, calibration=path)
    with pytest.raises(hf_ext.ConfigError, match=r"does not exist; write it with Calibration\.save"):
        small_cache(model, calibration=str(tmp_path / "missing.safetensors"))
    (tmp_path / "text").write_text("not tensors")
    with pytest.raises(hf_ext.ConfigError, match="cannot be read"):
        small_cache(model, calibration=str(tmp_path / "text"))
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(hf_ext.ConfigError, match="not a calibration file"):
        small_cache(model, calibration=str(tmp_path / "other.safetensors"))
    with pytest.raises(hf_ext.ConfigError, match="no batch"):
        Calibration.from_model(model, [])
    with pytest.raises(hf_ext.UnsupportedModelError, match="queries cannot be seen"):
        Calibration.from_model(tiny_model("falcon"), batch)


def test_an_energy_budget_compresses_a_low_rank_model_to_its_rank():
    model, inputs = lossless_model("llama"), prompts(length=150, pad=0)
    cache = small_cache(model, energy=0.99999, anchor_score="residual")
    expected = generate(model, None, inputs)
    assert generate(model, cache, inputs).tolist() == expected.tolist()
    for layer in cache.kv_layers:
        for segment in layer.segments:
            assert segment.key_basis.shape[-1] <= 8
            assert segment.value_basis.shape[-1] <= 8


def test_anchors_are_counted_over_the_middle():
    model = tiny_model("llama")
    cache = small_cache(model, key_ratio=0.5, value_ratio=0.5, anchor_ratio=0.3, anchor_score="residual")
    with torch.no_grad():
        model(**prompts(length=150), past_key_values=cache)
    middle = 150 - SMALL["sink_tokens"] - SMALL["recent_tokens"]
    assert {layer.anchors for layer in cache.kv_layers} == {math.floor(0.3 * middle)}
