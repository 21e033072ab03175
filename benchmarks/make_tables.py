"""Writes the measured tables of README.md and of the method pages from benchmarks/results/*.json.

    python benchmarks/make_tables.py [--check]

Only the text between the two markers of a page is replaced. With `--check` nothing is written and the exit code is 1 when
a page differs from the results. A method page gets every row of its files: one table per metric, a line per system, a
column per setting; of a file that has one setting one table, a column per metric. README.md gets one line per headline: our
default, the best peer that needs no more bytes, the command.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from hf_ext.table import Row, format_value, read_rows


ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"

# Page of a method -> the results it shows, each the output of the script of the same name.
PAGES = {
    "docs/methods/ojakv.md": ("kv_quality", "residuals", "decode_speed", "end_to_end", "exactness"),
    "docs/methods/packed.md": ("decode_speed", "end_to_end", "exactness"),
    "docs/methods/sentencekv.md": (
        "retrieval_quality",
        "decode_speed",
        "end_to_end_float32",
        "end_to_end_bfloat16",
        "exactness",
    ),
    "docs/methods/hybridkv.md": (
        "retrieval_quality",
        "kv_quality_low",
        "decode_speed",
        "end_to_end_float32",
        "end_to_end_bfloat16",
        "exactness",
    ),
    "docs/methods/osd.md": (
        "delta_quality_headlines",
        "delta_quality_topics",
        "delta_quality_small",
        "delta_lora",
        "delta_speed",
    ),
    "docs/methods/sgc.md": (
        "optimizer_quality_scratch_1m",
        "optimizer_quality_finetune_1m",
        "optimizer_quality_scratch_10m",
        "optimizer_quality_finetune_10m",
        "optimizer_ablation_finetune_1m",
        "optimizer_smollm2",
        "optimizer_speed",
        "optimizer_resume",
        "optimizer_grid_scratch_1m",
        "optimizer_grid_finetune_1m",
        "optimizer_grid_scratch_10m",
        "optimizer_grid_finetune_10m",
        "optimizer_ablation_grid_finetune_1m",
    ),
    "docs/methods/tccm.md": ("anomaly_quality", "anomaly_tables", "anomaly_speed", "anomaly_explain"),
    "docs/methods/medix.md": ("ood_quality",),
}
# What writes the results that are not simply those of the script of their name.
COMMANDS = {
    "delta_quality_headlines": "delta_quality.py --task headlines",
    "delta_quality_small": "delta_quality.py --task small",
    "delta_quality_topics": "delta_quality.py --task topics",
    "end_to_end_bfloat16": "end_to_end.py --dtypes bfloat16 --rounds 1 --systems sentencekv hybridkv --out "
    "benchmarks/results/end_to_end_bfloat16.json",
    "end_to_end_float32": "end_to_end.py --dtypes float32 --out benchmarks/results/end_to_end_float32.json",
    "optimizer_ablation_finetune_1m": "optimizer_ablation.py --seeds 0",
    "optimizer_ablation_grid_finetune_1m": "optimizer_ablation.py --seeds 0",
    "anomaly_quality": "anomaly_quality.py --tables DIR",
    "anomaly_tables": "anomaly_quality.py --tables DIR",
    "ood_quality": "ood_quality.py --features DIR",
    "optimizer_smollm2": "optimizer_smollm2.py --seeds 0",
    "optimizer_grid_finetune_1m": "optimizer_quality.py --regime finetune --steps 300 --grid",
    "optimizer_grid_finetune_10m": "optimizer_quality.py --size 10m --regime finetune --steps 300 --grid",
    "optimizer_grid_scratch_1m": "optimizer_quality.py --regime scratch --steps 1500 --grid",
    "optimizer_quality_finetune_1m": "optimizer_quality.py --regime finetune --steps 300 --seeds 0 1 2 3 4",
    "optimizer_quality_finetune_10m": "optimizer_quality.py --size 10m --regime finetune --steps 300 --seeds 0",
    "optimizer_grid_scratch_10m": "optimizer_quality.py --size 10m --regime scratch --steps 1500 --grid",
    "optimizer_quality_scratch_10m": "optimizer_quality.py --size 10m --regime scratch --steps 1500 --seeds 0",
    "optimizer_quality_scratch_1m": "optimizer_quality.py --regime scratch --steps 1500 --seeds 0 1 2 3 4",
    "kv_quality_low": "kv_quality.py --documents 2 --needles 0 --ratios 0.28 0.14 --systems hybridkv ojakv 'int4 per token' "
    "'pca post-rope' snapkv 'snapkv + int8' streamingllm --out benchmarks/results/kv_quality_low.json",
}
# Systems whose name begins so are ours; all others are peers, and so is the form a paper published.
OURS = ("packed", "ojakv", "sentencekv", "hybridkv", "osd", "sgc", "tccm", "medix")
PUBLISHED = (
    "sentencekv paper",
    "osd, paper mode",
    "sgc, paper known",
    "sgc, paper omp",
    "sgc, paper rank 8",
    "tccm paper",
    "medix paper",
    "medix filter",
)
# Neither ours nor peers: they read every key to choose, or store every number.
DENSE, BOUNDS = "dense", ("oracle", "exact")
# The end of a setting that is a budget, and so belongs to the system: peers of a fixed size have none.
BUDGET = re.compile(r", (ratio [\d.]+)$")
BYTES = "bytes"


@dataclass(frozen=True)
class Headline:
    """A line of the README: `system` of `method` by `metric`, in the setting that matches `setting`."""

    method: str
    system: str
    file: str
    metric: str
    setting: str
    higher_is_better: bool = False


HEADLINES = (
    Headline("packed", "packed", "decode_speed", "speed over DynamicCache", r"32K, bfloat16", True),
    Headline("packed", "packed", "decode_speed", "speed over DynamicCache", r"32K, float32", True),
    Headline("ojakv", "ojakv", "kv_quality", "loss above dense", r"^BBC, all contexts, ratio 0\.6$"),
    Headline("ojakv", "ojakv", "kv_quality", "loss of the code", r"^needles, question later, ratio 0\.6$"),
    Headline("ojakv", "ojakv", "kv_quality", "loss above dense", r"^BBC, all contexts, ratio 0\.4$"),
    Headline("ojakv", "ojakv", "kv_quality", "loss of the code", r"^needles, question later, ratio 0\.4$"),
    Headline("ojakv", "ojakv 0.6", "decode_speed", "speed over DynamicCache", r"32K, bfloat16", True),
    Headline("sentencekv", "sentencekv", "retrieval_quality", "loss above dense", r"^BBC, .*budget 512$"),
    Headline("sentencekv", "sentencekv", "retrieval_quality", "loss of the code", r"^needles, question later, budget"),
    Headline("sentencekv", "sentencekv", "decode_speed", "speed over DynamicCache", r"32K, bfloat16", True),
    Headline("hybridkv", "hybridkv", "retrieval_quality", "loss above dense", r"^BBC, .*budget 512$"),
    Headline("hybridkv", "hybridkv", "retrieval_quality", "loss of the code", r"^needles, question later, budget"),
    Headline("hybridkv", "hybridkv", "decode_speed", "speed over DynamicCache", r"32K, bfloat16", True),
    Headline("osd", "osd", "delta_quality_headlines", "recovery", r", 50 kB$", True),
    Headline("osd", "osd", "delta_quality_headlines", "recovery", r", 250 kB$", True),
    Headline("osd", "osd", "delta_quality_topics", "recovery", r", 50 kB$", True),
    Headline("osd", "osd", "delta_quality_small", "recovery", r", 24 kB$", True),
    Headline("sgc", "sgc", "optimizer_quality_scratch_1m", "held-out loss", r"^scratch, 1m"),
    Headline("sgc", "sgc", "optimizer_quality_finetune_1m", "held-out loss", r"^finetune, 1m"),
    Headline("tccm", "tccm", "anomaly_quality", "mean AUROC", r"^20 tables", True),
    Headline("tccm", "tccm", "anomaly_quality", "mean AUPR", r"^20 tables", True),
    Headline("tccm", "tccm conditional", "anomaly_explain", "top-m Jaccard", r"^mean", True),
    Headline("medix", "medix", "ood_quality", "auroc", r"SVHN, prevalence 0\.1$", True),
    Headline("medix", "medix", "ood_quality", "auroc", r"MiniLM features, prevalence 0\.3$", True),
)


def load() -> dict[str, list[Row]]:
    """Rows by file name without `.json`."""
    return {path.stem: read_rows(path) for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))}


def command(file: str) -> str:
    return f"`python benchmarks/{COMMANDS.get(file, f'{file}.py')}`"


def is_ours(row: Row) -> bool:
    return row.system.startswith(OURS) and not row.system.startswith(PUBLISHED)


def is_peer(row: Row) -> bool:
    return not is_ours(row) and row.system != DENSE and not row.system.startswith(BOUNDS)


def is_measured(method: str, file: str, results: dict[str, list[Row]]) -> bool:
    """Whether a file of results says anything about a method."""
    return any(row.method == method or row.system.startswith(method) for row in results.get(file, ()))


def split_budget(setting: str) -> tuple[str, str]:
    """A setting without its budget, and the budget or `""`."""
    found = BUDGET.search(setting)
    return (setting[: found.start()], found[1]) if found else (setting, "")


def with_unit(row: Row) -> str:
    """`9.1x`, `0.022 nats`; spreads are on the method pages."""
    return f"{format_value(replace(row, spread=0.0))}{'' if row.unit in ('', 'x', '%') else ' '}{row.unit}"


def share_of_bytes(row: Row, rows: list[Row]) -> float | None:
    """The share of the dense cache's bytes a system used in a setting, if the file says it."""
    found = [r.value for r in rows if (r.system, r.setting, r.metric) == (row.system, row.setting, BYTES)]
    return found[0] if found else None


