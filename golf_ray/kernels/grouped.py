"""Products of many documents' low-rank adapters with the rows of a flat buffer, and their step.

A *bank* holds one row of parameters a document, all of its matrices one behind the other. Rows of
a flat buffer fall to documents in stretches; each stretch meets the matrices of its own document
and no other. A *job* says which columns of the buffers meet which matrix:

    rows      out[t, n] = sum_k x[t, k] M_doc(t)[n, k]           one job a block of columns
    linear    out[t, n] = sum_k x[t, k] W[n, k] + the rows' products of another buffer
    sums      grads_doc[a, b] = sum_t in doc u[t, a] w[t, b]

Here are the descriptions, the twins in torch, and the choice between twin and kernel; the kernels
are in `golf_ray.kernels.triton.grouped`.

Shapes: T rows, N documents of a step, P parameters of one document. Invariant: a row's results
follow from that row and its own document's matrices, and a document's sums from its own rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from golf_ray.kernels.wide import linear_in_float32

MOST_TILE_ROWS, LEAST_TILE_ROWS = 128, 32
"""Rows of a tile of the kernels: for long stretches, and for short ones."""
FLAT_ROWS = 128
"""Rows of the buffer, whosever they are, that `Stretches.within` speaks of at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretches:
    """How the rows of a flat buffer fall to documents, in order."""

    lengths: tuple[int, ...]
    """Rows of each document; none is empty."""
    bank_rows: tuple[int, ...]
    """Its row of the bank."""
    num_rows: int
    """Of the buffer. Those behind the documents' meet the tiles that say so, and enter no sum."""
    tile_rows: int
    """Rows of a tile at most; a tile never crosses documents."""
    tiles: Tensor
    """int32 [tiles, 3]: first row, one past the last, row of the bank; empty ones do nothing."""
    documents: Tensor
    """int32 [N, 3]: the same of whole documents."""
    within: Tensor
    """int32 [num_rows / FLAT_ROWS, 2]: the first document that has some of those rows, and how many
    documents have."""

    @property
    def slices(self) -> list[slice]:
        """Rows of each document."""
        ends = itertools.accumulate(self.lengths)
        return [slice(end - n, end) for end, n in zip(ends, self.lengths, strict=True)]

    @staticmethod
    def of(
        lengths: Sequence[int], bank_rows: Sequence[int], device: torch.device | str = "cpu"
    ) -> Stretches:
        """Stretches of the given lengths."""
        found = tables_of(lengths, bank_rows, tile_rows_of(lengths))
        tiles, documents = (torch.from_numpy(t).to(device) for t in found)
        within = torch.from_numpy(within_of(lengths, sum(lengths))).to(device)
        return Stretches(
            lengths=tuple(lengths),
            bank_rows=tuple(bank_rows),
            num_rows=sum(lengths),
            tile_rows=tile_rows_of(lengths),
            tiles=tiles,
            documents=documents,
            within=within,
        )


def tile_rows_of(lengths: Sequence[int]) -> int:
    """Rows of a tile: the most that a typical stretch fills."""
    typical = sum(lengths) / len(lengths)
    rows = MOST_TILE_ROWS
    while rows > LEAST_TILE_ROWS and rows > typical:
        rows //= 2
    return rows


