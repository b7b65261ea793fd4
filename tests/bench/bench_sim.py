"""What the simulator takes: Figure 9b at the paper's scale, and one long trial. Part of `make bench`; needs no engine.

Each in a fresh process, so that its peak of memory is its own. Seconds in the simulator: interpreter start and storing apart.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from experiments.engine.session import phases_of
from experiments.records.terminal import arguments, command, console, parse, result
from experiments.simulator.simulator import simulated_engine
from experiments.spec.expand import LoadPoint, Trial, expand
from experiments.spec.spec import load_figure, load_testbed
from experiments.spec.workload import Trace, choose_trace

FIGURE_TARGET = (2.0, 300)  # seconds on one core, MB
LONG_REQUESTS, LONG_TARGET_S = 100_000, 60.0


def simulate(trace: Trace, requests: int | None) -> tuple[int, float, float]:
    """Trials, seconds and peak MB of Figure 9b's trials, one seed, or of its first alone with that many `requests`."""
    pairs = [(s, trial) for s in expand(load_figure("fig9b"), load_testbed("a100-sim"), 1) for trial in s.trials[:-1]]
    if requests:
        session, trial = next(pair for pair in pairs if pair[0].model == "mistral-7b")
        point = trial.points[0]
        assert isinstance(point, LoadPoint)
        pairs = [(session, Trial(trial.name, (replace(point, requests=requests),)))]
        copies = -(-requests // len(trace.prompt))
        trace = replace(trace, prompt=np.tile(trace.prompt, copies), output=np.tile(trace.output, copies))
    seconds = 0.0
    for session, trial in pairs:
        phases, _ = phases_of(session, trial, trace)
        began = time.perf_counter()
        record = simulated_engine(session.engine, session.seed).run(phases, 1e9)
        seconds += time.perf_counter() - began
        assert len(record.requests) == sum(len(phase.requests) for phase in phases)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, else KiB
    return len(pairs), seconds, peak / (1e6 if sys.platform == "darwin" else 1e6 / 1024)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print time and memory beside their targets; 1 if one is missed."""
    trace = choose_trace(parse(arguments("tests.bench.bench_sim", __doc__, "trace"), argv).trace)
    (limit_s, limit_mb), long = FIGURE_TARGET, f"simulator, one trial of {LONG_REQUESTS:,} requests"
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        trials, seconds, peak = pool.apply(simulate, (trace, None))
        console.print(f"simulator, fig9b at the paper's scale, {trials} trials, trace {trace.name}:")
        memory = f"peak {peak:.0f} MB (target at most {limit_mb})"
        console.print(f"  {seconds:.2f} s on one core (target at most {limit_s:g}), {memory}")
        _, long_s, long_peak = pool.apply(simulate, (trace, LONG_REQUESTS))
        console.print(f"{long}: {long_s:.1f} s (target at most {LONG_TARGET_S:g}), peak {long_peak:.0f} MB")
    met = seconds <= limit_s and peak <= limit_mb and long_s <= LONG_TARGET_S
    result(met=met, seconds=seconds, peak_mb=peak, long_s=long_s, long_peak_mb=long_peak)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
