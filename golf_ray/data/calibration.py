"""The plan of calibration windows: which tokens the quantiser's Hessians are made of.

Every shard is cut into windows of `seq_len` tokens at a random phase; windows cross documents.
Windows are drawn without replacement, the shard in proportion to the windows that it has left,
which is a uniform draw from all windows that are left. Where a data set has too few, a further
round begins with new phases and all windows.

Invariant: a plan follows from the shards' lengths, the sizes asked for and the seed. Workers take
batches `rank, rank + world, ...` of the one plan, so the Hessians do not depend on their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from golf_ray.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationPlan:
    """Where each row of each calibration batch begins."""

    shard_BR: NDArray[np.int64]
    """[num_batches, rows] index of the shard."""
    start_BR: NDArray[np.int64]
    """[num_batches, rows] first token within the shard."""
    seq_len: int
    """Tokens of a row."""

    @property
    def num_batches(self) -> int:
        """Batches of the whole plan, over all workers."""
        return len(self.shard_BR)

    def assigned(self, rank: int, world: int) -> range:
        """The batches that one of `world` workers takes."""
        return range(rank, self.num_batches, world)

    def batch(self, i: int, shards: Sequence[NDArray[np.integer]]) -> NDArray[np.int64]:
        """Token ids of one batch.

        Args:
            shards: the token arrays in the order of the plan's lengths.

        Returns:
            int64 [rows, seq_len].
        """
        rows = [
            shards[shard][start : start + self.seq_len]
            for shard, start in zip(self.shard_BR[i], self.start_BR[i], strict=True)
        ]
        return np.stack(rows).astype(np.int64)


def calibration_plan(
    shard_lengths: Sequence[int],
    *,
    num_batches: int,
    rows_per_batch: int,
    seq_len: int,
    seed: int,
) -> CalibrationPlan:
    """Draw the windows of a whole calibration.

    Args:
        shard_lengths: tokens of each shard.

    Raises:
        DataError: no shard holds a single window.
    """
    assert num_batches > 0 and rows_per_batch > 0 and seq_len > 0
    lengths = np.asarray(shard_lengths, dtype=np.int64)
    if not np.any(lengths >= seq_len):
        raise DataError(
            f"no training shard holds the {seq_len} tokens of one calibration window "
            f"(the longest has {int(lengths.max(initial=0))})",
            "use more training text or a smaller data.seq_len",
        )
    generator = np.random.Generator(np.random.Philox(seed))
    wanted = num_batches * rows_per_batch
    rounds: list[NDArray[np.int64]] = []
    while wanted > 0:
        rounds.append(_draw_round(lengths, wanted, seq_len, generator))
        wanted -= len(rounds[-1])
    windows = np.concatenate(rounds)
    shape = (num_batches, rows_per_batch)
    return CalibrationPlan(
        shard_BR=windows[:, 0].reshape(shape),
        start_BR=windows[:, 1].reshape(shape),
        seq_len=seq_len,
    )


def _draw_round(
    lengths: NDArray[np.int64], wanted: int, seq_len: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """At most `wanted` windows [k, 2] (shard, start), no two of which share a token."""
    # The phase leaves at least one window to every shard that can hold one.
    phases = generator.integers(0, np.clip(lengths - seq_len + 1, 1, seq_len))
    windows = np.maximum(lengths - phases, 0) // seq_len
    ends = np.cumsum(windows)
    total = int(ends[-1])
    chosen = generator.choice(total, size=min(wanted, total), replace=False, shuffle=True)
    shard = np.searchsorted(ends, chosen, side="right")
    start = phases[shard] + (chosen - (ends - windows)[shard]) * seq_len
    return np.stack((shard, start), axis=1).astype(np.int64)
