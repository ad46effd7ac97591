"""Any text into a data set of the published layout: tokenizer, shards and manifest.

The text is read three times, each time as a stream: to hash its documents, to train the tokenizer
on a bounded sample of the training side, and to tokenise. Documents are split by hash: the
validation side takes the smallest hashes, so duplicates go to one side and the order of the files
does not matter. Shards of a split are of equal size, so that none is too small to train on.

Invariant: the files follow from the text and the arguments, for any number of workers, and the
data set appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from golf_ray.data.encode import document_hash, encode_documents
from golf_ray.data.manifest import MANIFEST_FORMAT, MANIFEST_NAME, file_sha256
from golf_ray.data.shards import BOS_ID, Split, dataset_name, shard_name, write_raw_shard
from golf_ray.data.staging import Staging, staging
from golf_ray.data.text import TextItem, read_source
from golf_ray.data.tokenizer import load_tokenizer
from golf_ray.data.tokenizer_training import (
    published_normalizer,
    require_vocab_size,
    sentences,
    train_tokenizer,
)
from golf_ray.errors import DataError, UsageError

Progress = Callable[[str, int, int], None]
"""Called with a stage ("read", "tokenizer", "tokenize", "write"), the bytes of text (of tokens in
"write") done, and those in all; 0 in all where that is not known yet."""

Sources = Sequence[Path | str] | Iterable[tuple[str, str]]

DEFAULT_VAL_FRACTION: Final = 0.01
_EMPTY_HASH: Final = document_hash("")


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildOptions:
    """How text becomes a data set; all of it is part of the result's identity."""

    vocab_size: int
    """Pieces of the tokenizer."""
    dataset: str | None = None
    """Folder below `datasets/`; None for `fineweb10B_sp{vocab_size}`."""
    val_fraction: float | None = None
    """Part of the distinct documents for validation, at least one; a hundredth if neither."""
    val_documents: int | None = None
    """Number of distinct documents for validation instead."""
    shard_tokens: int = 100_000_000
    """Tokens of a shard at most."""
    seed: int = 0
    """Of the sample that the tokenizer is trained on."""
    text_column: str = "text"
    """Field of JSON lines, column of Parquet files."""
    tokenizer_sample_bytes: int = 32_000_000
    """About so much text at most trains the tokenizer."""

    def __post_init__(self) -> None:
        require_vocab_size(self.vocab_size)
        if self.val_fraction is not None and self.val_documents is not None:
            raise UsageError("a validation fraction and a number of documents", "give one of them")
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise UsageError(f"validation fraction {self.val_fraction}", "give one from 0 to 1")
        if self.val_documents is not None and self.val_documents < 1:
            raise UsageError(f"{self.val_documents} validation documents", "give at least 1")
        if self.shard_tokens < 1 or self.tokenizer_sample_bytes < 1:
            raise UsageError(
                f"shards of {self.shard_tokens} tokens, a sample of "
                f"{self.tokenizer_sample_bytes} bytes", "give at least 1",
            )  # fmt: skip

    @property
    def name(self) -> str:
        """The folder below `datasets/`."""
        return self.dataset or dataset_name(self.vocab_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitCounts:
    """What one side of a data set holds."""

    documents: int
    tokens: int
    text_bytes: int
    num_shards: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildReport:
    """A finished data set."""

    dataset_dir: Path
    tokenizer: Path
    train: SplitCounts
    val: SplitCounts
    skipped: dict[str, int]
    """Files and rows that are no document, by reason."""


@dataclass(kw_only=True, slots=True)
class _Survey:
    """What the first reading finds."""

    hashes: NDArray[np.uint64]
    text_bytes: int
    sources: list[dict[str, Any]]
    threshold: int
    """Documents with a smaller hash are for validation."""


def build_dataset(
    sources: Sources,
    out_dir: Path | str,
    *,
    tokenizer: Path | str | None = None,
    workers: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> BuildReport:
    """Make `out_dir/datasets/<dataset>/` and `out_dir/tokenizers/fineweb_{vocab_size}_bpe.model`.

    Args:
        sources: files and folders, or an iterable of (name, text) documents.
        tokenizer: an existing SentencePiece model to use; without it, one is trained.
        workers: processes that tokenise; no effect on the result.
        overwrite: replace an existing data set and tokenizer.
        options: the fields of `BuildOptions`; `vocab_size` must be given.

    Raises:
        UsageError: options contradict each other.
        DataError: a source cannot be used, holds no text or too little, or the data set exists.
        StorageError: the folder cannot be written or has no space left.
    """
    how = BuildOptions(**options)
    if workers < 1:
        raise UsageError(f"{workers} workers to tokenise", "give at least 1")
    given = None if tokenizer is None else _read_tokenizer(Path(tokenizer), how.vocab_size)
    report = progress or (lambda stage, done, total: None)
    out_dir = Path(out_dir)
    with staging(out_dir, how.name, how.vocab_size, given, overwrite) as stage:
        text = _Text(sources, how.text_column, stage.work, out_dir)
        survey = _survey(text, given, how, report)
        model = given or _train(text, survey, how, report)
        stage.tokenizer.write_bytes(model)
        splits = _tokenize(text, survey, model, stage, workers, report)
        for split, counts in splits.items():
            counts["shards"] = _write_shards(split, stage, how.shard_tokens, report)
        manifest = _manifest(how, given is None, stage, survey, splits)
        content = json.dumps(manifest, indent=2) + "\n"
        (stage.dataset / MANIFEST_NAME).write_text(content, encoding="utf-8")
        stage.publish()
    return BuildReport(
        dataset_dir=stage.dataset_place,
        tokenizer=stage.tokenizer_place,
        train=_split_counts(splits["train"]),
        val=_split_counts(splits["val"]),
        skipped=dict(sum((Counter(s["skipped"]) for s in survey.sources), Counter())),
    )


def _manifest(
    how: BuildOptions,
    trained: bool,
    stage: Staging,
    survey: _Survey,
    splits: dict[Split, dict[str, Any]],
) -> dict[str, Any]:
    return {
        "format": MANIFEST_FORMAT,
        "dataset": how.name,
        "vocab_size": how.vocab_size,
        "bos_id": BOS_ID,
        "tokenizer": {
            "file": stage.tokenizer_place.name,
            "sha256": file_sha256(stage.tokenizer),
            "trained_on_this": trained,
        },
        "options": asdict(how),
        "sources": survey.sources,
        "splits": splits,
    }


class _Text:
    """Documents that can be read again and again, always the same ones in the same order."""

    def __init__(self, sources: Sources, text_column: str, work: Path, out_dir: Path) -> None:
        self._column = text_column
        self._leave_out = [out_dir / "datasets", out_dir / "tokenizers"]
        given = [sources] if isinstance(sources, (str, Path)) else sources
        if isinstance(given, Sequence) and all(isinstance(s, (str, Path)) for s in given):
            self.labels = [str(source) for source in given]
            self._paths = [Path(source) for source in self.labels]
            return
        # A stream of documents comes only once: it is kept on disk.
        self.labels = ["documents"]
        self._paths = [work / "documents.jsonl"]
        self._column = "text"
        with open(self._paths[0], "w", encoding="utf-8") as file:
            for document in given:
                assert isinstance(document, tuple), "paths and documents are not to be mixed"
                file.write(json.dumps({"text": document[1]}) + "\n")

    def items(self) -> Iterator[tuple[int, TextItem]]:
        """Every document or skipped thing with its source's number."""
        for number, path in enumerate(self._paths):
            for item in read_source(path, self._column, self._leave_out):
                yield number, item

    def texts(self) -> Iterator[str]:
        """The documents alone."""
        return (item.text for _, item in self.items() if item.text is not None)


def _read_tokenizer(path: Path, vocab_size: int) -> bytes:
    processor = load_tokenizer(path, vocab_size)
    if processor.bos_id() != BOS_ID:
        raise DataError(
            f"tokenizer {path} has BOS {processor.bos_id()}, not {BOS_ID}",
            "use a tokenizer whose document start is id 1",
        )
    return path.read_bytes()


def _survey(text: _Text, given: bytes | None, how: BuildOptions, report: Progress) -> _Survey:
    """Read everything once: hashes, counts, and where validation ends."""
    import sentencepiece

    normalizer = (
        published_normalizer()
        if given is None
        else sentencepiece.SentencePieceProcessor(model_proto=given)
    )
    hashes = array("Q")
    counts = [Counter[str]() for _ in text.labels]
    skipped = [Counter[str]() for _ in text.labels]
    total_bytes = 0
    for number, item in text.items():
        if item.text is None:
            skipped[number][item.skipped] += 1
            continue
        hashes.append(document_hash(normalizer.normalize(item.text)))
        if hashes[-1] == _EMPTY_HASH:
            skipped[number]["empty"] += 1
            continue
        size_bytes = len(item.text.encode())
        counts[number].update(documents=1, text_bytes=size_bytes)
        total_bytes += size_bytes
        report("read", total_bytes, 0)
    sources = [
        {"path": label, "documents": count["documents"], "text_bytes": count["text_bytes"],
         "skipped": dict(sorted(left_out.items()))}
        for label, count, left_out in zip(text.labels, counts, skipped, strict=True)
    ]  # fmt: skip
    if total_bytes == 0:
        reasons = ", ".join(
            f"{n} {reason}" for reason, n in sorted(sum(skipped, Counter()).items())
        )
        raise DataError(
            f"no text in {', '.join(text.labels) or 'no source'} ({reasons or 'no file'})",
            "give files or folders of UTF-8 text, .jsonl or .parquet files",
        )
    found = np.frombuffer(hashes, dtype=np.uint64)
    threshold = _threshold(found, how)
    return _Survey(hashes=found, text_bytes=total_bytes, sources=sources, threshold=threshold)


def _threshold(hashes: NDArray[np.uint64], how: BuildOptions) -> int:
    """The hash below which exactly the wanted number of distinct documents lies."""
    distinct = np.unique(hashes[hashes != _EMPTY_HASH])
    wanted = how.val_documents
    if wanted is None:
        wanted = max(1, round(len(distinct) * (how.val_fraction or DEFAULT_VAL_FRACTION)))
    if wanted >= len(distinct):
        raise DataError(
            f"{wanted} of {len(distinct)} different documents for validation leave none to train",
            "use more documents (a text file is one) or fewer for validation",
        )
    return int(distinct[wanted])


def _train(text: _Text, survey: _Survey, how: BuildOptions, report: Progress) -> bytes:
    """Train a tokenizer on a sample of the training side."""
    sample_bytes = min(how.tokenizer_sample_bytes, survey.text_bytes)
    limit = int(sample_bytes / survey.text_bytes * 2**64)
    key = how.seed.to_bytes(16, "big", signed=True)

    def pieces() -> Iterator[str]:
        done = 0
        for hashed, document in zip(survey.hashes, text.texts(), strict=False):
            for piece in sentences(document) if hashed >= survey.threshold else ():
                content = piece.encode()
                chance = hashlib.blake2b(content, digest_size=8, key=key).digest()
                if int.from_bytes(chance, "big") < limit:
                    done += len(content)
                    report("tokenizer", min(done, sample_bytes), sample_bytes)
                    yield piece

    return train_tokenizer(pieces(), how.vocab_size)


def _tokenize(
    text: _Text, survey: _Survey, model: bytes, stage: Staging, workers: int, report: Progress
) -> dict[Split, dict[str, Any]]:
    """Write the tokens of each side to its spool, in the order of the documents."""
    splits: dict[Split, dict[str, Any]] = {
        split: {"documents": 0, "tokens": 0, "text_bytes": 0} for split in ("train", "val")
    }
    read, done_bytes = 0, 0
    with ExitStack() as stack:
        spools = {s: stack.enter_context(open(_spool(stage, s), "wb")) for s in splits}
        batches = encode_documents(
            text.texts(), model, workers=workers, text_bytes=survey.text_bytes
        )
        for batch in batches:
            expected = survey.hashes[read : read + len(batch.hashes)]
            if not np.array_equal(batch.hashes, expected):
                raise _changed()
            read += len(expected)
            is_text, below = expected != _EMPTY_HASH, expected < survey.threshold
            masks: dict[Split, NDArray[np.bool_]] = {
                "train": is_text & ~below,
                "val": is_text & below,
            }
            for split, mask in masks.items():
                tokens = batch.tokens[np.repeat(mask, batch.lengths)]
                spools[split].write(tokens.astype("<u2").tobytes())
                splits[split]["documents"] += int(mask.sum())
                splits[split]["tokens"] += len(tokens)
                splits[split]["text_bytes"] += int(batch.text_bytes[mask].sum())
            done_bytes += int(batch.text_bytes.sum())
            report("tokenize", min(done_bytes, survey.text_bytes), survey.text_bytes)
    if read != len(survey.hashes):
        raise _changed()
    return splits


def _changed() -> DataError:
    return DataError("the text changed while it was read", "build again when it is at rest")


def _spool(stage: Staging, split: Split) -> Path:
    return stage.work / f"{split}.tokens"


def _write_shards(
    split: Split, stage: Staging, shard_tokens: int, report: Progress
) -> list[dict[str, Any]]:
    """Cut a spool into shards of equal size."""
    spool = _spool(stage, split)
    tokens = np.memmap(spool, dtype="<u2", mode="r")
    num_shards = -(-len(tokens) // shard_tokens)
    bounds = [len(tokens) * i // num_shards for i in range(num_shards + 1)]
    shards = []
    for index, (start, end) in enumerate(pairwise(bounds)):
        path = stage.dataset / shard_name(split, index)
        write_raw_shard(path, tokens[start:end])
        shards.append({"file": path.name, "tokens": end - start, "sha256": file_sha256(path)})
        report("write", 2 * end, 2 * len(tokens))
    del tokens
    spool.unlink()
    return shards


def _split_counts(split: dict[str, Any]) -> SplitCounts:
    return SplitCounts(
        documents=split["documents"],
        tokens=split["tokens"],
        text_bytes=split["text_bytes"],
        num_shards=len(split["shards"]),
    )
