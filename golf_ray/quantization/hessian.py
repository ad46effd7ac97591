"""Hessians for GPTQ: for each matrix the mean over calibration batches of X^T X of its input rows.

Not here: which tokens a batch holds (golf_ray.data.calibration) and what is done with the result
(golf_ray.quantization.gptq). Legend: T tokens, I input features of a matrix.

Invariant: the sums do not depend on how batches were dealt out to ranks. Each pass gives a float32
Gram matrix, a batch's passes are added and rounded to float32, and batches are added in float64. A
float64 sum of float32 numbers is exact, in any order and grouping, unless it is more than 2^29
times the smallest of them; an entry of which that is not true may differ in the last of 53 bits,
and the mean is rounded to 24. A batch's own Gram matrices are equal bit for bit on devices of one
kind with one number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from golf_ray.errors import CheckpointError
from golf_ray.model.hooks import Hooks
from golf_ray.model.loading import load_tensors
from golf_ray.model.model import GolfModel
from golf_ray.model.segments import Segments
from golf_ray.quantization.gptq import matmul_precision
from golf_ray.records import atomic_path

GRAM_ROWS = 4096
"""Rows of one product of a Gram matrix."""
HEAD_ROWS = 8192
"""Tokens whose logits are computed at a time: all at once would be the largest tensor by far."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HessianSums:
    """Sums of X^T X over some of the calibration batches."""

    sums: Mapping[str, Tensor]
    """float64 [I, I] by unbanked matrix name."""
    num_batches: int

    def means(self) -> dict[str, Tensor]:
        """The Hessians, float32 [I, I] by name; matrices with equal ones share one tensor."""
        means: dict[str, Tensor] = {}
        last: tuple[Tensor, Tensor] | None = None
        for name, sum_II in self.sums.items():
            if last is None or last[0].shape != sum_II.shape or not torch.equal(last[0], sum_II):
                last = (sum_II, (sum_II / self.num_batches).float())
            means[name] = last[1]
        return means


class HessianTaps(Hooks):
    """Adds up X^T X of every matrix that the forward uses.

    A matrix used several times in a batch (a looped layer, a head in pieces) adds up. Matrices
    that get the very same input tensor one after the other (query, key, value) share one product.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._batch: dict[str, Tensor] = {}
        self._last: tuple[Tensor, Tensor] | None = None
        self._num_batches = 0

    def matrix_input(self, name: str, x_TI: Tensor) -> None:
        """Add the Gram matrix of one use of matrix `name` to the current batch."""
        if self._last is None or self._last[0] is not x_TI:
            self._last = (x_TI, gram(x_TI))
        gram_II = self._last[1]
        if name in self._batch:
            self._batch[name] += gram_II
        else:
            self._batch[name] = gram_II.double()

    def end_batch(self) -> None:
        """Add the current batch to the sums."""
        for name, batch_II in self._batch.items():
            rounded_II = batch_II.float()
            if name in self._sums:
                self._sums[name] += rounded_II
            else:
                self._sums[name] = rounded_II.double()
        self._batch.clear()
        self._last = None
        self._num_batches += 1

    def result(self) -> HessianSums:
        """The sums over all batches ended so far."""
        assert not self._batch, "a batch was begun and not ended"
        return HessianSums(sums=dict(self._sums), num_batches=self._num_batches)


def gram(x_TI: Tensor) -> Tensor:
    """X^T X as float32 [I, I] from the rows' own values, whatever the process has chosen.

    bfloat16 rows on a GPU go through TF32 tensor cores, at several times the speed of float32:
    their products (8 bits times 8) are exact there. Tensor cores cut sums off instead of rounding
    them, which over 98,304 rows loses 6e-4 of the diagonal (H200); so rows go in pieces.
    """
    exact = x_TI.dtype == torch.bfloat16 and x_TI.is_cuda
    with (
        torch.autocast(x_TI.device.type, enabled=False),
        matmul_precision("high" if exact else "highest"),
    ):
        gram_II = x_TI.new_zeros((x_TI.shape[-1],) * 2, dtype=torch.float32)
        for piece_TI in torch.split(x_TI.detach(), GRAM_ROWS):
            rows_TI = piece_TI.float()
            gram_II += rows_TI.t() @ rows_TI
        return gram_II


def collect_sums(model: GolfModel, batches: Iterable[Any], *, loop: bool = True) -> HessianSums:
    """Run calibration batches and add up X^T X of every matrix.

    Args:
        model: in the arithmetic to calibrate in (bfloat16 on a GPU).
        batches: int [rows, S] arrays or tensors; each row is one dense causal sequence.
        loop: whether the looped layers are passed more than once.
    """
    taps = HessianTaps()
    device = next(model.parameters()).device
    with torch.no_grad():
        for batch in batches:
            tokens_BS = torch.as_tensor(batch).to(device=device, dtype=torch.int64)
            segments = Segments.rows(tokens_BS.shape[0], tokens_BS.shape[1], device)
            x_TD = model.hidden(tokens_BS.flatten(), segments, loop=loop, hooks=taps)
            for rows_TD in torch.split(x_TD, HEAD_ROWS):
                model.logits(rows_TD, taps)
            taps.end_batch()
    return taps.result()


def merge_hessians(parts: Sequence[HessianSums]) -> HessianSums:
    """The sums over all ranks' batches; a rank without batches may be among them.

    Raises:
        CheckpointError: no rank had a batch.
    """
    sums: dict[str, Tensor] = {}
    for part in parts:
        for name, sum_II in part.sums.items():
            sums[name] = sums[name] + sum_II.to(sums[name].device) if name in sums else sum_II
    num_batches = sum(part.num_batches for part in parts)
    if not num_batches:
        raise CheckpointError("there is no calibration batch", "use more calibration tokens")
    return HessianSums(sums=sums, num_batches=num_batches)


def collect_hessians(
    model: GolfModel,
    batches: Iterable[Any],
    *,
    loop: bool = True,
    reduce: Callable[[HessianSums], HessianSums] | None = None,
) -> dict[str, Tensor]:
    """Hessians of every matrix, float32 [I, I] by unbanked name.

    Args:
        model: in the arithmetic to calibrate in.
        batches: those of this rank, int [rows, S] each.
        loop: whether the looped layers are passed more than once.
        reduce: turns this rank's sums into those of all ranks; None where there is one rank.

    Raises:
        CheckpointError: there is no batch.
    """
    sums = collect_sums(model, batches, loop=loop)
    return merge_hessians([reduce(sums) if reduce is not None else sums]).means()


def write_hessians(path: Path, hessians: Mapping[str, Tensor]) -> None:
    """Store Hessians, whole or not at all; those that share a tensor are stored once."""
    on_cpu = {id(h_II): h_II.cpu() for h_II in hessians.values()}
    with atomic_path(path) as temporary:
        torch.save({name: on_cpu[id(h_II)] for name, h_II in hessians.items()}, temporary)


def read_hessians(path: Path) -> dict[str, Tensor]:
    """Hessians as stored by `write_hessians`.

    Raises:
        CheckpointError: the file is missing, damaged, or holds anything but float32 matrices.
    """
    found = load_tensors(Path(path), str(path))
    good = isinstance(found, dict) and all(
        isinstance(name, str)
        and isinstance(h_II, Tensor)
        and h_II.dtype == torch.float32
        and h_II.dim() == 2
        and h_II.shape[0] == h_II.shape[1]
        for name, h_II in found.items()
    )
    if not good:
        raise CheckpointError(
            f"{path} holds something else than Hessians", "collect the Hessians again"
        )
    return dict(found)
