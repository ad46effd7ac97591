"""Samples of documents: how they are drawn, and whether their intervals hold what they say."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference import TOKENIZER, VAL_SHARDS, tiny_model
from scipy import stats

from evaluators.result import evaluate
from evaluators.sampling import (
    Estimate,
    Sample,
    Stratum,
    cut_strata,
    draw,
    draw_sample,
    estimate,
    estimate_difference,
    t_quantile,
)
from evaluators.ttt import choose_documents, choose_sample
from golf_ray.adaptation.plan import window_tokens
from golf_ray.config import AdaptationConfig
from golf_ray.data.documents import document_bounds, document_bytes
from golf_ray.data.shards import load_tokens
from golf_ray.data.tokenizer import byte_tables
from golf_ray.errors import ConfigError
from golf_ray.metric import LN2
from golf_ray.presets import TINY

TOKENS = np.array(load_tokens(VAL_SHARDS, 512))
TABLES = byte_tables(TOKENIZER, 512)

LENGTHS = st.lists(
    st.one_of(st.integers(0, 3000), st.integers(1, 10**6), st.just(7)), min_size=1, max_size=300
).map(lambda lengths: np.array(lengths, dtype=np.int64))


@dataclass(frozen=True, kw_only=True, slots=True)
class Population:
    """Documents whose nats are all known."""

    lengths: NDArray[np.int64]
    num_bytes: NDArray[np.int64]
    nats: NDArray[np.float64]
    other_nats: NDArray[np.float64]
    """Of another setting, a little worse, and not by the same everywhere."""

    @property
    def bpb(self) -> float:
        return float(self.nats.sum() / self.num_bytes.sum() / LN2)

    @property
    def difference_bpb(self) -> float:
        return float((self.other_nats - self.nats).sum() / self.num_bytes.sum() / LN2)


def population(num: int = 50_000) -> Population:
    """Documents with the quantiles of length of the public validation set, in random order."""
    normal = NormalDist()
    z = np.array([normal.inv_cdf((i + 0.5) / num) for i in range(num)])
    knots = [z[0], *(normal.inv_cdf(q) for q in (0.1, 0.5, 0.9, 0.99))]
    values = np.log([20, 149, 476, 1596, 5681])
    log_lengths = np.interp(z, knots, values)
    # The tail's shape is such that the total is the public one, too.
    tail = np.clip((z - knots[-1]) / (z[-1] - knots[-1]), 0, None) ** 1.05
    log_lengths += tail * (math.log(79_464) - values[-1])
    generator = np.random.default_rng(20)
    lengths = generator.permutation(np.round(np.exp(log_lengths)).astype(np.int64))

    def noise() -> NDArray[np.float64]:
        return generator.standard_normal(num)

    num_bytes = np.round(lengths * np.clip(4.3 + 0.35 * noise(), 2, 8)).astype(np.int64)
    spread = 0.12 * np.maximum(lengths / 476, 1) ** -0.2
    nats_per_byte = 0.74 - 0.015 * np.log(lengths / 476) + spread * noise()
    nats = num_bytes * np.maximum(nats_per_byte, 0.05)
    change = 0.0005 + 0.004 * noise() + 0.05 / np.sqrt(lengths) * noise()
    return Population(
        lengths=lengths, num_bytes=num_bytes, nats=nats, other_nats=nats * (1 + change)
    )


@pytest.fixture(scope="module")
def field() -> Population:
    return population()


def test_the_population_is_the_one_of_the_field(field: Population) -> None:
    quantiles = np.quantile(field.lengths, [0.1, 0.5, 0.9, 0.99])
    np.testing.assert_allclose(quantiles, [149, 476, 1596, 5681], rtol=0.002)
    assert field.lengths.max() == 79_464
    assert field.lengths.sum() == pytest.approx(40_540_160, rel=0.002)
    assert field.num_bytes.sum() / field.lengths.sum() == pytest.approx(4.3, rel=0.01)


@pytest.mark.parametrize("count", [2000, 500])
def test_intervals_hold_the_whole_as_often_as_they_say(field: Population, count: int) -> None:
    nats, other = dict(enumerate(field.nats)), dict(enumerate(field.other_nats))
    cut, tokens_total = cut_strata(field.lengths, count), int(field.lengths.sum())
    held, held_difference, errors_bpb, found_bpb = 0, 0, [], []
    resamples = 2000
    for seed in range(resamples):
        sample = Sample(strata=draw(cut, seed), tokens_total=tokens_total)
        whole = estimate(sample, nats, field.num_bytes)
        held += whole.low_bpb <= field.bpb <= whole.high_bpb
        paired = estimate_difference(sample, other, nats, field.num_bytes)
        held_difference += paired.low_bpb <= field.difference_bpb <= paired.high_bpb
        errors_bpb.append(whole.standard_error_bpb)
        found_bpb.append(whole.bpb)
    assert 0.935 <= held / resamples <= 0.965
    assert 0.935 <= held_difference / resamples <= 0.965
    assert np.mean(errors_bpb) == pytest.approx(np.std(found_bpb), rel=0.06)
    assert np.mean(found_bpb) == pytest.approx(field.bpb, abs=0.1 * float(np.mean(errors_bpb)))


def test_what_a_sample_costs_and_what_it_is_worth(field: Population) -> None:
    cost = np.array([window_tokens(int(n), 32, 2048) for n in field.lengths])
    nats, other = dict(enumerate(field.nats)), dict(enumerate(field.other_nats))

    def variance_times_cost(sample: Sample) -> float:
        share = cost[list(sample.documents)].sum() / cost.sum()
        error_bpb = estimate(sample, nats, field.num_bytes).standard_error_bpb
        return float(error_bpb**2 * share)

    sample = draw_sample(field.lengths, 2000, 0)
    assert 0.04 < cost[list(sample.documents)].sum() / cost.sum() < 0.1
    whole = estimate(sample, nats, field.num_bytes)
    paired = estimate_difference(sample, other, nats, field.num_bytes)
    assert whole.standard_error_bpb < 0.005
    assert paired.standard_error_bpb < whole.standard_error_bpb / 10
    second = estimate(sample, other, field.num_bytes)
    assert paired.bpb == pytest.approx(second.bpb - whole.bpb, abs=1e-12)
    # Drawn by spread alone, that is by length, the same GPU time says less.
    order = np.argsort(field.lengths, kind="stable")
    steps = np.searchsorted(np.cumsum(field.lengths[order]), np.arange(1, 200) * 202_592)
    by_spread = tuple((m, min(10, len(m))) for m in np.split(order, steps))
    neyman = Sample(strata=draw(by_spread, 0), tokens_total=sample.tokens_total)
    assert variance_times_cost(sample) < 0.7 * variance_times_cost(neyman)


@settings(deadline=None, max_examples=150)
@given(LENGTHS, st.integers(2, 400), st.integers(0, 2**31))
def test_a_sample_is_each_document_once_of_all_strata(
    lengths: NDArray[np.int64], count: int, seed: int
) -> None:
    sample = draw_sample(lengths, count, seed)
    assert sample == draw_sample(lengths, count, seed)
    documents = sample.documents
    assert len(documents) == len(set(documents)) == min(count, len(lengths))
    assert list(documents) == sorted(documents)
    assert sample.documents_total == len(lengths) and sample.tokens_total == lengths.sum()
    for stratum in sample.strata:
        drawn = len(stratum.documents)
        assert drawn == stratum.num_documents or 2 <= drawn < stratum.num_documents
    members = [m for m, _ in cut_strata(lengths, count)]
    assert sorted(np.concatenate(members).tolist()) == list(range(len(lengths)))
    for stratum, whole in zip(sample.strata, members, strict=True):
        assert set(stratum.documents) <= set(whole.tolist())
    # From short to long.
    for shorter, longer in itertools.pairwise(members[:-1]):
        assert lengths[shorter].max() <= lengths[longer].min()


def test_the_longest_are_always_drawn_and_others_are_not(field: Population) -> None:
    samples = [draw_sample(field.lengths, 2000, seed) for seed in range(3)]
    longest = set(np.argsort(field.lengths)[-3:].tolist())
    assert all(longest <= set(sample.documents) for sample in samples)
    assert all(len(sample.strata[-1].documents) < 20 for sample in samples)
    assert len(set(samples[0].documents) & set(samples[1].documents)) < 400
    assert {len(s.documents) for s in samples[0].strata[:-1]} <= {4, 5, 6}


@settings(deadline=None, max_examples=100)
@given(LENGTHS, st.integers(2, 400), st.integers(0, 2**31), st.randoms())
def test_order_has_no_effect(lengths: NDArray[np.int64], count: int, seed: int, random) -> None:
    num_bytes = lengths * 4 + 1
    sample = draw_sample(lengths, count, seed)
    generator = np.random.default_rng(seed)
    nats = {i: float(generator.random()) * int(num_bytes[i]) for i in sample.documents}
    shuffled = list(nats.items())
    random.shuffle(shuffled)
    found = estimate(sample, nats, num_bytes)
    assert estimate(sample, dict(shuffled), num_bytes) == found
    assert found.low_bpb <= found.bpb <= found.high_bpb
    nothing = estimate_difference(sample, nats, dict(shuffled), num_bytes)
    assert nothing.bpb == nothing.standard_error_bpb == nothing.high_bpb == 0
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == found.to_dict()


@settings(deadline=None, max_examples=50)
@given(LENGTHS, st.integers(0, 100), st.integers(0, 2**31))
def test_as_many_as_there_are_is_all_without_error(
    lengths: NDArray[np.int64], beyond: int, seed: int
) -> None:
    sample = draw_sample(lengths, max(2, len(lengths) + beyond), seed)
    assert sample.documents == tuple(range(len(lengths)))
    num_bytes = lengths * 3 + 2
    nats = {i: 0.7 * int(n) + i % 3 for i, n in enumerate(num_bytes)}
    found = estimate(sample, nats, num_bytes)
    assert found.standard_error_bpb == 0 and found.degrees_of_freedom is None
    assert found.bpb == found.low_bpb == found.high_bpb
    assert found.bpb == math.fsum(nats.values()) / LN2 / int(num_bytes.sum())


def test_by_hand() -> None:
    sample = Sample(
        strata=(
            Stratum(num_documents=4, documents=(0, 3)), Stratum(num_documents=1, documents=(2,)),
        ),
        tokens_total=40,
    )  # fmt: skip
    num_bytes = np.array([10, 12, 50, 14, 12])
    found = estimate(sample, {0: 6.0, 3: 10.0, 2: 41.0}, num_bytes)
    # R = (4 * 8 + 41) / (4 * 12 + 50); residuals 6 - 10 R and 10 - 14 R are 4 - 4 R apart.
    ratio = 73 / 98
    spread = (4 - 4 * ratio) ** 2 / 2
    error = math.sqrt(4**2 * (1 - 2 / 4) * spread / 2) / 98
    assert found.bpb == pytest.approx(ratio / LN2)
    assert found.standard_error_bpb == pytest.approx(error / LN2)
    assert found.degrees_of_freedom == pytest.approx(1)
    assert found.high_bpb - found.bpb == pytest.approx(12.7062047 * error / LN2)
    assert (found.whole.tokens, found.whole.num_bytes) == (40, 98)
    assert (found.documents_scored, found.documents_total) == (3, 5)


@pytest.mark.parametrize("degrees", [1, 1.3, 2, 3, 5.5, 10, 30, 100, 1e4, 1e6])
def test_quantiles_of_t(degrees: float) -> None:
    for confidence in (0.8, 0.95, 0.99):
        expected = stats.t.ppf((1 + confidence) / 2, degrees)
        assert t_quantile(degrees, confidence) == pytest.approx(expected, rel=1e-8)


def test_a_loss_that_is_no_number_is_no_number_in_the_end() -> None:
    sample = draw_sample(np.arange(1, 40), 10, 0)
    nats = dict.fromkeys(range(39), 1.0) | {sample.documents[3]: math.nan}
    found = estimate(sample, nats, np.arange(1, 40) * 4)
    assert math.isnan(found.bpb) and math.isnan(found.low_bpb)
    assert math.isnan(found.standard_error_bpb)


def test_bytes_of_all_documents_without_scoring_them() -> None:
    bounds = document_bounds(TOKENS)
    found = document_bytes(TOKENS, bounds, TABLES)
    expected = [int(TABLES.count(TOKENS[a : b - 1], TOKENS[a + 1 : b]).sum()) for a, b in bounds]
    assert found.tolist() == expected and found.sum() == 1596
    # Tokens before the first document, and a last one without a prediction.
    stream = np.concatenate((np.full(3, 300), TOKENS, TOKENS[:1]))
    found = document_bytes(stream, document_bounds(stream), TABLES)
    assert found.tolist() == [*expected, 0]


def test_other_settings_score_the_same_documents() -> None:
    base = dataclasses.replace(TINY.adaptation, sample_documents=6)
    chosen = choose_documents(TOKENS, base)
    assert len(chosen) == 6
    for changes in (
        {"chunk_size": 32}, {"rank": 7}, {"lr": 1.0}, {"group_documents": 1}, {"window": 99},
        {"optimizer": "sgd"}, {"grad_steps": 2},
    ):  # fmt: skip
        assert choose_documents(TOKENS, dataclasses.replace(base, **changes)) == chosen
    other = dataclasses.replace(base, seed=1)
    assert choose_documents(TOKENS, other) != chosen
    assert choose_sample(document_bounds(TOKENS), TINY.adaptation) is None


def test_a_result_is_the_estimate_and_says_what_was_scored() -> None:
    def run(documents: int | None) -> tuple[dict, Estimate | None]:
        adaptation = dataclasses.replace(TINY.adaptation, sample_documents=documents)
        config = dataclasses.replace(TINY, adaptation=adaptation)
        result = evaluate(tiny_model(), config, "ttt", tokens=TOKENS, tables=TABLES, weights="full")
        return result.to_dict(per_document=True), result.estimate

    full, none = run(None)
    assert none is None and "estimate" not in full
    some, found = run(8)
    assert found is not None and some["estimate"] == found.to_dict()
    assert some["documents_scored"] == found.documents_scored == 8
    assert some["bytes_scored"] == sum(d["bytes"] for d in some["documents"]) < 1596
    assert (found.whole.tokens, found.whole.num_bytes) == (882, 1596)
    plain = sum(d["nats"] for d in some["documents"]) / LN2 / some["bytes_scored"]
    assert some["val_bpb"] == found.bpb != plain
    assert some["val_loss_nats"] == pytest.approx(found.bpb * LN2 * 1596 / 882)
    assert found.low_bpb < full["val_bpb"] < found.high_bpb
    every, exact = run(14)
    assert exact is not None and exact.standard_error_bpb == 0
    for name in ("val_bpb", "val_loss_nats", "tokens_scored", "bytes_scored", "documents"):
        assert every[name] == full[name], name


def test_a_sample_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"sample_documents = 1 is not allowed; .* at least 2"):
        AdaptationConfig(sample_documents=1)
    with pytest.raises(ConfigError, match=r"sample_documents = 9 .*document_fraction"):
        AdaptationConfig(sample_documents=9, document_fraction=0.5)
