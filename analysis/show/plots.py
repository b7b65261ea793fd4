"""Figure 9a in the paper's layout, regenerated beside published; and what every picture shares: colours, style, saving."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure as Figure  # again, for who draws through here
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from analysis.judge.load import Run, chunk_order, published_prefill
from analysis.show.summary import prefill_table
from experiments.records.store import write_whole

# Okabe and Ito's colour-blind safe palette, from dark to light as the chunk size grows: CIE L* 0, 46, 71, 90, so that grey
# print keeps the order. Every figure takes its colours from here. Unchunked has none: it is the line at 1.
COLOURS = {"256": "#000000", "512": "#0072B2", "1024": "#E69F00", "2048": "#F0E442"}
OTHER_COLOUR = "#FFFFFF"  # a chunk size that neither figure of the paper has
REFERENCE_GROUND = "#EEEEEE"  # behind published values
HATCH = "/////"  # on simulated values
PANEL_INCHES = (3.3, 2.2)  # width: one column of the paper
GROUP_WIDTH = 0.84  # of the distance between two groups
MIN_GROUPS = 3  # a panel has room for as many, so that a lone group's bars do not look like blocks
DASHED: dict[str, Any] = {"color": "black", "linewidth": 0.8, "linestyle": (0, (4, 2))}
ABOVE: dict[str, Any] = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 6.5}
STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
    "font.size": 7.5,
    "axes.titlesize": 7.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "text.parse_math": False,  # a name with a $ in it is a name
    "svg.hashsalt": "chunked-prefill-artifact",  # else the ids in an SVG differ from one drawing to the next
    "svg.fonttype": "path",
}
styled = mpl.rc_context(STYLE)  # decorates whatever draws


@styled
def prefill_figure(run: Run) -> Figure:
    """Figure 9a: a row per model, the paper's model first and its published values beside it on the same scale."""
    intervals = prefill_table(run).dropna(subset="relative_mean")  # the rest did not finish; a gate says so
    models = list(dict.fromkeys(intervals["model"])) or run.models
    beside = published_prefill().rename(columns={"relative": "relative_mean"})
    beside = beside if intervals["in_paper"].any() else beside.iloc[:0]
    columns = 2 if len(beside) else 1
    tallest = max(1.0, *intervals[["relative_mean", "relative_mean_high"]].max(), beside["relative_mean"].max())
    figure = canvas(columns, PANEL_INCHES[1] * len(models) + 0.8, run.title)
    grid = figure.subplots(len(models), columns, squeeze=False, sharey=True)
    grid[0, 0].set_ylim(0, 1.24 * tallest)  # with room for the numbers above the bars
    for (axes, *second), model in zip(grid, models, strict=True):
        rows = intervals[intervals["model"] == model]
        _prefill_panel(axes, rows, run.simulated)
        count = int(rows["replicates"].min()) if len(rows) else 0
        axes.set_title(f"{'SIMULATED' if run.simulated else 'regenerated'}: {model}\n{conditions(run, count)}")
        axes.set_ylabel("prefill time\nrelative to unchunked")
        if second and rows["in_paper"].all():
            second[0].set_facecolor(REFERENCE_GROUND)
            second[0].set_title(f"published: {model}\nA100, tensor parallel 2; one run, no interval")
            _prefill_panel(second[0], beside, hatched=False)
        elif second:
            second[0].axis("off")
            second[0].text(0.5, 0.5, f"{model} is not in the paper's figure", ha="center", transform=second[0].transAxes)
    sizes = _sizes([*intervals["chunk_size"], *beside["chunk_size"]])
    handles: list[Any] = [Patch(label=f"chunk size {size}", **look(size, run.simulated)) for size in sizes]
    handles += [Line2D([], [], label="unchunked = 1", **DASHED)]
    figure.legend(handles=handles, loc="outside lower center", ncols=2 * columns)
    return figure


def canvas(columns: float, height: float, *title: str) -> Figure:
    """An empty figure, `columns` panels wide and `height` inches high; each part of its title is on lines of its own."""
    figure = Figure(figsize=(PANEL_INCHES[0] * columns + 0.3, height), layout="constrained")
    lines = [textwrap.fill(part, round(48 * columns), break_on_hyphens=False) for part in title]
    figure.suptitle("\n".join(lines).replace("$", r"\$"), fontsize=8.5, fontweight="bold")
    return figure


def colour(chunk_size: str) -> str:
    """The colour of a chunk size, the same in every figure."""
    return COLOURS.get(chunk_size, OTHER_COLOUR)


