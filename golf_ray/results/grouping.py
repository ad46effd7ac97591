"""Trials as groups: one row for those that differ in their seed alone, with means and intervals.

What is independent is a training. Trials that share one (they differ in quantisation or in
adaptation, or are the same again) are averaged first, and the means of trainings are what a
group's mean, sample standard deviation (n - 1) and 95% interval are of; n counts trainings. A
trial of a stored checkpoint counts by its checkpoint, and one that names neither, as a log of the
public program, by itself.

Trials that are done count alone; those that failed or are over a limit are counted beside them.

Invariant: n trials of one training are never n values; fewer than two values have no standard
deviation and no interval.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final

import pandas as pd

from golf_ray import stats
from golf_ray.results.cells import values_and_missing
from golf_ray.results.describing import COUNTS, SCORES, STATISTICS, TEXTS
from golf_ray.results.schema import FINAL, NOT_FINAL

SEED: Final = "train.seed"
_NO_MATTER: Final = ("name", "data.dir")
"""Fields that runs of one setting may differ in, beside their seeds."""


def seed_keys(knobs: Sequence[str]) -> list[str]:
    """The columns that are alike in trials that differ in their seed alone."""
    return ["source", "label", *(knob for knob in knobs if knob != SEED)]


def settings_of(frame: pd.DataFrame, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is the same for rows that may differ in their seed alone, beside the knobs.

    Of a sweep's trial that is the sweep; of a run folder or a log its configuration, as each is a
    source by itself. Where the configuration is not known as a whole, a row is alike to no other.

    Args:
        records: one a row.
    """
    sources, kinds = frame["source"].fillna("").tolist(), frame["kind"].fillna("").tolist()
    whole = frame["config_fingerprint"].notna().tolist()
    return [
        source if kind == "trial" or not known else _setting(record["config"])
        for source, kind, known, record in zip(sources, kinds, whole, records, strict=True)
    ]


def grouped(
    frame: pd.DataFrame, by: Sequence[str], settings: Sequence[str] | None = None
) -> pd.DataFrame:
    """One row a group, in the order in which groups first appear.

    A missing value of a column that is grouped by is one of its values.

    Args:
        frame: trials, in nullable types.
        by: names of columns.
        settings: what a group has in common in the place of its source, one a row; the source of
            a group that has several is missing.
    """
    keys = [_key_values(frame[name]) for name in by if settings is None or name != "source"]
    members = _members([*keys, *([] if settings is None else [list(settings)])])
    firsts = [rows[0] for rows in members]
    columns: dict[str, Any] = {name: frame[name].iloc[firsts].array for name in by}
    if settings is not None and "source" in columns:
        sources = frame["source"].tolist()
        own = [sources[r[0]] if len({sources[i] for i in r}) == 1 else None for r in members]
        columns["source"] = pd.array(own, dtype="string")
    columns.update(_counts(frame, members))
    units, done = _units(frame), (frame["status"] == "done").fillna(False).tolist()
    for score in SCORES:
        values, missing = values_and_missing(frame[score])
        plain = values.tolist()
        usable = [
            is_done and not gone and math.isfinite(value)
            for is_done, gone, value in zip(done, missing.tolist(), plain, strict=True)
        ]
        texts = _texts(frame, score)
        said = [
            _statistics(
                [(units[i], plain[i]) for i in rows if usable[i]],
                one_text=len({texts[i] for i in rows if usable[i]} - {None}) < 2,
            )
            for rows in members
        ]
        for end in STATISTICS:
            kind = "Int64" if end == "n" else "Float64"
            columns[f"{score}_{end}"] = pd.array([one[end] for one in said], dtype=kind)
    return pd.DataFrame(columns)


def without_repeats(frame: pd.DataFrame) -> pd.DataFrame:
    """Groups without the n of scores for which it is the group's own everywhere, or 0."""
    said = (frame["n"].tolist(), [0] * len(frame))
    repeated = [score for score in SCORES if frame[f"{score}_n"].tolist() in said]
    return frame.drop(columns=[f"{score}_n" for score in repeated])


