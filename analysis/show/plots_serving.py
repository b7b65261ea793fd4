"""Figure 9b as the paper draws it, the trade-off behind it, and pictures that explain a point and a trial."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, StrMethodFormatter

from analysis.judge.load import Run, chunk_label, chunk_order
from analysis.judge.trial import TrialRecord
from analysis.show import plots
from analysis.show.summary import serving_table
from experiments.records.metrics import NAMES, of_phase, point_phase, tbt, time_unit

Floats = npt.NDArray[np.float64]
MEANS = {f"{name}_mean": words for name, words in NAMES.items()}
# Vermillion of the same palette and a grey: no chunk size has them, and grey print keeps them apart (CIE L* 54 and 80).
PREFILL_COLOUR, DECODE_COLOUR = "#D55E00", "#C6C6C6"
QPS_LOOKS: tuple[tuple[str, Any], ...] = (("o", "solid"), ("s", (0, (4, 2))), ("^", (0, (1, 1))), ("D", "dashdot"))
MOST_STEPS = 1500  # of a trial that a picture has room for; of a longer one the middle is drawn
GAPS = np.geomspace(1e-6, 1e4, 5001)  # seconds between tokens: intervals in which they are counted, 0.5 % wide


def finished(run: Run) -> pd.DataFrame:
    """The rows of summary.serving_table that have both metrics. Of the others nothing finished, or one token each, or all was
    cut short; a gate says so."""
    return serving_table(run).dropna(subset=list(MEANS))


def load_words(qps: float, rates: Collection[float]) -> str:
    """The paper's QPS and, where it is another, the rate that was run for it, requests per second."""
    low, high = min(rates), max(rates)
    run_at = f" ({low:.2f}{f' to {high:.2f}' if high - low > 0.005 else ''} requests/s)"
    return f"QPS {qps:g}{run_at if max(qps - low, high - qps) > 0.005 else ''}"


def load_of(rows: pd.DataFrame) -> str:
    """load_words of rows of summary.serving_table that have one QPS."""
    return load_words(rows["qps"].iloc[0], [*rows["rate_min"], *rows["rate_max"]])


@plots.styled
def serving_figure(run: Run) -> Figure:
    """Figure 9b: a row per model, a panel per QPS; in it P50 TTFT and P99 TBT by chunk size, each on its own scale from 0."""
    panels = [[rows for _, rows in of_model.groupby("qps")] for _, of_model in finished(run).groupby("model")]
    shape = max(1, len(panels)), max([len(row) for row in panels], default=1)
    figure = plots.canvas(shape[1], (plots.PANEL_INCHES[1] + 0.2) * shape[0] + 0.5, run.title)
    grid = figure.subfigures(*shape, squeeze=False, hspace=0.04, wspace=0.03)
    for place, row in zip(grid, panels, strict=False):
        for panel, rows in zip(place, row, strict=False):
            title = f"{'SIMULATED: ' if run.simulated else ''}{rows['model'].iloc[0]}, {load_of(rows)}"
            panel.suptitle(f"{title}\n{plots.conditions(run, int(rows['replicates'].min()))}", fontsize=7.5)
            panel.supxlabel("chunk size (the paper's tokens)", fontsize=7.5)
            for axes, metric in zip(panel.subplots(1, 2), MEANS, strict=True):
                _bars(axes, rows, metric, run.simulated)
    return figure


def _bars(axes: Axes, rows: pd.DataFrame, metric: str, hatched: bool) -> None:
    """A bar per chunk size, the value above it."""
    factor, unit = time_unit(rows[metric])
    tops = rows[f"{metric}_high"].fillna(rows[metric]) * factor
    for x, (row, top) in enumerate(zip(rows.to_dict("records"), tops, strict=True)):
        value = factor * row[metric]
        axes.bar(x, value, 0.72, zorder=2, **plots.look(row["chunk_size"], hatched))
        plots.whisker(axes, x, factor * row[f"{metric}_low"], factor * row[f"{metric}_high"])
        digits = 2 if value < 10 else 1 if value < 100 else 0
        axes.annotate(f"{value:,.{digits}f}", (x, top), zorder=5, **plots.ABOVE)
    axes.set_ylim(0, 1.15 * tops.max())
    plots.label_groups(axes, list(rows["chunk_size"]))
    axes.set_ylabel(f"{MEANS[metric]} ({unit})")
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))


