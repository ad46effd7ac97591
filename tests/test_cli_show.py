"""`golf-ray show` and `golf-ray status --watch`: what is there, in a pipe and on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

import pytest
from cli_runner import golf_ray, golf_ray_process, subprocess_environment
from results_made import Made, make_ledger, make_log, make_run, make_sweep

from trainers.claims import DRIVER, Claims
from trainers.storage import Storage

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
MARKUP = "odd [bold]reason[/] \x1b[31m red"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_sweep(tmp_path_factory.mktemp("made") / "store", "nightly", num_documents=5)


def test_every_kind_of_place_is_shown(made: Made, tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    make_ledger(tmp_path / "ledger", 12)
    make_log(tmp_path / "train.log")
    for place, words in (
        (tmp_path / "run", ("loss", "speed", "configured")),
        (tmp_path / "ledger", ("12 documents",)),
        (tmp_path / "train.log", ("1.07258", "public")),
        (made.folder, ("trials ended", "--set train.warmdown_frac=")),
    ):
        outcome = golf_ray("show", place)
        assert outcome.status == 0 and all(word in outcome.out for word in words), outcome.out
        assert golf_ray("show", place, "--json").json
    text = golf_ray("show", "nightly:1", "--storage", made.storage).out
    assert "trial" in text and "train.warmdown_frac" in text and "parents" in text


def test_lines_fit_and_hold_no_escapes_in_a_pipe(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for argv in (("show", "nightly"), ("show", "nightly:2"), ("status", "nightly")):
        outcome = golf_ray_process(*argv, "--storage", made.storage)
        assert "\x1b" not in outcome.out
        # What is to be copied stays in one piece: paths and commands.
        lines = [line for line in outcome.out.splitlines() if " " in line.strip()]
        lines = [line for line in lines if not line.startswith("golf-ray ")]
        assert max(map(len, lines)) <= 80


def test_odd_reasons_are_text(tmp_path: Path) -> None:
    made = make_sweep(tmp_path / "store", "odd", num_trials=4, share=1, num_documents=0)
    path = sorted((made.folder / "trials").glob("*.json"))[0]
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "status": "failed", "reason": MARKUP}))
    for verb in ("show", "status"):
        text = golf_ray(verb, "odd", "--storage", made.storage).out
        assert "odd [bold]reason[/]" in text and "\x1b" not in text


@pytest.mark.parametrize(
    ("place", "expected"),
    [("nigthly", "did you mean 'nightly'"), ("nightly:99", "99"), ("", "names nothing")],
)
def test_what_is_not_there_is_one_line(made: Made, place: str, expected: str) -> None:
    assert expected in golf_ray("show", place, "--storage", made.storage).error


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path) -> None:
    assert str(tmp_path) in golf_ray("show", tmp_path).error


# Watching -----------------------------------------------------------------------------------------


def unfinished(folder: Path) -> tuple[Made, Callable[[], None]]:
    """A sweep with two trials that run, and what ends them one after the other."""
    made = make_sweep(
        folder / "store", "live", num_trials=4, share=1, num_documents=0, all_done=True,
        num_finals=0,
    )  # fmt: skip
    plan = json.loads((made.folder / "sweep.json").read_text())
    (made.folder / "sweep.json").write_text(json.dumps({**plan, "num_trials": 4}))
    paths = sorted((made.folder / "trials").glob("*.json"))[2:]
    whole = [json.loads(path.read_text()) for path in paths]
    for path, record in zip(paths, whole, strict=True):
        running = {**record, "status": "running", "stage": "evaluate", "ended_unix_s": None}
        path.write_text(json.dumps(running))

    def end() -> None:
        for path, record in zip(paths, whole, strict=True):
            time.sleep(0.6)
            beside = path.with_suffix(".tmp")
            beside.write_text(json.dumps(record))
            os.replace(beside, path)

    return made, end


@pytest.mark.parametrize("terminal", [False, True])
def test_watching_ends_with_the_sweep(tmp_path: Path, terminal: bool) -> None:
    made, end = unfinished(tmp_path)
    argv = [
        sys.executable, "-m", "golf_ray", "status", "live", "--watch", "--every", "0.2",
        "--storage", str(made.storage),
    ]  # fmt: skip
    ours, theirs = pty.openpty() if terminal else os.pipe()
    environment = {**subprocess_environment(), "COLUMNS": "80", "LINES": "24", "TERM": "xterm"}
    process = Popen(argv, stdout=theirs, env=environment)
    os.close(theirs)
    said = b""
    claim = Claims(Storage(made.folder).child(DRIVER), "the driver of this test").take()
    assert claim is not None

    def drive() -> None:
        with claim:
            end()

    ending = threading.Thread(target=drive)
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:
            # The other end of a terminal is gone.
            break
        if not part:
            break
        if not said:
            ending.start()
        said += part
    os.close(ours)
    assert process.wait(timeout=30) == 0
    ending.join()
    text = said.decode()
    assert ("\x1b" in text) == terminal
    plain = ESCAPE.sub("", text)
    assert "4 of 4 trials" in plain and "ended" in plain
    if not terminal:
        assert [n in plain for n in ("trial 3", "trial 4")] == [True, True]
