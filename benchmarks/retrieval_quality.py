"""What a retrieval cache misses: attention mass, needles and continuation loss, every system at one budget of tokens.

    python benchmarks/retrieval_quality.py [--mass 10] [--needles 2] [--documents 3] [--budgets 512]
                                           [--systems quest sentencekv] [--out benchmarks/results/retrieval_quality.json]

A retrieval cache reads a small part of the prompt at every step and drops none of it, or little. The budget counts all
full-rank tokens of the prompt that a key/value head attends to in one step: the first 32, the last 32 and those chosen.
Generated tokens come on top for peers; ours pay from the budget for all of theirs but the newest.

Peers are in `retrieval_peers.py`. The prompt is read once by the dense model in float32; its state is captured and given
to all of them. A peer chooses afresh for every query and for each key/value head, so one forward of all following tokens,
with a mask for every row, is what decoding token by token would compute. Our caches run for real, through
`past_key_values`, and are fed one token at a time as `generate` does; for the prompt, a Llama model only repeats to them
what the dense pass computed (`replayed`). "sentencekv paper" is the published method: run for real too where losses are
measured, its selection alone (one set of tokens for a group of heads) where attention is.

Attention mass: share of the attention to the middle of the prompt, neither its first nor its last 32 tokens, that 128
chosen tokens of the middle catch; 64 queries of the text that follows, mean over layers and heads.
Needles: a code of five digits or letters in news, alone or beside a second name with another code, as in
`kv_quality.py`; loss per token of the code. "question later": the prompt ends with the hay and the question is fed to
the cache as decoding would. "question in prompt": all up to the code is in the prompt. "question first": stated in front
of the hay; the prompt ends where the assistant's turn starts and the answer's first words are fed.
Continuation: BBC articles; loss per token above the dense cache on the same text.

"bytes" is everything stored, in whatever memory, as a share of the dense cache; "index bytes" is what a step reads to
choose, as a share of the keys of the prompt. `ojakv` has no token budget: it is shown for reference in every setting.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import hf_ext
from hf_ext import OjaKVCache, OjaKVConfig
from hf_ext.cache_impls import retrieval
from hf_ext.cache_impls.sentences import is_boundary, resolve_boundaries
from hf_ext.models import load_model
from hf_ext.table import Row, write_rows


sys.path.insert(0, str(Path(__file__).resolve().parent))
import kv_quality  # noqa: E402
import peers  # noqa: E402
import retrieval_peers  # noqa: E402
from kv_quality import NAMES, Item  # noqa: E402
from retrieval_peers import ELEMENT, RECENT, SELECTIONS, SELECTORS, SINKS, Prompt, Selector  # noqa: E402


MASS_QUERIES, MASS_SELECTED = 64, 128
FORMS = ("question later", "question in prompt", "question first")
# Systems without a token budget.
FIXED = ("dense", "ojakv 0.6", "ojakv 0.4")
OURS = ("sentencekv", "sentencekv refresh 1", "sentencekv paper", "hybridkv", "hybridkv refresh 1")
# Measured when asked for.
VARIANTS = {f"sentencekv {score}": score for score in ("mean_query", "current_query", "page_bound")}
# The attention functions below have no other way to reach the caller.
_captured: list[tuple[Tensor, Tensor, Tensor]] = []
_active: list[Callable[[Tensor], Tensor]] = []


@dataclass
class Task:
    """One text under one budget of tokens for one of the three measures."""

    measure: str
    item: Item
    budget: int


def capturing_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Dense causal attention that remembers its inputs."""
    _captured.append((query, key, value))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def selecting_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Causal attention in which every query of a key/value head sees the middle tokens chosen for it."""
    heads, kv_heads, new, total = query.shape[1], key.shape[1], query.shape[2], key.shape[2]
    mask = torch.ones(new, total, dtype=torch.bool).tril(total - new).expand(kv_heads, -1, -1).clone()
    chosen = _active[module.layer_idx](query)
    mask[..., SINKS : SINKS + chosen.shape[-1]] = chosen
    key, value, mask = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, value, mask[None]))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


for _name, _function in (("retrieval_capture", capturing_attention), ("retrieval_select", selecting_attention)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, sdpa_mask)


def shortened(item: Item, scored: int) -> Item:
    return replace(item, ids=item.ids[:, : item.prompt + scored + 1], scored=scored)


def needles(tokenizer, seeds: int, contexts: list[int]) -> list[Item]:
    """`seeds` codes of each kind, alone and beside another one, in each form of the question: same hay, same codes."""
    pool = kv_quality.needles(tokenizer, 2 * len(contexts) * seeds, contexts, question_later=True)
    items = []
    for kind in ("digits", "letters"):
        for item in [item for item in pool if item.setting.startswith(kind)][:seeds]:
            for decoy in (False, True):
                items += [_needle(tokenizer, item, decoy, form) for form in FORMS]
    return items


def _needle(tokenizer, item: Item, decoy: bool, form: str) -> Item:
    """A needle of `kv_quality`, whose question comes later, with or without a second code, in a form of the question."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    kind, length, _ = item.setting.split(", ")
    number = int(item.name.split()[1])
    name, head, ids = NAMES[number % len(NAMES)], encode("<|im_start|>user\n"), item.ids[0].tolist()
    hay, question, answer = ids[len(head) : item.prompt], ids[item.prompt : -item.scored], ids[-item.scored :]
    if decoy:
        rng, letters = random.Random(number), kind == "letters"
        code = "".join(rng.choice("BCDFGHJKLMNPQRSTVWXZ" if letters else "0123456789") for _ in range(5))
        other = encode(f" The secret access code of {NAMES[(number + 5) % len(NAMES)]} is {code}. ")
        # Three of the six depths away from the first one, in place of hay.
        start = int((len(hay) - len(other)) * (0.1 + 0.8 * ((number + 3) % 6) / 5))
        hay[start : start + len(other)] = other
    if form == "question first":
        head += encode(f"What is the secret access code of {name}?\n\n")
        question = encode(f"<|im_end|>\n<|im_start|>assistant\nThe secret access code of {name} is")
        prompt = len(head + hay) + len(encode("<|im_end|>\n<|im_start|>assistant\n"))
    else:
        # The last token of the question is always fed: its output is the first prediction.
        prompt = len(head + hay) + (0 if form == "question later" else len(question) - 1)
    count = "two needles" if decoy else "one needle"
    setting = f"{kind}, {length}, {count}, {form}"
    return Item(item.name, setting, torch.tensor(head + hay + question + answer)[None], prompt, item.scored)


