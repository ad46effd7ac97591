"""`golf-ray export`: tables of finished, running and damaged results, on screen and in files."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from cli_runner import golf_ray, golf_ray_process, subprocess_environment
from results_made import Made, make_log, make_run, make_sweep
from test_cli_bad_input import on_small_disk

from golf_ray.results.formats import read_csv, read_json, read_parquet
from golf_ray.results.reading import load_results
from golf_ray.results.schema import IDENTITY, MEASURES

SEEDS = (
    (1337, 1.07324696, 2.77230836),
    (42, 1.07258208, 2.77059090),
    (2025, 1.07426259, 2.77493185),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A sweep of 24 trials whose driver is gone, of which some failed or are over a limit."""
    return make_sweep(tmp_path_factory.mktemp("made") / "store", "nightly")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def table(*argv: object) -> pd.DataFrame:
    """The table that a command prints as CSV."""
    done = golf_ray("export", *argv)
    assert done.status == 0 and not done.err, done.err
    return read_csv(done.out.encode())


# Formats and files --------------------------------------------------------------------------------


def test_csv_goes_to_standard_output_and_has_all_trials_and_columns(made: Made) -> None:
    frame = table(made.folder)
    knobs = list(made.records[0]["knobs"])
    assert list(frame.columns) == [c.name for c in IDENTITY] + knobs + [c.name for c in MEASURES]
    pd.testing.assert_frame_equal(frame, load_results(made.folder).trials)
    assert set(frame["status"]) == {"done", "failed", "over_limit", "interrupted"}
    assert frame.loc[frame["status"] == "failed", "reason"].str.contains("not finite").all()


def test_files_are_of_the_format_of_their_ending(made: Made, folder: Path) -> None:
    trials = load_results(made.folder).trials
    for name, read in (("a.csv", read_csv), ("a.json", read_json), ("a.parquet", read_parquet)):
        done = golf_ray("export", made.folder, "--out", name)
        assert (done.status, done.out) == (0, f"{name}: 24 rows, {trials.shape[1]} columns\n")
        pd.testing.assert_frame_equal(read((folder / name).read_bytes()), trials)
    for name, begin in (("a.md", "| source |"), ("a.tex", "% "), ("a.html", "<!DOCTYPE html>")):
        assert golf_ray("export", made.folder, "--out", name).status == 0
        text = (folder / name).read_text()
        assert text.startswith(begin) and text.count("not finite") == 2
        # Nobody gave a label.
        assert "label" not in text.replace("aria-label", "")
    assert golf_ray("export", made.folder, "--out", "b.md", "--all-columns").status == 0
    assert "| label |" in (folder / "b.md").read_text()
    assert golf_ray("export", made.folder, "--out", "a.csv", "--format", "json").status == 0
    assert len(read_json((folder / "a.csv").read_bytes())) == 24


def test_parquet_goes_into_a_pipe_and_not_onto_a_terminal(made: Made, folder: Path) -> None:
    argv = [sys.executable, "-m", "golf_ray", "export", made.folder, "--format", "parquet"]
    with open("piped", "wb") as file:
        subprocess.run(argv, stdout=file, check=True, env=subprocess_environment(), timeout=60)
    assert len(read_parquet(Path("piped").read_bytes())) == 24
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            argv, stdout=theirs, stderr=subprocess.PIPE, check=False, timeout=60,
            env=subprocess_environment(),
        )  # fmt: skip
    finally:
        os.close(theirs)
        os.close(ours)
    assert done.returncode == 2 and b"Parquet is no text for a terminal; add --out" in done.stderr


def test_a_reader_that_leaves_is_no_traceback(made: Made) -> None:
    done = subprocess.run(
        f"{sys.executable} -m golf_ray export {made.folder} --format html | head -n 1",
        shell=True, capture_output=True, text=True, env=subprocess_environment(), timeout=60,
        check=False,
    )  # fmt: skip
    assert done.stdout == "<!DOCTYPE html>\n" and "Traceback" not in done.stderr


def test_text_is_utf8_whatever_the_terminal_is(folder: Path) -> None:
    made = make_sweep(folder / "store", num_trials=1, num_documents=0)
    path = made.folder / "trials" / "00001.json"
    path.write_text(json.dumps({**made.records[0], "reason": "größer 日本"}))
    done = subprocess.run(
        [sys.executable, "-m", "golf_ray", "export", made.folder], capture_output=True, check=True,
        env={**subprocess_environment(), "PYTHONIOENCODING": "ascii"}, timeout=60,
    )  # fmt: skip
    assert read_csv(done.stdout)["reason"].tolist() == ["größer 日本"]


