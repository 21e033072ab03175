"""What the specification of Medix says can be checked: the score, the loop, the gradients, the filters and their limits.

`test_medix.py` follows the code; this file follows section 7 of the specification, with planted sets of known answers.
"""

import math
import warnings

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
    knn_distances,
    last_layer_gradients,
    median_shift_scores,
)
from tests.reference import medix_naive as naive


GRADIENT_FILTERS = ("medix", "sal", "grad_dist")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def grid(m, d, seed=0):
    """`(m, d)` of normal quantiles, each column in an order of its own: medians are 0 up to the spacing."""
    column = torch.special.ndtri((torch.arange(m, dtype=torch.float64) + 0.5) / m)
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([column[torch.randperm(m, generator=generator)] for _ in range(d)], 1)


def planted(share=0.3, n=600, wild=400, seed=0):
    """Three classes along axes; OOD rows have all of them at once, which gives gradients of their own. They come last."""
    generator = torch.Generator().manual_seed(seed)
    centres = 5 * torch.eye(8)[:3]
    labels, count = torch.arange(n) % 3, round(share * wild)
    features = centres[labels] + torch.randn(n, 8, generator=generator)
    rows = centres[torch.arange(wild) % 3] + torch.randn(wild, 8, generator=generator)
    rows[wild - count :] = torch.randn(count, 8, generator=generator) + torch.tensor([1.0] * 3 + [0.0] * 4 + [9.0])
    return features, labels, rows, torch.arange(wild) >= wild - count


@pytest.fixture(scope="module")
def classifier():
    features, labels, _, _ = planted()
    return fit_classifier(features, labels, 3)


@pytest.fixture
def fresh_warnings(monkeypatch):
    """Warnings of this process forgotten, and sent to `warnings` whatever else listens to the logger."""
    monkeypatch.setattr(hf_ext.log, "_seen", set())
    monkeypatch.setattr(hf_ext.log, "_has_listener", lambda logger: False)


# The exact score.


@settings(max_examples=80, deadline=None)
@given(
    st.integers(2, 25).flatmap(
        lambda m: st.lists(
            st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.0, 0.25, 1.0, 1e6]), min_size=4, max_size=4),
            min_size=m,
            max_size=m,
        )
    ),
    st.lists(st.floats(-3, 3), min_size=4, max_size=4),
)
def test_leave_one_out_with_ties_and_duplicates(rows, reference):
    found = median_shift_scores(torch.tensor(rows, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64))
    assert found.tolist() == pytest.approx(naive.deltas(rows, reference), abs=1e-9, rel=1e-9)


@pytest.mark.parametrize("m", [2, 3, 40, 41])
def test_duplicated_rows_score_alike(m):
    g = normal(m, 5)
    twice = torch.cat([g, g])
    scores = median_shift_scores(twice, torch.ones(5))
    assert torch.equal(scores[:m], scores[m:])
    assert scores.tolist() == pytest.approx(naive.deltas(twice.tolist(), [1.0] * 5), abs=1e-12)


@pytest.mark.parametrize("m", [0, 1])
def test_the_median_of_no_rows_is_refused(m):
    for call in (
        lambda: median_shift_scores(torch.zeros(m, 3), torch.zeros(3)),
        lambda: greedy_median_filter(torch.zeros(m, 3), torch.zeros(3), 1, 0.0, 1),
    ):
        with pytest.raises(DataError, match=f"gradients holds {m} rows; expected at least 2"):
            call()


