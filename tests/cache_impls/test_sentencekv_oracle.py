"""The slow SentenceKV of `tests/reference/sentencekv.py` on its own: what the method's description says of it."""

import math

import pytest
import torch
from torch.nn import functional

from tests.reference.sentencekv import (
    PaperSentenceKV,
    buckets,
    importance,
    retain,
    sentence_means,
    sentence_scores,
    sentences,
)


HEADS, DIM, PROMPT = 2, 8, 150
SCALING = DIM**-0.5
SETTINGS = {"token_budget": 40, "factor": 2, "window": 8, "start": 6, "recent": 10}


def random_text(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, HEADS, length, DIM, generator=generator)


def marks(length, period=9):
    return [place % period == period - 1 for place in range(length)]


def run(text, boundaries, prompt=PROMPT, **changes):
    """The cache after the whole text, and for every generated token its output, its positions and the open sentence."""
    cache = PaperSentenceKV(**{**SETTINGS, **changes})
    cache.prefill(*text[:, :, :prompt], boundaries[:prompt])
    steps = []
    for place in range(prompt, text.shape[2]):
        output, attended = cache.step(*text[:, :, place], boundaries[place], SCALING)
        steps.append((output, attended, len(cache.open)))
    return cache, steps


def dense(text, place, head, positions):
    """Attention of one token to the given positions, by a mask over the whole text."""
    query, key, value = text.double()
    mask = torch.zeros(text.shape[2], dtype=torch.bool)
    mask[positions] = True
    logits = (key[head] @ query[head, place] * SCALING).masked_fill(~mask, -math.inf)
    return logits.softmax(0) @ value[head]


def test_worked_example():
    keys = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [2.0, 2.0]]])
    means = sentence_means(keys, [[0, 1, 2]], [(0, 3)])
    torch.testing.assert_close(means, torch.tensor([[[1, 4 / 3]]], dtype=torch.float64))
    queries = list(torch.tensor([[1.0, 1.0], [2.0, 1.0], [1.0, 2.0]]))
    assert sentence_scores(queries, list(means[0])) == pytest.approx([28 / 9])


