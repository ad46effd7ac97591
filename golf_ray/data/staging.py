"""A data set that appears whole: made in a hidden folder beside its place, then moved there.

Invariant: at every moment the place holds the old data set with the old tokenizer, the new one
with the new tokenizer, or no data set; after an error, what was there before.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from golf_ray.data.tokenizer import tokenizer_name
from golf_ray.errors import DataError, UsageError
from golf_ray.records import make_folder, storage_error


class Staging:
    """The hidden folder and the places that its contents are meant for.

    Whoever fills it leaves the data set in `dataset` and the tokenizer in `tokenizer`, then calls
    `publish`.
    """

    def __init__(self, work: Path, dataset_place: Path, tokenizer_place: Path) -> None:
        self.work = work
        self.dataset = work / "dataset"
        self.tokenizer = work / "tokenizer.model"
        self.dataset_place = dataset_place
        self.tokenizer_place = tokenizer_place
        self.dataset.mkdir()

    def publish(self) -> None:
        """Move both to their places; what was there goes, or comes back if that fails."""
        for path in (*self.dataset.iterdir(), self.tokenizer):
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        moves = (
            (self.tokenizer, self.tokenizer_place, self.work / "old.model"),
            (self.dataset, self.dataset_place, self.work / "old"),
        )
        with contextlib.ExitStack() as undo:
            # The old data set goes first: it must never be seen beside the new tokenizer.
            for _, place, old in reversed(moves):
                if os.path.lexists(place):
                    os.replace(place, old)
                    undo.callback(os.replace, old, place)
            for new, place, _ in moves:
                os.replace(new, place)
                undo.callback(os.replace, place, new)
            undo.pop_all()


@contextlib.contextmanager
def staging(
    out_dir: Path, dataset: str, vocab_size: int, model: bytes | None, overwrite: bool
) -> Iterator[Staging]:
    """Make the hidden folder; remove it, and every folder made for it, after an error.

    Args:
        model: the tokenizer that will be published, where it is known beforehand.

    Raises:
        DataError: the data set exists already, or another tokenizer does, and is to be kept.
        StorageError: the folder cannot be written or has no space left.
    """
    if dataset in ("", ".", "..") or Path(dataset).name != dataset:
        raise UsageError(f"the data set's name '{dataset}' is no folder name", "give a plain name")
    place = out_dir / "datasets" / dataset
    tokenizer_place = out_dir / "tokenizers" / tokenizer_name(vocab_size)
    _refuse_existing(place, tokenizer_place, model, overwrite)
    wanted = (place.parent, tokenizer_place.parent, out_dir, *out_dir.parents)
    made = [path for path in wanted if not os.path.lexists(path)]
    work: Path | None = None
    done = False
    try:
        make_folder(place.parent)
        make_folder(tokenizer_place.parent)
        work = Path(tempfile.mkdtemp(prefix=f".{dataset}.", suffix=".tmp", dir=place.parent))
        yield Staging(work, place, tokenizer_place)
        done = True
    except OSError as error:
        raise storage_error(out_dir, error) from None
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
        if not done:
            for path in made:
                with contextlib.suppress(OSError):
                    path.rmdir()


def _refuse_existing(
    place: Path, tokenizer_place: Path, model: bytes | None, overwrite: bool
) -> None:
    if overwrite:
        return
    if os.path.lexists(place):
        raise DataError(
            f"{place} exists already", "choose another folder, or --overwrite to replace it"
        )
    try:
        present = tokenizer_place.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise storage_error(tokenizer_place, error) from None
    if present != model:
        raise DataError(
            f"another tokenizer {tokenizer_place} exists already",
            "use it with --tokenizer, choose another folder, or --overwrite to replace it",
        )
