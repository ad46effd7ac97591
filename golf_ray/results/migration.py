"""Records of older versions, brought to this one when they are read.

Pure functions, one a version; what an old record does not say stays missing. Nothing is written:
a record on disk stays as it was until its own trial or finalist changes it.

Invariant: a migrated record reads as one that this version wrote without what it could not know;
`schema_written` says what it was, and migrating it again changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from golf_ray import fingerprint
from golf_ray.errors import StorageError
from golf_ray.results.schema import SCHEMA

Record = dict[str, Any]

WITHOUT_SCHEMA: Final = 2
"""Version of records that say none."""
PARTS: Final = ("config", "values", "constraints", "phases_s")
"""What every record has, also where it is empty."""


def migrate(record: Mapping[str, Any], where: str) -> Record:
    """A record as this version has it.

    Args:
        where: the record's file, for errors.

    Raises:
        StorageError: a newer golf_ray wrote it, or it is no record.
    """
    # A driver closes a record that its trial did not live to begin with no more than a reason.
    version = record.get("schema", WITHOUT_SCHEMA)
    if type(version) is not int or version < 1:
        raise StorageError(f"{where} is no record: its schema is {version!r}", "remove the file")
    if version > SCHEMA:
        raise StorageError(
            f"{where} was written by a newer golf_ray (schema {version}; this one knows {SCHEMA})",
            "install that version",
        )
    found = {**{name: {} for name in PARTS}, **record}
    try:
        for step in range(version, SCHEMA):
            found = STEPS[step](found)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise StorageError(
            f"{where} is damaged ({type(error).__name__}: {error})", "restore or remove the file"
        ) from None
    if version < SCHEMA:
        found.update(schema=SCHEMA, schema_written=version)
    return found


def from_1(record: Mapping[str, Any]) -> Record:
    """Schema 1 to 2: trials are counted from 1, and what the search was told is in the record.

    `code_version` stands in the place of golf_ray's version; groups and phases were not kept.
    """
    found = dict(record)
    found["trial"] = record["trial"] + 1
    found["golf_ray_version"] = found.pop("code_version", None)
    found.setdefault("group", None)
    ttt = record.get("ttt_bpb")
    found["values"] = {} if ttt is None else {"ttt_bpb": ttt}
    total, limit = record.get("total_bytes"), _limit_bytes(record)
    if total is not None and limit is not None:
        found["constraints"] = {"bytes": total / limit - 1}
    # Sizes were measured then, and nothing was foretold.
    if record.get("model_bytes") is not None:
        found.setdefault("bytes_exact", True)
    return found


def from_2(record: Mapping[str, Any]) -> Record:
    """Schema 2 to 3: limits, times of the training and the configuration's fingerprint have names
    of their own; what ran where was not kept."""
    found = dict(record)
    config, phases = record["config"], record["phases_s"]
    found.setdefault("limit_bytes", _limit_bytes(record))
    found.setdefault("config_fingerprint", fingerprint.of_value(config) if config else None)
    for name in ("start", "compile", "elapsed"):
        found.setdefault(f"{name}_s", phases.get(name))
    steps, batch_tokens = record.get("steps"), config.get("train", {}).get("batch_tokens")
    if type(steps) is int and record.get("training") is not None:
        found.setdefault("num_workers", config.get("cluster", {}).get("num_workers"))
        if type(batch_tokens) is int:
            found.setdefault("tokens", steps * batch_tokens)
    found.setdefault("spans", [])
    return found


STEPS: Final[Mapping[int, Callable[[Mapping[str, Any]], Record]]] = {1: from_1, 2: from_2}
"""From each version to the next."""


def _limit_bytes(record: Mapping[str, Any]) -> int | None:
    limit = record["config"].get("quantization", {}).get("limit_bytes")
    return limit if type(limit) is int else None
