"""`golf-ray eval`: score checkpoints and artifacts."""

from __future__ import annotations

import enum
import json
import sys
import time
from collections.abc import Callable, Sequence
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
    Force,
    Preset,
    UpstreamFile,
    resolve_config,
)
from golf_ray.cli.output import (
    Bar,
    clock,
    count,
    duration,
    number_of,
    plain_table,
    print_json,
    print_report,
    progress_bar,
    sizes_line,
)
from golf_ray.errors import EvaluationFailed, UsageError
from golf_ray.records import make_folder

if TYPE_CHECKING:
    from evaluators.pool import PoolReport
    from evaluators.watch import Status
    from golf_ray.api import Evaluation, Evaluations, FailedEvaluation, StoredWeights
    from golf_ray.config import Config
    from golf_ray.metric import Score

EXAMPLES = examples(
    "golf-ray eval runs/first/final_model.pt",
    "golf-ray eval runs/first/final_model.pt --method ttt --workers 2",
    "golf-ray eval runs/first/final_model.pt --method ttt --sample 2000",
    "golf-ray eval runs/first --method ttt --ledger scores/first --workers 8",
    "golf-ray eval runs/*/a.ptz --method ttt --vary adaptation.chunk_size=32,48",
    "golf-ray eval runs/first/final_model.pt --quantize --artifact a.int6.ptz",
    "golf-ray eval final_model.int6.ptz --upstream-config train.log --json",
)


class Method(enum.StrEnum):
    """Ways to score."""

    PACKED = "packed"
    SLIDING = "sliding"
    TTT = "ttt"


SAY_S = 60.0
"""Seconds between two lines on how it goes, where there is no terminal for a bar."""


