"""Attention over stretches of storage: means that stand for tokens, products of bytes, and the library's kernel."""

import itertools
import math

import pytest
import torch

from hf_ext.cache_impls import attention
from hf_ext.cache_impls.attention import CONVERTED_ROWS, Segment, score_rows, segment_attention


B, K, G, D = 2, 2, 2, 8
PAGES, EDGE, SLACK = 5, 6, 3


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_slack(rows):
    """Storage with rows in front, and behind them what must not count."""
    return torch.cat([rows, torch.full((*rows.shape[:2], SLACK, rows.shape[3]), 50.0)], dim=2)


# Means.


def slow(parts, row, head, at, queries, softcap):
    """The output for one query of one head in float64, number by number: a mean counts as often as it has tokens."""
    terms = []
    for part in parts:
        query, keys, values = (rows[row, head].double() for rows in (part.query, part.keys, part.values))
        excluded = set() if part.exclude is None else set(part.exclude[row, head].tolist())
        for i in range(part.length):
            if i in excluded:
                continue
            if (
                part.visible is not None
                and not part.visible.expand(B, K, G, queries, -1)[row, head, 0, at % queries, i]
            ):
                continue
            logit = sum(float(q * k) for q, k in zip(query[at], keys[i]))
            logit += 0.0 if part.shift is None else float(part.shift[row, head, at])
            logit = logit if softcap is None else softcap * math.tanh(logit / softcap)
            tokens = 1.0 if part.counts is None else float(part.counts.expand(-1, K, -1)[row, head, i])
            value = values[i] if part.expand is None else part.expand[row, head].double() @ values[i]
            value = value if part.offset is None else value + part.offset[row, head, 0].double()
            terms.append((tokens * math.exp(logit), value))
    total = sum(weight for weight, _ in terms)
    return sum(weight / total * value for weight, value in terms)


def slow_output(parts, queries, softcap=None):
    output = torch.zeros(B, K, G * queries, D, dtype=torch.float64)
    for row, head, at in itertools.product(range(B), range(K), range(G * queries)):
        output[row, head, at] = slow(parts, row, head, at, queries, softcap)
    return output


COUNTS = {
    "full": torch.full((B, 1, PAGES), 16.0),
    "padded": torch.tensor([[[16.0, 16, 16, 16, 16]], [[0, 0, 5, 16, 16]]]),
    "by head": torch.tensor([[[16.0, 2, 0, 1, 9], [5, 16, 16, 0, 16]], [[0, 0, 5, 16, 16], [0, 0, 1, 1, 1]]]),
}


def parts_with_means(queries, counts, extra, seed=0):
    """An edge of which every query sees more than the one before, and means whose keys are 3 bytes."""
    generator = torch.Generator().manual_seed(seed)
    query = random(B, K, G * queries, D, seed=seed)
    seen = torch.ones(queries, EDGE, dtype=torch.bool).tril(EDGE - queries).expand(B, 1, 1, -1, -1)
    seen = seen & (torch.rand(B, 1, 1, 1, EDGE, generator=generator) > 0.3)
    keys, values = (with_slack(random(B, K, EDGE, D, seed=seed + i)) for i in (1, 2))
    options = {"counts": counts}
    if "exclude" in extra:
        options["exclude"] = torch.rand(B, K, PAGES, generator=generator).argsort(-1)[..., :2]
    if "visible" in extra:
        options["visible"] = torch.rand(B, K, 1, 1, PAGES, generator=generator) > 0.4
    if "bases" in extra:
        options["shift"] = random(B, K, G * queries, 1, seed=seed + 5)
        options["expand"], options["offset"] = random(B, K, D, 4, seed=seed + 6), random(B, K, 1, D, seed=seed + 7)
    means = Segment(
        random(B, K, G * queries, 3, seed=seed + 3) / 100,
        with_slack(random(B, K, PAGES, 3, seed=seed + 4) * 40).to(torch.int8),
        with_slack(random(B, K, PAGES, 4 if "bases" in extra else D, seed=seed + 8)),
        PAGES,
        **options,
    )
    return [Segment(query, keys, values, EDGE, seen), means]


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("extra", ["", "exclude", "visible", "bases", "exclude visible bases"])
def test_a_mean_counts_as_often_as_it_has_tokens(queries, softcap, counts, extra):
    parts = parts_with_means(queries, COUNTS[counts], extra, seed=len(extra))
    found = segment_attention(parts, G, softcap)
    torch.testing.assert_close(found.double(), slow_output(parts, queries, softcap), atol=2e-5, rtol=1e-4)


