"""The record's four knobs with ranges for the `laptop` preset's short trainings."""

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

SPACE: dict[str, BaseDistribution] = {
    "train.warmdown_frac": FloatDistribution(0.30, 0.90),
    "train.muon_momentum": FloatDistribution(0.85, 0.98),
    "quantization.mlp_clip_sigmas": FloatDistribution(4.0, 14.0),
    "quantization.attention_clip_sigmas": FloatDistribution(4.0, 14.0),
    "quantization.embedding_clip_sigmas": FloatDistribution(8.0, 20.0),
    "adaptation.chunk_size": IntDistribution(16, 64, step=16),
}

FIRST: list[dict[str, float | int]] = [
    {
        "train.warmdown_frac": 0.72,
        "train.muon_momentum": 0.95,
        "quantization.mlp_clip_sigmas": 12.85,
        "quantization.attention_clip_sigmas": 12.85,
        "quantization.embedding_clip_sigmas": 20.0,
        "adaptation.chunk_size": 32,
    }
]
