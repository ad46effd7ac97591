"""What a training says while it runs, and to whom.

The loop speaks to a `Reporter` and knows neither files nor Ray. Every rank calls every method
equally often and in the same order, so an implementation may wait for all ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WriteFolder = Callable[[Path], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """The state of a run after some steps."""

    step: int
    """Steps done."""
    num_steps: int
    """Steps of the run at most."""
    train_loss_nats: float
    """Mean loss of the last step."""
    grad_norm: float
    """Gradient norm of the last step before clipping."""
    lr_multiplier: float
    """Schedule's factor on the learning rates in the last step."""
    muon_momentum: float
    """Muon's momentum in the last step."""
    looping: bool
    """Whether the last step looped."""
    elapsed_s: float
    """Training time, without validation and checkpoints."""
    frac: float
    """Part of the run that is over."""
    tokens: int
    """Tokens trained on so far."""
    tokens_per_s: float
    """Over the steps since the last interval."""
    val_loss_nats: float | None = None
    """Packed evaluation of the raw weights, where one was due."""
    val_bpb: float | None = None
    """The same in bits per byte."""
    val_tokens: int | None = None
    """Tokens that these are of."""
    val_bytes: int | None = None
    """Bytes of text that those stand for."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


class Reporter:
    """Listens to one rank of a training; this one does nothing."""

    def begin(self, step: int, num_steps: int) -> None:
        """The run is about to take zero-based `step`; above 0 it goes on from a checkpoint."""

    def prepared(self, seconds: float, code: dict[str, Any]) -> None:
        """Everything is compiled; `code` says where compiled code was found, and what went wrong
        with that."""

    def stepped(self, step: int, loss_nats: float) -> None:
        """Steps done so far, and a recent loss; called at every step and to be quick."""

    def interval(self, interval: Interval) -> None:
        """A record is due."""

    def checkpoint(self, step: int, write: WriteFolder, *, final: bool) -> None:
        """A checkpoint is due: `write(folder)` fills an empty folder. It does so on rank 0 only;
        on the others it takes its part in what ranks do together and writes nothing."""
