"""Small models, token streams and documents for the tests of adaptation and of the evaluators."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from golf_ray.adaptation.scores import Document
from golf_ray.config import AdaptationConfig, ModelConfig
from golf_ray.data.documents import document_bounds
from golf_ray.data.shards import BOS_ID
from golf_ray.data.tokenizer import ByteTables
from golf_ray.model.compute import Compute
from golf_ray.model.model import GolfModel

VOCAB_SIZE = 48
SMALL = ModelConfig(
    vocab_size=VOCAB_SIZE,
    embedding_dim=16,
    model_dim=16,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    mlp_mult=2.0,
    rope_dims=4,
    loop_start=1,
    loop_end=1,
    num_loops=1,
    parallel_start_layer=2,
    xsa_last_n=3,
)
ADAPTATION = AdaptationConfig(rank=2, chunk_size=4, window=12, lr=1e-2, group_documents=3)
TABLES = ByteTables(
    base_bytes=np.where(np.arange(VOCAB_SIZE) < 4, 0, np.arange(VOCAB_SIZE) % 7).astype(np.int16),
    has_leading_space=np.arange(VOCAB_SIZE) % 3 == 2,
    is_boundary=np.arange(VOCAB_SIZE) < 4,
)


def small_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> GolfModel:
    """A model of random weights that differ from one another everywhere."""
    generator = torch.Generator().manual_seed(seed)
    model = GolfModel(SMALL, compute=Compute(dtype=dtype)).init_weights(seed)
    with torch.no_grad():
        for name, tensor in model.tensors().items():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.add_(0.5 * noise if tensor.ndim == 3 or "tok_emb" in name else 0.1 * noise)
    return model


def stream(lengths: list[int], seed: int = 0) -> NDArray[np.uint16]:
    """A stream of documents; `lengths` are numbers of predictions, the last document's as given."""
    rng = np.random.default_rng(seed)
    tokens: list[int] = []
    for place, predictions in enumerate(lengths):
        last = place == len(lengths) - 1
        # A document's last prediction is the next one's BOS, except in the last document.
        inner = predictions if last else predictions - 1
        assert inner >= 0, "only the last document may be without predictions"
        tokens += [BOS_ID, *rng.integers(4, VOCAB_SIZE, inner).tolist()]
    return np.array(tokens, dtype=np.uint16)


def documents_of(tokens: NDArray[np.uint16]) -> tuple[Document, ...]:
    """All documents of a stream."""
    return tuple(
        Document(index=i, start=int(start), end=int(end))
        for i, (start, end) in enumerate(document_bounds(tokens))
    )


def changed_tail(
    tokens: NDArray[np.uint16],
    first: int,
    seed: int,
    vocab_size: int = VOCAB_SIZE,
    end: int | None = None,
) -> NDArray[np.uint16]:
    """Every token from `first` on (to `end`) replaced by another one; BOS stays where it is."""
    rng = np.random.default_rng(seed)
    changed = tokens.copy()
    part = changed[first:end]
    step = rng.integers(1, vocab_size - 4, len(part))
    replaced = 4 + (part.astype(np.int64) - 4 + step) % (vocab_size - 4)
    part[:] = np.where(part == BOS_ID, BOS_ID, replaced)
    return changed


def changed_borders(
    tokens: NDArray[np.uint16], first: int, seed: int, vocab_size: int
) -> NDArray[np.uint16]:
    """Every token from `first` on drawn anew, about one in thirty of them BOS."""
    rng = np.random.default_rng(seed)
    changed = tokens.copy()
    new = rng.integers(4, vocab_size, len(tokens) - first)
    changed[first:] = np.where(rng.random(len(new)) < 0.03, BOS_ID, new)
    return changed
