"""Fingerprints: short names of values and files by which a stage's output is found again.

Invariant: equal values give equal fingerprints in every process and on every machine; the text
behind a fingerprint lies beside the output, so that drift can be explained and not only noticed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

LENGTH = 16


def of_value(value: Any) -> str:
    """Fingerprint of plain data: SHA-256 of its JSON with sorted keys, 16 hex digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def of_file(path: Path) -> str:
    """Fingerprint of a file's bytes: SHA-256, 16 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:LENGTH]
