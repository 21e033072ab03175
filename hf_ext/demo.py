"""`hf-ext demo`: a real language model answers from a long context, with the dense cache and with ours.

The model reads news in which one sentence holds an access code. Each cache reads them once, by
`generate(cache_implementation=...)`. Only then comes the question, and with the same cache the model answers, is scored on
the right answer and on how the news go on, and is timed: token by token, as generation does. The two caches that retrieve
keep their tokens in files and say which sentences they read again for the answer. A sweep over shorter contexts gives the
picture. At the end a short fine-tune is compressed, pushed, pulled and opened, see `demo_delta.py`. Written into the output
folder: `demo.json`, `memory_speed.png`, `report.html`, and the compressed fine-tune: `delta/`, as published in `hub/`, and
as fetched in `pulled/`.
"""

from __future__ import annotations

import base64
import copy
import html
import os
import tempfile
import textwrap
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

import hf_ext
from hf_ext import demo_delta
from hf_ext.benches.caches import Prompt, cache_bytes, fill
from hf_ext.benches.caches import read as read_prompt
from hf_ext.cache_impls.retrieval_cache import RetrievalCache
from hf_ext.cache_impls.retrieval_layer import RetrievalLayer
from hf_ext.cache_impls.sentence_map import SentenceMap
from hf_ext.config import write_text_atomic
from hf_ext.models import load_bbc, load_model
from hf_ext.registration import build_cache
from hf_ext.table import Row, write_rows


TOKEN_BUDGET = 512
# What `generate` is given for each cache.
SYSTEMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "packed": {"cache_implementation": "packed"},
    "ojakv 0.4": {"cache_implementation": "ojakv", "cache_config": {"ratio": 0.4}},
    "sentencekv": {"cache_implementation": "sentencekv", "cache_config": {"token_budget": TOKEN_BUDGET}},
    "hybridkv": {"cache_implementation": "hybridkv", "cache_config": {"token_budget": TOKEN_BUDGET}},
}
RETRIEVING = ("sentencekv", "hybridkv")

INTRO = "Read these news articles. A question follows at the end."
NEEDLE = "The secret access code of the Halden archive is 48213."
QUESTION = "What is the secret access code of the Halden archive? Answer with the code."
ANSWER, CODE = "The secret access code of the Halden archive is ", "48213"
DEPTH = 0.5  # where among the news the needle stands
CONTINUATION = 48

CONTEXT, SWEEP = 3072, (1024, 2048)
QUICK_CONTEXT, QUICK_SWEEP = 1536, (512, 1024)

NO_MATPLOTLIB = "No picture: it needs matplotlib; install it with: pip install matplotlib"
NOTES = (
    "The question came after the context had been read. Answer NLL: the code's tokens when the model is made to answer "
    "rightly; text NLL: the next {continuation} tokens of the news, compared with dense; both in nats a token, lower is "
    "better, fed one token at a time. MB: every tensor the cache keeps in memory, after the first step; the caches that "
    "attend to {budget} tokens a step keep the others in files. ms a token: mean of single steps on one thread, in processor "
    "time. First token: processor time of all threads. Fetched: what the caches that retrieve had read again at full "
    "rank, over all layers and heads, when the last token of the code was due."
)
SHORT_SENTENCE, LONGEST_SENTENCE = 5, 128  # tokens


@dataclass
class Case:
    """One context, its question, the right answer and how the text goes on; token ids `(1, N)`.

    `code_length` counts the tokens at the end of `answer` that hold the code.
    """

    context: Tensor
    question: Tensor
    answer: Tensor
    code_length: int
    continuation: Tensor


@dataclass
class Decoding:
    """Milliseconds of processor time a step took, and the bytes in memory and in files after the first."""

    step: float
    nbytes: int
    file_bytes: int


@dataclass
class Measurement:
    """What one cache did on one context.

    NLL in nats a token, `first_token` in seconds of processor time, `decoding` once it was timed. `fetched`: parts of the context, and the share of their tokens that was read
    again for the answer, over layers and heads.
    """

    answer: str
    right: bool
    answer_nll: float
    text_nll: float
    first_token: float
    fetched: list[tuple[str, float]]
    decoding: Decoding