class Text:
    """A text read densely: every layer's queries, keys and values of all its tokens."""

    def __init__(self, model, ids: Tensor, boundary: Tensor):
        model.set_attn_implementation("retrieval_capture")
        _captured.clear()
        model.model(ids, use_cache=False)
        self.ids, self.boundary, self.layers = ids, boundary, list(_captured)
        _captured.clear()
        self.cos, self.sin = model.model.rotary_emb(self.layers[0][1], torch.arange(ids.shape[1])[None])

    def prompt(self, length: int) -> list[Prompt]:
        """Every layer's state after the first `length` tokens."""
        cos, sin = self.cos[:, :length], self.sin[:, :length]
        return [
            Prompt(*(x[:, :, :length] for x in layer), cos=cos, sin=sin, boundary=self.boundary)
            for layer in self.layers
        ]

    def queries(self, length: int) -> list[Tensor]:
        """Every layer's queries after the first `length` tokens."""
        return [query[:, :, length:] for query, _, _ in self.layers]


@contextmanager
def replayed(model, states: list[Prompt]) -> Iterator[None]:
    """Within it a forward of the same prompt takes queries, keys and values before RoPE from `states`.

    The cache gets what it would get, and reads it by its own code; what dense attention and the MLPs make of it is not
    needed a second time, and comes out as zeros. So it is good only for a cache that leaves the prompt's attention dense.
    Models whose layers are not Llama's run as they are.
    """
    patched: list = []
    attention = F.scaled_dot_product_attention
    if model.config.model_type == "llama":
        for layer, state in zip(model.model.layers, states, strict=True):
            query, key = (peers.unrope(x, state.cos, state.sin) for x in (state.q, state.k))
            block = layer.self_attn
            for module, x in ((block.q_proj, query), (block.k_proj, key), (block.v_proj, state.v)):
                flat = x.transpose(1, 2).flatten(2)
                module.forward = lambda _, flat=flat: flat
                patched.append(module)
            for module in (block.o_proj, layer.mlp):
                module.forward = lambda x: x.new_zeros(*x.shape[:-1], model.config.hidden_size)
                patched.append(module)
        F.scaled_dot_product_attention = lambda query, key, value, *args, **kwargs: torch.zeros_like(query)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attention
        for module in patched:
            del module.forward


