"""How the jobs of a pool go on: scores so far, what they are worth, how long the rest will take.

The driver's own account. Every result passes here, is stored first where scores are kept, and then
counts.

Invariant: a job's total is summed in document order, or in the order of its units.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from evaluators.jobs import Job, Units
from evaluators.planning import COSTS, plan_units, simulate
from evaluators.result import EvaluationResult, LimitCheck
from evaluators.scheduling import Unit
from evaluators.ttt import choose_documents, estimate_whole, total_of
from golf_ray.adaptation.scores import DocumentScore
from golf_ray.errors import EvaluationFailed
from golf_ray.metric import LN2, Score, total

LIMIT_GPUS = 8
"""GPUs that the limit on seconds is meant for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """How an evaluation goes on."""

    job: int
    """Number of the job that the last result is of."""
    num_jobs: int
    done: int
    """Documents (`ttt`) or units of that job that are scored, those kept before included."""
    count: int
    """Of how many."""
    running: Score
    """Of what is scored of it so far; long documents come first."""
    standard_error_bpb: float | None
    """Of the running bpb, as if what is scored were drawn at random; of documents alone."""
    actors: int
    seconds_left: float | None
    """For all jobs, by the cost model and what units have taken so far."""


OnStatus = Callable[[Status], None]


@dataclass(slots=True)
class RatioSpread:
    """The standard error of a ratio of sums, nats over bytes, as more of them come.

    Linearised as in Cochran, Sampling Techniques, 3rd ed. (1977), 2.11, with the finite-population
    correction.
    """

    n: int = 0
    nats: float = 0.0
    num_bytes: float = 0.0
    nats2: float = 0.0
    num_bytes2: float = 0.0
    both: float = 0.0

    def add(self, nats: float, num_bytes: float) -> None:
        """One more."""
        self.n += 1
        self.nats += nats
        self.num_bytes += num_bytes
        self.nats2 += nats * nats
        self.num_bytes2 += num_bytes * num_bytes
        self.both += nats * num_bytes

    def standard_error_bpb(self, count: int) -> float | None:
        """In bits per byte, where there are `count` in all; None while nothing can be said."""
        if self.n < 2 or not self.num_bytes:
            return None
        ratio = self.nats / self.num_bytes
        squares = self.nats2 - 2 * ratio * self.both + ratio * ratio * self.num_bytes2
        part = max(0.0, 1 - self.n / count)
        variance = max(0.0, squares) * self.n / (self.n - 1) * part
        return math.sqrt(variance) / self.num_bytes / LN2


@dataclass(slots=True, eq=False)
class _Account:
    """One job."""

    job: Job
    units: Units
    device: str
    results: dict[int, Any] = field(default_factory=dict)
    failures: list[EvaluationFailed] = field(default_factory=list)
    running: Score = field(default_factory=Score.zero)
    spread: RatioSpread = field(default_factory=RatioSpread)
    done: int = 0
    busy_s: float = 0.0
    cost_s: float = 0.0
    """Of the units that have a result."""
    ended_s: float | None = None


