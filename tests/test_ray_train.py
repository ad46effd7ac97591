"""Training on Ray: as many workers as wanted, whatever happens to them, and honest ends.

The cluster is the session's: simulated nodes on this machine, real worker processes.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import unfree_resources
from ray_processes import launch, notes_of, require_gone
from reference import FOLDER, TRAIN_SHARDS, training_states
from torch import Tensor

from golf_ray.api.machine import cpu_threads
from golf_ray.config import Config
from golf_ray.errors import CheckpointError, ClusterError, TrainingFailed, UsageError
from golf_ray.model.checkpoint import read_state
from golf_ray.presets import TINY
from golf_ray.records import read_jsonl
from trainers.local import train_in_process
from trainers.ray_train import train_on_ray
from trainers.run_record import ProgressEvent, TrainingOutcome

pytestmark = pytest.mark.ray_cluster

STEPS = 20
CONFIG = TINY.with_overrides(
    {
        "data.dir": str(FOLDER),
        "train.iterations": STEPS,
        "train.clip_scope": "micro_batch",
        "train.log_every_steps": 1,
        "train.val_every_steps": 10,
        "train.checkpoint_every_steps": 4,
        "cluster.num_workers": 2,
        "cluster.hang_timeout_s": 12.0,
        "cluster.max_failures": 3,
    }
)
ENDS_WITHIN_S = 200.0
"""A run that is disturbed twice, on a machine that is busy with other things."""


def weights(folder: Path) -> dict[str, Tensor]:
    """The result of a run."""
    state, _ = read_state(folder / "final_model.pt")
    return state


def require_same_weights(found: Path, expected: Path) -> None:
    mine, theirs = weights(found), weights(expected)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def losses(folder: Path) -> list[float]:
    return [record["train_loss_nats"] for record in read_jsonl(folder / "intervals.jsonl")]


def events(folder: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(folder / "events.jsonl"))


@dataclass(frozen=True)
class Run:
    """A run that nothing disturbed, to compare others with."""

    folder: Path
    outcome: TrainingOutcome
    progress: list[ProgressEvent]


@pytest.fixture(scope="module")
def undisturbed(_connected: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    progress: list[ProgressEvent] = []
    outcome = train_on_ray(CONFIG, folder, on_progress=progress.append)
    return Run(folder, outcome, progress)


def test_a_run_leaves_what_it_should(cluster: str, undisturbed: Run) -> None:
    folder, outcome = undisturbed.folder, undisturbed.outcome
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoints", "config.json", "events.jsonl", "final_model.pt", "intervals.jsonl",
        "outcome.json", "result.json",
    ]  # fmt: skip
    kept = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert kept == ["step_00000016", "step_00000020"]
    assert Config.from_json((folder / "config.json").read_text()) == CONFIG
    assert outcome.result.steps == STEPS and outcome.restarts == ()
    assert outcome.result.tokens == STEPS * CONFIG.train.batch_tokens
    assert (outcome.num_workers, outcome.device, outcome.threads) == (2, "cpu", 1)
    assert 0 < outcome.start_s < outcome.wall_s
    assert Path(outcome.checkpoint) == folder / "checkpoints" / kept[-1]
    assert TrainingOutcome.from_dict(json.loads((folder / "outcome.json").read_text())) == outcome
    records = read_jsonl(folder / "intervals.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert [r["step"] for r in records if r["val_bpb"] is not None] == [10, 20]
    assert outcome.val_bpb == records[-1]["val_bpb"]
    kinds = [event["kind"] for event in events(folder)]
    assert kinds[:3] == ["run", "workers", "began"] and kinds[-1] == "run_ended"
    assert kinds.count("checkpoint") == 5


def test_progress_has_loss_speed_and_time_left(undisturbed: Run) -> None:
    first, *seen = undisturbed.progress
    assert (first.phase, first.step, first.num_steps) == ("preparing", 0, 0)
    assert all((event.phase, event.num_steps) == ("training", STEPS) for event in seen)
    assert [e.step for e in seen] == sorted(e.step for e in seen)
    with_loss = [e for e in seen if not math.isnan(e.loss_nats)]
    assert with_loss and all(4 < e.loss_nats < 7 and e.tokens_per_s > 0 for e in with_loss)
    assert seen[-1].seconds_left is not None and seen[-1].seconds_left < 5


def test_a_run_that_ended_is_not_run_again(cluster: str, undisturbed: Run) -> None:
    assert train_on_ray(CONFIG, undisturbed.folder, resume=True) == undisturbed.outcome
    with pytest.raises(UsageError, match="there is a run in"):
        train_on_ray(CONFIG, undisturbed.folder)
    other = CONFIG.with_overrides({"train.muon_lr": 0.03})
    with pytest.raises(CheckpointError, match=r"begun with train\.muon_lr = 0\.022, not 0\.03"):
        train_on_ray(other, undisturbed.folder, resume=True)


def test_there_is_nothing_to_resume(cluster: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no run in"):
        train_on_ray(CONFIG, tmp_path / "run", resume=True)


def wait_for(folder: Path, wanted: Callable[[list[dict[str, Any]]], Any]) -> Any:
    """What `wanted` finds in a run's events, once it finds something."""
    deadline = time.monotonic() + ENDS_WITHIN_S
    while not (found := wanted(events(folder) if folder.exists() else [])):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def worker_at(attempt: int, step: int, rank: int) -> Callable[[list[dict[str, Any]]], int | None]:
    """Process id of a worker, once its attempt has kept a checkpoint of a step."""

    def find(seen: list[dict[str, Any]]) -> int | None:
        mine = [e for e in seen if e.get("attempt") == attempt]
        if not any(e["kind"] == "checkpoint" and e["step"] >= step for e in mine):
            return None
        [workers] = [e["workers"] for e in mine if e["kind"] == "workers"]
        return int(workers[rank]["pid"])

    return find


