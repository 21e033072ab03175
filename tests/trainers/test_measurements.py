"""Measurement matrices: one matrix per seed wherever it is drawn, unit columns, an adjoint, and no more memory than told."""

import subprocess
import sys

import pytest
import torch

from hf_ext.errors import ConfigError
from hf_ext.trainers.measurements import KINDS, Measurement, omp, solve_on_support, top_entries
from tests.reference import sgc as reference


SIZES = [(12, 32), (40, 128), (64, 64), (5, 8), (1, 1), (2, 2), (1, 16)]


def matrix_of(measurement):
    """`(K, N)`, column by column."""
    return measurement.project(torch.eye(measurement.chunk_size)).T


@pytest.mark.parametrize(("k", "n"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_correlating_is_the_adjoint_of_projecting(kind, k, n):
    measurement = Measurement(kind, k, n, seed=3)
    x, y = torch.randn(6, n), torch.randn(6, k)
    assert measurement.project(x).shape == (6, k)
    assert measurement.correlate(y).shape == (6, n)
    left = (measurement.project(x).double() * y.double()).sum(1)
    right = (x.double() * measurement.correlate(y).double()).sum(1)
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("k", "n"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_projecting_is_a_product_with_one_matrix_of_unit_columns(kind, k, n):
    measurement = Measurement(kind, k, n, seed=3)
    matrix = matrix_of(measurement)
    assert matrix.shape == (k, n)
    torch.testing.assert_close(matrix.norm(dim=0), torch.ones(n), rtol=1e-5, atol=1e-5)
    x = torch.randn(6, n)
    torch.testing.assert_close(measurement.project(x), x @ matrix.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(measurement.gram(), matrix.T @ matrix, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_alone_decides_the_matrix(kind):
    one, again, other = (Measurement(kind, 12, 32, seed) for seed in (5, 5, 6))
    assert torch.equal(matrix_of(one), matrix_of(again))
    assert one.checksum == again.checksum
    assert not torch.equal(matrix_of(one), matrix_of(other))
    assert one.checksum != other.checksum


@pytest.mark.parametrize("kind", KINDS)
def test_drawing_leaves_the_global_generator_alone(kind):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    Measurement(kind, 12, 32, 0)
    assert torch.equal(torch.rand(3), expected)


def test_another_process_draws_the_same_matrices():
    script = (
        "from hf_ext.trainers.measurements import KINDS, Measurement\n"
        "for kind in KINDS: print(repr(Measurement(kind, 20, 64, 9).checksum))"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed.split("\n")[:-1] == [repr(Measurement(kind, 20, 64, 9).checksum) for kind in KINDS]


@pytest.mark.parametrize("n", [1, 2, 8, 32, 64, 1024])
def test_all_rows_of_srht_make_an_orthogonal_matrix(n):
    measurement = Measurement("srht", n, n, seed=0)
    torch.testing.assert_close(measurement.gram(), torch.eye(n), rtol=0, atol=1e-5)
    x = torch.randn(3, n)
    torch.testing.assert_close(measurement.correlate(measurement.project(x)), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [2, 8, 32, 128])
def test_srht_has_the_rows_of_a_hadamard_matrix_by_bits(n):
    # Entry (i, j) of the Hadamard matrix is the parity of the bits that i and j share.
    by_bits = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(n)] for i in range(n)])
    matrix = matrix_of(Measurement("srht", n // 2, n, seed=4)) * (n // 2) ** 0.5
    # Signs of columns cancel in a product of two rows, which is a row of the Hadamard matrix again.
    products = (matrix * matrix[0]).round(decimals=3)
    found = [[torch.equal(product, row) for row in by_bits].index(True) for product in products]
    assert len(set(found)) == n // 2


@pytest.mark.parametrize("k", [1, 2, 3, 4, 12, 32])
def test_a_column_of_countsketch_has_one_entry_in_each_of_four_parts(k):
    matrix = matrix_of(Measurement("countsketch", k, 64, seed=0))
    hashes = min(4, k)
    assert (matrix != 0).sum(0).tolist() == [hashes] * 64
    edges = [k * part // hashes for part in range(hashes + 1)]
    for low, high in zip(edges[:-1], edges[1:]):
        assert (matrix[low:high] != 0).sum(0).tolist() == [1] * 64


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_are_kept_on_average(kind):
    x = torch.randn(400, 256)
    shares = Measurement(kind, 64, 256, seed=99).project(x).square().sum(1) / x.square().sum(1)
    assert float(shares.mean()) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_order_of_chunks_does_not_matter(kind):
    measurement = Measurement(kind, 12, 32, seed=0)
    x, y = torch.randn(32, 6), torch.randn(12, 6)
    torch.testing.assert_close(measurement.project(x.T), measurement.project(x.T.contiguous()), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        measurement.correlate(y.T), measurement.correlate(y.T.contiguous()), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_every_tensor_it_holds(kind):
    measurement = Measurement(kind, 16, 1024, seed=0)
    held, waiting = 0, [vars(measurement)]
    while waiting:
        item = waiting.pop()
        if isinstance(item, torch.Tensor):
            held += item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list | tuple):
            waiting += item
    measurement.project(torch.randn(2, 1024))
    measurement.gram()
    assert measurement.nbytes == held


def test_structured_kinds_keep_a_few_numbers_a_column():
    k, n = 16, 1 << 14
    assert Measurement("gaussian", k, n, 0).nbytes == 4 * k * n
    # Signs, the chosen rows, two transforms of the root of n.
    assert Measurement("srht", k, n, 0).nbytes <= 4 * n + 8 * k + 2 * 4 * n
    assert Measurement("countsketch", k, n, 0).nbytes <= 4 * n * (8 + 4)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("fourier", 4, 8), "measurement='fourier'"),
        (("gaussian", 9, 8), "k=9"),
        (("gaussian", 0, 8), "k=0"),
        (("srht", 4, 12), "chunk_size=12"),
    ],
)
def test_what_makes_no_matrix_is_refused(arguments, word):
    with pytest.raises(ConfigError, match=word):
        Measurement(*arguments, seed=0)


def test_top_entries_are_those_of_a_sort():
    x = torch.randn(5, 40)
    for row, places in zip(x, top_entries(x, 7)):
        assert set(places.tolist()) == set(reference.largest(row, 7))


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 1e-2, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_solving_on_a_support_is_ridge_regression_chunk_by_chunk(kind, ridge):
    measurement = Measurement(kind, 32, 64, seed=1)
    matrix = matrix_of(measurement).double()
    support = torch.stack([torch.randperm(64)[:6] for _ in range(5)])
    y = torch.randn(5, 32, 2)
    correlations = torch.stack([measurement.correlate(y[:, :, column]) for column in range(2)], dim=2)
    found = solve_on_support(measurement.gram(), support, correlations, ridge)
    for chunk in range(5):
        for column in range(2):
            expected = reference.least_squares(matrix, y[chunk, :, column].double(), support[chunk].tolist(), ridge)
            torch.testing.assert_close(found[chunk, :, column].double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("k", [16, 32, 64])
def test_a_search_over_chunks_of_all_kinds_ends(k):
    measurement = Measurement("srht", k, 256, 0)
    chunks = torch.zeros(4, 256)
    chunks[0].normal_()
    chunks[1, [3, 70, 200]] = torch.tensor([1.0, -2.0, 0.5])
    chunks[2].fill_(1.0)
    support, values = omp(measurement, measurement.project(chunks), k)
    assert bool(values.isfinite().all())
    found = torch.zeros(4, 256).scatter_(1, support, values)
    assert float((found[1] - chunks[1]).abs().max()) < 0.1
    assert float(values[3].abs().max()) == 0.0
