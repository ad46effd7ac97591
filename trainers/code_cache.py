"""Compiled code, kept: in a folder of this machine for other processes, in a shared one for hosts.

Triton and torch.compile put what they compile into a folder on this machine's disk, one for each
combination of versions, GPU and configuration. Where a shared folder is given (`kernels.cache`, a
path or URI), the first run packs that code into one file there, and a host that has none yet
unpacks it. Code is never run from the shared folder itself: network disks change under a process.

A shared file holds code that will run: whoever may write the folder may run programs as its users,
as with any package index of one's own.

Invariant: a damaged, foreign or unreachable file costs a compilation and never the run.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import golf_ray
from golf_ray import fingerprint
from golf_ray.config import Config
from golf_ray.errors import StorageError
from trainers.storage import Storage

MAGIC = b"golf_ray compiled code 1\n"
KERNELS, GRAPHS = "triton", "inductor"
ARTIFACTS = "torch.bin"
"""torch.compile's own cache artifacts, as it packs them."""


def cache_key(config: Config, device: torch.device) -> dict[str, Any]:
    """What compiled code depends on."""
    whole = config.to_dict()
    gpu = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = [properties.name, properties.major, properties.minor]
    return {
        "golf_ray": golf_ray.__version__,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "cuda": torch.version.cuda,
        "gpu": gpu,
        "model": whole["model"],
        "attention": whole["attention"],
        "kernels": {name: whole["kernels"][name] for name in ("backend", "compile")},
        "precision": whole["train"]["precision"],
        "micro_batch_tokens": config.train.micro_batch_tokens,
        "seq_len": config.data.seq_len,
    }


def _triton_version() -> str | None:
    with contextlib.suppress(ImportError):
        import triton

        return str(triton.__version__)
    return None


def default_root() -> Path:
    """Where this machine keeps compiled code."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "golf_ray" / "compiled"


@dataclass(kw_only=True)
class CodeCache:
    """Compiled code of one combination.

    Args:
        config: of the run.
        device: that compiles.
        root: folder of this machine.
    """

    config: Config
    device: torch.device
    root: Path = field(default_factory=default_root)
    found: str = "nothing"
    """Where code was there already: `nothing`, `here`, or `shared`."""
    trouble: str | None = None
    """What went wrong with the shared file, if anything did."""

    def __post_init__(self) -> None:
        self.name = fingerprint.of_value(cache_key(self.config, self.device))

    @property
    def folder(self) -> Path:
        """This combination's folder on this machine."""
        return self.root / self.name

    def open(self) -> None:
        """Have this process keep its compiled code here, and fetch what others have compiled."""
        if self.folder.is_dir():
            self.found = "here"
        elif self._fetch():
            self.found = "shared"
        self.folder.mkdir(parents=True, exist_ok=True)
        os.environ["TRITON_CACHE_DIR"] = str(self.folder / KERNELS)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self.folder / GRAPHS)
        artifacts = self.folder / ARTIFACTS
        if self.config.kernels.compile and artifacts.is_file():
            torch.compiler.load_cache_artifacts(artifacts.read_bytes())

    def publish(self) -> bool:
        """Put what was compiled into the shared folder, unless it is there; one rank calls it."""
        shared = self._shared()
        if shared is None:
            return False
        try:
            if shared.exists(self._file):
                return False
            shared.write_bytes(self._file, self._packed())
        except (StorageError, OSError) as error:
            self.trouble = f"compiled code was not shared: {error}"
            return False
        return True

    # The shared file ------------------------------------------------------------------------------

    @property
    def _file(self) -> str:
        return f"{self.name}.tar"

    def _shared(self) -> Storage | None:
        uri = self.config.kernels.cache
        return None if uri is None else Storage(uri)

    def _packed(self) -> bytes:
        if self.config.kernels.compile:
            saved = torch.compiler.save_cache_artifacts()
            if saved is not None:
                (self.folder / ARTIFACTS).write_bytes(saved[0])
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
            for part in (KERNELS, ARTIFACTS):
                if (self.folder / part).exists():
                    archive.add(self.folder / part, arcname=part)
        data = buffer.getvalue()
        return MAGIC + hashlib.sha256(data).digest() + data

    def _fetch(self) -> bool:
        """Unpack the shared file into this machine's folder; whether there is code now."""
        try:
            shared = self._shared()
            packed = None if shared is None else shared.read_bytes(self._file)
        except StorageError as error:
            self.trouble = f"compiled code was not fetched: {error}"
            return False
        if packed is None:
            return False
        head = len(MAGIC) + hashlib.sha256().digest_size
        data = packed[head:]
        if packed[:head] != MAGIC + hashlib.sha256(data).digest():
            self.trouble = (
                f"compiled code in {self.config.kernels.cache} is damaged: compiling anew"
            )
            return False
        self.root.mkdir(parents=True, exist_ok=True)
        unpacked = Path(tempfile.mkdtemp(prefix=f".{self.name}.", dir=self.root))
        try:
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
                archive.extractall(unpacked, filter="data")
            # Another process of this machine may have been faster.
            with contextlib.suppress(OSError):
                unpacked.rename(self.folder)
        except (tarfile.TarError, OSError) as error:
            self.trouble = f"compiled code could not be unpacked: {error}"
        finally:
            shutil.rmtree(unpacked, ignore_errors=True)
        return self.folder.is_dir()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a run's events."""
        return {
            "name": self.name,
            "folder": str(self.folder),
            "found": self.found,
            "trouble": self.trouble,
        }
