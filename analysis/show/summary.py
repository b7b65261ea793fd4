"""The table of a figure, on the terminal and as CSV: `python -m analysis.show.summary fig9a`."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from glob import escape
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.judge.load import (
    REFERENCE,
    Run,
    by_chunk_size,
    load_run,
    measurements,
    prefill_replicates,
    published_prefill,
    stated,
)
from analysis.judge.stats import sample
from experiments.records import terminal
from experiments.records.errors import SpecError
from experiments.records.metrics import NAMES, time_unit
from experiments.records.provenance import sha256
from experiments.records.store import write_whole
from experiments.records.terminal import arguments, command, console, paragraph, parse, result
from experiments.simulator.calibration import CALIBRATIONS, load_calibration
from experiments.spec.spec import load_testbed, read_yaml

WORDS = {"step": "one step, ms", **{name: f"{word}, s" for name, word in NAMES.items()}}
OF_KIND = {"prefill": ("step",), "serving": tuple(NAMES)}  # Figure 9a's own values stand in its table
NO_METRICS = {"model", "in_paper", "seed", "trial", "repeat", "truncated", "budget", "qps", "chunk_size"}


def prefill_table(run: Run) -> pd.DataFrame:
    """One row per point of Figure 9a: prefill seconds, and `relative` to unchunked, over_replicates.

    `published_relative` stands beside the model that the paper measured, at the paper's lengths and chunk sizes.
    """
    keys = ["model", "in_paper", "prompt_length", "chunk_size"]
    table = over_replicates(run, prefill_replicates(measurements(run)), keys, ["seconds", "relative"], {"relative": "prefill"})
    published = published_prefill().set_index(["prompt_length", "chunk_size"]).add_prefix("published_")
    joined = table.join(published, on=["prompt_length", "chunk_size"])
    joined.loc[~joined["in_paper"], list(published.columns)] = float("nan")
    ordered = by_chunk_size(joined, "model", "prompt_length")
    return ordered.sort_values("in_paper", ascending=False, kind="stable", ignore_index=True)


def serving_table(run: Run) -> pd.DataFrame:
    """One row per point of Figure 9b: every metric over_replicates; seconds, tokens, requests per second.

    `truncated`: how many more replicates a time limit cut short. They are in no value: those whom it left unserved waited
    longest. NaN where none is whole.
    `load` of a simulated run: its rate over the saturation throughput of that chunk size.
    """
    trials, keys = measurements(run), ["model", "qps", "chunk_size"]
    trials = trials[~trials["repeat"]]
    metrics = [name for name in trials.columns if name not in NO_METRICS]
    whole = trials.mask(trials["truncated"], trials.assign(**dict.fromkeys(set(metrics) - {"rate"}, math.nan)))
    cut = trials.groupby(keys, sort=False)["truncated"].sum().reset_index()
    table = over_replicates(run, whole, keys, metrics, {name: name for name in NAMES})
    table = by_chunk_size(table.merge(cut, on=keys, how="left"), "model", "qps")
    if saturation := run.plan.get("saturation"):
        most = [saturation[model][size] for model, size in zip(table["model"], table["chunk_size"], strict=True)]
        table.insert(len(keys), "load", table["rate"] / most)
    return table


def over_replicates(
    run: Run, rows: pd.DataFrame, keys: list[str], values: list[str], judged: Mapping[str, str]
) -> pd.DataFrame:
    """keys, the first of them the model; value, value_min, value_max: median, minimum and maximum over replicates; replicates:
    how many have the judged values.

    Of judged values, each with the quantity whose error a simulation has, also value_mean, the geometric mean, and the 95 % t
    interval of their logs, value_mean_low and value_mean_high, widened by that error. NaN where nothing is known.
    """
    groups = rows.groupby(keys, sort=False)
    table = groups[values].agg(["median", "min", "max"])
    table.columns = ["_".join(pair).removesuffix("_median") for pair in table.columns.to_flat_index()]
    for name, quantity in judged.items():
        means = [_mean(own, run.model_error(str(key[0]), quantity)) for key, own in groups[name]]
        table[["replicates", f"{name}_mean", f"{name}_mean_low", f"{name}_mean_high"]] = means
    return table.reset_index().astype({"replicates": int})


def _mean(values: pd.Series, error: float | None) -> tuple[int, float, float, float]:
    """How many are positive numbers (others did not finish), their mean and interval. On the scale of logs a ratio and its
    inverse are alike. error: relative; None: unknown."""
    there = [value for value in values if value > 0 and math.isfinite(value)]
    if not there:
        return 0, math.nan, math.nan, math.nan
    seen = sample(there, error or 0.0)
    low, high = seen.interval() if seen.n > 1 and error is not None else (math.nan, math.nan)
    return seen.n, float(seen.ratio), float(low), float(high)


def published_errors(table: pd.DataFrame) -> str:
    """How far a Figure 9a at the paper's scale is from the published values, in one sentence."""
    rows = table.dropna(subset=["published_prefill_ms"])
    times = (1e3 * rows["seconds"] / rows["published_prefill_ms"] - 1).abs()
    relative = (rows["relative"] / rows["published_relative"] - 1).abs()
    return (
        f"against the {len(rows)} published values: prefill time off by {times.mean():.1%} on average, "
        f"{times.max():.1%} at worst; relative time by {relative.mean():.1%} on average, {relative.max():.1%} at worst"
    )


