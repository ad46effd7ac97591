"""A search that searches nothing: trials whose knobs are given, under Ray Tune like any others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray.tune.search import Searcher


class PointsSearch(Searcher):
    """Hands out points in order.

    Args:
        points: each with the trial's number and its knobs.
        may_start: asked before each; when it says no, no other is started.
    """

    def __init__(
        self, points: Sequence[Mapping[str, Any]], may_start: Callable[[], bool] | None = None
    ) -> None:
        super().__init__()
        self._points = [dict(point) for point in points]
        self._may_start = may_start

    def suggest(self, trial_id: str) -> Any:
        """The next point, or `Searcher.FINISHED`."""
        if not self._points or (self._may_start is not None and not self._may_start()):
            return str(Searcher.FINISHED)
        return self._points.pop(0)

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing: records say how trials end."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the plan has the points."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""
