"""A picture: a chart without its data, its data apart, and what it says in words.

Charts are Altair's, checked against the schema of Vega-Lite as they are made. Data lie beside a
chart under names, so that any number of rows goes in and nothing is copied.

Invariant: a chart is as wide as the place that it gets, and looks for nothing beyond its data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from golf_ray.records import atomic_write_bytes, make_folder
from golf_ray.results.pictures.themes import config

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

COLUMN_PT: Final = 252
"""Width of a paper's column, 89 mm, in points."""
PAGE_PT: Final = 519
"""Width of a paper's page, 183 mm, in points."""
PAPER_PPI: Final = 300
_PT_PER_INCH: Final = 72
_PAPER_HEIGHT: Final = 0.5
"""A point of height in a paper for a pixel on a screen."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """A table of plain values."""

    columns: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]

    def to_dicts(self) -> list[dict[str, Any]]:
        """A dictionary a row."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.values]


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A chart with what belongs to it."""

    name: str
    """Of its files."""
    title: str
    text: str
    """What it shows, with numbers: stands for the chart where that is not seen."""
    spec: Mapping[str, Any]
    """Of Vega-Lite, without data and colours."""
    data: Mapping[str, Rows] = field(default_factory=dict)
    wide: bool = False
    """Whether a paper gives it both columns."""
    min_width_px: int = 0
    """On a narrower screen it scrolls in its box."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NoPicture:
    """What cannot be drawn."""

    name: str
    title: str
    why: str
    """In one line."""


def picture(
    name: str,
    title: str,
    text: str,
    chart: alt.Chart | alt.LayerChart | alt.FacetChart,
    data: Mapping[str, Rows],
    *,
    height_px: int = 300,
    wide: bool = False,
    min_width_px: int = 0,
) -> Picture:
    """A picture of a chart, made to fit any width."""
    spec = chart.properties(width="container", height=height_px).to_dict()
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    spec["padding"] = 4
    # The looks have their own, and the address of the schema is of no use in a file of its own.
    spec.pop("config", None)
    spec.pop("$schema", None)
    return Picture(
        name=name, title=title, text=text, spec=spec, data=data, wide=wide,
        min_width_px=min_width_px,
    )  # fmt: skip


def rows_of(frame: pd.DataFrame, digits: Mapping[str, int] | None = None) -> Rows:
    """A frame as plain values; missing and not finite ones become None.

    Args:
        digits: significant digits to keep, by column: a screen shows no more.
    """
    columns = []
    for name in frame.columns:
        keep = (digits or {}).get(name)
        columns.append([_plain(value, keep) for value in frame[name].tolist()])
    return Rows(
        columns=tuple(str(name) for name in frame.columns),
        values=tuple(zip(*columns, strict=True)) if columns else (),
    )


def _plain(value: Any, digits: int | None) -> Any:
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, (int, float)):
        if not math.isfinite(value):
            return None
        if digits is not None and isinstance(value, float):
            return float(f"{value:.{digits}g}")
        return value
    # pandas has a value of its own for what is missing.
    return None if type(value).__name__ in ("NAType", "NaTType") else str(value)


# Files --------------------------------------------------------------------------------------------


def paper_spec(shown: Picture) -> dict[str, Any]:
    """The whole chart as a paper gets it: of fixed width, with its data, in print's colours."""
    spec = {key: value for key, value in shown.spec.items() if key not in ("params", "usermeta")}
    # A slider has its first position there.
    fixed = [_fixed(param) for param in shown.spec.get("params", ())]
    return {
        **spec,
        "params": [param for param in fixed if param is not None],
        "width": PAGE_PT if shown.wide else COLUMN_PT,
        "height": round(shown.spec["height"] * _PAPER_HEIGHT),
        "autosize": {"type": "fit-x", "contains": "padding"},
        "padding": {"left": 2, "right": 2, "top": 2, "bottom": 5},
        "datasets": {name: rows.to_dicts() for name, rows in shown.data.items()},
        "config": config("paper"),
    }


def _fixed(param: Mapping[str, Any]) -> dict[str, Any] | None:
    return {key: value for key, value in param.items() if key != "bind"}


def write_pictures(pictures: Sequence[Picture], folder: Path) -> list[Path]:
    """Write each as PNG of 300 dpi and as SVG, 89 or 183 mm wide, in the colours of print.

    Raises:
        StorageError: the folder cannot be written.
    """
    import vl_convert

    make_folder(folder)
    written = []
    for shown in pictures:
        spec = paper_spec(shown)
        svg = vl_convert.vegalite_to_svg(spec)
        png = vl_convert.vegalite_to_png(spec, scale=1, ppi=PAPER_PPI)
        for ending, data in (("svg", _in_points(svg).encode()), ("png", png)):
            path = folder / f"{shown.name}.{ending}"
            atomic_write_bytes(path, data)
            written.append(path)
    return written


def _in_points(svg: str) -> str:
    """An SVG whose size on paper is said: its units are points."""
    head, close, rest = svg.partition(">")
    return re.sub(r'\b(width|height)="([\d.]+)"', r'\1="\2pt"', head) + close + rest


def drawn(pictures: Iterable[Picture | NoPicture]) -> list[Picture]:
    """Those that there is something to see of."""
    return [shown for shown in pictures if isinstance(shown, Picture)]
