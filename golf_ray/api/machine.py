"""What a stage computes on: device and threads of this process, or a Ray cluster.

Invariant: the number of CPU threads follows from the configuration, as results do.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from golf_ray.config import Config
from golf_ray.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from golf_ray.resources import Bundle, Placement


def pick_device(config: Config) -> torch.device:
    """Where a stage in this process computes: `auto` takes a GPU where there is one.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    import torch

    wanted = config.cluster.device
    found = torch.cuda.is_available()
    if wanted == "cuda" and not found:
        raise ConfigError("cluster.device = 'cuda', but there is no GPU", "see 'golf-ray doctor'")
    return torch.device("cuda" if found and wanted != "cpu" else "cpu")


@contextlib.contextmanager
def connected(
    address: str | None, bundles: Sequence[Bundle], placement: Placement, what: str
) -> Iterator[None]:
    """Be connected to a cluster that can hold some bundles.

    A local one gives out as many CPUs as are asked for, also where the machine has fewer: they
    are shared out by the operating system then. GPUs are never made up.

    Raises:
        ClusterError: the cluster cannot be reached, or is too small.
    """
    from golf_ray.cluster import connect
    from golf_ray.resources import require_resources

    asked = math.ceil(sum(bundle.get("CPU", 0.0) for bundle in bundles))
    with connect(address, num_cpus=max(asked, cpu_count()) if address is None else None):
        require_resources(bundles, placement, what=what)
        yield


def cpu_count() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Compute with a number of CPU threads: on a CPU it is part of a result's last bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
