"""OjaKV through `generate`.

Two limit cases must give exactly the ids of `DynamicCache`: a ratio of 1, and models whose keys and values have low rank,
so that the compressed tier is in full use and loses nothing.
"""

import copy

import pytest
import torch
from transformers import DynamicCache

import hf_ext
from hf_ext import OjaKVCache, OjaKVConfig
from hf_ext.tiny import ARCHITECTURES, tiny_model
from tests.cache_impls.helpers import LOSSLESS, SMALL, generate, lossless_model, prompts, small_cache


# Without a full-attention layer, or with ALiBi: refused, see test_ojakv_errors.py.
REFUSED = ("bloom", "mistral_sliding")
SERVED = sorted(set(ARCHITECTURES) - set(REFUSED))
FEW = ["llama", "gemma2", "gemma3_text", "phi", "opt", "falcon"]
EXACT = OjaKVConfig(ratio=1)
# Of these every layer is full attention and keys rotate by halves.
ROTARY = ["llama", "mistral", "qwen2"]


def lossless_cache(model, **settings):
    return small_cache(model, **{**LOSSLESS, **settings})


def compressed_tokens(cache):
    return sum(part.key.length for layer in cache.kv_layers for part in layer.segments)


@pytest.mark.parametrize("arch", SERVED)
def test_full_budget_equals_dynamic_cache_greedily_with_left_padding(arch):
    model, inputs = tiny_model(arch), prompts()
    expected = generate(model, None, inputs)
    assert generate(model, OjaKVCache(model, EXACT), inputs).tolist() == expected.tolist()


@pytest.mark.parametrize("arch", SERVED)
def test_full_budget_equals_dynamic_cache_through_the_models_own_attention(arch):
    model, inputs = tiny_model(arch), prompts()
    expected = generate(model, None, inputs)
    assert generate(model, OjaKVCache(model.config, EXACT), inputs).tolist() == expected.tolist()


@pytest.mark.parametrize("arch", SERVED)
def test_full_budget_equals_dynamic_cache_with_beams(arch):
    model, inputs = tiny_model(arch), prompts()
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 12}
    expected = generate(model, None, inputs, **options)
    assert generate(model, OjaKVCache(model, EXACT), inputs, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("arch", SERVED)
def test_full_budget_equals_dynamic_cache_with_prompt_lookup(arch):
    model, inputs = tiny_model(arch), prompts(rows=1, pad=0)
    inputs["input_ids"][:, 20:] = inputs["input_ids"][:, :20]
    expected = generate(model, None, inputs)
    found = generate(model, OjaKVCache(model, EXACT), inputs, prompt_lookup_num_tokens=4)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "falcon"])
def test_full_budget_equals_dynamic_cache_with_an_assistant(arch):
    model, inputs = tiny_model(arch), prompts(rows=1, pad=0)
    expected = generate(model, None, inputs)
    found = generate(model, OjaKVCache(model, EXACT), inputs, assistant_model=tiny_model(arch, seed=1))
    assert found.tolist() == expected.tolist()


def two_turns(model, cache, rows=1, **kwargs):
    turn = generate(model, cache, prompts(rows=rows, pad=0), **kwargs)
    longer = torch.cat([turn, prompts(rows=rows, length=30, pad=0, seed=1)["input_ids"]], dim=1)
    return generate(model, cache, {"input_ids": longer, "attention_mask": torch.ones_like(longer)}, **kwargs).tolist()


@pytest.mark.parametrize("arch", FEW)
def test_full_budget_equals_dynamic_cache_over_two_turns(arch):
    model = tiny_model(arch)
    expected = two_turns(model, DynamicCache(config=model.config))
    assert two_turns(model, OjaKVCache(model, EXACT)) == expected


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt_neox"])
def test_full_budget_equals_dynamic_cache_with_a_prompt_in_chunks(arch):
    model, inputs = tiny_model(arch), prompts(length=200)
    expected = generate(model, None, inputs)
    for chunk in (33, 90):
        cache = OjaKVCache(model, EXACT)
        assert generate(model, cache, inputs, prefill_chunk_size=chunk).tolist() == expected.tolist()


@pytest.mark.parametrize("arch", FEW)
def test_prompts_too_short_to_compress_are_exact_at_any_ratio(arch):
    model, inputs = tiny_model(arch), prompts()
    cache = OjaKVCache(model, OjaKVConfig(ratio=0.2))
    assert generate(model, cache, inputs).tolist() == generate(model, None, inputs).tolist()
    assert compressed_tokens(cache) == 0


