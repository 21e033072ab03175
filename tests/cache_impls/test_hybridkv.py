"""HybridKV: exact tokens and codes under one softmax, and budgets in bytes."""

import copy

import pytest
import torch
from transformers import DynamicCache

from hf_ext import ConfigError, log
from hf_ext.cache_impls import retrieval
from hf_ext.cache_impls.attention import dense_attention
from hf_ext.tiny import tiny_model
from tests.cache_impls.helpers import generate, prompts, reachable_bytes, text_tensors
from tests.cache_impls.retrieval_helpers import (
    EDGES,
    TIGHT,
    HybridDriver,
    RetrievalDriver,
    assert_close,
    feed,
    later,
    make,
    model_of,
    stored_tokens,
)


PROMPT, DIM = 300, 16
FEW = ["llama", "gemma2", "falcon"]


@pytest.mark.parametrize("arch", FEW)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3, "num_return_sequences": 2}, {"prefill_chunk_size": 33}, {"prompt_lookup_num_tokens": 3}],
    ids=["greedy", "beams", "chunks", "lookup"],
)
def test_within_the_budget_ids_are_those_of_dynamic_cache(arch, options):
    lookup = "prompt_lookup_num_tokens" in options
    model, inputs = model_of(arch), prompts(length=70, rows=1 if lookup else 2, pad=0 if lookup else 7)
    plain = {key: value for key, value in options.items() if key.startswith("num_")}
    expected = generate(model, None, inputs, **plain, max_new_tokens=6)
    assert generate(model, make("hybridkv", model), inputs, **options, max_new_tokens=6).tolist() == expected.tolist()


@pytest.mark.parametrize("arch", FEW)
@torch.no_grad()
def test_within_the_budget_logits_are_those_of_dynamic_cache(arch):
    model, inputs, blocks = model_of(arch), prompts(), later(2, [1, 1, 30, 1, 70, 1])
    for settings in ({}, {"max_bytes": 10**9}):
        expected = feed(model, DynamicCache(config=model.config), inputs, blocks)
        assert_close(feed(model, make("hybridkv", model, **settings), inputs, blocks), expected)


# One softmax.


BUDGETS = {
    "all_stored": {},
    "ratio": {"ratio": 0.6},
    "few_kept": {"ratio": 0.35, "index_rank": 3, "value_rank": 3},
    "none_kept": {"ratio": 0.05},
    "all_kept_attended": {"ratio": 0.5, "token_budget": 400},
    "ranks": {"index_rank": 2, "value_rank": 9},
}


@pytest.mark.parametrize("kind", BUDGETS)
@pytest.mark.parametrize(("pads", "groups"), [(None, 2), ((0, 45), 2), ((130, 7), 1)])
def test_every_token_takes_part_exactly_once(kind, pads, groups):
    text = text_tensors(2, 2, groups, PROMPT + 40, DIM)
    HybridDriver(pads=pads, groups=groups, **{**TIGHT, **BUDGETS[kind]}).check(text, PROMPT)


