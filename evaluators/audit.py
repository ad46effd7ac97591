"""The audit of a ledger: proof, from what it holds, that test-time training kept to its rules.

Two proofs. `audit_scores` reads what was written down: every document of the text once, tokens and
bytes those of the text, every chunk scored once, in order and before anything learned from it. A
trace is what the engine says of itself, so `audit_perturbed` tries the engine: it changes tokens
that a score must not have seen, and sees that the score stays. Neither trusts a sum that it can
form itself; no file is read here, and nothing is written.

Invariant: an audit passes only if every check was made on every document and found nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golf_ray.adaptation.engine import Engine
from golf_ray.adaptation.packing import Budget, Step
from golf_ray.adaptation.plan import count_chunks
from golf_ray.adaptation.scores import ChunkEvent, Document, DocumentScore
from golf_ray.config import AdaptationConfig
from golf_ray.data.shards import BOS_ID
from golf_ray.data.tokenizer import ByteTables
from golf_ray.errors import DataError
from golf_ray.metric import Score, total
from golf_ray.model.model import GolfModel

MOST_NAMED = 3
"""Documents that a finding names."""
MOST_CHUNKS = 16
"""Of a document that is perturbed: it is cut there, so that it stays cheap."""
GPU_TOLERANCE_NATS = 1e-3
"""By which a mean loss may differ where the order of additions is not fixed, as on a GPU."""

Told = Callable[[int, int], None]
"""Runs done, runs in all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One rule, and what breaks it."""

    name: str
    rule: str
    num_failed: int
    """Documents (of `segments`: files) that break it."""
    finding: str | None
    """One line; None where nothing does."""
    mendable: bool = False
    """Whether what breaks it is only lost or not yet scored, so that scoring it mends it."""

    @property
    def passed(self) -> bool:
        """Whether nothing breaks the rule."""
        return self.num_failed == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """What a ledger's scores and traces prove."""

    checks: tuple[Check, ...]
    score: Score
    """Of the documents that are there and can be summed, each once."""
    documents: int
    """Of the text, that the ledger holds."""
    documents_total: int
    """Of the text."""
    tokens_total: int
    """Predictions of the text."""
    bytes_total: int
    """Of the text."""
    chunks: int
    """Events of all traces that were looked at."""

    @property
    def passed(self) -> bool:
        """Whether every check did."""
        return all(check.passed for check in self.checks)

    @property
    def mendable(self) -> bool:
        """Whether all that failed is mended by scoring what is lost or missing."""
        return all(check.passed or check.mendable for check in self.checks)

    @property
    def findings(self) -> tuple[str, ...]:
        """A line for each check that failed."""
        return tuple(check.finding for check in self.checks if check.finding is not None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "documents_scored": self.documents,
            "documents_total": self.documents_total,
            "tokens_scored": self.score.tokens,
            "tokens_total": self.tokens_total,
            "bytes_scored": self.score.num_bytes,
            "bytes_total": self.bytes_total,
            "chunks_scored": self.chunks,
            "val_loss_nats": self.score.loss_nats,
            "val_bpb": self.score.bpb,
            "checks": [
                {
                    "name": check.name,
                    "rule": check.rule,
                    "passed": check.passed,
                    "num_failed": check.num_failed,
                    "finding": check.finding,
                }
                for check in self.checks
            ],
        }