@pytest.mark.parametrize("m", [200, 201])
def test_a_score_is_a_function_of_the_signs(m):
    g = normal(m, 3)
    scores = median_shift_scores(g, torch.ones(3))
    middle = g.sort(0).values[(m - 2) // 2]
    signs = ((g > middle).long() * torch.tensor([1, 2, 4])).sum(1)
    for pattern in range(8):
        assert scores[signs == pattern].unique().numel() <= 1
    assert 2 <= scores.unique().numel() <= 8


def test_the_distance_is_that_of_torchs_lower_median():
    """Deltas and the distance add up to the distances of what is left: a check without the naive oracle."""
    for m in (30, 31):
        g, r = normal(m, 4), normal(4, seed=1)
        whole = (g.median(0).values - r).norm()
        left = torch.stack([(torch.cat([g[:i], g[i + 1 :]]).median(0).values - r).norm() for i in range(m)])
        torch.testing.assert_close(whole - median_shift_scores(g, r), left, atol=1e-12, rtol=0)


@pytest.mark.parametrize("m", [6, 7])
def test_middle_values_that_coincide_make_every_delta_zero(m):
    g = torch.zeros(m, 3)
    g[0], g[-1] = -5.0, 5.0
    scores = median_shift_scores(g, torch.ones(3))
    assert torch.equal(scores, torch.zeros(m, dtype=torch.float64))


def test_permutation_offset_and_columns():
    g, r = normal(61, 6), normal(6, seed=1)
    scores = median_shift_scores(g, r)
    rows, columns = torch.randperm(61), torch.randperm(6)
    assert torch.equal(median_shift_scores(g[rows], r), scores[rows])
    torch.testing.assert_close(median_shift_scores(g[:, columns], r[columns]), scores, atol=1e-12, rtol=0)
    shift = 10 * normal(6, seed=2)
    torch.testing.assert_close(median_shift_scores(g + shift, r + shift), scores, atol=1e-12, rtol=0)
    torch.testing.assert_close(median_shift_scores(7 * g, 7 * r), 7 * scores, atol=1e-11, rtol=0)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.49])
@pytest.mark.parametrize("m", [400, 401])
def test_separated_rows_come_first_below_one_half(share, m):
    count = round(share * m)
    g = torch.cat([grid(m - count, 30), 50 + grid(count, 30)])
    scores = median_shift_scores(g, torch.zeros(30))
    assert scores[-count:].min() > scores[:-count].max()
    taken, _ = greedy_median_filter(g, torch.zeros(30), count, 1e9, 5)
    assert sorted(taken.tolist()) == list(range(m - count, m))


def test_above_one_half_every_inside_row_is_still_last():
    """The specification says the order may turn around; for a shift in every coordinate it does not."""
    g = torch.cat([grid(160, 30), 50 + grid(240, 30)])
    scores = median_shift_scores(g, torch.zeros(30))
    assert scores[160:].min() > scores[:160].max()


def test_a_shift_opposite_to_the_sampling_error_is_missed():
    """Where the median is short of the reference, OOD rows beyond it bring it nearer, and removing them does not help."""
    g = torch.cat([grid(360, 30) - 1.0, 50 + grid(40, 30)])
    scores = median_shift_scores(g, torch.zeros(30))
    assert scores[360:].max() < scores[:360].median()


def test_the_distance_grows_with_every_share():
    inside = grid(1000, 10)
    found = []
    for count in range(0, 500, 25):
        rows = torch.cat([inside[count:], 4 + grid(1000, 10, seed=1)[:count]])
        found.append(naive.distance(rows.tolist(), [0.0] * 10))
    assert found == sorted(found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.int64])
def test_types_of_numbers(dtype):
    g, r = (4 * normal(50, 4)).to(dtype), (2 * normal(4, seed=1)).to(dtype)
    expected = naive.deltas(g.double().tolist(), r.double().tolist())
    for rows, reference in ((g, r), (g.numpy(), r.numpy()), (g.tolist(), r.tolist())):
        assert median_shift_scores(rows, reference).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("g", "r", "message"),
    [
        (
            torch.full((4, 3), math.nan),
            torch.zeros(3),
            "gradients holds NaN or infinity in 4 of 4 rows, first in row 0",
        ),
        (torch.tensor([[0.0], [math.inf]]), torch.zeros(1), "1 of 2 rows, first in row 1"),
        (torch.zeros(4, 3), torch.zeros(2), r"reference has shape \(2,\); expected \(3,\)"),
        (torch.zeros(4, 3), torch.full((3,), math.nan), "reference .* finite"),
        (torch.zeros(4, 0), torch.zeros(0), "gradients is 0 wide"),
        (torch.zeros(4), torch.zeros(4), "gradients has shape"),
        (torch.zeros(4, 3, dtype=torch.complex64), torch.zeros(3), "real numbers"),
        ([["a"]], torch.zeros(1), "gradients is a list that is no table of numbers"),
        (torch.zeros(4, 3), "none", "reference"),
    ],
)
def test_what_is_no_gradient_is_named(g, r, message):
    with pytest.raises(DataError, match=message):
        median_shift_scores(g, r)


# The greedy loop.


