"""Training: the stored ten steps, any number of ranks, a kill and a resume, and honest ends."""

from __future__ import annotations

import itertools
import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import FOLDER, TRAIN_SHARDS, arrays, training_states
from torch import Tensor

from golf_ray.api.machine import cpu_threads
from golf_ray.config import Config
from golf_ray.errors import CheckpointError, ConfigError, TrainingFailed
from golf_ray.model.checkpoint import read_state
from golf_ray.model.loading import load_tensors
from golf_ray.presets import TINY
from trainers.loop import Clock, TrainingRun
from trainers.reporting import Interval, Reporter, WriteFolder
from trainers.state import FINAL_FILE

PROGRAM = Path(__file__).with_name("training_process.py")
EVERY_STEP = {"train.log_every_steps": 1}


class Recorder(Reporter):
    """Keeps intervals, and checkpoints in a folder if there is one."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.intervals: list[Interval] = []
        self.checkpoints: list[int] = []

    def interval(self, interval: Interval) -> None:
        self.intervals.append(interval)

    def checkpoint(self, step: int, write: WriteFolder, *, final: bool) -> None:
        self.checkpoints.append(step)
        if self.folder is not None:
            target = self.folder / f"{step:06d}"
            target.mkdir(parents=True)
            write(target)


def launch(
    folder: Path, config: Config, size: int = 1, resume: Path | None = None
) -> list[subprocess.Popen[bytes]]:
    """Start all ranks of a training as processes."""
    folder.mkdir(parents=True, exist_ok=True)
    job = {
        "size": size,
        "config": config.to_dict(),
        "shards": [str(p) for p in TRAIN_SHARDS],
        "initial": str(FOLDER / "training_states.pt") if config.model == TINY.model else None,
        "rendezvous": str(folder / "rendezvous"),
        "folder": str(folder),
        "resume": str(resume) if resume else None,
    }
    (folder / "job.json").write_text(json.dumps(job))
    return [
        subprocess.Popen([sys.executable, str(PROGRAM), str(folder / "job.json"), str(rank)])
        for rank in range(size)
    ]


def losses_of(folder: Path, ranks: list[subprocess.Popen[bytes]]) -> list[list[float]]:
    """Losses and norms of all steps of a training whose ranks were launched."""
    for process in ranks:
        assert process.wait(timeout=240) == 0
    seen = [json.loads((folder / f"losses-{r}.json").read_text()) for r in range(len(ranks))]
    assert all(other == seen[0] for other in seen), "ranks must see the same losses"
    return seen[0]


def losses_here(config: Config, resume: Path | None = None) -> list[list[float]]:
    """The same of a training in this process, on as many threads as a rank has."""
    recorder = Recorder()
    initial = training_states()["init"] if config.model == TINY.model else None
    with (
        cpu_threads(1),
        TrainingRun(config, TRAIN_SHARDS, reporter=recorder, initial=initial) as run,
    ):
        if resume is not None:
            run.resume(resume)
        run.run()
    return [[i.step, i.train_loss_nats, i.grad_norm] for i in recorder.intervals]


def distance(
    a: dict[str, Tensor], b: dict[str, Tensor], start: dict[str, Tensor]
) -> dict[str, float]:
    """Distance of a to b over the distance that b moved from start, by kind of tensor."""
    apart: dict[str, float] = {}
    moved: dict[str, float] = {}
    for name in b:
        kind = "bank" if "bank" in name else "embedding" if "emb" in name else "small"
        apart[kind] = apart.get(kind, 0.0) + float((a[name] - b[name]).square().sum())
        moved[kind] = moved.get(kind, 0.0) + float((b[name] - start[name]).square().sum())
    return {kind: (apart[kind] / moved[kind]) ** 0.5 for kind in apart}


def test_ten_steps_are_the_stored_ones(tmp_path: Path) -> None:
    expected, states = arrays("training"), training_states()
    recorder = Recorder(tmp_path)
    config = TINY.with_overrides(EVERY_STEP)
    with TrainingRun(config, TRAIN_SHARDS, reporter=recorder, initial=states["init"]) as run:
        result = run.run()
    assert result.steps == 10 and result.tokens == 20_480
    found = recorder.intervals
    assert [i.lr_multiplier for i in found] == pytest.approx(expected["lr_multiplier"], rel=1e-12)
    assert [i.muon_momentum for i in found] == pytest.approx(expected["muon_momentum"], rel=1e-12)
    assert [i.looping for i in found] == [step >= 4 for step in range(10)]
    losses = [i.train_loss_nats for i in found]
    assert losses == pytest.approx(expected["loss"], rel=1e-4)
    assert losses[0] == pytest.approx(expected["loss"][0], rel=1e-5)
    norms = [i.grad_norm for i in found]
    assert norms == pytest.approx(expected["grad_norm"], rel=1e-3)
    assert norms[0] == pytest.approx(expected["grad_norm"][0], rel=1e-5)
    final = dict(run.model.state_dict())
    average, _ = read_state(tmp_path / "000010" / FINAL_FILE)
    for found_state, name in ((final, "final"), (average, "ema")):
        apart = distance(found_state, states[name], states["init"])
        assert apart["bank"] <= 0.07
        assert apart["embedding"] <= 4e-3
        assert apart["small"] <= 4e-2


@dataclass(frozen=True)
class Trained:
    """One configuration, trained in this process and by two ranks that kept checkpoints."""

    config: Config
    one: list[list[float]]
    two: list[list[float]]
    checkpoints: Path


@pytest.fixture(scope="module", params=["micro_batch", "global"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """For both scopes of clipping."""
    config = TINY.with_overrides(
        {**EVERY_STEP, "train.clip_scope": request.param, "train.checkpoint_every_steps": 5}
    )
    folder = tmp_path_factory.mktemp("two")
    ranks = launch(folder, config, 2)
    return Trained(config, losses_here(config), losses_of(folder, ranks), folder)


def test_two_processes_train_as_one(trained: Trained) -> None:
    one, two = trained.one, trained.two
    assert two[0][1] == pytest.approx(one[0][1], rel=1e-6)
    assert two[0][2] == pytest.approx(one[0][2], rel=1e-5)
    assert [s[1] for s in two] == pytest.approx([s[1] for s in one], rel=1e-4)


def test_a_checkpoint_resumes_on_another_number_of_ranks(trained: Trained) -> None:
    one = losses_here(trained.config, resume=trained.checkpoints / "000005")
    assert [s[0] for s in one] == [6, 7, 8, 9, 10]
    assert [s[1] for s in one] == pytest.approx([s[1] for s in trained.two[5:]], rel=1e-4)


@pytest.mark.parametrize("num_layers", [6, 7])
def test_three_processes_share_six_micro_batches(tmp_path: Path, num_layers: int) -> None:
    # Banks of 12 and 6 matrices divide by 3; those of 14 and 7 have to be padded.
    config = TINY.with_overrides(
        {
            **EVERY_STEP,
            "train.batch_tokens": 1536,
            "train.micro_batches": 6,
            "train.clip_scope": "micro_batch",
            "model.num_layers": num_layers,
        }
    )
    ranks = launch(tmp_path, config, 3)
    one, three = losses_here(config), losses_of(tmp_path, ranks)
    assert three[0][1] == pytest.approx(one[0][1], rel=1e-6)
    assert [s[1] for s in three] == pytest.approx([s[1] for s in one], rel=1e-4)


def test_with_float32_iterations_processes_agree_ten_times_closer(tmp_path: Path) -> None:
    config = TINY.with_overrides(
        {
            **EVERY_STEP,
            "train.clip_scope": "micro_batch",
            "train.muon_newton_schulz_dtype": "float32",
        }
    )
    ranks = launch(tmp_path, config, 2)
    one, two = losses_here(config), losses_of(tmp_path, ranks)
    assert [s[1] for s in two] == pytest.approx([s[1] for s in one], rel=1e-5)


def test_a_killed_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    config = TINY.with_overrides({"train.checkpoint_every_steps": 2})
    [undisturbed] = launch(tmp_path / "whole", config)
    [process] = launch(tmp_path / "killed", config)
    first = tmp_path / "killed" / "000002"
    deadline = time.monotonic() + 120
    while not first.exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    time.sleep(random.uniform(0.0, 0.6))
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = sorted(p for p in (tmp_path / "killed").iterdir() if p.name.startswith("0"))
    assert not (kept[-1] / FINAL_FILE).exists(), "killed too late to show anything"

    [process] = launch(tmp_path / "resumed", config, resume=kept[-1])
    assert process.wait(timeout=120) == 0
    assert undisturbed.wait(timeout=120) == 0
    whole, _ = read_state(tmp_path / "whole" / "000010" / FINAL_FILE)
    resumed, _ = read_state(tmp_path / "resumed" / "000010" / FINAL_FILE)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    config = TINY.with_overrides({"train.iterations": 1})
    with TrainingRun(config, TRAIN_SHARDS, reporter=Recorder(tmp_path)) as run:
        run.run()
    other = config.with_overrides({"train.muon_lr": 0.03})
    with TrainingRun(other, TRAIN_SHARDS) as run:
        with pytest.raises(CheckpointError, match=r"train\.muon_lr = 0\.022 there, 0\.03 here"):
            run.resume(tmp_path / "000001")


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    initial = training_states()["init"]
    initial["blocks.0.attn_scale"][3] = float("nan")
    recorder = Recorder(tmp_path)
    config = TINY.with_overrides({"train.checkpoint_every_steps": 1})
    with TrainingRun(config, TRAIN_SHARDS, reporter=recorder, initial=initial) as run:
        with pytest.raises(TrainingFailed, match="not finite at step 1"):
            run.run()
    assert recorder.checkpoints == []


def test_the_clock_ends_a_run_and_moves_its_schedule() -> None:
    config = TINY.with_overrides(
        {
            **EVERY_STEP,
            "train.max_wallclock_s": 3.0,
            "train.reserve_s": 1.0,
            "train.warmdown_frac": 0.5,
            "train.iterations": 1000,
        }
    )
    # Time passes by a quarter of a second each time that somebody looks.
    ticks = itertools.count()
    clock = Clock(now_s=lambda: next(ticks) * 0.25)
    recorder = Recorder()
    with TrainingRun(config, TRAIN_SHARDS, reporter=recorder, clock=clock) as run:
        result = run.run()
    assert 2.0 <= result.elapsed_s <= 2.5 and result.steps < 10
    fracs = [i.frac for i in recorder.intervals]
    assert fracs == sorted(fracs) and fracs[-1] == 1.0
    first, last = recorder.intervals[0], recorder.intervals[-1]
    assert first.lr_multiplier == 1.0 and not first.looping
    assert 0.0 < last.lr_multiplier < 0.6 and last.looping


def test_workers_must_divide_the_micro_batches() -> None:
    from golf_ray.optim.world import World

    with pytest.raises(ConfigError, match="3 workers do not divide"):
        TrainingRun(TINY, TRAIN_SHARDS, world=World(rank=0, size=3))


def test_the_state_holds_everything(tmp_path: Path) -> None:
    config = TINY.with_overrides({"train.iterations": 2})
    with TrainingRun(config, TRAIN_SHARDS, reporter=Recorder(tmp_path)) as run:
        run.run()
    state: dict[str, Any] = load_tensors(tmp_path / "000002" / "state.pt", "stored")
    assert state["step"] == 2 and state["elapsed_s"] > 0
    assert set(state["optimizer"]["muon"]) == {"qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank"}
    assert len(state["optimizer"]["adam"]) == 29
    assert state["loader"]["cursor"] > 0 and "cpu" in state["random"]
    assert all(t.dtype == torch.float32 for t in state["average"].values())
