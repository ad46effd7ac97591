"""The adapters' optimizer: AdamW or SGD over many documents at once, one flat buffer each.

Each document is one row; it has its own step count, and no operation mixes rows. Not the training's
optimizer (`golf_ray.optim`).

Shapes: N documents, P adapter parameters of one document.

Invariant: a document's row after k steps is what a fresh optimizer of its own would have made.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from golf_ray.config import AdaptationConfig


class AdapterOptimizer:
    """Moments and step counts of N documents.

    Holds only what the settings use: no first moment where beta1 = 0, no second for SGD.
    """

    def __init__(
        self,
        adaptation: AdaptationConfig,
        num_documents: int,
        num_parameters: int,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (num_documents, num_parameters)
        self.adaptation = adaptation
        self.first_NP = torch.zeros(shape, device=device) if adaptation.beta1 > 0 else None
        adam = adaptation.optimizer == "adam"
        self.second_NP = torch.zeros(shape, device=device) if adam else None
        self.steps_N = [0] * num_documents

    def start(self, row: int) -> None:
        """Forget what a row has learned: another document takes it."""
        for moments in (self.first_NP, self.second_NP):
            if moments is not None:
                moments[row].zero_()
        self.steps_N[row] = 0

    def step(self, p_nP: Tensor, grad_nP: Tensor, rows: Sequence[int]) -> None:
        """One step of the documents in `rows`.

        Args:
            p_nP: parameters of exactly those documents, changed in place.
            grad_nP: their gradients, of the same shape.
        """
        steps_n = [self.steps_N[row] + 1 for row in rows]
        index = torch.tensor(rows, device=p_nP.device)
        first, second = (
            None if moments is None else moments[index]
            for moments in (self.first_NP, self.second_NP)
        )
        if second is None:
            sgd_step(p_nP, grad_nP, first, self.adaptation)
        else:
            adamw_step(p_nP, grad_nP, first, second, steps_n, self.adaptation)
        for moments, new in ((self.first_NP, first), (self.second_NP, second)):
            if moments is not None and new is not None:
                moments[index] = new
        self.count(rows)

    def count(self, rows: Sequence[int]) -> None:
        """Note a step of the documents in `rows`."""
        for row in rows:
            self.steps_N[row] += 1

    def factors(self, rows: Sequence[int]) -> list[tuple[float, float]]:
        """1 / sqrt(1 - beta2^t) and 1 / (1 - beta1^t) of the next step of some documents."""
        beta1, beta2 = self.adaptation.beta1, self.adaptation.beta2
        steps = [self.steps_N[row] + 1 for row in rows]
        return [((1 - beta2**t) ** -0.5, 1 / (1 - beta1**t)) for t in steps]


def adamw_step(
    p_NP: Tensor,
    grad_NP: Tensor,
    first_NP: Tensor | None,
    second_NP: Tensor,
    steps_N: list[int],
    adaptation: AdaptationConfig,
) -> None:
    """AdamW (Loshchilov and Hutter, 2019): decoupled decay, both moments bias-corrected; in place.

    Args:
        first_NP: first moments; None where beta1 = 0, when they equal the gradient.
        steps_N: number of this step for each document, from 1.
    """
    beta1, beta2 = adaptation.beta1, adaptation.beta2
    p_NP.mul_(1 - adaptation.lr * adaptation.weight_decay)
    second_NP.mul_(beta2).addcmul_(grad_NP, grad_NP, value=1 - beta2)
    root_N = _column([(1 - beta2**t) ** 0.5 for t in steps_N], p_NP)
    denominator_NP = (second_NP.sqrt() / root_N).add_(adaptation.eps)
    if first_NP is None:
        numerator_NP = grad_NP
    else:
        first_NP.lerp_(grad_NP, 1 - beta1)
        numerator_NP = first_NP / _column([1 - beta1**t for t in steps_N], p_NP)
    p_NP.addcdiv_(numerator_NP, denominator_NP, value=-adaptation.lr)


def sgd_step(
    p_NP: Tensor, grad_NP: Tensor, first_NP: Tensor | None, adaptation: AdaptationConfig
) -> None:
    """SGD with decoupled decay and momentum beta1 (no dampening, no Nesterov); in place."""
    p_NP.mul_(1 - adaptation.lr * adaptation.weight_decay)
    if first_NP is not None:
        grad_NP = first_NP.mul_(adaptation.beta1).add_(grad_NP)
    p_NP.add_(grad_NP, alpha=-adaptation.lr)


def _column(values: list[float], like: Tensor) -> Tensor:
    """One value a document, computed in float64, against rows."""
    return torch.tensor(values, dtype=torch.float64).to(like.device, like.dtype)[:, None]
