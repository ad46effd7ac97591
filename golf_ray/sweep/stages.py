"""The three stages of a trial as functions of a configuration and of input files.

Each computes one output into a folder and returns the numbers that the trial's record takes over.
What was computed before is not looked for here: `golf_ray.sweep.store` does that.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from golf_ray import api
from golf_ray.api.weights import FINAL_FILE
from golf_ray.config import Config
from golf_ray.records import make_folder

ARTIFACT_FILE = "final_model.int6.ptz"


def train_stage(config: Config, folder: Path) -> dict[str, Any]:
    """Train on Ray workers; a run that was interrupted in this folder goes on.

    Raises:
        GolfRayError: the training failed.
    """
    done = api.train(config, run_dir=folder, resume=(folder / "config.json").exists())
    assert done.outcome is not None
    return {
        "wall_s": done.outcome.wall_s,
        "start_s": done.outcome.start_s,
        "compile_s": done.result.compile_s,
        "elapsed_s": done.result.elapsed_s,
        "tokens_per_s": done.result.tokens_per_s,
        "tokens_per_s_looping": done.result.tokens_per_s_looping,
        "peak_memory_bytes": done.result.peak_memory_bytes,
        "compute": dict(done.result.compute),
        "steps": done.result.steps,
        "tokens": done.result.tokens,
        "train_loss_nats": done.result.train_loss_nats,
        "val_bpb": done.val_bpb,
        "num_workers": done.outcome.num_workers,
        "restarts": len(done.outcome.restarts),
    }


def quantize_stage(config: Config, trained: Path, folder: Path) -> dict[str, Any]:
    """Make the artifact of a training and score it without adaptation.

    Raises:
        GolfRayError: it cannot be made.
    """
    began_s = time.perf_counter()
    made = api.quantize(trained / FINAL_FILE, config, out=make_folder(folder) / ARTIFACT_FILE)
    made_s = time.perf_counter() - began_s
    scored = api.evaluate(folder / ARTIFACT_FILE, config, method="packed")
    return {
        **made.sizes.to_dict(),
        "int6_bpb": scored.result.score.bpb,
        "hessians_s": made.report.hessian_s,
        "codes_s": made.report.factor_s + made.report.codes_s,
        "compress_s": made.compress_s,
        "packed_s": time.perf_counter() - began_s - made_s,
        "quantize_s": time.perf_counter() - began_s,
    }


def evaluate_stage(config: Config, artifact: Path) -> dict[str, Any]:
    """Score an artifact with test-time training, shared out over actors.

    Raises:
        GolfRayError: it cannot be scored whole.
    """
    began_s = time.perf_counter()
    scored = api.evaluate(artifact, config, method="ttt", workers=config.cluster.eval_actors)
    return {**scored.to_dict(), "wall_s": time.perf_counter() - began_s}
