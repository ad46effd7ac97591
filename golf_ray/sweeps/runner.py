"""A search over staged trials with Ray Tune and Optuna, on a cluster that is connected already.

Records of trials are the one truth; Optuna's study is brought in line with them when a sweep goes
on, and Ray's own account of its trials is thrown away. So a driver may be killed at any moment, on
any host, and another takes the sweep up from the storage alone.

A trial's process holds almost no resources: what its stages take is handed out by the sweep's
broker, so that a cluster smaller than all trials together is shared and not locked up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from golf_ray.errors import ClusterError, StorageError
from golf_ray.records import make_folder
from golf_ray.resources import Bundle, cluster_nodes, fits
from golf_ray.results.schema import FINAL
from golf_ray.results.sources import OUT_OF_BUDGET
from golf_ray.results.timeline import gpu_hours
from golf_ray.sweeps import finalists
from golf_ray.sweeps.broker import BrokerClient, broker_of
from golf_ray.sweeps.plan import SweepPlan
from golf_ray.sweeps.points import PointsSearch
from golf_ray.sweeps.rooms import ClusterRooms
from golf_ray.sweeps.samplers import make_sampler, require_groups
from golf_ray.sweeps.search import StagedOptunaSearch
from golf_ray.sweeps.store import StageStore
from golf_ray.sweeps.study import agree, has_study, open_study, reconcile
from golf_ray.sweeps.table import read_records, trials_frame, write_tables
from golf_ray.sweeps.trial import (
    TrialSpec,
    outcome_of,
    read_record,
    record_name,
    run_trial,
)
from trainers.claims import driving

# A trial that holds a whole CPU deadlocks clusters that its training needs for itself; 0 is
# refused.
TRIAL_CPUS = 0.01
TRIAL_RESTARTS = 2
"""Times that a trial whose process is lost is run again."""
MOST_CONCURRENT = 32
DATABASE = "optuna.db"

_LEFT: set[str] = set()
"""Budgets of sweeps that were left; Tune copies what it is given, and a copy knows by this."""

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepOutcome:
    """How a sweep ended."""

    num_done: int
    num_failed: int
    num_over_limit: int
    num_pruned: int
    wall_s: float
    complete: bool
    """Whether all trials were run; not where a budget ended it."""
    disagreements: tuple[str, ...]
    """Where Optuna's study and the records say different things: a fault."""


def run_sweep(plan: SweepPlan, *, resume: bool = False, tell: Tell | None = None) -> SweepOutcome:
    """Run all trials of a plan that are not run yet; what they found is in their records.

    Args:
        resume: go on with the sweep that is there.
        tell: told of what happened, a line each.

    Raises:
        UsageError: the sweep is there already, or somebody runs it at this moment.
        ClusterError: the cluster can never hold a trial.
        StorageError: the storage cannot be used.
    """
    began_s = time.monotonic()
    tell = tell or (lambda line: None)
    if not resume:
        _require_sampler(plan)
        plan.write()
    with driving(plan.folder, f"sweep '{plan.name}'", tell), contextlib.ExitStack() as stack:
        _require_room(plan)
        plan.folder.remove(OUT_OF_BUDGET)
        broker = stack.enter_context(broker_of(_unit(plan)))
        budget = _Budget(plan, began_s)
        disagreements: list[str] = []
        if plan.points:
            _run_points(plan, broker, budget)
        else:
            study = stack.enter_context(_study(plan, create=not resume))
            _run_search(plan, study, broker, budget, tell)
            disagreements = agree(study, read_records(plan.trials_folder), plan.objectives)
        # Also for one whose finalists cannot be measured.
        _write_tables(plan)
        finalists.finish(plan, broker, tell)
        _write_tables(plan)
        records = read_records(plan.trials_folder)
        count = {status: sum(r["status"] == status for r in records) for status in FINAL}
        complete = sum(count.values()) == plan.num_trials
        if not complete:
            plan.folder.write_bytes(OUT_OF_BUDGET, json.dumps({"unix_s": time.time()}).encode())
    return SweepOutcome(
        num_done=count["done"],
        num_failed=count["failed"],
        num_over_limit=count["over_limit"],
        num_pruned=count["pruned"],
        wall_s=time.monotonic() - began_s,
        complete=complete,
        disagreements=tuple(disagreements),
    )


def _write_tables(plan: SweepPlan) -> None:
    write_tables(trials_frame(read_records(plan.trials_folder), plan.name), plan.folder)


def _run_search(plan: SweepPlan, study: Any, broker: Any, budget: _Budget, tell: Tell) -> None:
    """Run the trials that Optuna chooses."""
    records = read_records(plan.trials_folder)
    state = reconcile(
        study, records, plan.space, plan.objectives, plan.training_knobs, plan.group_size
    )
    for number, reason in state.failed.items():
        _close_record(plan, number, dict(study.trials[number - 1].params), reason)
    if records:
        tell(f"{state.num_finished} trials are done, {len(state.rerun)} were interrupted")
    missing = plan.num_trials - state.num_finished
    if missing > 0:
        search = StagedOptunaSearch(
            space=plan.space,
            study=study,
            training_knobs=plan.training_knobs,
            evals_per_training=plan.evals_per_training,
            num_trials=plan.num_trials,
            objectives=plan.objectives,
            sampler=plan.sampler,
            seed=plan.seed,
            rerun=state.rerun,
            may_start=budget.may_start,
        )
        _fit(plan, search, broker, missing, budget)


