"""Command line: run a figure on a testbed, resume it, seal it; show its plan; check the machine."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments import doctor
from experiments.placement import Node, makespan
from experiments.plan import Plan, local_node
from experiments.provenance import ROOT, sbom
from experiments.session import TrialResult, run_session
from experiments.simulator import simulated_engine
from experiments.spec import SpecError
from experiments.store import to_json

console = Console(highlight=False, soft_wrap=True)


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
            logs = "".join(f"; what they said: {path}" for path in sorted(plan.run.folder.glob("died-*.log")))
            console.print(f"the run is incomplete; the same command runs what is missing{logs}")
            return 1
        console.print(f"sealed {_seal(plan)}")
    return 0


def _run_owed(plan: Plan, owed: dict[str, list[str]]) -> dict[str, str]:
    """Run it, saturation first, where it is owed: the rates of everything else rest on it. Simulations need no Ray."""
    seconds, _ = plan.seconds(owed)
    totals, trials = {name: sum(own.values()) for name, own in seconds.items()}, sum(map(len, owed.values()))
    if plan.testbed.platform == "simulated":
        with Ticker(plan.figure.figure, trials, sum(totals.values())) as ticker:
            return _simulate(plan, owed, partial(_store, plan, ticker))
    from experiments.cluster import Fleet, Report, ray_cluster, run_sessions

    with ray_cluster() as ray:
        fleet = Fleet(ray, console.print)
        schedule = plan.schedule(fleet.nodes, seconds)
        if len(fleet.nodes) > 1:
            console.print(f"cluster   {len(fleet.nodes)} nodes; {makespan(schedule.slots) / 60:.1f} min on them")
        plan.run.note_schedule({"planned": datetime.now(UTC).isoformat(timespec="milliseconds"), **asdict(schedule)})
        with Ticker(plan.figure.figure, trials, makespan(schedule.slots)) as ticker:
            report = Report(partial(_store, plan, ticker), console.print, plan.run.write_log)
            run = partial(run_sessions, ray, owed=owed, trace=plan.trace, report=report, fleet=fleet,
                          machines=schedule.machines, seconds=totals)  # fmt: skip
            failed = run(sessions=plan.saturation)
            if failed:
                return failed
            if any(session.name in owed for session in plan.saturation):
                plan.sessions = plan.expand()
            return run(sessions=plan.sessions)


def _store(plan: Plan, ticker: Ticker, result: TrialResult) -> None:
    plan.run.write_trial(result.session, result.trial, result.facts, result.record)
    ticker.tick(f"{result.session} {result.trial}")


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
    if plan.run.schedules():
        documents["schedules.json"] = to_json(plan.run.schedules())
    if facts:
        times = [stamp for fact in facts for stamp in (fact["started"], fact["ended"])]
        listed = [*files, *(name for name in documents if name.endswith(".json"))]
        documents["ro-crate-metadata.json"] = describe_run(described, listed, times, facts[0]["engine"])
    info = {
        "Bagging-Date": datetime.now(UTC).date().isoformat(),
        "External-Description": f"{plan.figure.title}; {plan.testbed.title}",
        "External-Identifier": f"{plan.figure.figure}-{plan.testbed.testbed}-{plan.run.id}",
    }
    bag = plan.run.seal(documents, info)
    return str(bag or plan.run.bags()[-1])


def _nodes(plan: Plan) -> list[Node]:
    """The cluster at hand: that of RAY_ADDRESS, else this machine."""
    if plan.testbed.platform == "simulated" or not os.environ.get("RAY_ADDRESS"):
        return [local_node()]
    from experiments.cluster import Fleet, ray_cluster

    with ray_cluster() as ray:
        return Fleet(ray, console.print).nodes


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
        console.print(plan.text(_nodes(plan) if options.plan else ()))
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
