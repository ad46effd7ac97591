"""How calibration and adaptation enter the forward.

The forward calls a `Hooks` object at each use of a matrix. Adapters, Hessian taps and whatever
comes later subclass it; there is never a second copy of the forward.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Site = Literal["q", "k", "v", "o", "mlp", "head"]


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
