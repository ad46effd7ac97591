"""Comparisons of scores over seeds: settings with a baseline, or with a published number.

Numbers alone: who has them from where is said by `golf_ray.results.sides`, and what two artifacts
say of the same documents by `golf_ray.results.pairing`. Lower scores are better, so a difference
(candidate less baseline) below 0 is a gain, and the t of a gain is above 0.

Invariant: a value is a training, never one of several trials of it; a side of one training gives
no p-value and no verdict; the same seed on both sides makes no pair, the same training does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

from golf_ray.errors import UsageError
from golf_ray.stats import (
    ALPHA,
    LEVEL,
    Interval,
    TTest,
    holm,
    interval,
    mean,
    noncentrality,
    one_sample,
    paired,
    pooled_sd,
    smallest_difference,
    student,
    t_quantile,
    welch,
)
from golf_ray.sweeps.confirmation import RECORD_ALPHA, RECORD_GAIN_NATS
from golf_ray.sweeps.power import Noise

Unit = Literal["bpb", "nats"]
Verdict = Literal["better", "worse", "not told apart", "no p-value"]
SAME_RATIO: Final = 1e-4
"""Tokens a byte of two texts are the same up to this part."""


# Sides --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """What the trainings of one setting scored, a value each."""

    name: str
    values: tuple[float, ...]
    unit: Unit = "bpb"
    nats: tuple[float, ...] | None = None
    """Mean loss a token of the same trainings; None where one does not say it."""
    bpb_per_nat: float | None = None
    """Tokens a byte over ln 2, by which a nat a token is bits a byte; None where not known."""
    seeds: tuple[int | None, ...] = ()
    """Of the trainings; none where they are only numbers."""
    trainings: tuple[str, ...] = ()
    """What tells the trainings from others, one each; none where they are only numbers."""

    def __post_init__(self) -> None:
        if not self.values:
            raise UsageError(f"{self.name} has no score", "give one or more")
        if self.nats is not None and len(self.nats) != len(self.values):
            raise UsageError(
                f"{self.name} has {len(self.values)} scores in bpb and {len(self.nats)} in nats",
                "give one of each for every seed",
            )
        for value in (*self.values, *(self.nats or ())):
            if not math.isfinite(value):
                raise UsageError(f"{value} among the scores of {self.name} is none",
                                 "leave failed runs out")  # fmt: skip

    @property
    def ratio(self) -> float | None:
        """bpb of a nat a token, from the scores themselves where they are known in both."""
        if self.unit == "bpb" and self.nats:
            return mean(self.values) / mean(self.nats)
        return self.bpb_per_nat

    @property
    def in_nats(self) -> tuple[float, ...] | None:
        """The scores in nats a token, where they are known."""
        return self.values if self.unit == "nats" else self.nats

    def summary(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "name": self.name,
            "unit": self.unit,
            **_plain(interval(self.values)),
            "values": list(self.values),
            "mean_nats": None if self.in_nats is None else mean(self.in_nats),
            "seeds": list(self.seeds),
        }


# Tests --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Test:
    """What a t test says of a difference."""

    difference: float
    """Below 0 for a gain."""
    low: float | None
    """Lower end of its 95% interval."""
    high: float | None
    t_gain: float | None
    degrees_of_freedom: float | None
    p_one_sided: float | None
    """That the gain is not above 0, or above the margin that was asked for."""
    p_two_sided: float | None
    """That there is no difference."""
    why_not: str | None
    """Why there is no p-value."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "level": LEVEL}


