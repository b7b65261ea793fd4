"""Figure 9a in the paper's layout, regenerated beside published; and what every picture shares: colours, style, saving.

This file and plots_serving.py are the only ones that import matplotlib.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Figure  # again, for who draws through here
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis.load import Run, prefill_replicates, prefill_times, published_prefill
from analysis.stats import sample

# Okabe and Ito's colour-blind safe palette, from dark to light as the chunk size grows: CIE L* 0, 46, 71, 90, so that grey
# print keeps the order. Every figure takes its colours from here. Unchunked has none: it is the line at 1.
COLOURS = {"256": "#000000", "512": "#0072B2", "1024": "#E69F00", "2048": "#F0E442"}
OTHER_COLOUR = "#FFFFFF"  # a chunk size that neither figure of the paper has
REFERENCE_GROUND = "#EEEEEE"  # behind published values
HATCH = "/////"  # on simulated values
PANEL_INCHES = (3.3, 2.2)  # width: one column of the paper
KEYS = ["model", "in_paper", "prompt_length", "chunk_size"]
GROUP_WIDTH = 0.84  # of the distance between two groups
MIN_GROUPS = 3  # a panel has room for as many, so that a lone group's bars do not look like blocks
UNCHUNKED_LINE: dict[str, Any] = {"color": "black", "linewidth": 0.8, "linestyle": (0, (4, 2))}
STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
    "font.size": 7.5,
    "axes.titlesize": 7.5,
    "axes.linewidth": 0.6,
    "hatch.linewidth": 0.5,
    "text.parse_math": False,  # a name with a $ in it is a name
    "svg.hashsalt": "chunked-prefill-artifact",  # else the ids in an SVG differ from one drawing to the next
    "svg.fonttype": "path",
}


def relative_intervals(run: Run) -> pd.DataFrame:
    """One row per model and point of Figure 9a: prefill time relative to unchunked, with its 95 % t interval.

    Columns: model, in_paper, prompt_length (tokens), chunk_size (text), replicates, relative, low, high.
    `relative` is the geometric mean of the replicates' ratios and the interval that of their logs, on which scale a ratio
    and its inverse are alike; low and high are NaN where there are fewer than two replicates. A simulated interval is wider by
    the held-out error of its calibration.
    """
    ratios = prefill_replicates(prefill_times(run))
    ratios = ratios[np.isfinite(ratios["relative"]) & (ratios["relative"] > 0)]  # the rest did not finish; a gate says so
    rows = []
    for key, group in ratios.groupby(KEYS, sort=False):
        seen = sample(group["relative"].tolist(), run.model_error(str(group["model"].iloc[0])))
        low, high = seen.interval() if seen.n > 1 else (math.nan, math.nan)
        rows.append((*key, seen.n, seen.ratio, low, high))
    return pd.DataFrame(rows, columns=[*KEYS, "replicates", "relative", "low", "high"]).astype({"in_paper": bool})


def prefill_figure(run: Run) -> Figure:
    """Figure 9a: a row per model, the paper's model first and its published values beside it on the same scale."""
    intervals = relative_intervals(run).sort_values("in_paper", ascending=False, kind="stable")
    models = list(dict.fromkeys(intervals["model"])) or run.models
    beside = published_prefill() if intervals["in_paper"].any() else intervals.iloc[:0]
    columns = 2 if len(beside) else 1
    tallest = max(1.0, intervals["relative"].max(), intervals["high"].max(), beside["relative"].max())
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(PANEL_INCHES[0] * columns + 0.3, PANEL_INCHES[1] * len(models) + 0.8), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(models), columns, squeeze=False, sharey=True)
        grid[0, 0].set_ylim(0, 1.24 * tallest)  # with room for the numbers above the bars
        for (axes, *second), model in zip(grid, models, strict=True):
            rows = intervals[intervals["model"] == model]
            _prefill_panel(axes, rows, run.simulated)
            count = int(rows["replicates"].min()) if len(rows) else 0
            axes.set_title(f"{'SIMULATED' if run.simulated else 'regenerated'}: {model}\n{conditions(run, count)}")
            axes.set_ylabel("prefill time\nrelative to unchunked")
            for other in second:
                _reference_panel(other, model, beside if rows["in_paper"].all() else None)
        headline(figure, run, 48 * columns)
        handles = _legend({*intervals["chunk_size"], *beside["chunk_size"]}, run.simulated)
        figure.legend(handles=handles, loc="outside lower center", ncols=2 * columns, frameon=False)
    return figure


def headline(figure: Figure, run: Run, letters: int, what: str = "") -> None:
    """The title of a picture, in lines of at most `letters`: what it shows, then the run with its testbed, scale and trace."""
    entitle(figure, letters, what, run.title)


def entitle(figure: Figure, letters: int, *parts: str) -> None:
    """A title of these parts, each on lines of its own, of at most `letters`."""
    lines = [textwrap.fill(part, letters, break_on_hyphens=False) for part in parts if part]
    figure.suptitle("\n".join(lines).replace("$", r"\$"), fontsize=8.5, fontweight="bold")


