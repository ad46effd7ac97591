"""The Optuna study of a sweep, and how it is kept in step with the trials' records.

The records are the truth, the study is what the sampler and optuna-dashboard see of it: a study
that was lost is built again from the records. Optuna never changes a trial that is finished, so a
study that says something else than the records is an error, and not mended.

Invariant: record number n is Optuna's trial n - 1. After `reconcile` every trial is finished in
both, or in neither and named to be run again.
"""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from golf_ray.errors import StorageError, UsageError
from golf_ray.results.schema import FINAL, NOT_FINAL
from golf_ray.sweeps.space import Space

SQLITE, JOURNAL = "sqlite:///", "journal:///"
BUSY_S = 60.0
"""Seconds that a write to sqlite waits for another process, such as a dashboard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A trial to run again."""

    number: int
    """Of the trial, from 1."""
    knobs: dict[str, Any]
    """What it was given; knobs that are missing were not drawn before the interruption."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reconciled:
    """What came of setting a study right."""

    rerun: tuple[Point, ...]
    """Trials without an outcome, in order; they are RUNNING in the study."""
    num_finished: int
    """Trials that are finished in the study."""
    failed: dict[int, str]
    """Trials, with the reason, that the study was told to have failed and whose record does not
    say how they ended: a worker died with its record open. The records are to be closed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """What Optuna is told of a trial."""

    state: TrialState
    values: tuple[float, ...] | None
    constraints: dict[str, float]
    """Feasible where <= 0."""
    reason: str | None


def told(outcome: Mapping[str, Any], objectives: Sequence[str]) -> Told:
    """What an outcome is for Optuna: the only place that decides so.

    A trial that is over a limit and has all its values is COMPLETE with a violated constraint; one
    that has not is PRUNED, for one objective and for several: TPE learns from its constraint
    alone, and a made-up value would end up on the Pareto front. One whose training was pruned is
    PRUNED too, and without a value counts among the worst. A value that is not finite is a
    failure, never a value, and a constraint that is no number is left out.

    Args:
        outcome: `status`, `reason`, `values` by objective and `constraints` by name, as in a
            record.
        objectives: in the order of the study's directions.
    """
    status = outcome.get("status")
    values = outcome.get("values") or {}
    found = [values.get(name) for name in objectives]
    missing = [
        f"{name} is {value!r} and not a finite number"
        for name, value in zip(objectives, found, strict=True)
        if not isinstance(value, Real) or not math.isfinite(value)
    ]
    constraints = {
        name: float(value)
        for name, value in sorted((outcome.get("constraints") or {}).items())
        if value is not None and not math.isnan(value)
    }
    reason = outcome.get("reason")
    if status in ("done", "over_limit") and not missing:
        numbers = tuple(float(value) for value in found)  # type: ignore[arg-type]
        return Told(
            state=TrialState.COMPLETE, values=numbers, constraints=constraints, reason=reason
        )
    state = TrialState.PRUNED if status in ("over_limit", "pruned") else TrialState.FAIL
    if status == "done":
        reason = "; ".join(missing)
    reason = reason or f"the trial ended as '{status}'"
    return Told(state=state, values=None, constraints=constraints, reason=reason)


def tell(
    study: optuna.Study, number: int, outcome: Mapping[str, Any], objectives: Sequence[str]
) -> None:
    """Tell a study how a trial ended; one that was told before stays as it is."""
    what = told(outcome, objectives)
    # No sampler in use needs to hear of it, and cmaes would warn of constraints each time.
    study.sampler = optuna.samplers.RandomSampler()
    trial = live_trial(study, number)
    known = trial.constraints
    try:
        for name, value in what.constraints.items():
            if name not in known:
                trial.set_constraint(name, value)
        if what.reason is not None:
            trial.set_user_attr("reason", what.reason)
        if study.get_trials(deepcopy=False)[number - 1].state == TrialState.RUNNING:
            study.tell(trial, what.values, state=what.state)
    except UpdateFinishedTrialError:
        return


