"""A look at every node before anything runs on it: versions, GPUs, storage, data, disks.

One task a node brings plain data; whether it will do is a pure function of it. Nothing here takes
resources away from anybody, and no GPU is used: its driver is asked.

Invariant: every living node is named as good or with what is wrong with it, in bounded time.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import shutil
import subprocess
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from golf_ray.errors import ClusterError, DataError, GolfRayError
from golf_ray.fingerprint import LENGTH
from golf_ray.nodes import NodeFailure, run_on_nodes
from golf_ray.resources import Node, cluster_nodes

if TYPE_CHECKING:
    from golf_ray.data.fingerprints import FileHead

TIMEOUT_S = 90.0
"""A node's first task starts a Python process there, which imports the packages."""
DRIVER_TIMEOUT_S = 20.0
"""The GPUs' driver may take that long where it is not kept loaded."""
DISTRIBUTIONS = ("ray", "torch")
LOW_DISK_BYTES = 2_000_000_000
"""A folder with less than this free cannot take what a run writes."""
FLASH = "flash attention"


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeReport:
    """What one node found."""

    node: str
    """Its name for people; empty for the driver."""
    versions: Mapping[str, str]
    """Of Python and packages; golf_ray's is a fingerprint of its source, so that two states of
    one release differ too."""
    flash: str = "none"
    """Who brings flash attention, with its version."""
    gpus: tuple[str, ...] | None = None
    """Models of the GPUs that the driver lists; None where there is no driver to ask."""
    offered_gpus: float = 0.0
    """GPUs that Ray gives out there."""
    storage_error: str | None = None
    files: tuple[FileHead, ...] = ()
    """The data files, in the order in which they were asked for."""
    data_error: str | None = None
    free_bytes: Mapping[str, int] | None = None
    """Space left where files are written, by folder; None where nobody looked."""
    error: str | None = None
    """Why there is nothing of the above."""

    @property
    def has_gpus(self) -> bool:
        """Whether work that needs a GPU may be placed there."""
        return self.offered_gpus > 0


def preflight(
    *,
    storage: str | Path | None = None,
    files: Sequence[Path] = (),
    needs_flash: bool = False,
) -> None:
    """See that every node of the connected cluster can take part.

    Args:
        storage: folder or URI that every node must be able to write and to read back.
        files: data files that every node must have, the same ones: see
            `golf_ray.data.fingerprints.data_files`.
        needs_flash: every node with GPUs must have flash attention, not only the same on all.

    Raises:
        ClusterError: a node cannot; the first that is wrong, and how many more there are.
    """
    driver, reports = inspect_nodes(storage=storage, files=files)
    problems = find_problems(driver, reports, needs_flash=needs_flash)
    if problems:
        more = f" (and {len(problems) - 1} more)" if problems[1:] else ""
        raise ClusterError(problems[0].problem + more, problems[0].remedy)


# What is wrong ----------------------------------------------------------------------------------

_MEND_NODE = "install golf-ray there as it is here, or take the node out of the cluster"
_SAME_VERSIONS = "install the same versions on every node"
_SAME_DATA = "put the same data on every node: 'golf-ray data fetch --address ...', or a mount"


def find_problems(
    driver: NodeReport, reports: Sequence[NodeReport], *, needs_flash: bool = False
) -> list[ClusterError]:
    """What is wrong with which node, one line each: pure."""
    problems = [
        ClusterError(f"node {r.node} {r.error}", _MEND_NODE) for r in reports if r.error is not None
    ]
    good = [r for r in reports if r.error is None]
    for report in good:
        problems += _version_problems(driver, good, report)
    problems += _gpu_problems(good, needs_flash)
    for report in good:
        if report.storage_error is not None:
            problems.append(
                ClusterError(
                    f"node {report.node} cannot use the storage: {report.storage_error}",
                    "give a folder or URI that every node can write, such as s3://... or a mount",
                )
            )
    for report in good:
        problems += _data_problems(driver, report)
    for report in good:
        problems += _disk_problems(report)
    return problems


