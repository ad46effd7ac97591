"""Benchmark reports: what is run, the document that comes out, and its tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from golf_ray.bench import training
from golf_ray.bench.host import describe, yardsticks
from golf_ray.bench.kernels import time_kernels
from golf_ray.config import Config
from golf_ray.errors import GolfRayError, UsageError

Tell = Callable[[str], None]
Table = list[tuple[str, ...]]

SPEEDS = (("loop off", "tokens_per_s"), ("loop on", "tokens_per_s_looping"))


def bench_training(
    config: Config,
    *,
    steps: int,
    on_data: bool,
    profile: bool,
    baseline: bool,
    start_up: bool,
    tell: Tell,
) -> dict[str, Any]:
    """Measure training with `config.cluster.num_workers` workers.

    Args:
        steps: counted steps of either kind.
        on_data: on the training shards of the configuration; else on random documents.
        tell: told what is being done.

    Raises:
        GolfRayError: data, a cluster or a GPU that is asked for is not there.
    """
    from golf_ray.api.machine import fitted_to_machine, pick_device

    config = fitted_to_machine(training.bench_config(config, steps))
    device = pick_device(config)
    tell("yardsticks")
    found: dict[str, Any] = {
        "kind": "bench train",
        "host": describe(device),
        "yardsticks": yardsticks(device),
        "shape": {
            "batch_tokens": config.train.batch_tokens,
            "micro_batches": config.train.micro_batches,
            "workers": config.cluster.num_workers,
            "steps_of_either_kind": steps,
            "text": "training shards" if on_data else "random documents of the field's lengths",
        },
    }
    with training.random_shards(config) as random:
        shards = _shards(config) if on_data else random
        tell("training")
        if config.cluster.num_workers > 1:
            found["training"] = _on_ray(config, shards)
        else:
            found["training"] = training.run_here(config, shards, device, profiled=profile)
        if baseline:
            tell("torch.compile alone")
            single = config.with_overrides({"cluster.num_workers": 1})
            found["baseline"] = training.run_here(training.plain_config(single), shards, device)
            found["against_baseline"] = training.ratios(found["training"], found["baseline"])
        if start_up:
            tell("start-up")
            found["start_up"] = training.time_start_up(config, shards)
    return found


def _shards(config: Config) -> Any:
    from golf_ray.data.shards import find_shards

    return find_shards(config.data, config.model.vocab_size, "train")


def _on_ray(config: Config, shards: Any) -> dict[str, Any]:
    from golf_ray.api.machine import connected
    from golf_ray.resources import training_bundles

    bundles = training_bundles(config)
    with connected(None, bundles, config.cluster.placement, "benchmark", files=shards):
        return training.run_on_ray(config, shards)


def bench_kernels(config: Config, *, compiled: bool, tell: Tell) -> dict[str, Any]:
    """Measure each operation at the shapes of one micro-batch.

    Raises:
        GolfRayError: a GPU is asked for and there is none.
    """
    from golf_ray.api.machine import fitted_to_machine, pick_device
    from golf_ray.model.compute import choose_compute

    config = fitted_to_machine(config)
    device = pick_device(config)
    compute = choose_compute(config, device)
    rows = []
    for timing in time_kernels(config, device, compute, compiled=compiled):
        tell(timing.operation)
        rows.append(timing.to_dict())
    return {
        "kind": "bench kernels",
        "host": describe(device),
        "compute": compute.to_dict(),
        "kernels": rows,
    }


def bench_ttt(
    config: Config, *, profile: bool, mixed_s: float, start_up: bool, tell: Tell
) -> dict[str, Any]:
    """Measure test-time training on one device.

    Args:
        mixed_s: seconds of documents of mixed lengths, about.
        tell: told what is being done.

    Raises:
        GolfRayError: a GPU is asked for and there is none.
    """
    from golf_ray.api.machine import cpu_threads, fitted_to_machine, pick_device
    from golf_ray.bench import adaptation

    config = fitted_to_machine(config)
    device = pick_device(config)
    tell("yardsticks")
    found: dict[str, Any] = {
        "kind": "bench ttt",
        "host": describe(device),
        "yardsticks": yardsticks(device),
    }
    with cpu_threads(config.evaluation.threads):
        found.update(
            adaptation.bench_ttt(
                config, device, profile=profile, mixed_s=mixed_s, start_up=start_up, tell=tell
            )
        )
    return found


def against(found: dict[str, Any], earlier: dict[str, Any]) -> dict[str, float]:
    """Ratios of this run's figures over an earlier one's: above 1 is faster now.

    Raises:
        UsageError: the earlier document has no figures of training.
    """
    if not isinstance(earlier.get("training"), dict):
        raise UsageError("the earlier document has no figures", "give one of 'bench train --json'")
    out = training.ratios(found["training"], earlier["training"])
    mine, theirs = found["yardsticks"], earlier.get("yardsticks", {})
    for name in mine:
        if theirs.get(name):
            faster = mine[name] / theirs[name]
            out[f"yardstick {name}"] = 1 / faster if name.endswith("_ms") else faster
    return out


# Tables -----------------------------------------------------------------------------------------


def training_rows(found: dict[str, Any]) -> Iterator[tuple[str, Table]]:
    """Titles and tables of a training's document."""
    host, shape, mine = found["host"], found["shape"], found["training"]
    yield (
        f"{host['device']}, torch {host['torch']}: {_workers(shape['workers'])}, "
        f"{shape['batch_tokens']:,} tokens a step, {shape['text']}",
        list(_speed_rows(found, mine)),
    )
    if found.get("start_up"):
        yield (
            "from entering the training function to its first step",
            _seconds_rows(found["start_up"]),
        )
    for name, shares in (mine.get("profile") or {}).items():
        yield _profile_table(f"one step, {name}", shares)
    yield "yardsticks", _yardstick_rows(found)
    if "against_earlier" in found:
        rows: Table = [(name, f"{ratio:.3f}x") for name, ratio in found["against_earlier"].items()]
        yield "against the earlier run (above 1 is faster now)", rows


