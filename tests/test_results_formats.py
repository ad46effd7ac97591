"""Tables as files: every format read back is the table, whatever its texts and numbers are."""

from __future__ import annotations

import io
import json
import math
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from golf_ray.errors import StorageError, UsageError
from golf_ray.results.cells import digits_beside, number, one_line, shown
from golf_ray.results.describing import described, known_types, normalised
from golf_ray.results.formats import (
    FOR_PEOPLE,
    FORMATS,
    format_of,
    read_csv,
    read_json,
    read_parquet,
    to_bytes,
    to_csv,
    to_parquet,
)
from golf_ray.results.schema import DOCUMENTS, IDENTITY, INTERVALS, MEASURES, SCHEMA

READERS: dict[str, Any] = {"csv": read_csv, "json": read_json, "parquet": read_parquet}
ODD = (
    "", " ", "  both  ", "NaN", "None", "null", "<NA>", "nan", "inf", "true", "0", "-", "--", "---",
    'say "no"', "it's", "``", "''", "a,b", ",,", "a|b", "\\", "\\|", "|\\", "\\\\", "a\nb", "\r\n",
    "\r", "\t", "\0", "\x1b[31m", "<b>", "</td>", "&amp;", "&", "&#32;", "%", "$x$", "#1", "{}",
    "[a](b)", "[1]", "*a*", "_a_", "a_b", "__", "~~a~~", "^", "`x`", "!", "?`", "# a", "1. a",
    "\u202e", "\u2028", "\x85", "\xa0", "\ufeff", "ä", "日本", "🙂", "e\u0301", "http://a.b",
    "\\textbackslash{}", "\\begin{x}", "{ }", "<!--", "<br>", "@a", ":a:", "\\_",
)  # fmt: skip
TEXTS = st.one_of(
    st.sampled_from(ODD),
    st.lists(st.sampled_from(ODD), max_size=4).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)
INT64 = st.integers(-(2**63), 2**63 - 1)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "string": TEXTS,
    "Int64": st.one_of(st.integers(-9, 9), INT64),
    "Float64": st.floats(),
    "boolean": st.booleans(),
}


def array(values: list[Any], kind: str) -> Any:
    """A column in which a number that is none is not missing."""
    if kind == "string":
        return pd.array(values, dtype="string")
    missing = np.array([v is None for v in values], dtype=bool)
    plain = [0 if v is None else v for v in values]
    if kind == "Float64":
        return pd.arrays.FloatingArray(np.array(plain, dtype=np.float64), missing)
    if kind == "Int64":
        return pd.arrays.IntegerArray(np.array(plain, dtype=np.int64), missing)
    return pd.arrays.BooleanArray(np.array(plain, dtype=np.bool_), missing)


@st.composite
def frames(draw: st.DrawFn) -> pd.DataFrame:
    """Any table; names of the schema among others, which keep their types."""
    own = st.sampled_from([(c.name, c.type) for c in (*IDENTITY, *MEASURES)])
    other = st.tuples(TEXTS.filter(bool), st.sampled_from(sorted(VALUES)))
    pairs = draw(st.lists(st.one_of(own, other), min_size=1, max_size=5, unique_by=lambda p: p[0]))
    rows = draw(st.integers(0, 3))
    columns = {}
    for name, kind in pairs:
        kind = known_types().get(name, kind)
        cell = st.one_of(st.none(), VALUES[kind])
        columns[name] = array(draw(st.lists(cell, min_size=rows, max_size=rows)), kind)
    return pd.DataFrame(columns)


def plain(frame: pd.DataFrame) -> dict[str, tuple[str, list[Any]]]:
    """Types and values, with numbers that are none apart from missing ones."""
    found = {}
    for name in frame.columns:
        column = frame[name]
        values = [None if v is pd.NA else v for v in column.astype(object)]
        # The text tells -0.0 from 0.0, and one NaN from no other.
        found[name] = (str(column.dtype), [v if isinstance(v, str) else repr(v) for v in values])
    return found


# Programs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(READERS))
@given(frame=frames())
def test_formats_for_programs_give_the_frame_back(name: str, frame: pd.DataFrame) -> None:
    data = to_bytes(frame, described(frame), name)
    types = {column.name: column.type for column in described(frame)}
    again = read_csv(data, types) if name == "csv" else READERS[name](data)
    assert plain(again) == plain(frame)


