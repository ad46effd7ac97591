"""Whether a cluster is large enough: the decision, with no cluster."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from golf_ray.presets import LAPTOP, RECORD
from golf_ray.resources import (
    Bundle,
    Node,
    evaluation_bundles,
    find_shortfall,
    training_bundles,
)


def node(number: int, cpus: float, gpus: float = 0.0) -> Node:
    resources = {"CPU": cpus, "memory": 1e9} | ({"GPU": gpus} if gpus else {})
    return Node(node_id=f"{number:08d}ffff", host="machine", resources=resources)


def test_what_fits_is_no_problem() -> None:
    nodes = [node(0, 4), node(1, 8, 8)]
    for placement in ("PACK", "STRICT_PACK", "SPREAD"):
        assert find_shortfall(nodes, training_bundles(RECORD), placement) is None
    assert find_shortfall(nodes, evaluation_bundles(LAPTOP, 3), "PACK") is None


def test_too_small_says_what_was_asked_and_what_there_is() -> None:
    error = find_shortfall([node(0, 2), node(1, 1)], [{"CPU": 1.0}] * 8, "PACK", what="training")
    assert error is not None
    assert str(error) == (
        "training asks for 8 x (1 CPU), but the cluster has 2 nodes [machine (00000000): 2 CPUs, "
        "0 GPUs; machine (00000001): 1 CPU, 0 GPUs]; ask for fewer workers or a smaller "
        "cluster.cpus_per_worker, or join a larger cluster with --address"
    )


def test_no_gpu_where_one_is_asked_for() -> None:
    error = find_shortfall([node(0, 64)], training_bundles(RECORD), "STRICT_PACK", what="training")
    assert error is not None
    assert "asks for 8 x (1 CPU and 1 GPU) on one node" in error.problem
    assert error.problem.endswith("there is no GPU")
    assert "cluster.gpus_per_worker=0" in error.remedy


def test_strict_pack_needs_one_node_that_holds_all() -> None:
    nodes = [node(0, 8, 4), node(1, 8, 4)]
    bundles = training_bundles(RECORD)
    assert find_shortfall(nodes, bundles, "PACK") is None
    error = find_shortfall(nodes, bundles, "STRICT_PACK")
    assert error is not None and "cluster.placement to PACK" in error.remedy


def test_strict_spread_needs_a_node_each() -> None:
    bundles: list[Bundle] = [{"CPU": 1.0}] * 2
    assert find_shortfall([node(0, 4), node(1, 4)], bundles, "STRICT_SPREAD") is None
    assert find_shortfall([node(0, 8)], bundles, "STRICT_SPREAD") is not None


def test_many_nodes_are_not_all_listed() -> None:
    error = find_shortfall([node(i, 1) for i in range(40)], [{"CPU": 64.0}], "PACK")
    assert error is not None and "36 more" in error.problem and len(str(error)) < 500


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    count=st.integers(1, 12),
    each=st.integers(1, 4),
)
def test_equal_bundles_fit_exactly_when_they_do(sizes: list[int], count: int, each: int) -> None:
    nodes = [node(i, float(size)) for i, size in enumerate(sizes)]
    bundles: list[Bundle] = [{"CPU": float(each)}] * count
    fits = sum(size // each for size in sizes) >= count
    assert (find_shortfall(nodes, bundles, "PACK") is None) == fits
    strict = max(sizes) >= each * count
    assert (find_shortfall(nodes, bundles, "STRICT_PACK") is None) == strict