def _speed_rows(found: dict[str, Any], mine: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    base = found.get("baseline")
    yield ("", "golf_ray", *(("torch.compile alone", "ratio") if base else ()))
    for name, field in SPEEDS:
        cells = [_speed(mine[field])]
        if base:
            ratio = found["against_baseline"].get(field)
            cells += [_speed(base[field]), "" if ratio is None else f"{ratio:.2f}x"]
        yield (name, *cells)
    if mine["peak_memory_bytes"] is not None:
        more = (f"{base['peak_memory_bytes'] / 1e9:.1f} GB", "") if base else ()
        yield ("peak memory", f"{mine['peak_memory_bytes'] / 1e9:.1f} GB", *more)
    more = (f"{base['compile_s']:.1f} s", "") if base else ()
    yield ("compile and warm up", f"{mine['compile_s']:.1f} s", *more)
    yield (
        "attention",
        mine["compute"]["attention"],
        *((base["compute"]["attention"], "") if base else ()),
    )


def _workers(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"


def _speed(tokens_per_s: float | None) -> str:
    return "not measured" if tokens_per_s is None else f"{tokens_per_s:,.0f} tok/s"


def kernel_rows(found: dict[str, Any]) -> Iterator[tuple[str, Table]]:
    """Title and table of the kernels' document."""
    host, compute = found["host"], found["compute"]
    rows: Table = [
        (
            "operation", "shape", "fused", "torch", "compiled", "against torch",
            "against compiled", "difference",
        )
    ]  # fmt: skip
    for row in found["kernels"]:
        rows.append(
            (
                row["operation"],
                row["shape"],
                _ms(row["fused_forward_ms"], row["fused_both_ms"]),
                _ms(row["twin_forward_ms"], row["twin_both_ms"]),
                _ms(row["compiled_forward_ms"], row["compiled_both_ms"]),
                _times(row["against_twin"]),
                _times(row["against_compiled"]),
                "-" if row["difference"] is None else f"{row['difference']:.1e}",
            )
        )
    yield (
        f"{host['device']}, torch {host['torch']}, {compute['dtype']}, attention "
        f"{compute['attention']}: ms of kernels, forward / forward and backward",
        rows,
    )


def _ms(forward: float | None, both: float | None) -> str:
    if forward is None:
        return "-"
    return f"{forward:.3f}" + ("" if both is None else f" / {both:.3f}")


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def kernel_fault(found: dict[str, Any]) -> GolfRayError | None:
    """What to tell of fused operations that compute something else than torch's, if any do."""
    wrong = [row for row in found["kernels"] if row["right"] is False]
    if not wrong:
        return None
    names = ", ".join(f"{row['operation']} by {row['difference']:.2g}" for row in wrong)
    return GolfRayError(
        f"fused operations differ from torch's at these shapes by more than rounding: {names}; "
        "most likely Triton makes wrong machine code of them here",
        "use another Triton or another assembler (TRITON_PTXAS_PATH), or --set "
        "kernels.backend=torch",
    )


def ttt_rows(found: dict[str, Any]) -> Iterator[tuple[str, Table]]:
    """Titles and tables of test-time training's document."""
    host, compute, budget = found["host"], found["compute"], found["budget"]
    rows: Table = [("window", "documents", "a chunk", "its last", "window tok/s")]
    rows += [
        (
            f"{one['window']:,}",
            str(one["documents"]),
            f"{one['chunk_ms']:.3f} ms",
            f"{one['ending_ms']:.3f} ms",
            f"{one['window_tokens_per_s']:,.0f}",
        )
        for one in found["classes"]
    ]
    yield (
        f"{host['device']}, torch {host['torch']}, {compute['dtype']}, attention "
        f"{compute['attention']}: steps of {budget['step_tokens']:,} tokens, "
        f"{budget['residents']} documents at a time",
        rows,
    )
    whole, mixed = found["whole_set"], found["mixed"]
    rows = [
        ("documents", f"{whole['documents']:,} of {whole['tokens']:,} tokens"),
        ("on one such device", f"{whole['gpu_s']:,.0f} s"),
        ("by the price of each chunk", f"{whole['priced_gpu_s']:,.0f} s"),
        (
            "mixed documents",
            f"{mixed['measured_s']:.1f} s for {mixed['documents']}, priced "
            f"{mixed['priced_s']:.1f} s",
        ),
        ("in a fresh engine, as a trial has it", f"{mixed['fresh_s']:.1f} s"),
    ]
    if found.get("peak_memory_bytes"):
        rows.append(("peak memory", f"{found['peak_memory_bytes'] / 1e9:.1f} GB"))
    yield f"the whole set, steady ({whole['method']})", rows
    if found.get("first_result"):
        yield "from a process's start to its first score", _seconds_rows(found["first_result"])
    if found.get("profile"):
        yield _profile_table("growing windows", found["profile"])
    yield "yardsticks", _yardstick_rows(found)


def _seconds_rows(seconds: dict[str, float]) -> Table:
    return [(name.removesuffix("_s"), f"{s:.1f} s") for name, s in seconds.items()]


def _yardstick_rows(found: dict[str, Any]) -> Table:
    return [(name, f"{value:.3g}") for name, value in found["yardsticks"].items()]


def _profile_table(name: str, shares: list[dict[str, Any]]) -> tuple[str, Table]:
    total = sum(share["ms"] for share in shares)
    rows: Table = [("category", "ms", "share", "kernels")]
    rows += [
        (s["category"], f"{s['ms']:.1f}", f"{s['share']:.1%}", str(s["kernels"])) for s in shares
    ]
    return f"{name}: {total:.1f} ms of GPU time", rows
