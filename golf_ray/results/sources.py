"""Where results lie, and what is read there: sweeps, run folders, ledgers, logs.

A place is a path or a URI. What kind it is follows from the names in it; a folder of several is
looked into once. Files are only read, and may be written meanwhile.

Invariant: what cannot be read is one problem line and takes nothing else with it.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from golf_ray.errors import StorageError, UsageError
from golf_ray.results.curves import Curve
from golf_ray.results.migration import Record
from golf_ray.results.records import as_left, read_trials
from trainers.claims import claims_of_drivers
from trainers.storage import Storage, shown, split_uri

Kind = Literal["trial", "run", "public", "ledger"]

PLAN_FILE: Final = "sweep.json"
TRIALS: Final = "trials"
OUT_OF_BUDGET: Final = "out_of_budget.json"
"""In a sweep's folder while it stands still because a budget was used up."""
SWEEPS: Final = "sweeps"
STAGES: Final = "stages"
INTERVALS_FILE: Final = "intervals.jsonl"
HEADER_FILE: Final = "header.json"
CONFIG_FILE: Final = "config.json"
LOG_SUFFIXES: Final = (".log", ".txt")

WHAT: Final = "a sweep's folder, a storage, a run folder, a ledger or a log of the public program"

OnProblem = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Something that holds results."""

    kind: Kind
    storage: Storage
    """The folder; of a log, the one that holds it."""
    file: str = ""
    """Of a log, its name."""

    @property
    def uri(self) -> str:
        """What to call it, once."""
        return self.storage.uri_of(self.file) if self.file else self.storage.uri

    @property
    def parts(self) -> list[str]:
        """Names from the outermost folder to its own, by which it is told from others."""
        parts = [part for part in shown(self.storage.uri).split("/") if part]
        if self.kind == "trial" and len(parts) > 2 and parts[-2] == SWEEPS:
            del parts[-2]
        return [*parts, self.file.rpartition(".")[0] or self.file] if self.file else parts


@dataclass(kw_only=True, slots=True)
class Found:
    """What a place said."""

    source: str
    kind: Kind
    records: list[Record] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Intervals of a log."""
    plan: dict[str, Any] | None = None
    folder: Storage | None = None
    """Of a sweep."""
    ledgers: list[Ledgers] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledgers:
    """A ledger, and what its rows are called."""

    storage: Storage
    source: str
    name: str = ""
    """The ledger's place below `storage`; nothing where it is that folder itself."""
    trial: int | None = None
    evaluation: str | None = None

    @property
    def folder(self) -> Storage:
        """The ledger's own."""
        return self.storage.child(self.name) if self.name else self.storage

    @property
    def uri(self) -> str:
        """What to call it, once."""
        return self.storage.uri_of(self.name) if self.name else self.storage.uri


def find_places(where: str, on_problem: OnProblem | None = None) -> list[Place]:
    """What holds results at a path or URI: itself, or what is in the folder.

    Links are followed, so that nothing is there twice and what lies beside it is found.

    Args:
        on_problem: told of what is in the folder and cannot be looked into.

    Raises:
        UsageError: nothing there does.
        StorageError: it cannot be looked into.
    """
    storage = Storage(resolved(where))
    above, name = _above(storage)
    if _is_file(storage):
        from golf_ray.results.public_logs import is_public_log

        if is_public_log(above.read_bytes(name) or b""):
            return [Place(kind="public", storage=above, file=name)]
        raise UsageError(f"{shown(where)} is no log of the public program", f"give {WHAT}")
    names = storage.names()
    if not names:
        there = "holds nothing" if above.exists(name) else "is not there"
        raise UsageError(f"{shown(where)} {there}", f"give {WHAT}")
    kind = _kind_of(names)
    if kind is not None:
        return [Place(kind=kind, storage=storage)]
    found: list[Place] = []
    if SWEEPS in names:
        sweeps = storage.child(SWEEPS)
        found += _below(sweeps, sweeps.names(), on_problem)
    found += _below(storage, [name for name in names if name not in (SWEEPS, STAGES)], on_problem)
    if not found:
        raise UsageError(f"{shown(where)} holds no results", f"give {WHAT}")
    return found


def resolved(where: str) -> str:
    """A path without links; a URI as it is."""
    return where if "://" in where else os.path.realpath(where)


def name_places(places: Sequence[Place]) -> list[str]:
    """A name for each place: its own, with folders before it where two have the same."""
    parts = [place.parts for place in places]
    depth = [1] * len(places)
    while True:
        names = ["/".join(p[-d:]) for p, d in zip(parts, depth, strict=True)]
        count = Counter(names)
        longer = [i for i, name in enumerate(names) if count[name] > 1 and depth[i] < len(parts[i])]
        if not longer:
            break
        for i in longer:
            depth[i] += 1
    # Only what lies at one path of two file systems still has one name.
    return [n if count[n] == 1 else places[i].uri for i, n in enumerate(names)]


def read_place(place: Place, source: str, on_problem: OnProblem) -> Found:
    """Everything but curves and ledgers, which are only named.

    Raises:
        StorageError: the place cannot be looked into.
    """
    if place.kind == "trial":
        return _read_sweep(place, source, on_problem)
    if place.kind == "run":
        from golf_ray.results.runs import read_run

        found = Found(source=source, kind="run")
        record = read_run(place.storage, on_problem)
        found.records += [] if record is None else [record]
        found.curves = [Curve(storage=place.storage, name=INTERVALS_FILE, source=source)]
        return found
    if place.kind == "public":
        from golf_ray.results.public_logs import read_log

        text = (place.storage.read_bytes(place.file) or b"").decode("utf-8", "replace")
        record, rows = read_log(text, place.uri, on_problem)
        return Found(source=source, kind="public", records=[record], rows=rows)
    found = Found(source=source, kind="ledger")
    found.ledgers = [Ledgers(storage=place.storage, source=source)]
    return found


