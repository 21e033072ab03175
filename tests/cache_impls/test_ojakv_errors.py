"""Bad input to OjaKV: a typed error that names the value, what was expected and the way out, before any forward call."""

import contextlib

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import hf_ext
from hf_ext import CacheStateError, ConfigError, OjaKVCache, OjaKVConfig, PackedCache, UnsupportedModelError
from hf_ext.cache_impls.calibration import Calibration
from hf_ext.tiny import tiny_model
from tests.cache_impls.helpers import generate, prompts, small_cache, untouched


BAD_SETTINGS = [
    ({"ratio": 0.0}, r"ratio=0\.0 must lie in \(0, 1\]"),
    ({"ratio": 1.5}, r"ratio=1\.5 must lie in \(0, 1\]"),
    ({"ratio": -0.1}, r"ratio=-0\.1 must lie in \(0, 1\]"),
    ({"ratio": float("nan")}, "ratio=nan"),
    ({"ratio": "half"}, "ratio='half' must be a number or None"),
    ({"energy": 1.01}, r"energy=1\.01 must lie in \(0, 1\]"),
    ({"max_bytes": 0}, "max_bytes=0 must be positive"),
    ({"max_bytes": -5}, "max_bytes=-5 must be positive"),
    ({"max_bytes": 1.5}, r"max_bytes=1\.5 must be an integer"),
    ({"ratio": 0.5, "max_bytes": 1000}, "ratio=0.5 cannot be combined with max_bytes; set one"),
    ({"ratio": 0.5, "energy": 0.9}, "cannot be combined with energy"),
    ({"energy": 0.9, "key_ratio": 0.5, "value_ratio": 0.5}, "cannot be combined with key_ratio"),
    ({"key_ratio": 0.5}, "key_ratio=0.5 and value_ratio go together"),
    ({"value_ratio": 0.5}, "key_ratio=None and value_ratio go together"),
    ({"key_ratio": 0.0, "value_ratio": 0.5}, r"key_ratio=0\.0 must lie in \(0, 1\]"),
    ({"key_ratio": 0.5, "value_ratio": 2.0}, r"value_ratio=2\.0 must lie in \(0, 1\]"),
    ({"energy": 0.9, "allocation": "global"}, "allocation='global' needs ratio or max_bytes"),
    ({"allocation": "fair"}, "allocation='fair' must be one of 'equal', 'layer', 'global'"),
    ({"sink_tokens": -1}, "sink_tokens=-1 must not be negative"),
    ({"recent_tokens": -3}, "recent_tokens=-3 must not be negative"),
    ({"query_window": 0}, "query_window=0 must be at least 1"),
    ({"pool_window": 0}, "pool_window=0 must be at least 1"),
    ({"update_interval": 0}, "update_interval=0 must be at least 1"),
    ({"max_versions": 0}, "max_versions=0 must be at least 1"),
    ({"anchor_ratio": 1.0}, r"anchor_ratio=1\.0 must lie in \[0, 1\)"),
    ({"anchor_ratio": -0.1}, r"anchor_ratio=-0\.1 must lie in \[0, 1\)"),
    ({"prompt_learning_rate": -1.0}, r"prompt_learning_rate=-1\.0 must not be negative"),
    ({"decode_learning_rate": -1.0}, r"decode_learning_rate=-1\.0 must not be negative"),
    ({"drift_tolerance": -0.1}, r"drift_tolerance=-0\.1 must not be negative"),
    ({"forgetting": 1.0}, r"forgetting=1\.0 must lie in \[0, 1\)"),
    ({"update_rule": "sanger"}, "update_rule='sanger' must be one of 'exact', 'hebbian', 'oja', 'none'"),
    ({"normalize": "trace"}, "normalize='trace' must be"),
    ({"coefficients": "old"}, "coefficients='old' must be one of 'versioned', 'rotate'"),
    ({"prefill": "half"}, "prefill='half' must be one of"),
    ({"prefill": "compressed", "allocation": "global"}, "prefill='compressed'.*use allocation"),
    ({"key_space": "between"}, "key_space='between' must be one of 'post', 'pre'"),
    ({"anchor_score": "luck"}, "anchor_score='luck' must be one of"),
    ({"sink_tokens": 4.0}, r"sink_tokens=4\.0 must be an integer"),
    ({"sink_tokens": True}, "sink_tokens=True must be an integer"),
]


