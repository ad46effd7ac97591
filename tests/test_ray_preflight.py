"""The look at every node: what counts as wrong, and what real nodes say."""

from __future__ import annotations

import hashlib
import os
import random
import time
import timeit
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import FOLDER, TOKENIZER, TRAIN_SHARDS

from golf_ray.data.fingerprints import FileHead, data_files, data_fingerprint, file_heads
from golf_ray.errors import ClusterError, DataError
from golf_ray.nodes import NodeFailure, run_on_nodes
from golf_ray.preflight import (
    NodeReport,
    find_problems,
    inspect_here,
    inspect_nodes,
    listed_gpus,
    preflight,
    source_fingerprint,
    versions,
)
from golf_ray.presets import TINY
from golf_ray.resources import cluster_nodes

VERSIONS = {"python": "3.11.4", "ray": "2.60.0", "torch": "2.13.0+cpu", "golf_ray": "0123456789"}
FILES = (
    FileHead(name="t.model", num_bytes=10, sha256="aa" * 32),
    FileHead(name="fineweb_val_000000.bin", num_bytes=2_000_000, sha256="bb" * 32),
)
DRIVER = NodeReport(node="", versions=VERSIONS, files=FILES)
GOOD = replace(DRIVER, node="a (1)", free_bytes={"/tmp": 10**11})
CUDA = {**VERSIONS, "torch": "2.13.0+cu128"}
H100 = "NVIDIA H100 80GB HBM3"
WORKER = replace(
    GOOD, node="b (2)", versions=CUDA, gpus=(H100,) * 8, offered_gpus=8.0,
    flash="flash_attn_3 3.0.0",
)  # fmt: skip
HEAD = GOOD
CLUSTER = [HEAD, *(replace(WORKER, node=name) for name in ("b (2)", "c (3)", "d (4)"))]


def only(problems: list[ClusterError]) -> str:
    assert len(problems) == 1, problems
    return str(problems[0])


def with_node(changed: NodeReport) -> list[NodeReport]:
    """The cluster with one node in the place of its namesake."""
    return [changed if node.node == changed.node else node for node in CLUSTER]


def test_a_head_without_gpus_and_eight_of_each_are_no_problem() -> None:
    assert find_problems(DRIVER, CLUSTER, needs_flash=True) == []
    # The driver may have GPUs of its own kind and no say in that of the nodes.
    assert find_problems(replace(WORKER, node=""), CLUSTER) == []


@pytest.mark.parametrize("name", ["python", "ray", "golf_ray"])
def test_a_version_that_differs_names_the_node(name: str) -> None:
    other = replace(GOOD, node="b (2)", versions={**VERSIONS, name: "9.9"})
    line = only(find_problems(DRIVER, [GOOD, other]))
    assert f"node b (2) has {name} 9.9, here it is {VERSIONS[name]}" in line


def test_builds_must_agree_between_nodes_with_gpus_but_not_with_the_driver() -> None:
    odd = replace(CLUSTER[2], versions={**CUDA, "torch": "2.13.0+cu126"})
    line = only(find_problems(DRIVER, with_node(odd)))
    assert "node c (3) has torch 2.13.0+cu126, 2 others have 2.13.0+cu128" in line
    line = only(find_problems(DRIVER, [CLUSTER[1], odd]))
    assert "node c (3) has torch 2.13.0+cu126, node b (2) has 2.13.0+cu128" in line


def test_the_odd_one_out_is_named_also_where_it_comes_first() -> None:
    odd = replace(CLUSTER[1], flash="xformers 0.0.34")
    line = only(find_problems(DRIVER, with_node(odd)))
    assert "node b (2) has flash attention xformers 0.0.34, 2 others have flash_attn_3 3.0" in line


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"gpus": ("NVIDIA A100-SXM4-80GB",) * 8}, f"8 x NVIDIA A100-SXM4-80GB, 2 others have 8 x "
         f"{H100}"),
        ({"gpus": (H100,) * 4, "offered_gpus": 4.0}, f"GPUs 4 x {H100}, 2 others have 8 x {H100}"),
        ({"gpus": (H100,) * 7}, "offers 8 GPUs to Ray, and its driver lists 7"),
        ({"gpus": ()}, "offers 8 GPUs to Ray, and its driver lists 0"),
        ({"flash": "none"}, "has no flash attention"),
        ({"free_bytes": {"/tmp": 10**9}}, "has 1.00 GB free in /tmp, and 2 GB are needed"),
        ({"storage_error": "/x cannot be written"}, "cannot use the storage: /x"),
        ({"data_error": "/d/t.bin cannot be read"}, "does not have the data: /d/t.bin"),
        ({"error": "did not answer within 5 s"}, "did not answer within 5 s"),
        ({"files": (FILES[0], replace(FILES[1], num_bytes=7))},
         "another fineweb_val_000000.bin (7 bytes, beginning bbbb"),
    ],
)  # fmt: skip
def test_what_is_wrong_names_node_and_value(change: dict[str, object], expected: str) -> None:
    odd = replace(CLUSTER[2], **change)  # type: ignore[arg-type]
    line = only(find_problems(DRIVER, with_node(odd), needs_flash=True))
    assert line.startswith("node c (3) ") and expected in line and "\n" not in line
    # The same fault in another place is the same line about another node.
    moved = [replace(node, node=name) for node, name in zip(with_node(odd), "wxyz", strict=True)]
    again = only(find_problems(DRIVER, moved, needs_flash=True))
    assert again == line.replace("node c (3)", "node y")


