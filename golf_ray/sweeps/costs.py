"""What a sweep will cost, said before it runs: GPU-hours, dollars, and how long until it ends.

Pure functions of a configuration, of seconds that were measured, and of a cluster's size. It starts
nothing, reads no file, and promises nothing: an estimate says where its seconds come from.

Invariant: what is not known is None and is said to be unknown; it is never counted as 0 in a sum
that looks whole. What is known of an unknown sum is its lower bound.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final, Literal

from golf_ray.config import Config
from golf_ray.errors import UsageError

Part = Literal["start", "train", "calibrate", "quantize", "evaluate"]
"""Parts of trials: the first three are once a training, the others once a trial."""
Source = Literal["measured", "cap", "estimated", "unknown"]
Kind = Literal["GPU", "CPU"]

PARTS: Final[tuple[Part, ...]] = ("start", "train", "calibrate", "quantize", "evaluate")
PRICE_PER_GPU_HOUR: Final = 2.75
"""$22 an hour for a node of eight H100s."""
START_S: Final[Mapping[Kind, float]] = {"CPU": 14.0, "GPU": 20.0}
"""Until workers train: two on CPUs, and two on H200s."""
SOURCES: Final[Mapping[Source, str]] = {
    "measured": "measured here",
    "cap": "the configuration's wall-clock cap",
    "estimated": "estimated",
    "unknown": "unknown",
}
_NAMES: Final[Mapping[Part, str]] = {
    "start": "start-up",
    "train": "training",
    "calibrate": "calibration",
    "quantize": "quantisation",
    "evaluate": "evaluation",
}
_TOLERANCE: Final = 1e-9


# Seconds ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSeconds:
    """Seconds of each part of a trial, by wall clock; None for what is not known."""

    start_s: float | None = None
    """Until a training's workers train."""
    train_s: float | None = None
    calibrate_s: float | None = None
    """Of the Hessians, once a training; 0 where they are part of quantising."""
    quantize_s: float | None = None
    evaluate_s: float | None = None
    """On the units that the light work of a trial holds."""
    sources: Mapping[Part, Source]
    """Where each number that is known comes from."""

    def __post_init__(self) -> None:
        for part in PARTS:
            value = self.get(part)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{part}_s = {value} is no time", "give seconds or None")
            assert value is None or part in self.sources

    def get(self, part: Part) -> float | None:
        """Seconds of a part."""
        value: float | None = getattr(self, f"{part}_s")
        return value

    def source(self, part: Part) -> Source:
        """Where a part's seconds come from."""
        return "unknown" if self.get(part) is None else self.sources[part]


def estimate_stages(
    config: Config,
    *,
    measured: Mapping[Part, Sequence[float]] | None = None,
    document_lengths: Sequence[int] | None = None,
    light_units: int = 1,
) -> StageSeconds:
    """Seconds of each part, from what is known before a sweep.

    What was measured of like runs comes first: a cost model is of one machine and one model. Of
    several values it is the median, as a slow host or a cold cache is not what to expect.

    Args:
        config: of the sweep's base.
        measured: seconds of like runs of this storage, by part.
        document_lengths: predictions of each document that an evaluation scores.
        light_units: GPUs (or actors on a CPU) of one evaluation.
    """
    known = {part: values for part, values in (measured or {}).items() if values}
    seconds: dict[Part, float | None] = {part: median(known[part]) for part in known}
    sources: dict[Part, Source] = {part: "measured" for part in known}
    fallbacks: list[tuple[Part, float | None, Source]] = [
        ("start", START_S[unit_kind(config)], "estimated"),
        ("train", config.train.max_wallclock_s, "cap"),
    ]
    if "evaluate" not in known and document_lengths is not None:
        evaluate_s = estimate_evaluation(config, document_lengths, light_units)
        fallbacks.append(("evaluate", evaluate_s, "estimated"))
    for part, value, source in fallbacks:
        if part not in seconds and value is not None:
            seconds[part], sources[part] = value, source
    return StageSeconds(
        **{f"{part}_s": seconds.get(part) for part in PARTS},
        sources=sources,
    )


