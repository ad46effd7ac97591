"""`golf-ray quickstart`: the whole pipeline on real text, from nothing to a table."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from golf_ray.cli.frame import examples
from golf_ray.cli.options import AsJson, Debug
from golf_ray.cli.output import count, duration, print_json, progress_bar
from golf_ray.cli.sweep import trial_line

if TYPE_CHECKING:
    from golf_ray.sweeps.quickstart import Quickstart

EXAMPLES = examples("golf-ray quickstart", "golf-ray quickstart --dir /tmp/golf --json")


def quickstart(
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir", metavar="DIR", help="A new folder for it all; quickstart-TIME if not given."
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Go from real text to a table of trials, on this machine, in a few minutes.

    Python's own library becomes a data set; a search over warmdown, Muon momentum, clip sigmas
    and TTT chunk size trains on Ray, quantises, and scores with test-time training.
    """
    from golf_ray.sweeps import quickstart as steps

    began_s = time.monotonic()
    folder = (directory or Path(f"quickstart-{time.strftime('%Y%m%d-%H%M%S')}")).absolute()
    steps.begin(folder)
    with progress_bar() as bar:
        built = steps.build_data(folder, bar.phase)
        plan = steps.plan_quickstart(folder)
        if not as_json:
            bar.say(
                f"data: {count(built.train.tokens)} tokens of Python's library to train on, "
                f"{count(built.val.tokens)} to score"
            )
            bar.say(
                f"search: {plan.num_trials} trials on {plan.num_trainings} trainings of "
                f"{plan.base.cluster.num_workers} workers, scored on "
                f"{plan.base.cluster.eval_actors} actors"
            )
        done = steps.run_quickstart(
            plan,
            on_trial=lambda record: None if as_json else bar.say(trial_line(record, plan)),
            on_status=lambda n, text: bar.update(text, n, plan.num_trials, phase="search"),
        )
    wall_s = time.monotonic() - began_s
    if as_json:
        print_json(_document(done, wall_s))
    else:
        _print(done, wall_s)
    if done.outcome.num_failed:
        raise typer.Exit(1)


def _document(done: Quickstart, wall_s: float) -> dict[str, Any]:
    from golf_ray.sweeps.table import read_records

    return {
        "wall_s": wall_s,
        "folder": done.plan.storage,
        "csv": done.plan.folder.uri_of("trials.csv"),
        "parquet": done.plan.folder.uri_of("trials.parquet"),
        "num_trials": done.plan.num_trials,
        "num_failed": done.outcome.num_failed,
        "num_trainings": int(done.frame["trained"].fillna(False).sum()),
        "trials": read_records(done.plan.trials_folder),
    }


def _print(done: Quickstart, wall_s: float) -> None:
    from rich.console import Console

    from golf_ray.sweeps.commands import command
    from golf_ray.sweeps.table import screen_table

    console = Console(highlight=False, soft_wrap=True)
    console.print(screen_table(done.frame))
    trainings = int(done.frame["trained"].fillna(False).sum())
    console.print(
        f"{len(done.frame)} trials, {trainings} trainings, {done.outcome.num_failed} failed, "
        f"{duration(wall_s)}. Lower bpb (bits per byte) is better; best in bold."
    )
    console.print(f"everything lies in {done.plan.storage}")
    sweep = f"sweeps/{done.plan.name}"
    for place, what in (
        (f"{sweep}/trials.csv", "the table as CSV"),
        (f"{sweep}/trials.parquet", "the table as Parquet"),
        (f"{sweep}/trials", "a record a trial"),
        (f"{sweep}/optuna.db", "the Optuna study"),
        ("stages", "checkpoints, artifacts, training curves"),
        ("data", "shards and tokenizer"),
    ):
        console.print(f"  {place:<34}{what}")
    for verb, what in (("report", "pictures in one file"), ("show", "what can be said of it")):
        console.print(f"{what}: {command(verb, done.plan.name, done.plan.storage)}")
