"""A sweep on a page: how it stands, its table, its best configuration to copy, and what failed.

Invariant: the best of a search is called what it is, a pick by the scores that are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from golf_ray.results.drawing import sparkline
from golf_ray.results.settings import command_lines
from golf_ray.results.words import about, measured, misses, time_left

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from golf_ray.results.accounts import FailureGroup, SweepAccount
    from golf_ray.results.migration import Record
    from golf_ray.results.page import Page

MOST_TRIALS: Final = 40
"""Trials in a table; of more than these, the best."""
_MEASURED: Final = ("int6\nbpb", "train\nbpb", "KB", "TTT\nbpb", "train-\ning")
"""Headings of columns that are no knobs, those first that can be missed first."""


def print_sweep(page: Page, account: SweepAccount) -> None:
    look = account.look
    sweep, summary = look.sweep, look.summary()
    page.title(f"{sweep.name}: sweep, {look.state}")
    trials = [f"{len(look.ended)} of {sweep.num_trials} trials ended", *misses(summary)]
    trials += [f"{summary['begun']} {'running' if look.driven else 'begun'}"] * bool(look.running)
    page.row("status", ", ".join(trials))
    space = (account.plan.get("space") or {}).get("name")
    page.row("searched", f"{space or 'points'} by {account.plan.get('sampler', '?')} for "
             f"{', '.join(sweep.objectives)}; {summary['trainings']} trainings")  # fmt: skip
    page.row("used", f"{summary['gpu_hours']:.2f} GPU-hours, {about(summary['worked_s'])} of work")
    left = time_left(look)
    if left is not None:
        page.row("left", left)
    page.rows("doing", look.doing)
    _print_table(page, look.records, look.objective)
    _print_best(page, account)
    for group in account.failures:
        style = "red" if group.status == "failed" else "yellow"
        page.row(group.status.replace("_", " "), _failure(group), style)
    page.rows("claims", account.claims)
    if look.go_on is not None:
        page.row("go on", look.go_on)
    page.row("place", summary["folder"])


def _failure(group: FailureGroup) -> str:
    count, numbers = len(group.trials), ", ".join(map(str, group.trials[:8]))
    if count == 1:
        return f"trial {numbers}: {group.reason}"
    more = f" and {count - 8} more" if count > 8 else ""
    same = "" if group.alike else f" (so trial {group.trials[0]}; other numbers in others)"
    return f"trials {numbers}{more}: {group.reason}{same}"


def _print_table(page: Page, records: Sequence[Record], objective: str) -> None:
    if not records:
        return
    chosen, what = leading(records, objective), ""
    if len(chosen) < len(records):
        what = f"the best {len(chosen)} of {len(records):,}; 'golf-ray export' has all"
    table, left_out = fitting_table(chosen, objective, page.console)
    page.table(table)
    if what:
        page.row("table", what)
    if left_out:
        page.row("no room for", ", ".join(left_out))


def leading(records: Sequence[Record], objective: str) -> list[Record]:
    """Those that a table has room for, in their order: all, or the best."""
    from golf_ray.results.standing import scored
    from golf_ray.sweeps.finalists import ranked

    best = ranked(scored(records, objective), objective)
    first = {record["trial"] for record in best}
    chosen = [*best, *(record for record in records if record["trial"] not in first)]
    return sorted(chosen[:MOST_TRIALS], key=lambda record: int(record["trial"]))


def _print_best(page: Page, account: SweepAccount) -> None:
    look, best = account.look, account.look.best
    if account.plan.get("labels"):
        page.row("best", "a confirmation: compare means over its seeds, and not single trials")
        return
    if best is None:
        page.row("best", "no trial is done and within the limits")
        return
    value = best["values"][look.objective]
    shown = f"{value:,.0f} bytes" if look.objective == "total_bytes" else f"{value:.5f}"
    page.row("best", f"trial {best['trial']}: {look.objective} {shown}", "bold green")
    done = sum(record["status"] == "done" for record in look.records)
    if look.objective != "total_bytes":
        scored = best.get("documents_scored")
        same = f"the same {scored:,} documents" if isinstance(scored, int) else "the same text"
        page.row("", f"selected: the lowest of {done} scores on {same}, so luck is in it. Fresh "
                 f"seeds tell: {look.sweep.command('confirm')}")  # fmt: skip
    if best.get("final"):
        page.row("", measured(best))
    spark = sparkline(look.best_so_far(), min(40, page.room - 13), ascii_only=page.ascii_only)
    if len(look.ended) > 1:
        page.lines("", [f"{spark}  best so far"])
    checkpoints = account.plan.get("checkpoints") or ()
    words = ["golf-ray", "train", "--preset", account.preset]
    if checkpoints:
        words = ["golf-ray", "eval", str(checkpoints[0][0]), "--method", "ttt", "--quantize"]
    for line in command_lines(words, account.settings):
        page.plain(line)


def fitting_table(
    records: Sequence[Record], objective: str, console: Console
) -> tuple[Table, list[str]]:
    """A sweep's table without the columns that a terminal has no room for, and their names."""
    from rich.measure import Measurement

    from golf_ray.sweeps.table import screen_table, trials_frame

    table = screen_table(trials_frame(records), objective)
    own = {"ttt_bpb": "TTT\nbpb", "int6_bpb": "int6\nbpb", "total_bytes": "KB"}.get(objective)
    headings = [str(column.header) for column in table.columns]
    knobs = [h for h in headings if h not in ("#", *_MEASURED)]
    order = [h for h in (*_MEASURED[:-1], *reversed(knobs), _MEASURED[-1]) if h != own]
    wide = console.options.update(width=10_000)
    empty = [h for h, c in zip(headings, table.columns, strict=True) if not any(c.cells)]
    whole, left_out = _without(table, empty), list[str]()

    def fits(missing: Sequence[str]) -> bool:
        shown = _without(whole, missing)
        return Measurement.get(console, wide, shown).maximum <= console.width

    for heading in (h for h in order if h in headings and h not in empty):
        if fits(left_out):
            break
        left_out.append(heading)
    # A wide one that had to go may have made room for narrow ones that went before it.
    for heading in left_out[-2::-1]:
        others = [h for h in left_out if h != heading]
        left_out = others if fits(others) else left_out
    names = [heading.replace("-\n", "").replace("\n", " ") for heading in left_out]
    return _without(whole, left_out), names


def _without(table: Table, headings: Sequence[str]) -> Table:
    """A table without some columns."""
    from rich.table import Table

    kept = [column for column in table.columns if str(column.header) not in headings]
    fewer = Table(box=table.box, pad_edge=False, collapse_padding=True)
    for column in kept:
        fewer.add_column(column.header, justify=column.justify)
    for row, *cells in zip(table.rows, *(column.cells for column in kept), strict=True):
        fewer.add_row(*cells, style=row.style)
    return fewer
