"""Adapters of many documents through grouped kernels: the fast twin of `AdapterHooks`.

The arithmetic is the forward's (bfloat16 on a GPU); parameters and moments are float32, and every
step leaves a rounded copy, the *shadow*, that products read. What adapters of one input have in
common is done together: the A of queries, keys, values and of attention's output are one product,
and what adapters add is added within the large product, before it is rounded. Logits are not
rounded at all: their last place, in 16 bits, is larger than what most steps change of them.

Adapters are no inputs of autograd. Each product that carries some writes their gradients where they
belong when its own gradient comes by; an *anchor* that asks for a gradient makes it come by.

Shapes: T rows, I input and O output features, R rank, m adapters of one input, P parameters of one
document, N rows of the bank. Invariant: that of `golf_ray.kernels.grouped`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from golf_ray.adaptation.adapters import SHARED_INPUT, AdapterBank, AdapterLayout
from golf_ray.adaptation.batches import Batch, send
from golf_ray.adaptation.optimizer import AdapterOptimizer
from golf_ray.config import ModelConfig
from golf_ray.kernels import grouped
from golf_ray.kernels.grouped import RowsJob, Stretches, SumsJob
from golf_ray.kernels.mlp import fits, hidden_fused, hidden_gradient_fused
from golf_ray.model.compute import Compute
from golf_ray.model.hooks import Hooks, Mlp, Site


def can_fuse(config: ModelConfig, compute: Compute) -> bool:
    """Whether these kernels can take a model's adapters."""
    widths = fits(config.model_dim, config.mlp_dim, compute.dtype)
    return compute.kernels == "triton" and widths


@dataclass(frozen=True, slots=True)
class _Jobs:
    """The products of the adapters at one matrix: of its outputs, and of all of its input."""

    width: int
    """Columns of all low-rank rows, m R."""
    low: tuple[RowsJob, ...]
    """x -> low."""
    expand: tuple[RowsJob, ...]
    """low -> outputs."""
    back: tuple[RowsJob, ...]
    """Outputs' gradient -> low's."""
    to_input: tuple[RowsJob, ...]
    """low's gradient -> x's."""
    sums_a: tuple[SumsJob, ...]
    sums_b: tuple[SumsJob, ...]


def _jobs(
    layout: AdapterLayout,
    slot: int,
    group: Sequence[Site],
    columns: Mapping[Site, int],
) -> _Jobs:
    """Jobs of one input.

    Args:
        group: sites of that input, in the order of their A.
        columns: for each that is an output of this matrix the column where it begins.
    """
    rank = layout.rank
    first = layout.of[group[0], slot]
    width = rank * len(group)
    a_place = layout.places[group[0], slot][0]
    low_of = {site: i * rank for i, site in enumerate(group)}
    outputs = [(site, columns[site], layout.of[site, slot].out_features) for site in columns]
    b_place = {site: layout.places[site, slot][1] for site in columns}
    return _Jobs(
        width=width,
        low=(RowsJob(0, width, 0, first.in_features, a_place),),
        expand=tuple(RowsJob(c, n, low_of[s], rank, b_place[s]) for s, c, n in outputs),
        back=tuple(RowsJob(low_of[s], rank, c, n, b_place[s]) for s, c, n in outputs),
        to_input=(RowsJob(0, first.in_features, 0, width, a_place),),
        sums_a=(SumsJob(0, width, 0, first.in_features, a_place),),
        sums_b=tuple(SumsJob(c, n, low_of[s], rank, b_place[s]) for s, c, n in outputs),
    )


