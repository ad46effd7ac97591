"""Evaluation as one call: weights, validation stream, method; in this process or on Ray."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from golf_ray.api.machine import connected, cpu_threads, pick_device
from golf_ray.api.quantizing import Phase, Quantization, default_artifact, quantize
from golf_ray.api.weights import StoredWeights, config_for, open_weights, opened
from golf_ray.config import Config
from golf_ray.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from evaluators.ledger import Ledger
    from evaluators.packed import Progress
    from evaluators.pool import PoolEvent
    from evaluators.result import EvaluationResult
    from golf_ray.adaptation.engine import AdapterInit
    from golf_ray.data.tokenizer import ByteTables
    from golf_ray.quantization.sizes import Sizes

    OnEvent = Callable[[PoolEvent], None]

Method = Literal["packed", "sliding", "ttt"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """A score, and what it is the score of."""

    checkpoint: Path
    """The file that was given."""
    result: EvaluationResult
    device: str
    workers: int | None
    """Actors that shared the work; None for this process."""
    sizes: Sizes | None = None
    """Of the artifact, where one was scored."""
    quantization: Quantization | None = None
    """Where the artifact was made on the way."""

    def to_dict(self, *, per_document: bool = False) -> dict[str, Any]:
        """Plain data for JSON."""
        data: dict[str, Any] = {"checkpoint": str(self.checkpoint)}
        data.update(self.result.to_dict(per_document=per_document))
        data.update({"device": self.device, "workers": self.workers})
        if self.sizes is not None:
            data.update(self.sizes.to_dict())
        if self.quantization is not None:
            data["quantization"] = self.quantization.to_dict()
        return data


def evaluate(
    checkpoint: str | Path | StoredWeights,
    config: Config | None = None,
    *,
    method: Method = "packed",
    quantize_first: bool = False,
    artifact: str | Path | None = None,
    adapter_init: str | Path | None = None,
    workers: int | None = None,
    address: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    quantize_progress: Phase | None = None,
    on_event: OnEvent | None = None,
    tell: Callable[[str], None] | None = None,
    ledger: str | Path | None = None,
) -> Evaluation:
    """Score a checkpoint or an artifact on the validation stream of its configuration.

    Args:
        config: None for the one that the checkpoint carries.
        method: `packed`, `sliding`, or `ttt` for test-time training.
        quantize_first: make the artifact and score that.
        artifact: keep the artifact there.
        adapter_init: an .npz with the adapters' A, for `ttt`.
        workers: Ray actors to share the work; None computes in this process.
        address: of a running Ray cluster, for workers.
        force: allow a model configuration other than the carried one.
        progress: told of every batch, or document of `ttt`.
        quantize_progress: told how quantisation goes on.
        on_event: told of actors that are lost, and of what is done about it.
        tell: told, in this process, how many documents `ttt` takes at a time, and of a lack of
            memory; and what a ledger holds.
        ledger: folder or URI where `ttt` keeps what is scored: with the same one again it does
            only what is missing.

    Raises:
        GolfRayError: something given cannot be used, or not everything could be scored.
    """
    weights = opened(checkpoint)
    config = config_for(weights, config, force=force)
    if adapter_init is not None and method != "ttt":
        raise UsageError(f"adapters have no part in '{method}' evaluation", "use --method ttt")
    if ledger is not None and method != "ttt":
        raise UsageError(f"'{method}' evaluation keeps no ledger", "use --method ttt")
    # What cannot be scored is found out before minutes of quantisation.
    tokens, tables = validation_stream(config)
    job = _Job(
        config=config,
        method=method,
        tokens=tokens,
        tables=tables,
        adapters=None if adapter_init is None else _read_adapters(Path(adapter_init), config),
        workers=workers,
        address=address,
        progress=progress,
        on_event=on_event,
        tell=tell,
        ledger=None if ledger is None else str(ledger),
        adapter_file=None if adapter_init is None else Path(adapter_init),
    )
    if not quantize_first:
        return _score(weights, job)
    with tempfile.TemporaryDirectory(prefix="golf-ray-") as folder:
        kept = None if artifact is None else Path(artifact)
        target = kept or Path(folder) / default_artifact(weights.path).name
        made = quantize(weights, config, out=target, force=force, progress=quantize_progress)
        scored = _score(open_weights(target), job)
    made = dataclasses.replace(made, artifact=kept)
    return dataclasses.replace(scored, checkpoint=weights.path, quantization=made)


def validation_stream(config: Config) -> tuple[NDArray[np.uint16], ByteTables]:
    """All validation tokens [T] of a configuration, and the bytes of each token id.

    Raises:
        DataError: shards or tokenizer are missing, damaged, or of another vocabulary.
    """
    from golf_ray.data.shards import find_shards, load_tokens
    from golf_ray.data.tokenizer import byte_tables, find_tokenizer

    vocab_size = config.model.vocab_size
    tables = byte_tables(find_tokenizer(config.data, vocab_size), vocab_size)
    return load_tokens(find_shards(config.data, vocab_size, "val"), vocab_size), tables


def digests_of_data(tokens: NDArray[np.uint16], tables: ByteTables) -> dict[str, str]:
    """What a ledger's header says of the text that it holds scores of."""
    from evaluators.ledger import digest_of

    return {
        "tokens": digest_of(tokens),
        "tokenizer": digest_of(tables.base_bytes, tables.has_leading_space, tables.is_boundary),
    }


