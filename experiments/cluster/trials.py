"""Loads of one's own choosing on the real engine, through the same sessions as Figure 9b."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from experiments.engine.session import TrialResult
from experiments.records.errors import SpecError
from experiments.records.metrics import of_phase, point_phase
from experiments.records.record import Record
from experiments.spec.expand import FEWEST_REQUESTS, LoadPoint, Session, Trial
from experiments.spec.traces import Trace

TRIAL_SECONDS = 60.0  # of arrivals, where the testbed names no other


@dataclass(frozen=True)
class Load:
    """A load to serve: tokens per step, most requests in a step, requests per second."""

    budget: int
    max_batch: int
    rate: float


def load_sessions(
    base: Session, loads: Sequence[Load], seconds: float, max_total: int, switch: bool, most: int
) -> list[Session]:
    """The sessions that serve these loads, each for about `seconds` of arrivals, but at most `most` requests: the trace's.

    One for each max_batch, or, where an engine must not switch its chunk size, for each setting. `base`: any serving session of
    the model on the testbed; its seed is kept.
    """
    groups: dict[tuple[int, int], list[Load]] = {}
    for load in loads:
        groups.setdefault((load.max_batch, 0 if switch else load.budget), []).append(load)
    sessions = []
    for (max_batch, budget), own in groups.items():
        trials = []
        for load in own:
            requests = min(most, max(FEWEST_REQUESTS, round(load.rate * seconds)))
            point = LoadPoint(load.rate, load.budget * base.scale, load.rate, load.budget, requests, max_total)
            trials.append(Trial(f"chunk{load.budget}-rate{load.rate:.4g}", (point,)))
        engine = replace(base.engine, max_batch=max_batch, max_budget=max(load.budget for load in own))
        name = f"{base.model}-seed{base.seed}-batch{max_batch}{f'-chunk{budget}' if budget else ''}"
        sessions.append(replace(base, name=name, engine=engine, trials=tuple(trials)))
    return sessions


def serve_loads(sessions: Sequence[Session], trace: Trace) -> list[tuple[Load, Record]]:
    """Serve them, saying what goes wrong; each load with the record of its measured phase. Raises SpecError if one fails."""
    from experiments.cluster.cluster import ray_cluster, run_sessions

    results: list[TrialResult] = []
    owed = {session.name: [trial.name for trial in session.trials] for session in sessions}
    with ray_cluster() as ray:
        failed = run_sessions(ray, sessions, owed, trace, results.append)
    if failed:
        raise SpecError("; ".join(f"{name}: {reason}" for name, reason in failed.items()))
    found = []
    for result in results:
        phases, batch = result.facts["phases"], result.facts["settings"]["max_batch"]
        role = phases[number := point_phase(phases)]
        found.append((Load(role["budget"], batch, role["rate"]), of_phase(result.record, number)))
    return found
