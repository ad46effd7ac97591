"""Runs commands for the tests of the command line, in this process where nothing speaks against."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from golf_ray.cli import run

ROOT = Path(__file__).parent.parent
TINY = Path(__file__).parent / "data" / "tiny"
UPSTREAM = ("--upstream-config", TINY / "config.json", "--data-dir", TINY)


@dataclass(frozen=True)
class Outcome:
    """What a command left."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON document and nothing else."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line that an error is, without the program's name."""
        assert self.status in (1, 2, 130), (self.status, self.out, self.err)
        assert self.err.count("\n") == 1 and self.err.startswith("golf-ray: error: "), self.err
        return self.err.removeprefix("golf-ray: error: ").strip()


def golf_ray(*argv: object) -> Outcome:
    """Run `golf-ray ...` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run([str(a) for a in argv])
    return Outcome(status, out.getvalue(), err.getvalue())


def subprocess_environment() -> dict[str, str]:
    """The environment of a command in a process of its own."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "OMP_NUM_THREADS": "1"
    }  # fmt: skip


def golf_ray_process(*argv: object, **options: Any) -> Outcome:
    """Run `python -m golf_ray ...` as a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "golf_ray", *(str(a) for a in argv)],
        capture_output=True, text=True, env=subprocess_environment(), timeout=120, check=False,
        **options,
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)
