"""Which chunk size, how many requests in a step: the choice, its interval, what its neighbours would cost. Simulated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

from analysis.advise.capacity import HIGHEST, LOWEST, WORDS, Latency, Search, Setting
from analysis.advise.case import FIRST, Case, around, evidence
from analysis.advise.question import Question, describe
from analysis.judge.stats import sample
from experiments.records.errors import SpecError

CLOSE = 0.04  # who is further behind on one seed is not looked at on the others: the arrivals are the same for all
WIDEST = 4.0  # the widest interval that is an answer, high over low
MOST_REQUESTS = 8192  # of a trial
TIE = 0.02  # means over seeds that differ by less are taken as equal: then the smaller chunk size, as its TBT is lower


@dataclass(frozen=True)
class Option:
    """One setting and what it gives: the rate in requests/s that it carries, what bounds it, latencies about there."""

    setting: Setting
    rate: float
    bound_by: str
    latency: Latency


@dataclass(frozen=True)
class Advice:
    """The choice, and the options beside it; `value`, `low`, `high`: its capacity over seeds, requests/s, or the latency that
    is the question's goal, seconds."""

    question: Question
    best: Option
    neighbours: tuple[Option, ...]
    value: float
    low: float
    high: float
    per_seed: tuple[float, ...]
    default: Option | None = None  # vLLM's own, where that is known and covered


@dataclass(frozen=True)
class Confirmed:
    """A setting on the real engine at a rate (requests/s): measured and simulated latency, whether the limits were kept."""

    setting: Setting
    rate: float
    requests: int
    measured: Latency
    simulated: Latency
    kept: bool


def settled(advice: Advice, found: Sequence[Confirmed]) -> Setting:
    """The last word: the best in simulation if it kept the limits on the engine or none did, else who did at the most load."""
    good = {entry.setting: entry.rate for entry in found if entry.kept}
    return advice.best.setting if not good or advice.best.setting in good else max(good, key=good.__getitem__)


# Setting, seed, what is expected, what is of interest (None: any) -> the higher the better, 0: of no interest.
Score = Callable[[Setting, int, float, float | None], float]


def mean(values: Sequence[float]) -> float:
    """The geometric one; 0 if any is."""
    return math.prod(values) ** (1 / len(values))


def ranked(case: Case, score: Score, also: Sequence[Setting] = ()) -> list[Setting]:
    """Chunk size x most requests in a step, from coarse to fine: the best first, then those nearly as good, if any is good.

    On the first seed all of a coarse grid is looked at, then what is beside the best until nothing new is: the best is never
    at the end of a grid. Who is CLOSE to it there is scored on every seed. Of those whose mean is within TIE of the highest the
    best is the one with the smallest chunk size, as its TBT is lower.
    """
    seen: dict[Setting, float] = {}
    first, *others = case.seeds[:FIRST]

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
    means = {each: mean(found) for each, found in logs.items()}
    least = (1 - TIE) * max(means.values(), default=0.0)
    best = min((each for each in near if means[each] >= least), key=lambda each: (each.budget, -each.max_batch), default=None)
    return sorted(near, key=lambda each: (each != best, -means[each]))


def advise(case: Case, search: Search, question: Question, also: Sequence[Setting] = ()) -> Advice:
    """The best setting, `also` these looked at: with the highest capacity or, at a given load, with the lowest latency.

    Raises SpecError if none keeps the limits there or even one request at a time, or some keep them at any load.
    """
    if question.load:
        return advise_load(case, search, question)
    limits = question.limits

    def score(setting: Setting, seed: int, expected: float, bar: float | None) -> float:
        good = bar is None or search.keeps(setting, bar, limits, seed)
        return search.capacity(setting, limits, seed, expected or 1.0).rate if good else 0.0

    found = ranked(case, score, also)
    if not found:
        alone = {setting: loads[LOWEST] for (setting, _), loads in search.seen.items() if LOWEST in loads}
        none = f": no chunk size keeps that at the lowest load looked at ({search.rate(LOWEST):.2g} requests/s)"
        if min(seen["delay_p50"] for seen in alone.values()) > question.delay_s:
            none += "; the arrivals, not the chunk size, make the scheduling delay there"
        raise _impossible(case, question, none, alone)
    best = option(case, search, found[0], limits)
    swept = [setting.budget for setting in case.settings_to_try()]
    sizes = [Setting(size, best.setting.max_batch) for size in around(best.setting.budget, swept)]
    neighbours = tuple(option(case, search, setting, limits, best.rate) for setting in sizes)
    capacities = [search.capacity(best.setting, limits, seed, best.rate) for seed in case.seeds]
    if any(capacity.bound_by == "nothing" for capacity in capacities):
        words = f"at least {search.rate(HIGHEST - 1):.3g} requests/s, the highest load looked at; this trial cannot tell"
        raise SpecError(f"{case.model}: {question}: {words}; tighter targets are needed, or a longer TRACE")
    rates = [capacity.rate for capacity in capacities]
    slow, fast = model_error(
        case, question, lambda other: other.capacity(best.setting, limits, case.seeds[0], rates[0]).rate / rates[0]
    )
    default = known_default(case, lambda setting: option(case, search, setting, limits, best.rate))
    return Advice(question, best, neighbours, *interval(rates, slow, fast, case.sampled), tuple(rates), default)


