"""A sweep on a real cluster: trials that end well, and one that fails as a failure should."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState
from reference import FOLDER

from golf_ray.presets import TINY
from golf_ray.results.standing import Sweep, SweepReader
from golf_ray.sweeps.plan import SweepPlan
from golf_ray.sweeps.runner import run_sweep
from golf_ray.sweeps.space import Space
from golf_ray.sweeps.table import read_records, trials_frame

pytestmark = [pytest.mark.ray_cluster, pytest.mark.timeout(600)]

# A learning rate at which weights, and with them the next loss, leave the finite numbers.
TOO_HIGH = 1e38


def test_a_trial_that_fails_is_a_failure_with_its_reason(cluster: str, tmp_path: Path) -> None:
    base = TINY.with_overrides(
        {
            "data.dir": str(FOLDER),
            "train.iterations": 2,
            "train.batch_tokens": 1024,
            "train.clip_scope": "micro_batch",
            "cluster.num_workers": 2,
        }
    )
    rates, chunks = [TINY.train.muon_lr, TOO_HIGH], [16, 32]
    space = Space(
        name="mine",
        distributions={
            "train.muon_lr": CategoricalDistribution(rates),
            "adaptation.chunk_size": CategoricalDistribution(chunks),
        },
        first=(
            {"train.muon_lr": rates[0], "adaptation.chunk_size": 16},
            {"train.muon_lr": rates[1], "adaptation.chunk_size": 16},
        ),
    )
    plan = SweepPlan(
        name="mine",
        base=base,
        space=space,
        num_trials=3,
        evals_per_training=2,
        storage=str(tmp_path),
        data="tiny",
        max_concurrent=1,
    )
    assert plan.num_trainings == 2
    nothing = run_sweep(dataclasses.replace(plan, max_hours=0.0))
    reader = SweepReader(Sweep.of_plan(plan))
    assert not nothing.complete and reader.look().state == "out of budget"
    outcome = run_sweep(plan, resume=True)
    assert outcome.complete and reader.look().state == "ended"
    assert (outcome.num_done, outcome.num_failed) == (2, 1)
    assert outcome.complete and not outcome.disagreements

    frame = trials_frame(read_records(plan.trials_folder))
    assert frame["trial"].tolist() == [1, 2, 3]
    assert frame["status"].tolist() == ["done", "done", "failed"]
    assert "the loss is not finite at step 2" in frame["reason"][2]
    assert frame["trained"].tolist() == [True, False, True]
    failed = frame.loc[2]
    assert failed["train_s"] > 0.0, "what it cost is told of a failure, too"
    assert [span["stage"] for span in read_records(plan.trials_folder)[2]["spans"]] == ["train"]
    assert frame["training"][0] == frame["training"][1] != frame["training"][2]
    assert frame["tokens_scored"].tolist()[:2] == [882, 882]
    assert frame["weights"].tolist()[:2] == ["int6", "int6"]
    assert math.isfinite(frame["ttt_bpb"][0])

    study = optuna.load_study(study_name="mine", storage=f"sqlite:///{plan.folder.path}/optuna.db")
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.FAIL]
    assert study.best_value == frame["ttt_bpb"][:2].min()
