"""Logs of the public program as records, so that its runs and ours stand in one table.

The program prints its keys, then a line for every so many steps, then sizes and scores; its many
descendants spell some of these otherwise. Each line is looked at by itself, and what is not found
is missing.

Invariant: a number is taken from a line that says what it is, and the last such line counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from golf_ray.config import Config
from golf_ray.errors import ConfigError
from golf_ray.results.migration import Record
from golf_ray.results.schema import SCHEMA

OnProblem = Callable[[str], None]

_NUMBER: Final = r"[-+]?(?:\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?|nan|inf)"
_STEP: Final = re.compile(
    rf"^(?:step:\s*)?(\d+)/(\d+)\s+(?=.*\b(?:train_loss|val_loss)\s*:\s*{_NUMBER})"
)
_FIELD: Final = re.compile(rf"([\w/]+)\s*[:=]\s*({_NUMBER})([a-zA-Z]*)", re.IGNORECASE)
_SCORED: Final = re.compile(
    rf"^(.*?)\s*\bval_loss\s*[:=]\s*({_NUMBER})\s+val_bpb\s*[:=]\s*({_NUMBER})", re.IGNORECASE
)
_BYTES: Final = re.compile(
    r"^(Serialized model|Total submission size|Code size)\b([^:]*):\s*([\d,]+)", re.IGNORECASE
)
_CAPPED: Final = re.compile(r"^stopping_early:.*?train_time:\s*([\d.]+)ms.*?step:\s*(\d+)/(\d+)")
_MEMORY: Final = re.compile(r"^peak memory allocated:\s*([\d,]+)\s*MiB", re.IGNORECASE)
_ERROR: Final = re.compile(r"^[A-Za-z_][\w.]*(?:Error|Exception|Interrupt)\b")
_SIGNS: Final = (b"Hyperparameters:", b"val_bpb", b"train_loss:", b"Total submission size")
_MIB: Final = 1 << 20


def is_public_log(data: bytes) -> bool:
    """Whether a file's content looks like a log of the public program."""
    return sum(sign in data for sign in _SIGNS) >= 2


def read_log(text: str, where: str, on_problem: OnProblem) -> tuple[Record, list[dict[str, Any]]]:
    """A log's record and the rows of its training curve.

    Args:
        where: the log, for problems.
        on_problem: told where its configuration is not one that golf_ray knows.
    """
    flat = _keys(text)
    record: Record = {
        "schema": SCHEMA, "trial": None, "knobs": {}, "config": {}, "status": "running",
        "stage": "train", "seed": _whole(flat.get("seed")), "num_workers": _whole(
            flat.get("world_size")), "limit_bytes": 16_000_000, "weights": None,
    }  # fmt: skip
    _take_config(record, flat, where, on_problem)
    rows: dict[int, dict[str, Any]] = {}
    for line in text.splitlines():
        line = line.strip()
        step = _STEP.match(line)
        if step is not None:
            _take_step(rows, int(step[1]), int(step[2]), line, record)
        elif "val_bpb" in line:
            _take_score(record, line)
        else:
            _take_other(record, line)
    _conclude(record, rows)
    return record, [rows[step] for step in sorted(rows)]


def _keys(text: str) -> dict[str, Any]:
    from golf_ray.upstream import hyperparameters_in

    return hyperparameters_in(text) or {}


def _take_config(
    record: Record, flat: Mapping[str, Any], where: str, on_problem: OnProblem
) -> None:
    """The keys that golf_ray knows as a configuration; a descendant's own keys are told of."""
    from golf_ray import fingerprint
    from golf_ray.upstream import KNOWN_KEYS, config_from_upstream

    known = {key: value for key, value in flat.items() if key in KNOWN_KEYS}
    try:
        config: Config | None = config_from_upstream(known) if known else None
    except ConfigError as error:
        on_problem(f"{where}: its configuration cannot be read: {error}")
        config = None
    if config is None:
        return
    record["config"] = config.to_dict()
    if len(known) == len(flat):
        record["config_fingerprint"] = fingerprint.of_value(record["config"])


