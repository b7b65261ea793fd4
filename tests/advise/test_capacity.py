"""The search for capacities: against a machine whose capacity is known in closed form, and against the simulator's own laws."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from analysis.advise.advice import TIE, advise, interval, option
from analysis.advise.capacity import GRID, HIGHEST, LOWEST, Latency, Search, Setting, curve
from analysis.advise.case import Case, around
from analysis.advise.question import Question
from analysis.advise.recommend import case_of
from experiments.records.errors import SpecError
from experiments.records.metrics import served_of, serving_metrics
from experiments.records.record import Phase, Record
from experiments.simulator.simulator import simulated_engine
from experiments.spec.expand import expand
from experiments.spec.spec import load_figure, load_testbed
from experiments.spec.workload import serving_requests, synthetic_trace

SETTING = Setting(512, 128)
WITHIN = Question(Latency(tbt_p99=0.1))


def power_law(setting: Setting, rate: float, seed: int) -> Latency:
    """P99 TBT of rate x chunk size / 10,000 seconds, TTFT of the square root of the rate."""
    return Latency(tbt_p99=rate * setting.budget / 1e4, ttft_p50=math.sqrt(rate), delay_p50=0.001)


@given(tbt=st.floats(1e-3, 1e2), ttft=st.floats(1e-2, 1e2), near=st.floats(1e-2, 1e2), budget=st.sampled_from([64, 512, 8192]))
def test_capacity_of_a_power_law(tbt: float, ttft: float, near: float, budget: int) -> None:
    """Between two rates of the grid the log ratio is interpolated, which is exact for power laws of one latency."""
    known = min(tbt * 1e4 / budget, ttft**2)
    assume(2.0 ** (LOWEST / GRID) < known < 2.0 ** (HIGHEST / GRID - 1))
    found = Search(power_law).capacity(Setting(budget, 8), Latency(tbt_p99=tbt, ttft_p50=ttft), 0, near)
    assert found.rate == pytest.approx(known, rel=0.02)
    ratio = tbt * 1e4 / budget / ttft**2
    assert found.bound_by == ("tbt_p99" if ratio < 1 else "ttft_p50") or abs(ratio - 1) < 0.1


def test_where_no_load_is_carried() -> None:
    """Not by the setting the search begins at, nor on any seed: 0 is an answer."""
    limits = Latency(tbt_p99=0.1)
    assert Search(power_law).capacity(SETTING, limits, 0, near=0.0) == Search(power_law).capacity(SETTING, limits, 0)
    assert interval([0.0, 0.0], 0.9, 1.1) == (0.0, 0.0, 0.0)


@given(tbt=st.floats(1e-2, 10), asked=st.lists(st.floats(1e-2, 10), min_size=1, max_size=4))
def test_rates_between_those_of_the_grid_are_read_as_what_they_are(tbt: float, asked: list[float]) -> None:
    """Whether a rate is kept was asked before, at any rate, also quite near the capacity."""
    search, known = Search(power_law), tbt * 1e4 / 512
    for share in asked:
        search.keeps(SETTING, share * known, Latency(tbt_p99=tbt), 0)
        search.keeps(SETTING, known * (1 + share / 100), Latency(tbt_p99=tbt), 0)
    assert search.capacity(SETTING, Latency(tbt_p99=tbt), 0).rate == pytest.approx(known, rel=1e-6)


@given(limits=st.lists(st.floats(1e-2, 10), min_size=1, max_size=6), near=st.floats(0.1, 10))
def test_what_was_seen_is_used_again_and_changes_nothing(limits: list[float], near: float) -> None:
    served: list[tuple[Setting, float, int]] = []

    def serve(setting: Setting, rate: float, seed: int) -> Latency:
        served.append((setting, rate, seed))
        return power_law(setting, rate, seed)

    search = Search(serve)
    together = [search.capacity(SETTING, Latency(tbt_p99=limit), 0, near) for limit in limits]
    assert together == [Search(power_law).capacity(SETTING, Latency(tbt_p99=limit), 0, 1.0) for limit in limits]
    assert len(served) == len(set(served))


def test_nothing_and_everything_is_kept() -> None:
    def stubborn(setting: Setting, rate: float, seed: int) -> Latency:
        return Latency(tbt_p99=0.5, ttft_p50=0.5, delay_p50=0.0)

    assert Search(stubborn).capacity(SETTING, Latency(tbt_p99=0.4), 0).rate == 0.0
    everything = Search(stubborn).capacity(SETTING, Latency(tbt_p99=0.6), 0)
    assert everything.bound_by == "nothing"


def test_curve_of_a_power_law() -> None:
    targets = [0.06, 0.1, 0.3]
    found = curve(Search(power_law), SETTING, Latency(ttft_p50=math.sqrt(5.0)), 0, targets, near=1.0)
    assert found == pytest.approx([min(5.0, target * 1e4 / 512) for target in targets], rel=0.03)


def small_case(model: str = "mistral-7b", requests: int = 48) -> Case:
    return dataclasses.replace(case_of(load_testbed("a100-sim"), model, synthetic_trace()), requests=requests)


def record_of(model: str, rate: float, budget: int) -> Record:
    session = next(s for s in expand(load_figure("fig9b"), load_testbed("a100-sim"), 1) if s.model == model)
    requests = serving_requests(synthetic_trace(), rate, 48, 42, 8192)
    return simulated_engine(session.engine, 42).run([Phase(budget, requests)], 1e9)


def test_latency_is_that_of_the_metrics() -> None:
    record = record_of("yi-34b", 1.0, 512)
    known, found = serving_metrics(record), Question().latency(served_of(record))
    assert found["tbt_p99"] == pytest.approx(known["tbt_p99"], rel=1e-12)
    assert found["ttft_p50"] == pytest.approx(known["ttft_p50"], rel=1e-12)
    assert found["delay_p50"] == pytest.approx(known["scheduling_delay_p50"], rel=1e-12)
    cut = Record(record.requests, record.steps, record.tokens, truncated=True)
    assert Question().latency(served_of(cut)).within(Latency(tbt_p99=1e9))[0] == math.inf


def test_a_slower_machine_is_a_faster_clock() -> None:
    """The law that model_error rests on: steps f times as long at a rate = f times the latencies at f times the rate."""
    case, f = small_case(), 1.1
    slower = dataclasses.replace(
        case.calibration,
        overhead_s=f * case.calibration.overhead_s,
        linear=dataclasses.replace(case.calibration.linear, seconds=tuple(f * s for s in case.calibration.linear.seconds)),
        decode=dataclasses.replace(case.calibration.decode, seconds=tuple(f * s for s in case.calibration.decode.seconds)),
        attention=dataclasses.replace(
            case.calibration.attention,
            flop_per_s=case.calibration.attention.flop_per_s / f,
            kv_bytes_per_s=case.calibration.attention.kv_bytes_per_s / f,
        ),
    )
    slow = dataclasses.replace(case, calibration=slower).search(Question()).serve(SETTING, 2.0, 42)
    fast = case.search(Question()).serve(SETTING, 2.0 * f, 42)
    assert slow == pytest.approx({name: f * value for name, value in fast.items()}, rel=1e-6)


def known_search(rates: Callable[[Setting], float], looked: set[Setting] | None = None) -> Search:
    """A machine on which a setting keeps a P99 TBT of 0.1 s up to its rate."""

    def serve(setting: Setting, rate: float, seed: int) -> Latency:
        if looked is not None:
            looked.add(setting)
        return Latency(tbt_p99=0.1 * rate / rates(setting), ttft_p50=0.0, delay_p50=0.0)

    return Search(serve)


def test_a_chain_of_ties_does_not_lead_away_from_the_best() -> None:
    """Each is within 2 % of the next, the last 3.6 % below the first."""
    rates = {2048: 1.0, 1024: 0.982, 512: 0.964}
    advice = advise(small_case(), known_search(lambda setting: rates.get(setting.budget, 0.5)), WITHIN)
    assert advice.best.setting == Setting(1024, 128)
    assert advice.best.rate == pytest.approx(0.982, rel=1e-3)


@given(peak=st.tuples(st.floats(3.0, 15.0), st.floats(0.0, 7.0)), slope=st.floats(0.05, 0.6))
@settings(deadline=None)
def test_the_best_of_a_hill_is_found_wherever_it_is(peak: tuple[float, float], slope: float) -> None:
    """A hill over the logs of chunk size and batch, with its top far beyond the coarse grid too."""

    def rates(setting: Setting) -> float:
        far = abs(math.log2(setting.budget) - peak[0]) + abs(math.log2(setting.max_batch) - peak[1])
        return math.exp(-slope * far)

    looked: set[Setting] = set()
    case = small_case()
    best = advise(case, known_search(rates, looked), WITHIN).best
    assert best.rate >= (1 - TIE) * 0.999 * max(map(rates, looked))
    tops = [setting for setting in looked if rates(setting) >= 0.998 * max(map(rates, looked))]
    assert any(case.beside(top) <= looked for top in tops)  # so that it is at no end of what was looked at


def test_the_end_of_the_rates_is_no_answer() -> None:
    with pytest.raises(
        SpecError, match=r"P99 TBT 0\.1 s.*: at least 955 requests/s, the highest load looked at; this trial cannot tell"
    ):
        advise(small_case(), known_search(lambda setting: 1e9), WITHIN)


def test_advice_is_the_best_of_an_exhaustive_search() -> None:
    """Within the tie, over all seeds, among all chunk sizes and batches of a grid."""
    for model, target in (("mistral-7b", 0.1), ("yi-34b", 0.2)):
        case = small_case(model)
        question = Question(Latency(tbt_p99=target))
        search, limits = case.search(question), question.limits
        advice = advise(case, search, question)
        sizes = [setting.budget for setting in case.settings_to_try()]
        every = {(s, b): option(case, search, Setting(s, b), limits).rate for s in sizes for b in (32, 64, 128)}
        assert advice.best.rate >= 0.97 * max(every.values())
        assert advice.best.rate == pytest.approx(advice.value)
        assert advice.low < advice.value < advice.high
        assert len(advice.per_seed) == len(case.seeds) >= 4
        assert [o.setting.budget for o in advice.neighbours] == around(advice.best.setting.budget, sizes)


def test_advice_at_a_fixed_rate() -> None:
    case = small_case()
    questions = [Question(Latency(limit), rate=1.0) for limit in ({"tbt_p99": 0.1}, {"ttft_p50": 1.0})]
    assert [question.goal for question in questions] == ["ttft_p50", "tbt_p99"]
    by_ttft, by_tbt = (advise(case, case.search(question), question) for question in questions)
    assert by_ttft.best.latency["tbt_p99"] <= 0.1
    assert by_tbt.best.latency["ttft_p50"] <= 1.0
    assert by_tbt.best.setting.budget <= by_ttft.best.setting.budget
    with pytest.raises(SpecError, match=r"P99 TBT 0\.1 s.* at 50 requests/s: no chunk size keeps that; the closest is"):
        advise(case, case.search(WITHIN), dataclasses.replace(WITHIN, rate=50.0))


def test_impossible_targets_say_how_close_one_can_get() -> None:
    case, question = small_case(), Question(Latency(tbt_p99=0.005))
    with pytest.raises(SpecError, match=r"0\.005 s.*lowest load looked at \(.*\); the closest is \d+ tokens: P99 TBT 0\.01"):
        advise(case, case.search(question), question)


def test_a_delay_at_any_load_is_of_the_arrivals_and_the_closest_is_by_what_was_asked() -> None:
    def serve(setting: Setting, rate: float, seed: int) -> Latency:
        delay = 48.0 + abs(setting.budget - 4096) / 1e3
        return Latency(tbt_p99=0.05 + abs(setting.budget - 512) / 1e3, ttft_p50=50.0, delay_p50=delay)

    said = r"requests/s\); the arrivals, not the chunk size, make the scheduling delay there; the closest is 512 tokens"
    with pytest.raises(SpecError, match=said):
        advise(small_case(), Search(serve), WITHIN)


def test_interval() -> None:
    mean, low, high = interval([1.0, 2.0, 4.0], 0.9, 1.1)
    assert mean == pytest.approx(2.0)
    assert low < 0.9 < 4.4 < high
    assert interval([0.0, 1.0, 1.1], 0.9, 1.1)[1] == 0.0