def against_published(run: Run) -> pd.DataFrame:
    """calibration, quantity, source, at, predicted, published, off: relative; NaN where nothing is published.

    Empty for a run that was not simulated, and for one with calibrations that are not those at hand.
    """
    known, used = read_yaml(REFERENCE / "end_to_end.yaml"), {str(t.facts["engine"].get("calibration")) for t in run.trials}
    at_hand = {name for name in used & known.keys() if run.plan["identity"].get(name) == sha256(CALIBRATIONS / f"{name}.yaml")}
    rows = [{"calibration": name} | value for name in sorted(at_hand) for value in known[name].get("values", ())]
    fitted = {name for name in at_hand if any("/figure-2/decode" in source for source in load_calibration(name).sources)}
    for row in rows:
        row["source"] += ", fitted" * (row["source"] == "Figure 2" and row["calibration"] in fitted)
    table = pd.DataFrame(rows, columns=["calibration", "quantity", "source", "at", "predicted", "published"])
    table["published"] = table["published"].astype(float)
    table = table[table["quantity"].isin(OF_KIND[run.kind])]
    return table.assign(off=(table["predicted"] / table["published"] - 1).round(4) + 0.0).reset_index(drop=True)


def published_lines(table: pd.DataFrame) -> list[str]:
    """A line for each calibration and quantity of against_published."""
    return [
        f"{name} against published, {WORDS[str(quantity)]}: {'; '.join(map(_said, rows.to_dict('records')))}"
        for (name, quantity), rows in table.groupby(["calibration", "quantity"], sort=False)
    ]


def _said(row: Mapping[Any, Any]) -> str:
    published = f" ({row['source']}: {row['published']:.4g}, {number(row['off'], '+.0%')})"
    beside = published if row["published"] > 0 else " (not published)"
    return f"{row['at']} {row['predicted']:.4g}{beside}"


def number(value: float, form: str) -> str:
    """A number as people are shown it."""
    return "-" if pd.isna(value) else re.sub(r"^[+-](0%)$", r"\1", format(value, form))


def spread(row: Mapping[Any, Any], name: str, form: str, factor: float = 1.0, ends: Sequence[str] = ("_min", "_max")) -> str:
    """A value and its range, or its interval: `12.1 (11.9-12.6)`; the value alone if there is none."""
    value, low, high = (factor * row[f"{name}{end}"] for end in ("", *ends))
    return number(value, form) if pd.isna(low) or low == high else f"{value:{form}} ({low:{form}}-{high:{form}})"


