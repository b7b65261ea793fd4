from __future__ import annotations

import dataclasses
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fakes import serving_run
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle, StepPatch

from analysis.judge.load import Run, TrialRecord, measurements
from analysis.show import plots, plots_serving
from experiments.records.metrics import of_phase, point_phase, tbt
from experiments.records.store import StoredRecord


@pytest.fixture(scope="module")
def run() -> Run:
    return serving_run(replicates=3)


def simulated(run: Run) -> Run:
    return dataclasses.replace(run, plan={**run.plan, "platform": "simulated"})


def panels(figure: Figure) -> dict[str, list[Rectangle]]:
    """Title of each panel of Figure 9b, in one line -> its bars, TTFT first."""
    found = {}
    for panel in figure.subfigs:
        bars = [patch for axes in panel.axes for patch in axes.patches if isinstance(patch, Rectangle)]
        found[panel.get_suptitle().replace("\n", " ")] = bars
    return found


def test_intervals_are_those_of_the_logs_over_seeds(run: Run) -> None:
    table = plots_serving.finished(run)
    assert len(table) == 2 * 2 * 3
    assert set(table["replicates"]) == {3}
    point = table[(table["model"] == "yi-34b") & (table["qps"] == 0.55) & (table["chunk_size"] == "1024")].iloc[0]
    trials = measurements(run)
    same = (trials["model"] == "yi-34b") & (trials["qps"] == 0.55) & (trials["chunk_size"] == "1024") & ~trials["repeat"]
    logs = np.log(trials[same]["ttft_p50"])
    assert point["ttft_p50_mean"] == pytest.approx(math.exp(logs.mean()))
    half = 4.302653 * logs.std() / math.sqrt(3)  # t of 0.975 at two degrees of freedom, from a table
    assert point["ttft_p50_mean_low"] == pytest.approx(math.exp(logs.mean() - half), rel=1e-6)
    assert point["ttft_p50_mean_high"] == pytest.approx(math.exp(logs.mean() + half), rel=1e-6)
    assert table[table["qps"] == 3]["chunk_size"].tolist() == ["256", "512", "1024"]


def test_a_panel_for_each_model_and_qps_with_the_rate_that_was_run(run: Run) -> None:
    figure = plots_serving.serving_figure(run)
    assert figure.get_suptitle() == "fig9b on testbed cpu (synthetic; scale 1:8; trace synthetic-sharegpt)"
    rates = {(row["model"], row["qps"]): row["rate"] for row in plots_serving.finished(run).to_dict("records")}
    assert list(panels(figure)) == [
        f"{model}, QPS {qps:g} ({rate:.2f} requests/s) cpu, lengths ÷ 8 geometric mean of 3 replicates, 95 % intervals"
        for (model, qps), rate in rates.items()
    ]
    for panel in figure.subfigs:
        assert [axes.get_ylabel() for axes in panel.axes] == ["P50 TTFT (ms)", "P99 TBT (ms)"]
        assert all(axes.get_ylim()[0] == 0 for axes in panel.axes)
    wanted = plots_serving.finished(run)
    heights = [bar.get_height() for bars in panels(figure).values() for bar in bars]
    expected = [
        1e3 * value for _, rows in wanted.groupby(["model", "qps"]) for name in plots_serving.MEANS for value in rows[name]
    ]
    assert heights == pytest.approx(expected)


def test_titles_of_neighbours_do_not_touch_and_a_rate_is_said_once(run: Run) -> None:
    plan = run.plan | {"platform": "simulated", "scale": 1}
    figure = plots_serving.serving_figure(dataclasses.replace(run, testbed="a100-2024-sim", plan=plan))
    FigureCanvasAgg(figure).draw()  # type: ignore[no-untyped-call]
    left, right = (panel._suptitle.get_window_extent() for panel in figure.subfigs[:2])
    assert left.x1 < right.x0
    assert plots_serving.load_words(1.0, [1.0, 1.001]) == "QPS 1"


