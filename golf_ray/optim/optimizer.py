"""All optimizers of a model behind one step: Muon for banks, AdamW for the rest.

Which tensor belongs to which group is said by `TensorSpec.optimizer`; tensors of group `none`
(the projections between embedding and model width) stay as they began.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from golf_ray.config import TrainConfig
from golf_ray.model.model import GolfModel
from golf_ray.model.parameters import tensor_specs
from golf_ray.optim.gradients import StepGradient
from golf_ray.optim.muon import Muon
from golf_ray.optim.world import World


class GolfOptimizer:
    """Muon and AdamW over a model's tensors.

    Args:
        model: whose tensors are updated in place.
        config: learning rates, decays, momenta.
        world: the ranks.
    """

    def __init__(self, model: GolfModel, config: TrainConfig, world: World) -> None:
        self.config = config
        tensors = model.tensors()
        groups = {spec.name: spec.optimizer for spec in tensor_specs(model.config)}
        self.banks = {n: tensors[n] for n, g in groups.items() if g == "muon"}
        self.replicated = {n: tensors[n] for n, g in groups.items() if g not in ("muon", "none")}
        self.muon = Muon(
            dict(self.banks),
            world,
            newton_schulz_steps=config.muon_newton_schulz_steps,
            dtype=getattr(torch, config.muon_newton_schulz_dtype),
            row_normalize=config.muon_row_normalize,
        )
        tied = model.config.tie_embeddings
        rates = {
            "embedding": (config.embed_lr if tied else config.untied_embed_lr, config.embed_wd),
            "small": (config.small_lr, config.small_wd),
            "head": (config.head_lr, 0.0),
        }
        self._adam_names = {
            group: [n for n, g in groups.items() if g == group]
            for group in rates
            if group in groups.values()
        }
        self.adam = torch.optim.AdamW(
            [
                {
                    "params": [tensors[n] for n in names],
                    "lr": rates[group][0],
                    "base_lr": rates[group][0],
                    "weight_decay": rates[group][1],
                }
                for group, names in self._adam_names.items()
            ],
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            fused=world.device.type == "cuda",
        )

    def step(self, gradient: StepGradient, *, lr_multiplier: float, momentum: float) -> None:
        """One update of everything.

        Args:
            gradient: the step's averaged, clipped gradient.
            lr_multiplier: the schedule's factor on every learning rate.
            momentum: Muon's, of this step.
        """
        for name, grad in gradient.replicated.items():
            self.replicated[name].grad = grad
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * lr_multiplier
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self.muon.step(
            gradient.banks,
            lr=self.config.muon_lr * lr_multiplier,
            weight_decay=self.config.muon_wd,
            momentum=momentum,
        )

    def state_dict(self) -> dict[str, Any]:
        """All state by tensor name, whatever the number of ranks; every rank must call it."""
        names = [n for group in self._adam_names.values() for n in group]
        states = self.adam.state_dict()["state"]
        return {
            "muon": self.muon.state_dict(),
            "adam": {name: states[i] for i, name in enumerate(names) if i in states},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of `state_dict`, on any number of ranks."""
        self.muon.load_state_dict(state["muon"])
        names = [n for group in self._adam_names.values() for n in group]
        whole = self.adam.state_dict()
        adam: dict[str, dict[str, Tensor]] = state["adam"]
        whole["state"] = {i: adam[name] for i, name in enumerate(names) if name in adam}
        self.adam.load_state_dict(whole)
