"""The mathematics of retrieval: codes of vectors, and the three indexes that say which stored tokens a query asks for."""

import pytest
import torch

from hf_ext.cache_impls import retrieval
from hf_ext.cache_impls.retrieval import (
    PAGE,
    Codes,
    PageIndex,
    SentenceIndex,
    TokenIndex,
    best_of_heads,
    mean_codes,
    places_in,
    query_moment,
    read_pages,
    spread_forward,
)
from tests.reference import sentencekv as reference


B, K, G, D = 2, 2, 2, 16


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decaying(length, seed=0):
    """Keys `(B, K, N, D)` with a decaying spectrum around a mean of their own."""
    axes = torch.linalg.qr(random(B, K, D, D, seed=seed + 100)).Q
    return random(B, K, length, D, seed=seed) * torch.linspace(2, 0.1, D) @ axes + random(B, K, 1, D, seed=seed + 200)


def opposed(length):
    """Keys, and queries `(B, H, N, D)` that look hardest where the keys spread least."""
    axes = torch.linalg.qr(random(B, K, D, D)).Q
    keys = random(B, K, length, D, seed=1) * torch.linspace(2, 0.2, D) @ axes
    queries = random(B, K * G, length, D, seed=2) * torch.linspace(0.1, 3, D) @ axes.repeat_interleave(G, dim=1)
    return keys, queries


