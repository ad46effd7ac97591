"""Pictures of trainings: their curves, one for each training and not for each trial.

Invariant: a training is drawn once, under the best of the trials that share it; of very many, the
best are drawn and the rest by an even choice, and the text says how many.
"""

from __future__ import annotations

import math
from typing import Final

import altair as alt
import pandas as pd

from golf_ray.results.pictures.picture import NoPicture, Picture, picture, rows_of
from golf_ray.results.pictures.rows import Trials, number_of, span_of, top_of
from golf_ray.results.pictures.trials import named

MAX_TRAININGS: Final = 250
MAX_POINTS: Final = 60
"""Of one training; the rest are left out evenly."""
EARLY: Final = 0.08
"""Losses of the first part of a training are far above all others: the axis leaves them out."""
_TITLE: Final = "Training curves"


def curves(trials: Trials, intervals: pd.DataFrame) -> Picture | NoPicture:
    """Training loss by step."""
    known = intervals[intervals["train_loss_nats"].notna() & intervals["step"].notna()]
    if known.empty:
        return NoPicture(
            name="curves", title=_TITLE,
            why="no training curves: no run folder of a training was found beside the records",
        )  # fmt: skip
    points, count = _points(trials, known)
    losses = points["loss"].astype(float)
    late = points.loc[points["step"] >= EARLY * points["step"].max(), "loss"].astype(float)
    late = late if len(late) else losses
    domain = span_of(float(losses.min()), top_of(late.tolist()), above=0.1)
    scores = points["score"].dropna().astype(float).tolist()
    statuses = sorted(set(points.loc[points["score"].isna(), "status"]))
    text = _text(trials, points, count)
    chart = _chart(trials, domain, scores, statuses, bool(points["best"].any()))
    return picture("curves", _TITLE, text, chart, {"curves": rows_of(points, {"loss": 5})},
                   height_px=340)  # fmt: skip


def _points(trials: Trials, intervals: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Points of the trainings that are drawn, and how many trainings there are."""
    intervals = intervals.copy()
    own = intervals["source"].fillna("") + " " + intervals["trial"].astype("string").fillna("")
    intervals["id"] = intervals["training"].fillna(own)
    who = _who(trials)
    ids = list(dict.fromkeys(intervals["id"]))
    # Where no trial is known, the training is a run of its own.
    ids.sort(key=lambda i: who.get(i, ("", math.inf, "", False))[1])
    chosen = ids
    if len(ids) > MAX_TRAININGS:
        half = MAX_TRAININGS // 2
        rest = ids[half:]
        step = len(rest) / (MAX_TRAININGS - half)
        chosen = ids[:half] + [rest[int(i * step)] for i in range(MAX_TRAININGS - half)]
    place = {name: i for i, name in enumerate(chosen)}
    kept = intervals[intervals["id"].isin(place)].sort_values(["id", "step"], kind="stable")
    number = kept.groupby("id").cumcount()
    total = kept.groupby("id")["step"].transform("size")
    each = ((total - 1) // MAX_POINTS + 1).astype(int)
    kept = kept[(number % each == 0) | (number == total - 1)]
    points = pd.DataFrame({
        "training": kept["id"].map(place).astype(int).tolist(),
        "step": kept["step"].astype(int).tolist(),
        "loss": kept["train_loss_nats"].astype(float).tolist(),
    })  # fmt: skip
    told = [who.get(name, (name, math.inf, "done", False)) for name in kept["id"]]
    points["name"] = [one[0] for one in told]
    points["score"] = pd.array(
        [one[1] if math.isfinite(one[1]) else None for one in told], dtype="Float64"
    )
    points["status"] = [one[2] for one in told]
    points["best"] = [one[3] for one in told]
    return points[points["loss"].map(math.isfinite)], len(ids)


def _who(trials: Trials) -> dict[str, tuple[str, float, str, bool]]:
    """Name, score and status of the best trial of each training, and whether it is best of all."""
    who: dict[str, tuple[str, float, str, bool]] = {}
    ranked = trials.ranked()
    best = int(ranked.iloc[0]["key"]) if len(ranked) else -1
    frame = trials.frame
    own = frame["source"].fillna("") + " " + frame["trial"].astype("string").fillna("")
    ids = frame["training"].fillna(own)
    order = frame.assign(id=ids).sort_values(["eligible", "score", "key"],
                                             ascending=[False, True, True])  # fmt: skip
    for training, name, score, status, key in zip(
        order["id"], order["name"], order["score"], order["shown_status"], order["key"],
        strict=True,
    ):  # fmt: skip
        known = math.inf if pd.isna(score) else float(score)
        who.setdefault(str(training), (str(name), known, str(status), int(key) == best))
    return who


def _chart(
    trials: Trials, domain: list[float], scores: list[float], statuses: list[str], has_best: bool
) -> alt.LayerChart | alt.FacetChart:
    x = alt.X("step:Q", title="step", scale=alt.Scale(nice=False, zero=True),
              axis=alt.Axis(format=",.0f", tickCount=6))  # fmt: skip
    y = alt.Y("loss:Q", title="training loss, nats a token",
              scale=alt.Scale(domain=domain, zero=False, nice=False, clamp=False))  # fmt: skip
    tooltip = [
        alt.Tooltip("name:N", title="trial"), alt.Tooltip("status:N"),
        alt.Tooltip("score:Q", title=trials.label, format=f",.{trials.digits}f"),
    ]  # fmt: skip
    lines = alt.Chart(named("curves")).encode(x=x, y=y, detail="training:N", tooltip=tooltip)
    layers = []
    if scores:
        top = top_of(scores)
        scale = alt.Scale(domain=[min(scores), top], clamp=True, nice=False)
        legend = alt.Legend(format=f",.{min(trials.digits, 4)}f", values=[min(scores), top])
        colour = alt.Color("score:Q", title=trials.label, scale=scale, legend=legend)
        scored = lines.transform_filter("isValid(datum.score)")
        layers = [scored.mark_line(style="thread", clip=True).encode(color=colour)]
        if has_best:
            best = scored.transform_filter("datum.best")
            layers.append(best.mark_line(style="best", clip=True))
    if statuses:
        scale = alt.Scale(domain=statuses, range=[[6, 3], [2, 2], [8, 2, 2, 2], [1, 1]])
        dash = alt.StrokeDash("status:N", title="no score:", scale=scale)
        rest = lines.transform_filter("!isValid(datum.score)")
        layers.append(rest.mark_line(style="unfinished", clip=True).encode(strokeDash=dash))
    return alt.layer(*layers)


def _text(trials: Trials, points: pd.DataFrame, count: int) -> str:
    drawn = points["training"].nunique()
    told = [f"Training loss of {number_of(count, 'training')}, each once."]
    if drawn < count:
        told.append(f"Drawn are {drawn}: the best, and an even choice of the rest.")
    best = points[points["best"]]
    if len(best):
        last = best.iloc[-1]
        told.append(
            f"The strongest line is that of {last['name']}: {last['loss']:.4f} nats a token at "
            f"step {last['step']:,}."
        )
    unfinished = points.loc[points["score"].isna(), "training"].nunique()
    if unfinished:
        told.append(f"{number_of(unfinished, 'training')} without a score dashed.")
    told.append("Losses of the first steps are above the axis.")
    return " ".join(told)
