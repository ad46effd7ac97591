"""Stage outputs by fingerprint: what was computed once is found again, by whoever needs it.

A stage is a pure function of a part of the configuration and of its inputs. Its output lies in
`<root>/<stage>-<fingerprint>/`; `stage.json` beside it says what the fingerprint is of, and is
written last: a folder without it is unfinished and is never taken for a result. The root is a path
or a URI that all who use it can write; several sweeps and several people may use one at a time.

Invariant: of all who ask for one output at the same time one computes it, the others wait for it.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import golf_ray
from golf_ray import fingerprint
from golf_ray.errors import GolfRayError, StorageError, TrainingPruned
from golf_ray.records import atomic_path, make_folder
from golf_ray.sweeps.keys import Stage
from trainers.claims import Claims
from trainers.storage import Storage

DONE_FILE = "stage.json"
FAILED_FILE = "failed.json"
CLAIMS = "claims"
POLL_S, REMOTE_POLL_S = 0.3, 2.0

OnWait = Callable[[str], None]
"""Told whom a stage waits for."""


class StageFailed(GolfRayError):
    """A stage that somebody else tried for the same sweep, in vain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageOutput:
    """A finished stage."""

    storage: Storage
    """Its folder."""
    fingerprint: str
    result: dict[str, Any]
    made_by: str
    """Sweep and trial that computed it."""
    version: str
    """Of golf_ray, at that time."""

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.storage.name

    def file(self, name: str) -> Path:
        """One of its files on this machine; copied here first where the store is elsewhere.

        Raises:
            StorageError: it is not there.
        """
        return local_copy(self.storage, name)


class StageStore:
    """Outputs of stages below one folder.

    Args:
        root: the folder, a path or URI.
        who: what to call this user of it to others, as `sweep/trial 3`.
    """

    def __init__(self, root: str | Path | Storage, who: str = "somebody") -> None:
        self.root = root if isinstance(root, Storage) else Storage(root)
        self.who = who
        if self.root.local is not None:
            make_folder(self.root.local)

    def folder(self, stage: Stage, key: Mapping[str, Any]) -> Storage:
        """Where a stage's output is or will be."""
        return self.root.child(f"{stage}-{fingerprint.of_value(dict(key))}")

    def find(self, stage: Stage, key: Mapping[str, Any]) -> StageOutput | None:
        """A finished stage of this key, or None."""
        folder = self.folder(stage, key)
        data = folder.read_bytes(DONE_FILE)
        if data is None:
            return None
        done = json.loads(data)
        return StageOutput(
            storage=folder,
            fingerprint=done["fingerprint"],
            result=done["result"],
            made_by=done["made_by"],
            version=done["version"],
        )

    def obtain(
        self,
        stage: Stage,
        key: Mapping[str, Any],
        compute: Callable[[Storage], dict[str, Any]],
        *,
        on_wait: OnWait | None = None,
    ) -> StageOutput:
        """A stage of this key: found, waited for, or computed into its folder.

        What cannot be computed is not tried again by the same sweep: those who waited for it
        fail with the same reason.

        Raises:
            TrainingPruned: likewise, where it was ended on the way because others stood better.
            StageFailed: another trial of this sweep failed to compute it meanwhile, or before.
            GolfRayError: it cannot be computed.
        """
        folder = self.folder(stage, key)
        claims = Claims(folder.child(CLAIMS), self.who)
        told: str | None = None
        while True:
            found = self.find(stage, key)
            if found is not None:
                return found
            self._require_untried(folder)
            claim = claims.take()
            if claim is not None:
                with claim:
                    # Its last holder may have finished between the two looks.
                    return self.find(stage, key) or self._compute(stage, key, folder, compute)
            if on_wait is not None and claims.holder not in (None, told):
                told = claims.holder
                on_wait(str(told))
            time.sleep(POLL_S if folder.local is not None else REMOTE_POLL_S)

    def forget_failures(self, stage: Stage, key: Mapping[str, Any]) -> None:
        """Let a stage that failed be tried again."""
        self.folder(stage, key).remove(FAILED_FILE)

    def _compute(
        self,
        stage: Stage,
        key: Mapping[str, Any],
        folder: Storage,
        compute: Callable[[Storage], dict[str, Any]],
    ) -> StageOutput:
        try:
            result = compute(folder)
        except GolfRayError as error:
            failed = {
                "sweep": self._sweep,
                "by": self.who,
                "problem": error.problem,
                "remedy": error.remedy,
                "pruned": isinstance(error, TrainingPruned),
            }
            folder.write_bytes(FAILED_FILE, json.dumps(failed, indent=2).encode())
            raise
        folder.remove(FAILED_FILE)
        return self.finish(stage, key, result)

    def _require_untried(self, folder: Storage) -> None:
        data = folder.read_bytes(FAILED_FILE)
        failed = {} if data is None else json.loads(data)
        if failed.get("sweep") == self._sweep and failed.get("by") != self.who:
            kind = TrainingPruned if failed.get("pruned") else StageFailed
            raise kind(failed["problem"], failed["remedy"])

    @property
    def _sweep(self) -> str:
        return self.who.partition("/")[0]

    def finish(self, stage: Stage, key: Mapping[str, Any], result: dict[str, Any]) -> StageOutput:
        """Mark a stage as finished; its files are in its folder already."""
        folder = self.folder(stage, key)
        name = fingerprint.of_value(dict(key))
        done = {
            "stage": stage,
            "fingerprint": name,
            "of": dict(key),
            "result": result,
            "made_by": self.who,
            "version": golf_ray.__version__,
            "unix_s": time.time(),
        }
        folder.write_bytes(DONE_FILE, (json.dumps(done, indent=2) + "\n").encode())
        return StageOutput(
            storage=folder,
            fingerprint=name,
            result=result,
            made_by=self.who,
            version=golf_ray.__version__,
        )


def local_copy(storage: Storage, name: str) -> Path:
    """A file of a finished stage on this machine.

    Raises:
        StorageError: it is not there, or cannot be copied.
    """
    if storage.local is not None:
        return storage.local / name
    digest = hashlib.sha256(storage.uri.encode()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / "golf-ray-cache" / digest / name
    if not target.exists():
        data = storage.read_bytes(name)
        if data is None:
            raise StorageError(f"{storage.uri_of(name)} is not there", "compute its stage again")
        with atomic_path(target) as temporary:
            temporary.write_bytes(data)
    return target
