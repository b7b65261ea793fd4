"""The table of a figure, on the terminal and as CSV: `python -m analysis.show.summary fig9a`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from analysis.judge.load import (
    Run,
    by_chunk_size,
    load_run,
    prefill_replicates,
    prefill_times,
    published_prefill,
    serving_trials,
    stated,
)
from analysis.show.published import against_published, published_lines
from experiments.records import terminal
from experiments.records.errors import SpecError
from experiments.records.metrics import time_unit
from experiments.records.store import write_whole
from experiments.records.terminal import arguments, command, console, parse, result
from experiments.spec.spec import load_testbed


def prefill_table(run: Run) -> pd.DataFrame:
    """One row per point of Figure 9a: median and range over replicates, of prefill seconds and relative to unchunked.

    `published_relative` stands beside the model that the paper measured, at the paper's lengths and chunk sizes.
    """
    keys = ["model", "in_paper", "prompt_length", "chunk_size"]
    table = _over_replicates(prefill_replicates(prefill_times(run)), keys, ["seconds", "relative"])
    published = published_prefill().set_index(["prompt_length", "chunk_size"]).add_prefix("published_")
    joined = table.join(published, on=["prompt_length", "chunk_size"])
    joined.loc[~joined["in_paper"], list(published.columns)] = float("nan")
    ordered = by_chunk_size(joined, "model", "prompt_length")
    return ordered.sort_values("in_paper", ascending=False, kind="stable", ignore_index=True)


def _over_replicates(rows: pd.DataFrame, keys: list[str], values: list[str]) -> pd.DataFrame:
    """keys, replicates, then value, value_min and value_max of each: its median, minimum and maximum over replicates."""
    groups = rows.groupby(keys, sort=False)
    table = groups[values].agg(["median", "min", "max"])
    table.columns = ["_".join(pair).removesuffix("_median") for pair in table.columns.to_flat_index()]
    table.insert(0, "replicates", groups["seed"].nunique())
    return table.reset_index()


def published_errors(table: pd.DataFrame) -> str:
    """How far a Figure 9a at the paper's scale is from the published values, in one sentence."""
    rows = table.dropna(subset=["published_prefill_ms"])
    times = (1e3 * rows["seconds"] / rows["published_prefill_ms"] - 1).abs()
    relative = (rows["relative"] / rows["published_relative"] - 1).abs()
    return (
        f"against the {len(rows)} published values: prefill time off by {times.mean():.1%} on average, "
        f"{times.max():.1%} at worst; relative time by {relative.mean():.1%} on average, {relative.max():.1%} at worst"
    )


def _begin(run: Run, model: object, columns: Sequence[str], more: str = "") -> Table:
    """Print what the table of a model is of; the table, to be filled."""
    spread = f"median and range of {run.replicates} replicate{'s'[: run.replicates > 1]}"
    console.print(f"\n{run.title}\n{model}, {spread}{more}")
    return terminal.table(*columns)


def _range(row: Mapping[Any, Any], value: str, digits: int, factor: float = 1.0) -> str:
    median, low, high = (_number(factor * row[name], f".{digits}f") for name in (value, f"{value}_min", f"{value}_max"))
    return f"{median} ({low}-{high})" if median != "-" else median


def _number(value: float, form: str) -> str:
    return "-" if pd.isna(value) else format(value, form)


def show_prefill(run: Run, table: pd.DataFrame) -> None:
    """Print the table of Figure 9a with its testbed and scale."""
    for model, rows in table.groupby("model", sort=False):
        in_paper = rows["in_paper"].iloc[0]
        columns = ("prompt", "chunk size", "prefill ms", "relative", "published")
        view = _begin(run, model, columns, "" if in_paper else ", a panel the paper does not have")
        for row in rows.to_dict("records"):
            published = "" if pd.isna(row["published_relative"]) else f"{row['published_relative']:.2f}"
            cells = (_range(row, "seconds", 1, 1e3), _range(row, "relative", 2), published)
            view.add_row(str(row["prompt_length"]), row["chunk_size"], *cells, end_section=row["chunk_size"] == "unchunked")
        console.print(view, soft_wrap=False)
        if run.plan["scale"] == 1 and in_paper:
            console.print(published_errors(rows))
    _show_published(run)
    console.print("prompt, chunk size: the paper's tokens; relative: to the same session's unchunked prefill")


def _show_published(run: Run) -> None:
    """What else is published, and what a simulated run's calibrations make of it."""
    for line in published_lines(against_published(run)):
        console.print(line)


