"""All pictures of some results, in the order in which a report has them.

What there is nothing to draw of is there too, and says why in a line.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from golf_ray.results.pictures.picture import NoPicture, Picture
from golf_ray.results.pictures.rows import Trials
from golf_ray.results.timeline import Timeline

if TYPE_CHECKING:
    from golf_ray.results.reading import Results


def pictures_of(
    results: Results, trials: Trials, timeline: Timeline
) -> tuple[Picture | NoPicture, ...]:
    """Every picture, or why there is none.

    Args:
        trials: of `trials_of`.
        timeline: of `timeline_of`.
    """
    from golf_ray.results.pictures.documents import by_length
    from golf_ray.results.pictures.knobs import importance
    from golf_ray.results.pictures.parallel import parallel
    from golf_ray.results.pictures.slots import slots
    from golf_ray.results.pictures.training import curves
    from golf_ray.results.pictures.trials import history, sizes

    return (
        history(trials),
        parallel(trials),
        importance(trials, results.plans),
        sizes(trials),
        curves(trials, results.intervals),
        *by_length(trials, results.documents),
        slots(timeline),
    )
