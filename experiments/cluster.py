"""Runs sessions on the nodes of a Ray cluster and brings their records back. Ray runs sessions; it never runs a step.

Records come back trial by trial, so no shared file system is needed and the driver holds one of them at a time.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments import gpus, worker
from experiments.expand import Session
from experiments.local_ray import ray_cluster as ray_cluster  # again, for who runs sessions
from experiments.placement import Node, Place, choose_machines, longest_first, take
from experiments.provenance import machine
from experiments.session import TrialResult
from experiments.workload import Trace

ATTEMPTS = 3  # a trial, or the loading of an engine, in which a session dies so often is given up
ASK_S = 60.0  # in which a node must say what it is
REFRESH_S = 5.0  # between two looks at which nodes there are
SUSPECT_S = 20.0  # a node on which a session died is left alone for as long as others can take it: it may be going
PATIENCE_S = 60.0  # in which nodes may come back when no node can hold what is left

Work = Callable[[Session, Sequence[str], Trace | None], Iterator[TrialResult | None]]


@dataclass(frozen=True)
class Report:
    """Where results and words go: a finished trial; a line for people; the log of what died, its name and text."""

    store: Callable[[TrialResult], None]
    say: Callable[[str], None]
    log: Callable[[str, str], object] = lambda _name, _text: None


def machine_type() -> str:
    """The type of the machine that this runs on."""
    return str(machine()["type"])


class Fleet:
    """The nodes that are there: their types, what is free of them, which of them are not to be trusted for a while."""

    def __init__(self, ray: Any, say: Callable[[str], None]) -> None:
        self._ray, self._say = ray, say
        self._names: dict[str, str] = {}
        self._suspects: dict[str, float] = {}
        self.nodes: list[Node] = []
        self.refresh()

    def refresh(self) -> None:
        """Drop nodes that are gone, add those that came."""
        # A driver's own node has no cores.
        alive = {node["NodeID"]: node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU")}
        self.nodes = [node for node in self.nodes if node.id in alive]
        new = sorted(set(alive) - {node.id for node in self.nodes})
        for key, kind in self._types(new).items():
            name = self._names.setdefault(key, f"node-{len(self._names) + 1}")
            self.nodes.append(Node(key, name, kind, alive[key]["Resources"]))

    def _types(self, ids: Sequence[str]) -> dict[str, str]:
        """Types of machines; a node that does not answer is left out. A Ray that was started here is this machine."""
        if not os.environ.get("RAY_ADDRESS"):
            return dict.fromkeys(ids, machine_type())
        ask = self._ray.remote(num_cpus=0, max_retries=0)(machine_type)
        asked = {ask.options(scheduling_strategy=_on(key)).remote(): key for key in ids}
        found = {}
        for answer in self._ray.wait([*asked], num_returns=len(asked), timeout=ASK_S)[0] if asked else ():
            try:
                found[asked[answer]] = self._ray.get(answer)
            except self._ray.exceptions.RayError as error:
                self._say(f"a node was left out: it does not say what it is ({_reason(error)})")
        return found

    def suspect(self, node: Node) -> None:
        """Something died there."""
        self._suspects[node.id] = time.monotonic() + SUSPECT_S

    def take(self, session: Session, machine: str) -> Place | None:
        """See placement.take; suspects only where nobody else could ever hold the session."""
        calm = [node for node in self.nodes if self._suspects.get(node.id, 0.0) < time.monotonic()]
        trusted = any(node.wants(session) for node in calm if node.machine == machine)
        return take(session, calm if trusted else self.nodes, machine)


def run_sessions(
    ray: Any,
    sessions: Sequence[Session],
    owed: Mapping[str, Sequence[str]],
    trace: Trace | None,
    report: Report,
    fleet: Fleet | None = None,
    machines: Mapping[str, str] | None = None,
    seconds: Mapping[str, float] | None = None,
    work: Work | None = None,
) -> dict[str, str]:
    """Run what is owed (session -> trials), storing each record as it comes, longest session first.

    machines: model -> type of machine, chosen here if not given. seconds: session -> duration, else the sessions' estimates.
    work: what a session's process does, experiments.worker.work if not given.
    Returns session, or session/trial -> reason for what could not be run. Raises SpecError for a session that no node could
    hold, before any is started.
    """
    due = [session for session in sessions if owed.get(session.name)]
    fleet = fleet or Fleet(ray, report.say)
    seconds = seconds or {session.name: session.estimate_s for session in due}
    machines = machines or choose_machines(due, seconds, fleet.nodes, {})
    crew = _Crew(ray, fleet, machines, trace, report, work or worker.work)
    return crew.run(longest_first(due, seconds), {session.name: list(owed[session.name]) for session in due})


class _Crew:
    """The sessions at work: which wait, which run where, what each still owes, how often it died and in what."""

    def __init__(
        self, ray: Any, fleet: Fleet, machines: Mapping[str, str], trace: Trace | None, report: Report, work: Work
    ) -> None:
        self._ray, self._fleet, self._machines, self._report = ray, fleet, machines, report
        self._remote = ray.remote(max_calls=1)(work)  # a fresh process each time: one engine, one process
        self._trace = ray.put(trace)
        self._running: dict[Any, tuple[Session, Place]] = {}
        self._loaded: set[str] = set()
        self._deaths: Counter[tuple[str, str]] = Counter()
        self._heard: dict[str, float] = {}
        self._failed: dict[str, str] = {}

    def run(self, waiting: list[Session], left: dict[str, list[str]]) -> dict[str, str]:
        self._waiting, self._left = waiting, left
        refreshed = stuck = time.monotonic()
        while self._waiting or self._running:
            for session in tuple(self._waiting):
                if place := self._fleet.take(session, self._machines[session.model]):
                    self._waiting.remove(session)
                    self._running[self._start(session, place)] = session, place
            if self._running:
                ready, _ = self._ray.wait([*self._running], num_returns=1, timeout=REFRESH_S, fetch_local=False)
                for stream in ready:
                    self._hear(stream)
                stuck = time.monotonic()
            else:
                time.sleep(1.0)
            if time.monotonic() - refreshed > REFRESH_S:
                self._fleet.refresh()
                refreshed = time.monotonic()
            if refreshed - stuck > PATIENCE_S:
                self._give_up()
        return self._failed

    def _start(self, session: Session, place: Place) -> Any:
        options = options_of(session, place)
        self._loaded.discard(session.name)
        self._heard[session.name] = time.monotonic()
        return self._remote.options(**options).remote(session, tuple(self._left[session.name]), self._trace)

    def _hear(self, stream: Any) -> None:
        """Take what a session has to give: that it is loaded, a result, its end, its death."""
        session, place = self._running[stream]
        try:
            result = self._ray.get(next(stream))
        except StopIteration:
            self._end(stream)
        except self._ray.exceptions.RayError as error:
            self._end(stream)
            self._died(session, place.node, error)
        else:
            self._heard[session.name] = time.monotonic()
            if result is None:
                self._loaded.add(session.name)
                return
            result.facts["node"] = place.node.name
            self._report.store(result)
            self._left[session.name].remove(result.trial)

    def _end(self, stream: Any) -> None:
        self._running.pop(stream)[1].give_back()

    def _died(self, session: Session, node: Node, error: Exception) -> None:
        """Start it again for what it owes, without the trial in which it died too often."""
        name, left, silent = session.name, self._left[session.name], time.monotonic() - self._heard[session.name]
        reason = _reason(error) + (f"; hung, no result in {silent:.0f} s" if silent > session.time_limit_s else "")
        self._report.log(name, str(error))
        self._fleet.suspect(node)
        self._fleet.refresh()
        trial = left[0] if name in self._loaded and left else ""
        self._deaths[name, trial] += 1
        if (deaths := self._deaths[name, trial]) < ATTEMPTS:
            where = "" if node in self._fleet.nodes else f"; {node.name} is lost"
            again = f"attempt {deaths + 1} of {ATTEMPTS} for its {len(left)} trials left"
            self._report.say(f"{name} died ({reason}{where}); {again}")
        elif trial:
            self._failed[f"{name}/{left.pop(0)}"] = f"the session died in it {ATTEMPTS} times: {reason}"
        else:
            self._failed[name] = f"{len(left)} trials missing after {ATTEMPTS} attempts to start: {reason}"
            left.clear()
        if left:
            self._waiting.insert(0, session)

    def _give_up(self) -> None:
        """What waits although nothing runs, for so long that no node will come for it."""
        for session in self._waiting:
            left = self._left[session.name]
            kind = self._machines[session.model]
            self._failed[session.name] = f"{len(left)} trials missing: no node of type {kind} with room for it is left"
        self._waiting.clear()


def options_of(session: Session, place: Place) -> dict[str, Any]:
    """What a session asks of Ray: what it takes of its node, and that node."""
    from experiments.vllm_engine import environment

    variables = environment(session.engine)
    if session.engine.platform == "cuda":
        # nvidia-smi counts by PCI bus, CUDA by speed unless told. Ray leaves the variable alone as no GPU is asked of it.
        variables |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": gpus.devices(place.takes)}
    own = {name: amount for name, amount in place.takes.items() if name not in ("CPU", "memory")}
    return {
        "name": f"{session.figure}/{session.name}",
        "num_returns": "streaming",
        "max_retries": 0,
        "num_cpus": place.takes["CPU"],
        "num_gpus": 0,
        "memory": int(place.takes["memory"]),
        "resources": own,
        "runtime_env": {"env_vars": variables},
        "scheduling_strategy": _on(place.node.id),
        "_generator_backpressure_num_objects": 2,
    }


def _on(node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


def _reason(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    last = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {last[-1][:200] if last else 'no message'}"