@contextmanager
def prepared(tokenizer: Any) -> Iterator[dict[str, dict[str, Any]]]:
    """`SYSTEMS` with a folder for the files of those that retrieve, and the sentence marks of the tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        systems = copy.deepcopy(SYSTEMS)
        for name in RETRIEVING:
            systems[name]["cache_config"]["offload_dir"] = folder
        systems["sentencekv"]["cache_config"]["boundary_ids"] = hf_ext.sentence_boundary_ids(tokenizer)
        yield systems


def make_case(tokenizer: Any, articles: list[str], length: int) -> Case:
    """A context of `length` tokens in the tokenizer's chat template, the needle inside and the question after it."""
    content, mark = f"{INTRO}\n\n[news]\n\n{QUESTION}", "[news]"
    chat = getattr(tokenizer, "chat_template", None) is not None
    if chat:
        messages = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:
        text = f"{content}\n"

    def ids(part: str, special: bool = False) -> list[int]:
        return tokenizer(part, add_special_tokens=special)["input_ids"]

    before, after = text.split(mark)
    head = ids(before, special=not chat)
    news: list[int] = []
    needle_at = None
    for article in articles:
        if needle_at is None and len(news) >= DEPTH * length:
            needle_at = len(news)
            news += ids(f"{NEEDLE}\n\n")
        news += ids(f"{article}\n\n")
        if len(news) >= length + CONTINUATION:
            break
    cut = length - len(head)
    right = ids(f"{ANSWER}{CODE}")
    stem = ids(ANSWER.rstrip())
    tensors = [torch.tensor([part]) for part in (head + news[:cut], ids(after), right, news[cut : cut + CONTINUATION])]
    return Case(tensors[0], tensors[1], tensors[2], len(right) - len(stem), tensors[3])


def read(model: Any, ids: Tensor, settings: dict[str, Any]) -> tuple[Any, float]:
    """Reads a context up to its first token; returns the cache and the seconds of processor time it took."""
    start = time.process_time()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=1,
        do_sample=False,
        return_dict_in_generate=True,
        **settings,
    )
    return output.past_key_values, time.process_time() - start


def answer(model: Any, tokenizer: Any, case: Case, cache: Any, new_tokens: int) -> str:
    """The greedy answer to the question, on top of a cache that holds the context."""
    prompt = torch.cat([case.context, case.question], dim=1)
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=new_tokens,
        do_sample=False,
    )
    return tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).strip()


@torch.no_grad()
def teacher_forced_nll(model: Any, cache: Any, ids: Tensor, scored: int) -> float:
    """Mean negative log-likelihood of the last `scored` tokens of `ids`, fed one at a time as generation does.

    A cache that retrieves attends to more when it is given a block: that would not show what decoding loses.
    """
    logits = [model(input_ids=token, past_key_values=cache).logits[0] for token in ids[:, :-1].split(1, dim=1)]
    return cross_entropy(torch.cat(logits)[-scored:].float(), ids[0, -scored:]).item()


@torch.no_grad()
def decode(model: Any, caches: dict[str, Any], token: Tensor, steps: int) -> dict[str, Decoding]:
    """Times `steps` single steps of every cache on one thread, and looks at its bytes after the first. Adds tokens to them.

    The caches take turns step by step, so that a change of the machine's speed meets all of them.
    """
    threads, seconds, sizes = torch.get_num_threads(), dict.fromkeys(caches, 0.0), {}
    torch.set_num_threads(1)
    try:
        for step in range(steps + 2):  # two to warm up
            for name, cache in caches.items():
                start = time.process_time()
                model(input_ids=token, past_key_values=cache)
                if step >= 2:
                    seconds[name] += time.process_time() - start
                if step == 0:
                    in_files = cache.offloaded_bytes() if isinstance(cache, RetrievalCache) else 0
                    sizes[name] = cache_bytes(cache), in_files
    finally:
        torch.set_num_threads(threads)
    # The mean: a cache that retrieves does not do so at every step.
    return {name: Decoding(1e3 * seconds[name] / steps, *sizes[name]) for name in caches}


def fetched(cache: Any, tokenizer: Any, ids: Tensor, boundary_ids: list[int]) -> list[tuple[str, float]]:
    """Parts of the context `ids` `(1, N)`, and which share of their tokens the newest step read again at full rank.

    The sentence with the code, the whole context, and the sentence of which most was read. Sinks and newest tokens are
    always at hand and do not count.
    """
    if not isinstance(cache, RetrievalCache):
        return []
    length, heads = ids.shape[1], 0
    count = torch.zeros(length)
    for layer in cache.kv_layers:
        if not isinstance(layer, RetrievalLayer) or layer.chosen is None:
            continue
        places = layer.places_of(layer.chosen, layer.chosen.shape).expand(layer.chosen.shape)
        if layer.shown is not None:
            places = places[layer.shown.expand(layer.chosen.shape)]
        count += torch.bincount(places[places < length].cpu().long(), minlength=length)
        heads += layer.chosen.shape[1]
    if not heads:
        return []
    marks = SentenceMap(torch.tensor(boundary_ids), LONGEST_SENTENCE)
    marks.extend(length, 1, ids.device, ids, None)
    numbers = marks.numbers()[0].cpu()
    sizes = torch.bincount(numbers).tolist()
    texts = [" ".join(tokenizer.decode(part).split()) for part in ids[0].cpu().split(sizes)]
    shares = [part.mean().item() / heads for part in count.split(sizes)]
    parts = [("the sentence with the code", share) for text, share in zip(texts, shares) if CODE in text]
    parts.append(("the whole context", count.mean().item() / heads))
    # A share of very few tokens says nothing.
    most = max(range(len(texts)), key=lambda n: shares[n] if sizes[n] >= SHORT_SENTENCE else -1.0)
    return [*parts, (f'"{textwrap.shorten(texts[most], 48, placeholder=" ...")}"', shares[most])]