@plots.styled
def published_figure(run: Run, table: pd.DataFrame) -> Figure:
    """Table 4 of the paper, a panel per metric: what a simulated run's calibration makes of it beside what is published."""
    figure = plots.canvas(2, 3.0, "Table 4: Yi-34B, 128 requests of the original's trace at 1 request/s", run.title)
    for axes, (metric, rows) in zip(figure.subplots(1, len(NAMES)), table.groupby("quantity", sort=False), strict=True):
        for x, row in enumerate(rows.to_dict("records")):
            looks = plots.look("512", hatched=True), plots.look("other", hatched=False)
            for side, name, look in zip((-0.2, 0.2), ("predicted", "published"), looks, strict=True):
                axes.bar(x + side, row[name], 0.36, zorder=2, label=name if not x else None, **look)
                said = "not published" if pd.isna(row[name]) else f"{row[name]:.2f}"
                axes.annotate(said, (x + side, np.nan_to_num(row[name])), rotation=90, zorder=5, **plots.ABOVE)
        plots.label_groups(axes, [str(at).removeprefix("chunk size ") for at in rows["at"]])
        axes.set_ylim(0, 1.25 * max(rows["predicted"].max(), rows["published"].max()))
        axes.set(xlabel="chunk size (tokens)", ylabel=f"{NAMES[str(metric)]} (s)")
    axes.legend(["simulated", "published"], loc="upper left")
    return figure


@plots.styled
def tradeoff_figure(run: Run) -> Figure:
    """A panel per model: P50 TTFT over P99 TBT, a curve per QPS, its points labelled by chunk size. Nearer 0 is better."""
    models = [rows for _, rows in finished(run).groupby("model")]
    columns = max(1, len(models))
    figure = plots.canvas(columns, 3.6, "trade-off between TTFT and TBT", run.title)
    for axes, rows in zip(figure.subplots(1, columns, squeeze=False)[0], models, strict=False):
        _curves(axes, rows)
        plots.ground(axes, run)
        title = f"{'SIMULATED: ' if run.simulated else ''}{rows['model'].iloc[0]}"
        axes.set_title(f"{title}\n{plots.conditions(run, int(rows['replicates'].min()))}")
    return figure


def _curves(axes: Axes, rows: pd.DataFrame) -> None:
    """The curves of one model, on logarithmic scales: loads and chunk sizes differ by factors."""
    (of_x, x_unit), (of_y, y_unit) = time_unit(rows["tbt_p99_mean"]), time_unit(rows["ttft_p50_mean"])
    style: dict[str, Any] = {"markersize": 6, "markeredgecolor": "black", "markeredgewidth": 0.6}
    style |= {"ecolor": "black", "elinewidth": 0.8, "capsize": 1.8}
    # the lowest load lies lowest: its labels go to the other side
    below: dict[str, Any] = {"xytext": (-5, -4), "ha": "right", "va": "top"}
    beside: dict[str, Any] = {"xytext": (5, 4), "ha": "left", "va": "bottom"}
    for number, (_, curve) in enumerate(rows.groupby("qps")):
        marker, dashes = QPS_LOOKS[number % len(QPS_LOOKS)]
        line: dict[str, Any] = {"color": "#777777", "linestyle": dashes, "linewidth": 1}
        axes.plot(of_x * curve["tbt_p99_mean"], of_y * curve["ttft_p50_mean"], zorder=2, **line)
        axes.plot([], [], marker=marker, label=load_of(curve), **line)  # for the legend: with a marker, but of no chunk size
        for row in curve.to_dict("records"):
            point = (of_x * row["tbt_p99_mean"], of_y * row["ttft_p50_mean"])
            yerr = [[of_y * abs(row[f"ttft_p50_mean_{end}"] - row["ttft_p50_mean"])] for end in ("low", "high")]
            xerr = [[of_x * abs(row[f"tbt_p99_mean_{end}"] - row["tbt_p99_mean"])] for end in ("low", "high")]
            axes.errorbar(*point, yerr, xerr, marker=marker, color=plots.colour(row["chunk_size"]), **style)
            aside = beside if number else below
            axes.annotate(row["chunk_size"], point, textcoords="offset points", fontsize=6.5, zorder=5, **aside)
    axes.set(xscale="log", yscale="log", xlabel=f"P99 TBT ({x_unit})", ylabel=f"P50 TTFT ({y_unit})")
    axes.margins(0.16)
    plots.log_ticks(axes.xaxis, axes.yaxis)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, columnspacing=1, fontsize=6.5, handlelength=3.4)


