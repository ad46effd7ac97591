"""Causal attention inside segments of a flat buffer, grouped-query, on whatever a machine has.

The one module that knows attention implementations. Shapes: T tokens, N segments, H query heads,
G key and value heads, d head dim. No T x T mask is ever built.

- `fa3`: FlashAttention-3, on Hopper GPUs (`golf_ray.kernels.flash` finds it);
- `varlen`: torch's own variable-length attention (FlashAttention-2), on NVIDIA GPUs;
- `sdpa`: torch's scaled_dot_product_attention, segment by segment, everywhere.

Invariant: without gradients a row's bits on a CPU follow from the rows of its segment up to it,
wherever the segment ends and whatever the others hold.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from golf_ray.errors import ConfigError
from golf_ray.kernels import flash
from golf_ray.model.segments import Segments, TailRows, segment_lengths

Backend = Literal["fa3", "varlen", "sdpa"]
FASTEST_FIRST: tuple[Backend, ...] = ("fa3", "varlen", "sdpa")

BLOCK_ROWS = 64
"""Query rows of one call of `_blocked`."""
VARLEN_CAPABILITY = (8, 0)
"""First NVIDIA generation that torch's variable-length attention runs on."""
FOR_MANY_LENGTHS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""What segments of many lengths go to. cuDNN, which torch takes first on Hopper, makes a plan for
each length, and that takes tens of milliseconds."""


def resolve_backend(
    asked: Literal["auto"] | Backend, device: torch.device, dtype: torch.dtype, head_dim: int
) -> Backend:
    """The implementation to use: the one that was asked for, or for `auto` the fastest there is.

    Raises:
        ConfigError: the one asked for cannot be used; the line says why and how to get it.
    """
    if asked != "auto":
        reason = why_not(asked, device, dtype, head_dim)
        if reason is not None:
            raise ConfigError(
                f"attention.backend = '{asked}' cannot be used: it {reason}",
                "or take attention.backend = auto",
            )
        return asked
    return next(b for b in FASTEST_FIRST if why_not(b, device, dtype, head_dim) is None)


def why_not(
    backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int
) -> str | None:
    """Why a backend cannot be used here, in words that follow 'it'; None where it can."""
    if backend == "fa3":
        return flash.why_not(device, dtype, head_dim)
    if backend == "varlen":
        if device.type != "cuda":
            return f"needs a GPU, and tensors are on {device.type}"
        if torch.cuda.get_device_capability(device) < VARLEN_CAPABILITY:
            return "needs an NVIDIA GPU of compute capability 8.0 or later"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"computes in bfloat16 or float16, not in {str(dtype).removeprefix('torch.')}"
        if _varlen() is None:
            return "needs torch 2.10 or later"
    return None


def attend(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    segments: Segments,
    backend: Backend = "sdpa",
    tail: TailRows | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, causal and inside each segment; [T, H, d].

    With gradients `sdpa` makes each segment a call of its own, or one of a batch where all have one
    length.

    Args:
        tail: the rows that queries are of; [S, H, d] then, and so is the result.
    """
    if tail is not None:
        return _attend_from_tail(q_THd, k_TGd, v_TGd, segments, backend, tail)
    if backend == "fa3":
        return flash.flash_attention(q_THd, k_TGd, v_TGd, segments.cu_seqlens, segments.max_seqlen)
    repeat = q_THd.shape[1] // k_TGd.shape[1]
    if backend == "varlen":
        return _varlen_attention(q_THd, k_TGd, v_TGd, segments)
    if repeat > 1:
        k_TGd, v_TGd = (t.repeat_interleave(repeat, dim=1) for t in (k_TGd, v_TGd))
    if torch.compiler.is_compiling():
        return _sdpa_op(q_THd, k_TGd, v_TGd, segments.cu_seqlens)
    return _by_segments(q_THd, k_TGd, v_TGd, segments.lengths())


