"""What each part of `SGCAdamW`'s default brings, and what momentum would bring: held-out loss of variants.

    python benchmarks/optimizer_ablation.py [--regime finetune|scratch] [--steps 300] [--seeds 0 1 2] [--methods NAME ...]

Models, texts and files as in `optimizer_quality.py`, the small model alone. Each variant is run at three rates on seed 0,
more while the best is at an edge, then at the best of them on all seeds.

Momentum is that of steps, `m <- 0.9 m + 0.1 d` of the step `d` that the default would make, and the matrices move by `m`.
Averaged after a cut the leading directions of one batch cannot fill it. Variants differ in how `m` is kept:

- `full`: a float32 number a weight, what all others approximate;
- `4 bit`: a sign and three bits a weight, a scale for 128, rounded stochastically;
- `measured`: 128 measurements of 1,024 weights, decoded by least squares on the 48 largest entries of `m` that the present
  step points at, the step itself elsewhere;
- `largest, error fed back`: a count-sketch of 128 numbers for 1,024 weights adds up all steps; its 48 largest entries are made
  and taken out of it, the others wait (FetchSGD, arXiv 2007.07682).

`momentum of gradients` averages before everything else, as AdamW and Muon do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.optim import Optimizer

from hf_ext.trainers.measurements import Measurement, solve_on_support, top_entries
from hf_ext.trainers.sgc_optimizer import SGCAdamW


sys.path.insert(0, str(Path(__file__).resolve().parent))
from optimizer_peers import BETAS, EPS, OURS, Make, Peer, decay_groups, sgc  # noqa: E402
from optimizer_quality import REGIMES, RESULTS, Lab  # noqa: E402


MOMENTUM = 0.9
CHUNK, MEASUREMENTS, ENTRIES = 1024, 128, 48
BITS_BLOCK, LEVELS = 128, 7
RIDGE = 1e-2

# From a step of a matrix, what the momentum kept for that matrix makes of it.
Momentum = Callable[[Tensor], Tensor]


class Full:
    """A number a weight."""

    def __init__(self) -> None:
        self.kept: Tensor | None = None
        self.steps = 0

    def __call__(self, step: Tensor) -> Tensor:
        self.steps += 1
        self.kept = self._add(torch.zeros_like(step) if self.kept is None else self.kept, step)
        return self.kept / (1 - MOMENTUM**self.steps)

    def _add(self, kept: Tensor, step: Tensor) -> Tensor:
        return kept.lerp_(step, 1 - MOMENTUM)


class FourBit(Full):
    """What `Full` keeps, at fifteen levels."""

    def __init__(self) -> None:
        super().__init__()
        self.codes, self.scales = torch.empty(0), torch.empty(0)
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, step: Tensor) -> Tensor:
        if self.steps:
            low, high = self.codes & 15, self.codes >> 4
            levels = torch.stack([low, high], -1).view(-1, BITS_BLOCK).float() - LEVELS
            self.kept = (levels * self.scales).flatten()[: step.numel()].view(step.shape)
        moved = super().__call__(step)
        blocks = _blocks(self.kept, BITS_BLOCK)
        self.scales = blocks.abs().amax(1, keepdim=True).clamp_min_(1e-30) / LEVELS
        levels = (blocks / self.scales + torch.rand(blocks.shape, generator=self.generator)).floor() + LEVELS
        pairs = levels.clamp_(0, 2 * LEVELS).to(torch.uint8).view(-1, 2)
        self.codes, self.kept = pairs[:, 0] | pairs[:, 1] << 4, None
        return moved


class Measured:
    """Measurements of the momentum, least squares on the largest entries of the step."""

    def __init__(self) -> None:
        self.kept: Tensor | None = None
        self.steps = 0

    def __call__(self, step: Tensor) -> Tensor:
        chunks, matrix = _blocks(step, CHUNK), Measurement("srht", MEASUREMENTS, CHUNK, 0)
        support = top_entries(chunks, ENTRIES)
        largest = torch.zeros_like(chunks).scatter_(1, support, chunks.gather(1, support))
        self.steps += 1
        self.kept = torch.zeros(len(chunks), MEASUREMENTS) if self.kept is None else self.kept
        self.kept.lerp_(matrix.project(largest), 1 - MOMENTUM)
        seen = matrix.correlate(self.kept / (1 - MOMENTUM**self.steps))[:, :, None]
        values = solve_on_support(matrix.gram(), support, seen, RIDGE)[:, :, 0]
        return chunks.scatter(1, support, values).flatten()[: step.numel()].view(step.shape)


class FedBack:
    """A count-sketch of all steps that were not made yet."""

    def __init__(self) -> None:
        self.momentum: Tensor | None = None
        self.waiting: Tensor | None = None

    def __call__(self, step: Tensor) -> Tensor:
        chunks, matrix = _blocks(step, CHUNK), Measurement("countsketch", MEASUREMENTS, CHUNK, 0)
        seen = matrix.project(chunks)
        self.momentum = torch.zeros_like(seen) if self.momentum is None else self.momentum
        self.waiting = torch.zeros_like(seen) if self.waiting is None else self.waiting
        self.waiting += self.momentum.lerp_(seen, 1 - MOMENTUM)
        found = matrix.correlate(self.waiting)
        support = top_entries(found, ENTRIES)
        made = torch.zeros_like(chunks).scatter_(1, support, found.gather(1, support))
        self.waiting -= matrix.project(made)
        return made.flatten()[: step.numel()].view(step.shape)


def _blocks(values: Tensor, size: int) -> Tensor:
    """`(B, size)`, zeros behind the last."""
    return pad(values.flatten(), (0, -values.numel() % size)).view(-1, size)


class StepMomentum(SGCAdamW):
    """The default, its steps of matrices averaged over time."""

    def __init__(self, groups: list[dict[str, Any]], momentum: Callable[[], Momentum], **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.make, self.momenta = momentum, {}
        self.defaults["momentum"] = momentum.__name__  # tells the variants' runs apart

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        matrices = [p for group in self.param_groups for p in group["params"] if p.ndim > 1]
        before = [matrix.clone() for matrix in matrices]
        super().step()
        for number, (matrix, old) in enumerate(zip(matrices, before, strict=True)):
            self.momenta.setdefault(number, self.make())
            matrix.copy_(old + self.momenta[number](matrix - old))


class GradientMomentum(SGCAdamW):
    """The default, fed averages of gradients."""

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.momenta: dict[int, Full] = {}
        self.defaults["momentum"] = "gradients"

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        matrices = [p for group in self.param_groups for p in group["params"] if p.ndim > 1]
        for number, matrix in enumerate(matrices):
            self.momenta.setdefault(number, Full())
            matrix.grad.copy_(self.momenta[number](matrix.grad))
        super().step()


def step_momentum(momentum: Callable[[], Momentum]) -> Make:
    return lambda model, rate: StepMomentum(decay_groups(model), momentum, lr=rate, betas=BETAS, eps=EPS)


def gradient_momentum(model: nn.Module, rate: float) -> Optimizer:
    return GradientMomentum(decay_groups(model), lr=rate, betas=BETAS, eps=EPS)


# With the middle of their grids; where steps are not relative, as Adafactor's.
VARIANTS = {
    OURS: Peer(sgc(), 5e-3, 5e-3),
    "no direction cut": Peer(sgc(directions=0), 5e-3, 5e-3),
    "4 directions cut": Peer(sgc(directions=4), 5e-3, 5e-3),
    "16 directions cut": Peer(sgc(directions=16), 5e-3, 5e-3),
    "32 directions cut": Peer(sgc(directions=32), 5e-3, 5e-3),
    "steps not relative": Peer(sgc(relative_step=False), 5e-3, 5e-3),
    "bfloat16 state": Peer(sgc(state_dtype="bfloat16"), 5e-3, 5e-3),
    "momentum, full": Peer(step_momentum(Full), 5e-3, 5e-3),
    "momentum, 4 bit": Peer(step_momentum(FourBit), 5e-3, 5e-3),
    "momentum, measured": Peer(step_momentum(Measured), 5e-3, 5e-3),
    "momentum, largest, error fed back": Peer(step_momentum(FedBack), 5e-3, 5e-3),
    "momentum of gradients, full": Peer(gradient_momentum, 2e-3, 2e-3),
}


def main() -> None:
    """Run what is missing, print as it goes, write the rows after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regime", choices=REGIMES, default="finetune")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--methods", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lab = Lab(arguments.regime, "1m", arguments.steps, arguments.batch, arguments.out, "ablation")
    for name in arguments.methods:
        lab.search(name, VARIANTS[name])
    rates = {name: rate for name in arguments.methods if (rate := lab.best_rate(name)) is not None}
    for seed in arguments.seeds:
        for name, rate in rates.items():
            lab.run(name, VARIANTS[name], rate, seed)
            lab.write(rates)


if __name__ == "__main__":
    main()