def trials() -> pd.DataFrame:
    """A table of the schema's own columns and a knob."""
    columns: dict[str, Any] = {c.name: array([None] * 3, c.type) for c in IDENTITY}
    columns["train.warmdown_frac"] = array([0.72, 0.75, 1.0], "Float64")
    columns["adaptation.chunk_size"] = array([32, 48, None], "Int64")
    columns.update({c.name: array([None] * 3, c.type) for c in MEASURES})
    columns["trial"] = array([1, 2, 3], "Int64")
    columns["status"] = array(["done", "failed", "over_limit"], "string")
    columns["reason"] = array([None, "loss is not finite: <nan>", ""], "string")
    columns["ttt_bpb"] = array([1.0733638766666667, math.nan, None], "Float64")
    columns["ttt_standard_error_bpb"] = array([0.0021, None, None], "Float64")
    columns["total_bytes"] = array([15_951_328, None, 16_400_000], "Int64")
    columns["fits"] = array([True, None, False], "boolean")
    return pd.DataFrame(columns)


def test_a_csv_of_trials_needs_no_types_to_be_read() -> None:
    frame = trials()
    assert plain(read_csv(to_csv(frame))) == plain(frame)


def test_a_csv_tells_a_missing_text_from_an_empty_one() -> None:
    frame = pd.DataFrame({"reason": array(["", None, "x"], "string"), "trial": [1, 2, 3]})
    assert to_csv(frame) == b'"reason","trial"\n"",1\n,2\n"x",3\n'
    # Tools that know no such thing have both as missing, and all numbers right.
    others = pd.read_csv(io.BytesIO(to_csv(trials())))
    assert others["total_bytes"].tolist()[::2] == [15_951_328, 16_400_000]
    assert others["ttt_bpb"][0] == 1.0733638766666667


def test_columns_that_nobody_knows_get_a_type_that_fits() -> None:
    data = b'a,b,c,d,e\n1,1,true,x,\n,2.5,false,"",\n'
    assert {n: kind for n, (kind, _) in plain(read_csv(data)).items()} == {
        "a": "Int64", "b": "Float64", "c": "boolean", "d": "string", "e": "string"
    }  # fmt: skip


def test_parquet_has_types_for_all_readers_and_texts_for_people() -> None:
    frame = trials()
    data = to_parquet(frame, described(frame), "trials")
    schema = pyarrow.parquet.read_schema(io.BytesIO(data))
    assert schema.metadata[b"golf_ray.schema"] == str(SCHEMA).encode()
    texts = {field.name: field.metadata[b"text"].decode() for field in schema}
    assert texts["steps"] == "steps trained" and texts["train.warmdown_frac"]
    again = pd.read_parquet(io.BytesIO(data))
    assert {n: str(t) for n, t in again.dtypes.items()} == {
        n: str(t) for n, t in frame.dtypes.items()
    }


def test_json_says_what_its_columns_are() -> None:
    frame = trials()[["trial", "ttt_bpb", "reason"]]
    frame["val_bpb"] = array([math.inf, -math.inf, 1.0], "Float64")
    found = json.loads(to_bytes(frame, described(frame), "json"))
    assert found["schema"] == SCHEMA and found["table"] == "trials"
    assert found["columns"][0] == {
        "name": "trial", "type": "Int64", "text": "number in its sweep, from 1"
    }  # fmt: skip
    assert found["rows"][1] == {
        "trial": 2, "ttt_bpb": "NaN", "reason": "loss is not finite: <nan>", "val_bpb": "-Infinity"
    }  # fmt: skip
    assert found["rows"][2]["ttt_bpb"] is None and found["rows"][2]["reason"] == ""


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("csv", b""),
        ("csv", b"trial,status\n1\n"),
        ("csv", b"trial\nmany\n"),
        ("json", b"{"),
        ("json", b"[]"),
        ("json", b'{"columns": [{"name": "trial", "type": "Int64"}], "rows": [{"trial": 1.5}]}'),
        ("json", b'{"columns": [{"name": "trial", "type": "Int64"}], "rows": [{}]}'),
        ("parquet", b"PAR1"),
    ],
)
def test_a_damaged_file_is_one_line(name: str, data: bytes) -> None:
    with pytest.raises(StorageError) as error:
        READERS[name](data)
    assert "\n" not in str(error.value)


def test_a_parquet_of_another_program_is_one_line() -> None:
    buffer = io.BytesIO()
    pd.DataFrame({"a": [1]}).to_parquet(buffer)
    with pytest.raises(StorageError):
        read_parquet(buffer.getvalue())


