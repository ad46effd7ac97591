"""One process at a time in a folder that several may want to fill, also on several machines.

The lock is a file in the folder, held by the operating system: it goes with the process that
holds it, however that ends. Where a file system knows no locks (some object stores mounted as
folders), work goes on without: files are renamed into place whole, so that only effort is lost.

Invariant: at most one process is inside where locks are known, and the last to leave takes the
lock's file away. A folder that was made for it goes too if it is empty and nobody else waits.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from golf_ray.records import storage_error

LOCK_NAME: Final = ".fetch.lock"
POLL_S: Final = 0.2
TRIES: Final = 100
"""To make a folder that others take away."""
_MADE: Final[set[Path]] = set()
"""Folders that were made for a lock of this process: the last to leave takes them away, whichever
of its threads made them."""
_FOLDERS: Final = threading.Lock()
_HELD: Final = (errno.EAGAIN, errno.EACCES)


@contextlib.contextmanager
def folder_lock(folder: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the folder's lock inside the block.

    Args:
        folder: made if it is not there.
        on_wait: called several times a second while another process holds it.

    Raises:
        StorageError: the folder cannot be made or written.
    """
    path = folder / LOCK_NAME
    try:
        handle = _acquired(folder, path, on_wait or (lambda: None))
    except OSError as error:
        raise storage_error(folder, error) from None
    try:
        yield
    finally:
        # Before it is let go of: who waits sees that its file is no longer the folder's.
        path.unlink(missing_ok=True)
        os.close(handle)
        _unmake(folder)


def _acquired(folder: Path, path: Path, on_wait: Callable[[], None]) -> int:
    tries = 0
    while True:
        try:
            with _FOLDERS:
                _make(folder)
                handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            # Another process that held the lock may just have taken the empty folder away.
            tries += 1
            if tries == TRIES:
                raise
            time.sleep(random.random() * POLL_S / 10)
            continue
        try:
            _wait(handle, on_wait)
            if _is(handle, path):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _make(folder: Path) -> None:
    for path in reversed((folder, *folder.parents)):
        with contextlib.suppress(FileExistsError):
            if not path.is_dir():
                path.mkdir()
                _MADE.add(path)


def _unmake(folder: Path) -> None:
    with _FOLDERS:
        for path in (folder, *folder.parents):
            if path in _MADE:
                with contextlib.suppress(OSError):
                    path.rmdir()
                    _MADE.discard(path)


def _wait(handle: int, on_wait: Callable[[], None]) -> None:
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _HELD:
                # No locks here.
                return
            on_wait()
            time.sleep(POLL_S)
        else:
            return


def _is(handle: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