def our_selection(
    states: list[Prompt], queries: list[Tensor], selected: int, share: float = 1 / 2
) -> tuple[list[Tensor], float]:
    """What `sentencekv` chooses, without the rest of the cache.

    Args:
        states: every layer's prompt.
        queries: every layer's queries that follow, `(1, H, m, d)`.
        selected: middle tokens to choose.
        share: coordinates of the index over the head dimension.

    Returns:
        Every layer's choice among the middle tokens, `(K, m, M)`, boolean; the bytes of all layers' indices.
    """
    chosen, nbytes = [], 0
    for state, q in zip(states, queries, strict=True):
        kv_heads, dim = state.k.shape[1], state.k.shape[-1]
        moment = retrieval.query_moment(state.q, kv_heads)
        keys = retrieval_peers.middle(state, state.k)[None]
        index = retrieval.TokenIndex(keys, int(share * dim), None, None, moment)
        nbytes += index.codes.rows.rows.numel() + ELEMENT * sum(t.numel() for t in index.codes.bases())
        # One query at a time, as decoding asks.
        grouped = retrieval_peers.grouped(q, kv_heads) * dim**-0.5
        weights = [retrieval.best_of_heads(index.score(grouped[None, :, :, row])[0])[0] for row in range(q.shape[2])]
        best = torch.stack(weights, dim=1).topk(selected, dim=-1).indices
        chosen.append(torch.zeros(*best.shape[:2], keys.shape[2], dtype=torch.bool).scatter_(-1, best, True))
    return chosen, nbytes


def select(states: list[Prompt], queries: list[Tensor], selected: int, peer: Callable) -> tuple[list[Tensor], float]:
    """`our_selection` for a peer."""
    selectors = [peer(state, selected) for state in states]
    chosen = [retrieval_peers.choose(selector, q, selected) for selector, q in zip(selectors, queries, strict=True)]
    return chosen, sum(selector.index for selector in selectors)


def attention_mass(states: list[Prompt], queries: list[Tensor], chosen: list[Tensor]) -> float:
    """Share of the attention to the middle that falls on the chosen tokens, mean over queries, heads and layers."""
    shares = []
    for state, q, choice in zip(states, queries, chosen, strict=True):
        keys = retrieval_peers.middle(state, state.k)
        logits = torch.einsum("kgmd,knd->kgmn", retrieval_peers.grouped(q, keys.shape[0]), keys)
        weights = (logits * keys.shape[-1] ** -0.5).softmax(-1)
        shares.append((weights * choice[:, None]).sum(-1).mean().item())
    return statistics.mean(shares)