def best_peer(ours: Row, rows: list[Row], higher_is_better: bool) -> Row | None:
    """The best system of others under the same circumstances that takes no more bytes.

    Systems of a fixed size stand in the setting without a budget.
    """
    limit = share_of_bytes(ours, rows)
    settings = (ours.setting, split_budget(ours.setting)[0])
    peers = [row for row in rows if row.metric == ours.metric and row.setting in settings and is_peer(row)]
    if limit is not None:
        # One in a hundred: budgets are met up to a page of storage.
        peers = [row for row in peers if (share_of_bytes(row, rows) or 0) <= 1.01 * limit]
    if not peers:
        return None
    return (max if higher_is_better else min)(peers, key=lambda row: row.value)


def not_measured(what: list[str]) -> str:
    return f"Not measured yet: {', '.join(dict.fromkeys(what))}."


def headline_table(results: dict[str, list[Row]]) -> str:
    """The README's block."""
    lines = []
    missing: list[str] = []
    for headline in HEADLINES:
        if not is_measured(headline.method, headline.file, results):
            missing.append(f"`{headline.method}` by {command(headline.file)}")
            continue
        rows = results[headline.file]
        found = [
            row
            for row in rows
            if (row.system, row.metric) == (headline.system, headline.metric)
            and re.search(headline.setting, row.setting)
        ]
        if not found:
            raise SystemExit(f"{headline.file}.json has no row for {headline}; adapt HEADLINES to what it measures.")
        ours = found[0]
        peer = best_peer(ours, rows, headline.higher_is_better)

        def cell(row: Row, rows: list[Row] = rows) -> str:
            share = share_of_bytes(row, rows)
            return with_unit(row) + ("" if share is None else f", {share:.0%} of the bytes")

        best = "none" if peer is None else f"{peer.system}: {cell(peer)}"
        direction = "higher" if headline.higher_is_better else "lower"
        what = f"{ours.metric}, {ours.setting} ({direction} is better)"
        lines.append(f"| `{headline.method}` | {what} | {cell(ours)} | {best} | {command(headline.file)} |")
    parts = []
    if lines:
        parts.append(
            "\n".join(
                ["| method | what | ours | best peer | measured by |", "| --- | --- | ---: | ---: | --- |", *lines]
            )
        )
    if missing:
        parts.append(not_measured(missing))
    return "\n\n".join(parts)


