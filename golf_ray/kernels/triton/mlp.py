"""Triton kernels of `golf_ray.kernels.mlp`: matrix products whose epilogue is the activation.

The activation is h = (leaky_relu(p, 1/2))^2, so |dh/dp| is 2 sqrt(h) for p > 0 and sqrt(h) for
p < 0: the output and one bit of sign for each element are all that the backward needs, and the
pre-activation, the layer's largest tensor, is never written.

Shapes: T rows, D model dim, F hidden dim, S columns of a stripe. Signs are packed stripe by stripe,
so that a thread finds all bits of a byte in its own registers, as tensor cores leave them: bit j of
byte c of a row is the sign in column 8 j + c of the row's stripe. Operands come by tensor
descriptors, whose rows must begin at multiples of 16 bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from golf_ray.kernels.mlp import STRIPE_COLUMNS, signs_shape
from golf_ray.kernels.triton.device import Tiling, bits_of, num_sms, precision_of

# Columns are one, two or four stripes.
UP = {
    # One program a multiprocessor walks over tiles, the next tile's operands on their way while
    # an epilogue runs. 98,304 x 512 x 2,048 in bfloat16 on an H200: 0.37 ms, 0.39 with a program
    # a tile of half the columns; cuBLAS takes 0.33 without an activation.
    16: Tiling(rows=128, columns=256, depth=64, warps=8, stages=4),
    # Float32 is no tensor cores' work: to be right, not fast.
    32: Tiling(rows=32, columns=32, depth=32, warps=4, stages=2),
}
DOWN_BACKWARD = {
    # Two programs a multiprocessor, so that one's epilogue runs under the other's products: that
    # needs at most 128 registers a thread. At the same shape 0.47 ms, 0.50 where the activation is
    # loaded behind the products and not before them.
    16: Tiling(rows=128, columns=128, depth=64, warps=8, stages=3, registers=128),
    32: Tiling(rows=32, columns=32, depth=32, warps=4, stages=2),
}


@triton.jit
def _halves(x, M: tl.constexpr, N: tl.constexpr):
    """The left and the right half of a tile."""
    return tl.split(x.reshape(M, 2, N // 2).permute(0, 2, 1))


@triton.jit
def _signs_of(signs, stripe, row, num_rows, M: tl.constexpr, N: tl.constexpr, S: tl.constexpr):
    """Places [M, 8] of the packed signs of a stripe's rows, and which of them are there."""
    rows = (row + tl.arange(0, M)).to(tl.int64)[:, None]
    of_stripe = rows * 0 + stripe
    mask = (rows < num_rows) & (of_stripe * S < N)
    return signs + (of_stripe * num_rows + rows) * 8 + tl.arange(0, 8)[None, :], mask


