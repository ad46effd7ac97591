"""Units of test-time training and their simulation: nothing lost, nothing twice, near the bound."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluators.planning import (
    CLOSE,
    COSTS,
    FILL,
    SHORTEST_S,
    TARGET_S,
    CostModel,
    Unit,
    plan_units,
    simulate,
)
from golf_ray.adaptation.packing import Budget, Packer
from golf_ray.adaptation.plan import plan_groups, windows
from golf_ray.bench.corpus import document_lengths
from golf_ray.config import AdaptationConfig

SMALL = AdaptationConfig(group_documents=4, chunk_size=8, window=64)
SMALL_COST = CostModel(
    chunk_ms=((16, 30.0), (64, 100.0)), ending_share=0.5, document_ms=2.0, step_ms=250.0
)
"""Four full windows to a step, and chains of seconds with a hundred predictions."""
LENGTHS = st.lists(
    st.one_of(st.integers(0, 60), st.integers(0, 900)), min_size=1, max_size=60
)  # fmt: skip
FIELD = AdaptationConfig()


@functools.cache
def field_lengths() -> tuple[int, ...]:
    """Predictions of 50,000 documents as long as the field's."""
    return tuple((document_lengths(50_000) - 1).tolist())


@functools.cache
def field_units() -> tuple[Unit, ...]:
    return plan_units(field_lengths(), FIELD, COSTS["cuda"])


def unit(cost_s: float, chain_s: float = 0.0) -> Unit:
    return Unit(
        groups=(0,), members=(0,), cost_s=cost_s, chain_s=chain_s, time_s=max(cost_s, chain_s)
    )


# Cost ---------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(n=st.integers(0, 700), grad_steps=st.integers(1, 3))
def test_a_document_costs_its_chunks(n: int, grad_steps: int) -> None:
    adaptation = dataclasses.replace(SMALL, grad_steps=grad_steps)
    share_ms = chain_ms = 2.0 if n else 0.0
    plan = windows(n, SMALL.chunk_size, SMALL.window)
    for chunk in plan:
        ms = float(np.interp(chunk.window_tokens, (16, 64), (30.0, 100.0)))
        passes = grad_steps
        if chunk is plan[-1]:
            ms, passes = ms / 2, 1
        share_ms += passes * ms
        chain_ms += passes * max(ms, 250.0)
    assert SMALL_COST.document_s(n, adaptation) == pytest.approx(share_ms / 1e3)
    assert SMALL_COST.chain_s(n, adaptation) == pytest.approx(chain_ms / 1e3)


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS)
def test_documents_together_take_neither_less_than_their_work_nor_than_the_longest(
    lengths: list[int],
) -> None:
    together_s = SMALL_COST.together_s(lengths, SMALL)
    alone_s = [SMALL_COST.chain_s(n, SMALL) for n in lengths]
    shares_s = [SMALL_COST.document_s(n, SMALL) for n in lengths]
    assert SMALL_COST.work_s(lengths, SMALL) == pytest.approx(sum(shares_s))
    assert max(sum(shares_s), max(alone_s)) <= together_s + 1e-9
    assert together_s <= sum(alone_s) + 1e-9


def test_windows_beyond_the_table_cost_in_proportion() -> None:
    cost = COSTS["cuda"]
    assert cost.chunk_s(np.array([2048, 4096, 32])) == pytest.approx([2.14e-3, 4.28e-3, 0.146e-3])


def test_a_document_alone_leaves_a_gpu_idle_more_than_a_cpu() -> None:
    idle = {
        device: 1 - cost.document_s(20_000, FIELD) / cost.chain_s(20_000, FIELD)
        for device, cost in COSTS.items()
    }
    assert idle["cuda"] > 0.7 > 0.1 > idle["cpu"]


# Units --------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(lengths=LENGTHS, keep_groups=st.booleans())
def test_every_document_is_in_one_unit_longest_first(lengths: list[int], keep_groups: bool) -> None:
    units = plan_units(lengths, SMALL, SMALL_COST, keep_groups=keep_groups)
    groups = plan_groups(lengths, SMALL)
    planned = [(number, m) for number, group in enumerate(groups) for m in group.members]
    assert [m for u in units for m in u.members] == [m for _, m in planned]
    number_of = {m: number for number, m in planned}
    for u in units:
        assert u.groups == tuple(sorted({number_of[m] for m in u.members}))
        assert max(u.cost_s, u.chain_s) <= u.time_s + 1e-9
    assert [u.chain_s for u in units] == sorted((u.chain_s for u in units), reverse=True)
    if keep_groups:
        assert [number for u in units for number in u.groups] == list(range(len(groups)))
        for u in units:
            each = [[lengths[m] for m in groups[number].members] for number in u.groups]
            alone_s = [SMALL_COST.together_s(some, SMALL) for some in each]
            assert u.time_s == pytest.approx(sum(alone_s))
            assert len(each) == 1 or u.time_s <= TARGET_S