def metric_table(rows: list[Row]) -> str:
    """One metric: a line per system (with its budget), a column per setting, what all settings share in the caption."""
    cells: dict[str, dict[str, str]] = {}
    settings: dict[str, list[str]] = {}
    for row in rows:
        base, budget = split_budget(row.setting)
        settings.setdefault(base, base.split(", "))
        cells.setdefault(f"{row.system}, {budget}" if budget else row.system, {})[base] = format_value(row)
    first = next(iter(settings.values()))
    common = (
        [part for part in first if all(part in parts for parts in settings.values())] if len(settings) > 1 else first
    )
    heads = {base: ", ".join(p for p in parts if p not in common) or "value" for base, parts in settings.items()}
    unit = f" ({rows[0].unit})" if rows[0].unit else ""
    where = f", {', '.join(common)}" if common else ""
    lines = [["system", *heads.values()], ["---", *["---:"] * len(heads)]]
    lines += [[system, *(found.get(base, "") for base in settings)] for system, found in cells.items()]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"**{rows[0].metric}{unit}**{where}{repeats(rows)}\n\n{table}"


def setting_table(rows: list[Row]) -> str:
    """All metrics of one setting: a line per system, a column per metric."""
    metrics = {row.metric: f"{row.metric} ({row.unit})" if row.unit else row.metric for row in rows}
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        cells.setdefault(row.system, {})[row.metric] = format_value(row)
    lines = [["system", *metrics.values()], ["---", *["---:"] * len(metrics)]]
    lines += [[system, *(found.get(metric, "") for metric in metrics)] for system, found in cells.items()]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"**{rows[0].setting}**{repeats(rows)}\n\n{table}"


