"""How long sessions take, and how heavy the paper's loads are: both from the simulator."""

from __future__ import annotations

import dataclasses
import sys

from experiments.expand import SATURATION, LoadPoint, Session, Trial, expand
from experiments.metrics import of_phase, point_phase, saturation_throughput
from experiments.session import phases_of
from experiments.simulator import simulated_engine
from experiments.spec import ServingFigure, SpecError, load_figure, load_testbed
from experiments.workload import Trace, synthetic_trace


def simulated_trial_seconds(session: Session, trial: Trial, trace: Trace | None) -> float:
    """Virtual seconds of a trial. Raises SpecError where no calibration covers the session's model and machine."""
    engine = simulated_engine(session.engine, session.seed)
    record = engine.run(phases_of(session, trial, trace)[0], session.time_limit_s)
    last = record.steps.iloc[-1]
    return float(last["start_s"] + last["seconds"])


def load_fractions(trace: Trace, testbed_name: str = "a100-sim") -> dict[str, list[float]]:
    """Model -> the QPS of Figure 9b as fractions of the simulated saturation throughput at the smallest chunk size."""
    figure, testbed = load_figure("fig9b"), load_testbed(testbed_name)
    assert isinstance(figure, ServingFigure)
    found = {}
    for session in expand(figure, testbed, replicates=1):
        panel = next(panel for panel in figure.panels if panel.model == session.model)
        point = session.trials[0].points[0]
        assert isinstance(point, LoadPoint)
        smallest = min(trial.points[0].budget for trial in session.trials)
        at_once = dataclasses.replace(point, rate=0.0, budget=smallest, requests=figure.requests)
        phases, roles = phases_of(session, Trial(SATURATION, (at_once,)), trace)
        record = simulated_engine(session.engine, session.seed).run(phases, 1e9)
        saturation = saturation_throughput(of_phase(record, point_phase(roles)))
        found[session.model] = [qps / saturation for qps in sorted(panel.qps)]
    return found


def main() -> int:
    """Print the load fractions."""
    try:
        trace = synthetic_trace()
        for model, fractions in sorted(load_fractions(trace).items()):
            shown = ", ".join(f"{fraction:.2f}" for fraction in fractions)
            print(f"simulated, trace {trace.name}: {model}: the paper's QPS are {shown} of saturation")
    except SpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