def _attend_from_tail(
    q_SHd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    segments: Segments,
    backend: Backend,
    tail: TailRows,
) -> Tensor:
    if backend == "fa3":
        bounds, longest = segments.cu_seqlens, segments.max_seqlen
        queries = tail.cu_seqlens, tail.max_seqlen
        return flash.flash_attention(q_SHd, k_TGd, v_TGd, bounds, longest, queries)
    if backend == "varlen":
        # Which corner its mask starts from is a matter of version where there are fewer queries.
        full = q_SHd.new_zeros(k_TGd.shape[0], *q_SHd.shape[1:])
        full = full.index_copy(0, tail.places_S, q_SHd)
        return tail.of(_varlen_attention(full, k_TGd, v_TGd, segments))
    repeat = q_SHd.shape[1] // k_TGd.shape[1]
    if repeat > 1:
        k_TGd, v_TGd = (t.repeat_interleave(repeat, dim=1) for t in (k_TGd, v_TGd))
    lengths, counts = segments.lengths(), segment_lengths(tail.cu_seqlens)
    assert len(lengths) == len(counts), "every segment has a wanted row"
    return _each_segment(_sdpa_last, (q_SHd, counts), (k_TGd, lengths), (v_TGd, lengths))


def _sdpa_last(q_NCHd: Tensor, k_NSHd: Tensor, v_NSHd: Tensor) -> Tensor:
    """The queries of the last C of S rows."""
    C, S = q_NCHd.shape[1], k_NSHd.shape[1]
    mask = torch.ones(C, S, dtype=torch.bool, device=q_NCHd.device).tril(S - C)
    q, k, v = (t.transpose(1, 2) for t in (q_NCHd, k_NSHd, v_NSHd))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


# torch's variable-length attention --------------------------------------------------------------


_Varlen = tuple[Any, frozenset[str]]
_looked_for: list[_Varlen | None] = []
"""What `_varlen` found, once it has looked."""


def _varlen() -> _Varlen | None:
    """torch's function and the names of its parameters, which differ between versions.

    It takes a second to load, so it is looked for where it may be used; and not by a cache of
    functools, through which torch.compile would trace the search.
    """
    if not _looked_for:
        try:
            function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
        except (ImportError, AttributeError):
            _looked_for.append(None)
        else:
            _looked_for.append((function, frozenset(inspect.signature(function).parameters)))
    return _looked_for[0]


def _varlen_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    found = _varlen()
    assert found is not None
    function, parameters = found
    settings: dict[str, Any] = {}
    if "window_size" in parameters:
        settings["window_size"] = (-1, 0)
    else:
        settings["is_causal"] = True
    repeat = q.shape[1] // k.shape[1]
    if "enable_gqa" in parameters:
        settings["enable_gqa"] = repeat > 1
    elif repeat > 1:
        k, v = (t.repeat_interleave(repeat, dim=1) for t in (k, v))
    bounds, longest = segments.cu_seqlens, segments.max_seqlen
    return function(q, k, v, bounds, bounds, longest, longest, **settings)


# scaled_dot_product_attention, segment by segment -----------------------------------------------


def _by_segments(q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, lengths: list[int]) -> Tensor:
    if not torch.is_grad_enabled() and q_THd.device.type == "cpu":
        return _blocked(q_THd, k_THd, v_THd, lengths)
    return _each_segment(_sdpa, *((t, lengths) for t in (q_THd, k_THd, v_THd)))


def _each_segment(attention: Callable[..., Tensor], *operands: tuple[Tensor, list[int]]) -> Tensor:
    """Attention of operands, each cut by its lengths; in one batch where those are all the same."""
    if all(len(set(lengths)) == 1 for _, lengths in operands):
        batch = (t.unflatten(0, (len(lengths), lengths[0])) for t, lengths in operands)
        return attention(*batch).flatten(0, 1)
    segments = zip(*(t.split(lengths) for t, lengths in operands), strict=True)
    with sdpa_kernel(FOR_MANY_LENGTHS):
        return torch.cat([attention(*(t[None] for t in segment))[0] for segment in segments])


