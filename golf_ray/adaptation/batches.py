"""A step's tensors: built on the host in one piece, sent to the device at once.

A step may be padded to a *shape*, of which there are few, so that its kernels can be captured once
and replayed: with documents of nothing, which take the bank's spare row, and with segments of
nothing, which reach no document.

Shapes: N documents, T rows of the flat buffer, S predictions scored.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from golf_ray.adaptation.packing import Step
from golf_ray.kernels.grouped import Stretches, tables_of, tile_rows_of, within_of
from golf_ray.model.segments import Segments, TailRows

ALIGN = 4
"""int32 of 16 bytes, at which kernels read whole vectors."""
Array = NDArray[Any]


class Span(Protocol):
    """A stretch of the token stream."""

    @property
    def start(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Shape:
    """What a step is padded to."""

    tokens: int
    documents: int
    tile_rows: int
    """Of the products' tiles over all rows."""
    chunk_size: int
    window: int

    @property
    def num_bounds(self) -> int:
        """Bounds of segments: of documents, and of those that fill up."""
        return self.documents + self.num_fillers + 2

    @property
    def num_fillers(self) -> int:
        """Segments that fill up: as many as stay within the window whatever there is to fill."""
        return self.tokens // self.window + 1

    @property
    def num_tiles(self) -> int:
        """Most tiles that so many documents, and what fills up, are cut into."""
        return self.tokens // self.tile_rows + self.documents + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class HostBatch:
    """A step on the host."""

    wide: Array
    """int64: all arrays of that type, one behind the other."""
    narrow: Array
    """int32: likewise."""
    wide_places: tuple[tuple[int, tuple[int, ...]], ...]
    """Where each begins, and its shape."""
    narrow_places: tuple[tuple[int, tuple[int, ...]], ...]
    rows: tuple[int, ...]
    """Rows of the bank, the spare one for documents of nothing."""
    lengths: tuple[int, ...]
    """Window tokens of each document."""
    counts: tuple[int, ...]
    """Predictions scored of each."""
    loss_places: Array
    """int64: where the losses of real documents, the first, go in the run's."""
    max_seqlen: int
    max_scored: int
    tile_rows: int
    num_tokens: int

    @staticmethod
    def of(
        step: Step,
        documents: Sequence[Span],
        loss_places: Sequence[int],
        tokens: NDArray[np.integer],
        shape: Shape | None = None,
        spare_row: int = -1,
    ) -> HostBatch:
        """The batch of a step.

        Args:
            documents: of the step's members.
            loss_places: where each document's first loss goes.
            tokens: the whole stream.
            shape: what to pad to, which has room for it.
            spare_row: of the bank, for documents of nothing.
        """
        chunks = [member.chunk for member in step.members]
        rows = [member.row for member in step.members]
        lengths = [chunk.window_tokens for chunk in chunks]
        counts = [chunk.num_scored for chunk in chunks]
        windows, targets, wanted = [], [], []
        for chunk, document, place in zip(chunks, documents, loss_places, strict=True):
            start = document.start
            windows.append(tokens[start + chunk.window_start : start + chunk.end])
            targets.append(tokens[start + chunk.start + 1 : start + chunk.end + 1])
            wanted.append(np.arange(place + chunk.start, place + chunk.end))
        fillers: list[int] = []
        if shape is not None:
            nothing = shape.documents - len(rows)
            rows += [spare_row] * nothing
            lengths += [shape.chunk_size] * nothing
            counts += [shape.chunk_size] * nothing
            rest = shape.tokens - sum(lengths)
            assert nothing >= 0 and rest >= 0, (shape, nothing, rest)
            # Evenly, because attention takes a segment's square: what fills up is next to no work
            # for it.
            size, longer = divmod(rest, shape.num_fillers)
            fillers = [size + 1] * longer + [size] * (shape.num_fillers - longer)
            zeros = np.zeros(rest + nothing * shape.chunk_size, tokens.dtype)
            windows.append(zeros)
            targets.append(zeros[: nothing * shape.chunk_size])
        stretches = [*lengths, *fillers]
        ends = np.cumsum(stretches)
        begins = np.repeat(ends - stretches, stretches)
        places = [np.arange(e - c, e) for e, c in zip(ends, counts, strict=False)]
        bounds = np.concatenate(([0], ends))
        scored = np.concatenate(([0], np.cumsum(counts)))
        tile_rows = tile_rows_of(lengths) if shape is None else shape.tile_rows
        tiles, spans = tables_of(lengths, rows, tile_rows)
        if sum(fillers):
            # Their results go nowhere, but must be numbers.
            spare, _ = tables_of([sum(fillers)], [spare_row], tile_rows)
            spare[:, :2] += sum(lengths)
            tiles = np.concatenate([tiles, spare])
        last_tiles, last_spans = tables_of(counts, rows, tile_rows_of(counts))
        if shape is not None:
            bounds = _filled(bounds, shape.num_bounds, bounds[-1])
            scored = _filled(scored, shape.num_bounds, scored[-1])
            tiles = np.concatenate([tiles, np.zeros((shape.num_tiles - len(tiles), 3), np.int32)])
        wide, wide_places = _packed(
            [
                np.concatenate(windows),
                np.concatenate(targets),
                np.arange(len(begins)) - begins,
                np.concatenate(places),
            ],
            np.int64,
        )
        within = within_of(lengths, len(begins)), within_of(counts, sum(counts))
        narrow, narrow_places = _packed(
            [bounds, scored, tiles, spans, last_tiles, last_spans, *within], np.int32
        )
        return HostBatch(
            wide=wide,
            narrow=narrow,
            wide_places=wide_places,
            narrow_places=narrow_places,
            rows=tuple(rows),
            lengths=tuple(lengths),
            counts=tuple(counts),
            loss_places=np.concatenate(wanted),
            max_seqlen=max(lengths) if shape is None else shape.window,
            max_scored=max(counts),
            tile_rows=tile_rows,
            num_tokens=len(begins),
        )

    def on(self, device: torch.device) -> Batch:
        """The batch on a device."""
        return self.over(send(self.wide, device), send(self.narrow, device))

    def over(self, wide: Tensor, narrow: Tensor) -> Batch:
        """The batch whose arrays are views of two tensors that hold, or will hold, its own."""
        ids_T, targets_S, positions_T, places_S = _views(wide, self.wide_places)
        bounds, scored, tiles, spans, last_tiles, last_spans, within, last_within = _views(
            narrow, self.narrow_places
        )
        body = Stretches(
            lengths=self.lengths,
            bank_rows=self.rows,
            num_rows=self.num_tokens,
            tile_rows=self.tile_rows,
            tiles=tiles,
            documents=spans,
            within=within,
        )
        ends = Stretches(
            lengths=self.counts,
            bank_rows=self.rows,
            num_rows=len(targets_S),
            tile_rows=tile_rows_of(self.counts),
            tiles=last_tiles,
            documents=last_spans,
            within=last_within,
        )
        return Batch(
            ids_T=ids_T,
            targets_S=targets_S,
            segments=Segments(
                cu_seqlens=bounds, max_seqlen=self.max_seqlen, positions_T=positions_T
            ),
            tail=TailRows(places_S=places_S, cu_seqlens=scored, max_seqlen=self.max_scored),
            rows=self.rows,
            lengths=self.lengths,
            counts=self.counts,
            body=body,
            ends=ends,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What a pass over a step takes."""

    ids_T: Tensor
    """int64 [T]: the windows, one behind the other."""
    targets_S: Tensor
    """int64 [S]: what the scored rows predict."""
    segments: Segments
    tail: TailRows
    """The rows that are scored."""
    rows: tuple[int, ...]
    """Rows of the bank."""
    lengths: tuple[int, ...]
    """Window tokens of each document."""
    counts: tuple[int, ...]
    """Predictions scored of each."""
    body: Stretches
    ends: Stretches
    """How all rows, and the scored ones, fall to documents."""


def send(array: Array, device: torch.device) -> Tensor:
    """An array on a device, without waiting for it."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


def _filled(bounds: Array, count: int, value: int) -> Array:
    assert len(bounds) <= count
    return np.concatenate((bounds, np.full(count - len(bounds), value)))


def _packed(
    arrays: Sequence[Array], dtype: type[np.generic]
) -> tuple[Array, tuple[tuple[int, tuple[int, ...]], ...]]:
    sizes = [-(-array.size // ALIGN) * ALIGN for array in arrays]
    packed = np.zeros(sum(sizes), dtype=dtype)
    places = [0, *itertools.accumulate(sizes[:-1])]
    for array, place in zip(arrays, places, strict=True):
        packed[place : place + array.size] = array.reshape(-1)
    return packed, tuple((p, a.shape) for p, a in zip(places, arrays, strict=True))


def _views(packed: Tensor, places: tuple[tuple[int, tuple[int, ...]], ...]) -> list[Tensor]:
    return [packed[place : place + int(np.prod(shape))].view(shape) for place, shape in places]
