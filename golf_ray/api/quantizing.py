"""Quantisation as one call: calibration on training shards, GPTQ, the artifact's file.

Calibration is a call of its own, too: its Hessians serve every quantisation of a checkpoint. Not
here: many quantisations of one checkpoint in one process (golf_ray.api.quantizer).

Invariant: stored Hessians give the artifact that calibrating again on the same kind of device would
give, and are refused for other weights or another calibration than their own.
"""

from __future__ import annotations

import hashlib
import json
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from golf_ray.api.machine import cpu_threads, pick_device
from golf_ray.api.weights import INITIAL_ONLY, StoredWeights, config_for, opened
from golf_ray.config import Config, get_field
from golf_ray.errors import CheckpointError, UsageError
from golf_ray.fingerprint import LENGTH, of_value
from golf_ray.records import atomic_path, make_folder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from golf_ray.quantization.artifact import QuantizationReport
    from golf_ray.quantization.sizes import Sizes

ARTIFACT_SUFFIX = ".int6.ptz"
ORIGIN_MEMBER = "golf_ray_hessians.json"
"""Member of a Hessians' file that says what they were collected from."""
_CALIBRATION_FIELDS = (
    "quantization.calibration_batches",
    "quantization.calibration_batch_tokens",
    "quantization.calibration_seed",
    "data.seq_len",
)

