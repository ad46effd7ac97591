"""The four knobs of PR #1530 around its values: warmdown, momentum, clip sigmas, TTT chunk size.

Ranges are those that the field has tried on this stack.
"""

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution

SPACE: dict[str, BaseDistribution] = {
    "train.warmdown_frac": FloatDistribution(0.60, 0.85),
    "train.muon_momentum": FloatDistribution(0.95, 0.99),
    "quantization.mlp_clip_sigmas": FloatDistribution(10.0, 13.5),
    "quantization.attention_clip_sigmas": FloatDistribution(12.0, 14.0),
    "quantization.embedding_clip_sigmas": FloatDistribution(12.0, 20.0),
    "adaptation.chunk_size": IntDistribution(32, 64, step=16),
}

FIRST: list[dict[str, float | int]] = [
    {
        "train.warmdown_frac": 0.72,
        "train.muon_momentum": 0.97,
        "quantization.mlp_clip_sigmas": 12.85,
        "quantization.attention_clip_sigmas": 12.85,
        "quantization.embedding_clip_sigmas": 20.0,
        "adaptation.chunk_size": 32,
    }
]
