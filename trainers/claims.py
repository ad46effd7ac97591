"""Claims: of all who need one output, on whatever hosts, one makes it and the others wait.

A claimant puts a file of its own into a folder, then looks whether others are there; who is alone
holds the claim, who is not takes its file back and comes again. Since each writes before it looks,
two can never both be alone. This needs no more of a file system than that a file which was written
is listed from then on, so it works on a disk, on a shared mount and in an object store.

A holder rewrites its file every `BEAT_S`. A file that has not changed for `STALE_S` by the clock of
whoever waits, or whose process is gone on the same host, is nobody's any more: clocks of different
hosts are never compared.

Invariant: at most one claimant that is alive holds a claim.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from golf_ray.errors import StorageError, UsageError
from trainers.storage import Storage

BEAT_S = 5.0
POLL_S = 1.0
DRIVER = "driver"
"""Folder of a run or a sweep in which who runs it has a claim."""

Tell = Callable[[str], None]
STALE_S = 60.0
"""A holder's process may be stopped, or its storage slow, for so long."""


class Claim:
    """A claim that is held, as a context manager; it is kept up from a thread of its own."""

    def __init__(self, storage: Storage, name: str, content: dict[str, Any]) -> None:
        self._storage = storage
        self._name = name
        self._content = content
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="golf-ray-claim", daemon=True)

    def __enter__(self) -> Claim:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        # What cannot be removed goes stale.
        with contextlib.suppress(StorageError):
            self._storage.remove(self._name)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            self._content["beat"] += 1
            # A beat that fails is made good by the next, or the work itself will fail to write.
            with contextlib.suppress(StorageError):
                self._storage.write_bytes(self._name, json.dumps(self._content).encode())


class Claims:
    """One claimant's view of the claims in a folder.

    Args:
        storage: the folder.
        who: what to call the claimant to people.
    """

    def __init__(self, storage: Storage, who: str) -> None:
        self._storage = storage
        self._name = f"{uuid.uuid4().hex}.json"
        self._content = {"who": who, "beat": 0, **_process()}
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._first: dict[str, bytes] = {}
        self.holder: str | None = None
        """Who was in the way at the last try, for people."""
        self.is_sure = False
        """Whether that one is known to be alive: it was seen to beat, or runs on this host."""

    def take(self) -> Claim | None:
        """The claim, or None where somebody else is there; try again after a while."""
        if self._others():
            return None
        self._storage.write_bytes(self._name, json.dumps(self._content).encode())
        try:
            others = self._others()
        except StorageError:
            # Nobody beats for it.
            with contextlib.suppress(StorageError):
                self._storage.remove(self._name)
            raise
        if others:
            self._storage.remove(self._name)
            # Two who meet again and again would never get anywhere.
            time.sleep(random.uniform(0.0, 0.5))
            return None
        return Claim(self._storage, self._name, self._content)

    def is_held(self) -> bool:
        """Whether somebody else who is alive, as far as can be seen by now, holds a claim.

        Writes nothing. That a holder on another host is dead is seen by asking again.
        """
        return self._others(clear=False)

    def is_left(self) -> bool:
        """Whether somebody held a claim who was killed, as far as can be seen by now."""
        return not self.is_held() and any(n.endswith(".json") for n in self._storage.names())

    def _others(self, *, clear: bool = True) -> bool:
        """Whether a claim of somebody who is alive is there.

        Args:
            clear: remove those of the dead.
        """
        self.holder = None
        for name in self._storage.names():
            if name == self._name or not name.endswith(".json"):
                continue
            data = self._storage.read_bytes(name)
            if data is None:
                continue
            if self._is_dead(name, data):
                if clear:
                    self._storage.remove(name)
                continue
            self.holder = _who(data)
            here = _parsed(data).get("host") == _process()["host"]
            self.is_sure = here or self._first.setdefault(name, data) != data
        return self.holder is not None

    def _is_dead(self, name: str, data: bytes) -> bool:
        now_s = time.monotonic()
        before = self._seen.get(name)
        if before is None or before[0] != data:
            self._seen[name] = (data, now_s)
            before = self._seen[name]
        content = _parsed(data)
        mine = _process()
        quiet = now_s - before[1] > STALE_S
        if content.get("host") == mine["host"]:
            return quiet or not _is_running(content.get("pid"), content.get("started_unix_s"))
        return quiet


def claims_of_drivers(folder: Storage, who: str) -> Claims:
    """The claims of who runs the run or the sweep in a folder, or would."""
    return Claims(folder.child(DRIVER), who)


@contextlib.contextmanager
def driving(folder: Storage, what: str, tell: Tell | None = None) -> Iterator[None]:
    """Be the only one who runs what a folder holds, for the length of a block.

    Args:
        what: for people, as `sweep 'nightly'`.
        tell: told once where it has to be waited for.

    Raises:
        UsageError: somebody else runs it.
    """
    claims = claims_of_drivers(folder, f"the driver of {what}")
    while (claim := claims.take()) is None:
        # One that was killed on another host looks alive until it is seen not to beat.
        if claims.is_sure:
            raise UsageError(
                f"{what} is run by {claims.holder} at this moment",
                "wait for it, or stop it first",
            )
        if tell is not None:
            tell(f"{what} was run on another host: seeing for {STALE_S:.0f} s if it still is")
            tell = None
        time.sleep(POLL_S)
    try:
        with claim:
            yield
    finally:
        if folder.local is not None:
            # Also after an error: what is left of it says that somebody was killed.
            with contextlib.suppress(OSError):
                (folder.local / DRIVER).rmdir()


def _process() -> dict[str, Any]:
    import psutil

    started = psutil.Process().create_time()
    return {"host": _host(), "pid": os.getpid(), "started_unix_s": round(started, 2)}


def _host() -> str:
    # Containers share names more often than the kernel's id of this boot and its namespaces.
    with contextlib.suppress(OSError):
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        return f"{socket.gethostname()}-{boot}-{os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _is_running(pid: Any, started_unix_s: Any) -> bool:
    import psutil

    try:
        process = psutil.Process(int(pid))
        # A number may be given to another process.
        same = abs(process.create_time() - float(started_unix_s)) < 1.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, TypeError, ValueError):
        return False


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _who(data: bytes) -> str:
    content = _parsed(data)
    return f"{content.get('who', 'somebody')} (process {content.get('pid', 'unknown')})"
