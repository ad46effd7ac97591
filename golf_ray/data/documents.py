"""Documents of a token stream: where they lie, which of them to score, and the even cut.

A document runs from one BOS up to and including the next, so that the last prediction of each is
that the document ends; the last document runs to the end of the stream.

Invariant: a document's index is its place in the whole stream, also in a sample.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from golf_ray.data.shards import BOS_ID
from golf_ray.data.tokenizer import ByteTables
from golf_ray.errors import DataError

_Scalar = TypeVar("_Scalar", bound=np.integer)
_BLOCK_TOKENS = 1 << 22


def document_bounds(tokens: NDArray[np.integer], bos_id: int = BOS_ID) -> NDArray[np.int64]:
    """Start and end of every document; tokens before the first BOS belong to none.

    Args:
        tokens: [T] ids.

    Returns:
        int64 [N, 2], N >= 1: `tokens[start:end]` is the document with the next BOS, which gives
        `end - start - 1` predictions (none only where the stream ends with a BOS).

    Raises:
        DataError: there is no BOS, so no document.
    """
    starts = np.flatnonzero(np.asarray(tokens) == bos_id).astype(np.int64)
    if len(starts) == 0:
        raise DataError(
            f"{len(tokens)} tokens hold no document: none of them is BOS = {bos_id}",
            "use shards in which every document starts with BOS",
        )
    ends = np.append(starts[1:] + 1, len(tokens))
    return np.stack((starts, ends), axis=1)


def document_bytes(
    tokens: NDArray[np.integer], bounds: NDArray[np.int64], tables: ByteTables
) -> NDArray[np.int64]:
    """Bytes that the predictions of every document stand for.

    Args:
        tokens: [T] ids.
        bounds: [N, 2] all documents, as `document_bounds` gives them.

    Returns:
        int64 [N].
    """
    first = int(bounds[0, 0])
    # By token, without holding more than a block of them in 64 bits.
    by_token = np.zeros(len(tokens) - first, dtype=np.int16)
    for start in range(first, len(tokens) - 1, _BLOCK_TOKENS):
        ids = np.asarray(tokens[start : start + _BLOCK_TOKENS + 1]).astype(np.int64)
        by_token[start - first :][: len(ids) - 1] = tables.count(ids[:-1], ids[1:])
    # The last token stands before nothing: its 0 is the sum of a document without a prediction.
    num_bytes: NDArray[np.int64] = np.add.reduceat(by_token, bounds[:, 0] - first, dtype=np.int64)
    return num_bytes


def sample_documents(
    num: int, fraction: float, seed: int, lengths: NDArray[np.integer] | None = None
) -> NDArray[np.int64]:
    """Indices of a part of the documents, drawn with a seed.

    Args:
        num: number of documents in the whole set.
        fraction: part to draw; 1 takes all, anything greater than 0 at least one.
        lengths: [num] where given, the draw is stratified: documents are taken at even steps
            through their order of length, from a random phase. A few long documents take most
            of the time and many tokens, so a plain draw says little about either.

    Returns:
        int64, sorted, without repetition.
    """
    assert num > 0 and 0 < fraction <= 1
    if fraction == 1:
        return np.arange(num, dtype=np.int64)
    count = min(num, max(1, round(num * fraction)))
    generator = np.random.Generator(np.random.Philox(seed))
    if lengths is None:
        chosen = generator.choice(num, size=count, replace=False)
    else:
        assert len(lengths) == num
        by_length = np.argsort(lengths, kind="stable")
        places = (np.arange(count) + generator.random()) * (num / count)
        chosen = by_length[np.minimum(places.astype(np.int64), num - 1)]
    return np.sort(chosen).astype(np.int64)


def cut_tokens(tokens: NDArray[_Scalar], seq_len: int) -> NDArray[_Scalar]:
    """The first k * seq_len + 1 tokens: k whole sequences of inputs and their targets.

    Raises:
        DataError: there is not one whole sequence.
    """
    sequences = (len(tokens) - 1) // seq_len
    if sequences < 1:
        raise DataError(
            f"{len(tokens)} validation tokens are fewer than the {seq_len + 1} of one sequence",
            "use more validation text or a smaller evaluation.seq_len",
        )
    return tokens[: sequences * seq_len + 1]
