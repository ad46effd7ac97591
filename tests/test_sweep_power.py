"""What a sweep can find: against sweeps that are simulated and analysed one by one."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats as reference

from golf_ray.errors import UsageError
from golf_ray.sweeps.power import (
    KnobPower,
    Noise,
    best_against_baseline,
    needed_trainings,
    optimism,
    resolve,
    sweep_power,
)

KNOBS: dict[str, Any] = {
    "train.warmdown_frac": "train",
    "train.muon_momentum": "train",
    "quantization.mlp_clip_sigmas": "quantize",
    "adaptation.chunk_size": "evaluate",
}
LOUD = Noise(training_bpb=0.00075, evaluation_bpb=0.0003)


def by_stage(found: list[KnobPower]) -> tuple[float | None, float | None]:
    return found[0].smallest_bpb, found[-1].smallest_bpb


def dummies(num_trials: int, evals: int) -> NDArray[np.float64]:
    groups = np.arange(num_trials) // evals
    return (groups[:, None] == np.unique(groups)).astype(float)


def slope_found(
    design: NDArray[np.float64], scores: NDArray[np.float64], degrees: int, known_bpb: float = 0.0
) -> tuple[bool, NDArray[np.float64]]:
    """Whether the last column's slope is found above 0, and all coefficients."""
    fitted, *_ = np.linalg.lstsq(design, scores, rcond=None)
    residual = scores - design @ fitted
    variance = residual @ residual / degrees
    error = math.sqrt(variance * np.linalg.inv(design.T @ design)[-1, -1] + known_bpb**2)
    return bool(fitted[-1] / error > reference.t.ppf(0.95, degrees)), fitted


def share_found(
    stage: str, effect_bpb: float, num_trials: int, evals: int, noise: Noise, num: int = 1200
) -> float:
    """Share of simulated sweeps over two knobs of either kind that find the effect of one.

    Written out with an intercept for each training and by least squares, as in no module.
    """
    generator, found = np.random.default_rng(7), 0
    groups = np.arange(num_trials) // evals
    trainings = groups[-1] + 1
    effects = np.array([0.002, effect_bpb])
    for _ in range(num):
        x, z = generator.random((trainings, 2)), generator.random((num_trials, 2))
        # The other kind's knobs have effects too, which must not get in the way.
        a, b = effects, np.array([0.003, 0.003])
        if stage != "train":
            a, b = b, a
        scores = (x[groups] @ a) + z @ b
        scores += generator.normal(0, noise.training_bpb, trainings)[groups]
        scores += generator.normal(0, noise.evaluation_bpb, num_trials)
        if evals == 1:
            order = np.column_stack([x, z] if stage != "train" else [z, x])
            design = np.column_stack([np.ones(num_trials), order])
            found += slope_found(design, scores, num_trials - 5)[0]
            continue
        design = np.column_stack([dummies(num_trials, evals), z])
        within, fitted = slope_found(design, scores, num_trials - trainings - 2)
        if stage != "train":
            found += within
            continue
        cleared = scores - z @ fitted[-2:]
        means = np.array([cleared[groups == t].mean() for t in range(trainings)])
        design = np.column_stack([np.ones(trainings), x])
        found += slope_found(design, means, trainings - 3)[0]
    return found / num


@pytest.mark.parametrize("stage", ["train", "evaluate"])
@pytest.mark.parametrize(("num_trials", "evals"), [(24, 1), (24, 2), (36, 4), (10, 2)])
def test_the_smallest_effect_is_found_four_times_of_five(
    stage: str, num_trials: int, evals: int
) -> None:
    found = by_stage(resolve(KNOBS, num_trials=num_trials, evals_per_training=evals, noise=LOUD))
    effect = found[0 if stage == "train" else 1]
    assert effect is not None
    share = share_found(stage, effect, num_trials, evals, LOUD)
    # Four standard errors of 1,200 sweeps, and one in a hundred of the draws of points.
    assert share == pytest.approx(0.8, abs=4 * math.sqrt(0.8 * 0.2 / 1200) + 0.01)


def test_an_effect_of_nothing_is_found_as_seldom_as_said() -> None:
    for stage in ("train", "evaluate"):
        share = share_found(stage, 0.0, 24, 2, LOUD)
        assert share == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / 1200))


def test_the_error_of_a_sample_does_not_average_out() -> None:
    noise = Noise(sample_bpb=0.0004)
    sizes = [by_stage(resolve(KNOBS, num_trials=n, evals_per_training=4, noise=noise))[1]
             for n in (40, 400)]  # fmt: skip
    expected = (reference.norm.ppf(0.95) + reference.norm.ppf(0.8)) * 0.0004
    assert sizes == pytest.approx([expected, expected], rel=0.01)


def test_sharing_a_training_takes_its_noise_out_of_the_other_knobs() -> None:
    alone = by_stage(resolve(KNOBS, num_trials=40, evals_per_training=1))
    shared = by_stage(resolve(KNOBS, num_trials=40, evals_per_training=2))
    assert None not in (*alone, *shared)
    assert shared[1] * 50 < alone[1]  # type: ignore[operator]
    # Half as many trainings say less of their own knobs.
    assert shared[0] > alone[0]  # type: ignore[operator]


