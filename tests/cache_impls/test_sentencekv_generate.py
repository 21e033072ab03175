"""SentenceKV and HybridKV through `generate`: by name, in pipelines, under PEFT, from embeddings, with a tokenizer."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, pipeline

import hf_ext
from hf_ext import SentenceKVCache, SentenceKVConfig, log
from hf_ext.tiny import tiny_model
from tests.cache_impls.helpers import generate, prompts
from tests.cache_impls.retrieval_helpers import CACHES, assert_close, feed, later, make, model_of, stored_tokens


PEFT_WARNS = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
NAMES = ["sentencekv", "hybridkv"]
MARKS = [5, 6, 40, 52, 59, 76, 99]
SETTINGS = {
    "sentencekv": {"token_budget": 96, "boundary_ids": MARKS, "score": "mean_query"},
    "hybridkv": {"token_budget": 96, "value_rank": 3},
}


def by_name(model, inputs, name, **kwargs):
    options = {"cache_implementation": name, "cache_config": SETTINGS[name], "max_new_tokens": 24, "do_sample": False}
    return model.generate(**inputs, pad_token_id=0, **{**options, **kwargs})


def direct(model, inputs, name, **kwargs):
    return generate(model, make(name, model, **SETTINGS[name]), inputs, **kwargs)


def word_tokenizer(marks=False):
    vocabulary = {"<pad>": 0, "<s>": 1, "<unk>": 2, **{f"w{index}": index for index in range(3, 128)}}
    if marks:
        vocabulary = {(f"w{i}." if i in MARKS else word): i for word, i in vocabulary.items()}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", padding_side="left"
    )


def marked(ids):
    return torch.isin(ids, torch.tensor(MARKS))


def check_marks(cache, ids, real=None):
    """The sentences end where the ids say, and nowhere else but for length."""
    ends = cache.sentences.ends
    assert ends.shape[1] == cache.get_seq_length()
    expected = marked(ids[:, : ends.shape[1]])
    if real is not None:
        expected[:, : real.shape[1]] |= ~real.bool()
    assert (ends | ~expected).all()
    run = 0
    for end, mark in zip(ends[0].tolist(), expected[0].tolist()):
        run += 1
        assert end == (mark or run == cache.config.max_sentence_tokens)
        run = 0 if end else run


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("arch", ["llama", "gemma2"])
@pytest.mark.usefixtures("_registered")
def test_by_name_gives_the_ids_of_the_direct_route(name, arch, built):
    model, inputs = model_of(arch), prompts(length=200)
    expected = direct(model, inputs, name)
    built.clear()
    found = by_name(model, inputs, name)
    assert found.tolist() == expected.tolist()
    assert [type(cache) for cache in built] == [CACHES[name][0]]
    assert built[0].config == CACHES[name][1](**SETTINGS[name])
    assert stored_tokens(built[0]) > 0
    if name == "sentencekv":
        assert bool(marked(found[:, 200:-1]).any()), "the text has no mark that was generated"
        check_marks(built[0], found, inputs["attention_mask"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("_registered")
def test_by_name_serves_beams_samples_speculation_and_chunks(name):
    model, inputs = model_of("llama"), prompts(length=200)
    one = prompts(rows=1, length=200, pad=0)
    for given, options in (
        (inputs, {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 10}),
        (one, {"prompt_lookup_num_tokens": 3, "max_new_tokens": 12}),
        (inputs, {"prefill_chunk_size": 70, "max_new_tokens": 8}),
        (one, {"assistant_model": tiny_model("llama", seed=1), "max_new_tokens": 10}),
        (inputs, {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 10}),
    ):
        torch.manual_seed(3)
        expected = direct(model, given, name, **options).tolist()
        torch.manual_seed(3)
        assert by_name(model, given, name, **options).tolist() == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("_registered")
def test_a_generation_config_with_the_name(name):
    model, inputs = model_of("llama"), prompts(length=200)
    options = {"max_new_tokens": 24, "pad_token_id": 0, "do_sample": False}
    config = GenerationConfig(cache_implementation=name, cache_config=dict(SETTINGS[name]), **options)
    expected = direct(model, inputs, name).tolist()
    for _ in range(2):
        assert model.generate(**inputs, generation_config=config).tolist() == expected
    assert config.cache_implementation == name
    assert config.cache_config == SETTINGS[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("_registered")
def test_the_text_generation_pipeline(name, built):
    model, inputs = tiny_model("llama"), prompts(length=200, pad=11)
    tokenizer = word_tokenizer()
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    texts = [" ".join(f"w{i}" for i in row[m.bool()].tolist()) for row, m in zip(*inputs.values())]
    expected = direct(model, inputs, name)[:, 200:]
    built.clear()
    options = {"max_new_tokens": 24, "do_sample": False, "return_full_text": False, "batch_size": 2}
    found = pipe(texts, cache_implementation=name, cache_config=SETTINGS[name], **options)
    assert [row[0]["generated_text"] for row in found] == tokenizer.batch_decode(expected, True)
    assert len(built) == 1
    assert built[0].batch_size == 2


def wrapped_model():
    wrapped = get_peft_model(
        tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for parameter, weight in wrapped.named_parameters():
            if "lora_B" in parameter:
                weight.normal_()
    return wrapped.eval()


@PEFT_WARNS
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("_registered")
def test_a_model_wrapped_by_peft(name, built):
    wrapped, inputs = wrapped_model(), prompts(length=200)
    plain = direct(tiny_model("llama"), inputs, name).tolist()
    dynamic = generate(wrapped, None, inputs).tolist()
    full = {"cache_config": {"token_budget": 1024}}
    assert by_name(wrapped, inputs, name, **full).tolist() == dynamic
    built.clear()
    found = by_name(wrapped, inputs, name)
    assert found.tolist() != plain, "the adapter was ignored"
    assert stored_tokens(built[0]) > 0
    assert direct(wrapped, inputs, name).tolist() == found.tolist()
    if name == "sentencekv":
        assert all(cache.sentences.length == cache.get_seq_length() == 223 for cache in built)
        check_marks(built[0], found, inputs["attention_mask"])


@PEFT_WARNS
@torch.no_grad()
def test_a_forward_through_the_wrapper_and_the_model_inside_it_counts_the_ids_once():
    wrapped, inputs = wrapped_model(), prompts(length=150, pad=0)
    cache = make("sentencekv", wrapped, **SETTINGS["sentencekv"])
    wrapped(**inputs, past_key_values=cache)
    ids = inputs["input_ids"]
    for block in later(2, [1, 1, 5, 1]):
        wrapped(input_ids=block, past_key_values=cache)
        ids = torch.cat([ids, block], dim=1)
        assert cache.sentences.length == cache.get_seq_length() == ids.shape[1]
    check_marks(cache, ids)
    hf_ext.unregister()


@torch.no_grad()
def test_ids_that_are_given_by_position_are_read():
    model, inputs = tiny_model("llama"), prompts(length=150, pad=0)
    cache = make("sentencekv", model, **SETTINGS["sentencekv"])
    model(inputs["input_ids"], past_key_values=cache)
    check_marks(cache, inputs["input_ids"])
    model(torch.tensor([[5], [50]]), past_key_values=cache)
    check_marks(cache, torch.cat([inputs["input_ids"], torch.tensor([[5], [50]])], dim=1))


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("name", NAMES)
def test_embeddings_instead_of_ids(name, arch):
    model, inputs = model_of(arch), prompts(length=200)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    expected = generate(model, None, inputs)[:, 200:]
    assert generate(model, make(name, model), given).tolist() == expected.tolist()
    settings = {**SETTINGS[name], "token_budget": 96}
    cache = make(name, model, **settings)
    found = generate(model, cache, given)
    assert stored_tokens(cache) > 0
    if name == "sentencekv":
        ends = cache.sentences.ends
        assert ends.shape == (2, 223)
        assert (ends[0].nonzero().flatten()[:6] + 1).tolist() == [32, 64, 96, 128, 160, 192]
        assert (ends[:, 200:] | ~marked(found[:, :23])).all(), "generated tokens are read again"
    else:
        assert found.tolist() == direct(model, inputs, name)[:, 200:].tolist()


@pytest.mark.usefixtures("_registered")
def test_ids_are_followed_over_turns_beams_and_crops():
    model = model_of("llama")
    cache = make("sentencekv", model, **SETTINGS["sentencekv"])
    turn = generate(model, cache, prompts(rows=1, length=150, pad=0), prompt_lookup_num_tokens=3)
    check_marks(cache, turn)
    longer = torch.cat([turn, prompts(rows=1, length=90, pad=0, seed=1)["input_ids"]], dim=1)
    turn = generate(model, cache, {"input_ids": longer, "attention_mask": torch.ones_like(longer)})
    check_marks(cache, turn)
    beams = make("sentencekv", model, **SETTINGS["sentencekv"])
    generate(model, beams, prompts(length=150, pad=0), num_beams=3)
    assert beams.sentences.ends.shape == (6, 173)


@torch.no_grad()
def test_a_tokenizer_gives_the_marks_of_its_vocabulary():
    model, inputs, blocks = model_of("llama"), prompts(length=200), later(2, [1] * 20)
    settings = SentenceKVConfig(token_budget=96, score="mean_query")
    found = feed(model, SentenceKVCache(model, settings, word_tokenizer(marks=True)), inputs, blocks)
    expected = feed(model, make("sentencekv", model, **SETTINGS["sentencekv"]), inputs, blocks)
    assert_close(found, expected, atol=1e-6)
    both = SentenceKVConfig(token_budget=96, boundary_ids=[5, 6])
    assert SentenceKVCache(model, both, word_tokenizer(marks=True)).sentences.boundary_ids.tolist() == [5, 6]


def test_one_warning_where_no_marks_are_known(monkeypatch, caplog):
    monkeypatch.setattr(log, "_seen", set())
    model = model_of("llama")
    make("sentencekv", model, boundary_ids=MARKS)
    SentenceKVCache(model, None, word_tokenizer(marks=True))
    make("hybridkv", model)
    assert not caplog.records
    make("sentencekv", model)
    make("sentencekv", model)
    (record,) = caplog.records
    assert "neither a tokenizer nor boundary_ids: sentences are blocks of 32 tokens" in record.getMessage()


@pytest.mark.parametrize("name", NAMES)
def test_a_forward_call_that_failed_leaves_a_cache_that_reset_repairs(name):
    model, inputs = tiny_model("llama"), prompts(length=200)
    expected = direct(model, inputs, name).tolist()
    cache = make(name, model, **SETTINGS[name])
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, cache, inputs)
    handle.remove()
    with pytest.raises(hf_ext.CacheStateError, match=r"reset\(\)"):
        generate(model, cache, inputs)
    cache.reset()
    assert generate(model, cache, inputs).tolist() == expected


@pytest.mark.parametrize("name", NAMES)
def test_returned_sequences_of_one_prompt_start_from_equal_state(name):
    model, inputs = model_of("llama"), prompts(rows=1, length=200, pad=0)
    greedy = direct(model, inputs, name)
    found = direct(model, inputs, name, do_sample=True, top_k=1, num_return_sequences=3)
    assert found.tolist() == greedy.tolist() * 3


@pytest.mark.real
def test_smollm2_finds_what_was_said_early(smollm2):
    model, tokenizer = smollm2
    text = "The code of the red box is 4917. " + "The weather was mild and the streets were quiet. " * 24
    ids = tokenizer(
        text + "Question: what is the code of the red box? Answer: The code of the red box is", return_tensors="pt"
    )
    cache = SentenceKVCache(model, SentenceKVConfig(token_budget=160, sink_tokens=4), tokenizer)
    found = generate(model, cache, ids, max_new_tokens=6)
    assert stored_tokens(cache) > 0
    assert "4917" in tokenizer.decode(found[0, ids["input_ids"].shape[1] :])
