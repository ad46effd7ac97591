"""The fused operations in Triton's interpreter, against their twins."""

from __future__ import annotations

from collections.abc import Callable

import flash_standin
import pytest
import torch
from kernel_cases import MIXES, Case, errors, interpreter_problem, small_cases
from reference import TINY, final_state
from torch import Tensor

from golf_ray.kernels import flash
from golf_ray.kernels.heads import prepare, remove_own_value, rotary_tables
from golf_ray.kernels.loss import head_losses
from golf_ray.model.compute import Compute
from golf_ray.model.model import GolfModel
from golf_ray.model.segments import Segments

pytest.importorskip("triton")


problem = interpreter_problem()
needs_interpreter = pytest.mark.skipif(problem is not None, reason=problem or "")

CASES = small_cases()
# Bits of a result: float32 sums of some hundred products lose a few; a 16-bit result is rounded
# once, and where a backward starts from a rounded intermediate result, twice or three times.
TOLERANCE = {torch.float32: 2.0**-24 * 32, torch.float16: 2.0**-11 * 4}


@needs_interpreter
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float16"])
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_ops_are_their_twins(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from golf_ray.kernels.triton import loss

    # Rows of more than one piece, without rows of thousands of columns.
    monkeypatch.setattr(loss, "BLOCK", 64)
    standin = flash_standin.operators("work space")
    monkeypatch.setattr(flash, "operators", lambda: standin)
    found = errors(case, dtype)
    assert found and max(found.values()) <= TOLERANCE[dtype], found


@pytest.mark.parametrize("rows", [96, 100, 192])
def test_the_gradient_of_a_mean_is_not_off_in_one_direction(rows: int) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(rows, 64).bfloat16(), (torch.randn(8192, 64) * 0.01).bfloat16()
    targets = torch.randint(0, 8192, (rows,))

    traced = torch.compile(head_losses, fullgraph=True, backend="aot_eager")

    def gradients(
        dtype: torch.dtype, weight_T: Tensor, run: Callable[..., Tensor] = head_losses
    ) -> tuple[Tensor, ...]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, w)]
        losses = run(*leaves, targets, 30.0)
        return torch.autograd.grad((losses * weight_T).sum(), leaves)

    for weight_T in (torch.full((rows,), 1 / rows), torch.rand(rows)):
        found = gradients(torch.bfloat16, weight_T)
        exact = gradients(torch.float64, weight_T)
        assert all(map(torch.equal, gradients(torch.bfloat16, weight_T, traced), found))
        for a, b in zip(found, exact, strict=True):
            # Some 0.002 an element, and 0.001-0.002 of it common to all with (p - 1) / T rounded.
            assert (a - b).norm() <= 2.0**-8 * b.norm()
            assert abs(float((a * b).sum() / b.square().sum()) - 1) <= 5e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_heads_in_16_bits_are_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v, y = (torch.randn(300, heads, 64).to(dtype) for heads in (8, 4, 4, 8))
    gain = 5 + torch.randn(8) * 0.3
    rotary = rotary_tables(torch.arange(300), 16, 1e4)

    def results(kind: torch.dtype) -> tuple[Tensor, ...]:
        prepared = prepare(q.to(kind), k.to(kind), gain, *rotary)
        return *prepared, remove_own_value(y.to(kind), v.to(kind))

    for found, exact in zip(results(dtype), results(torch.float64), strict=True):
        assert found.dtype == dtype
        # Half a unit in the last place, and float32's own errors, which rounding can double.
        half = exact.abs() * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).smallest_normal
        assert ((found - exact).abs() <= half + 64 * torch.finfo(torch.float32).eps).all()


