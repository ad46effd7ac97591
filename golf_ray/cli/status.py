"""`golf-ray status`: how a sweep stands, from its files alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from golf_ray.cli.frame import examples
from golf_ray.cli.options import AsJson, Debug
from golf_ray.cli.output import number_of, print_json
from golf_ray.cli.sweep import Storage
from golf_ray.sweeps import DEFAULT_STORAGE

if TYPE_CHECKING:
    from golf_ray.sweeps.plan import SweepPlan

EXAMPLES = examples(
    "golf-ray status",
    "golf-ray status sweep-20260101-120000",
    "golf-ray status nightly --storage s3://bucket/golf --json",
)


def status(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="A sweep; all of the storage's where not given."),
    ] = None,
    storage: Storage = DEFAULT_STORAGE,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say how a sweep stands: running, interrupted or ended, and its trials.

    Reads what the sweep writes, so it works from any machine that reaches the storage, while the
    sweep runs and after its driver was killed.
    """
    from golf_ray.sweeps.plan import read_plan, sweep_names

    if name is None:
        plans = [read_plan(storage, one) for one in sweep_names(storage)]
        found = [summary_of(plan) for plan in plans]
        if as_json:
            print_json({"storage": storage, "sweeps": found})
            return
        if not found:
            print(f"there is no sweep in {storage}")
        for one in found:
            print(summary_line(one))
        return
    plan = read_plan(storage, name)
    summary = summary_of(plan)
    if as_json:
        from golf_ray.sweeps.table import read_records

        print_json({**summary, "trials": read_records(plan.trials_folder)})
        return
    _print(plan, summary)


def summary_of(plan: SweepPlan) -> dict[str, Any]:
    """How a sweep stands, as plain data."""
    from golf_ray.sweeps.finalists import ranked
    from golf_ray.sweeps.runner import is_driven, used_gpu_hours
    from golf_ray.sweeps.table import read_records
    from golf_ray.sweeps.trial import FINAL

    records = read_records(plan.trials_folder)
    counts = {s: sum(r["status"] == s for r in records) for s in FINAL}
    ended = sum(counts.values())
    driven = is_driven(plan)
    state = "running" if driven else "ended" if ended == plan.num_trials else "interrupted"
    best = ranked(records, plan.objectives[0])
    return {
        "name": plan.name,
        "state": state,
        "num_trials": plan.num_trials,
        **counts,
        "begun": len(records) - ended,
        "trainings": len({r["training"] for r in records if r.get("training")}),
        "gpu_hours": used_gpu_hours(records),
        "objective": plan.objectives[0],
        "best_trial": best[0]["trial"] if best else None,
        "best": best[0]["values"][plan.objectives[0]] if best else None,
        "folder": plan.folder.uri,
    }


def summary_line(summary: dict[str, Any]) -> str:
    """A sweep in one line."""
    ended = summary["done"] + summary["failed"] + summary["over_limit"]
    parts = [f"{summary['name']}: {summary['state']}, {ended} of {summary['num_trials']} trials"]
    parts += [f"{summary[n]} {n.replace('_', ' ')}" for n in ("failed", "over_limit") if summary[n]]
    if summary["best"] is not None:
        parts.append(f"best {summary['best']:.4f} (trial {summary['best_trial']})")
    if summary["gpu_hours"]:
        parts.append(f"{summary['gpu_hours']:.2f} GPU-hours")
    return ", ".join(parts)


def _print(plan: SweepPlan, summary: dict[str, Any]) -> None:
    from rich.console import Console

    from golf_ray.sweeps.progress import describe
    from golf_ray.sweeps.table import read_records, screen_table, trials_frame
    from golf_ray.sweeps.trial import FINAL

    console = Console(highlight=False, soft_wrap=True)
    console.print(summary_line(summary))
    records = read_records(plan.trials_folder)
    if records:
        console.print(screen_table(trials_frame(records), plan.objectives[0]))
    for record in records:
        if record["status"] == "failed" or record["status"] == "over_limit":
            console.print(f"trial {record['trial']}: {record['reason']}")
        elif record["status"] not in FINAL and summary["state"] == "running":
            console.print(describe(record, plan.stages_folder))
    left = plan.num_trials - summary["done"] - summary["failed"] - summary["over_limit"]
    if summary["state"] == "interrupted":
        console.print(
            f"{number_of(left, 'trial')} left; go on with: golf-ray sweep --resume {plan.name}"
        )
