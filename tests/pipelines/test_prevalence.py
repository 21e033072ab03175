"""The estimate of the share of OOD rows: near the truth where scores separate, below it where they do not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ext.errors import DataError
from hf_ext.pipelines.prevalence import estimate_prevalence
from tests.reference import medix_naive as naive


def mixture(share, shift, seed, inside=2000, wild=2000):
    generator = torch.Generator().manual_seed(seed)
    count = round(share * wild)
    scores = torch.randn(inside + wild, generator=generator)
    scores[len(scores) - count :] += shift
    return scores[:inside], scores[inside:]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.3, 0.5, 0.7])
def test_separated_scores_give_the_share(share):
    errors = [estimate_prevalence(*mixture(share, 6, seed)) - share for seed in range(10)]
    assert sum(errors) / 10 == pytest.approx(0.01, abs=0.02)
    assert max(map(abs, errors)) < 0.1, errors


@pytest.mark.parametrize("size", [50, 300])
def test_small_sets_stay_near(size):
    errors = [estimate_prevalence(*mixture(0.3, 6, seed, 4 * size, size)) - 0.3 for seed in range(20)]
    assert abs(sum(errors) / 20) < 0.1, errors
    assert max(map(abs, errors)) < 0.3, errors


def test_overlap_lowers_the_estimate():
    far = sum(estimate_prevalence(*mixture(0.5, 5, seed)) for seed in range(5)) / 5
    near = sum(estimate_prevalence(*mixture(0.5, 1, seed)) for seed in range(5)) / 5
    assert near < far - 0.05


def test_wild_rows_without_ood_rows_give_little():
    found = [estimate_prevalence(*mixture(0.0, 0, seed)) for seed in range(10)]
    assert 0 <= min(found)
    assert sum(found) / 10 < 0.05


def test_only_ood_rows_give_one():
    inside, wild = mixture(1.0, 50, 0)
    assert estimate_prevalence(inside, wild) == 1.0


def test_only_the_order_of_scores_counts():
    inside, wild = mixture(0.3, 2, 0)
    assert estimate_prevalence(inside, wild) == estimate_prevalence(inside.exp(), wild.exp())


def test_scores_of_any_kind_are_taken():
    inside, wild = mixture(0.3, 3, 0)
    expected = estimate_prevalence(inside, wild)
    assert estimate_prevalence(inside.numpy(), wild.tolist()) == expected


def test_constant_scores_give_nothing():
    assert estimate_prevalence(torch.zeros(10), torch.zeros(20)) == 0.0


@pytest.mark.parametrize(
    ("inside", "wild", "message"),
    [
        ([], [1.0], "in_scores holds 0"),
        ([1.0], [], "wild_scores holds 0"),
        ([1.0, float("nan")], [1.0], "in_scores"),
        ([1.0], [float("inf")], "wild_scores"),
    ],
)
def test_bad_scores_are_named(inside, wild, message):
    with pytest.raises(DataError, match=message):
        estimate_prevalence(inside, wild)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -1.0])
def test_confidence_is_a_chance(confidence):
    with pytest.raises(DataError, match="confidence"):
        estimate_prevalence([0.0], [1.0], confidence)


# Against the formula of the specification, written as a loop.


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-5, 5), min_size=1, max_size=25),
    st.lists(st.integers(-5, 5), min_size=1, max_size=25),
    st.sampled_from([0.01, 0.1, 0.5]),
)
def test_the_estimate_is_the_best_cut_of_a_loop(inside, wild, confidence):
    found = estimate_prevalence(inside, wild, confidence)
    assert 0 <= found <= 1
    assert found == pytest.approx(naive.prevalence(inside, wild, confidence), abs=1e-12)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("shift", [3, 5, 20])
def test_mixtures_are_met_on_average(share, shift):
    errors = [estimate_prevalence(*mixture(share, shift, seed)) - share for seed in range(8)]
    assert -0.03 < sum(errors) / 8 < 0.035
    assert max(map(abs, errors)) < 0.1


def test_ood_rows_that_score_below_are_not_seen():
    """Scores with the wrong sign: the lower side is the one thought to be pure."""
    inside, wild = mixture(0.4, -8, 0)
    assert estimate_prevalence(inside, wild) < 0.05
    assert estimate_prevalence(-inside, -wild) == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64])
def test_types_of_scores_make_no_difference(dtype):
    inside, wild = ((8 * part).to(dtype) for part in mixture(0.3, 3, 0))
    expected = estimate_prevalence(inside.double(), wild.double())
    for cast in (lambda x: x, lambda x: x.numpy(), lambda x: x.tolist(), lambda x: x[:, None]):
        assert estimate_prevalence(cast(inside), cast(wild)) == expected


def test_the_order_of_rows_and_the_global_generator_do_not_matter():
    inside, wild = mixture(0.3, 2, 0)
    state = torch.get_rng_state()
    expected = estimate_prevalence(inside, wild)
    assert estimate_prevalence(inside.flip(0), wild.flip(0)) == expected
    assert torch.equal(torch.get_rng_state(), state)


def test_one_score_on_each_side():
    assert estimate_prevalence([0.0], [1.0]) == 1.0
    assert estimate_prevalence([1.0], [0.0]) == 0.0


@pytest.mark.parametrize("seed", range(6))
def test_many_scores_have_the_cut_of_the_loop(seed):
    inside, wild = mixture(0.3, 2, seed, 200, 150)
    for confidence in (0.001, 0.1, 0.9):
        expected = naive.prevalence(inside.tolist(), wild.tolist(), confidence)
        assert estimate_prevalence(inside, wild, confidence) == pytest.approx(expected, abs=1e-12)
