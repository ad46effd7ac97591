"""Shards: what is written is read back, and no wrong file gets through."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from golf_ray.config import DataConfig
from golf_ray.data import shards
from golf_ray.data.shards import find_shards, load_tokens, open_shard, read_count, write_shard
from golf_ray.errors import DataError, StorageError

TINY = Path(__file__).parent / "data" / "tiny"


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text and text == text.strip() and text
    return text


def write_header(path: Path, magic: int, version: int, count: int, body_bytes: int) -> Path:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, count
    path.write_bytes(header.tobytes() + bytes(body_bytes))
    return path


def test_round_trip_and_published_layout(tmp_path: Path) -> None:
    path = tmp_path / "fineweb_train_000000.bin"
    ids = np.array([1, 7, 65535, 0, 300], dtype=np.int64)
    write_shard(path, ids)
    raw = path.read_bytes()
    assert len(raw) == 1024 + 2 * 5
    assert np.frombuffer(raw[:1024], "<i4")[:4].tolist() == [20240520, 1, 5, 0]
    assert np.frombuffer(raw[1024:], "<u2").tolist() == ids.tolist()
    tokens = open_shard(path)
    assert tokens.dtype == np.uint16 and tokens.tolist() == ids.tolist()
    assert os.listdir(tmp_path) == [path.name]


def test_empty_shard_opens_but_no_tokens_at_all_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "fineweb_val_000000.bin"
    write_shard(path, [])
    assert open_shard(path, 512).shape == (0,)
    with pytest.raises(DataError, match="not one token") as caught:
        load_tokens([path], 512)
    assert str(path) in one_line(caught.value)


def test_tiny_shards_are_found_and_read() -> None:
    data = DataConfig(dir=str(TINY))
    train = find_shards(data, 512, "train")
    val = find_shards(data, 512, "val")
    assert [p.name for p in train] == ["fineweb_train_000000.bin", "fineweb_train_000001.bin"]
    assert [p.name for p in val] == ["fineweb_val_000000.bin"]
    tokens = load_tokens(train, 512)
    assert len(tokens) == sum(read_count(p) for p in train) == (81124 + 59162 - 2048) // 2
    assert isinstance(load_tokens(val, 512), np.memmap)


def test_shards_are_ordered_by_number(tmp_path: Path) -> None:
    folder = tmp_path / "datasets" / "mine"
    for index in (2, 10, 1_000_000, 0):
        write_shard(folder / shards.shard_name("train", index), [1])
    (folder / "fineweb_train_000003.bin.tmp").write_bytes(b"")
    found = find_shards(DataConfig(dir=str(tmp_path), dataset="mine"), 512, "train")
    assert [shards.parse_shard_name(p.name) for p in found] == [
        ("train", i) for i in (0, 2, 10, 1_000_000)
    ]


@pytest.mark.parametrize("make_folder", [True, False])
def test_no_shard_says_where_it_looked_and_what_to_type(tmp_path: Path, make_folder: bool) -> None:
    if make_folder:
        (tmp_path / "datasets" / "fineweb10B_sp512").mkdir(parents=True)
    with pytest.raises(DataError) as caught:
        find_shards(DataConfig(dir=str(tmp_path)), 512, "val")
    text = one_line(caught.value)
    assert "fineweb_val_*.bin" in text and str(tmp_path / "datasets") in text
    assert "golf-ray data build" in text and "golf-ray data fetch" in text


@pytest.mark.parametrize(
    ("magic", "version", "count", "body_bytes", "told"),
    [
        (20240521, 1, 4, 8, "starts with 20240521"),
        (20240520, 2, 4, 8, "version 2"),
        (20240520, 1, 4, 7, "1031 bytes"),
        (20240520, 1, 4, 6, "1030 bytes"),
        (20240520, 1, 4, 10, "1034 bytes"),
        (20240520, 1, -4, 0, "-4 tokens"),
    ],
)
def test_wrong_shards_are_named(
    tmp_path: Path, magic: int, version: int, count: int, body_bytes: int, told: str
) -> None:
    path = write_header(tmp_path / "s.bin", magic, version, count, body_bytes)
    with pytest.raises(DataError) as caught:
        open_shard(path)
    assert told in one_line(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("size", [0, 1, 1023])
def test_a_file_shorter_than_its_header(tmp_path: Path, size: int) -> None:
    path = tmp_path / "s.bin"
    path.write_bytes(bytes(size))
    with pytest.raises(DataError, match=f"has {size} bytes"):
        open_shard(path)


def test_missing_shard_and_folder_for_shard(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.bin", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            open_shard(path)


def test_ids_beyond_the_vocabulary_are_found_in_every_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "CHECK_TOKENS", 10)
    for position in (0, 9, 10, 24):
        ids = np.full(25, 3)
        ids[position] = 512
        write_shard(tmp_path / "s.bin", ids)
        with pytest.raises(DataError) as caught:
            open_shard(tmp_path / "s.bin", 512)
        text = one_line(caught.value)
        assert "token id 512" in text and f"position {position}," in text
        assert open_shard(tmp_path / "s.bin", 513)[position] == 512


def test_unwritable_folder_and_ids_of_more_than_16_bits(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError) as caught:
        write_shard(tmp_path / "file" / "s.bin", [1])
    one_line(caught.value)
    for wrong in (-1, 65536):
        with pytest.raises(DataError, match=str(wrong)):
            write_shard(tmp_path / "s.bin", [1, wrong])
    assert not (tmp_path / "s.bin").exists()
    assert sorted(os.listdir(tmp_path)) == ["file"]


def test_load_tokens_concatenates(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", [1, 2])
    write_shard(tmp_path / "b.bin", [])
    write_shard(tmp_path / "c.bin", [3])
    paths = [tmp_path / f"{c}.bin" for c in "abc"]
    assert load_tokens(paths, 4).tolist() == [1, 2, 3]
