"""What the report shows of a run: its pictures with words for those who do not see them, and the tables behind them."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from analysis.judge.load import Run, by_chunk_size, serving_trials
from analysis.judge.trial import TrialRecord
from analysis.show import plots, plots_schedule, plots_serving
from analysis.show.published import WORDS, against_published, published_lines
from analysis.show.summary import cut_short, prefill_table, serving_table
from experiments.records.metrics import NAMES, of_phase, point_phase

CSS_PIXELS = 130  # per inch of figure: its 7.5 pt letters become the size of the page's small print


@dataclass(frozen=True)
class Table:
    """Text as it is shown; the first two columns name the row."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


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
    """The pictures of a run, those that explain it, and the tables behind them."""

    pictures: tuple[Picture, ...]
    tables: tuple[Table, ...]
    explanations: tuple[Picture, ...] = ()


def _picture(run: Run, path: Path, kind: str, figure: plots.Figure, said: str, name: str = "", note: str = "") -> Picture:
    """Draw to PATH with NAME at its end: the figures themselves and the trade-off as .png and .svg, others as .svg alone."""
    formats = ("png", "svg") if kind in (*VIEWS, "tradeoff") else ("svg",)
    *_, svg = plots.save(figure, path.with_name(path.name + name), formats)
    width, height = figure.get_size_inches() * CSS_PIXELS
    image = "data:image/svg+xml;base64," + base64.b64encode(svg.read_bytes()).decode()
    return Picture(kind, image, round(width), round(height), f"{run.title}. {said}", note)


def _number(value: float, digits: int) -> str:
    return "-" if pd.isna(value) else f"{value:,.{digits}f}"


def _interval(low: float, high: float, digits: int) -> str:
    return "-" if pd.isna(low) else f"{low:,.{digits}f} to {high:,.{digits}f}"


def _titled(run: Run, model: str, rows: pd.DataFrame) -> str:
    count = int(rows["replicates"].min())
    return f"{'simulated: ' if run.simulated else ''}{model}, {count} replicate{'s'[: count != 1]}"


def prefill_view(run: Run, path: Path) -> View:
    """Draw Figure 9a to PATH.png and PATH.svg."""
    keys = ["model", "prompt_length", "chunk_size"]
    means = plots.relative_intervals(run)[[*keys, "relative", "low", "high"]].rename(columns={"relative": "mean"})
    table = prefill_table(run).merge(means, on=keys, how="left")
    note = "Grey ground: the published values, one run without variance." if table["in_paper"].any() else ""
    panels = [(str(model), rows) for model, rows in table.groupby("model", sort=False)]
    words = " ".join(_prefill_words(model, rows) for model, rows in panels)
    said = f"Bars of relative prefill time by prompt length. {words}"
    picture = _picture(run, path, "prefill", plots.prefill_figure(run), said, note=note)
    tables = tuple(_prefill_table(_titled(run, model, rows), rows) for model, rows in panels)
    return View((picture,), (*tables, *_published_tables(run)))


def _prefill_words(model: str, rows: pd.DataFrame) -> str:
    """What the bars of a model say: the range over prompt lengths at each chunk size."""
    said = []
    for size, group in rows[rows["chunk_size"] != "unchunked"].groupby("chunk_size", sort=False):
        text = f"chunk size {size}: {group['mean'].min():.2f} to {group['mean'].max():.2f}"
        if group["published_relative"].notna().any():
            text += f", published {group['published_relative'].min():.2f} to {group['published_relative'].max():.2f}"
        said.append(text)
    return f"{model}: {'; '.join(said)}."


def _prefill_table(title: str, rows: pd.DataFrame) -> Table:
    columns = ("prompt length", "chunk size", "prefill ms, median", "range", "relative, mean", "95 % interval", "published")
    cells = []
    for row in rows.to_dict("records"):
        times = (_number(1e3 * row["seconds"], 1), _interval(1e3 * row["seconds_min"], 1e3 * row["seconds_max"], 1))
        # Unchunked relative to itself: nothing to estimate.
        interval = "-" if row["chunk_size"] == "unchunked" else _interval(row["low"], row["high"], 3)
        relative = (_number(row["mean"], 3), interval, _number(row["published_relative"], 3))
        cells.append((f"{row['prompt_length']:,}", row["chunk_size"], *times, *relative))
    return Table(title, columns, tuple(cells))


