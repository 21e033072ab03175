"""The mathematics of SGC: measured moments are measurements of Adam's, decoding is exact where it should be, limit cases."""

import pytest
import torch

from hf_ext.trainers.measurements import KINDS, Measurement, omp
from hf_ext.trainers.sgc import (
    Moments,
    block_direction,
    decode_quality,
    hybrid_direction,
    measured_direction,
    project_basis,
)
from hf_ext.trainers.sgc_optimizer import SGCAdamW
from tests.reference import sgc as reference


BETAS, EPS = (0.9, 0.999), 1e-8


def at(step):
    return Moments(*BETAS, EPS, step)


def matrix_of(measurement):
    return measurement.project(torch.eye(measurement.chunk_size)).T


def gradients(steps, chunks, n, seed=11):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, chunks, n, generator=generator).pow(3)


def sparse(chunks, n, s, seed=12):
    generator = torch.Generator().manual_seed(seed)
    places = torch.stack([torch.randperm(n, generator=generator)[:s] for _ in range(chunks)])
    return torch.zeros(chunks, n).scatter_(1, places, torch.randn(chunks, s, generator=generator))


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("recover", ["known", "omp"])
@pytest.mark.parametrize("kind", KINDS)
def test_measured_moments_are_measurements_of_the_moments_of_adam(kind, recover):
    measurement = Measurement(kind, 16, 64, seed=3)
    matrix = matrix_of(measurement).double()
    first, second = torch.zeros(3, 16), torch.zeros(3, 16)
    dense = [reference.DenseMoments(64, 4, BETAS) for _ in range(3)]
    for step, gradient in enumerate(gradients(25, 3, 64), start=1):
        measured_direction(gradient, first, second, at(step), measurement, 4, recover)
        for oracle, chunk in zip(dense, gradient):
            oracle.feed(chunk)
    for chunk, oracle in enumerate(dense):
        torch.testing.assert_close(first[chunk].double(), matrix @ oracle.first, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(second[chunk].double(), matrix @ oracle.second, rtol=1e-5, atol=1e-5)


def test_the_optimizer_keeps_the_measurements_of_the_moments_of_adam():
    parameter = torch.nn.Parameter(torch.zeros(100))
    optimizer = SGCAdamW(
        [parameter], mode="paper", k=16, s=4, chunk_size=64, min_numel=1, measurement="gaussian", seed=5
    )
    matrix = matrix_of(Measurement("gaussian", 16, 64, seed=5)).double()
    dense = [reference.DenseMoments(64, 4, BETAS) for _ in range(2)]
    for gradient in gradients(10, 1, 100)[:, 0]:
        parameter.grad = gradient.clone()
        optimizer.step()
        for oracle, chunk in zip(dense, reference.chunks_of(gradient, 64)):
            oracle.feed(chunk)
    for name in ("first", "second"):
        expected = torch.stack([matrix @ getattr(oracle, name) for oracle in dense])
        torch.testing.assert_close(optimizer.state[parameter][name].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_with_all_entries_and_an_orthogonal_matrix_it_is_adamw(weight_decay):
    shapes = [(16, 24), (100,)]
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    settings = {"mode": "paper", "k": 64, "s": 64, "chunk_size": 64, "measurement": "srht", "min_numel": 1}
    one = SGCAdamW(ours, lr=1e-3, weight_decay=weight_decay, **settings)
    other = torch.optim.AdamW(theirs, lr=1e-3, weight_decay=weight_decay)
    for _ in range(50):
        for left, right in zip(ours, theirs):
            # Bounded away from zero: a square that is 1e-7 of the chunk's largest is lost in float32 measurements.
            drawn = torch.randn(left.shape, generator=generator)
            left.grad = drawn + 0.3 * drawn.sign()
            right.grad = left.grad.clone()
        one.step()
        other.step()
    for left, right in zip(ours, theirs):
        assert float((left - right).detach().abs().max()) < 1e-5


@pytest.mark.parametrize("recover", ["known", "omp"])
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_support_that_never_changes_it_is_adamw_there(kind, recover):
    s, k, n = 4, 40, 64
    support, signs = torch.tensor([3, 17, 40, 63]), torch.tensor([1.0, -1.0, -1.0, 1.0])
    ours, theirs = torch.nn.Parameter(torch.zeros(n)), torch.nn.Parameter(torch.zeros(s))
    settings = {"mode": "paper", "k": k, "s": s, "chunk_size": n, "measurement": kind, "min_numel": 1, "seed": 2}
    one = SGCAdamW([ours], lr=1e-3, recover=recover, **settings)
    other = torch.optim.AdamW([theirs], lr=1e-3, weight_decay=0.0)
    for _ in range(30):
        values = signs * (1.0 + torch.rand(s))
        noise = 0.1 * torch.rand(n)
        ours.grad = noise.index_copy(0, support, values)
        theirs.grad = values
        one.step()
        other.step()
    assert float((ours[support] - theirs).detach().abs().max()) < 1e-5
    others = torch.ones(n, dtype=torch.bool).index_fill(0, support, False)
    assert not ours.detach()[others].any()


@pytest.mark.parametrize(
    ("kind", "recover"), [("gaussian", "known"), ("srht", "known"), ("gaussian", "omp"), ("srht", "omp")]
)
@pytest.mark.parametrize("residual", ["none", "chunk"])
def test_a_run_equals_the_oracle_chunk_by_chunk(kind, recover, residual):
    measurement = Measurement(kind, 40, 64, seed=3)
    matrix = matrix_of(measurement)
    first, second = torch.zeros(3, 40), torch.zeros(3, 40)
    oracles = [reference.MeasuredChunk(matrix, 3, BETAS, EPS, recover, residual) for _ in range(3)]
    for step, gradient in enumerate(gradients(5, 3, 64), start=1):
        found = measured_direction(gradient, first, second, at(step), measurement, 3, recover, residual=residual)
        expected = torch.stack([oracle.direction(chunk) for oracle, chunk in zip(oracles, gradient)])
        assert relative(found, expected) < 2e-3, step


def test_the_compressed_quotient_of_the_first_step_is_a_measurement_of_signs():
    measurement = Measurement("gaussian", 16, 64, seed=3)
    first, second = torch.zeros(2, 16), torch.zeros(2, 16)
    gradient = gradients(1, 2, 64)[0]
    found = measured_direction(gradient, first, second, at(1), measurement, 4, moment_space="compressed")
    matrix = matrix_of(measurement).double()
    for chunk in range(2):
        places = reference.largest(gradient[chunk], 4)
        signs = (matrix @ reference.keep(gradient[chunk].double(), places)).sign()
        expected = reference.least_squares(matrix, signs, places, 1e-6)
        torch.testing.assert_close(found[chunk, places].double(), expected, rtol=1e-3, atol=1e-4)
        assert int((found[chunk] != 0).sum()) == 4


def test_entries_without_a_second_moment_do_not_explode():
    # The other entries of the support changed: their decoded second moments are errors, some below zero.
    measurement = Measurement("gaussian", 8, 64, seed=3)
    first, second = torch.zeros(20, 8), torch.zeros(20, 8)
    for step, gradient in enumerate(gradients(40, 20, 64), start=1):
        found = measured_direction(gradient, first, second, at(step), measurement, 4)
        assert found.isfinite().all()
        assert float(found.abs().max()) < 1e4, step


def rate(k, n=1024, s=16, vectors=200):
    measurement = Measurement("gaussian", k, n, seed=0)
    x = sparse(vectors, n, s)
    places, values = omp(measurement, measurement.project(x), s)
    found = torch.zeros_like(x).scatter_(1, places, values)
    return float(((found - x).norm(dim=1) <= 1e-3 * x.norm(dim=1)).float().mean())


def test_sparse_vectors_are_found_again_with_enough_measurements_and_not_with_half():
    assert rate(128) >= 0.95
    assert rate(64) < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_pursuit_equals_the_textbook_vector_by_vector(kind):
    measurement = Measurement(kind, 48, 128, seed=1)
    matrix = matrix_of(measurement)
    y = measurement.project(gradients(1, 6, 128)[0])
    places, values = omp(measurement, y, 7)
    for chunk in range(6):
        expected_places, expected_values = reference.omp(matrix, y[chunk], 7)
        assert places[chunk].tolist() == expected_places
        torch.testing.assert_close(values[chunk].double(), expected_values, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_pursuit_of_zeros_gives_zeros_next_to_other_chunks(kind):
    measurement = Measurement(kind, 16, 64, seed=1)
    x = sparse(3, 64, 3)
    x[1] = 0.0
    places, values = omp(measurement, measurement.project(x), 6)
    assert not values[1].any()
    assert values.isfinite().all()
    assert all(len(set(row.tolist())) == places.shape[1] for row in places)
    _, values = omp(measurement, torch.zeros(2, 16), 6)
    assert not values.any()


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_pursuit_does_not_depend_on_scale(scale):
    measurement = Measurement("gaussian", 48, 128, seed=1)
    y = measurement.project(sparse(5, 128, 4))
    places, values = omp(measurement, y, 6)
    scaled_places, scaled_values = omp(measurement, y * scale, 6)
    assert torch.equal(places, scaled_places)
    torch.testing.assert_close(scaled_values / scale, values, rtol=1e-4, atol=1e-5)


def test_pursuit_stops_when_everything_is_explained_and_takes_no_more_atoms_than_measurements():
    measurement = Measurement("gaussian", 48, 128, seed=1)
    places, _ = omp(measurement, measurement.project(sparse(5, 128, 4)), 40)
    assert places.shape[1] < 10
    small = Measurement("gaussian", 4, 32, seed=1)
    places, values = omp(small, torch.randn(5, 4), 20)
    assert places.shape[1] <= 4
    assert values.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_hybrid_equals_the_oracle_chunk_by_chunk(kind):
    measurement = Measurement(kind, 16, 64, seed=3)
    first, scale = torch.zeros(3, 16), torch.zeros(3, 1)
    oracles = [reference.HybridChunk(matrix_of(measurement), 4, BETAS, EPS) for _ in range(3)]
    for step, gradient in enumerate(gradients(8, 3, 64), start=1):
        found = hybrid_direction(gradient, first, scale, at(step), measurement, 4)
        expected = torch.stack([oracle.direction(chunk) for oracle, chunk in zip(oracles, gradient)])
        assert relative(found, expected) < 1e-4, step
        assert int((found != 0).sum()) == 3 * 64


def test_block_equals_the_oracle_chunk_by_chunk():
    scale = torch.zeros(3, 1)
    oracles = [reference.BlockChunk(BETAS, EPS) for _ in range(3)]
    for step, gradient in enumerate(gradients(8, 3, 64), start=1):
        found = block_direction(gradient, scale, at(step))
        expected = torch.stack([oracle.direction(chunk) for oracle, chunk in zip(oracles, gradient)])
        assert relative(found, expected) < 1e-5, step


@pytest.mark.parametrize("function", ["measured", "hybrid", "block"])
def test_gradients_are_not_changed(function):
    measurement = Measurement("gaussian", 16, 64, seed=3)
    gradient = gradients(1, 3, 64)[0]
    kept = gradient.clone()
    if function == "measured":
        measured_direction(gradient, torch.zeros(3, 16), torch.zeros(3, 16), at(1), measurement, 4, residual="chunk")
    elif function == "hybrid":
        hybrid_direction(gradient, torch.zeros(3, 16), torch.zeros(3, 1), at(1), measurement, 4)
    else:
        block_direction(gradient, torch.zeros(3, 1), at(1))
    assert torch.equal(gradient, kept)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_basis_is_orthonormal_and_spans_the_leading_directions(rank):
    gradient = torch.randn(8, 20)
    basis = project_basis(gradient, torch.zeros(8, rank))
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank), rtol=0, atol=1e-5)
    expected = reference.leading_basis(gradient, rank)
    torch.testing.assert_close((basis @ basis.T).double(), expected @ expected.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("gradient", [torch.zeros(8, 20), torch.full((8, 20), float("nan"))], ids=["zero", "nan"])
def test_a_gradient_without_directions_keeps_the_basis(gradient):
    kept = project_basis(torch.randn(8, 20), torch.zeros(8, 3))
    assert torch.equal(project_basis(gradient, kept), kept)
    assert not project_basis(gradient, torch.zeros(8, 3)).any()


def test_a_projection_is_made_at_the_first_gradient_that_is_not_zero():
    parameter = torch.nn.Parameter(torch.zeros(8, 40))
    optimizer = SGCAdamW([parameter], lr=0.1, mode="paper", rank=3, k=24, s=4, chunk_size=64, min_numel=1, refresh=100)
    for number in range(3):
        parameter.grad = torch.zeros(8, 40) if number < 2 else torch.randn(8, 40)
        optimizer.step()
        assert bool(optimizer.state[parameter]["basis"].any()) is (number == 2)
        assert bool(parameter.any()) is (number == 2)
    expected = reference.leading_basis(parameter.grad, 3)
    found = optimizer.state[parameter]["basis"]
    torch.testing.assert_close((found @ found.T).double(), expected @ expected.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_a_basis_does_not_depend_on_scale(scale):
    gradient = torch.randn(8, 20)
    found = project_basis(gradient * scale, torch.zeros(8, 3))
    expected = reference.leading_basis(gradient, 3)
    torch.testing.assert_close((found @ found.T).double(), expected @ expected.T, rtol=0, atol=1e-4)


def test_the_first_step_of_the_projected_variant_equals_the_oracle():
    parameter = torch.nn.Parameter(torch.zeros(8, 40))
    settings = {
        "mode": "paper",
        "k": 24,
        "s": 4,
        "chunk_size": 64,
        "rank": 3,
        "min_numel": 1,
        "measurement": "gaussian",
    }
    optimizer = SGCAdamW([parameter], lr=1.0, **settings)
    parameter.grad = gradients(1, 8, 40)[0]
    optimizer.step()
    expected = -reference.projected_first_step(parameter.grad, 3, 4, 64)
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("recover", ["known", "omp"])
def test_quality_is_the_share_kept_and_the_share_left_over(recover):
    measurement = Measurement("gaussian", 24, 64, seed=3)
    matrix = matrix_of(measurement).double()
    gradient, first = gradients(1, 3, 64)[0], torch.randn(3, 24)
    found = decode_quality(gradient, first, measurement, 4, recover)
    kept = left = 0.0
    for chunk in range(3):
        places = reference.largest(gradient[chunk], 4)
        kept += float(sum(gradient[chunk, i] ** 2 for i in places))
        y = first[chunk].double()
        if recover == "omp":
            places, values = reference.omp(matrix, y, 4)
        else:
            values = reference.least_squares(matrix, y, places)
        left += float((y - matrix[:, places] @ values).square().sum())
    expected = torch.tensor([kept, float(gradient.square().sum()), left, float(first.square().sum())])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
