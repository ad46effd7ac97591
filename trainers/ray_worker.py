"""What a training runs on a Ray cluster: the loop on each worker, and a watch on the controller.

The driver's part is `trainers.ray_train`. The two sides share a `Channel`: small messages through
the cluster's own key-value store, so that a progress bar costs no process and leaves nothing
behind once the driver has cleared it.

Invariant: every rank reports each checkpoint to Ray Train, so all of them wait at the same points;
a worker that makes no progress for the configured time ends itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from numpy.typing import NDArray
from ray.exceptions import RayActorError, RayError
from ray.experimental import internal_kv
from ray.train.v2._internal.exceptions import (
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from golf_ray.config import Config
from golf_ray.errors import ClusterError, GolfRayError, TrainingFailed
from golf_ray.optim.world import World
from trainers.failures import Kind, WorkerFailure, judge
from trainers.local import CHECKPOINTS, checkpoint_name, write_checkpoint
from trainers.loop import TrainingRun
from trainers.reporting import Interval, Reporter, WriteFolder
from trainers.storage import Storage
from trainers.validation import PackedValidation

NAMESPACE = b"golf_ray"
PULSE_S = 0.25
"""Seconds between two looks at a worker's progress."""
RATE_WINDOW_S = 10.0
"""Seconds over which a speed is measured."""
SHUTDOWN_PATIENCE_S = 3
"""Seconds for a process group of which a member is dead or hung to be taken down; 30 in Ray."""

Message = dict[str, Any]


class Channel:
    """Messages from a run's processes to its driver, in the cluster's key-value store.

    Args:
        run_key: unique to one call of the driver.
        attempt: of the workers, from 1.
        source: who writes, such as a rank.
    """

    def __init__(self, run_key: str, attempt: int = 0, source: str = "driver") -> None:
        self._run_key = run_key
        self._source = source
        self.attempt = attempt

    def put(self, kind: str, **values: Any) -> None:
        """Send a message, which the driver reads once."""
        message = {"kind": kind, "attempt": self.attempt, "unix_s": time.time(), **values}
        key = f"{self._run_key}/m/{self.attempt:06d}/{time.time_ns():020d}/{self._source}"
        self._set(key, json.dumps(message).encode())

    def put_progress(self, **values: Any) -> None:
        """Set the latest progress, in the place of the one before."""
        message = {"attempt": self.attempt, **values}
        self._set(f"{self._run_key}/progress", json.dumps(message).encode())

    def take(self) -> list[Message]:
        """All messages that came since, in order of attempt and time."""
        found = []
        for key in sorted(internal_kv._internal_kv_list(f"{self._run_key}/m/", namespace=NAMESPACE)):
            value = internal_kv._internal_kv_get(key, namespace=NAMESPACE)
            internal_kv._internal_kv_del(key, namespace=NAMESPACE)
            if value is not None:
                found.append(json.loads(value))
        return found

    def progress(self) -> Message | None:
        """The latest progress."""
        value = self._get(f"{self._run_key}/progress")
        return None if value is None else json.loads(value)

    def announce_attempt(self) -> None:
        """Tell workers that are about to start which attempt they are."""
        self._set(f"{self._run_key}/attempt", str(self.attempt).encode())

    def announced_attempt(self) -> int:
        """Which attempt has been announced last."""
        return int(self._get(f"{self._run_key}/attempt") or 0)

    def leave_controller(self, handle: Any) -> None:
        """Let the driver have the controller's handle, to stop it by."""
        self._set(f"{self._run_key}/controller", ray.cloudpickle.dumps(handle))

    def controller(self) -> Any | None:
        """The controller's handle, once it has begun."""
        value = self._get(f"{self._run_key}/controller")
        return None if value is None else ray.cloudpickle.loads(value)

    def clear(self) -> None:
        """Remove everything of the run from the cluster."""
        internal_kv._internal_kv_del(f"{self._run_key}/", del_by_prefix=True, namespace=NAMESPACE)

    def _set(self, key: str, value: bytes) -> None:
        internal_kv._internal_kv_put(key, value, overwrite=True, namespace=NAMESPACE)

    def _get(self, key: str) -> bytes | None:
        return internal_kv._internal_kv_get(key, namespace=NAMESPACE)


# On the workers ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerJob:
    """What every worker of a training is given."""

    run_key: str
    run_uri: str
    config: Config
    shards: tuple[str, ...]
    """Absolute paths: a worker's working folder is Ray's."""
    data_dir: str
    """The data folder, absolute."""
    device: str
    threads: int
    initial: dict[str, NDArray[Any]] | None
    resume_from: str | None
    """Checkpoint folder of an earlier driver to begin with."""


