"""Folders on any file system: whole files, growing files, one-line errors."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from golf_ray.errors import StorageError
from golf_ray.records import read_jsonl
from trainers.storage import LineFile, Storage


@pytest.fixture(params=["local", "file", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """An empty folder: a path, a URI of this disk, and a store that is no disk."""
    if request.param == "local":
        yield Storage(tmp_path / "run")
    elif request.param == "file":
        yield Storage(f"file://{tmp_path}/run")
    else:
        name = uuid.uuid4().hex
        yield Storage(f"memory://{name}/run")
        fsspec.filesystem("memory").rm(f"/{name}", recursive=True)


def test_files_are_written_read_copied_and_removed(storage: Storage, tmp_path: Path) -> None:
    assert storage.names() == [] and storage.read_bytes("a") is None
    storage.write_bytes("a", b"one")
    storage.write_bytes("a", b"two")
    assert storage.read_bytes("a") == b"two"
    inner = storage.child("inner")
    (tmp_path / "source").write_bytes(b"x" * 10_000)
    inner.write_file("big", tmp_path / "source")
    assert inner.read_bytes("big") == b"x" * 10_000
    storage.copy("inner/big", "big")
    storage.copy("a", "big")
    assert storage.read_bytes("big") == b"two"
    assert storage.names() == ["a", "big", "inner"] and storage.names("i") == ["inner"]
    assert storage.exists("inner/big") and not storage.exists("inner/small")
    storage.remove("inner")
    storage.remove("big")
    storage.remove("never there")
    assert storage.names() == ["a"]
    assert storage.uri_of("a").endswith("/run/a")


def test_lines_grow_and_can_be_replaced(storage: Storage) -> None:
    lines = LineFile(storage, "lines.jsonl")
    lines.append({"step": 1})
    lines.append({"step": 2})
    lines.flush(now=True)
    assert LineFile(storage, "lines.jsonl").values == [{"step": 1}, {"step": 2}]
    lines.replace([{"step": 1}])
    lines.append({"step": 3})
    lines.flush(now=True)
    assert LineFile(storage, "lines.jsonl").values == [{"step": 1}, {"step": 3}]


def test_lines_on_a_disk_are_there_at_once(tmp_path: Path) -> None:
    lines = LineFile(Storage(tmp_path), "lines.jsonl")
    lines.append({"step": 1})
    assert read_jsonl(tmp_path / "lines.jsonl") == [{"step": 1}]
    with open(tmp_path / "lines.jsonl", "ab") as file:
        file.write(b'{"step": 2')
    assert LineFile(Storage(tmp_path), "lines.jsonl").values == [{"step": 1}], "a torn last line"


def test_a_relative_path_becomes_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    storage = Storage("runs/first/")
    assert storage.uri == str(tmp_path / "runs/first") and storage.local == tmp_path / "runs/first"


def test_an_unknown_storage_is_one_line() -> None:
    with pytest.raises(StorageError) as caught:
        Storage("nosuch://bucket/run")
    assert "nosuch://bucket/run" in str(caught.value) and "\n" not in str(caught.value)


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    storage = Storage(tmp_path / "file" / "run")
    with pytest.raises(StorageError, match="a part of its path is a file"):
        storage.write_bytes("a", b"")
