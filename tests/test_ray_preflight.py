"""The look at every node: what counts as wrong, and what real nodes say."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from reference import TOKENIZER, TRAIN_SHARDS

from golf_ray.errors import ClusterError
from golf_ray.preflight import (
    NodeReport,
    find_problems,
    inspect_nodes,
    preflight,
    source_fingerprint,
    versions,
)

VERSIONS = {"python": "3.11.4", "ray": "2.60.0", "torch": "2.13.0+cpu", "golf_ray": "0123456789"}
DRIVER = NodeReport(node="", versions=VERSIONS, data_fingerprint="aa")
GOOD = replace(DRIVER, node="a (1)")


def only(problems: list[ClusterError]) -> str:
    assert len(problems) == 1, problems
    return str(problems[0])


def test_nodes_that_agree_are_no_problem() -> None:
    assert find_problems(DRIVER, [GOOD, replace(GOOD, node="b (2)")]) == []


@pytest.mark.parametrize("name", ["python", "ray", "golf_ray"])
def test_a_version_that_differs_names_the_node(name: str) -> None:
    other = replace(GOOD, node="b (2)", versions={**VERSIONS, name: "9.9"})
    line = only(find_problems(DRIVER, [GOOD, other]))
    assert f"node b (2) has {name} 9.9, here it is {VERSIONS[name]}" in line


def test_builds_must_agree_between_nodes_but_not_with_the_driver() -> None:
    cuda = {**VERSIONS, "torch": "2.13.0+cu128"}
    nodes = [replace(GOOD, versions=cuda), replace(GOOD, node="b (2)", versions=cuda)]
    assert find_problems(DRIVER, nodes) == []
    line = only(find_problems(DRIVER, [nodes[0], replace(GOOD, node="b (2)")]))
    assert "node b (2) has torch 2.13.0+cpu, on node a (1) it is 2.13.0+cu128" in line


def test_storage_data_and_silence_name_the_node() -> None:
    storage = replace(GOOD, storage_error="/x cannot be written (Permission denied)")
    assert "node a (1) cannot use the storage: /x" in only(find_problems(DRIVER, [storage]))
    missing = replace(GOOD, data_fingerprint=None, data_error="/d/train.bin: No such file")
    assert "node a (1) does not have the data: /d/train" in only(find_problems(DRIVER, [missing]))
    other = replace(GOOD, data_fingerprint="bb")
    assert "has other data under the same names" in only(find_problems(DRIVER, [other]))
    silent = NodeReport(node="c (3)", versions={}, error="did not answer within 5 s")
    assert "node c (3) did not answer within 5 s" in only(find_problems(DRIVER, [GOOD, silent]))


def test_the_source_is_part_of_the_version() -> None:
    assert versions()["golf_ray"] == source_fingerprint()
    assert len(source_fingerprint()) == 16


@pytest.mark.ray_cluster
def test_real_nodes_agree_and_share_a_folder(cluster: str, tmp_path: Path) -> None:
    files = [TOKENIZER, *TRAIN_SHARDS]
    preflight(storage=tmp_path, files=files)
    assert list(tmp_path.iterdir()) == [], "no probe may stay"
    driver, reports = inspect_nodes(storage=tmp_path, files=files)
    assert len(reports) == 2 and all(r.error is None for r in reports)
    assert {r.data_fingerprint for r in reports} == {driver.data_fingerprint}
    assert len({r.node for r in reports}) == 2


@pytest.mark.ray_cluster
def test_real_nodes_say_what_they_cannot_reach(cluster: str, tmp_path: Path) -> None:
    # A file that is there for the driver alone: it is gone before the nodes look.
    program = tmp_path / "only-here"
    program.write_bytes(b"x")
    driver, _ = inspect_nodes(files=[program])
    program.unlink()
    _, reports = inspect_nodes(files=[program])
    line = str(find_problems(driver, reports)[0])
    assert "does not have the data" in line and "only-here: No such file" in line
    if os.geteuid() == 0:
        # Root may write anywhere on a disk, but not in /proc.
        with pytest.raises(Exception, match="/proc/golf-ray"):
            preflight(storage="/proc/golf-ray")
