"""`golf-ray submit`: run a command on a cluster that goes on when this terminal closes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from golf_ray.cli.frame import NO_VALUE, examples
from golf_ray.cli.options import AsJson, Debug
from golf_ray.cli.output import duration, plain_table, print_json, print_report
from golf_ray.errors import UsageError

if TYPE_CHECKING:
    from golf_ray.jobs import Jobs, JobState

EXAMPLES = examples(
    "golf-ray submit --address http://head:8265 -- sweep record",
    "golf-ray submit --name a --follow -- train --run-dir s3://bucket/run",
    "golf-ray submit --logs a --follow",
    "golf-ray submit --print-cluster-yaml --nodes 4 > cluster.yaml",
)
JOBS, FILES = "Jobs that are there", "Files for a cluster"
CLUSTER_ADDRESS = "auto"
"""A job runs on the cluster's head and finds the cluster there."""


def submit(
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- VERB ARGS...", help="What 'golf-ray' is to do there."),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="The head's dashboard, as http://head:8265; RAY_API_SERVER_ADDRESS's or this "
            "machine's where not given.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The job's id; by verb and time if not.")
    ] = None,
    follow: Annotated[
        bool,
        typer.Option(
            "--follow", metavar=NO_VALUE, help="Print what it prints until it ends; Ctrl-C leaves."
        ),
    ] = False,
    ship: Annotated[
        bool,
        typer.Option(
            "--ship",
            metavar=NO_VALUE,
            help="Send this golf_ray's source along, in the place of the cluster's.",
        ),
    ] = False,
    folder: Annotated[
        str | None,
        typer.Option(
            "--dir", metavar="DIR", help="Folder of the head that relative paths start from."
        ),
    ] = None,
    logs: Annotated[
        str | None,
        typer.Option(metavar="ID", rich_help_panel=JOBS, help="Print what a job has printed."),
    ] = None,
    status: Annotated[
        str | None, typer.Option(metavar="ID", rich_help_panel=JOBS, help="Say how a job is.")
    ] = None,
    stop: Annotated[
        str | None, typer.Option(metavar="ID", rich_help_panel=JOBS, help="End a job.")
    ] = None,
    list_all: Annotated[
        bool,
        typer.Option("--list", metavar=NO_VALUE, rich_help_panel=JOBS, help="List all jobs."),
    ] = False,
    cluster_yaml: Annotated[
        bool,
        typer.Option(
            "--print-cluster-yaml",
            metavar=NO_VALUE,
            rich_help_panel=FILES,
            help="Print a file for Ray's cluster launcher, 'ray up'.",
        ),
    ] = False,
    rayjob_yaml: Annotated[
        bool,
        typer.Option(
            "--print-rayjob",
            metavar=NO_VALUE,
            rich_help_panel=FILES,
            help="Print a RayJob for 'kubectl apply', where KubeRay is installed.",
        ),
    ] = False,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|URI", rich_help_panel=FILES, help="Storage that all nodes can write."
        ),
    ] = None,
    nodes: Annotated[
        int, typer.Option(min=1, metavar="N", rich_help_panel=FILES, help="Nodes of 8 GPUs.")
    ] = 2,
    image: Annotated[
        str | None,
        typer.Option(metavar="IMAGE", rich_help_panel=FILES, help="Container image of the nodes."),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run a golf-ray command on a Ray cluster as a job, which goes on without this machine.

    The command gets --address auto where it takes one, unless it has another. Paths in it are
    those of the cluster's head. With --follow the status is the job's: 1 where it failed.
    """
    _require_one(
        {
            "a command": bool(command), "--logs": logs, "--status": status, "--stop": stop,
            "--list": list_all, "--print-cluster-yaml": cluster_yaml,
            "--print-rayjob": rayjob_yaml,
        }
    )  # fmt: skip
    if cluster_yaml or rayjob_yaml:
        from golf_ray.deploy import CLUSTER_FILE, RAYJOB_FILE, Settings, rendered

        settings = Settings.of(storage=storage, num_nodes=nodes, image=image)
        print(rendered(CLUSTER_FILE if cluster_yaml else RAYJOB_FILE, settings), end="")
        return
    argv = remote_command(command) if command else []

    from golf_ray.jobs import Jobs

    jobs = Jobs(address)
    if argv:
        job = jobs.submit(argv, name=name, folder=folder, ship=ship)
        if not as_json:
            _say(f"job {job} is submitted; follow it with 'golf-ray submit --logs {job} --follow'")
        if follow:
            _follow(jobs, job, as_json)
        else:
            _show(jobs.state(job), as_json, only_id=True)
    elif logs is not None and follow:
        _follow(jobs, logs, as_json)
    elif logs is not None:
        text = jobs.logs(logs)
        if as_json:
            print_json({**jobs.state(logs).to_dict(), "logs": text})
        else:
            print(text, end="")
    elif list_all:
        _list(jobs.all(), as_json)
    else:
        _show(jobs.stop(stop) if stop is not None else jobs.state(status or ""), as_json)


def remote_command(argv: Sequence[str]) -> list[str]:
    """A golf-ray command as it will run on a cluster; parsed here, so that mistakes show now.

    Raises:
        UsageError: it is the submission of another job.
        Exception: the parser's own, which the frame turns into one line.
    """
    from golf_ray.cli.app import command

    if argv[0] == "submit":
        raise UsageError("a job cannot submit a job", "leave the second 'submit' out")
    verb, arguments = command(), list(argv)
    context: Any = verb.make_context("golf-ray", list(arguments))
    while hasattr(verb, "resolve_command"):
        # What a group did not take itself: its verb's name, and the rest.
        left = [*context._protected_args, *context.args]
        name, verb, rest = verb.resolve_command(context, left)
        context = verb.make_context(name, rest, parent=context)
    options = {name for option in verb.params for name in option.opts}
    alone = context.params.get("in_process") or context.params.get("address") is not None
    if "--address" in options and not alone:
        end = arguments.index("--") if "--" in arguments else len(arguments)
        arguments[end:end] = ["--address", CLUSTER_ADDRESS]
    return arguments


def _require_one(asked: dict[str, Any]) -> None:
    given = [what for what, value in asked.items() if value]
    if len(given) == 1:
        return
    if not given:
        raise UsageError(
            "nothing is to be submitted", "give a command after '--', or --logs, --status, --list"
        )
    raise UsageError(f"{given[0]} and {given[1]} are two things", "leave one of them out")


def _follow(jobs: Jobs, job: str, as_json: bool) -> None:
    from golf_ray.jobs import require_success

    out = sys.stderr if as_json else sys.stdout

    def write(text: str) -> None:
        out.write(text)
        out.flush()

    try:
        state = jobs.follow(job, write)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"the job goes on; end it with 'golf-ray submit --stop {job}'"
        ) from None
    if as_json:
        print_json(state.to_dict())
    require_success(state)


def _show(state: JobState, as_json: bool, *, only_id: bool = False) -> None:
    if as_json:
        print_json(state.to_dict())
    elif only_id:
        print(state.job)
    else:
        rows = [("status", state.status.lower()), ("command", state.command)]
        if state.message:
            rows.append(("message", " ".join(state.message.split())[:300]))
        print_report(state.job, [*rows, ("time", _time(state))])


def _list(states: Sequence[JobState], as_json: bool) -> None:
    if as_json:
        print_json([state.to_dict() for state in states])
        return
    rows = [["job", "status", "time", "command"]]
    rows += [[s.job, s.status.lower(), _time(s), s.command] for s in states]
    plain_table(rows)


def _time(state: JobState) -> str:
    import time

    if state.began_unix_s is None:
        return "not begun"
    ended_s = time.time() if state.ended_unix_s is None else state.ended_unix_s
    return duration(max(0.0, ended_s - state.began_unix_s))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
