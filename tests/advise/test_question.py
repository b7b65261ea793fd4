"""What is asked: targets and loads from make's variables; what requests saw, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from fakes import tiny_record
from hypothesis import given
from hypothesis import strategies as st

from analysis.advise.capacity import TARGETS, Latency
from analysis.advise.question import Question, asked
from experiments.records.errors import SpecError
from experiments.records.metrics import Served, of_phase, served, served_of

GAPS = np.rec.fromarrays([[0.1, 0.2, 0.4], [2, 1, 1]], names="seconds,count")  # of 0.1, 0.1, 0.2, 0.4 s
FIVE = served([10, 20, 30, 40, 50], [1, 2, 3, 11, 5], [1, 2, 3, 4, 5], [0.1] * 5, [1, 2.5, 4, 5, 9], GAPS)


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("ttft_p50", 3.0),
        ("ttft_p90", 4.6),  # linear between the fourth and the fifth
        ("ttft_p95", 4.8),
        ("ttft_p99", 4.96),
        ("tbt_p50", 0.15),
        ("tbt_p90", 0.34),
        ("tbt_p95", 0.37),
        ("tbt_p99", 0.394),
        ("tpot_p50", 0.5),  # of 0.5, 0.5, 0.1 and 1: one token has no time between tokens
        ("tpot_p99", 0.985),
        ("e2e_p50", 4.0),
        ("e2e_p99", 8.84),
    ],
)
def test_percentiles_by_hand(name: str, seconds: float) -> None:
    assert Question(Latency({name: 1.0})).latency(FIVE)[name] == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("share", "targets", "times"),
    [
        (0.6, {"ttft_p99": 3.0}, 1.0),  # three of five keep it
        (0.61, {"ttft_p99": 3.0}, 4 / 3),
        (0.6, {"ttft_p99": 4.0, "tpot_p99": 0.5}, 1.0),  # the fifth keeps neither, the third both
        (0.8, {"ttft_p99": 4.0, "tpot_p99": 0.5}, 1.0),
        (0.8, {"ttft_p50": 4.0, "tpot_p50": 0.4}, 1.25),  # the percentile has no say
        (1.0, {"e2e_p50": 4.5}, 2.0),
    ],
)
def test_goodput_by_hand(share: float, targets: dict[str, float], times: float) -> None:
    """What the worst of that share saw, over its targets: at most 1 where so many keep all of theirs."""
    question = Question(Latency(targets), goodput=share)
    assert question.latency(FIVE)["goodput"] == pytest.approx(times)
    assert (question.latency(FIVE).within(Latency(goodput=1.0))[0] <= 0) == (times <= 1)


@given(share=st.floats(0.01, 1.0), ttft=st.floats(0.5, 6.0), e2e=st.floats(0.5, 10.0))
def test_goodput_is_the_share_that_keeps_all_targets(share: float, ttft: float, e2e: float) -> None:
    kept = np.mean((FIVE.requests["ttft"] <= ttft) & (FIVE.requests["e2e"] <= e2e))
    question = Question(Latency(ttft_p99=ttft, e2e_p99=e2e), goodput=share)
    assert (question.latency(FIVE)["goodput"] <= 1) == (kept >= share - 1e-12)


def test_what_a_record_tells() -> None:
    """Of three requests: 3 tokens at 2, 2.25 and 3 s, 2 tokens at 2 and 2.25, one at 5.5; they came at 1, 1.2 and 5."""
    seen = served_of(of_phase(tiny_record(), 1))
    assert seen.requests["ttft"] == pytest.approx([1.0, 0.8, 0.5])
    assert seen.requests["e2e"] == pytest.approx([2.0, 1.05, 0.5])
    assert seen.requests["tpot"] == pytest.approx([0.5, 0.25, math.nan], nan_ok=True)
    assert seen.requests["delay"] == pytest.approx([0.0, 0.3, 0.0])
    assert sorted(seen.gaps["seconds"]) == pytest.approx([0.25, 0.25, 0.75])


def test_nothing_was_served() -> None:
    none = Served({name: values[:0] for name, values in FIVE.requests.items()}, GAPS[:0])
    for question in (Question(), Question(Latency(e2e_p50=1.0)), Question(Latency(ttft_p99=1.0), goodput=0.9)):
        assert question.latency(none).within(question.limits)[0] == math.inf


@pytest.mark.parametrize(
    ("words", "targets"),
    [
        (["TBT_P99=0.3"], {"tbt_p99": 0.3}),
        (["TBT_P99=300ms", "TTFT_P50=12s"], {"ttft_p50": 12.0, "tbt_p99": 0.3}),
        (["E2E_P95=0.5 s", "TPOT_P90= 1e-2"], {"tpot_p90": 0.01, "e2e_p95": 0.5}),
        (["E2E_P50=20"], {"e2e_p50": 20.0}),
        (["TBT_P99=", "QPS="], {}),
    ],
)
def test_targets(words: list[str], targets: dict[str, float]) -> None:
    assert asked(words).targets == pytest.approx(targets)


def test_every_target_can_be_asked_for() -> None:
    for name in TARGETS:
        question = asked([f"{name.upper()}=250ms"])
        assert question.limits == {name: 0.25, "delay_p50": 2.0}
        assert f"{TARGETS[name]} 0.25 s" in str(question)


@pytest.mark.parametrize(
    ("words", "goal"),
    [
        (["TBT_P99=1"], "rate"),
        ([], "rate"),
        (["QPS=2"], "e2e_p50"),
        (["QPS=2", "TPOT_P50=1"], "ttft_p50"),
        (["QPS=2", "TTFT_P95=1"], "tbt_p99"),
        (["QPS=2", "TTFT_P95=1", "TBT_P50=1"], "e2e_p50"),
        (["CONCURRENCY=2", "TPOT_P50=1"], "ttft_p50"),
        (["ARRIVALS=closed:3"], "e2e_p50"),
    ],
)
def test_what_is_made_best(words: list[str], goal: str) -> None:
    assert asked(words).goal == goal


def test_goodput_in_words() -> None:
    asks = str(asked(["GOODPUT=0.95", "TTFT_P99=500ms", "TPOT_P99=0.05"]))
    assert asks == "0.95 of the requests with TTFT 0.5 s, TPOT 0.05 s; median scheduling delay 2 s"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["TTFT_P50=300"], "TTFT_P50: got 300, which is in seconds: were milliseconds meant? allowed: 300ms, or 300s"),
        (["TTFT_P50=0"], "TTFT_P50: got '0'; allowed: seconds, or milliseconds as 300ms: a number above 0"),
        (["TTFT_P50=ms"], "TTFT_P50: got 'ms'; allowed"),
        (["TBT_P99=100us"], "TBT_P99: got '100us'; allowed"),
        (["E2E_P50=2000"], "E2E_P50: got 2000, which is in seconds: were milliseconds meant?"),
        (["TTFT_P50=3 min"], "TTFT_P50: got '3 min'; allowed"),
        (["TTFT_P50=nan"], "TTFT_P50: got 'nan'; allowed"),
        (["GOODPUT=95", "TTFT_P50=1"], "GOODPUT: got '95'; allowed: a share of the requests, such as 0.95: a number above 0"),
        (["GOODPUT=0.95"], "GOODPUT: got no target with it; allowed: one target each of TTFT, TPOT, E2E"),
        (["GOODPUT=0.95", "TBT_P99=1"], "GOODPUT: got TBT_P99 with it"),
        (["GOODPUT=0.95", "TTFT_P99=1", "TTFT_P50=1"], "GOODPUT: got TTFT_P50, TTFT_P99 with it"),
        (["QPS=-1"], "QPS: got '-1'; allowed: a number above 0"),
        (["QPS=1e-9"], "QPS: got '1e-9'; allowed: a number above 0.001"),  # clocks are too coarse for times so far apart
        (["QPS=1", "QPS=2"], "'QPS=2': got it twice"),
        (["QPS=1", "CONCURRENCY=2"], "QPS: got 1 and 2 users; allowed: one of them"),
        (["CONCURRENCY=2", "ARRIVALS=poisson"], "CONCURRENCY: got 2 and ARRIVALS=poisson; allowed: one of them"),
        (["CONCURRENCY=1.5"], "CONCURRENCY: got '1.5'; allowed: a whole number of users from 1 to 5,000"),
        (["CONCURRENCY=0"], "CONCURRENCY: got '0'; allowed: a whole number of users from 1 to 5,000"),
        (["ARRIVALS=closed"], "ARRIVALS: got 'closed'; allowed: closed:N, a whole number of users from 1 to 5,000"),
        (["ARRIVALS=gamma"], "ARRIVALS: got 'gamma'; allowed: the CV of the gaps, as gamma:2: a number above 0, at most 100"),
        (["ARRIVALS=gamma:-1"], "ARRIVALS: got 'gamma:-1'; allowed: the CV of the gaps, as gamma:2"),
        (["ARRIVALS=uniform"], "ARRIVALS: got 'uniform'; allowed: poisson, trace, gamma:CV, closed:N"),
        (["ARRIVALS=trace:2"], "ARRIVALS: got 'trace:2'; allowed: poisson, trace"),
        (["HIT=40"], "HIT: got '40'; allowed: a share of the prompt tokens, such as 0.4: a number above 0, at most 0.99"),
        (["TTFT_P98=1"], "'TTFT_P98=1': got that; allowed: NAME=value, TTFT_P50, "),
        (["fast"], "'fast': got that; allowed: NAME=value"),
    ],
)
def test_one_line_for_what_is_no_question(words: list[str], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        asked(words)
    assert str(caught.value).startswith(said)
