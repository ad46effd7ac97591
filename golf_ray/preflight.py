"""A look at every node before anything runs on it: versions, storage, data. One task a node.

What is found is plain data; whether it will do is a pure function of it; an executor asks the
nodes. Nothing here takes resources away from anybody.

Invariant: every living node is named as good or with what is wrong with it, in bounded time.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from golf_ray.errors import ClusterError, GolfRayError
from golf_ray.fingerprint import LENGTH
from golf_ray.resources import Node, cluster_nodes

HEAD_BYTES = 1 << 20
"""Of each data file that a fingerprint covers, beside name and size."""
TIMEOUT_S = 90.0
"""A node's first task starts a Python process there, which imports the packages."""
DISTRIBUTIONS = ("ray", "torch")


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeReport:
    """What one node found."""

    node: str
    """Its name for people; empty for the driver."""
    versions: Mapping[str, str]
    """Of Python and packages; golf_ray's is a fingerprint of its source, so that two states of
    one release differ too."""
    storage_error: str | None = None
    data_fingerprint: str | None = None
    data_error: str | None = None
    error: str | None = None
    """Why there is nothing of the above."""


def preflight(*, storage: str | Path | None = None, files: Sequence[Path] = ()) -> None:
    """See that every node of the connected cluster can take part.

    Args:
        storage: folder or URI that every node must be able to write and to read back.
        files: data files that every node must have, the same ones.

    Raises:
        ClusterError: a node cannot; the first that is wrong, and how many more there are.
    """
    driver, reports = inspect_nodes(storage=storage, files=files)
    problems = find_problems(driver, reports)
    if problems:
        more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
        raise ClusterError(problems[0].problem + more, problems[0].remedy)


def find_problems(driver: NodeReport, reports: Sequence[NodeReport]) -> list[ClusterError]:
    """What is wrong with which node: pure."""
    problems = [
        ClusterError(f"node {r.node} {r.error}", _MEND_NODE) for r in reports if r.error is not None
    ]
    good = [r for r in reports if r.error is None]
    for report in good:
        problems += _version_problems(driver, good[0], report)
    for report in good:
        if report.storage_error is not None:
            problems.append(
                ClusterError(
                    f"node {report.node} cannot use the storage: {report.storage_error}",
                    "give a folder or URI that every node can write, such as s3://... or a mount",
                )
            )
    for report in good:
        if report.data_error is not None:
            problems.append(
                ClusterError(
                    f"node {report.node} does not have the data: {report.data_error}",
                    "put the same data folder on every node, or on a mount that all share",
                )
            )
        elif report.data_fingerprint != driver.data_fingerprint:
            problems.append(
                ClusterError(
                    f"node {report.node} has other data under the same names "
                    f"(fingerprint {report.data_fingerprint}, here {driver.data_fingerprint})",
                    "put the same data folder on every node",
                )
            )
    return problems


_MEND_NODE = "install golf-ray there as it is here, or take the node out of the cluster"


def _version_problems(
    driver: NodeReport, first: NodeReport, report: NodeReport
) -> list[ClusterError]:
    problems = []
    for name, version in report.versions.items():
        here, there = driver.versions.get(name, "none"), first.versions.get(name, "none")
        if _release(version) != _release(here):
            other, whose = here, "here"
        elif version != there:
            # Nodes compute together, so there even builds must be the same.
            other, whose = there, f"on node {first.node}"
        else:
            continue
        problems.append(
            ClusterError(
                f"node {report.node} has {name} {version}, {whose} it is {other}",
                "install the same versions on every node",
            )
        )
    return problems


def _release(version: str) -> str:
    """A version without its build, such as +cpu: a driver without a GPU may drive those with."""
    return version.partition("+")[0]


# What runs on a node ----------------------------------------------------------------------------


def inspect_here(
    name: str, storage: str | None, probe: str | None, files: Sequence[str]
) -> NodeReport:
    """This machine's report.

    Args:
        storage: folder or URI to write to.
        probe: name of a file of the driver's there, which holds its own name.
        files: data files.
    """
    fingerprint, data_error = None, None
    try:
        fingerprint = files_fingerprint([Path(file) for file in files])
    except OSError as error:
        data_error = f"{error.filename}: {error.strerror}"
    return NodeReport(
        node=name,
        versions=versions(),
        storage_error=None if storage is None else _storage_error(storage, probe),
        data_fingerprint=fingerprint,
        data_error=data_error,
    )


def versions() -> dict[str, str]:
    """Of Python and of the packages that must agree."""
    found = {"python": platform.python_version()}
    for distribution in DISTRIBUTIONS:
        try:
            found[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            found[distribution] = "none"
    return {**found, "golf_ray": source_fingerprint()}


def source_fingerprint() -> str:
    """Fingerprint of the package's Python files."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for package in ("evaluators", "golf_ray", "search_spaces", "trainers"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:LENGTH]


def files_fingerprint(paths: Sequence[Path]) -> str | None:
    """Of name, size and first MiB of each file; None of no files."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
        digest.update(f"{path.name}:{path.stat().st_size}:".encode() + head)
    return digest.hexdigest()[:LENGTH] if paths else None


def _storage_error(uri: str, probe: str | None) -> str | None:
    from trainers.storage import Storage

    try:
        storage = Storage(uri)
        if probe is not None and storage.read_bytes(probe) != probe.encode():
            return f"{uri} is not the same place there as here"
        own = f".golf-ray-probe-{uuid.uuid4().hex}"
        storage.write_bytes(own, own.encode())
        read = storage.read_bytes(own)
        storage.remove(own)
    except GolfRayError as error:
        return error.problem
    return None if read == own.encode() else f"{uri} does not give back what is written"


# Asking the nodes -------------------------------------------------------------------------------


def inspect_nodes(
    *, storage: str | Path | None = None, files: Sequence[Path] = (), timeout_s: float = TIMEOUT_S
) -> tuple[NodeReport, list[NodeReport]]:
    """The driver's report and those of all living nodes; a silent node's says so.

    Raises:
        GolfRayError: the driver itself cannot use storage or data.
    """
    from trainers.storage import Storage

    nodes = cluster_nodes()
    absolute = [str(path.absolute()) for path in files]
    if storage is None:
        driver = inspect_here("", None, None, absolute)
        return driver, _ask(nodes, (None, None, absolute), timeout_s)
    place = Storage(storage)
    probe = f".golf-ray-probe-{uuid.uuid4().hex}"
    place.write_bytes(probe, probe.encode())
    try:
        driver = inspect_here("", place.uri, probe, absolute)
        return driver, _ask(nodes, (place.uri, probe, absolute), timeout_s)
    finally:
        place.remove(probe)


def _ask(nodes: Sequence[Node], arguments: tuple[Any, ...], timeout_s: float) -> list[NodeReport]:
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look: Callable[..., Any] = ray.remote(inspect_here).options
    refs = {
        node.name: look(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False),
        ).remote(node.name, *arguments)
        for node in nodes
    }
    ray.wait(list(refs.values()), num_returns=len(refs), timeout=timeout_s)
    reports = []
    for name, ref in refs.items():
        try:
            reports.append(ray.get(ref, timeout=0))
        except TimeoutError:
            ray.cancel(ref, force=True)
            reports.append(_silent(name, f"did not answer within {timeout_s:g} s"))
        except RayError as error:
            text = " ".join(str(error).split())
            missing = "No module named" in text
            why = "golf_ray cannot be imported" if missing else text[-160:]
            reports.append(_silent(name, f"could not be looked at ({why})"))
    return reports


def _silent(name: str, error: str) -> NodeReport:
    return NodeReport(node=name, versions={}, error=error)
