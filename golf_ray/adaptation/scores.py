"""Documents, and what test-time training says of them.

Invariant: a document's index is its place in the whole stream's documents, also in a sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from golf_ray.metric import Score


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A stretch of the token stream, as `golf_ray.data.documents` cuts it."""

    index: int
    """Place in the whole stream's documents, also in a sample: it decides the adapter's A."""
    start: int
    end: int

    @property
    def num_predictions(self) -> int:
        """Predictions: every token but the first is predicted."""
        return max(0, self.end - self.start - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkEvent:
    """When a chunk was scored and when the adapters learned from it: numbers of one rising count.

    The count runs over the events of all documents of an engine.
    """

    chunk: int
    scored_at: int
    updated_at: int | None
    """None for a document's last chunk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentScore:
    """What one document scored."""

    index: int
    nats: float
    """Sum of the losses, exactly rounded in float64."""
    tokens: int
    num_bytes: int
    trace: tuple[ChunkEvent, ...]
    token_nats: NDArray[np.float32] | None = None
    """Losses in order, where they were asked for."""

    @property
    def score(self) -> Score:
        """The sums alone."""
        return Score(nats=self.nats, tokens=self.tokens, num_bytes=self.num_bytes)
