"""Sliding evaluation: the stored values, the windows, and that no later token is seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from adaptation_cases import changed_borders, changed_tail
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference import TOKENIZER, VAL_SHARDS, arrays, tiny_model
from torch.nn import functional as F

from evaluators.sliding import score_sliding, sliding_windows, window_batches, window_losses
from golf_ray.data.documents import cut_tokens
from golf_ray.data.shards import BOS_ID, load_tokens
from golf_ray.data.tokenizer import byte_tables
from golf_ray.errors import DataError
from golf_ray.metric import Score
from golf_ray.model.segments import Segments
from golf_ray.presets import TINY

Tokens = NDArray[np.uint16]
MODEL = tiny_model()
TOKENS: Tokens = np.array(load_tokens(VAL_SHARDS, 512))
TABLES = byte_tables(TOKENIZER, 512)
EVALUATION = TINY.evaluation


def losses(tokens: Tokens) -> NDArray[np.float32]:
    cut = cut_tokens(tokens, EVALUATION.seq_len)
    batches = window_batches(len(cut) - 1, EVALUATION)
    return torch.cat([window_losses(MODEL, cut, batch) for batch in batches]).numpy()


def test_stored_values() -> None:
    expected = arrays("forward")
    score = score_sliding(MODEL, TOKENS, TABLES, EVALUATION)
    assert score.loss_nats == pytest.approx(float(expected["sliding_loss"]), abs=1e-5)
    assert score.bpb == pytest.approx(float(expected["sliding_bpb"]), abs=1e-5)
    assert score.tokens == expected["sliding_tokens"] == 832
    assert score.num_bytes == expected["packed_bytes"]


@settings(max_examples=200, deadline=None)
@given(data=st.data(), seq_len=st.integers(1, 40), sequences=st.integers(1, 8))
def test_windows_score_every_prediction_once(
    data: st.DataObject, seq_len: int, sequences: int
) -> None:
    stride = data.draw(st.integers(1, seq_len))
    count = seq_len * sequences
    windows = sliding_windows(count, seq_len, stride)
    assert [p for w in windows for p in range(w.score_from, w.end)] == list(range(count))
    assert [w.start for w in windows] == [
        s for s in range(0, count, stride) if s + seq_len - stride < count
    ]
    for window in windows:
        assert window.end == min(window.start + seq_len, count)
        context = window.score_from - window.start
        assert context == (0 if window.start == 0 else seq_len - stride)


def test_batching_is_as_wide_as_packed_evaluation() -> None:
    batches = window_batches(832, EVALUATION)
    assert [len(batch) for batch in batches[:-1]] == [4] * (len(batches) - 1)
    joined = tuple(window for batch in batches for window in batch)
    assert joined == sliding_windows(832, 64, 16)


def test_equals_windows_one_by_one() -> None:
    cut = cut_tokens(TOKENS, 64).astype(np.int64)
    expected = []
    for window in sliding_windows(len(cut) - 1, 64, 16):
        pieces, length = [], 0
        for token in cut[window.start : window.end]:
            if token == BOS_ID and length:
                pieces.append(length)
                length = 0
            length += 1
        x_T = torch.from_numpy(cut[window.start : window.end])
        x_TD = MODEL.hidden(x_T, Segments.of_lengths([*pieces, length]), loop=True)
        y_T = torch.from_numpy(cut[window.start + 1 : window.end + 1])
        values = F.cross_entropy(MODEL.logits(x_TD), y_T, reduction="none")
        expected.append(values[window.score_from - window.start :])
    np.testing.assert_allclose(losses(TOKENS), torch.cat(expected).detach().numpy(), atol=1e-5)


def test_a_long_stride_is_packed_rows_alone() -> None:
    windows = sliding_windows(832, 64, 64)
    assert [(w.start, w.score_from, w.end) for w in windows] == [
        (s, s, s + 64) for s in range(0, 832, 64)
    ]


def test_progress_and_the_same_number_twice() -> None:
    told: list[tuple[int, int, Score]] = []
    score = score_sliding(
        MODEL, TOKENS, TABLES, EVALUATION, progress=lambda *seen: told.append(seen)
    )
    assert [t[0] for t in told] == list(range(1, 14)) and told[-1][1] == 13
    assert told[-1][2].nats == pytest.approx(score.nats)
    assert score_sliding(MODEL, TOKENS, TABLES, EVALUATION) == score


def test_too_few_tokens() -> None:
    with pytest.raises(DataError, match="64 validation tokens"):
        score_sliding(MODEL, TOKENS[:64], TABLES, EVALUATION)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("change", [changed_tail, changed_borders])
def test_no_later_token_reaches_a_score(change: object, seed: int) -> None:
    first = int(np.random.default_rng(seed).integers(2, 820))
    base = losses(TOKENS)
    after = losses(change(TOKENS, first, seed, vocab_size=512))  # type: ignore[operator]
    assert np.array_equal(after[: first - 1], base[: first - 1])
    assert not np.array_equal(after[first - 1 :], base[first - 1 :])


@pytest.mark.parametrize("borders", [False, True])
def test_a_changed_document_reaches_no_other(borders: bool) -> None:
    base = losses(TOKENS)
    starts = np.flatnonzero(TOKENS == BOS_ID)
    for place in range(1, len(starts) - 2, 2):
        start, end = int(starts[place]), int(starts[place + 1])
        changed = changed_tail(TOKENS, start + 1, place, 512, end)
        if borders:
            changed[[start + (end - start) // 3, start + (end - start) // 2]] = BOS_ID
        after = losses(changed)
        assert np.array_equal(after[:start], base[:start])
        assert np.array_equal(after[end:], base[end:])
        assert not np.array_equal(after, base)


def test_a_border_after_a_token_changes_no_bit_before_it() -> None:
    base = losses(TOKENS)
    for first in range(3, 830, 83):
        changed = TOKENS.copy()
        changed[first] = BOS_ID if changed[first] != BOS_ID else 7
        after = losses(changed)
        assert np.array_equal(after[: first - 1], base[: first - 1]), first
        assert not np.array_equal(after, base)
