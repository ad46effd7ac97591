"""Jobs on a real cluster with its dashboard: submitted, followed, shown, stopped."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_runner import golf_ray

from golf_ray.cli.submit import remote_command
from golf_ray.errors import ClusterError, GolfRayError
from golf_ray.jobs import (
    Jobs,
    JobState,
    dashboard_url,
    entrypoint,
    require_success,
    source_folder,
)
from golf_ray.preflight import source_fingerprint

WAIT_S = 90.0


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The dashboard of a cluster whose head knows `golf-ray`."""
    from ray._private.utils import get_ray_address_file
    from ray.cluster_utils import Cluster

    from golf_ray.cluster_guard import clean_up

    Path(get_ray_address_file(None)).parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="gr-jobs-", dir="/tmp"))
    path = os.environ["PATH"]
    # What a cluster's image has: its programs on the path.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{path}"
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    # Several clusters on one machine would share the agent's usual port.
    head = {"num_cpus": 2, "num_gpus": 0, "temp_dir": str(folder)}
    dashboard = {"include_dashboard": True, "dashboard_agent_listen_port": port}
    cluster = Cluster(initialize_head=True, head_node_args={**head, **dashboard})
    # Where several clusters are on one machine, a job finds its own by this.
    Path(get_ray_address_file(str(folder))).write_text(cluster.address)
    try:
        yield f"http://{cluster.webui_url}"
    finally:
        os.environ["PATH"] = path
        cluster.shutdown()
        _keep_connection()
        clean_up(folder, grace_s=3.0)


def _keep_connection() -> None:
    """A second cluster's end takes the key-value store away from who is connected to the first."""
    import ray
    from ray._private.worker import global_worker
    from ray.experimental.internal_kv import _initialize_internal_kv

    if ray.is_initialized():
        _initialize_internal_kv(global_worker.gcs_client)


@pytest.fixture(scope="module")
def jobs(url: str) -> Jobs:
    return Jobs(url)


def wait_until_running(jobs: Jobs, job: str) -> JobState:
    deadline_s = time.monotonic() + WAIT_S
    while (state := jobs.state(job)).status == "PENDING":
        assert time.monotonic() < deadline_s, state
        time.sleep(0.2)
    return state


@pytest.mark.ray_cluster
def test_a_command_runs_there_and_is_followed(url: str, jobs: Jobs) -> None:
    argv = ["submit", "--address", url, "--name", "look", "--follow"]
    done = golf_ray(*argv, "--", "doctor", "--json")
    assert "works" in done.out and '"cluster"' in done.out, done
    assert "1 node, 2 CPUs" in done.out, done.out
    state = jobs.state("look")
    assert done.status == (0 if state.status == "SUCCEEDED" else 1)
    assert state.command == "golf-ray doctor --json --address auto"
    assert state.has_ended and state.began_unix_s and state.ended_unix_s
    # The same afterwards, by its id.
    again = golf_ray("submit", "--address", url, "--logs", "look")
    assert again.status == 0 and again.out == done.out
    shown = golf_ray("submit", "--address", url, "--status", "look", "--json")
    assert shown.json == state.to_dict()
    listed = golf_ray("submit", "--address", url, "--list")
    assert "look" in listed.out and listed.out.startswith("job ")
    twice = golf_ray("submit", "--address", url, "--name", "look", "--", "doctor")
    assert twice.status == 1 and "choose another --name" in twice.error


