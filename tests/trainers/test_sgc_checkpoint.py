"""State of `SGCAdamW`: its bytes, saving and loading, and the errors of settings and checkpoints that do not fit."""

import copy

import pytest
import torch

from hf_ext.errors import CheckpointError, ConfigError
from hf_ext.trainers.measurements import Measurement
from hf_ext.trainers.sgc_budget import planned_bytes
from hf_ext.trainers.sgc_optimizer import SGCAdamW
from tests.trainers.helpers import (
    CASES,
    CHUNKED,
    SHAPES,
    assert_same,
    build,
    feed,
    make_parameters,
    settings,
    snapshot,
    through_disk,
)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def held_bytes(optimizer):
    """Bytes of every tensor that can be reached from the optimizer, parameters and gradients left out."""
    parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
    storages, visited, waiting = {}, set(), [optimizer]
    while waiting:
        item = waiting.pop()
        if id(item) in visited or id(item) in parameters:
            continue
        visited.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set):
            waiting += list(item)
        elif type(item).__module__.startswith("hf_ext"):
            waiting.append(vars(item))
    return sum(storages.values())


def numel(optimizer, names=("first", "second")):
    return sum(state[name].numel() for state in optimizer.state.values() for name in names if name in state)


@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("measurement", ["gaussian", "srht", "countsketch"])
@pytest.mark.parametrize("case", CASES)
def test_reported_bytes_are_those_of_all_tensors_alive_and_those_planned(case, measurement, state_dtype):
    parameters, optimizer = build(case, measurement=measurement, state_dtype=state_dtype)
    feed(optimizer, parameters, range(2))
    assert optimizer.state_bytes() == held_bytes(optimizer)
    assert optimizer.state_bytes() == planned_bytes(parameters, optimizer.defaults)


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("case", CASES)
def test_planned_bytes_do_not_depend_on_the_type_of_the_weights(case, dtype):
    parameters, optimizer = build(case, dtype=dtype)
    feed(optimizer, parameters, range(1))
    assert planned_bytes(parameters, optimizer.defaults) == optimizer.state_bytes() == held_bytes(optimizer)


@pytest.mark.parametrize("case", ["paper", "hybrid"])
def test_planned_bytes_hold_when_every_tensor_is_small(case):
    parameters, optimizer = build(case, shapes=[(3, 4), (5,)], min_numel=4096)
    feed(optimizer, parameters, range(1))
    assert optimizer.state_bytes() == planned_bytes(parameters, optimizer.defaults)


@pytest.mark.parametrize("case", ["paper", "projected", "hybrid"])
def test_planned_bytes_hold_without_chunks(case):
    parameters, optimizer = build(case, shapes=[(8, 16), (8, 32)], chunk_size=None, measurement="gaussian")
    feed(optimizer, parameters, range(1))
    assert optimizer.state_bytes() == planned_bytes(parameters, optimizer.defaults)


