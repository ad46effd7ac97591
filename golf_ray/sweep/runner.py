"""A search over staged trials with Ray Tune and Optuna, on a cluster that is connected already.

Everything of a sweep lies in one folder: `sweep.json` (what was asked for), `optuna.db` (the
study, for optuna-dashboard), `trials/` (a record a trial), `stages/` (outputs by fingerprint) and
the tables. The trial itself holds almost no resources: its training and its evaluation ask for
their own.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from golf_ray.config import Config
from golf_ray.records import atomic_write_json, make_folder
from golf_ray.sweep.search import TRIAL_KEY, StagedOptunaSearch, num_trainings
from golf_ray.sweep.space import Space

OBJECTIVE = "ttt_bpb"
# A trial that holds a whole CPU deadlocks clusters that its training needs for itself; 0 is
# refused.
TRIAL_CPUS = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepPlan:
    """What a sweep will do."""

    name: str
    base: Config
    space: Space
    num_trials: int
    evals_per_training: int
    folder: Path
    sampler_seed: int = 0
    max_concurrent: int = 1

    @property
    def num_trainings(self) -> int:
        """Trainings at most."""
        if not self.space.knobs("train"):
            return 1
        return num_trainings(self.num_trials, self.evals_per_training)

    @property
    def trials_folder(self) -> Path:
        """Where the trials' records are."""
        return self.folder / "trials"

    @property
    def stages_folder(self) -> Path:
        """Where stage outputs are."""
        return self.folder / "stages"

    def record_path(self, number: int) -> Path:
        """A trial's record."""
        return self.trials_folder / f"{number:05d}.json"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name,
            "base": self.base.to_dict(),
            "space": {k: str(d) for k, d in self.space.distributions.items()},
            "first": list(self.space.first),
            "num_trials": self.num_trials,
            "evals_per_training": self.evals_per_training,
            "num_trainings": self.num_trainings,
            "sampler_seed": self.sampler_seed,
            "objective": OBJECTIVE,
        }


def run_sweep(plan: SweepPlan) -> int:
    """Run all trials of a plan; what they found is in their records.

    Returns:
        the number of trials that failed.

    Raises:
        GolfRayError: the folder cannot be written.
    """
    import optuna
    from ray import tune

    make_folder(plan.trials_folder)
    make_folder(plan.stages_folder)
    atomic_write_json(plan.folder / "sweep.json", plan.to_dict())
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    search = StagedOptunaSearch(
        plan.space.distributions,
        training_knobs=plan.space.knobs("train"),
        evals_per_training=plan.evals_per_training,
        first=plan.space.first,
        metric=OBJECTIVE,
        mode="min",
        study_name=plan.name,
        storage=optuna.storages.RDBStorage(f"sqlite:///{plan.folder / 'optuna.db'}"),
        seed=plan.sampler_seed,
    )
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_trainable, plan=plan), {"cpu": TRIAL_CPUS}),
        tune_config=tune.TuneConfig(
            search_alg=search,
            num_samples=plan.num_trials,
            max_concurrent_trials=plan.max_concurrent,
            trial_dirname_creator=lambda trial: str(trial.trial_id),
            # Torch is loaded once, and not for every trial.
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=f"tune-{plan.name}", storage_path=str(plan.folder / "ray"), verbose=0
        ),
    )
    return int(tuner.fit().num_errors)


def _trainable(point: dict[str, Any], plan: SweepPlan) -> dict[str, Any]:
    """What Tune runs for each trial, in a process of its own."""
    from golf_ray.sweep.store import StageStore
    from golf_ray.sweep.trial import TrialSpec, run_trial

    number = int(point[TRIAL_KEY])
    knobs = {knob: point[knob] for knob in plan.space.distributions}
    spec = TrialSpec(number=number, knobs=knobs, config=plan.base.with_overrides(knobs))
    record = run_trial(spec, StageStore(plan.stages_folder), plan.record_path(number))
    return {OBJECTIVE: record[OBJECTIVE], "total_bytes": record["total_bytes"]}
