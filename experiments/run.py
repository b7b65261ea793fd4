"""Command line: run a figure on a testbed, resume it, seal it; show its plan; check the machine."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments import doctor
from experiments.cost_model import CALIBRATIONS
from experiments.estimate import run_seconds
from experiments.expand import SATURATION, Session, expand, saturation_sessions
from experiments.gpus import check_gpu_memory
from experiments.metrics import of_phase, point_phase, saturation_throughput
from experiments.provenance import ROOT, commit, identity, sbom, sha256
from experiments.session import TrialResult, run_session
from experiments.simulator import simulated_engine
from experiments.spec import FIGURES, TESTBEDS, Figure, ServingFigure, SpecError, Testbed, load_figure
from experiments.store import Run, read_trial, to_json
from experiments.workload import Trace, choose_trace

console = Console(highlight=False, soft_wrap=True)


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

    def seconds(self, owed: dict[str, list[str]]) -> tuple[float, str]:
        """Duration of what is owed, one session after the other, and what that rests on."""
        return run_seconds(self.figure, self.testbed, self.replicates, self.measured, owed, self.trace)

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

    def __str__(self) -> str:
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
            f"estimate  {seconds / 60:.1f} min of compute ({basis}), {trials * 0.05:.1f} MB of disk; nothing to attend to",
            f"outputs   {self.run.folder}",
        ]
        return "\n".join(lines)


class Ticker:
    """Progress of a run: a bar with the remaining time on a terminal, a line per trial elsewhere."""

    def __init__(self, label: str, total: int, planned_s: float) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=console) if console.is_terminal else None
        self.task = self.progress.add_task(label, total=total) if self.progress else None
        self.total, self.done, self.began, self.planned_s = total, 0, time.monotonic(), planned_s

    def __enter__(self) -> Ticker:
        if self.progress:
            self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress:
            self.progress.stop()

    def tick(self, what: str) -> None:
        """One trial more is stored."""
        self.done += 1
        if self.progress and self.task is not None:
            self.progress.update(self.task, advance=1, description=what)
        else:
            console.print(f"[{self.done}/{self.total}] {what}, about {self.left_s() / 60:.1f} min left")

    def left_s(self) -> float:
        """Remaining seconds: the plan's at first, when loading weighs too much, more and more what was seen."""
        share = self.done / self.total
        seen = (time.monotonic() - self.began) / share
        return (share * seen + (1 - share) * self.planned_s) * (1 - share)


def execute(plan: Plan) -> int:
    """Run what is owed and seal the run. 0 complete, 1 something is missing."""
    with plan.run.locked():
        owed = plan.owed()
        failed: dict[str, str] = {}
        if not owed and not plan.run.open.exists():
            console.print(f"complete already: {', '.join(str(bag) for bag in plan.run.bags())}; nothing to do")
            return 0
        if owed:
            failed = _run_owed(plan, owed)
        for name, reason in failed.items():
            console.print(f"missing: {name}: {reason}")
        if failed:
            console.print("the run is incomplete; the same command runs what is missing")
            return 1
        console.print(f"sealed {_seal(plan)}")
    return 0


def _run_owed(plan: Plan, owed: dict[str, list[str]]) -> dict[str, str]:
    """Saturation first, where it is owed: the rates of everything else rest on it. Simulations need no Ray."""
    with Ticker(plan.figure.figure, sum(map(len, owed.values())), plan.seconds(owed)[0]) as ticker:

        def store(result: TrialResult) -> None:
            plan.run.write_trial(result.session, result.trial, result.facts, result.record)
            ticker.tick(f"{result.session} {result.trial}")

        if plan.testbed.platform == "simulated":
            return _simulate(plan, owed, store)
        from experiments.cluster import ray_cluster, run_sessions

        failed = {}
        with ray_cluster() as ray:
            if any(session.name in owed for session in plan.saturation):
                failed = run_sessions(ray, plan.saturation, owed, plan.trace, store, console.print)
                plan.sessions = plan.expand()
            return failed or run_sessions(ray, plan.sessions, owed, plan.trace, store, console.print)


def _simulate(plan: Plan, owed: dict[str, list[str]], store: Callable[[TrialResult], None]) -> dict[str, str]:
    for session in (session for session in plan.sessions if session.name in owed):
        for result in run_session(session, owed[session.name], partial(simulated_engine, seed=session.seed), plan.trace):
            store(result)
    return {}


def _seal(plan: Plan) -> str:
    from experiments.crate import describe_run

    trials = sorted(plan.run.open.glob("trials/*/*"))
    facts = [json.loads((path / "trial.json").read_text()) for path in trials]
    files = [path.relative_to(plan.run.open).as_posix() for trial in trials for path in sorted(trial.iterdir())]
    described = plan.describe()
    documents = {
        "plan.json": to_json(described),
        "figure.yaml": plan.figure_path.read_text(),
        "testbed.yaml": plan.testbed_path.read_text(),
        "sbom.cdx.json": to_json(sbom()),
        "settings.json": to_json({s.name: asdict(s.engine) for s in (*plan.saturation, *plan.sessions)}),
    }
    if facts:
        times = [stamp for fact in facts for stamp in (fact["started"], fact["ended"])]
        listed = [*files, "plan.json", "sbom.cdx.json", "settings.json"]
        documents["ro-crate-metadata.json"] = describe_run(described, listed, times, facts[0]["engine"])
    info = {
        "Bagging-Date": datetime.now(UTC).date().isoformat(),
        "External-Description": f"{plan.figure.title}; {plan.testbed.title}",
        "External-Identifier": f"{plan.figure.figure}-{plan.testbed.testbed}-{plan.run.id}",
    }
    bag = plan.run.seal(documents, info)
    return str(bag or plan.run.bags()[-1])


def _interrupted(_signal: int, _frame: object) -> None:
    """The first SIGINT or SIGTERM; a further one must not disturb what ends the processes of the run."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: print("stopping already, a few seconds more", file=sys.stderr))
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 complete, 1 incomplete (a disk that is full, too), 2 bad input, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m experiments.run", description=__doc__)
    parser.add_argument("figure", help="a figure's name or YAML file, or 'doctor'")
    parser.add_argument("--testbed", default="auto")
    parser.add_argument("--replicates", type=int)
    parser.add_argument("--out", type=Path, default=ROOT / "artifacts" / "runs")
    parser.add_argument("--trace", help="CSV of request lengths, columns num_prefill_tokens and num_decode_tokens")
    parser.add_argument("--plan", action="store_true", help="print what would be run; start nothing")
    options = parser.parse_args(argv)
    before = {number: signal.signal(number, _interrupted) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if options.figure == "doctor":
            console.print(doctor.report(options.out))
            return 0
        plan = Plan(options.figure, options.testbed, options.replicates, options.out, options.trace)
        console.print(str(plan))
        return 0 if options.plan else execute(plan)
    except SpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; finished trials are kept, the same command resumes", file=sys.stderr)
        return 130
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}; finished trials are kept, the same command resumes", file=sys.stderr)
        return 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
