"""The last part of `hf-ext demo`: a fine-tune in a few kilobytes, from training to the answer of the reloaded adapter.

A copy of the model learns for a few steps to answer the beginning of a news article by its topic. What that changed is
compressed with `compress_delta`, written to `delta/`, published with `push_artifact` in `hub/`, a folder in the place of the
Hub, fetched from there into `pulled/` with `pull_artifact`, opened with `PeftModel.from_pretrained`, and asked for topics of
other articles, beside the base and the fine-tuned model.
"""

from __future__ import annotations

import copy
import random
import shutil
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

import hf_ext
from hf_ext.cli_delta import listing
from hf_ext.table import Row


NO_PEFT = "No fine-tune: compressed ones are PEFT adapters, and peft is missing; install it with: pip install peft"
BUDGET = 250_000
REPO_ID = "user/news-topics"
TEXT_TOKENS, ANSWER_TOKENS = 64, 6
STEPS, QUICK_STEPS, BATCH, LEARNING_RATE = 8, 4, 4, 5e-5
HELD_OUT, SHOWN, CALIBRATION = 16, 3, 4


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt, `(1, N)`, those of its answer, `(1, A)`, and the answer as text."""

    prompt: Tensor
    answer: Tensor
    topic: str

    def inputs(self) -> dict[str, Tensor]:
        """Prompt and answer, with labels on the answer alone; `(1, N + A)` each."""
        ids = torch.cat([self.prompt, self.answer], dim=1)
        labels = torch.cat([torch.full_like(self.prompt, -100), self.answer], dim=1)
        return {"input_ids": ids, "labels": labels}


@dataclass
class Answers:
    """What one model says of the held-out articles: log-probabilities `(answer tokens, vocabulary)`, and words."""

    log_p: Tensor
    targets: Tensor
    said: list[str]

    @property
    def nll(self) -> float:
        """Mean loss of the right answers' tokens, in nats."""
        return -float(self.log_p.gather(1, self.targets[:, None]).mean())

    def divergence_from(self, other: Answers) -> float:
        """Mean Kullback-Leibler divergence from the predictions of another model to these, in nats a token."""
        return float((other.log_p.exp() * (other.log_p - self.log_p)).sum(1).mean())


