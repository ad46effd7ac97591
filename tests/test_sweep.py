"""Spaces, the search that shares trainings, stage outputs, and the table: all without a cluster."""

from __future__ import annotations

import json
import pkgutil
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution
from reference import FOLDER
from rich.console import Console

import search_spaces
from golf_ray.errors import ConfigError
from golf_ray.presets import LAPTOP, RECORD, TINY
from golf_ray.sweep.search import TRIAL_KEY, StagedOptunaSearch, num_trainings
from golf_ray.sweep.space import Space, check_space, load_space, stage_of
from golf_ray.sweep.store import DONE_FILE, StageStore, data_fingerprint
from golf_ray.sweep.table import read_records, screen_table, trials_frame, write_tables
from golf_ray.sweep.trial import training_key

BASES = {"record": RECORD, "laptop": LAPTOP}


@pytest.mark.parametrize("name", [m.name for m in pkgutil.iter_modules(search_spaces.__path__)])
def test_shipped_spaces_fit_their_preset(name: str) -> None:
    space = load_space(name, BASES[name])
    assert {stage_of(knob) for knob in space.knobs()} == {"train", "quantize", "evaluate"}
    [first] = space.first
    assert set(first) == set(space.distributions)
    if name == "record":
        assert RECORD.with_overrides(first) == RECORD


def test_a_users_space_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from optuna.distributions import FloatDistribution\n"
        "KNOBS = {'adaptation.lr': FloatDistribution(1e-5, 1e-3, log=True)}\n"
    )
    space = load_space(f"{path}:KNOBS", TINY)
    assert space.knobs("evaluate") == ("adaptation.lr",) and space.first == ()


@pytest.mark.parametrize(
    ("distributions", "first", "line"),
    [
        ({"train.warmdwn": FloatDistribution(0, 1)}, (), "did you mean 'train.warmdown_frac'"),
        ({"train.warmdown_frac": FloatDistribution(0.5, 1.5)}, (), "train.warmdown_frac = 1.5"),
        ({"cluster.num_workers": FloatDistribution(1, 2)}, (), "is no knob to search"),
        ({"train.clip_scope": CategoricalDistribution(["rank", "all"])}, (), "'all' is not one"),
        ({"train.min_lr": FloatDistribution(0, 0.1)}, ({"train.min_lr": 0.2},), "outside of"),
        ({"train.min_lr": FloatDistribution(0, 0.1)}, ({"train.mn_lr": 0},), "did you mean"),
    ],
)
def test_a_space_that_cannot_work_is_one_line(
    distributions: dict[str, Any], first: tuple[dict[str, Any], ...], line: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_space(Space(name="mine", distributions=distributions, first=first), RECORD)
    assert line in str(caught.value)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("recrod", "did you mean 'record'"),
        ("/no/file.py:SPACE", "there is no space file"),
        ("no_such_module:SPACE", "is not found"),
        ("json:dumps", "is no space"),
    ],
)
def test_an_absent_space_is_one_line(name: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_space(name, RECORD)
    assert line in str(caught.value)


def search_of(space: Space, evals_per_training: int, seed: int = 0) -> StagedOptunaSearch:
    return StagedOptunaSearch(
        space.distributions,
        training_knobs=space.knobs("train"),
        evals_per_training=evals_per_training,
        first=space.first,
        metric="ttt_bpb",
        mode="min",
        seed=seed,
    )


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5))
def test_trials_share_trainings(num_trials: int, evals_per_training: int) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = load_space("record", RECORD)
    search = search_of(space, evals_per_training)
    points = []
    for number in range(num_trials):
        point = search.suggest(f"t{number}")
        assert point is not None and point.pop(TRIAL_KEY) == number + 1
        points.append(point)
        value = (point["train.warmdown_frac"] - 0.7) ** 2 + point["adaptation.chunk_size"]
        search.on_trial_complete(f"t{number}", {"ttt_bpb": value})
    assert points[0] == space.first[0]
    trainings = [tuple(p[k] for k in space.knobs("train")) for p in points]
    groups = [
        trainings[i : i + evals_per_training] for i in range(0, num_trials, evals_per_training)
    ]
    assert all(len(set(group)) == 1 for group in groups)
    assert len(set(trainings)) == num_trainings(num_trials, evals_per_training)
    others = [tuple(p[k] for k in space.knobs() if k not in space.knobs("train")) for p in points]
    assert len(set(others)) == num_trials, "the other knobs are sampled for every trial"
    study = search._ot_study
    assert all(t.state == optuna.trial.TrialState.COMPLETE for t in study.trials)


