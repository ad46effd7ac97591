"""What may be claimed of a sweep's best candidates, by runs from fresh seeds.

A candidate was picked because its score was low, so that score flatters it; only seeds that had
no part in the choice tell what it is worth. This judges such scores and runs nothing. Candidate and
baseline are compared as two samples, never seed by seed: the same seed twice is no pair, as two
such runs differ as much as two seeds do.

Invariant: without two fresh seeds on either side there is no p-value and no claim, and the
p-values of all candidates that were confirmed together are adjusted for their number. So the chance
that any is called better though none is stays within 5% also with few seeds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from golf_ray.errors import UsageError
from golf_ray.stats import (
    ALPHA,
    LEVEL,
    holm,
    mean,
    one_sample,
    pooled_sd,
    sample_sd,
    smallest_difference,
    student,
    welch,
)

if TYPE_CHECKING:
    from rich.table import Table

RECORD_GAIN_NATS: Final = 0.005
"""Nats a token that a new record of the field must be better by."""
RECORD_ALPHA: Final = 0.01
"""At this p-value."""
NAME_WIDTH: Final = 14
_SHORT: Final = {"not told apart": "unclear", "no p-value": "no p"}
"""Verdicts in a narrow table."""

Verdict = Literal["better", "worse", "not told apart", "no p-value"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What one training from a fresh seed scored."""

    bpb: float
    loss_nats: float | None = None
    """Mean loss a token; the field's rule for a record is in these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """The runs of one configuration."""

    n: int
    mean_bpb: float
    sd_bpb: float | None
    """Sample standard deviation; None of one run."""
    mean_nats: float | None
    """None where not every run says it."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "n": self.n,
            "mean_bpb": self.mean_bpb,
            "sd_bpb": self.sd_bpb,
            "mean_nats": self.mean_nats,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordRule:
    """Whether a candidate would be a new record by the field's rule."""

    gain_nats: float | None
    """How far its mean loss a token is below the previous record's."""
    needed_bpb: float | None
    """What 0.005 nats a token are in bpb on this text; None where no run tells."""
    p: float | None
    """Of a gain of no more than 0.005 nats, before Holm."""
    p_holm: float | None
    meets: bool
    why_not: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "needed_nats": RECORD_GAIN_NATS,
            "needed_p": RECORD_ALPHA,
            "needed_bpb": self.needed_bpb,
            "gain_nats": self.gain_nats,
            "p": self.p,
            "p_holm": self.p_holm,
            "meets": self.meets,
            "why_not": self.why_not,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Confirmed:
    """One candidate against the baseline."""

    name: str
    runs: Spread
    difference_bpb: float
    """Its mean less the baseline's: below 0 is better."""
    margin_bpb: float | None
    """Half the width of the 95% interval of the difference."""
    p: float | None
    """One-sided, that it is better, before Holm; see `compare`."""
    p_holm: float | None
    smallest_bpb: float | None
    """The smallest difference that so many seeds show (80% power, one-sided 5%), by the spread
    that both have together; before Holm."""
    verdict: Verdict
    line: str
    """The verdict with its numbers."""
    record: RecordRule

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        low_high = None
        if self.margin_bpb is not None:
            low_high = [
                self.difference_bpb - self.margin_bpb,
                self.difference_bpb + self.margin_bpb,
            ]
        return {
            **self.runs.to_dict(),
            "difference_bpb": self.difference_bpb,
            "interval_bpb": low_high,
            "level": LEVEL,
            "p": self.p,
            "p_holm": self.p_holm,
            "smallest_bpb": self.smallest_bpb,
            "verdict": self.verdict,
            "line": self.line,
            "record": self.record.to_dict(),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Confirmation:
    """All candidates that were confirmed together."""

    baseline: Spread
    candidates: tuple[Confirmed, ...]
    alpha: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "baseline": self.baseline.to_dict(),
            "alpha": self.alpha,
            "compared": len(self.candidates),
            "candidates": {c.name: c.to_dict() for c in self.candidates},
        }

    def lines(self) -> tuple[str, ...]:
        """Verdicts for people, one a candidate, then those of the field's rule."""
        told = [f"{c.name}: {c.line}" for c in self.candidates]
        return (*told, *(f"{c.name}: {record_line(c.record)}" for c in self.candidates))