def run_peer(model, item: Item, states: list[Prompt], peer: Callable, budget: int) -> tuple[float, float]:
    """Loss and byte share of a peer."""
    selected = budget - SINKS - RECENT
    selectors: list[Selector] = [peer(state, selected) for state in states]
    cache = DynamicCache()
    for index, (state, selector) in enumerate(zip(states, selectors, strict=True)):
        cache.update(state.k if selector.keys is None else selector.keys, state.v, index)
    share = sum(s.stored for s in selectors) / sum(peers.dense_bytes(state) for state in states)
    model.set_attn_implementation("retrieval_select")
    _active[:] = [partial(retrieval_peers.choose, selector, selected=selected) for selector in selectors]
    try:
        return kv_quality.loss(model, item, cache), share
    finally:
        _active.clear()


def run_real(model, item: Item, states: list[Prompt], cache, step: int) -> tuple[float, float]:
    """Loss and byte share of a real cache that reads the prompt itself and then `step` tokens at a time."""
    model.set_attn_implementation("sdpa")
    if hasattr(cache, "attach"):
        cache.attach(model)
    with replayed(model, states):
        model(item.ids[:, : item.prompt], past_key_values=cache, use_cache=True, logits_to_keep=1)
    share = stored_bytes(cache, model.dtype.itemsize) / sum(peers.dense_bytes(state) for state in states)
    blocks = item.ids[:, item.prompt : -1].split(step, 1)
    logits = torch.cat([model(block, past_key_values=cache, use_cache=True).logits[0] for block in blocks])
    return F.cross_entropy(logits[-item.scored :].float(), item.ids[0, -item.scored :]).item(), share


def stored_bytes(cache, itemsize: int) -> float:
    """Bytes of a cache by the convention of a 16-bit model; codes take one byte in any."""
    held = [tensor for layer in cache.kv_layers for tensor in layer.tensors()]
    codes = sum(tensor.numel() for tensor in held if tensor.dtype == torch.int8)
    return (cache.nbytes() - codes) * ELEMENT / itemsize + codes


def real_systems(tokenizer) -> dict[str, Callable]:
    """System -> function of model, item, states and budget that runs it for real."""

    def oja(ratio: float) -> Callable:
        # It chooses nothing for a query, so a block at once is the same; as in `kv_quality.py`.
        return lambda model, item, states, budget: run_real(
            model, item, states, OjaKVCache(model, OjaKVConfig(ratio=ratio)), item.ids.shape[1]
        )

    def sentence(**options) -> Callable:
        def run(model, item: Item, states: list[Prompt], budget: int) -> tuple[float, float]:
            config = hf_ext.SentenceKVConfig(token_budget=budget, **options)
            return run_real(model, item, states, hf_ext.SentenceKVCache(model, config, tokenizer=tokenizer), 1)

        return run

    def hybrid(**options) -> Callable:
        def run(model, item: Item, states: list[Prompt], budget: int) -> tuple[float, float]:
            config = hf_ext.HybridKVConfig(token_budget=budget, **options)
            return run_real(model, item, states, hf_ext.HybridKVCache(model, config), 1)

        return run

    return {
        "ojakv 0.6": oja(0.6),
        "ojakv 0.4": oja(0.4),
        "sentencekv": sentence(),
        "sentencekv refresh 1": sentence(refresh=1),
        "sentencekv paper": sentence(mode="paper", keep=retrieval_peers.FACTOR),
        "hybridkv": hybrid(),
        "hybridkv refresh 1": hybrid(refresh=1),
        **{name: sentence(score=score) for name, score in VARIANTS.items()},
    }


