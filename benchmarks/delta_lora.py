"""A LoRA trained on the task from the start and stored in int8: what its bytes buy, beside compressed full fine-tunes.

    python benchmarks/delta_lora.py [--tasks headlines topics] [--seed 0] [--rank 8]

The same texts, steps and schedule as the full fine-tune of `finetunes.py`, learning rate 1e-3, every linear layer of the
blocks. Not a compression of the fine-tune, so it is listed apart: recovery compares its held-out loss with that of base
and full fine-tune. Bytes are those of all factors with one signed byte a value and a float16 step a row.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup, set_seed

from hf_ext.table import Row, write_rows


sys.path.insert(0, str(Path(__file__).resolve().parent))
import finetunes  # noqa: E402
from delta_quality import RESULTS, smollm2_case  # noqa: E402


LEARNING_RATE = 1e-3


def to_int8(model) -> int:
    """Round every factor to int8 in place; bytes of the values and steps."""
    stored = []
    for name, weight in model.named_parameters():
        if "lora_" in name:
            step = (weight.data.abs().amax(1, keepdim=True) / 127).half().float().clamp_min(1e-7)
            codes = (weight.data / step).round().clamp(-127, 127).to(torch.int8)
            stored += [codes.numpy().tobytes(), step.half().numpy().tobytes()]
            weight.data = codes.float() * step
    return len(b"".join(stored))


def measure(task: str, seed: int, rank: int) -> tuple[float, float, int]:
    """Recovery, agreement and bytes of one LoRA."""
    base, _, judge, _ = smollm2_case(task, seed)
    tokenizer = finetunes.load_smollm2()[1]
    train, _ = finetunes.splits(task, tokenizer, seed)
    set_seed(seed)
    model = get_peft_model(
        base, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, finetunes.STEPS // 10, finetunes.STEPS)
    inner = model.get_base_model()
    for step in tqdm(range(finetunes.STEPS), desc=f"LoRA {task}"):
        batch = finetunes.collate(train[step * finetunes.BATCH : (step + 1) * finetunes.BATCH])
        F.cross_entropy(*finetunes.answer_logits(inner, batch)).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    size = to_int8(model)
    loss, choices = judge.score(inner)
    recovery = min((judge.base_loss - loss) / (judge.base_loss - judge.tuned_loss), 1.0)
    return recovery, float((choices == judge.choices).float().mean()), size


def main() -> None:
    """Train, print, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=finetunes.TASKS, default=finetunes.TASKS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rank", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for task in arguments.tasks:
        recovery, agreement, size = measure(task, arguments.seed, arguments.rank)
        print(task, recovery, agreement, size, flush=True)
        for metric, value, unit in (("recovery", recovery, ""), ("agreement", agreement, ""), ("size", size, "bytes")):
            rows.append(
                Row("osd", f"trained LoRA r={arguments.rank} int8", f"SmolLM2 {task}", metric, float(value), unit)
            )
    print(write_rows(RESULTS / "delta_lora.json", rows))


if __name__ == "__main__":
    main()