def _run_points(plan: SweepPlan, broker: Any, budget: _Budget) -> None:
    """Run the trials that the plan names."""
    done = {r["trial"] for r in read_records(plan.trials_folder) if r["status"] in FINAL}
    missing = [
        {"trial": number, "knobs": dict(knobs)}
        for number, knobs in enumerate(plan.points, 1)
        if number not in done
    ]
    if missing:
        _fit(plan, PointsSearch(missing, budget.may_start), broker, len(missing), budget)


def spec_of(plan: SweepPlan, number: int, knobs: dict[str, Any]) -> TrialSpec:
    """A trial of a plan."""
    return TrialSpec(
        number=number,
        knobs=knobs,
        base=plan.base,
        data=plan.data,
        objectives=plan.objectives,
        checkpoints=plan.checkpoints,
        group=plan.group_of(number),
        prune=plan.prune,
    )


def concurrent_trials(plan: SweepPlan) -> int:
    """Trials at a time: those that share the trainings that fit side by side, or, where nothing is
    trained, one for each worker."""
    if plan.max_concurrent is not None:
        return plan.max_concurrent
    most = min(plan.num_trials, MOST_CONCURRENT)
    if plan.num_trainings == 0:
        nodes, unit, count = cluster_nodes(), _unit(plan), 1
        while count < most and fits(nodes, [unit] * (count + 1), "PACK"):
            count += 1
        return count
    return min(most, trainings_at_once(plan) * plan.evals_per_training)


def trainings_at_once(plan: SweepPlan) -> int:
    """Trainings that run side by side on the connected cluster."""
    from golf_ray.resources import training_bundles

    nodes, unit, bundles = cluster_nodes(), _unit(plan), training_bundles(plan.base)
    most = min(plan.num_trials, MOST_CONCURRENT)
    # On a GPU light work waits for a training to end; CPUs are shared out more freely.
    beside = [] if unit.get("GPU") else [unit]
    at_once = 1
    while at_once * plan.evals_per_training < most and fits(
        nodes, [*bundles * (at_once + 1), *beside], "PACK"
    ):
        at_once += 1
    return at_once


@contextlib.contextmanager
def connected_for(plan: SweepPlan, address: str | None) -> Iterator[None]:
    """Be connected to a cluster that can run a plan: a running one, or a local one that ends with
    the block.

    Raises:
        ClusterError: it cannot be reached, is too small, or its nodes disagree.
    """
    from golf_ray.cluster import connect
    from golf_ray.data.fingerprints import data_files
    from golf_ray.preflight import preflight

    if address is None:
        with local_cluster(plan):
            _require_room(plan)
            yield
        return
    with connect(address):
        _require_room(plan)
        preflight(
            storage=plan.storage,
            files=data_files(plan.base),
            needs_flash=plan.base.attention.backend == "fa3",
        )
        yield


@contextlib.contextmanager
def local_cluster(plan: SweepPlan) -> Iterator[None]:
    """A cluster of this machine's own with room for a training or an evaluation and, beside it, a
    worker for light work."""
    from golf_ray.api import cpu_count
    from golf_ray.cluster import connect

    cluster = plan.base.cluster
    busy = max(cluster.num_workers if plan.num_trainings else 0, cluster.eval_actors)
    cpus = math.ceil((busy + 1) * cluster.cpus_per_worker) + 1
    with connect(num_cpus=max(cpus, cpu_count())):
        yield


