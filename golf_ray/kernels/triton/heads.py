"""Triton kernels of `golf_ray.kernels.heads`: QK-norm, rotary, gain, and XSA, on heads of a buffer.

Shapes: T rows, H query heads, G key and value heads, d head dim, R rotary dims. A row of the merged
projection holds the heads' queries, then keys, then values, W = (H + 2 G) d in all. What attention
takes is in one buffer [T, H + ..., d]: queries, keys, and where keys and values are copied for the
heads of a group, the values too. Programs take whole rows: a tile is [BLOCK_T, heads, d], padded to
powers of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from golf_ray.kernels.triton.device import num_sms
from golf_ray.kernels.triton.residual import NORM_EPS

UNIT_EPS = tl.constexpr(1e-12)
"""Smallest length that a value is divided by: that of torch.nn.functional.normalize."""

TILE_ELEMENTS = 1024
"""Elements of a tile, about."""
PROGRAMS_AN_SM = 16
STAGES = 1
"""Tiles that a program of the backward has on their way: others of the multiprocessor cover it."""


@triton.jit
def _tile(start, num_rows, heads, dims, HEADS: tl.constexpr, DIM: tl.constexpr,
          BLOCK_T: tl.constexpr):  # fmt: skip
    """Rows [BLOCK_T, 1, 1] from `start` and the mask of what is inside of the buffer."""
    rows = (start + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None, None]
    mask = (rows < num_rows) & (heads < HEADS) & (dims < DIM)
    return rows, mask


@triton.jit
def _angles(cos, sin, rows, dims, mask, HALF: tl.constexpr):
    """Factors of a dimension itself and of its partner, and the partner's place.

    The rotation is (a, b) -> (a cos + b sin, b cos - a sin) for the halves of the first 2 HALF
    dimensions; the others are their own partner, with factors 1 and 0.
    """
    rotary = mask & (dims < 2 * HALF)
    place = rows * HALF + dims % HALF
    own = tl.load(cos + place, mask=rotary, other=1.0)
    other = tl.load(sin + place, mask=rotary, other=0.0)
    other = tl.where(dims < HALF, other, -other)
    partner = tl.where(dims < HALF, dims + HALF, tl.where(dims < 2 * HALF, dims - HALF, dims))
    return own, other, partner


@triton.jit
def _normed_rotated(
    source, base, rows, dims, mask, cos, sin, DIM: tl.constexpr, HALF: tl.constexpr
):
    """rotate(rms_norm(x)) of a tile of heads."""
    x = tl.load(source + base + dims, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=2) / DIM + NORM_EPS)[:, :, None]
    if HALF > 0:
        own, other, partner = _angles(cos, sin, rows, dims, mask, HALF)
        swapped = tl.load(source + base + partner, mask=mask & (dims < 2 * HALF), other=0.0)
        x = x * own + swapped.to(tl.float32) * other
    return x * rstd


@triton.jit
def _prepare(
    qkv, out, gain, cos, sin, num_rows,
    H: tl.constexpr, G: tl.constexpr, COPIES: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Queries gain * rotate(rms_norm(q)) and keys rotate(rms_norm(k)), into one buffer.

    With copies a key is written once for each head of its group, and so are the values.
    """
    heads = tl.arange(0, BLOCK_H)[None, :, None]
    groups = tl.arange(0, BLOCK_G)[None, :, None]
    dims = tl.arange(0, BLOCK_D)[None, None, :]
    in_width: tl.constexpr = (H + 2 * G) * DIM
    out_width: tl.constexpr = (H + G * COPIES * (2 if COPIES > 1 else 1)) * DIM
    start = tl.program_id(0) * BLOCK_T
    rows, mask = _tile(start, num_rows, heads, dims, H, DIM, BLOCK_T)
    q = _normed_rotated(qkv, rows * in_width + heads * DIM, rows, dims, mask, cos, sin, DIM, HALF)
    q *= tl.load(gain + heads, mask=heads < H, other=1.0).to(tl.float32)
    tl.store(out + rows * out_width + heads * DIM + dims, q.to(out.dtype.element_ty), mask=mask)
    rows, mask = _tile(start, num_rows, groups, dims, G, DIM, BLOCK_T)
    base = rows * in_width + (H + groups) * DIM
    k = _normed_rotated(qkv, base, rows, dims, mask, cos, sin, DIM, HALF)
    to = out + rows * out_width + (H + groups * COPIES) * DIM + dims
    for j in tl.static_range(COPIES):
        tl.store(to + j * DIM, k.to(out.dtype.element_ty), mask=mask)
    if COPIES > 1:
        v = tl.load(qkv + base + G * DIM + dims, mask=mask, other=0.0)
        for j in tl.static_range(COPIES):
            tl.store(to + (G * COPIES + j) * DIM, v, mask=mask)


