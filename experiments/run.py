"""Command line: run a figure on a testbed, resume it, seal it; show its plan; check the machine."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from experiments.cluster.placement import Node, makespan
from experiments.cluster.plan import Plan, in_minutes, local_node
from experiments.engine.engine_process import engines
from experiments.engine.session import TrialResult, run_session
from experiments.machine import doctor
from experiments.machine.gpus import environment_here
from experiments.records.errors import SpecError
from experiments.records.provenance import sbom
from experiments.records.store import to_json, write_whole
from experiments.records.terminal import arguments, command, console, parse, reason, result, tell, written
from experiments.simulator.simulator import simulated_engine
from experiments.spec.expand import SATURATION, Session
from experiments.spec.traces import Trace


class Ticker(Progress):
    """Stores the results of a run as they come; a bar with the remaining time on a terminal, elsewhere a line per trial, of a
    simulation per session."""

    def __init__(self, plan: Plan, trials: int, planned_s: float) -> None:
        what, count = TextColumn("{task.description}"), MofNCompleteColumn()
        columns = (what, BarColumn(), count, TimeElapsedColumn(), TimeRemainingColumn())
        super().__init__(*columns, console=console, disable=console.quiet or not console.is_terminal)
        self.number = self.add_task(plan.figure.figure, total=trials)
        self.plan, self.trials, self.planned_s, self.told = plan, trials, planned_s, set[str]()

    def stop(self) -> None:
        """Leave the bar as it is; without one not even an empty line."""
        if not self.disable:
            super().stop()

    def store(self, found: TrialResult) -> None:
        """Store it, and tell. The time left is the plan's at first, when loading weighs too much, later by what was seen.

        A saturation trial that was cut short is not kept: it would be taken for a low throughput, and set every rate.
        """
        if found.trial == SATURATION and found.record.truncated:
            return
        self.plan.run.write_trial(found.session, found.trial, found.facts, found.record)
        what, task = f"{found.session} {found.trial}", self.tasks[self.number]
        self.update(self.number, advance=1, description=what)
        if self.disable and (self.plan.testbed.platform != "simulated" or found.session not in self.told):
            self.told.add(found.session)
            left = 1 - task.completed / self.trials
            seconds = left * ((task.elapsed or 0.0) + left * self.planned_s)
            console.print(f"[{task.completed:.0f}/{self.trials}] {what}, {in_minutes(seconds)} left")


def execute(plan: Plan, with_ray: bool = True) -> int:
    """Run what is owed and seal the run. 0 complete, 1 something is missing."""
    with plan.run.locked():
        owed, failed = plan.owed(), dict[str, str]()
        outlook = plan.outlook(owed)
        console.print(plan.text(outlook))
        if owed:
            if (missing := doctor.lacks(plan.testbed)) and not os.environ.get("RAY_ADDRESS"):
                raise SpecError(f"testbed {plan.testbed.testbed} {missing}")
            totals = {each["session"]: sum(each["seconds"].values()) for each in outlook["sessions"]}
            failed = _run_owed(plan, owed, totals, with_ray)
        for name, reason in failed.items():
            console.print(f"missing: {name}: {reason}")
        if failed:
            logs = "".join(f"; what they said: {path}" for path in sorted(plan.run.folder.glob("died-*.log")))
            console.print(f"the run is incomplete; the same command runs what is missing{logs}")
        elif bag := _seal(plan):
            console.print(f"sealed {written(bag)}")
        else:
            console.print(f"complete already: {', '.join(map(str, plan.run.bags()))}; nothing to do")
        if not failed and (left := plan.run.open_trials()):
            console.print(
                f"not sealed: {len(left)} trials that this plan does not have, in {plan.run.open}; {plan.resuming(left)}"
            )
        result(figure=plan.figure.figure, testbed=plan.testbed.testbed, bags=plan.run.bags(), missing=failed)
    return 1 if failed else 0


def _run_owed(plan: Plan, owed: dict[str, list[str]], totals: dict[str, float], with_ray: bool) -> dict[str, str]:
    """Run it; what failed, with the reason. totals: session -> seconds that it is to take."""
    trials = sum(map(len, owed.values()))
    if plan.testbed.platform == "simulated" or not with_ray:
        with Ticker(plan, trials, sum(totals.values())) as ticker:
            return _in_turn(plan, lambda sessions: _one_by_one(sessions, owed, plan.trace, ticker.store))
    from experiments.cluster.cluster import Fleet, ray_cluster, run_sessions

    with ray_cluster() as ray:
        fleet = Fleet(ray)
        slots, machines = plan.schedule(fleet.nodes, totals)
        if len(fleet.nodes) > 1:
            console.print(f"cluster   {len(fleet.nodes)} nodes; {makespan(slots) / 60:.1f} min on them")
        nodes, now = {node.name: node.machine for node in fleet.nodes}, datetime.now(UTC).isoformat(timespec="milliseconds")
        noted = {"planned": now, "slots": [asdict(slot) for slot in slots], "machines": machines, "nodes": nodes}
        plan.run.note_schedule(noted)
        with Ticker(plan, trials, makespan(slots)) as ticker:
            how = (owed, plan.trace, ticker.store, plan.run.write_log, fleet, machines, totals)
            return _in_turn(plan, lambda sessions: run_sessions(ray, sessions, *how))


def _in_turn(plan: Plan, run: Callable[[Sequence[Session]], dict[str, str]]) -> dict[str, str]:
    """Saturation first; then the other sessions, at the rates that follow from it. What failed, with the reason."""
    if failed := run(plan.saturation):
        return failed
    plan.sessions = plan.expand()
    return plan.unmeasured() or run(plan.sessions)


def _one_by_one(
    sessions: Sequence[Session], owed: Mapping[str, list[str]], trace: Trace | None, store: Callable[[TrialResult], None]
) -> dict[str, str]:
    """Without Ray: one session after the other on this machine. What failed, with the reason; a simulation that fails is bad
    input, and raises SpecError."""
    failed = {}
    for session in (session for session in sessions if session.name in owed):
        left = owed[session.name]
        if session.engine.platform == "simulated":
            for found in run_session(session, left, partial(simulated_engine, seed=session.seed), trace):
                store(found)
            continue
        try:
            with engines([session.engine], environment_here(session.engine, session.nvlink)) as (run,):
                run(_begin, session, left, trace)
                while result := run(_go_on):
                    store(result)
        except SpecError as error:
            failed[session.name] = str(error)
    return failed


def _begin(engine: Any, session: Session, owed: Collection[str], trace: Trace | None) -> None:
    """In the engine's process, whose results come one by one."""
    engine.results = run_session(session, owed, lambda _: engine, trace)


