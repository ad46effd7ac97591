"""Philox: known answers, a second implementation in plain integers, and the adapters' A."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golf_ray.adaptation.philox import adapter_a, adapter_as, philox4x32, symmetric_uniform

WORDS = st.integers(0, 2**32 - 1)
# Known answers of Random123 1.14 (philox4x32-10): counter, key, output.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text: str) -> tuple[int, ...]:
    return tuple(int(w, 16) for w in text.split())


def plain_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    c, k = words(counter), words(key)
    out = philox4x32((c[0], c[1], c[2], c[3]), (k[0], k[1]))
    assert tuple(int(w) for w in out) == words(expected)
    assert plain_philox(c, k) == words(expected)


@settings(max_examples=100, deadline=None)
@given(counter=st.tuples(WORDS, WORDS, WORDS, WORDS), key=st.tuples(WORDS, WORDS))
def test_equals_plain_integers(counter: tuple[int, int, int, int], key: tuple[int, int]) -> None:
    assert tuple(int(w) for w in philox4x32(counter, key)) == plain_philox(counter, key)


def test_words_broadcast_against_one_another() -> None:
    c0, c1 = torch.arange(5)[None], torch.arange(3)[:, None]
    out = philox4x32((c0, c1, 7, 0), (11, 13))
    assert out[0].shape == (3, 5)
    for i in range(3):
        for j in range(5):
            expected = plain_philox((j, i, 7, 0), (11, 13))
            assert tuple(int(w[i, j]) for w in out) == expected


def test_uniform_is_open_symmetric_and_exact() -> None:
    ends = torch.tensor([0, 0xFF, 0x7FFFFF00, 0x80000000, 0xFFFFFFFF])
    for bound in (1.0, 1 / math.sqrt(512), 1 / math.sqrt(64), 1 / math.sqrt(3)):
        values = symmetric_uniform(ends, bound)
        assert values.dtype == torch.float32
        assert (values.abs() < bound).all()
        assert values[0] == values[1] == -values[4]
        assert values[2] == -values[3] and values[3] > 0
    assert symmetric_uniform(ends, 1.0).tolist() == [
        -(1 - 2.0**-24), -(1 - 2.0**-24), -(2.0**-24), 2.0**-24, 1 - 2.0**-24
    ]  # fmt: skip


def test_layout_of_counter_and_key() -> None:
    seed, document, slot, rank, width = 3 + (5 << 32), 49_999, 141, 3, 6
    a = adapter_a(seed, document, slot, rank, width)
    assert a.shape == (rank, width)
    for element in range(rank * width):
        word = plain_philox((element // 4, slot, document, 0), (3, 5))[element % 4]
        odd = 2 * (word >> 8) + 1 - 2**24
        expected = torch.tensor(odd / 2**24) * torch.tensor(1 / math.sqrt(width))
        assert a.flatten()[element] == expected


def test_a_batch_of_slots_is_the_slots_one_by_one() -> None:
    slots = (0, 1, 8, 141)
    together = adapter_as(5, 17, slots, 4, 10)
    for i, slot in enumerate(slots):
        assert torch.equal(together[i], adapter_a(5, 17, slot, 4, 10))


def test_seed_document_and_slot_all_matter() -> None:
    base = adapter_a(1, 2, 3, 4, 64)
    for other in (
        adapter_a(2, 2, 3, 4, 64), adapter_a(1, 3, 3, 4, 64), adapter_a(1, 2, 4, 4, 64),
        adapter_a(1 + (1 << 32), 2, 3, 4, 64),
    ):  # fmt: skip
        assert (other != base).float().mean() > 0.99
    assert torch.equal(base, adapter_a(1, 2, 3, 4, 64))


def test_distribution() -> None:
    width = 256
    a = adapter_a(0, 0, 0, 400, width) * math.sqrt(width)
    num = a.numel()
    # Five standard errors of mean, variance (1/3) and of the correlation of neighbours.
    assert abs(float(a.mean())) < 5 / math.sqrt(3 * num)
    assert abs(float(a.square().mean()) - 1 / 3) < 5 * math.sqrt(4 / 45 / num)
    assert abs(float((a[:, 1:] * a[:, :-1]).mean())) < 5 / (3 * math.sqrt(num))
    counts = torch.histc(a, bins=64, min=-1, max=1)
    chi2 = float(((counts - num / 64) ** 2 / (num / 64)).sum())
    assert 63 - 5 * math.sqrt(126) < chi2 < 63 + 5 * math.sqrt(126)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_equal_bits_on_a_gpu() -> None:
    slots = tuple(range(0, 137, 8))
    for width in (64, 512):
        there = adapter_as(1 << 40, 49_999, slots, 96, width, "cuda").cpu()
        assert torch.equal(there, adapter_as(1 << 40, 49_999, slots, 96, width))