def test_a_killed_and_a_stopped_worker_change_nothing(
    cluster: str, undisturbed: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    sent: list[tuple[int, float]] = []

    def disturb() -> None:
        for attempt, step, number in ((1, 4, signal.SIGKILL), (2, 12, signal.SIGSTOP)):
            pid = wait_for(folder, worker_at(attempt, step, rank=1))
            os.kill(pid, number)
            sent.append((pid, time.time()))

    thread = threading.Thread(target=disturb)
    thread.start()
    messages: list[str] = []
    began = time.monotonic()
    outcome = train_on_ray(
        CONFIG, folder, on_progress=lambda e: messages.append(e.message) if e.message else None
    )
    thread.join(timeout=1)
    assert time.monotonic() - began < ENDS_WITHIN_S

    killed, stopped = outcome.restarts
    assert f"worker 1 on {os.uname().nodename} (process {sent[0][0]}) died" in killed.reason
    assert f"(process {sent[1][0]}) gave no sign of life" in stopped.reason
    assert killed.resumed_from_step >= 4 and stopped.resumed_from_step >= 12
    assert killed.unix_s - sent[0][1] < 10
    assert stopped.unix_s - sent[1][1] < CONFIG.cluster.hang_timeout_s + 10
    for restart in outcome.restarts:
        assert any(f"restarted from step {restart.resumed_from_step}" in text for text in messages)
    records = read_jsonl(folder / "intervals.jsonl")
    assert [r["step"] for r in records] == list(range(1, STEPS + 1)), "no step is there twice"
    assert losses(folder) == losses(undisturbed.folder)
    require_same_weights(folder, undisturbed.folder)


STUCK = """
import pathlib, time
from golf_ray.model.parts import Part

class Stuck(Part):
    def attention_output(self, y_THd, n_TD, layer, run):
        marker = pathlib.Path({marker!r})
        if layer == 0 and marker.exists():
            marker.unlink()
            time.sleep(600)
        return y_THd

PART = Stuck()
"""


def test_a_worker_that_makes_no_progress_is_ended(cluster: str, tmp_path: Path) -> None:
    marker = tmp_path / "hang"
    part = tmp_path / "stuck.py"
    part.write_text(STUCK.format(marker=str(marker)))
    config = CONFIG.with_overrides(
        {
            "model.parts": f"{part}:PART",
            "cluster.hang_timeout_s": 5.0,
            "cluster.num_workers": 1,
            "train.iterations": 8,
        }
    )
    folder = tmp_path / "run"
    thread = threading.Thread(
        target=lambda: (wait_for(folder, worker_at(1, 4, rank=0)), marker.touch())
    )
    thread.start()
    outcome = train_on_ray(config, folder)
    thread.join(timeout=1)
    [restart] = outcome.restarts
    assert "made no progress for 5 s, standing at" in restart.reason
    assert outcome.result.steps == 8 and restart.resumed_from_step >= 4


def test_a_loss_that_is_not_finite_ends_the_run_at_once(cluster: str, tmp_path: Path) -> None:
    initial = training_states()["init"]
    initial["blocks.0.attn_scale"][3] = float("nan")
    with pytest.raises(TrainingFailed, match="the loss is not finite at step 1: nan"):
        train_on_ray(CONFIG, tmp_path / "run", initial=initial)
    seen = events(tmp_path / "run")
    assert [e["kind"] for e in seen].count("workers") == 1, "no second attempt"
    [failure] = [e for e in seen if e["kind"] == "failure"]
    assert not failure["restart"] and "not finite" in failure["traceback"]
    assert not (tmp_path / "run" / "final_model.pt").exists()


@pytest.mark.timeout(600)
def test_eight_workers_on_eight_gpus_train_as_one(cluster: str, tmp_path: Path) -> None:
    one = CONFIG.with_overrides(
        {"train.iterations": 10, "train.val_every_steps": None, "cluster.num_workers": 1}
    )
    eight = one.with_overrides(
        {
            "cluster.num_workers": 8,
            "cluster.gpus_per_worker": 1.0,
            "cluster.device": "cpu",
            "cluster.placement": "STRICT_PACK",
            "cluster.hang_timeout_s": 60.0,
        }
    )
    with cpu_threads(1):
        train_in_process(one, tmp_path / "one", TRAIN_SHARDS)
    outcome = train_on_ray(eight, tmp_path / "eight")
    assert outcome.restarts == ()
    assert losses(tmp_path / "eight")[0] == pytest.approx(losses(tmp_path / "one")[0], rel=1e-6)
    assert losses(tmp_path / "eight") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    [workers] = [e["workers"] for e in events(tmp_path / "eight") if e["kind"] == "workers"]
    assert len({w["node_id"] for w in workers}) == 1
    assert sorted(int(w["gpus"][0]) for w in workers) == list(range(8))


def test_three_workers_and_a_storage_that_is_no_disk(cluster: str, tmp_path: Path) -> None:
    # fsspec's own name for this disk: to the run an object store like any other.
    one = CONFIG.with_overrides(
        {
            "train.batch_tokens": 1536,
            "train.micro_batches": 6,
            "train.iterations": 10,
            "train.val_every_steps": None,
            "cluster.num_workers": 1,
        }
    )
    three = one.with_overrides({"cluster.num_workers": 3})
    with cpu_threads(1):
        train_in_process(one, tmp_path / "one", TRAIN_SHARDS)
    outcome = train_on_ray(three, f"local://{tmp_path}/three")
    assert outcome.final_model == f"local://{tmp_path}/three/final_model.pt"
    assert losses(tmp_path / "three") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert weights(tmp_path / "three").keys() == weights(tmp_path / "one").keys()
    kept = sorted(p.name for p in (tmp_path / "three/checkpoints").iterdir())
    assert kept == ["step_00000008", "step_00000010"]


def test_ctrl_c_stops_the_workers_and_the_run_goes_on_later(
    cluster: str, undisturbed: Run, tmp_path: Path
) -> None:
    def interrupt(event: ProgressEvent) -> None:
        if event.step > 8:
            raise KeyboardInterrupt

    folder, uri = tmp_path / "run", f"local://{tmp_path}/run"
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train_on_ray(CONFIG, uri, on_progress=interrupt)
    assert unfree_resources() == {}
    assert signal.getsignal(signal.SIGINT) is handler

    outcome = train_on_ray(CONFIG, uri, resume=True)
    assert outcome.result.resumed_from_step >= 8
    assert losses(folder) == losses(undisturbed.folder)
    require_same_weights(folder, undisturbed.folder)


def test_a_killed_driver_resumes_to_the_same_bits(
    cluster: str, undisturbed: Run, tmp_path: Path
) -> None:
    folder, notes = tmp_path / "run", tmp_path / "notes.json"
    (tmp_path / "config.json").write_text(CONFIG.to_json())
    driver = launch("train", str(notes), str(folder), str(tmp_path / "config.json"))
    noted = notes_of(driver, notes)
    wait_for(folder, worker_at(1, 8, rank=0))
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    require_gone(noted, within_s=20)
    assert not (folder / "final_model.pt").exists(), "killed too late to show anything"

    outcome = train_on_ray(CONFIG, folder, resume=True)
    assert outcome.result.resumed_from_step >= 8
    attempts = [e["attempt"] for e in events(folder) if e["kind"] == "began"]
    assert attempts == [1, 2]
    assert losses(folder) == losses(undisturbed.folder)
    require_same_weights(folder, undisturbed.folder)


def test_workers_that_are_not_placed_in_time_are_one_line(cluster: str, tmp_path: Path) -> None:
    config = CONFIG.with_overrides(
        {"cluster.num_workers": 8, "cluster.cpus_per_worker": 4, "cluster.start_timeout_s": 3.0}
    )
    began = time.monotonic()
    with pytest.raises(ClusterError, match=r"8 workers of 4 CPUs each \(PACK\) were not placed"):
        train_on_ray(config, tmp_path / "run")
    assert time.monotonic() - began < 60
