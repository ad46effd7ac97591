"""The Python interface, and what the command line's verbs do: train, quantise, evaluate.

Each function is one stage in this process or, where workers are asked for, on Ray. It finds the
files that a configuration names, sees that they fit each other before anything is computed, and
returns a value that knows how to become JSON. Mathematics is elsewhere; so is printing.

Invariant: weights are never scored or quantised under a model configuration other than the one
they carry, unless that is forced; a configuration that came out of a file never runs code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from golf_ray.config import Config, ModelConfig
from golf_ray.errors import CheckpointError, ConfigError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from evaluators.packed import Progress
    from evaluators.result import EvaluationResult
    from golf_ray.adaptation.engine import AdapterInit
    from golf_ray.data.tokenizer import ByteTables
    from golf_ray.model.model import GolfModel
    from golf_ray.quantization.artifact import QuantizationReport
    from golf_ray.quantization.sizes import Sizes
    from trainers.local import OnStep
    from trainers.loop import TrainingResult, Validate

Method = Literal["packed", "sliding", "ttt"]
Phase = Callable[[str, int, int], None]
"""Told of a stage's progress: name of the phase, units done, units in all (0: not known)."""

FINAL_FILE = "final_model.pt"
ARTIFACT_SUFFIX = ".int6.ptz"
_XZ_MAGIC = b"\xfd7zXZ\x00"
_INITIAL_ONLY = frozenset({"qk_gain_init", "tied_embed_init_std"})


# Stored weights ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class StoredWeights:
    """Weights as a file holds them: a state dict, or an artifact's quantised tensors."""

    path: Path
    kind: Literal["full", "int6"]
    config: Config | None
    """The configuration in the file, no more to be trusted than the file; None in public ones."""
    model_bytes: int | None
    """Size of an artifact's file."""
    tensors: dict[str, Tensor]
    kinds: dict[str, str]
    """How each weight of an artifact is stored; empty for a state dict."""

    def state(self, model: ModelConfig) -> dict[str, Tensor]:
        """The banked state dict.

        Raises:
            CheckpointError: a tensor is unknown, missing or of another shape.
        """
        from golf_ray.model.checkpoint import check_state
        from golf_ray.quantization.artifact import restore_state

        if self.kind == "full":
            check_state(model, self.tensors, str(self.path))
            return self.tensors
        return restore_state(self.tensors, self.kinds, model, str(self.path))


