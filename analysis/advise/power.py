"""`make plan`'s last lines: how likely each claim of Figure 9b is to PASS on this machine, by simulation, before it is run.

Every seed of the figure is simulated with this machine's calibration; the rule of the verdicts then judges draws of as many
seeds as the run has replicates. What is not in it: a machine whose speed drifts, or that others disturb.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis.judge.claims import Claim, load_claims, rule
from analysis.judge.scope import Place, within
from analysis.judge.stats import Array, Sample
from experiments.engine.session import phases_of
from experiments.machine.doctor import choose_testbed
from experiments.records.errors import SpecError
from experiments.records.metrics import point_phase
from experiments.records.terminal import arguments, command, console, paragraph, parse, result
from experiments.simulator.estimate import calibrated, simulated_saturation
from experiments.simulator.simulator import simulated_engine
from experiments.spec.expand import LoadPoint, expand, saturation_sessions
from experiments.spec.spec import ServingFigure, Testbed, load_figure
from experiments.spec.traces import Trace
from experiments.spec.workload import choose_trace

WANTED = 0.98  # probability that all claims PASS together
DRAWS = 2000  # of seeds, for each number of replicates
METRICS = ("tbt_p99", "ttft_p50")
SECONDS = (5.0, 7.0, 10.0, 14.0)  # of arrivals in a trial, that --search tries
MOST_MINUTES = 20.0


class Power(NamedTuple):
    """Probability of PASS of each claim, by its id, and of all together."""

    claims: Mapping[str, float]
    together: float


def judged(figure: ServingFigure, testbed: Testbed) -> list[Claim]:
    """The claims of a figure that are judged on a testbed, by what its machine is."""
    own = [claim for claim in load_claims() if claim.figure == figure.figure and not claim.scope.ours]
    gpus = {panel.model: testbed.tensor_parallel or panel.tensor_parallel for panel in figure.panels}
    places = {model: Place(testbed.platform, testbed.scale, gpus[model]) for model in gpus if model in testbed.models}
    return [claim for claim in own if claim.model in places and within(places[claim.model], claim.scope)]


def simulated_metrics(figure: ServingFigure, testbed: Testbed, trace: Trace) -> pd.DataFrame:
    """One row for each seed of the figure and point: model, seed, qps, chunk_size (text), tbt_p99 and ttft_p50 in seconds.

    Raises SpecError where no calibration covers the machine and the steps.
    """
    rates, rows = dict[str, float](), list[tuple[object, ...]]()
    for session in map(calibrated, saturation_sessions(figure, testbed)):
        rates[session.model] = simulated_saturation(session, session.trials[0], trace)
    for session in map(calibrated, expand(figure, testbed, len(figure.seeds), rates)):
        for number, trial in enumerate(session.trials[:-1]):  # the last repeats the first
            point, (phases, roles) = trial.points[0], phases_of(session, trial, trace)
            assert isinstance(point, LoadPoint)
            engine = simulated_engine(session.engine, 1000 * session.seed + number)  # noise of its own, as each trial has
            seen = engine.served(engine.requests(phases[point_phase(roles)]))
            at = (session.model, session.seed, point.qps, str(point.chunk_size))
            rows.append((*at, *map(seen.percentile, METRICS)))
    return pd.DataFrame(rows, columns=["model", "seed", "qps", "chunk_size", *METRICS])


def logs_of(table: pd.DataFrame, claims: Sequence[Claim]) -> Array:
    """Log ratio of each claim and seed, shape (claims, seeds)."""
    wide = table.pivot_table(index="seed", columns=["model", "qps", "chunk_size"], values=list(METRICS))
    found = []
    for claim in claims:
        own = wide[claim.statistic.name][claim.model][claim.statistic.qps]
        found.append(np.log(own[str(claim.statistic.chunk_size)] / own[str(claim.statistic.against)]))
    return np.array(found)


def power(claims: Sequence[Claim], logs: Array, replicates: int) -> Power:
    """Probability of PASS at a first look, over draws of so many of the simulated seeds. logs: as logs_of gives them."""
    random = np.random.default_rng(1)
    draws = np.argsort(random.random((DRAWS, logs.shape[1])), axis=1)[:, :replicates]
    verdicts = rule(claims, [Sample(own[draws]) for own in logs]).verdict == "PASS"
    each = {claim.id: float(share) for claim, share in zip(claims, verdicts.mean(axis=0), strict=True)}
    return Power(each, float(verdicts.all(axis=1).mean()))


def search(figure: ServingFigure, testbed: Testbed, trace: Trace, claims: Sequence[Claim]) -> list[dict[str, float]]:
    """Replicates and seconds of a trial, each with the power of all claims together and the minutes that the sessions take."""
    assert testbed.serving is not None
    found = []
    for seconds in SECONDS:
        tried = replace(testbed, serving=replace(testbed.serving, trial_seconds=seconds))
        logs = logs_of(simulated_metrics(figure, tried, trace), claims)
        for count in range(3, logs.shape[1] + 1):
            minutes = sum(session.estimate_s + tried.estimate.load_s for session in expand(figure, tried, count)) / 60
            if minutes > MOST_MINUTES:
                break
            together = power(claims, logs, count).together
            found.append({"replicates": count, "seconds": seconds, "together": together, "minutes": minutes})
            if together >= WANTED:
                break
    return found


def tell_search(rows: Sequence[Mapping[str, float]]) -> dict[str, object]:
    """Print and return what search found."""
    for row in rows:
        told = f"{row['replicates']:2.0f} replicates of {row['seconds']:g} s: all PASS with probability {row['together']:.2f}"
        console.print(f"{told}, {row['minutes']:.0f} min")
    return {"search": rows}


def tell_power(found: Power, count: int) -> dict[str, object]:
    """Print and return the power of this many replicates."""
    each = ", ".join(f"{name} {share:.2f}" for name, share in found.claims.items())
    said = f"SIMULATED with this machine's calibration, {count} replicates, a quiet machine: PASS with probability {each}"
    paragraph(f"power     {said}; all together {found.together:.2f}", hang=" " * 10)
    return {"power": found.claims, "together": found.together, "replicates": count}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print the power of each claim; 0, also where nothing can be said, and why; 2 for bad input."""
    parser = arguments("analysis.advise.power", __doc__, "testbed", "out", "trace")
    parser.add_argument("figure", help="a serving figure's name")
    parser.add_argument("--replicates", type=int, help="default: the testbed's number")
    parser.add_argument("--search", action="store_true", help="which replicates and seconds of a trial suffice")
    options = parse(parser, argv)
    (testbed, _), figure = choose_testbed(options.testbed, options.out), load_figure(options.figure)
    told: dict[str, object] = {"power": None}
    if isinstance(figure, ServingFigure) and testbed.platform != "simulated" and testbed.serving:
        trace, claims = choose_trace(options.trace, max_total=figure.max_model_len), judged(figure, testbed)
        try:
            if options.search:
                told = tell_search(search(figure, testbed, trace, claims))
            else:
                logs = logs_of(simulated_metrics(figure, testbed, trace), claims)
                count = min(options.replicates or figure.replicates or testbed.replicates, logs.shape[1])
                told = tell_power(power(claims, logs, count), count)
        except SpecError as error:
            paragraph(f"power     not known: {error}; make calibrate measures this machine", hang=" " * 10)
    result(**told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
