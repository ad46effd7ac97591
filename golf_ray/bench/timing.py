"""Timing of device work: medians of repeated runs, by the device's own clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

FLUSH_BYTES = 256 * 1024 * 1024
"""More than any GPU's cache: written between runs, so that inputs come from memory."""


def median_ms(
    work: Callable[[], object], device: torch.device, *, runs: int = 20, warm_up: int = 3
) -> float:
    """Median milliseconds of one run of `work`.

    Args:
        runs: that are counted.
        warm_up: runs before, in which things are compiled and allocated.
    """
    for _ in range(warm_up):
        work()
    if device.type != "cuda":
        times = []
        for _ in range(runs):
            began_s = time.perf_counter()
            work()
            times.append((time.perf_counter() - began_s) * 1e3)
        return statistics.median(times)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for begin, end in events:
        flush.zero_()
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def busy_ms(work: Callable[[], object], device: torch.device, *, runs: int = 10) -> float:
    """Milliseconds of kernels in one run of `work`, without the host's time between them: what is
    left where launches are captured. On a CPU the median of whole runs."""
    if device.type != "cuda":
        return median_ms(work, device, runs=runs)
    for _ in range(3):
        work()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
        for _ in range(runs):
            work()
        torch.cuda.synchronize(device)
    return sum(event.self_device_time_total for event in found.key_averages()) / 1e3 / runs
