"""What the data files of a configuration are, without reading all of them.

Of each file its name, its size and the hash of its first MiB: a hundred shards take a second and
not minutes. That tells data sets and half-copied files apart; it is no proof that two files are
equal to the last byte, for which there is `golf_ray.data.verify`.

Invariant: the same files give the same fingerprint in whatever folder they lie.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from golf_ray.config import Config
from golf_ray.data.shards import find_shards
from golf_ray.data.tokenizer import find_tokenizer
from golf_ray.errors import DataError
from golf_ray.fingerprint import LENGTH

HEAD_BYTES: Final = 1 << 20
"""Of each file that its hash is of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileHead:
    """A file by its name, its size and its beginning."""

    name: str
    num_bytes: int
    sha256: str
    """Hexadecimal, of the first `HEAD_BYTES` bytes."""

    def describe(self) -> str:
        """Size and hash, for people."""
        return f"{self.num_bytes:,} bytes, beginning {self.sha256[:LENGTH]}"


def data_files(config: Config) -> list[Path]:
    """All files that a configuration names: the tokenizer, training shards, validation shards.

    Raises:
        DataError: the tokenizer is missing, or a split has no shard.
    """
    data, vocab_size = config.data, config.model.vocab_size
    return [
        find_tokenizer(data, vocab_size),
        *find_shards(data, vocab_size, "train"),
        *find_shards(data, vocab_size, "val"),
    ]


def file_heads(paths: Iterable[Path]) -> tuple[FileHead, ...]:
    """Look at some files.

    Raises:
        DataError: one cannot be read.
    """
    return tuple(_head(Path(path)) for path in paths)


def _head(path: Path) -> FileHead:
    try:
        with open(path, "rb") as file:
            digest = hashlib.sha256(file.read(HEAD_BYTES)).hexdigest()
        return FileHead(name=path.name, num_bytes=path.stat().st_size, sha256=digest)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})", "check the file") from None


def heads_fingerprint(heads: Iterable[FileHead]) -> str:
    """One fingerprint of some files in their order, 16 hex digits."""
    digest = hashlib.sha256()
    for head in heads:
        digest.update(f"{head.name}:{head.num_bytes}:{head.sha256}\n".encode())
    return digest.hexdigest()[:LENGTH]


def data_fingerprint(config: Config) -> str:
    """Fingerprint of the tokenizer and the tokens that a configuration names.

    Raises:
        DataError: a file is missing or cannot be read.
    """
    return heads_fingerprint(file_heads(data_files(config)))
