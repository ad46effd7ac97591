"""Training on Ray: a TorchTrainer around the loop, and the run's folder kept by the driver.

    RUN/config.json          the configuration
    RUN/intervals.jsonl      a record for every interval, none twice
    RUN/events.jsonl         starts, failures, restarts, checkpoints, as they happen
    RUN/checkpoints/step_N/  the last two checkpoints
    RUN/result.json          once the run has ended, and outcome.json with its restarts
    RUN/final_model.pt       its result

RUN is a path or a URI. A folder of this machine is that of `trainers.local`, so that a run begun
here may go on without Ray and the other way round. Only the driver writes records: workers send
them, and records of steps that are taken again after a restart are taken out first.

Invariant: whatever happens to workers, the run ends in bounded time, with a result or one line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.torch import TorchConfig
from ray.train.v2._internal.exceptions import InsufficientClusterResourcesError
from ray.train.v2.api.config import (
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
)
from ray.train.v2.torch.torch_trainer import TorchTrainer
from torch import Tensor

from golf_ray.config import Config
from golf_ray.data.shards import find_shards
from golf_ray.errors import (
    CheckpointError,
    ClusterError,
    GolfRayError,
    TrainingFailed,
    UsageError,
)
from golf_ray.model.arrays import arrays_of
from trainers.claims import driving
from trainers.local import CHECKPOINTS, KEEP, RESULT_FILE, checkpoint_name
from trainers.loop import TrainingResult
from trainers.ray_channel import Channel
from trainers.ray_watch import RunWatch
from trainers.ray_worker import WorkerJob, train_worker
from trainers.run_record import OnProgress, RunRecord, TrainingOutcome
from trainers.state import CONFIG_FILE, FINAL_FILE, differing_fields
from trainers.storage import Storage, shown

OUTCOME_FILE = "outcome.json"
POLL_S = 0.2
ABORT_S = 30.0
"""Seconds that workers may take to be stopped."""
SNAPSHOT = "checkpoint_manager_snapshot.json"
LEFTOVERS = (SNAPSHOT, ".validate_storage_marker")
"""Ray Train's own files, of no use once the run has ended."""


def train_on_ray(
    config: Config,
    run_dir: str | Path,
    *,
    shards: Sequence[Path] | None = None,
    resume: bool = False,
    initial: Mapping[str, Tensor] | None = None,
    bars: Mapping[int, float] | None = None,
    claimed: bool = False,
    on_progress: OnProgress | None = None,
) -> TrainingOutcome:
    """Train on the connected cluster with the workers that `config.cluster` asks for.

    Args:
        run_dir: the run's folder, a path or a URI that all nodes can write: a new one, or with
            `resume` one that is there.
        shards: training shards in order; None for those of `config.data`.
        resume: go on from the newest checkpoint, or from the beginning where there is none.
        initial: weights to begin with in place of the seed's.
        bars: validation bpb by step, above which the run is ended.
        claimed: the caller sees to it that nobody else runs it.
        on_progress: told some times a second.

    Raises:
        UsageError: the folder is in use, or with `resume` is not there; or somebody runs it at
            this moment.
        CheckpointError: the run was begun under another configuration.
        TrainingPruned: the run was above a bar.
        TrainingFailed: the training cannot end: a loss is not finite, or workers fail again and
            again.
        ClusterError: workers could not be started.
        GolfRayError: data or storage cannot be used.
    """
    assert ray.is_initialized(), "connect to a cluster first"
    began_s = time.perf_counter()
    if shards is None:
        shards = find_shards(config.data, config.model.vocab_size, "train")
    storage = Storage(run_dir)
    if resume:
        ended = _ended_run(storage, config)
        if ended is not None:
            return ended
    else:
        _begin_run(storage, config)
    with contextlib.ExitStack() as stack:
        if not claimed:
            tell = RunRecord(storage, on_progress).say
            stack.enter_context(driving(storage, f"the run in {shown(storage.uri)}", tell))
        if resume:
            # Another may have ended it while it was waited for.
            ended = _ended_run(storage, config)
            if ended is not None:
                return ended
            # Ray's own account of checkpoints may be behind, and refuses to load where one is
            # missing.
            storage.child(CHECKPOINTS).remove(SNAPSHOT)
        record = RunRecord(storage, on_progress)
        record.event("run", resumed=resume, num_workers=config.cluster.num_workers)
        job = _job(config, storage, shards, initial, bars or {})
        try:
            returned = _Fit(config, job, record).run()
        except BaseException as error:
            record.event("run_ended", error=str(error) or type(error).__name__)
            record.close()
            raise
        return _finish(storage, config, job, record, TrainingResult(**returned), began_s)


# The run's folder -------------------------------------------------------------------------------


