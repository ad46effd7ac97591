"""Test-time training evaluation in this process: documents, plan, engine, total.

The actor pool runs the same groups through the same engine elsewhere; both add up in document
order, so they give the same number.

Invariant: scores come back in document order, one for every document asked for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evaluators.ledger import Ledger, missing
from evaluators.packed import Progress
from evaluators.sampling import Estimate, Sample, draw_sample, estimate
from golf_ray.adaptation.engine import AdapterInit, Tell, adapt_groups, group_documents
from golf_ray.adaptation.scores import Document, DocumentScore
from golf_ray.config import AdaptationConfig
from golf_ray.data.documents import document_bounds, document_bytes, sample_documents
from golf_ray.data.tokenizer import ByteTables
from golf_ray.errors import DataError
from golf_ray.metric import Score, total
from golf_ray.model.model import GolfModel

KEEP_S = 5.0
"""Seconds of work that a killed process loses at most, beside what is half-way through."""


def choose_documents(
    tokens: NDArray[np.integer], adaptation: AdaptationConfig
) -> tuple[Document, ...]:
    """The documents to score: all, or some of them, stratified by length.

    Some are `document_fraction` of all, or the `sample_documents` that the whole is estimated from.

    Raises:
        DataError: there is no document.
    """
    bounds = document_bounds(tokens)
    lengths = bounds[:, 1] - bounds[:, 0]
    sample = choose_sample(bounds, adaptation)
    chosen = (
        sample_documents(len(bounds), adaptation.document_fraction, adaptation.seed, lengths)
        if sample is None
        else sample.documents
    )
    return tuple(
        Document(index=int(i), start=int(bounds[i, 0]), end=int(bounds[i, 1])) for i in chosen
    )


def choose_sample(bounds: NDArray[np.int64], adaptation: AdaptationConfig) -> Sample | None:
    """The sample of the documents within `bounds`, if the settings ask for one."""
    if adaptation.sample_documents is None:
        return None
    lengths = bounds[:, 1] - bounds[:, 0] - 1
    return draw_sample(lengths, adaptation.sample_documents, adaptation.seed)


def estimate_whole(
    scores: Sequence[DocumentScore],
    tokens: NDArray[np.integer],
    tables: ByteTables,
    adaptation: AdaptationConfig,
) -> Estimate | None:
    """What the scores of a sample say of all documents; None where no sample was asked for.

    Args:
        scores: of the documents of `choose_documents`, in any order.
    """
    if adaptation.sample_documents is None:
        return None
    bounds = document_bounds(tokens)
    sample = choose_sample(bounds, adaptation)
    assert sample is not None
    num_bytes = document_bytes(tokens, bounds, tables)
    assert all(num_bytes[s.index] == s.num_bytes for s in scores)
    return estimate(sample, {s.index: s.nats for s in scores}, num_bytes)


def score_documents(
    model: GolfModel,
    tokens: NDArray[np.integer],
    tables: ByteTables,
    adaptation: AdaptationConfig,
    *,
    documents: Sequence[Document] | None = None,
    adapter_init: AdapterInit | None = None,
    keep_token_nats: bool = False,
    progress: Progress | None = None,
    tell: Tell | None = None,
    ledger: Ledger | None = None,
) -> tuple[DocumentScore, ...]:
    """Adapt to and score documents, one by one and each from scratch.

    Args:
        documents: which; those of `choose_documents` where not given. Their order has no effect.
        adapter_init: A by input width in place of the random ones.
        keep_token_nats: keep every loss in the scores.
        tell: told how many documents are taken at a time, and of a lack of memory.
        ledger: what is in it is not scored again, and what is scored goes there.

    Returns:
        Scores in document order.

    Raises:
        DataError: there is nothing to score.
        StorageError: the ledger cannot be written.
    """
    documents = choose_documents(tokens, adaptation) if documents is None else documents
    require_predictions(documents)
    groups = missing(group_documents(documents, adaptation), ledger, token_nats=keep_token_nats)
    found = kept_scores(documents, groups, ledger)
    running = total_of(found)
    unkept: list[DocumentScore] = []
    kept_s = time.monotonic()
    try:
        for score in adapt_groups(
            model, tokens, groups, adaptation, tables=tables, adapter_init=adapter_init,
            keep_token_nats=keep_token_nats, tell=tell,
        ):  # fmt: skip
            found.append(score)
            unkept.append(score)
            running += score.score
            if ledger is not None and time.monotonic() - kept_s > KEEP_S:
                ledger.add(unkept)
                unkept, kept_s = [], time.monotonic()
            if progress is not None:
                progress(len(found), len(documents), running)
    finally:
        # Whatever ends it: what is scored is not scored again.
        if ledger is not None:
            ledger.add(unkept)
    return tuple(sorted(found, key=lambda score: score.index))


def kept_scores(
    documents: Sequence[Document], todo: Sequence[Sequence[Document]], ledger: Ledger | None
) -> list[DocumentScore]:
    """What a ledger has of the documents that are in no group to do."""
    if ledger is None:
        return []
    doing = {document.index for group in todo for document in group}
    return [ledger.scores[d.index] for d in documents if d.index not in doing]


def require_predictions(documents: Sequence[Document]) -> None:
    """See that there is something to score.

    Raises:
        DataError: no document has a prediction.
    """
    if not any(document.num_predictions for document in documents):
        raise DataError(
            f"{len(documents)} documents hold no prediction, so there is nothing to score",
            "use validation text in which a document has two tokens or more",
        )


def total_of(scores: Sequence[DocumentScore]) -> Score:
    """The total in document order, whatever the order given."""
    return total(s.score for s in sorted(scores, key=lambda score: score.index))
