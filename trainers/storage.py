"""A folder on any file system: this machine's, a shared mount, or an object store by its URI.

A thin layer over pyarrow's file systems (and fsspec's for what pyarrow does not know), with the
same promise as `golf_ray.records`: a file is written whole or not at all.

A URI may end in a query, such as `s3://bucket/run?endpoint_override=host:9000&scheme=http`: it
belongs to the file system and stays with everything below.

Invariant: errors of the file system come out as one-line `StorageError`s that name the place, and
never a key that a URI carries.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from golf_ray.errors import StorageError
from golf_ray.records import (
    append_jsonl,
    atomic_path,
    atomic_write_bytes,
    reading_error,
    storage_error,
)

FLUSH_S = 5.0
"""Object stores cannot append: a growing file is written again at most this often."""

_COPY_BYTES = 1 << 22
_USER = re.compile(r"^([a-z0-9+.-]+://)[^/@]*@", re.IGNORECASE)


class Storage:
    """A folder by path or URI.

    Args:
        uri: a path (made absolute) or a URI such as `s3://bucket/folder`.

    Raises:
        StorageError: no such file system is known, or its driver is not installed.
    """

    def __init__(self, uri: str | Path, *, _on: Storage | None = None) -> None:
        text = str(uri)
        if "://" not in text:
            text = str(Path(text).expanduser().absolute())
        base, query = split_uri(text)
        self._base = base.rstrip("/") or "/"
        self._query = query
        self.uri = self._base + query
        # Resolving an object store anew would ask it over the network.
        self.filesystem, path = _resolve(self.uri) if _on is None else _on._below(self._base)
        self.path: str = path.rstrip("/") or "/"

    def _below(self, base: str) -> tuple[pafs.FileSystem, str]:
        return self.filesystem, self.path + base.removeprefix(self._base)

    @property
    def local(self) -> Path | None:
        """The folder as a path, where the file system is this machine's (or mounted)."""
        return Path(self.path) if isinstance(self.filesystem, pafs.LocalFileSystem) else None

    @property
    def name(self) -> str:
        """The folder's own name, the last part of its path."""
        return self._base.rpartition("/")[2]

    def child(self, name: str) -> Storage:
        """A folder below."""
        return Storage(self.uri_of(name), _on=self)

    def place(self, name: str) -> str:
        """A file's path as the file system has it."""
        return f"{self.path}/{name}"

    def exists(self, name: str) -> bool:
        """Whether a file or folder is there."""
        with self._named(name, reading=True):
            return bool(self.filesystem.get_file_info(self.place(name)).type)

    def names(self, prefix: str = "") -> list[str]:
        """Names of what the folder holds, in order; none where there is no folder."""
        with self._named("", reading=True):
            selector = pafs.FileSelector(self.path, allow_not_found=True)
            found = [info.base_name for info in self.filesystem.get_file_info(selector)]
        return sorted(name for name in found if name.startswith(prefix))

    def read_bytes(self, name: str) -> bytes | None:
        """A file's content; None where there is none."""
        with self._named(name, reading=True):
            try:
                with self.filesystem.open_input_stream(self.place(name)) as stream:
                    return bytes(stream.read())
            except FileNotFoundError:
                return None

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a whole file or nothing."""
        if self.local is not None:
            atomic_write_bytes(self.local / name, data)
            return
        with self._named(name):
            self.filesystem.create_dir(self.path, recursive=True)
            # An object appears when its stream is closed, and not if a write or that fails.
            with self.filesystem.open_output_stream(self.place(name)) as stream:
                stream.write(data)

    def write_file(self, name: str, source: Path) -> None:
        """Copy a file of this machine here; it appears whole."""
        with self._named(name), open(source, "rb") as file:
            if self.local is not None:
                with atomic_path(self.local / name) as temporary, open(temporary, "wb") as into:
                    shutil.copyfileobj(file, into, _COPY_BYTES)
                return
            self.filesystem.create_dir(self.path, recursive=True)
            try:
                with self.filesystem.open_output_stream(self.place(name)) as stream:
                    shutil.copyfileobj(file, stream, _COPY_BYTES)
            except BaseException:
                # A stream is closed in any case, and with that half an object may appear.
                with contextlib.suppress(OSError):
                    self.filesystem.delete_file(self.place(name))
                raise

    def copy(self, source: str, target: str) -> None:
        """Copy a file within the folder; it appears whole."""
        if self.local is not None:
            source_path, target_path = self.local / source, self.local / target
            temporary = target_path.with_name(f".{target_path.name}.{os.getpid()}.tmp")
            with self._named(target):
                # Weights take no second place on the disk where links are possible.
                try:
                    os.link(source_path, temporary)
                except OSError:
                    shutil.copyfile(source_path, temporary)
                os.replace(temporary, target_path)
            return
        with self._named(target):
            self.filesystem.copy_file(self.place(source), self.place(target))

    def remove(self, name: str) -> None:
        """Remove a file or folder, which need not be there."""
        with self._named(name):
            info = self.filesystem.get_file_info(self.place(name))
            if info.type == pafs.FileType.Directory:
                self.filesystem.delete_dir(self.place(name))
            elif info.type == pafs.FileType.File:
                self.filesystem.delete_file(self.place(name))

    def uri_of(self, name: str) -> str:
        """What to call a file or folder below, to people and to other programs."""
        return f"{self._base}/{name}{self._query}"

    @contextlib.contextmanager
    def _named(self, name: str, *, reading: bool = False) -> Iterator[None]:
        """Turn errors of the file system into one line about `name`."""
        where = shown(self.uri_of(name) if name else self.uri)
        try:
            yield
        except OSError as error:
            if self.local is not None and error.errno is not None:
                say = reading_error if reading else storage_error
                raise say(Path(where), error) from None
            remedy = "check the path, the credentials and the network"
            raise StorageError(f"{where} cannot be used ({_line(error)})", remedy) from None
        except (pa.ArrowException, ValueError) as error:
            raise StorageError(f"{where} cannot be used ({_line(error)})", "check it") from None


class LineFile:
    """A file of JSON lines that one process appends to and others may read meanwhile.

    Args:
        storage: the folder.
        name: of the file; what it holds already is kept.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage = storage
        self._name = name
        self._dirty_since_s: float | None = None
        data = storage.read_bytes(name) or b""
        self.values: list[Any] = parse_lines(data)

    def append(self, value: Any) -> None:
        """Add a line: on disk at once, in an object store soon."""
        self.values.append(value)
        if self._storage.local is not None:
            append_jsonl(self._storage.local / self._name, value)
        else:
            self._dirty_since_s = self._dirty_since_s or time.monotonic()

    def replace(self, values: list[Any]) -> None:
        """Put other lines in the place of all."""
        if values == self.values:
            return
        self.values = list(values)
        self._write()

    def flush(self, *, now: bool = False) -> None:
        """Write what is due; call it often."""
        since = self._dirty_since_s
        if since is not None and (now or time.monotonic() - since >= FLUSH_S):
            self._write()

    def _write(self) -> None:
        text = "".join(json.dumps(value) + "\n" for value in self.values)
        self._storage.write_bytes(self._name, text.encode())
        self._dirty_since_s = None


