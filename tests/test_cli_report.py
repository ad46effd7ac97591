"""`golf-ray report`: one file that asks for nothing, whatever the records hold."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pandas as pd
import pytest
from cli_runner import golf_ray
from hypothesis import given
from hypothesis import strategies as st
from results_made import Made, make_log, make_run, make_sweep

from golf_ray.results.pictures.parallel import NAME_GAP, axis_of
from golf_ray.results.pictures.rows import STATUSES
from golf_ray.results.pictures.themes import SHAPES
from golf_ray.results.records import LEFT
from golf_ray.results.schema import FINAL, NOT_FINAL

ODD = "</script><script>alert(1)</script> <img src=x onerror=alert(2)> \"' &amp; \u2028 $&"
PICTURES = (
    "curves",
    "document_differences",
    "documents",
    "history",
    "importances",
    "parallel",
    "sizes",
    "timeline",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A sweep in the middle, with a reason that means harm."""
    made = make_sweep(tmp_path_factory.mktemp("made") / "store", "nightly", num_trials=48)
    for path in sorted((made.folder / "trials").glob("*.json")):
        record = json.loads(path.read_text())
        if record["status"] == "failed":
            path.write_text(json.dumps({**record, "reason": ODD}))
            break
    return made


@pytest.fixture(scope="module")
def page(made: Made, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("page") / "report.html"
    outcome = golf_ray("report", "nightly", "--storage", made.storage, "--out", out, "--json")
    assert outcome.json["trials"] == 48 and outcome.json["bytes"] == out.stat().st_size
    return out.read_text()


def test_nothing_is_loaded_from_anywhere(page: str) -> None:
    without_programs = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", without_programs)
    assert not re.search(r"@import|url\(", without_programs)
    assert "Content-Security-Policy" in page


def test_texts_of_records_are_no_markup(page: str) -> None:
    assert "alert(1)" in page
    assert "<script>alert(1)" not in page and "<img src=x" not in page


def test_every_section_has_its_picture_or_says_why_not(made: Made, page: str) -> None:
    for title in ("Summary", "Trials", "The search", "Size", "Training", "Documents", "Failures"):
        assert f">{title}<" in page
    assert "--set train.warmdown_frac=" in page
    assert "the best of" in page
    assert f"golf-ray confirm nightly --storage {made.storage}" in page


def test_every_status_looks_different_and_is_told_with_its_reason(tmp_path: Path) -> None:
    assert {status.replace(" ", "_") for status in STATUSES} == {*FINAL, *NOT_FINAL}
    assert len(set(SHAPES)) == len(SHAPES) == len(STATUSES)
    made = make_sweep(tmp_path / "store", "nightly", num_trials=24, num_documents=0)
    path = made.folder / "trials" / "00002.json"
    reason = "val_bpb 1.31 at step 300 is over 1.22, the median of 5 trainings"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "status": "pruned", "reason": reason}))
    golf_ray("report", made.folder, "--out", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    failures = page.partition('id="failures"')[2]
    assert reason in failures and LEFT in failures
    assert "1 interrupted, 1 pruned" in page
    for status in STATUSES:
        name = status.replace(" ", "-")
        assert f".status.{name} {{ color" in page and f".status.{name}::before" in page


def test_pictures_are_files_for_papers(made: Made, tmp_path: Path) -> None:
    argv = ("--storage", made.storage, "--out", tmp_path / "r.html", "--pictures", tmp_path / "p")
    outcome = golf_ray("report", "nightly", *argv, "--json")
    names = {Path(name).name for name in outcome.json["pictures"]}
    assert names == {f"{name}.{ending}" for name in PICTURES for ending in ("png", "svg")}
    for name in names:
        data = (tmp_path / "p" / name).read_bytes()
        assert data.startswith(b"\x89PNG" if name.endswith("png") else b"<svg")


@given(st.lists(st.floats(0, 1, width=16), min_size=2, max_size=6, unique=True))
def test_names_on_an_axis_are_not_on_top_of_one_another(values: list[float]) -> None:
    axis = axis_of("knob", pd.Series(values))
    assert axis is not None
    places = [place for place, _ in axis.ticks()]
    assert places[0] == 0.0 and places[-1] == 1.0
    assert all(b - a >= NAME_GAP for a, b in itertools.pairwise(places))


@pytest.mark.parametrize("kind", ["run", "log", "failed"])
def test_other_places_have_a_report_too(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "place"
    if kind == "run":
        make_run(place)
    elif kind == "log":
        place.mkdir()
        place = make_log(place / "train.log")
    else:
        made = make_sweep(place, "sad", num_trials=2, share=1, num_documents=0, num_finals=0)
        for path in (made.folder / "trials").glob("*.json"):
            record = json.loads(path.read_text())
            kept = {k: record[k] for k in ("schema", "trial", "group", "knobs", "config", "seed")}
            path.write_text(json.dumps({**kept, "status": "failed", "reason": "no memory"}))
    outcome = golf_ray("report", place, "--out", tmp_path / "r.html")
    assert outcome.status == 0 and (tmp_path / "r.html").stat().st_size > 100_000


def test_what_cannot_be_is_one_line(made: Made, tmp_path: Path) -> None:
    def failed(*argv: object) -> str:
        return golf_ray("report", *argv, "--storage", made.storage).error

    assert "did you mean 'nightly'" in failed("nigthly")
    assert "did you mean 'ttt_bpb'" in failed("nightly", "--objective", "tt_bpb")
    (tmp_path / "file").write_text("")
    assert "a part of its path is a file" in failed(
        "nightly", "--out", tmp_path / "file" / "r.html"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
