"""Triton kernel of `golf_ray.adaptation.philox`: the A of many documents and slots at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCKS = 1024
"""Counters of a program, four elements each."""


@triton.jit
def _fill(
    p, shadow, documents, slots, num_parameters, seed, num_slots, num_elements,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Element e of A is output word e mod 4 of counter (e div 4, slot, document, 0)."""
    row = tl.load(documents + tl.program_id(2) * 2).to(tl.int64)
    document = tl.load(documents + tl.program_id(2) * 2 + 1)
    slot = slots + tl.program_id(1) * 3
    place, name, bound = tl.load(slot), tl.load(slot + 1), tl.load(slot + 2)
    bound = bound.to(tl.float32, bitcast=True)
    block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), tl.uint32)
    words = tl.philox(
        seed, block.to(tl.uint32), zero + name.to(tl.uint32), zero + document.to(tl.uint32), zero
    )
    for i in tl.static_range(4):
        odd = ((words[i] >> 8) << 1).to(tl.int32) + (1 - (1 << 24))
        value = odd.to(tl.float32) * (1.0 / (1 << 24)) * bound
        element = block * 4 + i
        to = row * num_parameters + place + element
        mask = element < num_elements
        tl.store(p + to, value, mask=mask)
        tl.store(shadow + to, value.to(shadow.dtype.element_ty), mask=mask)


@functools.lru_cache(maxsize=64)
def _slot_table(slots: tuple[tuple[int, int, int], ...], device: torch.device) -> Tensor:
    """int32 [n, 3]: place, id, and the bits of 1 / sqrt(in) in float32."""
    table = np.zeros((len(slots), 3), dtype=np.int32)
    for line, (place, width, id_) in zip(table, slots, strict=True):
        line[:] = place, id_, np.float32(1 / math.sqrt(width)).view(np.int32)
    return torch.from_numpy(table).to(device)


def fill_adapters(
    p_NP: Tensor,
    shadow_NP: Tensor,
    rows: Sequence[int],
    documents: Sequence[int],
    slots: tuple[tuple[int, int, int], ...],
    rank: int,
    seed: int,
) -> None:
    """Write the A of some documents, bit for bit those of `golf_ray.adaptation.philox.adapter_as`.

    Args:
        slots: place in a document's parameters, input width and id of each.
    """
    if not len(rows):
        return
    of = torch.from_numpy(np.array([rows, documents], dtype=np.uint32).T.astype(np.int32).copy())
    if p_NP.is_cuda:
        of = of.pin_memory().to(p_NP.device, non_blocking=True)
    for width in sorted({width for _, width, _ in slots}):
        same = tuple(slot for slot in slots if slot[1] == width)
        numel = rank * width
        grid = (triton.cdiv(-(-numel // 4), BLOCKS), len(same), len(rows))
        _fill[grid](
            p_NP, shadow_NP, of, _slot_table(same, p_NP.device), p_NP.shape[1],
            seed & (2**64 - 1), len(same), numel, BLOCK=BLOCKS,
        )  # fmt: skip