@pytest.mark.parametrize("epsilon", [0.0, 0.02, 0.1, 0.5, 1e9])
@pytest.mark.parametrize("k", [1, 4, 7, 20, 59, 60, 61])
@pytest.mark.parametrize("paper", [True, False])
def test_the_loop_and_its_stop(epsilon, k, paper):
    g, r = normal(60, 4, seed=5), 1 + normal(4, seed=1)
    run = naive.greedy if paper else naive.greedy_default
    taken, rounds = run(g.tolist(), r.tolist(), k, epsilon, 9)
    found, count = greedy_median_filter(g, r, k, epsilon, 9, paper=paper)
    assert (found.tolist(), count) == (taken, rounds)
    assert len(found) == min(60, k * rounds)


@pytest.mark.parametrize("paper", [True, False])
@pytest.mark.parametrize("k", [1, 5, 10, 19])
def test_an_endless_epsilon_is_one_round_whatever_is_left(paper, k):
    found, rounds = greedy_median_filter(normal(20, 4), torch.ones(4), k, 1e9, 20, paper)
    assert (len(found), rounds) == (k, 1)


def test_the_paper_removes_before_it_tests():
    """With the first distance below epsilon the papers' loop still takes k rows, and so does the default's."""
    g = grid(100, 4)
    for paper in (True, False):
        found, rounds = greedy_median_filter(g, torch.full((4,), 1e-3), 9, 1e6, 20, paper)
        assert (len(found), rounds) == (9, 1)
    # One round more: what the default's test finds before a removal the paper's finds after it.
    g, r = torch.cat([grid(70, 6), 50 + grid(30, 6)]), torch.zeros(6)
    default = greedy_median_filter(g, r, 10, 0.2, 20)[1]
    distance = naive.distance(g.tolist(), r.tolist())
    assert greedy_median_filter(g, r, 10, 0.2 * distance, 20, paper=True)[1] == default + 1


def test_ties_go_in_the_order_of_rows():
    found, rounds = greedy_median_filter(torch.zeros(9, 2), torch.ones(2), 4, 1e9, 1)
    assert (found.tolist(), rounds) == ([0, 1, 2, 3], 1)


# Gradients.


