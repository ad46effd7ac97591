"""Results of sweeps, runs, ledgers and public logs as three tables: `load_results`.

Reads what others write, also while they write it, and changes nothing. Loads neither torch nor Ray.

Invariant: every record that can be read is one row of `trials`, and everything that cannot is one
line of `problems`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from golf_ray.errors import GolfRayError, UsageError
from golf_ray.results import sources
from golf_ray.results.columns import knob_column, make_column
from golf_ray.results.migration import Record
from golf_ray.results.schema import DOCUMENTS, IDENTITY, MEASURES, types_of
from golf_ray.results.sources import Found, Place
from golf_ray.results.timeline import held_gpu_s
from trainers.storage import Storage, shown


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """What was read."""

    trials: pd.DataFrame
    """A row for everything that was trained or scored: `schema.IDENTITY`, the knobs by their dotted
    names, then `schema.MEASURES`."""
    intervals: pd.DataFrame
    """Training curves: `schema.INTERVALS`."""
    documents: pd.DataFrame
    """Scores document by document: `schema.DOCUMENTS`; empty where not asked for."""
    knobs: tuple[str, ...]
    """Searched fields of all sweeps, in the order in which they first appear."""
    records: tuple[dict[str, Any], ...]
    """The records, one a row of `trials`; not to be changed, as they share parts."""
    plans: dict[str, dict[str, Any]]
    """What each sweep set out to do, plain, by source."""
    folders: dict[str, Storage]
    """Where each sweep is kept, by source."""
    problems: tuple[str, ...]
    """One line for each thing that could not be read."""


def load_results(*places: str | Path, intervals: bool = True, documents: bool = False) -> Results:
    """Read results of any kind into pandas data frames.

    A place is a path or a URI of: a sweep's folder (`STORAGE/sweeps/NAME`), a storage with all its
    sweeps, a run folder of `golf-ray train`, a folder of several of these, a ledger of
    `golf-ray eval --ledger` (for `documents`), or a log file of the public program. It may be
    written meanwhile.

        results = golf_ray.load_results("golf-sweeps/sweeps/nightly", "runs/first")
        results.trials.sort_values("ttt_bpb")[["trial", *results.knobs, "ttt_bpb"]].head()

    Sweeps that search different fields stand in one table: a field that one did not search has the
    value that its configuration gives it.

    Args:
        intervals: read training curves.
        documents: read per-document scores of test-time training.

    Returns:
        the tables, and a line for each thing that could not be read.

    Raises:
        UsageError: no place was given, or the only one holds no results.
        StorageError: the only one cannot be read.
    """
    problems: list[str] = []
    found = [
        read
        for place, name in _named(_found(places, problems))
        if (read := _read(place, name, problems)) is not None
    ]
    records = [record for one in found for record in one.records]
    knobs = knobs_of(records)
    # Files are read and parsed outside of Python's lock: meanwhile the table of trials is made.
    with ThreadPoolExecutor(1) as pool:
        later: list[str] = []
        curves = pool.submit(_intervals, found if intervals else [], later)
        trials = make_trials(
            records,
            source=[one.source for one in found for _ in one.records],
            kind=[one.kind for one in found for _ in one.records],
            knobs=knobs,
            problems=problems,
        )
    problems += later
    return Results(
        trials=trials,
        intervals=curves.result(),
        documents=_documents(found if documents else [], problems),
        knobs=knobs,
        records=tuple(records),
        plans={one.source: one.plan for one in found if one.plan is not None},
        folders={one.source: one.folder for one in found if one.folder is not None},
        problems=tuple(problems),
    )


def with_config_columns(results: Results, names: Iterable[str]) -> pd.DataFrame:
    """The table of trials with fields of the configuration as further columns, at its end.

    Args:
        names: dotted fields such as `train.muon_lr`; those that are columns already stay as they
            are.

    Raises:
        ConfigError: there is no such field; the nearest is named.
    """
    from golf_ray.config import field_type

    frame = results.trials
    new = {}
    for name in names:
        if name not in frame.columns:
            field_type(name)
            new[name] = knob_column([config_value(record, name) for record in results.records])
    return frame.assign(**new) if new else frame


def trials_frame(records: Sequence[Record], source: str | None = None) -> pd.DataFrame:
    """The table of one sweep's records.

    Args:
        source: the sweep's name.
    """
    return make_trials(
        records,
        source=[source] * len(records),
        kind=["trial"] * len(records),
        knobs=knobs_of(records),
        problems=[],
    )


def knobs_of(records: Iterable[Record]) -> tuple[str, ...]:
    """Searched fields in the order in which they first appear."""
    return tuple(dict.fromkeys(knob for record in records for knob in record["knobs"]))


def config_value(record: Record, name: str) -> Any:
    """A field of a record's configuration by its dotted name; None where it has none."""
    section, _, field = name.partition(".")
    value = record["config"].get(section)
    if not field:
        return value
    return value.get(field) if isinstance(value, dict) else None


