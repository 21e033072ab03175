"""The picture of a bench that compares two numbers, such as what is kept and what is reached with it."""

import os
from pathlib import Path

from hf_ext.errors import ConfigError
from hf_ext.table import Row


MARKERS = "*osD^v<>Px"


def new_figure(path: Path):
    """An empty figure of matplotlib for a file of that name.

    Raises:
        ConfigError: matplotlib is missing, or does not know the kind of file.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib; install it with: pip install matplotlib") from None
    kinds = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix[1:] not in kinds:
        raise ConfigError(f"--plot {path}: no kind of picture ends so; choose one of {', '.join(sorted(kinds))}.")
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw(rows: list[Row], across: str, up: str, path: Path) -> Path:
    """One marker a system; the horizontal axis is logarithmic, less of both is better.

    Args:
        rows (`list[Row]`): Of a bench.
        across, up (`str`): Metrics.
        path (`Path`): Of the picture; its ending says which kind, `.png` or `.svg` among others.

    Returns:
        `Path`: of the picture, replaced in one step.

    Raises:
        ConfigError: as `new_figure`.
    """
    figure = new_figure(path)
    axes = figure.subplots()
    found = {metric: {row.system: row for row in rows if row.metric == metric} for metric in (across, up)}
    for number, (system, row) in enumerate(found[up].items()):
        marker, at = MARKERS[number % len(MARKERS)], found[across][system].value
        axes.errorbar(at, row.value, yerr=row.spread or None, marker=marker, linestyle="none", capsize=2, label=system)
    axes.set_xscale("log")
    units = {metric: next(iter(by_system.values())).unit for metric, by_system in found.items()}
    axes.set_xlabel(f"{across} ({units[across]})")
    axes.set_ylabel(f"{up} ({units[up]})")
    axes.set_title(f"{rows[0].method}: {rows[0].setting}", loc="left", fontsize=10)
    axes.grid(color="#dddddd", linewidth=0.8)
    figure.legend(loc="outside right center", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        figure.savefig(partial, dpi=130)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
