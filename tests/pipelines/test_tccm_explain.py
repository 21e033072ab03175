"""Attributions that sum to the score and find planted shifts; bounds that hold against moves made to break them."""

import math
import sys

import numpy as np
import pytest
import torch

from hf_ext.errors import ConfigError, DataError, MissingPackageError
from hf_ext.pipelines.tccm import TCCMConfig, TCCMModel
from hf_ext.pipelines.tccm_explain import (
    PRIOR_PRECISION,
    RIDGE,
    certify,
    conditional_gains,
    explain,
    lipschitz_bounds,
    plot_explanation,
)
from tests.reference import tccm_naive as naive


SMALL = {"members": 2, "hidden_size": 16, "steps": 30, "batch_size": 64, "time_embedding_size": 8}
PAPER = {**SMALL, "mode": "paper", "members": 1}


def _rows(n, d=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(99))
    return torch.randn(n, d, generator=generator) @ mixing * torch.logspace(-1, 1, d)


def _fit(rows, **settings):
    return TCCMModel(TCCMConfig(feature_size=rows.shape[1], **{**SMALL, **settings})).eval().fit(rows)


@pytest.fixture(scope="module")
def fitted():
    return _fit(_rows(200))


@pytest.fixture(scope="module")
def paper():
    return _fit(_rows(200), **PAPER)


# Attributions


@pytest.mark.parametrize("method", ["conditional", "direct"])
def test_parts_are_not_negative_and_sum_to_the_score(fitted, method):
    far = 1e6 * torch.ones(1, 4)
    rows = torch.cat([_rows(600, seed=1), _rows(200)[:5], 30 * _rows(5, seed=2), far, fitted.mean[None].float()])
    parts = explain(fitted, rows, method)
    assert parts.shape == rows.shape
    assert (parts >= 0).all()
    torch.testing.assert_close(parts.sum(1), fitted.score(rows), rtol=1e-4, atol=0)
    assert torch.equal(parts[:3], explain(fitted, rows[:3], method)) or torch.allclose(
        parts[:3], explain(fitted, rows[:3], method), rtol=1e-4, atol=1e-6
    )
    assert explain(fitted, rows[:0], method).shape == (0, 4)


@pytest.mark.parametrize("method", ["conditional", "direct"])
def test_the_mean_row_and_repeated_rows_have_parts_too(method):
    rows = torch.cat([torch.zeros(40, 3), torch.eye(3), -torch.eye(3)])
    model = _fit(rows)
    parts = explain(model, torch.zeros(1, 3), method)
    assert float(parts.sum()) == pytest.approx(float(model.score(torch.zeros(1, 3))), rel=1e-4)


