"""make validate on runs whose engine is known: predictions meet it, another engine's do not, and errors are told in a line."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import pandas as pd
import pytest
from fakes import SATURATION, in_memory
from known_engine import KNOWN
from matplotlib.colors import to_hex

from analysis.advise import validate
from analysis.judge.load import Run, TrialRecord
from analysis.show.plots_advice import PANELS, validation_figure
from experiments.engine.session import run_session
from experiments.simulator import estimate
from experiments.simulator.calibration import Calibration, Jitter, at_speed
from experiments.simulator.simulator import SimulatedEngine
from experiments.spec.expand import expand
from experiments.spec.spec import EngineSettings, load_figure, load_testbed
from experiments.spec.workload import synthetic_trace

CALIBRATIONS = {name: replace(KNOWN, models=(name,)) for name in ("mistral-7b-w8", "yi-34b-w8", "yi-34b-200k-w8")}


def measured(figure: str) -> Run:
    """A run of the known engine, one replicate, as if measured."""
    sessions, trials = expand(load_figure(figure), load_testbed("cpu"), 1, SATURATION), []
    for session in sessions:

        def make(settings: EngineSettings, seed: int = session.seed + 1000) -> SimulatedEngine:  # other jitter than predicted
            return SimulatedEngine(settings, CALIBRATIONS[settings.model], seed)

        for result in run_session(session, [trial.name for trial in session.trials], make, synthetic_trace()):
            facts = {"format": 1, "session": result.session, "trial": result.trial, **result.facts}
            trials.append(TrialRecord(Path("in-memory"), facts, result.record))
    return in_memory(sessions, tuple(trials))


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    return [measured("fig9a"), measured("fig9b")]


def compared(runs: list[Run], calibrations: dict[str, Calibration]) -> pd.DataFrame:
    tables = [validate.compare(run, calibrations, validate.trial_speeds(run, calibrations)) for run in runs]
    return pd.concat(tables, ignore_index=True)


def test_the_known_engine_is_predicted(runs: list[Run]) -> None:
    table = compared(runs, CALIBRATIONS)
    assert table["metric"].value_counts().to_dict() == {"step time": 44, "prefill": 32, "P50 TTFT": 12, "P99 TBT": 12}
    prefills = table[(table["metric"] == "prefill") & (table["model"] == "yi-34b-200k")]
    sizes = ("512", "1024", "2048", "unchunked")
    assert list(zip(prefills["at"], prefills["chunk_size"], strict=True)) == list(product(("2k", "4k", "8k", "16k"), sizes))
    assert [met for _, met in validate.judge(table)] == [True] * 5
    exact = {name: replace(calibration, jitter=Jitter(0.0)) for name, calibration in CALIBRATIONS.items()}
    assert compared(runs, exact)["error"].abs().max() > 0  # the comparison sees even jitter


def test_another_engine_misses_every_target(runs: list[Run]) -> None:
    slow = {name: replace(calibration, overhead_s=1.5 * KNOWN.overhead_s) for name, calibration in CALIBRATIONS.items()}
    sentences = validate.judge(compared(runs, slow))
    assert [met for _, met in sentences] == [False] * 5
    assert "(target: within 5%)" in sentences[0][0]
    assert "over 12 points (target: at most 10% and 25%)" in sentences[3][0]


def test_a_machine_whose_speed_changed_is_told(runs: list[Run]) -> None:
    """At 0.8 of its speed what is foretold misses its targets; at each trial's own speed next to nothing is off."""
    exact = {name: replace(calibration, jitter=Jitter(0.0)) for name, calibration in CALIBRATIONS.items()}
    slow = {name: at_speed(calibration, 0.8) for name, calibration in exact.items()}
    slowed = [replace(run, trials=validate.predicted_run(run, slow).trials) for run in runs]
    for run in slowed:
        ranges = validate.speed_ranges(run, validate.trial_speeds(run, exact))
        assert {model: pytest.approx((0.8, 0.8, 0.8), rel=0.01) for model in run.models} == ranges
    table = compared(slowed, exact)
    assert table["own_error"].abs().max() < 0.02  # waking up is no part of a step's time
    assert (table.loc[table["metric"] == "prefill", "error"] < -0.15).all()
    assert [met for _, met in validate.judge(table)] == [False] * 5


