"""`golf-ray export`: results as a table in a file, for programs or for people."""

from __future__ import annotations

import enum
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from golf_ray.cli.frame import NO_VALUE, examples
from golf_ray.cli.options import AsJson, Debug
from golf_ray.cli.output import number_of, print_json
from golf_ray.cli.sweep import Storage
from golf_ray.errors import StorageError, UsageError
from golf_ray.sweeps import DEFAULT_STORAGE

if TYPE_CHECKING:
    import pandas as pd

    from golf_ray.results.reading import Results

EXAMPLES = examples(
    "golf-ray export nightly --out trials.csv",
    "golf-ray export golf-sweeps runs/a --out all.parquet",
    "golf-ray export nightly --columns 'trial,train.*,*_bpb' --sort ttt_bpb",
    "golf-ray export nightly --where status==done --where 'ttt_bpb < 1.09'",
    "golf-ray export nightly-confirm --seeds --out seeds.tex",
    "golf-ray export nightly --group-by train.warmdown_frac",
    "golf-ray export nightly --table intervals --out curves.parquet",
)

ROWS, FILE = "Rows and columns", "File"


class Format(enum.StrEnum):
    """Formats of files."""

    CSV = "csv"
    PARQUET = "parquet"
    JSON = "json"
    MD = "md"
    LATEX = "latex"
    HTML = "html"


class Which(enum.StrEnum):
    """Tables of results."""

    TRIALS = "trials"
    INTERVALS = "intervals"
    DOCUMENTS = "documents"