def test_a_stage_is_found_only_when_it_is_finished(tmp_path: Path) -> None:
    store = StageStore(tmp_path / "stages")
    key = {"config": {"a": 1.5, "b": None}, "code": "1"}
    assert store.find("train", key) is None
    folder = store.folder("train", key)
    folder.mkdir()
    (folder / "final_model.pt").write_bytes(b"half")
    assert store.find("train", key) is None
    made = store.finish("train", key, {"steps": 3})
    found = StageStore(tmp_path / "stages").find("train", dict(reversed(key.items())))
    assert found is not None and found.reused and not made.reused
    assert found.result == {"steps": 3} and found.folder == folder
    assert json.loads((folder / DONE_FILE).read_text())["of"] == key
    assert store.find("train", {**key, "code": "2"}) is None
    assert store.find("quantize", key) is None


def test_a_trainings_key_is_what_its_weights_depend_on(tmp_path: Path) -> None:
    base = TINY.with_overrides({"data.dir": str(FOLDER)})
    key = training_key(base)
    same = {"adaptation.chunk_size": 8, "quantization.mlp_clip_sigmas": 9, "cluster.num_workers": 2,
            "train.log_every_steps": 1, "name": "other"}  # fmt: skip
    assert training_key(base.with_overrides(same)) == key
    for change in ({"train.warmdown_frac": 0.5}, {"train.muon_momentum": 0.9}, {"train.seed": 1},
                   {"model.xsa_last_n": 2}):  # fmt: skip
        assert training_key(base.with_overrides(change)) != key
    before = data_fingerprint(base)
    copy = tmp_path / "copy"
    for path in FOLDER.rglob("*fineweb*"):
        if path.is_file():
            target = copy / path.relative_to(FOLDER)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    moved = base.with_overrides({"data.dir": str(copy)})
    assert data_fingerprint(moved) == before and training_key(moved) == key
    shard = next(copy.rglob("*train_000001.bin"))
    data = bytearray(shard.read_bytes())
    data[2000] ^= 1
    shard.write_bytes(data)
    assert data_fingerprint(moved) != before


def record(number: int, **values: Any) -> dict[str, Any]:
    knobs = {"train.warmdown_frac": 0.6 + number / 100, "adaptation.chunk_size": 32}
    return {"trial": number, "status": "done", "reason": None, "seed": 1, "knobs": knobs, **values}


def test_the_table_keeps_types_and_failures(tmp_path: Path) -> None:
    records = [
        record(0, ttt_bpb=2.5, int6_bpb=2.6, val_bpb=2.55, total_bytes=150_000, fits=True,
               trained=True),
        record(1, status="failed", reason="the loss is not finite at step 3: nan"),
        record(2, ttt_bpb=2.4, int6_bpb=2.6, val_bpb=2.55, total_bytes=151_000, fits=False,
               trained=False),
    ]  # fmt: skip
    for item in records:
        (tmp_path / f"{item['trial']:05d}.json").write_text(json.dumps(item))
    frame = trials_frame(read_records(tmp_path))
    assert list(frame.columns[:5]) == ["trial", "status", "reason", "train.warmdown_frac",
                                       "adaptation.chunk_size"]  # fmt: skip
    csv, parquet = write_tables(frame, tmp_path)
    pd.testing.assert_frame_equal(pd.read_parquet(parquet), frame, check_dtype=True)
    again = pd.read_csv(csv)
    assert again["ttt_bpb"].tolist()[::2] == [2.5, 2.4] and again["ttt_bpb"].isna()[1]
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    console.print(screen_table(frame))
    text = console.export_text()
    assert "failed" in text and "2.4000" in text and "shared" in text
    assert max(len(line) for line in text.splitlines()) <= 80
