"""Accounts of runs, trials, logs and ledgers on a terminal of any width, and in a pipe.

Colour is for what matters alone: the best, and what went wrong.

Invariant: a score is said with what it is of, and with which weights.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from golf_ray.results.drawing import bar, curve, sparkline
from golf_ray.results.page import Page
from golf_ray.results.schema import NOT_FINAL
from golf_ray.results.settings import setting_text
from golf_ray.results.sweep_screen import print_sweep
from golf_ray.results.words import about

if TYPE_CHECKING:
    from rich.console import Console

    from golf_ray.results.accounts import Account, LedgerAccount, RunAccount

MOST_EVENTS: Final = 12
QUIET_S: Final = 120.0
"""A run that wrote nothing for so long may have been killed."""
PLOT_HEIGHT: Final = 7
_SKIPPED: Final = 0.05
"""Part of a training whose losses, far above all others, are cut off at the top."""
_STAGE_NAMES: Final = {
    "train_s": "training", "calibrate_s": "Hessians", "quantize_s": "quantising",
    "evaluate_s": "TTT", "waited_s": "waiting", "control_s": "the rest",
}  # fmt: skip
_WEIGHTS: Final = {"full": "full-precision weights", "int6": "quantised weights"}


def print_account(account: Account, console: Console) -> None:
    """Print what a run, trial, sweep or ledger amounts to."""
    from golf_ray.results.accounts import LedgerAccount, SweepAccount

    page = Page(console)
    if isinstance(account, SweepAccount):
        print_sweep(page, account)
    elif isinstance(account, LedgerAccount):
        _print_ledger(page, account)
    else:
        _print_run(page, account)
    page.rows("not read", account.problems, "red")


# One training or trial ----------------------------------------------------------------------------


def _print_run(page: Page, run: RunAccount) -> None:
    kinds = {"run": "run", "trial": "trial", "public": "log of the public program"}
    page.title(f"{run.name}: {kinds.get(run.kind, run.kind)}, {run.status.replace('_', ' ')}")
    style = "red" if run.status in ("failed", "interrupted") else ""
    page.rows("status", _status(run), style)
    if "reason" in run.row:
        page.row("reason", str(run.row["reason"]), "red" if run.status == "failed" else "yellow")
    _print_configuration(page, run)
    _print_curve(page, run.intervals)
    page.rows("speed", _speed(run))
    page.rows("scores", _scores(run))
    page.rows("size", _sizes(run))
    _print_times(page, run)
    page.rows("events", _event_lines(run.events))
    page.rows("machine", _machine(run))
    page.rows("versions", _versions(run))
    page.rows("parents", _parents(run))
    page.row("place", run.place)


def _status(run: RunAccount) -> list[str]:
    row, texts = run.row, run.texts
    stage = f" at {row['stage']}" if row.get("stage") else ""
    facts = [f"{run.status.replace('_', ' ')}{stage}"]
    num_steps = run.intervals[-1].get("num_steps") if run.intervals else None
    if "steps" in row:
        of = f" of at most {num_steps:,}" if num_steps and num_steps != row["steps"] else ""
        tokens = f", {texts['tokens']} tokens" if "tokens" in row else ""
        facts.append(f"{row['steps']:,} steps{of}{tokens}")
    elif run.intervals and num_steps:
        facts.append(f"step {run.intervals[-1]['step']:,} of {num_steps:,}")
    if "elapsed_s" in row:
        facts.append(f"{about(row['elapsed_s'])} of training")
    lines = ["; ".join(facts)]
    if "began_unix_s" in row:
        ended = f", ended {_when(row['ended_unix_s'])}" if "ended_unix_s" in row else ""
        lines.append(f"began {_when(row['began_unix_s'])}{ended}")
    again = f"golf-ray train --resume --run-dir {shlex.quote(run.place)}"
    if run.status in NOT_FINAL and run.last_written_unix_s is not None:
        quiet_s = max(0.0, time.time() - run.last_written_unix_s)
        lines.append(f"last written {about(quiet_s)} ago")
        if run.status == "running" and quiet_s > QUIET_S and run.kind == "run":
            lines += ["if it was killed, go on with:", again]
    if run.status == "interrupted" and run.kind == "run":
        lines += ["go on with:", again]
    return lines


def _print_configuration(page: Page, run: RunAccount) -> None:
    searched = [d for d in run.differences if d.searched]
    differing = [d for d in run.differences if not d.searched]
    if searched:
        page.rows("searched", (_difference(d.field, d.value, d.preset) for d in searched))
    if differing:
        page.row("configured", f"as preset '{run.preset}' but for")
        page.rows("", (_difference(d.field, d.value, d.preset) for d in differing))
    elif not searched:
        page.row("configured", f"as preset '{run.preset}'")


def _difference(field: str, value: Any, preset: Any) -> str:
    if value == preset:
        return f"{field} = {setting_text(value)}, as in the preset"
    return f"{field} = {setting_text(value)} (preset: {setting_text(preset)})"


def _print_curve(page: Page, intervals: Sequence[Mapping[str, Any]]) -> None:
    points = [
        (float(i["step"]), float(i["train_loss_nats"]))
        for i in intervals
        if "step" in i and "train_loss_nats" in i
    ]
    if len(points) > 1:
        page.lines("loss", loss_plot(points, page.room, ascii_only=page.ascii_only))
    validated = [(i["step"], i["val_bpb"]) for i in intervals if "step" in i and "val_bpb" in i]
    if validated:
        step, last = validated[-1]
        line = f"{last:.5f} at step {step:,}"
        if len(validated) > 1:
            values = [value for _, value in validated]
            spark = sparkline(values, min(24, page.room), ascii_only=page.ascii_only)
            line = f"{spark} {values[0]:.5f} at step {validated[0][0]:,}, {line}"
        page.row("val bpb", line)


def loss_plot(
    points: Sequence[tuple[float, float]], width: int, *, ascii_only: bool = False
) -> list[str]:
    """Losses over steps as lines of text with their axes.

    The first losses are far above all others and would press these flat: they are cut off.
    """
    values = [value for _, value in points]
    top = max(values)
    if len(values) >= 10:
        top = max(values[max(1, round(_SKIPPED * len(values))) :])
    low, last = min(values), points[-1][0]
    marks = [f"{top:.3f}", f"{low:.3f}"]
    label = max(map(len, marks))
    long = max(4, min(width - label - 2, 72))
    rows = curve(
        points, long, PLOT_HEIGHT, x_range=(0.0, last), y_range=(low, top), ascii_only=ascii_only
    )
    edge = "|" if ascii_only else "│"
    left = [marks[0], *[""] * (PLOT_HEIGHT - 2), marks[1]]
    lines = [f"{mark:>{label}} {edge}{row}" for mark, row in zip(left, rows, strict=True)]
    end = f"step {last:,.0f}"
    return [*lines, f"{'':>{label}}  0{end:>{max(len(end) + 1, long - 1)}}"]


def _speed(run: RunAccount) -> list[str]:
    known = [
        f"{run.texts[name]} tokens/s {when}"
        for name, when in (("tokens_per_s", "before looping"), ("tokens_per_s_looping", "looping"))
        if name in run.texts
    ]
    looping = next((i["step"] for i in run.intervals if i.get("looping")), None)
    if looping is not None:
        known.append(f"looping by step {looping:,}")
    return [_thousands(", ".join(known))] if known else []


def _thousands(text: str) -> str:
    return " ".join(f"{int(word):,}" if word.isdigit() else word for word in text.split(" "))


def _scores(run: RunAccount) -> list[str]:
    row, texts = run.row, run.texts
    weights = _WEIGHTS.get(str(row.get("weights")), "quantised weights")
    lines = []
    for name, what, scored in (
        ("val_bpb", "before quantisation, raw weights", "val_"),
        ("int6_bpb", "after quantisation, without TTT", "int6_"),
        ("ttt_bpb", f"with TTT, {weights}", ""),
    ):
        if name not in row:
            continue
        error = ""
        if name == "ttt_bpb" and "ttt_standard_error_bpb" in texts:
            error = f" +- {texts['ttt_standard_error_bpb']}"
        lines.append(f"{texts[name]}{error} bpb {what}{_counted(texts, scored)}")
    if "ttt_loss_nats" in row:
        lines.append(f"{texts['ttt_loss_nats']} nats a token with TTT")
    if "final_ttt_bpb" in row:
        lines.append(f"{texts['final_ttt_bpb']} bpb with TTT on all documents, as a finalist")
    return lines


def _counted(texts: Mapping[str, str], prefix: str) -> str:
    """Of how much a score is."""
    names = (("documents_scored", "documents"), ("tokens_scored", "tokens"),
             ("bytes_scored", "bytes"))  # fmt: skip
    known = [f"{texts[prefix + n]} {what}" for n, what in names if prefix + n in texts]
    return f": {', '.join(known)}" if known else ""


def _sizes(run: RunAccount) -> list[str]:
    row, texts = run.row, run.texts
    lines = []
    if "total_bytes" in row:
        parts = [f"{what} {texts[name]}" for name, what in
                 (("model_bytes", "model"), ("code_bytes", "code")) if name in texts]  # fmt: skip
        how = "" if row.get("bytes_exact", True) else ", foretold from the entropy of the codes"
        total = _against(row["total_bytes"], row.get("limit_bytes"))
        lines.append(f"{' + '.join(parts)}{' = ' if parts else ''}{total}{how}")
    if "final_total_bytes" in row:
        measured_total = _against(row["final_total_bytes"], row.get("limit_bytes"))
        lines.append(f"{measured_total}, measured of the finalist's artifact")
    return lines


def _against(total: int, limit: int | None) -> str:
    if limit is None:
        return f"{total:,} bytes"
    left = limit - total
    verdict = f"{left:,} left" if left >= 0 else f"{-left:,} OVER THE LIMIT"
    return f"{total:,} of {limit:,} bytes, {verdict}"


def _print_times(page: Page, run: RunAccount) -> None:
    known = {text: run.row[name] for name, text in _STAGE_NAMES.items() if run.row.get(name)}
    if known:
        largest = max(known.values())
        long = max(3, min(40, page.room - 23))
        page.lines(
            "time",
            (
                f"{name:<11}{about(seconds):>10}  "
                + bar(seconds, largest, long, ascii_only=page.ascii_only)
                for name, seconds in known.items()
            ),
        )
    parts = [
        f"{what} {about(run.row[name])}"
        for name, what in (("start_s", "starting"), ("compile_s", "compiling"),
                           ("elapsed_s", "steps"))
        if name in run.row
    ]  # fmt: skip
    if parts and "train_s" in run.row:
        page.row("" if known else "time", f"training: {', '.join(parts)}")
    gpu_s = run.row.get("gpu_s")
    if gpu_s:
        page.row("", f"{gpu_s / 3600:.3g} GPU-hours")


def _event_lines(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """What happened, with the time since the beginning; checkpoints are counted."""
    began = next((e["unix_s"] for e in events if isinstance(e.get("unix_s"), (int, float))), 0.0)
    lines = []
    for event in events:
        text = _event(event)
        if text is not None:
            since = event.get("unix_s")
            when = f"+{about(since - began)}: " if isinstance(since, (int, float)) else ""
            lines.append(when + text)
    more = len(lines) - MOST_EVENTS
    if more > 0:
        lines = [f"{more} before these", *lines[-MOST_EVENTS:]]
    steps = [event.get("step") for event in events if event.get("kind") == "checkpoint"]
    if steps:
        lines.append(f"{len(steps)} checkpoints, the last at step {steps[-1]}")
    return lines


def _event(event: Mapping[str, Any]) -> str | None:
    kind = event.get("kind")
    if kind == "run":
        how = "resumed" if event.get("resumed") else "begun"
        return f"{how} with {event.get('num_workers', '?')} workers"
    if kind == "began":
        return f"attempt {event.get('attempt', '?')} at step {event.get('step', '?')}"
    if kind in ("failure", "start_failed"):
        return str(event.get("reason"))
    if kind == "stuck":
        return f"worker {event.get('rank')} on {event.get('host')} stood at {event.get('where')}"
    if kind == "restarted":
        step, lost = event.get("resumed_from_step"), event.get("lost_at_step")
        return f"restarted from step {step} (step {lost} had been reached)"
    if kind == "run_ended":
        error = event.get("error")
        return "ended" if error is None else f"ended: {error}"
    return None


def _machine(run: RunAccount) -> list[str]:
    row, texts = run.row, run.texts
    facts = []
    if "device" in row:
        workers = row.get("num_workers")
        facts.append(f"{workers} x {row['device']}" if workers else str(row["device"]))
    elif "num_workers" in row:
        facts.append(f"{row['num_workers']} workers")
    hosts = {
        str(worker.get("host"))
        for event in run.events
        if event.get("kind") == "workers"
        for worker in event.get("workers") or ()
        if isinstance(worker, dict)
    }
    if hosts or "host" in row:
        facts.append("on " + ", ".join(sorted(hosts or {str(row["host"])})))
    if "peak_memory_bytes" in row:
        facts.append(f"{row['peak_memory_bytes'] / 1e9:.1f} GB at most")
    if row.get("restarts"):
        facts.append(f"{texts['restarts']} restarts")
    return [", ".join(facts)] if facts else []


def _versions(run: RunAccount) -> list[str]:
    known = [
        f"{name} {run.row[f'{name}_version']}"
        for name in ("golf_ray", "torch", "ray", "python")
        if f"{name}_version" in run.row
    ]
    if "commit" in run.row:
        known.append(f"commit {run.row['commit']}")
    return [", ".join(known)] if known else []


def _parents(run: RunAccount) -> list[str]:
    names = ("training", "checkpoint", "codes", "evaluation", "artifact", "data")
    return [f"{name} {run.row[name]}" for name in names if name in run.row]


def _when(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))


# A ledger -----------------------------------------------------------------------------------------


def _print_ledger(page: Page, ledger: LedgerAccount) -> None:
    page.title(f"{ledger.name}: ledger of test-time training")
    if ledger.bpb is None:
        page.row("score", "no document is scored yet")
    else:
        page.row("score", f"{ledger.bpb:.5f} bpb, {ledger.nats / ledger.tokens:.5f} nats a token")
    page.row("of", f"{ledger.documents:,} documents, {ledger.tokens:,} tokens, "
             f"{ledger.bytes_scored:,} bytes")  # fmt: skip
    if ledger.weights is not None:
        page.row("weights", _WEIGHTS.get(ledger.weights, ledger.weights))
    if ledger.lengths:
        largest, long = max(one.bpb for one in ledger.lengths), min(30, page.room - 30)
        page.row("by length", "tokens, documents, bpb")
        page.lines(
            "",
            (
                f"{one.label:<14} {one.documents:>4,} {one.bpb:.4f}  "
                + bar(one.bpb, largest, long, ascii_only=page.ascii_only)
                for one in ledger.lengths
            ),
        )
    page.row("place", ledger.place)
