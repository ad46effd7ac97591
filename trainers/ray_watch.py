"""The watch that sits on Ray Train's controller: who the workers are, how they fail, what then.

It tells the driver through the channel and ends what a restart would not mend. The decision is
`trainers.failures`'s; here Ray's exceptions are put into words.

Invariant: an error of golf_ray's own reaches the driver as it was raised.
"""

from __future__ import annotations

import os
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayError
from ray.train.constants import TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import ReschedulingState

from golf_ray.errors import ClusterError, GolfRayError
from trainers.failures import Kind, WorkerFailure, judge
from trainers.ray_channel import Channel, Message

SHUTDOWN_PATIENCE_S = 3
"""Seconds for a process group of which a member is dead or hung to be taken down; 30 in Ray."""


class RunWatch(ControllerCallback, WorkerGroupCallback):
    """Tells the driver of workers that start and fail, and ends what a restart would not mend.

    Args:
        run_key: of the channel.
        attempts_before: of earlier drivers of the run.
        silence_s: how long a worker may say nothing, for the words only.
        unplaced: what to end with when workers are not placed in time.
    """

    def __init__(
        self, run_key: str, attempts_before: int, silence_s: float, unplaced: ClusterError
    ) -> None:
        self._run_key = run_key
        self._attempt = attempts_before
        self._silence_s = silence_s
        self._unplaced = unplaced
        self._workers: list[Message] = []

    def after_controller_start(self, train_run_context: Any) -> None:
        """Let the driver find the controller."""
        os.environ.setdefault(TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S, str(SHUTDOWN_PATIENCE_S))
        self._channel().leave_controller(ray.get_runtime_context().current_actor)

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        """A new attempt."""
        self._attempt += 1
        self._workers = []
        self._channel().announce_attempt()

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Say who the workers are."""
        self._workers = [
            {
                "rank": worker.distributed_context.world_rank,
                "host": worker.metadata.hostname,
                "node_id": worker.metadata.node_id,
                "pid": worker.metadata.pid,
                "gpus": list(worker.metadata.gpu_ids),
            }
            for worker in worker_group.get_workers()
        ]
        self._channel().put("workers", workers=self._workers)

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Look at failures.

        Raises:
            GolfRayError: a restart would not mend it; Ray ends the run with it.
        """
        errors: dict[int, BaseException] = worker_group_status.errors
        if not errors:
            return
        failures = [self._classify(rank, error) for rank, error in errors.items()]
        verdict = judge(failures)
        raw = worker_group_status.worker_statuses[verdict.cause.rank].error
        self._channel().put(
            "failure",
            restart=verdict.restart,
            reason=verdict.cause.describe(),
            failures=[failure.to_dict() for failure in failures],
            rank=verdict.cause.rank,
            traceback=getattr(raw, "_traceback_str", None) or str(raw),
        )
        if verdict.error is not None:
            raise verdict.error

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Workers that could not be started are not seen by a poll.

        Raises:
            ClusterError: they were not placed in time; waiting as long again would not place them.
        """
        if not isinstance(current_state, ReschedulingState):
            return
        failure = current_state.training_failed_error
        cause = getattr(failure, "controller_failure", failure)
        reason = " ".join(str(cause).split())[:300]
        timed_out = isinstance(cause, WorkerGroupStartupTimeoutError)
        self._channel().put("start_failed", reason=reason, restart=not timed_out)
        if timed_out:
            raise self._unplaced

    def _channel(self) -> Channel:
        return Channel(self._run_key, self._attempt, "watch")

    def _classify(self, rank: int, error: BaseException) -> WorkerFailure:
        worker = next((w for w in self._workers if w["rank"] == rank), {})
        kind, text = classify(error, self._silence_s)
        return WorkerFailure(
            rank=rank,
            kind=kind,
            text=text,
            host=worker.get("host", ""),
            pid=worker.get("pid"),
            error=error if isinstance(error, GolfRayError) else None,
        )


def classify(error: BaseException, silence_s: float) -> tuple[Kind, str]:
    """What kind of failure an exception from a worker is, and how to say it."""
    if isinstance(error, WorkerHealthCheckFailedError):
        error = error.health_check_failure
    line = " ".join(str(error).split())[:200]
    if isinstance(error, GolfRayError):
        return "refused", str(error)
    if isinstance(error, WorkerHealthCheckTimeoutError):
        return "hung", f"gave no sign of life within {silence_s:g} s"
    if isinstance(error, RayActorError):
        return "died", _death(error)
    if isinstance(error, torch.distributed.DistError) or _is_communication(error):
        return "communication", f"lost the others ({line})"
    if isinstance(error, (RayError, OSError, MemoryError)) or "CUDA error" in line:
        return "system", f"was refused something ({type(error).__name__}: {line})"
    return "error", f"raised {type(error).__name__}: {line}"


def _is_communication(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    return any(sign in text for sign in ("gloo", "NCCL", "ProcessGroup", "Connection closed"))


def _death(error: RayActorError) -> str:
    text = str(error)
    if error.preempted:
        return "was lost: its node was taken away"
    if "memory" in text and "OutOfMemory" in text.replace(" ", ""):
        return "was ended: its node ran short of memory"
    if "node" in text.lower() and "terminated" in text.lower():
        return "was lost: its node is gone"
    return "died: its process was killed, ran out of memory or crashed"
