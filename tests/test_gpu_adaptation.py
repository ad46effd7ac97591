"""Test-time training on a GPU: kernels, captured steps, and scores beside those of float32.

These skip themselves where there is no GPU.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from kernel_cases import (
    GROUPED_SHAPES,
    LINEAR_SHAPES,
    LinearShape,
    grouped_linear,
    grouped_rows,
    grouped_sums,
    linear_on,
    linear_operands,
)
from reference import TOKENIZER, VAL_SHARDS, final_state

from evaluators.ttt import choose_documents
from golf_ray.adaptation.adapters import AdapterBank, AdapterLayout, adapter_slots
from golf_ray.adaptation.engine import Engine
from golf_ray.adaptation.fused import FusedAdapters
from golf_ray.adaptation.optimizer import AdapterOptimizer
from golf_ray.adaptation.packing import Budget
from golf_ray.adaptation.plain import PlainAdapters
from golf_ray.adaptation.scores import DocumentScore
from golf_ray.bench.adaptation import TttBench
from golf_ray.config import AdaptationConfig
from golf_ray.data.shards import load_tokens
from golf_ray.data.tokenizer import byte_tables
from golf_ray.kernels.grouped import linear_twin
from golf_ray.model.attention import why_not
from golf_ray.model.checkpoint import build_model
from golf_ray.model.compute import Compute
from golf_ray.presets import RECORD, TINY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
TOLERANCE = {torch.bfloat16: 2.0**-8 * 2, torch.float16: 2.0**-11 * 2, torch.float32: 1e-5}
HOPPER = "FlashAttention-3 computes in 16 bits on Hopper GPUs"


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """No TF32 where float32 is what is compared with."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


SHAPES = [*GROUPED_SHAPES, ((2048, 300, 31), 512, 96), ((129, 64, 1), 96, 512)]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = (found.float() - expected).norm() / expected.norm()
    assert error <= TOLERANCE[found.dtype], float(error)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("lengths", "columns", "depth"), SHAPES)
def test_rows_are_their_twin(
    dtype: torch.dtype, turned: bool, lengths: tuple[int, ...], columns: int, depth: int
) -> None:
    close(*grouped_rows(dtype, lengths, columns, depth, turned=turned, device="cuda"))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("lengths", "a", "b"), SHAPES)
def test_sums_are_their_twin(dtype: torch.dtype, lengths: tuple[int, ...], a: int, b: int) -> None:
    close(*grouped_sums(dtype, lengths, a, b, device="cuda"))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        *LINEAR_SHAPES,
        ((2048, 300, 31), 512, (512, 256, 256), 96),
        ((1500, 36), 512, (512, 256, 256), 96),
        ((40, 130), 1024, (512,), 384),
        ((129, 64, 1), 2048, (512,), 96),
        ((32,) * 9, 512, (8192,), 96),
    ],
    ids=str,
)
def test_linear_is_its_twin(dtype: torch.dtype, turned: bool, shape: LinearShape) -> None:
    found, expected, _ = grouped_linear(dtype, shape, turned=turned, device="cuda")
    close(found, expected)
    found, expected, _ = grouped_linear(
        dtype, shape, turned=turned, device="cuda", out=torch.float32
    )
    close(found, expected)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        ((5, 1, 40), 72, (16, 8), 32),
        ((1,) * 140, 72, (128, 128), 32),
        ((1500, 36), 512, (512, 256, 256), 96),
        ((40, 130), 1024, (512,), 384),
        ((129, 64, 1), 2048, (512,), 96),
    ],
    ids=str,
)
def test_linear_has_the_same_bits_whatever_ran_before(shape: LinearShape, turned: bool) -> None:
    operands = linear_operands(torch.bfloat16, shape, turned)
    run = linear_on("cuda", operands, turned=turned)
    expected = linear_twin(*operands, turned=turned)
    # What leaves its numbers in multiprocessors, and in memory that is taken next.
    dirt = torch.full((4096, 4096), float("nan"), dtype=torch.bfloat16, device=CUDA)
    first = run()
    close(first.cpu(), expected)
    for i in range(100):
        _ = dirt @ dirt if i % 2 else dirt * 2
        assert torch.equal(run(), first), i