def steady(case: Case, question: Question) -> tuple[Case, Search, Advice]:
    """The advice of trials long enough: twice as long, what binds or is made best moves, at the load advised, by less than its
    interval over seeds. Raises SpecError where none up to MOST_REQUESTS is, or the interval is wider than WIDEST even then."""
    while True:
        advice = advise(case, search := case.search(question), question)
        longer, best, told = case.lasting(2 * case.requests), advice.best, told_by(case, advice)
        name, rate = (question.goal, question.rate or 1.0) if question.load else (best.bound_by, advice.value)
        if told:
            once, twice = (
                [max(1e-9, question.latency(trial.served(best.setting, rate, seed))[name]) for seed in case.seeds]
                for trial in (case, longer)
            )
            low, high = interval(once, 1.0, 1.0)[1:]
            if low <= interval(twice, 1.0, 1.0)[0] <= high:
                return case, search, advice
        if longer.requests > MOST_REQUESTS:
            found = f"{advice.value:.3g} (95 % interval {advice.low:.3g} to {advice.high:.3g})"
            wide, moves = f"the interval is wider than a factor of {WIDEST:g}", f"{WORDS[name]} moves with the trial's length"
            words = f"{found}: {moves if told else wide}: this trial cannot tell, a longer TRACE may"
            raise SpecError(f"{case.model}: {question}: {words}; {evidence(case)}")
        case = longer


def told_by(case: Case, advice: Advice) -> bool:
    """Whether the interval is an answer; how far off a GPU that is not here may be no trial tells, and is said beside it."""
    seeds = interval(advice.per_seed, 1.0, 1.0, case.sampled)
    alone = case.calibration.gpu and not case.running
    low, high = seeds[1:] if alone else (advice.low, advice.high)
    return high <= WIDEST * low


def option(case: Case, search: Search, setting: Setting, limits: Latency, near: float = 1.0) -> Option:
    """The capacity of a setting, mean over seeds; of the first seed, the latencies at the highest rate served not above it."""
    found = [search.capacity(setting, limits, seed, near) for seed in case.seeds[:FIRST]]
    seen = search.seen[setting, case.seeds[0]]
    below = max((step for step in seen if search.rate(step) <= found[0].rate * 1.0001), default=min(seen))
    return Option(setting, interval([capacity.rate for capacity in found], 1.0, 1.0)[0], found[0].bound_by, seen[below])


def known_default(case: Case, made: Callable[[Setting], Option]) -> Option | None:
    """What vLLM's default gives; None where that is not known, does not fit the memory or is not covered."""
    with suppress(SpecError):
        return made(case.default) if case.default and case.fits(case.default) else None
    return None


def model_error(case: Case, question: Question, found: Callable[[Search], float]) -> tuple[float, float]:
    """What is found if every step took longer, and if shorter, by the calibration's error, see Case.off."""
    slow, fast = (found(case.slower(factor).search(question)) for factor in (1 + case.off, 1 / (1 + case.off)))
    return slow, fast


def interval(values: Sequence[float], down: float, up: float, sampled: float = 0.0) -> tuple[float, float, float]:
    """Geometric mean over seeds and its 95 % t interval, widened by the factors of the calibration's error.

    `sampled`: the share of the variance that no further seed would lessen (see Case). Where a seed has capacity 0 the mean is
    the median and the interval goes down to 0.
    """
    if not any(values):
        return 0.0, 0.0, 0.0
    seen = sample([value for value in values if value > 0])
    wide = math.sqrt(1 + seen.n * sampled)
    low, high = (float(seen.ratio * (end / seen.ratio) ** wide) for end in seen.interval())
    if seen.n < len(values):
        return sorted(values)[len(values) // 2], 0.0, high * up
    return float(seen.ratio), low * down, high * up


def advise_load(case: Case, search: Search, question: Question) -> Advice:
    """At a load that is given, the setting with the lowest latency of those that keep the limits. In a closed loop the rate is
    what users and latency make of it (Little's law), and no arrival heeds the one that is put to the search."""
    limits, goal = question.limits, question.goal
    rate, users = question.rate or 1.0, question.users

    @cache
    def at(setting: Setting, seed: int) -> Latency:
        return search.serve(setting, rate, seed)

    def score(setting: Setting, seed: int, expected: float, bar: float | None) -> float:
        return 1 / at(setting, seed)[goal] if at(setting, seed).within(limits)[0] <= 0 else 0.0

    def made(setting: Setting) -> Option:
        seen = [at(setting, seed) for seed in case.seeds]
        means = Latency({name: mean([each[name] for each in seen]) for name in seen[0]})
        excess, bound_by = means.within(limits)
        if excess > 0:
            return Option(setting, 0.0, bound_by, means)
        times = [float(case.served(setting, rate, seed).requests["e2e"].mean()) for seed in case.seeds]
        return Option(setting, users / mean(times) if users else rate, "nothing", means)

    swept = case.settings_to_try()
    if not (found := ranked(case, score)):
        none = f" {question.load}: no chunk size keeps that"
        raise _impossible(case, question, none, {setting: at(setting, case.seeds[0]) for setting in swept})
    best = found[0]
    beside = [Setting(size, best.max_batch) for size in around(best.budget, [setting.budget for setting in swept])]
    values = [at(best, seed)[goal] for seed in case.seeds]
    slow, fast = model_error(case, question, lambda other: other.serve(best, rate, case.seeds[0])[goal] / values[0])
    known = interval(values, fast, slow, case.sampled)
    return Advice(question, made(best), tuple(map(made, beside)), *known, tuple(values), known_default(case, made))


def _impossible(case: Case, question: Question, words: str, seen: Mapping[Setting, Latency]) -> SpecError:
    """No setting keeps the limits: how close one can get to what was asked."""
    asked = Latency({name: limit for name, limit in question.limits.items() if name != "delay_p50"}) or question.limits
    closest = min(seen, key=lambda at: (max(0.0, seen[at].within(asked)[0]), seen[at].within(question.limits)[0]))
    came = f"the closest is {closest.budget} tokens: {describe(seen[closest])} ({evidence(case)})"
    return SpecError(f"{case.model}: {question}{words}; {came}")