@triton.jit
def _turned_back(
    grad, base, rows, dims, mask, cos, sin, COPIES: tl.constexpr, DIM: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """Gradient of what was rotated: the sum over copies, turned back."""
    g = tl.load(grad + base + dims, mask=mask, other=0.0).to(tl.float32)
    for j in tl.static_range(1, COPIES):
        g += tl.load(grad + base + j * DIM + dims, mask=mask, other=0.0).to(tl.float32)
    if HALF > 0:
        own, other, partner = _angles(cos, sin, rows, dims, mask, HALF)
        rotary = mask & (dims < 2 * HALF)
        swapped = tl.load(grad + base + partner, mask=rotary, other=0.0).to(tl.float32)
        for j in tl.static_range(1, COPIES):
            more = tl.load(grad + base + j * DIM + partner, mask=rotary, other=0.0)
            swapped += more.to(tl.float32)
        g = g * own - swapped * other
    return g


@triton.jit
def _prepare_backward(
    dout, dv, dv_more, qkv, gain, cos, sin, dqkv, partial, num_rows,
    MORE: tl.constexpr, H: tl.constexpr, G: tl.constexpr, COPIES: tl.constexpr, DIM: tl.constexpr,
    HALF: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The merged projection's gradient, and this program's sums for the gains' gradient.

    With n = rms_norm(x) and g the gradient turned back by the rotation: dgain = sum g n, and
    dx = rstd (gain g - n mean(gain g n)).
    """
    heads = tl.arange(0, BLOCK_H)[None, :, None]
    groups = tl.arange(0, BLOCK_G)[None, :, None]
    dims = tl.arange(0, BLOCK_D)[None, None, :]
    width: tl.constexpr = (H + 2 * G) * DIM
    out_width: tl.constexpr = (H + G * COPIES) * DIM
    gains = tl.load(gain + heads, mask=heads < H, other=1.0).to(tl.float32)
    sums = tl.zeros((BLOCK_H,), tl.float32)
    for tile in tl.range(tl.program_id(0) * BLOCK_T, num_rows, tl.num_programs(0) * BLOCK_T,
                         num_stages=STAGES):  # fmt: skip
        rows, mask = _tile(tile, num_rows, heads, dims, H, DIM, BLOCK_T)
        base = rows * width + heads * DIM
        x = tl.load(qkv + base + dims, mask=mask, other=0.0).to(tl.float32)
        g = _turned_back(
            dout, rows * out_width + heads * DIM, rows, dims, mask, cos, sin, 1, DIM, HALF
        )
        rstd = tl.rsqrt(tl.sum(x * x, axis=2) / DIM + NORM_EPS)[:, :, None]
        n = x * rstd
        along = tl.sum(g * n, axis=2)
        sums += tl.sum(along, axis=0)
        dx = gains * rstd * (g - n * (along / DIM)[:, :, None])
        tl.store(dqkv + base + dims, dx.to(dqkv.dtype.element_ty), mask=mask)

        rows, mask = _tile(tile, num_rows, groups, dims, G, DIM, BLOCK_T)
        base = rows * width + (H + groups) * DIM
        x = tl.load(qkv + base + dims, mask=mask, other=0.0).to(tl.float32)
        from_k = rows * out_width + (H + groups * COPIES) * DIM
        g = _turned_back(dout, from_k, rows, dims, mask, cos, sin, COPIES, DIM, HALF)
        rstd = tl.rsqrt(tl.sum(x * x, axis=2) / DIM + NORM_EPS)[:, :, None]
        n = x * rstd
        dx = rstd * (g - n * (tl.sum(g * n, axis=2) / DIM)[:, :, None])
        tl.store(dqkv + base + dims, dx.to(dqkv.dtype.element_ty), mask=mask)

        from_v = dv + rows * (G * COPIES * DIM) + groups * (COPIES * DIM) + dims
        total = tl.load(from_v, mask=mask, other=0.0).to(tl.float32)
        for j in tl.static_range(1, COPIES):
            total += tl.load(from_v + j * DIM, mask=mask, other=0.0).to(tl.float32)
        if MORE:
            more = dv_more + rows * (G * DIM) + groups * DIM + dims
            total += tl.load(more, mask=mask, other=0.0).to(tl.float32)
        tl.store(dqkv + base + G * DIM + dims, total.to(dqkv.dtype.element_ty), mask=mask)
    heads = tl.arange(0, BLOCK_H)
    tl.store(partial + tl.program_id(0) * H + heads, sums, mask=heads < H)


@triton.jit
def _remove_own_value(
    y, v, along, num_rows, v_stride,
    H: tl.constexpr, G: tl.constexpr, DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y - (y . u) u in place, u = v / |v| of the head's group; the products y . u are kept."""
    heads = tl.arange(0, BLOCK_H)[None, :, None]
    dims = tl.arange(0, BLOCK_D)[None, None, :]
    start = tl.program_id(0) * BLOCK_T
    rows, mask = _tile(start, num_rows, heads, dims, H, DIM, BLOCK_T)
    place = y + rows * (H * DIM) + heads * DIM + dims
    y_own = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    value = v + rows * v_stride + (heads // (H // G)) * DIM + dims
    unit = tl.load(value, mask=mask, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(unit * unit, axis=2))[:, :, None]
    unit = unit / tl.maximum(length, UNIT_EPS)
    product = tl.sum(y_own * unit, axis=2)[:, :, None]
    tl.store(place, (y_own - product * unit).to(y.dtype.element_ty), mask=mask)
    tl.store(along + rows * H + heads, product, mask=(rows < num_rows) & (heads < H))


@triton.jit
def _remove_own_value_backward(
    dz, z, v, along, dy, dv, num_rows, v_stride,
    H: tl.constexpr, G: tl.constexpr, DIM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dy = dz - (dz . u) u, and dv = -((y . u) dy + (dz . u) z) / |v| over the group's heads.

    The projection is its own adjoint, so dy comes as z did; u's own gradient, projected off u,
    turns dz into dy and y into z.
    """
    groups = tl.arange(0, BLOCK_G)[None, :, None]
    dims = tl.arange(0, BLOCK_D)[None, None, :]
    start = tl.program_id(0) * BLOCK_T
    rows, mask = _tile(start, num_rows, groups, dims, G, DIM, BLOCK_T)
    unit = tl.load(v + rows * v_stride + groups * DIM + dims, mask=mask, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(unit * unit, axis=2)), UNIT_EPS)[:, :, None]
    unit = unit / length
    total = tl.zeros((BLOCK_T, BLOCK_G, BLOCK_D), tl.float32)
    for j in tl.static_range(H // G):
        head = groups * (H // G) + j
        place = rows * (H * DIM) + head * DIM + dims
        dz_own = tl.load(dz + place, mask=mask, other=0.0).to(tl.float32)
        z_own = tl.load(z + place, mask=mask, other=0.0).to(tl.float32)
        product = tl.sum(dz_own * unit, axis=2)[:, :, None]
        dy_own = dz_own - product * unit
        before = tl.load(along + rows * H + head, mask=(rows < num_rows) & (groups < G), other=0.0)
        total += before * dy_own + product * z_own
        tl.store(dy + place, dy_own.to(dy.dtype.element_ty), mask=mask)
    to_v = dv + rows * (G * DIM) + groups * DIM + dims
    tl.store(to_v, (-total / length).to(dv.dtype.element_ty), mask=mask)


def _blocks(heads: int, dim: int) -> tuple[int, int, int]:
    """Rows, heads and dims of a tile."""
    block_H, block_D = triton.next_power_of_2(heads), triton.next_power_of_2(dim)
    return max(1, TILE_ELEMENTS // (block_H * block_D)), block_H, block_D


def prepare(
    qkv_TW: Tensor, gain_H: Tensor, cos: Tensor, sin: Tensor, G: int, d: int, copies: int
) -> Tensor:
    """What attention takes: queries and keys [T, H + G, d], or with copies of keys and values for
    the heads of a group [T, H + 2 copies G, d]."""
    T, H = qkv_TW.shape[0], gain_H.shape[0]
    out = qkv_TW.new_empty(T, H + G * copies * (2 if copies > 1 else 1), d)
    block_T, block_H, block_D = _blocks(H, d)
    _prepare[(triton.cdiv(T, block_T),)](
        qkv_TW, out, gain_H, cos, sin, T, H=H, G=G, COPIES=copies, DIM=d, HALF=cos.shape[-1],
        BLOCK_T=block_T, BLOCK_H=block_H, BLOCK_G=triton.next_power_of_2(G), BLOCK_D=block_D,
    )  # fmt: skip
    return out


def prepare_backward(
    dout: Tensor,
    dv: Tensor,
    dv_more: Tensor | None,
    qkv_TW: Tensor,
    gain_H: Tensor,
    cos: Tensor,
    sin: Tensor,
    copies: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of the merged projection [T, W] and of the gains [H].

    Args:
        dout: [T, H + copies G, d] of the prepared queries and keys.
        dv: [T, copies G, d] of the values.
        dv_more: [T, G, d] to add to it, or None.
    """
    T, d = dv.shape[0], dv.shape[2]
    H, G = gain_H.shape[0], dv.shape[1] // copies
    dqkv = torch.empty_like(qkv_TW)
    block_T, block_H, block_D = _blocks(H, d)
    programs = max(1, min(triton.cdiv(T, block_T), PROGRAMS_AN_SM * num_sms(dv.device)))
    partial = torch.empty(programs, H, dtype=torch.float32, device=dv.device)
    _prepare_backward[(programs,)](
        dout, dv, dv if dv_more is None else dv_more, qkv_TW, gain_H, cos, sin, dqkv, partial, T,
        MORE=dv_more is not None, H=H, G=G, COPIES=copies, DIM=d, HALF=cos.shape[-1],
        BLOCK_T=block_T, BLOCK_H=block_H, BLOCK_G=triton.next_power_of_2(G), BLOCK_D=block_D,
        STAGES=STAGES,
    )  # fmt: skip
    return dqkv, partial.sum(0)


def remove_own_value_(y_THd: Tensor, v_TGd: Tensor) -> Tensor:
    """XSA in place; the products y . v / |v|, float32 [T, H]."""
    T, H, d = y_THd.shape
    along = torch.empty(T, H, dtype=torch.float32, device=y_THd.device)
    block_T, block_H, block_D = _blocks(H, d)
    _remove_own_value[(triton.cdiv(T, block_T),)](
        y_THd, v_TGd, along, T, v_TGd.stride(0), H=H, G=v_TGd.shape[1], DIM=d,
        BLOCK_T=block_T, BLOCK_H=block_H, BLOCK_D=block_D,
    )  # fmt: skip
    return along


def remove_own_value_backward(
    dz_THd: Tensor, z_THd: Tensor, v_TGd: Tensor, along_TH: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of XSA's input [T, H, d] and of the values [T, G, d]."""
    T, H, d = z_THd.shape
    G = v_TGd.shape[1]
    dy, dv = torch.empty_like(dz_THd), v_TGd.new_empty(T, G, d)
    block_T, block_G, block_D = _blocks(G, d)
    _remove_own_value_backward[(triton.cdiv(T, block_T),)](
        dz_THd, z_THd, v_TGd, along_TH, dy, dv, T, v_TGd.stride(0), H=H, G=G, DIM=d,
        BLOCK_T=block_T, BLOCK_G=block_G, BLOCK_D=block_D,
    )  # fmt: skip
    return dy, dv