Phase = Callable[[str, int, int], None]
"""Told of progress: name of the phase, units done, units in all (0 where not known)."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Hessians that were collected and stored."""

    checkpoint: Path
    hessians: Path
    num_bytes: int
    """Of the file."""
    num_batches: int
    num_tokens: int
    wall_s: float
    """Seconds to collect and to store them."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "checkpoint": str(self.checkpoint),
            "hessians": str(self.hessians),
            "num_bytes": self.num_bytes,
            "num_batches": self.num_batches,
            "num_tokens": self.num_tokens,
            "wall_s": self.wall_s,
        }


def calibrate(
    checkpoint: str | Path | StoredWeights,
    config: Config | None = None,
    *,
    out: str | Path,
    progress: Phase | None = None,
    force: bool = False,
) -> Calibration:
    """Collect a checkpoint's Hessians on training shards and store them, whole or not at all.

    The file says which weights and which calibration it is of.

    Args:
        config: None for the one that the checkpoint carries.
        out: the file.
        force: allow a model configuration other than the carried one.

    Raises:
        GolfRayError: something given cannot be used; nothing is written then.
    """
    from golf_ray.quantization.artifact import calibrate_checkpoint
    from golf_ray.quantization.hessian import write_hessians

    weights, config, target = _ready(checkpoint, config, Path(out), force=force)
    state = weights.state(config.model)
    make_folder(target.parent)
    began_s = time.perf_counter()
    with cpu_threads(config.evaluation.threads):
        hessians = calibrate_checkpoint(
            config,
            state,
            _calibration_batches(config, progress or _nobody, then="store"),
            device=pick_device(config),
        )
    with atomic_path(target) as temporary:
        write_hessians(temporary, hessians)
        with zipfile.ZipFile(temporary, "a") as archive:
            folder = archive.namelist()[0].partition("/")[0]
            archive.writestr(f"{folder}/{ORIGIN_MEMBER}", json.dumps(_origin(state, config)))
    settings = config.quantization
    return Calibration(
        checkpoint=weights.path,
        hessians=target,
        num_bytes=target.stat().st_size,
        num_batches=settings.calibration_batches,
        num_tokens=settings.calibration_batches * settings.calibration_batch_tokens,
        wall_s=time.perf_counter() - began_s,
    )


def stored_hessians(
    path: str | Path, state: Mapping[str, Tensor], config: Config, *, force: bool = False
) -> dict[str, Tensor]:
    """Hessians of `calibrate`, or of any other file of `write_hessians`.

    Args:
        state: the weights that they are wanted for.
        force: do not ask where they come from. A file that does not say is not asked either.

    Raises:
        CheckpointError: the file cannot be used, or is of other weights or another calibration.
    """
    from golf_ray.quantization.hessian import read_hessians

    hessians = read_hessians(Path(path))
    found = None if force else _read_origin(Path(path))
    if found is None:
        return hessians
    for name, value in _origin(state, config).items():
        if found.get(name) != value:
            plain = name in _CALIBRATION_FIELDS
            what = f"{name} = {found.get(name)!r}, not {value!r}" if plain else f"another {name}"
            raise CheckpointError(
                f"the Hessians {path} were collected under {what}",
                "collect those of this checkpoint and configuration, or force it",
            )
    return hessians


def quantize(
    checkpoint: str | Path | StoredWeights,
    config: Config | None = None,
    *,
    out: str | Path | None = None,
    code: str | Path | None = None,
    plain: bool = False,
    force: bool = False,
    hessians: str | Path | None = None,
    carry: Config | None = None,
    progress: Phase | None = None,
) -> Quantization:
    """Calibrate on training shards, quantise, and write the artifact. An artifact over the size
    limit is written all the same: see `sizes.fits` of the result.

    Args:
        config: None for the one that the checkpoint carries.
        out: the artifact's file; by default beside the checkpoint.
        code: a code file to measure, in place of `quantization.code_bytes`.
        plain: leave the configuration out of the artifact, as public ones do.
        force: allow a model configuration other than the carried one, and Hessians of other
            weights or another calibration.
        hessians: a file of `calibrate`; no calibration is run then.
        carry: the configuration that the artifact carries; None for `config`. Equal weights make
            equal artifacts under equal ones.

    Raises:
        GolfRayError: something given cannot be used; nothing is written then.
    """
    from golf_ray.quantization.artifact import quantize_checkpoint
    from golf_ray.quantization.container import write_artifact
    from golf_ray.quantization.sizes import measure_code, sizes_of

    weights = opened(checkpoint)
    target = default_artifact(weights.path) if out is None else Path(out)
    weights, config, target = _ready(weights, config, target, force=force)
    code_bytes = None if code is None else measure_code(Path(code))
    state = weights.state(config.model)
    tell = progress or _nobody
    stored = None if hessians is None else stored_hessians(hessians, state, config, force=force)
    # A folder that cannot be written is found out before minutes of work.
    make_folder(target.parent)
    if stored is not None:
        tell("GPTQ", 0, 0)
    with cpu_threads(config.evaluation.threads):
        quantized, report = quantize_checkpoint(
            config,
            state,
            _calibration_batches(config, tell, then="GPTQ"),
            hessians=stored,
            device=pick_device(config),
        )
    tell("compress", 0, 0)
    began_s = time.perf_counter()
    size = write_artifact(
        target,
        quantized,
        config=None if plain else carry or config,
        compressor=config.quantization.compressor,
    )
    return Quantization(
        checkpoint=weights.path,
        artifact=target,
        sizes=sizes_of(size, config, code_bytes=code_bytes),
        report=report,
        compress_s=time.perf_counter() - began_s,
    )


def _ready(
    checkpoint: str | Path | StoredWeights, config: Config | None, target: Path, *, force: bool
) -> tuple[StoredWeights, Config, Path]:
    """A checkpoint and its configuration, and a file to write that does not replace it."""
    weights = full_weights(checkpoint)
    config = config_for(weights, config, force=force)
    if target.resolve() == weights.path.resolve():
        raise UsageError(f"{target} would replace its checkpoint", "choose another file")
    return weights, config, target


def full_weights(checkpoint: str | Path | StoredWeights) -> StoredWeights:
    """A checkpoint's weights.

    Raises:
        UsageError: it is an artifact.
    """
    weights = opened(checkpoint)
    if weights.kind != "full":
        raise UsageError(f"{weights.path} is quantised already", "give the checkpoint of it")
    return weights


def _origin(state: Mapping[str, Tensor], config: Config) -> dict[str, Any]:
    """What Hessians follow from, but for text and arithmetic, as plain data."""
    model = config.to_dict()["model"]
    return {
        "checkpoint": _fingerprint(state),
        "model": of_value({n: value for n, value in model.items() if n not in INITIAL_ONLY}),
        **{name: get_field(config, name) for name in _CALIBRATION_FIELDS},
    }


def _read_origin(path: Path) -> dict[str, Any] | None:
    """What a Hessians' file says of itself; None where it says nothing.

    Raises:
        CheckpointError: it says it in a way that cannot be read.
    """
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        members = [n for n in archive.namelist() if n.rpartition("/")[2] == ORIGIN_MEMBER]
        text = archive.read(members[0]) if members else None
    if text is None:
        return None
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is damaged: its {ORIGIN_MEMBER}", "collect them again")
    return found


def _fingerprint(state: Mapping[str, Tensor]) -> str:
    """Fingerprint of a state dict's names, types, shapes and values."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:LENGTH]


def default_artifact(checkpoint: Path) -> Path:
    """Where the artifact of a checkpoint goes: beside it."""
    return checkpoint.with_name(checkpoint.stem + ARTIFACT_SUFFIX)


def _calibration_batches(config: Config, tell: Phase, *, then: str) -> Iterator[NDArray[np.int64]]:
    """The batches of the seeded plan over all training shards; ids are checked as they come.

    Args:
        then: the phase that follows.
    """
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
    tell(then, 0, 0)


def _nobody(phase: str, done: int, total: int) -> None:
    pass
