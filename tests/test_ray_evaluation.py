"""Evaluation on a pool of real actors: the in-process number, whatever happens to the actors."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ray_processes import launch, notes_of, require_gone
from reference import TOKENIZER, VAL_SHARDS, final_state, tiny_model

from evaluators.ledger import Ledger
from evaluators.pool import PoolEvent, PoolReport, WorkPool
from evaluators.ray_evaluation import evaluate_on_ray
from evaluators.result import EvaluationResult, Method, evaluate
from golf_ray.data.shards import load_tokens
from golf_ray.data.tokenizer import byte_tables
from golf_ray.errors import ClusterError, DataError, EvaluationFailed
from golf_ray.presets import TINY

pytestmark = pytest.mark.ray_cluster

CONFIG = TINY.with_overrides({"adaptation.group_documents": 2, "cluster.hang_timeout_s": 20.0})
TOKENS = load_tokens(VAL_SHARDS, 512)
TABLES = byte_tables(TOKENIZER, 512)


def here(method: Method) -> EvaluationResult:
    """The in-process result."""
    before = torch.get_num_threads()
    torch.set_num_threads(CONFIG.evaluation.threads)
    try:
        return evaluate(
            tiny_model(), CONFIG, method, tokens=TOKENS, tables=TABLES, weights="full",
            keep_token_nats=True,
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)


def there(method: Method, num_actors: int, **arguments: Any) -> EvaluationResult:
    """The pool's result."""
    return evaluate_on_ray(
        final_state(), CONFIG, method, tokens=TOKENS, tables=TABLES, weights="full",
        num_actors=num_actors, keep_token_nats=True, **arguments,
    )  # fmt: skip


@pytest.fixture(scope="module")
def expected() -> EvaluationResult:
    return here("ttt")


def require_same(found: EvaluationResult, expected: EvaluationResult) -> None:
    assert found.score == expected.score, "the same bits"
    assert found.documents is not None and expected.documents is not None
    assert [d.index for d in found.documents] == [d.index for d in expected.documents]
    for mine, theirs in zip(found.documents, expected.documents, strict=True):
        assert mine.nats == theirs.nats and mine.num_bytes == theirs.num_bytes
        assert mine.token_nats is not None and theirs.token_nats is not None
        assert mine.token_nats.tobytes() == theirs.token_nats.tobytes()
        assert mine.trace == theirs.trace


def test_a_sample_gives_the_same_estimate(cluster: str) -> None:
    config = CONFIG.with_overrides({"adaptation.sample_documents": 6})
    threads = torch.get_num_threads()
    torch.set_num_threads(config.evaluation.threads)
    mine = evaluate(tiny_model(), config, "ttt", tokens=TOKENS, tables=TABLES, weights="full")
    torch.set_num_threads(threads)
    found = evaluate_on_ray(
        final_state(), config, "ttt", tokens=TOKENS, tables=TABLES, weights="full", num_actors=2
    )
    assert found.estimate is not None and found.estimate.documents_scored == 6
    assert found.estimate == mine.estimate and found.score == mine.score


@pytest.mark.parametrize("num_actors", [1, 2, 3])
def test_ttt_is_the_same_to_the_bit(
    cluster: str, expected: EvaluationResult, num_actors: int
) -> None:
    reports: list[PoolReport] = []
    seen: list[tuple[int, int, float]] = []
    found = there(
        "ttt", num_actors, on_report=reports.append,
        progress=lambda done, total, score: seen.append((done, total, score.bpb)),
    )  # fmt: skip
    require_same(found, expected)
    [report] = reports
    assert report.num_actors == num_actors and report.retried == report.lost_actors == 0
    assert 0 < report.busy_s <= report.held_s and report.start_s > 0
    assert expected.documents is not None
    assert [s[0] for s in seen] == sorted(s[0] for s in seen)
    assert seen[-1][:2] == (len(expected.documents),) * 2
    assert seen[-1][2] == pytest.approx(expected.score.bpb)


@pytest.mark.parametrize("method", ["packed", "sliding"])
def test_other_methods_are_the_same_to_the_bit(cluster: str, method: Method) -> None:
    assert there(method, 2).score == here(method).score


def test_a_killed_actor_costs_its_unit(cluster: str, expected: EvaluationResult) -> None:
    events: list[PoolEvent] = []
    reports: list[PoolReport] = []
    killed: list[int] = []

    def kill_one(done: int, total: int, score: object) -> None:
        ready = [e for e in events if e.kind == "ready"]
        if not killed and len(ready) == 2:
            assert ready[0].pid is not None
            killed.append(ready[0].pid)
            os.kill(ready[0].pid, signal.SIGKILL)

    found = there("ttt", 2, on_event=events.append, on_report=reports.append, progress=kill_one)
    assert killed, "killed too late to show anything"
    require_same(found, expected)
    assert reports[0].lost_actors == 1 and reports[0].retried <= 1
    [lost] = [e for e in events if e.kind == "lost"]
    assert str(killed[0]) in lost.message


class Stopped(BaseException):
    """Ends an evaluation from within."""


