"""What a sweep will cost: its schedule against brute force, its sums by hand, nothing made up."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluators.planning import COSTS
from golf_ray.bench.corpus import document_lengths
from golf_ray.config import Config
from golf_ray.errors import UsageError
from golf_ray.presets import LAPTOP, RECORD, TINY
from golf_ray.sweeps.costs import (
    Job,
    StageSeconds,
    SweepCost,
    estimate_evaluation,
    estimate_stages,
    least_makespan,
    makespan,
    plan_cost,
    schedule,
    sweep_jobs,
    training_units,
    unit_kind,
)

WHOLE = StageSeconds(
    start_s=20.0,
    train_s=580.0,
    calibrate_s=10.0,
    quantize_s=6.0,
    evaluate_s=1194.0,
    sources=dict.fromkeys(("start", "train", "calibrate", "quantize", "evaluate"), "measured"),  # type: ignore[arg-type]
)


@st.composite
def job_lists(draw: st.DrawFn, most: int = 7) -> tuple[list[Job], int]:
    units = draw(st.integers(1, 4))
    jobs: list[Job] = []
    for place in range(draw(st.integers(1, most))):
        after = draw(st.one_of(st.none(), st.integers(0, place - 1))) if place else None
        wide, long = draw(st.integers(1, units)), draw(st.integers(0, 4))
        jobs.append(Job(units=wide, wall_s=long, after=after))
    return jobs, units


def by_ticks(jobs: Sequence[Job], units: int, most: float = math.inf) -> list[int]:
    """Begins of the same rule, second by second; nothing but a table of who runs."""
    begins: dict[int, int] = {}
    second = 0
    while len(begins) < len(jobs):
        started = True
        while started:
            started = False
            running = [p for p, b in begins.items() if b + jobs[p].wall_s > second]
            for place, job in enumerate(jobs):
                ended = job.after is None or (
                    job.after in begins and begins[job.after] + jobs[job.after].wall_s <= second
                )
                held = sum(jobs[p].units for p in running)
                if (
                    place not in begins
                    and ended
                    and held + job.units <= units
                    and len(running) < most
                ):
                    begins[place] = second
                    started = True
                    break
        second += 1
    return [begins[place] for place in range(len(jobs))]


def best_makespan(jobs: Sequence[Job], units: int) -> float:
    """The least makespan of any order: one of the orders of a greedy list is always a best one."""
    best = math.inf
    for order in itertools.permutations(range(len(jobs))):
        at = {place: i for i, place in enumerate(order)}
        if any(j.after is not None and at[j.after] > at[p] for p, j in enumerate(jobs)):
            continue
        ordered = [
            Job(
                units=jobs[p].units,
                wall_s=jobs[p].wall_s,
                after=None if (after := jobs[p].after) is None else at[after],
            )
            for p in order
        ]
        best = min(best, max(b + j.wall_s for b, j in zip(by_ticks(ordered, units), ordered,
                                                          strict=True)))  # fmt: skip
    return best


# The schedule -------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(job_lists(), st.one_of(st.none(), st.integers(1, 3)))
def test_the_schedule_is_that_of_a_clock(drawn: tuple[list[Job], int], most: int | None) -> None:
    jobs, units = drawn
    # A job of no time is over within its second, which a clock of whole seconds does not see.
    jobs = [Job(units=j.units, wall_s=max(1, j.wall_s), after=j.after) for j in jobs]
    begins = schedule(jobs, units, max_at_once=most)
    assert list(begins) == by_ticks(jobs, units, most or math.inf)


@settings(max_examples=200)
@given(job_lists(), st.one_of(st.none(), st.integers(1, 3)))
def test_no_schedule_holds_too_much_or_begins_too_early(
    drawn: tuple[list[Job], int], most: int | None
) -> None:
    jobs, units = drawn
    begins = schedule(jobs, units, max_at_once=most)
    ends = [b + j.wall_s for b, j in zip(begins, jobs, strict=True)]
    for moment in begins:
        running = [
            j for b, e, j in zip(begins, ends, jobs, strict=True) if b <= moment < e
        ]  # fmt: skip
        assert sum(j.units for j in running) <= units
        assert most is None or len(running) <= most
    for begin, job in zip(begins, jobs, strict=True):
        assert job.after is None or begin >= ends[job.after]
    assert least_makespan(jobs, units, max_at_once=most) <= max(ends) + 1e-9


@settings(max_examples=40)
@given(job_lists(most=5))
def test_no_order_beats_the_bound_and_ours_beats_no_best_order(
    drawn: tuple[list[Job], int],
) -> None:
    jobs, units = drawn
    jobs = [Job(units=j.units, wall_s=max(1, j.wall_s), after=j.after) for j in jobs]
    best, ours = best_makespan(jobs, units), makespan(jobs, units)
    assert least_makespan(jobs, units) <= best + 1e-9
    assert best <= ours


@pytest.mark.parametrize(
    ("trials", "evals", "units", "training", "train_s", "trial_s"),
    [(4, 2, 2, 2, 3, 1), (4, 1, 2, 1, 3, 2), (3, 3, 2, 2, 4, 2), (4, 2, 3, 2, 3, 2)],
)
def test_trainings_first_is_a_best_order_of_small_sweeps(
    trials: int, evals: int, units: int, training: int, train_s: float, trial_s: float
) -> None:
    stages = StageSeconds(
        train_s=train_s, evaluate_s=trial_s, sources={"train": "cap", "evaluate": "estimated"}
    )
    jobs = sweep_jobs(stages, num_trials=trials, evals_per_training=evals, training=training,
                      light=1)  # fmt: skip
    assert makespan(jobs, units) == best_makespan(jobs, units)


def test_a_sweep_by_hand() -> None:
    # Two trainings of 8 of 8 one after the other, then calibration, then four trials beside.
    cost = plan_cost(WHOLE, num_trials=4, evals_per_training=2, cluster_units=8, training_units=8)
    assert cost.trainings_at_once == 1
    assert cost.wall_s == 600 + 600 + 10 + 1200
    assert cost.hours == pytest.approx((2 * 8 * 600 + 2 * 10 + 4 * 1200) / 3600)
    assert cost.price == pytest.approx(cost.hours * 2.75)
    # On twice the cluster both train at once, and nothing else costs less.
    twice = plan_cost(WHOLE, num_trials=4, evals_per_training=2, cluster_units=16, training_units=8)
    assert (twice.trainings_at_once, twice.wall_s) == (2, 600 + 10 + 1200)
    assert twice.hours == cost.hours
    # One at a time: all in a row.
    alone = plan_cost(WHOLE, num_trials=4, evals_per_training=2, cluster_units=16,
                      training_units=8, max_concurrent=1)  # fmt: skip
    assert (alone.trainings_at_once, alone.wall_s) == (1, 2 * 610 + 4 * 1200)
    # One training at a time though two would fit: the second one beside the first one's trials.
    single = plan_cost(WHOLE, num_trials=4, evals_per_training=2, cluster_units=16,
                       training_units=8, max_trainings=1)  # fmt: skip
    assert (single.trainings_at_once, single.hours) == (1, cost.hours)
    assert 600 + 600 + 10 + 1200 <= single.wall_s <= 600 + 600 + 10 + 4 * 1200


def test_the_last_training_may_have_fewer_trials() -> None:
    jobs = sweep_jobs(WHOLE, num_trials=5, evals_per_training=2, training=8, light=1)
    assert len(jobs) == 3 + 3 + 5
    assert [job.after for job in jobs[3:]] == [0, 1, 2, 3, 3, 4, 4, 5]


def test_thousands_of_trials_are_planned() -> None:
    cost = plan_cost(WHOLE, num_trials=20_000, evals_per_training=4, cluster_units=64,
                     training_units=8)  # fmt: skip
    assert cost.num_trainings == 5000
    assert cost.wall_s is not None
    assert cost.at_least_wall_s <= cost.wall_s <= 1.01 * cost.at_least_wall_s + 1800


# What is not known --------------------------------------------------------------------------------


def test_the_unknown_is_said_and_never_0() -> None:
    stages = estimate_stages(RECORD)
    assert (stages.train_s, stages.source("train")) == (600.0, "cap")
    assert stages.quantize_s is None
    assert stages.evaluate_s is None
    cost = plan_cost(stages, num_trials=4, evals_per_training=2, cluster_units=8, training_units=8)
    assert cost.unknown == ("calibrate", "quantize", "evaluate")
    assert (cost.hours, cost.price, cost.wall_s) == (None, None, None)
    assert cost.unit_hours["evaluate"] is None
    assert cost.at_least_hours == pytest.approx(2 * 8 * 620 / 3600)
    assert cost.at_least_wall_s == 2 * 620
    text = "\n".join(cost.lines())
    assert "at least 2.8 GPU-hours: start-up 0.089, training 2.7" in text
    assert "at least $7.58 at $2.75 a GPU-hour" in text
    assert "unknown: how long calibration, quantisation, evaluation takes" in text
    assert cost.to_dict()["price"] is None
    json.dumps(cost.to_dict(), allow_nan=False)


def test_without_a_cap_a_training_is_unknown() -> None:
    assert estimate_stages(LAPTOP).train_s is None


def test_what_was_measured_comes_first_and_is_the_median() -> None:
    measured = {"train": [590.0, 1800.0, 588.0], "quantize": [5.0, 7.0], "calibrate": []}
    stages = estimate_stages(RECORD, measured=measured, document_lengths=[500])  # type: ignore[arg-type]
    assert (stages.train_s, stages.quantize_s, stages.calibrate_s) == (590.0, 6.0, None)
    assert [stages.source(p) for p in ("train", "quantize", "calibrate", "evaluate", "start")] == [
        "measured", "measured", "unknown", "estimated", "estimated",
    ]  # fmt: skip
    again = estimate_stages(RECORD, measured={"evaluate": [900.0]}, document_lengths=[500])
    assert (again.evaluate_s, again.source("evaluate")) == (900.0, "measured")


def test_an_evaluation_is_priced_by_the_cost_model() -> None:
    lengths = (document_lengths(3000) - 1).tolist()
    one, eight = (estimate_evaluation(RECORD, lengths, n) for n in (1, 8))
    assert one is not None
    assert eight is not None
    work_s = COSTS["cuda"].work_s(lengths, RECORD.adaptation)
    assert work_s <= one <= 1.25 * work_s
    assert one / 8 <= eight < one
    # Larger chunks are fewer, and a sweep over them is cheaper.
    coarse = RECORD.with_overrides({"adaptation.chunk_size": 64})
    cheaper = estimate_evaluation(coarse, lengths)
    assert cheaper is not None
    assert cheaper < one


@pytest.mark.parametrize(
    "config",
    [TINY, RECORD.with_overrides({"model.model_dim": 640, "model.embedding_dim": 640}),
     LAPTOP.with_overrides({"cluster.gpus_per_worker": 1.0})],
)  # fmt: skip
def test_of_another_network_or_device_nothing_is_known(config: Config) -> None:
    assert estimate_evaluation(config, [500, 600]) is None
    assert estimate_stages(config, document_lengths=[500]).source("evaluate") == "unknown"


# Units --------------------------------------------------------------------------------------------


def test_on_cpus_there_are_hours_and_no_price() -> None:
    assert (unit_kind(LAPTOP), training_units(LAPTOP)) == ("CPU", 2)
    assert (unit_kind(RECORD), training_units(RECORD)) == ("GPU", 8)
    cost = plan_cost(
        WHOLE, num_trials=6, evals_per_training=2, cluster_units=2, kind="CPU",
        training_units=training_units(LAPTOP),
    )  # fmt: skip
    assert cost.price is None
    assert cost.hours is not None
    text = "\n".join(cost.lines())
    assert "$" not in text
    assert "CPU-hours" in text
    assert "6 trials on 3 trainings, 1 at a time on 2 CPUs" in text


@given(st.integers(1, 30), st.integers(1, 6), st.sampled_from([4.0, 8.0, 12.0]))
def test_hours_are_those_of_the_schedule(trials: int, evals: int, units: float) -> None:
    cost: SweepCost = plan_cost(WHOLE, num_trials=trials, evals_per_training=evals,
                                cluster_units=units, training_units=4, light_units=2)  # fmt: skip
    jobs = sweep_jobs(WHOLE, num_trials=trials, evals_per_training=evals, training=4, light=2)
    assert cost.hours == pytest.approx(sum(j.units * j.wall_s for j in jobs) / 3600)
    assert cost.wall_s == makespan(jobs, units)
    assert cost.trainings_at_once == min(cost.num_trainings, units // 4)
    assert cost.hours * 3600 <= cost.wall_s * units + 1e-6


def test_wrong_use_is_an_error() -> None:
    good = {"num_trials": 4, "evals_per_training": 2, "cluster_units": 8.0, "training_units": 8.0}
    for bad in (
        {"num_trials": 0},
        {"evals_per_training": 0},
        {"max_concurrent": -1},
        {"training_units": 0.0},
        {"light_units": -1.0},
        {"price_per_gpu_hour": -1.0},
        {"price_per_gpu_hour": math.nan},
        {"cluster_units": 4.0},
    ):
        with pytest.raises(UsageError):
            plan_cost(WHOLE, **{**good, **bad})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="train_s = -1"):
        StageSeconds(train_s=-1.0, sources={"train": "measured"})
