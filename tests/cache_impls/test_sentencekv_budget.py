"""What a SentenceKV layer attends to under its budget, what it keeps and what that weighs."""

import pytest
import torch

from hf_ext import CacheStateError
from hf_ext.cache_impls import retrieval
from hf_ext.cache_impls.base import storage_bytes
from hf_ext.cache_impls.retrieval import PAGE
from hf_ext.tiny import tiny_model
from tests.cache_impls.helpers import generate, prompts, reachable_bytes, text_tensors
from tests.cache_impls.retrieval_helpers import (
    EDGES,
    TIGHT,
    RetrievalDriver,
    assert_close,
    choose_everything,
    feed,
    index_bytes,
    later,
    make,
    model_of,
    stored_tokens,
)


PROMPT, DIM = 300, 16
SCORES = ["lowrank_token", "mean_query", "current_query", "page_bound"]
MARKS = [5, 6]


def ids_of(batch, length, share, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 100, (batch, length), generator=generator)
    return ids.masked_fill(torch.rand(batch, length, generator=generator) < share, MARKS[0])


class Watched(RetrievalDriver):
    """Notes with every block which tokens took part, how long the open sentence was, and how many tokens were newest."""

    def note(self):
        super().note()
        layer = self.layer
        if len(self.attended) > len(getattr(self, "open", [])):
            length = layer._read().open_length(self.batch, torch.device("cpu"))
            self.open = [*getattr(self, "open", []), length.tolist()]
            self.newest = [*getattr(self, "newest", []), layer.newest]
            self.seen = [*getattr(self, "seen", []), layer.seen]

    def attention(self, text, lane, step):
        """What the query heads `(G, D)` of a row and head get from the tokens that took part in a one-token step."""
        row, head = lane // 2, lane % 2
        query, key, value = text
        places = sorted(self.attended[step][lane])
        rows = query[row, 2 * head : 2 * head + 2, self.seen[step] - 1]
        return (rows @ key[row, head, places].mT / DIM**0.5).softmax(-1) @ value[row, head, places]

    def steps(self):
        """For each step, row and head: places attended to, open length of the row, newest tokens, tokens seen."""
        heads = len(self.attended[0]) // self.batch
        for places, opened, newest, seen in zip(self.attended, self.open, self.newest, self.seen, strict=True):
            for lane, own in enumerate(places):
                yield own, opened[lane // heads], newest, seen


def watched(share=0.1, steps=90, text=None, pads=None, batch=2, prompt=PROMPT, blocks=None, **settings):
    ids = ids_of(batch, prompt + steps, share)
    settings = {**TIGHT, "boundary_ids": MARKS, **settings}
    driver = Watched("sentencekv", ids=ids, batch=batch, pads=pads, **settings)
    text = text_tensors(batch, 2, 2, prompt + steps, DIM) if text is None else text
    driver.outputs = driver.feed_text(text, prompt, blocks)
    assert driver.attended
    return driver


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("refresh", [1, 8])
@pytest.mark.parametrize("share", [0.0, 0.05])
def test_no_step_attends_to_more_than_its_budget_and_the_open_sentence(score, refresh, share):
    driver = watched(share, score=score, refresh=refresh)
    over = [len(own) - 64 - max(0, opened - newest) for own, opened, newest, _ in driver.steps()]
    assert max(over) <= 0, f"{max(over)} tokens beyond the budget"
    used = [len(own) - 64 for own, *_ in driver.steps()]
    assert min(used) >= -(refresh - 1), "the budget is not used"


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    ("where", "pads"), [("memory", None), ("file", (0, 45)), ("pages first", None), ("pages first", (130, 7))]
)
def test_a_step_is_attention_to_the_tokens_that_take_part(score, where, pads, tmp_path, monkeypatch):
    if where == "pages first":
        monkeypatch.setattr(retrieval, "SCANNED_TOKENS", 64)
        monkeypatch.setattr(retrieval, "SCANNED_BUDGETS", 1)
        monkeypatch.setattr(retrieval, "CANDIDATES", 64)
        monkeypatch.setattr(retrieval, "CANDIDATE_BUDGETS", 1)
        monkeypatch.setattr(retrieval, "NEWEST_CANDIDATES", 128)
    text, folder = text_tensors(2, 2, 2, 530, DIM), str(tmp_path) if where == "file" else None
    settings = {"score": score, "offload_dir": folder, "refresh": 3}
    driver = watched(share=0.02, text=text, pads=pads, prompt=500, steps=30, **settings)
    assert score != "lowrank_token" or bool(driver.layer.index.pages) == (where == "pages first")
    for step, output in enumerate(driver.outputs[1:]):
        for lane in range(4):
            expected = driver.attention(text, lane, step)
            found = output[lane // 2, 0, 2 * (lane % 2) : 2 * (lane % 2) + 2]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("blocks", [[5] * 20, [40, 1, 1, 20, 1], [64, 1, 1]])
def test_blocks_attend_to_no_more_than_the_budget_beside_themselves(blocks):
    driver = watched(blocks=blocks, steps=sum(blocks), score="lowrank_token")
    for (own, opened, newest, _), size in zip(driver.steps(), [s for s in blocks for _ in range(4)]):
        assert len(own) <= max(64, 4 + 8 + 31 + size) + max(0, opened - newest)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("refresh", "pads"), [(1, None), (5, (0, 45))])
