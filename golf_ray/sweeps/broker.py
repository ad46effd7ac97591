"""The broker of a sweep: hands a cluster's resources to trials, and keeps workers warm for them.

An actor on the driver's node. Trials ask it for room for a training or for a pool of actors, which
they then start themselves, or for a worker that does light work and stays for the next trial, with
its loaded code, checkpoint and calibration. What is decided is in `golf_ray.sweeps.placement`.

Invariant: what was granted to a trial is given back when it says so or when its process is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from golf_ray.resources import Bundle, Node, Placement, cluster_nodes
from golf_ray.sweeps.placement import Kind, Request, Worker, decide
from golf_ray.sweeps.rooms import SweepStopped
from golf_ray.sweeps.workers import LightWorker

TICK_S = 0.05
SETTLE_S = 0.5
"""Ray's view of what is free lags behind what was just given back or taken."""
START_S = 120.0
"""Seconds that a worker may take to start before another is asked for."""
CLOSE_S = 10.0
CPUS = 0.0


@dataclass(kw_only=True)
class _Waiting:
    request: Request
    owner: int
    granted: asyncio.Future[Any]


@dataclass(kw_only=True)
class _Lease:
    request: Request
    owner: int
    worker: int | None
    placed: bool


@dataclass(kw_only=True)
class _Held:
    handle: Any
    node_id: str
    busy: bool


class Broker:
    """An asyncio actor.

    Args:
        unit: what a worker for light work takes.
    """

    def __init__(self, unit: Bundle) -> None:
        self._unit = dict(unit)
        self._numbers = itertools.count(1)
        self._waiting: dict[int, _Waiting] = {}
        self._leases: dict[int, _Lease] = {}
        self._workers: dict[int, _Held] = {}
        self._starting = 0
        self._changed_s = 0.0
        self._loop: asyncio.Task[None] | None = None
        self._errors: list[str] = []

    async def request(
        self, owner: int, kind: Kind, bundles: Sequence[Bundle], placement: Placement
    ) -> tuple[int, Any]:
        """Wait for room.

        Returns:
            the lease's number, and the worker for light work (None for the other kinds).
        """
        if self._loop is None:
            self._loop = asyncio.get_running_loop().create_task(self._run())
        request = Request(
            number=next(self._numbers), kind=kind, bundles=tuple(bundles), placement=placement
        )
        granted: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[request.number] = _Waiting(request=request, owner=owner, granted=granted)
        try:
            return request.number, await granted
        finally:
            self._waiting.pop(request.number, None)

    async def placed(self, number: int) -> None:
        """A granted request's own actors hold its resources now."""
        lease = self._leases.get(number)
        if lease is not None and not lease.placed:
            lease.placed = True
            self._changed_s = time.monotonic()

    async def release(self, number: int, *, broken: bool = False) -> None:
        """Give back what was granted.

        Args:
            broken: the worker is not to be used again.
        """
        lease = self._leases.pop(number, None)
        if lease is None:
            return
        self._changed_s = time.monotonic()
        if lease.worker is not None and lease.worker in self._workers:
            if broken:
                self._end_worker(lease.worker)
            else:
                self._workers[lease.worker].busy = False

    async def forget(self, owner: int) -> None:
        """A trial's process is gone: what it held is free, and its worker, which may still be at
        work for it, is not used again."""
        for waiting in [w for w in self._waiting.values() if w.owner == owner]:
            waiting.granted.cancel()
        for number in [n for n, lease in self._leases.items() if lease.owner == owner]:
            await self.release(number, broken=True)

    async def close(self) -> None:
        """End all workers; nothing is granted any more."""
        if self._loop is not None:
            self._loop.cancel()
        for number in list(self._workers):
            self._end_worker(number)

    async def state(self) -> dict[str, Any]:
        """Who waits for what, and who has what; for people."""
        return {
            "waiting": [(w.owner, w.request.kind) for w in self._waiting.values()],
            "leases": [(lease.owner, lease.request.kind) for lease in self._leases.values()],
            "workers": len(self._workers),
            "starting": self._starting,
            "errors": self._errors[-3:],
        }

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(RayError):
                self._tick()
            await asyncio.sleep(TICK_S)

    def _tick(self) -> None:
        if not self._waiting:
            return
        settled = time.monotonic() - self._changed_s > SETTLE_S
        if not settled and any(w.request.kind != "light" for w in self._waiting.values()):
            # Whether light work would be in its way is seen then.
            return
        pending = [lease.request for lease in self._leases.values() if not lease.placed]
        requests = [w.request for w in self._waiting.values()]
        # A worker that is idle can be handed on at once; what was freed shows a little later.
        free = _free_nodes() if settled else ()
        decision = decide(
            requests,
            free,
            [Worker(number=n, node_id=w.node_id, busy=w.busy) for n, w in self._workers.items()],
            self._unit,
            starting=self._starting,
            pending=pending,
        )
        if decision.grant is not None:
            self._grant(decision.grant, None)
        for number, worker in decision.assign.items():
            self._grant(number, worker)
        for worker in decision.stop:
            self._end_worker(worker)
        for _ in range(decision.start):
            self._start_worker()

    def _grant(self, number: int, worker: int | None) -> None:
        waiting = self._waiting[number]
        if waiting.granted.done():
            return
        handle = None
        if worker is not None:
            held = self._workers[worker]
            held.busy = True
            handle = held.handle
        self._leases[number] = _Lease(
            request=waiting.request, owner=waiting.owner, worker=worker, placed=worker is not None
        )
        waiting.granted.set_result(handle)

    def _start_worker(self) -> None:
        self._starting += 1
        handle = ray.remote(LightWorker).options(
            num_cpus=self._unit.get("CPU", 0.0), num_gpus=self._unit.get("GPU", 0.0)
        ).remote()  # fmt: skip
        asyncio.get_running_loop().create_task(self._await_worker(handle))

    async def _await_worker(self, handle: Any) -> None:
        try:
            node_id = await asyncio.wait_for(handle.node_id.remote(), START_S)
        except (TimeoutError, RayError) as error:
            self._errors.append(" ".join(str(error).split())[:200] or "a worker did not start")
            ray.kill(handle)
        else:
            number = next(self._numbers)
            self._workers[number] = _Held(handle=handle, node_id=node_id, busy=False)
        finally:
            self._starting -= 1
            self._changed_s = time.monotonic()

    def _end_worker(self, number: int) -> None:
        held = self._workers.pop(number)
        ray.kill(held.handle)
        self._changed_s = time.monotonic()


