"""Pictures of trials: scores as the search went on, and scores against sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import altair as alt
import pandas as pd

from golf_ray.results.pictures.picture import NoPicture, Picture, Rows, picture, rows_of
from golf_ray.results.pictures.rows import (
    STATUSES,
    Trials,
    label_of,
    number_of,
    span_of,
    ticks_of,
    top_of,
)
from golf_ray.results.pictures.themes import SHAPES

MB = 1e6
ONCE = Rows(columns=("one",), values=((1,),))
"""Data of marks that are there once."""
_NOTHING = "no trial has a score yet"
_STRIP_PX = 16
"""Height of the strip for trials without a score, at the upper edge."""


def named(name: str) -> alt.NamedData:
    """Data that lie beside the chart."""
    return alt.NamedData(name)


def status_shape(present: Sequence[str]) -> alt.Shape:
    """Statuses as shapes."""
    scale = alt.Scale(domain=list(STATUSES), range=list(SHAPES))
    return alt.Shape("status:N", title=None, scale=scale, legend=_legend(present))


def status_colour(present: Sequence[str]) -> alt.Color:
    """Statuses as colours of their own, the same in each picture."""
    scale = alt.Scale(domain=list(STATUSES))
    return alt.Color("status:N", title=None, scale=scale, legend=_legend(present))


def _legend(present: Sequence[str]) -> alt.Legend:
    return alt.Legend(values=[status for status in STATUSES if status in present])


def _points(trials: Trials, extra: Sequence[str] = ()) -> pd.DataFrame:
    """What every point of a picture says of itself."""
    frame = trials.frame
    points = frame[["key", "name", "series", "order", "score", *extra]].copy()
    points["status"] = frame["shown_status"]
    points["reason"] = frame["reason"].fillna("").str.slice(0, 160)
    return points


def _tooltip(trials: Trials, *more: alt.Tooltip) -> list[alt.Tooltip]:
    style = f",.{trials.digits}f"
    return [
        alt.Tooltip("name:N", title="trial"),
        alt.Tooltip("status:N"),
        alt.Tooltip("score:Q", title=trials.label, format=style),
        *more,
        alt.Tooltip("reason:N"),
    ]


def score_axis(score: str, low: float, high: float, *, strip: bool) -> alt.Axis:
    """An axis of scores, with the digits that it needs.

    Args:
        strip: whether its upper end is taken for trials without a score.
    """
    values = ticks_of(low, high - (0.1 * (high - low) if strip else 0.0))
    if score.endswith("_bytes"):
        return alt.Axis(values=values, format=",.0f")
    step = values[1] - values[0] if len(values) > 1 else max(high - low, 1e-6)
    digits = max(2, min(6, math.ceil(-math.log10(step) - 1e-9)))
    return alt.Axis(values=values, format=f".{digits}f")


# History ------------------------------------------------------------------------------------------


def history(trials: Trials) -> Picture | NoPicture:
    """Each trial's score in the order of the search, and the best so far."""
    title = "Scores in the order of the search"
    scored = trials.scored()
    if scored.empty:
        return NoPicture(name="history", title=title, why=_NOTHING)
    values = scored["score"].astype(float).tolist()
    low, high = min(values), top_of(values)
    unscored = len(trials.frame) - len(scored)
    domain = span_of(low, high, above=0.16 if unscored else 0.08)
    points = _points(trials)
    # Those beyond the axis are drawn at its end.
    points["shown"] = points["score"].clip(upper=high + 0.04 * (high - low))
    best = _best_so_far(trials)
    text = _history_text(trials, values, high, unscored)
    data = {
        "trials": rows_of(points),
        "best": rows_of(best),
        "once": ONCE,
        "ring": rows_of(points[points["key"].isin(_best_keys(trials))]),
    }
    chart = _history_chart(trials, domain, unscored, sorted(set(points["status"])), len(best) > 0)
    return picture("history", title, text, chart, data, height_px=320)


