"""`manifest.json` beside a data set's shards: what they were made of and what they must hash to.

Built data sets have one; fetched ones have none. It holds no time and no machine, so that the
same text gives the same manifest.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

from golf_ray.errors import DataError

MANIFEST_NAME: Final = "manifest.json"
MANIFEST_FORMAT: Final = 1


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})", "check the file") from None


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a data set, or None where it has none.

    Raises:
        DataError: it is no manifest, or of a later format.
    """
    path = folder / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})", "check the file") from None
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("splits"), dict):
        raise DataError(f"{path} is no manifest", "remove it or build the data set again")
    if manifest.get("format") != MANIFEST_FORMAT:
        raise DataError(
            f"{path} is of format {manifest.get('format')}",
            f"this version reads format {MANIFEST_FORMAT}; build the data set again",
        )
    return manifest
