"""Which chunk size, how many requests in a step: the choice, its interval, what its neighbours would cost. Simulated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from analysis.advise.capacity import LOWEST, WORDS, Latency, Search, Setting
from analysis.judge.stats import sample
from experiments.records.errors import SpecError
from experiments.records.record import Phase
from experiments.simulator.calibration import Calibration
from experiments.simulator.scheduler import Rows
from experiments.simulator.simulator import SimulatedEngine
from experiments.spec.expand import Session
from experiments.spec.spec import EngineSettings
from experiments.spec.traces import Trace
from experiments.spec.workload import serving_requests

CLOSE = 0.04  # who is further behind on one seed is not looked at on the others: the arrivals are the same for all
TIE = 0.02  # means over seeds that differ by less are taken as equal: then the smaller chunk size, as its TBT is lower


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

    def beside(self, setting: Setting) -> set[Setting]:
        """The settings next to this one: chunk sizes half an octave apart, most requests in a step an octave."""
        base, most = self.settings.max_batch, max(self.settings.max_model_len, self.calibration.valid.tokens)
        octaves = [base * 2.0**n for n in range(-base.bit_length(), (most // base).bit_length())]
        sizes = {int(size * part) for size in octaves for part in (1, 1.5)} | {self.settings.max_model_len, setting.budget}
        near = [setting.budget, *around(setting.budget, sorted(sizes))]
        batches = [setting.max_batch, setting.max_batch // 2, 2 * setting.max_batch]
        pairs = {Setting(size, batch) for size in near for batch in batches if 1 <= batch <= base and 2 * batch <= size <= most}
        return pairs - {setting}


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


# Setting, seed, what is expected, what is of interest (None: any) -> the higher the better, 0: of no interest.
Score = Callable[[Setting, int, float, float | None], float]


def ranked(case: Case, score: Score, also: Sequence[Setting] = ()) -> list[Setting]:
    """Chunk size x most requests in a step, from coarse to fine: the best first, then those nearly as good, if any is good.

    On the first seed all of a coarse grid is looked at, then what is beside the best until nothing new is: the best is never
    at the end of a grid. Who is CLOSE to it there is scored on every seed. Of those whose mean is within TIE of the highest the
    best is the one with the smallest chunk size, as its TBT is lower.
    """
    seen: dict[Setting, float] = {}
    first, *others = case.seeds

    def look(settings: Iterable[Setting]) -> None:
        for setting in settings:
            if setting not in seen:
                top = max(seen.values(), default=0.0)
                seen[setting] = score(setting, first, top, (1 - CLOSE) * top)

    sizes = sorted(case.settings_to_try(), key=lambda setting: abs(math.log(setting.budget / setting.max_batch / 8)))
    look([*also, *sizes, *(Setting(setting.budget, setting.max_batch // 4) for setting in sizes if setting.max_batch >= 4)])
    while fresh := case.beside(max(seen, key=lambda each: (seen[each], -each.budget))) - {
        *seen
    }:  # smaller ones if none is good
        look(sorted(fresh))
    top = max(seen.values())
    near = [setting for setting, found in seen.items() if found and found >= (1 - CLOSE) * top]
    logs = {each: [seen[each], *(score(each, seed, seen[each], None) for seed in others)] for each in near}
    means = {each: math.prod(found) ** (1 / len(found)) for each, found in logs.items()}
    least = (1 - TIE) * max(means.values(), default=0.0)
    best = min((each for each in near if means[each] >= least), key=lambda each: (each.budget, -each.max_batch), default=None)
    return sorted(near, key=lambda each: (each != best, -means[each]))


def advise(case: Case, search: Search, limits: Latency, also: Sequence[Setting] = ()) -> Advice:
    """The setting with the highest capacity, `also` these looked at. Raises SpecError if none keeps the limits even one request
    at a time, or some keep them at any load."""

    def score(setting: Setting, seed: int, expected: float, bar: float | None) -> float:
        good = bar is None or search.keeps(setting, bar, limits, seed)
        return search.capacity(setting, limits, seed, expected or 1.0).rate if good else 0.0

    found = ranked(case, score, also)
    if not found:
        alone = {setting: loads[LOWEST] for (setting, _), loads in search.seen.items() if LOWEST in loads}
        raise _impossible(case, limits, ": no chunk size keeps that, even one request at a time", alone)
    best = option(case, search, found[0], limits)
    if best.bound_by == "nothing":
        words = f"kept at any load that {case.requests} requests make; tighter targets are needed, or a longer TRACE"
        raise SpecError(f"{case.model}: {describe(limits)}: {words}")
    swept = [setting.budget for setting in case.settings_to_try()]
    sizes = [Setting(size, best.setting.max_batch) for size in around(best.setting.budget, swept)]
    neighbours = tuple(option(case, search, setting, limits, best.rate) for setting in sizes)
    rates = [search.capacity(best.setting, limits, seed, best.rate).rate for seed in case.seeds]
    slow, fast = model_error(case, search, best.setting, limits, rates[0])
    return Advice(limits, None, "rate", best, neighbours, *interval(rates, slow / rates[0], fast / rates[0]), tuple(rates))


def around(budget: int, tried: Sequence[int]) -> list[int]:
    """The chunk sizes of the sweep that are next to this one."""
    return [*[size for size in tried if size < budget][-1:], *[size for size in tried if size > budget][:1]]


def option(case: Case, search: Search, setting: Setting, limits: Latency, near: float = 1.0) -> Option:
    """The capacity of a setting, mean over seeds; of the first seed, the latencies at the highest rate served not above it."""
    found = [search.capacity(setting, limits, seed, near) for seed in case.seeds]
    seen = search.seen[setting, case.seeds[0]]
    below = max((step for step in seen if search.rate(step) <= found[0].rate * 1.0001), default=min(seen))
    return Option(setting, interval([capacity.rate for capacity in found], 1.0, 1.0)[0], found[0].bound_by, seen[below])


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
    goal, factor = "tbt_p99" if math.isinf(limits.tbt_p99) else "ttft_p50", 1 + case.calibration.error.held_out

    @cache
    def at(setting: Setting, seed: int) -> Latency:
        return search.serve(setting, rate, seed)

    def score(setting: Setting, seed: int, expected: float, bar: float | None) -> float:
        return 1 / getattr(at(setting, seed), goal) if at(setting, seed).within(limits)[0] <= 0 else 0.0

    def made(setting: Setting) -> Option:
        excess, bound_by = at(setting, case.seeds[0]).within(limits)
        return Option(setting, rate if excess <= 0 else 0.0, bound_by, at(setting, case.seeds[0]))

    swept = case.settings_to_try()
    if not (found := ranked(case, score)):
        none = f" at {rate:g} requests/s: no chunk size keeps that"
        raise _impossible(case, limits, none, {setting: at(setting, case.seeds[0]) for setting in swept})
    best = found[0]
    beside = [Setting(size, best.max_batch) for size in around(best.budget, [setting.budget for setting in swept])]
    values = [getattr(at(best, seed), goal) for seed in case.seeds]
    slow, fast = (getattr(search.serve(best, rate * f, case.seeds[0]), goal) * f / values[0] for f in (factor, 1 / factor))
    return Advice(limits, rate, goal, made(best), tuple(map(made, beside)), *interval(values, fast, slow), tuple(values))


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
