"""From a delta to terms: exact at full budget, never over it, and what is measured is what the file decodes to."""

import math

import numpy as np
import pytest
import torch

from hf_ext.merging import osd
from hf_ext.merging.blob import Delta, SignTerm, decode, encode, seeded_places, term_size
from hf_ext.merging.codes import VALUE_BITS
from hf_ext.merging.fit import MAX_SIGN_TERMS, Spectrum, fit_factors, fit_signs, fit_sparse, squared_error


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _delta(n=60, d=44, noise=0.02, seed=0):
    """A few strong directions in noise."""
    return 0.1 * _random(n, 5, seed=seed) @ _random(5, d, seed=seed + 1) / 5 + noise * _random(n, d, seed=seed + 2)


def _spectrum(delta, k=99):
    return Spectrum(*osd.truncated_svd(delta, k, exact=True))


def _sparse(delta, nbytes, values="int4", relaxations=None, score="magnitude", gradient=None, **options):
    settings = {"joint": True, "refit_steps": 2} | options
    return fit_sparse(delta, _spectrum(delta), nbytes, values, relaxations, score, gradient, **settings)


def _error(delta, terms):
    """Of what a file of these terms decodes to."""
    stored = decode(encode({"w": Delta(tuple(delta.shape), tuple(terms))}))["w"]
    return float((delta - torch.from_numpy(stored.dense())).double().norm())


def _tail(delta, k):
    return float(torch.linalg.svdvals(delta.double())[k:].norm())


def test_squared_error_equals_the_formed_difference():
    delta, left, right = _random(30, 20), _random(30, 3, seed=1), _random(20, 3, seed=2)
    expected = float((delta - left @ right.T).double().pow(2).sum())
    assert squared_error(delta, left, right) == pytest.approx(expected, rel=1e-5)
    assert squared_error(left @ right.T, left, right) == pytest.approx(0, abs=1e-3)


# Dense factors


def test_full_rank_in_float32_is_exact():
    for shape in ((40, 30), (30, 40), (17, 1)):
        delta = _random(*shape)
        terms = fit_factors(delta, _spectrum(delta), [32] * min(shape), 0)
        assert _error(delta, terms) <= 1e-5 * float(delta.norm())
    low = _random(40, 4) @ _random(4, 30, seed=1)
    for rounds in (0, 3):
        assert _error(low, fit_factors(low, _spectrum(low), [32] * 4, rounds)) <= 1e-5 * float(low.norm())


def test_dense_float32_factors_have_the_error_of_the_truncated_decomposition():
    delta = _delta()
    for k in (1, 2, 5, 20):
        for rounds in (0, 2):
            found = _error(delta, fit_factors(delta, _spectrum(delta), [32] * k, rounds))
            assert found == pytest.approx(_tail(delta, k), rel=1e-4)


def test_columns_of_one_width_share_a_term():
    delta = _delta()
    terms = fit_factors(delta, _spectrum(delta), [4, 4, 3, 2, 2, 2, 1], 1)
    assert [(term.left.bits, term.right.bits, len(term.left.values)) for term in terms] == [
        (4, 4, 2),
        (3, 3, 1),
        (2, 2, 3),
        (1, 1, 1),
    ]
    left, right = Delta((60, 44), terms).factors()
    assert (left.shape, right.shape) == ((7, 60), (7, 44))
    measured = squared_error(delta, torch.from_numpy(left.T), torch.from_numpy(right.T)) ** 0.5
    assert _error(delta, terms) == pytest.approx(measured, rel=1e-3)


def test_more_bits_more_columns_and_more_rounds_do_not_hurt():
    delta = _delta()
    spectrum = _spectrum(delta)
    for rounds in (0, 2):
        by_bits = [_error(delta, fit_factors(delta, spectrum, [bits] * 5, rounds)) for bits in (1, 2, 3, 4, 8, 16, 32)]
        assert by_bits == sorted(by_bits, reverse=True)
        by_rank = [_error(delta, fit_factors(delta, spectrum, [4] * k, rounds)) for k in (1, 2, 3, 5, 8, 12)]
        assert by_rank == sorted(by_rank, reverse=True)
    for bits in ([1] * 4, [4, 3, 2], [2] * 8):
        by_rounds = [_error(delta, fit_factors(delta, spectrum, bits, rounds)) for rounds in range(5)]
        assert all(b <= a * (1 + 1e-6) for a, b in zip(by_rounds, by_rounds[1:])), by_rounds
        assert by_rounds[-1] < by_rounds[0]


# Sparse factors