@pytest.mark.parametrize("arch", ROTARY)
@pytest.mark.parametrize("key_space", ["post", "pre"])
@pytest.mark.parametrize("coefficients", ["versioned", "rotate"])
def test_lossless_models_give_the_ids_of_dynamic_cache_greedily(arch, key_space, coefficients):
    model, inputs = lossless_model(arch), prompts(length=120, pad=11)
    cache = lossless_cache(model, key_space=key_space, coefficients=coefficients)
    assert generate(model, cache, inputs).tolist() == generate(model, None, inputs).tolist()
    assert compressed_tokens(cache) > 2 * 90


@pytest.mark.parametrize("update_rule", ["none", "oja", "hebbian"])
def test_lossless_models_give_the_ids_of_dynamic_cache_under_every_rule(update_rule):
    model, inputs = lossless_model("llama"), prompts(length=120, pad=0)
    cache = lossless_cache(model, update_rule=update_rule)
    assert generate(model, cache, inputs).tolist() == generate(model, None, inputs).tolist()
    assert compressed_tokens(cache) > 2 * 90


@pytest.mark.parametrize("arch", ROTARY)
@pytest.mark.parametrize("pad", [0, 11])
def test_lossless_models_give_the_ids_of_dynamic_cache_with_beams(arch, pad):
    model, inputs = lossless_model(arch), prompts(length=120, pad=pad)
    options = {"num_beams": 4, "num_return_sequences": 3}
    cache = lossless_cache(model)
    expected = generate(model, None, inputs, **options)
    assert generate(model, cache, inputs, **options).tolist() == expected.tolist()
    assert compressed_tokens(cache) > 2 * 90
    assert len({tuple(row) for row in expected.tolist()}) == 6


def test_lossless_models_give_the_ids_of_dynamic_cache_with_speculation():
    model, inputs = lossless_model("llama"), prompts(rows=1, length=120, pad=0)
    inputs["input_ids"][:, 60:] = inputs["input_ids"][:, :60]
    expected = generate(model, None, inputs, max_new_tokens=60).tolist()
    for options in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": lossless_model("llama", seed=1)}):
        cache = lossless_cache(model)
        assert generate(model, cache, inputs, max_new_tokens=60, **options).tolist() == expected
        assert compressed_tokens(cache) > 2 * 90


def test_lossless_models_give_the_ids_of_dynamic_cache_over_turns_and_in_chunks():
    model = lossless_model("llama")
    expected = two_turns(model, DynamicCache(config=model.config), rows=2, max_new_tokens=60)
    cache = lossless_cache(model)
    assert two_turns(model, cache, rows=2, max_new_tokens=60) == expected
    assert compressed_tokens(cache) > 2 * 100
    inputs = prompts(length=200)
    for chunk in (80, 33):
        cache = lossless_cache(model)
        found = generate(model, cache, inputs, prefill_chunk_size=chunk)
        assert found.tolist() == generate(model, None, inputs).tolist()
        assert compressed_tokens(cache) > 2 * 150


def test_lossless_models_sample_the_same_with_the_same_seed():
    model, inputs, found = lossless_model("llama"), prompts(length=120), []
    for cache in (None, lossless_cache(model)):
        torch.manual_seed(5)
        found.append(generate(model, cache, inputs, do_sample=True, num_return_sequences=2, top_k=10).tolist())
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2", "gpt2", "phi", "opt", "cohere", "smollm3", "phi3"])
def test_tensors_handed_out_give_the_ids_of_attention_in_the_coordinates(arch):
    inputs = prompts(rows=2, length=120, pad=0)
    ids = []
    for given in (lambda model: model, lambda model: model.config):
        model = tiny_model(arch)
        cache = small_cache(given(model), ratio=0.6, anchor_score="residual")
        ids.append(generate(model, cache, inputs).tolist())
        assert compressed_tokens(cache) > 0
    assert ids[0] == ids[1]


def test_a_lossy_cache_does_change_the_result():
    model, inputs = tiny_model("llama"), prompts(length=120, pad=0)
    logits = []
    for cache in (None, small_cache(model, key_ratio=0.1, value_ratio=0.1)):
        options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 2}
        logits.append(torch.stack(generate(model, cache, inputs, **options).logits))
    assert torch.equal(logits[0][0], logits[1][0]), "the prompt itself attends at full rank"
    assert float((logits[0][1] - logits[1][1]).abs().max()) > 0.1


