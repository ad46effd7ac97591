"""A pool of Ray actors that share out units of work; and evaluation on it.

The driver holds the queue. Decisions are `evaluators.scheduling`'s; here they are carried out. An
actor that dies or falls silent is replaced and its unit given to another; results are kept by unit,
so work that was done twice counts once.

Invariant: the total is that of the in-process evaluation, bit for bit on a CPU, for any number of
actors and whatever happens to them, or there is none.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar

import psutil
import ray
from ray.exceptions import RayError, TaskCancelledError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from evaluators.scheduling import Action, Cancel, GivenUp, Scheduler, Start, Unit
from golf_ray.errors import ClusterError, EvaluationFailed, GolfRayError

Payload = TypeVar("Payload")
Result = TypeVar("Result")
Factory = Callable[..., Any]
"""Makes a worker from the pool's parts: an object with `run_unit(payload)`, and where it has them
`prepared_s`, seconds that it took to make ready, and `check()`, which raises once it is broken."""

OnResult = Callable[[Unit, Result, float], None]
OnFailed = Callable[[Unit, EvaluationFailed], Iterable[Unit]]

END_S = 10.0
"""Longest wait for a silent process to be ended on its node."""
WAIT_S = 0.5
"""Longest pause between two looks at actors that may have fallen silent."""


class Shared:
    """A value in the object store, copied to a node when something there first asks for it.

    To be made where Ray is connected; it may be part of what a pool's actors are given.
    """

    def __init__(self, value: Any) -> None:
        self._ref = ray.put(value)

    def get(self) -> Any:
        """The value; arrays are views of the node's store."""
        return ray.get(self._ref)


class _Host:
    """The actor: holds a worker and runs units one after another."""

    def __init__(self) -> None:
        self._worker: Any = None

    def load(self, factory: Factory, *parts: Any) -> dict[str, Any]:
        """Make the worker; says where it lives, and an error as a value."""
        place = {
            "host": socket.gethostname(),
            "node_id": ray.get_runtime_context().get_node_id(),
            "pid": os.getpid(),
            "began_unix_s": psutil.Process().create_time(),
        }
        try:
            self._worker = factory(*parts)
        except Exception as error:
            return {**place, "error": _sendable(error), "traceback": traceback.format_exc()}
        return {**place, "prepared_s": getattr(self._worker, "prepared_s", 0.0)}

    def run(self, payload: Any) -> dict[str, Any]:
        """Compute a unit; an error is a value, so that none is mistaken for the actor's end."""
        began = time.perf_counter()
        try:
            result = self._worker.run_unit(payload)
        except Exception as error:
            failed = {"error": _sendable(error), "traceback": traceback.format_exc()}
            return {**failed, "broken": self._broken()}
        return {"result": result, "seconds": time.perf_counter() - began}

    def _broken(self) -> str:
        """Why no unit can go well here any more, as after an error of a GPU; empty if it may."""
        try:
            if hasattr(self._worker, "check"):
                self._worker.check()
        except Exception as error:
            return f"{type(error).__name__}: {_short(error)}"
        return ""

    @ray.method(concurrency_group="control")
    def ping(self) -> None:
        """Answer, also while a unit is computed."""


def _sendable(error: Exception) -> Exception:
    """The error, or one that says the same where it cannot be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {_short(error)}")
    return error


def _end_process(pid: int, began_unix_s: float) -> None:
    """SIGKILL a process of this node, if it is still the one that is meant."""
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        if process.create_time() == began_unix_s:
            process.kill()


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolEvent:
    """Something that happened to an actor."""

    kind: Literal["ready", "lost", "retry"]
    actor: int
    host: str
    pid: int | None
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolReport:
    """How a pool's work went."""

    num_actors: int
    """Asked for."""
    units: int
    retried: int
    """Units begun again after an actor was lost or an error."""
    stolen: int
    """Units that an idle actor took over."""
    lost_actors: int
    start_s: float
    """From asking for actors to the first that was ready."""
    prepare_s: float
    """Of that, what an actor took at most to make its worker: weights, compilation."""
    wall_s: float
    """From then to the last result."""
    busy_s: float
    """Sum over actors of the time that they computed."""
    held_s: float
    """Sum over actors of the time from being ready to the end."""

    @property
    def efficiency(self) -> float:
        """Busy time over held time."""
        return self.busy_s / self.held_s if self.held_s else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "efficiency": self.efficiency}