class FusedAdapters:
    """Shadow and gradients of a bank, and its step.

    Args:
        bank: parameters, float32.
        optimizer: their moments and step counts.
        dtype: arithmetic of the forward.
    """

    def __init__(self, bank: AdapterBank, optimizer: AdapterOptimizer, dtype: torch.dtype) -> None:
        self.bank = bank
        self.layout = bank.layout
        self.optimizer = optimizer
        self.shadow_NP = torch.zeros_like(bank.p_NP, dtype=dtype)
        self.grads_NP = torch.zeros_like(bank.p_NP, dtype=dtype)
        self.anchor = torch.zeros((), device=bank.p_NP.device, requires_grad=True)
        self.jobs = cache(self._jobs_of)
        self._slots = tuple(
            (self.layout.places[slot.site, slot.layer][0], slot.in_features, slot.id)
            for slot in self.layout.slots
        )

    def _jobs_of(self, slot: int, group: tuple[Site, ...], columns: tuple[int, ...]) -> _Jobs:
        """Jobs of a matrix; a column of -1 is a site that is no output of it."""
        outputs = {s: c for s, c in zip(group, columns, strict=True) if c >= 0}
        return _jobs(self.layout, slot, group, outputs)

    def start(self, rows: Sequence[int], documents: Sequence[int], seed: int) -> None:
        """Give rows to documents: A of (seed, document, slot), B zero, nothing learned."""
        from golf_ray.kernels.triton import philox

        for row in rows:
            self.bank.p_NP[row].zero_()
            self.shadow_NP[row].zero_()
            self.optimizer.start(row)
        philox.fill_adapters(
            self.bank.p_NP, self.shadow_NP, rows, documents, self._slots, self.layout.rank, seed
        )

    def refresh(self, row: int) -> None:
        """Make the shadow of a row again, after its parameters were set from outside."""
        self.shadow_NP[row].copy_(self.bank.p_NP[row])

    def hooks(self, batch: Batch) -> Hooks:
        """Hooks of one pass over a batch."""
        return FusedHooks(self, batch.body, batch.ends)

    def learn(self, batch: Batch, loss: Tensor) -> None:
        """One optimizer step on the loss of a pass."""
        found = np.asarray(self.optimizer.factors(batch.rows), dtype=np.float32)
        self.apply(batch, loss, send(found, loss.device))
        self.optimizer.count(batch.rows)

    def apply(self, batch: Batch, loss: Tensor, factors_N2: Tensor) -> None:
        """The same without a look at the step counts.

        Args:
            factors_N2: `AdapterOptimizer.factors` of the batch's rows, float32.
        """
        from golf_ray.kernels.triton import grouped as kernels

        adaptation = self.optimizer.adaptation
        # Of no use in itself: it is what makes the backward run, which leaves the gradients.
        torch.autograd.grad(loss, [self.anchor], allow_unused=True)
        kernels.step(
            self.bank.p_NP, self.grads_NP, self.optimizer.second_NP, self.optimizer.first_NP,
            self.shadow_NP, batch.body.documents, factors_N2,
            lr=adaptation.lr, weight_decay=adaptation.weight_decay,
            beta1=adaptation.beta1, beta2=adaptation.beta2, eps=adaptation.eps,
        )  # fmt: skip


