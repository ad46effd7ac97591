"""A document half-way: taken between scores, stored, read, and gone on with by another engine."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from adaptation_cases import ADAPTATION, TABLES, documents_of, small_model, stream

from golf_ray.adaptation.engine import Engine
from golf_ray.adaptation.packing import Budget, Step
from golf_ray.adaptation.scores import Document, DocumentScore
from golf_ray.adaptation.state import MAGIC, DocumentState
from golf_ray.config import AdaptationConfig
from golf_ray.errors import CheckpointError, GolfRayError, UsageError

MODEL = small_model()
# See test_adaptation_engine: in float64 no step is made of a gradient's rounding.
EXACT = small_model(dtype=torch.float64)
TOKENS = stream([9, 1, 41, 5, 18, 13, 3, 0])
DOCUMENTS = documents_of(TOKENS)
LONG = 2
ONE_AT_A_TIME = Budget(residents=8, step_tokens=1)
MIXED = Budget(residents=8, step_tokens=60)
VARIANTS = {
    "adam": {},
    "adam with beta1": {"beta1": 0.5},
    "two steps": {"grad_steps": 2, "beta1": 0.9},
    "sgd": {"optimizer": "sgd"},
    "sgd with momentum": {"optimizer": "sgd", "beta1": 0.9},
    "no adapters": {"sites": ()},
}


def adapted(variant: str) -> AdaptationConfig:
    return dataclasses.replace(ADAPTATION, **VARIANTS[variant])  # type: ignore[arg-type]


def engine(
    adaptation: AdaptationConfig = ADAPTATION,
    budget: Budget = MIXED,
    *,
    exact: bool = False,
    on_step: Callable[[Step], None] | None = None,
) -> Engine:
    return Engine(
        EXACT if exact else MODEL, TOKENS, adaptation,
        tables=TABLES, budget=budget, keep_token_nats=True, on_step=on_step,
    )  # fmt: skip


def scores(
    one: Engine, documents: tuple[Document, ...] = DOCUMENTS, states: tuple[DocumentState, ...] = ()
) -> dict[int, DocumentScore]:
    return {score.index: score for score in one.run(documents, states)}


def through_a_file(state: DocumentState, folder: Path) -> DocumentState:
    path = folder / "document.state"
    state.save(path)
    return DocumentState.load(path)


def taken_between_scores(one: Engine, index: int, chunks: int = 1) -> DocumentState:
    """The state of a document at the first score at which it has so many chunks behind it."""
    for _ in one.run(DOCUMENTS):
        if index in one.at_work():
            state = one.state(index)
            if state.chunks >= chunks:
                return state
    raise AssertionError("never at work at a score")


def taken_alone(
    adaptation: AdaptationConfig, document: Document, begun: tuple[DocumentState, ...] = ()
) -> list[DocumentState]:
    """The states after each step of a document that is alone, but for the last step's."""
    states: list[DocumentState] = []

    def take(step: Step) -> None:
        if step.learns:
            states.append(one.state(document.index))

    one = engine(adaptation, on_step=take)
    scores(one, (document,), begun)
    return states


def check_goes_on(
    whole: DocumentScore, gone_on: DocumentScore, state: DocumentState, *, bits: bool
) -> None:
    assert whole.token_nats is not None and gone_on.token_nats is not None
    scored = len(state.losses)
    assert np.array_equal(gone_on.token_nats[:scored], state.losses.numpy())
    if bits:
        assert np.array_equal(gone_on.token_nats, whole.token_nats)
        assert gone_on.nats == whole.nats
    else:
        np.testing.assert_allclose(gone_on.token_nats, whole.token_nats, rtol=1e-6, atol=1e-6)
    assert (gone_on.tokens, gone_on.num_bytes) == (whole.tokens, whole.num_bytes)
    # The trace goes on: no chunk twice, no number twice, each later than the one before.
    assert [e.chunk for e in gone_on.trace] == [e.chunk for e in whole.trace]
    times = [t for e in gone_on.trace for t in (e.scored_at, e.updated_at) if t is not None]
    assert len(times) == 2 * len(gone_on.trace) - 1
    assert all(a < b for a, b in itertools.pairwise(times))
    kept = tuple((e.chunk, e.scored_at, e.updated_at) for e in gone_on.trace[: state.chunks])
    assert kept == state.trace


