"""GPTQ: the stored codes, a plain float64 twin, clipping, dead columns, hard Hessians."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import arrays
from torch import Tensor

from golf_ray.errors import CheckpointError
from golf_ray.quantization.gptq import (
    MAX_DAMPING_RAISES,
    gptq_codes,
    matmul_precision,
    max_code,
    prepare_factor,
    rounded_codes,
    row_scales,
    weighted_error,
)

STORED = [name.removesuffix(".hessian") for name in arrays("gptq") if name.endswith(".hessian")]


def problem(
    seed: int, rows: int, columns: int, *, matrices: int = 1, samples: int | None = None
) -> tuple[Tensor, Tensor]:
    """Weights [N, R, C] and Hessians [N, C, C] of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    w_NRC = torch.randn(matrices, rows, columns, generator=generator)
    x_NTC = torch.randn(matrices, samples or 4 * columns, columns, generator=generator)
    mix_NCC = torch.randn(matrices, columns, columns, generator=generator) / columns**0.5
    x_NTC = x_NTC @ (mix_NCC + 0.5 * torch.eye(columns))
    return w_NRC, x_NTC.transpose(1, 2) @ x_NTC


def twin(w_RC: Any, hessian_CC: Any, scale_R: Any, bits: int, damping: float) -> Any:
    """One matrix, one column at a time, float64, H^-1 formed and factorised as the method says."""
    w = np.array(w_RC, dtype=np.float64)
    h = np.array(hessian_CC, dtype=np.float64)
    scale = np.array(scale_R, dtype=np.float64)
    limit = 2 ** (bits - 1) - 1
    dead = np.diag(h) == 0
    h[dead, dead] = 1.0
    w[:, dead] = 0.0
    h += damping * np.mean(np.diag(h)) * np.eye(len(h))
    order = np.argsort(-np.diag(h), kind="stable")
    upper = np.linalg.cholesky(np.linalg.inv(h[order][:, order])).T
    w, codes = w[:, order], np.zeros_like(w)
    for j in range(len(h)):
        q = np.clip(np.round(w[:, j] / scale), -limit, limit)
        error = (w[:, j] - q * scale) / upper[j, j]
        w[:, j:] -= np.outer(error, upper[j, j:])
        codes[:, order[j]] = q
    return codes


@pytest.mark.parametrize("name", STORED)
def test_stored_matrices(name: str) -> None:
    stored = arrays("gptq")
    w_RC = torch.from_numpy(stored[f"{name}.w"])
    bits, clip_sigmas = (8, 20.0) if name == "tok_emb.weight" else (6, 12.85)
    scale_R = row_scales(w_RC, clip_sigmas, bits)
    assert scale_R.dtype == torch.float16
    np.testing.assert_array_equal(scale_R.numpy(), stored[f"{name}.scale"])
    factor = prepare_factor(torch.from_numpy(stored[f"{name}.hessian"]), 0.01)
    assert float(factor.damping) == 0.01
    codes_RC = gptq_codes(w_RC, scale_R, bits, factor)
    assert codes_RC.dtype == torch.int8
    assert np.mean(codes_RC.numpy() == stored[f"{name}.q"]) >= 0.999


@pytest.mark.parametrize("block_columns", [1, 7, 32, 128])
@pytest.mark.parametrize(("rows", "columns", "bits"), [(48, 96, 6), (9, 33, 3), (64, 17, 8)])
def test_agrees_with_float64_twin(rows: int, columns: int, bits: int, block_columns: int) -> None:
    w_NRC, h_NCC = problem(rows, rows, columns, matrices=3)
    scale_NR = row_scales(w_NRC, 3.0 if bits == 3 else 12.0, bits)
    codes_NRC = gptq_codes(w_NRC, scale_NR, bits, prepare_factor(h_NCC, 0.01), block_columns)
    for w_RC, h_CC, scale_R, codes_RC in zip(w_NRC, h_NCC, scale_NR, codes_NRC, strict=True):
        expected = twin(w_RC.numpy(), h_CC.numpy(), scale_R.numpy(), bits, 0.01)
        assert np.mean(codes_RC.numpy() == expected) >= 0.999


