"""From a checkpoint to a quantised state and from an artifact back to a state dict.

Here the model's matrices meet the quantiser: which of them are quantised, to how many bits and how
widely clipped. Not here: the arithmetic (gptq), the calibration passes (hessian), the file
(container).

Invariant: the result follows from weights, Hessians and configuration; every matrix of more than
`float16_max_numel` elements is quantised and every other floating tensor stored as float16.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from golf_ray.config import Config, ModelConfig, QuantizationConfig
from golf_ray.errors import CheckpointError
from golf_ray.model.checkpoint import build_model, check_state
from golf_ray.model.compute import choose_compute
from golf_ray.model.layout import looped_layers
from golf_ray.model.parameters import (
    bank,
    check_tensors,
    matrix_specs,
    unbank,
    unbanked_shapes,
)
from golf_ray.model.parts import is_builtin
from golf_ray.model.specs import MatrixSpec
from golf_ray.quantization.batching import Coded, code_matrices, require_settings_alone
from golf_ray.quantization.container import (
    QuantizedState,
    dequantize,
    gptq_kind,
    kind_bits,
    passthrough_kind,
    read_artifact,
)
from golf_ray.quantization.gptq import Factor, max_code, prepare_factor
from golf_ray.quantization.hessian import collect_hessians

MAX_BATCH_ELEMENTS = 2**25
"""Hessian elements of one batch of factorisations: bounds memory at about 1.5 GB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizationReport:
    """What happened while a checkpoint was quantised."""

    hessian_s: float
    """Seconds for calibration; 0 where Hessians were given."""
    factor_s: float
    """Seconds for the Cholesky factors."""
    codes_s: float
    """Seconds for scales and codes."""
    raised_damping: Mapping[str, float]
    """Damping used where Cholesky failed at the configured one, by matrix; mostly empty."""
    saturated_codes: int
    """Codes at the end of their range."""
    num_codes: int
    """Codes in all."""


def matrix_setting(
    spec: MatrixSpec, model: ModelConfig, quantization: QuantizationConfig
) -> tuple[int, float]:
    """Bits and clip sigmas of a matrix: those of its group, or of looped layers where set."""
    bits: int = getattr(quantization, f"{spec.group}_bits")
    clip_sigmas: float = getattr(quantization, f"{spec.group}_clip_sigmas")
    if spec.layer is not None and spec.layer in looped_layers(model):
        if quantization.looped_bits is not None:
            bits = quantization.looped_bits
        if quantization.looped_clip_sigmas is not None:
            clip_sigmas = quantization.looped_clip_sigmas
    return bits, clip_sigmas


def quantized_matrices(config: Config) -> tuple[MatrixSpec, ...]:
    """The matrices that are too large to be stored as float16."""
    limit = config.quantization.float16_max_numel
    return tuple(m for m in matrix_specs(config.model) if m.shape[0] * m.shape[1] > limit)


def prepare_factors(
    config: Config, hessians: Mapping[str, Tensor], *, device: torch.device | str = "cpu"
) -> dict[str, Factor]:
    """GPTQ factors by matrix name: what all clip sigmas and bits have in common.

    Matrices that share a Hessian (query, key, value) share its factor.

    Raises:
        CheckpointError: a matrix has no Hessian, one of another shape, or an unusable one.
    """
    wanted = [m for m in quantized_matrices(config) if m.multiplies]
    missing = [m.name for m in wanted if m.name not in hessians]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"there is no Hessian for '{missing[0]}'{more}",
            "collect the Hessians again with this configuration",
        )
    owners: dict[tuple[int, int], str] = {}
    owner_of: dict[str, str] = {}
    for spec in wanted:
        found, width = list(hessians[spec.name].shape), spec.shape[1]
        if found != [width, width]:
            raise CheckpointError(
                f"the Hessian of '{spec.name}' has shape {found}, expected {[width, width]}",
                "collect the Hessians again with this configuration",
            )
        owner_of[spec.name] = owners.setdefault((hessians[spec.name].data_ptr(), width), spec.name)
    factors: dict[str, Factor] = {}
    by_width: dict[int, list[str]] = {}
    for (_, width), name in owners.items():
        by_width.setdefault(width, []).append(name)
    for width, names in by_width.items():
        for some in _batches(names, width, MAX_BATCH_ELEMENTS):
            stacked_NCC = torch.stack([hessians[name].to(device) for name in some])
            factor = prepare_factor(stacked_NCC, config.quantization.damping, names=some)
            for i, name in enumerate(some):
                factors[name] = Factor(
                    order_C=factor.order_C[i],
                    dead_C=factor.dead_C[i],
                    upper_CC=factor.upper_CC[i],
                    damping=factor.damping[i],
                )
    return {name: factors[owner] for name, owner in owner_of.items()}