def test_json_is_the_table_or_with_a_file_a_summary(made: Made, folder: Path) -> None:
    document = golf_ray("export", made.folder, "--json").json
    assert len(document["rows"]) == 24 and document["table"] == "trials"
    summary = golf_ray(
        "export", made.folder, "--json", "--out", "a.csv", "--columns", "trial,ttt_bpb"
    ).json
    assert summary == {
        "file": "a.csv", "format": "csv", "table": "trials", "rows": 24,
        "columns": ["trial", "ttt_bpb"], "problems": [],
    }  # fmt: skip
    done = golf_ray("export", made.folder, "--json", "--format", "csv")
    assert done.status == 2 and "both want standard output" in done.error


def test_curves_and_documents_are_tables_too(made: Made, folder: Path) -> None:
    intervals = table(made.folder, "--table", "intervals", "--where", "trial == 1")
    assert intervals["step"].is_monotonic_increasing and len(intervals) == 10
    documents = table(made.folder, "--table", "documents", "--columns", "trial,nats,bytes")
    assert list(documents.columns) == ["trial", "nats", "bytes"] and len(documents) > 100
    done = golf_ray("export", made.folder, "--table", "intervals", "--seeds")
    assert done.status == 2 and "--table intervals has no groups" in done.error
    done = golf_ray("export", made.folder, "--table", "intervals", "--columns", "train.muon_lr")
    assert done.status == 2 and "there is no column 'train.muon_lr'" in done.error


# Places -------------------------------------------------------------------------------------------


def test_sweeps_are_found_by_name_and_all_without_one(made: Made, folder: Path) -> None:
    make_sweep(folder / "golf-sweeps", "other", num_trials=3, num_documents=0)
    assert len(table("nightly", "--storage", made.storage)) == 24
    assert table()["source"].unique().tolist() == ["other"]
    make_run(folder / "runs" / "a")
    make_log(folder / "b.log")
    both = table("other", "runs/a", "b.log", made.folder)
    assert both["source"].unique().tolist() == ["other", "a", "b", "nightly"]
    assert both["kind"].unique().tolist() == ["trial", "run", "public"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "there is no sweep in golf-sweeps; name a PATH, or give --storage"),
        (["nightly"], "'nightly' is no path, nor a sweep in golf-sweeps; check the path"),
        (["nightli", "--storage", "{storage}"], "did you mean 'nightly'?"),
        (["no/such"], "'no/such' is no path, nor a sweep"),
        (["."], "holds nothing"),
    ],
)
def test_places_without_results(made: Made, folder: Path, argv: list[str], expected: str) -> None:
    done = golf_ray("export", *(a.replace("{storage}", str(made.storage)) for a in argv))
    assert done.status == 2 and expected in done.error and not done.out


# Rows and columns ---------------------------------------------------------------------------------


def test_conditions_order_and_columns(made: Made) -> None:
    frame = table(
        made.folder, "--where", "status in done,over_limit", "--where", "int6_bpb < 1.0925",
        "--sort", "-train.warmdown_frac,ttt_bpb", "--columns", "trial,train.*_frac,*_bpb,fits",
    )  # fmt: skip
    whole = load_results(made.folder).trials
    assert list(frame.columns)[:2] == ["trial", "train.warmdown_frac"]
    assert "ttt_bpb" in frame and "ttt_standard_error_bpb" in frame
    kept = whole[whole["status"].isin(["done", "over_limit"]) & (whole["int6_bpb"] < 1.0925)]
    expected = kept.sort_values(
        ["train.warmdown_frac", "ttt_bpb"], ascending=[False, True], kind="stable"
    )
    assert 0 < len(frame) < 24 and frame["trial"].tolist() == expected["trial"].tolist()


def test_any_field_of_the_configuration_can_be_asked_for(made: Made) -> None:
    frame = table(made.folder, "--columns", "trial,train.muon_lr,adaptation.*")
    assert frame["train.muon_lr"].nunique() == 1 and "adaptation.rank" in frame
    # One that only a condition or the order names is not shown.
    frame = table(made.folder, "--where", "train.seed == 1337", "--sort", "train.muon_lr")
    assert len(frame) == 24 and "train.seed" not in frame


