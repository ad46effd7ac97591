"""The study beside the records: opened, lost, rebuilt, set right, and what cannot be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState
from ray.tune.search import Searcher

from golf_ray.errors import GolfRayError, StorageError, UsageError
from golf_ray.sweeps.search import KNOBS_KEY, TRIAL_KEY, StagedOptunaSearch
from golf_ray.sweeps.space import Space
from golf_ray.sweeps.study import Reconciled, agree, has_study, open_study, reconcile, told

Record = dict[str, Any]
ONE, TWO = ("ttt_bpb",), ("ttt_bpb", "total_bytes")
BITS, CLIP = "quantization.looped_bits", "quantization.looped_clip_sigmas"
SPACE = Space(
    name="mine",
    distributions={
        "train.warmdown_frac": FloatDistribution(0.6, 0.85),
        BITS: CategoricalDistribution([None, 6]),
        CLIP: FloatDistribution(10.0, 14.0),
        "adaptation.chunk_size": IntDistribution(16, 64, step=16),
    },
    conditions={CLIP: (BITS, (6,))},
)
KINDS = ("done", "over_limit", "scored_over", "failed", "nan")


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def search_of(
    study: optuna.Study, num_trials: int, state: Reconciled, objectives: tuple[str, ...] = ONE
) -> StagedOptunaSearch:
    return StagedOptunaSearch(
        space=SPACE, study=study, training_knobs=SPACE.knobs("train"), evals_per_training=2,
        num_trials=num_trials, objectives=objectives, seed=7, rerun=state.rerun,
    )  # fmt: skip


def ending(kind: str, number: int) -> Record:
    """How a trial ended, as its record says; without a number where there is none."""
    values = {"ttt_bpb": 1.0 + 1 / number, "total_bytes": 1000.0 + number}
    sizes = {"total_bytes": -10.0 - number, "evaluate_s": -1.0}
    if kind == "scored_over":
        return {"status": "over_limit", "reason": "slow", "values": values,
                "constraints": {**sizes, "evaluate_s": 20.0}}  # fmt: skip
    if kind == "over_limit":
        return {
            "status": kind,
            "reason": "large",
            "values": {},
            "constraints": {"total_bytes": 5.0},
        }
    if kind == "failed":
        return {"status": kind, "reason": "no memory", "values": {}, "constraints": {}}
    if kind == "nan":
        return {"status": "done", "values": {**values, "ttt_bpb": None}, "constraints": sizes}
    return {"status": "done", "reason": None, "values": values, "constraints": sizes}


def run(
    study: optuna.Study, records: list[Record], num_trials: int, objectives: tuple[str, ...] = ONE
) -> None:
    """Run what is missing, with endings of all kinds in turn."""
    state = reconcile(study, records, SPACE, objectives)
    search = search_of(study, num_trials, state, objectives)
    while (point := search.suggest("t")) != Searcher.FINISHED:
        number = point["trial"]
        end = ending(KINDS[number % len(KINDS)], number)
        group = (number - 1) // 2
        record = {"trial": number, "group": group, "knobs": point["knobs"], **end}
        records[:] = [r for r in records if r["trial"] != number] + [record]
        search.on_trial_complete("t", end)


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.trials]


def url_of(folder: Path, kind: str = "sqlite") -> str:
    return f"{kind}:///{folder / f'study.{kind}'}"


def content(study: optuna.Study) -> list[tuple[Any, ...]]:
    return [
        (t.state, t.values, t.params, t.distributions, t.constraints, t.user_attrs)
        for t in study.trials
    ]


@pytest.mark.parametrize(
    ("kind", "objectives"), [("sqlite", ONE), ("journal", ONE), ("journal", TWO)]
)
def test_a_lost_database_is_built_again_from_the_records(
    tmp_path: Path, kind: str, objectives: tuple[str, ...]
) -> None:
    directions = ["minimize"] * len(objectives)
    records: list[Record] = []
    lost = optuna.create_study(directions=[StudyDirection.MINIMIZE] * len(objectives))
    run(lost, records, 6, objectives)
    assert agree(lost, records) == []
    assert set(states(lost)) == {"COMPLETE", "PRUNED", "FAIL"}

    stored = json.loads(json.dumps(records))
    url = url_of(tmp_path, kind)
    built = open_study("mine", url, directions=directions, create=True)
    state = reconcile(built, stored, SPACE, objectives)
    assert state == Reconciled(rerun=(), num_finished=6, failed={})
    assert content(built) == content(lost)
    assert reconcile(built, stored, SPACE, objectives) == state
    assert agree(built, stored) == []

    # Both go on alike: what the sampler knows is all there.
    run(lost, records, 8, objectives)
    run(built, stored, 8, objectives)
    assert [r["knobs"] for r in stored] == [r["knobs"] for r in records]
    again = open_study("mine", url, directions=directions, create=False)
    assert agree(again, stored) == []


def test_a_lost_trial_at_work_is_run_again(tmp_path: Path) -> None:
    records: list[Record] = []
    run(optuna.create_study(), records, 4)
    records[1] = {**records[1], "status": "running", "values": {}, "constraints": {}}
    records[3] = {**records[3], "status": "interrupted", "values": {}, "constraints": {}}
    study = open_study("mine", url_of(tmp_path), directions=["minimize"], create=True)
    state = reconcile(study, records, SPACE, ONE)
    assert [(p.number, p.knobs) for p in state.rerun] == [
        (n, records[n - 1]["knobs"]) for n in (2, 4)
    ]
    assert state.num_finished == 2
    assert [study.trials[n].state for n in (1, 3)] == [TrialState.RUNNING] * 2
    assert reconcile(study, records, SPACE, ONE) == state
    assert agree(study, records) == []
    run(study, records, 5)
    assert agree(study, records) == [] and len(records) == 5


def test_what_is_still_running_is_told_or_run_again(tmp_path: Path) -> None:
    study = open_study("mine", url_of(tmp_path), directions=["minimize"], create=True)
    search = search_of(study, 9, reconcile(study, [], SPACE, ONE))
    points = [search.suggest(str(number))["knobs"] for number in range(6)]
    study.enqueue_trial({"train.warmdown_frac": 0.7})
    records: list[Record] = [
        {"trial": 1, "knobs": points[0], **ending("done", 1)},
        {"trial": 2, "knobs": points[1], **ending("over_limit", 2)},
        {"trial": 3, "knobs": points[2], **ending("failed", 3)},
        {"trial": 4, "knobs": points[3], "status": "running"},
        {"trial": 5, "knobs": points[4], "status": "interrupted", "reason": "Ctrl-C"},
    ]
    state = reconcile(study, records, SPACE, ONE)
    assert states(study) == ["COMPLETE", "PRUNED", "FAIL"] + ["RUNNING"] * 4
    assert study.trials[1].constraints == {"total_bytes": 5.0}
    assert [p.number for p in state.rerun] == [4, 5, 6, 7] and state.num_finished == 3
    assert [p.knobs for p in state.rerun[:3]] == points[3:], "of records, or of the study"
    assert reconcile(study, records, SPACE, ONE) == state
    records = records[:3]
    again = search_of(study, 7, state)
    for number, knobs in enumerate(points[3:], 4):
        assert again.suggest(str(number)) == {"trial": number, "knobs": knobs}
    last = again.suggest("7")
    assert last["trial"] == 7 and last["knobs"]["train.warmdown_frac"] == 0.7
    assert again.suggest("8") == Searcher.FINISHED


def test_a_study_that_lacks_what_was_drawn_takes_it_from_the_record() -> None:
    records: list[Record] = []
    run(optuna.create_study(), records, 3)
    study = optuna.create_study()
    for _ in records:
        study.ask()
    state = reconcile(study, [*records[:2], {**records[2], "status": "running"}], SPACE, ONE)
    assert [trial.params for trial in study.trials] == [record["knobs"] for record in records]
    assert study.trials[2].user_attrs == {"number": 3, "group": 1}
    assert [p.number for p in state.rerun] == [3] and state.num_finished == 2


def test_a_failure_that_only_the_study_saw_is_named() -> None:
    study = optuna.create_study()
    search = search_of(study, 2, reconcile(study, [], SPACE, ONE))
    points = [search.suggest(str(number))["knobs"] for number in range(2)]
    search.on_trial_complete("0", None, error=True)
    search.on_trial_complete("1", None, error=True)
    records = [{"trial": 1, "knobs": points[0], "status": "running"}]
    state = reconcile(study, records, SPACE, ONE)
    assert state.failed == {1: "Ray saw the trial fail", 2: "Ray saw the trial fail"}
    assert state.rerun == () and state.num_finished == 2
    assert agree(study, records) == [
        "trial 1 is FAIL in the study, its record is running",
        "trial 2 is FAIL in the study, its record is missing",
    ]
    records = [{"trial": n, "knobs": points[n - 1], **ending("failed", n)} for n in (1, 2)]
    assert agree(study, records) == [] and reconcile(study, records, SPACE, ONE).failed == {}


def change(records: list[Record], number: int, **values: Any) -> list[Record]:
    return [{**r, **values} if r["trial"] == number else r for r in records]


def drop(records: list[Record], number: int) -> list[Record]:
    return [record for record in records if record["trial"] != number]


def contradictions(records: list[Record]) -> list[tuple[list[Record], str]]:
    """Records that a study of them cannot be set right by, and what is said."""
    other = {**records[4]["knobs"], "train.warmdown_frac": 0.61}
    lacking = {k: v for k, v in records[4]["knobs"].items() if k != "adaptation.chunk_size"}
    return [
        (change(records, 5, values={"ttt_bpb": 9.0}), "trial 5 is COMPLETE with (1.2,)"),
        (change(records, 5, status="failed"), "trial 5 is COMPLETE"),
        (change(records, 5, constraints={"total_bytes": 1.0}), "trial 5 has constraints"),
        (change(records, 5, status="running"), "trial 5 is COMPLETE in the study, its record is"),
        (drop(records, 5), "trial 5 is COMPLETE in the study, its record is missing"),
        (change(records, 3, **ending("done", 3)), "trial 3 is FAIL with None"),
        (change(records, 5, knobs=other), "trial 5 has train.warmdown_frac = "),
        (change(records, 5, knobs=lacking), "trial 5 has adaptation.chunk_size = "),
        ([*records, records[4]], "trial 5 has two records"),
        (change(records, 5, status="ready"), "the record of trial 5 has status 'ready'"),
        ([*records, {**records[4], "trial": 7, "knobs": {"a": 1}}], "trial 7 has 'a', which is"),
        (
            [*records, {**records[4], "trial": 7, "knobs": {"train.warmdown_frac": 3.0}}],
            "the record of trial 7 does not fit space 'mine'",
        ),
    ]


@pytest.mark.parametrize("case", range(12))
def test_what_cannot_be_set_right_is_one_line_and_changes_nothing(case: int) -> None:
    study = optuna.create_study()
    records: list[Record] = []
    run(study, records, 6)
    before = content(study)
    changed, line = contradictions(records)[case]
    with pytest.raises(StorageError) as caught:
        reconcile(study, changed, SPACE, ONE)
    assert line in str(caught.value) and "\n" not in str(caught.value)
    assert content(study) == before
    if case in (0, 1, 2, 3, 4, 5, 6, 7):
        assert len(agree(study, changed)) == 1
    assert len(contradictions(records)) == 12


def test_a_trial_that_left_no_trace_is_run_with_its_groups_training() -> None:
    study = optuna.create_study()
    records: list[Record] = []
    run(study, records, 6)
    lost = optuna.create_study()
    kept = [r for r in records if r["trial"] not in (3, 5)]
    knobs = ["train.warmdown_frac"]
    found = reconcile(lost, kept, SPACE, ONE, knobs, 2)
    rerun = {point.number: dict(point.knobs) for point in found.rerun}
    by_number = {r["trial"]: r for r in records}
    for number, mate in ((3, 4), (5, 6)):
        assert rerun[number] == {knobs[0]: by_number[mate]["knobs"][knobs[0]]}
    assert [t.state.name for t in lost.get_trials()][2::2] == ["RUNNING", "RUNNING"]
    again = reconcile(lost, kept, SPACE, ONE, knobs, 2)
    assert {point.number for point in again.rerun} >= {3, 5}
    search = StagedOptunaSearch(
        space=SPACE, study=lost, training_knobs=knobs, evals_per_training=2, num_trials=6,
        rerun=again.rerun,
    )  # fmt: skip
    for i, number in enumerate(sorted(point.number for point in again.rerun)):
        suggested = search.suggest(f"t{i}")
        assert suggested[TRIAL_KEY] == number
        if number in (3, 5):
            mate = by_number[number + 1]["knobs"]
            assert suggested[KNOBS_KEY][knobs[0]] == mate[knobs[0]]
            assert set(suggested[KNOBS_KEY]) == set(mate)


def test_agree_says_what_is_not_in_the_study() -> None:
    study = optuna.create_study()
    records: list[Record] = []
    run(study, records, 2)
    assert agree(study, [*records, {**records[0], "trial": 3}]) == [
        "trial 3 has a record and is not in the study"
    ]


numbers = st.one_of(st.none(), st.floats(), st.integers(-5, 5))


@given(
    status=st.sampled_from(["done", "over_limit", "failed", "stopped", None]),
    values=st.dictionaries(st.sampled_from([*TWO, "other"]), numbers),
    constraints=st.dictionaries(st.sampled_from(["a", "b"]), numbers),
)
def test_every_outcome_is_something_that_optuna_takes(
    status: str | None, values: dict[str, Any], constraints: dict[str, Any]
) -> None:
    outcome = {"status": status, "values": values, "constraints": constraints}
    what = told(outcome, TWO)
    whole = all(values.get(n) is not None and math.isfinite(values[n]) for n in TWO)
    if status in ("done", "over_limit") and whole:
        assert what.state == TrialState.COMPLETE and what.values == tuple(values[n] for n in TWO)
    else:
        assert what.values is None and what.reason
        assert what.state == (TrialState.PRUNED if status == "over_limit" else TrialState.FAIL)
    study = optuna.create_study(directions=["minimize"] * 2)
    trial = study.ask()
    for name, value in what.constraints.items():
        trial.set_constraint(name, value)
    assert study.tell(trial, what.values, state=what.state).state == what.state


def test_studies_are_made_once_and_found_by_name(tmp_path: Path) -> None:
    for kind in ("sqlite", "journal"):
        url = url_of(tmp_path, kind)
        assert not has_study("a", url)
        with pytest.raises(StorageError, match=r"there is no study 'a' in"):
            open_study("a", url, directions=["minimize"], create=False)
        assert not list(tmp_path.glob(f"*.{kind}")), "looking makes no file"
        made = open_study("a", url, directions=["minimize", "maximize"], create=True)
        assert has_study("a", url) and not has_study("b", url)
        made.add_trial(optuna.trial.create_trial(values=[1.0, 2.0]))
        found = open_study("a", url, directions=["minimize", "maximize"], create=False)
        assert found.trials[0].values == [1.0, 2.0]
        with pytest.raises(UsageError, match=r"study 'a' is in .* already; resume"):
            open_study("a", url, directions=["minimize", "maximize"], create=True)
        with pytest.raises(StorageError, match=r"there is no study 'b'"):
            open_study("b", url, directions=["minimize"], create=False)
        with pytest.raises(StorageError, match=r"is to \['minimize', 'maximize'\], not to"):
            open_study("a", url, directions=["minimize"], create=False)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("sqlite:///{folder}/none/optuna.db", "OperationalError: unable to open"),
        ("journal:///{folder}/none/optuna.log", "No such file"),
        ("sqlite:///{folder}/text.db", "file is not a database"),
        ("journal:///{folder}/text.db", "cannot be used"),
        ("sqlite:///{folder}", "unable to open"),
        ("nosuchdb://host/x", "cannot be used"),
        ("optuna.db", "cannot be used"),
        ("", "cannot be used"),
        ("postgresql://user:hunter2@127.0.0.1:9/x", "postgresql://user:***@127.0.0.1:9/x"),
    ],
)
def test_databases_that_cannot_be_used_are_one_line(tmp_path: Path, url: str, words: str) -> None:
    (tmp_path / "text.db").write_text("this is no database, " * 60 + "\nnor a journal\n")
    with pytest.raises(GolfRayError) as caught:
        open_study("a", url.format(folder=tmp_path), directions=["minimize"], create=True)
    line = str(caught.value)
    assert words in line and "hunter2" not in line and "\n" not in line and len(line) < 500
