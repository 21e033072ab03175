"""The dial: what it chooses never passes the budget, uses most of it, works, and says what the smallest state is."""

import re

import pytest
import torch

from hf_ext.errors import ConfigError
from hf_ext.tiny import tiny_model
from hf_ext.trainers.measurements import Measurement
from hf_ext.trainers.sgc_budget import CHUNK_SIZES, adamw_bytes, fit_to_budget, planned_bytes
from hf_ext.trainers.sgc_checks import MODES
from hf_ext.trainers.sgc_optimizer import SGCAdamW


SHARES = (0.001, 0.002, 0.005, 0.01, 0.03, 0.08, 0.15)


def defaults(**settings):
    return SGCAdamW([torch.nn.Parameter(torch.zeros(1))], **settings).defaults


def large_parameters():
    """Shapes of a GPT-2 of 30 M weights, without memory."""
    width, layers, words = 512, 4, 32000
    shapes = [(words, width), (1024, width)]
    for _ in range(layers):
        shapes += [(width, 3 * width), (3 * width,), (width, width), (width,), (width, 4 * width), (4 * width,)]
        shapes += [(4 * width, width), (width,), (width,), (width,)]
    return [torch.empty(shape, device="meta") for shape in shapes]


def small_parameters():
    return [torch.nn.Parameter(torch.zeros(shape)) for shape in ((128, 64), (64, 64), (96, 64), (64,), (7,))]


def as_keywords(settings):
    return {name: value for name, value in settings.items() if name not in ("format_version", "checksum")}


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("mode", MODES)
def test_a_share_is_never_passed(mode, share):
    parameters = large_parameters()
    limit = share * adamw_bytes(parameters)
    try:
        chosen = fit_to_budget(parameters, share, defaults(mode=mode))
    except ConfigError:
        # The smallest tensors' AdamW state and the matrix are all that so little pays.
        assert mode in ("paper", "hybrid")
        assert share < 0.005
        return
    assert planned_bytes(parameters, chosen) <= limit


@pytest.mark.parametrize("share", SHARES[2:])
@pytest.mark.parametrize("mode", ["paper", "hybrid"])
def test_measurements_use_most_of_a_budget(mode, share):
    parameters = large_parameters()
    chosen = fit_to_budget(parameters, share, defaults(mode=mode))
    assert chosen["mode"] == mode
    if chosen["k"] < chosen["chunk_size"]:
        assert planned_bytes(parameters, chosen) >= 0.95 * share * adamw_bytes(parameters)


@pytest.mark.parametrize("measurement", ["gaussian", "srht", "countsketch"])
@pytest.mark.parametrize("mode", ["paper", "hybrid"])
def test_every_kind_of_matrix_is_paid_for(mode, measurement):
    parameters = large_parameters()
    chosen = fit_to_budget(parameters, 0.05, defaults(mode=mode, measurement=measurement))
    size = planned_bytes(parameters, chosen)
    assert 0.9 * 0.05 * adamw_bytes(parameters) <= size <= 0.05 * adamw_bytes(parameters)
    matrix = Measurement(measurement, chosen["k"], chosen["chunk_size"], 0).nbytes
    assert size > planned_bytes(parameters, {**chosen, "mode": "block"}) + matrix


@pytest.mark.parametrize("share", [0.01, 0.15])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_chosen_runs_and_keeps_what_was_planned(mode, arch, share):
    parameters = list(tiny_model(arch).parameters())
    try:
        chosen = fit_to_budget(parameters, share, defaults(mode=mode, min_numel=256))
    except ConfigError:
        assert mode in ("paper", "hybrid")
        assert share < 0.08
        return
    optimizer = SGCAdamW(parameters, **as_keywords(chosen))
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state_bytes() == planned_bytes(parameters, chosen)
    assert optimizer.state_bytes() <= share * adamw_bytes(parameters)


@pytest.mark.parametrize("mode", MODES)
def test_a_larger_budget_never_buys_a_smaller_state(mode):
    parameters = large_parameters()
    sizes = [planned_bytes(parameters, fit_to_budget(parameters, share, defaults(mode=mode))) for share in SHARES[2:]]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("recover", ["known", "omp"])
