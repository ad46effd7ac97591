"""Verifying: a good data set has no problem, and every kind of damage is named."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from golf_ray.config import DataConfig
from golf_ray.data import verify
from golf_ray.data.build import build_dataset
from golf_ray.data.shards import write_shard
from golf_ray.data.verify import VerifyReport, verify_dataset
from golf_ray.errors import DataError

TINY = Path(__file__).parent / "data" / "tiny"
VOCAB = 300


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    words = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda".split()
    documents = ((str(n), f"{n} " + " ".join(rng.choice(words, 40))) for n in range(50))
    out = tmp_path_factory.mktemp("built")
    build_dataset(documents, out, vocab_size=VOCAB, val_documents=5, shard_tokens=700)
    return out


@pytest.fixture
def data(built: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(built, tmp_path / "data")
    return tmp_path / "data"


def check(root: Path, vocab_size: int = VOCAB) -> VerifyReport:
    report = verify_dataset(DataConfig(dir=str(root)), vocab_size)
    assert all("\n" not in problem and problem for problem in report.problems)
    assert report.ok == (not report.problems)
    return report


def shard(root: Path, name: str) -> Path:
    return root / "datasets" / f"fineweb10B_sp{VOCAB}" / f"fineweb_{name}.bin"


def test_a_built_data_set_is_well(data: Path) -> None:
    told: list[tuple[int, int]] = []
    report = verify_dataset(
        DataConfig(dir=str(data)), VOCAB, progress=lambda s, done, total: told.append((done, total))
    )
    assert report.problems == () and report.has_manifest
    assert (report.train.documents, report.val.documents) == (45, 5)
    assert report.train.shards > 3 and report.val.shards >= 1
    assert told == sorted(told) and told[-1][0] == told[-1][1] > 0


def test_the_tiny_data_set_is_well() -> None:
    report = check(TINY, 512)
    assert report.problems == () and not report.has_manifest
    assert (report.train.shards, report.val.shards) == (2, 1)
    assert report.val.tokens == 883


def test_every_damage_is_named(data: Path) -> None:
    first = shard(data, "train_000000")
    good = first.read_bytes()
    wrong_id = good[:-2] + b"\xff\xff"
    for content, told in (
        (good[:-2], "bytes, its header's"),
        (b"\0" + good[1:], "it is no token shard"),
        (good[:4] + b"\2" + good[5:], "of version 2"),
        (wrong_id, "token id 65535"),
        (good[:1024] + b"\5\0" + good[1026:], "come before any BOS"),
    ):
        first.write_bytes(content)
        problems = check(data).problems
        assert any(told in problem for problem in problems), problems
        assert any("another hash than the manifest" in problem for problem in problems)
    first.write_bytes(good)
    assert check(data).ok
    first.unlink()
    problems = check(data).problems
    assert any("no shard 0 of train" in problem for problem in problems)
    assert any("fineweb_train_000000.bin of the manifest is missing" in p for p in problems)


def test_tokenizers_that_do_not_fit(data: Path) -> None:
    model = data / "tokenizers" / f"fineweb_{VOCAB}_bpe.model"
    model.write_bytes((TINY / "tokenizers" / "fineweb_512_bpe.model").read_bytes())
    assert any("512 pieces" in problem for problem in check(data).problems)
    model.unlink()
    assert any("no tokenizer" in problem for problem in check(data).problems)


def test_shards_and_tokenizer_of_another_build(data: Path) -> None:
    folder = data / "datasets" / f"fineweb10B_sp{VOCAB}"
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tokenizer"]["sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    shutil.copy(shard(data, "val_000000"), shard(data, "val_000009"))
    problems = check(data).problems
    assert any("not the one that the shards were made with" in problem for problem in problems)
    assert any("val_000009.bin is not in the manifest" in problem for problem in problems)
    (folder / "manifest.json").write_text("{")
    assert any("is no manifest" in problem for problem in check(data).problems)


def test_sides_that_are_missing(data: Path, tmp_path: Path) -> None:
    for path in data.rglob("fineweb_val_*.bin"):
        path.unlink()
    assert any("no file fineweb_val_*.bin" in problem for problem in check(data).problems)
    with pytest.raises(DataError, match="golf-ray data build"):
        verify_dataset(DataConfig(dir=str(tmp_path / "absent")), VOCAB)


def write_splits(root: Path, train: list[list[int]], val: list[list[int]]) -> Path:
    for split, shards in (("train", train), ("val", val)):
        for index, tokens in enumerate(shards):
            write_shard(shard(root, f"{split}_{index:06d}"), tokens)
    return root


def shared_of(root: Path) -> list[str]:
    return [problem for problem in check(root).problems if "is training document" in problem]


def test_documents_on_both_sides_are_named_by_their_index(tmp_path: Path) -> None:
    # Training documents: 5 6 7 8, 9, 5 6; the first runs across the border of two shards.
    write_splits(tmp_path, [[1, 5, 6], [7, 8, 1, 9, 1, 5, 6]], [[1, 4, 1, 5, 6, 7, 8, 1, 9]])
    assert shared_of(tmp_path) == [
        "validation document 1 is training document 0 too",
        "validation document 2 is training document 1 too",
    ]
    assert check(tmp_path).shared_documents == 2


def test_a_part_of_a_document_is_another_document(tmp_path: Path) -> None:
    write_splits(tmp_path, [[1, 5, 6], [7, 8, 1]], [[1, 5, 6, 1, 7, 8, 1, 5, 6, 7, 1]])
    assert shared_of(tmp_path) == []


def test_many_shared_documents_are_counted(tmp_path: Path) -> None:
    tokens = [t for n in range(30) for t in (1, 10 + n)]
    report = check(write_splits(tmp_path, [tokens, tokens], [tokens]))
    assert len(shared_of(tmp_path)) == verify.MAX_NAMED
    assert report.shared_documents == 30 and report.train.repeated_documents == 30
    assert any(problem.startswith("10 more") for problem in report.problems)


@settings(deadline=None, max_examples=30)
@given(
    train=st.lists(st.lists(st.integers(4, 6), max_size=4), min_size=1, max_size=12),
    val=st.lists(st.lists(st.integers(4, 6), max_size=4), min_size=1, max_size=6),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    chunk=st.integers(1, 20),
)
def test_shared_documents_are_found_wherever_the_shards_are_cut(
    tmp_path_factory: pytest.TempPathFactory,
    train: list[list[int]],
    val: list[list[int]],
    cuts: list[int],
    chunk: int,
) -> None:
    stream = [t for document in train for t in (1, *document)]
    bounds = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    shards = [stream[a:b] for a, b in itertools.pairwise(bounds)]
    root = tmp_path_factory.mktemp("cut")
    write_splits(root, shards, [[t for document in val for t in (1, *document)]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "CHECK_TOKENS", chunk)
        report = check(root)
    assert (report.train.documents, report.val.documents) == (len(train), len(val))
    assert report.shared_documents == sum(bool(d) and d in train for d in val)
