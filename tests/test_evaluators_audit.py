"""The audit: an honest ledger passes, every forgery is named, and a cheating engine is caught."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adaptation_cases import ADAPTATION, TABLES, VOCAB_SIZE, documents_of, small_model, stream
from hypothesis import given, settings
from hypothesis import strategies as st
from test_adaptation_engine import CarryingOver, Peeking, Sharing, WindowTooFar

from evaluators.audit import (
    Audit,
    audit_perturbed,
    audit_scores,
    choose_perturbed,
    replaced,
)
from evaluators.ledger import Ledger, read_header
from evaluators.ttt import score_documents, total_of
from golf_ray.adaptation.engine import Engine
from golf_ray.adaptation.scores import ChunkEvent, DocumentScore
from golf_ray.data.documents import document_bounds, document_bytes
from golf_ray.errors import DataError, StorageError

MODEL = small_model()
TOKENS = stream([9, 1, 23, 2, 12, 5, 14, 0])
BOUNDS = document_bounds(TOKENS)
HONEST = {
    s.index: s for s in score_documents(MODEL, TOKENS, TABLES, ADAPTATION, keep_token_nats=True)
}
Trace = list[ChunkEvent]


def audited(scores: dict[int, DocumentScore], **more: Any) -> Audit:
    return audit_scores(
        scores,
        chunk_size=ADAPTATION.chunk_size,
        bounds=BOUNDS,
        num_bytes=document_bytes(TOKENS, BOUNDS, TABLES),
        **more,
    )


def failed(audit: Audit) -> set[str]:
    return {check.name for check in audit.checks if not check.passed}


def forged(index: int, **changes: Any) -> dict[int, DocumentScore]:
    return {**HONEST, index: dataclasses.replace(HONEST[index], **changes)}


def retraced(index: int, change: Callable[[Trace], Trace]) -> dict[int, DocumentScore]:
    return forged(index, trace=tuple(change(list(HONEST[index].trace))))


def test_an_honest_ledger_passes() -> None:
    audit = audited(HONEST)
    assert audit.passed and audit.findings == () and len(audit.checks) == 9
    assert audit.score == total_of(tuple(HONEST.values()))
    assert (audit.documents, audit.documents_total) == (8, 8)
    assert audit.score.tokens == audit.tokens_total == len(TOKENS) - 1
    assert audit.score.num_bytes == audit.bytes_total
    assert audit.chunks == sum(-(-s.tokens // 4) for s in HONEST.values())
    # Not every loss needs to be kept.
    bare = {i: dataclasses.replace(s, token_nats=None) for i, s in HONEST.items()}
    assert audited(bare).passed


def test_missing_documents_are_counted_and_named() -> None:
    audit = audited({i: s for i, s in HONEST.items() if i not in (0, 2, 4, 5)})
    assert failed(audit) == {"documents", "totals"} and audit.mendable
    assert audit.findings[0] == "documents: 4 documents (0, 2, 4, ...) of 8 missing, with 49 tokens"
    assert audit.findings[1].startswith("totals: they hold 17 tokens of 66 and ")


def test_documents_of_no_text_and_those_scored_twice() -> None:
    stranger = dataclasses.replace(HONEST[1], index=99)
    audit = audited({**HONEST, 99: stranger})
    assert audit.findings == ("documents: 1 document (99) not of this text",)
    assert audit.score == audited(HONEST).score and not audit.mendable
    # The same again is work done twice; another number is a choice that somebody made.
    assert audited(HONEST, repeated=[HONEST[2]]).passed
    better = dataclasses.replace(HONEST[2], nats=HONEST[2].nats / 2, token_nats=None)
    audit = audited(HONEST, repeated=[better])
    assert audit.findings == ("documents: 1 document (2) scored twice, with different numbers",)
    assert not audit.mendable


def at(place: int, **changes: Any) -> Callable[[Trace], Trace]:
    def change(trace: Trace) -> Trace:
        trace[place] = dataclasses.replace(trace[place], **changes)
        return trace

    return change


T = HONEST[2].trace
FORGERIES = {
    "scored twice": (retraced(2, lambda t: [t[0], *t]), "chunks", "scores chunk 0 twice"),
    "left out": (retraced(2, lambda t: [*t[:2], *t[3:]]), "chunks", "chunk 3 in the place of 2"),
    "cut short": (retraced(2, lambda t: t[:-1]), "chunks", "has 5 chunks scored of 6"),
    "no trace": (retraced(2, lambda t: []), "chunks", "has 0 chunks scored of 6"),
    "out of order": (retraced(2, lambda t: [t[1], t[0], *t[2:]]), "order", "not after"),
    "updated first": (
        retraced(2, at(1, scored_at=T[1].updated_at, updated_at=T[1].scored_at)),
        "order",
        "learns from chunk 1 at",
    ),
    "updated at once": (retraced(2, at(1, updated_at=T[1].scored_at)), "order", "chunk 1 at"),
    "updated too late": (retraced(2, at(1, updated_at=T[2].scored_at)), "order", "chunk 2 at"),
    "last learned": (
        retraced(2, at(-1, updated_at=T[-1].scored_at + 1)), "updates", "from its last chunk 5"
    ),
    "not learned": (retraced(2, at(3, updated_at=None)), "updates", "not learn from chunk 3"),
    "bytes": (forged(2, num_bytes=HONEST[2].num_bytes + 3), "bytes", "its text"),
    "tokens": (forged(2, tokens=24, token_nats=None), "tokens", "has 24, its text 23"),
    "nats": (forged(2, nats=1.0), "losses", "1.0 nats, which its losses do not add up to"),
    "no number": (forged(2, nats=math.nan, token_nats=None), "losses", "has nan nats"),
    "negative": (forged(2, nats=-1.0, token_nats=None), "losses", "has -1.0 nats"),
    "fewer losses": (forged(2, token_nats=np.zeros(3)), "losses", "has 3 losses of 23 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forgery_is_found_and_named(forgery: str) -> None:
    scores, name, words = FORGERIES[forgery]
    audit = audited(scores)
    assert not audit.passed and not audit.mendable
    finding = next(f for f in audit.findings if f.startswith(f"{name}: document 2 "))
    assert words in finding and "\n" not in finding
    # A second score of the document may not hide it.
    assert name in failed(audited(HONEST, repeated=[scores[2]]))


def test_many_faults_are_one_line() -> None:
    audit = audited({i: dataclasses.replace(s, num_bytes=9999) for i, s in HONEST.items()})
    (finding,) = (f for f in audit.findings if f.startswith("bytes"))
    assert finding.count("document") == 3 and finding.endswith("; and 5 more")


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_other_trace_passes(data: st.DataObject) -> None:
    """Whatever single number of a trace is changed: if the order changes, it is found."""
    index = data.draw(st.sampled_from([0, 2, 4, 6]))
    trace = list(HONEST[index].trace)
    place = data.draw(st.integers(0, len(trace) - 1))
    field = data.draw(st.sampled_from(["chunk", "scored_at", "updated_at"]))
    value = data.draw(st.integers(-1, 60) | st.none() if field == "updated_at" else
                      st.integers(-1, 60))  # fmt: skip
    trace[place] = dataclasses.replace(trace[place], **{field: value})
    times = [t for e in trace for t in (e.scored_at, e.updated_at) if t is not None]
    honest = (
        [e.chunk for e in trace] == list(range(len(trace)))
        and all(a < b for a, b in itertools.pairwise(times))
        and times[0] >= 0
        and [e.updated_at is None for e in trace] == [False] * (len(trace) - 1) + [True]
    )
    assert audited(forged(index, trace=tuple(trace))).passed == honest


# From the ledger's files -----------------------------------------------------------------------


def test_a_ledger_says_what_it_holds_twice_and_what_is_no_score(tmp_path: Path) -> None:
    Ledger(str(tmp_path), {"weights": "a"}).add(list(HONEST.values()))
    (segment,) = (tmp_path / "segments").iterdir()
    content = segment.read_bytes()
    identity = {k: v for k, v in read_header(str(tmp_path)).items() if k != "version"}
    assert identity == {"weights": "a"}

    def add(data: bytes) -> None:
        (segment.parent / f"{hashlib.sha256(data).hexdigest()}.jsonl").write_bytes(data)

    add(content.splitlines(keepends=True)[0])
    add(b'{"document": 1}\n')
    add(content.replace(b'"tokens": 23', b'"tokens": "23"'))
    ledger = Ledger(str(tmp_path), identity)
    assert len(ledger.repeated) == 1 and len(ledger.scores) == 8
    assert [t.endswith("holds what is no score") for t in ledger.troubles] == [True, True]
    audit = audited(ledger.scores, repeated=ledger.repeated, troubles=ledger.troubles)
    assert failed(audit) == {"segments"} and audit.findings[0].endswith("; and 1 more")


@pytest.mark.parametrize("content", [None, b"{torn", b"[]"])
def test_what_is_no_ledger_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "header.json").write_bytes(content)
    with pytest.raises(StorageError, match=r"is no ledger|is damaged"):
        read_header(str(tmp_path))


# Perturbation ----------------------------------------------------------------------------------


def perturbed(engine: type[Engine], **more: Any) -> Any:
    return audit_perturbed(
        MODEL, TOKENS, TABLES, ADAPTATION, bounds=BOUNDS, num_documents=3, engine=engine, **more
    )


def test_an_honest_engine_lets_nothing_leak() -> None:
    told: list[tuple[int, int]] = []
    found = perturbed(Engine, told=lambda done, of: told.append((done, of)))
    assert found.passed and found.findings == () and found.num_changes == 6
    assert found.num_neighbours > 0 and found.cut == 0 and found.tolerance_nats == 0
    assert told == [(i, 7) for i in range(1, 7)]
    cut = perturbed(Engine, max_predictions=8)
    assert cut.passed and cut.cut == 2
    assert perturbed(Engine, tolerance_nats=1e-3).passed


@pytest.mark.parametrize(
    ("cheat", "tolerance_nats"),
    [(Peeking, 1e-4), (CarryingOver, 0.0), (Sharing, 1e-4), (WindowTooFar, 0.0)],
)
def test_a_cheating_engine_is_caught(cheat: type[Engine], tolerance_nats: float) -> None:
    found = perturbed(cheat, tolerance_nats=tolerance_nats)
    assert not found.passed and 0 < len(found.findings) <= 3
    own = cheat in (Peeking, WindowTooFar)
    words = "moved its losses before" if own else "moved losses of document"
    assert any(words in finding for finding in found.findings)


def test_a_deaf_engine_is_caught() -> None:
    class Deaf(Engine):
        """Says of every document what it said of another text."""

        def run(self, documents: Any, states: Any = ()) -> Any:
            for score in super().run(documents, states):
                yield dataclasses.replace(score, token_nats=np.ones(score.tokens, np.float32))

    found = perturbed(Deaf)
    assert found.num_failed == 6 and "left its losses as they were" in found.findings[0]


def test_documents_are_chosen_evenly_and_cheap() -> None:
    lengths = [300, 1, 2, 3, *range(5, 15)]
    bounds = np.cumsum([0, *lengths])
    bounds = np.stack([bounds[:-1], bounds[1:] + 1], axis=1)

    def chosen(count: int, chunk_size: int, most: int) -> list[int]:
        found = choose_perturbed(bounds, count, chunk_size, most)
        return [lengths[i] for i in found]

    assert chosen(2, 4, 64) == [7, 12]
    assert chosen(10, 4, 64) == list(range(5, 15))
    assert sorted(chosen(11, 4, 64)) == [*range(5, 15), 300]
    assert sorted(chosen(99, 4, 64)) == [3, *range(5, 15), 300]
    with pytest.raises(DataError, match="0 of 2 documents"):
        choose_perturbed(bounds[1:3], 2, 4, 64)


def test_what_is_replaced_is_other_and_bos_stays() -> None:
    document = documents_of(TOKENS)[2]
    changed = replaced(TOKENS, document, 7, VOCAB_SIZE, seed=3)
    inside = slice(document.start + 8, document.end - 1)
    assert (changed[inside] != TOKENS[inside]).all() and (changed[inside] != 1).all()
    changed[inside] = TOKENS[inside]
    assert np.array_equal(changed, TOKENS)
