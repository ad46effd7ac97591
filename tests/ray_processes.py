"""Drivers as processes of their own: how tests start them, and see what is left of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

DRIVER = Path(__file__).with_name("ray_driver.py")
ROOT = DRIVER.parent.parent
UP_WITHIN_S = 90.0


def launch(*arguments: str) -> subprocess.Popen[str]:
    """Start a driver as a process."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, str(DRIVER), *arguments],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def notes_of(driver: subprocess.Popen[str], notes: Path) -> dict[str, Any]:
    """What a driver noted once its cluster was up."""
    deadline = time.monotonic() + UP_WITHIN_S
    while not notes.exists():
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline, "the cluster did not come up"
        time.sleep(0.05)
    noted: dict[str, Any] = json.loads(notes.read_text())
    assert len(noted["pids"]) >= 5, "a cluster is several processes"
    return noted


def alive(pids: list[int]) -> list[str]:
    """Those of some processes that still run."""
    found = []
    for pid in pids:
        try:
            process = psutil.Process(pid)
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline())[:120])
        except psutil.NoSuchProcess:
            continue
    return found


def require_gone(noted: dict[str, Any], within_s: float) -> None:
    """See that nothing of a cluster is left, neither process nor file."""
    deadline = time.monotonic() + within_s
    while alive(noted["pids"]) or Path(noted["folder"]).exists():
        assert time.monotonic() < deadline, (alive(noted["pids"]), noted["folder"])
        time.sleep(0.1)
