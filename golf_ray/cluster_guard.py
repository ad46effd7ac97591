"""Ends what a local Ray cluster leaves behind; run as a program, it waits for the driver's end.

    python cluster_guard.py FOLDER

The driver holds the other end of this program's standard input. Whatever becomes of the driver,
SIGKILL included, the end of that pipe is seen here; then every process that has a file open in the
cluster's own folder is ended by its id, and the folder is removed. Ray itself leaves its agents
behind when a driver is killed.

Invariant: nothing is ended that holds no file in FOLDER, a folder that one driver made for itself.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil

QUIET_S = 0.2
"""Pause between two looks."""


def processes_in(folder: Path) -> list[psutil.Process]:
    """Processes of this user, other than this one, with an open regular file below a folder."""
    prefix = f"{folder}{os.sep}"
    found = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            if any(file.path.startswith(prefix) for file in process.open_files()):
                found.append(process)
        except psutil.Error:
            # Ended meanwhile, or of another user.
            continue
    return found


def end_processes(processes: list[psutil.Process], patience_s: float = 5.0) -> None:
    """SIGKILL processes by id and wait for them to be gone."""
    for process in processes:
        try:
            # psutil compares the start time first, so a reused id is safe.
            process.kill()
        except psutil.Error:
            continue
    psutil.wait_procs(processes, timeout=patience_s)


def clean_up(folder: Path, *, grace_s: float = 0.0, patience_s: float = 10.0) -> None:
    """End everything that lives in a folder, then remove it.

    Args:
        grace_s: how long processes that were asked to end may take to do so by themselves.
        patience_s: how long to look for processes that are still starting others.
    """
    began = time.monotonic()
    while left := processes_in(folder):
        if time.monotonic() - began >= grace_s:
            end_processes(left)
        if time.monotonic() - began > grace_s + patience_s:
            break
        time.sleep(QUIET_S)
    shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Wait for the pipe's end, then clean up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # What is sent to a whole group is meant for the driver, and its end is what counts.
        signal.signal(number, signal.SIG_IGN)
    while sys.stdin.buffer.read(1):
        pass
    clean_up(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