def tables_of(
    lengths: Sequence[int], bank_rows: Sequence[int], rows: int
) -> tuple[np.ndarray[tuple[int, int], np.dtype[np.int32]], ...]:
    """`Stretches.tiles`, of so many rows at most, and `Stretches.documents`."""
    assert lengths and min(lengths) > 0, lengths
    length_N = np.asarray(lengths, dtype=np.int64)
    end_N = np.cumsum(length_N)
    documents = np.stack([end_N - length_N, end_N, np.asarray(bank_rows)], 1)
    count_N = -(-length_N // rows)
    of_tile = np.repeat(np.arange(len(length_N)), count_N)
    within = np.arange(len(of_tile)) - np.repeat(np.cumsum(count_N) - count_N, count_N)
    first = documents[of_tile, 0] + within * rows
    tiles = np.stack(
        [first, np.minimum(first + rows, documents[of_tile, 1]), documents[of_tile, 2]], 1
    )
    return tiles.astype(np.int32), documents.astype(np.int32)


def within_of(
    lengths: Sequence[int], num_rows: int
) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    """`Stretches.within` of a buffer of so many rows, the documents' first."""
    end_N = np.cumsum(np.asarray(lengths, dtype=np.int64))
    row = np.arange(0, num_rows, FLAT_ROWS)
    first = np.searchsorted(end_N, row, side="right")
    past = np.searchsorted(end_N - np.asarray(lengths), row + FLAT_ROWS, side="left")
    return np.stack([first, past - first], 1).astype(np.int32)


@dataclass(frozen=True, slots=True)
class RowsJob:
    """Columns [out, out + columns) of the result from columns [x, x + depth) and a matrix."""

    out: int
    columns: int
    x: int
    depth: int
    place: int
    """Where the matrix begins in a document's parameters."""


@dataclass(frozen=True, slots=True)
class SumsJob:
    """A matrix [rows, columns] of sums, from columns of either buffer."""

    u: int
    rows: int
    w: int
    columns: int
    place: int
    """Where it begins in a document's parameters; row-major."""


def rows_twin(
    x_TK: Tensor,
    bank_NP: Tensor,
    out_TO: Tensor,
    jobs: Sequence[RowsJob],
    stretches: Stretches,
    *,
    turned: bool,
) -> None:
    """The rows' products, document by document and job by job; see `rows`."""
    for rows, bank_row in zip(stretches.slices, stretches.bank_rows, strict=True):
        for job in jobs:
            flat = bank_NP[bank_row, job.place : job.place + job.columns * job.depth]
            shape = (job.depth, job.columns) if turned else (job.columns, job.depth)
            matrix = flat.view(shape) if turned else flat.view(shape).t()
            product = x_TK[rows, job.x : job.x + job.depth] @ matrix
            out_TO[rows, job.out : job.out + job.columns].copy_(product)


def linear_twin(
    x_TK: Tensor,
    w: Tensor,
    low_TW: Tensor,
    bank_NP: Tensor,
    jobs: Sequence[RowsJob],
    stretches: Stretches,
    *,
    turned: bool = False,
) -> Tensor:
    """The product and the rows' own, in float32 (float64 for float64); see `linear`."""
    dtype = torch.promote_types(x_TK.dtype, torch.float32)
    y_TO = x_TK.to(dtype) @ (w if turned else w.t()).to(dtype)
    own_TO = torch.zeros_like(y_TO)
    rows_twin(low_TW.to(dtype), bank_NP.to(dtype), own_TO, jobs, stretches, turned=turned)
    return y_TO + own_TO


def sums_twin(
    u_TA: Tensor,
    w_TB: Tensor,
    grads_NP: Tensor,
    jobs: Sequence[SumsJob],
    stretches: Stretches,
) -> None:
    """The documents' sums; see `sums`."""
    for rows, bank_row in zip(stretches.slices, stretches.bank_rows, strict=True):
        for job in jobs:
            found = (
                u_TA[rows, job.u : job.u + job.rows].t() @ w_TB[rows, job.w : job.w + job.columns]
            )
            flat = grads_NP[bank_row, job.place : job.place + job.rows * job.columns]
            flat.view(job.rows, job.columns).copy_(found)


def rows(
    x_TK: Tensor,
    bank_NP: Tensor,
    out_TO: Tensor,
    jobs: Sequence[RowsJob],
    stretches: Stretches,
    *,
    turned: bool = False,
) -> None:
    """Write the products of rows with their document's matrices, as one kernel.

    Args:
        out_TO: result, changed in place.
        turned: a matrix lies as [depth, columns]; otherwise as [columns, depth].
    """
    from golf_ray.kernels.triton import grouped

    grouped.rows(x_TK, bank_NP, out_TO, tuple(jobs), stretches, turned=turned)


def linear(
    x_TK: Tensor,
    w: Tensor,
    low_TW: Tensor,
    bank_NP: Tensor,
    jobs: Sequence[RowsJob],
    stretches: Stretches,
    *,
    turned: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """One matrix's product with all rows plus each document's with its own, [T, O].

    One kernel where its shapes allow, and in any case rounded once. cuBLAS rounds a product before
    it adds it to what is there (CUDA 13.0 on an H200, bfloat16, whatever the shape or the
    settings), and what is less than half of the product's last place is lost then: an eighth of
    adapters that add a hundredth to rows of rms 1.

    Args:
        w: [O, K], or [K, O] if turned.
        low_TW: the buffer of the jobs' x columns.
        jobs: columns that none speaks of are the product alone.
        turned: the jobs' matrices lie as [depth, columns] too.
        dtype: of the result; x's where none is given.
    """
    from golf_ray.kernels.triton import grouped

    dtype, jobs = dtype or x_TK.dtype, tuple(jobs)
    if not grouped.takes(x_TK, w, jobs, dtype, turned=turned):
        y_TO = linear_in_float32(x_TK, w.t() if turned else w)
        own_TO = torch.zeros_like(y_TO)
        grouped.rows(low_TW, bank_NP, own_TO, jobs, stretches, turned=turned)
        return y_TO.add_(own_TO).to(dtype)
    return grouped.linear(x_TK, w, low_TW, bank_NP, jobs, stretches, turned=turned, dtype=dtype)


def sums(
    u_TA: Tensor,
    w_TB: Tensor,
    grads_NP: Tensor,
    jobs: Sequence[SumsJob],
    stretches: Stretches,
) -> None:
    """Write the sums over each document's rows into its gradients, as one kernel."""
    from golf_ray.kernels.triton import grouped

    grouped.sums(u_TA, w_TB, grads_NP, tuple(jobs), stretches)