def test_a_mean_of_equal_tokens_says_what_they_would():
    query, keys, values = (random(B, K, count, D, seed=count) for count in (G, 5, 6))
    edge, times = Segment(query, keys, values[:, :, :5], 5), torch.tensor([1, 16, 3])
    means = Segment(query, keys[:, :, :3] / 2, values[:, :, 3:], 3, counts=times.float().expand(B, 1, -1))
    each = [rows.repeat_interleave(times, dim=2) for rows in (means.keys, means.values)]
    tokens = Segment(query, *each, 20)
    torch.testing.assert_close(segment_attention([edge, means], G), segment_attention([edge, tokens], G))


@pytest.mark.parametrize("alone", [False, True])
def test_means_of_no_tokens_change_nothing(alone):
    parts = parts_with_means(1, torch.zeros(B, 1, PAGES), "")
    expected = segment_attention(parts[:1], G)
    if alone:
        parts[0].visible = torch.zeros_like(parts[0].visible)
        assert torch.isfinite(segment_attention(parts, G)).all(), "a query that sees nothing"
    else:
        torch.testing.assert_close(segment_attention(parts, G), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_means_among_other_types_come_back_in_the_type_of_the_queries(dtype):
    parts = parts_with_means(1, COUNTS["padded"], "")
    expected = slow_output(parts, 1)
    for part in parts:
        part.query, part.values = part.query.to(dtype), part.values.to(dtype)
        part.keys = part.keys if part.keys.dtype == torch.int8 else part.keys.to(dtype)
    found = segment_attention(parts, G)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=0.03, rtol=0.03)


# Scores.


