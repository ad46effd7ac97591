"""Accounts of runs, trials, sweeps and ledgers, found by name or place, out of their files.

Files are only read, and may be written meanwhile.

Invariant: a name leads to one thing or to one line that says what there is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from golf_ray.errors import GolfRayError, StorageError, UsageError, nearest
from golf_ray.presets import RECORD
from golf_ray.results.accounts import (
    Account,
    FailureGroup,
    LedgerAccount,
    Lengths,
    RunAccount,
    SweepAccount,
)
from golf_ray.results.schema import FINAL, NOT_FINAL
from golf_ray.results.settings import differences, preset_of, settings_of
from golf_ray.results.sources import SWEEPS, Place, find_places, storage_of
from trainers.storage import Storage, parse_lines, shown

if TYPE_CHECKING:
    import pandas as pd

    from golf_ray.results.migration import Record
    from golf_ray.results.reading import Results

EVENTS_FILE: Final = "events.jsonl"
INTERVALS_FILE: Final = "intervals.jsonl"
LENGTHS: Final = (128, 512, 2048, 8192)
"""Where documents are parted by their length in tokens."""

_TRIAL: Final = re.compile(r"([^?]+):(\d+)")
_NUMBERS: Final = re.compile(r"[-+]?\d[\d,.]*(?:e[-+]?\d+)?")


def account_of(run: str, storage: str) -> Account:
    """What a name or place amounts to.

    Args:
        run: a run folder, a sweep's name or folder, either with `:7` for a trial of it, a ledger,
            or a log of the public program.
        storage: where sweeps are that are given by name.

    Raises:
        UsageError: there is no such thing; the nearest name is given.
        StorageError: it cannot be read.
    """
    place, number = _resolve(run, storage)
    if place.kind == "trial" and number is None:
        return _sweep(place)
    if place.kind == "ledger":
        return _ledger(place)
    return _run(place, number)


# Finding ------------------------------------------------------------------------------------------


def _resolve(run: str, storage: str) -> tuple[Place, int | None]:
    split = _TRIAL.fullmatch(run)
    if split is not None and not Path(run).exists():
        place = _find(split[1], storage)
        if place.kind != "trial":
            raise UsageError(f"{shown(split[1])} is no sweep", f"leave ':{split[2]}' out")
        return place, int(split[2])
    return _find(run, storage), None


def _find(name: str, storage: str) -> Place:
    is_name = "/" not in name and name not in (".", "..")
    sweeps = Storage(storage).child(SWEEPS)
    if is_name and sweeps.child(name).names():
        places = find_places(sweeps.child(name).uri)
    elif is_name and not Path(name).exists():
        known = sweeps.names()
        remedy = nearest(name, known) if known else "look at --storage, or give a folder"
        raise UsageError(
            f"there is no run and no sweep '{shown(name)}' in {shown(storage)}", remedy
        )
    else:
        places = _look(name)
    if len(places) > 1:
        names = ", ".join(place.parts[-1] for place in places[:6])
        more = f" and {len(places) - 6} more" if len(places) > 6 else ""
        raise UsageError(
            f"{shown(name)} holds {len(places)} results", f"show one of them: {names}{more}"
        )
    return places[0]


def _look(name: str) -> list[Place]:
    path = Path(name)
    if "://" not in name and not path.exists() and path.parent.is_dir():
        beside = [other.name for other in path.parent.iterdir() if not other.name.startswith(".")]
        if beside:
            raise UsageError(f"{name} is not there", nearest(path.name, beside))
    return find_places(name)


# Runs and trials ----------------------------------------------------------------------------------


def _run(place: Place, number: int | None) -> RunAccount:
    from golf_ray.results.reading import load_results

    results = load_results(place.uri)
    at = _row_of(results, number, place)
    record, source = results.records[at], str(results.trials["source"].iloc[at])
    row, texts = _row(results.trials, at)
    run = _run_folder(place, record)
    return RunAccount(
        kind=str(row.get("kind", place.kind)),
        name=source if number is None else f"{source}:{number}",
        place=shown(place.uri),
        row=row,
        texts=texts,
        preset=preset_of(record["config"]),
        differences=differences(record["config"], record["knobs"]),
        intervals=_curve(results, record, number),
        events=_events(run),
        last_written_unix_s=_last_written(run) if row.get("status") in NOT_FINAL else None,
        problems=results.problems,
    )


def _row_of(results: Results, number: int | None, place: Place) -> int:
    if number is None:
        if not results.records:
            raise StorageError(
                next(iter(results.problems), f"{shown(place.uri)} cannot be read"), ""
            )
        return 0
    trials = [record["trial"] for record in results.records]
    if number not in trials:
        there = f"it has trials {trials[0]} to {trials[-1]}" if trials else "it has none yet"
        there = "; ".join([there, *results.problems[:1]])
        raise UsageError(f"sweep '{place.storage.name}' has no trial {number}", there)
    return trials.index(number)


def _row(trials: pd.DataFrame, at: int) -> tuple[dict[str, Any], dict[str, str]]:
    """A row's known values, plain and as people read them."""
    from golf_ray.results.cells import shown as shown_cells
    from golf_ray.results.describing import described

    frame = trials.iloc[[at]]
    cells = shown_cells(frame, described(frame))
    row, texts = {}, {}
    for name, [text] in zip(map(str, frame.columns), cells, strict=True):
        value = frame[name].iloc[0]
        if text:
            row[name] = value.item() if hasattr(value, "item") else value
            texts[name] = text
    return row, texts


