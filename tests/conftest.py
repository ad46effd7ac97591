"""One Ray cluster for all tests that need one: two simulated nodes, one of them with 8 GPUs.

What Ray and Triton read from the environment is set here, before anything imports it.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from golf_ray.cluster import ENVIRONMENT
from golf_ray.cluster_guard import clean_up

for name, value in {**ENVIRONMENT, "RAY_AUTH_MODE": "disabled"}.items():
    os.environ.setdefault(name, value)

# How long an example takes says more of what else runs than of the code.
hypothesis.settings.register_profile("golf_ray", deadline=None)
hypothesis.settings.load_profile("golf_ray")

# Small models on threads that wait for one another spend ten times the time on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if shutil.which("nvidia-smi") is None:
    # Kernels run in Triton's interpreter where there is no GPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that runs the tests in the background has them, and what they start, ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)

HEAD_CPUS, GPU_NODE_CPUS, GPU_NODE_GPUS = 8, 8, 8
FREE_WITHIN_S = 5.0


@pytest.fixture(scope="session")
def cluster_address() -> Iterator[str]:
    """Address of a running cluster: a head of 8 CPUs, and a node of 8 CPUs and 8 GPUs.

    The resources are made up; all of it runs on this machine, and ends with the session.
    """
    from ray._private.utils import get_ray_address_file
    from ray.cluster_utils import Cluster

    # Cluster notes its address in Ray's own folder, which nothing on a new machine has made yet.
    Path(get_ray_address_file(None)).parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="gr-tests-", dir="/tmp"))
    head = {"num_cpus": HEAD_CPUS, "num_gpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**head, "temp_dir": str(folder)})
    try:
        cluster.add_node(num_cpus=GPU_NODE_CPUS, num_gpus=GPU_NODE_GPUS)
        cluster.wait_for_nodes(timeout=60)
        yield cluster.address
    finally:
        cluster.shutdown()
        clean_up(folder, grace_s=3.0)


@pytest.fixture(scope="session")
def _connected(cluster_address: str) -> Iterator[str]:
    from golf_ray.cluster import connect

    with connect(cluster_address):
        yield cluster_address


@pytest.fixture
def cluster(_connected: str) -> Iterator[str]:
    """Connected to the session's cluster; afterwards all of its resources must be free again."""
    yield _connected
    left = unfree_resources()
    assert not left, f"still in use {FREE_WITHIN_S} s after the test: {left}"


def unfree_resources(patience_s: float = FREE_WITHIN_S) -> dict[str, float]:
    """CPUs and GPUs of the connected cluster that stay in use: amounts by name."""
    import ray

    deadline = time.monotonic() + patience_s
    while True:
        total, free = ray.cluster_resources(), ray.available_resources()
        left = {
            name: total[name] - free.get(name, 0.0)
            for name in ("CPU", "GPU")
            if total.get(name, 0.0) - free.get(name, 0.0) > 1e-6
        }
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)