@pytest.mark.ray_cluster
def test_shipped_source_runs_on_every_node_in_the_place_of_the_installed(
    url: str, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source that differs in one line: the driver's is sent, and the nodes have the same."""

    @contextlib.contextmanager
    def changed(ship: bool) -> Iterator[str | None]:
        with source_folder(ship) as folder:
            assert folder is not None
            with open(Path(folder) / "golf_ray" / "stats.py", "a") as file:
                file.write("# Another state of the source.\n")
            yield folder

    monkeypatch.setattr("golf_ray.jobs.source_folder", changed)
    job = jobs.submit(["doctor", "--json", "--address", "auto"], ship=True)
    text: list[str] = []
    state = jobs.follow(job, text.append)
    out = "".join(text)
    found = json.loads(out[out.index("{") :])["findings"]
    where = {finding["name"]: finding["detail"] for finding in found}
    assert "_ray_pkg_" in where["golf_ray"] and "2 CPUs" in where["node"]
    assert source_fingerprint() not in where["node"]
    assert len([finding for finding in found if finding["name"] == "node"]) == 1, "no complaint"
    assert state.command.startswith("python -P -m golf_ray doctor"), state


@pytest.mark.ray_cluster
def test_a_job_that_goes_on_is_stopped(url: str, jobs: Jobs) -> None:
    # No command of golf-ray's only waits, so this one is sent by Ray's own client.
    jobs._client.submit_job(entrypoint="echo began; sleep 600", submission_id="long")
    assert wait_until_running(jobs, "long").status == "RUNNING"
    done = golf_ray("submit", "--address", url, "--stop", "long", "--json")
    assert done.status == 0 and done.json["status"] == "STOPPED"
    followed = golf_ray("submit", "--address", url, "--logs", "long", "--follow")
    assert followed.status == 1 and "\nbegan\n" in followed.out
    assert "job long stopped" in followed.error
    assert golf_ray("submit", "--address", url, "--stop", "long").status == 0, "it stays so"


@pytest.mark.ray_cluster
@pytest.mark.parametrize("verb", ["--logs", "--status", "--stop"])
def test_a_job_that_is_not_there(url: str, verb: str) -> None:
    done = golf_ray("submit", "--address", url, verb, "nothing")
    assert done.status == 1 and f"there is no job nothing at {url}" in done.error


# Without a cluster ------------------------------------------------------------------------------


def test_where_nothing_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = golf_ray("submit", "--address", address, "--list")
    assert done.status == 1
    assert f"no cluster's dashboard can be reached at http://{address} (" in done.error


@pytest.mark.parametrize("answer", [b"hello\r\n", b"HTTP/1.0 200 OK\r\n\r\n<html>", b""])
def test_what_answers_is_no_dashboard(answer: bytes) -> None:
    """A port of another protocol, a web page, a port that closes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(ClusterError) as caught:
            Jobs(f"127.0.0.1:{server.getsockname()[1]}")
        thread.join()
    line = str(caught.value)
    assert "is no Ray dashboard" in line and "8265" in line and "\n" not in line


def test_a_dashboard_that_asks_for_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    class Asks(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Asks) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
        with pytest.raises(ClusterError, match="asks for its token; set RAY_AUTH_MODE=token"):
            Jobs(f"127.0.0.1:{server.server_address[1]}")
        server.shutdown()


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (None, "http://127.0.0.1:8265"),
        ("auto", "http://127.0.0.1:8265"),
        ("head:8265", "http://head:8265"),
        ("https://ray.example.com/", "https://ray.example.com"),
    ],
)
def test_addresses(monkeypatch: pytest.MonkeyPatch, address: str | None, expected: str) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert dashboard_url(address) == expected
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://other:1")
    assert dashboard_url(None) == "http://other:1"
    assert dashboard_url("head:8265") == "http://head:8265"


@pytest.mark.parametrize("address", ["head", "head:x", "ray://head:10001", "http://", ":8265"])
def test_addresses_of_no_dashboard(address: str) -> None:
    done = golf_ray("submit", "--address", address, "--list")
    assert done.status == 1 and f"--address {address} is no dashboard's" in done.error


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["doctor"], ["doctor", "--address", "auto"]),
        (["train", "--preset", "tiny", "--address", "h:1"], None),
        (["train", "--preset", "tiny", "--in-process"], None),
        (["config", "show"], None),
        (["data", "verify"], None),
        (["data", "fetch", "--repo", "a/b"],
         ["data", "fetch", "--repo", "a/b", "--address", "auto"]),
        (["sweep", "--trials", "2", "--", "laptop"],
         ["sweep", "--trials", "2", "--address", "auto", "--", "laptop"]),
    ],
)  # fmt: skip
def test_a_command_gets_the_address_where_it_takes_one(
    argv: list[str], expected: list[str] | None
) -> None:
    assert remote_command(argv) == (expected or argv)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--", "swep"], "No such command 'swep'"),
        (["--", "train", "--nope"], "No such option: --nope"),
        (["--", "train", "--workers", "no"], "workers"),
        (["--", "submit", "--list"], "a job cannot submit a job"),
        ([], "nothing is to be submitted"),
        (["--list", "--stop", "x"], "are two things"),
        (["--list", "--", "doctor"], "are two things"),
    ],
)
def test_mistakes_show_before_anything_is_sent(argv: list[str], expected: str) -> None:
    done = golf_ray("submit", "--address", "http://127.0.0.1:9", *argv)
    assert done.status == 2 and expected in done.error


def test_a_command_is_one_shell_line() -> None:
    argv = ["train", "--set", "a.b=c d;e"]
    assert entrypoint(argv) == "golf-ray train --set 'a.b=c d;e'"
    assert entrypoint(argv[:1], folder="/a b", ship=True) == (
        "cd '/a b' && exec python -P -m golf_ray train"
    )


def test_a_command_that_the_head_does_not_know_says_how() -> None:
    state = JobState(
        job="a", status="FAILED", command="golf-ray", message="", exit_status=127,
        began_unix_s=None, ended_unix_s=None,
    )  # fmt: skip
    with pytest.raises(GolfRayError, match="install golf-ray there, or submit with --ship"):
        require_success(state)
