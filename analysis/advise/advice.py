"""Which chunk size, how many requests in a step: the choice, its interval, what its neighbours would cost. Simulated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise

from analysis.advise.capacity import LOWEST, WORDS, Latency, Search, Setting
from analysis.judge.stats import sample
from experiments.records.errors import SpecError
from experiments.records.record import Phase
from experiments.simulator.cost_model import Calibration
from experiments.simulator.scheduler import Rows
from experiments.simulator.simulator import SimulatedEngine
from experiments.spec.expand import Session
from experiments.spec.spec import EngineSettings
from experiments.spec.workload import Trace, serving_requests

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

        @cache
        def asked(seed: int) -> Rows:
            requests = serving_requests(self.trace, 1.0, self.requests, seed, self.max_total, self.session.scale)
            return engine(self.settings.max_batch, seed).requests(Phase(1, requests))

        def serve(setting: Setting, rate: float, seed: int) -> Latency:
            requests = asked(seed).copy()  # all arrivals by a factor sooner or later, as serving_requests draws them
            requests["arrival_s"] /= rate
            requests["budget"] = setting.budget
            return Latency(*engine(setting.max_batch, seed).percentiles(requests))

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
        alone = {setting: search.at(setting, LOWEST, seed) for setting in sizes}
        raise _impossible(case, limits, ": no chunk size keeps that, even one request at a time", alone)
    tried, batch = [setting.budget for setting in sizes], best.setting.max_batch
    best = climb(best, [Setting((a + b) // 2, batch) for a, b in pairwise(tried) if best.setting.budget in (a, b)])
    best = climb(best, [Setting(best.setting.budget, batch // part) for part in (2, 4) if batch >= part])
    beside = [Setting(budget, best.setting.max_batch) for budget in around(best.setting.budget, tried)]
    neighbours = tuple(option(search, setting, limits, seed, best.rate) for setting in beside)
    rates = [best.rate, *(search.capacity(best.setting, limits, other, best.rate).rate for other in case.seeds[1:])]
    slow, fast = model_error(case, search, best.setting, limits, best.rate)
    return Advice(limits, None, "rate", best, neighbours, *interval(rates, slow / best.rate, fast / best.rate), tuple(rates))


def around(budget: int, tried: Sequence[int]) -> list[int]:
    """The chunk sizes of the sweep that are next to this one."""
    return [*[size for size in tried if size < budget][-1:], *[size for size in tried if size > budget][:1]]


def option(search: Search, setting: Setting, limits: Latency, seed: int, guess: float) -> Option:
    """The capacity of a setting, and the latencies at the highest rate served that is not above it."""
    capacity, seen = search.capacity(setting, limits, seed, guess), search.seen[setting, seed]
    below = max((step for step in seen if search.rate(step) <= capacity.rate * 1.0001), default=min(seen))
    return Option(setting, capacity.rate, capacity.bound_by, seen[below])


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
    seen = sample([value for value in values if value > 0])
    low, high = map(float, seen.interval())
    if seen.n < len(values):
        return sorted(values)[len(values) // 2], 0.0, high * up
    return float(seen.ratio), low * down, high * up


def advise_rate(case: Case, search: Search, limits: Latency, rate: float) -> Advice:
    """At a fixed rate, the setting with the lowest latency that has no target: P50 TTFT if TBT has one, else P99 TBT.

    Raises SpecError if no setting keeps the limits there.
    """
    goal = "tbt_p99" if math.isinf(limits.tbt_p99) else "ttft_p50"
    seed, factor = case.seeds[0], 1 + case.calibration.error.held_out
    seen = {setting: search.serve(setting, rate, seed) for setting in case.settings_to_try()}
    kept = [setting for setting, came in seen.items() if came.within(limits)[0] <= 0]
    if not kept:
        raise _impossible(case, limits, f" at {rate:g} requests/s: no chunk size keeps that", seen)
    top = min(getattr(seen[setting], goal) for setting in kept)
    best = min(setting for setting in kept if getattr(seen[setting], goal) <= (1 + TIE) * top)
    options = {s.budget: Option(s, rate if s in kept else 0.0, came.within(limits)[1], came) for s, came in seen.items()}
    beside = tuple(options[size] for size in around(best.budget, [*options]))
    values = [getattr(search.serve(best, rate, other), goal) for other in case.seeds]
    slow, fast = (getattr(search.serve(best, rate * f, seed), goal) * f / values[0] for f in (factor, 1 / factor))
    return Advice(limits, rate, goal, options[best.budget], beside, *interval(values, fast, slow), tuple(values))


def describe(limits: Latency) -> str:
    """Latencies in words, those that are given."""
    return ", ".join(f"{WORDS[name]} {value:.3g} s" for name, value in vars(limits).items() if value < math.inf)


def evidence(case: Case) -> str:
    """What a simulated answer rests on."""
    error = f"step times off by {case.calibration.error.held_out:.1%} on held-out data"
    served = f"{case.requests} requests of trace {case.trace.name}, {len(case.seeds)} seeds"
    return f"SIMULATED with calibration {case.calibration.calibration} ({case.calibration.title}), {error}; {served}"


def _impossible(case: Case, limits: Latency, words: str, seen: Mapping[Setting, Latency]) -> SpecError:
    """No setting keeps the limits: how close one can get."""
    closest = min(seen, key=lambda setting: seen[setting].within(limits)[0])
    came = f"the closest is {closest.budget} tokens: {describe(seen[closest])} ({evidence(case)})"
    return SpecError(f"{case.model}: {describe(limits)}{words}; {came}")