def test_flash_attention_is_not_asked_of_a_node_without_gpus() -> None:
    assert HEAD.flash == "none"
    bare = [HEAD, *(replace(node, flash="none") for node in CLUSTER[1:])]
    assert find_problems(DRIVER, bare) == [], "the same on all, and nothing needs it"
    assert len(find_problems(DRIVER, bare, needs_flash=True)) == 3


@given(st.randoms(use_true_random=False), st.integers(1, 6), st.integers(0, 2))
def test_the_order_of_nodes_changes_no_verdict(
    chance: random.Random, workers: int, heads: int
) -> None:
    nodes = [replace(WORKER, node=f"w{i}") for i in range(workers)]
    nodes += [replace(HEAD, node=f"h{i}") for i in range(heads)]
    chance.shuffle(nodes)
    assert find_problems(DRIVER, nodes, needs_flash=True) == []
    if workers < 3:
        return
    bad = chance.choice([node for node in nodes if node.has_gpus])
    changed = [replace(n, gpus=("other",) * 8) if n is bad else n for n in nodes]
    assert only(find_problems(DRIVER, changed)).startswith(f"node {bad.node} has GPUs 8 x other")


# Fingerprints -----------------------------------------------------------------------------------


def test_a_file_is_known_by_name_size_and_beginning(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"x" * (1 << 20) + b"tail")
    [head] = file_heads([path])
    assert (head.name, head.num_bytes) == ("a.bin", (1 << 20) + 4)
    assert head.sha256 == hashlib.sha256(b"x" * (1 << 20)).hexdigest()
    with pytest.raises(DataError, match=r"gone\.bin cannot be read \(No such file"):
        file_heads([tmp_path / "gone.bin"])


def test_a_configuration_names_tokenizer_and_both_splits() -> None:
    config = TINY.with_overrides({"data.dir": str(FOLDER)})
    files = data_files(config)
    assert files[0] == TOKENIZER and files[1 : 1 + len(TRAIN_SHARDS)] == list(TRAIN_SHARDS)
    assert [path.name for path in files[1 + len(TRAIN_SHARDS) :]] == ["fineweb_val_000000.bin"]
    assert len(data_fingerprint(config)) == 16


def test_the_source_is_part_of_the_version() -> None:
    assert versions()["golf_ray"] == source_fingerprint()
    assert len(source_fingerprint()) == 16


def test_the_driver_is_asked_for_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that answers as NVIDIA's does, one that fails, and none."""
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert listed_gpus() is None
    program.write_text(f"#!/bin/sh\necho '{H100}'\necho '{H100}'\n")
    program.chmod(0o755)
    assert listed_gpus() == (H100, H100)
    program.write_text("#!/bin/sh\nexit 9\n")
    assert listed_gpus() == ()


def test_this_machine_reports_itself(tmp_path: Path) -> None:
    here = inspect_here("me", str(tmp_path), None, [str(TOKENIZER)])
    assert here.node == "me" and here.storage_error is None and here.data_error is None
    assert here.files == file_heads([TOKENIZER])
    assert here.free_bytes is not None and str(tmp_path) in here.free_bytes
    assert list(tmp_path.iterdir()) == []


# Real nodes -------------------------------------------------------------------------------------


@pytest.mark.ray_cluster
def test_real_nodes_agree_and_share_a_folder(cluster: str, tmp_path: Path) -> None:
    files = [TOKENIZER, *TRAIN_SHARDS]
    preflight(storage=tmp_path, files=files)
    assert list(tmp_path.iterdir()) == [], "no probe may stay"
    driver, reports = inspect_nodes(storage=tmp_path, files=files)
    assert len(reports) == 2 and all(r.error is None for r in reports)
    assert all(r.files == driver.files and len(r.files) == len(files) for r in reports)
    assert len({r.node for r in reports}) == 2
    assert [r.offered_gpus for r in reports] == [0, 8]


@pytest.mark.ray_cluster
def test_real_nodes_say_what_they_cannot_reach(cluster: str, tmp_path: Path) -> None:
    program = tmp_path / "only-here"
    program.write_bytes(b"x")
    driver, _ = inspect_nodes(files=[program])
    program.unlink()
    _, reports = inspect_nodes(files=[program])
    line = str(find_problems(driver, reports)[0])
    assert "does not have the data" in line and "only-here cannot be read (No such file" in line
    program.write_bytes(b"y")
    _, reports = inspect_nodes(files=[program])
    line = str(find_problems(driver, reports)[0])
    assert "has another only-here (1 bytes" in line
    if os.geteuid() == 0:
        # Root may write anywhere on a disk, but not in /proc.
        with pytest.raises(Exception, match="/proc/golf-ray"):
            preflight(storage="/proc/golf-ray")


@pytest.mark.ray_cluster
def test_a_node_that_gives_no_answer_is_named_in_bounded_time(cluster: str) -> None:
    nodes = cluster_nodes()
    answers: list[str] = []
    found = run_on_nodes(
        os.path.basename,
        nodes,
        lambda node: (f"/x/{node.node_id}",),
        on_answer=lambda node, answer: answers.append(answer),
    )
    assert found == [node.node_id for node in nodes] and sorted(answers) == sorted(found)
    # One ends its process, the other goes on for a minute.
    statements = {node.node_id: "import time; time.sleep(60)" for node in nodes}
    statements[nodes[0].node_id] = "import os; os._exit(1)"
    ends = run_on_nodes(
        timeit.timeit,
        nodes,
        lambda node: (statements[node.node_id], "pass", time.perf_counter, 1),
        timeout_s=5.0,
    )
    assert ends == [
        NodeFailure(reason="lost the process that was at work there"),
        NodeFailure(reason="did not answer within 5 s"),
    ]