def confirm(
    candidates: Mapping[str, Mapping[int, Run]],
    baseline: Mapping[int, Run],
    *,
    used_seeds: Collection[int] = (),
    record_nats: float | None = None,
    alpha: float = ALPHA,
) -> Confirmation:
    """Judge candidates by their runs from fresh seeds.

    Args:
        candidates: runs by seed, by candidate; all that were confirmed, not the best of them.
        baseline: its runs by seed.
        used_seeds: seeds by whose scores the candidates were picked.
        record_nats: mean loss a token of the record to beat, where it is a published number; the
            baseline's runs stand for it otherwise.
        alpha: chance that any candidate is called better though none is.

    Raises:
        UsageError: someone has no run, a score is not finite, or a candidate's seed is not fresh.
    """
    if not candidates:
        raise UsageError("there is no candidate to confirm", "name one or more trials")
    for name, runs in (("the baseline", baseline), *candidates.items()):
        if not runs:
            raise UsageError(f"{name} has no run from a fresh seed", "run one or more")
    for name, runs in candidates.items():
        stale = sorted(set(runs) & set(used_seeds))
        if stale:
            raise UsageError(
                f"seed {stale[0]} of {name} is one by which it was picked, so its score flatters",
                "confirm with other seeds",
            )
    tests = [compare(_bpb(runs), _bpb(baseline)) for runs in candidates.values()]
    rules = [_record_test(runs, baseline, record_nats) for runs in candidates.values()]
    adjusted = _holm([test.p for test in tests])
    rules_adjusted = _holm([None if rule is None else rule.p for rule in rules])
    judged = []
    for (name, runs), test, p, rule, rule_p in zip(
        candidates.items(), tests, adjusted, rules, rules_adjusted, strict=True
    ):
        smallest_bpb = None if test.p is None else _smallest(_bpb(runs), _bpb(baseline))
        verdict = _verdict(test, p, alpha)
        judged.append(
            Confirmed(
                name=name,
                runs=spread(runs),
                difference_bpb=test.difference,
                margin_bpb=test.margin,
                p=test.p,
                p_holm=p,
                smallest_bpb=smallest_bpb,
                verdict=verdict,
                line=_line(verdict, test, p, len(candidates), smallest_bpb),
                record=_record(rule, rule_p, [*runs.values(), *baseline.values()]),
            )
        )
    return Confirmation(baseline=spread(baseline), candidates=tuple(judged), alpha=alpha)


