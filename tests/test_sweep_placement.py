"""Who gets a cluster's resources: decisions alone, and a simulation that nobody is starved in."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from golf_ray.resources import Bundle, Node, fits
from golf_ray.sweeps.placement import Decision, Request, Worker, decide, fits_beside

GPU = {"CPU": 1.0, "GPU": 1.0}


def node(name: str, gpus: float) -> Node:
    return Node(node_id=name, host=name, resources={"CPU": 2 * gpus, "GPU": gpus})


def training(number: int, workers: int = 8) -> Request:
    return Request(number=number, kind="training", bundles=(GPU,) * workers,
                   placement="STRICT_PACK")  # fmt: skip


def light(number: int) -> Request:
    return Request(number=number, kind="light", bundles=(GPU,))


def test_a_training_goes_before_light_work_that_came_first() -> None:
    found = decide([light(1), training(2)], [node("a", 8)], [], GPU)
    assert found == Decision(grant=2)


def test_idle_workers_make_room_and_busy_ones_are_waited_for() -> None:
    workers = [Worker(number=1, node_id="a", busy=False), Worker(number=2, node_id="a", busy=True)]
    free = [node("a", 6)]
    assert decide([training(5), light(6)], free, workers, GPU) == Decision()
    workers[1] = replace(workers[1], busy=False)
    assert decide([training(5), light(6)], free, workers, GPU) == Decision(stop=(1, 2))


def test_light_work_goes_on_while_a_training_waits_for_another() -> None:
    # The other training has all of node a; node b has 2 GPUs, which will never hold 8 workers.
    free = [node("a", 0), node("b", 2)]
    assert decide([training(1), light(2), light(3), light(4)], free, [], GPU) == Decision(start=2)


def test_trainings_start_side_by_side_where_there_is_room_for_all() -> None:
    whole = [node(name, 8) for name in "abc"]
    first, second, third, fourth = (training(n) for n in range(1, 5))
    assert decide([second, fourth], whole, [], GPU, pending=[first]).grant == 2
    assert decide([third, fourth], whole, [], GPU, pending=[first, second]).grant == 3
    none = decide([fourth, light(5)], whole, [], GPU, pending=[first, second, third])
    assert none == Decision(), "no light work before the fourth, which may fit in a moment"
    # The first has its node by now, and the other two may be on their way to the same two.
    seen = [node("a", 0), node("b", 8), node("c", 8)]
    assert decide([third], seen, [], GPU, pending=[first, second]) == Decision()
    assert decide([third], seen, [], GPU, pending=[second]).grant == 3


def test_light_work_begins_beside_a_training_that_is_on_its_way() -> None:
    free = [node("a", 8), node("b", 2)]
    assert decide([light(1), light(2), light(3)], free, [], GPU, pending=[training(9)]).start == 2


def test_nothing_is_granted_while_a_worker_or_what_would_be_in_the_way_starts() -> None:
    assert decide([training(1)], [node("a", 8)], [], GPU, starting=1) == Decision()
    found = decide([training(1), light(2)], [node("a", 8)], [], GPU, pending=[training(9)])
    assert found == Decision()


@given(st.data())
def test_what_is_granted_fits_wherever_the_others_go(data: st.DataObject) -> None:
    sizes = st.integers(0, 8)
    nodes = [node(f"n{i}", n) for i, n in enumerate(data.draw(st.lists(sizes, max_size=5)))]

    def request(number: int) -> Request:
        gpus = data.draw(st.sampled_from([0.5, 1.0, 2.0]))
        return Request(
            number=number,
            kind="training",
            bundles=({"CPU": gpus, "GPU": gpus},) * data.draw(st.integers(1, 6)),
            placement=data.draw(st.sampled_from(["PACK", "STRICT_PACK", "SPREAD"])),
        )

    pending = [request(i) for i in range(data.draw(st.integers(0, 3)))]
    wanted = request(9)
    if not fits_beside(nodes, wanted.bundles, wanted.placement, pending):
        return
    left = {n.node_id: dict(n.resources) for n in nodes}

    def take(bundles: tuple[Bundle, ...], place: str) -> bool:
        if not fits([Node(node_id=place, host=place, resources=left[place])], bundles, "PACK"):
            return False
        for bundle in bundles:
            for name, amount in bundle.items():
                left[place][name] -= amount
        return True

    for other in pending:
        together = other.placement == "STRICT_PACK"
        for bundles in [other.bundles] if together else [(b,) for b in other.bundles]:
            # Ray puts it anywhere; what fits nowhere waits and takes nothing.
            for place in data.draw(st.permutations(sorted(left))):
                if take(bundles, place):
                    break
    now = [Node(node_id=name, host=name, resources=free) for name, free in left.items()]
    assert fits(now, wanted.bundles, wanted.placement)


def test_warm_workers_are_handed_on() -> None:
    workers = [Worker(number=7, node_id="a", busy=False)]
    found = decide([light(3), light(2)], [node("a", 1)], workers, GPU)
    assert found == Decision(assign={2: 7}, start=1)


@given(
    st.lists(st.sampled_from(["training", "pool", "light"]), min_size=1, max_size=14),
    st.integers(1, 3),
    st.integers(0, 2**32 - 1),
)
def test_everything_is_granted_in_the_end_and_never_too_much(
    kinds: list[str], num_nodes: int, seed: int
) -> None:
    import random

    draw = random.Random(seed)
    whole = [node(f"n{i}", 4) for i in range(num_nodes)]
    waiting = []
    for i, kind in enumerate(kinds):
        placement = "STRICT_PACK" if kind == "training" else "PACK"
        large = replace(training(i, 4), kind=kind, placement=placement)
        waiting.append(light(i) if kind == "light" else large)
    order = [r.number for r in waiting if r.kind == "training"]
    used: dict[str, float] = {n.node_id: 0.0 for n in whole}
    running: list[tuple[Request, list[str]]] = []
    workers: dict[int, Worker] = {}
    granted: list[int] = []
    for turn in range(400):
        free = [node(n.node_id, 4 - used[n.node_id]) for n in whole]
        found = decide(waiting, free, list(workers.values()), GPU)
        for number in found.stop:
            used[workers.pop(number).node_id] -= 1
        for _ in range(found.start):
            place = next(n for n, amount in used.items() if amount < 4)
            used[place] += 1
            workers[1000 + turn * 10 + len(workers)] = Worker(
                number=1000 + turn * 10 + len(workers), node_id=place, busy=False
            )
        for number, worker in found.assign.items():
            [request] = [r for r in waiting if r.number == number]
            waiting.remove(request)
            workers[worker] = replace(workers[worker], busy=True)
            running.append((request, [str(worker)]))
            granted.append(number)
        if found.grant is not None:
            [request] = [r for r in waiting if r.number == found.grant]
            waiting.remove(request)
            assert fits(free, request.bundles, request.placement)
            places: list[str] = []
            for name in sorted(used, key=lambda n: used[n]):
                while used[name] < 4 and len(places) < len(request.bundles):
                    used[name] += 1
                    places.append(name)
            running.append((request, places))
            granted.append(request.number)
        assert all(amount <= 4 for amount in used.values())
        if running and draw.random() < 0.5:
            request, places = running.pop(draw.randrange(len(running)))
            if request.kind == "light":
                worker = int(places[0])
                workers[worker] = replace(workers[worker], busy=False)
            else:
                for name in places:
                    used[name] -= 1
        if not waiting:
            break
    assert not waiting, (waiting, used, workers)
    assert [n for n in granted if n in order] == order
