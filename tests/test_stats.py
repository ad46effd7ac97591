"""Statistics: against scipy, against public figures, and against what they promise."""

from __future__ import annotations

import math
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, optimize
from scipy import stats as reference

from golf_ray import stats
from golf_ray.errors import UsageError

RECORD_BPB = (1.07258208, 1.07324696, 1.07426259)
RECORD_NATS = (2.77059090, 2.77230836, 2.77493185)
SIDES = ("less", "greater", "two-sided")

DEGREES = st.one_of(
    st.integers(1, 40).map(float), st.floats(0.5, 200), st.floats(5, 7).map(lambda x: 10**x)
)
SCORES = st.lists(
    st.floats(0.5, 2).map(lambda x: round(x, 6)), min_size=2, max_size=12
).filter(lambda v: max(v) - min(v) > 1e-5)  # fmt: skip


# Student's t --------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(DEGREES, st.one_of(st.floats(-12, 12), st.floats(-1e6, 1e6)))
def test_survival_and_cdf_are_scipys(v: float, t: float) -> None:
    assert stats.t_survival(t, v) == pytest.approx(reference.t.sf(t, v), rel=1e-7, abs=1e-10)
    assert stats.t_cdf(t, v) == pytest.approx(reference.t.cdf(t, v), rel=1e-7, abs=1e-10)
    assert stats.t_survival(t, v) + stats.t_cdf(t, v) == pytest.approx(1, abs=1e-14)


@settings(max_examples=300)
@given(DEGREES, st.floats(1e-9, 1 - 1e-9))
def test_quantile_is_scipys_and_the_inverse(v: float, p: float) -> None:
    t = stats.t_quantile(p, v)
    assert t == pytest.approx(reference.t.ppf(p, v), rel=1e-9, abs=1e-10)
    assert stats.t_cdf(t, v) == pytest.approx(p, rel=1e-10, abs=1e-13)


def test_far_tail_keeps_its_digits() -> None:
    for v in (1.0, 4.5, 60.0, 2000.0):
        for t in (30.0, 300.0):
            expected = reference.t.sf(t, v)
            assert expected == 0 or stats.t_survival(t, v) == pytest.approx(expected, rel=1e-10)


def test_the_approximation_for_many_degrees_joins_up() -> None:
    for t in (0.1, 1.0, 3.0, 8.0):
        below, above = stats.t_survival(t, 1e6 * (1 - 1e-9)), stats.t_survival(t, 1e6)
        assert above == pytest.approx(below, rel=1e-10)
        assert stats.t_survival(t, math.inf) == pytest.approx(reference.norm.sf(t), rel=1e-12)
    assert stats.t_survival(math.inf, 3) == 0
    assert stats.t_cdf(math.inf, 3) == 1


@given(st.integers(1, 60), st.floats(0, 12), st.sampled_from([0.01, 0.05, 0.2]))
def test_power_is_the_noncentral_t(v: int, shift: float, alpha: float) -> None:
    threshold = reference.t.ppf(1 - alpha, v)
    expected = reference.nct.sf(threshold, v, shift) if shift else alpha
    assert stats.t_power(shift, v, alpha) == pytest.approx(expected, abs=1e-6)


# Samples and tests --------------------------------------------------------------------------------


@given(SCORES, st.floats(0.5, 0.999))
def test_interval_is_scipys(values: list[float], level: float) -> None:
    found = stats.interval(values, level)
    low, high = reference.t.interval(level, len(values) - 1, np.mean(values), reference.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9)
    assert found.sd == pytest.approx(np.std(values, ddof=1), rel=1e-9)
    assert found.why_not is None


@given(SCORES, SCORES, st.sampled_from(SIDES))
def test_welch_is_scipys(a: list[float], b: list[float], side: str) -> None:
    found = stats.welch(a, b, alternative=side)  # type: ignore[arg-type]
    expected = reference.ttest_ind(a, b, equal_var=False, alternative=side)
    assert found.statistic == pytest.approx(expected.statistic, rel=1e-8, abs=1e-9)
    assert found.degrees_of_freedom == pytest.approx(expected.df, rel=1e-8)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-7, abs=1e-10)
    margin = found.margin(0.9)
    assert margin is not None
    low, high = reference.ttest_ind(a, b, equal_var=False).confidence_interval(0.9)
    assert 2 * margin == pytest.approx(high - low, rel=1e-8)


