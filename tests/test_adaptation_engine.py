"""The engine: against a plain twin, against itself under other packings, and against cheats."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from adaptation_cases import (
    ADAPTATION,
    SMALL,
    TABLES,
    VOCAB_SIZE,
    changed_tail,
    documents_of,
    small_model,
    stream,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from golf_ray.adaptation import engine as engine_module
from golf_ray.adaptation.adapters import AdapterBank, AdapterLayout, adapter_slots
from golf_ray.adaptation.batches import Batch, HostBatch, Shape
from golf_ray.adaptation.engine import Engine, adapt_groups, group_documents
from golf_ray.adaptation.packing import Budget, Step
from golf_ray.adaptation.philox import adapter_a
from golf_ray.adaptation.plan import chunk_at
from golf_ray.adaptation.scores import Document, DocumentScore
from golf_ray.adaptation.shapes import ShapeChoice
from golf_ray.config import AdaptationConfig
from golf_ray.errors import EvaluationFailed
from golf_ray.model.hooks import Hooks, Site
from golf_ray.model.model import GolfModel
from golf_ray.model.segments import Segments

MODEL = small_model()
# Where a gradient is zero but for rounding (the first token attends to nothing but itself, which
# XSA removes), Adam with a small eps makes a whole step of the rounding. In float64 it makes none.
EXACT = small_model(dtype=torch.float64)
Tokens = NDArray[np.uint16]
Update = Callable[[Batch, Tensor], None]
Run = Callable[[Tokens, AdaptationConfig], dict[int, NDArray[np.float32]]]


def run(
    tokens: Tokens,
    adaptation: AdaptationConfig,
    documents: tuple[Document, ...] | None = None,
    model: GolfModel = MODEL,
) -> dict[int, DocumentScore]:
    documents = documents_of(tokens) if documents is None else documents
    groups = group_documents(documents, adaptation)
    scores = adapt_groups(model, tokens, groups, adaptation, tables=TABLES, keep_token_nats=True)
    return {score.index: score for score in scores}


def losses(tokens: Tokens, adaptation: AdaptationConfig) -> dict[int, NDArray[np.float32]]:
    return {i: _losses_of(score) for i, score in run(tokens, adaptation).items()}


def _losses_of(score: DocumentScore) -> NDArray[np.float32]:
    assert score.token_nats is not None
    return score.token_nats


# A plain twin -------------------------------------------------------------------------------


class PlainAdapters(Hooks):
    """One document's adapters, a pair of parameters a slot."""

    def __init__(self, document: int, adaptation: AdaptationConfig) -> None:
        self.pairs: dict[tuple[Site, int], tuple[Tensor, Tensor]] = {}
        for slot in adapter_slots(SMALL, adaptation.sites):
            a = adapter_a(adaptation.seed, document, slot.id, adaptation.rank, slot.in_features)
            b = torch.zeros(slot.out_features, adaptation.rank, dtype=torch.float64)
            self.pairs[slot.site, slot.layer] = (a.double().requires_grad_(), b.requires_grad_())

    def adapt(self, site: Site, slot: int, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        if (site, slot) not in self.pairs:
            return y_TO
        a, b = self.pairs[site, slot]
        return y_TO + (x_TI @ a.T) @ b.T


def plain_document(ids: Tensor, document: int, adaptation: AdaptationConfig) -> list[float]:
    """Section by section what the method says, with torch's optimizers."""
    adapters = PlainAdapters(document, adaptation)
    parameters = [t for pair in adapters.pairs.values() for t in pair]
    optimizer: torch.optim.Optimizer
    if adaptation.optimizer == "adam":
        optimizer = torch.optim.AdamW(
            parameters, lr=adaptation.lr, betas=(adaptation.beta1, adaptation.beta2),
            eps=adaptation.eps, weight_decay=adaptation.weight_decay,
        )  # fmt: skip
    else:
        optimizer = torch.optim.SGD(parameters, lr=adaptation.lr, momentum=adaptation.beta1)

    def chunk_losses(start: int, end: int) -> Tensor:
        first = max(0, end - adaptation.window)
        segments = Segments.of_lengths([end - first])
        x_TD = EXACT.hidden(ids[first:end], segments, loop=True, hooks=adapters)
        log_p = F.log_softmax(EXACT.logits(x_TD, adapters), dim=-1)
        return -log_p.gather(1, ids[first + 1 : end + 1, None])[start - first :, 0]

    scores: list[float] = []
    n = len(ids) - 1
    for start in range(0, n, adaptation.chunk_size):
        end = min(start + adaptation.chunk_size, n)
        now = chunk_losses(start, end)
        scores += now.tolist()
        if end == n:
            break
        for step in range(adaptation.grad_steps):
            optimizer.zero_grad()
            (now if step == 0 else chunk_losses(start, end)).mean().backward()
            if adaptation.optimizer == "sgd":
                with torch.no_grad():
                    for p in parameters:
                        p.mul_(1 - adaptation.lr * adaptation.weight_decay)
            optimizer.step()
    return scores


SETTINGS = st.builds(
    lambda chunk, extra, **rest: AdaptationConfig(chunk_size=chunk, window=chunk + extra, **rest),
    chunk=st.integers(1, 8),
    extra=st.integers(0, 12),
    rank=st.integers(1, 3),
    lr=st.sampled_from([1e-3, 1e-2]),
    eps=st.sampled_from([1e-10, 1e-4]),
    beta1=st.sampled_from([0.0, 0.5]),
    optimizer=st.sampled_from(["adam", "sgd"]),
    grad_steps=st.integers(1, 2),
    seed=st.integers(0, 3),
    group_documents=st.integers(1, 4),
    sites=st.sampled_from(
        [("q", "k", "v", "o", "mlp", "head"), ("head",), ("k", "mlp"), ("q", "v", "o")]
    ),
)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    adaptation=SETTINGS,
    lengths=st.lists(st.integers(1, 15), min_size=1, max_size=3),
    last=st.integers(0, 15),
)
def test_equals_a_plain_twin(adaptation: AdaptationConfig, lengths: list[int], last: int) -> None:
    tokens = stream([*lengths, last])
    scores = run(tokens, adaptation, model=EXACT)
    assert sorted(scores) == list(range(len(lengths) + 1))
    for document in documents_of(tokens):
        ids = torch.from_numpy(tokens[document.start : document.end].astype(np.int64))
        expected = plain_document(ids, document.index, adaptation)
        got = _losses_of(scores[document.index])
        assert len(got) == len(expected) == document.num_predictions
        np.testing.assert_allclose(got, expected, rtol=0, atol=5e-6)


