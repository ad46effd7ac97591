"""Runs in processes of their own, with nothing compiled yet and then again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

from golf_ray.config import Config
from golf_ray.errors import GolfRayError

SECONDS = {"cold_s": "with nothing compiled yet", "warm_s": "again, with what that left"}
"""Runs, in order."""


def cold_and_warm(
    module: str,
    config: Config,
    seconds_of: Callable[[dict[str, float], float], float],
    *,
    cache: str,
    error: type[GolfRayError],
    arguments: Sequence[str] = (),
) -> dict[str, float]:
    """Seconds of each of `SECONDS`.

    Args:
        module: run as a program; takes the configuration on standard input and gives one line of
            JSON as its last.
        seconds_of: makes them of that line and of the time of the process's start.
        cache: environment variable that says where compiled code is kept.
        error: raised where such a process fails.
    """
    found = {}
    with tempfile.TemporaryDirectory(prefix="golf-ray-bench-") as folder:
        for name in SECONDS:
            began_unix_s = time.time()
            done = subprocess.run(
                [sys.executable, "-m", module, *arguments],
                input=config.to_json(),
                env={**os.environ, cache: folder},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                last = (done.stderr.strip().splitlines() or [""])[-1]
                raise error(f"a run in a process of its own failed: {last}")
            found[name] = seconds_of(json.loads(done.stdout.splitlines()[-1]), began_unix_s)
    return found
