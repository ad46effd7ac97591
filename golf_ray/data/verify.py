"""Checking a whole data set: files, ids, tokenizer, manifest, and training apart from validation.

Reads every token once, in pieces. Documents run across the borders of shards, so they are hashed
over the whole token stream of a split, 8 bytes each. What is wrong is collected, not raised.

Invariant: a data set without problems can be trained and scored on, and no validation document
is a training document.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from golf_ray.config import DataConfig
from golf_ray.data.manifest import file_sha256, read_manifest
from golf_ray.data.shards import (
    BOS_ID,
    CHECK_TOKENS,
    HEADER_BYTES,
    TOKEN_BYTES,
    Split,
    Tokens,
    check_ids,
    dataset_dir,
    find_shards,
    open_shard,
    parse_shard_name,
)
from golf_ray.data.tokenizer import find_tokenizer, load_tokenizer
from golf_ray.errors import DataError

Progress = Callable[[str, int, int], None]
"""Called with "verify", bytes read and bytes in all."""

MAX_NAMED: Final = 20
"""So many documents that are on both sides are named; the others are counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitReport:
    """What was found on one side."""

    shards: int
    tokens: int
    documents: int
    repeated_documents: int
    """Documents that an earlier one of the same side equals; no problem in themselves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What was found in a data set."""

    dataset_dir: Path
    train: SplitReport
    val: SplitReport
    has_manifest: bool
    shared_documents: int
    """Validation documents that are training documents too."""
    problems: tuple[str, ...]
    """One line each; none where all is well."""

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems


class _DocumentHashes:
    """Hashes of the documents of one token stream that comes in pieces."""

    def __init__(self) -> None:
        self.hashes = array("Q")
        self.stray_tokens = 0
        """Tokens that belong to no document."""
        self._open: Any = None

    def add(self, tokens: Tokens) -> None:
        """Go on with the next tokens."""
        starts = np.flatnonzero(tokens == BOS_ID).tolist()
        first = starts[0] if starts else len(tokens)
        if self._open is not None:
            self._open.update(tokens[:first].tobytes())
        else:
            self.stray_tokens += first
        for start, end in pairwise([*starts, len(tokens)]):
            self.end_document()
            self._open = hashlib.blake2b(tokens[start + 1 : end].tobytes(), digest_size=8)

    def end_document(self) -> None:
        """The open document is whole: at the next BOS, and where the stream ends or has a gap."""
        if self._open is not None:
            self.hashes.append(int.from_bytes(self._open.digest(), "little"))
            self._open = None

    def finish(self) -> NDArray[np.uint64]:
        """[documents] hashes in the documents' order."""
        self.end_document()
        return np.array(self.hashes, dtype=np.uint64)


def verify_dataset(
    data: DataConfig, vocab_size: int, *, progress: Progress | None = None
) -> VerifyReport:
    """Check everything about a data set.

    Raises:
        DataError: there is no data set at all.
    """
    folder = dataset_dir(data, vocab_size)
    problems: list[str] = []
    paths: dict[Split, list[Path]] = {}
    missing: list[DataError] = []
    for split in ("train", "val"):
        try:
            paths[split] = find_shards(data, vocab_size, split)
        except DataError as error:
            paths[split] = []
            missing.append(error)
    if len(missing) == 2:
        raise missing[0]
    problems += [error.problem for error in missing]
    manifest = _manifest(folder, problems)
    _check_tokenizer(data, vocab_size, manifest, problems)
    total_bytes = sum(path.stat().st_size for shards in paths.values() for path in shards)
    count = _Counter(progress, total_bytes)
    reports, hashes = {}, {}
    for split, shards in paths.items():
        if manifest is not None:
            _check_manifest(split, shards, manifest, problems)
        reports[split], hashes[split] = _read_split(split, shards, vocab_size, count, problems)
    shared = _shared(hashes["val"], hashes["train"])
    problems += [
        f"validation document {val} is training document {train} too"
        for val, train in shared[:MAX_NAMED].tolist()
    ]
    if len(shared) > MAX_NAMED:
        problems.append(f"{len(shared) - MAX_NAMED} more validation documents are in training too")
    return VerifyReport(
        dataset_dir=folder,
        train=reports["train"],
        val=reports["val"],
        has_manifest=manifest is not None,
        shared_documents=len(shared),
        problems=tuple(problems),
    )


