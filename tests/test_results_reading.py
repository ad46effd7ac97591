"""`load_results`: what records, curves and scores on disk become in tables, and what cannot be
read."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import FOLDER, TRAIN_SHARDS
from results_made import make_ledger, make_log, make_run, make_sweep, write_intervals

import golf_ray
from golf_ray.errors import ConfigError, StorageError, UsageError
from golf_ray.presets import TINY
from golf_ray.results.columns import NON_FINITE, make_column
from golf_ray.results.reading import load_results, trials_frame, with_config_columns
from golf_ray.results.records import as_left, read_records
from golf_ray.results.schema import DOCUMENTS, IDENTITY, INTERVALS, MEASURES, SCHEMA, types_of
from trainers.claims import DRIVER, Claims
from trainers.local import train_in_process
from trainers.storage import Storage
from trainers.validation import PackedValidation

WARMDOWN = "train.warmdown_frac"
CHUNK = "adaptation.chunk_size"


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Times and contents of all files."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def plain(value: Any) -> Any:
    """A cell as the record says it."""
    return None if pd.isna(value) else value


# Tables -------------------------------------------------------------------------------------------


def test_the_tables_are_the_schemas_and_say_what_records_say(tmp_path: Path) -> None:
    made = make_sweep(tmp_path / "storage", "nightly")
    before = snapshot(tmp_path)
    results = golf_ray.load_results(made.folder, documents=True)
    assert snapshot(tmp_path) == before, "reading wrote something"
    assert results.problems == () and list(results.plans) == ["nightly"]
    names = [*types_of(IDENTITY), *results.knobs, *types_of(MEASURES)]
    assert list(results.trials.columns) == names
    for table, columns in (
        (results.trials, (*IDENTITY, *MEASURES)),
        (results.intervals, INTERVALS),
        (results.documents, DOCUMENTS),
    ):
        assert {n: str(table[n].dtype) for n in types_of(columns)} == types_of(columns)
    assert list(results.intervals.columns) == list(types_of(INTERVALS))
    assert list(results.documents.columns) == list(types_of(DOCUMENTS))
    assert set(results.trials["status"]) == {"done", "failed", "over_limit", "interrupted"}
    for row, record in zip(results.trials.to_dict("records"), made.records, strict=True):
        record = as_left(record, driven=False)
        for name in ("trial", "status", "reason", "steps", "ttt_bpb", "total_bytes", "fits",
                     "began_unix_s", "device", "commit", "training"):  # fmt: skip
            assert plain(row[name]) == record.get(name), name
        assert [row[knob] for knob in results.knobs] == list(record["knobs"].values())
        assert plain(row["final_ttt_bpb"]) == record.get("final", {}).get("ttt_bpb")
    assert [r["trial"] for r in results.records] == results.trials["trial"].tolist()


def test_curves_are_the_files_lines(tmp_path: Path) -> None:
    made = make_sweep(tmp_path, num_trials=9, share=3, num_intervals=7)
    table = load_results(made.folder).intervals
    for record in made.records[::3]:
        path = made.stages / record["training"] / "run" / "intervals.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        mine = table[table["training"] == record["training"]]
        assert mine["trial"].unique().tolist() == [record["trial"]], "whom it was made for"
        for name in lines[0]:
            assert [plain(v) for v in mine[name]] == [line[name] for line in lines], name
    assert load_results(made.folder, intervals=False).intervals.empty


def test_scores_of_documents_and_of_finalists_stand_apart(tmp_path: Path) -> None:
    made = make_sweep(tmp_path, num_trials=6, num_documents=5)
    results = load_results(made.folder, documents=True)
    counts = results.documents.groupby(["trial", "evaluation"]).size()
    for row in results.trials.to_dict("records"):
        if row["status"] == "done":
            assert counts[row["trial"], row["evaluation"]] == 5
        if not pd.isna(row["final_evaluation"]):
            assert counts[row["trial"], row["final_evaluation"]] == 10
    assert results.documents["nats"].gt(0).all() and set(results.documents["weights"]) == {"int6"}
    assert load_results(made.folder).documents.empty


VALUES = st.one_of(
    st.none(), st.text(max_size=8), st.booleans(), st.integers(-(2**70), 2**70), st.floats(),
    st.sampled_from([*NON_FINITE, "nan ", "1e3"]), st.lists(st.text(max_size=3), max_size=2),
    st.sampled_from(["\ud800", "\x00", 'a"b\n,c', "=1+1", "\u202eabc"]),
)  # fmt: skip


@settings(max_examples=150)
@given(st.lists(VALUES, max_size=6), st.sampled_from(["Int64", "Float64", "string", "boolean"]))
def test_a_column_keeps_what_fits_and_tells_of_what_does_not(values: list[Any], kind: Any) -> None:
    told: list[int] = []
    column = make_column(values, kind, told.append)
    assert len(column) == len(values) and str(column.dtype) == kind
    for place, value in enumerate(values):
        cell = column[place]
        if pd.isna(cell):
            number = NON_FINITE.get(value, value) if isinstance(value, str) else value
            missing = value is None or (isinstance(number, float) and math.isnan(number))
            assert missing or place in told
            continue
        assert place not in told
        if kind == "Float64":
            assert cell == (NON_FINITE[value] if isinstance(value, str) else float(value))
        elif kind == "string" and isinstance(value, str):
            assert cell == value or "\ud800" in value
        elif kind != "string":
            assert cell == value and isinstance(value, bool) == (kind == "boolean")


KNOBS = st.dictionaries(
    st.sampled_from([WARMDOWN, CHUNK, "quantization.compressor"]),
    st.one_of(st.floats(0, 1), st.integers(0, 64), st.sampled_from(["brotli", "lzma"])),
)
MEASURED = st.fixed_dictionaries(
    {},
    optional={
        "reason": st.one_of(st.none(), st.text(max_size=12)),
        "steps": st.integers(0, 2**62),
        "ttt_bpb": st.one_of(st.floats(0.5, 3), st.sampled_from(["inf", "-inf", "nan"])),
        "fits": st.booleans(),
        "codes": st.lists(st.sampled_from(["quantize-1", "quantize-2"]), max_size=2),
    },
)


@settings(max_examples=60)
@given(st.lists(st.tuples(KNOBS, MEASURED), max_size=5))
def test_a_frame_is_its_records(parts: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    records = [
        {"schema": SCHEMA, "trial": i + 1, "status": "done", "knobs": knobs,
         "config": TINY.to_dict(), **measured}
        for i, (knobs, measured) in enumerate(parts)
    ]  # fmt: skip
    frame = trials_frame(records, "s")
    assert len(frame) == len(records)
    for row, record in zip(frame.to_dict("records"), records, strict=True):
        assert plain(row["steps"]) == record.get("steps")
        assert plain(row["fits"]) == record.get("fits")
        bpb = record.get("ttt_bpb")
        bpb = NON_FINITE[bpb] if isinstance(bpb, str) else bpb
        assert plain(row["ttt_bpb"]) == (None if bpb is None or bpb != bpb else bpb)
        assert plain(row["codes"]) == (" ".join(record["codes"]) if "codes" in record else None)
        for knob, value in record["knobs"].items():
            assert row[knob] in (value, str(value), json.dumps(value))


# Several places -----------------------------------------------------------------------------------


def test_sweeps_that_search_different_fields_stand_in_one_table(tmp_path: Path) -> None:
    one = make_sweep(tmp_path / "storage", "one", knobs=[WARMDOWN], all_done=True)
    two = make_sweep(tmp_path / "storage", "two", knobs=[CHUNK], all_done=True, seed=5)
    results = load_results(tmp_path / "storage")
    assert results.knobs == (WARMDOWN, CHUNK) and len(results.trials) == 48
    first = results.trials[results.trials["source"] == "one"]
    second = results.trials[results.trials["source"] == "two"]
    assert second[WARMDOWN].unique().tolist() == [0.72], "the configuration's value"
    assert first[CHUNK].unique().tolist() == [32] and str(first[CHUNK].dtype) == "Int64"
    assert first[WARMDOWN].tolist() == [r["knobs"][WARMDOWN] for r in one.records]
    assert results.plans["two"]["name"] == "two" and len(two.records) == 24
    again = load_results(one.folder, str(one.folder), two.folder)
    pd.testing.assert_frame_equal(again.trials, results.trials)


def test_sweeps_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for storage in ("a", "b"):
        make_sweep(tmp_path / storage, "nightly", num_trials=3, num_documents=0)
    results = load_results(tmp_path / "a", tmp_path / "b")
    assert results.trials["source"].unique().tolist() == ["a/nightly", "b/nightly"]
    assert sorted(results.plans) == ["a/nightly", "b/nightly"]


def test_a_trial_that_nobody_runs_any_more_was_interrupted(tmp_path: Path) -> None:
    made = make_sweep(tmp_path, num_trials=6, num_documents=0)
    written = sorted(made.folder.rglob("*"))

    def last() -> pd.Series[Any]:
        return load_results(made.folder).trials.iloc[-1]

    claim = Claims(Storage(made.folder).child(DRIVER), "the driver of this test").take()
    assert claim is not None
    with claim:
        assert last()["status"] == "running" and pd.isna(last()["reason"])
        there = list((made.folder / DRIVER).iterdir())
        beat = json.loads(there[0].read_text())
    # Its host has lost the process that this claim is of.
    there[0].write_text(json.dumps({**beat, "pid": 2**22 + 1}))
    assert last()["status"] == "interrupted" and "resume" in last()["reason"]
    assert load_results(made.folder).trials["status"].tolist()[:5] == ["done"] * 5
    assert there[0].exists(), "who reads clears nothing away"
    there[0].unlink()
    assert last()["status"] == "interrupted"
    (made.folder / DRIVER).rmdir()
    assert sorted(made.folder.rglob("*")) == written


def test_everything_at_once_and_by_uri(tmp_path: Path) -> None:
    make_sweep(tmp_path / "storage", "s", num_trials=4)
    make_run(tmp_path / "runs" / "first")
    make_run(tmp_path / "runs" / "second", ended=False)
    make_log(tmp_path / "runs" / "seed1.log")
    (tmp_path / "runs" / "notes.txt").write_text("buy milk\n")
    make_ledger(tmp_path / "scores", 8)
    places = [tmp_path / "storage", tmp_path / "runs", tmp_path / "scores"]
    results = load_results(*places, documents=True)
    assert results.problems == ()
    assert results.trials["kind"].tolist() == ["trial"] * 4 + ["run", "run", "public"]
    assert results.trials["status"].tolist()[-3:] == ["done", "running", "done"]
    alone = results.documents[results.documents["source"] == "scores"]
    assert len(alone) == 8 and alone["trial"].isna().all() and alone["evaluation"].nunique() == 1
    uris = [f"file://{place}" for place in places]
    for name in ("trials", "intervals", "documents"):
        by_uri = getattr(load_results(*uris, documents=True), name)
        pd.testing.assert_frame_equal(by_uri, getattr(results, name))


def test_fields_of_the_configuration_as_columns(tmp_path: Path) -> None:
    results = load_results(make_sweep(tmp_path, num_trials=4, num_documents=0).folder)
    frame = with_config_columns(results, ["train.muon_lr", WARMDOWN, "adaptation.sites", "name"])
    assert frame["train.muon_lr"].tolist() == [0.022] * 4
    assert frame["adaptation.sites"][0] == "q k v o mlp head" and frame["name"][0] == "record"
    assert list(frame.columns[: len(results.trials.columns)]) == list(results.trials.columns)
    with pytest.raises(ConfigError, match=r"did you mean 'train\.muon_lr'"):
        with_config_columns(results, ["train.muon_lrr"])


# What cannot be read ------------------------------------------------------------------------------


def test_a_place_that_holds_no_results_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos" / "june").mkdir(parents=True)
    (tmp_path / "photos" / "june" / "a.jpg").write_bytes(b"\xff\xd8")
    (tmp_path / "letter.txt").write_text("Dear Sir,\n")
    for name, line in (("absent", "is not there"), ("empty", "holds nothing"),
                       ("photos", "holds no results"), ("letter.txt", "is no log")):  # fmt: skip
        with pytest.raises(UsageError, match=f"{name} {line}") as caught:
            load_results(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="no place"):
        load_results()
    made = make_sweep(tmp_path / "storage", num_trials=3, num_documents=0)
    results = load_results(tmp_path / "photos", made.folder)
    assert len(results.trials) == 3 and len(results.problems) == 1


def test_damaged_and_newer_records_cost_a_line_each(tmp_path: Path) -> None:
    made = make_sweep(tmp_path, num_trials=12, num_documents=0)
    trials = made.folder / "trials"
    newer = {**made.records[1], "schema": SCHEMA + 1}
    (trials / "00002.json").write_text(json.dumps(newer))
    (trials / "00003.json").write_text((trials / "00003.json").read_text()[:300])
    (trials / "00004.json").write_text("[1, 2]")
    (trials / "00005.json").write_text(json.dumps({**made.records[4], "knobs": None}))
    (trials / "00006.json").write_bytes(b"\xff\xfe\x00")
    (trials / ".00007.json.abc.tmp").write_text("{")
    odd = {**made.records[7], "steps": "many", "fits": 1}
    (trials / "00008.json").write_text(json.dumps(odd))
    (made.folder / "sweep.json").write_text("{")
    results = load_results(made.folder)
    assert results.trials["trial"].tolist() == [1, *range(7, 13)] and results.plans == {}
    assert sum("newer golf_ray" in line for line in results.problems) == 1
    assert sum("is damaged" in line for line in results.problems) == 4
    assert sum("is no record" in line for line in results.problems) == 1
    assert "made trial 8: steps is 'many'" in results.problems
    assert "made trial 8: fits is 1" in results.problems and len(results.problems) == 8
    assert all("\n" not in line for line in results.problems)
    row = results.trials[results.trials["trial"] == 8].iloc[0]
    assert pd.isna(row["steps"]) and pd.isna(row["fits"])
    with pytest.raises(StorageError, match=r"00002\.json"):
        read_records(trials)


def test_lines_of_a_curve_that_are_none_cost_a_line_each(tmp_path: Path) -> None:
    made = make_sweep(tmp_path, num_trials=4, share=1, num_intervals=5, num_documents=0,
                      all_done=True)  # fmt: skip
    files = [made.stages / r["training"] / "run" / "intervals.jsonl" for r in made.records]
    whole = files[0].read_text().splitlines(keepends=True)
    files[0].write_text("".join(whole)[:-40])
    files[1].write_text(whole[0] + '{"step": \n' + "\n" + "7\n" + whole[1].replace("0.97", "NaN"))
    files[2].write_text(whole[0][:50] + whole[1] + whole[2].replace(": 4550,", ": 4550.0,", 1))
    files[3].unlink()
    results = load_results(made.folder)
    steps = results.intervals.groupby("trial")["step"].apply(list).to_dict()
    assert steps == {1: [910, 1820, 2730, 3640], 2: [910, 1820], 3: [2730]}
    assert len(results.problems) == 4
    assert "torn" in results.problems[0] and "line 2 is no record" in results.problems[1]
    assert results.intervals["muon_momentum"].isna().sum() == 1


@settings(max_examples=40)
@given(data=st.data())
def test_reading_in_blocks_is_reading_line_by_line(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("curves")
    make_run(folder / "run", num_intervals=4)
    path = folder / "run" / "intervals.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    odd = st.sampled_from([None, 1, 2.5, "nan", "x", True, [], math.inf, math.nan, 10**30])
    for row in rows:
        for name in data.draw(st.lists(st.sampled_from(sorted(row)), max_size=2)):
            row[name] = data.draw(odd)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = load_results(folder / "run").intervals
    for column in INTERVALS[3:]:
        expected = make_column([row.get(column.name) for row in rows], column.type)
        assert table[column.name].tolist() == list(expected), column.name


def test_a_ledger_segment_that_is_damaged_counts_for_nothing(tmp_path: Path) -> None:
    made = make_sweep(tmp_path, num_trials=2, num_documents=6, all_done=True, num_finals=0)
    [segment] = (made.stages / made.records[0]["evaluations"][0] / "ledger/segments").iterdir()
    segment.write_bytes(segment.read_bytes()[:-9])
    results = load_results(made.folder, documents=True)
    assert results.documents["trial"].unique().tolist() == [2]
    assert len(results.problems) == 1 and "counts for nothing" in results.problems[0]


# While it is written ------------------------------------------------------------------------------


def test_reading_while_trials_and_curves_are_written(tmp_path: Path) -> None:
    made = make_sweep(tmp_path, num_trials=8, num_documents=0, all_done=True)
    trials = made.folder / "trials"
    curve = made.stages / made.records[0]["training"] / "run" / "intervals.jsonl"
    line = curve.read_bytes().splitlines(keepends=True)[0]
    stop = threading.Event()

    def write() -> None:
        number = 9
        while not stop.is_set():
            record = {**made.records[0], "trial": number}
            temporary = trials / f".{number:05d}.json.x.tmp"
            temporary.write_text(json.dumps(record))
            os.replace(temporary, trials / f"{number:05d}.json")
            with open(curve, "ab") as file:
                for part in (line[:90], line[90:]):
                    file.write(part)
                    file.flush()
            number += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = [load_results(made.folder) for _ in range(8)]
    finally:
        stop.set()
        writer.join()
    lengths = [len(results.trials) for results in seen]
    assert lengths == sorted(lengths) and lengths[-1] > 8
    for results in seen:
        numbers = results.trials["trial"].tolist()
        # A name that comes while a folder is listed may be in the next listing only.
        assert numbers == sorted(set(numbers)) and numbers[:8] == list(range(1, 9))
        assert all("torn" in problem for problem in results.problems), results.problems
        assert results.intervals["step"].notna().all()


# Runs ---------------------------------------------------------------------------------------------


def test_a_real_run_folder_says_what_the_training_did(tmp_path: Path) -> None:
    config = TINY.with_overrides(
        {"data.dir": str(FOLDER), "train.iterations": 3, "train.val_every_steps": 2,
         "train.log_every_steps": 1}
    )  # fmt: skip
    run = tmp_path / "runs" / "a"
    result = train_in_process(
        config, run, TRAIN_SHARDS, validate=PackedValidation.of_config(config)
    )
    results = load_results(run)
    row = results.trials.iloc[0]
    assert results.problems == () and len(results.trials) == 1
    assert (row["kind"], row["source"], row["status"]) == ("run", "a", "done")
    assert row["steps"] == 3 and row["train_loss_nats"] == result.train_loss_nats
    assert row["seed"] == config.train.seed and row["device"] == result.device_name
    assert row["val_tokens_scored"] == 832 and row["val_bytes_scored"] > 832
    assert row["val_bpb"] == results.intervals["val_bpb"].iloc[-1]
    assert row["torch_version"].startswith("2.") and row["python_version"].startswith("3.")
    assert results.intervals["step"].tolist() == [1, 2, 3]
    assert results.intervals["val_bpb"].isna().tolist() == [True, False, False]
    assert with_config_columns(results, ["train.iterations"])["train.iterations"].tolist() == [3]
    assert dataclasses.asdict(result)["provenance"]["host"] == row["host"]
    # One that was killed before its end.
    (run / "result.json").unlink()
    row = load_results(run).trials.iloc[0]
    assert row["status"] == "running" and row["steps"] == 3 and row["val_tokens_scored"] == 832


def test_a_run_on_ray_that_failed_says_why(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", ended=False)
    with open(run / "events.jsonl", "a") as file:
        for event in (
            {"kind": "restarted", "unix_s": 1.79e9 + 60, "seconds": 4.0},
            {"kind": "run_ended", "unix_s": 1.79e9 + 99, "error": "diverged\nat 7"},
        ):
            file.write(json.dumps(event) + "\n")
        file.write('{"kind": "to')
    row = load_results(run).trials.iloc[0]
    assert (row["status"], row["reason"], row["restarts"]) == ("failed", "diverged at 7", 1)
    assert row["ended_unix_s"] == 1.79e9 + 99 and row["num_workers"] == 8
    (run / "config.json").write_text('{"model": "bert"}')
    results = load_results(run)
    assert results.trials.empty and "is no configuration" in results.problems[0]


def test_reading_needs_neither_torch_nor_ray(tmp_path: Path) -> None:
    make_sweep(tmp_path / "storage", num_trials=3)
    make_run(tmp_path / "storage" / "runs")
    program = (
        "import sys, golf_ray\n"
        f"found = golf_ray.load_results({str(tmp_path / 'storage')!r}, documents=True)\n"
        f"found = golf_ray.load_results({str(tmp_path / 'storage/runs')!r})\n"
        "assert len(found.trials) == 1, found\n"
        "heavy = {'torch', 'ray', 'optuna'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_thousand_small_curves_are_whole(tmp_path: Path) -> None:
    """More than a block of files, one of them larger than what is read at a time."""
    made = make_sweep(tmp_path, num_trials=150, share=1, num_intervals=2, num_documents=0,
                      all_done=True)  # fmt: skip
    large = made.stages / made.records[70]["training"] / "run"
    shutil.rmtree(large)
    large.mkdir()
    write_intervals(large, 700)
    counts = load_results(made.folder).intervals.groupby("trial").size()
    assert counts[71] == 700 and counts.drop(71).eq(2).all() and len(counts) == 150


def test_links_lead_to_what_is_there_once(tmp_path: Path) -> None:
    for name in ("s1", "s2"):
        make_run(tmp_path / "runs" / name)
    made = make_sweep(tmp_path / "store", "nightly", num_trials=4, num_documents=5)
    (tmp_path / "runs" / "latest").symlink_to("s2")
    (tmp_path / "mine").symlink_to(made.folder)
    assert sorted(load_results(tmp_path / "runs").trials["source"]) == ["s1", "s2"]
    linked = load_results(tmp_path / "mine", made.folder, documents=True)
    pd.testing.assert_frame_equal(linked.trials, load_results(made.folder).trials)
    assert len(linked.intervals) and len(linked.documents) and not linked.problems


def test_a_finalists_documents_are_there_once(tmp_path: Path) -> None:
    made = make_sweep(tmp_path / "store", "nightly", num_trials=4, num_documents=5)
    path = made.folder / "trials" / "00001.json"
    record = json.loads(path.read_text())
    record["final"] = {"ttt_bpb": 1.0, "fits": True, "evaluations": record["evaluations"]}
    path.write_text(json.dumps(record))
    own = load_results(made.folder, documents=True).documents.query("trial == 1")
    assert len(own) and not own.duplicated(["evaluation", "document"]).any()


def test_stages_that_are_gone_are_a_problem_line(tmp_path: Path) -> None:
    made = make_sweep(tmp_path / "store", "nightly", num_trials=4, num_documents=5)
    shutil.rmtree(tmp_path / "store" / "stages")
    results = load_results(made.folder, documents=True)
    assert len(results.trials) == 4 and results.documents.empty
    assert len(results.problems) == 1 and "stages is not there" in results.problems[0]


@pytest.mark.parametrize("text", ["[]", '{"result": null}', '{"spans": [null]}'])
def test_one_odd_file_takes_nothing_else_with_it(tmp_path: Path, text: str) -> None:
    for name in ("s1", "s2"):
        make_run(tmp_path / "runs" / name)
    (tmp_path / "runs" / "s1" / "outcome.json").write_text(text)
    results = load_results(tmp_path / "runs")
    assert "s2" in results.trials["source"].tolist()
    made = make_sweep(tmp_path / "store", "nightly", num_trials=4, num_documents=0)
    path = made.folder / "trials" / "00002.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "spans": [None]}))
    results = load_results(tmp_path / "store")
    assert results.trials["trial"].tolist() == [1, 3, 4]
    assert any("its spans are [None]" in line for line in results.problems)
