"""How one trained model is quantised: clips by group, the embedding's bits, looped layers apart.

A trial of this space trains nothing. `quantization.looped_bits` set gives looped layers a clip of
their own as well; unset, they take those of their group, and the clip is not sampled.
"""

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

SPACE: dict[str, BaseDistribution] = {
    "quantization.mlp_clip_sigmas": FloatDistribution(10.0, 13.5),
    "quantization.attention_clip_sigmas": FloatDistribution(12.0, 14.0),
    "quantization.embedding_bits": IntDistribution(6, 8),
    "quantization.embedding_clip_sigmas": FloatDistribution(12.0, 20.0),
    "quantization.looped_bits": CategoricalDistribution([None, 6, 7]),
    "quantization.looped_clip_sigmas": FloatDistribution(10.0, 14.0),
}

CONDITIONS: dict[str, tuple[str, list[int]]] = {
    "quantization.looped_clip_sigmas": ("quantization.looped_bits", [6, 7]),
}

FIRST: list[dict[str, float | int | None]] = [
    {
        "quantization.mlp_clip_sigmas": 12.85,
        "quantization.attention_clip_sigmas": 12.85,
        "quantization.embedding_bits": 8,
        "quantization.embedding_clip_sigmas": 20.0,
        "quantization.looped_bits": None,
    }
]
