"""The text of a table's cells for people: numbers with the digits that they deserve.

- A column of the schema has its digits there: bits per byte 5, seconds 1.
- A score beside its own standard error or standard deviation, as `ttt_bpb` with
  `ttt_standard_error_bpb` and `ttt_bpb_mean` with `ttt_bpb_sd`, is shown no finer than the second
  digit of that.
- Knobs are as short as they are exact; bytes and tokens have their thousands apart.
- What would be rounded to 0 has two digits of its own, and a missing value is an empty cell.
- A cell is one line: characters that are not printed, as those that control a terminal or the
  direction of text, are shown by their escapes, as \\n or \\u202e.

Files for programs have none of this.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from golf_ray.results.schema import Column

_COUNT = re.compile(r"(^|_)(bytes|tokens|scored)($|_)")
_TOO_LARGE = 1e15
"""From here on a number with digits after its point would show what it does not have."""


def shown(frame: pd.DataFrame, columns: Sequence[Column]) -> list[list[str]]:
    """Cells by column.

    Args:
        frame: in nullable types.
        columns: what its columns are, in their order.
    """
    return [_shown_column(frame, column) for column in columns]


def is_number(column: Column) -> bool:
    """Whether its cells are set to the right."""
    return column.type in ("Int64", "Float64")


def values_and_missing(column: pd.Series[Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A column as plain values, and where they are missing.

    A number that is missing is not one that is no number, though both compare alike.
    """
    missing = column.isna().to_numpy(dtype=bool)
    kind = str(column.dtype)
    if kind == "string":
        return column.to_numpy(dtype=object, na_value=""), missing
    plain: dict[str, tuple[Any, Any]] = {
        "Int64": (np.int64, 0),
        "Float64": (np.float64, 0.0),
        "boolean": (bool, False),
    }
    dtype, stand_in = plain[kind]
    return column.to_numpy(dtype=dtype, na_value=stand_in), missing


def one_line(text: str) -> str:
    """A text as a cell shows it."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def number(value: float, digits: int | None) -> str:
    """A number for people."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if digits is None or abs(value) >= _TOO_LARGE:
        return repr(value)
    if value and abs(value) < 0.5 * 10.0**-digits:
        return f"{value:.1e}"
    return f"{value:z.{digits}f}"


def digits_beside(error: float, digits: int) -> int:
    """Digits after the point of a value that has an error: no finer than its second digit."""
    if not math.isfinite(error) or error <= 0:
        return digits
    return min(digits, max(0, 1 - math.floor(math.log10(error))))


def _shown_column(frame: pd.DataFrame, column: Column) -> list[str]:
    values, missing = values_and_missing(frame[column.name])
    plain = values.tolist()
    if column.type == "string":
        cells = list(map(one_line, plain))
    elif column.type == "boolean":
        cells = ["yes" if v else "no" for v in plain]
    elif column.type == "Int64":
        cells = [f"{v:,}" for v in plain] if _COUNT.search(column.name) else list(map(str, plain))
    else:
        errors = _errors_of(frame, column.name)
        if column.digits is None or errors is None:
            cells = [number(v, column.digits) for v in plain]
        else:
            most = column.digits
            cells = [number(v, digits_beside(e, most)) for v, e in zip(plain, errors, strict=True)]
    if missing.any():
        cells = ["" if gone else cell for cell, gone in zip(cells, missing.tolist(), strict=True)]
    return cells


def _errors_of(frame: pd.DataFrame, name: str) -> list[float] | None:
    """The error that a score has in its own row; 0 where it is not known."""
    score, _, end = name.rpartition("_")
    if end == "bpb":
        other = f"{score}_standard_error_bpb"
        own = score.endswith("standard_error")
    else:
        other, own = f"{score}_sd", end == "sd"
        if end not in ("mean", "sd", "low", "high"):
            return None
    other = name if own else other
    if other not in frame.columns or str(frame[other].dtype) != "Float64":
        return None
    return [float(v) for v in values_and_missing(frame[other])[0].tolist()]
