"""Capacity against the P99 TBT target, one curve per chunk size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from analysis.plots import COLOURS, PANEL_INCHES, STYLE, entitle

# The paper's chunk sizes have their colours of every figure; others are greys, told apart by their dashes.
OTHERS = ("#888888", "#BBBBBB")
DASHES = ("solid", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))


def capacity_figure(
    curves: pd.DataFrame, title: str, targets: Mapping[str, Mapping[str, float]], marks: pd.DataFrame, unchunked: int
) -> Figure:
    """A panel per model.

    curves: model, chunk_size (tokens), target (s), capacity (requests/s); by target. targets: model -> name -> P99 TBT (s),
    drawn as vertical lines. marks: model, target, capacity, low, high, label: recommendations with their interval.
    """
    models = list(dict.fromkeys(curves["model"]))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.25 * PANEL_INCHES[0] * len(models) + 0.3, 1.3 * PANEL_INCHES[1] + 1.0), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
            rows = curves[curves["model"] == model]
            for number, (size, curve) in enumerate(rows.groupby("chunk_size", sort=True)):
                _curve(axes, int(str(size)), curve, number, unchunked)
            _marks(axes, marks[marks["model"] == model])
            for name, target in targets.get(model, {}).items():
                axes.axvline(target, color="black", linewidth=0.6, linestyle=(0, (1, 2)))
                axes.annotate(name, (target, 0.02), xycoords=("data", "axes fraction"), ha="right", va="bottom", rotation=90)
            axes.set_title(f"SIMULATED: {model}")
            _axes(axes, rows["target"].tolist())
        entitle(figure, 62 * len(models), title)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        once = dict(zip(labels, handles, strict=True))
        figure.legend(once.values(), once.keys(), loc="outside lower center", ncols=2 * len(models), frameon=False)
    return figure


def _curve(axes: Axes, size: int, curve: pd.DataFrame, number: int, unchunked: int) -> None:
    paper = COLOURS.get(str(size))
    axes.plot(
        curve["target"],
        curve["capacity"],
        color=paper or OTHERS[number % len(OTHERS)],
        linestyle="solid" if paper else DASHES[number % len(DASHES)],
        linewidth=1.6 if paper else 1.0,
        zorder=3 if paper else 2,
        label=f"chunk size {size}{' (unchunked)' if size >= unchunked else ''}",
    )


def _marks(axes: Axes, rows: pd.DataFrame) -> None:
    for row in rows.to_dict("records"):
        axes.plot(
            [row["target"]] * 2, [row["low"], row["high"]], color="black", linewidth=0.9, marker="_", markersize=4, zorder=5
        )
        axes.plot([row["target"]], [row["capacity"]], "ko", markersize=3.5, zorder=5, label="recommended, 95 % interval")
        near: dict[str, Any] = {"xytext": (5, -2), "textcoords": "offset points", "fontsize": 6.5, "zorder": 6}
        axes.annotate(row["label"], (row["target"], row["high"]), **near)


def _axes(axes: Axes, targets: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xlim(min(targets), max(targets))
    axes.set_ylim(0, None)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("P99 TBT target (s)")
    axes.set_ylabel("capacity (requests/s)")
    axes.spines[["top", "right"]].set_visible(False)
