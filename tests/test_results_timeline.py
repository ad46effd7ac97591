"""Lanes of the timeline: nothing overlaps, and no time is lost or made."""

from __future__ import annotations

import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from golf_ray.results.timeline import Span, assign, gpu_hours, held_gpu_s, stretches_of, timeline_of

SPANS = st.lists(
    st.builds(
        lambda began, length, host, slots: Span(
            began_s=began, ended_s=began + length, stage="train", host=host, slots=slots
        ),
        st.floats(0, 1e4, allow_nan=False),
        st.floats(0.5, 500, allow_nan=False),
        st.sampled_from(["a", "b"]),
        st.integers(1, 8),
    ),
    max_size=25,
)


@given(SPANS)
def test_no_two_spans_overlap_in_a_lane_and_each_has_its_slots(spans: list[Span]) -> None:
    placed = assign(spans)
    assert sorted(map(id, (one.span for one in placed))) == sorted(map(id, spans))
    busy: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for one in placed:
        assert len(set(one.lanes)) == one.span.slots
        for lane in one.lanes:
            busy.setdefault((one.span.host, lane), []).append((one.span.began_s, one.span.ended_s))
    for times in busy.values():
        times.sort()
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(times))


def test_gpu_hours_are_what_was_held_whether_or_not_it_came_to_something() -> None:
    def span(stage: str, seconds: float, gpus: float) -> dict[str, object]:
        return {"stage": stage, "began_unix_s": 1e9, "ended_unix_s": 1e9 + seconds, "gpus": gpus}

    failed = {"status": "failed", "spans": [span("train", 450.0, 8), span("train", 900.0, 8)]}
    shared = {"status": "done", "spans": [], "train_gpu_s": 0.0, "evaluate_gpu_s": 0.0}
    older = {"status": "done", "train_gpu_s": 3600.0, "evaluate_gpu_s": 1800.0}
    small = {"status": "done", "spans": [span("quantize", 60.0, 0.5)], "evaluate_gpu_s": None}
    assert gpu_hours([failed, shared, older, small, {}]) == 3.0 + 1.5 + 30 / 3600
    assert held_gpu_s({"status": "running", "spans": []}) is None
    assert held_gpu_s(shared) == 0.0 and held_gpu_s(small) == 30.0


@given(SPANS)
def test_busy_and_idle_are_all_of_the_time(spans: list[Span]) -> None:
    records = [
        {
            "trial": 1,
            "spans": [
                {"stage": s.stage, "began_unix_s": 1e9 + s.began_s, "ended_unix_s": 1e9 + s.ended_s,
                 "gpus": s.slots, "host": s.host}
            ],
        }
        for s in spans
    ]  # fmt: skip
    found = timeline_of(records)
    busy_s = math.fsum(s.slots * (s.ended_s - s.began_s) for s in spans)
    # Times since 1970 are floats of 1e-7 s.
    assert math.isclose(found.use.busy_s, busy_s, abs_tol=1e-4)
    whole_s = found.use.lanes * found.use.span_s
    assert math.isclose(found.use.idle_s + found.use.busy_s, whole_s, abs_tol=1e-4)
    assert 0 <= found.use.busy_share <= 1


def test_hours_in_which_nothing_ran_are_not_idle() -> None:
    spans = [
        Span(began_s=began, ended_s=began + 10, stage="train", host="a") for began in (0, 50, 9_000)
    ]
    assert stretches_of(spans, gap_s=100.0) == ((0, 60), (9_000, 9_010))


def test_records_of_old_versions_have_no_timeline() -> None:
    assert timeline_of([{"trial": 1}, {"trial": 2, "spans": []}]).placed == ()
