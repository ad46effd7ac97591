"""The head: logits, softcap c tanh(z / c), cross entropy.

As an op the softmax, the loss and the logits' gradient come out of one pass over the raw logits,
the gradient in their place; float32 logits are never written.

Shapes: T tokens, D width of the head's input, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from golf_ray.kernels.wide import is_narrow, widened


def softcap(z: Tensor, cap: float) -> Tensor:
    """cap * tanh(z / cap) in float32 (float64 for float64)."""
    return cap * torch.tanh(widened(z) / cap)


def cross_entropy(z_TV: Tensor, targets_T: Tensor, cap: float) -> Tensor:
    """Losses in nats of raw logits, float32 [T]."""
    return F.cross_entropy(softcap(z_TV, cap), targets_T, reduction="none")


def head_losses(x_TD: Tensor, w_VD: Tensor, targets_T: Tensor, cap: float) -> Tensor:
    """`cross_entropy` of the logits x w^T.

    In 16 bits it is rounded where `head_losses_fused` rounds: the logits' gradient before the
    losses' own scales it. A mean's 1 / T is mostly no power of two, and (p - 1) / T of a small p is
    nearly the same number in every row: all would be rounded the same way, by up to 0.4%.
    """
    if is_narrow(x_TD.dtype):
        return _HeadLosses.apply(x_TD, w_VD, targets_T, cap)  # type: ignore[no-untyped-call]
    return cross_entropy(F.linear(x_TD, w_VD), targets_T, cap)


class _HeadLosses(torch.autograd.Function):
    """`head_losses` in 16 bits."""

    @staticmethod
    def forward(ctx, x, w, targets, cap):  # type: ignore[no-untyped-def]
        z = F.linear(x, w)
        ctx.save_for_backward(x, w, z, targets)
        ctx.cap = cap
        return cross_entropy(z, targets, cap)

    @staticmethod
    def backward(ctx, dlosses):  # type: ignore[no-untyped-def]
        x, w, z, targets = ctx.saved_tensors
        capped = softcap(z, ctx.cap)
        # In place: a batch's float32 logits are gigabytes.
        p = torch.softmax(capped, dim=1)
        p.scatter_add_(1, targets[:, None], p.new_full((len(p), 1), -1.0))
        dz = p.mul_(1.0 - (capped / ctx.cap).square_()).to(z.dtype)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = (dlosses[:, None] * (dz @ w)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dw = dz.t() @ (dlosses[:, None] * x).to(x.dtype)
        return dx, dw, None, None


def cross_entropy_fused(z_TV: Tensor, targets_T: Tensor, cap: float) -> Tensor:
    """`cross_entropy` as one kernel, for logits that something was added to."""
    gradient = z_TV.requires_grad and torch.is_grad_enabled()
    return _cross_entropy(z_TV.contiguous(), targets_T, cap, gradient)[0]


def head_losses_fused(x_TD: Tensor, w_VD: Tensor, targets_T: Tensor, cap: float) -> Tensor:
    """`head_losses`; the logits never leave the op."""
    gradient = (x_TD.requires_grad or w_VD.requires_grad) and torch.is_grad_enabled()
    return _head(x_TD.contiguous(), w_VD.contiguous(), targets_T, cap, gradient)[0]


@torch.library.custom_op("golf_ray::cross_entropy", mutates_args=())
def _cross_entropy(z: Tensor, targets: Tensor, cap: float, gradient: bool) -> tuple[Tensor, Tensor]:
    from golf_ray.kernels.triton import loss

    dz = torch.empty_like(z) if gradient else z.new_empty(0)
    return loss.cross_entropy(z, targets, cap, dz if gradient else None), dz


@_cross_entropy.register_fake
def _(z: Tensor, targets: Tensor, cap: float, gradient: bool) -> tuple[Tensor, Tensor]:
    losses = z.new_empty(z.shape[0], dtype=torch.float32)
    return losses, torch.empty_like(z) if gradient else z.new_empty(0)


def _setup_losses(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate_losses(ctx, dlosses, _):  # type: ignore[no-untyped-def]
    (dz,) = ctx.saved_tensors
    return (dlosses[:, None] * dz).to(dz.dtype), None, None, None


_cross_entropy.register_autograd(_differentiate_losses, setup_context=_setup_losses)


@torch.library.custom_op("golf_ray::head", mutates_args=())
def _head(
    x: Tensor, w: Tensor, targets: Tensor, cap: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    from golf_ray.kernels.triton import loss

    z = F.linear(x, w)
    losses = loss.cross_entropy(z, targets, cap, z if gradient else None)
    return losses, z if gradient else z.new_empty(0)


@_head.register_fake
def _(x: Tensor, w: Tensor, targets: Tensor, cap: float, gradient: bool) -> tuple[Tensor, Tensor]:
    losses = x.new_empty(x.shape[0], dtype=torch.float32)
    return losses, x.new_empty(x.shape[0], w.shape[0]) if gradient else x.new_empty(0)


@torch.library.custom_op("golf_ray::head_backward", mutates_args=())
def _head_backward(
    dlosses: Tensor, dz: Tensor, x: Tensor, w: Tensor, weights: bool
) -> tuple[Tensor, Tensor]:
    from golf_ray.kernels.triton.residual import scale_rows

    # The losses' own gradient scales rows: of the small factors, not of the logits.
    dlosses = dlosses.contiguous()
    dx = scale_rows(dz @ w, dlosses)
    if not weights:
        return dx, w.new_empty(0)
    return dx, dz.t() @ scale_rows(x, dlosses)


@_head_backward.register_fake
def _(dlosses: Tensor, dz: Tensor, x: Tensor, w: Tensor, weights: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(w) if weights else w.new_empty(0)


def _setup_head(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, w, *_ = inputs
    ctx.save_for_backward(x, w, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate_head(ctx, dlosses, _):  # type: ignore[no-untyped-def]
    x, w, dz = ctx.saved_tensors
    weights = ctx.needs_input_grad[1]
    dx, dw = _head_backward(dlosses, dz, x, w, weights)
    return dx, dw if weights else None, None, None, None


_head.register_autograd(_differentiate_head, setup_context=_setup_head)
