"""GPTQ: integer codes for a weight matrix, given the Gram matrix of its inputs.

Free functions on tensors; they know no model, no file and no configuration. Legend: N matrices of
one shape in a batch (any number of leading dimensions, or none), R rows (outputs), C columns
(inputs), S settings (scales and bits) of the same matrices, `c` the largest code, 2^(bits - 1) - 1.

Method: Frantar et al. 2022, arXiv:2210.17323, with columns in order of falling Hessian diagonal
and one scale a row that is rounded to float16 before any code is computed.

Invariant: rows do not see each other. So several clip widths of one matrix may be computed in one
call as extra rows, and what `prepare_factor` returns depends on the Hessian and the damping alone.
A setting's codes are the same, bit for bit, beside others and alone: all that has a shape to sum
over is done for one setting at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from golf_ray.errors import CheckpointError

MIN_ROW_STD = 1e-10
"""Lower bound of a row's standard deviation; float16 then rounds the scale of such a row to 0."""
MAX_DAMPING_RAISES = 6
"""How often the damping is raised tenfold before a Hessian counts as unusable."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Factor:
    """What GPTQ needs of a Hessian. Leading dimensions are those of the Hessian."""

    order_C: Tensor
    """int64 [..., C]: the columns in the order in which they are quantised."""
    dead_C: Tensor
    """bool [..., C]: columns (original order) that no input ever reached."""
    upper_CC: Tensor
    """float32 [..., C, C]: U with U^T U = H^-1, rows and columns in `order_C`."""
    damping: Tensor
    """float64 [...]: the damping used; more than was asked for where Cholesky failed at that."""


def max_code(bits: int) -> int:
    """The largest code c of `bits` bits; codes run from -c to c."""
    assert 2 <= bits <= 8, bits
    return (1 << (bits - 1)) - 1


def row_scales(w_RC: Tensor, clip_sigmas: float | Tensor, bits: int | Tensor) -> Tensor:
    """Scale of each row: clip_sigmas standard deviations (unbiased) are the largest code.

    Args:
        w_RC: float [..., R, C].
        clip_sigmas: one number, or a tensor that broadcasts to [..., R].
        bits: likewise; from 2 to 8.

    Returns:
        float16 [..., R]. A row that is constant to within float16 has scale 0.
    """
    std_R = w_RC.float().std(dim=-1, correction=1).clamp_min(MIN_ROW_STD)
    return (clip_sigmas * std_R / _max_codes(bits)).half()


def prepare_factor(
    hessian_CC: Tensor, damping: float, *, names: Sequence[str] | None = None
) -> Factor:
    """The column order and the upper Cholesky factor of the inverse Hessian.

    Dead columns (diagonal 0) get diagonal 1, then `damping` times the mean diagonal is added to
    the diagonal, then columns are ordered. A Hessian whose Cholesky factorisation fails gets ten
    times the damping, up to `MAX_DAMPING_RAISES` times, and `Factor.damping` says what was used;
    other matrices of the batch do not change by it. The factorisation runs in float64: a Gram
    matrix of few inputs is nearly singular, and float32 would fail where the damping suffices.

    Args:
        hessian_CC: [..., C, C], symmetric.
        damping: part of the mean diagonal.
        names: one name a matrix (leading dimensions flattened), for error messages.

    Raises:
        CheckpointError: a Hessian is not finite, or cannot be factorised at any damping.
    """
    batch, num_columns = hessian_CC.shape[:-2], hessian_CC.shape[-1]
    h_NCC = hessian_CC.reshape(-1, num_columns, num_columns).double()
    _require_finite(h_NCC, "the Hessian", names, "calibrate again and check the weights")
    diagonal_NC = h_NCC.diagonal(dim1=-2, dim2=-1)
    dead_NC = diagonal_NC == 0
    h_NCC = h_NCC.masked_fill(dead_NC[:, :, None] | dead_NC[:, None, :], 0.0)
    h_NCC.diagonal(dim1=-2, dim2=-1).add_(dead_NC)
    diagonal_NC = h_NCC.diagonal(dim1=-2, dim2=-1).clone()
    # Damping adds one number to a whole diagonal, so it does not change the order.
    order_NC = torch.argsort(diagonal_NC, dim=-1, descending=True, stable=True)
    h_NCC = _permuted(h_NCC, order_NC)
    mean_N = diagonal_NC.mean(dim=-1)
    used_N = torch.full_like(mean_N, damping)
    upper_NCC, failed_N = _inverse_factor(h_NCC, used_N * mean_N)
    for _ in range(MAX_DAMPING_RAISES):
        if not failed_N.any():
            break
        index = failed_N.nonzero().squeeze(-1)
        used_N[index] = (10.0 * used_N[index]).clamp_min(1e-6)
        upper_NCC[index], failed_N[index] = _inverse_factor(
            h_NCC[index], used_N[index] * mean_N[index]
        )
    if failed_N.any():
        at = int(failed_N.nonzero()[0])
        raise CheckpointError(
            f"the Hessian of {_name(names, at)} cannot be factorised"
            f" (damping raised from {damping:g} to {float(used_N[at]):g})",
            "calibrate with more tokens",
        )
    return Factor(
        order_C=order_NC.reshape(*batch, num_columns),
        dead_C=dead_NC.reshape(*batch, num_columns),
        upper_CC=upper_NCC.float().reshape(*batch, num_columns, num_columns),
        damping=used_N.reshape(batch),
    )


def gptq_codes(
    w_RC: Tensor,
    scale_R: Tensor,
    bits: int | Tensor,
    factor: Factor,
    block_columns: int = 128,
    *,
    names: Sequence[str] | None = None,
) -> Tensor:
    """Codes of a batch of matrices, each column's error spread over the columns after it.

    Per column j in the factor's order: q = clamp(round(w / s), -c, c), err = (w - q s) / U_jj and
    w_rest -= err U_j,rest; inside a block of columns at once, for the columns after the block as
    one product. A row of scale 0 has codes 0.

    Args:
        w_RC: float [..., R, C], leading dimensions as in `factor`.
        scale_R: float16 [..., R], as of `row_scales`.
        bits: one number, or a tensor that broadcasts to [..., R].
        factor: of the matrices' Hessians.
        block_columns: columns of a block; changes rounding only.
        names: one name a matrix (leading dimensions flattened), for error messages.

    Returns:
        int8 [..., R, C], columns in their original order.

    Raises:
        CheckpointError: a weight or a scale is not finite.
    """
    return gptq_codes_many(w_RC, scale_R[None], bits, factor, block_columns, names=names)[0]


def gptq_codes_many(
    w_RC: Tensor,
    scale_SR: Tensor,
    bits: int | Tensor,
    factor: Factor,
    block_columns: int = 128,
    *,
    names: Sequence[str] | None = None,
) -> Tensor:
    """`gptq_codes` of S settings of the same matrices, in one pass over their columns.

    Takes about 10 bytes of memory a code.

    Args:
        scale_SR: float16 [S, ..., R].
        bits: one number, or a tensor that broadcasts to [S, ..., R].

    Returns:
        int8 [S, ..., R, C]; each of the S is what `gptq_codes` gives for it.

    Raises:
        CheckpointError: a weight or a scale is not finite.
    """
    num_settings = len(scale_SR)
    batch, (num_rows, num_columns) = w_RC.shape[:-2], w_RC.shape[-2:]
    w_NRC = w_RC.reshape(-1, num_rows, num_columns).float()
    order_NC = factor.order_C.reshape(-1, num_columns)
    upper_NCC = factor.upper_CC.reshape(-1, num_columns, num_columns)
    scale_SNR = scale_SR.reshape(num_settings, -1, num_rows).float()
    assert len(w_NRC) == len(upper_NCC) == scale_SNR.shape[1], "one factor and scale row a matrix"
    _check_inputs(w_NRC, scale_SNR.transpose(0, 1), names)
    limit_SNR = _max_codes(bits, like=scale_SR).expand(scale_SR.shape).reshape(scale_SNR.shape)
    dead_NC = factor.dead_C.reshape(-1, 1, num_columns)
    # Transposed, so that one column of all rows is one contiguous row of memory.
    w_NCR = w_NRC.masked_fill(dead_NC, 0.0).transpose(-1, -2)
    w_NCR = w_NCR.gather(1, order_NC[:, :, None].expand_as(w_NCR))
    w_SNCR = w_NCR.repeat(num_settings, 1, 1, 1)
    codes_SNCR = _ordered_codes(w_SNCR, scale_SNR, limit_SNR.float(), upper_NCC, block_columns)
    result_SNCR = torch.empty_like(codes_SNCR)
    result_SNCR.scatter_(2, order_NC[None, :, :, None].expand_as(codes_SNCR), codes_SNCR)
    result_SNRC = result_SNCR.transpose(-1, -2).contiguous()
    return result_SNRC.reshape(num_settings, *batch, num_rows, num_columns)


def rounded_codes(
    w_RC: Tensor, scale_R: Tensor, bits: int | Tensor, *, names: Sequence[str] | None = None
) -> Tensor:
    """Round-to-nearest codes, int8 [..., R, C]: what GPTQ improves on, and its result for H = I.

    Raises:
        CheckpointError: a weight or a scale is not finite.
    """
    _check_inputs(w_RC.reshape(-1, *w_RC.shape[-2:]), scale_R.reshape(-1, w_RC.shape[-2]), names)
    limit_R1 = _max_codes(bits, like=scale_R).expand(scale_R.shape)[..., None].float()
    q_RC = torch.round(w_RC.float() / _divisor(scale_R.float())[..., None])
    return q_RC.clamp(-limit_R1, limit_R1).to(torch.int8)


def weighted_error(w_RC: Tensor, codes_RC: Tensor, scale_R: Tensor, hessian_CC: Tensor) -> Tensor:
    """Mean squared output error of each matrix, float64 [...]: tr(D H D^T) with D = w - q s."""
    diff_RC = w_RC.double() - codes_RC.double() * scale_R.double()[..., None]
    return ((diff_RC @ hessian_CC.double()) * diff_RC).sum(dim=(-2, -1))


@contextlib.contextmanager
def matmul_precision(precision: Literal["highest", "high"]) -> Iterator[None]:
    """Arithmetic of float32 products inside the block, whatever the process has chosen.

    `highest` is full float32 on every device, `high` lets a GPU round factors to TF32 (11 bits).
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
def _ordered_codes(
    w_SNCR: Tensor, scale_SNR: Tensor, limit_SNR: Tensor, upper_NCC: Tensor, block_columns: int
) -> Tensor:
    """Codes int8 [S, N, C, R] with columns already in order; overwrites `w_SNCR`."""
    num_columns = w_SNCR.shape[2]
    codes_SNCR = torch.empty_like(w_SNCR, dtype=torch.int8)
    divisor_SNR = _divisor(scale_SNR)
    low_SNR = -limit_SNR
    diagonal_NC = upper_NCC.diagonal(dim1=-2, dim2=-1)
    with matmul_precision("highest"):
        for start in range(0, num_columns, block_columns):
            end = min(start + block_columns, num_columns)
            error_SNBR = w_SNCR.new_empty((*w_SNCR.shape[:2], end - start, w_SNCR.shape[3]))
            for j in range(start, end):
                w_SNR = w_SNCR[:, :, j]
                q_SNR = torch.round(w_SNR / divisor_SNR).clamp_(low_SNR, limit_SNR)
                codes_SNCR[:, :, j] = q_SNR
                error_SNR = (w_SNR - q_SNR * scale_SNR) / diagonal_NC[:, j, None]
                error_SNBR[:, :, j - start] = error_SNR
                if j + 1 < end:
                    rest = upper_NCC[:, j, j + 1 : end, None]
                    w_SNCR[:, :, j + 1 : end].addcmul_(rest, error_SNR[:, :, None], value=-1.0)
            if end < num_columns:
                cross_NXB = upper_NCC[:, start:end, end:].transpose(-1, -2)
                # One setting at a time: a product's last bits depend on its shape.
                for w_NCR, error_NBR in zip(w_SNCR, error_SNBR, strict=True):
                    w_NCR[:, end:].baddbmm_(cross_NXB, error_NBR, alpha=-1.0)
    return codes_SNCR


