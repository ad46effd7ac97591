"""The verbs on Ray: the same numbers as in this process, one line where a cluster will not do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runner import TINY, UPSTREAM, golf_ray, golf_ray_process

pytestmark = pytest.mark.ray_cluster

FULL = TINY / "final_model.pt"
CPU = ("--set", "cluster.gpus_per_worker=0")


@pytest.mark.parametrize("workers", [1, 3])
def test_ttt_on_actors_is_ttt_in_this_process(cluster: str, tmp_path: Path, workers: int) -> None:
    argv = ["eval", FULL, *UPSTREAM, *CPU, "--method", "ttt", "--json", "--per-document"]
    alone = golf_ray(*argv, tmp_path / "alone").json
    shared = golf_ray(*argv, tmp_path / "shared", "--workers", workers)
    assert shared.status == 0 and not shared.err
    assert shared.json["workers"] == workers and alone["workers"] is None
    for name in ("val_loss_nats", "val_bpb", "tokens_scored", "bytes_scored", "documents_scored"):
        assert shared.json[name] == alone[name], name
    assert (tmp_path / "shared").read_text() == (tmp_path / "alone").read_text()


@pytest.mark.parametrize("method", ["packed", "sliding"])
def test_other_methods_on_actors(cluster: str, method: str) -> None:
    argv = ["eval", TINY / "final_model.int6.ptz", *UPSTREAM, *CPU, "--method", method, "--json"]
    alone, shared = golf_ray(*argv).json, golf_ray(*argv, "--workers", 2).json
    for name in ("val_loss_nats", "tokens_scored", "bytes_scored", "weights", "model_bytes"):
        assert shared[name] == alone[name], name


def test_stored_adapters_reach_the_actors(cluster: str) -> None:
    argv = ["--method", "ttt", "--adapter-init", TINY / "ttt.npz", "--workers", 2, "--json"]
    assert golf_ray("eval", FULL, *UPSTREAM, *CPU, *argv).json["val_loss_nats"] == pytest.approx(
        7.20563937, abs=1e-6
    )


def test_train_on_workers_then_score(cluster: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    argv = ["--preset", "tiny", "--data-dir", TINY, "--workers", 2, "--run-dir", run]
    argv += ["--set", "train.iterations=3", "--set", "train.clip_scope=micro_batch"]
    argv += ["--set", "train.batch_tokens=512", "--set", "train.micro_batches=2"]
    argv += ["--set", "train.log_every_steps=1", "--json"]
    done = golf_ray("train", *argv)
    assert done.status == 0 and not done.err, done.err
    report = done.json
    assert report["num_workers"] == 2 and report["device"] == "cpu" and report["restarts"] == []
    assert report["steps"] == 3 and report["final_model"] == str(run / "final_model.pt")
    records = [json.loads(line) for line in (run / "intervals.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]
    # The same run without Ray: one rank takes both micro-batches' places.
    alone = tmp_path / "alone"
    argv[argv.index(run)] = alone
    del argv[argv.index("--workers") : argv.index("--workers") + 2]
    here = golf_ray("train", *argv, "--in-process").json
    assert here["train_loss_nats"] == pytest.approx(report["train_loss_nats"], rel=1e-4)
    assert golf_ray("eval", run, "--json").json["val_bpb"] == pytest.approx(
        golf_ray("eval", alone, "--json").json["val_bpb"], rel=1e-3
    )
    # It has ended, so that going on with it is telling how.
    again = golf_ray("train", "--resume", "--run-dir", run, "--json")
    assert again.status == 0 and again.json == report


def test_doctor_looks_at_every_node(cluster: str) -> None:
    done = golf_ray("doctor", "--data-dir", TINY, "--address", cluster, "--json")
    assert done.status == 0, done.out
    found = [f for f in done.json["findings"] if f["name"] in ("cluster", "node")]
    assert "2 nodes, 16 CPUs, 8 GPUs" in found[0]["detail"]
    assert len(found) == 3 and all("torch 2." in node["detail"] for node in found[1:])


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["train", "--preset", "tiny", "--set", "cluster.cpus_per_worker=99"],
         "training asks for 1 x (99 CPUs)"),
        (["train", "--preset", "tiny", "--set", "cluster.gpus_per_worker=9"], "9 GPUs"),
        (["eval", FULL, *UPSTREAM, "--workers", "40", *CPU], "evaluation asks for 40 x (1 CPU)"),
    ],
)  # fmt: skip
def test_a_cluster_that_is_too_small(
    cluster: str, tmp_path: Path, argv: list[object], expected: str
) -> None:
    more = ["--data-dir", TINY, "--run-dir", tmp_path / "run"] if argv[0] == "train" else []
    done = golf_ray(*argv, *more, "--address", cluster)
    assert done.status == 1 and expected in done.error and "the cluster has 2 nodes" in done.error
    assert not (tmp_path / "run").exists()


def test_a_cluster_that_cannot_be_reached(tmp_path: Path) -> None:
    address = "127.0.0.1:9"
    argv = ["train", "--preset", "tiny", "--data-dir", TINY, "--run-dir", tmp_path / "run"]
    done = golf_ray_process(*argv, "--address", address)
    assert done.status == 1 and address in done.error and not (tmp_path / "run").exists()


def test_without_an_address_a_cluster_starts_and_ends(tmp_path: Path) -> None:
    argv = ["eval", FULL, *UPSTREAM, "--method", "packed", "--workers", 3, "--json"]
    done = golf_ray_process(*argv)
    assert done.status == 0 and not done.err
    assert done.json["workers"] == 3 and done.json["tokens_scored"] == 832
