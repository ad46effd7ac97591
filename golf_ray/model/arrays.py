"""Tensors as numpy arrays and back, for passing weights between processes without copying.

Invariant: `tensors_of(arrays_of(state))` equals `state` bit for bit, in bfloat16 too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Arrays = dict[str, tuple[str, NDArray[Any]]]
"""By name: torch's name of the type, and the values (bfloat16, which numpy lacks, as int16)."""


def arrays_of(state: Mapping[str, Tensor]) -> Arrays:
    """A state dict as arrays."""
    arrays: Arrays = {}
    for name, tensor in state.items():
        plain = tensor.detach().cpu().contiguous()
        if plain.dtype == torch.bfloat16:
            plain = plain.view(torch.int16)
        arrays[name] = (str(tensor.dtype).removeprefix("torch."), plain.numpy())
    return arrays


def tensors_of(arrays: Arrays) -> dict[str, Tensor]:
    """The inverse of `arrays_of`; a copy, as arrays from another process are read-only."""
    return {
        name: torch.from_numpy(np.array(values)).view(getattr(torch, kind))
        for name, (kind, values) in arrays.items()
    }
