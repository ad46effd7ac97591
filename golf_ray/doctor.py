"""What this machine, and a Ray cluster, have of what golf_ray uses: `golf-ray doctor`.

It looks and reports; it changes nothing and starts no cluster. Each finding says what was found,
whether it is needed, and what to type.

Invariant: whatever is broken here is a finding, not an error of the report.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from golf_ray.errors import GolfRayError

Status = Literal["ok", "absent", "missing"]

PYTHONS = ((3, 11), (3, 14))
"""First Python that golf_ray runs on, and the first that it does not."""
TORCHES = ((2, 9), (2, 14))
RAYS = ((2, 60), (2, 61))
LOW_DISK_BYTES = 5_000_000_000
LOW_SHARED_BYTES = 1_000_000_000

_LIBRARIES = (
    # Distribution, module, what it is for.
    ("optuna", "optuna", "searches"),
    ("sentencepiece", "sentencepiece", "tokenizers"),
    ("brotli", "brotli", "artifacts"),
    ("pyarrow", "pyarrow", "Parquet text and tables"),
    ("huggingface_hub", "huggingface_hub", "'golf-ray data fetch'"),
)
_GPU_LIBRARIES = (
    ("flash_attn_3", "flash_attn_interface", "attention on Hopper GPUs"),
    ("xformers", "xformers", "attention on GPUs without flash_attn_3"),
    ("triton", "triton", "the GPU's fused kernels"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    status: Status
    """`ok`; `absent`: not there and not needed here; `missing`: needed."""
    detail: str
    remedy: str = ""
    """What to type or do; empty where nothing need be."""

    def to_dict(self) -> dict[str, str]:
        """Plain data."""
        return asdict(self)


def examine(data_dir: Path | None = None, address: str | None = None) -> Iterator[Finding]:
    """Look at everything, one thing after the other.

    Args:
        data_dir: where data must be; None looks into `data` and is content without.
        address: a running Ray cluster to look at as well.
    """
    yield _python()
    yield _package()
    yield _machine()
    torch = _import("torch")
    yield _torch(torch)
    gpus = _gpus(torch)
    yield gpus
    for item in _GPU_LIBRARIES:
        yield _gpu_library(*item, needed=gpus.status == "ok")
    yield _ray()
    if address is not None:
        yield from _cluster(address)
    for item in _LIBRARIES:
        yield _library(*item)
    yield from _data(data_dir)
    yield _disk(data_dir)
    yield _shared_memory()


def works_on_cpu(findings: list[Finding]) -> bool:
    """Whether nothing that is needed is missing."""
    return all(finding.status != "missing" for finding in findings)


def _python() -> Finding:
    version = platform.python_version()
    low, high = PYTHONS
    if low <= sys.version_info[:2] < high:
        return Finding(name="Python", status="ok", detail=f"{version}, {sys.executable}")
    return Finding(
        name="Python",
        status="missing",
        detail=f"{version} is not supported",
        remedy=f"use Python {_dotted(low)} to {_dotted((high[0], high[1] - 1))}",
    )


def _package() -> Finding:
    import golf_ray

    place = Path(golf_ray.__file__).parent
    return Finding(name="golf_ray", status="ok", detail=f"{golf_ray.__version__}, {place}")


def _machine() -> Finding:
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = psutil.virtual_memory()
    return Finding(
        name="machine",
        status="ok",
        detail=f"{cores} CPU cores, {_size(memory.available)} of {_size(memory.total)} memory free,"
        f" {platform.system()} {platform.machine()}",
    )


def _torch(torch: Any) -> Finding:
    if isinstance(torch, Exception):
        return Finding(
            name="torch",
            status="missing",
            detail=_reason(torch),
            remedy=f"pip install 'torch{_range(TORCHES)}'",
        )
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    detail = f"{torch.__version__} ({build})"
    if not _within(torch.__version__, TORCHES):
        return Finding(
            name="torch",
            status="missing",
            detail=f"{detail} is outside of the range that was tried",
            remedy=f"pip install 'torch{_range(TORCHES)}'",
        )
    return Finding(name="torch", status="ok", detail=detail)


def _gpus(torch: Any) -> Finding:
    if not isinstance(torch, Exception) and torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = [f"{card.name} ({_size(card.total_memory)})" for card in cards]
        counted = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
        return Finding(name="GPU", status="ok", detail=", ".join(counted))
    if shutil.which("nvidia-smi") is not None:
        return Finding(
            name="GPU",
            status="absent",
            detail="this machine has an NVIDIA driver, but torch sees no GPU",
            remedy="install the CUDA build of torch that fits the driver; then 'nvidia-smi'",
        )
    return Finding(name="GPU", status="absent", detail="none: everything runs on the CPU")


def _gpu_library(distribution: str, module: str, purpose: str, *, needed: bool) -> Finding:
    name = module
    if importlib.util.find_spec(module) is None:
        remedy = ""
        if needed and module != "xformers":
            remedy = (
                f"pip install {distribution}"
                if module == "triton"
                else ("install a flash_attn_3 wheel for this torch and CUDA, or xformers")
            )
        return Finding(name=name, status="absent", detail=f"for {purpose}", remedy=remedy)
    version = _version(distribution) or _version(module) or "installed"
    if needed:
        # A wheel for another torch is found and then fails to load.
        loaded = _import(module)
        if isinstance(loaded, Exception):
            return Finding(
                name=name,
                status="absent",
                detail=f"{version} cannot be loaded: {_reason(loaded)}",
                remedy=f"install {distribution} for this torch",
            )
    return Finding(name=name, status="ok", detail=version)


def _ray() -> Finding:
    version = _version("ray")
    if version is not None and _within(version, RAYS):
        return Finding(name="Ray", status="ok", detail=version)
    return Finding(
        name="Ray",
        status="missing",
        detail="not installed" if version is None else f"{version} was not tried with golf_ray",
        remedy=f"pip install 'ray[default,train,tune]{_range(RAYS)}'",
    )


def _library(distribution: str, module: str, purpose: str) -> Finding:
    version = _version(distribution)
    if version is not None and importlib.util.find_spec(module) is not None:
        return Finding(name=module, status="ok", detail=version)
    return Finding(
        name=module,
        status="missing",
        detail=f"not installed; it is needed for {purpose}",
        remedy=f"pip install {distribution}",
    )


# Cluster ----------------------------------------------------------------------------------------


def _cluster(address: str) -> Iterator[Finding]:
    """The nodes of a running cluster; joined for as long as this takes."""
    from golf_ray.cluster import connect
    from golf_ray.preflight import find_problems, inspect_nodes
    from golf_ray.resources import cluster_nodes

    try:
        with connect(address) as cluster:
            nodes = cluster_nodes()
            driver, reports = inspect_nodes()
    except GolfRayError as error:
        yield Finding(name="cluster", status="missing", detail=error.problem, remedy=error.remedy)
        return
    total = {kind: sum(n.resources.get(kind, 0.0) for n in nodes) for kind in ("CPU", "GPU")}
    yield Finding(
        name="cluster",
        status="ok",
        detail=f"{cluster.address}: {len(nodes)} node{'s'[: len(nodes) != 1]}, "
        f"{total['CPU']:g} CPUs, {total['GPU']:g} GPUs",
    )
    versions = {report.node: report.versions for report in reports}
    for node in nodes:
        has = [f"{node.resources.get(kind, 0.0):g} {kind}s" for kind in ("CPU", "GPU")]
        has += [f"{name} {version}" for name, version in versions.get(node.name, {}).items()]
        yield Finding(name="node", status="ok", detail=f"{node.name}: {', '.join(has)}")
    for problem in find_problems(driver, reports):
        yield Finding(name="node", status="missing", detail=problem.problem, remedy=problem.remedy)


# Data and disk ----------------------------------------------------------------------------------


def _data(data_dir: Path | None) -> Iterator[Finding]:
    folder = data_dir or Path("data")
    datasets = sorted(p for p in folder.glob("datasets/*") if p.is_dir())
    if not datasets:
        build = f"golf-ray data build TEXT --data-dir {folder}"
        yield Finding(
            name="data",
            status="absent" if data_dir is None else "missing",
            detail=f"no datasets/ in {folder.resolve()}",
            remedy=f"{build}, or 'golf-ray data fetch'",
        )
    for dataset in datasets:
        yield _dataset(folder, dataset)


def _dataset(folder: Path, dataset: Path) -> Finding:
    from golf_ray.data.shards import parse_shard_name, read_count

    tokens = {"train": 0, "val": 0}
    shards = {"train": 0, "val": 0}
    try:
        for path in sorted(dataset.iterdir()):
            if found := parse_shard_name(path.name):
                tokens[found[0]] += read_count(path)
                shards[found[0]] += 1
    except (GolfRayError, OSError) as error:
        return Finding(name="data", status="missing", detail=str(error), remedy="build it again")
    sides = [f"{shards[s]} {s} shard{'s'[: shards[s] != 1]} ({tokens[s]:,} tokens)" for s in shards]
    detail = f"{dataset}: {', '.join(sides)}"
    models = sorted(path.name for path in folder.glob("tokenizers/*.model"))
    if not models:
        return Finding(
            name="data",
            status="missing",
            detail=f"{detail}, but no tokenizer in {folder / 'tokenizers'}",
            remedy="fetch or build the data set again",
        )
    if not shards["train"] or not shards["val"]:
        side = "train" if not shards["train"] else "val"
        return Finding(
            name="data",
            status="missing",
            detail=f"{detail}: no {side} shard",
            remedy="fetch or build the data set again",
        )
    return Finding(name="data", status="ok", detail=f"{detail}, {', '.join(models)}")


def _disk(data_dir: Path | None) -> Finding:
    folders = {"here": Path.cwd(), "temporary": Path(tempfile.gettempdir())}
    if data_dir is not None and data_dir.is_dir():
        folders["data"] = data_dir
    free = {name: shutil.disk_usage(path).free for name, path in folders.items()}
    detail = ", ".join(
        f"{_size(size)} free {name} ({folders[name]})" for name, size in free.items()
    )
    if min(free.values()) < LOW_DISK_BYTES:
        return Finding(
            name="disk", status="absent", detail=detail, remedy="free space: runs need gigabytes"
        )
    return Finding(name="disk", status="ok", detail=detail)


def _shared_memory() -> Finding:
    place = Path("/dev/shm")
    if not place.is_dir():
        return Finding(name="shared memory", status="absent", detail=f"no {place} on this system")
    free = shutil.disk_usage(place).free
    low = free < LOW_SHARED_BYTES
    return Finding(
        name="shared memory",
        status="absent" if low else "ok",
        detail=f"{_size(free)} free in {place}, where Ray keeps its objects",
        remedy="in a container, start it with --shm-size=4g" if low else "",
    )


# Helpers ----------------------------------------------------------------------------------------


def _import(module: str) -> Any:
    """A module, or the error of importing it: a broken installation raises all kinds."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError) as error:
        return error


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else type(error).__name__


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _within(version: str, bounds: tuple[tuple[int, int], tuple[int, int]]) -> bool:
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    return bounds[0] <= numbers < bounds[1]


def _range(bounds: tuple[tuple[int, int], tuple[int, int]]) -> str:
    return f">={_dotted(bounds[0])},<{_dotted(bounds[1])}"


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"
