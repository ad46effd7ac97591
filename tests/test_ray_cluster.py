"""Clusters: a local one leaves nothing behind however its driver ends; one to join is found or not.

The local clusters here are their drivers' own; the one to join is the session's.
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_processes import ROOT, UP_WITHIN_S, launch, notes_of, require_gone

from golf_ray.cluster import connect
from golf_ray.errors import ClusterError
from golf_ray.presets import RECORD
from golf_ray.resources import cluster_nodes, require_resources, training_bundles

pytestmark = pytest.mark.ray_cluster

GONE_WITHIN_S = 15.0


def test_a_local_cluster_ends_with_its_block(tmp_path: Path) -> None:
    notes = tmp_path / "notes.json"
    driver = launch("connect", str(notes))
    out, err = driver.communicate(timeout=UP_WITHIN_S)
    assert driver.returncode == 0, err
    assert json.loads(out) == {"ended": True}, "nothing else may be printed"
    assert err == ""
    require_gone(json.loads(notes.read_text()), within_s=0.0)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, None), (signal.SIGKILL, -9)]
)
def test_a_local_cluster_ends_with_its_driver(
    tmp_path: Path, number: signal.Signals, status: int | None
) -> None:
    driver = launch("connect", str(tmp_path / "notes.json"), "--wait")
    noted = notes_of(driver, tmp_path / "notes.json")
    driver.send_signal(number)
    _, err = driver.communicate(timeout=60)
    assert driver.returncode == status or (status is None and "KeyboardInterrupt" in err)
    require_gone(noted, within_s=GONE_WITHIN_S if number == signal.SIGKILL else 0.5)


def test_a_running_cluster_is_joined_and_left(cluster: str) -> None:
    nodes = cluster_nodes()
    assert [n.resources.get("GPU", 0.0) for n in nodes] == [0.0, 8.0], "the head comes first"
    with connect(cluster) as again:
        assert not again.is_local
    assert cluster_nodes() == nodes, "leaving an inner block leaves the outer one connected"


def test_a_cluster_that_is_too_small_is_one_line(cluster: str) -> None:
    require_resources(training_bundles(RECORD), "STRICT_PACK", what="training")
    with pytest.raises(ClusterError, match=r"asks for 9 x \(1 GPU\), but the cluster has 2 nodes"):
        require_resources([{"GPU": 1.0}] * 9, what="training")


@pytest.fixture
def web_server() -> Iterator[int]:
    """A port at which something other than Ray answers."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def refused(address: str) -> str:
    """What a driver says that cannot join, as its own process: here Ray is connected."""
    program = (
        "import sys, time\n"
        "from golf_ray.cluster import connect\n"
        "from golf_ray.errors import ClusterError\n"
        "began = time.monotonic()\n"
        "try:\n"
        "    with connect(sys.argv[1]): pass\n"
        "except ClusterError as error:\n"
        "    assert time.monotonic() - began < 30\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, address],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1, "one line"
    return done.stdout


def test_a_cluster_that_cannot_be_reached_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    line = refused(f"127.0.0.1:{port}")
    assert f"no Ray cluster can be reached at 127.0.0.1:{port} (connection refused)" in line
    assert "check the address" in line


def test_what_is_no_ray_cluster_is_told_from_one(web_server: int) -> None:
    assert "is no Ray cluster" in refused(f"127.0.0.1:{web_server}")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("somewhere", "is not of the form host:port"),
        ("host:port", "is not of the form host:port"),
        ("ray://127.0.0.1:10001", "is a Ray client address"),
        ("no-such-host.invalid:6379", "no Ray cluster can be reached"),
    ],
)
def test_a_wrong_address_is_one_line(address: str, said: str) -> None:
    assert said in refused(address)
