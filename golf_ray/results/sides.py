"""The sides of a comparison: from what a user names to rows of results.

A side is one place or several, parted by commas: run folders, sweeps' trials (`nightly:7`,
`nightly:7,9,12`), the best of a sweep (`nightly:best`), a confirmation's label
(`nightly-confirm:baseline`), logs, ledgers; `*` and `?` stand for several.

Invariant: whatever makes a side other than seeds of one setting, or flatters its score, is said in
`notes` and `flattery` or is an error.
"""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from golf_ray.errors import UsageError, nearest
from golf_ray.results.limits import fits_of
from golf_ray.results.sources import resolved, storage_of
from golf_ray.sweeps.commands import command
from golf_ray.sweeps.power import Noise, optimism
from trainers.storage import Storage

if TYPE_CHECKING:
    import pandas as pd

    from golf_ray.results.reading import Results

_SETTING: Final = ("model", "train", "quantization", "adaptation")
"""Sections of the configuration that make a setting; the seed among them does not."""
_SEED: Final = "train.seed"
_BEST: Final = "best"
MOST_NAMED: Final = 3
"""Fields that a note names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Flattery:
    """A trial that was picked by its score, which flatters it."""

    sweep: str
    storage: str
    """That it is in."""
    trial: int
    num_trials: int
    num_trainings: int
    optimism_bpb: float
    """What its score is too good by on average, if no knob matters."""

    def line(self) -> str:
        """For people, with what to do about it."""
        of = f"{self.num_trials} trials"
        if self.num_trainings < self.num_trials:
            of += f" ({self.num_trainings} training{'s' * (self.num_trainings != 1)})"
        small = self.optimism_bpb < 5e-5
        about = "less than 0.0001" if small else f"about {self.optimism_bpb:.4f}"
        return (
            f"trial {self.trial} of {self.sweep} was picked as the best of {of} on the same "
            f"documents: its score flatters it by {about} bpb; fresh seeds say what it is worth: "
            + command("confirm", self.sweep, self.storage, "--top 1", "--seeds 3")
        )


@dataclass(kw_only=True, slots=True)
class Side:
    """What a user named."""

    name: str
    trials: pd.DataFrame
    """Rows of `schema.IDENTITY` and so on, with `place` and `key`, the training of a row."""
    records: list[dict[str, Any]]
    """One a row."""
    ledgers: list[tuple[str, int | None]]
    """Places whose per-document scores are of this side, with the trial where it is a sweep."""
    flattery: list[Flattery] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


# Names --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One place of a side, and which of its trials."""

    place: str
    """Path or URI."""
    name: str
    """As the user wrote it."""
    pick: tuple[str, ...] = ()
    """Numbers, a label or `best`; all of it where empty."""


def parse_side(text: str, storage: str) -> list[Part]:
    """The places that a side names.

    Args:
        storage: where sweeps are that are given by name.

    Raises:
        UsageError: a place is not there; the nearest sweep is named.
    """
    parts: list[Part] = []
    for piece in text.split(","):
        piece = piece.strip()
        if piece.isdecimal() and parts and parts[-1].pick and not os.path.exists(piece):
            parts[-1] = dataclasses.replace(parts[-1], pick=(*parts[-1].pick, piece))
        elif piece:
            parts += _part(piece, storage)
    if not parts:
        raise UsageError(f"'{text}' names nothing", "give a run folder, or NAME:TRIAL of a sweep")
    return list({(part.place, part.pick): part for part in parts}.values())


def _part(text: str, storage: str) -> list[Part]:
    head, pick = _split(text)
    picks = (pick,) if pick else ()
    if "://" in head or os.path.exists(head):
        return [Part(place=resolved(head), name=head, pick=picks)]
    if glob.has_magic(head):
        places = sorted(glob.glob(head))
        if not places:
            raise UsageError(f"nothing is named '{head}'", "check the path")
        return [Part(place=resolved(place), name=place, pick=picks) for place in places]
    sweeps = Storage(storage).child("sweeps")
    known = sweeps.names()
    if head not in known:
        remedy = nearest(head, known) if known else f"check the path, or --storage ({storage})"
        raise UsageError(f"there is no place and no sweep '{head}'", remedy)
    return [Part(place=sweeps.uri_of(head), name=head, pick=picks)]


def _split(text: str) -> tuple[str, str]:
    """`PLACE:PICK` in its two parts; a path or URI with a colon of its own stays whole."""
    head, colon, pick = text.rpartition(":")
    whole = not colon or not head or "/" in pick or os.path.exists(text)
    return (text, "") if whole or ("://" in head and "?" in head) else (head, pick)


# Reading ------------------------------------------------------------------------------------------


def load_sides(texts: Sequence[str], storage: str) -> list[Side]:
    """Read what a user named, side by side; per-document scores are left for later.

    Raises:
        UsageError: a place, trial or label is not there, or one side would hold several settings
            of a sweep that nobody named.
        StorageError: a place cannot be read.
    """
    from golf_ray.results.reading import load_results

    parts = [parse_side(text, storage) for text in texts]
    # Both sides may name one sweep.
    places = {part.place for side in parts for part in side}
    read = {place: load_results(place, intervals=False) for place in sorted(places)}
    return [_side(text, side, read) for text, side in zip(texts, parts, strict=True)]


