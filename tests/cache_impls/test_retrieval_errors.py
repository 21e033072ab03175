"""Bad input to SentenceKV and HybridKV: a typed error that names the value and the way out, before any forward call."""

import contextlib
import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import hf_ext
from hf_ext import (
    CacheStateError,
    ConfigError,
    HybridKVCache,
    HybridKVConfig,
    OjaKVConfig,
    SentenceKVCache,
    SentenceKVConfig,
    UnsupportedModelError,
)
from hf_ext.tiny import tiny_model
from tests.cache_impls.helpers import generate, prompts, untouched
from tests.cache_impls.retrieval_helpers import CACHES, REFUSED, TIGHT, feed, later, make, model_of, stored_tokens
from tests.cache_impls.test_sentencekv_generate import MARKS, word_tokenizer


NAMES = list(CACHES)


BOTH = [
    ({"token_budget": 64}, r"token_budget=64 must be at least 96: sink_tokens \+ recent_tokens \+ 32"),
    ({"token_budget": 10}, "token_budget=10 must be at least 96"),
    ({"token_budget": -5}, "token_budget=-5 must be at least 96"),
    ({"token_budget": 100, "sink_tokens": 60}, "token_budget=100 must be at least 124"),
    ({"token_budget": 100, "recent_tokens": 100}, "token_budget=100 must be at least 164"),
    ({"token_budget": 128.0}, r"token_budget=128\.0 must be an integer"),
    ({"token_budget": None}, "token_budget=None must be an integer"),
    ({"sink_tokens": -1}, "sink_tokens=-1 must not be negative"),
    ({"recent_tokens": -3}, "recent_tokens=-3 must not be negative"),
    ({"query_window": 0}, "query_window=0 must be at least 1"),
    ({"refresh": 0}, "refresh=0 must be at least 1"),
    ({"index_rank": 0}, "index_rank=0 must be at least 1"),
    (
        {"offload_dir": "folder", "offload_device": "cpu"},
        "offload_dir='folder' cannot be combined with offload_device; set one",
    ),
    ({"offload_dir": 5}, "offload_dir=5 must be a string"),
    ({"offload_device": 0}, "offload_device=0 must be a string"),
    ({"offload_device": "disc"}, "offload_device='disc'"),
]
SENTENCEKV = [
    ({"keep": 0.5}, r'keep=0\.5 must be "all" or at least 1'),
    ({"keep": -1}, 'keep=-1 must be "all" or at least 1'),
    ({"keep": "most"}, "keep='most' must be"),
    ({"keep": True}, "keep=True must be"),
    ({"keep": float("inf")}, "keep=inf"),
    (
        {"keep": 1, "token_budget": 128, "query_window": 128},
        r"query_window=128 must be below keep \* token_budget = 128",
    ),
    (
        {"keep": 2, "token_budget": 128, "query_window": 300},
        r"query_window=300 must be below keep \* token_budget = 256",
    ),
    ({"score": "luck"}, "score='luck' must be one of 'lowrank_token', 'mean_query', 'current_query', 'page_bound'"),
    ({"mode": "papers"}, "mode='papers' must be one of 'default', 'paper'"),
    ({"mode": "paper"}, "keep='all' must be a number with mode=\"paper\""),
    ({"length_threshold": -1}, "length_threshold=-1 must not be negative"),
    ({"max_sentence_tokens": 0}, r"max_sentence_tokens=0 must lie in \[1, 256\]"),
    ({"max_sentence_tokens": 257}, r"max_sentence_tokens=257 must lie in \[1, 256\]"),
    ({"boundary_ids": []}, r"boundary_ids=\[\] must not be empty; leave it out"),
    ({"boundary_ids": 5}, "boundary_ids=5 must be"),
    ({"boundary_ids": ["."]}, "boundary_ids"),
]
HYBRIDKV = [
    ({"value_rank": 0}, "value_rank=0 must be at least 1"),
    ({"ratio": 0.0}, r"ratio=0\.0 must lie in \(0, 1\)"),
    ({"ratio": 1.0}, r"ratio=1\.0 must lie in \(0, 1\); leave it out to keep all tokens"),
    ({"ratio": -0.5}, r"ratio=-0\.5 must lie in \(0, 1\)"),
    ({"ratio": float("nan")}, "ratio=nan"),
    ({"ratio": "half"}, "ratio='half' must be a number or None"),
    ({"max_bytes": 0}, "max_bytes=0 must be positive"),
    ({"max_bytes": 1.5}, r"max_bytes=1\.5 must be an integer"),
    ({"ratio": 0.5, "max_bytes": 1000}, r"ratio=0\.5 cannot be combined with max_bytes; set one of them"),
]
BAD = [(name, *case) for name in NAMES for case in BOTH]
BAD += [("sentencekv", *case) for case in SENTENCEKV] + [("hybridkv", *case) for case in HYBRIDKV]