class FusedHooks(Hooks):
    """Adapters at the matrices of one pass; see `FusedAdapters.hooks`."""

    def __init__(self, adapters: FusedAdapters, body: Stretches, tail: Stretches) -> None:
        self._adapters = adapters
        self._stretches = {s.num_rows: s for s in (body, tail)}
        self._ahead: dict[int, tuple[Tensor, _Ahead]] = {}

    def adapts(self, site: Site, slot: int) -> bool:
        return (site, slot) in self._adapters.layout.of

    def linear(
        self,
        sites: Sequence[Site],
        slot: int,
        x_TI: Tensor,
        w_OI: Tensor,
        widths: Sequence[int],
        source_TI: Tensor | None = None,
    ) -> Tensor:
        stretches = self._stretches[x_TI.shape[0]]
        if slot in self._ahead and tuple(sites) == ("o",):
            low, ahead = self._ahead.pop(slot)
            return _Output.apply(x_TI, w_OI, low, self._adapters, stretches, ahead)
        begins = dict(zip(sites, _begins(widths), strict=True))
        present = {site: begin for site, begin in begins.items() if self.adapts(site, slot)}
        # The output's adapter has the queries' input, and its product goes with theirs.
        if "q" in sites and source_TI is None and self.adapts("o", slot):
            present["o"] = -1
        if not present:
            return nn.functional.linear(x_TI, w_OI)
        group = tuple(s for s in (*SHARED_INPUT, "mlp", "head") if s in present)
        jobs = self._adapters.jobs(slot, group, tuple(present[s] for s in group))
        later: _Ahead | None = None
        if "o" in present and present["o"] < 0:
            begin = group.index("o") * self._adapters.layout.rank
            later = _Ahead(jobs.width, begin, self._adapters.jobs(slot, ("o",), (0,)))
        dtype = torch.float32 if "head" in sites else x_TI.dtype
        y, low = _Linear.apply(
            x_TI, w_OI, source_TI, self._adapters.anchor, self._adapters, stretches, jobs, later,
            dtype,
        )  # fmt: skip
        if later is not None:
            self._ahead[slot] = (low, later)
        return y

    def mlp(
        self, slot: int, n_TD: Tensor, up_FD: Tensor, down_DF: Tensor, mlp: Mlp
    ) -> tuple[Tensor, Tensor]:
        if not self.adapts("mlp", slot):
            return mlp(n_TD, up_FD, down_DF)
        jobs = self._adapters.jobs(slot, ("mlp",), (0,))
        stretches = self._stretches[n_TD.shape[0]]
        anchor = self._adapters.anchor
        return _Mlp.apply(n_TD, up_FD, down_DF, anchor, self._adapters, stretches, jobs)


def _begins(widths: Sequence[int]) -> list[int]:
    return [sum(widths[:i]) for i in range(len(widths))]


class _Ahead:
    """What the output's adapter leaves for the product that made its low-rank rows."""

    def __init__(self, width: int, begin: int, jobs: _Jobs) -> None:
        self.width = width
        self.begin = begin
        """Columns of all low-rank rows, and where the output's begin."""
        self.jobs = jobs
        self.dlow: Tensor | None = None

    def part(self, low_TW: Tensor) -> Tensor:
        return low_TW[:, self.begin : self.begin + self.jobs.width]


def _low(x_TI: Tensor, adapters: FusedAdapters, stretches: Stretches, jobs: _Jobs) -> Tensor:
    low_TW = x_TI.new_empty(x_TI.shape[0], jobs.width)
    grouped.rows(x_TI, adapters.shadow_NP, low_TW, jobs.low, stretches)
    return low_TW


def _back(
    dy_TO: Tensor, dlow_TW: Tensor, adapters: FusedAdapters, stretches: Stretches, jobs: _Jobs
) -> None:
    grouped.rows(dy_TO, adapters.shadow_NP, dlow_TW, jobs.back, stretches, turned=True)


def _input_gradient(
    dy_TO: Tensor,
    w_OI: Tensor,
    dlow_TW: Tensor,
    adapters: FusedAdapters,
    stretches: Stretches,
    jobs: _Jobs,
) -> Tensor:
    """Gradient of an input that the matrix and the adapters share."""
    return grouped.linear(
        dy_TO, w_OI, dlow_TW, adapters.shadow_NP, jobs.to_input, stretches, turned=True
    )