def test_one_point_far_off_misses_the_target() -> None:
    same = ("step time", "prefill", "P99 TBT")
    rows = [{"metric": name, "figure": "fig9b", "measured": 1.0, "predicted": 1.0} for name in same]
    rows += [{"metric": "P50 TTFT", "figure": "fig9b", "measured": 1.0, "predicted": 1.0 + off} for off in (0.0, 0.01, 0.3)]
    table = pd.DataFrame(rows).assign(error=lambda r: r["predicted"] / r["measured"] - 1, own_error=0.0)
    assert [met for _, met in validate.judge(table)] == [True, True, False, True]


def test_every_point_is_drawn_at_its_values(runs: list[Run]) -> None:
    table = compared(runs, CALIBRATIONS)
    figure = validation_figure(table, "a machine")
    for axes, metric in zip(figure.axes, PANELS, strict=True):
        rows = table[table["metric"] == metric]
        drawn = {(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if len(line.get_xdata()) == 1}
        assert drawn == set(zip(1e3 * rows["measured"], 1e3 * rows["predicted"], strict=True))
        assert len({to_hex(line.get_color()) for line in axes.lines}) > 1
    assert "SIMULATED" in figure.get_suptitle()


@pytest.mark.parametrize(("option", "lines"), [("--json", 1), ("--quiet", 0), (None, None)])
def test_the_command_speaks_json_or_not_at_all_or_within_80_columns(
    option: str | None,
    lines: int | None,
    runs: list[Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(validate, "measured_run", lambda _folder, figure, _testbed: runs[figure == "fig9b"])
    monkeypatch.setattr(validate, "calibrations_for", lambda *_: CALIBRATIONS)
    assert validate.main(["--testbed", "cpu", "--report", str(tmp_path), *([option] if option else [])]) == 0
    told = capsys.readouterr().out.splitlines()
    assert {path.name for path in tmp_path.iterdir()} == {f"validate-cpu.{suffix}" for suffix in ("csv", "png", "svg")}
    if lines is not None:
        assert [[target["met"] for target in json.loads(line)["targets"]] for line in told] == [[True] * 5] * lines
        return
    assert max(map(len, told[:-1])) <= 80  # the last names files
    assert [" ".join(told).count(f"{figure} on testbed") for figure in ("fig9a", "fig9b")] == [1, 1]
    assert sum("foretold ms" in line for line in told) == 2  # a heading for each run, whatever its models


def test_without_a_run_one_line_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate.main(["--testbed", "cpu", "--runs", str(tmp_path), "--report", str(tmp_path / "report")]) == 2
    message = "no finished fig9a on testbed cpu; make fig9a fig9b first, then make validate"
    assert capsys.readouterr().err == f"error: {tmp_path}: {message}\n"
    assert not list(tmp_path.iterdir())


def test_a_run_of_another_machine_is_refused(runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fig9a-cpu" / "bag-1").mkdir(parents=True)
    monkeypatch.setattr(validate, "load_run", lambda _: runs[0])
    monkeypatch.setattr(validate, "machine", lambda: {"type": "another"})
    with pytest.raises(validate.SpecError, match=r"fig9a-cpu: measured on .*; allowed: a run of this machine, another"):
        validate.measured_run(tmp_path, "fig9a", "cpu")


def test_a_simulated_testbed_has_nothing_to_validate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(validate, "calibrate", lambda *_: pytest.fail("an engine was started"))
    assert validate.main(["--testbed", "a100-sim", "--runs", str(tmp_path), "--report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: TESTBED: got a100-sim, which has no engine to be measured; allowed: a ")


def test_a_damaged_calibration_stops_it(runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "HERE", tmp_path)
    for name in CALIBRATIONS:
        (tmp_path / f"cpu-{name}.yaml").write_text("")
    with pytest.raises(validate.SpecError, match=r"w8\.yaml: an empty file where .*; make calibrate TESTBED=cpu makes it anew"):
        validate.calibrations_for(load_testbed("cpu"), runs)
