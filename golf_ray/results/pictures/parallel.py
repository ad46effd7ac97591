"""Parallel coordinates: a line a trial through its knobs to its score.

Invariant: an axis for each knob that has more than one value; all of a trial's values are on its
line, or the line is broken where it has none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import altair as alt
import pandas as pd

from golf_ray.results.pictures.picture import NoPicture, Picture, picture, rows_of
from golf_ray.results.pictures.rows import Trials, number_of, top_of
from golf_ray.results.pictures.trials import named

MAX_THREADS: Final = 1_000
"""Lines at most, those of the best trials."""
MAX_NAMED: Final = 6
"""An axis of at most so many values names each of them."""
AXIS_PX: Final = 76
"""Least room for an axis."""
NAME_GAP: Final = 0.05
"""Least distance of two names on an axis, as a part of it."""
_WIDE_RANGE: Final = 30.0
"""Positive values that go over such a factor are drawn by their logarithms."""
_TITLE: Final = "Knobs and scores"


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """One knob's axis: where values lie, from 0 to 1, and which of them are named."""

    name: str
    places: Mapping[Any, float]
    """Place by value, of a knob of few values."""
    low: float = 0.0
    high: float = 1.0
    log: bool = False

    def place(self, value: Any) -> float | None:
        """Where a value lies."""
        if value is None or pd.isna(value):
            return None
        if self.places:
            return self.places.get(value)
        low, high, at = self.low, self.high, float(value)
        if not math.isfinite(at):
            return None
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(at)
        return min(1.0, max(0.0, (at - low) / (high - low)))

    def ticks(self) -> list[tuple[float, str]]:
        """Places that are named: the ends, and between them what is not on top of another name."""
        if not self.places:
            return [(0.0, short(self.low)), (1.0, short(self.high))]
        named: dict[float, str] = {}
        # The ends are sure of their names.
        for value, place in sorted(self.places.items(), key=lambda one: (0 < one[1] < 1, one[1])):
            if all(abs(place - other) >= NAME_GAP for other in named):
                named[place] = short(value)
        return sorted(named.items())


def axis_of(name: str, values: pd.Series) -> Axis | None:
    """The axis of a knob; None where it has one value, or none."""
    known = list(dict.fromkeys(value for value in values.tolist() if not _missing(value)))
    if len(known) < 2:
        return None
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in known)
    if numbers and (len(known) > MAX_NAMED or len(known) == 2):
        low, high = float(min(known)), float(max(known))
        log = low > 0 and high / low > _WIDE_RANGE
        return Axis(name=name, places={}, low=low, high=high, log=log)
    ordered = sorted(known) if numbers else sorted(known, key=str)
    if numbers:
        low, high = float(ordered[0]), float(ordered[-1])
        return Axis(name=name, places={v: (float(v) - low) / (high - low) for v in ordered})
    return Axis(name=name, places={v: i / (len(ordered) - 1) for i, v in enumerate(ordered)})


def parallel(trials: Trials) -> Picture | NoPicture:
    """A line for each trial with a score."""
    scored = trials.scored().sort_values(["score", "key"])
    if not trials.knobs:
        return NoPicture(name="parallel", title=_TITLE, why="nothing was searched: no knobs")
    if len(scored) < 2:
        return NoPicture(name="parallel", title=_TITLE, why="fewer than two trials have a score")
    shown = scored.head(MAX_THREADS)
    axes = {knob: axis_of(trials.name_of(knob), shown[knob]) for knob in trials.knobs}
    kept = {knob: axis for knob, axis in axes.items() if axis is not None}
    if not kept:
        return NoPicture(name="parallel", title=_TITLE, why="no knob has more than one value")
    values = shown["score"].astype(float).tolist()
    score = Axis(name="score", places={}, low=min(values), high=top_of(values))
    if score.high == score.low:
        return NoPicture(name="parallel", title=_TITLE, why="all scores are the same")
    data = {
        "threads": rows_of(_threads(trials, shown, kept, score), {"place": 4}),
        "ticks": rows_of(_ticks(trials, [*kept.values(), score])),
    }
    chart = _chart(trials, [axis.name for axis in (*kept.values(), score)], score)
    constant = [trials.name_of(knob) for knob, axis in axes.items() if axis is None]
    text = _text(trials, shown, scored, constant)
    return picture("parallel", _TITLE, text, chart, data, height_px=340, wide=True,
                   min_width_px=AXIS_PX * (len(kept) + 1))  # fmt: skip