def estimate_evaluation(
    config: Config, document_lengths: Sequence[int], num_actors: int = 1
) -> float | None:
    """Seconds of test-time training on documents, by the cost model of `evaluators.planning`.

    There is a model for the record's network on a GPU and for the laptop's on a CPU; of another
    network nothing is known. It leaves out start-up and compilation.

    Args:
        document_lengths: predictions of each document that is scored.
        num_actors: actors that share the documents.

    Returns:
        None where no model fits.
    """
    from evaluators.planning import COSTS, plan_units, simulate
    from golf_ray.presets import LAPTOP, RECORD

    device = config.cluster.tensor_device
    like = (RECORD if device == "cuda" else LAPTOP).model
    model = config.model
    if any(
        getattr(model, name) != getattr(like, name)
        for name in ("model_dim", "num_layers", "num_loops", "mlp_mult")
    ):
        return None
    if not any(document_lengths):
        return None
    units = plan_units(
        document_lengths, config.adaptation, COSTS[device], keep_groups=device == "cpu"
    )
    return simulate(units, num_actors, slow_share=0.0, dying_share=0.0).makespan_s


def unit_kind(config: Config) -> Kind:
    """What a sweep of this configuration is counted in."""
    return "GPU" if config.cluster.gpus_per_worker > 0 else "CPU"


def training_units(config: Config) -> float:
    """GPUs that one training holds, or CPUs where it takes no GPU."""
    cluster = config.cluster
    return cluster.num_workers * (cluster.gpus_per_worker or cluster.cpus_per_worker)


# The schedule -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Work that holds some units of a cluster for some time."""

    units: float
    wall_s: float
    after: int | None = None
    """Place in the list of the job that it waits for, which comes before it."""


def schedule(
    jobs: Sequence[Job], units: float, *, max_at_once: int | None = None
) -> tuple[float, ...]:
    """When each job begins, if whatever is ready and fits begins at once, in order of the list.

    List scheduling (Graham, 1969): greedy and without foresight, as a queue is. Jobs of less
    width pass a wide one that does not fit yet.

    Args:
        units: of the cluster.
        max_at_once: jobs at a time at most.

    Raises:
        UsageError: a job is wider than the cluster.
    """
    widest = max((job.units for job in jobs), default=0.0)
    if widest > units + _TOLERANCE:
        raise UsageError(f"{widest:g} units are more than the cluster's {units:g}",
                         "ask for fewer workers or a larger cluster")  # fmt: skip
    following: dict[int, list[int]] = {}
    ready: dict[float, list[int]] = {job.units: [] for job in jobs}
    for place, job in enumerate(jobs):
        if job.after is None:
            ready[job.units].append(place)
        else:
            assert job.after < place
            following.setdefault(job.after, []).append(place)
    begins = [math.nan] * len(jobs)
    running: list[tuple[float, int]] = []
    now_s, free = 0.0, units
    while True:
        # Of each width the first in the list is enough to look at: heaps keep it in front.
        fit = [heap[0] for width, heap in ready.items() if heap and width <= free + _TOLERANCE]
        if fit and (max_at_once is None or len(running) < max_at_once):
            place = heapq.heappop(ready[jobs[min(fit)].units])
            begins[place] = now_s
            heapq.heappush(running, (now_s + jobs[place].wall_s, place))
            free -= jobs[place].units
            continue
        if not running:
            break
        now_s = running[0][0]
        while running and running[0][0] <= now_s:
            _, place = heapq.heappop(running)
            free += jobs[place].units
            for later in following.get(place, ()):
                heapq.heappush(ready[jobs[later].units], later)
    assert not any(math.isnan(begin) for begin in begins)
    return tuple(begins)


def makespan(jobs: Sequence[Job], units: float, *, max_at_once: int | None = None) -> float:
    """When the last job of `schedule` ends.

    Raises:
        UsageError: a job is wider than the cluster.
    """
    begins = schedule(jobs, units, max_at_once=max_at_once)
    return max((b + job.wall_s for b, job in zip(begins, jobs, strict=True)), default=0.0)


def least_makespan(jobs: Sequence[Job], units: float, *, max_at_once: int | None = None) -> float:
    """Below which no order of the jobs comes: all units busy, or the longest chain."""
    ends: list[float] = []
    for job in jobs:
        ends.append(job.wall_s + (ends[job.after] if job.after is not None else 0.0))
    work = sum(job.units * job.wall_s for job in jobs) / units
    slots = sum(job.wall_s for job in jobs) / (max_at_once or math.inf)
    return max(work, slots, max(ends, default=0.0))