def serving_table(run: Run) -> pd.DataFrame:
    """One row per point of Figure 9b: median, minimum and maximum over replicates of every metric; seconds, tokens.

    `truncated`: how many of the replicates a time limit cut short. They are in no median: those whom it left unserved waited
    longest. NaN where none is whole.
    `load` of a simulated run: its rate over the saturation throughput of that chunk size.
    """
    trials = serving_trials(run)
    trials = trials[~trials["repeat"]]
    keys = ["model", "qps", "chunk_size"]
    others = {*keys, "in_paper", "seed", "trial", "repeat", "budget", "truncated"}
    metrics = [name for name in trials.columns if name not in others]
    whole = trials.mask(trials["truncated"], trials.assign(**dict.fromkeys(set(metrics) - {"rate"}, float("nan"))))
    table = _over_replicates(whole, keys, metrics)
    cut = trials.groupby(keys, sort=False)["truncated"].sum().reset_index()
    table = by_chunk_size(table.merge(cut, on=keys, how="left"), "model", "qps")
    if saturation := run.plan.get("saturation"):
        most = [saturation[model][size] for model, size in zip(table["model"], table["chunk_size"], strict=True)]
        table.insert(len(keys), "load", table["rate"] / most)
    return table


def cut_short(run: Run) -> list[str]:
    """The trials that their time limit ended, as sentences."""
    told = []
    for trial in (trial for trial in run.trials if trial.record.truncated):
        roles = {n: role for n, role in enumerate(trial.facts["phases"]) if role["role"] not in ("warm-up", "probe")}
        requests = trial.record.requests
        done = int((requests["phase"].isin(roles) & (requests["last_step"] >= 0)).sum())
        asked = sum(role.get("requests", 1) for role in roles.values())
        told.append(
            f"cut short by its time limit: {trial.facts['session']} {trial.facts['trial']}, {done} of {asked} requests served"
        )
    return told


def show_serving(run: Run, table: pd.DataFrame) -> None:
    """Print the table of Figure 9b with its testbed, scale and trace; the CSV holds every metric."""
    for model, of_model in table.groupby("model", sort=False):
        factor, unit = time_unit([0.0, *of_model["ttft_p50"].dropna()])
        digits, fine = 0 if unit == "ms" else 2, int(of_model["tbt_p99"].max() < 0.1)
        second = "load" if "load" in table else "run at"
        view = _begin(run, model, ("QPS", second, "chunk", f"P50 TTFT {unit}", "P99 TBT ms", f"delay {unit}", "busy"))
        for qps, rows in of_model.groupby("qps", sort=False):
            for row in rows.to_dict("records"):
                delay = _number(factor * row["scheduling_delay_p50"], f".{digits}f")
                times = (_range(row, "ttft_p50", digits, factor), _range(row, "tbt_p99", fine, 1e3), delay)
                size = f"{row['chunk_size']}{'*' if row['truncated'] else ''}"
                load, busy = f"{row.get('load', row['rate']):.2f}", _number(row["utilisation"], ".0%")
                view.add_row(f"{qps:g}", load, size, *times, busy)
            view.add_section()
        console.print(view, soft_wrap=False)
    _show_published(run)
    what = "load: QPS over what that chunk size could serve" if "load" in table else "run at: requests per second here"
    console.print(f"QPS, chunk: the paper's; {what}; delay: median scheduling delay")


TABLES = {"prefill": (prefill_table, show_prefill), "serving": (serving_table, show_serving)}


def _bags(runs: Path, figure: str, testbed: str, named: Path | None) -> list[Path]:
    if named:
        return [Path(bag) for bag in json.loads(named.read_text())]
    name = load_testbed(testbed).testbed if testbed.endswith(".yaml") else testbed
    found = list(runs.glob(f"{escape(figure)}-{'*' if name == 'auto' else escape(name)}/bag-*"))
    found = [bag for bag in found if stated([bag], "figure") == figure]  # fig9a-* is also what a figure fig9a-x is called
    if not found:
        raise SpecError(f"OUT: {runs}: no finished {figure} on testbed {name}; make {figure} TESTBED={testbed} makes one")
    return found


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 if there is no finished run."""
    parser = arguments("analysis.show.summary", __doc__, "runs", "report")
    parser.add_argument("figure", help="a figure's name")
    parser.add_argument("--testbed", default="auto", help="a name, or a YAML file; auto: the testbed of the newest run")
    parser.add_argument("--bags", type=Path, help="the file in which experiments.run named them, in place of the options above")
    options = parse(parser, argv)
    run = load_run(_bags(options.runs, options.figure, options.testbed, options.bags))
    make_table, show = TABLES[run.kind]
    table = make_table(run)
    target = options.report / f"{run.figure}-{run.testbed}.csv"
    write_whole(target, table.to_csv(index=False))
    show(run, table)
    for told in cut_short(run):
        console.print(f"* {told}; in no median of Figure 9b" if run.kind == "serving" else told)
    console.print(f"as CSV: {target}")
    result(
        figure=run.figure, testbed=run.testbed, title=run.title, csv=target, points=json.loads(table.to_json(orient="records"))
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
