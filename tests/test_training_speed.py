"""What makes a training fast: batches ahead, preparing, compiled code; and the slow-host gate."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import TRAIN_SHARDS, training_states

from golf_ray.config import Config
from golf_ray.data.loader import PackedLoader
from golf_ray.errors import ConfigError, TrainingFailed
from golf_ray.kernels.compiling import compiled
from golf_ray.optim.world import World
from golf_ray.presets import TINY
from trainers.batches import HostBatches, random_batch
from trainers.code_cache import MAGIC, CodeCache, cache_key
from trainers.loop import TrainingRun
from trainers.pace import Pace, require_speed
from trainers.reporting import Interval, Reporter

CPU = torch.device("cpu")
EVERY_STEP = TINY.with_overrides({"train.log_every_steps": 1})
# One layer and no loops: as little to compile as there can be.
SMALLEST = TINY.with_overrides(
    {
        "model.num_layers": 1,
        "model.num_loops": 0,
        "model.parallel_start_layer": None,
        "model.xsa_last_n": 1,
        "train.iterations": 2,
        "train.log_every_steps": 1,
        "kernels.compile": True,
    }
)


class Recorder(Reporter):
    """Keeps losses and what was said of compiled code."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.code: dict[str, Any] | None = None

    def interval(self, interval: Interval) -> None:
        self.losses.append(interval.train_loss_nats)

    def prepared(self, seconds: float, code: dict[str, Any]) -> None:
        self.code = code


# Batches ahead ------------------------------------------------------------------------------------


def loader() -> PackedLoader:
    return PackedLoader(TRAIN_SHARDS, vocab_size=512, micro_batch_tokens=256, seq_len=64, group=8)


def test_batches_ahead_are_the_loader_s() -> None:
    ahead = HostBatches(loader(), pinned=False)
    with loader() as plain:
        for _ in range(20):
            assert ahead.state_dict() == plain.state_dict()
            peeked = ahead.peek()
            assert ahead.state_dict() == plain.state_dict()
            mine, theirs = ahead.next(), plain.next_batch()
            assert torch.equal(mine.x, peeked.x)
            assert np.array_equal(mine.x.numpy(), theirs.x)
            assert np.array_equal(mine.y.numpy(), theirs.y)
            assert np.array_equal(mine.cu_seqlens.numpy(), theirs.cu_seqlens)
            assert mine.max_seqlen == theirs.max_seqlen
    ahead.close()


def test_a_position_is_taken_up_whatever_was_made_ahead() -> None:
    first = HostBatches(loader(), pinned=False)
    batches = [first.next() for _ in range(6)]
    first.close()
    second = HostBatches(loader(), pinned=False)
    for _ in range(3):
        second.next()
    position = second.state_dict()
    second.next()
    second.load_state_dict(position)
    assert all(torch.equal(second.next().x, batch.x) for batch in batches[3:])
    second.close()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(3, 40))
def test_random_batches_have_the_bounds_that_are_asked_for(buckets: int, seq_len: int) -> None:
    tokens, bounds = 2048, 64 * buckets
    batch = random_batch(tokens, 512, seq_len, bounds, pinned=False)
    assert len(batch.x) == len(batch.y) == tokens and int(batch.cu_seqlens[-1]) == tokens
    lengths = batch.cu_seqlens.diff()
    assert int(lengths.max()) <= min(seq_len, tokens) and int(lengths.min()) >= 0
    # Where documents are no longer than a segment may be, exactly so many.
    if tokens / (bounds - 1) < seq_len - 1:
        assert len(batch.cu_seqlens) == bounds
    assert int(batch.x.min()) >= 1 and int(batch.x.max()) < 512


# Preparing ----------------------------------------------------------------------------------------


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return bool(a == b)


