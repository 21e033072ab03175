"""The default mode's mathematics: Adafactor's second moment, and leading singular values cut without a decomposition."""

import pytest
import torch

from hf_ext.trainers.factored import LIMIT, USUAL_SCALE, cut_directions_, normalize_factored, sketch_matrix
from hf_ext.trainers.sgc_optimizer import SGCAdamW
from tests.reference import sgc as reference


BETA = 0.999


def spiked(rows=40, columns=60, spikes=(300.0, 100.0, 50.0), seed=1):
    """Noise of unit entries with a few directions far above it."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, len(spikes), generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, len(spikes), generator=generator)).Q
    noise = torch.randn(rows, columns, generator=generator)
    return noise + left @ torch.diag(torch.tensor(spikes)) @ right.T


def cut(update, sketch, limit=LIMIT, part=1):
    """A matrix, or a stack of them, in place; returned, for a line of its own."""
    stack = update if update.ndim == 3 else update[None]
    cut_directions_(stack, stack.flatten(1).norm(dim=1), sketch, part, limit)
    return update


def run_normalize(gradients, beta=BETA, eps=1e-8):
    rows, columns = torch.zeros(1, gradients[0].shape[0]), torch.zeros(1, gradients[0].shape[1])
    found = []
    for step, gradient in enumerate(gradients, start=1):
        found.append(normalize_factored([gradient[None]], rows, columns, beta, 1 - beta**step, eps)[0])
    return found, rows[0], columns[0]


@pytest.mark.parametrize("shape", [(5, 7), (1, 4), (4, 1), (8, 3)])
def test_normalising_equals_the_oracle_step_by_step(shape):
    gradients = [torch.randn(shape).pow(3) for _ in range(6)]
    found, rows, columns = run_normalize(gradients)
    oracle = reference.FactoredMoment(*shape, BETA)
    for gradient, update in zip(gradients, found):
        expected = oracle.update(gradient)
        torch.testing.assert_close(update.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows.double(), torch.tensor(oracle.rows, dtype=torch.float64), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(
        columns.double(), torch.tensor(oracle.columns, dtype=torch.float64), rtol=1e-4, atol=1e-7
    )


def test_the_first_step_is_that_of_adafactor():
    from transformers.optimization import Adafactor

    gradient = torch.randn(24, 40).pow(3)
    parameter = torch.nn.Parameter(torch.zeros(24, 40))
    # Adafactor forgets everything before its first step, as our corrected averages do.
    adafactor = Adafactor(
        [parameter], lr=1.0, scale_parameter=False, relative_step=False, clip_threshold=1e9, weight_decay=0.0
    )
    parameter.grad = gradient.clone()
    adafactor.step()
    (found,), _, _ = run_normalize([gradient])
    torch.testing.assert_close(found, -parameter.detach(), rtol=1e-4, atol=1e-5)


def test_without_cutting_a_step_is_the_normalised_gradient_brought_to_one_unit():
    parameter = torch.nn.Parameter(torch.zeros(24, 40))
    optimizer = SGCAdamW([parameter], lr=1.0, directions=0, relative_step=False)
    parameter.grad = torch.randn(24, 40).pow(3)
    optimizer.step()
    update = reference.FactoredMoment(24, 40, BETA).update(parameter.grad)
    size = float(update.square().mean().sqrt())
    torch.testing.assert_close(-parameter.detach().double(), update / max(1.0, size), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-15, 1e-8, 1e8, 1e15])
def test_normalising_does_not_depend_on_scale(scale):
    gradients = [torch.randn(6, 9) for _ in range(3)]
    found, _, _ = run_normalize(gradients)
    scaled, _, _ = run_normalize([scale * gradient for gradient in gradients], eps=scale * 1e-8)
    for one, other in zip(found, scaled):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_rows_and_columns_that_never_had_a_gradient_give_zeros():
    gradient = torch.randn(6, 9)
    gradient[2] = 0.0
    gradient[:, 4] = 0.0
    (found,), _, _ = run_normalize([gradient])
    assert found.isfinite().all()
    assert not found[2].any()
    assert not found[:, 4].any()
    (found,), _, _ = run_normalize([torch.zeros(6, 9)])
    assert not found.any()


def test_normalising_leaves_the_gradient_alone():
    gradient = torch.randn(6, 9)
    kept = gradient.clone()
    run_normalize([gradient])
    assert torch.equal(gradient, kept)


@pytest.mark.parametrize("limit", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("part", [0, 3, 6])
@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (24, 24), (43, 61)])
def test_cutting_equals_the_oracle(shape, part, limit):
    update = spiked(*shape)
    sketch = sketch_matrix(4, min(shape), seed=2)
    expected = reference.cut_directions(update, sketch, part, limit)
    found = cut(update.clone(), sketch, limit, part)
    error = float((found.double() - expected).norm() / expected.norm())
    assert error < 1e-3, error


@pytest.mark.parametrize("limit", [0.5, 1.0, 2.0])
def test_cutting_works_in_place_and_gives_the_norm_that_is_left(limit):
    update = torch.stack([spiked(seed=seed) * scale for seed, scale in ((1, 1.0), (2, 100.0), (3, 0.01))])
    before = update.flatten(1).norm(dim=1)
    left = cut_directions_(update, before, sketch_matrix(4, 40, seed=2), 2, limit)
    after = update.flatten(1).norm(dim=1)
    assert bool((after < 0.5 * before).all())
    torch.testing.assert_close(left, after, rtol=1e-3, atol=0.0)


def test_matrices_of_a_stack_are_cut_as_they_would_be_alone():
    stack = torch.stack([spiked(seed=seed) * 10.0**seed for seed in range(4)])
    alone = torch.stack([cut(matrix.clone(), sketch_matrix(4, 40, seed=2)) for matrix in stack])
    torch.testing.assert_close(cut(stack, sketch_matrix(4, 40, seed=2)), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("limit", [0.5, 1.0, 2.0])
def test_after_cutting_no_sketched_direction_is_above_the_limit(limit):
    update = spiked()
    sketch = sketch_matrix(4, 40, seed=2)
    basis = reference.sketched_space(update, sketch, part=1)
    inside = basis.T @ update.double()
    rest = float((update.double() - basis @ inside).square().sum() / (40 - 4)) ** 0.5
    after = (basis.T @ cut(update, sketch, limit).double()).norm(dim=1)
    assert float(after.max()) <= 1.01 * limit * rest


def test_spikes_come_down_to_the_crowd():
    update = spiked()
    before = torch.linalg.svdvals(update)
    after = torch.linalg.svdvals(cut(update, sketch_matrix(4, 40, seed=2), LIMIT))
    assert float(before[2] / before[3]) > 3.0
    assert float(after[0]) < 2.0 * float(before[3])


def test_what_is_outside_the_sketched_space_does_not_change():
    update = spiked()
    sketch = sketch_matrix(4, 40, seed=2)
    basis = reference.sketched_space(update, sketch, part=1)
    kept = update.double() - basis @ (basis.T @ update.double())
    found = cut(update, sketch).double()
    outside = found - basis @ (basis.T @ found)
    assert float((outside - kept).norm() / kept.norm()) < 1e-3


def test_no_singular_value_grows():
    for seed in range(5):
        update = spiked(spikes=(300.0, 20.0, 3.0), seed=seed)
        before = torch.linalg.svdvals(update)
        after = torch.linalg.svdvals(cut(update, sketch_matrix(4, 40, seed=seed)))
        assert bool((after <= before * (1 + 1e-4)).all()), seed


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e3, 1e12])
def test_cutting_scales_with_the_matrix(scale):
    update, sketch = spiked(), sketch_matrix(4, 40, seed=2)
    expected = cut(update.clone(), sketch)
    found = cut(update * scale, sketch) / scale
    assert float((found - expected).norm() / expected.norm()) < 1e-3


def test_a_matrix_of_zeros_stays_one():
    assert torch.equal(cut(torch.zeros(40, 60), sketch_matrix(4, 40, seed=2)), torch.zeros(40, 60))


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_matrix_of_low_rank_stays_finite_and_does_not_grow(rank):
    update = torch.randn(40, rank) @ torch.randn(rank, 60)
    before = update.norm()
    found = cut(update, sketch_matrix(4, 40, seed=2))
    assert found.isfinite().all()
    assert float(found.norm()) <= float(before) * (1 + 1e-4)


@pytest.mark.parametrize("rank", [1, 4])
def test_a_gradient_of_low_rank_still_moves_the_matrix(rank):
    # One token, or a few, make such a gradient: it has no crowd to be cut down to.
    parameter = torch.nn.Parameter(torch.zeros(40, 60))
    optimizer = SGCAdamW([parameter], lr=1.0, relative_step=False, directions=4)
    parameter.grad = torch.randn(40, rank) @ torch.randn(rank, 60)
    optimizer.step()
    assert parameter.isfinite().all()
    assert 0.05 < float(parameter.detach().square().mean().sqrt()) < 1.1


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (30, 30)])
def test_a_step_of_the_optimizer_equals_the_oracle_and_gives_what_was_cut_to_the_rest(shape):
    parameter = torch.nn.Parameter(torch.zeros(shape))
    optimizer = SGCAdamW([parameter], lr=1.0, relative_step=False, directions=4, seed=9)
    parameter.grad = spiked(*shape, seed=3)
    optimizer.step()
    update = reference.FactoredMoment(*shape, BETA).update(parameter.grad)
    norm = min(float(update.norm()), update.numel() ** 0.5)
    # At its first step the sketch is that of the next seed.
    expected = reference.cut_directions(update, sketch_matrix(4, min(shape), seed=9 + 1), 1, LIMIT)
    expected *= norm / expected.norm()
    error = float((-parameter.detach().double() - expected).norm() / expected.norm())
    assert error < 1e-3, error


def test_a_sketch_is_drawn_from_its_seed_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one, again, other = sketch_matrix(4, 40, 2), sketch_matrix(4, 40, 2), sketch_matrix(4, 40, 3)
    assert torch.equal(torch.rand(3), expected)
    assert one.shape == (4, 40)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("shape", [(192, 192), (768, 192), (192, 768)])
def test_steps_along_gradients_of_few_tokens_have_the_size_of_all_others(rank, shape):
    for scale in (1e-3, 1e-8, 1e-20, 1e-25):
        parameter = torch.nn.Parameter(torch.randn(shape) * 0.05)
        optimizer = SGCAdamW([parameter], lr=1e-3 * USUAL_SCALE)
        for _ in range(4):
            before = parameter.detach().clone()
            parameter.grad = torch.randn(shape[0], rank) @ torch.randn(rank, shape[1]) * scale
            optimizer.step()
            moved = float((parameter.detach() - before).norm() / before.norm())
            assert moved < 1.05e-3, f"{moved} at scale {scale}"
