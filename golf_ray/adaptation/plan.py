"""What test-time training will do, before it is done: chunks, windows, groups and their cost.

Pure functions of lengths and configuration: no tensor, no clock, no worker count. Shapes of every
step follow from a plan alone, which is why a result does not depend on who computes it.

Invariant: every document is in exactly one group; a chunk's window never reaches beyond its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from golf_ray.config import AdaptationConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Predictions [start, end) of a document, and where the window that computes them begins."""

    start: int
    """First prediction scored."""
    end: int
    """One past the last prediction scored, and the window's end."""
    window_start: int
    """First prediction of the window."""

    @property
    def num_scored(self) -> int:
        """Predictions scored."""
        return self.end - self.start

    @property
    def window_tokens(self) -> int:
        """Predictions that the forward sees."""
        return self.end - self.window_start


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Documents that advance together, chunk by chunk."""

    members: tuple[int, ...]
    """Places in the list of lengths that was planned, longest first."""
    window_tokens: int
    """Cost: tokens of all windows."""
    num_chunks: int
    """Serial steps: chunks of the longest member."""


def count_chunks(num_predictions: int, chunk_size: int) -> int:
    """Chunks of a document; none without predictions."""
    return -(-num_predictions // chunk_size)


def chunk_at(number: int, num_predictions: int, chunk_size: int, window: int) -> Chunk:
    """Chunk `number` of a document; the last may be shorter than `chunk_size`."""
    start = number * chunk_size
    end = min(start + chunk_size, num_predictions)
    assert 0 <= start < end
    return Chunk(start=start, end=end, window_start=max(0, end - window))


def windows(num_predictions: int, chunk_size: int, window: int) -> tuple[Chunk, ...]:
    """All chunks of a document in order."""
    numbers = range(count_chunks(num_predictions, chunk_size))
    return tuple(chunk_at(c, num_predictions, chunk_size, window) for c in numbers)


def window_tokens(num_predictions: int, chunk_size: int, window: int) -> int:
    """Tokens of all windows of a document, in closed form: what its time is about proportional to.

    Whole chunk c ends at (c + 1) * chunk_size, so windows grow in even steps until they are full.
    """
    whole, rest = divmod(num_predictions, chunk_size)
    growing = min(whole, window // chunk_size)
    tokens = chunk_size * growing * (growing + 1) // 2 + (whole - growing) * window
    return tokens + (min(num_predictions, window) if rest else 0)


def plan_groups(lengths: Sequence[int], adaptation: AdaptationConfig) -> tuple[Group, ...]:
    """Documents in groups of at most `group_documents` of similar length, longest first.

    Args:
        lengths: predictions of each document.

    Returns:
        Groups over places in `lengths`; equal lengths keep their order.
    """
    assert all(n >= 0 for n in lengths)
    order = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    size, chunk_size = adaptation.group_documents, adaptation.chunk_size
    groups = []
    for first in range(0, len(order), size):
        members = tuple(order[first : first + size])
        groups.append(
            Group(
                members=members,
                window_tokens=sum(
                    window_tokens(lengths[m], chunk_size, adaptation.window) for m in members
                ),
                num_chunks=count_chunks(lengths[members[0]], chunk_size),
            )
        )
    return tuple(groups)