def test_adaptation_does_something_and_learns() -> None:
    rng = np.random.default_rng(0)
    tokens = np.tile(rng.integers(4, VOCAB_SIZE, 8), 10).astype(np.uint16)
    tokens[0] = 1
    still = losses(tokens, dataclasses.replace(ADAPTATION, sites=()))[0]
    moving = losses(tokens, ADAPTATION)[0]
    np.testing.assert_allclose(moving[:4], still[:4], atol=1e-5)
    assert moving[40:].mean() < still[40:].mean() - 0.1


# The result belongs to the document ----------------------------------------------------------

MIXED = stream([9, 1, 23, 2, 12, 12, 5, 26, 3, 0])
FEW = stream([7, 1, 13, 5, 9])


@pytest.mark.parametrize("group_size", [1, 3, 64])
def test_packing_has_no_effect(group_size: int) -> None:
    base = run(MIXED, ADAPTATION)
    other = run(MIXED, dataclasses.replace(ADAPTATION, group_documents=group_size))
    assert other.keys() == base.keys() == set(range(10))
    for index, score in base.items():
        assert other[index].nats == pytest.approx(score.nats, abs=1e-6 * max(1, score.tokens))
        assert (other[index].tokens, other[index].num_bytes) == (score.tokens, score.num_bytes)


def test_order_of_documents_changes_no_bit() -> None:
    documents = documents_of(MIXED)
    base = run(MIXED, ADAPTATION)
    shuffled = [documents[i] for i in np.random.default_rng(1).permutation(len(documents))]
    again = run(MIXED, ADAPTATION, tuple(shuffled))
    assert {i: s.nats for i, s in again.items()} == {i: s.nats for i, s in base.items()}


def test_a_sample_scores_as_in_the_whole_set() -> None:
    base = run(MIXED, ADAPTATION)
    some = tuple(d for d in documents_of(MIXED) if d.index in (2, 6, 7, 9))
    for index, score in run(MIXED, ADAPTATION, some).items():
        assert score.nats == pytest.approx(base[index].nats, abs=1e-6 * max(1, score.tokens))


