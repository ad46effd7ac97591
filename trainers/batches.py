"""Micro-batches on their way to the device: tensors, pinned for a GPU, made ahead in a thread.

Invariant: `state_dict` is the loader's position after the last micro-batch that was handed out,
whatever has been made beyond it.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from golf_ray.data.loader import PackedLoader
from golf_ray.data.packing import PackedBatch, pack
from golf_ray.data.shards import BOS_ID


@dataclass(frozen=True, kw_only=True, slots=True)
class HostBatch:
    """One micro-batch in host memory."""

    x: Tensor
    """int64 [n] input ids."""
    y: Tensor
    """int64 [n] target ids."""
    cu_seqlens: Tensor
    """int32 [m] segment bounds, padded with n."""
    max_seqlen: int

    @staticmethod
    def of(batch: PackedBatch, *, pinned: bool) -> HostBatch:
        """Tensors of a packed batch; pinned ones can travel while the host goes on."""
        tensors = [torch.from_numpy(a) for a in (batch.x, batch.y, batch.cu_seqlens)]
        if pinned:
            tensors = [t.pin_memory() for t in tensors]
        x, y, cu_seqlens = tensors
        return HostBatch(x=x, y=y, cu_seqlens=cu_seqlens, max_seqlen=batch.max_seqlen)


def random_batch(
    num_tokens: int, vocab_size: int, seq_len: int, num_bounds: int, *, pinned: bool, seed: int = 0
) -> HostBatch:
    """A micro-batch of random tokens whose segments have a given number of padded bounds: what
    compilation is warmed up with, because nothing real may be seen before its time.

    Args:
        num_bounds: entries of `cu_seqlens`, as many as `num_tokens` and `seq_len` allow.
    """
    rng = np.random.default_rng(seed)
    ids = rng.integers(BOS_ID + 1, vocab_size, num_tokens + 1)
    # Documents of one length, so many that padding brings their bounds to the number asked for.
    documents = max(1, min(num_bounds - 1, num_tokens))
    ids[np.linspace(0, num_tokens, documents, endpoint=False).astype(int)] = BOS_ID
    return HostBatch.of(pack(ids, seq_len), pinned=pinned)


class HostBatches:
    """Hands out the loader's micro-batches, the next one made while one is used.

    Args:
        loader: it belongs to this object from now on, and is closed with it.
        pinned: for a GPU.
    """

    def __init__(self, loader: PackedLoader, *, pinned: bool) -> None:
        self._loader = loader
        self._pinned = pinned
        self._state = loader.state_dict()
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="golf-ray-batches")
        self._next: Future[tuple[HostBatch, dict[str, Any]]] | None = None

    def next(self) -> HostBatch:
        """The next micro-batch.

        Raises:
            DataError: a shard that was opened in the background is wrong.
        """
        batch, self._state = self._coming().result()
        self._next = self._pool.submit(self._make)
        return batch

    def peek(self) -> HostBatch:
        """The micro-batch that `next` will hand out."""
        return self._coming().result()[0]

    def _coming(self) -> Future[tuple[HostBatch, dict[str, Any]]]:
        if self._next is None:
            self._next = self._pool.submit(self._make)
        return self._next

    def state_dict(self) -> dict[str, Any]:
        """The position after the last micro-batch that was handed out."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position.

        Raises:
            DataError: the shards are not those of the state.
        """
        if self._next is not None:
            wait([self._next])
            self._next = None
        self._loader.load_state_dict(state)
        self._state = self._loader.state_dict()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        with contextlib.suppress(RuntimeError):
            self._loader.close()

    def _make(self) -> tuple[HostBatch, dict[str, Any]]:
        batch = HostBatch.of(self._loader.next_batch(), pinned=self._pinned)
        return batch, self._loader.state_dict()
