"""How long sessions take, and how heavy the paper's loads are: both from the simulator."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from experiments.cost_model import CALIBRATIONS, load_calibration
from experiments.expand import SATURATION, LoadPoint, Session, Trial, expand, saturation_sessions
from experiments.metrics import of_phase, point_phase, saturation_throughput
from experiments.provenance import machine, sha256
from experiments.session import phases_of
from experiments.simulator import simulated_engine
from experiments.spec import (
    MODELS,
    EngineSettings,
    Figure,
    ServingFigure,
    SpecError,
    Testbed,
    load_figure,
    load_testbed,
)
from experiments.terminal import command
from experiments.workload import Trace, synthetic_trace

HERE = CALIBRATIONS / "here"  # what make calibrate found on this machine; never in git


def made_on(settings: EngineSettings) -> dict[str, str]:
    """What must be the same for a calibration from make calibrate to hold: machine, model shape, dtype, threads, GPUs."""
    return {
        "machine": machine()["type"],
        "model": sha256(MODELS / f"{settings.model}.json"),
        "dtype": settings.dtype,
        "threads": str(settings.threads),
        "tensor_parallel": str(settings.tensor_parallel),
    }


def calibration_here(testbed: str, settings: EngineSettings) -> Path | None:
    """Where the calibration of this machine and model lies; None if there is none, or it was made under other conditions."""
    path = HERE / f"{testbed}-{settings.model}.yaml"
    return path if path.is_file() and load_calibration(str(path)).made_on == made_on(settings) else None


def calibrated(session: Session) -> Session:
    """The session with this machine's calibration where there is one, else with what its testbed names, if it names any."""
    path = calibration_here(session.testbed, session.engine)
    return replace(session, engine=replace(session.engine, calibration=str(path))) if path else session


def simulated_trial_seconds(session: Session, trial: Trial, trace: Trace | None) -> float:
    """Virtual seconds of a trial. Raises SpecError where no calibration covers the session's model and machine."""
    engine = simulated_engine(session.engine, session.seed)
    record = engine.run(phases_of(session, trial, trace)[0], session.time_limit_s)
    last = record.steps.iloc[-1]
    return float(last["start_s"] + last["seconds"])


def simulated_saturation(session: Session, trial: Trial, trace: Trace) -> float:
    """Requests per second of a trial in which all requests arrive at once. Raises SpecError as above."""
    phases, roles = phases_of(session, trial, trace)
    record = simulated_engine(session.engine, session.seed).run(phases, 1e9)
    return saturation_throughput(of_phase(record, point_phase(roles)))


Seconds = dict[str, dict[str, float]]  # session -> trial -> seconds; the engine's loading is the trial LOAD
LOAD = "load"


def session_seconds(
    figure: Figure,
    testbed: Testbed,
    replicates: int | None,
    measured: Mapping[str, float],
    owed: Mapping[str, Collection[str]],
    trace: Trace | None,
) -> tuple[Seconds, str]:
    """Seconds of the owed trials (session -> names), and what that rests on.

    Simulated where a calibration describes the machine, the saturation that `measured` does not hold yet included; where none
    does, or it does not cover a step, a guess from the testbed's rough figures.
    """
    if testbed.platform == "simulated":
        sessions = [session for session in expand(figure, testbed, replicates) if session.name in owed]
        return {session.name: _guess(session, owed[session.name]) for session in sessions}, "to simulate"
    first = [calibrated(session) for session in saturation_sessions(figure, testbed)]
    rates, bases, known = dict(measured), set[str](), dict[tuple[str, object], float]()
    for session in first:
        if trace and session.engine.calibration and session.model not in rates:
            with suppress(SpecError):
                rates[session.model] = simulated_saturation(session, session.trials[0], trace)
    found: Seconds = {}
    for session in (*first, *map(calibrated, expand(figure, testbed, replicates, rates))):
        trials = [trial for trial in session.trials if trial.name in owed.get(session.name, ())]
        if not trials:
            continue
        keys = [(session.model, trial.points[0] if trace else len(trial.points)) for trial in trials]  # seeds differ little
        try:
            for key, trial in zip(keys, trials, strict=True):
                known[key] = known[key] if key in known else simulated_trial_seconds(session, trial, trace)
        except SpecError:
            found[session.name] = _guess(session, owed[session.name])
            bases.add(f"a guess for {session.model}")
        else:
            own = {trial.name: known[key] for key, trial in zip(keys, trials, strict=True)}
            found[session.name] = {LOAD: testbed.estimate.load_s, **own}
            bases.add(f"{Path(str(session.engine.calibration)).stem}, simulated")
    return found, "; ".join(sorted(bases))


def _guess(session: Session, owed: Collection[str]) -> dict[str, float]:
    return dict.fromkeys(owed, session.estimate_s / len(session.trials))


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
        at_once = replace(point, rate=0.0, budget=smallest, requests=figure.requests)
        saturation = simulated_saturation(session, Trial(SATURATION, (at_once,)), trace)
        found[session.model] = [qps / saturation for qps in sorted(panel.qps)]
    return found


@command
def main() -> int:
    """Print the load fractions."""
    trace = synthetic_trace()
    for model, fractions in sorted(load_fractions(trace).items()):
        shown = ", ".join(f"{fraction:.2f}" for fraction in fractions)
        print(f"simulated, trace {trace.name}: {model}: the paper's QPS are {shown} of saturation")
    return 0


if __name__ == "__main__":
    sys.exit(main())
