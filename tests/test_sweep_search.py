"""The search: shared trainings, interruptions at any commit, conditions, samplers, and Ray Tune."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState
from ray.tune.search import Searcher

from golf_ray.errors import ConfigError
from golf_ray.presets import RECORD
from golf_ray.sweeps.samplers import SAMPLERS, draw_seed, make_sampler
from golf_ray.sweeps.search import KNOBS_KEY, TRIAL_KEY, StagedOptunaSearch, num_trainings
from golf_ray.sweeps.space import Space, check_space, load_space
from golf_ray.sweeps.study import (
    Point,
    agree,
    fixed_sampler,
    live_trial,
    open_study,
    reconcile,
    suggest_knob,
)

Records = dict[int, dict[str, Any]]
WARMDOWN, MOMENTUM, CHUNK = "train.warmdown_frac", "train.muon_momentum", "adaptation.chunk_size"
BITS, CLIP = "quantization.looped_bits", "quantization.looped_clip_sigmas"
SPACE = Space(
    name="mine",
    distributions={
        WARMDOWN: FloatDistribution(0.6, 0.85),
        BITS: CategoricalDistribution([None, 6]),
        MOMENTUM: FloatDistribution(0.95, 0.99),
        CLIP: FloatDistribution(10.0, 14.0),
        "quantization.mlp_clip_sigmas": FloatDistribution(10.0, 13.5),
        CHUNK: IntDistribution(16, 64, step=16),
    },
    conditions={CLIP: (BITS, (6,))},
    first=({WARMDOWN: 0.72, MOMENTUM: 0.97, CHUNK: 32}, {MOMENTUM: 0.96, BITS: 6, CLIP: 12.5}),
)


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def search_of(
    space: Space, study: optuna.Study, *, share: int = 1, num_trials: int, **options: Any
) -> StagedOptunaSearch:
    return StagedOptunaSearch(
        space=space,
        study=study,
        training_knobs=space.knobs("train"),
        evals_per_training=share,
        num_trials=num_trials,
        **options,
    )


def outcome_of(knobs: dict[str, Any]) -> dict[str, Any]:
    """What comes of a point: mostly values, at times a trial that is over or fails."""
    if knobs[CHUNK] == 48:
        return {"status": "failed", "reason": "no memory", "values": {}, "constraints": {}}
    over = knobs["quantization.mlp_clip_sigmas"] - 12.5
    value = (knobs[WARMDOWN] - 0.7) ** 2 + (knobs[MOMENTUM] - 0.97) ** 2 + knobs.get(CLIP, 12) / 100
    return {
        "status": "over_limit" if over > 0 else "done",
        "reason": "too large" if over > 0 else None,
        "values": {} if over > 0 else {"ttt_bpb": value},
        "constraints": {"total_bytes": over},
    }


class Killed(BaseException):
    """The end of the driver, before a commit of its database."""


class Driver:
    """Runs trials one after another, as the sweep does; may be killed at any commit."""

    def __init__(self, space: Space, share: int, num_trials: int, sampler: str, seed: int) -> None:
        self.space, self.share, self.num_trials = space, share, num_trials
        self.sampler, self.seed = sampler, seed
        self.records: Records = {}

    def go_on(self, study: optuna.Study, *, record_first: bool = True) -> None:
        """Run what is missing; record_first: a failure's record is final before it is told."""
        records = list(self.records.values())
        state = reconcile(study, records, self.space, ("ttt_bpb",))
        search = search_of(
            self.space, study, share=self.share, num_trials=self.num_trials, sampler=self.sampler,
            seed=self.seed, rerun=state.rerun,
        )  # fmt: skip
        while (point := search.suggest("t")) != Searcher.FINISHED:
            number, knobs = point[TRIAL_KEY], point[KNOBS_KEY]
            group = (number - 1) // self.share
            record = {"trial": number, "status": "running", "knobs": knobs, "group": group}
            known = self.records.setdefault(number, record)
            assert known["knobs"] == knobs and known["status"] == "running"
            outcome = outcome_of(knobs)
            # Only a failure may be told before its record: that of a worker which died.
            if record_first or outcome["status"] != "failed":
                self.records[number].update(outcome)
            search.on_trial_complete("t", outcome)
            self.records[number].update(outcome)

    def points(self) -> list[dict[str, Any]]:
        return [self.records[number]["knobs"] for number in sorted(self.records)]