def parse_lines(data: bytes) -> list[Any]:
    """All whole lines of a line file; a torn last one is left out."""
    values = []
    for line in data.split(b"\n"):
        with contextlib.suppress(json.JSONDecodeError):
            values.append(json.loads(line))
    return values


def shown(uri: str) -> str:
    """A path or URI as people may see it: without keys and without the file system's options."""
    base, _ = split_uri(uri)
    return _USER.sub(r"\1", base)


def split_uri(uri: str) -> tuple[str, str]:
    """A URI before its query, and the query with its question mark; a path has none."""
    base, mark, query = uri.partition("?") if "://" in uri else (uri, "", "")
    return base, mark + query


def _resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    try:
        if "://" not in uri:
            return pafs.LocalFileSystem(), uri
        return pafs.FileSystem.from_uri(uri)
    except (pa.ArrowException, OSError, ValueError) as error:
        # A query is a language of pyarrow's own.
        known = None if split_uri(uri)[1] else _from_fsspec(uri)
        if known is not None:
            return known
        raise StorageError(
            f"{shown(uri)} is no storage that can be used ({_line(error)})",
            "give a path or a URI such as s3://bucket/folder",
        ) from None


def _from_fsspec(uri: str) -> tuple[pafs.FileSystem, str] | None:
    from fsspec.core import url_to_fs

    try:
        filesystem, path = url_to_fs(uri)
    except (ValueError, ImportError, OSError):
        return None
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
