"""Runs sessions on the nodes of a Ray cluster and brings their records back. Ray runs sessions; it never runs a step.

Records come back trial by trial, so no shared file system is needed and the driver holds one of them at a time.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.cluster.local_ray import ray_cluster as ray_cluster  # again, for who runs sessions
from experiments.cluster.placement import Node, Place, choose_machines, longest_first, take
from experiments.engine import worker
from experiments.engine.session import TrialResult
from experiments.machine import gpus
from experiments.records.provenance import machine
from experiments.records.terminal import console
from experiments.spec.expand import Session
from experiments.spec.traces import Trace

ATTEMPTS = 3  # a trial, or the loading of an engine, in which a session dies so often is given up
ASK_S = 60.0  # in which a node must say what it is
REFRESH_S = 5.0  # between two looks at which nodes there are
SUSPECT_S = 20.0  # a node on which a session died is left alone for as long as others can take it: it may be going
PATIENCE_S = 60.0  # in which nodes may come back when no node can hold what is left

Work = Callable[[Session, Sequence[str], Trace | None], Iterator[TrialResult | None]]
Store = Callable[[TrialResult], None]
Log = Callable[[str, str], None]  # the name of a session that died, and what it said


def machine_type() -> str:
    """The type of the machine that this runs on."""
    return str(machine()["type"])


class Fleet:
    """The nodes that are there: their types, what is free of them, which of them are not to be trusted for a while."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._names: dict[str, str] = {}
        self._suspects: dict[str, float] = {}
        self.nodes: list[Node] = []
        self.refresh()

    def refresh(self) -> None:
        """Drop nodes that are gone, add those that came."""
        # A driver's own node has no cores.
        alive = {node["NodeID"]: node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get("CPU")}
        self.nodes = [node for node in self.nodes if node.id in alive]
        for key, kind in self._types(sorted(alive.keys() - {node.id for node in self.nodes})).items():
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
                console.print(f"a node was left out: it does not say what it is ({_reason(error)})")
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
    store: Store,
    log: Log = lambda _session, _text: None,
    fleet: Fleet | None = None,
    machines: Mapping[str, str] | None = None,
    seconds: Mapping[str, float] | None = None,
    work: Work | None = None,
) -> dict[str, str]:
    """Run what is owed (session -> trials), longest session first, each record to `store` as it comes.

    machines: model -> type of machine, chosen here if not given. seconds: session -> duration, else the sessions' estimates.
    work: what a session's process does, experiments.engine.worker.work if not given.
    Returns session, or session/trial -> reason for what could not be run. Raises SpecError for a session that no node could
    hold, before any is started.
    """
    due = [session for session in sessions if owed.get(session.name)]
    fleet = fleet or Fleet(ray)
    seconds = seconds or {session.name: session.estimate_s for session in due}
    machines = machines or choose_machines(due, seconds, fleet.nodes, {})
    jobs = [_Job(session, machines[session.model], list(owed[session.name])) for session in longest_first(due, seconds)]
    return _Crew(ray, fleet, trace, store, log, work or worker.work).run(jobs)


@dataclass(eq=False)
class _Job:
    """A session at work: what it still owes, whether its engine is loaded, when it was last heard of, in what it died."""

    session: Session
    machine: str
    left: list[str]
    loaded: bool = False
    heard: float = 0.0
    deaths: Counter[str] = field(default_factory=Counter)  # by trial; "" before the engine was loaded


