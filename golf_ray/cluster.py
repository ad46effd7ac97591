"""Ray clusters: one of this machine's own that ends with the command, or a running one to join.

`connect` is the only place that starts, joins or leaves Ray. Whether a cluster is large enough is
said by `golf_ray.resources`, what its nodes have installed and can reach by `golf_ray.preflight`.

Invariant: a local cluster lives in a folder and in processes of its own; however the driver ends,
none of them stays. A running cluster is only ever left, never stopped.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

from golf_ray import cluster_guard
from golf_ray.errors import ClusterError

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # A report of a training waits for the controller's next look, every 2 s by default.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # Ray gives up on its own start after 30 s, which a loaded machine may need.
    "RAY_raylet_start_wait_time_s": "120",
}
"""Set, where the user has not, while a cluster is connected: Ray reads them when it starts."""

PROBE_TIMEOUT_S = 10.0
LONGEST_SOCKET_FOLDER = 40
"""A local cluster's sockets lie below its folder, and a socket's path has 107 bytes at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """What `connect` connected to."""

    address: str
    is_local: bool
    """Whether it began and ends with this block."""


# Connecting -------------------------------------------------------------------------------------


@contextlib.contextmanager
def connect(
    address: str | None = None,
    *,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    dashboard: bool = False,
) -> Iterator[Cluster]:
    """Be connected to a Ray cluster inside the block.

    A process that is connected already (a trial inside a sweep) stays so, and nothing ends.

    Args:
        address: `host:port` of a running cluster, or `auto` to find one on this machine; None
            starts a local one that ends with the block.
        num_cpus: CPUs that a local cluster gives out; None for those of the machine. May be more.
        num_gpus: GPUs that a local cluster gives out; None for those of the machine.
        dashboard: start a local cluster with its dashboard: 4 s and 0.9 GB, needed where
            trainings inside of trials may be stopped early.

    Raises:
        ClusterError: the cluster cannot be reached or started.
    """
    import ray

    if ray.is_initialized():
        yield Cluster(address=ray.get_runtime_context().gcs_address, is_local=False)
        return
    with _environment(ENVIRONMENT), _signals_kept():
        if address is None:
            with _local(num_cpus, num_gpus, dashboard) as cluster:
                yield cluster
        else:
            with _joined(address) as cluster:
                yield cluster


@contextlib.contextmanager
def _local(num_cpus: int | None, num_gpus: int | None, dashboard: bool) -> Iterator[Cluster]:
    import ray

    with _environment({"RAY_AUTH_MODE": "disabled"}), _guarded_folder() as folder:
        try:
            _init(
                address="local",
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                include_dashboard=dashboard,
                _temp_dir=str(folder),
                # Reached from this machine only, whatever becomes of its network.
                _node_ip_address="127.0.0.1",
            )
        except Exception as error:
            raise ClusterError(
                f"a local Ray cluster could not be started ({_reason(error)})",
                "free memory, processes or disk, or join a cluster with --address",
            ) from error
        yield Cluster(address=ray.get_runtime_context().gcs_address, is_local=True)


@contextlib.contextmanager
def _joined(address: str) -> Iterator[Cluster]:
    import ray

    _require_reachable(address)
    try:
        _init(address=address)
    except Exception as error:
        raise ClusterError(
            f"the Ray cluster at {address} cannot be joined ({_reason(error)})", _remedy(error)
        ) from error
    try:
        yield Cluster(address=ray.get_runtime_context().gcs_address, is_local=False)
    finally:
        with _uninterrupted():
            ray.shutdown()


def _init(**arguments: Any) -> None:
    import ray
    from ray._private import worker
    from ray.job_config import JobConfig

    # `log_to_driver` leaves the raylet's notices, which would go to standard output.
    worker._worker_logs_enabled = False

    # Workers of a source checkout find the package where the driver found it.
    root = str(Path(__file__).resolve().parent.parent)
    ray.init(
        log_to_driver=False,
        logging_level=logging.CRITICAL,
        job_config=JobConfig(_py_driver_sys_path=[root]),
        **arguments,
    )
    if threading.current_thread() is threading.main_thread():
        # Ray's own handler prints a C++ stack, and its exit status says nothing.
        signal.signal(signal.SIGTERM, _end_on_signal)


