"""`PackedCache` stores every token as it came, so whatever `DynamicCache` generates it must generate too."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import hf_ext
from hf_ext import PackedCache
from hf_ext.cache_impls.base import storage_bytes
from hf_ext.tiny import ARCHITECTURES, tiny_model
from tests.cache_impls.helpers import generate, prompts


ALL = sorted(ARCHITECTURES)


@pytest.mark.parametrize("arch", ALL)
def test_greedy_with_left_padding_equals_dynamic_cache(arch):
    model, inputs = tiny_model(arch), prompts()
    expected = generate(model, None, inputs)
    assert generate(model, PackedCache(model), inputs).tolist() == expected.tolist()


@pytest.mark.parametrize("arch", ALL)
def test_config_alone_gives_the_same_ids_through_the_models_own_attention(arch):
    model, inputs = tiny_model(arch), prompts()
    expected = generate(model, None, inputs)
    assert generate(model, PackedCache(model.config), inputs).tolist() == expected.tolist()


@pytest.mark.parametrize("arch", ALL)
def test_beams_equal_dynamic_cache(arch):
    model, inputs = tiny_model(arch), prompts()
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 12}
    expected = generate(model, None, inputs, **options)
    assert generate(model, PackedCache(model), inputs, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("arch", ALL)
def test_prompt_lookup_equals_dynamic_cache(arch):
    model, inputs = tiny_model(arch), prompts(rows=1, pad=0)
    inputs["input_ids"][:, 20:] = inputs["input_ids"][:, :20]
    expected = generate(model, None, inputs)
    found = generate(model, PackedCache(model), inputs, prompt_lookup_num_tokens=4)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "falcon"])
def test_assisted_decoding_equals_dynamic_cache(arch):
    model, inputs = tiny_model(arch), prompts(rows=1, pad=0)
    expected = generate(model, None, inputs)
    found = generate(model, PackedCache(model), inputs, assistant_model=tiny_model(arch, seed=1))
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gemma3_text", "phi", "opt", "falcon"])
def test_two_turns_on_one_cache_equal_dynamic_cache(arch):
    model, found = tiny_model(arch), []
    for cache in (DynamicCache(config=model.config), PackedCache(model)):
        turn = generate(model, cache, prompts(rows=1, pad=0))
        longer = torch.cat([turn, prompts(rows=1, length=30, pad=0, seed=1)["input_ids"]], dim=1)
        inputs = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
        found.append(generate(model, cache, inputs).tolist())
    assert found[0] == found[1]


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt_neox"])
def test_chunked_prefill_equals_dynamic_cache(arch):
    model, inputs = tiny_model(arch), prompts(length=200)
    expected = generate(model, None, inputs)
    for chunk in (33, 90):
        assert generate(model, PackedCache(model), inputs, prefill_chunk_size=chunk).tolist() == expected.tolist()


def test_sampling_with_the_same_seed_equals_dynamic_cache():
    model, inputs, found = tiny_model("llama"), prompts(), []
    for cache in (None, PackedCache(model)):
        torch.manual_seed(5)
        found.append(generate(model, cache, inputs, do_sample=True, num_return_sequences=2).tolist())
    assert found[0] == found[1]


def test_bfloat16_scores_stay_near_dynamic_cache():
    model, inputs = tiny_model("llama").to(torch.bfloat16), prompts(length=100)
    steps = []
    for cache in (None, PackedCache(model)):
        options = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 2}
        steps.append(torch.stack(generate(model, cache, inputs, **options).logits))
    difference = (steps[0] - steps[1]).abs().max() / steps[0].std()
    assert difference < 0.08, f"largest logit difference is {difference:.3f} standard deviations"


@pytest.mark.parametrize("length", [2048, 2100, 3000])
def test_bytes_are_the_reachable_storages_and_slack_is_small(length):
    model = tiny_model("llama")
    cache = PackedCache(model)
    generate(model, cache, prompts(rows=1, length=length, pad=0), max_new_tokens=40)
    held = [t for layer in cache.layers for t in vars(layer).values() if hasattr(t, "data")]
    assert cache.nbytes() == storage_bytes([buffer.data for buffer in held]) == sum(cache.tier_bytes().values())
    dense = 2 * 2 * (length + 39) * 2 * 16 * 4  # keys and values, layers, tokens, heads, head dim, bytes
    assert cache.tier_bytes()["full"] == dense
    assert cache.tier_bytes()["slack"] <= 0.05 * dense


def test_model_is_untouched_outside_forward_calls():
    model = tiny_model("llama")
    before = model.config._attn_implementation
    generate(model, PackedCache(model), prompts())
    assert model.config._attn_implementation == before
    with pytest.raises(IndexError):
        model(torch.tensor([[1, 999]]), past_key_values=PackedCache(model))
    assert model.config._attn_implementation == before


def test_cache_filled_for_another_batch_is_refused_before_anything_is_stored():
    model = tiny_model("llama")
    cache = PackedCache(model)
    generate(model, cache, prompts(rows=2))
    seen = cache.get_seq_length()
    with pytest.raises(hf_ext.CacheStateError, match="batch of 2 and was given 1"):
        generate(model, cache, prompts(rows=1, length=70, pad=0))
    assert cache.get_seq_length() == seen
    cache.reset()
    expected = generate(model, None, prompts(rows=1, pad=0))
    assert generate(model, cache, prompts(rows=1, pad=0)).tolist() == expected.tolist()


def test_crop_beyond_what_was_seen_is_refused_and_nothing_is_cropped():
    model = tiny_model("llama")
    cache = PackedCache(model)
    model(prompts(rows=1, pad=0)["input_ids"], past_key_values=cache)
    with pytest.raises(hf_ext.CacheStateError, match="41"):
        cache.crop(-41)
    with pytest.raises(hf_ext.CacheStateError, match="negative"):
        cache.crop(3)
    assert cache.get_seq_length() == 40
    cache.crop(-5)
    assert cache.get_seq_length() == 35


def test_batch_rows_can_be_selected_and_repeated():
    model, inputs = tiny_model("llama"), prompts(pad=0)
    cache = PackedCache(model)
    model(inputs["input_ids"], past_key_values=cache)
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    cache.batch_select_indices(torch.tensor([0, 3]))
    token = torch.tensor([[5], [9]])
    expected = DynamicCache(config=model.config)
    model(inputs["input_ids"], past_key_values=expected)
    torch.testing.assert_close(
        model(token, past_key_values=cache).logits, model(token, past_key_values=expected).logits, atol=1e-5, rtol=1e-5
    )


def test_gradients_flow_through_a_step_on_a_filled_cache():
    model = tiny_model("llama")
    cache = PackedCache(model)
    with torch.no_grad():
        model(prompts(rows=1, pad=0)["input_ids"], past_key_values=cache)
    model(torch.tensor([[3, 4]]), past_key_values=cache).logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["packed", "ojakv"])
@pytest.mark.parametrize("chunk", [16, 33, 64])
def test_padding_longer_than_a_chunk_is_never_attended_to(name, chunk, dtype):
    model = tiny_model("llama").to(dtype)
    inputs = prompts(rows=4, length=200, pad=0)
    for row, pad in enumerate([0, 150, 60, 199]):
        inputs["input_ids"][row, :pad], inputs["attention_mask"][row, :pad] = 0, 0
    options = {
        "prefill_chunk_size": chunk,
        "max_new_tokens": 3,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    make = {"packed": PackedCache, "ojakv": lambda m: hf_ext.OjaKVCache(m, {"ratio": 1.0})}[name]
    expected, found = (torch.stack(generate(model, c, inputs, **options).logits) for c in (None, make(model)))
    tolerance = 1e-4 if dtype == torch.float32 else 0.1 * float(expected.std())
    torch.testing.assert_close(found[0], expected[0], atol=tolerance, rtol=0)


def test_padding_between_two_turns_is_not_attended_to():
    model, found = tiny_model("llama"), []
    for cache in (DynamicCache(config=model.config), PackedCache(model), hf_ext.OjaKVCache(model, {"ratio": 1.0})):
        inputs = prompts(rows=2, pad=5)
        turn = generate(model, cache, inputs)
        more = prompts(rows=2, length=30, pad=11, seed=1)
        longer = torch.cat([turn, more["input_ids"]], dim=1)
        shown = torch.ones(2, turn.shape[1] - 40, dtype=torch.long)
        mask = torch.cat([inputs["attention_mask"], shown, more["attention_mask"]], dim=1)
        found.append(generate(model, cache, {"input_ids": longer, "attention_mask": mask}).tolist())
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("make", [PackedCache, hf_ext.OjaKVCache])
def test_a_model_that_works_on_its_keys_after_update_gets_tensors(make):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    latent = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {
        "first_k_dense_replace": 2,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
    }
    config = AutoConfig.for_model("deepseek_v3", **sizes, **latent, **experts)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    expected = generate(model, None, prompts())
    cache = make(model) if make is PackedCache else make(model, {"ratio": 1.0})
    assert generate(model, cache, prompts()).tolist() == expected.tolist()


def test_an_interrupted_forward_leaves_the_model_usable(monkeypatch):
    model = tiny_model("llama")
    cache = PackedCache(model)
    layer = model.model.layers[1]
    with monkeypatch.context() as patch:
        patch.setattr(layer.mlp, "forward", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model(torch.tensor([[5, 6]]), past_key_values=cache)
    expected = generate(model, None, prompts())
    assert generate(model, PackedCache(model), prompts()).tolist() == expected.tolist()
    assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_a_live_cache_attends_in_its_storage_again_after_unregister(monkeypatch):
    model = tiny_model("llama")
    cache = PackedCache(model)
    turn = generate(model, cache, prompts(rows=1, pad=0))
    with hf_ext.registered():
        pass
    hf_ext.unregister()
    model(turn[:, -1:], past_key_values=cache)
    for layer in cache.layers:
        monkeypatch.setattr(layer, "materialize", lambda: pytest.fail("tokens were handed out"))
    model(turn[:, -1:], past_key_values=cache)
