"""Mixes of residual-stream tensors: per-channel linear combinations and their norms, in one pass.

Between two matrix products a layer adds, scales and norms tensors of the model's width: the output
of the layer before, a skip, the embedding. All of that is, channel by channel, a linear combination

    mix = sum_i coefs[row_i] * tensor_i        rms = mix / sqrt(mean(mix^2) + eps) * scale

so one operation does all of it: every tensor is read once, however many mixes it enters, and
nothing in between is written. The arithmetic is float32 (float64 for float64), each output is
rounded once.

Shapes: T rows, D channels, K rows of coefficients. Invariant: a row's outputs follow from that row
of the tensors alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Mix:
    """One linear combination and what is wanted of it."""

    terms: tuple[tuple[int, int], ...]
    """(tensor, row of the coefficients) pairs; a tensor at most once."""
    keep: bool = True
    """Whether the combination itself is an output."""
    scale: float | None = None
    """Factor on the combination's RMS norm, which is an output then; None for no norm."""


def mix(tensors: Sequence[Tensor], coefs_KD: Tensor, mixes: Sequence[Mix]) -> list[Tensor]:
    """The outputs of all mixes, in torch's own operations.

    Args:
        tensors: [T, D] each, of one type.
        coefs_KD: [K, D] float32.
        mixes: for each its combination, then its norm, where asked for.
    """
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    rows = coefs_KD.to(wide).unbind(0)
    outputs = []
    for one in mixes:
        (first, row), *others = one.terms
        combined = rows[row] * tensors[first].to(wide)
        for i, row in others:
            combined = torch.addcmul(combined, rows[row], tensors[i].to(wide))
        if one.keep:
            outputs.append(combined.to(tensors[0].dtype))
        if one.scale is not None:
            normed = F.rms_norm(combined, combined.shape[-1:]) * one.scale
            outputs.append(normed.to(tensors[0].dtype))
    return outputs


def mix_fused(tensors: Sequence[Tensor], coefs_KD: Tensor, mixes: Sequence[Mix]) -> list[Tensor]:
    """`mix` as one kernel, and one for the backward."""
    rows = [-1] * (len(mixes) * len(tensors))
    for m, one in enumerate(mixes):
        for i, row in one.terms:
            rows[m * len(tensors) + i] = row
    keep = [one.keep for one in mixes]
    scales = [one.scale if one.scale is not None else 0.0 for one in mixes]
    return _mix([t.contiguous() for t in tensors], coefs_KD, rows, keep, scales)


def fan_out(x_TD: Tensor, count: int) -> list[Tensor]:
    """One tensor for `count` users: their gradients are added up in one pass, rounded once."""
    if count < 2 or not (x_TD.requires_grad and torch.is_grad_enabled()):
        return [x_TD] * count
    return list(_FanOut.apply(x_TD, count))


class _FanOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, count):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for _ in range(count))

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        from golf_ray.kernels.triton import residual

        found = [grad.contiguous() for grad in grads if grad is not None]
        return residual.total(found) if found else None, None


def _places(keep: list[bool], scales: list[float]) -> tuple[list[int], list[int], int]:
    """Where each mix's combination and norm stand among the outputs, -1 for nowhere."""
    kept, normed, count = [], [], 0
    for wanted, scale in zip(keep, scales, strict=True):
        kept.append(count if wanted else -1)
        count += wanted
        normed.append(count if scale else -1)
        count += scale != 0.0
    return kept, normed, count


@torch.library.custom_op("golf_ray::mix", mutates_args=())
def _mix(
    tensors: list[Tensor], coefs: Tensor, rows: list[int], keep: list[bool], scales: list[float]
) -> list[Tensor]:
    from golf_ray.kernels.triton import residual

    kept, normed, count = _places(keep, scales)
    return residual.forward(tensors, coefs, rows, kept, normed, scales, count)


@_mix.register_fake
def _(
    tensors: list[Tensor], coefs: Tensor, rows: list[int], keep: list[bool], scales: list[float]
) -> list[Tensor]:
    return [torch.empty_like(tensors[0]) for _ in range(_places(keep, scales)[2])]


@torch.library.custom_op("golf_ray::mix_backward", mutates_args=())
def _mix_backward(
    grads: list[Tensor],
    tensors: list[Tensor],
    coefs: Tensor,
    rows: list[int],
    keep: list[bool],
    scales: list[float],
    wanted: list[bool],
    coef_grads: bool,
) -> list[Tensor]:
    from golf_ray.kernels.triton import residual

    kept, normed, _ = _places(keep, scales)
    found, dcoefs = residual.backward(
        tensors, grads, coefs, rows, kept, normed, scales, _order(wanted), coef_grads
    )
    return [*found, dcoefs]


@_mix_backward.register_fake
def _(
    grads: list[Tensor],
    tensors: list[Tensor],
    coefs: Tensor,
    rows: list[int],
    keep: list[bool],
    scales: list[float],
    wanted: list[bool],
    coef_grads: bool,
) -> list[Tensor]:
    found = [torch.empty_like(t) for t, want in zip(tensors, wanted, strict=True) if want]
    return [*found, torch.empty_like(coefs)]


def _order(wanted: list[bool]) -> list[int]:
    """Place of each among those that are wanted, -1 for the others."""
    return [sum(wanted[:i]) if want else -1 for i, want in enumerate(wanted)]


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    tensors, coefs, ctx.rows, ctx.keep, ctx.scales = inputs
    ctx.wanted = [bool(t.requires_grad) for t in tensors]
    ctx.save_for_backward(*tensors, coefs)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grads):  # type: ignore[no-untyped-def]
    *tensors, coefs = ctx.saved_tensors
    # An output that nothing used has no gradient.
    grads = [torch.zeros_like(tensors[0]) if g is None else g.contiguous() for g in grads]
    coef_grads = ctx.needs_input_grad[1]
    *found, dcoefs = _mix_backward(
        grads, tensors, coefs, ctx.rows, ctx.keep, ctx.scales, ctx.wanted, coef_grads
    )
    order = _order(ctx.wanted)
    dtensors = [found[place] if place >= 0 else None for place in order]
    return dtensors, dcoefs if coef_grads else None, None, None, None


_mix.register_autograd(_differentiate, setup_context=_setup)
