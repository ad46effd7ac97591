"""What a step is padded to: one of few shapes, because each costs a capture.

To capture a shape takes as long as some ten steps, and many shapes occur a few times only. So a
step is replayed in a roomier shape that is captured already until what that has wasted, added up
for the shape that it would have by itself, is what a capture costs; then that one is captured: to
rent until one has paid the price costs at most twice what knowing all that comes would. A step that
no captured shape has room for gets one with room for those that grow from it.

No tensor and no clock: a choice follows from the steps before it. Invariant: a shape has room for
its step, and padding reaches no document.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from golf_ray.adaptation.batches import Shape
from golf_ray.adaptation.packing import Budget, Step
from golf_ray.config import AdaptationConfig
from golf_ray.kernels.grouped import tile_rows_of

LEVELS = 12
"""Numbers of tokens that steps are padded to."""
GRAINS = ((16, 4), (64, 8), (128, 16), (1 << 30, 32))
"""Up to so many documents their number is padded to a multiple of that."""
ROOM_LEVELS = 2
"""More than a step needs, where no captured shape has room for it."""
TOKEN_MS, DOCUMENT_MS = 0.8e-3, 0.06
"""What a token and a document of nothing take: the record's model on an H200."""
CAPTURE_MS = 150.0
"""What a capture takes there, 60 to 210 ms, with the step before it that runs kernel by kernel, as
a host needs 110 ms to launch it.

By these figures, counted and not measured, one of eight GPUs captures 45 to 48 shapes for its part
of the field's 50,000 documents, which takes 144 to 157 s, and some 100 if each step has the least:
151 to 165 s. A sample of 2,000 documents takes one GPU 50 s in place of 57, of which 39 are the
steps'.
"""


def shape_of(
    step: Step, adaptation: AdaptationConfig, budget: Budget, room_levels: int = 0
) -> Shape | None:
    """The least shape that a step is padded to.

    Args:
        room_levels: so many levels of tokens more.

    Returns:
        None for a step that runs as it is: documents' last chunks, and a window that is longer than
        the budget.
    """
    num_tokens, count = step.window_tokens, len(step.members)
    if not step.learns or num_tokens > budget.step_tokens:
        return None
    grain = next(grain for most, grain in GRAINS if count <= most)
    documents = -(-count // grain) * grain
    # A document of nothing is a chunk long, and there are fewer of them than the largest grain.
    needed = num_tokens + (documents - count) * adaptation.chunk_size
    level = -(-needed * LEVELS // budget.step_tokens) + room_levels
    room = (grain - 1) * adaptation.chunk_size
    full = level >= LEVELS
    return Shape(
        tokens=budget.step_tokens + room if full else -(-level * budget.step_tokens // LEVELS),
        documents=documents,
        tile_rows=tile_rows_of([m.chunk.window_tokens for m in step.members]),
        chunk_size=adaptation.chunk_size,
        window=adaptation.window,
    )


def has_room(shape: Shape, step: Step, wanted: Shape) -> bool:
    """Whether a step that has a shape of its own fits into another."""
    nothing = shape.documents - len(step.members)
    needed = step.window_tokens + nothing * shape.chunk_size
    alike = (shape.tile_rows, shape.chunk_size, shape.window) == (
        wanted.tile_rows, wanted.chunk_size, wanted.window
    )  # fmt: skip
    return alike and nothing >= 0 and needed <= shape.tokens


class ShapeChoice:
    """Chooses the shapes of one engine's steps.

    Args:
        adaptation: of the engine.
        thrifty: whether roomier shapes are taken; otherwise every step has the least.
    """

    def __init__(self, adaptation: AdaptationConfig, *, thrifty: bool = True) -> None:
        self._thrifty = thrifty
        self._adaptation = adaptation
        self._captured: set[Shape] = set()
        self._begun: set[Shape] = set()
        """Roomy ones, whether captured already or not."""
        self._wasted_ms: Counter[Shape] = Counter()

    def of(self, step: Step, budget: Budget) -> Shape | None:
        """The shape to pad a step to; None for one that runs as it is."""
        wanted = shape_of(step, self._adaptation, budget)
        if wanted is None or wanted in self._captured or not self._thrifty:
            return wanted
        nearest = _least(self._captured, step, wanted)
        if nearest is None:
            found = _least(self._begun, step, wanted) or shape_of(
                step, self._adaptation, budget, ROOM_LEVELS
            )
            assert found is not None
            self._begun.add(found)
            return found
        wasted_ms = max(0.0, _costs_ms(nearest) - _costs_ms(wanted))
        if self._wasted_ms[wanted] + wasted_ms > CAPTURE_MS:
            return wanted
        self._wasted_ms[wanted] += wasted_ms  # type: ignore[assignment]
        return nearest

    def captured(self, shape: Shape) -> None:
        """Note that a shape can be replayed."""
        self._captured.add(shape)

    def clear(self) -> None:
        """Note that none can be replayed any more."""
        self._captured.clear()
        self._begun.clear()
        self._wasted_ms.clear()


def _least(shapes: Iterable[Shape], step: Step, wanted: Shape) -> Shape | None:
    """The one that costs least of those that have room."""
    roomy = [shape for shape in shapes if has_room(shape, step, wanted)]
    # A set has no order: those that cost the same are told apart.
    return min(roomy, key=lambda shape: (_costs_ms(shape), shape.tokens), default=None)


def _costs_ms(shape: Shape) -> float:
    return shape.tokens * TOKEN_MS + shape.documents * DOCUMENT_MS
