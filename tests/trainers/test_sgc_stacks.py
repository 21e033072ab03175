"""Matrices of one shape are worked on together: as many at a time as fit, and as each would be alone."""

import pytest
import torch

from hf_ext.trainers import sgc_optimizer
from hf_ext.trainers.factored import cut_directions_, sketch_matrix
from hf_ext.trainers.sgc_optimizer import SGCAdamW
from tests.trainers.helpers import assert_same, build, feed, gradient, settings, snapshot, through_disk


ALIKE = [(24, 40), (24, 40), (3, 24, 40), (24, 40), (40, 24)]


def stacks_of(monkeypatch):
    """Entries of every stack that is worked on, filled as steps are made."""
    seen, usual = [], SGCAdamW._update_factored

    def watched(optimizer, group, stack):
        seen.append([tuple(parameter.shape) for parameter, _ in stack])
        return usual(optimizer, group, stack)

    monkeypatch.setattr(SGCAdamW, "_update_factored", watched)
    return seen


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (1 << 20, [ALIKE[:4], ALIKE[4:]]),
        (2000, [ALIKE[:2], ALIKE[2:3], ALIKE[3:4], ALIKE[4:]]),
        (1, [[shape] for shape in ALIKE]),
    ],
)
def test_a_stack_holds_no_more_than_fits(monkeypatch, most, expected):
    monkeypatch.setattr(sgc_optimizer, "STACK_ENTRIES", most)
    seen = stacks_of(monkeypatch)
    parameters, optimizer = build("factored", shapes=ALIKE)
    feed(optimizer, parameters, [0])
    assert seen == expected


@pytest.mark.parametrize("relative", [True, False])
def test_together_matrices_move_as_each_alone(monkeypatch, relative):
    parameters, together = build("factored", shapes=ALIKE, weight_decay=0.1, relative_step=relative)
    others, apart = build("factored", shapes=ALIKE, weight_decay=0.1, relative_step=relative)
    feed(together, parameters, range(4))
    monkeypatch.setattr(sgc_optimizer, "STACK_ENTRIES", 1)
    feed(apart, others, range(4))
    for left, right in zip(snapshot(together), snapshot(apart)):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stack_resumes_exactly(dtype, state_dtype):
    parameters, whole = build("factored", shapes=ALIKE, dtype=dtype, state_dtype=state_dtype)
    feed(whole, parameters, range(3))
    half, saved = [torch.nn.Parameter(p.detach().clone()) for p in parameters], through_disk(whole.state_dict())
    feed(whole, parameters, range(3, 6))
    resumed = SGCAdamW(half, **settings("factored", state_dtype=state_dtype))
    resumed.load_state_dict(saved)
    feed(resumed, half, range(3, 6))
    assert_same(snapshot(whole), snapshot(resumed))


def test_a_matrix_that_missed_a_step_has_a_stack_of_its_own(monkeypatch):
    seen = stacks_of(monkeypatch)
    parameters, optimizer = build("factored", shapes=ALIKE[:2])
    feed(optimizer, parameters[:1], [0])
    feed(optimizer, parameters, [1])
    assert seen == [[ALIKE[0]], [ALIKE[0]], [ALIKE[1]]]
    assert [int(optimizer.state[p]["step"]) for p in parameters] == [2, 1]


@pytest.mark.parametrize("shape", [(1024, 96), (96, 1024), (1024, 1024)])
@pytest.mark.parametrize("part", range(4))
def test_directions_are_found_where_half_of_a_side_is_empty(shape, part):
    # Positions of a batch of short texts, rare words: their rows stand together and have no gradient.
    torch.manual_seed(0)
    update = torch.randn(shape)
    update += 20.0 * torch.randn(shape[0], 1) @ torch.randn(1, shape[1])
    longer = 0 if shape[0] >= shape[1] else 1
    update.narrow(longer, 512, 512).zero_()
    before = torch.linalg.svdvals(update)
    cut_directions_(update[None], update.norm()[None], sketch_matrix(6, min(shape), part), part)
    after = torch.linalg.svdvals(update)
    assert float(before[0]) > 50 * float(before[1])
    assert float(after[0]) < 2.0 * float(before[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_floating_types_train_too(dtype):
    parameters, optimizer = build("factored", dtype=dtype)
    before = [p.detach().clone() for p in parameters]
    feed(optimizer, parameters, range(3))
    for old, new in zip(before, parameters):
        assert new.dtype == dtype
        assert new.isfinite().all()
        assert not torch.equal(old, new)


def test_a_gradient_of_zeros_leaves_weights_as_they_are_without_denormals_too():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        (parameter,), optimizer = build("factored", shapes=[(24, 40)], eps=0.0)
        before = parameter.detach().clone()
        parameter.grad = torch.zeros(24, 40)
        optimizer.step()
        assert torch.equal(parameter, before)
    finally:
        torch.set_flush_denormal(False)


def test_between_steps_nothing_is_kept_but_the_state():
    parameters, optimizer = build("paper")
    before = set(vars(optimizer))
    optimizer.monitor = True
    feed(optimizer, parameters, [0])
    assert set(vars(optimizer)) == before


def test_clipped_gradients_are_those_that_count():
    parameters, clipped = build("factored", shapes=[(24, 40), (5,)], eps=1.0)
    others, scaled = build("factored", shapes=[(24, 40), (5,)], eps=1.0)
    norm = torch.cat([gradient(p, n, 0).flatten() for n, p in enumerate(parameters)]).norm()
    for number, (one, other) in enumerate(zip(parameters, others)):
        one.grad, other.grad = gradient(one, number, 0), gradient(other, number, 0) / norm
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    clipped.step()
    scaled.step()
    for one, other in zip(parameters, others):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
