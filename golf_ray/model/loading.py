"""Reading a `torch.save` file without running anything that it holds.

Invariant: whatever the bytes are, the outcome is plain data and tensors, or one `CheckpointError`.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
import warnings
from pathlib import Path
from typing import Any

import torch

from golf_ray.errors import CheckpointError

REMEDY = "take the file from its source again"
# What a damaged or hostile pickle or zip can raise inside torch.load.
_UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)
_GLOBAL = re.compile(r"(?:GLOBAL|[Ff]unction|class) ([A-Za-z_][\w.]*)")


def read_bytes(path: Path, where: str, *, max_bytes: int | None = None) -> bytes:
    """A file's content.

    Raises:
        CheckpointError: it cannot be read, or is larger than `max_bytes`.
    """
    try:
        if max_bytes is not None and path.stat().st_size > max_bytes:
            raise CheckpointError(f"{where} is larger than {max_bytes} bytes", "check the file")
        return path.read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"{where} cannot be read ({reason})", "check the path") from None


def load_tensors(source: Path | bytes, where: str) -> Any:
    """The content of a `torch.save` file, on the CPU.

    Args:
        source: a file, or its bytes.
        where: how messages name it.

    Raises:
        CheckpointError: it is missing or damaged, or would run code when unpickled.
    """
    if isinstance(source, Path) and not source.is_file():
        kind = "is a folder" if source.is_dir() else "is not there"
        raise CheckpointError(f"{where} cannot be read: it {kind}", "give a file")
    readable = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with warnings.catch_warnings():
            # torch warns of pickle protocols and tensor kinds before it refuses them.
            warnings.simplefilter("ignore")
            return torch.load(readable, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = _GLOBAL.search(str(error))
        what = f" ('{found[1]}')" if found else ""
        raise CheckpointError(
            f"{where} holds something else than tensors and plain data{what}; it was refused, and"
            " nothing of it was run",
            "use a file of weights only",
        ) from None
    except _UNREADABLE as error:
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise CheckpointError(f"{where} is damaged ({reason})", REMEDY) from None