class _Crew:
    """The jobs: which wait, which run where, which failed."""

    def __init__(self, ray: Any, fleet: Fleet, trace: Trace | None, store: Store, log: Log, work: Work) -> None:
        self._ray, self._fleet, self._store, self._log = ray, fleet, store, log
        self._remote = ray.remote(max_calls=1)(work)  # a fresh process each time: one engine, one process
        self._trace = ray.put(trace)
        self._running: dict[Any, tuple[_Job, Place]] = {}
        self._failed: dict[str, str] = {}

    def run(self, jobs: list[_Job]) -> dict[str, str]:
        self._waiting = jobs
        refreshed = stuck = time.monotonic()
        while self._waiting or self._running:
            for job in tuple(self._waiting):
                if place := self._fleet.take(job.session, job.machine):
                    self._waiting.remove(job)
                    self._start(job, place)
            if self._running:
                for stream in self._ray.wait([*self._running], num_returns=1, timeout=REFRESH_S, fetch_local=False)[0]:
                    self._hear(stream)
                stuck = time.monotonic()
            else:
                time.sleep(1.0)
            if time.monotonic() - refreshed > REFRESH_S:
                self._fleet.refresh()
                refreshed = time.monotonic()
            if refreshed - stuck > PATIENCE_S:  # nothing runs, for so long that no node will come for what waits
                for job in self._waiting:
                    missing = f"{len(job.left)} trials missing: no node of type {job.machine} with room for it is left"
                    self._failed[job.session.name] = missing
                self._waiting.clear()
        return self._failed

    def _start(self, job: _Job, place: Place) -> None:
        job.loaded, job.heard = False, time.monotonic()
        remote = self._remote.options(**options_of(job.session, place))
        self._running[remote.remote(job.session, tuple(job.left), self._trace)] = job, place

    def _hear(self, stream: Any) -> None:
        """Take what a session has to give: that it is loaded, a result, its end, its death."""
        job, place = self._running[stream]
        try:
            result = self._ray.get(next(stream))
        except (StopIteration, self._ray.exceptions.RayError) as error:
            del self._running[stream]
            place.give_back()
            if not isinstance(error, StopIteration):
                self._died(job, place.node, error)
            return
        job.heard = time.monotonic()
        if result is None:
            job.loaded = True
        else:
            result.facts["node"] = place.node.name
            self._store(result)
            job.left.remove(result.trial)

    def _died(self, job: _Job, node: Node, error: Exception) -> None:
        """Start it again for what it owes, without the trial in which it died too often."""
        name, left, silent = job.session.name, job.left, time.monotonic() - job.heard
        reason = _reason(error) + (f"; hung, no result in {silent:.0f} s" if silent > job.session.time_limit_s else "")
        self._log(name, str(error))
        self._fleet.suspect(node)
        self._fleet.refresh()
        trial = left[0] if job.loaded and left else ""
        job.deaths[trial] += 1
        if job.deaths[trial] < ATTEMPTS:
            where = "" if node in self._fleet.nodes else f"; {node.name} is lost"
            again = f"attempt {job.deaths[trial] + 1} of {ATTEMPTS} for its {len(left)} trials left"
            console.print(f"{name} died ({reason}{where}); {again}")
        elif trial:
            self._failed[f"{name}/{left.pop(0)}"] = f"the session died in it {ATTEMPTS} times: {reason}"
        else:
            self._failed[name] = f"{len(left)} trials missing after {ATTEMPTS} attempts to start: {reason}"
            left.clear()
        if left:
            self._waiting.insert(0, job)


def options_of(session: Session, place: Place) -> dict[str, Any]:
    """What a session asks of Ray: what it takes of its node, and that node."""
    from experiments.engine.vllm_engine import environment

    # Ray leaves CUDA_VISIBLE_DEVICES alone as no GPU is asked of it.
    variables = environment(session.engine) | gpus.environment(place.takes)
    if share := place.share_of_cores():
        variables[worker.CORES] = share
    return {
        "name": f"{session.figure}/{session.name}",
        "num_returns": "streaming",
        "max_retries": 0,
        "num_cpus": place.takes["CPU"],
        "num_gpus": 0,
        "memory": int(place.takes["memory"]),
        "resources": {name: amount for name, amount in place.takes.items() if name not in ("CPU", "memory")},
        "runtime_env": {"env_vars": variables},
        "scheduling_strategy": _on(place.node.id),
        "_generator_backpressure_num_objects": 2,
    }


def _on(node: str) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


def _reason(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    if used := re.search(r"was (\S+) used / (\S+) limit", str(cause)):  # Ray's memory monitor; its last line is on its settings
        most = re.search(r"^\d+\t([\d.]+)\t(.{1,60})", str(cause), re.M)
        whose = f", {most[1]}GB of it by {most[2].strip()}" if most else ""
        return f"out of memory: {used[1]} of this machine's {used[2]} in use{whose}; end what else runs"
    last = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {last[-1][:200] if last else 'no message'}"
