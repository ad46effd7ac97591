"""What a sweep will cost on the connected cluster and what it can find out, before it begins.

Brings together what is elsewhere: seconds of like stages in the storage, the cost model
(`golf_ray.sweeps.costs`) and the simulation under noise (`golf_ray.sweeps.power`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from golf_ray.errors import GolfRayError
from golf_ray.sweeps import keys
from golf_ray.sweeps.costs import (
    PARTS,
    PRICE_PER_GPU_HOUR,
    Part,
    Source,
    SweepCost,
    estimate_stages,
    plan_cost,
    training_units,
    unit_kind,
)
from golf_ray.sweeps.plan import SweepPlan
from golf_ray.sweeps.power import Noise, SweepPower, sweep_power
from golf_ray.sweeps.pruning import caveats
from golf_ray.sweeps.sizing import SizeOutlook, size_outlook
from golf_ray.sweeps.space import stage_of
from golf_ray.sweeps.store import DONE_FILE

MOST_READ = 400
"""Finished stages of a storage that are looked at for their times, the newest names first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What is known beforehand."""

    plan: SweepPlan
    cost: SweepCost
    power: SweepPower | None
    """None where nothing is searched."""
    sizes: SizeOutlook | None
    """None where no size is known yet."""

    def lines(self) -> list[str]:
        """For people."""
        plan = self.plan
        told = [self._trials(), *self.cost.lines()[1:]]
        if not plan.checkpoints:
            told.append(self._length())
        if self.power is not None:
            told += self.power.lines()
        return told + self._sizes() + self._pruning()

    def short(self) -> list[str]:
        """What a sweep that begins says of itself."""
        told = [self._trials(), *([] if self.plan.checkpoints else [self._length()])]
        if self.cost.hours is not None and self.cost.price is not None:
            told.append(f"{self.cost.hours:.2g} GPU-hours, ${self.cost.price:,.2f}")
        return told + self._sizes() + self._pruning()

    def _sizes(self) -> list[str]:
        return [] if self.sizes is None else self.sizes.lines()

    def _pruning(self) -> list[str]:
        return caveats(self.plan.space, self.plan.base) if self.plan.prune else []

    def _trials(self) -> str:
        plan = self.plan
        if not plan.checkpoints:
            return self.cost.lines()[0]
        count = len(plan.checkpoints)
        stored = "a stored checkpoint" if count == 1 else f"{count} stored checkpoints"
        return f"{plan.num_trials} trials on {stored}: nothing is trained"

    def _length(self) -> str:
        train = self.plan.base.train
        seeds = "one seed, which is no pairing: the same seed twice differs as two seeds do"
        if train.max_wallclock_s is not None:
            return f"every training has {train.max_wallclock_s:g} s, however many steps; {seeds}"
        return f"every training has {train.iterations:,} steps; {seeds}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "plan": self.plan.to_dict(),
            "cost": self.cost.to_dict(),
            "power": None if self.power is None else self.power.to_dict(),
            "sizes": None if self.sizes is None else self.sizes.to_dict(),
        }


def forecast(plan: SweepPlan, *, price_per_gpu_hour: float | None = None) -> Forecast:
    """Look ahead, on the connected cluster.

    Raises:
        UsageError: a training is wider than the cluster.
    """
    from golf_ray.sweeps.runner import trainings_at_once

    cluster, kind = plan.base.cluster, unit_kind(plan.base)
    unit = cluster.gpus_per_worker or cluster.cpus_per_worker
    sampled = plan.base.adaptation.sample_documents is not None
    light = unit if sampled else unit * cluster.eval_actors
    stages = estimate_stages(
        plan.base,
        measured=measured_seconds(plan),
        document_lengths=document_lengths(plan),
        light_units=1 if sampled else cluster.eval_actors,
    )
    if plan.checkpoints:
        nothing: dict[Part, Source] = {"start": "measured", "train": "measured"}
        stages = dataclasses.replace(
            stages, start_s=0.0, train_s=0.0, sources={**stages.sources, **nothing}
        )
    cost = plan_cost(
        stages,
        num_trials=plan.num_trials,
        evals_per_training=_trials_of_training(plan),
        cluster_units=_units_of_cluster(kind),
        training_units=light if plan.checkpoints else training_units(plan.base),
        light_units=light,
        kind=kind,
        price_per_gpu_hour=PRICE_PER_GPU_HOUR if price_per_gpu_hour is None else price_per_gpu_hour,
        max_concurrent=plan.max_concurrent,
        max_trainings=trainings_at_once(plan) if plan.num_trainings else None,
    )
    return Forecast(plan=plan, cost=cost, power=_power(plan), sizes=size_outlook(plan))


def measured_seconds(plan: SweepPlan) -> dict[Part, list[float]]:
    """Seconds of finished stages of the storage that are like those of a plan's base."""
    config = plan.base
    found: dict[Part, list[float]] = {part: [] for part in PARTS}
    training = keys.training_key(config, plan.data)
    documents = keys.documents_of(config, plan.data)
    folder = plan.stages_folder
    for name in folder.names()[-MOST_READ:]:
        stage, _, _ = name.partition("-")
        data = folder.child(name).read_bytes(DONE_FILE)
        if data is None:
            continue
        done = json.loads(data)
        of, result = done["of"], done["result"]
        if stage == "train" and _like(of, training):
            found["start"].append(result["start_s"])
            found["train"].append(result["wall_s"] - result["start_s"])
        elif stage == "calibrate" and of["device"] == training["device"]:
            found["calibrate"].append(result["calibrate_s"])
        elif stage == "quantize" and of["documents"] == documents:
            found["quantize"].append(result["wall_s"])
        elif stage == "evaluate" and of["documents"] == documents:
            found["evaluate"].append(result["wall_s"])
    return found


def document_lengths(plan: SweepPlan) -> list[int] | None:
    """Predictions of each document that an evaluation scores; None where they cannot be read
    here, or where nothing is adapted."""
    if "ttt_bpb" not in plan.objectives:
        return None
    from evaluators.ttt import choose_documents
    from golf_ray.api import validation_stream

    with contextlib.suppress(GolfRayError):
        tokens, _ = validation_stream(plan.base)
        return [d.num_predictions for d in choose_documents(tokens, plan.base.adaptation)]
    return None


def _trials_of_training(plan: SweepPlan) -> int:
    return plan.group_size if plan.training_knobs and not plan.checkpoints else plan.num_trials


def _like(of: dict[str, Any], key: dict[str, Any]) -> bool:
    """Whether trainings take as long: other knobs do not matter."""
    mine, theirs = key["config"], of["config"]
    fields = ("batch_tokens", "iterations", "max_wallclock_s", "precision")
    return (
        of["device"] == key["device"]
        and theirs["model"] == mine["model"]
        and all(theirs["train"][name] == mine["train"][name] for name in fields)
    )


def _units_of_cluster(kind: str) -> float:
    from golf_ray.resources import cluster_nodes

    return sum(node.resources.get(kind, 0.0) for node in cluster_nodes())


def _power(plan: SweepPlan) -> SweepPower | None:
    if plan.points or "total_bytes" == plan.objectives[0]:
        return None
    return sweep_power(
        {knob: stage_of(knob) for knob in plan.space.distributions},
        num_trials=plan.num_trials,
        evals_per_training=plan.group_size,
        noise=Noise(),
    )