def _run_folder(place: Place, record: Record) -> Storage | None:
    """Where the training's own files are; None of a log, and of trials without a training."""
    if place.kind == "run":
        return place.storage
    training = record.get("training")
    if place.kind != "trial" or not isinstance(training, str):
        return None
    from golf_ray.results.standing import Sweep

    stages = Sweep.in_folder(place.storage).stages
    return stages.child(training).child("run")


def _curve(results: Results, record: Record, number: int | None) -> tuple[dict[str, Any], ...]:
    frame = results.intervals
    if number is not None:
        training = record.get("training")
        frame = frame[(frame["training"] == training).fillna(False)] if training else frame[:0]
    rows = frame.drop(columns=["source", "trial", "training"]).to_dict("records")
    return tuple({str(k): _plain(v) for k, v in row.items() if not _missing(v)} for row in rows)


def _events(run: Storage | None) -> tuple[dict[str, Any], ...]:
    if run is None:
        return ()
    found = parse_lines(run.read_bytes(EVENTS_FILE) or b"")
    return tuple(event for event in found if isinstance(event, dict))


def _last_written(run: Storage | None) -> float | None:
    if run is None:
        return None
    places = [run.place(name) for name in (EVENTS_FILE, INTERVALS_FILE, "config.json")]
    try:
        times = [info.mtime_ns for info in run.filesystem.get_file_info(places)]
    except OSError:
        return None
    return max((t / 1e9 for t in times if t is not None), default=None)


# Sweeps and ledgers -------------------------------------------------------------------------------


def _sweep(place: Place) -> SweepAccount:
    from golf_ray.results.standing import Sweep, SweepReader

    look = SweepReader(Sweep.in_folder(place.storage)).look()
    plan = json.loads(place.storage.read_bytes("sweep.json") or b"{}")
    best = look.best
    return SweepAccount(
        look=look,
        plan=plan,
        settings=() if best is None else settings_of(best["config"], best["knobs"]),
        preset=RECORD.name if best is None else preset_of(best["config"]),
        failures=failures_of(look.records),
        claims=_claims(place) if plan.get("labels") else (),
        problems=look.problems,
    )


def failures_of(records: Sequence[Mapping[str, Any]]) -> tuple[FailureGroup, ...]:
    """Trials that ended without a score that counts, by reason, the most frequent first."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        if record["status"] in FINAL and record["status"] != "done":
            alike = _NUMBERS.sub("#", str(record.get("reason") or ""))
            groups.setdefault((record["status"], alike), []).append(record)
    found = [
        FailureGroup(
            status=status,
            reason=str(group[0].get("reason") or "no reason is known"),
            alike=len({record.get("reason") for record in group}) == 1,
            trials=tuple(record["trial"] for record in group),
        )
        for (status, _), group in groups.items()
    ]
    return tuple(sorted(found, key=lambda group: -len(group.trials)))


def _claims(place: Place) -> tuple[str, ...]:
    """What the runs of a confirmation show so far."""
    from golf_ray.sweeps.fresh_seeds import judged
    from golf_ray.sweeps.plan import read_plan

    try:
        found = judged(read_plan(storage_of(place.storage).uri, place.storage.name))
    except (GolfRayError, LookupError):
        return ()
    return () if found is None else found.lines()


def _ledger(place: Place) -> LedgerAccount:
    from golf_ray.metric import Score
    from golf_ray.results.reading import load_results

    results = load_results(place.uri, intervals=False, documents=True)
    frame = results.documents
    header = _header(place)

    def score(rows: pd.DataFrame) -> Score:
        nats = math.fsum(rows["nats"].tolist())
        return Score(
            nats=nats, tokens=int(rows["tokens"].sum()), num_bytes=int(rows["bytes"].sum())
        )

    whole, lengths = score(frame), []
    for low, high in zip((0, *LENGTHS), (*LENGTHS, None), strict=True):
        inside = frame["tokens"] >= low
        rows = frame[inside & (frame["tokens"] < high)] if high else frame[inside]
        label = f"{low:,} and more" if high is None else f"{low:,} to {high - 1:,}"
        if len(rows):
            lengths.append(Lengths(label=label, documents=len(rows), bpb=score(rows).bpb))
    return LedgerAccount(
        name=place.parts[-1],
        place=shown(place.uri),
        weights=header.get("weights_kind"),
        documents=len(frame),
        tokens=whole.tokens,
        bytes_scored=whole.num_bytes,
        nats=whole.nats,
        bpb=whole.bpb if whole.num_bytes else None,
        lengths=tuple(lengths),
        header=header,
        problems=results.problems,
    )


def _header(place: Place) -> dict[str, Any]:
    """What a ledger says that it is of; nothing where that is damaged, which is a problem line."""
    try:
        found = json.loads(place.storage.read_bytes("header.json") or b"")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _missing(value: Any) -> bool:
    import pandas as pd

    return bool(pd.isna(value))


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
