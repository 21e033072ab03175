"""AUROC, AUPR and FPR95 in both conventions, on examples done by hand and against a loop over thresholds."""

import builtins

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_ext.errors import DataError, MissingPackageError
from hf_ext.pipelines.ood_metrics import ood_metrics
from tests.reference import medix_naive as naive


pytest.importorskip("sklearn")

SCORES = st.lists(st.integers(-4, 4), min_size=1, max_size=45)


def test_six_points_with_ties_by_hand():
    found = ood_metrics([1.0, 2.0, 3.0, 2.0, 3.0, 4.0], [0, 0, 0, 1, 1, 1])
    # All three in-distribution rows are accepted at 3, with them two of the three OOD rows.
    assert found["fpr95_id_pos"] == pytest.approx(2 / 3)
    # All three OOD rows are caught at 2, with them two of the three in-distribution rows.
    assert found["fpr95_ood_pos"] == pytest.approx(2 / 3)
    assert found["auroc"] == pytest.approx((3 + 2.5 + 1.5) / 9)
    # Precision at the thresholds 4, 3 and 2 is 1, 2/3 and 3/5, and each gains a third of the recall.
    assert found["aupr_out"] == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    assert found["aupr_in"] == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)


def test_the_two_conventions_are_different_numbers():
    # One in-distribution row lies above all OOD rows: accepting 95 % of ten takes it in, and with it everything.
    found = ood_metrics([0.0] * 9 + [5.0] + [1.0, 2.0], [0] * 10 + [1, 1])
    assert found["fpr95_id_pos"] == 1.0
    assert found["fpr95_ood_pos"] == pytest.approx(0.1)


def test_nineteen_of_twenty_are_enough():
    found = ood_metrics([0.0] * 19 + [5.0] + [1.0, 2.0], [0] * 20 + [1, 1])
    assert found["fpr95_id_pos"] == 0.0


def test_perfect_and_constant_scores():
    perfect = ood_metrics([0.0, 0.1, 0.9, 1.0], [False, False, True, True])
    assert perfect == {"auroc": 1.0, "aupr_in": 1.0, "aupr_out": 1.0, "fpr95_id_pos": 0.0, "fpr95_ood_pos": 0.0}
    constant = ood_metrics([3.0] * 5, [0, 0, 0, 1, 1])
    assert constant["auroc"] == 0.5
    assert constant["fpr95_id_pos"] == constant["fpr95_ood_pos"] == 1.0
    assert constant["aupr_out"] == pytest.approx(0.4)
    assert constant["aupr_in"] == pytest.approx(0.6)


@given(SCORES, SCORES)
def test_equal_to_loops_over_pairs_and_thresholds(inside, outside):
    found = ood_metrics(np.array(inside + outside, dtype=float), np.r_[np.zeros(len(inside)), np.ones(len(outside))])
    assert found["auroc"] == pytest.approx(naive.auroc(inside, outside))
    assert found["fpr95_ood_pos"] == pytest.approx(naive.fpr_at_recall(outside, inside))
    flipped = [-value for value in inside], [-value for value in outside]
    assert found["fpr95_id_pos"] == pytest.approx(naive.fpr_at_recall(*flipped))
    assert found["aupr_out"] == pytest.approx(naive.average_precision(outside, inside))
    assert found["aupr_in"] == pytest.approx(naive.average_precision(*flipped))


@pytest.mark.parametrize(
    ("scores", "kinds", "message"),
    [
        ([1.0, 2.0], [0], "shape"),
        ([[1.0], [2.0]], [[0], [1]], "one number a row"),
        ([1.0, float("nan")], [0, 1], "1 of 2 scores are NaN"),
        ([1.0, float("inf")], [0, 1], "1 of 2 scores are NaN or infinite"),
        ([1.0, 2.0], [0, 0], "marks 0 of 2"),
        ([1.0, 2.0], [1, 1], "marks 2 of 2"),
        ([1.0, 2.0], [0, 2], "holds 2"),
        ([], [], "marks 0 of 0"),
    ],
)
def test_bad_input_is_named(scores, kinds, message):
    with pytest.raises(DataError, match=message):
        ood_metrics(scores, kinds)


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingPackageError, match=r"hf-ext\[detect\]"):
        ood_metrics(torch.tensor([0.0, 1.0]), torch.tensor([0, 1]))


