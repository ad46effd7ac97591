"""Statistics of few and noisy scores: means, intervals, t tests, and what a difference must be.

The standard library alone, so that a table or a verdict loads no array library; nothing here knows
of trials, seeds or Ray. The sample standard deviation divides by n - 1 everywhere.

Invariant: fewer than two values, or values without any spread, give no p-value and no interval but
a result that says why; a value that is not finite is an error and never part of a mean.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Final, Literal

from golf_ray.errors import UsageError

Alternative = Literal["less", "greater", "two-sided"]
"""What a test is to show of a difference: below 0, above 0, or either."""

LEVEL: Final = 0.95
"""Of an interval, where none is asked for."""
POWER: Final = 0.8
"""Chance of finding a difference that is there, where none is asked for."""
ALPHA: Final = 0.05
"""Chance of finding one that is not there, where none is asked for."""

NORMAL: Final = NormalDist()
_SMALLEST = 1e-300
_LARGE_DF = 1e6
"""From here on Wallace's normal approximation to Student's t is exact to 1e-12."""


# Samples ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean and where it may be."""

    n: int
    mean: float
    sd: float | None
    """Sample standard deviation; None of one value."""
    level: float
    low: float | None
    high: float | None
    why_not: str | None = None
    """Why there is no interval; None where there is one."""


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean.

    Raises:
        UsageError: there is no value, or one is not finite.
    """
    for value in values:
        if not math.isfinite(value):
            raise UsageError(f"{value} among the values is no score", "leave failed runs out")
    if not values:
        raise UsageError("there are no values", "give one or more")
    return math.fsum(values) / len(values)


def sample_sd(values: Sequence[float]) -> float:
    """The sample standard deviation, with n - 1 below the line.

    Raises:
        UsageError: there are fewer than two values, or one is not finite.
    """
    centre = mean(values)
    if len(values) < 2:
        raise UsageError("one value has no standard deviation", "give two or more")
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1))


def interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """The mean with its interval by Student's t.

    Raises:
        UsageError: there is no value, one is not finite, or the level is not between 0 and 1.
    """
    _require_share("level", level)
    n, centre = len(values), mean(values)
    if n < 2:
        return Interval(
            n=n, mean=centre, sd=None, level=level, low=None, high=None,
            why_not="one value gives no interval",
        )  # fmt: skip
    sd = sample_sd(values)
    margin = t_quantile((1 + level) / 2, n - 1) * sd / math.sqrt(n)
    return Interval(
        n=n, mean=centre, sd=sd, level=level, low=centre - margin, high=centre + margin
    )  # fmt: skip


# Student's t --------------------------------------------------------------------------------------


def t_survival(t: float, degrees_of_freedom: float) -> float:
    """P(T > t) of Student's t.

    For t >= 0 it is half of the regularised incomplete beta function I_x(v/2, 1/2) at
    x = v / (v + t^2) (Abramowitz and Stegun, 26.7.1), so a far tail keeps its digits.

    Raises:
        UsageError: there is no degree of freedom.
    """
    v = degrees_of_freedom
    if not v > 0:
        raise UsageError(f"{v} degrees of freedom are none", "give a number above 0")
    if t < 0:
        return 1 - t_survival(-t, v)
    if math.isinf(v) or math.isinf(t):
        return normal_survival(t)
    if v >= _LARGE_DF:
        # Wallace (1959), off by O(1 / v^2) also in the tail.
        return normal_survival((8 * v + 1) / (8 * v + 3) * math.sqrt(v * math.log1p(t * t / v)))
    ratio = t * t / v
    x, y = 1 / (1 + ratio), ratio / (1 + ratio)
    if y == 0:
        return 0.5
    # I_x(a, b) = front / a * fraction, or 1 less the same with its arguments exchanged.
    a, b = v / 2, 0.5
    front = math.exp(-a * math.log1p(ratio) + b * math.log(y) - _log_beta_half(a))
    if x < (a + 1) / (a + b + 2):
        return 0.5 * front * _beta_fraction(a, b, x) / a
    return 0.5 * (1 - front * _beta_fraction(b, a, y) / b)


def t_cdf(t: float, degrees_of_freedom: float) -> float:
    """P(T <= t) of Student's t.

    Raises:
        UsageError: there is no degree of freedom.
    """
    return t_survival(-t, degrees_of_freedom)


def t_quantile(p: float, degrees_of_freedom: float) -> float:
    """The t with P(T <= t) = p.

    Newton's steps on the tail, halved into the bracket where one leads out of it.

    Raises:
        UsageError: p is not between 0 and 1, or there is no degree of freedom.
    """
    _require_share("p", p)
    v = degrees_of_freedom
    if p == 0.5 or math.isinf(v):
        return NORMAL.inv_cdf(p)
    if p < 0.5:
        return -_tail_quantile(p, v)
    return _tail_quantile(1 - p, v)


def t_power(noncentrality: float, degrees_of_freedom: float, alpha: float = ALPHA) -> float:
    """The chance that a one-sided t test finds a difference of so many standard errors.

    The noncentral t: with s the estimated over the true standard error, the chance given s is that
    of a normal variable to exceed t_alpha s - noncentrality, here integrated over the
    distribution of s (sqrt(chi^2 / v)) by Simpson's rule.

    Raises:
        UsageError: alpha is not between 0 and 1, or there is no degree of freedom.
    """
    v, threshold = degrees_of_freedom, _threshold(degrees_of_freedom, alpha)
    if v >= _LARGE_DF:
        return normal_survival(threshold - noncentrality)
    log_front = math.log(2) + v / 2 * math.log(v / 2) - math.lgamma(v / 2)

    def integrand(s: float) -> float:
        if s <= 0:
            density = math.exp(log_front) if v == 1 else 0.0
        else:
            density = math.exp(log_front + (v - 1) * math.log(s) - v * s * s / 2)
        return density * normal_survival(threshold * s - noncentrality)

    wide = 9 / math.sqrt(2 * v)
    low, high = max(0.0, 1 - wide), 1 + wide
    if threshold > 0:
        # Beyond this the chance is 0, and a few parts would have to hold all of it.
        high = min(high, (noncentrality + 9) / threshold)
    return _simpson(integrand, low, high) if low < high else 0.0


def normal_survival(z: float) -> float:
    """P(Z > z) of the standard normal, with the digits of a far tail."""
    return 0.5 * math.erfc(z / math.sqrt(2))


def _tail_quantile(tail: float, v: float) -> float:
    """The t > 0 with P(T > t) = tail < 1/2."""
    low, high = 0.0, 1.0
    while t_survival(high, v) > tail:
        low, high = high, 2 * high
    log_front = -0.5 * math.log(v) - _log_beta_half(v / 2)
    t = (low + high) / 2
    for _ in range(200):
        error = t_survival(t, v) - tail
        low, high = (t, high) if error > 0 else (low, t)
        density = math.exp(log_front - (v + 1) / 2 * math.log1p(t * t / v))
        following = t + error / density if density > _SMALLEST else math.inf
        if not low <= following <= high:
            following = (low + high) / 2
        if abs(following - t) <= 1e-15 * t:
            return following
        t = following
    return t


def _log_beta_half(a: float) -> float:
    """log B(a, 1/2)."""
    if a < 50:
        return math.lgamma(a) + math.lgamma(0.5) - math.lgamma(a + 0.5)
    # Stirling's series of log G(a + 1/2) - log G(a): two large logarithms would cancel.
    r = 1 / (a * a)
    series = (-1 / 8 + r * (1 / 192 + r * (-1 / 640 + r * 17 / 14336))) / a
    return 0.5 * math.log(math.pi) - 0.5 * math.log(a) - series


def _beta_fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of the incomplete beta function (DLMF 8.17.22), by Lentz's rule."""
    c, d = 1.0, 1 / _nonzero(1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            c, d = _nonzero(1 + term / c), 1 / _nonzero(1 + term * d)
            value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return value


def _nonzero(value: float) -> float:
    return value if abs(value) > _SMALLEST else _SMALLEST


def _simpson(function: Callable[[float], float], low: float, high: float, n: int = 400) -> float:
    """Integral by Simpson's rule over an even number of parts."""
    step = (high - low) / n
    weights = (1 if i in (0, n) else 4 if i % 2 else 2 for i in range(n + 1))
    return math.fsum(w * function(low + i * step) for i, w in enumerate(weights)) * step / 3


def _require_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise UsageError(f"{name} = {value} is not between 0 and 1", "give a share such as 0.95")


# Tests --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class TTest:
    """What a t test says of a difference."""

    difference: float
    standard_error: float | None
    statistic: float | None
    degrees_of_freedom: float | None
    alternative: Alternative
    p: float | None
    why_not: str | None = None
    """Why there is no p-value; None where there is one."""

    def margin(self, level: float = LEVEL) -> float | None:
        """Half the width of the interval around the difference; None where there is none."""
        if self.standard_error is None or self.degrees_of_freedom is None:
            return None
        return t_quantile((1 + level) / 2, self.degrees_of_freedom) * self.standard_error


def one_sample(
    values: Sequence[float], against: float, *, alternative: Alternative = "two-sided"
) -> TTest:
    """Student's t test of a mean against a number.

    Raises:
        UsageError: there is no value, or one is not finite.
    """
    n, difference = len(values), mean(values) - against
    if n < 2:
        return _no_p(difference, alternative, "one seed gives no p-value")
    return _t_test(difference, sample_sd(values) ** 2 / n, n - 1, alternative)


def welch(
    a: Sequence[float], b: Sequence[float], *, alternative: Alternative = "two-sided"
) -> TTest:
    """Welch's t test of mean(a) - mean(b), whose spreads may differ.

    Degrees of freedom are Satterthwaite's: (u + w)^2 / (u^2 / (n_a - 1) + w^2 / (n_b - 1)) with
    u and w the squared standard errors of the means.

    Raises:
        UsageError: there is no value on a side, or one is not finite.
    """
    difference = mean(a) - mean(b)
    if min(len(a), len(b)) < 2:
        return _no_p(difference, alternative, "one seed gives no p-value")
    u, w = (sample_sd(values) ** 2 / len(values) for values in (a, b))
    whole = u + w
    if not whole:
        return _t_test(difference, 0.0, 1.0, alternative)
    # Shares of the variance, as its square may be too small for a float.
    degrees = 1 / ((u / whole) ** 2 / (len(a) - 1) + (w / whole) ** 2 / (len(b) - 1))
    return _t_test(difference, whole, degrees, alternative)


def student(
    a: Sequence[float], b: Sequence[float], *, alternative: Alternative = "two-sided"
) -> TTest:
    """Student's t test of mean(a) - mean(b) by the spread that both have together.

    Exact where their spreads are the same, however few and however unlike in number the values
    are; Welch's is not, and with 3 values against 20 it errs twice as often as it says.

    Raises:
        UsageError: there is no value on a side, or one is not finite.
    """
    difference, degrees = mean(a) - mean(b), len(a) + len(b) - 2
    if min(len(a), len(b)) < 2:
        return _no_p(difference, alternative, "one seed gives no p-value")
    pooled = pooled_sd(a, b)
    return _t_test(difference, pooled**2 * (1 / len(a) + 1 / len(b)), degrees, alternative)


def pooled_sd(a: Sequence[float], b: Sequence[float]) -> float:
    """The standard deviation that two samples of the same spread tell together.

    Raises:
        UsageError: one has fewer than two values, or one of them is not finite.
    """
    squares = (len(a) - 1) * sample_sd(a) ** 2 + (len(b) - 1) * sample_sd(b) ** 2
    return math.sqrt(squares / (len(a) + len(b) - 2))


def paired(
    a: Sequence[float], b: Sequence[float], *, alternative: Alternative = "two-sided"
) -> TTest:
    """Student's t test of the differences a_i - b_i of pairs, such as one artifact's two scores.

    Two trainings from the same seed are no pair: they differ as much as two seeds do.

    Raises:
        UsageError: the lists are not of the same length, are empty, or a value is not finite.
    """
    if len(a) != len(b):
        raise UsageError(f"{len(a)} and {len(b)} values are no pairs", "give as many of each")
    return one_sample([x - y for x, y in zip(a, b, strict=True)], 0.0, alternative=alternative)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """p-values adjusted for their number by Holm's step-down rule, in the order given.

    The i-th smallest of m becomes max over j <= i of min(1, (m - j + 1) p_(j)): rejecting those at
    most alpha rejects any true hypothesis with a chance of at most alpha (Holm, 1979).
    """
    m, running = len(p_values), 0.0
    adjusted = [0.0] * m
    for rank, place in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (m - rank) * p_values[place]))
        adjusted[place] = running
    return tuple(adjusted)


