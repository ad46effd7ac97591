"""`golf-ray train --in-process`: the run's folder, what it holds, and how it goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli_runner import TINY, golf_ray, subprocess_environment

from golf_ray.model.checkpoint import read_state
from golf_ray.presets import TINY as TINY_PRESET
from golf_ray.results.reading import load_results

STEPS = 8
TOKENS = 512
RUN = (
    "train", "--preset", "tiny", "--data-dir", TINY, "--in-process",
    "--set", f"train.iterations={STEPS}", "--set", "train.checkpoint_every_steps=2",
    "--set", "train.log_every_steps=3", "--set", "train.val_every_steps=6",
    "--set", f"train.batch_tokens={TOKENS}", "--set", "train.micro_batches=2",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> object:
    """As in the processes that are started here: the number of threads is part of the bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    done = golf_ray(*RUN, "--run-dir", run, "--json")
    assert done.status == 0 and not done.err
    report = done.json
    assert report["run_dir"] == str(run) and report["final_model"] == str(run / "final_model.pt")
    assert report["steps"] == STEPS and report["tokens"] == STEPS * TOKENS
    assert report["resumed_from_step"] == 0 and 4 < report["train_loss_nats"] < 7
    return run


def records(run: Path) -> list[dict[str, object]]:
    lines = (run / "intervals.jsonl").read_text().splitlines()
    timed = ("elapsed_s", "tokens_per_s")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def weights_equal(a: Path, b: Path) -> bool:
    first, second = read_state(a)[0], read_state(b)[0]
    assert set(first) == set(second)
    return all(torch.equal(first[name], second[name]) for name in first)


def test_the_run_folder(whole: Path) -> None:
    assert sorted(p.name for p in whole.iterdir()) == [
        "checkpoints", "config.json", "final_model.pt", "intervals.jsonl", "result.json"
    ]  # fmt: skip
    assert [p.name for p in sorted((whole / "checkpoints").iterdir())] == [
        "step_00000006", "step_00000008"
    ]  # fmt: skip
    assert [row["step"] for row in records(whole)] == [3, 6, 8]
    assert [row["val_bpb"] is not None for row in records(whole)] == [False, True, True]
    _, config = read_state(whole / "final_model.pt")
    assert config is not None and config.train.iterations == STEPS
    assert config.model == TINY_PRESET.model
    assert json.loads((whole / "config.json").read_text()) == config.to_dict()
    assert (whole / "final_model.pt").stat().st_mode & 0o444 == 0o444


def test_its_result_can_be_scored_at_once(whole: Path) -> None:
    data = golf_ray("eval", whole, "--json").json
    assert data["tokens_scored"] == 832 and data["weights"] == "full"


@pytest.mark.parametrize("after_step", [2, 5])
def test_killed_and_resumed_ends_with_the_same_bits(
    whole: Path, tmp_path: Path, after_step: int
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "golf_ray", *map(str, RUN), "--run-dir", str(run)]
    process = subprocess.Popen(command, env=subprocess_environment(), stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)  # fmt: skip
    try:
        wait_for_step(run, after_step, process)
        # It stands still, and is there all the same.
        os.kill(process.pid, signal.SIGSTOP)
        second = golf_ray("train", "--run-dir", run, "--resume", "--in-process")
        assert second.status == 2 and f"(process {process.pid}) at this moment" in second.error
        assert load_results(run).trials["status"].tolist() == ["running"]
    finally:
        process.kill()
        process.wait()
    assert not (run / "final_model.pt").exists()
    row = load_results(run).trials.iloc[0]
    assert row["status"] == "interrupted" and "resume" in row["reason"]
    shown = golf_ray("show", run).out
    assert f"golf-ray train --resume --run-dir {run}" in " ".join(shown.split())
    done = golf_ray("train", "--run-dir", run, "--resume", "--in-process", "--json")
    assert done.status == 0, done.err
    assert 0 < done.json["resumed_from_step"] <= STEPS - 2
    assert weights_equal(whole / "final_model.pt", run / "final_model.pt")
    assert records(run) == records(whole)
    assert sorted(p.name for p in run.rglob("*")) == sorted(p.name for p in whole.rglob("*"))


