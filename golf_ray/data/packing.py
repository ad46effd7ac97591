"""Document packing: one flat buffer of tokens, and where its attention segments begin.

A segment begins at position 0, at every BOS, and every `seq_len` tokens inside a long document,
counted from the segment's start. No token attends beyond its segment. Reading the tokens is the
loader's work.

Invariant: bounds begin with 0, end with the number of tokens, rise strictly before the padding,
and no segment is longer than `seq_len`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from golf_ray.data.shards import BOS_ID

BOUNDS_MULTIPLE: Final = 64
"""Padded bounds have a multiple of so many entries, so that compiled shapes stay few."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """One micro-batch of one rank."""

    x: NDArray[np.int64]
    """[n] input ids."""
    y: NDArray[np.int64]
    """[n] target ids: the inputs one token later."""
    cu_seqlens: NDArray[np.int32]
    """[m] segment bounds, padded with n to a multiple of `BOUNDS_MULTIPLE` entries."""
    max_seqlen: int
    """No segment is longer, in tokens; the same for every batch of a loader."""


def segment_bounds(
    tokens: NDArray[np.integer], seq_len: int, bos_id: int = BOS_ID
) -> NDArray[np.int32]:
    """Cumulative segment lengths of a flat buffer, unpadded.

    Args:
        tokens: [T] input ids.
        seq_len: longest segment in tokens.

    Returns:
        int32 [segments + 1]: 0, each further segment's start, T.
    """
    assert seq_len > 0
    total = len(tokens)
    starts = np.flatnonzero(np.asarray(tokens) == bos_id)
    if total and (len(starts) == 0 or starts[0] != 0):
        starts = np.concatenate(([0], starts))
    lengths = np.diff(starts, append=total)
    pieces = -(-lengths // seq_len)
    # Piece k of a document starts k * seq_len after it: its rank among all pieces less the rank
    # of the document's first piece.
    first_piece = np.cumsum(pieces) - pieces
    within = np.arange(int(pieces.sum())) - np.repeat(first_piece, pieces)
    bounds = np.append(np.repeat(starts, pieces) + within * seq_len, total)
    return bounds.astype(np.int32)


def pad_bounds(
    bounds: NDArray[np.int32], total: int, multiple: int = BOUNDS_MULTIPLE
) -> NDArray[np.int32]:
    """Bounds padded with `total` to a multiple of `multiple` entries.

    The padding stands for empty segments at the buffer's end.
    """
    padding = -len(bounds) % multiple
    return np.pad(bounds, (0, padding), constant_values=total).astype(np.int32)


def pack(tokens: NDArray[np.integer], seq_len: int, bos_id: int = BOS_ID) -> PackedBatch:
    """The batch of n + 1 consecutive ids: the first n are inputs, the last n targets."""
    ids = np.asarray(tokens).astype(np.int64)
    x = ids[:-1]
    bounds = segment_bounds(x, seq_len, bos_id)
    return PackedBatch(
        x=x,
        y=ids[1:],
        cu_seqlens=pad_bounds(bounds, len(x)),
        max_seqlen=min(seq_len, len(x)),
    )
