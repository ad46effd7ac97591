"""Packed evaluation: the validation stream in flat batches, each token scored once.

Tokens are cut to whole sequences (`golf_ray.data.documents.cut_tokens`) and taken in flat batches,
with attention segments at every BOS and every `seq_len` tokens after it. A batch border cuts
documents, so the batch size is part of the result's identity. The last batch may be shorter; it is
scored like the others.

Invariant: the sums are those of a fixed list of batches, whatever the number of workers, so a batch
is a unit that anyone may compute.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from golf_ray.config import EvaluationConfig
from golf_ray.data.documents import cut_tokens
from golf_ray.data.packing import pack
from golf_ray.data.tokenizer import ByteTables
from golf_ray.metric import Score, total
from golf_ray.model.model import GolfModel
from golf_ray.model.segments import Segments

Progress = Callable[[int, int, Score], None]
"""Told after every step: units done, units in all, score so far."""


def packed_bounds(num_tokens: int, evaluation: EvaluationConfig) -> tuple[tuple[int, int], ...]:
    """Predictions [start, end) of every batch over a stream of `num_tokens` cut tokens."""
    size = evaluation.batch_tokens
    count = num_tokens - 1
    return tuple((start, min(start + size, count)) for start in range(0, count, size))


@torch.no_grad()
def batch_losses(
    model: GolfModel,
    tokens: NDArray[np.integer],
    bounds: tuple[int, int],
    seq_len: int,
    *,
    loop: bool = True,
) -> Tensor:
    """The losses of one batch in order, float32 [end - start], on the model's device.

    Args:
        tokens: the cut stream.
        bounds: predictions [start, end) of the batch.
        seq_len: longest segment.
        loop: whether the looped layers are looped (they are, once a model is trained).
    """
    device = next(model.parameters()).device
    batch = pack(tokens[bounds[0] : bounds[1] + 1], seq_len)
    segments = Segments.of_bounds(batch.cu_seqlens, batch.max_seqlen, device)
    x_TD = model.hidden(torch.from_numpy(batch.x).to(device), segments, loop=loop)
    return model.token_losses(x_TD, torch.from_numpy(batch.y).to(device))


def score_batch(
    model: GolfModel,
    tokens: NDArray[np.integer],
    bounds: tuple[int, int],
    tables: ByteTables,
    seq_len: int,
    *,
    loop: bool = True,
) -> Score:
    """The score of one batch; the arguments are those of `batch_losses`."""
    start, end = bounds
    losses_T = batch_losses(model, tokens, bounds, seq_len, loop=loop)
    ids = np.asarray(tokens[start : end + 1])
    return Score(
        nats=float(losses_T.double().sum()),
        tokens=end - start,
        num_bytes=int(tables.count(ids[:-1], ids[1:]).sum()),
    )


def score_packed(
    model: GolfModel,
    tokens: NDArray[np.integer],
    tables: ByteTables,
    evaluation: EvaluationConfig,
    *,
    loop: bool = True,
    progress: Progress | None = None,
) -> Score:
    """The packed score of a stream of tokens.

    Raises:
        DataError: the tokens are fewer than one sequence.
    """
    tokens = cut_tokens(tokens, evaluation.seq_len)
    plan = packed_bounds(len(tokens), evaluation)
    scores: list[Score] = []
    running = Score.zero()
    for bounds in plan:
        scores.append(score_batch(model, tokens, bounds, tables, evaluation.seq_len, loop=loop))
        running += scores[-1]
        if progress is not None:
            progress(len(scores), len(plan), running)
    return total(scores)