def test_groups_one_by_one_are_the_whole_bit_for_bit() -> None:
    base = run(MIXED, ADAPTATION)
    groups = group_documents(documents_of(MIXED), ADAPTATION)
    for members in reversed(groups):
        engine = Engine(MODEL, MIXED, ADAPTATION, tables=TABLES)
        for score in engine.run(members):
            assert score.nats == base[score.index].nats


def test_equal_documents_differ_by_their_index_alone() -> None:
    text = stream([30])
    tokens = np.concatenate([text, text, text[:1]])
    scores = losses(tokens, ADAPTATION)
    assert len(scores[0]) == len(scores[1]) == 31
    assert np.array_equal(scores[0][:4], scores[1][:4])
    assert not np.array_equal(scores[0][8:], scores[1][8:])


def test_the_seed_decides_a() -> None:
    base, other = (run(MIXED, dataclasses.replace(ADAPTATION, seed=s))[7].nats for s in (0, 1))
    assert base != other


_SCRIPT = """
import torch
torch.set_num_threads(1)
from test_adaptation_engine import ADAPTATION, MIXED, run
print(*(f"{i}:{s.nats.hex()}" for i, s in sorted(run(MIXED, ADAPTATION).items())))
"""


def test_another_process_gives_the_same_bits() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = run(MIXED, ADAPTATION)
        again = run(MIXED, ADAPTATION)
    finally:
        torch.set_num_threads(threads)
    expected = " ".join(f"{i}:{s.nats.hex()}" for i, s in sorted(here.items()))
    assert expected == " ".join(f"{i}:{s.nats.hex()}" for i, s in sorted(again.items()))
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True, cwd=tests,
        env={"PYTHONPATH": f"{tests.parent}:{tests}", "PATH": ""},
    )  # fmt: skip
    assert done.stdout.strip() == expected


def test_the_models_own_weights_stay_as_they_are() -> None:
    model = small_model()
    flags = {name: i % 2 == 0 for i, name in enumerate(model.tensors())}
    for name, tensor in model.tensors().items():
        tensor.requires_grad_(flags[name])
    before = {name: tensor.clone() for name, tensor in model.tensors().items()}
    run(MIXED, ADAPTATION, model=model)
    for name, tensor in model.tensors().items():
        assert torch.equal(tensor, before[name])
        assert tensor.grad is None and tensor.requires_grad == flags[name]


# Small and long documents ----------------------------------------------------------------------


def test_documents_of_one_and_two_tokens() -> None:
    tokens = np.array([1, 1, 9, 1, 1], dtype=np.uint16)
    scores = run(tokens, ADAPTATION)
    assert [scores[i].tokens for i in range(4)] == [1, 2, 1, 0]
    assert (scores[3].nats, scores[3].num_bytes, scores[3].trace) == (0.0, 0, ())
    assert [len(scores[i].trace) for i in range(4)] == [1, 1, 1, 0]
    # The next BOS is predicted, and stands for no byte.
    assert [scores[i].num_bytes for i in range(4)] == [0, int(TABLES.base_bytes[9]), 0, 0]


def test_nothing_but_a_bos() -> None:
    scores = run(np.array([1], dtype=np.uint16), ADAPTATION)
    assert len(scores) == 1 and scores[0].tokens == 0


def test_a_document_much_longer_than_the_others() -> None:
    tokens = stream([6, 230, 3])
    scores = run(tokens, ADAPTATION)
    assert scores[1].tokens == 230 and len(scores[1].trace) == 58
    assert np.isfinite(_losses_of(scores[1])).all()
    alone = run(tokens, ADAPTATION, documents_of(tokens)[1:2])
    assert scores[1].nats == pytest.approx(alone[1].nats, rel=1e-6)


def test_sums_are_exact_and_bytes_follow_the_previous_token() -> None:
    for index, score in run(MIXED, ADAPTATION).items():
        document = documents_of(MIXED)[index]
        ids = MIXED[document.start : document.end]
        assert score.num_bytes == int(TABLES.count(ids[:-1], ids[1:]).sum())
        assert score.nats == pytest.approx(float(_losses_of(score).astype(np.float64).sum()))


# Score before update ---------------------------------------------------------------------------


