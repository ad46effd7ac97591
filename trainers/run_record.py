"""The driver's account of a training on Ray: its records, what it tells the caller, its outcome.

Only the driver writes records: workers send them, and the records of steps that are taken again
after a restart are taken out first, so that no interval is there twice.

Invariant: `intervals.jsonl` holds one record for each interval of the steps that led to the
weights; `events.jsonl` holds everything that happened, also what was undone.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from trainers.failures import Restart
from trainers.local import CHECKPOINTS, INTERVALS_FILE, checkpoint_name
from trainers.loop import TrainingResult
from trainers.storage import LineFile, Storage, parse_lines

EVENTS_FILE = "events.jsonl"

Message = dict[str, Any]
Phase = Literal["starting", "preparing", "training", "restarting"]
"""Workers are asked for; they are there, and compile; they train; some were lost."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgressEvent:
    """How a run stands."""

    phase: Phase
    step: int
    num_steps: int
    loss_nats: float
    """Of a recent step; NaN before the first."""
    tokens_per_s: float
    seconds_left: float | None
    """Until steps or wall-clock cap are used up; None where not known yet."""
    message: str | None = None
    """What happened, where something worth a line did."""


OnProgress = Callable[[ProgressEvent], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingOutcome:
    """How a training on Ray ended."""

    result: TrainingResult
    run_uri: str
    checkpoint: str
    """Folder of the last checkpoint, with the whole state."""
    final_model: str
    num_workers: int
    device: str
    threads: int
    """CPU threads of each worker: on a CPU part of the result's last bits."""
    restarts: tuple[Restart, ...]
    start_s: float
    """From asking Ray for workers to their first step (or to going on), the first time."""
    wall_s: float
    """Everything, the start included."""
    val_bpb: float | None
    """Of the raw weights in the last interval, where it was evaluated."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> TrainingOutcome:
        """The inverse of `to_dict`."""
        result = TrainingResult(**data["result"])
        restarts = tuple(Restart(**restart) for restart in data["restarts"])
        return TrainingOutcome(**{**data, "result": result, "restarts": restarts})


class RunRecord:
    """Takes what workers and controller send, keeps the run's records, and tells the caller.

    Args:
        storage: the run's folder.
        on_progress: told of progress and of what happened.
    """

    def __init__(self, storage: Storage, on_progress: OnProgress | None) -> None:
        self._storage = storage
        self.intervals = LineFile(storage, INTERVALS_FILE)
        self.events = LineFile(storage, EVENTS_FILE)
        self.restarts: list[Restart] = []
        self.start_s = 0.0
        self.attempts_before = max((e.get("attempt", 0) for e in self.events.values), default=0)
        self.step = 0
        self.num_steps = 0
        self.last_message_s = time.monotonic()
        self._asked_s = time.monotonic()
        self._on_progress = on_progress
        self._seen: Message | None = None
        self._failure: Message | None = None
        self._stuck: list[Message] = []
        self._phase: Phase = "starting"

    def event(self, kind: str, **values: Any) -> None:
        """Write an event of the driver's own."""
        self.events.append({"kind": kind, "unix_s": time.time(), **values})

    def take(self, message: Message) -> None:
        """Take a message of a worker or of the controller."""
        self.last_message_s = time.monotonic()
        kind = message["kind"]
        if kind == "interval":
            self.intervals.append(message["record"])
            return
        self.events.append(message)
        if kind == "workers" and self._phase == "starting":
            self._phase = "preparing"
            self._tell(None)
        elif kind == "began":
            self._began(message)
        elif kind == "stuck":
            self._stuck.append(message)
        elif kind in ("failure", "start_failed"):
            self._failed(message)

    def progress(self, message: Message | None) -> None:
        """Take the latest progress, which may be one that was seen."""
        if message is None or message == self._seen:
            return
        self._seen = message
        self.last_message_s = time.monotonic()
        self.step = message["step"]
        self._tell(message)

    def reason(self, failure: Message) -> str:
        """Why an attempt failed, in one line: a worker that said where it stood knows best."""
        # What ends itself later does so because it waited for the one that failed.
        mine = [s for s in self._stuck if s["unix_s"] <= failure["unix_s"]]
        if not mine:
            return str(failure["reason"])
        stuck = min(mine, key=lambda s: (s["waiting"], s["rank"]))
        return (
            f"worker {stuck['rank']} on {stuck['host']} (process {stuck['pid']}) made no progress "
            f"for {stuck['seconds']:.0f} s, standing at {stuck['where']}"
        )

    @property
    def last_reason(self) -> str | None:
        """Why the last attempt failed, where it is known to have."""
        return None if self._failure is None else self.reason(self._failure)

    def say(self, line: str) -> None:
        """Tell the caller of something worth a line."""
        self._tell(None, line)

    def tell_nobody(self) -> None:
        """Keep records only, from now on: the caller is about to leave."""
        self._on_progress = None

    def flush(self) -> None:
        """Write what is due."""
        self.intervals.flush()
        self.events.flush()

    def close(self) -> None:
        """Write everything."""
        self.intervals.flush(now=True)
        self.events.flush(now=True)

    def _began(self, message: Message) -> None:
        step = message["step"]
        self.intervals.replace(self._records_until(step))
        self.num_steps = message["num_steps"]
        self._phase = "training"
        if self._failure is not None:
            restart = Restart(
                attempt=message["attempt"],
                unix_s=self._failure["unix_s"],
                reason=self.reason(self._failure),
                rank=self._failure.get("rank"),
                lost_at_step=max(self.step, step),
                resumed_from_step=step,
                seconds=message["unix_s"] - self._failure["unix_s"],
            )
            self._failure = None
            self._stuck.clear()
            self.restarts.append(restart)
            self.event("restarted", **dataclasses.asdict(restart))
            self._tell(None, restart.describe())
        elif not self.start_s:
            self.start_s = time.monotonic() - self._asked_s
        self.step = step

    def _records_until(self, step: int) -> list[Any]:
        """Records of steps that a checkpoint stands on: those here, and those that it carries in
        case a driver before this one did not live to take them."""
        name = f"{CHECKPOINTS}/{checkpoint_name(step)}/{INTERVALS_FILE}"
        carried = parse_lines(self._storage.read_bytes(name) or b"")
        known = {r["step"]: r for r in [*carried, *self.intervals.values] if r["step"] <= step}
        return [known[s] for s in sorted(known)]

    def _failed(self, message: Message) -> None:
        if self._failure is None:
            self._failure = message
        self._phase = "restarting"
        if message.get("restart", True):
            self._tell(None, f"{message['reason']}; restarting")

    def _tell(self, progress: Message | None, message: str | None = None) -> None:
        if self._on_progress is None:
            return
        known = progress or {}
        self._on_progress(
            ProgressEvent(
                phase=self._phase,
                step=self.step,
                num_steps=self.num_steps,
                loss_nats=known.get("loss_nats", math.nan),
                tokens_per_s=known.get("tokens_per_s", 0.0),
                seconds_left=known.get("seconds_left"),
                message=message,
            )
        )
