"""`TableFeatureExtractor`: rows of any table in, a matrix of numbers out, the same columns every time.

A column is a number or a category. Numbers stay as they are, in float64 (a time stamp in float32 is off by minutes);
whoever reads the matrix standardises it. A category becomes one column per level and one for every level not seen while
fitting. Such columns have a floor under their scale, `CATEGORY_SCALE`, the standard deviation of a level that one row in
twenty holds: dividing by the true deviation would let one rare level outweigh a whole row.

Missing numbers are an error that names the column, unless `missing="impute"`: then the median stands in for them, and a column
beside it says that it did. Missing categories are a level of their own.

The settings are JSON, in the file transformers keeps for a feature extractor, so that a folder or a repository
holds all that is needed to read a row.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import BatchFeature
from transformers.feature_extraction_utils import FeatureExtractionMixin

from hf_ext.errors import ConfigError, DataError, MissingPackageError


if TYPE_CHECKING:
    import pyarrow

# Rows read at a time where the caller does not say.
BATCH_ROWS = 8192
# Scale below which a column of a category is not divided: that of a level which a twentieth of the rows hold.
CATEGORY_SCALE = math.sqrt(0.05 * 0.95)

_MISSING = "<missing>"


class TableFeatureExtractor(FeatureExtractionMixin):
    """Turns rows of a table into a matrix, as its columns were when it was fitted.

    Args:
        columns (`list[dict]`, *optional*): What `fit` found, one entry per column of the table: `name`, `kind` (`"number"`
            or `"category"`), `fill` (median of a number) or `levels` (values of a category). Set by `fit`.
        missing (`str`, defaults to `"error"`): `"impute"` puts the median in the place of a missing number and adds
            a column that is 1 there.
        max_levels (`int`, defaults to 64): Levels kept per category, the most frequent ones; the others count as unseen.

    Raises:
        ConfigError: a setting that cannot work.
    """

    model_input_names = ["features"]

    def __init__(
        self, columns: list[dict] | None = None, missing: str = "error", max_levels: int = 64, **kwargs: Any
    ) -> None:
        if missing not in ("error", "impute"):
            raise ConfigError(f"missing={missing!r} must be 'error' or 'impute'.")
        if not isinstance(max_levels, int) or max_levels < 1:
            raise ConfigError(f"max_levels={max_levels!r} must be an integer of at least 1.")
        super().__init__(**kwargs)
        self.columns, self.missing, self.max_levels = columns, missing, max_levels

    def fit(
        self, batches: Iterable[pyarrow.Table], columns: Sequence[str] | None = None, categories: Sequence[str] = ()
    ) -> TableFeatureExtractor:
        """Learn the columns, their medians and their levels in one pass.

        Args:
            batches (`Iterable[pyarrow.Table]`): The rows, see `read_batches`. Medians are those of the first `2 ** 18` rows.
            columns (`Sequence[str]`, *optional*): Columns to use; all of them if omitted.
            categories (`Sequence[str]`): Columns of numbers to be read as categories.

        Raises:
            DataError: no rows, a column that is absent, of another type than number, text or truth value, or of text that is
                partly numbers.
        """
        counts: dict[str, Counter] = {}
        numbers: dict[str, list[np.ndarray]] = {}
        rows = 0
        for table in batches:
            for name in columns if columns is not None else table.column_names:
                column = _column(table, name)
                category = name in categories or _is_category(column, name)
                if name in (numbers if category else counts) and column.null_count < len(column):
                    raise DataError(
                        f"column {name!r} is read as {column.type} from row {rows} on, and as another type before; give it one "
                        "type, or leave it out with columns=[...]."
                    )
                if category:
                    counts.setdefault(name, Counter()).update(_levels(column))
                elif name not in counts:
                    values = numbers.setdefault(name, [])
                    if rows < 2**18:
                        values.append(_numbers(column, name, self.missing))
            rows += table.num_rows
        if not rows:
            raise DataError("the table has no rows; fitting needs at least 2.")
        if not counts and not numbers:
            raise DataError("no columns are left to fit on; expected at least 1.")
        absent = [name for name in (*(columns or ()), *categories) if name not in counts and name not in numbers]
        if absent:
            raise DataError(
                f"no such {'column' if len(absent) == 1 else 'columns'} in the table: {', '.join(absent)}."
            )
        for name, count in counts.items():
            _refuse_mixed(name, count)
        names = list(dict.fromkeys((*numbers, *counts)))
        order = {name: place for place, name in enumerate(columns if columns is not None else table.column_names)}
        self.columns = [
            {
                "name": name,
                "kind": "category",
                "levels": [level for level, _ in counts[name].most_common(self.max_levels)],
            }
            if name in counts
            else {"name": name, "kind": "number", "fill": _median(numbers[name])}
            for name in sorted(names, key=lambda name: order.get(name, len(order)))
        ]
        return self

    @property
    def feature_names(self) -> list[str]:
        """A name for each column of the matrix: `"age"`, `"city=Paris"`, `"city=<other>"`, `"age=<missing>"`."""
        return [name for column in self._fitted() for name in self._names(column)]

    @property
    def groups(self) -> list[int]:
        """For each column of the matrix the number of the table's column it comes from."""
        return [place for place, column in enumerate(self._fitted()) for _ in self._names(column)]

    @property
    def scale_floors(self) -> list[float]:
        """For each column of the matrix the least standard deviation it is divided by; 0 for numbers."""
        return [
            CATEGORY_SCALE if column["kind"] == "category" or number else 0.0
            for column in self._fitted()
            for number, _ in enumerate(self._names(column))
        ]

    def encode(self, table: pyarrow.Table) -> np.ndarray:
        """The matrix of some rows, `(rows, len(feature_names))`, float64.

        Raises:
            DataError: a column is absent or has another type than it had, or a number is missing or infinite.
        """
        parts, table = [], _flat(table)
        for column in self._fitted():
            name, found = column["name"], _column(table, column["name"])
            if column["kind"] == "category":
                # One comparison of codes per level: the levels are looked up once for a batch, not once for a row.
                places = {level: place for place, level in enumerate(column["levels"])}
                codes, levels = _codes(found)
                lookup = np.array([places.get(level, len(places)) for level in levels] or [0])
                part = np.zeros((table.num_rows, len(places) + 1))
                part[np.arange(table.num_rows), lookup[codes]] = 1.0
                parts.append(part)
                continue
            if _is_category(found, name):
                raise DataError(f"column {name!r} held numbers when the model was fitted; here it is {found.type}.")
            values = _numbers(found, name, self.missing)
            if self.missing == "impute":
                absent = np.isnan(values)
                values = np.stack([np.where(absent, column["fill"], values), absent], axis=1)
            parts.append(values.reshape(table.num_rows, -1))
        return np.concatenate(parts, axis=1)

    def __call__(self, rows: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """Rows as a model takes them.

        Args:
            rows: A row as a mapping of column names, a list of such rows, or anything `read_batches` takes.

        Returns:
            `BatchFeature`: `features`, `(rows, width)`, float64.
        """
        if isinstance(rows, Mapping) and not any(_is_sequence(value) for value in rows.values()):
            rows = [rows]
        features = np.concatenate([self.encode(table) for table in read_batches(rows, names=self._names_in())])
        return BatchFeature({"features": torch.from_numpy(features)}, tensor_type=None)

    def _names_in(self) -> list[str]:
        return [column["name"] for column in self._fitted()]

    def _fitted(self) -> list[dict]:
        if self.columns is None:
            raise DataError("this feature extractor does not know its columns yet; call fit first.")
        return self.columns

    def _names(self, column: dict) -> list[str]:
        name = column["name"]
        if column["kind"] == "category":
            return [f"{name}={level}" for level in (*column["levels"], "<other>")]
        return [name, f"{name}={_MISSING}"] if self.missing == "impute" else [name]


def read_batches(
    data: Any, names: Sequence[str] | None = None, batch_size: int = BATCH_ROWS
) -> Iterator[pyarrow.Table]:
    """The rows of a table, some at a time, as Arrow tables.

    Args:
        data: A `datasets.Dataset` or `IterableDataset`, a `pandas.DataFrame`, a `pyarrow.Table`, a mapping of columns,
            a list of rows (mappings), or a matrix `(rows, columns)` as array, tensor or nested list.
        names (`Sequence[str]`, *optional*): Names of a matrix's columns; `x0`, `x1`, ... if omitted.
        batch_size (`int`): Rows of a batch, in those that can be read in parts.

    Raises:
        DataError: `data` is none of these, or a matrix has another width than `names`.
    """
    pa = _arrow()
    if hasattr(data, "with_format") and hasattr(data, "map"):
        if not hasattr(data, "iter"):
            raise DataError(f"a {type(data).__name__} holds several tables; pass one of them, such as data['train'].")
        # An IterableDataset may know no columns yet; its Arrow batches do.
        try:
            for batch in data.with_format("arrow").iter(batch_size=batch_size):
                yield _flat(pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch)
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
            raise DataError(f"a column mixes types: {error}.") from None
        return
    if isinstance(data, pa.Table):
        table = data
    elif hasattr(data, "columns") and hasattr(data, "iloc"):
        try:
            table = pa.Table.from_pandas(data, preserve_index=False)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DataError(f"a column mixes types: {error}.") from None
    elif isinstance(data, Mapping) or (isinstance(data, list) and data and isinstance(data[0], Mapping)):
        try:
            table = pa.table(dict(data)) if isinstance(data, Mapping) else pa.Table.from_pylist(data)
        except (pa.ArrowInvalid, TypeError) as error:
            raise DataError(f"expected columns of one length, each of one type: {error}.") from None
    else:
        table = _matrix(data, names)
    table = _flat(table)
    for start in range(0, table.num_rows, batch_size):
        yield table.slice(start, batch_size)


def _flat(table: pyarrow.Table) -> pyarrow.Table:
    """The table with every column of vectors as one column per number: `"embedding[0]"`, `"embedding[1]"`, ..."""
    if not any(map(_is_list, table.schema.types)):
        return table
    columns: dict[str, Any] = {}
    for name, column in zip(table.column_names, table.columns):
        if not _is_list(column.type):
            columns[name] = column
            continue
        lengths = set(_arrow().compute.list_value_length(column).unique().to_pylist())
        values = column.combine_chunks().flatten()
        width = len(values) // max(table.num_rows, 1)
        if len(lengths) > 1 or column.null_count or _is_list(values.type):
            raise DataError(
                f"column {name!r} holds lists of different lengths; expected vectors of one length in all rows."
            )
        matrix = values.to_numpy(zero_copy_only=False).reshape(table.num_rows, width)
        columns.update({f"{name}[{place}]": matrix[:, place] for place in range(width)})
    return _arrow().table(columns)


def _is_list(kind: Any) -> bool:
    types = _arrow().types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _matrix(data: Any, names: Sequence[str] | None) -> pyarrow.Table:
    if isinstance(data, torch.Tensor):
        data = data.detach().cpu().float().numpy() if data.dtype == torch.bfloat16 else data.detach().cpu().numpy()
    try:
        matrix = np.asarray(data)
    except ValueError:
        matrix = np.empty(0)
    if matrix.ndim != 2 or matrix.dtype.kind not in "biuf":
        raise DataError(
            f"expected a table: a Dataset, a DataFrame, columns by name, or a matrix (rows, columns) of numbers; got "
            f"{type(data).__name__}" + (f" of shape {matrix.shape}." if matrix.size else ".")
        )
    names = [f"x{place}" for place in range(matrix.shape[1])] if names is None else list(names)
    if len(names) != matrix.shape[1]:
        raise DataError(f"the matrix has {matrix.shape[1]} columns; expected {len(names)}: {_some(names)}.")
    return _arrow().table({name: matrix[:, place] for place, name in enumerate(names)})


def _column(table: pyarrow.Table, name: str) -> pyarrow.ChunkedArray:
    try:
        return table.column(name)
    except KeyError:
        raise DataError(f"the table has no column {name!r}; it has {_some(table.column_names)}.") from None


def _is_category(column: pyarrow.ChunkedArray, name: str) -> bool:
    types, kind = _arrow().types, column.type
    if types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind) or types.is_null(kind):
        return False
    if types.is_dictionary(kind) or types.is_boolean(kind) or types.is_string(kind) or types.is_large_string(kind):
        return True
    raise DataError(
        f"column {name!r} has type {kind}; expected numbers, text or truth values. Leave it out with columns=[...], or turn "
        "it into columns of numbers."
    )


