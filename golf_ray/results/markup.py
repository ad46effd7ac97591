"""Tables for people as text: Markdown, LaTeX and HTML, from cells that are written already.

- Markdown: a table as GitHub has them, in plain CommonMark otherwise.
- LaTeX: a `tabular` with the rules of `booktabs`. Texts beyond Latin need LuaLaTeX or XeLaTeX.
- HTML: one document, which needs nothing else: no scripts, no network; light and dark.

Invariant: a reader of the format gets every cell's text back, and no cell can be taken for markup.
Cells are one line each (`golf_ray.results.cells`).
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from typing import Final

from golf_ray.results.cells import is_number, one_line
from golf_ray.results.schema import Column

Cells = Sequence[Sequence[str]]
"""By column."""

_MARKDOWN = re.compile(r"[\\`*\[\]<>|~$&]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])")
_LATEX: Final = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "-": "-{}",
    "`": "`{}",
    "'": "'{}",
    ",": ",{}",
    # After the end of a line these would begin an argument of it.
    "[": "{[}",
    "*": "{*}",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}
# Of those that join with a neighbour, only the first of two needs to be kept apart.
_LATEX_SPECIAL = re.compile(r"[\\~^<>|\[*&%$#_{}]|-(?=-)|`(?=`)|'(?=')|,(?=,)|(?<=[?!])`")
_OUTER_BLANKS = re.compile(r"^ +| +$| {2,}")


def to_markdown(cells: Cells, columns: Sequence[Column]) -> str:
    """A table in Markdown."""
    heads = [_markdown(one_line(column.name)) for column in columns]
    rules = ["---:" if is_number(column) else "---" for column in columns]
    body = _escaped(cells, columns, _markdown)
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join(rules)}|"]
    lines += [f"| {' | '.join(row)} |" for row in zip(*body, strict=True)]
    return "\n".join(lines) + "\n"


def to_latex(cells: Cells, columns: Sequence[Column]) -> str:
    """A table in LaTeX."""
    heads = [_latex(one_line(column.name)) for column in columns]
    layout = "".join("r" if is_number(column) else "l" for column in columns)
    body = _escaped(cells, columns, _latex)
    lines = [
        r"% \usepackage{booktabs}",
        rf"\begin{{tabular}}{{{layout}}}",
        r"\toprule",
        f"{' & '.join(heads)} \\\\",
        r"\midrule",
        *(f"{' & '.join(row)} \\\\" for row in zip(*body, strict=True)),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def to_html(cells: Cells, columns: Sequence[Column], title: str) -> str:
    """A table as a document of its own.

    Rows of trials that failed or are over a limit are marked.
    """
    places = [column.name for column in columns]
    heads = "".join(
        f'<th scope="col"{_side(column)} title="{html.escape(column.text)}">'
        f"{html.escape(one_line(column.name))}</th>"
        for column in columns
    )
    tags = [f"<td{_side(column)}>" for column in columns]
    body = [
        [f"{tag}{cell}</td>" for cell in column]
        for tag, column in zip(tags, _escaped(cells, columns, html.escape), strict=True)
    ]
    rows = list(map("".join, zip(*body, strict=True)))
    marks = [""] * len(rows)
    if "status" in places:
        marks = [_MARKS.get(status, "") for status in cells[places.index("status")]]
    lines = "\n".join(f"<tr{mark}>{row}</tr>" for mark, row in zip(marks, rows, strict=True))
    name = html.escape(title)
    return _PAGE.format(title=name, style=_STYLE, heads=heads, rows=lines)


def _escaped(
    cells: Cells, columns: Sequence[Column], escape: Callable[[str], str]
) -> list[Sequence[str]]:
    # Numbers have nothing to escape.
    return [
        list(map(escape, own)) if column.type == "string" else own
        for own, column in zip(cells, columns, strict=True)
    ]


def _markdown(text: str) -> str:
    text = _MARKDOWN.sub(r"\\\g<0>", text)
    if "  " in text or text[:1] == " " or text[-1:] == " ":
        text = _OUTER_BLANKS.sub(lambda found: "&#32;" * len(found[0]), text)
    return text


def _latex(text: str) -> str:
    blanks = "  " in text or text[:1] == " " or text[-1:] == " "
    text = _LATEX_SPECIAL.sub(lambda found: _LATEX[found[0]], text)
    if blanks:
        text = _OUTER_BLANKS.sub(lambda found: "{ }" * len(found[0]), text)
    return text


def _side(column: Column) -> str:
    return ' class="number"' if is_number(column) else ""


_MARKS: Final = {"failed": ' class="failed"', "over_limit": ' class="over"'}

_STYLE = """
:root { color-scheme: light dark; --text: #1d2229; --page: #ffffff; --line: #d5dae1;
  --head: #f0f2f5; --failed: #a4262c; --over: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e7eb; --page: #15181d; --line: #363c45;
  --head: #20252c; --failed: #ff8f94; --over: #f0b95a; } }
body { margin: 1rem; font: 14px/1.4 system-ui, sans-serif; color: var(--text);
  background: var(--page); }
div { overflow: auto; max-height: 95vh; }
table { border-collapse: collapse; width: max-content; }
caption { text-align: left; font-weight: 600; padding: 0 0 .5rem; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; white-space: pre-wrap; overflow-wrap: anywhere; max-width: 48ch; }
th { position: sticky; top: 0; background: var(--head); white-space: pre; max-width: none; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: pre; }
.failed td { color: var(--failed); }
.over td { color: var(--over); }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<div role="region" aria-label="{title}" tabindex="0">
<table>
<caption>{title}</caption>
<thead>
<tr>{heads}</tr>
</thead>
<tbody>
{rows}
</tbody>
</table>
</div>
</body>
</html>
"""