def test_the_sentence_being_written_is_always_visible(score, refresh, pads):
    """No mark ever comes: the released code hides all but the recent tokens then."""
    driver = watched(share=0.0, score=score, refresh=refresh, pads=pads)
    longest = 0
    for own, opened, newest, seen in driver.steps():
        longest = max(longest, opened - newest)
        assert set(range(seen - opened, seen)) <= own
    assert longest > 60, "no sentence outgrew the newest tokens"


@pytest.mark.parametrize("keep", [2.0, 3.0])
def test_the_sentence_being_written_is_kept_where_others_are_dropped(keep):
    """The prompt ends inside a sentence that is longer than the newest tokens."""
    driver = watched(share=0.0, keep=keep, prompt=340, steps=3)
    for own, opened, newest, seen in driver.steps():
        assert opened > newest
        assert set(range(seen - opened, seen)) <= own


def test_without_marks_in_the_model_blocks_are_visible():
    driver = watched(boundary_ids=None)
    assert all(set(range(seen - opened, seen)) <= own for own, opened, _, seen in driver.steps())


@pytest.mark.parametrize("refresh", [1, 3, 8])
def test_a_choice_serves_as_many_tokens_as_refresh_says(refresh):
    driver = Watched("sentencekv", ids=ids_of(2, PROMPT + 60, 0.0), **TIGHT, boundary_ids=MARKS, refresh=refresh)
    renewed, layer = [], driver.layer
    choose = layer._choose
    layer._choose = lambda *args: (renewed.append(layer.seen), choose(*args))
    driver.feed_text(text_tensors(2, 2, 2, PROMPT + 60, DIM), PROMPT)
    gaps = [after - before for before, after in zip(renewed, renewed[1:])]
    assert max(gaps) == refresh
    assert len(renewed) <= 60 / refresh + 4, "beside the rhythm only where tokens are stored"


def test_the_end_of_a_sentence_renews_the_choice_of_its_row_alone():
    ids = ids_of(2, PROMPT + 20, 0.0)
    ids[0, PROMPT + 5] = MARKS[0]
    driver = Watched("sentencekv", ids=ids, **TIGHT, boundary_ids=MARKS, refresh=16)
    driver.feed_text(text_tensors(2, 2, 2, PROMPT + 20, DIM), PROMPT)
    newest = [set(range(seen - count, seen)) for seen, count in zip(driver.seen, driver.newest)]
    before, after = ([own - new for own in step] for step, new in zip(driver.attended[4:6], newest[4:6]))
    assert before[:2] != after[:2], "the row whose sentence ended"
    assert before[2:] == after[2:]


def with_needle(depth, length=700, size=6, seed=0):
    """A text whose last queries look where the keys of `size` tokens at `depth` point."""
    query, key, value = text_tensors(2, 2, 2, length + 20, DIM, seed=seed)
    aim = torch.nn.functional.normalize(torch.randn(2, 2, 1, DIM, generator=torch.Generator().manual_seed(9)), dim=-1)
    key = key - (key @ aim.mT) * aim * 0.9
    key[:, :, depth : depth + size] = 10 * aim
    query[:, :, length:] = 3 * aim.repeat_interleave(2, dim=1)
    return query, key, value


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("depth", [0, 30, 333, 640, 694])
@pytest.mark.parametrize("budget", [96, 192])
def test_a_needle_is_retrieved_at_any_depth(score, depth, budget):
    ids = ids_of(2, 720, 0.1)
    ids[:, max(depth - 1, 0)] = ids[:, depth + 5] = MARKS[0]
    ids[:, depth : depth + 5] = 50
    driver = Watched("sentencekv", ids=ids, **EDGES, token_budget=budget, boundary_ids=MARKS, score=score)
    driver.feed_text(with_needle(depth), 700, [1] * 6)
    for places in driver.attended:
        for own in places:
            assert set(range(depth, depth + 6)) <= own


