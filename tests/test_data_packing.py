"""Packing: the stored batches, and what holds of segment bounds for any tokens."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golf_ray.data.packing import pack, pad_bounds, segment_bounds

TINY = Path(__file__).parent / "data" / "tiny"


def bounds_one_by_one(tokens: list[int], seq_len: int) -> list[int]:
    """The rule read aloud: a counter that a BOS and `seq_len` tokens reset."""
    bounds, since = [0], 0
    for position, token in enumerate(tokens):
        if position and (token == 1 or since == seq_len):
            bounds.append(position)
            since = 0
        since += 1
    return [*bounds, len(tokens)]


@settings(deadline=None, max_examples=200)
@given(
    tokens=st.lists(st.sampled_from([1, 1, 5, 6, 7, 8, 9]), min_size=1, max_size=200),
    seq_len=st.integers(1, 40),
)
def test_bounds_follow_the_rule(tokens: list[int], seq_len: int) -> None:
    bounds = segment_bounds(np.array(tokens, dtype=np.uint16), seq_len)
    assert bounds.dtype == np.int32
    assert bounds.tolist() == bounds_one_by_one(tokens, seq_len)
    lengths = np.diff(bounds)
    assert lengths.min() >= 1 and lengths.max() <= seq_len
    for start, end in itertools.pairwise(bounds.tolist()):
        assert 1 not in tokens[start + 1 : end]


@settings(deadline=None, max_examples=50)
@given(size=st.integers(2, 200), total=st.integers(200, 10_000), multiple=st.integers(1, 70))
def test_padding(size: int, total: int, multiple: int) -> None:
    bounds = np.arange(size, dtype=np.int32)
    padded = pad_bounds(bounds, total, multiple)
    assert padded.dtype == np.int32
    assert len(padded) % multiple == 0 and size <= len(padded) < size + multiple
    assert padded[:size].tolist() == bounds.tolist()
    assert np.all(padded[size:] == total)


def test_other_bos_and_one_segment() -> None:
    tokens = np.array([1, 9, 1, 9])
    assert segment_bounds(tokens, 10, bos_id=9).tolist() == [0, 1, 3, 4]
    assert segment_bounds(np.full(5, 7), 5).tolist() == [0, 5]


@pytest.mark.parametrize("number", range(10))
def test_pack_gives_the_stored_batches(number: int) -> None:
    stored = np.load(TINY / "training.npz")
    x, y = stored[f"batch{number}_x"], stored[f"batch{number}_y"]
    batch = pack(np.append(x, y[-1]), 64)
    assert batch.x.dtype == batch.y.dtype == np.int64
    np.testing.assert_array_equal(batch.x, x)
    np.testing.assert_array_equal(batch.y, y)
    np.testing.assert_array_equal(batch.cu_seqlens, stored[f"batch{number}_cu"])
    assert batch.cu_seqlens.dtype == np.int32
    assert batch.max_seqlen == int(stored[f"batch{number}_max_seqlen"])


def test_a_training_batch_is_packed_in_milliseconds() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 8192, 98_305).astype(np.uint16)
    tokens[rng.integers(0, 98_305, 120)] = 1
    pack(tokens, 2048)
    # The processor's time, which does not depend on what else runs.
    begin = time.process_time()
    for _ in range(10):
        pack(tokens, 2048)
    assert (time.process_time() - begin) / 10 < 0.05