def test_what_adapters_add_is_added_before_the_sum_is_rounded() -> None:
    # A tenth of bfloat16's last place; see the test in the interpreter.
    found, expected, own = grouped_linear(
        torch.bfloat16, ((1300,), 512, (512,), 96), turned=False, scale=3e-4, device="cuda"
    )
    left = ((found.float() - (expected - own)) * own).sum() / own.square().sum()
    spread = (found.float() - expected).std() / own.norm()
    assert abs(left - 1) <= 5 * spread < 0.1, (float(left), float(spread))


def test_fresh_adapters_have_the_bits_of_a_cpu() -> None:
    adaptation = RECORD.adaptation
    layout = AdapterLayout(adapter_slots(RECORD.model), adaptation.rank)
    banks = [AdapterBank(layout, 3, device) for device in ("cpu", CUDA)]
    plain = PlainAdapters(banks[0], AdapterOptimizer(adaptation, 3, layout.num_parameters))
    optimizer = AdapterOptimizer(adaptation, 3, layout.num_parameters, CUDA)
    fused = FusedAdapters(banks[1], optimizer, torch.bfloat16)
    for adapters in (plain, fused):
        adapters.start([2, 0], [49_999, 17], 2**33 + 5)
    assert torch.equal(banks[1].p_NP.cpu(), banks[0].p_NP)
    assert torch.equal(fused.shadow_NP.cpu(), banks[0].p_NP.bfloat16())


def scores(
    compute: Compute, adaptation: AdaptationConfig, *, graphs: bool = True
) -> tuple[dict[int, DocumentScore], Engine]:
    tokens = load_tokens(VAL_SHARDS, TINY.model.vocab_size)
    engine = Engine(
        build_model(TINY.model, final_state(), device=CUDA, compute=compute),
        tokens,
        adaptation,
        tables=byte_tables(TOKENIZER, TINY.model.vocab_size),
        keep_token_nats=True,
        budget=Budget(residents=6, step_tokens=600),
        graphs=graphs,
    )
    return {s.index: s for s in engine.run(choose_documents(tokens, adaptation))}, engine


def mean_difference(a: dict[int, DocumentScore], b: dict[int, DocumentScore]) -> float:
    assert a.keys() == b.keys()
    tokens = sum(s.tokens for s in a.values())
    return abs(sum(s.nats for s in a.values()) - sum(s.nats for s in b.values())) / tokens


@pytest.mark.skipif(
    not torch.cuda.is_available()
    or why_not("fa3", CUDA, torch.bfloat16, TINY.model.head_dim) is not None,
    reason=HOPPER,
)
def test_fused_and_captured_scores_are_those_of_float32_within_bfloat16() -> None:
    adaptation = dataclasses.replace(TINY.adaptation, eps=1e-6)
    fused = Compute(dtype=torch.bfloat16, attention="fa3", kernels="triton")
    captured, engine = scores(fused, adaptation)
    assert engine._graphs is not None and engine._graphs.num_captured > 0
    eager, _ = scores(fused, adaptation, graphs=False)
    plain, other = scores(
        Compute(dtype=torch.bfloat16, attention="fa3", kernels="torch"), adaptation
    )
    exact, _ = scores(Compute(), adaptation)
    assert isinstance(other.adapters, PlainAdapters)
    # Means over 882 tokens, each of which bfloat16 moves by some hundredths.
    assert mean_difference(captured, eager) < 2e-3
    assert mean_difference(captured, plain) < 5e-3
    assert mean_difference(captured, exact) < 1e-2
    for index, score in captured.items():
        assert score.token_nats is not None and np.isfinite(score.token_nats).all()
        assert [e.chunk for e in score.trace] == [e.chunk for e in exact[index].trace]


def test_memory_stays_within_what_the_budget_says() -> None:
    if why_not("fa3", CUDA, torch.bfloat16, 64) is not None:
        pytest.skip(HOPPER)
    config = RECORD.with_overrides(
        {"adaptation.resident_documents": 40, "adaptation.step_tokens": 16_384}
    )
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    bench = TttBench(config, CUDA)
    for _ in range(3):
        bench.run([400] * 30 + [2200] * 8)
    # 41 rows of 100 MB, two passes of 16,384 tokens and 1,024 of padding, and the model.
    assert torch.cuda.max_memory_reserved() - before < 4.2e9 + 2 * 17_408 * 430_000 + 2e9
