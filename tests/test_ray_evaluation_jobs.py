"""Many evaluations in one pool, and what goes wrong in some of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray_nodes
import torch
from cli_runner import TINY as FOLDER
from cli_runner import golf_ray
from ray_processes import ROOT
from reference import TOKENIZER, VAL_SHARDS, final_state
from torch import Tensor

from evaluators.jobs import Job
from evaluators.ledger import Ledger
from evaluators.pool import PoolEvent, PoolReport, WorkPool
from evaluators.ray_evaluation import evaluate_jobs_on_ray
from evaluators.result import EvaluationResult, evaluate
from evaluators.watch import Status
from golf_ray.api import Evaluation, Evaluations, FailedEvaluation, open_weights
from golf_ray.cli.evaluate import print_many
from golf_ray.config import Config
from golf_ray.data.documents import document_bounds
from golf_ray.data.shards import load_tokens
from golf_ray.data.tokenizer import byte_tables
from golf_ray.errors import EvaluationFailed
from golf_ray.model.checkpoint import build_model, save_state
from golf_ray.presets import TINY

pytestmark = pytest.mark.ray_cluster

CONFIG = TINY.with_overrides({"adaptation.group_documents": 2, "cluster.hang_timeout_s": 20.0})
OTHER = CONFIG.with_overrides({"adaptation.chunk_size": 16, "adaptation.lr": 2e-3})
TOKENS = load_tokens(VAL_SHARDS, 512)
TABLES = byte_tables(TOKENIZER, 512)
FULL, INT6 = FOLDER / "final_model.pt", FOLDER / "final_model.int6.ptz"


def int6_state() -> Mapping[str, Tensor]:
    return open_weights(INT6).state(TINY.model)


def here(state: Mapping[str, Tensor], config: Config) -> EvaluationResult:
    """The in-process result."""
    before = torch.get_num_threads()
    torch.set_num_threads(config.evaluation.threads)
    try:
        model = build_model(config.model, state)
        return evaluate(model, config, "ttt", tokens=TOKENS, tables=TABLES, weights="full")
    finally:
        torch.set_num_threads(before)


def job(
    name: str,
    state: Callable[[], Mapping[str, Tensor]] = final_state,
    config: Config = CONFIG,
    **more: Any,
) -> Job:
    settings = {"tokens": TOKENS, "tables": TABLES, "weights": "full", "method": "ttt", **more}
    return Job(name=name, state=state, config=config, **settings)


def test_a_grid_shares_a_pool_and_gives_each_its_own_bits(cluster: str) -> None:
    reports: list[PoolReport] = []
    seen: list[Status] = []
    events: list[PoolEvent] = []
    grid = [
        job("a"), job("a 16", config=OTHER), job("b", int6_state), job("b 16", int6_state, OTHER),
        job("packed", method="packed"),
    ]  # fmt: skip
    found = evaluate_jobs_on_ray(
        grid, num_actors=2, on_status=seen.append, on_report=reports.append, on_event=events.append
    )
    assert [e.kind for e in events] == ["ready", "ready"], "two actors did all of it"
    for one, mine in zip(grid[:4], found, strict=False):
        expected = here(one.state(), one.config)
        assert isinstance(mine, EvaluationResult) and mine.score == expected.score, one.name
        assert mine.documents == expected.documents
        assert mine.actor_seconds is not None and mine.seconds >= 0
    packed = found[4]
    assert isinstance(packed, EvaluationResult) and packed.method == "packed"
    assert len({mine.score.nats for mine in found if isinstance(mine, EvaluationResult)}) == 5
    [report] = reports
    assert report.units == 4 * 7 + 4
    last = seen[-1]
    assert last.num_jobs == 5 and last.seconds_left == 0.0 and last.actors == 2
    ends = {status.job: status for status in seen}
    assert [ends[n].done for n in range(4)] == [14] * 4
    # All of them scored: nothing is left to chance.
    assert ends[0].standard_error_bpb == pytest.approx(0, abs=1e-9)
    lefts = [s.seconds_left for s in seen if s.seconds_left is not None]
    assert lefts[0] > lefts[-1]


def spoilt() -> tuple[np.ndarray[Any, Any], int]:
    """The stream with an id in it that the model has no row for, and that document's number."""
    tokens = TOKENS.copy()
    bounds = document_bounds(TOKENS)
    number = int(np.argmax(bounds[:, 1] - bounds[:, 0] > 8))
    tokens[bounds[number, 0] + 5] = 600
    return tokens, number


