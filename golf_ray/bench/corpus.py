"""Random documents as long as the field's: tokens for benchmarks where there is no real text.

Lengths follow the published quantiles of the field's validation set (50,000 documents, 811 tokens
on average), tokens a Zipf distribution, as text's do. What depends on neither may be timed on
them; a loss means nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from golf_ray.data.shards import BOS_ID, write_shard

QUANTILES = (0.10, 0.50, 0.90, 0.99, 1 - 1 / 50_000)
LENGTHS = (149, 476, 1596, 5681, 79464)
"""Tokens of a document at those quantiles, as published; the last is the longest of 50,000."""
SHORTEST = 2
ZIPF_OFFSET = 2.7
"""Of Mandelbrot's form 1 / (rank + offset)."""


def document_lengths(count: int, seed: int = 0) -> NDArray[np.int64]:
    """Lengths in tokens of `count` documents, BOS included."""
    normal = statistics.NormalDist()
    knots = [normal.inv_cdf(q) for q in QUANTILES]
    # Between the quantiles log-normal, as lengths of texts are; below the first like above it.
    slope = (np.log(LENGTHS[1]) - np.log(LENGTHS[0])) / (knots[1] - knots[0])
    below = np.log(LENGTHS[0]) - slope * (knots[0] + 5.0)
    z = np.random.default_rng(seed).standard_normal(count)
    logs = np.interp(z, [-5.0, *knots], [below, *np.log(LENGTHS)])
    return np.maximum(np.exp(logs), SHORTEST).astype(np.int64)


def random_tokens(num_tokens: int, vocab_size: int, seed: int = 0) -> NDArray[np.uint16]:
    """A stream of documents, each beginning with BOS."""
    rng = np.random.default_rng(seed)
    first = BOS_ID + 1
    weights = 1.0 / (np.arange(vocab_size - first) + ZIPF_OFFSET)
    ranks = np.searchsorted(np.cumsum(weights) / weights.sum(), rng.random(num_tokens))
    tokens = (first + np.minimum(ranks, vocab_size - first - 1)).astype(np.uint16)
    starts = np.concatenate(([0], np.cumsum(document_lengths(num_tokens // 100 + 1, seed))))
    tokens[starts[starts < num_tokens]] = BOS_ID
    return tokens


def write_random_shards(
    folder: Path, num_shards: int, tokens_a_shard: int, vocab_size: int, seed: int = 0
) -> Sequence[Path]:
    """Training shards of random documents."""
    paths = []
    for i in range(num_shards):
        path = folder / f"fineweb_train_{i:06d}.bin"
        write_shard(path, random_tokens(tokens_a_shard, vocab_size, seed + i))
        paths.append(path)
    return paths
