"""What happens to heads around attention: QK-norm, rotary, gain; and XSA behind it.

Queries and keys get an RMS norm over their dims and a rotation of the first of them, queries a gain
a head. After attention, XSA takes each output's component along the token's own value away.

As one op (`attention_fused`) it runs from the merged projection to XSA's output, FlashAttention-3
in its middle: gradients of queries, keys and values then meet in one kernel, in place of several
passes that pad, add and concatenate them.

In 16 bits both ways compute in float32 and round what they give once.

Shapes: T tokens, H query heads, G key and value heads, d head dim, R rotary dims,
W = (H + 2 G) d, a row of the merged projection: queries, keys, values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from golf_ray.kernels import flash
from golf_ray.kernels.wide import widened


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, float32's eps, no weight."""
    return F.rms_norm(x, (x.shape[-1],))


def rotary_tables(positions_T: Tensor, rope_dims: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin [T, R / 2] of the angles pos * base^(-2t / R), in float32."""
    t = torch.arange(0, rope_dims, 2, dtype=torch.float32, device=positions_T.device)
    angles = positions_T.float()[:, None] * base ** (-t / rope_dims)
    return angles.cos(), angles.sin()


def rotate(x_THd: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate the first R dims of each head: halves (a, b) -> (a cos + b sin, b cos - a sin)."""
    half = cos_TR.shape[-1]
    if half == 0:
        return x_THd
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    a, b, rest = x_THd.split((half, half, x_THd.shape[-1] - 2 * half), dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin, rest), dim=-1)