def test_a_ledger_makes_a_rerun_do_what_is_missing(
    cluster: str, expected: EvaluationResult, tmp_path: Path
) -> None:
    identity = {"weights": "tiny"}

    def stop(done: int, total: int, score: object) -> None:
        if done >= 5:
            raise Stopped

    with pytest.raises(Stopped):
        there("ttt", 2, ledger=Ledger(str(tmp_path), identity), progress=stop)
    kept = set(Ledger(str(tmp_path), identity).scores)
    assert 5 <= len(kept) < 14
    reports: list[PoolReport] = []
    seen: list[int] = []
    found = there(
        "ttt", 3, ledger=Ledger(str(tmp_path), identity), on_report=reports.append,
        progress=lambda done, total, score: seen.append(done),
    )  # fmt: skip
    require_same(found, expected)
    assert reports[0].units == (14 - len(kept) + 1) // 2 and seen[-1] == 14
    # With all of it there no actor is asked for.
    again = there("ttt", 3, ledger=Ledger(str(tmp_path), identity), on_report=pytest.fail)
    require_same(again, expected)


def test_a_driver_that_is_killed_loses_what_was_under_way(
    expected: EvaluationResult, cluster: str, tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(CONFIG.with_overrides({"adaptation.group_documents": 1}).to_json())
    ledger, segments = tmp_path / "ledger", tmp_path / "ledger" / "segments"
    for time_around in range(2):
        before = set(segments.glob("*")) if segments.exists() else set()
        notes = tmp_path / f"notes{time_around}.json"
        driver = launch("evaluate", str(notes), str(ledger), str(config))
        noted = notes_of(driver, notes)
        deadline = time.monotonic() + 90
        while len(set(segments.glob("*.jsonl")) - before) < 2:
            assert driver.poll() is None, driver.communicate()
            assert time.monotonic() < deadline, "nothing was scored"
            time.sleep(0.005)
        driver.kill()
        driver.wait()
        require_gone(noted, 60)
        assert before <= set(segments.glob("*")), "what is there stays"
    found = Ledger(str(ledger), {"weights": "tiny"})
    assert found.troubles == [] and 4 <= len(found.scores)
    # Each document is on its own there, so its bits are those of another packing.
    assert expected.documents is not None
    for index, score in found.scores.items():
        theirs = expected.documents[index]
        assert (score.tokens, score.num_bytes) == (theirs.tokens, theirs.num_bytes)
        assert score.nats == pytest.approx(theirs.nats, abs=1e-6 * max(1, score.tokens))


def sleeper(seconds: float, mark: str) -> Any:
    """A factory of workers that sleep; a class of this module would not be found elsewhere."""

    class Sleeper:
        def __init__(self, *parts: Any) -> None:
            self.parts = parts

        def run_unit(self, payload: Any) -> Any:
            time.sleep(seconds)
            if payload == "raise":
                raise KeyError(mark)
            if payload == "refuse":
                raise DataError("a wrong shard", "mend it")
            if payload in ("SIGKILL", "SIGSTOP"):
                os.kill(os.getpid(), getattr(signal, payload))
                # The thread that sends a signal may run on for a moment.
                time.sleep(600)
            return payload, os.getpid(), self.parts

    return Sleeper


def pool(num_actors: int, mark: str = "mark", seconds: float = 0.05, **settings: Any) -> Any:
    return WorkPool(
        sleeper(seconds, mark), ("part",), num_actors=num_actors, bundle={"CPU": 1.0}, **settings
    )


def test_work_is_shared_and_parts_arrive(cluster: str) -> None:
    with pool(3) as running:
        results, report = running.run({i: i for i in range(30)})
        again, _ = running.run({"x": "x"})
    assert {unit: result[0] for unit, result in results.items()} == {i: i for i in range(30)}
    assert again["x"][0] == "x", "a pool serves more than one run"
    assert {result[2] for result in results.values()} == {("part",)}
    assert report.units == 30 and report.retried == 0


def test_an_error_is_named_with_its_unit_after_retries(cluster: str) -> None:
    with pool(2, mark="the reason") as running, pytest.raises(EvaluationFailed) as caught:
        running.run({0: "a", 1: "raise"}, describe=lambda unit: f"document {unit}")
    line = str(caught.value)
    assert "document 1 failed each time, 2 times" in line and "KeyError: 'the reason'" in line


def test_an_error_that_a_user_can_mend_is_itself_and_at_once(cluster: str) -> None:
    with pool(1) as running, pytest.raises(DataError, match="a wrong shard"):
        running.run({0: "refuse"})


def test_a_unit_that_kills_its_actors_is_named(cluster: str) -> None:
    events: list[PoolEvent] = []
    with pool(2, on_event=events.append) as running, pytest.raises(EvaluationFailed) as caught:
        running.run({0: "SIGKILL", 1: "a", 2: "b"}, describe=lambda unit: f"document {unit}")
    assert "document 0 cost an actor each time, 3 times" in str(caught.value)
    assert sum(e.kind == "lost" for e in events) == 3


def test_an_actor_that_is_stopped_is_replaced(cluster: str) -> None:
    events: list[PoolEvent] = []
    began = time.monotonic()
    with pool(2, hang_timeout_s=3.0, on_event=events.append) as running:
        with pytest.raises(EvaluationFailed, match="document 0 cost an actor"):
            running.run({0: "SIGSTOP", 1: "a"}, describe=lambda unit: f"document {unit}")
    lost = [e for e in events if e.kind == "lost"]
    assert len(lost) == 3 and "gave no sign of life for 3 s" in lost[0].message
    assert time.monotonic() - began < 90


def test_a_pool_that_cannot_be_placed_says_so(cluster: str) -> None:
    with pytest.raises(
        ClusterError, match=r"none of 1 actors \(99 CPU each\) was ready within 2 s"
    ):
        with WorkPool(
            sleeper(0, ""), (), num_actors=1, bundle={"CPU": 99.0}, start_timeout_s=2.0
        ) as running:
            running.run({0: 0})


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(DataError, match="nothing to score"):
        there("ttt", 1, documents=())