# Sweeps -------------------------------------------------------------------------------------------


def _read_sweep(place: Place, source: str, on_problem: OnProblem) -> Found:
    found = Found(source=source, kind="trial", folder=place.storage)
    data = place.storage.read_bytes(PLAN_FILE)
    if data is not None:
        try:
            plan = json.loads(data)
            if not isinstance(plan, dict):
                raise ValueError("no JSON object")
            found.plan = plan
        except ValueError as error:
            on_problem(f"{place.storage.uri_of(PLAN_FILE)} is damaged ({error})")
    # Asked first: who is gone by now has written all that he ever will.
    driven = claims_of_drivers(place.storage, "a reader").is_held()
    records = read_trials(place.storage.child(TRIALS), on_problem)
    found.records = [as_left(record, driven=driven) for record in records]
    _complete(found.records, found.plan or {})
    stages = storage_of(place.storage).child(STAGES)
    makers = makers_of(found.records)
    told = any(r.get("training") or r.get("evaluations") for r in found.records)
    if told and not stages.names():
        on_problem(
            f"training curves and scores by document of {source}: {shown(stages.uri)} is not there"
        )
    found.curves = [
        Curve(storage=stages, name=f"{training}/run/{INTERVALS_FILE}", source=source,
              trial=trial, training=training)
        for training, trial in makers.items()
    ]  # fmt: skip
    found.ledgers = [
        Ledgers(
            storage=stages,
            name=f"{name}/ledger",
            source=source,
            trial=record["trial"],
            evaluation=name,
        )
        for record in found.records
        for name in evaluations_of(record)
    ]
    return found


def makers_of(records: Sequence[Record]) -> dict[str, int]:
    """Of each training the trial that it was made for; the first that has it, where none of these
    is."""
    makers: dict[str, int] = {}
    for record in records:
        training = record.get("training")
        if isinstance(training, str) and (training not in makers or record.get("trained")):
            makers[training] = record["trial"]
    return makers


def evaluations_of(record: Record) -> list[str]:
    """Folders of a trial's scores, then those of a finalist's; each once, as a trial that was
    scored on all documents has one for both."""
    final = (record.get("final") or {}).get("evaluations")
    found = (
        str(name)
        for names in (record.get("evaluations"), final)
        for name in (names if isinstance(names, list) else ())
    )
    return list(dict.fromkeys(found))


def _complete(records: Sequence[Record], plan: dict[str, Any]) -> None:
    """What older records left to the plan."""
    labels, checkpoints = (
        found if isinstance(found := plan.get(name), list) else []
        for name in ("labels", "checkpoints")
    )
    for record in records:
        if not record["config"] and isinstance(plan.get("base"), dict):
            record["config"] = _with_knobs(plan["base"], record["knobs"])
        if record.get("data") is None:
            record["data"] = plan.get("data") or None
        if record.get("checkpoints") is None and checkpoints:
            record["checkpoints"] = [one[0] for one in checkpoints if isinstance(one, list)]
        number = record["trial"]
        if record.get("label") is None and 0 < number <= len(labels):
            record["label"] = labels[number - 1]


def _with_knobs(config: dict[str, Any], knobs: dict[str, Any]) -> dict[str, Any]:
    changed = {**config}
    for knob, value in knobs.items():
        section, _, name = knob.partition(".")
        if isinstance(changed.get(section), dict):
            changed[section] = {**changed[section], name: value}
    return changed


# Kinds --------------------------------------------------------------------------------------------


def _kind_of(names: Sequence[str]) -> Kind | None:
    if PLAN_FILE in names:
        return "trial"
    if HEADER_FILE in names:
        return "ledger"
    # A run that has just begun has its configuration and nothing else.
    return "run" if CONFIG_FILE in names else None


def _below(storage: Storage, names: Sequence[str], on_problem: OnProblem | None) -> Iterator[Place]:
    for name in names:
        if name.startswith("."):
            continue
        try:
            found = _child(storage, name)
        except StorageError as error:
            if on_problem is None:
                raise
            on_problem(str(error))
            continue
        if found is not None:
            yield found


def _child(storage: Storage, name: str) -> Place | None:
    from golf_ray.results.public_logs import is_public_log

    child = storage.child(name)
    if child.local is not None:
        child = Storage(resolved(str(child.local)))
    if name.endswith(LOG_SUFFIXES):
        above, file = _above(child)
        log = is_public_log(above.read_bytes(file) or b"")
        return Place(kind="public", storage=above, file=file) if log else None
    kind = None if _is_file(child) else _kind_of(child.names())
    return None if kind is None else Place(kind=kind, storage=child)


def _is_file(storage: Storage) -> bool:
    from pyarrow import fs

    try:
        found = storage.filesystem.get_file_info(storage.path)
    except OSError as error:
        line = " ".join(str(error).split())[:200]
        raise StorageError(f"{shown(storage.uri)} cannot be read ({line})", "check it") from None
    return bool(found.type == fs.FileType.File)


def storage_of(sweep: Storage) -> Storage:
    """The storage that a sweep's folder `STORAGE/sweeps/NAME` is in."""
    above, _ = _above(sweep)
    return _above(above)[0] if above.name == SWEEPS else above


def _above(storage: Storage) -> tuple[Storage, str]:
    """The folder that holds one, and its name there."""
    base, query = split_uri(storage.uri)
    above, _, name = base.rpartition("/")
    return Storage((above or "/") + query), name
