"""The score: sums of nats, tokens and bytes, and what is derived from them.

Sums are kept in float64 and added in a fixed order by whoever owns them; means are derived at the
end, so that scores of parts add up to the score of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

LN2 = math.log(2.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """Sums over scored tokens."""

    nats: float
    """Sum of the losses in nats."""
    tokens: int
    """Tokens scored."""
    num_bytes: int
    """Bytes of text that those tokens stand for."""

    @staticmethod
    def zero() -> Score:
        """The score of nothing."""
        return Score(nats=0.0, tokens=0, num_bytes=0)

    def __add__(self, other: Score) -> Score:
        return Score(
            nats=self.nats + other.nats,
            tokens=self.tokens + other.tokens,
            num_bytes=self.num_bytes + other.num_bytes,
        )

    @property
    def loss_nats(self) -> float:
        """Mean loss a token in nats; NaN of nothing."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def bpb(self) -> float:
        """Bits per byte: mean nats / ln 2 * tokens / bytes; NaN of nothing."""
        return self.nats / LN2 / self.num_bytes if self.num_bytes else math.nan


def total(scores: Iterable[Score]) -> Score:
    """The sum in the order given; nats through `math.fsum`, so that the order does not matter."""
    scores = list(scores)
    return Score(
        nats=math.fsum(s.nats for s in scores),
        tokens=sum(s.tokens for s in scores),
        num_bytes=sum(s.num_bytes for s in scores),
    )
