"""The test-time training engine: score a chunk, learn from it, go on; each document on its own.

For chunk c ending at e the window is the at most `window` predictions ending at e. One forward with
the document's current adapters computes it; the chunk's losses are the score, final. Then, unless
it is the document's last chunk, the adapters take `grad_steps` steps on the chunk's mean loss, its
gradient running through the whole window. The base weights never change.

The engine advances the documents of one group together. It plans nothing
(`golf_ray.adaptation.plan`), reads no file and knows no total (`evaluators.ttt`).

Shapes: N documents, T rows of a flat buffer, C predictions of a chunk, D model dim.

Invariant: a document's score depends on nothing but its tokens, its index, the model and the
settings; predictions are scored once, left to right, before anything learns from them.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from golf_ray.adaptation.adapters import AdapterBank, AdapterHooks, RowLayout, adapter_slots
from golf_ray.adaptation.optimizer import AdapterOptimizer
from golf_ray.adaptation.plan import Chunk, chunk_at, count_chunks, plan_groups
from golf_ray.config import AdaptationConfig
from golf_ray.data.tokenizer import ByteTables
from golf_ray.metric import Score
from golf_ray.model.model import GolfModel
from golf_ray.model.segments import Segments

AdapterInit = Mapping[int, Tensor]
"""A [rank, n] by input width n, in place of random ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A stretch of the token stream, as `golf_ray.data.documents` cuts it."""

    index: int
    """Place in the whole stream's documents, also in a sample: it decides the adapter's A."""
    start: int
    end: int

    @property
    def num_predictions(self) -> int:
        """Predictions: every token but the first is predicted."""
        return max(0, self.end - self.start - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkEvent:
    """When a chunk was scored and when the adapters learned from it: numbers of one rising count.

    The count runs over the events of all documents of a group.
    """

    chunk: int
    scored_at: int
    updated_at: int | None
    """None for a document's last chunk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentScore:
    """What one document scored."""

    index: int
    nats: float
    """Sum of the losses, exactly rounded in float64."""
    tokens: int
    num_bytes: int
    trace: tuple[ChunkEvent, ...]
    token_nats: NDArray[np.float32] | None = None
    """Losses in order, where they were asked for."""

    @property
    def score(self) -> Score:
        """The sums alone."""
        return Score(nats=self.nats, tokens=self.tokens, num_bytes=self.num_bytes)


class _Resident:
    """A document in the engine: its ids on the device, what is scored of it, its trace."""

    def __init__(
        self, document: Document, tokens: NDArray[np.integer], device: torch.device
    ) -> None:
        ids = np.asarray(tokens[document.start : document.end]).astype(np.int64)
        self.document = document
        self.ids = torch.from_numpy(ids).to(device)
        self.losses: list[Tensor] = []
        self.trace: list[ChunkEvent] = []

    def finish(
        self, tokens: NDArray[np.integer], tables: ByteTables, keep_token_nats: bool
    ) -> DocumentScore:
        document = self.document
        ids = np.asarray(tokens[document.start : document.end])
        losses = torch.cat(self.losses).cpu().numpy() if self.losses else np.zeros(0, np.float32)
        assert len(losses) == document.num_predictions
        return DocumentScore(
            index=document.index,
            nats=math.fsum(losses.tolist()),
            tokens=len(losses),
            num_bytes=int(tables.count(ids[:-1], ids[1:]).sum()),
            trace=tuple(self.trace),
            token_nats=losses if keep_token_nats else None,
        )