def repeats(rows: list[Row]) -> str:
    """How often values were measured, the end of a caption."""
    counts = sorted({row.n for row in rows})
    number = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    return f"; {number}" + (", ± standard deviation" if any(row.spread for row in rows) else "")


def page_tables(method: str, files: tuple[str, ...], results: dict[str, list[Row]]) -> str:
    """The block of a method page; a file that does not say anything about the method yet is named only."""
    parts = []
    for file in files:
        if not is_measured(method, file, results):
            continue
        rows = results[file]
        parts.append(f"Measured by {command(file)}:")
        metrics = dict.fromkeys(row.metric for row in rows)
        if len({row.setting for row in rows}) == 1 and len(metrics) > 1:
            parts.append(setting_table(rows))
        else:
            parts += [metric_table([row for row in rows if row.metric == metric]) for metric in metrics]
    missing = [command(file) for file in files if not is_measured(method, file, results)]
    if missing:
        parts.append(not_measured(missing))
    return "\n\n".join(parts)


def blocks(results: dict[str, list[Row]]) -> dict[str, str]:
    """What stands between the markers, by page."""
    pages = {page: page_tables(Path(page).stem, files, results) for page, files in PAGES.items()}
    return {"README.md": headline_table(results), **pages}


def with_block(text: str, block: str) -> str:
    """The page with the part between the two markers replaced."""
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    return f"{head}{BEGIN}\n{block}\n{END}{tail}"


def stale() -> dict[str, str]:
    """Pages that differ from the results, with their new text."""
    found = {}
    for page, block in blocks(load()).items():
        text = (ROOT / page).read_text(encoding="utf-8")
        if (new := with_block(text, block)) != text:
            found[page] = new
    return found


def main(arguments: list[str]) -> int:
    pages = stale()
    for page, text in pages.items():
        if "--check" in arguments:
            print(f"{page} is stale; run python benchmarks/make_tables.py")
        else:
            (ROOT / page).write_text(text, encoding="utf-8")
            print(f"wrote {page}")
    return 1 if pages and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
