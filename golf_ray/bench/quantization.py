"""Speed of quantisation: factors, codes of one setting and of many, prediction, compression.

Weights are random, and so are the tokens that the Hessians come from: shapes and sharing are those
of the configuration, sizes and times about those of a trained model, scores mean nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from golf_ray.api.machine import cpu_threads, fitted_to_machine, pick_device
from golf_ray.api.quantizer import Quantizer
from golf_ray.api.weights import StoredWeights
from golf_ray.bench.corpus import random_tokens
from golf_ray.bench.host import describe, yardsticks
from golf_ray.bench.report import Table, Tell
from golf_ray.config import Config
from golf_ray.errors import UsageError
from golf_ray.model.parameters import initial_state, tensor_specs
from golf_ray.quantization.artifact import calibrate_checkpoint
from golf_ray.quantization.container import encode_artifact
from golf_ray.quantization.sizes import predict_change

Result = TypeVar("Result")

KIND = "bench quantize"
RUNS = 3
LONG_S = 5.0
"""What takes longer is run once."""
STEP = 0.02
"""Relative distance of one setting's clip sigmas to the next one's."""


def bench_quantization(
    config: Config, *, settings: int, compress: bool, tell: Tell
) -> dict[str, Any]:
    """Measure quantisation on one device.

    Args:
        settings: clip sigmas that are quantised together.
        compress: compress an artifact too, which takes a minute at the record's size.
        tell: told what is being done.

    Raises:
        GolfRayError: a GPU is asked for and there is none.
    """
    config = fitted_to_machine(config)
    device = pick_device(config)
    tell("yardsticks")
    found: dict[str, Any] = {
        "kind": KIND,
        "host": describe(device),
        "yardsticks": yardsticks(device),
        "shape": {
            "preset": config.name,
            "settings": settings,
            "weights": "random, normal",
            "hessians": "of random tokens, 1 batch of the calibration's",
            "cpu_threads": config.evaluation.threads,
        },
    }
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with cpu_threads(config.evaluation.threads):
        found.update(_measured(config, device, settings, compress, tell))
    if device.type == "cuda":
        found["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return found


def random_state(config: Config, seed: int = 0) -> dict[str, Tensor]:
    """A state dict with no matrix left at zero: normal rows, 1 / sqrt(columns) wide."""
    generator = torch.Generator().manual_seed(seed)
    state = initial_state(config.model, seed)
    for spec in tensor_specs(config.model):
        if len(spec.shape) >= 2 and spec.optimizer in ("muon", "embedding", "head"):
            normal = torch.randn(spec.shape, generator=generator) * spec.shape[-1] ** -0.5
            state[spec.name] = normal.to(state[spec.name].dtype)
    return state


def clip_settings(config: Config, count: int) -> list[Config]:
    """The configuration, then others whose clip sigmas are wider by `STEP` each, in all groups."""
    names = [f"quantization.{g}_clip_sigmas" for g in ("mlp", "attention", "embedding")]
    values = {n: getattr(config.quantization, n.partition(".")[2]) for n in names}
    return [
        config.with_overrides({n: value * (1 + STEP * i) for n, value in values.items()})
        for i in range(count)
    ]


def _measured(
    config: Config, device: torch.device, settings: int, compress: bool, tell: Tell
) -> dict[str, Any]:
    quantization = config.quantization
    state = random_state(config)
    rows = quantization.calibration_batch_tokens // config.data.seq_len
    tokens = random_tokens(rows * config.data.seq_len, config.model.vocab_size)
    batch = tokens.astype("int64").reshape(rows, config.data.seq_len)
    tell("Hessians")
    batch_s, hessians = _timed(
        lambda: calibrate_checkpoint(config, state, [batch], device=device), device
    )
    weights = StoredWeights(
        path=Path("random.pt"), kind="full", config=None, model_bytes=None, tensors=state, kinds={}
    )
    tell("factors")
    # A quantiser keeps its factors, so each run has one of its own.
    factors_s, quantizer = _timed(lambda: _with_factors(weights, config, hessians, device), device)
    configs = clip_settings(config, settings)
    tell("codes of one setting")
    one_s, _ = _timed(lambda: quantizer.codes(configs[:1]), device)
    tell(f"codes of {settings} settings")
    many_s, states = _timed(lambda: quantizer.codes(configs), device)
    tell("prediction")
    predict_s, predicted = _timed(lambda: quantizer.predicted_bytes(states[0]), device)
    restore_s, _ = _timed(lambda: quantizer.restored(states[0]), device)
    by_rule = predict_change(config, predicted, configs[-1])
    found: dict[str, Any] = {
        "seconds": {
            "hessians_a_batch": batch_s,
            "factors": factors_s,
            "codes_1": one_s,
            "codes_many": many_s,
            "codes_a_setting": many_s / settings,
            "predict": predict_s,
            "restore": restore_s,
            "trial": many_s / settings + predict_s + restore_s,
        },
        "codes_many_over_1": many_s / one_s,
        "bytes": {
            "predicted": predicted,
            "rule_off": by_rule - quantizer.predicted_bytes(states[-1]),
        },
    }
    if compress:
        tell("compression")
        compress_s, size = _once(lambda: len(encode_artifact(states[0])), device)
        found["seconds"]["compress"] = compress_s
        found["bytes"].update(true=size, predicted_over_true=predicted / size)
    return found


def _with_factors(
    weights: StoredWeights, config: Config, hessians: Mapping[str, Tensor], device: torch.device
) -> Quantizer:
    quantizer = Quantizer(weights, config, hessians=hessians, device=device)
    quantizer.factors()
    return quantizer


def _timed(work: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Median seconds of some runs after one to warm up, of long work the only run's; the result."""
    first_s, result = _once(work, device)
    if first_s > LONG_S:
        return first_s, result
    return statistics.median(_once(work, device)[0] for _ in range(RUNS)), result


