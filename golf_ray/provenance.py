"""Where a result comes from: versions, commit and host of this process, and names of processors.

Invariant: what cannot be found out is None, and finding out never fails a run.
"""

from __future__ import annotations

import functools
import platform
import socket
import subprocess
from pathlib import Path
from typing import Final

GIT_TIMEOUT_S: Final = 5.0
COMMIT_DIGITS: Final = 12


@functools.cache
def provenance() -> dict[str, str | None]:
    """What made the results of this process, by the names of the records' fields; found out once a
    process."""
    return {
        "host": socket.gethostname(),
        "golf_ray_version": _version("golf-ray"),
        "torch_version": _version("torch"),
        "ray_version": _version("ray"),
        "python_version": platform.python_version(),
        "commit": commit_of(Path(__file__).parent),
    }


def commit_of(folder: Path) -> str | None:
    """The commit of a folder's files, with `+` where any of them is changed; None where the folder
    is not under version control, or git is not there.

    Args:
        folder: of a package: it counts where its `__init__.py` is tracked, so that what is
            installed somewhere below a checkout of something else is not taken for it.
    """
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    # The whole checkout: the package's siblings are part of what computed.
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit[:COMMIT_DIGITS] + ("+" if changes else "")


@functools.cache
def processor_name() -> str:
    """What this machine's processor calls itself."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip().lower() == "model name" and value.strip():
                    return value.strip()
    except OSError:
        # Not Linux.
        pass
    return platform.processor() or platform.machine()


def _version(distribution: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None where it fails or is not there."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=GIT_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
