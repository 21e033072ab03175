"""Settings small enough for tiny tensors, and a loop that feeds the same gradients to any optimizer."""

import io

import torch
from torch import Tensor

from hf_ext.trainers.sgc_optimizer import SGCAdamW


SMALL = {"k": 12, "s": 4, "chunk_size": 32, "min_numel": 16, "directions": 2}
CASES = {
    "factored": {"mode": "factored"},
    "paper": {"mode": "paper"},
    "omp": {"mode": "paper", "recover": "omp"},
    "compressed": {"mode": "paper", "moment_space": "compressed", "residual": "chunk"},
    "projected": {"mode": "paper", "rank": 3, "refresh": 2},
    "hybrid": {"mode": "hybrid"},
    "block": {"mode": "block"},
}
CHUNKED = tuple(name for name in CASES if name != "factored")
# A matrix whose directions are cut, one that is no multiple of a chunk, a convolution, a stack of matrices, vectors, one
# entry, no dimension.
SHAPES = ((24, 40), (7, 9), (6, 3, 2, 2), (3, 12, 20), (70,), (5,), (1,), ())


def settings(case: str, **overrides) -> dict:
    return {**SMALL, "lr": 0.01, **CASES[case], **overrides}


def make_parameters(shapes=SHAPES, seed: int = 0, dtype=torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter((0.1 * torch.randn(shape, generator=generator)).to(dtype)) for shape in shapes]


def build(case: str, shapes=SHAPES, dtype=torch.float32, **overrides) -> tuple[list[torch.nn.Parameter], SGCAdamW]:
    parameters = make_parameters(shapes, dtype=dtype)
    return parameters, SGCAdamW(parameters, **settings(case, **overrides))


def gradient(parameter: Tensor, number: int, step: int, scale: float = 1.0) -> Tensor:
    """Of parameter `number` at `step`: heavy tails, so that the largest entries mean something."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    drawn = torch.randn(parameter.shape, generator=generator).pow(3)
    return (scale * drawn).to(parameter.dtype)


def feed(optimizer: torch.optim.Optimizer, parameters, steps, scale: float = 1.0) -> None:
    """One step per entry of `steps`, which name the gradients."""
    for step in steps:
        for number, parameter in enumerate(parameters):
            parameter.grad = gradient(parameter, number, step, scale)
        optimizer.step()


def through_disk(state_dict: dict) -> dict:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def snapshot(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of all parameters and all tensors of the state, in a fixed order."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [value for p in parameters for _, value in sorted(optimizer.state.get(p, {}).items())]
    return [tensor.detach().clone() for tensor in parameters + kept]


def assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right)
    for number, (one, other) in enumerate(zip(left, right)):
        assert one.dtype == other.dtype, number
        assert torch.equal(one, other), f"tensor {number} of shape {tuple(one.shape)} differs"


def largest_gap(left, right) -> float:
    return max(float((one.detach().double() - other.detach().double()).abs().max()) for one, other in zip(left, right))
