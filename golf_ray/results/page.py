"""A page of labelled rows on a terminal of any width, or in a pipe.

Lines are broken between words at the terminal's width; a word that is longer (a path) stays whole,
so that it can be copied.

Invariant: nothing that a file says is taken for markup or does anything to the terminal.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from golf_ray.results.drawing import clean

if TYPE_CHECKING:
    from rich.table import Table

LABEL_WIDTH: Final = 12
MOST_WIDE: Final = 110
"""Longer lines are hard to read."""


class Page:
    """Writes labelled rows to a console."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.width = min(console.width, MOST_WIDE)
        self.ascii_only = console.options.ascii_only

    @property
    def room(self) -> int:
        """Characters beside a label."""
        return max(8, self.width - LABEL_WIDTH - 2)

    def title(self, text: str) -> None:
        """The first line."""
        self._print(Text(clean(text), style="bold"))

    def row(self, label: str, text: str, style: str = "") -> None:
        """A fact, broken between words where it is long."""
        self.lines(label, broken(clean(text), self.room), style)

    def rows(self, label: str, texts: Iterable[str], style: str = "") -> None:
        """Facts of one kind."""
        for i, text in enumerate(texts):
            self.row("" if i else label, text, style)

    def lines(self, label: str, lines: Iterable[str], style: str = "") -> None:
        """Lines that are not broken."""
        for i, line in enumerate(lines):
            self._print(self._label("" if i else label).append(line, style=style or "default"))

    def plain(self, text: str) -> None:
        """A line by itself that is not broken, as a command to copy."""
        self._print(Text(text))

    def table(self, table: Table) -> None:
        """A table that fits."""
        self.console.print(table)

    def _label(self, label: str) -> Text:
        return Text("  ").append(f"{label:<{LABEL_WIDTH}}", style="cyan")

    def _print(self, text: Text) -> None:
        text.rstrip()
        self.console.print(text, soft_wrap=True)


def broken(text: str, width: int) -> list[str]:
    """A text in lines of so many cells, broken between words alone."""
    lines: list[str] = []
    for word in text.split(" "):
        if lines and cell_len(lines[-1]) + 1 + cell_len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