def _side(text: str, parts: Sequence[Part], read: Mapping[str, Results]) -> Side:
    import pandas as pd

    side = Side(name=text, trials=pd.DataFrame(), records=[], ledgers=[])
    frames = []
    for part in parts:
        results = read[part.place]
        side.notes += results.problems
        rows = _picked(part, results)
        frame = results.trials.iloc[rows]
        key = _keys(frame, part.place)
        frames.append(frame.assign(place=part.place, key=key))
        side.records += [results.records[i] for i in rows]
        if not len(results.trials):
            side.ledgers.append((part.place, None))
        side.ledgers += [
            (part.place, int(row.trial))
            for row in frame.itertuples()
            if row.kind == "trial" and row.status == "done" and not pd.isna(row.evaluation)
        ]
        side.flattery += _flattery(part, results, frame)
    side.trials = pd.concat(frames, ignore_index=True)
    side.notes += _mixed(side)
    return side


def _picked(part: Part, results: Results) -> list[int]:
    """Rows of the trials that a part names."""
    frame = results.trials
    every = list(range(len(frame)))
    if not part.pick:
        _require_one_setting(part, results)
        return every
    if not results.plans and not (frame["kind"] == "trial").any():
        raise UsageError(
            f"'{part.place}' is no sweep, so ':{part.pick[0]}' names nothing in it",
            "give the place alone",
        )
    if frame["source"].nunique() > 1:
        raise UsageError(f"'{part.place}' holds several sweeps", "name one")
    rows: list[int] = []
    labels = [str(label) for label in frame["label"].dropna().unique()]
    numbers = {int(n): i for i, n in enumerate(frame["trial"]) if n is not None}
    for pick in part.pick:
        if pick.isdecimal():
            if int(pick) not in numbers:
                there = f"it has {min(numbers)} to {max(numbers)}" if numbers else "it has none yet"
                raise UsageError(
                    f"'{part.place}' has no trial {pick}", "; ".join([there, *results.problems[:1]])
                )
            rows.append(numbers[int(pick)])
        elif pick == _BEST and _BEST not in labels:
            rows.append(numbers[_ranked(part, results)[0]])
        elif pick in labels:
            rows += [i for i in every if frame["label"].iloc[i] == pick]
        else:
            raise UsageError(
                f"'{part.place}' has no label '{pick}'", nearest(pick, [*labels, _BEST])
            )
    return list(dict.fromkeys(rows))


def _require_one_setting(part: Part, results: Results) -> None:
    """A sweep by its name alone is one setting only if nothing but the seed was varied."""
    frame = results.trials
    labels = [str(label) for label in frame["label"].dropna().unique()]
    if len(labels) > 1:
        raise UsageError(
            f"'{part.name}' holds several settings", f"name one, as {part.name}:{labels[0]}"
        )
    knobs = [k for k in results.knobs if k != _SEED and frame[k].nunique(dropna=False) > 1]
    if knobs and (frame["kind"] == "trial").all():
        raise UsageError(
            f"'{part.name}' holds {len(frame)} trials of different knobs",
            f"name trials, as {part.name}:7, or {part.name}:{_BEST}",
        )


def _keys(frame: pd.DataFrame, place: str) -> list[str]:
    """What tells the training of each row from others."""
    import pandas as pd

    keys = []
    for i, (training, checkpoint) in enumerate(
        zip(frame["training"], frame["checkpoint"], strict=True)
    ):
        known = next((name for name in (training, checkpoint) if not pd.isna(name)), None)
        keys.append(str(known) if known is not None else f"{place} {frame['source'].iloc[i]} {i}")
    return keys


def _ranked(part: Part, results: Results) -> list[int]:
    """Trials that may be the best of a sweep, the best first."""
    plan = results.plans.get(str(results.trials["source"].iloc[0]), {})
    objective = (plan.get("objectives") or ("ttt_bpb",))[0]
    frame = within_limits(results.trials)
    frame = frame[frame[objective].notna()]
    if not len(frame):
        raise UsageError(f"'{part.place}' has no trial that is done and within the limits",
                         "name a trial by its number")  # fmt: skip
    return [int(n) for n in frame.sort_values([objective, "trial"], kind="stable")["trial"]]


def within_limits(frame: pd.DataFrame) -> pd.DataFrame:
    """Trials that are done and within the limits."""
    return frame[(frame["status"] == "done") & fits_of(frame)]


def _flattery(part: Part, results: Results, frame: pd.DataFrame) -> list[Flattery]:
    """Whether the best of a search is among a part's trials."""
    if not part.pick or frame["label"].notna().any():
        return []
    order = _ranked(part, results) if len(within_limits(results.trials)) else []
    if len(order) < 2 or order[0] not in frame["trial"].tolist():
        return []
    counted = results.trials[results.trials["trial"].isin(order)]
    num_trainings = max(1, counted["training"].nunique())
    return [
        Flattery(
            sweep=str(frame["source"].iloc[0]),
            storage=storage_of(Storage(part.place)).uri,
            trial=order[0],
            num_trials=len(order),
            num_trainings=num_trainings,
            optimism_bpb=optimism(Noise(), num_trials=len(order), num_trainings=num_trainings),
        )
    ]


def _mixed(side: Side) -> list[str]:
    """A note if a side is not seeds of one setting."""
    values: dict[str, set[str]] = {}
    configs = [record["config"] for record in side.records if record.get("config")]
    for config in configs:
        for section in _SETTING:
            for name, value in config.get(section, {}).items():
                values.setdefault(f"{section}.{name}", set()).add(repr(value))
    other = [name for name, found in values.items() if len(found) > 1 and name != _SEED]
    if not other:
        return []
    more = f" and {len(other) - MOST_NAMED} more" if len(other) > MOST_NAMED else ""
    return [
        f"{side.name} is not one setting: {', '.join(other[:MOST_NAMED])}{more} differ, so its "
        "spread is not that of seeds"
    ]
