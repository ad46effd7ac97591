"""`golf-ray train`: train on Ray workers, or in this process."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Annotated

import typer

from golf_ray.cli.frame import NO_VALUE, examples
from golf_ray.cli.options import (
    Address,
    AsJson,
    Assignments,
    ConfigFile,
    ConfigOptions,
    DataDir,
    Debug,
    Preset,
    UpstreamFile,
    resolve_config,
)
from golf_ray.cli.output import Bar, count, duration, print_json, print_report, progress_bar
from golf_ray.errors import UsageError

if TYPE_CHECKING:
    from golf_ray.api import Training
    from golf_ray.config import Config
    from trainers.run_record import ProgressEvent

EXAMPLES = examples(
    "golf-ray train --preset laptop --run-dir runs/first",
    "golf-ray train --preset laptop --workers 1 --set train.iterations=200",
    "golf-ray train --preset record --data-dir /mnt/data --address auto",
    "golf-ray train --run-dir runs/first --resume",
)


def train(
    run_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="The run's folder; runs/NAME-TIME where not given."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", metavar=NO_VALUE, help="Go on with the run in --run-dir, as configured."
        ),
    ] = False,
    in_process: Annotated[
        bool,
        typer.Option(
            "--in-process", metavar=NO_VALUE, help="Train here, with no Ray, as one rank."
        ),
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Ray workers: cluster.num_workers.")
    ] = None,
    address: Address = None,
    preset: Preset = None,
    config: ConfigFile = None,
    upstream_config: UpstreamFile = None,
    assignments: Assignments = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train a model on Ray workers, or in this process.

    The run's folder holds its configuration, a record for every interval, the last checkpoints
    and, in the end, final_model.pt. A run that was stopped goes on with --resume.
    """
    options = ConfigOptions(
        preset=preset,
        config=config,
        upstream_config=upstream_config,
        assignments=tuple(assignments or ()),
        data_dir=data_dir,
    )
    if resume and run_dir is None:
        raise UsageError("--resume needs the run", "add --run-dir DIR")
    if in_process and (workers is not None or address is not None):
        raise UsageError("--in-process uses no Ray workers", "leave one of them out")
    chosen = _configuration(options, workers, run_dir if resume else None)
    folder = run_dir or f"runs/{chosen.name}-{time.strftime('%Y%m%d-%H%M%S')}"

    from golf_ray import api

    with progress_bar() as bar:
        bar.update("starting", 0, 0)
        try:
            done = api.train(
                chosen,
                run_dir=folder,
                resume=resume,
                in_process=in_process,
                address=address,
                on_progress=lambda event: _show(bar, event),
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"go on with 'golf-ray train --resume --run-dir {folder}'"
            ) from None
    if as_json:
        print_json(done.to_dict())
    else:
        print_report(*_report(done))


def _configuration(options: ConfigOptions, workers: int | None, run_dir: str | None) -> Config:
    from golf_ray import api

    carried = None if run_dir is None else api.read_run_config(run_dir)
    changes = {} if workers is None else {"cluster.num_workers": workers}
    config = resolve_config(options, carried, changes=changes)
    if run_dir is not None and not options.names_parts:
        api.require_trusted(config, run_dir)
    return config


def _show(bar: Bar, event: ProgressEvent) -> None:
    if event.message is not None:
        bar.say(event.message)
    if event.phase != "training":
        bar.update(event.phase, 0, 0)
        return
    facts = [] if math.isnan(event.loss_nats) else [f"loss {event.loss_nats:.4f}"]
    if event.tokens_per_s:
        facts.append(f"{event.tokens_per_s:,.0f} tok/s")
    label = f"step {event.step:,}/{event.num_steps:,}"
    detail = " ".join(facts)
    bar.update(
        label,
        event.step,
        event.num_steps,
        detail,
        phase="training",
        seconds_left=event.seconds_left,
    )


def _report(done: Training) -> tuple[str, list[tuple[str, str]]]:
    result, outcome = done.result, done.outcome
    again = f", resumed from step {result.resumed_from_step}" if result.resumed_from_step else ""
    rows = [
        ("steps", f"{count(result.steps)}, {count(result.tokens)} tokens{again}"),
        ("loss", f"{result.train_loss_nats:.4f} nats a token in the last step"),
        ("time", duration(result.elapsed_s)),
        ("result", done.final_model),
    ]
    speeds = (("", result.tokens_per_s), (" looping", result.tokens_per_s_looping))
    told = [f"{speed:,.0f} tokens/s{name}" for name, speed in speeds if speed is not None]
    if told:
        rows.insert(3, ("speed", ", ".join(told)))
    if result.peak_memory_bytes is not None:
        rows.insert(-1, ("GPU memory", f"{result.peak_memory_bytes / 1e9:.1f} GB at most"))
    if done.val_bpb is not None:
        rows.insert(2, ("validation", f"{done.val_bpb:.4f} bpb of the raw weights, packed"))
    if outcome is not None:
        rows.insert(0, ("workers", f"{outcome.num_workers} on {outcome.device}"))
        rows += [("restarted", restart.describe()) for restart in outcome.restarts]
    return f"trained {done.run_dir}", rows