def bytes_of(count, length, dim, seed=0):
    return torch.randint(-127, 128, (count, length, dim), generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def scored(query, keys):
    """`score_rows` into the middle of a wider matrix, as attention asks it."""
    whole = torch.full((*query.shape[:2], keys.shape[1] + 7), 7.0)
    score_rows(query, keys, whole[..., 4:-3])
    assert (whole[..., :4] == 7).all()
    assert (whole[..., -3:] == 7).all()
    return whole[..., 4:-3]


@pytest.mark.parametrize("dim", [16, 32, 48, 64])
@pytest.mark.parametrize("length", [1, 3, 17, 4000])
@pytest.mark.parametrize("queries", [1, 6, 64])
def test_scores_of_bytes_are_the_product_up_to_bfloat16(dim, length, queries):
    query, keys = random(3, queries, dim), bytes_of(3, length, dim)
    found = scored(query, keys)
    rounded = query.bfloat16().double() @ keys.double().mT
    magnitude = query.double().abs() @ keys.double().abs().mT
    assert ((found - rounded).abs() <= rounded.abs() / 2**8 + magnitude * 1e-5).all(), "one rounding of each score"
    assert torch.equal(found, found.bfloat16().float()), "the fast product was not taken"


@pytest.mark.parametrize("dim", [7, 24])
@pytest.mark.parametrize("length", [1, 3, 17, CONVERTED_ROWS, 4000])
def test_scores_of_bytes_in_other_dimensions_are_the_product(dim, length):
    query, keys = random(3, 6, dim), bytes_of(3, length, dim)
    torch.testing.assert_close(scored(query, keys), query @ keys.float().mT, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("view", ["rows", "coordinates", "turned"])
def test_scores_of_bytes_that_lie_apart_are_the_product(view):
    query, whole = random(3, 6, 32), bytes_of(3, 90, 90)
    keys = {"rows": whole[:, :50, :32], "coordinates": whole[:, :, ::2][..., :32], "turned": whole.mT[..., :32]}[view]
    assert not keys.is_contiguous()
    torch.testing.assert_close(scored(query, keys), query @ keys.float().mT, atol=1e-2, rtol=1e-5)


@pytest.mark.parametrize("dim", [7, 32])
def test_no_rows_have_no_scores(dim):
    assert scored(random(3, 6, dim), bytes_of(3, 0, dim)).shape == (3, 6, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_numbers_are_not_rounded(dtype):
    query, keys = random(3, 6, 32), random(3, 4000, 32, seed=1).to(dtype)
    torch.testing.assert_close(scored(query, keys), query @ keys.float().mT, atol=1e-4, rtol=1e-5)


# The library's kernel.


def plain_parts(queries, shown, dtype=torch.float32):
    """Two segments with slack; `shown` says of which of them some rows are hidden."""
    query, parts = random(B, K, G * queries, D).to(dtype), []
    for number, length in enumerate((EDGE, 20)):
        keys, values = (with_slack(random(B, K, length, D, seed=2 * number + i + 1)).to(dtype) for i in range(2))
        visible = None
        if number in shown:
            generator = torch.Generator().manual_seed(number)
            shape = (B, 1, 1, queries, length) if number == 0 else (B, K, 1, 1, length)
            visible = torch.rand(shape, generator=generator) > 0.4
            visible[..., 0] = True
        parts.append(Segment(query, keys, values, length, visible))
    return parts


def both_ways(parts, monkeypatch, softcap=None):
    """Output by the kernel and by the matrix of scores, and how often the kernel ran."""
    calls, kernel = [], attention.scaled_dot_product_attention
    monkeypatch.setattr(attention, "prefers_flash", lambda query: True)
    monkeypatch.setattr(
        attention,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: (calls.append(1), kernel(*args, **kwargs))[1],
    )
    fast = segment_attention(parts, G, softcap)
    monkeypatch.setattr(attention, "prefers_flash", lambda query: False)
    return fast, segment_attention(parts, G, softcap), len(calls)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("shown", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_the_kernel_says_what_the_matrix_of_scores_says(queries, shown, dtype, close, monkeypatch):
    fast, other, calls = both_ways(plain_parts(queries, shown, dtype), monkeypatch)
    assert calls == 1
    assert fast.dtype == other.dtype == dtype
    torch.testing.assert_close(fast, other, atol=close, rtol=close)


def test_the_kernel_gives_a_query_that_sees_nothing_a_finite_output(monkeypatch):
    parts = plain_parts(3, (0, 1))
    for part in parts:
        part.visible = part.visible.expand(B, K, G, 3, -1).clone()
        part.visible[1, :, :, 0] = False
    fast, other, _ = both_ways(parts, monkeypatch)
    assert torch.isfinite(fast).all()
    seeing = torch.arange(G * 3) % 3 > 0
    torch.testing.assert_close(fast[0], other[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fast[1][:, seeing], other[1][:, seeing], atol=1e-5, rtol=1e-5)


EXTRAS = {
    "shift": {"shift": random(B, K, G, 1, seed=9)},
    "offset": {"offset": random(B, K, 1, D, seed=9)},
    "expand": {"expand": torch.eye(D).flip(0).expand(B, K, -1, -1).contiguous()},
    "exclude": {"exclude": torch.full((B, K, 1), 2)},
    "counts": {"counts": torch.full((B, 1, 20), 3.0)},
    "scores": {"scores": random(B, K, G, 20 + SLACK, seed=9)},
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_rows_that_are_more_than_keys_and_values_are_not_left_to_the_kernel(extra, monkeypatch):
    parts = plain_parts(1, (0,))
    plain = segment_attention(parts, G)
    for name, value in EXTRAS[extra].items():
        setattr(parts[1], name, value)
    fast, other, calls = both_ways(parts, monkeypatch)
    assert calls == 0
    assert torch.equal(fast, other)
    assert float((fast - plain).abs().max()) > 1e-3


def test_a_softcap_is_not_left_to_the_kernel(monkeypatch):
    fast, other, calls = both_ways(plain_parts(1, (0,)), monkeypatch, softcap=0.5)
    assert calls == 0
    assert torch.equal(fast, other)
