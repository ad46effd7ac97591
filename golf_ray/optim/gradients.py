"""From micro-batches to the gradient of a step: accumulation, clipping, reduction over ranks.

Three clip scopes: `micro_batch` clips each micro-batch's gradient before they are averaged, so the
result does not depend on how many workers share them; `rank` clips each rank's mean before the
reduction (the public program's form); `global` clips after the reduction.

Invariant: with `micro_batch` and `global`, any number of ranks gives the same gradient up to the
order of summation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from golf_ray.optim.world import Wait, World, at_once

SMALL_NUMEL = 32_768
"""Replicated gradients of at most this many elements travel in one flat all-reduce."""


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """L2 norm over all elements of all tensors, float32 scalar."""
    return torch.nn.utils.get_total_norm(list(tensors), foreach=True).float()


def clip_coefficient(norm: Tensor, clip_norm: float) -> Tensor:
    """What a gradient of this norm is multiplied with: min(1, clip / (norm + 1e-6))."""
    return (clip_norm / (norm + 1e-6)).clamp(max=1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepGradient:
    """The averaged gradient of one step."""

    banks: dict[str, Wait]
    """This rank's share of each bank, once it is there: work on one overlaps the others' way."""
    replicated: dict[str, Tensor]
    """Whole gradients of everything else that is trained."""
    loss: Tensor
    """Mean loss over all micro-batches, float32 scalar on the device."""
    norm: Tensor
    """Norm before clipping, float32 scalar on the device: of the micro-batches (their mean), of
    the ranks (their mean), or of the reduced gradient, as the clip scope has it."""


class GradientAccumulator:
    """Collects the micro-batches of a step.

    Args:
        banks: parameters that are reduced to shares.
        replicated: all other trained parameters.
        world: the ranks.
        clip_norm: 0 for none.
        clip_scope: what is clipped.
        num_local: micro-batches of this rank a step.
    """

    def __init__(
        self,
        banks: Mapping[str, Tensor],
        replicated: Mapping[str, Tensor],
        world: World,
        *,
        clip_norm: float,
        clip_scope: Literal["micro_batch", "rank", "global"],
        num_local: int,
    ) -> None:
        self._banks = dict(banks)
        self._replicated = dict(replicated)
        self._trained = {**self._banks, **self._replicated}
        self._world = world
        self._clip_norm = clip_norm
        self._scope = clip_scope
        self._num_local = num_local
        # Sums stay where they are from step to step: a captured graph adds into them.
        self._sums = {
            name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            for name, p in self._trained.items()
        }
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        """Backward of one micro-batch's mean loss."""
        self.start()
        self.note(*self.accumulate(loss))

    def start(self) -> None:
        """Make room for a step before its first micro-batch; later ones change nothing."""
        if not self._losses:
            torch._foreach_zero_(list(self._sums.values()))

    def accumulate(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """The part of `add` that is on the device alone, so that a CUDA graph can hold it.

        Returns:
            loss and gradient norm of the micro-batch, float32 scalars; the norm is 0 where the clip
            scope does not ask for it.
        """
        grads = self.differentiate(loss)
        with torch.no_grad():
            norm = loss.new_zeros((), dtype=torch.float32)
            scale = norm.new_ones(())
            if self._scope == "micro_batch":
                norm = total_norm(grads.values())
                if self._clip_norm:
                    scale = clip_coefficient(norm, self._clip_norm)
            # Lists of several types would be worked on one tensor, one kernel, at a time. Gradients
            # may share memory with one another: nothing is done to them in place.
            wide = [n for n, g in grads.items() if g.dtype == self._sums[n].dtype]
            scaled = torch._foreach_mul([grads[n] for n in wide], scale)
            torch._foreach_add_([self._sums[n] for n in wide], scaled)
            for name in grads:
                if name not in wide:
                    self._sums[name].add_(grads[name] * scale)
        return loss.detach().float(), norm

    def differentiate(self, loss: Tensor) -> dict[str, Tensor]:
        """Gradients of a loss by name; a tensor that no pass used (an extra layer's gate while
        looping is off) has none."""
        found = torch.autograd.grad(loss, list(self._trained.values()), allow_unused=True)
        return {n: g for n, g in zip(self._trained, found, strict=True) if g is not None}

    def note(self, loss: Tensor, norm: Tensor) -> None:
        """Take what `accumulate` returned; the tensors must stay as they are."""
        self._losses.append(loss)
        self._norms.append(norm)

    @torch.no_grad()
    def finish(self) -> StepGradient:
        """Average over micro-batches and ranks, clip, and start anew."""
        assert len(self._losses) == self._num_local, "a step needs all of its micro-batches"
        sums = list(self._sums.values())
        torch._foreach_div_(sums, float(self._num_local))
        if self._scope == "rank":
            self._norms = [total_norm(sums)]
            if self._clip_norm:
                torch._foreach_mul_(sums, clip_coefficient(self._norms[0], self._clip_norm))
        step = self._reduce(self._sums)
        self._losses, self._norms = [], []
        return self._clip_global(step) if self._scope == "global" else step

    def _reduce(self, grads: dict[str, Tensor]) -> StepGradient:
        losses = torch.stack(self._losses).mean()
        norm = torch.stack(self._norms).mean()
        waits: dict[str, Wait] = {n: self._world.mean_share(grads[n]) for n in self._banks}
        small = [n for n in self._replicated if grads[n].numel() <= SMALL_NUMEL]
        large = [n for n in self._replicated if grads[n].numel() > SMALL_NUMEL]
        waits |= {n: self._world.mean(grads[n]) for n in large}
        # Loss and norm ride along with the small gradients: no reduction of their own.
        pieces = [losses.reshape(1), norm.reshape(1)] + [grads[n].float().flatten() for n in small]
        flat = self._world.mean(torch.cat(pieces))()
        sizes = [p.numel() for p in pieces]
        losses, norm, *reduced = flat.split(sizes)
        replicated = {n: part.view_as(grads[n]) for n, part in zip(small, reduced, strict=True)}
        replicated |= {n: waits[n]() for n in large}
        return StepGradient(
            banks={n: waits[n] for n in self._banks},
            replicated={n: g.to(self._replicated[n].dtype) for n, g in replicated.items()},
            loss=losses[0],
            norm=norm[0],
        )

    def _clip_global(self, step: StepGradient) -> StepGradient:
        banks = {name: wait() for name, wait in step.banks.items()}
        shares = [g.square().sum() for g in banks.values() if g.numel()]
        squared = torch.stack(shares).sum() if shares else step.loss.new_zeros(())
        squared = self._world.sum_(squared)
        norm = (squared + total_norm(step.replicated.values()).square()).sqrt()
        if self._clip_norm:
            grads = [g for g in (*banks.values(), *step.replicated.values()) if g.numel()]
            torch._foreach_mul_(grads, clip_coefficient(norm, self._clip_norm))
        return StepGradient(
            banks={name: at_once(grad) for name, grad in banks.items()},
            replicated=step.replicated,
            loss=step.loss,
            norm=norm,
        )
