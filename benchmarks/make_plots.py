"""Draws the plots of the docs: time and memory of decoding, and what optimizers reach with how much state.

    python benchmarks/make_plots.py [--results benchmarks/results/decode_speed.json] [--out docs/plots]

The time of a decode step and resident bytes against context length come from the results named: one SVG per quantity, a
panel per dtype, both axes logarithmic; a system that the results lack is left out. Held-out loss against the state of an
optimizer comes from `optimizer_quality_*.json` beside them: one PNG, a panel per file, none without such files. The same
results give the same bytes with the same matplotlib, so a changed file means changed results.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from hf_ext.table import Row, read_rows


ROOT = Path(__file__).resolve().parent.parent

# Metric of the results -> title of its figure. The file and the vertical axis are named after the metric.
METRICS = {"decode step": "Processor time of a decode step", "resident bytes": "Resident memory"}
# Okabe and Ito's palette and grey; markers and dashes tell the lines apart without colour. Lines that coincide stay
# visible: the first are drawn widest, and what lies on disk has open markers in the colour of its cache.
STYLES: dict[str, dict[str, Any]] = {
    "DynamicCache": {"color": "#000000", "marker": "o", "linewidth": 3, "markersize": 8},
    "StaticCache": {"color": "#999999", "marker": "s", "linestyle": "--", "linewidth": 2, "markersize": 5.5},
    "packed": {"color": "#0072B2", "marker": "x", "linestyle": ":"},
    "ojakv 0.4": {"color": "#D55E00", "marker": "^"},
    "sentencekv": {"color": "#009E73", "marker": "D"},
    "sentencekv, on disk": {"color": "#009E73", "marker": "D", "linestyle": "--", "markerfacecolor": "white"},
    "hybridkv": {"color": "#CC79A7", "marker": "v"},
    "hybridkv, on disk": {"color": "#CC79A7", "marker": "v", "linestyle": "--", "markerfacecolor": "white"},
}
# The same for optimizers. Budgets and forms of ours share a colour; what keeps no state stands at the left edge.
FRONTIER = "sgc_frontier.png"
SMALLEST_SHARE = 1e-4
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"color": "#000000", "marker": "o"},
    "AdamW 8-bit": {"color": "#000000", "marker": "o", "markerfacecolor": "white"},
    "SGD": {"color": "#999999", "marker": "x"},
    "SGD momentum": {"color": "#999999", "marker": "s"},
    "Adafactor": {"color": "#0072B2", "marker": "^"},
    "Adafactor relative": {"color": "#0072B2", "marker": "^", "markerfacecolor": "white"},
    "GaLore r8": {"color": "#009E73", "marker": "D"},
    "APOLLO r8": {"color": "#E69F00", "marker": "v"},
    "APOLLO-Mini": {"color": "#E69F00", "marker": "v", "markerfacecolor": "white"},
    "LoRA r8": {"color": "#56B4E9", "marker": "P"},
    "block scalar": {"color": "#CC79A7", "marker": "X"},
    "sgc, budget 0.5%": {"color": "#D55E00", "marker": "*", "markersize": 10, "markerfacecolor": "white"},
    "sgc": {"color": "#D55E00", "marker": "*", "markersize": 14},
    "sgc, hybrid": {"color": "#D55E00", "marker": "p"},
    "sgc, paper known": {"color": "#D55E00", "marker": "<"},
    "sgc, paper omp": {"color": "#D55E00", "marker": "<", "markerfacecolor": "white"},
    "sgc, paper rank 8": {"color": "#D55E00", "marker": ">", "markerfacecolor": "white"},
}
# Text stays text, which is small and can be searched; the salt makes the ids inside the file the same at every run.
SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "hf-ext", "lines.linewidth": 1.6, "legend.handlelength": 3}
# Neither a date nor a version of matplotlib.
METADATA = {"Date": None, "Creator": None}

Panels = dict[str, dict[str, dict[int, float]]]


def panels_of(rows: list[Row]) -> Panels:
    """Values by dtype, system and number of tokens; systems in the order of `STYLES`."""
    panels: Panels = {}
    for row in sorted((row for row in rows if row.system in STYLES), key=lambda row: list(STYLES).index(row.system)):
        _, length, dtype, _ = row.setting.split(", ")
        tokens = 1024 * int(length.removesuffix("K"))
        panels.setdefault(dtype, {}).setdefault(row.system, {})[tokens] = row.value
    return panels


def draw_panel(axes: Axes, systems: dict[str, dict[int, float]], dtype: str) -> None:
    for system, values in systems.items():
        axes.plot(sorted(values), [values[tokens] for tokens in sorted(values)], label=system, **STYLES[system])
    axes.set_xscale("log")
    axes.set_yscale("log")
    lengths = sorted({tokens for values in systems.values() for tokens in values})
    axes.set_xticks(lengths, [f"{tokens // 1024}K" for tokens in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.tick_params(labelleft=True)
    axes.set_title(dtype, loc="left", fontsize=10)
    axes.set_xlabel("Context length (tokens)")
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def draw(metric: str, rows: list[Row], path: Path) -> None:
    """One figure of the rows of a metric, as SVG."""
    panels = panels_of(rows)
    if not panels:
        raise SystemExit(f"no {metric!r} of any of {', '.join(STYLES)}; run python benchmarks/decode_speed.py.")
    with matplotlib.style.context(["default", SETTINGS]):
        figure = Figure(figsize=(9, 4.8), layout="constrained")
        grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (dtype, systems) in zip(grid, panels.items()):
            draw_panel(axes, systems, dtype)
        grid[0].set_ylabel(f"{metric.capitalize()} ({rows[0].unit}), lower is better")
        layer, _, _, threads = rows[0].setting.split(", ")
        figure.suptitle(f"{METRICS[metric]}: {layer}, {threads}", x=0.01, ha="left", fontsize=12)
        # The panels' systems may differ, so that each name is taken from the first panel that has it.
        lines = {line.get_label(): line for axes in reversed(grid) for line in axes.get_lines()}
        names = [name for name in STYLES if name in lines]
        figure.legend([lines[name] for name in names], names, loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, format="svg", metadata=METADATA)


def frontier_of(folder: Path) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Share of state, loss and its spread, by setting and optimizer; the most repeated setting of each file."""
    panels: dict[str, dict[str, tuple[float, float, float]]] = {}
    for path in sorted(folder.glob("optimizer_quality_*.json"), reverse=True):
        rows = [row for row in read_rows(path) if row.system in OPTIMIZERS]
        losses = [row for row in rows if row.metric == "held-out loss"]
        if not losses:
            continue
        count = {row.setting: 0 for row in losses}
        for row in losses:
            count[row.setting] += row.n
        setting = max(count, key=lambda name: count[name])
        shares = {r.system: r.value / 100 for r in rows if r.metric.startswith("state") and r.setting == setting}
        found = {r.system: (shares[r.system], r.value, r.spread) for r in losses if r.setting == setting}
        panels[setting] = {name: found[name] for name in OPTIMIZERS if name in found}
    return panels


