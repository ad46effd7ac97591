"""Who gets a cluster's resources next: a pure function of who waits and of what is free.

Three kinds wait: a `training`, whose workers hold their resources as one placement group; a `pool`
of actors that score a whole set; and `light` work (calibration, quantisation, a sample's score),
which takes a warm worker that goes from trial to trial. Nothing here acts: `golf_ray.sweeps.broker`
does.

Trainings start side by side: what was granted and is not seen to be held yet counts as taken
wherever Ray may put it, so nothing waits for another's imports and compilation on other nodes.

Invariant: a training that would fit if light work ended is never starved by more of it: while it
waits no light work begins, and idle workers make room for it. What is granted fits, wherever that
goes which was granted before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from golf_ray.resources import Bundle, Node, Placement, fits

Kind = Literal["training", "pool", "light"]
ORDER: tuple[Kind, ...] = ("training", "pool", "light")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Something that waits for resources."""

    number: int
    """Place in the order of arrival."""
    kind: Kind
    bundles: tuple[Bundle, ...]
    placement: Placement = "PACK"


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """A worker for light work."""

    number: int
    node_id: str
    busy: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What to do now."""

    grant: int | None = None
    """Request whose bundles fit and may be placed."""
    assign: Mapping[int, int] = field(default_factory=dict)
    """Worker for each light request that gets one, by the request's number."""
    start: int = 0
    """Workers to start."""
    stop: tuple[int, ...] = ()
    """Idle workers to end."""


def decide(
    waiting: Sequence[Request],
    free: Sequence[Node],
    workers: Sequence[Worker],
    unit: Bundle,
    *,
    starting: int = 0,
    pending: Sequence[Request] = (),
) -> Decision:
    """Choose.

    Args:
        waiting: all requests without resources.
        free: nodes with what is free on them now.
        workers: those for light work that are ready.
        unit: what such a worker takes.
        starting: workers that are on their way.
        pending: requests that were granted and may not be seen in `free` yet.
    """
    idle = [w for w in workers if not w.busy]
    large = sorted(
        (r for r in waiting if r.kind != "light"), key=lambda r: (ORDER.index(r.kind), r.number)
    )
    with_idle = _freed(free, idle, unit)
    with_all = _freed(free, workers, unit)
    for request in large:
        if fits_beside(free, request.bundles, request.placement, pending):
            # A worker on its way would take what was seen as free.
            return Decision() if starting else Decision(grant=request.number)
        if pending:
            # What they leave is seen once they hold theirs.
            return Decision()
        if fits(with_idle, request.bundles, request.placement):
            return Decision(stop=tuple(w.number for w in idle))
        if starting or fits(with_all, request.bundles, request.placement):
            # Light work ends soon, and what ends makes room.
            return Decision()
        # It waits for a training or a pool to end; light work is not in its way.
    light = sorted((r for r in waiting if r.kind == "light"), key=lambda r: r.number)
    assign = {r.number: w.number for r, w in zip(light, idle, strict=False)}
    lacking = len(light) - len(assign) - starting
    count = 0
    while count < lacking and fits_beside(free, [unit] * (count + 1 + starting), "PACK", pending):
        count += 1
    return Decision(assign=assign, start=count)


def fits_beside(
    free: Sequence[Node],
    bundles: Sequence[Bundle],
    placement: Placement,
    pending: Sequence[Request] = (),
) -> bool:
    """Whether bundles fit onto nodes wherever others go that were granted before.

    Never true where it may turn out not to; it may be false where it would do, until what the
    others left is seen.
    """
    if not pending:
        return fits(free, bundles, placement)
    if placement == "STRICT_PACK":
        # One bundle is enough to spoil a node.
        spoiled = sum(
            1 if r.placement == "STRICT_PACK" else min(len(r.bundles), len(free)) for r in pending
        )
        return sum(fits([node], bundles, placement) for node in free) > spoiled
    if placement == "STRICT_SPREAD":
        return False
    names = dict.fromkeys(name for bundle in bundles for name in bundle)
    largest = {name: max(bundle.get(name, 0.0) for bundle in bundles) for name in names}
    slots = sum(_slots(node, largest) for node in free)
    taken = sum(_slots_taken(bundle, largest) for r in pending for bundle in r.bundles)
    return slots >= len(bundles) + taken


def _slots(node: Node, bundle: Bundle) -> int:
    """How often a bundle goes onto a node."""
    return min(
        (int(node.resources.get(name, 0.0) / amount + 1e-9) for name, amount in bundle.items()
         if amount > 0),
        default=0,
    )  # fmt: skip


def _slots_taken(other: Bundle, bundle: Bundle) -> int:
    """How many of a node's places for one bundle another may take."""
    return max(
        (math.ceil(other.get(name, 0.0) / amount - 1e-9) for name, amount in bundle.items()
         if amount > 0),
        default=0,
    )  # fmt: skip


def _freed(free: Sequence[Node], workers: Sequence[Worker], unit: Bundle) -> list[Node]:
    """Nodes as they would be without some workers."""
    nodes = []
    for node in free:
        count = sum(w.node_id == node.node_id for w in workers)
        resources = dict(node.resources)
        for name, amount in unit.items():
            resources[name] = resources.get(name, 0.0) + count * amount
        nodes.append(Node(node_id=node.node_id, host=node.host, resources=resources))
    return nodes