@pytest.mark.parametrize("steps_before", [0, 3])
def test_preparing_leaves_every_bit_as_it_was(steps_before: int) -> None:
    """Also in the middle of a run, as after a resume."""
    with TrainingRun(TINY, TRAIN_SHARDS, initial=training_states()["init"]) as run:
        for _ in range(steps_before):
            run.take_step(0.0)
        before = copy.deepcopy(run._state())
        assert run.prepare(always=True) > 0
        after = run._state()
        for name in ("step", "weights", "optimizer", "average", "loader", "random"):
            assert equal(getattr(before, name), getattr(after, name)), name


def test_a_prepared_run_is_the_unprepared_one() -> None:
    losses = []
    for prepared in (False, True):
        recorder = Recorder()
        with TrainingRun(EVERY_STEP, TRAIN_SHARDS, reporter=recorder) as run:
            if prepared:
                run.prepare(always=True)
            run.run()
        losses.append(recorder.losses)
    assert losses[0] == losses[1]


# Compiled code ------------------------------------------------------------------------------------

PROGRAM = """
import sys
from pathlib import Path
import torch
from reference import TRAIN_SHARDS
from test_training_speed import CodeCache, Config, Recorder, TrainingRun
config = Config.from_json(sys.stdin.read())
recorder = Recorder()
code = CodeCache(config=config, device=torch.device("cpu"), root=Path(sys.argv[1]))
with TrainingRun(config, TRAIN_SHARDS, reporter=recorder, code=code) as run:
    run.run()
counters = torch._dynamo.utils.counters
print(recorder.code["found"], recorder.code["trouble"], counters["inductor"]["fxgraph_cache_hit"],
      counters["inductor"]["fxgraph_cache_miss"], len(counters["graph_break"]), recorder.losses)
"""


def compiled_run(config: Config, root: Path) -> list[str]:
    """A run in a process of its own: what was found, hits, misses, graph breaks, and its losses."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(root)],
        input=config.to_json(), env=environment, capture_output=True, text=True, timeout=280,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split(maxsplit=5)


def test_compiled_code_goes_round(tmp_path: Path) -> None:
    """Compiled by one process, shared as a file, used by another that has none of its own; and a
    damaged file costs a compilation and no run."""
    shared = tmp_path / "shared"
    config = SMALLEST.with_overrides({"kernels.cache": str(shared)})
    found, trouble, hits, misses, breaks, losses = compiled_run(config, tmp_path / "a")
    assert (found, trouble, hits, breaks) == ("nothing", "None", "0", "0") and int(misses) > 0
    plain = Recorder()
    unfused = config.with_overrides({"kernels.compile": False})
    with TrainingRun(unfused, TRAIN_SHARDS, reporter=plain) as run:
        run.run()
    assert [float(x) for x in losses.strip("[]\n").split(",")] == pytest.approx(plain.losses, 1e-5)

    again = compiled_run(config, tmp_path / "b")
    assert again[:2] == ["shared", "None"] and int(again[2]) == int(misses) and again[3] == "0"
    assert again[5] == losses

    (file,) = shared.iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    cache = CodeCache(config=config, device=CPU, root=tmp_path / "c")
    with environment_kept():
        cache.open()
    assert cache.found == "nothing" and cache.trouble is not None and "damaged" in cache.trouble


@pytest.fixture
def kept() -> Iterator[None]:
    with environment_kept():
        yield


class environment_kept:
    """Environment variables as they were, after the block."""

    def __enter__(self) -> None:
        self._before = dict(os.environ)

    def __exit__(self, *error: object) -> None:
        os.environ.clear()
        os.environ.update(self._before)


class Product:
    """Stands for a run: one and the same code, compiled anew for each."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def of(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def test_a_process_compiles_any_number_of_runs() -> None:
    x = torch.ones(3)
    for factor in range(torch._dynamo.config.recompile_limit + 2):
        assert torch.equal(compiled(Product(factor).of)(x), x * factor)