def sweep_jobs(
    stages: StageSeconds,
    *,
    num_trials: int,
    evals_per_training: int,
    training: float,
    light: float,
) -> list[Job]:
    """The jobs of a sweep, trainings first: they are long and wide, and all else waits for them.

    What is unknown takes no time here.

    Args:
        training: units of one training.
        light: units of a trial's quantising and evaluating; calibration has as many.
    """
    num = math.ceil(num_trials / evals_per_training)
    once_s = (stages.start_s or 0.0) + (stages.train_s or 0.0)
    jobs = [Job(units=training, wall_s=once_s) for _ in range(num)]
    calibrate_s = stages.calibrate_s or 0.0
    first = 0
    if calibrate_s:
        first = len(jobs)
        jobs += [Job(units=light, wall_s=calibrate_s, after=place) for place in range(num)]
    trial_s = (stages.quantize_s or 0.0) + (stages.evaluate_s or 0.0)
    for trial in range(num_trials):
        after = first + trial // evals_per_training
        jobs.append(Job(units=light, wall_s=trial_s, after=after))
    return jobs


# The plan -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepCost:
    """What a sweep will take."""

    num_trials: int
    num_trainings: int
    trainings_at_once: int
    cluster_units: float
    training_units: float
    light_units: float
    kind: Kind
    stages: StageSeconds
    unit_hours: Mapping[Part, float | None]
    """Hours times units held, by part; None for what is unknown."""
    at_least_wall_s: float
    """What is known of the wall time: below this it cannot end."""
    wall_s: float | None
    """By a schedule of everything; None where a part is unknown."""
    price_per_hour: float | None
    """Dollars a GPU-hour; None on a CPU."""

    @property
    def unknown(self) -> tuple[Part, ...]:
        """Parts whose seconds are not known."""
        return tuple(part for part in PARTS if self.unit_hours[part] is None)

    @property
    def at_least_hours(self) -> float:
        """Unit-hours of all that is known."""
        return math.fsum(hours for hours in self.unit_hours.values() if hours is not None)

    @property
    def hours(self) -> float | None:
        """Unit-hours in all; None where a part is unknown."""
        return None if self.unknown else self.at_least_hours

    @property
    def price(self) -> float | None:
        """Dollars in all; None where a part is unknown, and on a CPU."""
        if self.hours is None or self.price_per_hour is None:
            return None
        return self.hours * self.price_per_hour

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "num_trials": self.num_trials,
            "num_trainings": self.num_trainings,
            "trainings_at_once": self.trainings_at_once,
            "cluster_units": self.cluster_units,
            "training_units": self.training_units,
            "light_units": self.light_units,
            "kind": self.kind,
            "seconds": {part: self.stages.get(part) for part in PARTS},
            "sources": {part: self.stages.source(part) for part in PARTS},
            "unit_hours": dict(self.unit_hours),
            "hours": self.hours,
            "at_least_hours": self.at_least_hours,
            "price_per_hour": self.price_per_hour,
            "price": self.price,
            "wall_s": self.wall_s,
            "at_least_wall_s": self.at_least_wall_s,
            "unknown": list(self.unknown),
        }

    def lines(self) -> tuple[str, ...]:
        """For people."""
        kind, more = self.kind, "at least " if self.unknown else ""
        parts = [
            f"{_NAMES[part]} {_hours(hours)}"
            for part, hours in self.unit_hours.items()
            if hours is not None and hours > 0
        ]
        told = [
            f"{_number(self.num_trials, 'trial')} on {_number(self.num_trainings, 'training')}, "
            f"{self.trainings_at_once} at a time on {_number(self.cluster_units, kind)}",
            f"{more}{_hours(self.at_least_hours)} {kind}-hours: " + (", ".join(parts) or "0"),
        ]
        if self.price_per_hour is not None:
            dollars = self.at_least_hours * self.price_per_hour
            told.append(f"{more}${dollars:,.2f} at ${self.price_per_hour:.2f} a GPU-hour")
        wall_s = self.at_least_wall_s if self.wall_s is None else self.wall_s
        told.append(f"{more or 'about '}{_duration(wall_s)} until the last trial ends")
        if self.unknown:
            names = ", ".join(_NAMES[part] for part in self.unknown)
            told.append(f"unknown: how long {names} takes; one trial run first would tell")
        grouped: dict[Source, list[str]] = {}
        for part in PARTS:
            if self.unit_hours[part]:
                grouped.setdefault(self.stages.source(part), []).append(_NAMES[part])
        told += [f"{', '.join(names)}: {SOURCES[source]}" for source, names in grouped.items()]
        return tuple(told)


