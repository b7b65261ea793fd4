"""`make validate`: predict the measured runs of this machine from its calibration, and compare point by point.

Prediction: the very requests of each measured trial, served by the simulator at this machine's calibration.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from analysis.load import Run, TrialRecord, chunk_label, load_run
from experiments.calibrate_here import calibration_path
from experiments.cost_model import load_calibration
from experiments.engine import Phase, Record, Request
from experiments.metrics import of_phase, prefill_seconds, serving_metrics
from experiments.provenance import ROOT
from experiments.simulator import SimulatedEngine
from experiments.spec import EngineSettings, SpecError


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
    roles = trial.facts["phases"]
    prefill = trial.facts["kind"] == "prefill"
    measured_s, predicted_s = (prefill_seconds(r) for r in (trial.record, predicted)) if prefill else (None, None)
    for phase, role in enumerate(roles):
        if role["role"] != "point":
            continue
        point = {"model": trial.facts["model"], "chunk_size": chunk_label(role["chunk_size"])}
        if measured_s is not None and predicted_s is not None:
            point |= {"at": f"prompt {role['prompt_length']}", "metric": "prefill"}
            rows.append(point | {"measured": float(measured_s[phase]), "predicted": float(predicted_s[phase])})
            continue
        ours, theirs = of_phase(trial.record, phase), of_phase(predicted, phase)
        one, two = serving_metrics(ours), serving_metrics(theirs)
        point |= {"at": f"QPS {role['qps']:g}"}
        for metric in ("ttft_p50", "tbt_p99"):
            rows.append(point | {"metric": metric, "measured": one[metric], "predicted": two[metric]})
        busy = {"measured": float(ours.steps["seconds"].sum()), "predicted": float(theirs.steps["seconds"].sum())}
        rows.append(point | {"metric": "step_time", **busy})
    return rows


def compare(run: Run, folder: Path) -> pd.DataFrame:
    """One row per point and metric: medians over replicates (passes and seeds) of measured and predicted, and the error."""
    rows = []
    for trial in run.trials:
        if trial.repeat or not any(role["role"] == "point" for role in trial.facts["phases"]):
            continue
        settings = EngineSettings(**trial.facts["settings"])
        calibration = load_calibration(str(calibration_path(folder, run.testbed, settings.model)))
        engine = SimulatedEngine(settings, calibration, trial.facts["seed"], trial.facts["engine"]["kv_blocks"])
        rows += compare_trial(trial, engine.run(phases_again(trial.record), 1e9))
    keys = ["model", "metric", "at", "chunk_size"]
    table = pd.DataFrame(rows).groupby(keys, sort=False)[["measured", "predicted"]].median().reset_index()
    return table.assign(error=table["predicted"] / table["measured"] - 1)


def show(run: Run, table: pd.DataFrame, console: Console) -> None:
    """Print predicted against measured for every point, then the errors by metric."""
    console.print(f"\n{run.title}\npredicted: SIMULATED from this machine's calibration", soft_wrap=True)
    view = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("model", "metric", "at", "chunk", "measured ms", "predicted ms", "error"):
        view.add_column(name, justify="right", no_wrap=True)
    for row in table.to_dict("records"):
        numbers = (f"{1e3 * row['measured']:.1f}", f"{1e3 * row['predicted']:.1f}", f"{row['error']:+.1%}")
        view.add_row(row["model"], row["metric"], row["at"], row["chunk_size"], *numbers)
    console.print(view)
    for metric, rows in table.groupby("metric", sort=False):
        total = rows["predicted"].sum() / rows["measured"].sum() - 1
        errors = rows["error"].abs()
        median, worst = f"median error {errors.median():.1%}", f"worst {errors.max():.1%}"
        console.print(f"{metric}: {median}, {worst}, of the sum {total:+.1%} over {len(rows)} points")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 if a run or a calibration is missing."""
    parser = argparse.ArgumentParser(prog="python -m analysis.validate", description=__doc__)
    parser.add_argument("--testbed", default="cpu")
    parser.add_argument("--runs", type=Path, default=ROOT / "artifacts" / "runs")
    parser.add_argument("--report", type=Path, default=ROOT / "artifacts" / "report")
    options = parser.parse_args(argv)
    console = Console(highlight=False)
    try:
        for figure in ("fig9a", "fig9b"):
            run = load_run(list(options.runs.glob(f"{figure}-{options.testbed}/bag-*")))
            table = compare(run, options.runs)
            options.report.mkdir(parents=True, exist_ok=True)
            table.to_csv(options.report / f"validate-{figure}-{options.testbed}.csv", index=False)
            show(run, table, console)
    except SpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
