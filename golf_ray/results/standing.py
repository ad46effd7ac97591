"""How a sweep stands, read from its files while it runs: cheap enough to look every few seconds.

A record that is final is read once, and again only while finalists are measured; the others are
read at every look. Nothing is drawn here.

Invariant: what is said follows from files alone, so anybody who reaches the storage sees the same,
also after a driver was killed; a record that cannot be read is a problem line and no error.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from golf_ray.errors import StorageError
from golf_ray.results.curves import REMOTE_THREADS
from golf_ray.results.migration import Record
from golf_ray.results.records import as_left, parse_record
from golf_ray.results.schema import FINAL
from golf_ray.results.sources import OUT_OF_BUDGET, PLAN_FILE, STAGES, TRIALS, storage_of
from golf_ray.results.timeline import gpu_hours
from golf_ray.sweeps.commands import command
from golf_ray.sweeps.finalists import candidates, ranked
from golf_ray.sweeps.progress import describe
from trainers.claims import claims_of_drivers
from trainers.storage import Storage

if TYPE_CHECKING:
    from golf_ray.sweeps.plan import SweepPlan

MOST_DESCRIBED: Final = 12
"""Running trials whose training curve is looked into."""

State = Literal["running", "ended", "out of budget", "interrupted"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """What there is to know of a sweep before its trials."""

    name: str
    folder: Storage
    stages: Storage
    num_trials: int
    objectives: tuple[str, ...]
    num_finalists: int = 0
    max_gpu_hours: float | None = None
    max_hours: float | None = None

    def command(self, words: str) -> str:
        """A command on this sweep for people to copy, as `golf-ray sweep --resume nightly`."""
        return command(words, self.name, storage_of(self.folder).uri)

    @staticmethod
    def of_plan(plan: SweepPlan) -> Sweep:
        """Of a plan."""
        return Sweep(
            name=plan.name,
            folder=plan.folder,
            stages=plan.stages_folder,
            num_trials=plan.num_trials,
            objectives=plan.objectives,
            num_finalists=plan.finalists,
            max_gpu_hours=plan.max_gpu_hours,
            max_hours=plan.max_hours,
        )

    @staticmethod
    def in_folder(folder: Storage) -> Sweep:
        """Of a sweep's folder, wherever it lies; a plan of another version does as well.

        Raises:
            StorageError: its plan cannot be read.
        """
        data = folder.read_bytes(PLAN_FILE)
        try:
            plan = json.loads(data or b"")
            return Sweep(
                name=folder.name,
                folder=folder,
                stages=storage_of(folder).child(STAGES),
                num_trials=int(plan["num_trials"]),
                objectives=tuple(plan["objectives"]),
                num_finalists=int(plan.get("finalists") or 0),
                max_gpu_hours=plan.get("max_gpu_hours"),
                max_hours=plan.get("max_hours"),
            )
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            where = folder.uri_of(PLAN_FILE)
            raise StorageError(f"{where} is damaged ({error})", "restore the file") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class Improvement:
    """A trial that was the best when it ended."""

    trial: int
    value: float
    ended_unix_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """A sweep at one moment."""

    sweep: Sweep
    records: tuple[Record, ...]
    driven: bool
    """Whether somebody runs it, as far as can be seen."""
    unix_s: float
    out_of_budget: bool = False
    """Whether its driver began no more trials because a budget was used up."""
    doing: tuple[str, ...] = ()
    """A phrase for each running trial, up to `MOST_DESCRIBED`."""
    problems: tuple[str, ...] = ()

    @property
    def ended(self) -> list[Record]:
        """Trials that ended, the last to end first."""
        found = [record for record in self.records if record["status"] in FINAL]
        return sorted(found, key=lambda r: (-_seconds(r.get("ended_unix_s")), -r["trial"]))

    @property
    def running(self) -> list[Record]:
        """Trials that have not ended, interrupted ones too."""
        return [record for record in self.records if record["status"] not in FINAL]

    @property
    def state(self) -> State:
        """How the sweep itself is."""
        if self.driven:
            return "running"
        if len(self.ended) == self.sweep.num_trials:
            return "ended"
        return "out of budget" if self.out_of_budget else "interrupted"

    @property
    def go_on(self) -> str | None:
        """The command that goes on with it; None where somebody does, or nothing is left."""
        if self.state in ("running", "ended"):
            return None
        again = self.sweep.command("sweep --resume")
        limit = self.sweep.max_gpu_hours
        # Hours begin anew with a driver; GPU-hours are those of all trials so far.
        used = limit is not None and gpu_hours(self.records) >= limit
        return f"{again} --max-gpu-hours MORE" if used else again

    @property
    def objective(self) -> str:
        """What is made small, first of all."""
        return self.sweep.objectives[0]

    @property
    def best(self) -> Record | None:
        """The best trial so far of those within the limits."""
        return next(iter(ranked(scored(self.records, self.objective), self.objective)), None)

    def improvements(self) -> list[Improvement]:
        """The trials that were the best when they ended, in that order."""
        found: list[Improvement] = []
        done = ranked(scored(self.records, self.objective), self.objective)
        for record in sorted(done, key=lambda r: (_seconds(r.get("ended_unix_s")), r["trial"])):
            value = record["values"][self.objective]
            if not found or value < found[-1].value:
                ended = _seconds(record.get("ended_unix_s"))
                found.append(Improvement(trial=record["trial"], value=value, ended_unix_s=ended))
        return found

    def best_so_far(self) -> list[float | None]:
        """The best after each trial that ended, in the order of their ends; None before the
        first."""
        values = {one.trial: one.value for one in self.improvements()}
        curve: list[float | None] = []
        for record in reversed(self.ended):
            before = curve[-1] if curve else None
            curve.append(values.get(record["trial"], before))
        return curve

    def worked_s(self) -> float:
        """Time in which any trial ran: a night between a kill and a resume does not count."""
        return covered_s(
            (began, _seconds(record.get("ended_unix_s")) or self.unix_s)
            for record in self.records
            if (began := _seconds(record.get("began_unix_s")))
            and (record["status"] in FINAL or self.driven)
        )

    def left_s(self) -> float | None:
        """Time left at the pace of trials that ended so far; None before the first."""
        ended = len(self.ended)
        if not ended or self.state != "running":
            return None
        return self.worked_s() / ended * max(0, self.sweep.num_trials - ended)

    def summary(self) -> dict[str, Any]:
        """All this as plain data."""
        best = self.best
        counts = {s: sum(r["status"] == s for r in self.records) for s in FINAL}
        return {
            "name": self.sweep.name,
            "state": self.state,
            "num_trials": self.sweep.num_trials,
            **counts,
            "begun": len(self.running),
            "trainings": len({r["training"] for r in self.records if r.get("training")}),
            "gpu_hours": gpu_hours(self.records),
            "objective": self.objective,
            "best_trial": None if best is None else best["trial"],
            "best": None if best is None else best["values"][self.objective],
            "worked_s": self.worked_s(),
            "left_s": self.left_s(),
            "folder": self.sweep.folder.uri,
            "problems": list(self.problems),
        }


class SweepReader:
    """Looks at a sweep's folder, again and again.

    Args:
        sweep: which.
        describe_running: also say what running trials are doing, which reads their curves.
    """

    def __init__(self, sweep: Sweep, *, describe_running: bool = True) -> None:
        self.sweep = sweep
        self._describe = describe_running
        self._trials = sweep.folder.child(TRIALS)
        # One for all looks: that a driver on another host is dead is seen over time.
        self._driver = claims_of_drivers(sweep.folder, "a reader")
        self._final: dict[str, Record] = {}

    def look(self) -> Look:
        """The sweep at this moment.

        Raises:
            StorageError: the folder cannot be read.
        """
        # Asked first: who is gone by now has written all that he ever will.
        driven = self._driver.is_held()
        records, problems = self._read()
        records = [as_left(record, driven=driven) for record in records]
        look = Look(
            sweep=self.sweep,
            records=tuple(records),
            driven=driven,
            unix_s=time.time(),
            out_of_budget=not driven and self.sweep.folder.exists(OUT_OF_BUDGET),
            problems=tuple(problems),
        )
        if not (self._describe and driven):
            return look
        doing = tuple(self._doing(record) for record in look.running[:MOST_DESCRIBED])
        return dataclasses.replace(look, doing=doing)

    def _read(self) -> tuple[list[Record], list[str]]:
        names = [n for n in self._trials.names() if n.endswith(".json") and n[0].isdigit()]
        may_change = self._finalists(len(names))
        wanted = [name for name in names if name not in self._final or name in may_change]
        read = dict(zip(wanted, self._read_files(wanted), strict=True))
        records, problems = [], []
        for name in names:
            known = self._final.get(name)
            try:
                data = read.get(name)
                if isinstance(data, StorageError):
                    raise data
                if data is not None:
                    known = parse_record(data, self._trials, name)
            except StorageError as error:
                problems.append(str(error))
                continue
            if known is not None:
                records.append(known)
                if known["status"] in FINAL:
                    self._final[name] = known
        return records, problems

    def _read_files(self, names: Sequence[str]) -> list[bytes | StorageError | None]:
        def read(name: str) -> bytes | StorageError | None:
            try:
                return self._trials.read_bytes(name)
            except StorageError as error:
                return error

        if self._trials.local is not None or len(names) < 2:
            return [read(name) for name in names]
        with ThreadPoolExecutor(REMOTE_THREADS) as pool:
            return list(pool.map(read, names))

    def _finalists(self, num_records: int) -> set[str]:
        """Files of final records to which measured scores may yet be added."""
        if num_records < self.sweep.num_trials or len(self._final) < num_records:
            return set()
        objective, places = self.sweep.objectives[0], self.sweep.num_finalists
        best = candidates(scored(list(self._final.values()), objective), objective, places)
        likely = {record["trial"] for record in best[:places]}
        return {name for name, record in self._final.items() if record["trial"] in likely}

    def _doing(self, record: Record) -> str:
        try:
            return describe(record, self.sweep.stages)
        except (LookupError, TypeError, ValueError, AttributeError):
            # A line of its curve, or the record, is not as it should be.
            return f"trial {record['trial']}: running"


def scored(records: Sequence[Record], objective: str) -> list[Record]:
    """Records that say all that a ranking asks of those that are done."""
    return [
        r
        for r in records
        if r["status"] == "done"
        and isinstance((r.get("values") or {}).get(objective), (int, float))
        and all(isinstance(v, (int, float)) for v in (r.get("constraints") or {}).values())
    ]


def covered_s(spans: Any) -> float:
    """How much time some spans cover together, what several cover counted once."""
    total, until = 0.0, float("-inf")
    for began, ended in sorted(spans):
        total += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return total


def _seconds(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0
