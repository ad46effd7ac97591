"""What verbs print: JSON for machines, short reports for people, progress bars on a terminal.

Results go to standard output, everything else to standard error; with `--json` standard output
holds the document and nothing more. Where standard error is no terminal there is no progress.

Invariant: what is printed as JSON is JSON: a number that is not finite becomes null.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

LABEL_WIDTH = 12


def print_json(value: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(_finite(value), indent=2, allow_nan=False))


def print_report(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print a headline and its facts, a line each; lines are never cut, also in a pipe."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(title, style="bold"))
    for label, text in rows:
        line = Text("  ").append(f"{label:<{LABEL_WIDTH}}", style="cyan").append(text)
        console.print(line)


def count(value: int) -> str:
    """A whole number with thousands apart."""
    return f"{value:,}"


def number_of(value: int, noun: str) -> str:
    """A number of things, in the singular where there is one."""
    return f"{value:,} {noun}" if value == 1 else f"{value:,} {noun}s"


def duration(seconds: float) -> str:
    """Seconds as a person reads them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def clock(seconds: float) -> str:
    """Seconds as a clock shows them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def sizes_line(sizes: dict[str, Any]) -> str:
    """Model, code and total apart, as `Sizes.to_dict` has them."""
    total, limit = sizes["total_bytes"], sizes["limit_bytes"]
    margin = sizes["margin_bytes"]
    verdict = f"{count(margin)} left" if sizes["fits"] else f"{count(-margin)} OVER THE LIMIT"
    return (
        f"model {count(sizes['model_bytes'])} + code {count(sizes['code_bytes'])} = "
        f"{count(total)} of {count(limit)} bytes, {verdict}"
    )


class Bar:
    """Progress of one command on standard error; silent where that is no terminal.

    A command may go through several phases; each has its own line while it runs.
    """

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._task: Any = None
        self._phase = ""

    def update(
        self,
        label: str,
        done: int,
        total: int,
        detail: str = "",
        *,
        phase: str = "",
        seconds_left: float | None = None,
    ) -> None:
        """Show units done of all (0 where not known) and a word on how it goes.

        Args:
            phase: what the time left is reckoned over; by default the label, so that another
                label begins anew.
            seconds_left: where it is known better than from the pace of units.
        """
        if self._progress is None:
            return
        whole, phase = total or None, phase or label
        if phase != self._phase:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._phase = phase
            self._task = self._progress.add_task(label, total=whole, detail="", left=None)
        self._progress.update(
            self._task,
            description=label,
            completed=done,
            total=whole,
            detail=detail,
            left=seconds_left,
        )

    def say(self, line: str) -> None:
        """Print a line that stays, also where there is no bar: what happened matters."""
        if self._progress is not None:
            self._progress.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def phase(self, phase: str, done: int, total: int) -> None:
        """`update` for those who know no more."""
        self.update(phase, done, total)


@contextmanager
def progress_bar() -> Iterator[Bar]:
    """A bar that is taken away when the block ends."""
    if not sys.stderr.isatty():
        yield Bar(None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.text import Text

    class Left(ProgressColumn):
        max_refresh = 0.5

        def render(self, task: Task) -> Text:
            known = task.fields["left"]
            seconds = task.time_remaining if known is None else known
            return Text("" if seconds is None else f"{clock(seconds)} left", style="cyan")

    class Percent(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.percentage:>3.0f}%" if task.total is not None else "")

    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        Percent(),
        TextColumn("{task.fields[detail]}", style="cyan"),
        Left(),
        console=Console(stderr=True),
        transient=True,
        expand=True,
        # Standard output may be a pipe and then holds the result alone.
        redirect_stdout=False,
        refresh_per_second=5,
    )
    with progress:
        yield Bar(progress)


def plain_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of text with columns in line."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