def _take_step(
    rows: dict[int, dict[str, Any]], step: int, num_steps: int, line: str, record: Record
) -> None:
    row = rows.setdefault(step, {"step": step, "num_steps": num_steps})
    for name, text, unit in _FIELD.findall(line):
        value = _number(text)
        if name == "train_loss":
            row["train_loss_nats"] = value
        elif name == "val_loss":
            row["val_loss_nats"] = value
        elif name == "val_bpb":
            row["val_bpb"] = value
        elif name == "train_time":
            row["elapsed_s"] = value * {"ms": 1e-3, "m": 60.0}.get(unit, 1.0)
        elif name == "tok/s":
            row["tokens_per_s"] = value
    batch = record["config"].get("train", {}).get("batch_tokens")
    if batch is not None:
        row["tokens"] = step * batch


def _take_score(record: Record, line: str) -> None:
    found = _SCORED.match(line)
    if found is None:
        return
    label, nats, bpb = found[1].lower(), _number(found[2]), _number(found[3])
    seconds = re.search(rf"eval_time\s*:\s*({_NUMBER})ms", line)
    if "ttt" in label:
        record.update(ttt_bpb=bpb, ttt_loss_nats=nats, weights="int6")
        if seconds is not None:
            record["evaluate_s"] = _number(seconds[1]) / 1e3
    elif "pre-quant" in label or "post-ema" in label or "post_ema" in label:
        record["val_bpb"] = bpb
    elif "sliding" not in label and ("quantized" in label or "roundtrip" in label):
        record.update(int6_bpb=bpb, weights=record["weights"] or "int6")


def _take_other(record: Record, line: str) -> None:
    if (size := _BYTES.match(line)) is not None:
        what, how, count = size[1].lower(), size[2].strip(), int(_number(size[3]))
        if what == "code size":
            record["code_bytes"] = count
        elif how and what == "serialized model":
            record.update(model_bytes=count, bytes_exact=True)
        elif how:
            record["total_bytes"] = count
    elif (capped := _CAPPED.match(line)) is not None:
        record.update(elapsed_s=float(capped[1]) / 1e3, steps=int(capped[2]))
    elif (memory := _MEMORY.match(line)) is not None:
        record["peak_memory_bytes"] = int(_number(memory[1])) * _MIB
    elif line.startswith(("Traceback (most recent call last)", "torch.OutOfMemoryError")):
        record.update(status="failed", reason=line)
    elif record["status"] == "failed" and _ERROR.match(line) is not None:
        # The last line of a traceback says what it was.
        record["reason"] = line


def _conclude(record: Record, rows: Mapping[int, dict[str, Any]]) -> None:
    """What follows from several lines."""
    losses = [s for s in sorted(rows) if rows[s].get("train_loss_nats") is not None]
    if losses:
        record["train_loss_nats"] = rows[losses[-1]]["train_loss_nats"]
    if rows:
        last = rows[max(rows)]
        record.setdefault("steps", last["step"])
        if last.get("elapsed_s") is not None:
            record.setdefault("elapsed_s", last["elapsed_s"])
        scored = [s for s in sorted(rows) if rows[s].get("val_bpb") is not None]
        if scored:
            record.setdefault("val_bpb", rows[scored[-1]]["val_bpb"])
    batch = record["config"].get("train", {}).get("batch_tokens")
    if batch is not None and record.get("steps") is not None:
        record["tokens"] = record["steps"] * batch
    total, limit = record.get("total_bytes"), record["limit_bytes"]
    if total is not None:
        record["fits"] = total <= limit
    if record["status"] == "failed":
        return
    if record.get("ttt_bpb") is not None or record.get("int6_bpb") is not None:
        over = total is not None and total > limit
        record.update(status="over_limit" if over else "done", stage=None)
        if over:
            record["reason"] = f"{total:,} bytes, {total - limit:,} over the limit"


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def _whole(value: Any) -> int | None:
    return value if type(value) is int else None
