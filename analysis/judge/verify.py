"""`make verify`: integrity, gates, claims, in that order; verdict.json, and the overall verdict as the last line."""

from __future__ import annotations

import math
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.text import Text

from analysis.judge import archive, gates, integrity
from analysis.judge import claims as rules
from analysis.judge.load import Run, find_runs, load_run, stated, unfinished
from analysis.judge.stats import Sample
from experiments.records.documents import printable
from experiments.records.errors import SpecError
from experiments.records.provenance import sha256
from experiments.records.store import to_json, write_whole
from experiments.records.terminal import arguments, command, console, paragraph, parse, result, written

VERDICT_FORMAT = 1
# Of a run whose bags are not whole, or cannot be read, no more is known.
NOTHING: dict[str, Any] = {"integrity": [], "incomplete": False, "gates": [], "aside": [], "simulated": False}
SETTLED = ("PASS", "FAIL")
STYLES = {"PASS": "green", "FAIL": "red", "INCONCLUSIVE": "yellow", "NOT-APPLICABLE": "dim", "NOT-RUN": "dim"}


def _judged(claims: Sequence[rules.Claim], name: str, bags: list[Path]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A run's part of verdict.json and the entries of its claims. One that cannot be read does not keep others from theirs."""
    seals = [{"name": bag.name, "tagmanifest_sha256": integrity.tagmanifest_digest(bag)} for bag in bags]
    part = NOTHING | {"name": name, "figure": stated(bags, "figure"), "title": name, "bags": seals}
    try:
        found = {bag: integrity.problems(bag) for bag in bags}
        if any(found.values()):
            for seal, lines in zip(seals, found.values(), strict=True):
                seal["tagmanifest_sha256"] = None if lines else seal["tagmanifest_sha256"]
            broken = [line.replace(": ", f": {bag.name}/", 1) for bag in bags for line in found[bag]]
            cut = all(not lines or integrity.incomplete(bag, lines) for bag, lines in found.items())
            part |= {"integrity": broken, "incomplete": cut}
            return part, decide(claims, part, None)
        run = load_run(bags)
        whole = part | _facts(run)
        return whole, decide(claims, whole, run)
    except Exception as error:  # a bag may come from anywhere, and nothing that it holds is known to be of the right form
        reason = str(error) if isinstance(error, (SpecError, OSError)) else f"not records of ours: {error!r}"
        part |= {"unreadable": reason[:500]}
        return part, decide(claims, part, None)


def _facts(run: Run) -> dict[str, Any]:
    facts, noise = run.trials[0].facts, gates.noise(run)
    return {
        **{name: getattr(run, name) for name in ("figure", "title", "testbed", "simulated", "replicates", "models")},
        **{name: facts[name] for name in ("engine", "machine")},
        **{name: run.plan[name] for name in ("commit", "not_run")},
        "gates": [asdict(gate) for gate in gates.check(run)],
        "aside": list(run.aside),
        "noise": noise if math.isfinite(noise) else None,
    }


def decide(claims: Sequence[rules.Claim], part: Mapping[str, Any], run: Run | None) -> list[dict[str, Any]]:
    """One entry of verdict.json for each claim of the run's figure."""
    first: dict[str, dict[str, Any]] | None = None  # what the first look decided, if this is the second
    if run and run.earlier:
        then = {**part, "gates": [asdict(gate) for gate in gates.check(run.earlier)]}
        first = {entry["id"]: entry for entry in decide(claims, then, run.earlier)}
    decided: list[dict[str, Any]] = []
    judged: list[tuple[rules.Claim, Sample]] = []
    trace = run.trace if run else None
    broken = "; ".join(f"gate broken: {gate['gate']} ({gate['detail']})" for gate in part["gates"] if not gate["ok"])
    for claim in (claim for claim in claims if claim.figure == part["figure"]):
        entry = _entry(claim) | {"run": part["name"], "title": part["title"], "simulated": part["simulated"]}
        found = _unread(part) if run is None else rules.observe(run, claim, broken)
        if isinstance(found, Sample):
            entry["trace"] = trace["name"] if trace else None
            judged.append((claim, found))
        else:
            entry["verdict"], entry["reason"] = found
        decided.append(entry)
    if not judged:
        return decided
    before = None if first is None else [first[claim.id]["verdict"] for claim, _ in judged]
    before = before and [verdict if verdict in SETTLED else "INCONCLUSIVE" for verdict in before]
    verdicts = iter(rules.judge([claim for claim, _ in judged], [seen for _, seen in judged], before))
    return [entry if "verdict" in entry else _kept(first, entry | next(verdicts)) for entry in decided]


def _unread(part: Mapping[str, Any]) -> tuple[str, str]:
    """Verdict and reason for every claim of a run that was not loaded."""
    if part.get("unreadable"):
        return "INCONCLUSIVE", f"the run cannot be read: {part['unreadable']}"
    count, first = len(part["integrity"]), part["integrity"][0]
    if part["incomplete"]:
        return "INCONCLUSIVE", f"the run is incomplete, half copied perhaps ({count} files): {first}"
    return "FAIL", f"the bag is not as it was sealed: {first}"


def _kept(first: dict[str, dict[str, Any]] | None, now: dict[str, Any]) -> dict[str, Any]:
    """The entry of a claim: that of the first look where it settled the claim, with the ratio over all replicates beside it."""
    if first is None or first[now["id"]]["verdict"] not in SETTLED:
        return now
    then, numbers = first[now["id"]], now["numbers"]
    everything = {name: numbers[name] for name in ("ratio", "low", "high", "replicates", "ratios")}
    later = f"so the first look settled it; the ratio over all {numbers['replicates']} replicates is {numbers['ratio']:.3f}"
    return then | {"reason": f"{then['reason']}; {later}", "numbers": then["numbers"] | {"all_replicates": everything}}


def _entry(claim: rules.Claim) -> dict[str, Any]:
    said = {name: getattr(claim, name) for name in ("id", "figure", "model", "statement", "source", "rule")}
    said |= {"margin_reason": claim.reason, "scope": claim.scope.words(), "published": rules.published_verdict(claim)}
    return said | {"run": None, "title": None, "simulated": False, "numbers": {}}


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
    parts, entries = [], []
    for name, bags in find_runs(folder).items():
        part, decided = _judged(claims, name, bags)
        parts.append(part)
        entries += decided
    figures = {part["figure"] for part in parts}
    for claim in (claim for claim in claims if claim.figure not in figures):
        reason = f"no finished run of {claim.figure}: make {claim.figure}"
        entries.append(_entry(claim) | {"verdict": "NOT-RUN", "reason": reason})
    of_bags = [{"verdict": "INCONCLUSIVE" if part["incomplete"] else "FAIL"} for part in parts if part["integrity"]]
    of_bags += [{"verdict": "INCONCLUSIVE"} for part in parts if part.get("unreadable")]
    verdict, status = overall([*entries, *of_bags], everything)
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
        found = verify(archive.runs_in(folder), everything)
    found["archive"] = {"name": path.name, "sha256": sha256(path), "integrity": changed}
    if changed and found["overall"] != "FAIL":
        half_copied = all(line.startswith("missing: ") for line in changed)
        found["overall"], found["status"] = ("INCONCLUSIVE", 2) if half_copied else ("FAIL", 1)
    return found


def show(found: dict[str, Any]) -> None:
    """The verdicts for people; what is broken is named above them. Nothing that a bag says is taken for markup."""
    if made := found.get("archive"):
        console.print("\n  ".join((f"archive {made['name']} sha256 {made['sha256']}", *made["integrity"])))
    for part in found["runs"]:
        console.print()
        paragraph(part["title"])
        lines = [f"{bag['name']}: tag manifest sha256 {bag['tagmanifest_sha256'] or 'not as sealed'}" for bag in part["bags"]]
        lines += [f"cannot be read: {part['unreadable']}"] if part.get("unreadable") else []
        lines += [*part["integrity"], *part["aside"]]
        lines += [f"gate {'ok    ' if gate['ok'] else 'BROKEN'} {gate['gate']}: {gate['detail']}" for gate in part["gates"]]
        for line in lines:
            paragraph(line, "  ")
    for entry in found["claims"]:
        run = f"  {entry['run'] or 'not run'}{', SIMULATED' if entry['simulated'] else ''}"
        console.print(Text.assemble(f"\n{entry['id']:5}", _coloured(entry["verdict"]), run))
        published = entry["published"]
        judged = {"agrees": "agrees", "contradicts": "contradicts this"}.get(published["verdict"])
        reference = f" The published run {judged} ({published['value']:.4g})." if judged else ""
        for line in (entry["statement"], f"{entry['reason'][0].upper()}{entry['reason'][1:]}.{reference}"):
            paragraph(line, " " * 5)
    counts = Counter(entry["verdict"] for entry in found["claims"])
    console.print(f"\nclaims: {', '.join(f'{counts[verdict]} {verdict}' for verdict in STYLES if counts[verdict])}")


def _coloured(verdict: str) -> Text:
    return Text(verdict, style=STYLES[verdict])


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 all PASS or NOT-APPLICABLE, 1 any FAIL or a broken bag, 2 INCONCLUSIVE or nothing to judge."""
    parser = arguments("analysis.judge.verify", __doc__, "runs", "report")
    parser.add_argument("--bag", type=Path, help="an archive made elsewhere, in place of --runs")
    parser.add_argument("--all", action="store_true", help="a claim that was not run counts as INCONCLUSIVE")
    options = parse(parser, argv)
    report = options.report
    if options.bag and report == parser.get_default("report"):
        report /= re.sub(r"[^A-Za-z0-9-]", "_", options.bag.name)
    (report / "verdict.json").unlink(missing_ok=True)  # whatever happens from here on, none of other runs is left
    try:
        found = printable(verify_archive(options.bag, options.all) if options.bag else verify(options.runs, options.all))
    except SpecError as error:
        raise SpecError(printable(str(error))) from None
    write_whole(report / "verdict.json", to_json(found))
    show(found)
    for line in [] if options.bag else unfinished(options.runs):
        console.print(line)
    console.print(f"every number behind this: {written(report / 'verdict.json')}")
    console.print(_coloured(found["overall"]))
    result(**found)
    return int(found["status"])


if __name__ == "__main__":
    sys.exit(main())
