"""What `SGCAdamW` does to parameters: which entries move and how far, odd shapes and scales, groups, schedulers."""

import copy
import pickle

import pytest
import torch

import hf_ext
from hf_ext.errors import NonFiniteGradientError
from hf_ext.trainers import sgc_optimizer
from hf_ext.trainers.factored import SMALLEST_SCALE, USUAL_SCALE
from hf_ext.trainers.sgc_checks import MODES
from hf_ext.trainers.sgc_optimizer import SGCAdamW
from tests.trainers.helpers import (
    CASES,
    CHUNKED,
    SHAPES,
    assert_same,
    build,
    feed,
    gradient,
    largest_gap,
    make_parameters,
    settings,
    snapshot,
)


def moved_per_chunk(before, after, chunk_size):
    flat = (before != after).flatten().float()
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % chunk_size))
    return flat.view(-1, chunk_size).sum(1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("min_numel", [1, 16])
def test_every_tensor_moves_and_stays_finite_whatever_its_shape(case, dtype, min_numel):
    parameters, optimizer = build(case, [*SHAPES, (1, 1), (40, 1), (1, 40)], dtype=dtype, lr=0.1, min_numel=min_numel)
    before = [p.detach().clone() for p in parameters]
    feed(optimizer, parameters, range(5))
    for old, new in zip(before, parameters):
        assert new.isfinite().all(), tuple(new.shape)
        assert not torch.equal(old, new), tuple(new.shape)


@pytest.mark.parametrize("case", CASES)
def test_steps_lower_a_quadratic_loss(case):
    torch.manual_seed(0)
    goal = torch.randn(24, 40)
    parameter = torch.nn.Parameter(torch.zeros(24, 40))
    optimizer = SGCAdamW([parameter], **settings(case, k=24, lr=0.05, relative_step=False))
    losses = []
    for _ in range(60):
        loss = (parameter - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0], losses[::10]


@pytest.mark.parametrize("measurement", ["gaussian", "srht", "countsketch"])
@pytest.mark.parametrize("recover", ["known", "omp"])
def test_in_paper_mode_at_most_s_entries_of_a_chunk_move(measurement, recover):
    parameters, optimizer = build("paper", shapes=[(24, 40), (70,)], measurement=measurement, recover=recover)
    for step in range(4):
        before = [p.detach().clone() for p in parameters]
        feed(optimizer, parameters, [step])
        for old, new in zip(before, parameters):
            counts = moved_per_chunk(old, new, 32)
            assert counts.max() <= 4, counts
            assert counts.sum() > 0


def test_with_known_support_exactly_the_largest_entries_move():
    (parameter,), optimizer = build("paper", shapes=[(64,)])
    before = parameter.detach().clone()
    feed(optimizer, [parameter], [0])
    expected = torch.zeros(64, dtype=torch.bool)
    for start in (0, 32):
        order = parameter.grad[start : start + 32].abs().argsort(descending=True)
        expected[start + order[:4]] = True
    assert torch.equal(before != parameter, expected)


def test_ties_move_no_more_entries_than_s():
    (parameter,), optimizer = build("paper", shapes=[(64,)])
    before = parameter.detach().clone()
    parameter.grad = torch.ones(64)
    optimizer.step()
    assert moved_per_chunk(before, parameter, 32).tolist() == [4.0, 4.0]


def test_residual_chunk_moves_the_other_entries_too():
    (parameter,), optimizer = build("paper", shapes=[(64,)], residual="chunk")
    before = parameter.detach().clone()
    feed(optimizer, [parameter], [0])
    assert moved_per_chunk(before, parameter, 32).tolist() == [32.0, 32.0]


def test_the_last_chunk_is_padded_and_its_entries_are_normalised_like_those_of_the_oracle():
    (parameter,), optimizer = build("block", shapes=[(40,)], lr=0.1)
    before = parameter.detach().clone()
    feed(optimizer, [parameter], [0])
    for part, entries in ((slice(0, 32), 32), (slice(32, 40), 32)):
        g = parameter.grad[part]
        step = (before[part] - parameter[part]) / 0.1
        expected = g / (g.square().sum() / entries).sqrt()
        torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("case", CASES)
def test_small_tensors_get_the_update_of_adamw(case, weight_decay):
    shapes = [(9,), (), (1, 7)]
    ours, optimizer = build(case, shapes, min_numel=4096, relative_step=False, weight_decay=weight_decay)
    theirs = make_parameters(shapes)
    reference = torch.optim.AdamW(theirs, lr=0.01, weight_decay=weight_decay)
    feed(optimizer, ours, range(20))
    feed(reference, theirs, range(20))
    assert largest_gap(ours, theirs) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_weight_decay_is_decoupled_and_moves_all_entries(case):
    parameters, optimizer = build(case, weight_decay=0.5, lr=0.1)
    others, plain = build(case, weight_decay=0.0, lr=0.1)
    before = [p.detach().clone() for p in parameters]
    feed(optimizer, parameters, [0])
    feed(plain, others, [0])
    for old, new, other in zip(before, parameters, others):
        torch.testing.assert_close(other - new, 0.05 * old, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_gradient_of_zero_moves_nothing(case):
    parameters, optimizer = build(case)
    before = [p.detach().clone() for p in parameters]
    for _ in range(3):
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert_same(before, [p.detach() for p in parameters])
    assert all(tensor.isfinite().all() for tensor in snapshot(optimizer))
    feed(optimizer, parameters, [0])
    assert all(tensor.isfinite().all() for tensor in snapshot(optimizer))
    assert not torch.equal(before[0], parameters[0])


@pytest.mark.parametrize("case", CASES)
def test_a_gradient_of_none_moves_nothing_and_keeps_nothing(case):
    parameters, optimizer = build(case)
    untouched = parameters[0].detach().clone()
    for p in parameters[1:]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(untouched, parameters[0])
    assert parameters[0] not in optimizer.state
    assert parameters[1] in optimizer.state


def test_a_step_without_any_gradient_is_no_error():
    parameters, optimizer = build("factored")
    optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_any_scale_poison_neither_parameters_nor_state(case, scale):
    parameters, optimizer = build(case)
    feed(optimizer, parameters, [0], scale)
    feed(optimizer, parameters, [1, 2], 1.0)
    for tensor in snapshot(optimizer):
        assert tensor.isfinite().all(), f"shape {tuple(tensor.shape)}"


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("case", CASES)
def test_the_scale_of_all_gradients_does_not_matter(case, scale):
    parameters, optimizer = build(case, eps=0.0, k=16, measurement="gaussian")
    others, plain = build(case, eps=0.0, k=16, measurement="gaussian")
    feed(optimizer, parameters, range(3), scale)
    feed(plain, others, range(3))
    assert largest_gap(parameters, others) < 2e-4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("case", CASES)
def test_a_gradient_that_is_not_finite_changes_nothing(case, value):
    parameters, optimizer = build(case)
    feed(optimizer, parameters, range(2))
    before = snapshot(optimizer)
    for number, p in enumerate(parameters):
        p.grad = gradient(p, number, 2)
    parameters[1].grad[0, 0] = value
    with pytest.raises(NonFiniteGradientError, match=r"\(7, 9\)"):
        optimizer.step()
    assert_same(before, snapshot(optimizer))


@pytest.mark.parametrize("case", CASES)
def test_with_skip_a_step_that_is_not_finite_is_left_out(case, caplog):
    parameters, optimizer = build(case, on_nonfinite="skip")
    feed(optimizer, parameters, range(2))
    before = snapshot(optimizer)
    parameters[0].grad = torch.full_like(parameters[0], float("nan"))
    optimizer.step()
    assert_same(before, snapshot(optimizer))
    feed(optimizer, parameters, [2])
    others, plain = build(case)
    feed(plain, others, range(3))
    assert_same([p.detach() for p in others], [p.detach() for p in parameters])


def test_a_group_may_ask_to_skip_on_its_own():
    parameter = torch.nn.Parameter(torch.ones(24, 40))
    optimizer = SGCAdamW([{"params": [parameter], "on_nonfinite": "skip"}])
    parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step()
    assert torch.equal(parameter, torch.ones(24, 40))


@pytest.mark.parametrize("case", CASES)
def test_memory_order_of_a_parameter_does_not_matter(case):
    straight = make_parameters([(24, 40), (6, 8, 2, 2)])
    turned = [
        torch.nn.Parameter(straight[0].detach().t().contiguous().t()),
        torch.nn.Parameter(straight[1].detach().to(memory_format=torch.channels_last)),
    ]
    assert not any(p.is_contiguous() for p in turned)
    one, other = SGCAdamW(straight, **settings(case)), SGCAdamW(turned, **settings(case))
    for step in range(4):
        for number, (left, right) in enumerate(zip(straight, turned)):
            left.grad = gradient(left, number, step)
            right.grad = left.grad.clone(memory_format=torch.preserve_format).to(torch.float32)
            if step % 2:
                right.grad = torch.empty_like(right).copy_(left.grad)
        one.step()
        other.step()
    assert largest_gap(straight, turned) < 1e-6
    assert not any(p.is_contiguous() for p in turned)


@pytest.mark.parametrize("relative_step", [False, True])
@pytest.mark.parametrize("case", CHUNKED)
def test_a_tensor_worked_on_in_pieces_moves_as_in_one(case, relative_step, monkeypatch):
    whole, one = build(case, relative_step=relative_step)
    # Chunks of one tensor differ in size, as the rows of real ones do.
    with torch.no_grad():
        whole[0] *= torch.linspace(0.1, 3.0, 24)[:, None]
    feed(one, whole, range(3))
    pieces, other = build(case, relative_step=relative_step)
    with torch.no_grad():
        pieces[0] *= torch.linspace(0.1, 3.0, 24)[:, None]
    monkeypatch.setattr(sgc_optimizer, "BUCKET_ENTRIES", 64)
    feed(other, pieces, range(3))
    assert largest_gap(whole, pieces) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_parameters_that_began_at_different_steps_do_not_disturb_each_other(case):
    late_shapes = [(24, 40), (70,), (24, 40)]
    parameters, optimizer = build(case, shapes=late_shapes)
    for step in range(5):
        for number, p in enumerate(parameters):
            p.grad = gradient(p, number, step) if step >= 2 * (number % 2) else None
        optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in parameters] == [5, 3, 5]
    for number, start in ((0, 0), (1, 2), (2, 0)):
        alone = make_parameters(late_shapes)[number]
        single = SGCAdamW([alone], **settings(case))
        for step in range(start, 5):
            alone.grad = gradient(alone, number, step)
            single.step()
        assert largest_gap([alone], [parameters[number]]) < 1e-6, number


def test_groups_with_other_settings_do_as_optimizers_of_their_own():
    names = list(CASES)
    parameters = make_parameters([(24, 40)] * len(names))
    chosen = [
        {**CASES[name], "relative_step": name == "factored", "lr": 0.01 * (number + 1)}
        for number, name in enumerate(names)
    ]
    chosen[2] |= {"k": 16, "seed": 5, "measurement": "gaussian", "betas": (0.5, 0.9)}
    together = SGCAdamW([{"params": [p], **own} for p, own in zip(parameters, chosen)], **settings("factored"))
    feed(together, parameters, range(4))
    for number, (name, own) in enumerate(zip(names, chosen)):
        alone = make_parameters([(24, 40)] * len(names))[number]
        single = SGCAdamW([alone], **{**settings(name), **own})
        for step in range(4):
            alone.grad = gradient(alone, number, step)
            single.step()
        assert largest_gap([alone], [parameters[number]]) < 1e-7, name


def test_a_group_of_another_mode_has_the_rate_of_that_mode():
    left, right = make_parameters([(24, 40), (24, 40)])
    optimizer = SGCAdamW([{"params": [left]}, {"params": [right], "mode": "block"}])
    assert [group["relative_step"] for group in optimizer.param_groups] == [True, False]


def test_a_group_can_be_added_during_training():
    first, second = make_parameters([(24, 40), (24, 40)])
    optimizer = SGCAdamW([first], **settings("paper"))
    feed(optimizer, [first], range(2))
    optimizer.add_param_group({"params": [second], "mode": "hybrid"})
    feed(optimizer, [first, second], range(2, 4))
    assert int(optimizer.state[second]["step"]) == 2


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("case", CASES)
def test_a_copy_goes_on_as_the_original(case, copied):
    parameters, optimizer = build(case)
    feed(optimizer, parameters, range(2))
    twin = copied(optimizer)
    feed(optimizer, parameters, range(2, 4))
    feed(twin, twin.param_groups[0]["params"], range(2, 4))
    assert_same(snapshot(optimizer), snapshot(twin))
    assert twin.state_bytes() == optimizer.state_bytes()


@pytest.mark.parametrize("case", CASES)
def test_the_same_seed_gives_the_same_run_and_the_order_of_parameters_does_not_matter(case):
    parameters, optimizer = build(case)
    feed(optimizer, parameters, range(3))
    again, other = build(case)
    feed(other, again, range(3))
    assert_same(snapshot(optimizer), snapshot(other))
    turned = make_parameters()
    reverse = SGCAdamW(turned[::-1], **settings(case))
    feed(reverse, turned, range(3))
    assert largest_gap(parameters, turned) < 1e-6


@pytest.mark.parametrize("case", [name for name in CASES if name not in ("factored", "block")])
def test_another_seed_measures_with_another_matrix(case):
    parameters, optimizer = build(case)
    others, other = build(case, seed=1)
    feed(optimizer, parameters, range(3))
    feed(other, others, range(3))
    assert largest_gap(parameters, others) > 1e-4


def test_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    parameters, optimizer = build("hybrid", state_dtype="bfloat16")
    feed(optimizer, parameters, range(2))
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_not_changed(case):
    parameters, optimizer = build(case)
    kept = [gradient(p, number, 0) for number, p in enumerate(parameters)]
    feed(optimizer, parameters, [0])
    assert_same(kept, [p.grad for p in parameters])


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", ["first", "second"])
def test_a_slow_average_in_bfloat16_is_unbiased(name, sign):
    # To the nearest, an average of memory 10000 stands still at 2 ** -5: the next number is further than half a step.
    parameter = torch.nn.Parameter(torch.zeros(2000))
    optimizer = SGCAdamW([parameter], lr=0.0, betas=(0.9999, 0.9999), state_dtype="bfloat16")
    parameter.grad = torch.full_like(parameter, sign)
    for _ in range(600):
        optimizer.step()
    kept = optimizer.state[parameter][name]
    assert kept.dtype == torch.bfloat16
    expected = (sign if name == "first" else 1.0) * (1.0 - 0.9999**600)
    assert float(kept.float().mean()) == pytest.approx(expected, rel=0.01)


def test_a_closure_runs_with_gradients_and_its_loss_comes_back():
    parameter = torch.nn.Parameter(torch.ones(24, 40))
    optimizer = SGCAdamW([parameter])

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert float(loss.detach()) == 24 * 40
    assert not torch.equal(parameter, torch.ones(24, 40))


@pytest.mark.parametrize("case", CASES)
def test_a_scheduler_scales_the_step(case):
    parameters, optimizer = build(case)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)
    feed(optimizer, parameters, [0])
    schedule.step()
    before = [p.detach().clone() for p in parameters]
    feed(optimizer, parameters, [1])
    assert_same(before, [p.detach() for p in parameters])