def test_an_order_may_begin_with_the_largest(made: Made) -> None:
    found = table(made.folder, "--sort", "-ttt_bpb", "--columns", "ttt_bpb")["ttt_bpb"].dropna()
    assert found.is_monotonic_decreasing and len(found) > 10


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--columns", "ttt_bbp"], "there is no column 'ttt_bbp'; did you mean 'ttt_bpb'?"),
        (["--columns", "train.warmdown_frc"], "did you mean 'train.warmdown_frac'?"),
        (["--columns", "a,"], "--columns 'a,' has an empty name"),
        (["--where", "ttt_bpb = 1"], "is no condition; write COLUMN, one of =="),
        (["--where", "ttt_bpb < low"], "ttt_bpb is a number"),
        (["--where", "tt_bpb < 1"], "did you mean 'ttt_bpb'?"),
        (["--sort", "bytes"], "there is no column 'bytes'"),
        (["--group-by", "warmdown_frac"], "did you mean 'train.warmdown_frac'?"),
        (["--group-by", "seed", "--seeds"], "two ways to group"),
        (["--seeds", "--columns", "ttt_bpb_men"], "did you mean 'ttt_bpb_mean'?"),
        (["--out", "a.xlsx"], "the ending of 'a.xlsx' is of no format"),
        (["--format", "xlsx"], "'xlsx' is not one of"),
        (["--format", "parquet"], "add --out FILE"),
    ],
)
def test_wrong_use_is_one_line(made: Made, folder: Path, argv: list[str], expected: str) -> None:
    done = golf_ray("export", made.folder, *argv)
    assert done.status == 2 and expected in done.error and not done.out
    assert not list(folder.iterdir())


def test_the_three_seeds_of_the_record(folder: Path) -> None:
    for seed, bpb, nats in SEEDS:
        make_log(folder / "logs" / f"{seed}.log", seed=seed, ttt_bpb=bpb, ttt_nats=nats)
    frame = table("logs", "--seeds", "--columns", "n,ttt_bpb_mean,ttt_bpb_sd,ttt_loss_nats_mean")
    assert len(frame) == 1 and frame["n"][0] == 3
    assert round(frame["ttt_bpb_mean"][0], 8) == 1.07336388
    assert round(frame["ttt_bpb_sd"][0], 8) == 0.00084633
    shown = golf_ray("export", "logs", "--seeds", "--format", "md").out
    assert "| 1.07336 | 0.00085 | 1.07126 | 1.07547 |" in shown


def test_groups_have_their_order_and_columns(made: Made) -> None:
    frame = table(
        made.folder, "--group-by", "adaptation.chunk_size", "--sort", "-n,adaptation.chunk_size",
        "--columns", "adaptation.chunk_size,n,done,failed,trials,ttt_bpb_*",
    )  # fmt: skip
    whole = load_results(made.folder).trials
    assert set(frame["adaptation.chunk_size"]) == {32, 48, 64}
    assert frame["done"].sum() == (whole["status"] == "done").sum()
    assert frame["failed"].sum() == (whole["status"] == "failed").sum()
    # Four trials share a training.
    assert (frame["n"] <= 6).all() and frame["n"].is_monotonic_decreasing


# While it is written, and what is damaged ---------------------------------------------------------


def test_an_export_while_records_are_added(folder: Path) -> None:
    from golf_ray.records import atomic_write_json

    made = make_sweep(folder / "store", num_trials=8, num_documents=0)
    stop, failures = threading.Event(), []

    def write() -> None:
        number = 8
        while not stop.is_set():
            number += 1
            record = {**made.records[number % 8], "trial": number}
            try:
                atomic_write_json(made.folder / "trials" / f"{number:05d}.json", record)
                # One that changes is read as it was or as it is.
                first = made.folder / "trials" / "00001.json"
                atomic_write_json(first, {**made.records[0], "wall_s": float(number)})
            except OSError as error:
                failures.append(error)
                return
            stop.wait(0.001)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        sizes: list[int] = []
        while len(sizes) < 5 or sizes[-1] == sizes[0]:
            frame = table(made.folder)
            assert frame["trial"].tolist() == list(range(1, len(frame) + 1))
            sizes.append(len(frame))
    finally:
        stop.set()
        writer.join()
    assert not failures and sizes == sorted(sizes) and sizes[-1] > sizes[0] >= 8


