"""A table out of results: what is asked for as a value, understood before anything is read.

Order of work: conditions, groups, order, columns. Names in the order and among the columns are
those of groups where there are groups. Any field of the configuration may be named, and becomes a
column where it is none yet.

Invariant: a query that exists has been understood; whether its columns are there, the results say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress

import pandas as pd

from golf_ray.config import field_paths
from golf_ray.errors import UsageError
from golf_ray.results.describing import TableName, normalised
from golf_ray.results.grouping import (
    grouped,
    mixed_texts,
    seed_keys,
    settings_of,
    without_repeats,
)
from golf_ray.results.reading import Results, with_config_columns
from golf_ray.results.selecting import (
    Condition,
    SortKey,
    chosen,
    fields_named,
    meeting,
    parse_condition,
    parse_names,
    parse_sort,
    require_column,
    sorted_by,
    without_empty,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """Which table, rows and columns are wanted.

    Raises:
        UsageError: groups are asked for in two ways, or of a table that has none.
    """

    table: TableName = "trials"
    conditions: tuple[Condition, ...] = ()
    """All of them hold of a row."""
    group_by: tuple[str, ...] | None = None
    """Columns that the trials of a group have in common."""
    seeds: bool = False
    """Groups of trials that differ in their seed alone."""
    sort: tuple[SortKey, ...] = ()
    columns: tuple[str, ...] | None = None
    """Names and patterns; None for all."""

    def __post_init__(self) -> None:
        if self.seeds and self.group_by is not None:
            raise UsageError("--seeds and --group-by are two ways to group", "give one of them")
        if self.grouping and self.table != "trials":
            raise UsageError(f"--table {self.table} has no groups", "leave --table out")

    @property
    def grouping(self) -> bool:
        """Whether rows are groups."""
        return self.seeds or self.group_by is not None


def parse_query(
    *,
    table: TableName = "trials",
    columns: str | None = None,
    where: Sequence[str] = (),
    sort: str | None = None,
    group_by: str | None = None,
    seeds: bool = False,
) -> Query:
    """A query as its parts are written on a command line.

    Raises:
        UsageError: a part is not understood, or they do not go together.
    """
    return Query(
        table=table,
        columns=None if columns is None else parse_names(columns, "--columns"),
        conditions=tuple(parse_condition(text) for text in where),
        sort=() if sort is None else parse_sort(sort),
        group_by=None if group_by is None else parse_names(group_by, "--group-by"),
        seeds=seeds,
    )


def answer(
    query: Query, results: Results, on_note: Callable[[str], None] | None = None
) -> pd.DataFrame:
    """The table that a query asks for, in nullable types.

    Args:
        on_note: told in a line why a figure that could be expected is missing.

    Raises:
        UsageError: a column is none, or is of a type that a condition is not for.
    """
    whole = _whole(query, results)
    frame = normalised(whole)
    kept = meeting(frame, query.conditions)
    frame = frame.loc[kept].reset_index(drop=True)
    if query.grouping:
        trials = frame
        if query.group_by is not None:
            for name in query.group_by:
                require_column(name, frame.columns)
            frame = grouped(trials, query.group_by)
        else:
            settings = settings_of(trials, list(compress(results.records, kept)))
            frame = grouped(trials, seed_keys(results.knobs), settings)
        if on_note is not None:
            for note in mixed_texts(trials, frame):
                on_note(note)
    frame = sorted_by(frame, query.sort)
    if query.columns is not None:
        return frame[chosen(list(frame.columns), query.columns)]
    if query.grouping or query.table != "trials":
        return frame
    # A field that only a condition names is not shown.
    return frame[[name for name in frame.columns if name in results.trials.columns]]


def without_silent(frame: pd.DataFrame, query: Query) -> pd.DataFrame:
    """The table as people want it: without columns that say nothing, unless they were named."""
    if query.columns is not None:
        return frame
    return without_empty(without_repeats(frame) if query.grouping else frame)


def _whole(query: Query, results: Results) -> pd.DataFrame:
    """The table with all columns that are named anywhere."""
    if query.table == "intervals":
        return results.intervals
    if query.table == "documents":
        return results.documents
    names = [*(c.column for c in query.conditions), *(query.group_by or ())]
    if not query.grouping:
        names += [*(key.column for key in query.sort), *(query.columns or ())]
    fields = fields_named(names, results.trials.columns, field_paths())
    return with_config_columns(results, fields)
