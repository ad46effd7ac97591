"""What one run, trial, sweep or ledger amounts to, as plain data.

`golf-ray show` prints these: `golf_ray.results.gathering` makes them of files, and how they look is
`golf_ray.results.screen`'s.

Invariant: what is not known is left out, and what cannot be read is a problem line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from golf_ray.results.settings import Difference
    from golf_ray.results.standing import Look


@dataclass(frozen=True, kw_only=True, slots=True)
class RunAccount:
    """A run folder, a trial of a sweep, or a log of the public program."""

    kind: str
    name: str
    place: str
    row: dict[str, Any]
    """What is known of the schema's columns."""
    texts: dict[str, str]
    """The same with the digits that a reader is shown."""
    preset: str
    differences: tuple[Difference, ...]
    intervals: tuple[dict[str, Any], ...]
    events: tuple[dict[str, Any], ...]
    last_written_unix_s: float | None
    """Of the last sign of life of what has not ended."""
    problems: tuple[str, ...]

    @property
    def status(self) -> str:
        """As in the row."""
        return str(self.row.get("status", "unknown"))

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "kind": self.kind,
            "name": self.name,
            "place": self.place,
            "status": self.status,
            "values": self.row,
            "preset": self.preset,
            "differences": [
                {"field": d.field, "value": d.value, "preset": d.preset, "searched": d.searched}
                for d in self.differences
            ],
            "intervals": self.intervals,
            "events": self.events,
            "last_written_unix_s": self.last_written_unix_s,
            "problems": self.problems,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class FailureGroup:
    """Trials that ended for one reason, up to the numbers in it."""

    status: str
    reason: str
    """Of the first."""
    alike: bool
    """Whether all have the very same."""
    trials: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepAccount:
    """A sweep."""

    look: Look
    plan: dict[str, Any]
    settings: tuple[str, ...]
    """Of the best trial: `A.B=V` for each field that is not its preset's."""
    preset: str
    """Of the best trial."""
    failures: tuple[FailureGroup, ...]
    claims: tuple[str, ...]
    """What a confirmation shows, a line each."""
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        best = self.look.best
        return {
            "kind": "sweep",
            **self.look.summary(),
            "best_settings": self.settings,
            "best_preset": self.preset,
            "best_is_selected_on_its_own_scores": best is not None,
            "failures": [
                {"status": f.status, "reason": f.reason, "trials": f.trials} for f in self.failures
            ],
            "claims": self.claims,
            "trials": self.look.records,
            "problems": self.problems,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Documents of a ledger that are about as long."""

    label: str
    documents: int
    bpb: float


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerAccount:
    """A ledger: what test-time training scored, document by document."""

    name: str
    place: str
    weights: str | None
    documents: int
    tokens: int
    bytes_scored: int
    nats: float
    bpb: float | None
    lengths: tuple[Lengths, ...]
    header: dict[str, Any]
    problems: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "kind": "ledger",
            "name": self.name,
            "place": self.place,
            "weights": self.weights,
            "documents_scored": self.documents,
            "tokens_scored": self.tokens,
            "bytes_scored": self.bytes_scored,
            "loss_nats": self.nats / self.tokens if self.tokens else None,
            "bpb": self.bpb,
            "lengths": [
                {"tokens": one.label, "documents": one.documents, "bpb": one.bpb}
                for one in self.lengths
            ],
            "header": self.header,
            "problems": self.problems,
        }


Account = RunAccount | SweepAccount | LedgerAccount
