"""The picture of a timeline: stages in the lanes of their hosts, with what stood idle.

Invariant: times in which the whole cluster stood still for long are cut out, and said.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final

import altair as alt
import pandas as pd

from golf_ray.results.pictures.picture import NoPicture, Picture, picture, rows_of
from golf_ray.results.pictures.rows import number_of
from golf_ray.results.pictures.trials import named
from golf_ray.results.timeline import GAP_S, Timeline

STAGES: Final = ("train", "calibrate", "quantize", "evaluate")
MAX_SPANS: Final = 8_000
"""Bars at most, the longest first."""
_TITLE: Final = "Trials over the cluster's slots"
_CUT: Final = 0.015
"""Room for a time that is cut out, as a part of what is shown."""


def slots(timeline: Timeline) -> Picture | NoPicture:
    """Each stage where and when it ran."""
    if not timeline.placed:
        return NoPicture(
            name="timeline",
            title=_TITLE,
            why="no timeline: these records do not say when their stages ran",
        )
    unit, unit_s = _unit(timeline.use.span_s)
    offsets = _offsets(timeline)
    starts = _starts(timeline)
    bars = _bars(timeline, offsets, starts, unit_s)
    stages = [s for s in STAGES if s in set(bars["stage"])]
    stages += sorted(set(bars["stage"]) - set(stages))
    tracks = pd.DataFrame([
        (offsets[host] - 0.5 + 0.06, offsets[host] + lanes - 0.5 - 0.06, at / unit_s,
         (at + ended - began) / unit_s)
        for host, lanes in timeline.lanes.items()
        for at, (began, ended) in zip(starts, timeline.stretches, strict=True)
    ], columns=["low", "high", "from", "to"])  # fmt: skip
    data = {"bars": rows_of(bars), "tracks": rows_of(tracks)}
    lanes = sum(timeline.lanes.values()) + len(timeline.lanes) - 1
    chart = _chart(timeline, offsets, stages, unit, lanes)
    height = min(560, max(110, 22 * lanes + 60))
    text = _text(timeline, len(bars))
    return picture("timeline", _TITLE, text, chart, data, height_px=height, wide=True)


def _unit(seconds: float) -> tuple[str, float]:
    if seconds > 2 * 3600:
        return "hours", 3600.0
    return ("minutes", 60.0) if seconds > 120 else ("seconds", 1.0)


def _offsets(timeline: Timeline) -> dict[str, int]:
    """The first lane of each host; an empty one lies between hosts."""
    offsets, at = {}, 0
    for host, lanes in timeline.lanes.items():
        offsets[host] = at
        at += lanes + 1
    return offsets


def _starts(timeline: Timeline) -> list[float]:
    """Where each stretch begins on the axis, in seconds, with the times between cut out."""
    cut = _CUT * timeline.use.span_s
    starts, at = [], 0.0
    for began, ended in timeline.stretches:
        starts.append(at)
        at += ended - began + cut
    return starts


def _bars(
    timeline: Timeline, offsets: dict[str, int], starts: Sequence[float], unit_s: float
) -> pd.DataFrame:
    placed = timeline.placed
    if len(placed) > MAX_SPANS:
        longest = sorted(placed, key=lambda p: p.span.began_s - p.span.ended_s)[:MAX_SPANS]
        placed = tuple(longest)
    rows = []
    for one in placed:
        span = one.span
        number = max(i for i, (began, _) in enumerate(timeline.stretches) if began <= span.began_s)
        at = starts[number] + span.began_s - timeline.stretches[number][0]
        seconds = span.ended_s - span.began_s
        for first, last in _runs(one.lanes):
            rows.append((
                span.stage, span.name, span.host, round(seconds, 1), at / unit_s,
                (at + seconds) / unit_s, offsets[span.host] + first - 0.42,
                offsets[span.host] + last + 0.42,
            ))  # fmt: skip
    columns = ["stage", "name", "host", "seconds", "from", "to", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def _runs(lanes: Sequence[int]) -> list[tuple[int, int]]:
    """Lanes that follow one another as one."""
    runs: list[tuple[int, int]] = []
    for lane in lanes:
        if runs and runs[-1][1] == lane - 1:
            runs[-1] = (runs[-1][0], lane)
        else:
            runs.append((lane, lane))
    return runs


def _chart(
    timeline: Timeline, offsets: dict[str, int], stages: list[str], unit: str, lanes: int
) -> alt.LayerChart | alt.FacetChart:
    # A host's name stands at its middle, and the expression finds it there.
    names = {offsets[h] + (n - 1) // 2: h for h, n in timeline.lanes.items()}
    values = sorted(names)
    labels = {str(at): _named_host(names[at], timeline) for at in values}
    x = alt.X("from:Q", title=f"{unit} since the beginning",
              scale=alt.Scale(nice=False, zero=True), axis=alt.Axis(tickCount=6))  # fmt: skip
    axis = alt.Axis(values=values, labelExpr=f"({json.dumps(labels)})[datum.value]", grid=False,
                    ticks=False, labelLimit=110, labelOverlap=False)  # fmt: skip
    y = alt.Y("low:Q", title=None, axis=axis,
              scale=alt.Scale(domain=[lanes - 0.4, -0.6], nice=False))  # fmt: skip
    encoding = {"x": x, "x2": alt.X2("to"), "y": y, "y2": alt.Y2("high")}
    tracks = alt.Chart(named("tracks")).mark_rect(style="idle").encode(**encoding)
    bars = (
        alt.Chart(named("bars"))
        .mark_rect(cornerRadius=1.5)
        .encode(
            **encoding,
            color=alt.Color("stage:N", title=None, scale=alt.Scale(domain=stages)),
            tooltip=[
                alt.Tooltip("name:N", title="trial"), alt.Tooltip("stage:N"),
                alt.Tooltip("host:N"), alt.Tooltip("seconds:Q", format=",.1f"),
            ],
        )
    )  # fmt: skip
    return alt.layer(tracks, bars)


def _named_host(host: str, timeline: Timeline) -> list[str]:
    return [host, number_of(timeline.lanes[host], f"{timeline.slot}")]


def _text(timeline: Timeline, bars: int) -> str:
    use = timeline.use
    slot = "GPU" if timeline.slot == "GPU" else "worker slot"
    told = [
        f"{number_of(use.lanes, slot)} on {number_of(len(timeline.lanes), 'host')}, "
        f"{use.busy_share:.0%} busy and {1 - use.busy_share:.0%} idle: "
        f"{use.busy_s / 3600:,.2f} of {use.lanes * use.span_s / 3600:,.2f} {timeline.slot}-hours.",
        f"A host has as many lanes as {slot}s were in use at once; the record does not say which "
        "one a stage had.",
    ]
    if len(timeline.stretches) > 1:
        cut = number_of(len(timeline.stretches) - 1, "time")
        told.append(f"{cut} of over {GAP_S / 60:.0f} minutes in which nothing ran left out.")
    if len(timeline.placed) > MAX_SPANS:
        told.append(f"Drawn are the {MAX_SPANS:,} longest of {len(timeline.placed):,} stages.")
    return " ".join(told)
