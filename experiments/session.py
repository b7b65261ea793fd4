"""What happens inside one engine process: warm up, run the trials still owed, hand back each record."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from experiments.engine import Engine, Phase, Record, Request
from experiments.provenance import machine
from experiments.spec import EngineSettings, Session, Trial

PROBES = 3  # a fixed step, repeated at the start of every trial: its spread is the machine's noise
TIME_LIMIT_S = 180 * 60.0  # the original's; a trial cut by it is marked truncated


@dataclass(frozen=True)
class TrialResult:
    """A record and everything that says what it is a record of."""

    session: str
    trial: str
    facts: dict[str, Any]
    record: Record


def probe(settings: EngineSettings) -> Phase:
    """One prompt that fits one step, the same in every trial of a session."""
    tokens = max(1, min(settings.max_budget, settings.max_model_len // 8))
    return Phase(settings.max_budget, (Request(0.0, tokens, 1),))


def phases_of(session: Session, trial: Trial) -> tuple[list[Phase], list[dict[str, Any]]]:
    """The phases of a trial and, in the same order, what each one is."""
    phases = [probe(session.engine)] * PROBES
    roles: list[dict[str, Any]] = [{"role": "probe"}] * PROBES
    for point in trial.points:
        request = Request(0.0, point.prompt_tokens, 1, seed=session.seed)
        phases.append(Phase(point.budget, (request,)))
        roles.append({"role": "point", **asdict(point)})
    return phases, roles


def warm_up(session: Session) -> list[Phase]:
    """Every chunk size once on the longest prompt, so that no measured step is the first of its shape."""
    points = [point for trial in session.trials for point in trial.points]
    longest = max(point.prompt_tokens for point in points)
    budgets = sorted({point.budget for point in points})
    return [Phase(budget, (Request(0.0, longest, 1),)) for budget in budgets] + [probe(session.engine)]


def run_session(
    session: Session, owed: Collection[str], make_engine: Callable[[EngineSettings], Engine]
) -> Iterator[TrialResult]:
    """Run the trials named in `owed`, in the session's order. Yields each result as soon as it is there."""
    process = uuid.uuid4().hex[:12]
    engine = make_engine(session.engine)
    try:
        engine.run(warm_up(session), TIME_LIMIT_S)
        for trial in session.trials:
            if trial.name not in owed:
                continue
            phases, roles = phases_of(session, trial)
            started = datetime.now(UTC)
            record = engine.run(phases, TIME_LIMIT_S)
            facts = {
                "figure": session.figure,
                "kind": session.kind,
                "testbed": session.testbed,
                "scale": session.scale,
                "model": session.model,
                "in_paper": session.in_paper,
                "seed": session.seed,
                "process": process,
                "phases": roles,
                "settings": asdict(session.engine),
                "engine": dict(engine.facts),
                "machine": machine(),
                "started": started.isoformat(timespec="milliseconds"),
                "ended": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "truncated": record.truncated,
            }
            yield TrialResult(session.name, trial.name, facts, record)
    finally:
        engine.close()