def step_logits(model, cache, inputs, tokens):
    """Logits after the prompt and after each given token, `(B, 1 + T, V)`."""
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    found = [model(**inputs, position_ids=positions, past_key_values=cache).logits[:, -1]]
    for token in tokens.T:
        mask, positions = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1), positions[:, -1:] + 1
        options = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        found.append(model(token[:, None], **options).logits[:, -1])
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("key_space", ["post", "pre"])
@pytest.mark.parametrize("settings", [{"update_rule": "none"}, {"update_rule": "hebbian", "pool_window": 1}, {}])
@torch.no_grad()
def test_a_padded_row_has_the_logits_of_the_unpadded_text(key_space, settings):
    model, pad = tiny_model("llama"), 57
    settings = {"key_ratio": 0.5, "value_ratio": 0.5, "anchor_ratio": 0.0, "key_space": key_space, **settings}
    settings |= {"update_interval": 20}
    inputs, tokens = prompts(length=150, pad=pad), prompts(length=50, pad=0, seed=3)["input_ids"]
    together = step_logits(model, small_cache(model, **settings), inputs, tokens)
    alone = {name: value[1:, pad:] for name, value in inputs.items()}
    cache = small_cache(model, **settings)
    expected = step_logits(model, cache, alone, tokens[1:])
    assert compressed_tokens(cache) > 0
    torch.testing.assert_close(together[1:], expected, atol=2e-3, rtol=0)


@torch.no_grad()
def test_beams_of_a_lossy_cache_equal_recomputing_their_rows():
    """Reordered compressed state must be the state the copied row would have had by itself."""
    model = tiny_model("llama")
    settings = {"ratio": 0.6, "anchor_score": "residual", "max_versions": 50}
    inputs, tokens = prompts(rows=3, length=120, pad=0), prompts(rows=3, length=40, pad=0, seed=3)["input_ids"]
    cache, index = small_cache(model, **settings), torch.tensor([2, 0, 0])
    step_logits(model, cache, inputs, tokens[:, :17])
    cache.reorder_cache(index)
    history = torch.cat([inputs["input_ids"], tokens[:, :17]], dim=1)[index]
    own = small_cache(model, **settings)
    step_logits(model, own, {name: v[index] for name, v in inputs.items()}, history[:, 120:])
    for token in tokens[:, 17:].T:
        found, expected = (model(token[:, None], past_key_values=c).logits for c in (cache, own))
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    assert compressed_tokens(cache) == compressed_tokens(own) > 150


def test_one_beam_search_row_does_not_depend_on_the_batch():
    model, inputs = tiny_model("llama"), prompts(length=120, pad=0)
    options = {"num_beams": 3, "max_new_tokens": 30}
    settings = {"ratio": 0.6, "anchor_score": "residual", "max_versions": 50}
    together = generate(model, small_cache(model, **settings), inputs, **options)
    for row in range(2):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        found = generate(model, small_cache(model, **settings), alone, **options)
        assert found.tolist() == together[row : row + 1].tolist()


def test_returned_sequences_of_one_prompt_start_from_equal_state():
    model, inputs = tiny_model("llama"), prompts(rows=1, length=120, pad=0)
    settings = {"ratio": 0.6, "anchor_score": "residual"}
    greedy = generate(model, small_cache(model, **settings), inputs)
    cache = small_cache(model, **settings)
    found = generate(model, cache, inputs, do_sample=True, top_k=1, num_return_sequences=3)
    assert found.tolist() == greedy.tolist() * 3
    assert cache.batch_size == 3


def test_two_runs_with_fresh_caches_and_a_reset_cache_agree():
    model, inputs = tiny_model("llama"), prompts(length=120)
    settings = {"ratio": 0.6, "anchor_score": "residual"}
    caches = [small_cache(model, **settings) for _ in range(2)]
    first, second = (generate(model, cache, inputs).tolist() for cache in caches)
    assert first == second
    caches[0].reset()
    assert caches[0].nbytes() == 0
    assert generate(model, caches[0], inputs).tolist() == first
    caches[0].reset()
    other = prompts(rows=3, length=90, pad=0, seed=2)
    expected = generate(model, small_cache(model, **settings), other).tolist()
    assert generate(model, caches[0], other).tolist() == expected, "a reset cache takes another batch size"


@pytest.mark.parametrize("allocation", ["equal", "layer", "global"])
@torch.no_grad()
def test_a_cache_whose_first_forward_failed_is_usable_after_reset(allocation):
    model, inputs = tiny_model("llama"), prompts(length=120)
    settings = {"ratio": 0.6, "anchor_score": "residual", "allocation": allocation}
    expected = generate(model, small_cache(model, **settings), inputs).tolist()
    cache = small_cache(model, **settings)
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**inputs, past_key_values=cache)
    handle.remove()
    cache.reset()
    assert generate(model, cache, inputs).tolist() == expected


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
@torch.no_grad()
def test_a_deep_copy_of_a_filled_cache_goes_on_identically(arch, monkeypatch):
    model, inputs = tiny_model(arch), prompts(length=120, pad=0)
    cache = small_cache(model, ratio=0.6, anchor_score="residual")
    model(**inputs, past_key_values=cache)
    other = copy.deepcopy(cache)
    for layer in (*cache.kv_layers, *other.kv_layers):
        monkeypatch.setattr(layer, "materialize", lambda: pytest.fail("tokens were rebuilt to attend to them"))
    for token in prompts(length=20, pad=0, seed=3)["input_ids"].T:
        expected, found = (model(token[:, None], past_key_values=c).logits for c in (cache, other))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert other.nbytes() == cache.nbytes()


