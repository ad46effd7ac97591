"""Pictures of scores by document: bits per byte by length, and where two evaluations differ.

Invariant: differences are taken between the same documents; a bin's score is its bits over its
bytes, not a mean over documents.
"""

from __future__ import annotations

import math
from typing import Final

import altair as alt
import numpy as np
import pandas as pd

from golf_ray.results.pictures.picture import NoPicture, Picture, picture, rows_of
from golf_ray.results.pictures.rows import Trials, number_of
from golf_ray.results.pictures.trials import named

MAX_BINS: Final = 10
PER_BIN: Final = 8
"""Documents of a bin at least, or there are fewer bins."""
MAX_EVALUATIONS: Final = 5
"""Drawn at most, the best first."""
_TITLE: Final = "Bits per byte by document length"
_DIFFERENCES: Final = "Difference to the best, document by document"


def by_length(trials: Trials, documents: pd.DataFrame) -> tuple[Picture | NoPicture, ...]:
    """Scores by length, and differences to the best evaluation where there are several."""
    known = documents[
        documents["tokens"].fillna(0).gt(0) & documents["bytes"].fillna(0).gt(0)
        & documents["nats"].notna()
    ]  # fmt: skip
    if known.empty:
        why = (
            "no per-document scores: none of these was evaluated with test-time training on a pool "
            "that keeps a ledger"
        )
        return (NoPicture(name="documents", title=_TITLE, why=why),)
    chosen = _chosen(trials, known)
    names = list(dict.fromkeys(chosen["name"]))
    edges = _edges(chosen)
    chosen = chosen.assign(bin=np.searchsorted(edges[1:-1], chosen["tokens"], side="right"))
    scores = _scores(chosen)
    first = _drawn_scores(scores, names, chosen)
    if len(names) < 2:
        return (first,)
    return first, _drawn_differences(_differences(chosen, names), names)


def _chosen(trials: Trials, documents: pd.DataFrame) -> pd.DataFrame:
    """Documents of the evaluations that are drawn, the best first, as plain numbers."""
    frame = trials.frame
    names = dict(zip(zip(frame["source"], frame["trial"], strict=True), frame["name"], strict=True))
    made = pd.DataFrame({
        "source": documents["source"].fillna("?").astype(object),
        "trial": documents["trial"].astype(object),
        "evaluation": documents["evaluation"].fillna("").astype(object),
        "document": documents["document"].astype("float64"),
        "nats": documents["nats"].astype("float64"),
        "tokens": documents["tokens"].astype("float64"),
        "bytes": documents["bytes"].astype("float64"),
    })  # fmt: skip
    found = []
    for (source, _), part in made.groupby(["source", "evaluation"], sort=False):
        trial = part["trial"].iloc[0]
        name = names.get((source, trial), str(source))
        bpb = part["nats"].sum() / math.log(2) / part["bytes"].sum()
        found.append((len(part), bpb, str(name), part))
    # Scores compare only on the same documents: the largest sets, which are everything.
    most = max(count for count, *_ in found)
    largest = sorted((one for one in found if one[0] == most), key=lambda one: one[1])
    seen: dict[str, int] = {}
    parts = []
    for _, _, name, part in largest[:MAX_EVALUATIONS]:
        seen[name] = seen.get(name, 0) + 1
        again = f" ({seen[name]})" if seen[name] > 1 else ""
        parts.append(part.assign(name=name + again))
    return pd.concat(parts, ignore_index=True)


