"""What the report shows of a run: its pictures with words for those who do not see them, and the tables behind them."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.judge.load import Run, by_chunk_size, measurements
from analysis.judge.trial import TrialRecord
from analysis.show import plots, plots_schedule, plots_serving
from analysis.show.summary import WORDS, against_published, cut_short, number, prefill_table, published_lines, spread
from experiments.records.metrics import NAMES, of_phase, point_phase

CSS_PIXELS = 130  # per inch of figure: its 7.5 pt letters become the size of the page's small print
INTERVAL = ("_low", "_high")


def data_uri(svg: Path) -> str:
    """A picture as a part of the page itself."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg.read_bytes()).decode()


@dataclass(frozen=True)
class Table:
    """Rows of column -> text, as it is shown; the first two columns name the row."""

    caption: str
    rows: list[dict[str, str]]


@dataclass(frozen=True)
class Picture:
    """A drawn figure: its SVG as a data URI, its size in CSS pixels, what it shows in words; its caption is the page's."""

    kind: str
    image: str
    width: int
    height: int
    alt: str
    note: str  # goes with the caption


@dataclass(frozen=True)
class View:
    """The pictures of a run, the tables behind them, the pictures that explain it, and by how much a simulation is off."""

    pictures: tuple[Picture, ...]
    tables: tuple[Table, ...]
    explanations: tuple[Picture, ...] = ()
    error: str = ""


def _picture(run: Run, path: Path, kind: str, figure: plots.Figure, said: str, name: str = "", note: str = "") -> Picture:
    """Draw to PATH with NAME at its end: the figures themselves and the trade-off as .png and .svg, others as .svg alone."""
    formats = ("png", "svg") if kind in (*VIEWS, "tradeoff") else ("svg",)
    *_, svg = plots.save(figure, path.with_name(path.name + name), formats)
    width, height = figure.get_size_inches() * CSS_PIXELS
    return Picture(kind, data_uri(svg), round(width), round(height), f"{run.title}. {said}", note)


def _tables(run: Run, table: pd.DataFrame, row: Callable[[Mapping[Any, Any]], dict[str, str]]) -> tuple[Table, ...]:
    """A table for each model, and what else is published beside what a simulated run's calibrations make of it."""
    found = []
    for model, rows in table.groupby("model", sort=False):
        count = int(rows["replicates"].min())
        title = f"{'simulated: ' if run.simulated else ''}{model}, {count} replicate{'s'[: count != 1]}"
        found.append(Table(title, [row(each) for each in rows.to_dict("records")]))
    for name, rows in against_published(run).groupby("calibration"):
        title = f"simulated by calibration {name} against published"
        found.append(Table(title, [_published_row(each) for each in rows.to_dict("records")]))
    return tuple(found)


def _published_row(row: Mapping[Any, Any]) -> dict[str, str]:
    return {
        "published in": row["source"],
        "quantity": WORDS[row["quantity"]],
        "of": row["at"],
        "simulated": number(row["predicted"], ".4g"),
        "published": number(row["published"], ".4g"),
        "simulated is off by": number(row["off"], "+.0%"),
    }


def prefill_view(run: Run, path: Path) -> View:
    """Draw Figure 9a to PATH.png and PATH.svg."""
    table = prefill_table(run)
    note = "Grey ground: the published values, one run without variance." if table["in_paper"].any() else ""
    words = " ".join(_prefill_words(str(model), rows) for model, rows in table.groupby("model", sort=False))
    said = f"Bars of relative prefill time by prompt length. {words}"
    picture = _picture(run, path, "prefill", plots.prefill_figure(run), said, note=note)
    return View((picture,), _tables(run, table, _prefill_row))


def _prefill_words(model: str, rows: pd.DataFrame) -> str:
    """What the bars of a model say: the range over prompt lengths at each chunk size."""
    said = []
    for size, group in rows[rows["chunk_size"] != "unchunked"].groupby("chunk_size", sort=False):
        mean, published = group["relative_mean"], group["published_relative"]
        beside = f", published {published.min():.2f} to {published.max():.2f}" if published.notna().any() else ""
        said.append(f"chunk size {size}: {mean.min():.2f} to {mean.max():.2f}{beside}")
    return f"{model}: {'; '.join(said)}."


def _prefill_row(row: Mapping[Any, Any]) -> dict[str, str]:
    return {
        "prompt length": f"{row['prompt_length']:,}",
        "chunk size": row["chunk_size"],
        "prefill ms, median (range)": spread(row, "seconds", ",.1f", 1e3),
        "relative, mean (95 % interval)": spread(row, "relative_mean", ".3f", ends=INTERVAL),
        "published": number(row["published_relative"], ".3f"),
    }


def serving_view(run: Run, path: Path) -> View:
    """Draw Figure 9b to PATH.png and PATH.svg, with PATH-tradeoff; what explains it as SVG: PATH-tbt-..., PATH-trial-..."""
    table = plots_serving.finished(run)
    words = " ".join(_serving_words(rows) for _, rows in table.groupby(["model", "qps"], sort=False))
    said = "P50 TTFT over P99 TBT, the numbers of the figure before."
    left_out = "".join(f"Left out, as {told}. " for told in cut_short(run)).strip()
    pictures = [
        _picture(run, path, "serving", plots_serving.serving_figure(run), f"Bars by chunk size. {words}", note=left_out),
        _picture(run, path, "tradeoff", plots_serving.tradeoff_figure(run), said, "-tradeoff"),
    ]
    if len(published := against_published(run)):
        said = " ".join(published_lines(published))
        pictures.append(_picture(run, path, "published", plots_serving.published_figure(run, published), said, "-published"))
    return View(tuple(pictures), _tables(run, table, _serving_row), tuple(_explanations(run, path, table)))