def test_relaxation_zero_is_the_truncated_decomposition():
    """Dense, without index: in the paper's count exactly, else as soon as the budget holds it."""
    delta = _delta()
    n, d = delta.shape
    for r in (1, 3):
        terms = _sparse(delta, 4 * r * (n + d), "fp32", [0], refit_steps=0, flat_index=True)
        assert terms[0].left.mask is None
        assert terms[0].right.mask is None
        assert len(terms[0].left.values) == r
        assert _error(delta, terms) == pytest.approx(_tail(delta, r), rel=1e-5)
        terms = _sparse(delta, 4 * r * (n + d) + 32, "fp32", [0], refit_steps=0)
        assert _error(delta, terms) == pytest.approx(_tail(delta, r), rel=1e-5)


@pytest.mark.parametrize("values", sorted(VALUE_BITS))
@pytest.mark.parametrize("joint", [True, False], ids=["joint", "separate"])
def test_sparse_factors_fit_their_budget_and_use_it(values, joint):
    delta = _delta()
    for nbytes in (60, 150, 400, 999):
        terms = _sparse(delta, nbytes, values, joint=joint, refit_steps=1)
        if not terms:
            assert nbytes == 60, "nothing was kept"
            continue
        size = term_size(terms[0])
        assert size <= nbytes
        full = len(terms[0].left.values) * sum(delta.shape)
        kept = sum(int(s.values.size if s.mask is None else s.mask.sum()) for s in (terms[0].left, terms[0].right))
        # An entry more would not fit: the code of a mask may jump by a few bytes.
        assert size >= nbytes - 24 or kept == full
        assert _error(delta, terms) < float(delta.norm())


@pytest.mark.parametrize("score", osd.IMPORTANCE)
def test_every_score_fits_and_none_beats_the_bound(score):
    delta, gradient = _delta(), _random(60, 44, seed=9)
    gradient = gradient if score == "taylor1" else gradient**2
    for nbytes in (200, 600):
        terms = _sparse(delta, nbytes, score=score, gradient=gradient)
        assert term_size(terms[0]) <= nbytes
        assert _tail(delta, len(terms[0].left.values)) <= _error(delta, terms) < float(delta.norm())


def test_a_factor_of_which_next_to_nothing_survives_still_opens():
    """One row of the right factor holds all its weight: the survivors lie in the left one."""
    spike = 0.001 * _random(1000)
    spike[417] = 1.0
    delta = torch.outer(torch.ones(1000) + 0.3 * _random(1000, seed=1), spike)
    for matrix in (delta, delta.T.contiguous()):
        (term,) = _sparse(matrix, 400, relaxations=[0], refit_steps=1)
        densities = [1.0 if side.mask is None else side.mask.mean() for side in (term.left, term.right)]
        assert min(densities) < 1 / 256
        assert _error(matrix, [term]) < 0.8 * float(matrix.norm())


def test_error_does_not_grow_with_the_budget():
    delta = _delta(noise=0.05)
    for values in ("int4", "bf16"):
        errors = [_error(delta, _sparse(delta, nbytes, values)) for nbytes in (150, 300, 600, 1200, 2400)]
        assert errors == sorted(errors, reverse=True)


def test_refit_does_not_increase_the_error():
    delta = _delta(noise=0.05)
    for nbytes in (300, 900):
        plain, fitted = (_error(delta, _sparse(delta, nbytes, "fp32", [6], refit_steps=steps)) for steps in (0, 3))
        assert fitted < plain


def test_a_wider_grid_of_relaxations_is_no_worse():
    delta = _delta(noise=0.05)
    whole = _error(delta, _sparse(delta, 500))
    alone = [_error(delta, _sparse(delta, 500, relaxations=[extra])) for extra in (0, 5, 9, 18, 36)]
    assert whole == pytest.approx(min(alone), rel=1e-6)
    assert max(alone) > 1.2 * whole


def test_sparse_beats_dense_at_equal_paper_bits_on_a_spread_spectrum():
    """The paper's observation: a higher rank with sparse factors loses less than a dense lower one."""
    left, right = _random(80, 12) ** 3, _random(70, 12, seed=1) ** 3
    delta = left @ right.T
    nbytes = 4 * 2 * 150
    terms = _sparse(delta, nbytes, "fp32", None, refit_steps=0, flat_index=True)
    assert len(terms[0].left.values) > 2
    assert _error(delta, terms) < 0.97 * _tail(delta, 2)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("joint", [True, False], ids=["joint", "separate"])
