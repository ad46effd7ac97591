"""Triton kernels of `golf_ray.kernels.residual`: combinations of residual-stream tensors and norms.

Shapes: T rows, D channels, K rows of coefficients. Which tensor enters which mix under which row
is known at compile time, so that a program reads every tensor once and keeps it in registers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from golf_ray.kernels.triton.device import num_sms

NORM_EPS = tl.constexpr(torch.finfo(torch.float32).eps)

ROWS_A_PROGRAM = 4
"""Of the forward."""
PROGRAMS_AN_SM = 5
"""Of the backward, whose programs walk over rows so that few partial sums are written."""
TOTAL_ELEMENTS = 1024
"""Of a program that adds tensors up."""
STAGES = 3
"""Rows that a program of the backward has on their way."""


@triton.jit
def _mix(
    inputs, outputs, coefs, num_rows,
    ROW: tl.constexpr, KEPT: tl.constexpr, NORMED: tl.constexpr, SCALE: tl.constexpr,
    D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mix m = sum over tensors i of coefs[ROW[m, i]] * inputs[i], stored and normed."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.arange(0, BLOCK_D)
    offsets = rows[:, None].to(tl.int64) * D + cols[None, :]
    mask = (rows[:, None] < num_rows) & (cols[None, :] < D)
    xs = ()
    for i in tl.static_range(len(inputs)):
        xs = xs + (tl.load(inputs[i] + offsets, mask=mask, other=0.0).to(tl.float32),)
    for m in tl.static_range(len(KEPT)):
        mix = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for i in tl.static_range(len(inputs)):
            if ROW[m * len(inputs) + i] >= 0:
                row = coefs + ROW[m * len(inputs) + i] * D + cols
                mix += tl.load(row, mask=cols < D, other=0.0)[None, :] * xs[i]
        if KEPT[m] >= 0:
            kept = outputs[KEPT[m]]
            tl.store(kept + offsets, mix.to(kept.dtype.element_ty), mask=mask)
        if NORMED[m] >= 0:
            rstd = tl.rsqrt(tl.sum(mix * mix, axis=1) / D + NORM_EPS)
            normed = outputs[NORMED[m]]
            value = mix * (SCALE[m] * rstd)[:, None]
            tl.store(normed + offsets, value.to(normed.dtype.element_ty), mask=mask)


@triton.jit
def _mix_backward(
    saved, grads, outputs, coefs, partial, num_rows,
    ROW: tl.constexpr, TENSOR: tl.constexpr, MIX: tl.constexpr,
    KEPT: tl.constexpr, NORMED: tl.constexpr, SCALE: tl.constexpr,
    WANTED: tl.constexpr, NUM_COEFS: tl.constexpr, COEF_GRADS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of the tensors, and this program's sums over rows for the coefficients.

    A normed mix is read where it is saved, MIX, and otherwise computed again from the tensors: for
    the coefficients those have to be read anyway. Rows come one by one, the next ones on their way
    while one is worked on.
    """
    cols = tl.arange(0, BLOCK_D)
    inside = cols < D
    coef = ()
    sums = ()
    for k in tl.static_range(NUM_COEFS):
        coef = coef + (tl.load(coefs + k * D + cols, mask=inside, other=0.0),)
        sums = sums + (tl.zeros((BLOCK_D,), tl.float32),)
    for t in tl.range(tl.program_id(0), num_rows, tl.num_programs(0), num_stages=STAGES):
        place = tl.cast(t, tl.int64) * D + cols
        xs = ()
        dxs = ()
        for i in tl.static_range(len(WANTED)):
            if TENSOR[i] >= 0:
                x = tl.load(saved[TENSOR[i]] + place, mask=inside, other=0.0).to(tl.float32)
            else:
                x = tl.zeros((BLOCK_D,), tl.float32)
            xs = xs + (x,)
            dxs = dxs + (tl.zeros((BLOCK_D,), tl.float32),)
        for m in tl.static_range(len(KEPT)):
            dmix = tl.zeros((BLOCK_D,), tl.float32)
            if KEPT[m] >= 0:
                dmix += tl.load(grads[KEPT[m]] + place, mask=inside, other=0.0).to(tl.float32)
            if NORMED[m] >= 0:
                mix = tl.zeros((BLOCK_D,), tl.float32)
                if MIX[m] >= 0:
                    mix += tl.load(saved[MIX[m]] + place, mask=inside, other=0.0).to(tl.float32)
                else:
                    for i in tl.static_range(len(WANTED)):
                        if ROW[m * len(WANTED) + i] >= 0:
                            mix += coef[ROW[m * len(WANTED) + i]] * xs[i]
                dnormed = tl.load(grads[NORMED[m]] + place, mask=inside, other=0.0).to(tl.float32)
                rstd = tl.rsqrt(tl.sum(mix * mix) / D + NORM_EPS)
                along = tl.sum(dnormed * mix) * rstd * rstd / D
                dmix += SCALE[m] * rstd * (dnormed - along * mix)
            if KEPT[m] >= 0 or NORMED[m] >= 0:
                for i in tl.static_range(len(WANTED)):
                    if ROW[m * len(WANTED) + i] >= 0:
                        dxs = _added(dxs, i, coef[ROW[m * len(WANTED) + i]] * dmix)
                        if COEF_GRADS:
                            sums = _added(sums, ROW[m * len(WANTED) + i], xs[i] * dmix)
        for i in tl.static_range(len(WANTED)):
            if WANTED[i] >= 0:
                out = outputs[WANTED[i]]
                tl.store(out + place, dxs[i].to(out.dtype.element_ty), mask=inside)
    if COEF_GRADS:
        for k in tl.static_range(NUM_COEFS):
            row = partial + (tl.program_id(0) * NUM_COEFS + k) * D + cols
            tl.store(row, sums[k], mask=inside)