def _version_problems(
    driver: NodeReport, good: Sequence[NodeReport], report: NodeReport
) -> list[ClusterError]:
    """Against the driver without builds; nodes that compute together must agree to the build."""
    problems = []
    for name, version in report.versions.items():
        here = driver.versions.get(name, "none")
        if _release(version) != _release(here):
            text = f"node {report.node} has {name} {version}, here it is {here}"
            problems.append(ClusterError(text, _SAME_VERSIONS))
            continue
        alike = [r for r in good if r.has_gpus == report.has_gpus]
        problems += _difference(alike, report, name, partial(_version_of, name))
    return problems


def _version_of(name: str, report: NodeReport) -> str:
    return report.versions.get(name, "none")


def _gpu_problems(good: Sequence[NodeReport], needs_flash: bool) -> list[ClusterError]:
    """Only of nodes that give out GPUs; a head without any is no odd one out."""
    problems: list[ClusterError] = []
    with_gpus = [r for r in good if r.has_gpus]
    for report in with_gpus:
        found = report.gpus
        if found is not None and len(found) < report.offered_gpus:
            problems.append(
                ClusterError(
                    f"node {report.node} offers {report.offered_gpus:g} GPUs to Ray, and its "
                    f"driver lists {len(found)}",
                    "see 'nvidia-smi' there, then restart Ray on that node",
                )
            )
        else:
            problems += _difference(with_gpus, report, "GPUs", _gpus_of, "take the odd node out")
        if needs_flash and report.flash == "none":
            problems.append(
                ClusterError(
                    f"node {report.node} has no {FLASH}",
                    "install a flash_attn_3 wheel there, or set attention.backend to another",
                )
            )
        else:
            problems += _difference(with_gpus, report, FLASH, lambda r: r.flash)
    return problems


def _gpus_of(report: NodeReport) -> str:
    if report.gpus is None:
        return f"{report.offered_gpus:g} of unknown model"
    counted = Counter(report.gpus)
    return " and ".join(f"{count} x {model}" for model, count in counted.items())


def _difference(
    peers: Sequence[NodeReport],
    report: NodeReport,
    what: str,
    value_of: Callable[[NodeReport], str],
    remedy: str = _SAME_VERSIONS,
) -> list[ClusterError]:
    """That a node has something else than most of its peers; the first wins where none is most."""
    counted = Counter(value_of(peer) for peer in peers)
    usual, count = counted.most_common(1)[0]
    mine = value_of(report)
    if mine == usual:
        return []
    having = [peer.node for peer in peers if value_of(peer) == usual]
    whose = f"node {having[0]} has" if count == 1 else f"{count} others have"
    return [ClusterError(f"node {report.node} has {what} {mine}, {whose} {usual}", remedy)]


def _data_problems(driver: NodeReport, report: NodeReport) -> list[ClusterError]:
    if report.data_error is not None:
        text = f"node {report.node} does not have the data: {report.data_error}"
        return [ClusterError(text, _SAME_DATA)]
    differing = [
        (there, here)
        for there, here in zip(report.files, driver.files, strict=False)
        if there != here
    ]
    if not differing:
        return []
    there, here = differing[0]
    more = f" (and {len(differing) - 1} more files)" if differing[1:] else ""
    text = (
        f"node {report.node} has another {there.name} ({there.describe()}), "
        f"here it is {here.describe()}{more}"
    )
    return [ClusterError(text, _SAME_DATA)]


def _disk_problems(report: NodeReport) -> list[ClusterError]:
    return [
        ClusterError(
            f"node {report.node} has {free / 1e9:.2f} GB free in {folder}, and "
            f"{LOW_DISK_BYTES / 1e9:g} GB are needed",
            "free space there",
        )
        for folder, free in (report.free_bytes or {}).items()
        if free < LOW_DISK_BYTES
    ]


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
    from golf_ray.data.fingerprints import file_heads

    heads: tuple[FileHead, ...] = ()
    data_error = None
    try:
        heads = file_heads(Path(file) for file in files)
    except DataError as error:
        data_error = error.problem
    storage_error = None if storage is None else _storage_error(storage, probe)
    return NodeReport(
        node=name,
        versions=versions(),
        flash=flash_version(),
        gpus=listed_gpus(),
        storage_error=storage_error,
        files=heads,
        data_error=data_error,
        free_bytes=_free_bytes(None if storage_error else storage),
    )


