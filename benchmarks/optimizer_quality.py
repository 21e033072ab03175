"""What optimizers reach with how much state: held-out loss of small Llamas, each optimizer at the best of its rates.

    python benchmarks/optimizer_quality.py --grid [--regime scratch|finetune] [--size 1m|10m]
    python benchmarks/optimizer_quality.py [--regime scratch|finetune] [--size 1m|10m] [--seeds 0 1 2]

Regime `scratch`: random weights, four topics of the BBC news, 60 of their articles held out. Regime `finetune`: a model that
AdamW trained so (1000 steps of four sequences, made once a seed and kept in the user's cache folder), then the fifth topic,
sports, 48 articles held out. Sequences of 128 tokens; warm-up over 5% of the steps, a cosine down to 5% of the rate, decay of
0.01, gradients clipped to norm 1. A seed chooses initial weights and order; held-out articles are the same for all. The
size 10m is trained with bfloat16 autocast, float32 weights, and judged in float32.

`--grid` tries three rates of each optimizer on seed 0, and more in the direction of the best while it is at an edge, four
at most; all are kept in `optimizer_grid_<regime>_<size>.json`. Without it all seeds run at the best rate of seed 0. Rates are chosen by
the held-out loss of seed 0 that is also reported, for ours and peers alike. Every run is written to `runs/` as soon as it is
done and is never run twice: whoever is stopped goes on where it was. State is what `true_state_bytes` counts after the last
step, as a share of AdamW's eight bytes a parameter of the whole model. Differences are to ours of the same seed; times are
`optimizer_speed.py`'s.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import statistics
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from hf_ext.config import write_text_atomic
from hf_ext.models import cache_folder
from hf_ext.table import Row, read_rows, write_rows
from hf_ext.trainers.sgc_optimizer import SGCAdamW


sys.path.insert(0, str(Path(__file__).resolve().parent))
import small_finetunes  # noqa: E402
from optimizer_peers import OURS, Peer, adamw, choose, neighbour, true_state_bytes  # noqa: E402


RESULTS = Path(__file__).resolve().parent / "results"
REGIMES = ("scratch", "finetune")
# Parameters, tied embedding included: 1.12 and 10.56 million.
SIZES = {
    "1m": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4},
    "10m": {"hidden_size": 384, "intermediate_size": 1184, "num_hidden_layers": 5, "num_attention_heads": 6},
}
AUTOCAST = ("10m",)  # sizes
HELD_OUT = 60  # articles of the regime `scratch`
WARM_UP, FLOOR, CLIP = 0.05, 0.05, 1.0
STEPS = {"scratch": 250, "finetune": 200}
BASE_STEPS, BASE_BATCH, BASE_RATE = 1000, 4, 3e-3
EXTENSIONS = 4
_VERSION = "v1"  # part of the folder's name: raise it when training of the base model changes
# Of the modes of `SGCAdamW`: raise one when it computes something else, and its runs of before count no more.
ARITHMETIC = {"factored": 6, "paper": 1, "hybrid": 1, "block": 1}
# Quantiles of Student's t for 95% intervals, by degrees of freedom.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

Run = dict[str, Any]


@lru_cache(maxsize=4)
def sequences(regime: str, part: str) -> Tensor:
    """`(sequences, LENGTH)` ids of the part `train` or `held_out`."""
    if regime == "finetune":
        return small_finetunes.sequences(part)
    texts = small_finetunes.articles()["base"]
    texts = texts[:-HELD_OUT] if part == "train" else texts[-HELD_OUT:]
    bpe, length = small_finetunes.tokenizer(), small_finetunes.LENGTH
    end = bpe.token_to_id(small_finetunes.END)
    ids = [token for text in bpe.encode_batch(texts) for token in (*text.ids, end)]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def batch_of(regime: str, seed: int, step: int, batch: int) -> Tensor:
    """Ids `(batch, LENGTH)` of a step; every pass has an order of its own."""
    found = sequences(regime, "train")
    each = len(found) // batch
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(1000 * seed + step // each))
    at = step % each * batch
    return found[order[at : at + batch]]


def build(size: str, seed: int) -> LlamaForCausalLM:
    """A model with random weights."""
    set_seed(seed)
    end = small_finetunes.tokenizer().token_to_id(small_finetunes.END)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=small_finetunes.VOCABULARY,
            max_position_embeddings=small_finetunes.LENGTH,
            tie_word_embeddings=True,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
            **SIZES[size],
        )
    )


def base_model(size: str, seed: int) -> Path:
    """The folder of a model that AdamW trained on the four topics, trained now if it does not exist."""
    folder = cache_folder() / f"optimizer-base-{size}-{seed}-{_VERSION}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=folder.name + ".partial-", dir=folder.parent))
        try:
            model = build(size, seed)
            train(model, adamw(model, BASE_RATE), "scratch", size, seed, BASE_STEPS, BASE_BATCH)
            model.save_pretrained(partial)
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def start(regime: str, size: str, seed: int) -> LlamaForCausalLM:
    """The model a run begins with."""
    if regime == "scratch":
        return build(size, seed)
    return LlamaForCausalLM.from_pretrained(base_model(size, seed))


def token_loss(model, ids: Tensor) -> Tensor:
    """Mean loss of all predicted tokens, in nats."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def factor(step: int, steps: int) -> float:
    """Of the rate at a step."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def train(model, optimizer: Optimizer, regime: str, size: str, seed: int, steps: int, batch: int) -> bool:
    """Whether the loss stayed finite."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    schedule = LambdaLR(optimizer, lambda step: factor(step, steps))
    model.train()
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=size in AUTOCAST):
            loss = token_loss(model, batch_of(regime, seed, step, batch))
        if not math.isfinite(loss.item()):
            return False
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, CLIP)
        try:
            optimizer.step()
        except FloatingPointError:
            return False
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    return True


