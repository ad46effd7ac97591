"""Stage outputs by fingerprint: what was computed once is found again.

A stage is a pure function of a part of the configuration and of its inputs. Its output lies in
`<root>/<stage>-<fingerprint>/`; `stage.json` beside it says what the fingerprint is of, and is
written last: a folder without it is unfinished and is never taken for a result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import golf_ray
from golf_ray import fingerprint
from golf_ray.config import Config
from golf_ray.records import atomic_write_json, make_folder

DONE_FILE = "stage.json"
HEAD_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class StageOutput:
    """A finished stage."""

    folder: Path
    fingerprint: str
    result: dict[str, Any]
    reused: bool
    """Whether it was there before it was asked for."""


class StageStore:
    """Outputs of stages below one folder.

    Args:
        root: the folder; made if it is not there.
    """

    def __init__(self, root: Path) -> None:
        self.root = make_folder(root)

    def folder(self, stage: str, key: Mapping[str, Any]) -> Path:
        """Where a stage's output is or will be."""
        return self.root / f"{stage}-{fingerprint.of_value(dict(key))}"

    def find(self, stage: str, key: Mapping[str, Any]) -> StageOutput | None:
        """A finished stage of this key, or None."""
        folder = self.folder(stage, key)
        try:
            done = json.loads((folder / DONE_FILE).read_text())
        except FileNotFoundError:
            return None
        return StageOutput(
            folder=folder, fingerprint=done["fingerprint"], result=done["result"], reused=True
        )

    def get(
        self, stage: str, key: Mapping[str, Any], compute: Callable[[Path], dict[str, Any]]
    ) -> StageOutput:
        """A stage of this key: found, or computed into its folder and marked as finished."""
        found = self.find(stage, key)
        if found is not None:
            return found
        return self.finish(stage, key, compute(self.folder(stage, key)))

    def finish(self, stage: str, key: Mapping[str, Any], result: dict[str, Any]) -> StageOutput:
        """Mark a stage as finished; its files are in its folder already."""
        folder = self.folder(stage, key)
        name = fingerprint.of_value(dict(key))
        done = {"stage": stage, "fingerprint": name, "of": dict(key), "result": result}
        atomic_write_json(folder / DONE_FILE, done)
        return StageOutput(folder=folder, fingerprint=name, result=result, reused=False)


def code_version() -> str:
    """The code's part of every key."""
    return golf_ray.__version__


def data_fingerprint(config: Config) -> str:
    """Fingerprint of the tokens and the tokenizer that a configuration names: name, size and
    first MiB of each file, so that a hundred shards take a second and not minutes."""
    from golf_ray.data.shards import find_shards
    from golf_ray.data.tokenizer import find_tokenizer

    vocab_size = config.model.vocab_size
    paths = [find_tokenizer(config.data, vocab_size)]
    for split in ("train", "val"):
        paths += find_shards(config.data, vocab_size, split)  # type: ignore[arg-type]
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
        digest.update(f"{path.name}:{path.stat().st_size}:".encode() + head)
    return digest.hexdigest()[: fingerprint.LENGTH]
