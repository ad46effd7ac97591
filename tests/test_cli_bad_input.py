"""What a user gives and cannot be used: one line, status 1 or 2, nothing half-written."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_runner import TINY, UPSTREAM, golf_ray, subprocess_environment

from golf_ray.data.shards import write_shard
from golf_ray.model.checkpoint import read_state, save_state
from golf_ray.presets import TINY as TINY_PRESET

FULL = TINY / "final_model.pt"
CONFIG = ("--upstream-config", TINY / "config.json", "--data-dir")
VAL = "datasets/fineweb10B_sp512/fineweb_val_000000.bin"
TRAIN = "datasets/fineweb10B_sp512/fineweb_train_000000.bin"
TOKENIZER = "tokenizers/fineweb_512_bpe.model"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A copy of the tiny data that may be damaged."""
    for name in ("datasets", "tokenizers"):
        shutil.copytree(TINY / name, tmp_path / "data" / name)
    return tmp_path / "data"


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with open(path, "rb+") as file:
        file.seek(offset)
        file.write(content)


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "truncated": (VAL, lambda p: p.write_bytes(p.read_bytes()[:-7]), "its header's 883 tokens"),
    "header cut": (VAL, lambda p: p.write_bytes(p.read_bytes()[:100]), "fewer than its header"),
    "wrong magic": (VAL, lambda p: overwrite(p, 0, b"\1\2\3\4"), "it is no token shard"),
    "wrong version": (VAL, lambda p: overwrite(p, 4, b"\7\0\0\0"), "is of version 7"),
    "token id": (VAL, lambda p: overwrite(p, 1024 + 20, b"\0\2"), "holds token id 512 at position"),
    "no document": (VAL, lambda p: write_shard(p, np.full(300, 9)), "none of them is BOS"),
    "no token": (VAL, lambda p: write_shard(p, []), "there is not one token"),
    "no shard": (VAL, lambda p: p.unlink(), "no file fineweb_val_*.bin"),
    "no tokenizer": (TOKENIZER, lambda p: p.unlink(), "no tokenizer"),
    "no such tokenizer": (TOKENIZER, lambda p: p.write_bytes(b"x"), "is no SentencePiece model"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_data(data: Path, name: str) -> None:
    file, damage, expected = DAMAGES[name]
    damage(data / file)
    done = golf_ray("eval", FULL, *CONFIG, data, "--method", "ttt", "--json")
    assert done.status == 1 and not done.out
    assert expected in done.error
    assert name == "no document" or file.rpartition("/")[2][:11] in done.error


@pytest.mark.parametrize("verb", ["quantize", "train"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"\1\2\3\4", "it is no token shard"), (None, "holds token id 600 at position")],
)
def test_damaged_training_data(
    data: Path, tmp_path: Path, verb: str, content: bytes | None, expected: str
) -> None:
    if content is None:
        write_shard(data / TRAIN, np.r_[1, np.full(40_000, 600)])
    else:
        overwrite(data / TRAIN, 0, content)
    if verb == "quantize":
        argv = ["quantize", FULL, *CONFIG, data, "--out", tmp_path / "a.ptz"]
    else:
        argv = ["train", "--preset", "tiny", "--data-dir", data, "--in-process",
                "--run-dir", tmp_path / "run"]  # fmt: skip
    done = golf_ray(*argv)
    assert done.status == 1 and expected in done.error and "fineweb_train_000000" in done.error
    assert not list(tmp_path.glob("a.*")) and not list(tmp_path.rglob("*.tmp"))


def test_tokenizer_of_another_vocabulary(data: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["several words of a text that is small"] * 20),
        model_prefix=str(data / "other"), vocab_size=300, model_type="bpe", byte_fallback=True,
        minloglevel=2,
    )  # fmt: skip
    shutil.move(data / "other.model", data / TOKENIZER)
    done = golf_ray("eval", FULL, *CONFIG, data)
    assert done.status == 1 and "has 300 pieces, but model.vocab_size is 512" in done.error


def changed(tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    state, _ = read_state(FULL)
    change(state)
    torch.save(state, tmp_path / "changed.pt")
    return tmp_path / "changed.pt"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda s: s.update({"smear.weight": torch.zeros(3, 4)}),
            "does not know: 'smear.weight' [3, 4]",
        ),
        (lambda s: s.pop("qo_bank"), "lacks the tensor 'qo_bank' [12, 64, 64]"),
        (
            lambda s: s.update({"qo_bank": torch.zeros(12, 64, 60)}),
            "'qo_bank' has shape [12, 64, 60], the configuration asks for [12, 64, 64]",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], expected: str
) -> None:
    done = golf_ray("eval", changed(tmp_path, change), *UPSTREAM)
    assert done.status == 1 and expected in done.error


def test_an_artifact_that_does_not_fit() -> None:
    argv = ["--set", "model.mlp_mult=2"]
    done = golf_ray("eval", TINY / "final_model.int6.ptz", *UPSTREAM, *argv)
    assert done.status == 1
    assert "[192, 64]" in done.error and "[128, 64]" in done.error and "mlp" in done.error


