"""The picture of importances: how much each knob matters, and what noise alone would give it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import altair as alt
import pandas as pd

from golf_ray.errors import GolfRayError
from golf_ray.results.importances import FIXED, MATTERS, importances
from golf_ray.results.pictures.picture import NoPicture, Picture, picture, rows_of
from golf_ray.results.pictures.rows import Trials
from golf_ray.results.pictures.trials import named

_TITLE: Final = "Which knobs matter"


def importance(trials: Trials, plans: Mapping[str, Mapping[str, Any]]) -> Picture | NoPicture:
    """Importances in the sweep that has most to say of them."""
    frame = trials.frame
    done = frame[frame["eligible"] & (frame["kind"] == "trial").fillna(False).astype(bool)]
    if done.empty:
        return _nothing("no trial of a sweep is done, within the limits, and has a score")
    source = str(done["source"].fillna("?").value_counts().index[0])
    rows = frame[frame["source"].fillna("?") == source]
    searched = _searched(plans.get(source) or {})
    knobs = [knob for knob in trials.knobs if knob in searched or not searched]
    if not knobs:
        return _nothing(f"{source} searched no knobs")
    try:
        found = importances(rows, knobs, trials.objective)
    except GolfRayError as error:
        return _nothing(str(error))
    known = found[found["importance"].notna()]
    if known.empty:
        why = {str(v) for v in found["verdict"].dropna() if v != FIXED}
        return _nothing("; ".join(sorted(why)) or "every knob has one value")
    return _drawn(trials, source, known, found, several=frame["source"].nunique() > 1)


def _drawn(
    trials: Trials, source: str, known: pd.DataFrame, found: pd.DataFrame, *, several: bool
) -> Picture:
    shown = known.assign(name=[trials.name_of(knob) for knob in known["knob"]], zero=0.0)
    names = shown["name"].tolist()
    y = alt.Y("name:N", title=None, sort=names,
              axis=alt.Axis(labelLimit=150, ticks=False, domain=False, grid=False,
                            labelOverlap=False))  # fmt: skip
    top = float(max(shown["high"].max(), shown["noise"].max()))
    x = alt.X("importance:Q", title="share of the variance of scores, with 90% interval",
              scale=alt.Scale(domain=[0, min(1.0, top * 1.04)], nice=False),
              axis=alt.Axis(format="%", grid=True, tickCount=6))  # fmt: skip
    base = alt.Chart(named("importances")).encode(
        y=y,
        tooltip=[
            alt.Tooltip("knob:N"), alt.Tooltip("importance:Q", format=".1%"),
            alt.Tooltip("low:Q", format=".1%"), alt.Tooltip("high:Q", format=".1%"),
            alt.Tooltip("noise:Q", title="noise stays below", format=".1%"),
            alt.Tooltip("effect:Q", title="best to worst value", format=".2~g"),
            alt.Tooltip("verdict:N"), alt.Tooltip("points:Q"),
        ],
    )  # fmt: skip
    floor = base.mark_bar(style="floor", height={"band": 0.95}).encode(
        x=alt.X("zero:Q"), x2="noise:Q"
    )
    matters = alt.datum.verdict == MATTERS
    bars = base.mark_bar(style="bar", height={"band": 0.5}).encode(
        x=x, opacity=alt.when(matters).then(alt.value(0.9)).otherwise(alt.value(0.35))
    )
    spread = base.mark_rule(style="spread").encode(x=alt.X("low:Q"), x2="high:Q")
    chart = alt.layer(floor, bars, spread)
    columns = ["knob", "name", "importance", "low", "high", "noise", "effect", "zero", "points",
               "verdict"]  # fmt: skip
    data = {"importances": rows_of(shown[columns], dict.fromkeys(columns[2:7], 4))}
    text = _text(trials, source if several else "", shown, found)
    return picture("importances", _TITLE, text, chart, data, height_px=60 + 30 * len(names))


def _text(trials: Trials, source: str, shown: pd.DataFrame, found: pd.DataFrame) -> str:
    matter = shown[shown["verdict"] == MATTERS]
    rest = shown.loc[shown["verdict"] != MATTERS, "name"].tolist()
    told = [f"Importances for {trials.label}" + (f", in {source}:" if source else ":")]
    effects = ", ".join(
        f"{name} matters ({effect:.2g} from its best to its worst value)"
        for name, effect in zip(matter["name"], matter["effect"], strict=True)
    )
    told.append(f"{effects or 'no knob is told apart from noise'}.")
    if rest and effects:
        told.append(f"Not told apart from noise: {', '.join(rest)}.")
    left = found[found["importance"].isna()]
    if len(left):
        reasons = [f"{trials.name_of(k)} ({v})"
                   for k, v in zip(left["knob"], left["verdict"], strict=True)]  # fmt: skip
        told.append(f"Not judged: {', '.join(reasons)}.")
    told.append("The grey floor is what a knob without effect stays below 19 times in 20.")
    return " ".join(told)


def _searched(plan: Mapping[str, Any]) -> set[str]:
    """Knobs of a plan's space; none where it has no space that can be read."""
    space = plan.get("space")
    known = space.get("distributions") if isinstance(space, Mapping) else None
    return set(known) if isinstance(known, Mapping) else set()


def _nothing(why: str) -> NoPicture:
    return NoPicture(name="importances", title=_TITLE, why=f"no importances: {why}")
