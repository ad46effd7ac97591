"""What launches need to know of the device."""

from __future__ import annotations

import functools

import torch

INTERPRETED_SMS = 3
"""Multiprocessors that Triton's interpreter stands for: few, so that programs walk over rows."""


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    if device.type != "cuda":
        return INTERPRETED_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
