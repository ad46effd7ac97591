"""Steps as CUDA graphs: the kernels of a padded step, captured once and replayed.

A step is about a thousand kernels, which a host needs longer to launch than a GPU to run. Steps are
padded to few shapes (`golf_ray.adaptation.shapes`); the first of a shape runs kernel by kernel,
which compiles what it needs, the second is captured, and from then on the host only says which
tokens and rows.

Invariant: a replayed step is the padded step kernel by kernel, and padding reaches no document.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from golf_ray.adaptation.batches import Batch, HostBatch, Shape, send
from golf_ray.adaptation.fused import FusedAdapters
from golf_ray.adaptation.shapes import ShapeChoice

CAPTURE_AFTER = 1
"""Times that a shape runs kernel by kernel before it is captured."""
SHORT_SHARE = 0.15
"""Memory is given back to the driver, which costs more than a step, where less than this is free.
"""

Compute = Callable[[Batch, Tensor], Tensor]
"""(batch, the optimizer's factors) -> losses [S], with the adapters' step taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Graph:
    graph: Any
    wide: Tensor
    narrow: Tensor
    factors: Tensor
    losses_S: Tensor


def _memory_is_short(device: torch.device) -> bool:
    free, total = torch.cuda.mem_get_info(device)
    return free < SHORT_SHARE * total


class StepGraphs:
    """Runs padded steps of one engine.

    Args:
        adapters: that learn.
        compute: losses and the adapters' step.
        device: of the model.
        thrifty: whether a step may be padded further than it needs, to spare a capture.
    """

    def __init__(
        self,
        adapters: FusedAdapters,
        compute: Compute,
        device: torch.device,
        *,
        thrifty: bool = True,
    ) -> None:
        self.shapes = ShapeChoice(adapters.optimizer.adaptation, thrifty=thrifty)
        """Says what a step is to be padded to."""
        self._adapters = adapters
        self._compute = compute
        self._device = device
        self._seen: Counter[Shape] = Counter()
        self._graphs: dict[Shape, _Graph] = {}
        self._pool: Any = None

    def run(self, host: HostBatch, shape: Shape) -> Tensor:
        """Losses of real documents' chunks; the adapters have learned from them.

        Raises:
            torch.OutOfMemoryError: the step does not fit, and nothing of it has happened.
        """
        factors = np.asarray(self._adapters.optimizer.factors(host.rows), dtype=np.float32)
        if self._seen[shape] < CAPTURE_AFTER:
            if self._device.type == "cuda" and _memory_is_short(self._device):
                # What steps of other shapes held would stay beside what this one takes.
                torch.cuda.empty_cache()
            losses_S = self._compute(host.on(self._device), send(factors, self._device))
            self._seen[shape] += 1
        else:
            found = self._graphs.get(shape) or self._captured(host, shape)
            for own, given in (
                (found.wide, host.wide), (found.narrow, host.narrow), (found.factors, factors)
            ):  # fmt: skip
                own.copy_(torch.from_numpy(given).pin_memory(), non_blocking=True)
            found.graph.replay()
            losses_S = found.losses_S
        self._adapters.optimizer.count(host.rows)
        return losses_S[: len(host.loss_places)]

    @property
    def num_captured(self) -> int:
        """Shapes that are replayed."""
        return len(self._graphs)

    def clear(self) -> None:
        """Give up what was captured, and its memory."""
        self.shapes.clear()
        self._graphs.clear()
        self._seen.clear()
        self._pool = None

    def _captured(self, host: HostBatch, shape: Shape) -> _Graph:
        wide = torch.zeros(host.wide.shape, dtype=torch.int64, device=self._device)
        narrow = torch.zeros(host.narrow.shape, dtype=torch.int32, device=self._device)
        factors = torch.zeros(len(host.rows), 2, device=self._device)
        batch = host.over(wide, narrow)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            losses_S = self._compute(batch, factors)
        # Graphs never run at once and leave nothing behind for one another: one pool serves all.
        self._pool = graph.pool()
        self._graphs[shape] = _Graph(
            graph=graph, wide=wide, narrow=narrow, factors=factors, losses_S=losses_S
        )
        self.shapes.captured(shape)
        return self._graphs[shape]
