"""Causal attention inside segments of a flat buffer, grouped-query, on whatever a machine has.

The one module that knows attention implementations. Shapes: T tokens, H query heads, G key and
value heads, d head dim. No T x T mask is ever built.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from golf_ray.model.segments import Segments


def attend(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, segments: Segments) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, causal and inside each segment; [T, H, d].

    Each segment is a call of torch's scaled_dot_product_attention of its own, or one of a batch
    where all have one length, so that what a segment holds never touches another's result.
    """
    repeat = q_THd.shape[1] // k_TGd.shape[1]
    if repeat > 1:
        k_TGd, v_TGd = (t.repeat_interleave(repeat, dim=1) for t in (k_TGd, v_TGd))
    lengths = segments.lengths()
    if len(set(lengths)) == 1:
        rows = [t.unflatten(0, (len(lengths), lengths[0])) for t in (q_THd, k_TGd, v_TGd)]
        return _sdpa(*rows).flatten(0, 1)
    pieces = zip(*(t.split(lengths) for t in (q_THd, k_TGd, v_TGd)), strict=True)
    outputs = [_sdpa(q[None], k[None], v[None])[0] for q, k, v in pieces]
    return torch.cat(outputs)


def _sdpa(q_NSHd: Tensor, k_NSHd: Tensor, v_NSHd: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q_NSHd, k_NSHd, v_NSHd))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
