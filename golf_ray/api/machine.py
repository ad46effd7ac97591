"""What a stage computes on: device and threads of this process, or a Ray cluster.

Invariant: the number of CPU threads follows from the configuration, as results do.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from golf_ray.config import Config
from golf_ray.errors import ClusterError

if TYPE_CHECKING:
    import torch

    from golf_ray.resources import Bundle, Placement


def has_gpu() -> bool:
    """Whether torch sees a GPU in this process."""
    import torch

    return torch.cuda.is_available()


def pick_device(config: Config, *, strict: bool = False) -> torch.device:
    """Where a stage in this process computes: on a GPU where the configuration asks for one.

    Args:
        strict: a GPU that is asked for by `cluster.gpus_per_worker` must be there; otherwise
            `auto` is content with the CPU.

    Raises:
        ClusterError: a GPU is asked for and there is none.
    """
    import torch

    cluster = config.cluster
    wants = cluster.tensor_device == "cuda"
    if wants and not has_gpu() and (strict or cluster.device == "cuda"):
        asked = (
            "device = cuda"
            if cluster.device == "cuda"
            else (f"gpus_per_worker = {cluster.gpus_per_worker:g}")
        )
        raise ClusterError(
            f"cluster.{asked} asks for a GPU, and torch finds none here",
            "see 'golf-ray doctor', or add --set cluster.gpus_per_worker=0 "
            "--set cluster.device=cpu",
        )
    return torch.device("cuda" if wants and has_gpu() else "cpu")


def fitted_to_machine(config: Config) -> Config:
    """A configuration whose cluster section is not the user's own: without GPUs where the machine
    has none. What another machine trained with says nothing about this one.
    """
    if config.cluster.device == "cuda" or not config.cluster.gpus_per_worker or has_gpu():
        return config
    return config.with_overrides({"cluster.gpus_per_worker": 0.0})


@contextlib.contextmanager
def connected(
    address: str | None,
    bundles: Sequence[Bundle],
    placement: Placement,
    what: str,
    *,
    storage: str | Path | None = None,
    files: Sequence[Path] = (),
    needs_flash: bool = False,
) -> Iterator[None]:
    """Be connected to a cluster that can do some work, by all that can be seen beforehand.

    A local one gives out as many CPUs as are asked for, also where the machine has fewer: they
    are shared out by the operating system then. GPUs are never made up.

    Args:
        bundles: what the work takes.
        what: names the work in errors.
        storage: folder or URI that all nodes of a joined cluster must be able to write.
        files: data files that they must all have.
        needs_flash: those with GPUs must have flash attention.

    Raises:
        ClusterError: the cluster cannot be reached, is too small, or its nodes disagree.
    """
    from golf_ray.cluster import connect
    from golf_ray.preflight import preflight
    from golf_ray.resources import require_resources

    asked = math.ceil(sum(bundle.get("CPU", 0.0) for bundle in bundles))
    with connect(address, num_cpus=max(asked, cpu_count()) if address is None else None):
        require_resources(bundles, placement, what=what)
        if address is not None:
            preflight(storage=storage, files=files, needs_flash=needs_flash)
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
