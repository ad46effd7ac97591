"""The published shards and tokenizer of one vocabulary, from a hub into the local layout.

Files that are there and have the hub's hash are not fetched again, so an interrupted fetch goes
on where it was. Each file is checked (hash, header, ids, vocabulary) before it takes its place.
Several processes may fetch into one folder, which several machines may share: one goes after the
other, and finds what the first has fetched.

Invariant: a file under `datasets/` or `tokenizers/` is whole, and is what the hub states.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from golf_ray.data.hub import HubRepo, RemoteFile
from golf_ray.data.locking import folder_lock
from golf_ray.data.manifest import (
    MANIFEST_FORMAT,
    MANIFEST_NAME,
    file_sha256,
    read_manifest,
)
from golf_ray.data.shards import (
    BOS_ID,
    Split,
    dataset_name,
    open_shard,
    parse_shard_name,
    read_count,
)
from golf_ray.data.tokenizer import load_tokenizer, tokenizer_name
from golf_ray.errors import DataError, StorageError, UsageError
from golf_ray.records import atomic_write_json, make_folder, storage_error

Progress = Callable[[str, int, int], None]
"""Called with "fetch", bytes done and bytes to fetch in all, and with "wait", 0 and 0 while another
process fetches into the same folder."""

_VARIANT = re.compile(r"sp(\d+)")
_IN_FOLDER_NAME = re.compile(r"(?:^|[_-])(sp\d+)$")
SPARE_BYTES: Final = 64_000_000
"""Space that is left free beside what is fetched."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RepoLayout:
    """Where a repository keeps the files; by default they are looked for by their names."""

    folder: str | None = None
    """Folder of the repository with the variant's `fineweb_{train,val}_NNNNNN.bin`; None for the
    one folder that has such files and whose path has a part that is, or ends in `_` and, the
    variant (`datasets/fineweb10B_sp8192`)."""
    tokenizer: str | None = None
    """Path of the tokenizer; None for the one file named `fineweb_{V}_bpe.model`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchReport:
    """A data set that is there and checked."""

    dataset_dir: Path
    tokenizer: Path
    revision: str
    """The commit that the files are of."""
    fetched_files: int
    fetched_bytes: int
    present_files: int
    """Files that were there already."""
    num_train_shards: int
    num_val_shards: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Wanted:
    remote: RemoteFile
    place: Path
    split: Split | None
    """None for the tokenizer."""


def fetch_dataset(
    variant: str = "sp8192",
    train_shards: int | None = None,
    *,
    repo: str,
    out_dir: Path | str,
    endpoint: str | None = None,
    revision: str = "main",
    layout: RepoLayout | None = None,
    progress: Progress | None = None,
) -> FetchReport:
    """Get tokenizer, validation shards and the first training shards of a variant.

    Args:
        variant: `sp` and the vocabulary size.
        train_shards: number of training shards; None for all.
        repo: data-set repository `owner/name`.
        out_dir: folder that gets `datasets/` and `tokenizers/`.
        endpoint: address of the hub; None for the hub client's own, which HF_ENDPOINT sets.
        layout: where the repository keeps the files.

    Raises:
        UsageError: no such variant can be.
        DataError: the hub cannot be reached, has no such repository, variant or number of shards,
            a file is damaged, or another data set stands in the place.
        StorageError: there is too little space, or the folder cannot be written.
    """
    match = _VARIANT.fullmatch(variant)
    if match is None or (train_shards is not None and train_shards < 0):
        raise UsageError(f"variant '{variant}' with {train_shards} training shards",
                         "give one such as sp8192, and 0 or more")  # fmt: skip
    vocab_size, out_dir = int(match[1]), Path(out_dir)
    hub = HubRepo(repo, endpoint=endpoint, revision=revision)
    files = _choose(hub, variant, vocab_size, train_shards, layout or RepoLayout())
    dataset_dir = out_dir / "datasets" / dataset_name(vocab_size)
    tokenizer = out_dir / "tokenizers" / tokenizer_name(vocab_size)
    wanted = [
        _Wanted(remote=file, place=dataset_dir / found[1] if found else tokenizer,
                split=found[0] if found else None)
        for file, found in files
    ]  # fmt: skip
    report = progress or (lambda stage, done, total: None)
    with folder_lock(out_dir, lambda: report("wait", 0, 0)):
        _refuse_others(dataset_dir, tokenizer, wanted)
        missing = [item for item in wanted if not item.remote.same_as(item.place)]
        total_bytes = sum(item.remote.num_bytes for item in missing)
        _require_space(out_dir, total_bytes)
        with _work_folder(out_dir, (dataset_dir, tokenizer.parent)) as work:
            _fetch_all(hub, missing, work, vocab_size, report)
        _write_manifest(dataset_dir, tokenizer, vocab_size, hub, wanted)
    return FetchReport(
        dataset_dir=dataset_dir,
        tokenizer=tokenizer,
        revision=hub.revision,
        fetched_files=len(missing),
        fetched_bytes=total_bytes,
        present_files=len(wanted) - len(missing),
        num_train_shards=sum(item.split == "train" for item in wanted),
        num_val_shards=sum(item.split == "val" for item in wanted),
    )


def _choose(
    hub: HubRepo, variant: str, vocab_size: int, train_shards: int | None, layout: RepoLayout
) -> list[tuple[RemoteFile, tuple[Split, str] | None]]:
    """The tokenizer, then the validation shards, then the training shards in their order."""
    files = hub.files()
    shards: dict[str, list[tuple[Split, int, RemoteFile]]] = {}
    for file in files:
        path = PurePosixPath(file.path)
        if parsed := parse_shard_name(path.name):
            shards.setdefault(str(path.parent), []).append((*parsed, file))
    folder = _choose_folder(hub.repo, variant, sorted(shards), layout.folder)
    name = tokenizer_name(vocab_size)
    models = [
        file
        for file in files
        if (file.path == layout.tokenizer if layout.tokenizer else
            PurePosixPath(file.path).name == name)
    ]  # fmt: skip
    if len({file.blob_sha1 for file in models}) != 1:
        found = ", ".join(file.path for file in models) or "none"
        raise DataError(f"{hub.repo} has no one tokenizer {layout.tokenizer or name} "
                        f"(found: {found})", "name its path")  # fmt: skip
    by_split: dict[Split, list[RemoteFile]] = {"val": [], "train": []}
    for split, _, file in sorted(shards[folder], key=lambda item: item[1]):
        by_split[split].append(file)
    if not by_split["val"]:
        raise DataError(f"{hub.repo} has no validation shard in {folder}", "check the repository")
    available = len(by_split["train"])
    if train_shards is not None and train_shards > available:
        raise DataError(f"{train_shards} training shards of {variant} are asked for, but "
                        f"{hub.repo} has {available}", "ask for fewer")  # fmt: skip
    by_split["train"] = by_split["train"][:train_shards]
    chosen: list[tuple[RemoteFile, tuple[Split, str] | None]] = [(models[0], None)]
    for split, found_files in by_split.items():
        chosen += [(file, (split, PurePosixPath(file.path).name)) for file in found_files]
    return chosen


def _choose_folder(repo: str, variant: str, folders: Sequence[str], given: str | None) -> str:
    if given is not None:
        given = str(PurePosixPath(given.strip("/") or "."))
        if given not in folders:
            raise DataError(f"{repo} has no shards in {given}",
                            f"it has them in: {', '.join(folders) or 'no folder'}")  # fmt: skip
        return given
    variants: dict[str, list[str]] = {}
    for folder in folders:
        for part in PurePosixPath(folder).parts:
            if match := _IN_FOLDER_NAME.search(part):
                variants.setdefault(match[1], []).append(folder)
                break
    found = variants.get(variant, [])
    if not found:
        known = sorted(variants, key=lambda name: int(name[2:]))
        raise DataError(f"{repo} has no shards of {variant}",
                        f"it has: {', '.join(known) or 'none of any variant'}")  # fmt: skip
    if len(found) > 1:
        raise DataError(f"{repo} has shards of {variant} in {', '.join(found)}",
                        "name the folder")  # fmt: skip
    return found[0]


def _refuse_others(dataset_dir: Path, tokenizer: Path, wanted: Sequence[_Wanted]) -> None:
    """What was built here, and another tokenizer, is not for a fetch to replace."""
    manifest = read_manifest(dataset_dir)
    if manifest is not None and "fetched" not in manifest:
        raise DataError(f"{dataset_dir} was built here, not fetched", "choose another folder")
    remote = next(item.remote for item in wanted if item.split is None)
    if os.path.lexists(tokenizer) and not remote.same_as(tokenizer):
        raise DataError(f"another tokenizer {tokenizer} exists already", "choose another folder")


def _require_space(out_dir: Path, num_bytes: int) -> None:
    if num_bytes == 0:
        return
    existing = next(path for path in (out_dir, *out_dir.resolve().parents) if path.exists())
    try:
        free_bytes = shutil.disk_usage(existing).free
    except OSError as error:
        raise storage_error(out_dir, error) from None
    needed_bytes = num_bytes + SPARE_BYTES
    if free_bytes < needed_bytes:
        raise StorageError(
            f"{out_dir} has {free_bytes / 1e9:.2f} GB free, fetching takes "
            f"{needed_bytes / 1e9:.2f} GB",
            "free space, choose another folder, or fetch fewer training shards",
        )


@contextlib.contextmanager
def _work_folder(out_dir: Path, places: Sequence[Path]) -> Iterator[Path]:
    """A hidden folder on the same disk; it goes in any case, empty places after an error too."""
    made = [
        path for place in places for path in (place, *place.parents) if not os.path.lexists(path)
    ]
    work: Path | None = None
    try:
        for place in places:
            make_folder(place)
        work = Path(tempfile.mkdtemp(prefix=".fetch-", dir=out_dir))
        yield work
    except OSError as error:
        raise storage_error(out_dir, error) from None
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def _fetch_all(
    hub: HubRepo, missing: Sequence[_Wanted], work: Path, vocab_size: int, report: Progress
) -> None:
    total_bytes = sum(item.remote.num_bytes for item in missing)
    done_bytes = 0
    for item in missing:
        _fetch_one(hub, item, work, vocab_size, _counter(report, done_bytes, total_bytes))
        done_bytes += item.remote.num_bytes
        report("fetch", done_bytes, total_bytes)


def _counter(report: Progress, before_bytes: int, total_bytes: int) -> Callable[[int], None]:
    done_bytes = before_bytes

    def count(further: int) -> None:
        nonlocal done_bytes
        done_bytes += further
        report("fetch", min(done_bytes, total_bytes), total_bytes)

    return count


def _fetch_one(
    hub: HubRepo, item: _Wanted, work: Path, vocab_size: int, on_bytes: Callable[[int], None]
) -> None:
    path = hub.download(item.remote, work, on_bytes)
    try:
        if item.split is None:
            load_tokenizer(path, vocab_size)
        else:
            open_shard(path, vocab_size)
    except DataError as error:
        problem = error.problem.replace(str(path), item.remote.path)
        raise DataError(
            f"{hub.repo} holds a wrong file: {problem}", "choose another repository or revision"
        ) from None
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    # Where a file system knows no locks, another's clearing up may have taken it.
    item.place.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, item.place)


def _write_manifest(
    dataset_dir: Path, tokenizer: Path, vocab_size: int, hub: HubRepo, wanted: Sequence[_Wanted]
) -> None:
    """Say what the shards must hash to; those of an earlier fetch that are still there too."""
    before: dict[str, Any] = read_manifest(dataset_dir) or {"splits": {}}
    splits = {}
    for split in ("train", "val"):
        shards = {
            shard["file"]: shard
            for shard in before["splits"].get(split, {}).get("shards", [])
            if (dataset_dir / shard["file"]).exists()
        }
        for item in wanted:
            if item.split == split:
                shards[item.place.name] = {
                    "file": item.place.name,
                    "tokens": read_count(item.place),
                    "sha256": item.remote.sha256 or file_sha256(item.place),
                }
        splits[split] = {"shards": [shards[name] for name in sorted(shards)]}
    manifest = {
        "format": MANIFEST_FORMAT,
        "dataset": dataset_dir.name,
        "vocab_size": vocab_size,
        "bos_id": BOS_ID,
        "tokenizer": {"file": tokenizer.name, "sha256": file_sha256(tokenizer)},
        "fetched": {"repo": hub.repo, "revision": hub.revision},
        "splits": splits,
    }
    atomic_write_json(dataset_dir / MANIFEST_NAME, manifest)
