"""The worker that does a sweep's light stages: a process that stays warm from trial to trial.

It holds one unit of the cluster (a GPU, or CPUs) and does what it is told, one stage at a time.
"""

from __future__ import annotations

from typing import Any


class LightWorker:
    """Runs as a Ray actor."""

    def node_id(self) -> str:
        """Where it runs; also says that it does."""
        import ray

        # What every stage needs, before the first is here.
        import golf_ray.sweeps.stages  # noqa: F401

        return str(ray.get_runtime_context().get_node_id())

    def run(self, stage: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Compute a stage; arguments are those of its function in `golf_ray.sweeps.stages`."""
        from golf_ray.sweeps import stages

        return stages.LIGHT[stage](**arguments)
