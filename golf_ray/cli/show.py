"""`golf-ray show`: a run, a trial, a sweep, a ledger or a public log in the terminal."""

from __future__ import annotations

from typing import Annotated

import typer

from golf_ray.cli.frame import examples
from golf_ray.cli.options import AsJson, Debug
from golf_ray.cli.output import print_json
from golf_ray.cli.sweep import Storage
from golf_ray.errors import UsageError
from golf_ray.sweeps import DEFAULT_STORAGE

EXAMPLES = examples(
    "golf-ray show runs/first",
    "golf-ray show nightly",
    "golf-ray show nightly:7 --storage s3://bucket/golf",
    "golf-ray show scores/first",
    "golf-ray show logs/train_seed1337.log --json",
)


def show(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="A run folder, a sweep (name or folder), a trial of it (NAME:7), a ledger, or a "
            "log of the public program.",
        ),
    ],
    storage: Storage = DEFAULT_STORAGE,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what a run, trial, sweep, ledger or public log is and how it stands.

    Of a training: configuration where it is not its preset's, curve, speed, scores with what they
    are of, sizes, times, what happened, and where it ran. Of a sweep: table, best configuration as
    a command, failures by reason. Works while it runs and after it was killed.
    """
    from rich.console import Console

    if not run.strip():
        raise UsageError(f"RUN is '{run}', which names nothing", "give a run folder or a sweep")
    from golf_ray.results.gathering import account_of
    from golf_ray.results.screen import print_account

    account = account_of(run, storage)
    if as_json:
        print_json(account.to_dict())
        return
    print_account(account, Console(highlight=False, markup=False, emoji=False))
