"""What enters each layer: the residual stream as mixes of few tensors, and their coefficients.

Between two layers nothing but per-channel factors acts on the stream: residual scales, the mix with
the embedding, skips with their gates, the lanes' lambdas. So what a layer's norm sees is a linear
combination of the tensors that the layer before left, and these tables hold its coefficients.

With x a layer's input, x0 the embedding, y and b what the layer before left (its stream after
attention, and its MLP's output), k a kept skip:

    x = y + mlp_scale b            what the layer before would have put out
    x <- f x + h k                 where a skip enters: f = sigmoid(g), h = (1 - f) w; ungated 1, w
    u = m0 x + m1 x0               the mix with the embedding
    y = u + attn_scale a           after attention

In lanes l0, l1 with outputs a and b of attention and MLP (r, p the lambdas of the layer before):

    l_k <- r_k l_k + p_0k attn_scale a + p_1k mlp_scale b      skips enter l0, u = m0 l0 + m1 x0

Coefficients are products of small tensors in float32; those of all layers are made together, for a
product a layer would be hundreds of tiny kernels.

Shapes: D model dim, S passes over layers, K rows of a table.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from golf_ray.config import ModelConfig
from golf_ray.kernels.residual import Mix
from golf_ray.model.layout import VirtualLayer

Lookup = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True)
class Entry:
    """The mixes at one place, over the tensors of the stream, then a skip, then the embedding."""

    mixes: tuple[Mix, ...]
    coefs_KD: Tensor
    takes_skip: bool = False
    """Whether a kept tensor is among the tensors."""
    takes_embedding: bool = False
    keeps: bool = False
    """Whether the first output is kept for a later skip."""


@dataclass(frozen=True, slots=True)
class Mixing:
    """All mixes of a pass, in order."""

    entries: tuple[Entry, ...]
    """Before each layer: outputs are the kept tensor if any, then the stream and its norm; in lanes
    lane 0, lane 1, lane 1's norm, and the norm of the mix for attention."""
    after_attention: tuple[Entry, ...]
    """Of each layer that is not in lanes: the stream and its norm."""
    last: Entry
    """The final norm."""


def mixing(config: ModelConfig, plan: Sequence[VirtualLayer], tensor: Lookup) -> Mixing:
    """The tables of a pass.

    Args:
        plan: its layers in order.
        tensor: a small tensor of the state dict by name, in float32.
    """
    factors = _factors(config, plan, tensor)
    splits = next((s for s, step in enumerate(plan) if step.lanes), len(plan))
    single = _single_tables(plan, splits, factors)
    leaving = _leaving_lanes(plan[splits:], factors, tensor) if splits < len(plan) else None
    entries = [_single_entry(config, plan, s, single[s]) for s in range(splits)]
    if leaving is not None:
        entries.append(_split_entry(config, plan, splits, factors))
        tables = _lane_tables(leaving, factors, splits)
        entries += [
            _lane_entry(config, plan, splits + 1 + j, table) for j, table in enumerate(tables)
        ]
    after = torch.stack((torch.ones_like(factors.attn_SD), factors.attn_SD), 1).unbind(0)
    return Mixing(
        entries=tuple(entries),
        after_attention=tuple(
            Entry((Mix(terms=((0, 0), (1, 1)), scale=norm_scale(config, step)),), table)
            for step, table in zip(plan, after, strict=True)
        ),
        last=_last_entry(config, factors, leaving),
    )


def norm_scale(config: ModelConfig, step: VirtualLayer) -> float:
    """Factor on the normed inputs of a layer."""
    return 1 / math.sqrt(step.layer + 1) if config.ln_scale else 1.0


# Factors of all passes --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Factors:
    """Per-channel factors, a row a pass."""

    m0_SD: Tensor
    m1_SD: Tensor
    attn_SD: Tensor
    mlp_SD: Tensor
    f_SD: Tensor
    """On the stream where a skip enters, 1 where none does."""
    h_SD: Tensor
    """On the skip, 0 where none enters."""
    left_SD: Tensor
    """On the MLP's output of the layer before."""


