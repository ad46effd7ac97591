"""Fetching onto every node: one folder is filled once, and who fails is named."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import test_data_fetch
from cli_runner import golf_ray
from test_data_fetch import COMMIT, FOLDER, REPO, Hub, get, tree

from golf_ray.data.fetch import FetchReport
from golf_ray.data.locking import LOCK_NAME, folder_lock
from golf_ray.data.manifest import read_manifest
from golf_ray.data_nodes import NodeFetch, require_all, same_commit
from golf_ray.errors import DataError, StorageError
from golf_ray.resources import cluster_nodes

hub = test_data_fetch.hub
"""A server that speaks the hub's protocol."""


# The lock ---------------------------------------------------------------------------------------


def test_one_at_a_time_and_nothing_stays(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    # Threads change places in the middle of everything.
    request.addfinalizer(functools.partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-5)
    folder = tmp_path / "a" / "b"
    inside: list[int] = []
    most: list[int] = []

    def enter(number: int) -> None:
        for _ in range(200):
            with folder_lock(folder):
                inside.append(number)
                most.append(len(inside))
                inside.remove(number)

    threads = [threading.Thread(target=enter, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 600
    assert tree(tmp_path) == []


def test_folders_made_for_nothing_go(tmp_path: Path) -> None:
    with folder_lock(tmp_path / "a" / "b"):
        assert tree(tmp_path) == [f"a/b/{LOCK_NAME}"]
    assert list(tmp_path.iterdir()) == []
    with folder_lock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "kept").write_bytes(b"")
    assert tree(tmp_path) == ["a/kept"]


def test_who_waits_says_so_and_a_killed_holder_lets_go(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib, time\n"
        "from golf_ray.data.locking import folder_lock\n"
        "with folder_lock(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(600)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    waited: list[None] = []

    def waiting() -> None:
        waited.append(None)
        if len(waited) == 2:
            holder.send_signal(signal.SIGKILL)

    with folder_lock(tmp_path, waiting):
        assert holder.wait() == -signal.SIGKILL and len(waited) >= 2
        assert (tmp_path / LOCK_NAME).exists()
    assert list(tmp_path.iterdir()) == []
    holder.stdout.close()


def test_a_folder_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(StorageError, match="a part of its path is a file"),
        folder_lock(tmp_path / "file" / "below"),
    ):
        raise AssertionError("not locked")


def test_fetches_at_the_same_time_lose_nothing_of_each_other(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    threads = [threading.Thread(target=get, args=(hub, out, n)) for n in (1, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(hub.gets()) == sorted(Path(name).name for name in tree(out) if "json" not in name)
    manifest = read_manifest(out / FOLDER)
    assert manifest is not None and len(manifest["splits"]["train"]["shards"]) == 3


# Outcomes ---------------------------------------------------------------------------------------


def fetched(node: str, revision: str = "a" * 40) -> NodeFetch:
    report = FetchReport(
        dataset_dir=Path("d"), tokenizer=Path("t"), revision=revision, fetched_files=1,
        fetched_bytes=2, present_files=3, num_train_shards=4, num_val_shards=5,
    )  # fmt: skip
    return NodeFetch(node=node, report=report)


def test_nodes_with_another_commit_have_failed() -> None:
    found = [fetched("a"), fetched("b", "b" * 40), fetched("c")]
    judged = same_commit(found)
    assert [f.report is None for f in judged] == [False, True, False]
    with pytest.raises(DataError) as caught:
        require_all(judged)
    line = str(caught.value)
    assert "1 of 3 nodes" in line and "node b fetched commit bbbbbbbbbbbb" in line
    assert same_commit(found[:1]) == found[:1]
    require_all([fetched("a"), fetched("b")])


# Real nodes -------------------------------------------------------------------------------------


def fetch_on(cluster: str, hub: Hub, out: Path, *more: str) -> Any:
    argv = ["--repo", REPO, "--variant", "sp512", "--train-shards", "2", "--data-dir", out]
    return golf_ray("data", "fetch", *argv, "--endpoint", hub.url, "--address", cluster, *more)


@pytest.mark.ray_cluster
def test_nodes_that_share_a_folder_fetch_once(cluster: str, hub: Hub, tmp_path: Path) -> None:
    done = fetch_on(cluster, hub, tmp_path / "out", "--json")
    assert done.status == 0 and not done.err
    nodes = done.json["nodes"]
    assert done.json["ok"] and [n["node"] for n in nodes] == [n.name for n in cluster_nodes()]
    assert sorted(n["fetched_files"] for n in nodes) == [0, 4]
    assert sorted(n["present_files"] for n in nodes) == [0, 4]
    assert {n["revision"] for n in nodes} == {COMMIT}
    assert len(hub.gets()) == len(set(hub.gets())) == 4
    for name in tree(tmp_path / "out"):
        if not name.endswith(".json"):
            assert (tmp_path / "out" / name).read_bytes() == hub.files[name]
    again = fetch_on(cluster, hub, tmp_path / "out")
    assert again.status == 0 and "2 of 2 have the data" in again.out and len(hub.gets()) == 4
    assert again.err.count("4 were there") == 2


class Damaged(dict[str, bytes]):
    """Content that is wrong for the first who gets it."""

    def __init__(self, path: str, body: bytes) -> None:
        super().__init__({path: body})
        self.asked = 0

    def get(self, path: Any, default: Any = None) -> Any:
        # A head, then the content.
        if path in self:
            self.asked += 1
            if self.asked == 2:
                return self.pop(path)
        return default


@pytest.mark.ray_cluster
def test_a_node_that_fails_is_named_and_the_other_goes_on(
    cluster: str, hub: Hub, tmp_path: Path
) -> None:
    shard = f"{FOLDER}/fineweb_val_000000.bin"
    hub.bodies = Damaged(shard, bytes(len(hub.files[shard])))
    done = fetch_on(cluster, hub, tmp_path / "out", "--json")
    bad, good = sorted(done.json["nodes"], key=lambda node: node["ok"])
    assert not bad["ok"] and good["ok"] and not done.json["ok"]
    assert "another content than the hub states" in bad["problem"]
    assert f"1 of 2 nodes have not got the data: node {bad['node']} says: " in done.error
    assert (tmp_path / "out" / shard).read_bytes() == hub.files[shard]
