"""The MLP: an up-projection, (leaky_relu(x, 1/2))^2, and a down-projection.

As an op the activation happens in the up-projection's epilogue, its derivative in that of the
down-projection's backward, and the pre-activation is never written: see
`golf_ray.kernels.triton.mlp`.

Shapes: T tokens, D model dim, F hidden dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SLOPE = 0.5
"""Of the leaky ReLU; the kernels have it built in."""
ALIGN_BYTES = 16
"""Tensor descriptors ask for rows of a multiple of it."""
STRIPE_COLUMNS = {torch.float32: 32, torch.float16: 64, torch.bfloat16: 64}
"""Columns whose signs the kernels pack together."""
STRIPE_BYTES = 8
"""Of a row's packed signs in a stripe."""


def activation(x: Tensor) -> Tensor:
    """(leaky_relu(x, 1/2))^2."""
    return F.leaky_relu(x, SLOPE).square()


def mlp(n_TD: Tensor, up_FD: Tensor, down_DF: Tensor) -> tuple[Tensor, Tensor]:
    """The output [T, D], and the hidden activation [T, F]."""
    h_TF = activation(F.linear(n_TD, up_FD))
    return F.linear(h_TF, down_DF), h_TF


def mlp_fused(n_TD: Tensor, up_FD: Tensor, down_DF: Tensor) -> tuple[Tensor, Tensor]:
    """`mlp` with the activation inside of the products; the activation [T, F] has no gradient.

    Shapes that the kernels cannot address go through the twin.
    """
    if not fits(n_TD.shape[1], up_FD.shape[0], n_TD.dtype) or not len(n_TD):
        return mlp(n_TD, up_FD, down_DF)
    operands = n_TD.contiguous(), up_FD.contiguous(), down_DF.contiguous()
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in operands)
    y, h, _ = _mlp(*operands, gradient)
    return y, h


def fits(model_dim: int, hidden: int, dtype: torch.dtype) -> bool:
    """Whether the kernels can address matrices of that width."""
    return model_dim * dtype.itemsize % ALIGN_BYTES == 0 == hidden * dtype.itemsize % ALIGN_BYTES


def hidden_fused(n_TD: Tensor, up_FD: Tensor, *, gradient: bool) -> tuple[Tensor, Tensor]:
    """Activation [T, F] and its packed signs, for `hidden_gradient_fused`."""
    from golf_ray.kernels.triton import mlp as kernels

    return kernels.up(n_TD.contiguous(), up_FD, signs=gradient)


def hidden_gradient_fused(dy_TD: Tensor, down_DF: Tensor, h_TF: Tensor, signs: Tensor) -> Tensor:
    """The gradient of the pre-activation, [T, F]."""
    from golf_ray.kernels.triton import mlp as kernels

    return kernels.down_backward(dy_TD.contiguous(), down_DF, h_TF, signs)


def signs_shape(num_rows: int, hidden: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Shape of the packed signs of a hidden activation: stripes of columns, rows, bytes."""
    return -(-hidden // STRIPE_COLUMNS[dtype]), num_rows, STRIPE_BYTES


@torch.library.custom_op("golf_ray::mlp", mutates_args=())
def _mlp(n: Tensor, up: Tensor, down: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    from golf_ray.kernels.triton import mlp as kernels

    h, signs = kernels.up(n, up, signs=gradient)
    return F.linear(h, down), h, signs


@_mlp.register_fake
def _(n: Tensor, up: Tensor, down: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
    T, hidden = n.shape[0], up.shape[0]
    shape = signs_shape(T if gradient else 0, hidden, n.dtype)
    signs = n.new_empty(shape, dtype=torch.uint8)
    return n.new_empty(T, down.shape[0]), n.new_empty(T, hidden), signs


@torch.library.custom_op("golf_ray::mlp_backward", mutates_args=())
def _mlp_backward(
    dy: Tensor, n: Tensor, up: Tensor, down: Tensor, h: Tensor, signs: Tensor, weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    from golf_ray.kernels.triton import mlp as kernels

    dp = kernels.down_backward(dy, down, h, signs)
    dn = dp @ up
    if not weights:
        return dn, n.new_empty(0), n.new_empty(0)
    return dn, dp.t() @ n, dy.t() @ h


@_mlp_backward.register_fake
def _(
    dy: Tensor, n: Tensor, up: Tensor, down: Tensor, h: Tensor, signs: Tensor, weights: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dn = torch.empty_like(n)
    if not weights:
        return dn, n.new_empty(0), n.new_empty(0)
    return dn, torch.empty_like(up), torch.empty_like(down)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    _, h, signs = output
    ctx.save_for_backward(*inputs[:3], h, signs)
    ctx.mark_non_differentiable(h, signs)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, *_):  # type: ignore[no-untyped-def]
    n, up, down, h, signs = ctx.saved_tensors
    weights = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    dn, dup, ddown = _mlp_backward(dy.contiguous(), n, up, down, h, signs, weights)
    return dn, dup if weights else None, ddown if weights else None, None


_mlp.register_autograd(_differentiate, setup_context=_setup)
