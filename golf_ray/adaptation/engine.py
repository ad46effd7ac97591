"""The test-time training engine: score a chunk, learn from it, go on; each document on its own.

For chunk c ending at e the window is the at most `window` predictions ending at e. One forward with
the document's current adapters computes it; the chunk's losses are the score, final. Then, unless
it is the document's last chunk, the adapters take `grad_steps` steps on the chunk's mean loss, its
gradient running through the whole window. The base weights never change.

Documents of any length and at any place in them advance together (`golf_ray.adaptation.packing`
says which); a finished one makes room for the next at once. The engine reads no file and knows no
total (`evaluators.ttt`).

Shapes: N documents of a step, T rows of its flat buffer, S predictions that it scores, D model dim.

Invariant: a document's score depends on nothing but its tokens, its index, the model and the
settings; predictions are scored once, left to right, before anything learns from them.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from golf_ray import fingerprint
from golf_ray.adaptation.adapters import AdapterBank, AdapterLayout, adapter_slots
from golf_ray.adaptation.batches import Batch, HostBatch, Shape, send
from golf_ray.adaptation.budget import choose_budget
from golf_ray.adaptation.fused import FusedAdapters, can_fuse
from golf_ray.adaptation.graphs import StepGraphs
from golf_ray.adaptation.optimizer import AdapterOptimizer
from golf_ray.adaptation.packing import Budget, Packer, Step
from golf_ray.adaptation.plain import PlainAdapters
from golf_ray.adaptation.plan import plan_groups
from golf_ray.adaptation.scores import ChunkEvent, Document, DocumentScore
from golf_ray.adaptation.state import DocumentState
from golf_ray.config import AdaptationConfig
from golf_ray.data.tokenizer import ByteTables
from golf_ray.errors import EvaluationFailed, UsageError
from golf_ray.model.model import GolfModel

AdapterInit = Mapping[int, Tensor]
"""A [rank, n] by input width n, in place of random ones."""


Tell = Callable[[str], None]
WITHOUT_EFFECT = (
    "document_fraction",
    "group_documents",
    "resident_documents",
    "sample_documents",
    "step_tokens",
)
"""Settings that no document's score depends on."""
MOST_UNREAD = 4
"""Steps whose finished documents may wait for the device before the host does."""


class _Resident:
    """A document in the engine: where its losses go, what is scored of it, its trace."""

    def __init__(self, document: Document, row: int, first_loss: int) -> None:
        self.document = document
        self.row = row
        self.first_loss = first_loss
        """Place of its first loss in the run's buffer."""
        self.trace: list[ChunkEvent] = []


