"""`hf-ext detect`: fit on a table of normal rows, score another, write the rows with their scores. Flat in memory."""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hf_ext.errors import ConfigError, DataError, HfExtError


READERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".json": "json", ".jsonl": "json"}
WRITERS = (".parquet", ".csv")


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds `detect` to the subcommands of `hf-ext`."""
    command = commands.add_parser(
        "detect",
        help="anomaly scores for the rows of a table",
        description="Learn from the rows of TRAIN, which are believed normal, and write the rows of TEST with anomaly_score and "
        "is_anomaly. A table is a csv, tsv, parquet or json file, or the name of a data set on the Hub (name or name:split).",
    )
    command.add_argument("train", metavar="TRAIN", help="table of normal rows, or a folder written by --save")
    command.add_argument("test", metavar="TEST", help="table to score")
    command.add_argument("--out", required=True, metavar="FILE", help="where to write the rows, .parquet or .csv")
    command.add_argument("--columns", nargs="+", metavar="NAME", help="columns to use (default: all)")
    command.add_argument("--exclude", nargs="+", default=[], metavar="NAME", help="columns not to use, such as ids")
    command.add_argument(
        "--categories", nargs="+", default=[], metavar="NAME", help="columns of numbers that are categories"
    )
    command.add_argument(
        "--missing", choices=("error", "impute"), default="error", help="missing numbers (default: error)"
    )
    command.add_argument(
        "--contamination", type=float, default=0.1, metavar="SHARE", help="share of normal rows flagged (default: 0.1)"
    )
    command.add_argument(
        "--trim", type=float, default=0.0, metavar="SHARE", help="share of TRAIN left out as anomalies"
    )
    command.add_argument("--explain", action="store_true", help="also write each column's part of the score")
    command.add_argument("--save", metavar="DIR", help="also save the fitted detector")
    command.add_argument("--seed", type=int, default=0, metavar="N")
    command.set_defaults(handler=_detect)


def _detect(arguments: argparse.Namespace) -> int:
    from hf_ext.cli import make_console
    from hf_ext.log import get_logger

    out = Path(arguments.out)
    # Before minutes of fitting, not after them.
    if out.suffix not in WRITERS:
        raise ConfigError(f"--out {out} must end in {' or '.join(WRITERS)}.")
    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder; expected a file to write.")
    if arguments.save and Path(arguments.save).is_file():
        raise ConfigError(f"--save {arguments.save} is a file; expected a folder to write.")
    try:
        import datasets
        import transformers
        from datasets.utils.logging import disable_progress_bar
    except ImportError:
        from hf_ext.errors import MissingPackageError

        raise MissingPackageError('hf-ext detect reads tables with datasets: pip install "hf-ext[detect]".') from None
    # The readers log what they also raise.
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    from hf_ext.pipelines.tccm import TCCMConfig
    from hf_ext.pipelines.tccm_pipeline import TCCMPipeline

    test = open_table(arguments.test)
    if Path(arguments.train).is_dir():
        _refuse_settings(arguments)
        try:
            pipeline = TCCMPipeline.from_pretrained(arguments.train)
        except (OSError, ValueError) as error:
            raise DataError(f"{arguments.train} is not a folder written by --save: {error}") from None
    else:
        config = TCCMConfig(contamination=arguments.contamination, trim=arguments.trim, seed=arguments.seed)
        train = open_table(arguments.train)
        columns = arguments.columns
        if columns is None and arguments.exclude:
            with _reading(arguments.train):
                names = _names(train)
                if not names:
                    raise DataError("the table has no rows; fitting needs at least 2.")
            absent = [name for name in arguments.exclude if name not in names]
            if absent:
                raise DataError(f"--exclude {' '.join(absent)}: {arguments.train} has the columns {', '.join(names)}.")
            columns = [name for name in names if name not in arguments.exclude]
        pipeline = TCCMPipeline(config, columns=columns, categories=arguments.categories, missing=arguments.missing)
        with _reading(arguments.train):
            pipeline.fit(train, progress=sys.stderr.isatty())
    if arguments.save:
        pipeline.save_pretrained(arguments.save)
    get_logger(__name__).info("fitted on %s", arguments.train)
    with _reading(arguments.test):
        rows, flagged = write_scored(pipeline, test, out, arguments.explain)
    console = make_console()
    console.print(f"{rows:,} rows scored, {flagged:,} above the threshold; wrote {out}", markup=False)
    return 0


def open_table(name: str) -> Any:
    """A table as a streaming data set.

    Args:
        name (`str`): A file of `READERS`, or a data set of the Hub, as `name` or `name:split`.

    Raises:
        DataError: no such file, or a file of another kind. HfExtError: the data set could not be opened.
    """
    from datasets import load_dataset

    path = Path(name)
    if path.suffix in READERS or path.exists() or os.sep in name and name.count("/") > 1:
        if path.suffix not in READERS:
            raise DataError(f"{name}: expected one of {', '.join(READERS)}, or the name of a data set on the Hub.")
        if not path.is_file():
            raise DataError(f"{name} does not exist.")
        if not path.stat().st_size:
            raise DataError(f"{name} is empty.")
        with _reading(name):
            settings = _csv_settings(path) if READERS[path.suffix] == "csv" else {}
            return load_dataset(READERS[path.suffix], data_files=str(path), split="train", streaming=True, **settings)
    repository, _, split = name.partition(":")
    try:
        return load_dataset(repository, split=split or "train", streaming=True)
    except Exception as error:
        raise DataError(f"{name} is neither a file nor a data set that could be opened: {error}.") from None


def _csv_settings(path: Path) -> dict[str, Any]:
    """Separator and types of a csv file, of all of its rows: its readers infer types anew for each of its parts."""
    import pandas as pd
    from datasets import Features, Value

    sep = "\t" if path.suffix == ".tsv" else ","
    kinds: dict[str, set[str]] = {}
    for part in pd.read_csv(path, sep=sep, chunksize=20_000):
        for name, values in part.items():
            known = values.dropna()
            kind = "text" if known.dtype.kind not in "biuf" else {"b": "truth"}.get(known.dtype.kind, "number")
            if len(known):
                kinds.setdefault(str(name), set()).add(kind)
            else:
                kinds.setdefault(str(name), set())
    types = {
        name: "bool" if found == {"truth"} else "string" if found - {"number"} else "float64"
        for name, found in kinds.items()
    }
    return (
        {"sep": sep, "features": Features({name: Value(kind) for name, kind in types.items()})}
        if types
        else {"sep": sep}
    )


def _refuse_settings(arguments: argparse.Namespace) -> None:
    """Settings of a fit have no effect on a detector that is fitted already."""
    usual: dict[str, Any] = {
        "columns": None,
        "exclude": [],
        "categories": [],
        "missing": "error",
        "contamination": 0.1,
        "trim": 0.0,
        "seed": 0,
    }
    given = [f"--{name}" for name, value in usual.items() if getattr(arguments, name) != value]
    if given:
        raise ConfigError(
            f"{', '.join(given)}: {arguments.train} is fitted already; leave out, or fit again from a table."
        )


def write_scored(pipeline: Any, data: Any, out: Path, explained: bool = False) -> tuple[int, int]:
    """Write a table's rows with their scores, batch by batch; the file appears whole or not at all.

    Returns:
        `tuple[int, int]`: rows written, and how many of them are flagged.
    """
    from hf_ext.pipelines.tables import read_batches

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error}.") from None
    os.close(descriptor)
    rows = flagged = 0
    try:
        write, close = _writer(temporary, out.suffix)
        try:
            for table in read_batches(data):
                scored = pipeline.add_scores(table, explained)
                rows += scored.num_rows
                flagged += sum(scored.column("is_anomaly").to_pylist())
                write(scored)
        finally:
            close()
        if not rows:
            raise DataError("the table to score has no rows.")
        os.chmod(temporary, 0o644)
        os.replace(temporary, out)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return rows, flagged


def _writer(path: str, suffix: str) -> tuple[Callable[[Any], None], Callable[[], None]]:
    """Functions that append a table to a file, with the types of the first table, and that close it."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    opened: list[Any] = []

    def write(table: Any) -> None:
        if not opened:
            make = pa.parquet.ParquetWriter if suffix == ".parquet" else pa.csv.CSVWriter
            opened.append((make(path, table.schema), table.schema))
        writer, schema = opened[0]
        try:
            writer.write_table(table.cast(schema))
        except (pa.ArrowInvalid, ValueError) as error:
            raise DataError(f"a column of the table to score changes its type: {error}.") from None

    return write, lambda: opened[0][0].close() if opened else None


class _reading:
    """Errors of the readers below `datasets`, in one line that names the table."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None or not issubclass(kind, Exception):
            return
        if issubclass(kind, HfExtError):
            raise kind(f"{self.name}: {error}") from None
        if kind.__module__.startswith(("datasets", "pyarrow", "pandas")) or issubclass(kind, UnicodeError):
            raise DataError(f"{self.name} could not be read: {error}.") from None


def _names(data: Any) -> list[str]:
    names = data.column_names
    return list(names) if names else list(next(_first(data), ()))


def _first(data: Any) -> Iterator[dict]:
    yield from iter(data)
