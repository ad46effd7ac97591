"""Rows and columns out of what a user wrote: conditions, orders, names, and their refusals."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from golf_ray.errors import UsageError
from golf_ray.results.selecting import (
    Condition,
    SortKey,
    chosen,
    fields_named,
    meeting,
    parse_condition,
    parse_names,
    parse_sort,
    require_column,
    sorted_by,
    without_empty,
)


def table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "trial": pd.array([1, 2, 3, 4], dtype="Int64"),
            "status": pd.array(["done", "failed", "done", "running"], dtype="string"),
            "reason": pd.array([None, "loss is Not Finite", "", None], dtype="string"),
            "ttt_bpb": pd.array([1.08, None, 1.07, math.inf], dtype="Float64"),
            "fits": pd.array([True, None, False, True], dtype="boolean"),
            "train.warmdown_frac": pd.array([0.7, 0.72, 0.75, 0.7], dtype="Float64"),
        }
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("status == done", [1, 3]),
        ("status==done", [1, 3]),
        ("status != done", [2, 4]),
        ("status in done,failed", [1, 2, 3]),
        ("status in done, 'failed'", [1, 2, 3]),
        ("status not in done,failed", [4]),
        ("trial in 1, 3,9", [1, 3]),
        ("ttt_bpb < 1.08", [3]),
        ("ttt_bpb <= 1.08", [1, 3]),
        ("ttt_bpb > 1.0", [1, 3, 4]),
        ("ttt_bpb >= inf", [4]),
        ("ttt_bpb != 1.07", [1, 4]),
        ("train.warmdown_frac>=0.72", [2, 3]),
        ("trial < 2.5", [1, 2]),
        ("trial < 99999999999999999999999", [1, 2, 3, 4]),
        ("trial == -1", []),
        ('reason ~ "not finite"', [2]),
        ("reason ~ FINITE", [2]),
        ("reason !~ finite", [3]),
        ('reason == ""', [3]),
        ("reason is missing", [1, 4]),
        ("reason is present", [2, 3]),
        ("reason is not missing", [2, 3]),
        ("fits == true", [1, 4]),
        ("fits != yes", [3]),
        ("fits in true,false", [1, 3, 4]),
        ("  ttt_bpb   is  missing ", [2]),
    ],
)
def test_conditions(text: str, expected: list[int]) -> None:
    frame = table()
    assert frame[meeting(frame, [parse_condition(text)])]["trial"].tolist() == expected


def test_all_of_several_conditions_are_needed() -> None:
    frame = table()
    conditions = [parse_condition(text) for text in ("status == done", "fits == true")]
    assert frame[meeting(frame, conditions)]["trial"].tolist() == [1]
    assert meeting(frame, []).all()


@pytest.mark.parametrize(
    "text",
    [
        "", "status", "status done", "status = done", "status === done", "status ==", "== done",
        "status <> done", "status in", "status in done,", "status in ,done", "status in done,,x",
        "status is", "status is odd", "status == 'done", "status == a,b", "status == done'",
        "ttt_bpb < 1 and trial > 2, 3", "status =~ x", "missing", "is missing",
    ],
)  # fmt: skip
def test_what_is_no_condition_is_told_what_is(text: str) -> None:
    with pytest.raises(UsageError, match="is no condition; write COLUMN, one of == != <"):
        parse_condition(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ttt_bpb < small", "ttt_bpb is a number; use == != <"),
        ("ttt_bpb == nan", "ttt_bpb is a number"),
        ("ttt_bpb ~ 1.0", "ttt_bpb is a number"),
        ("status < done", "status is a text; use =="),
        ("fits == 1", "fits is true or false; use =="),
        ("fits > false", "fits is true or false"),
        ("fits ~ true", "fits is true or false"),
        ("ttt_bbp < 1", "there is no column 'ttt_bbp'; did you mean 'ttt_bpb'?"),
        ("warmdown_frac < 1", "did you mean 'train.warmdown_frac'?"),
        ("__import__('os').system('x') == 0", "there is no column '__import__"),
        ("ttt_bpb < __import__('os')", "is no condition"),
    ],
)
def test_conditions_that_do_not_fit(text: str, expected: str) -> None:
    with pytest.raises(UsageError) as error:
        meeting(table(), [parse_condition(text)])
    assert expected in str(error.value)


NUMBERS = st.one_of(st.none(), st.floats(allow_nan=False), st.integers(-3, 3).map(float))


@given(st.lists(NUMBERS, max_size=8), st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), NUMBERS)
def test_comparisons_are_those_of_numbers(values: list[Any], name: str, value: Any) -> None:
    value = 0.0 if value is None else value
    frame = pd.DataFrame({"x": pd.array(values, dtype="Float64")})
    compare = {
        "==": float.__eq__, "!=": float.__ne__, "<": float.__lt__, "<=": float.__le__,
        ">": float.__gt__, ">=": float.__ge__,
    }[name]  # fmt: skip
    expected = [v is not None and compare(v, value) for v in values]
    assert meeting(frame, [parse_condition(f"x {name} {value!r}")]).tolist() == expected


@given(st.lists(st.text(max_size=3), min_size=1, max_size=4))
def test_quoted_values_are_taken_as_they_are(values: list[str]) -> None:
    kept = [value.replace('"', "'") for value in values]
    found = parse_condition("status in " + ", ".join(f'"{value}"' for value in kept))
    assert found.operator == "in" and found.values == tuple(kept)


@given(st.text(max_size=20))
def test_any_text_is_a_condition_or_one_line(text: str) -> None:
    try:
        assert isinstance(parse_condition(text), Condition)
    except UsageError as error:
        assert "\n" not in str(error)


# Order --------------------------------------------------------------------------------------------

CELLS = {
    "Float64": st.one_of(st.none(), st.sampled_from([0.0, -1.5, 2.0, math.inf, math.nan])),
    "Int64": st.one_of(st.none(), st.sampled_from([0, 1, 2**62, 2**62 + 1])),
    "string": st.one_of(st.none(), st.sampled_from(["", "a", "b", "ä"])),
    "boolean": st.one_of(st.none(), st.booleans()),
}


@st.composite
def tables(draw: st.DrawFn) -> tuple[pd.DataFrame, list[SortKey]]:
    rows = draw(st.integers(0, 6))
    columns: dict[str, Any] = {"row": pd.array(range(rows), dtype="Int64")}
    for i, kind in enumerate(draw(st.lists(st.sampled_from(sorted(CELLS)), max_size=3))):
        values = draw(st.lists(CELLS[kind], min_size=rows, max_size=rows))
        columns[f"c{i}"] = pd.array(values, dtype=kind)
    names = [name for name in columns if name != "row"]
    order = draw(st.permutations(names)) if names else []
    return pd.DataFrame(columns), [SortKey(column=n, descending=draw(st.booleans())) for n in order]


@given(tables())
def test_rows_are_in_order_stable_and_missing_last(drawn: tuple[Any, list[SortKey]]) -> None:
    frame, keys = drawn

    def compare(a: int, b: int) -> int:
        for key in keys:
            x, y = frame[key.column][a], frame[key.column][b]
            if (x is pd.NA) != (y is pd.NA):
                return 1 if x is pd.NA else -1
            if x is not pd.NA and x != y:
                return -1 if (x < y) != key.descending else 1
        return a - b

    expected = sorted(range(len(frame)), key=functools.cmp_to_key(compare))
    assert sorted_by(frame, keys)["row"].tolist() == expected


def test_what_is_no_number_comes_before_what_is_missing_at_no_place_of_its_own() -> None:
    values = pd.arrays.FloatingArray(np.array([math.nan, 1.0, 2.0]), np.zeros(3, dtype=bool))
    frame = pd.DataFrame({"x": values, "row": pd.array([0, 1, 2], dtype="Int64")})
    for text, expected in (("x", [1, 2, 0]), ("-x", [2, 1, 0])):
        assert sorted_by(frame, parse_sort(text))["row"].tolist() == expected


def test_orders_as_they_are_written() -> None:
    assert parse_sort("ttt_bpb, -total_bytes") == (
        SortKey(column="ttt_bpb"),
        SortKey(column="total_bytes", descending=True),
    )
    with pytest.raises(UsageError, match="did you mean 'ttt_bpb'"):
        sorted_by(table(), parse_sort("-tt_bpb"))
    for text in ("", "a,", "-", "a,,b"):
        with pytest.raises(UsageError, match="has an empty name"):
            parse_sort(text)


# Columns ------------------------------------------------------------------------------------------


def test_columns_by_names_and_patterns_each_once_in_the_order_asked_for() -> None:
    columns = list(table().columns)
    assert chosen(columns, parse_names("ttt_bpb, trial,t*", "--columns")) == [
        "ttt_bpb", "trial", "train.warmdown_frac"
    ]  # fmt: skip
    assert chosen(columns, ["*"]) == columns
    assert chosen(columns, ["train.*"]) == ["train.warmdown_frac"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stat", "there is no column 'stat'; did you mean 'status'?"),
        ("*_nats", "there is no column like '*_nats'"),
        ("TTT_BPB", "did you mean 'ttt_bpb'?"),
        ("warmdown_frac", "did you mean 'train.warmdown_frac'?"),
    ],
)
def test_an_unknown_column_names_the_nearest(name: str, expected: str) -> None:
    with pytest.raises(UsageError) as error:
        chosen(list(table().columns), [name])
    assert expected in str(error.value)


def test_a_known_column_is_no_error() -> None:
    require_column("status", ["status"])


def test_fields_of_the_configuration_that_are_asked_for() -> None:
    fields = ["name", "train.seed", "train.muon_lr", "data.dir"]
    columns = ["trial", "train.seed"]
    assert fields_named(["train.*", "trial", "data.dir", "*"], columns, fields) == [
        "train.muon_lr", "data.dir"
    ]  # fmt: skip
    assert fields_named(["*_lr", "tria"], columns, fields) == []


def test_columns_without_a_value_are_left_out() -> None:
    frame = table().assign(artifact=pd.array([None] * 4, dtype="string"))
    assert list(without_empty(frame).columns) == list(table().columns)
    assert list(without_empty(frame[:0]).columns) == list(frame.columns)
