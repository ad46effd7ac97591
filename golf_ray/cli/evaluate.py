"""`golf-ray eval`: score a checkpoint or an artifact."""

from __future__ import annotations

import enum
import json
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
    count,
    duration,
    number_of,
    print_json,
    print_report,
    progress_bar,
    sizes_line,
)
from golf_ray.errors import UsageError
from golf_ray.records import make_folder

if TYPE_CHECKING:
    from golf_ray.api import Evaluation, StoredWeights
    from golf_ray.config import Config
    from golf_ray.metric import Score

EXAMPLES = examples(
    "golf-ray eval runs/first/final_model.pt",
    "golf-ray eval runs/first/final_model.pt --method ttt --workers 2",
    "golf-ray eval runs/first/final_model.pt --method ttt --sample 2000",
    "golf-ray eval runs/first --method ttt --ledger scores/first --workers 8",
    "golf-ray eval runs/first/final_model.pt --quantize --artifact a.int6.ptz",
    "golf-ray eval final_model.int6.ptz --upstream-config train.log --json",
)


class Method(enum.StrEnum):
    """Ways to score."""

    PACKED = "packed"
    SLIDING = "sliding"
    TTT = "ttt"


def evaluate(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="A state dict (.pt), an artifact (.ptz) or a run's folder."
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
    """Score a checkpoint or an artifact on validation text.

    A checkpoint of golf_ray carries its configuration; a public one needs it from you. Where
    both are there and disagree about the model, it is refused, unless forced.
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

    from golf_ray import api

    weights = api.open_weights(checkpoint)
    if per_document is not None:
        make_folder(per_document.parent)
    with progress_bar() as bar:
        bar.update("starting", 0, 0)

        def scoring(done: int, total: int, score: Score) -> None:
            bar.update(method.value, done, total, f"{score.bpb:.4f} bpb so far")

        done = api.evaluate(
            weights,
            resolved_for(weights, options),
            method=method.value,
            quantize_first=quantize,
            artifact=artifact,
            adapter_init=adapter_init,
            workers=workers,
            address=address,
            force=force,
            progress=scoring,
            quantize_progress=bar.phase,
            on_event=lambda event: bar.say(event.message) if event.kind != "ready" else None,
            tell=bar.say,
            ledger=ledger,
        )
    if per_document is not None:
        _write_documents(per_document, done)
    if as_json:
        print_json(done.to_dict())
    else:
        print_report(*_report(done))


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