def _factors(config: ModelConfig, plan: Sequence[VirtualLayer], tensor: Lookup) -> _Factors:
    def stacked(name: str) -> Tensor:
        own = [tensor(f"blocks.{i}.{name}") for i in range(config.num_layers)]
        return torch.stack([own[step.layer] for step in plan])

    m0_SD, m1_SD = stacked("resid_mix").unbind(1)
    mlp_SD = stacked("mlp_scale")
    f_SD, h_SD = _skip_factors(config, plan, tensor)
    return _Factors(
        m0_SD=m0_SD,
        m1_SD=m1_SD,
        attn_SD=stacked("attn_scale"),
        mlp_SD=mlp_SD,
        f_SD=f_SD,
        h_SD=h_SD,
        left_SD=torch.cat((torch.ones_like(mlp_SD[:1]), mlp_SD[:-1])),
    )


def _skip_factors(
    config: ModelConfig, plan: Sequence[VirtualLayer], tensor: Lookup
) -> tuple[Tensor, Tensor]:
    with_skip = [s for s, step in enumerate(plan) if step.skip is not None]
    count, first = len(with_skip), with_skip[0] if with_skip else len(plan)
    assert with_skip == list(range(first, first + count)), "skips enter passes in a row"
    h = tensor("skip_weights")[:count]
    f = torch.ones_like(h)
    if config.skip_gates:
        f = torch.sigmoid(tensor("skip_gates")[:count])
        h = (1 - f) * h
    if count and _joins(plan, first):
        f, h = torch.cat((f[:1] + h[:1], f[1:])), torch.cat((torch.zeros_like(h[:1]), h[1:]))
    before, behind = (first, h.shape[1]), (len(plan) - first - count, h.shape[1])
    return (
        torch.cat((h.new_ones(before), f, h.new_ones(behind))),
        torch.cat((h.new_zeros(before), h, h.new_zeros(behind))),
    )


def _joins(plan: Sequence[VirtualLayer], s: int) -> bool:
    """Whether the skip that enters pass `s` is what the pass before has just left: it adds to the
    stream's own factor then, and is no tensor of its own."""
    return plan[s].skip is not None and s > 0 and plan[s - 1].pushes_skip


def _takes_skip(plan: Sequence[VirtualLayer], s: int) -> bool:
    return plan[s].skip is not None and not _joins(plan, s)


def _keeps(plan: Sequence[VirtualLayer], s: int) -> bool:
    """Whether what the pass before left has to be kept for later."""
    return s > 0 and plan[s - 1].pushes_skip and not _joins(plan, s)


# Passes that are not in lanes -------------------------------------------------------------------


def _single_tables(
    plan: Sequence[VirtualLayer], count: int, factors: _Factors
) -> tuple[Tensor, ...]:
    """Rows of each of the first `count` passes: of a skip if one enters; of the stream y, the
    MLP's b, the embedding; and where x itself is kept, its own of b and y."""
    own = factors.m0_SD * factors.f_SD
    skip, left = factors.m0_SD * factors.h_SD, factors.left_SD
    rows = (skip, own, own * left, factors.m1_SD, left, torch.ones_like(own))
    table = torch.stack(rows, 1)
    # A row that no mix uses would cost a sum over all tokens in the backward, a pass that none
    # uses a tensor of zeros: so runs of passes of one kind are cut out together.
    kinds = [
        _SKIP if _takes_skip(plan, s) else _KEPT if _keeps(plan, s) else _PLAIN
        for s in range(count)
    ]
    tables: list[Tensor] = []
    for kind, run in itertools.groupby(range(count), key=lambda s: kinds[s]):
        passes = list(run)
        tables += table[passes[0] : passes[-1] + 1, slice(*kind)].unbind(0)
    return tuple(tables)


_PLAIN, _SKIP, _KEPT = (1, 4), (0, 4), (1, 6)


def _single_entry(
    config: ModelConfig, plan: Sequence[VirtualLayer], s: int, table: Tensor
) -> Entry:
    scale = norm_scale(config, plan[s])
    if s == 0:
        # The stream is the embedding itself.
        return Entry((Mix(terms=((0, 0),), scale=scale),), table[:1] + table[2:3])
    skip, keeps = _takes_skip(plan, s), _keeps(plan, s)
    assert not (skip and keeps), "skips are kept by the encoder and taken by the decoder"
    mixes: tuple[Mix, ...]
    if skip:
        mixes = (Mix(terms=((0, 1), (1, 2), (2, 0), (3, 3)), scale=scale),)
    else:
        mixes = (Mix(terms=((0, 0), (1, 1), (2, 2)), scale=scale),)
    if keeps:
        mixes = (Mix(terms=((0, 4), (1, 3))), *mixes)
    return Entry(mixes, table, takes_skip=skip, takes_embedding=True, keeps=keeps)


