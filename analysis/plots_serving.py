"""Figure 9b as the paper draws it, the trade-off behind it, and pictures that explain a point and a trial."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from analysis.load import Run, TrialRecord, chunk_label, serving_trials
from analysis.plots import HATCH, MIN_GROUPS, PANEL_INCHES, STYLE, colour, conditions, headline, look, whisker
from analysis.stats import sample
from experiments.metrics import of_phase, point_phase, tbt

METRICS = {"ttft_p50": "P50 TTFT", "tbt_p99": "P99 TBT"}
KEYS = ["model", "in_paper", "qps", "chunk_size"]
# Vermillion of the same palette and a grey: no chunk size has them, and grey print keeps them apart (CIE L* 54 and 80).
PREFILL_COLOUR, DECODE_COLOUR = "#D55E00", "#C6C6C6"
QPS_LOOKS: tuple[tuple[str, Any], ...] = (("o", "solid"), ("s", (0, (4, 2))), ("^", (0, (1, 1))), ("D", "dashdot"))
MOST_STEPS = 1500  # of a trial that a picture has room for; of a longer one the middle is drawn
CURVE_POINTS = 300  # of a distribution, evenly spread over the logarithm of its complement
BUDGET_LINE: dict[str, Any] = {"color": "black", "linewidth": 0.8, "linestyle": (0, (4, 2))}
SIMULATED_GROUND: dict[str, Any] = {"hatch": HATCH, "edgecolor": "#DDDDDD", "linewidth": 0}  # where there are no bars to hatch


def serving_intervals(run: Run) -> pd.DataFrame:
    """One row per point of Figure 9b, by model, QPS and chunk size: P50 TTFT and P99 TBT, seconds, with 95 % t intervals.

    Columns: model, in_paper, qps (the paper's), chunk_size (text), rate and rate_high (lowest and highest, requests/s),
    replicates, then ttft_p50, ttft_p50_low, ttft_p50_high and the same of tbt_p99. A value is the geometric mean over seeds,
    its interval that of the logs; low and high are NaN where there are fewer than two replicates. A simulated interval is
    wider by the held-out error of its calibration.
    """
    trials = serving_trials(run)
    rows = []
    if len(trials):
        finished = trials[list(METRICS)].gt(0).all(axis=1)  # NaN: nothing finished, or one token each; a gate says so
        for key, group in trials[finished & ~trials["repeat"]].groupby(KEYS, sort=False):
            row = dict(zip(KEYS, key, strict=True)) | {"rate": group["rate"].min(), "rate_high": group["rate"].max()}
            for metric in METRICS:
                seen = sample(group[metric].tolist(), run.model_error(str(row["model"])))
                low, high = seen.interval() if seen.n > 1 else (math.nan, math.nan)
                row |= {"replicates": seen.n, metric: seen.ratio, f"{metric}_low": low, f"{metric}_high": high}
            rows.append(row)
    spread = [f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high")]
    table = pd.DataFrame(rows, columns=[*KEYS, "rate", "rate_high", "replicates", *spread])
    order = table["chunk_size"].map(lambda size: math.inf if size == "unchunked" else float(size))
    return table.assign(order=order).sort_values(["model", "qps", "order"]).drop(columns="order").reset_index(drop=True)


def load_words(qps: float, rates: Collection[float]) -> str:
    """The paper's QPS and the rate, requests per second, that was run for it."""
    low, high = min(rates), max(rates)
    return f"QPS {qps:g} ({low:.2f}{f' to {high:.2f}' if high - low > 0.005 else ''} requests/s)"


def load_of(rows: pd.DataFrame) -> str:
    """load_words of rows of serving_intervals that have one QPS."""
    return load_words(rows["qps"].iloc[0], [*rows["rate"], *rows["rate_high"]])


def serving_figure(run: Run) -> Figure:
    """Figure 9b: a row per model, a panel per QPS; in it P50 TTFT and P99 TBT by chunk size, each on its own scale from 0."""
    intervals = serving_intervals(run)
    panels = [[rows for _, rows in of_model.groupby("qps")] for _, of_model in intervals.groupby("model")]
    columns = max([len(row) for row in panels], default=1)
    with mpl.rc_context(STYLE):
        size = (PANEL_INCHES[0] * columns + 0.3, (PANEL_INCHES[1] + 0.1) * max(1, len(panels)) + 0.5)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        headline(figure, run, 48 * columns)
        grid = figure.subfigures(max(1, len(panels)), columns, squeeze=False, hspace=0.04, wspace=0.03)
        for place, row in zip(grid, panels, strict=False):
            for panel, rows in zip(place, row, strict=False):
                title = f"{'SIMULATED: ' if run.simulated else ''}{rows['model'].iloc[0]}, {load_of(rows)}"
                panel.suptitle(f"{title}\n{conditions(run, int(rows['replicates'].min()))}", fontsize=7.5)
                panel.supxlabel("chunk size (the paper's tokens)", fontsize=7.5)
                for axes, metric in zip(panel.subplots(1, 2), METRICS, strict=True):
                    _bars(axes, rows, metric, run.simulated)
    return figure


def _unit(seconds: Iterable[float]) -> tuple[float, str]:
    """Milliseconds, or seconds from ten of them on: factor and name."""
    return (1.0, "s") if max(seconds, default=0.0) >= 10 else (1e3, "ms")


def _digits(value: float) -> str:
    """About three digits."""
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _bars(axes: Axes, rows: pd.DataFrame, metric: str, hatched: bool) -> None:
    """A bar per chunk size, the value above it."""
    factor, unit = _unit(rows[metric])
    tops = rows[f"{metric}_high"].fillna(rows[metric]) * factor
    for x, (row, top) in enumerate(zip(rows.to_dict("records"), tops, strict=True)):
        axes.bar(x, factor * row[metric], 0.72, zorder=2, **look(row["chunk_size"], hatched))
        whisker(axes, x, factor * row[f"{metric}_low"], factor * row[f"{metric}_high"])
        where: dict[str, Any] = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "va": "bottom"}
        axes.annotate(_digits(factor * row[metric]), (x, top), fontsize=6.5, zorder=5, **where)
    axes.set_ylim(0, 1.15 * tops.max())
    middle, half = (len(rows) - 1) / 2, max(len(rows), MIN_GROUPS) / 2 + 0.05
    axes.set_xlim(middle - half, middle + half)
    axes.set_xticks(range(len(rows)), list(rows["chunk_size"]))
    axes.set_ylabel(f"{METRICS[metric]} ({unit})")
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.tick_params(axis="x", length=0)
    axes.spines[["top", "right"]].set_visible(False)


