"""The ranks of one training, and what they say to one another.

One class for one process and for many: with one rank every method is the identity, so the
optimizer is written once. Knows torch.distributed, not Ray. Reductions are means over ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CPU = torch.device("cpu")
Wait = Callable[[], Tensor]

# torch 2.13 renames both and warns of the older names.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def at_once(tensor: Tensor) -> Wait:
    """A result that is there already."""
    return lambda: tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """One rank's view of all ranks."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    control: Any = None
    """Process group over the CPU for host values; None for the default group."""

    @staticmethod
    def current(device: torch.device) -> World:
        """The ranks of the default process group, or one rank where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return World(device=device)
        control = None
        if dist.get_backend() == "nccl":
            # Host values must not wait for the GPU's queue.
            control = dist.new_group(backend="gloo")
        return World(
            rank=dist.get_rank(), size=dist.get_world_size(), device=device, control=control
        )

    def mean(self, tensor: Tensor) -> Wait:
        """Begin to average a tensor over the ranks, in place; the result waits for the end."""
        if self.size == 1:
            return at_once(tensor)
        work = dist.all_reduce(tensor, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return tensor.div_(self.size)

        return wait

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(self, count: int) -> slice:
        """This rank's rows of a bank of `count` matrices; the last ranks' may be fewer or none."""
        per_rank = -(-count // self.size)
        return slice(min(self.rank * per_rank, count), min((self.rank + 1) * per_rank, count))

    def mean_share(self, bank_NRC: Tensor) -> Wait:
        """Begin to average a bank over the ranks; the result is this rank's rows only.

        A reduce-scatter along the first dimension, padded with zeros to a multiple of the ranks.
        """
        if self.size == 1:
            return at_once(bank_NRC)
        padded = self._padded(bank_NRC)
        out = padded.new_empty(padded.shape[0] // self.size, *padded.shape[1:])
        work = _reduce_scatter(out, padded, async_op=True)

        def wait() -> Tensor:
            work.wait()
            mine = self.share(bank_NRC.shape[0])
            return out[: mine.stop - mine.start].div_(self.size)

        return wait

    def gather_shares(self, share_NRC: Tensor, count: int) -> Wait:
        """Begin to put the ranks' shares of a bank of `count` matrices together again."""
        if self.size == 1:
            return at_once(share_NRC)
        per_rank = -(-count // self.size)
        mine = share_NRC.new_zeros(per_rank, *share_NRC.shape[1:])
        mine[: share_NRC.shape[0]] = share_NRC
        out = share_NRC.new_empty(per_rank * self.size, *share_NRC.shape[1:])
        work = _all_gather(out, mine, async_op=True)

        def wait() -> Tensor:
            work.wait()
            return out[:count]

        return wait

    def from_rank_0(self, value: float) -> float:
        """Rank 0's value on every rank, without waiting for the device."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64)
        if self.control is None and self.device.type != "cpu":
            tensor = tensor.to(self.device)
        dist.broadcast(tensor, 0, group=self.control)
        return float(tensor.item())

    def _padded(self, bank_NRC: Tensor) -> Tensor:
        count = bank_NRC.shape[0]
        per_rank = -(-count // self.size)
        if per_rank * self.size == count:
            return bank_NRC.contiguous()
        padded = bank_NRC.new_zeros(per_rank * self.size, *bank_NRC.shape[1:])
        padded[:count] = bank_NRC
        return padded