@pytest.mark.parametrize("mode", ["paper", "hybrid"])
def test_entries_follow_the_measurements(mode, recover):
    chosen = fit_to_budget(large_parameters(), 0.05, defaults(mode=mode, recover=recover))
    k, s, n = chosen["k"], chosen["s"], chosen["chunk_size"]
    assert 1 <= s <= k <= n
    if recover == "omp":
        needed = 2 * s * torch.log(torch.tensor(n / s))
        assert needed <= k
        assert 2 * (s + 1) * torch.log(torch.tensor(n / (s + 1))) > k
    else:
        assert s == 3 * k // 8


def test_the_default_mode_is_left_alone_where_it_fits_then_rounded_then_replaced():
    parameters = large_parameters()
    settings = defaults()
    whole = planned_bytes(parameters, settings)
    half = planned_bytes(parameters, {**settings, "state_dtype": "bfloat16"})
    assert half < whole
    assert fit_to_budget(parameters, whole, settings) == settings
    assert fit_to_budget(parameters, 0.5, settings) == settings
    assert fit_to_budget(parameters, whole - 1, settings) == {**settings, "state_dtype": "bfloat16"}
    assert fit_to_budget(parameters, half, settings) == {**settings, "state_dtype": "bfloat16"}
    chosen = fit_to_budget(parameters, half - 1, settings)
    assert (chosen["mode"], chosen["relative_step"]) == ("block", True)


def test_up_to_one_a_budget_is_a_share_and_above_it_bytes():
    parameters = large_parameters()
    share = 0.03
    assert fit_to_budget(parameters, share, defaults(mode="paper")) == fit_to_budget(
        parameters, share * adamw_bytes(parameters), defaults(mode="paper")
    )
    with pytest.raises(ConfigError, match="2 bytes"):
        fit_to_budget(parameters, 2, defaults())


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_a_state_of_bfloat16_buys_about_twice_the_measurements(state_dtype):
    parameters = large_parameters()
    chosen = fit_to_budget(parameters, 0.03, defaults(mode="paper", state_dtype=state_dtype))
    numbers = chosen["k"] / chosen["chunk_size"]
    assert chosen["state_dtype"] == state_dtype
    assert numbers == pytest.approx(0.03 if state_dtype == "float32" else 0.06, rel=0.1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", [small_parameters, large_parameters])
def test_the_smallest_state_that_an_error_names_is_enough_and_one_byte_less_is_not(mode, make):
    parameters = make()
    settings = defaults(mode=mode, min_numel=256)
    with pytest.raises(ConfigError, match=f"mode='{mode}'") as caught:
        fit_to_budget(parameters, 1e-7, settings)
    smallest = int(re.search(r"has ([\d,]+) \(", str(caught.value)).group(1).replace(",", ""))
    assert planned_bytes(parameters, fit_to_budget(parameters, smallest, settings)) <= smallest
    with pytest.raises(ConfigError, match="smallest state"):
        fit_to_budget(parameters, smallest - 1, settings)


@pytest.mark.parametrize("mode", ["paper", "hybrid"])
def test_few_small_tensors_get_what_they_can_pay(mode):
    parameters = small_parameters()
    settings = defaults(mode=mode, min_numel=256)
    # One measurement in the smallest chunks is the least there is of this mode.
    least = planned_bytes(parameters, {**settings, "chunk_size": CHUNK_SIZES[0], "k": 1, "s": 1})
    budget = 2 * least
    assert budget < 0.25 * adamw_bytes(parameters)
    assert planned_bytes(parameters, fit_to_budget(parameters, budget, settings)) <= budget


@pytest.mark.parametrize("budget", [0, -1, float("nan")])
def test_a_budget_that_is_no_amount_is_refused(budget):
    with pytest.raises(ConfigError, match="state_budget="):
        fit_to_budget(large_parameters(), budget, defaults())