@dataclass(slots=True)
class _Member:
    """An actor as the driver knows it."""

    number: int
    handle: Any
    asked_s: float
    host: str = ""
    node_id: str = ""
    pid: int | None = None
    began_unix_s: float = 0.0
    ready_s: float | None = None
    pinged_s: float = 0.0
    ping: Any = None
    runs: dict[Any, Unit] = field(default_factory=dict)

    @property
    def name(self) -> str:
        process = f" (process {self.pid} on {self.host})" if self.pid is not None else ""
        return f"actor {self.number}{process}"


class WorkPool(Generic[Payload, Result]):
    """Actors that share out units. Use as a context manager: leaving it ends them.

    Args:
        factory: makes a worker on each actor, importable there.
        parts: its arguments, put into the object store once.
        num_actors: how many.
        bundle: resources of each, such as {"CPU": 1}.
        hang_timeout_s: an actor that answers nothing for this long is given up.
        start_timeout_s: how long to be without any actor.
        max_replacements: actors to start for those that are lost.
        on_event: told of actors that become ready or are lost, and of units that are retried.
    """

    def __init__(
        self,
        factory: Factory,
        parts: Sequence[Any],
        *,
        num_actors: int,
        bundle: Mapping[str, float],
        hang_timeout_s: float = 300.0,
        start_timeout_s: float = 120.0,
        max_replacements: int | None = None,
        on_event: Callable[[PoolEvent], None] | None = None,
    ) -> None:
        assert num_actors >= 1
        self._factory = factory
        self._parts = parts
        self._num_actors = num_actors
        self._bundle = dict(bundle)
        self._hang_timeout_s = hang_timeout_s
        self._start_timeout_s = start_timeout_s
        self._replacements_left = 10 * num_actors if max_replacements is None else max_replacements
        self._on_event = on_event
        self._refs: list[Any] = []
        self._members: dict[int, _Member] = {}
        self._pending: dict[Any, tuple[Literal["load", "run", "ping"], _Member]] = {}
        self._next_number = 0
        self._began_s = 0.0
        self._first_ready_s: float | None = None
        self._prepare_s = 0.0
        self._without_s = 0.0
        self._lost = 0
        self._busy_s = 0.0
        self._held_s = 0.0

    def __enter__(self) -> WorkPool[Payload, Result]:
        self._began_s = self._without_s = time.perf_counter()
        self._refs = [ray.put(part) for part in self._parts]
        for _ in range(self._num_actors):
            self._recruit()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for member in list(self._members.values()):
            self._dismiss(member)
        self._pending.clear()
        self._refs.clear()

    def run(
        self,
        units: Mapping[Unit, Payload],
        *,
        describe: Callable[[Unit], str] = str,
        on_result: OnResult[Result] | None = None,
        on_failed: OnFailed | None = None,
        depth: int = 2,
    ) -> tuple[dict[Unit, Result], PoolReport]:
        """Compute all units, in any order.

        Args:
            units: payloads by unit, in the order in which they are to begin, the longest first.
            describe: a unit's name for people.
            on_result: told of every result that counts and its seconds, in this thread.
            on_failed: told of units that failed again and again, and says which others are of no
                use any more; those have no result, and the rest goes on. None raises.
            depth: units in the hands of an actor at most.

        Raises:
            GolfRayError: a unit raised it; it concerns them all.
            EvaluationFailed: a unit failed again and again, or no actor is left.
            ClusterError: no actor could be started.
        """
        return _Work(self, units, describe, on_result, on_failed, depth).run()

    @property
    def num_ready(self) -> int:
        """Actors that are at work."""
        return len(self._ready)

    # Actors -----------------------------------------------------------------------------------

    def _recruit(self) -> None:
        resources = {k: v for k, v in self._bundle.items() if k not in ("CPU", "GPU")}
        # A strategy of its own keeps the actor out of a placement group that the caller is in.
        actor: Any = ray.remote(concurrency_groups={"control": 1})  # type: ignore[call-overload]
        handle = (
            actor(_Host)
            .options(
                num_cpus=self._bundle.get("CPU", 0),
                num_gpus=self._bundle.get("GPU", 0),
                resources=resources,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy="SPREAD",
            )
            .remote()
        )
        member = _Member(number=self._next_number, handle=handle, asked_s=time.perf_counter())
        self._next_number += 1
        self._members[member.number] = member
        self._pending[handle.load.remote(self._factory, *self._refs)] = ("load", member)

    def _dismiss(self, member: _Member) -> None:
        """End an actor, whatever it does."""
        self._members.pop(member.number, None)
        for ref in [r for r, (_, m) in self._pending.items() if m is member]:
            del self._pending[ref]
        if member.ready_s is not None:
            self._held_s += time.perf_counter() - member.ready_s
        ray.kill(member.handle, no_restart=True)

    def _end_silent(self, member: _Member) -> None:
        """End a process that does not listen; Ray asks it first, and its resources wait for it."""
        end: Any = ray.remote(_end_process).options(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(member.node_id, soft=False),
        )
        # Where the node itself is gone, so is the process.
        with contextlib.suppress(RayError, TimeoutError):
            ray.get(end.remote(member.pid, member.began_unix_s), timeout=END_S)

    def _tell(self, kind: Literal["ready", "lost", "retry"], member: _Member, text: str) -> None:
        if self._on_event is not None:
            self._on_event(
                PoolEvent(
                    kind=kind, actor=member.number, host=member.host, pid=member.pid, message=text
                )
            )

    @property
    def _ready(self) -> list[_Member]:
        return [m for m in self._members.values() if m.ready_s is not None]


