"""Predicted against measured, point by point: the picture of make validate."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from analysis.plots import PANEL_INCHES, STYLE, UNCHUNKED_LINE, colour

PANELS = {"prefill": "prefill time, 9a (ms)", "P50 TTFT": "P50 TTFT, 9b (ms)", "P99 TBT": "P99 TBT, 9b (ms)"}
MARKERS = "osD^"
BANDS = ((0.25, "#EEEEEE"), (0.10, "#D8D8D8"))  # the errors that are allowed at worst and at the median


def validation_figure(table: pd.DataFrame, machine: str) -> Figure:
    """A panel per metric of `table` (analysis.validate.compare): a point on the line was predicted exactly."""
    models, sizes = sorted(table["model"].unique()), sorted(table["chunk_size"].unique(), key=lambda size: (len(size), size))
    marks = dict(zip(models, MARKERS, strict=False))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2.4 * len(PANELS), PANEL_INCHES[1] + 1.1), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (metric, label) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
            _panel(axes, table[table["metric"] == metric], marks)
            axes.set_xlabel(f"measured {label}")
        figure.axes[0].set_ylabel("predicted, SIMULATED (ms)")
        look: dict[str, Any] = {"linestyle": "none", "markeredgecolor": "black", "markeredgewidth": 0.5, "markersize": 5}
        handles = [Line2D([], [], marker=mark, color="white", label=model, **look) for model, mark in marks.items()]
        handles += [
            Line2D([], [], marker="s", color=colour(size), label=size if size == "unchunked" else f"chunk size {size}", **look)
            for size in sizes
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
        figure.suptitle(f"SIMULATED predictions against measurements: {machine}\nbands: 10 % and 25 %", fontsize=8.5)
    return figure


def _panel(axes: Axes, rows: pd.DataFrame, marks: dict[str, str]) -> None:
    """Both axes logarithmic and alike, so that an error is a distance from the diagonal, the same everywhere."""
    both = 1e3 * rows[["measured", "predicted"]]
    ends = np.array([both.min().min() / 1.3, both.max().max() * 1.3])
    for error, shade in BANDS:
        axes.fill_between(ends, ends * (1 - error), ends * (1 + error), color=shade, linewidth=0)
    axes.plot(ends, ends, **UNCHUNKED_LINE)
    for row in rows.to_dict("records"):
        axes.plot(
            1e3 * row["measured"],
            1e3 * row["predicted"],
            marker=marks[row["model"]],
            color=colour(row["chunk_size"]),
            markeredgecolor="black",
            markeredgewidth=0.5,
            markersize=5,
        )
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