def test_factor_is_upper_cholesky_of_inverse() -> None:
    _, h_NCC = problem(1, 1, 40, matrices=2)
    factor = prepare_factor(h_NCC, 0.05)
    for h_CC, order, upper in zip(h_NCC, factor.order_C, factor.upper_CC, strict=True):
        damped = h_CC.double() + 0.05 * h_CC.diagonal().double().mean() * torch.eye(40)
        inverse = torch.linalg.inv(damped[order][:, order])
        assert torch.equal(upper, upper.triu())
        torch.testing.assert_close(upper.double().T @ upper.double(), inverse, rtol=1e-4, atol=1e-9)
        assert bool((h_CC.diagonal()[order].diff() <= 0).all())


def test_error_is_below_round_to_nearest() -> None:
    w_NRC, h_NCC = problem(2, 64, 64, matrices=4)
    scale_NR = row_scales(w_NRC, 6.0, 4)
    codes_NRC = gptq_codes(w_NRC, scale_NR, 4, prepare_factor(h_NCC, 0.01))
    ours_N = weighted_error(w_NRC, codes_NRC, scale_NR, h_NCC)
    nearest_N = weighted_error(w_NRC, rounded_codes(w_NRC, scale_NR, 4), scale_NR, h_NCC)
    assert bool((ours_N < 0.8 * nearest_N).all())


def test_identity_hessian_is_round_to_nearest() -> None:
    w_NRC, _ = problem(3, 16, 24, matrices=2)
    scale_NR = row_scales(w_NRC, 5.0, 5)
    factor = prepare_factor(torch.eye(24).expand(2, 24, 24), 0.01)
    assert torch.equal(gptq_codes(w_NRC, scale_NR, 5, factor), rounded_codes(w_NRC, scale_NR, 5))


@pytest.mark.parametrize("bits", [2, 3, 6, 8])
def test_clipping_reaches_both_ends_and_agrees_with_twin(bits: int) -> None:
    w_NRC, h_NCC = problem(4, 32, 48)
    scale_NR = row_scales(w_NRC, 1.0, bits)
    codes_NRC = gptq_codes(w_NRC, scale_NR, bits, prepare_factor(h_NCC, 0.01))
    limit = max_code(bits)
    assert int(codes_NRC.min()) == -limit and int(codes_NRC.max()) == limit
    assert (codes_NRC.abs() == limit).float().mean() > 0.2
    expected = twin(w_NRC[0].numpy(), h_NCC[0].numpy(), scale_NR[0].numpy(), bits, 0.01)
    assert np.mean(codes_NRC[0].numpy() == expected) >= 0.999


def test_dead_columns_have_code_zero_and_do_not_disturb_the_rest() -> None:
    w_NRC, h_NCC = problem(5, 16, 40)
    dead = torch.zeros(40, dtype=torch.bool)
    dead[[0, 7, 39]] = True
    h_NCC[:, dead] = 0.0
    h_NCC[:, :, dead] = 0.0
    scale_NR = row_scales(w_NRC, 10.0, 6)
    factor = prepare_factor(h_NCC, 0.01)
    assert torch.equal(factor.dead_C[0], dead)
    codes_NRC = gptq_codes(w_NRC, scale_NR, 6, factor)
    assert not bool(codes_NRC[:, :, dead].any())
    assert bool(codes_NRC[:, :, ~dead].any(dim=1).all())
    expected = twin(w_NRC[0].numpy(), h_NCC[0].numpy(), scale_NR[0].numpy(), 6, 0.01)
    assert np.mean(codes_NRC[0].numpy() == expected) >= 0.999


def test_dead_columns_count_as_one_in_the_mean_and_in_the_order() -> None:
    diagonal_C = torch.tensor([0.25, 0.0, 4.0, 0.0])
    factor = prepare_factor(torch.diag(diagonal_C), 0.1)
    assert factor.order_C.tolist() == [2, 1, 3, 0]
    damped_C = torch.tensor([4.0, 1.0, 1.0, 0.25]) + 0.1 * (4.0 + 1.0 + 1.0 + 0.25) / 4
    torch.testing.assert_close(factor.upper_CC, torch.diag(damped_C.rsqrt()))


