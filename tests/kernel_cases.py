"""Cases of the fused operations: the same inputs through an op and through its twin.

The twin computes in float32, or in the inputs' own type where that is wider, from the very inputs
of the op, so what differs is the op's own rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from golf_ray.kernels import grouped
from golf_ray.kernels.embedding import embed, embed_fused
from golf_ray.kernels.grouped import (
    RowsJob,
    Stretches,
    SumsJob,
    linear_twin,
    rows_twin,
    sums_twin,
    within_of,
)
from golf_ray.kernels.heads import (
    attention_fused,
    prepare,
    remove_own_value,
    rotary_tables,
    split_heads,
)
from golf_ray.kernels.loss import (
    cross_entropy,
    cross_entropy_fused,
    head_losses_fused,
)
from golf_ray.kernels.mlp import mlp, mlp_fused
from golf_ray.kernels.residual import Mix, fan_out, mix, mix_fused
from golf_ray.model.attention import attend
from golf_ray.model.segments import Segments

Run = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation at one shape."""

    name: str
    leaves: Callable[[], list[Tensor]]
    """Inputs, float32; they get gradients."""
    fused: Run
    twin: Run
    wide: tuple[int, ...] = ()
    """Leaves that stay float32 whatever the case's type."""
    frozen: tuple[int, ...] = ()
    """Leaves that get no gradient."""
    halves_only: bool = False
    """Whether the op computes in 16 bits only on a GPU."""
    extra: dict[str, Any] = field(default_factory=dict)


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape) * scale


MIXES: dict[str, tuple[int, int, list[Mix]]] = {
    # Tensors, rows of coefficients, mixes.
    "first layer": (1, 1, [Mix(terms=((0, 0),), scale=1.0)]),
    "after attention": (2, 2, [Mix(terms=((0, 0), (1, 1)), scale=0.5)]),
    "kept, with a skip": (
        4,
        6,
        [
            Mix(terms=((0, 4), (1, 5))),
            Mix(terms=((0, 0), (1, 1), (2, 2), (3, 3)), scale=0.7),
        ],
    ),
    "lanes": (
        6,
        12,
        [
            Mix(terms=((0, 0), (2, 1), (3, 2), (4, 3))),
            Mix(terms=((1, 4), (2, 5), (3, 6)), scale=0.3),
            Mix(terms=((0, 7), (2, 8), (3, 9), (4, 10), (5, 11)), keep=False, scale=0.3),
        ],
    ),
    "splits": (
        3,
        7,
        [
            Mix(terms=((0, 0), (1, 1))),
            Mix(terms=((0, 2), (1, 3)), scale=0.3),
            Mix(terms=((0, 4), (1, 5), (2, 6)), keep=False, scale=0.3),
        ],
    ),
    "no norm": (2, 3, [Mix(terms=((0, 0), (1, 1))), Mix(terms=((1, 2),))]),
}


ALL, PARTS = slice(None), (slice(1, None), slice(None, -1))
"""Outputs of a mix that are used."""


def mix_case(
    kind: str, T: int, D: int, *, frozen: Sequence[int] = (), outputs: slice = ALL
) -> Case:
    """A mix of which some inputs get no gradient, -1 for the coefficients, and some outputs go
    unused."""
    count, rows, mixes = MIXES[kind]
    what = f" without {','.join(map(str, frozen))}" if frozen else ""
    if outputs != ALL:
        what += f" outputs {outputs.start or ''}:{outputs.stop or ''}"
    return Case(
        name=f"mix {kind} {T}x{D}{what}",
        leaves=lambda: [*(normal(T, D) for _ in range(count)), normal(rows, D)],
        fused=lambda *t: mix_fused(t[:-1], t[-1], mixes)[outputs],
        twin=lambda *t: mix(t[:-1], t[-1], mixes)[outputs],
        wide=(count,),
        frozen=tuple(i % (count + 1) for i in frozen),
    )


def mix_cases(shapes: Sequence[tuple[int, int]]) -> list[Case]:
    """Every mix with and without gradients of the coefficients, at the last shape of some inputs
    and outputs too."""
    cases = []
    for T, D in shapes:
        for kind, (count, _, _) in MIXES.items():
            cases += [mix_case(kind, T, D, frozen=frozen) for frozen in ([], [-1])]
            if (T, D) != shapes[-1]:
                continue
            cases += [mix_case(kind, T, D, frozen=[-1], outputs=part) for part in PARTS]
            if count > 1:
                some = ([0], [0, -1], [*range(1, count), -1])
                cases += [mix_case(kind, T, D, frozen=frozen) for frozen in some]
    return cases