# Driving ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _study(plan: SweepPlan, *, create: bool) -> Iterator[Any]:
    """The sweep's study. A database cannot live in an object store: it is kept on this machine
    then, and lost with it, because records are enough to make it again."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions = ["minimize"] * len(plan.objectives)
    if plan.optuna_url is not None:
        # A sweep may be resumed whose database was lost.
        new = create or not has_study(plan.name, plan.optuna_url)
        yield open_study(plan.name, plan.optuna_url, directions=directions, create=new)
        return
    local = plan.folder.local
    if local is not None:
        url = f"sqlite:///{make_folder(local) / DATABASE}"
        # A driver may have been killed between making the file and the study in it.
        new = create or not has_study(plan.name, url)
        yield open_study(plan.name, url, directions=directions, create=new)
        return
    with tempfile.TemporaryDirectory(prefix="golf-ray-") as folder:
        path = Path(folder) / DATABASE
        yield open_study(plan.name, f"sqlite:///{path}", directions=directions, create=True)
        plan.folder.write_file(DATABASE, path)


def _unit(plan: SweepPlan) -> dict[str, float]:
    from golf_ray.resources import evaluation_bundles

    return dict(evaluation_bundles(plan.base, 1)[0])


def _require_sampler(plan: SweepPlan) -> None:
    """See that the sampler can serve the search, before the sweep has its name."""
    if not plan.points:
        num_objectives = len(plan.objectives)
        make_sampler(plan.sampler, seed=plan.seed, number=1, num_objectives=num_objectives)
        require_groups(plan.sampler, plan.group_size)


def _require_room(plan: SweepPlan) -> None:
    """See that the cluster can hold what a trial takes at its largest."""
    from golf_ray.resources import evaluation_bundles, require_resources, training_bundles

    if plan.num_trainings:
        bundles = training_bundles(plan.base)
        require_resources(bundles, plan.base.cluster.placement, what="a training")
        _require_room_for_trials(plan, bundles)
    require_resources(evaluation_bundles(plan.base), what="an evaluation")


def _require_room_for_trials(plan: SweepPlan, bundles: Sequence[Bundle]) -> None:
    """See that trainings leave trials' own processes something: Ray would wait for ever."""
    nodes = []
    for node in cluster_nodes():
        cpus = node.resources.get("CPU", 0.0) - TRIAL_CPUS * MOST_CONCURRENT
        nodes.append(dataclasses.replace(node, resources={**node.resources, "CPU": cpus}))
    if not fits(nodes, bundles, plan.base.cluster.placement):
        raise ClusterError(
            f"a training of {plan.base.cluster.num_workers} workers takes all CPUs that it can "
            f"have, and trials' own processes need {TRIAL_CPUS * MOST_CONCURRENT:g} beside it",
            "lower cluster.cpus_per_worker a little",
        )


class _Budget:
    """Whether another trial may begin."""

    def __init__(self, plan: SweepPlan, began_s: float) -> None:
        self._plan = plan
        self._began_s = began_s
        self._id = uuid.uuid4().hex

    @property
    def stopped(self) -> bool:
        """Whether the sweep was left: nothing is begun or written for it any more."""
        return self._id in _LEFT

    def stop(self) -> None:
        """Leave the sweep."""
        _LEFT.add(self._id)

    def may_start(self) -> bool:
        if self.stopped:
            return False
        plan = self._plan
        hours = (time.monotonic() - self._began_s) / 3600
        if plan.max_hours is not None and hours >= plan.max_hours:
            return False
        if plan.max_gpu_hours is None:
            return True
        records = read_records(plan.trials_folder)
        return gpu_hours(records) < plan.max_gpu_hours


def _fit(plan: SweepPlan, search: Any, broker: Any, missing: int, budget: _Budget) -> None:
    from ray import tune

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="golf-ray-tune-") as folder:
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(_trainable, plan=plan, broker=broker), {"cpu": TRIAL_CPUS}
            ),
            tune_config=tune.TuneConfig(
                search_alg=search,
                num_samples=missing,
                max_concurrent_trials=concurrent_trials(plan),
                trial_dirname_creator=lambda trial: str(trial.trial_id),
                # Torch is loaded once, and not for every trial.
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name=f"tune-{plan.name}",
                storage_path=folder,
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=TRIAL_RESTARTS),
                callbacks=[_lost_trials(plan, broker, budget)],
            ),
        )
        try:
            _interruptible(tuner.fit)
        except BaseException:
            budget.stop()
            raise


def _interruptible(run: Callable[[], Any]) -> None:
    """Run in a thread, so that Ctrl-C ends at once: what runs is found again by a resume, and
    Tune's own way to end would wait for it."""
    failures: list[BaseException] = []

    def body() -> None:
        try:
            run()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=body, name="golf-ray-tune", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if failures:
        raise failures[0]


def _trainable(point: dict[str, Any], plan: SweepPlan, broker: Any) -> dict[str, Any]:
    """What Tune runs for each trial, in a process of its own."""
    import ray

    number = int(point["trial"])
    # What an earlier process of this trial held, which was lost.
    ray.get(broker.forget.remote(number))
    rooms = ClusterRooms(BrokerClient(broker, number))
    store = StageStore(plan.stages_folder, who=f"{plan.name}/trial {number}")
    spec = spec_of(plan, number, dict(point["knobs"]))
    return outcome_of(run_trial(spec, store, plan.trials_folder, rooms))


def _lost_trials(plan: SweepPlan, broker: Any, budget: _Budget) -> Any:
    """A Tune callback that sees to trials whose processes were lost once too often."""
    from ray import tune

    class LostTrials(tune.Callback):
        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
            if budget.stopped:
                return
            number = int(trial.config["trial"])
            broker.forget.remote(number)
            reason = f"its process was lost {TRIAL_RESTARTS + 1} times"
            with contextlib.suppress(StorageError):
                _close_record(plan, number, dict(trial.config["knobs"]), reason)

    return LostTrials()


def _close_record(plan: SweepPlan, number: int, knobs: dict[str, Any], reason: str) -> None:
    """End the record of a trial that can no longer do so itself."""
    record = read_record(plan.trials_folder, number) or {"trial": number, "knobs": knobs}
    if record.get("status") in FINAL:
        return
    record.update(status="failed", reason=reason, ended_unix_s=time.time())
    data = json.dumps(record, indent=2) + "\n"
    plan.trials_folder.write_bytes(record_name(number), data.encode())