@pytest.mark.parametrize("score", SCORES)
def test_more_budget_captures_more_attention(score):
    text = text_tensors(2, 2, 2, PROMPT + 1, DIM)
    query, key, _ = text
    logits = (query[:, :, -1].unflatten(1, (2, 2)) @ key.mT) * DIM**-0.5
    weights = logits.softmax(-1).mean(2).flatten(0, 1)
    captured, before = [], None
    for budget in (64, 96, 128, 192, 256):
        driver = watched(score=score, text=text, steps=1, token_budget=budget)
        (own,) = driver.attended
        captured.append([float(weights[lane, sorted(places)].sum()) for lane, places in enumerate(own)])
        if before is not None:
            assert all(few <= many for few, many in zip(before, own)), "one ranking cut off later"
        before = own
    assert all(few <= many for few, many in zip(captured, captured[1:]))
    if score == "lowrank_token":
        assert min(captured[1]) > 1.1 * 96 / (PROMPT + 1)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("keep", ["all", 1.5])
def test_permuted_rows_give_permuted_results(score, keep):
    text, index = text_tensors(3, 2, 2, PROMPT + 24, DIM), torch.tensor([2, 0, 1])
    ids, pads, found = ids_of(3, PROMPT + 24, 0.1), (0, 33, 90), []
    for order in (torch.arange(3), index):
        own = tuple(pads[i] for i in order.tolist())
        driver = RetrievalDriver(
            ids=ids[order], batch=3, pads=own, **TIGHT, boundary_ids=MARKS, score=score, keep=keep
        )
        found.append(torch.cat(driver.feed_text([t[order] for t in text], PROMPT)[1:], dim=1))
    torch.testing.assert_close(found[1], found[0][index], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("keep", "pad"), [("all", 32), (1.5, 96)])
def test_left_padding_does_not_change_what_a_row_attends_to(score, keep, pad):
    """But for tokens of equal weight at the end of the budget: the rest of a page, or what follows a token found."""
    text, ids, runs = text_tensors(2, 2, 2, PROMPT + 40, DIM), ids_of(2, PROMPT + 40, 0.1), []
    for first in (0, pad):
        driver = Watched(
            ids=ids[1:, first:] if first else ids,
            batch=1 if first else 2,
            pads=None if first else (0, pad),
            **TIGHT,
            boundary_ids=MARKS,
            score=score,
            keep=keep,
        )
        driver.feed_text([t[1:, :, first:] for t in text] if first else text, PROMPT - first)
        runs.append([[{place + first for place in own} for own in step[-2:]] for step in driver.attended])
    ties = {"lowrank_token": 2, "page_bound": PAGE}.get(score, 0)
    for together, alone in zip(*runs, strict=True):
        for one, other in zip(together, alone):
            assert len(one) == len(other)
            assert len(one - other) <= ties


@pytest.mark.parametrize("score", ["mean_query", "current_query"])
@pytest.mark.parametrize("keep", ["all", 1.5])
@torch.no_grad()
def test_left_padding_does_not_change_what_a_row_says(score, keep):
    model, blocks, pad = model_of("llama"), later(2, [1] * 24 + [20, 1]), 96
    settings = {**TIGHT, "token_budget": 96, "boundary_ids": [5, 6, 7, 8], "score": score, "keep": keep}
    inputs = prompts(length=PROMPT, pad=pad)
    together = feed(model, make("sentencekv", model, **settings), inputs, blocks)
    alone = {key: value[1:, pad:] for key, value in inputs.items()}
    cache = make("sentencekv", model, **settings)
    expected = feed(model, cache, alone, [block[1:] for block in blocks])
    assert stored_tokens(cache) > 0
    assert_close([logits[1:] for logits in together], expected, atol=2e-3)


# Tokens that are dropped.