def make_examples(tokenizer: Any, rows: list[dict[str, str]], count: int) -> list[Example]:
    """`count` articles in an order that does not change, cut to `TEXT_TOKENS` tokens."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    order = random.Random(0).sample(range(len(rows)), min(count, len(rows)))
    found = []
    for row in (rows[number] for number in order):
        prompt = [*ids("Article: "), *ids(row["text"])[:TEXT_TOKENS], *ids("\nTopic:")]
        found.append(Example(torch.tensor([prompt]), torch.tensor([ids(" " + row["topic"])]), row["topic"]))
    return found


def answer_logits(model: Any, example: Example) -> Tensor:
    """Logits where an answer token is due, `(A, vocabulary)`; no others are computed."""
    ids, due = example.inputs()["input_ids"], example.answer.shape[1]
    return model(input_ids=ids, logits_to_keep=due + 1, use_cache=False).logits[0, :-1]


def finetune(model: Any, examples: list[Example], steps: int, console: Console) -> Any:
    """A copy of the model after `steps` steps of `BATCH` examples; every parameter is trained."""
    tuned = copy.deepcopy(model).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("fine-tuning", total=steps)
        for step in range(steps):
            batch = examples[step * BATCH : (step + 1) * BATCH]
            loss = torch.stack([cross_entropy(answer_logits(tuned, one), one.answer[0]) for one in batch]).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress.update(task, advance=1, description=f"fine-tuning, loss {loss.item():.2f}")
    return tuned.eval()


@torch.no_grad()
def ask(model: Any, tokenizer: Any, examples: list[Example]) -> Answers:
    """Predictions of the answers of all examples, and the generated answers of the first `SHOWN`."""
    log_p = []
    for example in examples:
        log_p.append(answer_logits(model, example).float().log_softmax(-1))
    said = []
    for example in examples[:SHOWN]:
        mask = torch.ones_like(example.prompt)
        output = model.generate(
            input_ids=example.prompt, attention_mask=mask, max_new_tokens=ANSWER_TOKENS, do_sample=False
        )
        text = tokenizer.decode(output[0, example.prompt.shape[1] :], skip_special_tokens=True).strip()
        said.append(text.partition("\n")[0])
    return Answers(torch.cat(log_p), torch.cat([example.answer[0] for example in examples]), said)


def run(
    model: Any, tokenizer: Any, rows: list[dict[str, str]], out: Path, quick: bool, console: Console, name: str
) -> list[Row]:
    """Fine-tune, compress, push, pull, open, answer.

    Args:
        model (`PreTrainedModel`): left as it was.
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        rows (`list[dict[str, str]]`): articles, each `{"text", "topic"}`.
        out (`Path`): the demo's folder; `delta/`, `hub/` and `pulled/` are made in it, those of an earlier demo replaced.
        quick (`bool`): fewer steps.
        console (`Console`): where the story is told.
        name (`str`): of the model, for the rows.

    Returns:
        `list[Row]`: what was measured; nothing where peft is not installed.
    """
    if find_spec("peft") is None:
        console.print(NO_PEFT)
        return []
    from peft import PeftModel

    steps = QUICK_STEPS if quick else STEPS
    examples = make_examples(tokenizer, rows, HELD_OUT + steps * BATCH)
    held_out, training = examples[:HELD_OUT], examples[HELD_OUT:]
    console.print(f"\nA fine-tune of {steps} steps, to answer the beginning of an article by its topic:")
    tuned = finetune(model, training, steps, console)
    answers = {"base": ask(model, tokenizer, held_out), "fine-tuned": ask(tuned, tokenizer, held_out)}

    delta, hub, pulled = out / "delta", out.absolute() / "hub", out / "pulled"
    shutil.rmtree(delta, ignore_errors=True)
    with console.status(f"compressing what changed to {BUDGET:,} bytes"):
        # "auto" would decompose every matrix to compare: a minute and a half of processor time on SmolLM2.
        config = hf_ext.OSDConfig(budget=BUDGET, codec="signs")
        calibration = [example.inputs() for example in training[:CALIBRATION]]
        artifact = hf_ext.compress_delta(model, tuned, config, calibration, progress=False)
        artifact.save_pretrained(delta)
    before, after = artifact.bytes_before, artifact.nbytes()
    del tuned
    console.print(f"  {artifact.form}; {artifact.choice}", markup=False, style="dim")
    _publish(delta, hub, pulled, console)

    was_training, trained = model.training, [weight for weight in model.parameters() if weight.requires_grad]
    with hf_ext.registered(), warnings.catch_warnings():
        # Of transformers to PEFT, about a name PEFT asks for.
        warnings.simplefilter("ignore", FutureWarning)
        opened = PeftModel.from_pretrained(model, str(pulled)).eval()
        try:
            answers["compressed"] = ask(opened, tokenizer, held_out)
        finally:
            opened.unload()
    model.train(was_training)
    for weight in trained:
        weight.requires_grad_(True)  # PEFT froze the base

    table = Table(title=f"{len(held_out)} other articles", title_justify="left")
    for number, cell in enumerate(("model", "MB", "answer NLL", "divergence from fine-tuned", "topics it says")):
        table.add_column(cell, justify="right" if 0 < number < 4 else "left", overflow="fold")
    size = {"base": "", "fine-tuned": f"{before / 1e6:.2f}", "compressed": f"{after / 1e6:.2f}"}
    apart = {who: found.divergence_from(answers["fine-tuned"]) for who, found in answers.items()}
    for who, found in answers.items():
        said = " | ".join(found.said)
        table.add_row(who, size[who], f"{found.nll:.3f}", f"{apart[who]:.4f}", said)
    console.print()
    console.print(table, markup=False)
    right = " | ".join(example.topic for example in held_out[:SHOWN])
    console.print(f"Right: {right}. NLL and divergence: nats a token of the right answer.", style="dim", markup=False)

    setting = f"{name}, fine-tune of {steps} steps"
    found_rows = [Row("osd", who, setting, "answer NLL", round(found.nll, 4), "nat") for who, found in answers.items()]
    found_rows += [Row("osd", who, setting, "divergence", round(apart[who], 6), "nat") for who in answers]
    found_rows += [Row("osd", "fine-tuned", setting, "bytes", before / 1e6, "MB")]
    return [*found_rows, Row("osd", "compressed", setting, "bytes", after / 1e6, "MB")]


def _publish(delta: Path, hub: Path, pulled: Path, console: Console) -> None:
    """Push `delta` into the folder of repositories `hub`, list what is there then, and pull it into `pulled`."""
    hub.mkdir(parents=True, exist_ok=True)
    # The snippet would load the base model a second time, in another Python; what it does is done here with this one.
    report = hf_ext.push_artifact(delta, REPO_ID, endpoint=hub.as_uri(), run_snippet=False)
    console.print(f"\n`hf-ext push {delta} {REPO_ID} --endpoint {hub.as_uri()} --no-snippet` put there:", markup=False)
    for line in listing(report):
        console.print(f"  {line}", markup=False)
    hf_ext.pull_artifact(REPO_ID, pulled, endpoint=hub.as_uri(), force=True)
    console.print(
        f"`hf-ext pull {REPO_ID} {pulled} --endpoint ...` fetched it; this copy is opened below.", markup=False
    )