def wait_for_step(run: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, "the run ended too early"
        names = [p.name for p in (run / "checkpoints").glob("step_*")]
        if any(int(name.removeprefix("step_")) >= step for name in names):
            return
        time.sleep(0.002)
    raise AssertionError("no checkpoint within a minute")


def test_leftovers_of_a_crash_are_no_checkpoints(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert golf_ray(*RUN, "--run-dir", run, "--set", "train.iterations=8").status == 0
    # As if it had been killed while it wrote its last checkpoint and a record.
    last = run / "checkpoints" / "step_00000008"
    last.rename(run / "checkpoints" / ".step_00000008.tmp")
    (run / "final_model.pt").unlink()
    (run / "result.json").unlink()
    with open(run / "intervals.jsonl", "a") as file:
        file.write('{"step": 8, "torn')
    done = golf_ray("train", "--run-dir", run, "--resume", "--in-process", "--json")
    assert done.json["resumed_from_step"] == 6
    assert weights_equal(whole / "final_model.pt", run / "final_model.pt")
    assert records(run) == records(whole)
    assert not list((run / "checkpoints").glob(".*"))


def test_a_run_that_ended_is_not_run_again(whole: Path) -> None:
    before = (whole / "final_model.pt").stat().st_mtime_ns
    done = golf_ray("train", "--run-dir", whole, "--resume", "--in-process", "--json")
    assert done.status == 0 and done.json["steps"] == STEPS
    assert (whole / "final_model.pt").stat().st_mtime_ns == before


def test_a_run_that_has_no_checkpoint_yet_begins_anew(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text((whole / "config.json").read_text())
    done = golf_ray("train", "--run-dir", run, "--resume", "--in-process", "--json")
    assert done.json["resumed_from_step"] == 0
    assert weights_equal(whole / "final_model.pt", run / "final_model.pt")


def test_a_runs_folder_runs_no_code_of_its_own(whole: Path, tmp_path: Path) -> None:
    run, marker, part = tmp_path / "run", tmp_path / "ran", tmp_path / "part.py"
    part.write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n")
    config = json.loads((whole / "config.json").read_text())
    config["model"]["parts"] = [f"{part}:PART"]
    run.mkdir()
    (run / "config.json").write_text(json.dumps(config))
    done = golf_ray("train", "--run-dir", run, "--resume", "--in-process")
    assert done.status == 1 and f"asks to run code from '{part}:PART'" in done.error
    assert not marker.exists()


def test_resuming_under_another_configuration_is_refused(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert golf_ray(*RUN, "--run-dir", run, "--set", "train.iterations=2").status == 0
    (run / "result.json").unlink()
    done = golf_ray(
        "train", "--run-dir", run, "--resume", "--in-process", "--set", "train.muon_lr=0.5"
    )
    assert done.status == 1 and "was begun with train.muon_lr = 0.022, not 0.5" in done.error


@pytest.mark.parametrize(
    ("argv", "status", "expected"),
    [
        (["--resume", "--in-process"], 2, "--resume needs the run"),
        (["--resume", "--in-process", "--run-dir", "{tmp}/none"], 2, "there is no run in"),
        (["--in-process", "--workers", "2", "--preset", "tiny"], 2, "uses no Ray workers"),
        (["--in-process", "--run-dir", "{tmp}/x"], 2, "no configuration was given"),
        (["--in-process", "--preset", "tiny", "--run-dir", "{tmp}"], 2, "is not empty"),
        (["--in-process", "--preset", "tiny", "--run-dir", "{whole}"], 2, "add --resume"),
        (["--in-process", "--preset", "tiny", "--data-dir", "{tmp}"], 1, "no file fineweb_train"),
    ],
)
def test_what_does_not_go_together(
    whole: Path, tmp_path: Path, argv: list[str], status: int, expected: str
) -> None:
    (tmp_path / "something").touch()
    places = {"{tmp}": str(tmp_path), "{whole}": str(whole)}
    for name, place in places.items():
        argv = [a.replace(name, place) for a in argv]
    more = [] if "--data-dir" in argv else ["--data-dir", TINY]
    done = golf_ray("train", *argv, *more)
    assert done.status == status and expected in done.error
    assert not (tmp_path / "x").exists()


def test_a_loss_that_is_not_finite_ends_the_run_with_that_reason(tmp_path: Path) -> None:
    run = tmp_path / "run"
    wild = ["--set", "train.embed_lr=1e30", "--set", "train.muon_lr=1e30"]
    done = golf_ray(*RUN, "--run-dir", run, *wild)
    assert done.status == 1 and "the loss is not finite at step" in done.error
    assert not (run / "final_model.pt").exists()


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "golf_ray", *map(str, RUN), "--run-dir", str(run)]
    process = subprocess.Popen(command, env=subprocess_environment(), text=True,
                               stderr=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    wait_for_step(run, 2, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and not out
    line = f"interrupted; go on with 'golf-ray train --resume --run-dir {run}'"
    assert err == f"golf-ray: error: {line}\n"
