"""Quick comparisons, one module per method: `run(seeds) -> list[Row]`, no network, under a minute on one core.

A bench prints nothing and always includes the trivial peer. One whose `PLOT` names two metrics can be drawn. The heavy comparisons are scripts in `benchmarks/`.
"""

import importlib
import math

from hf_ext.errors import ConfigError
from hf_ext.registry import METHODS
from hf_ext.table import Row


def available() -> list[str]:
    """Ids of the methods that can be benched."""
    return [name for name, card in METHODS.items() if card.bench]


def run_bench(method: str, seeds: int = 3) -> list[Row]:
    """Run the quick comparison of one method.

    Args:
        method (`str`): An id of `hf_ext.registry.METHODS`.
        seeds (`int`, defaults to 3): Repetitions behind every number that depends on a seed.

    Returns:
        `list[Row]`: ours and its peers.

    Raises:
        ConfigError: the method is unknown, or planned and not built yet, or `seeds` is below 1.
    """
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}.")
    card = METHODS[method]
    if not card.bench:
        raise ConfigError(f"{method} is planned, not built yet; methods with a bench: {', '.join(available())}.")
    if seeds < 1:
        raise ConfigError(f"seeds={seeds} must be at least 1.")
    return importlib.import_module(card.bench).run(seeds)


def plot_metrics(method: str) -> tuple[str, str]:
    """Metrics of the two axes of a bench's picture.

    Raises:
        ConfigError: the bench has no picture.
    """
    found: dict[str, tuple[str, str]] = {}
    for name, card in METHODS.items():
        metrics = getattr(importlib.import_module(card.bench), "PLOT", None) if card.bench else None
        found |= {name: metrics} if metrics else {}
    if method not in found:
        raise ConfigError(f"the bench of {method} has no picture; those that have one: {', '.join(found)}.")
    return found[method]


def not_finite(rows: list[Row]) -> list[Row]:
    """Rows whose value or spread is not a finite number: a bench that has them failed."""
    return [row for row in rows if not (math.isfinite(row.value) and math.isfinite(row.spread))]
