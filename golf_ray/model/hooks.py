"""How calibration and adaptation enter the forward.

The forward calls a `Hooks` object at each use of a matrix. Adapters, Hessian taps and whatever
comes later subclass it; there is never a second copy of the forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from golf_ray.kernels.mlp import activation
from golf_ray.kernels.wide import is_narrow, linear_in_float32

Site = Literal["q", "k", "v", "o", "mlp", "head"]
Mlp = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(n [T, D], up [F, D], down [D, F]) -> output [T, D] and hidden activation [T, F]."""


class Hooks:
    """Does nothing; subclasses override what they need.

    Shapes: T tokens, I input and O output features of the matrix.
    """

    def matrix_input(self, name: str, x_TI: Tensor) -> None:
        """Called with the input rows of matrix `name` (unbanked public name), once a pass."""

    def adapts(self, site: Site, slot: int) -> bool:
        """Whether `adapt` may change that output: where it does not, nothing waits for it."""
        return type(self).adapt is not Hooks.adapt

    def adapt(self, site: Site, slot: int, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        """The output of a site after adaptation.

        Args:
            site: `q`, `k`, `v` (x the normed attention input, y the projection), `o` (the same x,
                y the attention's output after its output matrix), `mlp` (x the normed MLP input,
                y the MLP's output) or `head` (x the final normed hidden, y the raw logits).
            slot: virtual layer; for the head the number of virtual layers.
        """
        return y_TO

    def linear(
        self,
        sites: Sequence[Site],
        slot: int,
        x_TI: Tensor,
        w_OI: Tensor,
        widths: Sequence[int],
        source_TI: Tensor | None = None,
    ) -> Tensor:
        """x W^T after adaptation, [T, O].

        In 16 bits what adapters add is added before the result is rounded, and logits, whose last
        place is larger than what most steps change of them, stay float32.

        Args:
            sites: whose outputs stand side by side in it.
            widths: output features of each.
            source_TI: the adapters' input, where it is not x.
        """
        if not any(self.adapts(site, slot) for site in sites):
            return nn.functional.linear(x_TI, w_OI)
        y = linear_in_float32(x_TI, w_OI)
        source = x_TI if source_TI is None else source_TI
        pieces = zip(sites, y.split(tuple(widths), dim=1), strict=True)
        adapted = [self.adapt(site, slot, source, piece) for site, piece in pieces]
        y = adapted[0] if len(adapted) == 1 else torch.cat(adapted, 1)
        return y if "head" in sites else y.to(x_TI.dtype)

    def mlp(
        self, slot: int, n_TD: Tensor, up_FD: Tensor, down_DF: Tensor, mlp: Mlp
    ) -> tuple[Tensor, Tensor]:
        """The MLP's output after adaptation, and its hidden activation.

        Args:
            mlp: how to compute it without adapters.
        """
        if not (self.adapts("mlp", slot) and is_narrow(n_TD.dtype)):
            y, h_TF = mlp(n_TD, up_FD, down_DF)
            return self.adapt("mlp", slot, n_TD, y), h_TF
        h_TF = activation(nn.functional.linear(n_TD, up_FD))
        y = self.adapt("mlp", slot, n_TD, linear_in_float32(h_TF, down_DF))
        return y.to(n_TD.dtype), h_TF
