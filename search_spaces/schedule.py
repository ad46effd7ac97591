"""When things happen in a training: warmdown, floor, looping and the momentum's warm-up.

A long warmdown looks better early: trials of this space are to be compared at their ends only.
"""

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

SPACE: dict[str, BaseDistribution] = {
    "train.warmdown_frac": FloatDistribution(0.60, 0.85),
    "train.min_lr": FloatDistribution(0.0, 0.1),
    "train.enable_looping_at": FloatDistribution(0.20, 0.50),
    "train.muon_momentum": FloatDistribution(0.95, 0.99),
    "train.muon_momentum_warmup_start": FloatDistribution(0.85, 0.95),
    "train.muon_momentum_warmup_steps": IntDistribution(1500, 2000, step=50),
}

FIRST: list[dict[str, float | int]] = [
    {
        "train.warmdown_frac": 0.72,
        "train.min_lr": 0.0,
        "train.enable_looping_at": 0.35,
        "train.muon_momentum": 0.97,
        "train.muon_momentum_warmup_start": 0.92,
        "train.muon_momentum_warmup_steps": 1500,
    }
]