def test_six_points_where_every_number_is_another():
    """In-distribution 0, 1, 3, 3; OOD 3, 5. By hand."""
    found = ood_metrics([0.0, 1.0, 3.0, 3.0, 3.0, 5.0], [0, 0, 0, 0, 1, 1])
    # 95 % of four in-distribution rows are four: accepted up to 3, with one of two OOD rows.
    assert found["fpr95_id_pos"] == 0.5
    # 95 % of two OOD rows are two: caught from 3 on, with two of four in-distribution rows.
    assert found["fpr95_ood_pos"] == 0.5
    assert found["auroc"] == pytest.approx((2 + 2 * 0.5 + 4) / 8)
    # OOD from above: 5 is right (1/1), then 3 brings one OOD and two in-distribution rows (2/4).
    assert found["aupr_out"] == pytest.approx((1 + 2 / 4) / 2)
    # In-distribution from below: 0 and 1 are right, 3 brings two more and one OOD row (4/5).
    assert found["aupr_in"] == pytest.approx((1 + 1 + 2 * 4 / 5) / 4)


@pytest.mark.parametrize("count", [1, 2, 19, 20, 21, 39, 40, 100, 1000])
def test_the_recall_is_at_least_95_percent_and_no_more_rows_than_needed(count):
    """The in-distribution rows 0 to count - 1; an OOD row just above each of them. Exact in integers."""
    inside = np.arange(count, dtype=float)
    found = ood_metrics(np.r_[inside, inside + 0.5], np.r_[np.zeros(count), np.ones(count)])
    needed = next(k for k in range(1, count + 1) if 100 * k >= 95 * count)
    assert found["fpr95_id_pos"] == pytest.approx((needed - 1) / count)
    assert found["fpr95_ood_pos"] == pytest.approx((needed - 1) / count)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_types_of_scores_and_marks_make_no_difference(dtype):
    scores = torch.tensor([1, 2, 3, 2, 3, 4]).to(dtype)
    marks = torch.tensor([0, 0, 0, 1, 1, 1])
    expected = ood_metrics([1.0, 2.0, 3.0, 2.0, 3.0, 4.0], [0, 0, 0, 1, 1, 1])
    for kind in (marks, marks.bool(), marks.float(), marks.numpy(), marks.bool().numpy(), marks.tolist()):
        assert ood_metrics(scores, kind) == expected
    if dtype != torch.bfloat16:
        assert ood_metrics(scores.numpy(), marks) == expected
    assert all(type(value) is float for value in expected.values())


def test_turning_scores_and_marks_around_swaps_the_conventions():
    generator = torch.Generator().manual_seed(0)
    scores, marks = torch.randn(60, generator=generator).round(decimals=1), torch.arange(60) % 3 == 0
    one, other = ood_metrics(scores, marks), ood_metrics(-scores, ~marks)
    assert one["auroc"] == pytest.approx(other["auroc"])
    assert one["aupr_in"] == pytest.approx(other["aupr_out"])
    assert one["aupr_out"] == pytest.approx(other["aupr_in"])
    assert one["fpr95_id_pos"] == other["fpr95_ood_pos"]
    assert one["fpr95_ood_pos"] == other["fpr95_id_pos"]


@pytest.mark.parametrize(("scores", "kinds"), [(["high", "low"], [0, 1]), ([1.0, 2.0], ["in", "out"]), (None, [0])])
def test_what_is_no_number_is_a_typed_error(scores, kinds):
    with pytest.raises(DataError, match="(scores|is_ood) come as a .* that holds no numbers"):
        ood_metrics(scores, kinds)
