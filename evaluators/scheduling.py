"""Who computes which unit of work: a state machine, events in and actions out. Knows no Ray.

Units go to actors in a given order, a few at a time, so that the next one is there when one ends.
When no unit is left to give out, an actor without work takes over one that another holds and has
not begun. Whose result comes first counts; a unit is never counted twice.

Invariant: while an actor is left, every unit that has no result and is not given up is waiting or
in some actor's hands.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

Unit = Hashable
Actor = Hashable


@dataclass(frozen=True, slots=True)
class Start:
    """Give a unit to an actor, behind those that it holds."""

    actor: Actor
    unit: Unit


@dataclass(frozen=True, slots=True)
class Cancel:
    """Take a unit that an actor has not begun from it; that it comes too late does no harm."""

    actor: Actor
    unit: Unit


Action = Start | Cancel

MOST_LOSSES = 4
"""Of a unit, in times of what is allowed to one that alone loses actors."""


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A unit that failed too often."""

    unit: Unit
    times: int
    """How often it was tried."""
    lost_actors: bool
    """Whether actors died over it; otherwise it raised an error."""


class Scheduler:
    """The state of one pool's work.

    Args:
        units: in the order in which they are to begin, the longest first.
        depth: units in the hands of an actor at most, the one it computes included.
        max_losses: actors that a unit may lose before it is given up; more where other units lose
            theirs too, up to `MOST_LOSSES` times as many, for then it is hardly the unit.
        max_errors: errors that a unit may raise before it is given up.
    """

    def __init__(
        self, units: Sequence[Unit], *, depth: int = 2, max_losses: int = 2, max_errors: int = 1
    ) -> None:
        assert depth >= 1 and len(set(units)) == len(units)
        self._depth = depth
        self._max_losses = max_losses
        self._max_errors = max_errors
        self._order = {unit: place for place, unit in enumerate(units)}
        self._waiting = deque(units)
        self._held: dict[Actor, list[Unit]] = {}
        self._losses: dict[Unit, int] = {}
        self._errors: dict[Unit, int] = {}
        self._finished: set[Unit] = set()
        self._abandoned: set[Unit] = set()
        self.given_up: list[GivenUp] = []
        """Units that failed too often, in the order in which they did."""
        self.retried = 0
        """Units that were begun again after a loss or an error."""
        self.stolen = 0
        """Units that another actor took over."""

    @property
    def done(self) -> bool:
        """Whether every unit has its result, or is given up."""
        return len(self._finished) + len(self._abandoned) == len(self._order)

    @property
    def num_finished(self) -> int:
        """Units with a result."""
        return len(self._finished)

    @property
    def waiting(self) -> tuple[Unit, ...]:
        """Units that no actor holds, in the order in which they will be given out."""
        return tuple(self._waiting)

    def held(self, actor: Actor) -> tuple[Unit, ...]:
        """What an actor holds; the first is the one that it computes."""
        return tuple(self._held.get(actor, ()))

    @property
    def actors(self) -> tuple[Actor, ...]:
        """Actors that take part."""
        return tuple(self._held)

    def join(self, actor: Actor) -> list[Action]:
        """An actor is ready."""
        assert actor not in self._held
        self._held[actor] = []
        # Whoever was first holds a second unit that is longer than what is left to give out: behind
        # the longest of all it would be begun last. 64 actors on the field's 50,000 documents in
        # the simulation: 78 s where it stays there, 65 s where it does not.
        spare = [unit for held in self._held.values() for unit in held[1:]]
        behind = bool(spare and self._waiting) and min(map(self._place, spare)) < self._place(
            self._waiting[0]
        )
        return (self._steal(actor) if behind else []) + self._give_out()

    def finished(self, actor: Actor, unit: Unit) -> tuple[bool, list[Action]]:
        """An actor has a result.

        Returns:
            whether it counts (it does not where another was first), and what to do.
        """
        self._drop(actor, unit)
        counts = unit in self._order and not self._settled(unit)
        actions: list[Action] = []
        if counts:
            self._finished.add(unit)
            if unit in self._waiting:
                # It was on its way back after a loss that was none.
                self._waiting.remove(unit)
            actions = [Cancel(a, unit) for a, held in self._held.items() if unit in held[1:]]
            for cancel in actions:
                self._drop(cancel.actor, unit)
        return counts, actions + self._give_out()

    def failed(self, actor: Actor, unit: Unit) -> list[Action]:
        """A unit raised an error on an actor, which goes on."""
        self._drop(actor, unit)
        if self._settled(unit):
            return self._give_out()
        self._errors[unit] = self._errors.get(unit, 0) + 1
        if self._errors[unit] > self._max_errors:
            self._give_up(GivenUp(unit, self._errors[unit], lost_actors=False))
            return self._give_out()
        self._return([unit])
        self.retried += 1
        return self._give_out(avoid=(actor, unit))

    def lost(self, actor: Actor) -> list[Action]:
        """An actor is gone, with what it held."""
        held = self._held.pop(actor, [])
        if held and not self._settled(held[0]):
            begun = held[0]
            self._losses[begun] = self._losses.get(begun, 0) + 1
            self.retried += 1
            if self._losses[begun] > self._losses_allowed(begun):
                self._give_up(GivenUp(begun, self._losses[begun], lost_actors=True))
        self._return(held)
        return self._give_out()

    def abandon(self, units: Iterable[Unit]) -> list[Action]:
        """Units are no longer wanted; one that is being computed comes to nothing."""
        dropped = {unit for unit in units if not self._settled(unit)}
        self._abandoned |= dropped
        self._waiting = deque(unit for unit in self._waiting if unit not in dropped)
        cancels = [Cancel(a, u) for a, held in self._held.items() for u in held[1:] if u in dropped]
        for cancel in cancels:
            self._drop(cancel.actor, cancel.unit)
        return [*cancels, *self._give_out()]

    def _losses_allowed(self, unit: Unit) -> int:
        others = sum(self._losses.values()) - self._losses[unit]
        return min(self._max_losses + others // 2, MOST_LOSSES * self._max_losses)

    # Decisions ------------------------------------------------------------------------------

    def _settled(self, unit: Unit) -> bool:
        return unit in self._finished or unit in self._abandoned

    def _give_up(self, given_up: GivenUp) -> None:
        self.given_up.append(given_up)
        self._abandoned.add(given_up.unit)

    def _drop(self, actor: Actor, unit: Unit) -> None:
        held = self._held.get(actor, [])
        if unit in held:
            held.remove(unit)

    def _return(self, units: Iterable[Unit]) -> None:
        """Put units back where the order has them, unless they are settled or held elsewhere."""
        elsewhere = {unit for held in self._held.values() for unit in held}
        back = [u for u in units if not self._settled(u) and u not in elsewhere]
        known = set(self._waiting)
        merged = sorted([*self._waiting, *(u for u in back if u not in known)], key=self._place)
        self._waiting = deque(merged)

    def _place(self, unit: Unit) -> int:
        return self._order[unit]

    def _give_out(self, avoid: tuple[Actor, Unit] | None = None) -> list[Action]:
        """Fill hands evenly: nobody gets a second unit while another has none."""
        actions: list[Action] = []
        while self._waiting:
            open_hands = [a for a, held in self._held.items() if len(held) < self._depth]
            if avoid is not None and self._waiting[0] == avoid[1] and len(self._held) > 1:
                # Another actor may do better with what failed on this one.
                open_hands = [a for a in open_hands if a != avoid[0]]
            if not open_hands:
                break
            actor = min(open_hands, key=lambda a: len(self._held[a]))
            actions.append(self._start(actor, self._waiting.popleft()))
        if not self._waiting:
            for actor in [a for a, held in self._held.items() if not held]:
                actions += self._steal(actor)
        return actions

    def _steal(self, thief: Actor) -> list[Action]:
        """Take the longest unit that waits behind another in somebody's hands."""
        spare = [(u, a) for a, held in self._held.items() for u in held[1:]]
        if not spare:
            return []
        unit, victim = min(spare, key=lambda pair: self._place(pair[0]))
        self._drop(victim, unit)
        self.stolen += 1
        return [Cancel(victim, unit), self._start(thief, unit)]

    def _start(self, actor: Actor, unit: Unit) -> Start:
        self._held[actor].append(unit)
        return Start(actor, unit)
