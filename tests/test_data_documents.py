"""Documents: bounds, samples and the even cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golf_ray.data.documents import cut_tokens, document_bounds, sample_documents
from golf_ray.data.shards import open_shard
from golf_ray.errors import DataError

TINY = Path(__file__).parent / "data" / "tiny"
VAL = TINY / "datasets" / "fineweb10B_sp512" / "fineweb_val_000000.bin"


def test_bounds_include_the_next_bos() -> None:
    tokens = np.array([8, 9, 1, 5, 6, 1, 1, 7], dtype=np.uint16)
    assert document_bounds(tokens).tolist() == [[2, 6], [5, 7], [6, 8]]
    assert document_bounds(np.array([1])).tolist() == [[0, 1]]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from([1, 5, 6, 7]), max_size=100))
def test_every_prediction_after_the_first_bos_is_made_once(rest: list[int]) -> None:
    tokens = np.array([1, *rest])
    bounds = document_bounds(tokens)
    assert bounds.dtype == np.int64 and len(bounds) == int(np.sum(tokens == 1))
    assert int(np.sum(bounds[:, 1] - bounds[:, 0] - 1)) == len(tokens) - 1
    assert all(tokens[start] == 1 for start, _ in bounds)
    targets = np.concatenate([np.arange(s + 1, e) for s, e in bounds])
    assert targets.tolist() == list(range(1, len(tokens)))


def test_tiny_validation_has_882_predictions() -> None:
    tokens = open_shard(VAL, 512)
    bounds = document_bounds(tokens)
    assert int(np.sum(bounds[:, 1] - bounds[:, 0] - 1)) == 882
    stored = np.load(TINY / "ttt.npz")
    lengths = [len(stored[f"doc{i}_nll"]) for i in range(len(bounds))]
    assert (bounds[:, 1] - bounds[:, 0] - 1).tolist() == lengths
    assert len(cut_tokens(tokens, 64)) == 832 + 1


def test_no_document_is_an_error() -> None:
    for tokens in (np.array([2, 3, 4]), np.zeros(0, dtype=np.uint16)):
        with pytest.raises(DataError, match="no document"):
            document_bounds(tokens)


@settings(deadline=None, max_examples=100)
@given(
    num=st.integers(1, 500),
    fraction=st.floats(0.001, 1.0),
    seed=st.integers(0, 2**31),
    stratified=st.booleans(),
)
def test_samples(num: int, fraction: float, seed: int, stratified: bool) -> None:
    lengths = (np.arange(num) * 7919) % 101 if stratified else None
    chosen = sample_documents(num, fraction, seed, lengths)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert 0 <= chosen[0] and chosen[-1] < num
    assert len(chosen) == (num if fraction == 1 else max(1, round(num * fraction)))
    assert chosen.tolist() == sample_documents(num, fraction, seed, lengths).tolist()


def test_samples_change_with_the_seed_and_reach_all_documents() -> None:
    drawn = [sample_documents(1000, 0.1, seed).tolist() for seed in range(60)]
    assert len({tuple(d) for d in drawn}) == 60
    assert len(set().union(*drawn)) > 950


def test_stratified_samples_hold_their_share_of_long_documents() -> None:
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(6, 1.2, 5000)).astype(np.int64)
    shares = [
        lengths[sample_documents(5000, 0.02, seed, lengths)].mean() / lengths.mean()
        for seed in range(20)
    ]
    plain = [lengths[sample_documents(5000, 0.02, s)].mean() / lengths.mean() for s in range(20)]
    assert np.std(shares) < 0.5 * np.std(plain)
    assert abs(np.mean(shares) - 1) < 0.05


def test_cut_tokens() -> None:
    for size, kept in ((5, 5), (8, 5), (9, 9), (10, 9)):
        assert cut_tokens(np.arange(size), 4).tolist() == list(range(kept))
    for size in (0, 1, 4):
        with pytest.raises(DataError, match="fewer than the 5"):
            cut_tokens(np.arange(size), 4)