def identity_of(weights: StoredWeights, config: Config) -> dict[str, Any]:
    """What a ledger's header says of the weights whose scores it holds."""
    from golf_ray import fingerprint

    return {
        "weights": fingerprint.of_file(weights.path),
        "weights_kind": weights.kind,
        "model": dataclasses.asdict(config.model),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """What to score, on what and how; all but the weights."""

    config: Config
    method: Method
    tokens: NDArray[np.uint16]
    tables: ByteTables
    adapters: AdapterInit | None
    workers: int | None
    address: str | None
    progress: Progress | None
    on_event: OnEvent | None
    tell: Callable[[str], None] | None
    ledger: str | None
    adapter_file: Path | None


def _ledger(weights: StoredWeights, job: _Job) -> Ledger | None:
    """The job's ledger, under what its scores follow from."""
    if job.ledger is None:
        return None
    import torch

    from evaluators.ledger import Ledger
    from golf_ray import __version__, fingerprint
    from golf_ray.adaptation.engine import WITHOUT_EFFECT
    from golf_ray.model.compute import compute_dtype

    config = job.config
    here = job.workers is None
    device = pick_device(config).type if here else _device_of_actors(config)
    settings = dataclasses.asdict(config.adaptation)
    ledger = Ledger(
        job.ledger,
        {
            "golf_ray": __version__,
            **identity_of(weights, config),
            "adaptation": {k: v for k, v in settings.items() if k not in WITHOUT_EFFECT},
            "adapters": job.adapter_file and fingerprint.of_file(job.adapter_file),
            "arithmetic": str(compute_dtype(config, torch.device(device))),
            **digests_of_data(job.tokens, job.tables),
        },
    )
    if job.tell is not None:
        for line in ledger.troubles:
            job.tell(line)
        if ledger.scores:
            job.tell(f"{len(ledger.scores):,} documents are in {ledger.uri} already")
    return ledger


def _score(weights: StoredWeights, job: _Job) -> Evaluation:
    from golf_ray.quantization.sizes import sizes_of

    here = job.workers is None
    device = pick_device(job.config)
    size = weights.model_bytes
    return Evaluation(
        checkpoint=weights.path,
        result=_score_here(weights, job, device) if here else _score_on_ray(weights, job),
        device=device.type if here else _device_of_actors(job.config),
        workers=job.workers,
        sizes=None if size is None else sizes_of(size, job.config),
    )


def _score_here(weights: StoredWeights, job: _Job, device: torch.device) -> EvaluationResult:
    from evaluators.result import evaluate as evaluate_here
    from golf_ray.model.checkpoint import build_model
    from golf_ray.model.compute import choose_compute

    model = job.config.model
    with cpu_threads(job.config.evaluation.threads):
        return evaluate_here(
            build_model(
                model,
                weights.state(model),
                device=device,
                compute=choose_compute(job.config, device),
            ),
            job.config,
            job.method,
            tokens=job.tokens,
            tables=job.tables,
            weights=weights.kind,
            adapter_init=job.adapters,
            progress=job.progress,
            tell=job.tell,
            ledger=_ledger(weights, job),
        )


def _score_on_ray(weights: StoredWeights, job: _Job) -> EvaluationResult:
    from evaluators.ray_evaluation import evaluate_on_ray
    from golf_ray.resources import evaluation_bundles

    # Opened before anything starts: it may be another evaluation's.
    ledger = _ledger(weights, job)
    state = weights.state(job.config.model)
    bundles = evaluation_bundles(job.config, job.workers)
    with connected(job.address, bundles, "PACK", "evaluation"):
        return evaluate_on_ray(
            state,
            job.config,
            job.method,
            tokens=job.tokens,
            tables=job.tables,
            weights=weights.kind,
            num_actors=job.workers,
            adapter_init=job.adapters,
            progress=job.progress,
            on_event=job.on_event,
            ledger=ledger,
        )


def _device_of_actors(config: Config) -> str:
    cluster = config.cluster
    if cluster.device == "auto":
        return "cuda" if cluster.gpus_per_worker > 0 else "cpu"
    return cluster.device


def _read_adapters(path: Path, config: Config) -> AdapterInit:
    from golf_ray.adaptation.adapters import adapter_slots, read_adapter_init

    slots = adapter_slots(config.model, config.adaptation.sites)
    return read_adapter_init(path, slots, config.adaptation.rank)
