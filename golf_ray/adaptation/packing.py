"""Which documents take the next step together: continuous batching under a budget of tokens.

A document holds a row from its first chunk to its last; one that is finished gives its row to the
next at once. A step advances some of the residents by one chunk each: those with most chunks left
come first, as far as their windows fit. Steps either learn or end documents, because a document's
last chunk needs no gradient: those that only have it left wait until there are enough of them.

No tensor and no clock: what is taken follows from lengths, settings and budget alone. Invariant:
every chunk of every document is taken once, in order, and a row holds one document at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from golf_ray.adaptation.plan import Chunk, chunk_at, count_chunks
from golf_ray.config import AdaptationConfig

ENDING_SHARE = 2
"""One in so many rows at most waits for its document's last chunk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What an engine may hold at a time."""

    residents: int
    """Documents with an adapter in memory."""
    step_tokens: int
    """Tokens of all windows of a step; a single window may be longer."""

    def halved(self) -> Budget:
        """A budget for steps of half the tokens."""
        return Budget(residents=self.residents, step_tokens=max(1, self.step_tokens // 2))


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A document's part in a step."""

    document: int
    """Place in the lengths that were packed."""
    row: int
    number: int
    """Of the chunk."""
    chunk: Chunk


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Documents that advance together."""

    learns: bool
    """Whether the chunks are learned from; otherwise each is its document's last."""
    members: tuple[Member, ...]
    """Longest window first."""

    @property
    def window_tokens(self) -> int:
        """Tokens that the pass sees."""
        return sum(member.chunk.window_tokens for member in self.members)


class Packer:
    """Takes steps until every document is finished.

    Args:
        lengths: predictions of each document.
        adaptation: chunk size and window.
        budget: what fits.
        begun: chunks that a document has behind it already, by place.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        adaptation: AdaptationConfig,
        budget: Budget,
        begun: dict[int, int] | None = None,
    ) -> None:
        self.budget = budget
        self._lengths = list(lengths)
        self._adaptation = adaptation
        self._next = [(begun or {}).get(place, 0) for place in range(len(self._lengths))]
        self._chunks = [count_chunks(n, adaptation.chunk_size) for n in self._lengths]
        self._waiting = sorted(
            (place for place, n in enumerate(self._chunks) if n > self._next[place]),
            key=lambda place: (self._left(place), -place),
        )
        self._num_packed = len(self._waiting)
        self._row_of: dict[int, int] = {}
        self._free = list(range(budget.residents - 1, -1, -1))

    def admit(self) -> list[tuple[int, int]]:
        """Give free rows to those that wait, longest first: (document, row) pairs."""
        admitted = []
        while self._free and self._waiting:
            place, row = self._waiting.pop(), self._free.pop()
            self._row_of[place] = row
            admitted.append((place, row))
        return admitted

    def take(self) -> Step | None:
        """The next step over the residents; None when there is none. `commit` it when it is done:
        until then another call gives one for the same chunks, by the budget as it is then."""
        ending = [place for place in self._row_of if self._left(place) == 1]
        learning = [place for place in self._row_of if self._left(place) > 1]
        if ending and (not learning or self._many(ending)):
            return self._step(ending, learns=False)
        return self._step(learning, learns=True) if learning else None

    def commit(self, step: Step) -> list[tuple[int, int]]:
        """Note that a step is done; the (document, row) pairs that end with it."""
        ended = []
        for member in step.members:
            assert self._next[member.document] == member.number
            self._next[member.document] += 1
            if self._left(member.document) == 0:
                row = self._row_of.pop(member.document)
                self._free.append(row)
                ended.append((member.document, row))
        return ended

    def _left(self, place: int) -> int:
        return self._chunks[place] - self._next[place]

    def _chunk(self, place: int) -> Chunk:
        chunk_size, window = self._adaptation.chunk_size, self._adaptation.window
        return chunk_at(self._next[place], self._lengths[place], chunk_size, window)

    def _many(self, ending: list[int]) -> bool:
        # Rows that nothing will fill do not count: they must not decide what goes together.
        enough = len(ending) * ENDING_SHARE >= min(self.budget.residents, self._num_packed)
        tokens = sum(self._chunk(place).window_tokens for place in ending)
        return enough or tokens >= self.budget.step_tokens

    def _step(self, places: list[int], *, learns: bool) -> Step:
        members: list[Member] = []
        room = self.budget.step_tokens
        for place in sorted(places, key=lambda place: (-self._left(place), place)):
            chunk = self._chunk(place)
            if chunk.window_tokens <= room or not members:
                room -= chunk.window_tokens
                members.append(
                    Member(
                        document=place,
                        row=self._row_of[place],
                        number=self._next[place],
                        chunk=chunk,
                    )
                )
            if room <= 0:
                break
        members.sort(key=lambda m: (-m.chunk.window_tokens, m.document))
        return Step(learns=learns, members=tuple(members))
