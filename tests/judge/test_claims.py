"""Absence is not made a verdict: over all statistics and gates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml
from fakes import serving_run, synthetic_run

from analysis.judge import claims as rules
from analysis.judge import gates
from analysis.judge.claims import Claim, Statistic, load_claims, observe, published_verdict
from analysis.judge.load import Run, TrialRecord
from analysis.judge.stats import Sample
from analysis.judge.verify import verify
from experiments.records.errors import SpecError
from experiments.run import main
from experiments.spec.spec import FIGURES


def without_a_time(trial: TrialRecord, phase: int) -> TrialRecord:
    """Its requests of a phase did not finish."""
    record = trial.record
    requests = record.requests.copy()
    requests.loc[requests["phase"] == phase, "last_step"] = -1
    tokens = record.tokens[~record.tokens["request"].isin(requests.loc[requests["phase"] == phase, "request"])]
    return dataclasses.replace(trial, record=dataclasses.replace(record, requests=requests, tokens=tokens))


def without_the_point(trial: TrialRecord, phase: int) -> TrialRecord:
    """A phase of it is no point."""
    roles = [{"role": "warm-up"} if number == phase else role for number, role in enumerate(trial.facts["phases"])]
    return dataclasses.replace(trial, facts={**trial.facts, "phases": roles})


def lacking(run: Run, claim: Claim, how: Callable[[TrialRecord, int], TrialRecord], everywhere: bool) -> Run:
    """A run without the points of the claim's chunk size (monotone: 1024): the longest or fastest in one pass of one seed, or
    all of them everywhere."""
    size, trials = claim.statistic.chunk_size or 1024, []
    changed = False
    for trial in run.trials:
        for phase, role in enumerate(trial.facts["phases"]):
            wanted = role["role"] == "point" and role["chunk_size"] == size and trial.facts["model"] == claim.model
            one = role.get("qps", 0) == claim.statistic.qps or role.get("prompt_length", 0) > 2048
            if wanted and (everywhere or (one and not changed and not trial.repeat)):
                trial, changed = how(trial, phase), True
        trials.append(trial)
    assert changed
    return dataclasses.replace(run, trials=tuple(trials))


STATISTICS = [
    Claim("M1", figure, model, "x", "x", "ordering", Statistic(*statistic), "x", rules.Scope())
    for figure, model, statistic in (
        ("fig9a", "yi-34b-200k", ("prefill_overhead", 512, 2048, "worst")),
        ("fig9a", "mistral-7b", ("prefill_overhead", 512, "unchunked", "geomean")),
        ("fig9a", "yi-34b-200k", ("prefill_monotone",)),
        ("fig9b", "mistral-7b", ("ttft_p50", 256, 1024, "geomean", 3.0)),
        ("fig9b", "yi-34b", ("tbt_p99", 2048, 512, "geomean", 0.55)),
    )
]
by_statistic = pytest.mark.parametrize("claim", STATISTICS, ids=lambda claim: f"{claim.statistic.name}-{claim.statistic.over}")


@pytest.fixture(scope="module")
def measured() -> dict[str, Run]:
    return {"fig9a": synthetic_run(lambda _tokens, budget: 1.0 + 40 / budget, replicates=3), "fig9b": serving_run(replicates=3)}


@by_statistic
@pytest.mark.parametrize("how", [without_a_time, without_the_point])
def test_a_missing_point_is_inconclusive_and_its_seed_named(
    measured: dict[str, Run], claim: Claim, how: Callable[[TrialRecord, int], TrialRecord]
) -> None:
    assert isinstance(observe(measured[claim.figure], claim), Sample)
    verdict, reason = observe(lacking(measured[claim.figure], claim, how, everywhere=False), claim)  # type: ignore[misc]
    assert verdict == "INCONCLUSIVE"
    assert reason == f"seeds without a time for some of {claim.statistic.words()}: {reason.split()[-1]}"
    assert reason.split()[-1] in {"42", "43", "44"}


@by_statistic
def test_a_point_that_no_replicate_has_was_not_run(measured: dict[str, Run], claim: Claim) -> None:
    run = measured[claim.figure]
    if claim.statistic.chunk_size:
        absent = observe(lacking(run, claim, without_the_point, everywhere=True), claim)
        assert absent == ("NOT-RUN", f"{claim.figure} as it was run has no {claim.statistic.words()}")
    other = dataclasses.replace(claim, model="gpt-2")
    assert observe(run, other) == ("NOT-RUN", "gpt-2 was not run on cpu")
    others = [dataclasses.replace(s.statistic) for s in STATISTICS if s.figure != claim.figure]  # of another kind of figure
    if claim.statistic.qps:
        others.append(dataclasses.replace(claim.statistic, qps=7.5))
    if claim.statistic.chunk_size:
        others.append(dataclasses.replace(claim.statistic, chunk_size=300))
        others.append(dataclasses.replace(claim.statistic, against=1 << 17))
    for statistic in others:
        odd = dataclasses.replace(claim, statistic=statistic)
        assert observe(run, odd)[0] == "NOT-RUN"  # type: ignore[index]
        assert published_verdict(odd)["verdict"] in ("not published", "contradicts", "agrees")


def test_a_figure_of_one_length_is_judged_where_it_has_points_and_says_where_not(tmp_path: Path) -> None:
    figure = yaml.safe_load((FIGURES / "fig9a.yaml").read_text())
    for panel in figure["panels"]:
        panel["prompt_lengths"] = [2048]
    (tmp_path / "fig9a.yaml").write_text(yaml.safe_dump(figure))
    runs = tmp_path / "runs"
    arguments = [str(tmp_path / "fig9a.yaml"), "--testbed", "a100-sim", "--replicates", "2", "--out", str(runs)]
    assert main(arguments) == 0
    found = {entry["id"]: entry for entry in verify(runs)["claims"]}
    assert {found[name]["verdict"] for name in ("C1", "C2", "C8")} == {"INCONCLUSIVE"}  # of the paper's figure
    assert (found["C3"]["verdict"], found["C4"]["verdict"]) == ("NOT-RUN", "NOT-RUN")
    assert found["C3"]["reason"] == "fig9a as it was run has no chunk size 512 and 2048 at prompts longer than both"


def test_nothing_published_is_no_equivalence(measured: dict[str, Run]) -> None:
    odd = dataclasses.replace(STATISTICS[1], rule="equivalence")  # of Mistral
    assert observe(measured["fig9a"], odd) == (
        "INCONCLUSIVE",
        "nothing is published of chunk size 512 and unchunked at prompts longer than both for mistral-7b",
    )


@pytest.mark.parametrize(
    "statistic",
    [
        "{name: tbt_p99, chunk_size: 1, against: 2}",
        "{name: prefill_overhead, chunk_size: 512}",
        "{name: prefill_monotone, qps: 1.0}",
    ],
)
def test_a_statistic_that_compares_nothing_is_refused(statistic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = yaml.safe_load((rules.REFERENCE / "claims.yaml").read_text())
    mine["claims"][0]["statistic"] = yaml.safe_load(statistic)
    (tmp_path / "claims.yaml").write_text(yaml.safe_dump(mine))
    monkeypatch.setattr(rules, "REFERENCE", tmp_path)
    with pytest.raises(SpecError, match=r"claims\.yaml: claims\.0\.statistic.*allowed: prefill_monotone alone"):
        load_claims()


def column(table: str, name: str) -> Callable[[TrialRecord], TrialRecord]:
    """The last value of a column is NaN."""

    def changed(trial: TrialRecord) -> TrialRecord:
        rows: pd.DataFrame = getattr(trial.record, table).copy()
        rows.loc[rows.index[-40:], name] = math.nan
        return dataclasses.replace(trial, record=dataclasses.replace(trial.record, **{table: rows}))

    return changed


def without_role(role: str) -> Callable[[TrialRecord], TrialRecord]:
    def changed(trial: TrialRecord) -> TrialRecord:
        roles = [{"role": "warm-up"} if own["role"] == role else own for own in trial.facts["phases"]]
        return dataclasses.replace(trial, facts={**trial.facts, "phases": roles})

    return changed


@pytest.mark.parametrize(
    ("gate", "edit"),
    [
        ("machine noise", without_role("probe")),
        ("first trial repeated", lambda trial: None if trial.repeat else trial),
        ("arrivals kept", column("requests", "injected_s")),
        ("clock monotonic", column("steps", "seconds")),
        ("clock monotonic", column("steps", "start_s")),
        ("clock monotonic", column("tokens", "time_s")),
    ],
)
def test_what_a_gate_looks_for_and_one_session_lacks_breaks_it(
    measured: dict[str, Run], gate: str, edit: Callable[[TrialRecord], TrialRecord | None]
) -> None:
    run = measured["fig9b"]
    session = run.trials[0].facts["session"]
    trials = (edit(trial) if trial.facts["session"] == session else trial for trial in run.trials)
    changed = dataclasses.replace(run, trials=tuple(trial for trial in trials if trial))
    assert gate in [found.gate for found in gates.check(changed) if not found.ok]