@pytest.mark.parametrize(
    ("settings", "message"), BAD_SETTINGS, ids=lambda v: str(v)[:60] if isinstance(v, dict) else ""
)
@pytest.mark.usefixtures("_registered")
def test_a_bad_setting_is_refused_by_the_config_and_by_name(settings, message):
    with pytest.raises(ConfigError, match=message):
        OjaKVConfig(**settings)
    model = tiny_model("llama")
    with untouched(model), pytest.raises(ConfigError, match=message):
        model.generate(**prompts(), cache_implementation="ojakv", cache_config=settings, max_new_tokens=2)


def test_a_config_changed_to_a_bad_value_is_refused_when_the_cache_is_made():
    config = OjaKVConfig(ratio=0.5)
    config.ratio = 3.0
    with pytest.raises(ConfigError, match=r"ratio=3\.0"):
        OjaKVCache(tiny_model("llama"), config)


@pytest.mark.parametrize("name", ["ojakv", "packed"])
@pytest.mark.usefixtures("_registered")
def test_an_unknown_setting_names_the_nearest_one(name):
    model = tiny_model("llama")
    message = "no setting 'ration' .did you mean 'ratio'?" if name == "ojakv" else "no settings; remove 'ration'"
    with untouched(model), pytest.raises(ConfigError, match=message):
        model.generate(**prompts(), cache_implementation=name, cache_config={"ration": 0.5}, max_new_tokens=2)


@pytest.mark.usefixtures("_registered")
def test_a_calibration_that_does_not_fit_is_refused_by_name(tmp_path):
    model, path = tiny_model("llama"), str(tmp_path / "bases.safetensors")
    Calibration.from_model(tiny_model("llama_head80"), [prompts()["input_ids"]]).save(path)
    for settings in ({"calibration": path}, {"calibration": str(tmp_path / "missing")}):
        with untouched(model), pytest.raises(ConfigError, match="calibration"):
            model.generate(**prompts(), cache_implementation="ojakv", cache_config=settings, max_new_tokens=2)


@pytest.mark.parametrize("arch", ["gpt_neox", "cohere", "gemma3_text", "smollm3", "phi"])
@pytest.mark.usefixtures("_registered")
def test_keys_before_rotation_are_refused_where_the_rotation_is_unknown(arch):
    model, settings = tiny_model(arch), {"key_space": "pre"}
    with untouched(model), pytest.raises(UnsupportedModelError, match=r"use key_space='post'"):
        model.generate(**prompts(), cache_implementation="ojakv", cache_config=settings, max_new_tokens=2)


@pytest.mark.parametrize("arch", ["gpt2", "opt"])
def test_keys_without_rotation_are_the_same_in_both_spaces(arch):
    model, inputs, ids = tiny_model(arch), prompts(length=120), []
    for space in ("pre", "post"):
        ids.append(generate(model, small_cache(model, ratio=0.6, key_space=space, anchor_score="residual"), inputs))
    assert ids[0].tolist() == ids[1].tolist()


def encoder_decoder():
    sizes = {"d_model": 32, "d_ff": 32, "d_kv": 8, "num_heads": 4, "num_layers": 1, "num_decoder_layers": 1}
    return T5ForConditionalGeneration(T5Config(vocab_size=128, decoder_start_token_id=0, **sizes)).eval()


@pytest.mark.parametrize("name", ["ojakv", "packed"])
@pytest.mark.usefixtures("_registered")
def test_an_encoder_decoder_model_is_refused(name):
    model = encoder_decoder()
    cache_class = {"ojakv": OjaKVCache, "packed": PackedCache}[name]
    with (
        untouched(model),
        pytest.raises(UnsupportedModelError, match=r"decoder-only models; t5 is an encoder-decoder"),
    ):
        cache_class(model)
    with (
        untouched(model),
        pytest.raises(UnsupportedModelError, match=r"decoder-only models; t5 is an encoder-decoder"),
    ):
        model.generate(prompts()["input_ids"], cache_implementation=name, max_new_tokens=2)