@torch.no_grad()
def filled(length, rows=2, dtype=torch.float32, steps=6, **settings):
    model = model_of("llama") if dtype == torch.float32 else tiny_model("llama").to(dtype)
    cache = make("sentencekv", model, **{**TIGHT, **settings})
    model(**prompts(rows=rows, length=length, pad=0), past_key_values=cache)
    for block in later(rows, [1] * steps):
        model(input_ids=block, past_key_values=cache)
    return model, cache


@pytest.mark.parametrize("score", SCORES)
def test_what_is_kept_of_a_prompt_does_not_grow_with_it(score):
    sizes = []
    for length in (600, 1240):
        _, cache = filled(length, keep=2, score=score)
        assert all(layer.stored + layer.full[0].length <= 2 * 64 + 32 for layer in cache.kv_layers)
        tiers = cache.tier_bytes()
        sizes.append([tiers[name] for name in ("sinks", "newest", "stored", "slack")])
        # Beside these: an index, marks, and copies of what a step asked for.
        grown = cache.nbytes() - sum(sizes[-1]) - tiers["index"] - storage_bytes(cache.shared_tensors())
        assert grown < 2 * 2 * (2 * 2 * 16 * 4 + 16) * (64 + 32)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("chunk", [33, 64, 65])
def test_what_is_kept_of_a_prompt_in_chunks_does_not_grow_with_it(chunk):
    model = model_of("llama")
    cache = make("sentencekv", model, **TIGHT, keep=2)
    generate(model, cache, prompts(length=700), prefill_chunk_size=chunk, max_new_tokens=2)
    # One chunk and what is waiting to be stored may come on top of it.
    assert all(layer.stored + layer.full[0].length <= 2 * 64 + chunk + 64 for layer in cache.kv_layers)


def test_the_kept_tokens_are_those_the_last_queries_look_at():
    query, key, value = with_needle(depth=250, length=600)
    query[:, :, 560:] = query[:, :, -1:]
    ids = ids_of(2, 620, 0.1)
    driver = RetrievalDriver(ids=ids, **TIGHT, boundary_ids=MARKS, keep=1.0)
    driver.feed(*(t[:, :, :600] for t in (query, key, value)))
    for row in driver.layer.places.tolist():
        for head in row:
            assert head == sorted(set(head))
            assert set(range(250, 256)) <= set(head)
    rows = driver.layer.stores[0].rows
    for row in range(2):
        for head in range(2):
            assert torch.equal(rows[row, head], key[row, head, driver.layer.places[row, head].long()])


@pytest.mark.parametrize(("score", "pad"), [*((score, 23) for score in SCORES), ("lowrank_token", 0)])
@torch.no_grad()
def test_a_long_second_turn_is_read_and_the_limit_kept(score, pad):
    model = model_of("llama")
    cache = make("sentencekv", model, **TIGHT, keep=2, score=score, boundary_ids=[5, 6, 7])
    blocks = later(2, [1, 200, 1, 65, *[1] * 30, 300, 1, 1])
    logits = feed(model, cache, prompts(length=PROMPT, pad=pad), blocks)
    assert all(torch.isfinite(step).all() for step in logits)
    for layer in cache.kv_layers:
        assert layer.seen == PROMPT + sum(block.shape[1] for block in blocks)
        assert layer.stored <= 2 * 64 - 4 - 8 + 32
        numbers = layer.places.sort(-1).values
        assert (numbers.diff(dim=-1) > 0).all()
        with pytest.raises(CacheStateError, match=r'dropped \d+ tokens.*keep="all"'):
            layer.materialize()


