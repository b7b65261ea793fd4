"""What the report shows of a run: its pictures with words for those who do not see them, and the tables behind them."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from analysis import plots, plots_schedule, plots_serving
from analysis.load import Run, TrialRecord
from analysis.summary import prefill_table, serving_table
from experiments.metrics import of_phase, point_phase

CSS_PIXELS = 130  # per inch of figure: its 7.5 pt letters become the size of the page's small print


@dataclass(frozen=True)
class Table:
    """Text as it is shown; the first `headings` columns name the row."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    headings: int = 2


@dataclass(frozen=True)
class Picture:
    """A drawn figure: its SVG as a data URI, its size in CSS pixels, what it shows in words."""

    image: str
    width: int
    height: int
    alt: str
    caption: str


@dataclass(frozen=True)
class View:
    """The pictures of a run, those that explain it, and the tables behind them."""

    pictures: tuple[Picture, ...]
    tables: tuple[Table, ...]
    explanations: tuple[Picture, ...] = ()


def _picture(figure: plots.Figure, path: Path, alt: str, caption: str, formats: tuple[str, ...] = ("png", "svg")) -> Picture:
    """Draw to PATH.png and PATH.svg, or as SVG alone."""
    *_, svg = plots.save(figure, path, formats)
    width, height = figure.get_size_inches() * CSS_PIXELS
    image = "data:image/svg+xml;base64," + base64.b64encode(svg.read_bytes()).decode()
    return Picture(image, round(width), round(height), alt, caption)


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
    caption = (
        "Prefill time of one request, relative to the same session's unchunked prefill of the same length, which is the "
        "dashed line at 1. Bars: geometric mean over replicates; whiskers: 95 % t interval of the mean log ratio; each "
        "replicate is a session of its own. Prompt lengths and chunk sizes in the paper's tokens."
    )
    if table["in_paper"].any():
        caption += " Grey ground: the published values, one run without variance."
    panels = [(str(model), rows) for model, rows in table.groupby("model", sort=False)]
    words = " ".join(_prefill_words(model, rows) for model, rows in panels)
    alt = f"{run.title}. Bars of relative prefill time by prompt length. {words}"
    picture = _picture(plots.prefill_figure(run), path, alt, caption)
    return View((picture,), tuple(_prefill_rows(_titled(run, model, rows), rows) for model, rows in panels))


def _prefill_words(model: str, rows: pd.DataFrame) -> str:
    """What the bars of a model say: the range over prompt lengths at each chunk size."""
    said = []
    for size, group in rows[rows["chunk_size"] != "unchunked"].groupby("chunk_size", sort=False):
        text = f"chunk size {size}: {group['mean'].min():.2f} to {group['mean'].max():.2f}"
        if group["published_relative"].notna().any():
            text += f", published {group['published_relative'].min():.2f} to {group['published_relative'].max():.2f}"
        said.append(text)
    return f"{model}: {'; '.join(said)}."


def _prefill_rows(title: str, rows: pd.DataFrame) -> Table:
    columns = ("prompt length", "chunk size", "prefill ms, median", "range", "relative, mean", "95 % interval", "published")
    cells = []
    for row in rows.to_dict("records"):
        whole = row["chunk_size"] == "unchunked"  # relative to itself: nothing to estimate
        cells.append(
            (
                f"{row['prompt_length']:,}",
                str(row["chunk_size"]),
                _number(1e3 * row["seconds"], 1),
                _interval(1e3 * row["seconds_min"], 1e3 * row["seconds_max"], 1),
                _number(row["mean"], 3),
                "-" if whole else _interval(row["low"], row["high"], 3),
                _number(row["published_relative"], 3),
            )
        )
    return Table(title, columns, tuple(cells))


MEDIANS = ("scheduling_delay_p50", "normalized_latency_p50", "output_tokens_per_s", "utilisation")  # shown in the table too
SERVING_CAPTION = (
    "P50 TTFT and P99 TBT by chunk size, each on a scale of its own from 0. Bars: geometric mean over seeds; whiskers: 95 % t "
    "interval of the mean log. QPS and chunk sizes are the paper's, in brackets the rate that was run. The paper publishes no "
    "numbers for Figure 9b, so nothing stands beside it: what the paper states of it is judged among the verdicts above."
)
TRADEOFF_CAPTION = (
    "The same points against each other, a curve per QPS, each point named by its chunk size; both scales are logarithmic. By "
    "the paper's account a smaller chunk size lies higher (a later first token) and further left (steadier tokens after it). "
    "Lower and further left is better."
)
TBT_CAPTION = (
    "How many of the gaps between two tokens of a request are longer than so long, all seeds together; where a curve crosses "
    "the dotted line is its P99. A plateau ends at the time of a step with a full chunk of prefill; its height is the share of "
    "gaps that met one."
)
TRIAL_CAPTION = (
    "One trial. Top: the time of every step, orange where the step held prefill; each decoding request waits that long for its "
    "next token. Middle: the tokens of the step's batch, decodes first, against the chunk size. Bottom: requests that had "
    "arrived and got nothing in the step."
)


