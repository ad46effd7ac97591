"""Many quantisations of one checkpoint in one process, for searches over bits and clip sigmas.

What all of them have in common lies ready on the device: weights, and the factors of the Hessians
for each damping. A trial then costs its codes and its score; the size is predicted from the codes'
entropy, and an artifact is compressed and written for finalists alone.

Not here: scoring (golf_ray.api.evaluating), collecting Hessians (golf_ray.api.quantizing).

Invariant: the codes of a configuration are those of `golf_ray.api.quantize` under it on the same
kind of device, whatever was asked for before or beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from golf_ray.api.machine import cpu_threads, pick_device
from golf_ray.api.quantizing import full_weights, stored_hessians
from golf_ray.api.weights import StoredWeights, config_for
from golf_ray.config import Config

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from golf_ray.quantization.container import QuantizedState
    from golf_ray.quantization.gptq import Factor
    from golf_ray.quantization.sizes import Sizes

KEPT_FACTORS = 4
"""Dampings (and float16 thresholds) whose factors are kept; the record's take 0.25 GB each."""
_SHARED = ("damping", "block_columns", "float16_max_numel")
"""Fields that configurations of one pass have in common, and others of one checkpoint need not."""


class Quantizer:
    """A checkpoint that is ready to be quantised again and again.

    Args:
        checkpoint: a state dict's file, a run's folder, or weights.
        config: says the model and the calibration; None for the one that the checkpoint carries.
        hessians: a file of `golf_ray.api.calibrate`, or Hessians by matrix name.
        device: None for the one that the configuration asks for.
        force: allow another model configuration than the carried one, and Hessians from elsewhere.

    Raises:
        GolfRayError: something given cannot be used.
    """

    def __init__(
        self,
        checkpoint: str | Path | StoredWeights,
        config: Config | None = None,
        *,
        hessians: str | Path | Mapping[str, Tensor],
        device: torch.device | None = None,
        force: bool = False,
    ) -> None:
        weights = full_weights(checkpoint)
        self.checkpoint = weights.path
        self.config = config_for(weights, config, force=force)
        self.device = pick_device(self.config) if device is None else device
        state = weights.state(self.config.model)
        if isinstance(hessians, (str, Path)):
            hessians = stored_hessians(hessians, state, self.config, force=force)
        self._hessians = hessians
        self._state = {name: tensor.to(self.device) for name, tensor in state.items()}
        self._factors: dict[tuple[float, int], dict[str, Factor]] = {}

    def factors(self, config: Config | None = None) -> Mapping[str, Factor]:
        """GPTQ factors at a configuration's damping, by matrix name; computed when first asked for.

        Raises:
            CheckpointError: a matrix has no usable Hessian.
        """
        from golf_ray.quantization.artifact import prepare_factors

        config = config or self.config
        key = (config.quantization.damping, config.quantization.float16_max_numel)
        found = self._factors.pop(key, None)
        if found is None:
            with cpu_threads(self.config.evaluation.threads):
                found = prepare_factors(config, self._hessians, device=self.device)
        self._factors[key] = found
        while len(self._factors) > KEPT_FACTORS:
            # The one that was not asked for the longest.
            del self._factors[next(iter(self._factors))]
        return found

    def codes(self, configs: Sequence[Config]) -> list[QuantizedState]:
        """Quantised states, on the device, of several configurations; those of one damping in one
        pass.

        Args:
            configs: of this model and calibration.

        Raises:
            UsageError: a configuration is of another model or calibration.
            CheckpointError: a value is not finite, or a matrix has no usable Hessian.
        """
        from golf_ray.quantization.artifact import quantize_many

        found: dict[int, QuantizedState] = {}
        for members in self._groups(configs):
            some = [configs[i] for i in members]
            factors = self.factors(some[0])
            with cpu_threads(self.config.evaluation.threads):
                states = quantize_many(
                    self._state,
                    factors,
                    some,
                    self.device,
                    keep=True,
                    what=str(self.checkpoint),
                )
            found.update(zip(members, states, strict=True))
        return [found[i] for i in range(len(configs))]

    def predicted_bytes(self, quantized: QuantizedState) -> int:
        """Bytes of its artifact without a configuration, by the entropy of its codes."""
        from golf_ray.quantization.sizes import predicted_model_bytes

        return predicted_model_bytes(quantized)

    def restored(self, quantized: QuantizedState) -> dict[str, Tensor]:
        """The state dict to score, in float32, on the device."""
        from golf_ray.quantization.artifact import restore_state

        what = f"{self.checkpoint}, quantised"
        return restore_state(quantized.tensors, quantized.kinds, self.config.model, what)

    def write(
        self,
        quantized: QuantizedState,
        path: str | Path,
        config: Config,
        *,
        carry: Config | None = None,
        plain: bool = False,
    ) -> Sizes:
        """Compress and write an artifact, whole or not at all; takes a minute at the record's size.

        Args:
            config: that it was quantised under: says compressor, code bytes and limit.
            carry: the configuration that the artifact carries; None for `config`.
            plain: carry none.

        Raises:
            StorageError: it cannot be written.
        """
        from golf_ray.quantization.container import write_artifact
        from golf_ray.quantization.sizes import sizes_of

        size = write_artifact(
            Path(path),
            quantized,
            config=None if plain else carry or config,
            compressor=config.quantization.compressor,
        )
        return sizes_of(size, config)

    def _groups(self, configs: Sequence[Config]) -> list[list[int]]:
        """Indices of configurations that can share a pass; all are of this model and calibration.

        Raises:
            UsageError: one is not.
        """
        from golf_ray.quantization.batching import require_settings_alone

        groups: dict[tuple[float, ...], list[int]] = {}
        for i, config in enumerate(configs):
            shared = {name: getattr(config.quantization, name) for name in _SHARED}
            mine = dataclasses.replace(self.config.quantization, **shared)
            allowed = dataclasses.replace(self.config, quantization=mine)
            require_settings_alone(allowed, config, "quantisations of one checkpoint")
            groups.setdefault(tuple(shared.values()), []).append(i)
        return list(groups.values())