def versions() -> dict[str, str]:
    """Of Python and of the packages that must agree."""
    found = {"python": platform.python_version()}
    for distribution in DISTRIBUTIONS:
        found[distribution] = _version(distribution) or "none"
    return {**found, "golf_ray": source_fingerprint()}


def flash_version() -> str:
    """Who would bring flash attention here, by what is installed; "none" for nobody.

    Nothing is loaded: the library would take memory of a GPU.
    """
    for distribution in ("flash_attn_3", "xformers"):
        if version := _version(distribution):
            return f"{distribution} {version}"
    return "none"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def listed_gpus() -> tuple[str, ...] | None:
    """Models of the GPUs that NVIDIA's driver lists; None where there is no driver.

    Asking torch would make a context on each of them, which stays as long as the process.
    """
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=DRIVER_TIMEOUT_S, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in listed.stdout.splitlines() if line.strip())


def source_fingerprint() -> str:
    """Fingerprint of the package's Python files."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for package in ("evaluators", "golf_ray", "search_spaces", "trainers"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:LENGTH]


def _storage_error(uri: str, probe: str | None) -> str | None:
    from trainers.storage import Storage, shown

    try:
        storage = Storage(uri)
        if probe is not None and storage.read_bytes(probe) != probe.encode():
            return f"{shown(uri)} is not the same place there as here"
        own = f".golf-ray-probe-{uuid.uuid4().hex}"
        storage.write_bytes(own, own.encode())
        read = storage.read_bytes(own)
        storage.remove(own)
    except GolfRayError as error:
        return error.problem
    return None if read == own.encode() else f"{shown(uri)} does not give back what is written"


def _free_bytes(storage: str | None) -> dict[str, int]:
    """Of the folder for temporary files, and of the storage where it is on a disk."""
    from trainers.storage import Storage

    folders = [Path(tempfile.gettempdir())]
    local = None if storage is None else Storage(storage).local
    if local is not None and local.is_dir():
        folders.append(local)
    return {str(folder): shutil.disk_usage(folder).free for folder in folders}


# Asking the nodes -------------------------------------------------------------------------------


def inspect_nodes(
    *, storage: str | Path | None = None, files: Sequence[Path] = (), timeout_s: float = TIMEOUT_S
) -> tuple[NodeReport, list[NodeReport]]:
    """The driver's report and those of all living nodes; a silent node's says so.

    Raises:
        GolfRayError: the driver itself cannot use storage or data.
    """
    from trainers.storage import Storage

    absolute = [str(path.absolute()) for path in files]
    if storage is None:
        return _inspect(None, None, absolute, timeout_s)
    place = Storage(storage)
    probe = f".golf-ray-probe-{uuid.uuid4().hex}"
    place.write_bytes(probe, probe.encode())
    try:
        return _inspect(place.uri, probe, absolute, timeout_s)
    finally:
        place.remove(probe)


def _inspect(
    storage: str | None, probe: str | None, files: Sequence[str], timeout_s: float
) -> tuple[NodeReport, list[NodeReport]]:
    nodes = cluster_nodes()
    driver = inspect_here("", storage, probe, files)
    found = run_on_nodes(
        inspect_here, nodes, lambda node: (node.name, storage, probe, files), timeout_s=timeout_s
    )
    return driver, [_reported(node, answer) for node, answer in zip(nodes, found, strict=True)]


def _reported(node: Node, answer: NodeReport | NodeFailure) -> NodeReport:
    offered_gpus = node.resources.get("GPU", 0.0)
    if isinstance(answer, NodeFailure):
        return NodeReport(
            node=node.name, versions={}, offered_gpus=offered_gpus, error=answer.reason
        )
    return replace(answer, offered_gpus=offered_gpus)