def _go_on(engine: Any) -> Any:
    """In the engine's process: the next result; None after the last."""
    return next(engine.results, None)


def _seal(plan: Plan) -> Path | None:
    """Seal what was planned and is in no bag yet, and return the bag; None if all is sealed."""
    from experiments.records.crate import describe_run

    trials = [path for path in plan.run.open_trials() if (path.parent.name, path.name) in plan.trials]
    if not trials:
        return plan.run.seal([], {}, {})
    files = sorted(file for path in trials for file in path.glob("*"))
    facts = [json.loads(path.read_text()) for path in files if path.name == "trial.json"]
    described = plan.describe()
    documents = {
        "plan.json": to_json(described),
        "figure.yaml": plan.figure_path.read_text(),
        "testbed.yaml": plan.testbed_path.read_text(),
        "sbom.cdx.json": to_json(sbom()),
        "settings.json": to_json({session.name: asdict(session.engine) for session in plan.all_sessions}),
    }
    if schedules := plan.run.schedules():
        documents["schedules.json"] = to_json(schedules)
    times = [fact[moment] for fact in facts for moment in ("started", "ended")]
    listed = [path.relative_to(plan.run.open).as_posix() for path in files]
    listed += [name for name in documents if name.endswith(".json")]
    documents["ro-crate-metadata.json"] = describe_run(described, listed, times, facts[0]["engine"])
    info = {
        "Bagging-Date": datetime.now(UTC).date().isoformat(),
        "External-Description": f"{plan.figure.title}; {plan.testbed.title}",
        "External-Identifier": f"{plan.figure.figure}-{plan.testbed.testbed}-{plan.run.id}",
    }
    return plan.run.seal(trials, documents, info)


def _nodes(plan: Plan) -> list[Node]:
    """The cluster at hand: that of RAY_ADDRESS, else this machine."""
    if plan.testbed.platform == "simulated" or not os.environ.get("RAY_ADDRESS"):
        return [local_node()]
    from experiments.cluster.cluster import Fleet, ray_cluster

    with ray_cluster() as ray:
        return Fleet(ray).nodes


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 complete, 1 incomplete (a disk that is full, too), 2 bad input, 130 interrupted."""
    parser = arguments("experiments.run", __doc__, "testbed", "out", "trace")
    parser.add_argument("figure", help="a figure's name or YAML file, or 'doctor'")
    parser.add_argument("--replicates", type=int, help="seeds of each point; default: the testbed's number")
    parser.add_argument("--plan", action="store_true", help="print what would be run; start nothing")
    parser.add_argument("--no-ray", action="store_true", help="one session after the other on this machine, without Ray")
    parser.add_argument("--bags", type=Path, help="name the bags of the complete run in this file, as JSON")
    options = parse(parser, argv)
    if options.figure == "doctor":
        doctor.report(options.out)
        return 0
    plan = Plan(options.figure, options.testbed, options.replicates, options.out, options.trace)
    if options.plan:
        outlook = plan.outlook(plan.owed(), _nodes(plan))
        console.print(plan.text(outlook))
        result(**outlook)
        return 0
    kept = "finished trials are kept, the same command resumes"
    try:
        status = execute(plan, not options.no_ray)
    except KeyboardInterrupt as error:
        error.add_note(kept)
        raise
    except OSError as error:
        tell(f"error: {reason(error)}; {kept}")
        return 1
    if options.bags and status == 0:
        write_whole(options.bags, to_json([str(bag) for bag in plan.run.bags()]))
    return status


if __name__ == "__main__":
    sys.exit(main())
