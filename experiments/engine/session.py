"""What happens inside one engine process: warm up, run the trials still owed, hand back each record."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from experiments.records.errors import SpecError
from experiments.records.provenance import machine
from experiments.records.record import Engine, Phase, Record, Request
from experiments.spec.expand import SATURATION, LoadPoint, Point, Session, Trial
from experiments.spec.spec import EngineSettings
from experiments.spec.traces import Trace
from experiments.spec.workload import serving_requests

PROBES = 3  # a fixed step, repeated at the start of every trial: its spread is the machine's noise
WARM_UP_DECODES = 4


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


def phases_of(session: Session, trial: Trial, trace: Trace | None) -> tuple[list[Phase], list[dict[str, Any]]]:
    """The phases of a trial and, in the same order, what each one is. `trace` is needed for serving figures only."""
    phases = [probe(session.engine)] * (1 + PROBES)
    roles: list[dict[str, Any]] = [{"role": "warm-up"}] + [{"role": "probe"}] * PROBES  # the first step after a pause is slow
    for point in trial.points:
        phases.append(Phase(point.budget, _requests(session, point, trace)))
        roles.append({"role": SATURATION if trial.name == SATURATION else "point", **asdict(point)})
    return phases, roles


def _requests(session: Session, point: Point | LoadPoint, trace: Trace | None) -> tuple[Request, ...]:
    """The requests of a point; all arrive at once where a serving point's rate is 0."""
    if isinstance(point, Point):
        return (Request(0.0, point.prompt_tokens, 1, seed=session.seed),)
    if trace is None:
        raise SpecError(f"{session.figure}: a trace is needed")
    asked = (trace, point.rate or 1.0, point.requests, session.seed, point.max_total, session.scale, session.traffic)
    requests = serving_requests(*asked)
    return requests if point.rate else tuple(replace(request, arrival_s=0.0) for request in requests)


def warm_up(session: Session) -> list[Phase]:
    """Every chunk size, so that no measured step is the first of its shape.

    Prefill figures: every point once, so with the last piece of its prompt. Serving figures: a full batch of prompts of one
    chunk each, and a few decodes.
    """
    points = [point for trial in session.trials for point in trial.points]
    if prompts := sorted({(point.budget, point.prompt_tokens) for point in points if isinstance(point, Point)}):
        return [Phase(budget, (Request(0.0, tokens, 1),)) for budget, tokens in prompts]
    budgets, batch = sorted({point.budget for point in points}), range(session.engine.max_batch)
    prompt = min(budgets[0], session.engine.max_model_len - WARM_UP_DECODES)
    return [Phase(budget, tuple(Request(0.0, prompt, WARM_UP_DECODES, seed=n) for n in batch)) for budget in budgets]


def start_engine(session: Session, make_engine: Callable[[EngineSettings], Engine]) -> Engine:
    """The session's engine, loaded and warm."""
    engine = make_engine(session.engine)
    try:
        engine.run(warm_up(session), session.time_limit_s)
    except BaseException:
        engine.close()
        raise
    return engine


def run_session(
    session: Session, owed: Collection[str], make_engine: Callable[[EngineSettings], Engine], trace: Trace | None = None
) -> Iterator[TrialResult]:
    """Run the trials named in `owed`, in the session's order. Yields each result as soon as it is there."""
    yield from run_trials(session, owed, start_engine(session, make_engine), trace)


def run_trials(session: Session, owed: Collection[str], engine: Engine, trace: Trace | None) -> Iterator[TrialResult]:
    """The same on an engine that is started; it is closed at the end."""
    process, same = uuid.uuid4().hex[:12], ("figure", "kind", "testbed", "scale", "model", "in_paper", "seed")
    try:
        for trial in (trial for trial in session.trials if trial.name in owed):
            phases, roles = phases_of(session, trial, trace)
            started = datetime.now(UTC)
            record = engine.run(phases, session.time_limit_s)
            ended = datetime.now(UTC)
            facts = {
                **{name: getattr(session, name) for name in same},
                "process": process,
                "phases": roles,
                "trace": {"name": trace.name, "kind": trace.kind, "sha256": trace.sha256} if trace else None,
                "settings": asdict(session.engine),
                "engine": dict(engine.facts),
                "machine": machine(),
                "started": started.isoformat(timespec="milliseconds"),
                "ended": ended.isoformat(timespec="milliseconds"),
                "truncated": record.truncated,
            }
            yield TrialResult(session.name, trial.name, facts, record)
    finally:
        engine.close()
