"""A part in one file: each embedding takes in some of the previous token's, stopping at BOS."""

from __future__ import annotations

import torch
from torch import Tensor

from golf_ray.config import ModelConfig
from golf_ray.model.parts import Part, Pass
from golf_ray.model.specs import TensorSpec, constant

BOS_ID = 1
GATE_INPUTS = 12


class Smear(Part):
    """x += sigmoid(g . x[:12]) * strength * previous x, nothing where the token is BOS."""

    def tensors(self, config: ModelConfig) -> tuple[TensorSpec, ...]:
        return (
            TensorSpec(
                name="smear_gate", shape=(GATE_INPUTS,), optimizer="small", init=constant(0.1)
            ),
            TensorSpec(name="smear_strength", shape=(1,), optimizer="small", init=constant(0.5)),
        )

    def embedding(self, x_TD: Tensor, run: Pass) -> Tensor:
        gate_T = torch.sigmoid(x_TD[:, :GATE_INPUTS] @ run.weight("smear_gate"))
        gate_T = gate_T * (run.tokens_T != BOS_ID) * run.weight("smear_strength")
        return x_TD + gate_T[:, None] * run.previous(x_TD)


PART = Smear()