# Going on --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_document_alone_goes_on_bit_for_bit(variant: str, tmp_path: Path) -> None:
    adaptation, document = adapted(variant), DOCUMENTS[LONG]
    whole = scores(engine(adaptation), (document,))[LONG]
    states = taken_alone(adaptation, document)
    assert [state.chunks for state in states] == list(range(1, 11))
    for state in states[::4]:
        read = through_a_file(state, tmp_path)
        gone_on = scores(engine(adaptation), (document,), (read,))[LONG]
        check_goes_on(whole, gone_on, read, bits=True)


@pytest.mark.parametrize("variant", ["adam", "sgd with momentum"])
def test_a_state_taken_between_scores_goes_on_bit_for_bit(variant: str, tmp_path: Path) -> None:
    # Every step has a single document, so what it computes with is the same alone.
    adaptation = adapted(variant)
    whole = scores(engine(adaptation, ONE_AT_A_TIME), (DOCUMENTS[LONG],))[LONG]
    state = taken_between_scores(engine(adaptation, ONE_AT_A_TIME), LONG, chunks=6)
    assert 6 <= state.chunks < 11
    read = through_a_file(state, tmp_path)
    gone_on = scores(engine(adaptation, ONE_AT_A_TIME), (DOCUMENTS[LONG],), (read,))[LONG]
    check_goes_on(whole, gone_on, read, bits=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_documents_go_on_among_others(variant: str, tmp_path: Path) -> None:
    adaptation = adapted(variant)
    whole = scores(engine(adaptation, exact=True))
    first = engine(adaptation, MIXED, exact=True)
    finished, states = {}, []
    for score in first.run(DOCUMENTS):
        finished[score.index] = score
        if len(first.at_work()) > 1:
            states = [through_a_file(first.state(i), tmp_path) for i in first.at_work()]
            if all(state.chunks for state in states):
                break
    assert len(states) > 1 and not {s.index for s in states} & finished.keys()
    rest = tuple(d for d in DOCUMENTS if d.index not in finished)
    # Two rows, so that some wait, among them states; other rows than those they had.
    second = engine(adaptation, Budget(residents=2, step_tokens=30), exact=True)
    gone_on = scores(second, rest[::-1], tuple(states))
    assert gone_on.keys() == {d.index for d in rest}
    for state in states:
        check_goes_on(whole[state.index], gone_on[state.index], state, bits=False)
    for index, score in (finished | gone_on).items():
        assert score.nats == pytest.approx(whole[index].nats, rel=1e-6, abs=1e-6)


def test_a_state_can_be_taken_again_of_what_went_on(tmp_path: Path) -> None:
    document = DOCUMENTS[LONG]
    whole = scores(engine(), (document,))[LONG]
    state = taken_alone(ADAPTATION, document)[1]
    for _ in range(2):
        state = through_a_file(taken_alone(ADAPTATION, document, (state,))[2], tmp_path)
    assert state.chunks == 8
    check_goes_on(whole, scores(engine(), (document,), (state,))[LONG], state, bits=True)


def test_a_state_holds_the_optimizer_and_is_no_view_of_the_engine() -> None:
    adaptation = adapted("two steps")
    one = engine(adaptation)
    state = taken_between_scores(one, LONG, chunks=2)
    assert state.steps == 2 * state.chunks and len(state.losses) == 4 * state.chunks
    assert state.first_P is not None and state.second_P is not None
    assert state.first_P.abs().sum() > 0 and state.second_P.abs().sum() > 0
    before = state.parameters_P.clone()
    one.bank.p_NP.fill_(7.0)
    assert torch.equal(state.parameters_P, before)
    plain = taken_between_scores(engine(adapted("sgd")), LONG)
    assert plain.first_P is None and plain.second_P is None


@pytest.mark.parametrize("part", ["parameters_P", "second_P", "first_P", "steps"])
def test_every_part_of_a_state_matters(part: str) -> None:
    """The comparison above would see a part that is not restored."""
    adaptation, document = adapted("adam with beta1"), DOCUMENTS[LONG]
    whole = scores(engine(adaptation), (document,))[LONG]
    state = taken_alone(adaptation, document)[4]
    value = 0 if part == "steps" else torch.zeros_like(state.parameters_P)
    spoilt = dataclasses.replace(state, **{part: value})  # type: ignore[arg-type]
    gone_on = scores(engine(adaptation), (document,), (spoilt,))[LONG]
    assert gone_on.nats != whole.nats


def test_a_state_before_the_first_chunk_is_a_fresh_start(tmp_path: Path) -> None:
    one = engine(budget=ONE_AT_A_TIME)
    states = {}
    for _ in one.run(DOCUMENTS):
        states |= {i: s for i in one.at_work() if not (s := one.state(i)).chunks}
    assert states
    for index, state in states.items():
        read = through_a_file(state, tmp_path)
        assert (read.steps, len(read.losses), read.trace) == (0, 0, ())
        document = DOCUMENTS[index]
        whole = scores(engine(), (document,))[index]
        check_goes_on(whole, scores(engine(), (document,), (read,))[index], read, bits=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"group_documents": 1},
        {"resident_documents": 2},
        {"step_tokens": 9},
        {"sample_documents": 5},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_without_effect_do_not_part_a_state_from_its_document(
    changes: dict[str, int],
) -> None:
    document = DOCUMENTS[LONG]
    state = taken_alone(ADAPTATION, document)[4]
    other = dataclasses.replace(ADAPTATION, **changes)  # type: ignore[arg-type]
    whole = scores(engine(), (document,))[LONG]
    check_goes_on(whole, scores(engine(other), (document,), (state,))[LONG], state, bits=True)


# What is refused -------------------------------------------------------------------------------


def one_line(error: GolfRayError) -> str:
    text = str(error)
    assert "\n" not in text and ";" in text and len(text) < 400
    return text


@pytest.mark.parametrize("index", [LONG, 1, 7, 99])
def test_there_is_no_state_of_what_is_not_at_work(index: int) -> None:
    one = engine()
    assert one.at_work() == ()
    with pytest.raises(UsageError) as refused:
        one.state(index)
    assert f"document {index} is not at work" in one_line(refused.value)
    scores(one)
    assert one.at_work() == ()
    with pytest.raises(UsageError, match="not at work"):
        one.state(index)


def test_there_is_no_state_after_the_last_chunk() -> None:
    refused = []

    def take(step: Step) -> None:
        for member in step.members:
            if not step.learns:
                with pytest.raises(UsageError, match="not at work"):
                    one.state(DOCUMENTS[member.document].index)
                refused.append(member.document)

    one = engine(on_step=take)
    scores(one)
    assert sorted(refused) == list(range(7))


def refused(states: tuple[DocumentState, ...], adaptation: AdaptationConfig = ADAPTATION) -> str:
    with pytest.raises(UsageError) as error:
        scores(engine(adaptation), DOCUMENTS, states)
    return one_line(error.value)


@pytest.mark.parametrize(
    "changes",
    [{"rank": 3}, {"lr": 2e-2}, {"seed": 1}, {"chunk_size": 2}, {"window": 16}, {"beta1": 0.5},
     {"optimizer": "sgd"}, {"grad_steps": 2}, {"sites": ("q",)}],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_a_state_of_other_settings_is_refused(changes: dict[str, object]) -> None:
    state = taken_between_scores(engine(), LONG)
    other = dataclasses.replace(ADAPTATION, **changes)  # type: ignore[arg-type]
    assert "other settings" in refused((state,), other)


def test_a_state_of_no_document_is_refused() -> None:
    state = taken_between_scores(engine(), LONG)
    for changes in ({"index": 99}, {"index": 4}, {"num_predictions": 40}):
        stray = dataclasses.replace(state, **changes)
        assert "belongs to none of the documents" in refused((stray,))


def test_a_state_of_a_finished_document_is_refused_and_not_lost() -> None:
    # Only a foreign program makes one; without a check the document would have no score at all.
    state = taken_alone(ADAPTATION, DOCUMENTS[LONG])[-1]
    last = (10, state.trace[-1][-1] + 1, state.trace[-1][-1] + 2)
    done = dataclasses.replace(
        state, chunks=11, losses=torch.zeros(41), trace=(*state.trace, last), steps=11
    )
    assert "not that of a document at work" in refused((done,))


@pytest.mark.parametrize(
    "part", ["chunks", "losses", "trace", "parameters_P", "first_P", "second_P"]
)
def test_a_state_whose_parts_do_not_fit_together_is_refused(part: str) -> None:
    adaptation = adapted("adam with beta1")
    state = taken_between_scores(engine(adaptation), LONG, chunks=2)
    spoilt: dict[str, object] = {
        "chunks": 1,
        "losses": state.losses[1:],
        "trace": state.trace[1:],
        "parameters_P": state.parameters_P[1:],
        "first_P": None,
        "second_P": torch.zeros(1),
    }
    changed = dataclasses.replace(state, **{part: spoilt[part]})  # type: ignore[arg-type]
    assert "not that of a document at work" in refused((changed,), adaptation)
    refused_nothing = scores(engine(adaptation), DOCUMENTS, (state,))
    assert len(refused_nothing) == len(DOCUMENTS)


# Files -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("state") / "document.state"
    taken_between_scores(engine(adapted("adam with beta1")), LONG, chunks=2).save(path)
    return path.read_bytes()


def unreadable(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        DocumentState.load(path)
    text = one_line(error.value)
    assert str(path) in text
    return text


def sealed(content: bytes) -> bytes:
    """A file whose digest is right, whatever its content."""
    return MAGIC + hashlib.sha256(content).digest() + content


def sealed_value(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return sealed(buffer.getvalue())


def held(stored: bytes) -> dict[str, object]:
    content = stored[len(MAGIC) + 32 :]
    found: dict[str, object] = torch.load(io.BytesIO(content), weights_only=True)
    return found


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    state = taken_between_scores(engine(adapted("adam with beta1")), LONG, chunks=2)
    read = through_a_file(state, tmp_path)
    for field in dataclasses.fields(DocumentState):
        mine, stored = getattr(state, field.name), getattr(read, field.name)
        if isinstance(mine, torch.Tensor):
            assert torch.equal(mine, stored) and mine.dtype == stored.dtype, field.name
        else:
            assert mine == stored and type(mine) is type(stored), field.name
    assert [path.name for path in tmp_path.iterdir()] == ["document.state"]


def test_a_flipped_byte_is_seen_wherever_it_is(stored: bytes, tmp_path: Path) -> None:
    path = tmp_path / "document.state"
    places = np.random.default_rng(0).integers(0, len(stored), 150).tolist()
    for place in {*places, 0, len(MAGIC), len(MAGIC) + 32, len(stored) - 1}:
        damaged = bytearray(stored)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(bytes(damaged))
        unreadable(path)
    path.write_bytes(stored)
    assert DocumentState.load(path).index == LONG


def test_a_truncated_file_is_seen(stored: bytes, tmp_path: Path) -> None:
    path = tmp_path / "document.state"
    for length in {0, 1, len(MAGIC), len(MAGIC) + 31, len(stored) // 2, len(stored) - 1}:
        path.write_bytes(stored[:length])
        unreadable(path)
    path.write_bytes(stored + b"\0")
    assert "damaged" in unreadable(path)


def test_other_files_are_no_states(tmp_path: Path) -> None:
    path = tmp_path / "document.state"
    path.write_text("some\ntext\n")
    assert "begins otherwise" in unreadable(path)
    torch.save({"version": 1}, path)
    unreadable(path)
    path.write_bytes(sealed(b"some\ntext\n"))
    unreadable(path)
    assert "No such file" in unreadable(tmp_path / "missing")
    assert "directory" in unreadable(tmp_path)


class Intruder:
    """Pickles into a call."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.trace,)


def test_no_code_of_a_file_runs(tmp_path: Path) -> None:
    path, trace = tmp_path / "document.state", tmp_path / "it ran"
    plain = pickle.dumps(Intruder(trace), protocol=2)
    buffer = io.BytesIO()
    torch.save({"version": 1, "index": Intruder(trace)}, buffer)
    for content in (plain, buffer.getvalue(), sealed(plain), sealed(buffer.getvalue())):
        path.write_bytes(content)
        unreadable(path)
        assert not trace.exists()
    # The intruder does what it says where it is let in.
    pickle.loads(plain)
    assert trace.exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [("version", 2), ("index", "2"), ("index", -1), ("chunks", 2.0), ("steps", None),
     ("parameters_P", [1.0]), ("parameters_P", torch.zeros(3, dtype=torch.float64)),
     ("second_P", torch.zeros(2, 2)), ("losses", None), ("trace", [[0, 1]]), ("trace", 5),
     ("trace", [[0, 1, "2"]]), ("settings", 3), ("surplus", 1)],
)  # fmt: skip
def test_a_field_of_another_kind_is_refused(
    stored: bytes, tmp_path: Path, name: str, value: object
) -> None:
    path = tmp_path / "document.state"
    path.write_bytes(sealed_value(held(stored)))
    assert DocumentState.load(path).index == LONG
    path.write_bytes(sealed_value(held(stored) | {name: value}))
    unreadable(path)


def test_a_missing_field_and_another_value_are_refused(stored: bytes, tmp_path: Path) -> None:
    path = tmp_path / "document.state"
    for name in held(stored):
        rest = {k: v for k, v in held(stored).items() if k != name}
        path.write_bytes(sealed_value(rest))
        unreadable(path)
    path.write_bytes(sealed_value(torch.zeros(3)))
    unreadable(path)
