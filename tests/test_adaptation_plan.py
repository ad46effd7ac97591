"""The plan: windows, groups and cost, as properties over lengths and settings."""

from __future__ import annotations

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from golf_ray.adaptation.plan import count_chunks, plan_groups, window_tokens, windows
from golf_ray.config import AdaptationConfig

SIZES = st.tuples(st.integers(1, 40), st.integers(0, 60)).map(lambda p: (p[0], p[0] + p[1]))


@settings(max_examples=200, deadline=None)
@given(n=st.integers(0, 400), sizes=SIZES)
def test_windows_cover_every_prediction_once_in_order(n: int, sizes: tuple[int, int]) -> None:
    chunk_size, window = sizes
    plan = windows(n, chunk_size, window)
    assert len(plan) == count_chunks(n, chunk_size)
    assert [p for c in plan for p in range(c.start, c.end)] == list(range(n))
    for chunk in plan:
        assert chunk.start - chunk.window_start <= window - chunk.num_scored
        assert chunk.window_tokens == min(chunk.end, window)
        assert 0 <= chunk.window_start <= chunk.start
        assert chunk.num_scored == chunk_size or chunk is plan[-1]


@settings(max_examples=200, deadline=None)
@given(n=st.integers(0, 3000), sizes=SIZES)
def test_cost_is_the_sum_of_the_windows(n: int, sizes: tuple[int, int]) -> None:
    assert window_tokens(n, *sizes) == sum(c.window_tokens for c in windows(n, *sizes))


def test_the_longest_published_document() -> None:
    plan = windows(79_463, 32, 2048)
    assert len(plan) == 2484
    assert (plan[-1].start, plan[-1].end) == (79_456, 79_463)
    assert window_tokens(79_463, 32, 2048) == sum(c.window_tokens for c in plan)
    # Far beyond: closed form, no list.
    assert window_tokens(10**9, 32, 2048) > 6 * 10**10


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(0, 300), max_size=60), size=st.integers(1, 10))
def test_groups_hold_every_document_once_by_falling_length(lengths: list[int], size: int) -> None:
    adaptation = AdaptationConfig(group_documents=size, chunk_size=8, window=64)
    groups = plan_groups(lengths, adaptation)
    members = [m for group in groups for m in group.members]
    assert members == sorted(range(len(lengths)), key=lambda m: (-lengths[m], m))
    assert all(len(group.members) == size for group in groups[:-1])
    for group in groups:
        assert 0 < len(group.members) <= size
        assert group.window_tokens == sum(window_tokens(lengths[m], 8, 64) for m in group.members)
        assert group.num_chunks == max(count_chunks(lengths[m], 8) for m in group.members)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), lengths=st.lists(st.integers(0, 50), min_size=1, max_size=30))
def test_shapes_do_not_depend_on_the_order_given(data: st.DataObject, lengths: list[int]) -> None:
    adaptation = AdaptationConfig(group_documents=4)
    shuffled = data.draw(st.permutations(lengths))
    of = [[lengths[m] for m in g.members] for g in plan_groups(lengths, adaptation)]
    assert of == [[shuffled[m] for m in g.members] for g in plan_groups(shuffled, adaptation)]


def test_groups_depend_on_lengths_and_group_size_alone() -> None:
    lengths = [5, 100, 7, 7, 1, 0, 2000]
    base = AdaptationConfig(group_documents=2)
    other = dataclasses.replace(base, lr=1.0, rank=1, seed=9, weight_decay=0.0)
    assert plan_groups(lengths, base) == plan_groups(lengths, other)
    assert [g.members for g in plan_groups(lengths, base)] == [(6, 1), (2, 3), (0, 4), (5,)]
