"""SentenceKV and HybridKV where they must be exact: texts within the budget, and stored tokens that are all retrieved."""

import copy

import pytest
import torch
from transformers import DynamicCache

from hf_ext.cache_impls.retrieval_layer import RetrievalLayer
from hf_ext.tiny import tiny_model
from tests.cache_impls.helpers import generate, prompts
from tests.cache_impls.retrieval_helpers import (
    SERVED,
    assert_close,
    choose_everything,
    feed,
    later,
    make,
    model_of,
    stored_tokens,
)


FEW = ["llama", "gemma2", "gpt2"]
NAMES = ["sentencekv", "hybridkv"]
KINDS = {
    "tokens": {},
    "mean": {"score": "mean_query", "boundary_ids": [5, 6, 7, 8]},
    "current": {"score": "current_query", "boundary_ids": [5, 6, 7, 8]},
    "pages": {"score": "page_bound"},
    "no_edges": {"sink_tokens": 0, "recent_tokens": 0},
    "every_step": {"refresh": 1},
}


def repeating(rows=1):
    inputs = prompts(rows=rows, pad=0)
    inputs["input_ids"][:, 20:] = inputs["input_ids"][:, :20]
    return inputs


MODES = {
    "greedy": (prompts, {}),
    "beams": (prompts, {"num_beams": 3, "num_return_sequences": 2}),
    "lookup": (repeating, {"prompt_lookup_num_tokens": 4}),
    "chunks": (lambda: prompts(length=70), {"prefill_chunk_size": 33}),
}


@pytest.mark.parametrize("arch", SERVED)
@pytest.mark.parametrize("mode", MODES)
def test_within_the_budget_ids_are_those_of_dynamic_cache(arch, mode):
    model, (inputs, options) = model_of(arch), MODES[mode]
    options = {"max_new_tokens": 6, **options}
    plain = {key: value for key, value in options.items() if key.startswith(("num_", "max_"))}
    expected = generate(model, None, inputs(), **plain)
    assert generate(model, make("sentencekv", model), inputs(), **options).tolist() == expected.tolist()


@pytest.mark.parametrize("arch", SERVED)
@torch.no_grad()
def test_within_the_budget_logits_are_those_of_dynamic_cache_over_two_turns(arch):
    model, inputs, blocks = model_of(arch), prompts(), later(2, [1, 1, 30, 1, 70, 1])
    expected = feed(model, DynamicCache(config=model.config), inputs, blocks)
    assert_close(feed(model, make("sentencekv", model), inputs, blocks), expected)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "falcon", "gpt2"])
def test_within_the_budget_an_assistant_changes_nothing(arch):
    model, inputs = model_of(arch), prompts(rows=1, pad=0)
    expected = generate(model, None, inputs, max_new_tokens=6)
    for name in NAMES:
        options = {"assistant_model": tiny_model(arch, seed=1), "max_new_tokens": 6}
        assert generate(model, make(name, model), inputs, **options).tolist() == expected.tolist()


@pytest.mark.parametrize("arch", ["llama", "falcon"])
def test_within_the_budget_the_models_own_attention_gives_the_same(arch):
    model, inputs = tiny_model(arch), prompts()
    expected = generate(model, None, inputs, max_new_tokens=8)
    for name in NAMES:
        cache = make(name, model.config)
        assert generate(model, cache, inputs, max_new_tokens=8).tolist() == expected.tolist()


def both(arch, name="sentencekv", **settings):
    """A model, its reference cache, and one that is filled under a budget of 128 tokens."""
    model = model_of(arch)
    return model, DynamicCache(config=model.config), make(name, model, **{"token_budget": 128, **settings})


def fill(model, caches, inputs, everything=True):
    for cache in caches:
        model(**inputs, past_key_values=cache, position_ids=(inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0))
    assert stored_tokens(caches[-1]) >= 192 * len(caches[-1].kv_layers)
    if everything:
        choose_everything(caches[-1])


def go_on(model, cache, mask, blocks):
    """Logits of later blocks of a filled cache."""
    found = []
    for block in blocks:
        positions = mask.sum(1, keepdim=True) + torch.arange(block.shape[1])
        mask = torch.cat([mask, torch.ones_like(block)], dim=1)
        options = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        found.append(model(input_ids=block, **options).logits)
    return found


SIZES = [1, 1, 5, 1, 64, 1, 65, 1, 130, 1, 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pad", [0, 23])
@torch.no_grad()
def test_with_everything_retrieved_logits_are_those_of_dynamic_cache(kind, pad):
    model, exact, cache = both("llama", **KINDS[kind])
    inputs = prompts(length=300, pad=pad)
    fill(model, [exact, cache], inputs)
    blocks = later(2, SIZES)
    expected, found = (go_on(model, c, inputs["attention_mask"], blocks) for c in (exact, cache))
    assert_close(found, expected, atol=1e-4)
    assert all(layer.newest <= 64 for layer in cache.kv_layers)


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        *(("sentencekv", arch) for arch in SERVED),
        *(("hybridkv", arch) for arch in (*FEW, "falcon", "llama_mqa", "opt")),
    ],
)
@torch.no_grad()
def test_with_everything_retrieved_every_architecture_is_exact(name, arch):
    model, exact, cache = both(arch, name)
    inputs = prompts(length=300, pad=23)
    fill(model, [exact, cache], inputs)
    blocks = later(2, [1, 3, 1, 70, 1])
    expected, found = (go_on(model, c, inputs["attention_mask"], blocks) for c in (exact, cache))
    assert_close(found, expected, atol=1e-4)