@settings(max_examples=200, deadline=None)
@given(lengths=LENGTHS)
def test_units_take_as_long_as_they_may(lengths: list[int]) -> None:
    units = plan_units(lengths, SMALL, SMALL_COST)
    longest_s = SMALL_COST.chain_s(max(lengths), SMALL)
    for u in units:
        limit_s = max(TARGET_S, min(FILL * u.chain_s, CLOSE * longest_s))
        assert len(u.members) == 1 or u.time_s <= limit_s
    for u, v in itertools.pairwise(units):
        both = [lengths[m] for m in (*u.members, *v.members)]
        assert SMALL_COST.together_s(both, SMALL) > SHORTEST_S


@settings(max_examples=50, deadline=None)
@given(data=st.data(), lengths=LENGTHS)
def test_the_order_of_lengths_has_no_effect(data: st.DataObject, lengths: list[int]) -> None:
    shuffled = data.draw(st.permutations(lengths))
    of = [[lengths[m] for m in u.members] for u in plan_units(lengths, SMALL, SMALL_COST)]
    again = plan_units(shuffled, SMALL, SMALL_COST)
    assert of == [[shuffled[m] for m in u.members] for u in again]
    assert again == plan_units(shuffled, SMALL, SMALL_COST)


def test_without_documents_there_is_no_unit() -> None:
    assert plan_units([], SMALL, SMALL_COST) == ()
    (one,) = plan_units([0, 0], SMALL, SMALL_COST)
    assert one.members == (0, 1) and one.time_s == 0


def test_a_group_is_divided_only_where_it_may_be() -> None:
    lengths = [900, 800, 700, 600, 5, 5]
    assert plan_units(lengths, SMALL, SMALL_COST)[0].members == (0, 1)
    kept = plan_units(lengths, SMALL, SMALL_COST, keep_groups=True)
    assert kept[0].members == (0, 1, 2, 3)


# The field ----------------------------------------------------------------------------------------


def test_units_of_the_field() -> None:
    units = field_units()
    assert sorted(m for u in units for m in u.members) == list(range(50_000))
    longest_s = units[0].chain_s
    assert max(u.time_s for u in units) <= CLOSE * longest_s
    assert sum(u.time_s > 10 for u in units) < len(units) / 10
    assert all(u.time_s > SHORTEST_S / 2 for u in units)
    # Little of the device is idle in units, although a document by itself uses a tenth of it.
    assert sum(u.time_s for u in units) < 1.04 * sum(u.cost_s for u in units)


@pytest.mark.parametrize("place", [2, 60, 150, 250])
def test_a_unit_takes_what_the_packer_makes_of_it(place: int) -> None:
    cost, chosen = COSTS["cuda"], field_units()[place]
    lengths = [field_lengths()[m] for m in chosen.members]
    prices_s = cost.chunk_s(np.arange(FIELD.window + 1))
    packer = Packer(lengths, FIELD, Budget(residents=384, step_tokens=98_304))
    took_s = cost.document_ms * len(lengths) / 1e3
    while True:
        packer.admit()
        if (step := packer.take()) is None:
            break
        step_s = sum(prices_s[m.chunk.window_tokens] for m in step.members)
        took_s += max(cost.step_ms / 1e3, step_s * (1 if step.learns else cost.ending_share))
        packer.commit(step)
    assert took_s == pytest.approx(chosen.time_s, rel=0.05)


@pytest.mark.parametrize("actors", [1, 8])
def test_healthy_actors_end_near_the_bound(actors: int) -> None:
    found = simulate(field_units(), actors, slow_share=0, dying_share=0)
    assert found.work_bound_s == pytest.approx(found.work_s / actors)
    assert found.bound_s <= found.makespan_s <= 1.05 * found.bound_s
    assert found.limit == "work" and found.retried == found.died == 0


