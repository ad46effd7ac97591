"""Mixes of residual-stream tensors: per-channel linear combinations and their norms, in one pass.

Between two matrix products a layer adds, scales and norms tensors of the model's width: the output
of the layer before, a skip, the embedding. All of that is, channel by channel, a linear combination

    mix = sum_i coefs[row_i] * tensor_i        rms = mix / sqrt(mean(mix^2) + eps) * scale

so one operation does all of it: every tensor is read once, however many mixes it enters, and
nothing in between is written. The arithmetic is float32 (float64 for float64), each output is
rounded once.

Where the coefficients are frozen, a backward needs nothing but the values of normed combinations;
those that are outputs are kept instead of the tensors (`_saved`).

Shapes: T rows, D channels, K rows of coefficients. Invariant: a row's outputs follow from that row
of the tensors alone.
"""

from __future__ import annotations

import functools
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


def _places(keep: Sequence[bool], scales: Sequence[float]) -> tuple[list[int], list[int], int]:
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


Bools = tuple[bool, ...]
Ints = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Backward:
    """What a backward reads and writes: places in lists, -1 for nowhere."""

    tensors: Ints
    """Each tensor among what is saved."""
    mixes: Ints
    """Each normed combination among what is saved; one that is not there is computed again."""
    kept: Ints
    """The gradient of each combination among those that are given."""
    normed: Ints
    """The gradient of each norm among those that are given."""
    results: Ints
    """The gradient of each tensor among the results."""
    num_results: int


@functools.lru_cache(maxsize=4096)
def _saved(rows: Ints, keep: Bools, scales: tuple[float, ...], wanted: Bools) -> tuple[Ints, Ints]:
    """The tensors and the outputs that are saved for a backward without coefficients' gradients.

    Only a norm's gradient takes a value then: its combination's, which is an output or is made
    again of its tensors.
    """
    N = len(wanted)
    kept, normed, _ = _places(keep, scales)
    needed = {}
    for m, place in enumerate(normed):
        terms = {i for i in range(N) if rows[m * N + i] >= 0}
        if place >= 0 and any(wanted[i] for i in terms):
            needed[m] = terms
    tensors = {i for m, terms in needed.items() if kept[m] < 0 for i in terms}
    # Tensors that are read in any case cost less than the output.
    outputs = [kept[m] for m, terms in needed.items() if kept[m] >= 0 and not terms <= tensors]
    return tuple(sorted(tensors)), tuple(outputs)


@functools.lru_cache(maxsize=4096)
def _backward(
    rows: Ints,
    keep: Bools,
    scales: tuple[float, ...],
    wanted: Bools,
    given: Bools,
    coef_grads: bool,
) -> _Backward:
    """The backward's plan.

    Args:
        wanted: which tensors get a gradient, where one reaches them.
        given: which outputs have a gradient.
    """
    N, M = len(wanted), len(keep)
    # The coefficients' gradients take every tensor.
    tensors: Ints = tuple(range(N))
    outputs: Ints = ()
    if not coef_grads:
        tensors, outputs = _saved(rows, keep, scales, wanted)
    grads = _order(given)
    kept, normed, _ = _places(keep, scales)
    dkept, dnormed = ([grads[o] if o >= 0 else -1 for o in places] for places in (kept, normed))
    reached = [
        any(rows[m * N + i] >= 0 and max(dkept[m], dnormed[m]) >= 0 for m in range(M))
        for i in range(N)
    ]
    results = [want and reach for want, reach in zip(wanted, reached, strict=True)]
    return _Backward(
        tensors=tuple(tensors.index(i) if i in tensors else -1 for i in range(N)),
        mixes=tuple(len(tensors) + outputs.index(o) if o in outputs else -1 for o in kept),
        kept=tuple(dkept),
        normed=tuple(dnormed),
        results=tuple(_order(results)),
        num_results=sum(results),
    )


def _order(wanted: Sequence[bool]) -> list[int]:
    """Place of each among those that are wanted, -1 for the others."""
    return [sum(wanted[:i]) if want else -1 for i, want in enumerate(wanted)]


@torch.library.custom_op("golf_ray::mix_backward", mutates_args=())
def _mix_backward(
    grads: list[Tensor],
    saved: list[Tensor],
    coefs: Tensor,
    rows: list[int],
    keep: list[bool],
    scales: list[float],
    wanted: list[bool],
    given: list[bool],
    coef_grads: bool,
) -> list[Tensor]:
    from golf_ray.kernels.triton import residual

    plan = _backward(
        tuple(rows), tuple(keep), tuple(scales), tuple(wanted), tuple(given), coef_grads
    )
    return residual.backward(
        saved,
        grads,
        coefs,
        rows,
        plan.tensors,
        plan.mixes,
        plan.kept,
        plan.normed,
        scales,
        plan.results,
        plan.num_results,
        coef_grads,
    )


@_mix_backward.register_fake
def _(
    grads: list[Tensor],
    saved: list[Tensor],
    coefs: Tensor,
    rows: list[int],
    keep: list[bool],
    scales: list[float],
    wanted: list[bool],
    given: list[bool],
    coef_grads: bool,
) -> list[Tensor]:
    plan = _backward(
        tuple(rows), tuple(keep), tuple(scales), tuple(wanted), tuple(given), coef_grads
    )
    found = [torch.empty_like(grads[0]) for _ in range(plan.num_results)]
    return [*found, torch.empty_like(coefs)] if coef_grads else found


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    tensors, coefs, *ctx.mixes = inputs
    ctx.wanted = [bool(t.requires_grad) for t in tensors]
    ctx.coef_grads = bool(coefs.requires_grad)
    saved = tensors
    if not ctx.coef_grads:
        needed, outputs = _saved(*map(tuple, ctx.mixes), tuple(ctx.wanted))
        saved = [*(tensors[i] for i in needed), *(output[i] for i in outputs)]
    ctx.save_for_backward(*saved, coefs)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grads):  # type: ignore[no-untyped-def]
    *saved, coefs = ctx.saved_tensors
    if ctx.coef_grads:
        # An output that nothing used has no gradient.
        grads = [torch.zeros_like(saved[0]) if g is None else g for g in grads]
    given = [g is not None for g in grads]
    plan = _backward(*map(tuple, ctx.mixes), tuple(ctx.wanted), tuple(given), ctx.coef_grads)
    found = []
    if plan.num_results or ctx.coef_grads:
        grads = [g.contiguous() for g in grads if g is not None]
        found = _mix_backward(grads, saved, coefs, *ctx.mixes, ctx.wanted, given, ctx.coef_grads)
    dtensors = [found[place] if place >= 0 else None for place in plan.results]
    return dtensors, found[-1] if ctx.coef_grads else None, None, None, None


_mix.register_autograd(_differentiate, setup_context=_setup)
