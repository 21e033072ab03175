"""Small models made from scratch and fine-tuned in full, for benchmarks of delta codecs that must run in minutes.

    python benchmarks/small_finetunes.py [--seeds 0 1 2]

A Llama of 1.1 million parameters is trained on four topics of the BBC news (business, entertainment, politics, tech) and
then on the fifth (sports). Both models are kept in the user's cache folder under `base` and `tuned`, so that a second
call finds them. A seed chooses the initial weights and the order of training; the tokenizer (trained on the four topics)
and the held-out sports articles are the same for all seeds, and nothing is trained on those articles.

The fine-tune updates all weights of the blocks and all norms and leaves the tied embedding alone. Codecs of block
matrices drop the embedding's change, and after two minutes of training from scratch that change is most of the gain:
seed 0, tuned in full, kept 0.47 of it without its embedding, against 0.96 here (0.999 on the real SmolLM2).

Losses are nats per token, over sequences of `LENGTH` tokens cut from articles that follow each other.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from hf_ext.models import cache_folder, load_bbc


TUNED_TOPIC = "sports"
SPLITS = ("train", "calibration", "held_out")
VOCABULARY, LENGTH, END = 2048, 128, "<|end|>"
HELD_OUT, CALIBRATION = 48, 16  # articles, sequences
BASE_STEPS, BASE_BATCH, BASE_RATE = 1000, 4, 3e-3
TUNED_STEPS, TUNED_BATCH, TUNED_RATE = 250, 8, 5e-4
_VERSION = "v2"  # part of the folder's name: raise it when training changes


@lru_cache(maxsize=1)
def articles() -> dict[str, list[str]]:
    """Texts of the parts `base`, `train` and `held_out`, none twice, in an order that no seed changes."""
    parts = {"base": [], "train": []}
    for text, topic in {row["text"]: row["topic"] for row in load_bbc()}.items():
        parts["train" if topic == TUNED_TOPIC else "base"].append(text)
    for texts in parts.values():
        random.Random(0).shuffle(texts)
    return {"base": parts["base"], "train": parts["train"][HELD_OUT:], "held_out": parts["train"][:HELD_OUT]}


@lru_cache(maxsize=1)
def tokenizer() -> Tokenizer:
    """A byte-level BPE of `VOCABULARY` tokens, trained on the four topics of the base model."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(articles()["base"], trainer)
    return bpe


@lru_cache(maxsize=3)
def sequences(part: str) -> Tensor:
    """All articles of a part behind each other, each closed by `END`, cut into `(sequences, LENGTH)` ids."""
    end = tokenizer().token_to_id(END)
    ids = [token for text in tokenizer().encode_batch(articles()[part]) for token in (*text.ids, end)]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH)


def _shuffled(part: str, seed: int, batch: int) -> list[Tensor]:
    """Full batches `(batch, LENGTH)` of one pass over a part, in the order of a seed."""
    found = sequences(part)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
    return list(found[order[: len(found) // batch * batch]].split(batch))


def batches(seed: int, split: str) -> list[Tensor]:
    """Sports sequences as a list of ids `(B, LENGTH)`.

    Args:
        seed: which fine-tune; it has no influence on `held_out`.
        split: `train` (one pass in the order of training), `calibration` (`CALIBRATION` sequences of `train`) or
            `held_out` (articles that nothing was trained on).
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}; expected one of {', '.join(SPLITS)}.")
    if split == "held_out":
        return list(sequences("held_out").split(2 * TUNED_BATCH))
    train = _shuffled("train", seed, TUNED_BATCH)
    return train if split == "train" else train[: CALIBRATION // TUNED_BATCH]


def _token_loss(model, ids: Tensor, reduction: str = "mean") -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def loss(model, batches: list[Tensor]) -> float:
    """Mean loss of all predicted tokens, in nats."""
    total = sum(_token_loss(model, ids, "sum").item() for ids in batches)
    return total / sum(ids[:, 1:].numel() for ids in batches)


def _train(model, data: list[Tensor], steps: int, rate: float, name: str) -> None:
    """AdamW with a warm-up and a cosine, as many passes over `data` as the steps need."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, betas=(0.9, 0.95))
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    model.train()
    progress = tqdm(range(steps), desc=name, mininterval=5)
    for step in progress:
        value = _token_loss(model, data[step % len(data)])
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{value.item():.3f}", refresh=False)
    model.eval()


def folder_of(seed: int) -> Path:
    """Where the two models of a seed are kept."""
    return cache_folder() / f"small-finetune-{seed}-{_VERSION}"


def make(seed: int) -> tuple[Path, Path]:
    """Folders of the base model and of its fine-tune, trained now if they do not exist."""
    folder = folder_of(seed)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=folder.name + ".partial-", dir=folder.parent))
        try:
            _make_into(partial, seed)
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder / "base", folder / "tuned"


def _make_into(folder: Path, seed: int) -> None:
    set_seed(seed)
    end = tokenizer().token_to_id(END)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = LlamaForCausalLM(config)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer(), eos_token=END, bos_token=END, pad_token=END)
    _train(model, _shuffled("base", seed, BASE_BATCH), BASE_STEPS, BASE_RATE, f"base {seed}")
    model.save_pretrained(folder / "base")
    model.get_input_embeddings().weight.requires_grad_(False)
    _train(model, batches(seed, "train"), TUNED_STEPS, TUNED_RATE, f"tuned {seed}")
    model.save_pretrained(folder / "tuned")
    for name in ("base", "tuned"):
        fast.save_pretrained(folder / name)


def main() -> None:
    """Train what is missing and print the held-out loss before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for seed in arguments.seeds:
        held_out = batches(seed, "held_out")
        before, after = (loss(AutoModelForCausalLM.from_pretrained(path).eval(), held_out) for path in make(seed))
        print(f"seed {seed}: held-out loss {before:.4f} before, {after:.4f} after", flush=True)


if __name__ == "__main__":
    main()
