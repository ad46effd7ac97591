"""A document half-way through: what it takes to go on elsewhere, in memory and as a file.

A very long document takes thousands of serial steps; with its state stored now and then, what is
lost with a machine is what came since. A file begins with a digest of what follows, because torch
looks for no damage in a tensor's bytes; it is read as any foreign file is.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from golf_ray.errors import CheckpointError
from golf_ray.model.loading import load_tensors, read_bytes
from golf_ray.records import atomic_write_bytes

VERSION = 1
MAGIC = b"golf_ray state of a document\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentState:
    """Adapter, optimizer and scores of one document after some of its chunks."""

    index: int
    """Place in the whole validation set."""
    num_predictions: int
    chunks: int
    """That are scored; all of them are learned from."""
    steps: int
    """Optimizer steps taken."""
    parameters_P: Tensor
    """float32, as `AdapterLayout` lays them out."""
    second_P: Tensor | None
    """Second moments, for adam."""
    first_P: Tensor | None
    """First moments, where beta1 is not 0."""
    losses: Tensor
    """float32, of the predictions scored."""
    trace: tuple[tuple[int, int, int], ...]
    """(chunk, scored at, updated at)."""
    settings: str
    """Fingerprint of the settings that it was made under."""

    def to_bytes(self) -> bytes:
        """The content of such a file."""
        held: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        buffer = io.BytesIO()
        torch.save({"version": VERSION, **held, "trace": [list(e) for e in self.trace]}, buffer)
        content = buffer.getvalue()
        return MAGIC + hashlib.sha256(content).digest() + content

    def save(self, path: Path) -> None:
        """Write it as a file, whole or not at all."""
        atomic_write_bytes(path, self.to_bytes())

    @staticmethod
    def load(path: Path) -> DocumentState:
        """Read such a file.

        Raises:
            CheckpointError: it cannot be read, or is no document's state of this version.
        """
        return DocumentState.of_bytes(read_bytes(path, str(path)), str(path))

    @staticmethod
    def of_bytes(data: bytes, name: str) -> DocumentState:
        """What `to_bytes` gave.

        Args:
            name: what the error calls it.

        Raises:
            CheckpointError: it is no document's state of this version.
        """
        try:
            held = load_tensors(_content(data), name)
            if held.pop("version") != VERSION:
                raise ValueError("of another version")
            held["trace"] = tuple(tuple(event) for event in held["trace"])
            state = DocumentState(**held)
            _check_types(state)
            return state
        except CheckpointError:
            raise
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise CheckpointError(
                f"{name} is no state of a document ({error})",
                "delete it; the document starts again",
            ) from None


def _content(data: bytes) -> bytes:
    if not data.startswith(MAGIC):
        raise ValueError("it begins otherwise")
    begin = len(MAGIC) + hashlib.sha256().digest_size
    if hashlib.sha256(data[begin:]).digest() != data[len(MAGIC) : begin]:
        raise ValueError("it is damaged")
    return data[begin:]


def _check_types(state: DocumentState) -> None:
    numbers = [state.index, state.num_predictions, state.chunks, state.steps]
    numbers += [number for event in state.trace for number in event]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("numbers of another kind")
    if any(len(event) != 3 for event in state.trace) or not isinstance(state.settings, str):
        raise ValueError("fields of another kind")
    moments = [m for m in (state.second_P, state.first_P) if m is not None]
    for tensor in (state.parameters_P, state.losses, *moments):
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.float32 or tensor.ndim != 1:
            raise ValueError("tensors of another kind")
