"""A sample of documents that stands for the whole set: how it is drawn, and what it says.

Scoring every document takes long, ranking settings need not. A sample is stratified by length;
the score of the whole set is estimated from it with a standard error, as is the difference of two
settings that scored the same documents. All texts are there, so lengths and bytes of the whole
set are known exactly and only nats are estimated. Numbers alone: no token, no model.

Notation, as in Cochran, Sampling Techniques, 3rd ed. (1977): stratum h holds N_h documents, of
which n_h are drawn; y are nats, x bytes.

Invariant: a sample is a function of lengths, count and seed, never of a score or of a setting, so
settings are compared on the same documents; every stratum not taken whole gives two or more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golf_ray.metric import LN2, Score

CONFIDENCE = 0.95
MIN_DOCUMENTS = 2
"""Fewer say nothing of their spread."""
STRATUM_DOCUMENTS = 5
"""Documents drawn of each stratum at least, where so many are drawn at all."""
COST_WINDOW_TOKENS = 2048
"""Where the assumed cost of a document goes over from squares to a straight line: a constant, not
`adaptation.window`, so that settings with other windows score the same documents."""
COST_FLOOR_TOKENS = 256
"""A document is assumed to cost what the windows of one of this length do, and its own."""
TAKE_ALL_STEPS = 2.0
"""A document longer than this many steps of total tokens / count is always drawn."""
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stratum:
    """Documents of similar length, and those drawn of them."""

    num_documents: int
    """Documents of the whole set in this stratum, N_h."""
    documents: tuple[int, ...]
    """Indices of those drawn in rising order; all where there are N_h of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """The documents to score in place of all."""

    strata: tuple[Stratum, ...]
    """From short to long; documents that are always drawn come last."""
    tokens_total: int
    """Predictions of the whole set."""

    @property
    def documents(self) -> tuple[int, ...]:
        """Indices of all documents drawn, in rising order."""
        return tuple(sorted(i for stratum in self.strata for i in stratum.documents))

    @property
    def documents_total(self) -> int:
        """Documents of the whole set."""
        return sum(stratum.num_documents for stratum in self.strata)


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What a sample says of the whole set; of a difference, every number is the difference."""

    whole: Score
    """Sums over the whole set: its tokens and bytes, exact, and its nats, estimated."""
    standard_error_bpb: float
    """0 where all documents were scored."""
    low_bpb: float
    """Lower end of the 95% interval."""
    high_bpb: float
    """Upper end of the 95% interval."""
    degrees_of_freedom: float | None
    """Of the t distribution behind the interval; None where there is no error."""
    documents_scored: int
    documents_total: int

    @property
    def bpb(self) -> float:
        """Bits per byte of the whole set, estimated."""
        return self.whole.bpb

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "bpb": self.bpb,
            "standard_error_bpb": self.standard_error_bpb,
            "confidence": CONFIDENCE,
            "low_bpb": self.low_bpb,
            "high_bpb": self.high_bpb,
            "degrees_of_freedom": self.degrees_of_freedom,
            "documents_scored": self.documents_scored,
            "documents_total": self.documents_total,
            "tokens_total": self.whole.tokens,
            "bytes_total": self.whole.num_bytes,
        }


def draw_sample(lengths: NDArray[np.integer], count: int, seed: int) -> Sample:
    """Draw `count` documents, stratified by length.

    Args:
        lengths: [N] predictions of each document of the whole set.
        count: documents to draw, `MIN_DOCUMENTS` or more; all where there are no more than that.
        seed: of the draw.
    """
    strata = draw(cut_strata(lengths, count), seed)
    return Sample(strata=strata, tokens_total=int(lengths.sum()))


def draw(cut: Sequence[tuple[NDArray[np.int64], int]], seed: int) -> tuple[Stratum, ...]:
    """Draw from strata that are cut, of each without replacement.

    Args:
        cut: as `cut_strata` gives them.
        seed: of the draw, 0 or more.
    """
    generator = np.random.Generator(np.random.Philox(seed))
    strata = []
    for members, num in cut:
        chosen = members[generator.random(len(members)).argsort()[:num]]
        documents = tuple(sorted(chosen.tolist()))
        strata.append(Stratum(num_documents=len(members), documents=documents))
    return tuple(strata)


def cut_strata(
    lengths: NDArray[np.integer], count: int
) -> tuple[tuple[NDArray[np.int64], int], ...]:
    """Strata of documents by length, and how many to draw of each.

    For a given cost the variance is least where n_h ~ N_h S_h / sqrt(c_h) (Cochran, section 5.5),
    with S_h the spread of what the estimator leaves of nats and c_h the cost of one document.
    Spread is taken to be proportional to length: documents differ in their nats a byte. Cost is
    that of the windows of test-time training, about the square of a length n up to the window and
    linear in it beyond (`adaptation.plan.window_tokens` for short chunks). So short documents,
    where both grow alike, are drawn alike, and the chance of long ones grows as sqrt(n), not n:
    Neyman's allocation, by spread alone, has less error for as many documents, but spends several
    times the GPU time on it, which buys more as a larger sample of this kind. Below
    `COST_FLOOR_TOKENS` a document is not taken to become ever cheaper, as small steps leave a GPU
    idle; its chance falls with its length there.

    Strata have equal shares of that measure, and so as many documents drawn each: narrow strata,
    because lengths within one add to its variance, and the widest, of the longest documents, has
    most of it. The few longest documents, each longer than `TAKE_ALL_STEPS` even steps through
    the text, are always drawn: no result then hangs on whether a single one of them was.

    Args:
        lengths: [N] predictions of each document of the whole set.
        count: documents to draw, `MIN_DOCUMENTS` or more.

    Returns:
        Members of each stratum and the number to draw, from short to long; last, if there are
        any, the documents that are always drawn.
    """
    assert count >= MIN_DOCUMENTS
    if count >= len(lengths):
        return ((np.arange(len(lengths)), len(lengths)),)
    sizes = lengths.astype(np.int64)
    measure = _measure(sizes)
    always = _always_drawn(sizes, measure, count)
    by_length = np.argsort(sizes, kind="stable")
    strata = _cut_evenly(by_length[~always[by_length]], measure, count - int(always.sum()))
    if always.any():
        strata.append((np.flatnonzero(always), int(always.sum())))
    return tuple(strata)


def _measure(lengths: NDArray[np.int64]) -> NDArray[np.float64]:
    """Spread / sqrt(cost) of each document, up to a factor."""
    size = np.maximum(lengths, 1).astype(np.float64)
    inside = np.minimum(size, COST_WINDOW_TOKENS)
    cost = inside * (size - inside / 2) + COST_FLOOR_TOKENS**2 / 2
    measure: NDArray[np.float64] = size / np.sqrt(cost)
    return measure


def _always_drawn(
    lengths: NDArray[np.int64], measure: NDArray[np.float64], count: int
) -> NDArray[np.bool_]:
    """The documents too long to leave out, and those whose best chance is 1 or more."""
    always: NDArray[np.bool_] = lengths * count > TAKE_ALL_STEPS * lengths.sum()
    while True:
        left = count - int(always.sum())
        more = ~always & (measure * left >= measure[~always].sum())
        # What is left must still show the spread of the rest.
        if not more.any() or left - int(more.sum()) < MIN_DOCUMENTS:
            return always
        always |= more


def _cut_evenly(
    by_length: NDArray[np.int64], measure: NDArray[np.float64], count: int
) -> list[tuple[NDArray[np.int64], int]]:
    """Strata of equal measure through documents in order of length."""
    num = max(1, count // STRATUM_DOCUMENTS)
    # Strata of n documents in all end at the n-th of `count` equal steps of the running measure.
    ends = np.arange(1, num + 1) * count // num
    running = np.cumsum(measure[by_length])
    cuts = np.searchsorted(running, running[-1] * ends / count)
    # Each stratum must hold what is drawn of it, and the last one ends at the end.
    beyond = np.clip(np.maximum.accumulate(cuts - ends), 0, len(by_length) - count)
    beyond[-1] = len(by_length) - count
    drawn = np.diff(ends, prepend=0).tolist()
    return list(zip(np.split(by_length, (beyond + ends)[:-1]), drawn, strict=True))


def estimate(sample: Sample, nats: Mapping[int, float], num_bytes: NDArray[np.integer]) -> Estimate:
    """Bits per byte of the whole set from the nats of a sample.

    The combined ratio estimator R = sum N_h ybar_h / sum N_h xbar_h (Cochran, section 6.11) with
    the known bytes of the whole set. Nats are close to proportional to bytes, so most of the
    spread of lengths falls out; the separate one would add the bias of a ratio in every stratum.

    The variance is sum N_h^2 (1 - n_h / N_h) s_h^2 / n_h over the square of the bytes as the
    sample estimates them, s_h^2 being the variance in stratum h of the residuals y - R x. The
    interval is t's, with Satterthwaite's degrees of freedom (Cochran, section 5.4).

    Args:
        nats: by document index, at least of those in the sample; their order has no effect.
        num_bytes: [N] bytes of each document of the whole set.
    """
    return _estimate(sample, [nats[i] for s in sample.strata for i in s.documents], num_bytes)


def estimate_difference(
    sample: Sample,
    nats: Mapping[int, float],
    baseline_nats: Mapping[int, float],
    num_bytes: NDArray[np.integer],
) -> Estimate:
    """Bits per byte of the whole set less those of a baseline that scored the same sample.

    Its value is the difference of the two estimates. Its error is far less than theirs: what
    makes a document hard under one setting makes it hard under the other, and cancels.

    Args:
        nats: of the one setting, as for `estimate`.
        baseline_nats: of the other.
        num_bytes: [N] bytes of each document of the whole set.
    """
    pairs = [nats[i] - baseline_nats[i] for s in sample.strata for i in s.documents]
    return _estimate(sample, pairs, num_bytes)


def _estimate(sample: Sample, nats: list[float], num_bytes: NDArray[np.integer]) -> Estimate:
    assert len(num_bytes) == sample.documents_total
    drawn = np.array([len(s.documents) for s in sample.strata])
    population = np.array([s.num_documents for s in sample.strata])
    y = np.array(nats, dtype=np.float64)
    x = np.asarray(num_bytes, dtype=np.float64)[[i for s in sample.strata for i in s.documents]]
    weights = np.repeat(population / drawn, drawn)
    sampled_bytes, bytes_total = math.fsum(weights * x), int(num_bytes.sum())
    # With all documents drawn this is the plain sum, to the last bit.
    sampled_nats = math.fsum(weights * y)
    ratio = sampled_nats / sampled_bytes if sampled_bytes else math.nan
    whole = Score(
        nats=sampled_nats * (bytes_total / sampled_bytes) if sampled_bytes else math.nan,
        tokens=sample.tokens_total,
        num_bytes=bytes_total,
    )
    free = np.maximum(drawn - 1, 1)
    starts = np.cumsum(drawn) - drawn
    residual = y - ratio * x
    residual -= np.repeat(np.add.reduceat(residual, starts) / drawn, drawn)
    spread = np.add.reduceat(residual**2, starts) / free
    variances = population * (population - drawn) * spread / drawn
    variance = float(variances.sum())
    error_bpb = math.sqrt(variance) / sampled_bytes / LN2 if sampled_bytes else math.nan
    # Nothing is left to chance, or nothing varies.
    degrees = 1 / float(((variances / variance) ** 2 / free).sum()) if variance else None
    margin_bpb = error_bpb * t_quantile(degrees) if degrees is not None else 0.0
    return Estimate(
        whole=whole,
        standard_error_bpb=error_bpb,
        low_bpb=whole.bpb - margin_bpb,
        high_bpb=whole.bpb + margin_bpb,
        degrees_of_freedom=degrees,
        documents_scored=int(drawn.sum()),
        documents_total=sample.documents_total,
    )


def t_quantile(degrees_of_freedom: float, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| <= t) = confidence, for any degrees of freedom v >= 1.

    With T = sqrt(v) tan(a) the density of the angle a is proportional to cos(a)^(v - 1)
    (Abramowitz and Stegun, 26.7). Newton's steps begin at the normal quantile, below the root;
    as the density falls, none of them leads beyond it.
    """
    power = degrees_of_freedom - 1
    log_whole = math.lgamma((power + 1) / 2) - math.lgamma(power / 2 + 1)
    wanted = confidence * math.exp(log_whole) * math.sqrt(math.pi) / 2
    angle = math.atan(NormalDist().inv_cdf((1 + confidence) / 2) / math.sqrt(degrees_of_freedom))
    for _ in range(20):
        half = angle / 2
        found = half * float(_WEIGHTS @ np.cos(half * (_NODES + 1)) ** power)
        angle += (wanted - found) / math.cos(angle) ** power
    return math.sqrt(degrees_of_freedom) * math.tan(angle)