def test_many_actors_wait_for_the_longest_document() -> None:
    found = simulate(field_units(), 512, slow_share=0, dying_share=0)
    assert found.limit == "the longest document"
    assert found.bound_s == field_units()[0].chain_s > found.work_bound_s


# Simulation ---------------------------------------------------------------------------------------

UNITS = st.lists(
    st.tuples(st.floats(0, 20), st.floats(0, 20)).map(lambda pair: unit(*pair)),
    min_size=1,
    max_size=30,
)


@settings(max_examples=200, deadline=None)
@given(
    units=UNITS,
    actors=st.integers(1, 12),
    slow_share=st.floats(0, 1),
    dying_share=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
    depth=st.integers(1, 3),
    start_s=st.sampled_from([None, 0.0, 7.0]),
)
def test_no_unit_is_lost_or_counted_twice(
    units: list[Unit],
    actors: int,
    slow_share: float,
    dying_share: float,
    seed: int,
    depth: int,
    start_s: float | None,
) -> None:
    found = simulate(
        units, actors, slow_share=slow_share, dying_share=dying_share, seed=seed, depth=depth,
        start_s=start_s,
    )  # fmt: skip
    assert sorted(run.unit for run in found.runs) == list(range(len(units)))
    assert found.makespan_s == max(run.end_s for run in found.runs)
    assert found.makespan_s >= found.bound_s * (1 - 1e-9)
    assert found.retried <= found.died <= actors
    assert 0 <= found.busy_share <= 1 + 1e-9
    for run in found.runs:
        assert run.end_s - run.begin_s >= units[run.unit].time_s
    for one, other in itertools.combinations(found.runs, 2):
        apart = one.end_s <= other.begin_s or other.end_s <= one.begin_s
        assert one.actor != other.actor or apart


def test_slow_actors_count_for_less() -> None:
    units = [unit(1.0)] * 30
    found = simulate(units, 2, slow_share=0.5, dying_share=0, overhead_s=0)
    assert found.work_bound_s == pytest.approx(30 / 1.5)
    assert found.makespan_s == pytest.approx(20)
    assert found.limit == "work"


def test_a_dead_actors_unit_is_begun_again() -> None:
    units = [unit(10.0)] * 2
    found = simulate(units, 2, slow_share=0, dying_share=0.5, start_s=None, overhead_s=0)
    assert found.died == found.retried == 1
    assert found.makespan_s == 20 and len({run.actor for run in found.runs}) == 1
    again = simulate(units, 2, slow_share=0, dying_share=0.5, start_s=2.0, overhead_s=0)
    assert 12 < again.makespan_s < 20


def test_what_limits_is_told() -> None:
    alike = [unit(1.0)] * 8
    healthy = {"slow_share": 0, "dying_share": 0}
    assert simulate(alike, 4, **healthy).limit == "work"
    assert simulate([unit(1.0, 50.0), *alike], 4, **healthy).limit == "the longest document"
    assert simulate([unit(1.0)] * 5, 4, **healthy).limit == "the tail"


def test_a_simulation_is_a_function_of_its_seed() -> None:
    units = [unit(float(n % 7 + 1)) for n in range(40)]
    assert simulate(units, 6, seed=3) == simulate(units, 6, seed=3)
    assert simulate(units, 6, seed=3) != simulate(units, 6, seed=4)


def test_units_of_documents_are_the_plan_on_a_gpu_and_the_groups_on_a_cpu() -> None:
    from evaluators.jobs import document_units
    from golf_ray.adaptation.engine import group_documents
    from golf_ray.adaptation.scores import Document

    lengths = [int(n) for n in document_lengths(700, seed=2)]
    ends = np.cumsum([n + 1 for n in lengths]).tolist()
    documents = [
        Document(index=i, start=end - n - 1, end=end)
        for i, (n, end) in enumerate(zip(lengths, ends, strict=True))
    ]
    adaptation = AdaptationConfig()
    on_cpu = document_units(documents, adaptation, "cpu")
    assert on_cpu == list(group_documents(documents, adaptation))
    on_gpu = document_units(documents[::-1], adaptation, "cuda")
    assert sorted(d.index for unit in on_gpu for d in unit) == list(range(700))
    planned = plan_units(lengths, adaptation, COSTS["cuda"])
    assert [[d.index for d in unit] for unit in on_gpu] == [list(u.members) for u in planned]
