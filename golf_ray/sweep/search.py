"""Optuna under Ray Tune, with several trials to a training.

A training is the dear part of a trial and most knobs do not touch it. `StagedOptunaSearch` keeps
the training knobs of a sampled point for `evals_per_training` trials in a row, whose other knobs
it samples anew: N trials need ceil(N / M) trainings. With M = 1 it is plain Optuna.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution
from ray.tune.search.optuna import OptunaSearch

TRIAL_KEY = "trial"
"""Key of a trial's number, from 1, in the points that are suggested."""


def num_trainings(num_trials: int, evals_per_training: int) -> int:
    """Trainings that so many trials need at most."""
    return math.ceil(num_trials / evals_per_training)


class StagedOptunaSearch(OptunaSearch):
    """Ray Tune's `OptunaSearch` that shares trainings between trials.

    Leans on the attribute `_ot_study` of its base, which is not part of Ray's interface: the
    range of Ray versions is pinned, and a test sees that trainings are shared.

    Args:
        space: distributions by knob.
        training_knobs: those that a training depends on.
        evals_per_training: M.
        first: points to begin with, each the first of a training of its own.
        options: of `OptunaSearch`.
    """

    def __init__(
        self,
        space: Mapping[str, BaseDistribution],
        *,
        training_knobs: Iterable[str],
        evals_per_training: int = 1,
        first: Sequence[Mapping[str, Any]] = (),
        **options: Any,
    ) -> None:
        super().__init__(dict(space), **options)
        self._training_knobs = tuple(training_knobs)
        self._evals_per_training = evals_per_training
        self._first = [dict(point) for point in first]
        self._num_suggested = 0
        self._shared: dict[str, Any] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The next point, with the trial's number; every M-th has training knobs of its own."""
        study: Any = self._ot_study
        shares = self._num_suggested % self._evals_per_training != 0
        if shares and self._shared:
            study.enqueue_trial(self._shared)
        elif not shares and self._first:
            study.enqueue_trial(self._first.pop(0))
        point: dict[str, Any] | None = super().suggest(trial_id)
        if point is None:
            return None
        if not shares:
            self._shared = {knob: point[knob] for knob in self._training_knobs}
        self._num_suggested += 1
        return {**point, TRIAL_KEY: self._num_suggested}
