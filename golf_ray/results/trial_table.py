"""The table of trials in a report: which columns, in which order, and each cell as text and value.

Invariant: a cell that is sorted by is sorted by its value with all digits, never by its text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import pandas as pd

from golf_ray.results.cells import is_number
from golf_ray.results.cells import shown as cell_texts
from golf_ray.results.describing import described, normalised
from golf_ray.results.pictures.rows import Trials

MAX_ROWS: Final = 2_000
"""Rows at most, the best first; `golf-ray export` has all."""
COLUMNS: Final = (
    "label", "seed", "ttt_bpb", "ttt_standard_error_bpb", "final_ttt_bpb", "int6_bpb",
    "val_bpb", "train_loss_nats", "total_bytes", "final_total_bytes", "steps", "tokens_per_s",
    "train_s", "evaluate_s", "wall_s", "waited_s", "restarts", "train_gpu_s", "host", "reason",
)  # fmt: skip
"""Columns beside name, status and knobs, in order; those without any value are left out."""
_MAY_BE_SAME: Final = ("label", "seed", "host", "restarts", "waited_s")
_HEADS: Final = {
    "ttt_bpb": "TTT bpb", "ttt_standard_error_bpb": "± s.e.", "final_ttt_bpb": "final TTT bpb",
    "int6_bpb": "int6 bpb", "val_bpb": "val bpb", "train_loss_nats": "train loss",
    "total_bytes": "bytes", "final_total_bytes": "final bytes", "tokens_per_s": "tokens/s",
    "train_s": "train s", "evaluate_s": "eval s", "wall_s": "wall s", "waited_s": "waited s",
    "train_gpu_s": "train GPU s",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """A column's head."""

    name: str
    text: str
    is_number: bool
    is_knob: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A trial."""

    status: str
    is_best: bool
    cells: tuple[tuple[str, Any], ...]
    """Text and, where it is sorted by another, value of each cell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialTable:
    """All that is shown."""

    heads: tuple[Head, ...]
    rows: tuple[Row, ...]
    total: int


def trial_table(trials: Trials) -> TrialTable:
    """The table, in the order of the frame."""
    frame = trials.frame
    ranked = trials.ranked()
    best = int(ranked.iloc[0]["key"]) if len(ranked) else -1
    if len(frame) > MAX_ROWS:
        order = frame.sort_values(["eligible", "score", "key"], ascending=[False, True, True])
        frame = order.head(MAX_ROWS).sort_values("key")
    names = _columns(trials, frame)
    knobs = trials.knobs
    table = normalised(frame[names])
    columns = described(table)
    texts = [
        _short(cells, table[column.name]) if column.name in knobs else cells
        for column, cells in zip(columns, cell_texts(table, columns), strict=True)
    ]
    values = [_values(table[c.name]) if is_number(c) else None for c in columns]
    heads = [Head(name="trial", text="the trial, run or log", is_number=False),
             Head(name="status", text="done, over limit, running or failed",
                  is_number=False)]  # fmt: skip
    heads += [
        Head(name=trials.name_of(c.name) if c.name in knobs else _HEADS.get(c.name, c.name),
             text=f"{c.name}: {c.text}" if c.text else c.name, is_number=is_number(c),
             is_knob=c.name in knobs)
        for c in columns
    ]  # fmt: skip
    rows = tuple(
        Row(
            status=status,
            is_best=key == best,
            cells=(
                (name, place), (status, None),
                *((t[place], None if v is None else v[place])
                  for t, v in zip(texts, values, strict=True)),
            ),
        )
        for place, (name, status, key) in enumerate(
            zip(frame["name"], frame["shown_status"], frame["key"], strict=True)
        )
    )  # fmt: skip
    return TrialTable(heads=tuple(heads), rows=rows, total=len(trials.frame))


def _columns(trials: Trials, frame: pd.DataFrame) -> list[str]:
    """Columns that say something: scores first, then what was searched, then the rest."""
    scores = COLUMNS[2:7]
    order = dict.fromkeys([trials.objective, *scores, *trials.knobs, *COLUMNS])
    known = [name for name in order if frame[name].notna().any()]
    # Of what is the same in every trial, one look is enough.
    return [
        name for name in known
        if name not in _MAY_BE_SAME or len(frame) == 1 or frame[name].nunique(dropna=False) > 1
    ]  # fmt: skip


def _values(column: pd.Series[Any]) -> list[Any]:
    """What cells are sorted by; None where the value is missing."""
    return [None if gone else value
            for value, gone in zip(column.tolist(), column.isna(), strict=True)]  # fmt: skip


def _short(cells: list[str], column: pd.Series[Any]) -> list[str]:
    """Knobs with four digits: how exact they are, the copied options say."""
    if str(column.dtype) != "Float64":
        return cells
    return ["" if gone else f"{float(value):.4g}"
            for value, gone in zip(column.tolist(), column.isna(), strict=True)]  # fmt: skip
