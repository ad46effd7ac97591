"""A training's whole state on disk: what makes a resumed run go on as if it had not stopped.

A checkpoint folder holds `state.pt` (weights, optimizer, average, loader position, random state,
clock) and `config.json`; the last one of a run holds `final_model.pt`, the averaged weights, too.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from golf_ray.config import Config
from golf_ray.errors import CheckpointError
from golf_ray.model.checkpoint import save_state
from golf_ray.model.loading import load_tensors
from golf_ray.records import atomic_path, atomic_write_text

STATE_FILE = "state.pt"
CONFIG_FILE = "config.json"
FINAL_FILE = "final_model.pt"
FORMAT = 1

STAGE_SECTIONS = ("model", "data", "train")
"""Sections of a configuration on which a training depends."""

MAY_DIFFER = (
    "train.val_every_steps",
    "train.checkpoint_every_steps",
    "train.log_every_steps",
    "train.min_tokens_per_s",
    "train.speed_check_steps",
    "data.dir",
)
"""Fields of those sections that change nothing about the weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingState:
    """Everything of a run between two steps."""

    step: int
    elapsed_s: float
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    average: dict[str, Tensor]
    loader: dict[str, Any]
    random: dict[str, Tensor]


def random_state() -> dict[str, Tensor]:
    """State of torch's generators of this process."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Set torch's generators."""
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def write_state(folder: Path, state: TrainingState, config: Config) -> None:
    """Write a checkpoint folder's state and configuration."""
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    with atomic_path(folder / STATE_FILE) as temporary:
        torch.save({"format": FORMAT, **fields}, temporary)
    atomic_write_text(folder / CONFIG_FILE, config.to_json())


def write_final(folder: Path, weights: dict[str, Tensor], config: Config) -> None:
    """Write the run's result."""
    save_state(folder / FINAL_FILE, weights, config)


def read_state(folder: Path, config: Config) -> TrainingState:
    """Read a checkpoint folder for a run under `config`.

    Raises:
        CheckpointError: it is incomplete, of another format, or of another configuration.
    """
    other = Config.from_json(_text(folder / CONFIG_FILE))
    differing = differing_fields(config, other)
    if differing:
        path, mine, theirs = differing[0]
        raise CheckpointError(
            f"{folder} was trained under another configuration: {path} = {theirs!r} there, "
            f"{mine!r} here" + (f", and {len(differing) - 1} more" if differing[1:] else ""),
            "resume under its own configuration or begin a new run",
        )
    data = load_tensors(folder / STATE_FILE, str(folder / STATE_FILE))
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder / STATE_FILE} is no training state of this version", "begin a new run"
        )
    return TrainingState(**{f.name: data[f.name] for f in dataclasses.fields(TrainingState)})


def stage_config(config: Config) -> dict[str, Any]:
    """The part of a configuration on which a training's result depends, as plain data."""
    whole = config.to_dict()
    stage = {section: dict(whole[section]) for section in STAGE_SECTIONS}
    for path in MAY_DIFFER:
        section, _, name = path.partition(".")
        del stage[section][name]
    return stage


def differing_fields(a: Config, b: Config) -> list[tuple[str, Any, Any]]:
    """Fields on which trainings of two configurations differ: (path, value in a, value in b)."""
    mine, theirs = stage_config(a), stage_config(b)
    return [
        (f"{section}.{name}", value, theirs[section][name])
        for section, fields in mine.items()
        for name, value in fields.items()
        if value != theirs[section][name]
    ]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise CheckpointError(
            f"{path.parent} is no training checkpoint ({error.strerror})",
            f"give a folder that holds {CONFIG_FILE}",
        ) from None
