"""What a pool evaluates: jobs, each one checkpoint under one configuration, and their units.

A unit is what the in-process evaluation computes at once: a batch, a batch of windows, a group of
documents. So nothing about a number depends on who computed it.

Shapes: T tokens of the stream. Invariant: a job's units follow from its data, its settings and the
kind of device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from evaluators.ledger import Ledger, missing
from evaluators.packed import packed_bounds
from evaluators.planning import COSTS, plan_units
from evaluators.result import Method, Weights
from evaluators.sliding import window_batches
from evaluators.ttt import choose_documents, kept_scores, require_predictions
from golf_ray.adaptation.engine import AdapterInit, group_documents
from golf_ray.adaptation.scores import Document, DocumentScore
from golf_ray.config import AdaptationConfig, Config
from golf_ray.data.documents import cut_tokens
from golf_ray.data.tokenizer import ByteTables


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One evaluation of those that share a pool."""

    name: str
    """For people: the checkpoint, and what is special about its settings."""
    state: Callable[[], Mapping[str, Tensor]]
    """Gives the banked state dict; jobs with the same function share the weights."""
    weights: Weights
    config: Config
    method: Method
    tokens: NDArray[np.integer]
    """The validation stream [T]; jobs with the same array share it."""
    tables: ByteTables
    documents: Sequence[Document] | None = None
    """For `ttt`, those to score in place of all (or of the configured part)."""
    adapter_init: AdapterInit | None = None
    keep_token_nats: bool = False
    ledger: Ledger | None = None
    """For `ttt`: what is in it is not scored again, and every unit goes there before it counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Units:
    """The units of one job, the longest first."""

    payloads: Sequence[Any]
    costs_s: Sequence[float]
    """What each takes by the cost model: seconds of some device, of use as shares alone."""
    names: Callable[[int], str]
    count: int
    """What progress counts: documents for `ttt`, units else."""
    kept: Sequence[DocumentScore] = ()
    """Scores of a ledger, of documents that are in no unit."""
    documents: Sequence[Document] = ()
    """All of a `ttt` job, those kept included."""


def units_of(job: Job, device: str) -> Units:
    """What is to be done for a job.

    Args:
        device: `cuda` or `cpu`.

    Raises:
        DataError: there is nothing to score.
    """
    evaluation, adaptation = job.config.evaluation, job.config.adaptation
    if job.method == "ttt":
        chosen = job.documents
        documents = choose_documents(job.tokens, adaptation) if chosen is None else chosen
        require_predictions(documents)
        todo = missing(
            document_units(documents, adaptation, device),
            job.ledger,
            token_nats=job.keep_token_nats,
        )
        cost = COSTS[device]
        return Units(
            payloads=todo,
            costs_s=[cost.together_s([d.num_predictions for d in u], adaptation) for u in todo],
            names=lambda number: _name(todo[number]),
            count=len(documents),
            kept=kept_scores(documents, todo, job.ledger),
            documents=documents,
        )
    cut = cut_tokens(job.tokens, evaluation.seq_len)
    batches: Sequence[Any] = (
        packed_bounds(len(cut), evaluation)
        if job.method == "packed"
        else window_batches(len(cut) - 1, evaluation)
    )
    return Units(
        payloads=batches,
        costs_s=[1.0] * len(batches),
        names=lambda number: f"batch {number}",
        count=len(batches),
    )


def document_units(
    documents: Sequence[Document], adaptation: AdaptationConfig, device: str
) -> list[Sequence[Document]]:
    """Documents that an actor takes at once, the longest first; a function of lengths and settings.

    On a CPU the planned groups, because what is computed together decides the last bits. A GPU
    takes some seconds of work, in which documents of several groups run together.
    """
    if device == "cpu":
        return list(group_documents(documents, adaptation))
    ordered = sorted(documents, key=lambda document: document.index)
    lengths = [document.num_predictions for document in ordered]
    units = plan_units(lengths, adaptation, COSTS["cuda"])
    return [[ordered[place] for place in unit.members] for unit in units]


def _name(members: Sequence[Document]) -> str:
    numbers = ", ".join(str(document.index) for document in members[:4])
    return f"the group of document{'s' * (len(members) > 1)} {numbers}" + (
        f" and {len(members) - 4} more" if len(members) > 4 else ""
    )
