"""Triton kernel of `golf_ray.kernels.loss`: softcap, cross entropy and their gradient at once.

A program has one row of logits. Rows of up to `BLOCK` columns are read once and kept in registers;
longer ones are read a second time for the gradient, from the cache.

Shapes: T rows, V columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192
"""Columns of a program's piece at most."""
LARGEST_BOUND = 40.0
"""exp(-2 * 40) = 2e-35 is a normal float32."""


@triton.jit
def _half_complement(z, cap):
    """(1 - tanh(z / cap)) / 2 = 1 / (1 + exp(2 z / cap)).

    By the reciprocal root, which is one instruction where a division is several.
    """
    root = tl.rsqrt(1.0 + tl.exp((2.0 / cap) * z))
    return root * root


@triton.jit
def _piece(z, row, start, cols, cap, V: tl.constexpr, BLOCK_V: tl.constexpr):
    """Half complements of a piece of a row, the capped logits, and where there are any."""
    # Where pieces come out even nothing is masked: each comparison counts here.
    if V % BLOCK_V == 0:
        half = _half_complement(tl.load(z + row * V + start + cols).to(tl.float32), cap)
        return half, cap - 2.0 * cap * half, cols >= 0
    mask = start + cols < V
    half = _half_complement(
        tl.load(z + row * V + start + cols, mask=mask, other=0.0).to(tl.float32), cap
    )
    return half, tl.where(mask, cap - 2.0 * cap * half, float("-inf")), mask


@triton.jit
def _cross_entropy(
    z, targets, losses, dz, cap,
    V: tl.constexpr, BLOCK_V: tl.constexpr, GRADIENT: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Loss of a row of raw logits, and d loss / d logits, which may take the logits' place.

    Where the cap is small enough for exp(-2 cap) to be a float32 (`BOUNDED`), the cap itself stands
    for the highest logit, and no pass looks for it.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    cols = tl.arange(0, BLOCK_V)
    at_target = cap - 2.0 * cap * _half_complement(
        tl.load(z + row * V + target).to(tl.float32), cap
    )
    highest = cap + tl.zeros((), tl.float32)
    if not BOUNDED:
        highest = tl.full((), float("-inf"), tl.float32)
        for start in tl.static_range(0, V, BLOCK_V):
            _, capped, _ = _piece(z, row, start, cols, cap, V, BLOCK_V)
            highest = tl.maximum(highest, tl.max(capped))
    total = tl.zeros((), tl.float32)
    # One piece stays in registers: loops are unrolled, and later readings of it fold away.
    for start in tl.static_range(0, V, BLOCK_V):
        half, capped, mask = _piece(z, row, start, cols, cap, V, BLOCK_V)
        weight = tl.exp(capped - highest)
        total += tl.sum(weight)
    tl.store(losses + row, highest + tl.log(total) - at_target)
    if GRADIENT:
        for start in tl.static_range(0, V, BLOCK_V):
            if V > BLOCK_V:
                half, capped, mask = _piece(z, row, start, cols, cap, V, BLOCK_V)
                weight = tl.exp(capped - highest)
            p = weight * (1.0 / total)
            p = tl.where(start + cols == target, p - 1.0, p)
            # The cap's derivative 1 - tanh^2 is 4 half (1 - half).
            grad = p * (4.0 * half * (1.0 - half))
            tl.store(dz + row * V + start + cols, grad.to(dz.dtype.element_ty), mask=mask)


def cross_entropy(z_TV: Tensor, targets_T: Tensor, cap: float, out_TV: Tensor | None) -> Tensor:
    """Losses of raw logits, float32 [T].

    Args:
        out_TV: takes the gradient of each row's loss; may be `z_TV` itself; None for none.
    """
    T, V = z_TV.shape
    losses = torch.empty(T, dtype=torch.float32, device=z_TV.device)
    block = min(BLOCK, triton.next_power_of_2(V))
    if T:
        _cross_entropy[(T,)](
            z_TV, targets_T, losses, z_TV if out_TV is None else out_TV, cap,
            V=V, BLOCK_V=block, GRADIENT=out_TV is not None,
            BOUNDED=cap <= LARGEST_BOUND, num_warps=max(1, min(8, block // 512)),
        )  # fmt: skip
    return losses
