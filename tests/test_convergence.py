"""What a training is stopped on: losses from which it does not come back, and no others."""

from __future__ import annotations

import math

import pytest

from golf_ray.errors import TrainingFailed
from golf_ray.presets import RECORD
from trainers.convergence import SETTLED_STEPS, require_convergence

GUESSING = math.log(8192)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_ends_a_run_at_any_step(loss: float) -> None:
    with pytest.raises(TrainingFailed, match=r"not finite at step 1: "):
        require_convergence(RECORD, 1, loss)


@pytest.mark.parametrize(("step", "loss"), [(1, 60.0), (SETTLED_STEPS, 60.0), (5000, GUESSING)])
def test_a_bad_loss_may_pass(step: int, loss: float) -> None:
    require_convergence(RECORD, step, loss)


def test_a_run_worse_than_guessing_has_diverged() -> None:
    line = r"diverged: a loss of 10\.1\d nats at step 101, where guessing gives 9\.01; lower"
    with pytest.raises(TrainingFailed, match=line):
        require_convergence(RECORD, SETTLED_STEPS + 1, GUESSING + 1.1)
