"""Sweeps as calls: a plan out of what a user says, and a whole sweep in one function."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from golf_ray.config import Config
from golf_ray.errors import UsageError
from golf_ray.sweeps import DEFAULT_STORAGE
from golf_ray.sweeps.plan import SweepPlan, without_training

if TYPE_CHECKING:
    import pandas as pd

    from golf_ray.api import StoredWeights
    from golf_ray.sweeps.runner import SweepOutcome


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A sweep that ended."""

    plan: SweepPlan
    outcome: SweepOutcome

    @property
    def records(self) -> list[dict[str, Any]]:
        """The records of all trials, in order of their numbers."""
        from golf_ray.sweeps.table import read_records

        return read_records(self.plan.trials_folder)

    @property
    def frame(self) -> pd.DataFrame:
        """One row a trial."""
        from golf_ray.sweeps.table import trials_frame

        return trials_frame(self.records, self.plan.name)


def sweep(
    space: str,
    config: Config | None = None,
    *,
    name: str | None = None,
    storage: str | Path = DEFAULT_STORAGE,
    checkpoints: Sequence[str | Path] = (),
    sample: int | None = None,
    steps: int | None = None,
    clock: bool = False,
    address: str | None = None,
    resume: bool = False,
    **options: Any,
) -> Sweep:
    """Search over knobs of any stage, on a running cluster or on a local one.

    Args:
        space: by name, or `file.py:SPACE`, or `module:SPACE`.
        config: what the knobs change; None for the one that the first checkpoint carries.
        name: None for one made of the time.
        storage: path or URI that all nodes can write.
        checkpoints: stored checkpoints to search on, training nothing.
        sample: documents by which trials are ranked; None for all.
        steps: of every training, in place of a wall-clock cap.
        clock: keep the wall-clock cap.
        address: of a running Ray cluster; None starts a local one that ends with this.
        resume: go on with the sweep of that name, as it was asked for.
        options: further fields of `SweepPlan`: `num_trials`, `evals_per_training`, `objectives`,
            `sampler`, `seed`, `finalists`, `max_concurrent`, `max_hours`, `max_gpu_hours`,
            `prune`.

    Raises:
        GolfRayError: something given cannot be used. Trials that fail are in the records instead.
    """
    from golf_ray.sweeps.plan import read_plan
    from golf_ray.sweeps.runner import connected_for, run_sweep

    if resume:
        if name is None:
            raise UsageError("there is no name of a sweep to go on with", "give its name")
        plan = read_plan(storage, name)
    else:
        plan = make_plan(
            space, config, name=name, storage=storage, checkpoints=checkpoints, sample=sample,
            steps=steps, clock=clock, **{"num_trials": 8, **options},
        )  # fmt: skip
    with connected_for(plan, address):
        return Sweep(plan=plan, outcome=run_sweep(plan, resume=resume))


def make_plan(
    space: str,
    config: Config | None = None,
    *,
    name: str | None = None,
    checkpoints: Sequence[str | Path] = (),
    sample: int | None = None,
    steps: int | None = None,
    clock: bool = False,
    **fields: Any,
) -> SweepPlan:
    """The plan of a sweep; the arguments are those of `sweep`.

    Raises:
        GolfRayError: something given cannot be used.
    """
    from golf_ray.data.fingerprints import data_fingerprint
    from golf_ray.sweeps.space import load_space

    stored = [_full_weights(path) for path in checkpoints]
    base = _base(config, stored, sample=sample, steps=steps, clock=clock)
    found = load_space(space, base)
    return SweepPlan(
        name=name or f"sweep-{time.strftime('%Y%m%d-%H%M%S')}",
        base=base,
        space=without_training(found) if stored else found,
        checkpoints=tuple(_named(weights) for weights in stored),
        data=data_fingerprint(base),
        **{**fields, "storage": str(fields["storage"])},
    )


def carried_config(checkpoints: Sequence[str | Path]) -> Config | None:
    """The configuration that the first of some checkpoints carries, fitted to this machine."""
    from golf_ray.api import config_for, fitted_to_machine

    if not checkpoints:
        return None
    return fitted_to_machine(config_for(_full_weights(checkpoints[0]), None))


def _base(
    config: Config | None,
    stored: Sequence[StoredWeights],
    *,
    sample: int | None,
    steps: int | None,
    clock: bool,
) -> Config:
    from golf_ray.api import config_for

    if config is None:
        if not stored:
            raise UsageError("a sweep needs a configuration", "give one, or a checkpoint")
        config = carried_config([stored[0].path])
    for weights in stored:
        config = config_for(weights, config)
    assert config is not None
    changes: dict[str, Any] = {"data.dir": str(Path(config.data.dir).expanduser().absolute())}
    if config.train.max_wallclock_s is not None and not (clock or stored):
        if steps is None:
            raise UsageError(
                f"a wall-clock cap of {config.train.max_wallclock_s:g} s makes trials on slow "
                "hosts worse than they are",
                "add --steps N for the same steps in every trial, or --clock to keep the cap",
            )
        changes["train.max_wallclock_s"] = None
    if steps is not None:
        changes["train.iterations"] = steps
    if sample is not None:
        changes["adaptation.sample_documents"] = sample
    return config.with_overrides(changes)


def _full_weights(path: str | Path) -> StoredWeights:
    from golf_ray.api import open_weights

    weights = open_weights(path)
    if weights.kind != "full":
        raise UsageError(f"{path} is quantised already", "give the checkpoint of it")
    return weights


def _named(weights: StoredWeights) -> tuple[str, str]:
    from golf_ray import fingerprint

    return str(weights.path.absolute()), fingerprint.of_file(weights.path)