def make_trials(
    records: Sequence[Record],
    *,
    source: Sequence[str | None],
    kind: Sequence[str],
    knobs: Sequence[str],
    problems: list[str],
) -> pd.DataFrame:
    """The table of trials.

    Args:
        problems: a line is added for each value that is not of its column's type.
    """
    given = {"source": source, "kind": kind}
    columns: dict[str, Any] = {}

    def add(names: dict[str, Any]) -> None:
        for name, type_ in names.items():
            values = given.get(name) or measures_of(records, name)

            def misfit(place: int, name: str = name, values: Sequence[Any] = values) -> None:
                record = records[place]
                trial = f" trial {record['trial']}" if record.get("trial") is not None else ""
                problems.append(f"{source[place]}{trial}: {name} is {values[place]!r}")

            columns[name] = make_column(values, type_, misfit)

    add(dict(types_of(IDENTITY)))
    for knob in knobs:
        columns[knob] = knob_column(
            [r["knobs"][knob] if knob in r["knobs"] else config_value(r, knob) for r in records]
        )
    add(dict(types_of(MEASURES)))
    return pd.DataFrame(columns, copy=False)


_FINAL = {
    "final_ttt_bpb": "ttt_bpb",
    "final_total_bytes": "total_bytes",
    "final_fits": "fits",
    "artifact": "artifacts",
    "final_evaluation": "evaluations",
}
_PLURAL = {"evaluation": "evaluations", "checkpoint": "checkpoints"}


def measures_of(records: Sequence[Record], name: str) -> list[Any]:
    """The records' values for a column; None where one says none."""
    if name == "schema":
        return [record.get("schema_written") or record.get("schema") for record in records]
    if name == "gpu_s":
        return [held_gpu_s(record) for record in records]
    if name in _FINAL:
        name = _FINAL[name]
        return [(record.get("final") or {}).get(name) for record in records]
    name = _PLURAL.get(name, name)
    return [record.get(name) for record in records]


# Places -------------------------------------------------------------------------------------------


def _found(places: Sequence[str | Path], problems: list[str]) -> list[Place]:
    if not places:
        raise UsageError("no place of results was given", f"give {sources.WHAT}")
    found: dict[str, Place] = {}
    for where in places:
        try:
            places_there = sources.find_places(str(where), problems.append)
            found.update({place.uri: place for place in places_there})
        except GolfRayError as error:
            if len(places) == 1:
                raise
            problems.append(str(error))
    return list(found.values())


def _named(places: Sequence[Place]) -> list[tuple[Place, str]]:
    return list(zip(places, sources.name_places(places), strict=True))


def _read(place: Place, name: str, problems: list[str]) -> Found | None:
    try:
        return sources.read_place(place, name, problems.append)
    except GolfRayError as error:
        problems.append(str(error))
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        # Parts of its files that are of other types than they should be.
        problems.append(f"{shown(place.uri)} is damaged ({type(error).__name__}: {error})")
    return None


def _intervals(found: Sequence[Found], problems: list[str]) -> pd.DataFrame:
    import pyarrow as pa

    from golf_ray.results.curves import intervals_frame, logged_curve, read_curves

    tables = [read_curves([c for one in found for c in one.curves], problems.append)]
    tables += [logged_curve(one.rows, one.source) for one in found if one.rows]
    return intervals_frame(pa.concat_tables(tables))


def _documents(found: Sequence[Found], problems: list[str]) -> pd.DataFrame:
    from golf_ray.results.documents import read_ledgers

    if not found:
        return pd.DataFrame({c.name: make_column([], c.type) for c in DOCUMENTS})
    return read_ledgers([one for some in found for one in some.ledgers], problems.append)
