"""`golf-ray sweep`: search over knobs of any stage, where nothing is trained twice."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from golf_ray.cli.output import count, duration, number_of, print_json, progress_bar
from golf_ray.errors import UsageError
from golf_ray.sweeps import DEFAULT_STORAGE

if TYPE_CHECKING:
    from golf_ray.sweeps.plan import SweepPlan
    from golf_ray.sweeps.runner import SweepOutcome

EXAMPLES = examples(
    "golf-ray sweep laptop --preset laptop --data-dir data --plan",
    "golf-ray sweep record --steps 4500 --trials 24 --sample 2000 --address auto",
    "golf-ray sweep quantization --checkpoint runs/a --objective int6 --trials 40",
    "golf-ray sweep ./my_space.py:SPACE --preset laptop --sampler gp --max-hours 8",
    "golf-ray sweep --resume sweep-20260101-120000",
)

SPACE_PANEL, LIMITS_PANEL = "Search", "Limits"
OBJECTIVES = {"bpb": "ttt_bpb", "ttt": "ttt_bpb", "int6": "int6_bpb", "bytes": "total_bytes"}
"""What --objective may name, and what it is in a record."""

Storage = Annotated[
    str,
    typer.Option(
        "--storage",
        metavar="DIR|URI",
        help="Where sweeps and stage outputs are kept; all nodes must be able to write there.",
    ),
]

MAY_CHANGE = frozenset(
    "resume storage plan_only max_gpu_hours max_hours concurrent price address as_json "
    "debug".split()
)
"""Options that go with --resume: all others are part of what a sweep is."""


def sweep(
    context: typer.Context,
    space: Annotated[
        str | None,
        typer.Argument(
            metavar="SPACE",
            help="A space by name (record, training, quantization, adaptation, schedule, laptop), "
            "or FILE.py:NAME, or module:NAME.",
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="NAME",
            help="Go on with a sweep as it was planned; --max-gpu-hours, --max-hours and "
            "--concurrent may be given anew.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="What to call it; sweep-TIME if not given."),
    ] = None,
    storage: Storage = DEFAULT_STORAGE,
    plan_only: Annotated[
        bool,
        typer.Option(
            "--plan",
            metavar=NO_VALUE,
            help="Say what it will cost and what it can find, and start nothing.",
        ),
    ] = False,
    trials: Annotated[
        int,
        typer.Option(
            "--trials", min=1, metavar="N", rich_help_panel=SPACE_PANEL, help="Trials in all."
        ),
    ] = 8,
    evals_per_training: Annotated[
        int,
        typer.Option(
            "--evals-per-training",
            min=1,
            metavar="M",
            rich_help_panel=SPACE_PANEL,
            help="Trials that share one training; 1 trains for each.",
        ),
    ] = 4,
    sampler: Annotated[
        str,
        typer.Option(
            "--sampler",
            metavar="NAME",
            rich_help_panel=SPACE_PANEL,
            help="tpe, random, gp, nsga2, qmc or cmaes.",
        ),
    ] = "tpe",
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            metavar="N",
            rich_help_panel=SPACE_PANEL,
            help="Of the sampler; the trainings' is --set train.seed.",
        ),
    ] = 0,
    objective: Annotated[
        str,
        typer.Option(
            "--objective",
            metavar="NAME[,NAME]",
            rich_help_panel=SPACE_PANEL,
            help="bpb (after test-time training), int6 (before it), bytes; two are a Pareto front.",
        ),
    ] = "bpb",
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(
            "--checkpoint",
            metavar="FILE",
            rich_help_panel=SPACE_PANEL,
            help="Search on stored checkpoints, training nothing; several are averaged over.",
        ),
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(
            "--sample",
            min=2,
            metavar="N",
            rich_help_panel=SPACE_PANEL,
            help="Rank trials on the same N documents, drawn by length; finalists get them all.",
        ),
    ] = None,
    finalists: Annotated[
        int,
        typer.Option(
            "--finalists",
            min=0,
            metavar="K",
            rich_help_panel=SPACE_PANEL,
            help="Best trials whose artifacts are written and scored on everything.",
        ),
    ] = 1,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            min=1,
            metavar="N",
            rich_help_panel=SPACE_PANEL,
            help="Training steps of every trial, in place of a wall-clock cap.",
        ),
    ] = None,
    clock: Annotated[
        bool,
        typer.Option(
            "--clock",
            metavar=NO_VALUE,
            rich_help_panel=SPACE_PANEL,
            help="Keep the wall-clock cap: trials on slow hosts take fewer steps then.",
        ),
    ] = False,
    concurrent: Annotated[
        int | None,
        typer.Option(
            "--concurrent",
            min=1,
            metavar="N",
            rich_help_panel=LIMITS_PANEL,
            help="Trials at a time; with 1 a sweep is the same each time.",
        ),
    ] = None,
    max_hours: Annotated[
        float | None,
        typer.Option(
            "--max-hours",
            min=0.0,
            metavar="H",
            rich_help_panel=LIMITS_PANEL,
            help="Begin no trial after so many hours.",
        ),
    ] = None,
    max_gpu_hours: Annotated[
        float | None,
        typer.Option(
            "--max-gpu-hours",
            min=0.0,
            metavar="H",
            rich_help_panel=LIMITS_PANEL,
            help="Begin no trial once so many GPU-hours are used.",
        ),
    ] = None,
    prune: Annotated[
        bool,
        typer.Option(
            "--prune",
            metavar=NO_VALUE,
            rich_help_panel=LIMITS_PANEL,
            help="End a training whose bpb on the way is above the median of others at that step: "
            "misleading where the schedule is searched.",
        ),
    ] = False,
    price: Annotated[
        float,
        typer.Option(
            "--price",
            min=0.0,
            metavar="$",
            rich_help_panel=LIMITS_PANEL,
            help="Of one GPU for an hour, for the plan.",
        ),
    ] = 2.75,
    optuna_storage: Annotated[
        str | None,
        typer.Option(
            "--optuna-storage",
            metavar="URL",
            help="Where Optuna keeps the study; sqlite in the sweep's folder if not given.",
        ),
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
    """Search for better knobs of training, quantisation and test-time training.

    Trials run on Ray, Optuna chooses their knobs, and what one trial computed no other computes
    again. A sweep that was interrupted goes on with --resume NAME; what it found is in a table.
    """
    from golf_ray.sweeps.making import carried_config, make_plan
    from golf_ray.sweeps.plan import read_plan

    options = ConfigOptions(
        preset=preset,
        config=config,
        upstream_config=upstream_config,
        assignments=tuple(assignments or ()),
        data_dir=data_dir,
    )
    if (resume is None) == (space is None):
        raise UsageError("a sweep needs a space, or --resume NAME", "give one of the two")
    if resume is not None:
        _refuse_changes(context)
        plan = read_plan(storage, resume)
        # How much may be spent, and how wide, is not what the sweep is.
        if max_gpu_hours is not None:
            plan = replace(plan, max_gpu_hours=max_gpu_hours)
        if max_hours is not None:
            plan = replace(plan, max_hours=max_hours)
        if concurrent is not None:
            plan = replace(plan, max_concurrent=concurrent)
    else:
        assert space is not None
        carried = None if options.has_base else carried_config(checkpoint or [])
        plan = make_plan(
            space,
            resolve_config(options, carried),
            checkpoints=checkpoint or [],
            steps=steps,
            clock=clock,
            sample=sample,
            name=name,
            storage=storage,
            num_trials=trials,
            evals_per_training=evals_per_training,
            objectives=_objectives(objective),
            sampler=sampler,
            seed=seed,
            finalists=finalists,
            max_concurrent=concurrent,
            optuna_url=optuna_storage,
            max_gpu_hours=max_gpu_hours,
            max_hours=max_hours,
            prune=prune,
        )
    if plan_only:
        _show_plan(plan, address, price, as_json)
        return
    outcome = run(plan, address, resume=resume is not None, quiet=as_json, price=price)
    report(plan, outcome, as_json)
    if not outcome.num_done:
        raise typer.Exit(1)


def _refuse_changes(context: typer.Context) -> None:
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        given = source is not None and source.name == "COMMANDLINE"
        if given and option.name not in MAY_CHANGE:
            raise UsageError(
                f"{option.opts[0]} cannot be given with --resume, which goes on with a sweep as it "
                "was planned",
                "leave it out, or give the sweep another --name: on the same --storage it finds "
                "again what this one computed",
            )


def run(
    plan: SweepPlan, address: str | None, *, resume: bool, quiet: bool, price: float | None = None
) -> SweepOutcome:
    """Run a sweep with a bar; a line for each trial that ends."""
    from golf_ray.sweeps.commands import command
    from golf_ray.sweeps.progress import SweepWatch
    from golf_ray.sweeps.runner import connected_for, run_sweep

    with progress_bar() as bar, connected_for(plan, address):
        if not quiet:
            for line in plan_lines(plan, price):
                bar.say(line)
        with SweepWatch(
            plan,
            on_trial=lambda record: None if quiet else bar.say(trial_line(record, plan)),
            on_status=lambda n, text: bar.update(text, n, plan.num_trials, phase="search"),
        ):
            try:
                return run_sweep(plan, resume=resume, tell=bar.say)
            except KeyboardInterrupt:
                again = command("sweep --resume", plan.name, plan.storage)
                bar.say(f"interrupted; nothing that was finished is lost, go on with: {again}")
                raise


def plan_lines(plan: SweepPlan, price: float | None) -> list[str]:
    """What is about to happen, for people; on the connected cluster."""
    from golf_ray.sweeps.forecast import forecast

    return forecast(plan, price_per_gpu_hour=price).short()


def trial_line(record: dict[str, Any], plan: SweepPlan) -> str:
    """A trial that ended, for people."""
    name = f"trial {record['trial']} of {plan.num_trials}"
    if record["status"] == "failed":
        return f"{name}: failed: {record['reason']}"
    if record["status"] == "over_limit":
        return f"{name}: over the limit: {record['reason']}"
    if record["status"] == "pruned":
        return f"{name}: pruned: {record['reason']}"
    if plan.checkpoints:
        how = "nothing trained"
    else:
        how = "trained" if record.get("trained") else "training shared"
    scores = []
    if record.get("int6_bpb") is not None:
        scores.append(f"int6 {record['int6_bpb']:.4f} bpb")
    if record.get("ttt_bpb") is not None:
        scores.append(f"with test-time training {record['ttt_bpb']:.4f}")
    return f"{name}: {how}, {', '.join(scores)}, {record['total_bytes'] / 1e6:.3f} MB"


def report(plan: SweepPlan, outcome: SweepOutcome, as_json: bool) -> None:
    """Print how a sweep ended: its table, or all of it as JSON."""
    import dataclasses

    from golf_ray.results.standing import Look, Sweep
    from golf_ray.results.sweep_screen import fitting_table
    from golf_ray.sweeps.table import read_records, trials_frame

    records = read_records(plan.trials_folder)
    frame = trials_frame(records, plan.name)
    trained = int(frame["trained"].fillna(False).sum())
    if as_json:
        print_json(
            {
                "name": plan.name,
                "folder": plan.folder.uri,
                **dataclasses.asdict(outcome),
                "num_trials": plan.num_trials,
                "num_trainings": trained,
                "trials": records,
            }
        )
        return
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    table, left_out = fitting_table(records, plan.objectives[0], console)
    console.print(table)
    if left_out:
        console.print(f"no room for: {', '.join(left_out)}")
    made = "nothing was trained" if plan.checkpoints else number_of(trained, "training")
    ends = [f"{outcome.num_done} done"]
    ends += [f"{outcome.num_over_limit} over the limit"] * bool(outcome.num_over_limit)
    ends += [f"{outcome.num_pruned} pruned"] * bool(outcome.num_pruned)
    ends += [f"{outcome.num_failed} failed"] * bool(outcome.num_failed)
    console.print(
        f"{number_of(len(frame), 'trial')} ({', '.join(ends)}), {made}, "
        f"{duration(outcome.wall_s)}. Lower bpb (bits per byte) is better; best in bold."
    )
    look = Look(
        sweep=Sweep.of_plan(plan),
        records=tuple(records),
        driven=False,
        unix_s=time.time(),
        out_of_budget=not outcome.complete,
    )
    if not outcome.complete:
        left = number_of(plan.num_trials - len(frame), "trial")
        console.print(f"{left} not begun: the budget is used up; go on with:\n{look.go_on}")
    for line in outcome.disagreements:
        console.print(f"the study and the records disagree: {line}")
    ended = [r for r in records if "final" in r]
    ended.sort(key=lambda r: (not r["final"]["fits"], r["final"]["ttt_bpb"]))
    for record in ended:
        final = record["final"]
        mark = "best" if record is ended[0] and final["fits"] else "also"
        fits = "" if final["fits"] else ", OVER THE LIMIT"
        console.print(
            f"{mark}: trial {record['trial']}, {final['ttt_bpb']:.4f} bpb on all documents, "
            f"{count(final['total_bytes'])} bytes{fits}: stages/{final['artifacts'][0]}"
        )
    if records and look.best is None:
        console.print(nearest_to_limit(records))
    console.print(f"everything lies in {plan.folder.uri}")


def nearest_to_limit(records: Sequence[Mapping[str, Any]]) -> str:
    """What to say of a sweep in which no trial is done and within its limits, for people."""
    sizes = [
        (
            (r.get("final") or r)["total_bytes"],
            r["trial"],
            r["config"]["quantization"]["limit_bytes"],
        )
        for r in records
        if r.get("total_bytes") is not None
    ]
    total, trial, limit = min(sizes, default=(0, 0, 0))
    if total <= limit:
        return "no trial is done and within the limits"
    return (
        f"no trial is within the limits: trial {trial} is nearest to the {count(limit)} bytes of "
        f"quantization.limit_bytes, with {count(total)}"
    )


def _objectives(text: str) -> tuple[str, ...]:
    from golf_ray.errors import nearest

    names = [part.strip() for part in text.split(",") if part.strip()]
    for one in names:
        if one not in OBJECTIVES:
            raise UsageError(f"--objective {one} is unknown", nearest(one, OBJECTIVES))
    return tuple(dict.fromkeys(OBJECTIVES[one] for one in names))


def _show_plan(plan: SweepPlan, address: str | None, price: float, as_json: bool) -> None:
    from golf_ray.sweeps.forecast import forecast
    from golf_ray.sweeps.runner import connected_for

    with connected_for(plan, address):
        found = forecast(plan, price_per_gpu_hour=price)
    if as_json:
        print_json(found.to_dict())
        return
    for line in found.lines():
        print(line)
