"""Which session runs where and when: on nodes as data, no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.cluster import cluster
from experiments.cluster.placement import GIB, Node, choose_machines, foretell, longest_first, makespan, take
from experiments.records.errors import SpecError
from experiments.spec.expand import Session, expand
from experiments.spec.spec import load_figure, load_testbed

PAIR = {"gpu-0": 1.0, "gpu-1": 1.0, "nvlink-0-1": 1.0}
SESSIONS = {s.model: s for s in expand(load_figure("fig9a"), load_testbed("a100"), 1)}
ONE, TWO = SESSIONS["mistral-7b"], SESSIONS["yi-34b-200k"]
ON_CPU = expand(load_figure("smoke"), load_testbed("cpu"), 1)[0]


def node(name: str, machine: str = "A100 x 2", cores: float = 8.0, gib: float = 128.0, **more: float) -> Node:
    return Node(name, name, machine, {"CPU": cores, "memory": gib * GIB, **{k.replace("_", "-"): v for k, v in more.items()}})


def gpu_node(name: str, machine: str = "A100 x 2") -> Node:
    return Node(name, name, machine, {"CPU": 8.0, "memory": 128 * GIB, **PAIR})


def copies(session: Session, count: int) -> list[Session]:
    return [replace(session, name=f"{session.name}-{n}") for n in range(count)]


def test_both_gpus_of_a_pair_are_on_one_node() -> None:
    alone = node("a", gpu_0=1.0), node("b", gpu_1=1.0)
    assert take(TWO, alone, "A100 x 2") is None
    first = take(ONE, alone, "A100 x 2")
    second = take(ONE, alone, "A100 x 2")
    assert first
    assert second
    assert [first.node.name, second.node.name] == ["a", "b"]
    assert take(ONE, alone, "A100 x 2") is None
    first.give_back()
    again = take(ONE, alone, "A100 x 2")
    assert again
    assert again.node.name == "a"
    both = take(TWO, [*alone, gpu_node("c")], "A100 x 2")
    assert both
    assert set(PAIR) < set(both.takes)
    assert both.takes["CPU"] == 8
    assert both.takes["memory"] == TWO.memory_gib * GIB


def test_two_sessions_on_four_gpus_each_share_an_nvswitch() -> None:
    sets = {"nvlink-0-1-2-3": 1.0, "nvlink-4-5-6-7": 1.0, **{f"nvlink-{n}-{n + 1}": 1.0 for n in (0, 2, 4, 6)}}
    eight = Node("a", "a", "H100 x 8", {"CPU": 64.0, "memory": 1024 * GIB, **{f"gpu-{n}": 1.0 for n in range(8)}, **sets})
    four = replace(TWO, engine=replace(TWO.engine, tensor_parallel=4))
    first, second, third = (take(four, [eight], "H100 x 8") for _ in range(3))
    assert first
    assert second
    assert third is None
    assert [place.share_of_cores() for place in (first, second)] == ["0,1,2,3/8", "4,5,6,7/8"]
    assert take(ONE, [eight], "H100 x 8") is None
    second.give_back()
    pair = take(TWO, [eight], "H100 x 8")
    assert pair
    assert pair.share_of_cores() == "4,5/8"
    assert take(four, [eight], "H100 x 8") is None  # two of its four are taken


def test_advice_takes_gpus_without_nvlink_and_a_figure_does_not() -> None:
    four = node("a", "L40S x 4", gpu_0=1.0, gpu_1=1.0, gpu_2=1.0, gpu_3=1.0)
    assert take(TWO, [four], "L40S x 4") is None
    places = [take(replace(TWO, nvlink=False), [four], "L40S x 4") for _ in range(3)]
    assert [place.share_of_cores() if place else "" for place in places] == ["0,1/4", "2,3/4", ""]


def test_each_gpu_has_its_share_of_the_cores() -> None:
    """An engine that loads compiles on its own cores, not on those of one that measures."""
    four = node("a", cores=18.0, gpu_0=1.0, gpu_1=1.0, gpu_2=1.0, gpu_10=1.0, nvlink_0_1=1.0)
    pair, *alone = [take(session, [four], "A100 x 2") for session in (TWO, ONE, ONE)]
    assert [place.takes["CPU"] for place in (pair, *alone) if place] == [8.0, 4.0, 4.0]
    assert [place.share_of_cores() for place in (pair, *alone) if place] == ["0,1/4", "2/4", "3/4"]
    few = node("b", cores=2.0, gpu_0=1.0, gpu_1=1.0, gpu_2=1.0)
    assert [place.takes["CPU"] if (place := take(ONE, [few], "A100 x 2")) else 0.0 for _ in range(3)] == [1.0, 1.0, 0.0]
    place = take(ON_CPU, [node("c", "cpu")], "cpu")
    assert place
    assert place.share_of_cores() == ""


def test_ray_hands_a_session_its_gpus_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_on", str)
    place = take(TWO, [gpu_node("a")], "A100 x 2")
    assert place
    variables = cluster.options_of(TWO, place)["runtime_env"]["env_vars"]
    own = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "0,1", "ENGINE_CORES": "0,1/2"}
    assert own.items() <= variables.items()
    on_cpu = take(ON_CPU, [node("b", "cpu")], "cpu")
    assert on_cpu
    assert not own.keys() & cluster.options_of(ON_CPU, on_cpu)["runtime_env"]["env_vars"].keys()


def test_a_session_on_cpus_has_a_node_to_itself() -> None:
    nodes = [node("a", "cpu"), node("b", "cpu", gib=1.0)]
    place = take(ON_CPU, nodes, "cpu")
    assert place
    assert place.node.name == "a"
    assert place.node.free["CPU"] == 0
    assert take(ON_CPU, nodes, "cpu") is None  # b has too little memory


def test_what_no_node_could_ever_hold_is_told_at_once() -> None:
    seconds = {ONE.name: 1.0, TWO.name: 1.0, ON_CPU.name: 1.0}
    for sessions, nodes, fixed, words in (
        ([ONE], [node("a")], {}, r"no free GPU is declared .*; start each node with: ray start --resources="),
        ([TWO], [node("a", gpu_0=1.0), node("b", gpu_0=1.0)], {}, "needs a pair of GPUs joined by NVLink on one node"),
        ([ON_CPU], [node("a", gib=0.5)], {}, "got 0.5 GiB and 8 cores at most; a session needs"),
        ([TWO], [replace(gpu_node("a"), total={"CPU": 1.0, "memory": 128 * GIB, **PAIR})], {}, "1 cores at most"),
        ([ONE], [gpu_node("a", "H100 x 2")], {ONE.model: "A100 x 2"}, "finished trials are of A100 x 2: add such a node"),
    ):
        with pytest.raises(SpecError, match=words):
            choose_machines(sessions, seconds, nodes, fixed)


def test_models_go_to_the_types_that_make_the_whole_shortest_and_never_to_two() -> None:
    nodes = [gpu_node("a"), gpu_node("b"), node("c", "L4 x 2", gpu_0=1.0, gpu_1=1.0)]
    sessions = [*copies(TWO, 4), *copies(ONE, 4)]
    seconds = {session.name: 10.0 for session in sessions}
    machines = choose_machines(sessions, seconds, nodes, {})
    assert machines == {TWO.model: "A100 x 2", ONE.model: "L4 x 2"}
    slots = foretell(sessions, seconds, nodes, machines)
    assert {slot.node for slot in slots if ONE.model in slot.session} == {"c"}
    assert makespan(slots) == 20.0
    assert choose_machines(sessions, seconds, nodes, {ONE.model: "A100 x 2"})[ONE.model] == "A100 x 2"


def check_schedule(sessions: Sequence[Session], seconds: dict[str, float], nodes: Sequence[Node]) -> None:
    slots = foretell(sessions, seconds, nodes, dict.fromkeys({s.model for s in sessions}, "A100 x 2"))
    assert sorted(slot.session for slot in slots) == sorted(session.name for session in sessions)
    parallel = {session.name: session.engine.tensor_parallel for session in sessions}
    for slot in slots:
        assert slot.end_s == pytest.approx(slot.start_s + seconds[slot.session])
        at_once = [o for o in slots if o.node == slot.node and o.start_s <= slot.start_s < o.end_s]
        assert sum(parallel[other.session] for other in at_once) <= 2
    work = sum(seconds[name] * parallel[name] for name in seconds)
    longest = max(seconds.values())
    assert max(longest, work / (2 * len(nodes))) <= makespan(slots) + 1e-9
    assert (
        makespan(slots) <= work / len(nodes) + longest + 1e-9
    )  # a list schedule; half a pair may idle while a whole is wanted
    assert all(node.free == dict(node.total) for node in nodes), "foretelling took something"


@given(
    st.lists(st.tuples(st.sampled_from([ONE, TWO]), st.floats(1.0, 100.0)), min_size=1, max_size=12),
    st.integers(1, 4),
)
def test_every_session_once_and_no_gpu_twice(drawn: list[tuple[Session, float]], count: int) -> None:
    sessions = [replace(session, name=f"{number}") for number, (session, _) in enumerate(drawn)]
    seconds = {session.name: duration for session, (_, duration) in zip(sessions, drawn, strict=True)}
    check_schedule(sessions, seconds, [gpu_node(f"n{n}") for n in range(count)])


def test_longest_first() -> None:
    first, second, third = copies(ONE, 3)
    seconds = {first.name: 1.0, second.name: 3.0, third.name: 2.0}
    assert longest_first([first, second, third], seconds) == [second, third, first]
