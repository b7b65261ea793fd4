"""Capacity against the P99 TBT target, one curve per chunk size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.show.plots import COLOURS, PANEL_INCHES, entitle, log_ticks, styled

# The paper's chunk sizes have their colours of every figure; others are greys with different dashes.
OTHERS = ("#888888", "#BBBBBB")
DASHES = ("solid", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))


@styled
def capacity_figure(
    curves: pd.DataFrame, title: str, targets: Mapping[str, Mapping[str, float]], marks: pd.DataFrame, unchunked: int
) -> Figure:
    """A panel per model.

    curves: model, chunk_size (tokens), target (s), capacity (requests/s); by target. targets: model -> name -> P99 TBT (s),
    drawn as vertical lines. marks: model, target, capacity, low, high, label: the best of the simulation, with their interval.
    """
    models = list(dict.fromkeys(curves["model"]))
    size = (1.25 * PANEL_INCHES[0] * len(models) + 0.3, 1.3 * PANEL_INCHES[1] + 1.0)
    figure = Figure(figsize=size, layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        rows = curves[curves["model"] == model]
        _curves(axes, rows, unchunked)
        _marks(axes, marks[marks["model"] == model])
        for name, target in targets.get(model, {}).items():
            axes.axvline(target, color="black", linewidth=0.6, linestyle=(0, (1, 2)))
            where: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "xytext": (-3, 0), "textcoords": "offset points"}
            ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            axes.annotate(name, (target, 0.02), ha="right", va="bottom", rotation=90, bbox=ground, zorder=4, **where)
        axes.set(title=f"SIMULATED: {model}", xlabel="P99 TBT target (s)", ylabel="capacity (requests/s)")
        axes.set(xscale="log", xlim=(rows["target"].min(), rows["target"].max()), ylim=(0, None))
        log_ticks(axes.xaxis)
    entitle(figure, 62 * len(models), title)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(once.values(), once.keys(), loc="outside lower center", ncols=2 * len(models))
    return figure


def _curves(axes: Axes, rows: pd.DataFrame, unchunked: int) -> None:
    for number, (size, curve) in enumerate(rows.groupby("chunk_size")):
        style: dict[str, Any] = {"color": OTHERS[number % len(OTHERS)], "linestyle": DASHES[number % len(DASHES)]}
        style |= {"linewidth": 1.0, "zorder": 2}
        if paper := COLOURS.get(str(size)):
            style = {"color": paper, "linewidth": 1.6, "zorder": 3}
        label = f"chunk size {size}{' (unchunked)' if int(str(size)) >= unchunked else ''}"
        axes.plot(curve["target"], curve["capacity"], label=label, **style)


def _marks(axes: Axes, rows: pd.DataFrame) -> None:
    for row in rows.to_dict("records"):
        x, interval = row["target"], (row["low"], row["high"])
        axes.plot([x, x], interval, color="black", linewidth=0.9, marker="_", markersize=4, zorder=5)
        axes.plot([x], [row["capacity"]], "ko", markersize=3.5, zorder=5, label="best in simulation, 95 % interval")
        axes.annotate(row["label"], (x, row["high"]), xytext=(5, -2), textcoords="offset points", fontsize=6.5, zorder=6)
