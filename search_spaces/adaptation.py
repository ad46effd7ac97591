"""Test-time training on one artifact: chunk, rank and the adapters' optimizer.

A trial of this space neither trains nor quantises. `adaptation.beta1` is adam's first-moment decay,
0 in the record, and sgd's momentum: it is sampled for sgd alone, and beta2 for adam alone.
"""

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

SPACE: dict[str, BaseDistribution] = {
    "adaptation.chunk_size": IntDistribution(32, 64, step=16),
    "adaptation.rank": IntDistribution(48, 128, step=16),
    "adaptation.lr": FloatDistribution(5e-5, 2e-4, log=True),
    "adaptation.weight_decay": FloatDistribution(0.1, 1.0, log=True),
    "adaptation.optimizer": CategoricalDistribution(["adam", "sgd"]),
    "adaptation.beta1": FloatDistribution(0.0, 0.95),
    "adaptation.beta2": FloatDistribution(0.99, 0.999),
}

CONDITIONS: dict[str, tuple[str, list[str]]] = {
    "adaptation.beta1": ("adaptation.optimizer", ["sgd"]),
    "adaptation.beta2": ("adaptation.optimizer", ["adam"]),
}

FIRST: list[dict[str, float | int | str]] = [
    {
        "adaptation.chunk_size": 32,
        "adaptation.rank": 96,
        "adaptation.lr": 1e-4,
        "adaptation.weight_decay": 0.5,
        "adaptation.optimizer": "adam",
        "adaptation.beta2": 0.999,
    }
]