def tradeoff_figure(run: Run) -> Figure:
    """A panel per model: P50 TTFT over P99 TBT, a curve per QPS, its points labelled by chunk size. Nearer 0 is better."""
    intervals = serving_intervals(run)
    models = [rows for _, rows in intervals.groupby("model")]
    with mpl.rc_context(STYLE):
        columns = max(1, len(models))
        figure = Figure(figsize=(PANEL_INCHES[0] * columns + 0.3, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        headline(figure, run, 48 * columns, "trade-off between TTFT and TBT")
        for axes, rows in zip(figure.subplots(1, columns, squeeze=False)[0], models, strict=False):
            _curves(axes, rows, run.simulated)
            title = f"{'SIMULATED: ' if run.simulated else ''}{rows['model'].iloc[0]}"
            axes.set_title("\n".join([title, *conditions(run, int(rows["replicates"].min())).split("; ")]))
    return figure


def _curves(axes: Axes, rows: pd.DataFrame, hatched: bool) -> None:
    """The curves of one model, on logarithmic scales: loads and chunk sizes differ by factors."""
    (of_x, x_unit), (of_y, y_unit) = _unit(rows["tbt_p99"]), _unit(rows["ttft_p50"])
    handles: list[Artist] = []
    for (marker, line), (_, curve) in zip(QPS_LOOKS * len(rows), rows.groupby("qps"), strict=False):
        below = not handles  # the lowest load lies lowest: its labels go to the other side
        aside: dict[str, Any] = {"xytext": (-5, -4) if below else (5, 4), "ha": "right" if below else "left"}
        aside |= {"va": "top" if below else "bottom", "textcoords": "offset points"}
        axes.plot(of_x * curve["tbt_p99"], of_y * curve["ttft_p50"], color="#777777", linestyle=line, linewidth=1, zorder=2)
        for row in curve.to_dict("records"):
            point = (of_x * row["tbt_p99"], of_y * row["ttft_p50"])
            xerr, yerr = _errors(row, "tbt_p99", of_x), _errors(row, "ttft_p50", of_y)
            style: dict[str, Any] = {"marker": marker, "markersize": 6, "markeredgecolor": "black", "markeredgewidth": 0.6}
            style |= {"color": colour(row["chunk_size"]), "ecolor": "black", "elinewidth": 0.8, "capsize": 1.8}
            axes.errorbar(*point, yerr, xerr, **style)
            axes.annotate(row["chunk_size"], point, fontsize=6.5, zorder=5, **aside)
        handles.append(Line2D([], [], color="#777777", linestyle=line, linewidth=1, marker=marker, label=load_of(curve)))
    axes.set(xscale="log", yscale="log", xlabel=f"P99 TBT ({x_unit})", ylabel=f"P50 TTFT ({y_unit})")
    axes.margins(0.16)
    for axis in (axes.xaxis, axes.yaxis):
        _log_ticks(axis)
    below_axes: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17), "ncols": 2, "columnspacing": 1}
    axes.legend(handles=handles, fontsize=6.5, frameon=False, handlelength=3.4, **below_axes)
    axes.spines[["top", "right"]].set_visible(False)
    if hatched:
        axes.patch.set(**SIMULATED_GROUND)