def test_flat_index_counts_the_bits_of_the_paper(rank, joint):
    delta = _random(90, 40) ** 3
    budget = 32 * rank * 130
    for extra in (1, rank, 4 * rank):
        (term,) = _sparse(delta, budget // 8, "fp32", [extra], joint=joint, refit_steps=0, flat_index=True)
        kept = int(term.left.mask.sum()), int(term.right.mask.sum())
        bits = osd.paper_bits(90, 40, rank + extra, *kept)
        assert budget - 2 * 48 < bits <= budget


def test_flat_index_keeps_1524_entries_of_the_example():
    delta = _random(1024, 3) @ _random(3, 1024, seed=1)
    spectrum = Spectrum(*osd.truncated_svd(delta, 2))
    (term,) = fit_sparse(delta, spectrum, 4 * 2048, "fp32", [1], "magnitude", None, True, 0, flat_index=True)
    assert int(term.left.mask.sum()) + int(term.right.mask.sum()) == 1524


def test_budgets_that_hold_nothing_give_nothing():
    delta = _delta()
    for nbytes in (-5, 0, 1, 8):
        assert _sparse(delta, nbytes) == ()


# Signs


def _dense(delta, terms):
    return torch.from_numpy(Delta(tuple(delta.shape), tuple(terms)).dense())


def test_signs_are_those_of_the_delta_at_its_places():
    delta = _random(20, 30)
    (term,) = fit_signs(delta, 0.34, 42, math.inf)
    places = seeded_places(42, 200, 600)
    dense = _dense(delta, [term]).reshape(-1)
    assert torch.nonzero(dense)[:, 0].tolist() == places.tolist()
    assert torch.equal(dense[places].sign(), delta.reshape(-1)[places].sign())
    assert dense[places].abs().unique().tolist() == [term.magnitude]
    assert isinstance(term, SignTerm)
    assert term_size(term) == 13 + 25


@pytest.mark.parametrize("density", [0.02, 0.5, 1.0, 1.7, 4.0, 30.0])
def test_signs_have_the_inner_product_of_the_delta_with_itself(density):
    delta = _random(40, 30) * torch.linspace(0.1, 3, 30)
    terms = fit_signs(delta, density, 7, math.inf)
    assert len(terms) == min(math.ceil(density), MAX_SIGN_TERMS)
    signs = sum(len(term.negative) for term in terms)
    assert 1200 * min(density, MAX_SIGN_TERMS) - 8 < signs <= 1200 * min(density, MAX_SIGN_TERMS)
    found = float((_dense(delta, terms) * delta).double().sum())
    assert found == pytest.approx(float(delta.double().pow(2).sum()), rel=1e-4)


def test_over_many_seeds_signs_do_to_an_input_what_the_delta_does():
    """To within a few standard errors; the mean magnitude alone, unscaled, does far less."""
    delta = _delta(noise=0.05)
    x = torch.linalg.svd(delta)[2][0]
    whole = delta @ x
    found, plain = [], []
    for seed in range(300):
        terms = fit_signs(delta, 0.2, seed, math.inf)
        along = float(_dense(delta, terms) @ x @ whole / whole.pow(2).sum())
        found.append(along)
        places = seeded_places(seed, len(terms[0].negative), delta.numel())
        plain.append(along * float(delta.reshape(-1)[places].abs().mean()) / terms[0].magnitude)
    error = np.std(found) / len(found) ** 0.5
    # Signs flatten large and small entries alike, so that one direction keeps a little less than the whole delta.
    assert 0.7 < np.mean(found) < 1.1 + 4 * error
    assert np.mean(plain) < 0.2


def test_later_signs_refine_earlier_ones():
    delta = _random(40, 30)
    errors = [float((delta - _dense(delta, fit_signs(delta, density, 7, math.inf))).norm()) for density in range(1, 9)]
    assert all(after < 0.97 * before for before, after in zip(errors, errors[1:]))
    assert errors[-1] < 0.15 * float(delta.norm())


def test_signs_keep_to_the_noise_that_is_allowed():
    delta = _random(40, 30)
    dense = _dense(delta, fit_signs(delta, 0.05, 7, 0.5))
    assert float(dense.pow(2).mean().sqrt()) == pytest.approx(0.5, rel=1e-4)


def test_signs_of_nothing_are_nothing():
    delta = _random(20, 30)
    assert fit_signs(delta, 0.0, 42, math.inf) == ()
    assert fit_signs(delta, 0.01, 42, math.inf) == (), "less than a byte"
    assert fit_signs(torch.zeros(20, 30), 0.5, 42, math.inf) == ()


def test_half_empty_deltas_get_no_bias_from_their_zeros():
    delta = _random(200, 100)
    delta[100:] = 0
    dense = _dense(delta, fit_signs(delta, 0.5, 3, math.inf))
    assert abs(float((dense[100:] > 0).float().sum() - (dense[100:] < 0).float().sum())) < 5 * 5000**0.5


def test_the_last_seed_can_be_written():
    delta = _random(20, 30)
    for seed in (2**32 - 1, 2**32 - 3):
        terms = fit_signs(delta, 4.0, seed, math.inf)
        assert len({term.seed for term in terms}) == 4
        stored = decode(encode({"w": Delta((20, 30), terms)}))["w"].dense()
        assert stored.tobytes() == _dense(delta, terms).numpy().tobytes()
