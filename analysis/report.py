"""The report: verdicts, figures beside the reference, tables and provenance in one self-contained page.

`python -m analysis.report` draws every judged run and writes REPORT/index.html from REPORT/verdict.json.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from analysis import plots
from analysis.load import Run, find_runs, load_run
from analysis.summary import prefill_table
from experiments.provenance import ROOT, sha256
from experiments.spec import SpecError

VERDICT_FORMAT = 1
CSS_PIXELS = 130  # per inch of figure: its 7.5 pt letters become the size of the page's small print


@dataclass(frozen=True)
class Table:
    """Text as it is shown; the first `headings` columns name the row."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    headings: int = 2


@dataclass(frozen=True)
class View:
    """A drawn figure: its SVG as a data URI, its size in CSS pixels, what it shows in words, the tables behind it."""

    image: str
    width: int
    height: int
    alt: str
    caption: str
    tables: tuple[Table, ...]


def prefill_view(run: Run, path: Path) -> View:
    """Draw Figure 9a to PATH.png and PATH.svg."""
    figure = plots.prefill_figure(run)
    _, svg = plots.save(figure, path)
    width, height = figure.get_size_inches() * CSS_PIXELS
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
    simulated = "simulated: " if plots.simulated(run) else ""
    return View(
        image="data:image/svg+xml;base64," + base64.b64encode(svg.read_bytes()).decode(),
        width=round(width),
        height=round(height),
        alt=f"{simulated}{run.title}. Bars of relative prefill time by prompt length. {words}",
        caption=caption,
        tables=tuple(_prefill_rows(f"{simulated}{model}", rows) for model, rows in panels),
    )


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
                f"{_number(1e3 * row['seconds_min'], 1)} to {_number(1e3 * row['seconds_max'], 1)}",
                _number(row["mean"], 3),
                "-" if whole or pd.isna(row["low"]) else f"{row['low']:.3f} to {row['high']:.3f}",
                _number(row["published_relative"], 3),
            )
        )
    count = int(rows["replicates"].min())
    return Table(f"{title}, {count} replicate{'s'[: count != 1]}", columns, tuple(cells))


def _number(value: float, digits: int) -> str:
    return "-" if pd.isna(value) else f"{value:,.{digits}f}"


VIEWS: dict[str, Callable[[Run, Path], View]] = {"prefill": prefill_view}  # by the kind of a figure


def read_verdict(path: Path) -> dict[str, Any]:
    """verdict.json. Raises SpecError if it is not there, not JSON or of another format."""
    try:
        verdict = json.loads(path.read_text())
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file; run make verify first") from None
    except (OSError, ValueError) as error:
        raise SpecError(f"{path}: cannot be read ({error}); run make verify again") from None
    if not isinstance(verdict, dict) or verdict.get("format") != VERDICT_FORMAT:
        came = verdict.get("format") if isinstance(verdict, dict) else type(verdict).__name__
        raise SpecError(f"{path}: format {came!r}; this version reads format {VERDICT_FORMAT}; run make verify again")
    return verdict


def draw(judged: Mapping[str, Any], found: Mapping[str, list[Path]], report: Path) -> View | None:
    """The view of a judged run; None if its bag is broken or its kind has no picture.

    Raises SpecError if the bags are not those that were judged: a verdict beside another run's figure would mislead.
    """
    name = str(judged["name"])
    if judged.get("integrity"):
        return None
    if name not in found:
        raise SpecError(f"{name}: judged, but its bags are gone; run make verify again")
    run = load_run(found[name])
    digests = {bag["name"]: bag.get("tagmanifest_sha256") for bag in judged.get("bags", [])}
    for bag in run.bags:
        if digests.get(bag.name) != sha256(bag / "tagmanifest-sha256.txt"):
            raise SpecError(f"{name}: {bag.name} is not what was judged; run make verify again")
    make = VIEWS.get(str(run.trials[0].facts["kind"])) if run.trials else None
    return make(run, report / name) if make else None


def render(verdict: Mapping[str, Any], views: Mapping[str, View | None], unjudged: Sequence[str]) -> str:
    """The page. Everything in it is escaped: records and verdicts may come from anywhere."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,  # a key that an older or newer verdict.json lacks is shown as nothing
        trim_blocks=True,
        lstrip_blocks=True,
    )
    counts = Counter(str(claim["verdict"]) for claim in verdict.get("claims", []))
    template = environment.get_template("report.html.j2")
    return template.render(verdict=verdict, counts=counts, views=views, unjudged=unjudged)


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 if there is no verdict or it is not of these runs."""
    parser = argparse.ArgumentParser(prog="python -m analysis.report", description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, default=ROOT / "artifacts" / "runs")
    parser.add_argument("--report", type=Path, default=ROOT / "artifacts" / "report")
    options = parser.parse_args(argv)
    try:
        verdict = read_verdict(options.report / "verdict.json")
        found = find_runs(options.runs)
        views = {str(run["name"]): draw(run, found, options.report) for run in verdict.get("runs", [])}
    except SpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    page = options.report / "index.html"
    write(page, render(verdict, views, sorted(set(found) - set(views))))
    print(f"report written to {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
