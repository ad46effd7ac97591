"""`golf-ray confirm`: the best trials of a sweep again, under fresh seeds, beside a baseline."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated

import typer

from golf_ray.cli.frame import NO_VALUE, examples
from golf_ray.cli.options import Address, AsJson, Debug
from golf_ray.cli.output import print_json
from golf_ray.cli.sweep import Storage, run
from golf_ray.errors import EvaluationFailed
from golf_ray.sweeps import DEFAULT_STORAGE

if TYPE_CHECKING:
    from golf_ray.sweeps.plan import SweepPlan

EXAMPLES = examples(
    "golf-ray confirm sweep-20260101-120000 --top 3 --seeds 3",
    "golf-ray confirm nightly --top 1 --seeds 5 --clock 600 --address auto",
)


class Baseline(enum.StrEnum):
    """What candidates are compared with."""

    FIRST = "first"
    BASE = "base"


def confirm(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A sweep that has ended.")],
    top: Annotated[
        int, typer.Option("--top", min=1, metavar="K", help="Best trials to run again.")
    ] = 3,
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, metavar="N", help="Fresh seeds for each.")
    ] = 3,
    baseline: Annotated[
        Baseline,
        typer.Option(help="What to compare with: the space's first point, or the configuration."),
    ] = Baseline.FIRST,
    clock: Annotated[
        float | None,
        typer.Option(
            "--clock",
            min=1.0,
            metavar="S",
            help="Train against this wall-clock cap in place of a number of steps.",
        ),
    ] = None,
    again: Annotated[
        bool,
        typer.Option("--resume", metavar=NO_VALUE, help="Go on with one that was interrupted."),
    ] = False,
    storage: Storage = DEFAULT_STORAGE,
    address: Address = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run a sweep's best trials under fresh seeds, and say what can be claimed of them.

    The baseline gets as many fresh seeds. Reported are means, sample standard deviations,
    differences with p-values (Welch, Holm over the candidates), and the smallest difference that
    so many seeds can show.
    """
    from golf_ray.sweeps.fresh_seeds import plan_confirmation
    from golf_ray.sweeps.plan import read_plan

    if again:
        plan = read_plan(storage, name if name.endswith("-confirm") else f"{name}-confirm")
    else:
        plan = plan_confirmation(
            read_plan(storage, name),
            top=top,
            num_seeds=seeds,
            baseline=baseline.value,
            max_wallclock_s=clock,
        )
    run(plan, address, resume=again, quiet=as_json)
    report(plan, as_json)


def report(plan: SweepPlan, as_json: bool) -> None:
    """Print what a confirmation shows."""
    from rich.console import Console

    from golf_ray.sweeps.confirmation import screen_table
    from golf_ray.sweeps.fresh_seeds import judged

    found = judged(plan)
    if found is None:
        raise EvaluationFailed(
            f"no run of '{plan.name}' came to its end", f"see 'golf-ray status {plan.name}'"
        )
    if as_json:
        print_json({"name": plan.name, "folder": plan.folder.uri, **found.to_dict()})
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(screen_table(found))
    for line in found.lines():
        console.print(line)
    console.print(f"everything lies in {plan.folder.uri}")