def check_trace(scores: dict[int, DocumentScore], adaptation: AdaptationConfig) -> None:
    """Every chunk once and in order, scored before its update, no update after the last."""
    for score in scores.values():
        chunks = -(-score.tokens // adaptation.chunk_size)
        assert [event.chunk for event in score.trace] == list(range(chunks))
        times = []
        for event in score.trace[:-1]:
            assert event.updated_at is not None
            times += [event.scored_at, event.updated_at]
        if score.trace:
            assert score.trace[-1].updated_at is None
            times.append(score.trace[-1].scored_at)
        assert all(a < b for a, b in itertools.pairwise(times))


@pytest.mark.parametrize("grad_steps", [1, 3])
def test_the_trace_shows_score_before_update(grad_steps: int) -> None:
    adaptation = dataclasses.replace(ADAPTATION, grad_steps=grad_steps, group_documents=64)
    scores = run(MIXED, adaptation)
    check_trace(scores, adaptation)
    events = [e for s in scores.values() for e in s.trace]
    times = [e.scored_at for e in events] + [
        e.updated_at for e in events if e.updated_at is not None
    ]
    # One count for the whole group, no number used twice.
    assert sorted(times) == list(range(len(times)))


def check_nothing_leaks(run_losses: Run) -> None:
    """Later tokens and other documents change no bit of a score; the changed ones do change."""
    tokens = FEW
    base = run_losses(tokens, ADAPTATION)
    for place, document in enumerate(documents_of(tokens)):
        n = document.num_predictions
        for first in sorted({1, n // 2, n - 1} & set(range(1, n))):
            changed = changed_tail(tokens, document.start + first, seed=place, end=document.end)
            after = run_losses(changed, ADAPTATION)
            for index in base:
                same = after[index] == base[index]
                if index != document.index:
                    assert same.all(), f"document {document.index} reached document {index}"
                else:
                    assert same[: first - 1].all(), "a later token reached an earlier score"
                    assert not same[first - 1 :].all()


def check_tail(run_losses: Run) -> None:
    """The same with everything after one place changed at once, other documents included."""
    base = run_losses(FEW, ADAPTATION)
    for first in range(2, len(FEW), 6):
        after = run_losses(changed_tail(FEW, first, seed=first), ADAPTATION)
        for document in documents_of(FEW):
            kept = max(0, first - document.start - 1)
            before, now = base[document.index], after[document.index]
            assert np.array_equal(before[:kept], now[:kept]), (first, document.index)


def test_nothing_leaks() -> None:
    check_nothing_leaks(losses)


def test_no_tail_leaks() -> None:
    check_tail(losses)


class Peeking(Engine):
    """Learns from a chunk, then scores it."""

    def learn(self, batch: Batch, update: Update) -> Tensor:
        update(batch, self.losses(batch))
        return super().learn(batch, update)


class CarryingOver(Engine):
    """Starts documents with the adapters that were last in their rows."""

    def _start(self, admitted, documents, kept):  # type: ignore[no-untyped-def]
        rows = [row for _, row in admitted]
        left = self.bank.p_NP[rows].clone()
        super()._start(admitted, documents, kept)
        used = left.abs().sum(1) > 0
        self.bank.p_NP[torch.tensor(rows, dtype=torch.int64)[used]] = left[used]


class Sharing(Engine):
    """Learns from the neighbours' chunks as well."""

    def update(self, batch: Batch, losses_S: Tensor) -> None:
        super().update(batch, losses_S)
        rows = list(batch.rows)
        self.bank.p_NP[rows] = self.bank.p_NP[rows].mean(0, keepdim=True)


class SharingMoments(Engine):
    """Keeps one second moment for all documents."""

    def update(self, batch: Batch, losses_S: Tensor) -> None:
        super().update(batch, losses_S)
        assert self.optimizer.second_NP is not None
        self.optimizer.second_NP[:] = self.optimizer.second_NP.mean(0, keepdim=True)


class WindowTooFar(Engine):
    """Has learnt the next chunk's tokens before it scores them."""

    def _host_batch(self, step: Step, shape: Shape | None = None) -> HostBatch:
        self.step = step
        return super()._host_batch(step, shape)

    def learn(self, batch: Batch, update: Update) -> Tensor:
        losses_S = super().learn(batch, update)
        ahead = []
        for member in self.step.members:
            n = self._residents[member.document].document.num_predictions
            if n > (member.number + 2) * self.adaptation.chunk_size:
                size, window = self.adaptation.chunk_size, self.adaptation.window
                chunk = chunk_at(member.number + 1, n, size, window)
                ahead.append(dataclasses.replace(member, number=member.number + 1, chunk=chunk))
        if ahead:
            step = Step(learns=True, members=tuple(ahead))
            later = super()._host_batch(step).on(self.device)
            update(later, self.losses(later))
        return losses_S


def _losses_by(engine: type[Engine]) -> Run:
    def run_losses(tokens: Tokens, adaptation: AdaptationConfig) -> dict[int, NDArray[np.float32]]:
        # Two rows, so that documents follow one another in them.
        run_one = engine(
            MODEL,
            tokens,
            adaptation,
            tables=TABLES,
            keep_token_nats=True,
            budget=Budget(residents=2, step_tokens=64),
        )
        return {s.index: _losses_of(s) for s in run_one.run(documents_of(tokens))}

    return run_losses


@pytest.mark.parametrize("cheat", [Peeking, CarryingOver, Sharing, SharingMoments, WindowTooFar])
def test_a_cheating_engine_is_caught(cheat: type[Engine]) -> None:
    with pytest.raises(AssertionError, match="reached"):
        check_nothing_leaks(_losses_by(cheat))


def test_the_check_itself_passes_an_honest_engine() -> None:
    honest = _losses_by(Engine)
    check_nothing_leaks(honest)
    for index, values in losses(FEW, ADAPTATION).items():
        np.testing.assert_allclose(values, honest(FEW, ADAPTATION)[index], atol=2e-6)


@pytest.mark.parametrize("fault", ["updated first", "scored twice", "out of order", "last learnt"])
def test_a_bad_trace_is_seen(fault: str) -> None:
    score = run(FEW, ADAPTATION)[2]
    trace = list(score.trace)
    assert len(trace) == 4
    if fault == "updated first":
        trace[1] = dataclasses.replace(trace[1], updated_at=trace[1].scored_at - 1)
    elif fault == "scored twice":
        trace.insert(1, trace[0])
    elif fault == "out of order":
        trace[0], trace[1] = trace[1], trace[0]
    else:
        trace[-1] = dataclasses.replace(trace[-1], updated_at=trace[-1].scored_at + 1)
    with pytest.raises(AssertionError):
        check_trace({0: dataclasses.replace(score, trace=tuple(trace))}, ADAPTATION)


# Whatever goes together ------------------------------------------------------------------------

ALONE = Budget(residents=1, step_tokens=1)


def budgeted(
    tokens: Tokens,
    budget: Budget,
    adaptation: AdaptationConfig = ADAPTATION,
    *,
    documents: tuple[Document, ...] | None = None,
    model: GolfModel = EXACT,
    told: list[str] | None = None,
    steps: list[Step] | None = None,
) -> dict[int, DocumentScore]:
    """Scores by index; every document has exactly one."""
    documents = documents_of(tokens) if documents is None else documents
    one = Engine(
        model, tokens, adaptation, tables=TABLES, budget=budget, keep_token_nats=True,
        tell=None if told is None else told.append, on_step=None if steps is None else steps.append,
    )  # fmt: skip
    scores = list(one.run(documents))
    assert sorted(score.index for score in scores) == sorted(d.index for d in documents)
    check_trace({score.index: score for score in scores}, adaptation)
    return {score.index: score for score in scores}


def check_same(found: dict[int, DocumentScore], expected: dict[int, DocumentScore]) -> None:
    assert found.keys() == expected.keys()
    for index, score in found.items():
        other = expected[index]
        assert (score.tokens, score.num_bytes) == (other.tokens, other.num_bytes)
        np.testing.assert_allclose(_losses_of(score), _losses_of(other), rtol=1e-6, atol=1e-6)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    data=st.data(),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    last=st.integers(0, 30),
    residents=st.integers(1, 8),
    step_tokens=st.integers(1, 120),
    beta1=st.sampled_from([0.0, 0.5]),
)
def test_neither_batch_nor_packing_nor_order_has_an_effect(
    data: st.DataObject,
    lengths: list[int],
    last: int,
    residents: int,
    step_tokens: int,
    beta1: float,
) -> None:
    tokens = stream([*lengths, last])
    adaptation = dataclasses.replace(ADAPTATION, beta1=beta1)
    documents = documents_of(tokens)
    alone = budgeted(tokens, ALONE, adaptation)
    budget = Budget(residents=residents, step_tokens=step_tokens)
    check_same(budgeted(tokens, budget, adaptation), alone)
    shuffled = tuple(data.draw(st.permutations(documents)))
    check_same(budgeted(tokens, budget, adaptation, documents=shuffled), alone)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=2, max_size=6),
    residents=st.integers(2, 8),
    step_tokens=st.integers(20, 120),
)
def test_packing_has_no_effect_in_float32(
    lengths: list[int], residents: int, step_tokens: int
) -> None:
    # As above: with a small eps, Adam would make a step of what is rounding alone.
    adaptation = dataclasses.replace(ADAPTATION, eps=1e-2)
    tokens = stream(lengths)
    alone = budgeted(tokens, ALONE, adaptation, model=MODEL)
    mixed = budgeted(tokens, Budget(residents=residents, step_tokens=step_tokens), adaptation,
                     model=MODEL)  # fmt: skip
    for index, score in mixed.items():
        np.testing.assert_allclose(
            _losses_of(score), _losses_of(alone[index]), rtol=1e-6, atol=4e-6
        )