class Engine:
    """Adapters, optimizer and progress of the documents that are at work.

    Args:
        model: the base model; its weights are read only.
        tokens: the whole stream of ids.
        adaptation: the settings.
        tables: bytes of each token.
        budget: documents and tokens at a time; None chooses from free memory.
        num_documents: most that a run will have, where it is known: no memory is taken for more.
        adapter_init: A to use in place of the random ones.
        keep_token_nats: keep every loss in the scores.
        tell: told of what is done about a lack of memory.
        on_step: told of every step when it is on its way.
        graphs: whether steps may be captured as CUDA graphs, where there are any.
        thrifty: whether a step may be padded further than it needs, to spare a capture.
    """

    def __init__(
        self,
        model: GolfModel,
        tokens: NDArray[np.integer],
        adaptation: AdaptationConfig,
        *,
        tables: ByteTables,
        budget: Budget | None = None,
        num_documents: int | None = None,
        adapter_init: AdapterInit | None = None,
        keep_token_nats: bool = False,
        tell: Tell | None = None,
        on_step: Callable[[Step], None] | None = None,
        graphs: bool = True,
        thrifty: bool = True,
    ) -> None:
        self.model = model
        self.adaptation = adaptation
        self.device = next(model.parameters()).device
        self._tokens = tokens
        self._tables = tables
        self._init = adapter_init
        self._keep_token_nats = keep_token_nats
        self._tell = tell or (lambda what: None)
        self._on_step = on_step or (lambda step: None)
        self._clock = itertools.count()
        layout = AdapterLayout(adapter_slots(model.config, adaptation.sites), adaptation.rank)
        if budget is None:
            most = len(tokens) if num_documents is None else num_documents
            budget = choose_budget(
                model.config, adaptation, model.compute, layout, self.device, num_documents=most
            )
        self.budget = budget
        self.bank, self.optimizer, self.adapters = self._allocate(layout)
        if self.device.type == "cuda":
            self._tell(
                f"{self.budget.residents} documents at a time, steps of "
                f"{self.budget.step_tokens:,} tokens"
            )
        self._graphs = self._step_graphs(thrifty) if graphs else None
        self._residents: dict[int, _Resident] = {}
        """By place in the run's documents."""
        self._losses = torch.zeros(0)

    def _allocate(
        self, layout: AdapterLayout
    ) -> tuple[AdapterBank, AdapterOptimizer, PlainAdapters | FusedAdapters]:
        """Rows for the residents; fewer where memory does not hold them."""
        while True:
            try:
                # One more than there are residents: what is padded takes that row.
                num_rows = self.budget.residents + 1
                bank = AdapterBank(layout, num_rows, self.device)
                optimizer = AdapterOptimizer(
                    self.adaptation, num_rows, layout.num_parameters, self.device
                )
                if self._init is None and can_fuse(self.model.config, self.model.compute):
                    return bank, optimizer, FusedAdapters(bank, optimizer, self.model.compute.dtype)
                return bank, optimizer, PlainAdapters(bank, optimizer, self._init)
            except torch.OutOfMemoryError:
                bank = optimizer = None  # type: ignore[assignment]
                torch.cuda.empty_cache()
                fewer = self.budget.residents // 2
                if not fewer:
                    raise EvaluationFailed(
                        "the adapters of one document do not fit into memory",
                        "lower adaptation.rank, or free the device",
                    ) from None
                self._tell(f"out of memory: {fewer} documents at a time")
                self.budget = dataclasses.replace(self.budget, residents=fewer)

    def _step_graphs(self, thrifty: bool) -> StepGraphs | None:
        adapters, one_step = self.adapters, self.adaptation.grad_steps == 1
        captures = self.device.type == "cuda" and self.model.compute.attention == "fa3"
        if not (captures and one_step and isinstance(adapters, FusedAdapters)):
            return None
        if not adapters.layout.slots or self.model.parts:
            return None

        return StepGraphs(adapters, self._padded_step, self.device, thrifty=thrifty)

    def _padded_step(self, batch: Batch, factors_N2: Tensor) -> Tensor:
        """Losses of a batch, and the adapters' step on them."""
        assert isinstance(self.adapters, FusedAdapters)
        losses_S = self.losses(batch)
        self.adapters.apply(batch, mean_of_chunks(losses_S, batch), factors_N2)
        return losses_S.detach()

    # A run -------------------------------------------------------------------------------------

    def run(
        self, documents: Sequence[Document], states: Sequence[DocumentState] = ()
    ) -> Iterator[DocumentScore]:
        """All documents to their end.

        Args:
            documents: in any order, which has no effect on a score.
            states: of those among them that go on from where they were.

        Yields:
            Each document when it is finished.

        Raises:
            EvaluationFailed: a single window does not fit into memory.
            UsageError: a state is of other settings, of none of the documents, or of no use.
        """
        lengths = [document.num_predictions for document in documents]
        offsets = [0, *itertools.accumulate(lengths)]
        self._losses = torch.zeros(offsets[-1], device=self.device)
        self._residents = {}
        self._clock = itertools.count()
        kept = self._states_of(documents, states)
        packer = Packer(
            lengths, self.adaptation, self.budget, {p: s.chunks for p, s in kept.items()}
        )
        unread: collections.deque[_Unread] = collections.deque()
        for place, document in enumerate(documents):
            if not lengths[place]:
                yield self._score_of(_Resident(document, -1, 0), np.zeros(0, np.float32))
        while True:
            admitted = packer.admit()
            for place, row in admitted:
                self._residents[place] = _Resident(documents[place], row, offsets[place])
            self._start(admitted, documents, kept)
            step = packer.take()
            if step is None:
                break
            if not self._advance(step):
                packer.budget = self.budget
                continue
            self._on_step(step)
            ended = [self._residents.pop(place) for place, _ in packer.commit(step)]
            if ended:
                unread.append(_Unread(self._losses, ended))
            while unread and (len(unread) > MOST_UNREAD or unread[0].ready()):
                yield from self._scores_of(unread.popleft())
        for waiting in unread:
            yield from self._scores_of(waiting)

    def state(self, index: int) -> DocumentState:
        """What it takes to go on with a document elsewhere: between scores, of one at work.

        Raises:
            UsageError: it waits, is finished or is unknown.
        """
        found = [r for r in self._residents.values() if r.document.index == index]
        scored = len(found[0].trace) * self.adaptation.chunk_size if found else 0
        if not found or scored >= found[0].document.num_predictions:
            raise UsageError(
                f"document {index} is not at work", "take the state of one that `at_work` names"
            )
        resident = found[0]
        row, chunks = resident.row, len(resident.trace)
        first, second = self.optimizer.first_NP, self.optimizer.second_NP
        return DocumentState(
            index=index,
            num_predictions=resident.document.num_predictions,
            chunks=chunks,
            steps=self.optimizer.steps_N[row],
            parameters_P=self.bank.p_NP[row].cpu().clone(),
            second_P=None if second is None else second[row].cpu().clone(),
            first_P=None if first is None else first[row].cpu().clone(),
            losses=self._losses[resident.first_loss :][:scored].cpu().clone(),
            trace=tuple((e.chunk, e.scored_at, e.updated_at or 0) for e in resident.trace),
            settings=self._settings(),
        )

    def at_work(self) -> tuple[int, ...]:
        """Indices of the documents that hold a row."""
        return tuple(sorted(r.document.index for r in self._residents.values()))

    def chunks_left(self) -> dict[int, int]:
        """Chunks that are before the documents at work, by index: of those that have any."""
        size = self.adaptation.chunk_size
        left = {
            r.document.index: -(-r.document.num_predictions // size) - len(r.trace)
            for r in self._residents.values()
        }
        return {index: chunks for index, chunks in left.items() if chunks > 0}

    def _settings(self) -> str:
        adaptation = dataclasses.asdict(self.adaptation)
        kept = {name: value for name, value in adaptation.items() if name not in WITHOUT_EFFECT}
        return fingerprint.of_value([kept, dataclasses.asdict(self.model.config)])

    def _states_of(
        self, documents: Sequence[Document], states: Sequence[DocumentState]
    ) -> dict[int, DocumentState]:
        places = {document.index: place for place, document in enumerate(documents)}
        for state in states:
            place = places.get(state.index)
            self.check_state(state, None if place is None else documents[place])
        return {places[state.index]: state for state in states}

    def check_state(self, state: DocumentState, document: Document | None) -> None:
        """See that a document can go on from a state.

        Raises:
            UsageError: it is another document's, of other settings, or of no use.
        """
        if document is None or document.num_predictions != state.num_predictions:
            raise UsageError(
                f"a state of document {state.index} of {state.num_predictions} predictions "
                "belongs to none of the documents",
                "give states of the same data set",
            )
        if state.settings != self._settings():
            raise UsageError(
                f"the state of document {state.index} was made under other settings",
                "evaluate under those, or delete it",
            )
        if not self._fits(state):
            raise UsageError(
                f"the state of document {state.index} is not that of a document at work",
                "delete it; the document starts again",
            )

    def _fits(self, state: DocumentState) -> bool:
        """Whether a state is what `state` gives: of whole chunks, with another one to come."""
        scored, width = state.chunks * self.adaptation.chunk_size, self.bank.p_NP.shape[1]
        moments = (
            (self.optimizer.first_NP, state.first_P),
            (self.optimizer.second_NP, state.second_P),
        )
        return (
            0 <= scored < state.num_predictions
            and len(state.losses) == scored
            and [chunk for chunk, _, _ in state.trace] == list(range(state.chunks))
            and len(state.parameters_P) == width
            and all(
                len(stored) == width if stored is not None else mine is None
                for mine, stored in moments
            )
        )

    def _start(
        self,
        admitted: Sequence[tuple[int, int]],
        documents: Sequence[Document],
        kept: Mapping[int, DocumentState],
    ) -> None:
        if not admitted:
            return
        new = [(documents[place].index, row) for place, row in admitted if place not in kept]
        indices, rows = [index for index, _ in new], [row for _, row in new]
        self.adapters.start(rows, indices, self.adaptation.seed)
        for place, row in admitted:
            if place in kept:
                self._restore(self._residents[place], kept[place], row)

    def _restore(self, resident: _Resident, state: DocumentState, row: int) -> None:
        self.bank.p_NP[row].copy_(state.parameters_P)
        moments = (
            (self.optimizer.first_NP, state.first_P),
            (self.optimizer.second_NP, state.second_P),
        )
        for mine, stored in moments:
            if mine is not None:
                assert stored is not None
                mine[row].copy_(stored)
        self.optimizer.steps_N[row] = state.steps
        self.adapters.refresh(row)
        self._losses[resident.first_loss :][: len(state.losses)].copy_(state.losses)
        last = max((updated for _, _, updated in state.trace), default=-1)
        self._clock = itertools.count(max(next(self._clock), last + 1))
        resident.trace = [
            ChunkEvent(chunk=c, scored_at=scored, updated_at=updated)
            for c, scored, updated in state.trace
        ]

    # A step ------------------------------------------------------------------------------------

    def _advance(self, step: Step) -> bool:
        """Score a step's chunks and learn from them; False where memory was short, with nothing
        changed but the budget."""
        applied = 0

        def update(batch: Batch, losses_S: Tensor) -> None:
            nonlocal applied
            self.update(batch, losses_S)
            applied += 1

        try:
            shape = self._graphs.shapes.of(step, self.budget) if self._graphs else None
            host = self._host_batch(step, shape)
            with _frozen(self.model):
                if self._graphs is not None and shape is not None:
                    losses_S = self._graphs.run(host, shape)
                    applied += 1
                elif step.learns:
                    losses_S = self.learn(host.on(self.device), update)
                else:
                    with torch.no_grad():
                        losses_S = self.losses(host.on(self.device))
            places = send(host.loss_places, self.device)
            self._losses.index_copy_(0, places, losses_S.detach().float())
        except torch.OutOfMemoryError:
            tokens = step.window_tokens
            # What is learned cannot be taken back, so the step must not be tried again.
            if len(step.members) == 1 or applied:
                raise EvaluationFailed(
                    f"a step of {tokens:,} tokens does not fit into memory",
                    "lower adaptation.window or adaptation.step_tokens, or free the device",
                ) from None
        else:
            self._note(step)
            return True
        # Outside of the handler: the error holds on to the tensors of the pass.
        if self._graphs is not None:
            self._graphs.clear()
        torch.cuda.empty_cache()
        self.budget = dataclasses.replace(self.budget, step_tokens=tokens).halved()
        self._tell(f"out of memory: steps of {self.budget.step_tokens:,} tokens from here on")
        return False

    def _note(self, step: Step) -> None:
        """All of a step's chunks are scored before the first of them is learned from."""
        residents = [self._residents[member.document] for member in step.members]
        scored = [next(self._clock) for _ in residents]
        updated = [next(self._clock) if step.learns else None for _ in residents]
        for resident, member, s, u in zip(residents, step.members, scored, updated, strict=True):
            event = ChunkEvent(chunk=member.number, scored_at=s, updated_at=u)
            resident.trace.append(event)

    def learn(self, batch: Batch, update: Callable[[Batch, Tensor], None]) -> Tensor:
        """Losses of a step's chunks, which are their score, and then the steps on them."""
        losses_S = self.losses(batch)
        for step in range(self.adaptation.grad_steps):
            update(batch, losses_S if step == 0 else self.losses(batch))
        return losses_S

    def losses(self, batch: Batch) -> Tensor:
        """Losses of a step's chunks under the current adapters, float32 [S]."""
        hooks = self.adapters.hooks(batch)
        x_SD = self.model.hidden(
            batch.ids_T, batch.segments, loop=True, hooks=hooks, tail=batch.tail
        )
        return self.model.token_losses(x_SD, batch.targets_S, hooks)

    def update(self, batch: Batch, losses_S: Tensor) -> None:
        """One step of each document on the mean of its chunk's losses; chunks are of one length."""
        if self.adapters.layout.slots:
            self.adapters.learn(batch, mean_of_chunks(losses_S, batch))

    def _host_batch(self, step: Step, shape: Shape | None = None) -> HostBatch:
        documents = [self._residents[m.document].document for m in step.members]
        places = [self._residents[m.document].first_loss for m in step.members]
        spare_row = self.budget.residents
        return HostBatch.of(step, documents, places, self._tokens, shape, spare_row)

    # Scores ------------------------------------------------------------------------------------

    def _scores_of(self, unread: _Unread) -> Iterator[DocumentScore]:
        losses = unread.read()
        for resident in unread.residents:
            n = resident.document.num_predictions
            mine, losses = losses[:n], losses[n:]
            yield self._score_of(resident, mine)

    def _score_of(self, resident: _Resident, losses: NDArray[np.float32]) -> DocumentScore:
        document = resident.document
        ids = np.asarray(self._tokens[document.start : document.end])
        assert len(losses) == document.num_predictions
        return DocumentScore(
            index=document.index,
            nats=math.fsum(losses.tolist()),
            tokens=len(losses),
            num_bytes=int(self._tables.count(ids[:-1], ids[1:]).sum()),
            trace=tuple(resident.trace),
            token_nats=losses if self._keep_token_nats else None,
        )


def mean_of_chunks(losses_S: Tensor, batch: Batch) -> Tensor:
    """What is learned from: the sum over documents of the mean of each chunk's losses."""
    return losses_S.view(len(batch.rows), -1).mean(1).sum()


class _Unread:
    """Losses of finished documents on their way to the host, which goes on meanwhile."""

    def __init__(self, losses: Tensor, residents: Sequence[_Resident]) -> None:
        self.residents = residents
        pieces = [
            losses[r.first_loss : r.first_loss + r.document.num_predictions] for r in residents
        ]
        found = torch.cat(pieces)
        self._event: torch.cuda.Event | None = None
        if losses.is_cuda:
            self._host = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            self._host.copy_(found, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = found

    def ready(self) -> bool:
        return self._event is None or self._event.query()

    def read(self) -> NDArray[np.float32]:
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy().copy()


def group_documents(
    documents: Sequence[Document], adaptation: AdaptationConfig
) -> tuple[tuple[Document, ...], ...]:
    """The documents of each planned group; the order in which they are given has no effect."""
    documents = sorted(documents, key=lambda document: document.index)
    groups = plan_groups([d.num_predictions for d in documents], adaptation)
    return tuple(tuple(documents[m] for m in group.members) for group in groups)


def adapt_groups(
    model: GolfModel,
    tokens: NDArray[np.integer],
    groups: Sequence[Sequence[Document]],
    adaptation: AdaptationConfig,
    *,
    tables: ByteTables,
    adapter_init: AdapterInit | None = None,
    keep_token_nats: bool = False,
    tell: Tell | None = None,
) -> Iterator[DocumentScore]:
    """Run groups of documents through one engine.

    On a CPU group after group, so that whoever runs a group alone gets its very bits; on a GPU
    together, because a group leaves it idle at its end.

    Yields:
        One score a document, in the order in which they finish.
    """
    if next(model.parameters()).device.type == "cuda":
        groups = (tuple(itertools.chain.from_iterable(groups)),)
    engine = Engine(
        model,
        tokens,
        adaptation,
        tables=tables,
        num_documents=max(map(len, groups), default=1),
        adapter_init=adapter_init,
        keep_token_nats=keep_token_nats,
        tell=tell,
    )
    for members in groups:
        yield from engine.run(members)


@contextlib.contextmanager
def _frozen(model: GolfModel) -> Iterator[None]:
    """The model's own tensors ask for no gradient inside the block."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
