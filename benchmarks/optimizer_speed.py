"""Processor time of an optimizer's step alone, on a Llama of 10.6 million parameters, as a ratio to AdamW's.

    python benchmarks/optimizer_speed.py [--rounds 15] [--methods NAME ...] [--out benchmarks/results/optimizer_speed.json]

Every optimizer has weights of its own and all read the same gradients. All step once in every round, one after the other, so
that what else the machine does meets all alike; a ratio is to the step of `torch.optim.AdamW(foreach=True)` in the same
round, on one thread. Two rounds are for warming up. Medians over rounds, and their standard deviation.

A step of AdamW makes temporaries of the model's size. Whether their memory is mapped anew every time, which takes half as long
again, is the allocator's choice and depends on what else the process did: with all optimizers in the list it is not, and AdamW
is at its fastest; with `--methods sgc` it is.

Slow optimizers take part in the first three rounds only. Projections that are made anew every 200 steps, in GaLore, APOLLO
and `sgc, paper rank 8`, happen while warming up: they come on top. LoRA updates its adapters alone.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch

from hf_ext.table import Row, write_rows


sys.path.insert(0, str(Path(__file__).resolve().parent))
from optimizer_peers import PEERS, choose, true_state_bytes  # noqa: E402
from optimizer_quality import RESULTS, SIZES, build, settings_of  # noqa: E402


WARM_UP, SLOW_ROUNDS = 2, 3
REFERENCE = "AdamW"


def prepare(size: str, names: list[str] | None) -> dict[str, tuple[torch.optim.Optimizer, bool]]:
    """Optimizers with gradients in place, and whether each is slow; the reference is always among them."""
    peers = choose(names)
    peers = {**choose([REFERENCE]), **peers}
    model = build(size, 0)
    generator = torch.Generator().manual_seed(0)
    # The size of a gradient after clipping.
    scale = sum(weight.numel() for weight in model.parameters()) ** -0.5
    gradients = {n: scale * torch.randn(w.shape, generator=generator) for n, w in model.named_parameters()}
    found = {}
    for name, peer in peers.items():
        mine = copy.deepcopy(model)
        optimizer = peer.make(mine, peer.finetune)
        settings = settings_of(optimizer)
        if settings and settings in {settings_of(other) for other, _ in found.values()}:
            print(f"{name}: left out, a budget chose what stands in another line", flush=True)
            continue
        for weight_name, weight in mine.named_parameters():
            if weight.requires_grad:
                other = gradients.get(weight_name)
                weight.grad = scale * torch.randn(weight.shape, generator=generator) if other is None else other
        found[name] = optimizer, peer.slow
    return found


def measure(optimizers: dict[str, tuple[torch.optim.Optimizer, bool]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of a step, by optimizer and round; those for warming up are left out."""
    found: dict[str, list[float]] = {name: [] for name in optimizers}
    shared = [group["params"] for group in optimizers[REFERENCE][0].param_groups]
    before = [weight.grad.clone() for weights in shared for weight in weights]
    for number in range(rounds + WARM_UP):
        for name, (optimizer, slow) in optimizers.items():
            if slow and number >= WARM_UP + SLOW_ROUNDS:
                continue
            began = time.process_time()
            optimizer.step()
            spent = 1000 * (time.process_time() - began)
            if number >= WARM_UP:
                found[name].append(spent)
        print(f"round {number + 1} of {rounds + WARM_UP}", flush=True)
    if not all(map(torch.equal, before, (weight.grad for weights in shared for weight in weights))):
        raise SystemExit("an optimizer changed the gradients that all share.")
    return found


def rows_of(name: str, times: list[float], reference: list[float], setting: str, size: int) -> list[Row]:
    ratios = [mine / other for mine, other in zip(times, reference)]
    rows = []
    for metric, values, unit in (("time over AdamW's step", ratios, "x"), ("optimizer step", times, "ms")):
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        rows.append(Row("sgc", name, setting, metric, statistics.median(values), unit, len(values), spread))
    rows.append(Row("sgc", name, setting, "state", size / 1e6, "MB"))
    return rows


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="10m")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="all by default, slow ones too")
    parser.add_argument("--out", type=Path, default=RESULTS / "optimizer_speed.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    optimizers = prepare(arguments.size, arguments.methods or list(PEERS))
    times = measure(optimizers, arguments.rounds)
    setting = f"{arguments.size} Llama, float32, 1 thread"
    rows = []
    for name, (optimizer, _) in optimizers.items():
        rows += rows_of(name, times[name], times[REFERENCE], setting, true_state_bytes(optimizer))
        print(f"{name}: {rows[-3].value:.2f}x AdamW's, {rows[-2].value:.1f} ms, {rows[-1].value:.2f} MB", flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    print(write_rows(arguments.out, rows))


if __name__ == "__main__":
    main()
