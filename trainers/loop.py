"""The training loop: steps until the steps or the seconds are used up. Knows no Ray.

One `TrainingRun` is one rank. All ranks take the same decisions on the same step: the loss, the
norm and the clock that decisions hang on are reduced or come from rank 0.

Invariant: a run of fixed steps that is resumed from a checkpoint ends, on a CPU, with the very
bits of one that was never interrupted.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from golf_ray.config import Config
from golf_ray.data.loader import PackedLoader
from golf_ray.data.packing import BOUNDS_MULTIPLE
from golf_ray.errors import ConfigError
from golf_ray.metric import Score
from golf_ray.model.compute import choose_compute
from golf_ray.model.model import GolfModel
from golf_ray.optim import schedule
from golf_ray.optim.ema import WeightAverage
from golf_ray.optim.gradients import GradientAccumulator
from golf_ray.optim.optimizer import GolfOptimizer
from golf_ray.optim.world import World
from golf_ray.provenance import processor_name, provenance
from trainers.batches import HostBatch, HostBatches, random_batch
from trainers.code_cache import CodeCache
from trainers.convergence import require_convergence
from trainers.micro_batches import MicroBatches
from trainers.pace import Pace, require_speed
from trainers.reporting import Interval, Reporter
from trainers.state import (
    TrainingState,
    random_state,
    read_state,
    set_random_state,
    write_final,
    write_state,
)

Validate = Callable[[GolfModel, World, bool], Score]
"""Packed evaluation of a model over the ranks, looped or not; every rank calls it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingResult:
    """How a training ended."""

    steps: int
    elapsed_s: float
    """Training time, without validation and checkpoints."""
    tokens: int
    train_loss_nats: float
    """Of the last step."""
    resumed_from_step: int
    """0 for a run that began at the beginning."""
    compile_s: float = 0.0
    """Compiling, capturing and warming up, before the clock runs."""
    to_first_step_s: float = 0.0
    """From making the run to its first step: weights, data and compiling."""
    tokens_per_s: float | None = None
    """Without looping, over all ranks; None where too few steps were taken to tell."""
    tokens_per_s_looping: float | None = None
    peak_memory_bytes: int | None = None
    """Of rank 0's GPU, allocated; None on a CPU."""
    compute: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Arithmetic, attention and kernels that were used."""
    device_name: str | None = None
    """Of rank 0: a GPU's name or a processor's."""
    provenance: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    """Versions, commit and host of rank 0."""


class _Underway:
    """Numbers on their way from the device, without waiting for what was asked of it since."""

    def __init__(self, *scalars: Tensor) -> None:
        self._values = torch.stack([s.detach().float() for s in scalars])
        self._event: torch.cuda.Event | None = None
        self._host_s = time.perf_counter()
        if self._values.is_cuda:
            there = torch.empty(self._values.shape, pin_memory=True)
            there.copy_(self._values, non_blocking=True)
            self._values, self._event = there, torch.cuda.Event(enable_timing=True)
            self._event.record()

    def seconds_since(self, other: _Underway) -> float:
        """Time between the two, on the device's own clock; both must be there."""
        if self._event is None or other._event is None:
            return self._host_s - other._host_s
        return other._event.elapsed_time(self._event) / 1e3

    def wait(self) -> list[float]:
        """The numbers, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """What the last step was."""

    number: int
    loss_and_norm: _Underway
    before: _Underway | None
    """Those of the step before; None where there is none in this process."""
    left_out_s: float
    """Seconds between the two that were none of training."""
    lr_multiplier: float
    momentum: float
    looping: bool


class Clock:
    """Seconds of training, with pauses; goes on from where a checkpoint was taken.

    Args:
        elapsed_s: seconds counted before.
        now_s: where the time comes from.
    """

    def __init__(
        self, elapsed_s: float = 0.0, now_s: Callable[[], float] = time.perf_counter
    ) -> None:
        self._before_s = elapsed_s
        self._now_s = now_s
        self._started: float | None = None

    def resumed(self, elapsed_s: float) -> Clock:
        """A clock of the same time that has counted these seconds."""
        return Clock(elapsed_s, self._now_s)

    def run(self) -> None:
        """Count from now on."""
        self._started = self._now_s()

    def pause(self) -> None:
        """Stop counting."""
        self._before_s = self.elapsed_s()
        self._started = None

    def elapsed_s(self) -> float:
        """Seconds counted so far."""
        running = 0.0 if self._started is None else self._now_s() - self._started
        return self._before_s + running


def name_of(device: torch.device) -> str:
    """What a device calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