def _errors(row: Mapping[Any, Any], metric: str, factor: float) -> list[list[float]] | None:
    """Distances from a value down and up to the ends of its interval, in the unit of `factor`; None without one."""
    low, value, high = (factor * row[f"{metric}{end}"] for end in ("_low", "", "_high"))
    return None if math.isnan(high) else [[value - low], [high - value]]


def _log_ticks(axis: Axis) -> None:
    """Plain numbers, enough of them on a range of less than a decade too."""
    low, high = axis.get_view_interval()
    subs = (1, 1.5, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5) if high < 100 * low else (1, 3)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(NullLocator())


def tbt_figure(run: Run, model: str, qps: float) -> Figure:
    """Share of the gaps between tokens that are longer than so long, by chunk size; all seeds of a model and QPS pooled."""
    gaps: dict[str, list[npt.NDArray[np.float64]]] = {}
    rates = []
    for trial in run.trials:
        role = trial.facts["phases"][point_phase(trial.facts["phases"])]
        if (trial.facts["model"], role.get("qps")) == (model, qps) and not trial.repeat:
            gaps.setdefault(chunk_label(role["chunk_size"]), []).append(tbt(_point(trial)))
            rates.append(role["rate"])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(PANEL_INCHES[0] + 0.3, 2.9), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for size in sorted(gaps, key=lambda label: math.inf if label == "unchunked" else float(label)):
            seconds, share = exceedance(np.concatenate(gaps[size]))
            if len(seconds):
                axes.plot(1e3 * seconds, share, color="black", linewidth=2.2, solid_capstyle="butt")  # yellow on white needs it
                axes.plot(1e3 * seconds, share, color=colour(size), linewidth=1.3, label=f"chunk size {size}")
        axes.axhline(0.01, color="black", linewidth=0.6, linestyle="dotted", zorder=0)
        axes.annotate("P99", (0.01, 0.01), xycoords=("axes fraction", "data"), xytext=(0, 2), textcoords="offset points")
        axes.set(xscale="log", yscale="log", xlabel="TBT (ms)", ylabel="share of gaps that are longer")
        _log_ticks(axes.xaxis)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        axes.legend(loc="best", fontsize=6.5, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        if run.simulated:
            axes.patch.set(**SIMULATED_GROUND)
        headline(figure, run, 44, f"TBT of {model}, {load_words(qps, rates)}")
    return figure


def exceedance(values: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Complementary distribution, thinned to CURVE_POINTS: values in rising order and the share of all that are longer.

    The longest is left out: nothing is longer, and a logarithm has no zero.
    """
    ordered = np.sort(values)
    if len(ordered) < 2:
        return ordered[:0], ordered[:0]
    longer = np.unique(np.geomspace(1, len(ordered) - 1, CURVE_POINTS).round().astype(np.int64))[::-1]
    return ordered[len(ordered) - 1 - longer], longer / len(ordered)


def _point(trial: TrialRecord) -> Any:
    """The measured part of a serving trial's record."""
    return of_phase(trial.record, point_phase(trial.facts["phases"]))


def trial_figure(run: Run, trial: TrialRecord) -> Figure:
    """What happened in one trial: time of each step, what its batch held beside the budget, how many requests waited."""
    record = _point(trial)
    role = trial.facts["phases"][point_phase(trial.facts["phases"])]
    steps, count = record.steps, len(record.steps)
    first = max(0, (count - MOST_STEPS) // 2)
    steps = steps.iloc[first : first + MOST_STEPS]
    drawn = "" if count <= MOST_STEPS else f", steps {first + 1:,} to {first + len(steps):,} of {count:,}"
    starts = steps["start_s"] - record.requests["arrival_s"].min()
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2 * PANEL_INCHES[0] + 0.3, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        rows = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 2))
        ends = starts + steps["seconds"]
        draw = _step_drawer(starts.to_numpy(), ends.to_numpy())
        mixed = steps["prefill_tokens"] > 0
        milliseconds = 1e3 * steps["seconds"]
        draw(rows[0], milliseconds.where(mixed, 0), PREFILL_COLOUR, None)
        draw(rows[0], milliseconds.where(~mixed, 0), DECODE_COLOUR, None)
        draw(rows[1], steps["decode_tokens"], DECODE_COLOUR, None)
        draw(rows[1], steps["decode_tokens"] + steps["prefill_tokens"], PREFILL_COLOUR, steps["decode_tokens"])
        rows[1].axhline(role["budget"], **BUDGET_LINE)
        draw(rows[2], steps["waiting"], "black", None)
        for axes, label in zip(rows, ("step time (ms)", "tokens in the step", "requests\nwaiting"), strict=True):
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=axes is rows[2]))
            axes.spines[["top", "right"]].set_visible(False)
            if run.simulated:
                axes.patch.set(**SIMULATED_GROUND)
            axes.set_xlim(starts.min(), ends.max())
        rows[2].set_xlabel("seconds since the first request arrived")
        figure.align_ylabels(rows)
        handles = [
            Patch(facecolor=PREFILL_COLOUR, label="prefill (top: steps that hold some)"),
            Patch(facecolor=DECODE_COLOUR, label="decode (top: steps of nothing else)"),
            Line2D([], [], label=f"chunk size, here {role['budget']} tokens", **BUDGET_LINE),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
        load = load_words(role["qps"], [role["rate"]]) if role["rate"] else "all requests at once"
        what = f"{trial.facts['model']}, chunk size {chunk_label(role['chunk_size'])}, {load}, seed {trial.facts['seed']}"
        headline(figure, run, 100, what + drawn)
    return figure


def _step_drawer(
    starts: npt.NDArray[np.float64], ends: npt.NDArray[np.float64]
) -> Callable[[Axes, pd.Series, str, pd.Series | None], None]:
    """A function that draws a value per step as an area from its start to its end; between two steps there is nothing."""
    edges = np.maximum.accumulate(np.column_stack([starts, ends]).ravel())  # rounding may let an end pass the next start

    def spread(values: pd.Series) -> npt.NDArray[np.float64]:
        return np.column_stack([values, np.zeros(len(values))]).ravel()[:-1].astype(np.float64)

    def draw(axes: Axes, values: pd.Series, shade: str, base: pd.Series | None) -> None:
        if len(values):
            floor = 0 if base is None else spread(base)  # rasterized: thousands of corners in a vector file serve nobody
            axes.stairs(spread(values), edges, baseline=floor, fill=True, color=shade, linewidth=0, rasterized=True)

    return draw