@given(SCORES, SCORES, st.sampled_from(SIDES))
def test_student_is_scipys(a: list[float], b: list[float], side: str) -> None:
    found = stats.student(a, b, alternative=side)  # type: ignore[arg-type]
    expected = reference.ttest_ind(a, b, alternative=side)
    assert found.statistic == pytest.approx(expected.statistic, rel=1e-8, abs=1e-9)
    assert found.degrees_of_freedom == expected.df
    assert found.p == pytest.approx(expected.pvalue, rel=1e-7, abs=1e-10)


@given(st.lists(st.tuples(st.floats(0.5, 2), st.floats(0.5, 2)), min_size=2, max_size=9),
       st.sampled_from(SIDES))  # fmt: skip
def test_paired_and_one_sample_are_scipys(pairs: list[tuple[float, float]], side: str) -> None:
    a, b = zip(*pairs, strict=True)
    differences = [x - y for x, y in pairs]
    if max(differences) - min(differences) < 1e-6:
        return
    found = stats.paired(a, b, alternative=side)  # type: ignore[arg-type]
    expected = reference.ttest_rel(a, b, alternative=side)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-7, abs=1e-10)
    assert found.standard_error == pytest.approx(reference.sem(differences), rel=1e-8)
    one = stats.one_sample(a, 1.0, alternative=side)  # type: ignore[arg-type]
    if max(a) - min(a) > 1e-6:
        alone = reference.ttest_1samp(a, 1.0, alternative=side)
        assert one.p == pytest.approx(alone.pvalue, rel=1e-7, abs=1e-10)


def test_public_record() -> None:
    found = stats.interval(RECORD_BPB)
    assert round(found.mean, 8) == 1.07336388
    assert found.sd is not None
    assert round(found.sd, 8) == 0.00084633
    nats = stats.one_sample(RECORD_NATS, 2.7923 - 0.005, alternative="less")
    assert nats.statistic is not None
    assert nats.p is not None
    assert (round(-nats.statistic, 2), round(nats.p, 4)) == (11.64, 0.0037)
    bpb = stats.one_sample(RECORD_BPB, 1.0810, alternative="less")
    assert bpb.statistic is not None
    assert bpb.p is not None
    assert (round(-bpb.statistic, 2), round(bpb.p, 4)) == (15.63, 0.0020)


def test_one_seed_gives_no_p_value() -> None:
    for found in (
        stats.welch([1.0], [1.1, 1.2]),
        stats.welch([1.1, 1.2], [1.0]),
        stats.student([1.1, 1.2], [1.0]),
        stats.one_sample([1.0], 1.1),
        stats.paired([1.0], [1.1]),
    ):
        assert found.p is None
        assert found.statistic is None
        assert found.margin() is None
        assert found.why_not == "one seed gives no p-value"
    alone = stats.interval([1.0])
    assert (alone.mean, alone.sd, alone.low, alone.high) == (1.0, None, None, None)
    assert alone.why_not is not None


def test_values_without_spread_give_no_p_value() -> None:
    for found in (stats.welch([1.0, 1.0], [2.0, 2.0]), stats.one_sample([1.0, 1.0], 2.0)):
        assert found.p is None
        assert found.difference == -1
        assert "the same" in str(found.why_not)
    # One side without spread is enough for Welch's test.
    assert stats.welch([1.0, 1.0], [2.0, 2.1]).p is not None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_an_error(bad: float) -> None:
    for call in (
        lambda: stats.mean([1.0, bad]),
        lambda: stats.interval([1.0, bad]),
        lambda: stats.welch([1.0, 2.0], [1.0, bad]),
    ):
        with pytest.raises(UsageError, match="among the values"):
            call()


def test_wrong_use_is_an_error() -> None:
    for call in (
        lambda: stats.mean([]),
        lambda: stats.sample_sd([1.0]),
        lambda: stats.interval([1.0, 2.0], 1.0),
        lambda: stats.paired([1.0], [1.0, 2.0]),
        lambda: stats.t_quantile(0.0, 3),
        lambda: stats.t_survival(1.0, 0),
        lambda: stats.smallest_difference(1.0, 0, 1),
        lambda: stats.smallest_difference(1.0, 1, 1, known_sd=False),
        lambda: stats.noncentrality(3, 0.04, 0.05),
        lambda: stats.expected_maximum(0),
    ):
        with pytest.raises(UsageError):
            call()