class Runner:
    """Measures tasks, remembering what is done.

    Args:
        systems: those to measure, of the real ones and of the peers; dense is always measured.
    """

    def __init__(self, model, tokenizer, systems: set[str], progress: kv_quality.Progress, model_name: str):
        self.model, self.progress, self.model_name = model, progress, model_name
        self.boundaries = resolve_boundaries(tokenizer, None, model.config.vocab_size)
        real = real_systems(tokenizer)
        self.real = {name: run for name, run in real.items() if name in systems}
        self.peers = {name: peer for name, peer in SELECTORS.items() if name in systems}
        self.selections: dict[str, Callable] = {
            name: partial(select, peer=peer) for name, peer in SELECTIONS.items() if name in systems
        }
        if "sentencekv" in systems:
            self.selections["sentencekv"] = our_selection
            self.selections["sentencekv, rank d/4"] = partial(our_selection, share=1 / 4)
        self.skipped: set[tuple[str, str]] = set()

    def names(self, task: Task) -> list[str]:
        return list(self.selections) if task.measure == "mass" else ["dense", *self.peers, *self.real]

    def key(self, task: Task, system: str) -> str:
        budget = "" if system in FIXED else task.budget
        return f"{kv_quality._fingerprint(task.item, self.model_name)}|{task.measure}|{system}|{budget}"

    def one(self, task: Task, system: str, text: Text) -> tuple[float, float]:
        """Attention mass and index share, or loss and byte share."""
        states = text.prompt(task.item.prompt)
        if task.measure == "mass":
            queries = text.queries(task.item.prompt)
            chosen, index = self.selections[system](states, queries, MASS_SELECTED)
            keys = sum(state.k.numel() for state in states) * peers.ELEMENT
            return attention_mass(states, queries, chosen), index / keys
        if system == "dense":
            return kv_quality.run_peer(self.model, task.item, states, peers.dense, 1.0)
        if system in self.real:
            return self.real[system](self.model, task.item, states, task.budget)
        return run_peer(self.model, task.item, states, self.peers[system], task.budget)

    def run(self, tasks: list[Task]) -> Iterator[tuple]:
        """Yields (task, system, value, share)."""
        bar = tqdm(total=sum(len(self.names(task)) for task in tasks), desc="retrieval_quality")
        text: Text | None = None
        for task in tasks:
            for system in self.names(task):
                key = self.key(task, system)
                bar.set_postfix_str(f"{task.measure} {task.item.name} {system} {task.budget}")
                if key not in self.progress.known and (task.measure, system) not in self.skipped:
                    ids = task.item.ids[:, :-1]
                    # The same text may be the next item too, with a prompt of another length.
                    if text is None or not torch.equal(text.ids, ids):
                        text = None  # freed before the next one is made
                        text = Text(self.model, ids, is_boundary(ids, self.boundaries)[0])
                    try:
                        self.progress.add(key, self.one(task, system, text))
                    except NotImplementedError as error:
                        self.skipped.add((task.measure, system))
                        tqdm.write(f"skipped: {task.measure} of {system}: {error}")
                bar.update()
                if key in self.progress.known:
                    yield task, system, *self.progress.known[key]
        bar.close()


def settings(task: Task) -> list[str]:
    """The settings whose means a task is part of."""
    if task.measure == "mass":
        return [task.item.setting, "BBC, all contexts"]
    budget = f"budget {task.budget}"
    if task.measure == "continuation":
        return [f"{task.item.setting}, {budget}"]
    kind, length, count, form = task.item.setting.split(", ")
    return [f"needles, {what}, {budget}" for what in (form, f"{count}, {form}", f"{kind}, {form}", length)]


def summarise(results: list[tuple]) -> list[Row]:
    """Means over items of every setting."""
    dense = {(id(task.item), task.measure): value for task, system, value, _ in results if system == "dense"}
    groups: dict[tuple, list[tuple[float, float]]] = {}
    for task, system, value, share in results:
        if task.measure == "continuation":
            value -= dense[id(task.item), task.measure]
        for setting in settings(task):
            groups.setdefault((task.measure, system, setting), []).append((value, share))
    names = {
        "mass": ("attention mass", "of the middle", "index bytes", "of key bytes"),
        "needles": ("loss of the code", "nats", "bytes", "of dense"),
        "continuation": ("loss above dense", "nats", "bytes", "of dense"),
    }
    rows = []
    for (measure, system, setting), pairs in groups.items():
        values, shares = zip(*pairs, strict=True)
        method = "hybridkv" if system.startswith("hybridkv") else "sentencekv"
        metric, unit, cost, cost_unit = names[measure]
        spread = round(statistics.stdev(values), 5) if len(values) > 1 else 0.0
        value = round(statistics.mean(values), 5)
        rows.append(Row(method, system, setting, metric, value, unit, len(values), spread))
        rows.append(Row(method, system, setting, cost, round(statistics.mean(shares), 4), cost_unit, len(shares)))
    return rows


