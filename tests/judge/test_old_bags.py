"""A bag that version 0.1.0 sealed gets the verdicts that it got then: records do not change."""

from __future__ import annotations

import json
from pathlib import Path

from analysis.judge.verify import main

OLD = Path(__file__).with_name("runs-0.1.0.zip")  # fig9a on a100-sim with 2 replicates, smoke on cpu
VERDICTS = {"C1": "INCONCLUSIVE", "C2": "INCONCLUSIVE", "C3": "PASS", "C4": "INCONCLUSIVE", "C8": "INCONCLUSIVE"}


def test_an_old_bag_keeps_its_verdicts(tmp_path: Path) -> None:
    assert main(["--bag", str(OLD), "--report", str(tmp_path)]) == 2
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    found = {entry["id"]: entry["verdict"] for entry in verdict["claims"]}
    others = {"C5", "C6", "C7"}
    assert found == VERDICTS | dict.fromkeys(others, "NOT-APPLICABLE") | {f"C{n}": "NOT-RUN" for n in range(9, 17)}
    gates = [gate for run in verdict["runs"] if run["figure"] == "fig9a" for gate in run["gates"]]
    assert gates
    assert all(gate["ok"] for gate in gates)
