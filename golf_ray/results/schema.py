"""The schema of results: what a record says, in which units, in one stable order of columns.

Three tables: `trials` (a row for everything that was trained or scored), `intervals` (the curve of
a training) and `documents` (what test-time training scored, document by document). Names carry
units; a value that is not known is missing and never 0.

Invariant: columns keep their names and types from version to version, new ones are added, and a
record of an older version is brought to this one when it is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

SCHEMA: Final = 3
"""Version of a trial's record, written with it."""

FINAL: Final = ("done", "over_limit", "pruned", "failed")
"""Statuses of a record after which nothing is run again."""
NOT_FINAL: Final = ("running", "interrupted")
"""Statuses of a record whose trial is to be run again."""

Type = Literal["Int64", "Float64", "string", "boolean"]
"""A nullable type of pandas, by its name there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A column of a table."""

    name: str
    type: Type
    text: str
    """What it says, in one line."""
    digits: int | None = None
    """Digits after the point that a reader is shown; None for as many as a value needs. Files for
    programs (CSV, JSON, Parquet) keep all of them."""


def _text(name: str, text: str) -> Column:
    return Column(name=name, type="string", text=text)


def _count(name: str, text: str) -> Column:
    return Column(name=name, type="Int64", text=text)


def _flag(name: str, text: str) -> Column:
    return Column(name=name, type="boolean", text=text)


def _number(name: str, text: str, digits: int | None) -> Column:
    return Column(name=name, type="Float64", text=text, digits=digits)


IDENTITY: Final = (
    _text("source", "name of the sweep, run folder or log that it was read from"),
    _text("kind", "trial (of a sweep), run (a run folder) or public (a log of the public program)"),
    _count("trial", "number in its sweep, from 1"),
    _text("label", "what a confirmation calls the configuration: baseline, trial 7"),
    _text("status", "running, interrupted, done, over_limit, pruned or failed"),
    _text("reason", "why it is interrupted, over a limit, pruned or failed, in one line"),
    _text("stage", "where it stands or failed: train, calibrate, quantize, evaluate"),
    _count("group", "trials of one group share a training"),
    _count("seed", "of the training's initial weights"),
)
"""Columns of `trials` before the knobs."""