@pytest.mark.parametrize("kind", ["feature", "weight"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_closed_form_is_autograd_for_every_row(kind, dtype):
    h, w, b = normal(12, 5).to(dtype), normal(3, 5, seed=1).to(dtype), normal(3, seed=2).to(dtype)
    exact = dtype if dtype == torch.float64 else torch.float32
    z = h.to(exact) @ w.to(exact).T + b.to(exact)
    for labels in (None, torch.arange(12) % 3):
        own = z.argmax(1) if labels is None else labels
        expected = naive.last_layer_gradients(h.double(), w.double(), b.double(), own, kind)
        found = last_layer_gradients(h, z, labels, w, kind)
        assert found.dtype == exact
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)


def test_a_weight_gradient_is_laid_out_as_the_weight():
    layer = torch.nn.Linear(5, 3).double()
    h = normal(1, 5)
    torch.nn.functional.cross_entropy(layer(h), torch.tensor([1])).backward()
    found = last_layer_gradients(h, layer(h), torch.tensor([1]), kind="weight")
    torch.testing.assert_close(found.view(3, 5), layer.weight.grad)


def test_very_sure_logits_have_no_gradient_and_no_nan():
    found = last_layer_gradients(torch.ones(2, 3), torch.tensor([[1e4, -1e4], [0.0, 1e4]]), None, torch.ones(2, 3))
    assert torch.equal(found, torch.zeros(2, 3))


@pytest.mark.parametrize("labels", [["a", "b"], [0, 5], [0, -1], [0.5, 0.0], [math.nan, 0.0], [0], [[0], [1]]])
def test_labels_that_are_no_classes(labels):
    with pytest.raises(DataError, match="labels"):
        last_layer_gradients(torch.ones(2, 3), torch.zeros(2, 2), labels, torch.ones(2, 3))


@pytest.mark.parametrize("labels", [["a"] * 600, [math.nan] * 600, [0.0] * 599 + [math.inf]])
def test_labels_without_a_last_layer_must_be_numbers(labels):
    features, _, _, _ = planted()
    with pytest.raises(DataError, match="labels"):
        MedixFilter().reference(features, labels)


# Filters on planted clouds.


@pytest.mark.parametrize(
    ("name", "least"), [("two_pass", 0.95), ("knn", 0.95), ("sal", 0.6), ("grad_dist", 0.6), ("all", 1.0)]
)
@pytest.mark.parametrize("share", [0.1, 0.3])
def test_filters_find_planted_rows(name, least, share, classifier):
    features, labels, rows, is_ood = planted(share)
    config = MedixConfig(filter=name, prevalence=share)
    medix = MedixFilter(config).reference(features, labels, *classifier)
    chosen = medix.select(rows)
    assert len(chosen) == (400 if name == "all" else round(share * 400))
    assert is_ood[chosen].sum() / is_ood.sum() >= least
    scores = medix.score(rows)
    assert name == "all" or naive.auroc(scores[~is_ood].tolist()[:80], scores[is_ood].tolist()[:80]) > least


def test_the_random_filter_is_random(classifier):
    features, labels, rows, is_ood = planted()
    shares = []
    for seed in range(40):
        config = MedixConfig(filter="random", prevalence=0.3, seed=seed)
        chosen = MedixFilter(config).reference(features, labels, *classifier).select(rows)
        assert len(chosen) == 120
        shares.append(float(is_ood[chosen].float().mean()))
    assert np.mean(shares) == pytest.approx(0.3, abs=0.03)
    assert len(set(shares)) > 3


@pytest.mark.parametrize("name", ["medix", "sal", "grad_dist", "knn"])
def test_scores_follow_their_rows(name, classifier):
    features, labels, rows, _ = planted()
    medix = MedixFilter(MedixConfig(filter=name)).reference(features, labels, *classifier)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(medix.score(rows[order]), medix.score(rows)[order], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["two_pass", "sal", "random"])
def test_seeds_and_the_global_generator(name):
    features, labels, rows, _ = planted()
    rows = rows + 3 * normal(400, 8, seed=7).float()

    def scores(seed):
        return MedixFilter(MedixConfig(filter=name, seed=seed)).reference(features, labels).score(rows)

    first, state = scores(3), torch.get_rng_state()
    torch.rand(13)
    np.random.rand(3)
    after = torch.get_rng_state()
    assert torch.equal(scores(3), first)
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.equal(state, after)
    assert name == "sal" or not torch.equal(scores(4), first)


@pytest.mark.parametrize("name", ["two_pass", "knn", "medix", "sal", "grad_dist"])
def test_kinds_of_arrays_make_no_difference(name, classifier):
    features, labels, rows, _ = planted(n=200, wild=100)
    features, rows = features.half(), rows.half()
    found = []
    for cast in (lambda x: x, lambda x: x.float().numpy(), lambda x: x.numpy(), lambda x: x.double().numpy()):
        medix = MedixFilter(MedixConfig(filter=name, prevalence=0.3))
        found.append(medix.reference(cast(features), labels.numpy(), *classifier).select(cast(rows)))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    # float64 rounds otherwise, which may swap rows at the edge.
    assert len(set(found[0].tolist()) & set(found[3].tolist())) >= len(found[0]) - 1


def test_inputs_are_left_alone_and_need_no_gradient(classifier):
    features, labels, rows, _ = planted()
    before = features.clone(), labels.clone(), rows.clone()
    rows.requires_grad_()
    for name in ("two_pass", "knn", "medix", "sal", "grad_dist"):
        scores = MedixFilter(MedixConfig(filter=name)).reference(features, labels, *classifier).score(rows)
        assert not scores.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, (features, labels, rows.detach())))


def test_knn_is_the_distance_between_unit_rows():
    rows, references = normal(20, 5), normal(60, 5, seed=1)
    for neighbors in (1, 10, 60, 999):
        expected = []
        for row in rows.numpy():
            unit = references.numpy() / np.linalg.norm(references.numpy(), axis=1, keepdims=True)
            distances = np.sort(np.linalg.norm(unit - row / np.linalg.norm(row), axis=1))
            expected.append(distances[min(neighbors, 60) - 1])
        assert knn_distances(rows, references, neighbors).tolist() == pytest.approx(expected, abs=1e-7)


def test_weights_are_half_on_the_chosen(classifier):
    features, labels, rows, _ = planted()
    medix = MedixFilter(MedixConfig(prevalence=0.25)).reference(features, labels)
    chosen = medix.select(rows)
    expected = torch.full((400,), 0.5 / 400)
    expected[chosen] += 0.5 / 100
    torch.testing.assert_close(medix.weights_, expected)