def draw_frontier(panels: dict[str, dict[str, tuple[float, float, float]]], path: Path) -> None:
    """One figure: state on a logarithmic axis, loss with its standard deviation over seeds; left and down is better."""
    with matplotlib.style.context(["default", SETTINGS]):
        columns = min(2, len(panels))
        lines = -(-len(panels) // columns)
        figure = Figure(figsize=(9 if columns > 1 else 6, 1.4 + 3.8 * lines), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False).ravel()
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        for axes, (setting, found) in zip(grid, panels.items()):
            for name, (share, loss, spread) in found.items():
                style = {"linestyle": "none", "markersize": 7, "elinewidth": 1, "capsize": 2, **OPTIMIZERS[name]}
                axes.errorbar(max(share, SMALLEST_SHARE), loss, yerr=spread or None, label=name, **style)
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
            axes.set_title(setting, loc="left", fontsize=10)
            axes.set_xlabel("Optimizer state, share of AdamW's")
            axes.grid(color="#dddddd", linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
        for axes in grid[::columns]:
            axes.set_ylabel("Held-out loss (nats), lower is better")
        figure.suptitle("Loss reached with how much optimizer state", x=0.01, ha="left", fontsize=12)
        handles = {}
        for axes in grid[: len(panels)]:
            handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels())}
        names = [name for name in OPTIMIZERS if name in handles]
        figure.legend([handles[n] for n in names], names, loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, dpi=130, metadata={"Software": None})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "decode_speed.json")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "plots")
    options = parser.parse_args(arguments)
    rows = read_rows(options.results)
    options.out.mkdir(parents=True, exist_ok=True)
    for metric in METRICS:
        path = options.out / f"{metric.replace(' ', '_')}.svg"
        draw(metric, [row for row in rows if row.metric == metric], path)
        print(f"wrote {path}")
    if panels := frontier_of(options.results.parent):
        draw_frontier(panels, options.out / FRONTIER)
        print(f"wrote {options.out / FRONTIER}")


if __name__ == "__main__":
    main()