def _inverse_factor(h_NCC: Tensor, added_N: Tensor) -> tuple[Tensor, Tensor]:
    """Upper Cholesky factors of (H + added I)^-1, and a mask of the matrices that failed.

    With J the reversal of rows and columns and J H J = M M^T (M lower), J M^-1 J is upper and is
    the factor wanted: one factorisation and one triangular inverse, and H^-1 is never formed.
    """
    reversed_NCC = h_NCC.flip((-1, -2))
    reversed_NCC.diagonal(dim1=-2, dim2=-1).add_(added_N[:, None])
    lower_NCC, info_N = torch.linalg.cholesky_ex(reversed_NCC)
    # A failed factor may hold anything; the identity keeps the batch going until it is redone.
    eye_CC = torch.eye(h_NCC.shape[-1], dtype=h_NCC.dtype, device=h_NCC.device)
    lower_NCC = torch.where((info_N != 0)[:, None, None], eye_CC, lower_NCC)
    upper_NCC = torch.linalg.solve_triangular(
        lower_NCC, eye_CC.expand_as(lower_NCC), upper=False
    ).flip((-1, -2))
    return upper_NCC, (info_N != 0) | ~upper_NCC.isfinite().all(dim=-1).all(dim=-1)


def _permuted(h_NCC: Tensor, order_NC: Tensor) -> Tensor:
    rows_NCC = h_NCC.gather(1, order_NC[:, :, None].expand_as(h_NCC))
    return rows_NCC.gather(2, order_NC[:, None, :].expand_as(h_NCC))