def test_a_chunk_size_has_the_colour_it_has_in_9a(run: Run) -> None:
    for title, bars in panels(plots_serving.serving_figure(run)).items():
        sizes = ("256", "512", "1024") if title.startswith("mistral") else ("512", "1024", "2048")
        assert [to_hex(bar.get_facecolor()).upper() for bar in bars] == [plots.COLOURS[size] for size in sizes] * 2
    free = {plots_serving.PREFILL_COLOUR, plots_serving.DECODE_COLOUR}
    assert not free & set(plots.COLOURS.values())


def test_a_simulated_run_says_so_and_is_hatched(run: Run) -> None:
    pretended = simulated(run)
    for title, bars in panels(plots_serving.serving_figure(pretended)).items():
        assert title.startswith("SIMULATED: ")
        assert {bar.get_hatch() for bar in bars} == {plots.HATCH}
    others = [plots_serving.tradeoff_figure(pretended), plots_serving.tbt_figure(pretended, "yi-34b", 1.0)]
    others.append(plots_serving.trial_figure(pretended, pretended.trials[0]))
    for figure in others:
        assert "SIMULATED" in figure.get_suptitle()
        assert {axes.patch.get_hatch() for axes in figure.axes} == {plots.HATCH}
    assert all(bar.get_hatch() is None for bars in panels(plots_serving.serving_figure(run)).values() for bar in bars)
    assert "SIMULATED" not in plots_serving.tradeoff_figure(run).get_suptitle()


def test_the_tradeoff_has_a_curve_per_qps_and_names_its_points(run: Run) -> None:
    figure = plots_serving.tradeoff_figure(run)
    mistral, yi = figure.axes
    assert [text.get_text() for text in mistral.texts] == ["256", "512", "1024"] * 2
    assert [text.get_text() for text in yi.texts] == ["512", "1024", "2048"] * 2
    for axes in (mistral, yi):
        legend = axes.get_legend()
        assert legend is not None
        assert [text.get_text().split(" (")[0] for text in legend.get_texts()] in (["QPS 1", "QPS 3"], ["QPS 0.55", "QPS 1"])
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("P99 TBT (ms)", "P50 TTFT (ms)")
        assert len(axes.containers) == 6  # a point with its error bars for each chunk size and QPS


