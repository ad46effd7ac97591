"""Logs of the public program as records: its three record seeds, older spellings, broken ends."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
from results_made import make_log, make_sweep

from golf_ray.results.public_logs import is_public_log, read_log
from golf_ray.results.reading import load_results, with_config_columns
from golf_ray.stats import mean, sample_sd

SEEDS = {
    1337: (1.07258208, 2.77059090), 42: (1.07324696, 2.77230836), 2025: (1.07426259, 2.77493185),
}  # fmt: skip

OLDER = """logs/x.txt
step:0/20000 val_loss:6.9357 val_bpb:4.1077 train_time:0ms step_avg:0.01ms
step:500/20000 train_loss:2.4103 train_time:34900ms step_avg:69.80ms
step:8635/20000 val_loss:2.9361 val_bpb:1.1367 train_time:600051ms step_avg:69.49ms
stopping_early: wallclock_cap train_time:600051ms step:8635/20000
peak memory allocated: 18179 MiB reserved: 19658 MiB
Serialized model: 87005846 bytes
Code size: 48738 bytes
Total submission size: 87054584 bytes
Serialized model int8+zlib: 15686654 bytes (payload:18987464 raw_torch:19026099)
Total submission size int8+zlib: 15735392 bytes
final_int8_zlib_roundtrip val_loss:2.0374 val_bpb:1.2066 eval_time:2658ms
final_int8_zlib_roundtrip_exact val_loss:2.03735762 val_bpb:1.20663794
final_int8_zlib_sliding_window_exact val_loss:1.98 val_bpb:1.17
"""


def no_problem(line: str) -> None:
    raise AssertionError(line)


def test_three_seeds_of_the_record(tmp_path: Path) -> None:
    for seed, (bpb, nats) in SEEDS.items():
        make_log(tmp_path / f"seed{seed}.log", seed=seed, ttt_bpb=bpb, ttt_nats=nats)
    results = load_results(tmp_path)
    frame = results.trials.set_index("seed")
    assert results.problems == () and set(results.trials["kind"]) == {"public"}
    for seed, (bpb, nats) in SEEDS.items():
        assert frame.loc[seed, "ttt_bpb"] == bpb and frame.loc[seed, "ttt_loss_nats"] == nats
    assert mean(frame["ttt_bpb"].tolist()) == pytest.approx(1.07336388, abs=5e-9)
    assert sample_sd(frame["ttt_bpb"].tolist()) == pytest.approx(0.00084633, abs=5e-9)
    row = frame.loc[1337]
    assert (row["source"], row["status"], row["weights"]) == ("seed1337", "done", "int6")
    assert row["steps"] == 4544 and row["elapsed_s"] == pytest.approx(587.146)
    assert (row["val_bpb"], row["int6_bpb"]) == (1.08446201, 1.09527777)
    assert (row["model_bytes"], row["code_bytes"]) == (15_951_328, 48_311)
    assert row["total_bytes"] == 15_999_639 and row["fits"] and row["bytes_exact"]
    assert row["evaluate_s"] == pytest.approx(338.123) and row["num_workers"] == 8
    assert row["peak_memory_bytes"] == 40_020 * 2**20 and row["tokens"] == 4544 * 786_432
    fields = with_config_columns(results, ["train.muon_lr", "train.warmdown_frac"])
    assert fields["train.muon_lr"].tolist() == [0.022] * 3
    curve = results.intervals[results.intervals["source"] == "seed42"]
    assert curve["step"].tolist() == [1, 2, 3, 500, 1000, 4500, 4544]
    assert curve["tokens_per_s"].iloc[0] == 7_989_999 and curve["val_bpb"].iloc[-1] == 1.0929


def test_runs_of_others_and_ours_stand_in_one_table(tmp_path: Path) -> None:
    made = make_sweep(tmp_path / "storage", num_trials=3, num_documents=0, all_done=True)
    log = make_log(tmp_path / "a.log")
    results = load_results(made.folder, log)
    assert results.trials["kind"].tolist() == ["trial"] * 3 + ["public"]
    assert results.trials["train.warmdown_frac"].iloc[-1] == 0.72
    assert results.trials["adaptation.chunk_size"].iloc[-1] == 32
    assert str(results.trials["adaptation.chunk_size"].dtype) == "Int64"


def test_an_older_spelling() -> None:
    record, rows = read_log(OLDER, "x.log", no_problem)
    assert record["status"] == "done" and record["config"] == {} and record["seed"] is None
    assert (record["steps"], record["elapsed_s"]) == (8635, 600.051)
    assert record["val_bpb"] == 1.1367 and record["int6_bpb"] == 1.20663794
    assert (record["model_bytes"], record["total_bytes"]) == (15_686_654, 15_735_392)
    assert record["train_loss_nats"] == 2.4103 and "ttt_bpb" not in record
    assert [row["step"] for row in rows] == [0, 500, 8635]
    assert rows[1]["elapsed_s"] == pytest.approx(34.9) and rows[2]["val_loss_nats"] == 2.9361


def test_a_log_that_ends_early_is_running_and_one_with_a_traceback_failed(tmp_path: Path) -> None:
    path = make_log(tmp_path / "a.log", ended=False)
    row = load_results(path).trials.iloc[0]
    assert row["status"] == "running" and row["steps"] == 4500 and pd.isna(row["ttt_bpb"])
    with open(path, "a") as file:
        file.write("Traceback (most recent call last):\n  File 'x'\nRuntimeError: boom\n")
    row = load_results(path).trials.iloc[0]
    assert row["status"] == "failed" and row["reason"] == "RuntimeError: boom"


def test_over_the_limit_says_by_how_much(tmp_path: Path) -> None:
    row = load_results(make_log(tmp_path / "a.log", model_bytes=16_000_000)).trials.iloc[0]
    assert row["status"] == "over_limit" and not row["fits"]
    assert row["reason"] == "16,048,311 bytes, 48,311 over the limit"


def test_keys_of_a_descendant_do_not_hide_its_numbers(tmp_path: Path) -> None:
    path = make_log(tmp_path / "a.log")
    text = path.read_text().replace("  warmdown_frac:", "  smear_gate: True\n  warmdown_frac:")
    path.write_text(text.replace("quantized_ttt_lora", "quantized_ttt_phased"))
    results = load_results(path)
    row = results.trials.iloc[0]
    assert results.problems == () and row["ttt_bpb"] == 1.07258208 and row["seed"] == 1337
    assert pd.isna(row["config_fingerprint"]), "it is not the whole configuration"
    path.write_text(text.replace("muon_momentum: 0.97", "muon_momentum: much"))
    results = load_results(path)
    assert len(results.trials) == 1 and "its configuration cannot be read" in results.problems[0]


def test_numbers_that_are_not_finite_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = make_log(tmp_path / "a.log", ended=False)
    with open(path, "ab") as file:
        file.write(b"\xff\xfe noise\n5000/20000 train_loss: nan train_time: 10.7m tok/s: 7985500\n")
        file.write(b"quantized_ttt_lora val_loss:nan val_bpb:inf eval_time:1ms\n")
    results = load_results(path)
    assert results.trials["ttt_bpb"].iloc[0] == math.inf
    assert pd.isna(results.trials["train_loss_nats"].iloc[0])
    assert results.intervals["step"].iloc[-1] == 5000


@pytest.mark.parametrize(
    "text", ["", "val_bpb is what we want\n", "Hyperparameters:\n  lr: 0.1\n", "a" * 5000]
)
def test_other_texts_are_no_logs(text: str) -> None:
    assert not is_public_log(text.encode())
