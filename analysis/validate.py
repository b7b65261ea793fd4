"""`make validate`: what the simulator predicts for the measured runs of this machine, point by point, and how far off it is.

Predicted are the very requests of each measured trial, with this machine's calibration. No measured run is calibrated on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from analysis.load import Run, TrialRecord, chunk_label, load_run
from analysis.plots import save
from analysis.plots_validate import validation_figure
from experiments.calibrate_here import calibrate, settings_of
from experiments.cost_model import Calibration, load_calibration
from experiments.doctor import choose_testbed
from experiments.engine import Phase, Record, Request
from experiments.estimate import calibration_here
from experiments.metrics import of_phase, prefill_seconds, serving_metrics
from experiments.provenance import ROOT, machine
from experiments.simulator import SimulatedEngine
from experiments.spec import EngineSettings, SpecError, Testbed
from experiments.terminal import command

STEP_TIME = "step time"
TOTAL_TARGET = 0.05  # of the summed step time
TARGETS = {"P50 TTFT": (0.10, 0.25), "P99 TBT": (0.10, 0.25)}  # median and worst error over the points of Figure 9b
METRICS = {"P50 TTFT": "ttft_p50", "P99 TBT": "tbt_p99"}


def phases_again(record: Record) -> list[Phase]:
    """The phases that a record's requests came from; arrivals count from the first of their phase."""
    phases = []
    for _, rows in record.requests.groupby("phase", sort=True):
        first = rows["arrival_s"].min()
        requests = tuple(
            Request(row["arrival_s"] - first, row["prompt_tokens"], row["output_tokens"]) for row in rows.to_dict("records")
        )
        phases.append(Phase(int(rows["budget"].iloc[0]), requests))
    return phases


def compare_trial(trial: TrialRecord, predicted: Record) -> list[dict[str, Any]]:
    """One row per metric and point of a trial: measured and predicted, seconds."""
    rows = []
    prefill = [prefill_seconds(r) for r in (trial.record, predicted)] if trial.facts["kind"] == "prefill" else None
    for phase, role in enumerate(trial.facts["phases"]):
        if role["role"] != "point":
            continue
        pair = [of_phase(record, phase) for record in (trial.record, predicted)]
        values = {STEP_TIME: [float(record.steps["seconds"].sum()) for record in pair]}
        if prefill:
            at, values["prefill"] = f"{role['prompt_length'] / 1024:g}k", [float(series[phase]) for series in prefill]
        else:
            both = [serving_metrics(record) for record in pair]
            at, values = f"QPS {role['qps']:g}", values | {name: [m[key] for m in both] for name, key in METRICS.items()}
        point = {"model": trial.facts["model"], "at": at, "chunk_size": chunk_label(role["chunk_size"])}
        rows += [point | {"metric": name, "measured": one, "predicted": two} for name, (one, two) in values.items()]
    return rows


def compare(run: Run, calibrations: Mapping[str, Calibration]) -> pd.DataFrame:
    """One row per point and metric: measured and predicted, seconds, and the error.

    Over passes and seeds: of prefill the median; of TTFT and TBT the geometric mean, as drawn; of step time the sum.
    calibrations: engine model -> calibration of this machine.
    """
    rows = []
    for trial in run.trials:
        if trial.repeat or not any(role["role"] == "point" for role in trial.facts["phases"]):
            continue
        settings = EngineSettings(**trial.facts["settings"])
        seed, blocks = trial.facts["seed"], trial.facts["engine"]["kv_blocks"]
        engine = SimulatedEngine(settings, calibrations[settings.model], seed, blocks)
        rows += compare_trial(trial, engine.run(phases_again(trial.record), 1e9))
    keys = ["model", "metric", "at", "chunk_size"]
    columns, points = ["measured", "predicted"], []
    for key, group in pd.DataFrame(rows).groupby(keys, sort=False)[columns]:
        point = dict(zip(keys, key, strict=True))
        if point["metric"] in METRICS:
            values = np.exp(np.log(group).mean())
        else:
            values = group.sum() if point["metric"] == STEP_TIME else group.median()
        points.append(point | {name: float(values[name]) for name in columns})
    table = pd.DataFrame(points)
    table = table.assign(error=lambda rows: rows["predicted"] / rows["measured"] - 1)
    table.insert(0, "figure", run.figure)
    return table