def described(parts: list[tuple[str, float]]) -> str:
    """What was fetched, as a phrase."""
    return f"fetched {', '.join(f'{share:.0%} of {what}' for what, share in parts)}" if parts else ""


def filled(model: Any, prompt: Prompt, ids: Tensor, settings: dict[str, Any]) -> Any:
    """The cache `generate` would build with `settings`, filled with a prompt that was read elsewhere."""
    name = settings.get("cache_implementation")
    cache = build_cache(name, model, settings.get("cache_config")) if name else DynamicCache(config=model.config)
    fill(cache, prompt, ids)
    return cache


@contextmanager
def fastest_threads(model: Any, ids: Tensor) -> Iterator[None]:
    """As many threads as torch has, or one where that is faster: on a busy machine threads wait for each other."""
    threads = torch.get_num_threads()
    seconds = {}
    try:
        for count in (threads, 1):
            torch.set_num_threads(count)
            for _ in range(2):  # the first one warms up
                start = time.perf_counter()
                with torch.no_grad():
                    model(ids, logits_to_keep=1)
                seconds[count] = time.perf_counter() - start
        torch.set_num_threads(min(seconds, key=lambda count: seconds[count]))
        yield
    finally:
        torch.set_num_threads(threads)


def measure(
    model: Any, tokenizer: Any, case: Case, settings: dict[str, Any], boundary_ids: list[int], new_tokens: int = 20
) -> tuple[Measurement, Any]:
    """One cache on one case, still to be timed, and the cache itself, which holds the context.

    `settings` go to `generate`. Runs inside `hf_ext.registered()`.
    """
    cache, first_token = read(model, case.context, settings)
    said = answer(model, tokenizer, case, copy.deepcopy(cache), new_tokens)
    answering = copy.deepcopy(cache)
    full_answer = torch.cat([case.question, case.answer], dim=1)
    answer_nll = teacher_forced_nll(model, answering, full_answer, case.code_length)
    sentences = fetched(answering, tokenizer, case.context, boundary_ids)
    del answering
    text_nll = teacher_forced_nll(model, copy.deepcopy(cache), case.continuation, case.continuation.shape[1] - 1)
    untimed = Decoding(0.0, 0, 0)
    return Measurement(said, CODE in said, answer_nll, text_nll, first_token, sentences, untimed), cache


def compare(
    model: Any, tokenizer: Any, articles: list[str], length: int, sweep: tuple[int, ...], console: Console
) -> tuple[dict[str, Measurement], dict[str, list[tuple[int, int, float]]]]:
    """Every cache on one context, then memory and speed over shorter ones; says on `console` what happens.

    Returns:
        `tuple`: the measurements by cache, and per cache a list of (tokens, bytes in memory, milliseconds a token).
    """
    case = make_case(tokenizer, articles, length)
    console.print(f"\nContext: {case.context.shape[1]:,} tokens of news, and halfway in: [italic]{NEEDLE}[/italic]")
    console.print(f"Question, asked when the context has been read: [bold]{QUESTION}[/bold]\n")
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    results: dict[str, Measurement] = {}
    curves: dict[str, list[tuple[int, int, float]]] = {name: [] for name in SYSTEMS}
    with ExitStack() as stack:
        stack.enter_context(hf_ext.registered())
        stack.enter_context(_ready(model))
        systems = stack.enter_context(prepared(tokenizer))
        boundary_ids = systems["sentencekv"]["cache_config"]["boundary_ids"]
        progress = stack.enter_context(Progress(*columns, console=console, transient=True))
        task = progress.add_task("warming up", total=len(systems) + 1 + len(sweep))
        stack.enter_context(fastest_threads(model, case.context[:, :256]))
        for settings in systems.values():
            read(model, case.context[:, :128], settings)
        caches = {}
        for name, settings in systems.items():
            progress.update(task, description=f"{name} reads {length:,} tokens and answers")
            results[name], caches[name] = measure(model, tokenizer, case, settings, boundary_ids)
            progress.console.print(f"  {name:10s} ", results[name].answer or "(nothing)", markup=False)
            if results[name].fetched:
                progress.console.print(f"{'':12s} {described(results[name].fetched)}", markup=False, style="dim")
            progress.advance(task)
        for tokens in (length, *sorted(sweep, reverse=True)):
            progress.update(task, description=f"memory and speed at {tokens:,} tokens")
            if tokens < length:
                ids = case.context[:, :tokens]
                prompt = torch.no_grad()(read_prompt)(model, ids)
                caches = {name: filled(model, prompt, ids, settings) for name, settings in systems.items()}
            for name, found in decode(model, caches, case.question[:, :1], steps=8).items():
                curves[name].insert(0, (tokens, found.nbytes, found.step))
                if tokens == length:
                    results[name].decoding = found
            progress.advance(task)
    return results, curves


