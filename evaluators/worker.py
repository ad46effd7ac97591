"""What an actor of an evaluation runs: the model and the engine of whichever job is its turn.

Weights and text are asked for when a job first needs them, and a job's engine goes before the next
one's takes memory; so one pool serves any number of checkpoints and settings.

A long document's state is stored now and then beside the scores. Whoever gets the document after
this actor is gone takes it up from there.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from evaluators.ledger import STATE_SUFFIX
from evaluators.packed import score_batch
from evaluators.result import Method
from evaluators.sliding import score_windows
from golf_ray.adaptation.engine import AdapterInit, Engine
from golf_ray.adaptation.packing import Step
from golf_ray.adaptation.scores import Document, DocumentScore
from golf_ray.adaptation.state import DocumentState
from golf_ray.config import Config
from golf_ray.data.documents import cut_tokens, document_bounds
from golf_ray.errors import (
    CheckpointError,
    ClusterError,
    EvaluationFailed,
    GolfRayError,
    StorageError,
    UsageError,
)
from golf_ray.model.arrays import Arrays, tensors_of
from golf_ray.model.checkpoint import build_model
from golf_ray.model.compute import choose_compute
from golf_ray.model.model import GolfModel
from trainers.storage import Storage

STATE_S = 15.0
"""Seconds of work on a document that is lost with its actor at most, once it has taken so long. A
state of 67 MB takes 0.3 s to store."""


class Source(Protocol):
    """A value that lies elsewhere."""

    def get(self) -> Any:
        """The value."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What an actor is told about a job."""

    config: Config
    method: Method
    device: str
    keep_token_nats: bool
    weights: int
    """Place of its weights among those of the pool."""
    stream: int
    """Place of its tokens and byte tables."""
    adapter_init: Arrays | None
    states: str | None
    """Folder or URI for the states of documents at work."""
    state_s: float