def score_error(codes, keys, queries):
    """Mean squared error of the centred scores `(B, K)`."""
    rows = queries.view(B, K, -1, D)
    exact, coded = rows @ (keys - codes.mean).mT, codes.query(rows) @ codes.rows.rows.float().mT
    return (exact - coded).square().mean((2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("aware", [False, True])
def test_codes_of_full_rank_give_the_tokens_back_within_half_a_step(dtype, aware):
    keys = decaying(200).to(dtype)
    moment = query_moment(random(B, K * G, 200, D, seed=5), K) if aware else None
    codes = Codes(keys, D, moment=moment)
    assert codes.rows.data.dtype == torch.int8
    error = (codes.decode() - keys.float()).abs()
    most = codes.expand.abs().sum(-1)[:, :, None] / 2
    assert (error <= most + 1e-5).all()
    assert float(error.max()) < 0.05 * float(keys.float().std())
    assert torch.equal(codes.decoded(keys), codes.decode())


def test_a_rank_beyond_the_dimension_is_the_dimension():
    codes = Codes(decaying(50), 3 * D)
    assert codes.rank == D
    assert codes.rows.data.shape[-1] == D


def test_queries_meet_codes_as_they_would_meet_the_tokens_that_come_back():
    keys, queries = opposed(100)
    rows = queries.view(B, K, -1, D)
    codes = Codes(keys, 6, moment=query_moment(queries, K))
    scores = codes.query(rows) @ codes.rows.rows.float().mT + rows @ codes.mean.mT
    torch.testing.assert_close(scores, rows @ codes.decode().mT, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rank", [2, 4, 8, 12])
def test_a_basis_that_knows_the_queries_predicts_their_scores_better(rank):
    keys, queries = opposed(400)
    aware = score_error(Codes(keys, rank, moment=query_moment(queries, K)), keys, queries)
    plain = score_error(Codes(keys, rank), keys, queries)
    assert (aware < plain).all(), f"{aware} against {plain}"


@pytest.mark.parametrize("aware", [False, True])
def test_more_rank_never_costs(aware):
    keys, queries = opposed(400)
    moment = query_moment(queries, K) if aware else None
    lost = [score_error(Codes(keys, rank, moment=moment), keys, queries) for rank in (1, 2, 4, 8, 16)]
    if aware:
        assert all((more <= 1.01 * less).all() for less, more in zip(lost, lost[1:]))
    kept = [(Codes(keys, rank).decode() - keys).square().mean((2, 3)) for rank in (1, 2, 4, 8, 16)]
    assert all((more < less).all() for less, more in zip(kept, kept[1:]))
    assert float(lost[-1].max()) < 0.01 * float(lost[0].min())


@pytest.mark.parametrize("pieces", [[1] * 30, [7, 23], [30]])
def test_appended_tokens_have_the_codes_they_would_have_had(pieces):
    keys = decaying(130)
    codes, start = Codes(keys[:, :, :100], 6), 100
    bases = [tensor.clone() for tensor in codes.bases()]
    for size in pieces:
        codes.append(keys[:, :, start : start + size])
        start += size
    assert codes.rows.length == 130
    assert torch.equal(codes.decode()[:, :, 100:], codes.decoded(keys[:, :, 100:]))
    assert all(torch.equal(old, new) for old, new in zip(bases, codes.bases()))


@pytest.mark.parametrize("aware", [False, True])
def test_padding_leaves_no_trace_in_the_codes(aware):
    keys = decaying(120)
    moment = query_moment(random(B, K * G, 120, D, seed=5), K) if aware else None
    valid = torch.ones(B, 120, dtype=torch.bool)
    valid[0, :33], valid[1, 70:81] = False, False
    spoiled = keys.masked_fill(~valid[:, None, :, None], 1e4)
    codes = Codes(spoiled, 6, valid, moment)
    for row in range(B):
        part = None if moment is None else moment[row : row + 1]
        alone = Codes(keys[row : row + 1][:, :, valid[row]], 6, moment=part)
        torch.testing.assert_close(codes.mean[row], alone.mean[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(codes.decode()[row][:, valid[row]], alone.decode()[0], atol=0.05, rtol=0)


def test_codes_follow_their_rows():
    keys, index = decaying(60), torch.tensor([1, 0, 1])
    codes = Codes(keys, 5)
    before = codes.decode()
    codes.reorder(index)
    assert torch.equal(codes.decode(), before[index])


def test_the_second_moment_of_queries():
    queries = random(B, K * G, 40, D)
    valid = torch.ones(B, 40, dtype=torch.bool)
    valid[1, :9] = False
    found = query_moment(queries, K, valid)
    for row in range(B):
        for head in range(K):
            rows = queries[row, head * G : head * G + G][:, valid[row]].reshape(-1, D)
            torch.testing.assert_close(found[row, head], rows.mT @ rows / len(rows), atol=1e-5, rtol=1e-4)


def test_of_many_queries_the_last_and_some_spread_over_the_text_count():
    queries = random(1, 1, 3000, D)
    count = retrieval.FITTED_QUERIES
    places = torch.cat([torch.linspace(0, 3000 - count - 1, count).long(), torch.arange(3000 - count, 3000)])
    assert len(set(places.tolist())) == 2 * count
    rows = queries[0, 0, places]
    torch.testing.assert_close(query_moment(queries, 1)[0, 0], rows.mT @ rows / len(rows), atol=1e-5, rtol=1e-4)


# Token index.


def small_pages(monkeypatch, scanned=128, candidates=64, unpaged=32):
    """Makes two-step search begin early; settings below do not raise the limits again."""
    monkeypatch.setattr(retrieval, "SCANNED_TOKENS", scanned)
    monkeypatch.setattr(retrieval, "CANDIDATES", candidates)
    monkeypatch.setattr(retrieval, "NEWEST_CANDIDATES", unpaged)


def test_a_short_text_is_scanned_token_by_token():
    keys, queries = opposed(300)
    rows = queries.view(B, K, -1, D)[:, :, :5]
    index = TokenIndex(keys, D, 64, moment=query_moment(queries, K))
    scores, places = index.score(rows)
    assert places is None
    assert scores.shape == (B, K, 5, 300)
    exact = rows @ keys.mT
    centred = [s - s.mean(-1, keepdim=True) for s in (scores, exact)]
    torch.testing.assert_close(*centred, atol=0.3, rtol=0)


@pytest.mark.parametrize("pieces", [[], [1] * 40, [100, 300, 3]])
def test_two_steps_score_candidates_as_the_scan_would(pieces, monkeypatch):
    keys, queries = opposed(700 + sum(pieces))
    rows = queries.view(B, K, -1, D)[:, :, :3]
    scan = TokenIndex(keys[:, :, :700], 8, 8)
    scan.append(keys[:, :, 700:])
    small_pages(monkeypatch)
    index, start = TokenIndex(keys[:, :, :700], 8, 8), 700
    for size in pieces:
        index.append(keys[:, :, start : start + size])
        start += size
    everything, none = scan.score(rows)
    scores, places = index.score(rows)
    assert none is None
    assert places.shape == (B, K, scores.shape[-1])
    assert places.shape[-1] < 200
    assert (places.diff(dim=-1) > 0).all(), "candidates come in the order of the text, each once"
    expected = everything.gather(3, places[:, :, None].expand(-1, -1, 3, -1))
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-5)
    newest = torch.arange(index.length - 32, index.length)
    for row in places.flatten(0, 1):
        assert set(newest.tolist()) <= set(row.tolist())


def drifting(length):
    """Keys of which neighbours are much alike, as those of a text."""
    noise, keys = random(B, K, length, D), []
    for place in range(length):
        keys.append(noise[:, :, place] if not keys else 0.95 * keys[-1] + 0.31 * noise[:, :, place])
    return torch.stack(keys, dim=2) * torch.linspace(2, 0.1, D)


@pytest.mark.parametrize(("kind", "share"), [("noise", 0.5), ("text", 0.95)])
def test_two_steps_find_most_of_what_the_scan_finds(kind, share, monkeypatch):
    keys = drifting(2000) if kind == "text" else opposed(2000)[0]
    rows = random(B, K, 12, D, seed=7).unbind(2)
    scan = TokenIndex(keys, 8, 8)
    best = [scan.score(row[:, :, None])[0].topk(8, dim=-1).indices[:, :, 0] for row in rows]
    small_pages(monkeypatch, candidates=640)
    index, found = TokenIndex(keys, 8, 8), 0.0
    for row, wanted in zip(rows, best):
        places = index.score(row[:, :, None])[1]
        assert places.shape[-1] < 660
        found += float((wanted[..., None] == places[:, :, None]).any(-1).float().mean()) / len(rows)
    assert found > share, "a third would be found at random"


@pytest.mark.parametrize("depth", [0, 1, 15, 16, 333, 1023, 1650, 1690, 1699])
@pytest.mark.parametrize("appended", [0, 260])
def test_a_needle_the_query_points_at_is_found_at_any_depth(depth, appended, monkeypatch):
    small_pages(monkeypatch)
    keys = random(B, K, 1700, D, seed=depth)
    query = random(B, K, 1, D, seed=depth + 1)
    keys[:, :, depth] = 4 * query[:, :, 0]
    keys[:, :, 700] = -4 * query[:, :, 0]  # the first tokens set the range of the codes
    index = TokenIndex(keys[:, :, : 1700 - appended], D // 2, 8, moment=query_moment(query.expand(-1, -1, 9, -1), K))
    index.append(keys[:, :, 1700 - appended :])
    scores, places = index.score(query)
    assert (places.gather(2, scores[:, :, 0].argmax(-1, keepdim=True)) == depth).all()


def test_padding_does_not_move_the_token_index():
    keys = decaying(200)
    hidden = torch.zeros(B, 1, 200, dtype=torch.bool)
    hidden[1, :, :40] = True
    spoiled = keys.masked_fill(hidden[..., None], 1e4)
    scores = TokenIndex(spoiled, 8, 64, hidden.expand(-1, K, -1)).score(keys[:, :, -1:])[0]
    alone = TokenIndex(keys[1:, :, 40:], 8, 64).score(keys[1:, :, -1:])[0]
    torch.testing.assert_close(scores[1:, ..., 40:], alone, atol=0.05, rtol=0.01)


@pytest.mark.parametrize("kind", ["token", "pages_of_tokens", "page", "sentence"])
def test_an_index_follows_its_rows_and_can_go_on(kind, monkeypatch):
    if kind == "pages_of_tokens":
        small_pages(monkeypatch)
    keys, index = decaying(400), torch.tensor([1, 0, 1])

    def build(rows):
        if kind == "page":
            return PageIndex(rows[:, :, :390])
        if kind == "sentence":
            return SentenceIndex(rows[:, :, :390], (torch.arange(390) // 9).expand(*rows.shape[:2], -1))
        return TokenIndex(rows[:, :, :390], 8, 8)

    def more(made, rows):
        if kind == "sentence":
            made.append(rows[:, :, 390:], (torch.arange(390, 400) // 9).expand(*rows.shape[:2], -1))
        else:
            made.append(rows[:, :, 390:])
        return made.score(rows[:, :, -1:])

    made = build(keys)
    made.reorder(index)
    found, places = more(made, keys[index])
    expected, others = more(build(keys), keys)
    torch.testing.assert_close(found, expected[index], atol=1e-5, rtol=1e-5)
    assert places is None or torch.equal(places, others[index])
    assert made.length == 400


def test_mean_codes_are_rounded_to_bytes():
    rows = torch.randint(-127, 128, (B, K, 3 * PAGE, 5), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    means = mean_codes(rows)
    assert means.dtype == torch.int8
    for page in range(3):
        expected = rows[:, :, page * PAGE : page * PAGE + PAGE].double().mean(2).round()
        assert torch.equal(means[:, :, page].double(), expected)


def test_pages_are_read_with_all_their_rows():
    rows, pages = random(B, K, 5 * PAGE, 3), torch.tensor([[[0, 4], [1, 2]], [[3, 4], [0, 1]]])
    places = places_in(pages)
    assert places[0, 1].tolist() == list(range(PAGE, 3 * PAGE))
    assert torch.equal(read_pages(rows, pages), rows.gather(2, places[..., None].expand(-1, -1, -1, 3)))


@pytest.mark.parametrize("pieces", [[200], [200, *[1] * 40], [100, 20, 16, 64], [140, 31], [129]])
@pytest.mark.parametrize("padded", [False, True])
def test_an_index_that_looks_at_pages_has_the_mean_codes_of_every_full_one(pieces, padded, monkeypatch):
    small_pages(monkeypatch)
    start, hidden = pieces[0], None
    keys = decaying(sum(pieces))
    if padded:
        hidden = torch.zeros(B, K, start, dtype=torch.bool)
        hidden[1, :, :37] = True
    index = TokenIndex(keys[:, :, :start], 6, 8, hidden)
    for size in pieces[1:]:
        index.append(keys[:, :, start : start + size])
        start += size
        assert index.in_pages == (start > 128)
    means, reach = index.pages
    assert means.length == reach.length == start // PAGE
    codes = index.codes.rows.rows[:, :, : start // PAGE * PAGE]
    assert not padded or not bool(codes[1, :, :37].any()), "padding is an average key"
    assert torch.equal(means.rows, mean_codes(codes))
    leading = codes.unflatten(2, (-1, PAGE))[..., :2].int()  # a quarter of six coordinates, rounded up
    middle = means.rows[..., :2].int()
    expected = torch.cat([leading.amax(3) - middle, middle - leading.amin(3)], dim=-1).clamp_max(127)
    assert reach.rows.tolist() == expected.tolist()


def test_an_index_without_many_tokens_or_without_a_budget_looks_at_all(monkeypatch):
    assert not TokenIndex(decaying(200), 6, 8).in_pages
    small_pages(monkeypatch)
    for index in (TokenIndex(decaying(400), 6, None), TokenIndex(decaying(128), 6, 8)):
        assert not index.in_pages
        assert index.pages == []
        assert index.score(random(B, K, 1, D))[1] is None


@pytest.mark.parametrize("newest", [32, 48])
def test_the_newest_tokens_are_candidates_whatever_their_pages_promise(newest, monkeypatch):
    small_pages(monkeypatch, candidates=96, unpaged=newest)
    keys, query = random(B, K, 605, D), random(B, K, 1, D, seed=1)
    keys[:, :, -80:] = -9 * query
    places = TokenIndex(keys, D, 8).score(query)[1]
    for row in places.flatten(0, 1).tolist():
        assert set(range(605 - newest, 605)) <= set(row)
        assert len(row) == 96 + 605 % PAGE


# Page index.


@pytest.mark.parametrize("pieces", [[PAGE * 4], [PAGE * 4 + 5], [3, 1, 20, 16, 40, 9], [1] * 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bound_of_a_page_is_met_by_every_token_in_it(pieces, dtype):
    keys, rows = decaying(sum(pieces)).to(dtype), random(B, K, 3, D, seed=7).to(dtype)
    index, start = PageIndex(keys[:, :, : pieces[0]]), pieces[0]
    for size in pieces[1:]:
        index.append(keys[:, :, start : start + size])
        start += size
    bounds, places = index.score(rows)
    assert places is None
    assert bounds.shape == (B, K, 3, start)
    exact = rows.float() @ keys.float().mT
    slack = 1e-4 if dtype == torch.float32 else 0.02 * float(exact.abs().max())
    assert (bounds >= exact - slack).all()
    for first in range(0, start, PAGE):
        page = keys[:, :, None, first : first + PAGE].float()
        bound = (page * rows[:, :, :, None].float()).amax(3).sum(-1)
        part = bounds[..., first : first + PAGE].float()
        torch.testing.assert_close(part, bound[..., None].expand_as(part), atol=max(slack, 1e-4), rtol=0.02)


def test_padding_does_not_raise_the_bound_of_a_page():
    keys, rows = decaying(60), random(B, K, 2, D, seed=7)
    hidden = torch.zeros(B, K, 60, dtype=torch.bool)
    hidden[1, :, :21] = True
    spoiled = keys.masked_fill(hidden[..., None], 1e4)
    bounds = PageIndex(spoiled, hidden).score(rows)[0]
    assert torch.equal(bounds[0], PageIndex(keys).score(rows)[0][0])
    exact = rows @ keys.mT
    assert (bounds >= exact - 1e-4)[~hidden[:, :, None].expand_as(bounds)].all()
    most = (keys[1, :, None, 21:32] * rows[1, :, :, None]).amax(2).sum(-1)
    torch.testing.assert_close(bounds[1, ..., 16:32], most[..., None].expand(-1, -1, 16), atol=1e-4, rtol=1e-5)


# Sentence index.


def test_worked_example_of_the_paper():
    keys = torch.tensor([[[[1.0, 0.0], [0.0, 2.0], [2.0, 2.0]]]])
    index = SentenceIndex(keys, torch.zeros(1, 1, 3, dtype=torch.long))
    torch.testing.assert_close(index.means(), torch.tensor([[[[1.0, 4 / 3]]]]))
    queries = torch.tensor([[[[1.0, 1.0], [2.0, 1.0], [1.0, 2.0]]]])
    assert float((queries.mean(2) * index.means()[:, :, 0]).sum()) == pytest.approx(28 / 9)


def sentences_of(length, seed):
    """Boundaries `(B, N)` and the sentence each token belongs to."""
    marks = torch.rand(B, length, generator=torch.Generator().manual_seed(seed)) < 0.1
    return marks, marks.long().cumsum(1) - marks.long()


@pytest.mark.parametrize("pieces", [[90], [40, 50], [1] * 90])
def test_sentence_means_and_order_are_those_of_the_slow_version(pieces):
    keys, rows = decaying(90), random(B, K, 3, D, seed=7)
    marks, numbers = sentences_of(90, seed=1)
    everywhere = numbers[:, None].expand(-1, K, -1)
    index, start = SentenceIndex(keys[:, :, :0], everywhere[..., :0]), 0
    for size in pieces:
        part = slice(start, start + size)
        index.append(keys[:, :, part], everywhere[..., part])
        start += size
    order = index.score(rows)[0][:, :, 0].argsort(dim=-1, descending=True)
    for row in range(B):
        spans = reference.sentences(marks[row].tolist())
        means = reference.sentence_means(keys[row], [list(range(90))] * K, spans)
        found = index.means()[row, :, : len(spans)].double()
        torch.testing.assert_close(found, means, atol=1e-5, rtol=1e-5)
        for head in range(K):
            scores = reference.sentence_scores(list(rows[row, head]), list(means[head]))
            ranked = sorted(range(len(spans)), key=lambda i: (-scores[i], i))
            assert order[row, head].tolist() == [place for i in ranked for place in range(*spans[i])]


def test_equal_sentences_keep_the_order_of_the_text():
    numbers = (torch.arange(50) // 7).expand(B, K, -1)
    scores, _ = SentenceIndex(torch.ones(B, K, 50, D), numbers).score(torch.ones(B, K, 1, D))
    assert (scores.diff(dim=-1) < 0).all()


def test_padding_does_not_count_in_a_sentence_and_a_sentence_of_padding_has_no_mean():
    keys = decaying(40)
    numbers = (torch.arange(40) // 8).expand(B, K, -1)
    hidden = torch.zeros(B, K, 40, dtype=torch.bool)
    hidden[1, :, :11] = True
    index = SentenceIndex(keys.masked_fill(hidden[..., None], 1e4), numbers, hidden)
    assert not index.means()[1, :, 0].any()
    torch.testing.assert_close(index.means()[1, :, 1], keys[1, :, 11:16].mean(1))
    torch.testing.assert_close(index.means()[0, :, 0], keys[0, :, :8].mean(1))
    order = index.score(keys[:, :, -1:])[0][1, :, 0].argsort(dim=-1, descending=True)
    assert (order[:, -8:].sort().values == torch.arange(8)).all(), "a sentence without tokens comes last"


# Weights.


@pytest.mark.parametrize("queries", [1, 2, 7])
def test_best_of_heads(queries):
    scores = random(B, K, queries, 20)
    found = best_of_heads(scores)
    for place in range(20):
        behind = [scores[:, :, q, place] - scores[:, :, q].amax(-1) for q in range(queries)]
        torch.testing.assert_close(found[..., place], torch.stack(behind).amax(0))
    assert torch.equal(found.amax(-1), torch.zeros(B, K))
    shifted = best_of_heads(scores + random(B, K, queries, 1, seed=1))
    torch.testing.assert_close(found, shifted, msg="a constant per query changes nothing")


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 40])
def test_spread_forward(steps):
    weights = random(B, K, 30)
    given = weights.clone()
    found = spread_forward(weights, steps)
    for place in range(30):
        expected = given[..., max(0, place - steps + 1) : place + 1].amax(-1)
        assert torch.equal(found[..., place], expected)
    assert torch.equal(weights, given), "the weights given were changed"
