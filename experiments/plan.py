"""A figure on a testbed: what is done, what is owed, how long that takes on the nodes at hand."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments import doctor
from experiments.cost_model import CALIBRATIONS
from experiments.estimate import Seconds, session_seconds
from experiments.expand import SATURATION, Session, expand, saturation_sessions
from experiments.gpus import check_gpu_memory, resources
from experiments.metrics import of_phase, point_phase, saturation_throughput
from experiments.placement import GIB, Node, Slot, choose_machines, foretell, makespan
from experiments.provenance import commit, identity, machine, sha256
from experiments.spec import FIGURES, TESTBEDS, Figure, ServingFigure, SpecError, Testbed, load_figure
from experiments.store import Run, read_trial
from experiments.workload import Trace, choose_trace

MB_PER_TRIAL = 0.05
SLOTS_SHOWN = 24  # of a plan; the rest is a number


def spec_path(name: str, folder: Path) -> Path:
    """The file behind a figure's or testbed's name."""
    return Path(name) if name.endswith(".yaml") else folder / f"{name}.yaml"


class Plan:
    """A figure on a testbed, with what is done and what is owed."""

    def __init__(
        self, figure_name: str, testbed_name: str, replicates: int | None, out: Path, trace: str | None = None
    ) -> None:
        self.figure: Figure = load_figure(figure_name)
        self.testbed: Testbed
        self.testbed, self.reason = doctor.choose_testbed(testbed_name, out)
        self.replicates = replicates
        self.figure_path = spec_path(figure_name, FIGURES)
        self.testbed_path = spec_path(testbed_name if testbed_name != "auto" else self.testbed.testbed, TESTBEDS)
        self.trace: Trace | None = None
        if isinstance(self.figure, ServingFigure):
            self.trace = choose_trace(trace, max_total=self.figure.max_model_len)
        inputs = {"trace": self.trace.sha256} if self.trace else {}
        if self.testbed.platform == "simulated":
            names = sorted(set((self.testbed.calibrations or {}).values()))
            inputs |= {name: sha256(CALIBRATIONS / f"{name}.yaml") for name in names}
        made_of = identity(self.figure_path, self.testbed_path, inputs)
        self.run = Run(out / f"{self.figure.figure}-{self.testbed.testbed}", made_of)
        self.saturation = saturation_sessions(self.figure, self.testbed)
        self.measured: dict[str, float] = {}  # model -> saturation throughput, requests per second
        self.sessions = self.expand()
        self.memory: dict[str, str] = {}
        if self.testbed.platform == "cuda":
            for session in self.sessions:
                self.memory[session.model] = check_gpu_memory(session.engine, self.testbed.requires.gpu_memory_gib)

    def expand(self) -> list[Session]:
        """The sessions; those that measure the saturation throughput come apart, first."""
        for session in self.saturation:
            if path := self.run.find(session.name, SATURATION):
                facts, record = read_trial(path)
                self.measured[session.model] = saturation_throughput(of_phase(record, point_phase(facts["phases"])))
        return expand(self.figure, self.testbed, self.replicates, self.measured)

    def owed(self) -> dict[str, list[str]]:
        """Session -> trials that are not there yet."""
        done = self.run.complete()
        every = [*self.saturation, *self.sessions]
        missing = {s.name: [t.name for t in s.trials if (s.name, t.name) not in done] for s in every}
        return {name: trials for name, trials in missing.items() if trials}

    @cached_property
    def fixed_machines(self) -> dict[str, str]:
        """Model -> the type of machine that its finished trials are of: the others must be of it too."""
        found: dict[str, str] = {}
        for session in (*self.saturation, *self.sessions):
            places = (self.run.find(session.name, trial.name) for trial in session.trials if session.model not in found)
            if path := next(filter(None, places), None):
                found[session.model] = json.loads((path / "trial.json").read_text())["machine"]["type"]
        return found

    def seconds(self, owed: Mapping[str, Sequence[str]]) -> tuple[Seconds, str]:
        """Seconds of what is owed, session by session, trial by trial, and what that rests on."""
        return session_seconds(self.figure, self.testbed, self.replicates, self.measured, owed, self.trace)

    def schedule(self, nodes: Sequence[Node], seconds: Seconds) -> Schedule:
        """What is owed, placed on these nodes: saturation first, as the rates of all else rest on it.

        Raises SpecError for a session that no node could hold.
        """
        totals = {name: sum(trials.values()) for name, trials in seconds.items()}
        stages = [[s for s in stage if s.name in seconds] for stage in (self.saturation, self.sessions)]
        machines = choose_machines([*stages[0], *stages[1]], totals, nodes, self.fixed_machines)
        first, rest = (foretell(stage, totals, nodes, machines) for stage in stages)
        begin = makespan(first)
        later = [replace(slot, start_s=slot.start_s + begin, end_s=slot.end_s + begin) for slot in rest]
        return Schedule((*first, *later), machines, {node.name: node.machine for node in nodes})

    def gpu_hours(self, seconds: Seconds) -> float:
        """GPU hours of what is owed; 0 without GPUs."""
        parallel = {s.name: s.engine.tensor_parallel for s in (*self.saturation, *self.sessions)}
        own = sum(parallel[name] * sum(trials.values()) for name, trials in seconds.items())
        return own / 3600 if self.testbed.platform == "cuda" else 0.0

    def describe(self) -> dict[str, Any]:
        """The plan as data: what the run will be, for people's scripts and for the bag."""
        return {
            "figure": self.figure.figure,
            "title": self.figure.title,
            "testbed": self.testbed.testbed,
            "testbed_title": self.testbed.title,
            "platform": self.testbed.platform,
            "scale": self.testbed.scale,
            "identity": self.run.identity,
            "commit": commit(),
            "may_preempt": self.testbed.may_preempt,
            "requires": asdict(self.testbed.requires),
            "trace": {"name": self.trace.name, "kind": self.trace.kind} if self.trace else None,
            "sessions": {s.name: [t.name for t in s.trials] for s in (*self.saturation, *self.sessions)},
            "not_run": [p.model for p in self.figure.panels if p.model not in self.testbed.models],
        }

    def text(self, nodes: Sequence[Node] = ()) -> str:
        """The plan for people, with its schedule on these nodes if they are given."""
        owed = self.owed()
        seconds, basis = self.seconds(owed)
        trials = sum(len(s.trials) for s in (*self.saturation, *self.sessions))
        per_model = Counter(s.model for s in self.sessions)
        lines = [
            f"figure    {self.figure.figure}: {self.figure.title}",
            f"testbed   {self.testbed.testbed} ({self.reason}): {self.testbed.title}",
            *(f"model     {model}: {count} session{'s'[: count > 1]}" for model, count in per_model.items()),
            *(f"model     {model}: not on this testbed" for model in self.describe()["not_run"]),
            *([f"trace     {self.trace.name} ({self.trace.kind}, {len(self.trace.prompt):,} requests)"] if self.trace else []),
            *(f"memory    {model}: {line}" for model, line in self.memory.items()),
            f"trials    {trials} in all, {sum(map(len, owed.values()))} to run",
        ]
        slots: tuple[Slot, ...] = ()
        total = sum(sum(own.values()) for own in seconds.values())
        if nodes and owed and self.testbed.platform != "simulated":
            try:
                slots = self.schedule(nodes, seconds).slots
                total = makespan(slots)
            except SpecError as error:
                lines.append(f"schedule  none here: {error}")
        gpu_hours = f", {self.gpu_hours(seconds):.1f} GPU hours" if self.testbed.platform == "cuda" else ""
        where = f" on {len(nodes)} nodes" if len(nodes) > 1 and slots else ""
        disk = f"{trials * MB_PER_TRIAL:.1f} MB of disk"
        lines.append(f"estimate  {total / 60:.1f} min{where}{gpu_hours} ({basis}), {disk}; nothing to attend to")
        lines += [_slot_line(slot, seconds[slot.session]) for slot in slots[:SLOTS_SHOWN]]
        lines += [f"          and {len(slots) - SLOTS_SHOWN} sessions more"] if len(slots) > SLOTS_SHOWN else []
        return "\n".join([*lines, f"outputs   {self.run.folder}"])


@dataclass(frozen=True)
class Schedule:
    """When which session is to run on which node; the type of machine of each model and of each node."""

    slots: tuple[Slot, ...]
    machines: dict[str, str]
    nodes: dict[str, str]


def _slot_line(slot: Slot, trials: Mapping[str, float]) -> str:
    when = " to ".join(f"{int(t) // 3600}:{int(t) // 60 % 60:02}:{int(t) % 60:02}" for t in (slot.start_s, slot.end_s))
    each = " + ".join(f"{seconds:.0f}" for seconds in trials.values())
    return f"  {slot.node:8}{when}  {slot.session} ({each} s)"


def local_node() -> Node:
    """This machine, as a cluster of one."""
    here = machine()
    return Node("", "node-1", here["type"], {"CPU": float(here["cores"]), "memory": here["memory_gib"] * GIB, **resources()})
