"""Adapters: where they sit, what a forward gets of them, and A from a file."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from adaptation_cases import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st

from golf_ray.adaptation.adapters import (
    SHARED_INPUT,
    SITE_CODES,
    AdapterBank,
    AdapterHooks,
    AdapterLayout,
    RowLayout,
    adapter_slots,
    read_adapter_init,
)
from golf_ray.adaptation.philox import adapter_a
from golf_ray.config import AdapterSite
from golf_ray.errors import DataError
from golf_ray.kernels.mlp import mlp
from golf_ray.model.hooks import Site
from golf_ray.presets import RECORD, TINY

SLOTS = adapter_slots(SMALL)
LAYOUT = AdapterLayout(SLOTS, 2)


def test_slots_of_the_record() -> None:
    slots = adapter_slots(RECORD.model)
    assert len(slots) == 17 * 5 + 1
    assert len({slot.id for slot in slots}) == len(slots)
    assert AdapterLayout(slots, RECORD.adaptation.rank).num_parameters == 8_355_840
    assert {s.in_features for s in slots} == {512}
    widths = {s.site: s.out_features for s in slots}
    assert widths == {"q": 512, "k": 256, "v": 256, "o": 512, "mlp": 512, "head": 8192}
    assert (slots[-1].site, slots[-1].layer) == ("head", 17)


def test_ids_do_not_depend_on_the_other_sites() -> None:
    ids = {(s.site, s.layer): s.id for s in adapter_slots(TINY.model)}
    for site in SITE_CODES:
        for slot in adapter_slots(TINY.model, (site,)):
            assert slot.id == ids[slot.site, slot.layer]
    assert adapter_slots(TINY.model, ("head", "mlp", "q")) == adapter_slots(
        TINY.model, ("q", "mlp", "head")
    )


def test_every_configured_site_has_a_code() -> None:
    assert set(SITE_CODES) == set(get_args(AdapterSite)) == set(get_args(Site))


def test_a_fresh_row_is_a_function_of_document_and_slot() -> None:
    bank = AdapterBank(AdapterLayout(SLOTS, 3), 2)
    bank.p_NP.fill_(7.0)
    bank.reset(1, 40, seed=5)
    assert (bank.p_NP[0] == 7).all()
    pairs = bank.layout.views(bank.p_NP)
    for slot in SLOTS:
        a_NRI, b_NOR = pairs[slot.site, slot.layer]
        assert torch.equal(a_NRI[1], adapter_a(5, 40, slot.id, 3, slot.in_features))
        assert b_NOR.shape == (2, slot.out_features, 3) and (b_NOR[1] == 0).all()


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), seed=st.integers(0, 100),
    head=st.booleans(),
)  # fmt: skip
def test_each_row_meets_its_own_adapter(lengths: list[int], seed: int, head: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    bank = AdapterBank(LAYOUT, len(lengths))
    bank.p_NP.normal_(generator=generator)
    site: Site = "head" if head else "k"
    slot = next(s for s in SLOTS if s.site == site)
    x_TI = torch.randn(sum(lengths), slot.in_features, generator=generator)
    y_TO = torch.randn(sum(lengths), slot.out_features, generator=generator)
    right, wrong = RowLayout(lengths), RowLayout([7] * len(lengths))
    layouts = {"body": wrong, "ends": right} if head else {"body": right, "ends": wrong}
    leaves = LAYOUT.leaves(bank.p_NP)
    out = AdapterHooks(leaves, **layouts).adapt(site, slot.layer, x_TI, y_TO)
    weight_TO = torch.randn(out.shape, generator=generator)
    grad_NP = LAYOUT.gradient(leaves, (out * weight_TO).sum())

    parts = zip(x_TI.split(lengths), y_TO.split(lengths), weight_TO.split(lengths), strict=True)
    for i, (x, y, weight) in enumerate(parts):
        alone = LAYOUT.views(bank.p_NP[i : i + 1])
        a, b = (t[0].clone().requires_grad_() for t in alone[slot.site, slot.layer])
        expected = y + (x @ a.T) @ b.T
        begin = sum(lengths[:i])
        torch.testing.assert_close(out[begin : begin + len(x)], expected, rtol=1e-5, atol=1e-5)
        (expected * weight).sum().backward()
        assert a.grad is not None and b.grad is not None
        for mine, theirs in zip(
            LAYOUT.views(grad_NP[i : i + 1])[slot.site, slot.layer], (a.grad, b.grad), strict=True
        ):
            torch.testing.assert_close(mine[0], theirs, rtol=1e-4, atol=1e-4)
        # No other slot took part.
        assert grad_NP[i].count_nonzero() <= a.numel() + b.numel()


def test_parameters_lie_side_by_side_and_once() -> None:
    for sites in (None, ("q", "o"), ("k", "head"), ("mlp",)):
        slots = adapter_slots(SMALL) if sites is None else adapter_slots(SMALL, sites)
        layout = AdapterLayout(slots, 3)
        taken = torch.zeros(1, layout.num_parameters)
        for a, b in layout.views(taken).values():
            a += 1
            b += 1
        assert (taken == 1).all()


def test_matrices_of_one_input_are_one_matrix() -> None:
    layout = AdapterLayout(SLOTS, 2)
    for layer in range(4):
        places = [layout.places[site, layer][0] for site in SHARED_INPUT]
        size = 2 * SMALL.model_dim
        assert places == [places[0] + i * size for i in range(len(SHARED_INPUT))]


def test_a_site_without_adapter_is_left_alone() -> None:
    bank = AdapterBank(AdapterLayout(adapter_slots(SMALL, ("q",)), 2), 1)
    rows = RowLayout([3])
    y_TO = torch.randn(3, 16)
    hooks = AdapterHooks(bank.layout.views(bank.p_NP[:1]), rows, rows)
    assert hooks.adapt("mlp", 0, torch.randn(3, 16), y_TO) is y_TO


@pytest.mark.parametrize("site", ["k", "mlp", "head"])
def test_in_16_bits_what_is_added_is_added_before_the_sum_is_rounded(site: Site) -> None:
    # An eighth of bfloat16's last place near 1, which a rounded sum would lose.
    added, dtype = 2.0**-10, torch.bfloat16
    slot = next(s for s in SLOTS if s.site == site)
    bank = AdapterBank(LAYOUT, 1)
    a, b = (t[0] for t in bank.layout.views(bank.p_NP)[site, slot.layer])
    a[0, 0], b[:, 0] = 1.0, added
    rows = RowLayout([2])
    hooks = AdapterHooks(bank.layout.views(bank.p_NP), rows, rows)
    x_TI = torch.zeros(2, 16, dtype=dtype)
    x_TI[:, 0], x_TI[:, 1] = 1.0, 2.0**-8
    x_TI.requires_grad_()
    # 1 + 2^-8 is half-way between two numbers and rounded down; with what is added it goes up.
    w_OI = torch.zeros(slot.out_features, 16, dtype=dtype)
    w_OI[:, 0], w_OI[:, 1] = 1.0, 1.0
    if site == "mlp":
        up_FD = torch.eye(32, 16, dtype=dtype)
        down_DF = torch.zeros(16, 32, dtype=dtype)
        down_DF[:, 0], down_DF[:, 1] = 1.0, 2.0**8
        y, h_TF = hooks.mlp(slot.layer, x_TI, up_FD, down_DF, mlp)
        assert h_TF.dtype == dtype
    else:
        y = hooks.linear((site,), slot.layer, x_TI, w_OI, (slot.out_features,))
    exact = 1 + 2.0**-8 + added
    assert y.dtype == (torch.float32 if site == "head" else dtype)
    assert (y == torch.tensor(exact).to(y.dtype)).all()
    assert (torch.tensor(1 + 2.0**-8).to(dtype) + added).to(dtype).item() < y[0, 0].item()
    (gradient,) = torch.autograd.grad(y.float().sum(), x_TI)
    assert gradient.dtype == dtype and torch.isfinite(gradient).all() and gradient[0, 0] > 1


def test_a_neighbours_rows_change_no_bit() -> None:
    lengths = [5, 3, 4]
    bank = AdapterBank(LAYOUT, 3)
    bank.p_NP.normal_(generator=torch.Generator().manual_seed(0))
    rows = RowLayout(lengths)
    hooks = AdapterHooks(bank.layout.views(bank.p_NP), rows, rows)
    x_TI, y_TO = torch.randn(12, 16), torch.randn(12, 16)
    before = hooks.adapt("q", 0, x_TI, y_TO)
    x_TI[5:8] = 1e6
    after = hooks.adapt("q", 0, x_TI, y_TO)
    assert torch.equal(before[:5], after[:5]) and torch.equal(before[8:], after[8:])
    assert not torch.equal(before[5:8], after[5:8])


def test_reading_a_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    a = np.random.default_rng(0).normal(size=(2, 16))
    np.savez(path, A_rank2_in16=a, other=np.arange(3))
    init = read_adapter_init(path, SLOTS, 2)
    assert list(init) == [16] and init[16].dtype == torch.float32
    bank = AdapterBank(LAYOUT, 1)
    bank.reset(0, 3, 0, init)
    for a_NRI, _ in bank.layout.views(bank.p_NP[:1]).values():
        np.testing.assert_array_equal(a_NRI[0].numpy(), a.astype(np.float32))


def _saved(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p, "cannot be read"),
        (lambda p: p.mkdir() or p, "cannot be read"),
        (lambda p: (p.write_bytes(b"") and None) or p, "no .npz"),
        (lambda p: p.write_bytes(b"PK\x03\x04 torn") and p, "no .npz"),
        (lambda p: p.write_bytes(b"nothing of the kind") and p, "no .npz"),
        (lambda p: _saved(p, A_rank4_in16=np.zeros((4, 16))), "no array A_rank2_in16"),
        (lambda p: _saved(p, A_rank2_in16=np.zeros((16, 2))), r"\[16, 2\]"),
        (lambda p: _saved(p, A_rank2_in16=np.zeros((2, 16), np.int64)), "int64"),
        (lambda p: _saved(p, A_rank2_in16=np.full((2, 16), np.nan)), "not finite"),
        (lambda p: _saved(p, A_rank2_in16=np.array([None, {}], object)), "no .npz"),
    ],
)
def test_a_bad_file_is_one_line(make: object, says: str, tmp_path: Path) -> None:
    path = make(tmp_path / "a.npz")  # type: ignore[operator]
    with pytest.raises(DataError, match=says) as caught:
        read_adapter_init(path, SLOTS, 2)
    assert "\n" not in str(caught.value) and "a.npz" in str(caught.value)


def test_a_single_array_is_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((2, 16)))
    with pytest.raises(DataError, match="a single array"):
        read_adapter_init(path, SLOTS, 2)
