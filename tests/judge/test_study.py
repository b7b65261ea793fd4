"""The study of the verdicts is a study of the rule that judges runs, and can fail."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import study

from analysis.judge import claims
from analysis.judge.stats import MOST_REPLICATES, Sample, sample


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "NOISE", (0.05,))
    monkeypatch.setattr(study, "REPLICATES", (3, 6))


def test_study_and_verifier_decide_alike() -> None:
    """Thousands of experiments at once get the verdicts, numbers and advice that judge gives each of them alone."""
    rng = np.random.default_rng(5)
    for experiment in study.experiments():
        first = None
        for n in (3, 6, 10):  # the last one after replicates were added to the six
            errors = study.noise("heavy tails", 0.05, (len(experiment.claims), 40, n), rng)
            logs = [math.log(ratio) + error for ratio, error in zip(experiment.ratios, errors, strict=True)]
            before = first if n == 10 else None
            found = claims.rule(experiment.claims, [Sample(values) for values in logs], before)
            first = found.verdict
            for number in range(40):
                samples = [sample(np.exp(values[number]).tolist()) for values in logs]
                one = claims.judge(experiment.claims, samples, None if before is None else before[number].tolist())
                assert [entry["verdict"] for entry in one] == found.verdict[number].tolist()
                assert [entry["numbers"]["replicates_needed"] or 0 for entry in one] == found.needed[number].tolist()
                assert [entry["numbers"]["p_pass"] for entry in one] == pytest.approx(found.p_pass[number])


def test_what_a_first_look_settled_stays_settled_and_the_others_share_what_is_left() -> None:
    eight = next(e for e in study.experiments() if e.name == "8 orderings").claims
    ratios = np.array([1.01, 0.99, 1.02, 0.98, 1.0, 1.015])
    strong, weak, none = (sample((ratio * ratios).tolist()) for ratio in (1.25, 1.035, 1.0))
    p_weak = float(claims.p_values(eight[0], weak)[0])
    assert 0.005 / 8 < p_weak < 0.005 / 3
    first = ["PASS"] * 5 + ["FAIL"] + ["INCONCLUSIVE"] * 2
    found = claims.judge(eight, [none] * 6 + [weak, none], first)
    assert [entry["verdict"] for entry in found] == ["PASS"] * 5 + ["FAIL", "PASS", "INCONCLUSIVE"]
    # A claim that failed was not rejected among those that may pass, so it still counts there: three, not two.
    assert found[6]["numbers"]["p_pass_adjusted"] == pytest.approx(3 * p_weak)
    assert {entry["numbers"]["level"] for entry in found} == {0.005}
    assert [entry["verdict"] for entry in claims.judge(eight, [none] * 6 + [weak, none], ["INCONCLUSIVE"] * 8)] == [
        "INCONCLUSIVE"
    ] * 8
    assert claims.judge(eight, [strong] * 8, ["FAIL"] * 8)[0]["verdict"] == "FAIL"


def test_a_last_look_advises_no_more_replicates() -> None:
    eight = next(e for e in study.experiments() if e.name == "8 orderings").claims
    unsure = [sample([1.05, 1.15, 1.08, 1.02, 1.2])] * 8
    first = claims.judge(eight, unsure)
    assert all("replicates in all would settle it" in entry["reason"] for entry in first)
    for entry in claims.judge(eight, unsure, ["INCONCLUSIVE"] * 8):
        assert entry["verdict"] == "INCONCLUSIVE"
        assert entry["numbers"]["replicates_needed"] is None
        assert entry["reason"].endswith("this was the last look")
    for entry in claims.judge(eight, [sample([1.05, 1.15, 1.08, 1.02, 1.2], error=0.02)] * 8):  # of a simulation
        assert (entry["verdict"], entry["numbers"]["replicates_needed"]) == ("INCONCLUSIVE", None)
        assert entry["reason"].endswith("only a run on the real machine settles it")


def test_every_rule_is_studied_at_its_margin_on_both_sides() -> None:
    found = {(e.name, right, ratio) for e in study.experiments() for right, ratio in zip(e.right, e.ratios, strict=True)}
    for name in ("ordering", "bound", "equivalence"):
        assert {right for rule, right, _ in found if rule == name} == {"PASS", "FAIL", ""}


def test_the_noise_of_a_law_has_the_size_it_says() -> None:
    rng = np.random.default_rng(1)
    for law in ("normal", "heavy tails"):
        assert study.noise(law, 0.1, (400_000,), rng).std() == pytest.approx(0.1, rel=0.1)
    for law in study.LAWS:
        assert abs(study.noise(law, 0.05, (50_000, 4), rng).mean()) < 0.003
    mirrored = study.noise("drift, order mirrored", 0.0, (1000, MOST_REPLICATES), rng)
    assert np.allclose(mirrored[:, 0::2], -mirrored[:, 1::2])


@pytest.mark.usefixtures("small")
def test_the_rule_keeps_its_limits_and_a_laxer_one_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    table = study.cells(2000, 3)
    assert study.broken(table, 2000) == []
    assert study.required_power(table) >= study.POWER
    monkeypatch.setattr(claims, "LEVELS", (0.05, 0.05))
    assert any("wrong pass" in line and "looks 2" in line for line in study.broken(study.cells(2000, 3), 2000))
    monkeypatch.setattr(claims, "LEVELS", (0.0001, 0.0001))
    assert any(line.startswith("power") for line in study.broken(study.cells(200, 3), 200))


@pytest.mark.usefixtures("small")
def test_an_order_that_is_the_same_in_every_session_is_found_out() -> None:
    assert any("wrong pass" in line for line in study.broken(study.cells(300, 1, ("normal", "drift, order fixed")), 300))


@pytest.mark.usefixtures("small")
def test_the_command_renews_its_part_of_the_page_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "verdicts.md"
    page.write_text(f"before\n{study.BEGIN}old\n{study.END}after\n")
    assert study.main(["--experiments", "1000", "--docs", str(page)]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{study.BEGIN}")
    assert text.endswith(f"{study.END}after\n")
    assert "old" not in text
    assert "1,000 synthetic experiments" in text
    assert "every cell keeps its limit" in capsys.readouterr().out
    assert study.main(["--experiments", "1000", "--docs", str(page), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"broken": [], "docs": str(page), "experiments": 1000, "seed": 1}
    assert study.main(["--experiments", "1000", "--docs", str(page), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_the_page_in_docs_is_of_ten_thousand_experiments_per_cell() -> None:
    assert f"{study.EXPERIMENTS:,} synthetic experiments in each of" in study.DOCS.read_text()