def open_weights(path: str | Path) -> StoredWeights:
    """Read a checkpoint (`final_model.pt`, or the folder of a run that has one) or an artifact.

    Raises:
        CheckpointError: it cannot be read, or would run code when read.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / FINAL_FILE).is_file():
            raise CheckpointError(
                f"the folder {path} holds no {FINAL_FILE}",
                "give a checkpoint file, or end the training with 'golf-ray train --resume'",
            )
        path = path / FINAL_FILE
    if _is_artifact(path):
        from golf_ray.quantization.container import read_artifact

        tensors, kinds, config = read_artifact(path)
        size = path.stat().st_size
        return StoredWeights(
            path=path, kind="int6", config=config, model_bytes=size, tensors=tensors, kinds=kinds
        )
    from golf_ray.model.checkpoint import read_state

    state, config = read_state(path)
    return StoredWeights(
        path=path, kind="full", config=config, model_bytes=None, tensors=state, kinds={}
    )


def _is_artifact(path: Path) -> bool:
    if path.suffix == ".ptz":
        return True
    try:
        with open(path, "rb") as file:
            return file.read(len(_XZ_MAGIC)) == _XZ_MAGIC
    except OSError:
        # Reading it as a checkpoint says what is wrong.
        return False


def require_trusted(config: Config, path: Path) -> None:
    """See that a configuration out of a file asks for no code but this package's.

    Raises:
        CheckpointError: it names a part that is not built in.
    """
    from golf_ray.model.parts import is_builtin

    foreign = [part for part in config.model.parts if not is_builtin(part)]
    if foreign:
        raise CheckpointError(
            f"{path} asks to run code from '{foreign[0]}', which was not done",
            f"if you trust it, add --set model.parts={','.join(config.model.parts)}",
        )


def config_for(weights: StoredWeights, config: Config | None, *, force: bool = False) -> Config:
    """The configuration to use weights under: the one given, else the one that they carry.

    Raises:
        CheckpointError: the weights carry none, one of another model, or one that would run code.
    """
    carried = weights.config
    if config is None:
        if carried is None:
            raise CheckpointError(
                f"{weights.path} carries no configuration", "give the one that it was trained under"
            )
        require_trusted(carried, weights.path)
        return carried
    if carried is not None and not force:
        differing = _differing(config.model, carried.model)
        if differing:
            name, mine, theirs = differing[0]
            others = ", ".join(f"model.{d[0]}" for d in differing[1:])
            raise CheckpointError(
                f"{weights.path} was trained under another model: model.{name} = {theirs!r} there,"
                f" {mine!r} here" + (f"; {others} differ too" if others else ""),
                "leave the configuration out to use its own, or force it with --force",
            )
    return config


def _differing(a: ModelConfig, b: ModelConfig) -> list[tuple[str, Any, Any]]:
    names = [f.name for f in dataclasses.fields(ModelConfig) if f.name not in _INITIAL_ONLY]
    return [(n, getattr(a, n), getattr(b, n)) for n in names if getattr(a, n) != getattr(b, n)]


# Machine ----------------------------------------------------------------------------------------


def pick_device(config: Config) -> torch.device:
    """Where a stage in this process computes: `auto` takes a GPU where there is one.

    Raises:
        ConfigError: a GPU is asked for and there is none.
    """
    import torch

    wanted = config.cluster.device
    found = torch.cuda.is_available()
    if wanted == "cuda" and not found:
        raise ConfigError("cluster.device = 'cuda', but there is no GPU", "see 'golf-ray doctor'")
    return torch.device("cuda" if found and wanted != "cpu" else "cpu")


@contextlib.contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Compute with a number of CPU threads: on a CPU it is part of a result's last bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Training ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """A run that ended."""

    run_dir: str
    checkpoint: Path
    """`final_model.pt`, the averaged weights."""
    result: TrainingResult

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        paths = {"run_dir": self.run_dir, "checkpoint": str(self.checkpoint)}
        return {**paths, **dataclasses.asdict(self.result)}


def train(
    config: Config,
    *,
    run_dir: str | Path,
    resume: bool = False,
    in_process: bool = False,
    address: str | None = None,
    on_step: OnStep | None = None,
) -> Training:
    """Train a model.

    Args:
        run_dir: the run's folder: a new one, or with `resume` one that is there.
        in_process: train here as one rank, without Ray.
        address: of a running Ray cluster to join; None starts a local one that ends with this.
        on_step: told of steps done, steps of the run, and a recent loss.

    Raises:
        GolfRayError: something given cannot be used, or the training failed.
    """
    from golf_ray.data.shards import find_shards
    from trainers.local import train_in_process

    shards = find_shards(config.data, config.model.vocab_size, "train")
    assert in_process
    result = train_in_process(
        config,
        Path(run_dir),
        shards,
        resume=resume,
        device=pick_device(config),
        validate=_validation(config),
        on_step=on_step,
    )
    return Training(run_dir=str(run_dir), checkpoint=Path(run_dir) / FINAL_FILE, result=result)


def read_run_config(run_dir: str | Path) -> Config:
    """The configuration of a run that is there.

    Raises:
        UsageError: there is no run.
    """
    from trainers.local import read_run_config

    return read_run_config(Path(run_dir))


def _validation(config: Config) -> Validate | None:
    """Packed evaluation of raw weights, where the configuration asks for it."""
    if config.train.val_every_steps is None:
        return None
    from evaluators.packed import score_packed

    tokens, tables = validation_stream(config)
    return lambda model, world: score_packed(model, tokens, tables, config.evaluation)


# Quantisation -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantization:
    """An artifact that was made."""

    checkpoint: Path
    artifact: Path | None
    """None where it was made to be scored and is gone."""
    sizes: Sizes
    report: QuantizationReport
    compress_s: float
    """Seconds to pack and compress."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        report = self.report
        return {
            "checkpoint": str(self.checkpoint),
            "artifact": None if self.artifact is None else str(self.artifact),
            **self.sizes.to_dict(),
            "seconds": {
                "hessians": report.hessian_s,
                "gptq": report.factor_s + report.codes_s,
                "compress": self.compress_s,
            },
            "num_codes": report.num_codes,
            "saturated_codes": report.saturated_codes,
            "raised_damping": dict(report.raised_damping),
        }


def quantize(
    checkpoint: str | Path | StoredWeights,
    config: Config | None = None,
    *,
    out: str | Path | None = None,
    code: str | Path | None = None,
    plain: bool = False,
    force: bool = False,
    progress: Phase | None = None,
) -> Quantization:
    """Calibrate on training shards, quantise, and write the artifact. An artifact over the size
    limit is written all the same: see `sizes.fits` of the result.

    Args:
        config: None for the one that the checkpoint carries.
        out: the artifact's file; by default beside the checkpoint.
        code: a code file to measure, in place of `quantization.code_bytes`.
        plain: leave the configuration out of the artifact, as public ones do.
        force: allow a model configuration other than the carried one.

    Raises:
        GolfRayError: something given cannot be used; nothing is written then.
    """
    from golf_ray.quantization.artifact import quantize_checkpoint
    from golf_ray.quantization.container import write_artifact
    from golf_ray.quantization.sizes import measure_code, sizes_of

    weights = _opened(checkpoint)
    if weights.kind != "full":
        raise UsageError(f"{weights.path} is quantised already", "give the checkpoint of it")
    config = config_for(weights, config, force=force)
    target = default_artifact(weights.path) if out is None else Path(out)
    if target.resolve() == weights.path.resolve():
        raise UsageError(f"the artifact would replace its checkpoint {target}", "choose another")
    code_bytes = None if code is None else measure_code(Path(code))
    state = weights.state(config.model)
    tell = progress or _nobody
    with cpu_threads(config.evaluation.threads):
        quantized, report = quantize_checkpoint(
            config, state, _calibration_batches(config, tell), device=pick_device(config)
        )
    tell("compress", 0, 0)
    began_s = time.perf_counter()
    size = write_artifact(
        target,
        quantized,
        config=None if plain else config,
        compressor=config.quantization.compressor,
    )
    return Quantization(
        checkpoint=weights.path,
        artifact=target,
        sizes=sizes_of(size, config, code_bytes=code_bytes),
        report=report,
        compress_s=time.perf_counter() - began_s,
    )


