"""HybridKV over so many tokens that only some pages are read token by token: the others take part by their mean codes."""

import copy
import itertools

import pytest
import torch
from transformers import DynamicCache

from hf_ext.cache_impls import retrieval
from hf_ext.cache_impls.attention import dense_attention
from hf_ext.cache_impls.base import padded_rows
from hf_ext.cache_impls.retrieval import PAGE, TokenIndex
from hf_ext.cache_impls.store import OffloadedRows
from tests.cache_impls.helpers import prompts, reachable_bytes, text_tensors
from tests.cache_impls.retrieval_helpers import (
    TIGHT,
    HybridDriver,
    RetrievalDriver,
    assert_close,
    choose_everything,
    feed,
    later,
    make,
    model_of,
)


PROMPT, DIM = 200, 16


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    """Pages are searched from 65 tokens on, and four of them read, the two newest among these."""
    limits = {"SCANNED_TOKENS": 64, "SCANNED_BUDGETS": 1, "CANDIDATES": 64, "CANDIDATE_BUDGETS": 1}
    for name, value in {**limits, "NEWEST_CANDIDATES": 32}.items():
        monkeypatch.setattr(retrieval, name, value)


class PageDriver(HybridDriver):
    def note(self):
        super().note()
        layer = self.layer
        if layer.stores and layer.index.in_pages:
            pages = layer.stored // PAGE
            most = max(4, self.cache.config.token_budget // PAGE)
            assert layer.near.shape[2] == min(most, pages)
            self.read = getattr(self, "read", 0) + 1

    def go_on(self, text, sizes):
        """Feeds what follows in `text`, in blocks of the given sizes, and compares."""
        self.text, self.expected, found = text, [], []
        for size in sizes:
            part = slice(self.layer.seen, self.layer.seen + size)
            found.append(self.feed(*(tokens[:, :, part] for tokens in text)))
        assert_close(found, self.expected, atol=1e-4)


def filled(text, pads=None, prompt=PROMPT, **settings):
    """A driver that has read the prompt and stored most of it."""
    driver = PageDriver(batch=text[0].shape[0], pads=pads, **{**TIGHT, **settings})
    driver.text = text
    driver.feed(*(tokens[:, :, :prompt] for tokens in text))
    assert driver.layer.index.in_pages
    return driver


# One softmax.

SETTINGS = {
    "default": {},
    "ranks": {"index_rank": 3, "value_rank": 9},
    "more": {"token_budget": 96},
    "refresh": {"refresh": 5},
    "no edges": {"sink_tokens": 0, "recent_tokens": 0},
}


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize(("pads", "groups"), [(None, 2), ((0, 45), 2), ((130, 7), 1)])
def test_every_token_takes_part_exactly_once(kind, pads, groups):
    driver = PageDriver(pads=pads, groups=groups, **{**TIGHT, **SETTINGS[kind]})
    driver.check(text_tensors(2, 2, groups, PROMPT + 40, DIM), PROMPT)
    assert driver.read == 40


@pytest.mark.parametrize("kind", ["default", "more"])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("pads", [None, (0, 45)])
def test_every_token_takes_part_exactly_once_in_blocks(kind, softcap, pads):
    blocks = [7, 1, 40, 1, 64, 1, 1]
    driver = PageDriver(softcap=softcap, pads=pads, **{**TIGHT, **SETTINGS[kind]})
    driver.check(text_tensors(2, 2, 2, PROMPT + sum(blocks), DIM), PROMPT, blocks)


@pytest.mark.parametrize("pads", [None, (0, 45)])
def test_every_token_takes_part_exactly_once_from_a_file(pads, tmp_path):
    driver = PageDriver(pads=pads, offload_dir=str(tmp_path), **TIGHT)
    driver.check(text_tensors(2, 2, 2, PROMPT + 36, DIM), PROMPT)
    assert isinstance(driver.layer.stores[0], OffloadedRows)


@pytest.mark.parametrize("pads", [None, (0, 45)])
@pytest.mark.parametrize("refresh", [1, 5])
def test_every_token_takes_part_exactly_once_while_the_text_outgrows_the_scan(pads, refresh, monkeypatch):
    monkeypatch.setattr(retrieval, "SCANNED_TOKENS", 192)
    driver = PageDriver(pads=pads, **TIGHT, refresh=refresh)
    text = text_tensors(2, 2, 2, PROMPT + 110, DIM)
    driver.check(text, PROMPT)
    assert 0 < driver.read < 80


@pytest.mark.parametrize("settings", [{"ratio": 0.6}, {"max_bytes": 60_000}])
def test_under_a_byte_budget_every_token_is_read(settings):
    driver = HybridDriver(**TIGHT, **settings)
    driver.check(text_tensors(2, 2, 2, 400, DIM), 380)
    assert driver.layer.index.length > 64
    assert not driver.layer.index.in_pages
    assert driver.layer.value_pages is None


def test_hand_computed(monkeypatch):
    """One query, one head, full ranks: two sinks, two newest, and four pages, of which the two newest are read."""
    monkeypatch.setattr(retrieval, "SCANNED_TOKENS", 32)
    monkeypatch.setattr(retrieval, "CANDIDATES", 32)
    length, settings = 68, {"sink_tokens": 2, "recent_tokens": 2, "index_rank": 4, "value_rank": 4}
    query, key, value = text = text_tensors(1, 1, 1, length + 1, 4)
    driver = RetrievalDriver("hybridkv", batch=1, kv_heads=1, groups=1, dim=4, token_budget=36, **settings)
    driver.cache.config.token_budget = 2 + 3 + 1
    driver.feed(*(t[:, :, :length] for t in text))
    found = driver.feed(*(t[:, :, length:] for t in text))[0, 0, 0]
    assert driver.layer.near.tolist() == [[[2, 3]]]
    total, weights = torch.zeros(4), 0.0
    for place in range(length + 1):
        own = [place]
        if 2 <= place < 34:
            first = 2 + (place - 2) // 16 * 16
            own = list(range(first, first + 16))
        weight = float(torch.exp(query[0, 0, length] @ key[0, 0, own].mean(0) / 2))
        total, weights = total + weight * value[0, 0, own].mean(0), weights + weight
    torch.testing.assert_close(found, total / weights, atol=0.02, rtol=0.02)


# What happens to a cache.


@pytest.mark.parametrize("pads", [None, (0, 45, 17)])
@pytest.mark.parametrize("index", [[2, 0, 1], [1, 1, 0], [2]])
def test_after_rows_were_reordered(pads, index):
    text, index = text_tensors(3, 2, 2, PROMPT + 100, DIM), torch.tensor(index)
    driver = filled(text, pads, refresh=4)
    driver.go_on(text, [1, 40, 1, 1])
    driver.cache.reorder_cache(index)
    driver.batch, driver.pads = len(index), None if pads is None else driver.pads[index]
    driver.go_on([tokens[index] for tokens in text], [1, 1, 40, 1, 1])


@pytest.mark.parametrize("where", ["memory", "file"])
def test_after_rows_were_selected_and_repeated(where, tmp_path):
    text = text_tensors(3, 2, 2, PROMPT + 90, DIM)
    driver = filled(text, (0, 45, 17), offload_dir=str(tmp_path) if where == "file" else None)
    driver.cache.batch_select_indices(torch.tensor([1, 2]))
    driver.cache.batch_repeat_interleave(2)
    index = torch.tensor([1, 1, 2, 2])
    driver.batch, driver.pads = 4, driver.pads[index]
    driver.go_on([tokens[index] for tokens in text], [1, 40, 1, 1])


@pytest.mark.parametrize("pads", [None, (0, 45)])
@pytest.mark.parametrize("count", [1, 9])
def test_after_the_newest_were_taken_back(pads, count):
    text, other = (text_tensors(2, 2, 2, PROMPT + 90, DIM, seed=seed) for seed in (0, 1))
    driver = filled(text, pads, refresh=4)
    driver.go_on(text, [1] * 30)
    driver.cache.crop(-count)
    seen = driver.layer.seen
    mixed = [torch.cat([old[:, :, :seen], new[:, :, seen:]], dim=2) for old, new in zip(text, other)]
    driver.go_on(mixed, [1] * 12 + [30, 1])


def test_after_a_reset_with_another_batch():
    driver = filled(text_tensors(2, 2, 2, PROMPT + 1, DIM), (0, 45))
    driver.go_on(driver.text, [1])
    driver.cache.reset()
    assert driver.cache.nbytes() == reachable_bytes(driver.cache) == 0
    text = text_tensors(3, 2, 2, PROMPT, DIM, seed=1)
    driver.batch, driver.pads, driver.text = 3, torch.tensor([17, 0, 90]), text
    driver.feed(*(tokens[:, :, :160] for tokens in text))
    driver.go_on(text, [1] * 36)


def test_a_copy_goes_on_by_itself():
    text, other = (text_tensors(2, 2, 2, PROMPT + 60, DIM, seed=seed) for seed in (0, 1))
    driver = filled(text, (0, 45), refresh=4)
    driver.go_on(text, [1, 1])
    twin = copy.deepcopy(driver)
    seen = driver.layer.seen
    mixed = [torch.cat([old[:, :, :seen], new[:, :, seen:]], dim=2) for old, new in zip(text, other)]
    twin.go_on(mixed, [1] * 40)
    driver.go_on(text, [1] * 40)


# Where it must be exact.


def alike(length, sinks, seed=0):
    """A text whose pages, counted from behind the sinks, are sixteen times the same token.

    Keys and values of pages lie on a line each, at -1, 0 and 1: codes of one coordinate are exact.
    """
    query, key, value = text_tensors(2, 2, 2, length, DIM, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    lines = torch.nn.functional.normalize(torch.randn(2, 2, 2, 1, DIM, generator=generator), dim=-1)
    for page, first in enumerate(range(sinks, length, PAGE)):
        part = slice(first, first + PAGE)
        key[:, :, part] = 3 * lines[0] * (-1, 1, 0, 0)[page % 4]
        value[:, :, part] = lines[1] * (0, 1, -1, 0)[page % 4]
    return query, key, value


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pad", [0, 64])
@pytest.mark.parametrize("budget", [64, 120])
def test_pages_of_one_token_are_exact_whatever_is_read_and_fetched(seed, pad, budget, monkeypatch):
    prompt, steps = 4 + 256 + 8, 40
    text = alike(prompt + steps, sinks=4, seed=seed)
    if pad:  # the sinks stand behind it
        order = torch.cat([torch.arange(4, 4 + pad), torch.arange(4), torch.arange(4 + pad, prompt + steps)])
        text = [tokens[:, :, order] for tokens in text]
    query, key, value = text
    settings = {**TIGHT, "token_budget": budget, "index_rank": 1, "value_rank": 1}
    driver = RetrievalDriver("hybridkv", pads=(pad, pad) if pad else None, **settings)
    generator, search = torch.Generator().manual_seed(seed), TokenIndex.promising_pages

    def any_pages(index, asked):
        order = torch.rand(2, 2, index.length // PAGE, generator=generator).argsort(-1)
        return order[..., : budget // PAGE].sort(-1).values, search(index, asked)[1]

    monkeypatch.setattr(TokenIndex, "promising_pages", any_pages)
    found = driver.feed_text(text, prompt)[1:]
    assert driver.layer.stored > 256
    for stop, output in enumerate(found, start=prompt + 1):
        parts = query[:, :, stop - 1 : stop], key[:, :, :stop], value[:, :, :stop]
        expected = dense_attention(driver.module, *parts, driver.mask(stop - 1, stop), scaling=DIM**-0.5)[0]
        torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("pad", [0, 23])
@torch.no_grad()
def test_with_all_pages_read_and_all_tokens_fetched_logits_are_those_of_dynamic_cache(arch, pad, monkeypatch):
    monkeypatch.setattr(retrieval, "CANDIDATES", 4096)
    model, inputs, blocks = model_of(arch), prompts(length=PROMPT, pad=pad), later(2, [1, 1, 40, 1, 1])
    expected = feed(model, DynamicCache(config=model.config), inputs, blocks)
    cache = make("hybridkv", model, **TIGHT)
    handle = model.register_forward_hook(lambda *_: choose_everything(cache))
    found = feed(model, cache, inputs, blocks)
    handle.remove()
    for layer in cache.kv_layers:
        assert layer.near.shape[2] * PAGE == layer.chosen.shape[2] == layer.stored > 160
    assert_close(found, expected, atol=1e-4)


# How near the dense cache.


@torch.no_grad()
def distance(name="hybridkv", **settings):
    """Of the logits to those of the dense cache, on average."""
    model, inputs, blocks = model_of("llama"), prompts(length=300, pad=23), later(2, [1] * 12)
    expected = torch.cat(feed(model, DynamicCache(config=model.config), inputs, blocks), dim=1)
    found = torch.cat(feed(model, make(name, model, **{**TIGHT, **settings}), inputs, blocks), dim=1)
    return float((found - expected).abs().mean())


def test_pages_answer_better_than_leaving_tokens_out():
    assert distance() < distance("sentencekv")


def test_more_tokens_come_nearer():
    found = [distance(token_budget=budget) for budget in (64, 96, 128, 160, 192, 256)]
    assert found == sorted(found, reverse=True)


def test_more_pages_come_nearer(monkeypatch):
    found = []
    for count in (64, 128, 256):
        monkeypatch.setattr(retrieval, "CANDIDATES", count)
        found.append(distance())
    assert found == sorted(found, reverse=True)


# What is kept.


@pytest.mark.parametrize("pads", [None, (0, 45), (130, 7)])
@pytest.mark.parametrize("where", ["memory", "file"])
def test_pages_hold_the_mean_codes_of_their_tokens_and_count_them(pads, where, tmp_path):
    text = text_tensors(2, 2, 2, PROMPT + 100, DIM)
    driver = filled(text, pads, offload_dir=str(tmp_path) if where == "file" else None)
    layer = driver.layer
    for blocks in ([], [1, 40], [1] * 40):
        driver.go_on(text, blocks)
        assert layer.index.pages[0].length == layer.value_pages.length == layer.page_counts.shape[2]
        assert layer.value_pages.length * PAGE == layer.stored
        places = layer.places_of(None, torch.Size((2, 2, layer.stored)))
        for row, page in itertools.product(range(2), range(layer.value_pages.length)):
            own = slice(page * PAGE, page * PAGE + PAGE)
            real = places[row if len(places) > 1 else 0, 0, own] >= (0 if pads is None else pads[row])
            assert int(layer.page_counts[row, 0, page]) == int(real.sum())
            for codes, means in ((layer.index.codes, layer.index.pages[0]), (layer.value_codes, layer.value_pages)):
                mean = codes.rows.rows[row, :, own].double().mean(1).round()
                assert means.rows[row, :, page].tolist() == mean.tolist()
                assert not bool(codes.rows.rows[row, :, own][:, ~real].any()), "padding says something"
    assert layer.stored == 256


@torch.no_grad()
def test_padding_of_a_later_turn_is_counted_in_no_page():
    model, second = model_of("llama"), prompts(length=100, pad=41, seed=4)
    cache, first = make("hybridkv", model, **TIGHT), prompts(length=PROMPT, pad=0)
    model(**first, past_key_values=cache)
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], dim=1)
    model(input_ids=second["input_ids"], attention_mask=mask, past_key_values=cache)
    for layer in cache.kv_layers:
        assert layer.stored > 256
        real = mask[:, 4 : 4 + layer.stored].unflatten(1, (-1, PAGE)).sum(-1)
        assert layer.page_counts[:, 0].tolist() == real.tolist()


@pytest.mark.parametrize("pads", [None, (0, 45)])
@pytest.mark.parametrize("where", ["memory", "file"])
def test_every_byte_is_in_one_tier(pads, where, tmp_path):
    text = text_tensors(2, 2, 2, PROMPT + 50, DIM)
    driver = filled(text, pads, offload_dir=str(tmp_path) if where == "file" else None)
    for blocks in ([1], [1] * 36, [12]):
        driver.go_on(text, blocks)
        cache, layer = driver.cache, driver.layer
        tiers = cache.tier_bytes()
        assert cache.nbytes() == reachable_bytes(cache) == sum(tiers.values())
        codes, bases = layer.value_codes.rows.data, layer.value_codes.bases()
        pages = padded_rows(layer.stored // PAGE) * 2 * 2 * layer.value_codes.rank
        assert tiers["value_codes"] == codes.numel() + pages + 4 * sum(basis.numel() for basis in bases)
        copies = layer.near_keys.numel() + layer.near_values.numel() + 8 * layer.near.numel()
        assert tiers["retrieved"] == copies + sum(4 * rows.numel() for rows in layer.slots)