def live_trial(study: optuna.Study, number: int) -> optuna.Trial:
    """The trial of a number as `study.ask` gave it, after any interruption.

    Leans on `FrozenTrial._trial_id`, as Optuna has no public way to take up a trial again.
    """
    return optuna.Trial(study, study.get_trials(deepcopy=False)[number - 1]._trial_id)


def suggest_knob(trial: optuna.Trial, knob: str, distribution: BaseDistribution) -> Any:
    """A trial's value of a knob: drawn by the study's sampler, or as it was drawn before."""
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(knob, distribution.choices)
    low, high, log = distribution.low, distribution.high, distribution.log  # type: ignore[attr-defined]
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(knob, low, high, step=distribution.step, log=log)
    assert isinstance(distribution, FloatDistribution)
    return trial.suggest_float(knob, low, high, step=distribution.step, log=log)


def set_attributes(trial: optuna.Trial, attributes: Mapping[str, Any]) -> None:
    """Give a trial user attributes that it has not got."""
    for key, value in attributes.items():
        if trial.user_attrs.get(key) != value:
            trial.set_user_attr(key, value)


def open_study(name: str, url: str, *, directions: Sequence[str], create: bool) -> optuna.Study:
    """A study in a database.

    Args:
        name: of the study.
        url: `sqlite:///PATH`, `journal:///PATH` or any URL of Optuna's.
        directions: "minimize" or "maximize" by objective.
        create: make it; else it must be there.

    Raises:
        UsageError: it is to be made and is there already.
        StorageError: the database cannot be opened, or has no such study.
    """
    absent = StorageError(
        f"there is no study '{name}' in {_shown(url)}", "check the name and the URL"
    )
    if not create and _is_missing_file(url):
        raise absent
    with _one_line(url):
        storage = _storage(url)
        if create:
            ways = [optuna.study.StudyDirection[direction.upper()] for direction in directions]
            try:
                return optuna.create_study(study_name=name, storage=storage, directions=ways)
            except optuna.exceptions.DuplicatedStudyError:
                raise UsageError(
                    f"study '{name}' is in {_shown(url)} already",
                    "resume that sweep or choose another name",
                ) from None
        try:
            study = optuna.load_study(study_name=name, storage=storage)
        except KeyError:
            raise absent from None
    given = [direction.name.lower() for direction in study.directions]
    if given != list(directions):
        raise StorageError(f"study '{name}' in {_shown(url)} is to {given}, not to "
                           f"{list(directions)}", "choose another name")  # fmt: skip
    return study


def has_study(name: str, url: str) -> bool:
    """Whether a database has a study; one that is a file is not made by looking.

    Raises:
        StorageError: the database cannot be opened.
    """
    if _is_missing_file(url):
        return False
    with _one_line(url):
        return name in optuna.get_all_study_names(_storage(url))


def _is_missing_file(url: str) -> bool:
    """Whether a database would be made, empty, by opening it."""
    prefix = next((prefix for prefix in (SQLITE, JOURNAL) if url.startswith(prefix)), None)
    return prefix is not None and not Path(url.removeprefix(prefix)).exists()


def _storage(url: str) -> optuna.storages.BaseStorage:
    if url.startswith(JOURNAL):
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        return JournalStorage(JournalFileBackend(url.removeprefix(JOURNAL)))
    options = {"connect_args": {"timeout": BUSY_S}} if url.startswith("sqlite:") else {}
    return optuna.storages.RDBStorage(url, engine_kwargs=options)


