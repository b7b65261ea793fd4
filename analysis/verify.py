"""`make verify`: integrity, gates, claims, in that order; a table, verdict.json, and the overall verdict as the last line."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from analysis import claims as rules
from analysis import gates, integrity
from analysis.load import Run, find_runs, load_run, unfinished
from analysis.stats import sample
from experiments.provenance import ROOT
from experiments.spec import SpecError
from experiments.store import to_json

VERDICT_FORMAT = 1
STYLES = {"PASS": "green", "FAIL": "red", "INCONCLUSIVE": "yellow", "NOT-APPLICABLE": "dim", "NOT-RUN": "dim"}


def examine(name: str, bags: list[Path]) -> tuple[dict[str, Any], Run | None]:
    """A run's part of verdict.json and, if its bags are whole, the run. Raises SpecError for a half-copied bag."""
    half = [bag.name for bag in bags if integrity.incomplete(bag)]
    if half:
        raise SpecError(f"{name}/{half[0]}: incomplete, it was never sealed or only partly copied; nothing is judged on it")
    broken = [
        f"{line.split(': ', 1)[0]}: {bag.name}/{line.split(': ', 1)[1]}" for bag in bags for line in integrity.problems(bag)
    ]
    sealed = [{"name": bag.name, "tagmanifest_sha256": None if broken else integrity.tagmanifest_digest(bag)} for bag in bags]
    part: dict[str, Any] = {"name": name, "figure": name.split("-")[0], "title": name, "bags": sealed, "integrity": broken}
    if broken:
        return part | {"gates": [], "aside": [], "simulated": False}, None
    run = load_run(bags)
    facts = run.trials[0].facts
    return part | {
        "figure": run.figure,
        "title": run.title,
        "testbed": run.testbed,
        "simulated": run.simulated,
        "gates": [asdict(gate) for gate in gates.check(run)],
        "aside": list(run.aside),
        "replicates": run.replicates,
        "noise": _number(gates.noise(run)),
        "engine": facts["engine"],
        "machine": facts["machine"],
        "commit": run.plan["commit"],
        "models": run.models,
        "not_run": run.plan["not_run"],
    }, run


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def decide(claims: Sequence[rules.Claim], part: dict[str, Any], run: Run | None) -> list[dict[str, Any]]:
    """One entry of verdict.json for each claim of the run's figure."""
    decided: list[dict[str, Any]] = []
    judged: list[tuple[rules.Claim, Any]] = []
    for claim in (claim for claim in claims if claim.figure == part["figure"]):
        entry = _entry(claim) | {"run": part["name"], "title": part["title"], "simulated": part["simulated"]}
        if run is None:
            entry |= {"verdict": "FAIL", "reason": f"the bag is not as it was sealed: {part['integrity'][0]}"}
        elif run.testbed not in claim.scope:
            entry |= {"verdict": "NOT-APPLICABLE", "reason": f"claimed of {', '.join(claim.scope)}; this is {run.testbed}"}
        elif claim.model not in run.models:
            entry |= {"verdict": "NOT-RUN", "reason": f"{claim.model} was not run on {run.testbed}"}
        elif broken := [gate for gate in part["gates"] if not gate["ok"]]:
            reason = "; ".join(f"gate broken: {gate['gate']} ({gate['detail']})" for gate in broken)
            entry |= {"verdict": "INCONCLUSIVE", "reason": reason}
        else:
            found = rules.ratios(run, claim)
            entry["trace"] = run.trace["name"] if run.trace else None
            judged.append((claim, sample([found[seed] for seed in sorted(found)], run.model_error(claim.model))))
        decided.append(entry)
    if run is not None and judged:
        verdicts = iter(rules.judge([claim for claim, _ in judged], [seen for _, seen in judged], len(run.bags)))
        decided = [entry if "verdict" in entry else entry | next(verdicts) for entry in decided]
    return decided


def _entry(claim: rules.Claim) -> dict[str, Any]:
    return {
        "id": claim.id,
        "figure": claim.figure,
        "model": claim.model,
        "statement": claim.statement,
        "source": claim.source,
        "rule": claim.rule,
        "margin_reason": claim.reason,
        "scope": list(claim.scope),
        "run": None,
        "title": None,
        "simulated": False,
        "numbers": {},
        "published": rules.published_verdict(claim),
    }


