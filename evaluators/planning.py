"""Units of work for test-time training on many actors, what they cost, and how long all will take.

The cost model prices chunks by their window. Planned groups are put together into units of some
seconds, and such a plan is tried out in a simulation that drives the scheduler itself, with actors
that are slow and that die. Numbers alone: no tensor, no clock, no Ray.

A document's chunks are a chain, and a step takes the host some time however few documents are in
it. One document alone leaves a GPU idle for nine tenths of that; a dozen advance in the same time.
So a long document is no unit by itself: it takes others along, the longest of all only those that
take it no time.

Invariant: units are a function of lengths, configuration and cost model, never of the number of
actors; every document is in exactly one of them.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from evaluators.scheduling import Scheduler
from golf_ray.adaptation.plan import plan_groups
from golf_ray.config import AdaptationConfig

TARGET_S: Final = 4.0
"""A unit's time: short against minutes for all, and long against a message to an actor."""
LEFT_SHARE: Final = 0.02
"""Towards the end a unit takes this part of the work that is left, so that the last ones are short
and whoever computes them ends at about the same time."""
SHORTEST_S: Final = 1.0
"""A unit's time may always be this long."""
FILL: Final = 3.0
"""A unit may take so many times as long as the chain of its longest document leaves the device
idle. By the costs of "cuda" the field's 50,000 documents then take 1.015 times their work in units;
1.02 at 2, 1.01 at 4, and 1.4 times with every long document by itself."""
CLOSE: Final = 1.05
"""What is within this of a bound is as good as the bound."""


