"""Exponential moving average of all weights, in float32; the average is a run's result."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class WeightAverage:
    """average = decay * average + (1 - decay) * weights, starting as a copy of the weights.

    Args:
        tensors: the weights by name, updated in place by the optimizer.
        decay: 0 keeps the latest weights.
    """

    def __init__(self, tensors: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self._weights = dict(tensors)
        self._average = {
            name: tensor.detach().clone().to(torch.float32, copy=True)
            for name, tensor in tensors.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights in."""
        averages = list(self._average.values())
        weights = [w.detach().float() for w in self._weights.values()]
        torch._foreach_lerp_(averages, weights, 1.0 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by name, in float32 (views)."""
        return dict(self._average)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set the averages."""
        for name, average in self._average.items():
            average.copy_(state[name])

    def weights(self) -> dict[str, Tensor]:
        """The averages in the weights' own types: what a run leaves behind."""
        return {n: a.to(self._weights[n].dtype, copy=True) for n, a in self._average.items()}