def _divisor(scale_R: Tensor) -> Tensor:
    """Scales to divide by: a row of scale 0 gives codes 0 instead of 0 / 0."""
    return torch.where(scale_R == 0, torch.inf, scale_R)


def _max_codes(bits: int | Tensor, like: Tensor | None = None) -> Tensor:
    device = like.device if like is not None else None
    bits_tensor = torch.as_tensor(bits, device=device)
    assert bool(((bits_tensor >= 2) & (bits_tensor <= 8)).all()), "bits run from 2 to 8"
    return 2 ** (bits_tensor - 1) - 1


def _check_inputs(w_NRC: Tensor, scale_NR: Tensor, names: Sequence[str] | None) -> None:
    _require_finite(w_NRC, "the weight", names, "train again or take an earlier checkpoint")
    _require_finite(scale_NR, "the row scale", names, "its weights are too large for float16")


def _require_finite(x_N: Tensor, what: str, names: Sequence[str] | None, remedy: str) -> None:
    """Raise where an entry along the first dimension holds a number that is not finite."""
    finite_N = x_N.isfinite().flatten(1).all(dim=1)
    if not finite_N.all():
        at = int((~finite_N).nonzero()[0])
        raise CheckpointError(f"{what} of {_name(names, at)} is not finite", remedy)


def _name(names: Sequence[str] | None, index: int) -> str:
    return names[index] if names is not None else f"matrix {index} of the batch"
