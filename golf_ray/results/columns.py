"""Columns of tables from plain values, in the nullable types of the schema.

Records say numbers that are not finite as strings, because JSON has none; here they are numbers
again, and what is not a number at all is missing.

Invariant: a value that does not fit its column is missing and counted, never changed into another.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np
import pandas as pd

from golf_ray.results.schema import Type

NON_FINITE: Final = {
    "nan": math.nan, "inf": math.inf, "-inf": -math.inf,
    "NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf,
}  # fmt: skip
_INT64: Final = range(-(2**63), 2**63)


class Misfit(ValueError):
    """A value is not of its column's type."""


def make_column(
    values: Sequence[Any], kind: Type, on_misfit: Callable[[int], None] | None = None
) -> pd.api.extensions.ExtensionArray:
    """A column of values, None for missing ones.

    Args:
        on_misfit: told the place of each value that is of another type; it is missing then.
    """
    if set(map(type, values)) <= PLAIN[kind]:
        # A number too large, or text that is none, is looked for one by one.
        with contextlib.suppress(OverflowError, UnicodeEncodeError):
            return _array(values, kind)
    plain: list[Any] = []
    convert = CONVERT[kind]
    for place, value in enumerate(values):
        if value is None:
            plain.append(None)
            continue
        try:
            plain.append(convert(value))
        except Misfit:
            plain.append(None)
            if on_misfit is not None:
                on_misfit(place)
    return _array(plain, kind)


def knob_column(values: Sequence[Any]) -> pd.api.extensions.ExtensionArray:
    """A column of a configuration field's values, in the narrowest type that has them all."""
    return make_column(values, knob_type(values))


def knob_type(values: Iterable[Any]) -> Type:
    """The narrowest type of a column that has all of some plain values."""
    kinds = {type(value) for value in values if value is not None}
    if not kinds:
        return "string"
    if kinds == {bool}:
        return "boolean"
    if kinds == {int}:
        return "Int64"
    return "Float64" if kinds <= {int, float} else "string"


def text_of(value: Any) -> str:
    """A value as the text of a cell: names in a list are parted by blanks."""
    if isinstance(value, str):
        # A lone half of a pair of UTF-16 is no text that a file can hold.
        return value if value.isascii() else value.encode("utf-8", "replace").decode()
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return text_of(" ".join(value))
    return json.dumps(value)


def _float(value: Any) -> float:
    if type(value) is float:
        return value
    if type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise Misfit from None
    if type(value) is str and value in NON_FINITE:
        return NON_FINITE[value]
    raise Misfit


def _int(value: Any) -> int:
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is int and value in _INT64:
        return int(value)
    raise Misfit


def _bool(value: Any) -> bool:
    if type(value) is bool:
        return value
    raise Misfit


CONVERT: Final[dict[Type, Callable[[Any], Any]]] = {
    "Float64": _float,
    "Int64": _int,
    "boolean": _bool,
    "string": text_of,
}


PLAIN: Final[dict[Type, set[type]]] = {
    "Float64": {float, type(None)},
    "Int64": {int, type(None)},
    "boolean": {bool, type(None)},
    "string": {str, type(None)},
}
"""Types of values that are taken as they are."""


def _array(plain: Sequence[Any], kind: Type) -> pd.api.extensions.ExtensionArray:
    if kind == "string":
        return pd.array(plain, dtype="string")
    # A value that is not a number stands for no value: NaN is missing.
    mask = np.array([v is None or v != v for v in plain], dtype=bool)
    filled = [0 if m else v for v, m in zip(plain, mask.tolist(), strict=True)]
    if kind == "Float64":
        return pd.arrays.FloatingArray(np.array(filled, np.float64), mask)
    if kind == "boolean":
        return pd.arrays.BooleanArray(np.array(filled, np.bool_), mask)
    return pd.arrays.IntegerArray(np.array(filled, np.int64), mask)
