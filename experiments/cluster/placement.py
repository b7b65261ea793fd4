"""Which session runs on which node, and when: longest first, each on the first node that has room for it. Pure.

The driver places by this and `make plan` foretells by it, so that a run differs from its plan only by how long things take.
All sessions of a model run on one type of machine: replicates on unlike machines could not be compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from experiments.machine import gpus
from experiments.records.errors import SpecError
from experiments.spec.expand import Session

GIB = 2.0**30


@dataclass
class Node:
    """A machine of the cluster: Ray's id, the name it has in records (no host names), its type, its Ray resources."""

    id: str
    name: str
    machine: str
    total: Mapping[str, float]
    free: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.free = dict(self.total)

    @property
    def cards(self) -> list[str]:
        """Its GPUs, always in the same order."""
        return gpus.in_order(self.total)

    def wants(self, session: Session) -> list[dict[str, float]]:
        """The sets of resources that the session could run with here, were nothing else running; empty if it cannot.

        On GPUs a GPU or a set joined by NVLink, and for each GPU its share of the cores, so that an engine that compiles while
        it loads does not disturb one that measures; on CPUs all cores.
        """
        gpu, memory = session.engine.platform == "cuda", session.memory_gib * GIB
        cores = self.total.get("CPU", 0.0)
        if gpu:
            cores = float(session.engine.tensor_parallel * max(1, cores // max(1, len(self.cards))))
        places = gpus.places(session.engine.tensor_parallel, self.total, session.nvlink) if gpu else [()]
        sets = [dict.fromkeys(place, 1.0) | {"CPU": cores, "memory": memory} for place in places]
        return [takes for takes in sets if cores and all(self.total.get(name, 0) >= takes[name] for name in takes)]


@dataclass(frozen=True)
class Place:
    """Where a session runs, and what it takes there."""

    node: Node
    takes: Mapping[str, float]

    def share_of_cores(self) -> str:
        """Which parts of the node's cores go with the GPUs taken, see experiments.engine.worker.CORES; "" without a GPU."""
        own = [str(number) for number, name in enumerate(self.node.cards) if name in self.takes]
        return f"{','.join(own)}/{len(self.node.cards)}" if own else ""

    def give_back(self) -> None:
        """The session has ended."""
        for name, amount in self.takes.items():
            self.node.free[name] += amount


@dataclass(frozen=True)
class Slot:
    """A session in a plan: name, node, seconds from the start of the run."""

    session: str
    node: str
    start_s: float
    end_s: float


def take(session: Session, nodes: Iterable[Node], machine: str) -> Place | None:
    """Room for the session on the first of these nodes, of that type, that has it; None if all are busy."""
    for node in nodes:
        for takes in node.wants(session) if node.machine == machine else ():
            if all(node.free[name] >= takes[name] for name in takes):
                for name, amount in takes.items():
                    node.free[name] -= amount
                return Place(node, takes)
    return None


def foretell(
    sessions: Sequence[Session], seconds: Mapping[str, float], nodes: Sequence[Node], machines: dict[str, str], now: float = 0
) -> list[Slot]:
    """The schedule of these sessions on idle nodes from `now` on, longest first, in the order in which they start.

    seconds: session -> duration. machines: model -> type of machine, on which every session must have room.
    """
    nodes = [replace(node) for node in nodes]
    waiting, slots = longest_first(sessions, seconds), list[Slot]()
    running: list[tuple[float, Place]] = []
    while waiting or running:
        for session in tuple(waiting):
            if place := take(session, nodes, machines[session.model]):
                waiting.remove(session)
                end = now + seconds[session.name]
                slots.append(Slot(session.name, place.node.name, now, end))
                running.append((end, place))
        running.sort(key=lambda ending: ending[0])
        now, place = running.pop(0)
        place.give_back()
    return slots


def longest_first(sessions: Iterable[Session], seconds: Mapping[str, float]) -> list[Session]:
    """In the order in which they are to start."""
    return sorted(sessions, key=lambda session: -seconds[session.name])


def makespan(slots: Sequence[Slot]) -> float:
    """Seconds from the start of a schedule to its end."""
    return max((slot.end_s for slot in slots), default=0.0)


def choose_machines(
    sessions: Sequence[Session], seconds: Mapping[str, float], nodes: Sequence[Node], fixed: Mapping[str, str]
) -> dict[str, str]:
    """Model -> the type of machine for all its sessions, so that the whole takes the least time.

    fixed: types on which a model has finished trials. Raises SpecError for a session that no node could ever hold.
    """
    models = dict.fromkeys(session.model for session in sessions)
    types = list(dict.fromkeys(node.machine for node in nodes))
    possible = {model: [fixed[model]] if model in fixed else types for model in models}
    for session in sessions:
        able = [m for m in possible[session.model] if any(n.wants(session) for n in nodes if n.machine == m)]
        if not able:
            raise SpecError(_impossible(session, nodes, fixed.get(session.model)))
        possible[session.model] = able
    choices = [dict(zip(models, types, strict=True)) for types in itertools.product(*possible.values())]
    return min(choices, key=lambda types: makespan(foretell(sessions, seconds, nodes, types)))


def _impossible(session: Session, nodes: Sequence[Node], fixed: str | None) -> str:
    """Why no node can hold the session, and what would help."""
    name, parallel = f"{session.model}: cluster of {len(nodes)} node{'s'[: len(nodes) != 1]}", session.engine.tensor_parallel
    types = {node.machine for node in nodes}
    if fixed and fixed not in types:
        got = ", ".join(sorted(types))
        return f"{name}: got {got}; its finished trials are of {fixed}: add such a node, or choose another OUT"
    if session.engine.platform == "cuda":
        if not any(resource.startswith(gpus.GPU) for node in nodes for resource in node.total):
            start = 'ray start --resources="$(python -m experiments.machine.gpus)"'
            return f"{name}: no free GPU is declared (make doctor lists them all); start each node with: {start}"
        if not any(gpus.places(parallel, node.total, session.nvlink) for node in nodes):
            wanted = f"{gpus.kind_of_place(parallel, session.nvlink)} on one node; nvidia-smi topo -m shows none"
            return f"{name}: tensor parallel size {parallel} needs {wanted}"
    cores, memory = (max((node.total.get(kind, 0.0) for node in nodes), default=0.0) for kind in ("CPU", "memory"))
    have = f"{memory / GIB:.1f} GiB and {cores:g} cores at most"
    return f"{name}: got {have}; a session needs {session.memory_gib:g} GiB on one node"
