"""Token shards: `fineweb_{train,val}_NNNNNN.bin`, found, checked, memory-mapped and written.

A shard is 256 little-endian int32 (magic, version, token count, zeros) and then that many
little-endian uint16 token ids. This module knows nothing of documents or batches.

Invariant: an array that `open_shard` returns came from a file whose header and size agree, and,
where a vocabulary size was given, holds no id outside of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from golf_ray.config import DataConfig
from golf_ray.errors import DataError
from golf_ray.records import atomic_path

Tokens = NDArray[np.uint16]
Split = Literal["train", "val"]

MAGIC: Final = 20240520
VERSION: Final = 1
HEADER_BYTES: Final = 1024
TOKEN_BYTES: Final = 2
BOS_ID: Final = 1
"""The id that every document starts with; there is none at its end."""
MAX_VOCAB_SIZE: Final = 2**16

CHECK_TOKENS: Final = 4_000_000
"""Ids looked at in one go, which bounds the memory that a check takes."""

_SHARD_NAME = re.compile(r"fineweb_(train|val)_(\d{6,})\.bin")
_TOKEN_DTYPE = np.dtype("<u2")
_AGAIN = "build or fetch it again"


def dataset_name(vocab_size: int) -> str:
    """Name of the published data set's folder for one vocabulary size."""
    return f"fineweb10B_sp{vocab_size}"


def dataset_dir(data: DataConfig, vocab_size: int) -> Path:
    """The folder that holds the shards of one vocabulary size."""
    return Path(data.dir) / "datasets" / (data.dataset or dataset_name(vocab_size))


def shard_name(split: Split, index: int) -> str:
    """File name of shard `index` of a split."""
    return f"fineweb_{split}_{index:06d}.bin"


def parse_shard_name(name: str) -> tuple[Split, int] | None:
    """Split and index of a shard's file name, or None for any other name."""
    match = _SHARD_NAME.fullmatch(name)
    if match is None:
        return None
    return ("train" if match[1] == "train" else "val"), int(match[2])


def find_shards(data: DataConfig, vocab_size: int, split: Split) -> list[Path]:
    """The shard files of a split in the order of their numbers.

    Raises:
        DataError: there is none.
    """
    folder = dataset_dir(data, vocab_size)
    try:
        names = [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        names = []
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror})", "check the folder") from None
    numbered = [(found, name) for name in names if (found := parse_shard_name(name))]
    shards = [folder / name for found, name in sorted(numbered) if found[0] == split]
    if not shards:
        raise DataError(
            f"no file fineweb_{split}_*.bin in {folder}",
            "make it with 'golf-ray data build' or 'golf-ray data fetch', or give --data-dir",
        )
    return shards


def read_count(path: Path) -> int:
    """Number of tokens in a shard, by its header, checked against the file's size.

    Raises:
        DataError: the file is no shard, of another version, truncated or too long.
    """
    try:
        size_bytes = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(HEADER_BYTES)
    except OSError as error:
        raise DataError(
            f"shard {path} cannot be read ({error.strerror})", "check the file"
        ) from None
    if len(head) < HEADER_BYTES:
        raise DataError(
            f"shard {path} has {size_bytes} bytes, fewer than its header of {HEADER_BYTES}", _AGAIN
        )
    magic, version, count = (int(v) for v in np.frombuffer(head, dtype="<i4", count=3))
    if magic != MAGIC:
        raise DataError(
            f"shard {path} starts with {magic}, not {MAGIC}: it is no token shard", _AGAIN
        )
    if version != VERSION:
        raise DataError(
            f"shard {path} is of version {version}",
            f"only version {VERSION} can be read; build or fetch it again",
        )
    expected_bytes = HEADER_BYTES + TOKEN_BYTES * count
    if count < 0 or size_bytes != expected_bytes:
        raise DataError(
            f"shard {path} has {size_bytes} bytes, its header's {count} tokens need "
            f"{expected_bytes}",
            _AGAIN,
        )
    return count


def open_shard(path: Path, vocab_size: int | None = None) -> Tokens:
    """Map a shard's token ids into memory, read-only.

    Args:
        vocab_size: where given, every id is read once and checked to be below it.

    Returns:
        uint16 [count].

    Raises:
        DataError: the header, the size or an id is wrong.
    """
    path = Path(path)
    count = read_count(path)
    if count == 0:
        return np.zeros(0, dtype=np.uint16)
    tokens = np.memmap(path, dtype=_TOKEN_DTYPE, mode="r", offset=HEADER_BYTES, shape=(count,))
    if vocab_size is not None:
        check_ids(tokens, vocab_size, f"shard {path}")
    return tokens


def check_ids(tokens: Tokens, vocab_size: int, where: str, offset: int = 0) -> None:
    """See that every id is below the vocabulary size.

    Args:
        where: what the tokens are of, for the message.
        offset: position of the first of them in it.

    Raises:
        DataError: one is not; its value and position are named.
    """
    for start in range(0, len(tokens), CHECK_TOKENS):
        chunk = tokens[start : start + CHECK_TOKENS]
        if int(chunk.max()) >= vocab_size:
            found = int(np.argmax(chunk >= vocab_size))
            position = offset + start + found
            raise DataError(
                f"{where} holds token id {int(chunk[found])} at position {position}, "
                f"but the vocabulary size is {vocab_size}",
                "use the shards and model.vocab_size of one tokenizer",
            )


def write_shard(path: Path, tokens: NDArray[np.integer] | Sequence[int]) -> None:
    """Write a shard, whole or not at all.

    Args:
        tokens: [count] ids from 0 to 65,535.

    Raises:
        DataError: an id does not fit into 16 bits.
        StorageError: the file cannot be written.
    """
    with atomic_path(Path(path)) as temporary:
        write_raw_shard(temporary, tokens)


def write_raw_shard(path: Path, tokens: NDArray[np.integer] | Sequence[int]) -> None:
    """`write_shard` into a file that nobody reads yet: neither atomic nor forced to disk."""
    ids = np.asarray(tokens)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise DataError(f"a shard takes a list of token ids, not {ids.dtype} {ids.shape}")
    if ids.size and ids.dtype != _TOKEN_DTYPE and (ids.min() < 0 or ids.max() >= MAX_VOCAB_SIZE):
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise DataError(f"token id {wrong} does not fit into 16 bits", "use a smaller vocabulary")
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, ids.size
    with open(path, "wb") as file:
        file.write(header.tobytes())
        for start in range(0, ids.size, CHECK_TOKENS):
            file.write(ids[start : start + CHECK_TOKENS].astype(_TOKEN_DTYPE).tobytes())


def load_tokens(paths: Iterable[Path], vocab_size: int | None = None) -> Tokens:
    """All tokens of some shards as one array; a single shard stays mapped from its file.

    Returns:
        uint16 [sum of the counts].

    Raises:
        DataError: a shard is wrong, or they hold no token at all.
    """
    shards = [(path, open_shard(path, vocab_size)) for path in paths]
    parts = [tokens for _, tokens in shards if len(tokens)]
    if not parts:
        names = ", ".join(str(path) for path, _ in shards) or "no shard"
        raise DataError(f"there is not one token in {names}", _AGAIN)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
