"""Schedules: pure functions of how far a run is.

`frac` is the part of the run that is over: elapsed seconds over the wall-clock cap less its
reserve, or zero-based step over steps where there is no cap.
"""

from __future__ import annotations

from golf_ray.config import TrainConfig


def run_fraction(config: TrainConfig, step: int, elapsed_s: float) -> float:
    """How much of the run is over before zero-based `step` begins."""
    if config.max_wallclock_s is None:
        return step / config.iterations
    return elapsed_s / (config.max_wallclock_s - config.reserve_s)


def is_over(config: TrainConfig, step: int, elapsed_s: float) -> bool:
    """Whether no further step is to begin."""
    if step >= config.iterations:
        return True
    return config.max_wallclock_s is not None and run_fraction(config, step, elapsed_s) >= 1.0


def lr_multiplier(config: TrainConfig, frac: float) -> float:
    """1 until `1 - warmdown_frac`, then falling linearly to 0, never under min_lr."""
    if frac < 1.0 - config.warmdown_frac or config.warmdown_frac == 0.0:
        return 1.0
    return max((1.0 - frac) / config.warmdown_frac, config.min_lr)


def muon_momentum(config: TrainConfig, step: int) -> float:
    """Linear from muon_momentum_warmup_start to muon_momentum over the warm-up's steps."""
    if config.muon_momentum_warmup_steps == 0:
        return config.muon_momentum
    t = min(step / config.muon_momentum_warmup_steps, 1.0)
    return (1.0 - t) * config.muon_momentum_warmup_start + t * config.muon_momentum


def loops(config: TrainConfig, frac: float) -> bool:
    """Whether the looped layers are looped."""
    return frac >= config.enable_looping_at
