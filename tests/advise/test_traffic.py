"""Arrivals, closed loops, cached prefixes, and trials that cannot tell."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from analysis.advise import advice, case, recommend
from analysis.advise.advice import Option, interval, steady
from analysis.advise.capacity import Latency, Setting
from analysis.advise.case import Case, evidence, under
from analysis.advise.question import Question
from analysis.advise.recommend import case_of
from analysis.advise.tell import serve_arguments, ttft_by_prompt
from experiments.spec.expand import Traffic
from experiments.spec.spec import load_testbed
from experiments.spec.traces import Trace
from experiments.spec.workload import synthetic_trace

WITHIN = Question(Latency(tbt_p99=0.1))
KNOWN = synthetic_trace()


@pytest.fixture(autouse=True)
def _short_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case, "LEAST", 256)
    monkeypatch.setattr(advice, "MOST_REQUESTS", 4096)


def first(count: int, arrivals: np.ndarray | None = None) -> Trace:
    """As a user's file."""
    return dataclasses.replace(
        KNOWN, name="mine.csv", prompt=KNOWN.prompt[:count], output=KNOWN.output[:count], kind="file", arrivals=arrivals
    )


def asked(trace: Trace, question: Question) -> Case:
    return under(case_of(load_testbed("a100-sim"), "mistral-7b", trace), question)


def capacity(made: Case) -> tuple[float, float, float]:
    """Of one setting, in trials as long as a user's: mean and interval."""
    made = made.lasting(1024)
    search = made.search(WITHIN)
    rates = [search.capacity(Setting(768, 128), WITHIN.limits, seed, 3.0).rate for seed in made.seeds]
    return interval(rates, 1.0, 1.0, made.sampled)


