"""Commands that people are told to go on with, as they can be copied into a shell.

Invariant: what is told works from the folder in which it was told.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from golf_ray.sweeps import DEFAULT_STORAGE
from trainers.storage import shown, split_uri


def command(words: str, name: str, storage: str, *more: str) -> str:
    """A command on a sweep, with where it is kept if that is not where sweeps go by themselves.

    Args:
        words: of the command, as `sweep --resume`.
        storage: path or URI of the storage.
        more: options after these.
    """
    parts = [f"golf-ray {words} {shlex.quote(name)}", *more]
    if Path(storage) != Path(DEFAULT_STORAGE).absolute():
        parts.append(f"--storage {shlex.quote(_short(storage))}")
    return " ".join(parts)


def _short(storage: str) -> str:
    if "://" in storage:
        base, query = split_uri(storage)
        hidden = shown(base)
        keys = "KEY:SECRET@" if hidden != base else ""
        return hidden.replace("://", f"://{keys}", 1) + query
    path, here = Path(storage), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
