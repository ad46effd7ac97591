"""Muon: momentum, then an orthogonalised update, for banks of matrices.

Free functions for the mathematics, `Muon` for the state. Over several ranks each bank is reduced
to shares of matrices, each rank updates its share, and the shares are gathered; communication of
one bank overlaps the work on another.

Shapes: N matrices of a bank, R rows, C columns. Source of the iteration: Keller Jordan, "Muon: an
optimizer for hidden layers in neural networks" (2024); the row normalisation is PR #1530's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from golf_ray.optim.world import Wait, World

NS_COEFFICIENTS = (3.4445, -4.775, 2.0315)
NORM_FLOOR = 1e-7


def newton_schulz(x_NRC: Tensor, steps: int) -> Tensor:
    """Approximately orthogonal matrices with the singular vectors of the input.

    Quintic Newton-Schulz iteration in the input's arithmetic, on the wide orientation.

    Args:
        x_NRC: [..., R, C] matrices.
        steps: iterations.
    """
    a, b, c = NS_COEFFICIENTS
    tall = x_NRC.shape[-2] > x_NRC.shape[-1]
    x = x_NRC.mT if tall else x_NRC
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + NORM_FLOOR)
    for _ in range(steps):
        p = x @ x.mT
        q = b * p + c * (p @ p)
        x = a * x + q @ x
    return x.mT if tall else x


def muon_direction(
    grad_NRC: Tensor, buffer_NRC: Tensor, momentum: float, steps: int, row_normalize: bool
) -> Tensor:
    """Advance the momentum buffer in place and give the orthogonalised Nesterov update.

    Args:
        grad_NRC: gradient.
        buffer_NRC: momentum buffer; its arithmetic is that of everything that follows.
        momentum: mu of buf = mu buf + g, u = g + mu buf.
        steps: Newton-Schulz iterations.
        row_normalize: divide each row of u by its L2 norm first.
    """
    grad = grad_NRC.to(buffer_NRC.dtype)
    buffer_NRC.mul_(momentum).add_(grad)
    update = grad.add(buffer_NRC, alpha=momentum)
    if row_normalize:
        norms = update.float().norm(dim=-1, keepdim=True).clamp_min(NORM_FLOOR)
        update = update / norms.to(update.dtype)
    return newton_schulz(update, steps)


class Muon:
    """Momentum buffers of this rank's share of each bank, and the step over them.

    Args:
        banks: name -> parameter [N, R, C], in the order in which their gradients are reduced.
        world: the ranks.
        newton_schulz_steps: iterations.
        dtype: arithmetic of buffers and iterations.
        row_normalize: normalise the rows of an update.
    """

    def __init__(
        self,
        banks: dict[str, Tensor],
        world: World,
        *,
        newton_schulz_steps: int,
        dtype: torch.dtype,
        row_normalize: bool,
    ) -> None:
        self.banks = banks
        self.world = world
        self.newton_schulz_steps = newton_schulz_steps
        self.row_normalize = row_normalize
        self.buffers = {
            name: torch.zeros_like(p[world.share(p.shape[0])], dtype=dtype)
            for name, p in banks.items()
        }

    @torch.no_grad()
    def step(
        self, grads: Mapping[str, Wait], *, lr: float, weight_decay: float, momentum: float
    ) -> None:
        """Update the banks.

        Args:
            grads: this rank's share of each bank's averaged gradient, waited for in turn.
            lr: learning rate, the schedule's multiplier included.
            weight_decay: decoupled; p *= 1 - lr * weight_decay.
            momentum: of this step.
        """
        gathers = []
        for name, bank in self.banks.items():
            count, rows, columns = bank.shape
            share = bank[self.world.share(count)]
            grad = grads[name]()
            if share.shape[0]:
                update = muon_direction(
                    grad,
                    self.buffers[name],
                    momentum,
                    self.newton_schulz_steps,
                    self.row_normalize,
                )
                share.mul_(1.0 - lr * weight_decay)
                share.add_(update, alpha=-lr * max(1.0, rows / columns) ** 0.5)
            gathers.append((bank, self.world.gather_shares(share, count)))
        for bank, wait in gathers:
            gathered = wait()
            if self.world.size > 1:
                bank.copy_(gathered)

    def state_dict(self) -> dict[str, Tensor]:
        """Whole buffers, whatever the number of ranks; every rank must call it."""
        return {
            name: self.world.gather_shares(buffer, self.banks[name].shape[0])().clone()
            for name, buffer in self.buffers.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take this rank's share of whole buffers."""
        for name, buffer in self.buffers.items():
            buffer.copy_(state[name][self.world.share(self.banks[name].shape[0])])