# Passes in lanes --------------------------------------------------------------------------------


def _split_entry(
    config: ModelConfig, plan: Sequence[VirtualLayer], s: int, factors: _Factors
) -> Entry:
    """Both lanes begin as the stream; a skip enters lane 0 alone."""
    f, h, left = factors.f_SD[s], factors.h_SD[s], factors.left_SD[s]
    lane0 = torch.stack((f, f * left, h))
    lane1 = torch.stack((torch.ones_like(left), left))
    table = torch.cat((lane0, lane1, factors.m0_SD[s] * lane0, factors.m1_SD[s][None]))
    return _lanes(config, plan, s, table, lane0=(0, 1), lane1=(0, 1))


def _leaving_lanes(plan: Sequence[VirtualLayer], factors: _Factors, tensor: Lookup) -> Tensor:
    """Rows of what each pass in lanes leaves, [passes, lane k, (lane k, attention, MLP), D]."""
    r_L2 = tensor("parallel_resid_lambdas")
    p_L22 = tensor("parallel_post_lambdas")
    r = torch.stack([r_L2[step.layer] for step in plan])[..., None]
    p = torch.stack([p_L22[step.layer] for step in plan])[..., None]
    attn, mlp = (t[-len(plan) :, None] for t in (factors.attn_SD, factors.mlp_SD))
    return torch.stack((r.expand(-1, -1, attn.shape[-1]), p[:, 0] * attn, p[:, 1] * mlp), 2)


def _lane_tables(leaving: Tensor, factors: _Factors, splits: int) -> tuple[Tensor, ...]:
    """Rows a pass: lane 0 of lane, attention, MLP, skip; lane 1 of three; the mix like lane 0, and
    of the embedding."""
    after = splits + 1
    f, h, m0, m1 = (
        t[after:, None] for t in (factors.f_SD, factors.h_SD, factors.m0_SD, factors.m1_SD)
    )
    before = leaving[:-1]
    lane0 = torch.cat((f * before[:, 0], h), 1)
    return torch.cat((lane0, before[:, 1], m0 * lane0, m1), 1).unbind(0)


def _lane_entry(config: ModelConfig, plan: Sequence[VirtualLayer], s: int, table: Tensor) -> Entry:
    return _lanes(config, plan, s, table, lane0=(0, 2, 3), lane1=(1, 2, 3))


def _lanes(
    config: ModelConfig,
    plan: Sequence[VirtualLayer],
    s: int,
    table: Tensor,
    *,
    lane0: tuple[int, ...],
    lane1: tuple[int, ...],
) -> Entry:
    """The mixes before a pass in lanes, given the tensors of the stream that make up each lane.

    Rows of the table: lane 0 (with one for a skip), lane 1, the mix (as lane 0, then embedding).
    """
    assert not _keeps(plan, s), "skips are kept by the encoder, which has no lanes"
    skip, width = _takes_skip(plan, s), max(*lane0, *lane1) + 1
    scale = norm_scale(config, plan[s])
    second = len(lane0) + 1
    third = second + len(lane1)
    in_lane0 = [*enumerate(lane0)] + ([(len(lane0), width)] if skip else [])
    mixes = (
        Mix(terms=tuple((i, row) for row, i in in_lane0)),
        Mix(terms=tuple((i, second + row) for row, i in enumerate(lane1)), scale=scale),
        Mix(
            terms=(
                *((i, third + row) for row, i in in_lane0),
                (width + skip, third + len(lane0) + 1),
            ),
            keep=False,
            scale=scale,
        ),
    )
    return Entry(mixes, table, takes_skip=skip, takes_embedding=True)


def _last_entry(config: ModelConfig, factors: _Factors, leaving: Tensor | None) -> Entry:
    if leaving is None:
        rows = torch.stack((torch.ones_like(factors.mlp_SD[-1]), factors.mlp_SD[-1]))
        return Entry((Mix(terms=((0, 0), (1, 1)), keep=False, scale=1.0),), rows)
    weights = {"mean": (0.5, 0.5), "attention": (1.0, 0.0), "mlp": (0.0, 1.0)}
    one, other = weights[config.parallel_final_lane]
    first, second = one * leaving[-1, 0], other * leaving[-1, 1]
    rows = torch.cat((first[:1], second[:1], first[1:] + second[1:]))
    terms = tuple((i, i) for i in range(4))
    return Entry((Mix(terms=terms, keep=False, scale=1.0),), rows)
