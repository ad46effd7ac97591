"""What a benchmark ran on, and fixed yardsticks by which hosts can be told apart."""

from __future__ import annotations

import os
import platform
import time
from typing import Any

import numpy as np
import torch

import golf_ray
from golf_ray.bench.corpus import document_lengths
from golf_ray.bench.timing import median_ms
from golf_ray.kernels import flash
from golf_ray.model.attention import why_not

ATTENTION_TOKENS, ATTENTION_HEADS, ATTENTION_GROUPS, ATTENTION_DIM = 98_304, 8, 4, 64
LONGEST = 2048


def describe(device: torch.device) -> dict[str, Any]:
    """GPU, versions and time, for a report."""
    facts: dict[str, Any] = {
        "golf_ray": golf_ray.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_cores": os.cpu_count(),
        "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "unix_s": time.time(),
    }
    if device.type == "cuda":
        import triton

        operators = flash.operators()
        facts["cuda"] = torch.version.cuda
        facts["triton"] = triton.__version__
        facts["flash_attention"] = None if operators is None else operators.source
    return facts


def yardsticks(device: torch.device) -> dict[str, float]:
    """Fixed work on this device: products, a copy, attention; names carry shape and unit."""
    if device.type == "cpu":
        return {"product_512_gflops": _product(512, 512, 512, torch.float32, device) / 1e9}
    found = {
        "product_8192x8192x8192_tflops": _product(8192, 8192, 8192, torch.bfloat16, device) / 1e12,
        "product_98304x512x2048_tflops": _product(98304, 2048, 512, torch.bfloat16, device) / 1e12,
        "copy_1_gib_tb_per_s": _copy(1 << 30, device) / 1e12,
    }
    if why_not("fa3", device, torch.bfloat16, ATTENTION_DIM) is None:
        forward_ms, both_ms = _flash(device)
        found["fa3_98304_tokens_forward_ms"] = forward_ms
        found["fa3_98304_tokens_forward_backward_ms"] = both_ms
    return found


def _product(
    rows: int, columns: int, depth: int, dtype: torch.dtype, device: torch.device
) -> float:
    """Floating-point operations a second of one matrix product of random data."""
    a = torch.randn(rows, depth, device=device, dtype=dtype)
    b = torch.randn(columns, depth, device=device, dtype=dtype)
    return 2 * rows * columns * depth / (median_ms(lambda: a @ b.t(), device) / 1e3)


def _copy(num_bytes: int, device: torch.device) -> float:
    """Bytes read and written a second."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / (median_ms(lambda: target.copy_(source), device) / 1e3)


def field_segments(num_tokens: int, longest: int = LONGEST, seed: int = 0) -> list[int]:
    """Lengths of the segments of a buffer of documents as long as the field's."""
    lengths: list[int] = []
    left = num_tokens
    for length in document_lengths(num_tokens, seed).tolist():
        while length > 0 and left > 0:
            lengths.append(min(length, longest, left))
            length -= lengths[-1]
            left -= lengths[-1]
    return lengths


def _flash(device: torch.device) -> tuple[float, float]:
    shape = ATTENTION_TOKENS, ATTENTION_HEADS + 2 * ATTENTION_GROUPS, ATTENTION_DIM
    qkv = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
    q, k, v = qkv.split((ATTENTION_HEADS, ATTENTION_GROUPS, ATTENTION_GROUPS), dim=1)
    bounds = np.concatenate(([0], np.cumsum(field_segments(ATTENTION_TOKENS))))
    cu_seqlens = torch.from_numpy(bounds).to(device=device, dtype=torch.int32)
    seed = torch.randn_like(q)

    def forward() -> torch.Tensor:
        return flash.flash_attention(q, k, v, cu_seqlens, LONGEST)

    def both() -> None:
        torch.autograd.grad(forward(), (q, k, v), seed)

    with torch.no_grad():
        forward_ms = median_ms(forward, device)
    return forward_ms, median_ms(both, device)
