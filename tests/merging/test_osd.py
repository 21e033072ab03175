"""The mathematics of OSD against loops, theorems and autograd."""

import pytest
import torch

from hf_ext.merging import osd
from tests.reference import osd as reference


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _power_law(n, d, seed=0):
    """A matrix with singular values 1, 1/2, 1/3 ..."""
    left = torch.linalg.qr(_random(n, min(n, d), seed=seed))[0]
    right = torch.linalg.qr(_random(d, min(n, d), seed=seed + 1))[0]
    return (left / torch.arange(1, min(n, d) + 1)) @ right.T


def _factors(n=12, d=9, k=4):
    return _random(n, k, seed=1), _random(d, k, seed=2), _random(n, d, seed=3)


# The decomposition


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50), (7, 1), (1, 7)], ids=str)
@pytest.mark.parametrize("exact", [False, True], ids=["randomised", "exact"])
def test_singular_triplets_are_those_of_lapack(shape, exact):
    delta = _power_law(*shape)
    k = min(5, *shape)
    left, sigma, right = osd.truncated_svd(delta, k, exact=exact)
    expected = torch.linalg.svdvals(delta.double())
    assert (left.shape, sigma.shape, right.shape) == ((shape[0], k), (k,), (shape[1], k))
    torch.testing.assert_close(sigma.double(), expected[:k], rtol=2e-3, atol=1e-6)
    error = (delta - (left * sigma) @ right.T).double().pow(2).sum()
    assert error <= 1.002 * expected[k:].pow(2).sum() + 1e-10
    for side in (left, right):
        torch.testing.assert_close(side.T @ side, torch.eye(k), atol=1e-4, rtol=0)
    assert (left.gather(0, left.abs().argmax(0, keepdim=True)) > 0).all()


def test_full_rank_gives_the_matrix_back():
    for shape in ((30, 20), (20, 30)):
        delta = _random(*shape)
        left, sigma, right = osd.truncated_svd(delta, 99)
        assert sigma.shape == (20,)
        assert (delta - (left * sigma) @ right.T).norm() <= 1e-5 * delta.norm()


def test_a_matrix_of_low_rank_is_exact_at_its_rank():
    delta = _random(80, 3) @ _random(3, 70, seed=1)
    for exact in (False, True):
        left, right = osd.split(*osd.truncated_svd(delta, 3, exact=exact))
        assert (delta - left @ right.T).norm() <= 1e-5 * delta.norm()


def test_the_decomposition_repeats_and_follows_its_seed():
    delta = _random(90, 80)
    one, two, other = (osd.truncated_svd(delta, 4, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    assert not torch.equal(one[0], other[0])
    more = osd.truncated_svd(delta, 4, power_iterations=40)
    exact = torch.linalg.svdvals(delta)[:4]
    assert (more[1] - exact).norm() < (osd.truncated_svd(delta, 4, power_iterations=0)[1] - exact).norm()


def test_zero_and_degenerate_matrices_stay_finite():
    for exact in (False, True):
        for delta in (torch.zeros(40, 30), torch.ones(40, 30), torch.eye(40, 30), 1e-20 * _random(40, 30)):
            assert all(torch.isfinite(part).all() for part in osd.truncated_svd(delta, 4, exact=exact))


def test_split_balances_the_two_factors():
    triplets = osd.truncated_svd(_power_law(40, 30), 6)
    left, right = osd.split(*triplets)
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=0), rtol=1e-4, atol=0)
    torch.testing.assert_close(left @ right.T, (triplets[0] * triplets[1]) @ triplets[2].T, rtol=0, atol=1e-6)


# Scores


@pytest.mark.parametrize("score", osd.IMPORTANCE)
def test_scores_equal_loops(score):
    left, right, gradient = _factors()
    gradient = gradient if score == "taylor1" else gradient**2
    for found, expected in zip(
        osd.importance(score, left, right, gradient), reference.importance(score, left, right, gradient)
    ):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_taylor1_is_each_entry_times_its_gradient():
    """`Ut * (G Vt)` is what autograd gives through `dW = Ut Vt^T`."""
    left, right, target = _factors()
    weight = (left @ right.T).requires_grad_()
    (weight - target).pow(3).sum().backward()
    u, v = left.clone().requires_grad_(), right.clone().requires_grad_()
    (u @ v.T - target).pow(3).sum().backward()
    found = osd.importance("taylor1", left, right, weight.grad)
    torch.testing.assert_close(found[0], (u * u.grad).abs().detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], (v * v.grad).abs().detach(), rtol=1e-4, atol=1e-4)


