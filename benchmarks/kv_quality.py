"""What a compressed cache loses: continuation loss and needles on the embedded model, every peer at equal bytes.

    python benchmarks/kv_quality.py [--documents 24] [--needles 20] [--contexts 1024 2048 4096] [--ratios 0.6 0.4]
                                    [--systems snapkv "pca post-rope" ojakv] [--out benchmarks/results/kv_quality.json]

The prompt is read once by the dense model in float32; queries, keys and values of every layer are captured on the way. A
peer then compresses each layer's prompt, and the rest of the text runs on what is left. Peers are in `peers.py`; our own
caches run for real, through `past_key_values`.

Continuation: BBC articles of one topic are joined to the context length; the next 256 tokens are scored. The number is
loss per token above the dense cache on the same text.
Needles: a code of five digits or five letters hidden in news. Loss per token of the code after "The secret access code of
X is". In the setting "question later" the question is not part of the compressed prompt; in "question in prompt" it
is, which is the case that flatters eviction.

Bytes: the convention of a 16-bit model for every system (`peers.py`), which a float32 run shares for everything but token
indices: those of our caches count 4 bytes beside elements of 4. Sinks, recent tokens, anchors, bases, indices and page
slack are all inside the ratio. "bytes" rows give the share really used.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AttentionInterface, DynamicCache, QuantizedCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from hf_ext import HybridKVCache, HybridKVConfig, OjaKVCache, OjaKVConfig, PackedCache
from hf_ext.cache_impls.hybridkv import CODE_PART
from hf_ext.models import load_bbc, load_model
from hf_ext.table import Row, write_rows


sys.path.insert(0, str(Path(__file__).resolve().parent))
import peers  # noqa: E402


CONTINUATION = 256
CALIBRATION_TOKENS = 4096
NAMES = "Arlen Bethod Corvin Dalia Emeric Fenna Gorman Hesper Idris Jocasta Kelvar Lunet".split()
# The attention functions below have no other way to reach the caller.
_captured: list[peers.LayerPrompt] = []
_keep: list[Tensor | None] = []


@dataclass
class Item:
    """One text: the first `prompt` tokens are compressed, the last `scored` are scored."""

    name: str
    setting: str
    ids: Tensor
    prompt: int
    scored: int


def _expand(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)


def capturing_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Dense causal attention that remembers its inputs."""
    _captured.append(peers.LayerPrompt(query[:, :, -peers.WINDOW :].clone(), key.clone(), value.clone()))
    heads = query.shape[1]
    out = F.scaled_dot_product_attention(
        query, _expand(key, heads), _expand(value, heads), is_causal=query.shape[2] > 1, scale=scaling
    )
    return out.transpose(1, 2).contiguous(), None


