"""Each fused operation against its twin in torch, and against the twin under torch.compile.

Shapes are those of one micro-batch of a configuration; times are those of the kernels alone. What
an operation computes is compared too: a compiler can make wrong machine code of a right kernel, for
some shapes of it alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from golf_ray.bench.host import field_segments
from golf_ray.bench.timing import busy_ms
from golf_ray.config import Config
from golf_ray.kernels import compiling, embedding, grouped, heads, loss, mlp, residual
from golf_ray.kernels.grouped import RowsJob, Stretches, SumsJob
from golf_ray.kernels.residual import Mix
from golf_ray.model.attention import attend
from golf_ray.model.compute import Compute
from golf_ray.model.segments import Segments

Run = Callable[..., Sequence[Tensor]]

MOST_DIFFERENCE = {16: 0.05, 32: 1e-3}
"""By bits of the arithmetic. Operations and their twins round in other places, and sums of many
numbers in another order; machine code that is wrong is off by tenths."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelTiming:
    """Milliseconds of one operation; None where it cannot run, or has no backward of its own."""

    operation: str
    shape: str
    fused_forward_ms: float | None
    fused_both_ms: float | None
    """Forward and backward."""
    twin_forward_ms: float | None
    twin_both_ms: float | None
    compiled_forward_ms: float | None
    compiled_both_ms: float | None
    difference: float | None
    """From the twin: norm of what a result or a gradient differs by over the twin's norm, the
    largest of them, at most 1; 1 where a number is not finite."""
    right: bool | None
    """Whether rounding explains that."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with ratios: how many times faster the fused operation is."""
        return {
            **asdict(self),
            "against_twin": self._ratio(self.twin_forward_ms, self.twin_both_ms),
            "against_compiled": self._ratio(self.compiled_forward_ms, self.compiled_both_ms),
        }

    def _ratio(self, forward_ms: float | None, both_ms: float | None) -> float | None:
        theirs = forward_ms if both_ms is None else both_ms
        ours = self.fused_forward_ms if self.fused_both_ms is None else self.fused_both_ms
        return theirs / ours if theirs is not None and ours else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One operation to time and compare."""

    operation: str
    shape: str
    leaves: list[Tensor]
    """What has a gradient; nothing where there is no backward."""
    fused: Run
    twin: Run


def time_kernels(
    config: Config, device: torch.device, compute: Compute, *, compiled: bool
) -> Iterator[KernelTiming]:
    """Time every operation, one after the other.

    Args:
        compute: arithmetic, and whether fused operations can run.
        compiled: time twins under torch.compile too, which takes seconds each to compile.
    """
    for case in cases(config, device, compute):
        fused = compute.kernels == "triton"
        if case.operation == "attention":
            fused = fused and compute.attention == "fa3"
        off = difference_of(case) if fused else None
        forward, both = _timed(case.fused, case.leaves, device) if fused else (None, None)
        twin_forward, twin_both = _timed(case.twin, case.leaves, device)
        compiled_forward, compiled_both = None, None
        if compiled:
            twin = compiling.compiled(case.twin, fullgraph=False)
            compiled_forward, compiled_both = _timed(twin, case.leaves, device)
        yield KernelTiming(
            operation=case.operation,
            shape=case.shape,
            fused_forward_ms=forward,
            fused_both_ms=both,
            twin_forward_ms=twin_forward,
            twin_both_ms=twin_both,
            compiled_forward_ms=compiled_forward,
            compiled_both_ms=compiled_both,
            difference=off,
            right=None if off is None else off <= MOST_DIFFERENCE[8 * compute.dtype.itemsize],
        )


def difference_of(case: Case) -> float:
    """How far an operation is from its twin; see `KernelTiming.difference`."""
    seeds = [torch.randn_like(output) for output in case.twin(*case.leaves)]

    def found(run: Run) -> list[Tensor]:
        outputs = list(run(*case.leaves))
        shaped = [seed.view_as(output) for seed, output in zip(seeds, outputs, strict=True)]
        gradients = torch.autograd.grad(outputs, case.leaves, shaped) if case.leaves else ()
        # Results can be buffers that the other run writes to.
        return [t.detach().flatten().float().clone() for t in (*outputs, *gradients)]

    pairs = zip(found(case.fused), found(case.twin), strict=True)
    off = [float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs]
    return max(min(x, 1.0) if math.isfinite(x) else 1.0 for x in off)


def _timed(run: Run, leaves: list[Tensor], device: torch.device) -> tuple[float, float | None]:
    seeds = [torch.randn_like(output) for output in run(*leaves)]

    def forward() -> object:
        with torch.no_grad():
            return run(*leaves)

    def both() -> None:
        torch.autograd.grad(list(run(*leaves)), leaves, seeds, allow_unused=True)

    return busy_ms(forward, device), busy_ms(both, device) if leaves else None


def cases(config: Config, device: torch.device, compute: Compute) -> Iterator[Case]:
    """Every operation, its operands random, at the shapes of one micro-batch."""
    model, T = config.model, config.train.micro_batch_tokens
    D, F, V, E = model.model_dim, model.mlp_dim, model.vocab_size, model.embedding_dim
    H, G, d = model.num_heads, model.num_kv_heads, model.head_dim

    def leaf(*shape: int, scale: float = 1.0, wide: bool = False) -> Tensor:
        dtype = torch.float32 if wide else compute.dtype
        x = torch.randn(shape, device=device, dtype=torch.float32) * scale
        return x.to(dtype).requires_grad_()

    enter = (Mix(terms=((0, 0), (1, 1), (2, 2)), scale=0.5),)
    after = (Mix(terms=((0, 0), (1, 1)), scale=0.5),)
    for name, mixes, count in (("mix, 3 tensors", enter, 3), ("mix, 2 tensors", after, 2)):
        yield Case(
            operation=name,
            shape=f"{T}x{D}",
            leaves=[*(leaf(T, D) for _ in range(count)), leaf(count, D, wide=True)],
            fused=lambda *t, mixes=mixes: residual.mix_fused(t[:-1], t[-1], mixes),
            twin=lambda *t, mixes=mixes: residual.mix(t[:-1], t[-1], mixes),
        )
    yield Case(
        operation="mlp",
        shape=f"{T}x{D}x{F}",
        leaves=[leaf(T, D), leaf(F, D, scale=D**-0.5), leaf(D, F, scale=F**-0.5)],
        fused=lambda *t: mlp.mlp_fused(*t)[:1],
        twin=lambda *t: mlp.mlp(*t)[:1],
    )
    targets = torch.randint(0, V, (T,), device=device)
    cap = model.logit_softcap
    yield Case(
        operation="head and loss",
        shape=f"{T}x{E}x{V}",
        leaves=[leaf(T, E), leaf(V, E, scale=E**-0.5)],
        fused=lambda x, w: [loss.head_losses_fused(x, w, targets, cap)],
        twin=lambda x, w: [loss.head_losses(x, w, targets, cap)],
    )
    yield Case(
        operation="embedding",
        shape=f"{T} of {V}x{E}",
        leaves=[leaf(V, E, scale=0.005)],
        fused=lambda w: [embedding.embed_fused(w, targets, compute.dtype)],
        twin=lambda w: [embedding.embed(w, targets, compute.dtype)],
    )
    lengths = field_segments(T, config.data.seq_len)
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    segments = Segments.of_bounds(bounds, max(lengths), device)
    cos, sin = heads.rotary_tables(segments.positions_T, model.rope_dims, model.rope_base)

    def twin(qkv: Tensor, gain: Tensor) -> list[Tensor]:
        q, k, v = heads.split_heads(qkv, G, d)
        q, k = heads.prepare(q, k, gain, cos, sin)
        return [heads.remove_own_value(attend(q, k, v, segments, compute.attention), v)]

    yield Case(
        operation="attention",
        shape=f"{T} tokens, {len(lengths)} segments, {H}/{G}x{d}",
        leaves=[leaf(T, (H + 2 * G) * d), leaf(H, wide=True)],
        fused=lambda qkv, gain: [
            heads.attention_fused(
                qkv,
                gain,
                cos,
                sin,
                segments.cu_seqlens,
                segments.max_seqlen,
                num_kv_heads=G,
                head_dim=d,
                own_value=False,
            )
        ],
        twin=twin,
    )
    yield from _adapters(config, device, compute)


def _adapters(config: Config, device: torch.device, compute: Compute) -> Iterator[Case]:
    """Products of test-time training: documents with a full window each."""
    D, F, R = config.model.model_dim, config.model.mlp_dim, config.adaptation.rank
    L = min(config.adaptation.window, config.train.micro_batch_tokens)
    N = config.train.micro_batch_tokens // L
    shape = f"{N} documents x {L}, {D}x{D}, rank {R}"

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=device).to(compute.dtype)

    x, low, w = normal(N * L, D), normal(N * L, R), normal(D, D)
    bank = normal(N, R * D)
    into, back = (RowsJob(0, R, 0, D, 0),), (RowsJob(0, D, 0, R, 0),)
    sums = (SumsJob(0, R, 0, D, 0),)
    stretches = Stretches.of([L] * N, range(N), device)
    a_NRD, b_NDR = bank.view(N, R, D), bank.view(N, D, R)

    def rows() -> list[Tensor]:
        grouped.rows(x, bank, low, into, stretches)
        return [low]

    def gradients() -> list[Tensor]:
        grouped.sums(low, x, bank, sums, stretches)
        return [bank]

    yield Case(
        operation="adapters, rows",
        shape=shape,
        leaves=[],
        fused=rows,
        twin=lambda: [torch.bmm(x.view(N, L, D), a_NRD.mT)],
    )
    products = (
        ("adapters, in a product", x, w, False),
        ("adapters, in a gradient", x, w, True),
        ("adapters, in a deep product", normal(N * L, F), normal(D, F), False),
    )
    for name, left, right, turned in products:
        yield Case(
            operation=name,
            shape=f"{N} documents x {L}, {left.shape[1]}x{D}, rank {R}",
            leaves=[],
            fused=lambda left=left, right=right, turned=turned: [
                grouped.linear(left, right, low, bank, back, stretches, turned=turned)
            ],
            twin=lambda left=left, right=right, turned=turned: [
                torch.baddbmm(
                    (left @ (right if turned else right.t())).view(N, L, D),
                    low.view(N, L, R),
                    a_NRD if turned else b_NDR.mT,
                )
            ],
        )
    yield Case(
        operation="adapters, sums",
        shape=shape,
        leaves=[],
        fused=gradients,
        twin=lambda: [torch.bmm(low.view(N, L, R).mT, x.view(N, L, D))],
    )