def test_fisher_is_the_surrogate_loss_of_dropping_a_lone_column_entry():
    left, right, gradient = _random(8, 1), _random(6, 1, seed=1), _random(8, 6, seed=2) ** 2
    scores = osd.importance("fisher", left, right, gradient)
    for side, (own, other) in enumerate(((left, right), (right, left))):
        for i in range(len(own)):
            damaged = own.clone()
            damaged[i] = 0
            pair = (damaged, other) if side == 0 else (other, damaged)
            loss = (gradient * (left @ right.T - pair[0] @ pair[1].T) ** 2).sum()
            torch.testing.assert_close(scores[side][i, 0], loss, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("score", osd.IMPORTANCE)
def test_only_magnitude_depends_on_how_the_singular_values_are_shared(score):
    left, right, gradient = _factors(20, 15, 5)
    gradient = gradient if score == "taylor1" else gradient**2
    scale = torch.tensor([0.05, 0.5, 1.0, 4.0, 30.0])
    before = osd.importance(score, left, right, gradient)
    after = osd.importance(score, left * scale, right / scale, gradient)
    same = all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(before, after))
    masks = osd.select(*before, 60), osd.select(*after, 60)
    same_masks = all(torch.equal(a, b) for a, b in zip(*masks))
    assert same == same_masks == (score != "magnitude")


def test_energy_ranks_like_magnitude_under_the_even_split():
    left, right = osd.split(*osd.truncated_svd(_power_law(30, 20), 1))
    for score in ("magnitude", "energy"):
        assert torch.equal(osd.select(*osd.importance(score, left, right), 25)[0], _first_mask(left, right, 25))


def _first_mask(left, right, count):
    return reference.select(left.abs(), right.abs(), count, True)[0]


def test_scores_without_what_they_need_are_refused():
    left, right, gradient = _factors()
    for score in ("taylor1", "taylor", "fisher"):
        with pytest.raises(ValueError, match=f"importance='{score}' needs the gradient"):
            osd.importance(score, left, right)
    with pytest.raises(ValueError, match="importance='wanda' is unknown; use one of magnitude"):
        osd.importance("wanda", left, right, gradient)


# Selection


@pytest.mark.parametrize("joint", [True, False], ids=["joint", "separate"])
def test_selection_is_a_sort(joint):
    left, right = _random(11, 3).abs(), _random(7, 3, seed=1).abs()
    for count in (0, 1, 2, 13, 40, 53, 54, 1000):
        found = osd.select(left, right, count, joint)
        expected = reference.select(left, right, min(count, 54), joint)
        assert all(torch.equal(a, b) for a, b in zip(found, expected)), count
        assert sum(int(mask.sum()) for mask in found) == min(count, 54)


@pytest.mark.parametrize("joint", [True, False], ids=["joint", "separate"])
def test_among_equals_the_left_factor_and_the_lower_place_come_first(joint):
    left, right = (_random(11, 3) > 0).float(), (_random(7, 3, seed=1) > 0).float()
    for count in range(0, 55, 6):
        found = osd.select(left, right, count, joint)
        assert all(torch.equal(a, b) for a, b in zip(found, reference.select(left, right, count, joint))), count


def test_selection_keeps_the_known_share_of_gaussian_energy():
    left, right = _random(2048, 16), _random(2048, 16, seed=1)
    for density, share in ((0.5, 0.928), (0.25, 0.723), (0.1, 0.438)):
        masks = osd.select(*osd.importance("magnitude", left, right), int(density * 2 * 2048 * 16))
        for side, mask in zip((left, right), masks):
            assert float((side * mask).pow(2).sum() / side.pow(2).sum()) == pytest.approx(share, abs=0.01)


# The paper's memory


def test_paper_bits_equal_a_count_of_index_bits():
    for n, d, rank in ((1, 1, 1), (2, 3, 1), (5, 7, 3), (64, 128, 4), (1000, 1024, 8), (1 << 20, 3, 1 << 6)):
        for kept in ((0, 0), (1, 0), (0, 1), (17, 5)):
            assert osd.paper_bits(n, d, rank, *kept) == reference.paper_bits(n, d, rank, *kept)