class EvaluationWorker:
    """Scores units of jobs.

    Args:
        orders: one a job.
        weights: banked state dicts, as arrays.
        streams: (tokens, byte tables).

    Raises:
        ClusterError: a GPU is asked for and torch finds none.
    """

    def __init__(
        self, orders: Sequence[Order], weights: Sequence[Source], streams: Sequence[Source]
    ) -> None:
        began_s = time.perf_counter()
        self._orders = orders
        self._weights = weights
        self._streams = streams
        if any(o.device == "cuda" for o in orders) and not torch.cuda.is_available():
            raise ClusterError(
                "an actor has no GPU that torch can use",
                "see 'golf-ray doctor' there, or compute on CPUs with --set cluster.device=cpu",
            )
        self._number = -1
        self._model: tuple[Any, GolfModel] | None = None
        self._engine: Engine | None = None
        self._saving = _Saving(None, 0.0)
        self._use(0)
        if orders[0].device == "cuda" and orders[0].method == "ttt":
            self._compile()
        self.prepared_s = time.perf_counter() - began_s

    def run_unit(self, payload: tuple[int, Any]) -> Any:
        """Score one unit: the job's number, and bounds, windows or documents as its method has it.

        Raises:
            EvaluationFailed: a document of several cannot be scored; the line names it.
        """
        number, unit = payload
        self._use(number)
        order = self._orders[number]
        tokens, tables = self._streams[order.stream].get()
        if order.method == "ttt":
            return self._score(unit)
        evaluation = order.config.evaluation
        cut = cut_tokens(tokens, evaluation.seq_len)
        if order.method == "packed":
            return score_batch(self._its_model(order), cut, unit, tables, evaluation.seq_len)
        return score_windows(self._its_model(order), cut, unit, tables)

    def check(self) -> None:
        """See that the device still computes: after some errors a GPU does nothing for a process.

        Raises:
            RuntimeError: it does not.
        """
        if self._orders[0].device == "cuda":
            torch.cuda.synchronize()
            torch.ones(1, device="cuda").item()

    def _use(self, number: int) -> None:
        """Turn to a job."""
        order = self._orders[number]
        # Ray sets the number by the actor's CPUs; on a CPU it is part of the last bits.
        torch.set_num_threads(order.config.evaluation.threads)
        if number == self._number:
            return
        self._engine = None
        self._number = number
        self._saving = _Saving(order.states, order.state_s)
        if order.device == "cuda":
            # The last job's adapters and captured steps make room for this one's.
            gc.collect()
            torch.cuda.empty_cache()
        self._its_model(order)

    def _its_model(self, order: Order) -> GolfModel:
        device = torch.device(order.device)
        compute = choose_compute(order.config, device)
        key = (order.weights, order.config.model, compute)
        if self._model is None or self._model[0] != key:
            self._model = None
            model = build_model(
                order.config.model,
                tensors_of(self._weights[order.weights].get()),
                device=device,
                compute=compute,
            )
            self._model = key, model
        return self._model[1]

    def _its_engine(self) -> Engine:
        """The engine of all of a job's units: its memory is taken once."""
        if self._engine is None:
            order = self._orders[self._number]
            adaptation = order.config.adaptation
            tokens, tables = self._streams[order.stream].get()
            adapters: AdapterInit | None = None
            if order.adapter_init is not None:
                adapters = {int(n): a for n, a in tensors_of(order.adapter_init).items()}
            self._engine = Engine(
                self._its_model(order),
                tokens,
                adaptation,
                tables=tables,
                num_documents=adaptation.group_documents if order.device == "cpu" else None,
                adapter_init=adapters,
                keep_token_nats=order.keep_token_nats,
                on_step=self._stepped,
            )
        return self._engine

    def _compile(self) -> None:
        """Have the kernels ready before the first unit, by a document's beginning."""
        order = self._orders[0]
        tokens, _ = self._streams[order.stream].get()
        size = order.config.adaptation.chunk_size
        for start, end in document_bounds(tokens):
            if end - start > 2 * size + 1:
                begin = int(start)
                some = Document(index=0, start=begin, end=begin + 2 * size + 1)
                list(self._its_engine().run([some]))
                return

    def _score(self, documents: Sequence[Document]) -> list[DocumentScore]:
        engine = self._its_engine()
        try:
            with self._saving.over(documents, engine) as states:
                return list(engine.run(documents, states))
        except GolfRayError:
            raise
        except Exception as error:
            self.check()
            culprit = self._culprit(documents)
            if culprit is None or len(documents) == 1:
                raise
            raise EvaluationFailed(
                f"document {culprit.index} ({type(error).__name__}: {error})",
                "the other documents of its group can be scored",
            ) from error

    def _culprit(self, documents: Sequence[Document]) -> Document | None:
        """A document that cannot be scored by itself either, found by halves."""
        while len(documents) > 1:
            half = documents[: len(documents) // 2]
            documents = half if self._fails(half) else documents[len(half) :]
        return documents[0] if self._fails(documents) else None

    def _fails(self, documents: Sequence[Document]) -> bool:
        try:
            list(self._its_engine().run(documents))
        except Exception:
            return True
        return False

    def _stepped(self, step: Step) -> None:
        assert self._engine is not None
        self._saving.stepped(self._engine)


class _Saving:
    """States of documents at work, now and then.

    Args:
        where: folder or URI; None stores nothing.
        every_s: seconds between two states.
    """

    def __init__(self, where: str | None, every_s: float) -> None:
        self._storage = None if where is None else Storage(where)
        self._every_s = every_s
        self._lengths: dict[int, int] = {}
        self._saved_s = 0.0

    @contextlib.contextmanager
    def over(self, documents: Sequence[Document], engine: Engine) -> Iterator[list[DocumentState]]:
        """Gives the states from which documents go on, and stores others while the block runs."""
        self._lengths = {document.index: document.num_predictions for document in documents}
        self._saved_s = time.monotonic()
        states = []
        alone = engine.device.type != "cpu" or len(documents) == 1
        # On a CPU what is computed together decides the last bits, so a group starts again whole.
        if self._storage is None or not alone:
            self._lengths = {}
        for document in documents if self._lengths else ():
            state = self._find(document)
            # One of other settings, or of another text, is of no use.
            with contextlib.suppress(UsageError):
                if state is not None:
                    engine.check_state(state, document)
                    states.append(state)
        try:
            yield states
        finally:
            self._lengths = {}

    def stepped(self, engine: Engine) -> None:
        """Store the state of the document with the most before it, if it is time."""
        due = time.monotonic() - self._saved_s >= self._every_s
        if self._storage is None or not self._lengths or not due:
            return
        left = engine.chunks_left()
        if left:
            index = max(left, key=lambda i: left[i])
            # What cannot be stored is done again if need be; the scores' own storage will say so.
            with contextlib.suppress(StorageError):
                self._storage.write_bytes(state_name(index), engine.state(index).to_bytes())
        self._saved_s = time.monotonic()

    def _find(self, document: Document) -> DocumentState | None:
        assert self._storage is not None
        name = state_name(document.index)
        try:
            content = self._storage.read_bytes(name)
            return None if content is None else DocumentState.of_bytes(content, name)
        except (CheckpointError, StorageError):
            # A damaged one costs time and nothing else.
            return None


def state_name(index: int) -> str:
    """File of a document's state."""
    return f"{index}{STATE_SUFFIX}"
