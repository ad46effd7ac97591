"""How many documents and tokens an engine takes at a time, with made-up free memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from adaptation_cases import ADAPTATION, SMALL
from hypothesis import given, settings
from hypothesis import strategies as st

from golf_ray.adaptation.adapters import AdapterLayout, adapter_slots
from golf_ray.adaptation.budget import (
    FREE_SHARE,
    MOST_BYTES,
    PASSES,
    RESIDENTS,
    STEP_TOKENS,
    choose_budget,
    document_bytes,
    token_bytes,
)
from golf_ray.adaptation.packing import Budget
from golf_ray.config import AdaptationConfig, ModelConfig
from golf_ray.model.compute import Compute

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
RECORD = ModelConfig()
HALF = Compute(dtype=torch.bfloat16)
GB = 10**9
Memory = tuple[int, int, int]
"""Bytes that the driver has free, that torch holds, and that tensors use of those."""


def budget_on_gpu(
    memory: Memory,
    adaptation: AdaptationConfig,
    *,
    config: ModelConfig = RECORD,
    num_documents: int = 50_000,
) -> Budget:
    free, reserved, allocated = memory
    layout = AdapterLayout(adapter_slots(config, adaptation.sites), adaptation.rank)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free, 141 * GB))
        patch.setattr(torch.cuda, "memory_reserved", lambda device=None: reserved)
        patch.setattr(torch.cuda, "memory_allocated", lambda device=None: allocated)
        return choose_budget(config, adaptation, HALF, layout, CUDA, num_documents=num_documents)


def budget_on_cpu(adaptation: AdaptationConfig, num_documents: int = 50_000) -> Budget:
    layout = AdapterLayout(adapter_slots(SMALL, adaptation.sites), adaptation.rank)
    return choose_budget(SMALL, adaptation, Compute(), layout, CPU, num_documents=num_documents)


# CPU -------------------------------------------------------------------------------------------


def test_a_cpu_takes_its_defaults_and_asks_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: object = None) -> int:
        raise AssertionError("asked a GPU")

    for name in ("mem_get_info", "memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    expected = Budget(residents=RESIDENTS["cpu"], step_tokens=STEP_TOKENS["cpu"])
    assert budget_on_cpu(ADAPTATION) == expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_configured_values_are_respected(device: str) -> None:
    def choose(adaptation: AdaptationConfig, num_documents: int) -> Budget:
        if device == "cpu":
            return budget_on_cpu(adaptation, num_documents)
        memory = (70 * GB, 0, 0)
        return budget_on_gpu(memory, adaptation, config=SMALL, num_documents=num_documents)

    both = dataclasses.replace(ADAPTATION, resident_documents=500, step_tokens=123_456)
    assert choose(both, 50_000) == Budget(residents=500, step_tokens=123_456)
    rows = choose(dataclasses.replace(ADAPTATION, resident_documents=5), 50_000)
    assert rows == Budget(residents=5, step_tokens=STEP_TOKENS[device])
    tokens = choose(dataclasses.replace(ADAPTATION, step_tokens=7), 50_000)
    assert tokens == Budget(residents=RESIDENTS[device], step_tokens=7)
    # Even of configured ones there are no more than documents.
    assert choose(both, 3).residents == 3


@pytest.mark.parametrize(("num_documents", "residents"), [(0, 1), (1, 1), (17, 17), (10**6, None)])
def test_there_are_no_more_rows_than_documents(num_documents: int, residents: int | None) -> None:
    assert budget_on_cpu(ADAPTATION, num_documents).residents == (residents or RESIDENTS["cpu"])
    found = budget_on_gpu((75 * GB, 0, 0), ADAPTATION, num_documents=num_documents).residents
    assert found == (residents or RESIDENTS["cuda"])


# GPU -------------------------------------------------------------------------------------------

ADAPTATIONS = st.builds(
    lambda window, **rest: AdaptationConfig(chunk_size=min(32, window), window=window, **rest),
    window=st.sampled_from([8, 512, 2048]),
    rank=st.integers(1, 128),
    optimizer=st.sampled_from(["adam", "sgd"]),
    beta1=st.sampled_from([0.0, 0.9]),
    resident_documents=st.sampled_from([None, None, 1, 30]),
    step_tokens=st.sampled_from([None, None, 1, 5000, 300_000]),
    sites=st.sampled_from([("q", "k", "v", "o", "mlp", "head"), ("head",), ()]),
)
BYTES = st.one_of(st.integers(0, 141 * GB), st.integers(0, 100_000))


@settings(max_examples=300, deadline=None)
@given(adaptation=ADAPTATIONS, free=st.tuples(BYTES, BYTES), held=BYTES, documents=BYTES)
def test_less_memory_never_gives_more_and_there_is_always_one_of_each(
    adaptation: AdaptationConfig, free: tuple[int, int], held: int, documents: int
) -> None:
    less, more = (
        budget_on_gpu((f, held, 0), adaptation, num_documents=documents) for f in sorted(free)
    )
    assert less.residents <= more.residents and less.step_tokens <= more.step_tokens
    assert less.residents >= 1
    if adaptation.step_tokens is None:
        assert less.step_tokens >= adaptation.window
        assert more.step_tokens <= max(adaptation.window, STEP_TOKENS["cuda"])
    else:
        assert less.step_tokens == more.step_tokens == adaptation.step_tokens
    if adaptation.resident_documents is not None:
        assert less.residents == min(adaptation.resident_documents, max(1, documents))


@settings(max_examples=300, deadline=None)
@given(adaptation=ADAPTATIONS, free=BYTES, more=st.integers(1, 3_000_000))
def test_a_little_less_memory_never_gives_more(
    adaptation: AdaptationConfig, free: int, more: int
) -> None:
    less, much = (budget_on_gpu((f, 0, 0), adaptation) for f in (free, free + more))
    assert less.residents <= much.residents and less.step_tokens <= much.step_tokens


def test_a_token_more_does_not_cost_a_document() -> None:
    adaptation = AdaptationConfig(rank=8)
    budgets = [budget_on_gpu((10 * GB + n * 2 * 10**6, 0, 0), adaptation) for n in range(3000)]
    for name in ("residents", "step_tokens"):
        values = [getattr(budget, name) for budget in budgets]
        assert values == sorted(values) and values[0] < values[-1]


def test_memory_matters_over_a_range() -> None:
    adaptation = AdaptationConfig()
    budgets = [budget_on_gpu((n * GB, 0, 0), adaptation) for n in (1, 20, 40, 60, 78)]
    assert budgets[0] == Budget(residents=1, step_tokens=adaptation.window)
    assert budgets[1].step_tokens < budgets[2].step_tokens
    assert 1 < budgets[1].residents < budgets[2].residents <= budgets[-1].residents


@settings(max_examples=100, deadline=None)
@given(adaptation=ADAPTATIONS, free=st.integers(30 * GB, 141 * GB))
def test_what_is_chosen_fits(adaptation: AdaptationConfig, free: int) -> None:
    adaptation = dataclasses.replace(adaptation, resident_documents=None, step_tokens=None)
    budget = budget_on_gpu((free, 0, 0), adaptation)
    layout = AdapterLayout(adapter_slots(RECORD, adaptation.sites), adaptation.rank)
    taken = budget.residents * document_bytes(layout, adaptation, 2)
    taken += budget.step_tokens * PASSES * token_bytes(RECORD, adaptation, 2)
    assert taken <= min(FREE_SHARE * free, MOST_BYTES) * (1 + 1e-9)


def test_what_torch_holds_and_does_not_use_is_free() -> None:
    adaptation = AdaptationConfig()
    plain = budget_on_gpu((30 * GB, 0, 0), adaptation)
    assert budget_on_gpu((20 * GB, 15 * GB, 5 * GB), adaptation) == plain
    assert budget_on_gpu((30 * GB, 15 * GB, 15 * GB), adaptation) == plain
    assert budget_on_gpu((30 * GB, 15 * GB, 5 * GB), adaptation) != plain


def test_a_gpu_of_any_size_is_used_up_to_a_bound() -> None:
    adaptation = dataclasses.replace(AdaptationConfig(), step_tokens=100)
    at_bound, beyond = (
        budget_on_gpu((int(n), 0, 0), adaptation) for n in (MOST_BYTES / FREE_SHARE + 1, 10**13)
    )
    assert at_bound == beyond


def test_what_a_document_takes_grows_with_its_moments() -> None:
    adaptation = AdaptationConfig()
    layout = AdapterLayout(adapter_slots(RECORD), adaptation.rank)
    of = {
        (optimizer, beta1): document_bytes(
            layout, dataclasses.replace(adaptation, optimizer=optimizer, beta1=beta1), 2
        )
        / layout.num_parameters
        for optimizer in ("adam", "sgd")
        for beta1 in (0.0, 0.9)
    }
    # Parameters, shadow and gradient are 8 bytes, each moment 4.
    assert of == {("adam", 0.0): 12, ("adam", 0.9): 16, ("sgd", 0.0): 8, ("sgd", 0.9): 12}


def test_without_adapters_only_passes_take_memory() -> None:
    adaptation = AdaptationConfig(sites=())
    assert AdapterLayout(adapter_slots(RECORD, ()), adaptation.rank).num_parameters == 0
    budget = budget_on_gpu((20 * GB, 0, 0), adaptation)
    assert budget.residents == RESIDENTS["cuda"]
    assert adaptation.window < budget.step_tokens < STEP_TOKENS["cuda"]
    assert budget_on_cpu(dataclasses.replace(ADAPTATION, sites=())).residents == RESIDENTS["cpu"]