def serving_view(run: Run, path: Path) -> View:
    """Draw Figure 9b to PATH.png and PATH.svg, with PATH-tradeoff; what explains it as SVG: PATH-tbt-..., PATH-trial-..."""
    keys = ["model", "qps", "chunk_size"]
    medians = ["scheduling_delay_p50", "normalized_latency_p50", "output_tokens_per_s", "utilisation"]
    table = plots_serving.serving_intervals(run).merge(serving_table(run)[[*keys, *medians]], on=keys, how="left")
    words = " ".join(_serving_words(rows) for _, rows in table.groupby(["model", "qps"], sort=False))
    said = "P50 TTFT over P99 TBT, the numbers of the figure before."
    left_out = "".join(f"Left out, as {told}. " for told in cut_short(run)).strip()
    pictures = [
        _picture(run, path, "serving", plots_serving.serving_figure(run), f"Bars by chunk size. {words}", note=left_out),
        _picture(run, path, "tradeoff", plots_serving.tradeoff_figure(run), said, "-tradeoff"),
    ]
    panels = [(str(model), rows) for model, rows in table.groupby("model", sort=False)]
    tables = tuple(_serving_table(_titled(run, model, rows), rows) for model, rows in panels)
    explanations = tuple(picture for model, rows in panels for picture in _explanations(run, path, model, rows))
    if len(published := against_published(run)):
        said = " ".join(published_lines(published))
        pictures.append(_picture(run, path, "published", plots_serving.published_figure(run, published), said, "-published"))
    return View(tuple(pictures), (*tables, *_published_tables(run)), explanations)


def _published_tables(run: Run) -> tuple[Table, ...]:
    """What else is published, beside what a simulated run's calibrations make of it."""
    columns = ("published in", "quantity", "of", "simulated", "published", "simulated is off by")
    tables = []
    for name, rows in against_published(run).groupby("calibration"):
        cells = (
            (row["source"], WORDS[row["quantity"]], row["at"], f"{row['predicted']:.4g}",
             "-" if pd.isna(row["off"]) else f"{row['published']:.4g}", "-" if pd.isna(row["off"]) else f"{row['off']:+.0%}")
            for row in rows.to_dict("records")
        )  # fmt: skip
        tables.append(Table(f"simulated by calibration {name} against published", columns, tuple(cells)))
    return tuple(tables)


def _serving_words(rows: pd.DataFrame) -> str:
    """What the bars of one model and QPS say."""
    said = (
        f"chunk size {row['chunk_size']}: P50 TTFT {1e3 * row['ttft_p50']:.3g} ms, P99 TBT {1e3 * row['tbt_p99']:.3g} ms"
        for row in rows.to_dict("records")
    )
    return f"{rows['model'].iloc[0]}, {plots_serving.load_of(rows)}: {'; '.join(said)}."


def _serving_table(title: str, rows: pd.DataFrame) -> Table:
    judged = ("P50 TTFT ms, mean", "95 % interval", "P99 TBT ms, mean", "95 % interval")
    others = ("scheduling delay ms, P50", "ms per token, P50", "output tokens/s", "busy")
    cells = []
    for row in rows.to_dict("records"):
        own = [f"{row['qps']:g}", row["chunk_size"], _number(row["rate"], 2)]
        for metric in NAMES:
            own.append(_number(1e3 * row[metric], 1))
            own.append(_interval(1e3 * row[f"{metric}_low"], 1e3 * row[f"{metric}_high"], 1))
        own += [_number(1e3 * row[metric], 1) for metric in ("scheduling_delay_p50", "normalized_latency_p50")]
        cells.append((*own, _number(row["output_tokens_per_s"], 0), f"{row['utilisation']:.0%}"))
    return Table(title, ("QPS", "chunk size", "requests/s run", *judged, *others), tuple(cells))


def _explanations(run: Run, path: Path, model: str, rows: pd.DataFrame) -> list[Picture]:
    """TBT distributions at every QPS; at the highest, the first seed's trials with the smallest and the largest chunk size."""
    drawn = []
    for qps, group in rows.groupby("qps"):
        figure = plots_serving.tbt_figure(run, model, float(str(qps)))
        said = f"Distribution of the gaps between tokens. {_serving_words(group)}"
        drawn.append(_picture(run, path, "tbt", figure, said, f"-tbt-{model}-qps{qps:g}"))
    for trial in _explained_trials(run, model):
        name = f"-trial-{trial.facts['session']}-{trial.facts['trial']}"
        drawn.append(_picture(run, path, "trial", plots_serving.trial_figure(run, trial), _trial_words(trial), name))
    return drawn


def _explained_trials(run: Run, model: str) -> list[TrialRecord]:
    """The first seed's trials of a model at its highest QPS, with the smallest and the largest chunk size."""
    points = serving_trials(run)
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


VIEWS: dict[str, Callable[[Run, Path], View]] = {"prefill": prefill_view, "serving": serving_view}  # by the kind of a figure
