"""Causal attention inside segments of a flat buffer, grouped-query, on whatever a machine has.

The one module that knows attention implementations. Shapes: T tokens, N segments, H query heads,
G key and value heads, d head dim. No T x T mask is ever built.

Invariant: without gradients a row's bits on a CPU follow from the rows of its segment up to it,
wherever the segment ends and whatever the others hold.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from golf_ray.model.segments import Segments

BLOCK_ROWS = 64
"""Query rows of one call of `_blocked`."""


def attend(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, segments: Segments) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, causal and inside each segment; [T, H, d].

    With gradients each segment is a call of torch's scaled_dot_product_attention of its own, or
    one of a batch where all have one length.
    """
    repeat = q_THd.shape[1] // k_TGd.shape[1]
    if repeat > 1:
        k_TGd, v_TGd = (t.repeat_interleave(repeat, dim=1) for t in (k_TGd, v_TGd))
    lengths = segments.lengths()
    if not torch.is_grad_enabled() and q_THd.device.type == "cpu":
        return _blocked(q_THd, k_TGd, v_TGd, lengths)
    if len(set(lengths)) == 1:
        rows = [t.unflatten(0, (len(lengths), lengths[0])) for t in (q_THd, k_TGd, v_TGd)]
        return _sdpa(*rows).flatten(0, 1)
    pieces = zip(*(t.split(lengths) for t in (q_THd, k_TGd, v_TGd)), strict=True)
    outputs = [_sdpa(q[None], k[None], v[None])[0] for q, k, v in pieces]
    return torch.cat(outputs)


def _sdpa(q_NSHd: Tensor, k_NSHd: Tensor, v_NSHd: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q_NSHd, k_NSHd, v_NSHd))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _blocked(q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, lengths: list[int]) -> Tensor:
    """Block j of all segments at once: 64 query rows against the first 64 (j + 1) keys.

    torch's kernel cuts its work by the length it is given, so a row's last bits depend on where
    its segment ends. Here every call has a shape that only the row's place in its segment decides.
    """
    T, size = q_THd.shape[0], BLOCK_ROWS
    length_N = torch.tensor(lengths)
    start_N = length_N.cumsum(0) - length_N
    # Row T stands for what is behind a segment's end: zeros to read, nothing that is kept to write.
    q, k, v = (F.pad(t, (0, 0, 0, 0, 0, 1)) for t in (q_THd, k_THd, v_THd))
    y = torch.empty_like(q)
    for begin in range(0, max(lengths), size):
        end = begin + size
        live_N = length_N > begin
        row_S = torch.arange(end)
        row_NS = start_N[live_N, None] + row_S
        row_NS = row_NS.where(row_S < length_N[live_N, None], T)
        query_NS = row_NS[:, begin:]
        q_NHSd, k_NHSd, v_NHSd = (t.transpose(1, 2) for t in (q[query_NS], k[row_NS], v[row_NS]))
        mask = torch.ones(size, end, dtype=torch.bool).tril(begin)
        y_NHSd = F.scaled_dot_product_attention(q_NHSd, k_NHSd, v_NHSd, attn_mask=mask)
        y[query_NS] = y_NHSd.transpose(1, 2)
    return y[:T]