def colour(chunk_size: str) -> str:
    """The colour of a chunk size, the same in every figure."""
    return COLOURS.get(chunk_size, OTHER_COLOUR)


def look(chunk_size: str, hatched: bool) -> dict[str, Any]:
    """How a bar of that chunk size is drawn; the hatching is seen on a black bar too."""
    shade = colour(chunk_size)
    hatching = {"hatch": HATCH, "hatchcolor": "#AAAAAA" if shade == COLOURS["256"] else "black"} if hatched else {}
    return {"facecolor": shade, "edgecolor": "black", "linewidth": 0.5, **hatching}


def whisker(axes: Axes, x: float, low: float, high: float) -> None:
    """An interval, seen on a black bar too; nothing where there is none (NaN)."""
    if not pd.isna(high):
        axes.plot([x, x], [low, high], color="white", linewidth=2.4, solid_capstyle="butt", zorder=4)
        axes.plot([x, x], [low, high], color="black", linewidth=0.9, marker="_", markersize=3.5, zorder=4)


def _sizes(chunk_sizes: Iterable[str]) -> list[str]:
    """Those that get a bar, smallest first."""
    return sorted(set(chunk_sizes) - {"unchunked"}, key=int)


def _legend(chunk_sizes: Iterable[str], hatched: bool) -> list[Artist]:
    bars = [Patch(label=f"chunk size {size}", **look(size, hatched)) for size in _sizes(chunk_sizes)]
    return [*bars, Line2D([], [], label="unchunked = 1", **UNCHUNKED_LINE)]


def conditions(run: Run, count: int) -> str:
    """Testbed, scale and what `count` replicates allow to say, in one line."""
    scale = f"lengths ÷ {run.plan['scale']}" if run.plan["scale"] > 1 else "the paper's lengths"
    what = f"{count} replicates, 95 % intervals" if count > 1 else f"{count} replicate{'s'[: count != 1]}, no interval"
    return f"{run.testbed}, {scale}; {what}"


def _reference_panel(axes: Axes, model: str, published: pd.DataFrame | None) -> None:
    if published is None:
        axes.axis("off")
        axes.text(0.5, 0.5, f"{model} is not in the paper's figure", ha="center", transform=axes.transAxes)
        return
    axes.set_facecolor(REFERENCE_GROUND)
    _prefill_panel(axes, published, hatched=False)
    axes.set_title(f"published: {model}\nA100, tensor parallel 2; one run, no interval")


def _prefill_panel(axes: Axes, rows: pd.DataFrame, hatched: bool) -> None:
    """One group of bars per prompt length, the value above each; an interval where `rows` has low and high."""
    lengths, sizes = sorted(rows["prompt_length"].unique()), _sizes(rows["chunk_size"])
    step = GROUP_WIDTH / max(1, len(sizes))
    for row in rows[rows["chunk_size"] != "unchunked"].to_dict("records"):
        x = lengths.index(row["prompt_length"]) + (sizes.index(row["chunk_size"]) - (len(sizes) - 1) / 2) * step
        axes.bar(x, row["relative"], 0.92 * step, zorder=2, **look(row["chunk_size"], hatched))
        low, high = row.get("low", math.nan), row.get("high", math.nan)
        whisker(axes, x, low, high)
        axes.annotate(
            f"{row['relative']:.2f}",
            (x, row["relative"] if pd.isna(high) else high),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            rotation=90,
            fontsize=6.5,
            bbox={"facecolor": axes.get_facecolor(), "edgecolor": "none", "pad": 0.5},
            zorder=3.5,
        )
    axes.axhline(1, zorder=3, **UNCHUNKED_LINE)
    middle, half = (len(lengths) - 1) / 2, max(len(lengths), MIN_GROUPS) / 2 + 0.05
    axes.set_xlim(middle - half, middle + half)
    axes.set_xticks(range(len(lengths)), [f"{length / 1024:g}k" for length in lengths])
    axes.set_xlabel("prompt length (the paper's tokens)")
    axes.tick_params(axis="x", length=0)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: Path, formats: tuple[str, ...] = ("png", "svg")) -> tuple[Path, ...]:
    """Write PATH.png (300 dpi) and PATH.svg, each whole or not at all; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, dict[str, Any]] = {
        "png": {"dpi": 300, "metadata": {"Software": None}, "pil_kwargs": {"compress_level": 3}},
        "svg": {"dpi": 300, "metadata": {"Date": None, "Creator": None}},  # dpi: of what is rasterized in it
    }
    targets = {suffix: path.with_name(f"{path.name}.{suffix}") for suffix in formats}
    with mpl.rc_context(STYLE):
        for suffix, target in targets.items():
            part = target.with_name(f".{target.name}.part")
            figure.savefig(part, format=suffix, **options[suffix])
            part.replace(target)
            figure.set_layout_engine("none")  # laid out once: it takes as long as drawing
    return tuple(targets.values())