def forget(progress: kv_quality.Progress, systems: set[str]) -> None:
    """Drops what is known of these systems."""
    lines = {key: value for key, value in progress.known.items() if key.split("|")[2] not in systems}
    progress.path.unlink(missing_ok=True)
    progress.known = {}
    for key, value in lines.items():
        progress.add(key, tuple(value))


def pick_systems(parser: argparse.ArgumentParser, wanted: list[str] | None) -> set[str]:
    """Names to measure: those asked for, else all but the variants of ours."""
    default = {*FIXED, *SELECTORS, *OURS}
    if unknown := set(wanted or ()) - default - set(VARIANTS):
        parser.error(f"unknown systems {sorted(unknown)}; known: {sorted(default | set(VARIANTS))}")
    return {"dense", *wanted} if wanted else default


def make_tasks(tokenizer, arguments: argparse.Namespace) -> list[Task]:
    tasks = []
    for item in kv_quality.documents(tokenizer, arguments.mass, arguments.mass_contexts, seed=2):
        tasks.append(Task("mass", shortened(item, MASS_QUERIES), MASS_SELECTED))
    for item in needles(tokenizer, arguments.needles, arguments.needle_contexts):
        tasks.append(Task("needles", item, arguments.needle_budget))
    for item in kv_quality.documents(tokenizer, arguments.documents, arguments.contexts):
        item = shortened(item, arguments.scored)
        tasks += [Task("continuation", item, budget) for budget in arguments.budgets]
    return tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=None, help="folder or Hub id of a Llama-like model; the embedded one if absent"
    )
    parser.add_argument("--mass", type=int, default=10, help="documents whose attention is measured; 0 for none")
    parser.add_argument("--mass-contexts", type=int, nargs="+", default=[2048, 3072])
    parser.add_argument("--needles", type=int, default=2, help="codes of each kind in every form; 0 for none")
    parser.add_argument("--needle-contexts", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--needle-budget", type=int, default=256)
    parser.add_argument("--documents", type=int, default=3, help="documents to continue; 0 for none")
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096])
    parser.add_argument("--scored", type=int, default=64, help="tokens of the continuation, at most 256")
    parser.add_argument("--budgets", type=int, nargs="+", default=[512])
    parser.add_argument("--systems", nargs="+", default=None, help="only these (dense is always measured)")
    parser.add_argument(
        "--state", default=None, help="file of finished measurements; in the temporary folder if absent"
    )
    parser.add_argument("--fresh", action="store_true", help="measure again, only --systems where they are given")
    parser.add_argument("--out", default="benchmarks/results/retrieval_quality.json")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model, tokenizer = load_model(arguments.model)
    systems = pick_systems(parser, arguments.systems)
    state = Path(arguments.state or Path(tempfile.gettempdir()) / "hf_ext_retrieval_quality.jsonl")
    progress = kv_quality.Progress(state, arguments.fresh and not arguments.systems)
    if arguments.fresh and arguments.systems:
        forget(progress, set(arguments.systems))
    start = time.time()
    runner = Runner(model, tokenizer, systems, progress, arguments.model or "embedded")
    rows = summarise(list(runner.run(make_tasks(tokenizer, arguments))))
    write_rows(arguments.out, rows)
    for row in rows:
        if row.metric in ("attention mass", "loss of the code", "loss above dense"):
            print(f"{row.setting:52s} {row.system:18s} {row.value:+8.4f} +- {row.spread:.4f} (n={row.n})")
    print(f"{len(rows)} rows in {arguments.out}, {time.time() - start:.0f} s; remembered in {state}")


if __name__ == "__main__":
    main()