class Watch:
    """The account of a pool's jobs. A unit is a pair: numbers of the job and of its unit.

    Args:
        jobs: with their units.
        device: `cuda` or `cpu`.
        on_status: told of every result.
        state_s: seconds after which states of documents may lie about.
    """

    def __init__(
        self,
        jobs: Sequence[tuple[Job, Units]],
        device: str,
        *,
        on_status: OnStatus | None,
        state_s: float,
    ) -> None:
        self.actors: Callable[[], int] = lambda: 0
        """Gives the number of actors at work."""
        self._on_status = on_status
        self._state_s = state_s
        self._begun, self._began_s = False, time.perf_counter()
        self._accounts = [_Account(job, units, device) for job, units in jobs]
        self._left: dict[Unit, float] = {
            (number, unit): cost_s
            for number, (_, units) in enumerate(jobs)
            for unit, cost_s in enumerate(units.costs_s)
        }
        for account in self._accounts:
            account.running = total_of(account.units.kept)
            for score in account.units.kept:
                account.spread.add(score.nats, score.num_bytes)
            account.done = len(account.units.kept)

    @property
    def units(self) -> dict[Unit, Any]:
        """Payloads of all jobs, one job after the other: each turns to another model once."""
        return {
            (number, unit): (number, payload)
            for number, account in enumerate(self._accounts)
            for unit, payload in enumerate(account.units.payloads)
        }

    def name(self, unit: Unit) -> str:
        """A unit's name for people."""
        account, number = self._of(unit)
        name = account.units.names(number)
        return name if len(self._accounts) == 1 else f"{name} of {account.job.name}"

    def began(self) -> None:
        """An actor is ready; the first of them counts."""
        if not self._begun:
            self._begun, self._began_s = True, time.perf_counter()

    def scored(self, unit: Unit, result: Any, seconds: float) -> None:
        """A unit has its result.

        Raises:
            StorageError: it cannot be kept.
        """
        account, number = self._of(unit)
        if isinstance(result, Score):
            account.done += 1
            account.running += result
        else:
            self._keep(account, result, seconds)
            account.done += len(result)
            for score in result:
                account.running += score.score
                account.spread.add(score.nats, score.num_bytes)
        account.results[number] = result
        account.busy_s += seconds
        account.cost_s += self._left.pop(unit)
        if len(account.results) == len(account.units.payloads):
            account.ended_s = time.perf_counter()
            if account.job.ledger is not None:
                account.job.ledger.forget_states()
        if self._on_status is not None:
            self._on_status(self._status(account))

    def failed(self, unit: Unit, error: EvaluationFailed) -> Iterable[Unit]:
        """A unit is given up; gives the units that are of no use without it."""
        account, _ = self._of(unit)
        account.failures.append(error)
        self._left.pop(unit)
        if account.job.ledger is not None:
            return []
        # Nothing is kept, so nothing would come of the rest.
        rest = [name for name in self._left if self._of(name)[0] is account]
        for name in rest:
            del self._left[name]
        return rest

    def outcomes(
        self, error: EvaluationFailed | None = None
    ) -> list[EvaluationResult | EvaluationFailed]:
        """Of each job: its result, or why there is none.

        Args:
            error: what ended the pool before its time.
        """
        return [self._outcome(account, error) for account in self._accounts]

    def _of(self, unit: Unit) -> tuple[_Account, int]:
        assert isinstance(unit, tuple)
        return self._accounts[unit[0]], unit[1]

    # One job ----------------------------------------------------------------------------------

    def _keep(self, account: _Account, scores: Sequence[DocumentScore], seconds: float) -> None:
        ledger = account.job.ledger
        if ledger is None:
            return
        ledger.add(scores)
        if seconds >= self._state_s:
            for score in scores:
                ledger.forget_state(score.index)

    def _status(self, account: _Account) -> Status:
        return Status(
            job=self._accounts.index(account),
            num_jobs=len(self._accounts),
            done=account.done,
            count=account.units.count,
            running=account.running,
            standard_error_bpb=account.spread.standard_error_bpb(account.units.count),
            actors=self.actors(),
            seconds_left=self._seconds_left(),
        )

    def _seconds_left(self) -> float | None:
        cost_s = sum(account.cost_s for account in self._accounts)
        actors = self.actors()
        if not cost_s or not actors:
            return None
        pace = sum(account.busy_s for account in self._accounts) / cost_s
        return pace * max(sum(self._left.values()) / actors, max(self._left.values(), default=0.0))

    def _outcome(
        self, account: _Account, error: EvaluationFailed | None
    ) -> EvaluationResult | EvaluationFailed:
        job, units = account.job, account.units
        if len(account.results) < len(units.payloads):
            return self._incomplete(account, error)
        parts = [account.results[number] for number in range(len(units.payloads))]
        scores: tuple[DocumentScore, ...] | None = None
        estimate = None
        if job.method == "ttt":
            found = [*units.kept, *(score for part in parts for score in part)]
            scores = tuple(sorted(found, key=lambda score: score.index))
            score = total_of(scores)
            if job.documents is None:
                estimate = estimate_whole(scores, job.tokens, job.tables, job.config.adaptation)
        else:
            score = total(parts)
        ended_s = account.ended_s
        return EvaluationResult(
            method=job.method,
            weights=job.weights,
            score=score,
            seconds=0.0 if ended_s is None else ended_s - self._began_s,
            documents=scores,
            estimate=estimate,
            actor_seconds=account.busy_s,
            limit=self._limit(account),
        )

    def _limit(self, account: _Account) -> LimitCheck | None:
        """Whether eight such GPUs would do the whole set in time, by what this run took of one."""
        job = account.job
        if job.method != "ttt" or account.device != "cuda" or not account.cost_s:
            return None
        adaptation = dataclasses.replace(
            job.config.adaptation, sample_documents=None, document_fraction=1.0
        )
        lengths = [d.num_predictions for d in choose_documents(job.tokens, adaptation)]
        units = plan_units(lengths, adaptation, COSTS["cuda"])
        planned = simulate(units, LIMIT_GPUS, slow_share=0.0, dying_share=0.0)
        return LimitCheck(
            gpus=LIMIT_GPUS,
            predicted_s=planned.makespan_s * account.busy_s / account.cost_s,
            limit_s=job.config.evaluation.limit_s,
        )

    def _incomplete(self, account: _Account, error: EvaluationFailed | None) -> EvaluationFailed:
        """The error with what is missing, where what is scored is kept."""
        ledger, units = account.job.ledger, account.units
        failures = account.failures
        first = failures[0] if failures else error
        assert first is not None
        problem = first.problem
        if len(failures) > 1:
            problem += f"; and {len(failures) - 1} more of {account.job.name} failed"
        if ledger is None:
            remedy = first.remedy
            if account.job.method == "ttt":
                remedy += "; with --ledger DIR the others are kept"
            return EvaluationFailed(problem, remedy)
        left = [d for d in units.documents if d.index not in ledger.scores]
        tokens = sum(document.num_predictions for document in left)
        return EvaluationFailed(
            f"{problem}; {len(left):,} of {units.count:,} documents with {tokens:,} tokens are "
            "missing",
            f"{first.remedy}; the others are kept in {ledger.uri}, and the same command goes on",
        )