@pytest.mark.parametrize(("name", "settings", "message"), BAD, ids=lambda v: str(v)[:60])
@pytest.mark.usefixtures("_registered")
def test_a_bad_setting_is_refused_by_the_config_and_by_name(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        CACHES[name][1](**settings)
    model = model_of("llama")
    with untouched(model), pytest.raises(ConfigError, match=message):
        model.generate(**prompts(), cache_implementation=name, cache_config=settings, max_new_tokens=2)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_changed_to_a_bad_value_is_refused_when_the_cache_is_made(name):
    cache_class, config_class = CACHES[name]
    config = config_class()
    config.token_budget = 5
    with pytest.raises(ConfigError, match="token_budget=5"):
        cache_class(model_of("llama"), config)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("wrong", "right"), [("token_buget", "token_budget"), ("sink_token", "sink_tokens"), ("refreshes", "refresh")]
)
@pytest.mark.usefixtures("_registered")
def test_an_unknown_setting_names_the_nearest_one(name, wrong, right):
    model = model_of("llama")
    message = f"no setting '{wrong}' .did you mean '{right}'?.*Known settings: .*offload_dir"
    with untouched(model), pytest.raises(ConfigError, match=message):
        model.generate(**prompts(), cache_implementation=name, cache_config={wrong: 128}, max_new_tokens=2)
    with pytest.raises(ConfigError, match=message):
        CACHES[name][0](model, {wrong: 128})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wrong", ["other", "ojakv", "text", "number"])
def test_another_kind_of_config_is_refused(name, wrong):
    cache_class, config_class = CACHES[name]
    other = SentenceKVConfig if config_class is HybridKVConfig else HybridKVConfig
    given = {"other": other(), "ojakv": OjaKVConfig(), "text": "token_budget=128", "number": 128}[wrong]
    message = f"{cache_class.__name__} takes its settings as a {config_class.__name__} or a dict"
    with pytest.raises(ConfigError, match=message):
        cache_class(model_of("llama"), given)


@pytest.mark.usefixtures("_registered")
def test_boundary_ids_must_be_ids_of_the_model():
    model = model_of("llama")
    for ids, named in (([128], "128"), ([5, 500, -1], "-1, 500")):
        message = f"must lie between 0 and 127, the ids of the model, but hold {named}; give"
        with pytest.raises(ConfigError, match=message):
            make("sentencekv", model, boundary_ids=ids)
        settings = {"boundary_ids": ids}
        with untouched(model), pytest.raises(ConfigError, match=message):
            model.generate(**prompts(), cache_implementation="sentencekv", cache_config=settings, max_new_tokens=2)


def test_boundary_ids_and_a_tokenizer_must_agree():
    model, tokenizer = model_of("llama"), word_tokenizer(marks=True)
    with pytest.raises(ConfigError, match=r"must be sentence marks of the tokenizer .* these are not: 9 \('w9'\)"):
        SentenceKVCache(model, SentenceKVConfig(boundary_ids=[MARKS[0], 9]), tokenizer)
    cache = SentenceKVCache(model, SentenceKVConfig(boundary_ids=MARKS), tokenizer)
    assert cache.sentences.boundary_ids.tolist() == MARKS


@pytest.mark.parametrize("wrong", ["gpt2", {".": 0}, 5])
def test_something_that_is_no_tokenizer_is_refused(wrong):
    with pytest.raises(ConfigError, match="must be a tokenizer of transformers"):
        SentenceKVCache(model_of("llama"), None, wrong)


def test_a_tokenizer_of_another_model_or_without_marks_is_refused():
    with pytest.raises(ConfigError, match="beyond the 50 ids of the model"):
        SentenceKVCache(tiny_model("llama", vocab_size=50), None, word_tokenizer(marks=True))
    with pytest.raises(ConfigError, match="give boundary_ids instead"):
        SentenceKVCache(model_of("llama"), None, word_tokenizer())


def mpt():
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": 128, "use_cache": True}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("mpt", **sizes))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "given",
    [lambda: tiny_model("bloom"), mpt, lambda: tiny_model("falcon", alibi=True)],
    ids=["bloom", "mpt", "falcon"],
)
@pytest.mark.usefixtures("_registered")
def test_alibi_models_are_refused_and_pointed_to_packed(name, given):
    model = given()
    for attempt in (
        lambda: make(name, model),
        lambda: make(name, model.config),
        lambda: model.generate(**prompts(), cache_implementation=name, max_new_tokens=2, pad_token_id=0),
    ):
        with untouched(model), pytest.raises(UnsupportedModelError, match=r"ALiBi.*cache_implementation='packed'"):
            attempt()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("_registered")