def masked_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Causal attention in which every key/value head sees only the prompt tokens it kept."""
    heads, new, total = query.shape[1], query.shape[2], key.shape[2]
    mask = torch.ones(new, total, dtype=torch.bool).tril(total - new)[None, None]
    keep = _keep[module.layer_idx] if _keep else None
    if keep is not None:
        stored = F.pad(keep, (0, total - keep.shape[-1]), value=True)
        mask = mask & _expand(stored, heads)[:, :, None]
    out = F.scaled_dot_product_attention(
        query, _expand(key, heads), _expand(value, heads), attn_mask=mask, scale=scaling
    )
    return out.transpose(1, 2).contiguous(), None


for _name, _function in (("kv_quality_capture", capturing_attention), ("kv_quality_masked", masked_attention)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, sdpa_mask)


def documents(tokenizer, count: int, contexts: list[int], seed: int = 0) -> list[Item]:
    """Disjoint texts of one topic each, context lengths in turn."""
    rng = random.Random(seed)
    pools: dict[str, list[str]] = {}
    for row in load_bbc():
        pools.setdefault(row["topic"], []).append(row["text"])
    for texts in pools.values():
        rng.shuffle(texts)
    items, topics = [], sorted(pools)
    for number in range(count):
        # Long contexts cost the most: the shorter ones get the extra document when the count does not divide.
        length, topic, ids = contexts[number % len(contexts)], topics[number % len(topics)], []
        while len(ids) < length + CONTINUATION + 1:
            ids += tokenizer(pools[topic].pop() + "\n\n")["input_ids"]
        ids = torch.tensor(ids[: length + CONTINUATION + 1])[None]
        items.append(Item(f"document {number}", f"BBC, {length} tokens", ids, length, CONTINUATION))
    return items


def needles(tokenizer, count: int, contexts: list[int], question_later: bool, seed: int = 1) -> list[Item]:
    """Codes at six depths, digits and letters in turn; the same hay and codes for both forms of the question."""
    rng, rows, items = random.Random(seed), load_bbc(), []
    form = "question later" if question_later else "question in prompt"
    for number in range(count):
        length, name = contexts[number % len(contexts)], NAMES[number % len(NAMES)]
        letters = (number // len(contexts)) % 2 == 1
        code = "".join(rng.choice("BCDFGHJKLMNPQRSTVWXZ" if letters else "0123456789") for _ in range(5))

        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        head = encode("<|im_start|>user\n")
        needle = encode(f" The secret access code of {name} is {code}. ")
        question = encode(
            f"\n\nWhat is the secret access code of {name}?<|im_end|>\n<|im_start|>assistant\n"
            f"The secret access code of {name} is"
        )
        answer = encode(f" {code}")
        hay: list[int] = []
        while len(hay) < length:
            hay += encode(rng.choice(rows)["text"] + "\n\n")
        hay = hay[: length - len(head) - len(needle) - len(question)]
        cut = int(len(hay) * (0.1 + 0.8 * (number % 6) / 5))
        context = head + hay[:cut] + needle + hay[cut:]
        # The last token of the question is fed after compression: its output is the first prediction.
        prompt = len(context) if question_later else len(context) + len(question) - 1
        ids = torch.tensor(context + question + answer)[None]
        kind = "letters" if letters else "digits"
        items.append(Item(f"needle {number}", f"{kind}, {length} tokens, {form}", ids, prompt, len(answer)))
    return items


def capture(model, ids: Tensor) -> list[peers.LayerPrompt]:
    """Reads a prompt densely and returns every layer's state."""
    model.set_attn_implementation("kv_quality_capture")
    _captured.clear()
    model.model(ids, use_cache=False)
    states = list(_captured)
    _captured.clear()
    cos, sin = model.model.rotary_emb(states[0].k, torch.arange(ids.shape[1])[None])
    for state in states:
        state.cos, state.sin = cos, sin
    return states


def static_bases(model, tokenizer) -> list[tuple[Tensor, Tensor]]:
    """Eigenbases of keys and values over Python source code, the text of another domain."""
    source = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in (argparse, random, statistics))
    ids = torch.tensor(tokenizer(source)["input_ids"][:CALIBRATION_TOKENS])
    halves = [capture(model, part[None]) for part in ids.chunk(2)]
    return [
        tuple(peers.eigenbasis(torch.cat([getattr(part, name)[0] for part in pair], 1)) for name in ("k", "v"))
        for pair in zip(*halves, strict=True)
    ]


def loss(model, item: Item, cache) -> float:
    """Loss per scored token after a prompt that `cache` holds."""
    logits = model(item.ids[:, item.prompt : -1], past_key_values=cache, use_cache=True).logits[0, -item.scored :]
    return F.cross_entropy(logits.float(), item.ids[0, -item.scored :]).item()


def run_peer(model, item: Item, states: list[peers.LayerPrompt], peer: Callable, ratio: float) -> tuple[float, float]:
    """Loss and byte share of a peer."""
    results = [peer(state, ratio) for state in states]
    cache = DynamicCache()
    for index, result in enumerate(results):
        cache.update(result.k, result.v, index)
    model.set_attn_implementation("kv_quality_masked")
    _keep[:] = [result.keep for result in results]
    share = sum(result.nbytes for result in results) / sum(peers.dense_bytes(state) for state in states)
    try:
        return loss(model, item, cache), share
    finally:
        _keep.clear()


