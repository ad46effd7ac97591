"""Fused operations, attention and captured graphs on a GPU. These skip themselves elsewhere."""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from kernel_cases import (
    Case,
    attention_case,
    embed_case,
    errors,
    head_case,
    loss_case,
    mix_cases,
    mlp_case,
    small_cases,
)
from reference import TRAIN_SHARDS, training_states
from test_model_attention import operands, packed, plain
from torch import Tensor

from golf_ray.config import Config
from golf_ray.kernels.compiling import compiled
from golf_ray.kernels.residual import Mix, mix
from golf_ray.model.attention import Backend, attend, why_not
from golf_ray.optim.world import World
from golf_ray.presets import TINY
from trainers.code_cache import CodeCache
from trainers.loop import TrainingRun
from trainers.reporting import Interval, Reporter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")

CASES = [
    *small_cases(),
    *mix_cases([(1000, 512)]),
    mlp_case(1000, 512, 2048),
    mlp_case(777, 384, 1000),
    loss_case(300, 8192, 30.0),
    loss_case(40, 50304, 30.0),
    head_case(500, 512, 8192),
    embed_case(3000, 8192, 512),
    attention_case(8, 4, 64, 16, (700, 1, 300, 2048)),
    attention_case(8, 2, 64, 16, (513, 100), own_value=True),
]
# Each output and gradient is rounded to 16 bits once or twice, and starts from rounded ones.
TOLERANCE = {torch.bfloat16: 2.0**-8 * 4, torch.float16: 2.0**-11 * 4, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_ops_are_their_twins(case: Case, dtype: torch.dtype) -> None:
    if case.halves_only and (dtype == torch.float32 or why_not("fa3", CUDA, dtype, 64)):
        pytest.skip("FlashAttention-3 computes in 16 bits on Hopper GPUs")
    found = errors(case, dtype, "cuda")
    assert found and max(found.values()) <= TOLERANCE[dtype], found


@pytest.mark.parametrize("under_compile", [False, True])
@pytest.mark.parametrize("backend", ["fa3", "varlen", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("H", "G", "d"), [(8, 4, 64), (4, 4, 32), (6, 1, 64)])
def test_attention_backends_agree(
    under_compile: bool, backend: Backend, dtype: torch.dtype, H: int, G: int, d: int
) -> None:
    if reason := why_not(backend, CUDA, dtype, d):
        pytest.skip(f"{backend} {reason}")
    lengths = [5, 1, 170, 700, 33]
    leaves = [t.detach().to(CUDA, dtype).requires_grad_() for t in operands(lengths, H, G, d)]
    segments = packed(lengths)
    segments = type(segments)(
        cu_seqlens=segments.cu_seqlens.cuda(),
        max_seqlen=segments.max_seqlen,
        positions_T=segments.positions_T.cuda(),
    )
    call = compiled(attend) if under_compile else attend
    found = call(*leaves, segments, backend)
    wide = [leaf.detach().cpu().float().requires_grad_() for leaf in leaves]
    expected = plain(*wide, lengths)
    seed = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    mine = [found, *torch.autograd.grad(found, leaves, seed.cuda())]
    theirs = [expected, *torch.autograd.grad(expected, wide, seed.double())]
    for a, b in zip(mine, theirs, strict=True):
        error = (a.detach().cpu().double() - b.detach().double()).norm() / b.detach().norm()
        assert error <= TOLERANCE[dtype]


def test_segments_of_many_lengths_are_not_planned_one_by_one() -> None:
    lengths = [5, 1, 170, 700, 33]
    q, k, v = (t.detach().to(CUDA, torch.bfloat16) for t in operands(lengths, 8, 4, 64))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attend(q, k, v, packed(lengths), "sdpa")
    called = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention" in called
    assert not [name for name in called if "cudnn" in name]


def test_factors_of_one_table_have_their_gradients_when_compiled() -> None:
    # Large enough for Inductor to fuse sums over rows with those over channels.
    T, D, layers = 32_768, 512, 4
    random = torch.Generator(CUDA).manual_seed(1)
    x0 = torch.randn(T, D, device=CUDA, dtype=torch.bfloat16, generator=random)
    table = torch.randn(2 * layers, D, device=CUDA, generator=random)
    seed = torch.randn(T, D, device=CUDA, generator=random)

    def gradients(run: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (x0, table)]
        return torch.autograd.grad((run(*leaves) * seed).sum(), leaves)

    def normed_again_and_again(x_TD: Tensor, table_KD: Tensor) -> Tensor:
        stream = x_TD
        for coefs in table_KD.split(2):
            (stream,) = mix(
                [stream, x_TD], coefs, [Mix(terms=((0, 0), (1, 1)), keep=False, scale=1.0)]
            )
        return stream

    mine = gradients(compiled(normed_again_and_again))
    theirs = gradients(normed_again_and_again)
    for a, b in zip(mine, theirs, strict=True):
        assert (a - b).norm() <= TOLERANCE[torch.bfloat16] * layers * b.norm()


# Training -----------------------------------------------------------------------------------------

HALF = TINY.with_overrides({"train.precision": "bfloat16", "train.log_every_steps": 1})


class Losses(Reporter):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def interval(self, interval: Interval) -> None:
        self.values.append(interval.train_loss_nats)


def run_of(config: Config, losses: Losses | None = None, **more: object) -> TrainingRun:
    return TrainingRun(
        config,
        TRAIN_SHARDS,
        world=World(device=CUDA),
        reporter=losses,
        initial=training_states()["init"],
        **more,  # type: ignore[arg-type]
    )


def losses_of(config: Config) -> list[float]:
    losses = Losses()
    with run_of(config, losses) as run:
        run.run()
    return losses.values


@pytest.mark.parametrize(
    "other",
    [
        {"kernels.graphs": False},
        {"kernels.backend": "torch"},
        {"attention.backend": "varlen"},
        {"attention.backend": "sdpa"},
        {"kernels.backend": "torch", "attention.backend": "sdpa", "kernels.graphs": False},
        {"kernels.backend": "torch", "kernels.compile": True, "kernels.graphs": False},
    ],
    ids=str,
)
def test_ways_to_compute_give_one_loss_curve(other: dict[str, object]) -> None:
    # Within bfloat16's noise: losses are good to about 2^-8 relative.
    assert losses_of(HALF.with_overrides(other)) == pytest.approx(losses_of(HALF), rel=2**-8)


def test_preparing_changes_nothing() -> None:
    with run_of(HALF) as run:
        before = copy.deepcopy(run._state())
        run.prepare()
        after = run._state()
    for name, tensor in before.weights.items():
        assert torch.equal(tensor, after.weights[name]), name
    for name, tensor in before.average.items():
        assert torch.equal(tensor, after.average[name]), name
    assert not after.optimizer["adam"] and not before.optimizer["adam"]
    for name, tensor in before.optimizer["muon"].items():
        assert torch.equal(tensor, after.optimizer["muon"][name]), name
    assert before.loader == after.loader


def prepared_with(root: Path, shared: Path) -> str:
    """Where a run finds compiled code."""
    config = HALF.with_overrides({"kernels.cache": str(shared)})
    with run_of(config, code=CodeCache(config=config, device=CUDA, root=root)) as run:
        run.prepare()
        assert run.code is not None and run.code.trouble is None
        return run.code.found


def test_a_second_run_finds_compiled_code(tmp_path: Path) -> None:
    found = []
    for root in ("here", "here", "elsewhere"):
        # A process compiles a kernel once, wherever it put the code then.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            work = pool.submit(prepared_with, tmp_path / root, tmp_path / "shared")
            found.append(work.result())
    assert found == ["nothing", "here", "shared"]
    assert list((tmp_path / "elsewhere").glob("*/triton/*/*.cubin"))