class _Work(Generic[Payload, Result]):
    """One run of a pool: carries out what the scheduler decides."""

    def __init__(
        self,
        pool: WorkPool[Payload, Result],
        units: Mapping[Unit, Payload],
        describe: Callable[[Unit], str],
        on_result: OnResult[Result] | None,
        on_failed: OnFailed | None,
        depth: int,
    ) -> None:
        self._pool = pool
        self._units = units
        self._describe = describe
        self._on_result = on_result
        self._on_failed = on_failed
        self._scheduler = Scheduler(list(units), depth=depth)
        self._results: dict[Unit, Result] = {}
        self._last_reason = ""
        self._reasons: dict[Unit, str] = {}
        self._num_failed = 0

    def run(self) -> tuple[dict[Unit, Result], PoolReport]:
        """Until every unit has its result or is given up."""
        pool, scheduler = self._pool, self._scheduler
        for member in pool._ready:
            self._carry_out(scheduler.join(member.number))
        while not scheduler.done:
            ready, _ = ray.wait(list(pool._pending), num_returns=1, timeout=WAIT_S)
            for ref in ready:
                kind, member = pool._pending.pop(ref)
                self._handle(kind, member, ref)
            self._look_after_actors()
            while self._num_failed < len(scheduler.given_up):
                self._give_up(scheduler.given_up[self._num_failed])
        return self._results, self._report()

    def _handle(self, kind: str, member: _Member, ref: Any) -> None:
        try:
            value = ray.get(ref)
        except TaskCancelledError:
            member.runs.pop(ref, None)
            return
        except RayError as error:
            self._lost(member, f"was lost ({_short(error)})")
            return
        if kind == "load":
            self._loaded(member, value)
        elif kind == "ping":
            member.ping = None
        else:
            self._finished(member, member.runs.pop(ref), value)

    def _loaded(self, member: _Member, value: dict[str, Any]) -> None:
        member.host, member.pid = value["host"], value["pid"]
        member.node_id, member.began_unix_s = value["node_id"], value["began_unix_s"]
        error = value.get("error")
        if isinstance(error, GolfRayError):
            raise error
        if error is not None:
            raise EvaluationFailed(
                f"{member.name} could not be made ready ({type(error).__name__}: {_short(error)})",
                "this is an error of the program: run it in one process to see more",
            ) from error
        pool = self._pool
        member.ready_s = time.perf_counter()
        pool._prepare_s = max(pool._prepare_s, value["prepared_s"])
        if pool._first_ready_s is None:
            pool._first_ready_s = member.ready_s
        pool._tell("ready", member, f"{member.name} is ready")
        self._carry_out(self._scheduler.join(member.number))

    def _finished(self, member: _Member, unit: Unit, value: dict[str, Any]) -> None:
        error = value.get("error")
        if error is None:
            self._pool._busy_s += value["seconds"]
            counts, actions = self._scheduler.finished(member.number, unit)
            if counts:
                self._results[unit] = value["result"]
                if self._on_result is not None:
                    self._on_result(unit, value["result"], value["seconds"])
            self._carry_out(actions)
            return
        if isinstance(error, GolfRayError) and not isinstance(error, EvaluationFailed):
            raise error
        reason = _reason(error)
        self._last_reason = self._reasons[unit] = reason
        self._pool._tell("retry", member, f"{self._describe(unit)} failed ({reason})")
        self._carry_out(self._scheduler.failed(member.number, unit))
        if value["broken"]:
            self._lost(member, f"can compute no more ({value['broken']})")

    def _lost(self, member: _Member, reason: str) -> None:
        pool = self._pool
        if member.number not in pool._members:
            return
        held = self._scheduler.held(member.number)
        over = f" over {self._describe(held[0])}" if held else ""
        self._last_reason = f"{member.name} {reason}"
        self._reasons.update({unit: self._last_reason for unit in held[:1]})
        pool._dismiss(member)
        pool._lost += 1
        pool._tell("lost", member, f"{member.name} {reason}{over}")
        if not pool._ready:
            pool._without_s = time.perf_counter()
        if pool._replacements_left > 0:
            pool._replacements_left -= 1
            pool._recruit()
        actions = self._scheduler.lost(member.number)
        self._carry_out(actions)

    def _look_after_actors(self) -> None:
        """Find the silent, and see that there is somebody at all."""
        pool, now_s = self._pool, time.perf_counter()
        for member in list(pool._members.values()):
            if member.ready_s is None:
                continue
            if member.ping is None:
                if now_s - member.pinged_s > pool._hang_timeout_s / 5:
                    member.ping, member.pinged_s = member.handle.ping.remote(), now_s
                    pool._pending[member.ping] = ("ping", member)
            elif now_s - member.pinged_s > pool._hang_timeout_s:
                pool._end_silent(member)
                self._lost(member, f"gave no sign of life for {pool._hang_timeout_s:g} s")
        if not pool._members:
            raise EvaluationFailed(
                f"all actors were lost, {pool._lost} in all; the last: {self._last_reason}",
                "see that the machines are healthy and have memory enough, and evaluate again",
            )
        if not pool._ready and now_s - pool._without_s > pool._start_timeout_s:
            what = " and ".join(f"{amount:g} {name}" for name, amount in pool._bundle.items())
            raise ClusterError(
                f"none of {pool._num_actors} actors ({what} each) was ready within "
                f"{pool._start_timeout_s:g} s",
                "free the cluster, ask for fewer, or raise cluster.start_timeout_s",
            )

    def _carry_out(self, actions: Sequence[Action]) -> None:
        for action in actions:
            member = self._pool._members.get(_number(action))
            if member is None:
                continue
            if isinstance(action, Start):
                ref = member.handle.run.remote(self._units[action.unit])
                member.runs[ref] = action.unit
                self._pool._pending[ref] = ("run", member)
            else:
                for ref in [r for r, unit in member.runs.items() if unit == action.unit]:
                    with contextlib.suppress(RayError):
                        ray.cancel(ref)

    def _give_up(self, given_up: GivenUp) -> None:
        self._num_failed += 1
        how = "cost an actor each time" if given_up.lost_actors else "failed each time"
        error = EvaluationFailed(
            f"{self._describe(given_up.unit)} {how}, {given_up.times} times; the last: "
            f"{self._reasons[given_up.unit]}",
            "no score is given for the rest alone; evaluate it in one process to see more",
        )
        if self._on_failed is None:
            raise error
        self._carry_out(self._scheduler.abandon(self._on_failed(given_up.unit, error)))

    def _report(self) -> PoolReport:
        pool, now_s = self._pool, time.perf_counter()
        first_s = pool._first_ready_s or now_s
        held_s = sum(now_s - m.ready_s for m in pool._members.values() if m.ready_s is not None)
        return PoolReport(
            num_actors=pool._num_actors,
            units=len(self._units),
            retried=self._scheduler.retried,
            stolen=self._scheduler.stolen,
            lost_actors=pool._lost,
            start_s=first_s - pool._began_s,
            prepare_s=pool._prepare_s,
            wall_s=now_s - first_s,
            busy_s=pool._busy_s,
            held_s=pool._held_s + held_s,
        )


def _number(action: Action) -> int:
    assert isinstance(action, (Start, Cancel)) and isinstance(action.actor, int)
    return action.actor


def _reason(error: Exception) -> str:
    if isinstance(error, GolfRayError):
        return error.problem
    return f"{type(error).__name__}: {_short(error)}"


def _short(error: BaseException) -> str:
    # Ray goes on with identifiers that say nothing to people.
    text = " ".join(str(error).split()).split(" class_name: ")[0]
    return text[:160] + "..." if len(text) > 160 else text
