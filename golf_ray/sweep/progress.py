"""A sweep's progress, read from its files while it runs: what trials say, and where one stands.

Everything shown comes from records on disk, so it is what anybody else who looks sees too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from golf_ray.records import read_jsonl
from golf_ray.sweep.runner import SweepPlan
from golf_ray.sweep.table import read_records

POLL_S = 0.5

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
        while not self._stop.wait(POLL_S):
            self._look()

    def _look(self) -> None:
        running = None
        for record in read_records(self._plan.trials_folder):
            if record["status"] == "running":
                running = record
            elif record["trial"] not in self._told:
                self._told.add(record["trial"])
                self._on_trial(record)
        if running is not None:
            self._on_status(len(self._told), describe(running, self._plan.stages_folder))


def describe(record: dict[str, Any], stages_folder: Path) -> str:
    """What a running trial is doing, in a few words."""
    trial = f"trial {record['trial']}"
    if record["stage"] == "quantize":
        return f"{trial}: quantising"
    if record["stage"] == "evaluate":
        return f"{trial}: test-time training"
    intervals = stages_folder / str(record.get("training")) / "intervals.jsonl"
    known = read_jsonl(intervals)
    if not known:
        return f"{trial}: starting workers"
    last = known[-1]
    return (
        f"{trial}: training, step {last['step']}/{last['num_steps']}, "
        f"loss {last['train_loss_nats']:.3f}"
    )
