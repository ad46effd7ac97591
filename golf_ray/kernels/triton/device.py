"""What launches need to know of the device, and of the arithmetic."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

INTERPRETED_SMS = 3
"""Multiprocessors that Triton's interpreter stands for: few, so that programs walk over rows."""


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    if device.type != "cuda":
        return INTERPRETED_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def bits_of(dtype: torch.dtype) -> int:
    """Bits of a number, by which tilings are chosen."""
    return dtype.itemsize * 8


def precision_of(dtype: torch.dtype) -> str:
    """Precision of Triton's products: no TF32 where the arithmetic is float32."""
    return "ieee" if dtype == torch.float32 else "tf32"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """How a product is cut."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    registers: int | None = None
    """A thread's at most; None for as many as there are."""
