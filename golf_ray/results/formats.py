"""Tables as files: CSV, Parquet and JSON for programs, Markdown, LaTeX and HTML for people.

Files for programs keep types and all digits, and their readers give the frame back:

- CSV: texts are in quotes and nothing else is, so a missing value is an empty field and an empty
  text is `""`; numbers that are not finite are `nan`, `inf` and `-inf`; flags are `true`, `false`.
- Parquet: columns have their types, and as metadata of their fields what the schema says of them.
- JSON: `{"schema", "table", "columns": [{"name", "type", "text"}], "rows": [{name: value}]}`;
  missing is null, numbers that are not finite are "NaN", "Infinity" and "-Infinity".

What files for people show is in `golf_ray.results.cells`.

Invariant: for every frame in nullable types, `read_X(to_X(frame))` is that frame.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from golf_ray.errors import StorageError, UsageError
from golf_ray.results.cells import shown, values_and_missing
from golf_ray.results.columns import CONVERT
from golf_ray.results.describing import TableName, known_types
from golf_ray.results.markup import to_html, to_latex, to_markdown
from golf_ray.results.schema import SCHEMA, Column, Type

ENDINGS: Final = {
    ".csv": "csv", ".parquet": "parquet", ".json": "json", ".md": "md", ".tex": "latex",
    ".html": "html", ".htm": "html",
}  # fmt: skip
"""Formats by the ending of a file's name."""
FORMATS: Final = tuple(dict.fromkeys(ENDINGS.values()))
FOR_PEOPLE: Final = ("md", "latex", "html")
_NAMES: Final = {math.inf: "Infinity", -math.inf: "-Infinity"}
_GUESSES: Final[tuple[Type, ...]] = ("Int64", "Float64", "boolean")


def format_of(name: str) -> str:
    """The format of a file by its name's ending.

    Raises:
        UsageError: the ending is of none.
    """
    for ending, found in ENDINGS.items():
        if name.lower().endswith(ending):
            return found
    raise UsageError(
        f"the ending of '{name}' is of no format",
        f"use {', '.join(ENDINGS)}, or add --format {'|'.join(FORMATS)}",
    )


def to_bytes(
    frame: pd.DataFrame,
    columns: Sequence[Column],
    output_format: str,
    *,
    table: TableName = "trials",
    title: str = "",
) -> bytes:
    """A table as the content of a file.

    Args:
        frame: in nullable types, of one column or more.
        columns: what its columns are, in their order (`golf_ray.results.describing`).
        title: of a document for people.
    """
    if output_format == "csv":
        return to_csv(frame)
    if output_format == "parquet":
        return to_parquet(frame, columns, table)
    if output_format == "json":
        return to_json(frame, columns, table)
    cells = shown(frame, columns)
    if output_format == "md":
        return to_markdown(cells, columns).encode()
    if output_format == "latex":
        return to_latex(cells, columns).encode()
    assert output_format == "html", output_format
    return to_html(cells, columns, title or table).encode()


# CSV ----------------------------------------------------------------------------------------------


def to_csv(frame: pd.DataFrame) -> bytes:
    """A table as CSV in UTF-8, a line of names first."""
    buffer = io.BytesIO()
    # What pyarrow calls needed are the quotes of every text that is not missing.
    pa.csv.write_csv(_arrow(frame), buffer, pa.csv.WriteOptions(quoting_style="needed"))
    return buffer.getvalue()


def read_csv(data: bytes, types: Mapping[str, Type] | None = None) -> pd.DataFrame:
    """The frame of a CSV.

    Args:
        types: of columns; those of the schema and of the configuration are known, and others get
            the first of whole number, number, flag and text that all of their values are.

    Raises:
        StorageError: it is no CSV, or a value is not of its column's type.
    """
    known = {**known_types(), **(types or {})}
    parse = pa.csv.ParseOptions(newlines_in_values=True, ignore_empty_lines=False)
    # One block: a value may be of any length and have line ends.
    read = pa.csv.ReadOptions(block_size=max(len(data), 1))
    convert = pa.csv.ConvertOptions(
        column_types={n: _ARROW[known.get(n, "string")] for n in _csv_names(data)},
        null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False,
        true_values=["true"], false_values=["false"],
    )  # fmt: skip
    try:
        table = pa.csv.read_csv(
            io.BytesIO(data), read_options=read, parse_options=parse, convert_options=convert
        )
    except pa.ArrowInvalid as error:
        raise StorageError(f"the CSV cannot be read ({_line(error)})", "restore it") from None
    columns = {}
    for name in table.column_names:
        column, kind = table.column(name), known.get(name)
        columns[name] = _guessed(column) if kind is None else _pandas(column, kind)
    return pd.DataFrame(columns)


def _csv_names(data: bytes) -> list[str]:
    text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors="replace", newline="")
    return next(csv.reader(text), [])


