"""Planned against actual: which session was to run on which node and when, and which did."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from analysis.judge.load import Run
from analysis.show.plots import canvas, styled
from analysis.show.plots_serving import DECODE_COLOUR
from experiments.records.documents import SCHEDULES, read_document

MOST_STARTS = 4  # of the driver that a picture has room for: the last ones
PLANNED: dict[str, Any] = {"facecolor": "white", "edgecolor": "black", "linewidth": 0.6}
ACTUAL: dict[str, Any] = {**PLANNED, "facecolor": DECODE_COLOUR}


def compared(run: Run) -> list[pd.DataFrame]:
    """Planned and actual times, one table for each start of the driver that stored a trial; none of a simulation.

    Columns: session, node (where it ran, else where it was to), planned_start, planned_end, start, end: seconds from that start
    of the driver; NaN for what was not planned, or did not run. A session's start is that of loading its engine.
    """
    paths = (bag / "data" / "schedules.json" for bag in run.bags)
    plans = [plan for path in paths if path.is_file() for plan in read_document(path, SCHEDULES)]
    plans.sort(key=lambda plan: str(plan["planned"]))
    tables = []
    for plan, after in pairwise([*plans, {"planned": "9999"}]):
        own = [trial.facts for trial in run.trials if plan["planned"] <= trial.facts["started"] < after["planned"]]
        if not own:
            continue
        begin = datetime.fromisoformat(plan["planned"])
        rows: dict[str, dict[str, Any]] = {
            slot["session"]: {"node": slot["node"], "planned_start": slot["start_s"], "planned_end": slot["end_s"]}
            for slot in plan["slots"]
        }
        for facts in sorted(own, key=lambda facts: str(facts["started"])):
            row = rows.setdefault(facts["session"], {})
            row["node"] = facts.get("node", row.get("node", "a node without a name"))
            started, row["end"] = ((datetime.fromisoformat(facts[key]) - begin).total_seconds() for key in ("started", "ended"))
            row.setdefault("start", started - float(facts["engine"].get("load_s", 0.0)))
        table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("session").reset_index()
        tables.append(table.reindex(columns=["session", "node", "planned_start", "planned_end", "start", "end"]))
    return tables


def in_words(tables: Sequence[pd.DataFrame]) -> str:
    """Planned and actual makespan of each start of the driver, minutes."""
    said = [f"{rows['planned_end'].max() / 60:.1f} min planned, {rows['end'].max() / 60:.1f} min taken" for rows in tables]
    return "; then ".join(said)


@styled
def schedule_figure(run: Run, tables: Sequence[pd.DataFrame]) -> Figure:
    """A panel for each start of the driver, a line for each node: planned above, actual below."""
    shown = tables[-MOST_STARTS:]
    heights = [0.5 + 0.35 * rows["node"].nunique() for rows in shown]
    figure = canvas(2, sum(heights) + 0.9, "schedule, planned and actual", run.title)
    for axes, rows in zip(figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0], shown, strict=True):
        _panel(axes, rows)
    handles = [Patch(label="planned", **PLANNED), Patch(label="actual", **ACTUAL)]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def _panel(axes: Axes, rows: pd.DataFrame) -> None:
    nodes = sorted(rows["node"].unique(), key=lambda name: (len(name), name))
    for start, end, offset, look in (("planned_start", "planned_end", 0.18, PLANNED), ("start", "end", -0.18, ACTUAL)):
        for row in rows[rows[end].notna()].to_dict("records"):
            y = nodes.index(row["node"]) + offset
            axes.barh(y, (row[end] - row[start]) / 60, 0.32, left=row[start] / 60, **look)
    axes.set_yticks(range(len(nodes)), nodes)
    axes.set(ylim=(-0.6, len(nodes) - 0.4), xlabel="minutes from the start of make")
