"""Medix: the exact leave-one-out score, the greedy loop, closed-form gradients, the filters and the reservoir."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_ext.log
from hf_ext.errors import ConfigError, DataError
from hf_ext.pipelines.medix import (
    MedixConfig,
    MedixFilter,
    Reservoir,
    fit_classifier,
    greedy_median_filter,
    last_layer_gradients,
    median_shift_scores,
)
from tests.reference import medix_naive as naive


FILTERS = ("two_pass", "medix", "sal", "knn", "grad_dist", "all", "random")


def normal(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


def clouds(share=0.3, n=400, wild=300, d=8, seed=0, far=8.0):
    """Three classes as reference; wild rows of them, and of a fourth cloud, which come last."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.eye(d)[:3]
    labels = torch.arange(n) % 3
    count = round(share * wild)
    features = centres[labels] + torch.randn(n, d, generator=generator)
    rows = centres[torch.arange(wild) % 3] + torch.randn(wild, d, generator=generator)
    rows[wild - count :, -1] += far
    return features, labels, rows, torch.arange(wild) >= wild - count


# The exact score.


@pytest.mark.parametrize("m", [2, 3, 4, 5, 6, 51, 100, 101])
@pytest.mark.parametrize("ties", [False, True])
def test_scores_are_those_of_the_loop(m, ties):
    g, r = normal(m, 7, seed=m, dtype=torch.float64), normal(7, seed=1, dtype=torch.float64)
    if ties:
        g = g.round()
        g[m // 2] = g[0]
    expected = torch.tensor(naive.deltas(g.tolist(), r.tolist()), dtype=torch.float64)
    torch.testing.assert_close(median_shift_scores(g, r), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("m", [500, 501])
def test_scores_in_float32_are_exact_to_a_millionth(m):
    g, r = normal(m, 16), 0.2 * normal(16, seed=1)
    whole = (g.median(0).values.double() - r.double()).norm()
    rest = [torch.cat([g[:i], g[i + 1 :]]).median(0).values.double() for i in range(m)]
    expected = torch.stack([whole - (median - r.double()).norm() for median in rest])
    torch.testing.assert_close(median_shift_scores(g, r), expected, atol=1e-6, rtol=0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(-3, 3), min_size=3, max_size=3), min_size=2, max_size=12))
def test_scores_of_small_integers_are_those_of_the_loop(rows):
    found = median_shift_scores(torch.tensor(rows), torch.tensor([0.25, -0.5, 0.0]))
    assert found.tolist() == pytest.approx(naive.deltas(rows, [0.25, -0.5, 0.0]), abs=1e-9)


