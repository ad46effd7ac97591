"""Trials' records as they lie in a sweep's folder: read in bulk, brought to this version, checked.

Nothing here knows what a sweep is; a trial writes its record by `golf_ray.sweeps.trial`.

Invariant: a record that is given has every part that its readers count on, and reading changes no
file.
"""

from __future__ import annotations

import contextlib
import json
import marshal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from golf_ray.errors import StorageError
from golf_ray.results.curves import REMOTE_THREADS, THREADS
from golf_ray.results.migration import Record, migrate
from golf_ray.results.schema import FINAL
from trainers.storage import Storage, shown

GROUP_FILES: Final = 64
"""Small files that a thread reads at a time."""

PARTS: Final[dict[str, type]] = {
    "trial": int, "status": str, "knobs": dict, "config": dict, "values": dict, "constraints": dict,
    "phases_s": dict,
}  # fmt: skip
"""What every record has, with its type."""
OPTIONAL_PARTS: Final[dict[str, type]] = {
    "final": dict, "spans": list, "evaluations": list, "codes": list, "checkpoints": list,
}  # fmt: skip

LEFT: Final = "nobody runs its sweep any more: resume it"
"""Why a trial was interrupted whose driver could not say so."""

OnProblem = Callable[[str], None]
Parts = dict[bytes, Any]


def read_records(folder: Storage | Path) -> list[Record]:
    """All records of a sweep's `trials` folder in order of their numbers; it may still grow.

    Raises:
        StorageError: the folder or a record cannot be read.
    """
    return read_trials(folder if isinstance(folder, Storage) else Storage(folder))


def read_trials(folder: Storage, on_problem: OnProblem | None = None) -> list[Record]:
    """All records of a sweep's `trials` folder in order of their numbers; it may still grow.

    Args:
        on_problem: told of each record that cannot be read, which is left out.

    Raises:
        StorageError: the folder cannot be read; or a record, where nobody is told of problems.
    """
    names = [n for n in folder.names() if n.endswith(".json") and n[0].isdigit()]
    records = []
    parts: Parts = {}
    with _without_collector():
        for name, data in zip(names, _read_all(folder, names), strict=True):
            try:
                if isinstance(data, StorageError):
                    raise data
                if data is not None:
                    records.append(_shared(parse_record(data, folder, name), parts))
            except StorageError as error:
                if on_problem is None:
                    raise
                on_problem(str(error))
    return records


def parse_record(data: bytes, folder: Storage, name: str) -> Record:
    """A record's file as this version has it.

    Raises:
        StorageError: it is damaged, or a newer golf_ray wrote it.
    """
    where = shown(folder.uri_of(name))
    try:
        found = json.loads(data)
    except ValueError as error:
        raise StorageError(f"{where} is damaged ({error})", "restore or remove the file") from None
    if not isinstance(found, dict):
        raise StorageError(f"{where} is no record", "remove the file")
    record = migrate(found, where)
    for name, kind in PARTS.items():
        # Types by name: true is no number of a trial.
        if type(record.get(name)) is not kind:
            raise StorageError(f"{where} is damaged: its {name} is {record.get(name)!r}",
                               "restore or remove the file")  # fmt: skip
    for name, kind in OPTIONAL_PARTS.items():
        if record.get(name) is not None and type(record[name]) is not kind:
            raise StorageError(f"{where} is damaged: its {name} is {record[name]!r}",
                               "restore or remove the file")  # fmt: skip
    if any(type(span) is not dict for span in record.get("spans") or ()):
        raise StorageError(f"{where} is damaged: its spans are {record['spans']!r}"[:200],
                           "restore or remove the file")  # fmt: skip
    return record


def as_left(record: Record, *, driven: bool) -> Record:
    """A record as it is by now: who was killed could not write that its trial was interrupted.

    Args:
        driven: whether somebody runs its sweep.
    """
    if driven or record["status"] in FINAL:
        return record
    return {**record, "status": "interrupted", "reason": LEFT}


def _read_all(folder: Storage, names: Sequence[str]) -> Iterator[bytes | StorageError | None]:
    """The files' contents in order, or why one cannot be read; read ahead in threads."""

    def read(some: Sequence[str]) -> list[bytes | StorageError | None]:
        return [_read_or_error(folder, name) for name in some]

    if len(names) <= GROUP_FILES:
        yield from read(names)
        return
    groups = [names[i : i + GROUP_FILES] for i in range(0, len(names), GROUP_FILES)]
    with ThreadPoolExecutor(THREADS if folder.local is not None else REMOTE_THREADS) as pool:
        for contents in pool.map(read, groups):
            yield from contents


def _read_or_error(folder: Storage, name: str) -> bytes | StorageError | None:
    """A file's content, None where there is none, or why it cannot be read."""
    try:
        return _read_file(folder, name)
    except StorageError as error:
        return error


def _read_file(folder: Storage, name: str) -> bytes | None:
    if folder.local is not None:
        try:
            with open(folder.place(name), "rb", buffering=0) as file:
                return file.readall()
        except FileNotFoundError:
            return None
        except OSError:
            # For its one line.
            pass
    return folder.read_bytes(name)


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Parsing makes a million objects and no cycle: of ten thousand records' 2.5 s the collector's
    looking for one is half."""
    import gc

    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _shared(record: Record, parts: Parts) -> Record:
    """A record whose configuration's sections are those of another that has the same: ten thousand
    trials differ in few, and would fill memory with the rest."""
    config = record["config"]
    for name, section in config.items():
        # What cannot be told apart by its bytes is not shared.
        with contextlib.suppress(ValueError):
            config[name] = parts.setdefault(marshal.dumps(section, 2), section)
    return record
