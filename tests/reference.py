"""The stored expected values of the tiny configuration, and how tests get at them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from golf_ray.model.checkpoint import build_model
from golf_ray.model.loading import load_tensors
from golf_ray.model.model import GolfModel
from golf_ray.presets import TINY

FOLDER = Path(__file__).parent / "data" / "tiny"
TRAIN_SHARDS = sorted((FOLDER / "datasets/fineweb10B_sp512").glob("fineweb_train_*.bin"))
VAL_SHARDS = sorted((FOLDER / "datasets/fineweb10B_sp512").glob("fineweb_val_*.bin"))
TOKENIZER = FOLDER / "tokenizers/fineweb_512_bpe.model"


@functools.cache
def arrays(name: str) -> dict[str, Any]:
    """All arrays of a stored file."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


def final_state() -> dict[str, Tensor]:
    """The stored randomised weights."""
    return dict(load_tensors(FOLDER / "final_model.pt", "stored"))


def training_states() -> dict[str, dict[str, Tensor]]:
    """The stored training's `init`, `final` and `ema`."""
    return load_tensors(FOLDER / "training_states.pt", "stored")


def tiny_model() -> GolfModel:
    """The tiny model with the stored randomised weights, frozen."""
    torch.manual_seed(0)
    return build_model(TINY.model, final_state())
