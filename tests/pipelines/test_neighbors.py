"""The search in two stages against sorting all distances."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_ext.pipelines.neighbors import GROUP, mean_distances, nearest, without_self


def _whole(n, d, seed, span):
    """Rows of small integers: their distances are exact in float32, and many are equal."""
    return torch.randint(-span, span + 1, (n, d), generator=torch.Generator().manual_seed(seed)).float()


def _brute(rows, references):
    return torch.tensor(
        [[sum((a - b) ** 2 for a, b in zip(row, other)) for other in references.tolist()] for row in rows.tolist()]
    )


@st.composite
def _cases(draw):
    groups = draw(st.integers(0, 7))
    r = max(1, GROUP * groups + draw(st.integers(-1, 1)))
    count = draw(st.one_of(st.integers(1, min(r, 8)), st.just(r)))
    return (
        r,
        count,
        draw(st.integers(1, 4)),
        draw(st.integers(1, 6)),
        draw(st.integers(0, 9)),
        draw(st.integers(0, 2**20)),
    )


@settings(max_examples=120, deadline=None, derandomize=True)
@given(_cases())
@example((1, 1, 1, 1, 0, 0))
@example((GROUP * 7, 3, 2, 5, 0, 0))
@example((GROUP * 7 + 1, 3, 2, 5, 1, 1))
@example((GROUP * 7 - 1, 3, 2, 5, 9, 2))
def test_the_nearest_are_those_of_sorting_all_distances_whatever_the_ties(case):
    r, count, d, n, span, seed = case
    rows, references = _whole(n, d, seed, span), _whole(r, d, seed + 1, span)
    squares, places = nearest(rows, references, count)
    everything = _brute(rows, references)
    assert torch.equal(squares, everything.sort(1).values[:, :count])
    assert torch.equal(everything.gather(1, places), squares), "the numbers are not those of the distances"
    assert all(len(set(row)) == count for row in places.tolist()), "a reference was named twice"


def test_many_references_are_searched_as_few():
    generator = torch.Generator().manual_seed(0)
    rows, references = torch.randn(40, 6, generator=generator), torch.randn(1003, 6, generator=generator)
    squares, places = nearest(rows, references, 6)
    expected = torch.cdist(rows.double(), references.double()).square().sort(1)
    torch.testing.assert_close(squares.double(), expected.values[:, :6], rtol=1e-5, atol=1e-6)
    assert torch.equal(places, expected.indices[:, :6])


def test_the_smallest_may_lie_in_one_group_or_in_the_rest():
    references = torch.full((GROUP * 20 + 5, 1), 100.0)
    near = [7, 27, 47, 67, GROUP * 20 + 4]
    references[near, 0] = torch.arange(1.0, 6.0)
    squares, places = nearest(torch.zeros(1, 1), references, 5)
    assert places.tolist() == [near]
    assert squares.tolist() == [[1.0, 4.0, 9.0, 16.0, 25.0]]


def test_a_row_that_equals_a_reference_has_the_distance_zero_thirty_deviations_out():
    references = 30 + torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    assert (nearest(references[:50], references, 3)[0][:, 0] == 0).all()


def test_one_reference_that_equals_the_row_does_not_count_and_a_second_does():
    references = torch.tensor([[0.0], [1.0], [3.0], [6.0]])
    found = mean_distances(torch.tensor([[0.0], [0.5]]), references, 2)
    assert found.tolist() == pytest.approx([5**0.5, 0.5])
    twice = torch.cat([references, references[:1]])
    assert mean_distances(torch.tensor([[0.0]]), twice, 2).tolist() == pytest.approx([0.5**0.5])


def test_without_self_leaves_out_one_of_each_row():
    squares = torch.tensor([[0.0, 0.0, 4.0], [1.0, 2.0, 3.0]])
    assert without_self(squares, torch.zeros(2, 1)).tolist() == [[0.0, 4.0], [1.0, 2.0]]


def test_no_rows_have_no_neighbours():
    squares, places = nearest(torch.zeros(0, 3), torch.zeros(50, 3), 2)
    assert squares.shape == places.shape == (0, 2)
