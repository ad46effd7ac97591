"""Calibration plans: one plan for the run, windows without repetition, any number of workers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golf_ray.data.calibration import calibration_plan
from golf_ray.errors import DataError


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=6),
    seq_len=st.integers(1, 32),
    rows=st.integers(1, 4),
    batches=st.integers(1, 12),
    seed=st.integers(0, 2**40),
)
def test_windows_are_whole_and_not_repeated_in_a_round(
    lengths: list[int], seq_len: int, rows: int, batches: int, seed: int
) -> None:
    if max(lengths) < seq_len:
        with pytest.raises(DataError):
            calibration_plan(
                lengths, num_batches=batches, rows_per_batch=rows, seq_len=seq_len, seed=seed
            )
        return
    plan = calibration_plan(
        lengths, num_batches=batches, rows_per_batch=rows, seq_len=seq_len, seed=seed
    )
    assert plan.shard_BR.shape == plan.start_BR.shape == (batches, rows)
    shard, start = plan.shard_BR.ravel(), plan.start_BR.ravel()
    assert start.min() >= 0
    assert np.all(start + seq_len <= np.array(lengths)[shard])
    # With at most one round's windows (phases may cost one window a shard) none overlaps another.
    least = sum(max((n - seq_len + 1) // seq_len, n >= seq_len) for n in lengths)
    if batches * rows <= least:
        for index in set(shard.tolist()):
            starts = np.sort(start[shard == index])
            assert np.all(np.diff(starts) >= seq_len)
            assert len(set((starts % seq_len).tolist())) == 1


def test_a_plan_is_dealt_out_whole_to_any_number_of_workers() -> None:
    shards = [np.arange(1000, dtype=np.uint16), np.arange(1000, 1500, dtype=np.uint16)]
    lengths = [len(s) for s in shards]

    def plan_again() -> dict[int, list[list[int]]]:
        plan = calibration_plan(lengths, num_batches=10, rows_per_batch=3, seq_len=16, seed=5)
        return {i: plan.batch(i, shards).tolist() for i in range(10)}

    whole = plan_again()
    for world in (1, 2, 3, 4, 8, 11):
        dealt: dict[int, list[list[int]]] = {}
        for rank in range(world):
            plan = calibration_plan(lengths, num_batches=10, rows_per_batch=3, seq_len=16, seed=5)
            for i in plan.assigned(rank, world):
                assert i not in dealt
                dealt[i] = plan.batch(i, shards).tolist()
        assert dealt == whole


def test_batches_hold_the_tokens_of_their_windows() -> None:
    shards = [np.arange(300, dtype=np.uint16), np.arange(1000, 1200, dtype=np.uint16)]
    plan = calibration_plan([300, 200], num_batches=3, rows_per_batch=4, seq_len=8, seed=1)
    for i in range(3):
        batch = plan.batch(i, shards)
        assert batch.dtype == np.int64 and batch.shape == (4, 8)
        for row, shard, start in zip(batch, plan.shard_BR[i], plan.start_BR[i], strict=True):
            assert row.tolist() == shards[shard][start : start + 8].tolist()


def test_shards_are_taken_in_proportion_to_what_they_have() -> None:
    counts = np.zeros(2)
    for seed in range(200):
        plan = calibration_plan([900, 300], num_batches=10, rows_per_batch=2, seq_len=10, seed=seed)
        counts += np.bincount(plan.shard_BR.ravel(), minlength=2)
    assert 0.72 < counts[0] / counts.sum() < 0.78
    # Exhausting draw: all windows of all shards come exactly once.
    plan = calibration_plan([90, 30], num_batches=12, rows_per_batch=1, seq_len=10, seed=3)
    assert len({*zip(plan.shard_BR.ravel(), plan.start_BR.ravel(), strict=True)}) >= 10


def test_more_windows_than_there_are_start_a_round_with_new_phases() -> None:
    plan = calibration_plan([100], num_batches=40, rows_per_batch=1, seq_len=10, seed=0)
    phases = set((plan.start_BR.ravel() % 10).tolist())
    assert len(phases) > 1
    # One window only, used again and again: a tiny data set works.
    plan = calibration_plan([10], num_batches=3, rows_per_batch=2, seq_len=10, seed=0)
    assert plan.start_BR.tolist() == [[0, 0]] * 3


def test_seeds_differ_and_long_shards_are_quick() -> None:
    lengths = [100_000_000] * 80
    a, b = (
        calibration_plan(lengths, num_batches=64, rows_per_batch=32, seq_len=2048, seed=seed)
        for seed in (1, 2)
    )
    assert not np.array_equal(a.start_BR, b.start_BR)
    assert len(set(zip(a.shard_BR.ravel(), a.start_BR.ravel(), strict=True))) == 64 * 32


def test_no_window_at_all_is_an_error() -> None:
    for lengths in ([], [0], [9, 5]):
        with pytest.raises(DataError, match="10 tokens of one calibration window"):
            calibration_plan(lengths, num_batches=1, rows_per_batch=1, seq_len=10, seed=0)
