"""The adapters' optimizer against torch's own, one document at a time."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from golf_ray.adaptation.optimizer import AdapterOptimizer
from golf_ray.config import AdaptationConfig

BASE = AdaptationConfig(lr=3e-3, weight_decay=0.5)


def gradients(steps: int, num: int, size: int) -> torch.Tensor:
    """Gradients of very different sizes, some exactly zero."""
    generator = torch.Generator().manual_seed(3)
    g = torch.randn(steps, num, size, generator=generator)
    g *= 10.0 ** torch.randint(-6, 2, (num, size), generator=generator)
    g[0] *= torch.rand(num, size, generator=generator) > 0.3
    return g


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("eps", [1e-10, 1e-3])
def test_adam_is_torchs_adamw(beta1: float, weight_decay: float, eps: float) -> None:
    adaptation = dataclasses.replace(BASE, beta1=beta1, weight_decay=weight_decay, eps=eps)
    num, size, steps = 3, 50, 12
    start = torch.randn(num, size, generator=torch.Generator().manual_seed(1))
    grads = gradients(steps, num, size)
    p_NP = start.clone()
    optimizer = AdapterOptimizer(adaptation, num, size)
    for g in grads:
        optimizer.step(p_NP, g, range(num))
    for row in range(num):
        alone = torch.nn.Parameter(start[row].clone())
        theirs = torch.optim.AdamW(
            [alone], lr=adaptation.lr, betas=(beta1, adaptation.beta2), eps=eps,
            weight_decay=weight_decay,
        )  # fmt: skip
        for g in grads:
            alone.grad = g[row].clone()
            theirs.step()
        torch.testing.assert_close(p_NP[row], alone.detach(), rtol=1e-6, atol=1e-7)
        assert (alone.detach() - start[row]).abs().max() > 1e-3


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_sgd_is_torchs_sgd_with_decoupled_decay(momentum: float) -> None:
    adaptation = dataclasses.replace(BASE, optimizer="sgd", beta1=momentum)
    num, size, steps = 2, 40, 7
    start = torch.randn(num, size, generator=torch.Generator().manual_seed(1))
    grads = gradients(steps, num, size)
    p_NP = start.clone()
    optimizer = AdapterOptimizer(adaptation, num, size)
    assert (optimizer.first_NP is None) == (momentum == 0) and optimizer.second_NP is None
    for g in grads:
        optimizer.step(p_NP, g, range(num))
    for row in range(num):
        alone = torch.nn.Parameter(start[row].clone())
        theirs = torch.optim.SGD([alone], lr=adaptation.lr, momentum=momentum)
        for g in grads:
            alone.grad = g[row].clone()
            with torch.no_grad():
                alone.mul_(1 - adaptation.lr * adaptation.weight_decay)
            theirs.step()
        torch.testing.assert_close(p_NP[row], alone.detach(), rtol=1e-6, atol=1e-7)


def test_only_what_the_settings_use_is_kept() -> None:
    optimizer = AdapterOptimizer(BASE, 2, 5)
    assert BASE.beta1 == 0 and optimizer.first_NP is None
    assert AdapterOptimizer(dataclasses.replace(BASE, beta1=0.5), 2, 5).first_NP is not None


def test_documents_have_step_counts_of_their_own() -> None:
    adaptation = dataclasses.replace(BASE, beta1=0.9)
    grads = gradients(6, 2, 30)
    optimizer = AdapterOptimizer(adaptation, 2, 30)
    p_NP = torch.ones(2, 30)
    for i, g in enumerate(grads):
        rows = range(2) if i < 2 else range(1)
        optimizer.step(p_NP[: len(rows)], g[: len(rows)], rows)
    late = grads[5:6].expand(2, -1, -1)[:, 1]
    optimizer.step(p_NP[1:], late[:1], [1])
    assert optimizer.steps_N == [6, 3]

    alone = AdapterOptimizer(adaptation, 1, 30)
    q_NP = torch.ones(1, 30)
    for g in (grads[0][1:], grads[1][1:], late[:1]):
        alone.step(q_NP, g, range(1))
    assert torch.equal(q_NP[0], p_NP[1])
