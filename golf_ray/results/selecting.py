"""Which rows and columns of a table are wanted, and in what order, out of what a user wrote.

Conditions are a column, an operator and a value; nothing that a user writes is run as code:

    ttt_bpb < 1.09          == != < <= > >=; text and flags know == and != alone
    reason ~ "not finite"   the text has this in it, whatever the case; !~ for what has not
    status in done,failed   one of these; also: not in
    artifact is missing     also: is present

Invariant: a missing value meets no condition but `is missing`, and a name that is no column is an
error that names the nearest.
"""

from __future__ import annotations

import fnmatch
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd

from golf_ray.errors import UsageError, nearest
from golf_ray.results.cells import values_and_missing

ALLOWED: Final = (
    "write COLUMN, one of == != < <= > >= ~ !~, and a value; or COLUMN in A,B; or COLUMN is missing"
)
_COMPARE: Final[Mapping[str, Callable[[Any, Any], Any]]] = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le,
    ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_EXPRESSION = re.compile(
    r"\s*(?P<column>[^\s=!<>~]+)\s*"
    r"(?:\b(?P<missing>is\s+(?:not\s+)?(?:missing|present))\s*"
    r"|\b(?P<among>(?:not\s+)?in)\b(?P<values>.+)"
    r"|(?P<operator>[=!<>~]+)(?P<value>.+))",
    re.DOTALL,
)
_ITEM = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)'|([^,"']*?))\s*(?:,|$)""")
_FLAGS: Final = {"true": True, "yes": True, "false": False, "no": False}
_PATTERN_CHARACTERS: Final = "*?["


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """What a row must meet."""

    text: str
    """As it was written."""
    column: str
    operator: str
    """One of == != < <= > >= ~ !~, in, not in, missing, present."""
    values: tuple[str, ...] = ()
    """As they were written, without quotes; one, but for `in`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SortKey:
    """A column to sort by."""

    column: str
    descending: bool = False


# What a user wrote --------------------------------------------------------------------------------


def parse_condition(text: str) -> Condition:
    """A condition as it is written for `--where`.

    Raises:
        UsageError: it is none.
    """
    found = _EXPRESSION.fullmatch(text)
    if found is None:
        raise _no_condition(text)
    column = found["column"]
    if found["missing"]:
        words = found["missing"].split()
        lacks = (words[-1] == "missing") != ("not" in words)
        return Condition(text=text, column=column, operator="missing" if lacks else "present")
    if found["among"]:
        values = _items(found["values"], text)
        return Condition(
            text=text, column=column, operator=" ".join(found["among"].split()), values=values
        )
    name, values = found["operator"], _items(found["value"], text)
    if name not in (*_COMPARE, "~", "!~") or len(values) != 1:
        raise _no_condition(text)
    return Condition(text=text, column=column, operator=name, values=values)


def parse_sort(text: str) -> tuple[SortKey, ...]:
    """Columns to sort by as they are written for `--sort`: `ttt_bpb,-total_bytes`.

    Raises:
        UsageError: a name is empty.
    """
    return tuple(
        SortKey(column=name.removeprefix("-"), descending=name.startswith("-"))
        for name in parse_names(text, "--sort")
    )


def parse_names(text: str, option: str) -> tuple[str, ...]:
    """Names parted by commas, each once.

    Raises:
        UsageError: one is empty.
    """
    names = [name.strip() for name in text.split(",")]
    if not all(name.removeprefix("-") for name in names):
        raise UsageError(f"{option} '{text}' has an empty name", "write names parted by commas")
    return tuple(dict.fromkeys(names))


def _items(text: str, whole: str) -> tuple[str, ...]:
    items, at = [], 0
    while at < len(text):
        found = _ITEM.match(text, at)
        if found is None:
            raise _no_condition(whole)
        quoted = found[1] if found[1] is not None else found[2]
        if quoted is None and not found[3]:
            raise _no_condition(whole)
        items.append(found[3] if quoted is None else quoted)
        at = found.end()
    if text.rstrip().endswith(",") or not items:
        raise _no_condition(whole)
    return tuple(items)


def _no_condition(text: str) -> UsageError:
    return UsageError(f"--where '{text}' is no condition", ALLOWED)


# Columns ------------------------------------------------------------------------------------------


def is_pattern(name: str) -> bool:
    """Whether a name stands for all columns that are like it."""
    return any(character in name for character in _PATTERN_CHARACTERS)


def fields_named(names: Iterable[str], columns: Iterable[str], fields: Iterable[str]) -> list[str]:
    """Fields of the configuration that are asked for and are no columns yet.

    A pattern with a point in it, as `train.*`, asks for fields too; one without is of columns.

    Args:
        names: names and patterns.
        columns: of the table.
        fields: of the configuration, as `train.seed`.
    """
    there, found = set(columns), []
    fields = list(fields)
    for name in names:
        if not is_pattern(name):
            found += [name] if name in fields else []
        elif "." in name:
            found += fnmatch.filter(fields, name)
    return [name for name in dict.fromkeys(found) if name not in there]


