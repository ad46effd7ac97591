"""A training in this process, without Ray: its run folder, and how it goes on after a crash.

    RUN/config.json          the configuration
    RUN/intervals.jsonl      a record for every interval
    RUN/checkpoints/step_N/  the last two checkpoints
    RUN/result.json          once the run has ended
    RUN/final_model.pt       its result

Invariant: a checkpoint folder under its own name is complete: it is written beside, forced to
disk and renamed. So a run that is killed at any moment can be resumed from the newest one.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from golf_ray.config import Config
from golf_ray.errors import CheckpointError, StorageError, UsageError
from golf_ray.optim.world import World
from golf_ray.records import (
    append_jsonl,
    atomic_path,
    atomic_write_json,
    atomic_write_text,
    make_folder,
    read_jsonl,
    storage_error,
)
from trainers.claims import driving
from trainers.loop import TrainingResult, TrainingRun, Validate
from trainers.reporting import Interval, Reporter, WriteFolder
from trainers.state import CONFIG_FILE, FINAL_FILE, differing_fields
from trainers.storage import Storage

INTERVALS_FILE = "intervals.jsonl"
RESULT_FILE = "result.json"
CHECKPOINTS = "checkpoints"
KEEP = 2
"""Checkpoints kept: the newest, and the one before in case the newest is found damaged."""

_STEP = "step_"

OnStep = Callable[[int, int, float], None]
"""Told after every step: steps done, steps of the run, a recent loss."""


class LocalReporter(Reporter):
    """Writes a run folder.

    Args:
        run_dir: the folder, which is there.
        on_step: told of every step.
        on_interval: told of every interval.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        on_step: OnStep | None = None,
        on_interval: Callable[[Interval], None] | None = None,
    ) -> None:
        self.run_dir = run_dir
        self._on_step = on_step
        self._on_interval = on_interval
        self._num_steps = 0

    def begin(self, step: int, num_steps: int) -> None:
        """Take out what a killed run wrote after the checkpoint that this one goes on from."""
        self._num_steps = num_steps
        path = self.run_dir / INTERVALS_FILE
        kept = [record for record in read_jsonl(path) if record["step"] <= step]
        atomic_write_text(path, "".join(json.dumps(record) + "\n" for record in kept))

    def stepped(self, step: int, loss_nats: float) -> None:
        """Pass the step on."""
        if self._on_step is not None:
            self._on_step(step, self._num_steps, loss_nats)

    def interval(self, interval: Interval) -> None:
        """Append the record, then pass it on."""
        append_jsonl(self.run_dir / INTERVALS_FILE, interval.to_dict())
        if self._on_interval is not None:
            self._on_interval(interval)

    def checkpoint(self, step: int, write: WriteFolder, *, final: bool) -> None:
        """Write a checkpoint whole or not at all, and keep the newest.

        Raises:
            StorageError: the folder cannot be written or has no space left.
        """
        target = write_checkpoint(self.run_dir / CHECKPOINTS, step, write)
        if final:
            with atomic_path(self.run_dir / FINAL_FILE) as result:
                shutil.copyfile(target / FINAL_FILE, result)
        for old in checkpoints(self.run_dir)[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)


def checkpoint_name(step: int) -> str:
    """Name of a checkpoint's folder; names sort as steps do."""
    return f"{_STEP}{step:08d}"


