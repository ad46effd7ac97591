"""Byte tables: equal to the stored ones, and the bytes of a text add up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from golf_ray.config import DataConfig
from golf_ray.data.tokenizer import byte_tables, find_tokenizer, load_tokenizer
from golf_ray.errors import DataError

TINY = Path(__file__).parent / "data" / "tiny"
MODEL = TINY / "tokenizers" / "fineweb_512_bpe.model"


def test_tables_equal_the_stored_ones() -> None:
    tables = byte_tables(find_tokenizer(DataConfig(dir=str(TINY)), 512), 512)
    stored = np.load(TINY / "forward.npz")
    for name in ("base_bytes", "has_leading_space", "is_boundary"):
        mine = getattr(tables, name)
        assert mine.dtype == stored[name].dtype
        np.testing.assert_array_equal(mine, stored[name])
    assert tables.vocab_size == 512


@pytest.mark.parametrize(
    "text", ["the cat sat", " leading space", "one  two", "naïve €uro 漢字 🙂", "tab\tand 12345"]
)
def test_counts_add_up_to_the_bytes_of_the_text(text: str) -> None:
    processor = load_tokenizer(MODEL, 512)
    ids = np.array([1, *processor.encode(text)])
    tables = byte_tables(MODEL, 512)
    counted = tables.count(ids[:-1], ids[1:])
    assert counted.dtype == np.int64
    decoded = processor.decode(ids[1:].tolist())
    # A space right after BOS is not text: the piece before it ends with no word.
    assert int(counted.sum()) == len(decoded.lstrip(" ").encode())


def test_space_counts_unless_a_boundary_comes_before() -> None:
    tables = byte_tables(MODEL, 512)
    spaced = int(np.flatnonzero(tables.has_leading_space)[3])
    ordinary = int(np.flatnonzero(~tables.is_boundary)[5])
    base = int(tables.base_bytes[spaced])
    counts = tables.count(np.array([1, ordinary, 0, 2, 3]), np.full(5, spaced))
    assert counts.tolist() == [base, base + 1, base, base, base]
    assert tables.count(np.array([[ordinary]]), np.array([[1]])).tolist() == [[0]]


def test_tokenizer_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        byte_tables(MODEL, 1024)
    text = str(caught.value)
    assert str(MODEL) in text and "512" in text and "1024" in text and "\n" not in text


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 4096, None])
def test_corrupt_tokenizers_are_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "t.model"
    path.write_bytes(MODEL.read_bytes()[:5000] if content is None else content)
    with pytest.raises(DataError, match="no SentencePiece model") as caught:
        byte_tables(path, 512)
    assert "\n" not in str(caught.value)


def test_missing_tokenizer_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="golf-ray data build"):
        find_tokenizer(DataConfig(dir=str(tmp_path)), 512)
    with pytest.raises(DataError, match="cannot be read"):
        byte_tables(tmp_path / "absent.model", 512)


def test_configured_name_is_used(tmp_path: Path) -> None:
    (tmp_path / "tokenizers").mkdir()
    target = tmp_path / "tokenizers" / "mine.model"
    target.write_bytes(MODEL.read_bytes())
    found = find_tokenizer(DataConfig(dir=str(tmp_path), tokenizer="mine.model"), 512)
    assert found == target
    assert isinstance(load_tokenizer(found), sentencepiece.SentencePieceProcessor)
