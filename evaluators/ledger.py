"""The ledger of one evaluation: what is scored is kept, so that a rerun does only what is missing.

A folder on any file system holds `header.json`, which says of what the scores are, and `segments/`,
a file for each finished unit, written once. A segment's name is the SHA-256 of its content, so a
damaged or torn one is known by its name; it counts for nothing, and its documents are scored again.
Scores are kept by document, and the first of a document counts: work that was done twice counts
once.

Invariant: what a ledger gives back was scored under its header, to the bit.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from golf_ray import fingerprint
from golf_ray.adaptation.scores import ChunkEvent, DocumentScore
from golf_ray.errors import StorageError, UsageError
from trainers.storage import Storage, shown

VERSION = 1
HEADER = "header.json"
SEGMENTS = "segments"
STATES = "states"
"""Folder of documents that are half-way through, as `golf_ray.adaptation.state` has them."""
SUFFIX = ".jsonl"
STATE_SUFFIX = ".state"
MOST_DIFFERENCES = 3
"""That an error names."""


class Ledger:
    """Scores of documents under one header.

    Args:
        where: a path or URI; the folder is made with the first score.
        identity: what the scores follow from, as plain data: artifact, data, settings.

    Raises:
        UsageError: what is there is the ledger of another evaluation; the line says what differs.
        StorageError: the folder or its header cannot be read.
    """

    def __init__(self, where: str, identity: Mapping[str, Any]) -> None:
        self._storage = Storage(where)
        self._segments = self._storage.child(SEGMENTS)
        self._header = {"version": VERSION, **identity}
        self.uri = self._storage.uri
        self._begun = self._check_header()
        self.troubles: list[str] = []
        """A line for each segment that cannot be used."""
        self.scores: dict[int, DocumentScore] = {}
        """By document."""
        self.repeated: list[DocumentScore] = []
        """Scores of documents that have one already; they count for nothing."""
        for name in self._segments.names() if self._begun else []:
            for score in self._read(name):
                if self.scores.setdefault(score.index, score) is not score:
                    self.repeated.append(score)

    def add(self, scores: Sequence[DocumentScore]) -> None:
        """Keep the scores of some documents; when this returns, they are stored.

        Raises:
            StorageError: they cannot be; nothing of them is left behind.
        """
        new = [score for score in scores if score.index not in self.scores]
        if not new:
            return
        if not self._begun:
            text = json.dumps(self._header, indent=2, sort_keys=True) + "\n"
            self._storage.write_bytes(HEADER, text.encode())
            self._begun = True
        lines = "".join(json.dumps(_plain(score)) + "\n" for score in new)
        content = lines.encode()
        self._segments.write_bytes(hashlib.sha256(content).hexdigest() + SUFFIX, content)
        self.scores.update({score.index: score for score in new})

    def forget_state(self, index: int) -> None:
        """Remove what is stored of a document half-way through: it is scored."""
        self._storage.child(STATES).remove(f"{index}{STATE_SUFFIX}")

    def forget_states(self) -> None:
        """Remove all of that."""
        self._storage.remove(STATES)

    @property
    def states_uri(self) -> str:
        """Folder for states of documents."""
        return self._storage.uri_of(STATES)

    def _check_header(self) -> bool:
        theirs = _header_in(self._storage)
        if theirs is None:
            if self._segments.names():
                raise StorageError(
                    f"{shown(self._storage.uri)} holds scores and no {HEADER} that says of what",
                    "give another folder",
                )
            return False
        if "version" not in theirs:
            raise _damaged(self._storage)
        version = theirs["version"]
        if version != VERSION:
            raise StorageError(
                f"{shown(self._storage.uri)} is a ledger of version {version}, and this program "
                f"knows {VERSION}",
                "give another folder",
            )
        named = name_differences(theirs, self._header)
        if named:
            raise UsageError(
                f"{shown(self._storage.uri)} is the ledger of another evaluation: {named}",
                "give another folder, or evaluate as it says",
            )
        return True

    def _read(self, name: str) -> list[DocumentScore]:
        content = self._segments.read_bytes(name) or b""
        where = shown(self._segments.uri_of(name))
        if not name.endswith(SUFFIX):
            return []
        if hashlib.sha256(content).hexdigest() != name.removesuffix(SUFFIX):
            self.troubles.append(f"{where} is damaged and counts for nothing")
            return []
        try:
            return [_score_of(json.loads(line)) for line in content.splitlines()]
        except (ValueError, TypeError, LookupError, AttributeError):
            self.troubles.append(f"{where} holds what is no score")
            return []


def ledger_folder(root: str, identity: Mapping[str, Any], *, alone: bool) -> str:
    """Where the ledger of an evaluation is, below a folder that is given.

    An evaluation that is alone has the folder itself; each of several has a folder in it, named by
    what it is of, and keeps it when it is rerun alone.
    """
    name = fingerprint.of_value({"version": VERSION, **identity})
    storage = Storage(root)
    if alone and (storage.exists(HEADER) or not storage.child(name).exists(HEADER)):
        return root
    return storage.child(name).uri


def read_header(where: str) -> dict[str, Any]:
    """What the ledger in a folder says that its scores follow from.

    Raises:
        StorageError: there is no ledger, or its header cannot be read.
    """
    storage = Storage(where)
    header = _header_in(storage)
    if header is None:
        raise StorageError(
            f"{shown(storage.uri)} holds no {HEADER}, so it is no ledger",
            "give the folder that was given to 'golf-ray eval --ledger'",
        )
    return header


def _header_in(storage: Storage) -> dict[str, Any] | None:
    found = storage.read_bytes(HEADER)
    if found is None:
        return None
    try:
        header = json.loads(found)
    except ValueError:
        raise _damaged(storage) from None
    if not isinstance(header, dict):
        raise _damaged(storage)
    return header


def _damaged(storage: Storage) -> StorageError:
    return StorageError(f"{shown(storage.uri_of(HEADER))} is damaged", "give another folder")


def missing(
    groups: Iterable[Sequence[Any]], ledger: Ledger | None, *, token_nats: bool
) -> list[Sequence[Any]]:
    """Those groups of documents of which not all are in the ledger.

    Args:
        token_nats: whether a score without each token's loss is of no use.
    """
    if ledger is None:
        return list(groups)
    useful = {
        index
        for index, score in ledger.scores.items()
        if score.token_nats is not None or not token_nats
    }
    return [group for group in groups if not all(d.index in useful for d in group)]


def digest_of(*arrays: Any) -> str:
    """SHA-256 of arrays' types, shapes and bytes."""
    found = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(array)
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(array.view(np.uint8).data)
    return found.hexdigest()


