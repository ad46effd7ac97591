"""Adapters of many documents in torch's own operations: everywhere, in any arithmetic.

Shapes: N documents of a step, P parameters of one. Invariant: no operation mixes documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from golf_ray.adaptation.adapters import AdapterBank, AdapterHooks, Pairs, RowLayout
from golf_ray.adaptation.batches import Batch
from golf_ray.adaptation.optimizer import AdapterOptimizer
from golf_ray.model.hooks import Hooks


class PlainAdapters:
    """The adapters of a step as leaves of autograd, and their step.

    Args:
        bank: parameters, float32.
        optimizer: their moments and step counts.
        adapter_init: A by input width in place of the random ones.
    """

    def __init__(
        self,
        bank: AdapterBank,
        optimizer: AdapterOptimizer,
        adapter_init: Mapping[int, Tensor] | None = None,
    ) -> None:
        self.bank = bank
        self.layout = bank.layout
        self.optimizer = optimizer
        self._init = adapter_init
        self._taken: tuple[Tensor, Pairs] | None = None

    def start(self, rows: Sequence[int], documents: Sequence[int], seed: int) -> None:
        """Give rows to documents: A of (seed, document, slot), B zero, nothing learned."""
        for row, document in zip(rows, documents, strict=True):
            self.bank.reset(row, document, seed, self._init)
            self.optimizer.start(row)

    def refresh(self, row: int) -> None:
        """Nothing is derived from a row's parameters."""

    def hooks(self, batch: Batch) -> Hooks:
        """Hooks of one pass over a batch."""
        device = self.bank.p_NP.device
        p_nP = self.bank.p_NP[torch.tensor(batch.rows, device=device)]
        learns = torch.is_grad_enabled()
        pairs = self.layout.leaves(p_nP) if learns else self.layout.views(p_nP)
        self._taken = (p_nP, pairs) if learns else None
        body, ends = RowLayout(batch.lengths, device), RowLayout(batch.counts, device)
        return AdapterHooks(pairs, body, ends)

    def learn(self, batch: Batch, loss: Tensor) -> None:
        """One optimizer step on a loss that came of the last `hooks`."""
        assert self._taken is not None
        p_nP, leaves = self._taken
        self._taken = None
        grad_nP = self.layout.gradient(leaves, loss)
        with torch.no_grad():
            self.optimizer.step(p_nP, grad_nP, batch.rows)
            self.bank.p_NP[torch.tensor(batch.rows, device=p_nP.device)] = p_nP