def test_zero_rows_have_scale_and_codes_zero() -> None:
    w_NRC, h_NCC = problem(6, 8, 12)
    w_NRC[0, 3] = 0.0
    w_NRC[0, 5] *= 1e-9  # its scale is below float16's smallest number
    scale_NR = row_scales(w_NRC, 12.85, 6)
    codes_NRC = gptq_codes(w_NRC, scale_NR, 6, prepare_factor(h_NCC, 0.01))
    nearest_NRC = rounded_codes(w_NRC, scale_NR, 6)
    for row in (3, 5):
        assert float(scale_NR[0, row]) == 0.0
        assert not bool(codes_NRC[0, row].any()) and not bool(nearest_NRC[0, row].any())
    assert bool(codes_NRC[0, 4].any())


def test_scale_is_the_rounded_formula() -> None:
    w_RC = torch.randn(64, 50, generator=torch.Generator().manual_seed(7))
    expected = (12.85 * w_RC.std(dim=1, unbiased=True) / 31).half()
    assert torch.equal(row_scales(w_RC, 12.85, 6), expected)
    # The codes are those of the scale as stored, not of the one before rounding.
    exact_R = 12.85 * w_RC.std(dim=1) / 31
    assert not torch.equal(expected.float(), exact_R)
    q_RC = rounded_codes(w_RC, expected, 6)
    assert torch.equal(q_RC, (w_RC / expected.float()[:, None]).round().clamp(-31, 31).char())


def test_rows_of_many_clip_widths_and_bits_go_through_one_call() -> None:
    w_NRC, h_NCC = problem(8, 24, 56, matrices=2)
    factor = prepare_factor(h_NCC, 0.01)
    settings_ = [(6, 12.85), (6, 9.0), (4, 3.0), (8, 20.0)]
    bits_R = torch.tensor([b for b, _ in settings_]).repeat_interleave(24).expand(2, -1)
    clip_R = torch.tensor([c for _, c in settings_]).repeat_interleave(24).expand(2, -1)
    wide_NRC = w_NRC.repeat(1, len(settings_), 1)
    scale_NR = row_scales(wide_NRC, clip_R, bits_R)
    together = gptq_codes(wide_NRC, scale_NR, bits_R, factor).split(24, dim=1)
    for (bits, clip_sigmas), codes_NRC in zip(settings_, together, strict=True):
        alone_NR = row_scales(w_NRC, clip_sigmas, bits)
        alone = gptq_codes(w_NRC, alone_NR, bits, factor)
        assert (codes_NRC == alone).float().mean() >= 0.999


def test_rows_and_matrices_do_not_see_each_other() -> None:
    w_NRC, h_NCC = problem(9, 16, 32, matrices=3)
    factor = prepare_factor(h_NCC, 0.01)
    scale_NR = row_scales(w_NRC, 8.0, 6)
    before = gptq_codes(w_NRC, scale_NR, 6, factor)
    w_NRC[1, 5] *= -3.0
    after = gptq_codes(w_NRC, scale_NR, 6, factor)
    changed = (before != after).any(dim=2)
    assert changed.nonzero().tolist() == [[1, 5]]


def test_leading_dimensions_are_free() -> None:
    w_NRC, h_NCC = problem(10, 8, 16, matrices=4)
    scale_NR = row_scales(w_NRC, 8.0, 6)
    flat = gptq_codes(w_NRC, scale_NR, 6, prepare_factor(h_NCC, 0.01))
    factor = prepare_factor(h_NCC.reshape(2, 2, 16, 16), 0.01)
    assert factor.damping.shape == (2, 2)
    shaped = gptq_codes(w_NRC.reshape(2, 2, 8, 16), scale_NR.reshape(2, 2, 8), 6, factor)
    assert torch.equal(shaped.reshape(4, 8, 16), flat)
    one = gptq_codes(w_NRC[0], scale_NR[0], 6, prepare_factor(h_NCC[0], 0.01))
    assert one.shape == (8, 16)
    assert (one == flat[0]).float().mean() >= 0.999


