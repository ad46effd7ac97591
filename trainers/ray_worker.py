"""What a training runs on every worker of a Ray cluster: the loop, and its reporter.

The driver's part is `trainers.ray_train`, the controller's `trainers.ray_watch`.

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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import ray.train
import torch
from ray.exceptions import RayError
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import get_device

from golf_ray.config import Config
from golf_ray.errors import ClusterError, TrainingFailed
from golf_ray.model.arrays import Arrays, tensors_of
from golf_ray.optim import world as world_module
from golf_ray.optim.world import World
from golf_ray.records import atomic_write_text, read_jsonl
from trainers.convergence import require_promise
from trainers.local import CHECKPOINTS, INTERVALS_FILE, checkpoint_name, write_checkpoint
from trainers.loop import TrainingRun
from trainers.ray_channel import Channel, Message
from trainers.reporting import Interval, Reporter, WriteFolder
from trainers.storage import Storage
from trainers.validation import PackedValidation

PULSE_S = 0.25
"""Seconds between two looks at a worker's progress."""
RATE_WINDOW_S = 10.0
"""Seconds over which a speed is measured."""


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
    initial: Arrays | None
    """Weights to begin with."""
    bars: Mapping[int, float] = field(default_factory=dict)
    """Validation bpb by step, above which the run is ended."""


def train_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """One rank of a training, from process group to result.

    Args:
        arguments: `job`, a `WorkerJob`.

    Raises:
        GolfRayError: an error that a restart would not mend.
    """
    job: WorkerJob = arguments["job"]
    torch.set_num_threads(job.threads)
    rank = ray.train.get_context().get_world_rank()
    channel = Channel(job.run_key, source=f"rank-{rank}")
    channel.attempt = channel.announced_attempt()
    device = _device(job, rank)
    world = World.current(device)
    with RayReporter(job, channel, world) as reporter, _out_of_memory(rank):
        config = job.config
        at_home = config.with_overrides({"data.dir": job.data_dir})
        initial = None if job.initial is None else tensors_of(job.initial)
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
                    reporter.resume(folder, run.clock.elapsed_s())
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
    device = get_device()
    assert isinstance(device, torch.device)
    return device


@contextlib.contextmanager
def _checkpoint_folder(job: WorkerJob) -> Iterator[Path | None]:
    """The newest complete checkpoint, the same for all ranks, as a folder on this machine.

    Ray's own last checkpoint may be older: it counts one only when its controller has looked.
    """
    run = Storage(job.run_uri)
    rank = ray.train.get_context().get_world_rank()
    name = broadcast_from_rank_zero(newest_checkpoint(run) if rank == 0 else None)
    if name is None:
        yield None
        return
    place = run.child(CHECKPOINTS).child(name)
    checkpoint = ray.train.Checkpoint(path=place.path, filesystem=place.filesystem)
    with checkpoint.as_directory() as folder:
        yield Path(folder)


def newest_checkpoint(run: Storage) -> str | None:
    """Name of the newest complete checkpoint folder of a run."""
    place = run.child(CHECKPOINTS)
    for name in reversed(place.names("step_")):
        if place.child(name).exists(CHECKPOINT_LAST):
            return name
    return None


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
        self._bars = job.bars
        self._loop_thread = threading.get_ident()
        self._steps: deque[tuple[float, int]] = deque(maxlen=1024)
        self._num_steps = 0
        self._loss = math.nan
        self._records: list[dict[str, Any]] = []
        self._elapsed_before_s = 0.0
        self._clock_at = (time.monotonic(), 0.0)
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

    def resume(self, folder: Path, elapsed_s: float) -> None:
        """Take up a checkpoint's own records.

        Args:
            elapsed_s: training time before it.
        """
        self._elapsed_before_s = elapsed_s
        self._records = list(read_jsonl(folder / INTERVALS_FILE))

    def begin(self, step: int, num_steps: int) -> None:
        """Say where the attempt begins."""
        self._num_steps = num_steps
        self._clock_at = (time.monotonic(), self._elapsed_before_s)
        self._advance(step)
        if self._world.rank == 0:
            self._channel.put("began", step=step, num_steps=num_steps)

    def prepared(self, seconds: float, code: dict[str, Any]) -> None:
        """Tell the driver."""
        self._beat_s = time.monotonic()
        if self._world.rank == 0:
            self._channel.put("prepared", seconds=seconds, code=code)

    def stepped(self, step: int, loss_nats: float) -> None:
        """Note it; the pulse sends it."""
        self._loss = loss_nats
        self._began = True
        self._advance(step)

    def interval(self, interval: Interval) -> None:
        """Send the record, and keep it for the checkpoint: the driver may not live to take it.

        Raises:
            TrainingPruned: the run is to be ended here; on every rank, as all know the same bpb.
        """
        self._beat_s = time.monotonic()
        self._clock_at = (time.monotonic(), interval.elapsed_s)
        if self._world.rank == 0:
            record = {**interval.to_dict(), "attempt": self._channel.attempt}
            self._records.append(record)
            self._channel.put("interval", record=record)
        if interval.val_bpb is not None:
            require_promise(self._bars, interval.step, interval.val_bpb)

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

        def write_all(folder: Path) -> None:
            write(folder)
            lines = "".join(json.dumps(record) + "\n" for record in self._records)
            atomic_write_text(folder / INTERVALS_FILE, lines)

        if place.local is not None:
            write_checkpoint(place.local, step, write_all)
        else:
            with tempfile.TemporaryDirectory(prefix="golf-ray-") as folder:
                write_all(Path(folder))
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
                # A progress bar that misses a beat is no reason to end, nor to stop watching.
                with contextlib.suppress(RayError):
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
            at_s, elapsed_s = self._clock_at
            used_s = elapsed_s + time.monotonic() - at_s
            ends.append(max(0.0, train.max_wallclock_s - train.reserve_s - used_s))
        return min(ends, default=None)

    def _end_stuck(self, quiet_s: float) -> None:
        """Say where the loop stands, then end this process."""
        where, waiting = _standing(sys._current_frames().get(self._loop_thread))
        step = self._steps[-1][1] if self._steps else 0
        with contextlib.suppress(RayError):
            self._channel.put(
                "stuck",
                rank=self._world.rank,
                host=socket.gethostname(),
                pid=os.getpid(),
                step=step,
                seconds=quiet_s,
                where=where,
                waiting=waiting,
            )
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
    root = Path(__file__).parent.parent
    homes = (root / "golf_ray", root / "trainers")
    mine = [e for e in stack if any(Path(e.filename).is_relative_to(home) for home in homes)]
    if not mine:
        return "unknown", False
    last = mine[-1]
    waiting = any(Path(e.filename) == Path(world_module.__file__) for e in mine)
    return f"{Path(last.filename).relative_to(root)}:{last.lineno} in {last.name}", waiting
