"""Whether a training still gets somewhere: what is safe to stop on, whatever the schedule.

A loss in the middle of a run says little of its end where the schedule is what is searched, so
nothing here looks at how good a run is, only at whether it is lost; unless the caller says what a
run must have reached by which step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from golf_ray.config import Config
from golf_ray.errors import TrainingFailed, TrainingPruned

SETTLED_STEPS = 100
"""Steps after which a loss of the first, wild ones is over."""
LOST_NATS = 1.0
"""So far above the loss of guessing all tokens alike a training does not come back."""


def require_convergence(config: Config, step: int, loss_nats: float) -> None:
    """See that a step's loss is one from which a training can go on.

    Raises:
        TrainingFailed: it is not finite, or the run has diverged.
    """
    remedy = "lower the learning rates or the momentum, or look at the data"
    if not math.isfinite(loss_nats):
        raise TrainingFailed(f"the loss is not finite at step {step}: {loss_nats}", remedy)
    guessing_nats = math.log(config.model.vocab_size)
    if step > SETTLED_STEPS and loss_nats > guessing_nats + LOST_NATS:
        raise TrainingFailed(
            f"the training has diverged: a loss of {loss_nats:.2f} nats at step {step}, where "
            f"guessing gives {guessing_nats:.2f}",
            remedy,
        )


def require_promise(bars: Mapping[int, float], step: int, val_bpb: float) -> None:
    """See that a validation in the middle of a run is not above what the caller set for its step.

    Args:
        bars: bpb by step, above which the run is ended.

    Raises:
        TrainingPruned: it is.
    """
    bar = bars.get(step)
    if bar is not None and val_bpb > bar:
        raise TrainingPruned(
            f"{val_bpb:.4f} bpb at step {step}, where ended trainings had {bar:.4f} at the median",
            "leave --prune out to train it to its end",
        )