def test_a_document_that_fails_is_named_and_the_others_go_on(cluster: str, tmp_path: Path) -> None:
    tokens, number = spoilt()
    tables = byte_tables(TOKENIZER, 512)
    ledger = Ledger(str(tmp_path), {"of": "spoilt"})
    config = CONFIG.with_overrides({"adaptation.group_documents": 3})
    spoilt_job = job("spoilt", config=config, tokens=tokens, tables=tables, ledger=ledger)
    events: list[PoolEvent] = []
    failed, whole = evaluate_jobs_on_ray(
        [spoilt_job, job("whole")], num_actors=2, on_event=events.append
    )
    assert isinstance(failed, EvaluationFailed) and failed.exit_status == 1
    line = str(failed)
    assert f"document {number} (IndexError" in line, line
    assert "failed each time, 2 times" in line
    assert isinstance(whole, EvaluationResult) and whole.score == here(final_state(), CONFIG).score
    missing = 14 - len(ledger.scores)
    lost = 882 - sum(score.tokens for score in ledger.scores.values())
    assert 1 <= missing <= 3 and number not in ledger.scores
    assert f"{missing} of 14 documents with {lost} tokens are missing" in line
    assert f"the others are kept in {tmp_path}, and the same command goes on" in line
    # Again: only what is missing is tried, on fresh actors.
    reports: list[PoolReport] = []
    again = Ledger(str(tmp_path), {"of": "spoilt"})
    [outcome] = evaluate_jobs_on_ray(
        [job("spoilt", config=config, tokens=tokens, tables=tables, ledger=again)],
        num_actors=2, on_report=reports.append,
    )  # fmt: skip
    assert isinstance(outcome, EvaluationFailed) and reports[0].units == 1


def test_without_a_ledger_the_rest_is_not_computed_for_nothing(cluster: str) -> None:
    tokens, _ = spoilt()
    reports: list[PoolReport] = []
    single = CONFIG.with_overrides({"adaptation.group_documents": 1})
    documents = job("spoilt", config=single, tokens=tokens)
    [outcome] = evaluate_jobs_on_ray([documents], num_actors=1, on_report=reports.append)
    assert isinstance(outcome, EvaluationFailed)
    assert "with --ledger DIR the others are kept" in str(outcome)


def test_a_long_document_goes_on_from_its_state(cluster: str, tmp_path: Path) -> None:
    """Its actor is killed as soon as a state of it is stored; the bits stay."""
    config = CONFIG.with_overrides({"adaptation.group_documents": 1, "adaptation.chunk_size": 1})
    bounds = document_bounds(TOKENS)
    longest = int(np.argmax(bounds[:, 1] - bounds[:, 0]))
    only = [d for d in (here_documents(config)) if d.index == longest]
    ledger = Ledger(str(tmp_path), {"of": "long"})
    expected = here_some(config, only)
    pids: list[int] = []
    killed: list[bool] = []

    def watch(event: PoolEvent) -> None:
        if event.kind == "ready" and event.pid is not None:
            pids.append(event.pid)
            if not killed:
                killed.append(True)
                kill_when_there(tmp_path / "states" / f"{longest}.state", event.pid)

    [outcome] = evaluate_jobs_on_ray(
        [job("long", config=config, documents=only, ledger=ledger)],
        num_actors=1, on_event=watch, state_s=0.0,
    )  # fmt: skip
    assert len(pids) == 2, "a second actor took it up"
    assert isinstance(outcome, EvaluationResult)
    assert outcome.score == expected
    assert not (tmp_path / "states").exists(), "what is scored needs no state"


def here_documents(config: Config) -> Any:
    from evaluators.ttt import choose_documents

    return choose_documents(TOKENS, config.adaptation)


def here_some(config: Config, documents: Any) -> Any:
    torch.set_num_threads(config.evaluation.threads)
    model = build_model(config.model, final_state())
    return evaluate(
        model, config, "ttt", tokens=TOKENS, tables=TABLES, weights="full", documents=documents
    ).score


def kill_when_there(file: Path, pid: int) -> None:
    """SIGKILL a process once a file is there, from a thread."""
    import threading
    import time

    def wait() -> None:
        while not file.exists():
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def breaker(flag: Path) -> Any:
    """A factory of workers of which the first breaks for good, as after an error of a GPU."""

    class Breaker:
        def __init__(self) -> None:
            self.broken = False

        def run_unit(self, payload: int) -> int:
            if not flag.exists():
                flag.touch()
                self.broken = True
            if self.broken:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return payload

        def check(self) -> None:
            if self.broken:
                raise RuntimeError("CUDA error: nothing works any more")

    return Breaker


def test_an_actor_that_is_broken_is_replaced(cluster: str, tmp_path: Path) -> None:
    events: list[PoolEvent] = []
    with WorkPool[int, int](
        breaker(tmp_path / "flag"), (), num_actors=1, bundle={"CPU": 1.0}, on_event=events.append
    ) as pool:
        results, report = pool.run({n: n for n in range(6)})
    assert results == {n: n for n in range(6)} and report.lost_actors == 1
    [lost] = [e for e in events if e.kind == "lost"]
    assert "can compute no more (RuntimeError: CUDA error: nothing works" in lost.message