def remove_own_value(y_THd: Tensor, v_TGd: Tensor) -> Tensor:
    """XSA: the heads' outputs without their component along the token's own value."""
    y, v = widened(y_THd), widened(v_TGd)
    unit = F.normalize(v, dim=-1).repeat_interleave(y.shape[1] // v.shape[1], dim=1)
    return (y - (y * unit).sum(-1, keepdim=True) * unit).to(y_THd.dtype)


def split_heads(qkv_TW: Tensor, num_kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [T, H, d], keys and values [T, G, d] of the merged projection (views)."""
    kv = num_kv_heads * head_dim
    q, k, v = qkv_TW.split((qkv_TW.shape[1] - 2 * kv, kv, kv), dim=1)
    return (
        q.unflatten(1, (-1, head_dim)),
        k.unflatten(1, (-1, head_dim)),
        v.unflatten(1, (-1, head_dim)),
    )


def prepare(
    q_THd: Tensor,
    k_TGd: Tensor,
    gain_H: Tensor,
    cos: Tensor,
    sin: Tensor,
    of_queries: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Queries and keys as attention takes them, in their own dtype.

    Args:
        gain_H: at least float32 [H]: one of 16 bits is off by as much as 0.4%, for all of a head's
            scores alike.
        cos, sin: float32 [T, R / 2].
        of_queries: cos and sin of the queries' rows, where those are not all.
    """
    q = rotate(rms_norm(widened(q_THd)), *(of_queries or (cos, sin))) * gain_H[:, None]
    return q.to(q_THd.dtype), rotate(rms_norm(widened(k_TGd)), cos, sin).to(k_TGd.dtype)


MOST_COPIES = 2
"""Largest group of heads for which keys and values are copied: FlashAttention-3's backward adds a
group's gradients up in float32, through memory, and is faster without groups. 98,304 tokens with 8
heads in 4 groups on an H200, forward and backward: 1.81 ms grouped, 1.61 copied, and 0.05 for the
copying."""


def copies_of(num_heads: int, num_kv_heads: int) -> int:
    """Copies of each key and value head that attention is given."""
    group = num_heads // num_kv_heads
    return group if group <= MOST_COPIES else 1


def attention_fused(
    qkv_TW: Tensor,
    gain_H: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    num_kv_heads: int,
    head_dim: int,
    own_value: bool,
) -> Tensor:
    """From the merged projection to the heads' outputs [T, H, d].

    Args:
        gain_H: float32 [H].
        cos, sin: float32 [T, R / 2].
        own_value: keep the component along the own value; otherwise XSA takes it away.
    """
    return _attention(
        qkv_TW.contiguous(),
        gain_H,
        cos,
        sin,
        cu_seqlens,
        max_seqlen,
        num_kv_heads,
        head_dim,
        own_value,
    )[0]


@torch.library.custom_op("golf_ray::attention", mutates_args=())
def _attention(
    qkv: Tensor,
    gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_kv_heads: int,
    head_dim: int,
    own_value: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from golf_ray.kernels.triton import heads

    H = gain.shape[0]
    copies = copies_of(H, num_kv_heads)
    prepared = heads.prepare(qkv, gain, cos, sin, num_kv_heads, head_dim, copies)
    own_v = split_heads(qkv, num_kv_heads, head_dim)[2]
    q, k, v = _operands(prepared, own_v, H, copies)
    z, lse = flash.required().forward(q, k, v, cu_seqlens, max_seqlen)
    if own_value:
        along = z.new_empty(0, dtype=torch.float32)
    else:
        along = heads.remove_own_value_(z, own_v)
    return z, prepared, lse, along


def _operands(
    prepared: Tensor, own_v: Tensor, H: int, copies: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as attention takes them (views)."""
    K = own_v.shape[1] * copies
    v = prepared[:, H + K :] if copies > 1 else own_v
    return prepared[:, :H], prepared[:, H : H + K], v


@_attention.register_fake
def _(
    qkv: Tensor,
    gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_kv_heads: int,
    head_dim: int,
    own_value: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T, H = qkv.shape[0], gain.shape[0]
    z = qkv.new_empty(T, H, head_dim)
    copies = copies_of(H, num_kv_heads)
    width = H + num_kv_heads * copies * (2 if copies > 1 else 1)
    prepared = qkv.new_empty(T, width, head_dim)
    lse = qkv.new_empty((H, T), dtype=torch.float32)
    along = qkv.new_empty(0 if own_value else (T, H), dtype=torch.float32)
    return z, prepared, lse, along


@torch.library.custom_op("golf_ray::attention_backward", mutates_args=())
def _attention_backward(
    dz: Tensor,
    qkv: Tensor,
    gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_kv_heads: int,
    head_dim: int,
    own_value: bool,
    z: Tensor,
    prepared: Tensor,
    lse: Tensor,
    along: Tensor,
) -> tuple[Tensor, Tensor]:
    from golf_ray.kernels.triton import heads

    T, H = qkv.shape[0], gain.shape[0]
    copies = copies_of(H, num_kv_heads)
    own_v = split_heads(qkv, num_kv_heads, head_dim)[2]
    dy, dv_more = dz, None
    if not own_value:
        # FlashAttention takes rows' sums of output times gradient: with the projected gradient
        # they are the same for XSA's output as for its input, which need not be kept.
        dy, dv_more = heads.remove_own_value_backward(dz, z, own_v, along)
    q, k, v = _operands(prepared, own_v, H, copies)
    dqk = qkv.new_empty(T, H + num_kv_heads * copies, head_dim)
    dv = qkv.new_empty(T, num_kv_heads * copies, head_dim)
    flash.required().backward(
        dy, q, k, v, z, lse, cu_seqlens, max_seqlen, (dqk[:, :H], dqk[:, H:], dv)
    )
    return heads.prepare_backward(dqk, dv, dv_more, qkv, gain, cos, sin, copies)


@_attention_backward.register_fake
def _(
    dz: Tensor,
    qkv: Tensor,
    gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_kv_heads: int,
    head_dim: int,
    own_value: bool,
    z: Tensor,
    prepared: Tensor,
    lse: Tensor,
    along: Tensor,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(qkv), torch.empty_like(gain)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    qkv, gain, cos, sin, cu_seqlens, *ctx.numbers = inputs
    ctx.save_for_backward(qkv, gain, cos, sin, cu_seqlens, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dz, *_):  # type: ignore[no-untyped-def]
    qkv, gain, cos, sin, cu_seqlens, *kept = ctx.saved_tensors
    dqkv, dgain = _attention_backward(
        dz.contiguous(), qkv, gain, cos, sin, cu_seqlens, *ctx.numbers, *kept
    )
    return dqkv, dgain, *[None] * 7


_attention.register_autograd(_differentiate, setup_context=_setup)
