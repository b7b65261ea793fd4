"""How likely claims are to PASS: the rule on known ratios, and the whole path with a known engine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from known_engine import KNOWN

from analysis.advise.power import judged, logs_of, main, power, simulated_metrics
from experiments.calibrate.published import write
from experiments.simulator import estimate
from experiments.spec.expand import saturation_sessions
from experiments.spec.spec import ServingFigure, load_figure, load_testbed
from experiments.spec.workload import synthetic_trace

CPU, FIGURE = load_testbed("cpu"), load_figure("fig9b")
assert isinstance(FIGURE, ServingFigure)
CLAIMS = judged(FIGURE, CPU)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Calibrations of this machine: the known engine, for each model of the figure."""
    monkeypatch.setattr(estimate, "HERE", tmp_path)
    for session in saturation_sessions(FIGURE, CPU):
        own = replace(KNOWN, models=(session.engine.model,), made_on=estimate.made_on(session.engine))
        write(own, tmp_path / f"cpu-{session.engine.model}.yaml")
    return tmp_path


def test_all_orderings_of_9b_are_judged_on_this_machine() -> None:
    assert [claim.id for claim in CLAIMS] == [f"C{number}" for number in range(9, 17)]


def test_power_on_known_ratios() -> None:
    normal = np.random.default_rng(1).normal(0.0, 1.0, (len(CLAIMS), 20))
    certain, none = power(CLAIMS, 1.0 + 0.01 * normal, 5), power(CLAIMS, 0.1 * (normal - normal.mean(axis=1, keepdims=True)), 5)
    assert certain.together == 1.0
    assert max(none.claims.values()) < 0.05
    some = [power(CLAIMS, 0.1 + 0.1 * normal, count).together for count in (4, 8, 16)]
    assert some == sorted(some)
    assert some[0] < some[-1] <= 1.0
    assert all(share >= some[1] for share in power(CLAIMS, 0.1 + 0.1 * normal, 8).claims.values())


@pytest.mark.usefixtures("here")
def test_every_point_is_simulated_for_every_seed_with_noise_of_its_own() -> None:
    table = simulated_metrics(FIGURE, CPU, synthetic_trace())
    assert len(table) == 12 * len(FIGURE.seeds)
    logs = logs_of(table, CLAIMS)
    assert logs.shape == (8, 20)
    assert np.isfinite(logs).all()
    assert (logs[[claim.statistic.name == "tbt_p99" for claim in CLAIMS]].mean(axis=1) > 0).all(), "larger chunks, longer gaps"


@pytest.mark.usefixtures("here")
def test_the_command_tells_each_claim_and_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fig9b", "--testbed", "cpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told["power"]) == {claim.id for claim in CLAIMS}
    assert 0 <= told["together"] <= min(told["power"].values())


def test_without_a_calibration_nothing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(estimate, "HERE", tmp_path)
    assert main(["fig9b", "--testbed", "cpu"]) == 0
    assert "not known" in capsys.readouterr().out
    assert main(["fig9a", "--testbed", "cpu"]) == 0
