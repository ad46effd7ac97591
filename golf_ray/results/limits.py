"""Whether a trial is within its limits: as measured where it was, else as predicted.

A search foretells sizes from the codes' entropy, which errs by a hundredth or so; what counts is
the artifact, which finalists get. So a trial that is done may yet be within the limit of bytes
though it was foretold to be over it, or the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


def is_within(record: Mapping[str, Any]) -> bool:
    """Whether no limit is exceeded, the artifact's size by measurement where there is one."""
    final, known = record.get("final") or {}, dict(record.get("constraints") or {})
    if final:
        known.pop("bytes", None)
    return bool(final.get("fits", True)) and not any(_exceeds(v) for v in known.values())


def may_be_within(record: Mapping[str, Any]) -> bool:
    """Whether nothing but a size that was foretold, and not yet measured, speaks against a trial
    that is done."""
    known = dict(record.get("constraints") or {})
    known.pop("bytes", None)
    unmeasured = record.get("status") == "done" and not record.get("final")
    return unmeasured and foretold_over(record) and not any(_exceeds(v) for v in known.values())


def foretold_over(record: Mapping[str, Any]) -> bool:
    """Whether a trial's size was over the limit before its artifact was written."""
    return _exceeds((record.get("constraints") or {}).get("bytes"))


def fits_of(frame: pd.DataFrame) -> pd.Series[bool]:
    """Whether the artifact of each of `golf_ray.results.Results.trials` is within its limit of
    bytes; True where nothing is known of it, as without the columns that say so."""
    import pandas as pd

    nothing = pd.Series(pd.NA, index=frame.index, dtype="boolean")
    measured, foretold = (
        frame.get(name, nothing).astype("boolean") for name in ("final_fits", "fits")
    )
    return measured.fillna(foretold).fillna(True).astype(bool)


def _exceeds(value: Any) -> bool:
    return isinstance(value, (int, float)) and not value <= 0