def mean_by_training(values: Sequence[tuple[Any, float]]) -> list[float]:
    """Means of the values of each training, in the order in which trainings first appear."""
    found: dict[Any, list[float]] = defaultdict(list)
    for unit, value in values:
        found[unit].append(value)
    return [math.fsum(own) / len(own) for own in found.values()]


def _setting(config: Mapping[str, Any]) -> str:
    fields = {
        f"{section}.{name}" if name else section: value
        for section, part in config.items()
        for name, value in (part.items() if isinstance(part, Mapping) else (("", part),))
    }
    kept = {k: v for k, v in fields.items() if not k.endswith("seed") and k not in _NO_MATTER}
    return json.dumps(kept, sort_keys=True)


def _key_values(column: pd.Series[Any]) -> list[Any]:
    values, missing = values_and_missing(column)
    return list(zip(missing.tolist(), values.tolist(), strict=True))


def _members(keys: Sequence[list[Any]]) -> list[list[int]]:
    members: dict[Any, list[int]] = defaultdict(list)
    for place, key in enumerate(zip(*keys, strict=True)):
        members[key].append(place)
    return list(members.values())


def _counts(frame: pd.DataFrame, members: Sequence[Sequence[int]]) -> Mapping[str, Any]:
    statuses = frame["status"].fillna("").tolist()
    sources, numbers = frame["source"].fillna("").tolist(), frame["trial"].tolist()
    units = _units(frame)
    found: dict[str, list[Any]] = {column.name: [] for column in COUNTS}
    for rows in members:
        own = [statuses[i] for i in rows]
        found["n"].append(len({units[i] for i in rows if statuses[i] == "done"}))
        for status in (*FINAL, *NOT_FINAL):
            found[status].append(own.count(status))
        several = len({sources[i] for i in rows}) > 1
        found["trials"].append(", ".join(_name(sources[i], numbers[i], several) for i in rows))
    return {column.name: pd.array(found[column.name], dtype=column.type) for column in COUNTS}


def _name(source: str, number: Any, several: bool) -> str:
    if pd.isna(number):
        return source
    return f"{source}:{number}" if several else str(number)


def _units(frame: pd.DataFrame) -> list[Any]:
    """What each trial is an observation of."""
    names = ("training", "checkpoint", "source", "trial")
    columns = [frame[name].fillna(0 if name == "trial" else "").tolist() for name in names]
    return [
        training or checkpoint or (source, trial, "" if trial else place)
        for place, (training, checkpoint, source, trial) in enumerate(zip(*columns, strict=True))
    ]


def mixed_texts(frame: pd.DataFrame, groups: pd.DataFrame) -> list[str]:
    """What to say where groups have scores of different texts and so no mean of them."""
    told = []
    for score in SCORES:
        lost = (groups[f"{score}_n"] > 0) & groups[f"{score}_mean"].isna()
        if lost.any():
            texts = sorted({text for text in _texts(frame, score) if text is not None})
            told.append(
                f"no mean of {score} where a group has scores of different texts "
                f"({', '.join(f'{text:,}' for text in texts[:4])} bytes)"
            )
    return told


def _texts(frame: pd.DataFrame, score: str) -> list[Any]:
    """What tells the texts of a score from one another: bytes scored; None where not known."""
    _, column = TEXTS.get(score, ("", ""))
    if column not in frame.columns:
        return [None] * len(frame)
    return [None if pd.isna(value) else int(value) for value in frame[column].tolist()]


def _statistics(values: Sequence[tuple[Any, float]], *, one_text: bool = True) -> dict[str, Any]:
    means = mean_by_training(values)
    if not means:
        return dict.fromkeys(STATISTICS) | {"n": 0}
    if not one_text:
        # A mean of scores of different texts is of nothing.
        return dict.fromkeys(STATISTICS) | {"n": len(means)}
    found = stats.interval(means)
    return {"n": found.n, "mean": found.mean, "sd": found.sd, "low": found.low, "high": found.high}
