"""What an actor does with its jobs, in this process: turns between them, states, culprits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import TOKENIZER, VAL_SHARDS, final_state, tiny_model

from evaluators.ttt import choose_documents
from evaluators.watch import RatioSpread
from evaluators.worker import EvaluationWorker, Order
from golf_ray.adaptation.engine import Engine
from golf_ray.adaptation.packing import Step
from golf_ray.adaptation.scores import Document
from golf_ray.adaptation.state import DocumentState
from golf_ray.config import Config
from golf_ray.data.shards import load_tokens
from golf_ray.data.tokenizer import byte_tables
from golf_ray.errors import EvaluationFailed
from golf_ray.metric import LN2
from golf_ray.model.arrays import arrays_of
from golf_ray.presets import TINY

CONFIG = TINY.with_overrides({"adaptation.group_documents": 2, "adaptation.chunk_size": 16})
TOKENS = load_tokens(VAL_SHARDS, 512)
TABLES = byte_tables(TOKENIZER, 512)
DOCUMENTS = choose_documents(TOKENS, CONFIG.adaptation)
LONG = max(DOCUMENTS, key=lambda document: document.num_predictions)


@dataclasses.dataclass
class Held:
    """A source whose value lies here."""

    value: Any

    def get(self) -> Any:
        return self.value


def order(config: Config = CONFIG, states: Path | None = None, **more: Any) -> Order:
    settings = {"method": "ttt", "weights": 0, "stream": 0, "state_s": 1e9, **more}
    return Order(
        config=config, device="cpu", keep_token_nats=True, adapter_init=None,
        states=None if states is None else str(states), **settings,
    )  # fmt: skip


def worker(*orders: Order, tokens: Any = TOKENS) -> EvaluationWorker:
    weights = [Held(arrays_of(final_state()))]
    return EvaluationWorker(orders, weights, [Held((tokens, TABLES))])


def half_way(config: Config = CONFIG) -> DocumentState:
    """The state of the long document after some chunks."""
    found: list[DocumentState] = []

    def stepped(step: Step) -> None:
        if len(found) < 3:
            found.append(engine.state(LONG.index))

    engine = Engine(tiny_model(), TOKENS, config.adaptation, tables=TABLES, on_step=stepped)
    list(engine.run([LONG]))
    return found[-1]


def nats_of(states: Path | None, documents: Sequence[Document] = (LONG,)) -> float:
    scores = worker(order(states=states)).run_unit((0, documents))
    return next(score.nats for score in scores if score.index == LONG.index)


def test_a_document_goes_on_from_its_state_and_from_no_other(tmp_path: Path) -> None:
    plain, state = nats_of(None), half_way()
    assert state.chunks == 3
    file = tmp_path / f"{LONG.index}.state"
    state.save(file)
    assert nats_of(tmp_path) == plain, "to the bit"
    # What the state says of chunks before it is what counts: it was taken up, not begun again.
    changed = dataclasses.replace(state, losses=state.losses + 1)
    changed.save(file)
    assert nats_of(tmp_path) == pytest.approx(plain + len(state.losses), abs=1e-3)
    # On a CPU what is computed together decides the last bits, so a group begins again.
    group = [next(d for d in DOCUMENTS if d.index != LONG.index), LONG]
    assert nats_of(tmp_path, group) == nats_of(None, group)
    file.write_bytes(file.read_bytes()[:-5])
    assert nats_of(tmp_path) == plain, "a damaged one costs time alone"
    half_way(CONFIG.with_overrides({"adaptation.lr": 5e-3})).save(file)
    assert nats_of(tmp_path) == plain, "one of other settings is of no use"


def test_states_are_stored_as_often_as_asked(tmp_path: Path) -> None:
    worker(order(states=tmp_path / "never")).run_unit((0, [LONG]))
    assert not (tmp_path / "never").exists()
    worker(order(states=tmp_path / "often", state_s=0.0)).run_unit((0, [LONG]))
    state = DocumentState.load(tmp_path / "often" / f"{LONG.index}.state")
    chunks = math.ceil(LONG.num_predictions / CONFIG.adaptation.chunk_size)
    assert state.chunks == chunks - 1, "after the last but one there is nothing to go on with"


def test_a_worker_turns_from_job_to_job_and_back() -> None:
    other = CONFIG.with_overrides({"adaptation.chunk_size": 7})
    both = worker(order(), order(other), order(method="packed"))
    some = DOCUMENTS[:5]
    first, second = both.run_unit((0, some)), both.run_unit((1, some))
    batch = (0, 65)
    packed = both.run_unit((2, batch))
    assert [s.nats for s in both.run_unit((0, some))] == [s.nats for s in first]
    assert [s.nats for s in worker(order(other)).run_unit((0, some))] == [s.nats for s in second]
    assert sum(s.nats for s in first) != sum(s.nats for s in second)
    assert packed == worker(order(method="packed")).run_unit((0, batch)) and packed.tokens == 65


@pytest.mark.parametrize("spoilt", [0, 3, len(DOCUMENTS) - 1])
def test_a_document_that_cannot_be_scored_is_found_among_many(spoilt: int) -> None:
    tokens = TOKENS.copy()
    tokens[DOCUMENTS[spoilt].start + 1] = 600
    with pytest.raises(EvaluationFailed, match=f"document {spoilt} \\(IndexError") as caught:
        worker(order(), tokens=tokens).run_unit((0, DOCUMENTS))
    assert isinstance(caught.value.__cause__, IndexError)
    rest = [d for d in DOCUMENTS if d.index != spoilt]
    assert len(worker(order(), tokens=tokens).run_unit((0, rest))) == len(rest)


# Squares of nats under 1e-154 are no normal numbers of float64 and have fewer digits.
NATS = st.just(0.0) | st.floats(1e-100, 1e4)


@given(
    st.lists(st.tuples(NATS, st.integers(1, 10_000)), min_size=2, max_size=30),
    st.integers(0, 100),
)
def test_the_running_standard_error_is_that_of_a_ratio(
    pairs: list[tuple[float, int]], more: int
) -> None:
    spread = RatioSpread()
    assert spread.standard_error_bpb(10) is None
    for nats, num_bytes in pairs:
        spread.add(nats, num_bytes)
    y, x = (np.array(column, np.float64) for column in zip(*pairs, strict=True))
    n, count = len(pairs), len(pairs) + more
    residuals = y - y.sum() / x.sum() * x
    variance = (1 - n / count) * n / (n - 1) * (residuals**2).sum()
    expected = math.sqrt(variance) / x.sum() / LN2
    # Differences of large sums: float64 keeps half of its digits of a root.
    scale = math.sqrt((y**2).sum() * n / (n - 1)) / x.sum() / LN2
    assert spread.standard_error_bpb(count) == pytest.approx(expected, rel=1e-6, abs=1e-6 * scale)
