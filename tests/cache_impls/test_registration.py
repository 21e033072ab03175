"""`register()` and everything that becomes possible by name; `unregister()` leaves transformers as it was."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, GenerationConfig, pipeline
from transformers import PreTrainedTokenizerFast as FastTokenizer
from transformers.generation import configuration_utils
from transformers.generation.utils import GenerationMixin

import hf_ext
from hf_ext import OjaKVCache, OjaKVConfig, PackedCache
from hf_ext.cache_impls.attention import ATTENTION_NAME, attach
from hf_ext.registration import CACHES, build_cache, check_hook_points
from hf_ext.tiny import tiny_model
from tests.cache_impls.helpers import generate, prompts


RECIPE = Path(__file__).parents[2] / "cache_impls" / "recipe" / "custom_generate"
SETTINGS = {"ratio": 0.6, "sink_tokens": 4, "recent_tokens": 6, "update_interval": 5, "anchor_score": "residual"}


# peft reads an attribute that transformers is about to rename.
PEFT_WARNS = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def _registered():
    hf_ext.register()
    yield
    hf_ext.unregister()


@pytest.fixture(autouse=True)
def _leaves_no_trace():
    before = touched()
    yield
    for name, (old, new) in enumerate(zip(before, touched())):
        assert old is new, f"a test left place {name} changed"


def touched():
    """Every object registration may replace."""
    return [
        configuration_utils.ALL_CACHE_IMPLEMENTATIONS,
        GenerationMixin.__dict__["_prepare_cache_for_generation"],
        GenerationConfig.__dict__["to_json_file"],
        GenerationConfig.__dict__.get("validate"),
        GenerationMixin.__dict__["generate"],
    ]


def by_name(model, inputs, name="ojakv", **kwargs):
    settings = SETTINGS if name == "ojakv" else None
    options = {"cache_implementation": name, "cache_config": settings, "max_new_tokens": 24, "do_sample": False}
    return model.generate(**inputs, pad_token_id=0, **{**options, **kwargs})


def direct(model, inputs, **kwargs):
    return generate(model, OjaKVCache(model, OjaKVConfig(**SETTINGS)), inputs, **kwargs)


def test_every_hook_point_is_there():
    assert all(found for _, found, _ in check_hook_points()), check_hook_points()


def test_unregister_puts_every_object_back():
    before = touched()
    tables = [dict(interface._global_mapping) for interface in (AttentionInterface, AttentionMaskInterface)]
    hf_ext.register()
    assert set(CACHES) < set(configuration_utils.ALL_CACHE_IMPLEMENTATIONS)
    assert [old is new for old, new in zip(before, touched())] == [False, False, False, True, True]
    assert ATTENTION_NAME in AttentionInterface._global_mapping
    hf_ext.unregister()
    assert all(old is new for old, new in zip(before, touched()))
    for interface, table in zip((AttentionInterface, AttentionMaskInterface), tables):
        assert set(interface._global_mapping) == set(table) - {ATTENTION_NAME}
        assert all(interface._global_mapping[name] is table[name] for name in interface._global_mapping)


def test_registering_twice_is_registering_once():
    before = touched()
    hf_ext.register()
    once = touched()
    hf_ext.register()
    assert all(a is b for a, b in zip(once, touched()))
    hf_ext.unregister()
    assert all(a is b for a, b in zip(before, touched()))
    hf_ext.unregister()
    assert all(a is b for a, b in zip(before, touched()))


def test_nested_blocks_end_with_the_outermost():
    before = touched()
    with hf_ext.registered():
        inside = touched()
        with hf_ext.registered():
            pass
        assert all(a is b for a, b in zip(inside, touched()))
    assert all(a is b for a, b in zip(before, touched()))
    hf_ext.register()
    with pytest.raises(KeyError), hf_ext.registered():
        raise KeyError
    assert "ojakv" in configuration_utils.ALL_CACHE_IMPLEMENTATIONS, "a block does not end a registration before it"
    hf_ext.unregister()


def test_unregister_takes_the_hooks_off_every_model():
    model = tiny_model("llama")
    assert not model._forward_pre_hooks
    generate(model, PackedCache(model), prompts())
    assert len(model._forward_pre_hooks) == len(model._forward_hooks) == 1
    assert attach(model)
    assert len(model._forward_pre_hooks) == 1, "attaching twice hooks once"
    hf_ext.unregister()
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    expected = generate(model, None, prompts())
    assert generate(model, PackedCache(model), prompts()).tolist() == expected.tolist()
    hf_ext.unregister()


def test_a_deep_copy_of_a_hooked_model_works_after_unregister():
    model = tiny_model("llama")
    generate(model, PackedCache(model), prompts())
    other = copy.deepcopy(model)
    hf_ext.unregister()
    expected = generate(other, None, prompts())
    cache = PackedCache(other.config)
    assert generate(other, cache, prompts()).tolist() == expected.tolist()
    assert other.config._attn_implementation == "sdpa"


def test_without_registration_the_name_is_unknown():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="Invalid `cache_implementation`"):
        by_name(model, prompts())


@pytest.mark.parametrize("name", ["ojakv", "packed"])
@pytest.mark.usefixtures("_registered")
def test_by_name_gives_the_ids_of_the_direct_route(name, built):
    model, inputs = tiny_model("llama"), prompts(length=120)
    expected = direct(model, inputs) if name == "ojakv" else generate(model, None, inputs)
    built.clear()
    assert by_name(model, inputs, name).tolist() == expected.tolist()
    assert [type(cache) for cache in built] == [OjaKVCache if name == "ojakv" else PackedCache]
    if name == "ojakv":
        assert built[0].config == OjaKVConfig(**SETTINGS)
        assert built[0].tier_bytes()["low_rank"] > 0


@pytest.mark.usefixtures("_registered")
def test_by_name_serves_beams_samples_and_prompt_lookup(built):
    model, inputs = tiny_model("llama"), prompts(length=120)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    assert by_name(model, inputs, **beams).tolist() == direct(model, inputs, **beams).tolist()
    found = []
    for route in (by_name, direct):
        torch.manual_seed(3)
        found.append(route(model, inputs, do_sample=True, num_return_sequences=2).tolist())
    assert found[0] == found[1]
    one = prompts(rows=1, length=120, pad=0)
    lookup = {"prompt_lookup_num_tokens": 3}
    assert by_name(model, one, **lookup).tolist() == direct(model, one, **lookup).tolist()


@pytest.mark.usefixtures("_registered")
def test_other_names_and_no_name_reach_transformers(built):
    model, inputs = tiny_model("llama"), prompts()
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    for name in ("dynamic", "static"):
        found = model.generate(**inputs, cache_implementation=name, max_new_tokens=8, do_sample=False)
        assert found.tolist() == expected.tolist()
    with pytest.raises(ValueError, match="Invalid `cache_implementation`"):
        model.generate(**inputs, cache_implementation="nonsense", max_new_tokens=8)
    assert not built


@pytest.mark.usefixtures("_registered")
def test_no_cache_wanted_means_no_cache_built(built):
    model, inputs = tiny_model("llama"), prompts()
    expected = generate(model, None, inputs, max_new_tokens=6)
    found = model.generate(**inputs, use_cache=False, max_new_tokens=6, do_sample=False)
    assert found.tolist() == expected.tolist()
    assert not built


@pytest.mark.usefixtures("_registered")
def test_a_generation_config_with_the_name(built):
    model, inputs = tiny_model("llama"), prompts(length=120)
    config = GenerationConfig(cache_implementation="ojakv", cache_config=SETTINGS, max_new_tokens=24, pad_token_id=0)
    expected = direct(model, inputs).tolist()
    for _ in range(2):
        assert model.generate(**inputs, generation_config=config).tolist() == expected
    assert config.cache_implementation == "ojakv", "the caller's config was changed"
    assert config.cache_config == SETTINGS
    model.generation_config.cache_implementation = "ojakv"
    model.generation_config.cache_config = SETTINGS
    built.clear()
    found = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert found.tolist() == expected
    assert len(built) == 1
    assert model.generation_config.cache_implementation == "ojakv"


def test_a_saved_generation_config_carries_none_of_our_names_and_loads_without_us(tmp_path, caplog):
    plain = GenerationConfig(max_new_tokens=24)
    plain.save_pretrained(tmp_path / "plain")
    with hf_ext.registered():
        config = GenerationConfig(cache_implementation="ojakv", cache_config=SETTINGS, max_new_tokens=24)
        config.save_pretrained(tmp_path / "ours")
        assert config.cache_implementation == "ojakv", "saving changed the config"
        model = tiny_model("llama")
        model.generation_config.cache_implementation = "packed"
        model.save_pretrained(tmp_path / "model")
        other = GenerationConfig(cache_implementation="static", max_new_tokens=24)
        other.save_pretrained(tmp_path / "other")
    for folder in ("ours", "model"):
        text = (tmp_path / folder / "generation_config.json").read_text()
        assert not any(name in text for name in (*CACHES, "anchor_score", "sink_tokens"))
    assert json.loads((tmp_path / "other" / "generation_config.json").read_text())["cache_implementation"] == "static"
    loaded = GenerationConfig.from_pretrained(tmp_path / "ours")
    assert loaded.to_dict() == GenerationConfig.from_pretrained(tmp_path / "plain").to_dict()
    assert type(model).from_pretrained(tmp_path / "model").generation_config.cache_implementation is None


def word_tokenizer():
    vocabulary = {"<pad>": 0, "<s>": 1, "<unk>": 2, **{f"w{index}": index for index in range(3, 128)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return FastTokenizer(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", padding_side="left")


@pytest.mark.usefixtures("_registered")
def test_the_text_generation_pipeline(built):
    model, inputs = tiny_model("llama"), prompts(length=120, pad=11)
    pipe = pipeline("text-generation", model=model, tokenizer=word_tokenizer(), device="cpu")
    texts = [" ".join(f"w{i}" for i in row[m.bool()].tolist()) for row, m in zip(*inputs.values())]
    expected = direct(model, inputs)[:, 120:]
    built.clear()
    options = {"max_new_tokens": 24, "do_sample": False, "return_full_text": False, "batch_size": 2}
    found = pipe(texts, cache_implementation="ojakv", cache_config=SETTINGS, **options)
    assert [row[0]["generated_text"] for row in found] == word_tokenizer().batch_decode(expected, True)
    assert len(built) == 1
    assert built[0].batch_size == 2


@PEFT_WARNS
@pytest.mark.usefixtures("_registered")
def test_a_model_wrapped_by_peft(built):
    model, inputs = tiny_model("llama"), prompts(length=120)
    plain = direct(model, inputs).tolist()
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    wrapped.eval()
    dynamic = wrapped.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=0).tolist()
    assert by_name(wrapped, inputs, "packed").tolist() == dynamic
    built.clear()
    found = by_name(wrapped, inputs).tolist()
    assert len(built) == 1
    assert built[0].tier_bytes()["low_rank"] > 0
    assert found != plain, "the adapter was ignored"
    assert direct(wrapped, inputs).tolist() == found


@PEFT_WARNS
def test_caches_made_for_a_peft_wrapper_attend_in_their_storage(monkeypatch):
    model = tiny_model("llama")
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    cache = OjaKVCache(wrapped, OjaKVConfig(**SETTINGS))
    for layer in cache.kv_layers:
        monkeypatch.setattr(layer, "materialize", lambda: pytest.fail("tokens were rebuilt to attend to them"))
    generate(wrapped, cache, prompts(length=120))
    assert cache.tier_bytes()["low_rank"] > 0
    hf_ext.unregister()


@pytest.mark.parametrize("name", ["ojakv", "packed"])
@pytest.mark.usefixtures("_registered")
def test_assisted_decoding_by_name(name, built):
    model, inputs = tiny_model("llama"), prompts(rows=1, length=40, pad=0)
    expected = generate(model, None, inputs)
    built.clear()
    settings = {"ratio": 1} if name == "ojakv" else None
    found = by_name(model, inputs, name, cache_config=settings, assistant_model=tiny_model("llama", seed=1))
    assert found.tolist() == expected.tolist()
    assert built


@pytest.mark.usefixtures("_registered")
def test_an_assistant_with_compression_in_use(built):
    model, inputs = tiny_model("llama"), prompts(rows=1, length=150, pad=0)
    found = by_name(model, inputs, assistant_model=tiny_model("llama", seed=1))
    assert found.shape == (1, 174)
    assert built[0].tier_bytes()["low_rank"] > 0


@pytest.mark.usefixtures("_registered")
def test_a_name_next_to_a_cache_is_refused():
    model = tiny_model("llama")
    for cache in (DynamicCache(), PackedCache(model)):
        with pytest.raises(ValueError, match="Passing both `cache_implementation`"):
            by_name(model, prompts(), past_key_values=cache)
        assert cache.get_seq_length() == 0


@pytest.mark.usefixtures("_registered")
def test_a_cache_made_from_a_config_attends_in_its_storage_once_registered(monkeypatch):
    model = tiny_model("llama")
    cache = OjaKVCache(model.config, OjaKVConfig(**SETTINGS))
    for layer in cache.kv_layers:
        monkeypatch.setattr(layer, "materialize", lambda: pytest.fail("tokens were rebuilt to attend to them"))
    generate(model, cache, prompts(length=120))
    assert cache.tier_bytes()["low_rank"] > 0


def test_the_custom_generate_folder_needs_no_registration(built):
    model, inputs = tiny_model("llama"), prompts(length=120)
    before = touched()
    expected = direct(model, inputs).tolist()
    built.clear()
    folder = {"custom_generate": str(RECIPE.parent), "trust_remote_code": True}
    assert by_name(model, inputs, **folder).tolist() == expected
    assert [type(cache) for cache in built] == [OjaKVCache]
    found = by_name(model, inputs, "packed", **folder)
    assert found.tolist() == generate(model, None, inputs).tolist()
    found = by_name(model, inputs, "dynamic", **folder)
    assert found.tolist() == generate(model, None, inputs).tolist()
    with pytest.raises(hf_ext.ConfigError, match="did you mean 'ratio'"):
        by_name(model, inputs, cache_config={"rato": 0.5}, **folder)
    assert all(a is b for a, b in zip(before, touched()))
    assert model.config._attn_implementation == "sdpa"


def test_build_cache_is_what_generate_builds(built):
    model = tiny_model("llama")
    cache = build_cache("ojakv", model, SETTINGS)
    assert isinstance(cache, OjaKVCache)
    assert cache.config == OjaKVConfig(**SETTINGS)
    assert isinstance(build_cache("packed", model), PackedCache)
    assert build_cache("ojakv", model).config == OjaKVConfig()


@pytest.mark.usefixtures("_registered")
def test_a_generation_that_failed_leaves_the_model_ready():
    model, inputs = tiny_model("llama"), prompts(length=120)
    expected = by_name(model, inputs).tolist()
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        by_name(model, inputs)
    handle.remove()
    assert model.config._attn_implementation == "sdpa"
    assert by_name(model, inputs).tolist() == expected