def _free_nodes() -> tuple[Node, ...]:
    """What is free on each living node, as far as Ray knows at this moment."""
    from ray._private.state import available_resources_per_node

    free: Mapping[str, Mapping[str, float]] = available_resources_per_node()
    return tuple(
        Node(node_id=node.node_id, host=node.host, resources=dict(free.get(node.node_id, {})))
        for node in cluster_nodes()
    )


class BrokerClient:
    """A trial's way to the broker.

    Args:
        broker: the actor.
        owner: the trial's number.
    """

    def __init__(self, broker: Any, owner: int) -> None:
        self._broker = broker
        self._owner = owner
        self.waited_s = 0.0
        """Seconds spent waiting for resources."""

    @contextlib.contextmanager
    def room(
        self, kind: Kind, bundles: Sequence[Bundle], placement: Placement
    ) -> Iterator[Granted]:
        """Room for bundles, which the block's own actors take; call `placed` once they have.

        Raises:
            SweepStopped: the sweep was stopped.
        """
        began_s = time.monotonic()
        try:
            number, worker = ray.get(
                self._broker.request.remote(self._owner, kind, list(bundles), placement)
            )
        except RayActorError:
            raise SweepStopped from None
        self.waited_s += time.monotonic() - began_s
        granted = Granted(broker=self._broker, number=number, worker=worker)
        try:
            yield granted
        finally:
            # One that is gone has taken the lease with it, and the next request says so.
            with contextlib.suppress(RayActorError):
                ray.get(self._broker.release.remote(number, broken=granted.broken))


@dataclass(kw_only=True)
class Granted:
    """What a trial was granted."""

    broker: Any
    number: int
    worker: Any
    """For light work."""
    broken: bool = False
    """Set where the worker is not to be used again."""

    def placed(self) -> None:
        """Say that the resources are held by actors of one's own."""
        self.broker.placed.remote(self.number)


@contextlib.contextmanager
def broker_of(unit: Bundle) -> Iterator[Any]:
    """The actor, on this node: it and its workers end with the block, or with the driver.

    Args:
        unit: what a worker for light work takes.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    broker: Any = (
        ray.remote(Broker)
        .options(
            num_cpus=CPUS,
            max_concurrency=10_000,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=here, soft=False),
        )
        .remote(unit)
    )
    try:
        yield broker
    finally:
        with contextlib.suppress(RayError):
            ray.get(broker.close.remote(), timeout=CLOSE_S)
        ray.kill(broker)