def look(chunk_size: str, hatched: bool) -> dict[str, Any]:
    """How a bar of that chunk size is drawn; the hatching is seen on a black bar too."""
    hatching = {"hatch": HATCH, "hatchcolor": "#AAAAAA" if chunk_size == "256" else "black"} if hatched else {}
    return {"facecolor": colour(chunk_size), "edgecolor": "black", "linewidth": 0.5, **hatching}


def whisker(axes: Axes, x: float, low: float, high: float) -> None:
    """An interval, seen on a black bar too; nothing where there is none (NaN)."""
    if not pd.isna(high):
        axes.plot([x, x], [low, high], color="white", linewidth=2.4, solid_capstyle="butt", zorder=4)
        axes.plot([x, x], [low, high], color="black", linewidth=0.9, marker="_", markersize=3.5, zorder=4)


def label_groups(axes: Axes, labels: Sequence[str]) -> None:
    """The x axis of groups of bars at 0, 1, 2 and so on."""
    middle, half = (len(labels) - 1) / 2, max(len(labels), MIN_GROUPS) / 2 + 0.05
    axes.set_xlim(middle - half, middle + half)
    axes.set_xticks(range(len(labels)), labels)
    axes.tick_params(axis="x", length=0)


def log_ticks(*axes: Axis) -> None:
    """Plain numbers on logarithmic axes whose limits are set: enough of them on less than a decade, and none that touch."""
    for axis in axes:
        low, high = axis.get_view_interval()
        subs = (1, 1.5, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5) if high < 50 * low else (1, 3)
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axis.set_minor_locator(NullLocator())


def ground(axes: Axes, run: Run) -> None:
    """Behind simulated values where there are no bars to hatch."""
    if run.simulated:
        axes.patch.set(hatch=HATCH, edgecolor="#DDDDDD", linewidth=0)


def _sizes(chunk_sizes: Iterable[str]) -> list[str]:
    """Those that get a bar, smallest first."""
    return sorted(set(chunk_sizes) - {"unchunked"}, key=chunk_order)


def conditions(run: Run, count: int) -> str:
    """Testbed and scale; in a second line, what is shown of `count` replicates."""
    scale = f"lengths ÷ {run.plan['scale']}" if run.plan["scale"] > 1 else "the paper's lengths"
    several = f"geometric mean of {count} replicates, 95 % intervals"
    what = several if count > 1 else f"{count} replicate{'s'[: count != 1]}, no interval"
    return f"{run.testbed}, {scale}\n{what}"


def _prefill_panel(axes: Axes, rows: pd.DataFrame, hatched: bool) -> None:
    """One group of bars per prompt length, the value above each."""
    lengths, sizes = sorted(rows["prompt_length"].unique()), _sizes(rows["chunk_size"])
    step = GROUP_WIDTH / max(1, len(sizes))
    ground = {"facecolor": axes.get_facecolor(), "edgecolor": "none", "pad": 0.5}
    for row in rows[rows["chunk_size"] != "unchunked"].to_dict("records"):
        x = lengths.index(row["prompt_length"]) + (sizes.index(row["chunk_size"]) - (len(sizes) - 1) / 2) * step
        axes.bar(x, row["relative_mean"], 0.92 * step, zorder=2, **look(row["chunk_size"], hatched))
        high = row.get("relative_mean_high", math.nan)  # nothing published has an interval
        whisker(axes, x, row.get("relative_mean_low", math.nan), high)
        top = row["relative_mean"] if pd.isna(high) else high
        axes.annotate(f"{row['relative_mean']:.2f}", (x, top), rotation=90, bbox=ground, zorder=3.5, **ABOVE)
    axes.axhline(1, zorder=3, **DASHED)
    label_groups(axes, [f"{length / 1024:g}k" for length in lengths])
    axes.set_xlabel("prompt length (the paper's tokens)")


@styled
def save(figure: Figure, path: Path, formats: tuple[str, ...] = ("png", "svg")) -> list[Path]:
    """Write PATH.png (300 dpi) and PATH.svg, each whole or not at all; the same figure gives the same bytes."""
    options: dict[str, dict[str, Any]] = {
        "png": {"metadata": {"Software": None}, "pil_kwargs": {"compress_level": 3}},
        "svg": {"metadata": {"Date": None, "Creator": None}},
    }
    targets = [path.with_name(f"{path.name}.{suffix}") for suffix in formats]
    for suffix, target in zip(formats, targets, strict=True):
        # dpi in an SVG: of what is rasterized in it
        write_whole(target, partial(figure.savefig, format=suffix, dpi=300, **options[suffix]))
        figure.set_layout_engine("none")  # laid out once: it takes as long as drawing
    return targets
