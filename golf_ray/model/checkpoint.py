"""Reading and writing weights as data.

A checkpoint of weights (`final_model.pt`) is the plain public state dict; ours carry their
configuration as one further member of the zip file, which other readers do not look at. Nothing
read here can run code: only tensors and plain containers are unpickled.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from golf_ray.config import Config, ModelConfig
from golf_ray.errors import CheckpointError
from golf_ray.model.compute import Compute
from golf_ray.model.loading import load_tensors
from golf_ray.model.model import GolfModel
from golf_ray.model.parameters import check_tensors, tensor_specs
from golf_ray.records import atomic_path

CONFIG_MEMBER = "golf_ray_config.json"


def read_state(path: Path) -> tuple[dict[str, Tensor], Config | None]:
    """A state dict and, where the file carries it, the configuration it was trained under.

    Raises:
        CheckpointError: the file cannot be read safely or is no state dict.
        ConfigError: the configuration in it is of another version of golf_ray.
    """
    state = load_tensors(path, str(path))
    good = isinstance(state, dict) and all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    )
    if not good or not state:
        raise CheckpointError(f"{path} holds no state dict", "give a file of named tensors")
    return dict(state), _read_config(path)


def _read_config(path: Path) -> Config | None:
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        members = [n for n in archive.namelist() if n.rpartition("/")[2] == CONFIG_MEMBER]
        return Config.from_json(archive.read(members[0]).decode()) if members else None


def save_state(path: Path, state: Mapping[str, Tensor], config: Config) -> None:
    """Write a plain state dict that carries its configuration.

    Raises:
        StorageError: the folder cannot be written or is full.
    """
    with atomic_path(path) as temporary:
        torch.save({name: tensor.cpu() for name, tensor in state.items()}, temporary)
        with zipfile.ZipFile(temporary, "a") as archive:
            folder = archive.namelist()[0].partition("/")[0]
            archive.writestr(f"{folder}/{CONFIG_MEMBER}", config.to_json())


def check_state(config: ModelConfig, state: Mapping[str, Tensor], what: str) -> None:
    """Compare a state dict with what a configuration asks for.

    Raises:
        CheckpointError: a tensor is unknown, missing or of another shape, or not of numbers.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    check_tensors(shapes, {s.name: s.shape for s in tensor_specs(config)}, what)
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{what}: '{name}' is of type {tensor.dtype}", "weights are floating-point tensors"
            )


def build_model(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    *,
    device: torch.device | str = "cpu",
    compute: Compute | None = None,
    what: str = "the checkpoint",
) -> GolfModel:
    """A model for evaluation: these weights, frozen.

    Raises:
        CheckpointError: the weights do not fit the configuration.
    """
    check_state(config, state, what)
    model = GolfModel(config, compute=compute)
    model.load_state_dict(dict(state))
    return model.requires_grad_(False).to(device).eval()
