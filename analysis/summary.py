"""The table of a figure, on the terminal and as CSV: `python -m analysis.summary fig9a`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from analysis.load import Run, load_run, prefill_replicates, prefill_times, published_prefill, serving_trials
from experiments.provenance import ROOT
from experiments.terminal import command


def prefill_table(run: Run) -> pd.DataFrame:
    """One row per point of Figure 9a: median and range over replicates, of prefill seconds and relative to unchunked.

    `published_relative` stands beside the model that the paper measured, at the paper's lengths and chunk sizes.
    """
    replicates = prefill_replicates(prefill_times(run))
    keys = ["model", "in_paper", "prompt_length", "chunk_size"]
    table = replicates.groupby(keys, sort=False).agg(
        replicates=("seed", "nunique"),
        seconds=("seconds", "median"),
        seconds_min=("seconds", "min"),
        seconds_max=("seconds", "max"),
        relative=("relative", "median"),
        relative_min=("relative", "min"),
        relative_max=("relative", "max"),
    )
    published = published_prefill().set_index(["prompt_length", "chunk_size"]).add_prefix("published_")
    joined = table.reset_index().join(published, on=["prompt_length", "chunk_size"])
    joined.loc[~joined["in_paper"], list(published.columns)] = float("nan")
    order = joined["chunk_size"].map(_chunk_order)
    joined = joined.assign(order=order).sort_values(
        ["in_paper", "model", "prompt_length", "order"], ascending=[False, True, True, True]
    )
    return joined.drop(columns="order").reset_index(drop=True)


def published_errors(table: pd.DataFrame) -> str:
    """How far a Figure 9a at the paper's scale is from the published values, in one sentence."""
    rows = table.dropna(subset=["published_prefill_ms"])
    times = (1e3 * rows["seconds"] / rows["published_prefill_ms"] - 1).abs()
    relative = (rows["relative"] / rows["published_relative"] - 1).abs()
    return (
        f"against the {len(rows)} published values: prefill time off by {times.mean():.1%} on average, "
        f"{times.max():.1%} at worst; "
        f"relative time by {relative.mean():.1%} on average, {relative.max():.1%} at worst"
    )


def _spread(run: Run) -> str:
    return f"median and range of {run.replicates} replicate{'s'[: run.replicates > 1]}"


def show_prefill(run: Run, table: pd.DataFrame, console: Console) -> None:
    """Print the table of Figure 9a with its testbed and scale."""
    for model, rows in table.groupby("model", sort=False):
        panel = "" if rows["in_paper"].iloc[0] else ", a panel the paper does not have"
        console.print(f"\n{run.title}\n{model}, {_spread(run)}{panel}", soft_wrap=True)
        view = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("prompt", "chunk size", "prefill ms", "relative", "published"):
            view.add_column(name, justify="right")
        for row in rows.to_dict("records"):
            view.add_row(
                str(row["prompt_length"]),
                row["chunk_size"],
                f"{1e3 * row['seconds']:.1f} ({1e3 * row['seconds_min']:.1f}-{1e3 * row['seconds_max']:.1f})",
                f"{row['relative']:.2f} ({row['relative_min']:.2f}-{row['relative_max']:.2f})",
                "" if pd.isna(row["published_relative"]) else f"{row['published_relative']:.2f}",
                end_section=row["chunk_size"] == "unchunked",
            )
        console.print(view)
        if run.plan["scale"] == 1 and rows["in_paper"].iloc[0]:
            console.print(published_errors(rows), soft_wrap=True)
    console.print("prompt, chunk size: the paper's tokens; relative: to the same session's unchunked prefill")


SHOWN = ("ttft_p50", "tbt_p99")  # on the terminal, with ranges; the CSV holds every metric


def serving_table(run: Run) -> pd.DataFrame:
    """One row per point of Figure 9b: median, minimum and maximum over replicates of every metric; seconds, tokens."""
    trials = serving_trials(run)
    trials = trials[~trials["repeat"]]
    keys = ["model", "qps", "chunk_size"]
    metrics = [name for name in trials.columns if name not in {*keys, "in_paper", "seed", "trial", "repeat", "budget"}]
    table = trials.groupby(keys, sort=False)[metrics].agg(["median", "min", "max"])
    table.columns = ["_".join(pair).removesuffix("_median") for pair in table.columns.to_flat_index()]
    table.insert(0, "replicates", trials.groupby(keys, sort=False)["seed"].nunique())
    order = table.reset_index().assign(order=lambda rows: rows["chunk_size"].map(_chunk_order))
    return order.sort_values(["model", "qps", "order"]).drop(columns="order").reset_index(drop=True)


def _chunk_order(label: str) -> float:
    return float("inf") if label == "unchunked" else float(label)


def show_serving(run: Run, table: pd.DataFrame, console: Console) -> None:
    """Print the table of Figure 9b with its testbed, scale and trace."""
    for model, rows in table.groupby("model", sort=False):
        console.print(f"\n{run.title}\n{model}, {_spread(run)}", soft_wrap=True)
        view = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("QPS", "run at", "chunk", "P50 TTFT ms", "P99 TBT ms", "delay ms", "busy"):
            view.add_column(name, justify="right", no_wrap=True)
        last = None
        for row in rows.to_dict("records"):
            if last not in (None, row["qps"]):
                view.add_section()
            last = row["qps"]
            ranges = [f"{1e3 * row[n]:.0f} ({1e3 * row[f'{n}_min']:.0f}-{1e3 * row[f'{n}_max']:.0f})" for n in SHOWN]
            delay, busy = f"{1e3 * row['scheduling_delay_p50']:.0f}", f"{row['utilisation']:.0%}"
            view.add_row(f"{row['qps']:g}", f"{row['rate']:.2f}", row["chunk_size"], *ranges, delay, busy)
        console.print(view)
    console.print("QPS, chunk: the paper's; run at: requests per second here; delay: median scheduling delay")


TABLES = {"prefill": (prefill_table, show_prefill), "serving": (serving_table, show_serving)}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 if there is no finished run."""
    parser = argparse.ArgumentParser(prog="python -m analysis.summary", description=__doc__)
    parser.add_argument("figure", help="a figure's name")
    parser.add_argument("--testbed", default="auto", help="auto: the testbed of the newest run")
    parser.add_argument("--runs", type=Path, default=ROOT / "artifacts" / "runs")
    parser.add_argument("--report", type=Path, default=ROOT / "artifacts" / "report")
    options = parser.parse_args(argv)
    pattern = "*" if options.testbed == "auto" else options.testbed
    console = Console(highlight=False)
    run = load_run(list(options.runs.glob(f"{options.figure}-{pattern}/bag-*")))
    make_table, show = TABLES[run.kind]
    table = make_table(run)
    options.report.mkdir(parents=True, exist_ok=True)
    target = options.report / f"{run.figure}-{run.testbed}.csv"
    table.to_csv(target, index=False)
    show(run, table, console)
    console.print(f"as CSV: {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
