"""The attention adapter: which implementation is taken, and that all of them agree."""

from __future__ import annotations

import flash_standin
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from golf_ray.config import Config
from golf_ray.errors import ConfigError
from golf_ray.kernels import flash
from golf_ray.model import attention
from golf_ray.model.attention import attend, resolve_backend
from golf_ray.model.compute import choose_compute, resolve_kernels
from golf_ray.model.segments import Segments
from golf_ray.presets import TINY

CPU = torch.device("cpu")


def operands(lengths: list[int], H: int, G: int, d: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(sum(lengths), heads, d, generator=generator, requires_grad=True)
        for heads in (H, G, G)
    ]


def packed(lengths: list[int], padding: int = 2) -> Segments:
    """Segments whose bounds end in repetitions, as batches' do."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return Segments.of_bounds([*bounds, *[bounds[-1]] * padding], max(lengths))


def plain(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """softmax(q k^T / sqrt(d)) v with a mask over everything, in float64."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    q_HTd, k_HTd, v_HTd = (t.double().transpose(0, 1) for t in (q, k, v))
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = (owner[:, None] == owner[None, :]) & torch.ones(len(owner), len(owner)).tril().bool()
    scores = q_HTd @ k_HTd.mT / q.shape[2] ** 0.5
    return (scores.masked_fill(~allowed, -torch.inf).softmax(-1) @ v_HTd).transpose(0, 1)


