"""The pictures of advice: capacity against the P99 TBT target, and predicted against measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import cycle, product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.judge.load import chunk_order
from analysis.show.plots import COLOURS, DASHED, PANEL_INCHES, canvas, colour, log_ticks, styled

# The paper's chunk sizes have their colours of every figure, others that are advised their own; the rest is grey, with dashes.
ADVISED = ("#D55E00", "#009E73", "#CC79A7", "#56B4E9")
BOLD = {"linewidth": 3.0, "zorder": 4}
OTHERS = ("#888888", "#BBBBBB")
DASHES = ("solid", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))
PANELS = {"prefill": "prefill time, 9a (ms)", "P50 TTFT": "P50 TTFT, 9b (ms)", "P99 TBT": "P99 TBT, 9b (ms)"}
BANDS = ((0.25, "#EEEEEE"), (0.10, "#D8D8D8"))  # the errors that are allowed at worst and at the median
POINT: dict[str, Any] = {"linestyle": "none", "markeredgecolor": "black", "markeredgewidth": 0.5, "markersize": 5}


@styled
def capacity_figure(
    curves: pd.DataFrame, title: str, targets: Mapping[str, Mapping[str, float]], marks: pd.DataFrame, unchunked: int
) -> Figure:
    """A panel per model.

    curves: model, chunk_size (tokens), target (s), capacity (requests/s); by target. targets: model -> name -> P99 TBT (s),
    drawn as vertical lines. marks: model, target, capacity, low, high, label: the chunk sizes advised, whose curves are bold,
    with their interval where there is a target (else NaN).
    """
    models = list(dict.fromkeys(curves["model"]))
    looks = _looks(map(str, sorted(curves["chunk_size"].unique())), {*marks["label"]})
    figure = canvas(1.25 * len(models), 1.3 * PANEL_INCHES[1] + 1.0, title)
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        rows, best = curves[curves["model"] == model], marks[marks["model"] == model]
        for size, look in looks.items():
            curve, advised = rows[rows["chunk_size"] == int(size)], size in {*best["label"]}
            label = f"chunk size {size}{' (unchunked)' * (int(size) >= unchunked)}"
            label += " (recommended)" * (advised and len(models) == 1)
            axes.plot(curve["target"], curve["capacity"], label=label, **look | (BOLD if advised else {}))
        _marks(axes, best.dropna(subset="target"))
        for name, target in targets.get(model, {}).items():
            axes.axvline(target, color="black", linewidth=0.6, linestyle=(0, (1, 2)))
            where: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "xytext": (-3, 0), "textcoords": "offset points"}
            ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            axes.annotate(name, (target, 0.02), ha="right", va="bottom", rotation=90, bbox=ground, zorder=4, **where)
        axes.set(title=f"SIMULATED: {model}", xlabel="P99 TBT target (s)", ylabel="capacity (requests/s)")
        axes.set(xscale="log", xlim=(rows["target"].min(), rows["target"].max()), ylim=(0, None))
        log_ticks(axes.xaxis)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(once.values(), once.keys(), loc="outside lower center", ncols=2 * len(models))
    return figure


def _looks(sizes: Iterable[str], advised: set[str]) -> dict[str, dict[str, Any]]:
    """How the curve of each chunk size is drawn, no two alike."""
    own, greys, looks = cycle(ADVISED), cycle(product(DASHES, OTHERS)), dict[str, dict[str, Any]]()
    for size in sizes:
        if size in COLOURS or size in advised:
            looks[size] = {"color": COLOURS.get(size) or next(own), "linewidth": 1.6, "zorder": 3}
        else:
            dash, grey = next(greys)
            looks[size] = {"color": grey, "linestyle": dash, "linewidth": 1.0, "zorder": 2}
    return looks


def _marks(axes: Axes, rows: pd.DataFrame) -> None:
    for row in rows.to_dict("records"):
        x, interval = row["target"], (row["low"], row["high"])
        axes.plot([x, x], interval, color="black", linewidth=0.9, marker="_", markersize=4, zorder=5)
        axes.plot([x], [row["capacity"]], "ko", markersize=3.5, zorder=5, label="recommended (bold), 95 % interval")
        where: dict[str, Any] = {"xytext": (5, -2), "textcoords": "offset points", "fontsize": 6.5, "fontweight": "bold"}
        axes.annotate(row["label"], (x, row["high"]), zorder=6, **where)


@styled
def validation_figure(table: pd.DataFrame, machine: str) -> Figure:
    """A panel per metric of `table` (analysis.advise.validate.compare): a point on the line was predicted exactly."""
    sizes = sorted(table["chunk_size"].unique(), key=chunk_order)
    marks = dict(zip(sorted(table["model"].unique()), "osD^", strict=False))
    title = (f"SIMULATED predictions against measurements: {machine}", "bands: 10 % and 25 %")
    figure = canvas(0.7 * len(PANELS), PANEL_INCHES[1] + 1.1, *title)
    for axes, (metric, label) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        _predicted(axes, table[table["metric"] == metric], marks)
        axes.set_xlabel(f"measured {label}")
    figure.axes[0].set_ylabel("predicted, SIMULATED (ms)")
    looks = [(mark, "white", model) for model, mark in marks.items()]
    looks += [("s", colour(size), size if size == "unchunked" else f"chunk size {size}") for size in sizes]
    handles = [Line2D([], [], marker=mark, color=shade, label=label, **POINT) for mark, shade, label in looks]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def _predicted(axes: Axes, rows: pd.DataFrame, marks: dict[str, str]) -> None:
    """Both axes logarithmic and alike, so that an error is a distance from the diagonal, the same everywhere."""
    both = 1e3 * rows[["measured", "predicted"]]
    ends = np.array([both.min().min() / 1.3, both.max().max() * 1.3])
    for error, shade in BANDS:
        axes.fill_between(ends, ends * (1 - error), ends * (1 + error), color=shade, linewidth=0)
    axes.plot(ends, ends, **DASHED)
    for model, size, x, y in zip(rows["model"], rows["chunk_size"], both["measured"], both["predicted"], strict=True):
        axes.plot(x, y, marker=marks[model], color=colour(size), **POINT)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
    axes.spines[["top", "right"]].set_visible(True)
    log_ticks(axes.xaxis, axes.yaxis)