def _parts(table: pd.DataFrame, at: str, cells: Callable[[Mapping[Any, Any]], Sequence[str]]) -> dict[str, list[Sequence[str]]]:
    """Model -> its rows for terminal.table, those of one prompt length or QPS together."""
    parts: dict[str, list[Sequence[str]]] = {}
    for (model, _), rows in table.groupby(["model", at], sort=False):
        part = parts.setdefault(str(model), [])
        part += [()] * bool(part)
        part += map(cells, rows.to_dict("records"))
    return parts


def show_prefill(run: Run, table: pd.DataFrame) -> None:
    """Print the table of Figure 9a."""

    def cells(row: Mapping[Any, Any]) -> Sequence[str]:
        published = "" if pd.isna(row["published_relative"]) else f"{row['published_relative']:.2f}"
        times = (spread(row, "seconds", ".1f", 1e3), spread(row, "relative", ".2f"), published)
        return str(row["prompt_length"]), row["chunk_size"], *times

    columns = ("prompt", "chunk size", "prefill ms", "relative", "published")
    terminal.table(columns, _parts(table, "prompt_length", cells))
    told = ["prompt, chunk size: the paper's tokens", "relative: to the same session's unchunked prefill"]
    told += [f"{model}: a panel the paper does not have" for model in table.loc[~table["in_paper"], "model"].unique()]
    paragraph("; ".join(told))
    if run.plan["scale"] == 1 and table["in_paper"].any():
        paragraph(published_errors(table))


def show_serving(run: Run, table: pd.DataFrame) -> None:
    """Print the table of Figure 9b; the CSV holds every metric."""
    factor, unit = time_unit([0.0, *table["ttft_p50"].dropna()])
    ttft = ".0f" if unit == "ms" else ".2f"

    def cells(row: Mapping[Any, Any]) -> Sequence[str]:
        size = f"{row['chunk_size']}{'*' if row['truncated'] else ''}"
        tbt = spread(row, "tbt_p99", ".1f" if row["tbt_p99"] < 0.1 else ".0f", 1e3)
        delay, busy = number(factor * row["scheduling_delay_p50"], ttft), number(row["utilisation"], ".0%")
        load = f"{row.get('load', row['rate']):.2f}"
        return f"{row['qps']:g}", load, size, spread(row, "ttft_p50", ttft, factor), tbt, delay, busy

    second = "load" if "load" in table else "run at"
    columns = ("QPS", second, "chunk", f"P50 TTFT {unit}", "P99 TBT ms", f"delay {unit}", "busy")
    terminal.table(columns, _parts(table, "qps", cells))
    what = "load: QPS over what that chunk size could serve" if "load" in table else "run at: requests per second here"
    paragraph(f"QPS, chunk: the paper's; {what}; delay: median scheduling delay")


TABLES = {"prefill": (prefill_table, show_prefill), "serving": (serving_table, show_serving)}


def cut_short(run: Run) -> list[str]:
    """The trials that their time limit ended, as sentences."""
    told = []
    for trial in (trial for trial in run.trials if trial.record.truncated):
        roles = {n: role for n, role in enumerate(trial.facts["phases"]) if role["role"] not in ("warm-up", "probe")}
        requests = trial.record.requests
        done = int((requests["phase"].isin(roles) & (requests["last_step"] >= 0)).sum())
        served = f"{done} of {sum(role.get('requests', 1) for role in roles.values())} requests served"
        told.append(f"cut short by its time limit: {trial.facts['session']} {trial.facts['trial']}, {served}")
    return told


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
    console.print()
    paragraph(f"{run.title}; median and range of {run.replicates} replicate{'s'[: run.replicates != 1]}")
    console.print()
    show(run, table)
    for line in published_lines(against_published(run)):
        paragraph(line)
    for told in cut_short(run):
        paragraph(f"* {told}; in no median of Figure 9b" if run.kind == "serving" else told)
    console.print(f"as CSV: {target}")
    points = json.loads(table.to_json(orient="records"))
    result(figure=run.figure, testbed=run.testbed, title=run.title, csv=target, points=points)
    return 0


if __name__ == "__main__":
    sys.exit(main())
