"""Triton kernels of `golf_ray.kernels.grouped`: grouped products of adapters, and their step.

Shapes: T rows, N documents of a step, P parameters of one document. A program takes one tile of one
document's rows and one job, or one document and one tile of one job.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from golf_ray.kernels.grouped import FLAT_ROWS, RowsJob, Stretches, SumsJob
from golf_ray.kernels.triton.device import Tiling, bits_of, precision_of

COLUMNS = {16: 128, 32: 32}
"""Columns of a tile by bits of the arithmetic."""
DEPTH = {16: 64, 32: 32}
FLAT_COLUMNS, FLAT_DEPTH = 64, 32
"""Of products over a rank, which are little more than a write of the result: 96,256 rows of rank 96
onto 1,024 columns in bfloat16 on an H200 took a tenth longer with wider tiles."""
LINEAR = {
    # 63,488 rows of 31 documents in bfloat16 on an H200, in ms, with cuBLAS behind a kernel of the
    # adapters in brackets: 512 -> 1,024 with rank 96 0.160 (0.207), 512 -> 512 0.088 (0.114).
    16: Tiling(rows=128, columns=128, depth=64, warps=4, stages=3),
    # Float32 is no tensor cores' work: to be right, not fast.
    32: Tiling(rows=32, columns=32, depth=32, warps=4, stages=2),
}
LINEAR_DEEP = Tiling(rows=128, columns=256, depth=64, warps=8, stages=4)
"""In 16 bits, for many products an element: 2,048 -> 512 0.218 ms (0.237), and 0.223 the other way;
1,024 -> 512 with 384 more columns 0.160 (0.175), and 0.164."""
DEEP = 1024
LINEAR_DEPTH = 32
"""Columns of the adapters' part at a time."""
DESCRIPTOR_BYTES = 16
"""Rows of tensor descriptors, and where they begin, are multiples of it."""
SUMS_TILE = {16: 128, 32: 32}
SUMS_DEPTH = {16: 64, 32: 32}
STEP_ELEMENTS = 2048
"""Parameters of a program of the optimizer."""
ALIGNED = 8
"""Elements of 16 bytes: places and strides of a multiple of it are read in whole vectors."""


