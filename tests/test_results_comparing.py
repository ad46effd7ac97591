"""Comparisons: against scipy, and against what they promise on simulated seeds and documents."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from results_made import make_log, make_sweep
from scipy import stats as scipy_stats

from golf_ray import stats
from golf_ray.errors import UsageError
from golf_ray.results.compared import compare_numbers, compare_places
from golf_ray.results.comparing import Scores, compare_published, compare_seeds
from golf_ray.results.pairing import compare_documents

NUM_SIMULATED = 2_000
SD = 0.00075
RECORD_BPB = (1.07258208, 1.07324696, 1.07426259)
RECORD_NATS = (2.77059090, 2.77230836, 2.77493185)


def scores(values: tuple[float, ...], name: str = "a", **fields: object) -> Scores:
    return Scores(name=name, values=tuple(values), **fields)  # type: ignore[arg-type]


def within_binomial(count: int, chance: float, of: int = NUM_SIMULATED) -> bool:
    """Whether a count is within 4 standard errors: one test in 16,000 fails by luck."""
    return abs(count - of * chance) <= 4 * math.sqrt(of * chance * (1 - chance))


# Against scipy ------------------------------------------------------------------------------------


def test_p_values_are_scipys() -> None:
    draw = np.random.default_rng(0)
    for n_a, n_b in ((3, 3), (2, 5), (8, 3)):
        a, b = draw.normal(1.07, SD, n_a), draw.normal(1.0705, 2 * SD, n_b)
        [found] = compare_seeds(scores(tuple(b), "b"), [scores(tuple(a))])
        expected = scipy_stats.ttest_ind(a, b, equal_var=False)
        assert found.welch.p_two_sided == pytest.approx(expected.pvalue, rel=1e-9)
        assert found.welch.t_gain == pytest.approx(-expected.statistic, rel=1e-9)
        low, high = expected.confidence_interval(0.95)
        assert (found.welch.low, found.welch.high) == pytest.approx((low, high), rel=1e-9)
        less = scipy_stats.ttest_ind(a, b, equal_var=False, alternative="less")
        assert found.welch.p_one_sided == pytest.approx(less.pvalue, rel=1e-9)
        single = compare_published(scores(tuple(a)), 1.0705)
        one = scipy_stats.ttest_1samp(a, 1.0705, alternative="less")
        assert single.test.p_one_sided == pytest.approx(one.pvalue, rel=1e-9)


def test_the_interval_holds_the_mean_as_often_as_it_says() -> None:
    draws = np.random.default_rng(1).normal(1.07, SD, (NUM_SIMULATED, 3))
    held = 0
    for values in draws.tolist():
        found = stats.interval(values)
        assert found.low is not None and found.high is not None
        held += found.low <= 1.07 <= found.high
    assert within_binomial(held, 0.95)


@pytest.mark.parametrize(("n_a", "n_b"), [(3, 3), (3, 8)])
def test_no_difference_is_called_better_at_most_one_time_in_twenty(n_a: int, n_b: int) -> None:
    draw = np.random.default_rng(n_b)
    a = draw.normal(1.07, SD, (NUM_SIMULATED, n_a)).tolist()
    b = draw.normal(1.07, SD, (NUM_SIMULATED, n_b)).tolist()
    better = sum(
        compare_seeds(scores(tuple(y), "b"), [scores(tuple(x))])[0].verdict == "better"
        for x, y in zip(a, b, strict=True)
    )
    # Welch's test of few seeds is a little careful: never above its share, and not far below.
    assert better <= 0.05 * NUM_SIMULATED + 4 * math.sqrt(0.05 * 0.95 * NUM_SIMULATED)
    assert better >= 0.02 * NUM_SIMULATED


def test_holm_holds_for_all_candidates_together() -> None:
    draw = np.random.default_rng(5)
    rounds = 600
    wrong = 0
    for _ in range(rounds):
        base = scores(tuple(draw.normal(1.07, SD, 4)), "base")
        others = [scores(tuple(draw.normal(1.07, SD, 4)), str(i)) for i in range(3)]
        wrong += any(found.verdict == "better" for found in compare_seeds(base, others))
    assert wrong <= 0.05 * rounds + 4 * math.sqrt(0.05 * 0.95 * rounds)


def test_documents_that_differ_by_chance_are_told_apart_one_time_in_twenty() -> None:
    draw = np.random.default_rng(2)
    sizes = np.exp(draw.normal(7, 1.2, 80)).astype(int) + 10
    rounds, wrong = 1_000, 0
    for _ in range(rounds):
        noise = draw.normal(0, 1, 80) * np.sqrt(sizes) * 0.02
        a, b = frame_of(sizes, 0.0 * noise), frame_of(sizes, noise)
        wrong += compare_documents(a, b).differ
    assert wrong <= 0.05 * rounds + 4 * math.sqrt(0.05 * 0.95 * rounds)
    assert wrong >= 0.015 * rounds


def frame_of(sizes: np.ndarray, extra_nats: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "document": np.arange(len(sizes)),
            "nats": sizes * 0.75 + extra_nats,
            "tokens": sizes // 4 + 1,
            "bytes": sizes,
        }
    )


# What is said -------------------------------------------------------------------------------------


def test_the_records_seeds() -> None:
    bpb = compare_numbers(RECORD_BPB, 1.0810, unit="bpb").published
    assert bpb is not None
    summary = bpb.candidate.summary()
    assert f"{summary['mean']:.8f} {summary['sd']:.8f}" == "1.07336388 0.00084633"
    assert f"{bpb.test.t_gain:.2f} {bpb.test.p_one_sided:.4f}" == "15.63 0.0020"
    nats = compare_numbers(RECORD_NATS, 2.7923, unit="nats", margin=0.005).published
    assert nats is not None and nats.margin_test is not None
    assert f"{nats.margin_test.t_gain:.2f} {nats.margin_test.p_one_sided:.4f}" == "11.64 0.0037"


def test_one_seed_gives_no_p_value_and_no_verdict() -> None:
    [found] = compare_seeds(scores((1.07,), "b"), [scores((1.06,))])
    assert found.verdict == "no p-value" and found.test.p_one_sided is None
    assert found.rule.p is None and found.smallest is None
    assert found.smallest_known == pytest.approx(0.0026, abs=5e-5)


def test_trials_of_one_training_count_once_and_the_best_is_named_as_picked(tmp_path: Path) -> None:
    made = make_sweep(tmp_path / "store", "nightly", all_done=True, num_finals=0)
    best = min(made.records, key=lambda r: r["ttt_bpb"])["trial"]
    first = (best - 1) // 4 * 4 + 1
    sides = [f"nightly:{(first + 3) % 24 + 1}", f"nightly:{first},{first + 1},{first + 2}"]
    found = compare_places([sides[0], f"nightly:{best}"], storage=str(made.storage))
    assert any("was picked as the best of 24 trials" in note for note in found.notes)
    assert [pair.num_documents for _, _, pair in found.documents] == [20]
    grouped = compare_places(sides, storage=str(made.storage))
    assert len(grouped.scores[1].values) == 1
    assert any("3 trials are of 1 training" in note for note in grouped.notes)
    assert "one seed gives no p-value" in "\n".join(found.lines())
    [(_, _, pair)] = found.documents
    said = pair.line("a", "b")
    assert ("these two artifacts differ; that one setting is better" in said) == pair.differ


def test_logs_of_seeds_are_one_side(tmp_path: Path) -> None:
    for seed, bpb, nats in zip((42, 1337, 2025), RECORD_BPB, RECORD_NATS, strict=True):
        make_log(tmp_path / f"{seed}.log", seed=seed, ttt_bpb=bpb, ttt_nats=nats)
    found = compare_places([f"{tmp_path}/*.log"], storage=str(tmp_path), against=1.0810)
    assert found.published is not None
    assert f"{found.published.test.p_one_sided:.4f}" == "0.0020"
    assert sorted(s for s in found.scores[0].seeds if s is not None) == [42, 1337, 2025]


def test_other_documents_are_refused() -> None:
    sizes = np.array([10, 20, 30])
    with pytest.raises(UsageError, match=r"other documents: 3 and 2, of which 1"):
        compare_documents(frame_of(sizes, 0.0 * sizes), frame_of(sizes[:2], np.zeros(2)))
    with pytest.raises(UsageError, match=r"document 2 has 30 bytes and 31"):
        compare_documents(
            frame_of(sizes, 0.0 * sizes), frame_of(np.array([10, 20, 31]), np.zeros(3))
        )


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        (["nightly"], "24 trials of different knobs"),
        (["nightly:1", "nightly:77"], "it has 1 to 24"),
        (["nightly:1", "nigtly:2"], "did you mean 'nightly'"),
        (["nightly:1"], "name one more, or --against"),
    ],
)
def test_bad_sides_are_one_line(tmp_path: Path, sides: list[str], expected: str) -> None:
    made = make_sweep(tmp_path / "store", "nightly", all_done=True, num_documents=0)
    with pytest.raises(UsageError, match=expected):
        compare_places(sides, storage=str(made.storage))