@dataclass(frozen=True, kw_only=True, slots=True)
class Margin:
    """Whether a gain is more than some margin; the field's rule for a record is 0.005 nats."""

    margin: float
    unit: Unit
    """Of the margin as it was asked for."""
    tested_in: Unit
    margin_tested: float | None
    """The margin in the unit that was tested; None where it cannot be known."""
    gain: float | None
    """In the unit that was tested."""
    t: float | None
    p: float | None
    """One-sided, that the gain is no more than the margin."""
    p_holm: float | None
    """The same for the number of candidates."""
    why_not: str | None

    @property
    def meets(self) -> bool:
        """Whether it is so at the field's p < 0.01."""
        return self.p_holm is not None and self.p_holm < RECORD_ALPHA

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "needed_p": RECORD_ALPHA, "meets": self.meets}


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedComparison:
    """A candidate and the baseline over seeds."""

    baseline: Scores
    candidate: Scores
    method: Literal["welch", "student", "paired"]
    """The test that decides; see `compare_seeds`."""
    test: Test
    """Its outcome."""
    welch: Test
    p_holm: float | None
    """The test's one-sided p-value for the number of candidates."""
    rule: Margin
    smallest: float | None
    """The smallest difference that so many seeds show (80% power, one-sided 5%), by their own
    spread; None where there is no p-value."""
    smallest_known: float | None
    """The same if the spread were the field's 0.00075 bpb; None in nats."""
    shared_seeds: tuple[int, ...]
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "candidate": self.candidate.summary(),
            "method": self.method,
            "test": self.test.to_dict(),
            "welch": self.welch.to_dict(),
            "p_holm": self.p_holm,
            "smallest_difference": self.smallest,
            "smallest_difference_field_noise": self.smallest_known,
            "margin": self.rule.to_dict(),
            "shared_seeds": list(self.shared_seeds),
            "verdict": self.verdict,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedComparison:
    """A setting's seeds and a published number."""

    candidate: Scores
    against: float
    test: Test
    margin: float | None
    """In the unit of the scores."""
    margin_test: Test | None
    """Of a gain of more than the margin; None without one."""
    verdict: Verdict

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "candidate": self.candidate.summary(),
            "against": self.against,
            "test": self.test.to_dict(),
            "margin": self.margin,
            "margin_test": None if self.margin_test is None else self.margin_test.to_dict(),
            "verdict": self.verdict,
        }


def compare_seeds(
    baseline: Scores,
    candidates: Sequence[Scores],
    *,
    margin: float = RECORD_GAIN_NATS,
    margin_unit: Unit = "nats",
    alpha: float = ALPHA,
) -> tuple[SeedComparison, ...]:
    """Candidates against one baseline, over seeds.

    The test is Welch's. Where one side has more seeds than the other it is the more careful of
    Welch's and Student's, as Welch's errs more often than it says with few seeds against many (7%
    with 2 against 8). Where both sides are of the same trainings, and differ in what comes after,
    it is the paired one: what a training has of luck is in both and falls out.

    Args:
        margin: also test for a gain of more than this.
        margin_unit: of the margin; in bpb it is converted where the scores are in nats, and the
            other way round, if bytes a token are known.
        alpha: chance that any candidate is called better though none is.

    Raises:
        UsageError: there is no candidate, or units differ.
    """
    if not candidates:
        raise UsageError("there is nothing to compare with", "name one more")
    for candidate in candidates:
        if candidate.unit != baseline.unit:
            raise UsageError(
                f"{baseline.name} is in {baseline.unit} and {candidate.name} in {candidate.unit}",
                "give both in one unit",
            )
    tests = [_chosen(candidate, baseline) for candidate in candidates]
    adjusted = _holm([test.p_one_sided for _, test in tests])
    rules = [_margin(candidate, baseline, margin, margin_unit) for candidate in candidates]
    rules_adjusted = _holm([rule.p for rule in rules])
    return tuple(
        SeedComparison(
            baseline=baseline,
            candidate=candidate,
            method=method,
            test=test,
            welch=_both(welch, candidate.values, baseline.values),
            p_holm=p,
            rule=replace(rule, p_holm=rule_p),
            smallest=_smallest(candidate, baseline, method, test),
            smallest_known=None
            if baseline.unit == "nats"
            else smallest_difference(
                Noise().training_bpb, len(candidate.values), len(baseline.values)
            ),
            shared_seeds=tuple(
                sorted({s for s in candidate.seeds if s is not None} & {*baseline.seeds})
            ),
            verdict=_verdict(test, p, alpha),
        )
        for candidate, (method, test), p, rule, rule_p in zip(
            candidates, tests, adjusted, rules, rules_adjusted, strict=True
        )
    )


def compare_published(
    candidate: Scores, against: float, *, margin: float | None = None, alpha: float = ALPHA
) -> PublishedComparison:
    """A setting's seeds against a number that is taken as exact, by Student's one-sample test.

    Args:
        against: in the unit of the scores.
        margin: also test for a gain of more than this, in that unit.

    Raises:
        UsageError: the number or the margin is not finite.
    """
    for name, value in (("the number to compare with", against), ("the margin", margin or 0.0)):
        if not math.isfinite(value):
            raise UsageError(f"{name} is {value}", "give a finite number")
    test = _both(one_sample, candidate.values, against)
    return PublishedComparison(
        candidate=candidate,
        against=against,
        test=test,
        margin=margin,
        margin_test=None
        if margin is None
        else _both(one_sample, candidate.values, against - margin),
        verdict=_verdict(test, test.p_one_sided, alpha),
    )