def fan_case(T: int, D: int) -> Case:
    return Case(
        name=f"fan out {T}x{D}",
        leaves=lambda: [normal(T, D)],
        fused=lambda x: [part * (i + 1) for i, part in enumerate(fan_out(x, 5))],
        twin=lambda x: [x * (i + 1) for i in range(5)],
    )


def mlp_case(T: int, D: int, F: int) -> Case:
    return Case(
        name=f"mlp {T}x{D}x{F}",
        leaves=lambda: [normal(T, D), normal(F, D, scale=D**-0.5), normal(D, F, scale=F**-0.5)],
        fused=lambda *t: mlp_fused(*t)[:1],
        twin=lambda *t: mlp(*t)[:1],
    )


def loss_case(T: int, V: int, cap: float) -> Case:
    targets = torch.randint(0, V, (T,))
    return Case(
        name=f"cross entropy {T}x{V} cap {cap:g}",
        leaves=lambda: [normal(T, V, scale=cap / 3)],
        fused=lambda z: [cross_entropy_fused(z, targets.to(z.device), cap)],
        twin=lambda z: [cross_entropy(z, targets.to(z.device), cap)],
    )


def head_case(T: int, D: int, V: int) -> Case:
    targets = torch.randint(0, V, (T,))
    return Case(
        name=f"head {T}x{D}x{V}",
        leaves=lambda: [normal(T, D), normal(V, D)],
        fused=lambda x, w: [head_losses_fused(x, w, targets.to(x.device), 30.0)],
        twin=lambda x, w: [cross_entropy(x @ w.t(), targets.to(x.device), 30.0)],
    )


def embed_case(T: int, V: int, E: int) -> Case:
    tokens = torch.randint(0, V, (T,))
    return Case(
        name=f"embed {T} of {V}x{E}",
        leaves=lambda: [normal(V, E, scale=0.005)],
        fused=lambda w: [embed_fused(w, tokens.to(w.device), w.dtype)],
        twin=lambda w: [embed(w, tokens.to(w.device), w.dtype)],
    )


def attention_case(
    H: int, G: int, d: int, R: int, lengths: Sequence[int], *, own_value: bool = False
) -> Case:
    T = sum(lengths)

    def parts(qkv: Tensor) -> tuple[Segments, tuple[Tensor, Tensor]]:
        bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
        # Padded as batches are: empty segments at the end.
        segments = Segments.of_bounds([*bounds, T, T], max(lengths), qkv.device)
        return segments, rotary_tables(segments.positions_T, R, 10000.0)

    def fused(qkv: Tensor, gain: Tensor) -> Sequence[Tensor]:
        segments, rotary = parts(qkv)
        return [
            attention_fused(
                qkv, gain, *rotary, segments.cu_seqlens, segments.max_seqlen,
                num_kv_heads=G, head_dim=d, own_value=own_value,
            )
        ]  # fmt: skip

    def twin(qkv: Tensor, gain: Tensor) -> Sequence[Tensor]:
        segments, rotary = parts(qkv)
        q, k, v = split_heads(qkv, G, d)
        y = attend(*prepare(q, k, gain, *rotary), v, segments)
        return [y if own_value else remove_own_value(y, v)]

    return Case(
        name=f"attention {H}/{G}x{d} R{R} {len(lengths)} segments own {own_value}",
        leaves=lambda: [normal(T, (H + 2 * G) * d), 1 + 0.3 * normal(H)],
        fused=fused,
        twin=twin,
        wide=(1,),
        halves_only=True,
    )


def small_cases() -> list[Case]:
    """Small and odd shapes, for the interpreter too."""
    return [
        *mix_cases(((13, 24), (1, 8), (5, 130))),
        fan_case(7, 20),
        *(mlp_case(*shape) for shape in ((13, 16, 24), (150, 64, 192), (33, 72, 136), (5, 7, 9))),
        *(loss_case(*shape) for shape in ((13, 16, 30.0), (7, 50, 30.0), (4, 300, 200.0))),
        head_case(9, 24, 50),
        head_case(3, 8, 130),
        embed_case(40, 11, 24),
        attention_case(4, 2, 16, 8, (5, 1, 17)),
        attention_case(6, 2, 24, 4, (3, 9)),
        attention_case(3, 3, 8, 0, (7,), own_value=True),
        attention_case(8, 1, 16, 16, (2, 2, 11)),
    ]


