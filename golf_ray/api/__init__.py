"""The Python interface, and what the command line's verbs do: train, quantise, evaluate.

Each function is one stage in this process or, where workers are asked for, on Ray. It finds the
files that a configuration names, sees that they fit each other before anything is computed, and
returns a value that knows how to become JSON. Mathematics is elsewhere; so is printing.

Invariant: weights are never scored or quantised under a model configuration other than the one
they carry, unless that is forced; a configuration that came out of a file never runs code.
"""

from golf_ray.api.auditing import LedgerAudit, audit
from golf_ray.api.evaluating import (
    Evaluation,
    Evaluations,
    FailedEvaluation,
    Method,
    evaluate,
    evaluate_many,
    validation_stream,
)
from golf_ray.api.machine import cpu_count, cpu_threads, fitted_to_machine, pick_device
from golf_ray.api.quantizer import Quantizer
from golf_ray.api.quantizing import (
    Calibration,
    Quantization,
    calibrate,
    default_artifact,
    quantize,
    stored_hessians,
)
from golf_ray.api.training import Training, read_run_config, train
from golf_ray.api.weights import StoredWeights, config_for, open_weights, require_trusted

__all__ = [
    "Calibration",
    "Evaluation",
    "Evaluations",
    "FailedEvaluation",
    "LedgerAudit",
    "Method",
    "Quantization",
    "Quantizer",
    "StoredWeights",
    "Training",
    "audit",
    "calibrate",
    "config_for",
    "cpu_count",
    "cpu_threads",
    "default_artifact",
    "evaluate",
    "evaluate_many",
    "fitted_to_machine",
    "open_weights",
    "pick_device",
    "quantize",
    "read_run_config",
    "require_trusted",
    "stored_hessians",
    "train",
    "validation_stream",
]
