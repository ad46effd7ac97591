"""Sliding evaluation: overlapping windows, each token scored once with a long context before it.

Over the same cut tokens as packed evaluation, windows of `seq_len` start every `stride` tokens, as
long as start + seq_len - stride is inside; the first window scores all of its tokens, each other
those after its first seq_len - stride. Attention inside a window is cut at BOS.

Invariant: every prediction of the cut stream is scored by exactly one window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluators.packed import Progress
from golf_ray.config import EvaluationConfig
from golf_ray.data.documents import cut_tokens
from golf_ray.data.packing import pad_bounds, segment_bounds
from golf_ray.data.tokenizer import ByteTables
from golf_ray.metric import Score, total
from golf_ray.model.model import GolfModel
from golf_ray.model.segments import Segments


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Predictions [start, end) that one forward sees, of which [score_from, end) are scored."""

    start: int
    score_from: int
    end: int


def sliding_windows(num_predictions: int, seq_len: int, stride: int) -> tuple[Window, ...]:
    """All windows over a stream, in order; the last may be cut short by its end."""
    starts = range(0, max(1, num_predictions - (seq_len - stride)), stride)
    return tuple(
        Window(
            start=start,
            score_from=start + (seq_len - stride if start else 0),
            end=min(start + seq_len, num_predictions),
        )
        for start in starts
    )


@torch.no_grad()
def window_losses(
    model: GolfModel,
    tokens: NDArray[np.integer],
    windows: Sequence[Window],
    *,
    loop: bool = True,
) -> Tensor:
    """The losses of what some windows score, in their order, computed as one flat batch.

    Returns:
        float32 [sum of end - score_from], on the model's device.
    """
    device = next(model.parameters()).device
    ids = [np.asarray(tokens[w.start : w.end + 1]).astype(np.int64) for w in windows]
    lengths = [len(i) - 1 for i in ids]
    # A window is no longer than one segment may be, so only BOS cuts it.
    pieces = [np.diff(segment_bounds(i[:-1], len(i))) for i in ids]
    bounds = np.concatenate([[0], np.concatenate(pieces).cumsum()]).astype(np.int32)
    segments = Segments.of_bounds(pad_bounds(bounds, sum(lengths)), max(lengths), device)
    x_T = torch.from_numpy(np.concatenate([i[:-1] for i in ids])).to(device)
    x_TD = model.hidden(x_T, segments, loop=loop)
    kept = np.concatenate([np.arange(w.start, w.end) >= w.score_from for w in windows])
    places = torch.from_numpy(np.flatnonzero(kept)).to(device)
    y_T = torch.from_numpy(np.concatenate([i[1:] for i in ids])[kept]).to(device)
    return model.token_losses(x_TD.index_select(0, places), y_T)


def score_windows(
    model: GolfModel,
    tokens: NDArray[np.integer],
    windows: Sequence[Window],
    tables: ByteTables,
    *,
    loop: bool = True,
) -> Score:
    """The score of some consecutive windows."""
    losses_T = window_losses(model, tokens, windows, loop=loop)
    ids = np.asarray(tokens[windows[0].score_from : windows[-1].end + 1])
    assert len(ids) - 1 == len(losses_T)
    return Score(
        nats=float(losses_T.double().sum()),
        tokens=len(losses_T),
        num_bytes=int(tables.count(ids[:-1], ids[1:]).sum()),
    )


def window_batches(
    num_predictions: int, evaluation: EvaluationConfig
) -> tuple[tuple[Window, ...], ...]:
    """All windows in flat batches of `batch_tokens`."""
    windows = sliding_windows(num_predictions, evaluation.seq_len, evaluation.stride)
    size = evaluation.batch_tokens // evaluation.seq_len
    return tuple(windows[i : i + size] for i in range(0, len(windows), size))


def score_sliding(
    model: GolfModel,
    tokens: NDArray[np.integer],
    tables: ByteTables,
    evaluation: EvaluationConfig,
    *,
    loop: bool = True,
    progress: Progress | None = None,
) -> Score:
    """The sliding score of a stream of tokens.

    Raises:
        DataError: the tokens are fewer than one sequence.
    """
    tokens = cut_tokens(tokens, evaluation.seq_len)
    batches = window_batches(len(tokens) - 1, evaluation)
    scores: list[Score] = []
    running = Score.zero()
    for batch in batches:
        scores.append(score_windows(model, tokens, batch, tables, loop=loop))
        running += scores[-1]
        if progress is not None:
            progress(len(scores), len(batches), running)
    return total(scores)
