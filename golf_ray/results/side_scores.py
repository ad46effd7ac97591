"""The scores of the sides of a comparison: a value for each training, and frames of documents.

Invariant: trials that share a training are one value, their mean; scores of different texts are
never set against each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from golf_ray.errors import UsageError, nearest
from golf_ray.metric import LN2
from golf_ray.results.comparing import Scores
from golf_ray.results.describing import TEXTS

if TYPE_CHECKING:
    import pandas as pd

    from golf_ray.results.sides import Side

SCORES: Final = ("ttt_bpb", "int6_bpb", "val_bpb", "final_ttt_bpb")
"""What may be compared; of the first three the first that all sides have, where none is named."""


# Scores -------------------------------------------------------------------------------------------


def choose_score(sides: Sequence[Side], wanted: str | None) -> str | None:
    """The score to compare: the one that is asked for, or the first that all sides have.

    Returns:
        its column; None where no score is in all sides.

    Raises:
        UsageError: there is no such score, or a side has none.
    """
    if wanted is not None and wanted not in SCORES:
        raise UsageError(f"'{wanted}' is no score", nearest(wanted, SCORES))
    for side in sides:
        if wanted is not None and not _has(side, wanted):
            raise UsageError(f"{side.name} has no {wanted}", _had(side))
    if wanted is not None:
        return wanted
    return next((s for s in SCORES[:3] if all(_has(side, s) for side in sides)), None)


def scores_of(side: Side, score: str) -> Scores:
    """A side's scores, a value for each training; rows without one are left out and noted.

    Raises:
        UsageError: a side has none.
    """
    import pandas as pd

    frame = side.trials
    frame = frame[(frame["status"] == "done") & frame[score].notna()]
    if not len(frame):
        raise UsageError(f"{side.name} has no {score}", _had(side))
    if len(frame) < len(side.trials):
        left = len(side.trials) - len(frame)
        side.notes.append(f"{side.name}: {left} of {len(side.trials)} have no {score}")
    groups = frame.groupby("key", sort=False)
    if len(groups) < len(frame):
        side.notes.append(
            f"{side.name}: {len(frame)} trials are of {len(groups)} "
            f"training{'s' * (len(groups) != 1)}; each counts once, by the mean of its trials"
        )
    nats = None
    if score == "ttt_bpb" and frame["ttt_loss_nats"].notna().all():
        nats = tuple(float(v) for v in groups["ttt_loss_nats"].mean())
    seeds = groups["seed"].first()
    return Scores(
        name=side.name,
        values=tuple(float(v) for v in groups[score].mean()),
        nats=nats,
        bpb_per_nat=_bpb_per_nat(frame, score),
        seeds=tuple(None if pd.isna(seed) else int(seed) for seed in seeds),
        trainings=tuple(str(key) for key in groups.groups),
    )


def require_same_text(sides: Sequence[Side], score: str) -> None:
    """See that scores are of the same text, where that is known.

    Raises:
        UsageError: they are of other numbers of bytes.
    """
    if score not in TEXTS:
        return
    first: tuple[str, int] | None = None
    for side in sides:
        for count in side.trials[TEXTS[score][1]][side.trials[score].notna()].dropna().unique():
            if first is not None and first[1] != int(count):
                raise UsageError(
                    f"{score} of {first[0]} is of {first[1]:,} bytes and that of {side.name} of "
                    f"{int(count):,}",
                    "score the same documents",
                )
            first = first or (side.name, int(count))


def common_notes(sides: Sequence[Side], score: str) -> list[str]:
    """What makes the sides' scores of different kinds, or not independent."""
    notes = []
    for column, what in (("data", "data sets"), ("weights", "weights")):
        found = {v for side in sides for v in side.trials[column].dropna().unique()}
        if len(found) > 1 and not (column == "weights" and score == "val_bpb"):
            notes.append(f"the sides are of different {what}: {', '.join(sorted(map(str, found)))}")
    keys = [set(side.trials["key"]) for side in sides]
    for side, mine in zip(sides[1:], keys[1:], strict=True):
        if mine & keys[0] and mine != keys[0]:
            notes.append(
                f"{side.name} and {sides[0].name} share {len(mine & keys[0])} of their trainings, "
                "and the test takes them for different ones"
            )
    return notes


def _bpb_per_nat(frame: pd.DataFrame, score: str) -> float | None:
    if score not in TEXTS:
        return None
    tokens, num_bytes = (frame[name].dropna() for name in TEXTS[score])
    if not len(tokens) or not len(num_bytes) or not int(num_bytes.iloc[0]):
        return None
    return int(tokens.iloc[0]) / int(num_bytes.iloc[0]) / LN2


def _has(side: Side, score: str) -> bool:
    return bool((side.trials[score].notna() & (side.trials["status"] == "done")).any())


def _had(side: Side) -> str:
    known = [score for score in SCORES if _has(side, score)]
    if known:
        return "it has " + ", ".join(known)
    statuses = side.trials["status"].value_counts()
    return (
        "its trials are " + ", ".join(f"{n} {s}" for s, n in statuses.items())
        if len(statuses)
        else "it has none"
    )


# Documents ----------------------------------------------------------------------------------------


def documents_of(side: Side) -> list[pd.DataFrame]:
    """Per-document scores of a side's artifacts, a frame for each; none where none are kept.

    Raises:
        StorageError: a place cannot be read.
    """
    from golf_ray.results.documents import read_ledgers
    from golf_ray.results.sources import find_places, read_place

    ledgers = []
    for place, trial in side.ledgers:
        for one in find_places(place):
            found = read_place(one, side.name, side.notes.append)
            ledgers += [own for own in found.ledgers if own.trial == trial]
    frame = read_ledgers(ledgers, side.notes.append)
    return [rows for _, rows in frame.groupby(["source", "evaluation"], sort=False, dropna=False)]


def same_documents(
    a: Sequence[pd.DataFrame], b: Sequence[pd.DataFrame]
) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """Of a trial's scores on a sample and on everything, those that the other side has too.

    Returns:
        the pair of most documents; the largest of either where none are the same; None where a
        side has none.
    """
    if not a or not b:
        return None
    pairs = [(len(x), x, y) for x in a for y in b if set(x["document"]) == set(y["document"])]
    if pairs:
        return max(pairs, key=lambda pair: pair[0])[1:]
    return max(a, key=len), max(b, key=len)
