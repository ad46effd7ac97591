"""A run folder of `golf-ray train` as a record of results.

Invariant: what the folder does not say is missing; a run without a result is running, or what its
last event says, or interrupted where who ran it is seen to be gone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from golf_ray import fingerprint
from golf_ray.results.migration import Record
from golf_ray.results.schema import SCHEMA
from trainers.claims import claims_of_drivers
from trainers.storage import Storage, parse_lines

CONFIG_FILE = "config.json"
RESULT_FILES = ("outcome.json", "result.json")
"""The first of them says all that the second does."""
EVENTS_FILE = "events.jsonl"
INTERVALS_FILE = "intervals.jsonl"

LEFT: Final = "nobody runs it any more: resume it"
"""Why a run was interrupted whose driver could not say so."""

OnProblem = Callable[[str], None]


def read_run(storage: Storage, on_problem: OnProblem) -> Record | None:
    """The record of a run folder; None where its configuration cannot be read."""
    # Asked first: who is gone by now has written all that he ever will.
    left = claims_of_drivers(storage, "a reader").is_left()
    config = _json(storage, CONFIG_FILE, on_problem)
    if config is None or not isinstance(config.get("train"), dict):
        if config is not None:
            on_problem(f"{storage.uri_of(CONFIG_FILE)} is no configuration of a run")
        return None
    record: Record = {
        "schema": SCHEMA,
        "trial": None,
        "knobs": {},
        "config": config,
        "config_fingerprint": fingerprint.of_value(config),
        "seed": config["train"].get("seed"),
        "status": "running",
        "stage": "train",
        "num_workers": config.get("cluster", {}).get("num_workers"),
    }
    _take_events(record, parse_lines(storage.read_bytes(EVENTS_FILE) or b""))
    ended = next(
        (found for name in RESULT_FILES if (found := _json(storage, name, on_problem))), None
    )
    intervals = parse_lines(storage.read_bytes(INTERVALS_FILE) or b"")
    last = intervals[-1] if intervals and isinstance(intervals[-1], dict) else {}
    if ended is not None:
        _take_result(record, ended)
    else:
        names = ("tokens", "train_loss_nats", "elapsed_s")
        record.update({name: last.get(name) for name in names}, steps=last.get("step"))
    if ended is None or ended.get("val_bpb") is None:
        record["val_bpb"] = last.get("val_bpb")
    if left and record["status"] == "running":
        record.update(status="interrupted", reason=LEFT)
    record.update(val_tokens_scored=last.get("val_tokens"), val_bytes_scored=last.get("val_bytes"))
    return record


def _take_events(record: Record, events: list[Any]) -> None:
    """Times, restarts and how it ended, as the driver of a training on Ray wrote it."""
    events = [event for event in events if isinstance(event, dict)]
    times = [event["unix_s"] for event in events if isinstance(event.get("unix_s"), (int, float))]
    runs = [event for event in events if event.get("kind") == "run"]
    if times:
        record["began_unix_s"] = times[0]
    if runs:
        record["restarts"] = sum(event.get("kind") == "restarted" for event in events)
        record["attempts"] = len(runs)
        record["num_workers"] = runs[-1].get("num_workers", record["num_workers"])
    if events and events[-1].get("kind") == "run_ended":
        record["ended_unix_s"] = times[-1] if times else None
        error = events[-1].get("error")
        if error == KeyboardInterrupt.__name__:
            record.update(status="interrupted", reason="it was stopped by hand: resume it")
        elif error is not None:
            record.update(status="failed", reason=" ".join(str(error).split()))


def _take_result(record: Record, ended: Mapping[str, Any]) -> None:
    result = ended.get("result", ended)
    record.update(
        status="done",
        stage=None,
        reason=None,
        trained=True,
        train_s=ended.get("wall_s"),
        start_s=ended.get("start_s", result.get("to_first_step_s")),
        device=result.get("device_name") or ended.get("device"),
        val_bpb=ended.get("val_bpb"),
        num_workers=ended.get("num_workers", 1 if "result" not in ended else None),
    )
    for name in ("steps", "tokens", "train_loss_nats", "compile_s", "elapsed_s", "tokens_per_s",
                 "tokens_per_s_looping", "peak_memory_bytes"):  # fmt: skip
        record[name] = result.get(name)
    provenance = result.get("provenance")
    record.update(provenance if isinstance(provenance, dict) else {})
    if isinstance(ended.get("restarts"), list):
        record["restarts"] = max(len(ended["restarts"]), record.get("restarts") or 0)


def _json(storage: Storage, name: str, on_problem: OnProblem) -> dict[str, Any] | None:
    data = storage.read_bytes(name)
    if data is None:
        return None
    try:
        found = json.loads(data)
    except ValueError as error:
        on_problem(f"{storage.uri_of(name)} is damaged ({error})")
        return None
    if not isinstance(found, dict):
        on_problem(f"{storage.uri_of(name)} is damaged (no JSON object)")
        return None
    return found