def audit_scores(
    scores: Mapping[int, DocumentScore],
    *,
    chunk_size: int,
    bounds: NDArray[np.int64],
    num_bytes: NDArray[np.int64],
    repeated: Sequence[DocumentScore] = (),
    troubles: Sequence[str] = (),
) -> Audit:
    """Prove from scores and traces that a whole text was scored by the rules.

    Args:
        scores: by document.
        chunk_size: predictions that are scored, then learned from, at a time.
        bounds: [N, 2] all documents of the text, as `document_bounds` gives them.
        num_bytes: [N] their bytes, as `document_bytes` gives them.
        repeated: further scores of documents that have one.
        troubles: a line for each segment that could not be read.
    """
    lengths = np.maximum(bounds[:, 1] - bounds[:, 0] - 1, 0)
    known = sorted(index for index in scores if 0 <= index < len(bounds))
    held = [scores[index] for index in known]
    every = [*held, *(s for s in repeated if 0 <= s.index < len(bounds))]

    def check(name: str, rule: str, fault: Callable[[DocumentScore], str | None]) -> Check:
        # Two scores of one document are one document that breaks a rule.
        found = {s.index: said for s in every if (said := fault(s)) is not None}
        return _check(name, rule, found)

    def off(of_text: NDArray[np.int64], index: int, here: int) -> str | None:
        there = int(of_text[index])
        return None if here == there else f"has {here:,}, its text {there:,}"

    checks = (
        _segments_check(troubles),
        _documents_check(scores, lengths, repeated),
        check(
            "tokens",
            "a document's tokens are its predictions",
            lambda s: off(lengths, s.index, s.tokens),
        ),
        check(
            "bytes",
            "a document's bytes are those of its text",
            lambda s: off(num_bytes, s.index, s.num_bytes),
        ),
        check(
            "chunks",
            "a document's chunks are scored once each, in order, to its end",
            lambda s: chunks_fault(s.trace, count_chunks(int(lengths[s.index]), chunk_size)),
        ),
        check(
            "order",
            "a chunk is scored before it is learned from, and that before the next is scored",
            lambda s: order_fault(s.trace),
        ),
        check(
            "updates",
            "every chunk but the last is learned from, and the last is not",
            lambda s: updates_fault(s.trace),
        ),
        check("losses", "a document's nats are finite and the sum of its losses", losses_fault),
    )
    # What cannot be summed is a finding above.
    score = total(s.score for s in held if math.isfinite(s.nats))
    # Of the stream and not of the documents: they share a BOS each with the next.
    tokens_total = max(0, int(bounds[-1, 1] - bounds[0, 0]) - 1)
    bytes_total = int(num_bytes.sum())
    return Audit(
        checks=(*checks, _totals_check(score, tokens_total, bytes_total)),
        score=score,
        documents=len(held),
        documents_total=len(bounds),
        tokens_total=tokens_total,
        bytes_total=bytes_total,
        chunks=sum(len(s.trace) for s in every),
    )


# Rules of one document -------------------------------------------------------------------------


def chunks_fault(trace: Sequence[ChunkEvent], num_chunks: int) -> str | None:
    """What is wrong with the chunks that a trace names."""
    numbers = [event.chunk for event in trace]
    for place, number in enumerate(numbers):
        if number != place:
            # Before the general case: it is what one would do to score better.
            seen = number in numbers[:place]
            return f"scores chunk {number} " + ("twice" if seen else f"in the place of {place}")
    if len(numbers) != num_chunks:
        return f"has {len(numbers):,} chunks scored of {num_chunks:,}"
    return None


def order_fault(trace: Sequence[ChunkEvent]) -> str | None:
    """What is wrong with the clock of a trace, which must rise with every event."""
    last = -1
    for event in trace:
        if event.scored_at <= last:
            return f"scores chunk {event.chunk} at {event.scored_at}, not after {last}"
        last = event.scored_at
        if event.updated_at is not None:
            if event.updated_at <= last:
                return (
                    f"learns from chunk {event.chunk} at {event.updated_at} and scores it at {last}"
                )
            last = event.updated_at
    return None


def updates_fault(trace: Sequence[ChunkEvent]) -> str | None:
    """What is wrong with which chunks a trace learns from."""
    for event in trace[:-1]:
        if event.updated_at is None:
            return f"does not learn from chunk {event.chunk}"
    if trace and trace[-1].updated_at is not None:
        return f"learns from its last chunk {trace[-1].chunk}"
    return None