def _no_p(difference: float, alternative: Alternative, why: str) -> TTest:
    return TTest(
        difference=difference, standard_error=None, statistic=None, degrees_of_freedom=None,
        alternative=alternative, p=None, why_not=why,
    )  # fmt: skip


def _t_test(
    difference: float, variance: float, degrees_of_freedom: float, alternative: Alternative
) -> TTest:
    """A test by the squared standard error of a difference."""
    if not variance:
        return _no_p(difference, alternative, "values that are all the same give no p-value")
    error = math.sqrt(variance)
    t = difference / error
    if alternative == "two-sided":
        p = 2 * t_survival(abs(t), degrees_of_freedom)
    else:
        p = t_survival(t if alternative == "greater" else -t, degrees_of_freedom)
    return TTest(
        difference=difference, standard_error=error, statistic=t,
        degrees_of_freedom=degrees_of_freedom, alternative=alternative, p=p,
    )  # fmt: skip


# Planning -----------------------------------------------------------------------------------------


def smallest_difference(
    sd: float,
    n_a: int,
    n_b: int,
    power: float = POWER,
    alpha: float = ALPHA,
    *,
    known_sd: bool = True,
) -> float:
    """The smallest difference of two means that a one-sided test finds with some power.

    With a known standard deviation it is (z_power + z_(1 - alpha)) sd sqrt(1 / n_a + 1 / n_b), z
    being normal quantiles: sd 0.00075 gives 0.0026 with one seed each, 0.0015 with 3 and 0.0009
    with 8, all by this formula. Where the same seeds must also tell the standard deviation, the
    test is Student's with n_a + n_b - 2 degrees of freedom, and the noncentral t gives 0.0019
    with 3 and 0.0010 with 8; with one seed each there is no test.

    Args:
        sd: standard deviation of one value.
        known_sd: whether the test knows it, from many earlier runs say.

    Raises:
        UsageError: a count is below 1, a share is not between 0 and 1, or the values cannot tell
            their standard deviation.
    """
    if min(n_a, n_b) < 1:
        raise UsageError(f"{min(n_a, n_b)} values show nothing", "give one or more a side")
    degrees = math.inf if known_sd else n_a + n_b - 2
    if degrees < 1:
        raise UsageError("one value each does not tell its standard deviation",
                         "give two or more on a side")  # fmt: skip
    return noncentrality(degrees, power, alpha) * sd * math.sqrt(1 / n_a + 1 / n_b)


