"""Full fine-tunes of the packaged SmolLM2 on two tasks made of BBC news, and how they are judged.

    python benchmarks/finetunes.py [--tasks topics headlines] [--seeds 0 1 2]

Task `topics`: the beginning of an article, answered by its topic. Task `headlines`: the beginning of an article without
its first line, answered by that line. Each fine-tune updates every parameter (AdamW, 40 steps of four texts) and is kept
in the user's cache folder, so that a second call finds it. Held-out articles are the same for all seeds; a seed chooses
the order of training, and calibration texts are training texts.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup, set_seed

from hf_ext.models import cache_folder, load_bbc, load_smollm2


TASKS = ("headlines", "topics")
HELD_OUT, CALIBRATION = 200, 128
TEXT_TOKENS, TITLE_TOKENS = 96, 24
STEPS, BATCH, LEARNING_RATE = 40, 4, 3e-5
_VERSION = "v2"  # part of the folder's name: raise it when training changes


@dataclass
class Example:
    """Token ids of a text and how many at its end are the answer."""

    ids: list[int]
    answer: int


def examples(task: str, tokenizer, rows: list[dict[str, str]]) -> list[Example]:
    """Prompts and answers of a task, cut to `TEXT_TOKENS` tokens of the article."""
    found = []
    for row in rows:
        title, _, body = row["text"].partition("\n")
        text, answer = (row["text"], row["topic"]) if task == "topics" else (body.strip(), title.strip())
        cut = tokenizer(text)["input_ids"][:TEXT_TOKENS]
        name = "Topic" if task == "topics" else "Headline"
        prompt = tokenizer("Article: ")["input_ids"] + cut + tokenizer(f"\n{name}:")["input_ids"]
        reply = tokenizer(" " + answer)["input_ids"][:TITLE_TOKENS]
        found.append(Example(prompt + reply, len(reply)))
    return found


def splits(task: str, tokenizer, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples; the held-out ones do not depend on the seed."""
    rows = load_bbc()
    random.Random(0).shuffle(rows)
    held_out, train = rows[:HELD_OUT], rows[HELD_OUT:]
    random.Random(seed + 1).shuffle(train)
    return examples(task, tokenizer, train), examples(task, tokenizer, held_out)


def collate(batch: list[Example], pad: int = 0) -> dict[str, Tensor]:
    """Ids padded on the right, and labels that are -100 outside the answers."""
    width = max(len(item.ids) for item in batch)
    ids = torch.full((len(batch), width), pad)
    labels = torch.full((len(batch), width), -100)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    for row, item in enumerate(batch):
        n = len(item.ids)
        ids[row, :n] = torch.tensor(item.ids)
        mask[row, :n] = 1
        labels[row, n - item.answer : n] = ids[row, n - item.answer : n]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def answer_logits(model, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits `(answers, vocabulary)` where an answer token is due, and those tokens; no others are computed."""
    hidden = model.get_decoder()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    due = batch["labels"][:, 1:] != -100
    return model.get_output_embeddings()(hidden[:, :-1][due]), batch["labels"][:, 1:][due]


def held_out_logits(model, examples: list[Example], batch_size: int = 16) -> tuple[Tensor, Tensor]:
    """Log-probabilities `(answers, vocabulary)` in half precision, and the right tokens."""
    outputs = []
    with torch.no_grad():
        for start in range(0, len(examples), batch_size):
            logits, labels = answer_logits(model, collate(examples[start : start + batch_size]))
            outputs.append((logits.log_softmax(-1).half(), labels))
    return torch.cat([o[0] for o in outputs]), torch.cat([o[1] for o in outputs])


def folder_of(task: str, seed: int) -> Path:
    """Where the fine-tune of a task and a seed is kept."""
    return cache_folder() / f"finetune-{task}-{seed}-{_VERSION}"


def finetune(task: str, seed: int) -> Path:
    """The folder of a fine-tuned SmolLM2, trained now if it does not exist."""
    folder = folder_of(task, seed)
    if folder.is_dir():
        return folder
    set_seed(seed)
    model, tokenizer = load_smollm2()
    train, _ = splits(task, tokenizer, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, STEPS // 10, STEPS)
    model.train()
    progress = tqdm(range(STEPS), desc=f"{task} {seed}")
    for step in progress:
        logits, labels = answer_logits(model, collate(train[step * BATCH : (step + 1) * BATCH]))
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    partial = Path(tempfile.mkdtemp(prefix=folder.name + ".partial-", dir=folder.parent))
    try:
        model.eval().save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def main() -> None:
    """Train what is missing and print the loss on 32 held-out texts before and after."""
    from transformers import AutoModelForCausalLM

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_smollm2()
    for seed in arguments.seeds:
        for task in arguments.tasks:
            folder = finetune(task, seed)
            held_out = splits(task, tokenizer, seed)[1][:32]
            losses = []
            for judged in (model, AutoModelForCausalLM.from_pretrained(folder).eval()):
                log_p, labels = held_out_logits(judged, held_out)
                losses.append(-log_p.float().gather(1, labels[:, None]).mean().item())
            print(f"{task} seed {seed}: held-out loss {losses[0]:.4f} before, {losses[1]:.4f} after", flush=True)


if __name__ == "__main__":
    main()