def test_the_interval_of_a_few_requests_holds_the_answer_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As make recommend tells it, but for the search: 768 is the best of all four."""
    monkeypatch.setattr(case, "LEAST", 1024)
    monkeypatch.setattr(advice, "MOST_REQUESTS", 8192)
    monkeypatch.setattr(Case, "settings_to_try", lambda _: [Setting(768, 128)])
    monkeypatch.setattr(Case, "beside", lambda *_: set())
    whole, *few = (steady(asked(trace, WITHIN), WITHIN)[2] for trace in (KNOWN, first(36), first(100), first(200)))
    for found in few:
        assert found.low <= whole.value <= found.high < 4 * found.low


def test_bursts_that_were_recorded_cost_capacity() -> None:
    """Gaps with a CV near 13, as of a public trace of coding requests, against Poisson arrivals of the same requests: bursts of
    some 170 at five times the mean rate, and pauses."""
    rng = np.random.default_rng(5)
    gaps = rng.exponential(np.where(rng.random(4000) < 0.006, 130.0, 0.2))
    trace = first(4000, np.cumsum(gaps) - gaps[0])
    assert 10 < np.diff(trace.arrivals).std() / np.diff(trace.arrivals).mean() < 17
    recorded, poisson = (asked(trace, dataclasses.replace(WITHIN, traffic=traffic)) for traffic in (None, Traffic()))
    assert "arrivals as recorded (CV of the gaps" in evidence(recorded)
    assert "Poisson arrivals" in evidence(poisson)
    assert capacity(recorded)[0] < 0.6 * capacity(poisson)[0]


def test_a_closed_loop_serves_its_users_and_no_more() -> None:
    question = Question(Latency(tpot_p99=0.05), traffic=Traffic("closed", 16.0))
    made, _, found = steady(asked(KNOWN, question), question)
    seen = made.served(found.best.setting, 1.0, 42)
    assert found.best.rate * seen.requests["e2e"].mean() == pytest.approx(16, rel=0.1)
    assert found.best.latency["tpot_p99"] <= 0.05
    assert (question.goal, question.load) == ("ttft_p50", "with 16 users")
    assert found.value == pytest.approx(found.best.latency["ttft_p50"])  # both means over seeds
    few = made.served(Setting(512, 8), 1.0, 42)  # the other eight wait for a place
    assert few.percentile("delay_p50") > seen.percentile("delay_p50")


def test_a_prefix_cache_raises_capacity_by_no_more_than_it_saves() -> None:
    question = Question(Latency(tbt_p99=0.1), hit=0.5)
    rates = []
    for each in (WITHIN, question):
        made = asked(KNOWN, each)
        rates.append(made.search(each).capacity(Setting(512, 128), each.limits, 42).rate)
    assert 1.05 * rates[0] < rates[1] < 2 * rates[0]
    assert "HIT=0.5: so much of every prompt is found in the prefix cache" in evidence(made)
    assert "--enable-prefix-caching" in serve_arguments(made, Setting(512, 128))


def test_ttft_by_length_of_prompt() -> None:
    """Some short prompts come behind a long one: it shows in their class, not in the median of all."""
    rng = np.random.default_rng(1)
    prompt = np.where(rng.random(400) < 0.05, 8000, 200)
    trace = Trace("mixed.csv", "", prompt, np.full(400, 50), "file")
    classes = ttft_by_prompt(asked(trace, WITHIN), Option(Setting(512, 128), 2.0, "nothing", Latency()))
    assert [row["to"] for row in classes] == [256, 16384]
    assert sum(row["share"] for row in classes) == pytest.approx(1.0)
    assert classes[1]["p50"] > classes[0]["p50"]
    assert classes[0]["p99"] > 2 * classes[0]["p50"]


def run(tmp_path: Path, rows: list[tuple[int, int]], *words: str) -> int:
    path = tmp_path / "mine.csv"
    path.write_text("num_prefill_tokens,num_decode_tokens\n" + "".join(f"{prompt},{output}\n" for prompt, output in rows))
    where = ["--trace", str(path), "--report", str(tmp_path / "report"), "--out", str(tmp_path)]
    return recommend.main(["--testbed", "a100-sim", "--model", "mistral-7b", *where, *words])


@pytest.mark.parametrize(
    ("rows", "words", "said"),
    [
        ([(1, 2)] * 20, ["TBT_P99=1"], "at least 955 requests/s, the highest load looked at; this trial cannot tell"),
        ([(10, 5)] * 15 + [(8000, 150)], ["TBT_P99=1"], "this trial cannot tell"),
        ([(100, 1)] * 20, ["TBT_P99=1"], "allowed: some with two there"),
        ([(100, 1)] * 20, ["TPOT_P50=1"], "allowed: some with two there"),
        ([(100, 1)] * 20, ["TTFT_P50=1", "QPS=1"], "allowed: some with two there"),
        ([(100, 10)] * 20, ["ARRIVALS=trace"], "TRACE: mine.csv: got no arrival times"),
    ],
)
def test_what_cannot_be_told_has_status_2(
    rows: list[tuple[int, int]], words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, rows, *words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("words", "headline", "pictures"),
    [
        (["CONCURRENCY=4"], r"P50 E2E [\d.]+ s \(95 % interval .*\) with no target with 4 users", 0),
        (["ARRIVALS=gamma:2", "TTFT_P99=2"], r"requests/s \(95 % interval .*\) with P99 TTFT 2 s, median scheduling delay", 2),
        (
            ["GOODPUT=0.9", "TTFT_P99=1", "TPOT_P99=50ms"],
            r"with 0.9 of the requests with TTFT 1 s, TPOT 0.05 s; .*; goodput",
            2,
        ),
        ([], r"with median scheduling delay 2 s; median scheduling delay forbids more", 2),
    ],
)
def test_questions_from_the_command_line(
    words: list[str], headline: str, pictures: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A picture of another question that lies there is drawn anew, or goes."""
    rows = list(zip(KNOWN.prompt[:400].tolist(), KNOWN.output[:400].tolist(), strict=True))
    (report := tmp_path / "report").mkdir()
    for suffix in ("png", "svg"):
        (report / f"recommend-a100-sim-mistral-7b.{suffix}").touch()
    assert run(tmp_path, rows, *words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(headline, said), said
    answer = json.loads((report / "recommend-a100-sim-mistral-7b.json").read_text())
    assert answer["traffic"]["again"] is True
    assert len([*report.glob("*.[ps][nv]g")]) == pictures


def test_requests_of_one_token_have_a_time_to_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advice, "MOST_REQUESTS", 8192)
    assert run(tmp_path, [(100 + n, 1) for n in range(40)], "TTFT_P99=0.5") == 0
    assert "with P99 TTFT 0.5 s" in " ".join(capsys.readouterr().out.split())