def test_what_the_field_does_cannot_work_and_what_it_takes() -> None:
    power = sweep_power(KNOBS, num_trials=24, evals_per_training=2)
    assert power.num_trainings == 12
    assert power.unresolvable == ("train.warmdown_frac", "train.muon_momentum")
    needed = power.needed_trainings
    assert needed is not None
    enough = sweep_power(KNOBS, num_trials=2 * needed, evals_per_training=2)
    assert [k.smallest_bpb for k in enough.knobs[:2]] == pytest.approx([0.001] * 2, rel=0.06)
    plenty = sweep_power(KNOBS, num_trials=3 * needed, evals_per_training=2)
    assert plenty.unresolvable == ()
    assert plenty.needed_trainings is None


def test_too_few_points_are_said_to_be_too_few() -> None:
    # Three trainings for two knobs and an intercept leave nothing to tell the noise by.
    power = sweep_power(KNOBS, num_trials=6, evals_per_training=2)
    assert [k.smallest_bpb is None for k in power.knobs] == [True, True, False, False]
    fewer = sweep_power(KNOBS, num_trials=4, evals_per_training=2)
    assert all(k.smallest_bpb is None and not k.resolvable for k in fewer.knobs)
    assert "too few points" in " ".join(fewer.lines())
    assert sweep_power(KNOBS, num_trials=1, evals_per_training=3).num_trainings == 1


def test_without_training_knobs_all_trials_share_one_training() -> None:
    knobs: dict[str, Any] = {"adaptation.chunk_size": "evaluate"}
    power = sweep_power(knobs, num_trials=20, evals_per_training=1)
    assert power.num_trainings == 1
    assert power.knobs[0].smallest_bpb is not None
    assert power.knobs[0].smallest_bpb < 2e-5
    assert power.optimism_bpb < 1e-5
    assert "best of 20 evaluations" in power.optimism_line()


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 3), st.integers(0, 3))
def test_any_sweep_has_an_answer(trials: int, evals: int, trained: int, other: int) -> None:
    knobs: dict[str, Any] = {f"t{i}": "train" for i in range(trained)}
    knobs |= {f"e{i}": "evaluate" for i in range(other)}
    power = sweep_power(knobs, num_trials=trials, evals_per_training=evals)
    assert [k.knob for k in power.knobs] == list(knobs)
    for knob in power.knobs:
        assert knob.smallest_bpb is None or 0 < knob.smallest_bpb < math.inf
        assert knob.resolvable is (knob.smallest_bpb is not None and knob.smallest_bpb <= 0.001)
    assert power.lines()
    json.dumps(power.to_dict(), allow_nan=False)


def test_noiseless_scores_show_everything() -> None:
    quiet = Noise(training_bpb=0.0, evaluation_bpb=0.0)
    found = resolve(KNOBS, num_trials=24, evals_per_training=2, noise=quiet)
    assert [k.smallest_bpb for k in found] == [0.0] * 4


def test_the_best_of_many_looks_better_than_it_is() -> None:
    noise = Noise()
    assert round(optimism(noise, num_trials=8, num_trainings=8), 4) == 0.0011
    generator = np.random.default_rng(3)
    drawn = generator.normal(0, LOUD.training_bpb, (4000, 6, 1))
    scores = drawn + generator.normal(0, LOUD.evaluation_bpb, (4000, 6, 3))
    seen = float(scores.reshape(4000, -1).max(axis=1).mean())
    bound = optimism(LOUD, num_trials=18, num_trainings=6)
    assert seen < bound < 1.5 * seen
    assert "best of 8 trainings looks 0.0011 bpb" in sweep_power(
        {"train.warmdown_frac": "train"}, num_trials=8, evals_per_training=1
    ).optimism_line()  # fmt: skip


@pytest.mark.parametrize(("seeds", "expected"), [(1, 0.0026), (3, 0.0015), (8, 0.0009)])
def test_single_runs_as_in_the_field(seeds: int, expected: float) -> None:
    assert round(best_against_baseline(Noise(), seeds), 4) == expected


def test_the_same_question_has_the_same_answer() -> None:
    ask = {"num_trials": 30, "evals_per_training": 3}
    assert resolve(KNOBS, **ask) == resolve(KNOBS, **ask)


def test_lines_name_what_is_out_of_reach() -> None:
    text = "\n".join(sweep_power(KNOBS, num_trials=24, evals_per_training=1).lines())
    assert "0.00075 bpb between trainings, 0.000004 between evaluations" in text
    assert "out of reach for train.warmdown_frac, train.muon_momentum" in text
    assert "two or more trials a training" in text
    assert needed_trainings(Noise(), 2) == 46


def test_wrong_use_is_an_error() -> None:
    for call in (
        lambda: resolve(KNOBS, num_trials=0, evals_per_training=1),
        lambda: resolve(KNOBS, num_trials=1, evals_per_training=0),
        lambda: resolve(KNOBS, num_trials=1, evals_per_training=1, wanted_bpb=0.0),
        lambda: Noise(training_bpb=-1.0),
        lambda: Noise(sample_bpb=math.nan),
    ):
        with pytest.raises(UsageError):
            call()