@pytest.mark.parametrize("kind", BUDGETS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_every_token_takes_part_exactly_once_in_blocks(kind, softcap):
    blocks = [7, 1, 40, 1, 64, 1, 1]
    text = text_tensors(2, 2, 2, PROMPT + sum(blocks), DIM)
    HybridDriver(softcap=softcap, pads=(0, 45), **{**TIGHT, **BUDGETS[kind]}).check(text, PROMPT, blocks)


@pytest.mark.parametrize("kind", BUDGETS)
@pytest.mark.parametrize("pads", [None, (0, 45)])
def test_every_token_takes_part_exactly_once_from_a_file(kind, pads, tmp_path):
    text = text_tensors(2, 2, 2, PROMPT + 36, DIM)
    HybridDriver(pads=pads, offload_dir=str(tmp_path), **{**TIGHT, **BUDGETS[kind]}).check(text, PROMPT)


def test_every_token_takes_part_where_others_would_search_pages_first(monkeypatch):
    monkeypatch.setattr(retrieval, "SCANNED_TOKENS", 64)
    monkeypatch.setattr(retrieval, "SCANNED_BUDGETS", 1)
    monkeypatch.setattr(retrieval, "CANDIDATES", 32)
    monkeypatch.setattr(retrieval, "CANDIDATE_BUDGETS", 1)
    text = text_tensors(2, 2, 2, 700, DIM)
    HybridDriver(pads=(0, 45), **TIGHT, ratio=0.6, index_rank=3, value_rank=3).check(text, 680)


def test_hand_computed():
    """One query, one head: two sinks, two newest, 32 in between of which one is fetched."""
    length = 36
    text = text_tensors(1, 1, 1, length + 1, 4)
    driver = RetrievalDriver(
        "hybridkv",
        batch=1,
        kv_heads=1,
        groups=1,
        dim=4,
        token_budget=36,
        sink_tokens=2,
        recent_tokens=2,
        refresh=1,
    )
    driver.layer.config.token_budget = 35  # less than can be asked for, so that 37 tokens do not fit
    query, key, value = text
    driver.feed(*(t[:, :, :length] for t in text))
    layer = driver.layer
    assert layer.stored == 32
    driver.layer.config.token_budget = 2 + 3 + 1
    found = driver.feed(*(t[:, :, length:] for t in text))[0, 0, 0]
    fetched = int(layer.chosen)
    keys, values = (codes.decode()[0, 0] for codes in (layer.index.codes, layer.value_codes))
    total, weights = torch.zeros(4), 0.0
    for place in range(length + 1):
        own_key, own_value = key[0, 0, place], value[0, 0, place]
        if 2 <= place < 34 and place - 2 != fetched:
            own_key, own_value = keys[place - 2], values[place - 2]
        weight = float(torch.exp(query[0, 0, length] @ own_key / 2))
        total, weights = total + weight * own_value, weights + weight
    torch.testing.assert_close(found, total / weights, atol=1e-5, rtol=1e-5)


# How near the dense cache.


@torch.no_grad()
def distance(**settings):
    model, inputs, blocks = model_of("llama"), prompts(length=PROMPT, pad=23), later(2, [1] * 12)
    expected = torch.cat(feed(model, DynamicCache(config=model.config), inputs, blocks), dim=1)
    cache = make("hybridkv", model, **{**TIGHT, "token_budget": 96, "refresh": 1, **settings})
    found = torch.cat(feed(model, cache, inputs, blocks), dim=1)
    assert stored_tokens(cache) > 0 or settings.get("ratio")
    return (found - expected).abs()


def test_codes_of_full_rank_are_near_the_dense_cache():
    full = distance(index_rank=DIM, value_rank=DIM)
    assert float(full.max()) < 0.1
    assert float(distance(index_rank=1, value_rank=1).mean()) > 10 * float(full.mean())


def test_more_rank_and_more_tokens_come_nearer():
    by_rank = [float(distance(index_rank=r, value_rank=r).mean()) for r in (1, 4, 16)]
    assert by_rank == sorted(by_rank, reverse=True)
    by_budget = [float(distance(token_budget=b).mean()) for b in (64, 256)]
    assert by_budget[0] > by_budget[-1]
    by_ratio = [float(distance(ratio=r, token_budget=512).mean()) for r in (0.3, 0.9)]
    assert by_ratio[0] > by_ratio[-1]


def test_codes_answer_better_than_leaving_tokens_out():
    model, inputs, blocks = model_of("llama"), prompts(length=PROMPT, pad=23), later(2, [1] * 12)
    with torch.no_grad():
        expected = torch.cat(feed(model, DynamicCache(config=model.config), inputs, blocks), dim=1)
        without = torch.cat(feed(model, make("sentencekv", model, **TIGHT), inputs, blocks), dim=1)
    assert float(distance(token_budget=64).mean()) < float((without - expected).abs().mean())


# Bytes.


def dense_bytes(driver, length, dim, dtype, kv_heads=2):
    return 2 * driver.batch * kv_heads * length * dim * dtype.itemsize


def long_text(length, dim=64, batch=1, dtype=torch.float32):
    return text_tensors(batch, 2, 2, length, dim, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "budget"), [(1, 128), (2, 1024)])
def test_a_ratio_is_the_share_of_the_dense_bytes(dtype, batch, budget):
    text = long_text(2050, batch=batch, dtype=dtype)
    for ratio in (0.3, 0.5, 0.7):
        driver = RetrievalDriver("hybridkv", batch=batch, dim=64, ratio=ratio, token_budget=budget)
        driver.feed_text(text, 2048)  # with the copies a step asks for
        share = driver.cache.nbytes() / dense_bytes(driver, 2048, 64, dtype)
        assert 0.85 * ratio <= share <= ratio + 0.03, (
            f"{share:.3f} for a ratio of {ratio}: {driver.cache.tier_bytes()}"
        )