@pytest.mark.parametrize(
    "content",
    [b"", b"nonsense", MAGIC, MAGIC + bytes(32) + b"x"],
    ids=["empty", "text", "head", "hash"],
)
def test_a_foreign_file_is_no_compiled_code(content: bytes, tmp_path: Path, kept: None) -> None:
    config = SMALLEST.with_overrides({"kernels.cache": str(tmp_path)})
    cache = CodeCache(config=config, device=CPU, root=tmp_path / "root")
    (tmp_path / f"{cache.name}.tar").write_bytes(content)
    cache.open()
    assert cache.found == "nothing" and cache.trouble is not None
    assert cache.folder.is_dir() and not list(cache.root.glob(".*"))


def test_a_shared_place_that_cannot_be_reached_costs_no_run(tmp_path: Path, kept: None) -> None:
    (tmp_path / "file").write_text("")
    config = SMALLEST.with_overrides({"kernels.cache": str(tmp_path / "file" / "below")})
    cache = CodeCache(config=config, device=CPU, root=tmp_path / "root")
    cache.open()
    assert not cache.publish()
    assert cache.trouble is not None and "not shared" in cache.trouble


def test_the_key_holds_what_code_depends_on() -> None:
    base = cache_key(TINY, CPU)
    assert {"torch", "triton", "gpu", "model", "kernels"} <= base.keys()
    same = {"train.seed": 9, "train.warmdown_frac": 0.1, "kernels.cache": "elsewhere", "name": "x"}
    assert cache_key(TINY.with_overrides(same), CPU) == base
    for other in ({"model.mlp_mult": 4.0}, {"kernels.compile": True}, {"train.micro_batches": 4}):
        assert cache_key(TINY.with_overrides(other), CPU) != base


# Speed --------------------------------------------------------------------------------------------


def test_pace_tells_looping_apart_and_leaves_switches_out() -> None:
    pace = Pace(batch_tokens=1000)
    assert pace.tokens_per_s(False) is None
    times = [(1, 9.0, False), (2, 0.5, False), (3, 0.5, False), (4, 7.0, True), (5, 2.0, True)]
    for step, seconds, looping in times:
        pace.took(step, seconds, looping)
        pace.took(step, seconds, looping)
    assert pace.tokens_per_s(False) == pytest.approx(2000)
    assert pace.tokens_per_s(True) == pytest.approx(500)


def test_a_slow_host_ends_the_run_and_says_so() -> None:
    config = TINY.with_overrides(
        {"train.min_tokens_per_s": 1e12, "train.speed_check_steps": 3, "train.iterations": 8}
    )
    steps = []

    class Steps(Reporter):
        def stepped(self, step: int, loss_nats: float) -> None:
            steps.append(step)

    with TrainingRun(config, TRAIN_SHARDS, reporter=Steps()) as run:
        with pytest.raises(TrainingFailed, match=r"the host is too slow: [\d,]+ tokens/s over the"):
            run.run()
    assert steps[-1] == 3
    fast = config.with_overrides({"train.min_tokens_per_s": 1.0})
    with TrainingRun(fast, TRAIN_SHARDS) as run:
        assert run.run().steps == 8


def test_the_floor_is_met_at_the_floor() -> None:
    train = TINY.with_overrides({"train.min_tokens_per_s": 100.0}).train
    require_speed(train, 100.0)
    with pytest.raises(TrainingFailed):
        require_speed(train, 99.9)
    require_speed(TINY.train, 0.0)


def test_a_run_says_how_it_computed_and_how_fast() -> None:
    with TrainingRun(EVERY_STEP, TRAIN_SHARDS, world=World()) as run:
        result = run.run()
    assert result.compute == {"dtype": "float32", "attention": "sdpa", "kernels": "torch"}
    assert result.tokens_per_s is not None and result.tokens_per_s_looping is not None
    assert result.peak_memory_bytes is None and result.compile_s == 0.0
    assert 0 < result.to_first_step_s < 60


def test_a_named_kernel_backend_that_is_absent_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = TINY.with_overrides({"kernels.backend": "triton"})
    with pytest.raises(ConfigError, match="pip install triton"):
        TrainingRun(config, TRAIN_SHARDS)