@triton.jit
def _added(values, index: tl.constexpr, more):
    """The tuple with `more` added to one member."""
    found = ()
    for i in tl.static_range(len(values)):
        if i == index:
            found = found + (values[i] + more,)
        else:
            found = found + (values[i],)
    return found


@triton.jit
def _total(inputs, out, num_elements, BLOCK: tl.constexpr):
    """The sum of all inputs."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < num_elements
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(len(inputs)):
        total += tl.load(inputs[i] + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _scale_rows(x, factors, out, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Each row of x times a factor of its own."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    value = tl.load(x + row * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    value *= tl.load(factors + row)
    tl.store(out + row * D + cols, value.to(out.dtype.element_ty), mask=cols < D)


def total(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape, rounded once."""
    out = torch.empty_like(tensors[0])
    if out.numel():
        grid = (triton.cdiv(out.numel(), TOTAL_ELEMENTS),)
        _total[grid](tuple(tensors), out, out.numel(), BLOCK=TOTAL_ELEMENTS)
    return out


def scale_rows(x_TD: Tensor, factors_T: Tensor) -> Tensor:
    """x times float32 factors [T], in x's type."""
    T, D = x_TD.shape
    out = torch.empty_like(x_TD)
    if T:
        _scale_rows[(T,)](x_TD, factors_T, out, D=D, BLOCK_D=triton.next_power_of_2(D))
    return out


def forward(
    tensors: Sequence[Tensor],
    coefs_KD: Tensor,
    rows: Sequence[int],
    kept: Sequence[int],
    normed: Sequence[int],
    scales: Sequence[float],
    num_outputs: int,
) -> list[Tensor]:
    """Launch the forward; the arguments are those of the op, worked out."""
    T, D = tensors[0].shape
    outputs = [torch.empty_like(tensors[0]) for _ in range(num_outputs)]
    block_D = triton.next_power_of_2(D)
    block_T = ROWS_A_PROGRAM
    _mix[(triton.cdiv(T, block_T),)](
        tuple(tensors), tuple(outputs), coefs_KD, T,
        ROW=tuple(rows), KEPT=tuple(kept), NORMED=tuple(normed), SCALE=tuple(scales),
        D=D, BLOCK_T=block_T, BLOCK_D=block_D, num_warps=4,
    )  # fmt: skip
    return outputs


def backward(
    saved: Sequence[Tensor],
    grads: Sequence[Tensor],
    coefs_KD: Tensor,
    rows: Sequence[int],
    tensors: Sequence[int],
    mixes: Sequence[int],
    kept: Sequence[int],
    normed: Sequence[int],
    scales: Sequence[float],
    results: Sequence[int],
    num_results: int,
    coef_grads: bool,
) -> list[Tensor]:
    """Launch the backward.

    Args:
        saved: tensors and combinations.
        grads: of outputs, at least one.
        tensors, mixes: place of each tensor and of each combination in `saved`, -1 for none.
        kept, normed: place of the gradients of each mix's outputs in `grads`, -1 for none.
        results: place of each tensor's gradient among those that are asked for, -1 for none.
        coef_grads: whether the coefficients' gradient is asked for; takes all tensors.

    Returns:
        gradients of the tensors that are asked for, then [K, D] of the coefficients if it is.
    """
    T, D = grads[0].shape
    K = coefs_KD.shape[0]
    outputs = [torch.empty_like(grads[0]) for _ in range(num_results)]
    block_D = triton.next_power_of_2(D)
    programs = max(1, min(T, PROGRAMS_AN_SM * num_sms(coefs_KD.device)))
    # A pointer that is not followed, where there are no sums.
    partial_PKD = coefs_KD
    if coef_grads:
        partial_PKD = coefs_KD.new_empty((programs, K, D), dtype=torch.float32)
    _mix_backward[(programs,)](
        tuple(saved or grads), tuple(grads), tuple(outputs), coefs_KD, partial_PKD, T,
        ROW=tuple(rows), TENSOR=tuple(tensors), MIX=tuple(mixes),
        KEPT=tuple(kept), NORMED=tuple(normed), SCALE=tuple(scales),
        WANTED=tuple(results), NUM_COEFS=K, COEF_GRADS=coef_grads,
        D=D, BLOCK_D=block_D, STAGES=STAGES, num_warps=4,
    )  # fmt: skip
    return [*outputs, partial_PKD.sum(0)] if coef_grads else outputs
