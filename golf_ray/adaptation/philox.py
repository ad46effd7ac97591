"""Counter-based random numbers: Philox4x32-10, and the adapters' A made of them.

A number is a function of its place alone, so a document's adapter is the same on every machine, in
every batch, in any order and after any retry. No generator state exists anywhere.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the constants are
those of its library Random123, whose known answers the tests hold.

Layout for adapters, all words unsigned 32-bit:

    key     (seed mod 2^32, seed div 2^32)
    counter (block, slot, document, stream)

Element e of A (row-major in [rank, in]) is output word e mod 4 of block e div 4. `slot` is the
stable id of `golf_ray.adaptation.adapters`, `document` its place in the whole validation set,
`stream` names the use: 0 for A. Each use that may come gets a stream of its own.

Invariant: equal bits on every device; only integer operations, exact conversions and one IEEE
multiplication are used. Words are carried in int64, because torch has few unsigned operations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

MASK: Final = 0xFFFFFFFF
ROUNDS: Final = 10
MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
WEYL: Final = (0x9E3779B9, 0xBB67AE85)
STREAM_A: Final = 0

Word = Tensor | int


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product; halves keep every step under 2^63."""
    low = (word & 0xFFFF) * constant
    middle = (word >> 16) * constant + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32(
    counter: tuple[Word, Word, Word, Word], key: tuple[int, int], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four output words of each counter.

    Args:
        counter: four words, each a whole number or an int64 tensor of values below 2^32; they
            broadcast against one another.
        key: two words.

    Returns:
        Four int64 tensors of values below 2^32, in the broadcast shape.
    """
    # The rounds mix every word into every other, so that all outputs have the broadcast shape.
    c0, c1, c2, c3 = (torch.as_tensor(w, dtype=torch.int64, device=device) for w in counter)
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def symmetric_uniform(word: Tensor, bound: float) -> Tensor:
    """Words to float32, uniform in (-bound, bound), bit-equal everywhere.

    The upper 24 bits k give the odd number 2k + 1 - 2^24, which float32 holds exactly; a power of
    two scales it exactly into (-1, 1); the multiplication by `bound` is the only rounding, and
    rounds no value up to the bound.
    """
    odd = ((word >> 8) << 1) + (1 - 2**24)
    return odd.to(torch.float32) * 2.0**-24 * float(np.float32(bound))


def adapter_as(
    seed: int,
    document: int,
    slots: Sequence[int],
    rank: int,
    in_features: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A of one document in several slots of one input width.

    Args:
        seed: from 0; taken modulo 2^64.
        document: place in the whole validation set, below 2^32.
        slots: stable slot ids.

    Returns:
        float32 [slots, rank, in], uniform in (-1/sqrt(in), 1/sqrt(in)).
    """
    assert 0 <= document <= MASK, document
    numel = rank * in_features
    block = torch.arange(-(-numel // 4), dtype=torch.int64, device=device)
    slot = torch.tensor(list(slots), dtype=torch.int64, device=device)[:, None]
    key = (seed & MASK, (seed >> 32) & MASK)
    words = torch.stack(philox4x32((block, slot, document, STREAM_A), key, device), dim=-1)
    a = symmetric_uniform(words.flatten(1)[:, :numel], 1 / math.sqrt(in_features))
    return a.reshape(-1, rank, in_features)


def adapter_a(
    seed: int,
    document: int,
    slot: int,
    rank: int,
    in_features: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A of one document in one slot, float32 [rank, in]; see `adapter_as`."""
    return adapter_as(seed, document, (slot,), rank, in_features, device)[0]