def train_worker(job: WorkerJob) -> dict[str, Any]:
    """One rank of a training, from process group to result.

    Raises:
        GolfRayError: an error that a restart would not mend.
    """
    torch.set_num_threads(job.threads)
    rank = ray.train.get_context().get_world_rank()
    channel = Channel(job.run_key, source=f"rank-{rank}")
    channel.attempt = channel.announced_attempt()
    device = _device(job, rank)
    world = World.current(device)
    with RayReporter(job, channel, world) as reporter, _out_of_memory(rank):
        config = job.config
        at_home = config.with_overrides({"data.dir": job.data_dir})
        initial = None
        if job.initial is not None:
            initial = {name: torch.from_numpy(value.copy()) for name, value in job.initial.items()}
        with TrainingRun(
            config,
            [Path(shard) for shard in job.shards],
            world=world,
            reporter=reporter,
            validate=PackedValidation.of_config(at_home),
            initial=initial,
        ) as run:
            with _checkpoint_folder(job) as folder:
                if folder is not None:
                    run.resume(folder)
            result = run.run()
    return dataclasses.asdict(result)


def _device(job: WorkerJob, rank: int) -> torch.device:
    if job.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ClusterError(
            f"worker {rank} on {socket.gethostname()} has no GPU that torch can use",
            "see 'golf-ray doctor' there, or compute on CPUs with --set cluster.device=cpu",
        )
    device = ray.train.torch.get_device()
    assert isinstance(device, torch.device)
    return device