def _serving_words(rows: pd.DataFrame) -> str:
    """What the bars of one model and QPS say."""
    said = (
        f"chunk size {row['chunk_size']}: "
        + ", ".join(f"{words} {1e3 * row[name]:.3g} ms" for name, words in plots_serving.MEANS.items())
        for row in rows.to_dict("records")
    )
    return f"{rows['model'].iloc[0]}, {plots_serving.load_of(rows)}: {'; '.join(said)}."


def _serving_row(row: Mapping[Any, Any]) -> dict[str, str]:
    means = plots_serving.MEANS.items()
    return {
        "QPS": f"{row['qps']:g}",
        "chunk size": row["chunk_size"],
        "requests/s run": number(row["rate"], ".2f"),
        **{f"{words} ms, mean (95 % interval)": spread(row, name, ",.1f", 1e3, INTERVAL) for name, words in means},
        "scheduling delay ms, P50": number(1e3 * row["scheduling_delay_p50"], ",.1f"),
        "ms per token, P50": number(1e3 * row["normalized_latency_p50"], ",.1f"),
        "output tokens/s": number(row["output_tokens_per_s"], ",.0f"),
        "busy": number(row["utilisation"], ".0%"),
    }


def _explanations(run: Run, path: Path, table: pd.DataFrame) -> Iterable[Picture]:
    """Of each model TBT distributions at every QPS; at the highest, the first seed's trials with the smallest and the largest
    chunk size."""
    for model, rows in table.groupby("model", sort=False):
        for qps, group in rows.groupby("qps"):
            figure = plots_serving.tbt_figure(run, str(model), float(str(qps)))
            said = f"Distribution of the gaps between tokens. {_serving_words(group)}"
            yield _picture(run, path, "tbt", figure, said, f"-tbt-{model}-qps{qps:g}")
        for trial in _explained_trials(run, str(model)):
            name = f"-trial-{trial.facts['session']}-{trial.facts['trial']}"
            yield _picture(run, path, "trial", plots_serving.trial_figure(run, trial), _trial_words(trial), name)


def _explained_trials(run: Run, model: str) -> list[TrialRecord]:
    points = measurements(run)
    points = points[(points["model"] == model) & ~points["repeat"]]
    points = points[points["seed"] == points["seed"].min()]
    names = by_chunk_size(points[points["qps"] == points["qps"].max()])["trial"].iloc[[0, -1]]
    seed = points["seed"].iloc[0]
    session = {t.facts["trial"]: t for t in run.trials if (t.facts["model"], t.facts["seed"]) == (model, seed)}
    return [session[name] for name in names.unique()]


def _trial_words(trial: TrialRecord) -> str:
    record = of_phase(trial.record, point_phase(trial.facts["phases"]))
    milliseconds, waiting = 1e3 * record.steps["seconds"], record.steps["waiting"]
    return (
        f"Trial {trial.facts['trial']} of session {trial.facts['session']}: {len(record.requests)} requests in "
        f"{len(record.steps)} steps of {milliseconds.median():.3g} ms (median), at most {milliseconds.max():.3g} ms; "
        f"at most {max(waiting, default=0)} requests waiting."
    )


def schedule_view(run: Run, path: Path) -> tuple[Picture, ...]:
    """Draw planned against actual to PATH-schedule.svg; nothing for a run that was simulated in one process."""
    tables = plots_schedule.compared(run)
    if not tables:
        return ()
    figure, words = plots_schedule.schedule_figure(run, tables), plots_schedule.in_words(tables)
    return (_picture(run, path, "schedule", figure, f"Schedule: {words}.", "-schedule", f"{words}."),)


def error_words(run: Run) -> str:
    """By how much a simulated run may be off, by model; empty for one that was measured."""
    names = {"prefill": "prefill time"} if run.kind == "prefill" else NAMES
    parts = [
        f"{model} {words} {'by nobody knows how much' if error is None else f'{error:.1%}'}"
        for model in run.models
        for name, words in names.items()
        if (error := run.model_error(model, name)) != 0
    ]
    return "; ".join(parts) if run.simulated else ""


def advice_view(svg: Path) -> Picture:
    """A capacity figure that make recommend or make capacity drew; its numbers are in the JSON beside it."""
    points = re.findall(rb'(?:width|height)="([\d.]+)pt"', svg.read_bytes()[:1000]) or (b"360", b"240")
    width, height = (round(float(length) / 72 * CSS_PIXELS) for length in points)
    numbers = f"{svg.stem}.json beside this page"
    alt = f"SIMULATED: capacity in requests per second against the P99 TBT target, by chunk size; the numbers are in {numbers}."
    return Picture("advice", data_uri(svg), width, height, alt, f"Numbers and choice: {numbers}.")


VIEWS: dict[str, Callable[[Run, Path], View]] = {"prefill": prefill_view, "serving": serving_view}  # by the kind of a figure
