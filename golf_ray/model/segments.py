"""Segments: which stretches of a flat buffer of tokens attend to one another.

All passes (training, calibration, evaluation, adaptation) see one flat buffer of T tokens cut into
segments; attention is causal and never leaves a segment.

Shapes: T tokens, N segments. Invariant: `cu_seqlens` rises from 0 to T and may end in repetitions
of T (empty segments), so that compiled shapes stay few.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Segments:
    """Borders, longest length and positions of the segments of a flat buffer."""

    cu_seqlens: Tensor
    """int32 [N + 1], possibly padded with T."""
    max_seqlen: int
    """Length of the longest segment, or more."""
    positions_T: Tensor
    """int64 [T]: rotary positions; only differences inside a segment matter."""

    @staticmethod
    def of_bounds(bounds: Any, max_seqlen: int, device: torch.device | str = "cpu") -> Segments:
        """Segments of a packed buffer; positions are those of the buffer.

        Args:
            bounds: int [N + 1] array or tensor, 0 ... T, possibly padded with T.
            max_seqlen: length of the longest segment.
        """
        cu_seqlens = torch.as_tensor(bounds, dtype=torch.int32)
        positions_T = torch.arange(int(cu_seqlens[-1]), device=device)
        return Segments(
            cu_seqlens=cu_seqlens.to(device), max_seqlen=max_seqlen, positions_T=positions_T
        )

    @staticmethod
    def of_lengths(lengths: Sequence[int], device: torch.device | str = "cpu") -> Segments:
        """Segments of the given lengths, positions from 0 in each."""
        bounds = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        bounds[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
        positions = [torch.arange(n) for n in lengths]
        positions_T = torch.cat(positions) if positions else torch.zeros(0, dtype=torch.int64)
        return Segments(
            cu_seqlens=bounds.to(device),
            max_seqlen=max(lengths, default=0),
            positions_T=positions_T.to(device),
        )

    @staticmethod
    def rows(num_rows: int, length: int, device: torch.device | str = "cpu") -> Segments:
        """`num_rows` segments of one length, positions from 0 in each (dense rows)."""
        return Segments.of_lengths([length] * num_rows, device)

    def lengths(self) -> list[int]:
        """Lengths of the segments that are not empty; waits for the device."""
        return segment_lengths(self.cu_seqlens)


@dataclass(frozen=True, kw_only=True, slots=True)
class TailRows:
    """The last rows of each segment, where only those of a pass's outputs are wanted."""

    places_S: Tensor
    """int64 [S]: the rows, in order."""
    cu_seqlens: Tensor
    """int32 [N + 1]: how the S rows fall to segments, as `Segments.cu_seqlens` says of all rows."""
    max_seqlen: int
    """Most wanted rows of a segment, or more."""

    def of(self, x_TD: Tensor) -> Tensor:
        """Those rows of a tensor."""
        return x_TD.index_select(0, self.places_S)


def segment_lengths(cu_seqlens: Tensor) -> list[int]:
    """Lengths of the segments that are not empty; waits for the device."""
    return [b - a for a, b in itertools.pairwise(cu_seqlens.tolist()) if b > a]
