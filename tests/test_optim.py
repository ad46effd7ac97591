"""Optimizers: stored iterations, textbook twins, clip scopes, schedules, the average."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import arrays
from torch import Tensor

from golf_ray.model.model import GolfModel
from golf_ray.optim import schedule
from golf_ray.optim.ema import WeightAverage
from golf_ray.optim.gradients import GradientAccumulator, clip_coefficient, total_norm
from golf_ray.optim.muon import Muon, muon_direction, newton_schulz
from golf_ray.optim.optimizer import GolfOptimizer
from golf_ray.optim.world import World, at_once
from golf_ray.presets import RECORD, TINY


@pytest.mark.parametrize(("given_name", "expected_name"), [("G", "X"), ("G_tall", "X_tall")])
def test_newton_schulz_is_the_stored_one(given_name: str, expected_name: str) -> None:
    stored = arrays("newton_schulz")
    found = newton_schulz(torch.from_numpy(stored[given_name]).bfloat16(), 5).float()
    expected = torch.from_numpy(stored[expected_name])
    assert ((found - expected).norm() / expected.norm()).item() <= 1e-3


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(2, 20), st.integers(2, 20), st.integers(0, 1000))
def test_newton_schulz_pulls_singular_values_to_one(
    n: int, rows: int, columns: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, rows, columns, generator=generator)
    found = newton_schulz(x, 5)
    assert found.shape == x.shape
    # The quintic keeps large singular values within about [0.68, 1.14]; tiny ones stay below.
    assert torch.linalg.svdvals(found).max().item() < 1.25
    for k in range(n):
        alone = newton_schulz(x[k : k + 1], 5)
        torch.testing.assert_close(found[k : k + 1], alone, atol=1e-5, rtol=1e-5)


def test_muon_momentum_and_rows_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(1, 4, 6, generator=generator) for _ in range(3)]
    buffer = torch.zeros(1, 4, 6)
    velocity = torch.zeros(4, 6)
    for grad in grads:
        found = muon_direction(grad, buffer, 0.9, 5, True)
        velocity = 0.9 * velocity + grad[0]
        nesterov = grad[0] + 0.9 * velocity
        rows = nesterov / nesterov.norm(dim=1, keepdim=True)
        torch.testing.assert_close(found[0], newton_schulz(rows, 5), atol=1e-5, rtol=1e-5)
    zero = muon_direction(torch.zeros(1, 4, 6), torch.zeros(1, 4, 6), 0.9, 5, True)
    assert not zero.any() and torch.isfinite(zero).all()


def test_a_muon_step_decays_and_scales_by_shape() -> None:
    generator = torch.Generator().manual_seed(0)
    tall = torch.randn(2, 12, 3, generator=generator)
    bank, grad = tall.clone(), torch.randn(2, 12, 3, generator=generator)
    muon = Muon(
        {"b": bank}, World(), newton_schulz_steps=5, dtype=torch.float32, row_normalize=False
    )
    muon.step({"b": at_once(grad)}, lr=0.1, weight_decay=0.5, momentum=0.0)
    expected = tall * (1 - 0.05) - 0.1 * math.sqrt(12 / 3) * newton_schulz(grad, 5)
    torch.testing.assert_close(bank, expected)


def adam_twin(p: Tensor, grads: list[Tensor], lr: float, wd: float) -> Tensor:
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, g in enumerate(grads, 1):
        p = p * (1 - lr * wd)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        p = p - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
    return p


def test_every_tensor_is_in_its_group() -> None:
    config = TINY.with_overrides({"model.tie_embeddings": False, "model.embedding_dim": 32})
    model = GolfModel(config.model).init_weights(0)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    optimizer = GolfOptimizer(model, config.train, World())
    gradients = GradientAccumulator(
        optimizer.banks,
        optimizer.replicated,
        World(),
        clip_norm=0.0,
        clip_scope="rank",
        num_local=1,
    )
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(t.shape, generator=generator) for n, t in model.tensors().items()}
    for _ in range(2):
        gradients.add(sum((weights[n] * t).sum() for n, t in model.tensors().items()))  # type: ignore[arg-type]
        optimizer.step(gradients.finish(), lr_multiplier=0.5, momentum=0.9)
    after = model.state_dict()
    train = config.train
    rates = {
        "tok_emb.weight": (train.untied_embed_lr, train.embed_wd),
        "lm_head.weight": (train.head_lr, 0.0),
        "skip_gates": (train.small_lr, train.small_wd),
        "blocks.3.attn.q_gain": (train.small_lr, train.small_wd),
    }
    for name, (lr, wd) in rates.items():
        expected = adam_twin(before[name], [weights[name]] * 2, lr * 0.5, wd)
        torch.testing.assert_close(after[name], expected, atol=1e-5, rtol=1e-5)
    for name in ("embed_proj.weight", "head_proj.weight"):
        assert torch.equal(after[name], before[name])
    for name in optimizer.banks:
        assert not torch.equal(after[name], before[name])


@pytest.mark.parametrize("scope", ["micro_batch", "rank", "global"])
def test_clip_scopes(scope: str) -> None:
    generator = torch.Generator().manual_seed(0)
    bank = torch.zeros(2, 3, 4, requires_grad=True)
    small = torch.zeros(5, requires_grad=True)
    directions = [
        (torch.randn(2, 3, 4, generator=generator), torch.randn(5, generator=generator) * 3)
        for _ in range(3)
    ]
    accumulator = GradientAccumulator(
        {"bank": bank},
        {"small": small},
        World(),
        clip_norm=1.0,
        clip_scope=scope,
        num_local=3,  # type: ignore[arg-type]
    )
    for a, b in directions:
        accumulator.add((bank * a).sum() + (small * b).sum() + 2.0)
    step = accumulator.finish()
    norms = [math.sqrt(a.square().sum() + b.square().sum()) for a, b in directions]
    if scope == "micro_batch":
        expected = sum(a / n for (a, _), n in zip(directions, norms, strict=True)) / 3
        assert step.norm.item() == pytest.approx(sum(norms) / 3, rel=1e-5)
    else:
        mean = sum(a for a, _ in directions) / 3
        mean_small = sum(b for _, b in directions) / 3
        norm = math.sqrt(mean.square().sum() + mean_small.square().sum())
        expected = mean / norm
        assert step.norm.item() == pytest.approx(norm, rel=1e-5)
    torch.testing.assert_close(step.banks["bank"](), expected, atol=1e-5, rtol=1e-5)
    assert step.loss.item() == 2.0
    assert bank.grad is None and small.grad is None


@given(st.floats(0, 100, width=32), st.floats(0.125, 10, width=32))
def test_clipping_never_lengthens(norm: float, clip: float) -> None:
    coefficient = clip_coefficient(torch.tensor(norm), clip).item()
    assert 0 < coefficient <= 1 and norm * coefficient <= clip * (1 + 1e-6)


def test_total_norm_is_that_of_all() -> None:
    parts = [torch.full((3,), 2.0), torch.full((2, 2), 1.0)]
    assert total_norm(parts).item() == pytest.approx(4.0)


@given(st.floats(0, 1))
def test_the_learning_rate_falls_in_the_warmdown_only(frac: float) -> None:
    train = RECORD.train
    found = schedule.lr_multiplier(train, frac)
    assert found == (1.0 if frac < 1 - 0.72 else pytest.approx((1 - frac) / 0.72))


def test_schedules_at_their_ends() -> None:
    train = RECORD.train
    assert schedule.muon_momentum(train, 0) == 0.92
    assert schedule.muon_momentum(train, 750) == pytest.approx(0.945)
    assert schedule.muon_momentum(train, 1500) == schedule.muon_momentum(train, 9999) == 0.97
    assert schedule.run_fraction(train, 0, 293.5) == 0.5
    assert not schedule.is_over(train, 100, 586.9) and schedule.is_over(train, 100, 587.0)
    assert schedule.is_over(train, train.iterations, 0.0)
    assert schedule.loops(train, 0.35) and not schedule.loops(train, 0.3499)
    floor = RECORD.with_overrides({"train.min_lr": 0.1}).train
    assert schedule.lr_multiplier(floor, 1.0) == 0.1
    never = RECORD.with_overrides({"train.warmdown_frac": 0.0}).train
    assert schedule.lr_multiplier(never, 0.999) == 1.0
    steps = TINY.train
    assert [schedule.run_fraction(steps, k, 1e9) for k in (0, 5, 10)] == [0.0, 0.5, 1.0]


def test_the_average_follows_the_weights() -> None:
    weights = {"a": torch.ones(3), "b": torch.full((2,), 4.0, dtype=torch.bfloat16)}
    average = WeightAverage(weights, 0.75)
    weights["a"].fill_(5.0)
    average.update()
    assert average.state_dict()["a"].tolist() == [2.0] * 3
    assert average.weights()["b"].dtype == torch.bfloat16
    assert average.state_dict()["b"].dtype == torch.float32
    average.load_state_dict({"a": torch.zeros(3), "b": torch.zeros(2)})
    average.update()
    assert average.state_dict()["a"].tolist() == [1.25] * 3


@given(st.integers(1, 40), st.integers(1, 9))
def test_shares_of_a_bank_are_disjoint_and_complete(count: int, size: int) -> None:
    shares = [World(rank=r, size=size).share(count) for r in range(size)]
    rows = [row for share in shares for row in range(share.start, share.stop)]
    assert rows == list(range(count))