@contextlib.contextmanager
def _checkpoint_folder(job: WorkerJob) -> Iterator[Path | None]:
    """The checkpoint to go on from, as a folder on this machine."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None and job.resume_from is not None:
        place = Storage(job.run_uri).child(CHECKPOINTS).child(job.resume_from)
        checkpoint = ray.train.Checkpoint(path=place.path, filesystem=place.filesystem)
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        yield Path(folder)


@contextlib.contextmanager
def _out_of_memory(rank: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = str(error).splitlines()[0]
        raise TrainingFailed(
            f"worker {rank} on {socket.gethostname()} ran out of GPU memory ({first})",
            "raise train.micro_batches, or use more workers",
        ) from error


class RayReporter(Reporter):
    """Tells Ray Train of checkpoints and the driver of everything else.

    A thread of its own sends the latest progress, and ends the process when there is none for
    `cluster.hang_timeout_s`: Ray Train sees the death and restarts the workers.
    """

    def __init__(self, job: WorkerJob, channel: Channel, world: World) -> None:
        self._job = job
        self._channel = channel
        self._world = world
        self._config = job.config
        self._loop_thread = threading.get_ident()
        self._steps: deque[tuple[float, int]] = deque(maxlen=1024)
        self._num_steps = 0
        self._loss = math.nan
        self._elapsed_at_begin = (time.monotonic(), 0.0)
        self._beat_s = time.monotonic()
        self._began = False
        self._ended = threading.Event()
        self._pulse = threading.Thread(target=self._watch, name="golf-ray-pulse", daemon=True)

    def __enter__(self) -> RayReporter:
        self._pulse.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._pulse.join()

    def begin(self, step: int, num_steps: int) -> None:
        """Say where the attempt begins."""
        self._num_steps = num_steps
        self._advance(step)
        if self._world.rank == 0:
            self._channel.put("began", step=step, num_steps=num_steps)

    def stepped(self, step: int, loss_nats: float) -> None:
        """Note it; the pulse sends it."""
        self._loss = loss_nats
        self._began = True
        self._advance(step)

    def interval(self, interval: Interval) -> None:
        """Send the record: once this returns, the driver will have it."""
        self._beat_s = time.monotonic()
        self._elapsed_at_begin = (time.monotonic(), interval.elapsed_s)
        if self._world.rank == 0:
            self._channel.put("interval", record=interval.to_dict())

    def checkpoint(self, step: int, write: WriteFolder, *, final: bool) -> None:
        """Write on rank 0, then report on all.

        Raises:
            StorageError: the storage cannot be written or has no space left.
        """
        self._beat_s = time.monotonic()
        began = time.monotonic()
        checkpoint = self._commit(step, write) if self._world.rank == 0 else None
        ray.train.report(
            {"step": step},
            checkpoint=checkpoint,
            checkpoint_dir_name=checkpoint_name(step),
            checkpoint_upload_fn=_already_there,
        )
        if self._world.rank == 0:
            seconds = time.monotonic() - began
            self._channel.put("checkpoint", step=step, final=final, seconds=seconds)
        self._beat_s = time.monotonic()

    def _commit(self, step: int, write: WriteFolder) -> ray.train.Checkpoint:
        """Bring a checkpoint to its place under its name."""
        place = Storage(self._job.run_uri).child(CHECKPOINTS)
        if place.local is not None:
            write_checkpoint(place.local, step, write)
        else:
            with tempfile.TemporaryDirectory(prefix="golf-ray-") as folder:
                write(Path(folder))
                upload(place, checkpoint_name(step), Path(folder))
        target = place.child(checkpoint_name(step))
        return ray.train.Checkpoint(path=target.path, filesystem=target.filesystem)

    def _advance(self, step: int) -> None:
        self._beat_s = time.monotonic()
        self._steps.append((self._beat_s, step))

    # The pulse's own thread -----------------------------------------------------------------

    def _watch(self) -> None:
        sent = None
        while not self._ended.wait(PULSE_S):
            if self._world.rank == 0 and self._steps and self._steps[-1] != sent:
                sent = self._steps[-1]
                self._channel.put_progress(**self._progress(sent[1]))
            limit_s = self._config.cluster.hang_timeout_s
            if not self._began:
                # Before the first step there is loading, and on a GPU compiling.
                limit_s += self._config.cluster.start_timeout_s
            quiet_s = time.monotonic() - self._beat_s
            if quiet_s > limit_s:
                self._end_stuck(quiet_s)

    def _progress(self, step: int) -> Message:
        now_s, now_step = self._steps[-1]
        began_s, began_step = next(
            (point for point in list(self._steps) if now_s - point[0] <= RATE_WINDOW_S),
            self._steps[-1],
        )
        steps_per_s = (now_step - began_step) / max(now_s - began_s, 1e-9)
        return {
            "step": step,
            "num_steps": self._num_steps,
            "loss_nats": self._loss,
            "tokens_per_s": steps_per_s * self._config.train.batch_tokens,
            "seconds_left": self._seconds_left(step, steps_per_s),
        }

    def _seconds_left(self, step: int, steps_per_s: float) -> float | None:
        """Until the steps or the wall-clock cap are used up, whichever is first."""
        train = self._config.train
        ends = []
        if steps_per_s > 0:
            ends.append((self._num_steps - step) / steps_per_s)
        if train.max_wallclock_s is not None:
            at_s, elapsed_s = self._elapsed_at_begin
            used_s = elapsed_s + time.monotonic() - at_s
            ends.append(max(0.0, train.max_wallclock_s - train.reserve_s - used_s))
        return min(ends, default=None)

    def _end_stuck(self, quiet_s: float) -> None:
        """Say where the loop stands, then end this process."""
        where, waiting = _standing(sys._current_frames().get(self._loop_thread))
        step = self._steps[-1][1] if self._steps else 0
        self._channel.put(
            "stuck", rank=self._world.rank, host=socket.gethostname(), pid=os.getpid(), step=step,
            seconds=quiet_s, where=where, waiting=waiting,
        )  # fmt: skip
        os.kill(os.getpid(), signal.SIGKILL)


def upload(place: Storage, name: str, folder: Path) -> None:
    """Copy a checkpoint folder to an object store; its configuration, read first, goes last."""
    names = sorted(path.name for path in folder.iterdir())
    target = place.child(name)
    for file in sorted(names, key=lambda n: n == CHECKPOINT_LAST):
        target.write_file(file, folder / file)


CHECKPOINT_LAST = "config.json"
"""The file whose presence says that a checkpoint in an object store is complete."""


def _already_there(checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
    return checkpoint


def _standing(frame: FrameType | None) -> tuple[str, bool]:
    """Where a thread is in this code, and whether it waits for other workers there."""
    stack = traceback.extract_stack(frame) if frame is not None else []
    waiting = any("torch/distributed" in entry.filename for entry in stack)
    own = [e for e in stack if Path(e.filename).parent.parent.name != "site-packages"]
    mine = [e for e in own if {"golf_ray", "trainers"} & set(Path(e.filename).parts)]
    last = (mine or stack)[-1] if stack else None
    where = f"{Path(last.filename).name}:{last.lineno} {last.name}" if last else "unknown"
    return where, waiting


# On the controller ------------------------------------------------------------------------------


class RunWatch(ControllerCallback, WorkerGroupCallback):
    """Tells the driver of workers that start and fail, and ends what a restart would not mend.

    Args:
        run_key: of the channel.
        attempts_before: of earlier drivers of the run.
        hang_timeout_s: for the words only.
    """

    def __init__(self, run_key: str, attempts_before: int, hang_timeout_s: float) -> None:
        self._run_key = run_key
        self._attempt = attempts_before
        self._hang_timeout_s = hang_timeout_s
        self._workers: list[Message] = []

    def after_controller_start(self, train_run_context: Any) -> None:
        """Let the driver find the controller."""
        from ray.train.constants import TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S

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
        """Workers that could not be started are not seen by a poll."""
        if type(current_state).__name__ == "ReschedulingState":
            failure = current_state.training_failed_error
            reason = " ".join(str(getattr(failure, "controller_failure", failure)).split())
            self._channel().put("start_failed", reason=reason[:300])

    def _channel(self) -> Channel:
        return Channel(self._run_key, self._attempt, "watch")

    def _classify(self, rank: int, error: BaseException) -> WorkerFailure:
        worker = next((w for w in self._workers if w["rank"] == rank), {})
        kind, text = classify(error, self._hang_timeout_s)
        return WorkerFailure(
            rank=rank,
            kind=kind,
            text=text,
            host=worker.get("host", ""),
            pid=worker.get("pid"),
            error=error if isinstance(error, GolfRayError) else None,
        )


def classify(error: BaseException, hang_timeout_s: float) -> tuple[Kind, str]:
    """What kind of failure an exception from a worker is, and how to say it."""
    if isinstance(error, WorkerHealthCheckFailedError):
        error = error.health_check_failure
    line = " ".join(str(error).split())[:200]
    if isinstance(error, GolfRayError):
        return "refused", str(error)
    if isinstance(error, WorkerHealthCheckTimeoutError):
        return "hung", f"gave no sign of life within {hang_timeout_s:g} s"
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
