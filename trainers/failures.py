"""What became of a training's workers, and what to do about it: pure decisions, no Ray.

Invariant: an error that comes back every time (a loss that is not finite, a wrong shard, a bug)
ends a training at once; what the machine did to it (a worker that died or hung) restarts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from golf_ray.errors import GolfRayError, TrainingFailed

Kind = Literal["refused", "hung", "died", "system", "error", "communication"]
"""`refused`: an error of golf_ray's own, said in one line. `hung`: no sign of life. `died`: the
process or its node is gone. `system`: the operating system or Ray refused something. `error`: any
other exception. `communication`: a collective failed, mostly because another worker did."""

_FIRST: tuple[Kind, ...] = ("refused", "hung", "died", "system", "error", "communication")
_RESTARTS: frozenset[Kind] = frozenset({"hung", "died", "system", "communication"})


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerFailure:
    """How one worker failed."""

    rank: int
    kind: Kind
    text: str
    """In words that follow 'worker 3 on HOST'."""
    host: str = ""
    pid: int | None = None
    error: GolfRayError | None = None
    """Of kind `refused`."""

    def describe(self) -> str:
        """One line, the worker named."""
        where = f" on {self.host}" if self.host else ""
        process = f" (process {self.pid})" if self.pid is not None else ""
        return f"worker {self.rank}{where}{process} {self.text}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for an event's record."""
        return {
            "rank": self.rank, "kind": self.kind, "text": self.text, "host": self.host,
            "pid": self.pid,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What to do about the failures of one moment."""

    cause: WorkerFailure
    """The one that explains the others."""
    restart: bool
    error: GolfRayError | None
    """What to end with where there is no restart."""


def judge(failures: Sequence[WorkerFailure]) -> Verdict:
    """Find the cause among failures seen together, and decide.

    When one worker goes, the others' collectives fail: what a worker suffered counts before what
    it saw of others, and of equals the lowest rank.
    """
    assert failures
    cause = min(failures, key=lambda f: (_FIRST.index(f.kind), f.rank))
    if cause.kind in _RESTARTS:
        return Verdict(cause=cause, restart=True, error=None)
    error = cause.error or TrainingFailed(
        cause.describe(), "this is not a fault of the machine: see 'traceback' in events.jsonl"
    )
    return Verdict(cause=cause, restart=False, error=error)


@dataclass(frozen=True, kw_only=True, slots=True)
class Restart:
    """One restart of a training."""

    attempt: int
    """The attempt that it began, from 2."""
    unix_s: float
    """When the failure was seen."""
    reason: str
    rank: int | None
    """Worker that was the cause; None where the workers could not be started."""
    lost_at_step: int
    """Steps that the failed attempt was known to have done."""
    resumed_from_step: int
    """Steps that the new attempt began with; 0 for none."""
    seconds: float
    """From seeing the failure to going on."""

    def describe(self) -> str:
        """One line."""
        return (
            f"{self.reason}; restarted from step {self.resumed_from_step} after "
            f"{self.seconds:.1f} s (step {self.lost_at_step} had been reached)"
        )