@triton.jit
def _activate(
    p, h_desc, signs, row, stripe, num_rows, M: tl.constexpr, N: tl.constexpr, S: tl.constexpr,
    SIGNS: tl.constexpr,
):  # fmt: skip
    """Store the activation of a stripe, and its signs; what is outside is dropped."""
    if SIGNS:
        bits = (p < 0).to(tl.int32).reshape(M, S // 8, 8)
        packed = tl.sum(bits << tl.arange(0, S // 8)[None, :, None], axis=1)
        places, mask = _signs_of(signs, stripe, row, num_rows, M, N, S)
        tl.store(places, packed.to(tl.uint8), mask=mask)
    h = tl.where(p < 0, 0.25, 1.0) * p * p
    h_desc.store([row, stripe * S], h.to(h_desc.dtype))


@triton.jit
def _up(
    n_desc, w_desc, h_desc, signs, num_rows, K: tl.constexpr, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, S: tl.constexpr,
    PRECISION: tl.constexpr, SIGNS: tl.constexpr,
):  # fmt: skip
    """h = activation(n w^T) and the signs of n w^T."""
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tiles = tl.cdiv(num_rows, BLOCK_M) * tiles_n
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        # Neighbours share rows, which are then read from the cache.
        row = tile // tiles_n * BLOCK_M
        column = tile % tiles_n * BLOCK_N
        p = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            n = n_desc.load([row, k])
            w = w_desc.load([column, k])
            p = tl.dot(n, w.T, p, input_precision=PRECISION)
        stripe = column // S
        if BLOCK_N == S:
            _activate(p, h_desc, signs, row, stripe, num_rows, BLOCK_M, N, S, SIGNS)
        else:
            a, b = _halves(p, BLOCK_M, BLOCK_N)
            if BLOCK_N == 2 * S:
                _activate(a, h_desc, signs, row, stripe, num_rows, BLOCK_M, N, S, SIGNS)
                _activate(b, h_desc, signs, row, stripe + 1, num_rows, BLOCK_M, N, S, SIGNS)
            else:
                c, d = _halves(a, BLOCK_M, BLOCK_N // 2)
                _activate(c, h_desc, signs, row, stripe, num_rows, BLOCK_M, N, S, SIGNS)
                _activate(d, h_desc, signs, row, stripe + 1, num_rows, BLOCK_M, N, S, SIGNS)
                e, f = _halves(b, BLOCK_M, BLOCK_N // 2)
                _activate(e, h_desc, signs, row, stripe + 2, num_rows, BLOCK_M, N, S, SIGNS)
                _activate(f, h_desc, signs, row, stripe + 3, num_rows, BLOCK_M, N, S, SIGNS)


@triton.jit
def _signed(x, packed, M: tl.constexpr, S: tl.constexpr):
    """A stripe times 2 where the pre-activation was positive, and times -1 where it was not."""
    negative = (packed.to(tl.int32)[:, None, :] >> tl.arange(0, S // 8)[None, :, None]) & 1
    x = x.reshape(M, S // 8, 8) * tl.where(negative != 0, -1.0, 2.0)
    return x.reshape(M, S)


@triton.jit
def _down_backward(
    dy_desc, w_desc, h, dp_desc, signs, num_rows, K: tl.constexpr, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, S: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dp = (dy w) * dh/dp, with h in the place of p."""
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    row = tl.program_id(0) // tiles_n * BLOCK_M
    column = tl.program_id(0) % tiles_n * BLOCK_N
    stripe = column // S
    # Asked for here, the activation and its signs are there when the products are done.
    rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    cols = column + tl.arange(0, BLOCK_N)[None, :]
    activation = tl.load(h + rows * N + cols, mask=(rows < num_rows) & (cols < N), other=0.0)
    places, mask = _signs_of(signs, stripe, row, num_rows, BLOCK_M, N, S)
    packed = tl.load(places, mask=mask, other=0)
    more = packed
    if BLOCK_N == 2 * S:
        places, mask = _signs_of(signs, stripe + 1, row, num_rows, BLOCK_M, N, S)
        more = tl.load(places, mask=mask, other=0)
    dh = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        dy = dy_desc.load([row, k])
        w = w_desc.load([k, column])
        dh = tl.dot(dy, w, dh, input_precision=PRECISION)
    dh *= tl.sqrt(activation.to(tl.float32))
    if BLOCK_N == S:
        dp_desc.store([row, column], _signed(dh, packed, BLOCK_M, S).to(dp_desc.dtype))
    else:
        a, b = _halves(dh, BLOCK_M, BLOCK_N)
        dp_desc.store([row, column], _signed(a, packed, BLOCK_M, S).to(dp_desc.dtype))
        dp_desc.store([row, column + S], _signed(b, more, BLOCK_M, S).to(dp_desc.dtype))


def up(n_TD: Tensor, w_FD: Tensor, signs: bool = True) -> tuple[Tensor, Tensor]:
    """Activation of n w^T, [T, F], and the packed signs, uint8 (of no rows if not asked for)."""
    (T, D), F, dtype = n_TD.shape, w_FD.shape[0], n_TD.dtype
    cut, stripe = UP[bits_of(dtype)], STRIPE_COLUMNS[dtype]
    h = n_TD.new_empty(T, F)
    packed = n_TD.new_empty(signs_shape(T if signs else 0, F, dtype), dtype=torch.uint8)
    tiles = triton.cdiv(T, cut.rows) * triton.cdiv(F, cut.columns)
    _up[(min(tiles, num_sms(n_TD.device)),)](
        TensorDescriptor.from_tensor(n_TD, [cut.rows, cut.depth]),
        TensorDescriptor.from_tensor(w_FD, [cut.columns, cut.depth]),
        TensorDescriptor.from_tensor(h, [cut.rows, stripe]),
        packed, T, K=D, N=F, BLOCK_M=cut.rows, BLOCK_N=cut.columns, BLOCK_K=cut.depth, S=stripe,
        PRECISION=precision_of(dtype), SIGNS=signs, num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return h, packed


def down_backward(dy_TD: Tensor, w_DF: Tensor, h_TF: Tensor, signs: Tensor) -> Tensor:
    """Gradient of the pre-activation, [T, F]."""
    (T, D), F, dtype = dy_TD.shape, w_DF.shape[1], dy_TD.dtype
    cut, stripe = DOWN_BACKWARD[bits_of(dtype)], STRIPE_COLUMNS[dtype]
    dp = torch.empty_like(h_TF)
    _down_backward[(triton.cdiv(T, cut.rows) * triton.cdiv(F, cut.columns),)](
        TensorDescriptor.from_tensor(dy_TD, [cut.rows, cut.depth]),
        TensorDescriptor.from_tensor(w_DF, [cut.depth, cut.columns]),
        h_TF,
        TensorDescriptor.from_tensor(dp, [cut.rows, stripe]),
        signs, T, K=D, N=F, BLOCK_M=cut.rows, BLOCK_N=cut.columns, BLOCK_K=cut.depth, S=stripe,
        PRECISION=precision_of(dtype), num_warps=cut.warps, num_stages=cut.stages,
        maxnreg=cut.registers,
    )  # fmt: skip
    return dp
