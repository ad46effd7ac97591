"""Importances: a knob that matters is found, one that does not is within the noise."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from golf_ray.errors import UsageError
from golf_ray.results.importances import FIXED, MATTERS, NOISE, deal, draw_weights, importances


def sweep(num_trainings: int, share: int, *, seed: int = 0, luck: float = 0.002) -> pd.DataFrame:
    """Trials of which `knob.used` moves the score, `knob.idle` does not, and trainings differ."""
    draw = np.random.default_rng(seed)
    groups = np.repeat(np.arange(num_trainings), share)
    n = len(groups)
    used, idle = draw.uniform(0, 1, n), draw.uniform(0, 1, n)
    bpb = 1.07 + 0.01 * used + draw.normal(0, 2e-4, n) + draw.normal(0, luck, num_trainings)[groups]
    return pd.DataFrame(
        {
            "status": "done", "fits": True, "training": [f"train-{g}" for g in groups],
            "knob.used": used, "knob.idle": idle, "knob.fixed": 1.0, "ttt_bpb": bpb,
        }
    )  # fmt: skip


def test_what_matters_is_found_though_trainings_differ() -> None:
    found = importances(sweep(10, 4), ["knob.idle", "knob.used", "knob.fixed"]).set_index("knob")
    assert found["verdict"].to_dict() == {
        "knob.used": MATTERS, "knob.idle": NOISE, "knob.fixed": FIXED,
    }  # fmt: skip
    used = found.loc["knob.used"]
    assert used["low"] <= used["importance"] <= used["high"] and used["importance"] > used["noise"]
    assert used["effect"] == pytest.approx(0.01, rel=0.2)


def test_a_knob_without_effect_matters_one_time_in_twenty() -> None:
    rounds = 60
    wrong = sum(
        importances(sweep(8, 3, seed=i), ["knob.idle", "knob.used"], num_bootstrap=2,
                    num_shuffles=200).set_index("knob")["verdict"]["knob.idle"] == MATTERS
        for i in range(rounds)
    )  # fmt: skip
    # The binomial's chance of more than 10 of 60 at 5% is below 0.0003.
    assert wrong <= 10


def test_too_few_points_have_no_number() -> None:
    found = importances(sweep(1, 3), ["knob.used", "knob.idle"])
    assert found["importance"].isna().all()
    assert all("too few" in verdict for verdict in found["verdict"])


def test_failed_trials_have_no_say() -> None:
    frame = sweep(10, 4)
    extra = frame.assign(status="failed", ttt_bpb=np.nan)
    one, other = (
        importances(f, ["knob.used", "knob.idle"]) for f in (frame, pd.concat([frame, extra]))
    )
    pd.testing.assert_frame_equal(one, other)


def test_a_size_that_was_measured_counts_more_than_one_foretold() -> None:
    frame = sweep(10, 4)
    foretold = pd.Series([False] * 20 + [True] * 20, dtype="boolean")
    measured = pd.Series([True] * 20 + [None] * 20, dtype="boolean")
    knobs = ["knob.used", "knob.idle"]
    saved = importances(frame.assign(fits=foretold, final_fits=measured), knobs)
    pd.testing.assert_frame_equal(saved, importances(frame, knobs))
    half = importances(frame.assign(fits=foretold), knobs)
    pd.testing.assert_frame_equal(half, importances(frame[20:], knobs))


@given(st.lists(st.integers(0, 4), min_size=2, max_size=30), st.integers(0, 9))
def test_trials_of_a_training_stay_together(groups: list[int], seed: int) -> None:
    _, of = np.unique(groups, return_inverse=True)
    weights = draw_weights(of.astype(np.int64), np.random.default_rng(seed))
    for group in set(of.tolist()):
        mine = weights[of == group]
        if len(set(of.tolist())) > 5:
            assert np.all(mine == mine[0])
    values = np.arange(len(groups), dtype=np.float64)
    dealt = deal(values, of.astype(np.int64), 3, np.random.default_rng(seed))
    for row in dealt:
        for group in set(of.tolist()):
            assert sorted(row[of == group]) == sorted(values[of == group])


def test_an_unknown_column_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"did you mean 'knob\.used'"):
        importances(sweep(4, 2), ["knob.usd"])
