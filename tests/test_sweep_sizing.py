"""How much of a space is foretold over the limit of bytes, before anything is spent on it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import FloatDistribution

from golf_ray.config import Config
from golf_ray.presets import LAPTOP
from golf_ray.quantization.sizes import predict_change
from golf_ray.sweeps.plan import SweepPlan
from golf_ray.sweeps.sizing import SURE, predicted_from_records, size_outlook
from golf_ray.sweeps.space import load_space
from trainers.storage import Storage

MODEL_BYTES = 120_000


def plan_of(storage: Path, base: Config, **more: Any) -> SweepPlan:
    return SweepPlan(
        name="next", storage=str(storage), base=base, space=load_space("laptop", base),
        num_trials=8, data="x", **more,
    )  # fmt: skip


def keep_trial(storage: Path, config: Config, **more: Any) -> None:
    folder = storage / "sweeps" / "before"
    (folder / "trials").mkdir(parents=True)
    (folder / "sweep.json").write_text("{}")
    record = {"trial": 3, "config": config.to_dict(), "codes": ["quantize-x"], **more}
    (folder / "trials" / "00003.json").write_text(json.dumps(record))


def limited(limit_bytes: int) -> Config:
    return LAPTOP.with_overrides({"quantization.limit_bytes": limit_bytes})


def test_it_is_the_part_of_the_space_that_is_refused(tmp_path: Path) -> None:
    keep_trial(tmp_path, LAPTOP, model_bytes=MODEL_BYTES)
    space = load_space("laptop", LAPTOP)
    ends = []
    for end in ("low", "high"):
        clips = {k: getattr(d, end) for k, d in space.distributions.items() if "clip" in k}
        size = predict_change(LAPTOP, MODEL_BYTES, LAPTOP.with_overrides(clips))
        ends.append(size + LAPTOP.quantization.code_bytes)
    largest, smallest = ends
    for limit, least, most in (
        (smallest / (1 + SURE) - 9, 1.0, 1.0), (largest / (1 + SURE) + 9, 0.0, 0.0),
        ((smallest + largest) / 2 / (1 + SURE), 0.05, 0.95),
    ):  # fmt: skip
        found = size_outlook(plan_of(tmp_path, limited(int(limit))))
        assert found is not None and least <= found.share <= most
        assert (found.sweep, found.trial) == ("before", 3)
        assert found == size_outlook(plan_of(tmp_path, limited(int(limit))))
        assert bool(found.lines()) == (found.share > 0)


def test_a_measured_size_counts_more_than_a_foretold_one(tmp_path: Path) -> None:
    final = {"model_bytes": 10, "fits": True}
    keep_trial(tmp_path, LAPTOP, model_bytes=10**9, final=final)
    found = size_outlook(plan_of(tmp_path, LAPTOP))
    assert found is not None and found.share == 0


@pytest.mark.parametrize(
    "change", ["train.iterations=7", "model.vocab_size=2048", "quantization.block_columns=32"]
)
def test_of_another_training_model_or_way_to_quantise_nothing_is_known(
    tmp_path: Path, change: str
) -> None:
    keep_trial(tmp_path, LAPTOP.with_overrides([change]), model_bytes=MODEL_BYTES)
    assert size_outlook(plan_of(tmp_path, LAPTOP)) is None


def test_a_searched_way_to_quantise_foretells_nothing(tmp_path: Path) -> None:
    keep_trial(tmp_path, LAPTOP, model_bytes=MODEL_BYTES)
    space = load_space("laptop", LAPTOP)
    damping = {"quantization.damping": FloatDistribution(0.001, 0.1)}
    wider = dataclasses.replace(space, distributions=space.distributions | damping, first=())
    plan = dataclasses.replace(plan_of(tmp_path, LAPTOP), space=wider)
    assert size_outlook(plan) is None
    other = LAPTOP.with_overrides({"quantization.damping": 0.05})
    trials = Storage(tmp_path / "sweeps" / "before" / "trials")
    assert predicted_from_records(other, trials) is None
    assert predicted_from_records(LAPTOP, trials) == MODEL_BYTES


def test_what_others_wrote_does_no_harm(tmp_path: Path) -> None:
    keep_trial(tmp_path, LAPTOP, model_bytes=MODEL_BYTES)
    known = size_outlook(plan_of(tmp_path, LAPTOP))
    path = tmp_path / "sweeps" / "before" / "trials" / "00003.json"
    record = json.loads(path.read_text())
    for bad in ("{torn", "[]", json.dumps({**record, "config": {"model": {"of later": 1}}})):
        folder = tmp_path / "sweeps" / "another" / "trials"
        folder.mkdir(parents=True, exist_ok=True)
        (folder.parent / "sweep.json").write_text("{}")
        (folder / "00001.json").write_text(bad)
        assert size_outlook(plan_of(tmp_path, LAPTOP)) == known is not None


def test_where_nothing_is_refused_nothing_is_foretold(tmp_path: Path) -> None:
    keep_trial(tmp_path, LAPTOP, model_bytes=10**9)
    plan = plan_of(tmp_path, LAPTOP)
    assert size_outlook(plan) is not None
    stored = dataclasses.replace(
        plan, space=load_space("adaptation", LAPTOP), checkpoints=(("a.pt", "a"),)
    )
    assert size_outlook(stored) is None
    assert size_outlook(plan_of(tmp_path / "empty", LAPTOP)) is None