def losses_fault(score: DocumentScore) -> str | None:
    """What is wrong with a document's nats."""
    if not (math.isfinite(score.nats) and score.nats >= 0):
        return f"has {score.nats} nats"
    losses = score.token_nats
    if losses is None:
        return None
    if len(losses) != score.tokens:
        return f"has {len(losses):,} losses of {score.tokens:,} tokens"
    # In the same way as they were added up, so to the bit.
    if not np.isfinite(losses).all() or math.fsum(losses.tolist()) != score.nats:
        return f"has {score.nats} nats, which its losses do not add up to"
    return None


# Rules of the whole ----------------------------------------------------------------------------


def _segments_check(troubles: Sequence[str]) -> Check:
    rule = "every segment is what was written"
    more = f"; and {len(troubles) - 1:,} more" if len(troubles) > 1 else ""
    finding = f"segments: {troubles[0]}{more}" if troubles else None
    return Check(
        name="segments", rule=rule, num_failed=len(troubles), finding=finding, mendable=True
    )


def _documents_check(
    scores: Mapping[int, DocumentScore],
    lengths: NDArray[np.int64],
    repeated: Sequence[DocumentScore],
) -> Check:
    """Missing documents, those of no text, and those with two scores that disagree."""
    missing = [index for index in range(len(lengths)) if index not in scores]
    unknown = sorted(index for index in scores if not 0 <= index < len(lengths))
    # The clock of a trace is that of whoever scored it.
    disagreeing = sorted({s.index for s in repeated if s.score != scores[s.index].score})
    parts = []
    if missing:
        tokens = int(lengths[missing].sum())
        parts.append(f"{_these(missing)} of {len(lengths):,} missing, with {tokens:,} tokens")
    if unknown:
        parts.append(f"{_these(unknown)} not of this text")
    if disagreeing:
        parts.append(f"{_these(disagreeing)} scored twice, with different numbers")
    return Check(
        name="documents",
        rule="every document of the text is there once, and no other",
        num_failed=len(missing) + len(unknown) + len(disagreeing),
        finding="documents: " + "; ".join(parts) if parts else None,
        mendable=not unknown and not disagreeing,
    )


def _totals_check(score: Score, tokens_total: int, bytes_total: int) -> Check:
    wrong = [
        f"{here:,} {noun} of {there:,}"
        for here, there, noun in (
            (score.tokens, tokens_total, "tokens"),
            (score.num_bytes, bytes_total, "bytes"),
        )
        if here != there
    ]
    return Check(
        name="totals",
        rule="all documents' tokens and bytes are those of the whole text",
        num_failed=len(wrong),
        finding=f"totals: they hold {' and '.join(wrong)}" if wrong else None,
        # A sum that is wrong for another reason is another finding too.
        mendable=True,
    )


def _check(name: str, rule: str, faults: Mapping[int, str]) -> Check:
    if not faults:
        return Check(name=name, rule=rule, num_failed=0, finding=None)
    named = [f"document {index} {faults[index]}" for index in sorted(faults)[:MOST_NAMED]]
    more = len(faults) - len(named)
    line = f"{name}: {'; '.join(named)}" + (f"; and {more:,} more" if more else "")
    return Check(name=name, rule=rule, num_failed=len(faults), finding=line)


def _these(indices: Sequence[int]) -> str:
    """How many documents, and which."""
    named = ", ".join(map(str, indices[:MOST_NAMED]))
    more = ", ..." if len(indices) > MOST_NAMED else ""
    return f"{len(indices):,} document{'s' * (len(indices) != 1)} ({named}{more})"


# The perturbation test -------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Perturbation:
    """What became of scores when tokens were changed that they must not depend on."""

    documents: tuple[int, ...]
    """Indices in the text."""
    cut: int
    """Documents of them that are longer than `max_predictions` and were cut there."""
    max_predictions: int
    num_changes: int
    num_neighbours: int
    """Pairs of documents that shared a step."""
    tolerance_nats: float
    """By which a mean loss may differ; 0 asks for every loss to the bit."""
    num_failed: int
    """Changes that reached what they must not, or did not reach what they must."""
    findings: tuple[str, ...]
    """A line for each of the first."""

    @property
    def passed(self) -> bool:
        """Whether no change went where it must not."""
        return self.num_failed == 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "passed": self.passed,
            "documents": list(self.documents),
            "documents_cut": self.cut,
            "max_predictions": self.max_predictions,
            "num_changes": self.num_changes,
            "num_neighbours": self.num_neighbours,
            "tolerance_nats": self.tolerance_nats,
            "num_failed": self.num_failed,
            "findings": list(self.findings),
        }


