"""The looks of pictures: on a light screen, on a dark one, and in a paper.

Charts name what a mark is (`best`, `limit`, `idle`) and no colour; a look says what colour that is.
So one chart serves all three. Series have the colours of Okabe and Ito, values those of viridis;
both can be told apart by people who do not see all colours, and a status is a shape as well.

Invariant: every style that a chart names is in every look.
"""

from __future__ import annotations

from typing import Any, Final, Literal

Theme = Literal["light", "dark", "paper"]

SERIES_LIGHT: Final = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#666666")
SERIES_DARK: Final = ("#56B4E9", "#E69F00", "#2BC59B", "#FF7F45", "#E48FC0", "#F0E442", "#B0B0B0")
MAX_SERIES: Final = len(SERIES_LIGHT)
SHAPES: Final = ("circle", "triangle-up", "diamond", "cross", "square", "triangle-down")
"""Shapes of statuses, in the order of `rows.STATUSES`."""

SCREEN_FONT: Final = "system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif"
PAPER_FONT: Final = "Arial, 'Liberation Sans', Helvetica, sans-serif"


def config(theme: Theme) -> dict[str, Any]:
    """The configuration of Vega-Lite for a look."""
    if theme == "dark":
        return _config("#171b21", "#e6e9ee", "#a3abb8", "#333b47", SERIES_DARK, dark=True)
    if theme == "light":
        return _config("#ffffff", "#1b1f24", "#57606a", "#dde1e6", SERIES_LIGHT)
    return _config("#ffffff", "#000000", "#333333", "#dddddd", SERIES_LIGHT, paper=True)


def _config(
    ground: str,
    ink: str,
    soft: str,
    line: str,
    series: tuple[str, ...],
    *,
    dark: bool = False,
    paper: bool = False,
) -> dict[str, Any]:
    # In a paper a unit is a point, on a screen a pixel.
    font_size, thick, dot = (7, 1.2, 10) if paper else (12, 2.2, 42)
    blue, red = series[0], series[3]
    strong = "#ffffff" if dark else "#000000"
    # The best value, which is the lowest, stands out most from the ground.
    ramp = {"scheme": "viridis", "extent": [0.95, 0.12] if dark else [0.0, 0.9]}
    text = {"labelColor": soft, "titleColor": ink, "labelFontSize": font_size,
            "titleFontSize": font_size, "titleFontWeight": "normal"}  # fmt: skip
    return {
        "background": ground,
        # A page says in words what a chart shows; thousands of named marks would drown that.
        "aria": False,
        "font": PAPER_FONT if paper else SCREEN_FONT,
        "view": {"stroke": None},
        "axis": {
            **text, "gridColor": line, "gridWidth": 0.5 if paper else 1, "domain": False,
            "tickColor": line, "labelPadding": 2 if paper else 5, "titlePadding": 4 if paper else 8,
            "labelOverlap": "greedy", "labelSeparation": 2 if paper else 8,
        },
        "axisX": {"grid": False, "domain": True, "domainColor": soft, "tickColor": soft,
                  "tickSize": 3 if paper else 5},
        "axisY": {"tickSize": 0, "titleAngle": -90},
        "legend": {
            **text, "orient": "top", "direction": "horizontal", "titleOrient": "left",
            "symbolSize": dot * 1.6, "gradientLength": 60 if paper else 120,
            "gradientThickness": 5 if paper else 10, "labelLimit": 90 if paper else 150,
            "columnPadding": 6 if paper else 12, "titlePadding": 4 if paper else 8,
            "offset": 4 if paper else 8, "padding": 0,
        },
        "range": {"category": list(series), "ramp": ramp},
        "point": {"size": dot, "opacity": 0.85, "filled": True, "strokeWidth": thick / 2},
        "line": {"strokeWidth": thick * 0.75},
        "text": {"fontSize": font_size},
        "style": {
            "best": {"color": strong, "strokeWidth": thick * 1.25, "opacity": 1},
            "best-so-far": {"color": ink, "strokeWidth": thick * 0.8, "opacity": 0.9},
            "ring": {"color": strong, "strokeWidth": thick * 0.9, "size": dot * 4.5,
                     "opacity": 1},
            "thread": {"strokeWidth": thick * 0.55},
            "unfinished": {"color": red, "strokeWidth": thick * 0.7, "opacity": 0.9},
            "limit": {"color": red, "strokeWidth": thick * 0.8, "strokeDash": [4, 3]},
            "limit-name": {"color": red, "fontSize": font_size, "fontWeight": "bold"},
            "zero": {"color": soft, "strokeWidth": thick / 2},
            "spine": {"color": soft, "strokeWidth": thick / 2, "opacity": 0.8},
            "tick": {"color": ink, "fontSize": font_size - (0.5 if paper else 1)},
            "bar": {"color": blue, "opacity": 0.85},
            "spread": {"color": ink, "strokeWidth": thick * 0.6},
            "floor": {"color": soft, "opacity": 0.18},
            "idle": {"color": line, "opacity": 0.55},
            "strip": {"color": line, "opacity": 0.35},
            "name": {"color": soft, "fontSize": font_size},
        },
    }  # fmt: skip