@pytest.mark.parametrize("case", ["paper", "omp", "compressed"])
@pytest.mark.parametrize("k", [8, 9, 31, 32])
def test_the_paper_keeps_two_times_k_numbers_a_chunk_whatever_s_is(case, k):
    for s in (1, 8):
        parameters, optimizer = build(case, shapes=[(7, 9)], k=k, s=s)
        feed(optimizer, parameters, range(1))
        assert numel(optimizer) == 2 * -(-63 // 32) * k


@pytest.mark.parametrize("mode", ["paper", "hybrid"])
def test_one_measurement_more_costs_one_number_a_chunk_and_moment(mode):
    sizes = []
    for k in (10, 11):
        parameters, optimizer = build(mode, shapes=[(24, 40), (70,)], k=k)
        feed(optimizer, parameters, range(1))
        sizes.append(numel(optimizer))
    assert sizes[1] - sizes[0] == (2 if mode == "paper" else 1) * (30 + 3)


def test_states_of_the_other_modes_have_the_documented_sizes():
    expected = {"factored": 24 + 40, "hybrid": 30 * (12 + 1), "block": 30, "projected": 24 * 3 + 2 * 4 * 12}
    for case, count in expected.items():
        parameters, optimizer = build(case, shapes=[(24, 40)])
        feed(optimizer, parameters, range(1))
        assert numel(optimizer, ("first", "second", "rows", "columns", "basis")) == count, case


def test_a_state_of_bfloat16_takes_half():
    sizes = {}
    for state_dtype in DTYPES:
        parameters, optimizer = build("paper", shapes=[(24, 40)], state_dtype=state_dtype)
        feed(optimizer, parameters, range(1))
        sizes[state_dtype] = sum(t.nbytes for name, t in optimizer.state[parameters[0]].items() if name != "step")
    assert sizes == {"float32": 4 * 2 * 30 * 12, "bfloat16": 2 * 2 * 30 * 12}


@pytest.mark.parametrize("case", CASES)
def test_matrices_are_shared_by_all_tensors(case):
    one, first = build(case, shapes=[(24, 40)])
    many, second = build(case, shapes=[(24, 40)] * 5)
    feed(first, one, range(1))
    feed(second, many, range(1))
    state = sum(t.nbytes for t in first.state[one[0]].values())
    assert second.state_bytes() - first.state_bytes() == 4 * state


@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("case", CASES)
def test_resuming_is_exact_to_the_bit(case, dtype, state_dtype):
    parameters, optimizer = build(case, dtype=dtype, state_dtype=state_dtype)
    feed(optimizer, parameters, range(3))
    saved = through_disk(optimizer.state_dict())
    weights = [p.detach().clone() for p in parameters]
    feed(optimizer, parameters, range(3, 7))

    resumed = [torch.nn.Parameter(weight) for weight in weights]
    other = SGCAdamW(resumed, **settings(case, state_dtype=state_dtype))
    other.load_state_dict(saved)
    feed(other, resumed, range(3, 7))
    assert_same(snapshot(optimizer), snapshot(other))


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("case", CASES)
def test_loading_keeps_the_type_of_every_tensor_and_large_counts(case, dtype):
    parameters, optimizer = build(case, dtype=dtype)
    feed(optimizer, parameters, range(2))
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = torch.tensor(70001)
    resumed = make_parameters(dtype=dtype)
    other = SGCAdamW(resumed, **settings(case))
    other.load_state_dict(through_disk(saved))
    assert int(other.state[resumed[0]]["step"]) == 70001
    for old, new in zip(parameters, resumed):
        for name, value in optimizer.state[old].items():
            assert other.state[new][name].dtype == value.dtype, name
            assert value.dtype == (torch.int64 if name == "step" else torch.float32)


@pytest.mark.parametrize("case", CASES)
def test_a_loaded_state_shares_no_memory_with_the_checkpoint(case):
    parameters, optimizer = build(case)
    feed(optimizer, parameters, range(2))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved["state"])
    resumed = make_parameters()
    other = SGCAdamW(resumed, **settings(case))
    other.load_state_dict(saved)
    feed(other, resumed, range(2, 4))
    for number, state in kept.items():
        for name, value in state.items():
            assert torch.equal(value, saved["state"][number][name]), name


@pytest.mark.parametrize("case", CASES)
def test_a_state_before_the_first_step_can_be_saved_and_loaded(case):
    parameters, optimizer = build(case)
    resumed, other = build(case)
    other.load_state_dict(through_disk(optimizer.state_dict()))
    feed(optimizer, parameters, range(2))
    feed(other, resumed, range(2))
    assert_same(snapshot(optimizer), snapshot(other))


def test_a_state_with_some_parameters_untouched_can_be_saved_and_loaded():
    parameters, optimizer = build("paper")
    for p in parameters[::2]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    resumed, other = build("paper")
    other.load_state_dict(through_disk(optimizer.state_dict()))
    assert set(other.state) == set(resumed[::2])


def test_rates_and_free_settings_come_from_the_checkpoint():
    parameters, optimizer = build("paper", lr=0.5, s=2)
    feed(optimizer, parameters, range(1))
    _, other = build("paper", lr=0.25, s=4)
    other.load_state_dict(through_disk(optimizer.state_dict()))
    assert other.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("case", CASES)
def test_the_state_holds_tensors_alone_and_no_matrix(case):
    parameters, optimizer = build(case, shapes=[(24, 40)])
    feed(optimizer, parameters, range(1))
    saved = optimizer.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in saved["state"][0].values())
    held = [value for group in saved["param_groups"] for value in group.values() if isinstance(value, torch.Tensor)]
    assert not held


OTHER = {
    "k": 13,
    "seed": 1,
    "chunk_size": 64,
    "measurement": "gaussian",
    "mode": "hybrid",
    "moment_space": "compressed",
    "rank": 3,
    "min_numel": 100,
    "state_dtype": "bfloat16",
}


@pytest.mark.parametrize("name", OTHER)
def test_a_checkpoint_of_another_structure_is_refused_by_name(name):
    parameters, optimizer = build("paper")
    feed(optimizer, parameters, range(1))
    others, other = build("paper", **{name: OTHER[name]})
    feed(other, others, range(1))
    before = snapshot(other)
    with pytest.raises(CheckpointError, match=rf"\b{name}="):
        other.load_state_dict(through_disk(optimizer.state_dict()))
    assert_same(before, snapshot(other))