@contextlib.contextmanager
def _one_line(url: str) -> Iterator[None]:
    """What a database or its driver says, as one error of this tree."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, OSError, ImportError, RuntimeError, ValueError, KeyError) as error:
        if isinstance(error, (UsageError, StorageError)):
            raise
        # The database's own words, without the statement that met them.
        cause = getattr(error, "orig", None) or error
        line = (str(cause).splitlines() or [""])[0]
        raise StorageError(
            f"the study's database {_shown(url)} cannot be used ({type(cause).__name__}: {line})",
            "check the URL: sqlite:///PATH, journal:///PATH or one of Optuna's",
        ) from None


def _shown(url: str) -> str:
    """A URL without its password."""
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", url)


def name_objectives(study: optuna.Study, objectives: Sequence[str]) -> None:
    """Write into a study what its values are; optuna-dashboard shows it, and `agree` reads it."""
    if study.metric_names != list(objectives):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(list(objectives))


def reconcile(
    study: optuna.Study,
    records: Sequence[Mapping[str, Any]],
    space: Space,
    objectives: Sequence[str],
    training_knobs: Sequence[str] = (),
    group_size: int = 1,
) -> Reconciled:
    """Set a study right after an interruption, by the records. A second time changes nothing.

    Args:
        study: of the sweep, with no search at work on it.
        records: all that there are.
        space: of the sweep.
        objectives: of the sweep.
        training_knobs: knobs that a training depends on.
        group_size: trials that share them.

    Raises:
        StorageError: study and records say different things that Optuna cannot unsay.
    """
    by_number = _by_number(records)
    name_objectives(study, objectives)
    _start_waiting(study)
    trials = study.get_trials(deepcopy=False)
    lost = range(len(trials) + 1, max(by_number, default=0) + 1)
    for trial in trials:
        record = by_number.get(trial.number + 1)
        line = _disagreement(trial, record, objectives)
        if line is not None:
            remedy = f"delete study '{study.study_name}' to have it built again from the records"
            raise StorageError(line, "restore the record" if record is None else remedy)

    def given(number: int) -> dict[str, Any]:
        """Knobs of a trial's training, by the records of others that share it."""
        group = (number - 1) // group_size
        mates = [r["knobs"] for n, r in by_number.items() if (n - 1) // group_size == group]
        return {knob: mates[0][knob] for knob in training_knobs if mates and knob in mates[0]}

    rerun, failed = [], {}
    for trial in trials:
        number, record = trial.number + 1, by_number.get(trial.number + 1)
        if trial.state.is_finished():
            if not _is_final(record):
                failed[number] = str(trial.user_attrs.get("reason", "it failed"))
            continue
        if record is not None:
            _complete(study, number, space, record)
        if record is not None and _is_final(record):
            tell(study, number, record, objectives)
        else:
            knobs = given(number) | trial.params if record is None else record["knobs"]
            rerun.append(Point(number=number, knobs=dict(knobs)))
    for number in lost:
        record = by_number.get(number)
        if record is None:
            # It was begun beside later ones and killed before it wrote anything; its training is
            # that of its group all the same.
            study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs={"number": number}))
            rerun.append(Point(number=number, knobs=given(number)))
            continue
        _add(study, number, record, space, objectives)
        if not _is_final(record):
            rerun.append(Point(number=number, knobs=dict(record["knobs"])))
    return Reconciled(
        rerun=tuple(rerun),
        num_finished=sum(t.state.is_finished() for t in study.get_trials(deepcopy=False)),
        failed=failed,
    )


def agree(
    study: optuna.Study,
    records: Sequence[Mapping[str, Any]],
    objectives: Sequence[str] | None = None,
) -> list[str]:
    """Where a study and the records say different things, a line each; nothing where they agree.

    Args:
        study: of the sweep.
        records: all that there are.
        objectives: of the sweep; None for those that `reconcile` named in the study.
    """
    objectives = objectives if objectives is not None else study.metric_names
    assert objectives is not None, "the study was never reconciled"
    by_number = _by_number(records)
    trials = study.get_trials(deepcopy=False)
    lines = []
    for trial in trials:
        number, record = trial.number + 1, by_number.get(trial.number + 1)
        line = _disagreement(trial, record, objectives)
        if line is None and trial.state.is_finished() != _is_final(record):
            status = record["status"] if record is not None else "missing"
            line = f"trial {number} is {trial.state.name} in the study, its record is {status}"
        if line is None and record is not None and trial.params != record["knobs"]:
            line = f"trial {number} has other knobs in the study than in its record"
        if line is not None:
            lines.append(line)
    lines += [
        f"trial {number} has a record and is not in the study"
        for number in sorted(by_number)
        if number > len(trials)
    ]
    return lines


def _is_final(record: Mapping[str, Any] | None) -> bool:
    return record is not None and record["status"] in FINAL


