"""What the driver adds to a trial: Ray brings its record back, the store writes it. Part of `make bench`; needs no vLLM."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from experiments.cluster.cluster import ray_cluster, run_sessions
from experiments.engine.session import TrialResult, run_trials
from experiments.records.store import Run
from experiments.simulator.simulator import simulated_engine
from experiments.spec.expand import LoadPoint, Session, Trial, expand
from experiments.spec.spec import load_figure, load_testbed
from experiments.spec.traces import Trace
from experiments.spec.workload import synthetic_trace

TRIALS, REQUESTS = 2000, 16
SETTLED = TRIALS // 4  # memory is compared from this trial on: pandas and pyarrow are loaded by then
TARGET_MS, TARGET_MB = 50.0, 20.0


def short_trials(session: Session, owed: Sequence[str], trace: Trace | None) -> Iterator[TrialResult | None]:
    """In place of experiments.engine.worker.work: the same on the simulator."""
    engine = simulated_engine(session.engine, session.seed)
    yield None
    yield from run_trials(session, owed, engine, trace)


def short_session() -> Session:
    """Figure 9b's first point, with few requests, again and again."""
    session = expand(load_figure("fig9b"), load_testbed("a100-sim"), 1)[0]
    point = session.trials[0].points[0]
    assert isinstance(point, LoadPoint)
    trials = tuple(Trial(f"trial-{number:04}", (replace(point, requests=REQUESTS),)) for number in range(TRIALS))
    return replace(session, trials=trials)


def measure() -> tuple[float, float]:
    """Milliseconds per trial, and MB by which the driver grows from trial SETTLED to the last."""
    session, sizes, stamps = short_session(), list[int](), list[float]()
    with tempfile.TemporaryDirectory(prefix="driver-") as folder, ray_cluster() as ray:
        run = Run(Path(folder) / "run", {})

        def store(result: TrialResult) -> None:
            run.write_trial(result.session, result.trial, result.facts, result.record)
            sizes.append(psutil.Process().memory_info().rss)
            stamps.append(time.perf_counter())

        owed = {session.name: [trial.name for trial in session.trials]}
        failed = run_sessions(ray, [session], owed, synthetic_trace(), store, work=short_trials)
        assert not failed, failed
        assert len(run.complete()) == TRIALS
    return 1e3 * (stamps[-1] - stamps[0]) / (TRIALS - 1), (sizes[-1] - sizes[SETTLED]) / 1e6


def line(ms: float, mb: float) -> str:
    """What was measured beside its targets."""
    words = f"driver, {TRIALS:,} trials of {REQUESTS} requests: {ms:.1f} ms each (target at most {TARGET_MS:g})"
    return f"{words}, memory {mb:+.1f} MB over the last {TRIALS - SETTLED:,} (target at most {TARGET_MB:g})"