def _sdpa(q_NSHd: Tensor, k_NSHd: Tensor, v_NSHd: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q_NSHd, k_NSHd, v_NSHd))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _blocked(q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, lengths: list[int]) -> Tensor:
    """Block j of all segments at once: 64 query rows against the first 64 (j + 1) keys.

    torch's kernel cuts its work by the length it is given, so a row's last bits depend on where
    its segment ends. Here every call has a shape that only the row's place in its segment decides.
    """
    q, k, v = (_with_zero_row(t) for t in (q_THd, k_THd, v_THd))
    y = torch.empty_like(q)
    for query_NR, row_NS in _blocks(lengths, q.device, len(lengths)):
        R, S = query_NR.shape[1], row_NS.shape[1]
        q_NHRd, k_NHSd, v_NHSd = (t.transpose(1, 2) for t in (q[query_NR], k[row_NS], v[row_NS]))
        mask = torch.ones(R, S, dtype=torch.bool, device=q.device).tril(S - R)
        y_NHRd = F.scaled_dot_product_attention(q_NHRd, k_NHSd, v_NHSd, attn_mask=mask)
        y[query_NR] = y_NHRd.transpose(1, 2)
    return y[: q_THd.shape[0]]


def _with_zero_row(t_THd: Tensor) -> Tensor:
    return F.pad(t_THd, (0, 0, 0, 0, 0, 1))


def _blocks(
    lengths: list[int], device: torch.device, at_once: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of 64 rows, each of `at_once` segments: places of its rows, and of all rows that these
    may see, themselves last. Row T, one more than there are, stands for what is behind a segment's
    end: zeros to read, nothing that is kept to write.
    """
    T = sum(lengths)
    starts = itertools.accumulate(lengths, initial=0)
    # The longest first: those that reach a block are the first so many.
    ordered = sorted(zip(lengths, starts, strict=False), reverse=True)
    for first in range(0, len(ordered), at_once):
        some = ordered[first : first + at_once]
        length_N1, start_N1 = torch.tensor(some, device=device).T.unsqueeze(2)
        row_S = torch.arange(some[0][0] + BLOCK_ROWS, device=device)
        row_NS = (start_N1 + row_S).where(row_S < length_N1, T)
        for begin in range(0, some[0][0], BLOCK_ROWS):
            live = sum(length > begin for length, _ in some)
            seen_NS = row_NS[:live, : begin + BLOCK_ROWS]
            yield seen_NS[:, begin:], seen_NS


# For torch.compile: where segments lie is data, and one graph must hold for all data.


@torch.library.custom_op("golf_ray::segment_attention", mutates_args=())
def _sdpa_op(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    return _by_segments(q, k, v, segment_lengths(cu_seqlens)).contiguous()


@_sdpa_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("golf_ray::segment_attention_backward", mutates_args=())
def _sdpa_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # Inside of an op autograd does not record: the textbook's, a block of rows at a time.
    T = q.shape[0]
    padded = [_with_zero_row(t) for t in (dout, q, k, v)]
    dq, dk, dv = (torch.zeros_like(t, dtype=torch.float32) for t in padded[1:])
    # A GPU wants much at a time; a processor's caches hold a segment's block.
    at_once = len(cu_seqlens) if q.is_cuda else 1
    for query_NR, row_NS in _blocks(segment_lengths(cu_seqlens), q.device, at_once):
        places = query_NR, query_NR, row_NS, row_NS
        found = _block_backward(*(t[rows] for t, rows in zip(padded, places, strict=True)))
        dq[query_NR] = found[0]
        dk[row_NS] += found[1]
        dv[row_NS] += found[2]
    return dq[:T].to(q.dtype), dk[:T].to(k.dtype), dv[:T].to(v.dtype)


def _block_backward(
    dout_NRHd: Tensor, q_NRHd: Tensor, k_NSHd: Tensor, v_NSHd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the attention of R rows, the last of S that they may see."""
    do, q, k, v = (t.float().transpose(1, 2) for t in (dout_NRHd, q_NRHd, k_NSHd, v_NSHd))
    R, S, scale = q.shape[2], k.shape[2], q.shape[3] ** -0.5
    future = torch.ones(R, S, dtype=torch.bool, device=q.device).triu(S - R + 1)
    p = (q @ k.mT * scale).masked_fill(future, -torch.inf).softmax(-1)
    dp = do @ v.mT
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
    return (ds @ k).transpose(1, 2), (ds.mT @ q).transpose(1, 2), (p.mT @ do).transpose(1, 2)


@_sdpa_backward.register_fake
def _(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dout):  # type: ignore[no-untyped-def]
    return *_sdpa_backward(dout, *ctx.saved_tensors), None


_sdpa_op.register_autograd(_differentiate, setup_context=_setup)