MEASURES: Final = (
    # Training
    _count("steps", "steps trained"),
    _count("tokens", "tokens trained on"),
    _number("train_loss_nats", "mean loss of the last step, nats a token", 4),
    _number("val_bpb", "before quantisation: raw weights, packed evaluation, bits per byte", 5),
    _count("val_tokens_scored", "tokens that val_bpb is of"),
    _count("val_bytes_scored", "bytes that val_bpb is of"),
    # Scores of the quantised weights
    _number("int6_bpb", "after quantisation, without adaptation, bits per byte", 5),
    _count("int6_tokens_scored", "tokens that int6_bpb is of"),
    _count("int6_bytes_scored", "bytes that int6_bpb is of"),
    _number("ttt_bpb", "after quantisation, with test-time training, bits per byte", 5),
    _number("ttt_standard_error_bpb", "standard error of ttt_bpb where it is of a sample", 5),
    _number("ttt_loss_nats", "the same score in nats a token", 5),
    _count("tokens_scored", "tokens that ttt_bpb is of"),
    _count("bytes_scored", "bytes that ttt_bpb is of"),
    _count("documents_scored", "documents that ttt_bpb is of"),
    _text("weights", "what was scored: full or int6"),
    # Sizes
    _count("model_bytes", "size of the artifact"),
    _count("predicted_model_bytes", "the same as foretold from the entropy of the codes"),
    _flag("bytes_exact", "whether model_bytes was measured, not foretold"),
    _count("code_bytes", "size of the code that counts with it"),
    _count("total_bytes", "model and code"),
    _count("limit_bytes", "what total_bytes may be"),
    _flag("fits", "whether it is within that"),
    # Finalists
    _number("final_ttt_bpb", "a finalist's score on all documents", 5),
    _count("final_total_bytes", "a finalist's measured model and code"),
    _flag("final_fits", "whether that is within the limit"),
    # Parents: names of folders below the storage's `stages`
    _text("training", "of the training"),
    _text("checkpoint", "checkpoints that were given in place of a training"),
    _text("codes", "of the quantised weights"),
    _text("evaluation", "of the score with test-time training"),
    _text("artifact", "a finalist's artifact"),
    _text("final_evaluation", "of a finalist's score on all documents"),
    _text("data", "fingerprint of shards and tokenizer"),
    _text("config_fingerprint", "fingerprint of the whole configuration"),
    # Cost
    _flag("trained", "whether the training was made for this trial; false: it was found"),
    _count("restarts", "times that the training was restarted from a checkpoint"),
    _count("attempts", "times that the trial was begun"),
    _number("train_s", "training, start included; 0 where it was found", 1),
    _number("start_s", "of that, until workers took their first step", 1),
    _number("compile_s", "of that, compiling", 1),
    _number("elapsed_s", "of that, steps: what the wall-clock cap counts", 1),
    _number("calibrate_s", "Hessians", 1),
    _number("quantize_s", "codes and their score", 1),
    _number("evaluate_s", "test-time training", 1),
    _number("waited_s", "waiting for resources, or for who makes the same", 1),
    _number("control_s", "what no stage and no waiting took", 2),
    _number("wall_s", "the whole trial", 1),
    _number("train_gpu_s", "GPU-seconds of the training", 1),
    _number("evaluate_gpu_s", "GPU-seconds of test-time training", 1),
    _number("gpu_s", "GPU-seconds that stages held, also failed ones and a finalist's", 1),
    _number("tokens_per_s", "speed of the training before looping", 0),
    _number("tokens_per_s_looping", "and with it", 0),
    _count("peak_memory_bytes", "of a training's worker"),
    _number("began_unix_s", "when it began, seconds since 1970", 0),
    _number("ended_unix_s", "when it ended", 0),
    # Where and by what
    _text("device", "what it was trained or scored on, as NVIDIA H200 or a processor's name"),
    _count("num_workers", "workers of the training"),
    _text("host", "where the trial's own process ran"),
    _text("golf_ray_version", "version of golf_ray"),
    _text("torch_version", "version of torch"),
    _text("ray_version", "version of Ray"),
    _text("python_version", "version of Python"),
    _text("commit", "commit of golf_ray's source folder, with + where it is changed"),
    _count("schema", "version of the record as it was written"),
)
"""Columns of `trials` after the knobs."""

INTERVALS: Final = (
    _text("source", "as in trials"),
    _count("trial", "as in trials; of several that share a training, the one that it was made for"),
    _text("training", "as in trials"),
    _count("step", "steps done"),
    _count("num_steps", "steps of the run at most"),
    _number("train_loss_nats", "mean loss of the last step", 4),
    _number("grad_norm", "gradient norm of the last step before clipping", 4),
    _number("lr_multiplier", "schedule's factor on the learning rates", 4),
    _number("muon_momentum", "Muon's momentum in the last step", 4),
    _flag("looping", "whether the last step looped"),
    _number("elapsed_s", "training time, without validation and checkpoints", 1),
    _number("frac", "part of the run that is over", 4),
    _count("tokens", "tokens trained on so far"),
    _number("tokens_per_s", "over the steps since the last interval", 0),
    _number("val_loss_nats", "packed evaluation of the raw weights, where one was due", 5),
    _number("val_bpb", "the same in bits per byte", 5),
    _count("val_tokens", "tokens that these are of"),
    _count("val_bytes", "bytes that these are of"),
)
"""Columns of `intervals`."""

DOCUMENTS: Final = (
    _text("source", "as in trials; of a ledger, its folder's name"),
    _count("trial", "as in trials"),
    _text(
        "evaluation",
        "as evaluation or final_evaluation in trials; of a ledger by itself, the "
        "fingerprint of its header",
    ),
    _text("weights", "full or int6"),
    _count("document", "place in the validation set, from 0"),
    _number("nats", "sum of losses", 4),
    _count("tokens", "tokens scored"),
    _count("bytes", "bytes scored"),
)
"""Columns of `documents`."""


def types_of(columns: tuple[Column, ...]) -> dict[str, Type]:
    """Types by name, in order."""
    return {column.name: column.type for column in columns}
