"""What the simulator takes: Figure 9b at the paper's scale, and one long trial. Part of `make bench`; needs no engine.

Each in a fresh process, so that its peak of memory is its own. Seconds of computing in the simulator, once it is compiled:
interpreter start, the drawing of requests and storing apart.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from experiments.engine.session import phases_of, warm_up
from experiments.records.record import Phase
from experiments.records.terminal import arguments, command, paragraph, parse, result
from experiments.simulator.simulator import SimulatedEngine, simulated_engine
from experiments.spec.expand import LoadPoint, Trial, expand
from experiments.spec.spec import load_figure, load_testbed
from experiments.spec.traces import Trace
from experiments.spec.workload import choose_trace

LONG = 100_000  # requests of the long trial
TIMES = 5  # that Figure 9b is simulated; the median counts
# What is simulated: its requests if not Figure 9b's, whether its record is made, how often; most seconds on one core, most MB.
# The 44 million token times of the long trial's record alone are 0.7 GB.
WANTED = {
    "fig9b at the paper's scale": (None, True, TIMES, 0.15, 300),
    "one long trial, its percentiles": (LONG, False, 1, 3.0, 1000),
    "one long trial, its record": (LONG, True, 1, 3.0, 1000),
}


def work(trace: Trace, requests: int | None) -> list[tuple[SimulatedEngine, list[Phase], float]]:
    """Engine, phases and time limit of Figure 9b's trials, one seed, or of its first alone with that many `requests`."""
    pairs = [(s, trial) for s in expand(load_figure("fig9b"), load_testbed("a100-sim"), 1) for trial in s.trials[:-1]]
    if requests:
        session, trial = next(pair for pair in pairs if pair[0].model == "mistral-7b")
        point = trial.points[0]
        assert isinstance(point, LoadPoint)
        pairs = [(session, Trial(trial.name, (replace(point, requests=requests),)))]
        copies = -(-requests // len(trace.prompt))
        trace = replace(trace, prompt=np.tile(trace.prompt, copies), output=np.tile(trace.output, copies))
    made = []
    for session, trial in pairs:
        engine = simulated_engine(session.engine, session.seed)
        engine.run(warm_up(session), 1e9)
        made.append((engine, phases_of(session, trial, trace)[0], 1e9))
    return made


def simulate(trace: Trace, requests: int | None, record: bool, times: int) -> tuple[int, float, float]:
    """Trials, seconds of all of them together (median of so many times), peak MB."""
    trials, seconds = work(trace, requests), []
    for _ in range(times):
        began = time.process_time()
        for engine, phases, limit in trials:
            if record:
                made = engine.run(phases, limit)
                assert len(made.requests) == sum(len(phase.requests) for phase in phases)
                del made  # or the next would come beside it
            else:
                seen = engine.served(engine.requests(max(phases, key=lambda phase: len(phase.requests))))
                assert min(map(seen.percentile, ("tbt_p99", "ttft_p50", "delay_p50"))) > 0
        seconds.append(time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, else KiB
    return len(trials), float(np.median(seconds)), peak / (1e6 if sys.platform == "darwin" else 1e6 / 1024)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print time and memory beside their targets; 1 if one is missed."""
    trace = choose_trace(parse(arguments("tests.bench.bench_sim", __doc__, "trace"), argv).trace)
    met, found = True, {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name, (requests, record, times, limit_s, limit_mb) in WANTED.items():
            trials, seconds, peak = pool.apply(simulate, (trace, requests, record, times))
            what = f"{requests:,} requests" if requests else f"{trials} trials"
            paragraph(f"simulator, {name}, {what}, trace {trace.name}:")
            memory = f"peak {peak:.0f} MB (target at most {limit_mb})"
            paragraph(f"  {seconds:.2f} s on one core (target at most {limit_s:g}), {memory}")
            met = met and seconds <= limit_s and peak <= limit_mb
            found[name] = {"seconds": seconds, "peak_mb": peak}
    result(met=met, found=found)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