def gradients(
    run: Run, leaves: Sequence[Tensor], frozen: Sequence[int] = ()
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of a run, and gradients under fixed random ones of the outputs.

    Args:
        frozen: leaves that get none; the others' are zero where no output depends on them.
    """
    leaves = [
        leaf.detach().clone().requires_grad_(i not in frozen) for i, leaf in enumerate(leaves)
    ]
    outputs = run(*leaves)
    generator = torch.Generator().manual_seed(7)
    seeds = [
        torch.randn(o.shape, generator=generator).to(device=o.device, dtype=o.dtype)
        for o in outputs
    ]
    used = [(o, seed) for o, seed in zip(outputs, seeds, strict=True) if o.requires_grad]
    torch.autograd.backward(*zip(*used, strict=True))
    assert all(leaf.grad is None for leaf in leaves if not leaf.requires_grad)
    found = [
        leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
        for leaf in leaves
        if leaf.requires_grad
    ]
    return [o.detach() for o in outputs], found


def errors(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, float]:
    """Relative errors ||op - twin|| / ||twin|| of every output and gradient."""
    torch.manual_seed(0)
    leaves = [
        leaf.to(device) if i in case.wide else leaf.to(device=device, dtype=dtype)
        for i, leaf in enumerate(case.leaves())
    ]
    found = gradients(case.fused, leaves, case.frozen)
    expected = gradients(case.twin, [leaf.float() for leaf in leaves], case.frozen)
    out = {}
    for what, mine, theirs in zip(("output", "gradient"), found, expected, strict=True):
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            assert a.shape == b.shape and torch.isfinite(a).all(), (case.name, what, i)
            scale = max(b.float().norm().item(), 1e-6 * b.numel() ** 0.5)
            out[f"{what} {i}"] = (a.float() - b.float()).norm().item() / scale
    return out


def interpreter_problem() -> str | None:
    """Why the interpreter cannot run loops here, if so: some versions of it and of NumPy."""
    try:
        import triton
    except ImportError:
        return "needs Triton"
    if not triton.knobs.runtime.interpret:
        return "Triton compiles here; tests/test_gpu.py runs these cases on the GPU"
    from golf_ray.kernels.triton import residual

    try:
        x = torch.ones(2, 4)
        residual.backward(
            [x], [x], torch.ones(1, 4), [0], [0], [-1], [0], [-1], [0.0], [0], 1, True
        )
    except Exception as error:  # whatever it is, it is the interpreter's own
        return f"Triton's interpreter does not work here: {error}"
    return None


GROUPED_SHAPES = [((5, 1, 40), 24, 16), ((3,), 7, 5), ((70, 33), 130, 96)]
"""Rows of each document; columns and depth of its matrix."""


def grouped_rows(
    dtype: torch.dtype,
    lengths: tuple[int, ...],
    columns: int,
    depth: int,
    *,
    turned: bool,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Rows' products with two matrices of their document: the kernel's and the twin's."""
    torch.manual_seed(0)
    size = columns * depth
    bank = torch.randn(4, 3 * size).to(dtype)
    jobs = [RowsJob(0, columns, depth, depth, size), RowsJob(columns, columns, 0, depth, 2 * size)]
    x = torch.randn(sum(lengths), 2 * depth).to(dtype)
    start = torch.randn(sum(lengths), 2 * columns).to(dtype)
    bank_rows = (3, 0, 1)[: len(lengths)]
    found, expected = start.to(device), start.float()
    stretches = Stretches.of(lengths, bank_rows, device)
    grouped.rows(x.to(device), bank.to(device), found, jobs, stretches, turned=turned)
    plain = Stretches.of(lengths, bank_rows)
    rows_twin(x.float(), bank.float(), expected, jobs, plain, turned=turned)
    return found.cpu(), expected


LinearShape = tuple[tuple[int, ...], int, tuple[int, ...], int]
"""Rows of each document; width of the input; columns of each part, every other of them with an
adapter, and its rank."""
LINEAR_SHAPES: list[LinearShape] = [
    ((5, 1, 40), 72, (16, 8), 32),
    ((3,), 24, (64,), 5),
    ((70, 33, 200), 96, (136, 8, 64), 64),
    ((70, 33), 96, (130, 2), 32),
    ((1,) * 140, 72, (128, 128), 32),
    ((40, 2), 72, (64,), 48),
    ((3, 150), 80, (136, 8, 64), 5),
    ((5, 1, 40), 128, (128, 128), 16),
]
"""Not all are for the kernel: some are too narrow, and some beside the grid of descriptors."""
ROWS_BEHIND = 3
"""Of the buffer, behind the documents'."""


def grouped_linear(
    dtype: torch.dtype,
    shape: LinearShape,
    *,
    turned: bool,
    device: str = "cpu",
    out: torch.dtype | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """One matrix's product and the adapters' of the first and every other part: the kernel's, the
    twin's, and the adapters' alone; see `linear_operands`.

    Args:
        out: dtype of the result.
    """
    operands = linear_operands(dtype, shape, turned, scale)
    found = linear_on(device, operands, turned=turned, out=out)()
    expected = linear_twin(*operands, turned=turned)
    x, w = operands[:2]
    base = x.float() @ (w if turned else w.t()).float()
    return found.cpu(), expected, expected - base


Operands = tuple[Tensor, Tensor, Tensor, Tensor, list[RowsJob], Stretches]


def linear_on(
    device: str, operands: Operands, *, turned: bool, out: torch.dtype | None = None
) -> Callable[[], Tensor]:
    """The kernel's call, its operands on a device."""
    x, w, low, bank = (t.to(device) for t in operands[:4])
    jobs, plain = operands[4:]
    stretches = replace(
        Stretches.of(plain.lengths, plain.bank_rows, device),
        num_rows=plain.num_rows,
        within=plain.within.to(device),
    )
    return lambda: grouped.linear(x, w, low, bank, jobs, stretches, turned=turned, dtype=out)


def linear_operands(
    dtype: torch.dtype, shape: LinearShape, turned: bool, scale: float = 1.0
) -> Operands:
    """Operands of `grouped.linear` on the CPU.

    Args:
        scale: of what adapters add to a result of rms 1.
    """
    torch.manual_seed(0)
    lengths, width, parts, rank = shape
    features, num_rows = sum(parts), sum(lengths) + ROWS_BEHIND
    x = torch.randn(num_rows, width).to(dtype)
    w = torch.randn(features, width).div(width**0.5).to(dtype)
    # Strides of whole vectors and others are loaded in different ways.
    unit = 16 if len(lengths) % 2 == 0 else 8
    jobs, place, at = [], 3, 0
    for i, columns in enumerate(parts):
        if i % 2 == 0:
            jobs.append(RowsJob(at, columns, unit + len(jobs) * rank, rank, place * unit))
            place += columns * rank
        at += columns
    bank = torch.randn(len(lengths) + 1, place * unit).to(dtype)
    low = torch.randn(len(x), unit + len(jobs) * rank).mul(scale / rank**0.5).to(dtype)
    bank_rows = tuple(range(len(lengths)))[::-1]
    within = torch.from_numpy(within_of(lengths, num_rows))
    stretches = replace(Stretches.of(lengths, bank_rows), num_rows=num_rows, within=within)
    return x, w.t().contiguous() if turned else w, low, bank, jobs, stretches


def grouped_sums(
    dtype: torch.dtype, lengths: tuple[int, ...], a: int, b: int, *, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Two matrices of sums over each document's rows: the kernel's and the twin's. Rows that take
    no part hold 7."""
    torch.manual_seed(0)
    jobs = [SumsJob(0, a, b, b, 0), SumsJob(3, a, 0, b, a * b)]
    u, w = (torch.randn(sum(lengths), n).to(dtype) for n in (a + 3, 2 * b))
    bank_rows = (3, 0, 1)[: len(lengths)]
    found = torch.full((4, 2 * a * b), 7.0, dtype=dtype, device=device)
    expected = torch.full((4, 2 * a * b), 7.0)
    grouped.sums(u.to(device), w.to(device), found, jobs, Stretches.of(lengths, bank_rows, device))
    sums_twin(u.float(), w.float(), expected, jobs, Stretches.of(lengths, bank_rows))
    return found.cpu(), expected
