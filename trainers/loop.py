"""The training loop: steps until the steps or the seconds are used up. Knows no Ray.

One `TrainingRun` is one rank. All ranks take the same decisions on the same step: the loss, the
norm and the clock that decisions hang on are reduced or come from rank 0.

Invariant: a run of fixed steps that is resumed from a checkpoint ends, on a CPU, with the very
bits of one that was never interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from golf_ray.config import Config
from golf_ray.data.loader import PackedLoader
from golf_ray.data.packing import PackedBatch
from golf_ray.errors import ConfigError, TrainingFailed
from golf_ray.metric import Score
from golf_ray.model.model import GolfModel
from golf_ray.model.segments import Segments
from golf_ray.optim import schedule
from golf_ray.optim.ema import WeightAverage
from golf_ray.optim.gradients import GradientAccumulator
from golf_ray.optim.optimizer import GolfOptimizer
from golf_ray.optim.world import World
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """What the last step was; loss and norm may still be on their way from the device."""

    number: int
    loss: Tensor
    norm: Tensor
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


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """Arithmetic of the forward: as configured, or by device."""
    if config.train.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.train.precision == "bfloat16" else torch.float32


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
    ) -> None:
        self.config = config
        self.world = world or World()
        self.reporter = reporter or Reporter()
        self.validate = validate
        train = config.train
        self.loader = make_loader(config, shards, self.world)
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
        self.clock = clock or Clock()
        self.step = 0
        self.first_step = 0
        self._interval_began = (0, 0.0)
        self._last: _Step | None = None

    def __enter__(self) -> TrainingRun:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.loader.close()

    def _make_model(self, initial: dict[str, Tensor] | None) -> GolfModel:
        dtype = compute_dtype(self.config, self.world.device)
        model = GolfModel(self.config.model, compute_dtype=dtype)
        if initial is None:
            model.init_weights(self.config.train.seed)
        else:
            model.load_state_dict(initial)
        model = model.to(self.world.device)
        if dtype == torch.bfloat16:
            # The record trains its embedding, the largest replicated tensor, in bfloat16.
            embedding = model.tensors()["tok_emb.weight"]
            embedding.data = embedding.data.to(dtype)
        return model

    # Steps ------------------------------------------------------------------------------------

    def run(self) -> TrainingResult:
        """Train to the end.

        Raises:
            TrainingFailed: a loss is not finite.
        """
        train = self.config.train
        self.reporter.begin(self.step, train.iterations)
        self._interval_began = (self.step, self.clock.elapsed_s())
        self.clock.run()
        elapsed_s = self.world.from_rank_0(self.clock.elapsed_s())
        while not schedule.is_over(train, self.step, elapsed_s):
            self._take_step(schedule.run_fraction(train, self.step, elapsed_s))
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
        )

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _take_step(self, frac: float) -> None:
        train = self.config.train
        loop = schedule.loops(train, frac)
        for _ in range(self.num_local):
            x_T, y_T, segments = self._to_device(self.loader.next_batch())
            self.gradients.add(self.model.mean_loss(x_T, y_T, segments, loop=loop))
        gradient = self.gradients.finish()
        lr_multiplier = schedule.lr_multiplier(train, frac)
        momentum = schedule.muon_momentum(train, self.step)
        self.optimizer.step(gradient, lr_multiplier=lr_multiplier, momentum=momentum)
        self.average.update()
        # The last step's loss is read while this one runs: the host never waits for the device.
        loss, _ = self._settle()
        self.step += 1
        self._last = _Step(
            number=self.step,
            loss=gradient.loss,
            norm=gradient.norm,
            lr_multiplier=lr_multiplier,
            momentum=momentum,
            looping=loop,
        )
        self.reporter.stepped(self.step, loss)

    def _settle(self) -> tuple[float, float]:
        """Loss and gradient norm of the last step, once they are there; NaN before the first.

        Raises:
            TrainingFailed: the loss is not finite.
        """
        if self._last is None:
            return math.nan, math.nan
        loss = float(self._last.loss)
        if not math.isfinite(loss):
            raise TrainingFailed(
                f"the loss is not finite at step {self._last.number}: {loss}",
                "lower the learning rates or the momentum, or look at the data",
            )
        return loss, float(self._last.norm)

    def _to_device(self, batch: PackedBatch) -> tuple[Tensor, Tensor, Segments]:
        device = self.world.device
        x_T, y_T = torch.from_numpy(batch.x), torch.from_numpy(batch.y)
        if device.type == "cuda":
            x_T, y_T = x_T.pin_memory(), y_T.pin_memory()
        segments = Segments.of_bounds(batch.cu_seqlens, batch.max_seqlen, device)
        return x_T.to(device, non_blocking=True), y_T.to(device, non_blocking=True), segments

    # Reports and checkpoints ------------------------------------------------------------------

    def _report(self, frac: float, over: bool) -> None:
        train, last = self.config.train, self._last
        assert last is not None, "there is nothing to report before the first step"
        loss, norm = self._settle()
        self.clock.pause()
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
            )
        )
        self._interval_began = (self.step, elapsed_s)
        self.clock.run()

    def _save(self, *, final: bool) -> None:
        """Let the reporter keep a checkpoint; weights that are not finite are never kept."""
        self._settle()
        self.clock.pause()
        state = TrainingState(
            step=self.step,
            elapsed_s=self.clock.elapsed_s(),
            weights=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            average=self.average.state_dict(),
            loader=self.loader.state_dict(),
            random=random_state(),
        )

        def write(folder: Path) -> None:
            write_state(folder, state, self.config)
            if final:
                write_final(folder, self.average.weights(), self.config)

        self.reporter.checkpoint(self.step, write, final=final)
        self.clock.run()

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint folder, on any number of ranks.

        Raises:
            CheckpointError: it is incomplete or of another configuration.
        """
        state = read_state(folder, self.config)
        self.model.load_state_dict(state.weights)
        self.optimizer.load_state_dict(state.optimizer)
        self.average.load_state_dict(state.average)
        self.loader.load_state_dict(state.loader)
        set_random_state(state.random)
        self.clock = self.clock.resumed(state.elapsed_s)
        self.step = self.first_step = state.step