def test_formats_by_the_ending_of_a_name() -> None:
    assert [format_of(f"a/b.c{e}") for e in (".CSV", ".tex", ".htm")] == ["csv", "latex", "html"]
    with pytest.raises(UsageError, match=r"ending of 'a\.xlsx' is of no format"):
        format_of("a.xlsx")


def test_columns_of_one_name_are_of_one_type_in_all_tables() -> None:
    found: dict[str, set[str]] = {}
    for column in (*IDENTITY, *MEASURES, *INTERVALS, *DOCUMENTS):
        found.setdefault(column.name, set()).add(column.type)
    assert not {name for name, kinds in found.items() if len(kinds) > 1}


@given(frames())
def test_nullable_tables_are_normal(frame: pd.DataFrame) -> None:
    assert plain(normalised(frame)) == plain(frame)


def test_other_types_become_nullable_ones() -> None:
    frame = pd.DataFrame(
        {
            "i": np.array([1, 2], dtype=np.int32), "f": [1.0, math.nan], "b": [True, False],
            "o": [None, 3], "l": [["a", "b"], None], "c": pd.Categorical(["x", None]),
            "s": ["", None],
        }
    )  # fmt: skip
    assert plain(normalised(frame)) == {
        "i": ("Int64", ["1", "2"]), "f": ("Float64", ["1.0", "None"]),
        "b": ("boolean", ["True", "False"]), "o": ("Float64", ["None", "3.0"]),
        "l": ("string", ["a b", "None"]), "c": ("string", ["x", "None"]),
        "s": ("string", ["", "None"]),
    }  # fmt: skip


# People -------------------------------------------------------------------------------------------


def read_markdown(text: str) -> list[list[str]]:
    """Cells as a parser of CommonMark with tables has them: text and nothing else."""
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    tokens = parser.parse(text)
    assert [t.type for t in tokens if t.level == 0] == ["table_open", "table_close"]
    rows: list[list[str]] = []
    for token in tokens:
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline":
            assert {child.type for child in token.children or []} <= {"text"}
            rows[-1].append("".join(child.content for child in token.children or []))
    return rows


class _Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()
        self.inside = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def read_html(text: str) -> list[list[str]]:
    """Cells as a parser of HTML has them."""
    cells = _Cells()
    cells.feed(text)
    cells.close()
    assert cells.tags == {
        "html", "head", "meta", "title", "style", "body", "div", "table", "caption", "thead", "tr",
        "th", "tbody", *(["td"] if len(cells.rows) > 1 else []),
    }  # fmt: skip
    return cells.rows


LATEX = {
    r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^",
    r"\textless{}": "<", r"\textgreater{}": ">", r"\textbar{}": "|", "{[}": "[", "{*}": "*",
    "{ }": " ", "-{}": "-", "`{}": "`", "'{}": "'", ",{}": ",",
    **{f"\\{c}": c for c in "&%$#_{}"},
}  # fmt: skip
LATEX_TOKEN = re.compile("|".join(map(re.escape, LATEX)) + r"|[^\\~^<>|\[*&%$#_{}\n]")


def read_latex(text: str) -> list[list[str]]:
    """Cells of a tabular as LaTeX has them; anything that is no text is an error."""
    body = text.split("\\toprule\n")[1].split("\\bottomrule\n")[0].replace("\\midrule\n", "")
    rows = []
    for line in body.removesuffix("\n").split("\n"):
        assert line.endswith(" \\\\") and "--" not in line and "``" not in line, line
        cells = re.split(r"(?<!\\)&", " " + line.removesuffix("\\\\"))
        # LaTeX drops blanks around a cell.
        rows.append([_latex_text(cell.strip(" ")) for cell in cells])
    return rows


def _latex_text(cell: str) -> str:
    tokens = LATEX_TOKEN.findall(cell)
    assert "".join(tokens) == cell, cell
    assert "  " not in cell, "LaTeX would make one blank of it"
    return "".join(LATEX.get(token, token) for token in tokens)


PEOPLE: dict[str, Any] = {"md": read_markdown, "latex": read_latex, "html": read_html}


@pytest.mark.parametrize("name", FOR_PEOPLE)
@given(frame=frames())
@example(frame=pd.DataFrame({text or "x": array([text], "string") for text in ODD}))
def test_formats_for_people_give_the_cells_back(name: str, frame: pd.DataFrame) -> None:
    columns = described(frame)
    cells = shown(frame, columns)
    found = PEOPLE[name](to_bytes(frame, columns, name, title="<a> & b").decode())
    heads = [one_line(column.name) for column in columns]
    assert found == [heads, *map(list, zip(*cells, strict=True))]


