"""The store of stage outputs and its claims: one computes, whoever else needs it waits."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from golf_ray.errors import StorageError, TrainingFailed
from golf_ray.sweeps.store import DONE_FILE, StageFailed, StageStore
from trainers import claims as claims_module
from trainers.claims import Claims
from trainers.storage import Storage

KEY = {"config": {"a": 1.5, "b": None}, "version": 1}
SPAWN = multiprocessing.get_context("spawn")


def compute_slowly(root: str, who: str, log: str, seconds: float) -> None:
    """Runs in a process of its own."""

    def compute(folder: Storage) -> dict[str, Any]:
        with open(log, "a") as file:
            file.write(f"{who}\n")
        folder.write_bytes("weights", who.encode())
        time.sleep(seconds)
        return {"by": who}

    StageStore(root, who=who).obtain("train", KEY, compute)


def test_a_stage_is_found_only_when_it_is_finished(tmp_path: Path) -> None:
    store = StageStore(tmp_path / "stages", who="a/trial 1")
    assert store.find("train", KEY) is None
    folder = store.folder("train", KEY)
    folder.write_bytes("final_model.pt", b"half")
    assert store.find("train", KEY) is None
    store.finish("train", KEY, {"steps": 3})
    found = StageStore(tmp_path / "stages").find("train", dict(reversed(KEY.items())))
    assert found is not None and found.result == {"steps": 3} and found.made_by == "a/trial 1"
    assert json.loads(found.file(DONE_FILE).read_text())["of"] == KEY
    assert store.find("train", {**KEY, "version": 2}) is None
    assert store.find("quantize", KEY) is None


def test_what_many_processes_need_is_computed_once(tmp_path: Path) -> None:
    root, log = str(tmp_path / "stages"), str(tmp_path / "log")
    processes = [
        SPAWN.Process(target=compute_slowly, args=(root, f"s/trial {n}", log, 1.0))
        for n in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [p.exitcode for p in processes] == [0, 0, 0, 0]
    [maker] = Path(log).read_text().split("\n")[:-1]
    found = StageStore(root).find("train", KEY)
    assert found is not None and found.result == {"by": maker}
    assert found.file("weights").read_text() == maker


def test_the_claim_of_a_killed_process_is_taken_over_at_once(tmp_path: Path) -> None:
    root, log = str(tmp_path / "stages"), str(tmp_path / "log")
    first = SPAWN.Process(target=compute_slowly, args=(root, "s/trial 1", log, 600.0))
    first.start()
    while not os.path.exists(log):
        assert first.is_alive()
        time.sleep(0.05)
    waited: list[str] = []
    done: list[Any] = []
    store = StageStore(root, who="other/trial 7")
    waiter = threading.Thread(
        target=lambda: done.append(
            store.obtain("train", KEY, lambda folder: {"by": "me"}, on_wait=waited.append)
        )
    )
    waiter.start()
    while not waited:
        time.sleep(0.05)
    assert waited == [f"s/trial 1 (process {first.pid})"]
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    waiter.join(30)
    assert done and done[0].result == {"by": "me"}


def test_a_claim_elsewhere_goes_stale_when_it_no_longer_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims_module, "STALE_S", 1.0)
    storage = Storage(tmp_path)
    storage.write_bytes("x.json", json.dumps({"who": "far", "pid": 1, "host": "h"}).encode())
    mine = Claims(storage, "me")
    assert mine.take() is None and mine.holder == "far (process 1)" and not mine.is_sure
    deadline_s = time.monotonic() + 20.0
    for beat in range(3):
        # It is alive as long as it changes.
        time.sleep(0.6)
        content = {"who": "far", "pid": 1, "host": "h", "beat": beat}
        storage.write_bytes("x.json", json.dumps(content).encode())
        assert mine.take() is None and mine.is_sure
    while (claim := mine.take()) is None:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    with claim:
        assert Claims(storage, "another").take() is None
    assert storage.names() == []


def test_a_claim_that_nobody_keeps_up_blocks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(tmp_path)
    looks = iter([False, True])
    mine = Claims(storage, "me")
    before = mine._others

    def failing(**how: Any) -> bool:
        if next(looks):
            raise StorageError("the network is down")
        return before(**how)

    monkeypatch.setattr(mine, "_others", failing)
    with pytest.raises(StorageError, match="network"):
        mine.take()
    assert storage.names() == []
    # Of a process that lives, and that does not beat.
    monkeypatch.setattr(claims_module, "STALE_S", 0.5)
    left = Claims(storage, "left")
    storage.write_bytes(left._name, json.dumps(left._content).encode())
    other = Claims(storage, "other")
    assert other.take() is None and other.is_sure
    time.sleep(0.6)
    claim = other.take()
    assert claim is not None
    with claim:
        assert len(storage.names()) == 1


def test_at_most_one_holds_a_claim(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    inside, most = 0, 0
    lock = threading.Lock()

    def enter() -> None:
        nonlocal inside, most
        mine = Claims(storage, "somebody")
        for _ in range(5):
            while (claim := mine.take()) is None:
                time.sleep(0.01)
            with claim:
                with lock:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0.005)
                with lock:
                    inside -= 1

    threads = [threading.Thread(target=enter) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and storage.names() == []


def test_a_failure_is_not_repeated_by_those_who_waited(tmp_path: Path) -> None:
    def fail(folder: Storage) -> dict[str, Any]:
        raise TrainingFailed("the loss is not finite at step 3: nan", "lower it")

    first = StageStore(tmp_path, who="s/trial 1")
    with pytest.raises(TrainingFailed):
        first.obtain("train", KEY, fail)
    sibling = StageStore(tmp_path, who="s/trial 2")
    with pytest.raises(StageFailed, match="not finite at step 3: nan; lower it"):
        sibling.obtain("train", KEY, lambda folder: {"never": True})
    # Another sweep, or the same trial when it is run again, has a try of its own.
    other = StageStore(tmp_path, who="t/trial 1")
    with pytest.raises(TrainingFailed):
        other.obtain("train", KEY, fail)
    assert first.obtain("train", KEY, lambda folder: {"ok": True}).result == {"ok": True}
    assert sibling.obtain("train", KEY, fail).result == {"ok": True}
