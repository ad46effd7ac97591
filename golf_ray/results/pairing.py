"""Two artifacts that scored the same documents, compared document by document.

What makes a document hard makes it so for both, and cancels. So two artifacts are told apart by far
less than two settings, and that is all that is told: the artifacts of one setting, trained from two
seeds, differ too.

Notation: of document i, d are nats of the candidate less those of the baseline and x bytes; bits a
byte are a ratio of sums, R = sum d / sum x / ln 2.

Invariant: only the same documents of the same text are compared; what differs is said, and nothing
is dropped to make them fit.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from golf_ray.errors import UsageError
from golf_ray.metric import LN2
from golf_ray.stats import ALPHA, LEVEL, t_quantile, t_survival

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

NUM_TOP: Final = 5
"""Documents that are named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentDifference:
    """A document that the two artifacts score otherwise."""

    document: int
    """Place in the validation set, from 0."""
    num_bytes: int
    delta_nats: float
    """The candidate's nats less the baseline's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentComparison:
    """What two artifacts say of the same documents."""

    num_documents: int
    num_bytes: int
    baseline_bpb: float
    candidate_bpb: float
    difference_bpb: float
    """Below 0 where the candidate scores these documents better."""
    standard_error_bpb: float | None
    """Of what other documents of this kind would say; None where nothing tells it."""
    degrees_of_freedom: float | None
    """The number of documents that the text is made of as its bytes are spread, less one: a text of
    few long documents says less than so many of equal length."""
    low_bpb: float | None
    """Lower end of the 95% interval of the difference."""
    high_bpb: float | None
    p: float | None
    """Two-sided, that documents of this kind score the same under both."""
    differ: bool
    better_documents: int
    """Documents that the candidate scores better."""
    top: tuple[DocumentDifference, ...]
    """The documents that differ the most in nats, the largest first."""
    why_not: str | None
    """Why there is no p-value."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "level": LEVEL}

    def line(self, baseline: str, candidate: str) -> str:
        """The verdict, which is of these artifacts and of no setting."""
        if self.p is None:
            return f"by document: {self.why_not}"
        margin = abs(self.high_bpb - self.difference_bpb) if self.high_bpb is not None else 0.0
        which = f"{candidate} and {baseline}"
        if not self.differ:
            return f"{which} are not told apart by their documents (+- {margin:.6f} bpb)"
        return (
            "these two artifacts differ; that one setting is better than the other is not said "
            "by one artifact a side, as two seeds of one setting differ too"
        )


def compare_documents(
    baseline: pd.DataFrame, candidate: pd.DataFrame, *, alpha: float = ALPHA
) -> DocumentComparison:
    """Compare two artifacts by the documents that both scored.

    The ratio estimator's error by leaving out one document at a time, with residuals
    e = (d - R x) / (1 - x / X), X being all bytes: a long document pulls R towards itself, and this
    takes it back. The interval is t's with X^2 / sum x^2 - 1 degrees of freedom. With 30 documents
    whose lengths are spread as the field's are, the false-positive rate at 5% is 4 to 5% so, and
    8 to 11% by plain residuals and n - 1.

    Args:
        baseline: rows of `schema.DOCUMENTS` of one evaluation, each document once.
        candidate: likewise.
        alpha: chance that they are said to differ though documents of this kind do not tell.

    Raises:
        UsageError: they did not score the same documents of the same text, or a score is no number.
    """
    a, b = _ordered(baseline), _ordered(candidate)
    _require_same(a, b)
    sizes, delta = a["bytes"], b["nats"] - a["nats"]
    total = int(sizes.sum())
    if not total:
        raise UsageError("the documents have no bytes", "score others")
    difference = math.fsum(delta) / total
    error, degrees, why_not = _error(delta, sizes.astype(np.float64), difference)
    margin = p = None
    if error is not None and degrees is not None:
        margin = t_quantile((1 + LEVEL) / 2, degrees) * error
        p = 2 * t_survival(abs(difference) / error, degrees)
    order = np.lexsort((a["document"], -np.abs(delta)))[:NUM_TOP]
    return DocumentComparison(
        num_documents=len(delta),
        num_bytes=total,
        baseline_bpb=math.fsum(a["nats"]) / LN2 / total,
        candidate_bpb=math.fsum(b["nats"]) / LN2 / total,
        difference_bpb=difference / LN2,
        standard_error_bpb=None if error is None else error / LN2,
        degrees_of_freedom=degrees,
        low_bpb=None if margin is None else (difference - margin) / LN2,
        high_bpb=None if margin is None else (difference + margin) / LN2,
        p=p,
        differ=p is not None and p <= alpha,
        better_documents=int((delta < 0).sum()),
        top=tuple(
            DocumentDifference(
                document=int(a["document"][i]),
                num_bytes=int(sizes[i]),
                delta_nats=float(delta[i]),
            )
            for i in order
            if delta[i]
        ),
        why_not=why_not,
    )


def _error(
    delta: NDArray[np.float64], sizes: NDArray[np.float64], ratio: float
) -> tuple[float | None, float | None, str | None]:
    """Standard error in nats a byte, its degrees of freedom, and why there is none."""
    share = sizes / sizes.sum()
    degrees = 1 / math.fsum(share**2) - 1
    if len(delta) < 2 or degrees <= 0 or share.max() >= 1:
        return None, None, "one document gives no p-value"
    residual = (delta - ratio * sizes) / (1 - share)
    error = math.sqrt(math.fsum(residual**2)) / float(sizes.sum())
    if not error:
        what = "differ alike a byte" if ratio else "score the same"
        return None, None, f"all documents {what}, which gives no p-value"
    return error, degrees, None


def _ordered(frame: pd.DataFrame) -> dict[str, NDArray[Any]]:
    """Columns in order of documents."""
    frame = frame.sort_values("document", kind="stable")
    found = {
        "document": frame["document"].to_numpy(np.int64),
        "nats": frame["nats"].to_numpy(np.float64, na_value=np.nan),
        "bytes": frame["bytes"].to_numpy(np.int64),
    }
    if not len(frame):
        raise UsageError("there are no documents", "score some with --ledger")
    twice = np.flatnonzero(np.diff(found["document"]) == 0)
    if len(twice):
        document = found["document"][twice[0]]
        raise UsageError(f"document {document} is there twice", "give one evaluation a side")
    bad = np.flatnonzero(~np.isfinite(found["nats"]))
    if len(bad):
        document = found["document"][bad[0]]
        raise UsageError(f"the score of document {document} is no number", "score it again")
    return found


def _require_same(a: dict[str, NDArray[Any]], b: dict[str, NDArray[Any]]) -> None:
    mine, others = len(a["document"]), len(b["document"])
    missing = np.setxor1d(a["document"], b["document"])
    if len(missing):
        raise UsageError(
            f"they scored other documents: {mine:,} and {others:,}, of which {len(missing):,} "
            f"are on one side only, as document {missing[0]}",
            "score the same ones on both sides",
        )
    # Tokens may be others: bits a byte are the same for any tokenizer.
    other = np.flatnonzero(a["bytes"] != b["bytes"])
    if len(other):
        i = other[0]
        raise UsageError(
            f"they scored other texts: document {a['document'][i]} has {a['bytes'][i]:,} bytes "
            f"and {b['bytes'][i]:,}",
            "score the same data on both sides",
        )