class _Counter:
    def __init__(self, progress: Progress | None, total_bytes: int) -> None:
        self._progress, self._total_bytes, self._done_bytes = progress, total_bytes, 0

    def add(self, num_bytes: int) -> None:
        self._done_bytes += num_bytes
        if self._progress is not None:
            self._progress("verify", min(self._done_bytes, self._total_bytes), self._total_bytes)


def _manifest(folder: Path, problems: list[str]) -> dict[str, Any] | None:
    try:
        return read_manifest(folder)
    except DataError as error:
        problems.append(error.problem)
        return None


def _check_tokenizer(
    data: DataConfig, vocab_size: int, manifest: dict[str, Any] | None, problems: list[str]
) -> None:
    try:
        path = find_tokenizer(data, vocab_size)
        processor = load_tokenizer(path, vocab_size)
    except DataError as error:
        problems.append(error.problem)
        return
    if processor.bos_id() != BOS_ID:
        problems.append(f"tokenizer {path} has BOS {processor.bos_id()}, not {BOS_ID}")
    stated = (manifest or {}).get("tokenizer", {}).get("sha256")
    if stated is not None and stated != file_sha256(path):
        problems.append(f"tokenizer {path} is not the one that the shards were made with")


def _check_manifest(
    split: Split, paths: list[Path], manifest: dict[str, Any], problems: list[str]
) -> None:
    stated = {
        shard["file"]: shard["sha256"]
        for shard in manifest["splits"].get(split, {}).get("shards", [])
    }
    for path in paths:
        if path.name not in stated:
            problems.append(f"shard {path} is not in the manifest")
        elif stated.pop(path.name) != file_sha256(path):
            problems.append(f"shard {path} has another hash than the manifest states")
    problems += [f"shard {name} of the manifest is missing" for name in stated]


def _read_split(
    split: Split, paths: list[Path], vocab_size: int, count: _Counter, problems: list[str]
) -> tuple[SplitReport, NDArray[np.uint64]]:
    """Read every token of a split."""
    documents = _DocumentHashes()
    num_tokens, expected_index = 0, 0
    for path in paths:
        name = parse_shard_name(path.name)
        assert name is not None
        if name[1] != expected_index:
            problems.append(f"before {path} there is no shard {expected_index} of {split}")
            documents.end_document()
        expected_index = name[1] + 1
        try:
            tokens = open_shard(path)
        except DataError as error:
            problems.append(error.problem)
            documents.end_document()
            count.add(path.stat().st_size)
            continue
        count.add(HEADER_BYTES)
        num_tokens += len(tokens)
        wrong_ids = False
        for start in range(0, len(tokens), CHECK_TOKENS):
            chunk = tokens[start : start + CHECK_TOKENS]
            if not wrong_ids:
                wrong_ids = _has_wrong_ids(chunk, start, vocab_size, path, problems)
            documents.add(chunk)
            count.add(TOKEN_BYTES * len(chunk))
    hashes = documents.finish()
    if documents.stray_tokens:
        problems.append(f"{documents.stray_tokens} tokens of {split} come before any BOS")
    if paths and len(hashes) == 0:
        problems.append(f"there is not one document in {split}")
    report = SplitReport(
        shards=len(paths),
        tokens=num_tokens,
        documents=len(hashes),
        repeated_documents=len(hashes) - len(np.unique(hashes)),
    )
    return report, hashes


def _has_wrong_ids(
    chunk: Tokens, start: int, vocab_size: int, path: Path, problems: list[str]
) -> bool:
    try:
        check_ids(chunk, vocab_size, f"shard {path}", start)
    except DataError as error:
        problems.append(error.problem)
        return True
    return False


def _shared(val: NDArray[np.uint64], train: NDArray[np.uint64]) -> NDArray[np.int64]:
    """[k, 2] validation documents that are in training, each with its first place there."""
    known, first = np.unique(train, return_index=True)
    if len(known) == 0:
        return np.zeros((0, 2), dtype=np.int64)
    # A document without a token says nothing about where it came from.
    empty = int.from_bytes(hashlib.blake2b(b"", digest_size=8).digest(), "little")
    place = np.minimum(np.searchsorted(known, val), len(known) - 1)
    found = np.flatnonzero((known[place] == val) & (val != empty))
    return np.stack((found, first[place[found]]), axis=1).astype(np.int64)
