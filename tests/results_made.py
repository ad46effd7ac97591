"""Results that no run made: sweeps, run folders, ledgers and public logs in the shape that real
ones have, for tests that read them.

Numbers follow the knobs (a bowl near the record's values) and a noise of the size that seeds have,
and all of them follow from the seed.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluators.ledger import Ledger
from golf_ray import fingerprint
from golf_ray.adaptation.scores import DocumentScore
from golf_ray.config import Config
from golf_ray.presets import preset
from golf_ray.results.schema import SCHEMA
from search_spaces.record import FIRST, SPACE

BEGAN_UNIX_S = 1_790_000_000.0
NOISE_BPB = 0.00075
BYTES_A_TOKEN = 3.72
BEST = {
    "train.warmdown_frac": 0.74,
    "train.muon_momentum": 0.972,
    "quantization.mlp_clip_sigmas": 12.0,
    "quantization.attention_clip_sigmas": 13.0,
    "quantization.embedding_clip_sigmas": 16.0,
    "adaptation.chunk_size": 48,
}
"""Where the bowl is deepest."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """What was made."""

    storage: Path
    folder: Path
    """The sweep's."""
    records: tuple[dict[str, Any], ...]
    """As they are on disk."""

    @property
    def stages(self) -> Path:
        return self.storage / "stages"