@pytest.mark.parametrize("pads", [(0, 300)])
def test_a_ratio_counts_padding(pads):
    driver = RetrievalDriver("hybridkv", dim=64, pads=pads, ratio=0.5, token_budget=256)
    driver.feed_text(long_text(2050, batch=2), 2048)
    assert driver.cache.nbytes() <= 0.53 * dense_bytes(driver, 2048, 64, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_max_bytes_are_respected_and_used(dtype, share):
    limit = int(share * 2 * 2 * 2 * 2048 * 64 * dtype.itemsize)
    driver = RetrievalDriver("hybridkv", batch=2, dim=64, max_bytes=limit)
    driver.feed_text(long_text(2050, batch=2, dtype=dtype), 2048)
    assert 0.85 * limit <= driver.cache.nbytes() <= 1.03 * limit


@torch.no_grad()
def test_max_bytes_are_for_all_layers_and_rows():
    model = model_of("llama")
    limit = int(0.6 * 2 * 2 * 3 * 2 * 1024 * 16 * 4)
    cache = make("hybridkv", model, max_bytes=limit, token_budget=128)
    model(**prompts(rows=3, length=1024, pad=0), past_key_values=cache)
    assert 0.8 * limit <= cache.nbytes() <= 1.03 * limit


@torch.no_grad()
def test_max_bytes_that_do_not_hold_the_prompt_are_refused_with_the_way_out():
    model = model_of("llama")
    cache = make("hybridkv", model, max_bytes=5000)
    with pytest.raises(ConfigError, match=r"max_bytes=5000 does not hold .*prompt of 1024 tokens; raise it, or lower"):
        model(**prompts(length=1024), past_key_values=cache)
    cache.reset()
    assert cache.nbytes() == 0


@torch.no_grad()
def test_a_ratio_that_does_not_hold_the_prompt_is_not_passed_over_in_silence(caplog, monkeypatch):
    """Sinks, newest tokens and codes alone are a quarter of this prompt."""
    monkeypatch.setattr(log, "_seen", set())
    model = model_of("llama")
    cache = make("hybridkv", model, ratio=0.05)
    try:
        model(**prompts(length=400, pad=0), past_key_values=cache)
    except ConfigError as error:
        said = str(error)
    else:
        said = " ".join(record.getMessage() for record in caplog.records)
    assert "ratio=0.05" in said


@pytest.mark.parametrize("ratio", [0.3, 0.5])
@pytest.mark.parametrize("where", ["memory", "file"])
def test_generated_tokens_keep_the_share_of_the_prompt(ratio, where, tmp_path):
    folder = str(tmp_path) if where == "file" else None
    driver = RetrievalDriver("hybridkv", dim=64, ratio=ratio, token_budget=256, offload_dir=folder)
    driver.feed_text(long_text(1800, batch=2), 1024, [1] * 40 + [60] * 12 + [1] * 16)
    layer = driver.layer
    assert layer.index.length > 1650
    share = layer.kept_share
    assert 0 < share < 1
    assert abs(layer.stored / layer.index.length - share) < 0.02
    late = int((layer.kept_tokens >= 1024).sum()) / (2 * 2)
    assert abs(late / (layer.index.length - 1024) - share) < 0.1
    assert (layer.kept_tokens.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("pads", [None, (0, 45)])
@pytest.mark.parametrize("ratio", [0.4, 0.7])
def test_rebuilt_tokens_are_near_the_true_ones_and_equal_where_kept(pads, ratio):
    text = text_tensors(2, 2, 2, PROMPT + 60, DIM)
    driver = RetrievalDriver("hybridkv", pads=pads, **TIGHT, ratio=ratio)
    driver.feed_text(text, PROMPT)
    layer = driver.layer
    places = layer.places_of(layer.kept_tokens.long(), layer.kept_tokens.shape).expand(-1, 2, -1)
    real = torch.ones(2, PROMPT + 60, dtype=torch.bool)
    if pads is not None:
        real = torch.arange(PROMPT + 60) >= torch.tensor(pads)[:, None]
    for rebuilt, given, codes in zip(layer.materialize(), text[1:], (layer.index.codes, layer.value_codes)):
        assert rebuilt.shape == given.shape
        whole = places[..., None].expand(-1, -1, -1, DIM)
        assert torch.equal(rebuilt.gather(2, whole), given.gather(2, whole))
        newest = slice(-layer.newest, None)
        assert torch.equal(rebuilt[:, :, newest], given[:, :, newest])
        lost = (rebuilt - given).square().sum(-1)[real[:, None].expand(-1, 2, -1)]
        energy = given.square().sum(-1)[real[:, None].expand(-1, 2, -1)]
        assert float(lost.sum() / energy.sum()) < 0.3, f"rank {codes.rank}"


@torch.no_grad()
def test_long_blocks_attend_to_rebuilt_tokens():
    text = text_tensors(2, 2, 2, PROMPT + 130, DIM)
    driver = HybridDriver(**TIGHT, ratio=0.5)
    driver.feed_text([t[:, :, : PROMPT + 20] for t in text], PROMPT)
    layer = copy.deepcopy(driver.layer)
    rest = [t[:, :, PROMPT + 20 :] for t in text]
    layer.append(*rest[1:])
    layer.seen += 110
    expected = dense_attention(
        driver.module, rest[0], *layer.materialize(), driver.mask(PROMPT + 20, PROMPT + 130), scaling=0.25
    )[0]
    driver.note = lambda: None
    torch.testing.assert_close(driver.feed(*rest), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", BUDGETS)
@pytest.mark.parametrize("pad", [0, 23])
@torch.no_grad()
def test_bytes_are_the_storages_that_can_be_reached(kind, pad):
    model = model_of("llama")
    cache = make("hybridkv", model, **{**TIGHT, **BUDGETS[kind]})
    model(**prompts(length=PROMPT, pad=pad), past_key_values=cache)
    for block in later(2, [1, 1, 40, 1]):
        assert cache.nbytes() == reachable_bytes(cache) == sum(cache.tier_bytes().values())
        model(input_ids=block, past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert cache.nbytes() == reachable_bytes(cache) == sum(cache.tier_bytes().values())


@pytest.mark.parametrize("kind", ["all_stored", "ratio", "few_kept", "all_kept_attended"])
@torch.no_grad()
def test_reordered_rows_and_copies_go_on_as_their_own(kind):
    model, index = model_of("llama"), torch.tensor([2, 0, 0])
    inputs, blocks = prompts(rows=3, length=PROMPT, pad=23), later(3, [1] * 5)
    cache = make("hybridkv", model, **{**TIGHT, **BUDGETS[kind]})
    feed(model, cache, inputs, blocks)
    other, third = copy.deepcopy(cache), copy.deepcopy(cache)
    other.reorder_cache(index)
    mask, more = torch.ones(3, PROMPT + 5, dtype=torch.long), later(3, [1] * 22, seed=8)
    mask[-1, :23] = 0
    runs = []
    for one, order in ((cache, torch.arange(3)), (other, index), (third, torch.arange(3))):
        shown, logits = mask[order], []
        for block in more:
            positions = shown.sum(1, keepdim=True)
            shown = torch.cat([shown, torch.ones(3, 1, dtype=torch.long)], dim=1)
            options = {"attention_mask": shown, "position_ids": positions, "past_key_values": one}
            logits.append(model(input_ids=block[order], **options).logits)
        runs.append(logits)
    assert_close(runs[1], [step[index] for step in runs[0]], atol=1e-4)
    assert_close(runs[2], runs[0], atol=1e-6)


@pytest.mark.parametrize("pad", [32, 96])
@pytest.mark.parametrize("settings", [{}, {"index_rank": DIM, "value_rank": DIM}])
@torch.no_grad()
def test_left_padding_does_not_change_what_a_row_says(pad, settings):
    """Up to the rounding of codes and which of two tokens of equal weight is fetched."""
    model, blocks = model_of("llama"), later(2, [1] * 24 + [20, 1])
    inputs, settings = prompts(length=PROMPT, pad=pad), {**EDGES, "token_budget": 96, "refresh": 1, **settings}
    together = feed(model, make("hybridkv", model, **settings), inputs, blocks)
    alone = {key: value[1:, pad:] for key, value in inputs.items()}
    expected = feed(model, make("hybridkv", model, **settings), alone, [block[1:] for block in blocks])
    assert_close([logits[1:] for logits in together], expected, atol=0.1)


def test_bfloat16():
    inputs, blocks, logits = prompts(length=PROMPT, pad=23), later(2, [1] * 10), []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model("llama").to(dtype)
        cache = make("hybridkv", model, **TIGHT, index_rank=DIM, value_rank=DIM)
        with torch.no_grad():
            logits.append(torch.cat(feed(model, cache, inputs, blocks), dim=1).float())
        assert stored_tokens(cache) > 0
    assert float((logits[0] - logits[1]).abs().mean() / logits[0].std()) < 0.1
