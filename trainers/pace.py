"""How fast a training goes, with and without looping, and whether that is fast enough."""

from __future__ import annotations

from golf_ray.config import TrainConfig
from golf_ray.errors import TrainingFailed


class Pace:
    """Steps and seconds, apart by whether layers were looped.

    Args:
        batch_tokens: of one step.
    """

    def __init__(self, batch_tokens: int) -> None:
        self._batch_tokens = batch_tokens
        self._steps = {False: 0, True: 0}
        self._seconds = {False: 0.0, True: 0.0}
        self._looping: bool | None = None
        self._step = 0

    def took(self, step: int, seconds: float, looping: bool) -> None:
        """The time between the end of the step before and the end of this one; may be said again.

        The first step after a switch, which may have had something to compile, counts for nothing.
        """
        if step == self._step:
            return
        if looping == self._looping:
            self._steps[looping] += 1
            self._seconds[looping] += seconds
        self._step, self._looping = step, looping

    def tokens_per_s(self, looping: bool) -> float | None:
        """Speed over all ranks, None where nothing was measured."""
        if not self._steps[looping] or self._seconds[looping] <= 0:
            return None
        return self._steps[looping] * self._batch_tokens / self._seconds[looping]


def require_speed(train: TrainConfig, tokens_per_s: float) -> None:
    """See that the first steps were fast enough.

    Raises:
        TrainingFailed: they were not; on this host the run is not worth its hours.
    """
    floor = train.min_tokens_per_s
    if floor is not None and tokens_per_s < floor:
        raise TrainingFailed(
            f"the host is too slow: {tokens_per_s:,.0f} tokens/s over the first "
            f"{train.speed_check_steps} steps, and train.min_tokens_per_s is {floor:,.0f}",
            "use another host, or lower the floor",
        )
