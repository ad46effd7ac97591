"""A sweep on a terminal while it runs: a screen that is drawn anew, or a line for every change.

The screen fits any width and height: lines are cut at its edge, and what there is no room for is
counted. Without a terminal nothing but lines of plain text is written.

Invariant: nothing that a record says is taken for markup or does anything to the terminal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.live import Live
from rich.text import Text

from golf_ray.errors import StorageError
from golf_ray.results.drawing import bar, clean, sparkline
from golf_ray.results.words import (
    about,
    changes,
    misses,
    outcome,
    score_text,
    summary_line,
    time_left,
)

if TYPE_CHECKING:
    from rich.console import ConsoleOptions, RenderResult

    from golf_ray.results.standing import Look, SweepReader

REMOTE_POLL_S: Final = 5.0
"""At least so long between two looks at an object store, which asks money for each."""
TICK_S: Final = 0.2
"""Until a changed size of the terminal is seen."""
LABEL_WIDTH: Final = 9
MOST_LATELY: Final = 8
_SPARK_WIDTH: Final = 24
STYLES: Final = {"failed": "red", "over_limit": "yellow"}


# Looking ------------------------------------------------------------------------------------------


class Watch:
    """Looks at a sweep until it is over.

    Args:
        reader: of the sweep.
        every_s: between two looks; at least `REMOTE_POLL_S` where the storage is not a file
            system of this machine.
    """

    def __init__(self, reader: SweepReader, every_s: float) -> None:
        remote = reader.sweep.folder.local is None
        self.every_s = max(every_s, REMOTE_POLL_S) if remote else every_s
        self.trouble: str | None = None
        """Why the last look saw nothing."""
        self._reader = reader
        self.last: Look | None = None
        self.over = False
        self._was_driven = True

    def first(self) -> Look:
        """The first look.

        Raises:
            StorageError: the storage cannot be read.
        """
        look = self._reader.look()
        self._note(look)
        return look

    def next(self, before: Look) -> Look:
        """Another look; where the storage cannot be read, what was seen before, and the trouble."""
        try:
            look = self._reader.look()
        except StorageError as error:
            self.trouble = str(error)
            return before
        self.trouble = None
        self._note(look)
        return look

    def _note(self, look: Look) -> None:
        # A driver that has just begun may not have said so yet: without one, look twice.
        stands = look.state in ("ended", "out of budget")
        self.over = stands or not (look.driven or self._was_driven)
        self._was_driven = look.driven
        self.last = look


def watch_screen(watch: Watch, console: Console) -> Look:
    """Show a sweep on a screen of its own until it is over.

    Returns:
        the last look.

    Raises:
        KeyboardInterrupt: the user has seen enough.
        StorageError: the storage cannot be read at the first look.
    """
    look = watch.first()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while not watch.over:
            live.update(SweepScreen(look, every_s=watch.every_s, trouble=watch.trouble))
            live.refresh()
            _wait(watch.every_s, console, live)
            look = watch.next(look)
    return look


def watch_lines(watch: Watch, tell: Callable[[str], None]) -> Look:
    """Tell a line of everything that happens until the sweep is over.

    Returns:
        the last look.

    Raises:
        StorageError: the storage cannot be read at the first look.
    """
    look, trouble = watch.first(), watch.trouble
    tell(summary_line(look))
    while not watch.over:
        time.sleep(watch.every_s)
        before, look = look, watch.next(look)
        for line in changes(before, look):
            tell(line)
        if watch.trouble not in (None, trouble):
            tell(f"{clean(watch.trouble)}; trying again")
        trouble = watch.trouble
    tell(summary_line(look))
    return look


def _wait(seconds: float, console: Console, live: Live) -> None:
    until_s, size = time.monotonic() + seconds, console.size
    while (left_s := until_s - time.monotonic()) > 0:
        time.sleep(min(TICK_S, left_s))
        if console.size != size:
            size = console.size
            live.refresh()


# The screen ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    label: str
    text: str
    style: str = ""


class SweepScreen:
    """A sweep at one moment, for a screen of any size.

    Args:
        look: what was seen.
        every_s: seconds between two looks.
        trouble: why the last look saw nothing.
    """

    def __init__(self, look: Look, *, every_s: float, trouble: str | None = None) -> None:
        self._look = look
        self._every_s = every_s
        self._trouble = trouble

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lines that fit."""
        width, height = options.max_width, options.height or options.size.height
        ascii_only = options.ascii_only
        lines = [self._head(width), self._bar(width, ascii_only), Text("")]
        facts = list(self._facts(width, ascii_only))
        room = height - len(lines) - len(facts) - 2
        running = self._running(max(1, room // 2))
        lately = self._lately(min(MOST_LATELY, max(1, room - len(running))))
        rows = [*facts, _Row(label="", text=""), *running, _Row(label="", text=""), *lately]
        for row in rows:
            line = Text(f"{row.label:<{LABEL_WIDTH}}", style="cyan")
            lines.append(line.append(row.text, style=row.style or "default"))
        for line in lines[:height]:
            line.truncate(width, overflow="ellipsis")
            yield line

    def _head(self, width: int) -> Text:
        seen = time.strftime("%H:%M:%S", time.localtime(self._look.unix_s))
        right = f"{self._look.state}  every {self._every_s:g} s  {seen}"
        name = Text(clean(self._look.sweep.name), style="bold")
        gap = width - name.cell_len - len(right)
        if gap < 2:
            return name.append(f"  {self._look.state}", style="default")
        return name.append(" " * gap).append(right, style="default")

    def _bar(self, width: int, ascii_only: bool) -> Text:
        look = self._look
        summary, ended, whole = look.summary(), len(look.ended), look.sweep.num_trials
        counts = [f"{ended} of {whole}", f"{summary['begun']} running", *misses(summary)]
        told = "  " + ", ".join(counts)
        long = max(0, min(width - len(told), 48))
        filled = bar(ended, whole, long, ascii_only=ascii_only)
        line = Text(filled, style="green").append("." * (long - len(filled)), style="dim")
        return line.append(told, style="default")

    def _facts(self, width: int, ascii_only: bool) -> Iterator[_Row]:
        look = self._look
        best = look.best
        if best is None:
            yield _Row(label="best", text="no trial is done and within the limits yet")
        else:
            score = f"{look.objective} {score_text(look, best['values'][look.objective])}"
            text = f"{score} (trial {best['trial']})"
            yield _Row(label="best", text=text, style="bold green")
            spark = sparkline(look.best_so_far(), _SPARK_WIDTH, ascii_only=ascii_only)
            if len(look.best_so_far()) > 1:
                yield _Row(label="", text=f"{spark}  best after each trial")
        used = f"{look.summary()['gpu_hours']:.2f} GPU-hours"
        if look.sweep.max_gpu_hours is not None:
            used += f" of at most {look.sweep.max_gpu_hours:g}"
        yield _Row(label="used", text=f"{used}, {about(look.worked_s())} of work")
        left = time_left(look)
        if left is not None:
            yield _Row(label="left", text=left)
        if self._trouble is not None:
            yield _Row(label="trouble", text=f"{clean(self._trouble)}; trying again", style="red")
        for problem in look.problems[:2]:
            yield _Row(label="unread", text=clean(problem), style="red")

    def _running(self, room: int) -> list[_Row]:
        look = self._look
        if not look.driven:
            return [_Row(label="running", text="nobody runs it at this moment")]
        texts = [clean(text) for text in look.doing] or ["no trial at this moment"]
        shown, more = texts[:room], len(look.running) - room
        if more > 0:
            shown[-1] = f"{shown[-1]} (and {more} more)"
        return [_Row(label="" if i else "running", text=text) for i, text in enumerate(shown)]

    def _lately(self, room: int) -> list[_Row]:
        look = self._look
        best = {one.trial for one in look.improvements()}
        rows: list[_Row] = []
        for record in look.ended[:room]:
            ended = record.get("ended_unix_s")
            clock = time.strftime("%H:%M  ", time.localtime(ended)) if ended else ""
            improved = record["trial"] in best
            rows.append(
                _Row(
                    label="" if rows else "lately",
                    text=clock + outcome(look, record, improved),
                    style="green" if improved else STYLES.get(record["status"], ""),
                )
            )
        return rows
