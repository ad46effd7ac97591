"""`golf-ray data build` and `data verify` through the command line."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest
from cli_runner import TINY, golf_ray

from golf_ray.data.shards import open_shard, write_shard

TEXT = Path(argparse.__file__)
SMALL = ("--vocab-size", "400", "--val-documents", "1")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    pieces = TEXT.read_text().split("\n\n\n")[:40]
    for i, piece in enumerate(pieces):
        (folder / f"{i:03d}.txt").write_text(piece)
    (folder / "zero.bin").write_bytes(b"\0" * 100)
    return folder


@pytest.fixture(scope="module")
def built(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "data"
    done = golf_ray("data", "build", texts, "--data-dir", out, *SMALL, "--json", "--workers", "1")
    assert done.status == 0 and not done.err, done.err
    report = done.json
    assert report["dataset_dir"] == str(out / "datasets" / "fineweb10B_sp400")
    assert report["val"]["documents"] == 1 and report["train"]["documents"] > 10
    assert sum(report["skipped"].values()) == 1 and report["seconds"] > 0
    return out


def test_what_was_built_is_found_good(built: Path) -> None:
    done = golf_ray("data", "verify", "--data-dir", built, "--json")
    assert done.status == 0 and done.json["ok"] and done.json["val"]["documents"] == 1
    text = golf_ray("data", "verify", "--data-dir", built).out
    assert "1 document, 0 repeated" in text and "PROBLEM" not in text


def test_build_says_what_it_made(texts: Path, tmp_path: Path) -> None:
    done = golf_ray("data", "build", texts, "--data-dir", tmp_path / "d", *SMALL, "--workers", "1")
    assert done.status == 0 and not done.err
    assert "fineweb10B_sp400" in done.out and "400 pieces" in done.out and "skipped" in done.out


def test_verify_finds_what_is_wrong(tmp_path: Path) -> None:
    shutil.copytree(TINY / "datasets", tmp_path / "datasets")
    shutil.copytree(TINY / "tokenizers", tmp_path / "tokenizers")
    val = tmp_path / "datasets" / "fineweb10B_sp512" / "fineweb_val_000000.bin"
    train = val.with_name("fineweb_train_000002.bin")
    write_shard(train, open_shard(val).copy())
    done = golf_ray("data", "verify", "--data-dir", tmp_path, "--json")
    assert done.status == 1 and not done.json["ok"]
    assert "is training document" in done.error
    assert "PROBLEM" in golf_ray("data", "verify", "--data-dir", tmp_path).out


@pytest.mark.parametrize(
    ("argv", "status", "expected"),
    [
        (["build", "no-such-folder"], 1, "no file or folder no-such-folder"),
        (["build", TEXT, "--vocab-size", "99999"], 1, "99999"),
        (["build", TEXT, "--val-documents", "1", "--val-fraction", "0.5"], 2, "give one of them"),
        (["build"], 2, "Missing argument"),
        (["verify", "--data-dir", "no-such-folder"], 2, "holds no data set"),
        (["verify", "--vocab-size", "7"], 1, "no file fineweb_"),
        (["fetch"], 2, "--repo"),
        (["fetch", "--repo", "a/b", "--variant", "gpt2"], 2, "variant 'gpt2'"),
        (
            ["fetch", "--repo", "a/b", "--endpoint", "http://127.0.0.1:9", "--train-shards", "0"],
            1,
            "http://127.0.0.1:9 cannot be reached",
        ),
    ],
)
def test_wrong_use_and_bad_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[object], status: int, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = golf_ray("data", *argv)
    assert done.status == status and expected in done.error
    assert not list(tmp_path.rglob("*"))


def test_a_folder_without_text(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    done = golf_ray("data", "build", tmp_path / "texts", "--data-dir", tmp_path / "data")
    assert done.status == 1 and "no" in done.error and not (tmp_path / "data").exists()
