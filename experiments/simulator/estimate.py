"""How long sessions take, and what a simulated machine can serve: both from the simulator."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

from experiments.engine.session import phases_of
from experiments.records.errors import SpecError
from experiments.records.metrics import of_phase, point_phase, saturation_throughput
from experiments.records.provenance import machine, sha256
from experiments.records.terminal import console
from experiments.simulator.calibration import CALIBRATIONS, load_calibration
from experiments.simulator.simulator import simulated_engine
from experiments.spec.expand import SATURATION, LoadPoint, Session, Trial, expand, saturation_sessions
from experiments.spec.spec import EngineSettings, Figure, Testbed, model_path
from experiments.spec.traces import Trace

HERE = CALIBRATIONS / "here"  # what make calibrate found on this machine; never in git


def made_on(settings: EngineSettings) -> dict[str, str]:
    """What must be the same for a calibration from make calibrate to hold: machine, model shape, dtype, threads, GPUs, and what
    share of their memory its KV blocks are of."""
    share = settings.gpu_memory_utilization
    return {
        "machine": machine()["type"],
        "model": sha256(model_path(settings.model)),
        "dtype": settings.dtype,
        "threads": str(settings.threads),
        "tensor_parallel": str(settings.tensor_parallel),
        **({"gpu_memory_utilization": str(share)} if share else {}),
    }


def calibration_here(testbed: str, settings: EngineSettings, called: str = "") -> Path | None:
    """Where the calibration of this machine and model lies; None if there is none, or it was made under other conditions.

    `called`: in the place of the model, where that is none of Figure 9. Raises SpecError for one that is damaged.
    """
    path = HERE / f"{testbed}-{called or settings.model}.yaml"
    try:
        return path if path.is_file() and load_calibration(str(path)).made_on == made_on(settings) else None
    except SpecError as error:
        remedy = "delete it, and it is made anew" if called else f"make calibrate TESTBED={testbed} makes it anew"
        raise SpecError(f"{error}; {remedy}") from None


say_once = cache(console.print)


def calibrated(session: Session) -> Session:
    """The session with this machine's calibration where there is one, else with what its testbed names, if it names any.

    One that cannot be read is told and left aside: here it serves an estimate only.
    """
    try:
        path = calibration_here(session.testbed, session.engine)
    except SpecError as error:
        say_once(f"estimated without this machine's calibration: {error}")
        return session
    return replace(session, engine=replace(session.engine, calibration=str(path))) if path else session


def simulated_trial_seconds(session: Session, trial: Trial, trace: Trace | None) -> float:
    """Virtual seconds of a trial. Raises SpecError where no calibration covers the session's model and machine."""
    phases, _ = phases_of(session, trial, trace)
    last = simulated_engine(session.engine, session.seed).run(phases, session.time_limit_s).steps.iloc[-1]
    return float(last["start_s"] + last["seconds"])


def simulated_saturation(session: Session, trial: Trial, trace: Trace) -> float:
    """Requests per second of a trial in which all requests arrive at once. Raises SpecError as above."""
    phases, roles = phases_of(session, trial, trace)
    record = simulated_engine(session.engine, session.seed).run(phases, 1e9)
    return saturation_throughput(of_phase(record, point_phase(roles)))


Seconds = dict[str, dict[str, float]]  # session -> trial -> seconds; the engine's loading is the trial LOAD
LOAD = "load"
MANY = 8192  # requests that arrive at once


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
    rates, bases, found, known = dict(measured), set[str](), Seconds(), dict[tuple[str, object], float]()
    for session in first:
        if trace and session.model not in rates:
            with suppress(SpecError):  # for want of a calibration
                rates[session.model] = simulated_saturation(session, session.trials[0], trace)
    for session in (*first, *map(calibrated, expand(figure, testbed, replicates, rates))):
        own = {LOAD: testbed.estimate.load_s}
        try:
            for trial in (trial for trial in session.trials if trial.name in owed.get(session.name, ())):
                key = session.model, trial.points[0] if trace else len(trial.points)  # seeds differ little
                if key not in known:
                    known[key] = simulated_trial_seconds(session, trial, trace)
                own[trial.name] = known[key]
        except SpecError:
            found[session.name] = _guess(session, owed[session.name])
            bases.add(f"a guess for {session.model}")
        else:
            if len(own) > 1:
                if session.kind == "prefill":
                    own[LOAD] += max(own[name] for name in own if name != LOAD)  # a pass, to warm up
                found[session.name] = own
                bases.add(f"{Path(str(session.engine.calibration)).stem}, simulated")
    return found, "; ".join(sorted(bases))


def _guess(session: Session, owed: Collection[str]) -> dict[str, float]:
    return dict.fromkeys(owed, session.estimate_s / len(session.trials))


def simulated_saturations(sessions: Sequence[Session], trace: Trace) -> dict[str, dict[str, float]]:
    """Model -> chunk size (the paper's tokens) -> the simulated saturation throughput, requests per second.

    Of at most MANY requests, if the trace has them, by the first seed: of a trial's 1,024 it varies by 5 % from seed to seed.
    Raises SpecError as above.
    """
    found: dict[str, dict[str, float]] = {}
    for session in sessions:
        for point in (point for trial in session.trials for point in trial.points if isinstance(point, LoadPoint)):
            rates, size = found.setdefault(session.model, {}), str(point.chunk_size or "unchunked")
            if size not in rates:
                at_once = replace(point, rate=0.0, requests=min(MANY, len(trace.prompt)))
                rates[size] = simulated_saturation(session, Trial(SATURATION, (at_once,)), trace)
    return {model: dict(sorted(rates.items())) for model, rates in found.items()}
