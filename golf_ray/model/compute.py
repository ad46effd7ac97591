"""How a model computes: arithmetic, attention, kernels. Chosen once, by configuration and device.

What is asked for by name and cannot be had is an error; `auto` is the fastest that works, and what
it came to is part of a run's record.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Literal

import torch

from golf_ray.config import Config
from golf_ray.errors import ConfigError
from golf_ray.model.attention import Backend, resolve_backend

Kernels = Literal["torch", "triton"]
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """How a forward is computed; the default works everywhere."""

    dtype: torch.dtype = torch.float32
    """Arithmetic of the forward; weights are cast to it where they are used."""
    attention: Backend = "sdpa"
    kernels: Kernels = "torch"

    def to_dict(self) -> dict[str, str]:
        """Plain data for records."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"dtype": dtype, "attention": self.attention, "kernels": self.kernels}


def choose_compute(
    config: Config, device: torch.device, dtype: torch.dtype | None = None
) -> Compute:
    """How a configuration computes on a device.

    Args:
        dtype: arithmetic; None for that of the training.

    Raises:
        ConfigError: an implementation is asked for by name and cannot be used here.
    """
    dtype = dtype or compute_dtype(config, device)
    return Compute(
        dtype=dtype,
        attention=resolve_backend(config.attention.backend, device, dtype, config.model.head_dim),
        kernels=resolve_kernels(config.kernels.backend, device, dtype),
    )


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """Arithmetic of the forward: as configured, or by device."""
    if config.train.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.train.precision == "bfloat16" else torch.float32


def resolve_kernels(
    asked: Literal["auto"] | Kernels, device: torch.device, dtype: torch.dtype
) -> Kernels:
    """Fused kernels or torch's own operations.

    Raises:
        ConfigError: fused kernels are asked for and cannot be used.
    """
    if asked == "torch":
        return "torch"
    reason = _why_no_triton(device)
    if asked == "auto":
        # Kernels in float32 are for tests: their products are slower than torch's.
        return "triton" if reason is None and device.type == "cuda" and dtype in HALVES else "torch"
    if reason is not None:
        raise ConfigError(
            f"kernels.backend = 'triton' cannot be used: it {reason}",
            "or take kernels.backend = auto",
        )
    return "triton"


def _why_no_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "needs Triton: pip install triton"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "needs an NVIDIA GPU of compute capability 8.0 or later"
        return None
    import triton

    # Triton's interpreter runs kernels on CPUs, for tests.
    interpreted = bool(triton.knobs.runtime.interpret)
    return None if interpreted else f"needs a GPU, and tensors are on {device.type}"