def _end_on_signal(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _guarded_folder() -> Iterator[Path]:
    """A folder for one local cluster, with a guard who outlives a driver that is killed."""
    import ray

    folder = Path(tempfile.mkdtemp(prefix="golf-ray-", dir=_short_folder()))
    # In a session of its own, so that a terminal's Ctrl-C does not reach it.
    guard: subprocess.Popen[bytes] = subprocess.Popen(
        [sys.executable, cluster_guard.__file__, str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True, cwd="/",
    )  # fmt: skip
    try:
        yield folder
    finally:
        with _uninterrupted():
            ray.shutdown()
            cluster_guard.clean_up(folder, grace_s=3.0)
            _close(guard.stdin)
            guard.wait()


def _short_folder() -> str:
    """Where temporary files go, unless its name is too long for sockets."""
    folder = tempfile.gettempdir()
    return folder if len(folder) <= LONGEST_SOCKET_FOLDER else "/tmp"


def _close(pipe: IO[bytes] | None) -> None:
    assert pipe is not None
    with contextlib.suppress(BrokenPipeError):
        pipe.close()


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables inside the block, where the user has not set them."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Put the handlers back that Ray replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Signals that end a program wait until the block, which is bounded, is over."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {
        wait: signal.signal(wait, lambda number, frame: came.append(number))
        for wait in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for waited, handler in before.items():
            signal.signal(waited, handler)
        for number in came[:1]:
            signal.raise_signal(number)


# Reaching a running cluster ---------------------------------------------------------------------


def _require_reachable(address: str) -> None:
    """See that a Ray cluster answers: Ray itself tries for two minutes and then ends the process.

    Raises:
        ClusterError: the address is none, nothing answers, or what answers is no Ray cluster.
    """
    if "://" in address:
        raise ClusterError(
            f"--address {address} is a Ray client address",
            "give the head node's own address, host:port (6379 by default), from a machine inside",
        )
    host, port = _find(address) if address == "auto" else _parse(address)
    try:
        socket.create_connection((host, port), timeout=PROBE_TIMEOUT_S).close()
    except OSError as error:
        reason = error.strerror or str(error) or "no answer"
        raise ClusterError(
            f"no Ray cluster can be reached at {address} ({reason.lower()})",
            "check the address, that the head node runs ('ray status' there) and the firewall",
        ) from None
    if os.environ.get("RAY_USE_TLS", "0") == "0":
        _require_ray(address, host, port)


def _parse(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdigit() and 0 < int(port) < 65536):
        raise ClusterError(
            f"--address {address} is not of the form host:port",
            "the head node prints it when Ray starts; the port is 6379 by default",
        )
    return host.strip("[]"), int(port)


def _find(address: str) -> tuple[str, int]:
    from ray._private.services import canonicalize_bootstrap_address_or_die

    try:
        return _parse(canonicalize_bootstrap_address_or_die(address))
    except (ConnectionError, ValueError, OSError):
        raise ClusterError(
            "no running Ray cluster was found on this machine",
            "give its address as host:port, or leave --address out for a local cluster",
        ) from None


def _require_ray(address: str, host: str, port: int) -> None:
    """Ask for the cluster's id: a token that is missing here is found or missed by Ray later."""
    import grpc

    name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    with grpc.insecure_channel(name, options=(("grpc.enable_http_proxy", 0),)) as channel:
        call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        try:
            call(b"", timeout=PROBE_TIMEOUT_S)
        except grpc.RpcError as error:
            answered = (
                grpc.StatusCode.UNAUTHENTICATED,
                grpc.StatusCode.PERMISSION_DENIED,
                grpc.StatusCode.INVALID_ARGUMENT,
            )
            if error.code() not in answered:
                raise ClusterError(
                    f"what answers at {address} is no Ray cluster",
                    "give the address of the head node's main port, 6379 by default",
                ) from None


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines)
    return (text[:240] + "...") if len(text) > 240 else text or type(error).__name__


def _remedy(error: BaseException) -> str:
    text = f"{type(error).__name__} {error}".lower()
    if "version mismatch" in text:
        return "install the cluster's versions of Ray and Python here, or these there"
    if "authentication" in text or "token" in text:
        return "set RAY_AUTH_MODE=token and give the cluster's token in RAY_AUTH_TOKEN"
    return "check that the cluster is healthy with 'ray status'"