def plan_cost(
    stages: StageSeconds,
    *,
    num_trials: int,
    evals_per_training: int,
    cluster_units: float,
    training_units: float,
    light_units: float = 1.0,
    kind: Kind = "GPU",
    price_per_gpu_hour: float = PRICE_PER_GPU_HOUR,
    max_concurrent: int | None = None,
    max_trainings: int | None = None,
) -> SweepCost:
    """What a sweep will take on a cluster that does nothing else.

    A unit is a GPU, or a CPU where no GPU is used. A unit-second is a second of wall time that a
    unit is held. Restarts, and units that are paid for and idle, are not in it.

    Args:
        evals_per_training: trials of a training at most; all, where no training knob is searched.
        cluster_units: of the whole cluster.
        training_units: that one training holds.
        light_units: that a trial holds while it is quantised and evaluated.
        max_concurrent: trials at a time at most.
        max_trainings: trainings at a time at most, where that is not as many as fit.

    Raises:
        UsageError: a count is below 1, a price below 0, or a training does not fit the cluster.
    """
    if min(num_trials, evals_per_training, max_concurrent or 1) < 1:
        raise UsageError(
            f"{num_trials} trials, {evals_per_training} a training, {max_concurrent} at a time is "
            "no sweep",
            "give counts of 1 or more",
        )
    if not price_per_gpu_hour >= 0 or min(training_units, light_units) <= 0:
        raise UsageError(
            f"a price of {price_per_gpu_hour} for {training_units:g} and {light_units:g} units is "
            "none",
            "give a price of 0 or more, and units above 0",
        )
    jobs = sweep_jobs(
        stages, num_trials=num_trials, evals_per_training=evals_per_training,
        training=training_units, light=light_units,
    )  # fmt: skip
    num = math.ceil(num_trials / evals_per_training)
    at_once = min(num, math.floor(cluster_units / training_units + _TOLERANCE))
    used_units = cluster_units
    if max_trainings is not None and max_trainings < at_once:
        at_once = max_trainings
        # Room for those and for light work beside them, but not for one more.
        used_units = min(cluster_units, at_once * training_units + light_units)
    # Also of a sweep that is not wholly known: whether it fits is.
    wall_s = makespan(jobs, used_units, max_at_once=max_concurrent)
    held = {
        "start": num * training_units,
        "train": num * training_units,
        "calibrate": num * light_units,
        "quantize": num_trials * light_units,
        "evaluate": num_trials * light_units,
    }
    seconds = {part: stages.get(part) for part in PARTS}
    hours = {p: None if (s := seconds[p]) is None else s * held[p] / 3600 for p in PARTS}
    return SweepCost(
        num_trials=num_trials,
        num_trainings=num,
        trainings_at_once=min(at_once, max_concurrent or at_once),
        cluster_units=cluster_units,
        training_units=training_units,
        light_units=light_units,
        kind=kind,
        stages=stages,
        unit_hours=hours,
        at_least_wall_s=least_makespan(jobs, used_units, max_at_once=max_concurrent),
        wall_s=None if None in seconds.values() else wall_s,
        price_per_hour=price_per_gpu_hour if kind == "GPU" else None,
    )


def _number(value: float, noun: str) -> str:
    return f"{value:g} {noun}" if value == 1 else f"{value:g} {noun}s"


def _hours(hours: float) -> str:
    return f"{hours:.1f}" if hours >= 9.95 else f"{hours:.2g}" if hours else "0"


def _duration(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    days, rest = divmod(minutes, 24 * 60)
    clock = f"{rest // 60} h {rest % 60:02d} min"
    return f"{days} d {clock}" if days else clock
