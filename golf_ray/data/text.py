"""Documents of text out of files and folders: plain text, JSON lines, Parquet.

A text file is one document; a line of a `.jsonl` file and a row of a `.parquet` file are one each.
A folder is walked in the order of its names, hidden entries left out, links to folders not
followed. What is no text (binary, not UTF-8, empty) is skipped with a reason, never silently.
Tokenising is the work of `golf_ray.data.build`.

Invariant: the documents and their order follow from the files' names and contents alone.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from golf_ray.errors import DataError, nearest

MAX_DOCUMENT_BYTES: Final = 64_000_000
"""A text file is held and tokenised in one piece, so one beyond this is an error."""

_PARQUET_ROWS: Final = 1024


class TextItem(NamedTuple):
    """A document, or the reason why something is none."""

    text: str | None
    skipped: str = ""


def read_source(
    source: Path, text_column: str, leave_out: Iterable[Path] = ()
) -> Iterator[TextItem]:
    """All documents of one file or folder, one after the other.

    Args:
        text_column: the field or column of JSON lines and Parquet files that holds the text.
        leave_out: folders that are not entered.

    Raises:
        DataError: the source is absent, a file cannot be parsed, or the column is not in it.
    """
    if source.is_dir():
        hidden_folders = {path.resolve() for path in leave_out}
        for path in _walk(source, hidden_folders):
            yield from _read_file(path, text_column)
    elif source.exists():
        yield from _read_file(source, text_column)
    else:
        raise DataError(f"no file or folder {source}", "give an existing file or folder of text")


def _walk(folder: Path, leave_out: set[Path]) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise DataError(
            f"folder {error.filename} cannot be read ({error.strerror})", "check the folder"
        ) from None

    for parent, folders, files in os.walk(folder, onerror=fail):
        here = Path(parent)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and (here / name).resolve() not in leave_out
        )
        yield from (here / name for name in sorted(files) if not name.startswith("."))


def _read_file(path: Path, text_column: str) -> Iterator[TextItem]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            # Opening a pipe or a device would wait for ever.
            yield TextItem(None, "not a file")
        elif path.suffix == ".jsonl":
            yield from _read_jsonl(path, text_column)
        elif path.suffix == ".parquet":
            yield from _read_parquet(path, text_column)
        else:
            yield _read_text(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})", "check the file") from None


def _read_text(path: Path) -> TextItem:
    size_bytes = path.stat().st_size
    with open(path, "rb") as file:
        if b"\0" in file.read(8192):
            return TextItem(None, "binary")
        if size_bytes > MAX_DOCUMENT_BYTES:
            raise DataError(
                f"{path} is one document of {size_bytes} bytes, more than {MAX_DOCUMENT_BYTES}",
                "cut it into files, or give its documents as lines of a .jsonl file",
            )
        file.seek(0)
        content = file.read()
    try:
        return checked_text(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return TextItem(None, "not UTF-8")


def checked_text(text: str) -> TextItem:
    """The text as a document, or why it is none."""
    if "\0" in text:
        return TextItem(None, "binary")
    if not text.strip():
        return TextItem(None, "empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        # JSON can spell half of a surrogate pair, which no UTF-8 text holds.
        return TextItem(None, "not UTF-8")
    return TextItem(text)


def _read_jsonl(path: Path, text_column: str) -> Iterator[TextItem]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                raise DataError(
                    f"{path} line {number} is not JSON", "give one JSON object a line"
                ) from None
            if not isinstance(row, dict):
                raise DataError(f"{path} line {number} is no JSON object",
                                "give one JSON object a line")  # fmt: skip
            if text_column not in row:
                raise _no_column(f"{path} line {number} has no field", text_column, row)
            yield _cell(row[text_column], f"{path} line {number}", text_column)


def _read_parquet(path: Path, text_column: str) -> Iterator[TextItem]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path} needs pyarrow to be read", "pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if text_column not in names:
                raise _no_column(f"{path} has no column", text_column, names)
            for batch in file.iter_batches(_PARQUET_ROWS, columns=[text_column]):
                for value in batch.column(0).to_pylist():
                    yield _cell(value, str(path), text_column)
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} is no Parquet file ({reason})", "check the file") from None


def _cell(value: Any, where: str, text_column: str) -> TextItem:
    if value is None:
        return TextItem(None, "empty")
    if not isinstance(value, str):
        raise DataError(
            f"{where}: '{text_column}' holds {type(value).__name__}, not text",
            "name the column that holds the text",
        )
    return checked_text(value)


def _no_column(where: str, text_column: str, known: Iterable[str]) -> DataError:
    return DataError(f"{where} '{text_column}'", nearest(text_column, known))
