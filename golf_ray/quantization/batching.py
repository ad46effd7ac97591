"""Several settings of one checkpoint at once: what they must share, and their codes in one pass.

A setting is bits and clip sigmas of every matrix. Not here: which matrices a model has and what
becomes of the codes (golf_ray.quantization.artifact), the arithmetic (golf_ray.quantization.gptq).
Legend: S settings, N matrices of one shape, R rows, C columns.

Invariant: what a setting gives does not depend on the settings beside it, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from golf_ray.config import Config, ModelConfig, QuantizationConfig
from golf_ray.errors import UsageError
from golf_ray.model.specs import MatrixSpec
from golf_ray.quantization.gptq import Factor, gptq_codes_many, rounded_codes, row_scales

Setting = tuple[int, float]
"""Bits and clip sigmas of a matrix."""
Coded = tuple[Tensor, Tensor]
"""Codes int8 [R, C] and scales float16 [R] of a matrix."""

MAX_PASS_ELEMENTS = 2**27
"""Codes of one pass over the columns, all settings together: at 10 bytes each bounds memory at
about 1.3 GB. The record's largest batch of one shape has 11.5 M, so 11 settings go at a time."""
SETTINGS = frozenset(
    f"{group}_{knob}"
    for group in ("mlp", "attention", "embedding", "looped")
    for knob in ("bits", "clip_sigmas")
)
"""Fields of the quantisation that make a setting."""
WITHOUT_EFFECT = frozenset({"code_bytes", "limit_bytes", "compressor"})
"""Fields that no code depends on."""


def require_settings_alone(first: Config, other: Config, what: str) -> None:
    """See that two configurations quantise alike but for bits and clip sigmas.

    Args:
        what: is to be done with both, for the error.

    Raises:
        UsageError: they differ in another field, which is named.
    """
    sections: tuple[tuple[str, ModelConfig | QuantizationConfig], ...] = (
        ("model", first.model),
        ("quantization", first.quantization),
    )
    for section, mine in sections:
        theirs = getattr(other, section)
        for field in dataclasses.fields(mine):
            free = section == "quantization" and field.name in SETTINGS | WITHOUT_EFFECT
            a, b = getattr(mine, field.name), getattr(theirs, field.name)
            if not free and a != b:
                raise UsageError(
                    f"{section}.{field.name} is {a!r} in one configuration and {b!r} in another",
                    f"{what} must not differ in more than bits and clip sigmas",
                )


def code_matrices(
    specs: Sequence[MatrixSpec],
    weights: Mapping[str, Tensor],
    factors: Mapping[str, Factor],
    settings: Sequence[Sequence[Setting]],
    *,
    block_columns: int,
    device: torch.device | str,
) -> list[dict[str, Coded]]:
    """Codes and scales, on the device, of matrices of one shape under each setting.

    Settings that are equal for these matrices are computed once and share their tensors.

    Args:
        specs: the matrices: all of them multiply, or none does.
        weights: [R, C] by name, anywhere.
        factors: by name, on the device; those of tables that are only looked up may be absent.
        settings: for each setting those of the matrices, in the order of `specs`.
        block_columns: of GPTQ.

    Raises:
        CheckpointError: a weight or a scale is not finite.
    """
    names = [spec.name for spec in specs]
    w_NRC = torch.stack([weights[name].to(device).float() for name in names])
    factor = _stacked([factors[name] for name in names]) if specs[0].multiplies else None
    unique = list(dict.fromkeys(tuple(one) for one in settings))
    size = max(1, MAX_PASS_ELEMENTS // w_NRC.numel())
    found: dict[tuple[Setting, ...], dict[str, Coded]] = {}
    for start in range(0, len(unique), size):
        some = unique[start : start + size]
        bits_SN1 = torch.tensor([[b for b, _ in one] for one in some], device=device)[..., None]
        clip_SN1 = torch.tensor([[c for _, c in one] for one in some], device=device)[..., None]
        scale_SNR = row_scales(w_NRC, clip_SN1, bits_SN1)
        if factor is not None:
            q_SNRC = gptq_codes_many(w_NRC, scale_SNR, bits_SN1, factor, block_columns, names=names)
        else:
            # A table that is only looked up: each row's error counts by itself, nearest is best.
            q_SNRC = torch.stack(
                [
                    rounded_codes(w_NRC, scale_NR, bits_N1.expand_as(scale_NR), names=names)
                    for scale_NR, bits_N1 in zip(scale_SNR, bits_SN1, strict=True)
                ]
            )
        for one, q_NRC, scale_NR in zip(some, q_SNRC, scale_SNR, strict=True):
            found[one] = dict(zip(names, zip(q_NRC, scale_NR, strict=True), strict=True))
    return [found[tuple(one)] for one in settings]


def _stacked(factors: Sequence[Factor]) -> Factor:
    return Factor(
        order_C=torch.stack([f.order_C for f in factors]),
        dead_C=torch.stack([f.dead_C for f in factors]),
        upper_CC=torch.stack([f.upper_CC for f in factors]),
        damping=torch.stack([f.damping for f in factors]),
    )
