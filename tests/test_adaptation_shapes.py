"""What steps are padded to: room, few captures, and what those that are spared may cost."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
from adaptation_cases import ADAPTATION
from hypothesis import given, settings
from hypothesis import strategies as st

from golf_ray.adaptation.batches import Shape
from golf_ray.adaptation.packing import Budget, Packer, Step
from golf_ray.adaptation.shapes import (
    CAPTURE_MS,
    DOCUMENT_MS,
    TOKEN_MS,
    ShapeChoice,
    has_room,
    shape_of,
)
from golf_ray.bench.corpus import document_lengths
from golf_ray.config import AdaptationConfig

SETTINGS = dataclasses.replace(ADAPTATION, chunk_size=32, window=2048)
BUDGET = Budget(residents=96, step_tokens=24_000)


def steps(
    lengths: Sequence[int], adaptation: AdaptationConfig = SETTINGS, budget: Budget = BUDGET
) -> Iterator[Step]:
    packer = Packer(lengths, adaptation, budget)
    while True:
        packer.admit()
        step = packer.take()
        if step is None:
            return
        yield step
        packer.commit(step)


def replayed(choice: ShapeChoice, run: Sequence[Step], budget: Budget = BUDGET) -> list[Shape]:
    """The shapes of steps that learn, each captured when it comes the second time."""
    seen: Counter[Shape] = Counter()
    found = []
    for step in run:
        shape = choice.of(step, budget)
        if shape is None:
            continue
        found.append(shape)
        seen[shape] += 1
        if seen[shape] == 2:
            choice.captured(shape)
    return found


def costs_ms(shape: Shape) -> float:
    return shape.tokens * TOKEN_MS + shape.documents * DOCUMENT_MS


@pytest.mark.parametrize("chunk_size", [32, 64])
def test_least_shapes_are_few_and_have_room(chunk_size: int) -> None:
    adaptation = dataclasses.replace(SETTINGS, chunk_size=chunk_size)
    shapes, padding, tokens = set(), 0, 0
    for step in steps(document_lengths(3000).tolist(), adaptation):
        shape = shape_of(step, adaptation, BUDGET)
        assert (shape is not None) == step.learns
        if shape is not None:
            assert has_room(shape, step, shape)
            shapes.add(shape)
            padding += shape.tokens - step.window_tokens
            tokens += step.window_tokens
    assert len(shapes) < 60
    assert padding / tokens < 0.15


@given(
    st.lists(st.integers(1, 4000), min_size=1, max_size=120),
    st.integers(1, 64),
    st.sampled_from([2048, 6000, 24_000]),
)
@settings(max_examples=40)
def test_a_chosen_shape_has_room_and_wastes_no_more_than_a_capture(
    lengths: list[int], residents: int, step_tokens: int
) -> None:
    budget = Budget(residents=residents, step_tokens=step_tokens)
    run = list(steps(lengths, SETTINGS, budget))
    learning = [step for step in run if shape_of(step, SETTINGS, budget) is not None]
    found = replayed(ShapeChoice(SETTINGS), run, budget)
    assert len(found) == len(learning)
    wasted_ms: Counter[Shape] = Counter()
    seen: Counter[Shape] = Counter()
    for step, shape in zip(learning, found, strict=True):
        wanted = shape_of(step, SETTINGS, budget)
        assert wanted is not None and has_room(shape, step, wanted)
        seen[shape] += 1
        if seen[shape] > 2 and shape != wanted:
            wasted_ms[wanted] += max(0.0, costs_ms(shape) - costs_ms(wanted))  # type: ignore[assignment]
    assert all(ms <= CAPTURE_MS for ms in wasted_ms.values())
    assert found == replayed(ShapeChoice(SETTINGS), run, budget), "a choice follows from the steps"


def test_few_shapes_are_captured() -> None:
    run = list(steps(document_lengths(3000).tolist()))
    least = replayed(ShapeChoice(SETTINGS, thrifty=False), run)
    assert least == [s for step in run if (s := shape_of(step, SETTINGS, BUDGET)) is not None]
    thrifty = replayed(ShapeChoice(SETTINGS), run)
    captured = [sum(n > 1 for n in Counter(shapes).values()) for shapes in (least, thrifty)]
    assert captured[1] <= captured[0] / 1.5
    assert sum(map(costs_ms, thrifty)) <= 1.15 * sum(map(costs_ms, least))


def test_a_shape_that_keeps_coming_is_captured_and_nothing_is_wasted_any_more() -> None:
    few, many = ([step for step in steps([2000] * n) if step.learns] for n in (4, 8))
    choice = ShapeChoice(SETTINGS)
    large = shape_of(many[-1], SETTINGS, BUDGET)
    assert large is not None
    choice.captured(large)
    step = few[-1]
    wanted = shape_of(step, SETTINGS, BUDGET)
    assert wanted is not None and has_room(large, step, wanted) and wanted != large
    rent_ms = costs_ms(large) - costs_ms(wanted)
    for _ in range(int(CAPTURE_MS / rent_ms)):
        assert choice.of(step, BUDGET) == large
    assert choice.of(step, BUDGET) == wanted
    choice.captured(wanted)
    assert choice.of(step, BUDGET) == wanted


def test_after_memory_ran_out_nothing_is_there_to_be_replayed() -> None:
    run = list(steps([1500] * 6))
    choice = ShapeChoice(SETTINGS)
    before = replayed(choice, run)
    choice.clear()
    assert replayed(choice, run) == before