def test_paper_bits_of_the_example():
    """n = d = 1024 at the budget of rank 1: 1524 survivors of 43 bits for k = 2, 1489 of 44 for k = 3."""
    budget = 32 * (1024 + 1024)
    for rank, count, each in ((2, 1524, 43), (3, 1489, 44)):
        assert osd.paper_bits(1024, 1024, rank, count, 0) == count * each <= budget
        assert osd.paper_bits(1024, 1024, rank, count // 2, count - count // 2) == count * each
        assert osd.paper_bits(1024, 1024, rank, count + 1, 0) > budget


# Refit


def test_refit_equals_least_squares_row_by_row():
    delta, right = _random(10, 14), _random(14, 5, seed=1)
    mask = _random(10, 5, seed=2) > 0
    mask[3] = False
    mask[4] = True
    found = osd.refit_left(delta, right, mask)
    assert (found[~mask] == 0).all()
    torch.testing.assert_close(found.double(), reference.refit_left(delta, right, mask), rtol=1e-4, atol=1e-5)
    whole = osd.refit_left(delta, right, None)
    torch.testing.assert_close(whole, osd.refit_left(delta, right, torch.ones(10, 5).bool()), rtol=1e-5, atol=1e-6)


def test_refit_in_pieces_is_the_refit(monkeypatch):
    delta, right, mask = _random(50, 14), _random(14, 5, seed=1), _random(50, 5, seed=2) > 0
    whole = osd.refit_left(delta, right, mask)
    for rows in (1, 7, 49):
        monkeypatch.setattr(osd, "_SYSTEMS", rows * 25)
        torch.testing.assert_close(osd.refit_left(delta, right, mask), whole, rtol=1e-6, atol=1e-7)


def test_refit_of_many_rows_takes_little_memory():
    """60,000 rows at rank 40 are 768 MB of systems, if all are made at once."""
    import resource

    delta, right = torch.ones(60_000, 4), _random(4, 40, seed=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    osd.refit_left(delta, right, torch.ones(60_000, 40, dtype=torch.bool))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 200, f"{grown:.0f} MiB"


def test_refit_survives_empty_dependent_and_tiny_columns():
    delta = 1e-6 * _random(10, 14)
    right = _random(14, 4, seed=1)
    right[:, 1], right[:, 2] = 0, right[:, 0]
    for mask in (None, torch.ones(10, 4).bool(), _random(10, 4) > 0):
        for scale in (1.0, 1e-12, 0.0):
            assert torch.isfinite(osd.refit_left(delta, scale * right, mask)).all()


@pytest.mark.parametrize("shape", [(40, 30), (30, 40)], ids=str)
@pytest.mark.parametrize("density", [0.1, 0.4, 1.0])
def test_refit_never_increases_the_error(shape, density):
    delta = _power_law(*shape) + 0.01 * _random(*shape, seed=5)
    left, right = osd.split(*osd.truncated_svd(delta, 6))
    masks = osd.select(left.abs(), right.abs(), int(density * 6 * sum(shape)))
    errors = []
    for steps in range(6):
        one, other = osd.refit(delta, left, right, *masks, steps)
        assert (one[~masks[0]] == 0).all()
        assert (other[~masks[1]] == 0).all()
        errors.append(float((delta - one @ other.T).double().norm()))
    assert all(after <= before * (1 + 1e-5) for before, after in zip(errors, errors[1:])), errors
    assert density == 1.0 or errors[1] < 0.999 * errors[0]
    floor = float(torch.linalg.svdvals(delta.double())[6:].norm())
    assert min(errors) >= floor * (1 - 1e-5), "no pair of rank 6 beats the truncated decomposition"


def test_refitted_factors_are_balanced():
    delta = _power_law(40, 30)
    left, right = osd.split(*osd.truncated_svd(delta, 6))
    one, other = osd.refit(delta, left, right, *osd.select(left.abs(), right.abs(), 150), 2)
    used = (one.norm(dim=0) > 0) & (other.norm(dim=0) > 0)
    torch.testing.assert_close(one.norm(dim=0)[used], other.norm(dim=0)[used], rtol=1e-4, atol=1e-8)


# Signs


def _signs(delta, density, generator):
    """Signs at random places, all of the mean magnitude there: the usual one-bit code."""
    kept = torch.randperm(len(delta), generator=generator)[: int(len(delta) * density)]
    coarse = torch.zeros_like(delta)
    coarse[kept] = delta[kept].sign() * delta[kept].abs().mean()
    return coarse


def test_the_unbiased_scale_keeps_the_inner_product_and_plain_signs_do_not():
    delta = _random(4000) * torch.linspace(0.2, 3, 4000)
    energy = float(delta.double().pow(2).sum())
    generator = torch.Generator().manual_seed(0)
    for density in (0.02, 0.2, 1.0):
        coarse = _signs(delta, density, generator)
        scale = osd.unbiased_scale(delta, coarse)
        assert float((scale * coarse * delta).double().sum()) == pytest.approx(energy, rel=1e-5)
        # The mean magnitude keeps the share E|d|^2 / E[d^2] of what lies at its places, and nothing elsewhere.
        assert float((coarse * delta).double().sum()) < 0.75 * density * energy


def test_over_many_draws_the_scaled_code_is_the_delta():
    """Each weight comes back as itself or nearly so: what is left over is noise, and falls with the root of the draws."""
    delta = 1 + _random(400).abs()
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [(code := _signs(delta, 0.25, generator)) * osd.unbiased_scale(delta, code) for _ in range(3000)]
    )
    along = draws @ delta / delta.pow(2).sum()
    assert float(along.mean()) == pytest.approx(1, abs=1e-4)
    # Every place gets the same magnitude, so the mean is flat: E[d^2] / E|d|.
    expected = float(delta.pow(2).mean() / delta.mean())
    spread = float(draws.std(0).mean()) / 3000**0.5
    assert float((draws.mean(0) - expected).abs().max()) < 5 * spread
    assert abs(float(draws.mean()) - expected) < 0.02 * expected


def test_the_unbiased_scale_stops_at_the_noise_that_is_allowed():
    delta = _random(1000)
    coarse = _signs(delta, 0.05, torch.Generator().manual_seed(1))
    free = osd.unbiased_scale(delta, coarse)
    rms = float((free * coarse).pow(2).mean().sqrt())
    assert osd.unbiased_scale(delta, coarse, noise=1.01 * rms) == pytest.approx(free)
    limited = osd.unbiased_scale(delta, coarse, noise=0.3 * rms)
    assert float((limited * coarse).pow(2).mean().sqrt()) == pytest.approx(0.3 * rms, rel=1e-4)


def test_the_unbiased_scale_of_the_delta_is_one_and_of_nothing_is_zero():
    delta = _random(1000)
    assert osd.unbiased_scale(delta, delta) == pytest.approx(1)
    assert osd.unbiased_scale(delta, -delta) == 0
    assert osd.unbiased_scale(delta, torch.zeros(1000)) == 0
    assert osd.unbiased_scale(torch.zeros(1000), delta) == 0


# Allocation of bits


def _cost(chosen, sides, column_bytes=4):
    return sum(sum(bits * sides[name] / 8 + column_bytes for bits in columns) for name, columns in chosen.items())


def _saved(chosen, gains):
    return sum(
        float(gains[name][i]) * (1 - osd.DISTORTION[bits]) ** 2
        for name, columns in chosen.items()
        for i, bits in enumerate(columns)
    )


def test_allocation_fits_its_budget_uses_it_and_saves_more_with_more():
    gains = {name: 1 / torch.arange(1, 30) ** power for name, power in (("a", 1.0), ("b", 2.0), ("c", 0.3))}
    sides = {"a": 300, "b": 128, "c": 64}
    before = 0.0
    for budget in range(0, 20_000, 391):
        chosen = osd.allocate(gains, sides, budget, (1, 2, 3, 4))
        assert _cost(chosen, sides) <= budget
        most = sum(29 * (4 * side / 8 + 4) for side in sides.values())
        assert _cost(chosen, sides) >= min(budget, most) - 1 - max(side / 8 + 4 for side in sides.values())
        for columns in chosen.values():
            assert columns == sorted(columns, reverse=True)
            assert set(columns) <= {1, 2, 3, 4}
        saved = _saved(chosen, gains)
        assert saved >= before * 0.995
        before = max(before, saved)


def test_allocation_is_near_the_best_of_all_choices():
    gains, sides = {"a": torch.tensor([9.0, 4.0, 1.0]), "b": torch.tensor([5.0, 5.0])}, {"a": 80, "b": 40}
    ladders = {name: _all_columns(len(gains[name])) for name in gains}
    for budget in (20, 50, 90, 150, 200):
        found = _saved(osd.allocate(gains, sides, budget, (1, 2, 4)), gains)
        best = max(
            _saved({"a": a, "b": b}, gains)
            for a in ladders["a"]
            for b in ladders["b"]
            if _cost({"a": a, "b": b}, sides) <= budget
        )
        assert found >= 0.8 * best, (budget, found, best)


def _all_columns(count, largest=4):
    found = [[]]
    for bits in (b for b in (1, 2, 4) if b <= largest and count):
        found += [[bits, *rest] for rest in _all_columns(count - 1, bits)]
    return found


def test_nothing_is_allocated_without_a_budget():
    assert osd.allocate({"a": torch.ones(4)}, {"a": 100}, 0, (1, 2)) == {}
    assert osd.allocate({"a": torch.ones(0)}, {"a": 100}, 1000, (1, 2)) == {}
    assert osd.allocate({}, {}, 1000, (1, 2)) == {}
    assert osd.allocate({"a": torch.ones(2)}, {"a": 80}, 10**9, (32,)) == {"a": [32, 32]}
