"""Draws the time of a decode step and resident bytes against context length from benchmarks/results/decode_speed.json.

    python benchmarks/make_plots.py [--results benchmarks/results/decode_speed.json] [--out docs/plots]

One SVG per quantity, a panel per dtype, both axes logarithmic; a system that the results lack is left out. The same
results give the same bytes with the same matplotlib, so a changed file means changed results.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

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


if __name__ == "__main__":
    main()
