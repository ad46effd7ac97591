"""Which slots of which hosts a sweep's stages used, and for how long they stood idle.

Records say when a stage ran, where, and on how many GPUs; not on which ones. So lanes are dealt out
here: a host has as many as were in use at once, and a stage gets the lowest that are free. It says
how well a cluster was used, never what a certain GPU did.

Invariant: no two spans overlap in a lane; idle time is lanes times the time looked at less what was
busy, and is never negative.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

GAP_S: Final = 1800.0
"""Where nothing runs anywhere for so long, the cluster is taken to be given back: not idle."""

NO_HOST: Final = "host not recorded"

Slot = Literal["GPU", "worker"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """One stage of one trial, on one host."""

    began_s: float
    ended_s: float
    stage: str
    host: str
    name: str = ""
    """Of the trial."""
    slots: int = 1
    """Lanes that it takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """A span and its lanes."""

    span: Span
    lanes: tuple[int, ...]
    """Of its host, from 0, in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """How much of some lanes was used."""

    lanes: int
    span_s: float
    """The time looked at."""
    busy_s: float
    """Summed over lanes."""

    @property
    def idle_s(self) -> float:
        """What is left of all lanes' time."""
        return max(0.0, self.lanes * self.span_s - self.busy_s)

    @property
    def busy_share(self) -> float:
        """Part of the time that lanes were in use; 0 where there is none."""
        whole = self.lanes * self.span_s
        return min(1.0, self.busy_s / whole) if whole > 0 else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """All spans in their lanes."""

    slot: Slot
    placed: tuple[Placed, ...]
    lanes: Mapping[str, int]
    """Lanes of each host."""
    stretches: tuple[tuple[float, float], ...]
    """When the cluster was in use: beginnings and ends, in seconds since 1970."""
    use: Use


def timeline_of(records: Iterable[Mapping[str, Any]], gap_s: float = GAP_S) -> Timeline:
    """The timeline of some records; one without spans where none of them says when it ran."""
    slot, spans = spans_of(records)
    placed = assign(spans)
    lanes: dict[str, int] = {}
    for one in placed:
        lanes[one.span.host] = max(lanes.get(one.span.host, 0), *(lane + 1 for lane in one.lanes))
    stretches = stretches_of(spans, gap_s)
    use = Use(
        lanes=sum(lanes.values()),
        span_s=math.fsum(ended - began for began, ended in stretches),
        busy_s=math.fsum(s.slots * (s.ended_s - s.began_s) for s in spans),
    )
    return Timeline(
        slot=slot, placed=placed, lanes=dict(sorted(lanes.items())), stretches=stretches, use=use
    )


def spans_of(records: Iterable[Mapping[str, Any]]) -> tuple[Slot, list[Span]]:
    """Spans of records, and what their lanes are.

    Where any stage had a GPU, lanes are GPUs, and stages without one take none; a stage with a
    part of a GPU is shown on one of its own. Otherwise each stage takes one worker's slot.
    """
    told = [
        (record, span)
        for record in records
        for span in record.get("spans") or ()
        if _is_time(span.get("began_unix_s")) and _is_time(span.get("ended_unix_s"))
    ]
    slot: Slot = "GPU" if any(_gpus(span) for _, span in told) else "worker"
    spans = []
    for record, span in told:
        slots = math.ceil(_gpus(span)) if slot == "GPU" else 1
        if slots:
            began = float(span["began_unix_s"])
            spans.append(
                Span(
                    began_s=began,
                    ended_s=max(began, float(span["ended_unix_s"])),
                    stage=str(span.get("stage") or "?"),
                    host=str(span.get("host") or NO_HOST),
                    name=str(record.get("name") or f"trial {record.get('trial')}"),
                    slots=slots,
                )
            )
    return slot, spans


def assign(spans: Sequence[Span]) -> tuple[Placed, ...]:
    """Spans in lanes, by their beginning; each gets the lowest that are free on its host."""
    free: dict[str, list[int]] = {}
    used: dict[str, list[tuple[float, int]]] = {}
    opened: dict[str, itertools.count[int]] = {}
    placed = []
    for span in sorted(spans, key=lambda s: (s.began_s, s.ended_s)):
        lanes = free.setdefault(span.host, [])
        busy = used.setdefault(span.host, [])
        fresh = opened.setdefault(span.host, itertools.count())
        while busy and busy[0][0] <= span.began_s:
            heapq.heappush(lanes, heapq.heappop(busy)[1])
        mine = [heapq.heappop(lanes) if lanes else next(fresh) for _ in range(span.slots)]
        for lane in mine:
            heapq.heappush(busy, (span.ended_s, lane))
        placed.append(Placed(span=span, lanes=tuple(sorted(mine))))
    return tuple(placed)


def stretches_of(spans: Iterable[Span], gap_s: float = GAP_S) -> tuple[tuple[float, float], ...]:
    """Times in which something ran, those with less than a gap between them in one."""
    found: list[tuple[float, float]] = []
    for began, ended in sorted((s.began_s, s.ended_s) for s in spans):
        if found and began - found[-1][1] <= gap_s:
            found[-1] = (found[-1][0], max(found[-1][1], ended))
        else:
            found.append((began, ended))
    return tuple(found)


def _gpus(span: Mapping[str, Any]) -> float:
    gpus = span.get("gpus")
    return float(gpus) if isinstance(gpus, (int, float)) and gpus > 0 else 0.0


def gpu_seconds(spans: Iterable[Mapping[str, Any]]) -> float:
    """What spans of a record held of GPUs."""
    return math.fsum(
        _gpus(span) * max(0.0, float(span["ended_unix_s"]) - float(span["began_unix_s"]))
        for span in spans
        if _is_time(span.get("began_unix_s")) and _is_time(span.get("ended_unix_s"))
    )


def held_gpu_s(record: Mapping[str, Any]) -> float | None:
    """GPU-seconds that a record's stages held, those that failed and a finalist's too; None where
    nothing is known of any."""
    if record.get("spans"):
        return gpu_seconds(record["spans"])
    # Older records, and what is no trial, have sums alone.
    told = [record.get(name) for name in ("train_gpu_s", "evaluate_gpu_s")]
    known = [float(value) for value in told if isinstance(value, (int, float))]
    return math.fsum(known) if known else None


def gpu_hours(records: Iterable[Mapping[str, Any]]) -> float:
    """GPU-hours that the stages of some records held."""
    return math.fsum(held_gpu_s(record) or 0.0 for record in records) / 3600


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
