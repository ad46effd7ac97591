"""The embedding's rows, RMS-normed.

As an op one kernel looks rows up and norms them, and one adds the norm's gradient into a float32
table.

Shapes: T tokens, V vocabulary, E width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from golf_ray.kernels.heads import rms_norm


def embed(table_VE: Tensor, tokens_T: Tensor, dtype: torch.dtype) -> Tensor:
    """rms_norm(table[token]), [T, E]."""
    return rms_norm(F.embedding(tokens_T, table_VE).to(dtype))


def embed_fused(table_VE: Tensor, tokens_T: Tensor, dtype: torch.dtype) -> Tensor:
    """`embed` as one kernel."""
    return _embed(table_VE, tokens_T, dtype)


@torch.library.custom_op("golf_ray::embed", mutates_args=())
def _embed(table: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    from golf_ray.kernels.triton import embedding

    return embedding.lookup(table, tokens, dtype)


@_embed.register_fake
def _(table: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    return table.new_empty((tokens.shape[0], table.shape[1]), dtype=dtype)


@torch.library.custom_op("golf_ray::embed_backward", mutates_args=())
def _embed_backward(grad: Tensor, table: Tensor, tokens: Tensor) -> Tensor:
    from golf_ray.kernels.triton import embedding

    return embedding.lookup_backward(grad, table, tokens).to(table.dtype)


@_embed_backward.register_fake
def _(grad: Tensor, table: Tensor, tokens: Tensor) -> Tensor:
    return torch.empty_like(table)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    table, tokens, _ = inputs
    ctx.save_for_backward(table, tokens)


def _differentiate(ctx, grad):  # type: ignore[no-untyped-def]
    return _embed_backward(grad.contiguous(), *ctx.saved_tensors), None, None


_embed.register_autograd(_differentiate, setup_context=_setup)
