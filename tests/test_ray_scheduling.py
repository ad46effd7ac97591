"""The pool's state machine, with no Ray: whatever happens, every unit is counted exactly once."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluators.scheduling import Action, Cancel, GivenUp, Scheduler, Start


class Machine:
    """Actors that carry actions out, slow to hear of cancellations."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.queues: dict[int, list[int]] = {}
        self.begun: dict[int, int | None] = {}
        self.counted: list[int] = []
        self.runs: list[int] = []
        self.next_actor = 0

    def carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            assert isinstance(action.actor, int) and isinstance(action.unit, int)
            queue = self.queues[action.actor]
            if isinstance(action, Start):
                queue.append(action.unit)
                if self.begun[action.actor] is None:
                    self.begin(action.actor)
            elif action.unit in queue:
                # What has been begun cannot be cancelled any more.
                queue.remove(action.unit)
        for actor in self.scheduler.actors:
            assert len(self.scheduler.held(actor)) <= 2

    def begin(self, actor: int) -> None:
        self.begun[actor] = self.queues[actor].pop(0) if self.queues[actor] else None
        if self.begun[actor] is not None:
            self.runs.append(self.begun[actor])

    def join(self) -> None:
        actor, self.next_actor = self.next_actor, self.next_actor + 1
        self.queues[actor], self.begun[actor] = [], None
        self.carry_out(self.scheduler.join(actor))

    def end_unit(self, actor: int, *, error: bool = False) -> None:
        unit = self.begun[actor]
        assert unit is not None
        # The actor goes on with its next unit before the driver has heard of this one.
        self.begin(actor)
        if error:
            self.carry_out(self.scheduler.failed(actor, unit))
            return
        counts, actions = self.scheduler.finished(actor, unit)
        if counts:
            self.counted.append(unit)
        self.carry_out(actions)

    def lose(self, actor: int) -> None:
        del self.queues[actor], self.begun[actor]
        self.carry_out(self.scheduler.lost(actor))

    @property
    def busy(self) -> list[int]:
        return [actor for actor, unit in self.begun.items() if unit is not None]


@settings(max_examples=300, deadline=None)
@given(
    units=st.integers(0, 25),
    actors=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
    trouble=st.sampled_from([0.0, 0.1, 0.4]),
)
def test_every_unit_is_counted_once(units: int, actors: int, seed: int, trouble: float) -> None:
    chance = random.Random(seed)
    machine = Machine(Scheduler(range(units), max_losses=10**6, max_errors=10**6))
    for _ in range(actors):
        machine.join()
    for _ in range(5000):
        if machine.scheduler.done:
            break
        if machine.queues and chance.random() < trouble:
            machine.lose(chance.choice(list(machine.queues)))
        if len(machine.queues) < actors and chance.random() < 0.7:
            machine.join()
        if machine.busy:
            actor = chance.choice(machine.busy)
            machine.end_unit(actor, error=chance.random() < trouble)
    assert machine.scheduler.done
    assert sorted(machine.counted) == list(range(units))
    if not trouble:
        assert machine.runs == sorted(machine.runs) or actors > 1


@settings(max_examples=100, deadline=None)
@given(units=st.integers(1, 20), actors=st.integers(1, 5))
def test_nobody_waits_while_another_has_two(units: int, actors: int) -> None:
    machine = Machine(Scheduler(range(units)))
    for _ in range(actors):
        machine.join()
    while not machine.scheduler.done:
        idle = [a for a in machine.queues if not machine.scheduler.held(a)]
        assert not (idle and any(len(machine.scheduler.held(a)) > 1 for a in machine.queues))
        machine.end_unit(machine.busy[0])
    assert len(machine.runs) >= units


def test_units_go_out_in_order_and_one_ahead() -> None:
    scheduler = Scheduler(["long", "middle", "short", "last"])
    assert scheduler.join("a") == [Start("a", "long"), Start("a", "middle")]
    # The longest that is not begun is the next to begin, whoever holds it.
    assert scheduler.join("b") == [
        Cancel("a", "middle"), Start("b", "middle"), Start("a", "short"), Start("b", "last"),
    ]  # fmt: skip
    assert scheduler.held("a") == ("long", "short") and scheduler.held("b") == ("middle", "last")


def test_a_joiner_takes_nothing_that_comes_after_what_waits() -> None:
    scheduler = Scheduler([1, 2, 3, 4, 5])
    scheduler.join("a")
    scheduler.join("b")
    assert scheduler.lost("a") == []
    assert scheduler.waiting == (1, 3, 5) and scheduler.held("b") == (2, 4)
    assert scheduler.join("c") == [Start("c", 1), Start("c", 3)]