def grads(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return list(torch.autograd.grad(y, leaves, seed.to(y.dtype)))


@pytest.mark.parametrize(
    "implementation", ["sdpa", "sdpa in a graph", "fa3: work space", "fa3: gradients first"]
)
@pytest.mark.parametrize(
    ("lengths", "H", "G", "d"),
    [([5, 1, 17], 4, 2, 8), ([70, 3, 130], 2, 1, 16), ([1], 3, 3, 8), ([9, 9, 9], 6, 2, 24)],
)
def test_every_implementation_is_the_plain_one(
    implementation: str,
    lengths: list[int],
    H: int,
    G: int,
    d: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, _, returns = implementation.partition(": ")
    leaves, segments = operands(lengths, H, G, d), packed(lengths)
    if returns:
        standin = flash_standin.operators(returns)  # type: ignore[arg-type]
        monkeypatch.setattr(flash, "operators", lambda: standin)
    if name == "sdpa in a graph":
        q, k, v = leaves
        k, v = (t.repeat_interleave(H // G, 1) for t in (k, v))
        found = attention._sdpa_op(q, k, v, segments.cu_seqlens)
    else:
        found = attend(*leaves, segments, name)  # type: ignore[arg-type]
    expected = plain(*leaves, lengths)
    # Sums of up to 130 float32 products.
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(grads(found, leaves), grads(expected, leaves), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=5), st.integers(0, 99))
def test_without_gradients_it_is_the_same(lengths: list[int], seed: int) -> None:
    leaves = operands(lengths, 4, 2, 8, seed)
    with torch.no_grad():
        found = attend(*leaves, packed(lengths))
    torch.testing.assert_close(found.double(), plain(*leaves, lengths), atol=1e-5, rtol=1e-5)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=6), st.integers(1, 7))
def test_blocks_hold_every_row_once_with_what_it_may_see(lengths: list[int], at_once: int) -> None:
    total, seen = sum(lengths), {}
    for query_NR, row_NS in attention._blocks(lengths, CPU, at_once):
        for queries, rows in zip(query_NR.tolist(), row_NS.tolist(), strict=True):
            assert rows[-len(queries) :] == queries
            for place, row in enumerate(queries, len(rows) - len(queries)):
                if row < total:
                    assert row not in seen
                    seen[row] = rows[: place + 1]
    start = 0
    for length in lengths:
        for row in range(start, start + length):
            assert seen.pop(row) == list(range(start, row + 1))
        start += length
    assert not seen


def test_no_mask_of_all_pairs_is_built() -> None:
    """20,000 tokens in one buffer: all pairs would be 400 million, 1.6 GB in float32."""
    lengths = [500] * 40
    leaves = operands(lengths, 2, 1, 8)
    with torch.profiler.profile(profile_memory=True) as profile:
        attend(*leaves, packed(lengths)).sum().backward()
    peak = max(event.self_cpu_memory_usage for event in profile.key_averages())
    assert peak < 400e6


def test_compiled_in_one_graph() -> None:
    """One graph holds for all segments: where they lie is data."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda q, k, v, cu: attend(
            q, k, v, Segments(cu_seqlens=cu, max_seqlen=20, positions_T=torch.arange(23)), "sdpa"
        ),
        backend=backend,
        fullgraph=True,
    )
    for lengths in ([5, 1, 17], [20, 2, 1], [3, 17, 3]):
        leaves = operands(lengths, 4, 2, 8)
        found = compiled(*leaves, packed(lengths).cu_seqlens)
        torch.testing.assert_close(found, attend(*leaves, packed(lengths)), atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1


@pytest.mark.parametrize("returns", ["work space", "gradients first"])
def test_the_flash_op_is_fit_for_torch_compile(
    returns: flash_standin.Returns, monkeypatch: pytest.MonkeyPatch
) -> None:
    standin = flash_standin.operators(returns)
    monkeypatch.setattr(flash, "operators", lambda: standin)
    lengths = [5, 1, 6]
    segments = packed(lengths)
    arguments = (*operands(lengths, 4, 2, 8), segments.cu_seqlens, segments.max_seqlen)
    torch.library.opcheck(
        torch.ops.golf_ray.flash_attention.default,
        arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    compiled = torch.compile(
        lambda *a: flash.flash_attention(*a), backend="aot_eager", fullgraph=True
    )
    leaves = list(arguments[:3])
    expected = grads(attend(*leaves, segments), leaves)
    for mine, theirs in zip(grads(compiled(*arguments), leaves), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


# Choosing -----------------------------------------------------------------------------------------


def test_auto_takes_what_a_cpu_has() -> None:
    assert resolve_backend("auto", CPU, torch.float32, 64) == "sdpa"
    chosen = choose_compute(TINY, CPU)
    assert chosen.to_dict() == {"dtype": "float32", "attention": "sdpa", "kernels": "torch"}


@pytest.mark.parametrize("name", ["fa3", "varlen"])
def test_a_named_backend_that_is_absent_is_an_error(name: str) -> None:
    config = TINY.with_overrides({"attention.backend": name})
    with pytest.raises(
        ConfigError, match=rf"attention.backend = '{name}' cannot be used: it needs"
    ):
        choose_compute(config, CPU)


def test_an_absent_package_is_named_with_its_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "operators", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    reason = flash.why_not(torch.device("cuda"), torch.bfloat16, 64)
    assert reason is not None and "pip install" in reason and "xformers==0.0.34" in reason


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "expected"),
    [
        ((9, 0), torch.bfloat16, 64, "fa3"),
        ((9, 0), torch.float32, 64, "sdpa"),
        ((9, 0), torch.bfloat16, 260, "varlen"),
        ((8, 0), torch.float16, 64, "varlen"),
        ((7, 5), torch.float16, 64, "sdpa"),
    ],
)
def test_auto_takes_the_fastest_that_works(
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    standin = flash_standin.operators("work space")
    monkeypatch.setattr(flash, "operators", lambda: standin)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(attention, "_varlen", lambda: (None, frozenset()))
    assert resolve_backend("auto", torch.device("cuda"), dtype, head_dim) == expected


def test_fused_kernels_need_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    assert resolve_kernels("auto", CPU, torch.float32) == "torch"
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ConfigError, match=r"kernels.backend = 'triton' cannot be used: it needs a"):
        resolve_kernels("triton", CPU, torch.float32)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert resolve_kernels("triton", CPU, torch.float32) == "triton"


def test_backend_names_are_the_configuration_s() -> None:
    with pytest.raises(ConfigError, match="fa2"):
        Config().with_overrides({"attention.backend": "fa2"})