def _once(work: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began_s = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began_s, result


def against(found: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, float]:
    """Ratios of an earlier run's seconds over this one's, and of yardsticks: above 1 is faster now.

    Raises:
        UsageError: the earlier document has no figures of quantisation, or of other settings.
    """
    theirs = earlier.get("seconds")
    if not isinstance(theirs, dict):
        raise UsageError("the earlier document has no figures", f"give one of '{KIND} --json'")
    for name, value in found["shape"].items():
        if earlier.get("shape", {}).get(name) != value:
            raise UsageError(
                f"{name} is {earlier.get('shape', {}).get(name)!r} in the earlier document, "
                f"{value!r} here",
                "compare runs of one configuration",
            )
    mine = found["seconds"]
    out = {name: theirs[name] / s for name, s in mine.items() if theirs.get(name) and s}
    for name, value in found["yardsticks"].items():
        if earlier.get("yardsticks", {}).get(name):
            faster = value / earlier["yardsticks"][name]
            out[f"yardstick {name}"] = 1 / faster if name.endswith("_ms") else faster
    return out


def quantization_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    """Titles and tables of quantisation's document."""
    host, shape, seconds = found["host"], found["shape"], found["seconds"]
    count = shape["settings"]
    rows: Table = [
        ("Hessians, one batch", _s(seconds["hessians_a_batch"])),
        ("factors, once a checkpoint", _s(seconds["factors"])),
        ("codes of 1 setting", _s(seconds["codes_1"])),
        (f"codes of {count} together", _s(seconds["codes_many"])),
        (f"{count} together over 1", f"{found['codes_many_over_1']:.2f}x"),
        ("predicted size", _s(seconds["predict"])),
        ("weights to score", _s(seconds["restore"])),
        ("a setting, without its score", _s(seconds["trial"])),
    ]
    if "compress" in seconds:
        rows.append(("compression, finalists only", _s(seconds["compress"])))
    if found.get("peak_memory_bytes"):
        rows.append(("peak memory", f"{found['peak_memory_bytes'] / 1e9:.1f} GB"))
    yield f"{host['device']}, torch {host['torch']}: {shape['preset']}, {shape['weights']}", rows
    sizes = found["bytes"]
    rows = [("predicted by entropy", f"{sizes['predicted']:,} bytes")]
    if "true" in sizes:
        ratio = sizes["predicted_over_true"] - 1
        rows.append(("compressed", f"{sizes['true']:,} bytes, predicted {ratio:+.2%}"))
    rows.append(("widest clip by rule", f"{sizes['rule_off']:+,} bytes off its entropy"))
    yield "size of an artifact", rows
    yield "yardsticks", [(name, f"{value:.3g}") for name, value in found["yardsticks"].items()]
    if "against_earlier" in found:
        rows = [(name, f"{ratio:.3f}x") for name, ratio in found["against_earlier"].items()]
        yield "against the earlier run (above 1 is faster now)", rows


def _s(seconds: float) -> str:
    return f"{seconds:.3f} s"
