"""`make verify`: integrity, gates, claims, in that order; a table, verdict.json, and the overall verdict as the last line."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from analysis import archive, gates, integrity
from analysis import claims as rules
from analysis.load import Run, find_runs, load_run, printable, unfinished
from analysis.stats import sample
from experiments.provenance import ROOT, sha256
from experiments.spec import SpecError
from experiments.store import to_json, write_whole

VERDICT_FORMAT = 1
STYLES = {"PASS": "green", "FAIL": "red", "INCONCLUSIVE": "yellow", "NOT-APPLICABLE": "dim", "NOT-RUN": "dim"}


def examine(name: str, bags: list[Path]) -> tuple[dict[str, Any], Run | None]:
    """A run's part of verdict.json and, if its bags are whole, the run."""
    found = {bag: integrity.problems(bag) for bag in bags}
    broken = [line.replace(": ", f": {bag.name}/", 1) for bag in bags for line in found[bag]]
    sealed = [{"name": b.name, "tagmanifest_sha256": None if found[b] else integrity.tagmanifest_digest(b)} for b in bags]
    part: dict[str, Any] = {"name": name, "figure": name.split("-")[0], "title": name, "bags": sealed, "integrity": broken}
    part["incomplete"] = bool(broken) and all(not lines or integrity.incomplete(bag, lines) for bag, lines in found.items())
    if broken:
        return part | {"gates": [], "aside": [], "simulated": False}, None
    try:
        return _examine(part, bags)
    except SpecError:
        raise
    except Exception as error:  # a bag may come from anywhere, and nothing that it holds is known to be of the right form
        raise SpecError(f"{name}: not records of ours, although the bag is whole: {error!r}"[:500]) from None


def _examine(part: dict[str, Any], bags: list[Path]) -> tuple[dict[str, Any], Run]:
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
        if part.get("incomplete"):
            reason = f"the run is incomplete, half copied perhaps ({len(part['integrity'])} files): {part['integrity'][0]}"
            entry |= {"verdict": "INCONCLUSIVE", "reason": reason}
        elif run is None:
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
    if any(part["integrity"] and not part["incomplete"] for part in parts):
        verdict, status = "FAIL", 1
    elif status != 1 and any(part["incomplete"] for part in parts):
        verdict, status = "INCONCLUSIVE", 2
    made = datetime.now(UTC).isoformat(timespec="seconds")
    return {"format": VERDICT_FORMAT, "made": made, "overall": verdict, "status": status, "claims": entries, "runs": parts}


def verify_archive(path: Path, everything: bool = False) -> dict[str, Any]:
    """verify for an archive made elsewhere, unpacked in a temporary folder. Raises SpecError for one that is refused."""
    if not path.is_file():
        raise SpecError(f"BAG: {path}: no such file; an archive of make package, or of a bag, is needed")
    with tempfile.TemporaryDirectory(prefix="elsewhere-") as hold:
        folder = Path(hold) / "unpacked"
        folder.mkdir()
        archive.unpack(path, folder)
        changed = archive.problems(folder)
        result = verify(archive.runs_in(folder), everything)
    result["archive"] = {"name": path.name, "sha256": sha256(path), "integrity": changed}
    return result | ({"overall": "FAIL", "status": 1} if changed else {})


def show(result: dict[str, Any], console: Console) -> None:
    """The verdict table for people; what is broken is named above it. Nothing that a bag says is taken for markup."""
    if made := result.get("archive"):
        console.print(f"archive {made['name']} sha256 {made['sha256']}", markup=False)
        for line in made["integrity"]:
            console.print(f"  {line}", markup=False)
    for part in result["runs"]:
        simulated = "SIMULATED, " if part["simulated"] else ""
        console.print(f"\n{simulated}{part['title']}", markup=False)
        for bag in part["bags"]:
            digest = bag["tagmanifest_sha256"] or "not as sealed"
            console.print(f"  {bag['name']}  tag manifest sha256 {digest}", markup=False)
        for line in (*part["integrity"], *part["aside"]):
            console.print(f"  {line}", markup=False)
        for gate in part["gates"]:
            state = "ok    " if gate["ok"] else "BROKEN"
            console.print(f"  gate {state} {gate['gate']}: {gate['detail']}", markup=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("claim", "run", "verdict", "why", "published"):
        table.add_column(column, no_wrap=column in ("claim", "verdict"))
    for entry in result["claims"]:
        verdict = f"[{STYLES[entry['verdict']]}]{entry['verdict']}[/]"
        why = f"{entry['statement']} {entry['reason'][0].upper()}{entry['reason'][1:]}."
        run, published = escape(entry["run"] or ""), entry["published"]["verdict"]
        table.add_row(entry["id"], run, verdict, escape(why), published, end_section=True)
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 all PASS or NOT-APPLICABLE, 1 any FAIL or a broken bag, 2 INCONCLUSIVE or nothing to judge."""
    parser = argparse.ArgumentParser(prog="python -m analysis.verify", description=__doc__)
    parser.add_argument("--runs", type=Path, default=ROOT / "artifacts" / "runs")
    parser.add_argument("--bag", type=Path, help="an archive made elsewhere, in place of --runs")
    parser.add_argument("--report", type=Path, help="default: artifacts/report, and for --bag a folder in it")
    parser.add_argument("--all", action="store_true", help="a claim that was not run counts as INCONCLUSIVE")
    parser.add_argument("--json", action="store_true", help="print verdict.json instead of the table")
    options = parser.parse_args(argv)
    console = Console(highlight=False)
    try:
        result = printable(verify_archive(options.bag, options.all) if options.bag else verify(options.runs, options.all))
    except SpecError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    elsewhere = [re.sub(r"[^A-Za-z0-9-]", "_", options.bag.name)] if options.bag else []
    report = options.report or (ROOT / "artifacts" / "report").joinpath(*elsewhere)
    report.mkdir(parents=True, exist_ok=True)
    write_whole(report / "verdict.json", to_json(result))
    if options.json:
        print(json.dumps(result))
    else:
        show(result, console)
        for line in [] if options.bag else unfinished(options.runs):
            console.print(line, markup=False)
        console.print(f"every number behind this: {report / 'verdict.json'}", markup=False)
        console.print(f"[{STYLES[result['overall']]}]{result['overall']}[/]")
    return int(result["status"])


if __name__ == "__main__":
    sys.exit(main())