def evaluate(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            metavar="CHECKPOINT...",
            help="State dicts (.pt), artifacts (.ptz) or folders of runs.",
        ),
    ],
    method: Annotated[
        Method,
        typer.Option(help="Flat batches, overlapping windows, or test-time training."),
    ] = Method.PACKED,
    quantize: Annotated[
        bool,
        typer.Option(
            "--quantize", metavar=NO_VALUE, help="Make the artifact of the checkpoint and score it."
        ),
    ] = False,
    artifact: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where --quantize keeps the artifact; else it goes."),
    ] = None,
    adapter_init: Annotated[
        Path | None,
        typer.Option(metavar="FILE.npz", help="The adapters' A for ttt, in place of random ones."),
    ] = None,
    per_document: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write ttt's scores by document there, as JSON lines."),
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(metavar="N", help="Score N documents with ttt and estimate the whole set."),
    ] = None,
    ledger: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Keep ttt's scores there as they come: the same command again goes on.",
        ),
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A.B=V,W",
            help="Score under each of these values; several of these options are a grid.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Share the work among N Ray actors; else here."),
    ] = None,
    address: Address = None,
    force: Force = False,
    preset: Preset = None,
    config: ConfigFile = None,
    upstream_config: UpstreamFile = None,
    assignments: Assignments = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Score checkpoints and artifacts on validation text.

    A checkpoint of golf_ray carries its configuration; a public one needs it from you. Where
    both are there and disagree about the model, it is refused, unless forced. Several checkpoints
    and settings share one pool of actors and end in one table.
    """
    if sample is not None:
        assignments = [*(assignments or ()), f"adaptation.sample_documents={sample}"]
    options = ConfigOptions(
        preset=preset,
        config=config,
        upstream_config=upstream_config,
        assignments=tuple(assignments or ()),
        data_dir=data_dir,
    )
    if artifact is not None and not quantize:
        raise UsageError("--artifact names what --quantize makes", "add --quantize")
    if per_document is not None and method != Method.TTT:
        raise UsageError("only ttt scores documents one by one", "add --method ttt")
    if sample is not None and method != Method.TTT:
        raise UsageError("--sample chooses documents, which only ttt scores", "add --method ttt")
    if ledger is not None and method != Method.TTT:
        raise UsageError("only ttt keeps a ledger", "add --method ttt")
    if address is not None and workers is None:
        raise UsageError("--address joins a cluster for workers", "add --workers N")
    grid = _grid(vary or ())
    several = len(checkpoints) > 1 or bool(grid)
    if several and (quantize or per_document is not None):
        given = "--quantize" if quantize else "--per-document"
        raise UsageError(f"{given} is for one checkpoint", "evaluate them one by one")

    from golf_ray import api

    first = api.open_weights(checkpoints[0])
    # Tensors of several are read again when it is their turn.
    others = [api.open_weights(path).without_tensors() for path in checkpoints[1:]]
    configs = [resolved_for(weights, options) for weights in (first, *others)]
    if per_document is not None:
        make_folder(per_document.parent)
    reports: list[PoolReport] = []
    with progress_bar() as bar:
        bar.update("starting", 0, 0)
        on_status, scoring = _telling(bar, method.value)

        def happened(event: Any) -> None:
            if event.kind != "ready":
                bar.say(event.message)

        if several:
            many = api.evaluate_many(
                [first.without_tensors(), *others],
                configs,
                vary=grid,
                method=method.value,
                adapter_init=adapter_init,
                workers=workers,
                address=address,
                force=force,
                progress=scoring,
                on_status=on_status,
                on_event=happened,
                tell=bar.say,
                ledger=ledger,
            )
        else:
            one = api.evaluate(
                first,
                configs[0],
                method=method.value,
                quantize_first=quantize,
                artifact=artifact,
                adapter_init=adapter_init,
                workers=workers,
                address=address,
                force=force,
                progress=scoring,
                quantize_progress=bar.phase,
                on_status=on_status,
                on_event=happened,
                on_report=reports.append,
                tell=bar.say,
                ledger=ledger,
            )
    if several:
        print_many(many, as_json=as_json)
        return
    report = reports[0] if reports else None
    if per_document is not None:
        _write_documents(per_document, one)
    if as_json:
        pool = {} if workers is None else {"pool": None if report is None else report.to_dict()}
        print_json({**one.to_dict(), **pool})
    else:
        title, rows = _report(one)
        print_report(title, rows if report is None else [*rows, *_pool_rows(report, one.device)])


def _grid(vary: Sequence[str]) -> dict[str, list[str]]:
    """Values by field of `--vary` options."""
    from golf_ray.config import split_assignment

    grid: dict[str, list[str]] = {}
    for item in vary:
        path, values = split_assignment(item)
        if path in grid:
            raise UsageError(f"--vary {path} is given twice", f"write {path}=V,W once")
        grid[path] = values.split(",")
    return grid


def _telling(
    bar: Bar, method: str
) -> tuple[Callable[[Status], None], Callable[[int, int, Score], None]]:
    """How the work of a pool, and of this process, goes on: a bar, or a line now and then where
    there is no terminal."""
    said_s = time.monotonic()

    def show(label: str, done: int, total: int, detail: str, left_s: float | None) -> None:
        nonlocal said_s
        bar.update(label, done, total, detail, phase=method, seconds_left=left_s)
        if not sys.stderr.isatty() and time.monotonic() - said_s >= SAY_S:
            said_s = time.monotonic()
            left = "" if left_s is None else f", {clock(left_s)} left"
            bar.say(f"{label}: {count(done)} of {count(total)}, {detail}{left}")

    def status(status: Status) -> None:
        error = status.standard_error_bpb
        so_far = f"{status.running.bpb:.4f}" + ("" if error is None else f" +- {error:.4f}")
        several = f" {status.job + 1} of {status.num_jobs}" if status.num_jobs > 1 else ""
        detail = f"{so_far} bpb so far, {number_of(status.actors, 'actor')}"
        show(method + several, status.done, status.count, detail, status.seconds_left)

    def progress(done: int, total: int, score: Score) -> None:
        show(method, done, total, f"{score.bpb:.4f} bpb so far", None)

    return status, progress


def _pool_rows(report: PoolReport, device: str) -> list[tuple[str, str]]:
    """How the actors' work went."""
    what = "GPU-seconds" if device == "cuda" else "actor-seconds"
    troubles = [
        f"{number:,} {what_happened}"
        for number, what_happened in (
            (report.retried, "done again"),
            (report.stolen, "taken over by an idle actor"),
            (report.lost_actors, "actors lost"),
        )
        if number
    ]
    held = f"{report.held_s:,.1f} {what} held, {report.efficiency:.1%} of them busy"
    return [
        ("actors", held),
        ("units", ", ".join([count(report.units), *troubles])),
        (
            "start",
            f"{duration(report.start_s)} before the first unit, {duration(report.prepare_s)} of "
            "it for weights and compilation",
        ),
    ]


def print_many(many: Evaluations, *, as_json: bool) -> None:
    """Print a table of several evaluations, or their JSON.

    Raises:
        EvaluationFailed: not all of them have a score; what the others say is printed.
    """
    if as_json:
        print_json(many.to_dict())
    else:
        plain_table(_table(many))
        if many.report is not None:
            done = next((one for one in many.outcomes if one not in many.failed), None)
            device = "cpu" if done is None else done.to_dict()["device"]
            print_report("", _pool_rows(many.report, device))
    if many.failed:
        for failed in many.failed:
            print(f"{_place(failed)}: {failed.error}", file=sys.stderr)
        raise EvaluationFailed(
            f"{len(many.failed)} of {len(many.outcomes)} evaluations have no score",
            "see the lines above",
        )


def _place(one: Evaluation | FailedEvaluation) -> str:
    varied = " ".join(f"{path}={value}" for path, value in one.settings.items())
    return f"{one.checkpoint} {varied}".rstrip()