def test_a_rate_may_be_a_tensor():
    parameters, optimizer = build("factored", lr=torch.tensor(0.01))
    others, plain = build("factored", lr=0.01)
    feed(optimizer, parameters, range(2))
    feed(plain, others, range(2))
    assert largest_gap(parameters, others) < 1e-7


@pytest.mark.parametrize("case", CASES)
def test_a_relative_step_grows_with_the_tensor(case):
    small, one = build(case, shapes=[(24, 40), (9, 12)], relative_step=True)
    large, other = build(case, shapes=[(24, 40), (9, 12)], relative_step=True)
    with torch.no_grad():
        for p in large:
            p *= 10.0
    starts = [[p.detach().clone() for p in group] for group in (small, large)]
    feed(one, small, [0])
    feed(other, large, [0])
    for old, new, old_large, new_large in zip(starts[0], small, starts[1], large):
        torch.testing.assert_close(new_large - old_large, 10.0 * (new - old), rtol=1e-3, atol=1e-5)


def test_a_relative_step_is_a_share_of_the_root_mean_square():
    (parameter,), optimizer = build("factored", shapes=[(24, 40)], lr=0.05 * USUAL_SCALE, directions=0)
    start = parameter.detach().clone()
    feed(optimizer, [parameter], [0])
    moved = (parameter.detach() - start).square().mean().sqrt()
    assert float(moved / start.square().mean().sqrt()) == pytest.approx(0.05, rel=0.02)