def _by_number(records: Sequence[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    by_number: dict[int, Mapping[str, Any]] = {}
    for record in records:
        number, status = record["trial"], record["status"]
        if number in by_number:
            raise StorageError(f"trial {number} has two records", "remove one of them")
        if status not in FINAL + NOT_FINAL:
            raise StorageError(f"the record of trial {number} has status {status!r}",
                               "it must be one of " + ", ".join(FINAL + NOT_FINAL))  # fmt: skip
        by_number[number] = record
    return by_number


def _start_waiting(study: optuna.Study) -> None:
    """Make RUNNING what was enqueued: only `ask` takes a trial out of the queue."""
    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    for _ in waiting:
        study.ask()


def _disagreement(
    trial: FrozenTrial, record: Mapping[str, Any] | None, objectives: Sequence[str]
) -> str | None:
    """What a study says of a trial that its record does not, and that cannot be unsaid."""
    where = f"trial {trial.number + 1}"
    if record is not None:
        for knob, value in trial.params.items():
            if knob not in record["knobs"] or record["knobs"][knob] != value:
                return (f"{where} has {knob} = {value!r} in the study and "
                        f"{record['knobs'].get(knob)!r} in its record")  # fmt: skip
    if not trial.state.is_finished():
        return None
    if record is None or not _is_final(record):
        # How a failure ended is known to the study alone when its worker died.
        if trial.state == TrialState.FAIL:
            return None
        status = record["status"] if record is not None else "missing"
        return f"{where} is {trial.state.name} in the study, its record is {status}"
    what = told(record, objectives)
    values = None if trial.values is None else tuple(trial.values)
    if (trial.state, values) != (what.state, what.values):
        return (f"{where} is {trial.state.name} with {values} in the study, by its record "
                f"{what.state.name} with {what.values}")  # fmt: skip
    # Of a failure nobody learns, and who saw it may not have known the constraints.
    if what.state != TrialState.FAIL and trial.constraints != what.constraints:
        return (f"{where} has constraints {trial.constraints} in the study, by its record "
                f"{what.constraints}")  # fmt: skip
    return None


def _complete(study: optuna.Study, number: int, space: Space, record: Mapping[str, Any]) -> None:
    """Give a RUNNING trial what its record has and an interruption kept from it."""
    trial = live_trial(study, number)
    set_attributes(trial, _attributes(number, record))
    missing = {k: value for k, value in record["knobs"].items() if k not in trial.params}
    if missing:
        study.sampler = fixed_sampler(missing, optuna.samplers.RandomSampler(seed=0))
        for knob in missing:
            suggest_knob(trial, knob, _distribution(space, knob, number))


def _attributes(number: int, record: Mapping[str, Any]) -> dict[str, Any]:
    group = {"group": record["group"]} if "group" in record else {}
    return {"number": number, **group}


def fixed_sampler(
    fixed: Mapping[str, Any], base: optuna.samplers.BaseSampler
) -> optuna.samplers.BaseSampler:
    """A sampler that draws some knobs as given and the others by another sampler."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.PartialFixedSampler(dict(fixed), base)


def _distribution(space: Space, knob: str, number: int) -> BaseDistribution:
    if knob not in space.distributions:
        raise StorageError(f"trial {number} has '{knob}', which is not in space '{space.name}'",
                           "resume with the sweep's own space")  # fmt: skip
    return space.distributions[knob]


def _add(
    study: optuna.Study,
    number: int,
    record: Mapping[str, Any],
    space: Space,
    objectives: Sequence[str],
) -> None:
    """Add the trial of a record to a study that has lost it."""
    knobs, attributes = dict(record["knobs"]), _attributes(number, record)
    final = _is_final(record)
    what = told(record, objectives)
    if final and what.reason is not None:
        attributes["reason"] = what.reason
    try:
        trial = create_trial(
            state=what.state if final else TrialState.RUNNING,
            values=what.values if final else None,
            params=knobs,
            distributions={knob: _distribution(space, knob, number) for knob in knobs},
            user_attrs=attributes,
            constraints=what.constraints if final else None,
        )
        study.add_trial(trial)
    except ValueError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"the record of trial {number} does not fit space '{space.name}' "
                           f"({error})", "resume with the sweep's own space") from None  # fmt: skip
