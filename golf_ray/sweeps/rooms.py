"""Where a trial's stages run: on a cluster through the sweep's broker, or all in one process.

A `Rooms` gives a stage the resources that it takes, and takes them back. What a stage computes is
`golf_ray.sweeps.stages`' affair.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from golf_ray.config import Config
from golf_ray.errors import ClusterError

if TYPE_CHECKING:
    from golf_ray.sweeps.broker import BrokerClient
    from trainers.run_record import OnProgress, ProgressEvent

LIGHT_TRIES = 3
"""Workers that may be lost under one light stage."""


class SweepStopped(Exception):
    """The sweep that a trial is of was stopped: no fault of the trial's, nor of its stages."""


class Rooms(Protocol):
    """What a trial asks for."""

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting for resources so far."""
        ...

    def training(self, config: Config) -> contextlib.AbstractContextManager[OnProgress]:
        """Room for a training's workers; the block's training reports its progress to the value."""
        ...

    def pool(self, config: Config) -> contextlib.AbstractContextManager[dict[str, Any]]:
        """Room for a pool of actors; the value holds the arguments that watch it."""
        ...

    def light(self, stage: str, **arguments: Any) -> dict[str, Any]:
        """Run a light stage of `golf_ray.sweeps.stages.LIGHT` by name."""
        ...


class ClusterRooms:
    """On the connected cluster.

    Args:
        broker: a trial's way to the sweep's broker.
        on_training: told how the training goes.
    """

    def __init__(self, broker: BrokerClient, on_training: OnProgress | None = None) -> None:
        self._broker = broker
        self._on_training = on_training

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting for resources so far."""
        return self._broker.waited_s

    @contextlib.contextmanager
    def training(self, config: Config) -> Iterator[OnProgress]:
        """Room for the workers that the configuration asks for, as one placement group."""
        from golf_ray.resources import require_resources, training_bundles

        bundles, placement = training_bundles(config), config.cluster.placement
        require_resources(bundles, placement, what="training")
        with self._broker.room("training", bundles, placement) as granted:

            def progress(event: ProgressEvent) -> None:
                # From then on its workers are there; compiling may take minutes.
                if event.phase in ("preparing", "training"):
                    granted.placed()
                if self._on_training is not None:
                    self._on_training(event)

            yield progress

    @contextlib.contextmanager
    def pool(self, config: Config) -> Iterator[dict[str, Any]]:
        """Room for the actors that the configuration asks for."""
        from golf_ray.resources import evaluation_bundles, require_resources

        bundles = evaluation_bundles(config)
        require_resources(bundles, what="evaluation")
        with self._broker.room("pool", bundles, "PACK") as granted:
            ready: set[int] = set()

            def event(happened: Any) -> None:
                if happened.kind == "ready":
                    ready.add(happened.pid)
                if len(ready) >= len(bundles):
                    granted.placed()

            # The first result also says so: fewer actors than asked for may ever come up.
            yield {"on_event": event, "on_status": lambda status: granted.placed()}

    def light(self, stage: str, **arguments: Any) -> dict[str, Any]:
        """Run a stage on a warm worker; one that dies under it is replaced."""
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        from golf_ray.resources import evaluation_bundles, require_resources

        [unit] = evaluation_bundles(arguments["config"], 1)
        require_resources([unit], what="a worker")
        for _ in range(LIGHT_TRIES):
            with self._broker.room("light", [unit], "PACK") as granted:
                try:
                    found: dict[str, Any] = ray.get(granted.worker.run.remote(stage, arguments))
                    return found
                except RayActorError:
                    granted.broken = True
                except RayTaskError as error:
                    # A GPU that ran out of memory or is broken may be left as no next trial can
                    # use it.
                    granted.broken = not isinstance(error.cause, ValueError)
                    raise error.cause from None
        raise ClusterError(
            f"{LIGHT_TRIES} workers were lost one after the other in stage '{stage}'",
            "look for lack of memory on the nodes, or for nodes that were taken away",
        )


class LocalRooms:
    """Everything in this process, but for trainings, which run where Ray is connected to."""

    waited_s = 0.0

    @contextlib.contextmanager
    def training(self, config: Config) -> Iterator[OnProgress]:
        """The cluster is whoever called's."""
        yield lambda event: None

    @contextlib.contextmanager
    def pool(self, config: Config) -> Iterator[dict[str, Any]]:
        """Likewise."""
        yield {}

    def light(self, stage: str, **arguments: Any) -> dict[str, Any]:
        """Run a stage here."""
        from golf_ray.sweeps import stages

        run: Callable[..., dict[str, Any]] = stages.LIGHT[stage]
        return run(**arguments)
