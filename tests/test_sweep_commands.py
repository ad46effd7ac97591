"""Commands that people are told to go on with lead back to the sweep that they were told of."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from cli_runner import golf_ray
from results_made import make_sweep

from golf_ray.sweeps import DEFAULT_STORAGE
from golf_ray.sweeps.commands import command


@pytest.mark.parametrize("storage", [DEFAULT_STORAGE, "kept", "a folder/with blanks", "."])
def test_what_status_tells_is_understood_where_it_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str
) -> None:
    make_sweep(tmp_path / storage, "nightly", num_trials=4, num_documents=0)
    monkeypatch.chdir(tmp_path)
    out = golf_ray("status", "nightly", "--storage", storage).out
    told = shlex.split(out.partition("go on with:")[2])[1:]
    assert told[:3] == ["sweep", "--resume", "nightly"]
    assert ("--storage" in told) == (storage != DEFAULT_STORAGE)
    assert golf_ray("show", "nightly", *told[3:]).out.startswith("nightly: sweep, interrupted")


def test_no_key_of_a_storage_is_told() -> None:
    told = command("confirm", "best of all", "s3://me:secret@bucket/golf?region=eu", "--top 1")
    place = "'s3://KEY:SECRET@bucket/golf?region=eu'"
    assert told == f"golf-ray confirm 'best of all' --top 1 --storage {place}"


@pytest.mark.parametrize("option", ["--trials=9", "--seed=1", "--set=train.seed=2", "--prune"])
def test_what_would_change_a_sweep_is_refused_when_it_goes_on(tmp_path: Path, option: str) -> None:
    make_sweep(tmp_path, "nightly", num_trials=4, num_documents=0)
    done = golf_ray("sweep", "--resume", "nightly", "--storage", tmp_path, option)
    name = option.partition("=")[0]
    assert done.status == 2 and f"{name} cannot be given with --resume" in done.error
