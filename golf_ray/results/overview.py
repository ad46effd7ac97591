"""What a report says in words: how each sweep stands, its best configuration, and what failed.

Invariant: a score is said with what it is of, and the best of a search is called what it is, a
pick by the same documents that scored it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pandas as pd

from golf_ray.results.cells import digits_beside, number
from golf_ray.results.pictures.rows import STATUSES, Trials, number_of
from golf_ray.results.sources import storage_of
from golf_ray.results.timeline import gpu_seconds
from golf_ray.sweeps.commands import command
from trainers.storage import Storage

MAX_NAMED: Final = 40
"""Trials of one reason that are named."""
_OF: Final[Mapping[str, tuple[str, str, str, str]]] = {
    "ttt_bpb": ("tokens_scored", "bytes_scored", "documents_scored", "ttt_standard_error_bpb"),
    "int6_bpb": ("int6_tokens_scored", "int6_bytes_scored", "", ""),
    "val_bpb": ("val_tokens_scored", "val_bytes_scored", "", ""),
}
"""What a score is of, by column: tokens, bytes, documents, standard error."""
_WEIGHTS: Final[Mapping[str, str]] = {"int6_bpb": "int6", "val_bpb": "full",
                                      "train_loss_nats": "full"}  # fmt: skip
_NUMBERS: Final = re.compile(r"(?<![\w.])[+-]?\d[\d,]*(\.\d+)?(e[+-]?\d+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """The best trial of a sweep."""

    name: str
    score: str
    facts: tuple[tuple[str, str], ...]
    """What the score is of, and what else is known: labels and texts."""
    assignments: str
    """Its knobs as options; nothing where none were searched."""
    note: str
    """How much it is to be believed."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"name": self.name, "score": self.score, "facts": dict(self.facts),
                "set": self.assignments, "note": self.note}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """A sweep, or all run folders, or all public logs."""

    name: str
    planned: int | None
    """Trials that it set out to run."""
    counts: Mapping[str, int]
    """Trials by status."""
    trainings: int
    gpu_hours: float
    wasted_gpu_hours: float
    """Of trials that failed or are over a limit."""
    wasted_hours: float
    """The same as the trials' own wall time, GPU or not."""
    hours: float | None
    """From the first beginning to the last end."""
    best: Best | None
    why_no_best: str = ""

    @property
    def total(self) -> int:
        """Trials that have begun."""
        return sum(self.counts.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "name": self.name, "planned": self.planned, **self.counts,
            "trainings": self.trainings, "gpu_hours": self.gpu_hours,
            "wasted_gpu_hours": self.wasted_gpu_hours, "wasted_hours": self.wasted_hours,
            "hours": self.hours, "best": None if self.best is None else self.best.to_dict(),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Trials that ended without a score for reasons alike."""

    status: str
    reason: str
    """Of the first of them."""
    stages: str
    count: int
    trials: str
    gpu_hours: float


def summaries(
    trials: Trials,
    records: Sequence[Mapping[str, Any]],
    plans: Mapping[str, Mapping[str, Any]],
    folders: Mapping[str, Storage],
) -> tuple[Summary, ...]:
    """One for each sweep, in order; one for all run folders, and one for all logs."""
    frame = trials.frame
    kind = frame["kind"].fillna("trial")
    names = frame["source"].fillna("?").where(kind == "trial", frame["series"])
    return tuple(
        _summary(str(name), trials, frame[names == name], records, plans.get(str(name)), folders)
        for name in dict.fromkeys(names)
    )


def _summary(
    name: str,
    trials: Trials,
    frame: pd.DataFrame,
    records: Sequence[Mapping[str, Any]],
    plan: Mapping[str, Any] | None,
    folders: Mapping[str, Storage],
) -> Summary:
    counts = {status: int((frame["shown_status"] == status).sum()) for status in STATUSES}
    ended = frame["status"].isin(["failed", "over_limit"]).fillna(False).astype(bool)
    ranked = frame[frame["eligible"]].sort_values(["score", "key"])
    best = None
    if len(ranked):
        first = ranked.iloc[0]
        own = records[int(first["key"])] if records else {}
        best = _best(trials, first, own, len(ranked), plan, folders.get(name))
    planned = (plan or {}).get("num_trials")
    began, last = frame["began_unix_s"].min(), frame["ended_unix_s"].max()
    return Summary(
        name=name,
        planned=planned if isinstance(planned, int) else None,
        counts=counts,
        trainings=int(frame["training"].nunique()),
        gpu_hours=float(frame["gpu_s"].fillna(0.0).sum()) / 3600,
        wasted_gpu_hours=sum(lost_gpu_hours(trials, records, frame[ended]).values()),
        wasted_hours=_wall_hours(frame[ended]),
        hours=None if pd.isna(began) or pd.isna(last) else max(0.0, float(last - began)) / 3600,
        best=best,
        why_no_best=f"no trial is done, within the limits, and has a score by {trials.label}",
    )


def lost_gpu_hours(
    trials: Trials, records: Sequence[Mapping[str, Any]], bad: pd.DataFrame
) -> dict[int, float]:
    """GPU-hours that some trials held for nothing, by key.

    A training that a trial that is done shares is not lost.
    """
    done = trials.frame[(trials.frame["status"] == "done").fillna(False).astype(bool)]
    of_use = set(done["training"].dropna())
    lost = {}
    for key, training, own_s, evaluate_s in zip(
        bad["key"], bad["training"], bad["train_gpu_s"].fillna(0.0),
        bad["evaluate_gpu_s"].fillna(0.0), strict=True,
    ):  # fmt: skip
        shared = not pd.isna(training) and training in of_use
        spans = (records[int(key)].get("spans") if records else None) or []
        if spans:
            kept = [s for s in spans if not (shared and s.get("stage") == "train")]
            lost[int(key)] = gpu_seconds(kept) / 3600
        else:
            lost[int(key)] = ((0.0 if shared else float(own_s)) + float(evaluate_s)) / 3600
    return lost


def _wall_hours(frame: pd.DataFrame) -> float:
    wall = frame["ended_unix_s"] - frame["began_unix_s"]
    return float(wall.fillna(0.0).clip(lower=0.0).sum()) / 3600


# The best -----------------------------------------------------------------------------------------


def _best(
    trials: Trials,
    row: pd.Series[Any],
    record: Mapping[str, Any],
    candidates: int,
    plan: Mapping[str, Any] | None,
    folder: Storage | None,
) -> Best:
    knobs = record.get("knobs") or {}
    return Best(
        name=str(row["name"]),
        score=_scored(trials, row),
        facts=tuple(_facts(trials, row)),
        assignments=assignments(knobs),
        note=_note(row, candidates, plan or {}, folder),
    )


def _scored(trials: Trials, row: pd.Series[Any]) -> str:
    error = row.get(_OF.get(trials.objective, ("", "", "", ""))[3])
    score = float(row["score"])
    if error is None or pd.isna(error):
        return f"{trials.number(score)} {trials.label}"
    digits = digits_beside(float(error), trials.digits)
    return f"{number(score, digits)} ± {number(float(error), digits)} {trials.label}"


def _facts(trials: Trials, row: pd.Series[Any]) -> list[tuple[str, str]]:
    tokens, size, documents, error = _OF.get(trials.objective, ("", "", "", ""))
    of = [
        f"{int(row[name]):,} {noun}"
        for name, noun in ((documents, "documents"), (tokens, "tokens"), (size, "bytes"))
        if name and not pd.isna(row[name])
    ]
    weights = row["weights"] if trials.objective == "ttt_bpb" else _WEIGHTS.get(trials.objective)
    facts = []
    if weights is not None and not pd.isna(weights):
        facts.append(
            ("weights", "int6, quantised" if weights == "int6" else f"{weights} precision")
        )
    if trials.objective in _OF:
        facts.append(("scored on", ", ".join(of) if of else "not recorded how many tokens"))
    if error and not pd.isna(row[error]):
        facts.append(("± is", "the standard error of a sample of documents"))
    facts += _sizes(row)
    if not pd.isna(row["final_ttt_bpb"]) and trials.objective != "final_ttt_bpb":
        facts.append(("on all documents", f"{row['final_ttt_bpb']:.5f} bpb with TTT"))
    for label, name, form in (
        ("steps", "steps", "{:,}"), ("speed", "tokens_per_s", "{:,.0f} tokens/s"),
        ("device", "device", "{}"), ("golf_ray", "golf_ray_version", "{}"),
        ("commit", "commit", "{}"),
    ):  # fmt: skip
        if not pd.isna(row[name]):
            facts.append((label, form.format(row[name])))
    return facts


def _sizes(row: pd.Series[Any]) -> list[tuple[str, str]]:
    measured = not pd.isna(row["final_total_bytes"])
    total = row["final_total_bytes"] if measured else row["total_bytes"]
    if pd.isna(total):
        return []
    exact = measured or (not pd.isna(row["bytes_exact"]) and bool(row["bytes_exact"]))
    text = f"{int(total):,} bytes, {'measured' if exact else 'predicted'}"
    if not pd.isna(row["limit_bytes"]):
        left = int(row["limit_bytes"]) - int(total)
        text += f"; {left:,} left" if left >= 0 else f"; {-left:,} OVER THE LIMIT"
    return [("model and code", text)]


def _note(
    row: pd.Series[Any], candidates: int, plan: Mapping[str, Any], folder: Storage | None
) -> str:
    if row["kind"] != "trial":
        if candidates < 2:
            return "One run is one seed: it says nothing of the spread between seeds."
        return f"The best of {candidates:,}, picked by the same validation documents."
    if plan.get("labels"):
        return "A confirmation: compare means over its seeds, and not its single best trial."
    if candidates < 2:
        return "One trial from one seed: it says nothing of the spread between seeds."
    note = (
        f"Selected on validation: the best of {candidates:,} on the same documents flatters itself."
    )
    if folder is None:
        return note
    confirm = command("confirm", folder.name, storage_of(folder).uri)
    return f"{note} What may be claimed: {confirm}"


def assignments(knobs: Mapping[str, Any]) -> str:
    """Knobs as options for the command line, every digit kept."""
    return " ".join(f"--set {shlex.quote(f'{knob}={_value(v)}')}" for knob, v in knobs.items())


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return repr(value) if isinstance(value, float) else str(value)


# Failures -----------------------------------------------------------------------------------------


def failures(trials: Trials, records: Sequence[Mapping[str, Any]]) -> tuple[Failure, ...]:
    """Trials that ended without a score that counts, or were interrupted, by reason, the most
    frequent first.

    Reasons that differ in their numbers alone are one.
    """
    frame = trials.frame
    bad = frame[~frame["status"].isin(["done", "running"]) & frame["status"].notna()]
    reasons = bad["reason"].fillna("no reason is recorded")
    alike = reasons.map(lambda text: _NUMBERS.sub("#", str(text)))
    lost = lost_gpu_hours(trials, records, bad)
    found = []
    for (status, _), part in bad.groupby([bad["status"], alike], sort=False):
        stages = [str(s) for s in part["stage"].dropna().unique()]
        found.append(
            Failure(
                status=str(status).replace("_", " "),
                reason=str(reasons.loc[part.index[0]]),
                stages=", ".join(stages),
                count=len(part),
                trials=_listed(part),
                gpu_hours=sum(lost[int(key)] for key in part["key"]),
            )
        )
    return tuple(sorted(found, key=lambda f: (f.status != "failed", -f.count)))


def _listed(part: pd.DataFrame) -> str:
    names = [str(name) for name in part["name"]]
    one = part["source"].nunique(dropna=False) <= 1
    if one and (part["kind"] == "trial").all() and part["trial"].notna().all():
        names = [str(number) for number in part["trial"]]
    more = f" and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def totals(parts: Sequence[Summary]) -> list[tuple[str, str, str]]:
    """Figures of all sweeps together: number, what it is, and a remark."""
    counts = {status: sum(p.counts[status] for p in parts) for status in STATUSES}
    planned = sum(p.planned or p.total for p in parts)
    total, hours = sum(counts.values()), sum(p.gpu_hours for p in parts)
    wasted, wall = sum(p.wasted_gpu_hours for p in parts), sum(p.wasted_hours for p in parts)
    of = f"of {planned:,} planned" if planned > total else "all that were planned"
    lost = counts["failed"] + counts["over limit"]
    others = [f"{counts[status]:,} {status}" for status in ("interrupted", "pruned")
              if counts[status]]  # fmt: skip
    cost = f"{wasted:,.2f} GPU-hours" if hours else f"{wall:,.2f} hours"
    return [
        (f"{total:,}", "trial" if total == 1 else "trials", of),
        (f"{counts['done']:,}", "done", number_of(sum(p.trainings for p in parts), "training")),
        (f"{counts['failed']:,}", "failed", f"{counts['over limit']:,} over a limit"),
        (f"{counts['running']:,}", "running", ", ".join(others) or "at this moment"),
        (f"{hours:,.2f}", "GPU-hours", "held by stages that ended"),
        (cost.partition(" ")[0], f"{cost.partition(' ')[2]} lost",
         f"on {number_of(lost, 'trial')} that failed or are over"),
    ]  # fmt: skip
