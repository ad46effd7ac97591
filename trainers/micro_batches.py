"""Micro-batches on the device: forward, backward, and their gradients into the accumulator.

Three ways, all with the same operations: one by one; compiled by torch.compile; or, on a GPU, the
kernels of a whole micro-batch captured as a CUDA graph once and replayed, so that the host has
nothing to do but to hand in tokens. Where segments lie is data; only the number of padded bounds
of `cu_seqlens` is part of a shape, so a run needs a graph for each of the few numbers that occur.

Invariant: gradients and losses of a replayed micro-batch are those of the operations one by one.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from golf_ray.config import KernelConfig
from golf_ray.errors import ConfigError
from golf_ray.kernels.compiling import compiled
from golf_ray.model.model import GolfModel
from golf_ray.model.segments import Segments
from golf_ray.optim.gradients import GradientAccumulator
from trainers.batches import HostBatch, random_batch

SMALL_TOKENS_A_BOUND = 16
"""Of a batch that is there for its number of segments only."""

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, int, bool], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Graph:
    """A captured micro-batch: its inputs and outputs lie where the graph expects them."""

    graph: Any
    x: Tensor
    y: Tensor
    cu_seqlens: Tensor
    loss: Tensor
    norm: Tensor


class MicroBatches:
    """Computes micro-batches.

    Args:
        model: whose parameters get gradients.
        gradients: takes them.
        kernels: whether to compile and to capture.
        device: of the model.
    """

    def __init__(
        self,
        model: GolfModel,
        gradients: GradientAccumulator,
        kernels: KernelConfig,
        device: torch.device,
    ) -> None:
        self._model = model
        self._gradients = gradients
        self._device = device
        self._compiled = kernels.compile
        self._loss: Loss = self._mean_loss
        if kernels.compile:
            self._loss = compiled(self._mean_loss)
        # torch's own kernels for attention and embeddings ask things of the host on their way.
        fused = model.compute.kernels == "triton" and model.compute.attention == "fa3"
        self.captures = kernels.graphs and device.type == "cuda" and fused
        self._graphs: dict[tuple[bool, int], _Graph] = {}
        self._positions: dict[int, Tensor] = {}
        self._pool: Any = None
        self._seen_bounds: set[int] = set()

    def __call__(self, batch: HostBatch, loop: bool) -> None:
        """Add the gradient of one micro-batch.

        A shape that was not there before is captured on the way; kernels must have been compiled
        by `warm_up`.
        """
        self._gradients.start()
        if not self.captures:
            self._gradients.note(*self._gradients.accumulate(self._compute(batch, loop)))
            return
        captured = self._graphs.get((loop, len(batch.cu_seqlens))) or self.capture(batch, loop)
        for own, given in (
            (captured.x, batch.x),
            (captured.y, batch.y),
            (captured.cu_seqlens, batch.cu_seqlens),
        ):
            own.copy_(given, non_blocking=True)
        captured.graph.replay()
        self._gradients.note(captured.loss.clone(), captured.norm.clone())

    def warm_up(self, batch: HostBatch, loop: bool) -> None:
        """Do once, without a graph, all that a micro-batch does: compiling and first launches ask
        things of the host that a capture forbids. What the accumulator holds is lost."""
        with self._aside():
            self._gradients.accumulate(self._compute(batch, loop))

    def capture(self, batch: HostBatch, loop: bool) -> _Graph:
        """Capture a micro-batch of this shape; the accumulator stays as it is."""
        num_bounds = len(batch.cu_seqlens)
        if num_bounds not in self._seen_bounds:
            # Attention has kernels of its own for different numbers of segments: a small batch
            # with as many has them loaded.
            few = self._random(SMALL_TOKENS_A_BOUND * num_bounds, num_bounds, batch.max_seqlen)
            with self._aside():
                self._gradients.differentiate(self._compute(few, loop))
            self._seen_bounds.add(num_bounds)
        x, y, cu_seqlens = (self._moved(t) for t in (batch.x, batch.y, batch.cu_seqlens))
        loss, norm = (torch.zeros((), device=self._device) for _ in range(2))
        positions = self._positions_of(x)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                value = self._loss(x, y, cu_seqlens, positions, batch.max_seqlen, loop)
                found = self._gradients.accumulate(value)
                loss.copy_(found[0])
                norm.copy_(found[1])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            first = str(error).splitlines()[0]
            raise ConfigError(
                f"a micro-batch cannot be captured as a CUDA graph ({first})",
                "a part of model.parts that waits for the GPU? add --set kernels.graphs=false",
            ) from error
        # Graphs never run at once and leave nothing behind for one another: one pool serves all.
        self._pool = graph.pool()
        captured = _Graph(graph=graph, x=x, y=y, cu_seqlens=cu_seqlens, loss=loss, norm=norm)
        self._graphs[loop, num_bounds] = captured
        return captured

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Not on the stream of everything else, which a capture must not wait for."""
        if self._device.type != "cuda":
            yield
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        # That stream's memory is of no use to the graphs, which have a pool of their own.
        torch.cuda.empty_cache()

    def _random(self, num_tokens: int, num_bounds: int, max_seqlen: int) -> HostBatch:
        vocab_size = self._model.config.vocab_size
        batch = random_batch(num_tokens, vocab_size, num_tokens, num_bounds, pinned=True)
        return dataclasses.replace(batch, max_seqlen=max_seqlen)

    def _compute(self, batch: HostBatch, loop: bool) -> Tensor:
        x, y, cu_seqlens = (self._moved(t) for t in (batch.x, batch.y, batch.cu_seqlens))
        if self._compiled:
            # One compiled variant for all numbers of segments.
            torch._dynamo.mark_dynamic(cu_seqlens, 0)
        return self._loss(x, y, cu_seqlens, self._positions_of(x), batch.max_seqlen, loop)

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)

    def _positions_of(self, x_T: Tensor) -> Tensor:
        count = len(x_T)
        if count not in self._positions:
            self._positions[count] = torch.arange(count, device=self._device)
        return self._positions[count]

    def _mean_loss(
        self, x: Tensor, y: Tensor, cu_seqlens: Tensor, positions: Tensor, longest: int, loop: bool
    ) -> Tensor:
        segments = Segments(cu_seqlens=cu_seqlens, max_seqlen=longest, positions_T=positions)
        return self._model.mean_loss(x, y, segments, loop=loop)
