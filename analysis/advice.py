"""Which chunk size, how many requests in a step: the choice, its interval, what its neighbours would cost. Simulated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise

from analysis.capacity import LOWEST, Latency, Search, Setting
from analysis.stats import sample
from experiments.cost_model import Calibration
from experiments.engine import Phase
from experiments.expand import Session
from experiments.simulator import SimulatedEngine
from experiments.spec import EngineSettings, SpecError
from experiments.workload import Trace, serving_requests

TIE = 0.02  # rates that differ by less are taken as equal: then the smaller chunk size, as its TBT is lower


@dataclass(frozen=True)
class Case:
    """A model on a machine, as `session` has them, under a user's requests.

    `requests`: how many a simulation serves; `max_total`: prompt + output in the trace's tokens, before the session's scale.
    """

    session: Session
    calibration: Calibration
    trace: Trace = field(repr=False)
    requests: int
    max_total: int
    seeds: tuple[int, ...]

    @property
    def model(self) -> str:
        """The figure's name of it."""
        return self.session.model

    @property
    def settings(self) -> EngineSettings:
        """Of the engine; chunk size and batch are what is looked for."""
        return self.session.engine

    def search(self) -> Search:
        """Capacities by simulation."""

        @cache
        def engine(max_batch: int, seed: int) -> SimulatedEngine:
            settings = replace(self.settings, max_batch=max_batch, max_budget=self.settings.max_model_len)
            return SimulatedEngine(settings, self.calibration, seed)

        def serve(setting: Setting, rate: float, seed: int) -> Latency:
            requests = serving_requests(self.trace, rate, self.requests, seed, self.max_total, self.session.scale)
            return Latency(*engine(setting.max_batch, seed).percentiles(Phase(setting.budget, requests)))

        return Search(serve)

    def settings_to_try(self) -> list[Setting]:
        """Chunk sizes that double from twice the most requests in a step, so that decodes leave half of it, to unchunked."""
        batch, last = self.settings.max_batch, self.settings.max_model_len
        sizes = [batch * 2**n for n in range(1, (last // batch).bit_length()) if batch * 2**n < last]
        return [Setting(size, batch) for size in (*sizes, last)]


@dataclass(frozen=True)
class Option:
    """One setting and what it gives: the rate in requests/s that it carries, what bounds it, latencies about there."""

    setting: Setting
    rate: float
    bound_by: str
    latency: Latency


@dataclass(frozen=True)
class Advice:
    """The choice, and the options beside it; `value`, `low`, `high`: its capacity over seeds, requests/s.

    With a fixed rate they are of the latency that is minimised, seconds, `goal` its name.
    """

    limits: Latency
    fixed_rate: float | None
    goal: str
    best: Option
    neighbours: tuple[Option, ...]
    value: float
    low: float
    high: float
    per_seed: tuple[float, ...]


def advise(case: Case, search: Search, limits: Latency) -> Advice:
    """The setting with the highest capacity. Raises SpecError if none keeps the limits even one request at a time.

    A setting whose rate is not kept a little above the best so far needs no search of its own.
    """
    seed, sizes = case.seeds[0], case.settings_to_try()

    def climb(best: Option, settings: Sequence[Setting]) -> Option:
        for setting in settings:
            tie = 1 - TIE if setting < best.setting and setting.max_batch == best.setting.max_batch else 1 + TIE
            if search.keeps(setting, best.rate * tie, limits, seed):
                best = option(search, setting, limits, seed, best.rate or 1.0)
        return best

    middle = len(sizes) // 2 - 1  # searched first: most others then fail at its rate
    best = climb(option(search, sizes[middle], limits, seed, 1.0), [*sizes[middle + 1 :], *reversed(sizes[:middle])])
    if not best.rate:
        raise SpecError(_impossible(case, search, limits))
    tried = sorted(setting.budget for setting in sizes)
    between = [Setting((a + b) // 2, best.setting.max_batch) for a, b in pairwise(tried) if best.setting.budget in (a, b)]
    best = climb(best, between)
    fewer = [Setting(best.setting.budget, best.setting.max_batch // part) for part in (2, 4)]
    best = climb(best, [setting for setting in fewer if setting.max_batch])
    beside = [
        option(search, Setting(budget, best.setting.max_batch), limits, seed, best.rate)
        for budget in around(best.setting.budget, tried)
    ]
    rates = [best.rate, *(search.capacity(best.setting, limits, other, best.rate).rate for other in case.seeds[1:])]
    slow, fast = model_error(case, search, best.setting, limits, best.rate)
    value, low, high = interval(rates, slow / best.rate, fast / best.rate)
    return Advice(limits, None, "rate", best, tuple(beside), value, low, high, tuple(rates))


def around(budget: int, tried: Sequence[int]) -> list[int]:
    """The chunk sizes of the sweep that are next to this one."""
    return [*[size for size in tried if size < budget][-1:], *[size for size in tried if size > budget][:1]]


def option(search: Search, setting: Setting, limits: Latency, seed: int, guess: float) -> Option:
    """The capacity of a setting, and the latencies at the highest rate served that is not above it."""
    capacity, seen = search.capacity(setting, limits, seed, guess), search.seen[setting, seed]
    below = [step for step in seen if search.rate(step) <= capacity.rate * 1.0001]
    return Option(setting, capacity.rate, capacity.bound_by, seen[max(below) if below else min(seen)])


def model_error(case: Case, search: Search, setting: Setting, limits: Latency, rate: float) -> tuple[float, float]:
    """Capacity if every step took longer, or shorter, by the calibration's held-out error.

    A machine that is slower by f serves a rate as this one serves f times the rate, with latencies f times as long: the
    simulations at hand tell it.
    """
    factor, seed = 1 + case.calibration.error.held_out, case.seeds[0]
    slow = search.capacity(setting, limits.times(1 / factor), seed, rate).rate / factor
    fast = search.capacity(setting, limits.times(factor), seed, rate).rate * factor
    return slow, fast


def interval(values: Sequence[float], down: float, up: float) -> tuple[float, float, float]:
    """Geometric mean over seeds and its 95 % t interval, widened by the factors of the calibration's error.

    Where a seed has capacity 0 the mean is the median and the interval goes down to 0.
    """
    positive = [value for value in values if value > 0]
    seen = sample(positive)
    low, high = map(float, seen.interval())
    if len(positive) < len(values):
        return sorted(values)[len(values) // 2], 0.0, high * up
    return float(seen.ratio), low * down, high * up


def advise_rate(case: Case, search: Search, limits: Latency, rate: float) -> Advice:
    """At a fixed rate, the setting with the lowest latency that has no target: P50 TTFT if TBT has one, else P99 TBT.

    Raises SpecError if no setting keeps the limits there.
    """
    goal = "tbt_p99" if math.isinf(limits.tbt_p99) else "ttft_p50"
    seed, factor = case.seeds[0], 1 + case.calibration.error.held_out
    seen = {setting: search.serve(setting, rate, seed) for setting in case.settings_to_try()}
    kept = {setting: seen[setting].within(limits)[0] <= 0 for setting in seen}
    if not any(kept.values()):
        closest = min(seen, key=lambda setting: seen[setting].within(limits)[0])
        raise SpecError(
            f"{case.model}: {describe(limits)} at {rate:g} requests/s: no chunk size keeps that; the closest is "
            f"{closest.budget} tokens: {describe(seen[closest])} ({evidence(case)})"
        )
    top = min(getattr(seen[setting], goal) for setting in seen if kept[setting])
    best = min(s for s in seen if kept[s] and getattr(seen[s], goal) <= (1 + TIE) * top)
    options = {s: Option(s, rate if kept[s] else 0.0, came.within(limits)[1], came) for s, came in seen.items()}
    beside = tuple(options[Setting(size, best.max_batch)] for size in around(best.budget, [s.budget for s in seen]))
    values = [getattr(search.serve(best, rate, other), goal) for other in case.seeds]
    slow, fast = (getattr(search.serve(best, rate * f, seed), goal) * f / values[0] for f in (factor, 1 / factor))
    value, low, high = interval(values, fast, slow)
    return Advice(limits, rate, goal, options[best], beside, value, low, high, tuple(values))


def describe(limits: Latency) -> str:
    """Latencies in words, those that are given."""
    words = {"tbt_p99": "P99 TBT", "ttft_p50": "P50 TTFT", "delay_p50": "median delay"}
    given = {name: getattr(limits, name) for name in words if not math.isinf(getattr(limits, name))}
    return ", ".join(f"{words[name]} {value:.3g} s" for name, value in given.items())


def evidence(case: Case) -> str:
    """What a simulated answer rests on."""
    error = case.calibration.error
    return (
        f"SIMULATED with calibration {case.calibration.calibration}, step times off by {error.held_out:.1%} on held-out data; "
        f"{case.requests} requests of trace {case.trace.name}, {len(case.seeds)} seeds"
    )


def _impossible(case: Case, search: Search, limits: Latency) -> str:
    """How close one can get when even one request at a time does not keep the limits."""
    alone = {setting: search.at(setting, LOWEST, case.seeds[0]) for setting in case.settings_to_try()}
    closest = min(alone, key=lambda setting: alone[setting].within(limits)[0])
    return (
        f"{case.model}: {describe(limits)}: no chunk size keeps that, even one request at a time; the closest is "
        f"{closest.budget} tokens: {describe(alone[closest])} ({evidence(case)})"
    )