@pytest.mark.parametrize("m", [60, 61])
def test_only_the_side_of_the_median_counts(m):
    g, r = normal(m, 5, dtype=torch.float64), normal(5, seed=1, dtype=torch.float64)
    order = g.sort(0).values
    middle = order[(m - 2) // 2 : (m - 2) // 2 + 2]
    stretched = middle[0] + 1000 * (g - middle[0])
    # The two order statistics themselves keep their values; all others go far away on their side.
    kept = (g == middle[0]) | (g == middle[1])
    torch.testing.assert_close(
        median_shift_scores(torch.where(kept, g, stretched), r), median_shift_scores(g, r), atol=1e-12, rtol=0
    )


def test_rows_may_come_in_any_order_and_from_any_origin():
    g, r = normal(80, 6, dtype=torch.float64), normal(6, seed=1, dtype=torch.float64)
    scores = median_shift_scores(g, r)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(3))
    assert torch.equal(median_shift_scores(g[order], r), scores[order])
    torch.testing.assert_close(median_shift_scores(g + 5.0, r + 5.0), scores, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_type_and_numpy_are_taken(dtype):
    g = normal(40, 4).to(dtype)
    found = median_shift_scores(g, torch.zeros(4))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, median_shift_scores(g.double().numpy(), np.zeros(4)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("share", [0.3, 0.45])
def test_rows_shifted_everywhere_come_first_below_one_half(share):
    g = normal(400, 10)
    count = round(share * 400)
    g[:count] += 30
    scores = median_shift_scores(g, torch.zeros(10))
    assert scores[:count].min() > scores[count:].max()


def test_the_distance_grows_with_the_share_of_shifted_rows():
    clean, reference = normal(1000, 20), torch.zeros(20)
    shifted = clean + 3
    found = []
    for count in range(0, 501, 50):
        rows = torch.cat([clean[count:], shifted[:count]])
        found.append(float((rows.median(0).values - reference).norm()))
    assert found == sorted(found)
    assert found[-1] > 20 * found[0]


# The greedy loop.


@pytest.mark.parametrize("paper", [True, False])
@pytest.mark.parametrize("k", [1, 3, 10, 19, 20, 100])
def test_the_loop_is_the_papers(k, paper):
    g, r = normal(20, 4, dtype=torch.float64), 2 + normal(4, seed=1, dtype=torch.float64)
    expected, rounds = naive.greedy(g.tolist(), r.tolist(), k, 0.0, 6)
    found, count = greedy_median_filter(g, r, k, 0.0, 6, paper=paper)
    assert count == rounds
    assert found.tolist() == expected


@pytest.mark.parametrize("epsilon", [0.001, 0.05, 0.3])
def test_the_papers_stop_comes_after_the_removal(epsilon):
    g, r = normal(60, 4, dtype=torch.float64), 1 + normal(4, seed=1, dtype=torch.float64)
    expected, rounds = naive.greedy(g.tolist(), r.tolist(), 5, epsilon, 50)
    found, count = greedy_median_filter(g, r, 5, epsilon, 50, paper=True)
    assert (found.tolist(), count) == (expected, rounds)


def test_an_endless_epsilon_is_one_round_and_rounds_have_a_limit():
    g, r = normal(100, 4), torch.ones(4)
    for paper in (True, False):
        found, rounds = greedy_median_filter(g, r, 7, 1e9, 20, paper)
        assert (len(found), rounds) == (7, 1)
        found, rounds = greedy_median_filter(g, r, 7, 0.0, 3, paper)
        assert (len(found), rounds) == (21, 3)
        assert len(set(found.tolist())) == 21


def test_as_many_rows_as_there_are_go_without_a_crash():
    g = normal(10, 3)
    for k in (10, 11, 1000):
        found, rounds = greedy_median_filter(g, torch.zeros(3), k, 0.0, 5, paper=True)
        assert (sorted(found.tolist()), rounds) == (list(range(10)), 1)
    found, rounds = greedy_median_filter(g, torch.zeros(3), 4, 0.0, 50, paper=True)
    assert sorted(found.tolist()) == list(range(10))


@pytest.mark.parametrize(("k", "rounds"), [(0, 1), (1, 0)])
def test_a_loop_of_nothing_is_refused(k, rounds):
    with pytest.raises(DataError, match="at least 1"):
        greedy_median_filter(normal(5, 2), torch.zeros(2), k, 0.0, rounds)


# Closed-form gradients.


@pytest.mark.parametrize("kind", ["feature", "weight"])
@pytest.mark.parametrize("given_labels", [True, False])
def test_gradients_are_those_of_autograd(kind, given_labels):
    h, w, b = normal(9, 6, dtype=torch.float64), normal(4, 6, seed=1).double(), normal(4, seed=2).double()
    logits = h @ w.T + b
    labels = torch.arange(9) % 4 if given_labels else logits.argmax(1)
    found = last_layer_gradients(h, logits, labels if given_labels else None, w, kind)
    torch.testing.assert_close(found, naive.last_layer_gradients(h, w, b, labels, kind), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": normal(8, 4)}, "logits hold 8 rows and features 9"),
        ({"labels": torch.full((9,), 4)}, "labels go from 4 to 4 and the last layer has 4 classes"),
        ({"labels": torch.full((9,), 0.5)}, "no integers"),
        ({"labels": torch.zeros(8)}, "labels have shape"),
        ({"weight": None}, "needs the weight"),
        ({"weight": normal(3, 6)}, "weight has 3 rows and logits are 4 wide"),
        ({"weight": normal(4, 5)}, "weight is 5 wide; expected 6"),
        ({"kind": "bn_bias"}, "no closed form"),
    ],
)
def test_gradients_of_what_does_not_fit(change, message):
    given = {
        "features": normal(9, 6),
        "logits": normal(9, 4),
        "labels": None,
        "weight": normal(4, 6),
        "kind": "feature",
    }
    with pytest.raises(DataError, match=message):
        last_layer_gradients(**{**given, **change})


# Filters.


@pytest.mark.parametrize("name", FILTERS)
def test_every_filter_gives_scores_and_indices(name):
    features, labels, rows, is_ood = clouds()
    weight, bias = fit_classifier(features, labels, 3)
    medix = MedixFilter(MedixConfig(filter=name, prevalence=0.3)).reference(features, labels, weight, bias)
    scores = medix.score(rows)
    assert scores.shape == (300,)
    assert scores.isfinite().all()
    chosen = medix.select(rows)
    assert chosen.dtype == torch.long
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert len(chosen) == 300 if name == "all" else 1 <= len(chosen) <= 90
    assert medix.weights_.sum() == pytest.approx(1)
    assert medix.weights_[chosen].min() >= medix.weights_.max() - 1e-6
    again = MedixFilter(MedixConfig(filter=name, prevalence=0.3)).reference(features.numpy(), labels.numpy())
    assert again.select(rows.double().numpy()).shape[0] >= 1


@pytest.mark.parametrize("name", FILTERS)
def test_a_seed_fixes_everything_and_the_global_generator_stays(name):
    features, labels, rows, _ = clouds()
    state = torch.random.get_rng_state()
    chosen = [MedixFilter(MedixConfig(filter=name, seed=4)).reference(features, labels).select(rows) for _ in "ab"]
    assert torch.equal(*chosen)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3, 0.5, 0.7])