def _edges(chosen: pd.DataFrame) -> np.ndarray:
    """Ends of bins: quantiles of the lengths, each once."""
    one = chosen[chosen["name"] == chosen["name"].iloc[0]]["tokens"].to_numpy()
    bins = max(1, min(MAX_BINS, len(one) // PER_BIN))
    return np.unique(np.quantile(one, np.linspace(0, 1, bins + 1)))


def _scores(chosen: pd.DataFrame) -> pd.DataFrame:
    """A row an evaluation and bin."""
    sums = chosen.groupby(["name", "bin"], sort=False).agg(
        nats=("nats", "sum"), bytes=("bytes", "sum"), documents=("nats", "size"),
        low=("tokens", "min"), high=("tokens", "max"), tokens=("tokens", "median"),
    ).reset_index()  # fmt: skip
    sums["bpb"] = sums["nats"] / math.log(2) / sums["bytes"]
    # All evaluations of a bin at one place.
    sums["tokens"] = sums.groupby("bin")["tokens"].transform("first")
    return sums.sort_values("bin")


def _differences(chosen: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """A row an evaluation (but the first) and bin: its difference, and twice its standard error."""
    first = chosen[chosen["name"] == names[0]].set_index("document")
    rows = []
    for name in names[1:]:
        other = chosen[chosen["name"] == name].set_index("document")
        both = first.join(other[["nats"]], how="inner", rsuffix="_other")
        for number, part in both.groupby("bin"):
            bits = (part["nats_other"] - part["nats"]).to_numpy() / math.log(2)
            size = part["bytes"].to_numpy()
            ratio = bits.sum() / size.sum()
            # Standard error of a ratio of two sums over documents.
            rest = bits - ratio * size
            n = len(rest)
            error = math.sqrt(n / (n - 1) * float((rest**2).sum())) / size.sum() if n > 1 else 0.0
            rows.append((name, int(number), float(part["tokens"].median()), n, ratio,
                         ratio - 2 * error, ratio + 2 * error))  # fmt: skip
    columns = ["name", "bin", "tokens", "documents", "difference", "low", "high"]
    made = pd.DataFrame(rows, columns=columns)
    made["tokens"] = made.groupby("bin")["tokens"].transform("first")
    return made.sort_values("bin")


def _drawn_scores(scores: pd.DataFrame, names: list[str], chosen: pd.DataFrame) -> Picture:
    x = _length_axis(scores)
    y = alt.Y("bpb:Q", title="bits per byte", scale=alt.Scale(zero=False),
              axis=alt.Axis(format=".2f", tickCount=6))  # fmt: skip
    tooltip = [
        alt.Tooltip("name:N", title="trial"), alt.Tooltip("bpb:Q", format=".5f"),
        alt.Tooltip("low:Q", title="from tokens", format=","),
        alt.Tooltip("high:Q", title="to tokens", format=","),
        alt.Tooltip("documents:Q", format=","),
    ]  # fmt: skip
    colour = alt.Color(
        "name:N", title=None, scale=alt.Scale(domain=names), legend=alt.Legend(columns=3)
    )
    base = alt.Chart(named("lengths")).encode(x=x, y=y, color=colour, tooltip=tooltip)
    chart = alt.layer(base.mark_line(), base.mark_point())
    one = scores[scores["name"] == names[0]]
    count = int((chosen["name"] == names[0]).sum())
    text = (
        f"{names[0]}: {number_of(count, 'document')} in {number_of(len(one), 'bin')} of as many "
        f"documents each: {one['bpb'].iloc[0]:.4f} bits per byte for the shortest "
        f"({one['low'].iloc[0]:,.0f} to {one['high'].iloc[0]:,.0f} tokens), "
        f"{one['bpb'].iloc[-1]:.4f} for the longest "
        f"({one['low'].iloc[-1]:,.0f} to {one['high'].iloc[-1]:,.0f})."
    )
    if len(names) > 1:
        text += f" The best {number_of(len(names), 'evaluation')} of as many documents are drawn."
    return picture("documents", _TITLE, text, chart, {"lengths": rows_of(scores)}, height_px=280)


def _drawn_differences(differences: pd.DataFrame, names: list[str]) -> Picture | NoPicture:
    if differences.empty:
        return NoPicture(name="document_differences", title=_DIFFERENCES,
                         why="no two evaluations share a document")  # fmt: skip
    x = _length_axis(differences)
    y = alt.Y("difference:Q", title="bpb above the best", axis=alt.Axis(format="+.4f"))
    colour = alt.Color("name:N", title=None, scale=alt.Scale(domain=names),
                       legend=alt.Legend(values=names[1:], columns=3))  # fmt: skip
    base = alt.Chart(named("differences")).encode(x=x, color=colour)
    bars = base.mark_rule(strokeWidth=1.5).encode(y=alt.Y("low:Q", title="bpb above the best"),
                                                  y2="high:Q")  # fmt: skip
    points = base.encode(y=y, tooltip=[
        alt.Tooltip("name:N", title="trial"),
        alt.Tooltip("difference:Q", title="bpb above the best", format="+.5f"),
        alt.Tooltip("low:Q", title="from", format="+.5f"),
        alt.Tooltip("high:Q", title="to", format="+.5f"),
        alt.Tooltip("documents:Q", format=","),
    ])  # fmt: skip
    zero = alt.Chart(named("zero")).mark_rule(style="zero").encode(y=alt.Y("at:Q"))
    chart = alt.layer(zero, bars, points.mark_line(), points.mark_point())
    text = (
        f"Bits per byte above {names[0]}, on the documents that both scored, with twice the "
        "standard error over documents. It says whether two artifacts differ, never whether one "
        "setting is better: that takes several seeds."
    )
    data = {"differences": rows_of(differences), "zero": rows_of(pd.DataFrame({"at": [0.0]}))}
    return picture("document_differences", _DIFFERENCES, text, chart, data, height_px=240)


def _length_axis(shown: pd.DataFrame) -> alt.X:
    low, high = float(shown["tokens"].min()), float(shown["tokens"].max())
    values = [
        m * 10**e for e in range(7) for m in (1, 2, 5) if 0.8 * low <= m * 10**e <= 1.25 * high
    ]
    return alt.X("tokens:Q", title="tokens of a document",
                 scale=alt.Scale(type="log", nice=False, padding=10),
                 axis=alt.Axis(format=",", values=values))  # fmt: skip