def _guessed(column: Any) -> Any:
    if column.null_count < len(column):
        for kind in _GUESSES:
            try:
                return _pandas(column.cast(_ARROW[kind]), kind)
            except pa.ArrowInvalid:
                continue
    return _pandas(column, "string")


# Parquet ------------------------------------------------------------------------------------------


def to_parquet(frame: pd.DataFrame, columns: Sequence[Column], table: TableName) -> bytes:
    """A table as Parquet, with what the schema says of each column as metadata of its field."""
    data = _arrow(frame)
    fields = [
        field.with_metadata({"text": column.text, "type": column.type})
        for field, column in zip(data.schema, columns, strict=True)
    ]
    whole = {"golf_ray.schema": str(SCHEMA), "golf_ray.table": table}
    schema = pa.schema(fields, metadata={**(data.schema.metadata or {}), **whole})
    buffer = io.BytesIO()
    pa.parquet.write_table(data.cast(schema), buffer)
    return buffer.getvalue()


def read_parquet(data: bytes) -> pd.DataFrame:
    """The frame of a Parquet file that `to_parquet` made.

    Other readers have the types too, but may take a number that is not one for a missing value.

    Raises:
        StorageError: it is none.
    """
    try:
        table = pa.parquet.read_table(io.BytesIO(data))
        kinds: list[Any] = [field.metadata[b"type"].decode() for field in table.schema]
        columns = zip(table.column_names, table.columns, kinds, strict=True)
        return pd.DataFrame({name: _pandas(column, kind) for name, column, kind in columns})
    except (pa.ArrowException, OSError, KeyError, TypeError) as error:
        raise StorageError(f"the Parquet cannot be read ({_line(error)})", "restore it") from None


# JSON ---------------------------------------------------------------------------------------------


def to_json(frame: pd.DataFrame, columns: Sequence[Column], table: TableName) -> bytes:
    """A table as JSON, a row a line."""
    lists = [_json_values(frame[column.name]) for column in columns]
    names = [column.name for column in columns]
    head = {
        "schema": SCHEMA,
        "table": table,
        "columns": [{"name": c.name, "type": c.type, "text": c.text} for c in columns],
    }
    dump = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    rows = ",\n".join(dump(dict(zip(names, row, strict=True))) for row in zip(*lists, strict=True))
    return f'{dump(head)[:-1]}, "rows": [\n{rows}\n]}}\n'.encode()


def read_json(data: bytes) -> pd.DataFrame:
    """The frame of a JSON file that `to_json` made.

    Raises:
        StorageError: it is none.
    """
    try:
        whole = json.loads(data)
        columns = {}
        for column in whole["columns"]:
            name, kind = column["name"], column["type"]
            columns[name] = _from_json([row[name] for row in whole["rows"]], kind)
        return pd.DataFrame(columns)
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"the JSON cannot be read ({_line(error)})", "restore it") from None


def _from_json(values: Sequence[Any], kind: Type) -> Any:
    convert = CONVERT[kind]
    if kind == "string":
        return pd.array([None if v is None else convert(v) for v in values], dtype="string")
    missing = np.array([v is None for v in values], dtype=bool)
    return _nullable([0 if v is None else convert(v) for v in values], missing, kind)


def _json_values(column: pd.Series[Any]) -> list[Any]:
    values, missing = values_and_missing(column)
    plain = values.tolist()
    if str(column.dtype) == "Float64" and not np.isfinite(values).all():
        plain = [v if math.isfinite(v) else _NAMES.get(v, "NaN") for v in plain]
    if missing.any():
        plain = [None if gone else v for v, gone in zip(plain, missing.tolist(), strict=True)]
    return plain


# Arrays -------------------------------------------------------------------------------------------


_ARROW: Final[dict[Type, pa.DataType]] = {
    "Int64": pa.int64(),
    "Float64": pa.float64(),
    "boolean": pa.bool_(),
    "string": pa.string(),
}
_ARRAYS: Final[dict[Type, tuple[Any, Any]]] = {
    "Int64": (np.int64, pd.arrays.IntegerArray),
    "Float64": (np.float64, pd.arrays.FloatingArray),
    "boolean": (np.bool_, pd.arrays.BooleanArray),
}


def _arrow(frame: pd.DataFrame) -> Any:
    """The frame as a table of Arrow's, in which a number that is none is not missing."""
    return pa.Table.from_pandas(frame, preserve_index=False)


def _pandas(column: Any, kind: Type) -> Any:
    """A column of Arrow's in its nullable type."""
    if kind == "string":
        return pd.array(column, dtype="string")
    missing = column.is_null().to_numpy()
    filled = column.fill_null(False if kind == "boolean" else 0)
    return _nullable(filled.to_numpy(), missing, kind)


def _nullable(values: Any, missing: np.ndarray[Any, Any], kind: Type) -> Any:
    dtype, array = _ARRAYS[kind]
    return array(np.array(values, dtype=dtype), np.array(missing))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
