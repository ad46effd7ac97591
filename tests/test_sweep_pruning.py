"""Pruning: bars from ended trainings, and what is refused and said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from golf_ray.errors import TrainingPruned, UsageError
from golf_ray.presets import LAPTOP
from golf_ray.sweeps.plan import SweepPlan
from golf_ray.sweeps.pruning import (
    FROM_FRAC,
    MIN_TRAININGS,
    bars_of,
    caveats,
    sweep_bars,
)
from golf_ray.sweeps.space import load_space
from golf_ray.sweeps.study import told
from trainers.convergence import require_promise
from trainers.storage import Storage

NUM_STEPS = 40


def test_the_bar_is_the_median_at_the_same_step() -> None:
    curves = [{10: 4.0, 20: bpb, 30: bpb - 0.5, 40: 1.0} for bpb in (3.0, 2.0, 9.0, 4.0)]
    assert bars_of(curves, NUM_STEPS) == {20: 3.5, 30: 3.0}
    assert bars_of(curves[:3], NUM_STEPS) == {}


@given(st.lists(st.dictionaries(st.integers(1, 50), st.floats(0.5, 9.0), max_size=8), max_size=9))
def test_no_bar_is_early_or_last_and_half_of_the_runs_pass_each(
    curves: list[dict[int, float]],
) -> None:
    for step, bar in bars_of(curves, NUM_STEPS).items():
        known = [curve[step] for curve in curves if step in curve]
        assert len(known) >= MIN_TRAININGS
        assert FROM_FRAC * NUM_STEPS <= step < NUM_STEPS
        assert 2 * sum(value <= bar for value in known) >= len(known)


def test_a_run_above_its_bar_is_ended_and_one_at_it_goes_on() -> None:
    bars = {20: 3.5}
    require_promise(bars, 20, 3.5)
    require_promise(bars, 30, 9.0)
    with pytest.raises(TrainingPruned, match=r"3\.6000 bpb at step 20.*3\.5000"):
        require_promise(bars, 20, 3.6)


def test_bars_are_of_ended_trainings_alone(tmp_path: Path) -> None:
    stages = Storage(tmp_path)
    records = []
    for place in range(6):
        name = f"train-{place}"
        records += [{"training": name, "status": "done"}] * 2
        lines = [{"step": s, "val_bpb": 5.0 - place if s % 20 == 0 else None} for s in (10, 20, 40)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        stages.child(name).child("run").write_bytes("intervals.jsonl", text.encode())
        if place != 5:
            stages.child(name).write_bytes("stage.json", b"{}")
    records.append({"training": None, "status": "over_limit"})
    assert sweep_bars(stages, records, NUM_STEPS) == {20: 3.0}


def test_optuna_hears_that_it_was_pruned() -> None:
    outcome = {"status": "pruned", "reason": "too high at step 20", "values": {}, "constraints": {}}
    what = told(outcome, ["ttt_bpb"])
    assert (what.state.name, what.values, what.reason) == ("PRUNED", None, "too high at step 20")


def test_who_asks_for_it_is_told_that_it_misleads() -> None:
    base = LAPTOP
    lines = caveats(load_space("laptop", base), base)
    assert any("pruning misleads here: train.warmdown_frac" in line for line in lines)
    never = base.with_overrides({"train.val_every_steps": None})
    assert any("nothing is pruned" in line for line in caveats(load_space("laptop", base), never))
    assert not any("misleads" in line for line in caveats(load_space("quantization", base), base))


def test_what_cannot_be_pruned_is_refused(tmp_path: Path) -> None:
    def plan(space: str, **changes: object) -> SweepPlan:
        base = LAPTOP.with_overrides(changes)
        return SweepPlan(
            name="a", storage=str(tmp_path), base=base, space=load_space(space, base),
            num_trials=4, prune=True,
        )  # fmt: skip

    with pytest.raises(UsageError, match="nothing to prune"):
        plan("quantization")
    with pytest.raises(UsageError, match="against the clock"):
        plan("laptop", **{"train.max_wallclock_s": 60.0})
    assert SweepPlan.from_dict(plan("laptop").to_dict(), str(tmp_path)).prune