# Cost ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """What test-time training takes on one device."""

    chunk_ms: tuple[tuple[int, float], ...]
    """Milliseconds of a document's chunk in a full step, scored and learned from, by tokens of its
    window: rising pairs. Straight lines between them, and proportional above the last."""
    ending_share: float
    """Cost of a document's last chunk, which is not learned from, over that of another."""
    document_ms: float
    """Milliseconds to start a document."""
    step_ms: float
    """Milliseconds that a step takes at least, however few documents are in it."""

    def chunk_s(self, windows: NDArray[np.integer]) -> NDArray[np.float64]:
        """Seconds of a chunk at each of some windows."""
        at, ms = (np.array(column, float) for column in zip(*self.chunk_ms, strict=True))
        return np.interp(windows, at, ms) * np.maximum(1.0, windows / at[-1]) / 1e3

    def document_s(self, predictions: int, adaptation: AdaptationConfig) -> float:
        """Seconds of the device that a document takes among many others: its share."""
        return self.work_s([predictions], adaptation)

    def chain_s(self, predictions: int, adaptation: AdaptationConfig) -> float:
        """Seconds that a document takes at least: its chunks one after the other."""
        return self.together_s([predictions], adaptation)

    def work_s(self, lengths: Sequence[int], adaptation: AdaptationConfig) -> float:
        """Seconds of the device that documents take among many others."""
        return float(self._steps_s(lengths, adaptation).sum()) + self._starts_s(lengths)

    def together_s(self, lengths: Sequence[int], adaptation: AdaptationConfig) -> float:
        """Seconds that documents take by themselves when all of them advance in every step.

        A budget that spreads them over more steps changes this little: such steps are full.
        """
        steps_s = self._steps_s(lengths, adaptation)
        least_s = np.full(len(steps_s), self.step_ms * adaptation.grad_steps / 1e3)
        # The last step only scores.
        least_s[-1:] = self.step_ms / 1e3
        return float(np.maximum(steps_s, least_s).sum()) + self._starts_s(lengths)

    def _starts_s(self, lengths: Sequence[int]) -> float:
        return self.document_ms * sum(n > 0 for n in lengths) / 1e3

    def _steps_s(self, lengths: Sequence[int], adaptation: AdaptationConfig) -> NDArray[np.float64]:
        """Seconds of the device that each step of documents that advance together takes."""
        predictions = np.array([n for n in lengths if n > 0], np.int64)
        if not len(predictions):
            return np.zeros(0)
        size, window = adaptation.chunk_size, adaptation.window
        last = -(-predictions // size) - 1
        num_ending = np.bincount(last)
        num_learning = len(predictions) - np.cumsum(num_ending)
        windows = np.minimum(np.arange(1, len(num_ending) + 1) * size, window)
        learning_s = num_learning * self.chunk_s(windows) * adaptation.grad_steps
        ending_s = self.ending_share * self.chunk_s(np.minimum(predictions, window))
        return learning_s + np.bincount(last, weights=ending_s)


COSTS: Final[Mapping[str, CostModel]] = MappingProxyType(
    {
        # The record's model in bfloat16 on one H200, chunks of 32, steps of 63,488 tokens.
        "cuda": CostModel(
            chunk_ms=(
                (64, 0.146), (128, 0.188), (256, 0.290), (512, 0.503), (1024, 1.01), (2048, 2.14),
            ),
            ending_share=0.4,
            document_ms=0.06,
            step_ms=9.0,
        ),
        # The laptop's model in float32 on one core of an AMD EPYC, steps of four documents, chunks
        # of 32; about, since other work ran beside it.
        "cpu": CostModel(
            chunk_ms=((64, 10.0), (128, 17.0), (256, 28.0)),
            ending_share=0.4,
            document_ms=2.0,
            step_ms=24.0,
        ),
    }
)  # fmt: skip
"""By device. Of another model the seconds are others, and what is long against what about the
same."""


# Units --------------------------------------------------------------------------------------------

_Part = tuple[int, int]
"""The number of a planned group and the place of one of its members."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """Documents that an actor computes at once."""

    groups: tuple[int, ...]
    """Numbers of the planned groups that its members are of, in rising order; a divided group is
    in several units."""
    members: tuple[int, ...]
    """Places in the lengths that were planned, longest first."""
    cost_s: float
    """Seconds of the device that its documents take among many others."""
    chain_s: float
    """Seconds that its longest document takes at least."""
    time_s: float
    """Seconds that the unit takes by itself: not less than either."""


def plan_units(
    lengths: Sequence[int],
    adaptation: AdaptationConfig,
    cost: CostModel,
    *,
    target_s: float = TARGET_S,
    keep_groups: bool = False,
) -> tuple[Unit, ...]:
    """Units of consecutive planned groups, the longest documents first.

    A unit takes on groups while its time stays within `target_s`, less where little work is left.
    Where its longest document leaves the device idle for longer, it may take `FILL` times that, but
    no more than the longest document of all takes: no makespan is below that, and no unit is to
    raise it. A group that is too long for a unit of its own is divided between documents.

    Args:
        lengths: predictions of each document.
        keep_groups: divide no group, and let a unit's groups go one after the other: on a CPU what
            is computed together decides the last bits.
    """
    groups = plan_groups(lengths, adaptation)
    works_s = [cost.work_s([lengths[m] for m in group.members], adaptation) for group in groups]
    left_s = np.cumsum(works_s[::-1])[::-1]
    longest_s = cost.chain_s(max(lengths, default=0), adaptation)

    def time_s(parts: Sequence[_Part]) -> float:
        each = itertools.groupby(parts, key=lambda part: part[0]) if keep_groups else [(0, parts)]
        return sum(cost.together_s([lengths[m] for _, m in some], adaptation) for _, some in each)

    def fits(parts: Sequence[_Part]) -> bool:
        if len(parts) == 1:
            return True
        group, place = parts[0]
        share_s = min(target_s, max(SHORTEST_S, LEFT_SHARE * float(left_s[group])))
        chain_s = cost.chain_s(lengths[place], adaptation)
        # Another group fills nothing where it waits for the end of this one.
        idle_s = 0.0 if keep_groups else chain_s - cost.document_s(lengths[place], adaptation)
        return time_s(parts) <= max(share_s, min(FILL * idle_s, CLOSE * longest_s))

    units: list[list[_Part]] = []
    for number, group in enumerate(groups):
        whole = [(number, place) for place in group.members]
        divided = not keep_groups and not fits(whole)
        for parts in [[part] for part in whole] if divided else [whole]:
            if units and fits(units[-1] + parts):
                units[-1] += parts
            else:
                units.append(list(parts))
    return tuple(
        Unit(
            groups=tuple(sorted({number for number, _ in parts})),
            members=tuple(place for _, place in parts),
            cost_s=cost.work_s([lengths[place] for _, place in parts], adaptation),
            chain_s=cost.chain_s(lengths[parts[0][1]], adaptation),
            time_s=time_s(parts),
        )
        for parts in units
    )


# Simulation ---------------------------------------------------------------------------------------

Limit = Literal["work", "the longest document", "the tail"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A unit on an actor, from its begin to the end that counted."""

    unit: int
    """Place in the plan."""
    actor: int
    begin_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulation:
    """How a plan went."""

    makespan_s: float
    """Seconds until the last unit's end."""
    work_s: float
    """Seconds of a device of speed 1 that all documents take: the sum of `cost_s`."""
    work_bound_s: float
    """Seconds in which the actors that lived could have done that work."""
    chain_bound_s: float
    """Seconds that the longest document takes on the fastest actor."""
    busy_share: float
    """Time that actors computed, what was lost with some included, over time that they lived."""
    stolen: int
    """Units that an idle actor took over."""
    retried: int
    """Units begun again after an actor's death."""
    died: int
    """Actors that died before the end."""
    runs: tuple[Run, ...]
    """One a unit, in the order in which they ended."""

    @property
    def bound_s(self) -> float:
        """Seconds below which no order of any units of these documents comes."""
        return max(self.work_bound_s, self.chain_bound_s)

    @property
    def limit(self) -> Limit:
        """What the makespan is due to; the tail is actors that wait for units that end late."""
        if self.busy_share * CLOSE >= 1:
            return "work"
        return (
            "the longest document" if self.makespan_s <= CLOSE * self.chain_bound_s else "the tail"
        )


@dataclass(frozen=True, slots=True)
class _Life:
    """An actor's speed, and from when to when it lives."""

    speed: float
    begin_s: float
    end_s: float

    def lived_s(self, until_s: float) -> float:
        return max(0.0, min(self.end_s, until_s) - self.begin_s)


def simulate(
    units: Sequence[Unit],
    actors: int,
    *,
    slow_share: float = 0.2,
    slow_factor: float = 2.0,
    dying_share: float = 0.05,
    seed: int = 0,
    depth: int = 2,
    overhead_s: float = 0.001,
    start_s: float | None = 20.0,
) -> Simulation:
    """Let the scheduler share out units among actors of which some are slow and some die.

    Args:
        actors: how many; never more than there are units, as in an evaluation.
        slow_share: part of the actors, rounded up, that take `slow_factor` times as long.
        dying_share: part of the actors, rounded up, that die at a random time of the evaluation.
        depth: units in the hands of an actor at most.
        overhead_s: seconds between two units of an actor.
        start_s: seconds until another actor as fast is there for one that died; None for never,
            and then at least one of them lives on.
    """
    assert units and actors >= 1 and slow_factor >= 1 and 0 <= slow_share <= 1
    actors = min(actors, len(units))
    lives = _lives(units, actors, slow_share, slow_factor, dying_share, seed, start_s)
    # That an actor dies is not its unit's fault here.
    scheduler = Scheduler(range(len(units)), depth=depth, max_losses=len(lives))
    number = itertools.count()
    events: list[tuple[float, int, str, int, int]] = []

    def at(time_s: float, what: str, actor: int, unit: int = -1) -> None:
        heapq.heappush(events, (time_s, next(number), what, actor, unit))

    for actor, life in enumerate(lives):
        at(life.begin_s, "join", actor)
        if life.end_s < math.inf:
            at(life.end_s, "lost", actor)
    computing: dict[int, tuple[int, float]] = {}
    runs: list[Run] = []
    busy_s = now_s = 0.0
    while not scheduler.done:
        now_s, _, what, actor, unit = heapq.heappop(events)
        if what == "join":
            scheduler.join(actor)
        elif what == "lost":
            _, begin_s = computing.pop(actor, (-1, now_s))
            busy_s += now_s - begin_s
            scheduler.lost(actor)
        elif actor in computing:
            # Of the dead no result comes.
            _, begin_s = computing.pop(actor)
            busy_s += now_s - begin_s
            counts, _ = scheduler.finished(actor, unit)
            assert counts
            runs.append(Run(unit=unit, actor=actor, begin_s=begin_s, end_s=now_s))
        # Actions are in what actors hold; a message takes no time, so none comes too late.
        for idle in [a for a in scheduler.actors if a not in computing and scheduler.held(a)]:
            assert isinstance(idle, int)
            first = scheduler.held(idle)[0]
            assert isinstance(first, int)
            computing[idle] = (first, now_s)
            at(now_s + overhead_s + units[first].time_s / lives[idle].speed, "end", idle, first)
    busy_s += sum(now_s - begin_s for _, begin_s in computing.values())
    work_s = sum(unit.cost_s for unit in units)
    return Simulation(
        makespan_s=now_s,
        work_s=work_s,
        work_bound_s=_least_time_s(work_s, lives),
        chain_bound_s=max(u.chain_s for u in units) / max(life.speed for life in lives),
        busy_share=busy_s / held_s if (held_s := sum(x.lived_s(now_s) for x in lives)) else 0.0,
        stolen=scheduler.stolen,
        retried=scheduler.retried,
        died=sum(life.end_s < now_s for life in lives),
        runs=tuple(runs),
    )


def _lives(
    units: Sequence[Unit],
    actors: int,
    slow_share: float,
    slow_factor: float,
    dying_share: float,
    seed: int,
    start_s: float | None,
) -> list[_Life]:
    """Actors in random order, then the replacements."""
    chance = random.Random(seed)
    num_slow, num_dying = math.ceil(slow_share * actors), math.ceil(dying_share * actors)
    if start_s is None:
        num_dying = min(num_dying, actors - 1)
    speeds = [1 / slow_factor] * num_slow + [1.0] * (actors - num_slow)
    chance.shuffle(speeds)
    # Every death falls into the time that the work takes at least.
    whole_s = max(sum(u.cost_s for u in units) / sum(speeds), max(u.chain_s for u in units))
    ends_s = [chance.uniform(0, whole_s) for _ in range(num_dying)]
    ends_s += [math.inf] * (actors - num_dying)
    chance.shuffle(ends_s)
    lives = [_Life(speed, 0.0, end_s) for speed, end_s in zip(speeds, ends_s, strict=True)]
    if start_s is not None:
        lives += [
            _Life(life.speed, life.end_s + start_s, math.inf)
            for life in lives
            if life.end_s < math.inf
        ]
    return lives


def _least_time_s(work_s: float, lives: Sequence[_Life]) -> float:
    """When actors could have done so much work at the earliest, all of them busy as they live."""
    ends = sorted({t for life in lives for t in (life.begin_s, life.end_s) if t < math.inf})
    done_s = 0.0
    for begin_s, end_s in itertools.pairwise([*ends, math.inf]):
        capacity = sum(x.speed for x in lives if x.begin_s <= begin_s < x.end_s)
        if capacity and done_s + capacity * (end_s - begin_s) >= work_s:
            return begin_s + (work_s - done_s) / capacity
        done_s += capacity * (end_s - begin_s) if capacity else 0.0
    return math.inf
