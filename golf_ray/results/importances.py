"""Which knobs of a sweep matter, and which of them cannot be told from noise.

The analysis is the regression that `golf_ray.sweeps.power` plans with: knobs after training on what
trials differ by within their training, then training knobs on the means of trainings; with one
trial a training, all knobs at once. A number has a straight and a curved part, a category a part
for each value. The importance of a knob is the share of the variance of scores that is lost if its
parts are left out; what only several knobs together do is in nobody's.

Optuna's PED-ANOVA was tried. It is made for functions without noise: of 12 trainings with 4 trials
each it does not tell a training knob of 0.004 bpb from noise of 0.00075, which is 5 standard
errors, and it has no way to take a training's luck out for the other knobs.

Invariant: trials that share a training stay together when weights are drawn or luck is dealt out
anew; a knob of too few points has no number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from golf_ray.errors import UsageError, nearest
from golf_ray.results.limits import fits_of

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

LEVEL: Final = 0.90
"""Of the interval of an importance."""
ALPHA: Final = 0.05
"""Chance that a knob without effect is above its noise."""
FREE: Final = 5
"""Degrees of freedom that the noise must be known by."""
LOG_RATIO: Final = 30.0
"""A number above 0 that spans so much is taken by its logarithm."""

MATTERS: Final = "matters"
NOISE: Final = "not told apart from noise"
FIXED: Final = "has one value"


def importances(
    frame: pd.DataFrame,
    knobs: Sequence[str],
    objective: str = "ttt_bpb",
    *,
    num_bootstrap: int = 200,
    num_shuffles: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """How much each knob of a sweep matters.

    Trials that are not done, over a limit or without a finite score are left out.

    Args:
        frame: rows of one sweep as `schema` has them; `training` (else `group`) tells which trials
            share one.
        knobs: columns of it.
        objective: the column that the knobs are to explain.
        num_bootstrap: draws of weights (Rubin's Bayesian bootstrap), one a training, for the
            interval.
        num_shuffles: dealings of what the knobs do not explain, for the noise.
        seed: of both.

    Returns:
        a row a knob, the most important first: `knob`; `importance`, its share of the variance;
        `low` and `high` of its 90% interval; `noise`, what a knob without effect stays below with
        95%; `effect`, the difference between its best and its worst value in the objective's unit;
        `points`, the trials or trainings that it was tried with; `verdict`.

    Raises:
        UsageError: a column is not there.
    """
    import pandas as pd

    for name in (*knobs, objective):
        if name not in frame.columns:
            raise UsageError(f"there is no column '{name}'", nearest(name, map(str, frame.columns)))
    used = _usable(frame, objective)
    groups = _groups(used)
    found: dict[str, dict[str, Any]] = {k: {"verdict": FIXED} for k in knobs}
    varied = [k for k in knobs if used[k].nunique(dropna=False) > 1]
    design = _design(used, varied, groups, found)
    if not len(used):
        found = {k: {"verdict": "there is no trial that is done"} for k in knobs}
    if design.strata:
        scores = used[objective].to_numpy(np.float64)
        _measure(design, scores, (num_bootstrap, num_shuffles), seed, found)
    columns = ["knob", "importance", "low", "high", "noise", "effect", "points", "verdict"]
    table = pd.DataFrame([{"knob": k, **found[k]} for k in knobs], columns=columns)
    numbers = dict.fromkeys(columns[1:6], "Float64")
    table = table.astype({"knob": "string", **numbers, "points": "Int64", "verdict": "string"})
    return table.sort_values("importance", ascending=False, kind="stable", ignore_index=True)


def _usable(frame: pd.DataFrame, objective: str) -> pd.DataFrame:
    good = np.isfinite(frame[objective].astype("Float64").to_numpy(np.float64, na_value=np.nan))
    if "status" in frame.columns:
        good &= (frame["status"] == "done").fillna(False).to_numpy(bool)
    good &= fits_of(frame).to_numpy(bool)
    return frame[good].reset_index(drop=True)


def _groups(frame: pd.DataFrame) -> NDArray[np.int64]:
    """The number of each row's training."""
    for name in ("training", "group"):
        if name in frame.columns and len(frame) and frame[name].notna().all():
            codes, _ = frame[name].factorize()
            return np.asarray(codes, dtype=np.int64)
    return np.arange(len(frame))


# Design -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stratum:
    """Knobs that are told by the same differences: of trainings, or of trials within them."""

    within: bool
    knobs: tuple[str, ...]
    parts: tuple[Array, ...]
    """[rows, parts] of each knob; of a stratum of trainings, a row a training."""
    points: int
    degrees: int
    """Of the noise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Design:
    groups: NDArray[np.int64]
    strata: tuple[_Stratum, ...]
    """Within trainings first."""


def _design(
    frame: pd.DataFrame,
    knobs: Sequence[str],
    groups: NDArray[np.int64],
    found: dict[str, dict[str, Any]],
) -> _Design:
    """Strata of knobs that have points enough; `found` is told of the others."""
    num, num_groups = len(frame), len(np.unique(groups))
    _, firsts = np.unique(groups, return_index=True)
    shared = [k for k in knobs if (frame[k].groupby(groups).nunique(dropna=False) <= 1).all()]
    strata = []
    if num_groups == num:
        # Nobody shares a training.
        sorts = [(False, list(knobs), num, num - 1, "trials")]
    else:
        own = [k for k in knobs if k not in shared]
        sorts = [
            (True, own, num, num - num_groups, "trials"),
            (False, shared, num_groups, num_groups - 1, "trainings"),
        ]
    for within, names, points, degrees, what in sorts:
        rows = frame if within or num_groups == num else frame.iloc[firsts]
        for curved in (True, False):
            parts = [_parts(rows[k], curved) for k in names]
            free = degrees - sum(part.shape[1] for part in parts)
            if names and free >= FREE:
                strata.append(
                    _Stratum(within=within, knobs=tuple(names), parts=tuple(parts), points=points,
                             degrees=free)
                )  # fmt: skip
                break
        else:
            why = f"too few: {points} {what} for {len(names)} knob{'s' * (len(names) != 1)}"
            found.update({k: {"verdict": why, "points": points} for k in names})
    return _Design(groups=groups, strata=tuple(strata))


def _parts(values: pd.Series[Any], curved: bool) -> Array:
    """A knob's columns of the regression; 0 where a knob that goes with another is missing."""
    import pandas as pd

    there = values.notna().to_numpy(bool)
    seen = values.dropna()
    columns = [] if there.all() else [there.astype(np.float64)]
    kinds = pd.api.types
    if kinds.is_numeric_dtype(values.dtype) and not kinds.is_bool_dtype(values.dtype):
        x = seen.to_numpy(np.float64)
        if x.min() > 0 and x.max() / x.min() >= LOG_RATIO:
            x = np.log(x)
        if x.max() > x.min():
            # Between -1 and 1, where a number and its square do not run together.
            x = 2 * (x - x.min()) / (x.max() - x.min()) - 1
            shapes = [x, x**2 - np.mean(x**2)] if curved and len(np.unique(x)) > 2 else [x]
            columns += [_filled(shape, there) for shape in shapes]
    else:
        names = sorted(seen.astype(str).unique())
        columns += [_filled((seen.astype(str) == n).to_numpy(np.float64), there) for n in names[1:]]
    return np.stack(columns, axis=1)


def _filled(values: Array, there: NDArray[np.bool_]) -> Array:
    column = np.zeros(len(there))
    column[there] = values
    return column


# Measuring ----------------------------------------------------------------------------------------


def _measure(
    design: _Design,
    scores: Array,
    counts: tuple[int, int],
    seed: int,
    found: dict[str, dict[str, Any]],
) -> None:
    """Fill in what was found of the knobs that have points enough."""
    generator = np.random.default_rng(seed)
    whole = _fit(design, scores, np.ones(len(scores)))
    drawn: dict[str, list[float]] = {knob: [] for knob in whole}
    for _ in range(counts[0]):
        weights = draw_weights(design.groups, generator)
        for knob, one in _fit(design, scores, weights).items():
            drawn[knob].append(one.share)
    noise = _noise(design, whole, counts[1], generator)
    points = {knob: s.points for s in design.strata for knob in s.knobs}
    for knob, one in whole.items():
        # Drawn weights leave fewer trials to tell by, which looks like more structure than there
        # is: that is taken off.
        many = np.array(drawn[knob] or [one.share])
        edges = np.quantile(many, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) + one.share - many.mean()
        low, high = np.clip(edges, 0, 1)
        found[knob] = {
            "importance": one.share,
            "low": min(low, one.share),
            "high": max(high, one.share),
            "noise": noise[knob],
            "effect": one.effect,
            "points": points[knob],
            "verdict": MATTERS if one.share > noise[knob] else NOISE,
        }


def draw_weights(groups: NDArray[np.int64], generator: np.random.Generator) -> Array:
    """A weight for each row: one for all trials of a training, as they share its luck.

    Where there are too few trainings to draw from, no training knob is judged, and what other
    knobs are judged by is free of that luck: each trial has a weight of its own.
    """
    num_groups = int(groups.max()) + 1
    if num_groups <= FREE:
        return generator.exponential(size=len(groups))
    return generator.exponential(size=num_groups)[groups]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fitted:
    """A knob in a fit."""

    share: float
    effect: float
    stratum: int
    residuals: Array
    """Of its stratum."""
    per_f: float
    """The share that an F of 1 is."""


def _fit(design: _Design, scores: Array, weights: Array) -> dict[str, _Fitted]:
    """All knobs by weighted least squares."""
    found = {}
    total = float(weights @ (scores - np.average(scores, weights=weights)) ** 2)
    left = scores
    for place, stratum in enumerate(design.strata):
        x, y, w = _rows(design, stratum, left, weights)
        inverse = np.linalg.pinv((x.T * w) @ x, hermitian=True)
        beta = inverse @ (x.T @ (w * y))
        residuals = y - x @ beta
        variance = float(w @ residuals**2) / stratum.degrees
        # Of trainings, each difference counts for all of its trials.
        times = 1.0 if len(y) == len(scores) else len(scores) / len(y)
        for knob, part, columns in zip(
            stratum.knobs, stratum.parts, _slices(stratum.parts), strict=True
        ):
            lost = float(
                beta[columns] @ np.linalg.pinv(inverse[columns, columns], hermitian=True)
                @ beta[columns]
            )  # fmt: skip
            found[knob] = _Fitted(
                share=min(1.0, lost * times / total) if total else 0.0,
                effect=float(np.ptp(part @ beta[columns])),
                stratum=place,
                residuals=residuals,
                per_f=part.shape[1] * variance * times / total if total else 0.0,
            )
        if stratum.within:
            raw = np.concatenate(stratum.parts, axis=1)
            left = scores - raw @ beta[: raw.shape[1]]
    return found


def _rows(
    design: _Design, stratum: _Stratum, scores: Array, weights: Array
) -> tuple[Array, Array, Array]:
    """Columns, scores and weights of a stratum; the last column is the mean's."""
    x = np.concatenate(stratum.parts, axis=1)
    groups = design.groups
    if stratum.within:
        return x - _means(x, groups)[groups], scores - _means(scores, groups)[groups], weights
    if len(x) < len(scores):
        scores, weights = _means(scores, groups), _means(weights, groups)
    return np.column_stack((x, np.ones(len(x)))), scores, weights


def _means(values: Array, groups: NDArray[np.int64]) -> Array:
    """Mean over the rows of each group; weights are the same in one."""
    counts = np.bincount(groups).astype(np.float64)
    sums = np.zeros((len(counts), *values.shape[1:]))
    np.add.at(sums, groups, values)
    return sums / counts.reshape(-1, *[1] * (values.ndim - 1))


def _slices(parts: Sequence[Array]) -> list[slice]:
    ends = np.cumsum([part.shape[1] for part in parts]).tolist()
    return [slice(end - part.shape[1], end) for end, part in zip(ends, parts, strict=True)]


def _noise(
    design: _Design, whole: Mapping[str, _Fitted], count: int, generator: np.random.Generator
) -> dict[str, float]:
    """The share that a knob without effect stays below: the F that it gets with what all knobs
    leave unexplained dealt out anew (ter Braak, 1992), among trainings or within each."""
    found = {}
    for place, stratum in enumerate(design.strata):
        one = next(fitted for fitted in whole.values() if fitted.stratum == place)
        x, _, _ = _rows(design, stratum, np.zeros(len(design.groups)), np.ones(len(design.groups)))
        dealt = deal(one.residuals, design.groups if stratum.within else None, count, generator)
        inverse = np.linalg.pinv(x.T @ x, hermitian=True)
        beta = dealt @ x @ inverse
        variance = ((dealt - beta @ x.T) ** 2).sum(axis=1) / stratum.degrees
        for knob, columns in zip(stratum.knobs, _slices(stratum.parts), strict=True):
            middle = np.linalg.pinv(inverse[columns, columns], hermitian=True)
            part = beta[:, columns]
            lost = ((part @ middle) * part).sum(axis=1) / part.shape[1]
            f = np.divide(lost, variance, out=np.zeros_like(lost), where=variance > 0)
            found[knob] = float(np.quantile(f, 1 - ALPHA)) * whole[knob].per_f
    return found


def deal(
    values: Array, groups: NDArray[np.int64] | None, count: int, generator: np.random.Generator
) -> Array:
    """[count, values]: dealt out anew; where groups are given, each value stays in its own."""
    keys = generator.random((count, len(values)))
    if groups is None:
        return np.asarray(values[np.argsort(keys, axis=1)])
    # In order of groups, and of chance within one.
    places = np.argsort(groups, kind="stable")
    order = np.argsort(groups + keys, axis=1)
    dealt = np.empty((count, len(values)))
    dealt[:, places] = values[order]
    return dealt
