"""What is published beside Figure 9 stands in the table and the report of a simulated run, and of no other."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fakes import serving_run

from analysis.judge.load import Run, find_runs, load_run
from analysis.show import plots_serving, summary, views
from analysis.show.summary import against_published, published_lines, serving_table
from experiments.run import main
from experiments.simulator.calibration import CALIBRATIONS
from experiments.spec.spec import read_yaml


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with fig9b-a100-2024-sim, of one replicate."""
    runs = tmp_path_factory.mktemp("serving")
    assert main(["fig9b", "--testbed", "a100-2024-sim", "--replicates", "1", "--out", str(runs)]) == 0
    return runs


def loaded(runs: Path) -> Run:
    (bags,) = find_runs(runs).values()
    return load_run(bags)


def test_the_table_of_9a_tells_table_2(simulated_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert summary.main(["fig9a", "--runs", str(simulated_runs), "--report", str(tmp_path)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("chunk size prefill ms") == 1
    assert "mistral-7b: a panel the paper does not have against the 16 published values: prefill time off by 20." in told
    assert "a100-yi-34b-tp2 against published, one step, ms: 1,024 tokens of prefill 164.3 (Table 2: 217.2, -24%)" in told
    assert "4 decodes 27.38 (Table 2: 68.12, -60%); 4 decodes 27.38 (Figure 2: 48.85, -44%)" in told
    assert "kernels of vLLM 0.14.0, without host overhead and CUDA graphs" in told


def test_the_table_of_9b_tells_table_4_and_what_each_qps_stands_for(
    serving: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert summary.main(["fig9b", "--runs", str(serving), "--report", str(tmp_path)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "a100-2024-yi-34b-tp2 against published, P50 TTFT, s: chunk size 512 0.868 (Table 4: 0.76, +14%)" in told
    assert "chunk size 1024 0.8604 (not published)" in told
    assert "the paper's engine of 2024" in told
    table = pd.read_csv(tmp_path / "fig9b-a100-2024-sim.csv")
    rates = loaded(serving).plan["saturation"]
    for row in table.to_dict("records"):
        assert row["load"] == pytest.approx(row["qps"] / rates[row["model"]][str(row["chunk_size"])])
    yi = table[(table["model"] == "yi-34b") & (table["qps"] == 1.0)]
    assert yi["load"].between(0.7, 1.01).all()
    assert (yi[yi["chunk_size"] == 512]["ttft_p50"] < 3).all()  # 79 s where the host's time was added


def test_a_step_that_was_fitted_says_so_and_no_difference_has_no_sign(tmp_path: Path) -> None:
    assert main(["fig9a", "--testbed", "a100-2024-sim", "--replicates", "1", "--out", str(tmp_path)]) == 0
    told = " ".join(published_lines(against_published(loaded(tmp_path))))
    assert "4 decodes 48.85 (Table 2: 68.12, -28%); 4 decodes 48.85 (Figure 2, fitted: 48.85, 0%)" in told


def test_by_how_much_a_simulation_is_off_or_that_nobody_knows(serving: Path) -> None:
    run, measured = loaded(serving), serving_run(replicates=1)
    known = read_yaml(CALIBRATIONS / "a100-2024-yi-34b-tp2.yaml")["error"]
    assert f"yi-34b P50 TTFT {known['ttft_p50']:.1%}; yi-34b P99 TBT {known['tbt_p99']:.1%}" in views.error_words(run)
    foreign = dataclasses.replace(run, plan=run.plan | {"identity": {}})
    assert views.error_words(foreign).count("by nobody knows how much") == 4
    assert not views.error_words(measured)


def test_the_report_has_the_values_and_their_picture(serving: Path, tmp_path: Path) -> None:
    run = loaded(serving)
    view = views.serving_view(run, tmp_path / "fig9b")
    (picture,) = [picture for picture in view.pictures if picture.kind == "published"]
    assert "Table 4: 0.68, +85%" in picture.alt
    table = view.tables[-1]
    rows = [tuple(row.values()) for row in table.rows]
    assert table.caption == "simulated by calibration a100-2024-yi-34b-tp2 against published"
    assert ("Table 4", "P99 TBT, s", "chunk size 512", "0.1316", "0.14", "-6%") in rows
    assert ("Table 4", "P99 TBT, s", "chunk size 1024", "0.2526", "-", "-") in rows
    values = against_published(run)
    for axes, (_, rows) in zip(
        plots_serving.published_figure(run, values).axes, values.groupby("quantity", sort=False), strict=True
    ):
        heights = np.array([bar.get_height() for bar in axes.patches]).reshape(-1, 2)  # type: ignore[attr-defined]
        assert heights == pytest.approx(rows[["predicted", "published"]].to_numpy(), nan_ok=True)


def test_a_run_that_was_not_simulated_is_held_against_nothing() -> None:
    run = serving_run(replicates=2)
    assert against_published(run).empty
    assert published_lines(against_published(run)) == []
    assert "load" not in serving_table(run)


def test_values_are_told_of_the_calibration_at_hand_only(serving: Path) -> None:
    """A bag of other coefficients by the same name is not held against these values."""
    run = loaded(serving)
    assert len(against_published(run)) == 6
    plan = run.plan | {"identity": run.plan["identity"] | {"a100-2024-yi-34b-tp2": "0" * 64}}
    assert against_published(dataclasses.replace(run, plan=plan)).empty
