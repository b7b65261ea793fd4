from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from known_engine import KNOWN, SETTINGS

from analysis.advise import recommend
from experiments.calibrate.published import write
from experiments.run import main
from experiments.simulator import estimate
from experiments.simulator.estimate import session_seconds, simulated_saturations, simulated_trial_seconds
from experiments.spec.expand import expand
from experiments.spec.spec import ServingPanel, load_figure, load_testbed
from experiments.spec.workload import synthetic_trace


def test_the_cpu_testbed_meets_the_load_of_the_paper_in_simulation() -> None:
    serving = load_testbed("cpu").serving
    assert serving is not None
    figure = load_figure("fig9b")
    served = simulated_saturations(expand(figure, load_testbed("a100-sim"), 1), synthetic_trace())
    assert set(served) == set(serving.load_fractions)
    for panel in figure.panels:
        assert isinstance(panel, ServingPanel)
        most = served[panel.model][str(min(filter(None, panel.chunk_sizes)))]
        assert serving.load_fractions[panel.model] == pytest.approx([qps / most for qps in sorted(panel.qps)], abs=0.01)


def test_a_pass_of_figure_9a_takes_what_the_published_one_took() -> None:
    """Sixteen points and three probes on the paper's machine: the published times sum to 29.6 s, none of them calibrated on."""
    session = next(s for s in expand(load_figure("fig9a"), load_testbed("a100-2024-sim"), 1) if s.model == "yi-34b-200k")
    assert simulated_trial_seconds(session, session.trials[0], None) == pytest.approx(29.6, rel=0.1)


def run_seconds(*arguments: object) -> tuple[float, str]:
    """Of all sessions together."""
    seconds, basis = session_seconds(*arguments)  # type: ignore[arg-type]
    return sum(sum(trials.values()) for trials in seconds.values()), basis


def owed(figure: str, testbed: str) -> dict[str, list[str]]:
    sessions = expand(load_figure(figure), load_testbed(testbed), 1)
    return {session.name: [trial.name for trial in session.trials] for session in sessions}


def test_a_plan_for_the_papers_machine_is_simulated() -> None:
    """One trial of fig9b lasts at least as long as its arrivals: 1024 requests at 3 per second."""
    only = {"mistral-7b-seed42-chunk256": ["qps3-chunk256"]}
    seconds, basis = run_seconds(load_figure("fig9b"), load_testbed("a100"), 1, {}, only, synthetic_trace())
    assert basis == "a100-mistral-7b, simulated"
    assert 1024 / 3 < seconds < 2 * 1024 / 3


def test_a_plan_here_is_simulated_once_this_machine_is_calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "HERE", tmp_path)
    smoke, cpu, trials = load_figure("smoke"), load_testbed("cpu"), owed("smoke", "cpu")
    guess, basis = run_seconds(smoke, cpu, 1, {}, trials, None)
    assert basis == "a guess for mistral-7b"
    known = replace(KNOWN, made_on=estimate.made_on(SETTINGS))
    write(known, tmp_path / "cpu-mistral-7b-w8.yaml")
    seconds, basis = run_seconds(smoke, cpu, 1, {}, trials, None)
    assert basis == "cpu-mistral-7b-w8, simulated"
    assert seconds != guess
    slower = replace(known, overhead_s=known.overhead_s + 1.0)
    write(slower, tmp_path / "cpu-mistral-7b-w8.yaml")
    assert run_seconds(smoke, cpu, 1, {}, trials, None)[0] > seconds + 10


def test_a_plan_simulates_the_saturation_that_is_not_measured_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "HERE", tmp_path)
    write(replace(KNOWN, made_on=estimate.made_on(SETTINGS)), tmp_path / "cpu-mistral-7b-w8.yaml")
    trial = {"mistral-7b-seed42": ["qps1-chunk256"]}
    cpu, trace = load_testbed("cpu"), synthetic_trace()
    seconds, basis = run_seconds(load_figure("fig9b"), cpu, 1, {}, trial, trace)
    assert basis == "cpu-mistral-7b-w8, simulated"
    assert cpu.serving is not None
    assert seconds - cpu.estimate.load_s == pytest.approx(cpu.serving.trial_seconds, rel=0.5)
    told, _ = run_seconds(load_figure("fig9b"), cpu, 1, {"mistral-7b": 1000.0}, trial, trace)
    assert told != seconds


def test_a_plan_of_a_simulation_counts_seconds_of_computing() -> None:
    seconds, basis = run_seconds(load_figure("fig9b"), load_testbed("a100-sim"), 5, {}, owed("fig9b", "a100-sim"), None)
    assert basis == "to simulate"
    assert seconds < 60


@pytest.mark.parametrize("text", ["", "calibration: [", "title: half\n"])
def test_a_damaged_calibration_of_this_machine_stops_what_rests_on_it_and_no_estimate(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(estimate, "HERE", tmp_path)
    for session in expand(load_figure("fig9a"), load_testbed("cpu"), 1):
        (tmp_path / f"cpu-{session.engine.model}.yaml").write_text(text)
    assert main(["fig9a", "--testbed", "cpu", "--plan", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert said.count("estimated without this machine's calibration: ") == 2  # one for each model
    assert "(a guess for mistral-7b; a guess for yi-34b-200k)" in said
    asked = ["--testbed", "cpu", "--model", "mistral-7b", "TBT_P99=0.1", "--out", str(tmp_path), "--report", str(tmp_path)]
    assert recommend.main(asked) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "cpu-mistral-7b-w8.yaml") in error
    assert error.endswith("; make calibrate TESTBED=cpu makes it anew\n")
    assert error.count("\n") == 1
