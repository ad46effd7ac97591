"""`golf-ray quickstart`: the whole pipeline on real text, from nothing to a table."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from golf_ray.cli.frame import examples
from golf_ray.cli.options import AsJson, Debug
from golf_ray.cli.output import Bar, count, duration, print_json, progress_bar

if TYPE_CHECKING:
    from golf_ray.sweep.quickstart import Quickstart

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
    from golf_ray.sweep import quickstart as steps

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
            on_trial=lambda record: _tell(bar, record, plan.num_trials, as_json),
            on_status=lambda n, text: bar.update(text, n, plan.num_trials, phase="search"),
        )
    wall_s = time.monotonic() - began_s
    if as_json:
        print_json(_document(done, wall_s))
    else:
        _print(done, wall_s)
    if done.num_failed:
        raise typer.Exit(1)


def _tell(bar: Bar, record: dict[str, Any], num_trials: int, quiet: bool) -> None:
    if quiet:
        return
    name = f"trial {record['trial']} of {num_trials}"
    if record["status"] != "done":
        bar.say(f"{name}: {record['status']}: {record['reason']}")
        return
    trained = "trained" if record["trained"] else "training shared"
    bar.say(
        f"{name}: {trained}, int6 {record['int6_bpb']:.4f} bpb, "
        f"with test-time training {record['ttt_bpb']:.4f}"
    )


def _document(done: Quickstart, wall_s: float) -> dict[str, Any]:
    from golf_ray.sweep.table import read_records

    return {
        "wall_s": wall_s,
        "folder": str(done.plan.folder),
        "csv": str(done.csv),
        "parquet": str(done.parquet),
        "num_trials": done.plan.num_trials,
        "num_failed": done.num_failed,
        "num_trainings": int(done.frame["trained"].sum()),
        "trials": read_records(done.plan.trials_folder),
    }


def _print(done: Quickstart, wall_s: float) -> None:
    from rich.console import Console

    from golf_ray.sweep.table import screen_table

    console = Console(highlight=False, soft_wrap=True)
    console.print(screen_table(done.frame))
    root = done.plan.folder.parent
    trainings = int(done.frame["trained"].sum())
    console.print(
        f"{len(done.frame)} trials, {trainings} trainings, {done.num_failed} failed, "
        f"{duration(wall_s)}. Lower bpb (bits per byte) is better; best in bold."
    )
    console.print(f"everything lies in {root}")
    for place, what in (
        (done.csv, "the table as CSV"),
        (done.parquet, "the table as Parquet"),
        (done.plan.trials_folder, "a record a trial"),
        (done.plan.stages_folder, "checkpoints, artifacts, training curves"),
        (done.plan.folder / "optuna.db", "the Optuna study"),
        (root / "data", "shards and tokenizer"),
    ):
        console.print(f"  {place.relative_to(root)!s:<22}{what}")
