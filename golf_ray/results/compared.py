"""A whole comparison as a user asks for it: sides read, tested, and told in words.

The first side is the baseline. Scores over seeds are compared where all sides have one score;
documents where both sides kept theirs, which tells artifacts apart and never settings.

Invariant: what makes a comparison other than it looks (shared seeds, one setting with several,
a trial that was picked by its score) is among the notes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from golf_ray.errors import UsageError
from golf_ray.results.comparing import (
    PublishedComparison,
    Scores,
    SeedComparison,
    Test,
    Unit,
    compare_published,
    compare_seeds,
)
from golf_ray.results.pairing import DocumentComparison, compare_documents
from golf_ray.results.side_scores import (
    choose_score,
    common_notes,
    documents_of,
    require_same_text,
    same_documents,
    scores_of,
)
from golf_ray.results.sides import Side, load_sides
from golf_ray.stats import interval
from golf_ray.sweeps.confirmation import RECORD_ALPHA, RECORD_GAIN_NATS


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """What a comparison says."""

    score: str
    """The column, or what the numbers are."""
    unit: Unit
    scores: tuple[Scores, ...]
    """The baseline first; none where no score is in all sides."""
    seeds: tuple[SeedComparison, ...] = ()
    published: PublishedComparison | None = None
    documents: tuple[tuple[str, str, DocumentComparison], ...] = ()
    """Baseline and candidate by name, and what their documents say."""
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "score": self.score,
            "unit": self.unit,
            "sides": [scores.summary() for scores in self.scores],
            "seeds": [found.to_dict() for found in self.seeds],
            "published": None if self.published is None else self.published.to_dict(),
            "documents": [
                {"baseline": a, "candidate": b, **found.to_dict()} for a, b, found in self.documents
            ],
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """For people."""
        told = [f"{self.score} in {'bits a byte' if self.unit == 'bpb' else 'nats a token'}, "
                "lower is better"] if self.scores else []  # fmt: skip
        told += [spread_line(scores) for scores in self.scores]
        for found in self.seeds:
            told += ["", *seed_lines(found)]
        if self.published is not None:
            told += ["", *published_lines(self.published)]
        for a, b, pair in self.documents:
            told += ["", *document_lines(a, b, pair)]
        return told + [f"note: {note}" for note in self.notes]


def compare_places(
    texts: Sequence[str],
    *,
    storage: str,
    score: str | None = None,
    against: float | None = None,
    margin: float = RECORD_GAIN_NATS,
    margin_unit: Unit = "nats",
    documents: bool = True,
) -> Compared:
    """Compare what is stored: the first place is the baseline, or a number is.

    Args:
        texts: sides, as `golf_ray.results.sides` understands them.
        storage: where sweeps are that are given by name.
        score: column to compare; None for the first that all sides have.
        against: a published score in place of a baseline, for one side.
        margin: gain that is also tested for.
        margin_unit: of it.
        documents: whether to compare by document where both sides can.

    Raises:
        UsageError: a side names nothing, or sides cannot be compared.
        StorageError: a place cannot be read.
    """
    sides = load_sides(texts, storage)
    if len(sides) == 1 and against is None:
        raise UsageError("there is nothing to compare with", "name one more, or --against NUMBER")
    if len(sides) > 1 and against is not None:
        raise UsageError("--against compares one side with a number", "leave one of them out")
    wanted = choose_score(sides, score)
    scores: tuple[Scores, ...] = ()
    if wanted is not None:
        require_same_text(sides, wanted)
        scores = tuple(scores_of(side, wanted) for side in sides)
    notes: list[str] = []
    pairs = _pairs(sides, notes) if documents and against is None else ()
    if not scores and not pairs:
        raise UsageError(
            f"{' and '.join(side.name for side in sides)} have no score in common",
            "score them with 'golf-ray eval', with --ledger to compare by document",
        )
    published = None
    seeds: tuple[SeedComparison, ...] = ()
    if against is not None:
        needed = margin if margin_unit == "bpb" else _in_bpb(scores[0], margin)
        published = compare_published(scores[0], against, margin=needed)
        if needed is None and margin:
            notes.append(
                f"a gain of more than {margin:g} nats is not tested for: how many tokens a byte "
                f"the scores of {sides[0].name} are of is not known"
            )
    elif scores:
        seeds = compare_seeds(scores[0], scores[1:], margin=margin, margin_unit=margin_unit)
    return Compared(
        score=wanted or "documents",
        unit="bpb",
        scores=scores,
        seeds=seeds,
        published=published,
        documents=pairs,
        notes=(*notes, *_notes(sides, wanted, seeds)),
    )


def compare_numbers(
    values: Sequence[float], against: float, *, unit: Unit, margin: float | None = None
) -> Compared:
    """Compare numbers, one a seed, with a published one.

    Raises:
        UsageError: there is none, or one is not finite.
    """
    scores = Scores(name="values", values=tuple(values), unit=unit)
    found = compare_published(scores, against, margin=margin)
    return Compared(score="values", unit=unit, scores=(scores,), published=found)


def _in_bpb(scores: Scores, nats: float) -> float | None:
    """A margin in nats as bits a byte; None where the text's tokens a byte are not known."""
    return None if scores.ratio is None else nats * scores.ratio


def _pairs(
    sides: Sequence[Side], notes: list[str]
) -> tuple[tuple[str, str, DocumentComparison], ...]:
    """Every candidate beside the baseline, where both are one artifact with its documents."""
    several = [side.name for side in sides if len(set(side.ledgers)) > 1]
    if several:
        notes.append(
            f"not compared by document: {' and '.join(several)} "
            f"{'is' if len(several) == 1 else 'are'} more than one artifact; name one trial a side"
        )
    if sides[0].name in several:
        return ()
    first = documents_of(sides[0])
    found = []
    for side in sides[1:]:
        if side.name in several:
            continue
        frames = same_documents(first, documents_of(side))
        if frames is None:
            continue
        found.append((sides[0].name, side.name, compare_documents(*frames)))
    return tuple(found)