@given(TEXTS)
def test_a_cell_is_a_line_that_controls_no_terminal(text: str) -> None:
    cell = one_line(text)
    assert cell.isprintable() and len(cell.splitlines()) <= 1
    assert cell == text or not text.isprintable()


@given(frames())
def test_cells_of_numbers_are_the_numbers_at_the_digits_shown(frame: pd.DataFrame) -> None:
    columns = described(frame)
    for column, cells in zip(columns, shown(frame, columns), strict=True):
        if column.type not in ("Int64", "Float64"):
            continue
        for row, (cell, value) in enumerate(zip(cells, frame[column.name], strict=True)):
            if value is pd.NA:
                assert cell == ""
            elif column.type == "Int64":
                assert int(cell.replace(",", "")) == value
            elif column.digits is None or not math.isfinite(value):
                assert repr(float(cell)) == repr(float(value))
            else:
                half = 0.5 * 10.0 ** -_digits(frame, column.name, row, column.digits)
                # What would be rounded to 0 has two digits.
                small = abs(value) < half
                assert abs(float(cell) - value) <= (abs(value) / 19 if small else half * 1.000001)


def _digits(frame: pd.DataFrame, name: str, row: int, digits: int) -> int:
    beside = "ttt_standard_error_bpb"
    if name not in ("ttt_bpb", beside) or beside not in frame or frame[beside][row] is pd.NA:
        return digits
    return digits_beside(frame[beside][row], digits)


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [
        (1.07336388, 5, "1.07336"), (0.72, None, "0.72"), (1e-05, None, "1e-05"),
        (20.0, None, "20.0"), (587.04, 1, "587.0"), (3e-7, 5, "3.0e-07"), (0.0, 5, "0.00000"),
        (-0.0, 1, "0.0"), (math.nan, 5, "NaN"), (-math.inf, None, "-inf"), (1e300, 1, "1e+300"),
        (7_990_000.4, 0, "7990000"),
    ],
)  # fmt: skip
def test_numbers_for_people(value: float, digits: int | None, expected: str) -> None:
    assert number(value, digits) == expected


@pytest.mark.parametrize(
    ("error", "digits"),
    [(0.0021, 4), (0.00075, 5), (0.00095, 5), (0.0123, 3), (0.5, 2), (30.0, 0), (1e-9, 5),
     (0.0, 5), (math.nan, 5)],
)  # fmt: skip
def test_digits_end_with_the_second_of_the_error(error: float, digits: int) -> None:
    assert digits_beside(error, 5) == digits


def test_cells_of_trials() -> None:
    frame = trials()
    columns = described(frame)
    cells = dict(zip(frame.columns, shown(frame, columns), strict=True))
    assert cells["ttt_bpb"] == ["1.0734", "NaN", ""]
    assert cells["ttt_standard_error_bpb"] == ["0.0021", "", ""]
    assert cells["total_bytes"] == ["15,951,328", "", "16,400,000"]
    assert cells["fits"] == ["yes", "", "no"]
    assert cells["trial"] == ["1", "2", "3"]
    assert cells["train.warmdown_frac"] == ["0.72", "0.75", "1.0"]


def test_html_is_one_document_that_needs_nothing_else() -> None:
    frame = trials()
    text = to_bytes(frame, described(frame), "html", title="Trials of nightly").decode()
    assert "<title>Trials of nightly</title>" in text
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"<script|<link|<img|src=|href=|url\(|@import|https?:", text)
    assert text.count('<tr class="failed">') == 1 and text.count('<tr class="over">') == 1
    assert 'title="steps trained"' in text


def test_a_tabular_has_a_column_a_column() -> None:
    frame = trials()[["trial", "status", "ttt_bpb"]]
    lines = to_bytes(frame, described(frame), "latex").decode().splitlines()
    assert lines[:4] == [
        r"% \usepackage{booktabs}", r"\begin{tabular}{rlr}", r"\toprule",
        r"trial & status & ttt\_bpb \\",
    ]  # fmt: skip
    assert lines[-2:] == [r"\bottomrule", r"\end{tabular}"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_table_without_rows_is_a_table(name: str) -> None:
    frame = trials()[:0]
    data = to_bytes(frame, described(frame), name)
    if name in READERS:
        assert plain(READERS[name](data)) == plain(frame)
    else:
        assert len(PEOPLE[name](data.decode())) == 1