def test_batches_of_one_and_mixed_ones_are_what_they_are_called() -> None:
    steps: list[Step] = []
    budgeted(MIXED, ALONE, steps=steps)
    assert {len(step.members) for step in steps} == {1}
    steps = []
    budgeted(MIXED, Budget(residents=8, step_tokens=64), steps=steps)
    assert max(len(step.members) for step in steps) > 4
    assert any(len({m.chunk.window_tokens for m in step.members}) > 1 for step in steps)
    assert any(len({m.number for m in step.members}) > 1 for step in steps)


def test_a_document_of_very_many_predictions_and_some_of_one_or_two_tokens() -> None:
    tokens = stream([1, 2, 2000, 1, 2, 0])
    steps: list[Step] = []
    scores = budgeted(tokens, Budget(residents=4, step_tokens=40), model=MODEL, steps=steps)
    assert [scores[i].tokens for i in range(6)] == [1, 2, 2000, 1, 2, 0]
    assert len(scores[2].trace) == 500
    assert sum(step.learns for step in steps) == 499
    assert np.isfinite(_losses_of(scores[2])).all()
    for index in (0, 1, 3, 4):
        # Scored before anything is learned: what the model says without adapters.
        still = run(tokens, dataclasses.replace(ADAPTATION, sites=()),
                    documents_of(tokens)[index : index + 1])  # fmt: skip
        np.testing.assert_allclose(_losses_of(scores[index]), _losses_of(still[index]), atol=1e-5)


