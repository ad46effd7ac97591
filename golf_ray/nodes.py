"""One task on every node of the connected cluster, pinned there, and what became of each.

A thin executor for looking at nodes and for staging data on them. The tasks take no CPU or GPU
away from anybody and are never retried; what their answers mean is for the caller.

Invariant: every node that was asked about has one entry in the result, an answer or a failure.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from golf_ray.resources import Node

POLL_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeFailure:
    """Why a node gave no answer, in words that follow its name."""

    reason: str


def run_on_nodes(
    function: Callable[..., Any],
    nodes: Sequence[Node],
    arguments: Callable[[Node], tuple[Any, ...]],
    *,
    timeout_s: float | None = None,
    on_poll: Callable[[], None] | None = None,
    on_answer: Callable[[Node, Any], None] | None = None,
) -> list[Any]:
    """Call a function once on every node.

    Args:
        function: of the package, so that nodes import it and do not run a copy.
        arguments: what it is called with on a node.
        timeout_s: after which a node that is silent is given up; None waits.
        on_poll: called about twice a second while nodes are awaited.
        on_answer: called with a node and its answer as soon as it is there.

    Returns:
        An answer or a `NodeFailure` a node, in the order of the nodes.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task: Callable[..., Any] = ray.remote(function).options
    waiting = {
        task(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False),
        ).remote(*arguments(node)): node
        for node in nodes
    }
    answers: dict[str, Any] = {}
    began_s = time.monotonic()
    try:
        while waiting:
            ready, _ = ray.wait(list(waiting), timeout=POLL_S)
            for ref in ready:
                node = waiting.pop(ref)
                answers[node.node_id] = _answer(ref)
                if on_answer is not None:
                    on_answer(node, answers[node.node_id])
            if on_poll is not None:
                on_poll()
            if timeout_s is not None and time.monotonic() - began_s > timeout_s:
                break
    finally:
        for ref in waiting:
            # Also after Ctrl-C: a task that nobody waits for must not go on.
            with contextlib.suppress(ray.exceptions.RayError):
                ray.cancel(ref, force=True)
    silent = NodeFailure(reason=f"did not answer within {timeout_s or 0:g} s")
    return [answers.get(node.node_id, silent) for node in nodes]


def _answer(ref: Any) -> Any:
    import ray
    from ray import exceptions

    try:
        return ray.get(ref)
    except (exceptions.NodeDiedError, exceptions.TaskUnschedulableError):
        return NodeFailure(reason="left the cluster")
    except exceptions.WorkerCrashedError:
        return NodeFailure(reason="lost the process that was at work there")
    except exceptions.RayError as error:
        text = " ".join(str(error).split())
        if "No module named" in text:
            return NodeFailure(reason="cannot import golf_ray")
        return NodeFailure(reason=f"failed ({text[-160:]})")
