"""A part in one file: a gate on each head's output, computed from the layer's normed input."""

from __future__ import annotations

import torch
from torch import Tensor

from golf_ray.config import ModelConfig
from golf_ray.model.parts import Part, Pass
from golf_ray.model.specs import MatrixSpec, TensorSpec, constant


class OutputGate(Part):
    """y_h *= 2 sigmoid(W n)_h, with a small matrix W [H, D] a layer that is quantised too."""

    def tensors(self, config: ModelConfig) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                name=f"blocks.{i}.attn.gate.weight",
                shape=(config.num_heads, config.model_dim),
                optimizer="small",
                init=constant(0.01),
            )
            for i in range(config.num_layers)
        )

    def matrices(self, config: ModelConfig) -> tuple[MatrixSpec, ...]:
        return tuple(
            MatrixSpec(
                name=spec.name,
                tensor=spec.name,
                index=None,
                group="attention",
                layer=i,
                shape=(spec.shape[0], spec.shape[1]),
            )
            for i, spec in enumerate(self.tensors(config))
        )

    def attention_output(self, y_THd: Tensor, n_TD: Tensor, layer: int, run: Pass) -> Tensor:
        gate_TH = 2.0 * torch.sigmoid(run.linear(f"blocks.{layer}.attn.gate.weight", n_TD))
        return y_THd * gate_TH[:, :, None]


PART = OutputGate()
