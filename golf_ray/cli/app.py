"""The verbs and the frame around them, as one typer application.

To add a verb, write a module with its function and register it here. Modules of verbs import
nothing heavy at their top: this one is loaded for every command, also for `--help`.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from golf_ray.cli import (
    audit,
    bench,
    compare,
    config,
    confirm,
    data,
    doctor,
    evaluate,
    export,
    quantize,
    quickstart,
    report,
    show,
    status,
    submit,
    sweep,
    train,
)
from golf_ray.cli.frame import NO_VALUE, SETTINGS, Verbs, add_verb, examples, make_group, paragraphs
from golf_ray.cli.options import Debug

EXAMPLES = examples(
    "golf-ray quickstart",
    "golf-ray data build ~/texts --vocab-size 1024",
    "golf-ray train --preset laptop --run-dir runs/first",
    "golf-ray eval runs/first --method ttt --quantize",
)


def application() -> typer.Typer:
    """All verbs."""
    app = make_group("")
    app.callback(cls=Verbs, help=paragraphs(frame), epilog=EXAMPLES)(frame)
    add_verb(app, "quickstart", quickstart.quickstart, quickstart.EXAMPLES)
    app.add_typer(data.group(), name="data")
    add_verb(app, "train", train.train, train.EXAMPLES)
    add_verb(app, "quantize", quantize.quantize, quantize.EXAMPLES)
    add_verb(app, "eval", evaluate.evaluate, evaluate.EXAMPLES)
    add_verb(app, "audit", audit.audit, audit.EXAMPLES)
    add_verb(app, "sweep", sweep.sweep, sweep.EXAMPLES)
    add_verb(app, "confirm", confirm.confirm, confirm.EXAMPLES)
    add_verb(app, "status", status.status, status.EXAMPLES)
    add_verb(app, "show", show.show, show.EXAMPLES)
    add_verb(app, "export", export.export, export.EXAMPLES)
    add_verb(app, "compare", compare.compare, compare.EXAMPLES)
    add_verb(app, "report", report.report, report.EXAMPLES)
    add_verb(app, "submit", submit.submit, submit.EXAMPLES)
    app.add_typer(bench.group(), name="bench")
    app.add_typer(config.group(), name="config")
    add_verb(app, "doctor", doctor.doctor, doctor.EXAMPLES)
    return app


def command() -> Any:
    """The application as a command that can be invoked."""
    verb = typer.main.get_command(application())
    _tidy_help(verb)
    return verb


def _tidy_help(verb: Any) -> None:
    # The parser's own --help shows a type that it does not take.
    option = verb.get_help_option(verb.context_class(verb, **SETTINGS))
    if option is not None:
        option.metavar = NO_VALUE
    for inner in getattr(verb, "commands", {}).values():
        _tidy_help(inner)


def frame(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            metavar=NO_VALUE,
            help="Print the version and end.",
            callback=lambda wanted: _print_version(wanted),
            is_eager=True,
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    """Train, quantise and score tiny language models on Ray.

    Every verb has --help with examples, --json for machines, and one line for an error.
    Configurations are named: --preset laptop, then --set section.field=value.
    """


def _print_version(wanted: bool) -> None:
    if wanted:
        import golf_ray

        typer.echo(f"golf-ray {golf_ray.__version__}")
        raise typer.Exit
