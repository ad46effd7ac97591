"""`golf-ray audit`: prove that a ledger's scores were made by the rules."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from golf_ray.cli.evaluate import resolved_for
from golf_ray.cli.frame import examples
from golf_ray.cli.options import (
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
from golf_ray.cli.output import count, number_of, print_json, print_report, progress_bar
from golf_ray.errors import EvaluationFailed, UsageError

if TYPE_CHECKING:
    from golf_ray.api import LedgerAudit

EXAMPLES = examples(
    "golf-ray audit scores/first --checkpoint runs/first",
    "golf-ray audit scores/first --checkpoint runs/first --perturb 8",
    "golf-ray audit scores/first --config mine.json --data-dir /mnt/data",
    "golf-ray audit s3://bucket/scores --upstream-config train.log --json",
)
UNFINISHED = "delete what is damaged; the same 'golf-ray eval --ledger' scores what is missing"


def audit(
    ledger: Annotated[
        str,
        typer.Argument(metavar="LEDGER", help="A folder or URI, as 'golf-ray eval --ledger' made."),
    ],
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The weights that were scored, by file or a run's folder."
        ),
    ] = None,
    perturb: Annotated[
        int | None,
        typer.Option(
            min=2,
            metavar="N",
            help="Score N documents with other tokens in them, and see that nothing leaks.",
        ),
    ] = None,
    force: Force = False,
    preset: Preset = None,
    config: ConfigFile = None,
    upstream_config: UpstreamFile = None,
    assignments: Assignments = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Prove that a ledger's scores were made by the rules of test-time training.

    Every document once and whole, every chunk scored before anything learns from it, nothing
    learned from the last, bytes those of the text. A ledger does not hold the text: a checkpoint
    or a configuration says where it is. Ends with status 1 where anything is found.
    """
    options = ConfigOptions(
        preset=preset,
        config=config,
        upstream_config=upstream_config,
        assignments=tuple(assignments or ()),
        data_dir=data_dir,
    )
    if perturb is not None and checkpoint is None:
        raise UsageError("--perturb needs the weights to try", "add --checkpoint FILE")
    if checkpoint is None and not options.has_base:
        raise UsageError(
            "a ledger holds scores and not the text that they are of",
            "add --checkpoint FILE, --config FILE or --upstream-config FILE",
        )

    from golf_ray import api

    weights = None if checkpoint is None else api.open_weights(checkpoint)
    resolved = resolve_config(options) if weights is None else resolved_for(weights, options)
    with progress_bar() as bar:
        bar.update("reading", 0, 0)
        done = api.audit(
            ledger, resolved, checkpoint=weights, perturb=perturb, force=force, told=bar.phase
        )
    if as_json:
        print_json(done.to_dict())
    else:
        print_report(*_report(done))
    if not done.passed:
        more = f"; and {len(done.findings) - 1} more" if done.findings[1:] else ""
        raise EvaluationFailed(f"{done.findings[0]}{more}", _remedy(done))


def _remedy(done: LedgerAudit) -> str:
    perturbed = done.perturbation is None or done.perturbation.passed
    return UNFINISHED if done.audit.mendable and perturbed else "do not quote this score"


def _report(done: LedgerAudit) -> tuple[str, list[tuple[str, str]]]:
    data: dict[str, Any] = done.to_dict()
    checks = done.audit.checks
    rows = [
        ("of", f"{data['weights_kind']} weights {data['weights']}"),
        (
            "documents",
            f"{count(data['documents_scored'])} of {count(data['documents_total'])}, "
            f"{number_of(data['chunks_scored'], 'chunk')}",
        ),
        ("tokens", f"{count(data['tokens_scored'])} of {count(data['tokens_total'])}"),
        ("bytes", f"{count(data['bytes_scored'])} of {count(data['bytes_total'])}"),
        ("bpb", f"{data['val_bpb']:.6f}"),
        ("checks", f"{sum(check.passed for check in checks)} of {len(checks)} passed"),
    ]
    rows += [("", f"{check.name}: {check.rule}") for check in checks if check.passed]
    if done.perturbation is not None:
        rows.append(("perturbed", perturbation_line(done.perturbation.to_dict())))
    rows += [("FINDING", finding) for finding in done.findings]
    return f"{done.ledger}: {'passed' if done.passed else 'FAILED'}", rows


def perturbation_line(data: dict[str, Any]) -> str:
    """What was tried, how closely, and how it went, as `Perturbation.to_dict` has it."""
    tolerance = data["tolerance_nats"]
    exactly = f"within {tolerance:g} nats of mean loss" if tolerance else "to the bit"
    cut = ""
    if data["documents_cut"]:
        cut = f" ({data['documents_cut']} cut at {count(data['max_predictions'])} predictions)"
    outcome = "nothing leaked" if data["passed"] else f"{data['num_failed']} wrong"
    return (
        f"{number_of(len(data['documents']), 'document')}{cut}, "
        f"{number_of(data['num_changes'], 'change')}, "
        f"{number_of(data['num_neighbours'], 'pair')} in a step together: {outcome}, {exactly}"
    )
