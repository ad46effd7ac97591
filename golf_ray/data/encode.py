"""Tokenising documents, in this process or over several, in the documents' order.

Each document becomes BOS and its tokens, no EOS. Where the tokens go is the caller's choice.

Invariant: what comes out is the same for any number of processes.
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from golf_ray.data.shards import BOS_ID
from golf_ray.errors import DataError

BATCH_CHARS: Final = 500_000
"""Documents are handed out in batches of about so much text."""

BYTES_PER_WORKER: Final = 4_000_000
"""A process takes a second to start: it must have at least so much text to pay."""


class EncodedBatch(NamedTuple):
    """Some consecutive documents as tokens."""

    tokens: NDArray[np.uint16]
    """[sum of lengths] BOS and the tokens of each document."""
    lengths: NDArray[np.int64]
    """[documents] tokens of each, BOS included."""
    hashes: NDArray[np.uint64]
    """[documents] `document_hash` of each."""
    text_bytes: NDArray[np.int64]
    """[documents] UTF-8 bytes of each."""


def document_hash(normalized: str) -> int:
    """First 8 bytes of the SHA-256 of a document's normalised text.

    Normalised, because two texts that the tokenizer cannot tell apart are the same document.
    """
    return int.from_bytes(hashlib.sha256(normalized.encode()).digest()[:8], "big")


def encode_batch(processor: Any, texts: list[str]) -> EncodedBatch:
    """Tokenise some documents with a SentencePiece processor."""
    ids = processor.encode(texts, num_threads=1)
    lengths = np.array([len(document) + 1 for document in ids], dtype=np.int64)
    tokens = np.empty(int(lengths.sum()), dtype=np.uint16)
    start = 0
    for document in ids:
        tokens[start] = BOS_ID
        tokens[start + 1 : start + 1 + len(document)] = document
        start += 1 + len(document)
    return EncodedBatch(
        tokens=tokens,
        lengths=lengths,
        hashes=np.array([document_hash(processor.normalize(t)) for t in texts], dtype=np.uint64),
        text_bytes=np.array([len(text.encode()) for text in texts], dtype=np.int64),
    )


def encode_documents(
    texts: Iterable[str], model: bytes, *, workers: int, text_bytes: int
) -> Iterator[EncodedBatch]:
    """Tokenise documents, in their order, with a bounded number in memory.

    Args:
        model: a serialised SentencePiece model.
        workers: processes at most; fewer where there is little text.
        text_bytes: size of all texts together.

    Raises:
        DataError: a process died.
    """
    workers = min(workers, -(-text_bytes // BYTES_PER_WORKER))
    if workers <= 1:
        processor = _processor(model)
        for batch in _batches(texts):
            yield encode_batch(processor, batch)
        return
    pool = ProcessPoolExecutor(
        max_workers=workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(model,),
    )
    pending: deque[Future[EncodedBatch]] = deque()
    try:
        for batch in _batches(texts):
            pending.append(pool.submit(_encode_in_worker, batch))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "a tokenising process was ended from outside, perhaps for want of memory",
            "use fewer workers",
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    chars = 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _processor(model: bytes) -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=model)


_worker_processor: Any = None


def _start_worker(model: bytes) -> None:
    global _worker_processor
    _worker_processor = _processor(model)


def _encode_in_worker(texts: list[str]) -> EncodedBatch:
    return encode_batch(_worker_processor, texts)
