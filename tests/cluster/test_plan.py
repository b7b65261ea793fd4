"""Plans of Figure 9b: what sets its rates, and whether a user's trace has enough requests, both before anything is loaded."""

from __future__ import annotations

import contextlib
import csv
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import FakeServingEngine, chunked

from experiments.cluster import cluster
from experiments.cluster.plan import Plan, local_node
from experiments.engine.session import run_session
from experiments.run import main
from experiments.spec.expand import SATURATION, LoadPoint, Session
from experiments.spec.traces import Trace
from experiments.spec.workload import synthetic_trace

FIG9B = ["fig9b", "--testbed", "cpu", "--replicates", "1", "--out"]


class Driver:
    """Sessions in this process, on an engine that costs what a script says; `cut`: saturation trials that a time limit ends."""

    def __init__(self) -> None:
        self.cut: set[str] = set()
        self.ran: list[str] = []

    def run_sessions(
        self, _ray: object, sessions: Sequence[Session], owed: Mapping[str, Sequence[str]], trace: Trace, store: Any, *_: object
    ) -> dict[str, str]:
        for session in (session for session in sessions if session.name in owed):
            self.ran.append(session.name)
            for found in run_session(session, owed[session.name], lambda settings: FakeServingEngine(settings, chunked), trace):
                cut = session.name in self.cut
                facts = {**found.facts, "truncated": cut, "node": "node-1"}
                store(replace(found, facts=facts, record=replace(found.record, truncated=cut)))
        return {}


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    @contextlib.contextmanager
    def ray_cluster() -> Iterator[None]:
        yield None

    made = Driver()
    monkeypatch.setattr(cluster, "ray_cluster", ray_cluster)
    monkeypatch.setattr(cluster, "Fleet", lambda _ray: SimpleNamespace(nodes=[local_node()]))
    monkeypatch.setattr(cluster, "run_sessions", made.run_sessions)
    return made


def written(path: Path, requests: int) -> str:
    """A user's trace of so many requests."""
    drawn = synthetic_trace(requests)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["num_prefill_tokens", "num_decode_tokens"])
        rows.writerows(zip(drawn.prompt.tolist(), drawn.output.tolist(), strict=True))
    return str(path)


