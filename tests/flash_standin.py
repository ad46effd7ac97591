"""FlashAttention-3's operators, computed plainly on a CPU: what the real ones are called like.

Both ways of returning from the backward: `work space` alone (the package `flash_attn_3`), with the
gradients in the buffers that were given; or the gradients first (xformers), here in tensors of
their own, as an operator that ignores the buffers would.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from golf_ray.kernels.flash import Operators

Returns = Literal["work space", "gradients first"]


def operators(returns: Returns) -> Operators:
    """Stand-ins with one of the two conventions."""

    def bwd(*tensors: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, **settings: Any) -> Any:
        work = [torch.empty(0) for _ in range(5)]
        found = _backward(*tensors, **settings)
        if returns == "gradients first":
            return (*found, *work)
        for buffer, grad in zip((dq, dk, dv), found, strict=True):
            buffer.copy_(grad)
        return tuple(work)

    return Operators(source=f"stand-in, {returns}", fwd=_forward, bwd=bwd)


def _segments(q: Tensor, k: Tensor, settings: dict[str, Any]) -> list[tuple[slice, slice, Tensor]]:
    """Rows of each segment's queries and keys, and its scores [H, Q, S]."""
    assert settings.pop("is_causal") is True
    bounds_q, bounds_k = settings.pop("cu_seqlens_q"), settings.pop("cu_seqlens_k")
    longest_q, longest_k = settings.pop("max_seqlen_q"), settings.pop("max_seqlen_k")
    settings.pop("num_splits", None)
    assert not settings, f"unknown settings {settings}"
    assert bounds_q.dtype == bounds_k.dtype == torch.int32 and len(bounds_q) == len(bounds_k)
    assert q.stride(-1) == k.stride(-1) == 1, "a head must be contiguous"
    counts, lengths = bounds_q.diff(), bounds_k.diff()
    assert int(counts.max()) <= longest_q and int(lengths.max()) <= longest_k
    assert int(bounds_q[-1]) == len(q) and int(bounds_k[-1]) == len(k)
    found = []
    spans = zip(
        bounds_q.tolist(), counts.tolist(), bounds_k.tolist(), lengths.tolist(), strict=False
    )
    for q_start, count, k_start, length in spans:
        if count:
            queries, keys = slice(q_start, q_start + count), slice(k_start, k_start + length)
            q_HQd, k_HSd = q[queries].transpose(0, 1).float(), _grouped(k, keys, q.shape[1])
            scores = q_HQd @ k_HSd.mT / math.sqrt(q.shape[-1])
            # Fewer queries than keys are those of the last rows.
            future = torch.ones(count, length).triu(length - count + 1).bool()
            found.append((queries, keys, scores.masked_fill(future, -math.inf)))
    return found


def _grouped(x: Tensor, rows: slice, num_heads: int) -> Tensor:
    x_GSd = x[rows].transpose(0, 1).float()
    return x_GSd.repeat_interleave(num_heads // x_GSd.shape[0], 0)


def _forward(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Any:
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[1], q.shape[0])
    for rows, keys, scores in _segments(q, k, settings):
        lse[:, rows] = scores.logsumexp(-1)
        y = scores.softmax(-1) @ _grouped(v, keys, q.shape[1])
        out[rows] = y.transpose(0, 1).to(q.dtype)
    return out, lse, torch.empty(0), torch.empty(0)


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, **settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The textbook's backward, from the denominators and the outputs like the real one."""
    H, G = q.shape[1], k.shape[1]
    dq, dk, dv = (torch.zeros(t.shape) for t in (q, k, v))
    for rows, keys, scores in _segments(q, k, settings):
        p = (scores - lse[:, rows, None]).exp()
        do = dout[rows].transpose(0, 1).float()
        delta = (do * out[rows].transpose(0, 1).float()).sum(-1, keepdim=True)
        ds = p * (do @ _grouped(v, keys, H).mT - delta) / math.sqrt(q.shape[-1])
        dq[rows] = (ds @ _grouped(k, keys, H)).transpose(0, 1)
        for grads, full in ((dk, ds.mT @ q[rows].transpose(0, 1).float()), (dv, p.mT @ do)):
            grads[keys] = full.unflatten(0, (G, H // G)).sum(1).transpose(0, 1)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