def test_the_default_finds_separated_rows_without_their_number(share):
    features, labels, rows, is_ood = clouds(share, n=900, wild=600)
    medix = MedixFilter().reference(features, labels)
    chosen = medix.select(rows)
    recall = is_ood[chosen].sum() / is_ood.sum()
    assert recall > 0.85, (recall, medix.prevalence_)
    assert medix.prevalence_ == pytest.approx(share, abs=0.1)
    assert len(chosen) == round(medix.prevalence_ * 600)


def test_the_default_finds_rows_between_the_classes():
    # No direction leads to them: a linear head scores them as the others, squares find them.
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[4.0, 0, 0, 0], [-4, 0, 0, 0], [0, 4, 0, 0], [0, -4, 0, 0]])
    labels = torch.arange(1200) % 4
    features = centres[labels] + torch.randn(1200, 4, generator=generator)
    rows = torch.cat([features[800:], 0.7 * torch.randn(200, 4, generator=generator)])
    scores = MedixFilter().reference(features[:800], labels[:800]).score(rows)
    assert (scores.topk(200).indices >= 400).float().mean() > 0.8


def test_a_given_prevalence_is_the_count():
    features, labels, rows, _ = clouds()
    for name in ("two_pass", "knn", "sal", "grad_dist", "random"):
        medix = MedixFilter(MedixConfig(filter=name, prevalence=0.17)).reference(features, labels)
        assert len(medix.select(rows)) == 51
        assert medix.prevalence_ == 0.17
    paper = MedixFilter(MedixConfig(mode="paper", prevalence=0.17, epsilon=1e9)).reference(features, labels)
    assert len(paper.select(rows)) == 51
    assert paper.prevalence_ == pytest.approx(0.17)


def test_paper_mode_takes_what_the_loop_takes():
    features, labels, rows, _ = clouds()
    config = MedixConfig(mode="paper", rows_per_round=20, epsilon=0.0, max_rounds=4)
    assert config.filter == "medix"
    weight, bias = fit_classifier(features, labels, 3)
    medix = MedixFilter(config).reference(features, labels, weight, bias)
    g = last_layer_gradients(rows, rows @ weight.T + bias, None, weight)
    r = last_layer_gradients(features, features @ weight.T + bias, labels, weight).mean(0)
    expected, _ = greedy_median_filter(g, r, 20, 0.0, 4, paper=True)
    assert medix.select(rows).tolist() == sorted(expected.tolist())
    assert medix.prevalence_ == pytest.approx(80 / 300)
    torch.testing.assert_close(medix.score(rows), median_shift_scores(g, r))


def test_gradient_filters_are_their_formulas():
    features, labels, rows, _ = clouds()
    weight, bias = fit_classifier(features, labels, 3)
    for kind in ("feature", "weight"):
        g = last_layer_gradients(rows, rows @ weight.T + bias, None, weight, kind)
        r = last_layer_gradients(features, features @ weight.T + bias, labels, weight, kind).mean(0)
        config = MedixConfig(filter="grad_dist", gradient=kind)
        torch.testing.assert_close(
            MedixFilter(config).reference(features, labels, weight, bias).score(rows), (g - r).norm(dim=1)
        )
        direction = torch.linalg.svd(g - r, full_matrices=False).Vh[0]
        config = MedixConfig(filter="sal", gradient=kind)
        torch.testing.assert_close(
            MedixFilter(config).reference(features, labels, weight, bias).score(rows),
            ((g - r) @ direction).square(),
            atol=1e-4,
            rtol=1e-3,
        )