def mpt():
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("mpt", d_model=32, n_heads=4, n_layers=1, vocab_size=128, use_cache=True)
    )


@pytest.mark.parametrize(
    "make",
    [lambda: tiny_model("bloom"), mpt, lambda: tiny_model("falcon", alibi=True)],
    ids=["bloom", "mpt", "falcon"],
)
@pytest.mark.usefixtures("_registered")
def test_alibi_models_are_refused_and_pointed_to_packed(make):
    model = make()
    with untouched(model), pytest.raises(UnsupportedModelError, match=r"ALiBi.*cache_implementation='packed'"):
        OjaKVCache(model)
    with untouched(model), pytest.raises(UnsupportedModelError, match=r"ALiBi.*cache_implementation='packed'"):
        model.generate(**prompts(), cache_implementation="ojakv", max_new_tokens=2, pad_token_id=0)


@pytest.mark.parametrize("name", ["ojakv", "packed"])
@pytest.mark.usefixtures("_registered")
def test_a_state_space_model_is_refused(name):
    sizes = {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 1, "vocab_size": 128, "expand": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes)).eval()
    with (
        untouched(model),
        pytest.raises(UnsupportedModelError, match="(?i)mamba"),
    ):
        model.generate(prompts()["input_ids"], cache_implementation=name, max_new_tokens=2)


def test_a_model_without_full_attention_is_refused():
    with pytest.raises(UnsupportedModelError, match="mistral has none"):
        OjaKVCache(tiny_model("mistral_sliding"))


@pytest.mark.parametrize("cache_class", [OjaKVCache, PackedCache])
def test_something_that_is_no_model_is_refused(cache_class):
    for wrong in ("llama", None, torch.nn.Linear(2, 2).weight):
        with pytest.raises(UnsupportedModelError, match="takes a transformers model or its config first"):
            cache_class(wrong)


@pytest.mark.parametrize("registered", [True, False])
def test_a_cache_of_another_batch_size_is_refused_before_anything_is_stored(registered):
    model = tiny_model("llama")
    cache = small_cache(model, ratio=0.6, anchor_score="residual")
    generate(model, cache, prompts(length=120))
    bytes_before, seen = cache.nbytes(), cache.get_seq_length()
    longer = prompts(rows=3, length=160, pad=0)
    with hf_ext.registered() if registered else contextlib.nullcontext():
        with pytest.raises(hf_ext.CacheStateError, match=r"batch of 2 and was given 3.*reset"):
            generate(model, cache, longer)
    assert (cache.nbytes(), cache.get_seq_length()) == (bytes_before, seen)
    assert model.config._attn_implementation == "sdpa"


def test_padding_behind_the_text_is_refused():
    model, inputs = tiny_model("llama"), prompts(length=120, pad=0)
    inputs["attention_mask"][1, -5:] = 0
    with pytest.raises(hf_ext.CacheStateError, match="padding_side='left'"):
        model(**inputs, past_key_values=small_cache(model, ratio=0.6, anchor_score="residual"))
    assert model.config._attn_implementation == "sdpa"


def test_moving_layers_off_the_device_is_refused():
    layer = small_cache(tiny_model("llama"), ratio=0.6).layers[0]
    with pytest.raises(CacheStateError, match="without offloading"):
        layer.offload()


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
@pytest.mark.usefixtures("_registered")
def test_the_model_and_its_configs_are_as_before_after_a_generation_by_name(arch):
    model = tiny_model(arch)
    before = model.config.to_dict(), model.generation_config.to_dict(), model.config._attn_implementation
    settings = {"ratio": 0.6, "anchor_score": "residual"}
    model.generate(**prompts(length=120), cache_implementation="ojakv", cache_config=settings, max_new_tokens=4)
    assert (model.config.to_dict(), model.generation_config.to_dict(), model.config._attn_implementation) == before
    assert settings == {"ratio": 0.6, "anchor_score": "residual"}