def test_the_command_evaluates_a_grid(tmp_path: Path) -> None:
    shared = ("--preset", "tiny", "--data-dir", FOLDER, "--method", "ttt")
    ledger = tmp_path / "scores"
    argv = ("--vary", "adaptation.chunk_size=16,32", "--vary", "adaptation.lr=0.001,0.002")
    pooled = ("--workers", "2", "--ledger", ledger, "--json")
    done = golf_ray("eval", FULL, INT6, *shared, *argv, *pooled)
    assert done.status == 0, done.err
    found = done.json["evaluations"]
    assert [one["weights"] for one in found] == ["full"] * 4 + ["int6"] * 4
    assert found[1]["settings"] == {"adaptation.chunk_size": "16", "adaptation.lr": "0.002"}
    assert len({one["val_bpb"] for one in found}) == 8
    assert done.json["pool"]["num_actors"] == 2 and done.json["pool"]["efficiency"] > 0
    assert len(list(ledger.iterdir())) == 8
    # Each has its own place there, also when it is evaluated alone, here or elsewhere.
    setting = ("--set", "adaptation.chunk_size=16", "--set", "adaptation.lr=0.002")
    alone = golf_ray("eval", FULL, *shared, *setting, "--ledger", ledger, "--json")
    assert "14 documents are in" in alone.err
    assert alone.json["val_bpb"] == found[1]["val_bpb"]
    table = golf_ray("eval", FULL, INT6, *shared).out.splitlines()
    assert table[0].split() == ["checkpoint", "weights", "bpb", "+-", "tokens", "seconds"]
    assert len(table) == 3 and "int6" in table[2] and max(map(len, table)) < 160


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("--vary", "adaptation.chunk_size"), "adaptation.chunk_size"),
        (("--vary", "adaptation.chunksize=1,2"), "adaptation.chunksize"),
        (("--vary", "adaptation.lr=1,1"), "each once"),
        (("--vary", "adaptation.lr=1", "--vary", "adaptation.lr=2"), "given twice"),
        (("--vary", "adaptation.lr=1,2", "--quantize"), "--quantize is for one checkpoint"),
    ],
)
def test_grids_that_cannot_be_are_one_line(argv: tuple[str, ...], expected: str) -> None:
    done = golf_ray(
        "eval", FULL, "--preset", "tiny", "--data-dir", FOLDER, "--method", "ttt", *argv
    )
    assert done.status in (1, 2) and expected in done.error and "\n" not in done.error.strip()


def test_a_model_is_no_setting_of_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "own.pt"
    save_state(path, dict(final_state()), TINY.with_overrides({"data.dir": str(FOLDER)}))
    done = golf_ray("eval", path, "--vary", "model.logit_softcap=30,20")
    assert done.status == 1
    assert "was trained under another model: model.logit_softcap = 30.0 there, 20.0" in done.error


def test_one_of_many_without_a_score_is_status_1_and_the_others_stand(
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = Evaluation(checkpoint=FULL, result=here(final_state(), CONFIG), device="cpu", workers=2)
    failed = FailedEvaluation(
        checkpoint=INT6, settings={}, weights="int6", error=EvaluationFailed("it is so", "mend it")
    )
    many = Evaluations(outcomes=(whole, failed), report=None)
    with pytest.raises(EvaluationFailed, match="1 of 2 evaluations have no score") as caught:
        print_many(many, as_json=False)
    assert caught.value.exit_status == 1
    out, err = capsys.readouterr()
    assert f"{whole.result.score.bpb:.6f}" in out and "none" in out.splitlines()[2]
    assert err == f"{INT6}: it is so; mend it\n"
    with pytest.raises(EvaluationFailed):
        print_many(many, as_json=True)
    found = json.loads(capsys.readouterr().out)["evaluations"]
    assert found[1]["error"] == "it is so; mend it" and "val_bpb" not in found[1]


def test_three_nodes_that_come_and_go_and_actors_that_die(tmp_path: Path) -> None:
    """A cluster of its own, because it is damaged."""
    config = CONFIG.with_overrides(
        {"data.dir": str(FOLDER), "adaptation.group_documents": 1, "adaptation.chunk_size": 4}
    )
    file = tmp_path / "config.json"
    file.write_text(config.to_json())
    program = [sys.executable, ray_nodes.__file__, str(FULL), str(file), str(tmp_path / "scores")]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [*program, "3", "kill=0", "once", "nodes"], env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["killed"] >= 1 and found["removed"] == found["added"] == 1
    assert found["actors_lost"] >= found["killed"] and found["documents"] == 14
    assert float.fromhex(found["nats"]) == here(final_state(), config).score.nats, "the same bits"