# Parts --------------------------------------------------------------------------------------------


def _both(run: Callable[..., TTest], *samples: Any) -> Test:
    """One test with its one-sided and its two-sided p-value."""
    less, two = (run(*samples, alternative=side) for side in ("less", "two-sided"))
    margin = less.margin(LEVEL)
    return Test(
        difference=less.difference,
        low=None if margin is None else less.difference - margin,
        high=None if margin is None else less.difference + margin,
        t_gain=None if less.statistic is None else -less.statistic,
        degrees_of_freedom=less.degrees_of_freedom,
        p_one_sided=less.p,
        p_two_sided=two.p,
        why_not=less.why_not,
    )


def _chosen(
    candidate: Scores, baseline: Scores, shift: float = 0.0, nats: bool = False
) -> tuple[Literal["welch", "student", "paired"], Test]:
    """The test that decides, by what both sides are; `shift` is taken off the baseline."""
    a = candidate.in_nats if nats else candidate.values
    b = baseline.in_nats if nats else baseline.values
    assert a is not None and b is not None
    b = tuple(value - shift for value in b)
    if candidate.trainings and set(candidate.trainings) == set(baseline.trainings):
        order = {name: i for i, name in enumerate(baseline.trainings)}
        others = [b[order[name]] for name in candidate.trainings]
        return "paired", _both(paired, a, others)
    first = _both(welch, a, b)
    if len(a) == len(b) or first.p_two_sided is None:
        return "welch", first
    second = _both(student, a, b)
    careful = second.p_two_sided is None or second.p_two_sided > first.p_two_sided
    return ("student", second) if careful else ("welch", first)


def _margin(candidate: Scores, baseline: Scores, margin: float, unit: Unit) -> Margin:
    nats = candidate.in_nats is not None and baseline.in_nats is not None
    if unit == "bpb" and baseline.unit == "bpb":
        nats = False
    tested_in: Unit = "nats" if nats else "bpb"
    factor, why_not = (1.0, None) if tested_in == unit else _factor(candidate, baseline, unit)
    if nats and why_not is None and not _same_tokens(candidate, baseline):
        factor, why_not = None, "their tokens are others, so nats a token are not of one kind"
    found = Margin(
        margin=margin, unit=unit, tested_in=tested_in, margin_tested=None, gain=None, t=None,
        p=None, p_holm=None, why_not=why_not,
    )  # fmt: skip
    if factor is None:
        return found
    shift = margin * factor
    _, test = _chosen(candidate, baseline, shift, nats)
    return replace(
        found, margin_tested=shift, gain=shift - test.difference, t=test.t_gain,
        p=test.p_one_sided, why_not=test.why_not,
    )  # fmt: skip


def _factor(candidate: Scores, baseline: Scores, unit: Unit) -> tuple[float | None, str | None]:
    """What a margin of a unit is in the other, and why that is not known."""
    ratios = [s.ratio for s in (candidate, baseline) if s.ratio is not None]
    if not ratios:
        return None, "neither a loss in nats a token nor bytes a token are known"
    if not _same_tokens(candidate, baseline):
        return None, "their tokens are others, so nats a token are not of one kind"
    ratio = mean(ratios)
    return (ratio if unit == "nats" else 1 / ratio), None


def _same_tokens(candidate: Scores, baseline: Scores) -> bool:
    a, b = candidate.ratio, baseline.ratio
    return a is None or b is None or abs(a / b - 1) <= SAME_RATIO


def _smallest(candidate: Scores, baseline: Scores, method: str, test: Test) -> float | None:
    if test.p_one_sided is None or test.high is None:
        return None
    a, b = candidate.values, baseline.values
    if method == "paired":
        # One sample of differences: t_power with n - 1 degrees of freedom.
        error = (test.high - test.difference) / t_quantile((1 + LEVEL) / 2, len(a) - 1)
        return noncentrality(len(a) - 1) * error
    return smallest_difference(pooled_sd(a, b), len(a), len(b), known_sd=False)


def _verdict(test: Test, p: float | None, alpha: float) -> Verdict:
    if p is None or test.low is None:
        return "no p-value"
    if p <= alpha:
        return "better"
    return "worse" if test.low > 0 else "not told apart"


def _holm(p_values: Sequence[float | None]) -> list[float | None]:
    adjusted = iter(holm([p for p in p_values if p is not None]))
    return [None if p is None else next(adjusted) for p in p_values]


def _plain(found: Interval) -> dict[str, Any]:
    return {key: value for key, value in asdict(found).items() if value is not None}