# A lack of memory ------------------------------------------------------------------------------

LARGE = Budget(residents=8, step_tokens=96)


class Memory:
    """Stands in for `GolfModel.hidden`: raises where a step has more tokens than it holds."""

    def __init__(self, model: GolfModel, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
        self.tokens = tokens
        self.passes: list[int] = []
        """Tokens of each pass that was tried."""
        self._hidden = model.hidden
        monkeypatch.setattr(model, "hidden", self)

    def fails(self, tokens: int) -> bool:
        return tokens > self.tokens

    def __call__(self, ids_T: Tensor, *args: object, **more: object) -> Tensor:
        self.passes.append(len(ids_T))
        if self.fails(len(ids_T)):
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return self._hidden(ids_T, *args, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("grad_steps", [1, 2])
def test_a_step_that_memory_does_not_hold_is_halved(
    grad_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    adaptation = dataclasses.replace(ADAPTATION, grad_steps=grad_steps, beta1=0.5)
    expected = budgeted(MIXED, Budget(residents=8, step_tokens=24), adaptation)
    told: list[str] = []
    steps: list[Step] = []
    memory = Memory(EXACT, monkeypatch, tokens=30)
    found = budgeted(MIXED, LARGE, adaptation, told=told, steps=steps)
    check_same(found, expected)
    failed = [tokens for tokens in memory.passes if tokens > 30]
    assert failed and len(told) == len(failed)
    # Half of what did not fit, from there on.
    for line, tokens in zip(told, failed, strict=True):
        assert line == f"out of memory: steps of {tokens // 2} tokens from here on"
    assert all(step.window_tokens <= 30 for step in steps)
    assert all(tokens <= failed[-1] // 2 for tokens in memory.passes[-10:])


def test_memory_may_become_short_in_the_middle_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = budgeted(MIXED, LARGE)
    memory = Memory(EXACT, monkeypatch, tokens=1000)

    def shrink(step: Step) -> None:
        steps.append(step)
        memory.tokens = 1000 if len(steps) < 3 else 12

    steps: list[Step] = []
    told: list[str] = []
    one = Engine(
        EXACT, MIXED, ADAPTATION, tables=TABLES, budget=LARGE, keep_token_nats=True,
        tell=told.append, on_step=shrink,
    )  # fmt: skip
    found = {score.index: score for score in one.run(documents_of(MIXED))}
    assert told and one.budget.step_tokens < 24 and one.budget.residents == 8
    check_same(found, expected)
    check_trace(found, ADAPTATION)
    # What was found out stays: the next run begins with steps that fit.
    del told[:]
    again = {score.index: score for score in one.run(documents_of(MIXED))}
    assert not told
    check_same(again, expected)


def test_a_single_window_that_memory_does_not_hold_ends_the_evaluation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Memory(EXACT, monkeypatch, tokens=11)
    with pytest.raises(EvaluationFailed) as error:
        budgeted(MIXED, LARGE)
    assert str(error.value) == (
        "a step of 12 tokens does not fit into memory; lower adaptation.window or "
        "adaptation.step_tokens, or free the device"
    )


def test_a_chunk_is_never_learned_from_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out in the second pass of a step whose first has changed the adapters."""

    class SecondPass(Memory):
        def fails(self, tokens: int) -> bool:
            return len(self.passes) == 4

    adaptation = dataclasses.replace(ADAPTATION, grad_steps=2)
    memory = SecondPass(EXACT, monkeypatch, tokens=0)
    told: list[str] = []
    steps: list[Step] = []
    with pytest.raises(EvaluationFailed, match="does not fit into memory") as error:
        budgeted(MIXED, LARGE, adaptation, told=told, steps=steps)
    assert "\n" not in str(error.value)
    # Two passes a learning step: the fourth is the second of a step of several documents.
    assert len(steps) == 1 and steps[0].learns
    assert memory.passes[2] == memory.passes[3] > 12
    assert len(memory.passes) == 4 and not told


def test_a_replayed_step_is_not_repeated_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out after a graph has run, which has learned already."""

    class Graphs:
        runs = 0
        shapes = ShapeChoice(ADAPTATION)

        def run(self, host: HostBatch, shape: Shape) -> Tensor:
            Graphs.runs += 1
            return torch.zeros(len(host.loss_places))

    def send(array: object, device: torch.device) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    one = Engine(EXACT, MIXED, ADAPTATION, tables=TABLES, budget=LARGE)
    monkeypatch.setattr(one, "_graphs", Graphs())
    monkeypatch.setattr(engine_module, "send", send)
    # Without steps that only end documents, whose losses are sent as well.
    longer = tuple(d for d in documents_of(MIXED) if d.num_predictions > 4)
    with pytest.raises(EvaluationFailed, match="does not fit into memory"):
        list(one.run(longer))
    assert Graphs.runs == 1


def test_rows_that_memory_does_not_hold_are_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def bank(layout: AdapterLayout, num_rows: int, device: torch.device) -> AdapterBank:
        asked.append(num_rows)
        if num_rows > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return AdapterBank(layout, num_rows, device)

    expected = budgeted(MIXED, LARGE)
    monkeypatch.setattr(engine_module, "AdapterBank", bank)
    told: list[str] = []
    steps: list[Step] = []
    found = budgeted(MIXED, LARGE, told=told, steps=steps)
    # One row more than there are residents.
    assert asked == [9, 5, 3]
    assert told == [f"out of memory: {n} documents at a time" for n in (4, 2)]
    assert max(m.row for step in steps for m in step.members) == 1
    check_same(found, expected)


def test_a_document_that_memory_does_not_hold_ends_the_evaluation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def bank(layout: AdapterLayout, num_rows: int, device: torch.device) -> AdapterBank:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(engine_module, "AdapterBank", bank)
    with pytest.raises(EvaluationFailed) as error:
        budgeted(MIXED, LARGE)
    assert str(error.value) == (
        "the adapters of one document do not fit into memory; lower adaptation.rank, or free the "
        "device"
    )


def test_another_error_of_a_step_is_not_taken_for_a_lack_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def hidden(*args: object, **more: object) -> Tensor:
        raise RuntimeError("of another kind")

    monkeypatch.setattr(EXACT, "hidden", hidden)
    with pytest.raises(RuntimeError, match="of another kind"):
        budgeted(MIXED, LARGE)
    monkeypatch.undo()
    assert all(p.requires_grad for p in EXACT.parameters())
