"""Arithmetic on 16-bit numbers that is rounded late.

A sum of 16-bit products is made in float32 anyhow. Rounded to 16 bits before something small is
added, most of what is small is lost.

Shapes: T rows, I input and O output features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether an arithmetic has fewer digits than the sums of its products."""
    return dtype.itemsize < torch.float32.itemsize


def widened(x: Tensor) -> Tensor:
    """x in float32, or as it is where it has no fewer digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear_in_float32(x_TI: Tensor, w_OI: Tensor) -> Tensor:
    """x w^T in float32 [T, O]; the gradients are in the operands' own arithmetic."""
    return _Linear.apply(x_TI, w_OI) if is_narrow(x_TI.dtype) else F.linear(x_TI, w_OI)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, w)
        if x.is_cuda:
            return torch.mm(x, w.t(), out_dtype=torch.float32)
        return x.float() @ w.float().t()

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, w = ctx.saved_tensors
        dy = dy.to(x.dtype)
        dx = dy @ w if ctx.needs_input_grad[0] else None
        return dx, dy.t() @ x if ctx.needs_input_grad[1] else None