def test_a_saturation_trial_that_is_cut_short_sets_no_rate(
    driver: Driver, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    driver.cut = {f"yi-34b-{SATURATION}"}
    assert main([*FIG9B, str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "missing: yi-34b-saturation: cut short by its time limit of 120 s, so it sets no rate" in said
    assert [path.parent.name for path in tmp_path.glob("*/open-*/trials/*/*")] == ["mistral-7b-saturation"]
    assert driver.ran == ["mistral-7b-saturation", "yi-34b-saturation"]  # no session at a rate that nobody measured
    driver.cut.clear()
    assert main([*FIG9B, str(tmp_path)]) == 0
    plan = Plan("fig9b", "cpu", 1, tmp_path)
    rates = {point.rate for session in plan.sessions for trial in session.trials for point in trial.points}  # type: ignore[union-attr]
    assert len(rates) == 4
    assert min(rates) > 1.0


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("damage", ["changed", "gone", "cut"])
def test_rates_do_not_come_from_a_damaged_saturation_trial(
    damage: str, sealed: bool, driver: Driver, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*FIG9B, str(tmp_path)]) == 0
    (bag,) = tmp_path.glob("*/bag-*")
    place = bag / "data"
    if not sealed:
        place = bag.parent / bag.name.replace("bag", "open").removesuffix("-1")
        shutil.move(bag / "data", place)
        shutil.rmtree(bag)
    trial = place / "trials" / f"mistral-7b-{SATURATION}" / SATURATION
    if damage == "changed":
        with (trial / "tokens.parquet").open("ab") as file:
            file.write(b"x")
    elif damage == "gone":
        shutil.rmtree(trial)
    else:
        plan, (facts, record) = Plan("fig9b", "cpu", 1, tmp_path), cluster_read(trial)
        shutil.rmtree(trial)
        written_to = plan.run.write_trial(f"mistral-7b-{SATURATION}", SATURATION, facts | {"truncated": True}, record)
        if sealed:
            shutil.move(written_to, trial)
    capsys.readouterr()
    ran = len(driver.ran)
    for more in ([], ["--plan"], ["--replicates", "2"]):
        assert main([*FIG9B, str(tmp_path), *more]) == 2
        error = capsys.readouterr().err
        came = "cut short by its time limit" if damage == "cut" else "damaged or gone"
        assert f"fig9b-cpu: mistral-7b-saturation/saturation: {came}, and 7 finished trials rest on its rates; get it" in error
        assert error.count("\n") == 1
    assert len(driver.ran) == ran


def cluster_read(trial: Path) -> tuple[dict[str, Any], Any]:
    from experiments.records.store import read_trial

    return read_trial(trial)


def test_a_damaged_saturation_trial_on_which_nothing_rests_is_measured_again(driver: Driver, tmp_path: Path) -> None:
    driver.cut = {f"yi-34b-{SATURATION}"}
    assert main([*FIG9B, str(tmp_path)]) == 1
    (tokens,) = tmp_path.glob("*/open-*/trials/*/*/tokens.parquet")
    with tokens.open("ab") as file:
        file.write(b"x")
    driver.cut.clear()
    assert main([*FIG9B, str(tmp_path)]) == 0
    assert driver.ran.count("mistral-7b-saturation") == 2


@pytest.mark.parametrize(
    ("testbed", "requests", "allowed"),
    [("a100-sim", 1023, "1,024"), ("a100", 1023, "1,024"), ("gpu-80g", 767, "768"), ("cpu", 95, "96"), ("cpu", 1, "96")],
)
@pytest.mark.parametrize("more", [[], ["--plan"]])
def test_a_trace_with_too_few_requests_is_refused_when_it_is_read(
    testbed: str, requests: int, allowed: str, more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = written(tmp_path / "mine.csv", requests)
    assert main(["fig9b", "--testbed", testbed, "--trace", trace, "--out", str(tmp_path / "out"), *more]) == 2
    came = f"got {requests} request{'s'[: requests != 1]}; allowed: at least {allowed}, as a trial of fig9b"
    error = capsys.readouterr().err
    assert error == f"error: TRACE: mine.csv: {came} on testbed {testbed} serves so many\n"
    assert not (tmp_path / "out").exists()


def test_no_trial_asks_for_more_than_a_short_trace_has(
    driver: Driver, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """However fast the machine turns out to be: the rate, and so the number of requests, is known after saturation only."""
    trace = written(tmp_path / "mine.csv", 96)
    assert main([*FIG9B, str(tmp_path / "out"), "--trace", trace]) == 0
    assert "trace     mine.csv (file, 96 requests, at most 96 a trial)" in capsys.readouterr().out
    plan = Plan("fig9b", "cpu", 1, tmp_path / "out", trace)
    points = [point for session in plan.sessions for trial in session.trials for point in trial.points]
    served = [point.requests for point in points if isinstance(point, LoadPoint)]
    assert max(served) == 96
    assert max(point.rate for point in points if isinstance(point, LoadPoint)) * 7 > 96  # it would have been more


def test_what_is_cut_to_the_models_length_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = Path("experiments/spec/figures/fig9b.yaml").read_text()
    (tmp_path / "short.yaml").write_text(figure.replace("max_model_len: 8192", "max_model_len: 4096"))
    assert main([str(tmp_path / "short.yaml"), "--testbed", "a100-sim", "--plan", "--out", str(tmp_path)]) == 0
    whole = synthetic_trace()
    cut = int((whole.prompt + whole.output > 4096).sum())
    told = f"synthetic-sharegpt (synthetic, 30,731 requests, {cut:,} of them cut to 4,096 tokens, at most 1,024 a trial)"
    assert told in " ".join(capsys.readouterr().out.split())
    mine = written(tmp_path / "mine.csv", 2000)
    assert main([str(tmp_path / "short.yaml"), "--testbed", "a100-sim", "--plan", "--trace", mine, "--out", str(tmp_path)]) == 0
    drawn = synthetic_trace(2000)
    long = int((drawn.prompt + drawn.output > 4096).sum())
    told = f"mine.csv (file, {2000 - long:,} requests, at most 1,024 a trial; left out: {long} ({long / 20:.3g} %) of more"
    assert told in " ".join(capsys.readouterr().out.split())