def chosen(columns: Sequence[str], names: Iterable[str]) -> list[str]:
    """The columns that names and patterns mean, in the order of these; each once.

    Raises:
        UsageError: one is no column, or a pattern is like none.
    """
    found: list[str] = []
    for name in names:
        if not is_pattern(name):
            require_column(name, columns)
        alike = [c for c in columns if fnmatch.fnmatchcase(c, name)] if is_pattern(name) else [name]
        if not alike:
            raise UsageError(f"there is no column like '{name}'", nearest(name, columns))
        found += alike
    return list(dict.fromkeys(found))


def require_column(name: str, columns: Iterable[str]) -> None:
    """An error that names the nearest column, unless `name` is one.

    Raises:
        UsageError: it is none.
    """
    columns = list(columns)
    if name in columns:
        return
    # Of a dotted name, whoever leaves its section out means that.
    same = [column for column in columns if column.rpartition(".")[2] == name]
    remedy = f"did you mean '{same[0]}'?" if same else nearest(name, columns)
    raise UsageError(f"there is no column '{name}'", remedy)


def without_empty(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame without columns that are missing in every row; as it is where there is no row."""
    if not len(frame):
        return frame
    return frame.loc[:, frame.notna().any(axis=0)]


# Rows ---------------------------------------------------------------------------------------------


def meeting(frame: pd.DataFrame, conditions: Iterable[Condition]) -> np.ndarray[Any, Any]:
    """Whether each row meets all of some conditions.

    Args:
        frame: in nullable types.

    Raises:
        UsageError: a column is none, or is of a type that the condition is not for.
    """
    meets = np.ones(len(frame), dtype=bool)
    for condition in conditions:
        require_column(condition.column, frame.columns)
        meets &= _meets(frame[condition.column], condition)
    return meets


def _meets(column: pd.Series[Any], condition: Condition) -> np.ndarray[Any, Any]:
    values, missing = values_and_missing(column)
    name, kind = condition.operator, str(column.dtype)
    if name in ("missing", "present"):
        return missing if name == "missing" else ~missing
    if name in ("~", "!~"):
        if kind != "string":
            raise _unfit(condition, kind)
        part = condition.values[0].casefold()
        has = np.array([part in text.casefold() for text in values], dtype=bool)
        return ~missing & (has if name == "~" else ~has)
    wanted = [_converted(text, kind, condition) for text in condition.values]
    if name in ("in", "not in"):
        one = np.zeros(len(values), dtype=bool)
        for value in wanted:
            one |= np.asarray(values == value, dtype=bool)
        return ~missing & (one if name == "in" else ~one)
    if kind in ("string", "boolean") and name not in ("==", "!="):
        raise _unfit(condition, kind)
    return ~missing & np.asarray(_COMPARE[name](values, wanted[0]), dtype=bool)


def _converted(text: str, kind: str, condition: Condition) -> Any:
    """A written value in its column's type."""
    if kind == "string":
        return text
    if kind == "boolean":
        if text.lower() not in _FLAGS:
            raise _unfit(condition, kind)
        return _FLAGS[text.lower()]
    for number in (int, float):
        try:
            value = number(text)
        except ValueError:
            continue
        if value == value:
            return value
    raise _unfit(condition, kind)


def _unfit(condition: Condition, kind: str) -> UsageError:
    said = {
        "string": ("a text", "use == != ~ !~ in, or is missing"),
        "boolean": ("true or false", "use == or != with true or false, or is missing"),
    }
    what, remedy = said.get(kind, ("a number", "use == != < <= > >= or in with numbers"))
    return UsageError(f"--where '{condition.text}': {condition.column} is {what}", remedy)


def sorted_by(frame: pd.DataFrame, keys: Sequence[SortKey]) -> pd.DataFrame:
    """The rows in order; those that are alike stay as they were, and missing values come last.

    Raises:
        UsageError: a column is none.
    """
    ranks = []
    for key in keys:
        require_column(key.column, frame.columns)
        values, missing = values_and_missing(frame[key.column])
        if values.dtype == np.float64:
            # What is no number has no place among them.
            missing = missing | np.isnan(values)
        kept = values[~missing]
        rank = np.full(len(frame), len(kept))
        order = np.unique(kept, return_inverse=True)[1]
        rank[~missing] = -order if key.descending else order
        ranks.append(rank)
    if not ranks:
        return frame
    # Stable, and the last key counts most.
    return frame.iloc[np.lexsort(ranks[::-1])].reset_index(drop=True)
