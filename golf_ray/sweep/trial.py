"""One trial: train, quantise, evaluate, each stage only if its output is not there yet.

The trial's record is written as it happens: after each stage the file on disk says what is known,
and a trial that failed says why. Runs inside a Ray Tune trial; knows nothing of the search.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from golf_ray.config import Config
from golf_ray.errors import GolfRayError
from golf_ray.records import atomic_write_json
from golf_ray.sweep.store import StageOutput, StageStore, code_version, data_fingerprint

RECORD_SCHEMA = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialSpec:
    """What a trial is, before it runs."""

    number: int
    """Place in the sweep, from 1."""
    knobs: dict[str, Any]
    """The searched fields' values."""
    config: Config
    """The whole configuration, knobs included."""


class TrialRecord:
    """A trial's file, rewritten whole at every change.

    Args:
        path: of the file.
        spec: of the trial.
    """

    def __init__(self, path: Path, spec: TrialSpec) -> None:
        self.path = path
        self.data: dict[str, Any] = {
            "schema": RECORD_SCHEMA,
            "trial": spec.number,
            "status": "running",
            "stage": "train",
            "reason": None,
            "began_unix_s": time.time(),
            "knobs": spec.knobs,
            "seed": spec.config.train.seed,
            "code_version": code_version(),
            "config": spec.config.to_dict(),
        }
        self.write()

    def update(self, **values: Any) -> None:
        """Take values in and write."""
        self.data.update(values)
        self.write()

    def write(self) -> None:
        """Write the file, whole."""
        atomic_write_json(self.path, self.data)


def run_trial(spec: TrialSpec, store: StageStore, record_path: Path) -> dict[str, Any]:
    """Run what is missing of a trial's stages and score it.

    Returns:
        the record's data.

    Raises:
        Exception: a stage failed; the record says so, and the search must not take it for a value.
    """
    record = TrialRecord(record_path, spec)
    try:
        trained = _train(spec.config, store, record)
        quantized = _quantize(spec.config, store, trained, record)
        _evaluate(spec.config, store, quantized, record)
    except Exception as error:
        record.update(status="failed", reason=_reason(error), ended_unix_s=time.time())
        raise
    record.update(status="done", stage=None, ended_unix_s=time.time())
    return record.data


def _reason(error: Exception) -> str:
    if isinstance(error, GolfRayError):
        return str(error)
    line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {line}"


def training_key(config: Config) -> dict[str, Any]:
    """What a training's output is a function of."""
    from trainers.state import stage_config

    return {
        "config": stage_config(config),
        "data": data_fingerprint(config),
        "code": code_version(),
    }


def _train(config: Config, store: StageStore, record: TrialRecord) -> StageOutput:
    from golf_ray.sweep.stages import train_stage

    key = training_key(config)
    record.update(training=store.folder("train", key).name)
    output = store.get("train", key, lambda folder: train_stage(config, folder))
    record.update(
        stage="quantize",
        trained=not output.reused,
        train_s=0.0 if output.reused else output.result["wall_s"],
        phases_s={name: output.result[f"{name}_s"] for name in ("start", "compile", "elapsed")},
        tokens_per_s=output.result["tokens_per_s"],
        tokens_per_s_looping=output.result["tokens_per_s_looping"],
        peak_memory_bytes=output.result["peak_memory_bytes"],
        compute=output.result["compute"],
        steps=output.result["steps"],
        train_loss_nats=output.result["train_loss_nats"],
        val_bpb=output.result["val_bpb"],
        restarts=output.result["restarts"],
    )
    return output


def _quantize(
    config: Config, store: StageStore, trained: StageOutput, record: TrialRecord
) -> StageOutput:
    from golf_ray.sweep.stages import quantize_stage

    key = {
        "config": config.to_dict()["quantization"],
        "training": trained.fingerprint,
        "code": code_version(),
    }
    output = store.get(
        "quantize", key, lambda folder: quantize_stage(config, trained.folder, folder)
    )
    record.update(
        stage="evaluate",
        quantize_s=0.0 if output.reused else output.result["quantize_s"],
        phases_s={
            **record.data["phases_s"],
            **{
                name: output.result[f"{name}_s"]
                for name in ("hessians", "codes", "compress", "packed")
            },
        },
        int6_bpb=output.result["int6_bpb"],
        model_bytes=output.result["model_bytes"],
        code_bytes=output.result["code_bytes"],
        total_bytes=output.result["total_bytes"],
        fits=output.result["fits"],
    )
    return output


def _evaluate(
    config: Config, store: StageStore, quantized: StageOutput, record: TrialRecord
) -> None:
    from golf_ray.sweep.stages import ARTIFACT_FILE, evaluate_stage

    whole = config.to_dict()
    key = {
        "config": {name: whole[name] for name in ("adaptation", "evaluation")},
        "artifact": quantized.fingerprint,
        "code": code_version(),
    }
    artifact = quantized.folder / ARTIFACT_FILE
    output = store.get("evaluate", key, lambda _: evaluate_stage(config, artifact))
    record.update(
        evaluate_s=0.0 if output.reused else output.result["wall_s"],
        phases_s={**record.data["phases_s"], "ttt": output.result["wall_s"]},
        ttt_bpb=output.result["val_bpb"],
        ttt_loss_nats=output.result["val_loss_nats"],
        tokens_scored=output.result["tokens_scored"],
        bytes_scored=output.result["bytes_scored"],
        weights=output.result["weights"],
    )
