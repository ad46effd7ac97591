"""FlashAttention-3: variable-length attention on Hopper GPUs, whoever ships its operators.

Two packages register `torch.ops.flash_attn_3`: `flash_attn_3`, and xformers 0.0.34, of which only
the library file is loaded. Their backward operators differ in what they return: the gradients and
then work space (eight tensors), or work space alone (five). Both fill buffers that they are given,
which is what is used here.

Shapes: T tokens, N segments, H query heads, G key and value heads, d head dim. Causal inside each
segment; segment n is rows cu_seqlens[n] to cu_seqlens[n + 1]. Where there are fewer queries than
keys, S in all, the queries of a segment are those of its last rows.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGE = "flash_attn_interface"
LIBRARY = ("xformers", "flash_attn_3/_C.so")
INSTALL = (
    "pip install flash-attn-3 --find-links https://download.pytorch.org/whl/flash-attn-3/, "
    "or pip install --no-deps xformers==0.0.34"
)
"""How a user gets it."""
LARGEST_HEAD_DIM = 256
HEAD_DIM_MULTIPLE = 8
HOPPER = (9, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Operators:
    """Forward and backward of one provider."""

    source: str
    """Package and version."""
    fwd: Any
    bwd: Any

    def forward(
        self,
        q_SHd: Tensor,
        k_TGd: Tensor,
        v_TGd: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        queries: tuple[Tensor, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention [S, H, d] and the log of the softmax's denominator, float32 [H, S].

        Queries, keys and values may be slices of larger tensors; a head is contiguous.

        Args:
            queries: cu_seqlens and max_seqlen of the queries, where they are fewer than the keys.
        """
        bounds, longest = queries or (cu_seqlens, max_seqlen)
        found = self.fwd(
            q_SHd,
            k_TGd,
            v_TGd,
            cu_seqlens_q=bounds,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_k=max_seqlen,
            is_causal=True,
            num_splits=1,
        )
        return found[0], found[1]

    def backward(
        self,
        dout_SHd: Tensor,
        q_SHd: Tensor,
        k_TGd: Tensor,
        v_TGd: Tensor,
        out_SHd: Tensor,
        lse_HS: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        into: tuple[Tensor, Tensor, Tensor],
        queries: tuple[Tensor, int] | None = None,
    ) -> None:
        """Write the gradients of queries, keys and values into three tensors."""
        bounds, longest = queries or (cu_seqlens, max_seqlen)
        found = self.bwd(
            dout_SHd,
            q_SHd,
            k_TGd,
            v_TGd,
            out_SHd,
            lse_HS,
            dq=into[0],
            dk=into[1],
            dv=into[2],
            cu_seqlens_q=bounds,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_k=max_seqlen,
            is_causal=True,
        )
        if len(found) != 8:
            return
        for mine, theirs in zip(into, found[:3], strict=True):
            if theirs.data_ptr() != mine.data_ptr():
                mine.copy_(theirs)


@functools.cache
def operators() -> Operators | None:
    """The installed operators, `flash_attn_3`'s before those of xformers; None for neither."""
    if importlib.util.find_spec(PACKAGE) is not None:
        importlib.import_module(PACKAGE)
        return _registered(f"flash_attn_3 {_version('flash_attn_3')}")
    package, library = LIBRARY
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder) / library
        if path.is_file():
            # The package itself is built for one version of torch, this file for any.
            torch.ops.load_library(str(path))
            return _registered(f"xformers {_version(package)}")
    return None


def _registered(source: str) -> Operators:
    namespace = torch.ops.flash_attn_3
    return Operators(source=source, fwd=namespace.fwd, bwd=namespace.bwd)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "of unknown version"


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why FlashAttention-3 cannot be used, in words that follow its name; None where it can."""
    if device.type != "cuda":
        return f"needs a GPU, and tensors are on {device.type}"
    if torch.cuda.get_device_capability(device) != HOPPER:
        return f"needs a Hopper GPU, and this is a {torch.cuda.get_device_name(device)}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes in bfloat16 or float16, not in {str(dtype).removeprefix('torch.')}"
    if head_dim > LARGEST_HEAD_DIM or head_dim % HEAD_DIM_MULTIPLE:
        return f"takes heads of up to 256 dims, a multiple of 8, and not of {head_dim}"
    if operators() is None:
        return f"is not installed: {INSTALL}"
    return None


def required() -> Operators:
    """The operators, which `why_not` has been asked about."""
    found = operators()
    assert found is not None, "FlashAttention-3 was chosen and is not there"
    return found


def flash_attention(
    q_SHd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    queries: tuple[Tensor, int] | None = None,
) -> Tensor:
    """Attention [S, H, d], with gradients; see `Operators.forward`."""
    return _flash(q_SHd, k_TGd, v_TGd, cu_seqlens, max_seqlen, *(queries or (None, None)))[0]


def _of_queries(cu_seqlens_q: Tensor | None, max_seqlen_q: int | None) -> tuple[Tensor, int] | None:
    if cu_seqlens_q is None or max_seqlen_q is None:
        return None
    return cu_seqlens_q, max_seqlen_q


@torch.library.custom_op("golf_ray::flash_attention", mutates_args=())
def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
) -> tuple[Tensor, Tensor]:
    queries = _of_queries(cu_seqlens_q, max_seqlen_q)
    return required().forward(q, k, v, cu_seqlens, max_seqlen, queries)


@_flash.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("golf_ray::flash_attention_backward", mutates_args=())
def _flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    into = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    queries = _of_queries(cu_seqlens_q, max_seqlen_q)
    required().backward(dout.contiguous(), q, k, v, out, lse, cu_seqlens, max_seqlen, into, queries)
    return into


@_flash_backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, cu_seqlens, ctx.max_seqlen, cu_seqlens_q, ctx.max_seqlen_q = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens, cu_seqlens_q)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout, dlse):  # type: ignore[no-untyped-def]
    q, k, v, out, lse, cu_seqlens, cu_seqlens_q = ctx.saved_tensors
    grads = _flash_backward(
        dout, q, k, v, out, lse, cu_seqlens, ctx.max_seqlen, cu_seqlens_q, ctx.max_seqlen_q
    )
    return *grads, None, None, None, None


_flash.register_autograd(_differentiate, setup_context=_setup)
