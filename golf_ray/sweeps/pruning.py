"""Pruning: which trainings are ended on the way because others stood better at the same step.

Off unless asked for. A bpb in the middle of a run says little of its end where the schedule is
what is searched: a long warmdown, a later loop or a slower momentum looks better or worse early
without being so. So only the second half of a run is looked at, and only once some trainings have
ended; who asks for it is told of this.

Invariant: what is compared was measured at the same step of trainings of the same sweep that came
to their end, so a training that was pruned has no part in the bar for the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Final

from golf_ray.config import Config, TrainConfig
from golf_ray.errors import UsageError
from golf_ray.sweeps.space import Space, stage_of
from trainers.storage import Storage, parse_lines

MIN_TRAININGS: Final = 4
"""Trainings that must have ended before any is pruned."""
FROM_FRAC: Final = 0.5
"""Part of a run before which its bpb is not looked at."""
SCHEDULE_KNOBS: Final = frozenset(
    f"train.{name}"
    for name in (
        "warmdown_frac", "min_lr", "enable_looping_at", "muon_momentum_warmup_start",
        "muon_momentum_warmup_steps", "ema_decay",
    )
)  # fmt: skip
"""Knobs that move when a run is good, so that comparing runs on the way misleads."""

Curve = Mapping[int, float]
"""Validation bpb by step."""


def bars_of(curves: Sequence[Curve], num_steps: int) -> dict[int, float]:
    """The bpb by step above which a training is ended: the median of those that came to their end.

    Args:
        curves: of these trainings.
        num_steps: of the training to come.
    """
    steps = sorted({step for curve in curves for step in curve})
    bars = {}
    for step in steps:
        known = [curve[step] for curve in curves if step in curve]
        # At the last step there is nothing left to save.
        if len(known) >= MIN_TRAININGS and FROM_FRAC * num_steps <= step < num_steps:
            bars[step] = median(known)
    return bars


def sweep_bars(
    stages: Storage, records: Sequence[Mapping[str, Any]], num_steps: int
) -> dict[int, float]:
    """`bars_of` a sweep's trainings so far.

    Args:
        stages: the folder of stage outputs.
        records: of the sweep's trials.
        num_steps: of the training to come.
    """
    names = sorted({r["training"] for r in records if r.get("training")})
    curves = []
    for name in names:
        folder = stages.child(name)
        if folder.exists("stage.json"):
            lines = parse_lines(folder.child("run").read_bytes("intervals.jsonl") or b"")
            curves.append({i["step"]: i["val_bpb"] for i in lines if i["val_bpb"] is not None})
    return bars_of(curves, num_steps)


def caveats(space: Space, base: Config) -> list[str]:
    """What whoever asks for pruning should know, one line each."""
    told = [
        f"pruning: a training whose bpb is above the median of {MIN_TRAININGS} or more ended ones "
        f"at the same step, after {FROM_FRAC:.0%} of its steps, is ended there"
    ]
    misled = [k for k in space.distributions if k in SCHEDULE_KNOBS]
    if misled:
        told.append(
            f"pruning misleads here: {', '.join(misled)} move when a run is good, and a bpb on the "
            "way says little of its end"
        )
    if not _looks(base.train):
        told.append("nothing is pruned: no bpb is taken on the way (set train.val_every_steps)")
    return told


def require_prunable(space: Space, base: Config) -> None:
    """See that there is something to prune.

    Raises:
        UsageError: nothing is trained, or trainings are not of the same number of steps.
    """
    if not any(stage_of(knob) == "train" for knob in space.distributions):
        raise UsageError(
            f"space '{space.name}' trains once or never, so there is nothing to prune",
            "leave --prune out",
        )
    if base.train.max_wallclock_s is not None:
        raise UsageError(
            "trainings against the clock do not have the same steps to be compared at",
            "leave --clock or --prune out",
        )


def _looks(train: TrainConfig) -> bool:
    every = train.val_every_steps
    return every is not None and any(
        step % every == 0
        for step in range(int(FROM_FRAC * train.iterations), train.iterations)
        if step
    )