@triton.jit
def _rows(
    x, bank, out, jobs, tiles, bank_stride, num_jobs, x_stride, out_stride,
    TURNED: tl.constexpr, EVEN: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out[t, n] = sum_k x[t, k] M[n, k] for a tile of rows and one job's columns."""
    # Neighbours share rows, which are then read from the cache.
    tile = tiles + (tl.program_id(0) // num_jobs) * 3
    job = jobs + (tl.program_id(0) % num_jobs) * 6
    first, end, document = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if first >= end:
        return
    to = tl.multiple_of(tl.load(job), ALIGN)
    columns = tl.multiple_of(tl.load(job + 1), ALIGN)
    begin = tl.multiple_of(tl.load(job + 2), ALIGN)
    depth = tl.load(job + 3)
    place = tl.multiple_of(tl.load(job + 4), ALIGN)
    stride = tl.multiple_of(tl.load(job + 5), ALIGN)
    row = (first + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    inside = row < end
    n = tl.arange(0, BLOCK_N)[None, :]
    k = tl.arange(0, BLOCK_K)
    matrix = bank + document.to(tl.int64) * bank_stride + place
    left = x + row * x_stride + begin + k[None, :]
    if TURNED:
        right = matrix + k[:, None] * stride + n
    else:
        right = matrix + n * stride + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        if EVEN:
            a = tl.load(left, mask=inside, other=0.0)
            b = tl.load(right, mask=n < columns, other=0.0)
        else:
            rest = depth - start
            a = tl.load(left, mask=inside & (k[None, :] < rest), other=0.0)
            b = tl.load(right, mask=(n < columns) & (k[:, None] < rest), other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        left += BLOCK_K
        right += BLOCK_K * stride if TURNED else BLOCK_K
    target = out + row * out_stride + to + n
    tl.store(target, total.to(out.dtype.element_ty), mask=inside & (n < columns))


@triton.jit
def _linear(
    x_desc, w_desc, low, bank, out_desc, out, jobs, documents, within, num_rows, num_jobs,
    bank_stride, low_stride, out_stride,
    K: tl.constexpr, DEPTH: tl.constexpr, TURNED: tl.constexpr, ALIGN: tl.constexpr,
    FLAT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[t, n] = sum_k x[t, k] W[n, k] + sum_r low[t, r] M[n, r], M that of the row's document.

    Tiles are of rows whosever they are, so that none is half empty: rows of another document are
    zeros to a document's matrix.
    """
    # Neighbours share rows, which are then read from the cache.
    row = (tl.program_id(0) // num_jobs) * BLOCK_M
    job = jobs + (tl.program_id(0) % num_jobs) * 6
    to = tl.multiple_of(tl.load(job), ALIGN)
    columns = tl.multiple_of(tl.load(job + 1), ALIGN)
    begin = tl.multiple_of(tl.load(job + 2), ALIGN)
    adapted = tl.load(job + 3) > 0
    place = tl.multiple_of(tl.load(job + 4), ALIGN)
    stride = tl.multiple_of(tl.load(job + 5), ALIGN)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        x = x_desc.load([row, k])
        if TURNED:
            total = tl.dot(x, w_desc.load([k, to]), total, input_precision=PRECISION)
        else:
            total = tl.dot(x, w_desc.load([to, k]).T, total, input_precision=PRECISION)
    rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    n = tl.arange(0, BLOCK_N)[None, :]
    r = tl.arange(0, BLOCK_R)
    entry = within + row // FLAT * 2
    document = documents + tl.load(entry) * 3
    count = tl.where(adapted, tl.load(entry + 1), 0)
    # Not pipelined: a document's own loop is, and few documents share a tile.
    for _ in tl.range(0, count, num_stages=1):
        first, end = tl.load(document), tl.load(document + 1)
        matrix = bank + tl.load(document + 2).to(tl.int64) * bank_stride + place
        mine = (rows >= first) & (rows < end)
        for start in range(0, DEPTH, BLOCK_R):
            part = start + r
            left = low + rows * low_stride + begin + part[None, :]
            if TURNED:
                right = matrix + part[:, None] * stride + n
            else:
                right = matrix + n * stride + part[:, None]
            if DEPTH % BLOCK_R == 0:
                a = tl.load(left, mask=mine, other=0.0)
                b = tl.load(right, mask=n < columns, other=0.0)
            else:
                a = tl.load(left, mask=mine & (part[None, :] < DEPTH), other=0.0)
                b = tl.load(right, mask=(n < columns) & (part[:, None] < DEPTH), other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION)
        document += 3
    y = total.to(out.dtype.element_ty)
    if columns == BLOCK_N:
        out_desc.store([row, to], y)
    else:
        tl.store(out + rows * out_stride + to + n, y, mask=(rows < num_rows) & (n < columns))


@triton.jit
def _sums(
    u, w, grads, jobs, documents, bank_stride, num_jobs, u_stride, w_stride, ALIGN: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """grads[a, b] = sum_t u[t, a] w[t, b] over the rows of one document, for one job's tile."""
    document = documents + (tl.program_id(0) // num_jobs) * 3
    job = jobs + (tl.program_id(0) % num_jobs) * 6
    first, end, row = tl.load(document), tl.load(document + 1), tl.load(document + 2)
    from_u = tl.multiple_of(tl.load(job), ALIGN)
    num_a = tl.multiple_of(tl.load(job + 1), ALIGN)
    from_w = tl.multiple_of(tl.load(job + 2), ALIGN)
    num_b = tl.multiple_of(tl.load(job + 3), ALIGN)
    place = tl.multiple_of(tl.load(job + 4), ALIGN)
    stride = tl.multiple_of(tl.load(job + 5), ALIGN)
    a = tl.arange(0, BLOCK_A)
    b = tl.arange(0, BLOCK_B)[None, :]
    t = tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for start in range(first, end, BLOCK_T):
        rows = (start + t).to(tl.int64)[:, None]
        inside = rows < end
        left = tl.load(u + rows * u_stride + from_u + a[None, :],
                       mask=inside & (a[None, :] < num_a), other=0.0)  # fmt: skip
        right = tl.load(w + rows * w_stride + from_w + b, mask=inside & (b < num_b), other=0.0)
        total = tl.dot(left.T, right, total, input_precision=PRECISION)
    to = grads + row.to(tl.int64) * bank_stride + place + a[:, None] * stride + b
    tl.store(to, total.to(grads.dtype.element_ty), mask=(a[:, None] < num_a) & (b < num_b))


@triton.jit
def _step(
    p, grads, second, first, shadow, documents, factors, num_parameters, lr, decay,
    beta1, beta2, eps,
    MOMENTUM: tl.constexpr, SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One step of AdamW or SGD of one document; see `golf_ray.adaptation.optimizer`."""
    row = tl.load(documents + tl.program_id(1) * 3 + 2).to(tl.int64) * num_parameters
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = col < num_parameters
    place = row + col
    gradient = tl.load(grads + place, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(p + place, mask=mask, other=0.0) * decay
    towards = gradient
    if SECOND:
        square = tl.load(second + place, mask=mask, other=0.0)
        square = beta2 * square + (1 - beta2) * gradient * gradient
        tl.store(second + place, square, mask=mask)
        if MOMENTUM:
            mean = tl.load(first + place, mask=mask, other=0.0)
            mean += (1 - beta1) * (gradient - mean)
            tl.store(first + place, mean, mask=mask)
            towards = mean * tl.load(factors + tl.program_id(1) * 2 + 1)
        root = tl.load(factors + tl.program_id(1) * 2)
        towards = towards / (tl.sqrt(square) * root + eps)
    elif MOMENTUM:
        towards += beta1 * tl.load(first + place, mask=mask, other=0.0)
        tl.store(first + place, towards, mask=mask)
    value -= lr * towards
    tl.store(p + place, value, mask=mask)
    tl.store(shadow + place, value.to(shadow.dtype.element_ty), mask=mask)


@functools.lru_cache(maxsize=4096)
def _rows_table(
    jobs: tuple[RowsJob, ...], turned: bool, columns: int, device: torch.device
) -> tuple[Tensor, bool, int]:
    """Jobs cut into tiles of columns, int32 [n, 6]; their alignment; what divides their depths."""
    table = [line for job in jobs for line in _cut(job, turned, columns)]
    return _table(table, (0, 1, 2, 4, 5), device)


def _cut(job: RowsJob, turned: bool, columns: int) -> list[tuple[int, ...]]:
    """First column, how many, first column of x, depth, place and stride of the matrix, by tile."""
    stride = job.columns if turned else job.depth
    table: list[tuple[int, ...]] = []
    for start in range(0, job.columns, columns):
        count = min(columns, job.columns - start)
        place = job.place + (start if turned else start * stride)
        table.append((job.out + start, count, job.x, job.depth, place, stride))
    return table


@functools.lru_cache(maxsize=4096)
def _linear_table(
    jobs: tuple[RowsJob, ...], turned: bool, columns: int, features: int, device: torch.device
) -> tuple[Tensor, bool, int]:
    """`_rows_table` of all columns; those that no job speaks of have a depth of 0."""
    table: list[tuple[int, ...]] = []
    at = 0
    for job in [*sorted(jobs, key=lambda job: job.out), RowsJob(features, 0, 0, 0, 0)]:
        for start in range(at, job.out, columns):
            table.append((start, min(columns, job.out - start), 0, 0, 0, 0))
        table += _cut(job, turned, columns)
        at = job.out + job.columns
    return _table(table, (0, 1, 2, 4, 5), device)


@functools.lru_cache(maxsize=4096)
def _sums_table(
    jobs: tuple[SumsJob, ...], tile: int, device: torch.device
) -> tuple[Tensor, bool, int]:
    table = []
    for job in jobs:
        for a in range(0, job.rows, tile):
            for b in range(0, job.columns, tile):
                place = job.place + a * job.columns + b
                count = min(tile, job.rows - a), min(tile, job.columns - b)
                table.append((job.u + a, count[0], job.w + b, count[1], place, job.columns))
    return _table(table, (0, 1, 2, 3, 4, 5), device)


def _table(
    table: Sequence[tuple[int, ...]], places: Sequence[int], device: torch.device
) -> tuple[Tensor, bool, int]:
    aligned = all(line[i] % ALIGNED == 0 for line in table for i in places)
    depth = math.gcd(*(line[3] for line in table))
    tensor = torch.tensor(table, dtype=torch.int32, device=device)
    return tensor, aligned, depth


def rows(
    x_TK: Tensor,
    bank_NP: Tensor,
    out_TO: Tensor,
    jobs: tuple[RowsJob, ...],
    stretches: Stretches,
    *,
    turned: bool,
) -> None:
    """Launch; see `golf_ray.kernels.grouped.rows`."""
    bits = bits_of(x_TK.dtype)
    flat = bits == 16 and all(job.depth % DEPTH[bits] for job in jobs)
    columns = FLAT_COLUMNS if flat else COLUMNS[bits]
    depth = FLAT_DEPTH if flat else DEPTH[bits]
    table, aligned, whole = _rows_table(jobs, turned, columns, x_TK.device)
    assert x_TK.stride(1) == out_TO.stride(1) == 1
    _rows[(len(stretches.tiles) * len(table),)](
        x_TK, bank_NP, out_TO, table, stretches.tiles,
        bank_NP.stride(0), len(table), x_TK.stride(0), out_TO.stride(0),
        TURNED=turned, EVEN=whole % depth == 0, ALIGN=ALIGNED if aligned else 1,
        BLOCK_M=stretches.tile_rows, BLOCK_N=columns, BLOCK_K=depth,
        PRECISION=precision_of(x_TK.dtype), num_warps=4 if flat or stretches.tile_rows < 128 else 8,
        num_stages=4 if flat else 3,
    )  # fmt: skip


def takes(
    x_TK: Tensor, w: Tensor, jobs: tuple[RowsJob, ...], dtype: torch.dtype, *, turned: bool
) -> bool:
    """Whether `linear` can: descriptors can address its operands and its result, and in 16 bits the
    product is of more than one iteration.

    Where it and the adapters' part are of one each, their operands begin at the same place of
    shared memory, and ptxas 12.8 (that of Triton 3.6) adds three of the latter's four descriptors
    to a register that holds something else: other operands are multiplied. 12.9 does not.
    """
    features, cut = w.shape[1 if turned else 0], LINEAR[bits_of(x_TK.dtype)]
    columns = {features, *(n for job in jobs for n in (job.out, job.out + job.columns))}
    size = min(x_TK.itemsize, dtype.itemsize)
    bytes_of_rows = x_TK.stride(0) * x_TK.itemsize, w.stride(0) * w.itemsize
    places = (*bytes_of_rows, x_TK.data_ptr(), w.data_ptr(), *(n * size for n in columns))
    if not x_TK.stride(1) == 1 == w.stride(1) or any(n % DESCRIPTOR_BYTES for n in places):
        return False
    return bits_of(x_TK.dtype) == 32 or x_TK.shape[1] > cut.depth


def linear(
    x_TK: Tensor,
    w: Tensor,
    low_TW: Tensor,
    bank_NP: Tensor,
    jobs: tuple[RowsJob, ...],
    stretches: Stretches,
    *,
    turned: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Launch; see `golf_ray.kernels.grouped.linear`."""
    (T, K), features, bits = x_TK.shape, w.shape[1 if turned else 0], bits_of(x_TK.dtype)
    (depth,) = {job.depth for job in jobs}
    assert low_TW.stride(1) == 1 and T == stretches.num_rows == len(low_TW)
    cut = LINEAR[bits]
    whole = all(n % LINEAR_DEEP.columns == 0 for job in jobs for n in (job.out, job.columns))
    if bits == 16 and K >= DEEP and whole:
        cut = LINEAR_DEEP
    table, aligned, _ = _linear_table(jobs, turned, cut.columns, features, x_TK.device)
    of_w = [cut.depth, cut.columns] if turned else [cut.columns, cut.depth]
    out_TO = x_TK.new_empty(T, features, dtype=dtype)
    _linear[(triton.cdiv(T, cut.rows) * len(table),)](
        TensorDescriptor.from_tensor(x_TK, [cut.rows, cut.depth]),
        TensorDescriptor.from_tensor(w, of_w),
        low_TW, bank_NP, TensorDescriptor.from_tensor(out_TO, [cut.rows, cut.columns]), out_TO,
        table, stretches.documents, stretches.within, T, len(table),
        bank_NP.stride(0), low_TW.stride(0), out_TO.stride(0),
        K=K, DEPTH=depth, TURNED=turned, ALIGN=ALIGNED if aligned else 1, FLAT=FLAT_ROWS,
        BLOCK_M=cut.rows, BLOCK_N=cut.columns, BLOCK_K=cut.depth, BLOCK_R=LINEAR_DEPTH,
        PRECISION=precision_of(x_TK.dtype), num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return out_TO


def sums(
    u_TA: Tensor, w_TB: Tensor, grads_NP: Tensor, jobs: tuple[SumsJob, ...], stretches: Stretches
) -> None:
    """Launch; see `golf_ray.kernels.grouped.sums`."""
    bits = bits_of(u_TA.dtype)
    tile, depth = SUMS_TILE[bits], SUMS_DEPTH[bits]
    table, aligned, _ = _sums_table(jobs, tile, u_TA.device)
    if stretches.tile_rows <= depth // 2:
        depth //= 2
    assert u_TA.stride(1) == w_TB.stride(1) == 1
    _sums[(len(stretches.documents) * len(table),)](
        u_TA, w_TB, grads_NP, table, stretches.documents,
        grads_NP.stride(0), len(table), u_TA.stride(0), w_TB.stride(0),
        ALIGN=ALIGNED if aligned else 1, BLOCK_A=tile, BLOCK_B=tile, BLOCK_T=depth,
        PRECISION=precision_of(u_TA.dtype), num_warps=8 if bits == 16 else 4, num_stages=3,
    )  # fmt: skip


def step(
    p_NP: Tensor,
    grads_NP: Tensor,
    second_NP: Tensor | None,
    first_NP: Tensor | None,
    shadow_NP: Tensor,
    documents: Tensor,
    factors_N2: Tensor,
    *,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One optimizer step of some documents; see `golf_ray.adaptation.optimizer`.

    Args:
        documents: int32 [N, 3], the last of each its row of all the buffers.
        factors_N2: float32 [N, 2]: 1 / sqrt(1 - beta2^t) and 1 / (1 - beta1^t) of this step.
    """
    num_parameters = p_NP.shape[1]
    _step[(triton.cdiv(num_parameters, STEP_ELEMENTS), len(documents))](
        p_NP, grads_NP, second_NP, first_NP, shadow_NP, documents, factors_N2, num_parameters,
        lr, 1 - lr * weight_decay, beta1, beta2, eps,
        MOMENTUM=first_NP is not None, SECOND=second_NP is not None, BLOCK=STEP_ELEMENTS,
        num_warps=8,
    )  # fmt: skip