def library_fp8(model):
    """transformers' own fp8 cache, with the byte counter that ours have."""
    cache = QuantizedCache(backend="fp8", config=model.config)

    def nbytes() -> float:
        pairs = [pair for layer in cache.layers for pair in (layer._quantized_keys, layer._quantized_values)]
        stored = sum(tensor.nbytes + peers.SCALE for tensor, _ in pairs)
        # One byte an element whatever the model's type: brought to the convention of a 16-bit model.
        return stored * model.dtype.itemsize / peers.ELEMENT

    cache.nbytes = nbytes
    return cache


def run_cache(model, item: Item, make: Callable) -> tuple[float, float]:
    """Loss and byte share of a real cache, which reads the prompt itself."""
    model.set_attn_implementation("sdpa")
    cache = make(model)
    if hasattr(cache, "attach"):
        cache.attach(model)
    model(item.ids[:, : item.prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
    text = model.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    dense = item.prompt * text.num_key_value_heads * 2 * head_dim * text.num_hidden_layers * model.dtype.itemsize
    share = cache.nbytes() / dense
    return loss(model, item, cache), share


def systems(ratios: list[float]) -> dict[tuple[str, str], Callable]:
    """(system, budget) -> function of model, item and states."""
    table: dict[tuple[str, str], Callable] = {}
    for name, peer in peers.FIXED.items():
        table[name, ""] = lambda m, i, s, peer=peer: run_peer(m, i, s, peer, 1.0)
    table["packed", ""] = lambda m, i, s: run_cache(m, i, PackedCache)
    table["transformers fp8", ""] = lambda m, i, s: run_cache(m, i, library_fp8)
    for ratio in ratios:
        budget = f"ratio {ratio:g}"
        table["ojakv", budget] = lambda m, i, s, r=ratio: run_cache(
            m, i, lambda model: OjaKVCache(model, OjaKVConfig(ratio=r))
        )
        table["ojakv pre-rope", budget] = lambda m, i, s, r=ratio: run_cache(
            m, i, lambda model: OjaKVCache(model, OjaKVConfig(ratio=r, key_space="pre"))
        )
        table["hybridkv", budget] = lambda m, i, s, r=ratio: run_hybrid(m, i, r)
        for name, peer in peers.AT_RATIO.items():
            table[name, budget] = lambda m, i, s, peer=peer, r=ratio: run_peer(m, i, s, peer, r)
    return table


def run_hybrid(model, item: Item, ratio: float) -> tuple[float, float]:
    """Hybridkv within a byte budget by the convention: its codes take one byte, half of a 16-bit element, in any model."""
    head_dim = model.config.head_dim
    rank = max(1, int(CODE_PART * ratio * 2 * head_dim * peers.ELEMENT / 2))
    size = model.dtype.itemsize
    here = ratio - 2 * rank / (2 * head_dim) * (1 / peers.ELEMENT - 1 / size)
    config = HybridKVConfig(ratio=here, index_rank=rank, value_rank=rank)
    value, share = run_cache(model, item, lambda model: HybridKVCache(model, config))
    codes = 2 * rank / (2 * head_dim) * (1 / peers.ELEMENT - 1 / size)
    return value, share + codes


def _fingerprint(item: Item, model_name: str) -> str:
    payload = json.dumps([model_name, item.ids.tolist(), item.prompt, item.scored])
    return hashlib.sha256(payload.encode()).hexdigest()[:24]


class Progress:
    """Losses already measured, so that an interrupted run goes on where it stopped; `--fresh` forgets them."""

    def __init__(self, path: Path, fresh: bool):
        self.path = path
        self.known: dict[str, list[float]] = {}
        if fresh:
            path.unlink(missing_ok=True)
        elif path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    self.known.update(json.loads(line))
                except ValueError:
                    continue  # a line cut off by the interruption

    def add(self, key: str, value: tuple[float, float]) -> None:
        self.known[key] = list(value)
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps({key: list(value)}) + "\n")


def measure(model, tokenizer, items: list[Item], table: dict, progress: Progress, model_name: str) -> Iterator[tuple]:
    """Yields (item, system, budget, loss, share)."""
    bases = None
    bar = tqdm(total=len(items) * len(table), desc="kv_quality")
    for item in items:
        states = None
        print_ = _fingerprint(item, model_name)
        for (system, budget), run in table.items():
            key = f"{print_}|{system}|{budget}"
            if key not in progress.known:
                if states is None:
                    if bases is None:
                        bases = static_bases(model, tokenizer)
                    states = capture(model, item.ids[:, : item.prompt])
                    for state, pair in zip(states, bases, strict=True):
                        state.static = pair
                bar.set_postfix_str(f"{item.name} {system} {budget}")
                progress.add(key, run(model, item, states))
            bar.update()
            yield item, system, budget, *progress.known[key]
    bar.close()


def summarise(results: list[tuple]) -> list[Row]:
    """Means over items, per kind of text; loss above dense for documents, plain loss for needles."""
    dense = {(item.name, item.setting): value for item, system, _, value, _ in results if system == "dense"}
    groups: dict[tuple, list[tuple[float, float]]] = {}
    for item, system, budget, value, share in results:
        document = item.name.startswith("document")
        number = value - dense[item.name, item.setting] if document else value
        settings = [item.setting]
        if document:
            settings.append("BBC, all contexts")
        else:
            kind, length, form = item.setting.split(", ")
            settings += [f"needles, {length}, {form}", f"{kind}, {form}", f"needles, {form}"]
        for setting in settings:
            groups.setdefault((system, budget, setting), []).append((number, share))
    rows = []
    for (system, budget, setting), pairs in groups.items():
        values, shares = zip(*pairs, strict=True)
        metric = "loss above dense" if setting.startswith("BBC") else "loss of the code"
        where = f"{setting}, {budget}" if budget else setting
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        method = system if system in ("packed", "hybridkv") else "ojakv"
        rows.append(
            Row(
                method, system, where, metric, round(statistics.mean(values), 5), "nats", len(values), round(spread, 5)
            )
        )
        rows.append(Row(method, system, where, "bytes", round(statistics.mean(shares), 4), "of dense", len(shares)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=None, help="folder or Hub id of a Llama-like model; the embedded one if absent"
    )
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--needles", type=int, default=20, help="codes in each form of the question; 0 for none")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--needle-contexts", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.6, 0.4])
    parser.add_argument("--systems", nargs="+", default=None, help="only these (dense is always measured)")
    parser.add_argument(
        "--state", default=None, help="file of finished measurements; in the temporary folder if absent"
    )
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--out", default="benchmarks/results/kv_quality.json")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model, tokenizer = load_model(arguments.model)
    table = systems(arguments.ratios)
    if arguments.systems:
        unknown = set(arguments.systems) - {name for name, _ in table}
        if unknown:
            parser.error(f"unknown systems {sorted(unknown)}; known: {sorted({name for name, _ in table})}")
        table = {key: run for key, run in table.items() if key[0] in {"dense", *arguments.systems}}
    items = documents(tokenizer, arguments.documents, arguments.contexts)
    for later in (True, False):
        items += needles(tokenizer, arguments.needles, arguments.needle_contexts, later)
    state = Path(arguments.state or Path(tempfile.gettempdir()) / "hf_ext_kv_quality.jsonl")
    progress = Progress(state, arguments.fresh)
    start = time.time()
    rows = summarise(list(measure(model, tokenizer, items, table, progress, arguments.model or "embedded")))
    write_rows(arguments.out, rows)
    for row in rows:
        if row.metric != "bytes" and row.setting.startswith(("BBC, all", "needles, question")):
            print(f"{row.setting:44s} {row.system:18s} {row.value:+8.4f} +- {row.spread:.4f} (n={row.n})")
    print(f"{len(rows)} rows in {arguments.out}, {time.time() - start:.0f} s; remembered in {state}")


if __name__ == "__main__":
    main()