@plots.styled
def tbt_figure(run: Run, model: str, qps: float) -> Figure:
    """Share of the gaps between tokens that are longer than so long, by chunk size; all seeds of a model and QPS pooled."""
    counts: dict[str, Any] = {}
    rates = []
    for trial in run.trials:  # counted one by one, so that all of them take the memory of one
        phase = point_phase(trial.facts["phases"])
        role = trial.facts["phases"][phase]
        if (trial.facts["model"], role.get("qps")) == (model, qps) and not trial.repeat:
            size, gaps = chunk_label(role["chunk_size"]), tbt(of_phase(trial.record, phase)).clip(GAPS[0], GAPS[-1])
            counts[size] = counts.get(size, 0) + np.histogram(gaps, GAPS)[0]
            rates.append(role["rate"])
    figure = plots.canvas(1, 2.9, f"TBT of {model}, {load_words(qps, rates)}", run.title)
    axes = figure.subplots()
    for size in sorted(counts, key=chunk_order):
        longer = counts[size].sum() - counts[size].cumsum()  # than the right end of each interval
        shown = (counts[size] > 0) & (longer > 0)
        if shown.any():
            style: dict[str, Any] = {"solid_capstyle": "butt", "drawstyle": "steps-post"}
            x, y = 1e3 * GAPS[1:][shown], longer[shown] / counts[size].sum()
            axes.plot(x, y, color="black", linewidth=2.2, **style)  # yellow on white needs it
            axes.plot(x, y, color=plots.colour(size), linewidth=1.3, label=f"chunk size {size}", **style)
    axes.axhline(0.01, color="black", linewidth=0.6, linestyle="dotted", zorder=0)
    axes.annotate("P99", (0.01, 0.01), xycoords=("axes fraction", "data"), xytext=(0, 2), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="TBT (ms)", ylabel="share of gaps that are longer")
    plots.log_ticks(axes.xaxis)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.legend(loc="best", fontsize=6.5)
    plots.ground(axes, run)
    return figure


@plots.styled
def trial_figure(run: Run, trial: TrialRecord) -> Figure:
    """What happened in one trial: time of each step, what its batch held beside the budget, how many requests waited."""
    phase = point_phase(trial.facts["phases"])
    role, record = trial.facts["phases"][phase], of_phase(trial.record, phase)
    count = len(record.steps)
    first = max(0, (count - MOST_STEPS) // 2)
    steps = record.steps.iloc[first : first + MOST_STEPS]
    drawn = "" if count <= MOST_STEPS else f", steps {first + 1:,} to {first + len(steps):,} of {count:,}"
    starts = steps["start_s"] - record.requests["arrival_s"].min()
    ends, milliseconds = starts + steps["seconds"], 1e3 * steps["seconds"]
    edges = np.maximum.accumulate(np.column_stack([starts, ends]).ravel())  # rounding may let an end pass the next start
    mixed, decodes = steps["prefill_tokens"] > 0, steps["decode_tokens"]
    load = load_words(role["qps"], [role["rate"]]) if role["rate"] else "all requests at once"
    what = f"{trial.facts['model']}, chunk size {chunk_label(role['chunk_size'])}, {load}, seed {trial.facts['seed']}"
    figure = plots.canvas(2, 4.2, what + drawn, run.title)
    time, batch, queue = rows = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 2))
    _areas(time, edges, milliseconds.where(mixed, 0), PREFILL_COLOUR, label="prefill (top: steps that hold some)")
    _areas(time, edges, milliseconds.where(~mixed, 0), DECODE_COLOUR, label="decode (top: steps of nothing else)")
    _areas(batch, edges, decodes, DECODE_COLOUR)
    _areas(batch, edges, decodes + steps["prefill_tokens"], PREFILL_COLOUR, decodes)
    _areas(queue, edges, steps["waiting"], "black")
    batch.axhline(role["budget"], label=f"chunk size, here {role['budget']} tokens", **plots.DASHED)
    for axes, label in zip(rows, ("step time (ms)", "tokens in the step", "requests\nwaiting"), strict=True):
        axes.set(ylabel=label, xlim=(starts.min(), ends.max()))
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=axes is queue))
        plots.ground(axes, run)
    queue.set_xlabel("seconds since the first request arrived")
    figure.align_ylabels(rows)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _areas(axes: Axes, edges: Floats, top: pd.Series, shade: str, base: pd.Series | float = 0.0, label: str = "") -> None:
    """A value per step as an area from its start to its end (`edges`, in turn); between two steps there is nothing."""
    if len(edges):
        heights, floor = np.zeros((2, len(edges) - 1))
        heights[::2], floor[::2] = top, base
        # rasterized: thousands of corners in a vector file serve nobody
        axes.stairs(heights, edges, baseline=floor, fill=True, color=shade, linewidth=0, label=label, rasterized=True)
