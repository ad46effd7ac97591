"""The optimizers and the learning-rate schedule of a training, around the record's values.

A trial of this space trains; what is quantised and how it is scored stays as it is. Ranges of
warmdown, floor, momentum, matrix rate and beta2 are those that the field has tried on this stack,
the others a third to either side of the record.
"""

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

SPACE: dict[str, BaseDistribution] = {
    "train.warmdown_frac": FloatDistribution(0.60, 0.85),
    "train.min_lr": FloatDistribution(0.0, 0.1),
    "train.muon_momentum": FloatDistribution(0.95, 0.99),
    "train.muon_momentum_warmup_steps": IntDistribution(1500, 2000, step=50),
    "train.muon_lr": FloatDistribution(0.020, 0.030),
    "train.muon_wd": FloatDistribution(0.06, 0.13),
    "train.embed_lr": FloatDistribution(0.02, 0.04),
    "train.embed_wd": FloatDistribution(0.055, 0.115),
    "train.small_lr": FloatDistribution(0.013, 0.027),
    "train.adam_beta2": FloatDistribution(0.95, 0.99),
}

FIRST: list[dict[str, float | int]] = [
    {
        "train.warmdown_frac": 0.72,
        "train.min_lr": 0.0,
        "train.muon_momentum": 0.97,
        "train.muon_momentum_warmup_steps": 1500,
        "train.muon_lr": 0.022,
        "train.muon_wd": 0.095,
        "train.embed_lr": 0.03,
        "train.embed_wd": 0.085,
        "train.small_lr": 0.02,
        "train.adam_beta2": 0.95,
    }
]
