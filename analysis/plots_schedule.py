"""Planned against actual: which session was to run on which node and when, and which did."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from analysis.load import Run
from analysis.plots import PANEL_INCHES, STYLE, headline
from analysis.plots_serving import DECODE_COLOUR

MOST_STARTS = 4  # of the driver that a picture has room for: the last ones
PLANNED: dict[str, Any] = {"facecolor": "white", "edgecolor": "black", "linewidth": 0.6}
ACTUAL: dict[str, Any] = {"facecolor": DECODE_COLOUR, "edgecolor": "black", "linewidth": 0.6}


def schedules(run: Run) -> list[dict[str, Any]]:
    """The plans that drivers of this run started with, oldest first; empty where nothing was scheduled, as in simulations."""
    paths = (bag / "data" / "schedules.json" for bag in run.bags)
    found = [plan for path in paths if path.is_file() for plan in json.loads(path.read_text())]
    return sorted(found, key=lambda plan: str(plan["planned"]))


def compared(run: Run) -> list[pd.DataFrame]:
    """Planned and actual times, one table for each start of the driver that stored a trial.

    Columns: session, node (where it ran, else where it was to), planned_start, planned_end, start, end: seconds from that start
    of the driver; NaN for what was not planned, or did not run. A session's start is that of loading its engine.
    """
    plans = schedules(run)
    tables = []
    for plan, after in pairwise([*plans, None]):
        assert plan is not None
        begin, until = plan["planned"], after["planned"] if after else "9999"
        own = [trial.facts for trial in run.trials if begin <= trial.facts["started"] < until]
        rows: dict[str, dict[str, Any]] = {}
        for slot in plan["slots"]:
            times = {"planned_start": slot["start_s"], "planned_end": slot["end_s"]}
            rows[slot["session"]] = {"session": slot["session"], "node": slot["node"], **times}
        for facts in sorted(own, key=lambda facts: str(facts["started"])):
            row = rows.setdefault(facts["session"], {"session": facts["session"]})
            row["node"] = facts.get("node", row.get("node"))
            row.setdefault("start", _after(begin, facts["started"]) - float(facts["engine"].get("load_s", 0.0)))
            row["end"] = _after(begin, facts["ended"])
        columns = ["session", "node", "planned_start", "planned_end", "start", "end"]
        if own:
            tables.append(pd.DataFrame(list(rows.values()), columns=columns))
    return tables


def _after(begin: str, stamp: str) -> float:
    return (datetime.fromisoformat(stamp) - datetime.fromisoformat(begin)).total_seconds()


def in_words(tables: Sequence[pd.DataFrame]) -> str:
    """Planned and actual makespan of each start of the driver, minutes."""
    said = [f"{rows['planned_end'].max() / 60:.1f} min planned, {rows['end'].max() / 60:.1f} min taken" for rows in tables]
    return "; then ".join(said)


def schedule_figure(run: Run, tables: Sequence[pd.DataFrame]) -> Figure:
    """A panel for each start of the driver, a line for each node: planned above, actual below."""
    shown = tables[-MOST_STARTS:]
    nodes = [sorted(rows["node"].unique(), key=lambda name: (len(name), name)) for rows in shown]
    heights = [0.5 + 0.35 * len(names) for names in nodes]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(2 * PANEL_INCHES[0], sum(heights) + 0.9), layout="constrained")
        FigureCanvasAgg(figure)
        headline(figure, run, 96, "schedule, planned and actual")
        grid = figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, rows, names in zip(grid, shown, nodes, strict=True):
            _panel(axes, rows, {name: place for place, name in enumerate(names)})
        handles = [Patch(label="planned", **PLANNED), Patch(label="actual", **ACTUAL)]
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _panel(axes: Axes, rows: pd.DataFrame, places: Mapping[str, int]) -> None:
    for row in rows.to_dict("records"):
        y = places[row["node"]]
        for start, end, offset, look in (("planned_start", "planned_end", 0.18, PLANNED), ("start", "end", -0.18, ACTUAL)):
            if not pd.isna(row[end]):
                axes.barh(y + offset, (row[end] - row[start]) / 60, 0.32, left=row[start] / 60, **look)
    axes.set_yticks(list(places.values()), list(places))
    axes.set_ylim(-0.6, len(places) - 0.4)
    axes.set_xlabel("minutes from the start of make")
    axes.spines[["top", "right"]].set_visible(False)