def test_a_tensor_of_zeros_moves_as_one_of_the_smallest_scale():
    parameter = torch.nn.Parameter(torch.zeros(24, 40))
    optimizer = SGCAdamW([parameter], lr=0.05 * USUAL_SCALE, directions=0)
    feed(optimizer, [parameter], [0])
    assert float(parameter.detach().square().mean().sqrt()) == pytest.approx(0.05 * SMALLEST_SCALE, rel=0.02)


@pytest.mark.parametrize("shape", [(40,), (1, 40), (40, 1), (1, 1, 40)])
def test_a_vector_of_large_entries_moves_as_one_of_ones(shape):
    parameter = torch.nn.Parameter(torch.full(shape, 30.0))
    optimizer = SGCAdamW([parameter], lr=0.05 * USUAL_SCALE)
    feed(optimizer, [parameter], [0])
    assert float((parameter.detach() - 30.0).square().mean().sqrt()) == pytest.approx(0.05, rel=0.02)


def test_relative_is_the_default_of_the_factored_mode_alone():
    found = {m: SGCAdamW(make_parameters(), mode=m).param_groups[0]["relative_step"] for m in MODES}
    assert found == {"factored": True, "paper": False, "hybrid": False, "block": False}


@pytest.mark.parametrize("case", CASES)
def test_a_step_inside_autocast_is_the_same(case):
    parameters, optimizer = build(case)
    others, plain = build(case)
    with torch.autocast("cpu", torch.bfloat16):
        feed(optimizer, parameters, range(2))
    feed(plain, others, range(2))
    assert_same([p.detach() for p in parameters], [p.detach() for p in others])