# Holm ---------------------------------------------------------------------------------------------


def test_holm_by_hand() -> None:
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx((0.03, 0.06, 0.06))
    assert stats.holm([0.5, 0.6]) == pytest.approx((1.0, 1.0))
    assert stats.holm([]) == ()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0.001, 0.2))
def test_holm_rejects_what_the_step_down_rule_rejects(p_values: list[float], alpha: float) -> None:
    adjusted = stats.holm(p_values)
    ordered = sorted(range(len(p_values)), key=lambda i: p_values[i])
    going = True
    for rank, place in enumerate(ordered):
        going = going and (len(p_values) - rank) * p_values[place] <= alpha
        assert (adjusted[place] <= alpha) is going
    assert all(x >= p for x, p in zip(adjusted, p_values, strict=True))


# Planning -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "expected"), [(1, 0.0026), (3, 0.0015), (8, 0.0009)])
def test_smallest_differences_of_the_field(n: int, expected: float) -> None:
    assert round(stats.smallest_difference(0.00075, n, n), 4) == expected


@pytest.mark.parametrize(("n_a", "n_b"), [(1, 2), (2, 2), (3, 3), (3, 8), (8, 8)])
def test_smallest_difference_with_an_estimated_spread_is_scipys(n_a: int, n_b: int) -> None:
    v, error = n_a + n_b - 2, math.sqrt(1 / n_a + 1 / n_b)
    threshold = reference.t.ppf(0.95, v)
    expected = optimize.brentq(lambda d: reference.nct.sf(threshold, v, d / error) - 0.8, 0.1, 20)
    found = stats.smallest_difference(1.0, n_a, n_b, known_sd=False)
    assert found == pytest.approx(expected, rel=1e-5)
    assert found > stats.smallest_difference(1.0, n_a, n_b)


@pytest.mark.parametrize("n", [1, 2, 8, 100, 5000])
def test_expected_maximum_is_the_integral(n: int) -> None:
    def density(x: float) -> float:
        return float(x * n * reference.norm.pdf(x) * reference.norm.cdf(x) ** (n - 1))

    expected, _ = integrate.quad(density, -9, 9, limit=200)
    assert stats.expected_maximum(n) == pytest.approx(expected, abs=1e-7)


# Promises -----------------------------------------------------------------------------------------


def binomial_range(n: int, share: float) -> tuple[float, float]:
    """Within which a count of n is with all but 1e-4 of chance."""
    return tuple(reference.binom.ppf([5e-5, 1 - 5e-5], n, share).tolist())


def test_the_interval_covers_and_welch_errs_as_often_as_they_say() -> None:
    num, chance = 2000, random.Random(20)
    covered = found = 0
    for _ in range(num):
        a = [chance.gauss(1.07, 0.00075) for _ in range(5)]
        b = [chance.gauss(1.07, 0.00075) for _ in range(5)]
        interval = stats.interval(a)
        assert interval.low is not None
        assert interval.high is not None
        covered += interval.low <= 1.07 <= interval.high
        p = stats.welch(a, b, alternative="less").p
        assert p is not None
        found += p <= 0.05
    low, high = binomial_range(num, 0.95)
    assert low <= covered <= high
    low, high = binomial_range(num, 0.05)
    # Welch's test is an approximation that errs a little less often with few values.
    assert 0.7 * low <= found <= high


def test_the_smallest_difference_is_found_so_often() -> None:
    num, n, sd = 2000, 3, 0.00075
    chance = random.Random(21)
    effect = stats.smallest_difference(sd, n, n, known_sd=False)
    v, found = 2 * n - 2, 0
    threshold = stats.t_quantile(0.95, v)
    for _ in range(num):
        a = [chance.gauss(1.07 - effect, sd) for _ in range(n)]
        b = [chance.gauss(1.07, sd) for _ in range(n)]
        pooled = math.sqrt((stats.sample_sd(a) ** 2 + stats.sample_sd(b) ** 2) / 2)
        found += (stats.mean(b) - stats.mean(a)) / (pooled * math.sqrt(2 / n)) > threshold
    low, high = binomial_range(num, 0.8)
    assert low <= found <= high


def test_the_standard_library_is_enough() -> None:
    program = (
        "import sys, golf_ray.stats\n"
        "heavy = {'numpy', 'scipy', 'pandas', 'torch', 'ray'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
