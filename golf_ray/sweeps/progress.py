"""A sweep's progress, read from its files while it runs: what trials say, and where one stands.

Everything shown comes from records on disk, so it is what anybody else who looks sees too.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from golf_ray.errors import StorageError
from golf_ray.results.schema import FINAL
from golf_ray.sweeps.plan import SweepPlan
from golf_ray.sweeps.table import read_records
from trainers.storage import Storage, parse_lines

POLL_S, REMOTE_POLL_S = 0.5, 5.0

OnTrial = Callable[[dict[str, Any]], None]
OnStatus = Callable[[int, str], None]
"""Told how many trials are done and what is going on."""


class SweepWatch:
    """Looks at a sweep's folder from a thread of its own, as a context manager.

    Args:
        plan: the sweep.
        on_trial: told once of every trial that ends.
        on_status: told now and then what is going on.
    """

    def __init__(self, plan: SweepPlan, on_trial: OnTrial, on_status: OnStatus) -> None:
        self._plan = plan
        self._on_trial = on_trial
        self._on_status = on_status
        self._told: set[int] = set()
        # Of a sweep that goes on, what ended before is no news.
        self._before = {
            r["trial"] for r in read_records(plan.trials_folder) if r["status"] in FINAL
        }
        self._poll_s = POLL_S if plan.folder.local is not None else REMOTE_POLL_S
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="golf-ray-watch", daemon=True)

    def __enter__(self) -> SweepWatch:
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
        self._look()

    def _run(self) -> None:
        while not self._stop.wait(self._poll_s):
            # What cannot be read now is read the next time; the sweep itself says what is wrong.
            with contextlib.suppress(StorageError):
                self._look()

    def _look(self) -> None:
        running = []
        for record in read_records(self._plan.trials_folder):
            if record["status"] not in FINAL:
                running.append(record)
            elif record["trial"] not in self._told:
                self._told.add(record["trial"])
                if record["trial"] not in self._before:
                    self._on_trial(record)
        if running:
            text = describe(running[0], self._plan.stages_folder)
            more = f" (and {len(running) - 1} more)" if len(running) > 1 else ""
            self._on_status(len(self._told), text + more)


def describe(record: dict[str, Any], stages_folder: Storage) -> str:
    """What a running trial is doing, in a few words."""
    trial = f"trial {record['trial']}"
    if "waits_for" in record:
        return f"{trial}: waiting for {record['waits_for'].partition('/')[2]}"
    if record["stage"] in ("calibrate", "quantize"):
        return f"{trial}: quantising"
    if record["stage"] == "evaluate":
        return f"{trial}: test-time training"
    training = stages_folder.child(str(record.get("training"))).child("run")
    known = parse_lines(training.read_bytes("intervals.jsonl") or b"")
    if not known:
        return f"{trial}: starting workers"
    last = known[-1]
    return (
        f"{trial}: training, step {last['step']}/{last['num_steps']}, "
        f"loss {last['train_loss_nats']:.3f}"
    )
