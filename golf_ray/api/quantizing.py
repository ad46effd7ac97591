"""Quantisation as one call: calibration on training shards, GPTQ, the artifact's file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from golf_ray.api.machine import cpu_threads, pick_device
from golf_ray.api.weights import StoredWeights, config_for, opened
from golf_ray.config import Config
from golf_ray.errors import UsageError
from golf_ray.records import make_folder

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from golf_ray.quantization.artifact import QuantizationReport
    from golf_ray.quantization.sizes import Sizes

ARTIFACT_SUFFIX = ".int6.ptz"

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

    weights = opened(checkpoint)
    if weights.kind != "full":
        raise UsageError(f"{weights.path} is quantised already", "give the checkpoint of it")
    config = config_for(weights, config, force=force)
    target = default_artifact(weights.path) if out is None else Path(out)
    if target.resolve() == weights.path.resolve():
        raise UsageError(f"the artifact would replace its checkpoint {target}", "choose another")
    code_bytes = None if code is None else measure_code(Path(code))
    state = weights.state(config.model)
    # A folder that cannot be written is found out before minutes of work.
    make_folder(target.parent)
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


def _nobody(phase: str, done: int, total: int) -> None:
    pass