def write_checkpoint(parent: Path, step: int, write: WriteFolder) -> Path:
    """Write a checkpoint folder whole or not at all.

    Raises:
        StorageError: the folder cannot be written or has no space left.
    """
    make_folder(parent)
    clear_unfinished(parent)
    target = parent / checkpoint_name(step)
    temporary = parent / f".{target.name}.tmp"
    try:
        temporary.mkdir()
        write(temporary)
        if target.exists():
            target.rename(parent / f".{target.name}.old")
        temporary.rename(target)
        _force_to_disk(parent)
    except OSError as error:
        raise storage_error(target, error) from None
    except RuntimeError as error:
        # What torch's zip writer says where the file system took less than it was given.
        if "inline_container" not in str(error):
            raise
        raise storage_error(target, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from None
    finally:
        clear_unfinished(parent)
    return target


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, the newest last."""
    return sorted((run_dir / CHECKPOINTS).glob(f"{_STEP}*"))


def clear_unfinished(parent: Path) -> None:
    """Remove what a killed process left of a checkpoint."""
    for leftover in parent.glob(f".{_STEP}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def require_unused(run_dir: Path) -> None:
    """See that a new run may take a folder.

    Raises:
        UsageError: there is a run, or something else, in it.
        StorageError: it cannot be looked into.
    """
    try:
        used = run_dir.is_dir() and any(run_dir.iterdir())
    except OSError as error:
        raise storage_error(run_dir, error) from None
    if (run_dir / CONFIG_FILE).is_file():
        raise UsageError(
            f"there is a run in {run_dir}", "add --resume to go on with it, or choose another"
        )
    if used:
        raise UsageError(f"the folder {run_dir} is not empty", "choose another --run-dir")


def require_same(run_dir: Path, config: Config) -> None:
    """See that a run was begun under a configuration that gives the same weights.

    Raises:
        UsageError: there is no run.
        CheckpointError: it was not.
    """
    differing = differing_fields(config, read_run_config(run_dir))
    if differing:
        path, mine, theirs = differing[0]
        raise CheckpointError(
            f"the run in {run_dir} was begun with {path} = {theirs!r}, not {mine!r}",
            "resume it under its own configuration, or begin a new run",
        )


def read_run_config(run_dir: Path) -> Config:
    """The configuration of a run that is there.

    Raises:
        UsageError: there is no run.
    """
    try:
        return Config.from_json((run_dir / CONFIG_FILE).read_text(encoding="utf-8"))
    except OSError:
        raise UsageError(
            f"there is no run in {run_dir} to go on with", "leave --resume out to begin one"
        ) from None


def read_result(run_dir: Path) -> TrainingResult | None:
    """How a run ended, or None where it has not."""
    try:
        data = json.loads((run_dir / RESULT_FILE).read_text(encoding="utf-8"))
        return TrainingResult(**data)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise StorageError(
            f"{run_dir / RESULT_FILE} cannot be read ({error})", "remove it and resume"
        ) from None


def train_in_process(
    config: Config,
    run_dir: Path,
    shards: Sequence[Path],
    *,
    resume: bool = False,
    device: torch.device | None = None,
    validate: Validate | None = None,
    on_step: OnStep | None = None,
    on_interval: Callable[[Interval], None] | None = None,
) -> TrainingResult:
    """Train with one rank, in this process.

    Args:
        run_dir: the run's folder: a new one, or with `resume` one that is there.
        shards: training shards in order.
        resume: go on from the newest checkpoint, or from the beginning where there is none.

    Raises:
        UsageError: the folder is in use, or with `resume` is not there; or somebody runs it at
            this moment.
        CheckpointError: the run was begun under another configuration.
        TrainingFailed: a loss is not finite.
        StorageError: the folder cannot be written or has no space left.
    """
    if not resume:
        require_unused(run_dir)
    else:
        require_same(run_dir, config)
        if (ended := read_result(run_dir)) is not None:
            return ended
    reporter = LocalReporter(run_dir, on_step=on_step, on_interval=on_interval)
    world = World(device=device or torch.device("cpu"))
    with TrainingRun(config, shards, world=world, reporter=reporter, validate=validate) as run:
        if not resume:
            # Only now: data that cannot be used leaves no run behind.
            make_folder(run_dir)
            atomic_write_text(run_dir / CONFIG_FILE, config.to_json())
        with driving(Storage(run_dir), f"the run in {run_dir}"):
            if resume and (found := checkpoints(run_dir)):
                run.resume(found[-1])
            result = run.run()
    atomic_write_json(run_dir / RESULT_FILE, dataclasses.asdict(result))
    return result


def _force_to_disk(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
