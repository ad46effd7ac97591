"""Files of a run, scores and fingerprints."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from golf_ray import fingerprint
from golf_ray.errors import StorageError
from golf_ray.metric import LN2, Score, total
from golf_ray.records import (
    append_jsonl,
    atomic_path,
    atomic_write_json,
    atomic_write_text,
    make_folder,
    read_jsonl,
)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "record.json"
    atomic_write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("stopped in between")
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["record.json"]
    assert path.stat().st_mode & 0o444 == 0o444


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert read_jsonl(path) == []
    for n in range(3):
        append_jsonl(path, {"n": n, "text": "é"})
    whole = path.read_bytes()
    for cut in range(1, 12):
        path.write_bytes(whole[:-cut])
        kept = [line["n"] for line in read_jsonl(path)]
        assert kept == ([0, 1, 2] if cut == 1 else [0, 1])
    path.write_text('{"n": 0}\nnonsense\n{"n": 2}\n')
    with pytest.raises(StorageError, match="line 2 is not JSON"):
        read_jsonl(path)


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    for write in (
        lambda: atomic_write_text(blocker / "a", "x"),
        lambda: append_jsonl(blocker / "a", {}),
        lambda: make_folder(blocker / "a"),
    ):
        with pytest.raises(StorageError, match="a part of its path is a file"):
            write()
    full = Path("/dev/full")
    if full.exists():
        with pytest.raises(StorageError, match="no space left"):
            append_jsonl(full, {"x": 1})


sums = st.builds(
    Score,
    nats=st.floats(0, 1e9),
    tokens=st.integers(0, 10**9),
    num_bytes=st.integers(0, 10**9),
)


@given(st.lists(sums), st.randoms())
def test_scores_add_up_in_any_order(scores: list[Score], random: object) -> None:
    shuffled = list(scores)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert total(scores) == total(shuffled)


def test_bits_per_byte() -> None:
    score = Score(nats=3 * LN2, tokens=2, num_bytes=6) + Score.zero()
    assert score.bpb == 0.5 and score.loss_nats == pytest.approx(1.5 * LN2)
    assert math.isnan(Score.zero().bpb) and math.isnan(Score.zero().loss_nats)


def test_fingerprints_are_of_the_value(tmp_path: Path) -> None:
    assert fingerprint.of_value({"b": 1, "a": [1.5, None]}) == fingerprint.of_value(
        {"a": [1.5, None], "b": 1}
    )
    assert fingerprint.of_value({"a": 1}) != fingerprint.of_value({"a": 1.5})
    path = tmp_path / "f"
    path.write_bytes(b"abc")
    assert fingerprint.of_file(path) == "ba7816bf8f01cfea"
