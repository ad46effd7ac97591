"""Weights as files hold them, and the configuration to use them under.

Invariant: reading never runs code, and neither does a configuration that came with the weights.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from golf_ray.config import Config, ModelConfig
from golf_ray.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

FINAL_FILE = "final_model.pt"
INITIAL_ONLY = frozenset({"qk_gain_init", "tied_embed_init_std"})
"""Fields of a model that say nothing about one that is trained."""


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class StoredWeights:
    """Weights as a file holds them: a state dict, or an artifact's quantised tensors."""

    path: Path
    kind: Literal["full", "int6"]
    config: Config | None
    """The configuration in the file, no more to be trusted than the file; None in public ones."""
    model_bytes: int | None
    """Size of an artifact's file."""
    tensors: dict[str, Tensor]
    kinds: dict[str, str]
    """How each weight of an artifact is stored; empty for a state dict."""

    def without_tensors(self) -> StoredWeights:
        """The same without its tensors: those of many files need not lie in memory side by side."""
        return dataclasses.replace(self, tensors={}, kinds={})

    def state(self, model: ModelConfig) -> dict[str, Tensor]:
        """The banked state dict.

        Raises:
            CheckpointError: a tensor is unknown, missing or of another shape.
        """
        from golf_ray.model.checkpoint import check_state
        from golf_ray.quantization.artifact import restore_state

        if self.kind == "full":
            check_state(model, self.tensors, str(self.path))
            return self.tensors
        return restore_state(self.tensors, self.kinds, model, str(self.path))


def open_weights(path: str | Path) -> StoredWeights:
    """Read a checkpoint (`final_model.pt`, or the folder of a run that has one) or an artifact.

    Raises:
        CheckpointError: it cannot be read, or would run code when read.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / FINAL_FILE).is_file():
            raise CheckpointError(
                f"the folder {path} holds no {FINAL_FILE}",
                "give a checkpoint file, or end the training with 'golf-ray train --resume'",
            )
        path = path / FINAL_FILE
    if _is_artifact(path):
        from golf_ray.quantization.container import read_artifact

        tensors, kinds, config = read_artifact(path)
        size = path.stat().st_size
        return StoredWeights(
            path=path, kind="int6", config=config, model_bytes=size, tensors=tensors, kinds=kinds
        )
    from golf_ray.model.checkpoint import read_state

    state, config = read_state(path)
    return StoredWeights(
        path=path, kind="full", config=config, model_bytes=None, tensors=state, kinds={}
    )


def _is_artifact(path: Path) -> bool:
    """By name where the name says it; else what is neither zip nor pickle may be compressed."""
    if path.suffix in (".ptz", ".pt", ".pth"):
        return path.suffix == ".ptz"
    try:
        with open(path, "rb") as file:
            head = file.read(2)
    except OSError:
        # Reading it as a checkpoint says what is wrong.
        return False
    return head != b"PK" and head[:1] != b"\x80"


def require_trusted(config: Config, path: str | Path) -> None:
    """See that a configuration out of a file asks for no code but this package's.

    Raises:
        CheckpointError: it names a part that is not built in.
    """
    from golf_ray.model.parts import is_builtin

    foreign = [part for part in config.model.parts if not is_builtin(part)]
    if foreign:
        raise CheckpointError(
            f"{path} asks to run code from '{foreign[0]}', which was not done",
            f"if you trust it, add --set model.parts={','.join(config.model.parts)}",
        )


def config_for(weights: StoredWeights, config: Config | None, *, force: bool = False) -> Config:
    """The configuration to use weights under: the one given, else the one that they carry.

    Raises:
        CheckpointError: the weights carry none, one of another model, or one that would run code.
    """
    carried = weights.config
    if config is None:
        if carried is None:
            raise CheckpointError(
                f"{weights.path} carries no configuration", "give the one that it was trained under"
            )
        require_trusted(carried, weights.path)
        return carried
    if carried is not None and not force:
        differing = _differing(config.model, carried.model)
        if differing:
            name, mine, theirs = differing[0]
            others = ", ".join(f"model.{d[0]}" for d in differing[1:])
            raise CheckpointError(
                f"{weights.path} was trained under another model: model.{name} = {theirs!r} there,"
                f" {mine!r} here" + (f"; {others} differ too" if others else ""),
                "leave the configuration out to use its own, or force it with --force",
            )
    return config


def _differing(a: ModelConfig, b: ModelConfig) -> list[tuple[str, Any, Any]]:
    names = [f.name for f in dataclasses.fields(ModelConfig) if f.name not in INITIAL_ONLY]
    return [(n, getattr(a, n), getattr(b, n)) for n in names if getattr(a, n) != getattr(b, n)]


def opened(checkpoint: str | Path | StoredWeights) -> StoredWeights:
    """Weights by their file, or as they are."""
    return checkpoint if isinstance(checkpoint, StoredWeights) else open_weights(checkpoint)