@contextmanager
def _ready(model: Any) -> Iterator[None]:
    """Evaluation mode and quiet: a short sweep is below the size a ratio can be kept at, which ojakv would warn of."""
    training = model.training
    model.eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        model.train(training)


def grid(results: dict[str, Measurement]) -> tuple[list[str], list[list[str]]]:
    """The comparison as text: header and one line per cache."""
    dense = results["dense"]
    header = ["cache", "answer right", "answer NLL", "text NLL", "MB", "of dense", "MB in files", "ms a token"]
    header.append("first token (s)")
    lines = [
        [
            name,
            "yes" if one.right else "no",
            f"{one.answer_nll:.3f}",
            f"{one.text_nll:.3f}" if one is dense else f"{one.text_nll - dense.text_nll:+.3f}",
            f"{one.decoding.nbytes / 1e6:.1f}",
            f"{one.decoding.nbytes / dense.decoding.nbytes:.0%}",
            f"{one.decoding.file_bytes / 1e6:.1f}",
            f"{one.decoding.step:.1f}",
            f"{one.first_token:.1f}",
        ]
        for name, one in results.items()
    ]
    return header, lines


def to_rows(
    results: dict[str, Measurement], curves: dict[str, list[tuple[int, int, float]]], model_name: str, length: int
) -> list[Row]:
    """Everything measured, as rows."""
    dense, rows = results["dense"], []
    for name, one in results.items():
        for metric, value, unit in (
            ("answer right", float(one.right), ""),
            ("answer NLL", one.answer_nll, "nat"),
            ("text NLL above dense", one.text_nll - dense.text_nll, "nat"),
            ("cache", one.decoding.nbytes / 1e6, "MB"),
            ("cache over dense", one.decoding.nbytes / dense.decoding.nbytes, ""),
            ("cache in files", one.decoding.file_bytes / 1e6, "MB"),
            ("decode step", one.decoding.step, "ms"),
            ("first token", one.first_token, "s"),
        ):
            rows.append(Row(name.split()[0], name, f"{model_name}, {length} tokens", metric, round(value, 4), unit))
    for name, points in curves.items():
        for tokens, nbytes, step in points:
            if tokens != length:
                setting = f"{model_name}, {tokens} tokens"
                rows.append(Row(name.split()[0], name, setting, "cache", round(nbytes / 1e6, 4), "MB"))
                rows.append(Row(name.split()[0], name, setting, "decode step", round(step, 4), "ms"))
    return rows


