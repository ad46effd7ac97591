"""`golf-ray compare`: what may be said of the difference of two settings, or of two artifacts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from golf_ray.cli.frame import NO_VALUE, examples
from golf_ray.cli.options import AsJson, Debug
from golf_ray.cli.output import print_json
from golf_ray.cli.sweep import Storage
from golf_ray.errors import UsageError
from golf_ray.sweeps import DEFAULT_STORAGE

if TYPE_CHECKING:
    from golf_ray.results.compared import Compared

EXAMPLES = examples(
    "golf-ray compare nightly-confirm:baseline 'nightly-confirm:trial 7'",
    "golf-ray compare 'runs/old_*' 'runs/new_*' --score val_bpb",
    "golf-ray compare scores/a scores/b",
    "golf-ray compare 'logs/*.log' --against 1.0810",
    "golf-ray compare --values 1.0726,1.0732,1.0743 --against 1.0810",
    "golf-ray compare --values 2.7706,2.7723,2.7749 --nats --against 2.7923",
)
NUMBERS = "Numbers"


def compare(
    sides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="BASELINE SIDE...",
            help="Each a run folder, log, ledger, trial (NAME:7), label (NAME:baseline) or the "
            "best of a sweep (NAME:best); several seeds of one setting with commas or '*'.",
        ),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(
            "--score",
            metavar="COLUMN",
            help="ttt_bpb, int6_bpb, val_bpb or final_ttt_bpb; by default the first of them that "
            "all have.",
        ),
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(
            "--margin",
            min=0.0,
            metavar="X",
            help="Test for a gain of more than this, too: in nats a token; of --values in their "
            "unit. By default the field's rule for a record, 0.005 nats; none for --values in bpb.",
        ),
    ] = None,
    storage: Storage = DEFAULT_STORAGE,
    against: Annotated[
        float | None,
        typer.Option(
            "--against",
            metavar="NUMBER",
            rich_help_panel=NUMBERS,
            help="A published score, taken as exact, in place of a baseline.",
        ),
    ] = None,
    values: Annotated[
        str | None,
        typer.Option(
            "--values",
            metavar="A,B",
            rich_help_panel=NUMBERS,
            help="Scores, one a seed, in place of a side.",
        ),
    ] = None,
    nats: Annotated[
        bool,
        typer.Option(
            "--nats",
            metavar=NO_VALUE,
            rich_help_panel=NUMBERS,
            help="The numbers are nats a token, not bits a byte.",
        ),
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare settings over seeds, and artifacts document by document.

    Over seeds by Welch's test, with the difference's interval, the p-value of being better at all
    and by more than 0.005 nats, and the smallest difference that so many seeds show. One seed gives
    no p-value. Trials of one training count as one; the same seed on both sides is no pair.
    """
    from golf_ray.results.compared import compare_numbers, compare_places
    from golf_ray.sweeps.confirmation import RECORD_GAIN_NATS

    found: Compared
    if values is not None:
        if sides or against is None:
            raise UsageError("--values are compared with a number", "give --against, and no side")
        unit = "nats" if nats else "bpb"
        if nats and margin is None:
            margin = RECORD_GAIN_NATS
        found = compare_numbers(_numbers(values), against, unit=unit, margin=margin)  # type: ignore[arg-type]
    else:
        if not sides:
            raise UsageError("there is nothing to compare", "name two sides, or give --values")
        if nats:
            raise UsageError("--nats says what --values are", "leave it out, or give --values")
        found = compare_places(
            sides,
            storage=storage,
            score=score,
            against=against,
            margin=RECORD_GAIN_NATS if margin is None else margin,
        )
    if as_json:
        print_json(found.to_dict())
        return
    import textwrap

    for line in found.lines():
        # In a pipe a line stays whole.
        print(textwrap.fill(line, _width(), subsequent_indent="    ") if line else "")


def _width() -> int:
    import shutil
    import sys

    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000


def _numbers(text: str) -> list[float]:
    found = []
    for part in text.split(","):
        try:
            found.append(float(part))
        except ValueError:
            raise UsageError(
                f"--values holds '{part}', which is no number", "give them as 1.0726,1.0732"
            ) from None
    return found
