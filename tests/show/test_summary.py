"""The tables on the terminal: trials that a time limit cut short are marked, told, and in no median."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pandas as pd
import pytest
from fakes import serving_run, synthetic_run

from analysis.judge.load import Run, TrialRecord
from analysis.show import summary

POINT = {"model": "yi-34b", "qps": 1.0, "chunk_size": "512"}


def cut(run: Run, count: int, share: float = 0.5) -> Run:
    """The first trials of POINT in as many seeds, with only the first requests served."""
    changed, left = list[TrialRecord](), count
    for trial in run.trials:
        is_point = trial.facts["model"] == "yi-34b" and trial.facts["trial"] == "qps1-chunk512"
        if is_point and left:
            left -= 1
            requests = trial.record.requests.copy()
            served = requests["request"] < share * len(requests)
            requests.loc[~served, ["last_step", "generated_tokens"]] = (-1, 0)
            tokens = trial.record.tokens[trial.record.tokens["request"].isin(requests.loc[served, "request"])]
            record = dataclasses.replace(trial.record, requests=requests, tokens=tokens, truncated=True)
            trial = dataclasses.replace(trial, record=record)
        changed.append(trial)
    return dataclasses.replace(run, trials=tuple(changed))


@pytest.fixture(scope="module")
def whole() -> Run:
    return serving_run(replicates=3)


def row(table: pd.DataFrame) -> pd.Series:
    (found,) = [each for _, each in table.iterrows() if all(each[key] == value for key, value in POINT.items())]
    return pd.Series(found)


def test_a_trial_that_was_cut_short_is_in_no_median(whole: Run) -> None:
    run = cut(whole, 1)
    without = dataclasses.replace(run, trials=tuple(trial for trial in run.trials if not trial.record.truncated))
    got, wanted = row(summary.serving_table(run)), row(summary.serving_table(without))
    assert got["truncated"] == 1
    assert (got["replicates"], wanted["replicates"]) == (2, 2)
    for name in ("ttft_p50", "ttft_p50_min", "ttft_p50_mean", "tbt_p99_max", "scheduling_delay_p50", "utilisation", "requests"):
        assert got[name] == wanted[name]
    table = summary.serving_table(run)
    assert table.loc[table["truncated"] == 0, "ttft_p50"].notna().all()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_it_is_marked_in_the_table_and_told_below(
    count: int, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = cut(whole, count)
    monkeypatch.setattr(summary, "load_run", lambda _: run)
    (tmp_path / "fig9b-cpu" / "bag-1").mkdir(parents=True)
    assert summary.main(["fig9b", "--testbed", "cpu", "--runs", str(tmp_path), "--report", str(tmp_path / "report")]) == 0
    printed = capsys.readouterr().out
    marked = [line for line in printed.splitlines() if "512*" in line]
    assert max(map(len, printed.splitlines()[:-1])) <= 80  # the last names a file
    said = " ".join(printed.split())
    assert said.count("fig9b on testbed cpu") == said.count("P50 TTFT") == 1  # one heading for both models
    assert len(marked) == bool(count)
    assert said.count("* cut short by its time limit: yi-34b-seed") == count
    assert said.count(" requests served; in no median of Figure 9b") == count
    if count == 3:
        assert marked[0].split()[2:] == ["512*", "-", "-", "-", "-"]
    table = pd.read_csv(tmp_path / "report" / "fig9b-cpu.csv")
    assert table["truncated"].sum() == count
    assert table["rate"].notna().all()


def test_a_pass_of_9a_that_was_cut_short_is_told() -> None:
    run = synthetic_run(lambda _tokens, _budget: 1.0, replicates=1)
    first, *others = run.trials
    requests = first.record.requests.copy()
    requests.loc[requests["phase"] > 8, "last_step"] = -1
    record = dataclasses.replace(first.record, requests=requests, truncated=True)
    run = dataclasses.replace(run, trials=(dataclasses.replace(first, record=record), *others))
    name = f"{first.facts['session']} {first.facts['trial']}"
    assert summary.cut_short(run) == [f"cut short by its time limit: {name}, 5 of 16 requests served"]
