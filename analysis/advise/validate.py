"""`make validate`: what the simulator predicts for the measured runs of this machine, point by point, and how far off it is.

Predicted are the very requests of each measured trial, with this machine's calibration. No measured run is calibrated on.
A machine is not always as fast as it was then, so every trial is predicted twice: at the speed of calibration, which is all
that can be foretold, and at the speed that the trial's own steps had, which leaves the errors of the model alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import compress, repeat
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import gmean

from analysis.judge.load import Run, by_chunk_size, load_run, measurements
from analysis.show.plots import save
from analysis.show.plots_advice import validation_figure
from experiments.calibrate.here import calibrate, settings_of
from experiments.machine.doctor import choose_testbed
from experiments.records import terminal
from experiments.records.errors import SpecError
from experiments.records.metrics import NAMES
from experiments.records.provenance import machine
from experiments.records.record import Phase, Record, Request
from experiments.records.store import write_whole
from experiments.records.terminal import arguments, command, console, paragraph, parse, result, written
from experiments.simulator.calibration import Calibration, at_speed, load_calibration
from experiments.simulator.cost_model import CostModel
from experiments.simulator.estimate import calibration_here
from experiments.simulator.simulator import SimulatedEngine
from experiments.spec.spec import EngineSettings, Testbed

Calibrations = Mapping[str, Calibration]  # of this machine, by the engine's model
STEP_TIME = "step time"
TOTAL_TARGET = 0.05  # of the summed step time
# median and worst error over the points
TARGETS = {"prefill": (0.05, 0.10), "P50 TTFT": (0.10, 0.25), "P99 TBT": (0.10, 0.25)}
ERRORS = {"error": "predicted", "own_error": "at_own_speed"}  # of which prediction


def phases_again(record: Record) -> list[Phase]:
    """The phases that a record's requests came from; arrivals count from the first of their phase."""
    phases = []
    for _, rows in record.requests.groupby("phase", sort=True):
        arrivals = rows["arrival_s"] - rows["arrival_s"].min()
        requests = map(Request, arrivals.tolist(), rows["prompt_tokens"].tolist(), rows["output_tokens"].tolist())
        phases.append(Phase(int(rows["budget"].iloc[0]), tuple(requests)))
    return phases


def predicted_run(run: Run, calibrations: Calibrations, speeds: Iterable[float] = repeat(1.0)) -> Run:
    """The same run with records from the simulator, each trial on a machine of its speed, 1 at calibration."""
    trials = []
    for trial, speed in zip(run.trials, speeds, strict=False):
        settings, blocks = EngineSettings(**trial.facts["settings"]), trial.facts["engine"]["kv_blocks"]
        engine = SimulatedEngine(settings, at_speed(calibrations[settings.model], speed), trial.facts["seed"], blocks)
        trials.append(replace(trial, record=engine.run(phases_again(trial.record), 1e9)))
    return replace(run, trials=tuple(trials))


def trial_speeds(run: Run, calibrations: Calibrations) -> list[float]:
    """How fast the machine was in each trial, 1 at calibration: predicted over measured time of its own steps."""
    pairs = ((calibrations[trial.facts["settings"]["model"]], trial.record.steps) for trial in run.trials)
    return [float(sum(CostModel(known).seconds(steps)) / steps["seconds"].sum()) for known, steps in pairs]


def speed_ranges(run: Run, speeds: Sequence[float]) -> dict[str, tuple[float, float, float]]:
    """By model the least, the median and the most of trial_speeds."""
    found = pd.Series(speeds).groupby([trial.facts["model"] for trial in run.trials]).agg(["min", "median", "max"])
    return {str(model): (least, middle, most) for model, least, middle, most in found.itertuples()}


def points(run: Run) -> pd.Series:
    """Seconds by model, at, chunk_size and metric.

    Over passes and seeds: of prefill the median; of TTFT and TBT the geometric mean; of step time the sum.
    """
    metrics: dict[str, Any] = {STEP_TIME: ("seconds", "sum")}
    if run.kind == "prefill":
        table = by_chunk_size(measurements(run), "model", "prompt_length")
        table["at"] = [f"{length / 1024:g}k" for length in table["prompt_length"]]
        metrics["prefill"] = "seconds", "median"
    else:
        table = by_chunk_size(measurements(run), "model", "qps")
        table["at"] = [f"QPS {qps:g}" for qps in table["qps"]]
        table["seconds"] = table["utilisation"] * table["duration"]  # in steps
        metrics |= {name: (key, gmean) for key, name in NAMES.items()}  # as it is drawn
    found = table.groupby(["model", "at", "chunk_size"], sort=False).agg(**metrics).rename_axis(columns="metric")
    return pd.Series(found.stack())


def compare(run: Run, calibrations: Calibrations, speeds: Sequence[float]) -> pd.DataFrame:
    """One row per point and metric: measured and predicted, seconds, and the error. A trial's repetition is left out.

    speeds: as trial_speeds gives them.
    """
    own = [not t.repeat and any(role["role"] == "point" for role in t.facts["phases"]) for t in run.trials]
    run, speeds = replace(run, trials=tuple(compress(run.trials, own))), [*compress(speeds, own)]
    kinds = {"measured": run, "predicted": predicted_run(run, calibrations)}
    kinds["at_own_speed"] = predicted_run(run, calibrations, speeds)
    table = pd.DataFrame({name: points(kind) for name, kind in kinds.items()}).reset_index().assign(figure=run.figure)
    table = table[["figure", "model", "metric", "at", "chunk_size", *kinds]]
    return table.assign(**{name: table[kind] / table["measured"] - 1 for name, kind in ERRORS.items()})