def make_sweep(
    storage: Path,
    name: str = "made",
    *,
    num_trials: int = 24,
    share: int = 4,
    num_intervals: int = 10,
    num_documents: int = 20,
    seed: int = 0,
    knobs: Sequence[str] = tuple(SPACE),
    all_done: bool = False,
    num_finals: int = 3,
    labels: Sequence[str] = (),
    seeds: Sequence[int] = (),
    schema: int = SCHEMA,
    base: Config | None = None,
) -> Made:
    """A sweep with its stages, as it is in the middle of running.

    Args:
        share: trials of one training.
        num_documents: per-document scores of each evaluation; 0 for no ledgers.
        knobs: searched fields, of the record's space.
        all_done: without trials that failed, are over a limit, or run still.
        num_finals: best trials that are measured.
        labels: what a confirmation calls the trials, one each.
        seeds: of the trainings, one a trial; the base's otherwise.
        schema: what records say of themselves.
    """
    base = base or preset("record")
    rng = random.Random(seed)
    config = base.to_dict()
    values = [_knobs(rng, i, share, knobs) for i in range(num_trials)]
    records = []
    for i in range(num_trials):
        status = "done" if all_done else _status(i, num_trials)
        own_seed = seeds[i] if seeds else base.train.seed
        record = _record(rng, i, share, values[i], status, config, own_seed, name)
        record["schema"] = schema
        if labels:
            record["label"] = labels[i]
        records.append(record)
    done = sorted((r for r in records if r["status"] == "done"), key=lambda r: r["ttt_bpb"])
    for record in done[:num_finals]:
        _finalise(rng, record)
    folder = storage / "sweeps" / name
    (folder / "trials").mkdir(parents=True)
    plan = {
        "schema": 2, "name": name, "base": config, "num_trials": num_trials,
        "evals_per_training": share, "objectives": ["ttt_bpb"], "sampler": "tpe", "seed": seed,
        "checkpoints": [], "points": [], "labels": list(labels), "data": "f" * 16, "finalists": 3,
        "max_concurrent": None, "optuna_url": None, "max_gpu_hours": None, "max_hours": None,
        "num_trainings": -(-num_trials // share), "space": _space(knobs),
    }  # fmt: skip
    (folder / "sweep.json").write_text(json.dumps(plan, indent=2) + "\n")
    for record in records:
        text = json.dumps(record, indent=2) + "\n"
        (folder / "trials" / f"{record['trial']:05d}.json").write_text(text)
    for record in records[::share]:
        run = storage / "stages" / record["training"] / "run"
        # A sweep in the same storage may share it.
        run.mkdir(parents=True, exist_ok=True)
        part = 1.0 if record["status"] != "running" else 0.4
        write_intervals(run, num_intervals, seed=seed + record["trial"], part=part)
    for record in records if num_documents else []:
        for place, bpb, count in _evaluations(record, num_documents):
            make_ledger(storage / "stages" / place / "ledger", count, bpb=bpb, seed=seed)
    return Made(storage=storage, folder=folder, records=tuple(records))


def _space(knobs: Sequence[str]) -> dict[str, Any]:
    from optuna.distributions import distribution_to_json

    return {
        "name": "record",
        "distributions": {knob: json.loads(distribution_to_json(SPACE[knob])) for knob in knobs},
        "first": FIRST,
        "conditions": {},
    }


def _knobs(rng: random.Random, i: int, share: int, knobs: Sequence[str]) -> dict[str, Any]:
    if i == 0:
        return {knob: FIRST[0][knob] for knob in knobs}
    # Those of the training are the group's.
    group = random.Random(7919 * (i // share) + 17)
    found: dict[str, Any] = {}
    for knob in knobs:
        distribution: Any = SPACE[knob]
        source = group if knob.startswith("train.") and share > 1 else rng
        if knob == "adaptation.chunk_size":
            found[knob] = source.choice([32, 48, 64])
        else:
            found[knob] = source.uniform(distribution.low, distribution.high)
    return found


def _status(i: int, num_trials: int) -> str:
    if i == num_trials - 1 and num_trials > 2:
        return "running"
    return {5: "failed", 9: "over_limit"}.get(i % 12, "done") if i else "done"


def _record(
    rng: random.Random,
    i: int,
    share: int,
    knobs: dict[str, Any],
    status: str,
    config: dict[str, Any],
    seed: int,
    name: str,
) -> dict[str, Any]:
    train_s, first = 640.0 + rng.uniform(-5, 5), i % share == 0
    host = f"node-{i // share % 2 + 1}"
    began = BEGAN_UNIX_S + 700.0 * (i // share // 2) + 70.0 * (i % share)
    whole = {**config}
    for knob, value in {**knobs, "train.seed": seed}.items():
        section, _, field = knob.partition(".")
        whole[section] = {**whole[section], field: value}
    record: dict[str, Any] = {
        "trial": i + 1,
        "group": i // share,
        "status": status,
        "stage": None,
        "reason": None,
        "began_unix_s": began,
        "knobs": knobs,
        "seed": seed,
        "values": {},
        "constraints": {},
        "phases_s": {},
        "golf_ray_version": "0.2.0",
        "torch_version": "2.9.1",
        "ray_version": "2.60.0",
        "python_version": "3.12.3",
        "commit": "91863c0d41",
        "host": host,
        "data": "f" * 16,
        "config_fingerprint": fingerprint.of_value(whole),
        "config": whole,
        "training": f"train-{fingerprint.of_value([name, i // share, seed])}",
        "attempts": 1,
    }
    if status == "failed":
        record.update(
            stage="train",
            reason="the loss is not finite at step 212: nan; lower train.muon_lr",
            train_loss_nats="nan",
            ended_unix_s=began + 95.0,
        )
        return record
    if status == "running":
        record["stage"] = "train"
        return record
    spans = []
    if first:
        spans.append(_span("train", began, began + train_s, 8, host))
    at = began + (train_s if first else 0.0)
    spans.append(_span("calibrate", at, at + 9.0, 1, host))
    spans.append(_span("quantize", at + 9.0, at + 21.0, 1, host))
    tokens_per_s = rng.uniform(7.9e6, 8.1e6)
    loss, bpb = _loss(rng, knobs), 0.0
    bpb = loss / math.log(2) / BYTES_A_TOKEN
    model_bytes = int(15_930_000 + 40_000 * rng.gauss(0, 0.3))
    over = status == "over_limit"
    model_bytes += 400_000 * over
    record.update(
        stage=None, trained=first, train_s=train_s if first else 0.0, start_s=28.0, compile_s=12.0,
        elapsed_s=587.0, train_gpu_s=8 * train_s if first else 0.0, num_workers=8,
        device="NVIDIA H100 80GB HBM3", tokens_per_s=tokens_per_s,
        tokens_per_s_looping=tokens_per_s * 0.7, peak_memory_bytes=41_000_000_000, steps=4_550,
        tokens=4_550 * 786_432, train_loss_nats=loss + 0.08, val_bpb=bpb + 0.0095,
        val_tokens_scored=40_540_160, val_bytes_scored=int(40_540_160 * BYTES_A_TOKEN),
        restarts=0, calibrate_s=9.0, quantize_s=12.0, int6_bpb=bpb + 0.0187,
        int6_tokens_scored=1_621_606, int6_bytes_scored=int(1_621_606 * BYTES_A_TOKEN),
        model_bytes=model_bytes, predicted_model_bytes=model_bytes - 1_200, bytes_exact=False,
        code_bytes=25_000, total_bytes=model_bytes + 25_000, limit_bytes=16_000_000,
        fits=not over, codes=[f"quantize-{fingerprint.of_value([name, i])}"], spans=spans,
        constraints={"bytes": (model_bytes + 25_000) / 16e6 - 1}, wall_s=at + 70.0 - began,
        waited_s=2.0, control_s=0.4, ended_unix_s=at + 70.0,
    )  # fmt: skip
    if over:
        record["reason"] = f"{record['total_bytes']:,} bytes, over the limit"
        return record
    spans.append(_span("evaluate", at + 21.0, at + 69.0, 1, host))
    record.update(
        ttt_bpb=bpb, ttt_loss_nats=loss, ttt_standard_error_bpb=0.0021, tokens_scored=1_621_606,
        bytes_scored=int(1_621_606 * BYTES_A_TOKEN), documents_scored=2_000, weights="int6",
        evaluate_s=48.0, evaluate_gpu_s=48.0, values={"ttt_bpb": bpb},
        evaluations=[f"evaluate-{fingerprint.of_value([name, i])}"],
    )  # fmt: skip
    return record


def _span(stage: str, began: float, ended: float, gpus: float, host: str) -> dict[str, Any]:
    return {"stage": stage, "began_unix_s": began, "ended_unix_s": ended, "gpus": gpus,
            "host": host}  # fmt: skip


def _loss(rng: random.Random, knobs: dict[str, Any]) -> float:
    bpb = 1.0722 + rng.gauss(0, NOISE_BPB)
    for knob, weight in zip(BEST, (0.004, 0.003, 0.001, 0.001, 0.0005, 0.0015), strict=True):
        if knob in knobs:
            distribution: Any = SPACE[knob]
            far = (knobs[knob] - BEST[knob]) / (distribution.high - distribution.low)
            bpb += weight * far * far
    return bpb * math.log(2) * BYTES_A_TOKEN


def _finalise(rng: random.Random, record: dict[str, Any]) -> None:
    total = record["total_bytes"] + rng.randint(-500, 500)
    record["final"] = {
        "artifacts": [f"compress-{fingerprint.of_value(record['trial'])}/final_model.int6.ptz"],
        "model_bytes": total - record["code_bytes"],
        "predicted_model_bytes": record["predicted_model_bytes"],
        "total_bytes": total,
        "fits": total <= record["limit_bytes"],
        "ttt_bpb": record["ttt_bpb"] + rng.gauss(0, 0.001),
        "evaluations": [f"evaluate-{fingerprint.of_value(['final', *record['codes']])}"],
    }


def _evaluations(record: dict[str, Any], count: int) -> list[tuple[str, float, int]]:
    found = [(name, record["ttt_bpb"], count) for name in record.get("evaluations", [])]
    final = record.get("final", {})
    return found + [(n, final["ttt_bpb"], 2 * count) for n in final.get("evaluations", [])]


def write_intervals(run: Path, count: int, *, seed: int = 0, part: float = 1.0) -> None:
    """`intervals.jsonl` of a training that got through a part of its steps."""
    rng = random.Random(seed)
    num_steps = 4_550
    lines = []
    for i in range(1, max(1, int(count * part)) + 1):
        frac = i / count
        loss = 2.6 + 4.0 * math.exp(-8 * frac) + rng.gauss(0, 0.02)
        interval = {
            "step": num_steps * i // count, "num_steps": num_steps, "train_loss_nats": loss,
            "grad_norm": rng.uniform(0.1, 0.3), "lr_multiplier": min(1.0, (1 - frac) / 0.72),
            "muon_momentum": 0.97, "looping": frac >= 0.35, "elapsed_s": 587.0 * frac,
            "frac": frac, "tokens": 786_432 * (num_steps * i // count),
            "tokens_per_s": rng.uniform(7.9e6, 8.1e6), "val_loss_nats": None, "val_bpb": None,
        }  # fmt: skip
        if i == count:
            interval.update(
                val_loss_nats=loss, val_bpb=loss / math.log(2) / BYTES_A_TOKEN,
                val_tokens=40_540_160, val_bytes=int(40_540_160 * BYTES_A_TOKEN),
            )  # fmt: skip
        lines.append(json.dumps(interval) + "\n")
    (run / "intervals.jsonl").write_text("".join(lines))


def make_ledger(folder: Path, count: int, *, bpb: float = 1.0722, seed: int = 0) -> None:
    """A ledger of documents whose lengths are those of the field and whose scores vary."""
    rng = np.random.default_rng(seed)
    # The documents are the same for all; the noise is of the weights.
    tokens = np.clip(rng.lognormal(6.2, 1.0, count), 8, 79_464).astype(int)
    hard = rng.normal(1.0, 0.12, count)
    noise = np.random.default_rng(int(bpb * 1e9)).normal(1.0, 0.002, count)
    identity = {"golf_ray": "0.2.0", "weights": fingerprint.of_value(bpb), "weights_kind": "int6"}
    scores = [
        DocumentScore(
            index=7 * i,
            nats=float(bpb * math.log(2) * BYTES_A_TOKEN * n * h * e),
            tokens=int(n),
            num_bytes=int(n * BYTES_A_TOKEN),
            trace=(),
        )
        for i, (n, h, e) in enumerate(zip(tokens, hard, noise, strict=True))
    ]
    Ledger(str(folder), identity).add(scores)


def make_run(
    folder: Path, *, seed: int = 1337, num_intervals: int = 10, ended: bool = True
) -> Path:
    """A run folder as a training on Ray leaves it."""
    config = preset("record").with_overrides({"train.seed": seed})
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.to_json())
    write_intervals(folder, num_intervals, seed=seed, part=1.0 if ended else 0.5)
    last = json.loads((folder / "intervals.jsonl").read_text().splitlines()[-1])
    events: list[dict[str, Any]] = [
        {"kind": "run", "unix_s": BEGAN_UNIX_S, "resumed": False, "num_workers": 8},
        {"kind": "began", "attempt": 1, "unix_s": BEGAN_UNIX_S + 30, "step": 0, "num_steps": 4550},
    ]
    if ended:
        result = {
            "steps": 4_550, "elapsed_s": 587.0, "tokens": 4_550 * 786_432,
            "train_loss_nats": last["train_loss_nats"], "resumed_from_step": 0, "compile_s": 12.0,
            "to_first_step_s": 25.0, "tokens_per_s": 8.0e6, "tokens_per_s_looping": 5.6e6,
            "peak_memory_bytes": 41_000_000_000, "compute": {"dtype": "bfloat16"},
        }  # fmt: skip
        outcome = {
            "result": result, "run_uri": str(folder), "checkpoint": str(folder / "checkpoints"),
            "final_model": str(folder / "final_model.pt"), "num_workers": 8, "device": "cuda",
            "threads": 1, "restarts": [], "start_s": 28.0, "wall_s": 640.0,
            "val_bpb": last["val_bpb"],
        }  # fmt: skip
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "outcome.json").write_text(json.dumps(outcome))
        events.append({"kind": "run_ended", "unix_s": BEGAN_UNIX_S + 640, "error": None})
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return folder


def make_log(
    path: Path,
    *,
    seed: int = 1337,
    ttt_bpb: float = 1.07258208,
    ttt_nats: float = 2.77059090,
    model_bytes: int = 15_951_328,
    ended: bool = True,
) -> Path:
    """A log of the public program's form."""
    keys = {
        "data_dir": "./data/", "seed": seed, "vocab_size": 8192, "num_layers": 11,
        "iterations": 20_000, "max_wallclock_seconds": 600.0, "warmdown_frac": 0.72,
        "muon_momentum": 0.97, "matrix_lr": 0.022, "ttt_chunk_size": 32, "ttt_lora_rank": 96,
        "matrix_clip_sigmas": 12.85, "embed_clip_sigmas": 20.0, "world_size": 8,
    }  # fmt: skip
    block = "".join(f"  {key}: {value}\n" for key, value in sorted(keys.items()))
    steps = "".join(
        f"{step}/20000 train_loss: {2.7 + 4 * math.exp(-step / 500):.4f} "
        f"train_time: {step * 0.129 / 60:.1f}m tok/s: {7_990_000 - step}\n"
        for step in (1, 2, 3, 500, 1000, 4500)
    )
    text = (
        f"logs/{seed}.txt\nHyperparameters:\n{block}{'=' * 40}\nRunning Python 3.12.3\n"
        "train_shards: 128\nval_tokens: 40540160\nmodel_params:35944602\n"
        f"{steps}layer_loop:enabled step:2030 frac:0.350\n"
    )
    if ended:
        text += (
            "4544/20000 val_loss: 2.8231 val_bpb: 1.0929\n"
            "stopping_early: wallclock_cap train_time: 587146ms step: 4544/20000\n"
            "peak memory allocated: 40020 MiB reserved: 44090 MiB\n"
            "diagnostic pre-quantization post-ema val_loss:2.80127543 val_bpb:1.08446201 "
            "eval_time:6921ms\n"
            "Serialized model: 135417533 bytes\nCode size: 48311 bytes\n"
            f"Serialized model quantized+brotli: {model_bytes} bytes\n"
            f"Total submission size quantized+brotli: {model_bytes + 48_311} bytes\n"
            "diagnostic quantized val_loss:2.82921350 val_bpb:1.09527777 eval_time:8877ms\n"
            f"quantized_ttt_lora val_loss:{ttt_nats:.8f} val_bpb:{ttt_bpb:.8f} "
            "eval_time:338123ms\n"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path
