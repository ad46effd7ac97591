"""The ledger: what is scored is kept to the bit, and nothing wrong is counted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adaptation_cases import ADAPTATION, TABLES, documents_of, small_model, stream
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluators.ledger import Ledger, digest_of, missing
from evaluators.ttt import score_documents, total_of
from golf_ray.adaptation.scores import ChunkEvent, DocumentScore
from golf_ray.errors import StorageError, UsageError

IDENTITY = {"weights": "a" * 16, "adaptation": {"chunk_size": 32, "sites": ("q", "k")}}
TOKENS = stream([9, 1, 23, 2, 12, 5, 14])
MODEL = small_model()


def made(index: int, nats: float = 1.5, losses: Any = None) -> DocumentScore:
    events = tuple(ChunkEvent(chunk=c, scored_at=2 * c, updated_at=2 * c + 1) for c in range(2))
    last = ChunkEvent(chunk=2, scored_at=4, updated_at=None)
    return DocumentScore(
        index=index, nats=nats, tokens=3, num_bytes=7, trace=(*events, last), token_nats=losses
    )


def segments(folder: Path) -> list[Path]:
    return sorted((folder / "segments").glob("*.jsonl"))


finite = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=30, deadline=None)
@given(nats=st.lists(finite, min_size=1, max_size=6), cut=st.integers(1, 3), seed=st.integers(0, 9))
def test_what_is_kept_comes_back_to_the_bit(
    nats: list[float], cut: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("ledger")
    losses = np.random.default_rng(seed).normal(size=3).astype(np.float32)
    scores = [made(i, value, losses if i % 2 else None) for i, value in enumerate(nats)]
    ledger = Ledger(str(folder), IDENTITY)
    for begin in range(0, len(scores), cut):
        ledger.add(scores[begin : begin + cut])
    again = Ledger(str(folder), IDENTITY)
    assert again.troubles == [] and sorted(again.scores) == list(range(len(scores)))
    for score in scores:
        found = again.scores[score.index]
        assert dataclasses.replace(found, token_nats=None) == dataclasses.replace(
            score, token_nats=None
        )
        if score.token_nats is None:
            assert found.token_nats is None
        else:
            assert found.token_nats is not None
            assert found.token_nats.tobytes() == score.token_nats.tobytes()


def test_a_document_counts_once_and_the_first_time(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path), IDENTITY)
    ledger.add([made(3, 1.0)])
    ledger.add([made(3, 2.0), made(4, 5.0)])
    ledger.add([made(4, 5.0)])
    assert len(segments(tmp_path)) == 2
    again = Ledger(str(tmp_path), IDENTITY)
    assert {i: s.nats for i, s in again.scores.items()} == {3: 1.0, 4: 5.0}


def test_nothing_is_made_before_there_is_a_score(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    Ledger(str(folder), IDENTITY).add([])
    assert not folder.exists()


@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "torn away", "appended"])
def test_a_damaged_segment_counts_for_nothing_and_is_named(tmp_path: Path, damage: str) -> None:
    ledger = Ledger(str(tmp_path), IDENTITY)
    ledger.add([made(0)])
    ledger.add([made(1, 2.5)])
    path = next(p for p in segments(tmp_path) if '"document": 1' in p.read_text())
    content = bytearray(path.read_bytes())
    if damage == "flipped byte":
        content[content.index(b"0x1.4") + 4] ^= 1
    elif damage == "truncated":
        del content[-9:]
    elif damage == "torn away":
        content.clear()
    else:
        content += b"\n"
    path.write_bytes(bytes(content))
    again = Ledger(str(tmp_path), IDENTITY)
    assert list(again.scores) == [0]
    assert again.troubles == [f"{path} is damaged and counts for nothing"]
    # What is scored anew stands beside it.
    again.add([made(1, 2.5)])
    assert sorted(Ledger(str(tmp_path), IDENTITY).scores) == [0, 1]


def test_another_evaluations_ledger_is_refused_with_what_differs(tmp_path: Path) -> None:
    Ledger(str(tmp_path), IDENTITY).add([made(0)])
    assert list(Ledger(str(tmp_path), IDENTITY).scores) == [0]
    for other, words in [
        ({**IDENTITY, "weights": "b" * 16}, "weights is aaaaaaaaaaaaaaaa there and bbbbbbbbbbbbb"),
        (
            {**IDENTITY, "adaptation": {"chunk_size": 48, "sites": ("q", "k")}},
            "adaptation.chunk_size is 32 there and 48 here",
        ),
        ({**IDENTITY, "tokens": "c"}, "tokens is null there and c here"),
    ]:
        with pytest.raises(UsageError, match="is the ledger of another evaluation") as caught:
            Ledger(str(tmp_path), other)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    assert list(Ledger(str(tmp_path), IDENTITY).scores) == [0], "it is left as it was"


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b"{torn", "is damaged"),
        (b"[]", "is damaged"),
        (json.dumps({"version": 99}).encode(), "of version 99"),
        (None, "no header.json"),
    ],
)
def test_a_header_that_cannot_be_used_is_one_line(
    tmp_path: Path, header: bytes | None, says: str
) -> None:
    Ledger(str(tmp_path), IDENTITY).add([made(0)])
    path = tmp_path / "header.json"
    path.unlink() if header is None else path.write_bytes(header)
    with pytest.raises(StorageError, match=says):
        Ledger(str(tmp_path), IDENTITY)


def test_digests_tell_type_shape_and_bytes_apart() -> None:
    a = np.arange(6, dtype=np.uint16)
    others = [a + 1, a.astype(np.int16), a.reshape(2, 3), a[:5]]
    assert digest_of(a) == digest_of(a.copy())
    assert len({digest_of(x) for x in (a, *others)}) == 5


def test_a_group_is_missing_until_all_of_it_is_there(tmp_path: Path) -> None:
    documents = documents_of(TOKENS)
    groups = [documents[:3], documents[3:5], documents[5:]]
    ledger = Ledger(str(tmp_path), IDENTITY)
    ledger.add([made(0), made(3), made(4), *(made(i, losses=np.zeros(3)) for i in (5, 6))])
    assert missing(groups, None, token_nats=False) == groups
    assert missing(groups, ledger, token_nats=False) == [groups[0]]
    # Without the losses that are asked for, a score is of no use.
    assert missing(groups, ledger, token_nats=True) == groups[:2]


class Killed(BaseException):
    """Stands for whatever ends a process."""


def test_an_interrupted_evaluation_goes_on_and_gives_the_same_bits(tmp_path: Path) -> None:
    expected = score_documents(MODEL, TOKENS, TABLES, ADAPTATION)
    for stop_after in (2, 1, 3):
        ledger = Ledger(str(tmp_path), IDENTITY)
        limit = len(ledger.scores) + stop_after

        def stop(done: int, total: int, score: object, limit: int = limit) -> None:
            if limit <= done < total:
                raise Killed

        with pytest.raises(Killed):
            score_documents(MODEL, TOKENS, TABLES, ADAPTATION, ledger=ledger, progress=stop)
    before = set(segments(tmp_path))
    ledger = Ledger(str(tmp_path), IDENTITY)
    seen: list[int] = []
    found = score_documents(
        MODEL, TOKENS, TABLES, ADAPTATION, ledger=ledger,
        progress=lambda done, total, score: seen.append(done),
    )  # fmt: skip
    assert total_of(found) == total_of(expected)
    assert [s.nats for s in found] == [s.nats for s in expected]
    assert len(seen) < len(expected), "it did only what was missing"
    assert before < set(segments(tmp_path)), "what was written is written once"
    # All is there: nothing is computed any more.
    again = score_documents(
        MODEL, TOKENS, TABLES, ADAPTATION, ledger=Ledger(str(tmp_path), IDENTITY),
        progress=lambda done, total, score: pytest.fail("computed again"),
    )  # fmt: skip
    assert total_of(again) == total_of(expected)


def test_a_full_disk_is_one_line_and_the_rest_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainers.storage import Storage

    ledger = Ledger(str(tmp_path), IDENTITY)
    ledger.add([made(0)])
    real = Storage.write_bytes

    def full(self: Storage, name: str, data: bytes) -> None:
        raise StorageError(f"{self.uri_of(name)} cannot be written (No space left on device)")

    monkeypatch.setattr(Storage, "write_bytes", full)
    with pytest.raises(StorageError, match="No space left"):
        ledger.add([made(1)])
    assert sorted(ledger.scores) == [0]
    monkeypatch.setattr(Storage, "write_bytes", real)
    ledger.add([made(1)])
    assert sorted(Ledger(str(tmp_path), IDENTITY).scores) == [0, 1]
