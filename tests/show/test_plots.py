from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from fakes import synthetic_run
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from analysis.judge.load import Run, TrialRecord, published_prefill
from analysis.show import plots
from analysis.show.summary import prefill_table


def overhead(tokens: int, budget: int) -> float:
    """Relative cost of a prefill: 5 % more for each further chunk, at most 40 %."""
    return 1 + min(0.4, 0.05 * ((tokens - 1) // budget))


def simulated(run: Run) -> Run:
    return dataclasses.replace(run, plan={**run.plan, "platform": "simulated"})


@pytest.fixture(scope="module")
def cpu_run() -> Run:
    return synthetic_run(overhead, noise=0.03)


def words(figure: Figure) -> str:
    parts = [figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)]
    parts += [text.get_text() for axes in figure.axes for text in axes.texts]
    return "\n".join(parts).replace("\n", " ")


def bars(figure: Figure) -> list[Patch]:
    return [patch for axes in figure.axes for patch in axes.patches]


def test_intervals_are_those_of_the_log_ratios(cpu_run: Run) -> None:
    table = prefill_table(cpu_run)
    assert len(table) == 2 * 4 * 4
    assert set(table["replicates"]) == {5}
    chunked = table[table["chunk_size"] != "unchunked"]
    mean, low, high = (chunked[f"relative_mean{end}"] for end in ("", "_low", "_high"))
    assert ((low < mean) & (mean < high)).all()
    np.testing.assert_allclose(low * high, mean**2)  # symmetric on the log scale
    assert (table[table["chunk_size"] == "unchunked"]["relative_mean"] == 1).all()


def test_one_replicate_has_no_interval_and_says_so() -> None:
    run = synthetic_run(overhead, replicates=1)
    assert prefill_table(run)[["relative_mean_low", "relative_mean_high"]].isna().all(axis=None)
    assert "1 replicate, no interval" in words(plots.prefill_figure(run))


def test_the_published_values_stand_beside_the_papers_model_on_the_same_scale(cpu_run: Run) -> None:
    figure = plots.prefill_figure(cpu_run)
    regenerated, published, other, empty = figure.axes
    assert "fig9a on testbed cpu" in figure.get_suptitle()
    assert "scale 1:8" in figure.get_suptitle()
    what = "cpu, lengths ÷ 8\ngeometric mean of 5 replicates, 95 % intervals"
    assert regenerated.get_title() == f"regenerated: yi-34b-200k\n{what}"
    assert published.get_title().startswith("published: yi-34b-200k\nA100")
    assert other.get_title().startswith("regenerated: mistral-7b")
    assert "not in the paper" in empty.texts[0].get_text()
    assert {axes.get_ylim() for axes in figure.axes} == {regenerated.get_ylim()}
    assert [label.get_text() for label in published.get_xticklabels()] == ["2k", "4k", "8k", "16k"]
    reference = published_prefill()
    heights = sorted(round(bar.get_height(), 6) for bar in published.patches)  # type: ignore[attr-defined]
    assert heights == sorted(reference[reference["chunk_size"] != "unchunked"]["relative"].round(6))


def test_a_chunk_size_has_one_colour_everywhere(cpu_run: Run) -> None:
    colours = [to_hex(bar.get_facecolor()).upper() for bar in bars(plots.prefill_figure(cpu_run))]
    wanted = [plots.COLOURS[size] for size in ("512", "1024", "2048")]
    assert {colour: colours.count(colour) for colour in set(colours)} == dict.fromkeys(wanted, 3 * 4)
    legend = plots.prefill_figure(cpu_run).legends[0]
    shown = {text.get_text(): handle for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)}
    for size, colour in zip(("512", "1024", "2048"), wanted, strict=True):
        handle = shown[f"chunk size {size}"]
        assert isinstance(handle, Patch)
        assert to_hex(handle.get_facecolor()).upper() == colour


def lightness(colour: str) -> float:
    """CIE L*, 0 to 100, from sRGB."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


def test_grey_print_keeps_the_order_of_the_chunk_sizes() -> None:
    levels = [lightness(plots.COLOURS[size]) for size in ("256", "512", "1024", "2048")]
    assert all(later - earlier > 15 for earlier, later in itertools.pairwise(levels))


def test_a_simulated_run_says_so_and_is_hatched(cpu_run: Run) -> None:
    pretended = plots.prefill_figure(simulated(synthetic_run(overhead, testbed="a100", replicates=2)))
    assert pretended.get_suptitle().startswith("SIMULATED ")
    mine, published, *_ = pretended.axes
    assert mine.get_title().startswith("SIMULATED: ")
    assert {bar.get_hatch() for bar in mine.patches} == {plots.HATCH}
    assert {bar.get_hatch() for bar in published.patches} == {None}
    measured = plots.prefill_figure(cpu_run)
    assert "SIMULATED" not in words(measured)
    assert {bar.get_hatch() for bar in bars(measured)} == {None}


def test_the_same_run_gives_the_same_bytes(cpu_run: Run, tmp_path: Path) -> None:
    first = plots.save(plots.prefill_figure(cpu_run), tmp_path / "a" / "fig9a-cpu")
    second = plots.save(plots.prefill_figure(cpu_run), tmp_path / "b" / "fig9a-cpu")
    assert [path.name for path in first] == ["fig9a-cpu.png", "fig9a-cpu.svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["fig9a-cpu.png", "fig9a-cpu.svg"]


def test_a_panel_is_as_wide_as_a_column(cpu_run: Run) -> None:
    assert plots.prefill_figure(cpu_run).get_size_inches()[0] <= 7.0
    lone = synthetic_run(overhead, testbed="gpu-24g", replicates=2)
    figure = plots.prefill_figure(lone)  # a model that the paper does not show: one column, nothing beside it
    assert figure.get_size_inches()[0] <= 3.6
    assert len(figure.axes) == 1


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "$\\frac{$", "a & b"])
def test_a_name_is_only_a_name(name: str, tmp_path: Path) -> None:
    run = synthetic_run(overhead, testbed="gpu-24g", replicates=1)
    run = dataclasses.replace(run, testbed=name, trials=tuple(_renamed(trial, name) for trial in run.trials))
    figure = plots.prefill_figure(run)
    assert name in words(figure)
    _, svg = plots.save(figure, tmp_path / "x")
    assert "<script" not in svg.read_text()


def _renamed(trial: TrialRecord, name: str) -> TrialRecord:
    return dataclasses.replace(trial, facts={**trial.facts, "model": name})


def test_what_did_not_finish_is_left_out() -> None:
    run = synthetic_run(overhead, testbed="gpu-24g", replicates=3)
    lost = tuple(trial for trial in run.trials if trial.facts["seed"] == 42)
    for trial in lost:
        trial.record.requests["last_step"] = -1
    assert set(prefill_table(run)["replicates"]) == {2}
    nothing = dataclasses.replace(run, trials=lost)
    assert prefill_table(nothing)["relative_mean"].isna().all()
    assert "0 replicates, no interval" in words(plots.prefill_figure(nothing))
