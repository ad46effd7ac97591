"""`golf-ray report`: one page with everything that some results say, and its pictures as files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from golf_ray.cli.frame import examples
from golf_ray.cli.options import AsJson, Debug
from golf_ray.cli.output import count, number_of, print_json
from golf_ray.cli.sweep import Storage
from golf_ray.sweeps import DEFAULT_STORAGE

EXAMPLES = examples(
    "golf-ray report nightly",
    "golf-ray report nightly second --out both.html --title 'Warmdown'",
    "golf-ray report nightly --pictures figures",
    "golf-ray report runs/first logs/train_seed1337.log",
)


def report(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PATH...",
            help="Sweeps by name or folder, storages, run folders, ledgers, logs of the public "
            "program; all of the storage's sweeps where none is given.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="Write the page there.")
    ] = Path("report.html"),
    pictures: Annotated[
        Path | None,
        typer.Option(
            "--pictures", metavar="DIR", help="Write each picture as PNG and SVG, for papers."
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            "--objective",
            metavar="COLUMN",
            help="What says which trial is best; the sweep's own if not given.",
        ),
    ] = None,
    title: Annotated[
        str | None, typer.Option("--title", metavar="TEXT", help="Of the page.")
    ] = None,
    storage: Storage = DEFAULT_STORAGE,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a report: one HTML file that needs no network, and is the same for whoever opens it.

    Best configuration, table, history, knobs that matter, bpb against bytes, training curves,
    scores by document, use of GPUs and failures. Works while a sweep runs.
    """
    from golf_ray.cli.export import places
    from golf_ray.results.pictures.picture import drawn, write_pictures
    from golf_ray.results.reading import load_results
    from golf_ray.results.report import make_report, write_report

    results = load_results(*places(paths or [], storage), documents=True)
    for problem in results.problems:
        print(problem, file=sys.stderr)
    made = make_report(results, objective=objective, title=title)
    size = write_report(made, out)
    written = [] if pictures is None else write_pictures(drawn(made.pictures), pictures)
    if as_json:
        print_json(
            {
                "file": str(out),
                "bytes": size,
                "trials": len(results.trials),
                "pictures": [str(path) for path in written],
                "problems": list(results.problems),
            }
        )
        return
    print(f"{number_of(len(results.trials), 'trial')}: {out} ({count(size)} bytes)")
    if pictures is not None:
        print(f"{number_of(len(written), 'picture')} in {pictures}")
