"""What a failure of workers means, and what the driver makes of it: no cluster here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import (
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)

from golf_ray.errors import DataError, TrainingFailed
from trainers.failures import Kind, WorkerFailure, judge
from trainers.ray_watch import classify
from trainers.run_record import ProgressEvent, RunRecord
from trainers.storage import Storage


def failure(rank: int, kind: Kind, **values: Any) -> WorkerFailure:
    return WorkerFailure(rank=rank, kind=kind, text=f"was {kind}", host="h", pid=7, **values)


def test_the_cause_is_what_a_worker_suffered_not_what_it_saw() -> None:
    verdict = judge([failure(0, "communication"), failure(3, "died"), failure(1, "communication")])
    assert verdict.cause.rank == 3 and verdict.restart and verdict.error is None
    assert verdict.cause.describe() == "worker 3 on h (process 7) was died"
    assert judge([failure(2, "died"), failure(1, "hung")]).cause.kind == "hung"
    assert judge([failure(2, "died"), failure(1, "died")]).cause.rank == 1
    assert judge([failure(0, "communication")]).restart


def test_an_error_of_our_own_ends_the_run_as_it_is() -> None:
    error = DataError("a wrong shard", "mend it")
    verdict = judge([failure(0, "died"), failure(1, "refused", error=error)])
    assert not verdict.restart and verdict.error is error


def test_a_bug_ends_the_run_and_is_named() -> None:
    verdict = judge([failure(0, "communication"), failure(1, "error")])
    assert not verdict.restart and isinstance(verdict.error, TrainingFailed)
    assert "worker 1 on h (process 7) was error" in str(verdict.error)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (DataError("x"), "refused"),
        (WorkerHealthCheckTimeoutError("slow"), "hung"),
        (WorkerHealthCheckFailedError("x", failure=ActorDiedError()), "died"),
        (RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer"),
         "communication"),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp"), "communication"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "system"),
        (OSError(5, "Input/output error"), "system"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "error"),
        (TypeError("unsupported operand"), "error"),
    ],
)  # fmt: skip
def test_errors_are_told_apart(error: BaseException, kind: Kind) -> None:
    found, text = classify(error, silence_s=9.0)
    assert found == kind and "\n" not in text


def interval(attempt: int, step: int) -> dict[str, Any]:
    record = {"step": step, "attempt": attempt}
    return {"kind": "interval", "attempt": attempt, "unix_s": 1.0, "record": record}


def began(attempt: int, step: int, unix_s: float) -> dict[str, Any]:
    return {"kind": "began", "attempt": attempt, "unix_s": unix_s, "step": step, "num_steps": 9}


def failed(unix_s: float, **values: Any) -> dict[str, Any]:
    return {"kind": "failure", "attempt": 1, "unix_s": unix_s, "rank": 1, "restart": True,
            "reason": "worker 1 died", **values}  # fmt: skip


def stuck(rank: int, unix_s: float, *, waiting: bool) -> dict[str, Any]:
    return {"kind": "stuck", "attempt": 1, "unix_s": unix_s, "rank": rank, "host": "h", "pid": rank,
            "step": 3, "seconds": 60.0, "where": f"f.py:{rank}", "waiting": waiting}  # fmt: skip


def test_steps_that_are_redone_are_recorded_once(tmp_path: Path) -> None:
    told: list[ProgressEvent] = []
    record = RunRecord(Storage(tmp_path), told.append)
    for message in (began(1, 0, 10.0), *(interval(1, s) for s in (1, 2, 3)), failed(20.0)):
        record.take(message)
    record.progress({"attempt": 1, "step": 3, "loss_nats": 1.0})
    record.take(began(2, 2, 25.0))
    record.take(interval(2, 3))
    steps = [(r["step"], r["attempt"]) for r in record.intervals.values]
    assert steps == [(1, 1), (2, 1), (3, 2)]
    [restart] = record.restarts
    assert (restart.resumed_from_step, restart.lost_at_step, restart.seconds) == (2, 3, 5.0)
    assert restart.reason == "worker 1 died" and restart.attempt == 2
    assert [e.message for e in told if e.message] == [
        "worker 1 died; restarting", restart.describe(),
    ]  # fmt: skip
    again = RunRecord(Storage(tmp_path), None)
    assert again.attempts_before == 2 and again.intervals.values == record.intervals.values


def test_what_a_killed_driver_did_not_take_comes_out_of_the_checkpoint(tmp_path: Path) -> None:
    storage = Storage(tmp_path)
    carried = b"".join(b'{"step": %d, "attempt": 1}\n' % step for step in (1, 2, 3, 4))
    storage.write_bytes("checkpoints/step_00000004/intervals.jsonl", carried)
    record = RunRecord(storage, None)
    for message in (began(1, 0, 10.0), *(interval(1, s) for s in (1, 2))):
        record.take(message)
    again = RunRecord(storage, None)
    again.take(began(2, 4, 99.0))
    assert [r["step"] for r in again.intervals.values] == [1, 2, 3, 4]


def test_of_workers_that_end_themselves_the_one_that_does_not_wait_is_the_cause(
    tmp_path: Path,
) -> None:
    record = RunRecord(Storage(tmp_path), None)
    record.take(stuck(0, 19.0, waiting=True))
    record.take(stuck(1, 19.5, waiting=False))
    record.take(failed(20.0))
    assert record.last_reason is not None
    assert "worker 1 on h (process 1) made no progress for 60 s" in record.last_reason
    assert "standing at f.py:1" in record.last_reason


def test_a_worker_that_ends_itself_after_the_failure_is_not_the_cause(tmp_path: Path) -> None:
    record = RunRecord(Storage(tmp_path), None)
    record.take(failed(20.0))
    record.take(stuck(0, 21.0, waiting=True))
    assert record.last_reason == "worker 1 died"
