"""What an evaluation says, and the one function that runs any of them in this process.

A result names the weights that it is of and how much it scored, so that no number can be quoted
without them. The actor pool gives the same type.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from evaluators.ledger import Ledger
from evaluators.packed import Progress, score_packed
from evaluators.sampling import Estimate
from evaluators.sliding import score_sliding
from evaluators.ttt import estimate_whole, score_documents, total_of
from golf_ray.adaptation.engine import AdapterInit, Tell
from golf_ray.adaptation.scores import Document, DocumentScore
from golf_ray.config import Config
from golf_ray.data.tokenizer import ByteTables
from golf_ray.metric import Score
from golf_ray.model.model import GolfModel

Method = Literal["packed", "sliding", "ttt"]
Weights = Literal["full", "int6"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitCheck:
    """Whether an evaluation of the whole set would end in time."""

    gpus: int
    predicted_s: float
    """On so many GPUs like those that were measured, by the cost model, without start-up."""
    limit_s: float

    @property
    def fits(self) -> bool:
        """Whether the prediction is within the limit."""
        return self.predicted_s <= self.limit_s

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**dataclasses.asdict(self), "fits": self.fits}


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationResult:
    """The outcome of one evaluation."""

    method: Method
    weights: Weights
    """`full` for a checkpoint's own weights, `int6` for those of a quantised artifact."""
    score: Score
    """Sums over what was scored: of a sample, over the sample alone."""
    seconds: float
    """Wall time of the evaluation, without loading of weights and data."""
    documents: tuple[DocumentScore, ...] | None = None
    """Scores in document order, for `ttt`."""
    estimate: Estimate | None = None
    """What they say of all documents, where they are a sample of `ttt`."""
    actor_seconds: float | None = None
    """Sum of the time that actors computed on it in this run; None for this process."""
    limit: LimitCheck | None = None
    """Of `ttt` on GPUs."""

    @property
    def whole(self) -> Score:
        """Sums over the whole validation set, estimated where a sample was scored."""
        return self.score if self.estimate is None else self.estimate.whole

    def to_dict(self, *, per_document: bool = False) -> dict[str, Any]:
        """Plain data for JSON: loss and bpb of the whole set, tokens and bytes of what was scored.

        Args:
            per_document: add `documents`, each with its sums.
        """
        data: dict[str, Any] = {
            "method": self.method,
            "val_loss_nats": self.whole.loss_nats,
            "val_bpb": self.whole.bpb,
            "tokens_scored": self.score.tokens,
            "bytes_scored": self.score.num_bytes,
            "weights": self.weights,
            "seconds": self.seconds,
        }
        if self.actor_seconds is not None:
            data["actor_seconds"] = self.actor_seconds
        if self.limit is not None:
            data["limit"] = self.limit.to_dict()
        if self.estimate is not None:
            data["estimate"] = self.estimate.to_dict()
        if self.documents is not None:
            data["documents_scored"] = len(self.documents)
            if per_document:
                data["documents"] = [
                    {"index": d.index, "nats": d.nats, "tokens": d.tokens, "bytes": d.num_bytes}
                    for d in self.documents
                ]
        return data


def evaluate(
    model: GolfModel,
    config: Config,
    method: Method,
    *,
    tokens: NDArray[np.integer],
    tables: ByteTables,
    weights: Weights,
    documents: Sequence[Document] | None = None,
    adapter_init: AdapterInit | None = None,
    keep_token_nats: bool = False,
    progress: Progress | None = None,
    tell: Tell | None = None,
    ledger: Ledger | None = None,
) -> EvaluationResult:
    """Evaluate a model on a validation stream in this process.

    The number of CPU threads is the caller's to set, from `config.evaluation.threads`: on a CPU it
    is part of the last bits.

    Args:
        tokens: the whole validation stream.
        tables: bytes of each token.
        weights: what the model's weights are.
        documents: for `ttt`, those to score in place of all (or of the configured part).
        adapter_init: for `ttt`, A by input width in place of the random ones.
        keep_token_nats: for `ttt`, keep every loss.
        progress: told of every batch (packed, sliding) or document (ttt).
        tell: for `ttt`, told how many documents are taken at a time, and of a lack of memory.
        ledger: for `ttt`, what is kept between runs.

    Raises:
        DataError: there is nothing to score.
    """
    began_s = time.perf_counter()
    scores: tuple[DocumentScore, ...] | None = None
    estimate: Estimate | None = None
    if method == "ttt":
        scores = score_documents(
            model, tokens, tables, config.adaptation, documents=documents,
            adapter_init=adapter_init, keep_token_nats=keep_token_nats, progress=progress,
            tell=tell, ledger=ledger,
        )  # fmt: skip
        score = total_of(scores)
        if documents is None:
            estimate = estimate_whole(scores, tokens, tables, config.adaptation)
    elif method == "packed":
        score = score_packed(model, tokens, tables, config.evaluation, progress=progress)
    else:
        assert method == "sliding", method
        score = score_sliding(model, tokens, tables, config.evaluation, progress=progress)
    return EvaluationResult(
        method=method,
        weights=weights,
        score=score,
        seconds=time.perf_counter() - began_s,
        documents=scores,
        estimate=estimate,
    )
