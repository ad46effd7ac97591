"""Packing: every chunk once and in order, rows and tokens within the budget, whatever the lengths.

A plain log of a whole run is what the properties look at; nothing of the packer's own state.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golf_ray.adaptation.packing import Budget, Packer, Step
from golf_ray.adaptation.plan import chunk_at, count_chunks
from golf_ray.config import AdaptationConfig

EXAMPLES = settings(max_examples=150, deadline=None)


@dataclass(frozen=True)
class Case:
    """What a packer is given."""

    lengths: list[int]
    adaptation: AdaptationConfig
    budget: Budget
    begun: dict[int, int] = field(default_factory=dict)

    def packer(self, budget: Budget | None = None) -> Packer:
        return Packer(self.lengths, self.adaptation, budget or self.budget, dict(self.begun))

    def chunks(self, place: int) -> int:
        return count_chunks(self.lengths[place], self.adaptation.chunk_size)

    def left(self, place: int) -> int:
        return self.chunks(place) - self.begun.get(place, 0)

    def at_work(self) -> set[int]:
        return {place for place in range(len(self.lengths)) if self.left(place)}


@st.composite
def cases(draw: st.DrawFn, max_documents: int = 24, max_length: int = 120) -> Case:
    lengths = draw(st.lists(st.integers(0, max_length), max_size=max_documents))
    chunk_size = draw(st.integers(1, 20))
    window = chunk_size + draw(st.integers(0, 60))
    budget = Budget(residents=draw(st.integers(1, 12)), step_tokens=draw(st.integers(1, 400)))
    begun = {}
    for place, n in enumerate(lengths):
        if draw(st.integers(0, 3)) == 0:
            begun[place] = draw(st.integers(0, count_chunks(n, chunk_size)))
    return Case(lengths, AdaptationConfig(chunk_size=chunk_size, window=window), budget, begun)


@dataclass(frozen=True)
class Log:
    """Everything a packer said, in order."""

    admitted: list[list[tuple[int, int]]]
    """Before each step."""
    steps: list[Step]
    ended: list[list[tuple[int, int]]]
    """After each step."""


def run(packer: Packer) -> Log:
    log = Log([], [], [])
    while True:
        admitted = packer.admit()
        step = packer.take()
        if step is None:
            assert not admitted
            return log
        log.admitted.append(admitted)
        log.steps.append(step)
        log.ended.append(packer.commit(step))


def without_rows(steps: list[Step]) -> list[Step]:
    return [
        dataclasses.replace(
            step, members=tuple(dataclasses.replace(member, row=0) for member in step.members)
        )
        for step in steps
    ]


# Properties of a whole run ---------------------------------------------------------------------


def check_chunks(case: Case, steps: list[Step]) -> None:
    """Every chunk that was not begun is taken once, in order, and is the plan's."""
    taken: dict[int, list[int]] = {}
    size, window = case.adaptation.chunk_size, case.adaptation.window
    for step in steps:
        assert step.members
        for m in step.members:
            taken.setdefault(m.document, []).append(m.number)
            assert m.chunk == chunk_at(m.number, case.lengths[m.document], size, window)
    expected = {
        place: list(range(case.begun.get(place, 0), case.chunks(place))) for place in case.at_work()
    }
    assert taken == expected


def check_rows(case: Case, log: Log) -> None:
    """A row has one document from its first chunk to its last, and there are few enough rows."""
    holds: dict[int, int] = {}
    seen = []
    for admitted, step, ended in zip(log.admitted, log.steps, log.ended, strict=True):
        for place, row in admitted:
            assert 0 <= row < case.budget.residents
            assert row not in holds, "given again before it was free"
            holds[row] = place
            seen.append(place)
        assert len(holds) <= case.budget.residents
        assert all(holds[m.row] == m.document for m in step.members)
        assert len({m.row for m in step.members}) == len(step.members)
        for place, row in ended:
            assert holds.pop(row) == place
    assert not holds
    assert sorted(seen) == sorted(case.at_work())


def check_tokens(step_tokens: int, step: Step) -> None:
    assert step.window_tokens == sum(m.chunk.end - m.chunk.window_start for m in step.members)
    assert step.window_tokens <= step_tokens or len(step.members) == 1


