"""Packed evaluation: the stored values, what is scored, and that no later token is seen."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from adaptation_cases import changed_borders, changed_tail
from numpy.typing import NDArray
from reference import TOKENIZER, VAL_SHARDS, arrays, final_state, tiny_model
from torch.nn import functional as F

from evaluators.packed import batch_losses, packed_bounds, score_batch, score_packed
from golf_ray.data.documents import cut_tokens
from golf_ray.data.shards import BOS_ID, load_tokens
from golf_ray.data.tokenizer import byte_tables
from golf_ray.errors import DataError
from golf_ray.metric import Score, total
from golf_ray.model.segments import Segments
from golf_ray.presets import TINY

Tokens = NDArray[np.uint16]
MODEL = tiny_model()
TOKENS: Tokens = np.array(load_tokens(VAL_SHARDS, 512))
TABLES = byte_tables(TOKENIZER, 512)
EVALUATION = TINY.evaluation


def losses(tokens: Tokens) -> NDArray[np.float32]:
    cut = cut_tokens(tokens, EVALUATION.seq_len)
    plan = packed_bounds(len(cut), EVALUATION)
    return torch.cat([batch_losses(MODEL, cut, b, EVALUATION.seq_len) for b in plan]).numpy()


def test_stored_values() -> None:
    expected = arrays("forward")
    score = score_packed(MODEL, TOKENS, TABLES, EVALUATION)
    assert score.loss_nats == pytest.approx(float(expected["packed_loss"]), abs=1e-5)
    assert score.bpb == pytest.approx(float(expected["packed_bpb"]), abs=1e-5)
    assert score.tokens == expected["packed_tokens"] == 832
    assert score.num_bytes == expected["packed_bytes"]


def test_stored_values_without_the_incomplete_batch() -> None:
    expected = arrays("forward")
    cut = cut_tokens(TOKENS, EVALUATION.seq_len)
    whole = [b for b in packed_bounds(len(cut), EVALUATION) if b[1] - b[0] == 256]
    score = total(score_batch(MODEL, cut, b, TABLES, EVALUATION.seq_len) for b in whole)
    assert score.tokens == expected["packed_public_tokens"] == 768
    assert score.loss_nats == pytest.approx(float(expected["packed_public_loss"]), abs=1e-5)
    assert score.bpb == pytest.approx(float(expected["packed_public_bpb"]), abs=1e-5)


def test_stored_values_of_the_artifact() -> None:
    artifact = pytest.importorskip("golf_ray.quantization.artifact")
    expected = arrays("quantized_eval")
    state = artifact.load_artifact(VAL_SHARDS[0].parents[2] / "final_model.int6.ptz", TINY)
    model = tiny_model()
    assert any(not torch.equal(t, final_state()[name]) for name, t in state.items())
    model.load_state_dict(state)
    score = score_packed(model, TOKENS, TABLES, EVALUATION)
    assert score.loss_nats == pytest.approx(float(expected["packed_loss"]), abs=1e-5)
    assert score.bpb == pytest.approx(float(expected["packed_bpb"]), abs=1e-5)
    assert (score.tokens, score.num_bytes) == (
        expected["packed_tokens"], expected["packed_bytes"]
    )  # fmt: skip


def test_batches_cover_the_cut_stream_from_its_first_token() -> None:
    for count in (1, 255, 256, 257, 832):
        plan = packed_bounds(count + 1, EVALUATION)
        assert [p for a, b in plan for p in range(a, b)] == list(range(count))
        assert all(b - a == 256 for a, b in plan[:-1])


def test_equals_segments_one_by_one() -> None:
    cut = cut_tokens(TOKENS, EVALUATION.seq_len).astype(np.int64)
    expected = []
    for start, end in packed_bounds(len(cut), EVALUATION):
        first = start
        while first < end:
            last = first + 1
            while last < end and last - first < EVALUATION.seq_len and cut[last] != BOS_ID:
                last += 1
            x_TD = MODEL.hidden(
                torch.from_numpy(cut[first:last]), Segments.of_lengths([last - first]), loop=True
            )
            y_T = torch.from_numpy(cut[first + 1 : last + 1])
            expected.append(F.cross_entropy(MODEL.logits(x_TD), y_T, reduction="none"))
            first = last
    np.testing.assert_allclose(losses(TOKENS), torch.cat(expected).detach().numpy(), atol=1e-5)


def test_bytes_of_a_batchs_first_token_know_the_token_before() -> None:
    cut = cut_tokens(TOKENS, EVALUATION.seq_len)
    parts = [
        score_batch(MODEL, cut, b, TABLES, EVALUATION.seq_len)
        for b in packed_bounds(len(cut), EVALUATION)
    ]
    assert sum(p.num_bytes for p in parts) == int(TABLES.count(cut[:-1], cut[1:]).sum())


def test_the_batch_size_is_part_of_the_result() -> None:
    larger = dataclasses.replace(EVALUATION, batch_tokens=512)
    base, other = (score_packed(MODEL, TOKENS, TABLES, e) for e in (EVALUATION, larger))
    assert abs(base.nats - other.nats) > 1e-3 and base.tokens == other.tokens


def test_progress_and_the_same_number_twice() -> None:
    told: list[tuple[int, int, Score]] = []
    score = score_packed(
        MODEL, TOKENS, TABLES, EVALUATION, progress=lambda *seen: told.append(seen)
    )
    assert [t[:2] for t in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert told[-1][2].nats == pytest.approx(score.nats)
    assert score_packed(MODEL, TOKENS, TABLES, EVALUATION) == score


def test_too_few_tokens() -> None:
    with pytest.raises(DataError, match="64 validation tokens"):
        score_packed(MODEL, TOKENS[:64], TABLES, EVALUATION)


@pytest.mark.parametrize("seed", range(12))
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
    for place in range(1, len(starts) - 2):
        start, end = int(starts[place]), int(starts[place + 1])
        changed = changed_tail(TOKENS, start + 1, place, 512, end)
        if borders:
            # Two documents more, in the room of one.
            changed[[start + (end - start) // 3, start + (end - start) // 2]] = BOS_ID
        after = losses(changed)
        # The first changed token is a target of the prediction before it.
        assert np.array_equal(after[:start], base[:start])
        assert np.array_equal(after[end:], base[end:])
        assert not np.array_equal(after, base)


def test_a_border_after_a_token_changes_no_bit_before_it() -> None:
    base = losses(TOKENS)
    for first in range(3, 830, 37):
        changed = TOKENS.copy()
        changed[first] = BOS_ID if changed[first] != BOS_ID else 7
        after = losses(changed)
        assert np.array_equal(after[: first - 1], base[: first - 1]), first
        assert not np.array_equal(after, base)
