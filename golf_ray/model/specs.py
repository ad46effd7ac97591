"""What a tensor of a model is: name, shape, initial value, who trains it, how it is stored.

The vocabulary of `golf_ray.model.parameters` and of parts; it knows no model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Init = Callable[[Tensor, torch.Generator], None]
OptimizerGroup = Literal["muon", "embedding", "small", "head", "none"]
MatrixGroup = Literal["mlp", "attention", "embedding"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One tensor of the state dict."""

    name: str
    shape: tuple[int, ...]
    optimizer: OptimizerGroup
    """`muon` for banks [matrices, rows, columns], `none` for what stays as it began."""
    init: Init


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixSpec:
    """One matrix that may be quantised."""

    name: str
    """Unbanked public name."""
    tensor: str
    """Tensor of the state dict that holds it."""
    index: int | None
    """Slice of that tensor; None where it is the whole tensor."""
    group: MatrixGroup
    """Whose bits and clip sigmas hold for it."""
    layer: int | None
    """Physical layer, None outside the layers."""
    shape: tuple[int, int]
    """Rows (outputs) and columns (inputs)."""
    multiplies: bool = True
    """False for a table that is only looked up: it has no input rows and so no Hessian."""


def constant(value: float) -> Init:
    """An initial value that is the same everywhere."""

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.fill_(value)

    return fill


def normal(std: float) -> Init:
    """Normal with mean 0."""

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.normal_(0.0, std, generator=generator)

    return fill


def orthogonal(count: int | None = None) -> Init:
    """Orthogonal matrices in the first `count` slices of a bank (all for None), zeros after."""

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.zero_()
        matrices = tensor[:count] if tensor.dim() == 3 else tensor[None]
        for matrix in matrices:
            torch.nn.init.orthogonal_(matrix, generator=generator)

    return fill


def halves(first: Init, second: Init) -> Init:
    """One initial value for the first half of a bank, another for the second."""

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        half = tensor.shape[0] // 2
        first(tensor[:half], generator)
        second(tensor[half:], generator)

    return fill
