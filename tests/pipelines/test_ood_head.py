"""The heads of `hf_ext.pipelines.ood_head`: against ridge regression, loops over pairs and rows, and planted sets."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ext.errors import DataError
from hf_ext.pipelines import ood_head
from hf_ext.pipelines.medix import MedixFilter
from hf_ext.pipelines.ood_head import (
    CrossFit,
    Moments,
    Nearness,
    OODHead,
    area,
    as_rows,
    clearly_best,
    discriminant,
    join,
    standard,
    two_pass_scores,
)
from tests.reference import medix_naive as naive


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def auroc(low, high):
    return float(area(low[:, None], high[:, None])[0])


def ring(n, seed, radius=5.0, d=4):
    """Four classes on a ring."""
    centres = radius * torch.cat([torch.eye(d)[:2], -torch.eye(d)[:2]])
    return (centres[torch.arange(n) % 4] + normal(n, d, seed=seed)).float()


# The discriminant.


@pytest.mark.parametrize("strength", [0.01, 1.0, 100.0])
@pytest.mark.parametrize(("n", "m", "d"), [(60, 25, 4), (15, 200, 6), (8, 5, 30)])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_discriminant_is_the_balanced_ridge_regression_of_the_side(strength, n, m, d, weighted):
    linear_model = pytest.importorskip("sklearn.linear_model")
    low, high = normal(n, d), 1 + normal(m, d, seed=1)
    weights = torch.rand(m, generator=torch.Generator().manual_seed(2), dtype=torch.float64) if weighted else None
    weight, bias = discriminant(Moments.of(low), Moments.of(high, weights), torch.tensor([strength]))
    found, offset = weight[:, 0].numpy(), float(bias)
    own = np.ones(m) if weights is None else weights.numpy()
    sample = np.r_[np.full(n, 0.5 / n), 0.5 * own / own.sum()]
    x, y = torch.cat([low, high]).numpy(), np.r_[-np.ones(n), np.ones(m)]
    mean = sample @ x
    variance = (sample @ (x - mean) ** 2).mean()
    ridge = linear_model.Ridge(alpha=strength * variance).fit(x, y, sample_weight=sample)
    np.testing.assert_allclose(found, ridge.coef_, rtol=1e-6, atol=1e-9)
    assert offset == pytest.approx(float(ridge.intercept_), rel=1e-6, abs=1e-9)


def test_a_path_of_strengths_is_each_of_them():
    low, high = Moments.of(normal(40, 5)), Moments.of(1 + normal(30, 5, seed=1))
    strengths = torch.tensor([0.1, 1.0, 50.0])
    weight, bias = discriminant(low, high, strengths)
    for place in range(3):
        one, offset = discriminant(low, high, strengths[place : place + 1])
        torch.testing.assert_close(weight[:, place], one[:, 0])
        torch.testing.assert_close(bias[place], offset[0])


def test_folds_add_up():
    x, fold = normal(30, 3), torch.arange(30) % 4
    moments = Moments.of_folds(x, fold, 4)
    for gone in ((), (1,), (0, 3)):
        kept = torch.stack([fold != k for k in gone]).all(0) if gone else torch.ones(30, dtype=torch.bool)
        for found, expected in zip(moments.without(*gone), Moments.of(x[kept])):
            torch.testing.assert_close(found, expected)
    weights = torch.rand(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for found, expected in zip(Moments.of_folds(x, fold, 4, weights).without(), Moments.of(x, weights)):
        torch.testing.assert_close(found, expected)


def test_equal_sides_have_no_direction():
    x = normal(20, 3)
    weight, bias = discriminant(Moments.of(x), Moments.of(x), torch.tensor([1.0]))
    assert weight.abs().max() < 1e-12
    assert bias.abs().max() < 1e-12


def test_two_columns_are_joined_by_the_discriminant_of_scaled_ones():
    low, high = normal(50, 2) * torch.tensor([3.0, 0.01]), 1 + normal(40, 2, seed=1)
    found, bias = join(low, high)
    scale = low.numpy().std(0)
    a, b = low.numpy() / scale, high.numpy() / scale
    middle = (a.mean(0) + b.mean(0)) / 2
    total = ((a - middle).T @ (a - middle) / 50 + (b - middle).T @ (b - middle) / 40) / 2
    w = np.linalg.solve(total + 1e-3 * np.trace(total) / 2 * np.eye(2), (b.mean(0) - a.mean(0)) / 2)
    np.testing.assert_allclose(found.numpy(), w / scale, rtol=1e-5)
    assert float(bias) == pytest.approx(-w @ middle, rel=1e-5)


# Areas and choices.


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=15), st.lists(st.integers(-3, 3), min_size=1, max_size=15))
def test_the_area_counts_pairs(low, high):
    a, b = torch.tensor(low).double(), torch.tensor(high).double()
    found, part_low, part_high = area(torch.stack([a, -a], 1), torch.stack([b, -b], 1))
    assert found.tolist() == pytest.approx([naive.auroc(low, high), naive.auroc(high, low)])
    for value, own in zip(low, part_low[:, 0].tolist()):
        assert own == pytest.approx(naive.auroc([value], high))
    for value, own in zip(high, part_high[:, 0].tolist()):
        assert own == pytest.approx(naive.auroc(low, [value]))


def test_the_usual_column_stays_unless_another_is_clearly_better():
    low, high = normal(300, 1), 1 + normal(300, 1, seed=1)
    noise = 0.01 * normal(300, 1, seed=2)
    assert clearly_best(torch.cat([low, low + noise], 1), torch.cat([high, high + noise], 1), 0) == 0
    good = torch.cat([low, low], 1), torch.cat([high, high + 3], 1)
    assert clearly_best(*good, 0) == 1
    assert clearly_best(*good, 1) == 1
    assert clearly_best(torch.zeros(4, 3), torch.zeros(5, 3), 2) == 2
    assert clearly_best(torch.zeros(1, 2), torch.ones(1, 2), 1) == 1


def test_nearness_is_the_log_distance_to_others():
    inside, rows = normal(30, 3), 3 * normal(10, 3, seed=1)
    near = Nearness(inside, 0)
    mean, scale = inside.numpy().mean(0), inside.numpy().std(0)
    references = (inside.numpy() - mean) / scale
    for values, own in ((rows, False), (inside, True)):
        expected = []
        for row in (values.numpy() - mean) / scale:
            squares = np.sort(((references - row) ** 2).sum(1))[int(own) :]
            expected.append(0.5 * math.log(squares[:5].mean()))
        assert near(values).tolist() == pytest.approx(expected, abs=1e-6)


def test_nearness_of_one_reference_is_nothing():
    assert not Nearness(torch.ones(1, 3), 0)(normal(4, 3)).any()


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_no_row_is_scored_by_a_head_that_knows_it(folds, monkeypatch):
    monkeypatch.setattr(ood_head, "FOLDS", folds)
    inside, wild, strength = normal(40, 3), 1 + normal(30, 3, seed=1), torch.tensor([1.0])
    fit = CrossFit(inside, wild, 0)
    low, high = fit.first(strength)
    for k in range(folds):
        weight, bias = discriminant(
            Moments.of(inside[fit.fold_in != k]), Moments.of(wild[fit.fold_wild != k]), strength
        )
        torch.testing.assert_close(low[fit.fold_in == k], inside[fit.fold_in == k] @ weight + bias)
        torch.testing.assert_close(high[fit.fold_wild == k], wild[fit.fold_wild == k] @ weight + bias)
    nested = fit.nested(strength)
    for k in range(folds):
        own = fit.fold_wild == k
        assert nested[k, own].isnan().all()
        assert nested[k, ~own].isfinite().all()
        if folds == 2:
            continue
        other = wild.clone()
        other[own] = 100.0
        changed = CrossFit(inside, other, 0).nested(strength)
        torch.testing.assert_close(changed[k, ~own], nested[k, ~own])


# The head.


@pytest.mark.parametrize(("n", "d"), [(50, 4), (20, 60), (5, 300), (30, 31), (31, 32)])
def test_one_ood_row_gives_the_plain_discriminant(n, d):
    """Without rows for cross-fitting there is no second column: the score is the formula on standardised columns.

    Also where there are more columns than rows, whatever the head does to make it cheap.
    """
    inside, outside = 3 + normal(n, d) * torch.logspace(-1, 1, d).double(), torch.full((1, d), 9.0).double()
    head = OODHead(regularization=2.0).fit(inside, outside)
    both = torch.cat([inside, outside]).numpy()
    x = (both - both.mean(0)) / both.std(0)
    a, b = x[:n], x[n:]
    middle = (a.mean(0) + b.mean(0)) / 2
    total = ((a - middle).T @ (a - middle) / n + (b - middle).T @ (b - middle)) / 2
    w = np.linalg.solve(total + 2.0 * np.trace(total) / d * np.eye(d), (b.mean(0) - a.mean(0)) / 2)
    np.testing.assert_allclose(head.score(both).numpy(), (x - middle) @ w, rtol=1e-8, atol=1e-10)
    assert (head.strength_, head.squares_) == (2.0, False)
    scores = head.score(both)
    assert scores[n] > scores[:n].max()
    other = normal(7, d, seed=9)
    expected = ((other.numpy() - both.mean(0)) / both.std(0) - middle) @ w
    np.testing.assert_allclose(head.score(other).numpy(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
def test_far_clouds_are_told_apart(share):
    count = max(1, round(share * 400))
    inside, new = ring(400, 0), ring(400, 1)
    outside = ring(count, 2) + torch.tensor([0.0, 0.0, 8.0, 0.0])
    away = ring(200, 3) + torch.tensor([0.0, 0.0, 8.0, 0.0])
    head = OODHead().fit(inside, outside)
    assert auroc(head.score(new), head.score(away)) > 0.99
    assert head.score(away).mean() > 0 > head.score(new).mean()


def test_rows_between_the_classes_are_found():
    head = OODHead().fit(ring(600, 0), 0.7 * normal(300, 4, seed=1).float())
    assert auroc(head.score(ring(400, 2)), head.score(0.7 * normal(300, 4, seed=3).float())) > 0.95
    assert head.squares_


def test_an_exclusive_or_is_found_by_nearness():
    """In-distribution where the signs of two columns agree: neither columns nor their squares know."""
    generator = torch.Generator().manual_seed(0)

    def quarter(n, agree):
        rows = torch.randn(n, 3, generator=generator)
        rows[:, 0] = 3 * torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0) + 0.7 * rows[:, 0]
        rows[:, 1] = 3 * rows[:, 0].sign() * (1 if agree else -1) + 0.7 * rows[:, 1]
        return rows

    head = OODHead().fit(quarter(500, True), quarter(300, False))
    assert auroc(head.score(quarter(300, True)), head.score(quarter(300, False))) > 0.97


def test_weights_are_repetitions():
    inside, outside = normal(60, 3), 2 + normal(10, 3, seed=1)
    head = OODHead(1.0)
    counts = torch.tensor([1, 2, 3, 0, 1, 1, 0, 2, 1, 1])
    weights = Moments.of(outside, counts.double())
    repeated = Moments.of(outside.repeat_interleave(counts, 0))
    for found, expected in zip(weights, repeated):
        torch.testing.assert_close(found, expected)
    # Rows that count nothing might as well be missing, and only proportions matter.
    first = head.fit(inside, outside, counts.double()).score(inside)
    second = head.fit(inside, outside[counts > 0], counts[counts > 0] * 10.0).score(inside)
    torch.testing.assert_close(first, second)
    assert torch.equal(head.fit(inside, outside).score(inside), OODHead(1.0).fit(inside, outside).score(inside))
    equal = head.fit(inside, outside, torch.full((10,), 0.3)).score(inside)
    torch.testing.assert_close(equal, head.fit(inside, outside).score(inside))


def test_weights_of_the_filter_beat_all_rows_alike():
    inside, new = ring(500, 0), ring(300, 1)
    far = torch.tensor([0.0, 0.0, 0.0, 4.0])
    wild = torch.cat([ring(360, 2), ring(40, 3) + far])
    medix = MedixFilter().reference(inside, torch.arange(500) % 4)
    medix.select(wild)
    away = ring(300, 4) + far
    head = OODHead().fit(inside, wild, medix.weights_)
    assert auroc(head.score(new), head.score(away)) > 0.95


def test_constant_columns_do_not_count():
    inside, outside = normal(80, 3), 2 + normal(40, 3, seed=1)
    one, seven = torch.ones(80, 1).double(), torch.full((40, 1), 1.0).double()
    plain = OODHead(1.0).fit(inside, outside)
    padded = OODHead(1.0).fit(torch.cat([inside, 7 * one, 0 * one], 1), torch.cat([outside, 7 * seven, 0 * seven], 1))
    new = normal(50, 3, seed=2)
    scores = padded.score(torch.cat([new, 7 * one[:50], 0 * one[:50]], 1))
    assert scores.isfinite().all()
    # The ridge is relative to the mean variance, which constant columns lower: the order stays, not the size.
    order = np.corrcoef(scores.argsort().argsort(), plain.score(new).argsort().argsort())[0, 1]
    assert order > 0.99


def test_constant_rows_score_nothing():
    head = OODHead().fit(torch.ones(10, 3), torch.ones(6, 3))
    assert head.score(torch.ones(2, 3)).isfinite().all()
    scores, share = two_pass_scores(torch.ones(10, 3), torch.ones(6, 3))
    assert scores.isfinite().all()
    assert share == 0.0


def test_units_of_the_columns_do_not_matter():
    inside, outside, new = normal(90, 4), 1 + normal(50, 4, seed=1), normal(40, 4, seed=2)
    units, offset = torch.tensor([1e-6, 1.0, 50.0, 1e6]).double(), torch.tensor([0.0, -3.0, 8.0, 1e5]).double()
    plain = OODHead().fit(inside, outside).score(new)
    moved = OODHead().fit(inside * units + offset, outside * units + offset).score(new * units + offset)
    torch.testing.assert_close(moved, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("outside", [1, 2, 10])
def test_more_columns_than_rows(outside):
    shift = torch.zeros(200).double()
    shift[:100] = 1.0
    head = OODHead().fit(normal(30, 200), shift + normal(outside, 200, seed=1))
    scores = head.score(normal(50, 200, seed=2)), head.score(shift + normal(50, 200, seed=3))
    assert auroc(*scores) > (0.8 if outside == 1 else 0.95)


def test_wide_columns_are_projected(monkeypatch):
    monkeypatch.setattr(ood_head, "MAX_COLUMNS", 40)
    inside, outside = normal(200, 64), 1 + normal(100, 64, seed=1)
    head = OODHead().fit(inside, outside)
    assert head.weight_.shape == (40,)
    assert auroc(head.score(normal(100, 64, seed=2)), head.score(1 + normal(100, 64, seed=3))) > 0.99
    torch.testing.assert_close(OODHead().fit(inside, outside).score(inside), head.score(inside))


@pytest.mark.parametrize("n", [2, 3, 4, 6])
@pytest.mark.parametrize("m", [1, 2, 3, 6])
def test_small_samples(n, m):
    inside, outside = normal(n, 3).float(), 20 + normal(m, 3, seed=1).float()
    scores = OODHead().fit(inside, outside).score(torch.cat([inside, outside]))
    assert scores.isfinite().all()
    assert scores[n:].mean() > scores[:n].mean()
    if m > 1:
        scores, share = two_pass_scores(inside, outside)
        assert scores.isfinite().all()
        assert 0 <= share <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int32])
def test_types_of_numbers(dtype):
    inside, outside = (2 * normal(60, 4)).to(dtype), (6 + normal(30, 4, seed=1)).to(dtype)
    head = OODHead().fit(inside, outside)
    scores = head.score(inside)
    assert scores.dtype == torch.float32
    exact = OODHead().fit(inside.double(), outside.double())
    assert exact.score(inside.double()).dtype == torch.float64
    torch.testing.assert_close(scores.double(), exact.score(inside.double()), rtol=1e-3, atol=1e-3)
    if dtype != torch.bfloat16:
        again = OODHead().fit(inside.numpy(), outside.numpy())
        assert torch.equal(again.score(inside.numpy()), scores)


def test_rows_score_alike_in_any_company():
    head = OODHead().fit(ring(300, 0), ring(100, 1) + 3)
    rows = ring(5000, 2)
    scores = head.score(rows)
    torch.testing.assert_close(torch.cat([head.score(part) for part in rows.split(999)]), scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.score(rows[:1]), scores[:1], rtol=1e-4, atol=1e-5)


def test_the_head_is_the_same_whatever_was_drawn_before():
    inside, outside = ring(100, 0), ring(60, 1) + 1
    first = OODHead(seed=3).fit(inside, outside).score(inside)
    torch.rand(11)
    state = torch.get_rng_state()
    assert torch.equal(OODHead(seed=3).fit(inside, outside).score(inside), first)
    assert torch.equal(torch.get_rng_state(), state)


# Two passes.


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.7])
def test_two_passes_rank_and_count(share):
    count, errors = round(share * 1000), []
    for seed in range(6):
        away = ring(count, 2000 + seed) + torch.tensor([0.0, 0.0, 6.0, 6.0])
        wild = torch.cat([ring(1000 - count, 1000 + seed), away])
        scores, found = two_pass_scores(ring(1500, seed), wild)
        assert auroc(scores[:-count], scores[-count:]) > 0.99
        assert (scores.topk(count).indices >= 1000 - count).double().mean() >= 0.9
        errors.append(found - share)
    # Low prevalences are overestimated: the best of many cuts.
    assert -0.02 < np.mean(errors) < 0.06
    assert max(errors) < 0.15


def test_two_passes_without_ood_rows():
    shares = [two_pass_scores(ring(1500, seed), ring(1000, 1000 + seed))[1] for seed in range(6)]
    assert np.mean(shares) < 0.1
    assert max(shares) < 0.2


def test_a_given_share_comes_back():
    scores, share = two_pass_scores(ring(200, 0), ring(100, 1), prevalence=0.123)
    assert share == 0.123
    assert scores.shape == (100,)


def test_two_passes_depend_on_their_seed_alone():
    inside, wild = ring(200, 0), ring(100, 1) + 0.5
    first = two_pass_scores(inside, wild, seed=1)
    torch.rand(5)
    again = two_pass_scores(inside, wild, seed=1)
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1]
    assert not torch.equal(two_pass_scores(inside, wild, seed=2)[0], first[0])


def test_more_in_distribution_rows_than_references(monkeypatch):
    monkeypatch.setattr(ood_head, "MAX_REFERENCES", 50)
    wild = torch.cat([ring(100, 1), ring(40, 2) + 6])
    scores, _ = two_pass_scores(ring(400, 0), wild)
    assert auroc(scores[:100], scores[100:]) > 0.98


# Errors.


@pytest.mark.parametrize(
    ("inside", "outside", "weights", "message"),
    [
        (torch.zeros(1, 2), torch.zeros(3, 2), None, "in_features holds 1 rows; expected at least 2"),
        (torch.zeros(4, 2), torch.zeros(0, 2), None, "ood_features holds 0 rows; expected at least 1"),
        (torch.zeros(4, 2), torch.zeros(3, 5), None, "ood_features is 5 wide; expected 2"),
        (torch.full((4, 2), math.nan), torch.zeros(3, 2), None, "in_features holds NaN or infinity in 4 of 4"),
        (torch.zeros(4, 2), torch.full((3, 2), -math.inf), None, "ood_features holds NaN or infinity in 3 of 3"),
        (torch.zeros(4, 2), torch.zeros(3, 2), torch.ones(2), r"ood_weights have shape \(2,\); expected \(3,\)"),
        (torch.zeros(4, 2), torch.zeros(3, 2), -torch.ones(3), "none negative"),
        (torch.zeros(4, 2), torch.zeros(3, 2), torch.full((3,), math.nan), "ood_weights"),
        (torch.zeros(4, 2), torch.zeros(3, 2), torch.zeros(3), "all zero"),
        (torch.zeros(4), torch.zeros(3), None, "in_features has shape"),
        ("rows", torch.zeros(3, 2), None, "in_features is a str that is no table"),
        ([[1.0], [2.0, 3.0]], torch.zeros(3, 2), None, "in_features is a list that is no table"),
        (np.array([["a", "b"]] * 3), torch.zeros(3, 2), None, "in_features is a ndarray that is no table"),
        (torch.zeros(4, 2), torch.zeros(3, 2), "heavy", "ood_weights"),
    ],
)
def test_what_cannot_be_fitted_is_named(inside, outside, weights, message):
    with pytest.raises(DataError, match=message):
        OODHead().fit(inside, outside, weights)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_strength_that_is_none(value):
    with pytest.raises(DataError, match=f"regularization={value!r} must be a positive number"):
        OODHead(regularization=value)


def test_a_strength_too_small_for_wide_rows_is_named():
    """Gram matrices of float32 rows are singular, or a little worse, where there are fewer rows than columns."""
    inside, outside = normal(5, 300).float(), normal(5, 300, seed=1).float()
    with pytest.raises(
        DataError, match="a ridge of .*e-1. of the mean variance is too small .*regularization=1e-3 or more"
    ):
        two_pass_scores(inside, outside, 1e-9)
    assert two_pass_scores(inside, outside, 1e-3)[0].isfinite().all()
    assert OODHead(1e300).fit(inside, outside).score(outside).isfinite().all()


def test_what_cannot_be_scored_is_named():
    head = OODHead()
    with pytest.raises(DataError, match="not fitted yet; call `fit"):
        head.score(torch.zeros(1, 2))
    head.fit(normal(10, 2), normal(5, 2, seed=1))
    with pytest.raises(DataError, match="features is 3 wide; expected 2"):
        head.score(torch.zeros(1, 3))
    with pytest.raises(DataError, match="features holds NaN or infinity in 1 of 1 rows"):
        head.score(torch.full((1, 2), math.nan))
    with pytest.raises(DataError, match="features holds 0 rows"):
        head.score(torch.zeros(0, 2))


def test_rows_are_checked_and_converted():
    assert as_rows([[1, 2]], "x").dtype == torch.float32
    assert as_rows(np.zeros((2, 2)), "x").dtype == torch.float64
    assert as_rows(torch.zeros(2, 2, requires_grad=True), "x").requires_grad is False
    assert as_rows([[True, False]], "x").tolist() == [[1.0, 0.0]]
    with pytest.raises(DataError, match=r"x holds NaN or infinity in 1 of 1 rows"):
        as_rows(torch.full((1, 1), 1e300, dtype=torch.float64).float(), "x")


def test_constant_columns_have_the_scale_one():
    rows = torch.stack([torch.full((9,), 0.1), torch.zeros(9), torch.arange(9.0), torch.arange(9.0) * 1e-12], 1)
    mean, scale = standard(rows)
    assert scale[:2].tolist() == [1.0, 1.0]
    torch.testing.assert_close(scale[2:], rows.std(0, correction=0)[2:])
    torch.testing.assert_close(mean, rows.mean(0))