def _history_chart(
    trials: Trials, domain: list[float], unscored: int, present: list[str], ranked: bool
) -> alt.LayerChart | alt.FacetChart:
    many = len(trials.series) > 1
    series = alt.Color("series:N", title=None, scale=alt.Scale(domain=list(trials.series)))
    x = alt.X("order:Q", title="trial", scale=alt.Scale(zero=False, nice=False, padding=8),
              axis=alt.Axis(format="d", tickMinStep=1,
                            labelExpr="datum.value >= 1 ? datum.label : ''"))  # fmt: skip
    scale = alt.Scale(domain=domain, zero=False, nice=False)
    axis = score_axis(trials.objective, *domain, strip=bool(unscored))
    y = alt.Y("shown:Q", title=trials.label, scale=scale, axis=axis)
    colour = series if many else status_colour(present)
    points = (
        alt.Chart(named("trials"))
        .mark_point()
        .encode(x=x, y=y, color=colour, shape=status_shape(present), tooltip=_tooltip(trials))
    )
    line = alt.Chart(named("best")).mark_line(interpolate="step-after", style="best-so-far")
    line = line.encode(x=x, y=y, **({"color": series, "detail": "series:N"} if many else {}))
    ring = alt.Chart(named("ring")).mark_point(style="ring", filled=False).encode(x=x, y=y)
    # A layer of nothing has no extent, of which a browser's console is told.
    below, above = ([line], [ring]) if ranked else ([], [])
    return alt.layer(*strip(points, unscored), *below, _scored(points), *above)


def _scored(points: alt.Chart) -> alt.Chart:
    return points.transform_filter("isValid(datum.score)")


def strip(points: alt.Chart, count: int) -> list[alt.Chart]:
    """Trials without a score, in a strip of their own at the upper edge; nothing of none."""
    if not count:
        return []
    once = alt.Chart(named("once"))
    band = once.mark_rect(style="strip").encode(y=alt.value(0), y2=alt.value(_STRIP_PX))
    name = once.mark_text(style="name", align="right", dx=-6).encode(
        x=alt.value(0), y=alt.value(_STRIP_PX / 2), text=alt.value("no score")
    )
    marks = points.transform_filter("!isValid(datum.score)")
    return [band, name, marks.encode(y=alt.value(_STRIP_PX / 2))]


def _best_keys(trials: Trials) -> list[int]:
    """The best trial of each series."""
    return trials.ranked().groupby("series", sort=False)["key"].first().tolist()


def _best_so_far(trials: Trials) -> pd.DataFrame:
    """The steps of each series, and its last trial."""
    rows = []
    for series, frame in trials.frame.groupby("series", sort=False):
        best = math.inf
        for order, score, eligible in zip(
            frame["order"], frame["score"], frame["eligible"], strict=True
        ):
            if eligible and float(score) < best:
                best = float(score)
                rows.append((str(series), int(order), best))
        if best < math.inf and rows[-1][1] < int(frame["order"].max()):
            rows.append((str(series), int(frame["order"].max()), best))
    return pd.DataFrame(rows, columns=["series", "order", "shown"])


def _history_text(trials: Trials, values: list[float], high: float, unscored: int) -> str:
    told = [f"{number_of(len(values), 'trial')} with a score."]
    ranked = trials.ranked()
    if len(ranked):
        first = ranked.iloc[0]
        told.append(
            f"The line is the best so far; at the end {trials.number(first['score'])} "
            f"({first['name']}, ringed)."
        )
    if unscored:
        told.append(f"{number_of(unscored, 'trial')} without a score at the upper edge.")
    beyond = sum(value > high for value in values)
    if beyond:
        told.append(f"{number_of(beyond, 'trial')} worse than the axis shows, at its upper end.")
    return " ".join(told)


# Sizes --------------------------------------------------------------------------------------------