def _notes(
    sides: Sequence[Side], score: str | None, seeds: Sequence[SeedComparison]
) -> tuple[str, ...]:
    told: list[str] = []
    for side in sides:
        told += side.notes
        told += [flattery.line() for flattery in side.flattery]
    if score is not None and len(sides) > 1:
        told += common_notes(sides, score)
    if any(found.shared_seeds and found.method != "paired" for found in seeds):
        told.append(
            "some seeds are on both sides, which makes no pairs: one seed twice differs as much as "
            "two seeds do"
        )
    return tuple(dict.fromkeys(told))


# Words --------------------------------------------------------------------------------------------


def spread_line(scores: Scores) -> str:
    """A side's mean with what its seeds say of it."""
    found, digits = interval(scores.values), 8 if len(scores.values) > 1 else 6
    head = f"{scores.name}: n {found.n}, mean {found.mean:.{digits}f}"
    if found.sd is None or found.low is None or found.high is None:
        return f"{head}; {found.why_not}"
    return (
        f"{head}, sample standard deviation {found.sd:.8f}, "
        f"95% interval {found.low:.5f} to {found.high:.5f}"
    )


def seed_lines(found: SeedComparison) -> list[str]:
    """A candidate and the baseline over seeds."""
    test, unit = found.test, found.baseline.unit
    names = f"{found.candidate.name} against {found.baseline.name}"
    if test.p_one_sided is None:
        told = [f"{names}: {test.difference:+.5f} {unit}; {test.why_not}"]
    else:
        told = [
            f"{names}: {found.verdict}",
            f"  difference {test.difference:+.5f} {unit}, {_interval(test)} ({found.method})",
            f"  p {shown_p(test.p_one_sided)} one-sided that it is no better"
            + _after_holm(found.p_holm, test.p_one_sided)
            + f", {shown_p(test.p_two_sided)} two-sided",
        ]
    told.append(f"  {_margin_line(found)}")
    if found.smallest is not None:
        told.append(
            f"  so many seeds show {found.smallest:.5f} {unit} or more (80% power, one-sided 5%)"
        )
    elif found.smallest_known is not None:
        told.append(
            f"  if seeds spread by the field's 0.00075 bpb, so many show {found.smallest_known:.5f}"
            " or more (80% power, one-sided 5%)"
        )
    return told


def published_lines(found: PublishedComparison) -> list[str]:
    """A setting and a published number, taken as exact."""
    test, unit = found.test, found.candidate.unit
    if test.p_one_sided is None:
        return [f"against {found.against:g} {unit}: {test.difference:+.6f} {unit}; {test.why_not}"]
    told = [
        f"against {found.against:g} {unit}: {found.verdict}, {test.difference:+.6f} {unit}, "
        f"{_interval(test)}",
        f"  t {test.t_gain:.2f}, p {shown_p(test.p_one_sided)} one-sided that it is no better",
    ]
    if found.margin_test is not None and found.margin_test.p_one_sided is not None:
        told.append(
            f"  against {found.against:g} - {found.margin:.6g} {unit}: t "
            f"{found.margin_test.t_gain:.2f}, p {shown_p(found.margin_test.p_one_sided)} one-sided"
        )
    return told


def document_lines(baseline: str, candidate: str, found: DocumentComparison) -> list[str]:
    """Two artifacts by their documents."""
    told = [
        f"by document, with test-time training, {candidate} against {baseline}: "
        f"{found.num_documents:,} documents, {found.num_bytes:,} bytes",
        f"  {found.baseline_bpb:.6f} and {found.candidate_bpb:.6f} bpb: "
        f"{found.difference_bpb:+.6f}"
        + ("" if found.standard_error_bpb is None else f" +- {found.standard_error_bpb:.6f}")
        + (" (standard error)" if found.standard_error_bpb is not None else "")
        + ("" if found.p is None else f", p {shown_p(found.p)} two-sided"),
        f"  {found.line(baseline, candidate)}",
    ]
    if found.top:
        most = ", ".join(
            f"{one.document} ({one.num_bytes:,} bytes, {one.delta_nats:+.2f} nats)"
            for one in found.top
        )
        told.append(f"  documents that differ the most: {most}")
    return told


def shown_p(value: float | None) -> str:
    """A p-value with two digits that count, and four places at least where it is small."""
    if value is None:
        return "unknown"
    if value < 0.0001:
        return "< 0.0001"
    return f"{value:.4f}" if value < 0.01 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def _interval(test: Test) -> str:
    return f"95% interval {test.low:+.5f} to {test.high:+.5f}"


def _after_holm(p_holm: float | None, p: float) -> str:
    return "" if p_holm is None or p_holm == p else f" ({shown_p(p_holm)} after Holm)"


def _margin_line(found: SeedComparison) -> str:
    rule = found.rule
    wanted = f"more than {rule.margin:g} {rule.unit} better"
    if rule.p is None or rule.gain is None:
        return f"{wanted}: {rule.why_not}"
    verdict = "yes" if rule.meets else "not shown"
    asked = f"; a new record needs p < {RECORD_ALPHA}"
    p = rule.p if rule.p_holm is None else rule.p_holm
    return f"{wanted}: {verdict}, gains {rule.gain:.5f} {rule.tested_in}, p {shown_p(p)}{asked}"