def default_artifact(checkpoint: Path) -> Path:
    """Where the artifact of a checkpoint goes: beside it."""
    return checkpoint.with_name(checkpoint.stem + ARTIFACT_SUFFIX)


def _calibration_batches(config: Config, tell: Phase) -> Iterator[NDArray[np.int64]]:
    """The batches of the seeded plan over all training shards; ids are checked as they come."""
    from golf_ray.data.calibration import calibration_plan
    from golf_ray.data.shards import find_shards, open_shard

    vocab_size, settings = config.model.vocab_size, config.quantization
    paths = find_shards(config.data, vocab_size, "train")
    shards = [open_shard(path) for path in paths]
    plan = calibration_plan(
        [len(tokens) for tokens in shards],
        num_batches=settings.calibration_batches,
        rows_per_batch=settings.calibration_batch_tokens // config.data.seq_len,
        seq_len=config.data.seq_len,
        seed=settings.calibration_seed,
    )
    for i in range(plan.num_batches):
        tell("Hessians", i, plan.num_batches)
        batch = plan.batch(i, shards)
        if int(batch.max()) >= vocab_size:
            # Checking whole shards costs minutes on real data, so only to say which it is.
            for path in paths:
                open_shard(path, vocab_size)
        yield batch
    tell("GPTQ", 0, 0)


# Evaluation -------------------------------------------------------------------------------------


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
        data = {"checkpoint": str(self.checkpoint)}
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

    Raises:
        GolfRayError: something given cannot be used.
    """
    weights = _opened(checkpoint)
    config = config_for(weights, config, force=force)
    if adapter_init is not None and method != "ttt":
        raise UsageError(f"adapters have no part in '{method}' evaluation", "use --method ttt")
    if not quantize_first:
        return _evaluate_weights(
            weights, config, method, adapter_init, workers, address, progress
        )
    with tempfile.TemporaryDirectory(prefix="golf-ray-") as folder:
        kept = None if artifact is None else Path(artifact)
        target = kept or Path(folder) / default_artifact(weights.path).name
        made = quantize(weights, config, out=target, force=force, progress=quantize_progress)
        scored = _evaluate_weights(
            open_weights(target), config, method, adapter_init, workers, address, progress
        )
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


def _evaluate_weights(
    weights: StoredWeights,
    config: Config,
    method: Method,
    adapter_init: str | Path | None,
    workers: int | None,
    address: str | None,
    progress: Progress | None,
) -> Evaluation:
    from evaluators.result import evaluate as evaluate_here
    from golf_ray.model.checkpoint import build_model
    from golf_ray.quantization.sizes import sizes_of
    from trainers.loop import compute_dtype

    tokens, tables = validation_stream(config)
    state = weights.state(config.model)
    device = pick_device(config)
    adapters = None if adapter_init is None else _read_adapters(Path(adapter_init), config)
    assert workers is None
    with cpu_threads(config.evaluation.threads):
        model = build_model(
            config.model, state, device=device, compute_dtype=compute_dtype(config, device)
        )
        result = evaluate_here(
            model,
            config,
            method,
            tokens=tokens,
            tables=tables,
            weights=weights.kind,
            adapter_init=adapters,
            progress=progress,
        )
    size = weights.model_bytes
    return Evaluation(
        checkpoint=weights.path,
        result=result,
        device=device.type,
        workers=workers,
        sizes=None if size is None else sizes_of(size, config),
    )


def _read_adapters(path: Path, config: Config) -> AdapterInit:
    from golf_ray.adaptation.adapters import adapter_slots, read_adapter_init

    slots = adapter_slots(config.model, config.adaptation.sites)
    return read_adapter_init(path, slots, config.adaptation.rank)


def _opened(checkpoint: str | Path | StoredWeights) -> StoredWeights:
    return checkpoint if isinstance(checkpoint, StoredWeights) else open_weights(checkpoint)


def _nobody(phase: str, done: int, total: int) -> None:
    pass
