"""Building: the published layout, the same for any number of workers, whole or not at all."""

from __future__ import annotations

import ast
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golf_ray.config import DataConfig
from golf_ray.data import build, encode
from golf_ray.data.build import build_dataset
from golf_ray.data.documents import document_bounds
from golf_ray.data.library_text import python_library_text
from golf_ray.data.manifest import file_sha256, read_manifest
from golf_ray.data.shards import find_shards, load_tokens, open_shard
from golf_ray.data.tokenizer import byte_tables, load_tokenizer
from golf_ray.data.tokenizer_training import sentences, train_tokenizer
from golf_ray.errors import DataError, StorageError, UsageError

TINY_MODEL = Path(__file__).parent / "data" / "tiny" / "tokenizers" / "fineweb_512_bpe.model"
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards brew strange potions".split()


def text_of(number: int, words: int = 60) -> str:
    rng = np.random.default_rng(number)
    return f"Document {number}. " + " ".join(rng.choice(WORDS, words)) + "."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty text files in folders, and things that are no text."""
    root = tmp_path / "texts"
    for number in range(40):
        path = root / f"part{number % 3}" / f"{number:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text_of(number), encoding="utf-8")
    (root / "picture.png").write_bytes(b"\x89PNG\0\0")
    (root / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (root / "empty.txt").write_text(" \n")
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("hidden")
    os.mkfifo(root / "pipe")
    return root


def tree(root: Path) -> dict[str, str]:
    return {p.relative_to(root).as_posix(): file_sha256(p) for p in root.rglob("*") if p.is_file()}


def documents_of(out: Path, vocab_size: int, split: Any, **data: str) -> list[str]:
    """The texts of a split, decoded."""
    config = DataConfig(dir=str(out), **data)
    tokens = load_tokens(find_shards(config, vocab_size, split), vocab_size)
    assert tokens[0] == 1
    model = load_tokenizer(out / "tokenizers" / f"fineweb_{vocab_size}_bpe.model", vocab_size)
    return [
        model.decode([int(t) for t in tokens[start:end] if t != 1])
        for start, end in document_bounds(tokens)
    ]


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text and text
    return text


def test_folder_becomes_the_published_layout(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = build_dataset([folder], out, vocab_size=320, val_fraction=0.1)
    assert sorted(tree(out)) == [
        "datasets/fineweb10B_sp320/fineweb_train_000000.bin",
        "datasets/fineweb10B_sp320/fineweb_val_000000.bin",
        "datasets/fineweb10B_sp320/manifest.json",
        "tokenizers/fineweb_320_bpe.model",
    ]
    assert (report.train.documents, report.val.documents) == (36, 4)
    assert report.skipped == {"binary": 1, "empty": 1, "not UTF-8": 1, "not a file": 1}
    train, val = documents_of(out, 320, "train"), documents_of(out, 320, "val")
    assert sorted(train + val) == sorted(text_of(n) for n in range(40))
    total = sum(len(text_of(n).encode()) for n in range(40))
    assert report.train.text_bytes + report.val.text_bytes == total
    tables = byte_tables(report.tokenizer, 320)
    assert tables.is_boundary[:4].all() and not tables.is_boundary[4:].any()
    for split, counts in (("train", report.train), ("val", report.val)):
        tokens = load_tokens(find_shards(DataConfig(dir=str(out)), 320, split), 320)  # type: ignore[arg-type]
        assert len(tokens) == counts.tokens
        # Bytes per token need the count to be exact.
        assert int(tables.count(tokens[:-1], tokens[1:]).sum()) == counts.text_bytes
        assert 2 not in tokens


def test_manifest_tells_all(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = build_dataset(
        [folder / "part0", folder / "part1" / "01.txt"], out, vocab_size=320, dataset="mine"
    )
    manifest = read_manifest(report.dataset_dir)
    assert manifest is not None and manifest["dataset"] == "mine"
    assert manifest["tokenizer"]["sha256"] == file_sha256(report.tokenizer)
    assert [s["documents"] for s in manifest["sources"]] == [14, 1]
    for split in ("train", "val"):
        for shard in manifest["splits"][split]["shards"]:
            path = report.dataset_dir / shard["file"]
            assert shard["sha256"] == file_sha256(path)
            assert shard["tokens"] == len(open_shard(path))


def test_any_number_of_workers_gives_the_same_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BYTES_PER_WORKER", 1)
    monkeypatch.setattr(encode, "BATCH_CHARS", 2000)
    options = {"vocab_size": 300, "shard_tokens": 1500, "val_documents": 5}
    build_dataset([folder], tmp_path / "one", workers=1, **options)

    def not_here(*args: Any) -> Any:
        raise AssertionError("two workers must not tokenise in this process")

    monkeypatch.setattr(encode, "encode_batch", not_here)
    build_dataset([folder], tmp_path / "two", workers=2, **options)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert len(tree(tmp_path / "one")) > 4
    assert multiprocessing.active_children() == []


def test_a_worker_that_dies_ends_the_build(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "BYTES_PER_WORKER", 1)
    monkeypatch.setattr(encode, "BATCH_CHARS", 200)

    def end_workers(stage: str, done: int, total: int) -> None:
        if stage == "tokenize":
            for process in multiprocessing.active_children():
                process.kill()

    with pytest.raises(DataError, match="ended from outside") as caught:
        build_dataset([folder], tmp_path / "out", vocab_size=300, workers=2, progress=end_workers)
    one_line(caught.value)
    assert not (tmp_path / "out").exists()
    assert multiprocessing.active_children() == []


def test_shards_are_of_equal_size_and_carry_documents_on(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = build_dataset([folder], out, vocab_size=300, shard_tokens=1000)
    lengths = [len(open_shard(p)) for p in find_shards(DataConfig(dir=str(out)), 300, "train")]
    assert len(lengths) == report.train.num_shards == -(-report.train.tokens // 1000)
    assert sum(lengths) == report.train.tokens
    assert max(lengths) <= 1000 and max(lengths) - min(lengths) <= 1
    assert sorted(documents_of(out, 300, "train") + documents_of(out, 300, "val")) == sorted(
        text_of(n) for n in range(40)
    )


def test_duplicates_go_to_one_side(tmp_path: Path) -> None:
    rows = [text_of(n % 10) + (" " if n % 2 else "") for n in range(60)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    report = build_dataset([path], tmp_path / "out", vocab_size=310, val_documents=3)
    assert (report.train.documents, report.val.documents) == (42, 18)
    train = set(documents_of(tmp_path / "out", 310, "train"))
    val = set(documents_of(tmp_path / "out", 310, "val"))
    assert len(train) == 7 and len(val) == 3 and not train & val


def test_jsonl_parquet_and_streams_give_the_same_tokens(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [text_of(n) for n in range(30)]
    lines = [json.dumps({"id": n, "body": t}) for n, t in enumerate([*texts, None])]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n\n")
    table = pyarrow.table({"body": [*texts, None], "id": list(range(31))})
    parquet.write_table(table, tmp_path / "a.parquet")
    shards = []
    for name in ("a.jsonl", "a.parquet"):
        report = build_dataset(
            [tmp_path / name], tmp_path / name[2:], vocab_size=300, text_column="body"
        )
        assert report.skipped == {"empty": 1}
        shards.append(file_sha256(report.dataset_dir / "fineweb_train_000000.bin"))
    streamed = build_dataset(
        ((f"{n}", t) for n, t in enumerate(texts)), tmp_path / "stream", vocab_size=300
    )
    shards.append(file_sha256(streamed.dataset_dir / "fineweb_train_000000.bin"))
    assert len(set(shards)) == 1


def test_existing_tokenizer_is_used(folder: Path, tmp_path: Path) -> None:
    report = build_dataset([folder], tmp_path / "out", vocab_size=512, tokenizer=TINY_MODEL)
    assert report.tokenizer.read_bytes() == TINY_MODEL.read_bytes()
    tokens = open_shard(report.dataset_dir / "fineweb_val_000000.bin", 512)
    assert load_tokenizer(TINY_MODEL).decode(tokens[1:].tolist()) in {text_of(n) for n in range(40)}
    # A second data set beside the first, with the same tokenizer.
    build_dataset(
        [folder], tmp_path / "out", vocab_size=512, tokenizer=TINY_MODEL, dataset="second"
    )
    with pytest.raises(DataError, match="512 pieces") as caught:
        build_dataset([folder], tmp_path / "other", vocab_size=600, tokenizer=TINY_MODEL)
    one_line(caught.value)


def test_existing_targets_are_kept_unless_told(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build_dataset([folder], out, vocab_size=300)
    before = tree(out)
    for again in ({}, {"dataset": "mine"}):
        with pytest.raises(DataError, match="exists already") as caught:
            build_dataset([folder / "part0"], out, vocab_size=300, **again)
        one_line(caught.value)
    assert tree(out) == before
    build_dataset([folder / "part0"], out, vocab_size=300, overwrite=True)
    after = tree(out)
    assert set(after) == set(before) and after != before
    assert not [p for p in os.listdir(out / "datasets") if p.startswith(".")]


def test_an_error_at_any_stage_leaves_what_was_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "deep" / "out"
    build_dataset([folder], tmp_path / "old", vocab_size=300)
    before = tree(tmp_path / "old")

    class Stopped(RuntimeError):
        pass

    for stop_at in ("read", "tokenizer", "tokenize", "write"):

        def stop(stage: str, done: int, total: int, stop_at: str = stop_at) -> None:
            if stage == stop_at:
                raise Stopped

        with pytest.raises(Stopped):
            build_dataset([folder], out, vocab_size=300, progress=stop)
        assert not out.parent.exists()
        with pytest.raises(Stopped):
            build_dataset([folder], tmp_path / "old", vocab_size=300, overwrite=True, progress=stop)
        assert tree(tmp_path / "old") == before
        assert sorted(os.listdir(tmp_path / "old" / "datasets")) == ["fineweb10B_sp300"]

    # The last rename fails: tokenizer and data set both come back.
    real, target = os.replace, str(tmp_path / "old" / "datasets" / "fineweb10B_sp300")

    def fail(source: Any, place: Any) -> None:
        if str(place) == target and Path(source).name == "dataset":
            raise OSError(28, "No space left on device")
        real(source, place)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(StorageError, match="no space left") as caught:
        build_dataset([folder / "part0"], tmp_path / "old", vocab_size=300, overwrite=True)
    one_line(caught.value)
    assert tree(tmp_path / "old") == before


def test_sources_without_text(tmp_path: Path) -> None:
    root = tmp_path / "none"
    root.mkdir()
    (root / "a.bin").write_bytes(b"\0\1")
    for sources, told in (
        ([root], "1 binary"),
        ([tmp_path / "absent"], "no file or folder"),
        ([], "no source"),
    ):
        with pytest.raises(DataError, match=told) as caught:
            build_dataset(sources, tmp_path / "out", vocab_size=300)
        one_line(caught.value)
    assert not (tmp_path / "out").exists()


def test_too_little_text_names_the_largest_vocabulary(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="largest possible") as caught:
        build_dataset([folder], tmp_path / "out", vocab_size=60_000)
    largest = int(one_line(caught.value).split("it is ")[1].split(":")[0])
    assert not (tmp_path / "out").exists()
    assert build_dataset([folder], tmp_path / "out", vocab_size=largest).tokenizer.exists()
    with pytest.raises(DataError, match="smallest possible"):
        build_dataset([folder], tmp_path / "out2", vocab_size=200)
    with pytest.raises(DataError, match="65536"):
        build_dataset([folder], tmp_path / "out2", vocab_size=65_537)


def test_one_document_cannot_be_split(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text_of(1))
    (tmp_path / "b.txt").write_text(text_of(1))
    with pytest.raises(DataError, match="1 of 1 different documents") as caught:
        build_dataset([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "out", vocab_size=270)
    one_line(caught.value)


def test_columns_and_rows_that_cannot_be_used(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"content": ["x"], "n": [1]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"contents": "x"}\n')
    (tmp_path / "c.jsonl").write_text('{"content": "x"}\n{"content"\n')
    (tmp_path / "d.jsonl").write_text("[1]\n")
    (tmp_path / "e.parquet").write_bytes(b"PAR1 not really")
    for name, column, told in (
        ("a.parquet", "contant", "did you mean 'content'"),
        ("a.parquet", "n", "int, not text"),
        ("b.jsonl", "content", "did you mean 'contents'"),
        ("c.jsonl", "content", "line 2 is not JSON"),
        ("d.jsonl", "content", "line 1 is no JSON object"),
        ("e.parquet", "content", "is no Parquet file"),
    ):
        with pytest.raises(DataError, match=told) as caught:
            build_dataset([tmp_path / name], tmp_path / "out", vocab_size=300, text_column=column)
        assert name in one_line(caught.value)
    assert not (tmp_path / "out").exists()


def test_unwritable_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError) as caught:
            build_dataset([folder], out, vocab_size=300)
        one_line(caught.value)


def test_contradicting_options(folder: Path, tmp_path: Path) -> None:
    for wrong in (
        {"val_fraction": 0.1, "val_documents": 3},
        {"val_fraction": 1.0},
        {"val_documents": 0},
        {"shard_tokens": 0},
        {"workers": 0},
        {"dataset": "../up"},
    ):
        with pytest.raises(UsageError) as caught:
            build_dataset([folder], tmp_path / "out", vocab_size=300, **wrong)
        one_line(caught.value)


def test_text_that_changes_between_the_readings_is_noticed(folder: Path, tmp_path: Path) -> None:
    def change(stage: str, done: int, total: int) -> None:
        if stage == "tokenizer":
            (folder / "part2" / "02.txt").write_text("something else")

    with pytest.raises(DataError, match="changed while"):
        build_dataset([folder], tmp_path / "out", vocab_size=300, progress=change)
    assert not (tmp_path / "out").exists()


def test_the_output_folder_is_not_its_own_source(folder: Path) -> None:
    first = build_dataset([folder], folder / "out", vocab_size=300)
    second = build_dataset([folder], folder / "out", vocab_size=300, overwrite=True)
    assert first == second


def test_a_huge_text_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("golf_ray.data.text.MAX_DOCUMENT_BYTES", 10)
    (tmp_path / "a.txt").write_text("x" * 11)
    with pytest.raises(DataError, match="one document of 11 bytes"):
        build_dataset([tmp_path / "a.txt"], tmp_path / "out", vocab_size=300)


def test_the_tokenizer_learns_from_a_bounded_sample_of_the_training_side(
    folder: Path, tmp_path: Path
) -> None:
    models = set()
    for seed in (0, 1, 1):
        report = build_dataset(
            [folder], tmp_path / f"out{len(os.listdir(tmp_path))}", vocab_size=310, seed=seed,
            tokenizer_sample_bytes=5000,
        )  # fmt: skip
        models.add(file_sha256(report.tokenizer))
    assert len(models) == 2
    assert build.BuildOptions(vocab_size=310).tokenizer_sample_bytes == 32_000_000


def test_errors_of_the_text_come_through_the_trainer() -> None:
    def broken() -> Any:
        yield from sentences(text_of(1))
        raise DataError("the disk is gone")

    with pytest.raises(DataError, match="the disk is gone"):
        train_tokenizer(broken(), 280)


def test_library_text_is_real_bounded_and_said_once() -> None:
    documents = list(python_library_text(400_000))
    assert documents == list(python_library_text(400_000))
    sizes = [len(text.encode()) for _, text in documents]
    assert 300_000 < sum(sizes) <= 400_000
    assert any(name.endswith("documentation") for name, _ in documents)
    left_out = {"test", "tests", "site-packages"}
    assert not any(left_out & set(name.split(":")[0].split("/")) for name, _ in documents)
    codes = "\n".join(text for name, text in documents if name.endswith("code"))
    for name, text in documents:
        if name.endswith("documentation"):
            assert text not in codes


def test_library_code_is_code() -> None:
    codes = [text for name, text in python_library_text(300_000) if name.endswith("code")]
    parsed = 0
    for text in codes:
        try:
            ast.parse(text)
            parsed += 1
        except SyntaxError:
            # A body that was only a documentation string is empty without it.
            pass
    assert parsed > 0.8 * len(codes)
