"""The search of a sweep under Ray Tune: which point is tried next, and what Optuna is told.

A training is the dear part of a trial and most knobs do not touch it. Trials come in groups of
`evals_per_training` consecutive numbers; all of a group have the training knobs of its first trial,
whose other knobs are drawn anew: N trials need ceil(N / M) trainings. With M = 1 it is plain
Optuna.

The search keeps nothing of its own that a restart would miss: a trial's group follows from its
number, the group's knobs are in the study, and the samplers are made for each trial.

Invariant: number n is Optuna's trial n - 1; nothing is ever enqueued, so that whoever ends this
process leaves no WAITING trial behind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from golf_ray.results.schema import NOT_FINAL
from golf_ray.sweeps.samplers import SAMPLERS, make_sampler, require_groups
from golf_ray.sweeps.space import Space
from golf_ray.sweeps.study import (
    Point,
    fixed_sampler,
    live_trial,
    name_objectives,
    set_attributes,
    suggest_knob,
    tell,
)

TRIAL_KEY = "trial"
"""Key of a trial's number, from 1, in what is suggested."""
KNOBS_KEY = "knobs"
"""Key of a trial's knobs in what is suggested."""


def num_trainings(num_trials: int, evals_per_training: int) -> int:
    """Trainings that so many trials need at most."""
    return math.ceil(num_trials / evals_per_training)


def group_size(space: Space, training_knobs: Sequence[str], evals_per_training: int) -> int:
    """Trials that take the training knobs of the first of them.

    One where there is nothing to share, and where nothing else would vary.
    """
    shared = set(training_knobs) & set(space.distributions)
    return evals_per_training if shared and shared != set(space.distributions) else 1


class StagedOptunaSearch(OptunaSearch):
    """Ray Tune's `OptunaSearch` on a given study, with trials that share trainings.

    Of its base it is a kind and no more: points, outcomes and state are its own. Tune's snapshots
    hold nothing of it, as the study and the records are the truth.

    Args:
        space: what to search.
        study: made or set right by `golf_ray.sweeps.study`.
        training_knobs: knobs that a training depends on.
        evals_per_training: M.
        num_trials: numbers to give out in all, those that the study has included.
        objectives: names in the order of the study's directions.
        sampler: name of one of `SAMPLERS`.
        seed: of the samplers.
        rerun: trials that were interrupted, RUNNING in the study; they come first.
        may_start: asked before each trial; when it says no, no other trial is started.

    Raises:
        ConfigError: there is no such sampler, or it cannot serve this search.
    """

    def __init__(
        self,
        *,
        space: Space,
        study: optuna.Study,
        training_knobs: Sequence[str],
        evals_per_training: int,
        num_trials: int,
        objectives: Sequence[str] = ("ttt_bpb",),
        sampler: str = SAMPLERS[0],
        seed: int = 0,
        rerun: Sequence[Point] = (),
        may_start: Callable[[], bool] | None = None,
    ) -> None:
        super().__init__()
        self._staged_space = space
        self._study = study
        self._training_knobs = tuple(training_knobs)
        self._evals_per_training = evals_per_training
        self._group_size = group_size(space, training_knobs, evals_per_training)
        self._num_trials = num_trials
        self._objectives = tuple(objectives)
        self._sampler_name = sampler
        self._sampler_seed = seed
        self._rerun = sorted(rerun, key=lambda point: point.number)
        self._may_start = may_start
        self._numbers: dict[str, int] = {}
        name_objectives(study, self._objectives)
        self._make_sampler(number=1)
        require_groups(sampler, self._group_size)

    def suggest(self, trial_id: str) -> Any:
        """The next trial's number and knobs, or `Searcher.FINISHED`."""
        if self._may_start is not None and not self._may_start():
            return Searcher.FINISHED
        if self._rerun:
            point = self._rerun.pop(0)
            number, knobs = point.number, self._draw(point.number, point.knobs)
        elif len(self._study.get_trials(deepcopy=False)) >= self._num_trials:
            return Searcher.FINISHED
        else:
            number = self._study.ask().number + 1
            knobs = self._draw(number, {})
        self._numbers[trial_id] = number
        return {TRIAL_KEY: number, KNOBS_KEY: knobs}

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """Tell the study how a trial ended.

        Args:
            trial_id: as given to `suggest`.
            result: `status`, `reason`, `values` and `constraints`, nested or as Tune flattens it;
                a trial without a status has failed.
            error: that Tune saw it fail.
        """
        number = self._numbers.pop(trial_id, None)
        if number is None:
            return
        outcome = _outcome(result or {}, error)
        # One that is to be run again is still RUNNING: Optuna would never take its outcome later.
        if outcome["status"] not in NOT_FINAL:
            tell(self._study, number, outcome, self._objectives)

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Nothing: what a trial says on its way is no reason to stop it."""

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        """Nothing: the space is given and stays."""
        return False

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study and the records are what a sweep goes on from."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see `save`."""

    def _draw(self, number: int, known: Mapping[str, Any]) -> dict[str, Any]:
        """A trial's knobs; what was drawn of them before an interruption stays.

        Each knob has a seed of its own, so that those that are left come out as they would have.
        """
        space, study = self._staged_space, self._study
        trial = live_trial(study, number)
        group = (number - 1) // self._evals_per_training
        set_attributes(trial, {"number": number, "group": group})
        # What the study has already is not fixed here: the joint draw would be another without it.
        lost = {knob: value for knob, value in known.items() if knob not in trial.params}
        fixed = {**self._given(number), **lost}
        complete = set(trial.params) == set(space.active(trial.params))
        if not complete:
            study.sampler = fixed_sampler(fixed, self._make_sampler(number))
            # Knobs that are drawn together are drawn now, whichever of them is asked for first.
            _ = trial.relative_params
        point: dict[str, Any] = {}
        for draw, (knob, distribution) in enumerate(space.distributions.items(), 1):
            if space.is_active(knob, point):
                if not complete:
                    study.sampler = fixed_sampler(fixed, self._make_sampler(number, draw))
                point[knob] = suggest_knob(trial, knob, distribution)
        return point

    def _given(self, number: int) -> dict[str, Any]:
        """Knobs that a trial does not draw: of the group's first trial, or of a first point."""
        group, place = divmod(number - 1, self._group_size)
        if place == 0:
            first = self._staged_space.first
            return dict(first[group]) if group < len(first) else {}
        params = self._study.get_trials(deepcopy=False)[group * self._group_size].params
        return {knob: params[knob] for knob in self._training_knobs if knob in params}

    def _make_sampler(self, number: int, draw: int = 0) -> optuna.samplers.BaseSampler:
        return make_sampler(
            self._sampler_name,
            seed=self._sampler_seed,
            number=number,
            draw=draw,
            num_objectives=len(self._objectives),
        )


def _outcome(result: Mapping[str, Any], error: bool) -> dict[str, Any]:
    """What a trial's result says of its end."""
    if "status" not in result:
        reason = "Ray saw the trial fail" if error else "the trial ended without a result"
        return {"status": "failed", "reason": reason}
    return {
        "status": result["status"],
        "reason": result.get("reason"),
        "values": _part(result, "values"),
        "constraints": _part(result, "constraints"),
    }


def _part(result: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A nested part of a result, which Tune flattens to `name/key`."""
    flat = {k.removeprefix(f"{name}/"): v for k, v in result.items() if k.startswith(f"{name}/")}
    return {**(result.get(name) or {}), **flat}
