"""The errors a user can cause, each one line: what is wrong, the value, what to do.

Everything a user gave (a flag, a file, a cluster) that cannot be used raises a subclass of
`GolfRayError`; the command line prints its one line and exits with `exit_status`. What cannot be
unless this code is wrong is an `assert`. All errors survive pickling, because they travel between
Ray processes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class GolfRayError(ValueError):
    """Base of all errors that a user can mend.

    Args:
        problem: what is wrong, with the offending value in it.
        remedy: what to do about it; may be empty where nothing can be done.
    """

    exit_status: ClassVar[int] = 1

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        line = f"{self.problem}; {self.remedy}" if self.remedy else self.problem
        return " ".join(line.split())


class UsageError(GolfRayError):
    """The command was called in a way that cannot work, whatever the files and machines."""

    exit_status = 2


class ConfigError(UsageError):
    """A configuration field is unknown, of the wrong type or out of its bounds."""


class DataError(GolfRayError):
    """A shard, tokenizer, manifest or text file cannot be used."""


class CheckpointError(GolfRayError):
    """A checkpoint or artifact cannot be read, is not safe to read, or does not fit the model."""


class StorageError(GolfRayError):
    """A folder or storage path cannot be written, or has no space left."""


class ClusterError(GolfRayError):
    """The Ray cluster cannot be reached, is too small, or its nodes disagree."""


class TrainingFailed(GolfRayError):
    """A training run ended without a result: diverged, lost its workers, ran out of memory."""


class TrainingPruned(TrainingFailed):
    """A training was ended on the way, as its starter asked for, because others stood better."""


class EvaluationFailed(GolfRayError):
    """An evaluation ended without a score that may be quoted."""


def nearest(name: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """A remedy that names the known spelling closest to `name`; when none is close, another remedy,
    or all of them."""
    known = sorted(known)
    lowered = {k.lower(): k for k in reversed(known)}
    close = difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.5)
    if close:
        return f"did you mean '{lowered[close[0]]}'?"
    return otherwise or "known: " + ", ".join(known)