def spread(runs: Mapping[int, Run]) -> Spread:
    """Mean and sample standard deviation of some runs.

    Raises:
        UsageError: there is none, or a score is not finite.
    """
    bpb, nats = _bpb(runs), _nats(runs)
    return Spread(
        n=len(bpb),
        mean_bpb=mean(bpb),
        sd_bpb=sample_sd(bpb) if len(bpb) > 1 else None,
        mean_nats=None if nats is None else mean(nats),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Whether one sample's mean is below another's."""

    difference: float
    margin: float | None
    """Half the width of the 95% interval of the difference; None where there is no p-value."""
    p: float | None
    why_not: str | None
    """Why there is no p-value."""


def compare(a: Sequence[float], b: Sequence[float]) -> Comparison:
    """The more careful of Welch's and Student's one-sided tests, with the wider interval.

    With as many seeds on either side that is Welch's. With few against many Welch's test errs
    more often than it says (3 candidates of 3 seeds against 20: 8% in place of 5%), and Student's
    holds its word as long as the spreads are alike.

    Raises:
        UsageError: there is no value on a side, or one is not finite.
    """
    first, second = (test(a, b, alternative="less") for test in (welch, student))
    margins = [test.margin(LEVEL) for test in (first, second)]
    p = first.p
    if first.p is not None and second.p is not None and first.difference < 0:
        p = max(first.p, second.p)
    return Comparison(
        difference=first.difference,
        margin=max((m for m in margins if m is not None), default=None),
        p=p,
        why_not=first.why_not,
    )


def _bpb(runs: Mapping[int, Run]) -> list[float]:
    return [runs[seed].bpb for seed in sorted(runs)]


def _nats(runs: Mapping[int, Run]) -> list[float] | None:
    """Losses a token, or None where one is missing."""
    nats = [runs[seed].loss_nats for seed in sorted(runs)]
    return [n for n in nats if n is not None] if None not in nats else None


def _holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjusted for those that there are."""
    adjusted = iter(holm([p for p in p_values if p is not None]))
    return [None if p is None else next(adjusted) for p in p_values]


def _smallest(a: Sequence[float], b: Sequence[float]) -> float:
    """By the pooled spread, which the same runs tell."""
    return smallest_difference(pooled_sd(a, b), len(a), len(b), known_sd=False)


# Verdicts -----------------------------------------------------------------------------------------


def _verdict(test: Comparison, p_holm: float | None, alpha: float) -> Verdict:
    if p_holm is None or test.margin is None:
        return "no p-value"
    if p_holm <= alpha:
        return "better"
    return "worse" if test.difference - test.margin > 0 else "not told apart"


def _line(
    verdict: Verdict, test: Comparison, p_holm: float | None, count: int, smallest_bpb: float | None
) -> str:
    margin = test.margin
    if p_holm is None or margin is None:
        return f"{_signed(test.difference)} bpb; {test.why_not}"
    apart = f"{abs(test.difference):.4f} +- {margin:.4f} bpb"
    after = f"p {_p(p_holm)}" + (f" after Holm over {count}" if count > 1 else "")
    if verdict == "better":
        return f"better by {apart} ({after})"
    if verdict == "worse":
        return f"worse by {apart}"
    return (
        f"not told apart from the baseline: {_signed(test.difference)} +- {margin:.4f} bpb "
        f"({after}); so many seeds show {smallest_bpb:.4f} bpb or more"
    )


def _record_test(
    runs: Mapping[int, Run], baseline: Mapping[int, Run], record_nats: float | None
) -> Comparison | None:
    """Of a loss that is more than the rule's gain below the record's; None where none is given."""
    nats, others = _nats(runs), _nats(baseline)
    if nats is None:
        return None
    if record_nats is not None:
        test = one_sample(nats, record_nats - RECORD_GAIN_NATS, alternative="less")
        return Comparison(
            difference=test.difference, margin=test.margin(LEVEL), p=test.p, why_not=test.why_not
        )
    return compare(nats, [n - RECORD_GAIN_NATS for n in others]) if others else None


def _record(test: Comparison | None, p_holm: float | None, runs: Sequence[Run]) -> RecordRule:
    # bpb = nats / ln 2 * tokens / bytes, so their ratio is one number for one text.
    ratios = [run.bpb / run.loss_nats for run in runs if run.loss_nats]
    return RecordRule(
        gain_nats=None if test is None else RECORD_GAIN_NATS - test.difference,
        needed_bpb=RECORD_GAIN_NATS * mean(ratios) if ratios else None,
        p=None if test is None else test.p,
        p_holm=p_holm,
        meets=p_holm is not None and p_holm < RECORD_ALPHA,
        why_not="no loss in nats a token is given" if test is None else test.why_not,
    )


def record_line(rule: RecordRule) -> str:
    """The field's rule with its numbers: nats a token decide, bpb are said beside them."""
    needed = f"{RECORD_GAIN_NATS} nats a token"
    if rule.needed_bpb is not None:
        needed += f" ({rule.needed_bpb:.4f} bpb here)"
    wanted = f"a record needs {needed} at p < {RECORD_ALPHA}"
    if rule.gain_nats is None or rule.p_holm is None:
        gain = "" if rule.gain_nats is None else f"gains {rule.gain_nats:.4f} nats, but "
        return f"no record: {gain}{rule.why_not}; {wanted}"
    verdict = "would be a record" if rule.meets else "no record"
    return f"{verdict}: gains {rule.gain_nats:.4f} nats (p {_p(rule.p_holm)}); {wanted}"


def _signed(value: float) -> str:
    return f"{value:+.4f}"


def _p(value: float) -> str:
    """Two digits that count, and no more zeros than can be read."""
    if value < 0.0001:
        return "< 0.0001"
    return f"{value:.4f}" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


# Table --------------------------------------------------------------------------------------------


def screen_table(confirmation: Confirmation) -> Table:
    """The candidates for a terminal of 80 columns, the baseline first."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("", max_width=NAME_WIDTH, no_wrap=True, overflow="ellipsis")
    for title in ("n", "mean\nbpb", "sd", "diff.", "+-\n95%", "p\nHolm", "seeds\nshow"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    baseline = confirmation.baseline
    table.add_row("baseline", str(baseline.n), *_cells(baseline), "", "", "", "", "")
    for found in confirmation.candidates:
        table.add_row(
            found.name,
            str(found.runs.n),
            *_cells(found.runs),
            _signed(found.difference_bpb),
            _cell(found.margin_bpb),
            "-" if found.p_holm is None else _p(found.p_holm).replace("< 0", "<"),
            _cell(found.smallest_bpb),
            _SHORT.get(found.verdict, found.verdict),
            style="bold green" if found.verdict == "better" else None,
        )
    return table


def _cells(runs: Spread) -> tuple[str, str]:
    return f"{runs.mean_bpb:.5f}", "-" if runs.sd_bpb is None else f"{runs.sd_bpb:.5f}"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