def test_no_ood_rows_at_all_are_few():
    """The estimate is too high where there is nothing to find, and the more so the fewer rows there are."""
    shares = []
    for seed in range(6):
        features, labels, rows, _ = planted(0.0, 1500, 1000, seed)
        medix = MedixFilter().reference(features, labels)
        assert len(medix.select(rows)) == max(1, round(medix.prevalence_ * 1000))
        shares.append(medix.prevalence_)
    assert np.mean(shares) < 0.13
    assert max(shares) < 0.25


def test_the_default_loop_never_takes_more_than_the_count(classifier):
    features, labels, rows, _ = planted()
    for k in (None, 1, 50, 1000):
        config = MedixConfig(filter="medix", prevalence=0.2, rows_per_round=k, epsilon=0.0, max_rounds=100)
        chosen = MedixFilter(config).reference(features, labels, *classifier).select(rows)
        assert len(chosen) == 80


def test_the_paper_mode_is_the_naive_loop_on_naive_gradients():
    features, labels, rows, _ = planted(n=60, wild=50)
    w, b = (part.double() for part in fit_classifier(features, labels, 3))
    features, rows = features.double(), rows.double()
    reference = naive.last_layer_gradients(features, w, b, labels, "feature").mean(0)
    g = naive.last_layer_gradients(rows, w, b, (rows @ w.T + b).argmax(1), "feature")
    for epsilon, k in ((0.0, 6), (1e-3, 6), (5.0, 6), (0.0, 49), (0.0, 50)):
        config = MedixConfig(mode="paper", rows_per_round=k, epsilon=epsilon, max_rounds=5)
        medix = MedixFilter(config).reference(features, labels, w, b)
        taken, _ = naive.greedy(g.tolist(), reference.tolist(), k, epsilon, 5)
        assert medix.select(rows).tolist() == sorted(taken)
        assert medix.prevalence_ == len(taken) / 50