def sizes(trials: Trials) -> Picture | NoPicture:
    """Scores against model and code together, with the limit."""
    title = "Score against size"
    sized = trials.frame[trials.frame["total_bytes"].notna()]
    if sized.empty:
        return NoPicture(name="sizes", title=title, why="no trial has a size yet")
    score = _score_beside_size(trials)
    points = _points(trials, ["total_bytes"]).loc[sized.index]
    points["score"] = trials.frame.loc[sized.index, score].astype("Float64")
    points["megabytes"] = points["total_bytes"].astype(float) / MB
    values = points["score"].dropna().astype(float).tolist()
    if not values:
        return NoPicture(name="sizes", title=title, why="no trial with a size has a score yet")
    limits = sorted({int(v) for v in sized["limit_bytes"].dropna()})
    low, high = min(values), top_of(values)
    points["shown"] = points["score"].clip(upper=high + 0.04 * (high - low))
    data = {
        "sizes": rows_of(points),
        "once": ONCE,
        "limits": rows_of(pd.DataFrame({"megabytes": [v / MB for v in limits],
                                        "name": [f"limit {v / MB:g}" for v in limits]})),
    }  # fmt: skip
    unscored = int(points["score"].isna().sum())
    domain = span_of(low, high, above=0.16 if unscored else 0.08)
    chart = _sizes_chart(score, domain, unscored, sorted(set(points["status"])))
    text = _sizes_text(points, limits)
    return picture("sizes", title, text, chart, data, height_px=320)


def _score_beside_size(trials: Trials) -> str:
    """The objective, or a score where that is the size itself."""
    for name in (trials.objective, "ttt_bpb", "int6_bpb", "val_bpb", "train_loss_nats"):
        if not name.endswith("_bytes") and trials.frame[name].notna().any():
            return name
    return "ttt_bpb"


def _sizes_chart(
    score: str, domain: list[float], unscored: int, present: list[str]
) -> alt.LayerChart | alt.FacetChart:
    x = alt.X("megabytes:Q", title="model and code, million bytes",
              scale=alt.Scale(zero=False, nice=False, padding=12),
              axis=alt.Axis(tickCount=6))  # fmt: skip
    scale = alt.Scale(domain=domain, zero=False, nice=False)
    axis = score_axis(score, *domain, strip=bool(unscored))
    y = alt.Y("shown:Q", title=label_of(score), scale=scale, axis=axis)
    points = (
        alt.Chart(named("sizes"))
        .mark_point()
        .encode(
            x=x, y=y, color=status_colour(present), shape=status_shape(present),
            tooltip=[
                alt.Tooltip("name:N", title="trial"), alt.Tooltip("status:N"),
                alt.Tooltip("score:Q", title=label_of(score), format=",.5f"),
                alt.Tooltip("total_bytes:Q", title="total bytes", format=","),
                alt.Tooltip("reason:N"),
            ],
        )
    )  # fmt: skip
    limit = alt.Chart(named("limits")).encode(x=x)
    line = limit.mark_rule(style="limit")
    name = limit.mark_text(style="limit-name", align="left", dx=6, baseline="bottom", dy=-5)
    name = name.encode(y=alt.value("height"), text="name:N")
    return alt.layer(*strip(points, unscored), line, name, _scored(points))


def _sizes_text(points: pd.DataFrame, limits: list[int]) -> str:
    sizes = points["total_bytes"].astype(int)
    told = [f"{number_of(len(points), 'trial')} of {sizes.min():,} to {sizes.max():,} bytes."]
    if limits:
        over = int((sizes > max(limits)).sum())
        told.append(
            f"The limit is {' or '.join(f'{v:,}' for v in limits)} bytes; "
            f"{number_of(over, 'trial')} over it."
        )
    unscored = int(points["score"].isna().sum())
    if unscored:
        told.append(f"{number_of(unscored, 'trial')} without a score at the upper edge.")
    return " ".join(told)