def export(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PATH...",
            help="Sweeps by name or folder, storages, run folders, logs of the public program; "
            "all of the storage's sweeps where none is given.",
        ),
    ] = None,
    output_format: Annotated[
        Format | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="csv, parquet, json, md, latex or html; by default by --out's ending, else csv.",
            rich_help_panel=FILE,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Write there, whole or not at all; by default to standard output.",
            rich_help_panel=FILE,
        ),
    ] = None,
    table: Annotated[
        Which,
        typer.Option(
            metavar="TABLE",
            help="trials, intervals (training curves) or documents (scores by document).",
        ),
    ] = Which.TRIALS,
    columns: Annotated[
        str | None,
        typer.Option(
            "--columns",
            metavar="A,B",
            help="Names, patterns as '*_bpb', any field of the configuration; 'train.*' is all "
            "of that section.",
            rich_help_panel=ROWS,
        ),
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--where",
            metavar="EXPR",
            help="Rows to keep: 'ttt_bpb < 1.09', 'status in done,failed', 'reason ~ finite', "
            "'artifact is missing'; repeated, all must hold.",
            rich_help_panel=ROWS,
        ),
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option(
            "--sort",
            metavar="A,-B",
            help="By A, then by B from the largest; missing values last.",
            rich_help_panel=ROWS,
        ),
    ] = None,
    group_by: Annotated[
        str | None,
        typer.Option(
            "--group-by",
            metavar="A,B",
            help="One row for trials that are alike in these columns.",
            rich_help_panel=ROWS,
        ),
    ] = None,
    seeds: Annotated[
        bool,
        typer.Option(
            "--seeds",
            metavar=NO_VALUE,
            help="One row for trials that differ in train.seed alone.",
            rich_help_panel=ROWS,
        ),
    ] = False,
    all_columns: Annotated[
        bool,
        typer.Option(
            "--all-columns",
            metavar=NO_VALUE,
            help="Keep columns without a value in any row, which md, latex and html leave out.",
            rich_help_panel=ROWS,
        ),
    ] = False,
    storage: Storage = DEFAULT_STORAGE,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write results as a table: of one sweep or many, finished or running.

    csv, parquet and json keep every digit and all types. md, latex and html round: bits per byte
    to 5 digits, or to the second digit of a standard error or deviation beside them.

    Groups have n, mean, sample standard deviation and 95% interval of each score, over trainings:
    trials that share one are averaged first and count as one, so n is the number of trainings.
    Only trials that are done count; others are counted beside them.

    What cannot be read is said on standard error, a line each, and the rest is exported. With
    --json and --out a summary is printed; with --json alone the table is.
    """
    from golf_ray.results.querying import answer, parse_query, without_silent

    chosen = _format(output_format, out, as_json)
    if chosen is Format.PARQUET and out is None:
        _require_pipe()
    query = parse_query(
        table=table.value, columns=columns, where=where or (), sort=sort, group_by=group_by,
        seeds=seeds,
    )  # fmt: skip
    results = _load(paths or [], storage, table)
    frame = answer(
        query, results, lambda note: print(f"golf-ray: note: {note}", file=sys.stderr, flush=True)
    )
    if chosen in (Format.MD, Format.LATEX, Format.HTML) and not all_columns:
        frame = without_silent(frame, query)
    data = _encode(frame, chosen, table, paths or [storage])
    _deliver(data, out)
    _report(results, frame, out, chosen, table, as_json)


def _format(given: Format | None, out: str | None, as_json: bool) -> Format:
    if as_json and out is None:
        if given not in (None, Format.JSON):
            raise UsageError(
                f"--json and --format {given.value if given else ''} both want standard output",
                "add --out FILE, or leave one of them out",
            )
        return Format.JSON
    if given is not None:
        return given
    if out is None:
        return Format.CSV
    from golf_ray.results.formats import format_of

    return Format(format_of(out))


def _require_pipe() -> None:
    if sys.stdout.isatty() or getattr(sys.stdout, "buffer", None) is None:
        raise UsageError("Parquet is no text for a terminal", "add --out FILE, or use a pipe")


def _load(paths: Sequence[str], storage: str, table: Which) -> Results:
    from golf_ray.results.reading import load_results

    results = load_results(
        *places(paths, storage),
        intervals=table is Which.INTERVALS,
        documents=table is Which.DOCUMENTS,
    )
    for line in results.problems:
        print(f"golf-ray: left out: {line}", file=sys.stderr, flush=True)
    nothing = results.trials.empty and results.intervals.empty and results.documents.empty
    if nothing and results.problems:
        raise StorageError(
            "nothing could be read", f"mend the {number_of(len(results.problems), 'problem')}"
        )
    return results


def places(paths: Sequence[str], storage: str) -> list[str]:
    """Where results lie that a user names: folders, files and URIs, or names of sweeps.

    Args:
        paths: as given; the storage itself where there are none.
        storage: where sweeps are kept.

    Raises:
        UsageError: a name is neither, or there is no sweep at all.
    """
    from pathlib import Path

    from golf_ray.errors import nearest
    from trainers.storage import Storage as Folder

    sweeps = Folder(storage).child("sweeps")
    if not paths:
        if not sweeps.names():
            raise UsageError(f"there is no sweep in {storage}", "name a PATH, or give --storage")
        return [storage]
    found = []
    for path in paths:
        if "://" in path or Path(path).expanduser().exists():
            found.append(path)
        elif "/" not in path and sweeps.child(path).exists("sweep.json"):
            found.append(sweeps.child(path).uri)
        else:
            known = sweeps.names()
            remedy = nearest(path, known) if known else "check the path, or give --storage"
            raise UsageError(f"'{path}' is no path, nor a sweep in {storage}", remedy)
    return found


def _encode(frame: pd.DataFrame, chosen: Format, table: Which, paths: Sequence[str]) -> bytes:
    from golf_ray.results.describing import described
    from golf_ray.results.formats import to_bytes
    from trainers.storage import shown

    title = f"{table.value.capitalize()} of {', '.join(shown(path) for path in paths)}"
    columns = described(frame, table.value)
    return to_bytes(frame, columns, chosen.value, table=table.value, title=title)


def _deliver(data: bytes, out: str | None) -> None:
    """Write to a file, whole or not at all, or to standard output."""
    from pathlib import Path

    from trainers.storage import Storage as Folder

    if out is None:
        buffer = getattr(sys.stdout, "buffer", None)
        if buffer is None:
            sys.stdout.write(data.decode())
        else:
            sys.stdout.flush()
            buffer.write(data)
            buffer.flush()
        return
    if "://" in out:
        folder, _, name = out.rpartition("/")
        Folder(folder).write_bytes(name, data)
        return
    path = Path(out).expanduser()
    if path.exists() and not path.is_file() and not path.is_dir():
        # A device or a pipe is written to and never replaced.
        path.write_bytes(data)
        return
    # Through a link, whose target is the file that is meant.
    path = path.resolve()
    Folder(path.parent).write_bytes(path.name, data)


def _report(
    results: Results,
    frame: pd.DataFrame,
    out: str | None,
    chosen: Format,
    table: Which,
    as_json: bool,
) -> None:
    rows, width = frame.shape
    said = f"{number_of(rows, 'row')}, {number_of(width, 'column')}"
    if results.problems:
        left = number_of(len(results.problems), "problem")
        print(f"golf-ray: exported {said}; {left} of reading above", file=sys.stderr, flush=True)
    if out is None:
        return
    if as_json:
        print_json({
            "file": out, "format": chosen.value, "table": table.value, "rows": rows,
            "columns": list(frame.columns), "problems": list(results.problems),
        })  # fmt: skip
    else:
        print(f"{out}: {said}")
