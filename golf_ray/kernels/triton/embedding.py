"""Triton kernels of `golf_ray.kernels.embedding`: rows of a table, normed, and their gradient.

Shapes: T tokens, V vocabulary, E width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from golf_ray.kernels.triton.residual import NORM_EPS


@triton.jit
def _lookup(table, tokens, out, num_tokens, E: tl.constexpr, BLOCK_T: tl.constexpr,
            BLOCK_E: tl.constexpr):  # fmt: skip
    """out = rms_norm(table[token])."""
    rows = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    cols = tl.arange(0, BLOCK_E)[None, :]
    mask = (rows[:, None] < num_tokens) & (cols < E)
    token = tl.load(tokens + rows, mask=rows < num_tokens, other=0)[:, None]
    x = tl.load(table + token * E + cols, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / E + NORM_EPS)
    value = (x * rstd[:, None]).to(out.dtype.element_ty)
    tl.store(out + rows[:, None] * E + cols, value, mask=mask)


@triton.jit
def _lookup_backward(table, tokens, grad, dtable, num_tokens, E: tl.constexpr,
                     BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):  # fmt: skip
    """dtable[token] += the norm's gradient; float32, in no fixed order."""
    rows = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    cols = tl.arange(0, BLOCK_E)[None, :]
    mask = (rows[:, None] < num_tokens) & (cols < E)
    token = tl.load(tokens + rows, mask=rows < num_tokens, other=0)[:, None]
    x = tl.load(table + token * E + cols, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + rows[:, None] * E + cols, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / E + NORM_EPS)
    along = tl.sum(g * x, axis=1) * rstd * rstd / E
    dx = rstd[:, None] * (g - along[:, None] * x)
    tl.atomic_add(dtable + token * E + cols, dx, mask=mask, sem="relaxed")


ROWS = 4
"""Tokens of a program."""


def lookup(table_VE: Tensor, tokens_T: Tensor, dtype: torch.dtype) -> Tensor:
    """Normed rows [T, E]."""
    T, E = tokens_T.shape[0], table_VE.shape[1]
    out = torch.empty(T, E, dtype=dtype, device=table_VE.device)
    if T:
        _lookup[(triton.cdiv(T, ROWS),)](
            table_VE, tokens_T, out, T, E=E, BLOCK_T=ROWS, BLOCK_E=triton.next_power_of_2(E)
        )
    return out


def lookup_backward(grad_TE: Tensor, table_VE: Tensor, tokens_T: Tensor) -> Tensor:
    """Gradient of the table, float32 [V, E]."""
    T, E = grad_TE.shape
    dtable = torch.zeros(table_VE.shape, dtype=torch.float32, device=table_VE.device)
    if T:
        _lookup_backward[(triton.cdiv(T, ROWS),)](
            table_VE, tokens_T, grad_TE, dtable, T,
            E=E, BLOCK_T=ROWS, BLOCK_E=triton.next_power_of_2(E),
        )  # fmt: skip
    return dtable