def _begin_run(storage: Storage, config: Config) -> None:
    if storage.exists(CONFIG_FILE):
        raise UsageError(
            f"there is a run in {shown(storage.uri)}",
            "add --resume to go on with it, or choose another",
        )
    if storage.names():
        raise UsageError(
            f"the folder {shown(storage.uri)} is not empty", "choose another --run-dir"
        )
    storage.write_bytes(CONFIG_FILE, config.to_json().encode())


def _ended_run(storage: Storage, config: Config) -> TrainingOutcome | None:
    """See that a run is there to go on with; its outcome where it has ended already."""
    data = storage.read_bytes(CONFIG_FILE)
    if data is None:
        raise UsageError(
            f"there is no run in {shown(storage.uri)} to go on with",
            "leave --resume out to begin one",
        )
    differing = differing_fields(config, Config.from_json(data.decode()))
    if differing:
        path, mine, theirs = differing[0]
        raise CheckpointError(
            f"the run in {shown(storage.uri)} was begun with {path} = {theirs!r}, not {mine!r}",
            "resume it under its own configuration, or begin a new run",
        )
    outcome = storage.read_bytes(OUTCOME_FILE)
    return None if outcome is None else TrainingOutcome.from_dict(json.loads(outcome))


def _finish(
    storage: Storage,
    config: Config,
    job: WorkerJob,
    record: RunRecord,
    result: TrainingResult,
    began_s: float,
) -> TrainingOutcome:
    """Put the result in its place, then what Ray and earlier checkpoints left out of the way."""
    name = checkpoint_name(result.steps)
    storage.copy(f"{CHECKPOINTS}/{name}/{FINAL_FILE}", FINAL_FILE)
    intervals = record.intervals.values
    outcome = TrainingOutcome(
        result=result,
        run_uri=storage.uri,
        checkpoint=storage.uri_of(f"{CHECKPOINTS}/{name}"),
        final_model=storage.uri_of(FINAL_FILE),
        num_workers=config.cluster.num_workers,
        device=job.device,
        threads=job.threads,
        restarts=tuple(record.restarts),
        start_s=record.start_s,
        wall_s=time.perf_counter() - began_s,
        val_bpb=intervals[-1].get("val_bpb") if intervals else None,
    )
    record.event("run_ended", error=None)
    record.close()
    plain = json.dumps(dataclasses.asdict(result), indent=2) + "\n"
    storage.write_bytes(RESULT_FILE, plain.encode())
    storage.write_bytes(OUTCOME_FILE, (json.dumps(outcome.to_dict(), indent=2) + "\n").encode())
    place = storage.child(CHECKPOINTS)
    kept = place.names("step_")
    kept = kept[: kept.index(name) + 1][-KEEP:]
    for other in place.names("step_"):
        if other not in kept:
            place.remove(other)
    for leftover in LEFTOVERS:
        place.remove(leftover)
    return outcome


# Ray Train --------------------------------------------------------------------------------------


def _job(
    config: Config,
    storage: Storage,
    shards: Sequence[Path],
    initial: Mapping[str, Tensor] | None,
    bars: Mapping[int, float],
) -> WorkerJob:
    cluster = config.cluster
    device = cluster.tensor_device
    cache = config.kernels.cache
    if cache is not None and "://" not in cache:
        # Workers run in folders of Ray's.
        config = config.with_overrides({"kernels.cache": str(Path(cache).absolute())})
    return WorkerJob(
        run_key=f"train/{uuid.uuid4().hex}",
        run_uri=storage.uri,
        config=config,
        shards=tuple(str(path.absolute()) for path in shards),
        data_dir=str(Path(config.data.dir).absolute()),
        device=device,
        threads=max(1, int(cluster.cpus_per_worker)),
        initial=None if initial is None else arrays_of(initial),
        bars=bars,
    )