def test_the_papers_parts_are_the_residuals_and_their_squares_sum_to_the_square(paper):
    rows = _rows(50, seed=1)
    parts = explain(paper, rows, "paper")
    torch.testing.assert_close(parts, paper.residuals(rows)[0].abs(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(parts.square().sum(1), paper.score(rows).square(), rtol=1e-4, atol=0)
    torch.testing.assert_close(explain(paper, rows, "direct").sum(1), paper.score(rows), rtol=1e-4, atol=0)


def test_without_a_network_the_papers_parts_are_z():
    rows = _rows(100)
    model = _fit(rows, **{**PAPER, "steps": 0})
    with torch.no_grad():
        model.net.weights[2].zero_()
        model.net.biases[2].zero_()
    z = (rows.double() - rows.double().mean(0)) / rows.double().std(0, correction=0)
    torch.testing.assert_close(explain(model, rows, "paper").double(), z.abs(), rtol=1e-5, atol=1e-6)


def test_direct_parts_are_the_shares_of_the_two_sums_of_squares(fitted):
    rows = torch.cat([_rows(20, seed=3), _rows(200)[:5]])
    z, references, weight = fitted.standardize(rows), fitted.references, fitted.config.residual_weight
    expected = []
    for row in z:
        order = sorted(range(len(references)), key=lambda r: float((row - references[r]).square().sum()))
        order = order[1:] if torch.equal(references[order[0]], row) else order
        near = sum((row - references[r]).square() for r in order[:5])
        residuals = [torch.tensor(naive.residual(fitted, m, row.double().numpy())).square() for m in range(2)]
        share = sum(square / square.sum() for square in residuals) / 2
        expected.append((1 - weight) * near / near.sum() + weight * share)
    expected = torch.stack(expected) * fitted.score(rows)[:, None]
    torch.testing.assert_close(explain(fitted, rows, "direct").double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("d", [1, 2, 7])
def test_conditional_gains_are_those_of_inverting_anew_for_each_feature(d):
    rows = _rows(300, d)
    z = (rows - rows.mean(0)) / rows.std(0, correction=0)
    covariance = z.T @ z / len(z)
    found = conditional_gains(z[:25], covariance)
    expected = [
        naive.conditional_gains(row.double().numpy(), covariance.double().numpy(), RIDGE, PRIOR_PRECISION)
        for row in z[:25]
    ]
    torch.testing.assert_close(found.double(), torch.tensor(np.array(expected)), rtol=1e-3, atol=1e-5)


def test_more_features_than_are_ranked_all_have_a_gain():
    z = torch.randn(10, 80, generator=torch.Generator().manual_seed(0))
    gains = conditional_gains(z, torch.eye(80))
    # Without correlation nothing depends on the order.
    torch.testing.assert_close(
        gains, (z / (1 + RIDGE)).square() / (1 / (1 + RIDGE) + PRIOR_PRECISION), rtol=1e-4, atol=1e-6
    )


def test_parts_follow_their_columns():
    rows = _rows(200)
    order = torch.tensor([2, 0, 3, 1])
    found = explain(_fit(rows[:, order]), rows[:20, order], "conditional")
    shares = explain(_fit(rows), rows[:20], "conditional")
    torch.testing.assert_close(
        found / found.sum(1, keepdim=True), (shares / shares.sum(1, keepdim=True))[:, order], rtol=1e-2, atol=1e-3
    )


def _factor_rows(n, d, generator):
    """Two hidden causes and a little noise of each feature's own."""
    loadings = torch.randn(2, d, generator=torch.Generator().manual_seed(d))
    return torch.randn(n, 2, generator=generator) @ loadings + 0.3 * torch.randn(n, d, generator=generator)


def _mixture_rows(n, d, generator):
    """Modes at -1, 0 and 1 of all features, and noise within."""
    modes = torch.randint(-1, 2, (n, 1), generator=generator).float()
    return modes + 0.3 * torch.randn(n, d, generator=generator)


@pytest.mark.parametrize("make", [_factor_rows, _mixture_rows])
@pytest.mark.parametrize(("d", "m"), [(8, 1), (12, 2), (25, 3)])
def test_planted_shifts_are_found_and_more_often_than_by_their_size(make, d, m):
    ours, sizes = [], []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        train, rows = make(800, d, generator), make(60, d, generator)
        deviation = train.std(0)
        planted = torch.stack([torch.randperm(d, generator=generator)[:m] for _ in rows])
        size = 1.5 + 1.5 * torch.rand(planted.shape, generator=generator)
        sign = torch.randint(0, 2, planted.shape, generator=generator) * 2 - 1
        rows = rows.scatter_add(1, planted, size * sign * deviation[planted])
        model = _fit(train, steps=5, seed=seed)
        for found, parts in ((ours, explain(model, rows)), (sizes, model.standardize(rows).abs())):
            top = parts.topk(m, dim=1).indices
            for a, b in zip(top.tolist(), planted.tolist()):
                found.append(len({*a} & {*b}) / len({*a} | {*b}))
    assert np.mean(ours) >= 0.8, np.mean(ours)
    assert np.mean(ours) >= np.mean(sizes) + 0.1, (np.mean(ours), np.mean(sizes))


def test_unknown_methods_and_models_without_references_are_refused(fitted, paper):
    with pytest.raises(ConfigError, match="method='shap' must be"):
        explain(fitted, _rows(2), "shap")
    with pytest.raises(ConfigError, match="use method='direct'"):
        explain(paper, _rows(2))
    for call in (lambda rows: explain(fitted, rows), lambda rows: certify(fitted, rows, 1.0)):
        with pytest.raises(DataError, match="fitted on 4 features"):
            call(torch.zeros(2, 3))
        with pytest.raises(DataError, match="NaN or infinity"):
            call(torch.full((2, 4), math.nan))


# Bounds


def _paper_score(model, z):
    return (model.net.at_one(z)[0] + z).norm(dim=1)


def test_the_papers_constant_is_one_and_the_product_of_spectral_norms(paper):
    first, second, third = (weight[0].detach().double().numpy() for weight in paper.net.weights)
    norms = [np.linalg.svd(W, compute_uv=False)[0] for W in (first[:4], second, third)]
    part, constants = lipschitz_bounds(paper)
    assert part == 0.0
    assert constants.tolist() == pytest.approx([1 + norms[0] * norms[1] * norms[2]], rel=1e-6)


def test_scores_differ_by_at_most_the_constant_times_the_distance(paper):
    """Random pairs, close pairs, and pairs moved to where the quotient is largest."""
    constant = float(lipschitz_bounds(paper)[1])
    generator = torch.Generator().manual_seed(0)
    one = 3 * torch.randn(400, 4, generator=generator)
    two = torch.cat(
        [3 * torch.randn(200, 4, generator=generator), one[200:] + 0.05 * torch.randn(200, 4, generator=generator)]
    )

    def quotients(a, b):
        return (_paper_score(paper, a) - _paper_score(paper, b)).abs() / (a - b).norm(dim=1)

    random = quotients(one, two).max().item()
    one, two = one.requires_grad_(), two.requires_grad_()
    ascent = torch.optim.Adam([one, two], lr=0.05, maximize=True)
    for _ in range(60):
        ascent.zero_grad()
        quotients(one, two).sum().backward()
        ascent.step()
    worst = quotients(one, two).max().item()
    assert random < worst <= constant * (1 + 1e-5), (random, worst, constant)


def test_a_member_moves_at_most_by_its_constant(fitted):
    _, constants = lipschitz_bounds(fitted)
    a, b = _rows(300, seed=1), _rows(300, seed=2)
    moved = (fitted.residuals(a).norm(dim=-1) - fitted.residuals(b).norm(dim=-1)).abs()
    distance = (fitted.standardize(a) - fitted.standardize(b)).norm(dim=1)
    assert (moved <= constants[:, None] * distance * (1 + 1e-5)).all()


def _score_z(model, z):
    return model._scores(z)


def _climb(model, z, radius, sign, steps=12):
    """Moves of at most the radius that raise (or lower) the score, by differences along each axis and random starts."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(z.shape, generator=generator)
    best = torch.full((len(z),), -math.inf)
    for _ in range(steps):
        moved = z + radius * torch.nn.functional.normalize(direction)
        best = best.maximum(sign * _score_z(model, moved))
        slopes = []
        for axis in torch.eye(z.shape[1]):
            step = 1e-2 * axis
            slopes.append(_score_z(model, moved + step) - _score_z(model, moved - step))
        direction = torch.nn.functional.normalize(direction) + sign * torch.nn.functional.normalize(
            torch.stack(slopes, dim=1)
        )
    return sign * best


@pytest.mark.parametrize(
    "settings",
    [{}, {"members": 1, "neighbors": 1}, {"max_references": 1}, PAPER],
    ids=["default", "1nn", "1ref", "paper"],
)
@pytest.mark.parametrize("radius", [0.0, 0.02, 0.5, 3.0])
def test_no_move_within_the_radius_leaves_the_bounds(settings, radius):
    train = _rows(120)
    model = _fit(train, **settings)
    rows = torch.cat([_rows(40, seed=1), train[:20], 5 * _rows(5, seed=2)])
    z = model.standardize(rows)
    lower, upper = certify(model, rows, radius)
    assert (lower <= upper * (1 + 1e-6)).all()
    generator = torch.Generator().manual_seed(3)
    tries = [model.score(rows)]
    for _ in range(60):
        direction = torch.nn.functional.normalize(torch.randn(z.shape, generator=generator))
        tries.append(_score_z(model, z + radius * torch.rand(len(z), 1, generator=generator) * direction))
    tries += [_climb(model, z, radius, 1), _climb(model, z, radius, -1)]
    if len(model.references):
        # Onto the nearest reference, where it is in reach: there it stops being a neighbour.
        nearest = torch.cdist(z, model.references).min(1)
        goal = torch.where((nearest.values <= radius)[:, None], model.references[nearest.indices], z)
        tries.append(_score_z(model, goal))
    for found in tries:
        assert (found >= lower * (1 - 1e-4)).all()
        assert (found <= upper * (1 + 1e-4)).all()


def test_a_move_onto_a_lone_training_row_stays_within_the_bounds():
    """The row is a neighbour of everything near it but not of itself, so that the score jumps."""
    train = torch.cat([0.1 * torch.randn(50, 1, generator=torch.Generator().manual_seed(0)), torch.tensor([[9.0]])])
    model = _fit(train, neighbors=1, members=1)
    close = torch.tensor([[8.9]])
    radius = 0.2 / float(model.scale)
    lower, upper = certify(model, close, radius)
    assert float(lower) <= float(model.score(torch.tensor([[9.0]]))) <= float(upper)


def test_without_a_radius_the_bounds_are_the_score(fitted):
    rows = _rows(30, seed=1)
    for bound in certify(fitted, rows, 0.0):
        torch.testing.assert_close(bound, fitted.score(rows), rtol=1e-4, atol=1e-5)


def test_the_bounds_widen_with_the_radius(fitted):
    rows = _rows(30, seed=1)
    bounds = [certify(fitted, rows, radius) for radius in (0.0, 0.3, 1.0)]
    for (lower, upper), (lower_wide, upper_wide) in zip(bounds, bounds[1:]):
        assert (lower_wide <= lower).all()
        assert (upper_wide > upper).all()
    assert [bound.shape for bound in certify(fitted, rows[:0], 1.0)] == [(0,), (0,)]


@pytest.mark.parametrize("radius", [-1.0, math.nan])
def test_a_radius_below_zero_is_refused(fitted, radius):
    with pytest.raises(ConfigError, match="radius="):
        certify(fitted, _rows(2), radius)


# Pictures


def test_the_picture_shows_the_largest_parts_and_sums_the_others():
    pytest.importorskip("matplotlib")
    ax = plot_explanation(torch.tensor([0.1, 2.0, 0.3, 0.5]), ["a", "b", "c", "d"], threshold=1.5, top=2)
    shown = {label.get_text(): bar.get_width() for label, bar in zip(ax.get_yticklabels(), ax.patches)}
    assert shown == pytest.approx({"b": 2.0, "d": 0.5, "2 others": 0.4})
    assert ax.get_title(loc="left") == "score 2.9, threshold 1.5"
    again = plot_explanation([1.0], ["a"], ax=ax)
    assert again is ax


def test_without_matplotlib_a_picture_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match="pip install"):
        plot_explanation(torch.ones(1), ["a"])


def test_a_picture_needs_a_name_for_each_part():
    pytest.importorskip("matplotlib")
    with pytest.raises(DataError, match=r"shape \(2,\); expected \(1,\)"):
        plot_explanation(torch.ones(2), ["a"])
