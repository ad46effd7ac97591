"""What a stage asks of a cluster, and whether the cluster could ever give it.

The decision is a pure function of nodes and bundles; one thin function asks Ray for the nodes.

Invariant: what passes here can be placed once the cluster is free, where all bundles are equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from golf_ray.config import Config
from golf_ray.errors import ClusterError

Placement = Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"]
Bundle = Mapping[str, float]
"""Resources that one actor takes on one node, such as {"CPU": 1, "GPU": 1}."""

SHOWN_NODES = 4
"""Nodes that an error lists."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A living node of the cluster and all resources it has, free or not."""

    node_id: str
    host: str
    resources: Mapping[str, float]

    @property
    def name(self) -> str:
        """For people: nodes of one host are told apart by their id."""
        return f"{self.host} ({self.node_id[:8]})"


def cluster_nodes() -> tuple[Node, ...]:
    """The living nodes of the connected cluster, the head first."""
    import ray

    nodes = [
        Node(
            node_id=node["NodeID"],
            host=node["NodeManagerHostname"],
            resources=dict(node["Resources"]),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return tuple(sorted(nodes, key=lambda n: ("node:__internal_head__" not in n.resources, n.name)))


def training_bundles(config: Config) -> list[Bundle]:
    """What the workers of one training take."""
    return [_bundle(config)] * config.cluster.num_workers


def evaluation_bundles(config: Config, num_actors: int | None = None) -> list[Bundle]:
    """What the actors of one evaluation take."""
    return [_bundle(config)] * (num_actors or config.cluster.eval_actors)


def _bundle(config: Config) -> Bundle:
    cluster = config.cluster
    bundle = {"CPU": cluster.cpus_per_worker}
    return bundle | ({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {})


def require_resources(
    bundles: Sequence[Bundle], placement: Placement = "PACK", *, what: str = "this"
) -> None:
    """See that the connected cluster could ever hold these bundles at once.

    All resources count, also those in use: what is in use becomes free, what is not there never
    comes. A cluster that grows on demand is judged by its present size.

    Raises:
        ClusterError: it cannot; says what was asked and what there is, node by node.
    """
    shortfall = find_shortfall(cluster_nodes(), bundles, placement, what=what)
    if shortfall is not None:
        raise shortfall


def find_shortfall(
    nodes: Sequence[Node], bundles: Sequence[Bundle], placement: Placement, *, what: str = "this"
) -> ClusterError | None:
    """Why nodes can never hold bundles at once; None where they can."""
    asked = f"{what} asks for {_describe_bundles(bundles)}"
    if placement == "STRICT_PACK":
        asked += " on one node"
    elif placement == "STRICT_SPREAD":
        asked += " on a node each"
    there = f"the cluster has {_describe_nodes(nodes)}"
    wanted = _sum(bundles)
    total = _sum([n.resources for n in nodes])
    missing = [name for name, amount in wanted.items() if total.get(name, 0.0) < amount - 1e-9]
    if "GPU" in missing and not total.get("GPU"):
        return ClusterError(
            f"{asked}, but {there}: there is no GPU",
            "join a cluster with GPUs (--address), or compute on CPUs with "
            "--set cluster.gpus_per_worker=0",
        )
    if missing:
        return ClusterError(f"{asked}, but {there}", _lower_or_join(missing[0]))
    if not fits(nodes, bundles, placement):
        remedy = _lower_or_join(next(iter(wanted)))
        if placement in ("STRICT_PACK", "STRICT_SPREAD"):
            remedy = f"set cluster.placement to PACK, or {remedy}"
        return ClusterError(f"{asked}, but {there}", remedy)
    return None


def _lower_or_join(resource: str) -> str:
    knob = {"CPU": "cluster.cpus_per_worker", "GPU": "cluster.gpus_per_worker"}.get(resource)
    fewer = "ask for fewer workers" + (f" or a smaller {knob}" if knob else "")
    return f"{fewer}, or join a larger cluster with --address"


def fits(nodes: Sequence[Node], bundles: Sequence[Bundle], placement: Placement) -> bool:
    """Whether bundles go onto nodes; greedy, exact where all bundles are equal."""
    if placement == "STRICT_PACK":
        return any(_holds(n.resources, _sum(bundles)) for n in nodes)
    free = [dict(n.resources) for n in nodes]
    used: set[int] = set()
    for bundle in sorted(bundles, key=lambda b: -max(b.values(), default=0.0)):
        places = [
            i
            for i, resources in enumerate(free)
            if _holds(resources, bundle) and not (placement == "STRICT_SPREAD" and i in used)
        ]
        if not places:
            return False
        used.add(places[0])
        for name, amount in bundle.items():
            free[places[0]][name] -= amount
    return True


def _holds(resources: Mapping[str, float], wanted: Bundle) -> bool:
    return all(resources.get(name, 0.0) >= amount - 1e-9 for name, amount in wanted.items())


def _sum(bundles: Sequence[Bundle]) -> dict[str, float]:
    names = dict.fromkeys(name for bundle in bundles for name in bundle)
    return {name: sum(bundle.get(name, 0.0) for bundle in bundles) for name in names}


def _describe_bundles(bundles: Sequence[Bundle]) -> str:
    kinds: dict[str, int] = {}
    for bundle in bundles:
        text = " and ".join(_amount(name, amount) for name, amount in bundle.items())
        kinds[text] = kinds.get(text, 0) + 1
    return " and ".join(f"{count} x ({text})" for text, count in kinds.items())


def _describe_nodes(nodes: Sequence[Node]) -> str:
    texts = [
        f"{n.name}: {_amount('CPU', n.resources.get('CPU', 0.0))}, "
        f"{_amount('GPU', n.resources.get('GPU', 0.0))}"
        for n in nodes
    ]
    more = len(texts) - SHOWN_NODES
    shown = texts[:SHOWN_NODES] + ([f"{more} more"] if more > 0 else [])
    return f"{len(nodes)} node{'s' * (len(nodes) != 1)} [{'; '.join(shown)}]"


def _amount(name: str, amount: float) -> str:
    return f"{amount:g} {name}{'s' * (amount != 1 and name in ('CPU', 'GPU'))}"
