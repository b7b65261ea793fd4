"""A figure on a testbed: what is done, what is owed, how long that takes on the nodes at hand."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from experiments.cluster.placement import GIB, Node, Slot, choose_machines, foretell, makespan
from experiments.machine import doctor
from experiments.machine.gpus import resources
from experiments.records.errors import SpecError
from experiments.records.metrics import of_phase, point_phase, saturation_throughput
from experiments.records.provenance import commit, identity, machine, sha256
from experiments.records.store import LOOKS, Run, read_trial
from experiments.simulator.calibration import CALIBRATIONS
from experiments.simulator.estimate import session_seconds, simulated_saturations
from experiments.simulator.memory import gpu_memory
from experiments.spec.expand import SATURATION, LoadPoint, Session, expand, saturation_requests, saturation_sessions
from experiments.spec.spec import FIGURES, TESTBEDS, ServingFigure, Testbed, load_figure, path_of
from experiments.spec.traces import Trace
from experiments.spec.workload import check_gaps, check_requests, choose_trace

MB_PER_TRIAL = 0.02  # of files that say what it was; a pass of 9a is little more
MB_PER_REQUEST = 0.0012  # of a serving trial at the paper's lengths, most of it the times of its tokens
SLOTS_SHOWN = 24  # of a plan; the rest is a number


def identity_of(figure: Path, path: Path, testbed: Testbed, trace: str | None) -> dict[str, str]:
    """What the trials of a run share, here and now. trace: the sha256 of its request lengths."""
    inputs = {"trace": trace} if trace else {}
    if testbed.platform == "simulated":
        inputs |= {name: sha256(CALIBRATIONS / f"{name}.yaml") for name in (testbed.calibrations or {}).values()}
    return identity(figure, path, inputs)


class Plan:
    """A figure on a testbed, with what is done and what is owed."""

    def __init__(self, figure: str, testbed: str, replicates: int | None, out: Path, trace: str | None = None) -> None:
        self.figure, self.figure_path, self.replicates = load_figure(figure), path_of(figure, FIGURES), replicates
        self.testbed, self.reason = doctor.choose_testbed(testbed, out)
        self.testbed_path = path_of(testbed if testbed != "auto" else self.testbed.testbed, TESTBEDS)
        self.trace = None
        if isinstance(self.figure, ServingFigure):
            self.trace = choose_trace(trace, max_total=self.figure.max_model_len)
            self.figure = drawn_from(self.trace, self.figure, self.testbed)
            check_gaps(self.trace, self.testbed.scale)
        folder = out / f"{self.figure.figure}-{self.testbed.testbed}"
        sha = self.trace.sha256 if self.trace else None
        self.run = Run(folder, identity_of(self.figure_path, self.testbed_path, self.testbed, sha))
        self.saturation = saturation_sessions(self.figure, self.testbed)
        self.measured: dict[str, float] = {}  # model -> saturation throughput, requests per second
        self.sessions = self.expand()
        reported, on_gpus = GIB * self.testbed.requires.gpu_memory_gib, self.testbed.platform == "cuda"
        self.memory = {s.model: gpu_memory(s.engine, reported) for s in self.sessions if on_gpus}
        self.not_run = [panel.model for panel in self.figure.panels if panel.model not in self.testbed.models]

    def expand(self) -> list[Session]:
        """The sessions; those that measure the saturation throughput come apart, first. Raises SpecError for a saturation trial
        that is damaged, cut short or gone though finished trials rest on it."""
        for session in self.saturation:
            path = self.run.find(session.name, SATURATION)
            facts, record = read_trial(path) if path else ({}, None)
            if record and not record.truncated:
                self.measured[session.model] = saturation_throughput(of_phase(record, point_phase(facts["phases"])))
            elif resting := self.run.finished(session.model):
                came = "cut short by its time limit" if record else "damaged or gone"
                told = f"{session.name}/{SATURATION}: {came}, and {len(resting)} finished trials rest on its rates"
                raise SpecError(f"{self.run.folder}: {told}; get it back from a copy, or measure into another OUT")
        return expand(self.figure, self.testbed, self.replicates, self.measured)

    def unmeasured(self) -> dict[str, str]:
        """Saturation sessions that set no rate, each with the reason."""
        remedy = f"try again when the machine is idle, or with a longer serving.time_limit_s in {self.testbed_path.name}"
        missing = [session for session in self.saturation if session.model not in self.measured]
        return {s.name: f"cut short by its time limit of {s.time_limit_s:g} s, so it sets no rate: {remedy}" for s in missing}

    @property
    def all_sessions(self) -> list[Session]:
        """Those that measure the saturation throughput included."""
        return [*self.saturation, *self.sessions]

    @property
    def trials(self) -> set[tuple[str, str]]:
        """(session, trial) of all that is planned."""
        return {(session.name, trial.name) for session in self.all_sessions for trial in session.trials}

    def owed(self) -> dict[str, list[str]]:
        """Session -> trials that are not there yet. Raises SpecError if they would make one bag more than may be judged."""
        bags = self.run.bags()
        if len(bags) >= LOOKS and self.trials - self.run.sealed():
            had = f"{self.run.folder} has {', '.join(bag.name for bag in bags)}, its last look"
            raise SpecError(
                f"REPLICATES: got {self.replicates or 'none'}: {had}; allowed: no more than it holds, or another OUT"
            )
        done = self.run.complete()
        missing = {s.name: [t.name for t in s.trials if (s.name, t.name) not in done] for s in self.all_sessions}
        return {name: trials for name, trials in missing.items() if trials}

    def resuming(self, trials: Sequence[Path]) -> str:
        """What completes these open trials of more replicates."""
        if len(self.run.bags()) >= LOOKS:
            return "the run has had its last look, so nothing takes them; make clean removes them"
        seeds = {json.loads((path / "trial.json").read_text())["seed"] for path in trials}
        needed = 1 + max(self.figure.seeds.index(seed) for seed in seeds)
        return f"make {self.figure.figure} TESTBED={self.testbed.testbed} REPLICATES={needed} adds them as a second bag"

    def _fixed_machines(self) -> dict[str, str]:
        """Model -> the type of machine that its finished trials are of: the others must be of it too."""
        found: dict[str, str] = {}
        for session in self.all_sessions:
            for trial in session.trials:
                if session.model not in found and (path := self.run.find(session.name, trial.name)):
                    found[session.model] = json.loads((path / "trial.json").read_text())["machine"]["type"]
        return found

    def schedule(self, nodes: Sequence[Node], totals: Mapping[str, float]) -> tuple[list[Slot], dict[str, str]]:
        """What is owed (session -> seconds), placed on these nodes, and the type of machine for each model.

        Saturation comes first, as the rates of all else rest on it. Raises SpecError for a session that no node could hold.
        """
        first, rest = ([s for s in stage if s.name in totals] for stage in (self.saturation, self.sessions))
        machines = choose_machines([*first, *rest], totals, nodes, self._fixed_machines())
        slots = foretell(first, totals, nodes, machines)
        return [*slots, *foretell(rest, totals, nodes, machines, makespan(slots))], machines

    def describe(self) -> dict[str, Any]:
        """The plan as data: what the run will be, for people's scripts and for the bag.

        `saturation`: requests per second that a simulated machine could serve at most, by model and chunk size.
        """
        simulated = self.testbed.platform == "simulated"
        return {
            **{name: getattr(self.testbed, name) for name in ("testbed", "platform", "scale", "may_preempt")},
            "figure": self.figure.figure,
            "title": self.figure.title,
            "testbed_title": self.testbed.title,
            "identity": self.run.identity,
            "commit": commit(),
            "requires": asdict(self.testbed.requires),
            "trace": {"name": self.trace.name, "kind": self.trace.kind} if self.trace else None,
            **({"saturation": simulated_saturations(self.sessions, self.trace)} if simulated and self.trace else {}),
            "sessions": {s.name: [t.name for t in s.trials] for s in self.all_sessions},
            "not_run": self.not_run,
        }

    def outlook(self, owed: Mapping[str, Sequence[str]], nodes: Sequence[Node] = ()) -> dict[str, Any]:
        """What is owed as data, with its schedule on these nodes if they are given: times in seconds, disk in MB.

        A session's `seconds` are those of loading its engine and of each trial; `basis` is what they rest on.
        """
        seconds, basis = session_seconds(self.figure, self.testbed, self.replicates, self.measured, owed, self.trace)
        totals = {name: sum(own.values()) for name, own in seconds.items()}
        points = [point for session in self.all_sessions for trial in session.trials for point in trial.points]
        served = sum(point.requests for point in points if isinstance(point, LoadPoint))
        trials, slots, problem = sum(len(session.trials) for session in self.all_sessions), list[Slot](), None
        if nodes and self.testbed.platform != "simulated":
            try:
                slots, _ = self.schedule(nodes, totals)
            except SpecError as error:
                problem = str(error)
        unplaced: dict[str, Any] = {"node": None, "start_s": None, "end_s": None}
        sessions = [asdict(slot) for slot in slots] or [{"session": name, **unplaced} for name in seconds]
        gpus = {s.name: s.engine.tensor_parallel if self.testbed.platform == "cuda" else 0 for s in self.all_sessions}
        return {
            "figure": self.figure.figure,
            "testbed": self.testbed.testbed,
            "sessions": [session | {"seconds": seconds[session["session"]]} for session in sessions],
            "nodes": {node.name: node.machine for node in nodes},
            "trials": trials,
            "trials_to_run": sum(map(len, owed.values())),
            "makespan_s": makespan(slots) or sum(totals.values()),
            "gpu_hours": sum(gpus[name] * total for name, total in totals.items()) / 3600,
            "disk_mb": trials * MB_PER_TRIAL + served * MB_PER_REQUEST / self.testbed.scale,
            "basis": basis,
            "no_schedule": problem,
        }

    def _trace_line(self) -> str:
        assert self.trace is not None
        assert isinstance(self.figure, ServingFigure)
        most = self.figure.max_model_len
        cut = int((self.trace.prompt + self.trace.output > most).sum())
        shorter = f", {cut:,} of them cut to {most:,} tokens" if cut else ""
        count = f"{len(self.trace.prompt):,} requests{shorter}, at most {self.figure.requests:,} a trial"
        lost = [note for note in self.trace.notes if note.startswith("left out")]
        return f"{self.trace.name} ({self.trace.kind}, {'; '.join([count, *lost])})"

    def text(self, outlook: Mapping[str, Any]) -> str:
        """An outlook for people."""
        models = Counter(session.model for session in self.sessions)
        placed = [each for each in outlook["sessions"] if each["node"]]
        hours = f", {outlook['gpu_hours']:.1f} GPU hours" if self.testbed.platform == "cuda" else ""
        where = f" on {len(outlook['nodes'])} nodes" if len(outlook["nodes"]) > 1 and placed else ""
        cost = f"{in_minutes(outlook['makespan_s'])}{where}{hours} ({outlook['basis']}), {outlook['disk_mb']:.1f} MB of disk"
        lines = [
            f"figure    {self.figure.figure}: {self.figure.title}",
            f"testbed   {self.testbed.testbed} ({self.reason}): {self.testbed.title}",
            *(f"model     {model}: {count} session{'s'[: count > 1]}" for model, count in models.items()),
            *(f"model     {model}: not on this testbed" for model in self.not_run),
            *([f"trace     {self._trace_line()}"] if self.trace else []),
            *(f"memory    {model}: {found.told}" for model, found in self.memory.items()),
            f"trials    {outlook['trials']} in all, {outlook['trials_to_run']} to run",
            *([f"schedule  none here: {outlook['no_schedule']}"] if outlook["no_schedule"] else []),
            *([f"estimate  {cost}; nothing to attend to"] if outlook["trials_to_run"] else []),
            *map(_slot_line, placed[:SLOTS_SHOWN]),
            *([f"          and {len(placed) - SLOTS_SHOWN} sessions more"] if len(placed) > SLOTS_SHOWN else []),
        ]
        how: dict[str, Any] = {"subsequent_indent": " " * 10, "break_long_words": False, "break_on_hyphens": False}
        return "\n".join([*(textwrap.fill(line, 80, **how) for line in lines), f"outputs   {self.run.folder}"])


def drawn_from(trace: Trace, figure: ServingFigure, testbed: Testbed) -> ServingFigure:
    """The figure with no trial that asks for more requests than the trace has.

    Where the testbed maps the load, how many a trial serves follows from a rate that nobody knows yet: then at most all of
    them. Raises SpecError, before anything is loaded, if they are too few for that too.
    """
    least = saturation_requests(figure, testbed) if testbed.serving else figure.requests
    check_requests(trace, least, f"as a trial of {figure.figure} on testbed {testbed.testbed} serves so many")
    return replace(figure, requests=min(figure.requests, len(trace.prompt)))


def in_minutes(seconds: float) -> str:
    """A time that is foretold."""
    return "under a minute" if seconds < 60 else f"about {seconds / 60:.1f} min"


def _slot_line(slot: Mapping[str, Any]) -> str:
    times = (int(slot["start_s"]), int(slot["end_s"]))
    when = " to ".join(f"{t // 3600}:{t // 60 % 60:02}:{t % 60:02}" for t in times)
    each = " + ".join(f"{seconds:.0f}" for seconds in slot["seconds"].values())
    return f"  {slot['node']:8}{when}  {slot['session']} ({each} s)"


def local_node() -> Node:
    """This machine, as a cluster of one."""
    here = machine()
    return Node("", "node-1", here["type"], {"CPU": float(here["cores"]), "memory": here["memory_gib"] * GIB, **resources()})
