"""Evaluation on a pool of Ray actors: any method, any number of checkpoints and settings.

All jobs share the actors; each actor turns to another job's model when the units of one are given
out. What is decided and added up is in `evaluators.watch`, what is computed in `evaluators.worker`.

Invariant: the same `EvaluationResult` as `evaluators.result.evaluate` gives, up to the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from evaluators.jobs import Job, units_of
from evaluators.ledger import Ledger
from evaluators.packed import Progress
from evaluators.pool import PoolEvent, PoolReport, Shared, WorkPool
from evaluators.result import EvaluationResult, Method, Weights
from evaluators.watch import OnStatus, Status, Watch
from evaluators.worker import STATE_S, EvaluationWorker, Order
from golf_ray.adaptation.engine import AdapterInit
from golf_ray.adaptation.scores import Document
from golf_ray.config import Config
from golf_ray.data.tokenizer import ByteTables
from golf_ray.errors import EvaluationFailed
from golf_ray.model.arrays import arrays_of

OnEvent = Callable[[PoolEvent], None]
OnReport = Callable[[PoolReport], None]


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
    on_event: OnEvent | None = None,
    on_report: OnReport | None = None,
    ledger: Ledger | None = None,
) -> EvaluationResult:
    """Evaluate weights on a validation stream with actors of the connected cluster.

    Args:
        state: the banked state dict.
        tokens, tables, weights, documents, adapter_init, keep_token_nats, progress: as for
            `evaluators.result.evaluate`.
        num_actors, on_event, on_report, ledger: as for `evaluate_jobs_on_ray`, and its `Job`.

    Raises:
        EvaluationFailed: not everything could be scored; there is no score then.
        GolfRayError: as `evaluate_jobs_on_ray`.
    """
    job = Job(
        name="the checkpoint",
        state=lambda: state,
        weights=weights,
        config=config,
        method=method,
        tokens=tokens,
        tables=tables,
        documents=documents,
        adapter_init=adapter_init,
        keep_token_nats=keep_token_nats,
        ledger=ledger,
    )

    def told(status: Status) -> None:
        assert progress is not None
        progress(status.done, status.count, status.running)

    [outcome] = evaluate_jobs_on_ray(
        [job],
        num_actors=num_actors,
        on_status=None if progress is None else told,
        on_event=on_event,
        on_report=on_report,
    )
    if isinstance(outcome, EvaluationFailed):
        raise outcome
    return outcome


def evaluate_jobs_on_ray(
    jobs: Sequence[Job],
    *,
    num_actors: int | None = None,
    on_status: OnStatus | None = None,
    on_event: OnEvent | None = None,
    on_report: OnReport | None = None,
    state_s: float = STATE_S,
) -> list[EvaluationResult | EvaluationFailed]:
    """Evaluate jobs with one pool of actors of the connected cluster.

    Args:
        jobs: of one cluster configuration; they are begun in this order.
        num_actors: None for `cluster.eval_actors`; never more than there are units.
        on_status: told of every result.
        on_event: told of actors that become ready or are lost.
        on_report: told at the end how the pool's work went, if anything was to be done.
        state_s: how often the state of a long document is stored beside its job's ledger.

    Returns:
        Of each job its result, or why there is none.

    Raises:
        DataError: a job has nothing to score.
        ClusterError: no actor could be started.
        StorageError: a ledger cannot be written.
        CheckpointError: weights are not what the configuration asks for.
    """
    cluster = jobs[0].config.cluster
    assert all(job.config.cluster == cluster for job in jobs)
    device = cluster.tensor_device
    planned = [(job, units_of(job, device)) for job in jobs]
    watch = Watch(planned, device, on_status=on_status, state_s=state_s)
    units = watch.units
    if not units:
        return watch.outcomes()
    bundle = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        bundle["GPU"] = cluster.gpus_per_worker

    def happened(event: PoolEvent) -> None:
        if event.kind == "ready":
            watch.began()
        if on_event is not None:
            on_event(event)

    pool: WorkPool[Any, Any] = WorkPool(
        EvaluationWorker,
        _parts(jobs, device, state_s),
        num_actors=min(num_actors or cluster.eval_actors, len(units)),
        bundle=bundle,
        hang_timeout_s=cluster.hang_timeout_s,
        start_timeout_s=cluster.start_timeout_s,
        on_event=happened,
    )
    watch.actors = lambda: pool.num_ready
    with pool:
        try:
            _, report = pool.run(
                units, describe=watch.name, on_result=watch.scored, on_failed=watch.failed
            )
        except EvaluationFailed as error:
            return watch.outcomes(error)
    if on_report is not None:
        on_report(report)
    return watch.outcomes()


def _parts(jobs: Sequence[Job], device: str, state_s: float) -> tuple[Any, ...]:
    """What a worker is made of; weights and streams of several jobs lie in the store once."""
    weights: dict[int, tuple[int, Shared]] = {}
    streams: dict[int, tuple[int, Shared]] = {}
    orders = []
    for job in jobs:
        if id(job.state) not in weights:
            shared = Shared(arrays_of(job.state()))
            weights[id(job.state)] = len(weights), shared
        if id(job.tokens) not in streams:
            shared = Shared((np.asarray(job.tokens), job.tables))
            streams[id(job.tokens)] = len(streams), shared
        adapters = job.adapter_init
        orders.append(
            Order(
                config=job.config,
                method=job.method,
                device=device,
                keep_token_nats=job.keep_token_nats,
                weights=weights[id(job.state)][0],
                stream=streams[id(job.tokens)][0],
                adapter_init=None if adapters is None else arrays_of(_by_text(adapters)),
                states=None if job.ledger is None else job.ledger.states_uri,
                state_s=state_s,
            )
        )
    return orders, [w for _, w in weights.values()], [s for _, s in streams.values()]


def _by_text(adapter_init: AdapterInit) -> dict[str, Tensor]:
    return {str(width): a for width, a in adapter_init.items()}