def settings_of(optimizer: Optimizer) -> str:
    """What an `SGCAdamW` is but its rate: budgets may choose what another line has; `""` for peers."""
    if not isinstance(optimizer, SGCAdamW):
        return ""
    return json.dumps({name: value for name, value in optimizer.defaults.items() if name != "lr"}, sort_keys=True)


def arithmetic(settings: str) -> int:
    """Version of what an `SGCAdamW` with these settings computes, 1 for peers."""
    return ARITHMETIC[json.loads(settings)["mode"]] if settings else 1


class Lab:
    """Runs of one regime and size, kept in files.

    Args:
        regime, size, steps, batch: what is trained, and for how long.
        folder: where results go.
        study: in their files' names.
    """

    def __init__(self, regime: str, size: str, steps: int, batch: int, folder: Path, study: str = "quality") -> None:
        self.regime, self.size, self.steps, self.batch = regime, size, steps, batch
        grid = "grid" if study == "quality" else f"{study}_grid"
        self.runs_path = folder / "runs" / f"optimizer_{study}_{regime}_{size}.json"
        self.rows_path = folder / f"optimizer_{study}_{regime}_{size}.json"
        self.grid_path = folder / f"optimizer_{grid}_{regime}_{size}.json"

    @property
    def setting(self) -> str:
        return f"{self.regime}, {self.size}, {self.steps} steps, batch {self.batch}"

    def runs(self) -> list[Run]:
        """All runs of these steps and batch, and of the present arithmetic."""
        found = json.loads(self.runs_path.read_text()) if self.runs_path.is_file() else []
        found = [run for run in found if (run["steps"], run["batch"]) == (self.steps, self.batch)]
        return [run for run in found if run.get("arithmetic", 1) == arithmetic(run["settings"])]

    def keep(self, run: Run) -> None:
        """Add a run to the file, in which others may have been written meanwhile."""
        found = json.loads(self.runs_path.read_text()) if self.runs_path.is_file() else []
        self.runs_path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(item, allow_nan=False) for item in [*found, run]]
        write_text_atomic(self.runs_path, "[\n" + ",\n".join(lines) + "\n]\n")

    def run(self, name: str, peer: Peer, rate: float, seed: int) -> Run:
        """One run, out of the file if it is there with the same settings."""
        # Random weights say what the settings are; the model a run begins with may have to be trained first.
        settings = settings_of(peer.make(build(self.size, seed), rate))
        same = [
            r for r in self.runs() if math.isclose(r["rate"], rate) and (r["seed"], r["settings"]) == (seed, settings)
        ]
        for run in same:
            if run["method"] == name:
                return run
        for run in same if settings else ():
            copy = {**run, "method": name}
            self.keep(copy)
            print(f"{self.setting}: {name} is {run['method']}", flush=True)
            return copy
        model = start(self.regime, self.size, seed)
        parameters = sum(weight.numel() for weight in model.parameters())
        set_seed(seed)
        optimizer = peer.make(model, rate)
        loss = math.nan
        if train(model, optimizer, self.regime, self.size, seed, self.steps, self.batch):
            size = true_state_bytes(optimizer)
            loss = small_finetunes.loss(model, list(sequences(self.regime, "held_out").split(16)))
        finite = math.isfinite(loss)
        run = {
            "method": name,
            "rate": rate,
            "seed": seed,
            "steps": self.steps,
            "batch": self.batch,
            "loss": loss if finite else None,  # no JSON for a loss that is not finite
            "state_bytes": size if finite else None,
            "parameters": parameters,
            "settings": settings,
            "arithmetic": arithmetic(settings),
        }
        self.keep(run)
        what = f"loss {loss:.4f}, state {size / 8 / parameters:.4%}" if finite else "diverged"
        print(f"{self.setting}: {name}, rate {rate:g}, seed {seed}: {what}", flush=True)
        return run

    def search(self, name: str, peer: Peer, rates: list[float] | None = None) -> None:
        """The grid of an optimizer on seed 0, begun with `rates` or its own; the best rate is written."""
        tried = {rate: self.run(name, peer, rate, 0) for rate in rates or peer.grid(self.regime)}
        for _ in range(EXTENSIONS):
            best = min(tried, key=lambda rate: _loss(tried[rate]))
            if best not in (min(tried), max(tried)):
                break
            # Nothing finite at all: lower.
            up = best == max(tried) and math.isfinite(_loss(tried[best]))
            rate = neighbour(min(tried) if not up else max(tried), up)
            if rate is None:
                break
            tried[rate] = self.run(name, peer, rate, 0)
        best = min(tried, key=lambda rate: _loss(tried[rate]))
        if not math.isfinite(_loss(tried[best])):
            print(f"{name}: every rate diverged", flush=True)
            return
        if best in (min(tried), max(tried)):
            print(f"{name}: the best rate {best:g} is still at the edge of {sorted(tried)}", flush=True)
        old = read_rows(self.grid_path) if self.grid_path.is_file() else []
        mine = (self.setting, f"{self.setting}, rate")
        rows = [row for row in old if row.system != name or row.setting.rpartition(" ")[0] not in mine]
        rows.append(Row("sgc", name, self.setting, "best rate", best))
        for rate, run in tried.items():
            if run["loss"] is not None:
                rows.append(
                    Row("sgc", name, f"{self.setting}, rate {rate:g}", "held-out loss, seed 0", run["loss"], "nats")
                )
        # A column a rate, from low to high.
        rows.sort(key=lambda row: float(row.setting.rpartition(" rate ")[2]) if " rate " in row.setting else 0.0)
        self.grid_path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(self.grid_path, rows)

    def best_rate(self, name: str) -> float | None:
        """Of the runs of seed 0."""
        tried = [run for run in self.runs() if (run["method"], run["seed"]) == (name, 0) and run["loss"] is not None]
        return min(tried, key=_loss)["rate"] if tried else None

    def run_seeds(self, peers: dict[str, Peer], seeds: list[int]) -> None:
        """Every optimizer at its best rate, the rows written after every run."""
        rates = {name: rate for name in peers if (rate := self.best_rate(name)) is not None}
        for name in peers.keys() - rates.keys():
            print(f"{name}: no run of seed 0; run with --grid first", flush=True)
        # Seed after seed, so that all have as many wherever it is stopped.
        for seed in seeds:
            for name, rate in rates.items():
                self.run(name, peers[name], rate, seed)
                self.write(rates)

    def write(self, rates: dict[str, float]) -> None:
        """Rows of the runs at these rates; those of other steps, batches and optimizers stay."""
        found = {name: self._by_seed(name, rate) for name, rate in rates.items()}
        best = self.best_rate(OURS)
        ours = {} if best is None else self._by_seed(OURS, best)
        rows = []
        for name, by_seed in found.items():
            if not by_seed:
                continue
            last = list(by_seed.values())[-1]
            share = 100 * last["state_bytes"] / 8 / last["parameters"]
            rows.append(self._row(name, "held-out loss", [run["loss"] for run in by_seed.values()], "nats"))
            rows.append(Row("sgc", name, self.setting, "state, share of AdamW's", share, "%"))
            both = [run["loss"] - ours[seed]["loss"] for seed, run in by_seed.items() if seed in ours]
            if name != OURS and len(both) > 1:
                rows.append(self._row(name, "loss above sgc", both, "nats"))
                half = T95[min(len(both) - 2, len(T95) - 1)] * statistics.stdev(both) / math.sqrt(len(both))
                rows.append(
                    Row("sgc", name, self.setting, "loss above sgc, half of its 95% interval", half, "nats", len(both))
                )
        kept = read_rows(self.rows_path) if self.rows_path.is_file() else []
        kept = [row for row in kept if row.setting != self.setting or row.system not in found]
        self.rows_path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(self.rows_path, [*kept, *rows])

    def _by_seed(self, name: str, rate: float) -> dict[int, Run]:
        runs = [run for run in self.runs() if run["method"] == name and run["loss"] is not None]
        return {run["seed"]: run for run in runs if math.isclose(run["rate"], rate)}

    def _row(self, name: str, metric: str, values: list[float], unit: str) -> Row:
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return Row("sgc", name, self.setting, metric, statistics.mean(values), unit, len(values), spread)


def _loss(run: Run) -> float:
    return math.inf if run["loss"] is None else run["loss"]


def main() -> None:
    """Run what is missing, print as it goes, write the rows after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regime", choices=REGIMES, default="finetune")
    parser.add_argument("--size", choices=tuple(SIZES), default="1m")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help=f"by default {STEPS}")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--methods", nargs="+", metavar="NAME")
    parser.add_argument("--rates", nargs="+", type=float, help="that a grid begins with, instead of three of its own")
    parser.add_argument("--grid", action="store_true", help="find the rates, on seed 0")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    steps = arguments.steps or STEPS[arguments.regime]
    lab = Lab(arguments.regime, arguments.size, steps, arguments.batch, arguments.out)
    peers = choose(arguments.methods, arguments.regime)
    if arguments.grid:
        for name, peer in peers.items():
            lab.search(name, peer, arguments.rates)
        return
    lab.run_seeds(peers, arguments.seeds)


if __name__ == "__main__":
    main()