def quantize_state(
    state: Mapping[str, Tensor],
    hessians: Mapping[str, Tensor],
    config: Config,
    *,
    factors: Mapping[str, Factor] | None = None,
    device: torch.device | str = "cpu",
    what: str = "the checkpoint",
) -> QuantizedState:
    """Quantise a state dict.

    Args:
        state: banked, under public names.
        hessians: by unbanked matrix name, as of `collect_hessians`.
        factors: those of `prepare_factors`, where they are there already; `hessians` is then not
            looked at.
        device: where the work is done; the result is on the CPU.
        what: how messages name the state.

    Raises:
        CheckpointError: the state does not fit the configuration, a matrix has no usable Hessian,
            or a value is not finite or too large for float16.
    """
    check_state(config.model, state, what)
    if factors is None:
        factors = prepare_factors(config, hessians, device=device)
    return quantize_many(state, factors, [config], device, what=what)[0]


def quantize_many(
    state: Mapping[str, Tensor],
    factors: Mapping[str, Factor],
    configs: Sequence[Config],
    device: torch.device | str = "cpu",
    *,
    keep: bool = False,
    what: str = "the checkpoint",
) -> list[QuantizedState]:
    """Quantise a state dict under several bits and clip sigmas, in one pass over its columns.

    Each result is, bit for bit, that of `quantize_state` for its configuration. Results share the
    tensors in which they are equal. Memory is bounded by `MAX_PASS_ELEMENTS` of
    golf_ray.quantization.batching, beside the results.

    Args:
        state: banked, under public names.
        factors: of `prepare_factors`, on the device.
        configs: differ, of what matters for codes, in bits and clip sigmas alone.
        keep: leave the results on the device.
        what: how messages name the state.

    Raises:
        UsageError: the configurations differ in another field.
        CheckpointError: as `quantize_state`.
    """
    if not configs:
        return []
    first = configs[0]
    for other in configs[1:]:
        require_settings_alone(first, other, "settings that are quantised together")
    check_state(first.model, state, what)
    weights = unbank(first.model, state)
    specs = {spec.name: spec for spec in quantized_matrices(first)}
    by_shape: dict[tuple[tuple[int, int], bool], list[MatrixSpec]] = {}
    for spec in specs.values():
        by_shape.setdefault((spec.shape, spec.multiplies), []).append(spec)
    coded: list[dict[str, Coded]] = [{} for _ in configs]
    target = torch.device(device if keep else "cpu")
    for group in by_shape.values():
        # Of a factor there is one float32 copy here, not the several float64 of its making.
        for some in _batches(group, group[0].shape[1], 2 * MAX_BATCH_ELEMENTS):
            settings = [[matrix_setting(s, c.model, c.quantization) for s in some] for c in configs]
            block = first.quantization.block_columns
            found = code_matrices(
                some, weights, factors, settings, block_columns=block, device=device
            )
            moved: dict[int, Tensor] = {}
            for into, matrices in zip(coded, found, strict=True):
                into.update(
                    {
                        name: (_moved(q_RC, target, moved), _moved(scale_R, target, moved))
                        for name, (q_RC, scale_R) in matrices.items()
                    }
                )
    rest = {
        name: _as_float16(tensor, name).to(target)
        for name, tensor in weights.items()
        if name not in specs
    }
    return [
        _assembled(config, specs, matrices, rest)
        for config, matrices in zip(configs, coded, strict=True)
    ]


def _assembled(
    config: Config,
    specs: Mapping[str, MatrixSpec],
    coded: Mapping[str, Coded],
    rest: Mapping[str, Tensor],
) -> QuantizedState:
    """A quantised state of its matrices and of what is stored as it is, in the artifact's order."""
    tensors: dict[str, Tensor] = {}
    kinds: dict[str, str] = {}
    for name in unbanked_shapes(config.model):
        if name in coded:
            tensors[f"{name}.q"], tensors[f"{name}.scale"] = coded[name]
            bits, _ = matrix_setting(specs[name], config.model, config.quantization)
            kinds[name] = gptq_kind(bits)
        else:
            tensors[name] = rest[name]
            kinds[name] = passthrough_kind(rest[name].dtype)
    return QuantizedState(tensors=tensors, kinds=kinds)


def _moved(tensor: Tensor, target: torch.device, moved: dict[int, Tensor]) -> Tensor:
    """The tensor on another device; one that several settings share is moved once."""
    if id(tensor) not in moved:
        moved[id(tensor)] = tensor.to(target)
    return moved[id(tensor)]