def test_a_matrix_that_is_drawn_differently_today_is_noticed():
    parameters, optimizer = build("paper")
    feed(optimizer, parameters, range(1))
    saved = optimizer.state_dict()
    saved["param_groups"][0]["checksum"][0] += 0.5
    _, other = build("paper")
    with pytest.raises(CheckpointError, match="draws another matrix"):
        other.load_state_dict(saved)


def test_a_later_format_is_refused():
    parameters, optimizer = build("factored")
    feed(optimizer, parameters, range(1))
    saved = optimizer.state_dict()
    saved["param_groups"][0]["format_version"] = 99
    _, other = build("factored")
    with pytest.raises(CheckpointError, match="format_version"):
        other.load_state_dict(saved)


def test_a_checkpoint_of_adamw_is_refused():
    parameters = make_parameters()
    adamw = torch.optim.AdamW(parameters)
    feed(adamw, parameters, range(1))
    _, optimizer = build("factored")
    with pytest.raises(CheckpointError, match="SGCAdamW did not write it"):
        optimizer.load_state_dict(adamw.state_dict())


@pytest.mark.parametrize("case", ["factored", "paper"])
def test_a_checkpoint_for_other_shapes_is_refused(case):
    parameters, optimizer = build(case, shapes=[(24, 40)])
    feed(optimizer, parameters, range(1))
    _, other = build(case, shapes=[(40, 48)])
    with pytest.raises(CheckpointError, match="shape"):
        other.load_state_dict(through_disk(optimizer.state_dict()))


@pytest.mark.parametrize("groups", [1, 3])
def test_a_checkpoint_with_another_number_of_groups_is_refused(groups):
    left = make_parameters([(24, 40), (24, 40)])
    optimizer = SGCAdamW([{"params": [p]} for p in left])
    right = make_parameters([(24, 40)] * groups)
    other = SGCAdamW([{"params": [p]} for p in right])
    with pytest.raises(ValueError, match="group"):
        other.load_state_dict(optimizer.state_dict())


WRONG = [
    ({"k": 0}, "k"),
    ({"k": 2.5}, "k"),
    ({"k": True}, "k"),
    ({"k": 33}, "k"),
    ({"s": 0}, "s"),
    ({"s": 13}, "s"),
    ({"chunk_size": 0}, "chunk_size"),
    ({"chunk_size": 1.5}, "chunk_size"),
    ({"chunk_size": True}, "chunk_size"),
    ({"chunk_size": 48}, "chunk_size"),
    ({"mode": "adam"}, "mode"),
    ({"measurement": "sparse"}, "measurement"),
    ({"recover": "lasso"}, "recover"),
    ({"moment_space": "both"}, "moment_space"),
    ({"residual": "all"}, "residual"),
    ({"rank": 0}, "rank"),
    ({"rank": 2.5}, "rank"),
    ({"rank": True}, "rank"),
    ({"rank": 2, "mode": "hybrid"}, "rank"),
    ({"refresh": 0}, "refresh"),
    ({"directions": -1}, "directions"),
    ({"min_numel": 0}, "min_numel"),
    ({"seed": -1}, "seed"),
    ({"state_dtype": "float16"}, "state_dtype"),
    ({"on_nonfinite": "ignore"}, "on_nonfinite"),
    ({"relative_step": "yes"}, "relative_step"),
    ({"relative_step": 1}, "relative_step"),
    ({"lr": -0.1}, "lr"),
    ({"lr": torch.tensor(-0.1)}, "lr"),
    ({"lr": torch.tensor([0.1])}, "lr"),
    ({"lr": float("nan")}, "lr"),
    ({"eps": -1e-8}, "eps"),
    ({"weight_decay": -0.1}, "weight_decay"),
    ({"betas": (0.9, 1.0)}, "betas"),
    ({"betas": (-0.1, 0.9)}, "betas"),
    ({"betas": (0.9,)}, "betas"),
    ({"mode": "block", "chunk_size": None}, "chunk_size"),
    ({"mode": "block", "chunk_size": True}, "chunk_size"),
]


@pytest.mark.parametrize(("wrong", "name"), WRONG, ids=lambda value: str(value))
def test_a_setting_that_cannot_work_is_refused_by_name(wrong, name):
    with pytest.raises(ConfigError, match=rf"\b{name}="):
        SGCAdamW(make_parameters(), **{**settings("paper"), **wrong})