def choose_perturbed(
    bounds: NDArray[np.int64], count: int, chunk_size: int, max_predictions: int
) -> NDArray[np.int64]:
    """Documents to perturb, at even steps through their order of length.

    Those of one chunk learn nothing, and those that would be cut are not seen to their end: both
    are taken only where there are too few others.

    Returns:
        int64 in rising order; fewer than `count` where the text has no more.

    Raises:
        DataError: no two documents have a token to change.
    """
    lengths = bounds[:, 1] - bounds[:, 0] - 1
    # Of three predictions the first stays, the second changes, the last may be the next BOS.
    can = np.flatnonzero(lengths >= 3)
    if len(can) < 2:
        raise DataError(
            f"{len(can)} of {len(bounds)} documents are long enough to be perturbed",
            "give validation text with two documents of 4 tokens or more",
        )
    learns = can[lengths[can] > chunk_size]
    whole = learns[lengths[learns] <= max_predictions]
    pool = next((p for p in (whole, learns) if len(p) >= count), can)
    pool = pool[np.argsort(lengths[pool], kind="stable")]
    num = min(count, len(pool))
    places = ((np.arange(num) + 0.5) * (len(pool) / num)).astype(np.int64)
    return np.sort(pool[places])


def audit_perturbed(
    model: GolfModel,
    tokens: NDArray[np.integer],
    tables: ByteTables,
    adaptation: AdaptationConfig,
    *,
    bounds: NDArray[np.int64],
    num_documents: int,
    max_predictions: int | None = None,
    tolerance_nats: float = 0.0,
    engine: type[Engine] = Engine,
    told: Told | None = None,
) -> Perturbation:
    """Change what a score must not have seen, and see that it stays.

    For each of some documents, first its tail: losses before the change stay, those after it do
    not. Then the whole of it: no loss of another document changes, be it in the same step or later
    in the same memory. Documents are scored by twos or more at a time, in rows that are used again.

    Args:
        bounds: [N, 2] all documents.
        num_documents: to choose of them, at least 2; each costs two runs over all of those.
        max_predictions: of a document, which is cut there; `MOST_CHUNKS` chunks if not given.
        tolerance_nats: by which a mean loss may differ, on a device that adds in any order.
        engine: what is tried.
        told: told of every run.

    Raises:
        DataError: no two documents are long enough.
        EvaluationFailed: a window does not fit into memory.
    """
    assert num_documents >= 2
    size = adaptation.chunk_size
    most = MOST_CHUNKS * size if max_predictions is None else max_predictions
    chosen = choose_perturbed(bounds, num_documents, size, most)
    stream, documents = _own_stream(tokens, bounds, chosen, most)
    residents = max(2, (len(documents) + 1) // 2)
    budget = Budget(residents=residents, step_tokens=residents * adaptation.window)
    neighbours: set[tuple[int, int]] = set()

    def note(step: Step) -> None:
        places = [member.document for member in step.members]
        neighbours.update((a, b) for a in places for b in places if a < b)

    def losses(ids: NDArray[np.integer]) -> dict[int, NDArray[np.float32]]:
        trial = engine(
            model, ids, adaptation, tables=tables, budget=budget, keep_token_nats=True, on_step=note
        )
        found = {s.index: s.token_nats for s in trial.run(documents)}
        return {index: nats for index, nats in found.items() if nats is not None}

    findings: list[str] = []
    num_runs = 1 + 2 * len(documents)
    base = losses(stream)
    for place, document in enumerate(documents):
        first = _place_of_change(document, place, len(documents), size)
        for kind, start in (("tail", first), ("whole", 0)):
            if told is not None:
                told(1 + 2 * place + (kind == "whole"), num_runs)
            changed = replaced(
                stream, document, start, model.config.vocab_size, seed=adaptation.seed + place
            )
            findings += _reached(base, losses(changed), document.index, start, tolerance_nats)
    if not neighbours:
        findings.append("no two documents shared a step, so neighbours were not tried")
    more = len(findings) - MOST_NAMED
    named = findings[:MOST_NAMED]
    if more > 0:
        named[-1] += f"; and {more:,} more"
    return Perturbation(
        documents=tuple(document.index for document in documents),
        cut=int((bounds[chosen, 1] - bounds[chosen, 0] - 1 > most).sum()),
        max_predictions=most,
        num_changes=num_runs - 1,
        num_neighbours=len(neighbours),
        tolerance_nats=tolerance_nats,
        num_failed=len(findings),
        findings=tuple(named),
    )


def replaced(
    tokens: NDArray[np.integer], document: Document, first: int, vocab_size: int, *, seed: int
) -> NDArray[np.integer]:
    """A stream in which what a document predicts from `first` on are other ids; BOS stays BOS."""
    assert vocab_size > 2
    part = slice(document.start + first + 1, document.end)
    old = tokens[part].astype(np.int64)
    # One of the ids that are neither BOS nor the one that is there.
    new = np.random.default_rng(seed).integers(0, vocab_size - 2, len(old))
    new += new >= np.minimum(old, BOS_ID)
    new += new >= np.maximum(old, BOS_ID)
    changed = tokens.copy()
    changed[part] = np.where(old == BOS_ID, BOS_ID, new)
    return changed


def _own_stream(
    tokens: NDArray[np.integer],
    bounds: NDArray[np.int64],
    chosen: Iterable[int],
    max_predictions: int,
) -> tuple[NDArray[np.integer], tuple[Document, ...]]:
    """Some documents alone, each cut, under their indices in the text."""
    pieces, documents, start = [], [], 0
    for index in map(int, chosen):
        first, end = map(int, bounds[index])
        piece = np.asarray(tokens[first : min(end, first + max_predictions + 1)])
        pieces.append(piece)
        documents.append(Document(index=index, start=start, end=start + len(piece)))
        start += len(piece)
    return np.concatenate(pieces), tuple(documents)


def _place_of_change(document: Document, place: int, count: int, chunk_size: int) -> int:
    """The prediction from which on a document is changed, spread over chunks by its place.

    It is the last of a chunk that is learned from: whoever learns too soon moves the others of it.
    Where there are chunks before that, whoever learns ahead moves those.
    """
    n = document.num_predictions
    learned = count_chunks(n, chunk_size) - 1
    number = max((2 * place + 1) * learned // (2 * count), min(1, learned - 1))
    return max(1, min((number + 1) * chunk_size - 1, n - 2))


def _reached(
    base: Mapping[int, NDArray[np.float32]],
    after: Mapping[int, NDArray[np.float32]],
    changed: int,
    first: int,
    tolerance_nats: float,
) -> Iterator[str]:
    """A line for everything that a change from `first` on moved and must not, or left and must."""
    for index, before in base.items():
        now = after[index]
        kept = first if index == changed else len(before)
        if _moved(before[:kept], now[:kept], tolerance_nats):
            yield (
                f"tokens of document {changed} from prediction {first} on moved its losses before"
                if index == changed
                else f"tokens of document {changed} moved losses of document {index}"
            )
        if index == changed and not _differs(before[first:], now[first:], tolerance_nats):
            yield f"other tokens in document {changed} left its losses as they were"


def _moved(before: NDArray[np.float32], now: NDArray[np.float32], tolerance_nats: float) -> bool:
    if not tolerance_nats:
        return not np.array_equal(before, now)
    if not len(before):
        return False
    difference = abs(float(before.mean(dtype=np.float64)) - float(now.mean(dtype=np.float64)))
    return not difference <= tolerance_nats


def _differs(before: NDArray[np.float32], now: NDArray[np.float32], tolerance_nats: float) -> bool:
    return bool((np.abs(before - now) > tolerance_nats).any())
