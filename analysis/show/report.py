"""The report: verdicts, figures beside the reference, tables and provenance in one self-contained page.

`python -m analysis.show.report` draws every judged run and writes REPORT/index.html from REPORT/verdict.json. Runs are
loaded one at a time.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2

from analysis.judge import integrity
from analysis.judge.load import find_runs, load_run
from analysis.judge.verify import VERDICT_FORMAT
from analysis.show.views import VIEWS, View, advice_view, error_words, schedule_view
from experiments.records.errors import SpecError
from experiments.records.store import write_whole
from experiments.records.terminal import arguments, command, console, parse, result, written

# What is behind a verdict, as it is read: the ratio and its interval, what they are of, then the tests.
NUMBERS = ("ratio", "low", "high", "replicates", "replicates_needed", "ratios",
           "p_pass", "p_pass_adjusted", "p_fail", "p_fail_adjusted", "level", "looks")  # fmt: skip


def read_verdict(path: Path) -> dict[str, Any]:
    """verdict.json. Raises SpecError if it is not there, not JSON or of another format."""
    try:
        verdict: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file; run make verify first") from None
    except (OSError, ValueError) as error:
        raise SpecError(f"{path}: cannot be read ({error}); run make verify again") from None
    came = verdict.get("format") if isinstance(verdict, dict) else type(verdict).__name__
    if came != VERDICT_FORMAT:
        raise SpecError(f"{path}: format {came!r}; this version reads format {VERDICT_FORMAT}; run make verify again")
    return verdict


def draw(judged: Mapping[str, Any], found: Mapping[str, list[Path]], report: Path) -> View | None:
    """The view of a judged run; None if its bag is broken or its kind has no picture.

    Raises SpecError if the bags are not those that were judged: a verdict beside another run's figure would mislead.
    """
    name = str(judged["name"])
    if reason := integrity.outdated(judged, found.get(name, [])):
        raise SpecError(f"{reason}; run make verify again")
    if judged.get("integrity") or judged.get("unreadable"):
        return None
    run = load_run(found[name])
    if run.kind not in VIEWS:
        return None
    view = VIEWS[run.kind](run, report / name)
    return replace(view, explanations=(*view.explanations, *schedule_view(run, report / name)), error=error_words(run))


def advised(path: Path) -> list[dict[str, str]]:
    """What a JSON of make recommend or make capacity answers, a row for each question; none of another format."""
    data = json.loads(path.read_text())
    return [_answer(each) for each in data.get("answers", [data])] if data["format"] == 2 else []


def _answer(answer: Mapping[str, Any]) -> dict[str, str]:
    asked, traffic = answer["question"], answer["traffic"]
    users = f"{traffic['number']:g} users" if traffic["arrivals"] == "closed" else ""
    load = users or (f"{asked['rate']:g} requests/s" if asked["rate"] else "")
    share = f"{asked['goodput']:.4g} of the requests with " if asked["goodput"] else ""
    targets = (f"{' '.join(reversed(name.upper().split('_')))} {most:g} s" for name, most in asked["targets"].items())
    setting = answer.get("recommended") or answer["best"]["setting"]
    return {
        "model": answer["model"],
        "calibration": answer["calibration"],
        "targets": share + (", ".join(targets) or "none"),
        "load": load or "the highest",
        "chunk size": str(setting["budget"]),
        "gives": f"{answer['value']:.3g} ({answer['low']:.3g} to {answer['high']:.3g}) {'s' if load else 'requests/s'}",
    }


def ordered(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a claim as they are read, others after them; verdict.json has them by the alphabet."""
    given = {key: number for key, number in numbers.items() if (key, number) != ("replicates_needed", None)}
    return {key: given[key] for key in (*NUMBERS, *given) if key in given}


def render(verdict: Mapping[str, Any], **shown: Any) -> str:
    """The page. Everything in it is escaped: records and verdicts may come from anywhere.

    shown: views (by run), advice (pictures by name), answers (rows of advised) and unjudged (names of runs).
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,  # a key that an older or newer verdict.json lacks is shown as nothing
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["ordered"] = ordered
    counts = Counter(str(claim["verdict"]) for claim in verdict.get("claims", []))
    return environment.get_template("report.html.j2").render(verdict=verdict, counts=counts, **shown)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 if there is no verdict or it is not of these runs."""
    options = parse(arguments("analysis.show.report", __doc__, "runs", "report"), argv)
    verdict = read_verdict(options.report / "verdict.json")
    found = find_runs(options.runs)
    views = {str(run["name"]): draw(run, found, options.report) for run in verdict.get("runs", [])}
    given = [path for name in ("recommend", "capacity") for path in sorted(options.report.glob(f"{name}-*"))]
    advice = {path.stem: advice_view(path) for path in given if path.suffix == ".svg"}
    answers = [row for path in given if path.suffix == ".json" for row in advised(path)]
    page, unjudged = options.report / "index.html", sorted(set(found) - set(views))
    write_whole(page, render(verdict, views=views, advice=advice, answers=answers, unjudged=unjudged))
    console.print(f"report written to {page}\n{written(options.report)}")
    result(report=page, overall=verdict.get("overall"), unjudged=unjudged)
    return 0


if __name__ == "__main__":
    sys.exit(main())
