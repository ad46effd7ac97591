"""`golf-ray doctor`: what is there, what is missing, what to type."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from golf_ray.cli.frame import examples
from golf_ray.cli.options import AsJson, Debug
from golf_ray.cli.output import print_json

if TYPE_CHECKING:
    from golf_ray.doctor import Finding

EXAMPLES = examples(
    "golf-ray doctor",
    "golf-ray doctor --data-dir /mnt/data",
    "golf-ray doctor --address auto --json",
)

_MARKS = {"ok": ("ok", "green"), "absent": ("-", "yellow"), "missing": ("MISSING", "bold red")}


def doctor(
    data_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where data must be; else ./data is looked at."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Look at this running Ray cluster too ('auto' finds one)."
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Look at this machine, and at a Ray cluster: what is there, what is missing, what to type.

    Ends with status 1 where something is missing without which no work is possible.
    """
    from golf_ray.doctor import examine, works_on_cpu

    findings = list(examine(data_dir, address))
    fine = works_on_cpu(findings)
    if as_json:
        print_json({"works": fine, "findings": [finding.to_dict() for finding in findings]})
    else:
        _print_table(findings)
        missing = [finding.name for finding in findings if finding.status == "missing"]
        print()
        print("All that is needed is there." if fine else f"Missing: {', '.join(missing)}.")
    if not fine:
        raise typer.Exit(1)


def _print_table(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        # A pipe has no width: one line a finding, for grep.
        for finding in findings:
            remedy = f" -> {finding.remedy}" if finding.remedy else ""
            mark = _MARKS[finding.status][0]
            print(f"{mark:<9}{finding.name:<22}{finding.detail}{remedy}")
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        mark, style = _MARKS[finding.status]
        text = Text(finding.detail)
        if finding.remedy:
            text.append(f"\n-> {finding.remedy}", style="bold")
        table.add_row(Text(mark, style=style), finding.name, text)
    console.print(table)