def test_tied_gradients_warn_once_and_take_rows_in_their_order(fresh_warnings):
    features, labels, rows, _ = planted()
    config = MedixConfig(filter="medix", gradient="bn_bias", prevalence=0.1, rows_per_round=40)
    medix = MedixFilter(config).reference(features, labels, gradients=normal(600, 4))
    with pytest.warns(UserWarning, match="degenerate gradients.*400 wild rows.*use gradient='feature'"):
        scores = medix.score(rows, torch.zeros(400, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = medix.select(rows, torch.zeros(400, 4))
    assert not scores.any()
    assert chosen.tolist() == list(range(40))


def test_mostly_zero_gradients_warn_and_others_do_not(fresh_warnings):
    features, labels, rows, _ = planted()
    config = MedixConfig(filter="medix", gradient="bn_bias", prevalence=0.1)
    medix = MedixFilter(config).reference(features, labels, gradients=normal(600, 5))
    g = normal(400, 5, seed=1)
    g[:, :3] = 0
    with pytest.warns(UserWarning, match="60% of the gradients' entries are exactly zero"):
        medix.score(rows, g)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        medix.score(rows, normal(400, 5, seed=1))


@pytest.mark.parametrize("name", GRADIENT_FILTERS)
@pytest.mark.parametrize("weight", [None, torch.ones(1, 8)])
def test_one_class_is_refused_with_the_way_out(name, weight):
    features, _, _, _ = planted()
    with pytest.raises(DataError, match=f"'{name}'.*at least two classes.*there is 1.*use filter='two_pass' or 'knn'"):
        MedixFilter(MedixConfig(filter=name)).reference(features, torch.zeros(600, dtype=torch.long), weight)


@pytest.mark.parametrize("name", ["two_pass", "knn", *GRADIENT_FILTERS])
def test_bad_wild_rows_name_value_and_fix(name, classifier):
    features, labels, rows, _ = planted()
    medix = MedixFilter(MedixConfig(filter=name)).reference(features, labels, *classifier)
    bad = rows.clone()
    bad[7, 2], bad[9, 0] = math.inf, math.nan
    cases = [
        (bad, "NaN or infinity in 2 of 400 rows, first in row 7; drop these rows"),
        (rows[:0], "holds 0 rows; expected at least 2"),
        (rows[:, :7], "features is 7 wide; expected 8"),
    ]
    for values, message in cases:
        for method in (medix.score, medix.select):
            with pytest.raises(DataError, match=message):
                method(values)
    with pytest.raises(DataError, match=r"labels go from 0 to 2 and the last layer has 2 classes; expected 0 to 1"):
        medix.reference(features, labels, torch.ones(2, 8))


def test_bad_given_gradients():
    features, labels, rows, _ = planted()
    medix = MedixFilter(MedixConfig(filter="sal"))
    with pytest.raises(DataError, match="gradients holds NaN"):
        medix.reference(features, labels, gradients=torch.full((600, 2), math.nan))
    medix.reference(features, labels, gradients=normal(600, 2))
    with pytest.raises(DataError, match="gradients holds NaN"):
        medix.score(rows, torch.full((400, 2), math.nan))


def test_a_failed_reference_does_not_answer_with_half_of_it(classifier):
    features, labels, rows, _ = planted()
    medix = MedixFilter(MedixConfig(filter="grad_dist")).reference(features, labels, *classifier)
    with pytest.raises(DataError, match="bias"):
        medix.reference(features[:, :4], labels, torch.ones(3, 4), torch.zeros(2))
    with pytest.raises(DataError):
        medix.score(rows[:, :4])


# Settings.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prevalence": 0}, r"MedixConfig.prevalence=0 must be between 0 and 1, or None"),
        ({"prevalence": 1.5}, r"prevalence=1.5"),
        ({"prevalence": math.nan}, "prevalence=nan must be a finite number"),
        ({"prevalence": "much"}, "prevalence='much'"),
        ({"epsilon": -1e-9}, "epsilon=-1e-09 must not be negative"),
        ({"epsilon": math.inf}, "epsilon=inf must be a finite number"),
        ({"rows_per_round": 0}, "rows_per_round=0 must be at least 1"),
        ({"rows_per_round": 2.5}, "rows_per_round=2.5"),
        ({"max_rounds": 0}, "max_rounds=0"),
        ({"neighbors": 0}, "neighbors=0"),
        ({"neighbors": True}, "neighbors=True"),
        ({"max_wild_rows": 1}, "max_wild_rows=1 must be at least 2"),
        ({"regularization": -1.0}, "regularization=-1.0 must be above 0"),
        ({"seed": 2**63}, "seed="),
        ({"filter": "median"}, "filter='median' must be one of 'two_pass'"),
        ({"gradient": None}, "gradient=None"),
        ({"mode": "Paper"}, "mode='Paper' must be one of"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        MedixConfig(**settings)


def test_the_paper_mode_replaces_only_the_filter_it_does_not_know():
    assert MedixConfig(mode="paper").filter == "medix"
    assert MedixConfig(mode="paper", filter="knn").filter == "knn"
    assert MedixConfig().filter == "two_pass"


def test_settings_survive_a_file(tmp_path):
    for config in (
        MedixConfig(),
        MedixConfig(mode="paper", epsilon=5e-4, rows_per_round=20_000, max_rounds=100),
        MedixConfig(filter="sal", gradient="weight", prevalence=0.02, regularization=3.0, seed=9),
    ):
        config.save_pretrained(tmp_path)
        assert MedixConfig.from_pretrained(tmp_path) == config
    with pytest.raises(ConfigError, match=r"'prevalance' \(did you mean 'prevalence'\?\)"):
        MedixConfig.from_dict({"prevalance": 0.1}, strict=True)


# The reservoir.


def test_the_sample_does_not_depend_on_how_the_stream_is_cut():
    stream = torch.arange(500.0)[:, None]
    samples = []
    for size in (1, 13, 40, 500):
        reservoir = Reservoir(40, seed=6)
        for batch in stream.split(size):
            reservoir.add(batch)
        samples.append(sorted(reservoir.rows().flatten().tolist()))
    assert samples[0] == samples[1] == samples[2] == samples[3]


def test_early_and_late_rows_are_as_likely():
    counts = np.zeros(60)
    for seed in range(3000):
        reservoir = Reservoir(6, seed)
        reservoir.add(torch.arange(25.0)[:, None])
        reservoir.add(torch.arange(25.0, 60.0)[:, None])
        counts[reservoir.rows().flatten().long().numpy()] += 1
    # Mean 300: chi squared with 59 degrees of freedom, a little less as each sample holds six rows; .999 quantile 99.
    assert ((counts - 300) ** 2 / 300).sum() < 99


def test_rows_of_the_sample_are_rows_of_the_stream():
    stream = normal(300, 4, dtype=torch.float32)
    reservoir = Reservoir(20, seed=1)
    for batch in stream.split(70):
        reservoir.add(batch.numpy())
    found = {tuple(row) for row in reservoir.rows().tolist()}
    assert len(found) == 20
    assert found <= {tuple(row) for row in stream.tolist()}
    assert reservoir.seen == 300