class _Linear(torch.autograd.Function):
    """x W^T + low B^T with low = source A^T; also the part of low that comes later."""

    @staticmethod
    def forward(ctx, x, w, source, anchor, adapters, stretches, jobs, ahead, dtype):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        inner = x if source is None else source
        low = _low(inner, adapters, stretches, jobs)
        if jobs.expand:
            y = grouped.linear(x, w, low, adapters.shadow_NP, jobs.expand, stretches, dtype=dtype)
        else:
            y = nn.functional.linear(x, w)
        ctx.save_for_backward(w, inner, low)
        ctx.others = adapters, stretches, jobs, ahead, source is not None
        return y, None if ahead is None else ahead.part(low)

    @staticmethod
    def backward(ctx, dy, dlater):  # type: ignore[no-untyped-def]
        w, inner, low = ctx.saved_tensors
        adapters, stretches, jobs, ahead, apart = ctx.others
        dy = dy.to(low.dtype).contiguous()
        dlow = torch.empty_like(low)
        if ahead is not None:
            if ahead.dlow is not None:
                dlow, ahead.dlow = ahead.dlow, None
            elif dlater is None:
                ahead.part(dlow).zero_()
            else:
                ahead.part(dlow).copy_(dlater)
        if jobs.back:
            _back(dy, dlow, adapters, stretches, jobs)
            grouped.sums(dy, low, adapters.grads_NP, jobs.sums_b, stretches)
        grouped.sums(dlow, inner, adapters.grads_NP, jobs.sums_a, stretches)
        dx = dsource = None
        if ctx.needs_input_grad[0]:
            if apart:
                dx = dy @ w
            else:
                dx = _input_gradient(dy, w, dlow, adapters, stretches, jobs)
        if apart and ctx.needs_input_grad[2]:
            dsource = torch.empty_like(inner)
            grouped.rows(dlow, adapters.shadow_NP, dsource, jobs.to_input, stretches, turned=True)
        return dx, None, dsource, *[None] * 6


class _Output(torch.autograd.Function):
    """x W^T + low B^T with low-rank rows that were made ahead."""

    @staticmethod
    def forward(ctx, x, w, low, adapters, stretches, ahead):  # type: ignore[no-untyped-def]
        y = grouped.linear(x, w, low, adapters.shadow_NP, ahead.jobs.expand, stretches)
        ctx.save_for_backward(w, low)
        ctx.others = adapters, stretches, ahead
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        w, low = ctx.saved_tensors
        adapters, stretches, ahead = ctx.others
        dy = dy.contiguous()
        ahead.dlow = low.new_empty(low.shape[0], ahead.width)
        dlow = ahead.part(ahead.dlow)
        _back(dy, dlow, adapters, stretches, ahead.jobs)
        grouped.sums(dy, low, adapters.grads_NP, ahead.jobs.sums_b, stretches)
        dx = dy @ w if ctx.needs_input_grad[0] else None
        return dx, None, dlow, None, None, None


class _Mlp(torch.autograd.Function):
    """The MLP and its adapter; the hidden activation has no gradient."""

    @staticmethod
    def forward(ctx, n, up, down, anchor, adapters, stretches, jobs):  # type: ignore[no-untyped-def]
        ctx.set_materialize_grads(False)
        low = _low(n, adapters, stretches, jobs)
        h, signs = hidden_fused(n, up, gradient=any(ctx.needs_input_grad))
        y = grouped.linear(h, down, low, adapters.shadow_NP, jobs.expand, stretches)
        ctx.save_for_backward(n, up, down, h, signs, low)
        ctx.mark_non_differentiable(h)
        ctx.others = adapters, stretches, jobs
        return y, h

    @staticmethod
    def backward(ctx, dy, _):  # type: ignore[no-untyped-def]
        n, up, down, h, signs, low = ctx.saved_tensors
        adapters, stretches, jobs = ctx.others
        dy = dy.contiguous()
        dlow = torch.empty_like(low)
        _back(dy, dlow, adapters, stretches, jobs)
        grouped.sums(dy, low, adapters.grads_NP, jobs.sums_b, stretches)
        grouped.sums(dlow, n, adapters.grads_NP, jobs.sums_a, stretches)
        dn = None
        if ctx.needs_input_grad[0]:
            dp = hidden_gradient_fused(dy, down, h, signs)
            dn = _input_gradient(dp, up, dlow, adapters, stretches, jobs)
        return dn, *[None] * 6