def test_importance_is_snapkv():
    query, key, _ = random_text(60)
    window = 8
    logits = query[:, -window:].double() @ key.double().transpose(1, 2) * SCALING
    future = torch.ones(window, 60, dtype=torch.bool).triu(60 - window + 1)
    summed = logits.masked_fill(future, -math.inf).softmax(-1).sum(1)[:, : 60 - window]
    for kernel in (1, 7):
        pooled = functional.max_pool1d(summed, kernel, stride=1, padding=kernel // 2)
        torch.testing.assert_close(importance(query[:, -window:], key, SCALING, kernel), pooled)


@pytest.mark.parametrize(("length", "size"), [(5, 5), (8, 8), (79, 79), (80, 80), (81, 80), (150, 80)])
def test_kept_list_sizes(length, size):
    query, key, _ = random_text(length)
    kept = retain(query, key, 40, 2, window=8)
    assert len(kept) == HEADS
    for places in kept:
        assert len(places) == size
        assert places == sorted(set(places))
        assert places[-8:] == list(range(length))[-8:]


def test_kept_tokens_are_the_most_important():
    query, key, _ = random_text(PROMPT)
    scores = importance(query[:, -8:], key, SCALING)
    for head, places in enumerate(retain(query, key, 40, 2, window=8)):
        kept = torch.zeros(PROMPT - 8, dtype=torch.bool)
        kept[places[:-8]] = True
        assert scores[head][kept].min() >= scores[head][~kept].max()


def test_ties_go_to_the_earlier_token():
    nothing = torch.zeros(1, 20, DIM)
    assert retain(nothing, nothing, 10, 1, window=4) == [[0, 1, 2, 3, 4, 5, 16, 17, 18, 19]]


def test_fractional_factor_is_rounded_down():
    query, key, _ = random_text(PROMPT)
    assert [len(places) for places in retain(query, key, 33, 1.5, window=8)] == [49] * HEADS


@pytest.mark.parametrize("length", [4, 100])
@pytest.mark.parametrize("window", [20, 21])
def test_no_room_beside_the_window(length, window):
    query, key, _ = random_text(length)
    with pytest.raises(ValueError, match="leave no room"):
        retain(query, key, 10, 2, window=window)


def test_no_room_for_retrieval():
    with pytest.raises(ValueError, match="leaves nothing to retrieve"):
        PaperSentenceKV(64, 3, 32)


def test_sentences():
    assert sentences([]) == []
    assert sentences([False, False]) == [(0, 2)]
    assert sentences([False, True]) == [(0, 2)]
    assert sentences([True, False, True, True, False]) == [(0, 1), (1, 3), (3, 4), (4, 5)]


@pytest.mark.parametrize("seed", range(5))
def test_sentences_partition_the_prompt(seed):
    boundaries = (torch.rand(PROMPT, generator=torch.Generator().manual_seed(seed)) < 0.1).tolist()
    spans = sentences(boundaries)
    for place in range(PROMPT):
        assert sum(start <= place < end for start, end in spans) == 1
    for start, end in spans[:-1]:
        assert boundaries[end - 1]
        assert not any(boundaries[start : end - 1])
    query, key, _ = random_text(PROMPT, seed)
    for places in retain(query, key, 40, 1, window=8):
        assert sum(buckets(places, spans), []) == list(range(len(places)))


def test_means_are_those_of_kept_keys():
    query, key, _ = random_text(PROMPT)
    kept = retain(query, key, 20, 1, window=8)
    spans = sentences(marks(PROMPT, period=4))
    means = sentence_means(key, kept, spans)
    empty = 0
    for head in range(HEADS):
        for index, (start, end) in enumerate(spans):
            places = [place for place in range(start, end) if place in kept[head]]
            empty += not places
            expected = key[head, places].double().mean(0) if places else torch.zeros(DIM, dtype=torch.float64)
            torch.testing.assert_close(means[head, index], expected)
    assert empty > 0


def test_generated_sentences_partition_the_generated_tokens():
    text, boundaries = random_text(PROMPT + 40), marks(PROMPT + 40)
    cache, _ = run(text, boundaries)
    assert cache.spans[-1] == (144, PROMPT)  # the unfinished piece, not continued by what is generated
    for head in range(HEADS):
        own = [[cache.positions[head][slot] for slot in bucket] for bucket in cache.buckets[head][len(cache.spans) :]]
        assert own == [
            list(range(start, end)) for start, end in [(150, 153), (153, 162), (162, 171), (171, 180), (180, 189)]
        ]
        for places, mean in zip(own, cache.means[head][len(cache.spans) :]):
            torch.testing.assert_close(mean, text[1, head, places].double().mean(0))
    assert len(cache.open) == 1


def test_outputs_are_attention_to_the_positions():
    text, boundaries = random_text(PROMPT + 30), marks(PROMPT + 30)
    _, steps = run(text, boundaries)
    for place, (output, attended, _) in enumerate(steps, start=PROMPT):
        for head in range(HEADS):
            torch.testing.assert_close(output[head], dense(text, place, head, attended[head]))


def test_everything_retained_at_the_start_of_a_sentence():
    text, boundaries = random_text(PROMPT + 30), marks(PROMPT + 30)
    cache, steps = run(text, boundaries)
    whole = []
    for place, (_, attended, opened) in enumerate(steps, start=PROMPT):
        if opened <= 1:
            whole.append(place)
            for head in range(HEADS):
                assert attended[head] == [p for p in cache.positions[head] if p <= place]
    # The first token, then each boundary and the token after it.
    assert whole == [150, 152, 153, 161, 162, 170, 171, 179]


@pytest.mark.parametrize("period", [9, 25, 1000])
@pytest.mark.parametrize("prompt", [6, 30, PROMPT])
def test_budget(period, prompt):
    """With retrieval on: never more than the budget, and all of it unless too little can be seen."""
    text, boundaries = random_text(prompt + 40), marks(prompt + 40, period)
    cache, steps = run(text, boundaries, prompt)
    retrieving = 0
    for place, (_, attended, opened) in enumerate(steps, start=prompt):
        if opened <= 1:
            continue
        retrieving += 1
        for head in range(HEADS):
            slots = [p for p in cache.positions[head] if p <= place]
            available = {*slots[:6], *slots[-10:], *(p for p in slots if p <= place - opened)}
            assert available >= set(attended[head])
            assert len(attended[head]) == min(len(available), 40)
            assert attended[head] == sorted(set(attended[head]))
            assert set(slots[:6]) | set(slots[-10:]) <= set(attended[head])
    assert retrieving > 20


def test_best_sentences_first_and_the_last_one_cut():
    text, boundaries = random_text(PROMPT + 3), [False] * (PROMPT + 3)
    boundaries[:PROMPT] = marks(PROMPT)
    cache, steps = run(text, boundaries, factor=10)  # the whole prompt is retained
    query, key, _ = text.double()
    for head in range(HEADS):
        mean_query = query[head, PROMPT:].mean(0)
        spans = sorted(cache.spans, key=lambda span: -float(key[head, slice(*span)].mean(0) @ mean_query))
        order = [place for span in spans for place in range(*span) if 6 <= place < PROMPT + 3 - 10]
        expected = [*range(6), *order[: 40 - 6 - 10], *range(PROMPT + 3 - 10, PROMPT + 3)]
        assert steps[-1][1][head] == sorted(expected)


def test_equal_scores_go_to_the_earlier_sentence():
    text, boundaries = random_text(PROMPT + 2), marks(PROMPT, period=9) + [False] * 2
    text[0] = 0
    cache, steps = run(text, boundaries)
    for head in range(HEADS):
        assert steps[-1][1][head] == cache.positions[head][:30] + cache.positions[head][-10:]


def test_more_budget_sees_more():
    """With one retained set and one ranking the sets are nested."""
    text, boundaries = random_text(PROMPT + 5), marks(PROMPT + 5, period=11)
    smaller = None
    for budget in (20, 40, 60, 80):
        _, steps = run(text, boundaries, token_budget=budget, factor=80 / budget)
        larger = [[set(places) for places in attended] for _, attended, _ in steps]
        if smaller is not None:
            for before, after in zip(smaller, larger):
                assert all(few <= many for few, many in zip(before, after))
        smaller = larger


def test_open_sentence_is_invisible_beyond_recent():
    text, boundaries = random_text(PROMPT + 31), [False] * (PROMPT + 31)
    boundaries[-1] = True
    _, steps = run(text, boundaries)
    generated = [[p for p in attended[0] if p >= PROMPT] for _, attended, _ in steps]
    assert generated[-2] == list(range(PROMPT + 20, PROMPT + 30))
    assert generated[-1] == list(range(PROMPT, PROMPT + 31))


def test_length_threshold():
    text, boundaries = random_text(PROMPT + 20), marks(PROMPT + 20)
    _, steps = run(text, boundaries, length_threshold=4)
    for place, (_, attended, opened) in enumerate(steps, start=PROMPT):
        assert len(attended[0]) == (80 + place - PROMPT + 1 if opened <= 4 else 40)


@pytest.mark.parametrize("depth", [0, 5, 50, 100, 180, 230])
@pytest.mark.parametrize("factor", [2, 10])
def test_needle(depth, factor):
    """A sentence whose keys point where the queries do survives retention and is retrieved, wherever it is."""
    length, size = 240, 6
    text = random_text(length + 12, seed=depth)
    text[:2, ..., 0] = 0
    text[0, ..., 0] = 6
    text[1, :, depth : depth + size, 0] = 6
    text[2, :, depth : depth + size] = 5
    boundaries = marks(length, period=7) + [False] * 12
    boundaries[depth : depth + size] = [False] * size
    boundaries[depth + size - 1] = True
    if depth:
        boundaries[depth - 1] = True
    _, steps = run(text, boundaries, length, token_budget=64, factor=factor)
    needle = set(range(depth, depth + size))
    for output, attended, opened in steps:
        for head in range(HEADS):
            assert needle <= set(attended[head])
            assert opened <= 1 or len(attended[head]) == 64
            torch.testing.assert_close(output[head], torch.full((DIM,), 5.0).double(), atol=0.1, rtol=0)
