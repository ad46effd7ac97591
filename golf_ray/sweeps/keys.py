"""Keys of stages: what each stage's output is a function of, and nothing else.

A key is plain data; its fingerprint names the output's folder. Fields that change nothing but the
time or the account of a stage are left out, so that a changed log interval trains nothing anew.

Invariant: two configurations that could give a stage other results have other keys. Code counts by
`STAGE_VERSIONS`, which are raised with whatever changes the numbers that a stage computes: a
release that changes none lets stored trainings stand.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from golf_ray import fingerprint
from golf_ray.config import Config

Stage = Literal["train", "calibrate", "quantize", "evaluate", "compress"]

STAGE_VERSIONS: dict[Stage, int] = {
    "train": 1,
    "calibrate": 1,
    "quantize": 1,
    "evaluate": 3,
    "compress": 1,
}

NOT_OF_CODES = ("code_bytes", "limit_bytes", "compressor")
"""Quantisation's fields that say what codes are compared with or packed by."""


def training_key(config: Config, data: str) -> dict[str, Any]:
    """Key of a training.

    Args:
        data: fingerprint of shards and tokenizer.
    """
    from trainers.state import stage_config

    key = {
        "config": stage_config(config),
        "arithmetic": arithmetic(config),
        "device": config.cluster.tensor_device,
        "data": data,
        "version": STAGE_VERSIONS["train"],
    }
    if config.train.clip_scope == "rank":
        # Each worker clips the mean of its own micro-batches.
        key["num_workers"] = config.cluster.num_workers
    return key


def calibration_key(config: Config, weights: str, data: str) -> dict[str, Any]:
    """Key of a checkpoint's Hessians.

    Args:
        weights: fingerprint of the training or of the checkpoint's file.
    """
    fields = dataclasses.asdict(config.quantization)
    return {
        "weights": weights,
        "config": {k: v for k, v in fields.items() if k.startswith("calibration_")},
        "seq_len": config.data.seq_len,
        "arithmetic": arithmetic(config),
        "device": config.cluster.tensor_device,
        "data": data,
        "version": STAGE_VERSIONS["calibrate"],
    }


def quantization_key(config: Config, calibration: str, documents: str) -> dict[str, Any]:
    """Key of codes and of their score without adaptation.

    Args:
        calibration: fingerprint of the Hessians.
        documents: fingerprint of the text that is scored.
    """
    fields = dataclasses.asdict(config.quantization)
    scoring = dataclasses.asdict(config.evaluation)
    return {
        "calibration": calibration,
        "config": {
            k: v
            for k, v in fields.items()
            if k not in NOT_OF_CODES and not k.startswith("calibration_")
        },
        "scoring": {k: scoring[k] for k in ("seq_len", "batch_tokens", "threads")},
        "documents": documents,
        "version": STAGE_VERSIONS["quantize"],
    }


def evaluation_key(config: Config, codes: str, documents: str) -> dict[str, Any]:
    """Key of a score with test-time training.

    Args:
        codes: fingerprint of the quantised weights.
    """
    from golf_ray.adaptation.engine import WITHOUT_EFFECT

    fields = dataclasses.asdict(config.adaptation)
    return {
        "codes": codes,
        "config": {k: v for k, v in fields.items() if k not in WITHOUT_EFFECT},
        # On a CPU a group's documents are part of each other's last bits, and so are threads.
        "group_documents": config.adaptation.group_documents,
        "threads": config.evaluation.threads,
        "arithmetic": arithmetic(config),
        "device": config.cluster.tensor_device,
        "documents": documents,
        "version": STAGE_VERSIONS["evaluate"],
    }


def artifact_key(config: Config, codes: str) -> dict[str, Any]:
    """Key of an artifact's file, which carries its whole configuration.

    Args:
        codes: fingerprint of the quantised weights.
    """
    return {
        "codes": codes,
        "config": fingerprint.of_value(config.to_dict()),
        "compressor": config.quantization.compressor,
        "version": STAGE_VERSIONS["compress"],
    }


def documents_of(config: Config, data: str) -> str:
    """Fingerprint of the text that is scored: all of it, or a sample that is drawn by a seed.

    Args:
        data: fingerprint of shards and tokenizer.
    """
    adaptation = config.adaptation
    drawn = adaptation.sample_documents is not None or adaptation.document_fraction < 1
    return fingerprint.of_value(
        {
            "data": data,
            "vocab_size": config.model.vocab_size,
            "sample": adaptation.sample_documents,
            "fraction": adaptation.document_fraction,
            "seed": adaptation.seed if drawn else None,
        }
    )


def arithmetic(config: Config) -> str:
    """Arithmetic of the forward on the device that the configuration asks for."""
    import torch

    from golf_ray.model.compute import compute_dtype

    dtype = compute_dtype(config, torch.device(config.cluster.tensor_device))
    return str(dtype).removeprefix("torch.")
