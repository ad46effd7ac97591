"""Training batches in the order of the shards: no shuffling, any number of ranks.

`group` micro-batches of n + 1 ids each are read together at a cursor: micro-batch j begins at
cursor + j * (n + 1), and the cursor then moves by group * (n + 1). Of `world` ranks, a rank takes
the micro-batches j with j % world == rank. The cursor starts at a shard's first BOS; where fewer
ids than a group needs are left, the rest is dropped and the next shard opens, wrapping round.

The public program's form is group == world. With group == micro-batches of a step, as training
here uses it, the batches of a step do not depend on the number of ranks.

Invariant: `state_dict` describes the position after the last batch that was returned, whatever has
been prepared beyond it, and a loader that loads it returns the very batches that would have come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from golf_ray.data.packing import PackedBatch, pack
from golf_ray.data.shards import BOS_ID, CHECK_TOKENS, Tokens, open_shard, read_count
from golf_ray.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class _Position:
    """Where the next batch lies: `taken` counts the group's micro-batches over all ranks."""

    shard: int
    cursor: int
    taken: int


class PackedLoader:
    """Reads, packs and prefetches the micro-batches of one rank.

    The next batch is prepared while the current one is used, and the next shard is opened, checked
    and so read into the page cache while the current one is read. Close it, or use it as a context
    manager, to end its threads.

    Args:
        paths: shards in their order.
        vocab_size: ids at or above it are an error.
        micro_batch_tokens: n, the inputs of one micro-batch of one rank.
        seq_len: longest segment in tokens.
        group: micro-batches read together, a multiple of `world`.

    Raises:
        DataError: a shard is wrong or cannot hold one group. All headers are read at
            once; a wrong id in a later shard comes out of `next_batch`.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        vocab_size: int,
        micro_batch_tokens: int,
        seq_len: int,
        rank: int = 0,
        world: int = 1,
        group: int = 1,
        bos_id: int = BOS_ID,
    ) -> None:
        assert paths and micro_batch_tokens > 0 and seq_len > 0
        assert 0 <= rank < world and group % world == 0
        self._paths = tuple(Path(path) for path in paths)
        self._vocab_size = vocab_size
        self._stride = micro_batch_tokens + 1
        self._seq_len = seq_len
        self._rank, self._world, self._group = rank, world, group
        self._bos_id = bos_id
        # A later shard that is too small would end a training after hours: look at all headers.
        for path in self._paths:
            self._require_group(path, read_count(path))
        self._open: dict[int, Future[tuple[Tokens, int]]] = {}
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="golf-ray-loader")
        self._closed = False
        try:
            _, first_bos = self._shard(0)
        except BaseException:
            self.close()
            raise
        self._position = _Position(shard=0, cursor=first_bos, taken=0)
        self._next = self._pool.submit(self._read, self._position)

    def next_batch(self) -> PackedBatch:
        """This rank's next micro-batch.

        Raises:
            DataError: a shard that was opened in the background is wrong.
        """
        assert not self._closed, "the loader is closed"
        batch, self._position = self._next.result()
        self._next = self._pool.submit(self._read, self._position)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position after the last returned batch, fit for JSON.

        It is the same for every rank after the same number of batches, and at a group's end fit
        for any other number of ranks.
        """
        return {
            "shard": self._position.shard,
            "shard_name": self._paths[self._position.shard].name,
            "cursor": self._position.cursor,
            "taken": self._position.taken,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            DataError: the shards are not those of the state.
        """
        assert not self._closed, "the loader is closed"
        shard, name = int(state["shard"]), str(state["shard_name"])
        names = [path.name for path in self._paths]
        if shard >= len(names) or names[shard] != name:
            raise DataError(
                f"the saved position is in shard {shard}, {name}, but there are {len(names)} "
                f"shards from {names[0]}",
                "resume with the data that the run began with",
            )
        position = _Position(shard=shard, cursor=int(state["cursor"]), taken=int(state["taken"]))
        if position.taken % self._world != 0:
            raise DataError(
                f"the saved position is {position.taken} micro-batches into a step, which "
                f"{self._world} workers do not divide",
                "resume with the number of workers that the run began with",
            )
        wait([self._next])
        tokens, _ = self._shard(shard)
        if not 0 <= position.cursor <= len(tokens):
            raise DataError(
                f"the saved position {position.cursor} is outside of {self._paths[shard]}, "
                f"which has {len(tokens)} tokens",
                "resume with the data that the run began with",
            )
        self._position = position
        self._next = self._pool.submit(self._read, position)

    def close(self) -> None:
        """End the threads; no batch comes after it. May be called twice."""
        self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._open.clear()

    def __enter__(self) -> PackedLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self, position: _Position) -> tuple[PackedBatch, _Position]:
        """The batch at a position and the position after it. Runs in the background."""
        tokens, _ = self._shard(position.shard)
        group_ids = self._group * self._stride
        if position.taken == 0 and len(tokens) - position.cursor < group_ids:
            following = (position.shard + 1) % len(self._paths)
            tokens, first_bos = self._shard(following)
            position = _Position(shard=following, cursor=first_bos, taken=0)
        start = position.cursor + (position.taken + self._rank) * self._stride
        batch = pack(tokens[start : start + self._stride], self._seq_len, self._bos_id)
        taken = position.taken + self._world
        if taken == self._group:
            return batch, replace(position, cursor=position.cursor + group_ids, taken=0)
        return batch, replace(position, taken=taken)

    def _shard(self, index: int) -> tuple[Tokens, int]:
        """Tokens and first BOS of a shard; the one after it is opened in the background."""
        following = (index + 1) % len(self._paths)
        kept = {i: self._open[i] for i in (index, following) if i in self._open}
        if index not in kept:
            opened: Future[tuple[Tokens, int]] = Future()
            opened.set_result(self._open_shard(index))
            kept[index] = opened
        if following not in kept and not self._closed:
            kept[following] = self._pool.submit(self._open_shard, following)
        self._open = kept
        return kept[index].result()

    def _open_shard(self, index: int) -> tuple[Tokens, int]:
        path = self._paths[index]
        tokens = open_shard(path, self._vocab_size)
        for start in range(0, len(tokens), CHECK_TOKENS):
            found = np.flatnonzero(tokens[start : start + CHECK_TOKENS] == self._bos_id)
            if len(found):
                first_bos = start + int(found[0])
                break
        else:
            raise DataError(
                f"shard {path} holds no document: none of its {len(tokens)} tokens is "
                f"BOS = {self._bos_id}",
                "use shards in which every document starts with BOS",
            )
        self._require_group(path, len(tokens) - first_bos)
        return tokens, first_bos

    def _require_group(self, path: Path, num_tokens: int) -> None:
        needed = self._group * self._stride
        if num_tokens < needed:
            raise DataError(
                f"shard {path} has {num_tokens} tokens from its first document on, but one step "
                f"reads {needed}",
                "lower train.batch_tokens, remove the shard, or use more text",
            )