class GroupEngine:
    """Adapters, optimizer and progress of the documents of one group.

    Args:
        model: the base model; its weights are read only.
        tokens: the whole stream of ids.
        documents: the group's members, in falling order of predictions.
        adaptation: the settings.
        tables: bytes of each token.
        adapter_init: A to use in place of the random ones.
        keep_token_nats: keep every loss in the scores.
    """

    def __init__(
        self,
        model: GolfModel,
        tokens: NDArray[np.integer],
        documents: Sequence[Document],
        adaptation: AdaptationConfig,
        *,
        tables: ByteTables,
        adapter_init: AdapterInit | None = None,
        keep_token_nats: bool = False,
    ) -> None:
        lengths = [document.num_predictions for document in documents]
        assert lengths == sorted(lengths, reverse=True), lengths
        self.model = model
        self.adaptation = adaptation
        self.device = next(model.parameters()).device
        self._tokens = tokens
        self._tables = tables
        self._keep_token_nats = keep_token_nats
        self._clock = itertools.count()
        self.residents = [_Resident(d, tokens, self.device) for d in documents]
        self.chunks = [count_chunks(n, adaptation.chunk_size) for n in lengths]
        self.bank = AdapterBank(
            adapter_slots(model.config, adaptation.sites),
            adaptation.rank,
            sum(n > 0 for n in lengths),
            self.device,
        )
        for row, document in enumerate(documents[: len(self.bank.p_NP)]):
            self.bank.reset(row, document.index, adaptation.seed, adapter_init)
        self.optimizer = AdapterOptimizer(
            adaptation, len(self.bank.p_NP), self.bank.num_parameters, self.device
        )

    def run(self) -> Iterator[DocumentScore]:
        """All documents to their end; each is yielded when it is finished."""
        for resident, chunks in zip(self.residents, self.chunks, strict=True):
            if chunks == 0:
                yield self._finish(resident)
        for number in range(max(self.chunks, default=0)):
            yield from self.advance(number)

    def advance(self, number: int) -> list[DocumentScore]:
        """Chunk `number` of every document that has one; the documents that end with it.

        Members are in falling order of length, so those with a further chunk come first, have
        windows of one length, and are the only ones that need a gradient.
        """
        going_on = sum(chunks > number + 1 for chunks in self.chunks)
        present = sum(chunks > number for chunks in self.chunks)
        if going_on:
            self.learn(slice(0, going_on), number)
        if present == going_on:
            return []
        ending = slice(going_on, present)
        with torch.no_grad():
            self.score(ending, number, self.losses(ending, number))
        return [self._finish(resident) for resident in self.residents[ending]]

    def learn(self, rows: slice, number: int) -> None:
        """Score a chunk that is not the last, then take the steps on it."""
        losses_T = self.losses(rows, number)
        self.score(rows, number, losses_T)
        for step in range(self.adaptation.grad_steps):
            self.update(rows, losses_T if step == 0 else self.losses(rows, number))
        for resident in self.residents[rows]:
            event = resident.trace[-1]
            resident.trace[-1] = ChunkEvent(
                chunk=event.chunk, scored_at=event.scored_at, updated_at=next(self._clock)
            )

    def losses(self, rows: slice, number: int) -> Tensor:
        """Losses of chunk `number` under the current adapters, float32 [sum of C]."""
        chunks = self._chunks_at(rows, number)
        residents = self.residents[rows]
        x_T = torch.cat(
            [r.ids[c.window_start : c.end] for r, c in zip(residents, chunks, strict=True)]
        )
        targets = torch.cat(
            [r.ids[c.start + 1 : c.end + 1] for r, c in zip(residents, chunks, strict=True)]
        )
        lengths = [c.window_tokens for c in chunks]
        scored = [c.num_scored for c in chunks]
        learning = torch.is_grad_enabled()
        hooks = AdapterHooks(
            self.bank.leaves(rows) if learning else self.bank.views(rows),
            body=RowLayout(lengths, self.device),
            head=RowLayout(scored, self.device),
        )
        with _frozen(self.model):
            segments = Segments.of_lengths(lengths, self.device)
            x_TD = self.model.hidden(x_T, segments, loop=True, hooks=hooks)
            places = _last_rows(lengths, scored).to(self.device)
            return self.model.token_losses(x_TD.index_select(0, places), targets, hooks)

    def score(self, rows: slice, number: int, losses_T: Tensor) -> None:
        """Note the losses of a chunk as its score; nothing changes them afterwards."""
        counts = [c.num_scored for c in self._chunks_at(rows, number)]
        pieces = torch.split(losses_T.detach().clone(), counts)
        for resident, piece in zip(self.residents[rows], pieces, strict=True):
            resident.losses.append(piece)
            resident.trace.append(
                ChunkEvent(chunk=number, scored_at=next(self._clock), updated_at=None)
            )

    def update(self, rows: slice, losses_T: Tensor) -> None:
        """One step of each document on the mean of its chunk's losses; chunks are of one length."""
        if not self.bank.slots:
            return
        num_documents = len(self.residents[rows])
        loss = losses_T.view(num_documents, -1).mean(1).sum()
        grad_NP = self.bank.gradient(rows, loss)
        with torch.no_grad():
            self.optimizer.step(self.bank.p_NP[rows], grad_NP, rows)

    def _chunks_at(self, rows: slice, number: int) -> list[Chunk]:
        chunk_size, window = self.adaptation.chunk_size, self.adaptation.window
        return [
            chunk_at(number, resident.document.num_predictions, chunk_size, window)
            for resident in self.residents[rows]
        ]

    def _finish(self, resident: _Resident) -> DocumentScore:
        return resident.finish(self._tokens, self._tables, self._keep_token_nats)


def adapt_group(
    model: GolfModel,
    tokens: NDArray[np.integer],
    documents: Sequence[Document],
    adaptation: AdaptationConfig,
    *,
    tables: ByteTables,
    adapter_init: AdapterInit | None = None,
    keep_token_nats: bool = False,
) -> Iterator[DocumentScore]:
    """Adapt to and score the documents of one group; see `GroupEngine` for the arguments.

    Yields:
        Each document when it is finished, the shorter ones first.
    """
    engine = GroupEngine(
        model, tokens, documents, adaptation, tables=tables, adapter_init=adapter_init,
        keep_token_nats=keep_token_nats,
    )  # fmt: skip
    return engine.run()


def group_documents(
    documents: Sequence[Document], adaptation: AdaptationConfig
) -> tuple[tuple[Document, ...], ...]:
    """The documents of each planned group; the order in which they are given has no effect."""
    documents = sorted(documents, key=lambda document: document.index)
    groups = plan_groups([d.num_predictions for d in documents], adaptation)
    return tuple(tuple(documents[m] for m in group.members) for group in groups)


def adapt_documents(
    model: GolfModel,
    tokens: NDArray[np.integer],
    documents: Sequence[Document],
    adaptation: AdaptationConfig,
    *,
    tables: ByteTables,
    adapter_init: AdapterInit | None = None,
    keep_token_nats: bool = False,
) -> Iterator[DocumentScore]:
    """Plan the documents into groups and run one group after another, longest documents first.

    Yields:
        One score a document, in the order in which they finish.
    """
    for members in group_documents(documents, adaptation):
        yield from adapt_group(
            model, tokens, members, adaptation, tables=tables, adapter_init=adapter_init,
            keep_token_nats=keep_token_nats,
        )  # fmt: skip


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


def _last_rows(lengths: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Places of the last `counts[i]` rows of stretch i in a flat buffer of such stretches."""
    ends = itertools.accumulate(lengths)
    return torch.cat([torch.arange(e - c, e) for e, c in zip(ends, counts, strict=True)])
