"""Hessians: the stored ones, any dealing of batches to ranks, loops, shared inputs, files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import arrays, tiny_model
from torch import Tensor

from golf_ray.errors import CheckpointError
from golf_ray.model.compute import Compute
from golf_ray.model.hooks import Hooks
from golf_ray.model.model import GolfModel
from golf_ray.model.parameters import matrix_specs
from golf_ray.model.segments import Segments
from golf_ray.presets import TINY
from golf_ray.quantization import hessian
from golf_ray.quantization.hessian import (
    HessianSums,
    collect_hessians,
    collect_sums,
    gram,
    merge_hessians,
    read_hessians,
    write_hessians,
)

CALIBRATION = arrays("gptq")["calibration_tokens"].astype(np.int64)
STORED = {k.removesuffix(".hessian"): v for k, v in arrays("gptq").items() if "hessian" in k}


class Inputs(Hooks):
    """Keeps every input row in float64."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Tensor]] = {}

    def matrix_input(self, name: str, x_TI: Tensor) -> None:
        self.rows.setdefault(name, []).append(x_TI.detach().double())


def direct(model: GolfModel, batches: Any, *, loop: bool) -> dict[str, Tensor]:
    """The definition: all rows of all passes and batches, one product, float64."""
    taps = Inputs()
    with torch.no_grad():
        for batch in batches:
            tokens = torch.as_tensor(batch)
            segments = Segments.rows(tokens.shape[0], tokens.shape[1], "cpu")
            model.logits(model.hidden(tokens.flatten(), segments, loop=loop, hooks=taps), taps)
    rows = {name: torch.cat(pieces) for name, pieces in taps.rows.items()}
    return {name: x.T @ x / len(batches) for name, x in rows.items()}


def relative(found: Tensor, expected: Any) -> float:
    expected = torch.as_tensor(expected).double()
    return float((found.double() - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def hessians() -> dict[str, Tensor]:
    return collect_hessians(tiny_model(), CALIBRATION)


def test_stored_hessians(hessians: dict[str, Tensor]) -> None:
    assert len(STORED) == 5
    for name, expected in STORED.items():
        assert hessians[name].dtype == torch.float32
        assert relative(hessians[name], expected) <= 1e-4, name


def test_every_matrix_has_one(hessians: dict[str, Tensor]) -> None:
    specs = matrix_specs(TINY.model)
    assert {s.name: (s.shape[1], s.shape[1]) for s in specs} == {
        name: tuple(h.shape) for name, h in hessians.items()
    }


@pytest.mark.parametrize("loop", [True, False])
def test_agrees_with_the_definition(loop: bool) -> None:
    model, batches = tiny_model(), CALIBRATION[:2]
    found = collect_hessians(model, batches, loop=loop)
    expected = direct(model, batches, loop=loop)
    assert found.keys() == expected.keys()
    for name, h_II in expected.items():
        assert relative(found[name], h_II) <= 1e-5, name


def test_looped_layers_add_up_over_their_passes() -> None:
    # Rows of the attention input have norm^2 = I / (layer + 1), so the trace counts the rows.
    model = tiny_model()
    for loop, passes in ((False, 1), (True, 3)):
        h_II = collect_hessians(model, CALIBRATION[:1], loop=loop)["blocks.2.attn.c_q.weight"]
        assert float(h_II.trace()) == pytest.approx(passes * 4 * 64 * 64 / 3, rel=1e-3)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("contiguous", [False, True])
def test_dealing_changes_no_bit(hessians: dict[str, Tensor], world: int, contiguous: bool) -> None:
    deals = [np.array_split(np.arange(4), world)[r] for r in range(world)] if contiguous else [
        np.arange(r, 4, world) for r in range(world)
    ]  # fmt: skip
    model = tiny_model()
    parts = [collect_sums(model, CALIBRATION[deal]) for deal in deals]
    for order in (parts, parts[::-1]):
        merged = merge_hessians(order)
        assert merged.num_batches == 4
        for name, h_II in merged.means().items():
            assert torch.equal(h_II, hessians[name]), name


def test_reduce_and_ranks_without_batches(hessians: dict[str, Tensor]) -> None:
    model = tiny_model()
    others = collect_sums(model, CALIBRATION[2:])
    found = collect_hessians(
        model, CALIBRATION[:2], reduce=lambda mine: merge_hessians([mine, others])
    )
    assert all(torch.equal(found[name], hessians[name]) for name in hessians)
    idle = collect_sums(model, [])
    merged = merge_hessians([idle, collect_sums(model, CALIBRATION), idle]).means()
    assert all(torch.equal(merged[name], hessians[name]) for name in hessians)


def test_sums_of_many_batches_are_exact_in_any_order() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, 5000, generator=generator) * 1e3
    parts = [HessianSums(sums={"w": v.double()}, num_batches=1) for v in values]
    expected = merge_hessians(parts).sums["w"]
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(64)
        halves = [merge_hessians([parts[i] for i in half]) for half in np.array_split(order, 5)]
        assert torch.equal(merge_hessians(halves).sums["w"], expected)


def test_a_batch_is_rounded_to_float32_once() -> None:
    # Otherwise a looped layer's sums would need more than 53 bits, and depend on their order.
    sums = collect_sums(tiny_model(), CALIBRATION[:1]).sums
    assert all(torch.equal(s, s.float().double()) for s in sums.values())


def test_no_batch_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="no calibration batch"):
        collect_hessians(tiny_model(), [])