def test_a_torn_record_is_one_line_and_the_rest_is_exported(folder: Path) -> None:
    made = make_sweep(folder / "store", num_trials=8, num_documents=0)
    torn, newer = (made.folder / "trials" / f"0000{i}.json" for i in (3, 5))
    torn.write_text(torn.read_text()[:200])
    newer.write_text(json.dumps({**made.records[4], "schema": 99}))
    done = golf_ray("export", made.folder, "--columns", "trial")
    assert done.status == 0
    assert read_csv(done.out.encode())["trial"].tolist() == [1, 2, 4, 6, 7, 8]
    lines = done.err.splitlines()
    assert len(lines) == 3 and str(torn) in lines[0] and str(newer) in lines[1]
    assert all(line.startswith("golf-ray: left out: ") for line in lines[:2])
    assert lines[2] == "golf-ray: exported 6 rows, 1 column; 2 problems of reading above"
    summary = golf_ray("export", made.folder, "--json", "--out", "a.md")
    assert summary.json["rows"] == 6 and len(summary.json["problems"]) == 2


def test_nothing_that_can_be_read_is_a_failure(folder: Path) -> None:
    made = make_sweep(folder / "store", num_trials=2, num_documents=0)
    for path in (made.folder / "trials").iterdir():
        path.write_text("{")
    done = golf_ray("export", made.folder, "--out", "a.csv")
    assert done.status == 1 and done.err.count("left out") == 2
    assert done.err.splitlines()[-1].startswith("golf-ray: error: nothing could be read")
    assert not Path("a.csv").exists()


def test_a_sweep_without_trials_is_an_empty_table(folder: Path) -> None:
    made = make_sweep(folder / "store", num_trials=1, num_documents=0)
    (made.folder / "trials" / "00001.json").unlink()
    frame = table(made.folder)
    assert len(frame) == 0 and "ttt_bpb" in frame


# Files that cannot be written ---------------------------------------------------------------------


def test_a_file_that_cannot_be_written_leaves_nothing(made: Made, folder: Path) -> None:
    Path("file").write_text("kept")
    Path("folder.csv").mkdir()
    for out in ("file/a.csv", "folder.csv"):
        done = golf_ray("export", made.folder, "--out", out)
        assert done.status == 1 and "cannot be written" in done.error
    assert sorted(p.name for p in folder.rglob("*")) == ["file", "folder.csv"]
    assert Path("file").read_text() == "kept"


def test_no_space_for_a_table(made: Made, tmp_path: Path) -> None:
    line, left = on_small_disk(tmp_path, "4k", "export", made.folder, "--out", "{disk}/a.csv")
    assert "no space left to write" in line and "a.csv" in line and left == []


def test_what_was_there_stays_if_the_new_file_cannot_be_written(
    made: Made, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("a.csv").write_text("kept")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    done = golf_ray("export", made.folder, "--out", "a.csv")
    assert done.status == 1 and "no space left to write" in done.error
    assert [p.name for p in folder.iterdir()] == ["a.csv"] and Path("a.csv").read_text() == "kept"


def test_devices_are_written_to_and_links_are_followed(made: Made, folder: Path) -> None:
    Path("device.csv").symlink_to("/dev/null")
    assert golf_ray("export", made.folder, "--out", "device.csv").status == 0
    assert Path("/dev/null").is_char_device() and Path("device.csv").is_symlink()
    Path("real.csv").write_text("old")
    Path("link.csv").symlink_to("real.csv")
    assert golf_ray("export", made.folder, "--out", "link.csv").status == 0
    assert Path("link.csv").is_symlink() and len(read_csv(Path("real.csv").read_bytes())) == 24
    assert golf_ray("export", made.folder, "--out", "new/folder/a.csv").status == 0


def test_an_export_loads_neither_torch_nor_ray(made: Made) -> None:
    program = (
        "import sys; from golf_ray.cli import run; status = run(sys.argv[1:])\n"
        "heavy = {'torch', 'ray', 'optuna'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "export", made.folder], capture_output=True, check=False,
        env=subprocess_environment(), timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(read_csv(done.stdout)) == 24


def test_a_command_of_its_own_is_quiet(made: Made) -> None:
    done = golf_ray_process("export", made.folder, "--columns", "trial", "--format", "md")
    assert done.status == 0 and not done.err and done.out.startswith("| trial |\n|---:|\n| 1 |\n")
