"""How a sweep stands, in words: one line for each thing, for a terminal, a pipe or a log.

Invariant: a line is one line, whatever a record says, and holds no control characters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from golf_ray.results.drawing import clean
from golf_ray.results.schema import FINAL

if TYPE_CHECKING:
    from golf_ray.results.migration import Record
    from golf_ray.results.standing import Look

STAGES: Final = {
    "train": "training",
    "calibrate": "quantising",
    "quantize": "quantising",
    "evaluate": "test-time training",
}


def summary_line(look: Look) -> str:
    """A sweep in one line."""
    summary = look.summary()
    parts = [
        f"{look.sweep.name}: {look.state}, {len(look.ended)} of {look.sweep.num_trials} trials"
    ]
    parts += misses(summary)
    if summary["best"] is not None:
        parts.append(f"best {score_text(look, summary['best'])} (trial {summary['best_trial']})")
    elif summary["done"]:
        parts.append("none within the limits")
    if summary["gpu_hours"]:
        parts.append(f"{summary['gpu_hours']:.2f} GPU-hours")
    return ", ".join(parts)


def misses(summary: dict[str, Any]) -> list[str]:
    """Trials that ended without a score that counts, by how they ended."""
    names = [name for name in FINAL if name != "done" and summary[name]]
    return [f"{summary[name]} {name.replace('_', ' ')}" for name in names]


def changes(before: Look, after: Look) -> Iterator[str]:
    """What happened between two looks, a line each."""
    known = {record["trial"]: record for record in before.records}
    best = {one.trial for one in after.improvements()}
    for record in after.records:
        old = known.get(record["trial"], {})
        if _moment(record) == _moment(old):
            continue
        if record["status"] in FINAL and record["status"] != old.get("status"):
            yield outcome(after, record, record["trial"] in best)
        elif record.get("final") and not old.get("final"):
            yield measured(record)
        elif record["status"] not in FINAL:
            yield f"trial {record['trial']}: {_stage(record)}"
    if after.state != before.state:
        yield f"{after.sweep.name}: {after.state}"
    yield from (clean(p) for p in after.problems if p not in before.problems)


def outcome(look: Look, record: Record, improved: bool) -> str:
    """How a trial ended."""
    trial = f"trial {record['trial']}"
    if record["status"] != "done":
        reason = clean(record.get("reason") or "no reason is known")
        return f"{trial}: {record['status'].replace('_', ' ')}: {reason}"
    value = (record.get("values") or {}).get(look.objective)
    score = (
        f", {look.objective} {score_text(look, value)}" if isinstance(value, (int, float)) else ""
    )
    return f"{trial}: done{score}{', the best so far' if improved else ''}"


def measured(record: Record) -> str:
    """A finalist's score on everything."""
    final = record["final"]
    size = f"{final['total_bytes']:,} bytes" + ("" if final["fits"] else ", OVER THE LIMIT")
    score = f"{final['ttt_bpb']:.5f} bpb with TTT"
    return f"trial {record['trial']}: measured on everything, {score}, {size}"


def time_left(look: Look) -> str | None:
    """About how long the rest will take, and what that is reckoned from."""
    left_s = look.left_s()
    if left_s is None:
        return None
    ended = len(look.ended)
    if ended == look.sweep.num_trials:
        return "all trials ended; finalists are being measured"
    trials = "trial" if ended == 1 else "trials"
    return f"about {about(left_s)} left, by {ended} {trials} in {about(look.worked_s())}"


def about(seconds: float) -> str:
    """Seconds in the two units that matter."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, rest = divmod(minutes, 60)
    if hours >= 24:
        days, hours_left = divmod(round(seconds / 3600), 24)
        return f"{days} d {hours_left} h"
    return f"{hours} h {rest:02d} min" if hours else f"{minutes} min"


def score_text(look: Look, value: float) -> str:
    """A value of what is searched for."""
    return f"{value:,.0f}" if look.objective == "total_bytes" else f"{value:.5f}"


def _moment(record: Any) -> tuple[Any, ...]:
    stage = record.get("stage") if record.get("status") not in FINAL else None
    return record.get("status"), stage, record.get("waits_for"), bool(record.get("final"))


def _stage(record: Record) -> str:
    waits_for = record.get("waits_for")
    if isinstance(waits_for, str):
        return f"waiting for {clean(waits_for.partition('/')[2])}"
    return STAGES.get(str(record.get("stage")), "running")