def _table(many: Evaluations) -> list[list[str]]:
    """A line each: what was scored under what, and the score."""
    varied = list(many.outcomes[0].settings)
    header = ["checkpoint", *(path.split(".")[-1] for path in varied)]
    table = [[*header, "weights", "bpb", "+-", "tokens", "seconds"]]
    for one in many.outcomes:
        data = one.to_dict()
        line = [str(one.checkpoint), *(str(one.settings[path]) for path in varied)]
        if "error" in data:
            table.append([*line, data["weights"], "none", "", "", ""])
            continue
        estimated = data.get("estimate")
        error = f"{estimated['standard_error_bpb']:.4f}" if estimated else ""
        seconds = data.get("actor_seconds", data["seconds"])
        table.append(
            [*line, data["weights"], f"{data['val_bpb']:.6f}", error,
             count(data["tokens_scored"]), f"{seconds:.1f}"]
        )  # fmt: skip
    return table


def resolved_for(weights: StoredWeights, options: ConfigOptions) -> Config:
    """The configuration to use weights under.

    Raises:
        CheckpointError: it is the weights' own and asks for code that the user did not name.
        GolfRayError: as `resolve_config`.
    """
    from golf_ray.api import fitted_to_machine, require_trusted

    if weights.config is None and not options.has_base:
        raise UsageError(
            f"{weights.path} carries no configuration",
            "add --upstream-config FILE, --config FILE or --preset NAME",
        )
    config = resolve_config(options, weights.config)
    if not options.names_parts:
        require_trusted(config, weights.path)
    return config if options.names_cluster else fitted_to_machine(config)


def _write_documents(path: Path, done: Evaluation) -> None:
    from golf_ray.records import atomic_write_text

    documents = done.result.to_dict(per_document=True)["documents"]
    atomic_write_text(path, "".join(json.dumps(document) + "\n" for document in documents))


def _report(done: Evaluation) -> tuple[str, list[tuple[str, str]]]:
    data: dict[str, Any] = done.to_dict()
    scored = f"{count(data['tokens_scored'])} tokens, {count(data['bytes_scored'])} bytes"
    if "documents_scored" in data:
        scored += ", " + number_of(data["documents_scored"], "document")
    where = done.device if done.workers is None else number_of(done.workers, "actor")
    loss = f"{data['val_loss_nats']:.6f} nats a token"
    estimated = data.get("estimate")
    if estimated and estimated["documents_scored"] == estimated["documents_total"]:
        estimated = None
    rows = [
        ("bpb", f"{data['val_bpb']:.6f}" if estimated is None else estimate_line(estimated)),
        ("loss", loss if estimated is None else f"{loss}, estimated"),
        ("scored", scored),
        ("time", f"{duration(data['seconds'])} on {where}"),
    ]
    limit = data.get("limit")
    if limit is not None:
        verdict = "" if limit["fits"] else ": TOO LONG"
        rows.append(
            (
                "limit",
                f"{limit['gpus']} GPUs like these take {duration(limit['predicted_s'])} of "
                f"{duration(limit['limit_s'])} for the whole set, by the cost model{verdict}",
            )
        )
    if done.sizes is not None:
        rows.append(("size", sizes_line(done.sizes.to_dict())))
    if done.quantization is not None:
        made = done.quantization.to_dict()
        rows += [("quantised", quantization_times(made)), ("codes", codes_line(made))]
    return f"{data['method']}, {data['weights']} weights of {done.checkpoint}", rows


def estimate_line(data: dict[str, Any]) -> str:
    """An estimate with its standard error and its interval, as `Estimate.to_dict` has them."""
    return (
        f"{data['bpb']:.4f} +- {data['standard_error_bpb']:.4f} "
        f"({data['confidence']:.0%} {data['low_bpb']:.4f} to {data['high_bpb']:.4f}), estimated "
        f"from {count(data['documents_scored'])} of "
        f"{number_of(data['documents_total'], 'document')}"
    )


def quantization_times(data: dict[str, Any]) -> str:
    """Seconds of each phase."""
    seconds = data["seconds"]
    return ", ".join(
        f"{name} {duration(seconds[key])}"
        for key, name in (("hessians", "Hessians"), ("gptq", "GPTQ"), ("compress", "compression"))
    )


def codes_line(data: dict[str, Any]) -> str:
    """How much was quantised, and what was unusual."""
    if not data["num_codes"]:
        return "none: no matrix has more elements than quantization.float16_max_numel"
    share = data["saturated_codes"] / data["num_codes"]
    line = f"{count(data['num_codes'])}, {share:.2%} at the end of their range"
    raised = ", ".join(data["raised_damping"])
    return f"{line}; damping raised for {raised}" if raised else line