def test_an_idle_actor_takes_over_what_a_slow_one_has_not_begun() -> None:
    scheduler = Scheduler([1, 2, 3, 4])
    scheduler.join("slow")
    scheduler.join("fast")
    assert scheduler.finished("fast", 2) == (True, [])
    counts, actions = scheduler.finished("fast", 4)
    assert counts and actions == [Cancel("slow", 3), Start("fast", 3)]
    assert scheduler.stolen == 2, "once when it joined"
    # The cancellation came too late: the slow one is the second to end it, which counts nothing.
    assert scheduler.finished("fast", 3)[0]
    assert not scheduler.finished("slow", 3)[0]
    assert scheduler.finished("slow", 1)[0] and scheduler.done


def test_a_late_joiner_gets_work_at_once() -> None:
    scheduler = Scheduler([1, 2])
    scheduler.join("a")
    assert scheduler.join("b") == [Cancel("a", 2), Start("b", 2)]


def test_of_a_lost_actor_exactly_the_begun_unit_is_done_again() -> None:
    scheduler = Scheduler([1, 2, 3, 4])
    scheduler.join("a")
    scheduler.join("b")
    assert scheduler.lost("a") == []
    assert scheduler.waiting == (1, 3) and scheduler.retried == 1
    assert scheduler.finished("b", 2) == (True, [Start("b", 1)])


def test_a_unit_that_costs_actors_is_given_up() -> None:
    scheduler = Scheduler([1], max_losses=2)
    for number in range(3):
        assert not scheduler.given_up
        scheduler.join(number)
        scheduler.lost(number)
    assert scheduler.given_up == [GivenUp(1, 3, lost_actors=True)] and scheduler.done


def test_a_unit_is_given_more_tries_where_actors_die_over_others_too() -> None:
    scheduler = Scheduler(list(range(12)), max_losses=2, depth=1)
    for number in range(10):
        # Every second death is over another unit, so the machines are to blame and not unit 0.
        scheduler.join(("victim", number))
        scheduler.join(("other", number))
        assert scheduler.held(("victim", number)) == (0,)
        scheduler.finished(("other", number), number + 1)
        assert scheduler.held(("other", number)) == (number + 2,)
        scheduler.lost(("other", number))
        assert not scheduler.given_up, number
        scheduler.lost(("victim", number))
        if scheduler.given_up:
            break
    [given_up] = scheduler.given_up
    assert given_up.unit == 0 and 5 <= given_up.times <= 9, "more than alone, and bounded"


def test_a_unit_that_raises_is_tried_elsewhere_then_given_up() -> None:
    scheduler = Scheduler([1, 2, 3], max_errors=1)
    scheduler.join("a")
    scheduler.join("b")
    actions = scheduler.failed("a", 1)
    assert Start("b", 1) in actions and Start("a", 1) not in actions
    assert not scheduler.given_up
    scheduler.failed("b", 1)
    assert scheduler.given_up == [GivenUp(1, 2, lost_actors=False)]
    assert not scheduler.done, "the others go on"
    scheduler.finished("a", 2)
    scheduler.finished("b", 3)
    assert scheduler.done and scheduler.num_finished == 2


def test_what_is_no_longer_wanted_is_not_begun_and_counts_for_nothing() -> None:
    scheduler = Scheduler([1, 2, 3, 4, 5])
    scheduler.join("a")
    assert scheduler.abandon([1, 2, 4]) == [Cancel("a", 2), Start("a", 3)]
    assert scheduler.held("a") == (1, 3) and scheduler.waiting == (5,)
    assert scheduler.finished("a", 1) == (False, [Start("a", 5)])
    assert scheduler.failed("a", 3) == [Start("a", 3)]
    assert scheduler.abandon([3]) == [Cancel("a", 3)]
    assert scheduler.finished("a", 5)[0] and scheduler.done


def test_a_result_after_the_loss_counts_all_the_same() -> None:
    scheduler = Scheduler([1, 2])
    scheduler.join("a")
    scheduler.lost("a")
    counts, actions = scheduler.finished("a", 1)
    assert counts and actions == [] and scheduler.waiting == (2,)


def test_no_units_are_done_at_once() -> None:
    assert Scheduler([]).done


def test_units_are_distinct() -> None:
    with pytest.raises(AssertionError):
        Scheduler([1, 1])