@pytest.mark.parametrize("pad", [23, 240, 299])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_with_everything_retrieved_from_a_file(name, pad, tmp_path):
    model, exact, cache = both("llama", name, offload_dir=str(tmp_path))
    inputs = prompts(length=300, pad=pad)
    fill(model, [exact, cache], inputs)
    blocks = later(2, SIZES)
    expected, found = (go_on(model, c, inputs["attention_mask"], blocks) for c in (exact, cache))
    assert_close(found, expected, atol=1e-4)
    assert cache.offloaded_bytes() > 0


REORDERED = [("sentencekv", "tokens"), ("sentencekv", "mean"), ("sentencekv", "pages"), ("hybridkv", "tokens")]


@pytest.mark.parametrize(("name", "kind"), REORDERED)
@pytest.mark.parametrize("where", ["memory", "file"])
@torch.no_grad()
def test_with_everything_retrieved_after_rows_were_reordered(name, kind, where, tmp_path):
    model, exact, cache = both("llama", name, **KINDS[kind], offload_dir=str(tmp_path) if where == "file" else None)
    inputs = prompts(rows=3, length=300, pad=23)
    fill(model, [exact, cache], inputs)
    mask = inputs["attention_mask"]
    steps = [
        (lambda c: c.reorder_cache(torch.tensor([2, 0, 2])), torch.tensor([2, 0, 2])),
        (lambda c: c.batch_select_indices(torch.tensor([1, 2])), torch.tensor([1, 2])),
        (lambda c: c.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1])),
    ]
    for turn, (step, rows) in enumerate(steps):
        for one in (exact, cache):
            step(one)
        mask = mask[rows]
        assert cache.batch_size == len(mask)
        blocks = later(len(mask), [1, 1, 40, 1], seed=turn)
        expected, found = (go_on(model, c, mask, blocks) for c in (exact, cache))
        assert_close(found, expected, atol=1e-4)
        mask = torch.cat([mask, torch.ones(len(mask), 43, dtype=torch.long)], dim=1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pad", [0, 23])
@torch.no_grad()
def test_with_everything_retrieved_after_the_newest_were_taken_back(name, pad):
    model, exact, cache = both("llama", name)
    exact.activate_past_recording()
    inputs, mask = prompts(length=300, pad=pad), prompts(length=300, pad=pad)["attention_mask"]
    fill(model, [exact, cache], inputs)
    for count, turn in ((3, 0), (32, 1), (1, 2)):
        for one in (exact, cache):
            one.crop(-count)
        assert name != "sentencekv" or cache.sentences.length == cache.get_seq_length()
        mask = mask[:, :-count]
        blocks = later(2, [1, 1, 6], seed=turn)
        expected, found = (go_on(model, c, mask, blocks) for c in (exact, cache))
        assert_close(found, expected, atol=1e-4)
        mask = torch.cat([mask, torch.ones(2, 8, dtype=torch.long)], dim=1)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_with_everything_retrieved_padding_between_turns_stays_hidden(name):
    model, exact, cache = both("llama", name)
    inputs, second = prompts(length=300, pad=23), prompts(length=100, pad=41, seed=4)
    fill(model, [exact, cache], inputs)
    mask = torch.cat([inputs["attention_mask"], second["attention_mask"]], dim=1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, 300:]
    options = {"input_ids": second["input_ids"], "attention_mask": mask, "position_ids": positions}
    found = [[model(**options, past_key_values=c).logits[:, -1:]] for c in (exact, cache)]
    for own, one in zip(found, (exact, cache)):
        own += go_on(model, one, mask, later(2, [1, 1, 30, *[1] * 5]))
    assert_close(found[1], found[0], atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [33, 64, 90])
@torch.no_grad()
def test_with_everything_retrieved_a_prompt_in_chunks_is_exact(name, chunk):
    """Padding longer than a chunk included; the budget is lifted once tokens are stored."""
    model, exact, cache = both("llama", name)
    inputs, found = prompts(rows=3, length=300, pad=0), []
    for row, pad in ((1, 100), (2, 40)):
        inputs["input_ids"][row, :pad], inputs["attention_mask"][row, :pad] = 0, 0
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for one in (exact, cache):
        logits = []
        for start in range(0, 300, chunk):
            part = slice(start, min(start + chunk, 300))
            options = {"attention_mask": mask[:, : part.stop], "position_ids": positions[:, part]}
            logits.append(model(input_ids=inputs["input_ids"][:, part], past_key_values=one, **options).logits[:, -1:])
            if one is cache and stored_tokens(cache):
                choose_everything(cache)
        found.append([torch.cat(logits[-1:] + go_on(model, one, mask, later(3, [1, 1, 1])), dim=1)])
    assert stored_tokens(cache) > 0
    assert_close(found[1], found[0], atol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "falcon"])