class _Fit:
    """One call of Ray Train, in a thread; this one listens, and can stop it."""

    def __init__(self, config: Config, job: WorkerJob, record: RunRecord) -> None:
        self._config = config
        self._job = job
        self._record = record
        self._channel = Channel(job.run_key)
        self._returned: dict[str, Any] | None = None
        self._error: BaseException | None = None
        # A signal handler that Ray installs in the main thread would outlive the call.
        self._thread = threading.Thread(target=self._call, name="golf-ray-fit", daemon=True)

    def run(self) -> dict[str, Any]:
        """Rank 0's result.

        Raises:
            GolfRayError: there is none.
        """
        try:
            with _environment(self._variables()):
                self._thread.start()
                while self._thread.is_alive():
                    self._thread.join(POLL_S)
                    self._listen()
                    self._require_life()
            self._listen()
        except BaseException:
            self._abort()
            raise
        finally:
            self._clear()
        if self._error is not None:
            raise self._explained(self._error) from self._error
        assert self._returned is not None
        return self._returned

    def _call(self) -> None:
        try:
            result: Any = self._trainer().fit()
            self._returned = result.return_value
        except BaseException as error:
            self._error = error

    def _trainer(self) -> TorchTrainer:
        cluster = self._config.cluster
        resources = {"CPU": cluster.cpus_per_worker}
        if cluster.gpus_per_worker:
            resources["GPU"] = cluster.gpus_per_worker
        storage = Storage(self._job.run_uri)
        # Ray takes its own kind of callback here as well as a user's.
        callbacks: list[Any] = [
            RunWatch(
                self._job.run_key,
                self._record.attempts_before,
                self._silence_s(),
                _unplaced(self._config),
            )
        ]
        return TorchTrainer(
            train_worker,
            train_loop_config={"job": self._job},
            scaling_config=ScalingConfig(
                num_workers=cluster.num_workers,
                use_gpu=cluster.gpus_per_worker > 0,
                resources_per_worker=resources,
                placement_strategy=cluster.placement,
            ),
            torch_config=TorchConfig(
                backend="nccl" if self._job.device == "cuda" else "gloo",
                # The last resort: workers that hang are noticed before that.
                timeout_s=math.ceil(2 * cluster.hang_timeout_s),
            ),
            run_config=RunConfig(
                name=CHECKPOINTS,
                storage_path=storage.path,
                storage_filesystem=storage.filesystem,
                failure_config=FailureConfig(
                    max_failures=cluster.max_failures,
                    controller_failure_limit=cluster.max_failures,
                ),
                checkpoint_config=CheckpointConfig(num_to_keep=KEEP),
                callbacks=callbacks,
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )

    def _silence_s(self) -> float:
        """A stopped process is known by its silence, and before the others end their waiting."""
        return 0.75 * self._config.cluster.hang_timeout_s

    def _variables(self) -> dict[str, str]:
        return {
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
            "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(self._silence_s()),
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(self._config.cluster.start_timeout_s),
            "RAY_TRAIN_METRICS_ENABLED": "0",
            # One node is not taken away piece by piece, and the watcher is a process.
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1" if len(ray.nodes()) > 1 else "0",
        }

    def _listen(self) -> None:
        for message in self._channel.take():
            self._record.take(message)
        self._record.progress(self._channel.progress())
        self._record.flush()

    def _require_life(self) -> None:
        """A controller that is silent for far longer than it may be is given up."""
        cluster = self._config.cluster
        limit_s = 2 * (cluster.hang_timeout_s + cluster.start_timeout_s) + 60.0
        quiet_s = time.monotonic() - self._record.last_message_s
        if quiet_s > limit_s:
            raise TrainingFailed(
                f"nothing was heard of the training for {quiet_s:.0f} s",
                "see that the cluster is healthy ('ray status'), then resume the run",
            )

    def _abort(self) -> None:
        """Stop workers and controller, wait for it, and keep what they said."""
        self._record.tell_nobody()
        with contextlib.suppress(RayError, TimeoutError):
            controller = self._channel.controller()
            if controller is not None:
                ray.get(controller.abort.remote(), timeout=ABORT_S)
        self._thread.join(ABORT_S)
        with contextlib.suppress(RayError):
            for message in self._channel.take():
                self._record.take(message)

    def _clear(self) -> None:
        with contextlib.suppress(RayError):
            self._channel.clear()

    def _explained(self, error: BaseException) -> GolfRayError:
        """Ray's error as one line."""
        inner = getattr(error, "controller_failure", error)
        if isinstance(inner, GolfRayError):
            return inner
        reason = self._record.last_reason
        if isinstance(inner, InsufficientClusterResourcesError):
            return _unplaced(self._config)
        restarts = len(self._record.restarts)
        again = f" after {restarts} restart{'s' * (restarts != 1)}" if restarts else ""
        if reason is None:
            reason = " ".join(str(inner).split())[:300]
        return TrainingFailed(
            f"the training ended{again}: {reason}",
            "see events.jsonl in the run's folder; resume the run once that is mended",
        )


def _unplaced(config: Config) -> ClusterError:
    cluster = config.cluster
    gpus = f" and {cluster.gpus_per_worker:g} GPUs" if cluster.gpus_per_worker else ""
    return ClusterError(
        f"{cluster.num_workers} workers of {cluster.cpus_per_worker:g} CPUs{gpus} each "
        f"({cluster.placement}) were not placed within {cluster.start_timeout_s:g} s",
        "free the cluster, ask for fewer workers, or raise cluster.start_timeout_s",
    )


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the block: Ray Train reads them when it is called."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
