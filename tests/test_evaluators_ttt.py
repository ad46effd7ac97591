"""Test-time training evaluation: the stored values, independence, samples and errors."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from adaptation_cases import changed_tail
from numpy.typing import NDArray
from reference import FOLDER, TOKENIZER, VAL_SHARDS, arrays, tiny_model

from evaluators.ttt import choose_documents, score_documents, total_of
from golf_ray.adaptation.adapters import adapter_slots, read_adapter_init
from golf_ray.adaptation.scores import Document, DocumentScore
from golf_ray.config import AdaptationConfig
from golf_ray.data.shards import BOS_ID, load_tokens
from golf_ray.data.tokenizer import byte_tables
from golf_ray.errors import DataError
from golf_ray.metric import Score
from golf_ray.presets import TINY

Tokens = NDArray[np.uint16]
MODEL = tiny_model()
TOKENS: Tokens = np.array(load_tokens(VAL_SHARDS, 512))
TABLES = byte_tables(TOKENIZER, 512)
ADAPTATION = TINY.adaptation


def score(
    adaptation: AdaptationConfig = ADAPTATION,
    tokens: Tokens = TOKENS,
    documents: tuple[Document, ...] | None = None,
) -> tuple[DocumentScore, ...]:
    return score_documents(
        MODEL, tokens, TABLES, adaptation, documents=documents, keep_token_nats=True
    )


@pytest.fixture(scope="module")
def base() -> tuple[DocumentScore, ...]:
    return score()


@pytest.mark.parametrize("group_size", [4, 64])
def test_stored_values(group_size: int) -> None:
    expected = arrays("ttt")
    adaptation = dataclasses.replace(ADAPTATION, group_documents=group_size)
    init = read_adapter_init(FOLDER / "ttt.npz", adapter_slots(TINY.model), ADAPTATION.rank)
    scores = score_documents(
        MODEL, TOKENS, TABLES, adaptation, adapter_init=init, keep_token_nats=True
    )
    assert [s.index for s in scores] == list(range(14))
    for document in scores:
        nll = expected[f"doc{document.index}_nll"]
        assert document.token_nats is not None
        np.testing.assert_allclose(document.token_nats, nll, rtol=0, atol=2e-5)
    whole = total_of(scores)
    assert whole.loss_nats == pytest.approx(float(expected["val_loss"]), abs=1e-6)
    assert whole.bpb == pytest.approx(float(expected["val_bpb"]), abs=1e-6)
    assert (whole.tokens, whole.num_bytes) == (882, 1596)


def test_documents_are_those_of_the_stored_values() -> None:
    expected = arrays("ttt")
    documents = choose_documents(TOKENS, ADAPTATION)
    assert [d.start for d in documents] == expected["doc_start"].tolist()
    assert [d.end - d.start for d in documents] == expected["doc_len"].tolist()
    assert [d.index for d in documents] == list(range(14))


def test_the_same_number_twice_and_in_any_order(base: tuple[DocumentScore, ...]) -> None:
    documents = choose_documents(TOKENS, ADAPTATION)
    shuffled = tuple(documents[i] for i in np.random.default_rng(3).permutation(14))
    for again in (score(), score(documents=shuffled)):
        assert [s.nats for s in again] == [s.nats for s in base]
        assert total_of(again) == total_of(base) == total_of(tuple(reversed(again)))


@pytest.mark.parametrize("group_size", [1, 3, 64])
def test_packing_has_no_effect(group_size: int, base: tuple[DocumentScore, ...]) -> None:
    other = score(dataclasses.replace(ADAPTATION, group_documents=group_size))
    for a, b in zip(base, other, strict=True):
        assert a.index == b.index and a.nats == pytest.approx(b.nats, abs=1e-6 * a.tokens)
    assert total_of(other).loss_nats == pytest.approx(total_of(base).loss_nats, abs=1e-7)


def test_the_chunk_size_is_felt(base: tuple[DocumentScore, ...]) -> None:
    other = score(dataclasses.replace(ADAPTATION, chunk_size=32))
    assert abs(total_of(other).bpb - total_of(base).bpb) > 1e-6


def test_a_sample_is_stratified_and_scores_as_in_the_whole(
    base: tuple[DocumentScore, ...],
) -> None:
    adaptation = dataclasses.replace(ADAPTATION, document_fraction=0.3)
    some = score(adaptation)
    assert len(some) == 4 and [s.index for s in some] == sorted({s.index for s in some})
    by_length = sorted(base, key=lambda s: s.tokens)
    places = sorted(by_length.index(base[s.index]) for s in some)
    assert all(b - a >= 2 for a, b in itertools.pairwise(places))
    for document in some:
        reference = base[document.index]
        assert document.nats == pytest.approx(reference.nats, abs=1e-6 * document.tokens)


def test_no_later_token_and_no_neighbour_reaches_a_score(base: tuple[DocumentScore, ...]) -> None:
    for first in (75, 420, 700, 870):
        after = score(tokens=changed_tail(TOKENS, first, first, vocab_size=512))
        for document, a, b in zip(choose_documents(TOKENS, ADAPTATION), base, after, strict=True):
            assert a.token_nats is not None and b.token_nats is not None
            kept = max(0, first - document.start - 1)
            assert np.array_equal(a.token_nats[:kept], b.token_nats[:kept])
            if kept < document.num_predictions:
                assert not np.array_equal(a.token_nats, b.token_nats)
    documents = choose_documents(TOKENS, ADAPTATION)
    for document in documents[3::5]:
        changed = changed_tail(TOKENS, document.start + 1, 0, 512, document.end)
        for a, b in zip(base, score(tokens=changed), strict=True):
            assert (a.nats == b.nats) == (a.index != document.index)


def test_progress() -> None:
    told: list[tuple[int, int, Score]] = []
    scores = score_documents(
        MODEL, TOKENS[:100], TABLES, ADAPTATION, progress=lambda *seen: told.append(seen)
    )
    assert [t[:2] for t in told] == [(i, 6) for i in range(1, 7)]
    assert told[-1][2].nats == pytest.approx(total_of(scores).nats)
    assert all(s.token_nats is None for s in scores)


def test_an_empty_document_set() -> None:
    with pytest.raises(DataError, match="no document"):
        score(tokens=TOKENS[1:9])
    with pytest.raises(DataError, match="0 documents hold no prediction"):
        score(documents=())
    with pytest.raises(DataError, match="1 documents hold no prediction"):
        score(tokens=np.array([BOS_ID], dtype=np.uint16))