def test_gradients_of_a_hook_take_the_place_of_the_closed_form():
    features, labels, rows, _ = clouds()
    given, wild = normal(400, 5), normal(300, 5, seed=1)
    config = MedixConfig(filter="medix", gradient="bn_bias", prevalence=0.1)
    medix = MedixFilter(config).reference(features, labels, gradients=given)
    torch.testing.assert_close(medix.score(rows, wild), median_shift_scores(wild, given.mean(0)))
    with pytest.raises(DataError, match="pass those of the wild rows"):
        medix.score(rows)
    with pytest.raises(DataError, match="gradients hold 299 rows and features 300"):
        medix.select(rows, wild[1:])
    with pytest.raises(DataError, match="gradients is 4 wide; expected 5"):
        medix.select(rows, wild[:, 1:])
    with pytest.raises(DataError, match="comes from a hook"):
        MedixFilter(config).reference(features, labels)
    with pytest.raises(DataError, match="gradients hold 399 rows and features 400"):
        MedixFilter(config).reference(features, labels, gradients=given[1:])


def test_degenerate_gradients_are_reported_once(caplog, monkeypatch):
    features, labels, rows, _ = clouds()
    monkeypatch.setattr(hf_ext.log, "_seen", set())
    given, wild = normal(400, 5), normal(300, 5, seed=1)
    medix = MedixFilter(MedixConfig(filter="medix", prevalence=0.1)).reference(features, labels, gradients=given)
    medix.score(rows, torch.zeros(300, 5))
    assert "degenerate gradients: the deltas of all 300 wild rows are 0 (100%" in caplog.text
    sparse = torch.where(torch.arange(5) < 3, 0.0, wild)
    medix.select(rows, sparse)
    assert "60% of the gradients' entries are exactly zero" in caplog.text
    caplog.clear()
    medix.select(rows, sparse)
    medix.select(rows, wild)
    assert not caplog.text


@pytest.mark.parametrize("name", ["medix", "sal", "grad_dist"])
def test_one_class_has_no_gradients(name):
    features, _, rows, _ = clouds()
    with pytest.raises(DataError, match="at least two classes"):
        MedixFilter(MedixConfig(filter=name)).reference(features, torch.zeros(400))
    with pytest.raises(DataError, match="at least two classes"):
        MedixFilter(MedixConfig(filter=name)).reference(features, torch.zeros(400), normal(1, 8))
    assert len(MedixFilter().reference(features, torch.zeros(400)).select(rows)) > 0


@pytest.mark.parametrize("name", FILTERS)
def test_bad_rows_are_named(name):
    features, labels, rows, _ = clouds()
    medix = MedixFilter(MedixConfig(filter=name))
    with pytest.raises(DataError, match="call `reference"):
        medix.score(rows)
    with pytest.raises(DataError, match="first in row 3"):
        medix.reference(torch.where(torch.arange(400)[:, None] == 3, float("nan"), features), labels)
    with pytest.raises(DataError, match="features holds 1 rows; expected at least 2"):
        medix.reference(features[:1], labels[:1])
    with pytest.raises(DataError, match="labels go from 0 to 2 and the last layer has 2 classes"):
        medix.reference(features, labels, normal(2, 8))
    with pytest.raises(DataError, match="weight is 7 wide; expected 8"):
        medix.reference(features, labels, normal(3, 7))
    with pytest.raises(DataError, match="labels have shape"):
        medix.reference(features, labels[:-1])
    medix.reference(features, labels)
    for bad, message in (
        (rows[:0], "features holds 0 rows; expected at least 2"),
        (rows[:1], "features holds 1 rows; expected at least 2"),
        (rows[:, :5], "features is 5 wide; expected 8"),
        (rows[0], "shape"),
        (rows.tolist()[0], "shape"),
        ("rows", "no table of numbers"),
        (torch.full((4, 8), float("inf")), "NaN or infinity in 4 of 4 rows"),
    ):
        with pytest.raises(DataError, match=message):
            medix.select(bad)