@torch.no_grad()
def test_a_long_block_after_dropping_attends_to_everything_kept():
    text, ids = text_tensors(2, 2, 2, 480, DIM), ids_of(2, 480, 0.1)
    driver = RetrievalDriver(ids=ids, pads=(0, 23), **TIGHT, boundary_ids=MARKS, keep=2.0)
    driver.feed_text([t[:, :, :PROMPT] for t in text], PROMPT)
    layer, (query, key, value) = driver.layer, text
    kept = layer.places.long()
    sinks, newest = layer.sink_places, torch.arange(PROMPT - layer.newest, PROMPT).expand(2, -1)
    found = driver.feed(*(t[:, :, PROMPT:] for t in text))
    real = torch.arange(480) >= torch.tensor([[0], [23]])
    for row in range(2):
        for head in range(4):
            known = torch.cat([sinks[row], kept[row, head // 2], newest[row], torch.arange(PROMPT, 480)])
            known = known[real[row, known]]
            logits = query[row, head, PROMPT:] @ key[row, head // 2, known].mT / DIM**0.5
            logits = logits.masked_fill(known > torch.arange(PROMPT, 480)[:, None], -torch.inf)
            expected = logits.softmax(-1) @ value[row, head // 2, known]
            torch.testing.assert_close(found[row, :, head], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("given", ["falcon", "config"])
def test_dropping_needs_attention_inside_the_cache(given):
    model = model_of("falcon") if given == "falcon" else tiny_model("llama")
    cache = make("sentencekv", model if given == "falcon" else model.config, **TIGHT, keep=2)
    with pytest.raises(CacheStateError, match=r'outside the cache; keep all tokens \(keep="all"\)'):
        generate(model, cache, prompts(length=PROMPT))


def test_a_prompt_that_needs_no_dropping_is_kept_whole():
    _, cache = filled(140, keep=3)
    assert all(layer.stored + layer.full[0].length == layer.seen for layer in cache.kv_layers)
    assert cache.kv_layers[0].materialize()[0].shape[2] == 146


# Bytes.

KINDS = {
    "tokens": {},
    "mean": {"score": "mean_query", "boundary_ids": [5, 6, 7]},
    "pages": {"score": "page_bound"},
    "keep": {"keep": 2},
    "short": {"token_budget": 1024},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pad", [0, 23])
@pytest.mark.parametrize("where", ["memory", "file"])
@torch.no_grad()
def test_bytes_are_the_storages_that_can_be_reached(kind, pad, where, tmp_path):
    model, settings = model_of("llama"), {**TIGHT, "offload_dir": str(tmp_path) if where == "file" else None}
    cache = make("sentencekv", model, **{**settings, **KINDS[kind]})
    inputs = prompts(length=PROMPT, pad=pad)
    model(**inputs, past_key_values=cache)
    for steps in range(4):
        assert cache.nbytes() == reachable_bytes(cache)
        tiers = sum(cache.tier_bytes().values())
        assert cache.nbytes() == tiers + storage_bytes(cache.shared_tensors())
        offloaded = sum(2 * layer.stored * layer.stores[0].row_bytes for layer in cache.kv_layers if layer.stores)
        assert cache.offloaded_bytes() == (offloaded if where == "file" else 0)
        for block in later(2, [1, 40][: 1 + steps % 2]):
            model(input_ids=block, past_key_values=cache)


@pytest.mark.parametrize("arch", ["gemma2", "gpt2", "falcon"])
def test_bytes_are_the_storages_that_can_be_reached_on_other_models(arch):
    model = model_of(arch)
    cache = make("sentencekv", model, **TIGHT)
    generate(model, cache, prompts(length=PROMPT), num_beams=2)
    assert cache.nbytes() == reachable_bytes(cache)
    assert ("other" in cache.tier_bytes()) == (arch == "gemma2")


def test_resident_bytes_of_an_offloaded_text_grow_with_its_index_only(tmp_path):
    sizes = {}
    for length in (520, 2056):
        _, cache = filled(length, rows=1, offload_dir=str(tmp_path))
        sizes[length] = cache.nbytes(), index_bytes(cache), storage_bytes(cache.shared_tensors())
        dense = 2 * 2 * 2 * 16 * 4 * (length + 6)
        assert cache.offloaded_bytes() > 0.9 * dense - 2 * 2 * 2 * 16 * 4 * 64
    (small, *index), (large, *more) = sizes[520], sizes[2056]
    assert large - small <= sum(more) - sum(index)
    assert large < 0.25 * dense


@pytest.mark.parametrize("score", SCORES)
@torch.no_grad()
def test_bfloat16(score):
    logits, inputs, blocks = [], prompts(length=PROMPT, pad=23), later(2, [1, 1, 20, 1])
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model("llama").to(dtype)
        cache = make("sentencekv", model, **TIGHT, score=score, boundary_ids=[5, 6])
        model.register_forward_hook(lambda *_, cache=cache: choose_everything(cache))
        logits.append(torch.cat(feed(model, cache, inputs, blocks), dim=1).float())
        assert all(store.data.dtype == dtype for layer in cache.kv_layers for store in layer.stores)
    difference = (logits[0] - logits[1]).abs().mean() / logits[0].std()
    assert difference < 0.1, f"mean logit difference is {difference:.3f} standard deviations"
    assert filled(PROMPT, dtype=torch.bfloat16, keep=2, score=score)[1].nbytes() > 0