def test_an_encoder_decoder_model_is_refused(name):
    sizes = {"d_model": 32, "d_ff": 32, "d_kv": 8, "num_heads": 4, "num_layers": 1, "num_decoder_layers": 1}
    model = T5ForConditionalGeneration(T5Config(vocab_size=128, decoder_start_token_id=0, **sizes)).eval()
    message = r"decoder-only models; t5 is an encoder-decoder"
    with untouched(model), pytest.raises(UnsupportedModelError, match=message):
        make(name, model)
    with untouched(model), pytest.raises(UnsupportedModelError, match=message):
        model.generate(prompts()["input_ids"], cache_implementation=name, max_new_tokens=2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("_registered")
def test_a_model_without_full_attention_is_refused(name):
    assert "mistral_sliding" in REFUSED
    model = tiny_model("mistral_sliding")
    with untouched(model), pytest.raises(UnsupportedModelError, match=r"mistral has none .*generate without it"):
        make(name, model)
    sizes = {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 1, "vocab_size": 128, "expand": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes)).eval()
    with untouched(model), pytest.raises(UnsupportedModelError, match="(?i)mamba"):
        model.generate(prompts()["input_ids"], cache_implementation=name, max_new_tokens=2)


@pytest.mark.parametrize("cache_class", [SentenceKVCache, HybridKVCache])
def test_something_that_is_no_model_is_refused(cache_class):
    for wrong in ("llama", None, torch.nn.Linear(2, 2).weight):
        with pytest.raises(UnsupportedModelError, match="takes a transformers model or its config first"):
            cache_class(wrong)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["memory", "file"])
@torch.no_grad()
def test_a_crop_beyond_the_newest_tokens_changes_nothing(name, where, tmp_path):
    model, inputs = model_of("llama"), prompts(length=200, pad=23)
    cache = make(name, model, **TIGHT, offload_dir=str(tmp_path) if where == "file" else None)
    feed(model, cache, inputs, later(2, [1] * 3))
    other, newest = copy.deepcopy(cache), cache.kv_layers[0].newest
    with pytest.raises(CacheStateError, match=rf"cannot crop {newest + 1} tokens: only the newest {newest} can"):
        cache.crop(-newest - 1)
    with pytest.raises(CacheStateError, match="cannot crop 1000 tokens"):
        cache.crop(-1000)
    with pytest.raises(CacheStateError, match=r"crop\(5\): pass the number of tokens to remove as a negative"):
        cache.crop(5)
    assert [layer.get_seq_length() for layer in cache.layers] == [203, 203]
    assert cache.nbytes() == other.nbytes()
    if name == "sentencekv":
        assert torch.equal(cache.sentences.ends, other.sentences.ends)
    token, mask = torch.tensor([[5], [9]]), torch.ones(2, 204)
    mask[1, :23] = 0
    found, expected = (model(input_ids=token, attention_mask=mask, past_key_values=c).logits for c in (cache, other))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("registered", [True, False])
def test_a_cache_of_another_batch_size_is_refused_before_anything_is_stored(name, registered):
    model = tiny_model("llama")
    cache = make(name, model, **TIGHT)
    generate(model, cache, prompts(length=160))
    assert stored_tokens(cache) > 0
    before = cache.nbytes(), cache.get_seq_length()
    with hf_ext.registered() if registered else contextlib.nullcontext():
        with pytest.raises(CacheStateError, match=r"batch of 2 and was given 3.*reset"):
            generate(model, cache, prompts(rows=3, length=200, pad=0))
    assert (cache.nbytes(), cache.get_seq_length()) == before
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", NAMES)
def test_moving_layers_off_the_device_is_refused(name):
    with pytest.raises(CacheStateError, match="without offloading"):
        make(name, model_of("llama")).layers[0].offload()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_memory_of_the_host_counts_where_the_model_is_on_the_host_too(name):
    """`offload_device="cpu"` saves nothing on a model that runs on the CPU, and must not look as if it did."""
    model, sizes = model_of("llama"), []
    for settings in ({}, {"offload_device": "cpu"}):
        cache = make(name, model, **TIGHT, **settings)
        model(**prompts(length=400, pad=0), past_key_values=cache)
        sizes.append((cache.nbytes(), cache.offloaded_bytes()))
    assert sizes[1][1] == 0
    assert sizes[1][0] >= 0.95 * sizes[0][0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("_registered")
def test_the_model_and_its_configs_are_as_before_after_a_generation_by_name(name):
    for arch in ("llama", "gemma2"):
        model = tiny_model(arch)
        before = model.config.to_dict(), model.generation_config.to_dict(), model.config._attn_implementation
        settings = dict(TIGHT)
        model.generate(**prompts(length=150), cache_implementation=name, cache_config=settings, max_new_tokens=4)
        assert (model.config.to_dict(), model.generation_config.to_dict(), model.config._attn_implementation) == before
        assert settings == TIGHT
