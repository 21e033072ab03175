"""What each part of `SGCAdamW`'s default brings, and what momentum would bring: held-out loss of variants.

    python benchmarks/optimizer_ablation.py [--regime finetune|scratch] [--steps 300] [--seeds 0 1 2] [--methods NAME ...]

Models, texts and files as in `optimizer_quality.py`, the small model alone. Each variant is run at three rates on seed 0,
more while the best is at an edge, then at the best of them on all seeds.

Momentum is that of steps, `m <- 0.9 m + 0.1 d` of the step `d` that the default would make, and the matrices move by `m`.
Averaged after a cut the leading directions of one batch cannot fill it. Variants differ in how `m` is kept:

- `full`: a float32 number a weight, what all others approximate;
- `4 bit`: a sign and three bits a weight, a scale for 128, rounded stochastically;
- `measured`: 128 measurements of 1,024 weights; the 48 entries that correlate most with them are decoded by least squares and
  move by that, all others by the step itself;
- `largest, error fed back`: a count-sketch of 128 numbers for 1,024 weights adds up all averaged steps; the 48 entries that
  correlate most are decoded, made and taken out of it, what is left waits. FetchSGD (arXiv 2007.07682) with least squares:
  plain correlations, taken out again and again, grow without bound here.

`m` is corrected for its start at zero in all but the last, and averages decay with the steps. `momentum of gradients` averages
before everything else, as Muon does. Matrices that a seed describes are not counted as state.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import lru_cache
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
VERSION = 1  # of the variants below: raise it when they compute something else

# From a step of a matrix, what the momentum kept for that matrix makes of it.
Momentum = Callable[[Tensor], Tensor]


class Full:
    """A number a weight."""

    def __init__(self) -> None:
        self.kept: Tensor | None = None
        self.steps = 0

    def __call__(self, step: Tensor) -> Tensor:
        self.steps += 1
        self.kept = torch.zeros_like(step) if self.kept is None else self.kept
        self.kept.lerp_(step, 1 - MOMENTUM)
        return self.kept / (1 - MOMENTUM**self.steps)


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


@lru_cache(maxsize=2)
def matrix_and_gram(kind: str) -> tuple[Measurement, Tensor]:
    matrix = Measurement(kind, MEASUREMENTS, CHUNK, 0)
    return matrix, matrix.gram()


def decode(kind: str, measured: Tensor) -> tuple[Tensor, Tensor]:
    """Places and values of the entries that explain measurements best, `(C, ENTRIES)` each."""
    matrix, gram = matrix_and_gram(kind)
    seen = matrix.correlate(measured)
    places = top_entries(seen, ENTRIES)
    return places, solve_on_support(gram, places, seen[:, :, None], RIDGE)[:, :, 0]


class Measured:
    """Measurements of the momentum."""

    def __init__(self) -> None:
        self.kept: Tensor | None = None
        self.steps = 0

    def __call__(self, step: Tensor) -> Tensor:
        chunks, matrix = _blocks(step, CHUNK), matrix_and_gram("srht")[0]
        self.steps += 1
        self.kept = torch.zeros(len(chunks), MEASUREMENTS) if self.kept is None else self.kept
        self.kept.lerp_(matrix.project(chunks), 1 - MOMENTUM)
        places, values = decode("srht", self.kept / (1 - MOMENTUM**self.steps))
        return chunks.scatter(1, places, values).flatten()[: step.numel()].view(step.shape)


class FedBack:
    """A count-sketch of all steps that were not made yet."""

    def __init__(self) -> None:
        self.momentum: Tensor | None = None
        self.waiting: Tensor | None = None

    def __call__(self, step: Tensor) -> Tensor:
        chunks, matrix = _blocks(step, CHUNK), matrix_and_gram("countsketch")[0]
        seen = matrix.project(chunks)
        self.momentum = torch.zeros_like(seen) if self.momentum is None else self.momentum
        self.waiting = torch.zeros_like(seen) if self.waiting is None else self.waiting
        self.waiting += self.momentum.lerp_(seen, 1 - MOMENTUM)
        made = torch.zeros_like(chunks).scatter_(1, *decode("countsketch", self.waiting))
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
        self.defaults["momentum"] = f"{momentum.__name__} {VERSION}"  # tells the variants' runs apart

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
        self.defaults["momentum"] = f"gradients {VERSION}"

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


# With the middle of their grids.
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
    variants = {name: VARIANTS[name] for name in arguments.methods}
    for name, variant in variants.items():
        lab.search(name, variant)
    lab.run_seeds(variants, arguments.seeds)


if __name__ == "__main__":
    main()
