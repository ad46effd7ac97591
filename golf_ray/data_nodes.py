"""A published data set on every node of a cluster: each fetches it, or sees that it has it.

One task a node, to the same folder on all. Where that folder is a mount that nodes share, the
first fetches and the others find its files. What one node fetches and checks is the business of
`golf_ray.data.fetch`.

Invariant: every living node is named as having the same commit's files, or with what went wrong;
one that fails keeps no other from ending.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from golf_ray.errors import DataError, GolfRayError
from golf_ray.nodes import NodeFailure, run_on_nodes
from golf_ray.resources import Node, cluster_nodes

if TYPE_CHECKING:
    from golf_ray.data.fetch import FetchReport, RepoLayout

TELL_S = 0.5
"""Seconds at least between two words of a node on how far it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchOrder:
    """What every node is to fetch; see `golf_ray.data.fetch.fetch_dataset`."""

    repo: str
    variant: str
    train_shards: int | None
    out_dir: str
    """The same absolute path on every node."""
    endpoint: str | None
    revision: str
    layout: RepoLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeProgress:
    """How far a node is."""

    stage: str
    """`wait` while another node fetches into the same folder, `fetch`."""
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeFetch:
    """What became of a node's fetch."""

    node: str
    report: FetchReport | None
    """None where it has not got the data."""
    problem: str = ""
    remedy: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        found = {} if self.report is None else dataclasses.asdict(self.report)
        plain = {name: str(v) if isinstance(v, Path) else v for name, v in found.items()}
        said = {"problem": self.problem, "remedy": self.remedy} if self.problem else {}
        return {"node": self.node, "ok": self.report is not None, **said, **plain}


OnProgress = Callable[[Mapping[str, NodeProgress]], None]
"""Called about twice a second with the nodes that are at work, by name."""


def fetch_on_nodes(
    order: FetchOrder,
    *,
    on_progress: OnProgress | None = None,
    on_done: Callable[[NodeFetch], None] | None = None,
) -> list[NodeFetch]:
    """Fetch onto every living node of the connected cluster.

    Args:
        on_done: called with each node's outcome when it ends.

    Returns:
        One outcome a node, the head's first.
    """
    from trainers.ray_channel import Channel

    nodes = cluster_nodes()
    run_key = f"fetch/{uuid.uuid4().hex}"
    working = {node.name: Channel(_key(run_key, node)) for node in nodes}

    def poll() -> None:
        if on_progress is not None:
            said = {name: channel.progress() for name, channel in working.items()}
            on_progress({name: _progress(m) for name, m in said.items() if m is not None})

    def ended(node: Node, answer: Any) -> None:
        working.pop(node.name, None)
        if on_done is not None:
            on_done(_outcome(node, answer))

    try:
        answers = run_on_nodes(
            fetch_here,
            nodes,
            lambda node: (order, _key(run_key, node)),
            on_poll=poll,
            on_answer=ended,
        )
    finally:
        Channel(run_key).clear()
    return same_commit([_outcome(n, answer) for n, answer in zip(nodes, answers, strict=True)])


def same_commit(found: Sequence[NodeFetch]) -> list[NodeFetch]:
    """Turn nodes that fetched another commit than most into failures: pure.

    A branch may move while nodes ask for it one after the other.
    """
    revisions = Counter(f.report.revision for f in found if f.report is not None)
    if len(revisions) < 2:
        return list(found)
    usual = revisions.most_common(1)[0][0]
    return [
        f
        if f.report is None or f.report.revision == usual
        else NodeFetch(
            node=f.node,
            report=None,
            problem=f"fetched commit {f.report.revision[:12]}, the others {usual[:12]}",
            remedy=f"fetch again with --revision {usual}",
        )
        for f in found
    ]


def require_all(found: Sequence[NodeFetch]) -> None:
    """See that every node has the data.

    Raises:
        DataError: one has not; the first of them with its reason, and how many there are.
    """
    failed = [f for f in found if f.report is None]
    if failed:
        many = f"{len(failed)} of {len(found)} nodes have not got the data: "
        raise DataError(f"{many}node {failed[0].node} {failed[0].problem}", failed[0].remedy)


def _outcome(node: Node, answer: FetchReport | GolfRayError | NodeFailure) -> NodeFetch:
    if isinstance(answer, NodeFailure):
        remedy = "mend or remove the node, then fetch again: what is there stays"
        return NodeFetch(node=node.name, report=None, problem=answer.reason, remedy=remedy)
    if isinstance(answer, GolfRayError):
        problem = f"says: {answer.problem}"
        return NodeFetch(node=node.name, report=None, problem=problem, remedy=answer.remedy)
    return NodeFetch(node=node.name, report=answer)


def _key(run_key: str, node: Node) -> str:
    return f"{run_key}/{node.node_id}"


def _progress(message: Mapping[str, Any]) -> NodeProgress:
    return NodeProgress(
        stage=message["stage"],
        done_bytes=message["done_bytes"],
        total_bytes=message["total_bytes"],
    )


# What runs on a node ----------------------------------------------------------------------------


def fetch_here(order: FetchOrder, run_key: str) -> FetchReport | GolfRayError:
    """Fetch onto this machine, telling the driver how far it is; an error comes back as a value."""
    from golf_ray.data.fetch import fetch_dataset
    from trainers.ray_channel import Channel

    channel = Channel(run_key)
    told_s = 0.0

    def tell(stage: str, done: int, total: int) -> None:
        nonlocal told_s
        now_s = time.monotonic()
        if now_s - told_s >= TELL_S:
            told_s = now_s
            channel.put_progress(stage=stage, done_bytes=done, total_bytes=total)

    try:
        return fetch_dataset(
            order.variant,
            order.train_shards,
            repo=order.repo,
            out_dir=order.out_dir,
            endpoint=order.endpoint,
            revision=order.revision,
            layout=order.layout,
            progress=tell,
        )
    except GolfRayError as error:
        return error
