"""Planned against actual: what is compared, what is drawn."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fakes import synthetic_run

from analysis.judge.load import Run, TrialRecord
from analysis.show.plots_schedule import compared, in_words, schedule_figure
from analysis.show.views import schedule_view

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def at(seconds: float) -> str:
    return (BEGIN + timedelta(seconds=seconds)).isoformat(timespec="milliseconds")


def plan(start: float, slots: list[tuple[str, str, float, float]]) -> dict[str, Any]:
    keys = ("session", "node", "start_s", "end_s")
    return {"planned": at(start), "slots": [dict(zip(keys, slot, strict=True)) for slot in slots]}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Two sessions of six trials: the first as planned, 10 s a trial; the second broken off after 2, resumed an hour later."""
    made = synthetic_run(lambda *_: 1.0, replicates=2)
    names = list(dict.fromkeys(trial.facts["session"] for trial in made.trials))[:2]
    times = {names[0]: [20.0 + 10 * n for n in range(6)], names[1]: [25.0, 35.0, 3630.0, 3640.0, 3650.0, 3660.0]}
    nodes = {names[0]: "node-1", names[1]: "node-2"}

    def timed(trial: TrialRecord, start: float) -> TrialRecord:
        name = trial.facts["session"]
        engine = {**trial.facts["engine"], "load_s": 5.0}
        more = {"started": at(start), "ended": at(start + 10), "engine": engine, "node": nodes[name]}
        return dataclasses.replace(trial, facts={**trial.facts, **more})

    trials = [
        timed(trial, start)
        for name in names
        for trial, start in zip([t for t in made.trials if t.facts["session"] == name], times[name], strict=True)
    ]
    plans = [
        plan(0.0, [(names[0], "node-1", 0.0, 80.0), (names[1], "node-2", 0.0, 80.0)]),
        plan(3600.0, [(names[1], "node-1", 0.0, 55.0)]),
    ]
    data = tmp_path / "bag" / "data"
    data.mkdir(parents=True)
    (data / "schedules.json").write_text(json.dumps(plans))
    return dataclasses.replace(made, trials=tuple(trials), bags=(tmp_path / "bag",))


def test_each_start_of_the_driver_has_its_own_plan_and_its_own_trials(run: Run) -> None:
    first, second = compared(run)
    assert first[["start", "end"]].to_numpy().tolist() == [[15.0, 80.0], [20.0, 45.0]]
    assert first["planned_end"].tolist() == [80.0, 80.0]
    assert second[["node", "start", "end"]].to_numpy().tolist() == [["node-2", 25.0, 70.0]]  # where it ran, not where planned
    assert in_words([first, second]) == "1.3 min planned, 1.3 min taken; then 0.9 min planned, 1.2 min taken"


def test_the_picture_has_a_panel_for_each_start_and_a_bar_for_each_session(run: Run) -> None:
    tables = compared(run)
    figure = schedule_figure(run, tables)
    assert [len(axes.patches) for axes in figure.axes] == [4, 2]
    assert [[label.get_text() for label in axes.get_yticklabels()] for axes in figure.axes] == [
        ["node-1", "node-2"],
        ["node-2"],
    ]


def test_the_view_says_it_in_words_too(run: Run, tmp_path: Path) -> None:
    (picture,) = schedule_view(run, tmp_path / "fig9a-cpu")
    assert "1.3 min planned" in picture.alt
    assert (tmp_path / "fig9a-cpu-schedule.svg").is_file()


def test_a_simulated_run_has_no_schedule(run: Run) -> None:
    assert schedule_view(dataclasses.replace(run, bags=()), Path("unused")) == ()