def test_a_projection_is_refreshed_on_schedule_and_steps_stay_in_its_span():
    (parameter,), optimizer = build("projected", shapes=[(24, 40)])
    bases = []
    for step in range(4):
        before = parameter.detach().clone()
        feed(optimizer, [parameter], [step])
        basis = optimizer.state[parameter]["basis"].clone()
        bases.append(basis)
        moved = parameter.detach() - before
        outside = moved - basis @ (basis.T @ moved)
        assert float(outside.norm() / moved.norm()) < 1e-4
    assert torch.equal(bases[0], bases[1])
    assert torch.equal(bases[2], bases[3])
    assert not torch.equal(bases[1], bases[2])


def test_tall_matrices_are_projected_on_their_short_side():
    (wide,), one = build("projected", shapes=[(24, 40)])
    tall = torch.nn.Parameter(wide.detach().t().contiguous())
    other = SGCAdamW([tall], **settings("projected"))
    for step in range(3):
        wide.grad = gradient(wide, 0, step)
        tall.grad = wide.grad.t().contiguous()
        one.step()
        other.step()
    torch.testing.assert_close(wide.detach(), tall.detach().t(), rtol=0, atol=1e-6)


def test_monitoring_does_not_change_a_step_and_reports_shares():
    for case in ("paper", "omp", "hybrid", "projected"):
        parameters, optimizer = build(case)
        others, plain = build(case)
        optimizer.monitor = True
        feed(optimizer, parameters, range(2))
        feed(plain, others, range(2))
        assert_same([p.detach() for p in parameters], [p.detach() for p in others])
        assert 0.0 < optimizer.seen["sgc_energy_kept"] <= 1.0, case
        assert 0.0 <= optimizer.seen["sgc_decode_residual"] <= 1.0, case
        assert not plain.seen


def test_it_is_exported():
    assert hf_ext.SGCAdamW is SGCAdamW