def draw(curves: dict[str, list[tuple[int, int, float]]], model_name: str, path: Path) -> bool:
    """Memory and speed against context length; `False` if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    # Okabe and Ito's palette; the markers tell the lines apart in grey as well.
    styles = (
        ("#000000", "o", "-"),
        ("#0072B2", "s", "--"),
        ("#D55E00", "^", "-"),
        ("#009E73", "D", "-"),
        ("#CC79A7", "v", "-."),
    )
    figure = Figure(figsize=(10, 4.4), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    memory, latency = figure.subplots(1, 2)
    lengths = [point[0] for point in next(iter(curves.values()))]
    for (name, points), (color, marker, line) in zip(curves.items(), styles):
        style = {"color": color, "marker": marker, "linestyle": line, "linewidth": 2, "markersize": 6, "label": name}
        memory.plot(lengths, [point[1] / 1e6 for point in points], **style)
        latency.plot(lengths, [point[2] for point in points], **style)
    for axes, title in (
        (memory, "Memory of the cache (MB), lower is better"),
        (latency, "Time of a step (ms a token), lower is better"),
    ):
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel("tokens of context")
        axes.set_xticks(lengths, [f"{tokens:,}" for tokens in lengths], rotation=30, ha="right")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#dddddd", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="best")
    figure.suptitle(f"{model_name}: cache against context length", x=0.01, ha="left", fontsize=13)
    figure.savefig(path)
    return True


def report(results: dict[str, Measurement], model_name: str, length: int, picture: Path | None) -> str:
    """A page that needs no other file: table, answers, picture."""
    header, lines = grid(results)
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    answers = "\n".join(
        f"<tr><td>{html.escape(name)}</td><td class='text'>{html.escape(one.answer) or '(nothing)'}"
        + f"<br><small>{html.escape(described(one.fetched))}</small></td></tr>"
        for name, one in results.items()
    )
    image = f"<p>{html.escape(NO_MATPLOTLIB)}</p>"
    if picture is not None:
        data = base64.b64encode(picture.read_bytes()).decode()
        image = f"<img alt='memory and speed against context length' src='data:image/png;base64,{data}'>"
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>hf-ext demo: {html.escape(model_name)}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child, td.text {{ text-align: left }}
img {{ max-width: 100% }}
blockquote {{ margin-left: 0; padding-left: 1rem; border-left: 3px solid #ddd }}
.notes {{ color: #555; font-size: .9rem }}
</style>
<h1>One context, {len(results)} caches</h1>
<p>{html.escape(model_name)} read {length:,} tokens of news. Among them stood:</p>
<blockquote>{html.escape(NEEDLE)}</blockquote>
<p>Then it was asked:</p>
<blockquote>{html.escape(QUESTION)}</blockquote>
<table><tr><th>cache</th><th style="text-align: left">answer</th></tr>
{answers}
</table>
<h2>Measured</h2>
<table><tr>{head}</tr>
{body}
</table>
<p class="notes">{html.escape(NOTES.format(continuation=CONTINUATION, budget=TOKEN_BUDGET))}</p>
<h2>Memory and speed</h2>
{image}
</html>
"""


def run(*, model: str | os.PathLike | None, out: str | os.PathLike, quick: bool) -> int:
    """The demo.

    Args:
        model (`str`, *optional*): local folder or Hub id; the packaged SmolLM2 if `None`.
        out (`str`): folder for `demo.json`, `memory_speed.png`, `report.html`, `delta`, `hub` and `pulled`; made if missing.
        quick (`bool`): shorter contexts, fewer steps of training.

    Returns:
        `int`: 0 if the exact cache gave the dense answer, 1 if not.

    Raises:
        `MissingPackageError`: the packaged model or texts are not installed; the message says how.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    news = load_bbc()
    articles = [row["text"] for row in news[::97]]
    name = "SmolLM2-135M-Instruct" if model is None else Path(model).name
    with console.status(f"loading {name} (unpacking the packaged weights takes half a minute, once)"), _no_bars():
        loaded, tokenizer = load_model(model)
    limit = getattr(loaded.config.get_text_config(decoder=True), "max_position_embeddings", CONTEXT + 512)
    length = min(QUICK_CONTEXT if quick else CONTEXT, limit - 512)
    sweep = tuple(tokens for tokens in (QUICK_SWEEP if quick else SWEEP) if tokens < length)
    results, curves = compare(loaded, tokenizer, articles, length, sweep, console)

    header, lines = grid(results)
    table = Table(title=f"{name}, {length:,} tokens of context", title_justify="left")
    for number, cell in enumerate(header):
        table.add_column(cell, justify="right" if number > 1 else "left", overflow="fold")
    for line in lines:
        table.add_row(*line)
    console.print()
    console.print(table)
    console.print(NOTES.format(continuation=CONTINUATION, budget=TOKEN_BUDGET), style="dim")

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "memory_speed.png"
    drawn = draw(curves, name, picture)
    report_file = write_text_atomic(folder / "report.html", report(results, name, length, picture if drawn else None))
    with _no_bars():
        of_delta = demo_delta.run(loaded, tokenizer, news, folder, quick, console, name)
    rows = write_rows(folder / "demo.json", [*to_rows(results, curves, name, length), *of_delta])
    written = [rows, report_file, *([picture] if drawn else [])]
    written += [folder / made for made in ("delta", "hub", "pulled") if of_delta]
    if not drawn:
        console.print(NO_MATPLOTLIB)
    console.print(f"\nWrote {', '.join(str(path) for path in written)}", soft_wrap=True)
    if results["packed"].answer != results["dense"].answer:
        console.print("The exact cache answered differently from the dense one; it must not.", style="red")
        return 1
    return 0


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' own progress bars, which would be drawn over ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
