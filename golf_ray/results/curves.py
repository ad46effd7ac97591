"""Training curves of many runs read at once: line files parsed in blocks, not line by line.

Ten thousand trainings leave ten thousand small files. They are read in threads, put together into
blocks, and parsed by Arrow; a file that Arrow refuses is read line by line, so that one bad line
costs a line.

Invariant: the rows of a file are those of reading each of its whole lines by itself, in order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from golf_ray.errors import StorageError
from golf_ray.results.schema import INTERVALS, types_of

if TYPE_CHECKING:
    import pandas as pd

    from trainers.storage import Storage

BLOCK_FILES: Final = 64
"""Files that are parsed together: about a megabyte, which caches hold."""
THREADS: Final = 2
REMOTE_THREADS: Final = 16
"""An object store answers slowly, and many at a time."""
READ_BYTES: Final = 1 << 16
IDENTITY: Final = ("source", "trial", "training")
"""Columns that are of the file and not in it."""

_TYPES: Final = {"Int64": pa.int64(), "Float64": pa.float64(), "boolean": pa.bool_()}
_SCHEMA: Final = pa.schema([(c.name, _TYPES[c.type]) for c in INTERVALS if c.name not in IDENTITY])
_OPTIONS: Final = pj.ParseOptions(explicit_schema=_SCHEMA, unexpected_field_behavior="ignore")

OnProblem = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A training's line file, and what its rows are called."""

    storage: Storage
    """A folder; that of all stages, for the trainings of a sweep."""
    name: str
    """The file's place below it."""
    source: str
    trial: int | None = None
    training: str | None = None


def read_curves(curves: Sequence[Curve], on_problem: OnProblem) -> pa.Table:
    """The rows of all files in the order given, identity first; none where a file is not there.

    Args:
        on_problem: told one line of each thing that could not be read.
    """
    blocks = [curves[i : i + BLOCK_FILES] for i in range(0, len(curves), BLOCK_FILES)]
    remote = any(curve.storage.local is None for curve in curves)
    tables, counts = [], []
    with ThreadPoolExecutor(REMOTE_THREADS if remote else THREADS) as pool:
        for table, rows, problems in pool.map(_read_block, blocks):
            tables.append(table)
            counts += rows
            for problem in problems:
                on_problem(problem)
    body = pa.concat_tables(tables) if tables else _SCHEMA.empty_table()
    return _with_identity(body, [(c.source, c.trial, c.training) for c in curves], counts)


def intervals_frame(table: pa.Table) -> pd.DataFrame:
    """The rows as the schema's table of intervals."""
    import pandas as pd

    kinds = {pa.int64(): pd.Int64Dtype(), pa.float64(): pd.Float64Dtype(),
             pa.bool_(): pd.BooleanDtype(), pa.large_string(): pd.StringDtype()}  # fmt: skip
    frame = table.select(list(types_of(INTERVALS))).to_pandas(
        types_mapper=kinds.get, split_blocks=True, self_destruct=True
    )
    return frame


def table_of(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Plain rows as a table of intervals, without identity."""
    from golf_ray.results.columns import make_column

    kinds = types_of(INTERVALS)
    columns = {
        field.name: pa.array(
            make_column([row.get(field.name) for row in rows], kinds[field.name]), field.type
        )
        for field in _SCHEMA
    }
    return pa.table(columns, schema=_SCHEMA)


def logged_curve(rows: Sequence[dict[str, Any]], source: str) -> pa.Table:
    """Rows that a log gave, with identity."""
    return _with_identity(table_of(rows), [(source, None, None)], [len(rows)])


def _with_identity(
    body: pa.Table, own: Sequence[tuple[str, int | None, str | None]], counts: Sequence[int]
) -> pa.Table:
    """Rows with what their file is called before them.

    Args:
        own: source, trial and training of each file.
        counts: rows of each file.
    """
    import numpy as np

    places = pa.array(np.repeat(np.arange(len(own)), np.asarray(counts, dtype=np.int64)))
    types = (pa.large_string(), pa.int64(), pa.large_string())
    for i, (name, type_) in enumerate(zip(IDENTITY, types, strict=True)):
        values = pa.array([one[i] for one in own], type_)
        body = body.add_column(i, name, pc.take(values, places))
    return body


def _read_block(block: Sequence[Curve]) -> tuple[pa.Table, list[int], list[str]]:
    """A table of some files' rows, how many each file has, and what is wrong."""
    problems: list[str] = []
    texts = [_whole_lines(curve, problems) for curve in block]
    counts = [text.count(b"\n") for text in texts]
    table = _parse(b"".join(texts))
    if table is not None and table.num_rows == sum(counts):
        return table, counts, problems
    # One of them is not as it should be; the others need not suffer.
    tables, counts = [], []
    for curve, text in zip(block, texts, strict=True):
        one = _parse(text)
        if one is None or one.num_rows != text.count(b"\n"):
            one = table_of(list(_line_by_line(curve, text, problems)))
        tables.append(one)
        counts.append(one.num_rows)
    return pa.concat_tables(tables), counts, problems


def _whole_lines(curve: Curve, problems: list[str]) -> bytes:
    try:
        data = _read(curve)
    except StorageError as error:
        problems.append(str(error))
        return b""
    if data and not data.endswith(b"\n"):
        whole, _, torn = data.rpartition(b"\n")
        data = whole + b"\n" if whole else b""
        if torn.strip():
            problems.append(f"{curve.storage.uri_of(curve.name)}: its last line is torn")
    return data


def _read(curve: Curve) -> bytes:
    if curve.storage.local is None:
        return curve.storage.read_bytes(curve.name) or b""
    try:
        # Three system calls: with ten thousand files every other one is felt.
        handle = os.open(curve.storage.place(curve.name), os.O_RDONLY)
    except FileNotFoundError:
        return b""
    except OSError:
        return curve.storage.read_bytes(curve.name) or b""
    try:
        parts = [os.read(handle, READ_BYTES)]
        while len(parts[-1]) == READ_BYTES:
            parts.append(os.read(handle, READ_BYTES))
        return b"".join(parts)
    finally:
        os.close(handle)


def _parse(text: bytes) -> pa.Table | None:
    if not text.strip():
        return _SCHEMA.empty_table()
    read = pj.ReadOptions(use_threads=False, block_size=len(text) + 1)
    try:
        return pj.read_json(pa.BufferReader(text), read_options=read, parse_options=_OPTIONS)
    except pa.ArrowException:
        return None


def _line_by_line(curve: Curve, text: bytes, problems: list[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            yield row
        else:
            where = curve.storage.uri_of(curve.name)
            problems.append(f"{where} line {number} is no record of an interval")