@pytest.mark.parametrize("name", NAMES)
def test_with_everything_retrieved_beams_are_those_of_dynamic_cache(name, arch):
    model = model_of(arch)
    inputs, options = prompts(length=150), {"num_beams": 3, "max_new_tokens": 24, "num_return_sequences": 2}
    expected = generate(model, None, inputs, **options)
    cache = make(name, model, token_budget=128)
    handle = model.register_forward_hook(lambda *_: choose_everything(cache) if stored_tokens(cache) else None)
    found = generate(model, cache, inputs, **options)
    handle.remove()
    assert stored_tokens(cache) > 0
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["memory", "file"])
def test_speculation_under_a_tight_budget_runs_and_stays_near_it(name, where, tmp_path):
    """Tokens that may be taken back are not stored, so that none may be left to retrieve."""
    model, inputs = model_of("llama"), repeating()
    inputs = {key: value.repeat(1, 8) for key, value in inputs.items()}
    folder = str(tmp_path) if where == "file" else None
    cache = make(name, model, token_budget=96, offload_dir=folder)
    options = {"max_new_tokens": 60, "prompt_lookup_num_tokens": 4}
    assert generate(model, cache, inputs, **options).shape == (1, 380)
    assert all(layer.newest <= 32 + 64 + 32 for layer in cache.kv_layers)
    assert stored_tokens(cache) > 0


@pytest.mark.parametrize("arch", FEW)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_stored_tokens_come_back_bit_equal_in_the_order_of_the_text(name, arch, tmp_path):
    model, exact, cache = both(arch, name, offload_dir=str(tmp_path))
    inputs = prompts(length=300, pad=23)
    fill(model, [exact, cache], inputs, everything=False)
    for layer, plain in zip(cache.layers, exact.layers):
        if layer in cache.kv_layers:
            assert torch.equal(layer.materialize()[0], plain.keys)
            assert torch.equal(layer.materialize()[1], plain.values)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_budget_does_change_the_result(kind):
    model, exact, cache = both("llama", **KINDS[kind])
    inputs = prompts(length=300, pad=0)
    fill(model, [exact, cache], inputs, everything=False)
    expected, found = (go_on(model, c, inputs["attention_mask"], later(2, [1])) for c in (exact, cache))
    assert float((expected[0] - found[0]).abs().max()) > 1e-2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("where", "refresh"), [("memory", 1), ("file", 5)])
@torch.no_grad()
def test_a_deep_copy_goes_on_identically_and_by_itself(name, where, refresh, tmp_path):
    folder = str(tmp_path) if where == "file" else None
    model, inputs = model_of("llama"), prompts(length=300, pad=23)
    cache = make(name, model, token_budget=128, offload_dir=folder, refresh=refresh)
    model(**inputs, past_key_values=cache)
    mask = inputs["attention_mask"]
    go_on(model, cache, mask, later(2, [1, 1]))
    mask = torch.cat([mask, torch.ones(2, 2, dtype=torch.long)], dim=1)
    other, third = copy.deepcopy(cache), copy.deepcopy(cache)
    blocks = later(2, [1] * 24 + [70] + [1] * 2)
    go_on(model, third, mask, later(2, [1] * 12, seed=9))
    expected = go_on(model, cache, mask, blocks)
    assert_close(go_on(model, other, mask, blocks), expected, atol=1e-6)
    assert other.nbytes() == cache.nbytes()
    assert other.offloaded_bytes() == cache.offloaded_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_a_reset_cache_starts_again_with_another_batch(name):
    model = model_of("llama")
    first, second = prompts(length=200), prompts(rows=3, length=160, pad=0, seed=2)
    cache = make(name, model, token_budget=128)
    for inputs in (first, second, first):
        expected = generate(model, make(name, model, token_budget=128), inputs, max_new_tokens=8)
        assert generate(model, cache, inputs, max_new_tokens=8).tolist() == expected.tolist()
        cache.reset()
        assert cache.nbytes() == 0
        assert cache.get_seq_length() == 0


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_an_empty_cache_can_be_selected_repeated_and_reordered(name):
    model, exact, cache = both("llama", name)
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_select_indices(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    cache.crop(0)
    fill(model, [exact, cache], prompts(length=300))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_layers_take_turns_at_choosing(name, monkeypatch):
    model, chose, choose = model_of("llama"), [], RetrievalLayer._choose

    def noting(layer, *arguments):
        chose.append((layer.seen, layer.order))
        choose(layer, *arguments)

    monkeypatch.setattr(RetrievalLayer, "_choose", noting)
    cache = make(name, model, token_budget=128, refresh=2)
    feed(model, cache, prompts(rows=1, length=208, pad=0), later(1, [1] * 6))
    layers = range(len(cache.kv_layers))
    assert len(layers) > 1
    assert [order for seen, order in chose if seen == 209] == list(layers), "the first step has nothing to go on with"
    for step in range(210, 215):
        assert [order for seen, order in chose if seen == step] == [n for n in layers if (step + n) % 2 == 0]
