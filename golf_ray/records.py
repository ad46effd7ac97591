"""Files that a run leaves behind: written whole or not at all, readable while the run goes on.

Invariant: a reader never sees half a file. Whole files are written under a temporary name in the
same folder and renamed; line files grow by one flushed line at a time, and a torn last line (a
crash in the middle of a write) is not an error for the reader.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from golf_ray.errors import StorageError

FULL_BYTES = 1 << 20
"""A disk with less than this free is full."""


def storage_error(path: Path, error: OSError) -> StorageError:
    """The one-line form of an operating-system error about writing `path`."""
    if error.errno == errno.ENOSPC:
        return StorageError(f"no space left to write {path}", "free space or choose another folder")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(
            f"{path} cannot be written ({error.strerror})", "choose a folder that you may write to"
        )
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return StorageError(
            f"{path} cannot be written: a part of its path is a file", "choose another folder"
        )
    return StorageError(f"{path} cannot be written ({error.strerror or error})", "check the folder")


def reading_error(path: Path, error: OSError) -> StorageError:
    """The one-line form of an operating-system error about reading `path`."""
    why = error.strerror or (os.strerror(error.errno) if error.errno else str(error))
    remedy = "ask for the right to" if error.errno in (errno.EACCES, errno.EPERM) else "check it"
    return StorageError(f"{path} cannot be read ({why})", remedy)


def make_folder(path: Path) -> Path:
    """Create a folder and its parents.

    Raises:
        StorageError: it cannot be made, or is there and cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        handle, probe = tempfile.mkstemp(prefix=".writable-", dir=path)
        os.close(handle)
        os.unlink(probe)
    except OSError as error:
        raise storage_error(path, error) from None
    return path


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; renamed onto `path` if the block succeeds.

    Raises:
        StorageError: the folder cannot be written or has no space left; nothing is left behind.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        # mkstemp gives 0600; a record is as readable as any file that the user makes.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        raise storage_error(path, error) from None
    except RuntimeError:
        # torch's own writer reports a full disk as a failure of its archive.
        if temporary is None or shutil.disk_usage(path.parent).free >= FULL_BYTES:
            raise
        raise storage_error(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file or nothing."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 file or nothing."""
    atomic_write_bytes(path, text.encode())


def atomic_write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all."""
    atomic_write_text(path, json.dumps(value, indent=2) + "\n")


def append_jsonl(path: Path, value: Any) -> None:
    """Append one line and force it to disk, so that a crash loses no line that was reported."""
    line = json.dumps(value) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise storage_error(path, error) from None


def read_jsonl(path: Path) -> list[Any]:
    """All whole lines of a line file; a torn last line is left out, a missing file is empty."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    values = []
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError:
            if number == len(lines):
                break
            raise StorageError(f"{path} line {number} is not JSON", "restore the file") from None
    return values