@functools.lru_cache(maxsize=256)
def noncentrality(degrees_of_freedom: float, power: float = POWER, alpha: float = ALPHA) -> float:
    """Standard errors that a difference must be for a one-sided t test to find it so often.

    Raises:
        UsageError: a share is not between 0 and 1, the power is no more than alpha, or there is no
            degree of freedom.
    """
    _require_share("power", power)
    threshold = _threshold(degrees_of_freedom, alpha)
    if degrees_of_freedom >= _LARGE_DF:
        return threshold + NORMAL.inv_cdf(power)
    if power <= alpha:
        raise UsageError(f"power = {power} is no more than alpha = {alpha}", "ask for more power")
    low, high = 0.0, 1.0
    while t_power(high, degrees_of_freedom, alpha) < power:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        found = t_power(middle, degrees_of_freedom, alpha) >= power
        low, high = (low, middle) if found else (middle, high)
    return (low + high) / 2


@functools.lru_cache(maxsize=256)
def _threshold(degrees_of_freedom: float, alpha: float) -> float:
    _require_share("alpha", alpha)
    return t_quantile(1 - alpha, degrees_of_freedom)


def expected_maximum(n: int) -> float:
    """The mean of the largest of n standard normal values: 0 of one, 1.42 of 8, 2.51 of 100.

    The integral of the chance to be above x for x > 0, less that to be below for x < 0.

    Raises:
        UsageError: there are none.
    """
    if n < 1:
        raise UsageError(f"{n} values have no largest", "give one or more")

    def integrand(x: float) -> float:
        # log1p keeps the digits where Phi(x) is close to 1.
        above = -math.expm1(n * math.log1p(-normal_survival(x)))
        return above - NORMAL.cdf(-x) ** n

    return _simpson(integrand, 0.0, 12.0)