class Evil:
    """Runs code where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.marker,))


def test_a_pickle_that_would_run_code_is_refused_and_nothing_ran(tmp_path: Path) -> None:
    import brotli

    from golf_ray.quantization.container import shuffle_bytes

    marker, files = tmp_path / "ran", []
    for name, legacy in (("a.pt", False), ("b.pt", True)):
        torch.save({"qo_bank": Evil(marker)}, tmp_path / name,
                   _use_new_zipfile_serialization=not legacy)  # fmt: skip
        files.append(tmp_path / name)
    (tmp_path / "c.pt").write_bytes(pickle.dumps(Evil(marker)))
    torch.save({"w": Evil(marker), "m": {}}, tmp_path / "inner")
    packed = brotli.compress(shuffle_bytes((tmp_path / "inner").read_bytes()), quality=1)
    (tmp_path / "d.ptz").write_bytes(packed)
    for file in (*files, tmp_path / "c.pt", tmp_path / "d.ptz"):
        done = golf_ray("eval", file, *UPSTREAM)
        assert done.status == 1 and str(file) in done.error, file
        assert not marker.exists(), file


@pytest.mark.parametrize("suffix", [".pt", ".ptz"])
@pytest.mark.parametrize(
    "content", [b"", b"hello", b"PK\3\4 broken", pickle.dumps([1, 2]), b"\x80\x02 no pickle"]
)
def test_files_that_are_something_else(tmp_path: Path, suffix: str, content: bytes) -> None:
    file = tmp_path / f"file{suffix}"
    file.write_bytes(content)
    done = golf_ray("eval", file, *UPSTREAM)
    assert done.status == 1 and str(file) in done.error


def test_a_carried_configuration_that_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_state(path, read_state(FULL)[0], TINY_PRESET)
    broken = tmp_path / "b.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(broken, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, b"{}}" if name.endswith(".json") else content)
    done = golf_ray("eval", broken)
    assert done.status in (1, 2) and "is not JSON" in done.error


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["eval", "no/such.pt", *UPSTREAM], "no/such.pt"),
        (["eval", "no/such.ptz", *UPSTREAM], "no/such.ptz cannot be read"),
        (["eval", FULL, *CONFIG, "no-data"], "no tokenizer no-data/tokenizers/"),
        (["eval", FULL, *UPSTREAM, "--method", "ttt", "--adapter-init", "a.npz"], "a.npz cannot"),
        (["eval", FULL, *UPSTREAM, "--method", "ttt", "--adapter-init", FULL], "adapter file"),
        (
            ["eval", FULL, *UPSTREAM, "--method", "ttt", "--adapter-init", TINY / "ttt.npz",
             "--set", "adaptation.rank=5"],
            "has no array A_rank5_in64",
        ),
        (["eval", FULL, *UPSTREAM, "--set", "evaluation.seq_len=4096",
          "--set", "evaluation.batch_tokens=4096"], "fewer than the 4097 of one sequence"),
    ],
)  # fmt: skip
def test_files_that_are_not_there_or_too_small(argv: list[object], expected: str) -> None:
    done = golf_ray(*argv)
    assert done.status == 1 and expected in done.error


# A file in the place of a folder stops every user, also root.


@pytest.mark.parametrize(
    "argv",
    [
        ["quantize", FULL, *UPSTREAM, "--out", "{file}/a.ptz"],
        ["eval", FULL, *UPSTREAM, "--quantize", "--artifact", "{file}/a.ptz"],
        ["eval", FULL, *UPSTREAM, "--method", "ttt", "--per-document", "{file}/a.jsonl"],
        ["train", "--preset", "tiny", "--data-dir", TINY, "--in-process", "--run-dir", "{file}/r"],
        ["data", "build", TINY / "config.json", "--data-dir", "{file}/data"],
    ],
)
def test_a_folder_that_cannot_be_written(tmp_path: Path, argv: list[object]) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    done = golf_ray(*(str(a).replace("{file}", str(file)) for a in argv))
    assert done.status == 1 and str(file) in done.error
    assert file.read_text() == "kept" and list(tmp_path.iterdir()) == [file]


SMALL_DISK = """
mount -t tmpfs -o size={size} tmpfs {place} || exit 99
"$@"
status=$?
find {place} -type f > {listing}
exit $status
"""


def on_small_disk(tmp_path: Path, size: str, *argv: object) -> tuple[str, list[str]]:
    """The one line of a command that finds no space, and the files that it leaves there."""
    place, listing = tmp_path / "disk", tmp_path / "listing"
    place.mkdir()
    script = SMALL_DISK.format(size=size, place=place, listing=listing)
    command = [str(a).replace("{disk}", str(place)) for a in argv]
    program = ["sh", "-c", script, "sh", sys.executable, "-m", "golf_ray", *command]
    # Root has the right to mount; others have it in a namespace of their own, where allowed.
    for prefix in (["unshare", "-m"], ["unshare", "-Urm"]):
        try:
            done = subprocess.run(
                [*prefix, *program], capture_output=True, text=True, timeout=120, check=False,
                env=subprocess_environment(),
            )  # fmt: skip
        except FileNotFoundError:
            continue
        if listing.exists():
            assert done.returncode == 1 and not done.stdout, (done.stdout, done.stderr)
            assert done.stderr.count("\n") == 1, done.stderr
            return done.stderr, [str(Path(p).relative_to(place))
                                 for p in listing.read_text().splitlines()]  # fmt: skip
    pytest.skip("no small file system can be mounted here")


def test_no_space_for_an_artifact(tmp_path: Path) -> None:
    argv = ["quantize", FULL, *UPSTREAM, "--set", "quantization.float16_max_numel=0"]
    line, left = on_small_disk(tmp_path, "64k", *argv, "--out", "{disk}/a.ptz")
    assert "no space left to write" in line and "a.ptz" in line and left == []


def test_no_space_for_a_checkpoint(tmp_path: Path) -> None:
    argv = ["train", "--preset", "tiny", "--data-dir", TINY, "--in-process", "--run-dir",
            "{disk}/run", "--set", "train.iterations=1"]  # fmt: skip
    line, left = on_small_disk(tmp_path, "2m", *argv)
    assert "no space left to write" in line and "step_00000001" in line
    assert sorted(left) == ["run/config.json", "run/intervals.jsonl"]