def _codes(column: pyarrow.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """Of a category the number of each row's level, and the levels, `"<missing>"` last."""
    types = _arrow().types
    if not types.is_dictionary(column.type):
        column = column.dictionary_encode()
    column = column.unify_dictionaries().combine_chunks()
    levels = [_name(level) for level in column.dictionary.to_pylist()]
    codes = column.indices.to_numpy(zero_copy_only=False)
    return np.where(np.isnan(codes), len(levels), codes).astype(np.int64), [*levels, _MISSING]


def _name(level: Any) -> str:
    """A level as text: 1 and 1.0 are the same, because a missing value turns a column of integers into one of floats."""
    if level != level:
        return _MISSING
    return str(int(level)) if isinstance(level, float) and level.is_integer() else str(level)


def _levels(column: pyarrow.ChunkedArray) -> dict[str, int]:
    codes, levels = _codes(column)
    found: Counter = Counter()
    for level, count in zip(levels, np.bincount(codes, minlength=len(levels))):
        if count:
            found[level] += int(count)
    return found


def _numbers(column: pyarrow.ChunkedArray, name: str, missing: str) -> np.ndarray:
    types = _arrow().types
    if types.is_decimal(column.type) or types.is_null(column.type):
        column = column.cast("float64")
    values = column.to_numpy().astype(np.float64)
    if np.isinf(values).any():
        raise DataError(f"column {name!r} holds infinity, in row {int(np.isinf(values).argmax())}; expected numbers.")
    if missing == "error" and np.isnan(values).any():
        raise DataError(
            f"column {name!r} has missing values (NaN or empty), the first in row {int(np.isnan(values).argmax())}; fill "
            'them, or use missing="impute".'
        )
    return values


def _median(parts: list[np.ndarray]) -> float:
    values = np.concatenate(parts)
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else 0.0


def _refuse_mixed(name: str, count: Counter) -> None:
    """Text that is mostly numbers is a column of numbers that was not read well, not a category."""
    numeric = sum(times for level, times in count.items() if _is_number(level))
    others = [level for level in count if not _is_number(level) and level != _MISSING]
    if others and numeric > sum(count.values()) / 2:
        raise DataError(
            f"column {name!r} mixes numbers and text, for example {others[0]!r}; clean it, leave it out with columns=[...], "
            "or, if it is a category, give its values a letter."
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_sequence(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray | torch.Tensor)


def _some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.types
    except ImportError:
        raise MissingPackageError('tables are read with pyarrow: pip install "hf-ext[detect]".') from None
    return pyarrow
