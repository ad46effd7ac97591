"""`golf-ray status`: how a sweep stands, from its files alone, once or while it runs."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from golf_ray.cli.frame import NO_VALUE, examples
from golf_ray.cli.options import AsJson, Debug
from golf_ray.cli.output import number_of, print_json
from golf_ray.cli.sweep import Storage
from golf_ray.errors import GolfRayError, UsageError
from golf_ray.sweeps import DEFAULT_STORAGE

if TYPE_CHECKING:
    from golf_ray.results.standing import Look
    from golf_ray.results.watching import Watch

EXAMPLES = examples(
    "golf-ray status",
    "golf-ray status sweep-20260101-120000",
    "golf-ray status nightly --watch",
    "golf-ray status nightly --storage s3://bucket/golf --json",
)
TERMINATED = 128 + signal.SIGTERM


def status(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="A sweep; all of the storage's where not given."),
    ] = None,
    storage: Storage = DEFAULT_STORAGE,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch",
            metavar=NO_VALUE,
            help="Look again and again until the sweep ends; a line for each change in a pipe.",
        ),
    ] = False,
    every: Annotated[
        float,
        typer.Option(
            "--every",
            min=0.1,
            metavar="S",
            help="Seconds between looks of --watch; 5 or more where the storage is a URI.",
        ),
    ] = 2.0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say how a sweep stands: running, interrupted or ended, and its trials.

    Reads what the sweep writes, so it works from any machine that reaches the storage, while the
    sweep runs and after its driver was killed.

    With --watch it ends when the sweep does (status 0), or with Ctrl-C (status 130), which the
    sweep does not notice. With --watch and --json it waits for the end, then prints the document.
    """
    if name is None:
        if watch:
            raise UsageError("--watch needs a sweep", "name one of those that 'status' lists")
        _all_of(storage, as_json)
        return
    from golf_ray.results.standing import Sweep, SweepReader
    from golf_ray.sweeps.plan import read_plan

    reader = SweepReader(Sweep.of_plan(read_plan(storage, name)))
    if watch:
        from golf_ray.results.watching import Watch

        look = _watched(Watch(reader, every), quiet=as_json)
    else:
        look = reader.look()
    if as_json:
        print_json({**look.summary(), "trials": look.records})
    elif not watch or sys.stdout.isatty():
        _print(look)


def _all_of(storage: str, as_json: bool) -> None:
    from golf_ray.results.standing import Sweep, SweepReader
    from golf_ray.results.words import summary_line
    from golf_ray.sweeps.plan import read_plan, sweep_names

    looks, problems = [], []
    for name in sweep_names(storage):
        try:
            sweep = Sweep.of_plan(read_plan(storage, name))
            looks.append(SweepReader(sweep, describe_running=False).look())
        except GolfRayError as error:
            problems.append(str(error))
    if as_json:
        found = [look.summary() for look in looks]
        print_json({"storage": storage, "sweeps": found, "problems": problems})
        return
    if not looks and not problems:
        print(f"there is no sweep in {storage}")
    for look in looks:
        print(summary_line(look))
    for problem in problems:
        print(problem, file=sys.stderr)


def _watched(watch: Watch, *, quiet: bool) -> Look:
    """The last look at a sweep."""
    from rich.console import Console

    from golf_ray.results.watching import watch_lines, watch_screen
    from golf_ray.results.words import summary_line

    console = Console(highlight=False, markup=False, emoji=False)
    try:
        if quiet:
            return watch_lines(watch, lambda line: None)
        if not sys.stdout.isatty() or console.is_dumb_terminal:
            return watch_lines(watch, lambda line: print(line, flush=True))
        with _restored_when_terminated():
            return watch_screen(watch, console)
    except KeyboardInterrupt:
        # Leaving is how one stops to look: no error, and yet not the end of the sweep.
        if watch.last is not None and sys.stdout.isatty() and not quiet:
            print(summary_line(watch.last))
        raise typer.Exit(128 + signal.SIGINT) from None


@contextlib.contextmanager
def _restored_when_terminated() -> Iterator[None]:
    """Let the terminal get its own screen and cursor back also where this process is ended."""

    def leave(number: int, frame: Any) -> None:
        raise typer.Exit(TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print(look: Look) -> None:
    from rich.console import Console

    from golf_ray.results.drawing import clean
    from golf_ray.results.page import broken
    from golf_ray.results.schema import FINAL
    from golf_ray.results.sweep_screen import MOST_TRIALS, fitting_table, leading
    from golf_ray.results.words import outcome, summary_line

    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)

    def tell(text: str) -> None:
        console.print("\n".join(broken(text, console.width)))

    tell(summary_line(look))
    shown = leading(look.records, look.objective)
    if shown:
        table, left_out = fitting_table(shown, look.objective, console)
        console.print(table)
        if len(shown) < len(look.records):
            tell(f"the best {len(shown)} of {len(look.records):,}; 'golf-ray export' has all")
        if left_out:
            tell(f"no room for: {', '.join(left_out)}")
    bad = [r for r in look.records if r["status"] in FINAL and r["status"] != "done"]
    for record in bad[-MOST_TRIALS:]:
        tell(outcome(look, record, improved=False))
    if len(bad) > MOST_TRIALS:
        tell(f"and {len(bad) - MOST_TRIALS:,} more before these")
    for text in (*look.doing, *look.problems):
        tell(clean(text))
    again = look.go_on
    if again is not None:
        left = number_of(look.sweep.num_trials - len(look.ended), "trial")
        line = f"{left} left; go on with: {again}"
        # A command that is broken over lines cannot be copied.
        console.print(line if len(line) <= console.width else f"{left} left; go on with:\n{again}")