@torch.no_grad()
def test_a_crop_beyond_the_newest_tokens_leaves_every_layer_as_it_was():
    model, inputs = tiny_model("llama"), prompts(length=120, pad=0)
    cache = small_cache(model, ratio=0.6, anchor_score="residual")
    model(**inputs, past_key_values=cache)
    other = copy.deepcopy(cache)
    with pytest.raises(hf_ext.CacheStateError, match="cannot crop 7 tokens"):
        cache.crop(-7)
    assert [layer.get_seq_length() for layer in cache.layers] == [120, 120]
    token = torch.tensor([[5], [9]])
    found, expected = (model(token, past_key_values=c).logits for c in (cache, other))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    cache.crop(-1)
    torch.testing.assert_close(model(token, past_key_values=cache).logits, expected, atol=1e-4, rtol=0)


def test_a_turn_after_speculation_compresses_again():
    """Recording is for the span of one generation: afterwards the window of newest tokens must not grow for ever."""
    model = lossless_model("llama")
    cache = lossless_cache(model)
    turn = generate(model, cache, prompts(rows=1, length=120, pad=0), prompt_lookup_num_tokens=4)
    inputs = {"input_ids": turn, "attention_mask": torch.ones_like(turn)}
    longer = generate(model, cache, inputs, max_new_tokens=150)
    newest = [layer.recent for layer in cache.kv_layers]
    assert max(newest) <= SMALL["recent_tokens"] + 64 + SMALL["update_interval"], f"newest tokens per layer: {newest}"
    assert longer.tolist() == generate(model, None, inputs, max_new_tokens=150).tolist()


@pytest.mark.parametrize("coefficients", ["versioned", "rotate"])
def test_bfloat16_stays_near_float32(coefficients):
    inputs, logits = prompts(length=150), []
    tokens = prompts(length=20, pad=0, seed=3)["input_ids"]
    for dtype in (torch.float32, torch.bfloat16):
        model = lossless_model("llama").to(dtype)
        cache = lossless_cache(model, coefficients=coefficients)
        with torch.no_grad():
            logits.append(step_logits(model, cache, inputs, tokens).float())
        assert compressed_tokens(cache) > 0
        assert all(t.dtype == dtype for layer in cache.kv_layers for t in layer.materialize())
    difference = (logits[0] - logits[1]).abs().mean() / logits[0].std()
    assert difference < 0.05, f"mean logit difference is {difference:.3f} standard deviations"


def test_only_full_attention_layers_are_replaced():
    model, inputs = tiny_model("gemma3_text"), prompts(length=120)
    cache = small_cache(model, ratio=0.6, anchor_score="residual")
    plain = DynamicCache(config=model.config)
    generate(model, cache, inputs)
    assert len(cache.kv_layers) == 1
    kinds = [type(layer) for layer in plain.layers]
    assert [type(layer) for layer in cache.layers[:5]] == kinds[:5]
    assert compressed_tokens(cache) > 0


def test_padding_between_two_turns_stays_hidden_once_compressed():
    model, found = lossless_model("llama"), []
    for cache in (DynamicCache(config=model.config), small_cache(model, **LOSSLESS)):
        inputs = prompts(rows=2, length=120, pad=0)
        turn = generate(model, cache, inputs)
        more = prompts(rows=2, length=60, pad=21, seed=1)
        longer = torch.cat([turn, more["input_ids"]], dim=1)
        mask = torch.cat([torch.ones_like(turn), more["attention_mask"]], dim=1)
        found.append(generate(model, cache, {"input_ids": longer, "attention_mask": mask}, max_new_tokens=60).tolist())
    assert compressed_tokens(cache) > 100
    assert found[0] == found[1]


@pytest.mark.parametrize("chunk", [33, 80])
def test_padding_longer_than_a_chunk_stays_hidden_once_compressed(chunk):
    model, inputs = lossless_model("llama"), prompts(rows=3, length=200, pad=0)
    for row, pad in ((1, 90), (2, 40)):
        inputs["input_ids"][row, :pad], inputs["attention_mask"][row, :pad] = 0, 0
    cache = small_cache(model, **LOSSLESS)
    expected = generate(model, None, inputs)
    assert generate(model, cache, inputs, prefill_chunk_size=chunk).tolist() == expected.tolist()
    assert compressed_tokens(cache) > 100
