"""`make validate`: what the simulator predicts for the measured runs of this machine, point by point, and how far off it is.

Predicted are the very requests of each measured trial, with this machine's calibration. No measured run is calibrated on.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import gmean

from analysis.judge.load import Run, by_chunk_size, load_run, prefill_times, probe_steps, serving_trials
from analysis.show.plots import save
from analysis.show.plots_validate import validation_figure
from experiments.calibrate.here import calibrate, settings_of
from experiments.machine.doctor import choose_testbed
from experiments.records import terminal
from experiments.records.errors import SpecError
from experiments.records.metrics import NAMES
from experiments.records.provenance import machine
from experiments.records.record import STEP_COLUMNS, Phase, Record, Request
from experiments.records.store import write_whole
from experiments.records.terminal import arguments, command, console, parse, result, written
from experiments.simulator.calibration import Calibration, load_calibration
from experiments.simulator.cost_model import CostModel
from experiments.simulator.estimate import calibration_here
from experiments.simulator.simulator import SimulatedEngine
from experiments.spec.spec import EngineSettings, Testbed

STEP_TIME = "step time"
TOTAL_TARGET = 0.05  # of the summed step time
TARGETS = {"P50 TTFT": (0.10, 0.25), "P99 TBT": (0.10, 0.25)}  # median and worst error over the points of Figure 9b


def phases_again(record: Record) -> list[Phase]:
    """The phases that a record's requests came from; arrivals count from the first of their phase."""
    phases = []
    for _, rows in record.requests.groupby("phase", sort=True):
        arrivals = rows["arrival_s"] - rows["arrival_s"].min()
        requests = map(Request, arrivals.tolist(), rows["prompt_tokens"].tolist(), rows["output_tokens"].tolist())
        phases.append(Phase(int(rows["budget"].iloc[0]), tuple(requests)))
    return phases


def predicted_run(run: Run, calibrations: Mapping[str, Calibration]) -> Run:
    """The same run with records from the simulator. calibrations: engine model -> calibration of this machine."""
    trials = []
    for trial in run.trials:
        settings, blocks = EngineSettings(**trial.facts["settings"]), trial.facts["engine"]["kv_blocks"]
        engine = SimulatedEngine(settings, calibrations[settings.model], trial.facts["seed"], blocks)
        trials.append(replace(trial, record=engine.run(phases_again(trial.record), 1e9)))
    return replace(run, trials=tuple(trials))


def points(run: Run) -> pd.Series:
    """Seconds by model, at, chunk_size and metric.

    Over passes and seeds: of prefill the median; of TTFT and TBT the geometric mean; of step time the sum.
    """
    metrics: dict[str, Any] = {STEP_TIME: ("seconds", "sum")}
    if run.kind == "prefill":
        table = by_chunk_size(prefill_times(run), "model", "prompt_length")
        table["at"] = [f"{length / 1024:g}k" for length in table["prompt_length"]]
        metrics["prefill"] = "seconds", "median"
    else:
        table = by_chunk_size(serving_trials(run), "model", "qps")
        table["at"] = [f"QPS {qps:g}" for qps in table["qps"]]
        table["seconds"] = table["utilisation"] * table["duration"]  # in steps
        metrics |= {name: (key, gmean) for key, name in NAMES.items()}  # as it is drawn
    found = table.groupby(["model", "at", "chunk_size"], sort=False).agg(**metrics).rename_axis(columns="metric")
    return pd.Series(found.stack())


def compare(run: Run, calibrations: Mapping[str, Calibration]) -> pd.DataFrame:
    """One row per point and metric: measured and predicted, seconds, and the error. A trial's repetition is left out."""
    own = (t for t in run.trials if not t.repeat and any(role["role"] == "point" for role in t.facts["phases"]))
    run = replace(run, trials=tuple(own))
    pair = {"measured": points(run), "predicted": points(predicted_run(run, calibrations))}
    table = pd.DataFrame(pair).reset_index().assign(figure=run.figure)
    table = table[["figure", "model", "metric", "at", "chunk_size", "measured", "predicted"]]
    return table.assign(error=table["predicted"] / table["measured"] - 1)


def speeds(run: Run, calibrations: Mapping[str, Calibration]) -> dict[str, float]:
    """By model: how fast the machine was in the run, 1 at calibration: median of predicted over measured probe steps."""
    engines = {trial.facts["model"]: trial.facts["settings"]["model"] for trial in run.trials}
    found = {}
    for model, steps in probe_steps(run).groupby("model"):
        cost, batches = CostModel(calibrations[engines[model]]), steps[list(STEP_COLUMNS)[3:8]].to_numpy().tolist()
        found[str(model)] = float(np.median([cost.step(*batch) for batch in batches] / steps["seconds"]))
    return found


def judge(table: pd.DataFrame) -> list[tuple[str, bool]]:
    """Each target in a sentence with the value that was found, and whether it is met."""
    found = []
    for figure, rows in table[table["metric"] == STEP_TIME].groupby("figure", sort=False):
        measured, predicted = rows["measured"].sum(), rows["predicted"].sum()
        error = predicted / measured - 1
        words = f"{figure}: total step time {measured:.1f} s measured, {predicted:.1f} s predicted: {error:+.1%}"
        found.append((f"{words} (target: within {TOTAL_TARGET:.0%})", bool(abs(error) <= TOTAL_TARGET)))
    for metric, (median, worst) in TARGETS.items():
        errors = table.loc[table["metric"] == metric, "error"].abs()
        words = f"{metric}: median error {errors.median():.1%}, worst {errors.max():.1%} over {len(errors)} points"
        met = bool(errors.median() <= median and errors.max() <= worst)
        found.append((f"{words} (target: at most {median:.0%} and {worst:.0%})", met))
    return found


def show(run: Run, table: pd.DataFrame) -> None:
    """Print predicted against measured for every point; the CSV holds step time too."""
    console.print(f"\n{run.title}\npredicted: SIMULATED with this machine's calibration; milliseconds")
    view = terminal.table("model", "metric", "at", "chunk", "measured", "predicted", "error")
    for row in table[table["metric"] != STEP_TIME].to_dict("records"):
        numbers = (f"{1e3 * row['measured']:.1f}", f"{1e3 * row['predicted']:.1f}", f"{row['error']:+.1%}")
        view.add_row(row["model"], row["metric"], row["at"], row["chunk_size"], *numbers)
    console.print(view, soft_wrap=False)


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
    tables = [compare(run, calibrations) for run in runs]
    for run, table in zip(runs, tables, strict=True):
        show(run, table)
    table = pd.concat(tables, ignore_index=True)
    target = options.report / f"validate-{testbed.testbed}"
    drawn = save(validation_figure(table, testbed.title), target)
    files = [Path(f"{target}.csv"), *drawn]
    write_whole(files[0], table.to_csv(index=False))
    judged = judge(table)
    for sentence, met in judged:
        console.print(f"{'met   ' if met else 'MISSED'}  {sentence}")
    fast = {run.figure: speeds(run, calibrations) for run in runs}
    told = ", ".join(f"{figure} {model} {speed:.2f}" for figure, of in fast.items() for model, speed in of.items())
    console.print(f"speed of this machine in the runs, 1 at calibration, by the fixed step of every trial: {told}")
    console.print(written(*files))
    result(targets=[{"target": words, "met": met} for words, met in judged], speeds=fast, files=files)
    return 0 if all(met for _, met in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