def engine_of(study: optuna.Study) -> sqlalchemy.Engine:
    return study._storage._backend.engine  # type: ignore[attr-defined]


def kill_before_commit(study: optuna.Study, count: int) -> None:
    """Let a study's database connection end this driver before its count-th commit from now."""
    left = iter(range(count))

    def on_commit(connection: Any) -> None:
        if next(left, None) is None:
            # As the end of a process would: what is not committed is gone, the lock is free.
            connection.connection.rollback()
            raise Killed

    sqlalchemy.event.listen(engine_of(study), "commit", on_commit)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with a study without trials; Optuna takes a second to make one."""
    path = tmp_path_factory.mktemp("empty") / "optuna.db"
    study = open_study("mine", f"sqlite:///{path}", directions=["minimize"], create=True)
    engine_of(study).dispose()
    return path


def sweep_through(driver: Driver, kills: list[tuple[int, bool]], empty: Path) -> optuna.Study:
    """Run a driver to its end on sqlite, each time on anew after it was killed."""
    folder = Path(tempfile.mkdtemp(prefix="golf-ray-search-"))
    try:
        url = f"sqlite:///{shutil.copy(empty, folder)}"
        for count, record_first in kills:
            study = open_study("mine", url, directions=["minimize"], create=False)
            kill_before_commit(study, count)
            try:
                driver.go_on(study, record_first=record_first)
            except Killed:
                pass
            engine_of(study).dispose()
        study = open_study("mine", url, directions=["minimize"], create=False)
        driver.go_on(study)
        copy = optuna.create_study(study_name="copy")
        copy.add_trials(study.trials)
        engine_of(study).dispose()
        return copy
    finally:
        shutil.rmtree(folder)


def undisturbed(driver: Driver) -> Driver:
    fresh = Driver(driver.space, driver.share, driver.num_trials, driver.sampler, driver.seed)
    fresh.go_on(optuna.create_study())
    return fresh


def check_whole(driver: Driver, study: optuna.Study) -> None:
    """Numbers, groups and trainings are as they should, and everybody says the same."""
    space, share = driver.space, driver.share
    records = list(driver.records.values())
    assert agree(study, records, ("ttt_bpb",)) == []
    assert [t.user_attrs["number"] for t in study.trials] == list(range(1, driver.num_trials + 1))
    assert [t.user_attrs["group"] for t in study.trials] == [
        n // share for n in range(driver.num_trials)
    ]
    assert all(t.state.is_finished() for t in study.trials)
    points = driver.points()
    assert all(tuple(point) == space.active(point) for point in points)
    assert len({str(point) for point in points}) == driver.num_trials, "no point twice"
    trainings = [tuple(point[knob] for knob in space.knobs("train")) for point in points]
    groups = [trainings[i : i + share] for i in range(0, driver.num_trials, share)]
    assert all(len(set(group)) == 1 for group in groups)
    assert len(set(trainings)) == num_trainings(driver.num_trials, share)
    for group, first in zip(range(0, driver.num_trials, share), space.first, strict=False):
        assert first.items() <= points[group].items()


@settings(max_examples=8)
@given(
    num_trials=st.integers(1, 6),
    share=st.integers(1, 4),
    seed=st.integers(0, 1000),
    kills=st.lists(st.tuples(st.integers(0, 40), st.booleans()), max_size=2),
)
def test_an_interrupted_search_goes_on_as_if_it_had_not_been(
    empty: Path, num_trials: int, share: int, seed: int, kills: list[tuple[int, bool]]
) -> None:
    driver = Driver(SPACE, share, num_trials, "random", seed)
    study = sweep_through(driver, kills, empty)
    check_whole(driver, study)
    assert driver.points() == undisturbed(driver).points()


def test_a_sampler_that_has_learned_goes_on_as_well(empty: Path) -> None:
    # No chunk size that fails, and more trials than the random ones that tpe begins with.
    distributions = {**SPACE.distributions, CHUNK: IntDistribution(16, 32, step=16)}
    space = dataclasses.replace(SPACE, distributions=distributions)
    driver = Driver(space, 2, 13, "tpe", 3)
    study = sweep_through(driver, [(11 * 12, True), (3, False)], empty)
    check_whole(driver, study)
    calm = undisturbed(driver)
    assert driver.points() == calm.points()
    random = undisturbed(Driver(space, 2, 13, "random", 3))
    assert calm.points()[:10] == random.points()[:10] and calm.points() != random.points()


@pytest.mark.parametrize("before", [2, 13])
def test_a_trial_that_was_drawn_in_part_gets_the_rest(before: int) -> None:
    """With few and with more finished trials than the random ones that tpe begins with."""
    options: dict[str, Any] = {"share": 3, "num_trials": before + 1, "seed": 11}
    start = optuna.create_study()
    search = search_of(SPACE, start, **{**options, "num_trials": before})
    while (point := search.suggest("t")) != Searcher.FINISHED:
        end = {"status": "done", "values": {"ttt_bpb": point[KNOBS_KEY][WARMDOWN]}}
        search.on_trial_complete("t", end)

    def going_on() -> optuna.Study:
        study = optuna.create_study()
        study.add_trials(start.trials)
        return study

    whole = search_of(SPACE, going_on(), **options).suggest("t")[KNOBS_KEY]
    for num_drawn in range(len(whole) + 1):
        study = going_on()
        study.ask()
        drawn = dict(list(whole.items())[:num_drawn])
        study.sampler = fixed_sampler(drawn, optuna.samplers.RandomSampler())
        for knob in drawn:
            suggest_knob(live_trial(study, before + 1), knob, SPACE.distributions[knob])
        rerun = [Point(number=before + 1, knobs=drawn)]
        again = search_of(SPACE, study, rerun=rerun, **options).suggest("t")
        assert again == {TRIAL_KEY: before + 1, KNOBS_KEY: whole}
        assert study.trials[-1].params == whole and study.trials[-1].number == before


def test_trials_of_a_sweep_are_started_while_others_run() -> None:
    study = optuna.create_study()
    search = search_of(SPACE, study, share=2, num_trials=24, seed=1)
    running: dict[str, dict[str, Any]] = {}
    for number in range(1, 25):
        point = search.suggest(f"t{number}")
        assert point[TRIAL_KEY] == number
        running[f"t{number}"] = point[KNOBS_KEY]
        if len(running) == 4:
            # Not in the order in which they began.
            name = list(running)[number % 4]
            search.on_trial_complete(name, outcome_of(running.pop(name)))
    assert search.suggest("late") == Searcher.FINISHED
    for name, knobs in running.items():
        search.on_trial_complete(name, outcome_of(knobs))
    points = [trial.params for trial in study.trials]
    assert len({str(point) for point in points}) == 24
    assert all(points[i][WARMDOWN] == points[i + 1][WARMDOWN] for i in range(0, 24, 2))
    assert all(trial.state.is_finished() for trial in study.trials)


def far_trials(limit: str | None) -> int:
    """Of the last 20 trials those with a large clip: the better, but, if limited, far too large."""
    space = Space(
        name="clip", distributions={"quantization.mlp_clip_sigmas": FloatDistribution(10.0, 13.5)}
    )
    search = search_of(space, optuna.create_study(), num_trials=45, seed=5)
    clips = []
    while (point := search.suggest("t")) != Searcher.FINISHED:
        clip = point[KNOBS_KEY]["quantization.mlp_clip_sigmas"]
        clips.append(clip)
        outcome: dict[str, Any] = {"status": "done", "values": {"ttt_bpb": -clip}}
        if limit is not None:
            outcome["constraints"] = {"size": clip - 12.0}
        if limit is not None and clip > 12.0:
            outcome["status"] = "over_limit"
        if limit == "seen before it is scored" and clip > 12.0:
            outcome["values"] = {}
        search.on_trial_complete("t", outcome)
    return sum(clip > 12.75 for clip in clips[-20:])


def test_the_search_leaves_what_is_over_the_limit() -> None:
    assert far_trials(None) >= 15
    assert far_trials("seen before it is scored") <= 2
    assert far_trials("seen when it is scored") <= 2


def test_what_a_trial_ends_with_is_told() -> None:
    study = optuna.create_study()
    search = search_of(SPACE, study, num_trials=9)
    size = {"total_bytes": -5.0}
    ends: list[tuple[dict[str, Any] | None, bool, TrialState, str | None]] = [
        ({"status": "done", "values": {"ttt_bpb": 1.5}, "constraints": size}, False,
         TrialState.COMPLETE, None),
        ({"status": "done", "values": {"ttt_bpb": math.nan}, "constraints": size}, False,
         TrialState.FAIL, "ttt_bpb is nan"),
        ({"status": "done", "values": {"ttt_bpb": -math.inf}}, False, TrialState.FAIL, "is -inf"),
        ({"status": "done"}, False, TrialState.FAIL, "ttt_bpb is None"),
        ({"status": "failed", "reason": "lost"}, False, TrialState.FAIL, "lost"),
        (None, True, TrialState.FAIL, "Ray saw the trial fail"),
        ({"training_iteration": 1}, False, TrialState.FAIL, "without a result"),
        ({"status": "over_limit", "constraints/total_bytes": 7.0, "reason": "7 too many"}, False,
         TrialState.PRUNED, "7 too many"),
        ({"status": "over_limit", "values/ttt_bpb": 1.4, "constraints/total_bytes": 7.0}, False,
         TrialState.COMPLETE, None),
    ]  # fmt: skip
    for number, (result, error, state, reason) in enumerate(ends, 1):
        assert search.suggest("t")[TRIAL_KEY] == number
        search.on_trial_complete("t", result, error)
        trial = study.trials[-1]
        assert trial.state == state
        assert (reason or "") in trial.user_attrs.get("reason", "")
        assert (reason is None) == ("reason" not in trial.user_attrs)
        search.on_trial_complete("t", {"status": "done", "values": {"ttt_bpb": 0.0}})
        assert study.trials[-1] == trial, "a second word changes nothing"
    assert study.trials[0].value == 1.5 and study.trials[0].constraints == size
    assert study.trials[7].constraints == {"total_bytes": 7.0}
    assert study.best_value == 1.5, "better ones are over the limit, or no numbers"
    search.on_trial_complete("never seen", None, True)


def test_what_is_told_elsewhere_stays() -> None:
    study = optuna.create_study()
    search = search_of(SPACE, study, num_trials=1)
    search.suggest("t")
    study.tell(0, 1.0)
    search.on_trial_complete("t", {"status": "done", "values": {"ttt_bpb": 2.0}})
    assert study.trials[0].value == 1.0


@pytest.mark.parametrize("status", ["running", "interrupted"])
def test_a_trial_that_is_to_run_again_is_not_told(status: str) -> None:
    study = optuna.create_study()
    search = search_of(SPACE, study, num_trials=1)
    point = search.suggest("t")
    search.on_trial_complete("t", {"status": status})
    assert study.trials[0].state == TrialState.RUNNING
    again = search_of(SPACE, study, num_trials=1,
                      rerun=[Point(number=1, knobs=point[KNOBS_KEY])])  # fmt: skip
    assert again.suggest("u") == point
    again.on_trial_complete("u", {"status": "done", "values": {"ttt_bpb": 2.0}})
    assert study.best_value == 2.0


def test_no_trial_begins_when_a_budget_is_used() -> None:
    study = optuna.create_study()
    answers = iter([True, False])
    search = search_of(SPACE, study, num_trials=5, may_start=lambda: next(answers))
    assert search.suggest("a")[TRIAL_KEY] == 1
    assert search.suggest("b") == Searcher.FINISHED
    assert len(study.trials) == 1
    rerun = [Point(number=1, knobs=dict(study.trials[0].params))]
    search = search_of(SPACE, study, num_trials=5, rerun=rerun, may_start=lambda: False)
    assert search.suggest("a") == Searcher.FINISHED


@pytest.mark.parametrize("knobs", [(WARMDOWN, MOMENTUM), (CHUNK,)])
def test_where_nothing_is_to_be_shared_every_trial_is_its_own(knobs: tuple[str, ...]) -> None:
    space = Space(
        name="part",
        distributions={knob: SPACE.distributions[knob] for knob in knobs},
        first=tuple({knobs[0]: value} for value in ((0.61, 0.84) if len(knobs) > 1 else (64, 16))),
    )
    study = optuna.create_study()
    search = search_of(space, study, share=3, num_trials=4)
    points = [search.suggest(str(number))[KNOBS_KEY] for number in range(4)]
    assert [p[knobs[0]] for p in points[:2]] == [p[knobs[0]] for p in space.first]
    if len(knobs) > 1:
        assert len({str(point) for point in points}) == 4
    assert [trial.user_attrs["group"] for trial in study.trials] == [0, 0, 0, 1]


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_by_name(name: str) -> None:
    if name == "cmaes" and importlib.util.find_spec("cmaes") is None:
        with pytest.raises(
            ConfigError, match="needs the package cmaes, which is not installed; run pip"
        ):
            make_sampler(name, seed=0, number=1)
        return
    space = load_space("adaptation", RECORD)
    for objectives in (("ttt_bpb",), ("ttt_bpb", "total_bytes")):
        if name == "cmaes" and len(objectives) > 1:
            continue
        study = optuna.create_study(directions=["minimize"] * len(objectives))
        search = search_of(space, study, num_trials=13, sampler=name, objectives=objectives)
        points = []
        while (point := search.suggest("t")) != Searcher.FINISHED:
            points.append(point[KNOBS_KEY])
            over = len(points) % 4 == 0
            outcome = {
                "status": "over_limit" if over else "done",
                "values": {} if over else {o: points[-1]["adaptation.lr"] for o in objectives},
                "constraints": {"size": 1.0 if over else -1.0},
            }
            search.on_trial_complete("t", outcome)
        assert len({str(p) for p in points}) == 13
        for knob in ("adaptation.optimizer", "adaptation.chunk_size"):
            assert len({p[knob] for p in points}) > 1, "choices are drawn anew for each trial"
        states = {trial.state for trial in study.trials}
        assert states == {TrialState.COMPLETE, TrialState.PRUNED}, "of several objectives as well"
        assert all(trial.constraints["size"] < 0 for trial in study.best_trials)


def test_samplers_that_cannot_be_are_one_line() -> None:
    with pytest.raises(ConfigError, match="unknown sampler 'tpee'; did you mean 'tpe'"):
        search_of(SPACE, optuna.create_study(), num_trials=1, sampler="tpee")
    if importlib.util.find_spec("cmaes") is not None:
        with pytest.raises(ConfigError, match="cannot search 2 objectives"):
            make_sampler("cmaes", seed=0, number=1, num_objectives=2)
        with pytest.raises(ConfigError, match="cannot share trainings"):
            search_of(SPACE, optuna.create_study(), share=2, num_trials=1, sampler="cmaes")


def test_every_draw_has_a_seed_of_its_own() -> None:
    seeds = [draw_seed(s, n, d) for s in range(5) for n in range(40) for d in range(10)]
    assert len(set(seeds)) == len(seeds)
    assert draw_seed(0, 1) == draw_seed(0, 1, 0) != draw_seed(-1, 1)


def test_the_tests_space_is_one() -> None:
    check_space(SPACE, RECORD)


@pytest.fixture
def study_file(tmp_path: Path) -> Iterator[str]:
    yield f"sqlite:///{tmp_path / 'optuna.db'}"


@pytest.mark.ray_cluster
def test_under_ray_tune(cluster: str, tmp_path: Path, study_file: str) -> None:
    from ray import tune

    def trainable(point: dict[str, Any]) -> dict[str, Any]:
        knobs = point["knobs"]
        if point["trial"] == 3:
            raise RuntimeError("lost")
        if point["trial"] == 5:
            return {"status": "over_limit", "reason": "large", "values": {}, "constraints":
                    {"size": 3.0}}  # fmt: skip
        value = knobs["train.warmdown_frac"] + point["trial"]
        return {"status": "done", "reason": None, "values": {"ttt_bpb": value},
                "constraints": {"size": -2.0}}  # fmt: skip

    study = open_study("mine", study_file, directions=["minimize"], create=True)
    interrupted = search_of(SPACE, study, share=2, num_trials=1, seed=4).suggest("before")
    state = reconcile(study, [], SPACE, ("ttt_bpb",))
    search = search_of(SPACE, study, share=2, num_trials=5, seed=4, rerun=state.rerun)
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 0.01}),
        tune_config=tune.TuneConfig(
            search_alg=search, num_samples=-1, max_concurrent_trials=2, reuse_actors=True,
            trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=tune.RunConfig(name="search", storage_path=str(tmp_path / "ray"), verbose=0),
    )  # fmt: skip
    results = tuner.fit()
    assert len(results) == 5 and results.num_errors == 1
    trials = open_study("mine", study_file, directions=["minimize"], create=False).trials
    assert [trial.user_attrs["number"] for trial in trials] == list(range(1, 6))
    states = [TrialState.COMPLETE] * 5
    states[2], states[4] = TrialState.FAIL, TrialState.PRUNED
    assert [trial.state for trial in trials] == states
    assert trials[0].params == interrupted[KNOBS_KEY]
    assert trials[0].value == trials[0].params[WARMDOWN] + 1
    assert trials[0].constraints == {"size": -2.0} and trials[4].constraints == {"size": 3.0}
    assert all(trials[i].params[WARMDOWN] == trials[i + 1].params[WARMDOWN] for i in (0, 2))