@EXAMPLES
@given(case=cases())
def test_every_chunk_is_taken_once_and_in_order(case: Case) -> None:
    check_chunks(case, run(case.packer()).steps)


@EXAMPLES
@given(case=cases())
def test_a_row_holds_one_document_and_is_free_before_it_is_given_again(case: Case) -> None:
    check_rows(case, run(case.packer()))


@EXAMPLES
@given(case=cases())
def test_a_step_is_within_the_budget_or_a_single_window(case: Case) -> None:
    for step in run(case.packer()).steps:
        check_tokens(case.budget.step_tokens, step)


@EXAMPLES
@given(case=cases())
def test_last_chunks_have_steps_of_their_own_which_end_documents(case: Case) -> None:
    log = run(case.packer())
    for step, ended in zip(log.steps, log.ended, strict=True):
        last = [m.number == case.chunks(m.document) - 1 for m in step.members]
        assert last == [not step.learns] * len(step.members)
        assert {place for place, _ in ended} == (
            set() if step.learns else {m.document for m in step.members}
        )
        if step.learns:
            # The mean over a step's chunks is one view: they are of one length.
            assert {m.chunk.num_scored for m in step.members} == {case.adaptation.chunk_size}


@EXAMPLES
@given(case=cases())
def test_members_come_longest_window_first(case: Case) -> None:
    for step in run(case.packer()).steps:
        keys = [(-m.chunk.window_tokens, m.document) for m in step.members]
        assert keys == sorted(keys)


@EXAMPLES
@given(case=cases())
def test_those_that_wait_are_admitted_longest_first(case: Case) -> None:
    log = run(case.packer())
    order = [place for admitted in log.admitted for place, _ in admitted]
    # Longest is what has most chunks before it; of equals the first.
    assert order == sorted(case.at_work(), key=lambda place: (-case.left(place), place))
    # No row is left free while a document waits.
    waiting, free = len(order), case.budget.residents
    for admitted, ended in zip(log.admitted, log.ended, strict=True):
        assert len(admitted) == min(waiting, free)
        waiting, free = waiting - len(admitted), free - len(admitted) + len(ended)


@EXAMPLES
@given(case=cases())
def test_the_longest_of_those_at_work_is_in_every_learning_step(case: Case) -> None:
    log = run(case.packer())
    left = {place: case.left(place) for place in case.at_work()}
    at_work: set[int] = set()
    for admitted, step, ended in zip(log.admitted, log.steps, log.ended, strict=True):
        at_work |= {place for place, _ in admitted}
        members = {m.document for m in step.members}
        if step.learns:
            longest = min(at_work, key=lambda place: (-left[place], place))
            assert longest in members
        for place in members:
            left[place] -= 1
        at_work -= {place for place, _ in ended}


@EXAMPLES
@given(case=cases())
def test_the_same_inputs_give_the_same_steps(case: Case) -> None:
    assert run(case.packer()) == run(case.packer())


# A budget that shrinks -------------------------------------------------------------------------


@EXAMPLES
@given(case=cases(), halvings=st.lists(st.integers(0, 3), max_size=40))
def test_take_is_repeatable_and_follows_a_budget_that_shrinks(
    case: Case, halvings: list[int]
) -> None:
    packer, steps = case.packer(), []
    pending = list(halvings)
    while True:
        packer.admit()
        step = packer.take()
        assert packer.take() == step
        if step is None:
            break
        for _ in range(pending.pop() if pending else 0):
            packer.budget = packer.budget.halved()
            smaller = packer.take()
            assert smaller is not None and packer.take() == smaller
            check_tokens(packer.budget.step_tokens, smaller)
            if smaller.learns == step.learns:
                # Nothing went on meanwhile: who is in both steps takes the same chunk.
                before = {m.document: m for m in step.members}
                assert all(before.get(m.document, m) == m for m in smaller.members)
            step = smaller
        check_tokens(packer.budget.step_tokens, step)
        steps.append(step)
        packer.commit(step)
    check_chunks(case, steps)


def test_a_halved_budget_has_half_the_tokens_at_least_one_and_all_rows() -> None:
    budget = Budget(residents=7, step_tokens=5)
    halves = [budget]
    for _ in range(4):
        halves.append(halves[-1].halved())
    assert [b.step_tokens for b in halves] == [5, 2, 1, 1, 1]
    assert {b.residents for b in halves} == {7}


