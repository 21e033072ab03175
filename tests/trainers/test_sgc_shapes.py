"""How the default mode sees tensors: stacks of matrices, kernels of convolutions, and how many directions it cuts."""

import pytest
import torch

from hf_ext.trainers import sgc_optimizer
from hf_ext.trainers.factored import sketch_matrix
from hf_ext.trainers.sgc_optimizer import SGCAdamW
from hf_ext.trainers.sgc_state import directions_cut
from tests.trainers.helpers import build, feed, gradient, largest_gap, settings


def test_cutting_directions_changes_matrices_that_are_not_narrow_alone():
    for shapes, same in (
        ([(24, 40)], False),
        ([(7, 9)], False),
        ([(3, 9)], True),
        ([(8, 400)], True),
        ([(40,)], True),
    ):
        parameters, optimizer = build("factored", shapes=shapes)
        others, plain = build("factored", shapes=shapes, directions=0)
        feed(optimizer, parameters, [0])
        feed(plain, others, [0])
        assert (largest_gap(parameters, others) == 0.0) is same, shapes


@pytest.mark.parametrize(
    ("shape", "directions", "rank"),
    [((128, 384), None, 8), ((384, 1184), None, 16), ((4096, 4096), None, 16), ((15, 40), None, 0)]
    + [((128, 384), 8, 8), ((16, 40), 8, 4), ((384, 128), 0, 0), ((64, 1024), None, 0), ((4096, 4096), 64, 64)],
)
def test_directions_are_a_share_of_the_shorter_side_or_a_number(shape, directions, rank):
    parameter = torch.nn.Parameter(torch.empty(shape, device="meta"))
    group = SGCAdamW([parameter], directions=directions).param_groups[0]
    assert directions_cut(group, shape) == rank


def test_every_step_has_a_sketch_of_its_own_and_none_is_kept(monkeypatch):
    drawn = []

    def draw(rank, rows, seed):
        drawn.append((rank, rows, seed))
        return sketch_matrix(rank, rows, seed)

    monkeypatch.setattr(sgc_optimizer, "sketch_matrix", draw)
    parameters, optimizer = build("factored", shapes=[(24, 40), (24, 32), (12, 40)], directions=8, seed=3)
    feed(optimizer, parameters, range(2))
    # Once a step for all of a height, of no more than a quarter of their directions.
    assert drawn == [(6, 24, 4), (3, 12, 4), (6, 24, 5), (3, 12, 5)]
    kept = [t for state in optimizer.state.values() for t in state.values()]
    assert optimizer.state_bytes() == sum(t.untyped_storage().nbytes() for t in kept)
    assert not optimizer._sketches


@pytest.mark.parametrize("shape", [(3, 12, 20), (2, 20, 12), (4, 16, 16)])
def test_a_stack_moves_as_its_matrices_would_alone(shape):
    (stack,), together = build("factored", shapes=[shape], weight_decay=0.1)
    with torch.no_grad():
        stack[0] *= 5.0
    alone = [torch.nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    apart = SGCAdamW(alone, **settings("factored", weight_decay=0.1))
    for step in range(4):
        stack.grad = gradient(stack, 0, step)
        stack.grad[1] *= 1e3 if step else 0.0  # an expert that no token chose has no gradient
        for matrix, part in zip(alone, stack.grad):
            matrix.grad = part.clone()
        together.step()
        apart.step()
    torch.testing.assert_close(stack.detach(), torch.stack([m.detach() for m in alone]), rtol=1e-5, atol=1e-7)
    kept = {name: tuple(value.shape) for name, value in together.state[stack].items()}
    assert kept == {"step": (), "rows": shape[:2], "columns": (shape[0], shape[2])}


@pytest.mark.parametrize(("shape", "flat"), [((40, 30, 3), (40, 90)), ((64, 1, 4), (64, 4)), ((2, 3, 4, 5), (2, 60))])
def test_the_kernel_of_a_convolution_is_one_matrix(shape, flat):
    (kernel,), optimizer = build("factored", shapes=[shape])
    feed(optimizer, [kernel], [0])
    kept = optimizer.state[kernel]
    assert (len(kept["rows"]), len(kept["columns"])) == flat


def test_experts_of_a_mixture_keep_a_share_like_that_of_other_matrices():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    experts = [p for p in model.parameters() if p.ndim == 3]
    assert experts
    optimizer = SGCAdamW(model.parameters(), lr=1e-3)
    ids = torch.arange(32).view(2, 16)
    before = [p.detach().clone() for p in experts]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    for old, stack in zip(before, experts):
        kept = sum(t.numel() for name, t in optimizer.state[stack].items() if name != "step")
        assert kept == len(stack) * sum(stack.shape[1:])
        moved = [not torch.equal(one, other) for one, other in zip(old, stack)]
        assert moved == [bool(part.any()) for part in stack.grad]
        assert any(moved)
