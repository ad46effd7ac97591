"""Training as one call: on Ray workers or in this process, with one way to tell of progress."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from golf_ray.api.machine import connected, cpu_threads, pick_device
from golf_ray.api.weights import FINAL_FILE
from golf_ray.config import Config
from golf_ray.errors import UsageError

if TYPE_CHECKING:
    from trainers.loop import TrainingResult
    from trainers.reporting import Interval
    from trainers.run_record import OnProgress, TrainingOutcome

PACE_STEPS = 20
"""Steps over which a speed is measured."""
PACE_TELL_S = 0.1
"""Seconds at least between two reports of progress."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """A run that ended."""

    run_dir: str
    final_model: str
    """Path or URI of the averaged weights."""
    result: TrainingResult
    val_bpb: float | None
    """Of the raw weights in the last interval, where it was evaluated."""
    outcome: TrainingOutcome | None = None
    """More about a training on Ray: workers, restarts, times; None for one in this process."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data = {"run_dir": self.run_dir, "final_model": self.final_model}
        data.update(dataclasses.asdict(self.result))
        outcome = self.outcome.to_dict() if self.outcome is not None else {}
        names = ("num_workers", "device", "threads", "restarts", "start_s", "wall_s")
        return {**data, "val_bpb": self.val_bpb, **{n: outcome[n] for n in names if n in outcome}}


def train(
    config: Config,
    *,
    run_dir: str | Path,
    resume: bool = False,
    in_process: bool = False,
    address: str | None = None,
    bars: Mapping[int, float] | None = None,
    claimed: bool = False,
    on_progress: OnProgress | None = None,
) -> Training:
    """Train a model on Ray workers, or in this process.

    Args:
        run_dir: the run's folder, on Ray also a URI that all nodes can write: a new one, or with
            `resume` one that is there.
        in_process: train here as one rank, without Ray.
        address: of a running Ray cluster to join; None starts a local one that ends with this.
        bars: on Ray, validation bpb by step, above which the run is ended.
        claimed: the caller sees to it that nobody else runs it.
        on_progress: told some times a second.

    Raises:
        TrainingPruned: the run was above a bar.
        GolfRayError: something given cannot be used, or the training failed.
    """
    from golf_ray.data.shards import find_shards

    shards = find_shards(config.data, config.model.vocab_size, "train")
    if in_process:
        return _train_here(config, str(run_dir), shards, resume, on_progress)
    from golf_ray.data.fingerprints import data_files
    from golf_ray.resources import training_bundles
    from trainers.ray_train import train_on_ray

    with connected(
        address,
        training_bundles(config),
        config.cluster.placement,
        "training",
        storage=run_dir,
        files=shards if address is None else data_files(config),
        needs_flash=config.attention.backend == "fa3",
    ):
        outcome = train_on_ray(
            config,
            run_dir,
            shards=shards,
            resume=resume,
            bars=bars,
            claimed=claimed,
            on_progress=on_progress,
        )
    return Training(
        run_dir=str(run_dir),
        final_model=outcome.final_model,
        result=outcome.result,
        val_bpb=outcome.val_bpb,
        outcome=outcome,
    )


def _train_here(
    config: Config,
    run_dir: str,
    shards: Sequence[Path],
    resume: bool,
    on_progress: OnProgress | None,
) -> Training:
    from golf_ray.records import read_jsonl
    from trainers.local import INTERVALS_FILE, train_in_process
    from trainers.validation import PackedValidation

    if "://" in run_dir:
        raise UsageError(f"{run_dir} is no folder of this machine", "train on Ray for that")
    device = pick_device(config, strict=True)
    folder, pace = Path(run_dir), Pace(config, on_progress)
    with cpu_threads(max(1, int(config.cluster.cpus_per_worker))):
        result = train_in_process(
            config,
            folder,
            shards,
            resume=resume,
            device=device,
            validate=PackedValidation.of_config(config),
            on_step=pace.stepped,
            on_interval=pace.interval,
        )
    intervals = read_jsonl(folder / INTERVALS_FILE)
    return Training(
        run_dir=run_dir,
        final_model=str(folder / FINAL_FILE),
        result=result,
        val_bpb=intervals[-1]["val_bpb"] if intervals else None,
    )


def read_run_config(run_dir: str | Path) -> Config:
    """The configuration of a run that is there, by path or URI.

    Raises:
        UsageError: there is no run.
    """
    from trainers.state import CONFIG_FILE
    from trainers.storage import Storage

    data = Storage(run_dir).read_bytes(CONFIG_FILE)
    if data is None:
        raise UsageError(
            f"there is no run in {run_dir} to go on with", "leave --resume out to begin one"
        )
    return Config.from_json(data.decode())


class Pace:
    """Turns the steps of a training in this process into progress.

    Args:
        config: for tokens a step and the wall-clock cap.
        on_progress: told at most some times a second.
    """

    def __init__(self, config: Config, on_progress: OnProgress | None) -> None:
        self._train = config.train
        self._on_progress = on_progress
        self._points: deque[tuple[float, int]] = deque(maxlen=PACE_STEPS)
        self._told_s = 0.0
        self._used_at = (time.monotonic(), 0.0)

    def interval(self, interval: Interval) -> None:
        """Training time as the loop counts it."""
        self._used_at = (time.monotonic(), interval.elapsed_s)

    def stepped(self, step: int, num_steps: int, loss_nats: float) -> None:
        """Note a step, and tell of it unless that was done just now."""
        now_s = time.monotonic()
        self._points.append((now_s, step))
        if self._on_progress is None or (now_s - self._told_s < PACE_TELL_S and step < num_steps):
            return
        from trainers.run_record import ProgressEvent

        self._told_s = now_s
        began_s, began_step = self._points[0]
        steps_per_s = (step - began_step) / max(now_s - began_s, 1e-9)
        left = [(num_steps - step) / steps_per_s] if steps_per_s > 0 else []
        if self._train.max_wallclock_s is not None:
            used_s = self._used_at[1] + now_s - self._used_at[0]
            left.append(max(0.0, self._train.max_wallclock_s - self._train.reserve_s - used_s))
        self._on_progress(
            ProgressEvent(
                phase="training",
                step=step,
                num_steps=num_steps,
                loss_nats=loss_nats,
                tokens_per_s=steps_per_s * self._train.batch_tokens,
                seconds_left=min(left, default=None),
            )
        )
