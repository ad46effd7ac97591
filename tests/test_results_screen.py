"""What runs and sweeps look like on a terminal: characters, lines that fit, words that are true."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from results_made import BEGAN_UNIX_S, make_sweep
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement

from golf_ray.errors import StorageError
from golf_ray.presets import PRESETS, preset
from golf_ray.results.drawing import bar, clean, curve, sparkline
from golf_ray.results.gathering import failures_of
from golf_ray.results.page import broken
from golf_ray.results.screen import loss_plot
from golf_ray.results.settings import command_lines, differences, preset_of, settings_of
from golf_ray.results.standing import Look, Sweep, SweepReader, covered_s
from golf_ray.results.sweep_screen import fitting_table
from golf_ray.results.watching import SweepScreen
from golf_ray.results.words import about, changes, summary_line, time_left
from trainers.claims import DRIVER, Claims
from trainers.storage import Storage

numbers = st.floats(allow_nan=True, allow_infinity=True, width=32)
odd_text = st.text(alphabet=st.sampled_from("ab [/]\\\x1b\x00\n\t\u202e\ud800é漢"), max_size=40)


# Characters ---------------------------------------------------------------------------------------


@given(st.lists(st.none() | numbers, max_size=60), st.integers(-2, 30), st.booleans())
def test_a_sparkline_fits_and_its_ends_are_the_extremes(
    values: list[float | None], width: int, ascii_only: bool
) -> None:
    marks = sparkline(values, width, ascii_only=ascii_only)
    assert len(marks) == min(len(values), max(0, width))
    assert not ascii_only or marks.isascii()
    known = [v for v in values if v is not None and math.isfinite(v)]
    if width >= len(values) and len(set(known)) > 1:
        high, low = values.index(max(known)), values.index(min(known))
        assert marks[high] == "█#"[ascii_only] and marks[low] == "▁_"[ascii_only]


@given(numbers, numbers, st.integers(0, 50), st.booleans())
def test_a_bar_fits_and_what_is_not_nothing_is_seen(
    value: float, largest: float, width: int, ascii_only: bool
) -> None:
    marks = bar(value, largest, width, ascii_only=ascii_only)
    assert len(marks) <= width
    seen = width > 0 and 0 < value < math.inf and 0 < largest < math.inf
    assert bool(marks) == seen


@given(
    st.lists(st.tuples(st.floats(-10, 1000), numbers), max_size=40),
    st.integers(1, 40), st.integers(1, 10), st.booleans(),
)  # fmt: skip
@settings(max_examples=50)
def test_a_curve_is_a_block_of_its_size(
    points: list[tuple[float, float]], width: int, height: int, ascii_only: bool
) -> None:
    points.sort(key=lambda point: point[0])
    rows = curve(
        points, width, height, x_range=(0.0, 900.0), y_range=(2.0, 5.0), ascii_only=ascii_only
    )
    assert len(rows) == height and all(len(row) <= width for row in rows)


@pytest.mark.parametrize("ascii_only", [True, False])
def test_a_curve_goes_where_its_points_go(ascii_only: bool) -> None:
    falling = [(float(x), 10.0 - x) for x in range(11)]
    rows = curve(falling, 11, 11, x_range=(0.0, 10.0), y_range=(0.0, 10.0), ascii_only=ascii_only)
    widths = [len(row) for row in rows]
    if ascii_only:
        assert widths == list(range(1, 12)), "one step to the right a row"
    else:
        # A character holds eight points there, so a row may end in the next one's column.
        assert widths == sorted(widths) and widths[-1] == 11
        assert all(abs(width - row) <= 1 for row, width in enumerate(widths, 1))
    flat = curve([(0.0, 3.0), (9.0, 3.0)], 10, 3, x_range=(0, 9), y_range=(3.0, 3.0))
    assert [bool(row) for row in flat] == [False, True, False] and len(flat[1]) == 10


def test_the_first_losses_do_not_flatten_the_others() -> None:
    points = [(float(i), 9.0 if i == 1 else 3.0 - i / 200) for i in range(1, 101)]
    lines = loss_plot(points, 60)
    assert lines[0].split()[0] == "2.970" and lines[-2].split()[0] == "2.500"
    assert lines[-1].split() == ["0", "step", "100"]
    assert all(cell_len(line) <= 60 for line in lines)


@given(odd_text)
def test_a_clean_text_does_nothing_to_a_terminal(text: str) -> None:
    line = clean(text)
    assert line.isprintable() and (line == text or not text.isprintable())


@given(st.lists(st.text(alphabet="ab漢[", min_size=1, max_size=20), max_size=12),
       st.integers(1, 40))  # fmt: skip
def test_lines_are_broken_between_words_alone(words: list[str], width: int) -> None:
    text = " ".join(words)
    lines = broken(text, width)
    assert " ".join(lines) == text
    assert all(cell_len(line) <= width or " " not in line for line in lines)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.42, "0.4 s"), (59.6, "60 s"), (150, "2 min"), (3_600, "1 h 00 min"), (97_000, "1 d 3 h")],
)
def test_durations_have_two_units_at_most(seconds: float, text: str) -> None:
    assert about(seconds) == text


# Configurations -----------------------------------------------------------------------------------

CHANGES: dict[str, st.SearchStrategy[Any]] = {
    "train.warmdown_frac": st.floats(0.1, 0.9),
    "train.max_wallclock_s": st.none() | st.floats(20, 1e4),
    "train.muon_row_normalize": st.booleans(),
    "adaptation.sites": st.sampled_from([["k"], ["q", "k"], []]),
    "adaptation.chunk_size": st.sampled_from([16, 32, 48]),
    "data.dir": st.sampled_from(["data", "/mnt/a b", "it's", "$HOME/x"]),
}


@given(st.sampled_from(sorted(PRESETS)), st.fixed_dictionaries({}, optional=CHANGES))
def test_the_command_that_is_shown_makes_the_configuration(
    name: str, changed: dict[str, Any]
) -> None:
    config = preset(name).with_overrides(changed)
    plain = json.loads(config.to_json())
    searched = {k: v for k, v in changed.items() if k == "adaptation.chunk_size"}
    lines = command_lines(
        ["golf-ray", "train", "--preset", preset_of(plain)], settings_of(plain, searched)
    )
    words = shlex.split("\n".join(lines).replace("\\\n", ""))
    assert words[:4] == ["golf-ray", "train", "--preset", name]
    assert words[4::2] == ["--set"] * len(words[5::2])
    assert preset(name).with_overrides(words[5::2]) == config
    shown = {d.field for d in differences(plain, searched)}
    assert set(searched) <= shown <= set(changed), "a searched field is shown in any case"


def test_a_configuration_of_another_version_is_shown_as_it_is() -> None:
    config = {"name": "mine", "train": {"novel": 3}, "later": {"a": [1]}}
    assert preset_of(config) == "record"
    found = [(d.field, d.value, d.preset) for d in differences(config, {})]
    assert found == [("train.novel", 3, None), ("later.a", [1], None)]


# Sweeps -------------------------------------------------------------------------------------------


def reader(folder: Path) -> SweepReader:
    return SweepReader(Sweep.in_folder(Storage(folder)))


def screen(look: Look, width: int, height: int, **options: Any) -> list[str]:
    """The lines that a terminal would get, without colours."""
    console = Console(width=width, height=height, file=io.StringIO(), color_system=None)
    with console.capture() as captured:
        console.print(SweepScreen(look, every_s=2.0, **options))
    return captured.get().split("\n")[:-1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sweep(tmp_path_factory.mktemp("s"), "nightly", num_documents=0).folder


@given(st.integers(20, 130), st.integers(8, 50))
@settings(max_examples=25)
def test_the_live_screen_fits_any_terminal(made: Path, width: int, height: int) -> None:
    look = reader(made).look()
    lines = screen(look, width, height, trouble="the [bold]network\x1b[2J is down")
    assert len(lines) <= height and all(cell_len(line) <= width for line in lines)
    assert "\x1b" not in "".join(lines) and lines[0].startswith("nightly")


def test_the_live_screen_says_what_matters(made: Path) -> None:
    with Claims(Storage(made / DRIVER), "its driver").take():  # type: ignore[union-attr]
        look = reader(made).look()
    text = "\n".join(screen(look, 80, 24))
    best = look.best
    assert best is not None and f"ttt_bpb {best['ttt_bpb']:.5f} (trial {best['trial']})" in text
    assert "23 of 24, 1 running, 2 over limit, 2 failed" in text
    assert "trial 24: training, step" in text or "trial 24: starting workers" in text
    assert "by 23 trials in" in text and "GPU-hours" in text
    assert "trial 22: over limit: " in text


def test_time_left_counts_the_time_in_which_trials_ran(tmp_path: Path) -> None:
    made = make_sweep(tmp_path, num_trials=4, share=1, all_done=True, num_documents=0)
    for i, path in enumerate(sorted((made.folder / "trials").iterdir())):
        record = json.loads(path.read_text())
        # A night lies between the second and the third.
        began = BEGAN_UNIX_S + 100 * i + (40_000 if i > 1 else 0)
        record.update(began_unix_s=began, ended_unix_s=began + 100)
        path.write_text(json.dumps(record))
    plan = made.folder / "sweep.json"
    plan.write_text(plan.read_text().replace('"num_trials": 4', '"num_trials": 6'))
    with Claims(Storage(made.folder / DRIVER), "its driver").take():  # type: ignore[union-attr]
        look = reader(made.folder).look()
    assert look.worked_s() == 400 and look.left_s() == 200
    assert time_left(look) == "about 3 min left, by 4 trials in 7 min"
    assert reader(made.folder).look().left_s() is None, "nobody runs it"


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=12))
def test_covered_time_is_that_of_the_union(spans: list[tuple[int, int]]) -> None:
    seconds = {s for began, long in spans for s in range(began, began + long)}
    assert covered_s([(began, began + long) for began, long in spans]) == len(seconds)


def test_a_final_record_is_read_once_until_finalists_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_sweep(tmp_path, num_trials=12, num_documents=0, num_finals=0)
    read: list[str] = []
    before = Storage.read_bytes

    def counted(self: Storage, name: str) -> bytes | None:
        read.append(name)
        return before(self, name)

    looking = reader(made.folder)
    monkeypatch.setattr(Storage, "read_bytes", counted)
    assert len(looking.look().records) == 12 and len(read) == 12
    read.clear()
    assert len(looking.look().records) == 12 and read == ["00012.json"]
    last = made.folder / "trials" / "00012.json"
    last.write_text(last.read_text().replace('"status": "running"', '"status": "failed"'))
    looking.look()
    read.clear()
    best = looking.look().best
    assert best is not None and len(read) == 3, "those that may be measured are read again"
    path = made.folder / "trials" / f"{best['trial']:05d}.json"
    final = {"ttt_bpb": 1.07, "total_bytes": 15_900_000, "fits": True, "artifacts": []}
    path.write_text(json.dumps({**json.loads(path.read_text()), "final": final}))
    old, new = looking._final[path.name], looking.look()
    assert "final" not in old and new.best is not None and new.best["final"] == final


def test_a_damaged_record_is_a_line_and_the_rest_is_read(tmp_path: Path) -> None:
    made = make_sweep(tmp_path, num_trials=6, num_documents=0)
    (made.folder / "trials" / "00002.json").write_text('{"torn')
    look = reader(made.folder).look()
    assert len(look.records) == 5
    assert len(look.problems) == 1 and "00002.json is damaged" in look.problems[0]
    assert any("00002.json" in line for line in screen(look, 200, 24))


def test_a_reader_that_may_not_write_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_sweep(tmp_path, num_trials=3, num_documents=0)
    claims = Claims(Storage(made.folder / DRIVER), "a dead driver")
    dead = {**claims._content, "pid": 2**22 + 1}
    (made.folder / DRIVER).mkdir()
    (made.folder / DRIVER / "dead.json").write_text(json.dumps(dead))

    def refuse(self: Storage, name: str) -> None:
        raise StorageError("it is read-only")

    monkeypatch.setattr(Storage, "remove", refuse)
    assert reader(made.folder).look().state == "interrupted"


def test_a_sweep_whose_budget_is_used_up_was_not_interrupted(tmp_path: Path) -> None:
    made = make_sweep(tmp_path, num_trials=6, num_documents=0)
    looking = reader(made.folder)
    assert looking.look().state == "interrupted"
    (made.folder / "out_of_budget.json").write_text("{}")
    look = looking.look()
    again = f"golf-ray sweep --resume {made.folder.name} --storage {tmp_path}"
    assert (look.state, look.go_on) == ("out of budget", again)
    # Resumed as it is it would stop at once.
    used = dataclasses.replace(look, sweep=dataclasses.replace(look.sweep, max_gpu_hours=0.0))
    assert used.go_on == f"{again} --max-gpu-hours MORE"
    assert dataclasses.replace(look, driven=True).go_on is None


def test_changes_are_told_once_each(tmp_path: Path) -> None:
    made = make_sweep(tmp_path, num_trials=6, num_documents=0, num_finals=0)
    looking = reader(made.folder)
    before = looking.look()
    assert list(changes(before, looking.look())) == []
    path = made.folder / "trials" / "00006.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "stage": "evaluate"}))
    middle = looking.look()
    assert list(changes(before, middle)) == ["trial 6: test-time training"]
    reason = "no [bold]memory[/]\x1b[2J"
    path.write_text(json.dumps({**record, "status": "failed", "reason": reason}))
    after = looking.look()
    assert list(changes(middle, after)) == [
        "trial 6: failed: no [bold]memory[/]\\x1b[2J", f"{made.folder.name}: ended"
    ]  # fmt: skip
    assert summary_line(after).startswith(f"{made.folder.name}: ended, 6 of 6 trials, 1 failed")


def test_failures_are_grouped_by_reason_up_to_numbers() -> None:
    def failed(trial: int, reason: str | None, status: str = "failed") -> dict[str, Any]:
        return {"trial": trial, "status": status, "reason": reason}

    groups = failures_of(
        [failed(1, "no memory"), failed(2, "nan at step 212"), failed(3, "nan at step 1,300"),
         failed(4, None), failed(5, "nan at step 7", "over_limit"), failed(6, None, "done"),
         failed(7, None, "running")]
    )  # fmt: skip
    assert [(g.status, g.reason, g.alike, g.trials) for g in groups] == [
        ("failed", "nan at step 212", False, (2, 3)),
        ("failed", "no memory", True, (1,)),
        ("failed", "no reason is known", True, (4,)),
        ("over_limit", "nan at step 7", True, (5,)),
    ]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_table_loses_columns_and_never_digits(made: Path, width: int) -> None:
    look = reader(made).look()
    console = Console(width=width, file=io.StringIO(), color_system=None)
    table, left_out = fitting_table(look.records, "ttt_bpb", console)
    with console.capture() as captured:
        console.print(table)
    text = captured.get()
    assert "…" not in text and max(map(cell_len, text.split("\n"))) <= width
    assert (width >= 120) == (not left_out)
    # None of those that are missing would have had room.
    widest = console.options.update(width=10_000)
    whole, _ = fitting_table(look.records, "ttt_bpb", Console(width=1000, file=io.StringIO()))
    for column in whole.columns:
        name = str(column.header).replace("-\n", "").replace("\n", " ")
        if name in left_out:
            texts = [*str(column.header).split("\n"), *map(str, column.cells)]
            needed = max(map(cell_len, texts))
            used = Measurement.get(console, widest, table).maximum
            assert used + 1 + needed > width, name
    for record in look.records:
        if record["status"] == "done":
            assert f"{record['ttt_bpb']:.4f}" in text
