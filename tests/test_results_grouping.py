"""Groups over seeds: what is averaged, over what, and what n counts."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from results_made import make_log, make_run, make_sweep

from golf_ray.results.describing import COUNTS, SCORES, STATISTICS, described
from golf_ray.results.grouping import (
    grouped,
    mean_by_training,
    mixed_texts,
    seed_keys,
    settings_of,
    without_repeats,
)
from golf_ray.results.reading import load_results
from golf_ray.results.schema import IDENTITY, MEASURES

SEEDS = (
    (1337, 1.07324696, 2.77230836),
    (42, 1.07258208, 2.77059090),
    (2025, 1.07426259, 2.77493185),
)


def trials(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """A table of trials from what differs."""
    columns = {"knob": "Float64", **{c.name: c.type for c in (*IDENTITY, *MEASURES)}}
    return pd.DataFrame(
        {
            name: pd.array([row.get(name) for row in rows], dtype=kind)
            for name, kind in columns.items()
        }
    )


def done(number: int, training: str | None, bpb: float | None, **others: Any) -> dict[str, Any]:
    return {"source": "a", "trial": number, "status": "done", "training": training, "ttt_bpb": bpb,
            "knob": 0.7, **others}  # fmt: skip


def test_trials_of_one_training_are_one_value() -> None:
    frame = trials([done(1, "t1", 1.0), done(2, "t1", 1.2), done(3, "t2", 1.3)])
    row = grouped(frame, ["knob"]).iloc[0]
    assert (row["n"], row["done"], row["trials"]) == (2, 3, "1, 2, 3")
    assert row["ttt_bpb_n"] == 2 and row["ttt_bpb_mean"] == pytest.approx(1.2)
    assert row["ttt_bpb_sd"] == pytest.approx(statistics.stdev([1.1, 1.3]))
    # t of one degree of freedom: 12.706 standard errors.
    assert row["ttt_bpb_high"] - row["ttt_bpb_mean"] == pytest.approx(12.7062 * 0.1, rel=1e-5)


def test_one_training_has_a_mean_and_no_interval() -> None:
    row = grouped(trials([done(1, "t1", 1.0), done(2, "t1", 1.2)]), ["knob"]).iloc[0]
    assert row["n"] == 1 and row["ttt_bpb_mean"] == pytest.approx(1.1)
    assert row[["ttt_bpb_sd", "ttt_bpb_low", "ttt_bpb_high"]].isna().all()


def test_only_what_is_done_counts_and_the_rest_is_counted() -> None:
    rows = [
        done(1, "t1", 1.0), done(2, "t2", 5.0, status="failed"),
        done(3, "t3", 5.0, status="over_limit"), done(4, "t4", None, status="running"),
        done(5, "t5", None), done(6, "t6", float("inf")), done(7, "t7", 5.0, status="pruned"),
        done(8, "t8", None, status="interrupted"),
    ]  # fmt: skip
    row = grouped(trials(rows), ["knob"]).iloc[0]
    assert row["n"] == 3
    counts = row[["done", "failed", "over_limit", "pruned", "running", "interrupted"]]
    assert counts.tolist() == [3, 1, 1, 1, 1, 1] and counts.sum() == len(rows)
    assert row["ttt_bpb_n"] == 1 and row["ttt_bpb_mean"] == 1.0
    assert row["val_bpb_n"] == 0 and row["val_bpb_mean"] is pd.NA


def test_a_checkpoint_stands_for_its_training_and_a_log_for_itself() -> None:
    rows = [
        done(1, None, 1.0, checkpoint="c"), done(2, None, 1.2, checkpoint="c"),
        {**done(0, None, 1.4), "trial": None}, {**done(0, None, 1.5), "trial": None},
    ]  # fmt: skip
    assert grouped(trials(rows), ["knob"])["n"].tolist() == [3]


def test_groups_come_as_they_first_appear_and_a_missing_value_is_one() -> None:
    rows = [done(i, f"t{i}", 1.0, knob=k) for i, k in enumerate([0.8, None, 0.7, None, 0.8], 1)]
    found = grouped(trials(rows), ["knob"])
    assert found["knob"].tolist() == [0.8, pd.NA, 0.7]
    assert found["trials"].tolist() == ["1, 5", "2, 4", "3"]


def test_trials_of_several_sweeps_are_told_apart() -> None:
    rows = [done(1, "t1", 1.0), done(1, "t2", 1.1, source="b")]
    assert grouped(trials(rows), ["knob"])["trials"].tolist() == ["a:1, b:1"]


def test_columns_are_the_same_for_any_table_and_described() -> None:
    frame = grouped(trials([]), ["source", "knob"])
    ends = [f"{score}_{end}" for score in SCORES for end in STATISTICS]
    assert list(frame.columns) == ["source", "knob", *(c.name for c in COUNTS), *ends]
    columns = {column.name: column for column in described(frame)}
    assert columns["ttt_bpb_sd"].digits == 5 and "n - 1" in columns["ttt_bpb_sd"].text
    assert all(columns[name].text for name in frame.columns if name != "knob")


def test_an_n_that_says_nothing_new_can_be_left_out() -> None:
    frame = grouped(trials([done(1, "t1", 1.0), done(2, "t2", 1.1, val_bpb=1.0)]), ["knob"])
    kept = [name for name in without_repeats(frame) if name.endswith("_n")]
    assert kept == ["val_bpb_n"]


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from("tuvw"), st.floats(0.5, 2.0)), min_size=1
    )
)
def test_means_of_groups_are_means_of_means(drawn: list[tuple[str, str, float]]) -> None:
    rows = [done(i, t, v, label=g) for i, (g, t, v) in enumerate(drawn, 1)]
    found = grouped(trials(rows), ["label"]).set_index("label")
    for group in {g for g, _, _ in drawn}:
        own = {t: [v for g, u, v in drawn if (g, u) == (group, t)] for t in "tuvw"}
        means = [statistics.fmean(values) for values in own.values() if values]
        row = found.loc[group]
        assert row["n"] == row["ttt_bpb_n"] == len(means)
        assert row["ttt_bpb_mean"] == pytest.approx(statistics.fmean(means))
        if len(means) > 1:
            assert row["ttt_bpb_sd"] == pytest.approx(statistics.stdev(means), abs=1e-9)
            assert row["ttt_bpb_low"] <= row["ttt_bpb_mean"] <= row["ttt_bpb_high"]


def test_means_by_training() -> None:
    assert mean_by_training([("a", 1.0), ("b", 3.0), ("a", 2.0)]) == [1.5, 3.0]


# Seeds --------------------------------------------------------------------------------------------


def by_seeds(*places: Path) -> pd.DataFrame:
    results = load_results(*places, intervals=False)
    settings = settings_of(results.trials, results.records)
    return grouped(results.trials, seed_keys(results.knobs), settings)


def test_three_logs_of_one_setting_are_three_seeds(tmp_path: Path) -> None:
    paths = [
        make_log(tmp_path / f"{seed}.log", seed=seed, ttt_bpb=bpb, ttt_nats=nats)
        for seed, bpb, nats in SEEDS
    ]
    found = by_seeds(*paths)
    assert len(found) == 1
    row = found.iloc[0]
    assert row["source"] is pd.NA and row["trials"] == "1337, 42, 2025"
    assert row["n"] == 3 and round(row["ttt_bpb_mean"], 8) == 1.07336388
    assert round(row["ttt_bpb_sd"], 8) == 0.00084633


def test_what_is_set_otherwise_is_another_group(tmp_path: Path) -> None:
    first = make_log(tmp_path / "a.log", seed=1)
    other = make_log(tmp_path / "b.log", seed=2)
    other.write_text(other.read_text().replace("muon_momentum: 0.97", "muon_momentum: 0.98"))
    stranger = make_log(tmp_path / "c.log", seed=3)
    stranger.write_text(stranger.read_text().replace("  num_layers", "  new_key: 1\n  num_layers"))
    assert by_seeds(first, other, stranger)["n"].tolist() == [1, 1, 1]


def test_run_folders_that_differ_in_their_seed_are_one_group(tmp_path: Path) -> None:
    places = [make_run(tmp_path / f"run{seed}", seed=seed) for seed in (1, 2)]
    assert by_seeds(*places)["n"].tolist() == [2]


def test_confirmations_have_a_row_a_candidate(tmp_path: Path) -> None:
    knobs = ("adaptation.chunk_size",)
    made = make_sweep(
        tmp_path, "nightly-confirm", num_trials=4, share=1, seeds=[1, 2, 3, 4], num_documents=0,
        labels=["baseline", "baseline", "trial 7", "trial 7"], knobs=(), all_done=True,
    )  # fmt: skip
    found = by_seeds(made.folder)
    assert found["label"].tolist() == ["baseline", "trial 7"]
    assert found["n"].tolist() == [2, 2]
    assert found["source"].tolist() == ["nightly-confirm"] * 2
    # Two sweeps are two groups, whatever they have in common.
    again = make_sweep(tmp_path, "again", num_trials=2, share=2, knobs=knobs, num_documents=0)
    assert set(by_seeds(made.folder, again.folder)["source"]) == {"nightly-confirm", "again"}


def test_trials_that_share_a_training_are_one_seed(tmp_path: Path) -> None:
    made = make_sweep(tmp_path, num_trials=4, share=4, knobs=(), all_done=True, num_documents=0)
    found = by_seeds(made.folder)
    assert found["n"].tolist() == [1] and found["done"].tolist() == [4]
    assert found["ttt_bpb_sd"].isna().all()


def test_scores_of_different_texts_have_no_mean() -> None:
    rows = [done(1, "t1", 1.0), done(2, "t2", 1.2), done(3, "t3", 1.4)]
    for row, size in zip(rows, (100, 100, 200), strict=True):
        row["bytes_scored"] = size
    frame = trials(rows)
    mixed = grouped(frame, ["knob"])
    assert mixed["ttt_bpb_n"].tolist() == [3] and mixed["ttt_bpb_mean"].isna().all()
    [line] = [line for line in mixed_texts(frame, mixed) if "of ttt_bpb" in line]
    assert "(100, 200 bytes)" in line
    one = grouped(frame.iloc[:2].reset_index(drop=True), ["knob"])
    assert one["ttt_bpb_mean"].tolist() == [pytest.approx(1.1)] and not mixed_texts(frame, one)