def test_raised_damping_is_recorded_and_touches_no_other_matrix() -> None:
    _, h_NCC = problem(11, 1, 6, matrices=2)
    h_NCC[1] = torch.eye(6)
    h_NCC[1, 0, 1] = h_NCC[1, 1, 0] = 3.0  # eigenvalue -2: no Gram matrix
    factor = prepare_factor(h_NCC, 0.01)
    assert factor.damping.tolist() == pytest.approx([0.01, 10.0])
    alone = prepare_factor(h_NCC[:1], 0.01)
    torch.testing.assert_close(factor.upper_CC[0], alone.upper_CC[0], rtol=0, atol=0)


def test_singular_hessian_without_damping_is_mended() -> None:
    x_TC = torch.ones(3, 5)
    factor = prepare_factor(x_TC.T @ x_TC, 0.0)
    assert 0 < float(factor.damping) <= 1e-3
    assert bool(factor.upper_CC.isfinite().all())


def test_hopeless_hessian_is_named_with_the_dampings_tried() -> None:
    h_NCC = torch.eye(3).repeat(2, 1, 1)
    h_NCC[1, 0, 1] = h_NCC[1, 1, 0] = 1e9
    with pytest.raises(CheckpointError) as caught:
        prepare_factor(h_NCC, 0.01, names=["good", "blocks.1.mlp.fc.weight"])
    message = str(caught.value)
    assert "blocks.1.mlp.fc.weight" in message
    assert f"{0.01 * 10**MAX_DAMPING_RAISES:g}" in message and "\n" not in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_is_named(value: float) -> None:
    w_NRC, h_NCC = problem(12, 4, 5, matrices=2)
    names = ["first.weight", "second.weight"]
    factor = prepare_factor(h_NCC, 0.01)
    scale_NR = row_scales(w_NRC, 8.0, 6)
    bad = h_NCC.clone()
    bad[1, 2, 3] = value
    with pytest.raises(CheckpointError, match=r"Hessian of second\.weight is not finite"):
        prepare_factor(bad, 0.01, names=names)
    bad = w_NRC.clone()
    bad[1, 0, 0] = value
    with pytest.raises(CheckpointError, match=r"weight of second\.weight is not finite"):
        gptq_codes(bad, scale_NR, 6, factor, names=names)
    with pytest.raises(CheckpointError, match=r"weight of second\.weight is not finite"):
        rounded_codes(bad, scale_NR, 6, names=names)


def test_weights_too_large_for_float16_scales_are_named() -> None:
    w_NRC, h_NCC = problem(13, 4, 5)
    w_NRC *= 1e6
    scale_NR = row_scales(w_NRC, 12.85, 6)
    with pytest.raises(CheckpointError, match="row scale of matrix 0 of the batch is not finite"):
        gptq_codes(w_NRC, scale_NR, 6, prepare_factor(h_NCC, 0.01))


def test_matmul_precision_is_put_back() -> None:
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), matmul_precision("high"):
        assert torch.get_float32_matmul_precision() == "high"
        raise KeyError
    assert torch.get_float32_matmul_precision() == before


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 12),
    columns=st.integers(2, 24),
    bits=st.integers(2, 8),
    clip_sigmas=st.floats(0.1, 40.0),
    samples=st.integers(1, 60),
    block_columns=st.integers(1, 30),
)
def test_bounds(
    seed: int,
    rows: int,
    columns: int,
    bits: int,
    clip_sigmas: float,
    samples: int,
    block_columns: int,
) -> None:
    w_NRC, h_NCC = problem(seed, rows, columns, matrices=2, samples=samples)
    scale_NR = row_scales(w_NRC, clip_sigmas, bits)
    factor = prepare_factor(h_NCC, 0.01)
    codes_NRC = gptq_codes(w_NRC, scale_NR, bits, factor, block_columns)
    assert codes_NRC.dtype == torch.int8 and codes_NRC.shape == w_NRC.shape
    assert int(codes_NRC.abs().max()) <= 2 ** (bits - 1) - 1
    std_NR = w_NRC.double().std(dim=2)
    expected_NR = clip_sigmas * std_NR / (2 ** (bits - 1) - 1)
    # float16: 11 bits, and steps of 2^-24 below 2^-14.
    assert bool(((scale_NR.double() - expected_NR).abs() <= expected_NR * 5e-4 + 3e-8).all())