def judge(table: pd.DataFrame) -> list[tuple[str, bool]]:
    """Each target in a sentence with the value that was found, and whether it is met by what was foretold."""
    found = []
    for figure, rows in table[table["metric"] == STEP_TIME].groupby("figure", sort=False):
        measured, predicted = rows["measured"].sum(), rows["predicted"].sum()
        error = predicted / measured - 1
        words = f"{figure}: total step time {measured:.1f} s measured, {predicted:.1f} s predicted: {error:+.1%}"
        found.append((f"{words} (target: within {TOTAL_TARGET:.0%})", bool(abs(error) <= TOTAL_TARGET)))
    for metric, (median, worst) in TARGETS.items():
        errors = table.loc[table["metric"] == metric, list(ERRORS)].abs()
        middle, most = errors.median(), errors.max()
        foretold = f"median error {middle['error']:.1%}, worst {most['error']:.1%} over {len(errors)} points"
        own = f"at the machine's speed in each trial {middle['own_error']:.1%} and {most['own_error']:.1%}"
        met = bool(middle["error"] <= median and most["error"] <= worst)
        found.append((f"{metric}: {foretold} (target: at most {median:.0%} and {worst:.0%}); {own}", met))
    return found


def show(run: Run, table: pd.DataFrame) -> None:
    """Print foretold against measured for every point; the CSV holds step time too."""
    console.print()
    paragraph(run.title)
    console.print()
    rows = table[table["metric"] != STEP_TIME]
    named = [*(["metric"] if rows["metric"].nunique() > 1 else []), "at", "chunk_size"]
    parts: dict[str, list[Sequence[str]]] = {}
    for row in rows.to_dict("records"):
        times = (f"{1e3 * row[kind]:.1f}" for kind in ("measured", "predicted"))
        part = parts.setdefault(row["model"], [])
        part.append((*(row[name] for name in named), *times, *(f"{row[name]:+.1%}" for name in ERRORS)))
    terminal.table([*(name.removesuffix("_size") for name in named), "actual ms", "foretold ms", "error", "own"], parts)


def measured_run(folder: Path, figure: str, testbed: str) -> Run:
    """A finished run of this machine. Raises SpecError, in one line with the remedy, if there is none."""
    bags = list(folder.glob(f"{figure}-{testbed}/bag-*"))
    if not bags:
        raise SpecError(f"{folder}: no finished {figure} on testbed {testbed}; make fig9a fig9b first, then make validate")
    run, here = load_run(bags), machine()["type"]
    types = {trial.facts["machine"]["type"] for trial in run.trials}
    if types != {here}:
        found = f"measured on {', '.join(sorted(types))}"
        raise SpecError(f"{bags[0].parent}: {found}; allowed: a run of this machine, {here}")
    return run


def calibrations_for(testbed: Testbed, runs: Sequence[Run]) -> dict[str, Calibration]:
    """Engine model -> this machine's calibration: the stored one, or made now where there is none that holds."""
    needed = {trial.facts["settings"]["model"] for run in runs for trial in run.trials}
    found = {}
    for model, (settings, decoding) in settings_of(testbed).items():
        if model not in needed:
            continue
        path = calibration_here(testbed.testbed, settings)
        if path is None:
            console.print(f"calibrating {model}, about a minute")
            path = calibrate(settings, decoding, testbed.testbed)
        found[model] = load_calibration(str(path))
        error = found[model].error
        console.print(f"{path}: held-out error {error.held_out:.1%} ({error.held_out_on})")
    return found


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 if a target is missed, 2 if a run is missing or not of this machine."""
    options = parse(arguments("analysis.advise.validate", __doc__, "testbed", "runs", "report"), argv)
    testbed, _ = choose_testbed(options.testbed, options.runs)
    if testbed.platform == "simulated":
        raise SpecError(f"TESTBED: got {testbed.testbed}, which has no engine to be measured; allowed: a testbed with one")
    runs = [measured_run(options.runs, figure, testbed.testbed) for figure in ("fig9a", "fig9b")]
    calibrations = calibrations_for(testbed, runs)
    speeds = [trial_speeds(run, calibrations) for run in runs]
    tables = [compare(run, calibrations, own) for run, own in zip(runs, speeds, strict=True)]
    for run, table in zip(runs, tables, strict=True):
        show(run, table)
    own_speed = "own: the error at the speed that the machine had in each trial, by all its steps"
    paragraph(f"actual: measured; foretold: SIMULATED with this machine's calibration; {own_speed}")
    table = pd.concat(tables, ignore_index=True)
    target = options.report / f"validate-{testbed.testbed}"
    files = [Path(f"{target}.csv"), *save(validation_figure(table, testbed.title), target)]
    write_whole(files[0], table.to_csv(index=False))
    judged = judge(table)
    for sentence, met in judged:
        paragraph(f"{'met   ' if met else 'MISSED'}  {sentence}")
    fast = {run.figure: speed_ranges(run, own) for run, own in zip(runs, speeds, strict=True)}
    told = "; ".join(
        f"{figure} {model} {least:.2f} to {most:.2f}, median {middle:.2f}"
        for figure, of in fast.items()
        for model, (least, middle, most) in of.items()
    )
    paragraph(f"speed of this machine in the trials, 1 at calibration: {told}")
    paragraph("what is missed above, but not at the trials' own speed, is its drift: no calibration foretells that")
    console.print(written(*files))
    result(targets=[{"target": words, "met": met} for words, met in judged], speeds=fast, files=files)
    return 0 if all(met for _, met in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