def serving_view(run: Run, path: Path) -> View:
    """Draw Figure 9b to PATH.png and PATH.svg, with PATH-tradeoff; what explains it as SVG: PATH-tbt-..., PATH-trial-..."""
    intervals = plots_serving.serving_intervals(run)
    keys = ["model", "qps", "chunk_size"]
    medians = serving_table(run)[[*keys, *MEDIANS]]
    table = intervals.merge(medians, on=keys, how="left")
    words = " ".join(_serving_words(rows) for _, rows in table.groupby(["model", "qps"], sort=False))
    pictures = (
        _picture(plots_serving.serving_figure(run), path, f"{run.title}. Bars by chunk size. {words}", SERVING_CAPTION),
        _picture(
            plots_serving.tradeoff_figure(run),
            path.with_name(f"{path.name}-tradeoff"),
            f"{run.title}. P50 TTFT over P99 TBT, the numbers of the figure before.",
            TRADEOFF_CAPTION,
        ),
    )
    tables = tuple(_serving_rows(_titled(run, str(model), rows), rows) for model, rows in table.groupby("model", sort=False))
    explanations = []
    for model, rows in table.groupby("model", sort=False):
        explanations += _explanations(run, path, str(model), rows)
    return View(pictures, tables, tuple(explanations))


def _serving_words(rows: pd.DataFrame) -> str:
    """What the bars of one model and QPS say."""
    said = (
        f"chunk size {row['chunk_size']}: P50 TTFT {1e3 * row['ttft_p50']:.3g} ms, P99 TBT {1e3 * row['tbt_p99']:.3g} ms"
        for row in rows.to_dict("records")
    )
    return f"{rows['model'].iloc[0]}, {plots_serving.load_of(rows)}: {'; '.join(said)}."


def _serving_rows(title: str, rows: pd.DataFrame) -> Table:
    judged = ("P50 TTFT ms, mean", "95 % interval", "P99 TBT ms, mean", "95 % interval")
    others = ("scheduling delay ms, P50", "ms per token, P50", "output tokens/s", "busy")
    cells = [
        (
            f"{row['qps']:g}",
            str(row["chunk_size"]),
            _number(row["rate"], 2),
            _number(1e3 * row["ttft_p50"], 1),
            _interval(1e3 * row["ttft_p50_low"], 1e3 * row["ttft_p50_high"], 1),
            _number(1e3 * row["tbt_p99"], 1),
            _interval(1e3 * row["tbt_p99_low"], 1e3 * row["tbt_p99_high"], 1),
            _number(1e3 * row["scheduling_delay_p50"], 1),
            _number(1e3 * row["normalized_latency_p50"], 1),
            _number(row["output_tokens_per_s"], 0),
            f"{row['utilisation']:.0%}",
        )
        for row in rows.to_dict("records")
    ]
    return Table(title, ("QPS", "chunk size", "requests/s run", *judged, *others), tuple(cells))


def _explanations(run: Run, path: Path, model: str, rows: pd.DataFrame) -> list[Picture]:
    """TBT distributions at every QPS; at the highest, the first seed's trials with the smallest and the largest chunk size."""
    drawn = []
    for qps, group in rows.groupby("qps"):
        figure = plots_serving.tbt_figure(run, model, float(str(qps)))
        alt = f"{run.title}. Distribution of the gaps between tokens. {_serving_words(group)}"
        drawn.append(_picture(figure, path.with_name(f"{path.name}-tbt-{model}-qps{qps:g}"), alt, TBT_CAPTION, ("svg",)))
    for trial in explained_trials(run, model):
        figure = plots_serving.trial_figure(run, trial)
        name = f"{path.name}-trial-{trial.facts['session']}-{trial.facts['trial']}"
        drawn.append(_picture(figure, path.with_name(name), f"{run.title}. {_trial_words(trial)}", TRIAL_CAPTION, ("svg",)))
    return drawn


def explained_trials(run: Run, model: str) -> list[TrialRecord]:
    """The first seed's trials of a model at its highest QPS, with the smallest and the largest chunk size."""
    found: dict[tuple[float, float], TrialRecord] = {}
    own = [trial for trial in run.trials if trial.facts["model"] == model and not trial.repeat]
    first = min(trial.facts["seed"] for trial in own)
    for trial in (trial for trial in own if trial.facts["seed"] == first):
        role = trial.facts["phases"][point_phase(trial.facts["phases"])]
        if role["role"] == "point":
            found[role["qps"], role["chunk_size"] or float("inf")] = trial
    highest = max((qps for qps, _ in found), default=0.0)
    sizes = sorted(size for qps, size in found if qps == highest)
    return [found[highest, size] for size in dict.fromkeys([*sizes[:1], *sizes[-1:]])]


def _trial_words(trial: TrialRecord) -> str:
    record = of_phase(trial.record, point_phase(trial.facts["phases"]))
    milliseconds, waiting = 1e3 * record.steps["seconds"], record.steps["waiting"]
    return (
        f"Trial {trial.facts['trial']} of session {trial.facts['session']}: {len(record.requests)} requests in "
        f"{len(record.steps)} steps of {milliseconds.median():.3g} ms (median), at most {milliseconds.max():.3g} ms; "
        f"at most {max(waiting, default=0)} requests waiting."
    )


SCHEDULE_CAPTION = (
    "Each bar is a session: one engine process with one model and seed. White: when and where make planned it, from the "
    "simulator where a calibration describes the machine. Grey: when and where it ran, from the loading of its engine on; its "
    "process has started before."
)


def schedule_view(run: Run, path: Path) -> tuple[Picture, ...]:
    """Draw planned against actual to PATH-schedule.svg; nothing for a run that was simulated in one process."""
    tables = plots_schedule.compared(run)
    if not tables:
        return ()
    figure, words = plots_schedule.schedule_figure(run, tables), plots_schedule.in_words(tables)
    alt = f"{run.title}. Schedule: {words}."
    return (_picture(figure, path.with_name(f"{path.name}-schedule"), alt, f"{SCHEDULE_CAPTION} {words}.", ("svg",)),)


VIEWS: dict[str, Callable[[Run, Path], View]] = {"prefill": prefill_view, "serving": serving_view}  # by the kind of a figure