def calibrate_checkpoint(
    config: Config,
    state: Mapping[str, Tensor],
    batches: Iterable[Any],
    *,
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype | None = None,
    what: str = "the checkpoint",
) -> dict[str, Tensor]:
    """The Hessians of a checkpoint, collected in this process; arguments as `quantize_checkpoint`.

    Raises:
        CheckpointError: the state does not fit the configuration, or there is no batch.
    """
    compute = choose_compute(config, torch.device(device), compute_dtype)
    model = build_model(config.model, state, device=device, compute=compute, what=what)
    return collect_hessians(model, batches)


def quantize_checkpoint(
    config: Config,
    state: Mapping[str, Tensor],
    batches: Iterable[Any] = (),
    *,
    hessians: Mapping[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype | None = None,
    what: str = "the checkpoint",
) -> tuple[QuantizedState, QuantizationReport]:
    """Calibrate and quantise in this process.

    Args:
        state: banked, under public names.
        batches: calibration batches, int [rows, S] each; not read where Hessians are given.
        hessians: stored ones of the same weights, to be used instead.
        device: where all of it runs.
        compute_dtype: arithmetic of the calibration passes; None for that of the training, which
            is bfloat16 on a GPU where the configuration leaves it open.
        what: how messages name the state.

    Raises:
        CheckpointError: as `quantize_state`, or there is no calibration batch.
    """
    check_state(config.model, state, what)
    begin_s = time.perf_counter()
    if hessians is None:
        hessians = calibrate_checkpoint(
            config, state, batches, device=device, compute_dtype=compute_dtype, what=what
        )
    calibrated_s = time.perf_counter()
    factors = prepare_factors(config, hessians, device=device)
    damping = config.quantization.damping
    used = {name: float(factor.damping) for name, factor in factors.items()}
    factored_s = time.perf_counter()
    quantized = quantize_state(state, hessians, config, factors=factors, device=device, what=what)
    saturated, num_codes = count_saturated(quantized)
    return quantized, QuantizationReport(
        hessian_s=calibrated_s - begin_s,
        factor_s=factored_s - calibrated_s,
        codes_s=time.perf_counter() - factored_s,
        raised_damping={name: value for name, value in used.items() if value != damping},
        saturated_codes=saturated,
        num_codes=num_codes,
    )


def count_saturated(quantized: QuantizedState) -> tuple[int, int]:
    """Codes at the end of their range, and codes in all."""
    saturated = num_codes = 0
    for name, kind in quantized.kinds.items():
        bits = kind_bits(kind)
        if bits is not None:
            q_RC = quantized.tensors[f"{name}.q"]
            saturated += int((q_RC.abs() == max_code(bits)).sum())
            num_codes += q_RC.numel()
    return saturated, num_codes


def restore_state(
    tensors: Mapping[str, Tensor], kinds: Mapping[str, str], model: ModelConfig, where: str
) -> dict[str, Tensor]:
    """The banked state dict, in float32, of what an artifact holds.

    Raises:
        CheckpointError: a tensor is unknown, missing or of another shape.
    """
    weights = dequantize(tensors, kinds)
    check_tensors({n: tuple(w.shape) for n, w in weights.items()}, unbanked_shapes(model), where)
    return bank(model, weights)


def load_artifact(path: Path, config: Config | None = None) -> dict[str, Tensor]:
    """The banked state dict, in float32, of an artifact of ours or a public one.

    Args:
        config: whose model it must fit; None takes the configuration inside the artifact.

    Raises:
        CheckpointError: the file cannot be used, holds no configuration where none is given, or
            does not fit the model.
    """
    tensors, kinds, embedded = read_artifact(path)
    if config is None:
        config = _trusted(embedded, path)
    return restore_state(tensors, kinds, config.model, str(path))


def _trusted(embedded: Config | None, path: Path) -> Config:
    if embedded is None:
        raise CheckpointError(f"{path} holds no configuration", "give the one it belongs to")
    foreign = [part for part in embedded.model.parts if not is_builtin(part)]
    if foreign:
        raise CheckpointError(
            f"{path} asks to run code from '{foreign[0]}'",
            "give its configuration yourself if you trust it",
        )
    return embedded


def _as_float16(tensor: Tensor, name: str) -> Tensor:
    half = tensor.detach().cpu().half()
    if not bool(half.isfinite().all()):
        raise CheckpointError(
            f"'{name}' is not finite, or too large for float16",
            "train again or take an earlier checkpoint",
        )
    return half


def _batches(items: Sequence[Any], width: int, max_elements: int) -> Iterator[Any]:
    size = max(1, max_elements // width**2)
    for start in range(0, len(items), size):
        yield items[start : start + size]
