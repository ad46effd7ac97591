"""Confirming a sweep's best: the same knobs again under fresh seeds, beside a baseline that gets
fresh seeds too.

What a search found best it also found luckiest, and a score moves by 0.00075 bpb with the seed
alone. What may be claimed is said by `golf_ray.sweeps.confirmation`; here it is made.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from golf_ray.config import Config
from golf_ray.errors import UsageError
from golf_ray.sweeps.confirmation import Confirmation, Run, confirm
from golf_ray.sweeps.finalists import ranked
from golf_ray.sweeps.plan import SweepPlan
from golf_ray.sweeps.table import read_records

SEED = "train.seed"
NATS = "ttt_loss_nats"
BASELINE = "baseline"
SEED_STEP = 1_000
"""Fresh seeds are the base's and so many more each: far from what anybody counts up to."""

Baseline = Literal["first", "base"]


def plan_confirmation(
    plan: SweepPlan,
    *,
    top: int,
    num_seeds: int,
    baseline: Baseline = "first",
    max_wallclock_s: float | None = None,
) -> SweepPlan:
    """A sweep over given points: a baseline and the best trials, each under fresh seeds.

    Args:
        plan: of the sweep.
        top: number of best trials.
        num_seeds: fresh seeds for each.
        baseline: the space's first point, or the base configuration as it is.
        max_wallclock_s: train against the clock in place of a number of steps.

    Raises:
        UsageError: there is nothing to confirm.
    """
    if plan.checkpoints:
        raise UsageError(
            f"sweep '{plan.name}' searched stored checkpoints, which have no fresh seeds",
            "compare its artifacts document by document: 'golf-ray eval A B --method ttt'",
        )
    if plan.objectives[0] == "total_bytes":
        raise UsageError(
            f"sweep '{plan.name}' searched sizes, which do not move with the seed",
            "there is nothing to confirm",
        )
    best = ranked(read_records(plan.trials_folder), plan.objectives[0])[:top]
    if not best:
        raise UsageError(
            f"sweep '{plan.name}' has no trial that is done and within the limits",
            "there is nothing to confirm",
        )
    first = dict(plan.space.first[0]) if baseline == "first" and plan.space.first else {}
    candidates = {BASELINE: first}
    candidates.update({f"trial {r['trial']}": dict(r["knobs"]) for r in best})
    named = [
        (name, {**knobs, SEED: fresh_seed(plan.base, i)})
        for i in range(1, num_seeds + 1)
        for name, knobs in candidates.items()
    ]
    base = plan.base.with_overrides({"adaptation.sample_documents": None})
    if max_wallclock_s is not None:
        base = base.with_overrides({"train.max_wallclock_s": max_wallclock_s})
    return dataclasses.replace(
        plan,
        name=f"{plan.name}-confirm",
        base=base,
        points=tuple(point for _, point in named),
        labels=tuple(name for name, _ in named),
        num_trials=len(named),
        finalists=0,
        max_concurrent=None,
        max_gpu_hours=None,
        max_hours=None,
        # Seeds that are ended where they stand badly would leave the lucky ones.
        prune=False,
    )


def fresh_seed(base: Config, index: int) -> int:
    """The seed of the `index`-th fresh training, from 1."""
    return base.train.seed + SEED_STEP * index


def judged(plan: SweepPlan) -> Confirmation | None:
    """What the runs of a confirmation show so far; None where the baseline or all candidates have
    no run that came to its end.

    Args:
        plan: of `plan_confirmation`.
    """
    found: dict[str, dict[int, Run]] = {name: {} for name in plan.labels}
    for record in read_records(plan.trials_folder):
        if record["status"] == "done":
            run = Run(bpb=record["values"][plan.objectives[0]], loss_nats=record.get(NATS))
            found[plan.labels[record["trial"] - 1]][record["seed"]] = run
    baseline = found.pop(BASELINE)
    candidates = {name: runs for name, runs in found.items() if runs}
    if not baseline or not candidates:
        return None
    return confirm(candidates, baseline, used_seeds=(plan.base.train.seed,))