@needs_interpreter
@pytest.mark.parametrize(
    ("returns", "loop"), [("work space", True), ("gradients first", False)], ids=str
)
def test_a_model_of_fused_ops_is_the_model(
    returns: flash_standin.Returns, loop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and every gradient of the tiny model, attention through the operators' stand-ins."""
    standin = flash_standin.operators(returns)
    monkeypatch.setattr(flash, "operators", lambda: standin)
    generator = torch.Generator().manual_seed(3)
    tokens, targets = (torch.randint(0, 512, (24,), generator=generator) for _ in range(2))
    segments = Segments.of_bounds([0, 6, 7, 18, 24, 24], 11)

    def run(compute: Compute) -> tuple[float, dict[str, Tensor | None]]:
        model = GolfModel(TINY.model, compute=compute)
        model.load_state_dict(final_state())
        loss = model.mean_loss(tokens, targets, segments, loop=loop)
        loss.backward()
        return loss.item(), {name: p.grad for name, p in model.named_parameters()}

    loss, expected = run(Compute())
    found_loss, found = run(Compute(attention="fa3", kernels="triton"))
    assert found_loss == pytest.approx(loss, abs=2e-6)
    for name, theirs in expected.items():
        mine = found[name]
        assert (mine is None) == (theirs is None), name
        if mine is not None and theirs is not None:
            # Float32 sums in another order, through up to nine layers.
            assert (mine - theirs).norm() <= 1e-4 * theirs.norm(), name


@needs_interpreter
def test_frozen_models_fuse_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As adaptation has it: gradients reach the input of frozen matrices and stop there."""
    from golf_ray.kernels.mlp import mlp, mlp_fused
    from golf_ray.kernels.residual import Mix, mix, mix_fused

    torch.manual_seed(0)
    x = torch.randn(9, 16, requires_grad=True)
    up, down, coefs = torch.randn(24, 16), torch.randn(16, 24), torch.randn(2, 16)
    mixes = [Mix(terms=((0, 0), (1, 1)), scale=0.5)]
    other = torch.randn(9, 16)
    found, expected = (
        torch.autograd.grad(product(combine([x, other], coefs, mixes)[1], up, down)[0].sum(), x)[0]
        for product, combine in ((mlp_fused, mix_fused), (mlp, mix))
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


@needs_interpreter
@pytest.mark.parametrize(
    ("kind", "frozen", "inputs", "outputs"),
    [
        ("first layer", [], [0], []),
        ("first layer", [-1], [], [0]),
        ("after attention", [-1], [], [0]),
        ("after attention", [0, -1], [], [0]),
        ("kept, with a skip", [-1], [], [1]),
        ("kept, with a skip", [1], [0, 1, 2, 3], []),
        ("lanes", [], [0, 1, 2, 3, 4, 5], []),
        ("lanes", [-1], [0, 2, 3, 4, 5], [1]),
        # Tensor 4 alone gets a gradient; the norm that is of a kept combination does not take it.
        ("lanes", [0, 1, 2, 3, 5, -1], [0, 2, 3, 4, 5], []),
        ("splits", [-1], [0, 1, 2], []),
        ("no norm", [-1], [], []),
    ],
)
def test_frozen_mixes_save_what_norms_need(
    kind: str, frozen: list[int], inputs: list[int], outputs: list[int]
) -> None:
    """Tensors and outputs that are saved for the backward, next to the coefficients."""
    from golf_ray.kernels.residual import mix_fused

    count, rows, mixes = MIXES[kind]
    leaves = [torch.randn(3, 8) for _ in range(count)] + [torch.randn(rows, 8)]
    for leaf in leaves:
        leaf.requires_grad_()
    for i in frozen:
        leaves[i].requires_grad_(False)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.data_ptr()) or t, lambda t: t
    ):
        found = mix_fused(leaves[:-1], leaves[-1], mixes)
    expected = [*(leaves[i] for i in inputs), *(found[i] for i in outputs), leaves[-1]]
    assert saved == [t.data_ptr() for t in expected]


@needs_interpreter
@pytest.mark.parametrize(
    "name", ["mix", "mix_backward", "mlp", "cross_entropy", "head", "embed", "attention"]
)
def test_ops_are_fit_for_torch_compile(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Schemas, fake implementations and autograd, as torch's own checker has it."""
    standin = flash_standin.operators("work space")
    monkeypatch.setattr(flash, "operators", lambda: standin)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, requires_grad=True)

    targets = torch.tensor([0, 3, 2, 1, 0])
    angles = torch.randn(5, 2)
    arguments = {
        "mix": ([leaf(5, 8), leaf(5, 8)], leaf(2, 8), [0, 1], [True], [0.5]),
        # Frozen: one of two outputs has a gradient, and one of two tensors is reached.
        "mix_backward": (
            [torch.randn(5, 8)], [torch.randn(5, 8)], torch.randn(3, 8),
            [0, 1, 2, -1], [True, True], [0.5, 0.0], [True, True], [False, False, True], False,
        ),
        "mlp": (leaf(5, 8), leaf(16, 8), leaf(8, 16), True),
        "cross_entropy": (leaf(5, 7), targets, 30.0, True),
        "head": (leaf(5, 8), leaf(7, 8), targets, 30.0, True),
        "embed": (leaf(4, 8), targets, torch.float32),
        "attention": (
            leaf(5, 32), leaf(2), angles.cos(), angles.sin(),
            torch.tensor([0, 2, 5, 5], dtype=torch.int32), 3, 1, 8, False,
        ),
    }  # fmt: skip
    torch.library.opcheck(
        getattr(torch.ops.golf_ray, name).default,
        arguments[name],
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