def _plain(score: DocumentScore) -> dict[str, Any]:
    return {
        "document": score.index,
        # Hexadecimal, because that is the number itself.
        "nats": score.nats.hex(),
        "tokens": score.tokens,
        "bytes": score.num_bytes,
        "trace": [[e.chunk, e.scored_at, e.updated_at] for e in score.trace],
        "token_nats": None
        if score.token_nats is None
        else base64.b64encode(score.token_nats.astype("<f4").tobytes()).decode(),
    }


def _score_of(line: Mapping[str, Any]) -> DocumentScore:
    losses = line["token_nats"]
    return DocumentScore(
        index=_whole(line["document"]),
        nats=float.fromhex(line["nats"]),
        tokens=_whole(line["tokens"]),
        num_bytes=_whole(line["bytes"]),
        trace=tuple(
            ChunkEvent(
                chunk=_whole(chunk),
                scored_at=_whole(scored),
                updated_at=None if updated is None else _whole(updated),
            )
            for chunk, scored, updated in line["trace"]
        ),
        token_nats=None
        if losses is None
        else np.frombuffer(base64.b64decode(losses), dtype="<f4").astype(np.float32),
    )


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is no whole number")
    return value


def name_differences(theirs: Any, mine: Any) -> str:
    """A phrase for each of the first values in which plain data differs from a stored header;
    empty if it does not."""
    # As JSON gives it back: tuples are lists there.
    differences = list(_differences(theirs, json.loads(json.dumps(mine))))
    more = len(differences) - MOST_DIFFERENCES
    return "; ".join(differences[:MOST_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")


def _differences(theirs: Any, mine: Any, place: str = "") -> Iterator[str]:
    """A phrase for each value that differs."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for name in sorted({*theirs, *mine}):
            below = f"{place}.{name}" if place else name
            yield from _differences(theirs.get(name), mine.get(name), below)
    elif theirs != mine:
        yield f"{place} is {_short(theirs)} there and {_short(mine)} here"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:12] + "..." if len(text) > 24 else text