def judge(table: pd.DataFrame) -> list[tuple[str, bool]]:
    """Each target in a sentence with what came, and whether it is met."""
    found = []
    for figure, rows in table[table["metric"] == STEP_TIME].groupby("figure", sort=False):
        error = rows["predicted"].sum() / rows["measured"].sum() - 1
        words = f"{figure}: total step time {rows['measured'].sum():.1f} s measured, {rows['predicted'].sum():.1f} s predicted"
        found.append((f"{words}: {error:+.1%} (target: within {TOTAL_TARGET:.0%})", bool(abs(error) <= TOTAL_TARGET)))
    for metric, (median, worst) in TARGETS.items():
        errors = table.loc[table["metric"] == metric, "error"].abs()
        words = f"{metric}: median error {errors.median():.1%}, worst {errors.max():.1%} over {len(errors)} points"
        met = bool(errors.median() <= median and errors.max() <= worst)
        found.append((f"{words} (target: at most {median:.0%} and {worst:.0%})", met))
    return found


def show(run: Run, table: pd.DataFrame, console: Console) -> None:
    """Print predicted against measured for every point; the CSV holds step time too."""
    console.print(f"\n{run.title}\npredicted: SIMULATED with this machine's calibration; milliseconds", soft_wrap=True)
    view = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("model", "metric", "at", "chunk", "measured", "predicted", "error"):
        view.add_column(name, justify="right", no_wrap=True)
    for row in table[table["metric"] != STEP_TIME].to_dict("records"):
        numbers = (f"{1e3 * row['measured']:.1f}", f"{1e3 * row['predicted']:.1f}", f"{row['error']:+.1%}")
        view.add_row(row["model"], row["metric"], row["at"], row["chunk_size"], *numbers)
    console.print(view)


def measured_run(folder: Path, figure: str, testbed: str) -> Run:
    """A finished run of this machine. Raises SpecError, in one line with the remedy, if there is none."""
    bags = list(folder.glob(f"{figure}-{testbed}/bag-*"))
    if not bags:
        raise SpecError(f"{folder}: no finished {figure} on testbed {testbed}; make fig9a fig9b first, then make validate")
    run = load_run(bags)
    types = {trial.facts["machine"]["type"] for trial in run.trials}
    if types != {machine()["type"]}:
        raise SpecError(
            f"{bags[0].parent}: measured on {', '.join(sorted(types))}; allowed: a run of this machine, {machine()['type']}"
        )
    return run


def calibrations_for(testbed: Testbed, runs: Sequence[Run], console: Console) -> dict[str, Calibration]:
    """Engine model -> this machine's calibration: the stored one, or made now where there is none that holds."""
    models = {trial.facts["settings"]["model"] for run in runs for trial in run.trials}
    found = {}
    for model, (settings, decoding) in settings_of(testbed).items():
        if model not in models:
            continue
        path = calibration_here(testbed.testbed, settings)
        if path is None:
            console.print(f"calibrating {model}, about a minute", soft_wrap=True)
            path = calibrate(settings, decoding, testbed.testbed)
        found[model] = load_calibration(str(path))
        error = found[model].error
        console.print(f"{path}: held-out error {error.held_out:.1%} ({error.held_out_on})", soft_wrap=True)
    return found


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 if a target is missed, 2 if a run is missing or not of this machine."""
    parser = argparse.ArgumentParser(prog="python -m analysis.validate", description=__doc__)
    parser.add_argument("--testbed", default="auto")
    parser.add_argument("--runs", type=Path, default=ROOT / "artifacts" / "runs")
    parser.add_argument("--report", type=Path, default=ROOT / "artifacts" / "report")
    options = parser.parse_args(argv)
    console = Console(highlight=False)
    testbed, _ = choose_testbed(options.testbed, options.runs)
    runs = [measured_run(options.runs, figure, testbed.testbed) for figure in ("fig9a", "fig9b")]
    calibrations = calibrations_for(testbed, runs, console)
    tables = [compare(run, calibrations) for run in runs]
    for run, table in zip(runs, tables, strict=True):
        show(run, table, console)
    table = pd.concat(tables, ignore_index=True)
    target = options.report / f"validate-{testbed.testbed}"
    drawn = save(validation_figure(table, testbed.title), target)
    table.to_csv(target.with_suffix(".csv"), index=False)
    console.print(f"{target.with_suffix('.csv')}, {', '.join(path.name for path in drawn)}", soft_wrap=True)
    sentences = judge(table)
    for sentence, met in sentences:
        console.print(f"{'met   ' if met else 'MISSED'}  {sentence}", soft_wrap=True)
    return 0 if all(met for _, met in sentences) else 1


if __name__ == "__main__":
    sys.exit(main())
