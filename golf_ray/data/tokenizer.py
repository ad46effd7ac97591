"""The SentencePiece model of a data set, and how many bytes of text each token stands for.

Bits per byte divides by the bytes that the scored tokens spell. This module counts them from the
tokenizer alone; it does not tokenise text (`golf_ray.data.build` does).

Invariant: for the tokens of a document after its BOS, the counts add up to the UTF-8 length of the
document's normalised text.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from golf_ray.config import DataConfig
from golf_ray.errors import DataError

SPACE: Final = "\N{LOWER ONE EIGHTH BLOCK}"
"""What SentencePiece writes for a space at the start of a piece."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ByteTables:
    """What each token id adds to the number of bytes."""

    base_bytes: NDArray[np.int16]
    """[V] bytes of the piece without its leading space."""
    has_leading_space: NDArray[np.bool_]
    """[V] the piece begins with a space, one byte more unless a boundary token comes before."""
    is_boundary: NDArray[np.bool_]
    """[V] control, unknown and unused tokens: no text, and the text begins anew after them."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids V."""
        return len(self.base_bytes)

    def count(
        self, previous: NDArray[np.integer], current: NDArray[np.integer]
    ) -> NDArray[np.int64]:
        """Bytes of each token given the token before it.

        Args:
            previous: ids, any shape.
            current: ids of the same shape.

        Returns:
            int64 of that shape.
        """
        space = self.has_leading_space[current] & ~self.is_boundary[previous]
        num_bytes: NDArray[np.int64] = self.base_bytes[current].astype(np.int64) + space
        return num_bytes


def tokenizer_name(vocab_size: int) -> str:
    """File name of the published tokenizer for one vocabulary size."""
    return f"fineweb_{vocab_size}_bpe.model"


def tokenizer_path(data: DataConfig, vocab_size: int) -> Path:
    """Where the tokenizer of one vocabulary size belongs."""
    return Path(data.dir) / "tokenizers" / (data.tokenizer or tokenizer_name(vocab_size))


def find_tokenizer(data: DataConfig, vocab_size: int) -> Path:
    """The tokenizer's file.

    Raises:
        DataError: there is none.
    """
    path = tokenizer_path(data, vocab_size)
    if not path.is_file():
        raise DataError(
            f"no tokenizer {path}",
            "make it with 'golf-ray data build' or 'golf-ray data fetch', or set data.tokenizer",
        )
    return path


def load_tokenizer(path: Path, vocab_size: int | None = None) -> Any:
    """Read a SentencePiece model.

    Args:
        vocab_size: where given, the model must have exactly so many pieces.

    Returns:
        A `sentencepiece.SentencePieceProcessor`.

    Raises:
        DataError: the file is missing or no SentencePiece model, or has another vocabulary.
    """
    import sentencepiece

    path = Path(path)
    try:
        proto = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"tokenizer {path} cannot be read ({error.strerror})", "check the file"
        ) from None
    broken = DataError(f"tokenizer {path} is no SentencePiece model", "build or fetch it again")
    if not proto:
        raise broken
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(proto)
        pieces = int(processor.vocab_size())
    except (RuntimeError, OSError):
        raise broken from None
    if pieces == 0:
        raise broken
    if vocab_size is not None and pieces != vocab_size:
        raise DataError(
            f"tokenizer {path} has {pieces} pieces, but model.vocab_size is {vocab_size}",
            "use the tokenizer that the shards were made with",
        )
    return processor


def byte_tables(model_path: Path, vocab_size: int) -> ByteTables:
    """The byte tables of a tokenizer.

    A byte piece is one byte. Control, unknown and unused pieces are none. Any other is the UTF-8
    length of the piece without a leading space.

    Raises:
        DataError: the file is missing or no SentencePiece model, or has another vocabulary.
    """
    processor = load_tokenizer(model_path, vocab_size)
    base_bytes = np.zeros(vocab_size, dtype=np.int16)
    has_leading_space = np.zeros(vocab_size, dtype=np.bool_)
    is_boundary = np.zeros(vocab_size, dtype=np.bool_)
    for token in range(vocab_size):
        if processor.IsControl(token) or processor.IsUnknown(token) or processor.IsUnused(token):
            is_boundary[token] = True
        elif processor.IsByte(token):
            base_bytes[token] = 1
        else:
            piece = processor.IdToPiece(token)
            has_leading_space[token] = piece.startswith(SPACE)
            base_bytes[token] = len(piece.removeprefix(SPACE).encode())
    return ByteTables(
        base_bytes=base_bytes, has_leading_space=has_leading_space, is_boundary=is_boundary
    )
