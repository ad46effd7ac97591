"""Where a step's time goes: kernels of a profile, by category."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

CATEGORIES = (
    # Name, pattern of kernel names; the first that matches counts.
    ("attention backward", r"FlashAttnBwd|flash_bwd|fmha.*bwd|efficient_attention_backward"),
    ("attention forward", r"FlashAttnFwd|flash_fwd|prepare_varlen|fmha|efficient_attention"),
    ("MLP kernels", r"^_up$|^_down_backward$"),
    ("matrix products", r"nvjet|gemm|cutlass|splitKreduce|cublas|xmma"),
    ("adapters' products", r"^_rows$|^_sums$"),
    ("adapters' optimizer", r"^_step$|^_fill$"),
    ("mixes and norms", r"^_mix|^_total$"),
    ("heads: norm, rotary, XSA", r"^_prepare|^_remove_own_value"),
    ("softcap and cross entropy", r"^_cross_entropy$|^_scale_rows$"),
    ("embedding", r"^_lookup|embedding"),
    ("compiled element-wise", r"^triton_"),
    ("communication", r"nccl"),
    ("copies and fills", r"Memcpy|Memset|memcpy|FillFunctor|copy_kernel"),
    ("element-wise and reductions", r"elementwise|reduce_kernel|multi_tensor|CatArray"),
)
OTHER = "other"


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """One category's part of a step."""

    category: str
    ms: float
    kernels: int
    share: float


def category_of(kernel: str) -> str:
    """The category of a kernel by its name."""
    for name, pattern in CATEGORIES:
        if re.search(pattern, kernel):
            return name
    return OTHER


def profile_work(work: Callable[[], object]) -> list[Share]:
    """GPU time of one run of `work` by category, the largest first."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
        work()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in found.key_averages():
        entry = times.setdefault(category_of(event.key), [0.0, 0])
        entry[0] += event.self_device_time_total / 1e3
        entry[1] += event.count
    total = sum(ms for ms, _ in times.values()) or 1.0
    shares = [
        Share(category=name, ms=ms, kernels=int(count), share=ms / total)
        for name, (ms, count) in times.items()
    ]
    return sorted(shares, key=lambda share: -share.ms)
