"""Fused adapters in Triton's interpreter: each kernel against its twin, the engine against itself
with adapters in torch's own operations, and padding against none."""

from __future__ import annotations

import dataclasses

import flash_standin
import numpy as np
import pytest
import torch
from adaptation_cases import ADAPTATION, SMALL, TABLES, documents_of, small_model, stream
from kernel_cases import (
    GROUPED_SHAPES,
    LINEAR_SHAPES,
    LinearShape,
    grouped_linear,
    grouped_rows,
    grouped_sums,
    interpreter_problem,
)
from torch import Tensor

from golf_ray.adaptation.adapters import AdapterLayout, adapter_slots
from golf_ray.adaptation.batches import HostBatch, Shape, send
from golf_ray.adaptation.engine import Engine
from golf_ray.adaptation.fused import FusedAdapters
from golf_ray.adaptation.graphs import StepGraphs
from golf_ray.adaptation.packing import Budget
from golf_ray.adaptation.philox import adapter_a
from golf_ray.adaptation.plain import PlainAdapters
from golf_ray.config import AdapterSite
from golf_ray.kernels import flash
from golf_ray.model.compute import Compute
from golf_ray.model.model import GolfModel

pytest.importorskip("triton")
problem = interpreter_problem()
pytestmark = pytest.mark.skipif(problem is not None, reason=problem or "")

# Sums of some hundred products in float32; in float16 a result is rounded once.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
TOKENS = stream([9, 1, 6])


def close(found: Tensor, expected: Tensor) -> None:
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    assert error <= TOLERANCE[found.dtype], float(error)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float16"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("lengths", "columns", "depth"), GROUPED_SHAPES)
def test_rows_are_their_twin(
    dtype: torch.dtype, turned: bool, lengths: tuple[int, ...], columns: int, depth: int
) -> None:
    close(*grouped_rows(dtype, lengths, columns, depth, turned=turned))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float16"])
@pytest.mark.parametrize(("lengths", "a", "b"), GROUPED_SHAPES)
def test_sums_are_their_twin(dtype: torch.dtype, lengths: tuple[int, ...], a: int, b: int) -> None:
    found, expected = grouped_sums(dtype, lengths, a, b)
    close(found, expected)
    assert (found[2] == 7).all(), "rows of documents that take no part are left alone"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float16"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
def test_linear_is_its_twin(dtype: torch.dtype, turned: bool, shape: LinearShape) -> None:
    found, expected, _ = grouped_linear(dtype, shape, turned=turned)
    assert found.dtype == dtype
    close(found, expected)
    found, _, _ = grouped_linear(dtype, shape, turned=turned, out=torch.float32)
    assert found.dtype == torch.float32
    close(found, expected)


@pytest.mark.parametrize("width", [64, 2048])
def test_what_adapters_add_is_added_before_the_sum_is_rounded(width: int) -> None:
    # A tenth of float16's last place: of a sum that is rounded twice little of it is left.
    found, expected, own = grouped_linear(
        torch.float16, ((130,), width, (256,), 32), turned=False, scale=3e-5
    )
    left = ((found.float() - (expected - own)) * own).sum() / own.square().sum()
    # One rounding is as likely up as down: five standard errors.
    spread = (found.float() - expected).std() / own.norm()
    assert abs(left - 1) <= 5 * spread < 0.25, (float(left), float(spread))


def test_fresh_adapters_are_those_of_philox_to_the_bit() -> None:
    layout = AdapterLayout(adapter_slots(SMALL), 3)
    plain, fused = engine("torch", rank=3), engine("triton", rank=3)
    assert isinstance(fused.adapters, FusedAdapters)
    seed = 2**40 + 7
    for one in (plain, fused):
        one.bank.p_NP.fill_(5.0)
        one.adapters.start([2, 0], [49_999, 3], seed)
    assert torch.equal(fused.bank.p_NP, plain.bank.p_NP)
    assert torch.equal(fused.adapters.shadow_NP[[0, 2]], plain.bank.p_NP[[0, 2]])
    a, b = layout.views(fused.bank.p_NP)["mlp", 1]
    slot = layout.of["mlp", 1]
    assert torch.equal(a[2], adapter_a(seed, 49_999, slot.id, 3, slot.in_features))
    assert (b[[0, 2]] == 0).all() and (fused.bank.p_NP[1] == 5).all()


def engine(kernels: str, attention: str = "sdpa", **changes: object) -> Engine:
    compute = Compute(attention=attention, kernels=kernels)  # type: ignore[arg-type]
    model = GolfModel(SMALL, compute=compute)
    model.load_state_dict(small_model().state_dict())
    # Where a gradient is zero but for rounding, a small eps makes a step of the rounding.
    adaptation = dataclasses.replace(ADAPTATION, eps=1e-4, **changes)  # type: ignore[arg-type]
    return Engine(
        model, TOKENS, adaptation, tables=TABLES, keep_token_nats=True,
        budget=Budget(residents=3, step_tokens=30),
    )  # fmt: skip


def losses(one: Engine) -> dict[int, np.ndarray]:
    scores = one.run(documents_of(TOKENS))
    return {s.index: s.token_nats for s in scores if s.token_nats is not None}


SITES: dict[str, tuple[AdapterSite, ...]] = {
    "all": ("q", "k", "v", "o", "mlp", "head"),
    "without q": ("k", "o", "head"),
}


@pytest.mark.parametrize(
    ("sites", "changes"),
    [
        ("all", {"beta1": 0.5}),
        ("without q", {"optimizer": "sgd", "beta1": 0.3, "lr": 0.1}),
    ],
)
def test_an_engine_of_fused_adapters_is_the_engine(sites: str, changes: dict[str, object]) -> None:
    fused = engine("triton", sites=SITES[sites], **changes)
    plain = engine("torch", sites=SITES[sites], **changes)
    assert isinstance(fused.adapters, FusedAdapters) and isinstance(plain.adapters, PlainAdapters)
    found, expected = losses(fused), losses(plain)
    still = losses(engine("torch", sites=()))
    for index, values in expected.items():
        np.testing.assert_allclose(found[index], values, atol=3e-5)
    moved = max(float(np.abs(values - still[i]).max()) for i, values in expected.items())
    assert moved > 1e-2, "adaptation did something"


class EveryStepPadded(StepGraphs):
    """Padded steps as a GPU captures them, kernel by kernel."""

    padded = 0

    def run(self, host: HostBatch, shape: Shape) -> Tensor:
        self.padded += 1
        self.shapes.captured(shape)
        factors = np.asarray(self._adapters.optimizer.factors(host.rows), dtype=np.float32)
        losses_S = self._compute(host.on(self._device), send(factors, self._device))
        self._adapters.optimizer.count(host.rows)
        return losses_S[: len(host.loss_places)]


def test_padding_reaches_no_document(monkeypatch: pytest.MonkeyPatch) -> None:
    standin = flash_standin.operators("work space")
    monkeypatch.setattr(flash, "operators", lambda: standin)
    monkeypatch.setattr("golf_ray.adaptation.shapes.GRAINS", ((1 << 30, 4),))
    plain, padded = engine("triton", "fa3"), engine("triton", "fa3")
    assert plain._graphs is None
    adapters = padded.adapters
    assert isinstance(adapters, FusedAdapters)
    graphs = EveryStepPadded(adapters, padded._padded_step, torch.device("cpu"))
    padded._graphs = graphs
    found, expected = losses(padded), losses(plain)
    assert graphs.padded >= 2
    for index, values in expected.items():
        np.testing.assert_allclose(found[index], values, atol=2e-5)