def test_a_shrunken_budget_takes_fewer_of_the_same() -> None:
    adaptation = AdaptationConfig(chunk_size=10, window=10)
    packer = Packer([100] * 8, adaptation, Budget(residents=8, step_tokens=80))
    packer.admit()
    counts = []
    for _ in range(4):
        step = packer.take()
        assert step is not None
        counts.append(len(step.members))
        assert {m.number for m in step.members} == {0}
        packer.budget = packer.budget.halved()
    assert counts == [8, 4, 2, 1]


def test_a_step_is_committed_once() -> None:
    packer = Packer(
        [30, 9], AdaptationConfig(chunk_size=4, window=8), Budget(residents=2, step_tokens=100)
    )
    packer.admit()
    step = packer.take()
    assert step is not None
    packer.commit(step)
    with pytest.raises(AssertionError):
        packer.commit(step)


# Rows that nothing fills -----------------------------------------------------------------------


@EXAMPLES
@given(case=cases(max_documents=5), nothing=st.integers(0, 12), more=st.integers(0, 60))
def test_rows_that_nothing_fills_do_not_change_what_is_packed(
    case: Case, nothing: int, more: int
) -> None:
    # Documents of nothing, and those that are finished, never take a row either.
    case = dataclasses.replace(case, lengths=case.lengths + [0] * nothing)
    enough = dataclasses.replace(case.budget, residents=max(1, len(case.at_work())))
    spacious = dataclasses.replace(enough, residents=enough.residents + more)
    few, many = run(case.packer(enough)), run(case.packer(spacious))
    assert without_rows(few.steps) == without_rows(many.steps)


def test_eight_rows_or_sixty_four_for_five_documents() -> None:
    adaptation = AdaptationConfig(chunk_size=4, window=12)
    logs = [
        run(Packer([9, 30, 2, 17, 17], adaptation, Budget(residents=r, step_tokens=40)))
        for r in (8, 64)
    ]
    assert without_rows(logs[0].steps) == without_rows(logs[1].steps)
    assert len(logs[0].steps) > 8


# Sizes -----------------------------------------------------------------------------------------


def test_nothing_to_do_is_no_step() -> None:
    adaptation = AdaptationConfig(chunk_size=4, window=8)
    for lengths, begun in (([], {}), ([0, 0], {}), ([9, 4], {0: 3, 1: 1})):
        packer = Packer(lengths, adaptation, Budget(residents=3, step_tokens=10), begun)
        assert packer.admit() == [] and packer.take() is None


def test_a_document_of_one_chunk_only_ends() -> None:
    adaptation = AdaptationConfig(chunk_size=4, window=8)
    log = run(Packer([3, 4, 1], adaptation, Budget(residents=3, step_tokens=100)))
    assert [step.learns for step in log.steps] == [False]
    assert [m.document for m in log.steps[0].members] == [1, 0, 2]


def test_a_very_long_document_takes_its_own_chunks_in_steps_that_short_ones_fill() -> None:
    adaptation = AdaptationConfig(chunk_size=32, window=2048)
    shorts = [40 + 37 * i % 900 for i in range(3000)]
    budget = Budget(residents=64, step_tokens=8192)
    log = run(Packer([*shorts, 200_000], adaptation, budget))
    long = len(shorts)
    chunks = count_chunks(200_000, 32)
    learning = [step for step in log.steps if step.learns]
    with_long = [
        place
        for place, step in enumerate(learning)
        if any(m.document == long for m in step.members)
    ]
    # From the first step on one chunk a step, so its steps are as many as its chunks: nothing of
    # what the short ones do stands in its way.
    assert with_long == list(range(chunks - 1)) and len(learning) == chunks - 1
    assert sum(m.document == long for step in log.steps for m in step.members) == chunks
    # While there are short ones, they fill what it leaves; they are finished long before it.
    last_short = max(
        place for place, s in enumerate(learning) if any(m.document != long for m in s.members)
    )
    assert last_short < chunks / 2
    busy = learning[:last_short]
    assert sum(s.window_tokens for s in busy) > 0.8 * budget.step_tokens * len(busy)
    assert Counter(place for ended in log.ended for place, _ in ended) == Counter(range(long + 1))