def test_query_key_value_share_one_product(
    hessians: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (hessians[f"blocks.1.attn.c_{x}.weight"] for x in "qkv")
    assert q is k and k is v
    calls = []
    monkeypatch.setattr(hessian, "gram", lambda x: calls.append(x.shape) or gram(x))
    collect_sums(tiny_model(), CALIBRATION[:1])
    # Four distinct inputs a virtual layer (6 layers, 2 of them three times) and the head's.
    assert len(calls) == 4 * 10 + 1


def test_untied_head_and_projections_are_seen() -> None:
    config = dataclasses.replace(TINY.model, tie_embeddings=False, embedding_dim=32)
    model = GolfModel(config).init_weights(3)
    found = collect_hessians(model, CALIBRATION[:1])
    expected = {s.name: s.shape[1] for s in matrix_specs(config) if s.multiplies}
    assert {name: len(h) for name, h in found.items()} == expected
    assert "tok_emb.weight" not in found and len(found["lm_head.weight"]) == 32


def test_head_in_pieces_is_the_head(
    hessians: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hessian, "HEAD_ROWS", 100)
    found = collect_hessians(tiny_model(), CALIBRATION)
    assert relative(found["tok_emb.weight"], hessians["tok_emb.weight"]) <= 1e-6


def test_gram_ignores_autocast_and_keeps_float32() -> None:
    x_TI = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gram(x_TI)
    assert found.dtype == torch.float32
    assert relative(found, x_TI.double().T @ x_TI.double()) <= 1e-6
    half = x_TI.bfloat16()
    assert relative(gram(half), half.double().T @ half.double()) <= 1e-6


def test_bfloat16_calibration_is_near(hessians: dict[str, Tensor]) -> None:
    model = tiny_model()
    model.compute = Compute(dtype=torch.bfloat16)
    found = collect_hessians(model, CALIBRATION)
    for name, h_II in hessians.items():
        assert relative(found[name], h_II) <= 0.05, name


def test_file_round_trip(tmp_path: Path, hessians: dict[str, Tensor]) -> None:
    path = tmp_path / "hessians.pt"
    write_hessians(path, hessians)
    assert [p.name for p in tmp_path.iterdir()] == ["hessians.pt"]
    found = read_hessians(path)
    assert found.keys() == hessians.keys()
    assert all(torch.equal(found[name], hessians[name]) for name in hessians)
    # Query, key and value are stored once, and still share memory when read.
    unique = {id(h): h.numel() * 4 for h in hessians.values()}
    assert path.stat().st_size < sum(unique.values()) + 40_000
    q, k = (found[f"blocks.0.attn.c_{x}.weight"] for x in "qk")
    assert q.data_ptr() == k.data_ptr()


def test_bad_files_are_one_line(tmp_path: Path, hessians: dict[str, Tensor]) -> None:
    path = tmp_path / "hessians.pt"
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_hessians(path)
    write_hessians(path, hessians)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="damaged"):
        read_hessians(path)
    torch.save({"w": torch.zeros(2, 3)}, path)
    with pytest.raises(CheckpointError, match="something else than Hessians"):
        read_hessians(path)
