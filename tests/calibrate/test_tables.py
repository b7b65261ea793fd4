"""Calibrations from kernel tables: the stored ones are what their stored rows give; the fit finds a known model."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

from experiments.calibrate import tables
from experiments.simulator.calibration import CALIBRATIONS, load_calibration
from experiments.simulator.cost_model import CostModel
from experiments.spec.spec import read_yaml

ROWS = read_yaml(CALIBRATIONS / tables.ROWS)


def test_stored_calibrations_are_what_their_data_give() -> None:
    found = tables.paper_calibrations()
    assert {calibration.calibration for calibration in found} == {path.stem for path in CALIBRATIONS.glob("*.yaml")}
    for calibration in found:
        assert load_calibration(calibration.calibration) == calibration
        assert set(calibration.fixed_by) >= {"overhead_s", "linear", "decode", "jitter", "valid"}
    for calibration in found[2:]:
        assert calibration.error.held_out < 0.03
        assert calibration.error.residual_mean < 0.015
        assert "vLLM 0.14.0" in calibration.title


@pytest.mark.parametrize("model", sorted(tables.FITTED))
def test_the_fit_finds_a_known_model(model: str) -> None:
    """Rows made by a known cost model give it back."""
    known = tables.calibrate(model, ROWS["models"][model], "made up")
    known = replace(known, overhead_s=0.002, attention=replace(known.attention, flop_per_s=1e14, kv_bytes_per_s=1e12))
    cost, made = CostModel(known), dict(ROWS["models"][model])
    for name in ("prefill", "decode", "held_out"):
        steps, _ = tables.steps_of(made, name)
        made[name] = [[*row[:-1], 1e3 * cost.step(*step)] for row, step in zip(made[name], steps, strict=True)]
    found = tables.calibrate(model, made, "made up")
    assert found.overhead_s == pytest.approx(0.002, rel=1e-3)
    assert found.attention.flop_per_s == pytest.approx(1e14, rel=1e-3)
    assert found.attention.kv_bytes_per_s == pytest.approx(1e12, rel=1e-3)
    assert max(found.error.residual_worst, found.error.held_out) < 1e-3


def test_steps_are_composed_as_the_rows_say() -> None:
    rows = {"prefill": [[512, 3584, 1.0]], "decode": [[8, 1024, 2.0]], "held_out": [[256, 4, 3.0]]}
    assert tables.steps_of(rows, "prefill")[0] == [(512, 0, 1, 512 * 3584 + 512 * 513 // 2, 0)]
    assert tables.steps_of(rows, "decode")[0] == [(0, 8, 0, 0, 8 * 1024)]
    assert tables.steps_of(rows, "held_out")[0] == [(256, 4, 1, 256 * 257 // 2, 4 * 256)]
    assert tables.steps_of(rows, "decode")[1].tolist() == [0.002]


def test_another_version_of_the_package_or_none_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tables, "VERSION", "0.0.1")
    assert tables.main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: package aiconfigurator-core: got ")
    assert error.endswith("; allowed: 0.0.1, in an environment that make tables sets up\n")


@pytest.mark.skipif(find_spec("aiconfigurator_core") is None, reason="the package of the kernel tables is not installed")
def test_the_stored_rows_are_what_the_package_says() -> None:
    for model in tables.FITTED:
        for name, rows in tables.read_paper(model).items():
            assert np.array(rows) == pytest.approx(np.array(ROWS["models"][model][name]))
