"""Evaluation on a pool of Ray actors: any method, the units of the in-process one.

A unit is what the in-process evaluation computes at once: a batch, a batch of windows, a group of
documents. So nothing about a number depends on who computed it.

Invariant: the same `EvaluationResult` as `evaluators.result.evaluate` gives, up to the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluators.ledger import Ledger, missing
from evaluators.packed import Progress, packed_bounds, score_batch
from evaluators.planning import COSTS, plan_units
from evaluators.pool import PoolEvent, PoolReport, WorkPool
from evaluators.result import EvaluationResult, Method, Weights
from evaluators.sampling import Estimate
from evaluators.scheduling import Unit
from evaluators.sliding import score_windows, window_batches
from evaluators.ttt import (
    choose_documents,
    estimate_whole,
    kept_scores,
    require_predictions,
    total_of,
)
from golf_ray.adaptation.engine import AdapterInit, Engine, group_documents
from golf_ray.adaptation.scores import Document, DocumentScore
from golf_ray.config import AdaptationConfig, Config
from golf_ray.data.documents import cut_tokens
from golf_ray.data.tokenizer import ByteTables
from golf_ray.errors import ClusterError, EvaluationFailed
from golf_ray.metric import Score, total
from golf_ray.model.arrays import Arrays, arrays_of, tensors_of
from golf_ray.model.checkpoint import build_model
from golf_ray.model.compute import choose_compute


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSetup:
    """What every actor of an evaluation is told, beside weights and tokens."""

    config: Config
    method: Method
    device: str
    keep_token_nats: bool


class EvaluationWorker:
    """Scores units of one evaluation with a model of its own.

    Args:
        setup: settings.
        weights: the banked state dict, as arrays.
        tokens: the validation stream, cut to whole sequences except for `ttt`.
        tables: bytes of each token id.
        adapter_init: A by input width, or None.

    Raises:
        ClusterError: a GPU is asked for and torch finds none.
    """

    def __init__(
        self,
        setup: EvaluationSetup,
        weights: Arrays,
        tokens: NDArray[np.integer],
        tables: ByteTables,
        adapter_init: Arrays | None,
    ) -> None:
        self._setup = setup
        self._tokens = tokens
        self._tables = tables
        if setup.device == "cuda" and not torch.cuda.is_available():
            raise ClusterError(
                "an actor has no GPU that torch can use",
                "see 'golf-ray doctor' there, or compute on CPUs with --set cluster.device=cpu",
            )
        device = torch.device(setup.device)
        self._use_threads()
        self._model = build_model(
            setup.config.model,
            tensors_of(weights),
            device=device,
            compute=choose_compute(setup.config, device),
        )
        self._adapting: Engine | None = None
        self._adapter_init: AdapterInit | None = None
        if adapter_init is not None:
            self._adapter_init = {int(n): a for n, a in tensors_of(adapter_init).items()}

    def run_unit(self, payload: Any) -> Any:
        """Score one unit: bounds, windows or documents, as the method has it."""
        self._use_threads()
        config = self._setup.config
        if self._setup.method == "packed":
            seq_len = config.evaluation.seq_len
            return score_batch(self._model, self._tokens, payload, self._tables, seq_len)
        if self._setup.method == "sliding":
            return score_windows(self._model, self._tokens, payload, self._tables)
        return list(self._engine().run(payload))

    def _engine(self) -> Engine:
        """The engine of all groups: its memory is taken once."""
        if self._adapting is None:
            adaptation = self._setup.config.adaptation
            self._adapting = Engine(
                self._model,
                self._tokens,
                adaptation,
                tables=self._tables,
                num_documents=adaptation.group_documents if self._setup.device == "cpu" else None,
                adapter_init=self._adapter_init,
                keep_token_nats=self._setup.keep_token_nats,
            )
        return self._adapting

    def _use_threads(self) -> None:
        # Ray sets the number by the actor's CPUs; on a CPU it is part of the last bits.
        torch.set_num_threads(self._setup.config.evaluation.threads)


def evaluate_on_ray(
    state: Mapping[str, Tensor],
    config: Config,
    method: Method,
    *,
    tokens: NDArray[np.integer],
    tables: ByteTables,
    weights: Weights,
    num_actors: int | None = None,
    documents: Sequence[Document] | None = None,
    adapter_init: AdapterInit | None = None,
    keep_token_nats: bool = False,
    progress: Progress | None = None,
    on_event: Callable[[PoolEvent], None] | None = None,
    on_report: Callable[[PoolReport], None] | None = None,
    ledger: Ledger | None = None,
) -> EvaluationResult:
    """Evaluate weights on a validation stream with actors of the connected cluster.

    Args:
        state: the banked state dict.
        num_actors: None for `config.cluster.eval_actors`; never more than there are units.
        on_event: told of actors that become ready or are lost.
        on_report: told at the end how the pool's work went.
        ledger: for `ttt`: what is in it is not scored again, and every unit goes there before it
            counts.
        tokens, tables, weights, documents, adapter_init, keep_token_nats, progress: as for
            `evaluators.result.evaluate`.

    Raises:
        DataError: there is nothing to score.
        EvaluationFailed: not everything could be scored; there is no score then.
        ClusterError: no actor could be started.
        StorageError: the ledger cannot be written.
    """
    cluster = config.cluster
    device = cluster.device
    if device == "auto":
        device = "cuda" if cluster.gpus_per_worker > 0 else "cpu"
    work = _work(config, method, tokens, documents, device, ledger, keep_token_nats)
    setup = EvaluationSetup(
        config=config, method=method, device=device, keep_token_nats=keep_token_nats
    )
    bundle = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        bundle["GPU"] = cluster.gpus_per_worker
    adapters = None if adapter_init is None else arrays_of(_by_text(adapter_init))
    watch = _Watch(work, progress, ledger)
    if not work.units:
        return _result(method, weights, work, {}, 0.0, config, tables, documents)
    with WorkPool[Any, Any](
        EvaluationWorker,
        (setup, arrays_of(state), np.asarray(work.tokens), tables, adapters),
        num_actors=min(num_actors or cluster.eval_actors, len(work.units)),
        bundle=bundle,
        hang_timeout_s=cluster.hang_timeout_s,
        start_timeout_s=cluster.start_timeout_s,
        on_event=on_event,
    ) as pool:
        try:
            results, report = pool.run(work.units, describe=work.describe, on_result=watch.scored)
        except EvaluationFailed as error:
            raise _incomplete(error, work, ledger) from error
    if on_report is not None:
        on_report(report)
    return _result(method, weights, work, results, report.wall_s, config, tables, documents)


def _incomplete(error: EvaluationFailed, work: _Units, ledger: Ledger | None) -> EvaluationFailed:
    """The error with what is missing, where what is scored is kept."""
    if ledger is None:
        return error
    left = [
        document
        for unit in work.units.values()
        for document in unit
        if document.index not in ledger.scores
    ]
    tokens = sum(document.num_predictions for document in left)
    return EvaluationFailed(
        f"{error.problem}; {len(left):,} of {work.count:,} documents with {tokens:,} tokens are "
        "missing",
        f"{error.remedy}; the others are kept in {ledger.uri}, and the same command goes on",
    )


def _result(
    method: Method,
    weights: Weights,
    work: _Units,
    results: Mapping[Unit, Any],
    seconds: float,
    config: Config,
    tables: ByteTables,
    documents: Sequence[Document] | None,
) -> EvaluationResult:
    parts = [results[unit] for unit in work.units]
    scores: tuple[DocumentScore, ...] | None = None
    estimate: Estimate | None = None
    if method == "ttt":
        found = [*work.kept, *(s for part in parts for s in part)]
        scores = tuple(sorted(found, key=lambda s: s.index))
        score = total_of(scores)
        if documents is None:
            estimate = estimate_whole(scores, work.tokens, tables, config.adaptation)
    else:
        score = total(parts)
    return EvaluationResult(
        method=method,
        weights=weights,
        score=score,
        seconds=seconds,
        documents=scores,
        estimate=estimate,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Units:
    """The units of an evaluation, the longest first."""

    units: Mapping[Unit, Any]
    tokens: NDArray[np.integer]
    describe: Callable[[Unit], str]
    count: int
    """What progress counts: documents for `ttt`, units else."""
    kept: Sequence[DocumentScore] = ()
    """Scores of a ledger, of documents that are in no unit."""


def _work(
    config: Config,
    method: Method,
    tokens: NDArray[np.integer],
    documents: Sequence[Document] | None,
    device: str,
    ledger: Ledger | None,
    keep_token_nats: bool,
) -> _Units:
    evaluation = config.evaluation
    if method == "ttt":
        documents = choose_documents(tokens, config.adaptation) if documents is None else documents
        require_predictions(documents)
        todo = missing(
            document_units(documents, config.adaptation, device), ledger, token_nats=keep_token_nats
        )
        groups: dict[Unit, Sequence[Document]] = dict(enumerate(todo))
        return _Units(
            units=groups,
            tokens=tokens,
            describe=lambda unit: _name(groups[unit]),
            count=len(documents),
            kept=kept_scores(documents, todo, ledger),
        )
    cut = cut_tokens(tokens, evaluation.seq_len)
    batches: Sequence[Any] = (
        packed_bounds(len(cut), evaluation)
        if method == "packed"
        else window_batches(len(cut) - 1, evaluation)
    )
    return _Units(
        units=dict(enumerate(batches)),
        tokens=cut,
        describe=lambda unit: f"batch {unit}",
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


def _by_text(adapter_init: AdapterInit) -> dict[str, Tensor]:
    return {str(width): a for width, a in adapter_init.items()}


class _Watch:
    """Turns results of units into progress; what is kept is kept first."""

    def __init__(self, work: _Units, progress: Progress | None, ledger: Ledger | None) -> None:
        self._work = work
        self._progress = progress
        self._ledger = ledger
        self._done = len(work.kept)
        self._running = total_of(work.kept)

    def scored(self, unit: Unit, result: Any) -> None:
        """A unit has its result."""
        if isinstance(result, Score):
            self._done += 1
            self._running += result
        else:
            if self._ledger is not None:
                self._ledger.add(result)
            self._done += len(result)
            for score in result:
                self._running += score.score
        if self._progress is not None:
            self._progress(self._done, self._work.count, self._running)