def make_loader(config: Config, shards: Sequence[Path], world: World) -> PackedLoader:
    """The batches of one rank.

    A step's micro-batches are read together, so that they are the same for any number of ranks;
    under clip scope `rank`, the public program's form, each round of ranks is read on its own.
    """
    train = config.train
    if train.micro_batches % world.size:
        raise ConfigError(
            f"{world.size} workers do not divide train.micro_batches = {train.micro_batches}",
            "choose a number of workers that does",
        )
    return PackedLoader(
        shards,
        vocab_size=config.model.vocab_size,
        micro_batch_tokens=train.micro_batch_tokens,
        seq_len=config.data.seq_len,
        rank=world.rank,
        world=world.size,
        group=world.size if train.clip_scope == "rank" else train.micro_batches,
    )


class TrainingRun:
    """One rank of one training. Use as a context manager: it owns the loader's threads.

    Args:
        config: the whole configuration; the sections model, data and train are used.
        shards: training shards in order.
        world: the ranks.
        reporter: who is told.
        validate: packed evaluation over the ranks, or None.
        initial: weights to begin with in place of the seed's.
        clock: what a wall-clock cap is measured by.
        code: where compiled code is kept; by default this machine's own place.
    """

    def __init__(
        self,
        config: Config,
        shards: Sequence[Path],
        *,
        world: World | None = None,
        reporter: Reporter | None = None,
        validate: Validate | None = None,
        initial: dict[str, Tensor] | None = None,
        clock: Clock | None = None,
        code: CodeCache | None = None,
    ) -> None:
        self._entered_s = time.perf_counter()
        self.config = config
        self.world = world or World()
        self.code: CodeCache | None = None
        if self.world.device.type == "cuda" or config.kernels.compile:
            self.code = code or CodeCache(config=config, device=self.world.device)
            self.code.open()
        self.reporter = reporter or Reporter()
        self.validate = validate
        train = config.train
        pinned = self.world.device.type == "cuda"
        self.batches = HostBatches(make_loader(config, shards, self.world), pinned=pinned)
        self.model = self._make_model(initial)
        self.optimizer = GolfOptimizer(self.model, train, self.world)
        self.num_local = train.micro_batches // self.world.size
        self.gradients = GradientAccumulator(
            self.optimizer.banks,
            self.optimizer.replicated,
            self.world,
            clip_norm=train.clip_norm,
            clip_scope=train.clip_scope,
            num_local=self.num_local,
        )
        self.average = WeightAverage(self.model.tensors(), train.ema_decay)
        self.micro_batches = MicroBatches(
            self.model, self.gradients, config.kernels, self.world.device
        )
        self.clock = clock or Clock()
        self.pace = Pace(train.batch_tokens)
        self.step = 0
        self.first_step = 0
        self._interval_began = (0, 0.0)
        self._last: _Step | None = None
        self._left_out_s = 0.0

    def __enter__(self) -> TrainingRun:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.batches.close()

    def _make_model(self, initial: dict[str, Tensor] | None) -> GolfModel:
        compute = choose_compute(self.config, self.world.device)
        model = GolfModel(self.config.model, compute=compute)
        if initial is None:
            model.init_weights(self.config.train.seed)
        else:
            model.load_state_dict(initial)
        model = model.to(self.world.device)
        if compute.dtype == torch.bfloat16:
            # The record trains its embedding, the largest replicated tensor, in bfloat16.
            embedding = model.tensors()["tok_emb.weight"]
            embedding.data = embedding.data.to(compute.dtype)
        return model

    # Steps ------------------------------------------------------------------------------------

    def run(self) -> TrainingResult:
        """Train to the end.

        Raises:
            TrainingFailed: a loss is not finite.
        """
        train = self.config.train
        compile_s = self.prepare()
        to_first_step_s = time.perf_counter() - self._entered_s
        self.reporter.begin(self.step, train.iterations)
        self._interval_began = (self.step, self.clock.elapsed_s())
        self.clock.run()
        elapsed_s = self.world.from_rank_0(self.clock.elapsed_s())
        while not schedule.is_over(train, self.step, elapsed_s):
            self.take_step(schedule.run_fraction(train, self.step, elapsed_s))
            elapsed_s = self.world.from_rank_0(self.clock.elapsed_s())
            over = schedule.is_over(train, self.step, elapsed_s)
            if over or self._due(train.log_every_steps) or self._due(train.val_every_steps):
                self._report(schedule.run_fraction(train, self.step, elapsed_s), over)
            if self._due(train.checkpoint_every_steps) and not over:
                self._save(final=False)
        loss, _ = self._settle()
        self._save(final=True)
        self.clock.pause()
        return TrainingResult(
            steps=self.step,
            elapsed_s=elapsed_s,
            tokens=self.step * train.batch_tokens,
            train_loss_nats=loss,
            resumed_from_step=self.first_step,
            compile_s=compile_s,
            to_first_step_s=to_first_step_s,
            tokens_per_s=self.pace.tokens_per_s(False),
            tokens_per_s_looping=self.pace.tokens_per_s(True),
            peak_memory_bytes=self._peak_memory_bytes(),
            compute=self.model.compute.to_dict(),
            device_name=name_of(self.world.device),
            provenance=provenance(),
        )

    def prepare(self, *, always: bool = False) -> float:
        """Compile, capture and run everything that a step needs, once, on random tokens; weights,
        optimizer, average and random state are as before, and the batches are untouched.

        Args:
            always: also where nothing is compiled.

        Returns:
            seconds that it took.
        """
        began_s = time.perf_counter()
        if self.code is None and not always:
            return 0.0
        state = self._state()
        kept = copy.deepcopy((state.weights, state.optimizer, state.average, state.random))
        num_bounds = len(self.batches.peek().cu_seqlens)
        usual = self._random_batch(num_bounds)
        for loop in self._loop_variants():
            self.micro_batches.warm_up(usual, loop)
        for loop in self._loop_variants():
            for _ in range(self.num_local):
                self.micro_batches(usual, loop)
            self.optimizer.step(self.gradients.finish(), lr_multiplier=1.0, momentum=0.0)
            self.average.update()
            if self.micro_batches.captures:
                # Documents that are shorter or longer than usual: the numbers of bounds next to it.
                for other in (num_bounds + BOUNDS_MULTIPLE, num_bounds - BOUNDS_MULTIPLE):
                    if other > 0:
                        self.micro_batches.capture(self._random_batch(other), loop)
        weights, optimizer, average, random = kept
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(optimizer)
        self.average.load_state_dict(average)
        set_random_state(random)
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began_s
        if self.code is not None:
            if self.world.rank == 0:
                self.code.publish()
            self.reporter.prepared(seconds, self.code.to_dict())
        return seconds

    def _random_batch(self, num_bounds: int) -> HostBatch:
        return random_batch(
            self.config.train.micro_batch_tokens,
            self.config.model.vocab_size,
            self.config.data.seq_len,
            num_bounds,
            pinned=self.world.device.type == "cuda",
        )

    def _loop_variants(self) -> list[bool]:
        """Whether layers are looped at some time, and whether they are not."""
        if not self.config.model.num_loops:
            return [False]
        at = self.config.train.enable_looping_at
        return [loop for loop, used in ((False, at > 0), (True, at <= 1)) if used]

    def _peak_memory_bytes(self) -> int | None:
        device = self.world.device
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def take_step(self, frac: float) -> None:
        """One optimizer step, as the schedules have it at a part of the run."""
        train = self.config.train
        loop = schedule.loops(train, frac)
        for _ in range(self.num_local):
            self.micro_batches(self.batches.next(), loop and self.config.model.num_loops > 0)
        gradient = self.gradients.finish()
        lr_multiplier = schedule.lr_multiplier(train, frac)
        momentum = schedule.muon_momentum(train, self.step)
        self.optimizer.step(gradient, lr_multiplier=lr_multiplier, momentum=momentum)
        self.average.update()
        underway = _Underway(gradient.loss, gradient.norm)
        # The last step's loss is read while this one runs: the device never waits for the host.
        loss, _ = self._settle()
        self._check_speed()
        self.step += 1
        self._last = _Step(
            number=self.step,
            loss_and_norm=underway,
            before=None if self._last is None else self._last.loss_and_norm,
            left_out_s=self._left_out_s,
            lr_multiplier=lr_multiplier,
            momentum=momentum,
            looping=loop,
        )
        self._left_out_s = 0.0
        self.reporter.stepped(self.step, loss)

    def _settle(self) -> tuple[float, float]:
        """Loss and gradient norm of the last step, once they are there; NaN before the first.

        Raises:
            TrainingFailed: the loss is not finite, or the run has diverged.
        """
        if self._last is None:
            return math.nan, math.nan
        last = self._last
        loss, norm = last.loss_and_norm.wait()
        if last.before is not None:
            seconds = last.loss_and_norm.seconds_since(last.before) - last.left_out_s
            self.pace.took(last.number, seconds, last.looping)
        require_convergence(self.config, last.number, loss)
        return loss, norm

    def _check_speed(self) -> None:
        train = self.config.train
        if train.min_tokens_per_s is None:
            return
        if self.step - self.first_step == train.speed_check_steps:
            looping = self._last is not None and self._last.looping
            speed = self.pace.tokens_per_s(looping) or math.inf
            # All ranks end together, so one of them says.
            require_speed(train, self.world.from_rank_0(speed))

    # Reports and checkpoints ------------------------------------------------------------------

    def _report(self, frac: float, over: bool) -> None:
        train, last = self.config.train, self._last
        assert last is not None, "there is nothing to report before the first step"
        loss, norm = self._settle()
        paused_at_s = self._pause()
        elapsed_s = self.clock.elapsed_s()
        began_step, began_s = self._interval_began
        tokens = (self.step - began_step) * train.batch_tokens
        val = None
        if self.validate is not None and (over or self._due(train.val_every_steps)):
            val = self.validate(self.model, self.world, last.looping)
        self.reporter.interval(
            Interval(
                step=self.step,
                num_steps=train.iterations,
                train_loss_nats=loss,
                grad_norm=norm,
                lr_multiplier=last.lr_multiplier,
                muon_momentum=last.momentum,
                looping=last.looping,
                elapsed_s=elapsed_s,
                frac=min(frac, 1.0),
                tokens=self.step * train.batch_tokens,
                tokens_per_s=tokens / max(elapsed_s - began_s, 1e-9),
                val_loss_nats=val.loss_nats if val else None,
                val_bpb=val.bpb if val else None,
                val_tokens=val.tokens if val else None,
                val_bytes=val.num_bytes if val else None,
            )
        )
        self._interval_began = (self.step, elapsed_s)
        self._go_on(paused_at_s)

    def _save(self, *, final: bool) -> None:
        """Let the reporter keep a checkpoint; weights that are not finite are never kept."""
        self._settle()
        paused_at_s = self._pause()
        state = self._state()

        def write(folder: Path) -> None:
            write_state(folder, state, self.config)
            if final:
                write_final(folder, self.average.weights(), self.config)

        self.reporter.checkpoint(self.step, write, final=final)
        self._go_on(paused_at_s)

    def _pause(self) -> float:
        self.clock.pause()
        return time.perf_counter()

    def _go_on(self, paused_at_s: float) -> None:
        self._left_out_s += time.perf_counter() - paused_at_s
        self.clock.run()

    def _state(self) -> TrainingState:
        """Everything of the run as it stands; every rank must call it."""
        return TrainingState(
            step=self.step,
            elapsed_s=self.clock.elapsed_s(),
            weights=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            average=self.average.state_dict(),
            loader=self.batches.state_dict(),
            random=random_state(),
        )

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint folder, on any number of ranks.

        Raises:
            CheckpointError: it is incomplete or of another configuration.
        """
        state = read_state(folder, self.config)
        self.model.load_state_dict(state.weights)
        self.optimizer.load_state_dict(state.optimizer)
        self.average.load_state_dict(state.average)
        self.batches.load_state_dict(state.loader)
        set_random_state(state.random)
        self.clock = self.clock.resumed(state.elapsed_s)
        self.step = self.first_step = state.step
