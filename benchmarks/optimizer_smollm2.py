"""Full fine-tunes of the packaged SmolLM2 on topics of BBC news: answers, state and memory of three optimizers.

    python benchmarks/optimizer_smollm2.py --grid
    python benchmarks/optimizer_smollm2.py [--seeds 0 1 2] [--methods AdamW Adafactor sgc]

Texts and prompts of `finetunes.py`: the beginning of an article, answered by its topic. 60 steps of four texts in float32,
warm-up over a tenth, then a cosine to zero, gradients clipped to norm 1, no decay. On 100 held-out texts: the loss of the
answer, and how often the right topic's first token is the likeliest of the five. Every run is a process of its own whose
peak of resident memory the operating system tells; weights and gradients alone are 1.08 GB of it.

`--grid` tries three rates of each optimizer on seed 0; afterwards all seeds run at the one with the lowest held-out loss,
without a grid at the middle one. Every run is written to `runs/` as soon as it is done and is never run twice.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import get_cosine_schedule_with_warmup, set_seed

from hf_ext.config import write_text_atomic
from hf_ext.models import load_bbc, load_smollm2
from hf_ext.table import Row, write_rows


sys.path.insert(0, str(Path(__file__).resolve().parent))
import finetunes  # noqa: E402
from optimizer_peers import PEERS, true_state_bytes  # noqa: E402
from optimizer_quality import RESULTS, Run, arithmetic, settings_of  # noqa: E402


BATCH, TEXTS = 4, 100
RATES = {"sgc": (1e-5, 3e-5, 1e-4), "AdamW": (1e-5, 3e-5, 1e-4), "Adafactor": (1e-5, 3e-5, 1e-4)}


def judge(model, tokenizer, held_out: list[finetunes.Example]) -> tuple[float, float]:
    """Loss of the answers' tokens in nats, and share of texts whose topic is found."""
    topics = [tokenizer(" " + topic)["input_ids"][0] for topic in sorted({row["topic"] for row in load_bbc()})]
    log_p, labels = finetunes.held_out_logits(model, held_out)
    ends = torch.tensor([item.answer for item in held_out]).cumsum(0)
    first = torch.cat([torch.zeros(1, dtype=torch.long), ends[:-1]])
    chosen = torch.tensor(topics)[log_p[first][:, topics].argmax(-1)]
    loss = -log_p.float().gather(1, labels[:, None]).mean().item()
    return loss, float((chosen == labels[first]).float().mean())


def one(name: str, rate: float, seed: int, steps: int, texts: int) -> Run:
    """Train and judge in this process."""
    set_seed(seed)
    model, tokenizer = load_smollm2()
    train, held_out = finetunes.splits("topics", tokenizer, seed)
    optimizer = PEERS[name].make(model, rate)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    model.train()
    seconds = []
    began = time.process_time()
    for step in range(steps):
        loss = F.cross_entropy(
            *finetunes.answer_logits(model, finetunes.collate(train[step * BATCH : (step + 1) * BATCH]))
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        at = time.process_time()
        optimizer.step()
        seconds.append(time.process_time() - at)
        schedule.step()
        optimizer.zero_grad()
        print(f"{name}, rate {rate:g}, seed {seed}, step {step + 1}: {loss.item():.3f}", file=sys.stderr, flush=True)
    spent = time.process_time() - began
    # Before judging: held-out logits are no part of training.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6 if sys.platform != "darwin" else math.nan
    loss, accuracy = judge(model.eval(), tokenizer, held_out[:texts])
    return {
        "method": name,
        "rate": rate,
        "seed": seed,
        "steps": steps,
        "texts": texts,
        "loss": loss,
        "accuracy": accuracy,
        "state_mb": true_state_bytes(optimizer) / 1e6,
        "peak_gb": peak,
        "step_ms": 1000 * statistics.median(seconds),
        "seconds_a_step": spent / steps,
        "settings": settings_of(optimizer),
        "arithmetic": arithmetic(settings_of(optimizer)),
    }


class Lab:
    """Runs of all optimizers, kept in files of a folder."""

    def __init__(self, folder: Path, steps: int, texts: int) -> None:
        self.steps, self.texts = steps, texts
        self.runs_path, self.rows_path = folder / "runs" / "optimizer_smollm2.json", folder / "optimizer_smollm2.json"

    def all_runs(self) -> list[Run]:
        return json.loads(self.runs_path.read_text()) if self.runs_path.is_file() else []

    def runs(self, name: str) -> list[Run]:
        wanted = (name, self.steps, self.texts)
        found = [run for run in self.all_runs() if (run["method"], run["steps"], run["texts"]) == wanted]
        return [run for run in found if run.get("arithmetic", 1) == arithmetic(run.get("settings", ""))]

    def run(self, name: str, rate: float, seed: int) -> None:
        """One run in a process of its own, if it is not in the file."""
        if any(math.isclose(run["rate"], rate) and run["seed"] == seed for run in self.runs(name)):
            return
        task: dict[str, Any] = {"name": name, "rate": rate, "seed": seed, "steps": self.steps, "texts": self.texts}
        command = [sys.executable, str(Path(__file__).resolve()), "--one", json.dumps(task)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{name}, rate {rate:g}, seed {seed}: failed, its message stands above", flush=True)
            return
        run = json.loads(done.stdout.strip().splitlines()[-1])
        if not math.isfinite(run["loss"]):
            run["loss"] = None  # no JSON for it
        lines = [json.dumps(item, allow_nan=False) for item in [*self.all_runs(), run]]
        self.runs_path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(self.runs_path, "[\n" + ",\n".join(lines) + "\n]\n")
        print(json.dumps(run), flush=True)

    def best_rate(self, name: str) -> float:
        """That of seed 0, the middle one where there is no grid."""
        tried = [run for run in self.runs(name) if run["seed"] == 0 and run["loss"] is not None]
        return min(tried, key=lambda run: run["loss"])["rate"] if len(tried) > 1 else RATES[name][1]

    def write(self) -> None:
        """Rows of all optimizers at their best rates."""
        setting = f"SmolLM2 topics, {self.steps} steps, batch {BATCH}, {self.texts} texts"
        rows = []
        for name in RATES:
            best = self.best_rate(name)
            runs = [r for r in self.runs(name) if math.isclose(r["rate"], best) and r["loss"] is not None]
            if not runs:
                continue
            for metric, key, unit, scale in (
                ("held-out loss", "loss", "nats", 1),
                ("topics found", "accuracy", "%", 100),
                ("state", "state_mb", "MB", 1),
                ("peak resident memory", "peak_gb", "GB", 1),
                ("optimizer step", "step_ms", "ms", 1),
                ("best rate", "rate", "", 1),
            ):
                values = [scale * run[key] for run in runs]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                rows.append(Row("sgc", name, setting, metric, statistics.mean(values), unit, len(values), spread))
        write_rows(self.rows_path, rows)


def main() -> None:
    """Run what is missing, write the rows after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=tuple(RATES), default=list(RATES))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--texts", type=int, default=TEXTS)
    parser.add_argument("--grid", action="store_true", help="find the rates, on seed 0")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        print(json.dumps(one(**json.loads(arguments.one))))
        return
    lab = Lab(arguments.out, arguments.steps, arguments.texts)
    for seed in [0] if arguments.grid else arguments.seeds:
        for name in arguments.methods:
            for rate in RATES[name] if arguments.grid else [lab.best_rate(name)]:
                lab.run(name, rate, seed)
                lab.write()


if __name__ == "__main__":
    main()
