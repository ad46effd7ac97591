"""Pictures made of characters: sparklines, bars and curves for a terminal of any width.

Functions from numbers to lines of text, without colour; nothing here knows of runs or writes
anywhere. Each has a form in ASCII for terminals that know no more.

Invariant: no line is wider than asked for, and what is not a finite number leaves a gap.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Final

_EIGHTHS: Final = "▁▂▃▄▅▆▇█"
_ASCII_EIGHTHS: Final = "_.-:=+*#"
_PARTS: Final = " ▏▎▍▌▋▊▉"
_BRAILLE: Final = 0x2800
_DOTS: Final = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of a Braille character's dots, by row and column."""

Point = tuple[float, float]


def clean(text: object) -> str:
    """A text in one line that does nothing to a terminal: control characters, and those that turn
    the direction of text, are shown by their escapes."""
    line = str(text)
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else " " if c in "\n\t" else repr(c)[1:-1] for c in line)


def sparkline(values: Sequence[float | None], width: int, *, ascii_only: bool = False) -> str:
    """Values from left to right as heights; of more than fit, the last of each stretch.

    Args:
        values: None for a gap.
        width: characters at most.
    """
    levels = _ASCII_EIGHTHS if ascii_only else _EIGHTHS
    count = min(len(values), max(width, 0))
    picked = [values[(i + 1) * len(values) // count - 1] for i in range(count)]
    known = [v for v in picked if v is not None and math.isfinite(v)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    marks = []
    for value in picked:
        if value is None or not math.isfinite(value):
            marks.append(" ")
        elif high == low:
            marks.append(levels[3])
        else:
            marks.append(levels[round((value - low) / (high - low) * (len(levels) - 1))])
    return "".join(marks)


def bar(value: float, largest: float, width: int, *, ascii_only: bool = False) -> str:
    """A bar from the left, of `width` characters for the largest; what is not 0 is seen."""
    finite = math.isfinite(value) and math.isfinite(largest)
    if not finite or value <= 0 or largest <= 0 or width <= 0:
        return ""
    share = min(1.0, value / largest) * width
    if ascii_only:
        return "#" * max(1, round(share))
    eighths = max(1, round(share * 8))
    return ("█" * (eighths // 8) + _PARTS[eighths % 8]).rstrip()


def curve(
    points: Sequence[Point],
    width: int,
    height: int,
    *,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    ascii_only: bool = False,
) -> list[str]:
    """A line through points in order of x, as rows from the top.

    What lies outside the ranges is left out: its part of the line ends at the edge.
    """
    across, up = (1, 1) if ascii_only else (2, 4)
    dots = _dots(points, width * across, height * up, x_range, y_range)
    if ascii_only:
        rows = [["*" if (x, y) in dots else " " for x in range(width)] for y in range(height)]
        return ["".join(row).rstrip() for row in rows]
    return [
        "".join(_cell(dots, column, row) for column in range(width)).rstrip()
        for row in range(height)
    ]


def _cell(dots: set[tuple[int, int]], column: int, row: int) -> str:
    bits = (
        bit
        for dy, pair in enumerate(_DOTS)
        for dx, bit in enumerate(pair)
        if (2 * column + dx, 4 * row + dy) in dots
    )
    pattern = sum(bits)
    # Some fonts draw dots where there are none.
    return chr(_BRAILLE + pattern) if pattern else " "


def _dots(
    points: Sequence[Point], wide: int, high: int, x_range: Point, y_range: Point
) -> set[tuple[int, int]]:
    """Places of a grid, from its upper left corner, that a line through points touches."""
    (left, right), (low, top) = x_range, y_range
    placed: list[Point] = []
    for x, y in points:
        if math.isfinite(x) and math.isfinite(y):
            across = (x - left) / ((right - left) or 1.0) * (wide - 1)
            # A flat line lies in the middle.
            placed.append((across, (top - y) / (top - low) * (high - 1) if top > low else high / 2))
    dots = {(round(x), round(y)) for x, y in placed}
    for (x0, y0), (x1, y1) in itertools.pairwise(placed):
        steps = min(4 * (wide + high), math.ceil(2 * max(abs(x1 - x0), abs(y1 - y0))))
        for i in range(1, steps):
            t = i / steps
            dots.add((round(x0 + t * (x1 - x0)), round(y0 + t * (y1 - y0))))
    return {(x, y) for x, y in dots if 0 <= x < wide and 0 <= y < high}