def test_a_bias_of_another_length_is_named():
    features, labels, _, _ = clouds()
    with pytest.raises(DataError, match=r"bias has shape \(2,\); expected \(3,\)"):
        MedixFilter(MedixConfig(filter="sal")).reference(features, labels, normal(3, 8), torch.zeros(2))


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("wild", [2, 3, 5, 12])
def test_very_few_wild_rows_work(name, wild):
    features, labels, rows, _ = clouds(n=30)
    chosen = MedixFilter(MedixConfig(filter=name)).reference(features, labels).select(rows[:wild])
    assert 1 <= len(chosen) <= wild


def test_more_columns_than_rows_and_constant_columns_work():
    generator = torch.Generator().manual_seed(0)
    features, rows = torch.randn(20, 3000, generator=generator), torch.randn(15, 3000, generator=generator)
    features[:, :5] = rows[:, :5] = 7.0
    rows[10:, 5:] += 2
    chosen = MedixFilter(MedixConfig(prevalence=1 / 3)).reference(features, torch.arange(20) % 2).select(rows)
    assert chosen.tolist() == [10, 11, 12, 13, 14]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mode", "fast"),
        ("filter", "best"),
        ("gradient", "input"),
        ("prevalence", 0.0),
        ("prevalence", 1.0),
        ("rows_per_round", 0),
        ("epsilon", -0.1),
        ("max_rounds", 0),
        ("neighbors", 0),
        ("max_wild_rows", 1),
        ("regularization", 0.0),
        ("seed", -1),
    ],
)
def test_a_setting_that_cannot_work_is_named(field, value):
    with pytest.raises(ConfigError, match=field):
        MedixConfig(**{field: value})


def test_settings_survive_json():
    for config in (
        MedixConfig(),
        MedixConfig(mode="paper", rows_per_round=3),
        MedixConfig(filter="knn", prevalence=0.2),
    ):
        assert MedixConfig.from_dict(config.to_dict()) == config


# The reservoir.


def test_a_short_stream_is_kept_whole():
    reservoir = Reservoir(10)
    for start in range(0, 9, 3):
        reservoir.add(torch.arange(start, start + 3.0)[:, None])
    assert reservoir.rows().flatten().tolist() == list(range(9))


@pytest.mark.parametrize("batches", [[1000], [1] * 200, [7, 50, 3, 140], [0, 100, 0, 100]])
def test_the_sample_has_the_right_size_and_no_row_twice(batches):
    reservoir = Reservoir(20, seed=1)
    seen = 0
    for size in batches:
        reservoir.add(torch.arange(seen, seen + float(size))[:, None])
        seen += size
        if seen:
            rows = reservoir.rows().flatten().tolist()
            assert len(rows) == len(set(rows)) == min(20, seen)
            assert max(rows) < seen
    assert reservoir.seen == seen


@pytest.mark.parametrize("size", [5, 30, 100])
def test_every_row_of_the_stream_is_as_likely(size):
    stream = torch.arange(100.0)[:, None]
    counts = torch.zeros(100)
    for seed in range(1000):
        reservoir = Reservoir(10, seed)
        for batch in stream.split(size):
            reservoir.add(batch)
        counts[reservoir.rows().flatten().long()] += 1
    # Binomial of mean 100 and deviation 9.5: four and a half of them, for a hundred rows.
    assert counts.sum() == 10_000
    assert (counts - 100).abs().max() < 43, counts


def test_the_reservoir_is_private_and_does_not_share_memory():
    state = torch.random.get_rng_state()
    batch = torch.zeros(5, 2)
    reservoir = Reservoir(5)
    reservoir.add(batch)
    batch += 1
    assert not reservoir.rows().any()
    reservoir.add(torch.ones(500, 2))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_bad_streams_are_named():
    with pytest.raises(DataError, match="max_rows=0"):
        Reservoir(0)
    reservoir = Reservoir(4)
    with pytest.raises(DataError, match="no rows"):
        reservoir.rows()
    reservoir.add(torch.zeros(3, 2))
    with pytest.raises(DataError, match="rows is 3 wide; expected 2"):
        reservoir.add(torch.zeros(3, 3))
    with pytest.raises(DataError, match="NaN"):
        reservoir.add(torch.full((3, 2), float("nan")))
    assert reservoir.seen == 3
