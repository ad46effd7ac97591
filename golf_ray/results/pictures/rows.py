"""What pictures are made of: trials as they are shown, in one order, with names and a score.

Invariant: every trial of the frame is there once, also those without a score; the best is the best
of those that are done and within the limits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pandas as pd

from golf_ray.errors import UsageError, nearest
from golf_ray.results.limits import fits_of, is_within
from golf_ray.results.pictures.themes import MAX_SERIES

STATUSES: Final = ("done", "over limit", "running", "failed", "interrupted", "pruned")
"""As they are shown."""
OBJECTIVES: Final = (
    "ttt_bpb", "int6_bpb", "val_bpb", "final_ttt_bpb", "train_loss_nats", "total_bytes",
)  # fmt: skip
"""Columns that may say which trial is best, the first that has a value by itself."""
_LABELS: Final = {
    "ttt_bpb": "bpb with TTT",
    "int6_bpb": "bpb after quantisation",
    "val_bpb": "bpb before quantisation",
    "final_ttt_bpb": "bpb with TTT, all documents",
    "train_loss_nats": "training loss (nats a token)",
    "total_bytes": "total bytes",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Trials:
    """Trials as they are shown."""

    frame: pd.DataFrame
    """A row a trial: the columns of the schema and of the knobs, and `key` (place in the frame),
    `name`, `series`, `order` (place in its series), `shown_status`, `score`, `eligible`."""
    objective: str
    knobs: tuple[str, ...]
    series: tuple[str, ...]
    """Sweeps by name; single runs and public logs are one series each."""

    @property
    def label(self) -> str:
        """What the score is called."""
        return label_of(self.objective)

    @property
    def digits(self) -> int:
        """Digits after the point that a score is shown with."""
        return 0 if self.objective.endswith("_bytes") else 5

    def ranked(self) -> pd.DataFrame:
        """Those that may be the best, the best first."""
        good = self.frame[self.frame["eligible"]]
        return good.sort_values(["score", "key"])

    def scored(self) -> pd.DataFrame:
        """Those with a score."""
        return self.frame[self.frame["score"].notna()]

    def number(self, score: float) -> str:
        """A score as text."""
        return f"{score:,.{self.digits}f}"

    def name_of(self, knob: str) -> str:
        """A knob without its section, where no other is called that."""
        return short_names(self.knobs)[knob]


def trials_of(
    frame: pd.DataFrame,
    knobs: Sequence[str],
    objective: str | None = None,
    records: Sequence[Mapping[str, Any]] = (),
) -> Trials:
    """Trials as they are shown.

    Args:
        frame: of trials, as `golf_ray.load_results` has it.
        knobs: searched fields among its columns.
        objective: column that says which is best; None for the first that has a value.
        records: of the rows, where limits that are no columns are looked up.

    Raises:
        UsageError: there is no such objective.
    """
    if objective is None:
        objective = next((n for n in OBJECTIVES if frame[n].notna().any()), OBJECTIVES[0])
    elif objective not in OBJECTIVES:
        raise UsageError(f"'{objective}' is no objective", nearest(objective, OBJECTIVES))
    made = frame.reset_index(drop=True).copy()
    made["key"] = range(len(made))
    kind = made["kind"].fillna("trial")
    series = made["source"].fillna("?").where(kind == "trial", kind.map(_series_of))
    known = list(dict.fromkeys(series))
    if len(known) > MAX_SERIES:
        # More colours cannot be told apart.
        series = series.where(series.isin(known[: MAX_SERIES - 1]), "others")
        known = [*known[: MAX_SERIES - 1], "others"]
    made["series"] = series
    made["order"] = made.groupby("series", sort=False).cumcount() + 1
    if len(known) == 1 and (kind == "trial").all() and made["trial"].notna().all():
        made["order"] = made["trial"].astype("int64")
    made["name"] = _names(made, kind, one=made["source"].nunique(dropna=False) <= 1)
    made["shown_status"] = made["status"].fillna("running").str.replace("_", " ")
    score = pd.to_numeric(made[objective], errors="coerce").astype("Float64")
    made["score"] = score.where(score.map(_finite).astype("boolean").fillna(False))
    made["eligible"] = _eligible(made, records)
    return Trials(frame=made, objective=objective, knobs=tuple(knobs), series=tuple(known))


def label_of(column: str) -> str:
    """What a score is called."""
    return _LABELS.get(column, column)


def short_names(knobs: Sequence[str]) -> dict[str, str]:
    """Knobs without their sections, where that names one alone."""
    tails = [knob.rpartition(".")[2] for knob in knobs]
    return {k: t if tails.count(t) == 1 else k for k, t in zip(knobs, tails, strict=True)}


def top_of(values: Sequence[float]) -> float:
    """The upper end of an axis for values that are better the lower they are.

    A few that are far worse than the rest would press all others flat: the axis ends a fifth
    above the 90th percentile where the worst is much farther off than that.
    """
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    most = ordered[min(len(ordered) - 1, math.ceil(0.9 * len(ordered)) - 1)]
    far = low + 1.2 * (most - low)
    return far if most > low and high > low + 2.5 * (most - low) else high


def span_of(low: float, high: float, *, below: float = 0.04, above: float = 0.04) -> list[float]:
    """The domain of an axis around some values, with room at both ends."""
    width = (high - low) or max(abs(high) * 1e-3, 1e-9)
    return [low - below * width, high + above * width]


def ticks_of(low: float, high: float, most: int = 6) -> list[float]:
    """Round values for an axis's ticks, from `low` to `high`."""
    rough = (high - low) / max(1, most)
    if rough <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= 0.85 * rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def number_of(count: int, noun: str) -> str:
    """A number of things."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _eligible(frame: pd.DataFrame, records: Sequence[Mapping[str, Any]]) -> pd.Series[bool]:
    """Which may be the best: done, with a score, and within every limit."""
    good = (frame["status"] == "done").fillna(False) & frame["score"].notna() & fits_of(frame)
    if records:
        good &= pd.Series([is_within(r) for r in records], index=frame.index)
    return good.astype(bool)


def _series_of(kind: str) -> str:
    return {"run": "run folders", "public": "public logs"}.get(kind, kind)


def _names(frame: pd.DataFrame, kind: pd.Series, *, one: bool) -> list[str]:
    names = []
    for source, of_kind, trial, label in zip(
        frame["source"].fillna("?"), kind, frame["trial"], frame["label"], strict=True
    ):
        if of_kind != "trial" or pd.isna(trial):
            names.append(str(source))
            continue
        name = f"trial {trial}" if one else f"{source} trial {trial}"
        names.append(name if pd.isna(label) else f"{name} ({label})")
    return names


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