def _threads(
    trials: Trials, shown: pd.DataFrame, axes: Mapping[str, Axis], score: Axis
) -> pd.DataFrame:
    rows: list[tuple[Any, ...]] = []
    best = int(shown.iloc[0]["key"])
    for rank, (_, row) in enumerate(shown.iterrows()):
        mine = (int(row["key"]), row["name"], float(row["score"]), (rank + 1) / len(shown),
                int(row["key"]) == best)  # fmt: skip
        for knob, axis in axes.items():
            place = axis.place(row[knob])
            if place is not None:
                rows.append((*mine, axis.name, place, short(row[knob])))
        rows.append((*mine, score.name, score.place(row["score"]),
                     trials.number(float(row["score"]))))  # fmt: skip
    columns = ["key", "name", "score", "share", "best", "axis", "place", "value"]
    return pd.DataFrame(rows, columns=columns)


def _ticks(trials: Trials, axes: list[Axis]) -> pd.DataFrame:
    rows = []
    for axis in axes:
        for place, text in axis.ticks():
            if axis.name == "score":
                text = f"{float(axis.low if place == 0 else axis.high):,.{min(trials.digits, 4)}f}"
            side = "lower" if place == 0 else "upper" if place == 1 else "inner"
            rows.append((axis.name, place, text, side))
    return pd.DataFrame(rows, columns=["axis", "place", "text", "side"])


def _chart(trials: Trials, names: list[str], score: Axis) -> alt.LayerChart | alt.FacetChart:
    x = alt.X("axis:N", title=None, sort=names,
              scale=alt.Scale(type="point", padding=0.45),
              axis=alt.Axis(labelAngle=0, labelExpr="split(datum.label, '_')", labelOverlap=False,
                            domain=False, ticks=False, offset=16, labelPadding=0))  # fmt: skip
    y = alt.Y("place:Q", axis=None, scale=alt.Scale(domain=[-0.02, 1.02], nice=False))
    share = alt.param(
        name="best_share", value=100,
        bind=alt.binding_range(min=1, max=100, step=1, name="best trials shown (%) "),
    )  # fmt: skip
    over = alt.selection_point(name="over", on="pointerover", fields=["key"], empty=False,
                               nearest=False, clear="pointerout")  # fmt: skip
    colour = alt.Color(
        "score:Q", title=trials.label,
        scale=alt.Scale(domain=[score.low, score.high], clamp=True, nice=False),
        legend=alt.Legend(
            format=f",.{min(trials.digits, 4)}f", values=[score.low, score.high], offset=22
        ),
    )  # fmt: skip
    threads = (
        alt.Chart(named("threads"))
        .transform_filter("datum.share <= best_share / 100 || datum.best")
        .encode(x=x, y=y, detail="key:N")
    )
    tooltip = [alt.Tooltip("name:N", title="trial"), alt.Tooltip("score:Q", title=trials.label,
               format=f",.{trials.digits}f")]  # fmt: skip
    lines = threads.mark_line(style="thread").encode(
        color=colour, tooltip=tooltip, opacity=alt.when(over).then(alt.value(1.0)).otherwise(
            alt.value(0.55)), strokeWidth=alt.when(over).then(alt.value(4)).otherwise(
            alt.value(1.2)),
    ).add_params(over)  # fmt: skip
    best = threads.transform_filter("datum.best").mark_line(style="best")
    ticks = alt.Chart(named("ticks"))
    spine = ticks.mark_rule(style="spine").encode(
        x=x, y=alt.Y("low:Q", axis=None), y2="high:Q"
    ).transform_aggregate(low="min(place)", high="max(place)", groupby=["axis"])  # fmt: skip
    sides: tuple[tuple[str, dict[str, Any]], ...] = (
        ("lower", {"baseline": "top", "dy": 5}),
        ("upper", {"baseline": "bottom", "dy": -5}),
        ("inner", {"baseline": "middle", "align": "left", "dx": 5}),
    )
    texts = [
        ticks.transform_filter(f"datum.side === '{side}'")
        .mark_text(style="tick", **place)
        .encode(x=x, y=y, text="text:N")
        for side, place in sides
    ]
    return alt.layer(spine, lines, best, *texts).add_params(share)


def _text(trials: Trials, shown: pd.DataFrame, scored: pd.DataFrame, constant: list[str]) -> str:
    best = shown.iloc[0]
    told = [
        f"A line a trial through its knobs to its score, lower is better; the strongest line is "
        f"{best['name']} with {trials.number(float(best['score']))}."
    ]
    if len(shown) < len(scored):
        told.append(f"The best {number_of(len(shown), 'trial')} of {len(scored):,}.")
    if constant:
        told.append(f"Without knobs of one value: {', '.join(constant)}.")
    return " ".join(told)


def short(value: Any) -> str:
    """A knob's value with the digits that tell it from others."""
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e6 else f"{value:.3g}"
    return str(value)


def _missing(value: Any) -> bool:
    return (
        value is None
        or bool(pd.isna(value))
        or (isinstance(value, float) and not math.isfinite(value))
    )
