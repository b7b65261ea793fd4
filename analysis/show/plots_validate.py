"""Predicted against measured, point by point: the picture of make validate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.judge.load import chunk_order
from analysis.show.plots import DASHED, PANEL_INCHES, colour, log_ticks, styled

PANELS = {"prefill": "prefill time, 9a (ms)", "P50 TTFT": "P50 TTFT, 9b (ms)", "P99 TBT": "P99 TBT, 9b (ms)"}
BANDS = ((0.25, "#EEEEEE"), (0.10, "#D8D8D8"))  # the errors that are allowed at worst and at the median
POINT: dict[str, Any] = {"linestyle": "none", "markeredgecolor": "black", "markeredgewidth": 0.5, "markersize": 5}


@styled
def validation_figure(table: pd.DataFrame, machine: str) -> Figure:
    """A panel per metric of `table` (analysis.advise.validate.compare): a point on the line was predicted exactly."""
    sizes = sorted(table["chunk_size"].unique(), key=chunk_order)
    marks = dict(zip(sorted(table["model"].unique()), "osD^", strict=False))
    figure = Figure(figsize=(2.4 * len(PANELS), PANEL_INCHES[1] + 1.1), layout="constrained")
    for axes, (metric, label) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        _panel(axes, table[table["metric"] == metric], marks)
        axes.set_xlabel(f"measured {label}")
    figure.axes[0].set_ylabel("predicted, SIMULATED (ms)")
    looks = [(mark, "white", model) for model, mark in marks.items()]
    looks += [("s", colour(size), size if size == "unchunked" else f"chunk size {size}") for size in sizes]
    handles = [Line2D([], [], marker=mark, color=shade, label=label, **POINT) for mark, shade, label in looks]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    figure.suptitle(f"SIMULATED predictions against measurements: {machine}\nbands: 10 % and 25 %", fontsize=8.5)
    return figure


def _panel(axes: Axes, rows: pd.DataFrame, marks: dict[str, str]) -> None:
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
    multiples = (1, 3) if ends[1] > 30 * ends[0] else (1, 2, 5)  # numbers of a wide range would touch
    log_ticks(axes.xaxis, multiples)
    log_ticks(axes.yaxis, multiples)
