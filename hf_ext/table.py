"""Result rows: written and read as JSON, shown as Markdown or in the terminal."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from hf_ext.config import write_text_atomic
from hf_ext.errors import ConfigError


if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One measured number.

    Args:
        method (`str`): Id of the method the comparison is about.
        system (`str`): What was measured: ours, or the name of a peer.
        setting (`str`): Under which circumstances, for example `"4096 tokens, bf16"`.
        metric (`str`): What the number is.
        value (`float`): The number, a mean where `n > 1`.
        unit (`str`): Its unit, `""` for a pure number.
        n (`int`): How many measurements stand behind it.
        spread (`float`): Standard deviation over them, 0 where `n == 1`.
    """

    method: str
    system: str
    setting: str
    metric: str
    value: float
    unit: str = ""
    n: int = 1
    spread: float = 0.0


KEYS = tuple(field.name for field in fields(Row))


def write_rows(path: str | os.PathLike, rows: Iterable[Row]) -> Path:
    """Write rows as a JSON list, one object a line, replacing the file in one step.

    Raises:
        ConfigError: a value is not finite; JSON has no way to say so.
    """
    try:
        lines = [json.dumps(asdict(row), allow_nan=False) for row in rows]
    except ValueError as error:
        raise ConfigError(
            f"{path}: a row holds a value that is not finite ({error}); drop it or mark the run failed."
        ) from None
    return write_text_atomic(path, "[\n" + ",\n".join(lines) + "\n]\n")


def read_rows(path: str | os.PathLike) -> list[Row]:
    """Rows of a file written by `write_rows`.

    Raises:
        ConfigError: the file is not a list of objects with exactly the keys of `Row`.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(data, list):
        raise ConfigError(f"{path} holds a {type(data).__name__}; expected a list of rows.")
    for number, item in enumerate(data):
        if not isinstance(item, dict) or set(item) != set(KEYS):
            found = ", ".join(map(str, item)) if isinstance(item, dict) else repr(item)
            raise ConfigError(f"{path}, row {number}: found {found}; expected exactly the keys {', '.join(KEYS)}.")
    return [Row(**item) for item in data]


def pivot(
    rows: Iterable[Row], index: Sequence[str] = ("setting", "system"), columns: Sequence[str] = ("metric",)
) -> tuple[list[str], list[list[str]]]:
    """Arrange rows as a grid of text, in order of first appearance.

    Args:
        rows (`Iterable[Row]`): What to show. Two rows for one cell: the later one is shown.
        index (`Sequence[str]`): Keys of `Row` that name a line.
        columns (`Sequence[str]`): Keys of `Row` that name a column; the unit is added in brackets.

    Returns:
        `tuple[list[str], list[list[str]]]`: the header, and the lines, each as long as the header.
    """
    heads: list[str] = []
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        head = ", ".join(str(getattr(row, key)) for key in columns) + (f" ({row.unit})" if row.unit else "")
        if head not in heads:
            heads.append(head)
        lines.setdefault(tuple(str(getattr(row, key)) for key in index), {})[head] = format_value(row)
    return [*index, *heads], [[*name, *(cells.get(head, "") for head in heads)] for name, cells in lines.items()]


def format_value(row: Row) -> str:
    """The value with four significant digits, and its spread where there is one."""
    text = _short(row.value)
    return f"{text} ± {_short(row.spread)}" if row.n > 1 and row.spread else text


def to_markdown(
    rows: Iterable[Row], index: Sequence[str] = ("setting", "system"), columns: Sequence[str] = ("metric",)
) -> str:
    """A Markdown table of `pivot(rows, index, columns)`: names left, numbers right."""
    header, lines = pivot(rows, index, columns)
    rule = ["---"] * len(index) + ["---:"] * (len(header) - len(index))
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines]) + "\n"


def to_rich(
    rows: Iterable[Row],
    title: str | None = None,
    index: Sequence[str] = ("setting", "system"),
    columns: Sequence[str] = ("metric",),
) -> "Table":
    """The same grid as a `rich.table.Table`, for a terminal."""
    from rich.table import Table

    header, lines = pivot(rows, index, columns)
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(header):
        table.add_column(name, justify="left" if number < len(index) else "right")
    previous = None
    for line in lines:
        if previous is not None and len(index) > 1 and line[0] != previous:
            table.add_section()
        previous = line[0]
        table.add_row(*line)
    return table


def _short(value: float) -> str:
    if isinstance(value, int) or (value == int(value) if abs(value) < 1e15 else False):
        return f"{int(value):,}" if abs(value) >= 10_000 else str(int(value))
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
