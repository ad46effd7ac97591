"""What the columns of a table are: their types, their texts, and the digits that a reader is shown.

Columns of the schema are described there; knobs and other fields of the configuration, and the
means of groups, are described by their names.

Invariant: a frame in nullable types comes out of `normalised` as it went in.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from typing import Any, Final, Literal

import pandas as pd

from golf_ray.config import field_paths
from golf_ray.results.columns import text_of
from golf_ray.results.schema import DOCUMENTS, IDENTITY, INTERVALS, MEASURES, Column, Type

TableName = Literal["trials", "intervals", "documents"]

SCORES: Final = ("val_bpb", "int6_bpb", "ttt_bpb", "ttt_loss_nats", "final_ttt_bpb")
"""Columns of `trials` that are scores, which groups have means of."""

TEXTS: Final = {
    "ttt_bpb": ("tokens_scored", "bytes_scored"),
    "ttt_loss_nats": ("tokens_scored", "bytes_scored"),
    "int6_bpb": ("int6_tokens_scored", "int6_bytes_scored"),
    "val_bpb": ("val_tokens_scored", "val_bytes_scored"),
}
"""Columns that say what text a score is of: its tokens and its bytes."""

COUNTS: Final = (
    Column(name="n", type="Int64", text="trainings of the group that have a trial that is done"),
    Column(name="done", type="Int64", text="trials that are done"),
    Column(name="failed", type="Int64", text="trials that failed"),
    Column(name="over_limit", type="Int64", text="trials that are over a limit"),
    Column(name="pruned", type="Int64", text="trials whose training was stopped early"),
    Column(name="running", type="Int64", text="trials that somebody runs"),
    Column(name="interrupted", type="Int64", text="trials that have not ended and nobody runs"),
    Column(name="trials", type="string", text="all trials of the group, by number"),
)
"""Columns of a group beside those that it is a group by and its means."""

STATISTICS: Final = {
    "n": "trainings that have {}",
    "mean": "mean of {} over trainings",
    "sd": "sample standard deviation of {} over trainings (n - 1)",
    "low": "lower end of the 95% interval of the mean of {}",
    "high": "upper end of the 95% interval of the mean of {}",
}
"""What a group says of a score, by the end of the column's name, with what it says."""

_TYPES: Final[dict[Any, Type]] = {int: "Int64", float: "Float64", bool: "boolean", str: "string"}
_GUESSED: Final[dict[str, Type]] = {
    "integer": "Int64",
    "floating": "Float64",
    "mixed-integer-float": "Float64",
    "boolean": "boolean",
}
_SCHEMAS: Final[dict[TableName, tuple[Column, ...]]] = {
    "trials": (*IDENTITY, *MEASURES),
    "intervals": INTERVALS,
    "documents": DOCUMENTS,
}


def described(frame: pd.DataFrame, table: TableName = "trials") -> tuple[Column, ...]:
    """The columns of a table in nullable types, with their texts and digits.

    A column whose type is not the schema's keeps its own.
    """
    known = {**_known(), **{column.name: column for column in _SCHEMAS[table]}}
    found = []
    for name in map(str, frame.columns):
        own: Any = str(frame[name].dtype)
        column = known.get(name, Column(name=name, type=own, text=""))
        found.append(dataclasses.replace(column, type=own))
    return tuple(found)


def known_types() -> dict[str, Type]:
    """Types of all columns that have a name of their own, over all tables."""
    return {column.name: column.type for column in _known().values()}


def statistics_of(score: Column) -> list[Column]:
    """What a group says of a score."""
    return [
        Column(
            name=f"{score.name}_{end}",
            type="Int64" if end == "n" else "Float64",
            text=text.format(score.name),
            digits=None if end == "n" else score.digits,
        )
        for end, text in STATISTICS.items()
    ]


def normalised(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with every column in a nullable type; what is neither number nor flag is text."""
    columns = {str(name): _as_nullable(frame[name]) for name in frame.columns}
    return pd.DataFrame(columns, index=frame.index).reset_index(drop=True)


@functools.cache
def _known() -> dict[str, Column]:
    columns = [
        Column(name=path, type=_type_of(kind), text="field of the configuration")
        for path, kind in field_paths().items()
    ]
    columns += [*DOCUMENTS, *INTERVALS, *COUNTS, *IDENTITY, *MEASURES]
    for column in MEASURES:
        columns += statistics_of(column) if column.name in SCORES else []
    return {column.name: column for column in columns}


def _type_of(kind: Any) -> Type:
    """The column's type of a field's; lists and choices are text."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    return _TYPES.get(kind, "string")


def _as_nullable(column: pd.Series[Any]) -> pd.Series[Any]:
    dtype, ask = column.dtype, pd.api.types
    if str(dtype) in _TYPES.values():
        return column
    if ask.is_object_dtype(dtype):
        kind = _GUESSED.get(ask.infer_dtype(column, skipna=True), "string")
    elif ask.is_bool_dtype(dtype):
        kind = "boolean"
    elif ask.is_integer_dtype(dtype):
        kind = "Int64"
    else:
        kind = "Float64" if ask.is_float_dtype(dtype) else "string"
    if kind == "string":
        # A list is no missing value, nor a list of them.
        texts = [None if ask.is_scalar(v) and pd.isna(v) else text_of(v) for v in column.tolist()]
        return pd.Series(texts, index=column.index, dtype="string")
    return column.astype(kind)