def test_the_tbt_figure_takes_the_memory_of_one_trial_however_many_there_are(run: Run, tmp_path: Path) -> None:
    trial, peaks = next(trial for trial in run.trials if trial.facts["trial"] == "qps3-chunk256"), []
    tokens = pd.concat([trial.record.tokens] * 200, ignore_index=True)
    tokens.to_parquet(tmp_path / "tokens.parquet", index=False)
    trial.record.requests.to_csv(tmp_path / "requests.csv", index=False)
    trial.record.steps.to_parquet(tmp_path / "steps.parquet", index=False)
    stored = TrialRecord(tmp_path, trial.facts, StoredRecord(tmp_path, False))
    for count in (2, 30):
        many = dataclasses.replace(run, trials=(trial, *[stored] * count))
        tracemalloc.start()
        plots_serving.tbt_figure(many, "mistral-7b", 3.0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


def test_the_tbt_figure_pools_the_seeds_and_ends_at_its_p99(run: Run) -> None:
    axes = plots_serving.tbt_figure(run, "mistral-7b", 3.0).axes[0]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["chunk size 256", "chunk size 512", "chunk size 1024"]
    curves = {str(line.get_label()): line for line in axes.lines}
    for size in (256, 512, 1024):
        x, y = (np.asarray(data) for data in curves[f"chunk size {size}"].get_data())
        trials = [t for t in run.trials if t.facts["trial"] == f"qps3-chunk{size}" and t.facts["model"] == "mistral-7b"]
        gaps = np.concatenate([tbt(of_phase(t.record, point_phase(t.facts["phases"]))) for t in trials])
        assert (np.diff(y) < 0).all()
        assert y == pytest.approx([(1e3 * gaps >= edge).mean() for edge in x])
        assert np.interp(0.01, y[::-1], x[::-1]) == pytest.approx(1e3 * np.percentile(gaps, 99), rel=0.05)


def areas(patch: StepPatch) -> float:
    values, edges, base = patch.get_data()
    return float(((values - (0 if base is None else base)) * np.diff(edges)).sum())


def test_a_trial_is_drawn_from_its_steps(run: Run) -> None:
    trial = next(trial for trial in run.trials if trial.facts["trial"] == "qps1-chunk256")
    figure = plots_serving.trial_figure(run, trial)
    assert figure.get_suptitle().startswith("mistral-7b, chunk size 256, QPS 1 (3.15 requests/s), seed 42\n")
    time, tokens, waiting = figure.axes
    steps = trial.record.steps.iloc[trial.record.requests.query("phase == phase.max()")["first_step"].min() :]
    decode, prefill = (patch for patch in tokens.patches if isinstance(patch, StepPatch))
    assert areas(decode) == pytest.approx((steps["decode_tokens"] * steps["seconds"]).sum())
    assert areas(prefill) == pytest.approx((steps["prefill_tokens"] * steps["seconds"]).sum())
    assert [line.get_ydata()[0] for line in tokens.lines] == [32]  # type: ignore[index]
    assert time.get_ylim()[1] > 1e3 * steps["seconds"].max()
    assert waiting.get_xlabel() == "seconds since the first request arrived"
    assert waiting.get_xlim()[0] <= 0


def test_of_a_long_trial_the_middle_is_drawn_and_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots_serving, "MOST_STEPS", 100)
    trial = run.trials[0]
    figure = plots_serving.trial_figure(run, trial)
    assert " steps " in figure.get_suptitle()
    (_, patch, *_) = (patch for patch in figure.axes[1].patches if isinstance(patch, StepPatch))
    assert len(patch.get_data()[0]) == 2 * 100 - 1  # every step and what lies between two


def test_one_replicate_has_no_interval_and_says_so() -> None:
    lone = serving_run(replicates=1)
    assert plots_serving.finished(lone)[["ttft_p50_mean_low", "tbt_p99_mean_high"]].isna().all(axis=None)
    assert all("1 replicate, no interval" in title for title in panels(plots_serving.serving_figure(lone)))
    assert len(plots_serving.tradeoff_figure(lone).axes) == 2


def test_where_nothing_finished_there_is_nothing_to_draw(run: Run) -> None:
    silent = []
    for trial in run.trials:
        requests = trial.record.requests.assign(last_step=-1)
        silent.append(dataclasses.replace(trial, record=dataclasses.replace(trial.record, requests=requests)))
    nothing = dataclasses.replace(run, trials=tuple(silent))
    assert plots_serving.finished(nothing).empty
    assert panels(plots_serving.serving_figure(nothing)) == {"": []}
    plots_serving.tradeoff_figure(nothing)


def test_the_same_run_gives_the_same_bytes(run: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        plots.save(plots_serving.serving_figure(run), tmp_path / name / "figure")
        plots.save(plots_serving.tradeoff_figure(run), tmp_path / name / "tradeoff")
        plots.save(plots_serving.tbt_figure(run, "yi-34b", 1.0), tmp_path / name / "tbt")
        plots.save(plots_serving.trial_figure(run, run.trials[0]), tmp_path / name / "trial")
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_the_pictures_fit_the_page(run: Run) -> None:
    for figure in (plots_serving.serving_figure(run), plots_serving.trial_figure(run, run.trials[0])):
        assert figure.get_size_inches()[0] <= 7.0
    assert plots_serving.tbt_figure(run, "yi-34b", 1.0).get_size_inches()[0] <= 3.6