def overall(entries: Sequence[dict[str, Any]], everything: bool) -> tuple[str, int]:
    """Overall verdict and exit status: 0 all PASS or NOT-APPLICABLE, 1 any FAIL, 2 something INCONCLUSIVE, or nothing judged.

    everything: NOT-RUN counts as INCONCLUSIVE.
    """
    verdicts = {entry["verdict"] for entry in entries}
    if "FAIL" in verdicts:
        return "FAIL", 1
    if "INCONCLUSIVE" in verdicts or (everything and "NOT-RUN" in verdicts):
        return "INCONCLUSIVE", 2
    return ("PASS", 0) if "PASS" in verdicts else ("NOT-RUN", 2)


def verify(folder: Path, everything: bool = False) -> dict[str, Any]:
    """verdict.json as data. Raises SpecError if there is nothing to judge."""
    claims = rules.load_claims()
    found = find_runs(folder)
    parts, entries = [], []
    for name, bags in found.items():
        part, run = examine(name, bags)
        parts.append(part)
        entries += decide(claims, part, run)
    figures = {part["figure"] for part in parts}
    for claim in claims:
        if claim.figure not in figures:
            reason = f"no finished run of {claim.figure}: make {claim.figure}"
            entries.append(_entry(claim) | {"verdict": "NOT-RUN", "reason": reason})
    verdict, status = overall(entries, everything)
    if any(part["integrity"] for part in parts):
        verdict, status = "FAIL", 1
    made = datetime.now(UTC).isoformat(timespec="seconds")
    return {"format": VERDICT_FORMAT, "made": made, "overall": verdict, "status": status, "claims": entries, "runs": parts}


def show(result: dict[str, Any], console: Console) -> None:
    """The verdict table for people; what is broken is named above it."""
    for part in result["runs"]:
        simulated = "SIMULATED, " if part["simulated"] else ""
        console.print(f"\n{simulated}{part['title']}")
        for bag in part["bags"]:
            console.print(f"  {bag['name']}  tag manifest sha256 {bag['tagmanifest_sha256'] or 'not as sealed'}")
        for line in (*part["integrity"], *part["aside"]):
            console.print(f"  {line}")
        for gate in part["gates"]:
            console.print(f"  gate {'ok    ' if gate['ok'] else 'BROKEN'} {gate['gate']}: {gate['detail']}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("claim", "run", "verdict", "why", "published"):
        table.add_column(column, no_wrap=column in ("claim", "verdict"))
    for entry in result["claims"]:
        verdict = f"[{STYLES[entry['verdict']]}]{entry['verdict']}[/]"
        why = f"{entry['statement']} {entry['reason'][0].upper()}{entry['reason'][1:]}."
        table.add_row(entry["id"], entry["run"] or "", verdict, why, entry["published"]["verdict"], end_section=True)
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 all PASS or NOT-APPLICABLE, 1 any FAIL or a broken bag, 2 INCONCLUSIVE or nothing to judge."""
    parser = argparse.ArgumentParser(prog="python -m analysis.verify", description=__doc__)
    parser.add_argument("--runs", type=Path, default=ROOT / "artifacts" / "runs")
    parser.add_argument("--report", type=Path, default=ROOT / "artifacts" / "report")
    parser.add_argument("--all", action="store_true", help="a claim that was not run counts as INCONCLUSIVE")
    parser.add_argument("--json", action="store_true", help="print verdict.json instead of the table")
    options = parser.parse_args(argv)
    console = Console(highlight=False)
    try:
        result = verify(options.runs, options.all)
    except SpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.report.mkdir(parents=True, exist_ok=True)
    temporary = options.report / ".verdict.json"
    temporary.write_text(to_json(result))
    temporary.replace(options.report / "verdict.json")
    if options.json:
        print(json.dumps(result))
    else:
        show(result, console)
        for line in unfinished(options.runs):
            console.print(line)
        console.print(f"every number behind this: {options.report / 'verdict.json'}")
        console.print(f"[{STYLES[result['overall']]}]{result['overall']}[/]")
    return int(result["status"])


if __name__ == "__main__":
    sys.exit(main())