def test_a_group_with_a_wrong_setting_is_refused_and_left_out():
    first, second = make_parameters([(24, 40), (24, 40)])
    optimizer = SGCAdamW([first], **settings("paper"))
    with pytest.raises(ConfigError, match=r"\bs="):
        optimizer.add_param_group({"params": [second], "s": 99})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [second]})
    feed(optimizer, [first, second], range(1))


@pytest.mark.parametrize(
    ("parameter", "word"),
    [
        (torch.zeros(4, 4, dtype=torch.complex64), "complex"),
        (torch.zeros(4, 4, dtype=torch.int64), "int64"),
        (torch.zeros(0, 4), "no entries"),
    ],
    ids=["complex", "integer", "empty"],
)
@pytest.mark.parametrize("case", CASES)
def test_a_parameter_that_cannot_be_stepped_is_refused(case, parameter, word):
    with pytest.raises(ConfigError, match=word):
        SGCAdamW([parameter], **settings(case))


@pytest.mark.parametrize("case", CASES)
def test_parameters_cut_across_ranks_are_refused(case):
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FlatParameter
    from torch.distributed.tensor import Shard, distribute_tensor

    with pytest.raises(ConfigError, match="FSDP"):
        SGCAdamW([FlatParameter(torch.ones(64), requires_grad=True)], **settings(case))
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        shard = distribute_tensor(torch.ones(24, 40), init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(ConfigError, match="DTensor"):
            SGCAdamW([torch.nn.Parameter(shard)], **settings(case))
    finally:
        destroy_process_group()


@pytest.mark.parametrize("case", CASES)
def test_a_sparse_gradient_is_refused_before_anything_moves(case):
    table = torch.nn.Embedding(24, 40, sparse=True)
    other = torch.nn.Parameter(torch.ones(24, 40))
    optimizer = SGCAdamW([other, table.weight], **settings(case))
    other.grad = torch.ones_like(other)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ConfigError, match="sparse"):
        optimizer.step()
    assert torch.equal(other, torch.ones(24, 40))
    assert not optimizer.state


def test_srht_needs_a_power_of_two_and_other_kinds_do_not():
    for kind in ("gaussian", "countsketch"):
        parameters, optimizer = build("paper", chunk_size=48, measurement=kind)
        feed(optimizer, parameters, range(1))
        assert isinstance(optimizer.state_bytes(), int)
    with pytest.raises(ConfigError, match="chunk_size=48"):
        build("paper", chunk_size=48, measurement="srht")


def test_without_chunks_srht_needs_a_power_of_two_of_what_is_measured():
    whole = {"chunk_size": None, "measurement": "srht", "k": 4, "s": 4}
    with pytest.raises(ConfigError, match="48 entries"):
        build("projected", shapes=[(8, 16)], **whole)  # three rows of 16
    parameters, optimizer = build("projected", shapes=[(8, 16), (12, 16)], rank=4, **whole)
    feed(optimizer, parameters, range(2))


def test_a_tensor_shorter_than_a_chunk_is_measured_as_a_whole_chunk():
    (parameter,), optimizer = build("paper", shapes=[(20,)])
    feed(optimizer, [parameter], range(1))
    assert optimizer.state[parameter]["first"].shape == (1, 12)
    assert optimizer.state_bytes() == 8 + 2 * 4 * 12 + Measurement("srht", 12, 32, 0).nbytes


@pytest.mark.parametrize("case", CHUNKED)
def test_a_kept_count_of_steps_is_whole(case):
    parameters, optimizer = build(case, shapes=SHAPES)
    feed(optimizer, parameters, range(3))
    assert all(state["step"].dtype == torch.int64 and int(state["step"]) == 3 for state in optimizer.state.values())


def test_who_resumes_after_an_error_may_have_chosen_to_skip():
    parameter = torch.nn.Parameter(torch.ones(8, 8))
    saved = SGCAdamW([parameter], on_nonfinite="raise")
    parameter.grad = torch.ones(8, 8)
    saved.step()
    resumed = SGCAdamW([parameter], on_nonfinite="skip")
    resumed.load_state_dict(saved.state_dict())
    assert resumed.param_groups[0]["on_nonfinite"] == "skip"


@pytest.mark.parametrize("size", [3e19, 1e30])
def test_a_single_large_entry_is_not_squared_away(size):
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = SGCAdamW([parameter])
    for gradient in (size, 1.0):
        parameter.grad = torch.full((1,), gradient)
        optimizer.step()
    assert bool(parameter.isfinite().all())
    assert bool(optimizer.state[parameter]["second"].isfinite().all())
