"""Per-document scores of test-time training, from ledgers, as one table.

Reads what `evaluators.ledger` writes and trusts no more than it does: a segment whose name is not
its content's hash counts for nothing, and of a document that was scored twice the first counts.

Invariant: the rows of a ledger are in order of their documents, each once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from golf_ray import fingerprint
from golf_ray.errors import StorageError
from golf_ray.results.columns import make_column
from golf_ray.results.curves import REMOTE_THREADS, THREADS
from golf_ray.results.schema import DOCUMENTS

if TYPE_CHECKING:
    import pandas as pd

    from golf_ray.results.sources import Ledgers
    from trainers.storage import Storage

HEADER: Final = "header.json"
SEGMENTS: Final = "segments"
SUFFIX: Final = ".jsonl"

OnProblem = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scores:
    """A ledger's content."""

    weights: str | None
    header: str | None
    """Fingerprint of its header."""
    document: list[int]
    nats: list[float]
    tokens: list[int]
    num_bytes: list[int]
    problems: list[str]


def read_ledgers(ledgers: Sequence[Ledgers], on_problem: OnProblem) -> pd.DataFrame:
    """The scores of all ledgers in the order given; none where a ledger is not there.

    Args:
        on_problem: told one line of each thing that could not be read.
    """
    import pandas as pd

    # Trials that differ in nothing that is scored share an evaluation.
    places = {one.uri: one for one in ledgers}
    remote = any(one.storage.local is None for one in ledgers)
    with ThreadPoolExecutor(REMOTE_THREADS if remote else THREADS) as pool:
        read = dict(zip(places, pool.map(_read, places.values()), strict=True))
    for scores in read.values():
        for problem in scores.problems:
            on_problem(problem)
    found = [read[one.uri] for one in ledgers]
    counts = [len(scores.document) for scores in found]
    own: dict[str, list[Any]] = {
        "source": [one.source for one in ledgers],
        "trial": [one.trial for one in ledgers],
        "evaluation": [
            one.evaluation or scores.header for one, scores in zip(ledgers, found, strict=True)
        ],
        "weights": [scores.weights for scores in found],
    }
    rows: dict[str, list[list[Any]]] = {
        "document": [scores.document for scores in found],
        "nats": [scores.nats for scores in found],
        "tokens": [scores.tokens for scores in found],
        "bytes": [scores.num_bytes for scores in found],
    }
    places_of_rows = np.repeat(np.arange(len(ledgers)), np.asarray(counts, dtype=np.int64))
    columns: dict[str, Any] = {}
    for column in DOCUMENTS:
        if column.name in own:
            columns[column.name] = make_column(own[column.name], column.type).take(places_of_rows)
        else:
            flat: list[Any] = [value for values in rows[column.name] for value in values]
            columns[column.name] = make_column(flat, column.type)
    return pd.DataFrame(columns, copy=False)


def _read(ledger: Ledgers) -> _Scores:
    problems: list[str] = []
    scores: dict[int, tuple[float, int, int]] = {}
    header: dict[str, Any] | None = None
    folder = ledger.folder
    try:
        header = _header(folder, problems)
        segments = folder.child(SEGMENTS)
        for name in segments.names() if header is not None else []:
            if name.endswith(SUFFIX):
                _take_segment(segments.read_bytes(name) or b"", segments.uri_of(name), scores,
                              problems)  # fmt: skip
    except StorageError as error:
        problems.append(str(error))
    order = sorted(scores)
    return _Scores(
        weights=None if header is None else header.get("weights_kind"),
        header=None if header is None else fingerprint.of_value(header),
        document=order,
        nats=[scores[i][0] for i in order],
        tokens=[scores[i][1] for i in order],
        num_bytes=[scores[i][2] for i in order],
        problems=problems,
    )


def _header(folder: Storage, problems: list[str]) -> dict[str, Any] | None:
    data = folder.read_bytes(HEADER)
    if data is None:
        return None
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        problems.append(f"{folder.uri_of(HEADER)} is damaged")
        return None
    return found


def _take_segment(
    content: bytes, where: str, scores: dict[int, tuple[float, int, int]], problems: list[str]
) -> None:
    name = where.partition("?")[0].rpartition("/")[2]
    if hashlib.sha256(content).hexdigest() != name.removesuffix(SUFFIX):
        problems.append(f"{where} is damaged and counts for nothing")
        return
    try:
        for text in content.splitlines():
            line = json.loads(text)
            of = (float.fromhex(line["nats"]), int(line["tokens"]), int(line["bytes"]))
            scores.setdefault(int(line["document"]), of)
    except (ValueError, TypeError, LookupError):
        problems.append(f"{where} holds what is no score")
