"""Messages from a training's processes to its driver, through the cluster's key-value store.

Small, and rare enough that a progress bar costs no process of its own; nothing stays behind once
the driver has cleared it. Nothing that must not be lost travels here alone: a redone step sends its
records again.

Invariant: a message is read once, in order of attempt and time.
"""

from __future__ import annotations

import json
import time
from typing import Any

import ray
from ray.experimental import internal_kv

NAMESPACE = b"golf_ray"

Message = dict[str, Any]


class Channel:
    """Messages from a run's processes to its driver, in the cluster's key-value store.

    Args:
        run_key: unique to one call of the driver.
        attempt: of the workers, from 1.
        source: who writes, such as a rank.
    """

    def __init__(self, run_key: str, attempt: int = 0, source: str = "driver") -> None:
        self._run_key = run_key
        self._source = source
        self.attempt = attempt

    def put(self, kind: str, **values: Any) -> None:
        """Send a message, which the driver reads once."""
        message = {"kind": kind, "attempt": self.attempt, "unix_s": time.time(), **values}
        key = f"{self._run_key}/m/{self.attempt:06d}/{time.time_ns():020d}/{self._source}"
        self._set(key, json.dumps(message).encode())

    def put_progress(self, **values: Any) -> None:
        """Set the latest progress, in the place of the one before."""
        message = {"attempt": self.attempt, **values}
        self._set(f"{self._run_key}/progress", json.dumps(message).encode())

    def take(self) -> list[Message]:
        """All messages that came since, in order of attempt and time."""
        found = []
        prefix = f"{self._run_key}/m/"
        for key in sorted(internal_kv._internal_kv_list(prefix, namespace=NAMESPACE)):
            value = internal_kv._internal_kv_get(key, namespace=NAMESPACE)
            internal_kv._internal_kv_del(key, namespace=NAMESPACE)
            if value is not None:
                found.append(json.loads(value))
        return found

    def progress(self) -> Message | None:
        """The latest progress."""
        value = self._get(f"{self._run_key}/progress")
        return None if value is None else json.loads(value)

    def announce_attempt(self) -> None:
        """Tell workers that are about to start which attempt they are."""
        self._set(f"{self._run_key}/attempt", str(self.attempt).encode())

    def announced_attempt(self) -> int:
        """Which attempt has been announced last."""
        return int(self._get(f"{self._run_key}/attempt") or 0)

    def leave_controller(self, handle: Any) -> None:
        """Let the driver have the controller's handle, to stop it by."""
        self._set(f"{self._run_key}/controller", ray.cloudpickle.dumps(handle))

    def controller(self) -> Any | None:
        """The controller's handle, once it has begun."""
        value = self._get(f"{self._run_key}/controller")
        return None if value is None else ray.cloudpickle.loads(value)

    def clear(self) -> None:
        """Remove everything of the run from the cluster."""
        internal_kv._internal_kv_del(f"{self._run_key}/", del_by_prefix=True, namespace=NAMESPACE)

    def _set(self, key: str, value: bytes) -> None:
        internal_kv._internal_kv_put(key, value, overwrite=True, namespace=NAMESPACE)

    def _get(self, key: str) -> bytes | None:
        return internal_kv._internal_kv_get(key, namespace=NAMESPACE)
